"""Necessity: what do the answers lose when the latents are replaced? The do(Z) table.

The paper (arXiv 2602.22766, section 3) overwrites every latent of every example with one tensor,
noise or zeros, and compares accuracies. Here the same is done with a whole bank of replacements,
each with its interval, a sham on the same path, and what else could explain a drop: texts that
degenerate, states that the model has never seen, answers that were not found.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from imaginelens.estimates import Estimate
from imaginelens.hooks import (
    AddNoise,
    Constant,
    Delete,
    Edit,
    FirstRepeat,
    Force,
    LatentModel,
    Mean,
    Noise,
    Pairs,
    Resample,
    Sham,
    Shuffle,
    Truncate,
    Zero,
)
from imaginelens.hooks.errors import InputError
from imaginelens.hooks.metrics import Metric, Targets, accuracy
from imaginelens.hooks.names import NamesFilter
from imaginelens.hooks.patching import Context, check_arguments
from imaginelens.hooks.positions import Positions, latent
from imaginelens.hooks.textspans import ImaginationPositions
from imaginelens.mediation.edit_effects import Necessity
from imaginelens.mediation.replacing import Replacing

BANK: tuple[Edit, ...] = (
    Constant(),
    Mean(),
    AddNoise(0.3),
    AddNoise(1.0),
    Noise(),
    Zero(),
    Resample(),
    Shuffle(),
    FirstRepeat(),
)
TEXT_BANK: tuple[Edit, ...] = (Delete(), Truncate(), Shuffle(), Resample())


def necessity(
    lens: LatentModel,
    pairs: Pairs,
    *,
    edits: Sequence[Edit] | None = None,
    metric: Metric = accuracy,
    at: Positions = latent,
    site: NamesFilter = "hook_latent",
    context: Context = "free",
    latents: Force | None = None,
    batch_size: int = 32,
    seed: int = 0,
) -> Necessity:
    """Replace states of every base input, edit by edit, and compare its answer with the unedited.

    Edits that take statistics and were given no reference are fitted on the unedited runs of other
    groups: groups are split into two halves, and each is served by the other. Without groups equal
    inputs are one group. `il.Shuffle()` takes the unedited run itself. The sham always runs, and
    must change nothing. Results do not depend on `batch_size`.

    Args:
        pairs: its base inputs, their answers and groups are used.
        edits: the bank of all replacements if left out, less those that cannot do anything here
            (one latent cannot be shuffled); at `il.imagination` the bank of texts.
        metric: accuracy of the running input, or any other.
        at, site: what is replaced: latents as they are fed back, a part of them, written
            imagination, or any site and positions.
        context: "free": what follows the edit is generated anew. "fixed": the text stays, and one
            forward reads the answer; nothing is measured about texts.
        latents: `il.Force(k)` makes every run emit k latents.
        seed: of the two halves; random edits have seeds and draws of their own.

    Raises:
        InputError: there are no edits, no answers, or too few examples of other groups.
        EditTouchedNothing: an edit reached no example, or changed none.
        ControlError: the sham changed something.
        EstimateError: there are fewer than 2 examples, or fewer than 10 groups.

    >>> import imaginelens as il
    >>> lens = il.load("latent-content")
    >>> table = il.necessity(lens, lens.task(n=16, seed=0), edits=[il.Zero()])
    >>> table["Zero()"].change.value < -0.4, table.sham.change.value
    (True, 0.0)
    """
    check(pairs, edits, metric, at, context, batch_size)
    bank = TEXT_BANK if isinstance(at, ImaginationPositions) else BANK
    chosen = bank if edits is None else tuple(e for e in edits if not isinstance(e, Sham))
    study = Replacing(lens, pairs, metric, at, site, context, latents, batch_size, seed)
    return study.table((*chosen, Sham()), may_do_nothing=edits is None)


def check(pairs: Any, edits: Any, metric: Any, at: Any, context: Any, batch_size: int) -> None:
    """Refuse what cannot be run before anything is.

    Raises:
        InputError: an argument is not what it should be, or the metric needs answers that are
            missing.
        EstimateError: there are too few examples, or groups, to tell anything.
    """
    if not isinstance(pairs, Pairs):
        raise InputError(
            f"pairs is a {type(pairs).__name__}, expected il.Pairs; make one with "
            "il.Pairs.from_examples(examples), or lens.task() on an organism"
        )
    if edits is not None and not isinstance(edits, list | tuple):
        raise InputError(f"edits is {edits!r}, expected a list such as [il.Zero(), il.Noise()]")
    if edits is not None and not edits:
        raise InputError("edits is empty; name some, [il.Zero(), il.Noise()], or leave it out")
    for edit in edits or ():
        check_arguments(edit=edit)
    check_arguments(at=at, metric=metric)
    if context not in ("free", "fixed"):
        raise InputError(f"context is {context!r}; choose 'free' or 'fixed'")
    if batch_size < 1:
        raise InputError(f"batch_size is {batch_size}; run at least 1 example at a time")
    n = len(pairs)
    answers = tuple(pairs.base_answers), tuple(pairs.source_answers)
    metric.check(Targets(*answers, ((),) * n, (-1,) * n, (-1,) * n, (0,) * n))
    Estimate.mean(np.zeros(n), groups=pairs.groups)
