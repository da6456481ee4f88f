"""Every figure and table of arXiv 2602.22766, and what they lack, by one command each.

    python -m examples.reproduce list
    python -m examples.reproduce table4 --organisms
    python -m examples.reproduce all --organisms --out report/
    python -m examples.reproduce table4 --config examples/reproduce/configs/mirage-stage2.toml
    python -m examples.reproduce all --config examples/reproduce/configs/monet-7b.toml --dry-run

On organisms it takes minutes on a CPU. What is measured is kept in the folder of `--out` at once,
as JSON with its figures, and not measured again unless `--fresh`. The page report.html there holds
all exhibits, the paper's numbers beside ours.
"""

import argparse
import os
import platform
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

from examples.reproduce.exhibit import Exhibit
from examples.reproduce.registry import EXHIBITS, NOT_KNOWN
from examples.reproduce.store import FORM, Kept, Store
from imaginelens.estimates import EstimateError
from imaginelens.hooks.errors import ImagineLensError, InputError


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit status."""
    arguments = _parser().parse_args(argv)
    try:
        return _run(arguments)
    except ImagineLensError as error:
        print(f"reproduce: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nreproduce: stopped; what is done is kept", file=sys.stderr)
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m examples.reproduce", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("exhibit", choices=["list", "all", *EXHIBITS], metavar="EXHIBIT",
                        help=f"list, all, or one of {', '.join(EXHIBITS)}")  # fmt: skip
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--organisms", action="store_true", help="on the shipped tiny models")
    source.add_argument("--config", type=Path, help="on the model that a TOML file names")
    parser.add_argument("--out", type=Path, help="folder of results (report/, or the config's)")
    parser.add_argument("-n", type=int, help="examples of each organism")
    parser.add_argument("--seed", type=int, help="0, or the config's")
    parser.add_argument("--fresh", action="store_true", help="measure again what is kept")
    parser.add_argument("--dry-run", action="store_true", help="say what it would cost, only")
    return parser


def _run(arguments: argparse.Namespace) -> int:
    if arguments.exhibit == "list":
        print(listing())
        return 0
    if arguments.n is not None and (arguments.n < 24 or arguments.config):
        print("reproduce: -n is of organisms, 24 or more; a config says its own", file=sys.stderr)
        return 2
    chosen = list(EXHIBITS.values())
    if arguments.exhibit != "all":
        chosen = [EXHIBITS[arguments.exhibit]]
    if arguments.config is not None:
        return _with_config(arguments, chosen)
    if not arguments.organisms:
        print("reproduce: say what is measured: --organisms, or --config FILE", file=sys.stderr)
        return 2
    return _on_organisms(arguments, chosen)


def listing() -> str:
    """All exhibits, what they cover, and what they can be measured on."""
    lines = []
    for one in EXHIBITS.values():
        on = ", ".join(one.organisms) or "no organism"
        lines.append(f"{one.name:<12} {', '.join(one.covers) or 'beyond the paper'}: {one.title}")
        lines.append(f"{'':<12} on {on}; configs of {', '.join(one.families) or 'no family'}")
    return "\n".join([*lines, NOT_KNOWN])


# ---- organisms ---------------------------------------------------------------------------------


def _on_organisms(arguments: argparse.Namespace, chosen: Sequence[Exhibit]) -> int:
    import torch

    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    torch.set_num_threads(1)  # more threads only wait for each other on models this small
    seed = 0 if arguments.seed is None else arguments.seed
    if arguments.dry_run:
        for one in chosen:
            n = _size(arguments, one)
            print(f"{one.name:<12} {len(one.organisms)} organisms, {n} examples each, "
                  f"{one.arms.generations * n * len(one.organisms)} generations")  # fmt: skip
        print("all together take about five minutes on one core")
        return 0
    store = Store(Path("report") if arguments.out is None else arguments.out)
    jobs = [
        Job(one, name, _size(arguments, one), seed, "organism")
        for one in chosen
        for name in one.organisms
    ]
    opened: dict[str, Any] = {}

    def subject(job: Job) -> Any:
        from examples.reproduce.subjects import organism

        if job.subject not in opened:
            opened[job.subject] = organism(job.subject)
        return opened[job.subject]

    failed = measured(jobs, store, subject, fresh=arguments.fresh)
    _show(chosen, store, seed)
    return 1 if failed else 0


def _size(arguments: argparse.Namespace, one: Exhibit) -> int:
    return one.n if arguments.n is None else min(arguments.n, one.n)


# ---- configs -----------------------------------------------------------------------------------


def _with_config(arguments: argparse.Namespace, chosen: Sequence[Exhibit]) -> int:
    from examples.reproduce.config import read_config
    from examples.reproduce.forecast import forecast

    config = read_config(arguments.config)
    if arguments.seed is not None:
        config = replace(config, run={**config.run, "seed": arguments.seed})
    family = config.model["family"]
    fitting = [one for one in chosen if family in one.families]
    if not fitting:
        raise InputError(
            f"{chosen[0].name} is not measured on the family {family}; it takes configs of "
            f"{', '.join(chosen[0].families) or 'none'}"
        )
    if arguments.dry_run:
        print(forecast(config, fitting))
        return 0
    store = Store(Path(config.run["out"]) if arguments.out is None else arguments.out)
    jobs = [
        Job(one, config.name, config.run[one.size], config.run["seed"], config.digest)
        for one in fitting
    ]
    opened: list[Any] = []

    def subject(job: Job) -> Any:
        if not opened:
            opened.append(config.open())
        return opened[0]

    failed = measured(jobs, store, subject, fresh=arguments.fresh)
    _show(fitting, store, config.run["seed"])
    return 1 if failed else 0


# ---- measuring ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Job:
    """One exhibit on one subject. `of` identifies all else that its numbers depend on."""

    exhibit: Exhibit
    subject: str
    n: int
    seed: int
    of: str

    @property
    def key(self) -> dict[str, Any]:
        """What must be equal for a kept result to stand for this."""
        versions = {name: version(name) for name in ("imaginelens", "torch", "transformers")}
        return {"form": FORM, "n": self.n, "seed": self.seed, "of": self.of, **versions}


def measured(jobs: Sequence[Job], store: Store, open_subject: Any, *, fresh: bool) -> list[str]:
    """Measure what is not kept yet, each kept as soon as it is there; gives what failed, and why.

    What fails, for want of data or memory, never stops the rest.
    """
    failed = []
    for number, job in enumerate(jobs, 1):
        label = f"[{number}/{len(jobs)}] {job.exhibit.name} on {job.subject}"
        kept = None if fresh else store.read(job.exhibit.name, job.subject)
        if kept is not None and kept.key == job.key:
            print(f"{label}: kept", file=sys.stderr)
            continue
        started = time.perf_counter()
        try:
            subject = open_subject(job)
            found = job.exhibit.run(subject, n=job.n, seed=job.seed)
        except (ImagineLensError, EstimateError) as error:
            print(f"{label}: left out, {error}", file=sys.stderr)
            failed.append(f"{job.exhibit.name}: {error}")
            continue
        seconds = time.perf_counter() - started
        whole = replace(found, n=job.n, seed=job.seed, seconds=seconds)
        store.save(job.exhibit.name, job.subject, Kept(subject.heading, whole, job.key))
        print(f"{label}: {seconds:.1f} s", file=sys.stderr)
    return failed


def everything(store: Store) -> Iterator[tuple[str, dict[str, Kept]]]:
    """All results in a folder, organisms in the order of their exhibit."""
    for one in EXHIBITS.values():
        there = store.subjects(one.name)
        order = [name for name in one.organisms if name in there]
        order += [name for name in there if name not in order]
        kept = {name: store.read(one.name, name) for name in order}
        yield one.name, {k: v for k, v in kept.items() if v and v.key.get("form") == FORM}


def _show(chosen: Sequence[Exhibit], store: Store, seed: int) -> None:
    """Print what was asked for, and write the page of all that there is."""
    from examples.reproduce import page
    from examples.reproduce.grid import printed

    found = dict(everything(store))
    for one in chosen:
        print(printed(one, found[one.name]), end="\n\n")
    seconds = sum(k.measured.seconds for kept in found.values() for k in kept.values())
    names = ("imaginelens", "torch", "transformers", "nnsight")
    about = {
        **{name: version(name) for name in names}, "python": platform.python_version(),
        "seed": str(seed), "seconds of all measurements": f"{seconds:.0f}",
        "results": str(sum(map(len, found.values()))),
    }  # fmt: skip
    print(page.write(store.folder, found, about=about))


if __name__ == "__main__":
    sys.exit(main())
