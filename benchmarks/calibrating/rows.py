"""One measured rate, and the rule it has to keep."""

from collections.abc import Callable
from dataclasses import dataclass

from scipy import stats

LEAST, MOST = 0.93, 0.97  # coverage of a 95% interval; more than MOST is flagged, not wrong
ENUMERATED, SIMULATED = 0.05, 0.055  # false positives of a 5% test; upper 99% bound if simulated

Task = tuple[str, Callable[[], list["Row"]]]


@dataclass(frozen=True)
class Row:
    """One rate, how it was found, and whether it keeps the rule.

    Attributes:
        quantity: "coverage" of the 95% interval, or how often a 5% test rejects a true null:
            "test" of no effect, "TOST" of an effect at the margin, "any cell" of a map; "all cells"
            is the coverage of simultaneous intervals.
        rate, low, high: the rate with its 99% Monte-Carlo interval; the same thrice if enumerated.
        runs: simulated data sets; 0 if enumerated.
        binary: the outcome is 0/1, so that coverage comes in jumps.
    """

    procedure: str
    data: str
    quantity: str
    rate: float
    low: float
    high: float
    runs: int
    binary: bool

    @property
    def key(self) -> str:
        return f"{self.procedure} | {self.data} | {self.quantity}"

    @property
    def breaks(self) -> str:
        """What is wrong with the row, in words; "" if nothing is."""
        if self.quantity in ("coverage", "all cells"):
            if self.rate < LEAST:
                return "covers too little"
            return "wider than needed" if self.rate > MOST and not self.binary else ""
        if self.high <= (SIMULATED if self.runs else ENUMERATED):
            return ""
        sure = self.low > ENUMERATED
        return "rejects too often" if sure else "may reject too often: too few runs to tell"


def exactly(procedure: str, data: str, quantity: str, rate: float) -> Row:
    """A row without noise, of a 0/1 outcome."""
    return Row(procedure, data, quantity, *(3 * [float(rate)]), 0, True)


def counted(procedure: str, data: str, quantity: str, hits: int, runs: int, binary: bool) -> Row:
    """A row of so many hits, with Clopper and Pearson's 99% interval."""
    interval = stats.binomtest(hits, runs).proportion_ci(0.99)
    ends = float(interval.low), float(interval.high)
    return Row(procedure, data, quantity, hits / runs, *ends, runs, binary)
