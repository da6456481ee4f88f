"""Patch every cell of a map, site by layer by position, and keep the effect in every example.

Many cells share a forward (in free context, a generation), and only what an edit can reach is
computed. Where that would be wrong cells are patched one at a time, and the map's notes say why.
"""

import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np
import torch

from imaginelens.hooks import Edit, EditTouchedNothing, LatentModel, Pairs, Run, Swap
from imaginelens.hooks.edits import Shuffle
from imaginelens.hooks.errors import InputError
from imaginelens.hooks.metrics import Metric, Readout, Targets, logit_diff, targets_of
from imaginelens.hooks.names import NamesFilter
from imaginelens.hooks.patching import Context, check_arguments
from imaginelens.hooks.positions import Positions, latent
from imaginelens.hooks.prefix import prefix_of, why_not
from imaginelens.hooks.readout import answer_columns
from imaginelens.hooks.resuming import why_not_resumed
from imaginelens.hooks.tokens import Kind, TokenMap
from imaginelens.mediation.arm import do
from imaginelens.mediation.behind_prefix import FLAGS, Batch, Forward, Outcome, Task
from imaginelens.mediation.budget import rows_that_fit
from imaginelens.mediation.cells import Cell
from imaginelens.mediation.effect_map import EffectMap
from imaginelens.mediation.errors import ControlError
from imaginelens.mediation.progress import Progress
from imaginelens.mediation.provenance import Provenance
from imaginelens.mediation.regenerated import Regenerated
from imaginelens.mediation.rows import fits_rows
from imaginelens.mediation.selecting import cells_of
from imaginelens.mediation.splits import Splits

Direction = Literal["denoise", "noise"]
Selected = Sequence[tuple[Cell, Positions]]
_TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-3}


def sweep(
    lens: LatentModel,
    pairs: Pairs,
    *,
    sites: NamesFilter = "resid_post",
    positions: Positions | Sequence[Positions] = latent,
    metric: Metric = logit_diff,
    direction: Direction = "denoise",
    context: Context = "free",
    edit: Edit | None = None,
    heads: bool = False,
    window: int = 1,
    batch_size: int = 16,
    fast: bool = True,
    verify: int = 0,
    seed: int = 0,
) -> EffectMap:
    """Measure the effect of an edit in every cell of a map: which layer and step carries it?

    Args:
        sites: a short name ("resid_post": in all layers), hook names, or patterns of them.
        positions: one selector, split into its steps or grid cells, or a list, one cell each.
        direction: "denoise" runs the base with states of the source, "noise" the source with states
            of the base. The metric's contrast is the same in both.
        context: in "free", latents and text behind the edit are generated anew; "fixed" reads the
            unedited run's text once, which takes less time.
        edit: what to do there instead, such as `il.Zero()` or `il.Mean(reference)`.
        heads: a cell for each head; `window`: neighbouring layers that are edited together.
        batch_size: pairs that are run at once, and held in memory.
        fast: False runs one forward for each cell, always.
        verify: how many random cells to measure again, one forward each, and compare.

    Raises:
        EditTouchedNothing: no cell reached any example.
        ControlError: a verified cell differs.
        InputError: an argument is not what it should be.

    >>> import imaginelens as il
    >>> lens = il.load("latent-content")
    >>> effects = il.sweep(lens, lens.task(n=2, seed=0), context="fixed")
    >>> effects.axes["position"]
    ('latent[0]', 'latent[1]')
    """
    check_sweep(
        pairs, metric=metric, edit=edit, direction=direction, context=context,
        batch_size=batch_size, verify=verify,
    )  # fmt: skip
    study = Sweep(
        lens, pairs, sites, positions, metric, direction, context, edit, heads, window, batch_size,
        fast, verify, seed,
    )  # fmt: skip
    maps = []
    with Progress("sweep", len(pairs)) as bar:
        for number in range(study.n_chunks):
            maps.append(study.measure(number, tick=bar.tick))
    return joined(maps)


def joined(maps: Sequence[EffectMap]) -> EffectMap:
    """The maps of a study's chunks as one.

    Raises:
        EditTouchedNothing: no cell reached any example.
    """
    cells = list(dict.fromkeys(cell for one in maps for cell in one.cells))
    whole = EffectMap.merge([widened(one, cells) for one in maps])
    if (whole.flags > 0).all():
        n, told = len(whole.before), Counter(whole.flags.ravel().tolist())
        why = " and ".join(f"{told[c]} times {name}" for name, c in FLAGS.items() if told[c])
        raise EditTouchedNothing(
            f"{whole.edit} changed nothing in {len(whole.cells)} cells and {n} examples: {why}; "
            "look at the trigger of lens.run(pairs.base) and at what the donors hold there"
        )
    return whole


def widened(one: EffectMap, cells: Sequence[Cell]) -> EffectMap:
    """A map with more cells, of which it has none: no run of its chunk has such a position."""
    place = {cell: i for i, cell in enumerate(one.cells)}
    n = len(one.before)
    after = [one.after[place[c]] if c in place else one.before for c in cells]
    absent = np.full(n, FLAGS["not_emitted"], dtype=one.flags.dtype)
    flags = [one.flags[place[c]] if c in place else absent for c in cells]
    change = [one.change[place[c]] if c in place else np.full(n, np.nan) for c in cells]
    return replace(
        one, cells=tuple(cells), after=np.stack(after), flags=np.stack(flags),
        change=np.stack(change),
    )  # fmt: skip


@dataclass(frozen=True)
class Sweep:
    """The arguments of a sweep; `measure` works on one chunk of its pairs, alone."""

    lens: LatentModel
    pairs: Pairs
    sites: NamesFilter
    positions: Positions | Sequence[Positions]
    metric: Metric
    direction: Direction
    context: Context
    edit: Edit | None
    heads: bool
    window: int
    batch_size: int
    fast: bool
    verify: int
    seed: int
    limit: int | None = None  # rows in one forward; None is as many as fit
    splits: Splits = field(default_factory=Splits)  # forwards that did not fit

    @property
    def n_chunks(self) -> int:
        """How many chunks of pairs there are."""
        return -(-len(self.pairs) // self.batch_size)

    def check(self) -> None:
        """Refuse what cannot be run before anything is."""
        check_sweep(
            self.pairs, metric=self.metric, edit=self.edit, direction=self.direction,
            context=self.context, batch_size=self.batch_size, verify=self.verify,
        )  # fmt: skip

    def measure(self, number: int, *, tick: Callable[[float], Any] = lambda n: None) -> EffectMap:
        """The map of one chunk of pairs; `tick` is told how many pairs' worth of work is done."""
        return self.measured(Chunk.of(self, number), tick=tick)

    def measured(
        self, chunk: "Chunk", *, tick: Callable[[float], Any] = lambda n: None
    ) -> EffectMap:
        """The map of a chunk whose unedited runs are there."""
        n = len(chunk.run)
        cells = len(chunk.cells)
        after, change = np.full((cells, n), np.nan), np.full((cells, n), np.nan)
        flags = np.zeros((cells, n), dtype=np.int8)
        into = Table(after, flags, change, tick=lambda share: tick(share * n))
        slow = chunk.behind_prefix(into) if self.fast else {i: "asked for" for i in range(cells)}
        for index in slow:
            effect, into.flags[index], into.change[index] = chunk.alone(index)
            after[index] = chunk.before_values + effect
            into.done(1 / cells)
        notes = [*_told(slow, chunk.cells), *chunk.verified(into, slow)]
        return EffectMap(
            cells=tuple(cell for cell, _ in chunk.cells),
            before=chunk.before_values,
            other=chunk.other_values,
            # nothing changed there: what a forward of another shape rounds otherwise is no effect
            after=np.where(flags > 0, chunk.before_values, after),
            flags=flags,
            change=change,
            groups=None if chunk.pairs.groups is None else tuple(chunk.pairs.groups),
            metric=self.metric.name,
            unit=self.metric.unit,
            binary=self.metric.binary,
            direction=self.direction,
            context=self.context,
            edit=type(chunk.edit).__name__,
            sham=into.sham,
            notes=tuple(notes),
            keys=chunk.keys,
            provenance=Provenance.of(
                self.lens,
                keys=chunk.keys,
                seed=self.seed,
                formula=f"{self.metric.name}(patched) - {self.metric.name}(unpatched), "
                f"{self.direction}, {self.context} context",
                forwards=chunk.forwards,
                seconds=time.perf_counter() - chunk.started,
            ),
        )


def check_sweep(
    pairs: Any,
    *,
    metric: Any,
    edit: Any,
    direction: Any,
    context: Any,
    batch_size: Any,
    verify: Any,
) -> None:
    """Refuse what cannot be swept before anything is run.

    Raises:
        InputError: an argument is not what it should be, or answers are missing.
    """
    check_arguments(edit=edit, metric=metric)
    if not isinstance(pairs, Pairs):
        raise InputError(
            f"pairs is a {type(pairs).__name__}, expected il.Pairs; make them with "
            "il.Pairs.from_examples(examples), or lens.task() on an organism"
        )
    for name, value, known in (
        ("direction", direction, ("denoise", "noise")),
        ("context", context, ("free", "fixed")),
    ):
        if value not in known:
            raise InputError(f"{name} is {value!r}; choose {' or '.join(map(repr, known))}")
    for name, number, least in (("batch_size", batch_size, 1), ("verify", verify, 0)):
        if type(number) is not int or number < least:
            raise InputError(f"{name} is {number!r}, expected a number from {least} on")
    if metric.needs_source and None in pairs.source_answers:
        row = pairs.source_answers.index(None)
        raise InputError(
            f"{metric!r} compares with the source's answer, and that of pair {row} is unknown; use "
            "il.log_prob or il.prob, or give answers"
        )


@dataclass
class Table:
    """What has been measured of a chunk so far."""

    after: np.ndarray
    flags: np.ndarray
    change: np.ndarray
    tick: Callable[[float], Any]
    sham: np.ndarray | None = None

    def done(self, share: float) -> None:
        """Tell how much of the chunk has been done since the last time."""
        self.tick(share)


@dataclass
class Chunk:
    """Some pairs with both of their inputs run as they are, and the cells to try on them.

    Attributes:
        run: the side that is edited; `partner` the other one, which donates.
        before: what `run` answers, read in one forward.
        started: when its first run began, as time.perf_counter tells it.
    """

    study: Sweep
    number: int
    pairs: Pairs
    run: Run
    partner: Run
    cells: Selected
    edit: Edit
    targets: Targets
    before: Readout
    before_values: np.ndarray
    other_values: np.ndarray
    forwards: int
    started: float

    @classmethod
    def of(cls, study: Sweep, number: int) -> "Chunk":
        """Run the pairs of a chunk, without and with captures."""
        started = time.perf_counter()
        lens, size = study.lens, study.batch_size
        pairs = study.pairs[number * size : (number + 1) * size]
        base, source = lens.run(list(pairs.base)), lens.run(list(pairs.source))
        run, partner = (base, source) if study.direction == "denoise" else (source, base)
        cells = cells_of(
            lens, [run, partner] if study.edit is None else [run],
            sites=study.sites, positions=study.positions, heads=study.heads, window=study.window,
            lenient=study.n_chunks > 1,
        )  # fmt: skip
        answers = pairs.source_answers if study.metric.needs_source else [None] * len(pairs)
        targets = targets_of(base, pairs.base_answers, answers, lens.encode)
        study.metric.check(targets)
        free = study.context == "free"
        edit, more = cls._edit(study, run, partner, cells)
        before = lens.read_answer(run, targets, free=free)
        other = lens.read_answer(partner, targets, free=free)
        before, other = (replace(r, unedited=before) for r in (before, other))
        values, others = (study.metric(r).double().cpu().numpy() for r in (before, other))
        forwards = base.forwards + source.forwards + more + 2
        return cls(
            study, number, pairs, run, partner, cells, edit, targets, before, values,
            others, forwards, started,
        )  # fmt: skip

    @classmethod
    def _edit(cls, study: Sweep, run: Run, partner: Run, cells: Selected) -> tuple[Edit, int]:
        """The edit with the states it needs, and how many forwards those took."""
        if study.edit is None:
            donor, forwards = cls._donor(study, partner, cells)
            return Swap(donor), forwards
        if isinstance(study.edit, Shuffle) and study.edit.run is None:
            donor, forwards = cls._donor(study, run, cells)
            return replace(study.edit, run=donor), forwards
        return study.edit, 0

    @staticmethod
    def _donor(study: Sweep, run: Run, cells: Selected) -> tuple[Run, int]:
        """A run with its states captured at all cells, on the path that the edited one takes."""
        lens = study.lens
        modules = list(dict.fromkeys(s for cell, _ in cells for s in cell.sites))
        modules = [site for site in modules if site != "hook_latent"]
        positions = tuple({repr(at): at for _, at in cells}.values())
        if not modules:
            return run, 0
        if study.context == "free":
            donor = lens.rerun(run, names_filter=modules, positions=positions)
            return donor, donor.forwards
        with torch.no_grad():  # or the states would hold a whole forward in memory
            _, cache = lens.run_with_cache(run, names_filter=modules, positions=positions)
        return replace(run, cache=cache), 1

    @property
    def keys(self) -> tuple[str, ...]:
        """What identifies each pair: its number, and the content of both of its inputs."""
        first = self.number * self.study.batch_size
        sides = zip(self.run.tokens.keys, self.partner.tokens.keys, strict=True)
        return tuple(f"{first + i}:{own}/{other}" for i, (own, other) in enumerate(sides))

    # ---- one forward for each cell ------------------------------------------------------------

    def alone(self, index: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Effect, flag and relative change of one cell in every example, by the user's own path."""
        cell, at = self.cells[index]
        arm = do(
            self.study.lens, self.run, self.before, self.edit, name=type(self.edit).__name__,
            sites=cell.sites, at=at, context=self.study.context,
            heads=None if cell.head is None else [cell.head],
        )  # fmt: skip
        self.forwards += 1 if arm.run is self.run else 1 + arm.run.forwards
        after = self.study.metric(replace(arm.after, unedited=self.before))
        flags = np.zeros(len(self.run), dtype=np.int8)
        change = np.full(len(self.run), np.nan)
        for row, flag in arm.landing.flags.items():
            flags[row] = FLAGS[flag]
        for row in arm.landing.rows:
            change[row] = np.mean([size for r, _, _, size in arm.landing.cells if r == row])
        before = self.study.metric(self.before).double().cpu().numpy()
        return after.double().cpu().numpy() - before, flags, change

    # ---- many cells in a forward --------------------------------------------------------------

    def behind_prefix(self, into: Table) -> dict[int, str]:
        """Measure what can be measured behind a prefix; returns the other cells, and why not."""
        slow = {index: why for index, why in enumerate(map(self._why_slow, self.cells)) if why}
        quick = [index for index in range(len(self.cells)) if index not in slow]
        if not quick:
            return slow
        lens = self.study.lens
        script = lens.script(self.run, endings=self.targets.base_ids)
        columns = answer_columns(script, self.targets)
        tasks: list[Task] = []
        reasons: dict[int, str | None] = {}
        end = max(columns) + 1
        for index in quick:
            found = [self.cells[index][1].resolve(script.tokens, r) for r in range(len(self.run))]
            firsts = {r: min(int(c[0]), *columns) for r, c in enumerate(found) if len(c)}
            into.after[index] = self.before_values
            into.flags[index] = [0 if len(c) else FLAGS["not_emitted"] for c in found]
            stop = min(firsts.values(), default=min(columns))
            if stop not in reasons:
                reasons[stop] = why_not(lens, script, stop)
            reason = reasons[stop] or self._why_not_taken_up(script.tokens, firsts)
            if reason is not None:
                slow[index] = reason
            else:
                tasks += [Task(index, row, first) for row, first in firsts.items()]
                end = max([end, *(int(c[-1]) + 1 for c in found if len(c))])
        if not tasks:
            return slow
        stop = min(task.first for task in tasks)
        prefix = prefix_of(lens, script, stop=stop, columns=columns, end=end)
        self.forwards += 2 if stop else 1
        own = (lens, prefix, self.cells, self.edit, self.study.metric, self.targets)
        free = self.study.context == "free"
        batch = Regenerated(*own, self.run) if free else Batch(*own)
        self._measure(batch, tasks, into, share=1 - len(slow) / len(self.cells))
        return slow

    def _measure(self, batch: Batch, tasks: Sequence[Task], into: Table, share: float) -> None:
        end = batch.prefix.end
        limit = self.study.limit or rows_that_fit(
            self.study.lens, width=end, suffix=end - batch.prefix.stop
        )
        plan = batch.plan(tasks, limit)
        before = self.study.metric(batch.before).double().cpu().numpy()
        parts: list[Forward] = []
        for forward in plan:
            for part, outcome in self._in_memory(batch, forward):
                parts.append(part)
                self.forwards += 1
                for i, task in enumerate(part.tasks):
                    effect = outcome.values[i] - before[task.example]
                    into.after[task.cell, task.example] = self.before_values[task.example] + effect
                    into.flags[task.cell, task.example] = outcome.flags[i]
                    into.change[task.cell, task.example] = outcome.change[i]
                into.done(share * len(part.tasks) / len(tasks))
        into.sham = batch.sham(parts)
        self.forwards += 1

    def _in_memory(self, batch: Batch, forward: Forward) -> list[tuple[Forward, Outcome]]:
        """Run a forward; in halves where it does not fit into memory, or did not before."""
        splits = self.study.splits
        if not splits.holds(self.number, forward):
            try:
                return [(forward, batch.run(forward))]
            except torch.OutOfMemoryError:
                if len(forward.tasks) == 1:
                    raise
            splits.add(self.number, forward)
        middle = len(forward.tasks) // 2
        halves = (forward.tasks[:middle], forward.tasks[middle:])
        return [p for h in halves for p in self._in_memory(batch, replace(forward, tasks=h))]

    def _why_slow(self, chosen: tuple[Cell, Positions]) -> str | None:
        """Why a cell cannot share a forward, whatever its positions."""
        cell, at = chosen
        if self.study.context == "free":
            if at.awaits_answer:
                return "where it is, is known only once the run is complete"
            reason = why_not_resumed(self.study.lens, self.run)
            if reason is not None:
                return reason
        if not fits_rows(self.edit):
            return f"{type(self.edit).__name__} does not act on single rows"
        if any(self.study.lens.registry[site].is_vision for site in cell.sites):
            return "the vision side comes before the tokens"
        return None

    def _why_not_taken_up(self, tokens: TokenMap, firsts: Mapping[int, int]) -> str | None:
        """Why generating cannot begin at the first edited columns, in free context."""
        if self.study.context == "fixed":
            return None
        if all(tokens.kind[row, column] == Kind.LATENT for row, column in firsts.items()):
            return None
        return "in free context a run is taken up at latents, and its edit begins elsewhere"

    def verified(self, into: Table, slow: dict[int, str]) -> list[str]:
        """Measure random cells of the fast path again, one forward each.

        Raises:
            ControlError: one differs by more than rounding.
        """
        quick = [index for index in range(len(self.cells)) if index not in slow]
        wanted = min(-(-self.study.verify // self.study.n_chunks), len(quick))
        if not wanted:
            return []
        rng = np.random.default_rng([self.study.seed, self.number])
        worst = 0.0
        for index in rng.choice(quick, wanted, replace=False).tolist():
            effect, flags, _ = self.alone(index)
            fast = into.after[index] - self.before_values
            off = np.where(flags > 0, 0.0, np.abs(fast - effect))
            worst = max(worst, float(np.nanmax(off, initial=0.0)))
            scale = max(1.0, float(np.nanmax(np.abs(self.before_values), initial=0.0)))
            if (flags != into.flags[index]).any() or worst > scale * _tolerance(self.study.lens):
                cell = self.cells[index][0]
                raise ControlError(
                    f"{cell.site} in layer {cell.layer} at {cell.position} differs by {worst:.2g} "
                    "from one forward of its own; report this, and use fast=False"
                )
        return [f"{wanted} cells measured again, one forward each: off by {worst:.1e} at most"]


def _tolerance(lens: LatentModel) -> float:
    return _TOLERANCE.get(lens.model.dtype, 0.1)


def _told(slow: dict[int, str], cells: Selected) -> list[str]:
    """How many cells took the slow path, by reason."""
    found = Counter(slow.values())
    return [f"{n} of {len(cells)} cells one forward each: {why}" for why, n in found.items()]
