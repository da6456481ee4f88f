"""How probes with hidden parts are trained: all rows at once, stopped early on held-out groups.

Many label vectors, and all penalties, are trained together: tensors have a first axis for them.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from imaginelens.probes.frames import Design, deal

Weights = list[torch.Tensor]
Forward = Callable[[Weights, torch.Tensor], torch.Tensor]
RATE = 0.1  # for rows of norm 1
AT_ONCE = 20_000_000  # numbers in the hidden states of all fits that are trained together


@dataclass(frozen=True)
class Recipe:
    """Adam's settings.

    Attributes:
        patience: how many epochs without a lower held-out loss end the training.
        hidden: numbers per row that one fit computes, for the memory it takes.
    """

    rate: float
    epochs: int
    patience: int
    hidden: int


def trained(
    make: Callable[[np.ndarray], Weights],
    forward: Forward,
    design: Design,
    labellings: Sequence[np.ndarray],
    *,
    n_classes: int | None,
    strengths: tuple[float, ...],
    recipe: Recipe,
    seed: int,
) -> list[tuple[list[np.ndarray], float]]:
    """Weights for each label vector, and the penalty that did best on a held-out fifth of groups.

    The number of epochs is chosen there, too; then all rows are trained on for as long.

    Args:
        make: the weights that a label vector's training starts from.
        forward: (weights, rows) -> scores (fit, row, score), all with the axis of fits.
    """
    per_fit = len(design.z) * recipe.hidden * len(strengths)
    chunk = max(1, AT_ONCE // max(per_fit, 1))
    found: list[tuple[list[np.ndarray], float]] = []
    with torch.enable_grad():
        for first in range(0, len(labellings), chunk):
            part = labellings[first : first + chunk]
            fit = _Fits(make, forward, design, part, n_classes, recipe, seed)
            found += fit.chosen(sorted(strengths, reverse=True))
    return found


class _Fits:
    """Label vectors that are trained together."""

    def __init__(
        self,
        make: Callable[[np.ndarray], Weights],
        forward: Forward,
        design: Design,
        labellings: Sequence[np.ndarray],
        n_classes: int | None,
        recipe: Recipe,
        seed: int,
    ) -> None:
        self.forward, self.recipe, self.n_classes = forward, recipe, n_classes
        self.rows = torch.from_numpy(np.asarray(design.z, dtype=np.float32))
        self.target = torch.from_numpy(np.stack(labellings))
        held = np.stack([deal(y, design.groups, 5, seed) == 0 for y in labellings])
        self.held = torch.from_numpy(held & ~held.all(1, keepdims=True))
        start = [make(y) for y in labellings]
        self.start = [torch.stack(each) for each in zip(*start, strict=True)]

    def chosen(self, strengths: list[float]) -> list[tuple[list[np.ndarray], float]]:
        """Train on all but the held-out rows, choose, and train on all."""
        n, m = len(self.target), len(strengths)
        every = torch.arange(n).repeat_interleave(m)
        penalty = torch.tensor(strengths).repeat(n)
        best, epochs = self._stopped(every, penalty)
        pick = best.reshape(n, m).argmin(1)  # of equally good ones the strongest
        penalty, epochs = torch.tensor(strengths)[pick], epochs.reshape(n, m)[range(n), pick]
        weights = self._after(penalty, epochs)
        return [
            ([each[i].double().numpy() for each in weights], strengths[int(pick[i])])
            for i in range(n)
        ]

    def _stopped(
        self, fits: torch.Tensor, penalty: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The lowest held-out loss of each fit, and after how many epochs it was reached."""
        held, target = self.held[fits], self.target[fits]
        best = torch.full((len(fits),), torch.inf)
        at = torch.zeros(len(fits), dtype=torch.int64)
        for epoch, weights in enumerate(self._epochs(fits, penalty, ~held)):
            with torch.no_grad():
                now = self._loss(weights, target, held)
            better = now < best
            best, at = torch.where(better, now, best), torch.where(better, epoch, at)
            if epoch - int(at.max()) >= self.recipe.patience:
                break
        return best, at

    def _after(self, penalty: torch.Tensor, epochs: torch.Tensor) -> Weights:
        """The weights of each fit after its own number of epochs on all rows."""
        fits = torch.arange(len(self.target))
        kept = [each.clone() for each in self.start]
        steps = self._epochs(fits, penalty, torch.ones_like(self.held))
        for epoch, weights in enumerate(steps):
            now = epochs == epoch
            for mine, each in zip(kept, weights, strict=True):
                mine[now] = each.detach()[now]
            if epoch >= int(epochs.max()):
                break
        return kept

    def _epochs(self, fits: torch.Tensor, penalty: torch.Tensor, used: torch.Tensor) -> Any:
        """The weights before each epoch and after the last."""
        weights = [each[fits].clone().requires_grad_() for each in self.start]
        optimiser = torch.optim.Adam(weights, lr=self.recipe.rate)
        target = self.target[fits]
        for _ in range(self.recipe.epochs):
            yield weights
            optimiser.zero_grad()
            sizes = sum((each**2).flatten(1).sum(1) for each in weights if each.dim() > 2)
            (self._loss(weights, target, used) + penalty / 2 * sizes).sum().backward()
            optimiser.step()
        yield weights

    def _loss(self, weights: Weights, target: torch.Tensor, used: torch.Tensor) -> torch.Tensor:
        """The mean loss of each fit over the rows that it uses."""
        found = self.forward(weights, self.rows)
        if self.n_classes:
            each = -found.log_softmax(-1).gather(-1, target[..., None])[..., 0]
        else:
            each = (found[..., 0] - target.float()) ** 2
        return (each * used).sum(1) / used.sum(1).clamp_min(1)
