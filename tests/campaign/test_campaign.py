"""The robustness campaign in small, and that each of its guards can fail."""

import json
import os
import re
import signal
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from campaign import faults, fuzz, properties, readers, run, traps

import imaginelens as il
from imaginelens.hooks.errors import InputError, brief

NEVER = ("picture", "organism's card", "benchmark, table", "benchmark, JSON lines")  # refuse all


@pytest.fixture(autouse=True)
def _type_checks_may_compile(monkeypatch: pytest.MonkeyPatch) -> None:
    """The tests' type checks compile functions as they are met; the campaign runs without them."""
    heard = fuzz.Watch.hear

    def hear(self: fuzz.Watch, event: str, args: tuple[object, ...]) -> None:
        if event not in (*fuzz.FORBIDDEN, "open"):  # looking at frames causes events, too
            return
        frame: Any = sys._getframe(1)
        while frame is not None:
            if {"beartype", "jaxtyping"} & set(Path(frame.f_code.co_filename).parts):
                return
            frame = frame.f_back
        heard(self, event, args)

    if sys.modules.get("beartype"):
        monkeypatch.setattr(fuzz.Watch, "hear", hear)


@pytest.fixture
def one(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A target whose reader is given by the test."""

    def made(read: Any) -> fuzz.Target:
        own = replace(readers.READERS[0], name="own", read=lambda folder: None)
        monkeypatch.setattr(readers, "READERS", (own,))
        target = fuzz.Target("own")
        target.reader = replace(own, read=read)
        return target

    return made


@pytest.mark.parametrize("reader", readers.READERS, ids=lambda reader: reader.name)
def test_wrong_files_are_read_or_refused_in_a_sentence(reader: readers.Reader) -> None:
    target, rng = fuzz.Target(reader.name), np.random.default_rng(0)
    for _ in range(60):
        content = np.frombuffer(target.valid, np.uint8).copy()
        for at in rng.integers(0, len(content), rng.integers(1, 4)):
            content[at] = rng.integers(256)
        start, end = sorted(rng.integers(0, len(content), 2))
        whole = content.tobytes()
        target(whole if rng.random() < 0.5 else whole[:start] + whole[end:])
    found = target.figures
    assert (found.crashes, found.acts, found.inputs) == ({}, [], 60)
    assert found.refused + found.accepted == 60
    assert found.refused or reader.name in NEVER or reader.name.startswith("recipe")


def test_the_names_of_readers_and_of_their_figures_are_their_own() -> None:
    paths = {fuzz.path_of(Path(), reader.name) for reader in readers.READERS}
    assert len(paths) == len(readers.READERS)


TRAPS = [
    (reader, made)
    for reader in readers.READERS
    for suffix, made in (
        (".json", traps.of_json),
        (".jsonl", traps.of_json),
        (".safetensors", traps.of_arrays),
    )
    if Path(reader.file).suffix == suffix
]


@pytest.mark.parametrize(("reader", "made"), TRAPS, ids=lambda x: getattr(x, "name", ""))
def test_any_value_may_be_another(reader: readers.Reader, made: Any) -> None:
    target = fuzz.Target(reader.name)
    for content in made(target.valid):
        target(content)
    found = target.figures
    assert (found.crashes, found.acts) == ({}, [])
    assert found.inputs > 15


@pytest.mark.parametrize(
    "text",
    ["[" * 100_000, '{"text": ' + "9" * 5000 + "}", '"\\ud800"', "\x00", "\u202e" * 5, "NaN"],
    ids=["deep", "long number", "surrogate", "null", "reversed", "NaN"],
)
@pytest.mark.parametrize("reader", readers.READERS, ids=lambda reader: reader.name)
def test_known_traps(reader: readers.Reader, text: str) -> None:
    target = fuzz.Target(reader.name)
    target(text.encode("utf-8", "surrogatepass"))
    assert (target.figures.crashes, target.figures.acts) == ({}, [])


def test_the_watch_sees_what_must_not_happen(one: Any, tmp_path: Path) -> None:
    def crash(folder: Path) -> None:
        raise KeyError("x")

    def rude(folder: Path) -> None:
        raise InputError("a\x1b[31m")

    def long(folder: Path) -> None:
        raise InputError("x" * 5000)

    for read, kind in ((crash, "KeyError"), (rude, "control characters"), (long, "long sentence")):
        target = one(read)
        target(b"")
        assert [place.split(":")[0] for place in target.figures.crashes] == [kind]

    def runs(folder: Path) -> None:
        exec("1")

    def writes(folder: Path) -> None:
        (tmp_path / "elsewhere").write_text("x")

    for read, kind in ((runs, "exec"), (writes, "open")):
        target = one(read)
        target(b"")
        assert [act.split(" ")[0] for act in target.figures.acts] == [kind]


def test_words_of_a_file_are_shown_printable_and_short() -> None:
    assert brief("a\x1b\u202eb\n") == "a\\x1b\\u202eb\\n"
    assert len(brief("x" * 10_000)) < 250
    assert brief("plain words") == "plain words"


def test_properties_hold_and_can_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    found = properties.campaign(25)
    assert found["cases"] == 25
    case = properties.Case("llava", (0, 1), (("blocks.1.hook_mlp_out", "add", 0.5, (1,)),), None)
    assert properties.check(case) == "1 edits"
    monkeypatch.setattr(properties._Plus, "apply", lambda self, act, ctx: act + 2 * self.by)
    with pytest.raises(AssertionError, match="differs by"):
        properties.check(case)


def test_an_exception_at_any_site_leaves_nothing_behind() -> None:
    found = faults.raising(("latent-content",))
    assert found.injected == 2 * len(list(il.load("latent-content").registry))
    assert (found.told, found.hooks_left, found.wrong) == (found.injected, 0, [])


@pytest.mark.slow
def test_faults_lose_nothing() -> None:
    for found in (
        faults.torn(2),
        faults.torn_checkpoints(1),
        faults.full_disk((0, 100, 4000)),
        faults.forbidden(),
        faults.killed(4),
        faults.appended(6),
        faults.met(1),
        faults.out_of_memory(3),
    ):
        assert (found.hooks_left, found.lost, found.wrong) == (0, 0, [])
        assert found.told + found.unharmed == found.injected > 0


def test_a_result_that_is_half_written_or_lost_is_noticed(tmp_path: Path) -> None:
    figures = faults.Figures("own")
    write = lambda folder: (faults._made(folder) / "a").write_text("whole")  # noqa: E731
    (tmp_path / "before").mkdir()
    (tmp_path / "now").mkdir()
    (tmp_path / "now/a").write_text("ha")
    read = lambda folder: (folder / "a").read_text()  # noqa: E731
    faults._judge("own", "x", "told something", tmp_path, write, read, figures)
    assert figures.lost == 1
    assert len(figures.wrong) == 2


def test_a_writer_that_is_killed_before_it_is_done_is_noticed(tmp_path: Path) -> None:
    def writes(folder: Path) -> None:
        faults._made(folder)
        for name in "ab":
            (folder / name).write_text("whole")

    writes(tmp_path / "before")
    whole = faults._files(tmp_path / "before")
    calls = faults._calls(lambda: writes(tmp_path / "counted"))
    left = tmp_path / "now"
    second = np.flatnonzero(calls)[len(np.flatnonzero(calls)) // 2]  # between the two files
    faults._dies(lambda: writes(left), int(second))
    assert faults._files(left) != whole
    figures = faults.Figures("own")
    faults._judge_killed("own", left, whole, writes, lambda folder: list(folder.iterdir()), figures)
    assert figures.wrong == ["own: half a result is read as a whole one"]


def test_a_result_that_two_writers_mixed_is_noticed(tmp_path: Path) -> None:
    first, second = {"a": b"1", "b": b"1"}, {"a": b"2", "b": b"2"}
    for mixed, lost in (({"a": b"1", "b": b"1"}, 0), ({"a": b"1", "b": b"2"}, 1)):
        for name, content in mixed.items():
            (tmp_path / name).write_bytes(content)
        figures = faults.Figures("own")
        faults._judge_met("own", ("", ""), tmp_path, (first, second), lambda folder: None, figures)
        assert figures.lost == lost
    figures = faults.Figures("own")
    faults._judge_met("own", ("told x", "told x"), tmp_path, (first, second), str, figures)
    assert figures.wrong


def test_lines_that_were_lost_are_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    def forgets(home: Path, done: Any) -> None:
        (home / "x.jsonl").write_text("")
        done()

    own = {"own": (forgets, lambda home: 0)}
    monkeypatch.setattr(faults, "_appenders", lambda: own)
    assert faults.appended(1).lost == 1


def test_figures_go_on_unless_the_code_changed_or_something_was_found(tmp_path: Path) -> None:
    out = tmp_path / "fuzz-x.json"
    before = fuzz.Figures("x", code="a", rounds=2, inputs=7)
    assert fuzz.continued(fuzz.Figures("x", code="a"), out).inputs == 0
    fuzz.note(before, out)
    assert fuzz.continued(fuzz.Figures("x", code="a"), out) == before
    anew = fuzz.continued(fuzz.Figures("x", code="b"), out)
    assert (anew.inputs, anew.rounds, anew.code) == (0, 2, "b")
    fuzz.note(replace(before, crashes={"here": "y"}), out)
    assert fuzz.continued(fuzz.Figures("x", code="a"), out).inputs == 0
    with pytest.raises(SystemExit, match="figures of 'x'"):
        fuzz.continued(fuzz.Figures("z", code="a"), out)


def test_a_reader_whose_process_broke_off_has_crashed(tmp_path: Path) -> None:
    def breaks() -> None:
        sys.stderr = sys.__stderr__  # not pytest's
        raise ZeroDivisionError

    for act, crashes in ((lambda: None, 0), (breaks, 1)):
        out = tmp_path / "fuzz-x.json"
        fuzz.note(fuzz.Figures("x", inputs=7), out)
        child = fuzz.begun(act, out.with_suffix(".log"))
        fuzz.ended(os.waitpid(child, 0)[1], "x", out)
        assert len(json.loads(out.read_text())["crashes"]) == crashes
    assert "ZeroDivisionError" in out.with_suffix(".log").read_text()
    fuzz.note(fuzz.Figures("x", inputs=7), out)
    child = fuzz.begun(lambda: time.sleep(60), out.with_suffix(".log"))
    os.kill(child, signal.SIGTERM)
    fuzz.ended(os.waitpid(child, 0)[1], "x", out)  # it was stopped, and can go on
    assert json.loads(out.read_text())["crashes"] == {}


def test_the_table_says_whether_all_is_well_and_done(tmp_path: Path) -> None:
    figures = fuzz.Figures("x", inputs=5, bytes=10, accepted=1, refused=4)
    fuzz.note(figures, tmp_path / "fuzz-x.json")
    kinds = {"cases": 9, "kinds": {"sham": 9}}
    (tmp_path / "properties.json").write_text(json.dumps(kinds))
    fault = asdict(faults.Figures("torn files", injected=3, told=3))
    (tmp_path / "faults.json").write_text(json.dumps([fault]))
    told, well = run.table(tmp_path, run.Goal(9, 5, 3), 1)
    assert well
    assert "| fuzz: x | 5 (0 MB) | 4 refused, 1 read | 0 |" in told
    assert "0 hooks left, 0 results lost, 0 crashes without a sentence, 0 things executed" in told
    for goal, count in (((10, 5, 3), 1), ((9, 6, 3), 1), ((9, 5, 4), 1), ((9, 5, 3), 2)):
        told, well = run.table(tmp_path, run.Goal(*goal), count)
        assert not well
    for changed in (replace(figures, crashes={"a": "b"}), replace(figures, acts=["exec"])):
        fuzz.note(changed, tmp_path / "fuzz-x.json")
        assert not run.table(tmp_path, run.Goal(9, 5, 3), 1)[1]


def test_what_is_kept_is_gone_on_from_elsewhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, page = tmp_path / "out", tmp_path / "campaign.md"
    out.mkdir()
    fuzz.note(fuzz.Figures("x", code="a", inputs=5, rounds=1), out / "fuzz-x.json")
    (out / "properties.json").write_text(json.dumps({"cases": 9, "kinds": {}}))
    (out / "faults.json").write_text("[]")
    monkeypatch.setattr(sys, "argv", ["run.py", str(out), "--tell", "--record", str(page)])
    assert run.main() == 1  # for it is not done
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    fuzz.note(fuzz.Figures("x", inputs=7), elsewhere / "fuzz-x.json")
    run.go_on(page, elsewhere)
    assert json.loads((elsewhere / "fuzz-x.json").read_text())["inputs"] == 7  # has its own
    assert json.loads((elsewhere / "properties.json").read_text())["cases"] == 9
    assert not (elsewhere / "faults.json").exists()
    new = tmp_path / "new"
    new.mkdir()
    run.go_on(page, new)
    figures = fuzz.Figures("x", code="a")
    assert fuzz.continued(figures, new / "fuzz-x.json").inputs == 5
    assert fuzz.continued(replace(figures, code="b"), new / "fuzz-x.json").inputs == 0


RECORD = Path(__file__).parents[2] / "benchmarks" / "results" / "campaign.md"


def numbers(cell: str) -> list[int]:
    return [int(number.replace(",", "")) for number in re.findall(r"[\d,]*\d", cell)]


def test_the_figures_that_are_kept_are_of_these_readers_and_without_fault() -> None:
    """A reader that has not had its million is kept with `n of 1,000,000`, and no other number."""
    rows = [line.split(" | ") for line in RECORD.read_text().splitlines() if line.startswith("| ")]
    rows = [[cell.strip(" |") for cell in row] for row in rows[1:]]
    assert {row[3] for row in rows} == {"0"}
    fuzzed = {row[0].removeprefix("fuzz: "): numbers(row[1]) for row in rows if "fuzz:" in row[0]}
    assert set(fuzzed) <= {reader.name for reader in readers.READERS}
    assert all(tried[0] >= 1_000_000 or tried[1] == 1_000_000 for tried in fuzzed.values())
    whole = sum(tried[0] >= 1_000_000 for tried in fuzzed.values())
    assert f"{whole} of {len(readers.READERS)} readers have had 1,000,000" in RECORD.read_text()
    injected = [numbers(row[1])[0] for row in rows if row[0].startswith("faults:")]
    tried = [numbers(row[1])[0] for row in rows if row[0] == "properties"]
    assert f"{sum(tried):,} property cases{run._of(sum(tried), 10_000)};" in RECORD.read_text()
    assert f"{sum(injected):,} faults injected{run._of(sum(injected), 1000)};" in RECORD.read_text()
