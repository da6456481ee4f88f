"""A grid of step by site as lines of text."""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool, Float

_MOST = 12  # rows and columns


def lines(
    values: Float[np.ndarray, "step site"],
    sites: Sequence[str],
    marked: Bool[np.ndarray, "step site"],
) -> list[str]:
    """Sites (the lowest at the bottom) by steps, at most 12 of each; a star where marked.

    >>> print(*lines(np.array([[0.5], [1.0]]), ["layer 0"], np.array([[False], [True]])), sep="|")
               step 0   step 1|  layer 0   0.500    1.000*
    """
    steps, count = values.shape
    columns, rows = _some(steps), _some(count)
    width = max(len(sites[k]) for k in rows)
    found = ["  " + " " * width + "".join(f"{f'step {s}':>9}" for s in columns)]
    for k in reversed(rows):
        cells = (
            "       - "
            if np.isnan(values[s, k])
            else f"{values[s, k]:8.3f}{'*' if marked[s, k] else ' '}"
            for s in columns
        )
        found.append((f"  {sites[k]:<{width}}" + "".join(cells)).rstrip())
    left = [f"{count - len(rows)} sites"] * (len(rows) < count)
    left += [f"{steps - len(columns)} steps"] * (len(columns) < steps)
    return found + [f"  ({' and '.join(left)} not shown)"] * bool(left)


def _some(count: int) -> list[int]:
    """At most so many of the numbers 0 to count - 1, evenly, with the first and the last."""
    return sorted({round(i) for i in np.linspace(0, count - 1, min(count, _MOST)).tolist()})
