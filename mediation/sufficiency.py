"""Do the best cells of a map do it together, and do they do more than others would?

Cells that were found best on some examples look better there than they are. So they are chosen on
one half of the pairs, and tested on the other.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations, product
from math import comb, prod
from typing import Any

import numpy as np
from jaxtyping import Float

from imaginelens.estimates import Estimate
from imaginelens.estimates.errors import spoken
from imaginelens.hooks import LatentModel, Pairs
from imaginelens.hooks.errors import InputError
from imaginelens.hooks.metrics import Metric, logit_diff
from imaginelens.hooks.patching import Context
from imaginelens.mediation.cells import Cell
from imaginelens.mediation.effect_map import EffectMap
from imaginelens.mediation.ends import Direction, check_study
from imaginelens.mediation.map_axes import means, name_of
from imaginelens.mediation.ranking import check_size, halves, ranked, settings_of
from imaginelens.mediation.result_files import Saved
from imaginelens.mediation.sets import sets_map


@dataclass(frozen=True, repr=False, eq=False)
class Sufficiency(Saved):
    """What some cells do when all of them are swapped together.

    Attributes:
        cells: those cells, the best one first.
        tested: the numbers of the pairs that it was measured on; none of them chose the cells.
        map: the map of the joint effect, with one coordinate.
    """

    cells: tuple[Cell, ...]
    tested: tuple[int, ...]
    map: EffectMap

    @property
    def effect(self) -> Estimate:
        """The joint effect, in the metric's unit."""
        return self.map[self.map.cells[0]]

    @property
    def recovery(self) -> Estimate:
        """Mean joint effect / mean total effect, with Fieller's interval: 1 is all of it when
        denoising, -1 when noising."""
        return self.map.recovery_at(self.map.cells[0])

    def __repr__(self) -> str:
        return f"Sufficiency of {_named(self.cells)}: {spoken(lambda: self.recovery)}"


@dataclass(frozen=True, repr=False, eq=False)
class Selectivity(Saved):
    """How much more some cells do together than as many others of the same kinds of sites.

    Attributes:
        cells: those cells, the best one first.
        tested: the numbers of the pairs that it was measured on; none of them chose the cells.
        effects: the joint effect of the chosen set, per example.
        random: those of the other sets.
        exhaustive: whether these are all the other sets there are.
        sign: 1 if the way from this run to the other one is upwards in the metric, or -1.
    """

    cells: tuple[Cell, ...]
    tested: tuple[int, ...]
    effects: Float[np.ndarray, " example"]
    random: Float[np.ndarray, "set example"]
    exhaustive: bool
    sign: float
    unit: str
    binary: bool
    groups: tuple[Any, ...] | None

    @property
    def difference(self) -> Estimate:
        """The joint effect minus the mean one of the other sets."""
        values = self.effects - self.random.mean(0)
        words: dict[str, Any] = {"name": "selectivity", "unit": self.unit, "groups": self.groups}
        if self.binary:
            return Estimate.bounded(values, low=-2.0, high=2.0, **words)
        return Estimate.mean(values, **words)

    @property
    def pvalue(self) -> float:
        """How often a set that was drawn at random does as much, the chosen one counted in: the
        p-value of "the chosen cells are like any others", for these examples."""
        return permutation_pvalue(
            float(self.sign * means(self.effects[None])[0]), self.sign * means(self.random)
        )

    def __repr__(self) -> str:
        n = len(self.random)
        return (
            f"Selectivity of {_named(self.cells)}: {spoken(lambda: self.difference)}; p = "
            f"{self.pvalue:.3g} among {'all ' if self.exhaustive else ''}{n} other sets"
        )


def sufficiency(
    lens: LatentModel,
    pairs: Pairs,
    cells: EffectMap | Sequence[Cell],
    *,
    k: int | None = None,
    metric: Metric = logit_diff,
    direction: Direction | None = None,
    context: Context | None = None,
    batch_size: int = 16,
    seed: int = 0,
) -> Sufficiency:
    """Swap the best `k` cells of a map together: how much of the total effect do they recover?

    The cells are chosen on one half of the pairs, groups together, and measured on the other.

    Args:
        cells: a map of these pairs, from `il.sweep`, or `il.attribute(...).to_map()`; or cells
            that were chosen beforehand, which are measured on all pairs.
        k: how many of a map's cells are chosen.
        metric: that of the map.
        direction, context: those of the map; without one, "denoise" and "free".

    Raises:
        InputError: an argument is not what it should be, or the map is of other pairs or another
            metric.
        EditTouchedNothing: the cells reach no example.

    >>> import imaginelens as il
    >>> from imaginelens.mediation.sweep import sweep
    >>> lens = il.load("latent-content")
    >>> task = lens.task(n=6, seed=0)
    >>> found = sufficiency(lens, task, sweep(lens, task, context="fixed"), k=1)
    >>> [(cell.layer, cell.position) for cell in found.cells], found.recovery.value > 0.5
    ([(0, 'latent[1]')], True)
    """
    direction, context = settings_of(cells, metric, direction, context)
    check_study(
        lens, pairs, metric=metric, direction=direction, context=context, batch_size=batch_size
    )
    if isinstance(cells, EffectMap):
        choosing, testing = halves(cells, pairs, seed=seed)
        chosen = tuple(ranked(cells, choosing)[: check_size(k, len(cells))])
    else:
        testing, chosen = np.arange(len(pairs)), _given(cells, k)
    measured = sets_map(
        lens, pairs.select(testing.tolist()), [chosen], metric=metric, direction=direction,
        context=context, batch_size=batch_size, seed=seed,
    )  # fmt: skip
    return Sufficiency(chosen, tuple(testing.tolist()), measured)


def selectivity(
    lens: LatentModel,
    pairs: Pairs,
    effects: EffectMap,
    *,
    k: int,
    draws: int = 99,
    metric: Metric = logit_diff,
    batch_size: int = 16,
    seed: int = 0,
) -> Selectivity:
    """Compare the joint effect of a map's best `k` cells with that of random sets of its cells.

    A random set has as many cells of each kind of site as the chosen one; where there are no more
    than `draws` such sets, all are taken. The cells are chosen on one half of the pairs, groups
    together, and all sets are measured on the other.

    Args:
        effects: a map of these pairs, from `il.sweep`, or `il.attribute(...).to_map()`.
        draws: how many random sets; the smallest possible p-value is 1 / (draws + 1).

    Raises:
        InputError: an argument is not what it should be, or there is no other set.
        EditTouchedNothing: no set reaches any example.

    >>> import imaginelens as il
    >>> from imaginelens.mediation.sweep import sweep
    >>> lens = il.load("latent-content")
    >>> task = lens.task(n=4, seed=0)
    >>> found = selectivity(lens, task, sweep(lens, task, context="fixed"), k=1)
    >>> found.pvalue, found.exhaustive  # one of six cells
    (0.16666666666666666, True)
    """
    direction, context = settings_of(effects, metric, None, None)
    check_study(
        lens, pairs, metric=metric, direction=direction, context=context, batch_size=batch_size
    )
    if type(draws) is not int or draws < 1:
        raise InputError(f"draws is {draws!r}, expected a number from 1 on")
    choosing, testing = halves(effects, pairs, seed=seed)
    chosen = tuple(ranked(effects, choosing)[: check_size(k, len(effects))])
    others, exhaustive = other_sets(effects.cells, chosen, draws=draws, seed=seed)
    measured = sets_map(
        lens, pairs.select(testing.tolist()), [chosen, *others], metric=metric,
        direction=direction, context=context, batch_size=batch_size, seed=seed,
    )  # fmt: skip
    assert measured.other is not None
    sign = -1.0 if means((measured.other - measured.before)[None])[0] < 0 else 1.0
    effect = measured.effect
    return Selectivity(
        chosen, tuple(testing.tolist()), effect[0], effect[1:], exhaustive, sign, measured.unit,
        measured.binary, measured.groups,
    )  # fmt: skip


def permutation_pvalue(chosen: float, others: Float[np.ndarray, " set"]) -> float:
    """The share of sets, the chosen one counted in, that do at least as much as it does; a set of
    which nothing is known counts as one that does.

    >>> permutation_pvalue(2.0, np.array([1.0, 2.0, 3.0]))
    0.75
    """
    return float((1 + (~(others < chosen)).sum()) / (1 + len(others)))


def other_sets(
    cells: Sequence[Cell], chosen: Sequence[Cell], *, draws: int, seed: int
) -> tuple[list[tuple[Cell, ...]], bool]:
    """Sets with as many cells of each kind of site as the chosen one, and whether these are all.

    Raises:
        InputError: there is none.

    >>> cells = [Cell("z", layer, "latent[0]", None, ()) for layer in (0, 1, 2)]
    >>> others, exhaustive = other_sets(cells, cells[:1], draws=9, seed=0)
    >>> [cell.layer for (cell,) in others], exhaustive
    ([1, 2], True)
    """
    kinds = {cell.site: [c for c in cells if c.site == cell.site] for cell in chosen}
    sizes = {kind: sum(cell.site == kind for cell in chosen) for kind in kinds}
    number = prod(comb(len(kinds[kind]), sizes[kind]) for kind in kinds) - 1
    if not number:
        raise InputError(
            f"there is no other set with as many cells of {', '.join(kinds)}; choose fewer cells, "
            "or make a map of more"
        )
    own = frozenset(chosen)
    if number <= draws:
        parts = [combinations(kinds[kind], sizes[kind]) for kind in kinds]
        every = [tuple(cell for some in one for cell in some) for one in product(*parts)]
        return [one for one in every if frozenset(one) != own], True
    rng = np.random.default_rng(seed)
    found: dict[frozenset[Cell], tuple[Cell, ...]] = {}
    while len(found) < draws:
        one = tuple(
            kinds[kind][int(i)]
            for kind in kinds
            for i in sorted(rng.choice(len(kinds[kind]), sizes[kind], replace=False))
        )
        if frozenset(one) != own:
            found[frozenset(one)] = one
    return list(found.values()), False


def _given(cells: Any, k: int | None) -> tuple[Cell, ...]:
    listed = tuple(cells)
    if not listed or not all(isinstance(cell, Cell) for cell in listed):
        raise InputError(f"cells is {cells!r}, expected a map, or some of its cells")
    if k is not None:
        raise InputError(f"k={k} chooses among a map's cells, and these are chosen; leave it out")
    return listed


def _named(cells: Sequence[Cell]) -> str:
    names = [name_of(cell) for cell in cells]
    more = f" and {len(names) - 2} more" if len(names) > 2 else ""
    return f"{len(names)} cell{'s' * (len(names) != 1)} ({'; '.join(names[:2])}{more})"
