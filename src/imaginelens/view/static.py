"""A plotly figure of ours drawn by matplotlib: PNG, SVG and PDF without a browser.

It draws what our figures are made of: heat-maps, lines and markers with error bars, bars, images,
reference lines and annotations, each in its place on the page.
"""

import base64
import html
import io
import re
import warnings
from typing import Any, Literal

import numpy as np

Format = Literal["png", "svg", "pdf"]
_MATPLOTLIB = "matplotlib"
_DPI = 96.0
_POINT = 72.0 / _DPI  # of a pixel
_DASHES = {"dash": "--", "dot": ":", "dashdot": "-."}
_MARKERS = {
    "circle": "o", "square": "s", "diamond": "D", "x": "x", "cross": "+", "triangle-left": "<",
    "triangle-right": ">",
}  # fmt: skip


def draw(figure: Any, kind: str, scale: float) -> bytes:
    """Draw a figure, `scale` pixels for each of its own.

    Raises:
        ImportError: matplotlib is not installed.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure as Page
    except ImportError as error:
        if (error.name or "").partition(".")[0] != _MATPLOTLIB:
            raise  # it is there, and broken
        raise ImportError(
            "pictures without a browser are drawn by matplotlib: "
            "pip install 'imaginelens[notebook]'",
            name=_MATPLOTLIB,
        ) from error
    layout = figure.layout
    width, height = layout.width or 700, layout.height or 450
    page = Page(figsize=(width / _DPI, height / _DPI), dpi=_DPI)
    FigureCanvasAgg(page)
    drawing = _Drawing(figure, page, width, height)
    out = io.BytesIO()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*[Gg]lyph.*")  # of scripts its fonts lack
        drawing.draw()
        page.savefig(out, format=kind, dpi=_DPI * scale, metadata=_undated(kind))
    return out.getvalue()


def plain(text: Any) -> str:
    """What a label says, without plotly's tags: breaks become new lines.

    >>> plain("&lt;s&gt;<br>layer 3")
    '<s>\\nlayer 3'
    """
    words = "" if text is None else str(text)
    return html.unescape(re.sub(r"<[^>]*>", "", re.sub(r"<br ?/?>", "\n", words)))


class _Drawing:
    """One page, with the axes of each subplot in the place that plotly gives them."""

    def __init__(self, figure: Any, page: Any, width: float, height: float) -> None:
        self.figure, self.layout, self.page = figure, figure.layout, page
        self.width, self.height = width, height
        margin = self.layout.margin
        sides = {"l": 80, "r": 80, "t": 100, "b": 80}
        left, right, top, bottom = (
            sides[side] if margin[side] is None else margin[side] for side in "lrtb"
        )
        self.inside = (
            left / width,
            bottom / height,
            (width - left - right) / width,
            (height - top - bottom) / height,
        )
        self.axes: dict[tuple[str, str], Any] = {}

    def draw(self) -> None:
        for trace in self.figure.data:
            if trace.visible in (None, True):
                axes = self.axes_of(trace.xaxis or "x", trace.yaxis or "y")
                getattr(self, f"_{trace.type}")(axes, trace)
        for (x, y), axes in self.axes.items():
            self._dress(axes, self._axis(x), self._axis(y))
        for shape in self.layout.shapes:
            self._shape(shape)
        for note in self.layout.annotations:
            self._annotate(note)
        self._title()
        self._bar()
        self._legend()

    # ---- places --------------------------------------------------------------------------------

    def axes_of(self, x: str, y: str) -> Any:
        if (x, y) not in self.axes:
            left, bottom, width, height = self.inside
            across = self._axis(x).domain or (0, 1)
            up = self._axis(y).domain or (0, 1)
            place = (
                left + width * across[0],
                bottom + height * up[0],
                width * (across[1] - across[0]),
                height * (up[1] - up[0]),
            )
            axes = self.page.add_axes(place)
            axes.set_facecolor(_colour(self.layout.plot_bgcolor, "#ffffff"))
            self.axes[x, y] = axes
        return self.axes[x, y]

    def _axis(self, name: str) -> Any:
        return self.layout[name[0] + "axis" + name[1:]]

    def _point(self, x: float, y: float) -> tuple[float, float]:
        """A place on the plotting area as one on the page."""
        left, bottom, width, height = self.inside
        return left + width * x, bottom + height * y

    # ---- traces --------------------------------------------------------------------------------

    def _heatmap(self, axes: Any, trace: Any) -> None:
        from matplotlib.colors import LinearSegmentedColormap, Normalize

        values = np.array(trace.z, dtype=float)
        about = self.layout[trace.coloraxis] if trace.coloraxis else trace
        low = about.cmin if trace.coloraxis else about.zmin
        high = about.cmax if trace.coloraxis else about.zmax
        low = float(np.nanmin(values)) if low is None else low
        high = float(np.nanmax(values)) if high is None else high
        stops = [(place, _colour(colour)) for place, colour in about.colorscale]
        colours = LinearSegmentedColormap.from_list("own", stops)
        x = np.arange(values.shape[1]) if trace.x is None else np.asarray(trace.x, dtype=float)
        y = np.arange(values.shape[0]) if trace.y is None else np.asarray(trace.y, dtype=float)
        rows, columns = values.shape
        mesh = axes.pcolormesh(
            _edges(x, columns), _edges(y, rows), np.ma.masked_invalid(values), cmap=colours,
            norm=Normalize(low, high), edgecolors=axes.get_facecolor() if trace.xgap else "none",
            linewidth=(trace.xgap or 0) * _POINT, alpha=trace.opacity,
        )  # fmt: skip
        self.mesh = mesh
        if trace.text is not None and trace.texttemplate:
            self._cell_words(axes, trace, x, y, mesh)

    def _cell_words(self, axes: Any, trace: Any, x: Any, y: Any, mesh: Any) -> None:
        from imaginelens.view.colour import ink_on

        size = (trace.textfont.size or 11) * _POINT
        for i, row in enumerate(trace.text):
            for j, words in enumerate(row):
                value = trace.z[i][j]
                if words and value is not None and np.isfinite(value):
                    red, green, blue = (round(255 * c) for c in mesh.cmap(mesh.norm(value))[:3])
                    ink = ink_on(f"#{red:02x}{green:02x}{blue:02x}")
                    axes.text(x[j], y[i], plain(words), ha="center", va="center", color=ink,
                              fontsize=size, parse_math=False)  # fmt: skip

    def _scatter(self, axes: Any, trace: Any) -> None:
        mode = trace.mode or "lines"
        x, y = _numbers(trace.x), _numbers(trace.y)
        line, marker = trace.line, trace.marker
        style: dict[str, Any] = {"linestyle": "none"}
        if "lines" in mode:
            style = {
                "linestyle": _DASHES.get(line.dash or "", "-"),
                "linewidth": (2 if line.width is None else line.width) * _POINT,
                "color": _colour(line.color, "#2166ac"),
            }
        if "markers" in mode:
            ink = marker.color if isinstance(marker.color, str) else None
            symbol = str(marker.symbol or "circle")
            style |= {
                "marker": _MARKERS.get(symbol.removesuffix("-open"), "o"),
                "markersize": (marker.size or 6) * _POINT,
                "color": _colour(ink, style.get("color", "#2166ac")),
                "markeredgewidth": max(marker.line.width or 1, 1) * _POINT,
                "markerfacecolor": _colour(ink, style.get("color", "#2166ac")),
                "clip_on": trace.cliponaxis is not False,
            }
            if symbol.endswith("-open"):
                style["markerfacecolor"] = "#ffffff"
            elif marker.line.width and isinstance(marker.line.color, str):
                style["markeredgecolor"] = _colour(marker.line.color)
        style["alpha"] = trace.opacity
        if trace.fill in ("toself", "tonexty"):
            axes.fill(x, y, color=_colour(trace.fillcolor, "#d1e5f0"), linewidth=0)
            return
        label = plain(trace.name) if trace.name and trace.showlegend is not False else None
        axes.plot(x, y, label=label, **style)
        for direction in ("x", "y"):
            self._error(axes, trace, direction, x, y, style.get("color", "#2166ac"))
        if "text" in mode and trace.text is not None:
            for a, b, words in zip(x, y, trace.text, strict=False):
                axes.text(a, b, plain(words), fontsize=10 * _POINT, parse_math=False)

    def _error(self, axes: Any, trace: Any, direction: str, x: Any, y: Any, colour: str) -> None:
        error = trace[f"error_{direction}"]
        if error.array is None:
            return
        above = _numbers(error.array)
        below = above if error.arrayminus is None else _numbers(error.arrayminus)
        axes.errorbar(
            x, y, **{f"{direction}err": np.stack([below, above])}, fmt="none", ecolor=colour,
            elinewidth=1.5 * _POINT, capsize=3 * _POINT,
        )  # fmt: skip

    def _bar(self, axes: Any = None, trace: Any = None) -> None:
        if trace is not None:
            across = trace.orientation == "h"
            place = axes.barh if across else axes.bar
            at, length = (trace.y, trace.x) if across else (trace.x, trace.y)
            place(_numbers(at), _numbers(length), color=_colour(trace.marker.color, "#2166ac"))
            return
        about = self.layout.coloraxis
        if about.colorscale is None or about.showscale is False or not hasattr(self, "mesh"):
            return
        left, bottom, width, height = self.inside
        thin = 14 / self.width
        right = 1.0 if about.colorbar.x is None else about.colorbar.x
        place = self.page.add_axes((left + width * right + thin, bottom, thin, height))
        bar = self.page.colorbar(self.mesh, cax=place)
        bar.ax.tick_params(labelsize=11 * _POINT)
        bar.outline.set_visible(False)
        bar.set_label(plain(about.colorbar.title.text), fontsize=12 * _POINT, parse_math=False)

    def _image(self, axes: Any, trace: Any) -> None:
        given = trace.z is not None
        pixels = np.asarray(trace.z, dtype=np.uint8) if given else _decoded(trace.source)
        x0, dx = trace.x0 or 0, 1 if trace.dx is None else trace.dx
        y0, dy = trace.y0 or 0, 1 if trace.dy is None else trace.dy
        left, top = x0 - dx / 2, y0 - dy / 2
        right, bottom = left + dx * pixels.shape[1], top + dy * pixels.shape[0]
        axes.imshow(pixels, extent=(left, right, bottom, top))

    # ---- what is around them -------------------------------------------------------------------

    def _dress(self, axes: Any, x: Any, y: Any) -> None:
        for axis, direction in ((x, "x"), (y, "y")):
            if axis.range is not None:
                getattr(axes, f"set_{direction}lim")(*axis.range)
            elif axis.autorange == "reversed":
                limits = getattr(axes, f"get_{direction}lim")()
                getattr(axes, f"set_{direction}lim")(*sorted(limits, reverse=True))
            ticks = getattr(axes, f"{direction}axis")
            if axis.tickvals is not None:
                words = [plain(t) for t in (axis.ticktext or axis.tickvals)]
                angle = -(axis.tickangle or 0)
                slanted = direction == "x" and angle not in (0, 90)
                under = {"ha": "right", "rotation_mode": "anchor"} if slanted else {}
                ticks.set_ticks(
                    _numbers(axis.tickvals), labels=words, parse_math=False, rotation=angle, **under
                )
            ticks.set_tick_params(
                labelsize=11 * _POINT,
                length=0 if axis.ticks in ("", None) else 3,
                pad=3.5 + (axis.ticklabelstandoff or 0) * _POINT,
            )
            if axis.showticklabels is False or axis.visible is False:
                ticks.set_ticks([])
            label = plain(axis.title.text)
            getattr(axes, f"set_{direction}label")(label, fontsize=12 * _POINT, parse_math=False)
        for side in axes.spines.values():
            side.set_visible(False)
        if x.showgrid or y.showgrid:
            axes.grid(color="#e6e6e6", linewidth=0.6)
            axes.set_axisbelow(True)
        if y.scaleanchor is not None:
            axes.set_aspect("equal", adjustable="box", anchor="NW")

    def _shape(self, shape: Any) -> None:
        from matplotlib.lines import Line2D
        from matplotlib.patches import Rectangle

        x, y = shape.xref or "x", shape.yref or "y"
        own = x.removesuffix(" domain"), y.removesuffix(" domain")
        if own not in self.axes:
            return
        axes = self.axes[own]
        if x.endswith("domain"):
            where = axes.get_yaxis_transform()
        else:
            where = axes.get_xaxis_transform() if y.endswith("domain") else axes.transData
        colour = _colour(shape.line.color, "#444444")
        width = (2 if shape.line.width is None else shape.line.width) * _POINT
        dash: Any = _DASHES.get(shape.line.dash or "", "-")
        if shape.type == "line":
            axes.add_line(
                Line2D((shape.x0, shape.x1), (shape.y0, shape.y1), transform=where, color=colour,
                       linewidth=width, linestyle=dash, zorder=1 if shape.layer == "below" else 2)
            )  # fmt: skip
        else:
            axes.add_patch(
                Rectangle((shape.x0, shape.y0), shape.x1 - shape.x0, shape.y1 - shape.y0,
                          transform=where, edgecolor=colour, linewidth=width,
                          facecolor=_colour(shape.fillcolor, "none"), zorder=0.5)
            )  # fmt: skip

    def _annotate(self, note: Any) -> None:
        x, y = self._point(note.x, note.y)
        across = {"left": "left", "right": "right"}.get(note.xanchor or "", "center")
        up = {"top": "top", "bottom": "bottom"}.get(note.yanchor or "", "center")
        if (note.xref, note.yref) == ("paper", "paper"):
            x += (note.xshift or 0) / self.width
            y += (note.yshift or 0) / self.height
            self.page.text(x, y, plain(note.text), ha=across, va=up, parse_math=False,
                           fontsize=(note.font.size or 12) * _POINT,
                           color=_colour(note.font.color, "#222222"))  # fmt: skip

    def _title(self) -> None:
        words = plain(self.layout.title.text)
        if words:
            self.page.text(
                self.inside[0], 1 - 12 / self.height, words, ha="left", va="top",
                fontsize=15 * _POINT, parse_math=False,
            )  # fmt: skip

    def _legend(self) -> None:
        if self.layout.showlegend is False:
            return
        handles: dict[str, Any] = {}
        for axes in self.axes.values():
            for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
                handles.setdefault(label, handle)
        if len(handles) > 1 or (handles and self.layout.showlegend):
            right = self.inside[0] + self.inside[2]
            self.page.legend(
                list(handles.values()), list(handles), loc="upper left", frameon=False,
                bbox_to_anchor=(right, self.inside[1] + self.inside[3]), fontsize=11 * _POINT,
            )  # fmt: skip


def _numbers(values: Any) -> np.ndarray:
    return np.array([np.nan if v is None else v for v in values], dtype=float)


def _edges(centres: np.ndarray, cells: int) -> np.ndarray:
    """Where so many cells begin and end, whose centres these are, or, one more, their edges."""
    if len(centres) == cells + 1:
        return centres
    if len(centres) == 1:
        return centres[0] + np.array([-0.5, 0.5])
    middle = (centres[1:] + centres[:-1]) / 2
    return np.concatenate([[2 * centres[0] - middle[0]], middle, [2 * centres[-1] - middle[-1]]])


def _decoded(address: str) -> np.ndarray:
    """The pixels of a picture in a `data:` address."""
    from PIL import Image

    data = base64.b64decode(address.partition("base64,")[2])
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))


def _colour(given: Any, otherwise: str = "#000000") -> Any:
    """A colour of plotly's as matplotlib takes it."""
    if not isinstance(given, str):
        return otherwise
    found = re.fullmatch(r"rgba?\(([^)]*)\)", given)
    if found is None:
        return given
    parts = [float(part) for part in found.group(1).split(",")]
    return tuple(part / 255 for part in parts[:3]) + tuple(parts[3:])


def _undated(kind: str) -> dict[str, Any]:
    """The same figure gives the same file."""
    return {"png": {"Software": None}, "svg": {"Date": None}, "pdf": {"CreationDate": None}}[kind]
