"""Figures of probes and lenses show the numbers of their results, and chance as white."""

import numpy as np
import pytest

import imaginelens as il
from imaginelens.hooks.errors import InputError
from imaginelens.probes.lens_table import LensTable
from imaginelens.view.static import plain


@pytest.fixture(scope="module")
def states() -> il.probes.States:
    """A label that is read at step 1 only."""
    rng = np.random.default_rng(0)
    y = np.repeat([0, 1], 30)
    values = rng.normal(size=(60, 2, 2, 16))
    values[:, 1] += 4 * y[:, None, None]
    return il.probes.States.of(values, y, sites=["hook_latent", "blocks.0.hook_resid_post"])


def test_a_probe_map_shows_its_accuracies_and_outlines_what_decodes(
    states: il.probes.States,
) -> None:
    found = il.probes.probe_map(states)
    figure = found.plot()
    first = figure.data[0]
    np.testing.assert_array_equal(np.array(first.z, dtype=float), found.accuracy.T)
    lines = [trace for trace in figure.data if trace.type == "scatter"]
    assert len(lines) == 1  # only the accuracies have outlines, not the controls
    assert sum(x is None for x in lines[0].x) == int(found.decodable().sum()) == 2
    titles = [plain(note.text) for note in figure.layout.annotations]
    assert titles == ["accuracy", *found.controls]
    assert "p = " in plain(first.customdata[0][1])


def test_chance_is_white_and_the_scale_ends_where_accuracies_do(states: il.probes.States) -> None:
    axis = il.probes.probe_map(states).plot().layout.coloraxis
    assert (axis.cmin, axis.cmax) == (0.0, 1.0)
    middle = min(axis.colorscale, key=lambda stop: abs(stop[0] - 0.5))  # two classes: chance 1/2
    red, green, blue = (int(c) for c in middle[1][4:-1].split(","))
    assert min(red, green, blue) > 235
    ends = axis.colorscale[0][1], axis.colorscale[-1][1]
    assert ends == ("rgb(103, 0, 31)", "rgb(5, 48, 97)")


def test_without_controls_the_figure_says_so(states: il.probes.States) -> None:
    figure = il.probes.probe_map(states, controls=False).plot()
    assert figure.layout.meta["marks"] == ["no controls"]


def test_matrices_are_those_of_the_result_in_the_order_asked_for(
    states: il.probes.States,
) -> None:
    found = il.probes.similarity(states)
    order = list(range(59, -1, -1))
    figure = found.plot(kind="centred", order=order)
    drawn = np.array(figure.data[1].z, dtype=float)
    np.testing.assert_allclose(drawn, found.inter(1).centred[::-1, ::-1], atol=5e-4)
    assert len(figure.data) == 2
    assert plain(figure.layout.xaxis.ticktext[0]) == "59"


def test_curves_have_a_point_for_each_step_with_its_interval(states: il.probes.States) -> None:
    found = il.probes.similarity(states)
    figure = il.view.similarity_curves(found)
    curve = found.curve()
    assert list(figure.data[0].y) == [curve[s].value for s in (0, 1)]
    high = np.add(figure.data[0].y, figure.data[0].error_y.array)
    np.testing.assert_allclose(high, [curve[s].ci().high for s in (0, 1)])
    assert figure.png()[:4] == b"\x89PNG"


def table(text: str) -> LensTable:
    shape = (1, 2, 1, 1)
    return LensTable(
        kind="logit lens", at="latent", sites=("hook_latent",),
        token_ids=np.zeros(shape, dtype=np.int64), probabilities=np.full(shape, 0.5),
        entropy=np.zeros(shape[:3]), mask=np.array([[True, False]]), watched=(),
        ranks=np.zeros((*shape[:3], 0), dtype=np.int64),
        watched_probabilities=np.zeros((*shape[:3], 0)),
        texts={0: text},
    )  # fmt: skip


def test_a_token_that_is_a_script_is_written_out() -> None:
    figure = table("<script>").plot()
    words = figure.data[0].text[0][0]
    assert "<script" not in words
    assert plain(words).startswith("<script>")
    assert len(figure.data[0].z[0]) == 1  # only the step that the example has


def test_a_lens_table_without_that_example_is_refused() -> None:
    with pytest.raises(InputError, match="no example 3"):
        table("a").plot(example=3)
