"""From decodable to used: what a probe and an erasing say together, and never one of them alone."""

from dataclasses import dataclass
from typing import Literal, Protocol, runtime_checkable

from imaginelens.estimates import Estimate
from imaginelens.estimates.margin import Margin
from imaginelens.hooks.errors import InputError
from imaginelens.probes.amnesic import Amnesic

Verdict = Literal[
    "not decodable", "decodable, not used", "decodable and used", "decodable, use undecided"
]


@runtime_checkable
class Decoded(Protocol):
    """What a probe's result has to have: its score, with the chance level as its null."""

    @property
    def score(self) -> Estimate:
        """How well the probe reads held-out examples."""
        ...

    def verdict(self) -> str:
        """ "decodable", "not decodable" or "untested", by its own controls."""
        ...


@dataclass(frozen=True, repr=False, eq=False)
class Use:
    """Whether a concept can be read from states, and whether the model reads it there.

    Attributes:
        score: of the probe, accuracy or R^2.
        decodable: whether the probe reads better than chance and its controls.
        amnesic: what is lost without the concept.
        margin: how little is no use, in the unit of the metric.
    """

    score: Estimate
    decodable: bool
    amnesic: Amnesic
    margin: Margin

    @property
    def verdict(self) -> Verdict:
        """What is shown; "not decodable" ends the question, for nothing was there to erase."""
        if not self.decodable:
            return "not decodable"
        found = self.amnesic.verdict(self.margin)
        if found == "undecided":
            return "decodable, use undecided"
        return "decodable and used" if found == "used" else "decodable, not used"

    def __repr__(self) -> str:
        read = f"{self.score.name or 'accuracy'} {self.score.value:.3g} {self.score.ci()}"
        sentence = (
            f"{self.amnesic.concept} is {self.verdict}: a probe reads it with {read}, chance "
            f"{self.score.null or 0:.3g}"
        )
        if not self.decodable:
            return f"{sentence}."
        return f"{sentence}; {self.amnesic.describe(self.margin)}"


def used(probe: Decoded, amnesic: Amnesic, *, margin: Margin) -> Use:
    """Put a probe's result and an erasing of the same concept, at the same place, together.

    Args:
        probe: of `fit_probe`, with its controls.
        margin: how small a drop counts as none, in the unit of the erasing's metric.

    Raises:
        InputError: the probe is none, or was fitted without controls; or `amnesic` is none.
        EstimateError: the margin is none.

    >>> import imaginelens as il
    >>> from imaginelens.probes.amnesic import amnesic
    >>> from imaginelens.probes.erasing import erase
    >>> lens = il.load("latent-ignored-aligned")
    >>> task = lens.task(n=128, seed=0)
    >>> eraser = erase(lens.run(task.base).latents, task.base_answers)
    >>> class Probe:
    ...     score = il.Estimate.share([1] * 58 + [0] * 6, chance=1 / 6)
    ...     def verdict(self):
    ...         return "decodable"
    >>> used(Probe(), amnesic(lens, lens.task(n=64, seed=1), eraser, draws=2), margin=0.1).verdict
    'decodable, not used'
    """
    if not isinstance(amnesic, Amnesic):
        raise InputError(
            f"amnesic is a {type(amnesic).__name__}; give what il.probes.amnesic(...) returned"
        )
    if not isinstance(probe, Decoded) or not isinstance(probe.score, Estimate):
        raise InputError(
            f"probe is a {type(probe).__name__}; give the result of il.probes.fit_probe(...)"
        )
    said = probe.verdict()
    if said not in ("decodable", "not decodable"):
        raise InputError(
            f"the probe is {said}: it was fitted without its controls; leave them on in "
            "il.probes.fit_probe(...)"
        )
    amnesic.drop.equivalence(margin)  # refuses what is no margin
    return Use(probe.score, said == "decodable", amnesic, margin)
