"""Amnesic probing: what do the answers lose when a concept is erased from the states?

That a probe reads a concept does not say that the model does. Here the model runs on with the
concept erased (Elazar et al. 2021, arXiv 2006.00995), and with three controls on the same examples:
random subspaces of the same rank; states moved just as far as erasing moves them, in random
subspaces; and states that are set to their mean, which is all there is to lose at this site.
"""

from collections.abc import Hashable
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import numpy as np
from jaxtyping import Float

from imaginelens.estimates import Estimate
from imaginelens.estimates.margin import Margin, check_margin
from imaginelens.hooks.edits import Edit
from imaginelens.hooks.errors import InputError
from imaginelens.hooks.landing import Flag
from imaginelens.hooks.metrics import Metric, accuracy
from imaginelens.hooks.model import LatentModel
from imaginelens.hooks.pairs import Pairs
from imaginelens.hooks.patching import Context
from imaginelens.hooks.positions import Positions, latent
from imaginelens.probes.edited_runs import Measured, Setting, measure
from imaginelens.probes.erase_edit import Blank, Displace, Erase
from imaginelens.probes.erasing import Eraser, Method
from imaginelens.probes.labelling import inputs_of

Used = Literal["used", "not used", "undecided"]
Values = Float[np.ndarray, " example"]


@dataclass(frozen=True, repr=False, eq=False)
class Amnesic:
    """What is lost without a concept, per example, and what is lost to controls.

    A drop is the metric before minus after, so that a positive one is a loss. Rows that an edit did
    not change are in with a drop of 0, and counted in `flags`.

    Attributes:
        before, after: the metric of each example without and with erasing; nan where no answer was
            found.
        random: (draw, example), with a random subspace of the same rank erased.
        displaced: (draw, example), with states moved just as far in a random subspace.
        blank: with the states set to their mean.
        groups: the label of each example's group, or None.
        flags: examples that erasing did not change, and why.
        change: how far states moved, as a share of their norm, by arm.
        method: how the concept was erased.
        where: site and positions, in words.
    """

    concept: str
    method: Method
    metric: Metric
    before: Values
    after: Values
    random: Float[np.ndarray, "draw example"]
    displaced: Float[np.ndarray, "draw example"]
    blank: Values
    groups: tuple[Any, ...] | None
    flags: dict[int, Flag]
    change: dict[str, float]
    where: str
    context: Context

    @cached_property
    def drop(self) -> Estimate:
        """before - after: what is lost with the concept."""
        return self._drop(self.after, f"drop of {self.metric.name} without {self.concept}")

    @cached_property
    def drop_whole(self) -> Estimate:
        """What is lost with the whole state: before - after setting it to its mean."""
        return self._drop(self.blank, f"drop of {self.metric.name} without the state")

    @cached_property
    def drop_random(self) -> Estimate:
        """What is lost with a random subspace of the same rank, averaged over draws."""
        name = f"drop of {self.metric.name} without a random subspace"
        return self._contrast(self.before - self.random.mean(0), name)

    @cached_property
    def drop_displaced(self) -> Estimate:
        """What is lost to moving states just as far in a random subspace, averaged over draws."""
        name = f"drop of {self.metric.name} by moving states as far"
        return self._contrast(self.before - self.displaced.mean(0), name)

    @cached_property
    def drop_beyond_random(self) -> Estimate:
        """How much more is lost with the concept than with a random subspace of its rank."""
        name = f"drop of {self.metric.name} beyond a random subspace's"
        return self._contrast(self.random.mean(0) - self.after, name)

    @cached_property
    def drop_beyond_displaced(self) -> Estimate:
        """How much more is lost with the concept than by moving states as far elsewhere."""
        name = f"drop of {self.metric.name} beyond that of moving states as far"
        return self._contrast(self.displaced.mean(0) - self.after, name)

    @property
    def as_bad(self) -> int:
        """How many single draws of either control lose as much as erasing does, or more."""
        controls = np.concatenate([self.random, self.displaced])
        sign = 1 if self.drop.value >= 0 else -1
        drops = [sign * np.nanmean(self.before - control) for control in controls]
        return int(np.sum(np.array(drops) >= abs(self.drop.value) - 1e-12))

    def verdict(self, margin: Margin | None = None) -> Used:
        """Whether the concept is used where it was erased, for this metric.

        "not used": the change is within the margin (TOST at 5%), whatever the controls do. "used":
        its 95% interval leaves out 0; so does that of what it is beyond each control, on the same
        side and not shown to be within the margin; no single draw is as bad; and the concept was
        erased by LEACE, for the projections take along what overlaps with it, and so hurt where the
        concept is not used. "undecided": neither.

        Args:
            margin: in the metric's unit (0.05 is 5 points of a share), chosen before looking.

        Raises:
            EstimateError: the margin is missing.
        """
        shown = self.drop.verdict(check_margin(margin))
        if shown in ("equivalent", "both"):
            return "not used"
        sign = np.sign(self.drop.value)
        beyond = (self.drop_beyond_random, self.drop_beyond_displaced)
        more = all(e.verdict(margin) == "effect" and np.sign(e.value) == sign for e in beyond)
        return "used" if shown == "effect" and more and self._alone else "undecided"

    @property
    def _alone(self) -> bool:
        """Whether only the concept can have done it."""
        return self.method == "leace" and not self.as_bad

    def describe(self, margin: Margin | None = None) -> str:
        """One sentence with all the numbers and the verdict.

        Raises:
            EstimateError: the margin is missing.
        """
        said = {
            "used": "it is used there",
            "not used": f"it is not used there, within the margin of {margin}",
            "undecided": "whether it is used is not decided",
        }[self.verdict(margin)]
        if self.method != "leace" and self.verdict(margin) == "undecided":
            said += f" ({self.method} takes along what overlaps with it; erase it with 'leace')"
        draws = len(self.random)
        return (
            f"without {self.concept} at {self.where} the {self.metric.name} drops by "
            f"{_words(self.drop)}, without a random subspace of the same rank by "
            f"{self.drop_random.value:.3g}, by moving states as far elsewhere by "
            f"{self.drop_displaced.value:.3g} ({draws} draws each, {self.as_bad} of them as bad), "
            f"and without the whole state by {self.drop_whole.value:.3g}: {said}."
        )

    def __repr__(self) -> str:
        rows = (
            ("erased", self.drop, self.change["erased"]),
            ("random", self.drop_random, self.change["random"]),
            ("displaced", self.drop_displaced, self.change["displaced"]),
            ("whole state", self.drop_whole, self.change["blank"]),
        )
        lines = [
            f"Amnesic({self.concept} at {self.where}, {self.context} context): drop of "
            f"{self.metric.name}, n={self.drop.n}, {len(self.flags)} unchanged"
        ]
        lines += [
            f"  {name:<12} {_words(estimate):<32} states moved {moved:.0%}"
            for name, estimate, moved in rows
        ]
        return "\n".join(lines)

    def _drop(self, after: Values, name: str) -> Estimate:
        if self.metric.binary:
            return Estimate.paired(self.before, after, name=name, groups=self.groups)
        return self._contrast(self.before - after, name)

    def _contrast(self, values: Values, name: str) -> Estimate:
        """A mean over examples; averages of 0/1 outcomes by the score test."""
        if self.metric.binary:
            return Estimate.bounded(values, low=-1, high=1, name=name, groups=self.groups)
        return Estimate.mean(values, name=name, unit=self.metric.unit, groups=self.groups)


def amnesic(
    lens: LatentModel,
    data: Pairs,
    eraser: Eraser,
    *,
    site: str = "hook_latent",
    at: Positions = latent,
    metric: Metric = accuracy,
    context: Context = "free",
    draws: int = 5,
    batch_size: int = 32,
    seed: int = 0,
) -> Amnesic:
    """Erase a concept while the model runs, and compare what is lost with random subspaces.

    Erasing at an early step changes what later steps are computed from: `eraser.only(step)` and
    `context="fixed"` tell "read by the answer" from "needed for the next latent".

    Args:
        data: its base inputs, their answers and groups; none that the eraser was learned from.
        eraser: of `erase`, learned from states at the same site.
        at: where it acts; `il.latent` for an eraser of latents, with `eraser.only(...)` for some.
        metric: accuracy of the running input, `il.log_prob` of its answer, or any other.
        context: "free": what follows is generated anew. "fixed": the text and later latents stay.
        draws: random subspaces, of each of the two controls.
        seed: of these.

    Raises:
        InputError: an example, or a group, is one the eraser was learned from; it was learned at
            another site; or an argument is not what it should be.
        EditTouchedNothing: no example has such a position.
        EstimateError: there are fewer than 2 examples, or fewer than 10 groups.

    >>> import imaginelens as il
    >>> lens = il.load("latent-ignored-aligned")
    >>> task = lens.task(n=128, seed=0)
    >>> from imaginelens.probes.erasing import erase
    >>> eraser = erase(lens.run(task.base).latents, task.base_answers)
    >>> amnesic(lens, lens.task(n=64, seed=1), eraser, draws=2).verdict(margin=0.1)
    'not used'
    """
    if not isinstance(eraser, Eraser):
        raise InputError(
            f"eraser is a {type(eraser).__name__}, expected an Eraser; make one with "
            "il.probes.erase(states)"
        )
    if draws < 2:
        raise InputError(f"draws is {draws}; one random subspace may be lucky, draw 2 or more")
    setting = Setting(lens, data, metric, site, at, context, batch_size)
    _check_site(eraser, lens.registry.match(site)[0])
    _check_apart(eraser, data)
    edits: dict[Hashable, Edit] = {"erased": Erase(eraser), "blank": Blank(eraser)}
    for k in range(draws):
        # another stream for each, and none that two seeds share
        one, other = np.random.SeedSequence([seed, k]).generate_state(2).tolist()
        edits["random", k] = Erase(eraser.random(one))
        edits["displaced", k] = Displace(eraser, other)
    found = measure(setting, edits)
    return Amnesic(
        concept=eraser.concept,
        method=eraser.method,
        metric=metric,
        before=found.before,
        after=found.after["erased"],
        random=np.stack([found.after["random", k] for k in range(draws)]),
        displaced=np.stack([found.after["displaced", k] for k in range(draws)]),
        blank=found.after["blank"],
        groups=None if data.groups is None else tuple(data.groups),
        flags=found.flags["erased"],
        change=_changes(found, draws),
        where=_where(eraser, site, at),
        context=context,
    )


def _changes(found: Measured, draws: int) -> dict[str, float]:
    """How far states moved: of the controls the mean over draws."""
    single = {name: found.change[name] for name in ("erased", "blank")}
    means = {
        name: float(np.mean([found.change[name, k] for k in range(draws)]))
        for name in ("random", "displaced")
    }
    return single | means


def _where(eraser: Eraser, site: str, at: Positions) -> str:
    """The site, and of latents the steps at which something is erased."""
    if len(eraser.active) == len(eraser.steps):
        return f"{at!r} of {site}"
    steps = ", ".join(map(str, eraser.active))
    return f"{at!r} (step {steps}) of {site}"


def _check_site(eraser: Eraser, site: str) -> None:
    """Refuse states of another site; names that are no hook's are the user's own arrays."""
    if "hook_" in eraser.site and eraser.site != site:
        raise InputError(
            f"the eraser was learned at {eraser.site} and would act at {site}; pass "
            f"site={eraser.site!r}, or learn it from states of {site}"
        )


def _check_apart(eraser: Eraser, data: Pairs) -> None:
    """Refuse examples and groups that the eraser has seen; inputs of one picture are one group."""
    given = inputs_of(data)
    seen = sum(key in eraser.keys for key in given.keys)
    if seen:
        raise InputError(
            f"{seen} of {len(data)} examples are among those that the eraser of {eraser.concept} "
            "was learned from; test it on others, lens.task(n, seed=another)"
        )
    shared = set(map(str, given.groups)) & eraser.groups
    if shared:
        raise InputError(
            f"{len(shared)} groups of the data, such as {min(shared)!r}, are among those that the "
            f"eraser of {eraser.concept} was learned from; test it on other groups"
        )


def _words(estimate: Estimate) -> str:
    return f"{estimate.value:.3g} {estimate.ci()}"
