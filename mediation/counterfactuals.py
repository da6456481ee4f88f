"""Run the nested worlds of a mediation study: which input, whose latents.

Each pair is run four times and read each time with the same metric: base and source as they are
(y00, y11), and each with the other's latents (y01, y10).
"""

import time
from collections.abc import Sequence
from functools import partial
from itertools import combinations
from typing import Any, Literal

import numpy as np

from imaginelens.hooks import Edit, EditTouchedNothing, Force, LatentModel, Mean, Pairs, Swap
from imaginelens.hooks.errors import InputError
from imaginelens.hooks.metrics import Metric, logit_diff
from imaginelens.hooks.names import NamesFilter
from imaginelens.hooks.patching import Context, check_arguments
from imaginelens.hooks.positions import LatentPositions, Positions, latent
from imaginelens.hooks.states import States
from imaginelens.mediation.alignment import Align, Chosen, FirstOf
from imaginelens.mediation.checks import run_controls
from imaginelens.mediation.donors import Prepared, means_of_others
from imaginelens.mediation.folds import joined
from imaginelens.mediation.outcomes import Flag, PotentialOutcomes
from imaginelens.mediation.provenance import Provenance
from imaginelens.mediation.replacing import wants_reference
from imaginelens.mediation.study import Batch, Study, Values, check_study, each

Steps = Literal["telescoping", "shapley"]
FORMULA = "Y(x, Z(x')): TE = y11 - y00, PNDE = y10 - y00, TNIE = y11 - y10, PNIE = y01 - y00"
MOST_STEPS = 6  # of which every subset is a world
OTHERS = Mean()  # without a reference of its own: it is fitted on all other groups


def counterfactuals(
    lens: LatentModel,
    pairs: Pairs,
    *,
    metric: Metric = logit_diff,
    context: Context = "free",
    at: Positions = latent,
    site: NamesFilter = "hook_latent",
    align: Align = "strict",
    reference: Edit | Literal[False] = OTHERS,
    steps: Steps | None = None,
    text: Literal["base", "source"] = "base",
    latents: Force | None = None,
    controls: bool = True,
    batch_size: int = 32,
    seed: int = 0,
) -> PotentialOutcomes:
    """Run every pair in the four nested worlds, and measure the same outcome in each.

    A pair in which nothing could be swapped, because nothing was emitted or the two states are
    equal, keeps its outcome: its indirect effect is 0, and the result flags it.

    Args:
        metric: `il.logit_diff`, `il.log_prob`, `il.prob`, `il.kl`, `il.source_answer` or
            `il.base_answer`: the same function in every world.
        context: "free": what follows an edit is generated anew, so that text is a part of the
            indirect effect. "fixed": all worlds write the same text, and every effect is controlled
            at it.
        at, site: the mediator: latents as they are fed back, a part of them, written imagination
            (`il.imagination`), or any site and positions.
        align: what to do where base and source emit different numbers of states: leave the pair
            out ("strict"), swap as many as both have ("truncate"), or repeat the donor's last
            ("pad"). In fixed context the text decides the number, and there is nothing to align.
        reference: what holds the mediator for the controlled effect; by default the mean over all
            other groups, and other inputs. False leaves the controlled worlds out, and so does the
            default where the mediator is text. Of a random edit the first draw is taken.
        steps: also run the worlds that split the pure indirect effect over steps; "shapley" runs
            every subset of them, 2 ** steps in all.
        text: whose text all worlds write, in fixed context.
        latents: `il.Force(k)` makes every run emit k latents.
        controls: run the controls; those that cannot be run are named in the result.
        batch_size: no result depends on it.
        seed: of what the controls draw.

    Raises:
        InputError: an argument is not what it should be, or no pair has an outcome in all worlds.
        EditTouchedNothing: no pair has a mediator that could be swapped.
        ControlError: the sham, which puts every state back, changed something.

    >>> import imaginelens as il
    >>> lens = il.load("latent-content")
    >>> worlds = il.counterfactuals(lens, lens.task(n=16), metric=il.source_answer, controls=False)
    >>> effects = worlds.effects()
    >>> effects.te.value > 0.9, effects.tnie.value > 0.8
    (True, True)
    """
    started = time.perf_counter()
    check_study(pairs, metric, context, at, align, text, batch_size)
    study = Study(lens, pairs, metric, context, at, site, align, text, latents, batch_size)
    _check_reference(study, reference)
    _check_steps(at, steps)
    batches = study.batches()
    worlds, flags = _natural(study, batches)
    _check_worlds(worlds, flags, batches)
    worlds |= _controlled(study, batches, reference)
    split = {} if steps is None else _by_step(study, batches, steps)
    checked = run_controls(study, batches, worlds["y00"], seed) if controls else None
    sides = [b.base for b in batches] + [b.source for b in batches]
    return PotentialOutcomes(
        **worlds,
        binary=metric.binary,
        groups=None if pairs.groups is None else tuple(pairs.groups),
        metric=metric.name,
        unit=metric.unit,
        estimand=study.estimand,
        emitted=np.concatenate([batch.emitted for batch in batches]),
        flags=flags,
        steps=split,
        controls=checked,
        provenance=Provenance.of(
            lens,
            keys=[key for side in sides for key in side.run.tokens.keys],
            seed=seed,
            formula=FORMULA,
            forwards=study.forwards,
            seconds=time.perf_counter() - started,
        ),
    )


# ---- worlds ------------------------------------------------------------------------------------


def _natural(
    study: Study, batches: Sequence[Batch]
) -> tuple[dict[str, Values], tuple[Flag | None, ...]]:
    """The four natural worlds, and why the mediator of a pair was not swapped."""
    flags: dict[int, Flag] = {}
    for batch in each(batches, "sham"):
        study.check_sham(batch)

    def world(name: Literal["y01", "y10"], batch: Batch) -> Values:
        arm = study.swap(batch, batch.base if name == "y01" else batch.source)
        flags.update({batch.rows[row]: flag for row, flag in arm.landing.flags.items()})
        return study.value(batch, arm.after)

    worlds = {
        "y00": study.collect(batches, "y00", lambda batch: study.value(batch, batch.base.read)),
        "y11": study.collect(batches, "y11", lambda batch: study.value(batch, batch.source.read)),
    }
    worlds |= {
        "y10": study.collect(batches, "y10", partial(world, "y10")),
        "y01": study.collect(batches, "y01", partial(world, "y01")),
    }
    for batch in batches:
        flags |= {batch.rows[row]: "unaligned" for row in np.flatnonzero(batch.unaligned)}
    return worlds, tuple(flags.get(row) for row in range(len(study.pairs)))


def _controlled(
    study: Study, batches: Sequence[Batch], reference: Edit | Literal[False]
) -> dict[str, Values]:
    """Base and source with the mediator held at the reference."""
    if reference is False or (study.in_words and wants_reference(reference)):
        return {}
    means = _means_of_others(study, batches) if wants_reference(reference) else None

    def world(name: Literal["c0", "c1"], batch: Batch) -> Values:
        side = batch.base if name == "c0" else batch.source
        if means is None:
            return study.value(batch, study.arm(batch, side, reference).after)
        mean = means[batch.rows]
        known = np.min([states.counts() for states in mean.values()], axis=0)
        at = FirstOf(study.at, tuple(np.minimum(known, side.takes).tolist()))
        arm = study.arm(batch, side, Swap(Prepared(mean)), at=at)
        return np.where(known < side.takes, np.nan, study.value(batch, arm.after))

    return {
        "c0": study.collect(batches, "c0", partial(world, "c0")),
        "c1": study.collect(batches, "c1", partial(world, "c1")),
    }


def _means_of_others(study: Study, batches: Sequence[Batch]) -> dict[range, dict[str, States]]:
    """For the rows of each batch, at each site, the mean states of all other groups."""
    donors = [side.donor for batch in batches for side in (batch.base, batch.source)]
    whole = {site: joined([run.states(site, study.at) for run in donors]) for site in study.sites}
    labels = [study.labels[row] for batch in batches for _ in range(2) for row in batch.rows]
    found = {}
    for batch in batches:
        keys = batch.base.run.tokens.keys, batch.source.run.tokens.keys
        own = list(zip([study.labels[row] for row in batch.rows], *keys, strict=True))
        found[batch.rows] = {
            site: means_of_others(states, labels, own) for site, states in whole.items()
        }
    return found


def _by_step(study: Study, batches: Sequence[Batch], how: Steps) -> dict[frozenset[int], Values]:
    """The base's worlds in which some steps only have the source's states."""
    n = max(max(batch.base.takes) for batch in batches)
    if how == "shapley" and n > MOST_STEPS:
        raise InputError(
            f"every subset of {n} steps would be {2**n} worlds; use steps='telescoping'"
        )
    sets: list[tuple[int, ...]] = [tuple(range(k)) for k in range(1, n + 1)]
    if how == "shapley":
        sets = [chosen for k in range(1, n + 1) for chosen in combinations(range(n), k)]

    def world(chosen: tuple[int, ...], batch: Batch) -> Values:
        at = Chosen(FirstOf(study.at, batch.base.takes), chosen)
        return study.value(batch, study.swap(batch, batch.base, at=at).after)

    return {
        frozenset(chosen): study.collect(batches, f"steps {chosen}", partial(world, chosen))
        for chosen in sets
    }


# ---- refusals ----------------------------------------------------------------------------------


def _check_reference(study: Study, reference: Any) -> None:
    if reference is False or study.in_words:
        return
    check_arguments(edit=reference)
    if not wants_reference(reference):
        return
    if not isinstance(reference, Mean):
        raise InputError(
            f"{reference!r} takes its statistics from runs and was given none; use reference="
            f"il.{type(reference).__name__}(..., reference=lens.run(other_inputs)), or leave it "
            "out for the mean over all other groups"
        )
    if len(set(study.labels)) < 2:
        raise InputError(
            f"the reference is the mean over all other groups, and the {len(study.pairs)} pairs "
            "are of one group; use reference=il.Zero(), or reference=False to leave out the "
            "controlled effects"
        )


def _check_steps(at: Positions, steps: str | None) -> None:
    if steps is None:
        return
    if steps not in ("telescoping", "shapley"):
        raise InputError(f"steps is {steps!r}; choose 'telescoping', 'shapley' or None")
    if not isinstance(at, LatentPositions):
        raise InputError(f"steps are counted for il.latent, not for {at!r}; leave steps out")


def _check_worlds(
    worlds: dict[str, Values], flags: Sequence[Flag | None], batches: Sequence[Batch]
) -> None:
    first = batches[0].base.run
    if None not in flags:
        why = ", ".join(f"{flags.count(f)} {f}" for f in dict.fromkeys(flags))
        raise EditTouchedNothing(
            f"no pair has a mediator that could be swapped ({why}): {first.trigger}; look at "
            "lens.run(pairs.base).trigger and lens.run(pairs.source).trigger"
        )
    if np.isnan(np.stack([*worlds.values()])).any(0).all():
        raise InputError(
            f"no pair has an outcome in all worlds (the first wrote {first.texts[0][:60]!r}); pass "
            "answer=il.answers.boxed, .letter, .after('...') or a callable to il.load"
        )
