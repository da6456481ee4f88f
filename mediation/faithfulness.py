"""Faithfulness curves: how few cells keep what a run has, when all others are the other run's?

Source: Mueller et al. (2025), "MIB: a mechanistic interpretability benchmark", section 3: CPR and
CMD are the areas under f and |1 - f| over the shares of cells kept, by the trapezoid rule, where
f is a ratio of means over examples.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Float

from imaginelens.estimates import Estimate
from imaginelens.estimates.errors import spoken
from imaginelens.hooks import LatentModel, Pairs
from imaginelens.hooks.errors import InputError
from imaginelens.hooks.metrics import Metric, logit_diff
from imaginelens.mediation.cells import Cell
from imaginelens.mediation.effect_map import EffectMap
from imaginelens.mediation.ends import check_study
from imaginelens.mediation.map_axes import means
from imaginelens.mediation.ranking import halves, ranked, settings_of
from imaginelens.mediation.result_files import Saved
from imaginelens.mediation.sets import sets_map

if TYPE_CHECKING:
    import pandas as pd

SHARES = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)


@dataclass(frozen=True, repr=False, eq=False)
class FaithfulnessCurve(Saved):
    """f = (m(kept) - m(none)) / (m(all) - m(none)) over the share of cells that are kept.

    The interval between neighbouring shares is linear in the share, as in MIB, so that the whole
    area begins at the first share: with f = 1 everywhere, CPR is 1 - shares[0].

    Attributes:
        shares: of the cells, rising; `counts` are their numbers, rounded down.
        kept: the metric with these cells kept and all others swapped, per example.
        none, whole: with all cells swapped, and with none.
        cells: the cells, the one that is kept first in front.
        tested: the numbers of the pairs that it was measured on; none of them ordered the cells.

    Raises:
        InputError: shares do not rise between 0 and 1, or shapes do not fit.

    >>> none, whole = np.zeros(3), np.array([1.0, 2.0, 3.0])
    >>> curve = FaithfulnessCurve.from_arrays(kept=[whole] * 10, none=none, whole=whole)
    >>> round(curve.cpr.value, 9), round(curve.cmd, 9)
    (0.999, 0.0)
    """

    shares: tuple[float, ...]
    counts: tuple[int, ...]
    kept: Float[np.ndarray, "share example"]
    none: Float[np.ndarray, " example"]
    whole: Float[np.ndarray, " example"]
    cells: tuple[Cell, ...] = ()
    tested: tuple[int, ...] = ()
    groups: tuple[Any, ...] | None = None
    binary: bool = False
    metric: str = ""

    def __post_init__(self) -> None:
        inside = all(0 < share <= 1 for share in self.shares)
        if len(self.shares) < 2 or not inside or list(self.shares) != sorted(set(self.shares)):
            raise InputError(
                f"shares are {self.shares}, expected two or more, rising, above 0 and up to 1"
            )
        n = (len(self.shares), len(self.whole))
        if self.kept.shape != n or self.none.shape != n[1:]:
            raise InputError(
                f"kept has shape {self.kept.shape} and none {self.none.shape}, expected {n} and "
                f"{n[1:]} for {n[0]} shares and {n[1]} examples"
            )

    @staticmethod
    def from_arrays(
        *,
        kept: Any,
        none: Any,
        whole: Any,
        shares: Sequence[float] = SHARES,
        groups: Sequence[Any] | None = None,
    ) -> "FaithfulnessCurve":
        """A curve of plain arrays, of any tool: `kept` is (share, example)."""
        return FaithfulnessCurve(
            shares=tuple(shares),
            counts=(0,) * len(shares),
            kept=np.asarray(kept, dtype=np.float64),
            none=np.asarray(none, dtype=np.float64),
            whole=np.asarray(whole, dtype=np.float64),
            groups=None if groups is None else tuple(groups),
        )

    @property
    def f(self) -> Float[np.ndarray, " share"]:
        """Faithfulness at each share: a ratio of means over the examples that have all values; nan
        where swapping all cells changes nothing."""
        top, bottom = means(self._gained), means(self._possible[None])[0]
        return np.asarray(top / bottom + 0.0) if bottom else np.full(len(top), np.nan)

    def __getitem__(self, share: float) -> Estimate:
        """Faithfulness at a share, with Fieller's interval.

        Raises:
            InputError: the curve has no such share.
            EstimateError: fewer than two examples have all values.
        """
        if share not in self.shares:
            raise InputError(f"there is no share {share!r}; the curve has {self.shares}")
        possible = None
        if self.binary:
            possible = sorted({(k - z, o - z) for k, z, o in product((0, 1), repeat=3)})
        return Estimate.ratio(
            self._gained[self.shares.index(share)], self._possible, name=f"f at {share:g}",
            groups=self._groups, possible=possible,
        )  # fmt: skip

    @property
    def cpr(self) -> Estimate:
        """The area under f, as a ratio of means with Fieller's interval: higher is better.

        Raises:
            EstimateError: fewer than two examples have all values.
        """
        area = self._weights @ self._gained
        return Estimate.ratio(area, self._possible, name="CPR", groups=self._groups)

    @property
    def cmd(self) -> float:
        """The area under |1 - f|: 0 is best."""
        return float(self._weights @ np.abs(1 - self.f))

    def to_dataframe(self) -> "pd.DataFrame":
        """One row per share: share, cells, f, ci_low, ci_high (nan where the interval has no
        end)."""
        import pandas as pd

        rows = []
        for share, count, f in zip(self.shares, self.counts, self.f, strict=True):
            ci = self[share].ci()
            low, high = (np.nan, np.nan) if ci.unbounded else (ci.low, ci.high)
            rows.append({"share": share, "cells": count, "f": f, "ci_low": low, "ci_high": high})
        return pd.DataFrame(rows)

    def __repr__(self) -> str:
        points = ", ".join(f"{s:g}: {f:.3g}" for s, f in zip(self.shares, self.f, strict=True))
        return (
            f"FaithfulnessCurve of {len(self.cells)} cells, n={self._there.sum()}: "
            f"{spoken(lambda: self.cpr)}, CMD {self.cmd:.4g}; f {points}"
        )

    @property
    def _there(self) -> np.ndarray:
        return ~np.isnan(self.kept.sum(0) + self.none + self.whole)

    @property
    def _gained(self) -> np.ndarray:
        return (self.kept - self.none)[:, self._there]

    @property
    def _possible(self) -> np.ndarray:
        return (self.whole - self.none)[self._there]

    @property
    def _groups(self) -> tuple[Any, ...] | None:
        if self.groups is None:
            return None
        return tuple(g for g, there in zip(self.groups, self._there, strict=True) if there)

    @property
    def _weights(self) -> np.ndarray:
        """What each share weighs in the trapezoid rule."""
        half = np.diff(self.shares) / 2
        return np.pad(half, (0, 1)) + np.pad(half, (1, 0))


def faithfulness_curve(
    lens: LatentModel,
    pairs: Pairs,
    effects: EffectMap,
    *,
    shares: Sequence[float] = SHARES,
    metric: Metric = logit_diff,
    batch_size: int = 16,
    seed: int = 0,
) -> FaithfulnessCurve:
    """Keep the best cells of a map, swap all of its others, and see how much of the metric stays.

    The cells are ordered on one half of the pairs, groups together, and the curve is measured on
    the other. MIB swaps everything outside a circuit; here what passes around the map's cells is in
    both ends, so that f speaks of the cells that the map has.

    Args:
        effects: a map of these pairs, from `il.sweep`, or `il.attribute(...).to_map()`; its
            direction and context are the curve's.
        shares: of the map's cells, rounded down to whole ones.

    Raises:
        InputError: an argument is not what it should be.
        EditTouchedNothing: the cells reach no example.

    >>> import imaginelens as il
    >>> from imaginelens.mediation.sweep import sweep
    >>> lens = il.load("latent-content")
    >>> task = lens.task(n=4, seed=0)
    >>> effects = sweep(lens, task, sites="hook_latent", context="fixed")
    >>> curve = faithfulness_curve(lens, task, effects, shares=(0.1, 0.5, 1.0))
    >>> curve.counts, curve.f[0], curve.f[2], bool(curve.f[1] > 0.5)
    ((0, 1, 2), np.float64(0.0), np.float64(1.0), True)
    """
    direction, context = settings_of(effects, metric, None, None)
    check_study(
        lens, pairs, metric=metric, direction=direction, context=context, batch_size=batch_size
    )
    choosing, testing = halves(effects, pairs, seed=seed)
    cells = ranked(effects, choosing)
    counts = [int(share * len(cells) + 1e-9) for share in shares]
    sizes = sorted({0, *counts, len(cells)})
    measured = sets_map(
        lens, pairs.select(testing.tolist()), [cells[size:] for size in sizes], metric=metric,
        direction=direction, context=context, batch_size=batch_size, seed=seed,
    )  # fmt: skip
    values = dict(zip(sizes, measured.outcome, strict=True))
    return FaithfulnessCurve(
        tuple(shares), tuple(counts), np.stack([values[count] for count in counts]), values[0],
        measured.before, tuple(cells), tuple(testing.tolist()), measured.groups, measured.binary,
        metric.name,
    )  # fmt: skip
