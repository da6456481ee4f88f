"""Off the manifold: how far do edited states lie from the states a model makes by itself?

An edit can cost the answer because it removed what was needed, or because the model has never seen
such states (zeros, say). The distance to real states tells the two apart.
"""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from jaxtyping import Float, Int, Shaped

from imaginelens.hooks.states import States


@dataclass
class Manifold:
    """The unedited states of some examples, to which edited ones are compared.

    Attributes:
        states: of every example, by ordinal.
        labels: the group of every example; an example is never compared with its own group.
    """

    states: States
    labels: Sequence[Hashable]
    _usual: dict[int, float] = field(default_factory=dict)

    def distances(
        self,
        new: Shaped[torch.Tensor, "cell ..."],
        ordinals: Int[np.ndarray, " cell"],
        labels: Sequence[Hashable],
    ) -> Float[np.ndarray, " cell"]:
        """The distance of each new state to the nearest real one of the same ordinal and another
        group, in units of the median such distance among the real ones: 1 is as near as those.

        nan where fewer than two groups have that ordinal, or the real states are all equal.
        """
        found = np.full(len(ordinals), np.nan)
        for k in np.unique(ordinals):
            cells = np.flatnonzero(ordinals == k).tolist()
            usual = self._usual_distance(int(k))
            if usual > 0:
                near = self._nearest(new[cells], int(k), [labels[cell] for cell in cells])
                found[cells] = near / usual
        return np.where(np.isinf(found), np.nan, found)

    def _usual_distance(self, ordinal: int) -> float:
        if ordinal not in self._usual:
            there = self._there(ordinal)
            near = np.zeros(0)
            if there:
                own = [self.labels[i] for i in there]
                near = self._nearest(self.states.values[there, ordinal], ordinal, own)
            near = near[np.isfinite(near)]
            self._usual[ordinal] = float(np.median(near)) if len(near) else float("nan")
        return self._usual[ordinal]

    def _there(self, ordinal: int) -> list[int]:
        """Which examples have this ordinal."""
        if ordinal >= self.states.mask.shape[1]:
            return []
        return torch.nonzero(self.states.mask[:, ordinal])[:, 0].tolist()

    def _nearest(
        self, new: torch.Tensor, ordinal: int, labels: Sequence[Hashable]
    ) -> Float[np.ndarray, " cell"]:
        """The distance to the nearest real state of another group; infinite if there is none."""
        there = self._there(ordinal)
        real = self.states.values[there, ordinal].flatten(1).double().cpu()
        between = torch.cdist(
            new.flatten(1).double().cpu(), real, compute_mode="donot_use_mm_for_euclid_dist"
        )
        own = torch.tensor([[label == self.labels[i] for i in there] for label in labels])
        return between.masked_fill(own, float("inf")).amin(1).numpy()
