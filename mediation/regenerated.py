"""The cells of a map in free context, many to a generation, each taken up at its latent.

Nothing before the first edited latent is computed again. Rows whose edits begin at the same column
are generated together, whichever their sites are.
"""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
from jaxtyping import Float

from imaginelens.hooks import Edit, Run, Sham
from imaginelens.hooks.entries import EditEntry
from imaginelens.hooks.landing import Landing
from imaginelens.hooks.metrics import Readout
from imaginelens.hooks.resuming import read_resumed, resumed
from imaginelens.mediation.behind_prefix import (
    Batch,
    Forward,
    Outcome,
    Task,
    picked_readout,
    picked_targets,
)


@dataclass(frozen=True, eq=False)
class Regenerated(Batch):
    """Some examples, read up to the first edited latent, and the cells to try on what follows."""

    whole: Run

    @cached_property
    def before(self) -> Readout:
        """The readout without any edit; its answers are those that were written."""
        rows = range(len(self.whole))
        found = self._readout(rows, self.prefix.logits, None)
        return replace(found, answers=tuple(self.whole.answers))

    def plan(self, tasks: Sequence[Task], limit: int) -> list[Forward]:
        """Which tasks are generated together, `limit` rows at most."""
        by_column: dict[int, list[Task]] = defaultdict(list)
        for task in tasks:
            by_column[task.first].append(task)
        found = []
        for column, some in sorted(by_column.items()):
            some.sort(key=lambda task: (task.cell, task.example))
            parts = range(0, len(some), limit)
            found += [Forward(0, column, tuple(some[i : i + limit])) for i in parts]
        return found

    def run(self, forward: Forward, edit: Edit | None = None) -> Outcome:
        """Generate the rows of a plan, and read what they answer."""
        edit = self.edit if edit is None else edit
        rows = [task.example for task in forward.tasks]
        entries = list(self._entries(forward, edit))
        prefix = self.prefix.moved(forward.stop)
        active = [entry for entry, _, _ in entries]
        new = resumed(self.lens, self.whole, prefix, rows, forward.stop, active)
        unedited = picked_readout(self.before, rows)
        targets = picked_targets(self.targets, rows)
        again = [e for e in map(_again, active) if e.sites]
        read = read_resumed(self.lens, new, prefix, rows, targets, unedited, again)
        return self._outcome(read, entries)

    def sham(self, plan: Sequence[Forward]) -> Float[np.ndarray, " example"]:
        """The effect of putting every state back, on the path of the map: for each example the
        largest, over the rows that are taken up last."""
        return self._largest_of(plan[-1], Sham())


def _again(entry: EditEntry) -> EditEntry:
    """The same edit while the answer is read, on a landing of its own; latents already are what it
    made of them."""
    sites = tuple(site for site in entry.sites if site != "hook_latent")
    return EditEntry(sites, entry.edit, entry.at, Landing("", "", sites), entry.draw, entry.heads)
