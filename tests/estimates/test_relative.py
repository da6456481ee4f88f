"""Margins relative to the total effect: the ratio test for numbers, the split one for 0/1."""

import numpy as np
import pytest
from scipy import stats

from imaginelens.estimates import Estimate, EstimateError, Relative, relative


def test_it_is_a_share() -> None:
    assert relative(0.05) == Relative(0.05)
    assert str(relative(0.125)) == "12.5% of the total effect"
    for wrong in (0.0, 1.0, 5, -0.05, float("nan"), float("inf")):
        with pytest.raises(EstimateError, match="no share of the total effect"):
            relative(wrong)


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_it_is_two_tests_of_contrasts(sign: float) -> None:
    rng = np.random.default_rng(0)
    total = sign * rng.normal(2.0, 1.0, size=60)
    part = rng.normal(0.0, 0.3, size=60)
    found = Estimate.mean(part, total=Estimate.mean(total)).equivalence(relative(0.1))
    size = sign * 0.1 * total
    lower = stats.ttest_1samp(part + size, 0.0, alternative="greater").pvalue
    upper = stats.ttest_1samp(part - size, 0.0, alternative="less").pvalue
    assert (found.lower_p, found.upper_p) == pytest.approx((lower, upper))
    assert found.pvalue == max(found.lower_p, found.upper_p)


def test_it_uses_that_effect_and_total_go_together() -> None:
    """An effect that is 8% of every total is within 10%, however much the totals vary."""
    total = np.random.default_rng(1).normal(1.0, 0.9, size=80)
    effect = Estimate.mean(0.08 * total, total=Estimate.mean(total))
    assert effect.equivalence(relative(0.1)).equivalent
    assert not effect.equivalence(relative(0.079)).equivalent
    apart = 0.1 * Estimate.mean(total).ci().low  # what the totals' lower end alone would allow
    assert not effect.equivalence(apart).equivalent


def test_groups_and_pairs_of_donors_have_it_too() -> None:
    rng = np.random.default_rng(2)
    total, part, groups = rng.normal(2, 1, size=60), rng.normal(0, 0.2, size=60), np.arange(60) // 4
    whole = Estimate.mean(total, groups=groups)
    found = Estimate.mean(part, groups=groups, total=whole).equivalence(relative(0.1))
    contrast = Estimate.mean(part - 0.1 * total, groups=groups)
    assert 2 * found.upper_p == pytest.approx(contrast.pvalue())
    square = (8, 8)
    rows, cells = rng.normal(2, 1, size=square), rng.normal(0, 0.2, size=square)
    crossed = Estimate.crossed(cells, total=Estimate.crossed(rows)).equivalence(relative(0.2))
    assert 2 * crossed.upper_p == pytest.approx(Estimate.crossed(cells - 0.2 * rows).pvalue())


def test_a_missing_total_leaves_its_example_out() -> None:
    rng = np.random.default_rng(3)
    total, part = rng.normal(2, 1, size=30), rng.normal(0, 0.2, size=30)
    there = np.arange(30) >= 5
    gap = np.where(there, total, np.nan)
    with_gap = Estimate.mean(part, total=Estimate.mean(gap)).equivalence(relative(0.1))
    without = Estimate.mean(part[there], total=Estimate.mean(total[there])).equivalence(
        relative(0.1)
    )
    assert with_gap == without


def test_nothing_is_small_beside_a_total_that_may_be_zero() -> None:
    rng = np.random.default_rng(4)
    total = Estimate.mean(rng.normal(0.05, 1.0, size=50))
    for effect in (
        Estimate.mean(np.zeros(50), total=total),
        Estimate.paired(np.zeros(50), np.zeros(50), total=total),
    ):
        found = effect.equivalence(relative(0.9))
        assert (found.lower_p, found.upper_p, found.equivalent) == (1.0, 1.0, False)
        assert "the total effect is not established" in found.note
        assert found.note in repr(found)
        assert found.note in effect.describe(relative(0.9))
        assert effect.verdict(relative(0.9)) == "inconclusive"


def test_without_a_total_it_is_refused() -> None:
    for effect in (
        Estimate.mean([1.0, 2.0], name="tnie"),
        Estimate.ratio([1.0, 2.0], [3.0, 4.0], name="tnie"),
        Estimate.share([1, 0], chance=0.5, name="tnie"),
    ):
        with pytest.raises(EstimateError, match="5% of the total effect needs the total effect"):
            effect.verdict(relative(0.05))


def test_a_total_must_be_an_effect_of_the_same_examples() -> None:
    with pytest.raises(EstimateError, match=r"the effect has shape \(2,\) and its total \(3,\)"):
        Estimate.mean([1.0, 2.0], total=Estimate.mean([1.0, 2.0, 3.0]))
    for wrong in (Estimate.share([1, 0], chance=0.5), Estimate.ratio([1.0, 2.0], [1.0, 3.0])):
        with pytest.raises(EstimateError, match="is no difference of outcomes"):
            Estimate.mean([1.0, 2.0], total=wrong)


def certain(n: int) -> Estimate:
    """A total effect of 1 in every example."""
    return Estimate.paired(np.ones(n), np.zeros(n), name="te")


def test_no_change_among_few_is_no_proof_of_a_small_share() -> None:
    """The t contrast would claim p = 0 here: effects are all 0, totals all 1."""
    few = Estimate.paired(np.zeros(20), np.zeros(20), total=certain(20))
    assert not few.equivalence(relative(0.05)).equivalent
    naive = Estimate.mean(np.zeros(20), total=Estimate.mean(np.ones(20)))
    assert naive.equivalence(relative(0.05)).pvalue == 0.0
    many = Estimate.paired(np.zeros(200), np.zeros(200), total=certain(200))
    assert many.equivalence(relative(0.05)).equivalent
    assert many.verdict(relative(0.05)) == "equivalent"


def test_it_costs_little_beside_the_same_margin_in_points() -> None:
    effect = Estimate.paired(np.zeros(200), np.zeros(200), total=certain(200))
    absolute, share = effect.equivalence(0.05), effect.equivalence(relative(0.05))
    assert absolute.pvalue < share.pvalue < 3 * absolute.pvalue


def test_the_split_is_bonferronis() -> None:
    """At alpha = its p-value, the ends of the two intervals meet."""
    rng = np.random.default_rng(5)
    after, before = (rng.random(300) < 0.05).astype(float), (rng.random(300) < 0.05).astype(float)
    for sign in (1, -1):
        change = (rng.random(300) < 0.8).astype(float)
        arms = (change, np.zeros(300))[::sign]
        total = Estimate.paired(*arms)
        effect = Estimate.paired(after, before, total=total)
        found = effect.equivalence(relative(0.08))
        for p, end in ((found.upper_p, "high"), (found.lower_p, "low")):
            whole = total.ci(level=1 - 0.1 * p)
            least = min(abs(whole.low), abs(whole.high))
            bound = getattr(effect.ci(level=1 - 2 * 0.9 * p), end)
            assert abs(bound) == pytest.approx(0.08 * least, abs=1e-6)


@pytest.mark.parametrize(
    ("n", "share", "total", "exact"), [(200, 0.05, 1.0, 0.0264), (40, 0.3, 0.8, 0.0008)]
)
def test_the_split_keeps_its_size(n: int, share: float, total: float, exact: float) -> None:
    """Enumerated: the effect is exactly the share of the total, both only gain."""
    size = 0.0
    for hits in range(n + 1):
        likely = stats.binom.pmf(hits, n, total)
        if likely < 1e-4:
            continue
        whole = Estimate.paired(np.arange(n) < hits, np.zeros(n))
        few = 0  # the effects that would be called small are the first ones
        while (
            Estimate.paired(np.arange(n) < few, np.zeros(n), total=whole)
            .equivalence(relative(share))
            .equivalent
        ):
            few += 1
        size += likely * stats.binom.cdf(few - 1, n, share * total)
    assert size == pytest.approx(exact, abs=5e-5)
    assert size <= 0.05


def test_the_ratio_keeps_its_size() -> None:
    """The effect's mean is exactly 10% of the total's, n = 40, 500 samples."""
    rng, claims = np.random.default_rng(7), []
    for _ in range(500):
        total = rng.normal(1.0, 0.8, size=40)
        part = rng.normal(0.1, 0.1, size=40)
        effect = Estimate.mean(part, total=Estimate.mean(total))
        claims.append(effect.equivalence(relative(0.1)).equivalent)
    assert 0.03 <= np.mean(claims) <= 0.07
