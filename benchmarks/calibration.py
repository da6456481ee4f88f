"""Does every interval cover, and does every test keep its level? Measured for all of `estimates`.

    python benchmarks/calibration.py [--fresh]

0/1 outcomes of independent examples are enumerated: every possible outcome with its probability, so
that the numbers have no noise. Everything else is simulated, many data sets at a time; for a few of
them `Estimate` itself must give the same interval and the same decisions, or the script stops. Rows
are written as they are done, to benchmarks/results/calibration.json: a run that was killed goes on
where it was, and rows that rest on code which has changed since are computed anew. The page
docs/calibration.md is written from the rows. All of it takes about 17 minutes of one CPU core.
"""

import argparse
import ast
import hashlib
import json
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before numpy

from calibrating import bounded, counts, maps, means, ratios
from calibrating.page import page
from calibrating.rows import Row, Task

ROOT = Path(__file__).parents[1]
OUT = ROOT / "benchmarks" / "results" / "calibration.json"
PAGE = ROOT / "docs" / "calibration.md"
ESTIMATES = ROOT / "src" / "imaginelens" / "estimates"
# What is measured, and the modules of the estimates whose code the numbers rest on.
PARTS: dict[str, tuple[Callable[[], Iterator[Task]], tuple[str, ...]]] = {
    "paired": (counts.paired, ("paired", "score", "student", "exact")),
    "shares": (counts.shares, ("wilson", "student")),
    "means": (means.means, ("student", "bootstrap")),
    "clusters": (
        means.clusters,
        ("student", "bootstrap", "design", "paired", "score", "wilson"),
    ),
    "crossed": (means.pairs_of_donors, ("student", "design", "paired", "score")),
    "bounded": (bounded.contrasts, ("bounded", "design", "student")),
    "ratios": (ratios.ratios, ("ratio", "student")),
    "relative": (ratios.relative_margins, ("within", "paired", "score", "student")),
    "flips": (maps.flips, ("exact",)),
    "maps": (maps.maps, ("multiplicity", "design", "paired", "score", "student")),
}


def code_of(name: str) -> str:
    """A digest of a module of the estimates, without its docstrings and comments."""
    tree = ast.parse((ESTIMATES / f"{name}.py").read_text())
    for node in ast.walk(tree):
        body = getattr(node, "body", None)
        if isinstance(body, list) and body and _is_text(body[0]):
            node.body = body[1:]  # type: ignore[attr-defined]
    return hashlib.blake2b(ast.dump(tree).encode(), digest_size=8).hexdigest()


def _is_text(node: ast.AST) -> bool:
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)


def load(path: Path) -> dict[str, list[Row]]:
    """The rows of each task, as they were written."""
    given = json.loads(path.read_text())
    return {name: [Row(**row) for row in rows] for name, rows in given["tasks"].items()}


def up_to_date(path: Path, code: dict[str, str]) -> dict[str, list[Row]]:
    """The rows of each task whose part rests on code as it is now."""
    written, found = json.loads(path.read_text())["code"], load(path)
    fresh = [
        tasks for tasks, used in PARTS.values() if all(written.get(m) == code[m] for m in used)
    ]
    return {name: found[name] for tasks in fresh for name, _ in tasks() if name in found}


def deviations(path: Path) -> list[str]:
    """The rows that are listed as breaking the rule, by key."""
    return list(json.loads(path.read_text())["deviations"])


def save(path: Path, done: dict[str, list[Row]], code: dict[str, str]) -> None:
    """Write all rows, and which of them break the rule."""
    given = {
        "versions": {name: version(name) for name in ("imaginelens", "numpy", "scipy")},
        "code": code,
        "deviations": [row.key for rows in done.values() for row in rows if row.breaks],
        "tasks": {name: [asdict(row) for row in rows] for name, rows in done.items()},
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(given, indent=1) + "\n")


def main() -> None:
    """Compute what is not there yet, and write the rows and the page."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--page", type=Path, default=PAGE)
    parser.add_argument("--fresh", action="store_true", help="compute every row anew")
    args = parser.parse_args()
    code = {name: code_of(name) for name in sorted({m for _, used in PARTS.values() for m in used})}
    kept = {} if args.fresh or not args.out.exists() else up_to_date(args.out, code)
    done: dict[str, list[Row]] = {}
    for part, (tasks, _) in PARTS.items():
        for name, compute in tasks():
            if name not in kept:
                start = time.process_time()
                kept[name] = compute()
                save(args.out, kept, code)
                spent, found = time.process_time() - start, [r for r in kept[name] if r.breaks]
                broken = "; ".join(f"{r.quantity} {r.rate:.4f} {r.breaks}" for r in found)
                print(f"{part}: {name} ({spent:.1f} s) {broken}", flush=True)
            done[name] = kept[name]
    save(args.out, done, code)
    args.page.write_text(page([row for rows in done.values() for row in rows]))


if __name__ == "__main__":
    main()
