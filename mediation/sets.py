"""Sets of cells that are swapped together: the effect of each set, per example."""

from collections.abc import Sequence

import numpy as np

from imaginelens.hooks import LatentModel, Pairs, Swap
from imaginelens.hooks.metrics import Metric
from imaginelens.hooks.patching import Context
from imaginelens.hooks.reading_selectors import parse_selector
from imaginelens.mediation.cells import Cell
from imaginelens.mediation.effect_map import EffectMap
from imaginelens.mediation.ends import Direction, Ends, batches, ends_of
from imaginelens.mediation.joint import Part, part, together
from imaginelens.mediation.sweep import joined


def sets_map(
    lens: LatentModel,
    pairs: Pairs,
    sets: Sequence[Sequence[Cell]],
    *,
    metric: Metric,
    direction: Direction,
    context: Context,
    batch_size: int,
    seed: int,
) -> EffectMap:
    """The map of sets of cells, one coordinate each: all cells of a set receive the other run's
    states at once, in one forward or generation. An empty set changes nothing."""
    every = list(dict.fromkeys(cell for one in sets for cell in one))
    states = [(site, parse_selector(cell.position)) for cell in every for site in cell.sites]
    found = []
    for some in batches(pairs, batch_size, "sets"):
        ends = ends_of(
            lens, some, metric=metric, direction=direction, context=context, states=states
        )
        found.append(_measured(ends, sets, seed))
    return joined(found)


def _measured(ends: Ends, sets: Sequence[Sequence[Cell]], seed: int) -> EffectMap:
    before = ends.value(ends.before)
    after = np.repeat(before[None], len(sets), axis=0)
    flags = np.zeros(after.shape, dtype=np.int8)
    change = np.full(after.shape, np.nan)
    for i, cells in enumerate(sets):
        if not cells:
            continue
        joint = together(
            ends.lens, ends.run, ends.before, parts_of(ends, cells), context=ends.context
        )
        after[i], flags[i], change[i] = ends.value(joint.after), joint.flags, joint.change
        ends.forwards += joint.forwards
    return ends.map(
        [Cell("set", None, _named(i, cells), None, _sites(cells)) for i, cells in enumerate(sets)],
        seed=seed,
        formula=f"{ends.metric.name}(set patched) - {ends.metric.name}(unpatched), "
        f"{ends.direction}, {ends.context} context",
        after=after,
        flags=flags,
        change=change,
        edit="Swap of all cells of a set",
    )


def parts_of(ends: Ends, cells: Sequence[Cell]) -> list[Part]:
    """The swaps of all of these cells."""
    edit = Swap(ends.donor)
    return [
        part(
            edit,
            parse_selector(cell.position),
            cell.sites,
            heads=None if cell.head is None else [cell.head],
        )
        for cell in cells
    ]


def _sites(cells: Sequence[Cell]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(site for cell in cells for site in cell.sites))


def _named(number: int, cells: Sequence[Cell]) -> str:
    return f"{number}: {len(cells)} cell{'s' * (len(cells) != 1)}"
