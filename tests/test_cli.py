"""The command line: what goes to stdout and what to stderr, in words, as JSON, and the status."""

import contextlib
import io
import json
import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from view import planted_report

import imaginelens as il
import imaginelens.view.demo
import imaginelens.view.doctor
from imaginelens import cli
from imaginelens.mediation.cells import Cell
from imaginelens.view.doctor import Finding

COMMANDS = ["demo", "study", "report", "doctor"]
PYTHON = [sys.executable, "-m", "imaginelens"]
SMALL = """
[model]
name = "latent-content"
[data]
task = { n = 4 }
[[map]]
name = "fixed"
sites = "resid_post"
context = "fixed"
[[map]]
name = "fed-back"
sites = "hook_latent"
edit = "zero"
metric = "log_prob"
[run]
batch_size = 2
out = "out"
"""


@pytest.fixture
def said(capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """Runs a command: its status, stdout and stderr."""

    def run(*arguments: str) -> tuple[int, str, str]:
        capsys.readouterr()
        try:
            status = cli.main(list(arguments))
        except SystemExit as end:
            status = int(end.code or 0)
        return status, *capsys.readouterr()

    return run


Said = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the map of a study."""
    folder = tmp_path_factory.mktemp("saved")
    cells = [Cell("resid_post", layer, "latent[0]", None, ()) for layer in (0, 1)]
    after = np.random.default_rng(0).normal(size=(2, 12))
    found = il.EffectMap.from_arrays(cells=cells, before=np.zeros(12), after=after)
    found.save(folder / "study" / "layers")
    return folder


@pytest.fixture
def planted_demo(monkeypatch: pytest.MonkeyPatch) -> None:
    """A demo that finds what is planted, and says something that nobody asked for."""

    def run_demo(out: Path, *, n: int, seed: int, tick: Any, told: Any) -> Path:
        print("a library that talks")
        for step in range(imaginelens.view.demo.steps()):
            tick(f"step {step}")
        for study in (planted_report.content(), planted_report.ignored()):
            told(study)
        return out / "report.html"

    monkeypatch.setattr(imaginelens.view.demo, "run_demo", run_demo)


@pytest.fixture
def study_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "study.toml").write_text(SMALL)
    monkeypatch.chdir(tmp_path)
    return tmp_path


# ---- help --------------------------------------------------------------------------------------


def examples(page: str) -> list[list[str]]:
    """The commands that a page of help shows, without what the shell does with them."""
    lines = re.findall(r"^  (imaginelens .*)$", page, re.MULTILINE)
    return [shlex.split(re.split(r"[|>]", line)[0])[1:] for line in lines]


@pytest.mark.parametrize("command", ["", *COMMANDS])
def test_help_shows_examples_that_parse_and_the_exit_status(command: str, said: Said) -> None:
    status, page, errors = said(*command.split(), "--help")
    assert (status, errors) == (0, "")
    shown = examples(page)
    assert len(shown) >= 3
    for arguments in shown:
        assert not command or arguments[0] == command
        assert cli._parser().parse_args(arguments).command
    for code, what in (("0", "done"), ("1", "failed"), ("2", "usage"), ("130", "Ctrl-C")):
        assert re.search(rf"^  {code} +.*{what}", page, re.MULTILINE)
    if command:
        assert "--quiet" in page
        assert "--json" in page


def test_an_example_that_does_not_parse_is_found(capsys: pytest.CaptureFixture[str]) -> None:
    (wrong,) = examples("examples:\n  imaginelens demo --pears 3\n")
    with pytest.raises(SystemExit):
        cli._parser().parse_args(wrong)


def test_the_examples_of_a_report_run(
    saved: Path, said: Said, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(saved)
    for arguments in examples(said("report", "--help")[1]):
        assert said(*arguments)[0] == 0


def test_the_version_is_that_of_the_package(said: Said) -> None:
    assert said("--version") == (0, f"{il.__version__}\n", "")


def test_help_is_there_before_anything_heavy() -> None:
    code = (
        "import sys\nfrom imaginelens.cli import main\ntry: main(['study', '--help'])\n"
        "except SystemExit: pass\nprint('torch' in sys.modules, 'nnsight' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.endswith("False False\n")


@pytest.mark.parametrize("arguments", [[], ["paint"], ["demo", "--pairs", "many"], ["report"]])
def test_wrong_usage_is_2(arguments: list[str], said: Said) -> None:
    status, out, errors = said(*arguments)
    assert (status, out) == (2, "")
    assert errors.startswith("usage: imaginelens")


# ---- demo --------------------------------------------------------------------------------------


@pytest.mark.usefixtures("planted_demo")
def test_the_demo_as_json_has_the_verdicts_and_numbers(said: Said, tmp_path: Path) -> None:
    status, out, errors = said("demo", "--json", "--out", str(tmp_path), "--pairs", "9")
    told = json.loads(out)
    assert (status, told["pairs"], told["report"]) == (0, 9, str(tmp_path / "report.html"))
    assert errors == "a library that talks\n"
    for model, study in zip(
        told["models"], (planted_report.content(), planted_report.ignored()), strict=True
    ):
        assert (model["model"], model["verdict"]) == (study.name, study.headline)
        assert study.mechanism is not None
        assert model["mechanism"] == study.mechanism.winner
        for number in study.numbers:
            assert model["numbers"][number.label]["value"] == number.measure.value
        for row in study.edits:
            assert model["accuracy"][row.edit]["n"] == row.accuracy.n
        winner = model["shares"][study.mechanism.winner]
        assert winner["low"] <= winner["value"] <= winner["high"]
    assert told["models"][0]["mechanism"] != told["models"][1]["mechanism"]


@pytest.mark.usefixtures("planted_demo")
def test_the_demo_tells_its_progress_in_lines_where_there_is_no_terminal(said: Said) -> None:
    status, out, errors = said("demo", "--out", "here")
    lines = errors.splitlines()
    assert status == 0
    assert out.endswith(f"{Path('here').resolve() / 'report.html'}\n")
    assert [line.split("%")[0] for line in lines] == [str(10 * k) for k in range(1, 11)]
    assert not re.search(r"[\r\x1b]", out + errors)


@pytest.mark.usefixtures("planted_demo")
def test_the_quiet_demo_says_where_the_report_is(said: Said) -> None:
    status, out, errors = said("demo", "--quiet")
    assert (status, errors) == (0, "")
    assert out.splitlines()[-1].endswith("report.html")


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.usefixtures("planted_demo")
@pytest.mark.parametrize(("options", "bars"), [([], True), (["--quiet"], False)])
def test_a_terminal_gets_one_bar_that_goes_away(
    options: list[str], bars: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    screen = Terminal()
    monkeypatch.setattr(sys, "stderr", screen)
    assert cli.main(["demo", *options]) == 0
    assert ("left" in screen.getvalue()) == bars
    assert "\n" not in screen.getvalue()


def test_a_demo_of_one_pair_is_wrong_usage(said: Said) -> None:
    status, out, errors = said("demo", "--pairs", "1", "--json")
    assert (status, out) == (2, "")
    assert "--pairs must be 2 or more" in errors


def test_ctrl_c_is_130(said: Said, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*args: Any, **options: Any) -> Path:
        raise KeyboardInterrupt

    monkeypatch.setattr(imaginelens.view.demo, "run_demo", interrupted)
    assert said("demo", "--quiet") == (130, "", "\nimaginelens: stopped\n")


# ---- study -------------------------------------------------------------------------------------


def test_a_study_as_json_quiet_and_in_words(study_folder: Path, said: Said) -> None:
    status, out, errors = said("study", "study.toml", "--json")
    told = json.loads(out)
    assert (status, errors) == (0, "")
    assert told["folder"] == str(study_folder / "out")
    assert Path(told["report"]).is_file()
    assert [each["name"] for each in told["maps"]] == ["fixed", "fed-back"]
    for each in told["maps"]:
        found = il.EffectMap.load(each["folder"])
        assert (each["cells"], each["examples"]) == (len(found), found.n)
        assert each["strongest"][0]["effect"] == pytest.approx(
            found.mean.ravel()[np.nanargmax(np.abs(found.mean))], rel=1e-5
        )
    again = ("study", "study.toml", "--resume")
    assert said(*again, "--quiet") == (0, f"report: {told['report']}\n", "")
    status, out, _ = said(*again)
    assert (status, out.splitlines()[-1]) == (0, f"report: {told['report']}")
    assert "strongest cells" in out


@pytest.mark.parametrize("quiet", ["--json", "--quiet"])
def test_a_map_that_changed_nothing_is_an_error(quiet: str, study_folder: Path, said: Said) -> None:
    lost = SMALL.replace('sites = "hook_latent"', 'sites = "hook_latent"\npositions = "latent[7]"')
    (study_folder / "study.toml").write_text(lost)
    status, out, errors = said("study", "study.toml", quiet)
    assert status == 1
    assert "imaginelens: fed-back: " in errors
    if quiet == "--json":
        first, second = json.loads(out)["maps"]
        assert "strongest" in first
        assert second["error"] in errors
        assert json.loads(out)["report"] is None
    else:
        assert not out


@pytest.mark.usefixtures("study_folder")
def test_what_a_study_would_cost_as_json(said: Said) -> None:
    status, out, _ = said("study", "study.toml", "--dry-run", "--json", "--limit", "2")
    told = json.loads(out)
    assert (status, told["pairs"]) == (0, 2)
    for name in ("forwards", "bytes", "seconds"):
        assert told[name] > 0
    assert told["forwards"] == sum(each["forwards"] for each in told["maps"])
    assert told["seconds"] == pytest.approx(
        told["opening"] + sum(each["seconds"] for each in told["maps"])
    )
    assert not Path("out").exists()


def test_a_study_without_a_file_is_wrong_usage(said: Said) -> None:
    status, out, errors = said("study", "--json")
    assert (status, out) == (2, "")
    assert "imaginelens study --example" in errors


def test_the_example_is_a_config(said: Said) -> None:
    from imaginelens.mediation.study_config import EXAMPLE

    assert said("study", "--example")[1] == EXAMPLE
    assert json.loads(said("study", "--example", "--json")[1]) == {"example": EXAMPLE}


# ---- report and doctor -------------------------------------------------------------------------


def test_a_report_as_json_is_its_path(saved: Path, said: Said) -> None:
    page = saved / "study" / "report.html"
    assert json.loads(said("report", str(saved / "study"), "--json")[1]) == {"report": str(page)}
    assert said("report", str(saved / "study"), "--quiet") == (0, f"{page}\n", "")


@pytest.mark.parametrize("option", ["--json", "--quiet"])
def test_an_error_is_a_sentence_on_stderr(option: str, said: Said) -> None:
    status, out, errors = said("report", "nowhere", option)
    assert (status, out) == (1, "")
    assert re.fullmatch(r"imaginelens: 'nowhere' is no folder; [^\n]+\n", errors)


def test_the_doctor_says_what_it_found(said: Said, monkeypatch: pytest.MonkeyPatch) -> None:
    found = [Finding("python", "3.11"), Finding("engine", "ok", True)]
    monkeypatch.setattr(imaginelens.view.doctor, "examine", lambda: found)
    assert said("doctor")[:2] == (0, f"{found[0]}\n{found[1]}\n\nall well\n")
    assert said("doctor", "--quiet") == (0, "", "")
    told = json.loads(said("doctor", "--json")[1])
    assert (told["problems"], told["findings"][1]["ok"]) == (0, True)
    found.append(Finding("torch", "not installed", False, "pip install torch"))
    status, out, _ = said("doctor", "--quiet")
    assert (status, out) == (1, f"{found[2]}\n\n1 problem found\n")
    status, out, _ = said("doctor", "--json")
    assert (status, json.loads(out)["findings"][2]["cure"]) == (1, "pip install torch")


def test_what_is_no_number_is_null() -> None:
    told = cli._plain({"a": float("nan"), 2: (float("inf"), 1.5), "c": Path("x"), "d": None})
    assert told == {"a": None, "2": [None, 1.5], "c": "x", "d": None}


# ---- pipes -------------------------------------------------------------------------------------


@contextlib.contextmanager
def unread(arguments: list[str], folder: Path) -> Any:
    """A command whose reader has gone before it says anything."""
    with subprocess.Popen(
        [*PYTHON, *arguments], cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as command:
        assert command.stdout is not None
        command.stdout.close()
        yield command


def test_a_reader_that_has_gone_is_no_error_and_the_work_is_done(saved: Path) -> None:
    with unread(["report", "study", "--out", "unread.html"], saved) as command:
        assert command.stderr.read() == ""
        assert command.wait() == 0
    assert (saved / "unread.html").is_file()


def test_help_that_nobody_reads_is_no_error(tmp_path: Path) -> None:
    with unread(["--help"], tmp_path) as command:
        assert command.stderr.read() == ""
        assert command.wait() == 0


def test_piped_output_is_plain(saved: Path) -> None:
    done = subprocess.run(
        [*PYTHON, "report", "study", "--json"], cwd=saved, capture_output=True, text=True
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert json.loads(done.stdout) == {"report": str(saved / "study" / "report.html")}


@pytest.mark.slow
def test_the_demo_itself_in_a_pipe(tmp_path: Path) -> None:
    command = [*PYTHON, "demo", "--pairs", "4", "--out", "out"]
    plain = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert plain.returncode == 0
    assert plain.stdout == f"{tmp_path / 'out' / 'report.html'}\n"
    assert re.fullmatch(r"(\d+% [^\r\x1b\n]+\n)+", plain.stderr)
    done = subprocess.run([*command, "--json"], cwd=tmp_path, capture_output=True, text=True)
    told = json.loads(done.stdout)
    assert done.stderr == ""
    assert [each["model"] for each in told["models"]] == list(imaginelens.view.demo.ORGANISMS)
    page = (tmp_path / "out" / "report.html").read_text("utf-8")
    assert all(each["verdict"] in page for each in told["models"])
