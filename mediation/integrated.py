"""Integrated gradients (Sundararajan et al. 2017, arXiv 1703.01365) between two runs' states.

The states of a set of cells of one site move together along the straight line from what they are to
what is given, and each gets the mean gradient on the way times its change. The shares of a set sum
to its joint effect, whatever the model: how far they miss it is the error of the quadrature alone.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from jaxtyping import Float

from imaginelens.mediation.first_order import Approximated
from imaginelens.mediation.gradients import Reading
from imaginelens.mediation.patched import Patched
from imaginelens.mediation.rules import Points
from imaginelens.mediation.taps import Moved, States, Tap, tap

HALVINGS = 12  # at most, of one interval


@dataclass(frozen=True, eq=False)
class Way:
    """How a path is looked at.

    Attributes:
        points: of each interval; one interval is the whole path.
        tolerance: by how much an interval may miss its part of the joint effect before it is
            halved, in the metric's unit and for the whole path; None halves none.
        rows: of one forward at most, where points of the way may share one.
    """

    points: Points
    tolerance: float | None = None
    rows: int = 1


@dataclass(frozen=True, eq=False)
class _Path:
    """The way of some cells of one site, from their own states to those that are given."""

    reading: Reading
    cells: Patched
    site: str
    states: States
    way: Way

    def tap(self, shares: Sequence[float]) -> Tap:
        """The states some shares of the way along, each in a copy of the batch."""
        chosen, spots = range(len(self.cells.cells)), self.cells.spots[self.site]
        moved = [self.cells.moved(chosen, self.states, share) for share in shares]
        return tap(
            self.site,
            replace(spots, of_rows=spots.of_rows * len(shares)),
            Moved(torch.cat([m.states for m in moved]), torch.cat([m.mask for m in moved])),
        )

    def value(self, share: float) -> Float[np.ndarray, " example"]:
        """The metric a share of the way along."""
        return self.reading.values([self.tap([share])])

    def gradients(self, shares: Sequence[float]) -> torch.Tensor:
        """The gradients some shares of the way along, (share, spot, ...), in one forward."""
        wide = self.reading if len(shares) == 1 else self.reading.again(len(shares))
        found = wide.graph([self.tap(shares)]).gradients()[self.site]
        if wide is not self.reading:
            self.reading.forwards += wide.forwards
        return found.double().reshape(len(shares), *self.states.shape)

    @property
    def together(self) -> int:
        """How many points of the way share a forward."""
        return max(1, self.way.rows // self.cells.n_rows) if self.reading.repeats else 1

    def integral(
        self,
        low: float,
        high: float,
        at_low: Float[np.ndarray, " example"],
        at_high: Float[np.ndarray, " example"],
        halvings: int = HALVINGS,
    ) -> torch.Tensor:
        """The integral of the gradient over a part of the way, whose ends have these values."""
        total = torch.zeros_like(self.states, dtype=torch.float64)
        where, weights = (part.tolist() for part in self.way.points)
        for i in range(0, len(where), self.together):
            shares = [low + share * (high - low) for share in where[i : i + self.together]]
            for slope, weight in zip(self.gradients(shares).unbind(0), weights[i:], strict=False):
                total += weight * (high - low) * slope
        allowed = self.way.tolerance
        if allowed is None or not halvings:
            return total
        found = self.cells.products({self.site: total}, {self.site: self.states}).sum(0)
        off = np.nan_to_num(np.abs(found - (at_high - at_low)))
        if off.max(initial=0.0) <= allowed * (high - low):
            return total
        middle = (low + high) / 2
        at_middle = self.value(middle)
        return self.integral(low, middle, at_low, at_middle, halvings - 1) + self.integral(
            middle, high, at_middle, at_high, halvings - 1
        )


def integrated(
    reading: Reading, cells: Patched, way: Way, sets: Sequence[Sequence[int]]
) -> Approximated:
    """Integrate over one path for each of some sets of cells, each set at one site."""
    taps = {site: tap(site, spots) for site, spots in cells.spots.items()}
    before = reading.values(list(taps.values()))
    states = {site: one.states for site, one in taps.items()}
    values = np.zeros((len(cells.cells), cells.n_rows))
    gap = np.zeros_like(values)
    for chosen in sets:
        site = cells.cells[chosen[0]][0].sites[0]
        path = _Path(reading, cells.only(chosen), site, states[site], way)
        after = path.value(1.0)
        mean = path.integral(0.0, 1.0, before, after)
        values[list(chosen)] = path.cells.products({site: mean}, states)
        gap[list(chosen)] = np.abs(values[list(chosen)].sum(0) - (after - before))
    return Approximated(values, cells.flags(states), before, gap)
