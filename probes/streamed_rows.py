"""Rows of states that are too many to hold: read block by block, as often as they are needed."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int

from imaginelens.hooks.errors import InputError

BLOCK = 2**24  # bytes of a block in float64


@dataclass(frozen=True, eq=False)
class Streamed:
    """Rows that lie elsewhere; a block of them is in memory at a time.

    Attributes:
        fetch: (rows, steps) -> their states, (row, width).
        rows, steps: the example of each row, and the step that it is of.
        drawn: the seed of random directions that stand in the place of the states, each as long as
            the state; None for the states themselves.
    """

    fetch: Callable[[Any, Any], np.ndarray]
    rows: Int[np.ndarray, " row"]
    steps: Int[np.ndarray, " row"]
    width: int
    drawn: int | None = None

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, keep: Bool[np.ndarray, " row"]) -> "Streamed":
        return replace(self, rows=self.rows[keep], steps=self.steps[keep])

    def random(self, *, seed: int) -> "Streamed":
        """The directions that `random_features` draws, as long as these rows."""
        return replace(self, drawn=seed)

    def blocks(self) -> Iterator[tuple[slice, Float[np.ndarray, "row d_model"]]]:
        """All rows in order, some at a time, in float64; a block may be written to.

        Raises:
            InputError: some are nan or infinite.
        """
        size = block_rows(self.width)
        rng = None if self.drawn is None else np.random.default_rng([self.drawn, 3])
        for start in range(0, len(self), size):
            part = slice(start, min(start + size, len(self)))
            x = np.asarray(self.fetch(self.rows[part], self.steps[part]), dtype=np.float64)
            bad = np.flatnonzero(~np.isfinite(x).all(1))
            if len(bad):
                raise InputError(
                    f"{len(bad)} of rows {start} to {part.stop - 1} of states are nan or infinite "
                    f"(the first is row {start + bad[0]}); leave them out by the mask"
                )
            if rng is not None:
                drawn = rng.standard_normal(x.shape)
                drawn /= np.linalg.norm(drawn, axis=1, keepdims=True)
                x = drawn * np.linalg.norm(x, axis=1, keepdims=True)
            yield part, x


def block_rows(width: int) -> int:
    """How many rows of a width are read at a time: a power of two, as shards often are.

    >>> block_rows(1024), block_rows(10**9)
    (2048, 64)
    """
    return max(64, 2 ** int(np.log2(max(BLOCK // (8 * width), 1))))
