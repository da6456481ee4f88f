"""Contrasts of several 0/1 outcomes, by a score test: double differences, and ratios of effects.

Such a contrast has few possible values, and what was never seen in the data may well be possible:
Student's t would give a double difference that is 0 in every example the interval [0, 0]. Here the
variance under "the mean is d" is that of the most likely distribution which has this mean, on the
values that were seen and on the extremes. Of values -1, 0 and 1 this is Tango's score test, and for
ratios it takes the place of t in Fieller's argument.

In simulations of double differences (n = 20, 50, 128, 191; 15 distributions on -2, ..., 2) the 95%
interval covered in at least 94.6%, where t covered in as few as 63%; of shares of a total (n = 20,
50, 128; 9 distributions) in at least 93%, where Fieller's own covered in as few as 21%.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int
from scipy import optimize

from imaginelens.estimates import design
from imaginelens.estimates.interval import Interval
from imaginelens.estimates.student import critical, tail

_ROUNDING = 1e-14  # what is left of a mean of 0 after "value - margin" was rounded
_HALVINGS = 50
_ANGLES = 60


def bounded_z(seen: np.ndarray, counts: np.ndarray, low: float, high: float) -> float:
    """The score statistic of "the mean is 0", of values that cannot lie beyond low <= 0 <= high.

    Args:
        seen, counts: the values that were seen, and how often each.

    >>> round(bounded_z(np.array([1.0, -1.0, 0.0]), np.array([6, 16, 139]), -1.0, 1.0), 4)
    -2.132
    """
    n = float(counts.sum())
    mean = float(counts @ seen) / n
    if abs(mean) <= _ROUNDING * float(np.abs(seen).max()):
        return 0.0
    if mean < 0:
        return -bounded_z(-seen, counts, -high, -low)
    if low == 0:  # a mean of 0 would need values of 0 alone
        return math.inf
    # The likeliest probabilities are counts / (n + tilt * value), and what is left is at `low`. The
    # tilt goes as far as no probability is negative; there the variance is mean * -low.
    variance, most = -low * mean, -n / low * (1 - 1e-12)
    if _tilted_mean(most, seen, counts) < 0:
        tilt = float(optimize.brentq(_tilted_mean, 0.0, most, args=(seen, counts)))
        variance = float((counts / (n + tilt * seen)) @ seen**2)
    return mean * math.sqrt(n) / math.sqrt(variance)


def _tilted_mean(tilt: float, seen: np.ndarray, counts: np.ndarray) -> float:
    return float(counts @ (seen / (counts.sum() + tilt * seen)))


@dataclass(frozen=True, eq=False)
class BoundedMean:
    """Values between `low` and `high`, with the design effect of their groups and the df.

    Attributes:
        seen, counts: the values that were seen, and how often each.

    >>> zeros = BoundedMean(np.zeros(1), np.array([100]), -2.0, 2.0, 1.0, 99)
    >>> str(zeros.interval(0.95))
    '[-0.07576, 0.07576]'
    """

    seen: Float[np.ndarray, " value"]
    counts: Int[np.ndarray, " value"]
    low: float
    high: float
    inflation: float
    df: int

    def interval(self, level: float) -> Interval:
        """The means that a two-sided test does not reject."""
        wide = math.sqrt(self.inflation) * float(critical(level, self.df))

        def rejected(at: float) -> bool:
            return abs(self._z(at)) > wide

        low, high = (_crossing(rejected, self._mean, end) for end in (self.low, self.high))
        return Interval(low, high, level)

    def greater(self, at: float) -> float:
        """The p-value of "the mean is at most `at`"."""
        return self._tail(1.0, at)

    def less(self, at: float) -> float:
        """The p-value of "the mean is at least `at`"."""
        return self._tail(-1.0, at)

    def _tail(self, sign: float, at: float) -> float:
        return float(tail(sign * self._z(at) / math.sqrt(self.inflation), self.df))

    @property
    def _mean(self) -> float:
        return float(self.counts @ self.seen) / float(self.counts.sum())

    def _z(self, at: float) -> float:
        if not self.low < at < self.high and (self.seen != at).any():
            return math.copysign(math.inf, self._mean - at)  # no such mean is possible
        return bounded_z(self.seen - at, self.counts, self.low - at, self.high - at)


@dataclass(frozen=True, eq=False)
class BoundedRatio:
    """Numerators and denominators of which an example can have one of the `possible` pairs.

    A ratio r is a direction in which "numerator - r * denominator" has mean 0; the directions that
    are not rejected are found from the observed one on, to both sides.

    Attributes:
        seen, counts: the pairs that were seen, and how often each.

    >>> corners = np.array([[1.0, 1.0], [1.0, 0.0], [0.0, 1.0]])
    >>> possible = np.concatenate([corners, -corners])
    >>> str(BoundedRatio(np.ones((1, 2)), np.array([100]), possible, 1.0, 99).interval(0.95))
    '[0.9606, 1.041]'
    """

    seen: Float[np.ndarray, "value 2"]
    counts: Int[np.ndarray, " value"]
    possible: Float[np.ndarray, "extreme 2"]
    inflation: float
    df: int

    @property
    def value(self) -> float:
        """The ratio of the means; nan where the denominator's mean is 0."""
        top, bottom = self._means
        return top / bottom if bottom else math.nan

    def interval(self, level: float) -> Interval:
        """The ratios that a two-sided test does not reject.

        It is bounded if, and only if, the denominator's own interval leaves out 0.
        """
        wide = math.sqrt(self.inflation) * float(critical(level, self.df))
        top, bottom = self._means
        own = math.atan2(top, bottom) if bottom >= 0 else math.atan2(-top, -bottom)

        def size(angle: float) -> float:
            return abs(self._z(math.cos(angle), math.sin(angle)))

        def rejected(angle: float) -> bool:
            return size(angle) > wide

        furthest = max((own + math.pi * k / _ANGLES for k in range(1, _ANGLES)), key=size)
        if not rejected(furthest):
            return Interval(-math.inf, math.inf, level, unbounded="everything")
        high = _crossing(rejected, own, furthest)
        low = _crossing(rejected, own + math.pi, furthest) - math.pi
        if -math.pi / 2 < low and high < math.pi / 2:
            return Interval(math.tan(low), math.tan(high), level)
        return Interval(math.tan(high), math.tan(low), level, unbounded="outside")

    def greater(self, at: float) -> float:
        """The p-value of "the ratio is at most `at`", given the denominator's sign."""
        return self._tail(1.0, at)

    def less(self, at: float) -> float:
        """The p-value of "the ratio is at least `at`", given the denominator's sign."""
        return self._tail(-1.0, at)

    def _tail(self, sign: float, at: float) -> float:
        sign = sign if self._means[1] > 0 else -sign
        return float(tail(sign * self._z(1.0, at) / math.sqrt(self.inflation), self.df))

    @property
    def _means(self) -> tuple[float, float]:
        top, bottom = (self.counts @ self.seen / self.counts.sum()).tolist()
        return top, bottom

    def _z(self, a: float, b: float) -> float:
        """Of "a * numerator - b * denominator has mean 0"."""
        contrast = np.array([a, -b])
        extremes = self.possible @ contrast
        low, high = min(0.0, float(extremes.min())), max(0.0, float(extremes.max()))
        return bounded_z(self.seen @ contrast, self.counts, low, high)


def bounded_mean(
    values: Float[np.ndarray, " example"],
    low: float,
    high: float,
    codes: Int[np.ndarray, " example"] | None = None,
) -> BoundedMean:
    """The score test of values between low and high, in groups if `codes` numbers them.

    >>> bounded_mean(np.array([2.0, 0.0, -1.0]), -2.0, 2.0).df
    2
    """
    seen, counts = np.unique(values, return_counts=True)
    if codes is None:
        return BoundedMean(seen, counts, low, high, 1.0, len(values) - 1)
    return BoundedMean(seen, counts, low, high, design.grouped(values, codes), int(codes.max()))


def bounded_ratio(
    numerator: Float[np.ndarray, " example"],
    denominator: Float[np.ndarray, " example"],
    possible: Float[np.ndarray, "extreme 2"],
    codes: Int[np.ndarray, " example"] | None = None,
) -> BoundedRatio:
    """The score test of a ratio of two bounded means, in groups if `codes` numbers them.

    The design effect is the largest of those of the numerator, of the denominator and of the
    contrast that is 0 at the observed ratio.

    >>> pairs = np.array([[1.0, 1.0], [0.0, 1.0], [-1.0, -1.0]])
    >>> bounded_ratio(np.array([1.0, 0.0]), np.array([1.0, 1.0]), pairs).value
    0.5
    """
    pairs = np.stack([numerator, denominator], axis=1)
    seen, counts = np.unique(pairs, axis=0, return_counts=True)
    if codes is None:
        return BoundedRatio(seen, counts, possible, 1.0, len(pairs) - 1)
    top, bottom = pairs.mean(0)
    contrasts = (numerator, denominator, bottom * numerator - top * denominator)
    inflation = max(design.grouped(values, codes) for values in contrasts)
    return BoundedRatio(seen, counts, possible, inflation, int(codes.max()))


def _crossing(rejected: Callable[[float], bool], inside: float, outside: float) -> float:
    """The last number that is not rejected on the way from inside to outside."""
    if not rejected(outside):
        return outside
    for _ in range(_HALVINGS):
        middle = (inside + outside) / 2
        inside, outside = (inside, middle) if rejected(middle) else (middle, outside)
    return inside
