"""The run as a strip of tokens: images collapsed, latents named z0, z1, …, whitespace visible."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import count, groupby

from imaginelens.view.markup import Markup, element, inert
from imaginelens.view.report import Token

_LONG, _EDGE = 80, 30


@dataclass(frozen=True)
class Chip:
    """One box of the strip: what is written in it, and on hover."""

    label: str
    kind: str
    title: str


def token_strip(tokens: Sequence[Token]) -> Markup:
    """The whole run in reading order."""
    items = [
        element("li", element("bdi", chip.label), class_=f"chip {chip.kind}", title=chip.title)
        for chip in chips(tokens)
    ]
    return element("ol", *items, class_="tokens", aria_label="tokens of the base run, in order")


def chips(tokens: Sequence[Token]) -> Iterator[Chip]:
    """One chip per token; a run of images or pads, or the middle of a long text, becomes one.

    >>> run = [("<image>", "image"), ("<image>", "image"), ("<z>", "latent"), (" a", "text")]
    >>> [chip.label for chip in chips([Token(text, kind) for text, kind in run])][1:]
    ['z0', '·a']
    """
    steps = count()
    for kind, group in groupby(enumerate(tokens), key=lambda item: item[1].kind):
        run = list(group)
        if kind in ("image", "pad"):
            yield _many(run, kind, f"{kind} \N{MULTIPLICATION SIGN} {len(run)}")
        elif kind == "latent":
            yield from (_latent(position, token, next(steps)) for position, token in run)
        else:
            yield from _words(run, kind)


def _words(run: list[tuple[int, Token]], kind: str) -> Iterator[Chip]:
    if len(run) <= _LONG:
        yield from (_one(position, token) for position, token in run)
        return
    hidden = run[_EDGE:-_EDGE]
    yield from (_one(position, token) for position, token in run[:_EDGE])
    yield _many(hidden, kind, f"… {len(hidden)} tokens …")
    yield from (_one(position, token) for position, token in run[-_EDGE:])


def _one(position: int, token: Token) -> Chip:
    label = visible(token.text)
    return Chip(label, token.kind, f"position {position}, {token.kind}\n{label}")


def _latent(position: int, token: Token, step: int) -> Chip:
    title = f"position {position}, latent step {step}\n{visible(token.text)}"
    return Chip(f"z{step}", "latent", title)


def _many(run: list[tuple[int, Token]], kind: str, label: str) -> Chip:
    return Chip(label, kind, f"positions {run[0][0]} to {run[-1][0]}, {kind}")


def visible(text: str) -> str:
    """A token's text with its whitespace written out.

    >>> visible(" a\\n")
    '·a⏎'
    """
    text = inert(text, limit=60).replace(" ", "·").replace("\n", "⏎").replace("\t", "⇥")
    return text or "(empty)"
