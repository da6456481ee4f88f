"""The attentive probe: reads sets of states, whichever of them holds the answer."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from jaxtyping import Float

from imaginelens.probes.estimators import Probe
from imaginelens.probes.frames import Design
from imaginelens.probes.mlp import measures, rates
from imaginelens.probes.readouts import Attention, Readout
from imaginelens.probes.training import RATE, Recipe, Weights, trained

SHARP = 8.0  # so that a query of norm 1 can single out a step


@dataclass(eq=False)
class AttentiveProbe(Probe):
    """Per head softmax(query . z) over an example's steps, then a linear readout of the mean.

    Steps have no order: permuting them changes nothing. Rows are (row, step, d_model); a step that
    a row lacks is nan. Trained as `MlpProbe` is.

    Attributes:
        heads: how many places it can look at, at once.
        strengths: penalties to choose among, on queries and values.
        epochs, patience: how long to train at most, and without getting better.
    """

    kind: ClassVar[str] = "attentive"
    quantities: ClassVar[bool] = True
    sets: ClassVar[bool] = True
    readout: ClassVar[str] = "attention"
    heads: int = 4
    strengths: tuple[float, ...] = (1e-3, 1e-1)
    epochs: int = 200
    patience: int = 20
    seed: int = 0

    def attention(self, x: Any) -> Float[np.ndarray, "row head step"]:
        """How much each head looks at each step of each row: sums to 1 over steps.

        Raises:
            InputError: the probe has learned nothing yet, or x is no set of states.
        """
        self._check_fitted()
        readout = self.readout_
        assert isinstance(readout, Attention)
        return readout.attention(np.asarray(self._rows(x)))

    def _solve(
        self, design: Design, labellings: Sequence[np.ndarray], n_classes: int | None
    ) -> list[tuple[Readout, float | None]]:
        width, outputs = design.z.shape[-1], n_classes or 1
        scale = (design.frame.size or 1.0) ** 0.5
        sizes = [measures(y, n_classes) for y in labellings]

        def make(y: np.ndarray) -> Weights:
            draw = torch.Generator().manual_seed(self.seed)
            query = torch.randn(self.heads, width, generator=draw) / width**0.5
            value = torch.zeros(self.heads, outputs, width)
            return [query, value, rates(y, n_classes)]

        def forward(weights: Weights, rows: torch.Tensor) -> torch.Tensor:
            query, value, bias = weights
            n_rows, n_steps, _ = rows.shape
            there = ~torch.isnan(rows).any(-1)
            z = torch.nan_to_num(rows / scale).flatten(0, 1)
            logits = (z @ query.mT).unflatten(1, (n_rows, n_steps)) * SHARP
            shares = logits.masked_fill(~there[..., None], -torch.inf).softmax(2)
            # each step's score by each head, then their mean: (fit, row, step, head, score)
            each = (z @ value.flatten(1, 2).mT).unflatten(1, (n_rows, n_steps))
            each = each.unflatten(3, (self.heads, outputs))
            return (shares[..., None] * each).sum((2, 3)) + bias[:, None]

        found = trained(
            make,
            forward,
            design,
            [(y - mean) / spread for y, (mean, spread) in zip(labellings, sizes, strict=True)]
            if n_classes is None
            else labellings,
            n_classes=n_classes,
            strengths=self.strengths,
            recipe=Recipe(
                RATE, self.epochs, self.patience, design.z.shape[1] * self.heads * (outputs + 1)
            ),
            seed=self.seed,
        )
        readouts: list[tuple[Readout, float | None]] = []
        for ((query, value, bias), strength), (mean, spread) in zip(found, sizes, strict=True):
            readout = Attention(query * SHARP / scale, value * spread / scale, bias * spread + mean)
            readouts.append((readout, strength))
        return readouts
