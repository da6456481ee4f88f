"""The coordinates in which a probe learns: standardised on its training rows, in their span."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from jaxtyping import Float, Int

States = Float[np.ndarray, "row d_model"] | Float[np.ndarray, "row step d_model"]

Coordinates = Float[np.ndarray, "row coordinate"] | Float[np.ndarray, "row step coordinate"]

FLAT = 1e-9  # a coordinate that varies by less, relative to its size, is a constant


@dataclass(frozen=True, eq=False)
class Frame:
    """Coordinates z = ((x - mean) / scale) @ basis, learned from training rows alone.

    Where there are more coordinates than rows, `basis` spans the rows: a probe with an L2 penalty
    has no weight outside of their span, so that it learns the same there, in less time.

    Attributes:
        mean, scale: of each coordinate.
        basis: (d_model, coordinate), with orthonormal columns; None for all coordinates.
        size: the mean squared norm of the training rows in these coordinates.
    """

    mean: Float[np.ndarray, " d_model"]
    scale: Float[np.ndarray, " d_model"]
    basis: Float[np.ndarray, "d_model coordinate"] | None
    size: float

    @staticmethod
    def of(x: States, *, standardise: bool, rotate: bool) -> "Frame":
        """The frame of some training rows; steps that are nan are left out.

        >>> frame = Frame.of(np.array([[0.0, 5.0], [2.0, 5.0]]), standardise=True, rotate=False)
        >>> frame(np.array([[2.0, 5.0]]))
        array([[1., 0.]])
        """
        rows = x.reshape(-1, x.shape[-1]).astype(np.float64)
        rows = rows[~np.isnan(rows).any(1)]
        mean, scale = rows.mean(0), np.ones(rows.shape[1])
        centred = rows - mean
        if standardise:
            spread = np.sqrt((centred**2).mean(0))
            varies = spread > FLAT * np.abs(rows).max(0)
            scale = np.where(varies, spread, 1.0)
            centred = np.where(varies, centred / scale, 0.0)
        basis = None
        if rotate and rows.shape[1] > len(rows):
            basis = np.linalg.qr(centred.T)[0]
        return Frame(mean, scale, basis, float((centred**2).sum(1).mean()))

    def __call__(self, x: States) -> Coordinates:
        """States in these coordinates."""
        z = (x - self.mean) / self.scale
        return z if self.basis is None else z @ self.basis

    def outside(
        self, weights: Float[np.ndarray, "... coordinate"]
    ) -> Float[np.ndarray, "... d_model"]:
        """Weights on z as weights on x."""
        spread = weights if self.basis is None else weights @ self.basis.T
        return spread / self.scale


@dataclass(frozen=True, eq=False)
class Design:
    """Training rows in their frame, and what is worked out from them once for many label vectors.

    Attributes:
        z: the rows, (row, coordinate) or (row, step, coordinate).
        groups: the number of each row's group; None if each is on its own.
    """

    z: Coordinates
    frame: Frame
    groups: Int[np.ndarray, " row"] | None
    _made: dict[Any, Any] = field(default_factory=dict)

    def once(self, key: Any, make: Callable[[], Any]) -> Any:
        """What `make` gives, made at the first call with this key."""
        if key not in self._made:
            self._made[key] = make()
        return self._made[key]

    def part(self, rows: Any) -> "Design":
        """Some of the rows, in the same frame."""
        return Design(self.z[rows], self.frame, None if self.groups is None else self.groups[rows])


def deal(
    y: np.ndarray, groups: Int[np.ndarray, " row"] | None, n_parts: int, seed: int
) -> Int[np.ndarray, " row"]:
    """Deal whole groups out to parts, evenly by class: the number of the part of each row.

    >>> deal(np.array([0, 0, 1, 1]), None, 2, seed=0).reshape(2, 2).sum(1)
    array([1, 1])
    """
    units = np.arange(len(y)) if groups is None else np.unique(groups, return_inverse=True)[1]
    first = np.unique(units, return_index=True)[1]  # a group goes by the class of its first row
    order = np.random.default_rng(seed).permutation(len(first))
    if y.dtype.kind != "f":
        order = order[np.argsort(y[first][order], kind="stable")]
    part = np.empty(len(first), dtype=np.int64)
    part[order] = np.arange(len(first)) % n_parts
    return part[units]
