"""Heat-maps of effects: layer by step, region or head, a panel for each site."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from imaginelens.hooks.errors import InputError
from imaginelens.hooks.positions import Positions
from imaginelens.mediation.cells import Cell
from imaginelens.mediation.effect_map import EffectMap
from imaginelens.view.figure import Figure
from imaginelens.view.numerals import precise
from imaginelens.view.panels import Palette, Panel, Sheet, draw

AXES = ("layer", "position", "head")


def heatmap(
    found: EffectMap,
    *,
    level: float = 0.95,
    limit: float | None = None,
    palette: Palette = "RdBu",
    title: str | None = None,
    labels: Mapping[Positions, str] | None = None,
) -> Figure:
    """Draw a map of effects: a panel for each site, layers down, positions or heads across.

    Positions come in the order of the map: steps, or the regions that a sweep was given.

    White is no effect, grey was not measured; an outlined cell's interval (of that cell alone)
    leaves out 0. The figure is returned, not shown.

    Args:
        level: of the intervals, 0 to 1.
        limit: where the colour scale ends, so that several figures can share it.
        palette: "RdBu", or "PuOr".
        labels: what to call positions, such as `{question: "question"}`.

    Raises:
        InputError: `limit` is not above 0, or the map has no position that `labels` names.
    """
    names = _named(found, labels or {})
    if limit is not None and not (np.isfinite(limit) and limit > 0):
        raise InputError(f"limit={limit} cannot end a colour scale; give a number above 0")
    panels = [_panel(found, part, level, names) for part in _parts(found, names)]
    unit = found.unit or found.metric
    words = title or f"{found.edit}, {found.direction}, {found.context} context"
    return draw(
        Sheet(panels, words, f"effect on {unit}", limit=limit, marks=marks(found)), palette=palette
    )


@dataclass(frozen=True)
class _Part:
    """The cells of one panel, and which coordinates go down and across."""

    title: str
    rows: tuple[int, ...]
    down: str
    across: str


def _named(found: EffectMap, labels: Mapping[Positions, str]) -> dict[str, str]:
    """What each position is called: as it is written, if nothing else was said."""
    names = {cell.position: cell.position for cell in found.cells}
    for at, name in labels.items():
        if repr(at) not in names:
            raise InputError(f"labels names {at!r}, and the map has {', '.join(names)}")
        names[repr(at)] = name
    return names


def _parts(found: EffectMap, names: Mapping[str, str]) -> list[_Part]:
    """A panel for each site, and for each position if heads go across."""
    axes = [name for name in AXES if len({getattr(c, name) for c in found.cells}) > 1]
    across = "head" if "head" in axes else "position"
    down = next((name for name in axes if name != across), "layer")
    (rest,) = set(AXES) - {down, across}
    by: dict[tuple[str, object], list[int]] = {}
    for row, cell in enumerate(found.cells):
        by.setdefault((cell.site, getattr(cell, rest)), []).append(row)
    several = len({value for _, value in by}) > 1
    return [
        _Part(
            f"{site}, {names.get(str(value), value)}" if several else site,
            tuple(rows),
            down,
            across,
        )
        for (site, value), rows in by.items()
    ]


def _panel(found: EffectMap, part: _Part, level: float, names: Mapping[str, str]) -> Panel:
    cells = [found.cells[row] for row in part.rows]
    rows, columns = (_ordered(cells, name) for name in (part.down, part.across))
    values = np.full((len(rows), len(columns)), np.nan)
    outlined = np.zeros(values.shape, dtype=bool)
    hover = [["not measured"] * len(columns) for _ in rows]
    for row, cell in zip(part.rows, cells, strict=True):
        i = rows.index(getattr(cell, part.down))
        j = columns.index(getattr(cell, part.across))
        effects = found.effect[row]
        there = ~np.isnan(effects)
        values[i, j] = effects[there].mean() if there.any() else np.nan
        told = _told(found, row, cell, level)
        hover[i][j], outlined[i, j] = told
    return Panel(
        values, [_label(r, part.down, names) for r in rows],
        [_label(c, part.across, names) for c in columns], part.down, part.across, part.title,
        hover, outlined,
    )  # fmt: skip


def _told(found: EffectMap, row: int, cell: Cell, level: float) -> tuple[str, bool]:
    """What a cell says, and whether its interval leaves out 0."""
    place = [("site", cell.site), ("layer", cell.layer), ("position", cell.position),
             ("head", cell.head)]  # fmt: skip
    lines = [f"{name}: {value}" for name, value in place if value is not None]
    effects = found.effect[row]
    there = ~np.isnan(effects)
    if not there.any():
        return "\n".join([*lines, "not measured"]), False
    lines.append(f"effect: {precise(float(effects[there].mean()))}")
    estimate, outside = found.estimates[row], False
    if estimate is not None:
        interval = estimate.ci(level=level)
        lines.append(f"{level:.0%} interval: {interval}")
        outside = 0.0 not in interval
    before, after = found.before[there].mean(), found.outcome[row][there].mean()
    lines.append(f"n: {int(there.sum())}")
    lines.append(f"{found.metric}: {precise(float(before))} → {precise(float(after))}")
    untouched = int(found.untouched[row].sum())
    if untouched:
        lines.append(f"nothing to change in {untouched} examples (effect 0)")
    return "\n".join(lines), bool(outside)


def _ordered(cells: Sequence[Cell], name: str) -> list[object]:
    """The values of an axis in the order they come, numbers in theirs."""
    values = list(dict.fromkeys(getattr(cell, name) for cell in cells))
    if all(isinstance(value, int) for value in values):
        return sorted(values)
    return values


def _label(value: object, axis: str, names: Mapping[str, str]) -> str:
    if value is None:
        return "whole" if axis == "head" else ""
    return names[str(value)] if axis == "position" else str(value)


def marks(found: EffectMap) -> list[str]:
    """What a picture must not be looked at without."""
    told = ["single example: no interval"] if found.n == 1 else []
    told += ["no controls: no sham was run"] if found.sham is None else []
    return told
