"""The studentised bootstrap of a mean: for skewed values, where Student's t covers too little.

Source: Efron (1981), Canadian J. Statistics 9:139-158, and Hall (1988), Annals of Statistics
16:927-953, for the name and the order of its error.
"""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int

from imaginelens.estimates.interval import Interval, Unbounded
from imaginelens.estimates.student import Student, critical, mean

# (draws + 1) * alpha / 2 is no whole number at the usual levels, so that no p-value equals alpha.
_DRAWS = 10_000
_AT_ONCE = 1_000_000  # numbers in memory
_NO_ENDS = (np.inf, -np.inf)


@dataclass(frozen=True, eq=False)
class Bootstrap:
    """A mean, its standard error, and the sorted t statistics of the resamples.

    The p-values count the observed statistic among the resamples, so that none is 0.
    """

    mean: float
    error: float
    resampled: Float[np.ndarray, " draw"]

    def interval(self, level: float) -> Interval:
        """The means that the two one-sided tests at (1 - level) / 2 do not reject."""
        critical(level)  # refuses what is no probability
        draws = len(self.resampled)
        cut = int((1 - level) / 2 * (draws + 1))
        most, least = (self.resampled[draws - cut], self.resampled[cut - 1]) if cut else _NO_ENDS
        low, high = self.mean - float(most) * self.error, self.mean - float(least) * self.error
        infinite = np.isinf([low, high]).sum()
        shapes: tuple[Unbounded, ...] = ("", "half", "everything")
        return Interval(low, high, level, unbounded=shapes[infinite])

    def greater(self, at: float) -> float:
        """The p-value of "the mean is at most `at`"."""
        below = np.searchsorted(self.resampled, (self.mean - at) / self.error, side="left")
        return float((len(self.resampled) - below + 1) / (len(self.resampled) + 1))

    def less(self, at: float) -> float:
        """The p-value of "the mean is at least `at`"."""
        up_to = np.searchsorted(self.resampled, (self.mean - at) / self.error, side="right")
        return float((up_to + 1) / (len(self.resampled) + 1))


def bootstrap(
    values: Float[np.ndarray, " example"],
    codes: Int[np.ndarray, " example"] | None = None,
    *,
    draws: int = _DRAWS,
    seed: int = 0,
) -> Bootstrap | Student:
    """The mean of the values, by resampling examples, or whole groups if `codes` numbers them.

    A resample without variance has an infinite t statistic; where there are many of them the
    interval has no end. Values that are all equal have nothing to resample: see `Student`.

    >>> str(bootstrap(np.array([1.0, 2.0, 3.0, 4.0, 10.0])).interval(0.95))
    '[1.418, 14]'
    """
    observed = mean(values, codes)
    if observed.variance == 0:
        return observed
    codes = np.arange(len(values)) if codes is None else codes
    sums, sizes = np.bincount(codes, weights=values - observed.mean), np.bincount(codes)
    generator, groups = np.random.default_rng(seed), len(sizes)
    step = max(1, _AT_ONCE // groups)
    drawn = [
        _statistics(sums[picked], sizes[picked], observed.variance)
        for start in range(0, draws, step)
        for picked in [generator.integers(groups, size=(min(step, draws - start), groups))]
    ]
    return Bootstrap(observed.mean, observed.variance**0.5, np.sort(np.concatenate(drawn)))


def _statistics(
    sums: Float[np.ndarray, "draw group"], sizes: Int[np.ndarray, "draw group"], observed: float
) -> Float[np.ndarray, " draw"]:
    """The t statistics of resamples, whose values are measured from the observed mean."""
    n = sizes.sum(1, keepdims=True)
    means = sums.sum(1, keepdims=True) / n
    residuals = sums - means * sizes
    variance = (residuals**2 / (1 - sizes / n)).sum(1) / n[:, 0] ** 2
    variance[variance <= 1e-20 * observed] = 0.0  # what rounding leaves of equal values
    with np.errstate(divide="ignore", invalid="ignore"):
        t = means[:, 0] / np.sqrt(variance)
    return np.where(np.isnan(t), 0.0, t)
