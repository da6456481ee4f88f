"""The whole robustness campaign, and its figures in one table.

`python tests/campaign/run.py OUT` (about three hours on two cores; what is in OUT already is not
done again): 10,000 property cases, 1,000,000 fuzzed inputs for every reader, more than 1,000
injected faults. `--small` does a thousandth of it. Needs `pip install atheris` besides the test
environment. Exit status 1 if anything was lost, left behind, executed, or crashed without a
sentence.
"""

import argparse
import json
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))
sys.path.insert(0, str(HERE.parents[1]))


def reader_names() -> list[str]:
    from campaign.readers import READERS

    return [reader.name for reader in READERS]


def run(program: str, out: Path, *arguments: str) -> None:
    """Run one part in a process of its own, unless its figures are there."""
    if out.exists():
        return
    partial = out.with_suffix(".partial")
    command = [sys.executable, str(HERE / program), *arguments, "--out", str(partial)]
    done = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    if done.returncode or not partial.exists():
        out.with_suffix(".log").write_text(done.stdout + done.stderr)
        print(f"{program} {' '.join(arguments)} broke off: see {out.with_suffix('.log')}")
        return
    partial.rename(out)


def table(out: Path) -> tuple[str, bool]:
    """The figures in one Markdown table, and whether all is well."""
    rows: list[tuple[Any, ...]] = []
    well = True
    for path in sorted(out.glob("fuzz-*.json")):
        found = json.loads(path.read_text())
        bad = len(found["crashes"]) + len(found["acts"])
        outcome = f"{found['refused']:,} refused, {found['accepted']:,} read"
        size = f"{found['bytes'] / 1e6:,.0f} MB"
        rows.append((f"fuzz: {found['reader']}", f"{found['inputs']:,} ({size})", outcome, bad))
        well &= not bad
    for found in _listed(out / "faults.json"):
        bad = found["hooks_left"] + found["lost"] + len(found["wrong"])
        outcome = f"{found['told']:,} told, {found['unharmed']:,} without harm"
        rows.append((f"faults: {found['kind']}", f"{found['injected']:,}", outcome, bad))
        well &= not bad
    for found in _listed(out / "properties.json"):
        kinds = ", ".join(f"{n:,} {kind}" for kind, n in found["kinds"].items())
        rows.append(("properties", f"{found['cases']:,}", kinds, 0))
    lines = ["| part | tried | outcome | lost, left, executed or crashed |", "|-|-:|-|-:|"]
    lines += [f"| {' | '.join(map(str, row))} |" for row in rows]
    return "\n".join(lines), well


def _listed(path: Path) -> list[dict[str, Any]]:
    found = json.loads(path.read_text()) if path.exists() else []
    return found if isinstance(found, list) else [found]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--jobs", type=int, default=2)
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    runs, cases, cuts = (1000, 100, 2) if options.small else (1_000_000, 10_000, 100)
    with ThreadPoolExecutor(options.jobs) as pool:
        parts = [
            pool.submit(run, "properties.py", options.out / "properties.json", f"--cases={cases}"),
            pool.submit(run, "faults.py", options.out / "faults.json", f"--cuts={cuts}"),
        ]
        for name in reader_names():
            own = options.out / f"fuzz-{re.sub('[^a-z]+', '-', name.lower())}.json"
            parts.append(pool.submit(run, "fuzz.py", own, name, f"--runs={runs}"))
        for part in parts:
            part.result()
    told, well = table(options.out)
    print(told)
    whole = len(list(options.out.glob("*.json"))) == len(parts)
    return 0 if well and whole else 1


if __name__ == "__main__":
    sys.exit(main())
