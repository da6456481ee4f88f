"""A study survives: killed, stopped, resumed or shared, it gives the same maps to the last bit."""

import gc
import io
import json
import os
import re
import signal
import subprocess
import sys
import weakref
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import imaginelens as il
from imaginelens import cli
from imaginelens.hooks.errors import CheckpointError, HookNameError, InputError
from imaginelens.mediation import run_study as running
from imaginelens.mediation.behind_prefix import Batch, Forward, Outcome, Task
from imaginelens.mediation.effect_map import EffectMap
from imaginelens.mediation.processes import Processes, launched
from imaginelens.mediation.run_study import CHUNKS, Study, run_study, stopped
from imaginelens.mediation.splits import Splits
from imaginelens.mediation.study_config import EXAMPLE, StudyConfig, parse_config, read_config
from imaginelens.mediation.study_forecast import Forecast, forecast, largest
from imaginelens.mediation.study_plan import weights_key
from imaginelens.mediation.study_progress import Progress
from imaginelens.mediation.sweep import Chunk, Sweep, sweep

SMALL = """
[model]
name = "latent-content"
[data]
task = { n = 6 }
[[map]]
name = "fixed"
sites = "resid_post"
context = "fixed"
[[map]]
name = "free"
sites = "hook_latent"
edit = "zero"
metric = "log_prob"
[run]
batch_size = 2
out = "out"
"""
N_MAPS, N_CHUNKS = 2, 3


@pytest.fixture(scope="module")
def lens() -> il.Organism:
    return il.load("latent-content")


@pytest.fixture(scope="module")
def load(lens: il.Organism) -> Callable[..., il.LatentModel]:
    return lambda *args, **options: lens


def config(folder: Path, text: str = SMALL) -> StudyConfig:
    return parse_config(text, folder=folder)


def silent(text: str) -> None:
    """What a study says, unheard."""


def bits(found: EffectMap) -> dict[str, Any]:
    """All of a map but how long it took, as it can be compared."""
    arrays = ("before", "other", "after", "flags", "change", "sham")
    words = {name: value for name, value in vars(found).items() if name not in arrays}
    held = {name: getattr(found, name) for name in arrays}
    known = {
        name: None if a is None else (a.dtype, a.shape, a.tobytes()) for name, a in held.items()
    }
    kept = {k: v for k, v in words.items() if k in found.__dataclass_fields__}
    return {**known, **kept, "provenance": {**asdict(found.provenance), "seconds": None}}


def maps(out: Path) -> dict[str, dict[str, Any]]:
    return {name: bits(EffectMap.load(out / name)) for name in ("fixed", "free")}


def shards(out: Path) -> dict[str, tuple[int, int]]:
    """Every chunk that is there, with what changes when it is written again."""
    found = sorted(out.glob(f"*/{CHUNKS}/shard-*.safetensors"))
    return {
        path.relative_to(out).as_posix(): (path.stat().st_mtime_ns, path.stat().st_ino)
        for path in found
    }


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, load: Any) -> Path:
    """The study, never interrupted."""
    folder = tmp_path_factory.mktemp("whole")
    assert run_study(config(folder), load, say=silent)
    return folder / "out"


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int]]:
    """The chunks that are measured, in order."""
    found: list[tuple[str, int]] = []
    measure = Sweep.measure

    def noted(self: Sweep, number: int, **options: Any) -> EffectMap:
        found.append((self.context, number))
        return measure(self, number, **options)

    monkeypatch.setattr(Sweep, "measure", noted)
    return found


# ---- what a study gives ------------------------------------------------------------------------


def test_a_study_gives_the_maps_of_sweep(whole: Path, lens: il.Organism) -> None:
    task = lens.task(n=6, seed=0)
    once = {
        "fixed": sweep(lens, task, sites="resid_post", context="fixed", batch_size=2),
        "free": sweep(
            lens, task, sites="hook_latent", edit=il.Zero(), metric=il.log_prob, batch_size=2
        ),
    }
    assert maps(whole) == {name: bits(found) for name, found in once.items()}


def test_tables_lie_beside_each_map(whole: Path) -> None:
    import pandas as pd

    found = EffectMap.load(whole / "fixed")
    table = pd.read_csv(whole / "fixed" / "summary.csv")
    assert len(table) == len(found)
    np.testing.assert_allclose(table["effect"], found.effect.mean(1))
    words = json.loads((whole / "fixed" / "summary.json").read_text())
    best = int(np.abs(found.effect.mean(1)).argmax())
    assert words["strongest"][0]["effect"] == pytest.approx(found.effect.mean(1)[best], rel=1e-5)
    assert words["total_effect"] == pytest.approx(found.total.mean(), rel=1e-5)
    assert words["strongest"][0]["p_adjusted"] == pytest.approx(table["p_adjusted"][best], rel=1e-5)


def test_what_is_said_holds_numbers_and_warnings(tmp_path: Path, load: Any) -> None:
    said: list[str] = []
    run_study(config(tmp_path), load, say=said.append)
    assert "adjusted p" in said[0]
    for name, text in zip(("fixed", "free"), said[:2], strict=True):
        found = EffectMap.load(tmp_path / "out" / name)
        assert all(note in text for note in found.notes)
        sham = "no sham was run" if found.sham is None else "the sham changed the metric by"
        assert sham in text
    assert str(tmp_path / "out") in said[-1]


def test_keys_tell_equal_pairs_apart(whole: Path) -> None:
    keys = EffectMap.load(whole / "fixed").keys
    assert [key.split(":")[0] for key in keys] == list("012345")
    assert keys == EffectMap.load(whole / "free").keys


def test_a_map_of_one_example_is_not_tested(tmp_path: Path, load: Any) -> None:
    said: list[str] = []
    assert run_study(config(tmp_path).with_options(limit=1), load, say=said.append)
    assert "not tested: " in said[0]
    assert EffectMap.load(tmp_path / "out" / "fixed").n == 1


def test_an_edit_that_changes_nothing_is_told_and_others_go_on(tmp_path: Path, load: Any) -> None:
    """The last token of every prompt is the same one."""
    text = SMALL.replace('"resid_post"', '"hook_embed"\npositions = "last_prompt"')
    said: list[str] = []
    assert not run_study(config(tmp_path, text), load, say=said.append)
    assert "fixed: Swap changed nothing in 1 cells and 6 examples: " in said[0]
    assert EffectMap.load(tmp_path / "out" / "free").n == 6


# ---- resuming ----------------------------------------------------------------------------------


def test_a_finished_study_is_not_measured_again(
    tmp_path: Path, load: Any, whole: Path, counted: list[Any]
) -> None:
    run_study(config(tmp_path), load, say=silent)
    assert len(counted) == N_MAPS * N_CHUNKS
    before = shards(tmp_path / "out")
    run_study(config(tmp_path), load, resume=True, say=silent)
    assert len(counted) == N_MAPS * N_CHUNKS
    assert shards(tmp_path / "out") == before
    assert maps(tmp_path / "out") == maps(whole)


def test_only_missing_chunks_are_measured(
    tmp_path: Path, load: Any, whole: Path, counted: list[Any]
) -> None:
    run_study(config(tmp_path), load, say=silent)
    counted.clear()
    (tmp_path / "out" / "fixed" / CHUNKS / "shard-000001.safetensors").unlink()
    run_study(config(tmp_path), load, resume=True, say=silent)
    assert counted == [("fixed", 1)]
    assert maps(tmp_path / "out") == maps(whole)


def test_a_folder_that_is_not_empty_is_refused(tmp_path: Path, load: Any) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").touch()
    with pytest.raises(InputError, match=r"out' is not empty; .*--resume"):
        run_study(config(tmp_path), load, say=silent)
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match=r"file' is a file"):
        run_study(config(tmp_path).with_options(out=tmp_path / "file"), load, say=silent)


@pytest.mark.parametrize(
    ("old", "new", "key"),
    [
        ("batch_size = 2", "batch_size = 3", "'run.batch_size' is 2 there and 3 here"),
        ("n = 6", "n = 5", "'data.pairs' is 6 there and 5 here"),
        ("n = 6", "n = 6, seed = 1", "'data.content' is"),
        ('"resid_post"', '"attn_out"', "'map.sites' is 'resid_post' there and 'attn_out' here"),
        ('"resid_post"', '"resid_post"\nverify = 1', "'map.verify' is 0 there and 1 here"),
        ('edit = "zero"', 'edit = "sham"', "'map.edit.name' is 'zero' there and 'sham' here"),
        ("[data]", 'attn_implementation = "eager"\n[data]', "'model.attn_implementation' is None"),
    ],
)
def test_a_changed_config_is_refused(
    old: str, new: str, key: str, tmp_path: Path, load: Any, whole: Path, counted: list[Any]
) -> None:
    here = config(tmp_path, SMALL.replace(old, new)).with_options(out=whole)
    before = shards(whole)
    with pytest.raises(CheckpointError) as caught:
        run_study(here, load, resume=True, say=silent)
    assert key in str(caught.value)
    assert shards(whole) == before
    assert not counted


def test_another_model_of_the_same_name_is_refused(
    tmp_path: Path, load: Any, lens: il.Organism
) -> None:
    here = config(tmp_path).with_options(limit=2)
    run_study(here, load, say=silent)
    weight = next(lens.model.parameters())
    kept = weight.detach().clone()
    try:
        with torch.no_grad():
            weight[0, 0] += 1
        with pytest.raises(CheckpointError, match=r"'model.weights' is"):
            run_study(here, load, resume=True, say=silent)
    finally:
        with torch.no_grad():
            weight.copy_(kept)
    assert run_study(here, load, resume=True, say=silent)


def test_a_map_may_be_added(tmp_path: Path, load: Any, counted: list[Any]) -> None:
    one, other = SMALL.split('[[map]]\nname = "free"')
    run = other[other.index("[run]") :]
    run_study(config(tmp_path, one + run), load, say=silent)
    counted.clear()
    run_study(config(tmp_path), load, resume=True, say=silent)
    assert counted == [("free", number) for number in range(N_CHUNKS)]


def test_rows_and_threads_are_those_of_the_beginning(
    tmp_path: Path, load: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A machine with less memory, or another number of threads, goes on as it was begun."""
    run_study(config(tmp_path), load, say=silent)
    store = tmp_path / "out" / "fixed" / CHUNKS
    plan = json.loads((store / "map.json").read_text())["plan"]
    assert plan["measured"] == {"rows": 256, "threads": torch.get_num_threads()}
    monkeypatch.setattr(running, "rows_that_fit", lambda *args, **options: 1)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 99)
    limits: list[int | None] = []
    measure = Sweep.measure
    monkeypatch.setattr(
        Sweep, "measure", lambda self, n, **o: limits.append(self.limit) or measure(self, n, **o)
    )
    (store / "shard-000002.safetensors").unlink()
    run_study(config(tmp_path), load, resume=True, say=silent)
    assert limits == [256]


def test_rows_are_a_power_of_two(
    tmp_path: Path, load: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    study = Study.of(config(tmp_path), load)
    for found, kept in ((1, 1), (63, 32), (64, 64), (200, 128)):
        monkeypatch.setattr(running, "rows_that_fit", lambda *args, found=found, **options: found)
        assert running.fitting_rows(study) == kept


# ---- forwards that do not fit ------------------------------------------------------------------


def too_small(most: int, ran: list[int]) -> Callable[..., Outcome]:
    """A `Batch.run` of a machine that holds so many rows."""
    run = Batch.run

    def runs(self: Batch, forward: Forward, edit: il.Edit | None = None) -> Outcome:
        ran.append(len(forward.tasks))
        if len(forward.tasks) > most:
            raise torch.OutOfMemoryError("so many rows do not fit")
        return run(self, forward, edit)

    return runs


def test_splits_are_kept_and_run_again(
    tmp_path: Path, load: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    ran: list[int] = []
    with monkeypatch.context() as patched:
        patched.setattr(Batch, "run", too_small(2, ran))
        run_study(config(tmp_path), load, say=silent)
    assert max(ran) > 2
    split = maps(tmp_path / "out")
    store = tmp_path / "out" / "fixed" / CHUNKS
    assert len(list(store.glob("splits-*.json"))) == N_CHUNKS
    for number in range(N_CHUNKS):
        (store / f"shard-{number:06d}.safetensors").unlink()
    again: list[int] = []
    with monkeypatch.context() as patched:
        patched.setattr(Batch, "run", too_small(99, again))
        run_study(config(tmp_path), load, resume=True, say=silent)
    assert max(again) == 2  # as if they still did not fit
    assert maps(tmp_path / "out") == split


def test_a_chunk_that_never_fits_is_named(
    tmp_path: Path, load: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Batch, "run", too_small(0, []))
    with pytest.raises(InputError, match=r"chunk 0 of map 'fixed'.*batch_size below 2"):
        run_study(config(tmp_path), load, say=silent)


def test_torn_splits_are_refused(tmp_path: Path) -> None:
    forward = Forward(0, 3, (Task(0, 0, 3), Task(0, 1, 3)))
    Splits(tmp_path).add(4, forward)
    assert Splits(tmp_path).holds(4, forward)
    assert not Splits(tmp_path).holds(5, forward)
    assert not Splits(tmp_path).holds(4, replace(forward, start=1))
    for content in ("[", "3", "[3]"):
        (tmp_path / "splits-000004.json").write_text(content)
        with pytest.raises(CheckpointError, match=r"splits-000004.json.*remove it"):
            Splits(tmp_path).of(4)


# ---- how far it is -----------------------------------------------------------------------------


class Terminal(io.StringIO):
    """Something that looks like one."""

    def isatty(self) -> bool:
        return True


def test_a_line_for_each_tenth_where_there_is_no_terminal() -> None:
    lines = io.StringIO()
    progress = Progress(20, done=5, to=lines)
    progress.now("layers, chunk 2 of 4")
    for _ in range(30):
        progress.tick(0.5)
    progress.close()
    told = lines.getvalue().splitlines()
    assert [line.split("%")[0] for line in told] == [str(10 * k) for k in range(3, 11)]
    assert all("layers, chunk 2 of 4" in line for line in told)
    assert "left" in told[0]
    assert "left" not in told[-1]


def test_one_bar_in_a_terminal() -> None:
    screen = Terminal()
    progress = Progress(20, to=screen)
    progress.now("layers")
    progress.tick(20.5)
    progress.close()
    assert "layers" in screen.getvalue()
    assert "\n" not in screen.getvalue()


def test_other_processes_are_silent() -> None:
    for screen in (Terminal(), io.StringIO()):
        progress = Progress(2, shown=False, to=screen)
        progress.tick(2)
        progress.close()
        assert not screen.getvalue()


def test_more_processes_than_chunks(tmp_path: Path, load: Any, counted: list[Any]) -> None:
    here = config(tmp_path).with_options(limit=2)
    turn = iter(range(99))

    def other() -> None:
        if next(turn) == 0:
            run_study(here, load, processes=Processes(1, 2), say=silent)

    assert run_study(here, load, processes=Processes(0, 2, wait=other), say=silent)
    assert counted == [("fixed", 0), ("free", 0)]


# ---- stopping ----------------------------------------------------------------------------------


@pytest.fixture
def as_user(tmp_path: Path, load: Any, monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    """Runs `imaginelens study` on the small study, in a folder of its own."""
    import imaginelens.organisms

    (tmp_path / "study.toml").write_text(SMALL)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(imaginelens.organisms, "load", load)
    return lambda *arguments: cli.main(["study", "study.toml", *arguments])


def test_ctrl_c_keeps_what_is_done(
    as_user: Callable[..., int], monkeypatch: pytest.MonkeyPatch, capsys: Any, whole: Path
) -> None:
    measure, n = Sweep.measure, iter(range(99))

    def stop(self: Sweep, number: int, **options: Any) -> EffectMap:
        if next(n) == 2:
            os.kill(os.getpid(), signal.SIGINT)
        return measure(self, number, **options)

    inherited = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's & ignores it
    try:
        with monkeypatch.context() as patched:
            patched.setattr(Sweep, "measure", stop)
            assert as_user("--device", "cpu") == 130
    finally:
        signal.signal(signal.SIGINT, inherited)
    told = capsys.readouterr().err.splitlines()[-1]
    assert "2 of 6 chunks are kept, go on with: imaginelens study study.toml" in told
    assert told.endswith("--device cpu --resume")
    before = shards(Path("out"))
    assert len(before) == 2
    assert as_user("--resume") == 0
    assert before.items() <= shards(Path("out")).items()
    assert maps(Path("out")) == maps(whole)


def test_stopped_before_anything(tmp_path: Path) -> None:
    assert "no chunk was measured yet, go on with: again --resume" in stopped(
        config(tmp_path), "again"
    )


KILLS = '''
"""Kill a study at random instants, and resume it; each in a process of its own, forked from one
that has opened the model. Writes down what was measured when."""
import json, os, random, signal, sys, time
from pathlib import Path
import torch
torch.set_num_threads(1)
from imaginelens.mediation.run_study import run_study
from imaginelens.mediation.study_config import read_config
from imaginelens.mediation.sweep import Sweep
from imaginelens.organisms import load

folder, kills = Path(sys.argv[1]), int(sys.argv[2])
config, lens, measure = read_config(folder / "study.toml"), load("latent-content"), Sweep.measure

def study(name, log, resume=False):
    def noted(self, number, **options):
        with open(folder / log, "a") as file:
            file.write(f"{self.context} {number}\\n")
        return measure(self, number, **options)
    Sweep.measure = noted
    run_study(config.with_options(out=folder / name), lambda *a, **k: lens, resume=resume,
              say=lambda text: None)

def forked(*arguments, after=None, **options):
    child = os.fork()
    if child == 0:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
        study(*arguments, **options)
        os._exit(0)
    if after is not None:
        time.sleep(after)
        os.kill(child, signal.SIGKILL)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])

def shards(name):
    found = sorted((folder / name).glob("*/chunks/shard-*.safetensors"))
    return [[str(p), p.stat().st_mtime_ns, p.stat().st_ino] for p in found]

study("whole", "whole.log")
began = time.monotonic()
assert forked("again", "again.log") == 0
lasted, draw, told = time.monotonic() - began, random.Random(0), []
for k in range(kills):
    first, tries = 0, 0
    while first == 0:  # it was done before: the machine has more time for us than it had
        name, tries = f"killed-{k}-{tries}", tries + 1
        first = forked(name, f"{name}.1", after=lasted * (k + draw.random()) / kills)
        lasted *= 0.9 if first == 0 else 1
    there = shards(name)
    second = forked(name, f"{name}.2", resume=True)
    told.append([name, first, second, there, shards(name)])
(folder / "told.json").write_text(json.dumps(told))
'''


@pytest.mark.parametrize("kills", [3, pytest.param(20, marks=pytest.mark.slow)])
def test_a_killed_study_resumes_to_the_same_bits(kills: int, tmp_path: Path) -> None:
    (tmp_path / "study.toml").write_text(SMALL)
    (tmp_path / "kills.py").write_text(KILLS)
    command = [sys.executable, "kills.py", str(tmp_path), str(kills)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TQDM_DISABLE": "1"}
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    wanted = maps(tmp_path / "whole")
    assert maps(tmp_path / "again") == wanted
    for name, first, second, before, after in json.loads((tmp_path / "told.json").read_text()):
        assert (first, second) == (-signal.SIGKILL, 0)
        assert all(shard in after for shard in before)  # none was written again
        logs = [tmp_path / f"{name}.{part}" for part in (1, 2)]
        once, again = ([] if not p.exists() else p.read_text().splitlines() for p in logs)
        assert len(again) == N_MAPS * N_CHUNKS - len(before)
        assert len(set(once) & set(again)) <= 1  # the chunk in flight
        assert maps(tmp_path / name) == wanted


# ---- several processes -------------------------------------------------------------------------


def test_two_processes_give_what_one_gives(
    tmp_path: Path, load: Any, whole: Path, counted: list[Any]
) -> None:
    """The second does all of its work while the first waits for it to have read the plan."""
    here, turn = config(tmp_path), iter(range(99))

    def other() -> None:
        if next(turn) == 0:
            run_study(here, load, processes=Processes(1, 2), say=silent)

    assert run_study(here, load, processes=Processes(0, 2, wait=other), say=silent)
    assert counted == [("fixed", 1), ("free", 1)] + [
        (context, number) for context in ("fixed", "free") for number in (0, 2)
    ]
    assert maps(tmp_path / "out") == maps(whole)


@pytest.mark.slow
def test_two_launched_processes_give_what_one_gives(tmp_path: Path, whole: Path) -> None:
    (tmp_path / "study.toml").write_text(SMALL)
    launch = [
        *("-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"),
        *("--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"),
        *("--main_process_port", "0", "--module", "imaginelens", "study", "study.toml"),
        *("--device", "cpu"),
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, *launch], cwd=tmp_path, capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("adjusted p") == N_MAPS  # only the first process tells
    assert maps(tmp_path / "out") == maps(whole)


def test_alone_without_a_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    assert (launched().index, launched().count) == (0, 1)
    monkeypatch.setenv("WORLD_SIZE", "2")  # left by something else
    assert launched().count == 1
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert launched().count == 1


def test_processes_that_do_not_find_each_other_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each would measure everything."""
    import accelerate

    alone = type("Alone", (), {"num_processes": 1})
    monkeypatch.setattr(accelerate, "PartialState", lambda **options: alone)
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(InputError, match="one of 2 processes, and accelerate joins 1"):
        launched()


def test_accelerate_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setitem(sys.modules, "accelerate", None)
    with pytest.raises(InputError, match="one of 2 processes, which need accelerate"):
        launched()


# ---- what it would cost ------------------------------------------------------------------------


def everything(folder: Path) -> dict[str, int]:
    return {str(path): path.stat().st_mtime_ns for path in sorted(folder.rglob("*"))}


def test_a_dry_run_writes_nothing(as_user: Callable[..., int], tmp_path: Path, capsys: Any) -> None:
    before = everything(tmp_path)
    assert as_user("--dry-run") == 0
    assert everything(tmp_path) == before
    said = capsys.readouterr().out
    assert "6 cells x 6 pairs in 3 chunks; 12 unedited runs" in said
    assert "nothing was written" in said


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory, load: Any) -> Forecast:
    return forecast(config(tmp_path_factory.mktemp("told")), load)


def test_forwards_and_bytes_are_those_of_the_study(told: Forecast, whole: Path) -> None:
    for each in told.maps:
        assert each.forwards == EffectMap.load(whole / each.name).provenance.forwards
        written = sum(p.stat().st_size for p in (whole / each.name).rglob("*") if p.is_file())
        assert each.bytes == pytest.approx(written, rel=0.2)
    assert told.rows == 256
    assert told.seconds > sum(each.seconds for each in told.maps) > 0


def test_a_long_pilot_is_stopped(
    tmp_path: Path, load: Any, monkeypatch: pytest.MonkeyPatch, told: Forecast
) -> None:
    from imaginelens.mediation import study_forecast

    monkeypatch.setattr(study_forecast, "_PATIENCE", 0.0)
    short = forecast(config(tmp_path), load)
    assert short.reckoned == ("fixed", "free")
    assert "the pilot of free was stopped" in str(short)
    assert short.maps[1].forwards == pytest.approx(told.maps[1].forwards, rel=0.3)


def test_the_largest_inputs_are_the_pilot(lens: il.Organism, tmp_path: Path, load: Any) -> None:
    study = Study.of(config(tmp_path), load)
    each = study.sweep(study.config.maps[0])
    assert largest(each) == 0  # all are alike
    texts = ["a", "b", "long " * 20, "c"]
    pairs = il.Pairs([{"text": t} for t in texts], [{"text": "d"}] * 4, "1234", "5678")
    assert largest(replace(each, pairs=pairs)) == 1


PEAK = """
import resource, sys
from imaginelens.cli import main
main(sys.argv[1:])
from imaginelens.mediation.study_forecast import peak_memory
print("PEAK", peak_memory())
"""


@pytest.mark.slow
def test_the_peak_is_within_a_fifth(tmp_path: Path) -> None:
    big = SMALL.replace("n = 6", "n = 96").replace("batch_size = 2", "batch_size = 32")
    (tmp_path / "study.toml").write_text(big)

    def said(*arguments: str) -> str:
        command = [sys.executable, "-c", PEAK, "study", "study.toml", *arguments]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
        return done.stdout

    number, unit = re.findall(r"peak memory: ([\d.]+) (\w+)", said("--dry-run"))[0]
    stated = float(number) * {"MiB": 2**20, "GiB": 2**30}[unit]
    measured = int(said().rsplit("PEAK", 1)[1])
    assert stated == pytest.approx(measured, rel=0.2)


# ---- one chunk in memory -----------------------------------------------------------------------


def test_one_chunk_is_held_at_a_time(
    tmp_path: Path, load: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    alive: list[weakref.ref[Chunk]] = []
    left: list[int] = []
    of = Chunk.of

    def watched(study: Sweep, number: int) -> Chunk:
        left.append(sum(ref() is not None for ref in alive))
        chunk = of(study, number)
        alive.append(weakref.ref(chunk))
        return chunk

    monkeypatch.setattr(Chunk, "of", watched)
    gc.collect()
    run_study(config(tmp_path), load, say=silent)
    assert left == [0] * (N_MAPS * N_CHUNKS)


def test_chunks_that_are_held_are_found(load: Any, tmp_path: Path) -> None:
    """What the test above would see if one were kept."""
    study = Study.of(config(tmp_path), load)
    kept = [Chunk.of(study.sweep(study.config.maps[0]), number) for number in (0, 1)]
    alive = [weakref.ref(chunk) for chunk in kept]
    assert sum(ref() is not None for ref in alive) == 2
    kept.clear()
    assert sum(ref() is not None for ref in alive) == 0


GROWTH = """
import sys
from imaginelens.mediation.run_study import run_study
from imaginelens.mediation.study_config import read_config
from imaginelens.mediation.study_forecast import peak_memory
from imaginelens.organisms import load
lens = load("latent-content")
config = read_config("study.toml")
run_study(config.with_options(limit=20, out="few"), lambda *a, **k: lens, say=lambda t: None)
few = peak_memory()
run_study(config.with_options(out="many"), lambda *a, **k: lens, say=lambda t: None)
print(few, peak_memory())
"""


@pytest.mark.parametrize("n", [pytest.param(n, marks=pytest.mark.slow) for n in (200, 1000)])
def test_memory_does_not_grow_with_examples(n: int, tmp_path: Path) -> None:
    """The pictures of 1,000 pairs are 50 MB, which the pairs themselves hold; one chunk of states,
    logits and caches is as large whatever the number of pairs."""
    (tmp_path / "study.toml").write_text(SMALL.replace("n = 6", f"n = {n}"))
    done = subprocess.run(
        [sys.executable, "-c", GROWTH], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    few, many = map(int, done.stdout.split())
    assert many - few < 60 * 2**20


# ---- the rest of the contract ------------------------------------------------------------------


def test_statistics_come_from_pairs_kept_aside(
    tmp_path: Path, load: Any, lens: il.Organism
) -> None:
    text = SMALL.replace("task = { n = 6 }", "task = { n = 12 }\nreference = 6")
    text = text.replace('"zero"', '"mean"')
    run_study(config(tmp_path, text), load, say=silent)
    found = EffectMap.load(tmp_path / "out" / "free")
    task = lens.task(n=12, seed=0)
    reference = lens.run(list(task.base[6:]))
    wanted = sweep(
        lens, task[:6], sites="hook_latent", edit=il.Mean(reference), metric=il.log_prob,
        batch_size=2,
    )  # fmt: skip
    assert found.n == 6
    np.testing.assert_allclose(found.effect, wanted.effect, atol=1e-5)


def test_a_wrong_site_is_refused_before_anything_is_measured(
    tmp_path: Path, load: Any, counted: list[Any]
) -> None:
    with pytest.raises(HookNameError, match="resid_pst"):
        run_study(config(tmp_path, SMALL.replace("resid_post", "resid_pst")), load, say=silent)
    assert not counted
    assert not (tmp_path / "out").exists()


def test_an_example_is_printed_and_reads_as_a_config(capsys: Any) -> None:
    assert cli.main(["study", "--example"]) == 0
    assert capsys.readouterr().out == EXAMPLE


def test_exit_status(as_user: Callable[..., int], tmp_path: Path, capsys: Any) -> None:
    assert cli.main(["study"]) == 2
    assert "imaginelens study --example" in capsys.readouterr().err
    assert cli.main(["study", str(tmp_path / "none.toml")]) == 1
    assert as_user("--limit", "0") == 1
    assert "--limit is '0'" in capsys.readouterr().err
    assert as_user("--limit", "2") == 0
    assert as_user("--limit", "2") == 1
    assert "is not empty" in capsys.readouterr().err


@pytest.mark.slow
def test_the_example_runs_as_it_is(tmp_path: Path) -> None:
    (tmp_path / "study.toml").write_text(EXAMPLE)
    command = [sys.executable, "-m", "imaginelens", "study", "study.toml"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for each in read_config(tmp_path / "study.toml").maps:
        assert EffectMap.load(tmp_path / "study" / each.name).n == 32
    told = [int(line.split("%")[0]) for line in done.stderr.splitlines()]
    assert told == sorted(set(told))  # as work is done: a line for each tenth that is reached
    assert set(told) <= set(range(10, 101, 10))
    assert told[-1] == 100
    assert len(told) >= 6


def test_weights_are_told_apart() -> None:
    one = torch.nn.Linear(3, 3).to(torch.bfloat16)
    key = weights_key(one)
    with torch.no_grad():
        one.bias[0] += 1
    assert weights_key(one) != key
