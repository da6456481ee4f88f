"""Rows that are read block by block give what rows in memory give."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from imaginelens.hooks.errors import CheckpointError, InputError
from imaginelens.probes import selecting, streamed_rows
from imaginelens.probes.estimators import probe
from imaginelens.probes.fitting import cross_fit, fit_probe
from imaginelens.probes.result import ProbeResult
from imaginelens.probes.selecting import select
from imaginelens.probes.shards import SHARD, OnDisk, open_states, save_states
from imaginelens.probes.states import States
from imaginelens.probes.streamed_rows import Streamed

N, WIDTH = 150, 6
ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streamed_rows, "BLOCK", 64 * 8 * WIDTH)


def draw(seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """States far from 0, one coordinate a constant; classes, a quantity, and groups."""
    rng = np.random.default_rng(seed)
    x, classes = rng.normal(size=(N, WIDTH)) + 50, rng.integers(0, 3, N)
    x[:, 3] = 2.0
    x[np.arange(N), classes] += 1.5
    return x, classes, 1.5 * x[:, 5] + rng.normal(size=N), rng.integers(0, 30, N)


def same(one: ProbeResult, other: ProbeResult) -> None:
    """All numbers of two results, to 1e-9."""
    assert one.probe.strength_ == other.probe.strength_
    assert one.beside.keys() == other.beside.keys()
    pairs: list[tuple[Any, Any]] = [(one.beside[k], other.beside[k]) for k in one.beside]
    for name in ("predictions", "probabilities", "shuffled", "baseline", "direction"):
        pairs.append((getattr(one, name), getattr(other, name)))
    arrays = one.probe.readout_.arrays, other.probe.readout_.arrays
    pairs += [(arrays[0][name], arrays[1][name]) for name in arrays[0]]
    for mine, theirs in pairs:
        if mine is None:
            assert theirs is None
        else:
            np.testing.assert_allclose(mine, theirs, rtol=0, atol=1e-9)


def both(states: States, **options: Any) -> tuple[ProbeResult, ProbeResult]:
    held, streamed = (fit_probe(states, stream=stream, **options) for stream in (False, True))
    return held, streamed


@pytest.mark.parametrize("strengths", [None, (0.01,)], ids=["chosen", "given"])
@pytest.mark.parametrize("grouped", [False, True], ids=["alone", "groups"])
@pytest.mark.parametrize("kind", ["ridge", "quantity", "logistic"])
def test_streamed_is_held(kind: str, grouped: bool, strengths: Any) -> None:
    x, classes, quantity, groups = draw()
    y = quantity if kind == "quantity" else classes
    held, streamed = both(
        States.of(x, y.tolist()),
        kind="ridge" if kind == "quantity" else kind,
        groups=groups if grouped else None,
        permutations=20,
        strengths=strengths,
    )
    assert held.score.value > 0.2
    same(held, streamed)


@pytest.mark.parametrize("options", [{}, {"pool": "mean"}, {"step": 1}], ids=repr)
def test_steps_and_controls_stream_as_they_are_held(options: Any, tmp_path: Path) -> None:
    x, classes, _, _ = draw()
    rng = np.random.default_rng(1)
    steps = x[:, None] + rng.normal(size=(N, 3, WIDTH))
    mask = rng.random((N, 3)) < 0.8
    whole = mask if options else None  # side by side, none may lack a step
    states = States.of(np.where(mask[..., None], steps, 0), classes.tolist(), mask=whole)
    other = States.of(rng.normal(size=(N, WIDTH)))
    states = replace(states, controls={"other": other})
    path = save_states(states, tmp_path / "states", shard_size=40)
    held = fit_probe(states, kind="ridge", permutations=20, **options)
    streamed = fit_probe(open_states(path), kind="ridge", permutations=20, stream=True, **options)
    assert "other" in held.beside
    same(held, streamed)


def test_labels_of_each_step_stream_as_they_are_held() -> None:
    x, classes, _, _ = draw()
    steps = np.stack([x, x + 1], axis=1)
    labels = np.stack([classes, (classes + 1) % 3], axis=1).tolist()
    same(*both(States.of(steps, labels), kind="ridge", permutations=20, controls=()))


@pytest.mark.parametrize("kind", ["ridge", "logistic"])
def test_a_class_that_no_training_row_has_is_never_predicted(kind: str) -> None:
    x, classes, _, _ = draw()
    split = np.arange(N) % 3
    classes = np.where((classes == 2) & (split > 0), 0, classes)  # in fold 0 alone
    rows = Streamed(lambda rows, steps: x[rows], np.arange(N), np.zeros(N, dtype=int), WIDTH)
    (held,) = cross_fit(probe(kind), x, [classes], 3, split, None)
    (streamed,) = cross_fit(probe(kind), rows, [classes], 3, split, None)
    assert np.isneginf(held[split == 0, 2]).all()
    np.testing.assert_allclose(held, streamed, rtol=0, atol=1e-9)


# ---- when, and what is refused -------------------------------------------------------------------


def test_large_states_on_the_disk_are_streamed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    x, classes, _, _ = draw()
    states = States.of(x, classes.tolist())
    stored = open_states(save_states(states, tmp_path / "states"))
    how: dict[str, Any] = {"step": None, "site": None, "pool": None, "takes_sets": False}

    def is_streamed(given: States) -> bool:
        return isinstance(select(given, stream=None, **how).x, Streamed)

    assert not is_streamed(stored)
    monkeypatch.setattr(selecting, "HELD", 8 * N * WIDTH - 1)
    assert is_streamed(stored)
    assert not is_streamed(states)
    found = fit_probe(stored, kind="ridge", controls=("shuffled labels",))
    assert len(found.shuffled) == 20  # 200 where they are held
    assert len(fit_probe(states, kind="ridge", controls=("shuffled labels",)).shuffled) == 200
    assert fit_probe(stored, kind="mass_mean", controls=()).score.value > 0.5  # which holds them


def test_what_cannot_be_streamed_is_refused() -> None:
    x, classes, _, _ = draw()
    states = States.of(x, classes.tolist())
    with pytest.raises(InputError, match="a mass_mean probe holds all of the 150 rows of width 6"):
        fit_probe(states, kind="mass_mean", stream=True)
    with pytest.raises(InputError, match="streamed need them above 0"):
        fit_probe(states, kind="ridge", strengths=(0.0,), stream=True)
    x[70, 1] = np.nan
    rows = Streamed(lambda rows, steps: x[rows], np.arange(N), np.zeros(N, dtype=int), WIDTH)
    with pytest.raises(InputError, match=r"1 of rows 64 to 127 .* row 70"):
        list(rows.blocks())


def test_a_shard_that_changes_between_two_readings_is_found(tmp_path: Path) -> None:
    x, classes, _, _ = draw()
    path = save_states(States.of(x, classes.tolist()), tmp_path / "states")
    cells = open_states(path).cells
    assert isinstance(cells, OnDisk)
    rows = np.arange(10)
    before = cells.read(0, 0, rows)
    assert cells.checked
    assert np.array_equal(before, cells.read(0, 0, rows))
    file = path / SHARD.format(0)
    torn = bytearray(file.read_bytes())
    torn[torn.index(before[0].tobytes())] ^= 1
    file.write_bytes(torn)
    os.utime(file, ns=(0, file.stat().st_mtime_ns + 10**9))
    with pytest.raises(CheckpointError, match="has changed since it was written"):
        cells.read(0, 0, rows)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="its memory limit and /proc")
def test_a_store_is_probed_in_less_memory_than_its_states_take(tmp_path: Path) -> None:
    """1 GB in two cells, under 1.5 GB with torch and all; one cell in float64, twice, is more."""
    out = tmp_path / "big_store.json"
    command = ["--gigabytes", "1", "--limit", "1.5", "--steps", "1", "--sites", "2"]
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.big_store", *command, "--out", str(out)],
        cwd=ROOT, capture_output=True, text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "TMPDIR": str(tmp_path)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = json.loads(out.read_text())
    assert found["store"]["gigabytes"] > 0.99
    assert found["memory"]["peak_anonymous_gigabytes"] < 1.2
    assert [job["verdict"] for job in found["probes"] if job["label"] == "absent"] == [
        "not decodable"
    ]
