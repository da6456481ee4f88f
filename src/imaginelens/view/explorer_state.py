"""What the widget knows and does, without a widget: one pair, a grid of cells, what was measured.

Every number is what `lens.patch` and `il.sweep` give, and `code` writes the call that gives it.
"""

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np
import torch

from imaginelens.hooks import Edit, LatentModel, Metric, Pairs, Run, Sham, Swap, Zero
from imaginelens.hooks.errors import HookNameError, InputError
from imaginelens.hooks.metrics import (
    Readout,
    Targets,
    log_prob,
    logit_diff,
    prob,
    source_answer,
    targets_of,
)
from imaginelens.hooks.patching import Context
from imaginelens.hooks.positions import (
    Positions,
    answer,
    before_answer,
    image,
    last_prompt,
    latent,
    positions,
)
from imaginelens.mediation.alignment import counts
from imaginelens.mediation.arm import Arm, do
from imaginelens.mediation.cells import Cell
from imaginelens.mediation.effect_map import FLAGS, NOT_MEASURED, EffectMap
from imaginelens.mediation.patched import donor_of
from imaginelens.mediation.selecting import cells_of, split
from imaginelens.mediation.sweep import Chunk, Direction, Sweep, sweep
from imaginelens.view import explorer_code
from imaginelens.view.explorer_grid import TABS, Grid, Setting, Tab, blocks, question_of

if TYPE_CHECKING:
    import pandas as pd

SITES = ("resid_pre", "resid_mid", "resid_post", "attn_out", "mlp_out", "z", "hook_latent")
METRICS = (logit_diff, log_prob, prob, source_answer)
_FLAG = {None: 0} | {word: number for number, word in enumerate(FLAGS)}


@dataclass(frozen=True)
class Key:
    """What a measurement depends on, but for the metric."""

    pair: int
    donor: int
    direction: Direction
    context: Context
    edit: str
    cell: Cell


@dataclass(frozen=True)
class Value:
    """One metric in one cell.

    Attributes:
        flag: 0 where states were changed; else why not, as in `EffectMap.flags`.
        change: mean relative change of norm of the touched states; nan where none was.
        how: "run", one forward of its own, or "map", in a sweep.
    """

    before: float
    other: float
    after: float
    flag: int
    change: float
    how: Literal["run", "map"]

    @property
    def effect(self) -> float:
        """after - before; 0 where no state was touched."""
        return 0.0 if self.flag in (1, 2) else self.after - self.before


@dataclass(frozen=True, eq=False)
class Measured:
    """One cell that was run on its own, with all that there is to tell.

    Attributes:
        before, other: the readouts of the two unedited runs; `arm` the edited one.
        run: the unedited run.
        values: of each metric, by name.
        seconds: what it took.
    """

    key: Key
    before: Readout
    other: Readout
    arm: Arm
    run: Run
    values: Mapping[str, Value]
    seconds: float

    @property
    def flips(self) -> bool:
        """Whether the answer is another than before."""
        return self.before.answers[0] != self.arm.after.answers[0]


@dataclass(frozen=True, eq=False)
class Sides:
    """A pair with both inputs run as they are: `run` is edited, `partner` donates."""

    run: Run
    partner: Run
    targets: Targets
    before: Readout
    other: Readout


@dataclass(repr=False)
class Explorer:
    """A session of looking at one pair, cell by cell; `il.explore` shows it as a widget.

    `run(row, column)` patches one cell of `grid`, `map()` all of them, `result` is everything
    measured so far, `code(row, column)` the call that gives a cell again. Nothing is run twice.

    Args:
        positions: what the columns of the tab "steps" are, as in `il.sweep`.
        edits: more edits to choose from, by name, such as `{"mean": il.Mean(reference)}`.

    Raises:
        InputError: an argument is not what it should be.

    >>> import imaginelens as il
    >>> lens = il.load("latent-content")
    >>> session = Explorer(lens, lens.task(n=2, seed=0))
    >>> session.grid.shape, session.grid.columns
    ((3, 2), ('latent[0]', 'latent[1]'))
    >>> session.run(1, 0).flips
    True
    """

    lens: LatentModel | None
    pairs: Pairs
    site: str = "resid_post"
    positions: Positions | Sequence[Positions] = latent
    metric: Metric = logit_diff
    direction: Direction = "denoise"
    context: Context = "free"
    edits: Mapping[str, Edit] = field(default_factory=dict)
    _sides: dict[tuple[int, int, Direction, Context], Sides] = field(default_factory=dict)
    _runs: dict[tuple[str, int], Run] = field(default_factory=dict)
    _measured: dict[Key, Measured] = field(default_factory=dict)
    _values: dict[tuple[Key, str], Value] = field(default_factory=dict)
    _shams: dict[Setting, float] = field(default_factory=dict)
    _own: list[Positions] = field(default_factory=list)
    _grids: dict[tuple[Any, ...], Grid] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not isinstance(self.pairs, Pairs):
            raise InputError(
                f"pairs is a {type(self.pairs).__name__}, expected il.Pairs; make them with "
                "il.Pairs.from_examples(examples), or lens.task() on an organism"
            )
        for name, edit in self.edits.items():
            if not isinstance(edit, Edit) or name in ("swap", "zero", "sham"):
                raise InputError(
                    f"edits has {name!r}: {edit!r}, expected other names than 'swap', 'zero' and "
                    "'sham', and edits such as il.Mean(reference)"
                )
        if not isinstance(self.metric, Metric):
            raise InputError(f"metric is {self.metric!r}, expected something like il.logit_diff")
        self.setting = Setting(
            0, 0, self.site, "steps", "latent", "swap", self.metric.name, self.direction,
            self.context,
        )  # fmt: skip
        self._check(self.setting)
        if "latent" not in self.ats and self.positions == latent:  # a model that feeds none back
            self.setting = replace(self.setting, tab="regions", at=next(iter(self.ats)))

    # ---- what there is to choose ---------------------------------------------------------------

    @property
    def open(self) -> LatentModel:
        """The model.

        Raises:
            InputError: the session is closed.
        """
        if self.lens is None:
            raise InputError("this explorer is closed; make another with il.explore(lens, pairs)")
        return self.lens

    @property
    def sites(self) -> list[str]:
        """The short names of sites to choose from."""
        return [name for name in dict.fromkeys((self.site, *SITES)) if self._names(name)]

    @property
    def metrics(self) -> dict[str, Metric]:
        """What is measured in every cell, by name; the one that was asked for is first."""
        known = None not in self.pairs.source_answers
        found = [m for m in METRICS if known or not m.needs_source]
        return {m.name: m for m in (self.metric, *found)}

    @property
    def all_edits(self) -> dict[str, Edit | None]:
        """The edits to choose from; None is the swap, which takes what the partner has."""
        return {"swap": None, "zero": Zero(), "sham": Sham(), **self.edits}

    def choose(self, **changes: Any) -> None:
        """Change what is looked at: any of `Setting`, by name.

        Another `pair` brings its own donor, unless `donor` is given too.

        Raises:
            InputError: there is no such setting or value.
        """
        known = {f.name for f in fields(Setting)}
        if unknown := set(changes) - known:
            raise InputError(
                f"there is no setting {min(unknown)!r}; choose from {', '.join(sorted(known))}"
            )
        if "pair" in changes:
            changes = {"donor": changes["pair"], **changes}
        if changes.get("tab") == "heads":
            changes = {"site": "z", **changes}
        new = replace(self.setting, **changes)
        self._check(new)
        self.setting = new

    def _check(self, new: Setting) -> None:
        n = range(len(self.pairs))
        for name, known in (
            ("pair", n), ("donor", n), ("site", self.sites), ("tab", TABS),
            ("edit", list(self.all_edits)), ("metric", list(self.metrics)),
            ("direction", get_args(Direction)), ("context", get_args(Context)),
        ):  # fmt: skip
            value = getattr(new, name)
            if value not in known or isinstance(value, bool):
                some = f"0 to {n[-1]}" if known is n else ", ".join(map(repr, known))
                raise InputError(f"{name} is {value!r}; choose from {some}")
        if new.tab == "heads" and new.at not in self.ats:
            raise InputError(f"at is {new.at!r}; choose from {', '.join(self.ats)}")
        if new.tab == "heads" and new.site != "z":
            raise InputError(f"{new.site!r} has no heads; choose the site 'z', or another tab")

    def _names(self, site: str) -> list[str]:
        try:
            return self.open.registry.match(site)
        except HookNameError:
            return []

    def add(self, at: Positions) -> str:
        """Add a column, such as `il.image[0][1:3, 0:2]` or `il.positions([4, 5])`; its name.

        Raises:
            InputError: it is no selector, or neither run has such positions.
        """
        sides = self.sides()
        (at,) = split([sides.run, sides.partner], [at])
        if repr(at) not in self.grid.at:
            self._own.append(at)
        return repr(at)

    # ---- the grid ------------------------------------------------------------------------------

    @property
    def grid(self) -> Grid:
        """The cells that the setting shows."""
        s = self.setting
        key = (s.pair, s.donor, s.direction, s.site, s.tab, s.at, s.context, len(self._own))
        if key not in self._grids:
            self._grids[key] = self._grid()
        return self._grids[key]

    def _grid(self) -> Grid:
        s, sides = self.setting, self.sides()
        runs = [sides.run, sides.partner]
        heads = s.tab == "heads"
        selectors = self._selectors(s.tab, runs)
        own = [at for at in self._own if any(counts(run, at).any() for run in runs)]
        if not heads:
            names = [repr(at) for at in selectors]
            selectors += [at for at in own if repr(at) not in names]
        found = cells_of(
            self.open, runs, sites=self._names(s.site), positions=selectors, heads=heads
        )
        layers = list(dict.fromkeys(cell.layer for cell, _ in found))
        rows = [tuple(cell for cell, _ in found if cell.layer == layer) for layer in layers]
        return Grid(
            rows=tuple(s.site if layer is None else str(layer) for layer in layers),
            columns=tuple(str(c.head) if heads else self._label(c.position) for c in rows[0]),
            row_axis="layer" if layers[0] is not None else "site",
            column_axis=f"head, at {s.at}" if heads else "position",
            cells=tuple(rows),
            at={cell.position: at for cell, at in found},
        )

    def _selectors(self, tab: Tab, runs: Sequence[Run]) -> list[Positions]:
        if tab == "steps":
            return split(runs, self.positions)
        if tab == "image":
            return blocks(runs[0])
        if tab == "heads":
            return [self.ats[self.setting.at]]
        known: list[Positions] = [image, latent, last_prompt]
        if question := question_of(runs):
            known.insert(1, positions(question))
        if self.setting.context == "fixed":
            known += [before_answer, answer]
        return [at for at in known if all(counts(run, at).any() for run in runs)]

    def _label(self, position: str) -> str:
        question = question_of([self.sides().run])
        return "question" if question and position == repr(positions(question)) else position

    @property
    def ats(self) -> dict[str, Positions]:
        """Whose heads there are to show, by name."""
        sides = self.sides()
        runs = [sides.run, sides.partner]
        known: list[Positions] = [latent, last_prompt, image, *self._own]
        if isinstance(self.positions, Positions) and any(
            counts(run, self.positions).any() for run in runs
        ):
            known += split(runs, self.positions)
        return {repr(at): at for at in known if any(counts(run, at).any() for run in runs)}

    # ---- running -------------------------------------------------------------------------------

    def sides(self) -> Sides:
        """The chosen pair with both of its inputs run as they are."""
        s = self.setting
        key = (s.pair, s.donor, s.direction, s.context)
        if key not in self._sides:
            base_row, source_row = self._rows()
            base, source = self._run("base", base_row), self._run("source", source_row)
            noise = s.direction == "noise"
            run, partner = (source, base) if noise else (base, source)
            one = self.pair()
            targets = targets_of(base, one.base_answers, one.source_answers, self.open.encode)
            free = s.context == "free"
            before = self.open.read_answer(run, targets, free=free)
            other = self.open.read_answer(partner, targets, free=free)
            self._sides[key] = Sides(
                run, partner, targets, *(replace(r, unedited=before) for r in (before, other))
            )
        return self._sides[key]

    def pair(self) -> Pairs:
        """The chosen pair, with the donor in place of its partner; the answers stay the pair's."""
        (base, source), p = self._rows(), self.setting.pair
        return Pairs(
            base=[self.pairs.base[base]],
            source=[self.pairs.source[source]],
            base_answers=[self.pairs.base_answers[p]],
            source_answers=[self.pairs.source_answers[p]],
        )

    def _rows(self) -> tuple[int, int]:
        """The number of the base and of the source."""
        s = self.setting
        return (s.pair, s.donor) if s.direction == "denoise" else (s.donor, s.pair)

    def _run(self, side: Literal["base", "source"], number: int) -> Run:
        if (side, number) not in self._runs:
            inputs = (self.pairs.base if side == "base" else self.pairs.source)[number]
            self._runs[side, number] = self.open.run([inputs])
        return self._runs[side, number]

    def key(self, cell: Cell, setting: Setting | None = None) -> Key:
        """What a cell's measurement is known under, as things are set now, or were."""
        s = setting or self.setting
        return Key(s.pair, s.donor, s.direction, s.context, s.edit, cell)

    def run(self, row: int, column: int) -> Measured:
        """Patch one cell of the grid, in a run of its own; at once, if it was before.

        Raises:
            InputError: there is no such cell, or the session is closed.
            DonorError: the donor has no state to give there.
        """
        lens, cell = self.open, self.grid.cell(row, column)
        key = self.key(cell)
        if key not in self._measured:
            started = time.perf_counter()
            sides, at = self.sides(), self.grid.at[cell.position]
            edit = self.all_edits[key.edit]
            if edit is None:
                edit = Swap(donor_of(lens, sides.partner, [(cell, at)], key.context)[0])
            arm = do(
                lens, sides.run, sides.before, edit, name=type(edit).__name__, sites=cell.sites,
                at=at, context=key.context, heads=None if cell.head is None else [cell.head],
            )  # fmt: skip
            values = self._values_of(sides, arm)
            arm = replace(arm, after=_kept(arm.after))
            for name, value in values.items():
                self._values[key, name] = value
            self._measured[key] = Measured(
                key, sides.before, sides.other, arm, sides.run, values,
                time.perf_counter() - started,
            )  # fmt: skip
        return self._measured[key]

    def _values_of(self, sides: Sides, arm: Arm) -> dict[str, Value]:
        landing = arm.landing
        flag = _FLAG[landing.flags.get(0)]
        after = replace(arm.after, unedited=sides.before)
        found = {}
        for name, metric in self.metrics.items():
            before, other, then = (_only(metric(r)) for r in (sides.before, sides.other, after))
            found[name] = Value(before, other, then, flag, landing.relative_change, "run")
        return found

    def map(self) -> EffectMap:
        """Measure every cell of the grid in one sweep, with the chosen metric.

        Raises:
            EditTouchedNothing: no cell reached the run.
        """
        grid = self.grid
        found = sweep(
            self.open, self.pair(), sites=self._sites(grid), positions=list(grid.at.values()),
            **self._how(),
        )  # fmt: skip
        self._keep(found, self.setting)
        return found

    def parts(self) -> Iterator[tuple[float, EffectMap]]:
        """Measure the grid row by row, and yield the share that is done with each row's map; the
        unedited runs are made once. Stop when you like: what was measured stays."""
        grid, setting = self.grid, self.setting  # whatever is chosen while it goes on
        study = Sweep(
            self.open, self.pair(), self._sites(grid), list(grid.at.values()),
            window=1, batch_size=1, fast=True, verify=0, seed=0,
            **({"heads": False} | self._how()),
        )  # fmt: skip
        chunk = Chunk.of(study, 0)
        for number, row in enumerate(grid.cells, 1):
            wanted = [(cell, at) for cell, at in chunk.cells if cell in row]
            found = study.measured(replace(chunk, cells=wanted))
            self._keep(found, setting)
            yield number / len(grid.cells), found

    def _sites(self, grid: Grid) -> list[str]:
        return list(dict.fromkeys(site for row in grid.cells for site in row[0].sites))

    def _how(self) -> dict[str, Any]:
        s = self.setting
        return {
            "metric": self.metrics[s.metric], "direction": s.direction, "context": s.context,
            "edit": self.all_edits[s.edit], "heads": s.tab == "heads",
        }  # fmt: skip

    def _keep(self, found: EffectMap, setting: Setting) -> None:
        if found.sham is not None:
            under = replace(setting, at="", metric=found.metric)
            self._shams[under] = max(
                self._shams.get(under, 0.0), abs(float(found.sham[0])), key=_nan_first
            )
        other = float("nan") if found.other is None else float(found.other[0])
        for row, cell in enumerate(found.cells):
            at = (self.key(cell, setting), found.metric)
            if at in self._values:  # measured on its own
                continue
            self._values[at] = Value(
                float(found.before[0]), other, float(found.outcome[row, 0]),
                int(found.flags[row, 0]), float(found.change[row, 0]), "map",
            )  # fmt: skip

    # ---- what was measured ---------------------------------------------------------------------

    def value(self, row: int, column: int, metric: str | None = None) -> Value | None:
        """One metric in one cell of the grid; None where it was not measured."""
        key = self.key(self.grid.cell(row, column))
        return self._values.get((key, metric or self.setting.metric))

    def measured(self, row: int, column: int) -> Measured | None:
        """What running a cell on its own gave; None where it was not run."""
        return self._measured.get(self.key(self.grid.cell(row, column)))

    @property
    def effect_map(self) -> EffectMap:
        """The grid as a map of one example; cells that were not measured are nan."""
        grid, s = self.grid, self.setting
        metric = self.metrics[s.metric]
        cells = [cell for row in grid.cells for cell in row]
        values = [self._values.get((self.key(cell), s.metric)) for cell in cells]
        sides = self.sides()
        before, other = (_only(metric(r)) for r in (sides.before, sides.other))
        nan = float("nan")
        found = EffectMap.from_arrays(
            cells=cells, before=[before], other=[other],
            after=[[nan if v is None else v.after] for v in values],
            metric=metric.name, unit=metric.unit, binary=metric.binary, direction=s.direction,
            context=s.context, edit=s.edit, keys=[str(s.pair)],
        )  # fmt: skip
        flags = [[NOT_MEASURED if v is None else v.flag] for v in values]
        change = np.array([[nan if v is None else v.change] for v in values])
        sham = None if self.sham is None else np.array([self.sham])
        return replace(found, flags=np.array(flags, dtype=np.int8), change=change, sham=sham)

    @property
    def sham(self) -> float | None:
        """By how much the self-swap changed the metric on the path of the maps made with this
        setting, at most; None if none was made, or all its cells were run one by one."""
        return self._shams.get(replace(self.setting, at=""))

    @property
    def result(self) -> "pd.DataFrame":
        """Everything measured so far, a row for each cell and metric, in the order it came."""
        import pandas as pd

        rows = []
        for (key, metric), value in self._values.items():
            ran = self._measured.get(key)
            rows.append(
                {
                    "pair": key.pair, "donor": key.donor, "direction": key.direction,
                    "context": key.context, "edit": key.edit, "site": key.cell.site,
                    "layer": key.cell.layer, "position": key.cell.position,
                    "head": key.cell.head, "metric": metric, "before": value.before,
                    "other": value.other, "after": value.after, "effect": value.effect,
                    "flag": FLAGS[value.flag], "change": value.change, "how": value.how,
                    "answer_before": None if ran is None else ran.before.answers[0],
                    "answer_after": None if ran is None else ran.arm.after.answers[0],
                }
            )  # fmt: skip
        columns = _COLUMNS if not rows else list(rows[0])
        frame = pd.DataFrame(rows, columns=columns)
        return frame.astype({"layer": "Int64", "head": "Int64"})

    def code(self, row: int, column: int) -> str:
        """The call that measures a cell again; `found.effect` is its effect.

        It speaks of `lens` and `pairs`, as they were given, and of `edits`, if one of them is used.
        """
        cell, s = self.grid.cell(row, column), self.setting
        at = self.grid.at[cell.position]
        return explorer_code.call(cell, at, s, self.metrics[s.metric], rows=self._rows())

    def close(self) -> None:
        """Let go of the model and of all runs; what was measured stays in `result`."""
        self.lens = None
        self._sides.clear()
        self._runs.clear()
        self._measured.clear()
        self._grids.clear()

    def __repr__(self) -> str:
        s = self.setting
        return (
            f"Explorer of pair {s.pair} of {len(self.pairs)}, {s.site}, {s.edit}, {s.direction}, "
            f"{s.context} context: {len(self._values)} values measured"
        )


_COLUMNS = [
    "pair", "donor", "direction", "context", "edit", "site", "layer", "position", "head", "metric",
    "before", "other", "after", "effect", "flag", "change", "how", "answer_before", "answer_after",
]  # fmt: skip


def _nan_first(value: float) -> float:
    return math.inf if math.isnan(value) else value


def _kept(readout: Readout) -> Readout:
    """A readout that holds no memory of an accelerator, however many cells are run."""
    return replace(readout, logits=readout.logits.cpu(), unedited=None)


def _only(values: torch.Tensor) -> float:
    return float(values.double()[0])
