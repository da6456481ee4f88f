"""Fieller's interval: the inversion of the paired t test, with and without an end."""

import numpy as np
import pytest
from scipy import stats

from imaginelens.estimates import Interval
from imaginelens.estimates.ratio import Fieller, fieller

RATIOS = np.concatenate([np.linspace(-30, 30, 1201), [-1e6, 1e6]])


def inverted(top: np.ndarray, bottom: np.ndarray) -> np.ndarray:
    """Which ratios the paired t test of top - r * bottom does not reject at 5%."""
    contrasts = top[:, None] - RATIOS * bottom[:, None]
    return np.asarray(stats.ttest_1samp(contrasts, 0.0).pvalue >= 0.05)


@pytest.mark.parametrize(
    ("shift", "size", "kind"), [(1.0, 1.0, ""), (0.15, 2.0, "outside"), (0.05, 0.0, "everything")]
)
def test_it_is_the_inverted_paired_t_test(shift: float, size: float, kind: str) -> None:
    rng = np.random.default_rng(3)
    bottom = rng.normal(shift, 0.5, size=30)
    top = size * 0.7 + 0.4 * bottom + rng.normal(0, 0.3, size=30)
    interval = fieller(top, bottom).interval(0.95)
    assert interval.unbounded == kind
    assert inverted(top, bottom).tolist() == [ratio in interval for ratio in RATIOS]


def test_every_kind_over_many_samples() -> None:
    rng = np.random.default_rng(4)
    kinds = []
    for _ in range(60):
        bottom = rng.normal(rng.uniform(-0.4, 0.4), 0.5, size=12)
        top = rng.normal(rng.uniform(-1, 1), 1.0, size=12)
        interval = fieller(top, bottom).interval(0.95)
        assert inverted(top, bottom).tolist() == [ratio in interval for ratio in RATIOS]
        kinds.append(interval.unbounded)
    assert {"", "outside", "everything"} == set(kinds)


def test_a_closed_case() -> None:
    """Independent means 1 and 2, both of variance v: (2 +- t sqrt(v (5 - t^2 v))) / (4 - t^2 v)."""
    v, t = 0.01, stats.t.ppf(0.975, 30)
    half = t * np.sqrt(v * (5 - t**2 * v))
    found = Fieller(1.0, 2.0, v, 0.0, v, 30).interval(0.95)
    ends = ((2 - half) / (4 - t**2 * v), (2 + half) / (4 - t**2 * v))
    assert (found.low, found.high) == pytest.approx(ends)


def test_bounded_is_a_denominator_that_is_not_zero() -> None:
    rng = np.random.default_rng(5)
    for mean in np.linspace(0.05, 0.6, 40):
        top, bottom = rng.normal(1.0, 1.0, size=15), rng.normal(mean, 0.7, size=15)
        established = stats.ttest_1samp(bottom, 0.0).pvalue < 0.05
        assert (fieller(top, bottom).interval(0.95).unbounded == "") == established


def test_a_denominator_of_zeros_leaves_everything() -> None:
    found = fieller(np.array([1.0, 2.0, 4.0]), np.zeros(3))
    assert np.isnan(found.value)
    assert found.interval(0.95) == Interval(-np.inf, np.inf, 0.95, unbounded="everything")


def test_exact_ratios_are_points() -> None:
    total = np.random.default_rng(6).normal(1.0, 0.2, size=20)
    same = fieller(total, total).interval(0.95)
    assert (same.low, same.high) == (1.0, 1.0)
    none = fieller(np.zeros(20), total).interval(0.95)
    assert (none.low, none.high) == (0.0, 0.0)
    constant = fieller(np.full(20, 0.3), np.full(20, 0.7)).interval(0.95)
    assert (constant.low, constant.high) == pytest.approx((3 / 7, 3 / 7), abs=1e-15)


def test_it_follows_scale_and_sign() -> None:
    rng = np.random.default_rng(7)
    top, bottom = rng.normal(1, 1, size=25), rng.normal(2, 1, size=25)
    plain, scaled = fieller(top, bottom).interval(0.9), fieller(3 * top, -bottom).interval(0.9)
    assert (scaled.low, scaled.high) == pytest.approx((-3 * plain.high, -3 * plain.low))
    over = fieller(bottom, top).interval(0.9)  # top's mean is not 0, either
    assert (over.low, over.high) == pytest.approx((1 / plain.high, 1 / plain.low))


def test_its_tests_are_the_contrasts() -> None:
    rng = np.random.default_rng(8)
    top, bottom = rng.normal(1, 1, size=25), rng.normal(2, 1, size=25)
    for sign in (1.0, -1.0):
        found = fieller(sign * top, sign * bottom)
        for at in (0.2, 0.9):
            expected = stats.ttest_1samp(top - at * bottom, 0.0, alternative="greater").pvalue
            assert found.greater(at) == pytest.approx(expected)
            assert found.less(at) == pytest.approx(1 - expected)


def test_groups_widen_it() -> None:
    rng = np.random.default_rng(9)
    top, bottom = rng.normal(1, 1, size=15), rng.normal(2, 1, size=15)
    codes = np.repeat(np.arange(15), 4)
    grouped = fieller(np.repeat(top, 4), np.repeat(bottom, 4), codes).interval(0.95)
    plain = fieller(top, bottom).interval(0.95)
    assert (grouped.low, grouped.high) == pytest.approx((plain.low, plain.high))


def test_it_covers_where_the_mean_of_ratios_fails() -> None:
    """True ratio 0.4, total effect of mean 0.3 and spread 1, n = 30, 1000 samples."""
    rng = np.random.default_rng(10)
    covered, naive = [], []
    for _ in range(1000):
        total = rng.normal(0.3, 1.0, size=30)
        part = 0.4 * total + rng.normal(0, 0.2, size=30)
        covered.append(0.4 in fieller(part, total).interval(0.95))
        ratios = part / total
        half = stats.t.ppf(0.975, 29) * ratios.std(ddof=1) / 30**0.5
        naive.append(2 * half)
    assert 0.93 <= np.mean(covered) <= 0.97
    assert np.mean(naive) > 1.0  # so wide that it says nothing of a share between 0 and 1
