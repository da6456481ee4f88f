"""The key to a heat-map: the shared colour bar with its numbers, the grey and the outline."""

import numpy as np

from imaginelens.view.colour import UNMEASURED, ColourScale
from imaginelens.view.markup import Markup, element
from imaginelens.view.numerals import MINUS, fixed

_BANDS, _WIDTH = 41, 140.0


def legend(limit: float, unit: str, interval_name: str, *, clipped: bool = False) -> Markup:
    """Colour bar from `-limit` to `limit`. `clipped`: some values lie beyond its ends."""
    beyond = ("≤ ", "≥ ") if clipped else ("", "")
    ends = (f"{beyond[0]}{MINUS}{fixed(limit)}", "0", f"{beyond[1]}{fixed(limit)}")
    numbers = [element("span", end) for end in ends]
    bar = element("div", colour_bar(limit), element("div", *numbers, class_="ends"), class_="bar")
    return element(
        "div",
        element("span", unit, class_="unit"),
        bar,
        _swatch("not measured", UNMEASURED, "#a3a3a3"),
        _swatch(f"outlined: {interval_name} excludes 0", "none", "currentColor"),
        class_="legend",
        data_limit=limit,
    )


def colour_bar(limit: float) -> Markup:
    """The scale as a row of bands."""
    scale, step = ColourScale(limit), _WIDTH / _BANDS
    bands = [
        element(
            "rect",
            x=round(i * step, 2),
            width=round(step + 0.3, 2),
            height=10,
            fill=scale.colour(value),
        )
        for i, value in enumerate(np.linspace(-limit, limit, _BANDS).tolist())
    ]
    return element(
        "svg",
        *bands,
        viewBox=f"0 0 {_WIDTH:g} 10",
        width=f"{_WIDTH:g}",
        height="10",
        role="img",
        aria_label=f"red {MINUS}{fixed(limit)}, white 0, blue {fixed(limit)}",
    )


def _swatch(label: str, fill: str, stroke: str) -> Markup:
    box = element("rect", x=1, y=1, width=14, height=10, rx=2, fill=fill, stroke=stroke)
    square = element("svg", box, viewBox="0 0 16 12", width="16", height="12", aria_hidden="true")
    return element("span", square, label, class_="swatch")
