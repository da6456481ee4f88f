"""Are the cheap ratios still what `results/` says? A table for CI, which never fails.

    python -m benchmarks.regressions [--rounds 16]

Measured again: the overhead groups on the thin twin of `overhead.py`, and ImagineLens against plain
torch on three tasks of `peers`. A ratio is `slower` or `faster` only where its whole interval lies
beyond the committed one's by a twentieth; another machine may differ by that for reasons of its
own, so the table is for reading.
"""

import argparse
import json
import tempfile
import traceback
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks import overhead
from benchmarks.overhead import ROOT, TWIN, Median

RESULTS = ROOT / "benchmarks" / "results"
SLACK = 1.05
CHEAP = ("T1", "T2", "T4")  # of `peers`


@dataclass(frozen=True)
class Compared:
    """One ratio, as committed and as measured now."""

    name: str
    before: Median
    now: Median

    @property
    def verdict(self) -> str:
        """Whether the interval of now lies wholly beyond that of before.

        >>> Compared("x", Median(1.0, 0.9, 1.1), Median(2.0, 1.9, 2.1)).verdict
        'slower'
        >>> Compared("x", Median(1.0, 0.9, 1.1), Median(1.1, 1.0, 1.2)).verdict
        'as before'
        """
        if self.now.low > self.before.high * SLACK:
            return "slower"
        return "faster" if self.now.high * SLACK < self.before.low else "as before"


def committed(results: Path = RESULTS) -> dict[str, Median]:
    """The ratios in `results/` that are cheap to measure again, by name."""
    found: dict[str, Median] = {}
    costs = results / "overhead.json"
    if costs.exists():
        for cost in json.loads(costs.read_text())["costs"]:
            if cost["group"].endswith(TWIN):
                found[f"{cost['group']}: {cost['name']}"] = Median(**cost["ratio"])
    peers = results / "peers.json"
    if peers.exists():
        for row in json.loads(peers.read_text())["rows"]:
            if row["peer"] == "ImagineLens" and row["task"] in CHEAP and row["ratio"]:
                found[f"{row['task']} of peers"] = Median(**row["ratio"])
    return found


def measured(rounds: int) -> Iterable[tuple[str, Median]]:
    """The same ratios, with few rounds."""
    thin = next(one for one in overhead.subjects() if one.size == TWIN)
    with torch.no_grad():
        costs = [*overhead.forward(thin, rounds), *overhead.generation(thin, max(6, rounds // 2))]
    for cost in costs:
        yield f"{cost.group}: {cost.name}", cost.ratio
    yield from of_peers(max(6, rounds // 2))


def of_peers(rounds: int) -> Iterable[tuple[str, Median]]:
    """ImagineLens against plain torch, on the tasks that take milliseconds."""
    from benchmarks.peers import ours, plain_torch, problem
    from benchmarks.peers.tasks import TASKS
    from benchmarks.peers.worker import timed

    with tempfile.TemporaryDirectory() as folder:
        case = Path(folder) / "case.pt"
        problem.write(case)
        given = {name: problem.read(case, name) for name in problem.MODELS}
    for task in TASKS:
        if task.name in CHEAP:
            turns = {
                name: partial(getattr(module, task.does), module.setup(given[task.organism]))
                for name, module in (("plain", plain_torch), ("ours", ours))
            }
            turns = {name: partial(do, given[task.organism]) for name, do in turns.items()}
            for warm in turns.values():
                warm()
            seconds = timed(turns, rounds)
            ratios = [a / b for a, b in zip(seconds["ours"], seconds["plain"], strict=True)]
            yield f"{task.name} of peers", Median.of(ratios)


def table(found: Iterable[Compared]) -> str:
    """One line for each ratio, those that changed first."""
    order = ("slower", "faster", "as before")
    lines = ["| ratio | committed | 95 % | now | 95 % | |", "|-|-:|-|-:|-|-|"]
    for one in sorted(found, key=lambda c: order.index(c.verdict)):
        cells = [one.name]
        for median in (one.before, one.now):
            cells += [f"{median.value:.2f}", f"{median.low:.2f}..{median.high:.2f}"]
        lines.append("| " + " | ".join([*cells, one.verdict]) + " |")
    return "\n".join(lines)


def report(before: Mapping[str, Median], rounds: int) -> str:
    """The table, or why there is none: a benchmark must not fail a build."""
    try:
        now: dict[str, Any] = dict(measured(rounds))
    except Exception:
        return "regressions: nothing was measured, because\n" + traceback.format_exc()
    both = [Compared(name, before[name], now[name]) for name in before if name in now]
    gone = [name for name in before if name not in now]
    text = table(both)
    return text + (f"\nnot measured: {', '.join(gone)}" if gone else "")


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=16, help="of forwards; half for the rest")
    args = parser.parse_args()
    torch.set_num_threads(1)
    print(report(committed(), args.rounds))


if __name__ == "__main__":
    main()
