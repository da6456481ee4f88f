"""Tango's score test: published intervals, closed forms, its likelihood, its enumerated size."""

import numpy as np
import pytest
from estimates.enumeration import Outcomes, outcomes
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import optimize, stats

from imaginelens.estimates import EstimateError, score_interval, score_z
from imaginelens.estimates.student import critical

GRID = (0.02, 0.05, 0.10)  # shares of discordant examples
Z2 = stats.norm.ppf(0.975) ** 2


def interval(gained: float, lost: float, n: float, **options: float) -> tuple[float, float]:
    low, high = score_interval(gained, lost, n, **options)
    return float(low), float(high)


@pytest.mark.parametrize(
    ("gained", "lost", "n", "published"),
    [
        # Airway hyper-responsiveness before and after transplantation, table [[59, 6], [16, 80]];
        # the published sign is row less column: first-only (6) less second-only (16).
        (6, 16, 161, (-0.1240, -0.0054)),
        (3, 0, 3, (-0.1230, 1.0)),
    ],
)
def test_published_intervals(
    gained: int, lost: int, n: int, published: tuple[float, float]
) -> None:
    assert interval(gained, lost, n) == pytest.approx(published, abs=5e-5)
    mirrored = (-published[1], -published[0])
    assert interval(lost, gained, n) == pytest.approx(mirrored, abs=5e-5)


@pytest.mark.parametrize("n", [1, 2, 20, 191])
def test_closed_forms_at_the_corners(n: int) -> None:
    half = Z2 / (n + Z2)  # z = sqrt(n d / (1 - d)) with no discordant example
    assert interval(0, 0, n) == pytest.approx((-half, half), abs=1e-12)
    least = (n - Z2) / (n + Z2)  # z = sqrt(n (1 - d) / (1 + d)) where all gained
    assert interval(n, 0, n) == pytest.approx((least, 1.0), abs=1e-12)
    assert interval(0, n, n) == pytest.approx((-1.0, -least), abs=1e-12)
    assert score_z(0, 0, n, 0.0) == 0
    assert score_z(n, 0, n, 1.0) == 0
    assert score_z(0, n, n, -1.0) == 0
    assert score_z(0, 0, n, 1.0) == -np.inf
    assert score_z(0, 0, n, -1.0) == np.inf


@given(st.integers(1, 60), st.integers(0, 60), st.integers(0, 60))
def test_at_zero_it_is_mcnemars(gained: int, lost: int, same: int) -> None:
    z = score_z(gained, lost, gained + lost + same, 0.0)
    assert z == pytest.approx((gained - lost) / np.sqrt(gained + lost))


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 15), st.integers(0, 15), st.integers(0, 30), st.floats(-0.95, 0.95))
def test_its_variance_is_the_most_likely_one_under_the_null(
    gained: int, lost: int, same: int, difference: float
) -> None:
    n = gained + lost + same
    if n == 0:
        return

    def unlikely(down: float) -> float:
        shares = (down + difference, down, 1 - difference - 2 * down)
        counts = (gained, lost, same)
        return -sum(k * np.log(max(p, 1e-300)) for k, p in zip(counts, shares, strict=True) if k)

    ends = (max(0.0, -difference), (1 - difference) / 2)
    down = optimize.minimize_scalar(
        unlikely, bounds=ends, method="bounded", options={"xatol": 1e-12}
    ).x
    variance = (2 * down + difference - difference**2) / n
    expected = ((gained - lost) / n - difference) / np.sqrt(variance)
    assert score_z(gained, lost, n, difference) == pytest.approx(expected, rel=1e-4, abs=1e-4)


@settings(max_examples=60, deadline=None)
@given(
    st.integers(0, 40),
    st.integers(0, 40),
    st.integers(1, 200),
    st.sampled_from([0.5, 0.9, 0.95, 0.99]),
)
def test_the_interval_is_what_the_test_does_not_reject(
    gained: int, lost: int, same: int, level: float
) -> None:
    n = gained + lost + same
    low, high = interval(gained, lost, n, level=level)
    assert -1 <= low <= (gained - lost) / n <= high <= 1
    z = stats.norm.ppf((1 + level) / 2)
    assert score_z(gained, lost, n, [low, high]) == pytest.approx([z, -z], abs=1e-7)
    assert interval(lost, gained, n, level=level) == pytest.approx((-high, -low), abs=1e-12)


@pytest.mark.parametrize("n", [1, 2, 3, 20, 50])
def test_it_falls_as_the_difference_rises(n: int) -> None:
    every = outcomes(n)
    z = score_z(every.gained[:, None], every.lost[:, None], n, np.linspace(-1, 1, 401))
    assert not np.isnan(z).any()
    assert (z[:, 1:] < z[:, :-1]).all()


def test_arrays_are_as_good_as_numbers() -> None:
    gained, lost, n = np.array([0, 3, 9]), np.array([[0], [4]]), 40
    low, high = score_interval(gained, lost, n, level=0.9, inflation=1.5, df=[11, 12, 13])
    assert low.shape == high.shape == (2, 3)
    for (i, j), found in np.ndenumerate(low):
        one = interval(gained[j], lost[i, 0], n, level=0.9, inflation=1.5, df=11 + j)
        assert (found, high[i, j]) == pytest.approx(one, abs=1e-15)


def test_a_design_effect_divides_the_counts() -> None:
    """Rao and Scott (1992): as if there were fewer examples, by that factor."""
    inflated = interval(9, 4, 120, inflation=2.5)
    assert inflated == pytest.approx(interval(9 / 2.5, 4 / 2.5, 120 / 2.5), abs=1e-12)


def test_a_t_quantile_widens_the_interval() -> None:
    low, high = interval(6, 16, 161, df=9)
    t = stats.t.ppf(0.975, 9)
    assert score_z(6, 16, 161, [low, high]) == pytest.approx([t, -t], abs=1e-9)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((-1, 0, 5), "-1 gained and 0 lost of 5"),
        ((3, 4, 5), "3 gained and 4 lost of 5"),
        ((0, 0, 0), "of 0 examples"),
        ((0, float("nan"), 5), "nan lost"),
    ],
)
def test_impossible_counts_are_refused(arguments: tuple[float, float, float], words: str) -> None:
    with pytest.raises(EstimateError, match=words):
        score_interval(*arguments)
    with pytest.raises(EstimateError, match=words):
        score_z(*arguments, 0.0)


def test_impossible_differences_and_levels_are_refused() -> None:
    with pytest.raises(EstimateError, match="difference of 5 lies outside"):
        score_z(1, 1, 10, [0.0, 5.0])
    with pytest.raises(EstimateError, match="level of 95"):
        score_interval(1, 1, 10, level=95)
    for wrong in (0.0, -1.0, float("nan")):
        with pytest.raises(EstimateError, match=f"multiplied by {wrong:g}"):
            score_interval(1, 1, 10, inflation=wrong)


@pytest.mark.parametrize(
    ("discordant", "gained", "points"),
    [(0.02, 3, 3.0), (0.05, 6, 3.7), (0.1, 10, 4.5), (0.2, 20, 6.0)],
)
def test_the_smallest_margins_of_the_papers_v_star_row(
    discordant: float, gained: int, points: float
) -> None:
    """n = 191, one more right after than before (+0.52 points), at assumed shares of discordance.

    The discordant count is the share of 191, rounded, and raised by one where it is even, because
    one more gained than lost makes it odd. Both quantiles give the rounded margins.
    """
    lost = gained - 1
    count = round(discordant * 191)
    assert gained + lost == count + (count % 2 == 0)
    for df in (None, 190):
        low, high = score_interval(gained, lost, 191, level=0.9, df=df)
        assert 100 * max(-low, high) == pytest.approx(points, abs=0.05)


# Sizes by enumeration: no simulation, so the numbers are exact.


def size(every: Outcomes, quantile: float, discordant: float, difference: float = 0.0) -> float:
    z = np.abs(score_z(every.gained, every.lost, every.n, difference))
    return float(every.probability(discordant, difference)[z > quantile].sum())


def test_the_probabilities_of_all_outcomes_add_up() -> None:
    for discordant in (0.0, *GRID, 1.0):
        assert outcomes(20).probability(discordant, 0.0).sum() == pytest.approx(1)


@pytest.mark.parametrize(
    ("n", "normal", "t"),
    [
        (20, (0.01, 0.18, 1.36), (0.00, 0.02, 0.23)),
        (50, (0.20, 2.23, 4.73), (0.02, 0.53, 2.47)),
        (191, (4.00, 4.34, 5.15), (4.00, 4.34, 4.61)),
    ],
)
def test_the_t_quantile_keeps_the_size(
    n: int, normal: tuple[float, ...], t: tuple[float, ...]
) -> None:
    """In percent, at 2%, 5% and 10% discordant: the reason for `Estimate.paired`'s quantile."""
    for df, expected in ((None, normal), (n - 1, t)):
        found = [100 * size(outcomes(n), float(critical(0.95, df)), psi) for psi in GRID]
        assert found == pytest.approx(expected, abs=0.006)
    assert max(t) <= 5.0 < max(5.15, *normal)


@pytest.mark.parametrize("n", [20, 50, 191])
def test_the_t_quantile_covers_every_difference(n: int) -> None:
    every, quantile = outcomes(n), float(critical(0.95, n - 1))
    for psi in GRID:
        differences = np.linspace(0, psi, 101).round(12)  # gained and lost are symmetric
        assert max(size(every, quantile, psi, d) for d in differences) <= 0.064


def tost_size(every: Outcomes, margin: float, discordant: float, *, score: bool) -> float:
    """How often equivalence is claimed where the difference is the margin."""
    b, c, n = every.gained, every.lost, every.n
    if score:
        below, above = score_z(b, c, n, margin), score_z(b, c, n, -margin)
    else:
        mean = (b - c) / n
        error = np.sqrt(((b + c) / n - mean**2) / (n - 1))
        with np.errstate(divide="ignore"):
            below, above = (mean - margin) / error, (mean + margin) / error
    t = stats.t.ppf(0.95, n - 1)
    return float(every.probability(discordant, margin)[(below < -t) & (above > t)].sum())


def test_score_equivalence_keeps_its_size_and_t_does_not() -> None:
    every = outcomes(191)
    assert 100 * tost_size(every, 0.05, 0.06, score=True) == pytest.approx(4.07, abs=0.006)
    assert 100 * tost_size(every, 0.05, 0.06, score=False) == pytest.approx(8.26, abs=0.006)


@pytest.mark.parametrize("n", [20, 50, 191])
def test_score_equivalence_keeps_its_size_on_the_grid(n: int) -> None:
    found = {
        (psi, margin): tost_size(outcomes(n), margin, psi, score=True)
        for psi in (*GRID, 0.06, 0.2)
        for margin in (0.02, 0.03, 0.05, 0.10)
        if margin <= psi
    }
    assert max(found.values()) <= 0.05
    # what makes this a test: where nothing changed, a t test claims equivalence at any margin
    assert n > 50 or tost_size(outcomes(n), 0.02, 0.02, score=False) > 0.35
