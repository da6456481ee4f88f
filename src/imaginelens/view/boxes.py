"""The tokens of a run in order, as boxes: an image is one, and so is the middle of a long text."""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby

from imaginelens.hooks.tokens import Kind, Token, TokenMap
from imaginelens.view.tokens import visible

FILLS = {
    Kind.SYSTEM: "#e3e3e3", Kind.TEXT: "#f6f6f6", Kind.IMAGE: "#cfe6f5", Kind.INSERTED: "#cfe6f5",
    Kind.VIDEO: "#cfe6f5", Kind.AUDIO: "#cfe6f5", Kind.LATENT: "#f7c9a8", Kind.VOCAB: "#f7c9a8",
    Kind.ANSWER: "#bfe3c5",
}  # fmt: skip
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


def counts(tokens: TokenMap, example: int) -> str:
    """How many tokens of each kind an example has, in words, in the order of the first of each."""
    own = tokens.kind[example]
    parts = []
    for kind in map(Kind, dict.fromkeys(own[own != Kind.PAD].tolist())):
        count = int((own == kind).sum())
        if kind == Kind.IMAGE:
            images = len(set(tokens.image[example, own == kind].tolist()))
            parts.append(f"{images} image{'s' * (images > 1)} ({count} tokens)")
        else:
            parts.append(f"{count} {kind.name.lower()}")
    return ", ".join(parts)
