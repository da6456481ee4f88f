"""The contract's lines as a user writes them, beside a hooks.py and a probes/ of their own."""

import subprocess
import sys
from pathlib import Path

import pytest

LINES = """
import imaginelens as il

lens = il.load("latent-content")
print(lens.describe())
lens.registry.match("*.hook_resid_post")
lens.registry.add("blocks.0.hook_resid_post", lambda act, hook: None)
lens.registry.clear()
task = lens.task(n=64, seed=0)
assert len(task) == 64 and task.hypotheses
pairs = il.Pairs(base=task.base, source=task.source, base_answers=task.base_answers, source_answers=task.source_answers, groups=None)

run = lens.run(task.base[0])
img, text = task.base[0]["images"], task.base[0]["text"]
assert lens.run(images=img, text=text).text == run.text
print(run.text, run.answer, run.latents.shape, run.tokens, run.trigger, run.latent_mask, run.latent_span)
run = lens.run(task.base[0], names_filter="*.hook_resid_post"); run.cache["resid_post", 1]

logits, cache = lens.run_with_cache(run, names_filter=lambda n: n.endswith("hook_resid_post"))
logits, cache = lens.run_with_cache(task.base[0])
logits = lens.run_with_hooks(task.base[0], fwd_hooks=[("blocks.1.hook_resid_post", lambda act, hook: act * 0.9)])

donor = lens.run(task.source[0])
with lens.edit(il.Swap(donor), at=il.latent[1], site="hook_latent") as landing:
    changed = lens.run(task.base[0])
print(landing.fired, landing.relative_change)
assert landing.fired == 1 and landing.relative_change > 0

reference = lens.run(task.base)
lens.patch(base=task.base[0], source=task.source[0], site="blocks.1.hook_resid_post", at=il.latent[0], metric=il.logit_diff)
lens.ablate(task.base[0], il.Mean(reference), at=il.latent, metric=il.log_prob)
lens.swap(task.base[0], task.source[0], at=il.latent, context="fixed")

<MEDIATION>
il.latent, il.latent[2], il.latent[1:4], il.span[0].latent, il.image, il.image[0][3:6, 2:9], il.text.find("red cube"), il.before_answer
il.answer, il.last_prompt, il.positions([4, 7])
import hooks, probes
assert hooks.MINE and probes.MINE
print("CONTRACT HELD")
"""  # noqa: E501

MEDIATION = """
worlds = il.counterfactuals(lens, task, metric=il.source_answer, context="free")
effects = worlds.effects()
effects.te, effects.pnde, effects.tnde, effects.pnie, effects.tnie, effects.cde, effects.int_ref, effects.int_med, effects.prop_mediated
effects.tnie.ci(), effects.tnie.pvalue(), effects.tnie.equivalence(margin=0.05), effects.tnie.verdict(margin=0.05)
effects.tnie.verdict(margin=il.relative(0.05))
il.interchange(lens, task, hypotheses=task.hypotheses, at=il.latent).shares()
necessity = il.necessity(lens, task, edits=[il.Constant(), il.AddNoise(0.3), il.Noise(), il.Zero(), il.Sham()], metric=il.accuracy)
dependence = il.input_dependence(lens, task)
print(worlds, effects, necessity, dependence)
assert worlds.controls.sham == 0 and effects.te.value > 0.9
"""  # noqa: E501
ORGANISMS = """
import imaginelens as il

for name in ("latent-pointer", "latent-ignored", "latent-ignored-aligned"):
    lens = il.load(name)
    task = lens.task(n=64, seed=0)
    <MEDIATION>
print("CONTRACT HELD")
"""


def run(lines: str, folder: Path) -> None:
    """Run lines as a user's script."""
    (folder / "mine.py").write_text(lines)
    done = subprocess.run(
        [sys.executable, "mine.py"], cwd=folder, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "CONTRACT HELD" in done.stdout


def test_the_contract_runs_as_written_beside_a_users_own_modules(tmp_path: Path) -> None:
    (tmp_path / "hooks.py").write_text("MINE = True\n")
    (tmp_path / "probes").mkdir()
    (tmp_path / "probes" / "__init__.py").write_text("MINE = True\n")
    run(LINES.replace("<MEDIATION>", MEDIATION), tmp_path)


@pytest.mark.slow
def test_the_mediation_lines_run_on_the_other_organisms(tmp_path: Path) -> None:
    indented = MEDIATION.strip().replace("\n", "\n    ")
    run(ORGANISMS.replace("<MEDIATION>", indented), tmp_path)
