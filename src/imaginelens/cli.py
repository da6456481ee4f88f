"""The command line: `imaginelens demo` and `imaginelens doctor`."""

import argparse
import os
import sys
import warnings
from pathlib import Path

from imaginelens.hooks.errors import ImagineLensError


def main(argv: list[str] | None = None) -> int:
    """Run a command; returns the exit status."""
    arguments = _parser().parse_args(argv)
    warnings.filterwarnings("ignore", category=FutureWarning)
    try:
        status: int = arguments.command(arguments)
        return status
    except ImagineLensError as error:
        print(f"imaginelens: {error}", file=sys.stderr)
        return 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="imaginelens", description="What do the latent tokens of a multimodal model cause?"
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    demo = commands.add_parser(
        "demo", help="study the shipped organisms, offline, as one HTML report"
    )
    demo.add_argument(
        "--out", type=Path, default=Path("imaginelens-demo"), help="folder to write to"
    )
    demo.add_argument("--pairs", type=int, default=64, help="pairs per organism (default 64)")
    demo.add_argument("--seed", type=int, default=0)
    demo.set_defaults(command=_demo)
    doctor = commands.add_parser("doctor", help="versions, device, engine check, what is missing")
    doctor.set_defaults(command=_doctor)
    return parser


def _demo(arguments: argparse.Namespace) -> int:
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    if arguments.pairs < 2:
        print("imaginelens: --pairs must be 2 or more, for intervals need two", file=sys.stderr)
        return 2
    import torch
    from tqdm import tqdm

    from imaginelens.view.demo import run_demo, steps

    torch.set_num_threads(1)  # more threads only wait for each other on models this small
    form = "{percentage:3.0f}% |{bar}| {elapsed} {desc}"
    with tqdm(total=steps(), bar_format=form, leave=False, disable=None) as bar:

        def tick(what: str) -> None:
            bar.set_description_str(what)
            bar.update()

        path = run_demo(arguments.out, n=arguments.pairs, seed=arguments.seed, tick=tick)
    print(path.resolve())
    return 0


def _doctor(arguments: argparse.Namespace) -> int:
    from imaginelens.view.doctor import examine

    findings = examine()
    for finding in findings:
        print(finding)
    failed = [finding for finding in findings if finding.ok is False]
    print(f"\n{len(failed)} problem{'s' * (len(failed) != 1)} found" if failed else "\nall well")
    return 1 if failed else 0
