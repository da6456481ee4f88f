"""Pairs with both inputs run as they are, and the exact effect of patching single cells."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from jaxtyping import Float

from imaginelens.hooks import LatentModel, Run, Swap
from imaginelens.hooks.metrics import Metric, Readout, Targets
from imaginelens.hooks.patching import Context
from imaginelens.mediation.arm import do
from imaginelens.mediation.patched import ByCell, Selected, donor_of


@dataclass(frozen=True, eq=False)
class Batch:
    """Some pairs of a study.

    Attributes:
        run: the side that receives states, and `partner` the one that gives them.
        before: what `run` answers, and `other` what `partner` does.
    """

    lens: LatentModel
    run: Run
    partner: Run
    targets: Targets
    metric: Metric
    context: Context
    before: Readout
    other: Readout

    @classmethod
    def of(
        cls,
        lens: LatentModel,
        run: Run,
        partner: Run,
        targets: Targets,
        metric: Metric,
        context: Context,
    ) -> "Batch":
        """Read both sides as they are."""
        before, other = (
            lens.read_answer(side, targets, free=context == "free") for side in (run, partner)
        )
        return cls(lens, run, partner, targets, metric, context, before, other)

    @property
    def values(self) -> Float[np.ndarray, " example"]:
        """The metric of the unedited run."""
        return self._value(self.before)

    @property
    def other_values(self) -> Float[np.ndarray, " example"]:
        """The metric of the partner."""
        return self._value(self.other)

    def exact(self, cells: Selected) -> ByCell:
        """patched - unpatched, by one run for each cell; 0 where no state was changed."""
        donor, _ = donor_of(self.lens, self.partner, cells, self.context)
        before = self.values
        found = np.zeros((len(cells), len(self.run)))
        for i, (cell, at) in enumerate(cells):
            arm = do(
                self.lens,
                self.run,
                self.before,
                Swap(donor),
                name="Swap",
                sites=cell.sites,
                at=at,
                context=self.context,
                heads=None if cell.head is None else [cell.head],
            )
            effect = self._value(arm.after) - before
            untouched = [row for row in arm.landing.flags if not np.isnan(before[row])]
            effect[untouched] = 0.0
            found[i] = effect
        return found

    def _value(self, read: Readout) -> np.ndarray:
        return self.metric(replace(read, unedited=self.before)).double().cpu().numpy()


def exact_effects(batches: Sequence[Batch], cells: Selected) -> ByCell:
    """The exact effects of some cells on all pairs."""
    return np.concatenate([batch.exact(cells) for batch in batches], axis=1)
