"""What every procedure can do: give its interval and test a number from either side."""

from typing import Protocol, runtime_checkable

from imaginelens.estimates.interval import Interval


@runtime_checkable
class Method(Protocol):
    """One test and the interval of all numbers that it does not reject."""

    def interval(self, level: float) -> Interval:
        """The numbers not rejected by the two-sided test at 1 - level."""

    def greater(self, at: float) -> float:
        """The p-value of "the quantity is at most `at`"."""

    def less(self, at: float) -> float:
        """The p-value of "the quantity is at least `at`"."""
