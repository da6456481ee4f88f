"""The command line: `imaginelens demo`, `study`, `report` and `doctor`."""

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
        notes = "".join(f" ({note})" for note in getattr(error, "__notes__", ()))
        print(f"imaginelens: {error}{notes}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nimaginelens: stopped", file=sys.stderr)
        return 130


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
    _add_study(commands.add_parser("study", help="measure the maps that a TOML file describes"))
    report = commands.add_parser("report", help="saved maps as one self-contained HTML page")
    report.add_argument(
        "folder", type=Path, metavar="DIR", help="what a study or a map was saved to"
    )
    report.add_argument("--out", type=Path, help="the page (default DIR/report.html)")
    report.set_defaults(command=_report)
    doctor = commands.add_parser("doctor", help="versions, device, engine check, what is missing")
    doctor.set_defaults(command=_doctor)
    return parser


def _add_study(study: argparse.ArgumentParser) -> None:
    study.add_argument("config", nargs="?", type=Path, help="the study's TOML file")
    study.add_argument("--example", action="store_true", help="print a config that runs as it is")
    study.add_argument("--dry-run", action="store_true", help="say what it would cost, only")
    study.add_argument("--resume", action="store_true", help="go on with what is in the folder")
    study.add_argument("--limit", type=int, help="take the first so many pairs")
    study.add_argument("--seed", type=int, help="of the pairs that are drawn, and of the tests")
    study.add_argument("--device", help="cpu, cuda, cuda:1, ...")
    study.add_argument("--out", type=Path, help="folder to write to")
    study.set_defaults(command=_study)


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


def _study(arguments: argparse.Namespace) -> int:
    from imaginelens.mediation.study_config import EXAMPLE, read_config

    if arguments.example:
        print(EXAMPLE, end="")
        return 0
    if arguments.config is None:
        print(
            "imaginelens: name the study's TOML file; write one with: imaginelens study --example "
            "> study.toml",
            file=sys.stderr,
        )
        return 2
    config = read_config(arguments.config).with_options(
        limit=arguments.limit, seed=arguments.seed, device=arguments.device, out=arguments.out
    )
    from imaginelens.mediation.processes import launched
    from imaginelens.mediation.run_study import run_study, stopped
    from imaginelens.mediation.study_forecast import forecast
    from imaginelens.organisms import load

    here = launched(cpu=config.model.device == "cpu")
    try:
        if arguments.dry_run:
            if here.first:
                print(forecast(config, load, device=here.device))
            return 0
        whole = run_study(config, load, resume=arguments.resume, processes=here)
        if whole and here.first:
            print(f"report: {_written(config.out, None)}")
        return 0 if whole else 1
    except KeyboardInterrupt:
        if here.first:
            again = ["imaginelens study", str(arguments.config)]
            for name in ("limit", "seed", "device", "out"):
                value = getattr(arguments, name)
                again += [] if value is None else [f"--{name}", str(value)]
            print(f"\nimaginelens: {stopped(config, ' '.join(again))}", file=sys.stderr)
        return 130
    finally:
        here.close()


def _report(arguments: argparse.Namespace) -> int:
    print(_written(arguments.folder, arguments.out).resolve())
    return 0


def _written(folder: Path, out: Path | None) -> Path:
    from imaginelens.view.map_report import write

    return write(folder, out)


def _doctor(arguments: argparse.Namespace) -> int:
    from imaginelens.view.doctor import examine

    findings = examine()
    for finding in findings:
        print(finding)
    failed = [finding for finding in findings if finding.ok is False]
    print(f"\n{len(failed)} problem{'s' * (len(failed) != 1)} found" if failed else "\nall well")
    return 1 if failed else 0
