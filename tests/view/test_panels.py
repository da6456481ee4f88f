"""Heat-maps: every column is drawn, labels say what they say, colours mean what the scale says."""

import io
import re
from typing import Any

import numpy as np
import pytest
from PIL import Image

import imaginelens as il
from imaginelens.hooks.errors import InputError
from imaginelens.mediation.cells import Cell
from imaginelens.view.colour import UNMEASURED, ColourScale
from imaginelens.view.figure import Figure
from imaginelens.view.maps import heatmap
from imaginelens.view.panels import Panel, Sheet, draw
from imaginelens.view.static import plain

NAMES = ["<s>", "<|latent|>", "<|latent|>", "<|latent|>", "<b>bold</b>", "a & b"]


def sheet(values: Any, columns: list[str] | None = None, **options: Any) -> Figure:
    array = np.asarray(values, dtype=float)
    labels = columns or [str(k) for k in range(array.shape[1])]
    rows = [str(k) for k in range(array.shape[0])]
    outlined = options.pop("outlined", None)
    panel = Panel(array, rows, labels, "layer", "step", outlined=outlined)
    return draw(Sheet([panel], "a map", "logits", **options))


def pixels(figure: Figure) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(figure.png(scale=1.0))).convert("RGB")).astype(int)


def has(image: np.ndarray, colour: str) -> int:
    """How many pixels have a colour, to within rounding."""
    wanted = [int(colour[k : k + 2], 16) for k in (1, 3, 5)]
    return int((np.abs(image - wanted).max(-1) <= 3).sum())


# ---- columns and labels ------------------------------------------------------------------------


def test_labels_that_repeat_keep_their_columns() -> None:
    figure = sheet([[1.0, 2.0, 3.0, 4.0, 5.0, 6.0]], NAMES)
    assert list(figure.data[0].x) == list(range(6))  # numbers, never names
    assert figure.layout.xaxis.tickvals == tuple(range(6))
    assert len(figure.layout.xaxis.ticktext) == 6


def test_tokens_that_look_like_markup_are_written_out() -> None:
    figure = sheet([[1.0] * 6], NAMES)
    shown = figure.layout.xaxis.ticktext
    assert not any(re.search(r"<(?!br)", text) for text in shown)
    assert [plain(text) for text in shown] == NAMES
    svg = figure.svg()  # words as paths, named in comments
    assert "&lt;|latent|&gt;" in svg or "<|latent|>" in svg


def test_a_guard_against_categories_can_fail() -> None:
    import plotly.graph_objects as go

    by_name = Figure(go.Heatmap(z=[[1.0] * 6], x=NAMES))
    assert list(by_name.data[0].x) != list(range(6))


def test_many_columns_are_all_drawn_and_some_are_named() -> None:
    figure = sheet(np.ones((3, 430)))
    assert len(figure.data[0].x) == 430
    assert 20 <= len(figure.layout.xaxis.ticktext) <= 40


# ---- colours -----------------------------------------------------------------------------------


def test_the_scale_is_symmetric_and_one_for_all_panels() -> None:
    small, large = Panel(np.array([[0.1]]), ["0"], ["a"], "layer", "step"), None
    large = Panel(np.array([[-4.0]]), ["0"], ["a"], "layer", "step")
    figure = draw(Sheet([small, large], "two", "logits"))
    axis = figure.layout.coloraxis
    assert (axis.cmin, axis.cmax) == (-4.0, 4.0)
    assert {trace.coloraxis for trace in figure.data} == {"coloraxis"}


def test_pixels_have_the_colours_of_the_scale() -> None:
    scale = ColourScale(2.0)
    figure = sheet([[2.0, -2.0, 0.0, np.nan]], limit=2.0)
    image = pixels(figure)
    for value in (2.0, -2.0, 0.0):
        assert has(image, scale.colour(value)) > 300, value
    assert has(image, UNMEASURED) > 300
    without = pixels(sheet([[2.0, -2.0, 0.0, 0.0]], limit=2.0))
    assert has(without, UNMEASURED) < has(image, UNMEASURED) / 4  # the gaps between cells


def test_the_other_palette_has_other_colours() -> None:
    panel = Panel(np.array([[1.0]]), ["0"], ["a"], "layer", "step")
    images = [pixels(draw(Sheet([panel], "t", "u"), palette=p)) for p in ("RdBu", "PuOr")]
    blue = ColourScale(1.0).colour(1.0)
    assert has(images[0], blue) > 300
    assert has(images[1], blue) < 50


def test_outlined_cells_have_a_line_around_them() -> None:
    marked = np.array([[True, False]])
    figure = sheet([[1.0, 0.5]], outlined=marked)
    assert figure.data[1].x[:4] == (-0.44, 0.44, 0.44, -0.44)
    assert len(sheet([[1.0, 0.5]]).data) == 1


# ---- files -------------------------------------------------------------------------------------


def test_the_same_figure_gives_the_same_picture() -> None:
    values = np.random.default_rng(0).normal(size=(3, 4))
    assert sheet(values).png() == sheet(values).png()


@pytest.mark.parametrize("kind", ["png", "svg", "pdf", "html", "json"])
def test_every_format_is_written(kind: str, tmp_path: Any) -> None:
    path = sheet([[1.0, 2.0]]).save(tmp_path / f"map.{kind}", cdn=True)
    start = {
        "png": b"\x89PNG",
        "pdf": b"%PDF",
        "svg": b"<?xml",
        "html": b"<!doctype html>",
        "json": b"{",
    }
    assert path.read_bytes().startswith(start[kind])


def test_a_page_needs_no_network(tmp_path: Any) -> None:
    page = sheet([[1.0]]).save(tmp_path / "map.html").read_text()
    assert "<script src=" not in page
    assert '<script charset="utf-8" src="https' in sheet([[1.0]]).page(cdn=True)


def test_an_unknown_format_is_refused(tmp_path: Any) -> None:
    with pytest.raises(InputError, match=r"ends in \.gif"):
        sheet([[1.0]]).save(tmp_path / "map.gif")


def test_a_notebook_gets_a_picture_and_words() -> None:
    bundle = sheet(np.random.default_rng(0).normal(size=(28, 10)))._repr_mimebundle_()
    assert set(bundle) == {"application/vnd.plotly.v1+json", "image/png", "text/plain"}
    assert len(str(bundle)) < 300_000
    assert "28 layer by 10 step" in bundle["text/plain"]


def test_what_a_notebook_keeps_has_the_picture() -> None:
    from IPython.core.interactiveshell import InteractiveShell

    formatter = InteractiveShell.instance().display_formatter
    kept, _ = formatter.format(sheet([[1.0, 2.0]]))
    assert {"application/vnd.plotly.v1+json", "image/png"} <= set(kept)


def test_words_in_scripts_without_a_glyph_are_no_warning() -> None:
    assert sheet([[1.0, 2.0]], ["漢字", "$x_1$"]).png()


# ---- maps of effects ---------------------------------------------------------------------------


def effects(n: int = 4, heads: bool = False) -> il.EffectMap:
    cells = [
        Cell(site, layer, f"latent[{step}]", head, ())
        for site in ("resid_post", "mlp_out")
        for layer in (0, 1, 2)
        for step in (0, 1)
        for head in ((0, 1) if heads else (None,))
    ]
    rng = np.random.default_rng(0)
    after = rng.normal(size=(len(cells), n)) * 0.01
    after[0] += 3.0
    after[3] = np.nan
    return il.EffectMap.from_arrays(cells=cells, before=np.zeros(n), after=after)


def test_a_map_has_a_panel_for_each_site_and_the_values_in_their_cells() -> None:
    found = effects()
    figure = heatmap(found)
    maps = [trace for trace in figure.data if trace.type == "heatmap"]
    assert [plain(note.text) for note in figure.layout.annotations[:2]] == ["resid_post", "mlp_out"]
    assert len(maps) == 2
    drawn = np.array(maps[0].z, dtype=float)
    np.testing.assert_array_equal(drawn, found.sel(site="resid_post").mean[0])
    assert np.isnan(drawn[1, 1])
    assert len(found.cells) == sum(np.size(trace.z) for trace in maps)


def test_what_a_cell_says_is_all_there_is() -> None:
    told = plain(heatmap(effects()).data[0].customdata[0][0])
    for words in (
        "site: resid_post",
        "layer: 0",
        "position: latent[0]",
        "95% interval",
        "n: 4",
        "→",
    ):
        assert words in told
    assert plain(heatmap(effects()).data[0].customdata[1][1]).endswith("not measured")


def test_only_cells_whose_interval_leaves_out_zero_are_outlined() -> None:
    figure = heatmap(effects(40))
    lines = [trace for trace in figure.data if trace.type == "scatter"]
    assert len(lines) == 1
    assert sum(x is None for x in lines[0].x) == 1


def test_heads_go_across_and_positions_become_panels() -> None:
    figure = heatmap(effects(heads=True))
    assert len([t for t in figure.data if t.type == "heatmap"]) == 4
    assert figure.layout.xaxis.title.text == "head"


def test_a_single_example_and_missing_controls_are_marked() -> None:
    figure = heatmap(effects(1))
    assert figure.layout.meta["marks"] == [
        "single example: no interval",
        "no controls: no sham was run",
    ]
    assert "single example" in str(figure.layout.annotations[-1].text)


def test_a_map_draws_itself() -> None:
    assert isinstance(effects().plot(), Figure)


def test_a_map_of_an_organism_shows_where_the_answer_is_carried() -> None:
    lens = il.load("latent-content")
    found = il.sweep(lens, lens.task(n=4, seed=1), sites="resid_post", metric=il.source_answer)
    figure = found.plot(title="latent-content")
    assert "latent-content" in figure.alt
    assert figure.layout.meta["marks"] == []
    assert figure.data[0].z[0][1] == found.mean[0, 0, 1]


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: heatmap(effects(), limit=0.0), "cannot end a colour scale"),
        (lambda: draw(Sheet([], "t", "u")), "nothing to draw"),
        (lambda: Panel(np.zeros((2, 2)), ["a"], ["b", "c"], "layer", "step"), "one label each"),
    ],
)  # fmt: skip
def test_bad_input_is_one_sentence(call: Any, words: str) -> None:
    with pytest.raises(InputError, match=words):
        call()


def test_an_unknown_palette_is_refused() -> None:
    panel = Panel(np.zeros((1, 1)), ["a"], ["b"], "layer", "step")
    unchecked = getattr(draw, "__wrapped__", draw)
    with pytest.raises(InputError, match="no palette 'jet'"):
        unchecked(Sheet([panel], "t", "u"), palette="jet")
