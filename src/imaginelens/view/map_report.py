"""A report of saved maps as one HTML file: what was asked, what was found, controls, provenance."""

import base64
from collections.abc import Sequence
from dataclasses import asdict
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np

from imaginelens.estimates import EstimateError
from imaginelens.hooks.errors import CheckpointError
from imaginelens.mediation.effect_map import EffectMap
from imaginelens.mediation.map_axes import name_of
from imaginelens.mediation.study_summary import marks
from imaginelens.view.markup import Markup, element
from imaginelens.view.numerals import precise

_POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:; form-action 'none'"
_ROWS = 12  # cells in a table, the largest effects first
_STYLE = """
.map { background: var(--card); border: 1px solid var(--line); border-radius: 16px;
  padding: 26px; margin-top: 20px; }
.map > * + * { margin-top: 16px; }
.map img { max-width: 100%; background: #fff; border-radius: 8px; }
.map table { border-collapse: collapse; font-size: 13.5px; }
.map th, .map td { text-align: left; padding: 4px 18px 4px 0;
  border-bottom: 1px solid var(--line); }
.map ul { list-style: disc; padding-left: 20px; font-size: 14px; }
.map pre { font: 12.5px/1.5 var(--mono); overflow-wrap: anywhere; white-space: pre-wrap; }
"""


def maps_in(folder: Path) -> dict[str, EffectMap]:
    """The maps that lie in a folder, or in the folders right below it, by name.

    Raises:
        CheckpointError: there is none, or one is damaged.
    """
    if not folder.is_dir():
        raise CheckpointError(f"{str(folder)!r} is no folder; name one that holds a map or a study")
    places = [p for p in (folder, *sorted(folder.iterdir())) if (p / "map.json").is_file()]
    if not places:
        raise CheckpointError(
            f"{str(folder)!r} holds no map: no map.json lies in it or right below; name a folder "
            "that EffectMap.save or imaginelens study has written"
        )
    return {place.name: EffectMap.load(place) for place in places}


def report(maps: dict[str, EffectMap], *, title: str, source: str = "") -> str:
    """The maps as a page that needs nothing else: verdicts first, then figures and controls.

    Args:
        source: the folder the maps were read from, for the lines that load them again.
    """
    style = resources.files("imaginelens.view").joinpath("report.css").read_text(encoding="utf-8")
    head = element(
        "head",
        element("meta", charset="utf-8"),
        element("meta", http_equiv="Content-Security-Policy", content=_POLICY),
        element("meta", name="viewport", content="width=device-width, initial-scale=1"),
        element("title", title),
        element("style", Markup(style + _STYLE)),
    )
    opening = element(
        "header",
        element("p", "ImagineLens", class_="brand"),
        element("h1", title),
        element("ul", *(element("li", f"{n}: {verdict(m)}") for n, m in maps.items())),
    )
    parts = [_part(name, found, source, len(maps) == 1) for name, found in maps.items()]
    body = element("body", element("main", opening, *parts))
    return f"<!doctype html>\n{element('html', head, body, lang='en')}\n"


def verdict(found: EffectMap) -> str:
    """What a map shows in one sentence, with its numbers and what they are not tested for."""
    means = np.array([_mean(row) for row in found.effect])
    if np.isnan(means).all():
        return "No cell has an effect that could be measured."
    top = int(np.nanargmax(np.abs(means)))
    unit = f" {found.unit}" if found.unit else ""
    largest = f"The largest effect of {found.edit} on {found.metric} is {precise(means[top])}{unit}"
    where = f"at {name_of(found.cells[top])}"
    whole = ""
    if found.other is not None and not np.isnan(found.total).all():
        whole = f" (all of the difference between the inputs: {precise(np.nanmean(found.total))})"
    try:
        told = found.adjust("max_t").found()
    except EstimateError:
        return f"{largest} {where}{whole}; {found.n} example(s) are too few for a test."
    return (
        f"{largest} {where}{whole}; {len(told)} of {len(found)} cells are told from no effect, "
        "with an error rate of 5% over all of them."
    )


def _part(name: str, found: EffectMap, source: str, alone: bool) -> Markup:
    asked = (
        f"{found.edit}; {found.direction}, {found.context} context; {len(found)} cells, "
        f"{found.n} examples; metric {found.metric}" + (f" ({found.unit})" if found.unit else "")
    )
    return element(
        "section",
        element("h2", name),
        element("p", asked),
        element("p", verdict(found), class_="headline"),
        _picture(found),
        _table(found),
        element("h3", "Controls, and what must be known"),
        element("ul", *(element("li", note) for note in (*marks(found), *found.notes))),
        element("h3", "Where the numbers come from"),
        element("ul", *(element("li", line) for line in _origin(found))),
        element("h3", "Read it again"),
        element("pre", _code(name, source, alone)),
        class_="map",
    )


def _picture(found: EffectMap) -> Markup:
    """The heat-map, as a picture that can run nothing."""
    from imaginelens.view.maps import heatmap

    figure = heatmap(found)
    try:
        data = base64.b64encode(figure.svg().encode()).decode("ascii")
    except ImportError as error:
        return element("p", str(error), class_="note")
    return element("img", src=Markup(f"data:image/svg+xml;base64,{data}"), alt=figure.alt)


def _table(found: EffectMap) -> Markup:
    means = np.array([_mean(row) for row in found.effect])
    order = [int(i) for i in np.argsort(-np.nan_to_num(np.abs(means)))[:_ROWS]]
    rows = [element("tr", *(element("td", text) for text in _cells(found, i))) for i in order]
    heads = ("cell", "effect", "95% interval", "n")
    return element(
        "table",
        element("caption", f"the {len(order)} largest of {len(found)} effects"),
        element("thead", element("tr", *(element("th", head) for head in heads))),
        element("tbody", *rows),
    )


def _cells(found: EffectMap, row: int) -> tuple[str, ...]:
    estimate, values = found.estimates[row], found.effect[row]
    ends = "" if estimate is None else str(estimate.ci())
    n = int((~np.isnan(values)).sum())
    return name_of(found.cells[row]), precise(_mean(values)) if n else "not measured", ends, str(n)


def _origin(found: EffectMap) -> list[str]:
    told = {k: v for k, v in asdict(found.provenance).items() if v not in ("", (), 0, 0.0)}
    lines = []
    for key, value in told.items():
        if key == "versions":
            value = ", ".join(f"{name} {number}" for name, number in value)
        lines.append(f"{key}: {value:.4g}" if isinstance(value, float) else f"{key}: {value}")
    return lines


def _code(name: str, source: str, alone: bool) -> str:
    place = Path(source) if alone and Path(source).name == name else Path(source) / name
    return (
        f"import imaginelens as il\n\nfound = il.EffectMap.load({str(place)!r})\n"
        "found.to_dataframe(); found.plot()"
    )


def _mean(values: Any) -> float:
    there = values[~np.isnan(values)]
    return float(there.mean()) if there.size else float("nan")


def write(folder: Path, out: Path | None = None) -> Path:
    """Write the report of a folder's maps, beside them if no file is named.

    Raises:
        CheckpointError: as `maps_in`.
    """
    maps = maps_in(folder)
    path = folder / "report.html" if out is None else out
    page = report(maps, title=_title(list(maps), folder), source=folder.resolve().name)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(page, encoding="utf-8", newline="\n")
    partial.replace(path)
    return path


def _title(names: Sequence[str], folder: Path) -> str:
    return f"What the edits of {folder.resolve().name} do" if len(names) > 1 else names[0]
