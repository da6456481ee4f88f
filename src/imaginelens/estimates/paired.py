"""The difference of two paired 0/1 outcomes, by Tango's score test."""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int

from imaginelens.estimates import design
from imaginelens.estimates.interval import Interval
from imaginelens.estimates.score import score_interval, score_z
from imaginelens.estimates.student import cells, tail


@dataclass(frozen=True)
class PairedScore:
    """Counts of gained and lost among n, the design effect of their groups, and the df.

    >>> str(PairedScore(6, 16, 161, 1.0, 160).interval(0.95))
    '[-0.1246, -0.004967]'
    """

    gained: int
    lost: int
    n: int
    inflation: float
    df: int

    def interval(self, level: float) -> Interval:
        """The differences of proportions that a two-sided test does not reject."""
        low, high = score_interval(
            self.gained, self.lost, self.n, level=level, inflation=self.inflation, df=self.df
        )
        return Interval(float(low), float(high), level)

    def greater(self, at: float) -> float:
        """The p-value of "the difference is at most `at`"."""
        return self._tail(1.0, at)

    def less(self, at: float) -> float:
        """The p-value of "the difference is at least `at`"."""
        return self._tail(-1.0, at)

    def _tail(self, sign: float, at: float) -> float:
        z = sign * score_z(self.gained, self.lost, self.n, at)
        return float(tail(z / self.inflation**0.5, self.df))


def paired(
    values: Float[np.ndarray, " example"], codes: Int[np.ndarray, " example"] | None = None
) -> PairedScore:
    """The score test of changes -1, 0 and 1, in groups if `codes` numbers them.

    >>> paired(np.array([1.0, 0.0, -1.0, 1.0]))
    PairedScore(gained=2, lost=1, n=4, inflation=1.0, df=3)
    """
    if codes is None:
        return _counted(values, 1.0, len(values) - 1)
    return _counted(values, design.grouped(values, codes), int(codes.max()))


def crossed(values: Float[np.ndarray, "recipient donor"]) -> PairedScore:
    """The score test of changes -1, 0 and 1 of recipients crossed with donors.

    >>> crossed(np.zeros((20, 5)))
    PairedScore(gained=0, lost=0, n=100, inflation=20.0, df=4)
    """
    present, rows, columns = cells(values)
    return _counted(present, design.two_way(values), int(min(rows.max(), columns.max())))


def _counted(values: Float[np.ndarray, " example"], inflation: float, df: int) -> PairedScore:
    gained, lost = int((values == 1).sum()), int((values == -1).sum())
    return PairedScore(gained, lost, len(values), inflation, df)
