"""One share, by Wilson's score test."""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int

from imaginelens.estimates import design
from imaginelens.estimates.interval import Interval
from imaginelens.estimates.student import critical, tail


@dataclass(frozen=True)
class Wilson:
    """So many hits of n, with the design effect and the degrees of freedom of their groups.

    Without groups (df None) the quantile is normal, which is Wilson's own interval.
    Source: Wilson (1927), J. American Statistical Association 22:209-212.

    >>> str(Wilson(13, 16, 1.0, None).interval(0.95))
    '[0.5699, 0.9341]'
    """

    hits: int
    n: int
    inflation: float
    df: int | None

    def interval(self, level: float) -> Interval:
        """The shares that a two-sided test does not reject."""
        p, m = self.hits / self.n, self.n / self.inflation
        z = float(critical(level, self.df))
        centre = (p + z**2 / (2 * m)) / (1 + z**2 / m)
        half = z / (1 + z**2 / m) * (p * (1 - p) / m + z**2 / (4 * m**2)) ** 0.5
        low = 0.0 if self.hits == 0 else centre - half
        return Interval(low, 1.0 if self.hits == self.n else centre + half, level)

    def greater(self, at: float) -> float:
        """The p-value of "the share is at most `at`"."""
        return self._tail(1.0, at)

    def less(self, at: float) -> float:
        """The p-value of "the share is at least `at`"."""
        return self._tail(-1.0, at)

    def _tail(self, sign: float, at: float) -> float:
        above = sign * (self.hits / self.n - at)
        if not 0 < at < 1:  # no share lies beyond 0 and 1, and on them there is no chance
            return 0.0 if above > 0 else 1.0
        return float(tail(above / (at * (1 - at) * self.inflation / self.n) ** 0.5, self.df))


def wilson(
    hits: Float[np.ndarray, " example"], codes: Int[np.ndarray, " example"] | None = None
) -> Wilson:
    """The score test of hits 0 and 1, in groups if `codes` numbers them.

    >>> wilson(np.array([1.0, 0.0, 1.0, 1.0]))
    Wilson(hits=3, n=4, inflation=1.0, df=None)
    """
    inflation, df = 1.0, None
    if codes is not None:
        inflation, df = design.grouped(hits, codes), int(codes.max())
    return Wilson(int(hits.sum()), len(hits), inflation, df)
