"""Labels in other orders: what a label that says nothing about the states would look like."""

from collections.abc import Iterator

import numpy as np
from jaxtyping import Int, Shaped

from imaginelens.probes.label_controls import shuffles


def permuted(
    y: Shaped[np.ndarray, " row"],
    folds: Int[np.ndarray, " row"],
    groups: Int[np.ndarray, " row"] | None,
    *,
    n: int,
    seed: int,
) -> Iterator[Shaped[np.ndarray, " row"]]:
    """The labels n times over, within folds: groups change places, and rows within groups.

    Given the folds, rows whose states do not depend on the labels may change places so.

    >>> labels = np.array([0, 1, 0, 1])
    >>> found = permuted(labels, np.zeros(4, int), np.array([0, 0, 1, 1]), n=40, seed=0)
    >>> sorted({tuple(each.tolist()) for each in found})
    [(0, 1, 0, 1), (0, 1, 1, 0), (1, 0, 0, 1), (1, 0, 1, 0)]
    """
    orders, _ = shuffles(y, folds, groups, n=n, seed=seed)
    yield from (y[order] for order in orders)
