"""How alike states are: between inputs at one step, and between the steps of one input."""

from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int

from imaginelens.estimates.errors import EstimateError
from imaginelens.estimates.estimate import Estimate
from imaginelens.estimates.similarity import Kind, cosines, mean_offdiagonal, standardised


@dataclass(frozen=True, eq=False)
class Inter:
    """How alike one step's states are between inputs: three matrices of cosines, (input, input).

    Attributes:
        inputs: the numbers of the inputs that the rows stand for.
        raw, centred, whitened: see `imaginelens.estimates.similarity`. A centred matrix has a mean
            of about -1/(n - 1) whatever the states are; look at which pairs lie above it.
    """

    inputs: Int[np.ndarray, " input"]
    raw: Float[np.ndarray, "input input"]
    centred: Float[np.ndarray, "input input"]
    whitened: Float[np.ndarray, "input input"]

    @staticmethod
    def of(states: Float[np.ndarray, "input dim"], inputs: Int[np.ndarray, " input"]) -> "Inter":
        """All three matrices of one step's states.

        Raises:
            EstimateError: states are no finite numbers, or fewer than 2.
        """
        raw, centred, whitened = (
            cosines(states, kind=kind) for kind in ("raw", "centred", "whitened")
        )
        return Inter(inputs, raw, centred, whitened)

    def mean(self, kind: Kind = "raw") -> float:
        """The mean cosine of all pairs of different inputs; nan where states have no direction."""
        return mean_offdiagonal(getattr(self, kind))


@dataclass(frozen=True, eq=False)
class Intra:
    """How alike the steps of one input are, averaged over inputs.

    Centring takes away the mean of all steps of all inputs.
    """

    states: Float[np.ndarray, "input step dim"]
    mask: Bool[np.ndarray, "input step"]
    units: Int[np.ndarray, " input"]

    def per_input(self, kind: Kind = "raw") -> Float[np.ndarray, "input step step"]:
        """The cosines of the steps of each input; nan where it has not both."""
        moved = standardised(self.states[self.mask], kind=kind)
        norms = np.linalg.norm(moved, axis=1, keepdims=True)
        unit = np.full((*self.mask.shape, moved.shape[1]), np.nan)
        unit[self.mask] = np.divide(moved, norms, out=np.full_like(moved, np.nan), where=norms > 0)
        return np.einsum("isd,itd->ist", unit, unit)

    def matrix(self, kind: Kind = "raw") -> Float[np.ndarray, "step step"]:
        """The mean cosine of every two steps."""
        return mean(self.per_input(kind))

    def between(self, first: int, second: int, *, kind: Kind = "raw") -> Estimate:
        """The mean cosine of two steps, as an `Estimate` over inputs (over pairs or groups).

        Raises:
            EstimateError: fewer than 2 inputs have both steps.
        """
        values = self.per_input(kind)[:, first, second]
        return Estimate.mean(
            by_unit(values, self.units), name=f"{kind} cosine of steps {first} and {second}"
        )

    def adjacent(self, *, kind: Kind = "raw") -> Estimate:
        """The mean cosine of steps that follow each other, as an `Estimate`.

        Raises:
            EstimateError: there is only one step, or fewer than 2 inputs have two that follow.
        """
        if self.mask.shape[1] < 2:
            raise EstimateError(
                "there is 1 step, which follows no other; look at .inter(0), or at more steps"
            )
        found = self.per_input(kind)
        steps = np.arange(found.shape[1] - 1)
        values = mean(found[:, steps, steps + 1].T)
        return Estimate.mean(by_unit(values, self.units), name=f"{kind} cosine of adjacent steps")


def mean(values: np.ndarray) -> Any:
    """The mean over the first axis of what is not nan; nan where all is."""
    there = ~np.isnan(values)
    count = there.sum(0)
    total = np.where(there, values, 0.0).sum(0)
    return np.divide(total, count, out=np.full(np.shape(total), np.nan), where=count > 0)[()]


def by_unit(
    values: Float[np.ndarray, " example"], units: Int[np.ndarray, " example"]
) -> Float[np.ndarray, " unit"]:
    """The mean of each unit's values, so that dependent ones count as one."""
    return np.array([mean(values[units == unit]) for unit in np.unique(units)])
