"""The robustness campaign in small, and that each of its guards can fail."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from campaign import faults, fuzz, properties, readers, run

import imaginelens as il
from imaginelens.hooks.errors import InputError, brief

LIGHT = [reader for reader in readers.READERS if "map, " not in reader.name]


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


@pytest.mark.parametrize("reader", LIGHT, ids=lambda reader: reader.name)
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
    assert (
        found.refused > 0
        or reader.name in ("recipe: ledger", "recipe: zip", "picture")
        or (
            reader.name.startswith("recipe")  # records are refused one by one
        )
    )


@pytest.mark.parametrize(
    "text",
    ["[" * 100_000, '{"text": ' + "9" * 5000 + "}", '"\\ud800"', "\x00", "\u202e" * 5, "NaN"],
    ids=["deep", "long number", "surrogate", "null", "reversed", "NaN"],
)
@pytest.mark.parametrize("reader", LIGHT, ids=lambda reader: reader.name)
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
        faults.full_disk((0, 100, 4000)),
        faults.forbidden(),
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


def test_the_table_says_whether_all_is_well(tmp_path: Path) -> None:
    figures = {"reader": "x", "inputs": 5, "bytes": 10, "accepted": 1, "refused": 4}
    (tmp_path / "fuzz-x.json").write_text(json.dumps({**figures, "crashes": {}, "acts": []}))
    told, well = run.table(tmp_path)
    assert well
    assert "| fuzz: x | 5 (0 MB) | 4 refused, 1 read | 0 |" in told
    (tmp_path / "fuzz-x.json").write_text(
        json.dumps({**figures, "crashes": {"a": "b"}, "acts": []})
    )
    assert not run.table(tmp_path)[1]
