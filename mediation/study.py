"""What studies of mediation are made of: both inputs of each pair, run as they are, and arms in
which one of them has states that are not its own.

Arms with an edit go through the same path as those without, so that a sham changes nothing.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, TypeVar

import numpy as np
from jaxtyping import Bool, Float, Int
from tqdm import tqdm

from imaginelens.hooks import Edit, Force, LatentModel, Pairs, Run, Sham, Swap
from imaginelens.hooks.errors import InputError
from imaginelens.hooks.metrics import Metric, Readout, Targets, targets_of
from imaginelens.hooks.names import NamesFilter
from imaginelens.hooks.patching import Context, check_arguments, donor_run
from imaginelens.hooks.positions import LatentPositions, Positions
from imaginelens.hooks.textedits import TextEntry, edit_entry
from imaginelens.hooks.textspans import ImaginationPositions
from imaginelens.mediation.alignment import Align, FirstOf, aligned, counts
from imaginelens.mediation.arm import Arm, do
from imaginelens.mediation.donors import Picked
from imaginelens.mediation.errors import ControlError

Values = Float[np.ndarray, " example"]
T = TypeVar("T")


@dataclass(frozen=True, eq=False)
class Side:
    """One input of each pair of a batch.

    Attributes:
        run: as it is; in fixed context, while it writes the text of all worlds.
        donor: the same with its states captured at the mediator's sites.
        read: what it answers.
        takes: how many states each row takes from the other side; empty where the mediator is text.
    """

    run: Run
    donor: Run
    read: Readout
    takes: tuple[int, ...] = ()


@dataclass(frozen=True, eq=False)
class Batch:
    """Some pairs, by number, with both of their inputs run as they are.

    Attributes:
        emitted: (pair, 2), how many states each input fed, or tokens it wrote, at the mediator's
            positions, left to itself.
        unaligned: pairs that are left out, because the two numbers differ.
    """

    rows: range
    base: Side
    source: Side
    emitted: Int[np.ndarray, "example side"]
    unaligned: Bool[np.ndarray, " example"]


@dataclass
class Study:
    """The arguments that studies have in common, and what they have cost so far."""

    lens: LatentModel
    pairs: Pairs
    metric: Metric
    context: Context
    at: Positions
    site: NamesFilter
    align: Align
    text: Literal["base", "source"]
    latents: Force | None
    batch_size: int
    forwards: int = 0

    def __post_init__(self) -> None:
        self.sites = tuple(self.lens.registry.match(self.site))

    # ---- what there is ---------------------------------------------------------------------

    @property
    def in_words(self) -> bool:
        """Whether the mediator is written imagination, not states."""
        return isinstance(self.at, ImaginationPositions) and self.sites == ("hook_latent",)

    @property
    def labels(self) -> tuple[object, ...]:
        """The group of each pair: its own, where none are given."""
        groups = self.pairs.groups
        return tuple(range(len(self.pairs))) if groups is None else tuple(groups)

    @property
    def estimand(self) -> str:
        """The mediator, context and alignment in words."""
        site = self.site if isinstance(self.site, str) else ", ".join(self.sites)
        what = "text" if self.in_words else site
        parts = [f"mediator {what} at {self.at!r}", f"{self.context} context"]
        if self.context == "fixed":
            parts.append(f"at the {self.text}'s text")
        if not self.in_words and not (
            self.context == "fixed" and isinstance(self.at, LatentPositions)
        ):
            parts.append(f"step numbers aligned: {self.align}")
        if self.latents is not None:
            parts.append(f"{self.latents!r}")
        return "; ".join(parts)

    # ---- runs ------------------------------------------------------------------------------

    def batches(self) -> list[Batch]:
        """Run all inputs as they are."""
        n, size = len(self.pairs), self.batch_size
        chunks = [range(i, min(i + size, n)) for i in range(0, n, size)]
        return [self._batch(rows) for rows in each(chunks, "runs")]

    def _batch(self, rows: range) -> Batch:
        some = self.pairs[rows.start : rows.stop]
        base, source = (
            self._counted(self.lens.run(list(inputs), latents=self.latents))
            for inputs in (some.base, some.source)
        )
        emitted = np.stack([counts(base, self.at), counts(source, self.at)], 1)
        told = base
        if self.context == "fixed" and self.text == "base":
            source = self._at_text_of(source, base)
        elif self.context == "fixed":
            told = base = self._at_text_of(base, source)
        others = some.source_answers if self.metric.needs_source else [None] * len(some)
        targets = targets_of(told, some.base_answers, others, self.lens.encode)
        mine, theirs = counts(base, self.at), counts(source, self.at)
        strict = self.align == "strict" and not self.in_words
        return Batch(
            rows,
            self.side(base, targets, self._takes(mine, theirs)),
            self.side(source, targets, self._takes(theirs, mine)),
            emitted,
            (mine != theirs) & strict,
        )

    def _takes(self, mine: np.ndarray, theirs: np.ndarray) -> tuple[int, ...]:
        return () if self.in_words else aligned(mine, theirs, self.align)

    def side(self, run: Run, targets: Targets, takes: tuple[int, ...]) -> Side:
        """A run as one side of a batch: read, and ready to donate its states."""
        donor = donor_run(self.lens, run, self.sites, self.at, self.context)
        if donor is not run:
            self._counted(donor)
        self.forwards += 1
        read = self.lens.read_answer(run, targets, free=self.context == "free")
        return Side(run, donor, read, takes)

    def _at_text_of(self, run: Run, other: Run) -> Run:
        """A run that writes what another wrote, with a mediator of its own."""
        if self.in_words:
            entry = edit_entry(Swap(run), self.at, self.sites)
            assert isinstance(entry, TextEntry)
            other = self._counted(self.lens.respelled(other, [entry], context="fixed"))
        told = self._counted(self.lens.retell(run, like=other))
        for mine, theirs in zip(told.texts, other.texts, strict=True):
            if mine != theirs:
                raise InputError(
                    f"an input wrote {mine[:80]!r} where it was to write what its other one wrote, "
                    f"{theirs[:80]!r}, so that the two worlds are not at one text; use "
                    "latents=il.Force(k), or context='free'"
                )
        return told

    def _counted(self, run: Run) -> Run:
        self.forwards += run.forwards
        return run

    # ---- arms ------------------------------------------------------------------------------

    def value(self, batch: Batch, read: Readout) -> Values:
        """The outcome that a readout shows; the base as it is, is what `il.kl` compares with."""
        values = self.metric(replace(read, unedited=batch.base.read))
        return values.double().cpu().numpy()

    def arm(
        self,
        batch: Batch,
        side: Side,
        edit: Edit,
        *,
        at: Positions | None = None,
        sites: Sequence[str] | None = None,
    ) -> Arm:
        """A side under an edit of the states that it takes from the other, or of those at other
        positions; rows that it does not reach stay as they are."""
        own = self.at if self.in_words else FirstOf(self.at, side.takes)
        arm = do(
            self.lens,
            side.run,
            side.read,
            edit,
            name=type(edit).__name__,
            sites=self.sites if sites is None else sites,
            at=own if at is None else at,
            context=self.context,
        )
        self.forwards += 1 if arm.run is side.run else 1 + arm.run.forwards
        return arm

    def swap(self, batch: Batch, side: Side, *, at: Positions | None = None) -> Arm:
        """A side with the mediator of the other side of its pair."""
        other = batch.source if side is batch.base else batch.base
        donor: Any = other.donor
        if not self.in_words:
            rows = range(len(batch.rows))
            donor = Picked(tuple((other.donor, row) for row in rows), side.takes)
        return self.arm(batch, side, Swap(donor), at=at)

    def check_sham(self, batch: Batch) -> None:
        """Put the base's own states back, which must change nothing.

        Raises:
            ControlError: it does.
        """
        before = self.value(batch, batch.base.read)
        after = self.value(batch, self.arm(batch, batch.base, Sham()).after)
        if np.array_equal(before, after, equal_nan=True):
            return
        far = np.abs(after - before)
        raise ControlError(
            f"the sham, which puts every state back as it was, moved the outcome of "
            f"{int((far != 0).sum())} of pairs {batch.rows.start}..{batch.rows.stop - 1} (by up to "
            f"{np.nanmax(far, initial=0.0):.2g}), so that no effect can be told from none; look "
            "for randomness (lens.model.eval(), nondeterministic kernels) and run `imaginelens "
            "doctor`"
        )

    def collect(
        self, batches: Sequence[Batch], what: str, one: Callable[[Batch], Values]
    ) -> Values:
        """One value per example, batch by batch; missing where a pair could not be aligned."""
        values = np.concatenate([one(batch) for batch in each(batches, what)])
        return np.where(np.concatenate([batch.unaligned for batch in batches]), np.nan, values)


def each(items: Sequence[T], what: str) -> Iterator[T]:
    """The items, with a progress bar where they take a while."""
    yield from tqdm(items, desc=what, unit="batch", delay=3, leave=False)


def check_study(
    pairs: Any, metric: Any, context: Any, at: Any, align: Any, text: Any, batch_size: Any
) -> None:
    """Refuse what cannot be run before anything is.

    Raises:
        InputError: an argument is not what it should be, or the metric needs answers that are
            missing, or is not the same function in every world.
    """
    if not isinstance(pairs, Pairs):
        raise InputError(
            f"pairs is a {type(pairs).__name__}, expected il.Pairs; make them with "
            "il.Pairs.from_examples(examples), or lens.task() on an organism"
        )
    check_arguments(at=at, metric=metric)
    if not metric.nested:
        raise InputError(
            f"{metric!r} is not the same function in every nested world, for what is right or "
            "unedited there depends on the input that runs; use il.source_answer, il.base_answer "
            "or il.logit_diff"
        )
    for name, value, known in (
        ("context", context, ("free", "fixed")),
        ("align", align, ("strict", "truncate", "pad")),
        ("text", text, ("base", "source")),
    ):
        if value not in known:
            raise InputError(f"{name} is {value!r}; choose {' or '.join(map(repr, known))}")
    if text == "source" and context == "free":
        raise InputError(
            "text='source' says which text all worlds write, and in free context each writes its "
            "own; add context='fixed', or leave text out"
        )
    if batch_size < 1:
        raise InputError(f"batch_size is {batch_size}; run at least 1 pair at a time")
    if metric.needs_source and None in pairs.source_answers:
        row = pairs.source_answers.index(None)
        raise InputError(
            f"{metric!r} compares with the source's answer, and that of pair {row} is unknown; use "
            "il.base_answer, il.log_prob or il.prob, or give answers"
        )
