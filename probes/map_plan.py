"""What a map asks of each step: which examples, in which folds, and all sets of labels."""

from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor

from imaginelens.hooks.errors import InputError
from imaginelens.probes.label_controls import control_labels
from imaginelens.probes.permuting import permuted
from imaginelens.probes.splitting import folds as split
from imaginelens.probes.states import States

_TIE = 1e-9  # predictions closer than this tie, and the first class is taken


@dataclass(frozen=True)
class Settings:
    """What `probe_map` was asked for."""

    kind: str
    n_folds: int
    seed: int
    permutations: int
    controls: bool
    device: torch.device


@dataclass(frozen=True, eq=False)
class Plan:
    """The examples of one step, their folds, and all sets of labels: true, control task, permuted.

    Attributes:
        sets: numbers of classes, or quantities, (row, set).
        classes: how many there are; 0 for quantities.
    """

    rows: Int[np.ndarray, " row"]
    folds: Int[Tensor, " row"]
    sets: Tensor
    classes: int

    @property
    def quantity(self) -> bool:
        return not self.classes

    @property
    def chance(self) -> float:
        """The share of the most frequent class; 0 for quantities."""
        if self.quantity:
            return 0.0
        return float(self.sets[:, 0].bincount().max()) / len(self.rows)

    @cached_property
    def error(self) -> Float[Tensor, "row set"]:
        """The squared error of guessing the mean of the other folds."""
        values, found = self.sets, torch.empty_like(self.sets)
        for fold in self.folds.unique():
            there = self.folds == fold
            found[there] = (values[there] - values[~there].mean(0)) ** 2
        return found

    def targets(self, columns: int) -> Float[Tensor, "row column set"]:
        """One column for each of the first classes, or the quantity."""
        if self.quantity:
            return self.sets[:, None]
        wanted = torch.arange(columns, device=self.sets.device)
        return (self.sets[:, None] == wanted[:, None]).double()

    def loss(self, predicted: Tensor, rows: Tensor, part: slice) -> Tensor:
        """1 for a wrong class, or the squared error, of ridge predictions (row, column, set)."""
        wanted = self.sets[rows][:, part]
        if self.quantity:
            return (predicted[:, 0] - wanted) ** 2
        last = 1 - predicted.sum(1, keepdim=True)  # the columns of all classes would sum to 1
        return self.wrong(torch.cat([predicted, last], 1), wanted)

    def wrong(self, scores: Tensor, wanted: Tensor) -> Tensor:
        """1 where the class wanted has not the highest of the scores (row, class, set)."""
        order = _TIE * torch.arange(self.classes, dtype=scores.dtype, device=scores.device)
        ranked = scores - order[:, None] * scores.amax(1, keepdim=True).abs().clamp(min=1.0)
        own = ranked.gather(1, wanted[:, None])[:, 0]
        return (own < ranked.amax(1)).double()

    def saved(
        self, loss: Float[Tensor, "row set"]
    ) -> tuple[Float[np.ndarray, "row set"], Float[np.ndarray, "row set"]]:
        """1 where a class was right, or the squared error that was saved; and what it could be."""
        best = self.error if self.quantity else torch.ones_like(loss)
        return (best - loss).cpu().numpy(), best.cpu().numpy()

    def only(self, keep: Shaped[np.ndarray, " row"]) -> "Plan":
        """The true labels of some of the rows."""
        there = torch.as_tensor(keep, device=self.folds.device)
        return replace(
            self, rows=self.rows[keep], folds=self.folds[there], sets=self.sets[there][:, :1]
        )


def plans(states: States, settings: Settings) -> tuple[dict[int, Plan], tuple[str, ...]]:
    """The plan of every step that can be probed, and why others cannot.

    Raises:
        InputError: none can.
    """
    found: dict[int, Plan] = {}
    alike: dict[tuple[bytes, bytes], Plan] = {}  # of steps with the same rows and labels
    notes: list[str] = []
    for step in range(states.shape[1]):
        try:
            rows = states.having(step)
            y = states.target(step, rows)
            assert y is not None
            asked = rows.tobytes(), y.tobytes()
            if asked not in alike:
                alike[asked] = _plan(states, step, rows, y, settings)
            found[step] = alike[asked]
        except InputError as error:
            refused = error
            notes.append(f"step {step}: {error}")
    if not found:
        raise refused
    if len({plan.quantity for plan in found.values()}) > 1:
        raise InputError(
            "the labels of some steps are classes and those of others quantities; use one of both"
        )
    return found, tuple(notes)


def _plan(
    states: States,
    step: int,
    rows: Int[np.ndarray, " row"],
    y: Shaped[np.ndarray, " row"],
    settings: Settings,
) -> Plan:
    if len(rows) < settings.n_folds:
        raise InputError(
            f"{len(rows)} examples have step {step} and a label, too few for {settings.n_folds} "
            "folds; collect more"
        )
    if y.dtype.kind == "f" and (y == y[0]).all():
        raise InputError(f"all {len(y)} labels are {y[0]:g}; collect examples of another value")
    groups = states.units(rows)
    fold = split(y, groups=groups, n_folds=settings.n_folds, seed=settings.seed)
    classes = 0
    if y.dtype.kind != "f":
        names, y = np.unique(y, return_inverse=True)
        classes = len(names)
    sets = [y, *permuted(y, fold, groups, n=settings.permutations, seed=settings.seed)]
    if settings.controls:
        sets.insert(1, control_labels(y, _types(states, rows, groups), seed=settings.seed))
    return Plan(
        rows,
        torch.as_tensor(fold, device=settings.device),
        torch.as_tensor(np.stack(sets, axis=1), device=settings.device),
        classes,
    )


def _types(
    states: States, rows: Int[np.ndarray, " row"], groups: Int[np.ndarray, " row"] | None
) -> Int[np.ndarray, " row"]:
    """What the control task gives labels to: contents, or else groups, or else examples."""
    if states.keys is not None:
        return np.unique([states.keys[row] for row in rows], return_inverse=True)[1]
    return rows if groups is None else groups
