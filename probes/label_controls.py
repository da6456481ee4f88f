"""Controls made from the labels or the states: shuffled labels, control task, random features."""

from collections import Counter
from collections.abc import Sequence
from math import lgamma, log
from typing import Any

import numpy as np
from jaxtyping import Int, Shaped

from imaginelens.probes.selecting import Rows

# Random streams are seeded with [seed, k], so that none is the one that a user's own seed gives.
ENOUGH = log(1000)  # log of how many arrangements a permutation test should draw from


def shuffles(
    y: Shaped[np.ndarray, " row"],
    folds: Int[np.ndarray, " row"],
    groups: Int[np.ndarray, " row"] | None,
    *,
    n: int,
    seed: int,
) -> tuple[Int[np.ndarray, "shuffle row"], float]:
    """Random orders of the labels, and the log of how many orders there are to draw from.

    Whole groups change places, with groups of their size in their fold: what labels have in common
    within a group stays, and so does the balance of the folds, on which a cross-validated accuracy
    depends; and rows change places within their group, or groups that each have one row of every
    class would stay as they are. Where that leaves too few orders, groups of one label each change
    places with any group of their fold, and at last with any group of their size.

    >>> y, folds = np.arange(20) % 2, np.arange(20) // 10
    >>> orders, _ = shuffles(y, folds, None, n=20, seed=0)
    >>> set(folds[orders[:, 0]].tolist())
    {0}
    """
    codes = np.arange(len(y)) if groups is None else np.unique(groups, return_inverse=True)[1]
    members = [np.flatnonzero(codes == code) for code in range(int(codes.max()) + 1)]
    if groups is None:
        members = list(np.arange(len(y))[:, None])
    fold = [int(folds[each[0]]) for each in members]
    plain = all((y[each] == y[each[0]]).all() for each in members)
    kinds: list[list[Any]] = [[(f, len(each)) for f, each in zip(fold, members, strict=True)]]
    if plain:
        kinds.append(list(fold))
    kinds.append([len(each) for each in members])
    if plain:
        kinds.append([0] * len(members))
    blocks = [tuple(sorted(y[each].tolist()))[: 1 if plain else None] for each in members]
    inside = 0.0 if plain else sum(_arrangements([0] * len(block), block) for block in blocks)
    amounts = [_arrangements(kind, blocks) + inside for kind in kinds]
    pick = next((i for i, a in enumerate(amounts) if a >= ENOUGH), int(np.argmax(amounts)))
    rng, orders = np.random.default_rng([seed, 1]), np.empty((n, len(y)), dtype=np.int64)
    classes: dict[Any, list[int]] = {}
    for i, key in enumerate(kinds[pick]):
        classes.setdefault(key, []).append(i)
    for order in orders:
        for same in classes.values():
            for to, source in zip(same, rng.permutation(same), strict=True):
                # a group of another size has one label, so that any row of it will do
                order[members[to]] = np.resize(rng.permutation(members[source]), len(members[to]))
    return orders, amounts[pick]


def control_labels(
    y: Shaped[np.ndarray, " row"], types: Int[np.ndarray, " row"], *, seed: int
) -> Shaped[np.ndarray, " row"]:
    """A random label for each type, as frequent as the true ones: the control task.

    Hewitt and Liang 2019 (arXiv 1909.03368). A probe that does well here does so by remembering
    types, not by reading what states say.

    >>> control_labels(np.array([0, 0, 1, 1]), np.array([0, 0, 1, 1]), seed=0).tolist()
    [0, 0, 1, 1]
    """
    codes = np.unique(types, return_inverse=True)[1]
    n_types = int(codes.max()) + 1
    spread = np.sort(y)[((np.arange(n_types) + 0.5) * len(y) / n_types).astype(int)]
    return np.random.default_rng([seed, 2]).permutation(spread)[codes]


def random_features(x: Rows, *, seed: int) -> Rows:
    """Random directions, each as long as the state in whose place it stands.

    What can be read here is carried by the norm alone, or is no reading at all.
    """
    drawn = np.random.default_rng([seed, 3]).standard_normal(x.shape)
    drawn /= np.linalg.norm(drawn, axis=-1, keepdims=True)
    return drawn * np.linalg.norm(x, axis=-1, keepdims=True)


def _arrangements(keys: Sequence[Any], blocks: Sequence[Any]) -> float:
    """The log of how many different results there are of permuting blocks of an equal key."""
    places, alike = Counter(keys), Counter(zip(keys, blocks, strict=True))
    return sum(lgamma(n + 1) for n in places.values()) - sum(lgamma(n + 1) for n in alike.values())
