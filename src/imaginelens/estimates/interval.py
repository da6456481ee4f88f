"""An interval, also one without end: what the data leave possible."""

from dataclasses import dataclass
from typing import Literal

Unbounded = Literal["", "half", "outside", "everything"]


@dataclass(frozen=True)
class Interval:
    """The numbers that the test behind `procedure` does not reject at 1 - `level`.

    Attributes:
        unbounded: "" for [low, high]; "half" where one end is infinite; "outside" for all numbers
            except those between low and high; "everything" where no number is rejected.

    >>> 0.5 in Interval(0.0, 1.0, 0.95), 0.5 in Interval(0.0, 1.0, 0.95, unbounded="outside")
    (True, False)
    """

    low: float
    high: float
    level: float
    procedure: str = ""
    unbounded: Unbounded = ""

    def __contains__(self, number: float) -> bool:
        if self.unbounded == "outside":
            return not bool(self.low < number < self.high)
        return bool(self.low <= number <= self.high)

    def __str__(self) -> str:
        if self.unbounded == "outside":
            return f"(-inf, {self.low:.4g}] or [{self.high:.4g}, inf)"
        left = "(" if self.low == -float("inf") else "["
        right = ")" if self.high == float("inf") else "]"
        return f"{left}{self.low:.4g}, {self.high:.4g}{right}"
