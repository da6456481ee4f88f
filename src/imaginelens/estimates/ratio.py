"""A ratio of two means of the same examples, by Fieller's test.

"The ratio is r" is the same claim as "numerator - r * denominator has mean 0", which Student's t
tests without dividing by anything. Source: Fieller (1954), J. Royal Statistical Society B 16:175.
"""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int

from imaginelens.estimates.interval import Interval
from imaginelens.estimates.student import Student, critical, moments


@dataclass(frozen=True)
class Fieller:
    """The means of numerator and denominator, the three numbers of their covariance, and its df.

    >>> str(Fieller(1.0, 2.0, 0.01, 0.0, 0.01, 30).interval(0.95))
    '[0.3904, 0.6202]'
    >>> str(Fieller(1.0, 0.1, 0.01, 0.0, 0.01, 30).interval(0.95))
    '(-inf, -9.491] or [3.184, inf)'
    """

    numerator: float
    denominator: float
    numerator_variance: float
    covariance: float
    denominator_variance: float
    df: int

    @property
    def value(self) -> float:
        """The ratio of the means; nan where the denominator's mean is 0."""
        return self.numerator / self.denominator if self.denominator else float("nan")

    def interval(self, level: float) -> Interval:
        """The ratios that a two-sided test does not reject: a r^2 - 2 b r + c <= 0.

        It is bounded if, and only if, the denominator's own interval leaves out 0.
        """
        t2 = float(critical(level, self.df)) ** 2
        a = self.denominator**2 - t2 * self.denominator_variance
        b = self.numerator * self.denominator - t2 * self.covariance
        inner = t2 * self._spread() - t2**2 * self._determinant()  # b^2 - a c, without its rounding
        if a > 0:
            root = max(inner, 0.0) ** 0.5  # the ratio itself is a solution: below 0 is rounding
            return Interval((b - root) / a, (b + root) / a, level)
        if a < 0 < inner:
            low, high = (b + inner**0.5) / a, (b - inner**0.5) / a
            return Interval(low, high, level, unbounded="outside")
        return Interval(-float("inf"), float("inf"), level, unbounded="everything")

    def _spread(self) -> float:
        n, d = self.numerator, self.denominator
        return (
            d**2 * self.numerator_variance
            - 2 * n * d * self.covariance
            + n**2 * self.denominator_variance
        )

    def _determinant(self) -> float:
        return self.numerator_variance * self.denominator_variance - self.covariance**2

    def contrast(self, at: float) -> Student:
        """The mean of numerator - at * denominator."""
        variance = (
            self.numerator_variance - 2 * at * self.covariance + at**2 * self.denominator_variance
        )
        return Student(self.numerator - at * self.denominator, max(variance, 0.0), self.df)

    def greater(self, at: float) -> float:
        """The p-value of "the ratio is at most `at`", given the denominator's sign."""
        contrast = self.contrast(at)
        return contrast.greater(0.0) if self.denominator > 0 else contrast.less(0.0)

    def less(self, at: float) -> float:
        """The p-value of "the ratio is at least `at`", given the denominator's sign."""
        contrast = self.contrast(at)
        return contrast.less(0.0) if self.denominator > 0 else contrast.greater(0.0)


def fieller(
    numerator: Float[np.ndarray, " example"],
    denominator: Float[np.ndarray, " example"],
    codes: Int[np.ndarray, " example"] | None = None,
) -> Fieller:
    """The ratio of two means of the same examples, in groups if `codes` numbers them.

    >>> fieller(np.array([1.0, 2.0, 3.0]), np.array([2.0, 5.0, 5.0])).value
    0.5
    """
    means, covariance, df = moments(np.stack([numerator, denominator], axis=1), codes)
    (nn, nd), (_, dd) = covariance.tolist()
    return Fieller(float(means[0]), float(means[1]), nn, nd, dd, df)
