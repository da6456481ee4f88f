"""What a notebook shows of a run, its tokens, and the landing of an edit.

They say what the terminal says, and stay small: long things are cut, and the card says so.
"""

from collections.abc import Sequence
from itertools import islice

import numpy as np

from imaginelens.hooks.landing import Landing
from imaginelens.hooks.run import Run
from imaginelens.hooks.tokens import Kind, TokenMap
from imaginelens.view.boxes import FILLS, Box, boxes, counts
from imaginelens.view.card import card, cut, line, many, rest, table
from imaginelens.view.markup import Markup, element
from imaginelens.view.png import image_address

_EXAMPLES, _PICTURES = 3, 2
_BOXES = 90  # of all examples together
_FLAGS = {"not_emitted": "had no such position", "identical_donor": "got a state equal to its own"}


def run_card(run: Run) -> Markup:
    """What went in and came out: pictures, tokens by kind, what was written, and the trigger."""
    n = min(len(run), _EXAMPLES)
    parts = [_example(run, row, _BOXES // n) for row in range(n)]
    others = rest(len(run) - n, "examples", "run.texts and run.answers hold all")
    return card(f"Run of {many(len(run), 'example')}", line(str(run.trigger)), *parts, others)


def tokens_card(tokens: TokenMap) -> Markup:
    """What every position is, example by example."""
    n = min(len(tokens), _EXAMPLES)
    parts = [_strip(tokens, row, _BOXES // n) for row in range(n)]
    others = rest(len(tokens) - n, "examples", "tokens[row] lists the tokens of one")
    return card(f"TokenMap of {len(tokens)} x {tokens.width} positions", *parts, others)


def landing_card(landing: Landing) -> Markup:
    """The proof of an edit: where it fired, what it touched, by how much, and what it left."""
    change = landing.relative_change
    rows = [
        ("fired in", many(landing.fired, "forward")),
        ("touched", landing.touched),
        ("relative change", "none yet" if np.isnan(change) else f"{change:.4g} (mean)"),
    ]
    if landing.edges:
        rows.append(("edges of attention", str(landing.edges)))
    for flag, words in _FLAGS.items():
        flagged = [str(row) for row, found in landing.flags.items() if found == flag]
        if flagged:
            rows.append((f"{flag}: {words}", f"{cut(flagged)} (rows of the last run)"))
    if landing.donorless:
        rows.append(("left alone, for their donor has no state", cut(landing.donorless)))
    where = f"{landing.edit} at {landing.at} of {cut(landing.sites, 3)}"
    return card("Landing", line(where), table((), rows, "what the edit did"))


def _example(run: Run, row: int, most: int) -> Markup:
    known = run.prompt.pictures[row] if run.prompt.pictures is not None else ()
    pictures = [
        element(
            "img", src=image_address(picture, side=120, most=6_000),
            alt=f"picture {k} of example {row}, {picture.width} x {picture.height} pixels",
            style="max-height:120px;margin-right:8px",
        )
        for k, picture in enumerate(known[:_PICTURES])
    ]  # fmt: skip
    more = len(known) - len(pictures)
    answer = run.answers[row]
    rows = [
        ("asked", run.tokens.asked(row)),
        ("wrote", run.wrote(row)),
        ("answer", "(none found)" if answer is None else answer),
    ]
    shown = element("div", *pictures, f"and {many(more, 'picture')} more" if more > 0 else None)
    said = table((), rows, f"what went in and came out of example {row}")
    return element("div", shown if known else None, _strip(run.tokens, row, most), said)


def _strip(tokens: TokenMap, row: int, most: int) -> Markup:
    """An example's tokens in order, the middle left out if there are too many."""
    found = list(boxes(tokens, row))
    shown = list(map(_chip, found))
    if len(found) > most:
        left, right = (most + 1) // 2, len(found) - most // 2
        shown[left:right] = [element("span", f"… {right - left} boxes … ")]
    strip = element("div", *shown, style="line-height:1.9", role="img", aria_label=_spoken(found))
    return element("div", line(f"example {row}: {counts(tokens, row)}"), strip)


def _chip(box: Box) -> Markup:
    style = f"background:{FILLS[box.kind]};color:#1a1a1a;padding:1px 4px;border-radius:3px"
    style += ";outline:2px solid #3a8a4a" if box.kind == Kind.ANSWER else ""
    label = element("span", element("bdi", box.label), style=style, title=box.told)
    return Markup(label + " ")


def _spoken(found: Sequence[Box]) -> str:
    """The strip in words, for those who cannot see it."""
    listed = " ".join(box.label for box in islice(found, 30))
    return f"tokens in order: {listed}" + (" ..." if len(found) > 30 else "")
