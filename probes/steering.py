"""Steering: push states along a direction, by several doses, and see how the answer follows.

A direction that the model reads moves the answer more the further states are pushed, and one way
for positive doses and the other for negative ones; any push far enough breaks it. So random
directions of the same norm are given at the same doses, to the same examples.
"""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Float

from imaginelens.estimates import Estimate, adjust
from imaginelens.estimates.margin import Margin
from imaginelens.hooks.edits import Edit, Steer
from imaginelens.hooks.errors import InputError
from imaginelens.hooks.landing import Flag
from imaginelens.hooks.metrics import Metric, logit_diff
from imaginelens.hooks.model import LatentModel
from imaginelens.hooks.pairs import Pairs
from imaginelens.hooks.patching import Context
from imaginelens.hooks.positions import Positions, latent
from imaginelens.probes.edited_runs import Setting, Values, measure

Steered = Literal["steers", "does not steer", "undecided"]


@dataclass(frozen=True, repr=False, eq=False)
class DoseResponse:
    """The metric of each example at each dose, along the direction and along random ones.

    Attributes:
        doses: how many times the direction was added; 0 is the unedited run, `before`.
        before: the metric of each unedited example; nan where no answer was found.
        after: (dose, example).
        random: (dose, draw, example), along random directions of the same norm.
        groups: the label of each example's group, or None.
        flags: examples that the largest dose did not change, and why.
        change: mean of ||new - old|| / ||old|| at each dose.
        where: site and positions, in words.
    """

    doses: tuple[float, ...]
    metric: Metric
    before: Values
    after: Float[np.ndarray, "dose example"]
    random: Float[np.ndarray, "dose draw example"]
    groups: tuple[Any, ...] | None
    flags: dict[int, Flag]
    change: tuple[float, ...]
    where: str
    context: Context

    @cached_property
    def effects(self) -> tuple[Estimate, ...]:
        """after - before at each dose."""
        return tuple(self._effect(k) for k in range(len(self.doses)))

    @cached_property
    def beyond_random(self) -> tuple[Estimate, ...]:
        """after - the mean of random directions, at each dose."""
        return tuple(
            self._mean(after - random.mean(0), f"beyond random at dose {dose:g}", 1.0)
            for dose, after, random in zip(self.doses, self.after, self.random, strict=True)
        )

    @cached_property
    def pvalues(self) -> np.ndarray:
        """Of `beyond_random`, adjusted for the number of doses (Holm)."""
        return adjust([estimate.pvalue() for estimate in self.beyond_random])

    @cached_property
    def slope(self) -> Estimate:
        """The least-squares slope of each example's metric on the dose, the unedited run at 0."""
        return self._slope(self.after - self.before, "slope")

    @cached_property
    def slope_random(self) -> Estimate:
        """The same along random directions, averaged over draws."""
        return self._slope(self.random.mean(1) - self.before, "slope along random directions")

    @cached_property
    def slope_beyond_random(self) -> Estimate:
        """How much steeper the metric follows the direction than random ones of its norm."""
        return self._slope(self.after - self.random.mean(1), "slope beyond random directions")

    def verdict(self, margin: Margin | None = None) -> Steered:
        """Whether the metric follows the direction.

        "does not steer": the slope is within the margin (TOST at 5%). "steers": the slope, and what
        it is beyond random ones, have 95% intervals that leave out 0, on the same side, and are not
        shown to be within the margin, and no single random direction is as steep. "undecided":
        neither.

        Args:
            margin: of the slope, in the metric's unit per dose of 1.

        Raises:
            EstimateError: the margin is missing.
        """
        shown, sign = self.slope.verdict(margin), np.sign(self.slope.value)
        if shown in ("equivalent", "both"):
            return "does not steer"
        beyond = self.slope_beyond_random
        more = beyond.verdict(margin) == "effect" and np.sign(beyond.value) == sign
        return "steers" if shown == "effect" and more and not self.as_steep else "undecided"

    @property
    def as_steep(self) -> int:
        """How many of the random directions have a mean slope as steep, either way."""
        slopes = [
            np.nanmean(self._weights @ (self.random[:, k] - self.before))
            for k in range(self.random.shape[1])
        ]
        return int(np.sum(np.abs(slopes) >= abs(self.slope.value) - 1e-12))

    def plot(self, **options: Any) -> Any:
        """The effect of each dose as a figure, beside random directions."""
        from imaginelens.view.doses import dose_response

        return dose_response(self, **options)

    def __repr__(self) -> str:
        lines = [
            f"DoseResponse at {self.where}, {self.context} context: change of "
            f"{self.metric.name}, n={self.slope.n}, {len(self.flags)} unchanged"
        ]
        rows = zip(self.doses, self.effects, self.random, self.change, strict=True)
        for dose, effect, random, change in rows:
            other = float(np.nanmean(random.mean(0) - self.before))
            lines.append(
                f"  dose {dose:<6g} {effect.value:.3g} {effect.ci()!s:<22} random {other:<8.3g} "
                f"states moved {change:.0%}"
            )
        lines.append(f"  slope {self.slope.value:.3g} {self.slope.ci()}, random "
                     f"{self.slope_random.value:.3g}, {self.as_steep} of {self.random.shape[1]} as "
                     "steep")  # fmt: skip
        return "\n".join(lines)

    @property
    def _weights(self) -> Float[np.ndarray, " dose"]:
        """The slope is their product with the changes; dose 0 has change 0."""
        doses = np.array([0.0, *self.doses])
        centred = doses - doses.mean()
        return (centred / (centred @ centred))[1:]

    def _effect(self, k: int) -> Estimate:
        name = f"{self.metric.name} at dose {self.doses[k]:g}"
        if self.metric.binary:
            return Estimate.paired(self.after[k], self.before, name=name, groups=self.groups)
        return self._mean(self.after[k] - self.before, name, 1.0)

    def _slope(self, changes: Float[np.ndarray, "dose example"], name: str) -> Estimate:
        weights = self._weights
        what = f"{name} of {self.metric.name}"
        return self._mean(weights @ changes, what, float(np.abs(weights).sum()))

    def _mean(self, values: Values, name: str, most: float) -> Estimate:
        """A mean over examples; contrasts of 0/1 outcomes by the score test."""
        if self.metric.binary:
            return Estimate.bounded(values, low=-most, high=most, name=name, groups=self.groups)
        return Estimate.mean(values, name=name, unit=self.metric.unit, groups=self.groups)


def steer(
    lens: LatentModel,
    data: Pairs,
    direction: Any,
    *,
    doses: Sequence[float] = (-2.0, -1.0, 1.0, 2.0),
    site: str = "hook_latent",
    at: Positions = latent,
    metric: Metric = logit_diff,
    context: Context = "free",
    draws: int = 5,
    batch_size: int = 32,
    seed: int = 0,
) -> DoseResponse:
    """Add multiples of a direction to states while the model runs.

    Args:
        data: its base inputs, their answers and groups; `il.logit_diff` is of its source answers
            against its base answers, so that these say which way the direction should push.
        direction: (d_model,), such as a probe's; its norm is the unit of the doses.
        doses: how many times it is added; 0 is the unedited run, and always there.
        draws: random directions of the same norm.

    Raises:
        InputError: the direction is no vector of the states' width, a dose is 0 or comes twice, or
            an argument is not what it should be.
        EditTouchedNothing: no example has such a position.
        EstimateError: there are fewer than 2 examples, or fewer than 10 groups.

    >>> import imaginelens as il
    >>> lens = il.load("latent-content")
    >>> task = lens.task(n=32, seed=0)
    >>> z = lens.run(task.base).latents[:, 1].numpy()
    >>> bars = np.array([answer == "bar" for answer in task.base_answers])
    >>> towards_bar = z[bars].mean(0) - z[~bars].mean(0)
    >>> curve = steer(lens, task, towards_bar, at=il.latent[1], doses=[1, 2], metric=il.log_prob)
    >>> curve.effects[1].value < 0  # the answer becomes another one
    True
    """
    pushes = _check_doses(doses)
    if draws < 2:
        raise InputError(f"draws is {draws}; one random direction may be lucky, draw 2 or more")
    vector = _vector(direction)
    setting = Setting(lens, data, metric, site, at, context, batch_size)
    edits: dict[Hashable, Edit] = {}
    for dose in pushes:
        edits[dose] = _push(lens, vector, dose)
        for k in range(draws):
            edits[dose, k] = _push(lens, _random(vector, seed, k), dose)
    found = measure(setting, edits)
    after = np.stack([found.after[dose] for dose in pushes])
    random = [[found.after[dose, k] for k in range(draws)] for dose in pushes]
    return DoseResponse(
        doses=pushes,
        metric=metric,
        before=found.before,
        after=after,
        random=np.array(random),
        groups=None if data.groups is None else tuple(data.groups),
        flags=found.flags[max(pushes, key=abs)],
        change=tuple(found.change[dose] for dose in pushes),
        where=f"{at!r} of {site}",
        context=context,
    )


def _push(lens: LatentModel, vector: Float[np.ndarray, " d_model"], dose: float) -> Steer:
    like = {"dtype": lens.model.dtype, "device": lens.model.device}
    return Steer(torch.tensor(vector, **like), scale=dose)


def _random(vector: Float[np.ndarray, " d_model"], seed: int, k: int) -> Float[np.ndarray, " d"]:
    """A random direction of the same norm."""
    draw = np.random.default_rng([seed, k]).normal(size=vector.shape)
    return draw * (np.linalg.norm(vector) / np.linalg.norm(draw))


def _vector(direction: Any) -> Float[np.ndarray, " d_model"]:
    if isinstance(direction, torch.Tensor):
        direction = direction.detach().cpu().double().numpy()
    found = np.asarray(direction, dtype=np.float64)
    if found.ndim != 1 or not np.isfinite(found).all() or not found.any():
        raise InputError(
            f"a direction of shape {found.shape} came, expected finite numbers (d_model,) that are "
            "not all 0; of several classes take one row, or the difference of two"
        )
    return found


def _check_doses(doses: Sequence[float]) -> tuple[float, ...]:
    given = [float(dose) for dose in doses]
    if not given or not np.isfinite(given).all() or 0.0 in given or len(set(given)) < len(given):
        raise InputError(
            f"doses are {given}; give different numbers other than 0, which is the unedited run"
        )
    return tuple(sorted(given))
