"""Estimate: one number with its examples, and everything that may be claimed about it.

The procedure follows from the type of the outcome and is fixed before the values are seen; the
interval, the p-value, the equivalence test and the verdict of an estimate are all the same test.
"""

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Literal, get_args

import numpy as np
from jaxtyping import Float, Int

from imaginelens.estimates import bootstrap as resampling
from imaginelens.estimates import paired as score
from imaginelens.estimates import student
from imaginelens.estimates.bounded import bounded_mean, bounded_ratio
from imaginelens.estimates.errors import EstimateError
from imaginelens.estimates.inputs import (
    check_groups,
    group_codes,
    labels,
    numbers,
    outcomes,
    same_length,
)
from imaginelens.estimates.interval import Interval
from imaginelens.estimates.margin import Equivalence, Margin, Relative, check_margin, words
from imaginelens.estimates.method import Method
from imaginelens.estimates.ratio import Fieller, fieller
from imaginelens.estimates.wilson import wilson
from imaginelens.estimates.within import within_total

Procedure = Literal[
    "t",
    "cluster-robust t",
    "two-way crossed t",
    "studentised bootstrap",
    "studentised group bootstrap",
    "Tango score",
    "cluster-adjusted Tango score",
    "two-way crossed Tango score",
    "Wilson score",
    "cluster-adjusted Wilson score",
    "bounded score",
    "cluster-adjusted bounded score",
    "Fieller",
    "cluster-robust Fieller",
    "bounded Fieller",
    "cluster-adjusted bounded Fieller",
]
Verdict = Literal["effect", "equivalent", "both", "inconclusive"]


@dataclass(frozen=True, repr=False, eq=False)
class Estimate:
    """A mean effect, a share or a ratio, with the value of every example.

    Make one with `Estimate.mean`, `.paired`, `.share`, `.bounded`, `.crossed` or `.ratio`. All
    claims are dual: `pvalue() < 0.05` if, and only if, `ci()` leaves out the null, and
    `equivalence(margin)` holds if, and only if, the margin exceeds `min_margin()`.

    Values that are all equal are taken at their word by the procedures for numbers (t, bootstrap,
    Fieller): an effect that is exactly 0.0 in every example has the interval [0, 0], p = 1, and is
    equivalent; one that is exactly c everywhere has [c, c] and p = 0. For 0/1 outcomes equal values
    prove little, and the score procedures give them a proper interval: so use `paired` and
    `share` for those, never `mean`, `bounded` for differences of their differences, and `ratio`
    with `possible` for ratios.

    Attributes:
        values: one per example, or (recipient, donor); nan is missing, counted, never imputed.
        procedure: the test behind all claims.
        groups: the label of each example's group of dependent examples; None if independent.
        denominator: the ratio's denominators; None for all others.
        total: the effect that `relative` margins are a share of.
        null: what "no effect" is: 0, or the chance level of a share; None where there is none.
        possible: the extremes of what an example can have, one in each row: of a ratio, numerator
            and denominator. None where nothing is known of them.

    >>> effect = Estimate.mean([0.5, 0.1, 0.4, -0.2, 0.3], name="tnie")
    >>> effect
    Estimate(tnie = 0.22, 95% [-0.1245, 0.5645], n=5, t)
    >>> effect.verdict(margin=0.1)
    'inconclusive'
    """

    values: Float[np.ndarray, "..."]
    procedure: Procedure
    name: str = ""
    unit: str = ""
    groups: tuple[Any, ...] | None = None
    denominator: Float[np.ndarray, "..."] | None = None
    total: "Estimate | None" = None
    null: float | None = 0.0
    possible: Float[np.ndarray, "extreme quantity"] | None = None

    def __post_init__(self) -> None:
        if self.procedure not in get_args(Procedure):
            raise EstimateError(
                f"there is no procedure {self.procedure!r}; use Estimate.mean, .paired, .share, "
                ".bounded, .crossed or .ratio, which choose one"
            )
        axes = ("recipient", "donor") if self.procedure.startswith("two-way") else ("example",)
        if self.values.ndim != len(axes):
            raise EstimateError(
                f"values of shape {self.values.shape} came where ({', '.join(axes)}) was expected; "
                "give one per example, or, without groups, (recipient, donor) to .crossed, .paired"
            )
        self._check_counts()
        if self.total is not None:
            same_length(self.values, self.total.values, ("the effect", "its total"))
            if self.total.null != 0 or self.total.denominator is not None:
                raise EstimateError(
                    f"a total effect by {self.total.procedure} is no difference of outcomes; give "
                    "an Estimate made by .mean, .paired or .crossed as total"
                )

    @staticmethod
    def mean(
        values: Any,
        *,
        name: str = "",
        unit: str = "",
        groups: Any = None,
        bootstrap: bool = False,
        total: "Estimate | None" = None,
    ) -> "Estimate":
        """The mean of a number per example: an effect on a logit difference, say.

        Student's t; with groups the cluster-robust one (CR2, G - 1 degrees of freedom).

        Args:
            groups: one label per example: examples of one image or question depend on each other.
            bootstrap: use the studentised bootstrap (10000 resamples, seed 0), of whole groups if
                there are any: covers better where the values are skewed, worse where they are few.
            total: what `relative` margins are a share of, for the same examples.

        Raises:
            EstimateError: fewer than 2 values or 10 groups, infinite values, or labels missing.

        >>> Estimate.mean([1.0, 2.0, 3.0, float("nan")], unit="logits")
        Estimate(2 logits, 95% [-0.4841, 4.484], n=3, 1 missing, t)
        """
        kind: Procedure
        if bootstrap:
            kind = "studentised bootstrap" if groups is None else "studentised group bootstrap"
        else:
            kind = "t" if groups is None else "cluster-robust t"
        return Estimate(numbers(values, "values"), kind, name, unit, labels(groups), total=total)

    @staticmethod
    def paired(
        after: Any,
        before: Any,
        *,
        name: str = "",
        unit: str = "",
        groups: Any = None,
        total: "Estimate | None" = None,
    ) -> "Estimate":
        """The difference of two 0/1 outcomes of the same examples: P(after) - P(before).

        Tango's score test with a t quantile (n - 1 degrees of freedom), so that the interval is a
        little wider than Tango's own, which is `score_interval(gained, lost, n)`. Enumerated at
        n = 20, 50, 191 and 2%, 5%, 10% discordant examples, the two-sided test at 5% then rejects a
        true null in at most 4.6% (5.2% with the normal quantile), and the 95% interval covers any
        difference in at least 93.6%. The t interval of the mean has no such bound: it is [0, 0]
        where nothing changed.

        With groups the variance is multiplied by their design effect and the degrees of freedom are
        G - 1; see `imaginelens.estimates.design`. Arrays (recipient, donor) are taken as crossed.

        Raises:
            EstimateError: a value is neither 0, 1 nor nan, lengths differ, or fewer than 2 examples
                or 10 groups.

        >>> Estimate.paired([1, 1, 1, 0, 1, 1], [0, 1, 0, 0, 1, 1], name="flips")
        Estimate(flips = 0.3333, 95% [-0.3655, 0.773], n=6, Tango score)
        """
        new, old = outcomes(after, "after"), outcomes(before, "before")
        same_length(new, old, ("after", "before"))
        change = numbers(new - old, "changes")
        kind: Procedure = "Tango score" if groups is None else "cluster-adjusted Tango score"
        if change.ndim == 2 and groups is None:
            kind = "two-way crossed Tango score"
        return Estimate(change, kind, name, unit, labels(groups), total=total)

    @staticmethod
    def share(
        hits: Any,
        *,
        name: str = "",
        unit: str = "",
        groups: Any = None,
        chance: float | None = None,
    ) -> "Estimate":
        """How often something happened: a share of 0/1 outcomes, by Wilson's score test.

        Args:
            groups: one label per example; the variance is multiplied by their design effect.
            chance: the share that means nothing, e.g. 0.25 for four choices. Without it there is
                an interval, and no p-value, equivalence test or verdict: 0 is not a share's null.

        Raises:
            EstimateError: a value is neither 0, 1 nor nan, chance does not lie between 0 and 1, or
                fewer than 2 examples or 10 groups.

        >>> Estimate.share([1, 1, 1, 0], chance=0.25)
        Estimate(0.75, 95% [0.3006, 0.9544], n=4, Wilson score)
        """
        if chance is not None and not 0 < chance < 1:
            raise EstimateError(
                f"a chance level of {chance} leaves nothing to chance; give a share between 0 and "
                "1, 0.25 for four choices"
            )
        kind: Procedure = "Wilson score" if groups is None else "cluster-adjusted Wilson score"
        return Estimate(outcomes(hits, "hits"), kind, name, unit, labels(groups), null=chance)

    @staticmethod
    def bounded(
        values: Any,
        *,
        low: float,
        high: float,
        name: str = "",
        unit: str = "",
        groups: Any = None,
        total: "Estimate | None" = None,
    ) -> "Estimate":
        """The mean of a contrast of several 0/1 outcomes: of (a - b) - (c - d), say, from -2 to 2.

        A score test as for `paired`, which is the case of -1 to 1: values that are equal in all
        examples have a proper interval. See `imaginelens.estimates.bounded`.

        Args:
            low, high: the smallest and the largest value that an example can have.

        Raises:
            EstimateError: a value lies beyond low or high, these do not lie around 0, or fewer
                than 2 values or 10 groups.

        >>> Estimate.bounded([0, 0, 1, 0, 0, -1, 0, 0], low=-2, high=2, name="int_med")
        Estimate(int_med = 0, 95% [-0.8228, 0.8228], n=8, bounded score)
        """
        if not low < 0 < high:
            raise EstimateError(
                f"values from {low:g} to {high:g} do not lie on both sides of 0; give the extremes "
                "of a difference"
            )
        given, extremes = numbers(values, "values"), np.array([[low], [high]], dtype=np.float64)
        _check_possible(given[..., None], extremes)
        kind: Procedure = "bounded score"
        if groups is not None:
            kind = "cluster-adjusted bounded score"
        return Estimate(given, kind, name, unit, labels(groups), total=total, possible=extremes)

    @staticmethod
    def crossed(
        values: Any, *, name: str = "", unit: str = "", total: "Estimate | None" = None
    ) -> "Estimate":
        """The mean of a number per pair of a recipient (row) and a donor (column); nan is no pair.

        Pairs that share a recipient or a donor depend on each other: the variance is two-way, and
        the degrees of freedom are those of the shorter side. For 0/1 outcomes use `paired` with
        arrays (recipient, donor).

        Raises:
            EstimateError: fewer than 2 rows or columns with a value, or infinite values.

        >>> Estimate.crossed([[1.0, 2.0, 1.5], [2.0, 3.5, 2.0]], name="swap")
        Estimate(swap = 2, 95% [-4.713, 8.713], n=6, 2 recipients x 3 donors, two-way crossed t)
        """
        return Estimate(numbers(values, "values"), "two-way crossed t", name, unit, total=total)

    @staticmethod
    def ratio(
        numerator: Any,
        denominator: Any,
        *,
        name: str = "",
        unit: str = "",
        groups: Any = None,
        possible: Any = None,
    ) -> "Estimate":
        """The ratio of two means of the same examples, e.g. the mediated share of an effect.

        Fieller's interval, which may have no end: `ci().unbounded` says so. It is the ratio of the
        means, never the mean of ratios, in which examples with a small denominator would rule.

        Args:
            possible: where these are contrasts of 0/1 outcomes, all pairs (numerator, denominator)
                that an example can have; the score test then takes the place of t, as in `bounded`.

        Raises:
            EstimateError: lengths differ, fewer than 2 examples or 10 groups, infinite values, or
                values beyond what is possible.

        >>> Estimate.ratio([0.5, 0.7, 0.6, 0.4], [1.0, 1.2, 0.9, 1.1], name="mediated")
        Estimate(mediated = 0.5238, 95% [0.3304, 0.743], n=4, Fieller)
        """
        top, bottom = numbers(numerator, "numerators"), numbers(denominator, "denominators")
        same_length(top, bottom, ("the numerator", "the denominator"))
        kind: Procedure = "Fieller" if groups is None else "cluster-robust Fieller"
        if possible is None:
            return Estimate(top, kind, name, unit, labels(groups), bottom)
        extremes = numbers(possible, "possible pairs").reshape(-1, 2)
        _check_possible(np.stack([top, bottom], axis=-1), extremes)
        kind = "bounded Fieller" if groups is None else "cluster-adjusted bounded Fieller"
        return Estimate(top, kind, name, unit, labels(groups), bottom, possible=extremes)

    @property
    def value(self) -> float:
        """The estimate itself; nan for a ratio to a mean of 0."""
        if self.denominator is None:
            return float(student.mean(self.values[self._present]).mean)
        return self._fieller().value

    @property
    def n(self) -> int:
        """How many examples it rests on."""
        return int(self._present.sum())

    @property
    def missing(self) -> int:
        """How many examples were left out because a value of theirs is nan."""
        return int(self._present.size) - self.n

    @property
    def n_groups(self) -> int:
        """How many independent units it rests on: groups, the shorter side, or examples."""
        if self.values.ndim == 2:
            return min(self._sides)
        return self.n if self._codes is None else int(self._codes.max()) + 1

    def ci(self, *, level: float = 0.95) -> Interval:
        """The interval of all numbers that the test does not reject at 1 - level.

        Raises:
            EstimateError: the level does not lie between 0 and 1.
        """
        return replace(self._method.interval(level), procedure=self.procedure)

    def pvalue(self) -> float:
        """The two-sided p-value of "no effect": below 0.05 where the 95% interval leaves it out.

        Raises:
            EstimateError: a share without a chance level has no null.
        """
        null = self._null()
        return min(1.0, 2 * min(self._method.greater(null), self._method.less(null)))

    def equivalence(self, margin: Margin | None = None) -> Equivalence:
        """Whether the effect is within the margin, by two one-sided tests (TOST) at 5%.

        Args:
            margin: in the outcome's unit (0.05 is 5 points of a 0/1 outcome), or
                `il.relative(0.05)`: 5% of the size of the total effect, whose own uncertainty is
                taken into account.

        Raises:
            EstimateError: the margin is missing, not positive, or relative without a total.
        """
        margin = check_margin(margin, below=1.0 if "score" in self.procedure else float("inf"))
        if isinstance(margin, Relative):
            return self._relative(margin)
        null = self._null()
        note = self._undefined()
        if note:
            return Equivalence(margin, 1.0, 1.0, note)
        return Equivalence(
            margin, self._method.greater(null - margin), self._method.less(null + margin)
        )

    def min_margin(self, *, alpha: float = 0.05) -> float:
        """The smallest margin the data support: every larger one passes TOST at alpha.

        It is the end of the 1 - 2 alpha interval that is further from the null; infinite where the
        interval has no end.

        Raises:
            EstimateError: alpha does not lie between 0 and 0.5, or a share has no chance level.
        """
        if not 0 < alpha < 0.5:
            raise EstimateError(f"an alpha of {alpha} is no error rate; use 0.05")
        null = self._null()
        interval = self.ci(level=1 - 2 * alpha)
        if interval.unbounded or self._undefined(level=1 - alpha):
            return float("inf")
        return max(abs(interval.low - null), abs(interval.high - null))

    def verdict(self, margin: Margin | None = None) -> Verdict:
        """What the data show: an effect, its absence, both (real but smaller), or neither.

        "effect": the 95% interval leaves out the null. "equivalent": `equivalence(margin)` holds.

        Raises:
            EstimateError: as `equivalence`.
        """
        absent, present = self.equivalence(margin).equivalent, self.pvalue() < 0.05
        if absent and present:
            return "both"
        if absent or present:
            return "equivalent" if absent else "effect"
        return "inconclusive"

    def describe(self, margin: Margin | None = None) -> str:
        """One sentence with the number, its interval and the verdict in words.

        Raises:
            EstimateError: as `equivalence`.

        >>> print(Estimate.mean([0.02, 0.01, 0.03, 0.02], name="tnie").describe(margin=0.05))
        tnie is 0.02, 95% interval [0.007008, 0.03299], n = 4: real but smaller than the margin of
        0.05.
        """
        equivalence = self.equivalence(margin)
        within, note = words(equivalence.margin), equivalence.note
        said = {
            "effect": "an effect",
            "equivalent": f"none beyond the margin of {within}",
            "both": f"real but smaller than the margin of {within}",
            "inconclusive": "inconclusive, neither an effect nor its absence within the margin of "
            f"{within} is shown",
        }[self.verdict(margin)]
        return (
            f"{self.name or 'the effect'} is {self._number()}, 95% interval {self.ci()}, n = "
            f"{self.n}: {said}{f' ({note})' if note else ''}."
        )

    def __repr__(self) -> str:
        head = f"{self.name} = {self._number()}" if self.name else self._number()
        parts = [head, f"95% {self.ci()}", f"n={self.n}"]
        if self.missing:
            parts.append(f"{self.missing} missing")
        if self.values.ndim == 2:
            parts.append("{} recipients x {} donors".format(*self._sides))
        if self.groups is not None:
            parts.append(f"{self.n_groups} groups")
        return f"Estimate({', '.join([*parts, self.procedure])})"

    def _number(self) -> str:
        return f"{self.value:.4g}{f' {self.unit}' if self.unit else ''}"

    @cached_property
    def _present(self) -> np.ndarray:
        """Which examples have all their values."""
        there = ~np.isnan(self.values)
        return there if self.denominator is None else there & ~np.isnan(self.denominator)

    @cached_property
    def _codes(self) -> Int[np.ndarray, " example"] | None:
        """The number of the group of every example that is present."""
        if self.groups is None:
            return None
        codes = group_codes(self.groups, len(self.values))[self._present]
        return np.asarray(np.unique(codes, return_inverse=True)[1])

    @property
    def _sides(self) -> tuple[int, int]:
        """How many recipients and donors have a value."""
        return int(self._present.any(1).sum()), int(self._present.any(0).sum())

    @cached_property
    def _method(self) -> Method:
        """The procedure, applied to the values."""
        values = self.values[self._present]
        match self.procedure:
            case "t" | "cluster-robust t":
                return student.mean(values, self._codes)
            case "studentised bootstrap" | "studentised group bootstrap":
                return resampling.bootstrap(values, self._codes)
            case "two-way crossed t":
                return student.crossed(self.values)
            case "Tango score" | "cluster-adjusted Tango score":
                return score.paired(values, self._codes)
            case "two-way crossed Tango score":
                return score.crossed(self.values)
            case "Wilson score" | "cluster-adjusted Wilson score":
                return wilson(values, self._codes)
            case "bounded score" | "cluster-adjusted bounded score":
                assert self.possible is not None
                low, high = self.possible[:, 0].tolist()
                return bounded_mean(values, low, high, self._codes)
            case "bounded Fieller" | "cluster-adjusted bounded Fieller":
                assert self.possible is not None
                assert self.denominator is not None
                bottom = self.denominator[self._present]
                return bounded_ratio(values, bottom, self.possible, self._codes)
        return self._fieller()

    def _fieller(self) -> Fieller:
        assert self.denominator is not None
        there = self._present
        return fieller(self.values[there], self.denominator[there], self._codes)

    def _null(self) -> float:
        if self.null is None:
            raise EstimateError(
                f"the share {self.name or self.value} has no null to test against, for 0 is none; "
                "give its chance level, Estimate.share(..., chance=0.25)"
            )
        return self.null

    def _undefined(self, *, level: float = 0.95) -> str:
        """Why a ratio cannot be said to be small; "" for all else."""
        if self.denominator is None or not self.ci(level=level).unbounded:
            return ""
        return "the denominator's own interval contains 0, so that no ratio to it can be small"

    def _relative(self, margin: Relative) -> Equivalence:
        """TOST with a share of the total effect as its margin."""
        if self.total is None:
            raise EstimateError(
                f"a margin of {margin} needs the total effect, and {self.name or 'this estimate'} "
                "does not know it; give total= to .mean, .paired or .crossed, or a margin in "
                "the outcome's unit"
            )
        if self.total.pvalue() >= 0.05:
            return Equivalence(
                margin,
                1.0,
                1.0,
                f"the total effect is not established, its 95% interval {self.total.ci()} "
                "contains 0, so that nothing can be said to be a small share of it",
            )
        total = self.total.value
        if "score" in self.procedure:
            p = within_total(self._method, self.total._method, margin.share, total)
            return Equivalence(margin, *p)
        share = margin.share * (1.0 if total > 0 else -1.0) * self.total.values
        above = replace(self, values=self.values + share, total=None)
        below = replace(self, values=self.values - share, total=None)
        return Equivalence(margin, above._method.greater(0.0), below._method.less(0.0))

    def _check_counts(self) -> None:
        """Refuse too little to tell how much the values vary."""
        if self.values.ndim == 2 and min(self._sides) < 2:
            raise EstimateError(
                f"values of {self._sides[0]} recipients and {self._sides[1]} donors do not tell "
                "how much either differs; have at least 2 of both"
            )
        if self.n < 2:
            raise EstimateError(
                f"{self.n} of {self._present.size} examples {'has' if self.n == 1 else 'have'} a "
                f"value ({self.missing} missing), and an interval needs 2; use more examples"
            )
        if self._codes is not None:
            check_groups(self._codes)


def _check_possible(
    values: Float[np.ndarray, "... quantity"], extremes: Float[np.ndarray, "extreme quantity"]
) -> None:
    """Refuse values beyond what is said to be possible."""
    beyond = (values < extremes.min(0)) | (values > extremes.max(0))
    if beyond.any():
        raise EstimateError(
            f"{values[beyond][0]:g} lies beyond what is said to be possible, "
            f"{extremes.min():g} to {extremes.max():g}; use Estimate.mean, or Estimate.ratio "
            "without possible, for numbers"
        )
