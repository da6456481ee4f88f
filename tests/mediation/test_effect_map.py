"""Maps of effects: hand-computed numbers, scipy and closed forms, laws, and what is refused."""

import sys
from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy import stats
from statsmodels.stats.multitest import multipletests

import imaginelens as il
from imaginelens.estimates import Estimate, EstimateError, equivalence_map, max_t
from imaginelens.mediation.cells import Cell
from imaginelens.mediation.effect_map import EffectMap
from imaginelens.mediation.map_merging import hash_of
from imaginelens.mediation.provenance import Provenance

NAN = float("nan")


def cells_of(layers: int = 3, steps: int = 2, site: str = "resid_post") -> tuple[Cell, ...]:
    return tuple(
        Cell(site, layer, f"latent[{step}]", None, (f"blocks.{layer}.hook_{site}",))
        for layer in range(layers)
        for step in range(steps)
    )


def origin(keys: tuple[str, ...], **words: Any) -> Provenance:
    known = Provenance(
        "Tiny", "abc", "float64", "cpu", (("torch", "2"),), 0, hash_of(keys), "y01 - y00", 5, 1.5
    )
    return replace(known, **words)


def a_map(n: int = 12, seed: int = 0, start: int = 0, **words: Any) -> EffectMap:
    """A map of 3 layers x 2 steps with random numbers."""
    rng = np.random.default_rng(seed)
    keys = tuple(f"pair {i}" for i in range(start, start + n))
    cells = words.pop("cells", cells_of())
    found = EffectMap(
        cells=cells,
        before=rng.normal(size=n),
        other=rng.normal(3, 1, n),
        after=rng.normal(size=(len(cells), n)),
        flags=np.zeros((len(cells), n), np.int8),
        change=rng.uniform(0.1, 1, (len(cells), n)),
        groups=None,
        metric="logit_diff",
        unit="logits",
        binary=False,
        direction="denoise",
        context="free",
        edit="Swap",
        sham=np.zeros(n),
        notes=("layer 2 took the slow path: windows of attention",),
        provenance=origin(keys),
        keys=keys,
    )
    return replace(found, **words)


def binary_map(n: int = 30, seed: int = 0, **words: Any) -> EffectMap:
    rng = np.random.default_rng(seed)
    plain = a_map(n, seed)
    return replace(
        plain,
        **{
            "before": (rng.random(n) < 0.2).astype(float),
            "other": (rng.random(n) < 0.9).astype(float),
            "after": (rng.random(plain.after.shape) < 0.6).astype(float),
            "metric": "source_answer",
            "unit": "share",
            "binary": True,
            **words,
        },
    )


# --- numbers --------------------------------------------------------------------------------------


def by_hand(**words: Any) -> EffectMap:
    """Two cells, four examples; before [1 2 nan 4]."""
    return a_map(
        n=4,
        cells=cells_of(2, 1),
        before=np.array([1.0, 2.0, NAN, 4.0]),
        other=np.array([3.0, 6.0, 5.0, 4.0]),
        after=np.array([[2.0, NAN, 1.0, 9.0], [0.0, 2.5, 1.0, 5.0]]),
        flags=np.array([[0, 0, 0, 2], [1, 0, 1, 3]], np.int8),
        **words,
    )


def test_effects_by_hand() -> None:
    found = by_hand()
    # unchanged rows have the effect 0, also where `after` says otherwise; missing ones are missing
    np.testing.assert_array_equal(found.effect, [[1.0, NAN, NAN, 0.0], [0.0, 0.5, NAN, NAN]])
    np.testing.assert_array_equal(found.outcome, [[2.0, NAN, 1.0, 4.0], [1.0, 2.5, NAN, NAN]])
    np.testing.assert_array_equal(found.mean, [[[0.5], [0.25]]])
    np.testing.assert_array_equal(found.total, [2.0, 4.0, NAN, 0.0])
    np.testing.assert_array_equal(found.recovery, [[[0.5], [0.25 / 3]]])  # 0.5/1, 0.25/3


def test_a_noising_map_has_the_same_total_effect() -> None:
    found = by_hand(direction="noise")
    np.testing.assert_array_equal(found.total, [-2.0, -4.0, NAN, 0.0])  # before is the source's
    denoised = a_map()
    noised = a_map(before=denoised.other, other=denoised.before, direction="noise")
    np.testing.assert_array_equal(noised.total, denoised.total)


def test_all_of_the_effect_is_1_when_denoising_and_minus_1_when_noising() -> None:
    plain = a_map()
    assert plain.other is not None
    full = np.tile(plain.other, (6, 1))
    np.testing.assert_allclose(replace(plain, after=full).recovery, 1.0)
    np.testing.assert_allclose(replace(plain, after=full, direction="noise").recovery, -1.0)


def test_recovery_compares_the_same_examples() -> None:
    found = replace(by_hand(), other=np.array([NAN, 6.0, 5.0, 5.0]))
    # cell 0: of effects 1, -, -, 0 only the last has a total, 1; cell 1: 0.5 of 4
    np.testing.assert_array_equal(found.recovery, [[[0.0], [0.125]]])


def test_no_effect_to_recover_is_nan() -> None:
    found = a_map()
    assert np.isnan(replace(found, other=found.before).recovery).all()


def test_axes_keep_what_has_meaning() -> None:
    found = a_map()
    assert found.axes == {
        "site": ("resid_post",),
        "layer": (0, 1, 2),
        "position": ("latent[0]", "latent[1]"),
    }
    assert found.values.shape == (1, 3, 2, 12)
    assert (found.n, len(found), next(iter(found))) == (12, 6, found.cells[0])
    np.testing.assert_array_equal(found.values[0, 2, 1], found.effect[5])
    lone = (Cell("hook_latent", None, "latent[0]", None, ("hook_latent",)),)
    assert list(a_map(cells=lone).axes) == ["site", "position"]
    heads = tuple(Cell("z", 1, "latent[0]", head, ()) for head in (3, 0))
    assert a_map(cells=heads).axes["head"] == (0, 3)
    np.testing.assert_array_equal(
        a_map(cells=heads).mean[0, 0, 0], a_map(cells=heads).effect.mean(1)[::-1]
    )


def test_cells_without_a_layer_stand_first_and_what_is_not_there_is_nan() -> None:
    cells = (*cells_of(2, 2)[:3], Cell("hook_latent", None, "latent[0]", None, ()))
    found = a_map(cells=cells)
    assert found.axes["layer"] == (None, 0, 1)
    assert np.isnan(found.mean).sum() == 2 * 3 * 2 - 4
    there = found["hook_latent", None, "latent[0]"]
    np.testing.assert_array_equal(there.values, found.effect[3])
    np.testing.assert_array_equal(found["hook_latent"].values, found.effect[3])


def test_dense_and_flat_undo_each_other() -> None:
    from imaginelens.mediation.map_axes import flat

    rng = np.random.default_rng(0)
    cells = tuple(cells_of(4, 3)[i] for i in rng.permutation(12)[:7])
    values = rng.normal(size=7)
    found = a_map(cells=cells)
    np.testing.assert_array_equal(flat(cells, found.axes, found.dense(values)), values)


# --- a cell is an estimate ------------------------------------------------------------------------


def test_a_cell_is_a_t_interval_for_numbers() -> None:
    found = a_map()
    estimate = found["resid_post", 1, "latent[1]"]
    values = found.after[3] - found.before
    theirs = stats.ttest_1samp(values, 0.0)
    assert estimate.value == pytest.approx(values.mean(), abs=1e-14)
    assert estimate.pvalue() == pytest.approx(theirs.pvalue, abs=1e-12)
    interval = theirs.confidence_interval(0.95)
    assert (estimate.ci().low, estimate.ci().high) == pytest.approx(tuple(interval), abs=1e-12)
    assert estimate.unit == "logits"
    assert estimate.name == "effect at resid_post, layer 1, latent[1]"


def test_a_cell_can_be_named_in_many_ways() -> None:
    found = a_map()
    one = found["resid_post", 1, "latent[1]"].values
    for same in (
        found["resid_post", 1, il.latent[1]],
        found["resid_post", 1, "il.latent[1]"],
        found["resid_post", np.int64(1), "latent[1]"],
        found[found.cells[3]],
        found.cell(layer=1, position="latent[1]"),
        found.cell(site="resid_post", layer=1, position=il.latent[1]),
        found.sel(layer=1, position=il.latent[1])["resid_post"],
    ):
        np.testing.assert_array_equal(same.values, one)


def test_a_cell_of_0_1_outcomes_is_a_score_test() -> None:
    found = binary_map()
    estimate = found["resid_post", 0, "latent[0]"]
    theirs = Estimate.paired(found.after[0], found.before)
    assert estimate.procedure == "Tango score"
    assert (estimate.ci().low, estimate.pvalue()) == (theirs.ci().low, theirs.pvalue())
    assert estimate.unit == ""


def test_an_edit_that_touched_nothing_has_no_effect_but_an_interval_if_0_1() -> None:
    found = binary_map(flags=np.ones((6, 30), np.int8))
    assert (found.effect == 0).all()
    interval = found["resid_post", 0, "latent[0]"].ci()
    assert interval.low < 0 < interval.high


def test_averages_of_0_1_outcomes_are_bounded() -> None:
    found = binary_map(binary=False, limits=(-1.0, 1.0))
    estimate = found["resid_post", 0, "latent[0]"]
    assert estimate.procedure == "bounded score"
    theirs = binary_map()["resid_post", 0, "latent[0]"]
    assert estimate.ci().low == pytest.approx(theirs.ci().low, abs=1e-6)


def test_groups_and_total_reach_the_estimates() -> None:
    groups = tuple(f"image {i // 2}" for i in range(24))
    found = a_map(24, groups=groups)
    estimate = found["resid_post", 0, "latent[0]"]
    theirs = Estimate.mean(found.effect[0], groups=groups)
    assert estimate.procedure == "cluster-robust t"
    assert estimate.pvalue() == theirs.pvalue()
    assert estimate.total is not None
    np.testing.assert_array_equal(estimate.total.values, found.total)
    margin = il.relative(0.5)
    theirs = Estimate.mean(found.effect[0], groups=groups, total=estimate.total)
    assert estimate.equivalence(margin).pvalue == theirs.equivalence(margin).pvalue


def test_recovery_is_the_ratio_with_fiellers_interval() -> None:
    found = a_map(direction="noise")
    ratio = found.recovery_at("resid_post", 2, "latent[0]")
    theirs = Estimate.ratio(found.effect[4], found.before - found.other)
    assert (ratio.value, ratio.ci().low) == (theirs.value, theirs.ci().low)
    assert ratio.value == pytest.approx(found.recovery[0, 2, 0], abs=1e-14)
    binary = binary_map()
    ratio = binary.recovery_at(binary.cells[0])
    assert ratio.procedure == "bounded Fieller"
    assert ratio.possible is not None
    assert sorted(map(tuple, ratio.possible.tolist())) == [
        (-1, -1), (-1, 0), (0, -1), (0, 0), (0, 1), (1, 0), (1, 1),
    ]  # fmt: skip
    noised = binary_map(direction="noise").recoveries[0]
    assert noised is not None
    assert noised.possible is not None
    assert (1, 1) not in set(map(tuple, noised.possible.tolist()))  # both are measured from before
    assert (1, -1) in set(map(tuple, noised.possible.tolist()))


def test_one_example_shows_a_mean_and_no_interval() -> None:
    found = a_map(1)
    assert found.mean.shape == (1, 3, 2)
    with pytest.raises(EstimateError, match="an interval needs 2"):
        found["resid_post", 0, "latent[0]"]
    assert found.estimates == (None,) * 6
    frame = found.to_dataframe()
    assert frame[["ci_low", "ci_high", "p", "recovery_ci_low"]].isna().all(axis=None)
    np.testing.assert_array_equal(frame["effect"], found.effect[:, 0])


def test_a_total_effect_that_cannot_be_told_is_no_obstacle() -> None:
    other = np.full(12, NAN)
    assert a_map(other=other)["resid_post", 0, "latent[0]"].total is None


# --- selection ------------------------------------------------------------------------------------


def test_sel_takes_values_and_lists() -> None:
    found = a_map()
    part = found.sel(layer=range(1, 3), position=["latent[1]"])
    assert [(cell.layer, cell.position) for cell in part] == [(1, "latent[1]"), (2, "latent[1]")]
    np.testing.assert_array_equal(part.effect, found.effect[[3, 5]])
    np.testing.assert_array_equal(part.change, found.change[[3, 5]])
    assert found.sel().cells == found.cells
    assert found.sel(site="resid_post", layer=np.array([0])).axes["layer"] == (0,)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda m: m["resid_post", 9, "latent[0]"], r"no layer 9 .* its layers are 0, 1, 2"),
        (lambda m: m["resid_mid", 0, "latent[0]"], "no site 'resid_mid'"),
        (lambda m: m["resid_post", 0], "2 cells of this map have site 'resid_post', layer 0"),
        (lambda m: m["resid_post", 0, "latent[0]", 1], "4 coordinates .* 3 axes: site, layer"),
        (lambda m: m[Cell("z", 0, "latent[0]", None, ())], "no cell z, layer 0"),
        (lambda m: m.cell(), "6 cells of this map have any coordinates"),
        (lambda m: m.cell(head=0), "no cell of this map has a head"),
        (lambda m: m.cell(position=il.latent[7]), r"no position 'latent\[7\]'"),
        (lambda m: m.sel(layer=[0, 5]), "no layer 5"),
        (lambda m: m.sel(layer=[]), r"no cell of this map has layer \[\]"),
        (lambda m: m.recovery_at("resid_post", 0), "2 cells"),
    ],
)
def test_a_cell_that_is_not_there_is_named(call: Any, words: str) -> None:
    with pytest.raises(il.InputError, match=words):
        call(a_map())


def test_a_combination_that_no_cell_has() -> None:
    found = a_map(cells=(*cells_of(2, 1), Cell("hook_latent", None, "latent[0]", None, ())))
    with pytest.raises(il.InputError, match="no cell of this map has site 'hook_latent', layer 1"):
        found.sel(site="hook_latent", layer=1)
    with pytest.raises(il.InputError, match="no cells of this map have site 'hook_latent', layer"):
        found["hook_latent", 1]


def test_many_coordinates_are_not_all_listed() -> None:
    with pytest.raises(il.InputError, match=r"\.\.\. \(20 in all\)"):
        a_map(cells=cells_of(20, 1))["resid_post", 99]


# --- all cells at once ----------------------------------------------------------------------------


def null_map(seed: int, effect: float = 0.0) -> EffectMap:
    """Correlated noise in 4 x 5 cells of 30 examples; the effect is in layer 2, step 3."""
    rng = np.random.default_rng(seed)
    shared, own = rng.normal(size=30), rng.normal(size=(20, 30))
    after = 0.7 * shared + 0.7 * own
    after[2 * 5 + 3] += effect
    return EffectMap.from_arrays(cells=cells_of(4, 5), before=np.zeros(30), after=after)


def test_a_map_without_effects_is_not_called_one() -> None:
    # at 5% a false finding is expected in 5 of 100 maps; 12 or more has probability < 0.005
    named = sum(bool(null_map(seed).adjust(draws=499, seed=seed).found()) for seed in range(100))
    assert named <= 11
    naive = sum(min(e.pvalue() for e in null_map(s).estimates if e) < 0.05 for s in range(100))
    assert naive >= 25  # what the correction saves from


@pytest.mark.parametrize("method", ["max_t", "holm", "bh", "by"])
def test_a_planted_cell_is_found(method: Any) -> None:
    found = null_map(3, effect=1.5).adjust(method)
    assert found.found() == (cells_of(4, 5)[13],)
    assert found.describe().startswith("1 of 20 cells differ from 0")
    assert "resid_post, layer 2, latent[3]: p " in repr(found)


def test_max_t_is_that_of_estimates_on_the_axes() -> None:
    found = null_map(1, effect=1.0)
    ours, theirs = found.adjust(draws=999, seed=4), max_t(found.effect.T, draws=999, seed=4)
    np.testing.assert_array_equal(ours.pvalues.ravel(), theirs.pvalues)
    low, high = ours.intervals()
    np.testing.assert_allclose(low.ravel(), theirs.intervals()[0])
    np.testing.assert_allclose(high.ravel(), theirs.intervals()[1])
    assert list(ours.by_cell.values()) == theirs.pvalues.tolist()
    frame = ours.to_dataframe()
    np.testing.assert_array_equal(frame["p_adjusted"], theirs.pvalues)
    np.testing.assert_allclose(frame["low"], theirs.intervals()[0])


@pytest.mark.parametrize(
    ("method", "theirs"), [("holm", "holm"), ("bh", "fdr_bh"), ("by", "fdr_by")]
)
def test_other_corrections_are_those_of_statsmodels(method: Any, theirs: str) -> None:
    found = null_map(1, effect=1.0)
    p = [stats.ttest_1samp(row, 0.0).pvalue for row in found.effect]
    expected = multipletests(p, method=theirs)[1]
    adjusted = found.adjust(method)
    np.testing.assert_allclose(adjusted.pvalues.ravel(), expected, atol=1e-12)
    assert list(adjusted.to_dataframe().columns[-1:]) == ["p_adjusted"]
    with pytest.raises(il.InputError, match="no intervals that hold together"):
        adjusted.intervals()


def test_cells_that_are_not_there_are_no_tests() -> None:
    cells = cells_of(4, 5)
    whole = null_map(1, effect=1.0)
    hole = EffectMap.from_arrays(cells=cells[:7], before=np.zeros(30), after=whole.after[:7])
    p = hole.adjust().pvalues
    assert (np.isnan(p).sum(), (~np.isnan(p)).sum()) == (3, 7)
    np.testing.assert_array_equal(
        list(hole.adjust().by_cell.values()), max_t(whole.effect[:7].T).pvalues
    )


def test_a_cell_without_values_has_no_pvalue() -> None:
    found = null_map(1)
    after = found.after.copy()
    after[4] = NAN
    for method in ("max_t", "holm"):
        adjusted = replace(found, after=after).adjust(method)  # type: ignore[arg-type]
        assert np.isnan(adjusted.by_cell[found.cells[4]])
        assert "of 19 cells" in adjusted.describe()


def test_intervals_of_contrasts_are_refused() -> None:
    found = binary_map() - binary_map(seed=1)
    assert "low" not in found.adjust().to_dataframe()
    with pytest.raises(il.InputError, match="contrasts of 0/1 outcomes"):
        found.adjust().intervals()


def test_equivalence_is_that_of_every_cell() -> None:
    numbers, zero_one = a_map(60), binary_map(60)
    for found, binary in ((numbers, False), (zero_one, True)):
        theirs = equivalence_map(found.effect.T, margin=0.4, binary=binary)
        ours = found.equivalence(0.4)
        np.testing.assert_array_equal(ours.pvalues.ravel(), theirs.pvalues)
        assert ours.margin == 0.4
    contrast = zero_one - binary_map(60, seed=1)
    p = [e.equivalence(0.4).pvalue for e in contrast.estimates if e is not None]
    np.testing.assert_array_equal(contrast.equivalence(0.4).pvalues.ravel(), p)
    with pytest.raises(EstimateError, match="margin"):
        contrast.equivalence(2.0)


def test_what_cannot_be_adjusted_is_refused() -> None:
    with pytest.raises(il.InputError, match="no method 'bonferroni'; use max_t, holm, bh, by"):
        a_map().adjust("bonferroni")  # type: ignore[arg-type]
    for method in ("max_t", "holm"):
        with pytest.raises(EstimateError, match="example"):
            a_map(1).adjust(method)  # type: ignore[arg-type]
    with pytest.raises(il.InputError, match="no error rate"):
        a_map().adjust().found(5.0)


# --- tables ---------------------------------------------------------------------------------------


def test_the_table_of_cells() -> None:
    found = by_hand()
    frame = found.to_dataframe()
    assert list(frame["layer"]) == [0, 1]
    counts = frame[["n", "missing", "not_emitted", "identical_donor", "not_measured"]]
    assert counts.to_numpy().tolist() == [[2, 2, 0, 1, 0], [2, 2, 2, 0, 1]]
    np.testing.assert_array_equal(frame["effect"], [0.5, 0.25])
    np.testing.assert_allclose(frame["recovery"], [0.5, 0.25 / 3])
    full = a_map().to_dataframe()
    estimate = a_map()[a_map().cells[2]]
    row = full.iloc[2]
    assert (row["ci_low"], row["ci_high"]) == (estimate.ci().low, estimate.ci().high)
    assert row["p"] == estimate.pvalue()
    assert row["change"] == pytest.approx(a_map().change[2].mean())


def test_recovery_is_in_the_table_only_where_it_is_known() -> None:
    assert "recovery" not in a_map(other=None).to_dataframe()
    weak = a_map(other=a_map().before + np.random.default_rng(5).normal(size=12))
    frame = weak.to_dataframe()
    unbounded = [e is None or bool(e.ci().unbounded) for e in weak.recoveries]
    assert any(unbounded)
    np.testing.assert_array_equal(frame["recovery_ci_low"].isna(), unbounded)


def test_the_long_table_has_every_example() -> None:
    frame = by_hand(groups=("a", "a", "b", "b")).to_dataframe(per_example=True)
    assert len(frame) == 8
    assert frame["group"].tolist() == ["a", "a", "b", "b"] * 2
    assert frame["key"].tolist()[4] == "pair 0"
    assert frame["flag"].tolist() == [
        "fired", "fired", "fired", "identical_donor",
        "not_emitted", "fired", "not_emitted", "not_measured",
    ]  # fmt: skip
    np.testing.assert_array_equal(frame["effect"], by_hand().effect.ravel())
    whole = a_map().to_dataframe(per_example=True).groupby(["layer", "position"])["effect"].mean()
    np.testing.assert_allclose(whole.to_numpy(), a_map().mean.ravel())


def test_a_layer_that_is_none_is_missing_in_the_table() -> None:
    cells = (*cells_of(1, 1), Cell("hook_latent", None, "latent[0]", None, ()))
    layers = a_map(cells=cells).to_dataframe()["layer"]
    assert (str(layers.dtype), layers.isna().tolist()) == ("Int64", [False, True])


def test_xarray_gets_the_axes() -> None:
    found = a_map(groups=tuple("ab" * 6))
    made = found.to_xarray()
    assert made.dims == ("site", "layer", "position", "example")
    np.testing.assert_array_equal(made.values, found.values)
    assert made.coords["layer"].values.tolist() == [0, 1, 2]
    assert made.coords["group"].dims == ("example",)
    assert made.coords["group"].values.tolist() == list("ab" * 6)
    assert len(made.coords["example"]) == 12
    assert (made.attrs["metric"], made.attrs["direction"]) == ("logit_diff", "denoise")
    np.testing.assert_allclose(made.mean("example").values, found.mean)
    chosen = made.sel(layer=1, position=found.axes["position"][0])
    first = next(k for k, c in enumerate(found.cells) if c.layer == 1)
    np.testing.assert_array_equal(chosen.values[0], found.effect[first])


def test_a_missing_xarray_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "xarray", None)
    with pytest.raises(ImportError, match=r"pip install xarray, or use map\.to_dataframe"):
        a_map().to_xarray()


def test_the_text_shows_means_and_what_must_be_known() -> None:
    shown = repr(a_map())
    assert "Swap; 1 site x 3 layers x 2 positions, 6 cells, 12 examples" in shown
    assert "mean effect on logit_diff (logits), denoise, free context" in shown
    assert "by at most 0" in shown
    assert "note: layer 2 took the slow path" in shown
    assert "float64, cpu" in shown
    rows = [line.split() for line in shown.splitlines() if line.strip().startswith("layer ")]
    assert [row[1] for row in rows] == ["2", "1", "0"]  # the lowest layer at the bottom
    assert float(rows[0][2]) == pytest.approx(a_map().mean[0, 2, 0], rel=5e-3)
    assert "single example" not in shown


def test_the_text_marks_what_is_weak() -> None:
    assert "single example: no interval and no test" in repr(a_map(1))
    assert "no controls" in repr(a_map(sham=None))
    shown = repr(by_hand())
    assert "2 of 8 cell x example had no state there; effect 0 (not_emitted)" in shown
    assert "1 of 8 cell x example got a state equal to their own" in shown
    assert "1 of 8 cell x example were not measured" in shown
    assert "3 of 8 cell x example are missing: no answer was found" in shown


def test_the_text_stays_small() -> None:
    shown = repr(a_map(2, cells=cells_of(80, 60)))
    assert len(shown.splitlines()) < 25
    assert max(map(len, shown.splitlines())) < 140
    assert "layer 79" in shown
    assert "layer 0" in shown
    assert "layer 40" not in shown
    assert "latent[59]" in shown


def test_the_text_of_heads_and_of_several_sites() -> None:
    heads = tuple(Cell("z", 1, p, h, ()) for p in ("latent[0]", "image") for h in range(3))
    shown = repr(a_map(cells=(*heads, Cell("resid_post", 1, "image", None, ()))))
    assert "z, latent[0] (and 1 more site)" in shown
    assert "head 2" in shown
    first = (Cell("resid_post", 1, "image", None, ()), *heads)
    assert "image" in repr(a_map(cells=first))
    assert "whole" not in repr(a_map(cells=first))
    lone = tuple(Cell("hook_latent", None, f"latent[{t}]", None, ()) for t in range(2))
    assert "hook_latent" in repr(a_map(cells=lone))


# --- arithmetic -----------------------------------------------------------------------------------

numbers = st.floats(-1e3, 1e3, allow_nan=False)


@given(arrays(np.float64, (3, 6, 4), elements=numbers))
@settings(deadline=None, max_examples=30)
def test_laws_of_arithmetic(tables: np.ndarray) -> None:
    a, b, c = (a_map(4, after=after) for after in tables)
    e = [each.effect for each in (a, b, c)]
    np.testing.assert_array_equal((a - b).effect, e[0] - e[1])
    np.testing.assert_array_equal((a + b).effect, (b + a).effect)
    np.testing.assert_array_equal((a - b).effect, (-(b - a)).effect)
    np.testing.assert_array_equal((a - a).effect, np.zeros((6, 4)))
    np.testing.assert_array_equal((a * 2).effect, (a + a).effect)
    np.testing.assert_array_equal((2 * a).effect, (a * 2).effect)
    np.testing.assert_allclose(((a + b) + c).effect, (a + (b + c)).effect, atol=1e-9)
    np.testing.assert_allclose((a - b).mean, a.mean - b.mean, atol=1e-9)


def test_a_difference_says_what_it_is() -> None:
    a, b = a_map(), a_map(seed=1, direction="noise", context="fixed", edit="Noise")
    found = a - b
    assert found.notes[0] == (
        "this map is A - B, example by example; A is Swap (denoise, free context, Tiny); B is "
        "Noise (noise, fixed context, Tiny)"
    )
    assert found.notes[1].startswith("A: layer 2")
    assert (found.direction, found.context) == ("mixed", "mixed")
    assert (found.edit, found.other) == ("(Swap) - (Noise)", None)
    assert found.provenance.formula == "(y01 - y00) - (y01 - y00)"
    assert (found.provenance.forwards, found.provenance.model) == (10, "Tiny")
    np.testing.assert_array_equal(found.before, 0)
    with pytest.raises(il.InputError, match="no total effect to compare with"):
        found.recovery  # noqa: B018
    other = a - a_map(provenance=origin(a.keys, model="Other", seed=3))
    assert other.provenance.model == "Tiny | Other"
    assert (a - b).sham is not None
    assert (a - replace(b, sham=None)).sham is None


def test_the_order_of_cells_does_not_matter() -> None:
    a = a_map()
    turned = np.arange(6)[::-1]
    b = replace(
        a,
        cells=a.cells[::-1],
        **{name: getattr(a, name)[turned] for name in ("after", "flags", "change")},
    )
    np.testing.assert_array_equal((a - b).effect, np.zeros((6, 12)))


def test_differences_of_0_1_outcomes_stay_bounded() -> None:
    a, b = binary_map(), binary_map(seed=1)
    difference, total = a - b, a + b + a
    assert (difference.binary, difference.limits, total.limits) == (False, (-2.0, 2.0), (-3.0, 3.0))
    assert ((-a).limits, (a * -3).limits, (difference * 0.5).limits) == (
        (-1.0, 1.0), (-3.0, 3.0), (-1.0, 1.0),
    )  # fmt: skip
    assert replace(a, binary=False, limits=(-1.0, 2.0)).__neg__().limits == (-2.0, 1.0)
    mixed = replace(a, binary=False, limits=(-1.0, 2.0)) - b
    assert mixed.limits == (-2.0, 3.0)
    assert (b - replace(a, binary=False, limits=(-1.0, 2.0))).limits == (-3.0, 2.0)
    estimate = difference["resid_post", 0, "latent[0]"]
    assert estimate.procedure == "bounded score"
    none = (a - a)["resid_post", 0, "latent[0]"].ci()
    assert none.low < 0 < none.high  # equal in all examples proves little
    assert (a - replace(a, binary=False)).limits is None


def test_flags_of_a_difference() -> None:
    flags = np.array([[0, 1, 1, 3], [0, 2, 0, 2]], np.int8)
    theirs = np.array([[1, 1, 2, 0], [3, 2, 0, 0]], np.int8)
    a = a_map(4, cells=cells_of(2, 1), flags=flags)
    b = a_map(4, seed=1, cells=cells_of(2, 1), flags=theirs)
    found = a - b
    assert found.flags.tolist() == [[0, 1, 0, 3], [3, 2, 0, 0]]
    np.testing.assert_array_equal(found.effect, a.effect - b.effect)
    np.testing.assert_array_equal((a * 3).effect, 3 * a.effect)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ({"metric": "prob"}, "differ in metric, 'logit_diff' and 'prob'"),
        ({"unit": "bits"}, "differ in unit, 'logits' and 'bits'"),
        ({"n": 11}, "differ in the number of examples, 12 and 11"),
        ({"start": 1}, "differ in example 0, 'pair 0' and 'pair 1'"),
        ({"keys": (), "provenance": origin(("x",))}, "differ in their inputs"),
        ({"groups": tuple("ab" * 6)}, "differ in the groups"),
        ({"cells": cells_of(2, 2)}, r"has the cell resid_post, layer 2, latent\[0\] \(2 such"),
        ({"cells": cells_of(3, 3)}, r"has the cell resid_post, layer 0, latent\[2\] \(3 such"),
    ],
)
def test_maps_that_do_not_fit_are_refused(words: dict[str, Any], said: str) -> None:
    for combine in (lambda a, b: a - b, lambda a, b: a + b):
        with pytest.raises(il.InputError, match=said):
            combine(a_map(), a_map(**words))


@pytest.mark.parametrize("factor", [NAN, float("inf"), 0])
def test_factors_that_say_nothing_are_refused(factor: float) -> None:
    with pytest.raises(il.InputError, match="give a finite number other than 0"):
        a_map() * factor


@pytest.mark.parametrize("wrong", ["2", None, True, [1.0]])
def test_arithmetic_with_other_things_is_no_arithmetic(wrong: Any) -> None:
    for combine in (lambda a: a * wrong, lambda a: a - wrong, lambda a: wrong + a):
        with pytest.raises(TypeError):
            combine(a_map())


# --- maps together --------------------------------------------------------------------------------


def part(whole: EffectMap, rows: slice) -> EffectMap:
    """Some examples of a map, as a shard of a study has them."""
    keys = whole.keys[rows]
    return replace(
        whole,
        before=whole.before[rows],
        other=None if whole.other is None else whole.other[rows],
        after=whole.after[:, rows],
        flags=whole.flags[:, rows],
        change=whole.change[:, rows],
        groups=None if whole.groups is None else whole.groups[rows],
        sham=None if whole.sham is None else whole.sham[rows],
        keys=keys,
        provenance=origin(keys, forwards=1, seconds=0.5),
    )


def same(one: EffectMap, two: EffectMap) -> bool:
    """Whether two maps are equal to the last bit, with the places of nan."""
    return all(
        a.tobytes() == b.tobytes() and a.dtype == b.dtype and a.shape == b.shape
        if isinstance(a, np.ndarray) and isinstance(b, np.ndarray)
        else a == b
        for a, b in (
            (getattr(one, name), getattr(two, name)) for name in EffectMap.__dataclass_fields__
        )
    )


def test_parts_make_the_whole() -> None:
    groups = tuple("abcd" * 3)
    whole = a_map(groups=groups, sham=np.arange(12.0))
    parts = [part(whole, slice(0, 5)), part(whole, slice(5, 6)), part(whole, slice(6, 12))]
    expected = replace(whole, provenance=origin(whole.keys, forwards=3, seconds=1.5))
    assert same(EffectMap.merge(parts), expected)
    assert same(EffectMap.merge([whole]), whole)
    assert not same(EffectMap.merge(parts[::-1]), expected)  # in the order given


def test_parts_may_have_their_cells_in_another_order() -> None:
    whole = a_map()
    later = part(whole, slice(5, 12))
    turned = replace(
        later,
        cells=later.cells[::-1],
        **{name: getattr(later, name)[::-1] for name in ("after", "flags", "change")},
    )
    merged = EffectMap.merge([part(whole, slice(0, 5)), turned])
    np.testing.assert_array_equal(merged.after, whole.after)


def test_cells_of_the_same_examples_are_united() -> None:
    whole = a_map(sham=np.linspace(-1, 1, 12))
    parts = [whole.sel(layer=0), whole.sel(layer=[1, 2])]
    merged = EffectMap.merge([replace(parts[0], sham=np.zeros(12)), parts[1]])
    assert merged.cells == whole.cells
    np.testing.assert_array_equal(merged.effect, whole.effect)
    np.testing.assert_array_equal(merged.sham, whole.sham)  # the worse control stands
    assert merged.provenance.forwards == 10
    assert EffectMap.merge([replace(parts[0], sham=None), parts[1]]).sham is None
    unknown = EffectMap.merge([replace(parts[0], sham=np.full(12, NAN)), parts[1]]).sham
    assert unknown is not None
    assert np.isnan(unknown).all()


def test_a_grid_of_parts_makes_the_whole() -> None:
    whole = a_map()
    parts = [
        part(whole, rows).sel(layer=layers)
        for layers in ([0], [1, 2])
        for rows in (slice(0, 5), slice(5, 12))
    ]
    merged = EffectMap.merge(parts)
    assert merged.keys == whole.keys
    np.testing.assert_array_equal(merged.values, whole.values)


def test_parts_without_keys_are_told_apart_by_their_inputs() -> None:
    whole = a_map()
    parts = [replace(part(whole, rows), keys=()) for rows in (slice(0, 5), slice(5, 12))]
    merged = EffectMap.merge(parts)
    np.testing.assert_array_equal(merged.after, whole.after)
    assert merged.provenance.inputs == hash_of(p.provenance.inputs for p in parts)
    with pytest.raises(il.InputError, match="both have the cell resid_post, layer 0"):
        EffectMap.merge([parts[0], parts[0]])


def test_a_part_without_control_leaves_nan() -> None:
    whole = a_map()
    parts = [part(whole, slice(0, 5)), replace(part(whole, slice(5, 12)), sham=None)]
    sham = EffectMap.merge(parts).sham
    assert sham is not None
    assert np.isnan(sham).tolist() == [False] * 5 + [True] * 7
    assert EffectMap.merge([replace(p, sham=None) for p in parts]).sham is None


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ({"metric": "prob"}, "maps 0 and 1 differ in metric, 'logit_diff' and 'prob'"),
        ({"context": "fixed"}, "differ in context"),
        ({"direction": "noise"}, "differ in direction"),
        ({"edit": "Zero"}, "differ in edit"),
        ({"provenance": origin(("z",), model="Other")}, "differ in model, 'Tiny' and 'Other'"),
        ({"provenance": origin(("z",), seed=1)}, "differ in seed, 0 and 1"),
        ({"other": None}, "only map 0 has other"),
        ({"groups": tuple("ab" * 6)}, "only map 1 has groups"),
        ({"keys": ()}, "only map 0 has keys"),
        ({"start": 11}, "share 1 examples, the first is 'pair 11', and not all"),
        ({"start": 0}, r"same examples both have the cell resid_post, layer 0, latent\[0\]"),
        ({"cells": cells_of(3, 3)}, r"has the cell resid_post, layer 0, latent\[2\]"),
        ({"cells": tuple(replace(c, sites=("x", "y")) for c in cells_of())}, "x, y in another"),
    ],
)
def test_parts_of_different_studies_are_refused(words: dict[str, Any], said: str) -> None:
    with pytest.raises(il.InputError, match=said):
        EffectMap.merge([a_map(), a_map(**{"start": 12, **words})])


def test_united_cells_must_have_the_same_unedited_runs() -> None:
    one, two = a_map().sel(layer=0), a_map().sel(layer=1)
    before = two.before.copy()
    before[3] = 7
    with pytest.raises(il.InputError, match=r"differ in before of example 3, .* and 7"):
        EffectMap.merge([one, replace(two, before=before)])
    with pytest.raises(il.InputError, match="differ in groups"):
        EffectMap.merge(
            [replace(one, groups=tuple("ab" * 6)), replace(two, groups=tuple("ba" * 6))]
        )
    with pytest.raises(il.InputError, match="no map was given"):
        EffectMap.merge([])


@cache
def lens() -> Any:
    return il.load("latent-ignored")


def test_the_hash_of_keys_is_that_of_provenance() -> None:
    words: dict[str, Any] = {"seed": 0, "formula": "", "forwards": 0, "seconds": 0.0}
    assert Provenance.of(lens(), keys=["a", "b"], **words).inputs == hash_of(["a", "b"])


# --- what is refused ------------------------------------------------------------------------------


def unchecked(found: EffectMap, **words: Any) -> EffectMap:
    """A map as a user makes it, whose annotations nobody checks."""
    made = object.__new__(EffectMap)
    for name in EffectMap.__dataclass_fields__:
        object.__setattr__(made, name, words.get(name, getattr(found, name)))
    return made


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ({"cells": ()}, "needs cells, and none came"),
        ({"cells": cells_of()[:1] * 6}, r"resid_post, layer 0, latent\[0\] comes twice"),
        ({"before": np.zeros((2, 6))}, r"before has shape \(2, 6\), expected one value"),
        ({"before": np.zeros(0)}, "at least one example"),
        ({"after": np.zeros((6, 11))}, r"after has shape \(6, 11\) .* expected \(6, 12\)"),
        ({"after": np.zeros((6, 12), np.float32)}, "dtype float32, expected .* float64"),
        ({"flags": np.zeros((6, 12), np.int64)}, "dtype int64, expected .* int8"),
        ({"flags": np.full((6, 12), 4, np.int8)}, "flags holds 4, expected 0 .fired., 1"),
        ({"flags": np.full((6, 12), -1, np.int8)}, "flags holds -1"),
        ({"change": np.zeros((12, 6))}, "change has shape"),
        ({"other": np.zeros(3)}, r"other has shape \(3,\)"),
        ({"sham": np.zeros(3)}, r"sham has shape \(3,\)"),
        ({"groups": ("a",)}, "1 groups came with 12 examples"),
        ({"groups": ()}, "0 groups came with 12 examples"),
        ({"keys": ("a",)}, "1 keys came with 12 examples"),
        ({"direction": "clean"}, "direction is 'clean', expected one of denoise, noise"),
        ({"context": "open"}, "context is 'open'"),
        ({"before": np.full(12, np.inf)}, r"before is inf at \(0,\)"),
        ({"after": np.full((6, 12), -np.inf)}, r"after is -inf at \(0, 0\)"),
        ({"binary": True}, "is not 0 or 1; leave out binary=True"),
        ({"limits": (0.0, 1.0)}, "on both sides of 0"),
        ({"limits": (-1e-6, 1e-6)}, "beyond its limits"),
    ],
)
def test_what_is_no_map_is_refused(words: dict[str, Any], said: str) -> None:
    with pytest.raises(il.InputError, match=said):
        unchecked(a_map(), **words).__post_init__()


def test_limits_are_not_for_0_1_outcomes() -> None:
    with pytest.raises(il.InputError, match="limits came with binary=True"):
        binary_map(limits=(-1.0, 1.0))


def test_what_is_no_number_is_refused() -> None:
    with pytest.raises(il.InputError, match="after cannot be read as numbers"):
        EffectMap.from_arrays(cells=cells_of(), before=[0.0], after=[["x"]] * 6)


def test_arrays_make_a_map() -> None:
    found = EffectMap.from_arrays(
        cells=cells_of(1, 1),
        before=[0, 1],
        after=[[1, None]],
        other=[1, 1],
        groups=["a", "b"],
        binary=True,
        keys=["x", "y"],
    )
    assert found.groups == ("a", "b")
    np.testing.assert_array_equal(found.effect, [[1.0, NAN]])
    assert found.provenance.inputs == hash_of(["x", "y"])
