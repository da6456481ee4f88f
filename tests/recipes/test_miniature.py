"""The recipe in one command: it says what it means, goes on where it stopped, and leaves nobody
behind; and, slowly, it runs with real models of a few updates."""

import argparse
import doctest
import importlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from examples.capimagine import causal, hunts, report, rewrite
from examples.capimagine.chains import save
from examples.capimagine.data import read
from examples.capimagine.effects import Compared, Outcome, Studied
from examples.capimagine.report import checks, render
from imaginelens.organisms.hunt import sample

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "examples/capimagine/run_miniature.sh"

# Stands in for the interpreter: notes what it is asked, and makes the folders that are copied.
STUB = f"""#!{sys.executable} -SE
import json, os, pathlib, sys, time
args = sys.argv[1:]
if args[0] == "-c":
    sys.exit(0)
here = pathlib.Path(__file__).parent
module = args[1].removeprefix("examples.")
with open(here / "calls.jsonl", "a") as lines:
    lines.write(json.dumps([module, *args[2:]]) + "\\n")
if module == "capimagine.server":
    (here / "server.pid").write_text(str(os.getpid()))
    print("listening on http://127.0.0.1:9/v1", flush=True)
    time.sleep(600)
if (here / "fails").exists() and module == (here / "fails").read_text():
    sys.exit("it was made to fail")
if (here / "hangs").exists() and module == (here / "hangs").read_text():
    (here / "hanging.pid").write_text(str(os.getpid()))
    time.sleep(600)
if module.endswith(".train"):
    out = pathlib.Path(args[args.index("--out") + 1])
    for name in ("", "free", "reconstruct", "recall", "swap"):
        (out / name / "model").mkdir(parents=True, exist_ok=True)
"""

needs_bash = pytest.mark.skipif(shutil.which("bash") is None, reason="there is no bash")
pytestmark = needs_bash


@pytest.fixture
def stub(tmp_path: Path) -> Path:
    folder = tmp_path / "stub"
    folder.mkdir()
    (folder / "python").write_text(STUB)
    (folder / "python").chmod(0o755)
    return folder


def _environment(stub: Path, **more: str) -> dict[str, str]:
    return {**os.environ, "PYTHON": str(stub / "python"), "JOBS": "1", **more}


def _call(stub: Path, out: Path, **more: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        ["bash", str(SCRIPT), str(out)],
        env=_environment(stub, **more),
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def _calls(stub: Path) -> list[list[str]]:
    path = stub / "calls.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def _lives(pid: Path) -> bool:
    try:
        os.kill(int(pid.read_text()), 0)
    except ProcessLookupError:
        return False
    return True


def _ends(pid: Path) -> bool:
    """Whether a process ends soon; the one that would bury it may be another's child."""
    deadline = time.monotonic() + 20
    while _lives(pid) and time.monotonic() < deadline:
        status = Path(f"/proc/{pid.read_text()}/status")
        if status.exists() and "State:\tZ" in status.read_text():
            return True
        time.sleep(0.05)
    return not _lives(pid)


def test_examples_in_docstrings() -> None:
    assert doctest.testmod(report).failed == 0


def test_bash_reads_it() -> None:
    subprocess.run(["bash", "-n", str(SCRIPT)], check=True)


class _ParsedWell(Exception):
    pass


def test_every_command_is_one_that_its_module_takes(
    stub: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done = _call(stub, tmp_path / "out")
    assert done.returncode == 0, done.stderr
    calls = _calls(stub)
    asked = [call[0] for call in calls]
    assert asked[:3] == ["capimagine.hunts", "capimagine.data", "capimagine.server"]
    assert asked[-1] == "capimagine.report"
    assert (asked.count("capimagine.train"), asked.count("latent_baselines.train")) == (2, 5)
    assert asked.count("capimagine.evaluate") == 7
    assert sum("--direct" in call for call in calls) == 1
    taken = argparse.ArgumentParser.parse_args

    def parse(self: argparse.ArgumentParser, *args: Any, **kwargs: Any) -> Any:
        taken(self, *args, **kwargs)
        raise _ParsedWell

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse)
    for module, *arguments in calls:
        monkeypatch.setattr("sys.argv", [module, *arguments])
        with pytest.raises(_ParsedWell):
            importlib.import_module(f"examples.{module}").main()
    monkeypatch.setattr("sys.argv", ["capimagine.report", "a", "b"])
    with pytest.raises(SystemExit):  # so it is seen when a command is wrong
        report.main()


def test_what_is_done_is_not_done_again(stub: Path, tmp_path: Path) -> None:
    more = {"BASELINES": "mirage", "UPDATES": "4"}
    (stub / "fails").write_text("latent_baselines.train")
    out = tmp_path / "out"
    failed = _call(stub, out, **more)
    assert failed.returncode != 0
    assert "it was made to fail" in failed.stderr
    assert "train-mirage failed; all it said is in" in failed.stderr
    before = _calls(stub)
    (stub / "fails").unlink()
    assert _call(stub, out, **more).returncode == 0
    later = [call[0] for call in _calls(stub)[len(before) :]]
    assert later[0] == "latent_baselines.train"
    assert later.count("capimagine.train") == later.count("capimagine.rewrite") == 0
    again = len(_calls(stub))
    assert _call(stub, out, **more).returncode == 0
    assert [call[0] for call in _calls(stub)[again:]] == ["capimagine.report"]
    assert json.loads((out / "done/raw").read_text())["wall"] >= 0
    other = _call(stub, out, **{**more, "UPDATES": "5"})
    assert other.returncode == 1
    assert "was begun with other settings" in other.stderr


def test_wrong_names_are_refused(stub: Path, tmp_path: Path) -> None:
    done = _call(stub, tmp_path / "out", BASELINES="mirage mirror")
    assert "names mirror, which is none of" in done.stderr
    done = _call(stub, tmp_path / "out", PYTHON=str(stub / "none"))
    assert "make it with ./run install" in done.stderr
    assert not (tmp_path / "out/done").exists()


@pytest.mark.parametrize("how", ["fails", "hangs"])
def test_no_server_is_left_behind(stub: Path, tmp_path: Path, how: str) -> None:
    (stub / how).write_text("capimagine.rewrite")
    if how == "fails":
        assert _call(stub, tmp_path / "out").returncode != 0
    else:
        command = ["bash", str(SCRIPT), str(tmp_path / "out")]
        process = subprocess.Popen(
            command, env=_environment(stub), stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )
        deadline = time.monotonic() + 60
        while not (stub / "hanging.pid").exists() and time.monotonic() < deadline:
            time.sleep(0.02)
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=60)
        assert process.returncode == 143
        assert _ends(stub / "hanging.pid")
    assert _ends(stub / "server.pid")


# ---- the page ------------------------------------------------------------------------------------


def _share(value: float, n: int = 100) -> dict[str, float]:
    return {"value": value, "low": value, "high": value, "n": n}


def _record(arm: str, changed: float, **followed: float) -> dict[str, Any]:
    told = {name: _share(value) for name, value in followed.items()}
    return {
        "model": "text", "arm": arm, "context": "free", "n": 100, "changed": _share(changed),
        "followed": told,
    }  # fmt: skip


def _found(**other: Any) -> dict[str, Any]:
    direct = {"accuracy": _share(0.3), "updates": 300}
    return {
        "data": {"spoiled": 4, "spoiled and refused": 4, "sound and refused": 0},
        "models": {"text": {"accuracy": _share(0.97)}, "direct": direct},
        "sham": {"free": {"differ": 0, "of": 200}, "fixed": {"differ": 3, "of": 200}},
        "records": [
            _record("paraphrase", 0.05),
            _record("wrong card", 1, followed=0.9, own=0.1),
            _record("first step", 1, followed=1, own=0),
        ],
        **other,
    }


def test_what_was_asked_for_is_met_or_not() -> None:
    assert [check.met for check in checks(_found())] == [True] * 7
    worse = [
        {"data": {"spoiled": 4, "spoiled and refused": 3, "sound and refused": 0}},
        {"data": {"spoiled": 4, "spoiled and refused": 4, "sound and refused": 1}},
        {"models": {**_found()["models"], "text": {"accuracy": _share(0.94)}}},
        {"models": {**_found()["models"], "direct": {"accuracy": _share(0.6), "updates": 3}}},
        {"sham": {"free": {"differ": 1, "of": 200}}},
        {"records": [_record("paraphrase", 0.06), *_found()["records"][1:]]},
        {"records": [*_found()["records"][:2], _record("first step", 1, followed=0.89, own=0)]},
    ]
    failing = [0, 0, 1, 2, 3, 4, 6]
    for other, number in zip(worse, failing, strict=True):
        met = [check.met for check in checks(_found(**other))]
        assert met == [at != number for at in range(7)]


def _studied(name: str) -> Studied:
    """Eight examples of a model that follows what is put into its imagination."""
    truths, aims = tuple("ABCDABCD"), tuple("BCDABCDA")
    touched, readings = (True,) * 8, {"followed": aims, "own": truths}
    outcomes = [Outcome("sham", "free", truths, touched, {})]
    outcomes += [Outcome("paraphrase", "free", truths, touched, {})]
    outcomes += [Outcome("other instance", "free", tuple("CDABCDAB"), touched, {})]
    outcomes += [Outcome(arm, "free", aims, touched, readings) for arm in report.FOLLOWED]
    shape = Outcome("wrong shape", "free", truths, touched, {"content": aims, "own": truths})
    return Studied(name, "captions", truths, truths, (*outcomes, shape), 0.25, 20.0)


@pytest.fixture
def out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """What the script leaves, with real chains, and with numbers that nobody measured."""
    folder = tmp_path / "out"
    hunts.write(sample(16, hops=2, seed=0), folder / "raw", spoil=0.25)
    save(read(folder / "raw").chains, folder / "read/chains.jsonl")
    told = ["rewrite", str(folder / "raw"), "--out", str(folder / "data"), "--system", ""]
    monkeypatch.setattr("sys.argv", [*told, "--backend", "template"])
    rewrite.main()
    for name in ("text", "direct", "mirage"):
        (folder / "models" / name).mkdir(parents=True)
        value = {"accuracy": _share(0.3 if name == "direct" else 0.97), "emission": {"value": 1}}
        row = {"do": "none", "split": "all", "tokens": 20.0, **value}
        rows = [row, {**row, "do": "mean"}] if name == "mirage" else [row]
        _write(folder / f"answers/{name}.scores.json", {"rows": rows})
        _write(folder / f"done/train-{name}", {"wall": 2.0, "user": 1.0, "system": 0.5})
        if name != "mirage":
            _write(folder / f"runs/{name}/run.json", {"updates": 300})
    for stage in ("align", "free"):
        _write(folder / f"runs/mirage/{stage}/done.json", {"updates": 150})
    for name in ("text", "mirage"):
        one = Compared((_studied(name),), ("free",), ("<script>alert(1)</script>",))
        causal.write(one, folder / "causal" / name)
    (folder / "settings").write_text("hunts 16\n")
    return folder


def _write(path: Path, record: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(record))


def test_the_page_tells_all_and_needs_nothing(
    out: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["report", str(out)])
    report.main()
    said = capsys.readouterr().out
    assert (said.count("  met "), said.count("NOT met")) == (7, 0)
    found = json.loads((out / "summary.json").read_text())
    assert found["data"]["spoiled"] == found["data"]["spoiled and refused"] == 4
    assert list(found["models"]) == ["text", "direct", "mirage"]
    assert [m["updates"] for m in found["models"].values()] == [300, 300, 300]
    page = (out / "report.html").read_text()
    assert "<script" not in page  # a note says it, and is escaped
    assert "&lt;script&gt;" in page
    assert "http" not in page.replace("http-equiv", "")
    assert page.count("data:image/png;base64") == 3 + 1
    assert "(wrong shape), the answer is the edited shape in 0.000" in page
    (out / "answers/mirage.scores.json").unlink()
    with pytest.raises(SystemExit, match=r"mirage.scores.json is missing; run_miniature.sh makes"):
        report.main()


# ---- with real models ----------------------------------------------------------------------------


@pytest.mark.slow
def test_the_whole_path_with_few_updates(tmp_path: Path) -> None:
    sizes = {"HUNTS": "160", "UPDATES": "40", "EVAL": "64", "N": "32"}
    given = {**os.environ, **sizes, "PYTHON": sys.executable, "BASELINES": "mirage interchange"}
    command = ["bash", str(SCRIPT), str(tmp_path / "out")]
    done = subprocess.run(
        command, env=given, capture_output=True, text=True, timeout=1800, check=False
    )
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "out/summary.json").read_text())
    met = {check["what"]: check["met"] for check in found["checks"]}
    assert met["the filter refuses the chains that were spoiled, and no other"]
    assert met["imagination put back as it was, in words and in latents"]
    assert list(found["models"]) == ["text", "direct", "interchange", "mirage"]
    assert {record["model"] for record in found["records"]} == {"text", "interchange", "mirage"}
    assert found["models"]["mirage"]["updates"] == 80
    page = (tmp_path / "out/report.html").read_text()
    assert "http" not in page.replace("http-equiv", "")
    assert "<script" not in page
    assert page == render(found, tmp_path / "out")
    again = subprocess.run(command, env=given, capture_output=True, text=True, check=True)
    assert again.stdout.count("done before") == 3 + 4 + 3 + 4
    assert json.loads((tmp_path / "out/summary.json").read_text()) == found
