"""One peer, in its own environment: what it finds, how long that takes and how much it holds.

    python -m benchmarks.peers.worker MODULE CASE OUT [--tasks T1 T2] [--rounds 1.0]

The reference, hooks of torch alone, runs in the same process on a copy of the model; the two take
turns. Memory is what a forked process takes beyond the reference's peak.
"""

import argparse
import importlib
import json
import os
import resource
import sys
import time
import warnings
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from types import ModuleType
from typing import Any

os.environ["TQDM_DISABLE"] = "1"

import torch

from benchmarks.peers import plain_torch, problem
from benchmarks.peers.tasks import TASKS, Task, difference, told

PACKAGES = ("torch", "transformers", "numpy")


def measured(
    module: ModuleType, task: Task, own: problem.Given, other: problem.Given, rounds: int
) -> dict[str, Any]:
    """Do one task by a peer and by plain torch, compare the two, and time them in turns.

    Args:
        own, other: the problem for the peer and for plain torch, each with a model of its own.
        rounds: how often both are timed; 0 times nothing.
    """
    plain = plain_torch.setup(other)
    by_hand = getattr(plain_torch, task.does)
    try:
        reference = by_hand(plain, other)
    except Exception as error:  # as stock transformers may, in a version that a peer asks for
        return {"state": "cannot", "why": f"plain torch fails there, too: {told(error)}"}
    row: dict[str, Any] = {"allowed": task.allowed(reference)}
    do = getattr(module, task.does, None)
    if do is None:
        return row | {"state": "not asked"}
    try:
        tool = module.setup(own)
        memory = risen(lambda: by_hand(plain, other), lambda: do(tool, own)) if rounds else None
        off = difference(do(tool, own), reference)
    except Exception as error:  # a peer may fail in any way, and how is the result
        return row | {"state": "cannot", "why": told(error)}
    if not off <= row["allowed"]:
        why = getattr(module, "WHY", {}).get(task.name, "")
        return row | {"state": "wrong", "off": off, "why": why}
    row |= {"state": "right", "off": off, "memory": memory}
    turns = {"plain": lambda: by_hand(plain, other), "peer": lambda: do(tool, own)}
    return row | {"seconds": timed(turns, rounds)}


def timed(turns: dict[str, Callable[[], Any]], rounds: int) -> dict[str, list[float]]:
    """CPU seconds of each in every round; who begins changes from round to round."""
    seconds: dict[str, list[float]] = {name: [] for name in turns}
    names = list(turns)
    for i in range(rounds):
        for name in names[i % len(names) :] + names[: i % len(names)]:
            start = time.process_time()
            turns[name]()
            seconds[name].append(time.process_time() - start)
    return seconds


def risen(first: Callable[[], Any], then: Callable[[], Any]) -> int | None:
    """By how many bytes the second raises the peak of a forked process that did the first.

    The first also brings in the code of libraries, which a fork maps only when it is used. None
    where the system has no fork, or the process ended without telling.
    """
    if not sys.platform.startswith("linux"):
        return None
    read, write = os.pipe()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # there are threads, and they are idle
        child = os.fork()
    if child == 0:
        try:
            first()
            before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
            then()
            after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
            os.write(write, str(1024 * (after - before)).encode())
        finally:
            os._exit(0)
    os.close(write)
    with os.fdopen(read) as pipe:
        answer = pipe.read()
    os.waitpid(child, 0)
    return int(answer) if answer else None


def versions(module: ModuleType) -> dict[str, str]:
    """Of what the peer ran with."""
    return {name: version(name) for name in dict.fromkeys((*PACKAGES, module.PACKAGE))}


def main() -> None:
    """Measure and write one JSON file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("module")
    parser.add_argument("case", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--tasks", nargs="*", default=[task.name for task in TASKS])
    parser.add_argument("--rounds", type=float, default=1.0, help="times each task's own number")
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    found: dict[str, Any] = {"versions": {}, "tasks": {}}
    tasks = [task for task in TASKS if task.name in args.tasks]
    try:
        module = importlib.import_module(f"benchmarks.peers.{args.module}")
        found["versions"] = versions(module)
    except Exception as error:  # a peer that cannot be imported can do none of the tasks
        found["tasks"] = {t.name: {"state": "cannot", "why": told(error)} for t in tasks}
        tasks = []
    for task in tasks:
        own, other = (problem.read(args.case, task.organism) for _ in range(2))
        rounds = max(3, round(task.rounds * args.rounds)) if args.rounds else 0
        found["tasks"][task.name] = measured(module, task, own, other, rounds)
        state = {k: v for k, v in found["tasks"][task.name].items() if k != "seconds"}
        print(args.module, task.name, state, file=sys.stderr, flush=True)
    args.out.write_text(json.dumps(found))


if __name__ == "__main__":
    main()
