"""Taps: places in a running model at which a gradient can be taken, or states be moved.

A tap adds zeros to the states at some cells of a site. The gradient with respect to them is that of
an edit there, whichever way the site is written, and the numbers stay as they are.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np
import torch
from jaxtyping import Bool, Shaped

from imaginelens.hooks import Edit, Landing
from imaginelens.hooks.edits import EditContext
from imaginelens.hooks.entries import EditEntry
from imaginelens.hooks.positions import Positions
from imaginelens.hooks.tokens import TokenMap

States = Shaped[torch.Tensor, "spot ..."]


@dataclass(frozen=True)
class Columns(Positions):
    """Columns that were worked out before, for each row its own."""

    of_rows: tuple[tuple[int, ...], ...]
    name: str

    def resolve(self, tokens: TokenMap, row: int) -> np.ndarray:
        return np.array(self.of_rows[row], dtype=int)

    def __repr__(self) -> str:
        return self.name


@dataclass(frozen=True, eq=False)
class Spots:
    """Some cells of a batch, each row's columns in order; states are stacked in this order.

    Attributes:
        name: the selectors that chose them.
    """

    of_rows: tuple[tuple[int, ...], ...]
    name: str = "positions"

    @property
    def places(self) -> list[tuple[int, int]]:
        """Row and column of each."""
        return [(row, column) for row, columns in enumerate(self.of_rows) for column in columns]

    def index(self) -> dict[tuple[int, int], int]:
        """The number of each by row and column."""
        return {place: number for number, place in enumerate(self.places)}

    def __len__(self) -> int:
        return sum(map(len, self.of_rows))


@dataclass(frozen=True, eq=False)
class Moved:
    """States to be put somewhere: where `mask` is True, in the shape of the states or one that
    spreads to it."""

    states: States
    mask: Bool[torch.Tensor, "spot ..."]


@dataclass(frozen=True, eq=False)
class _Lay(Edit):
    """Puts states there, if any, and adds zeros whose gradient is wanted."""

    moved: Moved | None
    seen: dict[str, torch.Tensor] = field(default_factory=dict)

    def apply(self, act: torch.Tensor, ctx: EditContext) -> torch.Tensor:
        held = act
        if self.moved is not None:
            held = torch.where(self.moved.mask, self.moved.states.to(act), act)
        leaf = torch.zeros_like(held, requires_grad=True)
        self.seen.update(states=act.detach(), leaf=leaf)
        return held + leaf


@dataclass(eq=False)
class Tap(EditEntry):
    """A tap at some spots of one site; make it with `tap`.

    Attributes:
        spots: where it is.
        moved: what it puts there.
    """

    spots: Spots = field(default_factory=lambda: Spots(()))
    moved: Moved | None = None

    @property
    def states(self) -> States:
        """The states that came to the spots in the last forward it was active in."""
        return self._laid("states")

    @property
    def leaf(self) -> States:
        """What the gradient of that forward is taken of."""
        return self._laid("leaf")

    def _laid(self, what: str) -> torch.Tensor:
        assert isinstance(self.edit, _Lay)
        found = self.edit.seen[what]
        assert len(found) == len(self.spots), (len(found), len(self.spots))
        return found


def tap(site: str, spots: Spots, moved: Moved | None = None) -> Tap:
    """Make a tap for forwards over whole sequences."""
    at, landing = Columns(spots.of_rows, spots.name), Landing("tap", "", (site,))
    return Tap((site,), _Lay(moved), at, landing, spots=spots, moved=moved)


def union(n_rows: int, places: Iterable[tuple[int, int]], name: str = "positions") -> Spots:
    """The spots that hold all of these rows and columns, each once."""
    found: list[set[int]] = [set() for _ in range(n_rows)]
    for row, column in places:
        found[row].add(column)
    return Spots(tuple(tuple(sorted(columns)) for columns in found), name)
