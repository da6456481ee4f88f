"""The cells of a map in fixed context, many to a forward, behind one prefix: the fast path.

A cell is a row. What lies before the first edited column of a forward is not computed again, and a
row joins the forward at the block where its edit begins.
"""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import torch
from jaxtyping import Float, Int

from imaginelens.hooks import Edit, EditTouchedNothing, LatentModel, Metric, Sham
from imaginelens.hooks.entries import Chunk, EditEntry
from imaginelens.hooks.metrics import Readout, Targets
from imaginelens.hooks.positions import Positions
from imaginelens.hooks.prefix import Prefix
from imaginelens.hooks.readout import read_out
from imaginelens.hooks.textedits import edit_entry
from imaginelens.mediation.cells import Cell
from imaginelens.mediation.rows import RowPositions, has_reference, of_rows

FLAGS = {"not_emitted": 1, "identical_donor": 2}
Acting = tuple[EditEntry, list[int], bool]  # an entry, its rows, and whether it acts on what enters
# What a forward costs whatever its size: as much as this many multiply-adds, and for reading each
# block's weights as much as this many columns. Orders of magnitude will do.
_OVERHEAD = {"cpu": 1e8, "cuda": 4e11}
_READING = {"cpu": 64, "cuda": 512}


@dataclass(frozen=True)
class Task:
    """One cell in one example, and the first column that has to be read again for it."""

    cell: int
    example: int
    first: int


@dataclass(frozen=True)
class Forward:
    """Tasks that share a forward, at the columns from `stop` on; the first of them from block
    `start` on, the others from later ones."""

    start: int
    stop: int
    tasks: tuple[Task, ...]


@dataclass(frozen=True, eq=False)
class Outcome:
    """What one forward shows, for each of its tasks."""

    values: Float[np.ndarray, " task"]
    flags: Int[np.ndarray, " task"]
    change: Float[np.ndarray, " task"]


@dataclass(frozen=True, eq=False)
class Batch:
    """Some examples, read up to the first edited column, and the cells to try on them."""

    lens: LatentModel
    prefix: Prefix
    cells: Sequence[tuple[Cell, Positions]]
    edit: Edit
    metric: Metric
    targets: Targets

    @cached_property
    def before(self) -> Readout:
        """The readout without any edit."""
        rows = range(len(self.prefix.script.tokens))
        return self._readout(rows, self.prefix.logits, None)

    def plan(self, tasks: Sequence[Task], limit: int) -> list[Forward]:
        """Which tasks go together, `limit` rows at most; the same for the same tasks."""
        found = []
        for together in self._by_column(sorted(tasks, key=lambda task: task.first)):
            stop = together[0].first if self.prefix.whole is not None else self.prefix.stop
            together.sort(key=lambda task: (self._start(task)[0], task.cell, task.example))
            for i in range(0, len(together), limit):
                part = tuple(together[i : i + limit])
                found.append(Forward(self._start(part[0])[0], stop, part))
        return found

    def run(self, forward: Forward, edit: Edit | None = None) -> Outcome:
        """Run a forward of the plan; `edit` takes the place of the sweep's own."""
        edit = self.edit if edit is None else edit
        rows = [task.example for task in forward.tasks]
        entries = list(self._entries(forward, edit))
        entering = [e for e, _, enters in entries if enters]
        within = [e for e, _, enters in entries if not enters]
        columns = np.arange(forward.stop, self.prefix.end)

        def enter(stream: torch.Tensor, chunk: Chunk) -> torch.Tensor:
            for entry in entering:
                stream = entry.on(self.lens.registry[entry.sites[0]], stream, chunk, columns)
            return stream

        prefix = self.prefix.moved(forward.stop)
        starts = [self._start(task)[0] for task in forward.tasks]
        logits = prefix.read(rows, within, starts=starts, enter=enter)
        unedited = picked_readout(self.before, rows)
        return self._outcome(self._readout(rows, logits, unedited), entries)

    def sham(self, plan: Sequence[Forward]) -> Float[np.ndarray, " example"]:
        """The effect of putting every state back, on the path of the map: for each example the
        largest. It is measured on the rows that run through the fewest blocks, but through one."""
        starts = [self._start(task)[0] for task in plan[-1].tasks]
        n_blocks = len(self.lens.structure.blocks)
        last = max((start for start in starts if start < n_blocks), default=starts[0])
        rows = zip(plan[-1].tasks, starts, strict=True)
        late = Forward(last, plan[-1].stop, tuple(task for task, start in rows if start == last))
        return self._largest_of(late, Sham())

    # ---- parts ------------------------------------------------------------------------------

    def _outcome(self, read: Readout, entries: Sequence[Acting]) -> Outcome:
        values = self.metric(read).double().cpu().numpy()
        flags, change = np.zeros(len(values), dtype=int), np.full(len(values), np.nan)
        for entry, members, _ in entries:
            told, moved = landed(entry, len(values))
            flags[members], change[members] = told[members], moved[members]
        return Outcome(values, flags, change)

    def _largest_of(self, forward: Forward, edit: Edit) -> Float[np.ndarray, " example"]:
        """The largest effect that an edit has on each example, over the rows of a forward."""
        effects = np.zeros(len(self.targets.base_ids))
        before = self.metric(self.before).double().cpu().numpy()
        for task, value in zip(forward.tasks, self.run(forward, edit).values, strict=True):
            effect = value - before[task.example]
            if abs(effect) >= abs(effects[task.example]) or np.isnan(effect):
                effects[task.example] = effect
        return effects

    def _start(self, task: Task) -> tuple[int, bool]:
        return start_of(self.lens, self.cells[task.cell][0], self.prefix)

    def _by_column(self, tasks: Sequence[Task]) -> Iterator[list[Task]]:
        """Tasks that begin at neighbouring columns, as long as reading the later ones from the
        first column costs less than a forward of their own. Both are counted in columns of one
        block."""
        model, blocks = self.lens.model, self.lens.structure.blocks
        weights = sum(p.numel() for p in model.get_submodule(blocks[0].path).parameters())
        kind = model.device.type if model.device.type in _OVERHEAD else "cuda"
        spare = len(blocks) * _READING[kind] + _OVERHEAD[kind] / weights
        together: list[Task] = []
        wasted = 0
        for task in tasks:
            blocks_run = len(blocks) - self._start(task)[0]
            wasted += blocks_run * (task.first - together[0].first if together else 0)
            if wasted > spare:
                yield together
                together, wasted = [], 0
            together.append(task)
        if together:
            yield together

    def _entries(self, forward: Forward, edit: Edit) -> Iterator[tuple[EditEntry, list[int], bool]]:
        """One entry for the rows that edit the same sites, and whether it acts on what enters."""
        by_key: dict[tuple[tuple[str, ...], int | None, int | None], list[int]] = defaultdict(list)
        for row, task in enumerate(forward.tasks):
            cell, _ = self.cells[task.cell]
            own = task.cell if has_reference(edit) else None
            by_key[cell.sites, cell.head, own].append(row)
        rows = [task.example for task in forward.tasks]
        for (sites, head, _), members in by_key.items():
            chosen = {row: self.cells[forward.tasks[row].cell] for row in members}
            selectors = tuple(chosen[r][1] if r in chosen else None for r in range(len(rows)))
            cell, selector = chosen[members[0]]
            heads = None if head is None else [head]
            at = RowPositions(selectors)
            entry = edit_entry(of_rows(edit, rows, selector), at, sites, heads=heads)
            assert isinstance(entry, EditEntry)
            entry.begin()
            yield entry, members, self._start(forward.tasks[members[0]])[1]

    def _readout(
        self, rows: Sequence[int], logits: torch.Tensor, unedited: Readout | None
    ) -> Readout:
        script, targets = self.prefix.script, picked_targets(self.targets, rows)
        read = replace(script, read_at=tuple(script.read_at[row] for row in rows))
        columns = self.prefix.columns
        return read_out(read, targets, logits, columns, self.lens.decode, unedited)


def start_of(lens: LatentModel, cell: Cell, prefix: Prefix) -> tuple[int, bool]:
    """The first block that has to run for a cell, and whether its edit acts on what enters it."""
    if prefix.streams is None:
        return 0, False
    layers = [lens.registry[site].layer for site in cell.sites]
    if None in layers:
        behind = all(site.startswith(("ln_final", "unembed")) for site in cell.sites)
        return (len(lens.structure.blocks), False) if behind else (0, False)
    first = min(layer for layer in layers if layer is not None)
    if len(cell.sites) == 1 and cell.sites[0].endswith(".hook_resid_post"):
        return first + 1, True
    return first, False


def landed(
    entry: EditEntry, n_rows: int
) -> tuple[Int[np.ndarray, " row"], Float[np.ndarray, " row"]]:
    """For each row why an entry did nothing there (0: it did), and the relative change of norm."""
    try:
        entry.judge(n_rows, "")
    except EditTouchedNothing:  # in this forward; a map is judged as a whole
        pass
    flags, change = np.zeros(n_rows, dtype=int), np.full(n_rows, np.nan)
    for row, flag in entry.landing.flags.items():
        flags[row] = FLAGS[flag]
    moved: dict[int, list[float]] = defaultdict(list)
    for row, _, _, size in entry.landing.cells:
        moved[row].append(size)
    for row, sizes in moved.items():
        change[row] = float(np.mean(sizes))
    return flags, change


def picked_targets(targets: Targets, rows: Sequence[int]) -> Targets:
    """The targets of copies of some rows."""
    return Targets(
        base_answers=tuple(targets.base_answers[row] for row in rows),
        source_answers=tuple(targets.source_answers[row] for row in rows),
        base_ids=tuple(targets.base_ids[row] for row in rows),
        base_token=tuple(targets.base_token[row] for row in rows),
        source_token=tuple(targets.source_token[row] for row in rows),
        differ_at=tuple(targets.differ_at[row] for row in rows),
    )


def picked_readout(readout: Readout, rows: Sequence[int]) -> Readout:
    """The readout of copies of some rows."""
    at = list(rows)
    return Readout(
        readout.logits[at],
        readout.log_prob[at],
        tuple(readout.answers[row] for row in at),
        picked_targets(readout.targets, at),
    )
