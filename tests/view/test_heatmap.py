"""The heat-map shows what was measured, where it was measured, in one colour per value."""

import math
from dataclasses import replace

import numpy as np
import pytest
from view.planted_report import COLUMNS, ROWS, content, ignored, planted_report
from view.reading import Node, read

from imaginelens.view import Cell, Column, HeatMap, Row, heatmap_svg, render
from imaginelens.view.colour import UNMEASURED, ColourScale, ink_on


def cells_of(node: Node) -> list[Node]:
    return node.all("g", "cell")


def fill(cell: Node) -> str:
    return cell.one("rect")["fill"]


def title(cell: Node) -> dict[str, str]:
    """The hover lines as a dict."""
    lines = [line.partition(": ") for line in cell.one("title").text.split("\n")]
    return {key: value for key, _, value in lines}


def number(text: str) -> float:
    return float(text.replace("\N{MINUS SIGN}", "-"))


@pytest.mark.parametrize("study", [content(), ignored()], ids=lambda study: study.name)
def test_every_number_in_a_cell_is_the_number_that_was_measured(study):
    drawn = cells_of(read(heatmap_svg(study.heatmap, limit=1.0)))
    places = [(r, c) for r in range(len(ROWS)) for c in range(len(COLUMNS))]
    assert [(int(cell["data-row"]), int(cell["data-column"])) for cell in drawn] == places
    for cell, (row, column) in zip(drawn, places, strict=True):
        data, lines = study.heatmap.cells[row][column], title(cell)
        assert lines["site"] == ROWS[row].site
        assert lines["step"] == str(COLUMNS[column].step)
        assert lines["token"] == COLUMNS[column].token
        if data.effect is None:
            continue
        low, high = data.interval
        assert float(cell["data-value"]) == data.effect
        assert (float(cell["data-low"]), float(cell["data-high"])) == (low, high)
        assert int(cell["data-n"]) == int(lines["n"]) == data.n
        assert number(lines["effect"].split(" (")[0]) == pytest.approx(data.effect, rel=1e-3)
        assert [number(x) for x in lines["95% interval"].split(" to ")] == pytest.approx(
            [low, high], rel=1e-3
        )
        shown, answers = (text.text for text in cell.all("text"))
        assert number(shown) == pytest.approx(data.effect, abs=0.0051)
        assert answers == f"{data.before} → {data.after}"
        assert (lines["answer before"], lines["answer after"]) == (data.before, data.after)


def test_layer_is_named_and_the_fed_back_embedding_has_none():
    drawn = cells_of(read(heatmap_svg(content().heatmap, limit=1.0)))
    layers = [title(cell)["layer"] for cell in drawn[:: len(COLUMNS)]]
    assert layers == ["input, before layer 0", "0", "1", "2"]


@pytest.mark.parametrize("missing", [None, math.nan, np.float64("nan")])
def test_unmeasured_is_grey_and_says_so(missing):
    heatmap = HeatMap(ROWS[:1], COLUMNS[:2], ((Cell(missing), Cell(0.0, n=3)),))
    grey, zero = cells_of(read(heatmap_svg(heatmap, limit=1.0)))
    assert fill(grey) == UNMEASURED != fill(zero)
    assert "not measured" in grey.one("title").text
    assert grey.one("text").text == grey["data-value"] == "not measured"
    assert zero.one("text").text == "0"
    assert "1 cells not measured" in read(heatmap_svg(heatmap, limit=1.0)).one("svg")["aria-label"]


def test_unmeasured_cells_without_room_for_words_still_say_so_on_hover():
    columns = tuple(Column(i, f"z{i}") for i in range(20))
    svg = heatmap_svg(HeatMap(ROWS[:1], columns, ((Cell(None),) * 20,)), limit=1.0)
    drawn = cells_of(read(svg))
    assert all("not measured" in cell.one("title").text for cell in drawn)
    assert {fill(cell) for cell in drawn} == {UNMEASURED}


def test_one_value_has_one_colour_in_all_studies():
    page = read(render(planted_report()))
    colours: dict[str, set[str]] = {}
    for cell in cells_of(page):
        colours.setdefault(cell["data-value"], set()).add(fill(cell))
    assert len(page.all("svg", "heatmap")) == 2
    assert all(len(found) == 1 for found in colours.values())
    assert {legend["data-limit"] for legend in page.all("div", "legend")} == {"0.98"}


def test_scale_of_one_study_depends_on_the_other():
    def strongest(report):
        cells = cells_of(read(render(report)))
        return fill(next(cell for cell in cells if cell["data-value"] == "0.012"))

    alone = strongest(planted_report(studies=(ignored(),)))
    beside = strongest(planted_report())
    assert alone == ColourScale(1.0).colour(1.0)
    assert beside != alone


def test_zero_is_the_middle_and_sign_decides_the_hue():
    scale = ColourScale(2.0)
    red, _, blue = scale.rgb(np.array(-1.0))
    assert red > blue
    red, _, blue = scale.rgb(np.array(1.0))
    assert blue > red
    assert scale.colour(0.0) == "#f7f7f7"
    assert scale.colour(5.0) == scale.colour(2.0)


@pytest.mark.parametrize("value", [*np.linspace(-1, 1, 41).tolist(), None])
def test_text_on_a_cell_has_enough_contrast(value):
    scale = ColourScale(1.0)

    def luminance(colour):
        channels = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    dark, light = sorted([luminance(scale.colour(value)), luminance(scale.ink(value))])
    assert (light + 0.05) / (dark + 0.05) >= 4.5
    assert ink_on("#ffffff") != ink_on("#000000")


def test_repeated_labels_do_not_merge_cells():
    columns = tuple(Column(i, "<lvr>", "<lvr>") for i in range(8))
    rows = tuple(Row("blocks.0.hook_resid_post", "layer", layer=0) for _ in range(3))
    cells = tuple(tuple(Cell(r + c / 10, n=1) for c in range(8)) for r in range(3))
    drawn = cells_of(read(heatmap_svg(HeatMap(rows, columns, cells), limit=3.0)))
    corners = {(cell.one("rect")["x"], cell.one("rect")["y"]) for cell in drawn}
    assert len(drawn) == len(corners) == 24
    assert [float(cell["data-value"]) for cell in drawn] == [c.effect for row in cells for c in row]


def test_outline_marks_intervals_without_zero_only():
    intervals = [(0.1, 0.5), (-0.1, 0.5), (-0.5, -0.1), None]
    cells = tuple(Cell(0.2, n=4, interval=interval) for interval in intervals)
    columns = tuple(Column(i, f"z{i}") for i in range(4))
    drawn = cells_of(read(heatmap_svg(HeatMap(ROWS[:1], columns, (cells,)), limit=1.0)))
    assert [bool(cell.all("rect", "outline")) for cell in drawn] == [True, False, True, False]


def test_a_long_answer_stays_inside_its_cell_and_is_whole_on_hover():
    answer = "a very long answer that no cell can hold"
    cells = ((Cell(0.5, n=1, before=answer, after="ring"),) * 3,)
    cell = cells_of(read(heatmap_svg(HeatMap(ROWS[:1], COLUMNS, cells), limit=1.0)))[0]
    shown = cell.all("text")[1].text
    assert "…" in shown
    assert len(shown) < len(answer)
    assert title(cell)["answer before"] == answer


def test_bad_shapes_and_values_are_refused():
    with pytest.raises(ValueError, match=r"1 rows and 3 columns came with rows of \[2\]"):
        HeatMap(ROWS[:1], COLUMNS, ((Cell(0.0), Cell(0.0)),))
    with pytest.raises(ValueError, match="finite"):
        Cell(math.inf)
    with pytest.raises(ValueError, match="wrong way round"):
        Cell(0.0, interval=(1.0, -1.0))
    with pytest.raises(ValueError, match="above 0"):
        ColourScale(0.0)
    other = replace(ignored(), heatmap=replace(ignored().heatmap, unit="logits"))
    with pytest.raises(ValueError, match="one unit"):
        planted_report(studies=(content(), other))
