"""Run a bank of edits on the base inputs of a study: unedited first, then batch by batch."""

import time
from collections.abc import Hashable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import MISSING, dataclass, fields, is_dataclass, replace
from typing import Any, Literal

import numpy as np
import torch
from tqdm import tqdm

from imaginelens.hooks import (
    Constant,
    Edit,
    EditTouchedNothing,
    Force,
    LatentModel,
    Pairs,
    Rewrite,
    Run,
    Sham,
    Shuffle,
)
from imaginelens.hooks.errors import InputError
from imaginelens.hooks.inputs import content_key
from imaginelens.hooks.metrics import Metric, Readout, targets_of
from imaginelens.hooks.names import NamesFilter
from imaginelens.hooks.patching import Context
from imaginelens.hooks.positions import Positions
from imaginelens.hooks.prompts import Prompt
from imaginelens.hooks.states import GivesStates, States
from imaginelens.hooks.textspans import ImaginationPositions, find_spans
from imaginelens.hooks.tokens import Kind
from imaginelens.mediation.alignment import FirstOf
from imaginelens.mediation.arm import Arm, do
from imaginelens.mediation.degeneration import ran_on, repeats, written
from imaginelens.mediation.edit_effects import EditEffect, Necessity
from imaginelens.mediation.folds import ENOUGH, Reference, Rows, Within, reach, two_folds
from imaginelens.mediation.manifold import Manifold
from imaginelens.mediation.provenance import Provenance
from imaginelens.mediation.tally import Tally

FORMULA = "Y(x, do(Z = z')) - Y(x, Z(x)), of the same examples"


@dataclass
class Batch:
    """Examples of one fold, by number, and their unedited run without its prompt."""

    fold: int
    rows: list[int]
    run: Run


@dataclass
class Replacing:
    """The arguments of a study, and what its unedited runs left behind.

    Attributes:
        labels: the group of each example.
        references: of each fold, what edits of the other fold are fitted on.
        manifolds: of each fold, what edited latents of the same fold are compared with: states
            that no edit of theirs was fitted on.
    """

    lens: LatentModel
    pairs: Pairs
    metric: Metric
    at: Positions
    site: NamesFilter
    context: Context
    latents: Force | None
    batch_size: int
    seed: int
    sites: tuple[str, ...] = ()
    labels: tuple[Hashable, ...] = ()
    references: tuple[Reference, ...] = ()
    manifolds: tuple[Manifold, ...] = ()

    def table(self, edits: Sequence[Edit], *, may_do_nothing: bool) -> Necessity:
        """Run everything; edits that do nothing are left out if they may, and refused if not."""
        started = time.perf_counter()
        self.sites = tuple(self.lens.registry.match(self.site))
        self.labels = _labels(self.pairs)
        folds = two_folds(self.labels, seed=self.seed)
        self._check_halves(edits, folds)
        tallies = [
            Tally(name, edit, len(self.pairs))
            for name, edit in zip(names_of(edits), edits, strict=True)
        ]
        chunks = _chunks(folds, self.batch_size)
        total = len(chunks) * (1 + sum(tally.draws for tally in tallies))
        with (
            _counted(self.lens.model) as calls,
            tqdm(total=total, desc="necessity", unit="batch", delay=3, leave=False) as bar,
        ):
            batches = []
            for fold, rows in chunks:
                batches.append(Batch(fold, rows, self._unedited(edits, rows)))
                bar.update()
            self._check_runs(batches)
            self._remember(batches)
            for batch in batches:
                for _ in self._edited(batch, tallies):
                    bar.update()
        effects, left_out = self._effects(tallies, batches, may_do_nothing)
        return Necessity(
            rows=tuple(effects),
            at=repr(self.at),
            site="text" if self._at_text else ", ".join(self.sites),
            context=self.context,
            reached=tuple(_by_example(batches, self._reached)),
            answers=tuple(_by_example(batches, lambda run, i: run.answers[i])),
            texts=tuple(_by_example(batches, lambda run, i: run.texts[i])),
            left_out=tuple(left_out),
            provenance=Provenance.of(
                self.lens,
                keys=_by_example(batches, lambda run, i: run.tokens.keys[i]),
                seed=self.seed,
                formula=FORMULA,
                forwards=len(calls),
                seconds=time.perf_counter() - started,
            ),
        )

    # ---- unedited runs ---------------------------------------------------------------------

    def _unedited(self, edits: Sequence[Edit], rows: Sequence[int]) -> Run:
        """Run a batch as it is. Its prompt, pictures and all, is made again when it is needed."""
        inputs = [self.pairs.base[row] for row in rows]
        modules = [site for site in self.sites if site != "hook_latent"]
        if not any(wants_reference(e) or isinstance(e, Shuffle) for e in edits):
            modules = []
        capture: list[str] | Literal[False] = False
        if modules and self.context == "free":
            capture = modules
        run = self.lens.run(
            inputs, latents=self.latents, names_filter=capture, positions=(self.at,)
        )
        if modules and self.context == "fixed":
            _, cache = self.lens.run_with_cache(run, names_filter=modules, positions=(self.at,))
            run = replace(run, cache=cache)
        return replace(run, prompt=Prompt({}))

    def _check_halves(self, edits: Sequence[Edit], folds: np.ndarray) -> None:
        wanting = [type(edit).__name__ for edit in edits if wants_reference(edit)]
        if wanting and min(np.bincount(folds, minlength=2)) < ENOUGH:
            raise InputError(
                f"{', '.join(dict.fromkeys(wanting))} take their statistics from examples of other "
                f"groups, at least {ENOUGH} of them, and {len(folds)} examples in "
                f"{len(set(self.labels))} groups do not split into two such halves; use more "
                "groups, or give these edits reference=lens.run(other_inputs)"
            )

    def _check_runs(self, batches: Sequence[Batch]) -> None:
        """Refuse what no edit can do anything with, before any is run.

        Raises:
            PositionError: the selector names places that are not known while a run is generated.
        """
        first = batches[0].run
        if self.context == "free":
            self.at.resolve(replace(first.tokens, final=False), 0)
        if all(answer is None for batch in batches for answer in batch.run.answers):
            raise InputError(
                f"no answer was found in what the {len(self.pairs)} unedited runs wrote (the first "
                f"wrote {first.texts[0][:60]!r}); pass answer=il.answers.boxed, .letter, "
                ".after('...') or a callable to il.load"
            )
        if not any(_by_example(batches, self._reached)):
            emitted = [count for batch in batches for count in batch.run.trigger.emitted]
            raise EditTouchedNothing(
                f"none of the {len(self.pairs)} unedited runs has a position {self.at!r} that an "
                f"edit could touch: they fed {min(emitted)} to {max(emitted)} latents back; look "
                "at lens.run(pairs.base).trigger for the positions there are"
            )

    def _remember(self, batches: Sequence[Batch]) -> None:
        """Keep what edits are fitted on and edited states are compared with, fold by fold."""
        folds = [[batch for batch in batches if batch.fold == fold] for fold in (0, 1)]
        self.references = tuple(Reference([batch.run for batch in fold]) for fold in folds)
        if self.sites == ("hook_latent",) and not self._at_text:
            self.manifolds = tuple(
                Manifold(
                    reference.states("hook_latent", self.at),
                    [self.labels[row] for batch in fold for row in batch.rows],
                )
                for fold, reference in zip(folds, self.references, strict=True)
                if fold
            )

    # ---- edited runs -----------------------------------------------------------------------

    def _edited(self, batch: Batch, tallies: Sequence[Tally]) -> Iterator[None]:
        """Run a batch under every edit and draw; yields after each."""
        prompt = self.lens.prompt([self.pairs.base[row] for row in batch.rows])
        run = replace(batch.run, prompt=prompt)
        before = self._read(batch, run)
        for tally in tallies:
            edit, at = self._prepared(tally.edit, batch)
            for draw in range(tally.draws):
                arm = do(
                    self.lens,
                    run,
                    before,
                    edit,
                    name=type(tally.edit).__name__,
                    sites=self.sites,
                    at=at,
                    context=self.context,
                    draw=draw,
                )
                self._count(tally, batch, run, before, arm, draw)
                yield

    def _read(self, batch: Batch, run: Run) -> Readout:
        """What the unedited run answers, read as the edited ones will be."""
        answers: list[str | None] = [self.pairs.base_answers[row] for row in batch.rows]
        others: list[str | None] = [None] * len(answers)
        if self.metric.needs_source:
            others = [self.pairs.source_answers[row] for row in batch.rows]
        targets = targets_of(run, answers, others, self.lens.encode)
        return self.lens.read_answer(run, targets, free=self.context == "free")

    def _prepared(self, edit: Edit, batch: Batch) -> tuple[Edit, Positions]:
        """An edit as it acts on a batch, and where."""
        if wants_reference(edit):
            fitted = edit.fit(self.references[1 - batch.fold])
            return (fitted if self._at_text else Within(fitted)), self.at
        if isinstance(edit, Shuffle) and edit.run is None and not self._at_text:
            counts = tuple(self._reached(batch.run, i) for i in range(len(batch.run)))
            return replace(edit, run=batch.run), FirstOf(self.at, counts)
        n = len(self.pairs)
        if edit.lines_up and edit.given is not None and is_dataclass(edit):
            own = next(f.name for f in fields(edit) if getattr(edit, f.name) is edit.given)
            return replace(edit, **{own: Rows(edit.given, tuple(batch.rows), n)}), self.at
        if isinstance(edit, Rewrite) and isinstance(edit.to, tuple):
            if len(edit.to) != n:
                raise InputError(
                    f"Rewrite has {len(edit.to)} texts and there are {n} examples; give one each"
                )
            return Rewrite(tuple(edit.to[row] for row in batch.rows)), self.at
        return edit, self.at

    def _count(
        self, tally: Tally, batch: Batch, run: Run, before: Readout, arm: Arm, draw: int
    ) -> None:
        values = self.metric(before), self.metric(arm.after)
        tally.add_values(batch.rows, draw, *values, before, arm)
        tally.add_landing(batch.rows, draw, arm)
        acted_in = run if self._at_text else arm.run
        tally.expected += sum(self._expected(acted_in, i) for i in range(len(run)))
        if self.context == "free":
            self._count_texts(tally, batch, run, arm, draw)
        if not self._at_text:
            tally.beyond += self._beyond(tally.edit, batch, arm.run)
        if self.manifolds:
            self._count_distances(tally, batch, arm)

    def _count_texts(self, tally: Tally, batch: Batch, run: Run, arm: Arm, draw: int) -> None:
        for i, row in enumerate(batch.rows):
            tally.changed[draw, row] = self._around(run, i) != self._around(arm.run, i)
            tally.cut[draw, row] = self._ran_on(arm.run, i)
            tally.repeating[draw, row] = self._repeats(arm.run, i)

    def _count_distances(self, tally: Tally, batch: Batch, arm: Arm) -> None:
        """How far from real ones the new latents are."""
        at = [self._columns(arm.run, i).tolist() for i in range(len(arm.run))]
        for rows, columns, new in arm.landing.new:
            cells = list(zip(rows.tolist(), columns.tolist(), strict=True))
            ordinals = np.array([at[i].index(column) for i, column in cells])
            own = [self.labels[batch.rows[i]] for i, _ in cells]
            tally.distances.append(self.manifolds[batch.fold].distances(new, ordinals, own))

    def _beyond(self, edit: Edit, batch: Batch, run: Run) -> int:
        """How many cells stand at steps that too few examples of their reference reached."""
        if not wants_reference(edit) or isinstance(edit, Constant):  # that one has no steps
            return 0
        found = 0
        for site in self.sites:
            last = reach(self.references[1 - batch.fold].states(site, self.at))
            found += sum(max(0, self._reached(run, i) - last - 1) for i in range(len(run)))
        return found

    # ---- what a run has --------------------------------------------------------------------

    @property
    def _at_text(self) -> bool:
        """Whether written imagination is edited, not states."""
        return isinstance(self.at, ImaginationPositions) and self.sites == ("hook_latent",)

    def _columns(self, run: Run, row: int) -> np.ndarray:
        """Where an edit of states acts in a row."""
        columns = self.at.resolve(run.tokens, row)
        if self.sites != ("hook_latent",):
            return columns
        return columns[run.tokens.kind[row, columns] == Kind.LATENT]

    def _reached(self, run: Run, row: int) -> int:
        """How many positions, or spans, an edit finds in a row."""
        if not self._at_text:
            return len(self._columns(run, row))
        assert isinstance(self.at, ImaginationPositions)
        spans = find_spans(run.tokens, row, self.at.open, self.at.close)
        return sum(self.at.holds(number, len(spans)) for number in range(len(spans)))

    def _expected(self, run: Run, row: int) -> int:
        """How many cells an edit must touch in a row, over all sites."""
        found = self._reached(run, row)
        if "hook_latent" not in self.sites:
            return found * len(self.sites)
        columns = self._columns(run, row)
        fed = found if self._at_text else int((run.tokens.kind[row, columns] == Kind.LATENT).sum())
        return found * (len(self.sites) - 1) + fed

    def _around(self, run: Run, row: int) -> list[int]:
        """What a row wrote; where written imagination is edited, what it wrote around that."""
        if not self._at_text:
            return written(run, row)
        assert isinstance(self.at, ImaginationPositions)
        ids, last = run.tokens.ids[row], run.tokens.prompt_width
        kept = []
        for span in find_spans(run.tokens, row, self.at.open, self.at.close):
            kept += ids[last : span.opened].tolist()
            last = span.end
        end = int(np.flatnonzero(run.tokens.kind[row] != Kind.PAD)[-1]) + 1
        return [*kept, *ids[last:end].tolist()]

    def _ran_on(self, run: Run, row: int) -> bool:
        config = self.lens.model.generation_config
        ends = config.eos_token_id
        ends = [] if ends is None else [ends] if isinstance(ends, int) else list(ends)
        limit = run.options[0] or config.max_new_tokens or 256
        return ran_on(run, row, limit=limit, ends=ends)

    def _repeats(self, run: Run, row: int) -> bool:
        return repeats(written(run, row), ran_on=self._ran_on(run, row))

    # ---- rows of the table -----------------------------------------------------------------

    def _effects(
        self, tallies: Sequence[Tally], batches: Sequence[Batch], may_do_nothing: bool
    ) -> tuple[list[EditEffect], list[str]]:
        unedited: dict[str, float] = {}
        if self.context == "free":
            unedited["repeating_before"] = _mean(_by_example(batches, self._repeats))
            unedited["ran_on_before"] = _mean(_by_example(batches, self._ran_on))
        keys = _by_example(batches, lambda run, i: run.tokens.keys[i])
        rows, left_out = [], []
        for tally in tallies:
            why = tally.why_nothing(f"at {self.at!r} of {', '.join(self.sites[:3])}")
            if why and not may_do_nothing:
                raise EditTouchedNothing(why)
            if why:
                left_out.append(f"not in the table: {why}")
            else:
                rows.append(self._effect(tally, keys, unedited))
        return rows, left_out

    def _effect(self, tally: Tally, keys: Sequence[str], unedited: dict[str, float]) -> EditEffect:
        sham = isinstance(tally.edit, Sham)
        if sham:
            tally.check_sham()
        reference = getattr(tally.edit, "reference", None)
        held = set(reference.tokens.keys) if isinstance(reference, Run) else set()
        unchanged = (tally.not_emitted | tally.identical).all(0)
        not_emitted = tally.not_emitted.all(0)
        return EditEffect(
            name=tally.name,
            metric=self.metric,
            before=tally.before,
            after=tally.after.mean(0),
            groups=None if self.pairs.groups is None else tuple(self.pairs.groups),
            answers=tuple(tally.answers),
            texts=tuple(tally.texts),
            draws=tally.draws,
            fired=tally.fired,
            cells=len(tally.changes),
            expected=tally.expected,
            not_emitted=int(not_emitted.sum()),
            identical=int((unchanged & ~not_emitted).sum()),
            beyond=tally.beyond,
            held=sum(key in held for key in keys),
            relative_change=_mean(tally.changes),
            norm_ratio=_mean([new / old for old, new in tally.norms if old > 0]),
            off_manifold=_median(tally.distances),
            text_changed=_mean(tally.changed),
            flips=_mean(tally.flips),
            repeating=_mean(tally.repeating),
            ran_on=_mean(tally.cut),
            parse_coverage=_mean(tally.found),
            parse_coverage_before=_mean(tally.found_before),
            control=sham,
            **unedited,
        )


def wants_reference(edit: Edit) -> bool:
    """Whether an edit takes statistics that nobody has given it.

    >>> from imaginelens.hooks import Mean, Zero
    >>> wants_reference(Mean()), wants_reference(Constant(torch.zeros(3))), wants_reference(Zero())
    (True, False, False)
    """
    given = edit.given is not None or getattr(edit, "value", None) is not None
    return type(edit).fit is not Edit.fit and not given


def names_of(edits: Sequence[Edit]) -> list[str]:
    """What each edit is called: as it was written, without tensors and runs; numbered if again.

    >>> from imaginelens.hooks import AddNoise, Noise
    >>> names_of([AddNoise(0.3), Noise(draws=2), Constant(torch.zeros(3)), Constant()])
    ['AddNoise(0.3)', 'Noise(draws=2)', 'Constant()', 'Constant() #2']
    """
    names: list[str] = []
    for name in map(_as_written, edits):
        again = sum(other.split(" #")[0] == name for other in names)
        names.append(f"{name} #{again + 1}" if again else name)
    return names


def _as_written(edit: Edit) -> str:
    parts = []
    for f in fields(edit) if is_dataclass(edit) else ():
        value = getattr(edit, f.name)
        if value is None or isinstance(value, torch.Tensor | States | GivesStates):
            continue
        if f.default is MISSING:
            parts.append(_shown(value))
        elif value != f.default:
            parts.append(f"{f.name}={_shown(value)}")
    return f"{type(edit).__name__}({', '.join(parts)})"


def _shown(value: Any) -> str:
    text = getattr(value, "__name__", None) or repr(value)
    return text if len(text) <= 24 else f"{text[:21]}..."


def _labels(pairs: Pairs) -> tuple[Hashable, ...]:
    """The group of each example; without groups, those of equal content are one."""
    if pairs.groups is not None:
        return tuple(pairs.groups)
    return tuple(content_key(example) for example in pairs.base)


def _chunks(folds: np.ndarray, size: int) -> list[tuple[int, list[int]]]:
    """The numbers of the examples in batches, each of one fold."""
    found = []
    for fold in (0, 1):
        rows = np.flatnonzero(folds == fold).tolist()
        found += [(fold, rows[i : i + size]) for i in range(0, len(rows), size)]
    return found


def _by_example(batches: Sequence[Batch], of: Any) -> list[Any]:
    """`of(run, row)` of every example's unedited run, in the order of the examples."""
    found = [(row, of(batch.run, i)) for batch in batches for i, row in enumerate(batch.rows)]
    return [value for _, value in sorted(found, key=lambda pair: pair[0])]


@contextmanager
def _counted(model: torch.nn.Module) -> Iterator[list[None]]:
    """Count how often a model is called."""
    calls: list[None] = []
    handle = model.register_forward_pre_hook(lambda *_: calls.append(None))
    try:
        yield calls
    finally:
        handle.remove()


def _mean(values: Any) -> float:
    """The mean of what was measured; nan if nothing was."""
    array = np.asarray(values, dtype=float)
    there = array[~np.isnan(array)]
    return float(there.mean()) if len(there) else float("nan")


def _median(parts: Sequence[np.ndarray]) -> float:
    values = np.concatenate([np.zeros(0), *parts])
    values = values[~np.isnan(values)]
    return float(np.median(values)) if len(values) else float("nan")
