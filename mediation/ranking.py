"""Which cells of a map matter most: chosen on one half of the examples, for the other half."""

from typing import Any

import numpy as np

from imaginelens.hooks import Pairs
from imaginelens.hooks.errors import InputError
from imaginelens.hooks.metrics import Metric
from imaginelens.hooks.patching import Context
from imaginelens.mediation.cells import Cell
from imaginelens.mediation.effect_map import EffectMap
from imaginelens.mediation.ends import Direction
from imaginelens.mediation.folds import two_folds
from imaginelens.mediation.map_axes import means

Rows = np.ndarray  # numbers of examples


def halves(effects: EffectMap, pairs: Pairs, *, seed: int) -> tuple[Rows, Rows]:
    """Split the examples of a map in two, each group on one side: to choose by, and to test on.

    Raises:
        InputError: the map is of another number of examples, or they are too few to split.
    """
    if effects.n != len(pairs):
        raise InputError(
            f"the map holds {effects.n} examples and there are {len(pairs)} pairs; give the pairs "
            "that the map was made of"
        )
    labels = range(effects.n) if pairs.groups is None else pairs.groups
    fold = two_folds(list(labels), seed=seed)
    if len(set(fold)) < 2:
        raise InputError(
            "all pairs are of one group, so that they cannot be split into those to choose cells "
            "by and those to test on; give more groups, or name the cells"
        )
    return np.flatnonzero(fold == 0), np.flatnonzero(fold == 1)


def ranked(effects: EffectMap, rows: Rows) -> list[Cell]:
    """The cells of a map, from the one that moves these examples' metric furthest on the way from
    this run to the other one; without another run, furthest.

    >>> cells = [Cell("z", layer, "latent[0]", None, ()) for layer in (0, 1, 2)]
    >>> found = EffectMap.from_arrays(
    ...     cells=cells, before=[0.0], other=[-2.0], after=[[1.0], [-1.5], [0.0]])
    >>> [cell.layer for cell in ranked(found, np.array([0]))]
    [1, 2, 0]
    """
    mean = means(effects.effect[:, rows])
    if effects.other is None:
        score = np.abs(mean)
    else:
        score = mean * np.sign(means((effects.other - effects.before)[None, rows]))
    order = np.argsort(-np.where(np.isnan(score), -np.inf, score), kind="stable")
    return [effects.cells[i] for i in order]


def check_size(k: object, n: int) -> int:
    """Refuse a number of cells that cannot be chosen among `n`."""
    if type(k) is not int or not 1 <= k <= n:
        raise InputError(f"k is {k!r}, expected a number of cells from 1 to {n}")
    return k


def settings_of(
    cells: Any, metric: Metric, direction: Direction | None, context: Context | None
) -> tuple[Direction, Context]:
    """The direction and context of a map, or those that are given.

    Raises:
        InputError: the map has another metric, direction or context, or a mixture of two.
    """
    if not isinstance(cells, EffectMap):
        return direction or "denoise", context or "free"
    for name, given in (("metric", metric.name), ("direction", direction), ("context", context)):
        held = getattr(cells, name)
        if given is not None and given != held:
            raise InputError(f"the map's {name} is {held!r}, and {given!r} was given; use the same")
    if cells.direction == "mixed" or cells.context == "mixed":
        raise InputError(
            "the map is a mixture of directions or contexts; give one that il.sweep has made"
        )
    return cells.direction, cells.context
