"""States that several processes collect together are those that one collects."""

import json
import os
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import imaginelens as il
from imaginelens.hooks.errors import InputError
from imaginelens.probes import collecting
from imaginelens.probes.collecting import collect
from imaginelens.probes.shards import Folder
from imaginelens.probes.states import States, load

N = 5


@cache
def organism() -> Any:
    return il.load("latent-content")


def gather(out: Path | None = None, **options: Any) -> States:
    how: dict[str, Any] = {"labels": "shape", "batch_size": 2, "shard_size": 2} | options
    return collect(organism(), organism().task(N), out=out, **how)


def bits(states: States) -> list[Any]:
    """All that is held, controls included."""
    everyone, (_, steps, layers, _) = np.arange(len(states)), states.shape
    cells = [
        states.cells.read(step, layer, everyone).tobytes()
        for step in range(steps)
        for layer in range(layers)
    ]
    labels = None if states.labels is None else states.labels.tolist()
    held = [states.shape, states.mask.tolist(), labels, states.groups, states.keys, states.notes]
    return [*held, *cells, {name: bits(each) for name, each in states.controls.items()}]


def test_two_processes_collect_what_one_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second does all of its work while the first waits for it."""
    made: list[int] = []
    found: list[States] = []
    write = Folder.write

    def noted(self: Folder, number: int, part: Any) -> None:
        made.append(number)
        write(self, number, part)

    def other(seconds: float) -> None:
        assert not found, "the second has made its part, and the first still waits"
        assert made == [0, 2]
        found.append(gather(tmp_path / "out", share=(1, 2), controls=False))

    monkeypatch.setattr(Folder, "write", noted)
    monkeypatch.setattr(collecting.time, "sleep", other)
    first = gather(tmp_path / "out", share=(0, 2), controls=False)
    assert made == [0, 2, 1]
    one = gather(controls=False)
    assert bits(first) == bits(found[0]) == bits(one)
    gather(tmp_path / "out", controls=False)  # by one process, which finds all there
    assert made == [0, 2, 1]


def test_shares_that_are_none_are_refused(tmp_path: Path) -> None:
    for share in ((2, 2), (-1, 2), (0, 0)):
        with pytest.raises(InputError, match="counted from 0"):
            gather(tmp_path / "out", share=share)
    with pytest.raises(InputError, match=r"name it by out="):
        gather(share=(0, 2))
    assert not (tmp_path / "out").exists()


SHARE = """
import json, sys
from pathlib import Path
import imaginelens as il
from imaginelens.probes.collecting import collect
lens = il.load("latent-content")
found = collect(lens, lens.task(5), labels="shape", batch_size=2, shard_size=2,
                out=Path("out"), share=(int(sys.argv[1]), 2))
print(json.dumps([len(found), sorted(found.controls)]))
"""


@pytest.mark.slow
def test_two_processes_at_once(tmp_path: Path) -> None:
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", SHARE, str(index)],
            cwd=tmp_path, stdout=subprocess.PIPE, text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1", "TQDM_DISABLE": "1"},
        )
        for index in range(2)
    ]  # fmt: skip
    told = [each.communicate()[0] for each in processes]
    assert [each.returncode for each in processes] == [0, 0]
    assert [json.loads(text)[0] for text in told] == [N, N]
    assert json.loads(told[0]) == json.loads(told[1])
    assert bits(load(tmp_path / "out")) == bits(gather())
