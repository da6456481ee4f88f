"""Many cells, one map: which of them can be named without being fooled by their number?

`adjust` takes p-values as they are. `max_t` takes the examples themselves, and so uses that
neighbouring cells move together: flipping the sign of an example in all cells at once keeps their
correlation, and the largest statistic over the map is what each cell is compared with.
`equivalence_map` asks the opposite: which cells have no effect beyond a margin?

Sources: Holm (1979), Scandinavian Journal of Statistics 6:65-70; Benjamini & Hochberg (1995),
JRSS B 57:289-300; Benjamini & Yekutieli (2001), Annals of Statistics 29:1165-1188; Westfall & Young
(1993), Resampling-Based Multiple Testing, algorithms 2.5 and 2.8; Berger (1982), Technometrics
24:295-300, for the intersection-union test.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from jaxtyping import Bool, Float, Int
from numpy.typing import ArrayLike
from scipy import stats

from imaginelens.estimates import design, paired, student
from imaginelens.estimates.errors import EstimateError
from imaginelens.estimates.inputs import check_groups, group_codes, labels, numbers
from imaginelens.estimates.method import Method
from imaginelens.estimates.score import score_interval
from imaginelens.estimates.student import critical

Adjustment = Literal["holm", "bh", "by"]
_AT_ONCE = 1_000_000  # numbers held at a time: 8 MB
_TIE = 1e-9  # statistics closer than this are equal: sums in another order differ in the last bits


def adjust(pvalues: ArrayLike, *, method: Adjustment = "holm") -> np.ndarray:
    """P-values to compare with your level as if there were one: the same shape, adjusted.

    "holm" bounds the chance of one false finding, "bh" the share of false ones among the findings
    (independent or positively related tests), "by" that share whatever the tests' relation. A nan
    stays nan and does not count as a test.

    Raises:
        EstimateError: there is no p-value, one lies outside [0, 1], or the method is unknown.

    >>> adjust([0.01, 0.04, 0.03, float("nan")])
    array([0.03, 0.06, 0.06,  nan])
    """
    p = numbers(pvalues, "p-values")
    tested = ~np.isnan(p)
    if not tested.any():
        raise EstimateError(f"none of the {p.size} p-values is a number; give at least one")
    if not ((p[tested] >= 0) & (p[tested] <= 1)).all():
        wrong = p[tested][(p[tested] < 0) | (p[tested] > 1)][0]
        raise EstimateError(f"{wrong:g} is no p-value; give numbers from 0 to 1, nan for no test")
    if method not in ("holm", "bh", "by"):
        raise EstimateError(f"there is no method {method!r}; use 'holm', 'bh' or 'by'")
    adjusted = np.full(p.shape, np.nan)
    if method == "holm":
        adjusted[tested] = _holm(p[tested])
    else:
        adjusted[tested] = stats.false_discovery_control(p[tested], method=method)
    return adjusted


def _holm(p: Float[np.ndarray, " test"]) -> Float[np.ndarray, " test"]:
    """The smallest times n, the next times n - 1, and so on; never below the one before."""
    order = np.argsort(p)
    scaled = np.maximum.accumulate(p[order] * np.arange(len(p), 0, -1))
    adjusted = np.empty_like(p)
    adjusted[order] = np.minimum(scaled, 1)
    return adjusted


@dataclass(frozen=True, eq=False, repr=False)
class MaxT:
    """A map tested against "no effect in any cell", by flipping signs.

    Attributes:
        value: the mean effect of each cell; nan where no example has a value.
        statistic: the sum over units over the root of their sum of squares; for 0/1 outcomes of
            single examples this is McNemar's z.
        pvalues: adjusted, two-sided, step-down: those to report.
        single_step: adjusted without stepping down; never smaller than `pvalues`.
        n: how many examples have a value, by cell.
        units: how many signs were flipped: groups, or examples where there are no groups. Units
            that are 0 in every cell do not count: no flip changes them.
        draws: how many sign vectors were looked at.
        exact: whether those were all there are.
    """

    value: Float[np.ndarray, "*cells"]
    statistic: Float[np.ndarray, "*cells"]
    pvalues: Float[np.ndarray, "*cells"]
    single_step: Float[np.ndarray, "*cells"]
    n: Int[np.ndarray, "*cells"]
    units: int
    draws: int
    exact: bool
    _map: "_Map" = field(repr=False)
    _asked: tuple[int, int] = field(repr=False)

    def intervals(
        self, level: float = 0.95
    ) -> tuple[Float[np.ndarray, "*cells"], Float[np.ndarray, "*cells"]]:
        """Intervals (low, high), one per cell, that hold the truth in all cells at once.

        The critical value is that of the largest statistic over the map when the signs of the
        residuals are flipped, and at least that of a single cell. Each cell's test is inverted at
        it: Tango's for `binary` maps, else the statistic of the map itself. A cell with too few
        units to bound it has no end: infinite, or -1 and 1. Like `Estimate`, it takes constant
        values at their word unless they are `binary`: the interval has width 0. Residuals are
        not the values that the p-values rest on, and step-down p-values are smaller: near the
        level an interval and a p-value may disagree.

        Raises:
            EstimateError: the level is no probability.
        """
        t = float(critical(level, self._map.units - 1))
        k = self._critical(level)
        low, high = self._map.score_ends(max(k, t)) if self._map.binary else self._map.ends(k, t)
        shape = self.value.shape
        empty = self.n == 0
        return (
            np.where(empty, np.nan, low.reshape(shape)),
            np.where(empty, np.nan, high.reshape(shape)),
        )

    def _critical(self, level: float) -> float:
        """What the largest |statistic| over the map exceeds in so few flips of the residuals."""
        flips = _Flips.of(_standardised(self._map.residuals), *self._asked)
        largest = np.sort(np.concatenate([_tops(flipped) for flipped in flips.chunks()]))
        rejected = int((1 - level) * (flips.count + (not flips.exact)) + _TIE)
        if not flips.exact:
            return float(largest[-rejected]) if rejected else float("inf")
        every = 2.0 ** (self._map.units - 1)  # also flips of units whose residuals are 0
        return float(largest[-1 - rejected]) if (1 - level) * every >= 1 else float("inf")

    def describe(self, alpha: float = 0.05) -> str:
        """What was tested, how, and how many cells stand out, in words."""
        tested = ~np.isnan(self.pvalues)
        found = int((self.pvalues <= alpha).sum())
        how = (
            f"all {self.draws:,} sign flips" if self.exact else f"{self.draws:,} random sign flips"
        )
        best = np.unravel_index(np.nanargmin(self.pvalues), self.pvalues.shape)
        return (
            f"max-T over {_counted(tested)}: {how} of {self.units} units, two-sided, step-down. "
            f"{found} cell{'s' * (found != 1)} differ{'s' * (found == 1)} from 0; the chance that "
            f"any is named falsely is at most {alpha:g}. Smallest adjusted p "
            f"{self.pvalues[best]:.2g}, at cell {tuple(map(int, best))}."
        )

    def __repr__(self) -> str:
        return f"MaxT({self.describe()})"


def max_t(
    values: ArrayLike,
    *,
    groups: Any = None,
    binary: bool = False,
    draws: int = 9_999,
    seed: int = 0,
) -> MaxT:
    """Test every cell of a map at once; compare `.pvalues` with your level as they are.

    Under "no effect" a unit's effects are as likely to be -x as x, in all cells together. The
    p-value of a cell is the share of sign vectors whose largest |statistic| over the map (in
    step-down: over the cells not above it) reaches that of the cell. So the chance of any false
    finding is at most the level, at any number of units, whatever the other cells do. It rests on
    that symmetry: for a skewed effect with mean 0 it holds in large samples only.

    Args:
        values: (example, *cells), the effect of each example in each cell; nan where there is none.
        groups: one label per example: what depends on each other (same image, same donor) is
            flipped as a whole.
        binary: the values are changes of a 0/1 outcome, -1, 0 or 1: for `.intervals`.
        draws: random sign vectors; where there are no more in all, each is used once.

    Raises:
        EstimateError: fewer than two units, an infinite value, no value at all, or labels missing.

    >>> effects = np.array([[2.0, 0.1, 0.0], [1.5, -0.2, 0.0], [1.8, 0.3, 0.0], [2.2, -0.1, 0.0],
    ...                     [1.9, 0.2, 0.0], [2.1, -0.3, 0.0]])
    >>> found = max_t(effects)
    >>> found.pvalues, found.draws, found.exact
    (array([0.03125, 1.     , 1.     ]), 32, True)
    """
    if draws < 1:
        raise EstimateError(f"{draws} draws were asked for; give at least 99")
    table, codes = _read(values, groups, binary)
    cells = table.shape[1:]
    given = _Map(table.reshape(len(table), -1), codes, binary)
    whole = _standardised(given.sums)
    flips = _Flips.of(whole, draws, seed)
    statistic, there = whole.sum(0), given.n > 0
    step_down, single_step = _compare(np.where(there, np.abs(statistic), -1.0), flips)
    mean, statistic, step_down, single_step = (
        np.where(there, flat, np.nan).reshape(cells)
        for flat in (given.mean, statistic, step_down, single_step)
    )
    return MaxT(
        mean,
        statistic,
        step_down,
        single_step,
        given.n.reshape(cells),
        len(flips.whole),
        flips.count,
        flips.exact,
        given,
        (draws, seed),
    )


@dataclass(frozen=True, eq=False)
class _Map:
    """An (example, cell) table with the number of each example's unit."""

    table: Float[np.ndarray, "example cell"]
    codes: Int[np.ndarray, " example"]
    binary: bool

    @property
    def units(self) -> int:
        return int(self.codes.max()) + 1

    @property
    def n(self) -> Int[np.ndarray, " cell"]:
        return np.asarray((~np.isnan(self.table)).sum(0))

    @property
    def mean(self) -> Float[np.ndarray, " cell"]:
        return np.asarray(np.nansum(self.table, 0) / np.maximum(self.n, 1))

    @property
    def sums(self) -> Float[np.ndarray, "unit cell"]:
        """The values of each unit, summed; missing ones add nothing."""
        return self._by_unit(np.nan_to_num(self.table))

    @property
    def sizes(self) -> Float[np.ndarray, "unit cell"]:
        """How many values each unit has."""
        return self._by_unit((~np.isnan(self.table)).astype(np.float64))

    @property
    def residuals(self) -> Float[np.ndarray, "unit cell"]:
        """The sums of each unit, measured from the cell's mean."""
        return self._by_unit(np.nan_to_num(self.table - self.mean))

    def _by_unit(self, table: np.ndarray) -> np.ndarray:
        if self.units == len(table):
            return table
        order = np.argsort(self.codes, kind="stable")
        starts = np.searchsorted(self.codes[order], np.arange(self.units))
        return np.add.reduceat(table[order], starts)

    def ends(
        self, k: float, t: float
    ) -> tuple[Float[np.ndarray, " cell"], Float[np.ndarray, " cell"]]:
        """Where |sum - m n| reaches k times the root of the units' sum of squares around m.

        t is the least that a cell needs by itself, as a t statistic.
        """
        k = max(k, t * (self.units / (self.units - 1 + t**2)) ** 0.5)
        if np.isinf(k):
            return np.full(self.n.shape, -np.inf), np.full(self.n.shape, np.inf)
        residuals, sizes, mean = self.residuals, self.sizes, self.mean
        # in m - mean: n^2 m^2 = k^2 (a - 2 b m + c m^2)
        a, b, c = (residuals**2).sum(0), (residuals * sizes).sum(0), (sizes**2).sum(0)
        leading = self.n**2 - k**2 * c
        bounded = leading > 0
        half = np.sqrt(np.where(bounded, k**4 * b**2 + leading * k**2 * a, 0.0))
        divisor = np.where(bounded, leading, 1.0)
        return (
            np.where(bounded, mean + (-(k**2) * b - half) / divisor, -np.inf),
            np.where(bounded, mean + (-(k**2) * b + half) / divisor, np.inf),
        )

    def score_ends(self, k: float) -> tuple[Float[np.ndarray, " cell"], Float[np.ndarray, " cell"]]:
        """Where Tango's score reaches k, with the design effect of each cell's groups."""
        if np.isinf(k):
            return np.full(self.n.shape, -1.0), np.full(self.n.shape, 1.0)
        effect = np.ones(self.table.shape[1])
        if self.units < len(self.table):
            for cell in np.flatnonzero(self.n):
                effect[cell] = design.grouped(*_present(self.table[:, cell], self.codes))
        scale = (k / float(critical(0.95))) ** 2  # score_interval knows levels, not quantiles
        gained, lost = (self.table == 1).sum(0), (self.table == -1).sum(0)
        return score_interval(gained, lost, np.maximum(self.n, 1), inflation=effect * scale)


@dataclass(frozen=True, eq=False)
class _Flips:
    """Sign vectors for the units of a standardised map, those that are 0 everywhere left out."""

    whole: Float[np.ndarray, "unit cell"]
    count: int
    exact: bool
    seed: int

    @classmethod
    def of(cls, whole: Float[np.ndarray, "unit cell"], draws: int, seed: int) -> "_Flips":
        """All sign vectors if there are at most `draws`, else so many random ones."""
        moving = whole[(whole != 0).any(1)]
        every = 2 ** max(len(moving) - 1, 0)  # v and -v give the same |statistic|
        return cls(moving, min(every, draws), every <= draws, seed)

    def chunks(self) -> Iterator[Float[np.ndarray, "draw cell"]]:
        """The statistics under each sign vector, so many at a time that they fit in memory."""
        units, cells = self.whole.shape
        size = max(1, _AT_ONCE // (units + 3 * cells + 1))
        generator = np.random.default_rng(self.seed)
        for start in range(0, self.count, size):
            draws = min(size, self.count - start)
            if self.exact:
                bits = np.arange(start, start + draws)[:, None] >> np.arange(units) & 1
            else:
                bits = generator.integers(0, 2, (draws, units), dtype=np.int8)
            yield (1.0 - 2.0 * bits) @ self.whole


def _tops(flipped: Float[np.ndarray, "draw cell"]) -> Float[np.ndarray, " draw"]:
    """The largest |statistic| under each sign vector."""
    return np.asarray(np.abs(flipped).max(1))


def _standardised(sums: Float[np.ndarray, "unit cell"]) -> Float[np.ndarray, "unit cell"]:
    """Each cell (column) divided by the root of its sum of squares, which no flip changes."""
    size = np.abs(sums).max(0)
    sums = sums / np.where(size > 0, size, 1.0)  # or the squares of tiny numbers would be 0
    scale = np.sqrt((sums**2).sum(0))
    return np.asarray(sums / np.where(scale > 0, scale, 1.0))


def _compare(
    observed: Float[np.ndarray, " cell"], flips: _Flips
) -> tuple[Float[np.ndarray, " cell"], Float[np.ndarray, " cell"]]:
    """Step-down and single-step p-values of every cell."""
    order = np.argsort(-observed, kind="stable")
    reached = observed[order] - _TIE
    down, single = np.zeros(len(order)), np.zeros(len(order))
    for flipped in flips.chunks():
        # column j: the largest among the cells whose own statistic is not above that of cell j
        largest = np.maximum.accumulate(np.abs(flipped)[:, order[::-1]], axis=1)[:, ::-1]
        down += (largest >= reached).sum(0)
        single += (largest[:, :1] >= reached).sum(0)
    own = 0 if flips.exact else 1  # beside random sign vectors, the data themselves count
    step_down, single_step = np.empty(len(order)), np.empty(len(order))
    step_down[order] = np.maximum.accumulate((down + own) / (flips.count + own))
    single_step[order] = (single + own) / (flips.count + own)
    return step_down, single_step


@dataclass(frozen=True, eq=False, repr=False)
class EquivalenceMap:
    """A map of equivalence tests, from which two different claims can be made.

    "Every cell is equivalent" needs no correction: each cell must pass, so that the worst one rules
    (`every`). "These cells are equivalent" picks the cells after looking, and needs one (`these`).

    Attributes:
        margin: in the values' unit.
        pvalues: of each cell's own TOST, not adjusted; nan where no example has a value, and 1
            where there are too few to test.
    """

    margin: float
    pvalues: Float[np.ndarray, "*cells"]

    @property
    def every(self) -> float:
        """The p-value of "some cell is not equivalent": the largest, by intersection-union."""
        return float(np.nanmax(self.pvalues))

    @property
    def these(self) -> Float[np.ndarray, "*cells"]:
        """Holm's p-values: name the cells below your level as equivalent."""
        return adjust(self.pvalues, method="holm")

    def describe(self, alpha: float = 0.05) -> str:
        """Both claims, in words that say which is which."""
        tested = ~np.isnan(self.pvalues)
        named = int((self.these < alpha).sum())
        claim = "can be claimed" if self.every < alpha else "cannot be claimed"
        return (
            f'Margin {self.margin:g}, {_counted(tested)}. "Every cell is equivalent" {claim}: '
            f"the largest TOST p is {self.every:.2g} (intersection-union, no correction needed). "
            f'"These cells are equivalent" can be claimed of {named} by name (Holm, chance of any '
            f"false one at most {alpha:g})."
        )

    def __repr__(self) -> str:
        return f"EquivalenceMap({self.describe()})"


def equivalence_map(
    values: ArrayLike, *, margin: float, groups: Any = None, binary: bool = False
) -> EquivalenceMap:
    """Test every cell of a map for having no effect beyond the margin.

    The test of a cell is that of `Estimate.mean(...).equivalence(margin)`, or of `Estimate.paired`
    for `binary` values.

    Args:
        values: (example, *cells), the effect of each example in each cell; nan where there is none.
        margin: what is too small to matter, in the values' unit.
        groups: one label per example: examples of one image or question depend on each other.
        binary: the values are changes of a 0/1 outcome: -1, 0 or 1.

    Raises:
        EstimateError: the margin is not positive (or not below 1 for binary values), fewer than 10
            groups, an infinite value, no value at all, or labels missing.

    >>> changes = np.zeros((100, 3))
    >>> changes[:8, 2] = 1
    >>> found = equivalence_map(changes, margin=0.05, binary=True)
    >>> found.these.round(3), round(found.every, 3)
    (array([0.036, 0.036, 0.914]), 0.914)
    """
    below = 1.0 if binary else float("inf")
    if not 0 < margin < below:
        raise EstimateError(
            f"a margin of {margin:g} is none; give a positive number in the values' unit"
            + ", below 1: 0.05 is 5 points" * binary
        )
    table, codes = _read(values, groups, binary)
    if groups is not None:
        check_groups(codes)
    flat = table.reshape(len(table), -1)
    tested = [_tost(column, codes, groups is not None, margin, binary) for column in flat.T]
    return EquivalenceMap(float(margin), np.array(tested).reshape(table.shape[1:]))


def _tost(
    column: Float[np.ndarray, " example"],
    codes: Int[np.ndarray, " example"],
    grouped: bool,
    margin: float,
    binary: bool,
) -> float:
    """The p-value of one cell; nan without a value."""
    values, units = _present(column, codes)
    if not len(values):
        return float("nan")
    if units.max() < 1:
        return 1.0
    test: Method = (paired.paired if binary else student.mean)(values, units if grouped else None)
    return max(test.greater(-margin), test.less(margin))


def _present(
    column: Float[np.ndarray, " example"], codes: Int[np.ndarray, " example"]
) -> tuple[Float[np.ndarray, " there"], Int[np.ndarray, " there"]]:
    """The values of a cell that are not missing, with the numbers of their units."""
    there = ~np.isnan(column)
    return column[there], np.unique(codes[there], return_inverse=True)[1]


def _read(
    values: ArrayLike, groups: Any, binary: bool
) -> tuple[Float[np.ndarray, "example ..."], Int[np.ndarray, " example"]]:
    """The map and the number of each example's unit, checked."""
    table = numbers(values, "values")
    if table.ndim == 0 or table.size == 0:
        raise EstimateError(f"a map of shape {table.shape} has no cells; give (example, *cells)")
    if np.isnan(table).all():
        raise EstimateError(f"all {table.size} values are nan, so there is nothing to test")
    strange = table[~(np.isnan(table) | np.isin(table, (-1.0, 0.0, 1.0)))]
    if binary and strange.size:
        raise EstimateError(
            f"{strange.size} of {table.size} values are no change of a 0/1 outcome (the first is "
            f"{strange[0]:g}); leave out binary=True for an outcome that is a number"
        )
    given = labels(groups)
    codes = np.arange(len(table)) if given is None else group_codes(given, len(table))
    if codes.max() < 1:
        raise EstimateError(
            f"the map has {len(table)} examples in one unit, and a test needs two at least; "
            "use more data"
        )
    return table, codes


def _counted(tested: Bool[np.ndarray, "*cells"]) -> str:
    """So many cells, and so many without data."""
    missing = int((~tested).sum())
    return f"{int(tested.sum())} cells" + f" ({missing} more without data)" * bool(missing)
