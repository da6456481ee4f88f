"""Two runs that emitted different numbers of latents: which states belong together."""

from dataclasses import dataclass
from typing import Literal

import numpy as np
from jaxtyping import Int

from imaginelens.hooks import Run
from imaginelens.hooks.positions import Positions
from imaginelens.hooks.tokens import TokenMap

Align = Literal["strict", "truncate", "pad"]


@dataclass(frozen=True)
class FirstOf(Positions):
    """The first `counts[row]` positions of another selector."""

    of: Positions
    counts: tuple[int, ...]

    def resolve(self, tokens: TokenMap, row: int) -> np.ndarray:
        return self.of.resolve(tokens, row)[: self.counts[row]]

    def __repr__(self) -> str:
        return repr(self.of)


@dataclass(frozen=True)
class Chosen(Positions):
    """Some of another selector's positions, by their number."""

    of: Positions
    numbers: tuple[int, ...]

    def resolve(self, tokens: TokenMap, row: int) -> np.ndarray:
        found = self.of.resolve(tokens, row)
        return found[[k for k in self.numbers if k < len(found)]]

    def __repr__(self) -> str:
        return f"{self.of!r} {list(self.numbers)}"


def counts(run: Run, at: Positions) -> Int[np.ndarray, " example"]:
    """How many positions a selector has in each row of a run."""
    return np.array([len(at.resolve(run.tokens, row)) for row in range(len(run))], dtype=int)


def aligned(
    mine: Int[np.ndarray, " example"], theirs: Int[np.ndarray, " example"], align: Align
) -> tuple[int, ...]:
    """How many states of each row are swapped, given what the row and its donor have.

    strict: all, where both have as many; none elsewhere. truncate: as many as both have. pad: all
    of the row's own, where the donor has any.

    >>> mine, theirs = np.array([2, 2, 2]), np.array([2, 1, 0])
    >>> [aligned(mine, theirs, how) for how in ("strict", "truncate", "pad")]
    [(2, 0, 0), (2, 1, 0), (2, 2, 0)]
    """
    both = np.minimum(mine, theirs)
    if align == "strict":
        both = np.where(mine == theirs, mine, 0)
    elif align == "pad":
        both = np.where(theirs > 0, mine, 0)
    return tuple(int(n) for n in both)
