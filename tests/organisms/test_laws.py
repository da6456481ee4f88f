"""The laws that every model obeys, on all shipped organisms. Those of the latents themselves are in
test_mechanisms.py, those of imagination in words in test_text.py."""

from pathlib import Path
from typing import Any

import numpy as np
import oracle
import pytest
import tiny
import torch
from untouched import fingerprint, same

import imaginelens as il
from imaginelens.hooks import controls

QWEN = "qwen2_5_vl"  # what all organisms are
EVERYWHERE = (
    "hook_embed", "vision_projector.hook_out", "ln_final.hook_normalized", "unembed.hook_out",
    *(
        f"blocks.1.{site}"
        for site in (
            "hook_resid_pre", "hook_resid_mid", "hook_resid_post", "hook_attn_out", "hook_mlp_out",
            "attn.hook_q", "attn.hook_k", "attn.hook_v", "attn.hook_z", "mlp.hook_pre",
            "mlp.hook_post",
        )
    ),
)  # fmt: skip


# one that uses its latents and one that writes words; the others are as fast, but not needed daily
FAST = ("latent-content", "text")
ALL = [
    name if name in FAST else pytest.param(name, marks=pytest.mark.slow)
    for name in il.organisms.available()
]


@pytest.fixture(scope="module", params=ALL)
def lens(request: pytest.FixtureRequest) -> il.Organism:
    return il.load(request.param, dtype=torch.float64)


def plain_inputs(lens: il.Organism, given: Any) -> dict[str, torch.Tensor]:
    inputs = dict(lens.prompt(given).inputs)
    return {**inputs, "position_ids": tiny.positions(lens.model, inputs)}


@pytest.mark.parametrize("site", EVERYWHERE)
def test_reading_and_editing_a_site_equal_plain_torch(lens: il.Organism, site: str) -> None:
    given = lens.task(n=2, seed=0).base
    inputs = plain_inputs(lens, given)
    wanted = oracle.read(QWEN, lens.model, site, inputs)

    def edit(act: torch.Tensor) -> torch.Tensor:
        return torch.cat([act[:, :-2], act[:, -2:] * 0.5 + 0.25], dim=1)

    with torch.no_grad():
        logits, cache = lens.run_with_cache(given, names_filter=site)
        hook = (site, lambda act, hook: edit(act.reshape(wanted.shape)).reshape(act.shape))
        changed = lens.run_with_hooks(given, fwd_hooks=[hook])
    assert torch.equal(cache[site].reshape(wanted.shape), wanted)
    assert torch.equal(changed, oracle.edited(QWEN, lens.model, site, inputs, edit))
    assert not torch.equal(changed, logits)


def test_a_pattern_edit_equals_attention_written_by_hand(lens: il.Organism) -> None:
    given = lens.task(n=2, seed=0).base
    pattern, v, z = (f"blocks.1.attn.hook_{part}" for part in ("pattern", "v", "z"))

    def uniform(act: torch.Tensor, hook: Any = None) -> torch.Tensor:
        seen = (act > 0).to(act)
        return seen / seen.sum(-1, keepdim=True).clamp_min(1)

    with torch.no_grad():
        _, cache = lens.run_with_cache(given, names_filter=[pattern, v, z])
        changed = lens.run_with_hooks(given, fwd_hooks=[(pattern, uniform)])
        values = cache[v].repeat_interleave(cache[pattern].shape[2] // cache[v].shape[2], dim=2)
        by_hand = torch.einsum("bqhk,bkhd->bqhd", uniform(cache[pattern]), values)
        hooks = [(pattern, lambda act, hook: None), (z, lambda act, hook: by_hand)]
        torch.testing.assert_close(
            changed, lens.run_with_hooks(given, fwd_hooks=hooks), rtol=0, atol=1e-10
        )
    read = torch.einsum("bqhk,bkhd->bqhd", cache[pattern], values)
    torch.testing.assert_close(cache[z], read, rtol=0, atol=1e-10)
    assert (by_hand - read).abs().max() > 1e-3


def test_identities_between_sites(lens: il.Organism) -> None:
    given = lens.task(n=2, seed=0).base
    d = torch.randn(lens.structure.d_model, generator=torch.Generator().manual_seed(0)).double()

    def plus(site: str) -> torch.Tensor:
        with torch.no_grad():
            return lens.run_with_hooks(given, fwd_hooks=[(site, lambda act, hook: act + d)])

    for one, other in (("resid_mid", "attn_out"), ("resid_post", "mlp_out")):
        torch.testing.assert_close(
            plus(f"blocks.1.hook_{one}"), plus(f"blocks.1.hook_{other}"), rtol=0, atol=1e-10
        )
    assert (plus("blocks.1.hook_resid_mid") - plus("blocks.1.hook_mlp_out")).abs().max() > 1e-3


def test_sham_is_nothing_and_a_full_swap_is_everything(lens: il.Organism) -> None:
    task = lens.task(n=8, seed=1)
    base = lens.run(task.base, keep_logits=True)
    for site in EVERYWHERE:
        at = il.image if site.startswith("vision") else il.before_answer
        at = il.last_prompt if site == "hook_embed" else at
        change, landing = controls.sham_difference(lens, base, site=site, at=at)
        assert change == 0.0
        assert landing.fired >= 1
    assert controls.path_gap(lens, base) < 1e-9
    pairs = [(lens.run(one), lens.run(other)) for one, other in task]
    equal = [i for i, (one, other) in enumerate(pairs) if one.tokens.width == other.tokens.width]
    one, two = (
        lens.run([side[i] for i in _as_wide_as_the_first(pairs, equal)])
        for side in (task.base, task.source)
    )
    assert len(one) >= 2
    assert controls.full_swap_difference(lens, one, two) < 1e-9
    assert controls.full_swap_difference(lens, one, two, permute=True) > 1e-3


def _as_wide_as_the_first(pairs: list[tuple[il.Run, il.Run]], rows: list[int]) -> list[int]:
    return [i for i in rows if pairs[i][0].tokens.width == pairs[rows[0]][0].tokens.width]


def test_order_and_batch_do_not_matter(lens: il.Organism) -> None:
    given = lens.task(n=3, seed=2).base
    hooks = [
        ("blocks.2.hook_resid_mid", lambda act, hook: act * 0.5),
        ("blocks.0.attn.hook_z", lambda act, hook: act + 0.1),
        ("vision_projector.hook_out", lambda act, hook: act * 0.9),
        ("blocks.1.attn.hook_pattern", lambda act, hook: act * 0.7),
    ]
    with torch.no_grad():
        forth = lens.run_with_hooks(given, fwd_hooks=hooks)
        assert torch.equal(forth, lens.run_with_hooks(given, fwd_hooks=hooks[::-1]))
        for row, one in enumerate(given):
            alone = lens.run_with_hooks(one, fwd_hooks=hooks)[0]
            torch.testing.assert_close(forth[row, -len(alone) :], alone, rtol=0, atol=1e-9)
    together = lens.run(given)
    assert together.texts == [lens.run(one).text for one in given]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_an_interrupted_run_leaves_nothing_behind(
    lens: il.Organism, error: type[BaseException]
) -> None:
    given = lens.task(n=1, seed=3).base[0]
    before = fingerprint(lens.model)

    def boom(act: torch.Tensor, hook: Any) -> torch.Tensor:
        raise error("on purpose")

    for site in ("blocks.1.hook_resid_mid", "blocks.0.attn.hook_pattern"):
        with pytest.raises(error, match="on purpose"), lens.hooks([(site, boom)]):
            lens.run(given)
    assert lens.registry.entries == []
    assert same(before, fingerprint(lens.model))


def test_saved_and_loaded_equals_kept_in_memory(lens: il.Organism, tmp_path: Path) -> None:
    given = lens.task(n=2, seed=4).base
    run = lens.run(given, names_filter="*.hook_resid_post")
    run.cache.save(tmp_path / "cache.safetensors")
    again = il.ActivationCache.load(tmp_path / "cache.safetensors")
    assert set(again) == set(run.cache)
    for name in again:
        assert torch.equal(
            torch.as_tensor(again[name]).nan_to_num(), torch.as_tensor(run.cache[name]).nan_to_num()
        )


@pytest.mark.parametrize("context", ["free", "fixed"])
@pytest.mark.parametrize(
    "name", ["latent-content", "latent-pointer", "latent-ignored", "latent-ignored-aligned"]
)
def test_effects_add_up_and_swaps_are_indirect_effects(name: str, context: Any) -> None:
    lens = il.load(name, dtype=torch.float64)
    task = lens.task(n=12, seed=5)
    worlds = il.counterfactuals(
        lens, task, metric=il.logit_diff, context=context, steps="telescoping", controls=False
    )
    effects = worlds.effects()
    values = {k: getattr(effects, k).values for k in ("te", "pnde", "tnde", "pnie", "tnie")}
    np.testing.assert_allclose(values["te"], values["pnde"] + values["tnie"], rtol=0, atol=1e-9)
    np.testing.assert_allclose(values["te"], values["tnde"] + values["pnie"], rtol=0, atol=1e-9)
    parts = [part.values for part in effects.by_step().values()]
    np.testing.assert_allclose(np.sum(parts, axis=0), values["pnie"], rtol=0, atol=1e-9)
    words: dict[str, Any] = {
        "at": il.latent, "context": context, "metric": il.logit_diff,
        "base_answers": task.base_answers, "source_answers": task.source_answers,
    }  # fmt: skip
    denoise = lens.swap(task.base, task.source, **words)
    np.testing.assert_allclose(denoise.effect.numpy(), values["pnie"], rtol=0, atol=1e-9)
    swapped = {"base_answers": task.source_answers, "source_answers": task.base_answers}
    noise = lens.swap(task.source, task.base, **(words | swapped))
    # the contrast stays logit(source answer) - logit(base answer): seen from the source, its sign
    gap = -noise.effect.numpy() + values["tnie"]
    if context == "free":  # in fixed context each swap is at its own base's text
        np.testing.assert_allclose(gap, 0, rtol=0, atol=1e-9)
