"""States on disk: equal to those in memory, whatever interrupts, and read cell by cell."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
import tracemalloc
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch

import imaginelens as il
from imaginelens.hooks import CheckpointError, InputError
from imaginelens.probes.capturing import Capture
from imaginelens.probes.collecting import collect
from imaginelens.probes.shards import open_states, save_states
from imaginelens.probes.states import States, load

N, BATCH, SHARD = 4, 2, 3  # shards of 3 and 1 examples; batches of 2, 1 and 1


@cache
def organism() -> Any:
    return il.load("latent-content")


def gather(out: Path | None = None, **options: Any) -> States:
    how = {"sites": ["hook_latent", "resid_post"], "labels": "shape"} | options
    lens = how.pop("lens", None) or organism()
    data = how.pop("data", None) or lens.task(N)
    return collect(lens, data, out=out, **{"batch_size": BATCH, "shard_size": SHARD, **how})


@cache
def in_memory() -> States:
    return gather()


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("states") / "content"
    gather(folder)
    return folder


@pytest.fixture
def copied(finished: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(finished, tmp_path / "copy"))


def assert_equal(one: States, other: States) -> None:
    """Equal to the last bit, in all that they hold."""
    assert one.shape == other.shape
    assert (one.mask == other.mask).all()
    for name in ("sites", "groups", "label", "at", "keys", "notes"):
        assert getattr(one, name) == getattr(other, name), name
    for states in (one, other):
        assert (states.labels is None) == (one.labels is None)
    if one.labels is not None and other.labels is not None:
        assert one.labels.tolist() == other.labels.tolist()
        kinds = [[type(v) for v in s.labels.ravel().tolist()] for s in (one, other)]  # type: ignore[union-attr]
        assert kinds[0] == kinds[1]
    everyone = np.arange(len(one))
    for step in range(one.shape[1]):
        for layer in range(one.shape[2]):
            mine, theirs = (s.cells.read(step, layer, everyone) for s in (one, other))
            assert mine.dtype == theirs.dtype
            assert (mine == theirs).all()
    assert set(one.controls) == set(other.controls)
    for name in one.controls:
        assert_equal(one.controls[name], other.controls[name])


# ---- what is written is what was there -----------------------------------------------------------


def test_on_disk_is_in_memory(finished: Path) -> None:
    found = load(finished)
    assert_equal(found, in_memory())
    assert set(found.controls) == {"dummy", "random model", "raw input"}
    assert found.cell(step=1, site="blocks.1.hook_resid_post").x.shape == (N, 64)
    some = np.array([3, 0, 2])
    both = (s.cells.read(0, 2, some) for s in (found, in_memory()))
    assert (next(both) == next(both)).all()
    assert not list(finished.rglob("*.partial"))


def test_nothing_runs_when_all_is_there(copied: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in copied.rglob("*.safetensors")}
    with mock.patch.object(Capture, "_run", side_effect=AssertionError("it ran again")):
        again = gather(copied)
    assert_equal(again, in_memory())
    assert before == {path: path.stat().st_mtime_ns for path in copied.rglob("*.safetensors")}


def test_more_controls_can_be_added(tmp_path: Path) -> None:
    assert not gather(tmp_path / "s", controls=False).controls
    with mock.patch.object(Capture, "batch", side_effect=AssertionError("it ran again")):
        assert_equal(gather(tmp_path / "s"), in_memory())


@pytest.mark.parametrize(
    "labels",
    [
        ["a", None, "c", "ü\n"],
        [1, 2, None, -(2**60)],
        [0.1, 1e-300, -2.5, 3.0],
        [True, False, True, None],
        [["a", 1, None], [2, 0.5, "b"], ["c", "c", "c"], [None, None, None]],
        None,
    ],
)
def test_any_states_with_any_labels_come_back(labels: Any, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    mask = np.array([[1, 1, 1], [1, 0, 0], [0, 0, 0], [1, 0, 1]], dtype=bool)
    states = States.of(
        rng.normal(size=(4, 3, 2, 5)), labels, mask=mask, groups=[3, "x", 3, 4], label="kind"
    )
    other = States.of(rng.normal(size=(4, 3, 2, 7)).astype(np.float32), mask=mask)
    states = replace(states, notes=("one",), at="positions([1])", keys=("a", "b", "c", "d"))
    same = {"groups": states.groups, "label": "kind", "at": states.at, "keys": states.keys}
    control = replace(other, **same)
    if labels is not None:
        control = control.relabelled(labels, label="kind")
    states = replace(states, controls={"mine": control})
    save_states(states, tmp_path / "s", shard_size=3)
    assert_equal(open_states(tmp_path / "s"), states)


def test_states_with_controls_are_saved_from_memory_and_from_disk(
    finished: Path, tmp_path: Path
) -> None:
    save_states(in_memory(), tmp_path / "a", shard_size=4)
    assert_equal(open_states(tmp_path / "a"), in_memory())
    save_states(load(finished), tmp_path / "b", shard_size=2)
    assert_equal(open_states(tmp_path / "b"), in_memory())
    with pytest.raises(InputError, match="holds states already"):
        save_states(in_memory(), tmp_path / "b")


@pytest.mark.parametrize("groups", [[(1,), 2, 3], [1.0, float("inf"), 2.0]])
def test_groups_that_json_cannot_hold_are_refused(groups: Any, tmp_path: Path) -> None:
    states = States.of(np.zeros((3, 2)), groups=groups)
    if groups[0] == (1,):
        save_states(replace(states, groups=("a", "b", "c")), tmp_path / "fine")
        states = replace(states, groups=({1}, 2, 3))
    with pytest.raises(InputError, match=r"the group \[\d\] is .* expected a text"):
        save_states(states, tmp_path / "s")
    assert not (tmp_path / "s").exists()


# ---- interrupted ---------------------------------------------------------------------------------


@pytest.mark.parametrize("after", [1, 2, 5, 8])
def test_an_interrupted_collection_goes_on_and_is_the_same(after: int, tmp_path: Path) -> None:
    """Three batches each of states, dummy and random model: raised after some of them."""
    ran = 0
    run = Capture._run

    def failing(*given: Any) -> Any:
        nonlocal ran
        if ran == after:
            raise KeyboardInterrupt
        ran += 1
        return run(*given)

    with mock.patch.object(Capture, "_run", failing), pytest.raises(KeyboardInterrupt):
        gather(tmp_path / "s")
    if (tmp_path / "s").exists():
        with pytest.raises(CheckpointError, match=r"not complete .* call collect"):
            open_states(tmp_path / "s")
    ran, after_all = 0, 0

    def counting(*given: Any) -> Any:
        nonlocal after_all
        after_all += 1
        return run(*given)

    with mock.patch.object(Capture, "_run", counting):
        found = gather(tmp_path / "s")
    assert_equal(found, in_memory())
    assert not list((tmp_path / "s").rglob("*.partial"))
    # whole shards are not run again: batches per shard are 2 and 1, three times over
    done = max(edge for edge in np.cumsum([0, *[2, 1] * 3]) if edge <= after)
    assert after_all == 9 - done


KILLED = """
import sys, time
import imaginelens as il
from imaginelens.probes.capturing import Capture
from imaginelens.probes.collecting import collect
lens = il.load("latent-content")
run = Capture._run
def slow(*given):
    time.sleep(0.3)
    return run(*given)
Capture._run = slow
collect(lens, lens.task({n}), sites=["hook_latent", "resid_post"], labels="shape",
        out=sys.argv[1], batch_size={batch}, shard_size={shard})
"""


@pytest.mark.slow
@pytest.mark.skipif(os.name != "posix", reason="SIGKILL")
def test_a_killed_collection_goes_on_and_is_the_same(tmp_path: Path) -> None:
    folder = tmp_path / "s"
    code = KILLED.format(n=N, batch=BATCH, shard=SHARD)
    child = subprocess.Popen([sys.executable, "-c", code, str(folder)])
    try:
        for _ in range(600):
            if (folder / "shard-000000.safetensors").exists():
                break
            assert child.poll() is None
            time.sleep(0.1)
        time.sleep(0.1)
    finally:
        child.send_signal(signal.SIGKILL)
        child.wait()
    done = [path.name for path in folder.glob("*.safetensors")]
    assert "shard-000000.safetensors" in done
    assert not json.loads((folder / "states.json").read_text())["finished"]
    # on another day a sum may be made in another order; the shards that were there stay
    stamps = {name: (folder / name).stat().st_mtime_ns for name in done}
    assert_equal(gather(folder), in_memory())
    assert stamps == {name: (folder / name).stat().st_mtime_ns for name in done}


# ---- other arguments -----------------------------------------------------------------------------


def shaken() -> Any:
    lens = il.load("latent-content")
    with torch.no_grad():
        next(lens.model.parameters())[0, 0] += 1e-3
    return lens


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sites": "hook_latent"}, "other 'sites': 4 of them there and 1 of them here"),
        ({"at": il.latent[0]}, r"other 'at': 'latent' there and 'latent\[0\]' here"),
        ({"batch_size": 3}, "other 'batch_size': 2 there and 3 here"),
        ({"max_new_tokens": 9}, "other 'max_new_tokens': None there and 9 here"),
        ({"latents": il.Force(2)}, r"other 'latents': None there and .*Force"),
        ({"dtype": "float64"}, "other 'dtype': 'float32' there and 'float64' here"),
        ({"side": "source"}, "other 'inputs': 4 of them there and 4 of them here, .* number 0"),
        ({"labels": "name"}, r"other 'label': 'shape' there .*relabelled"),
        ({"labels": [["a", "b"]] * N}, r"other 'label': 'shape' there"),
        ({"groups": list(range(N))}, "other .groups.: 4 of them there .* number 0"),
        ({"seed": 1}, "other 'seed': 0 there and 1 here"),
        ({"lens": "shaken"}, "other 'weights'"),
        ({"lens": "latent-pointer"}, "other 'model': .*latent-content' there and .*latent-pointer"),
    ],
)  # fmt: skip
def test_other_arguments_are_refused_by_name(
    options: dict[str, Any], message: str, finished: Path
) -> None:
    lens = options.get("lens")
    if lens is not None:
        options = {**options, "lens": shaken() if lens == "shaken" else il.load(lens)}
        options["data"] = organism().task(N)
    with pytest.raises(CheckpointError, match=message):
        gather(finished, **options)


def test_fewer_inputs_are_refused(finished: Path) -> None:
    with pytest.raises(CheckpointError, match="other 'inputs': 4 there and 3 here"):
        gather(finished, data=organism().task(N - 1))


def test_labels_can_still_be_changed_while_it_is_not_finished(tmp_path: Path) -> None:
    wrong = [["a"]] * N  # one step too few, which is known only afterwards
    with pytest.raises(InputError, match=r"labels of 1 steps came with 2 steps"):
        gather(tmp_path / "s", labels=wrong, controls=False)
    with mock.patch.object(Capture, "_run", side_effect=AssertionError("it ran again")):
        found = gather(tmp_path / "s", labels=[["a", "b"]] * N, controls=False)
    assert found.cell(step=1).y.tolist() == ["b"] * N
    with pytest.raises(CheckpointError, match="other 'label': 'label' there and 'shape' here"):
        gather(tmp_path / "s", controls=False)
    with pytest.raises(CheckpointError, match="other 'labels': 4 of them there and 4 of them"):
        gather(tmp_path / "s", labels=[["b", "b"]] * N, controls=False)


def test_labels_for_states_without_any_are_not_put_into_their_folder(tmp_path: Path) -> None:
    data = list(organism().task(2).base)
    assert gather(tmp_path / "s", data=data, labels=None, controls=False).labels is None
    with pytest.raises(CheckpointError, match=r"other 'labels': None there and 2 of them here"):
        gather(tmp_path / "s", data=data, labels=["a", "b"], controls=False)


def test_labels_of_a_callable_are_compared_as_well(copied: Path) -> None:
    def other(example: Any, step: int) -> str:
        return "same"

    with pytest.raises(CheckpointError, match="other 'label': 'shape' there and 'other' here"):
        gather(copied, labels=other)
    manifest = json.loads((copied / "states.json").read_text())
    manifest["words"]["label"] = "other"
    (copied / "states.json").write_text(json.dumps(manifest))
    with pytest.raises(CheckpointError, match="other 'labels': 4 of them there and 4 of them here"):
        gather(copied, labels=other)


# ---- what is torn --------------------------------------------------------------------------------


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def flip(path: Path, at: int) -> None:
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(bytes(content))


def link(path: Path) -> None:
    moved = path.with_name("moved")
    path.rename(moved)
    path.symlink_to(moved)


def other_version(path: Path) -> None:
    content = path.read_bytes().replace(rb"\"version\": 1", rb"\"version\": 9")
    path.write_bytes(content)


def foreign(path: Path) -> None:
    control = path.parent / "controls" / "dummy" / path.name
    shutil.copy(control, path)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (truncate, "is torn or no shard of states"),
        (Path.unlink, r"not complete \(1 of 2 shards are missing\)"),
        (lambda path: path.write_bytes(b""), "is torn or no shard"),
        (lambda path: path.write_bytes(b"\0" * 500), "is torn or no shard"),
        (link, "is a link, which is not followed"),
        (other_version, "has the version 9 of the format of states"),
        (foreign, "belongs to other states than states.json"),
    ],
)
def test_a_shard_that_is_torn_is_found_when_opened(
    spoil: Callable[[Path], Any], message: str, copied: Path
) -> None:
    spoil(copied / "shard-000001.safetensors")
    with pytest.raises(CheckpointError, match=message):
        load(copied)


def test_a_bit_that_flipped_is_found_when_its_cell_is_read(copied: Path) -> None:
    """States come first and masks last, which are read on opening."""
    path = copied / "shard-000001.safetensors"
    flip(path, -1000)
    found = load(copied)
    everyone, good = np.arange(N), 0
    for step in range(2):
        for layer in range(4):
            try:
                found.cells.read(step, layer, everyone)
                good += 1
            except CheckpointError as error:
                message = str(error)
    assert good == 7
    assert "has changed since it was written" in message
    flip(path, -1)
    with pytest.raises(CheckpointError, match="mask has changed since it was written"):
        load(copied)


def test_a_torn_shard_is_made_again(copied: Path) -> None:
    (copied / "shard-000001.safetensors").unlink()
    assert_equal(gather(copied), in_memory())


def test_a_shard_that_vanishes_is_missed_when_read(copied: Path) -> None:
    found = load(copied)
    (copied / "shard-000001.safetensors").unlink()
    assert found.cells.read(0, 0, np.array([0, 2])).shape == (2, 64)
    with pytest.raises(CheckpointError, match="is missing; call collect"):
        found.cells.read(0, 0, np.array([0, 3]))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "cannot be read"),
        (b"[]", "has the version None"),
        (b'{"version": 2}', "has the version 2 of the format of states"),
        (b'{"version": 1, "finished": true, "words": {}, "plan": {"n": 3}}', "does not say what"),
    ],
)
def test_a_folder_without_a_record_is_refused(
    content: bytes, message: str, copied: Path, tmp_path: Path
) -> None:
    (copied / "states.json").write_bytes(content)
    with pytest.raises(CheckpointError, match=message):
        load(copied)
    with pytest.raises(CheckpointError, match="there are no states in"):
        load(tmp_path / "elsewhere")


def test_a_control_that_was_not_completed_is_left_out_and_said(copied: Path) -> None:
    path = copied / "controls" / "dummy" / "states.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "finished": False}))
    found = load(copied)
    assert set(found.controls) == {"random model", "raw input"}
    assert found.notes == ("no control 'dummy': it was not completed",)
    assert_equal(gather(copied), in_memory())


def test_no_path_is_in_any_file(finished: Path) -> None:
    for path in finished.rglob("*"):
        if path.is_file():
            assert str(finished.parent).encode() not in path.read_bytes()
            assert str(Path(il.__file__).parent).encode() not in path.read_bytes()


# ---- memory --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Drawn:
    """Cells that are drawn when they are read: states that were never in memory together."""

    shape: tuple[int, int, int, int]

    def read(self, step: int, layer: int, rows: np.ndarray) -> np.ndarray:
        value = 100 * step + layer + rows[:, None] / 1024
        return np.broadcast_to(value, (len(rows), self.shape[3])).astype(np.float32)


def resident() -> int:
    """Bytes of this process in memory, mapped files included."""
    status = Path("/proc/self/statm")
    if not status.exists():
        return 0
    return int(status.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def test_memory_is_that_of_one_shard_or_one_cell(tmp_path: Path) -> None:
    """128 MB in shards of 8 MB, in cells of 4 MB."""
    cells = Drawn((1024, 4, 8, 1024))
    states = States(cells, np.ones((1024, 4), bool), tuple(f"layer {k}" for k in range(8)))
    tracemalloc.start()
    try:
        save_states(states, tmp_path / "s")
        assert sum(p.stat().st_size for p in tmp_path.rglob("*.safetensors")) > 128e6
        assert tracemalloc.get_traced_memory()[1] < 40e6
        tracemalloc.reset_peak()
        found = load(tmp_path / "s")
        before = resident()
        for step in range(4):
            for layer in range(8):
                x = found.cell(step=step, site=layer).x
                assert (x == cells.read(step, layer, np.arange(1024))).all()
                assert resident() - before < 30e6
        assert tracemalloc.get_traced_memory()[1] < 30e6
    finally:
        tracemalloc.stop()


def test_a_shard_of_ragged_steps_holds_only_what_is_there(tmp_path: Path) -> None:
    mask = np.zeros((64, 50), dtype=bool)
    mask[:, 0] = mask[0] = True
    values = np.where(mask[:, :, None, None], 1.0, 0.0) * np.ones((64, 50, 1, 100))
    path = save_states(States.of(values, mask=mask), tmp_path / "s")
    size = sum(file.stat().st_size for file in path.glob("*.safetensors"))
    assert size < 1.5 * mask.sum() * 100 * 8
    assert (load(path).cells.read(7, 0, np.arange(64))[1:] == 0).all()
