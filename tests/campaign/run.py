"""The whole robustness campaign, and its figures in one table.

`python tests/campaign/run.py OUT` (about two hours on two cores): 10,000 property cases, 1,000,000
fuzzed inputs for every reader, more than 1,000 injected faults. It may be stopped at any time: what
is in OUT already is not done again, and readers go on from the inputs that they have had. `--small`
does a thousandth of it. `--record FILE.md` keeps the table, with the versions and the machine, and
beside it FILE.json, from which a new OUT, perhaps on another machine, goes on. Needs `pip install
atheris` besides the test environment. Exit status 1 if anything was lost, left behind, executed, or
crashed without a sentence, or is not yet done.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))
sys.path.insert(0, str(HERE.parents[1]))

PACKAGES = (
    "imaginelens",
    "torch",
    "transformers",
    "safetensors",
    "Pillow",
    "hypothesis",
    "atheris",
)


@dataclass(frozen=True)
class Goal:
    """What a campaign must have tried.

    Attributes:
        cases: of properties.
        inputs: of each reader.
        faults: of all kinds together.
    """

    cases: int = 10_000
    inputs: int = 1_000_000
    faults: int = 1_000


FULL = Goal()
SMALL = Goal(100, 1000, 100)


def part(program: str, out: Path, *arguments: str) -> None:
    """Run one part in a process of its own."""
    log = (out / program if out.is_dir() else out).with_suffix(".log")
    with log.open("w") as words:
        command = [sys.executable, str(HERE / program), *arguments, "--out", str(out)]
        done = subprocess.run(command, stdin=subprocess.DEVNULL, stdout=words, stderr=words)
    if done.returncode:
        print(f"{program} {' '.join(arguments)} broke off: see {log}")


def table(out: Path, goal: Goal, readers: int) -> tuple[str, bool]:
    """The figures in Markdown, and whether all is well and done.

    Args:
        readers: how many there are.
    """
    rows: list[tuple[Any, ...]] = []
    fuzzed = [json.loads(path.read_text()) for path in sorted(out.glob("fuzz-*.json"))]
    for found in fuzzed:
        outcome = f"{found['refused']:,} refused, {found['accepted']:,} read"
        tried = f"{found['inputs']:,}{_of(found['inputs'], goal.inputs)}"
        size = f"{found['bytes'] / 1e6:,.0f} MB"
        bad = len(found["crashes"]) + len(found["acts"])
        rows.append((f"fuzz: {found['reader']}", f"{tried} ({size})", outcome, bad))
    faults = _listed(out / "faults.json")
    for found in faults:
        outcome = f"{found['told']:,} told, {found['unharmed']:,} without harm"
        bad = found["hooks_left"] + found["lost"] + len(found["wrong"])
        rows.append((f"faults: {found['kind']}", f"{found['injected']:,}", outcome, bad))
    cases = _listed(out / "properties.json")
    for found in cases:
        kinds = ", ".join(f"{n:,} {kind}" for kind, n in found["kinds"].items())
        rows.append(("properties", f"{found['cases']:,}", kinds, 0))
    whole = sum(found["inputs"] >= goal.inputs for found in fuzzed)
    tried = sum(found["cases"] for found in cases)
    injected = sum(found["injected"] for found in faults)
    size = sum(found["bytes"] for found in fuzzed)
    lost = {key: sum(found[key] for found in faults) for key in ("hooks_left", "lost")}
    crashes = sum(len(found["crashes"]) for found in fuzzed)
    crashes += sum(len(found["wrong"]) for found in faults)
    acts = sum(len(found["acts"]) for found in fuzzed)
    inputs = sum(found["inputs"] for found in fuzzed)
    said = (
        f"{tried:,} property cases{_of(tried, goal.cases)}; {injected:,} faults injected"
        f"{_of(injected, goal.faults)}; {inputs:,} inputs fuzzed ({size / 1e9:,.1f} GB): "
        f"{whole} of {readers} readers have had {goal.inputs:,} or more. "
    )
    if faults:  # else nothing could have been lost
        said += f"{lost['hooks_left']} hooks left, {lost['lost']} results lost, "
    said += f"{crashes} crashes without a sentence, {acts} things executed."
    lines = ["| part | tried | outcome | lost, left, executed or crashed |", "|-|-:|-|-:|"]
    lines += [f"| {' | '.join(map(str, row))} |" for row in rows]
    well = not any(row[3] for row in rows)
    done = whole == readers and tried >= goal.cases and injected >= goal.faults
    return "\n".join([said, "", *lines]), well and done


def _of(tried: int, goal: int) -> str:
    return "" if tried >= goal else f" of {goal:,}"


def _listed(path: Path) -> list[dict[str, Any]]:
    found = json.loads(path.read_text()) if path.exists() else []
    return found if isinstance(found, list) else [found]


def record(told: str) -> str:
    """The page that is kept: with what, and on what, it was run."""
    have = []
    for name in PACKAGES:
        try:
            have.append(f"{name} {version(name)}")
        except PackageNotFoundError:
            continue
    machine = f"Python {platform.python_version()}, {platform.system()}, {os.cpu_count()} cores"
    return f"""# The robustness campaign

Written by `python tests/campaign/run.py OUT --record FILE.md`. {", ".join(have)}; {machine}.
Figures accumulate over runs and machines; those of a reader begin anew when its code changes.

{told}
"""


def keep(out: Path, told: str, page: Path) -> None:
    """Write the page, and beside it the figures that another OUT can go on from.

    Those of faults are left out: they are soon had again, and nothing tells of what code they are.
    """
    paths = sorted((*out.glob("fuzz-*.json"), *out.glob("properties.json")))
    figures = {path.name: json.loads(path.read_text()) for path in paths}
    page.with_suffix(".json").write_text(json.dumps(figures, indent=1) + "\n")
    page.write_text(record(told))


def go_on(page: Path, out: Path) -> None:
    """Put the figures that were kept into OUT, where it has none; each part drops other code's."""
    kept = page.with_suffix(".json")
    for name, found in json.loads(kept.read_text()).items() if kept.exists() else ():
        if not (out / name).exists():
            (out / name).write_text(json.dumps(found, indent=1) + "\n")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--record", type=Path, metavar="FILE.md")
    parser.add_argument("--tell", action="store_true", help="what is in OUT; nothing is run")
    options = parser.parse_args()
    out, goal = options.out, SMALL if options.small else FULL
    out.mkdir(parents=True, exist_ok=True)
    if options.record is not None:
        go_on(options.record, out)
    if not options.tell:
        small = ["--small"] if options.small else []
        with ThreadPoolExecutor(options.jobs) as pool:
            if not (out / "faults.json").exists():
                pool.submit(part, "faults.py", out / "faults.json", *small)
            pool.submit(part, "properties.py", out / "properties.json", f"--cases={goal.cases}")
        part("fuzz.py", out, f"--runs={goal.inputs}", f"--jobs={options.jobs}")
    from campaign.readers import READERS

    told, well = table(out, goal, len(READERS))
    print(told)
    if options.record is not None:
        keep(out, told, options.record)
    return 0 if well else 1


if __name__ == "__main__":
    sys.exit(main())
