"""The k-sparse probe: can a few single coordinates be read?"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from jaxtyping import Float, Int

from imaginelens.hooks.errors import InputError
from imaginelens.probes.estimators import Probe
from imaginelens.probes.frames import Design
from imaginelens.probes.linear import STRENGTHS, choose, inner_folds
from imaginelens.probes.readouts import Linear, Readout
from imaginelens.probes.softmax import Softmax


@dataclass(eq=False)
class SparseProbe(Probe):
    """Logistic regression on the k coordinates in which class means differ most.

    Gurnee et al. 2023 (arXiv 2305.01610). Coordinates are chosen on the training rows alone, by the
    difference, in standard deviations, between a class's mean and that of all other rows.

    Attributes:
        k: how many coordinates; all, where the states have fewer.
        strengths: as of `LogisticProbe`, relative to k.
    """

    kind: ClassVar[str] = "sparse"
    rotates: ClassVar[bool] = False
    permutations: ClassVar[int] = 50
    k: int = 16
    strengths: tuple[float, ...] = STRENGTHS
    seed: int = 0

    @property
    def coordinates_(self) -> Int[np.ndarray, " coordinate"]:
        """The chosen coordinates, in order of their number.

        Raises:
            InputError: the probe has learned nothing yet.
        """
        self._check_fitted()
        return np.flatnonzero((self.readout_.arrays["weights"] != 0).any(0))

    def _solve(
        self, design: Design, labellings: Sequence[np.ndarray], n_classes: int | None
    ) -> list[tuple[Readout, float | None]]:
        assert n_classes is not None
        if self.k < 1:
            raise InputError(f"k is {self.k}; a sparse probe needs 1 coordinate or more")
        z, y = np.asarray(design.z), np.stack(labellings)
        k = min(self.k, z.shape[1])
        everything = np.ones(y.shape, bool)
        chosen = np.full(len(y), self.strengths[0])
        if len(self.strengths) > 1:
            repeated, used = inner_folds(y, design.groups, self.seed)
            inner, _ = self._fits(z, repeated, used, n_classes)
            chosen = choose(inner, self.strengths, np.full(len(y), float(k)))
        fits, coordinates = self._fits(z, y, everything, n_classes)
        found: list[tuple[Readout, float | None]] = []
        solved = zip(*fits.outside(fits.fit(chosen * k)), coordinates, chosen, strict=True)
        for small, bias, where, strength in solved:
            weights = np.zeros((n_classes, z.shape[1]))
            weights[:, where] = small
            found.append((Linear(weights, bias), float(strength)))
        return found

    def _fits(
        self, z: Float[np.ndarray, "row coordinate"], y: np.ndarray, used: Any, n_classes: int
    ) -> tuple[Softmax, list[np.ndarray]]:
        """Fits on coordinates that each chose by the rows it learns from."""
        chosen = [
            np.sort(largest_differences(z[rows], labels[rows], n_classes)[: self.k])
            for labels, rows in zip(y, used, strict=True)
        ]
        rows = np.stack([z[:, where] for where in chosen])
        return Softmax.of(rows, y, n_classes=n_classes, used=used), chosen


def largest_differences(
    z: Float[np.ndarray, "row coordinate"], y: Int[np.ndarray, " row"], n_classes: int
) -> Int[np.ndarray, " coordinate"]:
    """Coordinates in falling order of the largest |mean of a class - mean of all others|.

    >>> largest_differences(np.array([[0.0, 0.0], [0.1, 5.0]]), np.array([0, 1]), 2)
    array([1, 0])
    """
    inside = np.eye(n_classes)[y]
    counts, sums = inside.sum(0)[:, None], inside.T @ z
    others = (sums.sum(0) - sums) / np.maximum(len(z) - counts, 1)
    apart = np.abs(sums / np.maximum(counts, 1) - others)
    apart[(counts[:, 0] == 0) | (counts[:, 0] == len(z))] = 0.0
    return np.argsort(-apart.max(0), kind="stable")
