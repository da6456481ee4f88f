"""A map as tables: in a terminal, and as data frames."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from imaginelens.estimates import Estimate
from imaginelens.mediation.effect_map import FLAGS, NOT_MEASURED, EffectMap
from imaginelens.mediation.map_axes import NAMES, flat, means

if TYPE_CHECKING:
    import pandas as pd

ROWS, COLUMNS = 12, 8  # of the table in a terminal
NAN = float("nan")
SPLIT = ("outside", "everything")  # intervals that two ends do not describe


def by_cell(map: EffectMap) -> "pd.DataFrame":
    """See `EffectMap.to_dataframe`."""
    import pandas as pd

    frame = pd.DataFrame(_coordinates(map))
    frame["n"] = (~np.isnan(map.effect)).sum(1)
    frame["missing"] = map.n - frame["n"]
    for flag, word in enumerate(FLAGS):
        if flag:
            frame[word] = (map.flags == flag).sum(1)
    frame["effect"] = means(map.effect)
    for name, column in _claims(map.estimates).items():
        frame[name] = column
    frame["p"] = [NAN if e is None else e.pvalue() for e in map.estimates]
    frame["change"] = means(map.change)
    if map.other is not None and map.direction != "mixed":
        frame["recovery"] = flat(map.cells, map.axes, map.recovery)
        for name, column in _claims(map.recoveries).items():
            frame[f"recovery_{name}"] = column
    return frame


def long(map: EffectMap) -> "pd.DataFrame":
    """One row per cell and example."""
    import pandas as pd

    cells, n = len(map), map.n
    frame = pd.DataFrame(_coordinates(map)).loc[np.repeat(np.arange(cells), n)]
    frame = frame.reset_index(drop=True)
    frame["example"] = np.tile(np.arange(n), cells)
    if map.keys:
        frame["key"] = list(map.keys) * cells
    if map.groups is not None:
        frame["group"] = list(map.groups) * cells
    frame["before"] = np.tile(map.before, cells)
    if map.other is not None:
        frame["other"] = np.tile(map.other, cells)
    frame["after"] = map.outcome.ravel()
    frame["effect"] = map.effect.ravel()
    frame["flag"] = np.array(FLAGS, dtype=object)[map.flags.ravel()]
    frame["change"] = map.change.ravel()
    return frame


def text(map: EffectMap) -> str:
    """What a terminal shows: the mean effects of one site, and what a reader must know."""
    lines = [*opening(map), *_table(map)]
    lines += [f"  {word}" for word in marks(map)]
    lines += [f"  note: {note}" for note in map.notes]
    return "\n".join([*lines, f"  {map.provenance}"] if map.provenance.model else lines)


def opening(map: EffectMap) -> list[str]:
    """What a map is, in two lines: the edit and the axes; the metric and how it was run."""
    sizes = " x ".join(
        f"{len(axis)} {name}{'s' * (len(axis) != 1)}" for name, axis in map.axes.items()
    )
    unit = f" ({map.unit})" if map.unit else ""
    few = f"{map.n} example{'s' * (map.n != 1)}"
    return [
        f"EffectMap: {map.edit}; {sizes}, {len(map)} cell{'s' * (len(map) != 1)}, {few}",
        f"  mean effect on {map.metric}{unit}, {map.direction}, {map.context} context",
    ]


def marks(map: EffectMap) -> list[str]:
    """What a number must not be read without."""
    marks = []
    if map.n == 1:
        marks.append("single example: no interval and no test")
    if map.sham is None:
        marks.append("no controls: the self-swap was not run on this path")
    else:
        worst = np.abs(map.sham[~np.isnan(map.sham)]).max(initial=0.0)
        marks.append(f"control: the self-swap changed the metric by at most {worst:.3g}")
    total = map.flags.size
    for flag, then in (
        (1, "had no state there; effect 0"),
        (2, "got a state equal to their own; effect 0"),
        (3, "were not measured"),
    ):
        count = int((map.flags == flag).sum())
        if count:
            marks.append(f"{count} of {total} cell x example {then} ({FLAGS[flag]})")
    lost = int((np.isnan(map.effect) & (map.flags != NOT_MEASURED)).sum())
    if lost:
        marks.append(f"{lost} of {total} cell x example are missing: no answer was found")
    return marks


def _table(map: EffectMap) -> list[str]:
    """Layers (the lowest at the bottom) by positions, or by heads, at one site."""
    axes, site = map.axes, map.axes["site"][0]
    across = "head" if len(axes.get("head", ())) > 1 else "position"
    part = map.sel(site=site)
    if across == "head":
        part = part.sel(position=part.axes["position"][0])
    if across not in part.axes:  # another site has heads
        across = "position"
    found = dict(
        zip(((c.layer, getattr(c, across)) for c in part), means(part.effect), strict=True)
    )
    columns = _shown(part.axes[across], COLUMNS)
    rows = [["", *("..." if c is ... else _heading(across, c) for c in columns)]]
    for layer in _shown(part.axes.get("layer", (None,))[::-1], ROWS):
        if layer is ...:
            rows.append(["...", *("" for _ in columns)])
            continue
        values = ["..." if c is ... else _number(found.get((layer, c), NAN)) for c in columns]
        rows.append(["" if layer is None else f"layer {layer}", *values])
    at = f", {part.axes['position'][0]}" if across == "head" else ""
    others = len(axes["site"]) - 1
    more = f" (and {others} more site{'s' * (others != 1)})" if others else ""
    return [f"  {site}{at}{more}", *_aligned(rows)]


def _heading(across: str, value: Any) -> str:
    return "whole" if value is None else f"head {value}" if across == "head" else str(value)


def _number(value: float) -> str:
    return "-" if np.isnan(value) else f"{value:.3g}"


def _shown(values: Sequence[Any], most: int) -> list[Any]:
    """The first and the last of many, with ... between them."""
    if len(values) <= most:
        return list(values)
    half = most // 2
    return [*values[:half], ..., *values[-half:]]


def _aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "    " + "  ".join(c.rjust(w) for c, w in zip(row, widths, strict=True)).rstrip()
        for row in rows
    ]


def _coordinates(map: EffectMap) -> dict[str, Any]:
    """The axes of a map as columns; layers and heads are whole numbers, or missing."""
    import pandas as pd

    columns: dict[str, Any] = {}
    for name in NAMES:
        if name in map.axes:
            values = [getattr(cell, name) for cell in map.cells]
            whole = name in ("layer", "head")
            columns[name] = pd.array(values, dtype="Int64") if whole else values
    return columns


def _claims(estimates: Sequence[Estimate | None]) -> dict[str, list[float]]:
    """The ends of the intervals; nan where there is none, or one without an end on both sides."""
    ends = [None if e is None else e.ci() for e in estimates]
    return {
        "ci_low": [NAN if i is None or i.unbounded in SPLIT else i.low for i in ends],
        "ci_high": [NAN if i is None or i.unbounded in SPLIT else i.high for i in ends],
    }
