"""Contrasts of several 0/1 outcomes: Tango's test where that applies, closed forms, coverage."""

from collections.abc import Callable
from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import optimize, stats

from imaginelens.estimates import Estimate, EstimateError, relative, score_interval, score_z
from imaginelens.estimates.bounded import bounded_mean, bounded_ratio, bounded_z

GROUPS = np.repeat(np.arange(12), 5)
# (y11 - y10, y11 - y00) of all 0/1 outcomes
POSSIBLE = np.array(sorted({(a - b, a - c) for a, b, c in product((0.0, 1.0), repeat=3)}))
Maker = Callable[[np.random.Generator], Estimate]


def doubles(rng: np.random.Generator, n: int = 60) -> np.ndarray:
    """Double differences of 0/1 outcomes, mostly 0."""
    arms = rng.random((4, n)) < rng.uniform(0, 1, (4, 1)) ** 2
    return (arms[0] * 1.0 - arms[1]) - (arms[2] * 1.0 - arms[3])


def shares(rng: np.random.Generator, n: int = 60) -> tuple[np.ndarray, np.ndarray]:
    """A mediated part of a total effect, of 0/1 outcomes."""
    y00, y11, y10 = (rng.random((3, n)) < rng.uniform(0, 1, (3, 1))) * 1.0
    return y11 - y10, y11 - y00


MAKERS: dict[str, Maker] = {
    "bounded score": lambda r: Estimate.bounded(doubles(r), low=-2, high=2),
    "cluster-adjusted bounded score": lambda r: Estimate.bounded(
        doubles(r), low=-2, high=2, groups=GROUPS
    ),
    "bounded Fieller": lambda r: Estimate.ratio(*shares(r), possible=POSSIBLE),
    "cluster-adjusted bounded Fieller": lambda r: Estimate.ratio(
        *shares(r), possible=POSSIBLE, groups=GROUPS
    ),
}
every_procedure = pytest.mark.parametrize("procedure", MAKERS)


# --- oracles ------------------------------------------------------------------------------------


@given(
    st.integers(0, 12),
    st.integers(0, 12),
    st.integers(0, 40),
    st.integers(-990, 990).map(lambda k: k / 1000),
)
@settings(max_examples=30, deadline=None)
def test_of_single_differences_it_is_tangos_test(
    gained: int, lost: int, same: int, at: float
) -> None:
    n = gained + lost + same
    if n < 2:
        return
    changes = np.repeat([1.0, -1.0, 0.0], [gained, lost, same])
    mine = bounded_mean(changes, -1.0, 1.0)
    z = float(score_z(gained, lost, n, at))
    assert mine.greater(at) == pytest.approx(stats.t.sf(z, n - 1), abs=1e-7)
    low, high = score_interval(gained, lost, n, df=n - 1)
    assert str(Estimate.bounded(changes, low=-1, high=1).ci()) == str(
        Estimate.paired(np.maximum(changes, 0), np.maximum(-changes, 0)).ci()
    )
    assert mine.interval(0.95).low == pytest.approx(float(low), abs=1e-9)
    assert mine.interval(0.95).high == pytest.approx(float(high), abs=1e-9)


@pytest.mark.parametrize(
    "counts", [(1, 2, 9, 3, 2), (0, 0, 12, 0, 0), (0, 1, 8, 0, 3), (0, 0, 2, 9, 0)]
)
@pytest.mark.parametrize("at", [-1.3, -0.4, 0.1, 0.6, 1.7])
def test_the_variance_is_that_of_the_likeliest_distribution_with_the_mean(
    counts: tuple[int, ...], at: float
) -> None:
    """The constrained likelihood, maximised by another method over all five probabilities."""
    values, c = np.arange(-2.0, 3.0), np.array(counts, dtype=float)
    n, mean = c.sum(), c @ values / c.sum()
    found = optimize.minimize(
        lambda p: -(c[c > 0] @ np.log(np.maximum(p[c > 0], 1e-300))),
        np.full(5, 0.2),
        jac=lambda p: np.where(c > 0, -c / np.maximum(p, 1e-300), 0.0),
        bounds=[(0, 1)] * 5,
        constraints=[
            {"type": "eq", "fun": lambda p: p.sum() - 1},
            {"type": "eq", "fun": lambda p: p @ values - at},
        ],
        method="SLSQP",
        options={"maxiter": 500, "ftol": 1e-14},
    )
    variance = found.x @ (values - at) ** 2
    wanted = (mean - at) * np.sqrt(n / variance)
    assert bounded_z(values - at, c, -2 - at, 2 - at) == pytest.approx(wanted, rel=1e-3, abs=1e-3)


@pytest.mark.parametrize("n", [5, 20, 128])
def test_values_that_are_all_equal_have_closed_forms(n: int) -> None:
    """With the probability d/2 put on 2, the mean of d has variance d (2 - d)."""
    t2 = stats.t.ppf(0.975, n - 1) ** 2
    zero = Estimate.bounded(np.zeros(n), low=-2, high=2).ci()
    assert (zero.low, zero.high) == pytest.approx((-2 * t2 / (n + t2), 2 * t2 / (n + t2)))
    all_mediated = Estimate.ratio(np.ones(n), np.ones(n), possible=POSSIBLE).ci()
    if n > t2:
        assert (all_mediated.low, all_mediated.high) == pytest.approx((1 - t2 / n, n / (n - t2)))
    else:
        assert all_mediated.unbounded
    certain = Estimate.bounded(np.full(n, 2.0), low=-2, high=2)
    assert certain.ci().high == 2.0
    assert certain.ci().low == pytest.approx(2 - 4 * t2 / (n + t2))


def test_a_ratio_is_bounded_where_its_denominator_is_not_nothing() -> None:
    kinds = set()
    for seed in range(25):
        top, bottom = shares(np.random.default_rng(seed), 25)
        interval = Estimate.ratio(top, bottom, possible=POSSIBLE).ci()
        total = Estimate.bounded(bottom, low=-1, high=1)
        assert bool(interval.unbounded) == (0 in total.ci())
        kinds.add(interval.unbounded)
    assert {"", "outside"} <= kinds
    nothing = Estimate.ratio(np.zeros(9), np.zeros(9), possible=POSSIBLE)
    assert nothing.ci().unbounded == "everything"
    assert np.isnan(nothing.value)
    assert nothing.equivalence(margin=0.5).note


def test_ends_of_a_ratio_are_where_its_contrast_is_just_rejected() -> None:
    top, bottom = shares(np.random.default_rng(3))
    method = bounded_ratio(top, bottom, POSSIBLE)
    interval = method.interval(0.95)
    assert not interval.unbounded
    assert method.greater(interval.low) == pytest.approx(0.025, abs=1e-6)
    assert method.less(interval.high) == pytest.approx(0.025, abs=1e-6)


# --- laws ---------------------------------------------------------------------------------------


@every_procedure
@settings(max_examples=6, deadline=None)
@given(seed=st.integers(0, 10**6))
def test_all_claims_are_one_test(procedure: str, seed: int) -> None:
    estimate = MAKERS[procedure](np.random.default_rng(seed))
    assert estimate.procedure == procedure == estimate.ci().procedure
    p, interval = estimate.pvalue(), estimate.ci()
    assert (p < 0.05) == (0 not in interval)
    for level in (0.5, 0.9, 0.99):
        assert (p < 1 - level) == (0 not in estimate.ci(level=level))
    margin = estimate.min_margin()
    if 1e-9 < margin < (1 if "score" in procedure else np.inf):
        assert estimate.equivalence(margin * (1 + 1e-6)).equivalent
        assert not estimate.equivalence(margin * (1 - 1e-6)).equivalent
    if np.isfinite(estimate.value):
        assert estimate.value in interval
    if not interval.unbounded:
        wide = estimate.ci(level=0.99)
        assert wide.unbounded or wide.low <= interval.low <= interval.high <= wide.high


@every_procedure
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_signs_orders_and_gaps(procedure: str, seed: int) -> None:
    rng = np.random.default_rng(seed)
    groups = GROUPS if "cluster" in procedure else None
    order = rng.permutation(60)

    def made(values: tuple[np.ndarray, ...], labels: np.ndarray | None) -> Estimate:
        if len(values) == 1:
            return Estimate.bounded(*values, low=-2, high=2, groups=labels)
        return Estimate.ratio(*values, possible=POSSIBLE, groups=labels)

    values = (doubles(rng),) if "score" in procedure else shares(rng)
    one = made(values, groups)
    shuffled = made(tuple(v[order] for v in values), None if groups is None else groups[order])
    mirrored = made(
        (-values[0], *values[1:]) if len(values) == 1 else (-values[0], -values[1]), groups
    )
    sign = -1 if len(values) == 1 else 1
    low, high = one.ci().low, one.ci().high
    assert (shuffled.ci().low, shuffled.ci().high) == pytest.approx((low, high), abs=1e-9)
    ends = sorted((sign * mirrored.ci().low, sign * mirrored.ci().high))
    assert ends == pytest.approx(sorted((low, high)), abs=1e-9)
    gaps = tuple(np.append(v, np.nan) for v in values)
    labels = None if groups is None else np.append(groups, 0)
    assert made(gaps, labels).missing == 1
    assert made(gaps, labels).pvalue() == pytest.approx(one.pvalue())


def test_a_group_for_each_example_is_no_group() -> None:
    values = doubles(np.random.default_rng(1), 30)
    alone = Estimate.bounded(values, low=-2, high=2)
    grouped = Estimate.bounded(values, low=-2, high=2, groups=range(30))
    assert grouped.ci().low == pytest.approx(alone.ci().low)
    copies = Estimate.bounded(np.repeat(values, 4), low=-2, high=2, groups=np.repeat(range(30), 4))
    naive = Estimate.bounded(np.repeat(values, 4), low=-2, high=2)
    assert copies.ci().high - copies.ci().low > 1.5 * (naive.ci().high - naive.ci().low)
    same = np.repeat(np.ones(30), 4), np.repeat(np.ones(30), 4)
    wide = Estimate.ratio(*same, possible=POSSIBLE, groups=np.repeat(range(30), 4)).ci()
    narrow = Estimate.ratio(*same, possible=POSSIBLE).ci()
    assert wide.low < narrow.low < 1 < narrow.high < wide.high


def test_rejection_is_monotone_for_all_small_samples() -> None:
    """What is not rejected is an interval: the statistic falls as the mean rises."""
    at = np.linspace(-1.95, 1.95, 27)
    values = np.arange(-2.0, 3.0)
    for counts in product(range(3), repeat=5):
        if sum(counts) < 2:
            continue
        c = np.array(counts, dtype=float)
        z = [bounded_z(values - d, c, -2 - d, 2 - d) for d in at]
        assert (np.diff(z) < 1e-9).all(), counts


# --- coverage -----------------------------------------------------------------------------------


def covered(n: int, p: float) -> float:
    """How often the 95% interval holds the mean of a value that is 2 with probability p, and else
    0: by enumerating all samples."""
    total = 0.0
    for k in range(n + 1):
        sample = np.repeat([0.0, 2.0], [n - k, k])
        total += stats.binom.pmf(k, n, p) * (
            2 * p in bounded_mean(sample, -2.0, 2.0).interval(0.95)
        )
    return total


def test_an_effect_that_is_seldom_seen_is_covered() -> None:
    """Of an example in which the double difference is 2: the t interval covers as few as 64%."""
    for expected in (0.5, 1, 2, 3, 4):
        assert covered(20, expected / 20) >= 0.94
    by_t = sum(
        stats.binom.pmf(k, 20, 1 / 20)
        * (0.1 in Estimate.mean(np.repeat([0.0, 2.0], [20 - k, k])).ci())
        for k in range(21)
    )
    assert by_t < 0.7  # the guard can fail


@pytest.mark.slow
def test_coverage_of_double_differences_and_of_shares() -> None:
    rng, runs = np.random.default_rng(0), 1000
    for n in (20, 50, 128):
        for shares_of in (
            (0.01, 0, 0.98, 0, 0.01),
            (0.02, 0.03, 0.9, 0.03, 0.02),
            (0, 0.1, 0.5, 0.1, 0.3),
        ):
            truth = float(np.dot(shares_of, np.arange(-2, 3)))
            hits = [
                truth in Estimate.bounded(
                    rng.choice(np.arange(-2.0, 3.0), n, p=shares_of), low=-2, high=2
                ).ci()
                for _ in range(runs)
            ]  # fmt: skip
            assert np.mean(hits) >= 0.93
        for mediated in (0.02, 0.5, 0.98):
            through = [rng.random(n) < mediated for _ in range(runs)]
            found = [Estimate.ratio(m * 1.0, np.ones(n), possible=POSSIBLE).ci() for m in through]
            assert np.mean([mediated in interval for interval in found]) >= 0.92


# --- refusals -----------------------------------------------------------------------------------


def test_what_is_not_possible_is_refused() -> None:
    with pytest.raises(EstimateError, match="3 lies beyond what is said to be possible, -2 to 2"):
        Estimate.bounded([0, 3], low=-2, high=2)
    with pytest.raises(EstimateError, match="2 lies beyond what is said to be possible"):
        Estimate.ratio([0, 2], [1, 1], possible=POSSIBLE)
    with pytest.raises(EstimateError, match="from 0 to 2 do not lie on both sides of 0"):
        Estimate.bounded([0, 1], low=0, high=2)
    with pytest.raises(EstimateError, match="an interval needs 2"):
        Estimate.bounded([0.0], low=-2, high=2)


def test_relative_margins_know_the_total() -> None:
    n = 400
    total = Estimate.paired(np.ones(n), np.zeros(n))
    effect = Estimate.bounded(np.zeros(n), low=-2, high=2, total=total)
    assert effect.equivalence(relative(0.1)).equivalent
    assert not effect.equivalence(relative(0.01)).equivalent


@pytest.mark.parametrize("margin", [0.1, 0.3, 0.7])
def test_a_mean_that_is_the_margin_up_to_rounding_is_no_crash(margin: float) -> None:
    x = np.array([2.0, -1.0, 0.0, 1.0, 0.5, -2.0] * 7)
    x += margin - x.mean()
    found = Estimate.bounded(x, low=-4, high=4).equivalence(margin)
    assert found.pvalue == pytest.approx(0.5, abs=1e-6)
