"""A study of 2,000 pairs that two processes share, one of which is killed; and two that meet."""

import os
import signal
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest

import imaginelens as il
from imaginelens.hooks.appearing import alone
from imaginelens.hooks.errors import InputError
from imaginelens.mediation.effect_map import EffectMap
from imaginelens.mediation.processes import Processes
from imaginelens.mediation.run_study import CHUNKS, run_study
from imaginelens.mediation.study_config import parse_config

LARGE = """
[model]
name = "latent-content"
[data]
task = { n = 2000 }
[[map]]
name = "first"
sites = "hook_latent"
positions = ["latent[0]"]
context = "fixed"
verify = 0
[run]
batch_size = 50
out = "out"
"""
N_CHUNKS = 40
LAUNCH = [
    *("-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"),
    *("--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"),
    *("--main_process_port", "0", "--module", "imaginelens"),
]


def begun(folder: Path, *arguments: str, launch: bool = True) -> subprocess.Popen[str]:
    """`imaginelens study` in a folder, by two processes or by one."""
    command = [*(LAUNCH if launch else ("-m", "imaginelens")), "study", "study.toml"]
    return subprocess.Popen(
        [sys.executable, *command, "--device", "cpu", *arguments],
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "TQDM_DISABLE": "1"},
    )


def second_of(launcher: int) -> psutil.Process:
    """The process that a launcher gave the rank 1."""
    for child in psutil.Process(launcher).children(recursive=True):
        if child.environ().get("RANK") == "1":
            return child
    raise AssertionError("the launcher has started no second process")


def shards(folder: Path) -> dict[str, tuple[int, int]]:
    """Every chunk that is there, with what changes when it is written again."""
    found = (folder / "out" / "first" / CHUNKS).glob("shard-*.safetensors")
    return {path.name: (path.stat().st_mtime_ns, path.stat().st_ino) for path in found}


def bits(folder: Path) -> dict[str, Any]:
    """All of a study's map but how long it took."""
    found = EffectMap.load(folder / "out" / "first")
    fields = {name: getattr(found, name) for name in found.__dataclass_fields__}
    plain = {
        name: (each.dtype, each.shape, each.tobytes()) if isinstance(each, np.ndarray) else each
        for name, each in fields.items()
    }
    return {**plain, "provenance": {**asdict(found.provenance), "seconds": None}}


@pytest.mark.slow
def test_2000_pairs_by_two_processes_of_which_one_is_killed(tmp_path: Path) -> None:
    whole, shared = tmp_path / "whole", tmp_path / "shared"
    for folder in (whole, shared):
        folder.mkdir()
        (folder / "study.toml").write_text(LARGE)
    killed = begun(shared)
    while len(shards(shared)) < N_CHUNKS // 4:
        assert killed.poll() is None, killed.communicate()[0]
        time.sleep(0.1)
    second_of(killed.pid).send_signal(signal.SIGKILL)
    assert "SIGKILL" in killed.communicate()[0]
    assert killed.returncode != 0
    kept = shards(shared)
    assert N_CHUNKS // 4 <= len(kept) < N_CHUNKS  # midway
    resumed = begun(shared, "--resume")
    told = resumed.communicate()[0]
    assert resumed.returncode == 0, told
    assert len(shards(shared)) == N_CHUNKS
    assert kept.items() <= shards(shared).items()  # none was measured again
    one = begun(whole, launch=False)
    told = one.communicate()[0]
    assert one.returncode == 0, told
    found = bits(shared)
    assert found["after"][1] == (1, 2000)
    assert found == bits(whole)


# ---- two that meet -------------------------------------------------------------------------------

SMALL = LARGE.replace("2000", "4").replace("50", "2")


def test_a_study_that_is_being_measured_is_refused(tmp_path: Path) -> None:
    config, lens = parse_config(SMALL, folder=tmp_path), il.load("latent-content")
    refused: list[str] = []

    def meanwhile() -> None:
        with pytest.raises(InputError) as caught:
            run_study(config, lambda *a, **k: lens, resume=True, say=print)
        refused.append(str(caught.value))

    turns = iter([meanwhile])
    here = Processes(wait=lambda: next(turns, lambda: None)())
    assert run_study(config, lambda *a, **k: lens, processes=here, say=lambda text: None)
    assert len(refused) == 1
    assert "another process is measuring the study in" in refused[0]
    assert "wait for it, or start all processes together" in refused[0]
    done = shards(tmp_path)
    assert run_study(config, lambda *a, **k: lens, resume=True, say=lambda text: None)
    assert shards(tmp_path) == done  # let go of, and finished


HOLDS = """
import sys, time
from pathlib import Path
from imaginelens.hooks.appearing import alone
with alone(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(600)
"""


@pytest.mark.skipif(os.name != "posix", reason="there are no such locks")
def test_a_killed_process_leaves_no_lock(tmp_path: Path) -> None:
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLDS, str(tmp_path)], stdout=subprocess.PIPE, text=True
    )
    assert holder.stdout is not None
    assert holder.stdout.readline() == "held\n"
    with pytest.raises(InputError, match="another process is saving into"), alone(tmp_path):
        pass
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    holder.stdout.close()
    with alone(tmp_path):
        assert not list(tmp_path.iterdir())
