"""Edits: frozen values that turn the states at some cells into other states.

A cell is one row at one position. `apply(act, ctx)` gets the states of the touched cells,
(cell, ...), and returns new ones; it never writes in place. Statistics come from an explicit
`reference`, never from the row that is edited.
"""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from jaxtyping import Shaped

from imaginelens.hooks.errors import DonorError
from imaginelens.hooks.states import Donor, States

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
    """

    site: str
    rows: np.ndarray
    positions: np.ndarray
    ordinals: np.ndarray
    steps: np.ndarray
    given: States | None = None
    first: torch.Tensor | None = None
    draw: int = 0

    def generator(self, seed: int, *key: Any) -> torch.Generator:
        """A private random stream for this site, draw and key: not shared, not order-dependent."""
        text = "/".join(map(str, (seed, self.draw, self.site, *key)))
        digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
        return torch.Generator().manual_seed(int.from_bytes(digest, "big") >> 1)

    def normal(self, seed: int, like: torch.Tensor) -> torch.Tensor:
        """Standard normal noise, one stream per cell, so that batching does not change it."""
        drawn = [
            torch.randn(like.shape[1:], generator=self.generator(seed, r, k), dtype=torch.float64)
            for r, k in zip(self.rows, self.ordinals, strict=True)
        ]
        return torch.stack(drawn).to(like)

    def per_cell(self, like: torch.Tensor, fn: Callable[[int], torch.Tensor]) -> torch.Tensor:
        """Stack `fn(ordinal)` over the cells, in the dtype and on the device of `like`."""
        values = {int(k): fn(int(k)) for k in np.unique(self.ordinals)}
        return torch.stack([values[int(k)] for k in self.ordinals]).to(like)


@dataclass(frozen=True)
class Edit:
    """The parent of all edits. `given` is the donor or reference whose states `apply` needs."""

    @property
    def given(self) -> Donor | None:
        """The donor or reference, if this edit has one."""
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
                f"il.{type(self).__name__}(..., reference=lens.run(other_inputs))"
            )
        return ctx.given


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
            return _fits(self.value, act).to(act).expand_as(act).clone()
        states = self._states(ctx)
        return states.values[states.mask].double().mean(0).to(act).expand_as(act).clone()


@dataclass(frozen=True)
class Replace(Edit):
    """Set the states to `value`, of the shape of one state or of all touched cells."""

    value: torch.Tensor

    def apply(self, act: Act, ctx: EditContext) -> Act:
        return _fits(self.value, act).to(act).expand_as(act).clone()


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
        other, w = self.lined_up(act, ctx), self.weight
        a, b = act.norm(dim=-1, keepdim=True), other.norm(dim=-1, keepdim=True)
        u, v = act / a.clamp_min(1e-12), other / b.clamp_min(1e-12)
        angle = torch.arccos((u * v).sum(-1, keepdim=True).clamp(-1, 1))
        turned = (torch.sin((1 - w) * angle) * u + torch.sin(w * angle) * v) / torch.sin(angle)
        straight = (1 - w) * u + w * v  # parallel states have no plane to turn in
        return torch.where(angle.abs() < 1e-6, straight, turned) * ((1 - w) * a + w * b)


@dataclass(frozen=True)
class Resample(_Fitted):
    """Set a row's states to those of another example of the reference, drawn at random."""

    reference: Donor | None = None
    seed: int = 0
    draws: int = 1

    def apply(self, act: Act, ctx: EditContext) -> Act:
        states = self._states(ctx)
        new = [
            self._other(states, ctx, int(r), int(k))
            for r, k in zip(ctx.rows, ctx.ordinals, strict=True)
        ]
        return torch.stack(new).to(act)

    def _other(self, states: States, ctx: EditContext, row: int, ordinal: int) -> torch.Tensor:
        others = [i for i in range(len(states)) if i != row] or [0]
        pick = torch.randint(len(others), (), generator=ctx.generator(self.seed, row))
        start = int(pick)
        for i in others[start:] + others[:start]:  # the first one that went as far as this ordinal
            if ordinal < states.mask.shape[1] and states.mask[i, ordinal]:
                return states.values[i, ordinal]
        return states.pooled(ordinal)[0]


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
        return act + self.scale * _fits(self.direction, act).to(act)


@dataclass(frozen=True)
class Project(Edit):
    """Remove what the states hold in the span of `directions`, (direction, d_model) or (d_model,);
    with a reference, relative to its mean, and with `keep=True` the rest is removed instead."""

    directions: torch.Tensor
    keep: bool = False
    reference: Donor | None = None

    @property
    def given(self) -> Donor | None:
        return self.reference

    def apply(self, act: Act, ctx: EditContext) -> Act:
        rows = torch.atleast_2d(_fits(self.directions, act)).double()
        basis = torch.linalg.qr(rows.T).Q.to(act)
        mean = torch.zeros_like(act)
        if ctx.given is not None:
            states = ctx.given
            mean = ctx.per_cell(act, lambda k: states.pooled(k).double().mean(0))
        inside = ((act - mean) @ basis) @ basis.T
        return mean + inside if self.keep else act - inside


@dataclass(frozen=True)
class Shuffle(Edit):
    """Permute the steps of the unedited run's states, each row in an order of its own."""

    run: Donor | None = None
    seed: int = 0

    @property
    def given(self) -> Donor | None:
        return self.run

    def apply(self, act: Act, ctx: EditContext) -> Act:
        states = self._states(ctx)
        new = []
        for row, ordinal in zip(ctx.rows, ctx.ordinals, strict=True):
            source = 0 if len(states) == 1 else int(row)
            order = self._order(int(states.mask[source].sum()), ctx, int(row))
            new.append(states.values[source, order[int(ordinal)]])
        return torch.stack(new).to(act)

    def _order(self, n: int, ctx: EditContext, row: int) -> list[int]:
        """A random order in which no step stays where it was (a cycle), if there are two."""
        cycle = torch.randperm(n, generator=ctx.generator(self.seed, row)).tolist()
        following = dict(zip(cycle, cycle[1:] + cycle[:1], strict=True))
        return [following[i] for i in range(n)]


@dataclass(frozen=True)
class FirstRepeat(Edit):
    """Set every state to the current run's state at the first selected position."""

    def apply(self, act: Act, ctx: EditContext) -> Act:
        return act.clone() if ctx.first is None else ctx.first.to(act).clone()


def _spread(values: torch.Tensor) -> torch.Tensor:
    if len(values) < 2:
        raise DonorError(
            f"the reference has {len(values)} example, and a standard deviation needs at least 2; "
            "run the reference on more inputs"
        )
    return values.double().std(0)


def _fits(value: torch.Tensor, act: torch.Tensor) -> torch.Tensor:
    """Refuse a tensor of another width before torch does so less clearly."""
    if value.shape[-1] != act.shape[-1]:
        raise DonorError(
            f"a value of width {value.shape[-1]} (shape {tuple(value.shape)}) cannot go into "
            f"states of width {act.shape[-1]}; take it from the same site of the same model"
        )
    return value
