"""One edit on one batch: run, read, and what happened on the way."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from imaginelens.hooks import Edit, EditTouchedNothing, Landing, LatentModel, Run
from imaginelens.hooks.entries import EditEntry
from imaginelens.hooks.metrics import Readout
from imaginelens.hooks.patching import Context
from imaginelens.hooks.positions import Positions
from imaginelens.hooks.textedits import TextEntry, edit_entry


@dataclass(repr=False)
class Watched(Landing):
    """A landing that also keeps the states' norms, and, of latents, the new states.

    Attributes:
        norms: before and after, of every touched cell.
        new: rows, columns and new states, one entry per forward; only at `hook_latent`.
    """

    norms: list[tuple[float, float]] = field(default_factory=list)
    new: list[tuple[np.ndarray, np.ndarray, torch.Tensor]] = field(default_factory=list)

    def record(
        self,
        site: str,
        rows: np.ndarray,
        columns: np.ndarray,
        old: torch.Tensor,
        new: torch.Tensor,
        forward: object,
        *,
        donated: bool = False,
    ) -> None:
        super().record(site, rows, columns, old, new, forward, donated=donated)
        sizes = [act.detach().flatten(1).double().norm(dim=1).tolist() for act in (old, new)]
        self.norms += zip(*sizes, strict=True)
        if site == "hook_latent":
            self.new.append((rows, columns, new.detach().cpu()))


@dataclass(frozen=True)
class Arm:
    """What an edit did to a batch.

    Attributes:
        after: the readout under the edit; the unedited one if it changed nothing in the batch.
        run: the run that wrote what is read; the unedited one if the text stayed as it was.
    """

    after: Readout
    run: Run
    landing: Watched


def do(
    lens: LatentModel,
    run: Run,
    before: Readout,
    edit: Edit,
    *,
    name: str,
    sites: Sequence[str],
    at: Positions,
    context: Context,
    draw: int = 0,
    heads: Sequence[int] | None = None,
) -> Arm:
    """Run a batch under an edit, and read its answers as those of the unedited run were read.

    A batch in which the edit did nothing is no error here, for other batches may differ: the
    landing's flags say so.
    """
    entry = edit_entry(edit, at, sites, draw=draw, heads=heads)
    landing = entry.landing = Watched(name, repr(at), entry.landing.sites)
    try:
        if isinstance(entry, TextEntry):
            after, new = _respelled(lens, run, before, entry, context)
        elif context == "fixed":
            after, new = _read(lens, run, before, entry), run
        else:
            after, new = _rerun(lens, run, before, entry)
    except EditTouchedNothing:
        if len(landing.flags) < len(run):  # of something else that the user has registered
            raise
        return Arm(before, run, landing)
    return Arm(after, new, landing)


def _respelled(
    lens: LatentModel, run: Run, before: Readout, entry: TextEntry, context: Context
) -> tuple[Readout, Run]:
    entry.begin()
    new = lens.respelled(run, [entry], context=context)
    entry.judge(len(run), str(run.trigger))
    free = context == "free"
    return lens.read_answer(new, before.targets, unedited=before, free=free), new


def _read(lens: LatentModel, run: Run, before: Readout, entry: EditEntry) -> Readout:
    with lens.registry.scope([entry]):
        lens.registry.begin()
        after = lens.read_answer(run, before.targets, unedited=before)
        lens.registry.judge(len(run), str(run.trigger), run.acted)
    return after


def _rerun(lens: LatentModel, run: Run, before: Readout, entry: EditEntry) -> tuple[Readout, Run]:
    """Generate under the edit. Its latents then are what the edit made of them; at modules it acts
    once more while the answer is read, on a landing of its own."""
    with lens.registry.scope([entry]):
        new = lens.rerun(run)
    modules = tuple(site for site in entry.sites if site != "hook_latent")
    again = EditEntry(
        modules, entry.edit, entry.at, Landing("", "", modules), entry.draw, entry.heads
    )
    with lens.registry.scope([again] if modules else []):
        return lens.read_answer(new, before.targets, unedited=before, free=True), new
