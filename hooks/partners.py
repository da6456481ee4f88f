"""Partners: which other example is the source of each one, drawn by a seed."""

from collections.abc import Hashable, Sequence
from typing import Any

import numpy as np
from jaxtyping import Int

from imaginelens.hooks.errors import InputError


def draw_partners(
    answers: Sequence[str], groups: Sequence[Any] | None = None, *, seed: int = 0
) -> list[int]:
    """Draw for each example another one with another answer and, where groups are given, of
    another group.

    The partners are a permutation, so that each example is the source once, as far as answers and
    groups allow; the examples left over (of an answer that more than half of all have, say) draw
    among those that are sources already.

    Raises:
        InputError: an example has no possible partner.

    >>> draw_partners(["a", "b"])
    [1, 0]
    """
    kinds = _numbered([answer.strip().casefold() for answer in answers])
    own = np.arange(len(kinds)) if groups is None else _numbered(groups)

    def fits(row: Any, partner: Any) -> Any:
        return (kinds[row] != kinds[partner]) & (own[row] != own[partner])

    everyone = np.arange(len(kinds))
    for i in range(len(kinds)):
        if not fits(i, everyone).any():
            where = "" if groups is None else " in another group"
            raise InputError(
                f"example {i} has the answer {answers[i]!r}, and none of the {len(kinds)} examples"
                f"{where} has another one; add such examples, or give each its source"
            )
    rng = np.random.default_rng(seed)
    partner = rng.permutation(len(kinds))
    left = len(kinds) + 1
    while 0 < (wrong := int((~fits(everyone, partner)).sum())) < left:
        left = wrong  # exchange partners for as long as that helps
        for i in rng.permutation(len(kinds)):
            if not fits(i, partner[i]):
                takers = np.flatnonzero(fits(i, partner) & fits(everyone, partner[i]))
                if len(takers):
                    j = rng.choice(takers)
                    partner[i], partner[j] = partner[j], partner[i]
    for row in np.flatnonzero(~fits(everyone, partner)):
        partner[row] = rng.choice(np.flatnonzero(fits(row, everyone)))
    return [int(k) for k in partner]


def _numbered(values: Sequence[Hashable]) -> Int[np.ndarray, " example"]:
    """Equal values get equal numbers."""
    number: dict[Hashable, int] = {}
    return np.array([number.setdefault(value, len(number)) for value in values], dtype=int)
