"""States lined up by example and ordinal: what donors give and what references are summed from."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Shaped

from imaginelens.hooks.errors import DonorError
from imaginelens.hooks.positions import Positions


@dataclass(frozen=True)
class States:
    """States of several examples at the positions that one selector picked, in order.

    Attributes:
        values: (example, ordinal, ...), zero where the mask is False.
        mask: which ordinals each example really has.
        keys: what identifies each example, where that is known.
    """

    values: Shaped[torch.Tensor, "example ordinal ..."]
    mask: Bool[torch.Tensor, "example ordinal"]
    keys: tuple[str, ...] | None = None

    def __len__(self) -> int:
        return len(self.values)

    def counts(self) -> list[int]:
        """How many states each example has."""
        return [int(n) for n in self.mask.sum(1)]

    def pooled(self, ordinal: int) -> Shaped[torch.Tensor, "example ..."]:
        """The states of all examples that have this ordinal."""
        if ordinal >= self.mask.shape[1] or not self.mask[:, ordinal].any():
            raise DonorError(
                f"the reference has no state number {ordinal} at this selector: its examples have "
                f"{_range(self.counts())}; use a reference that emitted as many steps"
            )
        return self.values[self.mask[:, ordinal], ordinal]


@runtime_checkable
class GivesStates(Protocol):
    """What can be a donor or a reference: a `Run`, or anything that answers for a site."""

    def states(self, site: str, at: Positions) -> States:
        """The states at a site and selector."""
        ...


Donor = GivesStates | States | torch.Tensor


def states_of(donor: Donor, site: str, at: Positions) -> States:
    """Ask a donor for its states; a tensor (example, ordinal, ...) answers for every site."""
    if isinstance(donor, States):
        return donor
    if isinstance(donor, torch.Tensor):
        if donor.dim() < 3:
            raise DonorError(
                f"a donor tensor of shape {tuple(donor.shape)} has no (example, ordinal) axes; "
                "add them, e.g. tensor[None, None] for one state used in every example"
            )
        return States(donor, torch.ones(donor.shape[:2], dtype=torch.bool))
    return donor.states(site, at)


def pad(rows: Sequence[torch.Tensor]) -> States:
    """Stack rows of unequal length into `States`.

    >>> pad([torch.ones(2, 3), torch.ones(0, 3)]).counts()
    [2, 0]
    """
    width = max((len(row) for row in rows), default=0)
    mask = torch.tensor([[k < len(row) for k in range(width)] for row in rows], dtype=torch.bool)
    mask = mask.reshape(len(rows), width)
    values = torch.stack([torch.cat([r, r.new_zeros(width - len(r), *r.shape[1:])]) for r in rows])
    return States(values, mask)


def _range(counts: list[int]) -> str:
    low, high = min(counts, default=0), max(counts, default=0)
    return f"{low}" if low == high else f"{low} to {high}"
