"""Student's t for means: against scipy, statsmodels and CR2 by its matrix definition."""

import numpy as np
import pytest
import statsmodels.api as sm
from scipy import linalg, stats

from imaginelens.estimates import EstimateError
from imaginelens.estimates.student import Student, cells, critical, crossed, mean, moments, tail


def cr2(values: np.ndarray, codes: np.ndarray) -> float:
    """Bell and McCaffrey's variance of an intercept: A_g = (I - H_gg)^(-1/2) on each residual."""
    x = np.ones((len(values), 1))
    bread = np.linalg.inv(x.T @ x)
    residuals = values - x[:, 0] * values.mean()
    meat = np.zeros((1, 1))
    for group in np.unique(codes):
        rows = codes == group
        hat = x[rows] @ bread @ x[rows].T
        adjust = linalg.inv(linalg.sqrtm(np.eye(rows.sum()) - hat)).real
        score = x[rows].T @ adjust @ residuals[rows]
        meat += np.outer(score, score)
    return float((bread @ meat @ bread)[0, 0])


def test_quantiles_and_tails() -> None:
    assert critical(0.95) == pytest.approx(1.959963984540054)
    assert critical(0.9, [3, 190]) == pytest.approx(stats.t.ppf(0.95, [3, 190]))
    assert tail([-1.0, 2.0]) == pytest.approx(stats.norm.sf([-1.0, 2.0]))
    assert tail([-1.0, 2.0], [3, 4]) == pytest.approx(stats.t.sf([-1.0, 2.0], [3, 4]))
    assert tail(40.0) == pytest.approx(stats.norm.sf(40.0), rel=1e-9)


@pytest.mark.parametrize("level", [0.0, 1.0, 95.0, -0.5, float("nan")])
def test_a_level_that_is_no_probability_is_refused(level: float) -> None:
    with pytest.raises(EstimateError, match="no probability"):
        critical(level)


@pytest.mark.parametrize("n", [2, 3, 20])
def test_it_is_scipys_t_test(n: int) -> None:
    values = np.random.default_rng(n).normal(0.3, 2, size=n)
    ours, theirs = mean(values), stats.ttest_1samp(values, 0.1)
    interval = ours.interval(0.9)
    ends = theirs.confidence_interval(0.9)
    assert (interval.low, interval.high) == pytest.approx((ends.low, ends.high))
    less = stats.ttest_1samp(values, 0.1, alternative="less").pvalue
    assert ours.less(0.1) == pytest.approx(less)
    assert ours.greater(0.1) == pytest.approx(1 - less)


@pytest.mark.parametrize("sizes", [[3] * 12, [1, 2, 3, 4, 5, 6, 7, 8, 9, 30], [1] * 15])
def test_groups_are_cr2(sizes: list[int]) -> None:
    rng = np.random.default_rng(0)
    codes = np.repeat(np.arange(len(sizes)), sizes)
    values = rng.normal(size=len(codes)) + rng.normal(size=len(sizes))[codes]
    found = mean(values, codes)
    assert found.df == len(sizes) - 1
    assert found.variance == pytest.approx(cr2(values, codes))


def test_equal_groups_are_a_t_test_of_their_means() -> None:
    rng = np.random.default_rng(1)
    values, codes = rng.normal(size=60), np.repeat(np.arange(12), 5)
    ours, theirs = mean(values, codes), mean(values.reshape(12, 5).mean(1))
    assert ours.variance == pytest.approx(theirs.variance)
    assert ours.df == theirs.df
    # and, for equal groups, so is statsmodels' cluster-robust variance with its factor G / (G - 1)
    fit = sm.OLS(values, np.ones(60)).fit(cov_type="cluster", cov_kwds={"groups": codes})
    assert ours.variance == pytest.approx(fit.cov_params()[0, 0])


def test_one_example_per_group_is_no_grouping() -> None:
    values = np.random.default_rng(2).normal(size=15)
    assert mean(values, np.arange(15)).variance == pytest.approx(mean(values).variance)


def test_two_columns_have_a_covariance() -> None:
    rng = np.random.default_rng(3)
    columns, codes = rng.normal(size=(40, 2)), np.arange(40) // 2
    _, plain, _ = moments(columns)
    assert plain == pytest.approx(np.cov(columns.T) / 40)
    _, grouped, _ = moments(columns, codes)
    for weights in ([1.0, 0.0], [0.0, 1.0], [1.0, -2.5]):
        w = np.array(weights)
        assert w @ grouped @ w == pytest.approx(cr2(columns @ w, codes))


def test_equal_values_have_no_variance_whatever_rounds() -> None:
    for number in (0.0, 0.1, -1 / 3):
        for codes in (None, np.arange(37) // 3):
            found = mean(np.full(37, number), codes)
            assert (found.mean, found.variance) == (number, 0.0)
    point = Student(0.1, 0.0, 36)
    assert (point.interval(0.95).low, point.interval(0.95).high) == (0.1, 0.1)
    assert (point.greater(0.0), point.less(0.0)) == (0.0, 1.0)
    assert (point.greater(0.1), point.less(0.1)) == (1.0, 1.0)


def test_group_means_that_agree_by_chance_are_no_certainty() -> None:
    values, codes = np.tile([1.0, -1.0], 10), np.arange(20) // 2
    assert cr2(values, codes) == pytest.approx(0)
    assert mean(values, codes).variance == pytest.approx(mean(values).variance)
    noisy = values + 0.1
    assert mean(noisy, codes).variance == pytest.approx(mean(noisy).variance)


def test_crossed_is_rows_and_columns_less_cells() -> None:
    values = np.random.default_rng(4).normal(size=(4, 6))
    values += np.array([2.0, -1.0, 0.0, 3.0])[:, None]
    flat = values.ravel()
    rows, columns = np.divmod(np.arange(24), 6)
    by_row, by_column = cr2(flat, rows), cr2(flat, columns)
    found = crossed(values)
    assert found.mean == pytest.approx(values.mean())
    expected = by_row + by_column - flat.var(ddof=1) / 24
    assert found.variance == pytest.approx(max(expected, by_row, by_column))
    assert found.df == 3
    assert crossed(values.T) == found


def test_crossed_effects_of_one_side_alone_are_that_sides() -> None:
    donors = np.random.default_rng(5).normal(size=7)
    found = crossed(np.tile(donors, (9, 1)))
    assert found.variance == pytest.approx(mean(donors).variance)


def test_crossed_leaves_out_what_is_missing() -> None:
    values = np.random.default_rng(6).normal(size=(5, 5))
    np.fill_diagonal(values, np.nan)
    present, rows, columns = cells(values)
    assert len(present) == 20
    assert crossed(values).mean == pytest.approx(np.nanmean(values))
    assert crossed(values).variance >= cr2(present, rows) - 1e-15
    assert crossed(values).variance >= cr2(present, columns) - 1e-15
    empty_row = np.vstack([values, np.full(5, np.nan)])
    assert crossed(empty_row) == crossed(values)


@pytest.mark.parametrize("spread", [(1, 0, 1), (0, 1, 1), (1, 1, 1)])
def test_crossed_covers(spread: tuple[float, float, float]) -> None:
    """10 x 20 with normal effects of recipients, donors and pairs; one seed, 400 samples."""
    rng = np.random.default_rng(7)
    a, b, e = spread
    samples = a * rng.normal(size=(400, 10, 1)) + b * rng.normal(size=(400, 1, 20))
    samples = samples + e * rng.normal(size=(400, 10, 20))
    assert np.mean([0.0 in crossed(sample).interval(0.95) for sample in samples]) >= 0.93
