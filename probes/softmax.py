"""Multinomial logistic regression with an L2 penalty, of many label vectors at once.

A permutation test fits the same rows to hundreds of label vectors, and choosing a penalty does so
once more per inner fold. Here all of them descend together: one matrix product serves them all.

The optimum is scikit-learn's (`LogisticRegression(C=1 / (penalty * n))`); the way there is
Nesterov's, preconditioned by the bound of Boehning (1992, Ann. Inst. Statist. Math. 44:197-200) on
the curvature, which is diagonal in the singular vectors of centred rows, and restarted where it
overshoots (O'Donoghue and Candes 2015, Found. Comput. Math. 15:715-732).
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int

Rows = Float[np.ndarray, "row coordinate"] | Float[np.ndarray, "fit row coordinate"]

EXACT = 1e-10  # a squared length of the gradient, relative to the curvature, at which to stop
ROUGH = 1e-5  # the same, where penalties are only compared
LOOK = 10  # steps between two looks at which fits are done


@dataclass(frozen=True, eq=False)
class Softmax:
    """Rows and the labels of several fits, ready to be fitted at any penalty.

    Attributes:
        scaled, values, right: the rows in the coordinates of their singular vectors, the singular
            values, and the vectors: shared by all fits, or one set for each.
        truth: (fit, row, class), 1.0 at the class of each row.
        weight: (fit, row), 1 / (rows of the fit), or 0 where a row is not of the fit.
    """

    scaled: Rows
    values: Float[np.ndarray, "fit_or_one coordinate"]
    right: Float[np.ndarray, "fit_or_one coordinate dim"]
    truth: Float[np.ndarray, "fit row class"]
    weight: Float[np.ndarray, "fit row"]

    @staticmethod
    def of(
        z: Rows,
        y: Int[np.ndarray, "fit row"],
        *,
        n_classes: int,
        used: Bool[np.ndarray, "fit row"] | None = None,
    ) -> "Softmax":
        """Fits of label numbers y on centred rows z, shared or one set for each fit.

        Args:
            used: which rows each fit learns from; all if left out.
        """
        left, values, right = np.linalg.svd(z, full_matrices=False)
        there = np.ones(y.shape, bool) if used is None else used
        weight = there / there.sum(1, keepdims=True)
        scaled = left * values[..., None, :]
        if z.ndim == 2:
            values, right = values[None], right[None]
        return Softmax(scaled, values, right, np.eye(n_classes)[y], weight)

    def fit(
        self,
        penalty: Float[np.ndarray, " fit"],
        start: Float[np.ndarray, "fit coordinate_and_bias class"] | None = None,
        *,
        tolerance: float = EXACT,
        steps: int = 500,
    ) -> Float[np.ndarray, "fit coordinate_and_bias class"]:
        """Minimise the mean log loss + penalty / 2 * |w|^2 of each fit, the bias left free.

        Returns: weights in the coordinates of the singular vectors, and the bias as the last row.
        """
        n_fits, n_rows, n_classes = self.truth.shape
        width = self.values.shape[1] + 1
        w = np.zeros((n_fits, width, n_classes)) if start is None else start.copy()
        curvature = np.full((n_fits, width, 1), float(n_rows))
        curvature[:, :-1, 0] = self.values**2
        curvature *= 0.5 * self.weight.max(1)[:, None, None]
        # two classes have two opposite weights of half the length of scikit-learn's one
        ridge = np.repeat(penalty[:, None, None] * (2 if n_classes == 2 else 1), width, axis=1)
        ridge[:, -1] = 0.0

        def slope(at: np.ndarray, live: np.ndarray) -> np.ndarray:
            return self._slope(at, live) + ridge[live] * at

        return descend(w, slope, curvature + ridge, tolerance=tolerance, steps=steps)

    def some(self, fits: Int[np.ndarray, " fit"]) -> "Softmax":
        """Some of the fits."""
        shared = self.scaled.ndim == 2
        return Softmax(
            self.scaled if shared else self.scaled[fits],
            self.values if shared else self.values[fits],
            self.right if shared else self.right[fits],
            self.truth[fits],
            self.weight[fits],
        )

    def scores(self, w: Float[np.ndarray, "..."]) -> Float[np.ndarray, "fit row class"]:
        """The scores of all rows, of the weights that `fit` gave."""
        return self._scores(w, np.arange(len(w)))

    def unseen(self, w: Float[np.ndarray, "..."]) -> Float[np.ndarray, " fit"]:
        """The summed log loss of the rows that each fit was not learned from."""
        return losses(self.scores(w), self.truth, self.weight == 0)

    def outside(
        self, w: Float[np.ndarray, "..."]
    ) -> tuple[Float[np.ndarray, "fit class dim"], Float[np.ndarray, "fit class"]]:
        """Weights on z, and biases."""
        return np.swapaxes(w[:, :-1], 1, 2) @ self.right, w[:, -1]

    def _scores(self, w: np.ndarray, live: np.ndarray) -> np.ndarray:
        if self.scaled.ndim == 3:
            return self.scaled[live] @ w[:, :-1] + w[:, -1:]
        n_fits, width, n_classes = w.shape
        flat = w[:, :-1].transpose(1, 0, 2).reshape(width - 1, -1)
        found = (self.scaled @ flat).reshape(-1, n_fits, n_classes).transpose(1, 0, 2)
        return found + w[:, -1:]

    def _slope(self, w: np.ndarray, live: np.ndarray) -> np.ndarray:
        """The gradient of the mean log loss."""
        scores = self._scores(w, live)
        shares = np.exp(scores - scores.max(2, keepdims=True))
        shares /= shares.sum(2, keepdims=True)
        wrong = (shares - self.truth[live]) * self.weight[live][..., None]
        slope = np.empty_like(w)
        slope[:, -1] = wrong.sum(1)
        if self.scaled.ndim == 3:
            slope[:, :-1] = np.swapaxes(self.scaled[live], 1, 2) @ wrong
        else:
            flat = wrong.transpose(1, 0, 2).reshape(len(self.scaled), -1)
            found = (self.scaled.T @ flat).reshape(-1, len(live), w.shape[2])
            slope[:, :-1] = found.transpose(1, 0, 2)
        return slope


def descend(
    w: Float[np.ndarray, "fit coordinate_and_bias class"],
    slope: Callable[[Any, Any], Any],
    curvature: Float[np.ndarray, "fit coordinate_and_bias one"],
    *,
    tolerance: float = EXACT,
    steps: int = 500,
) -> Float[np.ndarray, "fit coordinate_and_bias class"]:
    """Go down from w, every fit at its own pace, until all of them are done.

    Args:
        slope: the gradient at the weights of some fits, given with the numbers of these fits.
        curvature: at least that of each coordinate.
    """
    n_fits = len(w)
    curvature = np.maximum(curvature, 1e-12)
    live, ahead, pace = np.arange(n_fits), w.copy(), np.ones((n_fits, 1, 1))
    for step in range(1, steps + 1):
        down = slope(ahead[live], live)
        move = down / curvature[live]
        new = ahead[live] - move
        gone = new - w[live]
        wrong = (down * gone).sum((1, 2)) > 0  # past the lowest point: lose the momentum
        next_pace = (1 + np.sqrt(1 + 4 * pace[live] ** 2)) / 2
        push = np.where(wrong[:, None, None], 0.0, (pace[live] - 1) / next_pace)
        pace[live] = np.where(wrong[:, None, None], 1.0, next_pace)
        w[live], ahead[live] = new, new + push * gone
        if step % LOOK == 0:
            live = live[(down * move).sum((1, 2)) > tolerance]
            if not len(live):
                break
    return w


def losses(
    scores: Float[np.ndarray, "fit row class"],
    truth: Float[np.ndarray, "fit row class"],
    held: Bool[np.ndarray, "fit row"],
) -> Float[np.ndarray, " fit"]:
    """The summed log loss of the rows that each fit was not learned from."""
    top = scores.max(2, keepdims=True)
    log_total = np.log(np.exp(scores - top).sum(2)) + top[..., 0]
    return ((log_total - (scores * truth).sum(2)) * held).sum(1)
