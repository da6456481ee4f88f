"""What a study says when it is done: a table of all cells, the strongest, and what was slow."""

import json
import math
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from imaginelens.estimates import EstimateError
from imaginelens.mediation.effect_map import FLAGS, NOT_MEASURED, EffectMap
from imaginelens.mediation.map_axes import name_of

_STRONGEST = 8  # cells in the table of a terminal
_DIGITS = 6  # of the numbers in summary.json


@dataclass(frozen=True)
class Summary:
    """A map in words and tables.

    Attributes:
        csv: one row for each cell, with the adjusted p-value and the interval that holds in all
            cells at once, where there are enough examples.
        json: the same in short, with what was done and what must be known.
        text: what a terminal shows.
    """

    csv: str
    json: str
    text: str


def summary(name: str, found: EffectMap, *, seed: int = 0) -> Summary:
    """Summarise a map; `seed` is of the sign flips of the test of all cells at once."""
    untested = ""
    try:
        frame = found.adjust("max_t", seed=seed).to_dataframe()
    except EstimateError as error:
        frame, untested = found.to_dataframe(), str(error)
    rows: list[dict[str, Any]] = [
        {str(key): _plain(value) for key, value in row.items()} for row in frame.to_dict("records")
    ]
    order = sorted(range(len(found)), key=lambda i: -abs(rows[i]["effect"] or 0.0))[:_STRONGEST]
    told = [*marks(found), *found.notes]
    strongest = [{"cell": name_of(found.cells[i]), **rows[i]} for i in order]
    words = {
        "name": name,
        "edit": found.edit,
        "metric": found.metric,
        "unit": found.unit,
        "direction": found.direction,
        "context": found.context,
        "examples": found.n,
        "cells": len(found),
        "total_effect": _plain(_total(found)),
        "strongest": strongest,
        "untested": untested,
        "notes": told,
        "provenance": asdict(found.provenance),
    }
    return Summary(
        frame.to_csv(index=False),
        json.dumps(words, indent=1, allow_nan=False) + "\n",
        _text(name, found, strongest, told, untested),
    )


def _total(found: EffectMap) -> float | None:
    """The mean total effect, of the pairs that have one."""
    if found.other is None or np.isnan(found.total).all():
        return None
    return float(np.nanmean(found.total))


def marks(found: EffectMap) -> list[str]:
    """What the numbers must not be read without."""
    if found.sham is None or np.isnan(found.sham).all():
        told = ["no sham was run on this path"]
    else:
        told = [f"the sham changed the metric by {np.nanmax(np.abs(found.sham)):.2g} at most"]
    for flag, word in enumerate(FLAGS):
        count = int((found.flags == flag).sum())
        if flag and count:
            told.append(f"{count} of {found.flags.size} cells x examples: {word}")
    lost = int((np.isnan(found.effect) & (found.flags != NOT_MEASURED)).sum())
    if lost:
        told.append(f"{lost} of {found.flags.size} cells x examples: no answer was found")
    return told


def _plain(value: Any) -> Any:
    """A value of a table as JSON has it; None where there is none."""
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, float):
        return float(f"{value:.{_DIGITS}g}") if math.isfinite(value) else None
    return value if isinstance(value, str | int) else None


def _text(
    name: str, found: EffectMap, strongest: list[dict[str, Any]], told: list[str], untested: str
) -> str:
    unit = f" ({found.unit})" if found.unit else ""
    total = _total(found)
    lines = [
        f"{name}: {found.edit}, effect on {found.metric}{unit}, {found.direction}, {found.context} "
        f"context; {len(found)} cells, {found.n} examples"
        + ("" if total is None else f"; total effect {total:.3g}")
    ]
    held = "low" in strongest[0]
    heads = ("strongest cells", "effect", "95% in all cells" if held else "95%", "adjusted p")
    table = [heads]
    for row in strongest:
        ends = ("low", "high") if held else ("ci_low", "ci_high")
        interval = " to ".join(_number(row.get(end)) for end in ends)
        p = row.get("p_adjusted")
        table.append(
            (row["cell"], _number(row["effect"]), interval, "-" if p is None else f"{p:.2g}")
        )
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    for cells in table:
        first, *others = (c.ljust(w) for c, w in zip(cells, widths, strict=True))
        lines.append(f"  {'  '.join((first, *others))}".rstrip())
    if untested:
        lines.append(f"  not tested: {untested}")
    return "\n".join([*lines, *(f"  {note}" for note in told)])


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3g}"
