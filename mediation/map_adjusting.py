"""A map's test of all its cells at once, laid out on its axes."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np
from jaxtyping import Float

from imaginelens.estimates import EstimateError, MaxT, adjust, max_t
from imaginelens.hooks.errors import InputError
from imaginelens.mediation.cells import Cell
from imaginelens.mediation.effect_map import EffectMap
from imaginelens.mediation.map_axes import flat, name_of

if TYPE_CHECKING:
    import pandas as pd

Method = Literal["max_t", "holm", "bh", "by"]
MEANING = {
    "max_t": "the chance that any is named falsely is at most {alpha:g}",
    "holm": "the chance that any is named falsely is at most {alpha:g}",
    "bh": "at most {alpha:.0%} of the named are expected to be false, unless cells oppose others",
    "by": "at most {alpha:.0%} of the named are expected to be false",
}


@dataclass(frozen=True, repr=False, eq=False)
class AdjustedMap:
    """P-values of all cells, to be compared with your level as if there were one cell.

    Attributes:
        map: what was tested.
        method: "max_t", "holm", "bh" or "by".
        pvalues: adjusted, over `map.axes`; nan where there is no cell, or too few values to test.
        test: the `MaxT` behind "max_t"; None for the others, which adjust the p-values of
            `map.estimates`.
    """

    map: EffectMap
    method: Method
    pvalues: Float[np.ndarray, "..."]
    test: MaxT | None

    @property
    def by_cell(self) -> dict[Cell, float]:
        """The adjusted p-value of every cell."""
        return dict(zip(self.map.cells, self._by_cell(self.pvalues).tolist(), strict=True))

    def found(self, alpha: float = 0.05) -> tuple[Cell, ...]:
        """The cells whose effect is told from 0, smallest p-value first.

        Raises:
            InputError: alpha does not lie between 0 and 1.
        """
        if not 0 < alpha < 1:
            raise InputError(f"an alpha of {alpha} is no error rate; use 0.05")
        named = [(p, i) for i, p in enumerate(self.by_cell.values()) if p <= alpha]
        return tuple(self.map.cells[i] for _, i in sorted(named))

    def intervals(
        self, level: float = 0.95
    ) -> tuple[Float[np.ndarray, "..."], Float[np.ndarray, "..."]]:
        """The ends (low, high) over `map.axes`, which hold in all cells at once; see `MaxT`.

        Raises:
            InputError: only "max_t" has them, and not for contrasts of 0/1 outcomes.
            EstimateError: the level does not lie between 0 and 1.
        """
        if self.test is None:
            raise InputError(
                f"{self.method!r} has no intervals that hold together; use map.adjust('max_t'), or "
                "map[...].ci() for one cell"
            )
        if self.map.limits is not None:
            raise InputError(
                "the intervals of 'max_t' are for 0/1 outcomes and numbers, and this map holds "
                "contrasts of 0/1 outcomes; use map[...].ci() for one cell"
            )
        return self.test.intervals(level)

    def to_dataframe(self) -> "pd.DataFrame":
        """`map.to_dataframe()` with a column p_adjusted; for "max_t" also low and high, the
        intervals that hold in all cells at once."""
        frame = self.map.to_dataframe()
        frame["p_adjusted"] = self._by_cell(self.pvalues)
        if self.test is not None and self.map.limits is None:
            for name, ends in zip(("low", "high"), self.intervals(), strict=True):
                frame[name] = self._by_cell(ends)
        return frame

    def describe(self, alpha: float = 0.05) -> str:
        """What was tested, and which cells stand out, in words.

        Raises:
            InputError: alpha does not lie between 0 and 1.
        """
        named, p = self.found(alpha), self.by_cell
        tested = int((~np.isnan(self.pvalues)).sum())
        lines = [
            f"{len(named)} of {tested} cells differ from 0 ({self.method}, "
            f"{self.map.n} examples; {MEANING[self.method].format(alpha=alpha)})"
        ]
        lines += [f"  {name_of(cell)}: p {p[cell]:.2g}" for cell in named[:5]]
        return "\n".join(lines + (["  ..."] if len(named) > 5 else []))

    def __repr__(self) -> str:
        return self.describe()

    def _by_cell(self, full: Float[np.ndarray, "..."]) -> Float[np.ndarray, " cell"]:
        return flat(self.map.cells, self.map.axes, full)


def adjusted(map: EffectMap, method: Any, *, draws: int, seed: int) -> AdjustedMap:
    """See `EffectMap.adjust`."""
    if method not in get_args(Method):
        raise InputError(f"there is no method {method!r}; use {', '.join(get_args(Method))}")
    if method == "max_t":
        values = np.moveaxis(map.values, -1, 0)
        test = max_t(values, groups=map.groups, binary=map.binary, draws=draws, seed=seed)
        return AdjustedMap(map, method, test.pvalues, test)
    p = np.array([np.nan if e is None else e.pvalue() for e in map.estimates])
    if np.isnan(p).all():
        raise EstimateError(
            f"none of the {len(map)} cells has values of enough examples to test (there are "
            f"{map.n}); use more examples"
        )
    return AdjustedMap(map, method, map.dense(adjust(p, method=method)), None)
