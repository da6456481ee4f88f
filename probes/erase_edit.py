"""Erasing as an edit: the model runs on with states from which a concept cannot be read."""

from dataclasses import dataclass, field

import numpy as np
import torch
from jaxtyping import Float

from imaginelens.hooks.edits import Act, Edit, EditContext
from imaginelens.hooks.errors import InputError
from imaginelens.probes.erasing import Eraser, Erasure

Rows = Float[torch.Tensor, "cell d_model"]


@dataclass(frozen=True)
class _StepByStep(Edit):
    """An edit that treats each cell as an eraser treats its step."""

    eraser: Eraser
    _parts: dict[int, tuple[torch.Tensor, ...]] = field(
        default_factory=dict, init=False, repr=False, compare=False
    )

    def apply(self, act: Act, ctx: EditContext) -> Act:
        """Raises:
        InputError: the states are of another width, or at a step the eraser knows nothing of.
        """
        flat = act.flatten(1)
        if flat.shape[1] != self.eraser.width:
            raise InputError(
                f"an eraser of states of width {self.eraser.width} (from "
                f"{self.eraser.site or 'an array'}) cannot act on states of width {flat.shape[1]} "
                f"at {ctx.site}; learn it from states of this site"
            )
        numbers, new = self._numbers(ctx), flat.clone()
        for step in np.unique(numbers):
            erasure = self.eraser.at_step(int(step))
            if erasure is not None:
                cells = torch.as_tensor(np.flatnonzero(numbers == step), device=act.device)
                states = flat[cells].double()
                new[cells] = self.moved(states, *self._tensors(int(step), erasure, states)).to(act)
        return new.reshape(act.shape)

    def moved(self, x: Rows, mean: torch.Tensor, left: torch.Tensor, right: torch.Tensor) -> Rows:
        """The new states of one step."""
        raise NotImplementedError(f"{type(self).__name__} does not say where it moves states")

    def _numbers(self, ctx: EditContext) -> np.ndarray:
        """The step of each cell: among latents it is the latent's own, whichever of them `at`
        selects, so that `il.latent[1]` is not taken for the first."""
        latents = self.eraser.at == "latent" and bool((ctx.steps >= 0).all())
        return ctx.steps if latents else ctx.ordinals

    def _tensors(
        self, step: int, erasure: Erasure, like: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        if step not in self._parts:
            parts = (erasure.mean, erasure.left, erasure.right)
            self._parts[step] = tuple(torch.tensor(part, dtype=torch.float64) for part in parts)
        mean, left, right = (part.to(like) for part in self._parts[step])
        return mean, left, right


@dataclass(frozen=True)
class Erase(_StepByStep):
    """Erase a concept from the states, at each latent step as an eraser has learned it there.

    Works wherever an edit does: `lens.edit`, `lens.ablate`, `il.necessity(edits=[...])`,
    `il.sweep(edit=...)`. Steps that the eraser leaves alone stay as they are.

    >>> import imaginelens as il
    >>> from imaginelens.probes.erasing import erase
    >>> lens = il.load("latent-content")
    >>> task = lens.task(n=64, seed=0)
    >>> eraser = erase(lens.run(task.base).latents, task.base_answers)
    >>> with lens.edit(Erase(eraser), at=il.latent, site="hook_latent") as landing:
    ...     changed = lens.run(lens.task(n=2, seed=1).base)
    >>> len(landing.cells)
    4
    """

    def moved(self, x: Rows, mean: torch.Tensor, left: torch.Tensor, right: torch.Tensor) -> Rows:
        return x - (x - mean) @ right @ left.T


@dataclass(frozen=True)
class Displace(_StepByStep):
    """A control of erasing: move each state just as far, but in a random subspace of that rank.

    What is lost then, too, is lost to the distance and not to the concept (the norm-matched placebo
    of TransformerLens' interchange interventions, for erasing).
    """

    seed: int = 0

    def moved(self, x: Rows, mean: torch.Tensor, left: torch.Tensor, right: torch.Tensor) -> Rows:
        far = ((x - mean) @ right @ left.T).norm(dim=-1, keepdim=True)
        draw = np.random.default_rng(self.seed).normal(size=tuple(left.shape))
        basis = torch.tensor(np.linalg.qr(draw)[0]).to(x)
        move = (x - mean) @ basis @ basis.T
        size = move.norm(dim=-1, keepdim=True)
        return x - move * (far / size.clamp_min(torch.finfo(x.dtype).tiny))


@dataclass(frozen=True)
class Blank(_StepByStep):
    """Set the states to the mean at which erasing keeps them: everything is erased."""

    def moved(self, x: Rows, mean: torch.Tensor, left: torch.Tensor, right: torch.Tensor) -> Rows:
        return mean.expand_as(x).clone()
