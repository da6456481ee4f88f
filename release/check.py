"""The release checklist: every step in one command, on a clean machine with Python, git and pip.

python -m release.check                 # everything; some hours
python -m release.check --fast          # without the steps that take long
python -m release.check --only sdist    # one step (may be repeated)

Each step prints one line: whether it holds, its seconds, what was found or what to do. The exit
status is 1 if a step failed. A step that lacks what it needs is told as `not checked`, at the end
too; it is no failure, and no proof.
"""

import argparse
import sys
import tempfile
import time
from pathlib import Path

from release.outcome import Failed, NotChecked
from release.steps import LONG, STEPS, Place

WORDS = {None: "ok", NotChecked: "not checked", Failed: "FAILED"}


def main(argv: list[str] | None = None) -> int:
    """Run the steps that were asked for; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m release.check", description=__doc__.split("\n")[0]
    )
    parser.add_argument("--fast", action="store_true", help=f"leave out {', '.join(LONG)}")
    parser.add_argument("--only", action="append", choices=list(STEPS), metavar="STEP",
                        help=f"one of {', '.join(STEPS)}; may be repeated")  # fmt: skip
    parser.add_argument("--work", type=Path, help="keep what is made here, and use it again")
    parser.add_argument("--any-torch", action="store_true",
                        help="where no CPU build of torch is at hand, install the index's own, "
                        "with gigabytes of CUDA")  # fmt: skip
    options = parser.parse_args(argv)
    wanted = options.only or [name for name in STEPS if not (options.fast and name in LONG)]
    with tempfile.TemporaryDirectory() as folder:
        work = (options.work or Path(folder)).resolve()
        work.mkdir(parents=True, exist_ok=True)
        outcomes = {name: run(name, Place(work, options.any_torch)) for name in wanted}
    print(summary(outcomes))
    return int(Failed in outcomes.values())


def run(name: str, place: Place) -> type[Exception] | None:
    """Do one step and tell how it ended."""
    begin = time.monotonic()
    ended: type[Exception] | None = None
    try:
        told = STEPS[name](place)
    except (Failed, NotChecked) as error:
        ended, told = type(error), str(error)
    seconds = time.monotonic() - begin
    print(f"{WORDS[ended]:<11} {name:<15} {seconds:6.0f} s  {told}", flush=True)
    return ended


def summary(outcomes: dict[str, type[Exception] | None]) -> str:
    """The last line.

    >>> summary({"version": None, "docs": Failed, "advisories": NotChecked})
    '1 ok, 1 failed (docs), 1 not checked (advisories)'
    """
    told = [f"{list(outcomes.values()).count(None)} ok"]
    for word, kind in (("failed", Failed), ("not checked", NotChecked)):
        names = [name for name, ended in outcomes.items() if ended is kind]
        told += [f"{len(names)} {word} ({', '.join(names)})"] if names else []
    return ", ".join(told)


if __name__ == "__main__":
    sys.exit(main())
