"""The command line: `imaginelens demo`, `study`, `report` and `doctor`.

What was found goes to stdout, progress and errors to stderr. Nothing heavy is imported before a
command is known, so that `--help` is there at once.
"""

import argparse
import json
import math
import os
import shlex
import sys
import warnings
from collections.abc import Mapping
from contextlib import redirect_stdout
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from imaginelens.mediation.study_config import StudyConfig
    from imaginelens.view.report import Measure, Study

_STATUS = """
exit status:
  0    done, and all is well
  1    it failed, or the doctor found a problem; stderr says what and what to do
  2    wrong usage
  130  interrupted by Ctrl-C
"""
_EXAMPLES = {
    "": """
  imaginelens demo
  imaginelens study --example > study.toml
  imaginelens doctor
""",
    "demo": """
  imaginelens demo
  imaginelens demo --out first-look --pairs 32 --seed 1
  imaginelens demo --json | python -m json.tool
""",
    "study": """
  imaginelens study --example > study.toml
  imaginelens study study.toml --dry-run
  imaginelens study study.toml --limit 8 --out trial
  imaginelens study study.toml --resume
  imaginelens study study.toml --dry-run --json
""",
    "report": """
  imaginelens report study
  imaginelens report study/layers --out layers.html
  imaginelens report study --json
""",
    "doctor": """
  imaginelens doctor
  imaginelens doctor --quiet
  imaginelens doctor --json
""",
}


def main(argv: list[str] | None = None) -> int:
    """Run a command; returns the exit status."""
    try:
        arguments = _parser().parse_args(argv)
    finally:  # of help, which may have been piped into `head`
        try:
            sys.stdout.flush()
        except BrokenPipeError:
            _hush(sys.stdout)
    screen = Screen(quiet=arguments.quiet, json=arguments.json, stdout=sys.stdout)
    os.environ.setdefault("TQDM_DISABLE", "1")  # the one bar there is, is asked for
    warnings.filterwarnings("ignore", category=FutureWarning)
    from imaginelens.hooks.errors import ImagineLensError

    try:
        with redirect_stdout(sys.stderr if screen.json else sys.stdout):
            status: int = arguments.command(arguments, screen)
        return status
    except ImagineLensError as error:
        notes = "".join(f" ({note})" for note in getattr(error, "__notes__", ()))
        print(f"imaginelens: {error}{notes}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nimaginelens: stopped", file=sys.stderr)
        return 130


@dataclass(frozen=True)
class Screen:
    """Where a command says what it found.

    Attributes:
        quiet: only results and errors; `json` one JSON object instead of all text.
        stdout: the one that was there when the command began.
    """

    quiet: bool
    json: bool
    stdout: Any

    @property
    def progress(self) -> bool:
        """Whether progress is to be told."""
        return not (self.quiet or self.json)

    def say(self, text: str) -> None:
        """Tell what is no result."""
        if self.progress:
            self._print(text)

    def result(self, text: str, value: Mapping[str, Any]) -> None:
        """Tell what the command was run for, in words or as JSON."""
        self._print(json.dumps(_plain(value), indent=1, allow_nan=False) if self.json else text)

    def _print(self, text: str) -> None:
        """A reader that has gone (`| head`) ends what is said, never what is done."""
        try:
            print(text, file=self.stdout, flush=True)
        except BrokenPipeError:
            _hush(self.stdout)


def _hush(stream: Any) -> None:
    """Nobody reads it any more."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def _plain(value: Any) -> Any:
    """A value as JSON has it: null for what is no number."""
    if isinstance(value, Mapping):
        return {str(key): _plain(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(each) for each in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return str(value) if isinstance(value, Path) else value


# ---- what can be asked for ---------------------------------------------------------------------


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="imaginelens", description="What do the latent tokens of a multimodal model cause?",
        epilog=_epilog(""), formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("--version", action="version", version=version("imaginelens"))
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    demo = _command(commands, "demo", "study the shipped organisms, offline, as one HTML report")
    demo.add_argument(
        "--out", type=Path, default=Path("imaginelens-demo"), help="folder to write to"
    )
    demo.add_argument("--pairs", type=int, default=64, help="pairs per organism (default 64)")
    demo.add_argument("--seed", type=int, default=0, help="of the pairs that are drawn")
    demo.set_defaults(command=_demo)
    _add_study(_command(commands, "study", "measure the maps that a TOML file describes"))
    report = _command(commands, "report", "saved maps as one self-contained HTML page")
    report.add_argument(
        "folder", type=Path, metavar="DIR", help="what a study or a map was saved to"
    )
    report.add_argument("--out", type=Path, help="the page (default DIR/report.html)")
    report.set_defaults(command=_report)
    doctor = _command(commands, "doctor", "versions, device, engine check, what is missing")
    doctor.set_defaults(command=_doctor)
    return parser


def _command(commands: Any, name: str, told: str) -> argparse.ArgumentParser:
    command: argparse.ArgumentParser = commands.add_parser(
        name, help=told, description=f"{told[0].upper()}{told[1:]}.", epilog=_epilog(name),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    command.add_argument(
        "--quiet", action="store_true", help="only what was found, and errors; no progress"
    )
    command.add_argument(
        "--json", action="store_true", help="what was found as one JSON object on stdout"
    )
    return command


def _epilog(name: str) -> str:
    return f"examples:{_EXAMPLES[name]}{_STATUS}"


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


def _usage(words: str) -> int:
    print(f"imaginelens: {words}", file=sys.stderr)
    return 2


# ---- demo --------------------------------------------------------------------------------------


def _demo(arguments: argparse.Namespace, screen: Screen) -> int:
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    if arguments.pairs < 2:
        return _usage("--pairs must be 2 or more, for intervals need two")
    import torch

    from imaginelens.mediation.study_progress import Progress
    from imaginelens.view.demo import run_demo, steps

    torch.set_num_threads(1)  # more threads only wait for each other on models this small
    studies: list[dict[str, Any]] = []
    begun = 0
    bar = Progress(steps(), shown=screen.progress)

    def tick(what: str) -> None:
        nonlocal begun
        bar.tick(min(begun, 1))  # the step before this one is done
        bar.now(what)
        begun += 1

    try:
        path = run_demo(
            arguments.out, n=arguments.pairs, seed=arguments.seed, tick=tick,
            told=lambda study: studies.append(_told(study)),
        ).resolve()  # fmt: skip
        bar.tick(1)
    finally:
        bar.close()
    words = {"pairs": arguments.pairs, "seed": arguments.seed}
    screen.result(str(path), {"report": path, **words, "models": studies})
    return 0


def _told(study: "Study") -> dict[str, Any]:
    """A study of the demo for programs; shares and accuracies are out of 1."""
    mechanism = study.mechanism
    shares = mechanism.predictions if mechanism is not None else ()
    return {
        "model": study.name,
        "verdict": study.headline,
        "detail": study.detail,
        "mechanism": None if mechanism is None else mechanism.winner,
        "shares": {each.name: _measure(each.share) for each in shares},
        "numbers": {each.label: _measure(each.measure) for each in study.numbers},
        "accuracy": {each.edit: _measure(each.accuracy) for each in study.edits},
        "failed_checks": [each.label for each in study.checks if each.ok is False],
    }


def _measure(measure: "Measure") -> dict[str, Any]:
    low, high = measure.interval or (None, None)
    return {"value": measure.value, "low": low, "high": high, "n": measure.n}


# ---- study -------------------------------------------------------------------------------------


def _study(arguments: argparse.Namespace, screen: Screen) -> int:
    from imaginelens.mediation.study_config import EXAMPLE, read_config

    if arguments.example:
        screen.result(EXAMPLE.rstrip("\n"), {"example": EXAMPLE})
        return 0
    if arguments.config is None:
        return _usage(
            "name the study's TOML file; write one with: imaginelens study --example > study.toml"
        )
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
                cost = forecast(config, load, device=here.device)
                screen.result(str(cost), cost.totals | asdict(cost))
            return 0
        said: list[str] = []

        def say(text: str) -> None:
            said.append(text)
            screen.say(text)

        whole = run_study(
            config, load, resume=arguments.resume, processes=here, say=say,
            shown=screen.progress,
        )  # fmt: skip
        if here.first:
            _tell(config, screen, whole, said)
        return 0 if whole else 1
    except KeyboardInterrupt:
        if here.first:
            again = ["imaginelens study", shlex.quote(str(arguments.config))]
            for name in ("limit", "seed", "device", "out"):
                value = getattr(arguments, name)
                again += [] if value is None else [f"--{name}", shlex.quote(str(value))]
            print(f"\nimaginelens: {stopped(config, ' '.join(again))}", file=sys.stderr)
        return 130
    finally:
        here.close()


def _tell(config: "StudyConfig", screen: Screen, whole: bool, said: list[str]) -> None:
    """Where everything is, and which maps changed nothing."""
    maps: list[dict[str, Any]] = []
    for each in config.maps:
        folder = config.out / each.name
        lost = [text for text in said if text.startswith(f"{each.name}: ")]
        if (folder / "summary.json").is_file():
            summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
            maps.append({"folder": folder, **summary})
        else:
            maps.append({"folder": folder, "name": each.name, "error": lost[0] if lost else ""})
            if not screen.progress:  # else it was said
                print(f"imaginelens: {maps[-1]['error']}", file=sys.stderr)
    report = _written(config.out, None) if whole else None
    found = {"folder": config.out, "report": report, "maps": maps}
    if report or screen.json:
        screen.result(f"report: {report}", found)


# ---- report and doctor -------------------------------------------------------------------------


def _report(arguments: argparse.Namespace, screen: Screen) -> int:
    path = _written(arguments.folder, arguments.out).resolve()
    screen.result(str(path), {"report": path})
    return 0


def _written(folder: Path, out: Path | None) -> Path:
    from imaginelens.view.map_report import write

    return write(folder, out)


def _doctor(arguments: argparse.Namespace, screen: Screen) -> int:
    from imaginelens.view.doctor import examine

    findings = examine()
    failed = [finding for finding in findings if finding.ok is False]
    shown = failed if screen.quiet else findings
    end = f"{len(failed)} problem{'s' * (len(failed) != 1)} found" if failed else "all well"
    told = "\n".join([*map(str, shown), *([] if screen.quiet and not failed else ["", end])])
    if told or screen.json:
        screen.result(
            told, {"problems": len(failed), "findings": [asdict(each) for each in findings]}
        )
    return 1 if failed else 0
