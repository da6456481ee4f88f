"""Linear probes with an L2 penalty: logistic regression and ridge regression."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import numpy as np
from jaxtyping import Float, Int

from imaginelens.probes.estimators import Probe
from imaginelens.probes.frames import Design, deal
from imaginelens.probes.readouts import Linear, Readout, Scores
from imaginelens.probes.softmax import ROUGH, Softmax

STRENGTHS = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)
INNER_FOLDS = 3


@dataclass(eq=False)
class LogisticProbe(Probe):
    """Logistic regression, multinomial for more than two classes; the optimum is scikit-learn's.

    Attributes:
        strengths: L2 penalties to choose among by the log loss of held-out groups, relative to the
            mean squared norm of the standardised states (their width): what is minimised is the
            mean log loss + strength * width / 2 * |w|^2, so that C = 1 / (strength * width * n).
    """

    kind: ClassVar[str] = "logistic"
    permutations: ClassVar[int] = 50
    strengths: tuple[float, ...] = STRENGTHS
    seed: int = 0

    def _solve(
        self, design: Design, labellings: Sequence[np.ndarray], n_classes: int | None
    ) -> list[tuple[Readout, float | None]]:
        assert n_classes is not None
        z, y = np.asarray(design.z), np.stack(labellings)
        chosen = np.full(len(y), self.strengths[0])
        if len(self.strengths) > 1:
            repeated, used = inner_folds(y, design.groups, self.seed)
            inner = Softmax.of(z, repeated, n_classes=n_classes, used=used)
            sizes = np.full(len(y), design.frame.size)
            chosen = choose(inner, self.strengths, sizes)
        fits = Softmax.of(z, y, n_classes=n_classes)
        weights, biases = fits.outside(fits.fit(chosen * max(design.frame.size, 1e-12)))
        return [
            (Linear(np.ascontiguousarray(w), b), float(strength))
            for w, b, strength in zip(weights, biases, chosen, strict=True)
        ]


@dataclass(eq=False)
class RidgeProbe(Probe):
    """Ridge regression: of quantities, or of each class's 0/1 indicator; closed form, and fast.

    Predicted indicators sum to 1 and are cut to 0..1 for probabilities.

    Attributes:
        strengths: penalties to choose among by the squared error on held-out groups, relative to
            the mean squared norm: the mean squared error + strength * width * |w|^2.
    """

    kind: ClassVar[str] = "ridge"
    quantities: ClassVar[bool] = True
    permutations: ClassVar[int] = 200
    strengths: tuple[float, ...] = STRENGTHS
    seed: int = 0

    def probabilities(self, scores: Scores) -> Float[np.ndarray, "row class"]:
        cut = np.clip(scores, 0.0, 1.0)
        return np.asarray(cut / cut.sum(1, keepdims=True))

    def _solve(
        self, design: Design, labellings: Sequence[np.ndarray], n_classes: int | None
    ) -> list[tuple[Readout, float | None]]:
        targets = [y[:, None] if n_classes is None else np.eye(n_classes)[y] for y in labellings]
        together = np.hstack(targets)  # one matrix product for all label vectors
        chosen = self._choose(design, together, len(targets))
        left, values, right = _factors(design)
        biases, centre = together.mean(0), np.asarray(design.z).mean(0)
        inside = np.split(left.T @ (together - biases), len(targets), axis=1)
        found: list[tuple[Readout, float | None]] = []
        for each, bias, strength in zip(
            inside, np.split(biases, len(targets)), chosen, strict=True
        ):
            shrunk = values / (values**2 + _penalty(design, strength))
            weights = right.T @ (shrunk[:, None] * each)
            readout = Linear(np.ascontiguousarray(weights.T), bias - centre @ weights)
            found.append((readout, strength))
        return found

    def _choose(
        self, design: Design, together: Float[np.ndarray, "row target"], n_labellings: int
    ) -> list[float]:
        """By the error of whole inner folds, in closed form: (I - H_kk)^-1 times their residuals,
        with H the smoother of all rows (the block form of the leave-one-out identity)."""
        if len(self.strengths) == 1:
            return [self.strengths[0]] * n_labellings
        # the same inner folds for all labels, so that the smoothers are made once
        make = partial(deal, np.zeros(len(together)), design.groups, INNER_FOLDS, self.seed)
        parts = design.once("parts", make)
        falling = sorted(self.strengths, reverse=True)  # of equally good ones the strongest
        errors = []
        for strength in falling:
            smooth = partial(_smoother, design, parts, strength)
            smoother, blocks = design.once(strength, smooth)
            residuals = together - smoother @ together
            held = [((block @ residuals[parts == k]) ** 2).sum(0) for k, block in blocks.items()]
            errors.append(np.sum(held, axis=0).reshape(n_labellings, -1).sum(1))
        least = np.array(errors)
        good = least <= least.min(0) * (1 + 1e-12)
        return [falling[int(i)] for i in good.argmax(0)]


def inner_folds(
    y: Int[np.ndarray, "labelling row"], groups: Int[np.ndarray, " row"] | None, seed: int
) -> tuple[Int[np.ndarray, "fit row"], Any]:
    """Label vectors, one for each inner fold, and which rows are not held out in it."""
    parts = np.stack([deal(each, groups, INNER_FOLDS, seed) for each in y])
    used = parts[:, None] != np.arange(INNER_FOLDS)[:, None]
    used |= ~used.any(2, keepdims=True)  # a single group cannot be held out
    return np.repeat(y, INNER_FOLDS, axis=0), used.reshape(-1, y.shape[1])


def choose(
    fits: Any, strengths: tuple[float, ...], sizes: Float[np.ndarray, " labelling"]
) -> Float[np.ndarray, " labelling"]:
    """The strength with the lowest log loss of held-out rows, for each label vector.

    `fits` are a `Softmax`, or what fits as it does, of INNER_FOLDS fits for each label vector.

    Strengths are tried from the strongest down, each from where the one before ended, and no weaker
    one once the loss has risen: most shuffled labels are done after two.
    """
    falling = np.array(sorted(strengths, reverse=True), dtype=np.float64)
    best = np.full(len(sizes), np.inf)
    chosen = np.full(len(sizes), falling[0])
    live, start = np.arange(len(sizes)), None
    for strength in falling:
        rows = (live[:, None] * INNER_FOLDS + np.arange(INNER_FOLDS)).ravel()
        some = fits.some(rows)
        penalty = np.repeat(strength * np.maximum(sizes[live], 1e-12), INNER_FOLDS)
        found = some.fit(penalty, start, tolerance=ROUGH)
        loss = some.unseen(found).reshape(len(live), -1).sum(1)
        better = loss < best[live]
        best[live[better]], chosen[live[better]] = loss[better], strength
        live, start = live[better], found[np.repeat(better, INNER_FOLDS)]
        if not len(live):
            break
    return chosen


def _factors(design: Design) -> Any:
    """The singular value decomposition of the centred rows."""
    z = np.asarray(design.z)
    return design.once("svd", lambda: np.linalg.svd(z - z.mean(0), full_matrices=False))


def _penalty(design: Design, strength: float) -> float:
    return max(strength * design.frame.size * len(design.z), 1e-300)


def _smoother(design: Design, parts: Int[np.ndarray, " row"], strength: float) -> Any:
    """H, which takes the targets to the fitted values, and (I - H_kk)^-1 of each inner fold."""
    left, values, _ = _factors(design)
    share = values**2 / (values**2 + _penalty(design, strength))
    smoother = (left * share) @ left.T + 1.0 / len(left)
    blocks = {}
    for k in np.unique(parts):
        inside = smoother[np.ix_(parts == k, parts == k)]
        blocks[k] = np.linalg.inv(np.eye(len(inside)) - inside)
    return smoother, blocks
