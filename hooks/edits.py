"""Edits: frozen values that turn the states at some cells into other states.

A cell is one row at one position. `apply(act, ctx)` gets the states of the touched cells,
(cell, ...), and returns new ones; it never writes in place. Statistics come from an explicit
`reference`, never from the row that is edited.
"""

import hashlib
import numbers
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np
import torch
from jaxtyping import Shaped

from imaginelens.hooks.errors import DonorError, InputError
from imaginelens.hooks.positions import Positions
from imaginelens.hooks.states import Donor, States
from imaginelens.hooks.tokens import TokenMap

Act = Shaped[torch.Tensor, "cell ..."]


@dataclass(frozen=True)
class EditContext:
    """Which cells an edit is looking at, and what it may draw on.

    Attributes:
        rows, positions: row and column of each cell.
        ordinals: the number of the cell within its row's selection.
        steps: latent step of each cell; -1 where the position is not latent.
        given: the edit's donor or reference at this site, or None.
        first: the current run's state at ordinal 0 of each cell's row.
        draw: number of the repetition, for random edits.
        keys: what identifies each cell's example, whatever batch it is in; its row if left out.
        read: the current run's states of the same cells at the site that the edit `reads`.
    """

    site: str
    rows: np.ndarray
    positions: np.ndarray
    ordinals: np.ndarray
    steps: np.ndarray
    given: States | None = None
    first: torch.Tensor | None = None
    draw: int = 0
    keys: tuple[str, ...] = ()
    read: torch.Tensor | None = None

    def key(self, cell: int) -> str:
        """What identifies the example of a cell."""
        return self.keys[cell] if self.keys else str(self.rows[cell])

    def generator(self, seed: int, *key: Any) -> torch.Generator:
        """A private random stream for this draw and key: not shared, not order-dependent."""
        text = "/".join(map(str, (seed, self.draw, *key)))
        digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
        return torch.Generator().manual_seed(int.from_bytes(digest, "big") >> 1)

    def normal(self, seed: int, like: torch.Tensor) -> torch.Tensor:
        """Standard normal noise, one stream per example, site and ordinal, so that batching does
        not change it."""
        drawn = [
            torch.randn(
                like.shape[1:],
                generator=self.generator(seed, self.site, self.key(cell), ordinal),
                dtype=torch.float64,
            )
            for cell, ordinal in enumerate(self.ordinals)
        ]
        return torch.stack(drawn).to(like)

    def per_cell(self, like: torch.Tensor, fn: Callable[[int], torch.Tensor]) -> torch.Tensor:
        """Stack `fn(ordinal)` over the cells, in the dtype and on the device of `like`."""
        values = {int(k): fn(int(k)) for k in np.unique(self.ordinals)}
        return torch.stack([values[int(k)] for k in self.ordinals]).to(like)


@dataclass(frozen=True)
class Edit:
    """The parent of all edits. `given` is the donor or reference whose states `apply` needs."""

    lines_up: ClassVar[bool] = False  # whether row i of `given` goes into row i of the run
    asks_for: ClassVar[str] = "reference=lens.run(other_inputs)"

    def sites_among(self, names: Collection[str], chosen: tuple[str, ...]) -> tuple[str, ...]:
        """The sites at which it acts, of a model's sites, where some were chosen."""
        return chosen

    @property
    def given(self) -> Donor | None:
        """The donor or reference, if this edit has one."""
        return None

    @property
    def reads(self) -> str | None:
        """Another site, which it reads in the same forward and leaves as it is."""
        return None

    def fit(self, reference: Donor) -> "Edit":
        """The same edit with its statistics taken from `reference`, if it was made without any."""
        return self

    def apply(self, act: Act, ctx: EditContext) -> Act:
        """Return the new states of the touched cells."""
        raise NotImplementedError(f"{type(self).__name__} does not say what it does")

    def _states(self, ctx: EditContext) -> States:
        if ctx.given is None:
            raise DonorError(
                f"{type(self).__name__} needs a reference to take its statistics from: "
                f"il.{type(self).__name__}(..., {self.asks_for})"
            )
        return ctx.given


class EdgeEdit(Edit):
    """An edit that cuts edges of attention; it acts on scores, not on states."""

    def edges(
        self, at: Positions, tokens: TokenMap, queries: np.ndarray, keys: np.ndarray
    ) -> np.ndarray:
        """Which edges to cut between these columns: (example, query, key)."""
        raise NotImplementedError(f"{type(self).__name__} does not say what it cuts")

    def heads_among(self, n: int) -> torch.Tensor:
        """Which of a layer's `n` query heads are cut, as a mask."""
        raise NotImplementedError(f"{type(self).__name__} does not say which heads it cuts")


@dataclass(frozen=True)
class _Fitted(Edit):
    """An edit with statistics: fitted when it has a reference."""

    @property
    def given(self) -> Donor | None:
        return self.reference  # type: ignore[attr-defined]

    def fit(self, reference: Donor) -> "Edit":
        return self if self.given is not None else replace(self, **{"reference": reference})


@dataclass(frozen=True)
class _Donated(Edit):
    """An edit that lines its donor's rows up with the rows of the run it goes into."""

    lines_up: ClassVar[bool] = True

    @property
    def given(self) -> Donor | None:
        return self.donor  # type: ignore[attr-defined]

    def lined_up(self, act: Act, ctx: EditContext) -> Act:
        states = self._states(ctx)
        rows = np.zeros_like(ctx.rows) if len(states) == 1 else ctx.rows
        return states.values[rows, ctx.ordinals].to(act)


@dataclass(frozen=True)
class Sham(Edit):
    """Put every state back as it was, on the same path: the control that must change nothing."""

    def apply(self, act: Act, ctx: EditContext) -> Act:
        return act.clone()


@dataclass(frozen=True)
class Zero(Edit):
    """Set the states to zero."""

    def apply(self, act: Act, ctx: EditContext) -> Act:
        return torch.zeros_like(act)


@dataclass(frozen=True)
class Mean(_Fitted):
    """Set each state to the mean of the reference's states of the same ordinal."""

    reference: Donor | None = None

    def apply(self, act: Act, ctx: EditContext) -> Act:
        states = self._states(ctx)
        return ctx.per_cell(act, lambda k: states.pooled(k).double().mean(0))


@dataclass(frozen=True)
class Constant(_Fitted):
    """Set all states, of every row and step, to one tensor: `value`, or the reference's grand mean.

    This is the paper's "same tensor" replacement (arXiv 2602.22766, do(Z)).
    """

    value: torch.Tensor | None = None
    reference: Donor | None = None

    def apply(self, act: Act, ctx: EditContext) -> Act:
        if self.value is not None:
            return _fits(self.value, act).expand_as(act).clone()
        states = self._states(ctx)
        return states.values[states.mask].double().mean(0).to(act).expand_as(act).clone()


@dataclass(frozen=True)
class Replace(Edit):
    """Set the states to `value`: one state for all, or (ordinal, ...), one for each selected
    position in order."""

    value: torch.Tensor

    def apply(self, act: Act, ctx: EditContext) -> Act:
        value = _fits(self.value, act)
        if value.dim() < act.dim():
            return value.expand_as(act).clone()
        last = int(ctx.ordinals.max())
        if len(value) <= last:
            raise DonorError(
                f"Replace has {len(value)} states and the run has reached its number {last + 1}; "
                "give one state for all positions, or one for each selected position"
            )
        return value[ctx.ordinals].expand_as(act).clone()


@dataclass(frozen=True)
class Swap(_Donated):
    """Set the states to the donor run's states of the same selector, row by row and in order.

    The donor's positions are found in the donor, so that images of other sizes do not matter.
    """

    donor: Donor

    def apply(self, act: Act, ctx: EditContext) -> Act:
        return self.lined_up(act, ctx)


@dataclass(frozen=True)
class Slerp(_Donated):
    """Turn each state towards the donor's by `weight` (0 to 1) of the angle between them; the norm
    is interpolated, too."""

    donor: Donor
    weight: float = 0.5

    def apply(self, act: Act, ctx: EditContext) -> Act:
        start, other = act.double(), self.lined_up(act, ctx).double()
        w, a, b = self.weight, start.norm(dim=-1, keepdim=True), other.norm(dim=-1, keepdim=True)
        u, v = start / a.clamp_min(1e-300), other / b.clamp_min(1e-300)
        angle = 2 * torch.atan2(
            (u - v).norm(dim=-1, keepdim=True), (u + v).norm(dim=-1, keepdim=True)
        )
        # the part of v that is orthogonal to u; opposite states turn in any plane
        side = v - (u * v).sum(-1, keepdim=True) * u
        side = torch.where(side.norm(dim=-1, keepdim=True) < 1e-7, _orthogonal(u), side)
        side = side / side.norm(dim=-1, keepdim=True).clamp_min(1e-300)
        turned = torch.cos(w * angle) * u + torch.sin(w * angle) * side
        turned = torch.where(a == 0, v, turned)  # a zero state has no direction of its own
        turned = torch.where(b == 0, u, turned)
        return (turned * ((1 - w) * a + w * b)).to(act)


@dataclass(frozen=True)
class Resample(_Fitted):
    """Set an example's states to those of another example of the reference, drawn at random; the
    same one for all positions and sites."""

    reference: Donor | None = None
    seed: int = 0
    draws: int = 1

    def apply(self, act: Act, ctx: EditContext) -> Act:
        states = self._states(ctx)
        return torch.stack(
            [self._other(states, ctx, cell, int(k)) for cell, k in enumerate(ctx.ordinals)]
        ).to(act)

    def _other(self, states: States, ctx: EditContext, cell: int, ordinal: int) -> torch.Tensor:
        """Another example's state: the first, from a random start on, that has this ordinal."""
        own = None if states.keys is None else ctx.key(cell)
        others = [i for i in range(len(states)) if states.keys is None or states.keys[i] != own]
        if states.keys is None:  # a tensor's rows are known by their number alone
            others = [i for i in others if i != ctx.rows[cell]]
        counts = states.counts()
        reached = [i for i in others if ordinal < counts[i]]
        if not reached:
            raise DonorError(
                f"Resample finds no other example with a state number {ordinal} among the "
                f"{len(states)} of its reference; use a reference on more, and other, inputs"
            )
        draw = ctx.generator(self.seed, ctx.key(cell))
        start = others[int(torch.randint(len(others), (), generator=draw))]
        picked = next((i for i in reached if i >= start), reached[0])
        return states.values[picked, ordinal]


@dataclass(frozen=True)
class AddNoise(_Fitted):
    """Add normal noise of `scale` standard deviations, per dimension, of the reference's states."""

    scale: float
    reference: Donor | None = None
    seed: int = 0
    draws: int = 1

    def apply(self, act: Act, ctx: EditContext) -> Act:
        states = self._states(ctx)
        std = ctx.per_cell(act, lambda k: _spread(states.pooled(k)))
        return act + self.scale * std * ctx.normal(self.seed, act)


@dataclass(frozen=True)
class Noise(_Fitted):
    """Set the states to draws from N(mean, diagonal covariance) of the reference's states."""

    reference: Donor | None = None
    seed: int = 0
    draws: int = 1

    def apply(self, act: Act, ctx: EditContext) -> Act:
        states = self._states(ctx)
        mean = ctx.per_cell(act, lambda k: states.pooled(k).double().mean(0))
        std = ctx.per_cell(act, lambda k: _spread(states.pooled(k)))
        return mean + std * ctx.normal(self.seed, act)


@dataclass(frozen=True)
class Steer(Edit):
    """Add `scale` times a direction."""

    direction: torch.Tensor
    scale: float = 1.0

    def apply(self, act: Act, ctx: EditContext) -> Act:
        return act + self.scale * _fits(self.direction, act)


@dataclass(frozen=True)
class Project(_Fitted):
    """Remove what the states hold in the span of `directions`, (direction, d_model) or (d_model,);
    with a reference, relative to its mean, and with `keep=True` the rest is removed instead."""

    directions: torch.Tensor
    keep: bool = False
    reference: Donor | None = None

    def apply(self, act: Act, ctx: EditContext) -> Act:
        rows = torch.atleast_2d(_fits(self.directions, act)).double()
        u, scale, _ = torch.linalg.svd(rows.T, full_matrices=False)
        # dependent directions span less than their number
        basis = u[:, scale > scale[0] * 1e-12 * max(rows.shape)]
        mean = torch.zeros_like(act, dtype=torch.float64)
        if ctx.given is not None:
            states = ctx.given
            mean = ctx.per_cell(mean, lambda k: states.pooled(k).double().mean(0))
        inside = ((act.double() - mean) @ basis) @ basis.T
        return (mean + inside if self.keep else act.double() - inside).to(act)


@dataclass(frozen=True)
class Shuffle(Edit):
    """Permute the steps of the unedited run's states, each example in an order of its own."""

    lines_up: ClassVar[bool] = True
    asks_for: ClassVar[str] = "run=lens.run(the_same_inputs)"

    run: Donor | None = None
    seed: int = 0

    @property
    def given(self) -> Donor | None:
        return self.run

    def apply(self, act: Act, ctx: EditContext) -> Act:
        states = self._states(ctx)
        counts, new = states.counts(), []
        for cell, (row, ordinal) in enumerate(zip(ctx.rows, ctx.ordinals, strict=True)):
            source = 0 if len(states) == 1 else int(row)
            if source >= len(states) or ordinal >= counts[source]:
                raise DonorError(
                    f"Shuffle has a run of {len(states)} rows with {min(counts)} to {max(counts)} "
                    f"states, and row {row} has reached its number {int(ordinal) + 1}; give it the "
                    "unedited run of the same inputs"
                )
            order = self.order(counts[source], ctx, cell)
            new.append(states.values[source, order[int(ordinal)]])
        return torch.stack(new).to(act)

    def order(self, n: int, ctx: EditContext, cell: int) -> list[int]:
        """A random order in which no step stays where it was (a cycle), if there are two."""
        draw = ctx.generator(self.seed, ctx.key(cell))
        cycle = torch.randperm(n, generator=draw).tolist()
        following = dict(zip(cycle, cycle[1:] + cycle[:1], strict=True))
        return [following[i] for i in range(n)]


@dataclass(frozen=True)
class FirstRepeat(Edit):
    """Set every state to the current run's state at the first selected position."""

    def apply(self, act: Act, ctx: EditContext) -> Act:
        return act.clone() if ctx.first is None else ctx.first.to(act).clone()


def whole_numbers(name: str, given: Any) -> tuple[int, ...] | None:
    """Numbers of layers or heads, sorted, each once; None stays None, and means all.

    Raises:
        InputError: it is no list of whole numbers from 0, or an empty one.
    """
    if given is None:
        return None
    listed = isinstance(given, Sequence | np.ndarray) and not isinstance(given, str)
    if not listed or not len(given):
        raise InputError(f"{name} is {given!r}, expected numbers such as [0, 2], or None for all")
    for number in given:
        if isinstance(number, bool) or not isinstance(number, numbers.Integral) or number < 0:
            raise InputError(f"{name} holds {number!r}; give whole numbers, counted from 0")
    return tuple(sorted({int(number) for number in given}))


def _orthogonal(u: torch.Tensor) -> torch.Tensor:
    """A direction orthogonal to each unit row of `u`: its weakest axis, made orthogonal."""
    axis = torch.nn.functional.one_hot(u.abs().argmin(-1), u.shape[-1]).to(u)
    return axis - (axis * u).sum(-1, keepdim=True) * u


def _spread(values: torch.Tensor) -> torch.Tensor:
    if len(values) < 2:
        raise DonorError(
            f"the reference has {len(values)} example, and a standard deviation needs at least 2; "
            "run the reference on more inputs"
        )
    return values.double().std(0)


def _fits(value: torch.Tensor, act: torch.Tensor) -> torch.Tensor:
    """Refuse a tensor of another width, dtype or device: nothing is cast behind the user's back."""
    if value.shape[-1] != act.shape[-1]:
        raise DonorError(
            f"a value of width {value.shape[-1]} (shape {tuple(value.shape)}) cannot go into "
            f"states of width {act.shape[-1]}; take it from the same site of the same model"
        )
    if value.dtype != act.dtype or value.device != act.device:
        raise DonorError(
            f"a value in {value.dtype} on {value.device} cannot go into states in {act.dtype} on "
            f"{act.device}; convert it with value.to(device, dtype) first"
        )
    return value
