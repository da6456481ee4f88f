"""What the published "no effect" of latent tokens can support: arXiv 2602.22766, its do(Z) tables.

The paper replaces the latents and reports accuracies, without intervals and without how many
answers changed. The net change is known; the discordance is not, so the margins are given for some.
"""

from dataclasses import dataclass
from functools import cache
from typing import Literal

from imaginelens.estimates.errors import EstimateError
from imaginelens.estimates.planner import sample_size, smallest_margin

DISCORDANCES = (0.02, 0.05, 0.10, 0.20)
_PAPER_MARGIN = 0.03


@dataclass(frozen=True)
class PublishedRow:
    """One intervention on one model and benchmark.

    Attributes:
        before, after: the accuracies as printed, in percent; those of VSP are cut, not rounded.
        net: how many answers more were right with the intervention than without; -13 is 13 fewer.
        n: examples, and where that number is from.
        note: what else to know before reading the row's margins.
    """

    model: str
    benchmark: str
    intervention: str
    before: float
    after: float
    net: int
    n: int
    n_from: Literal["benchmark", "memory", "inferred"]
    note: str = ""

    def smallest_margin(self, discordance: float) -> float | None:
        """The smallest margin within which the row shows equivalence, if that share of answers
        changed; None where the net change alone is more.

        Raises:
            EstimateError: the discordance is no share.

        >>> round(100 * published_rows()[0].smallest_margin(0.10), 1)
        4.5
        """
        if 0 <= discordance < abs(self.net) / self.n:
            return None
        return smallest_margin(self.n, discordance=discordance, difference=self.net / self.n)

    def margins(self) -> dict[float, float | None]:
        """`smallest_margin` by discordance: 2, 5, 10 and 20%."""
        return {share: self.smallest_margin(share) for share in DISCORDANCES}

    def examples_needed(self, *, margin: float = _PAPER_MARGIN) -> dict[float, int]:
        """How many examples would have shown equivalence with 80% power, by discordance.

        They are for a true difference of 0, unclustered: the same for every row, so compare with n.

        Raises:
            EstimateError: the margin is no share.

        >>> published_rows()[0].examples_needed()
        {0.02: 281, 0.05: 520, 0.1: 974, 0.2: 1913}
        """
        return {share: _needed(margin, share) for share in DISCORDANCES}


def published_rows() -> tuple[PublishedRow, ...]:
    """The paper's do(Z) tables, to read with the margin each row supports.

    The numbers of V* and HR-Bench-4K are the benchmarks' own; that of MME-RealWorld-Lite is from
    memory; that of VSP is inferred from the accuracies, which are all multiples of 0.25%.

    >>> for row in published_rows()[:3]:
    ...     margins = [f"{100 * margin:.1f}" for margin in row.margins().values()]
    ...     print(row.benchmark, row.n, row.net, margins)
    V* 191 1 ['3.0', '3.7', '4.5', '6.0']
    HR-Bench-4K 800 -8 ['1.9', '2.4', '2.9', '3.6']
    MME-RealWorld-Lite 1919 -13 ['1.2', '1.5', '1.9', '2.4']
    """
    return (*_monet(), *_mirage())


def _monet() -> tuple[PublishedRow, ...]:
    same = "one tensor for all latents"
    options = "its 800 may be 200 questions with their options in 4 orders: then it supports less"
    return (
        PublishedRow("Monet", "V*", same, 82.7, 83.3, 1, 191, "benchmark"),
        PublishedRow("Monet", "HR-Bench-4K", same, 71.1, 70.1, -8, 800, "benchmark", options),
        PublishedRow("Monet", "MME-RealWorld-Lite", same, 46.9, 46.2, -13, 1919, "memory"),
    )


def _mirage() -> tuple[PublishedRow, ...]:
    edits = ("one tensor for all latents", "latent + noise", "noise alone", "near zero")
    loop = "the text degenerates into repetition, which says nothing about what the latents mean"
    stages = {
        1: (64.2, (64.0, 64.0, 64.5, 65.0), (-1, -1, 1, 3), ("",) * 4),
        2: (77.0, (77.2, 76.7, 76.2, 35.5), (1, -1, -3, -166), ("", "", "", loop)),
    }
    return tuple(
        PublishedRow(f"Mirage stage {k}", "VSP", edit, before, after, net, 400, "inferred", note)
        for k, (before, afters, nets, notes) in stages.items()
        for edit, after, net, note in zip(edits, afters, nets, notes, strict=True)
    )


@cache
def _needed(margin: float, discordance: float) -> int:
    if not 0 < margin < 1:
        raise EstimateError(f"a margin of {margin:g} is no share; give 0.03 for 3 points")
    return sample_size(margin=margin, discordance=discordance)
