"""Several edits at once on one batch: run, read, and what they did."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int

from imaginelens.hooks import Edit, EditTouchedNothing, Landing, LatentModel, Run
from imaginelens.hooks.edits import whole_numbers
from imaginelens.hooks.entries import EditEntry
from imaginelens.hooks.metrics import Readout
from imaginelens.hooks.patching import Context
from imaginelens.hooks.positions import Positions
from imaginelens.mediation.behind_prefix import FLAGS


@dataclass(eq=False)
class Part(EditEntry):
    """One of several edits: whether it did anything is judged with the others."""

    def judge(self, n_rows: int, seen: str) -> None:
        try:
            super().judge(n_rows, seen)
        except EditTouchedNothing:  # the landing's flags say so
            pass


def part(
    edit: Edit, at: Positions, sites: Sequence[str], *, heads: Sequence[int] | None = None
) -> Part:
    """One edit at some sites and positions, as a part of several."""
    landing = Landing(type(edit).__name__, repr(at), tuple(sites))
    return Part(tuple(sites), edit, at, landing, 0, whole_numbers("heads", heads))


@dataclass(frozen=True, eq=False)
class Joint:
    """What several edits did to a batch.

    Attributes:
        run: the run that wrote what is read: in fixed context, the unedited one.
        flags: for each row why it is as it was; 0 where an edit changed it.
        change: for each row the mean relative change of norm of the touched states; nan if none.
    """

    after: Readout
    run: Run
    flags: Int[np.ndarray, " example"]
    change: Float[np.ndarray, " example"]
    forwards: int


def together(
    lens: LatentModel, run: Run, before: Readout, parts: Sequence[Part], *, context: Context
) -> Joint:
    """Run a batch under several edits, and read its answers as those of the unedited run were read.

    Edits of one cell compose in their order.
    """
    if context == "fixed":
        with lens.registry.scope(parts):
            lens.registry.begin()
            after = lens.read_answer(run, before.targets, unedited=before)
            lens.registry.judge(len(run), str(run.trigger), run.acted)
        return Joint(after, run, *told(parts, len(run)), 1)
    with lens.registry.scope(parts):
        new = lens.rerun(run)
    found = told(parts, len(run))
    again = [_again(one) for one in parts if set(one.sites) != {"hook_latent"}]
    with lens.registry.scope(again):
        after = lens.read_answer(new, before.targets, unedited=before, free=True)
    return Joint(after, new, *found, new.forwards + 1)


def _again(one: Part) -> Part:
    """The same edit while the answer is read; the latents already are what it made of them."""
    return part(one.edit, one.at, [s for s in one.sites if s != "hook_latent"], heads=one.heads)


def told(parts: Sequence[Part], n_rows: int) -> tuple[np.ndarray, np.ndarray]:
    """What the landings of all parts say of each row together."""
    flags, change = np.zeros(n_rows, dtype=int), np.full(n_rows, np.nan)
    for row in range(n_rows):
        why = [one.landing.flags.get(row) for one in parts]
        if None not in why:
            flags[row] = FLAGS["identical_donor" if "identical_donor" in why else "not_emitted"]
        sizes = [size for one in parts for r, *_, size in one.landing.cells if r == row]
        if sizes:
            change[row] = float(np.mean(sizes))
    return flags, change
