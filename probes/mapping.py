"""probe_map: a probe at every step and layer, with controls and a permutation test, in one call."""

import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cached_property
from threading import Lock
from typing import Any, Literal, get_args

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor
from tqdm import tqdm

from imaginelens.hooks.errors import InputError
from imaginelens.probes.closed_form import (
    PENALTIES,
    centred,
    gram,
    nearest_mean,
    nested_ridge,
)
from imaginelens.probes.estimators import probe
from imaginelens.probes.map_plan import Plan, Settings
from imaginelens.probes.map_plan import plans as asked_of
from imaginelens.probes.map_result import ProbeMap
from imaginelens.probes.map_tests import Adjust, check_method
from imaginelens.probes.result import CONTROL_TASK, RANDOM_FEATURES, SHUFFLED
from imaginelens.probes.states import States

Kind = Literal["ridge", "mass_mean"]  # those with a closed form
FEWEST, DRAWS = 100, 2_000  # permutations of a cell, and of all cells together
MOST = 10_000  # examples: a Gram matrix of more takes over 800 MB
SMALL = 2_000  # examples, up to which cells share the cores, and matrices do not
_TOLD = 60.0  # seconds, above which the cost is told beforehand


def probe_map(
    states: States,
    *,
    kind: str = "ridge",
    n_folds: int = 5,
    seed: int = 0,
    controls: bool = True,
    permutations: int | None = None,
    adjust: Adjust = "bh",
    level: float = 0.95,
    device: str | torch.device = "cpu",
) -> ProbeMap:
    """Probe every step and layer out of fold, beside controls and permuted labels.

    Nothing is refitted by "ridge" and "mass_mean": one Gram matrix per cell gives every fold, every
    penalty, every permutation and every control exactly (see `closed_form`), and one cell of states
    is held at a time by each of torch's threads. Every other kind is fitted by `fit_probe`, cell by
    cell.

    Controls: "shuffled labels" (the mean over the permutations), "control task" (a random label for
    each different content), "random features" (of the same norms), and what came with the states:
    "random model", "raw input", "dummy". Labels are permuted within folds, whole groups at a time
    with groups of their size, so that every fold keeps its classes.

    Args:
        kind: "ridge" (on one column per class, or on a quantity; penalties are chosen without the
            fold that is tested; states are not standardised), "mass_mean" (the nearest class mean),
            or another kind of `fit_probe`.
        n_folds: three at least.
        permutations: 20 at least. All cells together resolve p-values (see `ProbeMap.p`), so that
            closed forms take 100, and more for few cells, if left out; others their own number.
        adjust: for the number of cells: "bh", "by", "holm" or "max".
        device: where to compute closed forms.

    Raises:
        InputError: there are no labels, an unknown kind, one class only, a class in one group only,
            too few examples or folds, or more than 10,000 examples.

    >>> rng = np.random.default_rng(0)
    >>> kinds = np.arange(60) % 2
    >>> x = rng.normal(size=(60, 2, 8))
    >>> x[:, 1, 0] += 4 * kinds
    >>> found = probe_map(States.of(x, kinds.tolist(), label="kind"), permutations=20)
    >>> found.decodable()[:, 0].tolist(), bool(found.accuracy[1, 0] > 0.9)
    ([False, True], True)
    """
    check_method(adjust)
    drawn = _permutations(kind, states) if permutations is None else permutations
    _check(states, n_folds, drawn)
    settings = Settings(kind, n_folds, seed, drawn, controls, torch.device(device))
    plans, notes = asked_of(states, settings)
    if kind == "mass_mean" and any(plan.quantity for plan in plans.values()):
        raise InputError("there is no map by 'mass_mean' of quantities; use kind='ridge'")
    work, kept = _Work(states, settings), _Kept.empty(states, settings)
    cells = [(step, layer) for step in plans for layer in range(len(states.sites))]
    threads, started = _threads(states, settings), time.perf_counter()
    with tqdm(total=len(cells), desc="probe_map", delay=3, leave=False) as bar:
        for (step, layer), found in _each(work, plans, cells, threads):
            kept.take(step, layer, plans[step], found)
            if not bar.n:
                _tell((time.perf_counter() - started) * len(cells) / threads)
            bar.update()
    quantity = any(plan.quantity for plan in plans.values())
    return ProbeMap(
        states.sites,
        kept.scores,
        kept.error if quantity else None,
        kept.chance,
        kept.null,
        kept.controls,
        kept.penalties if kind == "ridge" else None,
        states.units(np.arange(len(states))),
        kind=kind,
        label=states.label,
        at=states.at,
        n_folds=n_folds,
        seed=seed,
        adjust=adjust,
        level=level,
        notes=notes,
    )


# ---- all cells ---------------------------------------------------------------------------------


def _threads(states: States, settings: Settings) -> int:
    """How many cells are worked on at a time.

    Two threads that share a small matrix mostly wait for each other (and, beside other work, take
    ten times as long); two that have one each do not.
    """
    closed = settings.kind in get_args(Kind)
    alone = settings.device.type != "cpu" or not closed or len(states) > SMALL
    return 1 if alone else torch.get_num_threads()


def _each(
    work: "_Work", plans: dict[int, Plan], cells: list[tuple[int, int]], threads: int
) -> Iterator[tuple[tuple[int, int], "Found"]]:
    """Every cell with its results, in order."""
    if threads == 1:
        yield from ((cell, work.cell(cell[0], cell[1], plans[cell[0]])) for cell in cells)
        return
    # torch's number of threads belongs to the thread that sets it
    with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        found = pool.map(lambda cell: work.cell(cell[0], cell[1], plans[cell[0]]), cells)
        yield from zip(cells, found, strict=True)


# ---- one cell ----------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Found:
    """What one cell gives.

    Attributes:
        scores: of the true labels, by example; nan where it is not in the plan.
        null: the accuracy under each permutation.
        penalties: what each fold chose; None for kinds that have none.
        controls: the scores of the controls, by name.
    """

    scores: Float[np.ndarray, " example"]
    null: Float[np.ndarray, " permutation"]
    penalties: Float[np.ndarray, " fold"] | None
    controls: dict[str, Float[np.ndarray, " example"]] = field(default_factory=dict)


def out_of_fold(
    products: Float[Tensor, "row row"], plan: Plan, kind: str
) -> tuple[Float[Tensor, "row set"], Int[Tensor, "fold set"] | None]:
    """The loss of every example in every set of labels, where its fold was left out, and the
    numbers of the penalties that were chosen."""
    if kind == "mass_mean":
        scores = nearest_mean(products, plan.targets(plan.classes), plan.folds)
        return plan.wrong(scores, plan.sets), None
    found = nested_ridge(products, plan.targets(plan.classes - 1), plan.folds, plan.loss)
    return found.loss, found.chosen


@dataclass(frozen=True, eq=False)
class _Work:
    """The states of a map, and what its cells share."""

    states: States
    settings: Settings
    done: dict[tuple[str, int, int], Float[np.ndarray, " example"]] = field(default_factory=dict)
    reading: Any = field(default_factory=Lock)  # one thread at a time: files are not shared

    def cell(self, step: int, layer: int, plan: Plan) -> Found:
        if self.settings.kind not in get_args(Kind):
            return self._fitted(step, layer, plan)
        x = self._read(self.states, step, layer, plan.rows)
        loss, chosen = out_of_fold(gram(x), plan, self.settings.kind)
        saved, best = plan.saved(loss)
        first, n = 1 + self.settings.controls, len(self.states)
        others = {}
        if self.settings.controls:
            others[CONTROL_TASK] = _spread(saved[:, 1], plan.rows, n)
            others[SHUFFLED] = _spread(saved[:, first:].mean(1), plan.rows, n)
            others[RANDOM_FEATURES] = self._random(x.double().norm(dim=1), plan)
            for name, control in self.states.controls.items():
                others[name] = self._control(name, control, step, layer, plan, x)
        return Found(
            _spread(saved[:, 0], plan.rows, n),
            saved[:, first:].sum(0) / best[:, first:].sum(0),
            None if chosen is None else np.array(PENALTIES)[chosen[:, 0].cpu().numpy()],
            others,
        )

    def _fitted(self, step: int, layer: int, plan: Plan) -> Found:
        """The same by a probe that has no closed form."""
        from imaginelens.probes.fitting import fit_probe

        asked, n = self.settings, len(self.states)
        made = fit_probe(
            self.states,
            kind=asked.kind,
            step=step,
            site=layer,
            n_folds=asked.n_folds,
            seed=asked.seed,
            controls=None if asked.controls else (SHUFFLED,),
            permutations=asked.permutations,
        )
        others = {name: _spread(found, made.rows, n) for name, found in made.beside.items()}
        if asked.controls:
            others[SHUFFLED] = _spread(np.full(len(made.rows), made.shuffled.mean()), made.rows, n)
        return Found(_spread(made.score.values, made.rows, n), made.shuffled, None, others)

    def _random(self, norms: Float[Tensor, " row"], plan: Plan) -> Float[np.ndarray, " example"]:
        """The scores where each state's direction is random, and only its norm its own."""
        some = self._directions[plan.rows][:, plan.rows]
        true = plan.only(np.ones(len(plan.rows), dtype=bool))
        loss, _ = out_of_fold(centred(some * norms * norms[:, None]), true, self.settings.kind)
        return _spread(true.saved(loss)[0][:, 0], plan.rows, len(self.states))

    @cached_property
    def _directions(self) -> Float[Tensor, "example example"]:
        """The cosines of random directions, one for each example."""
        n, width = len(self.states), self.states.shape[3]
        generator = torch.Generator().manual_seed(self.settings.seed)
        drawn = torch.randn((n, width), generator=generator).to(self.settings.device)
        unit = drawn / drawn.norm(dim=1, keepdim=True)
        return (unit @ unit.T).double()

    def _control(
        self,
        name: str,
        control: States,
        step: int,
        layer: int,
        plan: Plan,
        own: Float[Tensor, "row d_model"],
    ) -> Float[np.ndarray, " example"]:
        """The scores of the same examples in other states, in the same folds; nan where the states
        are no others, as those of a dummy are before it is fed."""
        steps = control.shape[1]
        if steps > 1 and step >= steps:
            raise InputError(
                f"the control {name!r} has {steps} steps and not step {step}; give it one step, or "
                "as many as the states"
            )
        its_step = step if steps > 1 else 0
        its_layer = 0 if len(control.sites) == 1 else control.layer(self.states.sites[layer])
        cell = name, step, its_layer
        if cell not in self.done:
            some = plan.only(control.mask[plan.rows, its_step])
            scores = np.full(len(control), np.nan)
            if len(some.folds.unique()) == self.settings.n_folds:
                x = self._read(control, its_step, its_layer, some.rows)
                if not torch.equal(x, own):
                    loss, _ = out_of_fold(gram(x), some, self.settings.kind)
                    scores = _spread(some.saved(loss)[0][:, 0], some.rows, len(control))
            self.done[cell] = scores  # when it is whole: another thread may take it at once
        return self.done[cell]

    def _read(
        self, states: States, step: int, layer: int, rows: Int[np.ndarray, " row"]
    ) -> Float[Tensor, "row d_model"]:
        with self.reading:
            x = states.cells.read(step, layer, rows)
        if not np.isfinite(x).all():
            raise InputError(
                f"{int((~np.isfinite(x).all(1)).sum())} of {len(x)} states at step {step}, "
                f"{states.sites[layer]} are nan or infinite; leave them out by the mask"
            )
        return torch.as_tensor(x, device=self.settings.device)


def _spread(
    values: Float[np.ndarray, " row"], rows: Int[np.ndarray, " row"], n: int
) -> Float[np.ndarray, " example"]:
    """Values of some examples in an array for all; nan for the others."""
    found = np.full(n, np.nan)
    found[rows] = values
    return found


# ---- what is kept of all cells -----------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class _Kept:
    """The arrays of a map, filled in cell by cell."""

    scores: Float[np.ndarray, "step site example"]
    error: Float[np.ndarray, "step example"]
    chance: Float[np.ndarray, " step"]
    null: Float[np.ndarray, "step site permutation"]
    penalties: Float[np.ndarray, "step site fold"]
    controls: dict[str, Float[np.ndarray, "step site example"]]

    @staticmethod
    def empty(states: States, settings: Settings) -> "_Kept":
        n, steps, sites, _ = states.shape
        names = (
            [CONTROL_TASK, SHUFFLED, RANDOM_FEATURES, *states.controls] if settings.controls else []
        )
        return _Kept(
            np.full((steps, sites, n), np.nan),
            np.full((steps, n), np.nan),
            np.full(steps, np.nan),
            np.full((steps, sites, settings.permutations), np.nan),
            np.full((steps, sites, settings.n_folds), np.nan),
            {name: np.full((steps, sites, n), np.nan) for name in names},
        )

    def take(self, step: int, layer: int, plan: Plan, found: Found) -> None:
        """Put the results of one cell in their places."""
        self.chance[step] = plan.chance
        self.scores[step, layer] = found.scores
        self.null[step, layer] = found.null
        if plan.quantity:
            self.error[step, plan.rows] = plan.error[:, 0].cpu().numpy()
        if found.penalties is not None:
            self.penalties[step, layer] = found.penalties
        for name, scores in found.controls.items():
            self.controls[name][step, layer] = scores


# ---- before anything is run --------------------------------------------------------------------


def _permutations(kind: str, states: States) -> int:
    """How many permutations a map needs, or a kind can afford.

    Raises:
        InputError: there is no such kind of probe.
    """
    own = probe(kind).permutations
    if kind not in get_args(Kind):
        return own
    cells = states.shape[1] * len(states.sites)
    return max(FEWEST, DRAWS // max(2, cells))


def _check(states: States, n_folds: int, permutations: int) -> None:
    if states.labels is None:
        raise InputError(
            "the states have no labels, and a probe needs something to read; use "
            "states.relabelled(labels)"
        )
    if n_folds < 3:
        raise InputError(f"n_folds={n_folds} leaves no fold to choose a penalty by; use 3 or more")
    if permutations < 20:
        raise InputError(f"{permutations} permutations cannot give p < 0.05; use 200")
    if len(states) > MOST:
        raise InputError(
            f"{len(states)} examples would need Gram matrices of {8e-9 * len(states) ** 2:.1f} GB; "
            f"map {MOST} of them or fewer, or fit single cells with fit_probe"
        )


def _tell(seconds: float) -> None:
    """Say what a map costs, where it takes a while."""
    if seconds > _TOLD:
        tqdm.write(f"probe_map: about {seconds / 60:.0f} min", file=sys.stderr)
