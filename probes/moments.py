"""Sums of rows, of targets and of their products: all that ridge regression asks of them.

Sums of parts add up to those of the whole, so that one reading of the rows serves every fold. They
are taken about a point near the rows' mean, for differences of large numbers lose digits.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import scipy.linalg
from jaxtyping import Float, Int

from imaginelens.probes.frames import FLAT
from imaginelens.probes.streamed_rows import Streamed

Targets = Callable[[slice], Float[np.ndarray, "row target"]]


@dataclass(eq=False)
class Moments:
    """Sums over some rows, of x less the origin, and of targets y; they grow by `take`.

    >>> moments = Moments.none(np.zeros(1), 1)
    >>> moments.take(np.array([[1.0], [3.0]]), np.array([[2.0], [6.0]]))
    >>> moments.mean, moments.scale, moments.weights(moments.scale, 0.0)[0].round(6)
    (array([2.]), array([1.]), array([[2.]]))
    """

    origin: Float[np.ndarray, " d_model"]
    n: int
    low: Float[np.ndarray, " d_model"]
    high: Float[np.ndarray, " d_model"]
    x: Float[np.ndarray, " d_model"]
    xx: Float[np.ndarray, "d_model d_model"]
    y: Float[np.ndarray, " target"]
    yy: Float[np.ndarray, " target"]
    xy: Float[np.ndarray, "d_model target"]

    @staticmethod
    def none(origin: Float[np.ndarray, " d_model"], n_targets: int) -> "Moments":
        """Those of no rows."""
        d, k = len(origin), n_targets
        low, high = np.full(d, np.inf), np.full(d, -np.inf)
        square, across = np.zeros((d, d)), np.zeros((d, k))
        return Moments(origin, 0, low, high, np.zeros(d), square, np.zeros(k), np.zeros(k), across)

    @staticmethod
    def total(parts: Sequence["Moments"]) -> "Moments":
        """Those of all rows of some parts."""
        found = Moments.none(parts[0].origin, len(parts[0].y))
        for part in parts:
            found.n += part.n
            found.low = np.minimum(found.low, part.low)
            found.high = np.maximum(found.high, part.high)
            for name in ("x", "xx", "y", "yy", "xy"):
                total = getattr(found, name)
                total += getattr(part, name)
        return found

    def take(
        self, moved: Float[np.ndarray, "row d_model"], y: Float[np.ndarray, "row target"]
    ) -> None:
        """Add rows, less the origin, with their targets."""
        if not len(moved):
            return
        self.n += len(moved)
        self.low = np.minimum(self.low, moved.min(0))
        self.high = np.maximum(self.high, moved.max(0))
        self.x += moved.sum(0)
        self.xx += moved.T @ moved
        self.y += y.sum(0)
        self.yy += (y**2).sum(0)
        self.xy += moved.T @ y

    # ---- the frame of these rows ---------------------------------------------------------------

    @property
    def mean(self) -> Float[np.ndarray, " d_model"]:
        """Of the rows themselves."""
        return self.origin + self.x / self.n

    @property
    def varies(self) -> Float[np.ndarray, " d_model"]:
        """1.0 for coordinates that vary, as in `Frame`."""
        largest = np.maximum(np.abs(self.origin + self.low), np.abs(self.origin + self.high))
        return ((self.high > self.low) & (self._spread > FLAT * largest)).astype(np.float64)

    @property
    def scale(self) -> Float[np.ndarray, " d_model"]:
        """The spread of each coordinate; 1 where it does not vary."""
        return np.where(self.varies > 0, self._spread, 1.0)

    @property
    def size(self) -> float:
        """The mean squared norm of these rows, standardised: how many coordinates vary."""
        return float(self.varies.sum())

    @property
    def _spread(self) -> Float[np.ndarray, " d_model"]:
        return np.sqrt(np.maximum(self.xx.diagonal() / self.n - (self.x / self.n) ** 2, 0.0))

    def products(self, scale: Float[np.ndarray, " d_model"]) -> Float[np.ndarray, "..."]:
        """Those of the centred rows with each other, divided by a scale; 0 where it is infinite."""
        centred = self.xx - np.outer(self.x, self.x / self.n)
        return centred / scale / scale[:, None]

    # ---- fits ----------------------------------------------------------------------------------

    def weights(
        self, scale: Float[np.ndarray, " d_model"], penalty: float
    ) -> tuple[Float[np.ndarray, "d_model target"], Float[np.ndarray, " target"]]:
        """Ridge regression of the targets on these rows: weights and biases on x less the origin.

        Args:
            scale: what the rows are divided by, before the penalty is put on their weights.
            penalty: of the squared norm, beside the sum of squared errors.
        """
        square = self.products(scale)
        square.flat[:: len(square) + 1] += penalty
        across = (self.xy - np.outer(self.x, self.y / self.n)) / scale[:, None]
        found = scipy.linalg.solve(square, across, assume_a="pos", overwrite_a=True)
        found /= scale[:, None]
        return found, self.y / self.n - self.x / self.n @ found

    def error(
        self, weights: Float[np.ndarray, "d_model target"], biases: Float[np.ndarray, " target"]
    ) -> Float[np.ndarray, " target"]:
        """The squared error of such weights, summed over these rows."""
        bent = np.einsum("dk,dk->k", weights, self.xx @ weights - 2 * self.xy)
        straight = 2 * biases * (self.x @ weights - self.y)
        return self.yy + bent + straight + self.n * biases**2


def gathered(
    rows: Streamed,
    targets: Targets,
    partitions: Sequence[Int[np.ndarray, " row"]],
    n_parts: int,
    origin: Float[np.ndarray, " d_model"],
) -> list[list[Moments]]:
    """The moments of every part of some partitions, in one reading of the rows.

    Args:
        partitions: the part of each row, 0 to n_parts - 1; -1 for rows that are in none.
    """
    width = targets(slice(0, 1)).shape[1]
    found = [[Moments.none(origin, width) for _ in range(n_parts)] for _ in partitions]
    for part, x in rows.blocks():
        x -= origin
        y = targets(part)
        for partition, moments in zip(partitions, found, strict=True):
            for number, there in runs(partition[part]):
                if number >= 0:
                    moments[number].take(x[there], y[there])
    return found


def runs(of: Int[np.ndarray, " row"]) -> list[tuple[int, np.ndarray]]:
    """The rows that have each number.

    >>> [(number, rows.tolist()) for number, rows in runs(np.array([1, 0, 1]))]
    [(0, [1]), (1, [0, 2])]
    """
    order = of.argsort(kind="stable")
    numbers, starts = np.unique(of[order], return_index=True)
    return list(zip(numbers.tolist(), np.split(order, starts[1:]), strict=True))
