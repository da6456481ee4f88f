"""The report of saved maps: verdicts first, everything inert, nothing from outside."""

import re
from pathlib import Path

import numpy as np
import pytest

import imaginelens as il
from imaginelens.cli import main
from imaginelens.hooks.errors import CheckpointError
from imaginelens.mediation.cells import Cell
from imaginelens.view import map_report


def effects(n: int = 24, size: float = 3.0, edit: str = "Swap") -> il.EffectMap:
    cells = [Cell("resid_post", layer, "latent[0]", None, ()) for layer in (0, 1)]
    rng = np.random.default_rng(0)
    after = rng.normal(size=(2, n)) + np.array([[0.0], [size]])
    return il.EffectMap.from_arrays(
        cells=cells, before=np.zeros(n), after=after, other=np.full(n, 4.0), edit=edit,
        metric="logit_diff", unit="logits",
    )  # fmt: skip


def text(page: str) -> str:
    return re.sub(r"<[^>]*>", " ", page.split("</style>")[1])


def test_the_verdict_names_the_largest_cell_and_how_many_are_told_apart() -> None:
    told = map_report.verdict(effects())
    assert "at resid_post, layer 1, latent[0]" in told
    assert "1 of 2 cells are told from no effect" in told
    assert "all of the difference between the inputs: 4" in told


def test_a_map_of_noise_is_told_as_such() -> None:
    assert "0 of 2 cells are told from no effect" in map_report.verdict(effects(size=0.0))


def test_one_example_is_not_tested() -> None:
    assert "too few for a test" in map_report.verdict(effects(n=1))


def test_the_page_holds_what_was_asked_found_and_controlled(tmp_path: Path) -> None:
    effects().save(tmp_path / "one")
    effects(edit="Zero").save(tmp_path / "two")
    page = map_report.write(tmp_path).read_text()
    told = text(page)
    for words in ("one: The largest effect of Swap", "no sham was run", "95% interval", "Read it"):
        assert words in told
    assert told.index("two: The largest effect of Zero") < told.index("95% interval")
    assert page.count("<img ") == 2
    assert len(page) < 300_000


def test_nothing_comes_from_outside_and_nothing_runs(tmp_path: Path) -> None:
    effects(edit="<script>alert(1)</script>").save(tmp_path / "map")
    page = map_report.write(tmp_path / "map", tmp_path / "page.html").read_text()
    assert "<script" not in page
    assert "&lt;script&gt;alert(1)" in page
    assert not re.findall(r'(?:src|href)="(?!data:)', page)
    assert "default-src &#x27;none&#x27;" in page


def test_a_folder_without_maps_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="holds no map"):
        map_report.maps_in(tmp_path)
    with pytest.raises(CheckpointError, match="is no folder"):
        map_report.maps_in(tmp_path / "none")


def test_without_matplotlib_the_page_says_what_is_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    page = map_report.report({"map": effects()}, title="map")
    assert "imaginelens[notebook]" in page
    assert "<img " not in page


def test_the_command_writes_the_page(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    effects().save(tmp_path / "map")
    assert main(["report", str(tmp_path)]) == 0
    assert capsys.readouterr().out.strip().endswith("report.html")
    assert (tmp_path / "report.html").is_file()
    assert main(["report", str(tmp_path / "none")]) == 1
    assert "is no folder" in capsys.readouterr().err
