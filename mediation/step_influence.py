"""Step by step: how far does replacing one latent move the later ones, and the answer?"""

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from jaxtyping import Float

from imaginelens.estimates import Estimate
from imaginelens.hooks import LatentModel, Pairs, Run, Sham, Swap
from imaginelens.hooks.errors import InputError
from imaginelens.hooks.metrics import Metric, logit_diff
from imaginelens.hooks.positions import Positions, latent
from imaginelens.mediation.alignment import counts
from imaginelens.mediation.cells import Cell
from imaginelens.mediation.effect_map import EffectMap
from imaginelens.mediation.ends import Direction, Ends, batches, check_study, ends_of
from imaginelens.mediation.joint import part, together
from imaginelens.mediation.result_files import Saved
from imaginelens.mediation.sweep import joined

SITE = "hook_latent"


@dataclass(frozen=True, repr=False, eq=False)
class StepInfluence(Saved):
    """What replacing one latent step does to all steps, and to the answer.

    Attributes:
        change: ||z'_t - z_t|| / ||z_t|| of step t, moved, where step s was replaced and the later
            ones were generated anew: (replaced, moved, example). On the diagonal it is the size of
            the replacement, before it exactly 0. nan where a run has no such step, or the
            replacement changed nothing.
        free: the effect of each step on the answer where what follows is generated anew: its total
            effect.
        fixed: the same where the later latents and the text stay: its controlled direct effect.
    """

    change: Float[np.ndarray, "replaced moved example"]
    free: EffectMap
    fixed: EffectMap

    @property
    def steps(self) -> int:
        """How many steps the longest run has."""
        return len(self.change)

    @property
    def mean(self) -> Float[np.ndarray, "replaced moved"]:
        """The mean change over examples that have one; nan where none has."""
        there = ~np.isnan(self.change)
        sums, n = np.where(there, self.change, 0.0).sum(-1), there.sum(-1)
        return np.asarray(np.divide(sums, n, out=np.full(n.shape, np.nan), where=n > 0))

    def at(self, *, replaced: int, moved: int) -> Estimate:
        """How far one step moves where another one was replaced.

        Raises:
            InputError: there is no such step.
            EstimateError: fewer than two examples have both.
        """
        for name, step in (("replaced", replaced), ("moved", moved)):
            if step not in range(self.steps):
                raise InputError(f"{name} is {step!r}, expected a step from 0 to {self.steps - 1}")
        return Estimate.mean(
            self.change[replaced, moved],
            name=f"change of z[{moved}] by z[{replaced}]",
            groups=self.free.groups,
        )

    def plot(self, **options: Any) -> Any:
        """The changes as a figure: replaced steps down, moved steps across.

        Args:
            options: of `imaginelens.view.step_heatmap`: level, limit, palette, title.
        """
        from imaginelens.view.steps import step_heatmap

        return step_heatmap(self, **options)

    def __repr__(self) -> str:
        head = "replaced \\ moved"
        lines = [f"StepInfluence: {self.steps} steps, {self.free.n} examples, mean relative change"]
        lines.append(f"  {head:18}" + "".join(f"{f'z[{t}]':>10}" for t in range(self.steps)))
        for s, row in enumerate(self.mean):
            lines.append(f"  {f'z[{s}]':18}" + "".join(f"{value:10.3g}" for value in row))
        for name, effects in (("free", self.free), ("fixed", self.fixed)):
            means = ", ".join(f"{value:.3g}" for value in effects.mean.ravel())
            lines.append(f"  effect on {effects.metric} in {name} context: {means}")
        return "\n".join(lines)


def step_influence(
    lens: LatentModel,
    pairs: Pairs,
    *,
    metric: Metric = logit_diff,
    direction: Direction = "denoise",
    batch_size: int = 16,
) -> StepInfluence:
    """Replace each latent step by that of the other run, alone: a map of steps by steps.

    Args:
        direction: "denoise" runs the base with steps of the source, "noise" the other way round.

    Raises:
        EditTouchedNothing: no run feeds a latent back, or no step of any example was changed.
        InputError: an argument is not what it should be.

    >>> import imaginelens as il
    >>> lens = il.load("latent-content")
    >>> found = step_influence(lens, lens.task(n=2, seed=0))
    >>> found.change.shape, bool((found.change[1, 0] == 0).all()), bool(found.mean[0, 1] > 0)
    ((2, 2, 2), True, True)
    """
    check_study(
        lens, pairs, metric=metric, direction=direction, context="free", batch_size=batch_size
    )
    changes: list[Any] = []
    free: list[Any] = []
    fixed: list[Any] = []
    for some in batches(pairs, batch_size, "steps"):
        ends = ends_of(lens, some, metric=metric, direction=direction, context="free")
        for into, found in zip((changes, free, fixed), _measured(ends), strict=True):
            into.append(found)
    most = max(map(len, changes))
    change = np.concatenate([_padded(one, most) for one in changes], axis=-1)
    return StepInfluence(change, joined(free), joined(fixed))


def _measured(ends: Ends) -> tuple[np.ndarray, EffectMap, EffectMap]:
    """The changes in one batch, and the effects in free and in fixed context."""
    steps = max(1, *(int(counts(run, latent).max()) for run in (ends.run, ends.partner)))
    fixed = replace(
        ends,
        context="fixed",
        forwards=2,
        before=ends.lens.read_answer(ends.run, ends.before.targets),
        other=ends.lens.read_answer(ends.partner, ends.before.targets),
    )
    change = np.full((steps, steps, ends.n), np.nan)
    found: list[dict[str, Any]] = []
    shams: list[np.ndarray] = []
    for side in (ends, fixed):
        table: dict[str, list[np.ndarray]] = {"after": [], "flags": [], "change": []}
        for step in range(steps):
            one = part(Swap(side.donor), latent[step], (SITE,))
            joint = together(side.lens, side.run, side.before, [one], context=side.context)
            side.forwards += joint.forwards
            table["after"].append(side.value(joint.after))
            table["flags"].append(joint.flags.astype(np.int8))
            table["change"].append(joint.change)
            if side is ends:
                change[step] = np.where(joint.flags > 0, np.nan, _moved(ends.run, joint.run, steps))
        own = together(
            side.lens, side.run, side.before, [part(Sham(), latent, (SITE,))], context=side.context
        )
        side.forwards += own.forwards
        shams.append(side.value(own.after) - side.value(side.before))
        found.append({name: np.stack(rows) for name, rows in table.items()})
    cells = [_cell(latent[step]) for step in range(steps)]
    free, at_once = (
        side.map(
            cells,
            formula=f"{side.metric.name}(step swapped) - {side.metric.name}(unedited), "
            f"{side.direction}, {side.context} context",
            edit="Swap",
            sham=sham,
            **rows,
        )
        for side, rows, sham in zip((ends, fixed), found, shams, strict=True)
    )
    return change, free, at_once


def _cell(at: Positions) -> Cell:
    return Cell(SITE, None, repr(at), None, (SITE,))


def _moved(run: Run, edited: Run, steps: int) -> Float[np.ndarray, "moved example"]:
    """The relative change of each step; nan where one of the runs has no such step."""
    moved = np.full((steps, len(run)), np.nan)
    both = min(steps, run.latents.shape[1], edited.latents.shape[1])
    old, new = (one.latents[:, :both].detach().double().cpu() for one in (run, edited))
    size, far = old.norm(dim=-1).numpy(), (new - old).norm(dim=-1).numpy()
    with np.errstate(divide="ignore", invalid="ignore"):
        relative = np.where(far == 0, 0.0, far / size)
    there = (run.latent_mask[:, :both] & edited.latent_mask[:, :both]).cpu().numpy()
    moved[:both] = np.where(there, relative, np.nan).T
    return moved


def _padded(change: np.ndarray, steps: int) -> np.ndarray:
    more = steps - len(change)
    return np.pad(change, ((0, more), (0, more), (0, 0)), constant_values=np.nan)
