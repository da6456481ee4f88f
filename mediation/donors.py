"""What a study's worlds receive: states of picked examples, and the mean of all other groups."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from imaginelens.hooks import Run
from imaginelens.hooks.positions import Positions
from imaginelens.hooks.states import States, pad
from imaginelens.mediation.alignment import Chosen, FirstOf


@dataclass(frozen=True)
class Picked:
    """One example's states for each row that receives some, as many as that row takes.

    Where an example has fewer, its last one is repeated; where it has none, it gives none.

    Attributes:
        examples: a run and a row of it, for each receiving row.
        counts: how many states each receiving row takes.
    """

    examples: tuple[tuple[Run, int], ...]
    counts: tuple[int, ...]

    def states(self, site: str, at: Positions) -> States:
        """The states at a site, for the rows of the run that receives them."""
        numbers = at.numbers if isinstance(at, Chosen) else tuple(range(max(self.counts)))
        plain = at.of if isinstance(at, Chosen) else at
        plain = plain.of if isinstance(plain, FirstOf) else plain
        runs = {id(run): run for run, _ in self.examples}
        given = {key: run.states(site, plain) for key, run in runs.items()}
        rows = []
        for (run, row), count in zip(self.examples, self.counts, strict=True):
            whole = given[id(run)]
            own = whole.values[row][whole.mask[row]]
            taken = [min(k, len(own) - 1) for k in numbers if k < count] if len(own) else []
            rows.append(own[taken])
        return pad(rows)


@dataclass(frozen=True)
class Prepared:
    """States that were worked out before, by site."""

    by_site: Mapping[str, States]

    def states(self, site: str, at: Positions) -> States:
        """The states at a site, whatever the selector."""
        return self.by_site[site]


def means_of_others(
    whole: States, labels: Sequence[object], own: Sequence[tuple[object, str, str]]
) -> States:
    """For each row the mean state of all other groups, at each ordinal.

    An input can be in several pairs, so what is equal to the row's own inputs is left out, too.

    Args:
        whole: the states of all runs.
        labels: the group of each of their rows.
        own: of each row that receives them its group, and the keys of its two inputs.
    """
    assert whole.keys is not None
    given = list(zip(labels, whole.keys, strict=True))
    other = torch.tensor(
        [[float(label != g and key not in keys) for g, key in given] for label, *keys in own],
        dtype=torch.float64,
        device=whole.values.device,
    )
    mask = whole.mask.to(other)
    number = other @ mask
    axes = [1] * (whole.values.dim() - 2)
    total = (whole.values.double() * mask.reshape(*mask.shape, *axes)).flatten(1)
    mean = (other @ total).reshape(len(own), *whole.values.shape[1:])
    mean = mean / number.clamp(min=1).reshape(*number.shape, *axes)
    return States(mean.to(whole.values), (number > 0).cpu())
