"""Both inputs of some pairs, run as they are: the two ends between which a study patches."""

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Float
from tqdm import tqdm

from imaginelens.hooks import LatentModel, Pairs, Run
from imaginelens.hooks.metrics import Metric, Readout, targets_of
from imaginelens.hooks.patching import Context
from imaginelens.hooks.positions import Positions, latent
from imaginelens.mediation.cells import Cell
from imaginelens.mediation.effect_map import EffectMap
from imaginelens.mediation.provenance import Provenance
from imaginelens.mediation.sweep import Sweep

Direction = Literal["denoise", "noise"]
Values = Float[np.ndarray, " example"]


@dataclass(eq=False)
class Ends:
    """Some pairs, with both of their inputs run and read.

    Attributes:
        run: the side that is edited; `partner` the other one, `donor` the same with its states
            captured.
        before, other: what the two answer.
        forwards: what it has cost so far.
    """

    lens: LatentModel
    pairs: Pairs
    metric: Metric
    direction: Direction
    context: Context
    run: Run
    partner: Run
    donor: Run
    before: Readout
    other: Readout
    forwards: int
    started: float = field(default_factory=time.perf_counter)

    @property
    def n(self) -> int:
        """How many pairs there are."""
        return len(self.run)

    def value(self, read: Readout) -> Values:
        """The metric of a readout; `il.kl` and `il.flip` compare with the side that is edited."""
        values = self.metric(replace(read, unedited=self.before))
        return values.double().cpu().numpy()

    def map(self, cells: Sequence[Cell], *, formula: str, seed: int = 0, **parts: Any) -> EffectMap:
        """The map of what was done to some cells; `parts` are its other fields."""
        shape = (len(cells), self.n)
        words: dict[str, Any] = {
            "before": self.value(self.before), "flags": np.zeros(shape, np.int8),
            "change": np.full(shape, np.nan), "sham": None, "notes": (), **parts,
        }  # fmt: skip
        return EffectMap(
            cells=tuple(cells),
            other=self.value(self.other),
            groups=None if self.pairs.groups is None else tuple(self.pairs.groups),
            metric=self.metric.name,
            unit=self.metric.unit,
            binary=self.metric.binary,
            direction=self.direction,
            context=self.context,
            provenance=Provenance.of(
                self.lens,
                keys=[*self.run.tokens.keys, *self.partner.tokens.keys],
                seed=seed,
                formula=formula,
                forwards=self.forwards,
                seconds=time.perf_counter() - self.started,
            ),
            **words,
        )


def check_study(
    lens: LatentModel, pairs: Any, *, metric: Any, direction: Any, context: Any, batch_size: Any
) -> None:
    """Refuse what cannot be run before anything is.

    Raises:
        InputError: an argument is not what it should be, or the metric needs answers that are
            missing.
    """
    Sweep(
        lens=lens, pairs=pairs, sites="resid_post", positions=latent, metric=metric,
        direction=direction, context=context, edit=None, heads=False, window=1,
        batch_size=batch_size, fast=True, verify=0, seed=0,
    ).check()  # fmt: skip


def batches(pairs: Pairs, size: int, what: str) -> Iterator[Pairs]:
    """Some pairs at a time, with a progress bar where it takes a while."""
    starts = range(0, len(pairs), size)
    for start in tqdm(starts, desc=what, unit="batch", delay=3, leave=False):
        yield pairs[start : start + size]


def ends_of(
    lens: LatentModel,
    pairs: Pairs,
    *,
    metric: Metric,
    direction: Direction,
    context: Context,
    states: Sequence[tuple[str, Positions]] = (),
) -> Ends:
    """Run both inputs of some pairs, and capture the states that are to be donated.

    Args:
        states: sites and positions of those; latents are always at hand.
    """
    base, source = lens.run(list(pairs.base)), lens.run(list(pairs.source))
    run, partner = (base, source) if direction == "denoise" else (source, base)
    answers = pairs.source_answers if metric.needs_source else [None] * len(pairs)
    targets = targets_of(base, pairs.base_answers, answers, lens.encode)
    metric.check(targets)
    free = context == "free"
    before = lens.read_answer(run, targets, free=free)
    other = lens.read_answer(partner, targets, free=free)
    donor, more = donating(lens, partner, states, context)
    forwards = base.forwards + source.forwards + 2 + more
    return Ends(
        lens, pairs, metric, direction, context, run, partner, donor, before, other, forwards
    )


def donating(
    lens: LatentModel, run: Run, states: Sequence[tuple[str, Positions]], context: Context
) -> tuple[Run, int]:
    """A run with its states captured, on the path that the edited one takes; and the forwards."""
    modules = list(dict.fromkeys(site for site, _ in states if site != "hook_latent"))
    if not modules:
        return run, 0
    at = tuple(dict.fromkeys(at for site, at in states if site != "hook_latent"))
    if context == "free":
        donor = lens.rerun(run, names_filter=modules, positions=at)
        return donor, donor.forwards
    with torch.no_grad():  # what is donated shall not hold a whole forward for its gradient
        _, cache = lens.run_with_cache(run, names_filter=modules, positions=at)
    return replace(run, cache=cache), 1
