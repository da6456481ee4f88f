"""Panels of cells on one colour scale: the form of every heat-map, whatever its numbers mean."""

import html
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from jaxtyping import Bool, Float

from imaginelens.hooks.errors import InputError
from imaginelens.view.colour import UNMEASURED
from imaginelens.view.figure import Figure

Palette = Literal["RdBu", "PuOr"]
_INK = "#1a1a1a"
_DIGITS = 4  # behind the point, in a cell
_STOPS = 64


@dataclass(frozen=True, eq=False)
class Panel:
    """One field of cells.

    Attributes:
        values: nan where nothing was measured.
        rows, columns: labels, which may repeat and hold any text.
        hover: what a cell says under the pointer, a line for each fact; the first line names it.
        outlined: cells whose interval leaves out the centre of the colour scale.
        words: what cells say in place of their numbers.
    """

    values: Float[np.ndarray, "row column"]
    rows: Sequence[str]
    columns: Sequence[str]
    row_axis: str
    column_axis: str
    title: str = ""
    hover: Sequence[Sequence[str]] | None = None
    outlined: Bool[np.ndarray, "row column"] | None = None
    words: Sequence[Sequence[str]] | None = None

    def __post_init__(self) -> None:
        wanted = len(self.rows), len(self.columns)
        if self.values.shape != wanted:
            raise InputError(
                f"a panel of {self.values.shape} cells came with {wanted} labels of rows and "
                "columns; give one label each"
            )


@dataclass(frozen=True, eq=False)
class Sheet:
    """Panels beside each other on one scale, with what a reader must know.

    Attributes:
        unit: what the colour says.
        centre: where the colour scale is white.
        limit: how far from the centre it ends; the largest distance in any panel if left out.
        span: the values there can be, where the scale need not show both sides as long: 0 to 1.
        marks: short warnings drawn below ("single example", "no controls").
        alt: the picture in words.
        numbers: whether cells show theirs; if left out, where there is room.
    """

    panels: Sequence[Panel]
    title: str
    unit: str
    centre: float = 0.0
    limit: float | None = None
    span: tuple[float, float] | None = None
    marks: Sequence[str] = field(default_factory=tuple)
    alt: str = ""
    numbers: bool | None = None


RIGHT, TOP = 130.0, 84.0
_WIDTH, _HEIGHT, _LEAST, _SPACE, _ABOVE = 1000.0, 640.0, 110.0, 28.0, 34.0


@dataclass(frozen=True)
class Place:
    """Where a panel lies on the plotting area, in pixels from its left and upper edge."""

    left: float
    top: float
    width: float
    height: float
    named: bool


@dataclass(frozen=True)
class Page:
    """Where everything lies: panels of one size in rows, as wide as a screen."""

    places: tuple[Place, ...]
    left: float
    bottom: float

    @property
    def inside(self) -> tuple[float, float]:
        """Width and height of the plotting area."""
        right = max(place.left + place.width for place in self.places)
        return right, max(place.top + place.height for place in self.places)

    @property
    def width(self) -> int:
        return round(self.left + max(self.inside[0], 330.0) + RIGHT)

    @property
    def height(self) -> int:
        return round(TOP + self.inside[1] + self.bottom)

    def across(self, place: Place) -> tuple[float, float]:
        """The share of the width that a panel takes."""
        whole = self.width - self.left - RIGHT
        return place.left / whole, (place.left + place.width) / whole

    def up(self, place: Place) -> tuple[float, float]:
        """The share of the height that a panel takes, from below."""
        whole = self.inside[1]
        return max(0.0, 1 - (place.top + place.height) / whole), 1 - place.top / whole


def page_of(panels: Sequence[Panel]) -> Page:
    """Lay panels out: cells as large as there is room for, rows named once if all are alike."""
    words = any(p.words is not None for p in panels)
    most = max(len(p.columns) for p in panels)
    wide = max(_LEAST, min((110.0 if words else 62.0) * most, _WIDTH if len(panels) == 1 else 440))
    tall = max(60.0, min(44.0 * max(len(p.rows) for p in panels), _HEIGHT))
    if all(p.rows == p.columns for p in panels):
        wide = tall = max(wide, _LEAST)
    alike = all(p.rows == panels[0].rows for p in panels)
    names = min(300.0, 46.0 + 7.0 * max(_longest(p.rows) for p in panels))
    below = 56.0 + 5.0 * min(24, max(_longest(p.columns) for p in panels))
    space = _SPACE if alike else names + _SPACE
    each_row = max(1, int((_WIDTH + space) // (wide + space)))
    places = []
    for number in range(len(panels)):
        row, column = divmod(number, each_row)
        left, top = column * (wide + space), row * (tall + below + _ABOVE)
        places.append(Place(left, top, wide, tall, column == 0 or not alike))
    return Page(tuple(places), names, below + 24.0)


def _longest(labels: Sequence[str]) -> int:
    return max((len(label) for label in labels), default=0)


def draw(sheet: Sheet, *, palette: Palette = "RdBu") -> Figure:
    """The sheet as a figure: shared scale, grey for unmeasured, first row at the top.

    Raises:
        InputError: there are no panels, or there is no such palette.
    """
    if not sheet.panels:
        raise InputError("there is nothing to draw: the map has no cells")
    if palette not in ("RdBu", "PuOr"):
        raise InputError(f"there is no palette {palette!r}; use 'RdBu' or 'PuOr'")
    page = page_of(sheet.panels)
    figure = Figure()
    for number, (panel, place) in enumerate(zip(sheet.panels, page.places, strict=True), 1):
        _add(figure, panel, sheet, page, place, number)
    margin = {"l": page.left, "r": RIGHT, "t": TOP, "b": page.bottom}
    figure.update_layout(
        title={"text": _words(sheet.title), "x": page.left / page.width, "xanchor": "left"},
        coloraxis=_scale(sheet, palette, page), plot_bgcolor=UNMEASURED, paper_bgcolor="#ffffff",
        showlegend=False, width=page.width, height=page.height, margin=margin,
        meta={"alt": sheet.alt or _in_words(sheet), "marks": list(sheet.marks)},
    )  # fmt: skip
    if sheet.marks:
        figure.add_annotation(
            text=_words(" · ".join(sheet.marks)), xref="paper", yref="paper", x=0, y=0,
            xanchor="left", yanchor="bottom", yshift=6 - page.bottom, showarrow=False,
            font={"size": 12, "color": "#8c2d04"},
        )  # fmt: skip
    return figure


def _add(figure: Figure, panel: Panel, sheet: Sheet, page: Page, place: Place, number: int) -> None:
    import plotly.graph_objects as go

    n_rows, n_columns = panel.values.shape
    x, y = (f"{axis}{number if number > 1 else ''}" for axis in "xy")
    room = place.width / n_columns >= 30 and place.height / n_rows >= 14
    shown = sheet.numbers if sheet.numbers is not None else room or panel.words is not None
    limit = _limit(sheet)
    words = panel.words or [[_short(v, limit) for v in row] for row in panel.values]
    gap = 1 if place.width / n_columns >= 8 else 0
    told = None
    if panel.hover is not None:
        told = [[_words(cell) for cell in row] for row in panel.hover]
    figure.add_trace(
        go.Heatmap(
            z=[[None if np.isnan(v) else float(v) for v in row] for row in panel.values],
            x=list(range(n_columns)), y=list(range(n_rows)), coloraxis="coloraxis",
            xgap=gap, ygap=gap, xaxis=x, yaxis=y, customdata=told, hoverongaps=True,
            text=[[_words(cell) for cell in row] for row in words] if shown else None,
            texttemplate="%{text}" if shown else None,
            hovertemplate="%{customdata}<extra></extra>" if told else None,
        )
    )  # fmt: skip
    if panel.outlined is not None and panel.outlined.any():
        across, down = _outlines(panel.outlined)
        line = {"color": _INK, "width": 2}
        figure.add_trace(
            go.Scatter(
                x=across, y=down, mode="lines", line=line, hoverinfo="skip", xaxis=x, yaxis=y
            )
        )
    plain = {"showgrid": False, "zeroline": False}
    flat = _longest(panel.columns) <= 8
    figure.layout[f"xaxis{x[1:]}"] = (
        _ticks(panel.columns, place.width, 7.0 * _longest(panel.columns) + 4 if flat else 18.0)
        | {"tickangle": 0 if flat else -45, "anchor": y}
        | {"range": [-0.5, n_columns - 0.5], "domain": page.across(place)}
        | {"title": {"text": _words(panel.column_axis)}}
        | plain
    )
    figure.layout[f"yaxis{y[1:]}"] = (
        _ticks(panel.rows, place.height, 16.0)
        | {"range": [n_rows - 0.5, -0.5], "domain": page.up(place), "anchor": x}
        | {"title": {"text": _words(panel.row_axis) if place.named else ""}}
        | {"showticklabels": place.named}
        | plain
    )
    if panel.title and len(page.places) > 1:
        figure.add_annotation(
            text=_words(panel.title), xref="paper", yref="paper", x=page.across(place)[0],
            y=page.up(place)[1], xanchor="left", yanchor="bottom", yshift=3, showarrow=False,
            font={"size": 13},
        )  # fmt: skip


def _ticks(labels: Sequence[str], room: float, each: float) -> dict[str, Any]:
    """Numbered ticks: plotly drops columns whose names repeat, and takes names for markup. Where
    there is no room for all, every k-th is named."""
    every = max(1, int(np.ceil(len(labels) * each / room)))
    at = list(range(0, len(labels), every))
    return {"tickmode": "array", "tickvals": at, "ticktext": [_words(labels[k]) for k in at]}


def _outlines(cells: Bool[np.ndarray, "row column"]) -> tuple[list[Any], list[Any]]:
    """One broken line around each cell."""
    x: list[Any] = []
    y: list[Any] = []
    for row, column in np.argwhere(cells).tolist():
        left, right, top, bottom = column - 0.44, column + 0.44, row - 0.44, row + 0.44
        x += [left, right, right, left, left, None]
        y += [top, top, bottom, bottom, top, None]
    return x, y


def _scale(sheet: Sheet, palette: Palette, page: Page) -> dict[str, Any]:
    """A scale that is white at the centre; of a span that is not about it, the part that is."""
    from plotly.colors import get_colorscale, sample_colorscale

    limit = _limit(sheet)
    low, high = sheet.span or (sheet.centre - limit, sheet.centre + limit)
    at = np.linspace(low, high, _STOPS)
    places = np.clip((at - sheet.centre) / (2 * limit) + 0.5, 0, 1)
    colours = get_colorscale(palette)
    if sheet.span is not None:
        found = sample_colorscale(colours, places.tolist())
        colours = [[k / (_STOPS - 1), colour] for k, colour in enumerate(found)]
    right = max(page.across(place)[1] for place in page.places)
    bar = {"title": {"text": _words(sheet.unit)}, "x": right, "xanchor": "left", "thickness": 14}
    return {"colorscale": colours, "cmin": low, "cmax": high, "colorbar": bar}


def _limit(sheet: Sheet) -> float:
    if sheet.limit is not None:
        return sheet.limit
    far = [np.abs(p.values[~np.isnan(p.values)] - sheet.centre) for p in sheet.panels]
    largest = max((float(f.max()) for f in far if f.size), default=0.0)
    return largest or 1.0


def _short(value: float, limit: float) -> str:
    """A number with as many digits as tell it from others on a scale that ends at `limit`.

    >>> _short(0.333, 2.0), _short(-0.001, 2.0), _short(-0.0051, 0.02), _short(2e-9, 1e-8)
    ('0.33', '0.00', '-0.005', '2e-09')
    """
    if np.isnan(value):
        return ""
    digits = max(2, 1 - int(np.floor(np.log10(limit))))
    if digits > _DIGITS:
        return f"{value:.0e}" if value else "0"
    written = f"{value:.{digits}f}"
    return written if float(written) else written.lstrip("-")


def _words(text: str) -> str:
    """Text as plotly shows it: it takes tags for markup."""
    return html.escape(text, quote=False).replace("\n", "<br>")


def _in_words(sheet: Sheet) -> str:
    parts = []
    for panel in sheet.panels:
        there = panel.values[~np.isnan(panel.values)]
        spread = f"{there.min():.3g} to {there.max():.3g}" if there.size else "nothing measured"
        missing = panel.values.size - there.size
        parts.append(
            f"{panel.title or 'cells'}: {len(panel.rows)} {panel.row_axis} by {len(panel.columns)} "
            f"{panel.column_axis}, {spread}" + (f", {missing} not measured" if missing else "")
        )
    return f"{sheet.title}. {sheet.unit}; " + "; ".join(parts) + "."
