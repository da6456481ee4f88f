"""The probe with one hidden layer: what can be read, if not along a line."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch

from imaginelens.probes.estimators import Probe
from imaginelens.probes.frames import Design
from imaginelens.probes.readouts import Layered, Readout
from imaginelens.probes.training import RATE, Recipe, Weights, trained


@dataclass(eq=False)
class MlpProbe(Probe):
    """One hidden layer of rectified units, in torch, trained by Adam with an L2 penalty.

    A fifth of the groups is held out to choose the penalty and the number of epochs; then all rows
    are trained on. The same seed gives the same probe.

    Attributes:
        hidden: how many hidden units.
        strengths: penalties to choose among, on the weights of both layers.
        epochs, patience: how long to train at most, and without getting better.
    """

    kind: ClassVar[str] = "mlp"
    quantities: ClassVar[bool] = True
    readout: ClassVar[str] = "layered"
    hidden: int = 32
    strengths: tuple[float, ...] = (1e-3, 1e-1)
    epochs: int = 200
    patience: int = 20
    seed: int = 0

    def _solve(
        self, design: Design, labellings: Sequence[np.ndarray], n_classes: int | None
    ) -> list[tuple[Readout, float | None]]:
        width, outputs = design.z.shape[-1], n_classes or 1
        scale = (design.frame.size or 1.0) ** 0.5  # rows of norm 1 on average
        sizes = [measures(y, n_classes) for y in labellings]

        def make(y: np.ndarray) -> Weights:
            draw = torch.Generator().manual_seed(self.seed)
            inner = torch.randn(width, self.hidden, generator=draw)
            outer = torch.zeros(self.hidden, outputs)  # begins at the class rates
            return [inner, torch.zeros(1, self.hidden)[0], outer, rates(y, n_classes)]

        def forward(weights: Weights, rows: torch.Tensor) -> torch.Tensor:
            inner, inner_bias, outer, outer_bias = weights
            hidden = torch.relu(rows / scale @ inner + inner_bias[:, None])
            return hidden @ outer + outer_bias[:, None]

        found = trained(
            make,
            forward,
            design,
            [(y - mean) / spread for y, (mean, spread) in zip(labellings, sizes, strict=True)]
            if n_classes is None
            else labellings,
            n_classes=n_classes,
            strengths=self.strengths,
            recipe=Recipe(RATE, self.epochs, self.patience, self.hidden),
            seed=self.seed,
        )
        readouts: list[tuple[Readout, float | None]] = []
        for ((a, b, c, d), strength), (mean, spread) in zip(found, sizes, strict=True):
            readouts.append((Layered(a / scale, b, c * spread, d * spread + mean), strength))
        return readouts


def rates(y: np.ndarray, n_classes: int | None) -> torch.Tensor:
    """The log rates of classes, from which training begins; 0 for quantities."""
    if n_classes is None:
        return torch.zeros(1)
    counts = np.bincount(y, minlength=n_classes)
    return torch.from_numpy(np.log(counts / len(y))).float()


def measures(y: np.ndarray, n_classes: int | None) -> tuple[float, float]:
    """The mean and spread of quantities; 0 and 1 for classes."""
    return (0.0, 1.0) if n_classes else (float(y.mean()), float(y.std()) or 1.0)
