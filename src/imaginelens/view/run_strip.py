"""What a model read and wrote, in order, as a strip of boxes coloured by kind.

Image tokens are one box, latent steps are z0, z1, ..., whitespace is visible.
"""

from imaginelens.hooks.errors import InputError
from imaginelens.hooks.run import Run
from imaginelens.hooks.tokens import Kind, TokenMap
from imaginelens.view.boxes import FILLS as FILLS
from imaginelens.view.boxes import Box, counts
from imaginelens.view.boxes import boxes as boxes
from imaginelens.view.charts import INK, words
from imaginelens.view.figure import Figure

_WIDTH, _LINE, _BOX, _LETTER, _GAP = 940, 30, 22, 7.6, 4


def token_strip(run: Run | TokenMap, *, example: int = 0, title: str | None = None) -> Figure:
    """Draw the tokens of one example in order; hover a box for its place and kind.

    Numbers in hovers count from the example's first token, as in `il.positions([4, 7])`. The figure
    is returned, not shown.

    Raises:
        InputError: there is no such example.

    >>> import imaginelens as il
    >>> lens = il.load("latent-content")
    >>> token_strip(lens.run(lens.task(n=1, seed=0).base)).alt
    'tokens of example 0: 16 text, 1 image (9 tokens), 2 latent, 1 answer; in order, 20 boxes.'
    """
    import plotly.graph_objects as go

    tokens = run.tokens if isinstance(run, Run) else run
    if not 0 <= example < len(tokens):
        raise InputError(f"there is no example {example} among {len(tokens)}")
    found = list(boxes(tokens, example))
    places = _places(found)
    height = _LINE * (1 + max((line for line, _, _ in places), default=0))
    about = title or f"tokens of example {example}"
    many = counts(tokens, example)
    figure = Figure()
    for box, (line, left, wide) in zip(found, places, strict=True):
        top = line * _LINE
        answer = box.kind == Kind.ANSWER
        figure.add_shape(
            type="rect", x0=left, x1=left + wide, y0=top, y1=top + _BOX, fillcolor=FILLS[box.kind],
            line={"color": INK if answer else "#b0b0b0", "width": 2 if answer else 1},
            layer="below",
        )  # fmt: skip
        figure.add_annotation(
            text=words(box.label), xref="paper", yref="paper", x=(left + wide / 2) / _WIDTH,
            y=1 - (top + _BOX / 2) / height, xanchor="center", yanchor="middle", showarrow=False,
            font={"size": 12, "color": INK, "family": "monospace"},
        )  # fmt: skip
    figure.add_trace(
        go.Scatter(
            x=[left + wide / 2 for _, left, wide in places],
            y=[line * _LINE + _BOX / 2 for line, _, _ in places], mode="markers", opacity=0,
            marker={"size": 16}, customdata=[words(box.told) for box in found],
            hovertemplate="%{customdata}<extra></extra>",
        )
    )  # fmt: skip
    plain = {"visible": False, "showgrid": False, "zeroline": False}
    figure.update_layout(
        title={"text": words(f"{about}: {many}"), "x": 20 / (_WIDTH + 40), "font": {"size": 14}},
        width=_WIDTH + 40, height=height + 70, margin={"l": 20, "r": 20, "t": 50, "b": 20},
        plot_bgcolor="#ffffff", paper_bgcolor="#ffffff", showlegend=False,
        xaxis={**plain, "range": [0, _WIDTH]}, yaxis={**plain, "range": [height, 0]},
        meta={"alt": f"{about}: {many}; in order, {len(found)} boxes."},
    )  # fmt: skip
    return figure


def _places(found: list[Box]) -> list[tuple[int, float, float]]:
    """The line of each box, where it begins, and how wide it is; in pixels."""
    places, line, left = [], 0, 0.0
    for box in found:
        wide = 12 + _LETTER * len(box.label)
        if left and left + wide > _WIDTH:
            line, left = line + 1, 0.0
        places.append((line, left, wide))
        left += wide + _GAP
    return places
