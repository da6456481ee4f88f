"""The effect heat-map as inline SVG: site by latent step, zero in the middle of the colour scale.

Cells are placed by index, so labels may repeat (all latents have the same token). Each cell carries
the whole truth twice: in its hover title for people, in its `data-` attributes for programs.

>>> cells = ((Cell(0.5, n=8), Cell(None)),)
>>> columns = (Column(0, "step 0"), Column(1, "step 1"))
>>> svg = heatmap_svg(HeatMap((Row("hook_latent", "hook_latent"),), columns, cells), limit=1.0)
>>> svg.count('class="cell"'), "not measured" in svg
(2, True)
"""

from dataclasses import dataclass

from imaginelens.view.colour import ColourScale
from imaginelens.view.fit import fit, one_line, width
from imaginelens.view.markup import Markup, element, join
from imaginelens.view.numerals import fixed, precise
from imaginelens.view.report import Cell, Column, HeatMap, Row

GUTTER, HEADER, GAP = 92.0, 44.0, 8.0
_NUMBER, _LABEL, _SMALL = 13.5, 12.0, 11.0


@dataclass(frozen=True)
class _Grid:
    """Where things are, in SVG units."""

    cell_width: float
    cell_height: float
    tops: tuple[float, ...]
    n_columns: int

    @property
    def right(self) -> float:
        return GUTTER + self.cell_width * self.n_columns

    @property
    def bottom(self) -> float:
        return self.tops[-1] + self.cell_height

    def left(self, column: int) -> float:
        return GUTTER + self.cell_width * column


def heatmap_svg(
    heatmap: HeatMap,
    limit: float,
    *,
    name: str = "",
    interval_name: str = "95% interval",
    room: float = 500.0,
) -> Markup:
    """The heat-map on a colour scale that ends at `limit`, `room` units wide if its cells allow."""
    grid = _grid(heatmap, room)
    scale = ColourScale(limit)
    cells = [
        _cell(heatmap, row, column, grid, scale, interval_name)
        for row in range(len(heatmap.rows))
        for column in range(len(heatmap.columns))
    ]
    return element(
        "svg",
        _headers(heatmap, grid),
        *cells,
        class_="heatmap",
        viewBox=f"0 0 {grid.right + 1:g} {grid.bottom + 1:g}",
        width=f"{grid.right + 1:g}",
        style=f"min-width:{0.7 * grid.right:g}px" if grid.right > room else None,
        role="img",
        aria_label=_summary(heatmap, name),
        font_family="inherit",
    )


def cell_title(heatmap: HeatMap, row: int, column: int, interval_name: str) -> str:
    """What a cell says on hover. Model text ends its line: it cannot reorder its neighbours."""
    site, step, cell = heatmap.rows[row], heatmap.columns[column], heatmap.cells[row][column]
    layer = "input, before layer 0" if site.layer is None else str(site.layer)
    place = f"layer: {layer}\nsite: {site.site}\nstep: {step.step}\ntoken: {one_line(step.token)}"
    if cell.effect is None:
        return f"{place}\nnot measured"
    effect = f"effect: {precise(cell.effect)} ({heatmap.unit})"
    if cell.interval is not None:
        effect += f"\n{interval_name}: {precise(cell.interval[0])} to {precise(cell.interval[1])}"
    answers = f"answer before: {one_line(cell.before)}\nanswer after: {one_line(cell.after)}"
    return f"{place}\n{effect}\nn: {cell.n}\n{answers}"


def _grid(heatmap: HeatMap, room: float) -> _Grid:
    share = (room - GUTTER - 1) // len(heatmap.columns)  # whole units keep the file small
    cell_width = min(150.0, max(30.0, share))
    cell_height = 46.0 if len(heatmap.rows) <= 10 else 24.0
    tops, top = [], HEADER
    for index, row in enumerate(heatmap.rows):
        if index and (row.layer is None) != (heatmap.rows[index - 1].layer is None):
            top += GAP  # the fed-back embedding stands apart from the layers
        tops.append(top)
        top += cell_height
    return _Grid(cell_width, cell_height, tuple(tops), len(heatmap.columns))


def _summary(heatmap: HeatMap, name: str) -> str:
    effects = [cell.effect for row in heatmap.cells for cell in row if cell.effect is not None]
    axes = (len(heatmap.rows), heatmap.row_axis), (len(heatmap.columns), heatmap.column_axis)
    size = " by ".join(f"{count} ({axis})" for count, axis in axes)
    spread = f"from {fixed(min(effects))} to {fixed(max(effects))}" if effects else "none measured"
    missing = len(heatmap.rows) * len(heatmap.columns) - len(effects)
    effect = f"Heat-map {name}: effects ({heatmap.unit})"
    return f"{effect}, {size}, {spread}; {missing} cells not measured."


def _headers(heatmap: HeatMap, grid: _Grid) -> Markup:
    across = fit(f"{heatmap.column_axis} →", grid.right - GUTTER, _SMALL)
    down = fit(f"{heatmap.row_axis} ↓", GUTTER - 8, _SMALL)
    axes = [
        _text(across, GUTTER, 11.0, _SMALL, opacity=0.68),
        _text(down, 0.0, 36.0, _SMALL, opacity=0.68),
    ]
    rows = [_row_header(row, grid, top) for row, top in zip(heatmap.rows, grid.tops, strict=True)]
    columns = [_column_header(column, grid, i) for i, column in enumerate(heatmap.columns)]
    return join(axes + rows + columns)


def _row_header(row: Row, grid: _Grid, top: float) -> Markup:
    label = fit(row.label, GUTTER - 8, _LABEL)
    drawn = _text(label, 0.0, top + grid.cell_height / 2 + 4, _LABEL)
    return element("g", element("title", f"site: {one_line(row.site)}"), drawn)


def _column_header(column: Column, grid: _Grid, index: int) -> Markup:
    label = fit(column.label, grid.cell_width - 2, _LABEL)
    middle = grid.left(index) + grid.cell_width / 2
    title = element("title", f"step: {column.step}\ntoken: {one_line(column.token)}")
    return element("g", title, _text(label, middle, 36.0, _LABEL, text_anchor="middle"))


def _cell(
    heatmap: HeatMap, row: int, column: int, grid: _Grid, scale: ColourScale, interval_name: str
) -> Markup:
    cell = heatmap.cells[row][column]
    left, top, ink = grid.left(column), grid.tops[row], scale.ink(cell.effect)
    low, high = cell.interval or (None, None)
    return element(
        "g",
        element("title", cell_title(heatmap, row, column, interval_name)),
        _box(left, top, grid, scale.colour(cell.effect)),
        _outline(left, top, grid, ink) if cell.excludes_zero else None,
        _words(cell, left, top, grid, ink),
        class_="cell",
        data_row=row,
        data_column=column,
        data_value="not measured" if cell.effect is None else cell.effect,
        data_n=cell.n,
        data_low=low,
        data_high=high,
        data_before=cell.before,
        data_after=cell.after,
    )


def _box(left: float, top: float, grid: _Grid, colour: str) -> Markup:
    edge = "currentColor"
    return _rectangle(left, top, grid, 1.0, rx=4, fill=colour, stroke=edge, stroke_opacity=0.14)


def _outline(left: float, top: float, grid: _Grid, ink: str) -> Markup:
    style = {"class_": "outline", "fill": "none", "stroke": ink}
    return _rectangle(left, top, grid, 3.5, rx=2.5, stroke_opacity=0.75, **style)


def _rectangle(
    left: float, top: float, grid: _Grid, inset: float, **style: str | int | float
) -> Markup:
    across, down = grid.cell_width - 2 * inset, grid.cell_height - 2 * inset
    return element("rect", x=left + inset, y=top + inset, width=across, height=down, **style)


def _words(cell: Cell, left: float, top: float, grid: _Grid, ink: str) -> Markup:
    """The effect, and below it the answers where the cell is tall enough."""
    if cell.effect is None:
        return _unmeasured(left, top, grid, ink)
    middle, centre = left + grid.cell_width / 2, top + grid.cell_height / 2
    style = {"fill": ink, "text_anchor": "middle"}
    size = min(_NUMBER, grid.cell_width / 3)
    number = fit(fixed(cell.effect), grid.cell_width, size)
    answers = _answers(cell, grid.cell_width - 10) if grid.cell_height >= 40 else None
    if answers is None:
        return _text(number, middle, centre + 4.5, size, font_weight=650, **style)
    weight = 650 if cell.after != cell.before else 400
    below = _text(answers, middle, centre + 13, _SMALL, font_weight=weight, **style)
    return join([_text(number, middle, centre - 2, size, font_weight=650, **style), below])


def _answers(cell: Cell, room: float) -> str | None:
    """`before → after`, or as much of it as there is room for."""
    if cell.before is None or cell.after is None:
        return None
    both = f"{one_line(cell.before)} → {one_line(cell.after)}"
    if width(both, _SMALL) <= room:
        return both
    half = (room - width(" → ", _SMALL)) / 2
    if half >= 24:
        return f"{fit(cell.before, half, _SMALL)} → {fit(cell.after, half, _SMALL)}"
    return fit(f"→ {cell.after}", room, _SMALL) or None


def _unmeasured(left: float, top: float, grid: _Grid, ink: str) -> Markup:
    """The words, or a slash where they do not fit."""
    if width("not measured", _SMALL) > grid.cell_width:
        right, bottom = left + grid.cell_width - 6, top + grid.cell_height - 6
        slash = f"M{left + 6:g} {bottom:g}L{right:g} {top + 6:g}"
        return element("path", d=slash, stroke=ink, stroke_opacity=0.35)
    middle, centre = left + grid.cell_width / 2, top + grid.cell_height / 2
    return _text("not measured", middle, centre + 4, _SMALL, fill=ink, text_anchor="middle")


def _text(text: str, x: float, y: float, size: float, **style: str | int | float) -> Markup:
    return element("text", text, x=x, y=y, font_size=size, **{"fill": "currentColor", **style})
