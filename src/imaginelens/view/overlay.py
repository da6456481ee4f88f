"""The picture under the true grid of its image tokens, each cell tinted by what it does.

Tints lie on a pale grey copy of the picture, for on its own colours they could not be told.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
from jaxtyping import Bool, Float
from PIL import Image

from imaginelens.hooks.errors import InputError
from imaginelens.hooks.run import Run
from imaginelens.hooks.tokens import Kind, Token
from imaginelens.mediation.effect_map import EffectMap
from imaginelens.view.charts import words
from imaginelens.view.figure import Figure
from imaginelens.view.numerals import precise
from imaginelens.view.panels import Palette
from imaginelens.view.png import image_address

Of = Literal["example", "mean"]
Grid = Float[np.ndarray, "row column"]
_CELL = re.compile(r"image\[(\d+)\]\[(\d+), (\d+)\]")
_OPACITY, _MOST = 0.6, 11
_GAP, _ABOVE, _LEFT, _TOP, _RIGHT, _BELOW = 26.0, 26.0, 24, 72, 120, 44


@dataclass(frozen=True, eq=False)
class _Tint:
    """The numbers of one panel; the first panel is the picture itself, and has none.

    Attributes:
        values: nan where nothing was measured.
        told: what each cell adds to its hover.
        outlined: cells whose interval leaves out 0.
    """

    title: str
    values: Grid
    told: list[list[str]]
    outlined: Bool[np.ndarray, "row column"]


@dataclass(frozen=True, eq=False)
class _Canvas:
    """A picture with the cells of its grid.

    Attributes:
        across, down: where columns and rows of cells begin and end, in pixels of the picture.
    """

    picture: Image.Image
    cells: Mapping[tuple[int, int], Token]
    rows: int
    columns: int
    across: list[float]
    down: list[float]


def image_overlay(
    run: Run,
    effects: EffectMap | Grid | Mapping[str, Grid],
    *,
    example: int = 0,
    image: int = 0,
    of: Of = "example",
    level: float = 0.95,
    limit: float | None = None,
    palette: Palette = "RdBu",
    unit: str = "",
    title: str | None = None,
) -> Figure:
    """Draw an input picture with its grid of image tokens, tinted by effects of these.

    Beside the picture itself there is a panel for each site, layer and head. Blue is above 0, red
    below, a white veil 0; a cell without a tint, crossed out, was not measured. Hover a cell for
    its row, column, place in the sequence, pixels and effect. The figure is returned, not shown.

    Args:
        run: of the inputs that were edited (of a denoising map, the base).
        effects: a map over image cells, as `il.sweep(..., positions=il.image)` makes it; or any
            numbers (row, column) of the grid, nan where there are none, or several by name.
        example, image: which picture of the run.
        of: of a map, the effects in this "example", or the "mean" over all examples, whose cells
            are outlined where their interval leaves out 0.
        level: of these intervals, 0 to 1.
        limit: where the colour scale ends; the largest number shown if left out.
        unit: of the numbers; of a map it is known.

    Raises:
        InputError: the picture or its grid is not known, the numbers do not fit the grid, the map
            holds no cells of this image or not this example, or more panels than can be looked at.

    >>> import imaginelens as il
    >>> lens = il.load("latent-content")
    >>> run = lens.run(lens.task(n=1, seed=0).base)
    >>> image_overlay(run, np.eye(3), unit="logits").alt[:68]
    'values over image 0 of example 0, a grid of 3 x 3 image tokens: 0 to'
    """
    if of not in get_args(Of):
        raise InputError(f"of is {of!r}; choose 'example' or 'mean'")
    if limit is not None and not (np.isfinite(limit) and limit > 0):
        raise InputError(f"limit={limit} cannot end a colour scale; give a number above 0")
    canvas = _canvas(run, example, image)
    tints, marks = _tints(effects, canvas, run, example, image, of, level)
    if len(tints) > _MOST:
        raise InputError(
            f"{len(tints)} panels are too many to look at; choose up to {_MOST}, such as "
            "map.sel(layer=[0, 1])"
        )
    if isinstance(effects, EffectMap):
        unit = unit or f"effect on {effects.unit or effects.metric}"
        about = title or f"{effects.edit}, {effects.direction}, {effects.context} context"
    else:
        about = title or "values"
    ends = [float(np.nanmax(np.abs(t.values))) for t in tints if not np.isnan(t.values).all()]
    end = limit or max(ends, default=0.0) or 1.0
    alt = _alt(canvas, tints, about, example, image)
    return _draw(canvas, tints, about, unit, end, palette, marks, alt)


# ---- the picture and its grid ------------------------------------------------------------------


def _canvas(run: Run, example: int, image: int) -> _Canvas:
    if not 0 <= example < len(run):
        raise InputError(f"there is no example {example} in a run of {len(run)}")
    pictures = run.prompt.pictures
    if pictures is None:
        raise InputError(
            "the pictures of this run are not known, for it was given a processor's dict; run "
            "lens.run(images=..., text=...) to draw on them"
        )
    if not 0 <= image < len(pictures[example]):
        raise InputError(
            f"example {example} has {len(pictures[example])} images, not image {image}"
        )
    grid = run.tokens.grids[example][image]
    tokens = [t for t in run.tokens[example] if t.kind == Kind.IMAGE and t.image == image]
    cells = {(t.row, t.col): t for t in tokens if t.row >= 0 and t.box is not None}
    if not cells or len(cells) != grid.rows * grid.cols:
        raise InputError(
            f"which part of image {image} each of its {len(tokens)} tokens shows is not known for "
            "this model; see lens.describe() for its rule"
        )
    across, down = _edges(cells, grid.rows, grid.cols)
    return _Canvas(pictures[example][image], cells, grid.rows, grid.cols, across, down)


def _edges(
    cells: Mapping[tuple[int, int], Token], rows: int, columns: int
) -> tuple[list[float], list[float]]:
    """Where columns and rows of cells begin and end."""
    left, top, right, bottom = np.array([token.box for token in cells.values()]).T
    place = np.array(list(cells))
    across = [float(left[place[:, 1] == c].min()) for c in range(columns)] + [float(right.max())]
    down = [float(top[place[:, 0] == r].min()) for r in range(rows)] + [float(bottom.max())]
    return across, down


# ---- the numbers -------------------------------------------------------------------------------


def _tints(
    effects: Any, canvas: _Canvas, run: Run, example: int, image: int, of: Of, level: float
) -> tuple[list[_Tint], list[str]]:
    """The panels, and the warnings below them."""
    if isinstance(effects, EffectMap):
        return _of_map(effects, canvas, run, example, image, of, level)
    several = effects if isinstance(effects, Mapping) else {"": effects}
    if not several:
        raise InputError("there are no numbers to draw; give an array (row, column)")
    return [_of_array(str(name), grid, canvas) for name, grid in several.items()], []


def _of_array(name: str, given: Any, canvas: _Canvas) -> _Tint:
    values = np.asarray(given, dtype=np.float64)
    wanted = (canvas.rows, canvas.columns)
    if values.shape != wanted:
        raise InputError(
            f"numbers of shape {values.shape} came for a grid of {wanted[0]} x {wanted[1]} image "
            "tokens; give one for each cell, nan where there is none"
        )
    if np.isinf(values).any():
        raise InputError("a number is infinite; give finite ones, nan where there is none")
    told = [["not measured" if np.isnan(v) else precise(float(v)) for v in row] for row in values]
    return _Tint(name, values, told, np.zeros(wanted, bool))


def _of_map(
    found: EffectMap, canvas: _Canvas, run: Run, example: int, image: int, of: Of, level: float
) -> tuple[list[_Tint], list[str]]:
    by: dict[str, dict[tuple[int, int], int]] = {}
    for number, cell in enumerate(found.cells):
        place = _CELL.fullmatch(cell.position)
        if place is not None and int(place[1]) == image:
            where = int(place[2]), int(place[3])
            if where not in canvas.cells:
                raise InputError(
                    f"the map has a cell {cell.position}, and this picture a grid of "
                    f"{canvas.rows} x {canvas.columns}; give the run that the map is of"
                )
            by.setdefault(_name(cell), {})[where] = number
    if not by:
        raise InputError(
            f"the map has no cells of image {image}, its positions are "
            f"{', '.join(dict.fromkeys(c.position for c in found.cells))}"[:300]
            + "; make it with il.sweep(..., positions=il.image)"
        )
    column = _column(found, run, example) if of == "example" else None
    tints = [_tint(found, name, numbers, canvas, column, level) for name, numbers in by.items()]
    marks = [] if found.sham is not None else ["no controls: no sham was run"]
    if column is None:
        marks.insert(0, f"mean of {found.n} examples, over the picture of example {example}")
    else:
        marks.insert(0, f"single example: example {example}, no interval")
    return tints, marks


def _name(cell: Any) -> str:
    parts = [cell.site]
    parts += [] if cell.layer is None else [f"layer {cell.layer}"]
    parts += [] if cell.head is None else [f"head {cell.head}"]
    return ", ".join(parts)


def _column(found: EffectMap, run: Run, example: int) -> int:
    """Which of the map's examples this one of the run is, by its content where that is known."""
    own = run.tokens.keys[example]
    matching = [k for k, key in enumerate(found.keys) if _own(key) == own]
    if matching:
        return matching[0]
    if found.n == len(run) and not any("/" in key for key in found.keys):
        return example
    raise InputError(
        f"example {example} of this run is not among the {found.n} of the map; give the run of "
        "the inputs that were edited (of a denoising map, the base), or of='mean'"
    )


def _own(key: str) -> str:
    """Of a pair's key, the content of the input that was edited."""
    return key.partition("/")[0].rpartition(":")[2]


def _tint(
    found: EffectMap, name: str, numbers: Mapping[tuple[int, int], int], canvas: _Canvas,
    column: int | None, level: float,
) -> _Tint:  # fmt: skip
    shape = (canvas.rows, canvas.columns)
    values, outlined = np.full(shape, np.nan), np.zeros(shape, bool)
    told = [["not measured"] * shape[1] for _ in range(shape[0])]
    for (r, c), number in numbers.items():
        effects = found.effect[number]
        if column is not None:
            effects = effects[[column]]
        there = effects[~np.isnan(effects)]
        if not len(there):
            continue
        values[r, c] = there.mean()
        lines = [f"effect: {precise(float(values[r, c]))}"]
        estimate = found.estimates[number] if column is None else None
        if estimate is not None:
            interval = estimate.ci(level=level)
            outlined[r, c] = 0.0 not in interval
            lines += [f"{level:.0%} interval: {interval}", f"n: {estimate.n}"]
        untouched = found.untouched[number] if column is None else found.untouched[number, [column]]
        if untouched.any():
            lines.append(f"nothing to change in {int(untouched.sum())} of {len(untouched)}")
        told[r][c] = "\n".join(lines)
    return _Tint(name, values, told, outlined)


# ---- what is drawn -----------------------------------------------------------------------------


def _draw(
    canvas: _Canvas, tints: Sequence[_Tint], about: str, unit: str, limit: float,
    palette: Palette, marks: Sequence[str], alt: str,
) -> Figure:  # fmt: skip
    from plotly.colors import get_colorscale

    width, height = canvas.picture.size
    n = len(tints) + 1
    wide = {2: 400.0, 3: 310.0}.get(n, 230.0)
    tall = min(wide * height / width, 600.0)
    wide = tall * width / height
    each_row = max(1, int((1000 + _GAP) // (wide + _GAP)))
    inside = (
        min(n, each_row) * (wide + _GAP) - _GAP,
        -(-n // each_row) * (tall + _ABOVE + _GAP) - _GAP - _ABOVE,
    )
    figure = Figure()
    for number, tint in enumerate([None, *tints]):
        row, column = divmod(number, each_row)
        left, top = column * (wide + _GAP), row * (tall + _ABOVE + _GAP)
        place = (
            (left / inside[0], (left + wide) / inside[0]),
            (max(0.0, 1 - (top + tall) / inside[1]), 1 - top / inside[1]),
        )
        _panel(figure, canvas, tint, number + 1, place, wide)
    scale = {"colorscale": get_colorscale(palette), "cmin": -limit, "cmax": limit}
    figure.update_layout(
        title={"text": words(about), "x": 0.02, "xanchor": "left"}, showlegend=False,
        coloraxis={**scale, "colorbar": {"title": {"text": words(unit)}}}, plot_bgcolor="#ffffff",
        paper_bgcolor="#ffffff", width=round(_LEFT + max(inside[0], 300) + _RIGHT),
        height=round(_TOP + inside[1] + _BELOW), meta={"alt": alt, "marks": list(marks)},
        margin={"l": _LEFT, "r": round(_RIGHT + max(0.0, 300 - inside[0])), "t": _TOP, "b": _BELOW},
    )  # fmt: skip
    if marks:
        figure.add_annotation(
            text=words(" · ".join(marks)), xref="paper", yref="paper", x=0, y=0, xanchor="left",
            yanchor="top", yshift=-12, showarrow=False, font={"size": 12, "color": "#8c2d04"},
        )  # fmt: skip
    return figure


def _panel(
    figure: Figure, canvas: _Canvas, tint: _Tint | None, number: int, place: Any, wide: float
) -> None:
    import plotly.graph_objects as go

    width, height = canvas.picture.size
    x, y = (f"{axis}{number if number > 1 else ''}" for axis in "xy")
    on = {"xaxis": x, "yaxis": y}
    address, size = _picture(canvas.picture, wide, grey=tint is not None)
    dx, dy = width / size[0], height / size[1]
    figure.add_trace(
        go.Image(source=address, x0=dx / 2, dx=dx, y0=dy / 2, dy=dy, hoverinfo="skip", **on)
    )
    values = np.full((canvas.rows, canvas.columns), np.nan) if tint is None else tint.values
    figure.add_trace(
        go.Heatmap(
            z=[[None if np.isnan(v) else float(v) for v in row] for row in values],
            x=canvas.across, y=canvas.down, coloraxis="coloraxis", opacity=_OPACITY,
            customdata=_hover(canvas, tint), hoverongaps=True,
            hovertemplate="%{customdata}<extra></extra>", **on,
        )
    )  # fmt: skip
    roomy = wide * (canvas.across[1] - canvas.across[0]) / width >= 12
    for colour, line in (("#000000", 2.4), ("#ffffff", 1.0)) if roomy else (("#ffffff", 0.6),):
        across, down = _grid_lines(canvas)
        figure.add_trace(
            go.Scatter(
                x=across, y=down, mode="lines", line={"color": colour, "width": line},
                opacity=0.45 if colour == "#000000" else 0.9, hoverinfo="skip", **on,
            )
        )  # fmt: skip
    missing = np.isnan(values)
    if tint is not None and missing.any():
        across, down = _across(canvas, missing)
        figure.add_trace(
            go.Scatter(
                x=across, y=down, mode="lines", line={"color": "#555555", "width": 1},
                opacity=0.6, hoverinfo="skip", **on,
            )
        )  # fmt: skip
    if tint is not None and tint.outlined.any():
        across, down = _around(canvas, tint.outlined)
        figure.add_trace(
            go.Scatter(
                x=across,
                y=down,
                mode="lines",
                line={"color": "#000000", "width": 2.5},
                hoverinfo="skip",
                **on,
            )
        )
    plain = {"visible": False, "showgrid": False, "zeroline": False}
    figure.layout[f"xaxis{x[1:]}"] = plain | {"range": [0, width], "domain": place[0], "anchor": y}
    figure.layout[f"yaxis{y[1:]}"] = plain | {"range": [height, 0], "domain": place[1], "anchor": x}
    name = "the picture" if tint is None else tint.title
    if name:
        figure.add_annotation(
            text=words(name), xref="paper", yref="paper", x=place[0][0], y=place[1][1],
            xanchor="left", yanchor="bottom", yshift=3, showarrow=False, font={"size": 13},
        )  # fmt: skip


def _picture(picture: Image.Image, wide: float, *, grey: bool) -> tuple[str, tuple[int, int]]:
    """The picture as an address, smaller if it is large, in pale grey if asked; its size there."""
    small = picture.convert("RGB")
    small.thumbnail((min(448, round(1.5 * wide)),) * 2)
    if grey:
        small = small.convert("L").point([160 + level * 95 // 255 for level in range(256)])
    return str(image_address(small)), small.size


def _grid_lines(canvas: _Canvas) -> tuple[list[Any], list[Any]]:
    """All edges as one broken line."""
    x: list[Any] = []
    y: list[Any] = []
    for at in canvas.across:
        x += [at, at, None]
        y += [canvas.down[0], canvas.down[-1], None]
    for at in canvas.down:
        x += [canvas.across[0], canvas.across[-1], None]
        y += [at, at, None]
    return x, y


def _around(canvas: _Canvas, cells: Bool[np.ndarray, "row column"]) -> tuple[list[Any], list[Any]]:
    """One broken line around each cell, a little inside of it."""
    x: list[Any] = []
    y: list[Any] = []
    for r, c in np.argwhere(cells).tolist():
        (left, right), (top, bottom) = canvas.across[c : c + 2], canvas.down[r : r + 2]
        inset = 0.06 * (right - left)
        left, right, top, bottom = left + inset, right - inset, top + inset, bottom - inset
        x += [left, right, right, left, left, None]
        y += [top, top, bottom, bottom, top, None]
    return x, y


def _across(canvas: _Canvas, cells: Bool[np.ndarray, "row column"]) -> tuple[list[Any], list[Any]]:
    """A diagonal through each cell, as one broken line."""
    x: list[Any] = []
    y: list[Any] = []
    for r, c in np.argwhere(cells).tolist():
        x += [canvas.across[c], canvas.across[c + 1], None]
        y += [canvas.down[r + 1], canvas.down[r], None]
    return x, y


# ---- words -------------------------------------------------------------------------------------


def _hover(canvas: _Canvas, tint: _Tint | None) -> list[list[str]]:
    told = []
    for r in range(canvas.rows):
        row = []
        for c in range(canvas.columns):
            token = canvas.cells.get((r, c))
            lines = [f"row {r}, column {c}"]
            if token is not None and token.box is not None:
                box = ", ".join(f"{side:g}" for side in token.box)
                lines += [f"sequence index {token.index}", f"pixels {box}"]
            lines += [] if tint is None else [tint.told[r][c]]
            row.append(words("\n".join(lines)))
        told.append(row)
    return told


def _alt(canvas: _Canvas, tints: Sequence[_Tint], about: str, example: int, image: int) -> str:
    parts = []
    for tint in tints:
        name = f"{tint.title}: " if tint.title else ""
        there = tint.values[~np.isnan(tint.values)]
        missing = tint.values.size - there.size
        if not there.size:
            parts.append(f"{name}nothing measured")
            continue
        r, c = np.unravel_index(np.nanargmax(np.abs(tint.values)), tint.values.shape)
        parts.append(
            f"{name}{there.min():.3g} to {there.max():.3g}, the largest at row {r}, column {c}"
            + (f", {missing} cells not measured" if missing else "")
        )
    return (
        f"{about} over image {image} of example {example}, a grid of {canvas.rows} x "
        f"{canvas.columns} image tokens: {'; '.join(parts)}."
    )
