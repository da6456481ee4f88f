"""Layers by regions, steps by steps, layers by heads, sites beside each other, on one scale.

Each picture is told from one that would fool a reader: other places, other sizes, other marks.
"""

import io
from dataclasses import replace
from typing import Any

import numpy as np
import planted
import pytest
from PIL import Image

import imaginelens as il
from imaginelens.hooks.errors import InputError
from imaginelens.hooks.positions import Positions
from imaginelens.mediation.cells import Cell
from imaginelens.mediation.step_influence import StepInfluence, step_influence
from imaginelens.view.colour import UNMEASURED, ColourScale
from imaginelens.view.figure import Figure
from imaginelens.view.maps import heatmap
from imaginelens.view.static import plain

ODD = [il.text.find("<s>"), il.text.find("<|latent|>"), il.text.find("<b>x</b>"), il.latent]


def made(
    regions: list[Positions], effects: Any, *, sites: tuple[str, ...] = ("resid_post",), **more: Any
) -> il.EffectMap:
    """A map of layers by regions whose mean effects are given, as (site, layer, region)."""
    size = np.asarray(effects, dtype=float)
    cells = [
        Cell(site, layer, repr(at), None, ())
        for site in sites
        for layer in range(size.shape[1])
        for at in regions
    ]
    spread = np.linspace(-0.01, 0.01, 6)
    after = size.reshape(-1, 1) + spread
    return il.EffectMap.from_arrays(cells=cells, before=np.zeros(6), after=after, **more)


def shown(figure: Figure) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(figure.png(scale=1.0))).convert("RGB")).astype(int)


def colour_at(figure: Figure, column: int, row: int, number: int = 1) -> np.ndarray:
    """The colour of a cell near its upper left corner, where no number is written."""
    layout, end = figure.layout, "" if number == 1 else str(number)
    across, up, margin = layout[f"xaxis{end}"], layout[f"yaxis{end}"], layout.margin
    n_columns, n_rows = across.range[1] + 0.5, up.range[0] + 0.5
    x = across.domain[0] + (column + 0.13) / n_columns * (across.domain[1] - across.domain[0])
    y = up.domain[1] - (row + 0.15) / n_rows * (up.domain[1] - up.domain[0])
    left = margin.l + x * (layout.width - margin.l - margin.r)
    top = margin.t + (1 - y) * (layout.height - margin.t - margin.b)
    return shown(figure)[round(top), round(left)]


def rgb(colour: str) -> np.ndarray:
    return np.array([int(colour[k : k + 2], 16) for k in (1, 3, 5)])


def outlines(figure: Figure) -> int:
    return sum(x is None for t in figure.data if t.type == "scatter" for x in t.x)


# ---- layer by region ---------------------------------------------------------------------------


def test_a_sweep_over_regions_has_a_column_for_each_in_the_order_given() -> None:
    lens = il.load("latent-content")
    task = lens.task(n=4, seed=0)
    prompt = [t for t in lens.run(task.base[0]).tokens[0] if t.kind.name == "TEXT" and t.index < 22]
    question = il.positions([t.index for t in prompt])
    found = il.sweep(lens, task, positions=[il.image, question, il.latent, il.last_prompt])
    figure = found.plot(labels={question: "question"})
    labels = [plain(text) for text in figure.layout.xaxis.ticktext]
    assert labels == ["image", "question", "latent", "last_prompt"]
    drawn = np.array(figure.data[0].z, dtype=float)
    assert drawn.shape == (3, 4)
    for column, at in enumerate((il.image, question, il.latent, il.last_prompt)):
        for layer in range(3):
            assert drawn[layer, column] == found["resid_post", layer, repr(at)].value
    assert drawn[1:, 2].min() > 5 > np.abs(drawn[1:, [0, 3]]).max()  # the latents carry it
    assert f"position: {question!r}" in plain(figure.data[0].customdata[0][1])


def test_names_that_are_markup_or_repeat_keep_their_columns_and_letters() -> None:
    found = made(ODD, [[[1.0, 2.0, 3.0, 4.0]]])
    figure = found.plot()
    assert list(figure.data[0].x) == [0, 1, 2, 3]
    assert [plain(text) for text in figure.layout.xaxis.ticktext] == [repr(at) for at in ODD]
    alike = found.plot(labels=dict.fromkeys(ODD, "<s>"))
    assert list(alike.data[0].x) == [0, 1, 2, 3]
    assert [plain(text) for text in alike.layout.xaxis.ticktext] == ["<s>"] * 4
    assert alike.svg().count("&lt;s&gt;") >= 4 or alike.svg().count("<!-- <s> -->") >= 4


def test_columns_have_the_colours_of_their_regions() -> None:
    """The mirrored map has the same colours at mirrored places: neither is taken for the other."""
    effects = [2.0, -2.0, 0.0, 1.0]
    scale = ColourScale(2.0)
    for order in (slice(None), slice(None, None, -1)):
        figure = made(ODD[order], [[effects[order]]]).plot()
        for column, effect in enumerate(effects[order]):
            assert np.abs(colour_at(figure, column, 0) - rgb(scale.colour(effect))).max() <= 4


def test_a_label_for_what_the_map_has_not_is_refused() -> None:
    with pytest.raises(InputError, match=r"labels names image, and the map has text\.find"):
        made(ODD, [[[1.0, 2.0, 3.0, 4.0]]]).plot(labels={il.image: "picture"})


# ---- sites beside each other -------------------------------------------------------------------


def test_sites_share_one_scale() -> None:
    """A small effect is pale beside a large one; on a scale of its own it would look as large."""
    regions = [il.image, il.latent]
    both = made(regions, [[[4.0, 0.0]], [[0.2, 0.0]]], sites=("resid_post", "mlp_out"))
    figure = both.plot()
    assert (figure.layout.coloraxis.cmin, figure.layout.coloraxis.cmax) == pytest.approx((-4, 4))
    deep, pale = rgb(ColourScale(4.0).colour(4.0)), rgb(ColourScale(4.0).colour(0.2))
    assert np.abs(colour_at(figure, 0, 0) - deep).max() <= 4
    assert np.abs(colour_at(figure, 0, 0, number=2) - pale).max() <= 4
    alone = both.sel(site="mlp_out").plot()
    assert np.abs(colour_at(alone, 0, 0) - deep).max() <= 4
    shared = both.sel(site="mlp_out").plot(limit=4.0)
    assert np.abs(colour_at(shared, 0, 0) - pale).max() <= 4


# ---- layer by head -----------------------------------------------------------------------------


def heads(effects: dict[tuple[str, int, int | None], float], n: int = 6) -> il.EffectMap:
    cells = [Cell(site, layer, "latent[0]", head, ()) for site, layer, head in effects]
    after = np.array(list(effects.values()))[:, None] + np.linspace(-0.01, 0.01, n)
    return il.EffectMap.from_arrays(cells=cells, before=np.zeros(n), after=after)


def test_heads_lie_across_and_what_is_missing_is_grey() -> None:
    found = heads(
        {("z", 0, 0): 1.0, ("z", 0, 1): 0.0, ("z", 1, 1): -1.0, ("mlp_out", 0, None): 0.5}
    )
    figure = found.plot()
    assert plain(figure.layout.xaxis.title.text) == "head"
    assert [plain(text) for text in figure.layout.xaxis2.ticktext] == ["whole"]
    scale = ColourScale(1.0)
    for (column, row), effect in {(0, 0): 1.0, (1, 0): 0.0, (1, 1): -1.0}.items():
        assert np.abs(colour_at(figure, column, row) - rgb(scale.colour(effect))).max() <= 4
    assert np.abs(colour_at(figure, 0, 1) - rgb(UNMEASURED)).max() <= 4
    assert outlines(figure) == 3  # not that of 0
    assert figure.layout.meta["marks"] == ["no controls: no sham was run"]


def test_numbers_of_a_small_scale_can_be_told_apart() -> None:
    figure = heads({("z", 0, 0): 0.0021, ("z", 0, 1): 0.0014}).plot()
    assert list(figure.data[0].text[0]) == ["0.0021", "0.0014"]


# ---- step by step ------------------------------------------------------------------------------

XS0, XS1 = (0.25, -0.5, 0.125, 0.75), (1.5, 0.8, 2.0, 1.0)


@pytest.fixture(scope="module")
def chain() -> StepInfluence:
    """Each latent is a matrix times the one before."""
    p = planted.planted("chain", xs0=XS0, xs1=XS1)
    return step_influence(p.lens, p.pairs)


def test_a_chain_moves_what_is_behind_and_nothing_before(chain: StepInfluence) -> None:
    figure = chain.plot()
    np.testing.assert_array_equal(np.array(figure.data[0].z, dtype=float), chain.mean)
    limit = figure.layout.coloraxis.cmax
    assert (figure.layout.coloraxis.cmin, limit) == (-chain.mean.max(), chain.mean.max())
    for s in range(3):
        for t in range(3):
            wanted = ColourScale(limit).colour(chain.mean[s, t] if t >= s else 0.0)
            assert np.abs(colour_at(figure, t, s) - rgb(wanted)).max() <= 4
    assert [plain(text) for text in figure.layout.xaxis.ticktext] == ["z[0]", "z[1]", "z[2]"]
    assert plain(figure.layout.yaxis.title.text) == "replaced"


def test_steps_that_do_not_read_each_other_have_a_diagonal() -> None:
    p = planted.planted("and_gate", xs0=XS0, xs1=XS1)
    found = step_influence(p.lens, p.pairs)
    figure = found.plot()
    drawn = np.array(figure.data[0].z, dtype=float)
    assert not drawn[~np.eye(len(drawn), dtype=bool)].any()
    assert drawn.diagonal().all()
    assert outlines(figure) <= found.steps
    white = rgb(ColourScale(1.0).colour(0.0))
    assert np.abs(colour_at(figure, 1, 0) - white).max() <= 4


def test_only_what_differs_from_nothing_is_outlined(chain: StepInfluence) -> None:
    change = chain.change.copy()
    change[0, 1] = (1.0, 1.01, 0.99, 1.02)
    change[0, 2] = (0.0, 0.0, 0.0, 4.08)  # a larger mean, and unsure
    change[0, 0] = change[1, 1] = change[2, 2] = change[1, 2] = np.nan
    figure = replace(chain, change=change).plot()
    (lines,) = [trace for trace in figure.data if trace.type == "scatter"]
    assert outlines(figure) == 1
    assert (np.mean(lines.x[:4]), np.mean(lines.y[:4])) == (1.0, 0.0)


def test_a_step_that_no_run_has_is_grey_and_says_so(chain: StepInfluence) -> None:
    change = chain.change.copy()
    change[0, 2] = np.nan
    figure = replace(chain, change=change).plot()
    assert np.abs(colour_at(figure, 2, 0) - rgb(UNMEASURED)).max() <= 4
    assert "not measured" in plain(figure.data[0].customdata[0][2])


def test_hover_alt_and_marks_say_what_the_colours_do_not(chain: StepInfluence) -> None:
    figure = chain.plot()
    own, moved = (plain(figure.data[0].customdata[0][t]) for t in (0, 1))
    assert "effect on logit_diff in free context" in own
    assert "effect on logit_diff in fixed context" in own
    for words in ("replaced: z[0]", "moved: z[1]", "95% interval", "n: 4"):
        assert words in moved
    assert "in fixed context: z[0]" in figure.alt
    assert figure.layout.meta["marks"] == []
    without = replace(chain, free=replace(chain.free, sham=None)).plot()
    assert without.layout.meta["marks"] == ["no controls: no sham was run"]


def test_a_single_example_is_marked() -> None:
    p = planted.planted("chain", xs0=XS0[:1], xs1=XS1[:1])
    figure = step_influence(p.lens, p.pairs).plot()
    assert "single example: no interval" in figure.layout.meta["marks"]
    assert outlines(figure) == 0


def test_the_view_knows_it_by_name(chain: StepInfluence) -> None:
    assert isinstance(il.view.step_heatmap(chain), Figure)
    assert isinstance(heatmap(made([il.latent], [[[1.0]]])), Figure)
