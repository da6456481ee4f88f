"""Faithfulness curves: the published closed forms, and gates of which one input is enough."""

import numpy as np
import planted
import pytest

import imaginelens as il
from imaginelens.estimates import Estimate
from imaginelens.mediation.attribute import attribute
from imaginelens.mediation.faithfulness import SHARES, FaithfulnessCurve, faithfulness_curve
from imaginelens.mediation.sweep import sweep

RNG = np.random.default_rng(0)
NONE, WHOLE = RNG.normal(size=8), RNG.normal(size=8) + 3
N = 6


def curve(f: np.ndarray, **words: object) -> FaithfulnessCurve:
    kept = NONE + np.asarray(f)[:, None] * (WHOLE - NONE)
    return FaithfulnessCurve.from_arrays(kept=kept, none=NONE, whole=WHOLE, **words)


@pytest.mark.parametrize(
    ("f", "cpr", "cmd"),
    [
        (np.ones(10), 0.999, 0.0),
        (np.array(SHARES), 0.4999995, 0.4990005),
        (np.zeros(10), 0.0, 0.999),
        (np.full(10, 2.0), 1.998, 0.999),
    ],
)
def test_closed_forms(f: np.ndarray, cpr: float, cmd: float) -> None:
    found = curve(f)
    assert found.cpr.value == pytest.approx(cpr, abs=1e-12)
    assert found.cmd == pytest.approx(cmd, abs=1e-12)
    assert np.allclose(found.f, f, rtol=0, atol=1e-12)
    if f.std() == 0:  # every example has the same f, so that its ratio is known exactly
        assert found.cpr.ci().high - found.cpr.ci().low < 1e-6


def test_f_is_a_ratio_of_means_and_not_a_mean_of_ratios() -> None:
    kept = np.array([[1.0, 1.0], [1.0, 2.0]])
    found = FaithfulnessCurve.from_arrays(
        kept=kept, none=[0.0, 0.0], whole=[1.0, 4.0], shares=(0.5, 1.0)
    )
    assert np.allclose(found.f, [2 / 5, 3 / 5])
    assert not np.allclose(found.f, (kept / [1.0, 4.0]).mean(1))


def test_the_area_is_the_trapezoid_and_its_interval_is_fiellers() -> None:
    kept = NONE + RNG.uniform(0, 1.3, size=(10, 8)) * (WHOLE - NONE)
    found = FaithfulnessCurve.from_arrays(kept=kept, none=NONE, whole=WHOLE)
    assert found.cpr.value == pytest.approx(np.trapezoid(found.f, SHARES), abs=1e-12)
    assert found.cmd == pytest.approx(np.trapezoid(abs(1 - found.f), SHARES), abs=1e-12)
    areas = np.array([np.trapezoid(k, SHARES) for k in (kept - NONE).T])
    wanted = Estimate.ratio(areas, WHOLE - NONE).ci()
    assert found.cpr.ci().low == pytest.approx(wanted.low, abs=1e-12)
    assert found.cpr.ci().low < found.cpr.value < found.cpr.ci().high


def test_missing_examples_are_left_out_of_all_shares() -> None:
    kept = np.tile(WHOLE, (10, 1))
    kept[3, 2] = np.nan
    found = FaithfulnessCurve.from_arrays(kept=kept, none=NONE, whole=WHOLE)
    assert found.cpr.n == 7
    assert np.array_equal(found.f, np.ones(10))
    table = found.to_dataframe()
    assert list(table.columns) == ["share", "cells", "f", "ci_low", "ci_high"]
    assert len(table) == 10


def test_where_nothing_changes_there_is_no_faithfulness() -> None:
    found = FaithfulnessCurve.from_arrays(
        kept=np.zeros((2, 4)), none=np.zeros(4), whole=np.zeros(4), shares=(0.5, 1.0)
    )
    assert np.isnan(found.f).all()
    assert found.cpr.ci().unbounded
    unknown = FaithfulnessCurve.from_arrays(kept=[[np.nan] * 8] * 10, none=NONE, whole=WHOLE)
    assert np.isnan(unknown.f).all()


def planted_curve(kind: str, shares: tuple[float, ...], **words: object) -> FaithfulnessCurve:
    p = planted.planted(kind, xs0=np.linspace(-0.5, 0.25, N), xs1=np.linspace(1, 2, N))
    given = {"sites": "hook_latent", "context": "fixed", **words}
    effects = sweep(p.lens, p.pairs, **given)
    metric = {"metric": given["metric"]} if "metric" in given else {}
    return faithfulness_curve(p.lens, p.pairs, effects, shares=shares, **metric)


def test_of_gates_one_input_keeps_the_answer_or_does_not() -> None:
    """An AND of which one input stays false is false; an OR turns true by either."""
    for kind, wanted in (("and_gate", 1.0), ("or_gate", 0.0)):
        found = planted_curve(kind, (0.4, 0.5, 1.0))
        assert found.counts == (0, 1, 2)
        assert np.allclose(found.f, [0.0, wanted, 1.0], rtol=0, atol=1e-12)
        noised = planted_curve(kind, (0.4, 0.5, 1.0), direction="noise")
        assert np.allclose(noised.f, [0.0, 1 - wanted, 1.0], rtol=0, atol=1e-12)


@pytest.mark.parametrize("metric", [il.logit_diff, il.source_answer])
def test_of_a_chain_steps_add_up_in_their_order(metric: il.Metric) -> None:
    p = planted.planted("chain", xs0=np.linspace(-0.5, 0.25, N), xs1=np.linspace(1, 2, N))
    found = planted_curve("chain", (0.3, 0.5, 0.7, 1.0), metric=metric)
    assert found.counts == (0, 1, 2, 3)
    order = [int(cell.position[7]) for cell in found.cells]
    if metric is il.logit_diff:
        effects = p.truth["single_fixed_denoise"][list(found.tested)]
        assert order == np.argsort(-p.truth["single_fixed_denoise"].mean(0)).tolist()
        wanted = np.cumsum(effects.mean(0)[order]) / effects.mean(0).sum()
        assert np.allclose(found.f, [0.0, *wanted], rtol=0, atol=1e-12)
    else:
        assert found[1.0].procedure == "bounded Fieller"
    assert found[1.0].value == 1.0
    assert found.tested == tuple(sorted(found.tested))
    assert len(found.tested) == N // 2


def test_cells_are_ordered_by_an_attribution_as_well() -> None:
    p = planted.planted("chain", xs0=np.linspace(-0.5, 0.25, N), xs1=np.linspace(1, 2, N))
    exact = sweep(p.lens, p.pairs, sites="hook_latent", context="fixed")
    linear = attribute(p.lens, p.pairs, sites="hook_latent").to_map()
    one, two = (faithfulness_curve(p.lens, p.pairs, e, shares=(0.4, 1)) for e in (exact, linear))
    assert np.allclose(one.f, two.f, rtol=0, atol=1e-12)
    assert [c.position for c in one.cells] == [c.position for c in two.cells]


def test_the_organism_keeps_its_answer_by_one_of_six_cells() -> None:
    lens = il.load("latent-content")
    task = lens.task(n=16, seed=1)
    found = faithfulness_curve(
        lens, task, sweep(lens, task, context="fixed"), shares=(0.1, 0.2, 0.5, 1.0)
    )
    assert found.counts == (0, 1, 3, 6)
    assert found.f[1] > 0.8
    assert "FaithfulnessCurve of 6 cells, n=8" in str(found)


@pytest.mark.parametrize("shares", [(0.5,), (0.0, 1.0), (0.5, 0.2), (0.5, 0.5), (0.5, 1.1)])
def test_shares_that_do_not_rise_are_refused(shares: tuple[float, ...]) -> None:
    with pytest.raises(il.InputError, match="rising"):
        curve(np.ones(len(shares)), shares=shares)


def test_shapes_that_do_not_fit_are_refused() -> None:
    with pytest.raises(il.InputError, match="kept has shape"):
        FaithfulnessCurve.from_arrays(kept=np.zeros((9, 8)), none=NONE, whole=WHOLE)
    with pytest.raises(il.InputError, match=r"there is no share 0\.3"):
        curve(np.ones(10))[0.3]
