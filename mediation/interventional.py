"""Interventional effects: what the input does through latents that are drawn from other examples.

Natural effects give an example the latents it would itself have had. Their interventional analogues
(VanderWeele, Vansteelandt & Robins 2014; Vansteelandt & Daniel 2017) give it those of another
example, at a level of the input: G_x is a random draw from the distribution of Z(x) over examples.

    overall = E Y(x1, G1) - E Y(x0, G0) = rNDE + rNIE
    rNDE    = E Y(x1, G0) - E Y(x0, G0)
    rNIE    = E Y(x1, G1) - E Y(x1, G0)

The overall effect is not the total effect, so there is no proportion mediated.
"""

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import numpy as np
from jaxtyping import Bool, Float

from imaginelens.estimates import Estimate, EstimateError
from imaginelens.hooks import EditTouchedNothing, Force, LatentModel, Pairs, Swap
from imaginelens.hooks.errors import InputError
from imaginelens.hooks.metrics import Metric, base_answer
from imaginelens.hooks.names import NamesFilter
from imaginelens.hooks.patching import Context
from imaginelens.hooks.positions import Positions, latent
from imaginelens.mediation.alignment import Align, FirstOf, aligned, counts
from imaginelens.mediation.donors import Picked
from imaginelens.mediation.folds import Rows
from imaginelens.mediation.provenance import Provenance
from imaginelens.mediation.result_files import Saved
from imaginelens.mediation.study import Batch, Side, Study, Values, check_study, each

Cells = Float[np.ndarray, "recipient donor"]
Level = Literal["base", "source"]
World = Literal["y00", "y11", "y10"]
LEVELS: Mapping[World, tuple[Level, Level]] = {
    "y00": ("base", "base"),
    "y11": ("source", "source"),
    "y10": ("source", "base"),
}
FORMULA = "rNDE = Y(x1, G0) - Y(x0, G0), rNIE = Y(x1, G1) - Y(x1, G0), overall = rNDE + rNIE"


@dataclass(frozen=True, repr=False, eq=False)
class Interventional(Saved):
    """The outcome of every recipient with the latents of every donor, and the effects of do(X).

    Attributes:
        y00, y11, y10: (recipient, donor), with the input's level first and that of the donated
            latents second: y10 is the outcome of the edited input with latents of unedited ones.
            nan where there is no such cell, or where an outcome is missing in one of the three.
        crossed: which cells there are: donors of other groups, and other inputs, whose numbers of
            states could be aligned.
        donors: the pairs that donate, by number; the same ones for all recipients.
        do: what was done to the inputs: level 0 is left as it is, level 1 is edited.
        unaligned: how many cells are left out because numbers of states differ.
        binary: whether outcomes are 0 or 1.
        groups: the group of each recipient, or None.
        metric, unit, estimand: what was measured, and of which mediator.
    """

    y00: Cells
    y11: Cells
    y10: Cells
    crossed: Bool[np.ndarray, "recipient donor"]
    donors: tuple[int, ...]
    do: str
    unaligned: int = 0
    binary: bool = False
    groups: tuple[Any, ...] | None = None
    metric: str = "outcome"
    unit: str = ""
    estimand: str = ""
    provenance: Provenance | None = None

    @cached_property
    def overall(self) -> Estimate:
        """E Y(x1, G1) - E Y(x0, G0): the edit of the input and of the distribution of latents."""
        return self._effect("overall", self.y11, self.y00, None)

    @cached_property
    def rnde(self) -> Estimate:
        """E Y(x1, G0) - E Y(x0, G0): the input is edited, latents come from unedited ones."""
        return self._effect("rnde", self.y10, self.y00, self.overall)

    @cached_property
    def rnie(self) -> Estimate:
        """E Y(x1, G1) - E Y(x1, G0): latents come from edited inputs instead of unedited ones."""
        return self._effect("rnie", self.y11, self.y10, self.overall)

    @property
    def parse_coverage(self) -> float:
        """The share of cells with an outcome in all three worlds; the others are missing."""
        return float(np.mean(~np.isnan(self.y00[self.crossed]))) if self.crossed.any() else 0.0

    def __len__(self) -> int:
        return len(self.y00)

    def _effect(self, name: str, after: Cells, before: Cells, total: Estimate | None) -> Estimate:
        words: dict[str, Any] = {"name": name, "unit": self.unit, "total": total}
        if self.groups is not None and len(set(self.groups)) < len(self):
            return Estimate.crossed(_by_group(after - before, self.groups), **words)
        if self.binary:
            return Estimate.paired(after, before, **words)
        return Estimate.crossed(after - before, **words)

    def __repr__(self) -> str:
        lines = [
            f"Interventional effects on {self.metric} of {self.do}: {len(self)} recipients x "
            f"{len(self.donors)} donors, {int(self.crossed.sum())} cells",
            *([f"  {self.estimand}"] if self.estimand else []),
        ]
        try:
            for name, formula in (
                ("overall", "Y(x1, G1) - Y(x0, G0)"),
                ("rnde", "Y(x1, G0) - Y(x0, G0)"),
                ("rnie", "Y(x1, G1) - Y(x1, G0)"),
            ):
                effect: Estimate = getattr(self, name)
                shown = f"{effect.value:>9.4g}  95% {effect.ci()!s:<22}"
                lines.append(f"  {name:<8} {shown} {formula}")
        except EstimateError as error:
            lines.append(f"  no intervals: {error}")
        if self.unaligned:
            lines.append(f"  {self.unaligned} cells left out: their numbers of states differ")
        if self.parse_coverage < 1:
            lines.append(f"  parse coverage {self.parse_coverage:.1%} of the cells")
        lines += [] if self.provenance is None else [f"  {self.provenance}"]
        return "\n".join(lines)


def interventional(
    lens: LatentModel,
    pairs: Pairs,
    *,
    donors: int = 8,
    metric: Metric = base_answer,
    context: Context = "free",
    at: Positions = latent,
    site: NamesFilter = "hook_latent",
    align: Align = "strict",
    latents: Force | None = None,
    seed: int = 0,
    batch_size: int = 32,
) -> Interventional:
    """Give every example the latents of the same few other examples, at both levels of do(X).

    Args:
        pairs: made by `Pairs.do(...)`, so that base and source are two levels of one named edit.
        donors: how many pairs donate, drawn by the seed, each of another group; every other one if
            there are not as many.
        metric: the same function in every world: `il.base_answer`, `il.log_prob`, ...
        context: "free" or "fixed", as in `il.counterfactuals`; so are `at`, `site` and `latents`.
        align: what to do where recipient and donor emitted different numbers of states: no such
            cell ("strict"), as many as both have ("truncate"), the donor's last repeated ("pad").

    Raises:
        InputError: an argument is not what it should be, or the pairs' two levels have no meaning.
        EditTouchedNothing: no recipient got latents other than its own.
        ControlError: the sham, which puts every state back, changed something.

    >>> import imaginelens as il
    >>> lens = il.load("latent-content")
    >>> pairs = lens.task(n=12).do(il.BlankImage())
    >>> found = il.interventional(lens, pairs, donors=3, metric=il.log_prob)
    >>> bool(abs(found.overall.value - found.rnde.value - found.rnie.value) < 1e-9)
    True
    """
    started = time.perf_counter()
    check_study(pairs, metric, context, at, align, "base", batch_size)
    done = _check_levels(pairs, donors)
    study = Study(lens, pairs, metric, context, at, site, align, "base", latents, batch_size)
    drawn = _draw(study.labels, donors, seed)
    batches = study.batches()
    for batch in each(batches, "sham"):
        study.check_sham(batch)
    swaps = Swaps(study, batches)
    worlds = {name: np.stack([swaps.world(name, d) for d in drawn], axis=1) for name in LEVELS}
    if not swaps.touched:
        raise EditTouchedNothing(
            f"no recipient got states at {at!r} other than its own: {batches[0].base.run.trigger}; "
            "look at lens.run(pairs.base).trigger"
        )
    others = np.stack([_others(batches, study.labels, donor) for donor in drawn], axis=1)
    crossed = others & np.stack([swaps.aligned(donor) for donor in drawn], axis=1)
    missing = np.isnan(np.stack([*worlds.values()])).any(0) | ~crossed
    if missing.all():
        raise InputError(
            f"none of the {int(crossed.sum())} cells has an outcome in all worlds (the first wrote "
            f"{batches[0].base.run.texts[0][:60]!r}); pass answer=il.answers.boxed, .letter, "
            ".after('...') or a callable to il.load, or use another align"
        )
    sides = [b.base for b in batches] + [b.source for b in batches]
    return Interventional(
        **{name: np.where(missing, np.nan, cells) for name, cells in worlds.items()},
        crossed=crossed,
        donors=drawn,
        do=done,
        unaligned=int((others & ~crossed).sum()),
        binary=metric.binary,
        groups=None if pairs.groups is None else tuple(pairs.groups),
        metric=metric.name,
        unit=metric.unit,
        estimand=study.estimand,
        provenance=Provenance.of(
            lens,
            keys=[key for side in sides for key in side.run.tokens.keys],
            seed=seed,
            formula=FORMULA,
            forwards=study.forwards,
            seconds=time.perf_counter() - started,
        ),
    )


@dataclass
class Swaps:
    """All recipients with the latents of one donor, and whether any got other ones than its own."""

    study: Study
    batches: Sequence[Batch]
    touched: bool = False

    def world(self, name: World, donor: int) -> Values:
        """The outcome of every recipient with a donor's latents, each at its own level."""
        own, given = LEVELS[name]
        return np.concatenate(
            [self._one(b, own, given, donor) for b in each(self.batches, f"{name} of {donor}")]
        )

    def _one(self, batch: Batch, own: Level, given: Level, donor: int) -> Values:
        study, (theirs, row) = self.study, self._find(donor)
        side, other = _side(batch, own), _side(theirs, given)
        n = len(batch.rows)
        if study.in_words:
            swap, at = Swap(Rows(other.donor, (row,), len(theirs.rows))), study.at
        else:
            exchanged = self._exchanged(side, other, row)
            swap = Swap(Picked(((other.donor, row),) * n, exchanged))
            at = FirstOf(study.at, exchanged)
        arm = study.arm(batch, side, swap, at=at)
        self.touched |= len(arm.landing.flags) < n
        return study.value(batch, arm.after)

    def aligned(self, donor: int) -> Bool[np.ndarray, " recipient"]:
        """Which recipients have as many states as the donor, at all levels, if they must."""
        study, (theirs, row) = self.study, self._find(donor)
        if study.in_words or study.align != "strict":
            return np.ones(len(study.pairs), dtype=bool)

        def alike(batch: Batch) -> Iterator[np.ndarray]:
            for own, given in LEVELS.values():
                n = counts(_side(theirs, given).run, study.at)[row]
                yield counts(_side(batch, own).run, study.at) == n

        return np.concatenate([np.all([*alike(batch)], axis=0) for batch in self.batches])

    def _exchanged(self, side: Side, other: Side, row: int) -> tuple[int, ...]:
        mine = counts(side.run, self.study.at)
        theirs = np.full_like(mine, counts(other.run, self.study.at)[row])
        return aligned(mine, theirs, self.study.align)

    def _find(self, donor: int) -> tuple[Batch, int]:
        batch = next(b for b in self.batches if donor in b.rows)
        return batch, donor - batch.rows.start


def _side(batch: Batch, level: Level) -> Side:
    return batch.base if level == "base" else batch.source


def _draw(labels: Sequence[object], donors: int, seed: int) -> tuple[int, ...]:
    """The pairs that donate: of different groups, drawn at random, in order."""
    picked: dict[object, int] = {}
    for row in np.random.default_rng(seed).permutation(len(labels)).tolist():
        picked.setdefault(labels[row], row)
    return tuple(sorted(list(picked.values())[:donors]))


def _others(
    batches: Sequence[Batch], labels: Sequence[object], donor: int
) -> Bool[np.ndarray, " recipient"]:
    """Which pairs are of another group than the donor, and have another input."""
    keys = [key for batch in batches for key in batch.base.run.tokens.keys]
    return np.array(
        [
            label != labels[donor] and key != keys[donor]
            for label, key in zip(labels, keys, strict=True)
        ]
    )


def _by_group(
    cells: Float[np.ndarray, "recipient donor"], groups: Sequence[object]
) -> Float[np.ndarray, "group donor"]:
    """The means over the recipients of each group, that are there."""
    rows = []
    for label in dict.fromkeys(groups):
        some = cells[[i for i, group in enumerate(groups) if group == label]]
        n = (~np.isnan(some)).sum(0)
        rows.append(np.where(n > 0, np.nansum(some, axis=0) / np.maximum(n, 1), np.nan))
    return np.stack(rows)


def _check_levels(pairs: Pairs, donors: int) -> str:
    """What was done to the inputs, if that gives base and source a meaning of their own."""
    if not pairs.history:
        raise InputError(
            "these pairs do not say what was done to their inputs, and interventional effects "
            "compare the two levels of one edit; make them with pairs.do(il.BlankImage()), say, or "
            "use il.counterfactuals"
        )
    done = pairs.history[-1]
    if done.startswith("SwapInstance("):
        raise InputError(
            f"{done.split(',')[0]} makes another example of each input, so that both levels have "
            "latents of the same distribution; use an edit such as il.BlankImage() or "
            "il.SwapText(), or il.counterfactuals"
        )
    if donors < 2:
        raise InputError(f"donors is {donors}; at least 2 are needed to tell how much they differ")
    n = len(pairs) if pairs.groups is None else len(set(pairs.groups))
    if n < 2:
        raise InputError(
            f"the {len(pairs)} pairs are of one group, and donors are of other groups; use more "
            "pairs, or groups=None"
        )
    return "; ".join(pairs.history)
