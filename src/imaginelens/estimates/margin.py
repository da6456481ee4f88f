"""Margins: how large an effect may be and still count as none, and what a test says to it."""

import math
from dataclasses import dataclass

from imaginelens.estimates.errors import EstimateError


@dataclass(frozen=True)
class Relative:
    """A margin that is a share of the size of the total effect; see `relative`."""

    share: float

    def __post_init__(self) -> None:
        if not 0 < self.share < 1:
            raise EstimateError(
                f"a relative margin of {self.share} is no share of the total effect; give a number "
                "between 0 and 1, 0.05 for 5%"
            )

    def __str__(self) -> str:
        return f"{100 * self.share:g}% of the total effect"


def relative(share: float) -> Relative:
    """A margin of this share of |total effect|, for estimates that know their total.

    Raises:
        EstimateError: the share does not lie between 0 and 1.

    >>> str(relative(0.05))
    '5% of the total effect'
    """
    return Relative(share)


Margin = float | Relative


@dataclass(frozen=True, repr=False)
class Equivalence:
    """Two one-sided tests (TOST): is the quantity within the margin, on both sides?

    Attributes:
        lower_p: the p-value of "it is at most -margin" (of a share: chance - margin).
        upper_p: the p-value of "it is at least +margin".
        pvalue: the larger of the two.
        equivalent: both are below 0.05.
        note: why nothing can be claimed, whatever the data; "" if something can.

    >>> Equivalence(0.05, 0.01, 0.20)
    Equivalence(not shown within 0.05, p = 0.2)
    """

    margin: Margin
    lower_p: float
    upper_p: float
    note: str = ""

    @property
    def pvalue(self) -> float:
        """The larger of the two: equivalence is shown only if both sides are."""
        return max(self.lower_p, self.upper_p)

    @property
    def equivalent(self) -> bool:
        """Whether both one-sided tests reject at 5%."""
        return self.pvalue < 0.05

    def __repr__(self) -> str:
        shown = "shown" if self.equivalent else "not shown"
        note = f"; {self.note}" if self.note else ""
        return f"Equivalence({shown} within {words(self.margin)}, p = {self.pvalue:.3g}{note})"


def words(margin: Margin) -> str:
    """The margin in words."""
    return str(margin) if isinstance(margin, Relative) else f"{margin:g}"


def check_margin(margin: Margin | None, *, below: float = math.inf) -> Margin:
    """The margin, if it is one.

    Raises:
        EstimateError: it is missing, not positive, or not below what is possible.
    """
    if isinstance(margin, Relative):
        return margin
    if margin is None:
        raise EstimateError(
            "a claim of no effect needs a margin, chosen before seeing the data; pass margin=0.05, "
            "which is 0.05 in the outcome's unit, or margin=il.relative(0.05)"
        )
    if not 0 < margin < below:
        most = "" if below == math.inf else f" and below {below:g} (0.05 is 5 points)"
        raise EstimateError(
            f"a margin of {margin:g} is none; give a positive number in the outcome's unit{most}"
        )
    return float(margin)
