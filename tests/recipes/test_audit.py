"""Audits tell causal latents from idle ones, change nothing, and go on where they were."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from latent_chains import hunts, parameters
from PIL import Image

import imaginelens as il
from examples.capimagine.chains import Chain, save
from examples.latent_baselines import audit as audits
from examples.latent_baselines import train
from examples.latent_baselines.audit import Audit, audited, curves, pairs_of, read_rows
from examples.latent_baselines.checkpoints import open_to_train
from examples.latent_baselines.encoding import encode
from examples.latent_baselines.loop import span_of
from examples.latent_baselines.train import PLANS, Settings, run_plan
from imaginelens.hooks import LatentModel
from imaginelens.hooks.errors import InputError

BRIEF = Settings(updates=6, batch=8, warmup=2, save_every=2)


def _audited(name: str, chains: list[Chain]) -> dict[tuple[str, str], dict[str, Any]]:
    lens = open_to_train(name, steps=2, dtype=torch.float32)
    lens.model.eval()
    rows = audited(lens, pairs_of(chains, lens.processor), steps=2)
    return {(row["kind"], row["of"].split("(")[0]): row for row in rows}


def test_latents_that_carry_the_answer_are_needed_and_swapped_with_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(audits, "EDITS", (il.Mean(), il.Zero(), il.Resample()))
    rows = _audited("latent-content", hunts(tmp_path, 20, seed=9))
    for edit in ("Mean", "Zero", "Resample"):
        row = rows["necessity", edit]
        assert row["before"] > 0.9
        assert row["after"] < 0.5
        assert row["high"] < 0
    assert rows["interchange", "content"]["after"] > 0.9
    assert rows["interchange", "pointer"]["after"] < 0.2


def test_latents_that_nobody_reads_are_inert(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(audits, "EDITS", (il.Zero(), il.Resample()))
    rows = _audited("latent-ignored", hunts(tmp_path, 20, seed=9, hops=1))
    for edit in ("Zero", "Resample"):
        assert rows["necessity", edit]["before"] > 0.9
        assert rows["necessity", edit]["after"] > 0.9
    assert rows["interchange", "ignored"]["after"] > 0.9


def test_a_model_that_never_opens_a_span_is_asked_and_what_cannot_be_told_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(audits, "EDITS", (il.Zero(),))
    rows = _audited("base", hunts(tmp_path, 6, seed=9))
    assert rows["necessity", "Zero"]["n"] == 6
    ((_, reason),) = [key for key in rows if key[0] == "failed"]
    assert "none of the 6 pairs tells content, pointer, ignored apart" in reason


def test_chains_of_one_answer_cannot_be_paired(tmp_path: Path) -> None:
    lens = open_to_train("base", steps=2, dtype=torch.float32)
    alike = [replace(chain, answer="bar") for chain in hunts(tmp_path, 4, seed=9)]
    with pytest.raises(InputError, match="one answer"):
        pairs_of(alike, lens.processor)


# ---- beside a training -------------------------------------------------------------------------


@pytest.mark.slow
def test_an_audited_training_is_the_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(audits, "EDITS", (il.Noise(),))
    chains = hunts(tmp_path / "raw", 48, seed=1)
    plan = PLANS["interchange"]
    alone = run_plan(plan, chains[:32], tmp_path / "alone", settings=BRIEF, rule="content")
    with torch.random.fork_rng():
        watched = run_plan(
            plan, chains[:32], tmp_path / "watched", settings=BRIEF, rule="content", audit=6,
            held=chains[32:],
        )  # fmt: skip
    pairs = zip(parameters(alone.model), parameters(watched.model), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)
    rows = read_rows(tmp_path / "watched")
    assert sorted({row["update"] for row in rows}) == [0, 6]
    assert len({json.dumps(row) for row in rows}) == len(rows)
    with Image.open(tmp_path / "watched" / "audit.png") as picture:
        assert picture.width > 600


class Stopped(RuntimeError):
    pass


def _sums(lens: LatentModel, pairs: object, *, steps: int) -> list[dict[str, Any]]:
    """Rows that only the very same weights give."""
    sums = [float(weight.double().sum()) for weight in parameters(lens.model)]
    return [{"kind": "weights", "of": "sums", "sums": sums}]


def test_a_training_that_was_stopped_goes_on_as_if_it_had_not_been(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the second stage, whose teacher is the first: weights and rows are those of the other."""
    chains = hunts(tmp_path / "raw", 44, seed=1)
    teach, distil, _ = PLANS["monet"]
    plan = (replace(teach, share=0.4), replace(distil, share=0.6))
    options: dict[str, Any] = {"settings": replace(BRIEF, updates=10, batch=4), "audit": 3}
    monkeypatch.setattr(audits, "audited", _sums)
    whole = run_plan(plan, chains[:32], tmp_path / "whole", held=chains[32:], **options)

    real = Audit.on_step_end

    def stop(self: Audit, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        real(self, args, state, control, **kwargs)
        if self.begun and state.global_step == 5:
            raise Stopped

    monkeypatch.setattr(Audit, "on_step_end", stop)
    with pytest.raises(Stopped):
        run_plan(plan, chains[:32], tmp_path / "cut", held=chains[32:], **options)
    monkeypatch.setattr(Audit, "on_step_end", real)
    assert (tmp_path / "cut" / "teach" / "done.json").exists()
    assert not (tmp_path / "cut" / "distil" / "done.json").exists()
    resumed = run_plan(plan, chains[:32], tmp_path / "cut", held=chains[32:], **options)
    pairs = zip(parameters(whole.model), parameters(resumed.model), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)
    rows = read_rows(tmp_path / "cut")
    assert rows == read_rows(tmp_path / "whole")
    assert [row["update"] for row in rows] == [0, 3, 4, 7, 10]
    # stopped after the last update, before the stage was marked as done
    (tmp_path / "cut" / "distil" / "done.json").unlink()
    again = run_plan(plan, chains[:32], tmp_path / "cut", held=chains[32:], **options)
    pairs = zip(parameters(whole.model), parameters(again.model), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)
    assert read_rows(tmp_path / "cut") == rows


def test_accumulated_small_batches_give_the_gradient_of_the_big_one(tmp_path: Path) -> None:
    chains = hunts(tmp_path / "raw", 16, seed=1)
    big = Settings(updates=1, batch=16, warmup=0)
    ended = [
        run_plan(PLANS["lvr"], chains, tmp_path / str(s.batch), settings=s, dtype=torch.float64)
        for s in (big, replace(big, batch=4, accumulate=4))
    ]
    start = open_to_train("base", steps=2, dtype=torch.float64)
    moved = 0.0
    weights = zip(*(parameters(lens.model) for lens in (*ended, start)), strict=True)
    for one, other, begun in weights:
        # the first step of AdamW has the size of the rate, whatever the gradient's
        assert (one - other).abs().max() < 1e-5
        moved = max(moved, float((one - begun).abs().max()))
    assert moved > 1e-3


@pytest.mark.slow
def test_the_command_trains_what_the_library_opens(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(audits, "EDITS", (il.Zero(),))
    save(hunts(tmp_path / "raw", 12, seed=1), tmp_path / "raw" / "chains.jsonl")
    command = f"train {tmp_path}/raw/chains.jsonl --objective mirage --updates 4 --batch 4"
    monkeypatch.setattr("sys.argv", [*command.split(), "--out", f"{tmp_path}/out"])
    train.main()
    model = tmp_path / "out" / "free" / "model"
    lens = il.load(model)
    assert (lens.spec.name, lens.spec.max_steps) == ("organism", 2)
    command = f"audit {model} --chains {tmp_path}/raw/chains.jsonl --n 12"
    monkeypatch.setattr("sys.argv", command.split())
    audits.main()
    said = capsys.readouterr().out
    assert "accuracy" in said
    assert "Zero()" in said


def test_only_chains_that_were_kept_are_learned(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    learned: list[str] = []
    save(chains := hunts(tmp_path / "raw", 4, seed=1), tmp_path / "raw/chains.jsonl")
    save(chains[1:3], tmp_path / "kept.jsonl")
    monkeypatch.setattr(train, "run_plan", lambda _, given, *a, **k: learned.extend(
        chain.id for chain in given))  # fmt: skip
    command = f"train {tmp_path}/raw/chains.jsonl --objective lvr --out {tmp_path}/out"
    monkeypatch.setattr("sys.argv", [*command.split(), "--like", f"{tmp_path}/kept.jsonl"])
    train.main()
    assert learned == [chain.id for chain in chains[1:3]]


def test_several_processes_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("transformers.TrainingArguments.world_size", 2)
    with pytest.raises(SystemExit, match="one process"):
        run_plan(
            PLANS["coconut"], hunts(tmp_path / "raw", 8, seed=1), tmp_path / "out", settings=BRIEF
        )


def test_likeness_is_of_each_step_to_its_own_picture(tmp_path: Path) -> None:
    lens, chains = il.load("latent-content"), hunts(tmp_path, 8, seed=2)
    items, _ = encode(lens, span_of(lens), chains)
    aims = torch.stack([item.targets for item in items])
    assert audits.likeness(lens, chains, aims) == pytest.approx([1.0, 1.0])
    assert max(audits.likeness(lens, chains, aims.roll(1, 1))) < 0.9
    assert audits.likeness(lens, [replace(c, reply=("bar",)) for c in chains], aims) == []


@pytest.mark.slow
def test_aligned_latents_come_to_matter_and_unsupervised_ones_do_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The measured contrast: Mirage's stages against words alone, at equal updates."""
    monkeypatch.setattr(audits, "EDITS", (il.Mean(), il.Zero(), il.Resample()))
    chains, held = hunts(tmp_path / "raw", 3072, seed=1), hunts(tmp_path / "held", 64, seed=2)
    found = {}
    for name in ("mirage", "coconut"):
        out = tmp_path / name
        run_plan(PLANS[name], chains, out, settings=Settings(updates=600), audit=600, held=held)
        found[name] = {r["of"]: r for r in read_rows(out) if r["update"] == 600}
    for edit in ("Mean()", "Zero()", "Resample()"):
        causal, idle = found["mirage"][edit], found["coconut"][edit]
        assert causal["before"] > 0.75
        assert causal["after"] < 0.5
        assert causal["high"] < -0.2
        assert idle["before"] < 0.55  # the commonest shape of the board is right in 0.37
        assert abs(idle["change"]) < 0.1
    assert found["mirage"]["content"]["low"] > 0.6
    assert found["coconut"]["content"]["high"] < 0.5


# ---- curves ------------------------------------------------------------------------------------


def test_curves_show_the_rows() -> None:
    rows = [
        {"update": u, "kind": "necessity", "of": "Zero()", "before": b, "after": a, "n": 9.0}
        for u, b, a in [(5, 0.9, 0.1), (0, 0.2, 0.2)]
    ]
    figure = curves(rows, "necessity")
    drawn = {trace.name: (list(trace.x), list(trace.y)) for trace in figure.data}
    assert drawn == {"latents as they are": ([0, 5], [0.2, 0.9]), "Zero()": ([0, 5], [0.2, 0.1])}
    assert "Zero(): 0.10 at update 5" in figure.alt
