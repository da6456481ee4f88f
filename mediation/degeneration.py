"""Degeneration: does a text repeat itself? Found in its token ids, whatever the language.

An edit that breaks the writing loses answers, too, without having removed anything they needed:
near-zero latents cost Mirage 41.5 points on VSP, because its texts ran on repeating themselves
(arXiv 2602.22766, do(Z)).
"""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool

from imaginelens.hooks import Run
from imaginelens.hooks.tokens import Kind

COPIES = 3  # how often a piece must follow itself to count as a loop
SHORTEST = 16  # tokens of the shortest loop: "0, 0, 0, 0" can be an answer
LONGEST_PIECE = 256  # tokens
HALF = 0.5


def loops(ids: Sequence[int] | np.ndarray) -> Bool[np.ndarray, " token"]:
    """Which tokens lie in a loop: a piece of 1 to 256 tokens that stands there three times or more
    in a row, 16 tokens or more in all. The last copy may be cut off.

    >>> loops([7, 8] + [1, 2, 3] * 6).tolist() == [False] * 2 + [True] * 18
    True
    """
    tokens = np.asarray(ids, dtype=np.int64)
    inside = np.zeros(len(tokens), dtype=bool)
    for period in range(1, min(LONGEST_PIECE, len(tokens) // COPIES) + 1):
        same = np.concatenate([[False], tokens[period:] == tokens[:-period], [False]])
        starts, stops = np.flatnonzero(np.diff(same)).reshape(-1, 2).T
        stops = stops + period
        long = stops - starts >= max(COPIES * period, SHORTEST)
        for start, stop in zip(starts[long], stops[long], strict=True):
            inside[start:stop] = True
    return inside


def repeats(ids: Sequence[int] | np.ndarray, *, ran_on: bool = False) -> bool:
    """Whether a text repeats itself: loops cover half of it, or it `ran_on` to the length limit
    and ends in one.

    A text that says the same in ever other words is not found; that it ran on is.

    >>> repeats([5, 6, 7] + [1, 2] * 20), repeats(range(40)), repeats([1, 1, 1])
    (True, False, False)
    """
    inside = loops(ids)
    if not len(inside):
        return False
    return bool(inside.mean() >= HALF or (ran_on and inside[-1]))


def written(run: Run, row: int) -> list[int]:
    """The token ids that a row wrote, latents and padding left out."""
    columns = np.arange(run.tokens.prompt_width, run.tokens.width)
    keep = run.tokens.kind[row, columns] != Kind.PAD
    keep &= ~np.isin(columns, run.tokens.latents(row))
    return run.tokens.ids[row, columns[keep]].tolist()


def ran_on(run: Run, row: int, *, limit: int, ends: Sequence[int]) -> bool:
    """Whether a row was cut off at `limit` tokens, latents included, before it wrote one of the
    `ends`."""
    real = np.flatnonzero(run.tokens.kind[row] != Kind.PAD)
    last = int(run.tokens.ids[row, real[-1]])
    # a latent that the length cut off, unread, is none: the row is one column shorter
    return len(real[real >= run.tokens.prompt_width]) >= limit - 1 and last not in ends
