"""What a model read and wrote, in order, as a strip of boxes coloured by kind.

Image tokens are one box, latent steps are z0, z1, ..., whitespace is visible.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby

from imaginelens.hooks.errors import InputError
from imaginelens.hooks.run import Run
from imaginelens.hooks.tokens import Kind, Token, TokenMap
from imaginelens.view.charts import INK, words
from imaginelens.view.figure import Figure
from imaginelens.view.tokens import visible

FILLS = {
    Kind.SYSTEM: "#e3e3e3", Kind.TEXT: "#f6f6f6", Kind.IMAGE: "#cfe6f5", Kind.INSERTED: "#cfe6f5",
    Kind.VIDEO: "#cfe6f5", Kind.AUDIO: "#cfe6f5", Kind.LATENT: "#f7c9a8", Kind.VOCAB: "#f7c9a8",
    Kind.ANSWER: "#bfe3c5",
}  # fmt: skip
_WIDTH, _LINE, _BOX, _LETTER, _GAP = 940, 30, 22, 7.6, 4
_LONG, _EDGE, _LETTERS = 60, 25, 28
_LATENT = (Kind.LATENT, Kind.VOCAB)
_TOGETHER = (Kind.IMAGE, Kind.INSERTED, Kind.VIDEO, Kind.AUDIO)


@dataclass(frozen=True)
class Box:
    """One box of the strip: a token, or several that are shown as one.

    Attributes:
        told: what it says under the pointer.
    """

    label: str
    kind: Kind
    tokens: tuple[Token, ...]
    told: str


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
    counts = _counts(tokens, example)
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
        title={"text": words(f"{about}: {counts}"), "x": 20 / (_WIDTH + 40), "font": {"size": 14}},
        width=_WIDTH + 40, height=height + 70, margin={"l": 20, "r": 20, "t": 50, "b": 20},
        plot_bgcolor="#ffffff", paper_bgcolor="#ffffff", showlegend=False,
        xaxis={**plain, "range": [0, _WIDTH]}, yaxis={**plain, "range": [height, 0]},
        meta={"alt": f"{about}: {counts}; in order, {len(found)} boxes."},
    )  # fmt: skip
    return figure


def boxes(tokens: TokenMap, example: int) -> Iterator[Box]:
    """One box per token; those of an image, or the middle of a long text, are one."""
    for (kind, _), group in groupby(tokens[example], key=lambda t: (t.kind, t.image)):
        run = tuple(group)
        if kind in _TOGETHER:
            yield _many(run, _media(tokens, example, run))
        elif kind in _LATENT:
            yield from (
                Box(f"z{t.step}", kind, (t,), f"{t.index}: latent step {t.step}, span {t.span}")
                for t in run
            )
        elif len(run) > _LONG:
            yield from map(_one, run[:_EDGE])
            yield _many(run[_EDGE:-_EDGE], f"… {len(run) - 2 * _EDGE} tokens …")
            yield from map(_one, run[-_EDGE:])
        else:
            yield from map(_one, run)


def _one(token: Token) -> Box:
    label = visible(token.text)
    told = f"{token.index}: {token.kind.name.lower()}\n{label}"
    short = label if len(label) <= _LETTERS else label[: _LETTERS - 1] + "…"
    return Box(short, token.kind, (token,), told)


def _many(run: tuple[Token, ...], label: str) -> Box:
    told = f"{run[0].index} to {run[-1].index}: {run[0].kind.name.lower()}\n{label}"
    return Box(label, run[0].kind, run, told)


def _media(tokens: TokenMap, example: int, run: tuple[Token, ...]) -> str:
    first = run[0]
    if first.kind == Kind.IMAGE and 0 <= first.image < len(tokens.grids[example]):
        grid = tokens.grids[example][first.image]
        if grid.rows * grid.cols == len(run):
            return f"image {first.image}: {grid.rows} x {grid.cols} = {len(run)}"
        return f"image {first.image}: {len(run)} tokens"
    name = "image, again" if first.kind == Kind.INSERTED else first.kind.name.lower()
    return f"{name}: {len(run)} tokens"


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


def _counts(tokens: TokenMap, example: int) -> str:
    own = [token.kind for token in tokens[example]]
    parts = []
    for kind in dict.fromkeys(own):
        name = kind.name.lower()
        if kind == Kind.IMAGE:
            images = len({t.image for t in tokens[example] if t.kind == kind})
            parts.append(f"{images} image{'s' * (images > 1)} ({own.count(kind)} tokens)")
        else:
            parts.append(f"{own.count(kind)} {name}")
    return ", ".join(parts)
