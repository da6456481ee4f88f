"""What an approximation of patching found, and how far it can be trusted."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import torch
from jaxtyping import Float, Int8

from imaginelens.hooks.errors import InputError
from imaginelens.hooks.metrics import Metric
from imaginelens.hooks.patching import Context
from imaginelens.hooks.positions import Positions
from imaginelens.mediation.agreement import Agreement, mean_size
from imaginelens.mediation.cells import Cell
from imaginelens.mediation.effect_map import EffectMap
from imaginelens.mediation.exact_cells import Batch, exact_effects
from imaginelens.mediation.provenance import Provenance

Method = Literal["atp", "ig", "qk", "grad_drop", "relp"]
Direction = Literal["denoise", "noise"]
NAMES: dict[str, str] = {
    "atp": "attribution patching",
    "ig": "integrated gradients",
    "qk": "attribution patching with the fix for queries and keys",
    "grad_drop": "attribution patching with GradDrop",
    "relp": "relevance patching",
}
_ROUNDING = {torch.float64: 1e-9, torch.float32: 1e-4}


@dataclass(frozen=True, eq=False, repr=False)
class Attribution:
    """Approximate effects of patching every cell of a map, from gradients.

    `result.check(20)` patches random cells exactly and says whether the approximation holds.

    Attributes:
        cells: the coordinates, each once, and `positions` the selector of each.
        values: the approximate effect, patched - unpatched, in the metric's unit; 0 where a run has
            no such state, nan where no answer was found. Sizes without sign for `grad_drop`.
        flags: why a state would not change: 0 it would, 1 not emitted, 2 identical donor.
        before: the metric of the unedited run that receives states, and `other` of the one that
            gives them.
        gap: by cell, |sum over its path's cells - their joint effect|; None without a path.
        keys: what identifies each example, as in a sweep.
    """

    cells: tuple[Cell, ...]
    positions: tuple[Positions, ...]
    values: Float[np.ndarray, "cell example"]
    flags: Int8[np.ndarray, "cell example"]
    before: Float[np.ndarray, " example"]
    other: Float[np.ndarray, " example"]
    gap: Float[np.ndarray, "cell example"] | None
    method: Method
    metric: Metric
    direction: Direction
    context: Context
    notes: tuple[str, ...]
    provenance: Provenance
    groups: tuple[object, ...] | None = None
    keys: tuple[str, ...] = ()
    batches: tuple[Batch, ...] = field(default=())

    def __len__(self) -> int:
        return len(self.cells)

    def __iter__(self) -> Iterator[Cell]:
        return iter(self.cells)

    @property
    def mean(self) -> Float[np.ndarray, " cell"]:
        """The mean value of each cell, over the examples that have one; nan where none has."""
        there = ~np.isnan(self.values)
        total = np.where(there, self.values, 0.0).sum(1)
        blank = np.full(len(self), np.nan)
        return np.asarray(np.divide(total, there.sum(1), out=blank, where=there.any(1)))

    @property
    def completeness_gap(self) -> Float[np.ndarray, " example"]:
        """Per example, how far the values of a path miss its joint effect, at worst: the error of
        the quadrature, which more `steps` make smaller.

        Raises:
            InputError: the method follows no path.
        """
        if self.gap is None:
            raise InputError(
                f"method={self.method!r} follows no path whose joint effect its values could sum "
                "to; use method='ig'"
            )
        return np.asarray(self.gap.max(0))

    def check(self, k: int = 20, *, seed: int = 0, top: int | None = None) -> Agreement:
        """Patch random cells exactly, and compare.

        Args:
            k: how many cells to draw, or all if there are fewer; each costs a run of every example.
            top: how many of the largest cells count as named, which are patched as well; a tenth of
                the map, 10 at most, if left out.

        Raises:
            InputError: `k` or `top` is less than 1.
        """
        n = len(self)
        top = max(1, min(10, n // 10)) if top is None else top
        for name, number in (("k", k), ("top", top)):
            if type(number) is not int or number < 1:
                raise InputError(f"{name} is {number!r}, expected a number of cells, 1 or more")
        sizes = np.nan_to_num(mean_size(self.values))
        named = set(np.argsort(-sizes, kind="stable")[:top].tolist())
        drawn = set(np.random.default_rng(seed).choice(n, min(k, n), replace=False).tolist())
        chosen = sorted(named | drawn)
        exact = exact_effects(self.batches, [(self.cells[i], self.positions[i]) for i in chosen])
        dtype = self.batches[0].lens.model.dtype
        scale = max(1.0, float(np.nanmax(np.abs(self.before), initial=0.0)))
        return Agreement(
            cells=tuple(self.cells[i] for i in chosen),
            approximate=self.values[chosen],
            exact=np.abs(exact) if self.method == "grad_drop" else exact,
            drawn=np.array([i in drawn for i in chosen]),
            named=np.array([i in named for i in chosen]),
            n_cells=n,
            method=NAMES[self.method],
            unit=self.metric.unit,
            floor=_ROUNDING.get(dtype, 0.05) * scale,
        )

    def to_map(self) -> EffectMap:
        """The values as a map, to look at and to compare with one that was patched.

        Its intervals and tests are about the approximation, not about the effects: its notes say
        so.
        """
        return EffectMap(
            cells=self.cells,
            before=self.before,
            other=self.other,
            after=self.before + self.values,
            flags=self.flags,
            change=np.full(self.values.shape, np.nan),
            groups=self.groups,
            metric=self.metric.name,
            unit=self.metric.unit,
            binary=False,
            direction=self.direction,
            context=self.context,
            edit="Swap",
            sham=None,
            notes=(f"{self.method} approximation: not patched but estimated", *self.notes),
            provenance=self.provenance,
            keys=self.keys,
        )

    def __repr__(self) -> str:
        order = np.argsort(-np.nan_to_num(mean_size(self.values)), kind="stable")
        lines = [
            f"Attribution of {len(self)} cells on {len(self.before)} examples by "
            f"{NAMES[self.method]} ({self.metric.name}, {self.direction}, {self.context} context); "
            "approximate: see .check()"
        ]
        lines += [f"  {_name(self.cells[i])}: {self.mean[i]:.4g}" for i in order[:4].tolist()]
        if self.gap is not None:
            lines.append(
                f"  completeness gap {float(np.nanmax(self.completeness_gap)):.2g} at most"
            )
        return "\n".join([*lines, *(f"  note: {note}" for note in self.notes)])


def _name(cell: Cell) -> str:
    parts = [cell.site, "" if cell.layer is None else f"layer {cell.layer}", cell.position]
    parts.append("" if cell.head is None else f"head {cell.head}")
    return ", ".join(part for part in parts if part)
