"""Exact tests: published p-values, statsmodels, enumeration by hand, and size."""

import itertools

import numpy as np
import pytest
from scipy import stats
from statsmodels.stats.contingency_tables import mcnemar as their_mcnemar

from imaginelens.estimates import EstimateError, mcnemar, sign_flip


def pair(gained: int, lost: int, ones: int, zeros: int) -> tuple[list[int], list[int]]:
    after = [1] * gained + [0] * lost + [1] * ones + [0] * zeros
    before = [0] * gained + [1] * lost + [1] * ones + [0] * zeros
    return after, before


def test_published_mcnemar() -> None:
    found = mcnemar(*pair(6, 16, 59, 80))
    assert (found.gained, found.lost, found.n, found.missing) == (6, 16, 161, 0)
    assert found.exact == pytest.approx(0.052479, abs=5e-7)
    assert found.mid_p == pytest.approx(0.034690, abs=5e-7)


@pytest.mark.parametrize("counts", [(0, 0), (1, 0), (1, 1), (5, 2), (3, 9), (40, 60)])
def test_mcnemar_is_statsmodels_and_scipys(counts: tuple[int, int]) -> None:
    gained, lost = counts
    found = mcnemar(*pair(gained, lost, 3, 4))
    theirs = their_mcnemar([[3, gained], [lost, 4]], exact=True).pvalue
    assert found.exact == pytest.approx(min(1.0, theirs))
    if gained + lost:
        assert found.exact == pytest.approx(stats.binomtest(gained, gained + lost).pvalue)
    below = found.exact - stats.binom.pmf(min(counts), sum(counts), 0.5)
    assert gained == lost or found.mid_p == pytest.approx(below)
    assert gained != lost or found.mid_p == pytest.approx(1.0)


def test_mcnemar_leaves_out_what_is_missing() -> None:
    found = mcnemar([1, 1, float("nan"), 0], [0, None, 1, 0])
    assert (found.gained, found.lost, found.n, found.missing) == (1, 0, 2, 2)


@pytest.mark.parametrize(
    ("after", "before", "words"),
    [
        ([1, 2], [0, 0], "1 of 2 after are neither 0 nor 1 .the first is 2"),
        ([1, 0, 1], [0, 0], r"after has shape \(3,\) and before \(2,\)"),
        (["yes"], [0], "cannot be read as numbers"),
        ([float("inf")], [0], "1 of 1 after are infinite"),
    ],
)
def test_mcnemar_refuses(after: list[float], before: list[float], words: str) -> None:
    with pytest.raises(EstimateError, match=words):
        mcnemar(after, before)


def test_three_values_by_hand() -> None:
    """Of the 8 sums of +-1 +-2 +-3, two are as far from 0 as 6, four as 4."""
    assert sign_flip([1, 2, 3]) == 2 / 8
    assert sign_flip([-1, 2, 3]) == 4 / 8
    assert sign_flip([0.0, 0.0]) == 1.0


def test_few_units_are_enumerated_as_scipy_does() -> None:
    values = np.random.default_rng(0).normal(0.4, 1, size=11)
    theirs = stats.permutation_test(
        (values,), np.mean, permutation_type="samples", n_resamples=np.inf
    )
    assert sign_flip(values) == pytest.approx(theirs.pvalue)


def test_ties_by_rounding_count_as_ties() -> None:
    values = [0.1, 0.2, -0.3, 0.7]  # 0.1 + 0.2 - 0.3 is 5.6e-17 and not 0
    exact = [1, 2, -3, 7]
    assert sign_flip(values) == sign_flip(exact)


def test_groups_are_flipped_whole() -> None:
    values = np.array([1.0, 0.5, 2.0, -1.0, 0.3, 0.4])
    groups = ["a", "a", "b", "b", "c", "c"]
    assert sign_flip(values, groups=groups) == sign_flip([1.5, 1.0, 0.7])
    sums = np.array([1.5, 1.0, 0.7])
    flips = [abs(np.dot(s, sums)) for s in itertools.product((1, -1), repeat=3)]
    assert sign_flip(values, groups=groups) == np.mean(np.array(flips) >= 3.2 - 1e-9)


def test_repeats_of_an_example_are_no_evidence_with_groups() -> None:
    values = np.random.default_rng(1).normal(0.5, 1, size=12)
    repeated, groups = np.repeat(values, 8), np.repeat(np.arange(12), 8)
    assert sign_flip(repeated, groups=groups) == sign_flip(values)
    assert sign_flip(repeated) < sign_flip(values) / 4


def test_many_units_are_drawn_and_p_is_never_zero() -> None:
    values = np.random.default_rng(2).normal(0.3, 1, size=40)
    p = sign_flip(values)
    assert p == sign_flip(values)
    assert p != sign_flip(values, seed=1)
    assert p == pytest.approx(stats.ttest_1samp(values, 0).pvalue, abs=0.02)
    assert sign_flip(values + 5) == 1 / 10001
    assert sign_flip(values + 5, draws=99) == 1 / 100


def test_drawing_agrees_with_enumerating(monkeypatch: pytest.MonkeyPatch) -> None:
    values = np.random.default_rng(3).normal(0.3, 1, size=12)
    exact = sign_flip(values)
    monkeypatch.setattr("imaginelens.estimates.exact._ENUMERATED", 1)
    monkeypatch.setattr("imaginelens.estimates.exact._AT_ONCE", 5000)
    assert sign_flip(values) == pytest.approx(exact, abs=0.015)


def test_missing_values_are_left_out() -> None:
    assert sign_flip([1, float("nan"), 2, 3]) == 0.25
    assert sign_flip([1, 9, 2, 3, float("nan")], groups=[0, 1, 2, 3, 1]) == sign_flip([1, 9, 2, 3])


@pytest.mark.parametrize(
    ("values", "options", "words"),
    [
        ([1.0], {}, "1 of the values can be flipped"),
        ([1.0, 2.0], {"groups": [0, 0]}, "1 of the groups can be flipped"),
        ([float("nan")] * 3, {}, "0 of the values"),
        ([1.0, 2.0], {"groups": [0, float("nan")]}, "1 of 2 group labels are missing"),
        ([1.0, 2.0], {"groups": [0]}, "1 group labels came with 2 examples"),
        ([1.0, 2.0], {"draws": 0}, "0 draws give no p-value"),
    ],
)
def test_sign_flip_refuses(values: list[float], options: dict, words: str) -> None:
    with pytest.raises(EstimateError, match=words):
        sign_flip(values, **options)


def test_the_exact_size_is_kept() -> None:
    """All 3^6 equally likely changes of six pairs: p <= 0.05 in at most 5% of them."""
    changes = itertools.product((-1.0, 0.0, 1.0), repeat=6)
    assert np.mean([sign_flip(c) <= 0.05 for c in changes]) <= 0.05
