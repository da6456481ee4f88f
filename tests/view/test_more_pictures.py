"""Forest, overlay, dose-response, trajectories, attention: they show what is known to be there."""

import io
from dataclasses import replace
from typing import Any

import numpy as np
import planted
import pytest
import tiny
from PIL import Image

import imaginelens as il
from imaginelens.estimates import Estimate, EstimateError
from imaginelens.estimates.interval import Interval
from imaginelens.hooks.errors import InputError
from imaginelens.hooks.tokens import Kind
from imaginelens.mediation.outcomes import PotentialOutcomes
from imaginelens.probes.states import States
from imaginelens.probes.steering import DoseResponse
from imaginelens.view.attention_picture import attention_shares, attention_to_latents
from imaginelens.view.charts import COLOURS, words
from imaginelens.view.doses import dose_response
from imaginelens.view.figure import Figure
from imaginelens.view.forest_plot import LOOKS, forest, pieces
from imaginelens.view.latent_plane import plane_of, trajectories
from imaginelens.view.overlay import image_overlay
from imaginelens.view.run_strip import FILLS, boxes, token_strip
from imaginelens.view.static import plain


@pytest.fixture(scope="module")
def lens() -> Any:
    return il.load("latent-content")


@pytest.fixture(scope="module")
def task(lens: Any) -> Any:
    return lens.task(n=6, seed=0)


@pytest.fixture(scope="module")
def run(lens: Any, task: Any) -> Any:
    return lens.run(task.base)


@pytest.fixture(scope="module")
def zeroed(lens: Any, task: Any) -> il.EffectMap:
    """What it costs to wipe out each card before the first layer reads it."""
    return il.sweep(
        lens, task, sites="blocks.0.hook_resid_pre", positions=il.image, metric=il.log_prob,
        edit=il.Zero(),
    )  # fmt: skip


def pixels(figure: Figure) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(figure.png(scale=1.0))).convert("RGB")).astype(int)


def pixel_at(figure: Figure, x: float, y: float, number: int = 1) -> np.ndarray:
    """The colour at a place of a subplot's own coordinates."""
    layout, end = figure.layout, "" if number == 1 else str(number)
    margin, image = layout.margin, pixels(figure)
    across, up = layout[f"xaxis{end}"], layout[f"yaxis{end}"]

    def part(axis: Any, value: float) -> float:
        low, high = axis.range
        first, last = axis.domain or (0, 1)
        return first + (value - low) / (high - low) * (last - first)

    column = margin.l + part(across, x) * (layout.width - margin.l - margin.r)
    row = margin.t + (1 - part(up, y)) * (layout.height - margin.t - margin.b)
    return image[round(row), round(column)]


def has(image: np.ndarray, colour: str) -> int:
    wanted = [int(colour[k : k + 2], 16) for k in (1, 3, 5)]
    return int((np.abs(image - wanted).max(-1) <= 3).sum())


# ---- forest ------------------------------------------------------------------------------------

RNG = np.random.default_rng(0)
NONE = Estimate.mean(RNG.normal(0, 0.01, 50), name="none")
CLEAR = Estimate.mean(RNG.normal(1, 0.1, 50), name="clear")
SMALL = Estimate.mean(RNG.normal(0.05, 0.01, 50), name="small")
VAGUE = Estimate.mean([-1.0, 1.2, 0.3, -0.5, 0.9, -0.8], name="vague")


def points(figure: Figure) -> dict[int, Any]:
    """The marker of each row."""
    found = {}
    for trace in figure.data:
        if trace.mode == "markers" and not str(trace.marker.symbol).startswith("triangle"):
            found |= dict.fromkeys(trace.y, trace.marker)
    return found


def is_open(marker: Any) -> bool:
    return marker.color == "#ffffff" and marker.line.color != "#ffffff"


def arrows(figure: Figure) -> dict[str, list[tuple[float, float]]]:
    return {
        trace.marker.symbol: list(zip(trace.x, trace.y, strict=True))
        for trace in figure.data
        if trace.mode == "markers" and str(trace.marker.symbol).startswith("triangle")
    }


def said(figure: Figure) -> list[str]:
    return [plain(note.text) for note in figure.layout.annotations]


def test_verdicts_differ_in_shape_colour_and_words() -> None:
    four = {"a": CLEAR, "b": NONE, "c": SMALL, "d": VAGUE}
    figure = forest(four, margin=0.1)
    wanted = [LOOKS[e.verdict(0.1)] for e in four.values()]
    assert [look.said for look in wanted] == [
        "an effect", "none beyond the margin", "real, but below the margin", "inconclusive",
    ]  # fmt: skip
    marks = points(figure)
    assert [marks[row].symbol for row in range(4)] == [look.symbol for look in wanted]
    assert [look.symbol for look in wanted] == ["circle", "square", "diamond", "circle"]
    assert is_open(marks[3])
    assert not any(is_open(marks[row]) for row in range(3))
    image = pixels(figure)
    assert pixel_at(figure, VAGUE.value, 3).min() > 250  # also where it is drawn by matplotlib
    assert pixel_at(figure, CLEAR.value, 0).min() < 100
    for row, look in enumerate(wanted):
        assert has(image, look.colour) > 30
        assert said(figure)[1 + row].endswith(look.said)
    assert "b " in figure.alt
    assert "none beyond the margin" in figure.alt


def test_the_same_numbers_with_a_smaller_margin_or_none_are_no_absence() -> None:
    assert points(forest({"a": NONE}, margin=0.1))[0].symbol == "square"
    assert is_open(points(forest({"a": NONE}, margin=0.001))[0])
    without = forest({"a": NONE})
    assert is_open(points(without)[0])
    assert "no effect shown" in without.alt
    assert not [s for s in without.layout.shapes if s.type == "rect"]
    assert "nothing is shown to be absent" in said(without)[0]


def test_lines_are_the_intervals() -> None:
    figure = forest({"a": VAGUE}, margin=0.1)
    thin, thick = (t for t in figure.data if t.mode == "lines")
    for trace, level in ((thin, 0.95), (thick, 0.90)):
        interval = VAGUE.ci(level=level)
        assert trace.x[:2] == (interval.low, interval.high)
    assert thick.line.width > thin.line.width


def test_the_band_is_the_margin_also_where_it_is_a_share_of_the_total() -> None:
    (band,) = [s for s in forest({"a": CLEAR}, margin=0.1).layout.shapes if s.type == "rect"]
    assert (band.x0, band.x1) == (-0.1, 0.1)
    total = Estimate.mean(RNG.normal(2, 0.1, 50), name="te")
    part = replace(NONE, total=total)
    figure = forest({"te": total, "part": part}, margin=il.relative(0.05))
    (band,) = [s for s in figure.layout.shapes if s.type == "rect"]
    assert band.x1 == pytest.approx(0.05 * total.value)
    assert (band.y0, band.y1) == (0.5, 1.5)
    middle = pixel_at(figure, 0.8 * band.x1, 1.3)
    assert middle[1] > middle[0]  # green
    assert pixel_at(figure, 0.9, 1.3).tolist() == [255, 255, 255]


def test_each_row_is_held_against_its_own_null() -> None:
    share = Estimate.share(np.arange(40) % 4 == 0, chance=0.25)
    bare = Estimate.share(np.arange(40) % 4 == 0)
    figure = forest({"share": share, "effect": CLEAR, "bare": bare})
    lines = [(s.x0, s.y0) for s in figure.layout.shapes if s.type == "line"]
    assert lines == [(0.25, -0.5), (0.0, 0.5)]
    assert said(figure)[3] == f"0.25 {bare.ci()}"  # no null, no verdict


def test_intervals_without_end_are_arrows_and_said() -> None:
    rng = np.random.default_rng(1)
    ratio = Estimate.ratio(rng.normal(1, 0.5, 20), rng.normal(0.1, 1, 20))
    interval = ratio.ci()
    assert interval.unbounded == "outside"
    figure = forest({"ratio": ratio, "plain": CLEAR})
    (low, high), found = figure.layout.xaxis.range, arrows(figure)
    assert found == {"triangle-left": [(low, 0)], "triangle-right": [(high, 0)]}
    thin = next(t for t in figure.data if t.mode == "lines" and 0 in t.y)
    assert thin.x[:5] == (low, interval.low, None, interval.high, high)  # the gap stays empty
    assert "interval without end" in said(figure)[1]
    assert "without end" not in said(figure)[2]
    assert arrows(forest({"plain": CLEAR})) == {}


def test_every_form_of_interval_has_its_pieces() -> None:
    inf = float("inf")
    assert pieces(Interval(0.0, 1.0, 0.95)) == [(0.0, 1.0)]
    assert pieces(Interval(0.0, inf, 0.95, unbounded="half")) == [(0.0, inf)]
    assert pieces(Interval(-inf, inf, 0.95, unbounded="everything")) == [(-inf, inf)]


def test_what_is_clipped_is_said() -> None:
    figure = forest({"a": VAGUE, "b": NONE}, span=(-0.2, 0.2))
    assert arrows(figure) == {"triangle-left": [(-0.2, 0)], "triangle-right": [(0.2, 0)]}
    assert said(figure)[1].endswith("clipped")
    assert not said(figure)[2].endswith("clipped")


def test_effects_of_a_study_come_in_their_order_with_what_they_mean() -> None:
    y00 = RNG.normal(size=30)
    arms = {"y00": y00, "y11": y00 + 2, "y10": y00 + 2, "y01": y00}
    figure = forest(PotentialOutcomes.from_arrays(**arms, unit="logits").effects(), margin=0.1)
    names = [plain(text).split("\n") for text in figure.layout.yaxis.ticktext]
    assert [name for name, _ in names] == ["te", "pnde", "tnde", "tnie", "pnie", "int_med"]
    assert names[3][1] == "effect through the latents, input of the source"
    assert points(figure)[3].symbol == "square"
    assert points(figure)[0].symbol == "circle"
    assert figure.layout.xaxis.title.text == "effect on logits"
    more = PotentialOutcomes.from_arrays(**arms, c0=y00, c1=y00 + 1).effects()
    assert len(forest(more).layout.yaxis.ticktext) == 8


def test_names_in_a_forest_are_no_markup() -> None:
    figure = forest({"<b>x</b>": CLEAR}, title="<i>t</i>")
    assert figure.layout.yaxis.ticktext == ("&lt;b&gt;x&lt;/b&gt;",)
    assert "<i>" not in figure.layout.title.text
    assert "<b>" not in str(points(figure)) + str(figure.data[-1].customdata)


@pytest.mark.parametrize(
    ("call", "words_"),
    [
        (lambda: forest({}), "no estimates"),
        (lambda: forest({"a": CLEAR}, span=(1.0, 1.0)), "the smaller one first"),
        (lambda: forest({"a": CLEAR}, span=(0.0, float("nan"))), "the smaller one first"),
    ],
)  # fmt: skip
def test_a_forest_of_nothing_is_refused(call: Any, words_: str) -> None:
    with pytest.raises(InputError, match=words_):
        call()


def test_a_margin_that_is_none_is_refused() -> None:
    with pytest.raises(EstimateError, match="none"):
        forest({"a": CLEAR}, margin=-0.1)


# ---- overlay -----------------------------------------------------------------------------------


def drawn(figure: Figure, panel: int = 1) -> np.ndarray:
    """The numbers of a panel; panel 0 is the picture itself."""
    maps = [trace for trace in figure.data if trace.type == "heatmap"]
    return np.array(maps[panel].z, dtype=float)


def test_wiped_out_cards_matter_where_the_hunt_goes_and_nowhere_else(
    run: Any, task: Any, zeroed: il.EffectMap
) -> None:
    for example in range(5):
        hunt = task.base[example]["hunt"]
        visited = np.isin(hunt.names, hunt.path).reshape(3, 3)
        values = drawn(image_overlay(run, zeroed, example=example))
        assert np.abs(values[~visited]).max() < 0.05
        assert values[visited].min() < -1
        r, c = np.unravel_index(np.argmin(values), values.shape)
        alt = image_overlay(run, zeroed, example=example).alt
        assert f"the largest at row {r}, column {c}" in alt


def test_an_example_is_found_by_its_content_not_its_number(
    lens: Any, run: Any, task: Any, zeroed: il.EffectMap
) -> None:
    backwards = lens.run(task.base[::-1])
    one = drawn(image_overlay(backwards, zeroed, example=0))
    np.testing.assert_array_equal(one, drawn(image_overlay(run, zeroed, example=5)))
    assert not np.array_equal(one, drawn(image_overlay(run, zeroed, example=0)))


def test_a_run_of_other_inputs_is_refused(lens: Any, task: Any, zeroed: il.EffectMap) -> None:
    other = lens.run(task.source)
    with pytest.raises(InputError, match="not among the 6 of the map"):
        image_overlay(other, zeroed)
    figure = image_overlay(other, zeroed, of="mean")
    np.testing.assert_allclose(drawn(figure).ravel(), zeroed.mean.ravel())
    assert "mean of 6 examples, over the picture of example 0" in figure.layout.meta["marks"]


def test_the_mean_outlines_what_leaves_out_zero(run: Any) -> None:
    rng = np.random.default_rng(0)
    cells = [
        il.Cell("resid_pre", 0, f"image[0][{r}, {c}]", None, ()) for r in range(3) for c in range(2)
    ]
    after = rng.normal(0, 1.0, (6, 20))
    after[4] += 5.0  # row 2, column 0
    found = il.EffectMap.from_arrays(cells=cells, before=np.zeros(20), after=after)
    figure = image_overlay(run, found, of="mean")
    outlines = [t for t in figure.data if t.type == "scatter" and t.line.width == 2.5]
    assert len(outlines) == 1
    assert sum(x is None for x in outlines[0].x) == 1
    assert 0 < min(outlines[0].x[:5]) < max(outlines[0].x[:5]) < 28
    assert 56 < min(outlines[0].y[:5]) < max(outlines[0].y[:5]) < 84
    values = drawn(figure)
    assert np.isnan(values[:, 2]).all()  # no cells there
    assert "3 cells not measured" in figure.alt
    maps = [trace for trace in figure.data if trace.type == "heatmap"]
    assert "interval" in maps[1].customdata[2][0]
    assert plain(maps[1].customdata[0][2]).endswith("not measured")


def test_cells_say_where_they_are(run: Any) -> None:
    figure = image_overlay(run, np.arange(9.0).reshape(3, 3), example=1)
    cells = next(trace for trace in figure.data if trace.type == "heatmap" and trace.z[0][0] == 0)
    assert (list(cells.x), list(cells.y)) == ([0, 28, 56, 84], [0, 28, 56, 84])
    for r, c in ((0, 0), (1, 2), (2, 1)):
        column = int(il.image[0][r, c].resolve(run.tokens, 1)[0])
        index = run.tokens.token(1, column).index
        told = plain(cells.customdata[r][c]).split("\n")
        assert told[:2] == [f"row {r}, column {c}", f"sequence index {index}"]
        assert told[2] == f"pixels {28 * c}, {28 * r}, {28 * c + 28}, {28 * r + 28}"
        assert told[3] == str(3 * r + c)


@pytest.mark.parametrize(
    ("model", "across", "down"),
    [
        ("llava", [15, 30, 45, 60, 75], [0, 15, 30, 45, 60]),  # looks at the middle only
        ("idefics3", range(0, 91, 15), range(0, 61, 10)),  # tiles, and a thumbnail
    ],
)
def test_cells_lie_where_the_model_looks(model: str, across: Any, down: Any) -> None:
    lens = il.LatentModel(*tiny.build(model), spec="mirage")
    picture = tiny.image(90, 60, 0)
    run = lens.run(images=picture, text=tiny.prompt(model, "what is this"), max_new_tokens=2)
    grid = run.tokens.grids[0][0]
    figure = image_overlay(run, np.zeros((grid.rows, grid.cols)))
    cells = [trace for trace in figure.data if trace.type == "heatmap"][1]
    np.testing.assert_allclose(cells.x, list(across), atol=1e-9)
    np.testing.assert_allclose(cells.y, list(down), atol=1e-9)
    for r, c in ((0, 0), (1, 2), (grid.rows - 1, grid.cols - 1)):
        column = int(il.image[0][r, c].resolve(run.tokens, 0)[0])
        told = plain(cells.customdata[r][c]).split("\n")
        assert told[1] == f"sequence index {run.tokens.token(0, column).index}"


def test_tints_lie_on_their_cells_and_unmeasured_ones_have_none(run: Any) -> None:
    values = np.zeros((3, 3))
    values[0, 1], values[2, 0], values[1, 1] = 4.0, -4.0, np.nan
    figure = image_overlay(run, values)

    def tint(r: int, c: int, panel: int = 2) -> np.ndarray:
        return pixel_at(figure, 28 * c + 4, 28 * r + 4, panel)

    red, _, blue = tint(0, 1)
    assert blue > red + 30
    red, _, blue = tint(2, 0)
    assert red > blue + 30
    assert np.ptp(tint(1, 1)) == 0  # grey, as the picture below it
    assert np.ptp(tint(0, 0)) < 8  # white veil
    assert tint(0, 0).min() > tint(1, 1).min() or tint(0, 0).min() > 200
    card = np.asarray(run.prompt.pictures[0][0].convert("RGB")).astype(int)
    shown = pixel_at(figure, 28 * 2 + 4, 28 + 4, 1)
    assert np.abs(shown - card[28 + 4, 28 * 2 + 4]).max() < 40  # its own colours, grain apart


def test_several_fields_share_one_scale(run: Any) -> None:
    figure = image_overlay(run, {"a": np.eye(3), "<b>": -3 * np.eye(3)}, unit="logits")
    axis = figure.layout.coloraxis
    assert (axis.cmin, axis.cmax) == (-3.0, 3.0)
    assert [t.coloraxis for t in figure.data if t.type == "heatmap"] == ["coloraxis"] * 3
    assert "&lt;b&gt;" in [note.text for note in figure.layout.annotations]
    assert image_overlay(run, np.eye(3), limit=2.0).layout.coloraxis.cmax == 2.0


def test_a_picture_of_many_pixels_stays_small(lens: Any, task: Any) -> None:
    large = task.base[0]["images"].resize((840, 840))
    held = lens.run(task.base[0])
    pictures = ((large,),)
    run = replace(held, prompt=replace(held.prompt, pictures=pictures))
    assert len(str(image_overlay(run, np.eye(3)).to_json())) < 200_000


@pytest.mark.parametrize(
    ("options", "given", "words_"),
    [
        ({}, np.zeros((2, 3)), r"\(2, 3\) came for a grid of 3 x 3"),
        ({}, np.full((3, 3), np.inf), "infinite"),
        ({}, {}, "no numbers"),
        ({"example": 6}, np.eye(3), "no example 6 in a run of 6"),
        ({"image": 1}, np.eye(3), "has 1 images, not image 1"),
        ({"limit": -1.0}, np.eye(3), "cannot end a colour scale"),
        ({}, {str(k): np.eye(3) for k in range(12)}, "12 panels are too many"),
    ],
)
def test_numbers_that_do_not_fit_are_refused(
    run: Any, options: dict[str, Any], given: Any, words_: str
) -> None:
    with pytest.raises(InputError, match=words_):
        image_overlay(run, given, **options)


def test_maps_without_image_cells_or_of_another_grid_are_refused(run: Any) -> None:
    for position, words_ in (("latent[0]", "no cells of image 0"), ("image[0][9, 0]", "9, 0")):
        cells = [il.Cell("resid_pre", 0, position, None, ())]
        found = il.EffectMap.from_arrays(cells=cells, before=[0.0], after=[[1.0]])
        with pytest.raises(InputError, match=words_):
            image_overlay(run, found, of="mean")


def test_a_run_without_its_pictures_is_refused(run: Any) -> None:
    bare = replace(run, prompt=replace(run.prompt, pictures=None))
    with pytest.raises(InputError, match="processor's dict"):
        image_overlay(bare, np.eye(3))


# ---- dose-response -----------------------------------------------------------------------------


def response(push: float, *, n: int = 40, seed: int = 0) -> DoseResponse:
    """A metric that moves by `push` for each dose of 1, and not at all along random directions."""
    rng = np.random.default_rng(seed)
    before, doses = rng.normal(size=n), (-1.0, 1.0, 2.0)
    noise = rng.normal(0, 0.1, (3, 4, n))
    return DoseResponse(
        doses=doses, metric=il.logit_diff, before=before,
        after=np.stack([before + push * d + rng.normal(0, 0.1, n) for d in doses]),
        random=before + noise, groups=None, flags={}, change=(0.1, 0.1, 0.2), where="latent",
        context="free",
    )  # fmt: skip


def named(figure: Figure, name: str) -> Any:
    return next((t for t in figure.data if t.name == name), None)


def test_a_dose_curve_has_the_effects_and_is_zero_at_zero() -> None:
    found = response(1.5)
    figure = dose_response(found, margin=0.2)
    line = named(figure, "the direction")
    assert list(line.x) == [-1.0, 0.0, 1.0, 2.0]
    assert line.y[1] == named(figure, "random, mean").y[1] == 0.0
    assert line.error_y.array[1] == line.error_y.arrayminus[1] == 0.0
    for place, effect in zip((0, 2, 3), found.effects, strict=True):
        assert line.y[place] == effect.value
        assert line.y[place] + line.error_y.array[place] == pytest.approx(effect.ci().high)
        assert line.y[place] - line.error_y.arrayminus[place] == pytest.approx(effect.ci().low)
    assert len([t for t in figure.data if t.name == "one random direction"]) == 4
    assert named(figure, "differs from random").x == found.doses
    assert not is_open(named(figure, "differs from random").marker)
    assert "steers" in figure.alt


def test_a_direction_that_does_nothing_has_open_points() -> None:
    figure = dose_response(response(0.0), margin=0.2)
    assert named(figure, "differs from random") is None
    assert is_open(named(figure, "not shown to differ").marker)
    assert "does not steer" in figure.alt
    assert "steer" not in dose_response(response(0.0)).alt.split("dose -1")[1]  # without a margin


def test_the_random_line_is_their_mean() -> None:
    found = response(1.0)
    line = named(dose_response(found), "random, mean")
    wanted = (found.random.mean(1) - found.before).mean(1)
    np.testing.assert_allclose([line.y[0], line.y[2], line.y[3]], wanted)


# ---- trajectories ------------------------------------------------------------------------------


def lines_of(figure: Figure) -> Any:
    return [trace for trace in figure.data if trace.mode == "lines"]


def test_states_on_a_line_have_one_component() -> None:
    direction = np.random.default_rng(0).normal(size=12)
    direction /= np.linalg.norm(direction)
    steps = np.array([[0.0, 1.0, 3.0], [2.0, 4.0, 5.0]])
    states = 7 + steps[..., None] * direction
    plane = plane_of(states, np.ones((2, 3), bool))
    assert plane.explained == (1.0, 0.0)
    np.testing.assert_allclose(np.abs(np.diff(plane.points[..., 0])), np.diff(steps), atol=1e-9)
    np.testing.assert_allclose(plane.points[..., 1], 0, atol=1e-9)
    figure = trajectories(States.of(states))
    assert "100%" in figure.layout.xaxis.title.text
    assert "(0%" in figure.layout.yaxis.title.text


def test_a_plane_is_found_whichever_way_it_lies() -> None:
    rng = np.random.default_rng(1)
    flat = rng.normal(size=(5, 4, 2)) * [3.0, 1.0]
    turned = np.linalg.qr(rng.normal(size=(20, 20)))[0][:2]
    plane = plane_of(flat @ turned, np.ones((5, 4), bool))
    assert sum(plane.explained) == pytest.approx(1.0)

    def distances(points: np.ndarray) -> np.ndarray:
        whole = points.reshape(-1, points.shape[-1])
        return np.linalg.norm(whole[:, None] - whole[None], axis=-1)

    np.testing.assert_allclose(distances(plane.points), distances(flat), atol=1e-9)


def test_noise_is_not_said_to_lie_in_a_plane() -> None:
    noise = np.random.default_rng(0).normal(size=(200, 2, 50))
    plane = plane_of(noise, np.ones((200, 2), bool))
    assert sum(plane.explained) < 0.12


def test_steps_that_are_missing_are_not_drawn_and_the_last_is_the_last() -> None:
    states = np.random.default_rng(0).normal(size=(3, 3, 5))
    mask = np.array([[1, 1, 1], [1, 1, 0], [1, 0, 0]], bool)
    figure = trajectories(States.of(states, mask=mask))
    plane = plane_of(np.where(mask[..., None], states, 0), mask)
    (line,) = lines_of(figure)
    assert [x is None for x in line.x] == [False] * 3 + [True] + [False] * 2 + [True, False, True]
    by = {t.marker.symbol: list(zip(t.x, t.y, strict=True)) for t in figure.data if t.marker.symbol}
    assert {symbol: len(at) for symbol, at in by.items()} == {
        "circle-open": 2, "circle": 1, "square": 3,
    }  # fmt: skip
    ends = [plane.points[0, 2], plane.points[1, 1], plane.points[2, 0]]
    np.testing.assert_allclose(by["square"], ends)
    np.testing.assert_allclose(by["circle-open"], plane.points[:2, 0])


def test_lines_have_the_colour_of_their_label() -> None:
    states = np.random.default_rng(0).normal(size=(4, 2, 5))
    figure = trajectories(States.of(states, ["<a>", "b", "<a>", "b"]))
    one, two = lines_of(figure)
    assert (one.name, two.name) == ("&lt;a&gt;", "b")
    assert (one.line.color, two.line.color) == COLOURS[:2]
    plane = plane_of(states, np.ones((4, 2), bool))
    np.testing.assert_allclose(one.x[:2], plane.points[0, :, 0])
    np.testing.assert_allclose(one.x[3:5], plane.points[2, :, 0])
    assert has(pixels(figure), COLOURS[0]) > 20
    assert "2 <a>, 2 b" in figure.alt


def test_labels_of_each_step_colour_points_and_not_lines() -> None:
    states = np.random.default_rng(0).normal(size=(2, 2, 5))
    figure = trajectories(States.of(states), by=[["x", "y"], ["y", "x"]])
    (line,) = lines_of(figure)
    assert line.showlegend is False
    ys = [t for t in figure.data if t.name == "y"]
    plane = plane_of(states, np.ones((2, 2), bool))
    found = {(x, y) for t in ys for x, y in zip(t.x, t.y, strict=True)}
    assert found == {tuple(plane.points[0, 1]), tuple(plane.points[1, 0])}
    assert {t.marker.color for t in ys} == {COLOURS[1]}
    assert sum(t.showlegend for t in ys) == 1


def test_latents_of_a_run_lie_by_the_card_they_stand_for(lens: Any) -> None:
    """The organism's latents name cards: those of one name are closer than those of others."""
    examples = lens.task(n=24, seed=2).base
    run = lens.run(examples)
    names = [[lens.variables["name"](example, t) for t in range(2)] for example in examples]
    figure = trajectories(run, by=names)
    flat = np.array(names).ravel()
    points = plane_of(run.latents.numpy(), run.latent_mask.numpy()).points.reshape(-1, 2)
    apart = np.linalg.norm(points[:, None] - points[None], axis=-1)
    same = (flat[:, None] == flat[None]) & ~np.eye(len(flat), dtype=bool)
    assert apart[same].mean() < 0.7 * apart[~same].mean()
    mixed = np.random.default_rng(0).permutation(flat)
    same = (mixed[:, None] == mixed[None]) & ~np.eye(len(flat), dtype=bool)
    assert apart[same].mean() > 0.85 * apart[~same].mean()
    shown = {plain(t.name): t.marker.color for t in figure.data if t.mode == "markers"}
    assert len(set(shown.values())) == len(set(flat))


@pytest.mark.parametrize(
    ("call", "words_"),
    [
        (lambda: trajectories(States.of(np.ones((3, 2, 4)))), "all 6 states are equal"),
        (lambda: trajectories(States.of(np.ones((1, 1, 4)))), "1 states are too few"),
        (lambda: trajectories(States.of(np.eye(4)[None]), by=["a", "b"]), "2 labels came with 1"),
        (lambda: trajectories(States.of(np.eye(30)), by=range(30)), "30 different labels, and 27"),
        (lambda: trajectories(States.of(np.eye(4)), site="nowhere"), "no site 'nowhere'"),
    ],
)
def test_states_that_make_no_picture_are_refused(call: Any, words_: str) -> None:
    with pytest.raises(InputError, match=words_):
        call()


# ---- attention ---------------------------------------------------------------------------------


def test_shares_of_every_head_sum_to_one(lens: Any, run: Any) -> None:
    found = attention_shares(lens, run)
    assert found.regions == ("z0", "z1", "marker", "image", "text")
    assert found.shares.shape == (6, 3, 4, 5)
    np.testing.assert_allclose(found.shares.sum(-1), 1.0, atol=1e-6)
    assert found.counts.sum(1).tolist() == [26.0] * 6  # all up to the position itself
    for figure in (attention_to_latents(lens, run), attention_to_latents(lens, run, heads=False)):
        for panel in figure.data:
            np.testing.assert_allclose(np.array(panel.z, dtype=float).sum(1), 1.0, atol=1e-6)


def test_heads_that_copy_latents_look_at_them_and_masked_ones_do_not() -> None:
    reading, masked = planted.planted("chain"), planted.planted("masked")
    shares = [attention_shares(p.lens, p.lens.run(p.pairs.base)) for p in (reading, masked)]
    assert shares[0].regions[:3] == ("z0", "z1", "z2")
    to = shares[0].shares[:, 1].mean(0)  # block 1 copies each latent to the deciding position
    assert sorted(to[:, :3].argmax(1)[to[:, :3].max(1) > 0].tolist()) == [0, 1, 2]
    assert np.isin(to[:, :3], (0.0, 1.0)).all()
    assert (shares[1].to_latents[:, 1] == 0).all()


def test_padding_changes_nothing_and_gets_nothing(lens: Any, task: Any) -> None:
    short = {**task.base[0], "text": "start red then shape ?"}
    both = lens.run([task.base[1], short])
    assert (both.tokens.kind[1] == 0).any()
    batch = attention_shares(lens, both, at=il.latent[1])
    assert "pad" not in batch.regions
    alone = attention_shares(lens, lens.run([short]), at=il.latent[1])
    np.testing.assert_allclose(batch.shares[1], alone.shares[0], atol=1e-5)
    np.testing.assert_allclose(batch.shares.sum(-1), 1.0, atol=1e-6)


def test_examples_without_an_answer_are_left_out_and_said(task: Any) -> None:
    first = str(task.base_answers[0])

    def finder(text: str) -> tuple[int, int] | None:
        at = -1 if first in text else text.find(" ", 1)
        return None if at < 0 else (1, at)

    lens = il.load("latent-content", answer=finder)
    run = lens.run(task.base)
    missing = [row for row, answer in enumerate(run.answers) if answer is None]
    assert 0 < len(missing) < 6
    found = attention_shares(lens, run)
    assert not set(missing) & set(found.rows)
    figure = attention_to_latents(lens, run)
    assert f"{len(missing)} of 6 examples left out" in str(figure.layout.meta["marks"])
    with pytest.raises(InputError, match="none of the 1 examples"):
        attention_shares(lens, lens.run(task.base[:1]))


def test_layers_are_chosen_and_named(lens: Any, run: Any) -> None:
    figure = attention_to_latents(lens, run, layers=[2, 0], title="<t>")
    titles = [plain(note.text) for note in figure.layout.annotations]
    assert titles[:2] == ["layer 2", "layer 0"]
    whole = attention_shares(lens, run).shares.mean(0)
    np.testing.assert_allclose(np.array(figure.data[0].z, dtype=float), whole[2])
    with pytest.raises(InputError, match="layer 3 shows no"):
        attention_to_latents(lens, run, layers=[3])
    with pytest.raises(InputError, match="expected one to look from"):
        attention_shares(lens, run, at=il.latent)


def test_words_are_never_markup() -> None:
    assert words("<s>\n&") == "&lt;s&gt;<br>&amp;"


# ---- tokens ------------------------------------------------------------------------------------


def test_a_strip_names_every_token_once_in_order(run: Any) -> None:
    found = list(boxes(run.tokens, 0))
    whole = [token.index for box in found for token in box.tokens]
    assert whole == list(range(len(run.tokens[0])))
    labels = [box.label for box in found]
    assert "image 0: 3 x 3 = 9" in labels
    assert [label for label in labels if label in ("z0", "z1", "z2")] == ["z0", "z1"]
    assert labels[0] == "<|im_start|>"
    answer = next(box for box in found if box.kind == Kind.ANSWER)
    assert answer.label.strip("·") == run.answers[0]


def test_a_strip_is_drawn_in_the_colours_of_kinds(run: Any) -> None:
    figure = token_strip(run, example=1)
    image = pixels(figure)
    for kind in (Kind.TEXT, Kind.IMAGE, Kind.LATENT, Kind.ANSWER):
        assert has(image, FILLS[kind]) > 150, kind
    texts = [note.text for note in figure.layout.annotations]
    assert "&lt;|latent_start|&gt;" in [text.strip("·") for text in texts]
    assert len(texts) == len(figure.layout.shapes) == len(figure.data[0].customdata)
    ends = [(shape.x0, shape.x1) for shape in figure.layout.shapes]
    assert max(end for _, end in ends) <= figure.layout.xaxis.range[1]
    short = token_strip(run.tokens, example=1)
    assert short.alt == figure.alt
    with pytest.raises(InputError, match="no example 6 among 6"):
        token_strip(run, example=6)


def test_a_run_that_fed_nothing_back_has_no_latent_box(lens: Any, task: Any) -> None:
    plain_run = lens.run(task.base[0], latents=il.Skip())
    assert not [box for box in boxes(plain_run.tokens, 0) if box.label.startswith("z")]
    assert "latent" not in token_strip(plain_run).alt


def test_the_middle_of_a_long_text_is_one_box(lens: Any, task: Any) -> None:
    long = {**task.base[0], "text": " ".join(["then"] * 100)}
    tokens = lens.run(long).tokens
    found = list(boxes(tokens, 0))
    (hidden,) = [box for box in found if box.label.startswith("…")]
    assert hidden.label == f"… {len(hidden.tokens)} tokens …"
    assert sum(len(box.tokens) for box in found) == len(tokens[0])


def test_results_draw_themselves() -> None:
    states = States.of(np.random.default_rng(0).normal(size=(12, 2, 4)), ["a", "b"] * 6)
    assert states.plot().alt == trajectories(states).alt
