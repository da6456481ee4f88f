"""A run as captum's forward function: states in, the answer's logits or a metric out.

Captum's methods call a function of tensors and know nothing of pictures, latents or templates. Here
the tensor is the states at some positions of one site, and everything else of the run stays as it
was written: fixed context, as in `il.attribute`.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int, Shaped

from imaginelens.hooks import Edit, LatentModel, Run
from imaginelens.hooks.edits import EditContext
from imaginelens.hooks.entries import EditEntry
from imaginelens.hooks.errors import InputError
from imaginelens.hooks.landing import Landing
from imaginelens.hooks.metrics import Metric, Targets, targets_of
from imaginelens.hooks.patching import check_arguments
from imaginelens.hooks.positions import Positions, latent
from imaginelens.hooks.readout import answer_columns, read_out
from imaginelens.hooks.script import Script
from imaginelens.mediation.gradients import weights_held

States = Shaped[torch.Tensor, "example state ..."]


@dataclass(frozen=True, eq=False)
class CaptumForward:
    """What captum's methods take as their forward function; make it with `il.captum_forward`.

    Attributes:
        inputs: the run's own states at the positions, (example, state, ...): what to attribute to.
        features: the number of the state that each number of `inputs` belongs to, (1, state, ...):
            captum's `feature_mask`, so that a state is ablated as a whole.
    """

    lens: LatentModel
    run: Run
    site: str
    at: Positions
    metric: Metric | None
    targets: Targets
    inputs: States = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "inputs", self.states_of(self.run))

    def __call__(self, states: States) -> Float[torch.Tensor, "example ..."]:
        """Read the run with these states in place of its own.

        Args:
            states: as `inputs`, or several of them one behind the other, as captum stacks them.

        Returns:
            The metric of each example; without a metric its logits where the answer is decided,
            (example, vocab), of which captum's `target` names a token.

        Raises:
            InputError: they have another shape.
        """
        n_rows = len(self.inputs)
        if states.shape[1:] != self.inputs.shape[1:] or len(states) % n_rows:
            raise InputError(
                f"states of shape {tuple(states.shape)} were given, expected "
                f"{tuple(self.inputs.shape)} or several times as many rows"
            )
        return torch.cat([self._read(part) for part in states.split(n_rows)])

    @property
    def features(self) -> Int[torch.Tensor, "one state ..."]:
        """One feature for each state."""
        shape = self.inputs.shape[1:]
        count = torch.arange(shape[0], device=self.inputs.device)
        spread = count.reshape(1, -1, *[1] * (len(shape) - 1)).expand(1, *shape)
        return spread.contiguous()  # captum takes views of it

    def states_of(self, run: Run) -> States:
        """The states of another run at the same site and positions: baselines, or what to go to.

        Raises:
            InputError: it has no such position, or its examples have not equally many.
        """
        seen = _Seen()
        with torch.no_grad():
            self._logits(run, self.lens.script(run), [0], seen)
        if not seen.states:
            raise InputError(f"{self.at!r} selects no position of {self.site!r} in this run")
        counts = np.bincount(seen.rows, minlength=len(run))
        if len(set(counts.tolist())) > 1:
            raise InputError(
                f"the examples have {counts.tolist()} states at {self.at!r}, and a tensor holds "
                "equally many of each; select fewer, or take one example at a time"
            )
        order = np.lexsort((seen.ordinals, seen.rows))
        stacked = torch.cat(seen.states)[torch.as_tensor(order)]
        return stacked.reshape(len(run), -1, *stacked.shape[1:])

    def _read(self, states: torch.Tensor) -> torch.Tensor:
        script = self.lens.script(self.run, endings=self.targets.base_ids)
        columns = answer_columns(script, self.targets)
        with weights_held(self.lens.model):
            logits = self._logits(self.run, script, columns, _Given(states))
        found = read_out(script, self.targets, logits, columns, self.lens.decode, None)
        return found.logits if self.metric is None else self.metric(found)

    def _logits(self, run: Run, script: Script, columns: list[int], edit: Edit) -> torch.Tensor:
        entry = EditEntry((self.site,), edit, self.at, Landing("captum", "", (self.site,)))
        with self.lens.registry.scope([entry]):
            return self.lens._read_script(script, columns, acted=run.acted)

    def __repr__(self) -> str:
        return (
            f"CaptumForward({self.at!r} of {self.site!r}, inputs {tuple(self.inputs.shape)}, "
            f"to {self.metric or 'logits'})"
        )


@dataclass(frozen=True, eq=False)
class _Given(Edit):
    """Puts states there, through which gradients pass."""

    states: torch.Tensor

    def apply(self, act: torch.Tensor, ctx: EditContext) -> torch.Tensor:
        return self.states[ctx.rows, ctx.ordinals].to(act)


@dataclass(frozen=True, eq=False)
class _Seen(Edit):
    """Keeps what comes by."""

    states: list[torch.Tensor] = field(default_factory=list)
    rows: list[int] = field(default_factory=list)
    ordinals: list[int] = field(default_factory=list)

    def apply(self, act: torch.Tensor, ctx: EditContext) -> torch.Tensor:
        self.states.append(act.detach().clone())
        self.rows.extend(ctx.rows.tolist())
        self.ordinals.extend(ctx.ordinals.tolist())
        return act


def captum_forward(
    lens: LatentModel,
    inputs: Any,
    *,
    site: str = "hook_latent",
    at: Positions = latent,
    metric: Metric | None = None,
    base_answers: str | Sequence[str] | None = None,
    source_answers: str | Sequence[str] | None = None,
) -> CaptumForward:
    """One run as a forward function for captum's methods, of its states at some positions.

    The text and the latents that were fed stay as they are, but for those that are given: what is
    attributed to a latent is its direct effect, with later ones held.

    Args:
        inputs: a run, or what `lens.run` takes.
        site, at: which states: `hook_latent` at `il.latent`, `blocks.0.hook_resid_pre` at
            `il.image`, or others.
        metric: what comes out. None: the logits where the answer is decided, for captum's `target`.
        base_answers, source_answers: as in `lens.patch`; the base's are the run's own by default.

    Raises:
        InputError: an example has no answer, or the examples have not equally many such states.

    >>> import imaginelens as il
    >>> from captum.attr import FeatureAblation
    >>> lens = il.load("latent-content")
    >>> task = lens.task(n=1, seed=0)
    >>> run, other = lens.run(task.base), lens.run(task.source)
    >>> forward = captum_forward(
    ...     lens, run, metric=il.logit_diff, source_answers=task.source_answers
    ... )
    >>> found = FeatureAblation(forward).attribute(
    ...     forward.inputs, baselines=forward.states_of(other), feature_mask=forward.features
    ... )
    >>> found.shape
    torch.Size([1, 2, 64])
    """
    check_arguments(at=at, metric=metric)
    (name,) = _one(lens.registry.match(site), site)
    run = inputs if isinstance(inputs, Run) else lens.run(inputs)
    own = list(run.answers) if base_answers is None else _each(base_answers, len(run))
    others = [None] * len(run) if source_answers is None else _each(source_answers, len(run))
    targets = targets_of(run, own, others, lens.encode)
    missing = [row for row, ids in enumerate(targets.base_ids) if not ids]
    if missing:
        raise InputError(
            f"the examples {missing} have no answer, and captum sums over all; leave them out, or "
            "pass base_answers=[...]"
        )
    if metric is not None:
        metric.check(targets)
    return CaptumForward(lens, run, name, at, metric, targets)


def _one(names: list[str], asked: str) -> list[str]:
    if len(names) != 1:
        raise InputError(f"{asked!r} names {len(names)} sites; a forward function is about one")
    return names


def _each(answers: str | Sequence[str], n_rows: int) -> list[str | None]:
    found = [answers] if isinstance(answers, str) else list(answers)
    if len(found) != n_rows:
        raise InputError(f"{len(found)} answers were given for {n_rows} examples; give one each")
    return list(found)
