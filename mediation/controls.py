"""Controls of a mediation study: what must change nothing, what must change all, what is not it."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from imaginelens.estimates import Estimate, EstimateError
from imaginelens.mediation.study import Values


@dataclass(frozen=True, eq=False)
class Controls:
    """What the controls measured, beside what could not be run and why.

    Attributes:
        sham: the largest change of any outcome when each example gets its own states back; it is
            0, for a study in which it is not is refused.
        full_swap: the distance from the source's logits when the base gets everything that enters
            the source's text model; rounding at most.
        path_gap: the largest difference between generating and reading, in logits.
        arms: the outcomes before and after edits that are not the mediator's: a random donor, noise
            of the same size, a random site, a model with random weights.
        not_run: what was left out, and why.
    """

    sham: float = 0.0
    full_swap: float | None = None
    path_gap: float | None = None
    arms: Mapping[str, tuple[Values, Values]] = field(default_factory=dict)
    not_run: Mapping[str, str] = field(default_factory=dict)
    binary: bool = False
    unit: str = ""
    groups: tuple[Any, ...] | None = None

    @cached_property
    def effects(self) -> dict[str, Estimate]:
        """What those edits do to the outcome.

        Raises:
            EstimateError: there are too few examples, or groups, for an interval.
        """
        return {name: self._effect(name) for name in self.arms}

    def _effect(self, name: str) -> Estimate:
        before, after = self.arms[name]
        if self.binary:
            return Estimate.paired(after, before, name=name, unit=self.unit, groups=self.groups)
        return Estimate.mean(after - before, name=name, unit=self.unit, groups=self.groups)

    def lines(self) -> list[str]:
        """The controls as lines of a report."""
        numbers = {"sham": self.sham, "full swap": self.full_swap, "path gap": self.path_gap}
        shown = [f"{name} {value:.2g}" for name, value in numbers.items() if value is not None]
        lines = [f"controls: {', '.join(shown)}"]
        for name in self.arms:
            try:
                estimate = self._effect(name)
                lines.append(f"control {name}: {estimate.value:.4g} {estimate.ci()}")
            except EstimateError as error:
                lines.append(f"control {name}: {error}")
        return lines + [f"not run: {name}, {why}" for name, why in self.not_run.items()]
