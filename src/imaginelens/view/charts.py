"""Charts of lines and points on white, whose words are never taken for markup."""

import html
from collections.abc import Sequence

from imaginelens.view.figure import Figure

GRID, INK, FAINT = "#e6e6e6", "#1a1a1a", "#8a8a8a"
# Okabe and Ito's, which readers with any form of colour blindness can tell apart, and grey; their
# yellow, which is hard to see on white, is darker here.
COLOURS = (
    "#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000", "#b8a900",
    "#8a8a8a",
)  # fmt: skip
DASHES = ("solid", "dash", "dot")


def words(text: object) -> str:
    """Text as plotly shows it: it takes tags for markup.

    >>> words("<s> a & b")
    '&lt;s&gt; a &amp; b'
    """
    return html.escape(str(text), quote=False).replace("\n", "<br>")


def chart(
    title: str,
    *,
    x: str,
    y: str,
    alt: str,
    width: int = 640,
    height: int = 420,
    left: int = 80,
    right: int = 160,
    notes: Sequence[str] = (),
) -> Figure:
    """An empty chart with named axes, and lines of small print below it."""
    below = 62 + 17 * len(notes)
    figure = Figure()
    figure.update_layout(
        title={"text": words(title), "x": left / width, "xanchor": "left"},
        width=width, height=height, plot_bgcolor="#ffffff", paper_bgcolor="#ffffff",
        margin={"l": left, "r": right, "t": 60, "b": below}, meta={"alt": alt},
    )  # fmt: skip
    lines = {"showgrid": True, "gridcolor": GRID, "zeroline": False}
    figure.update_xaxes(title={"text": words(x)}, **lines)
    figure.update_yaxes(title={"text": words(y)}, **lines)
    if notes:
        figure.add_annotation(
            text=words("\n".join(notes)), xref="paper", yref="paper", x=0, y=0, xanchor="left",
            yanchor="bottom", yshift=6 - below, showarrow=False, align="left",
            font={"size": 11, "color": "#555555"},
        )  # fmt: skip
    return figure
