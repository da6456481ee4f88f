"""A model that answers every prompt of this recipe about treasure hunts, by looking at the pixels.

It stands in for a vision-language model where there is none: in tests, in the miniature, and behind
`server.py`. It is given the same messages as any model, and reads pictures and fields from them. It
is deterministic. A card is read as the one of all 432 whose drawing is nearest to the pixels, which
for noise that is alike everywhere is the most likely one.
"""

import base64
import hashlib
import io
import json
import re
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import numpy as np
from PIL import Image

from examples.capimagine.phrasing import caption, parse
from imaginelens.organisms.hunt import BOARD, CARD_PIXELS, NAMES, SHAPES, Hunt, render

FRAME = 2  # pixels at the edge of a card that a drawn frame may hide
ALIKE = 20.0  # mean difference of pixels; grain is below, a frame far above

Card = tuple[str, str, str]  # its name, the name it points to, its shape


def answer(messages: Sequence[dict[str, Any]]) -> str:
    """The reply to the messages of one request, as JSON.

    Raises:
        ValueError: the messages are not of this recipe.
    """
    task, fields, pictures = _asked(messages)
    solve = _TASKS.get(task)
    if solve is None:
        raise ValueError(f"the task is {task!r}, none of {', '.join(_TASKS)}")
    return json.dumps(solve(fields, pictures))


def read_cards(cards: np.ndarray) -> list[Card]:
    """Name what each of some pictures of cards, 28x28 pixels, shows.

    >>> from imaginelens.organisms.hunt import sample
    >>> hunt = sample(1, hops=1, seed=0)[0]
    >>> board = np.asarray(hunt.image())
    >>> name, to, shape = read_cards(board[None, :28, :28])[0]
    >>> (name, to, shape) == (hunt.names[0], hunt.pointers[0], hunt.shapes[0])
    True
    """
    facts, drawings, squares = _all_cards()
    # |pixels - drawing|^2 without the part that is the same for all drawings
    distance = squares - 2 * _inside(cards) @ drawings
    return [facts[i] for i in distance.argmin(1)]


def read_board(board: np.ndarray) -> list[Card]:
    """Name what the nine cards of a board show, in reading order."""
    return read_cards(_cards(board))


@cache
def _all_cards() -> tuple[list[Card], np.ndarray, np.ndarray]:
    """Every card there can be, and how it looks: the mean of a few boards, as they have grain.

    Gives the facts, the drawings in columns, and the sum of squares of each.
    """
    facts: list[Card] = []
    drawings = []
    for turn in range(1, len(NAMES)):
        for shape in SHAPES:
            pointers = NAMES[turn:] + NAMES[:turn]
            boards = [
                Hunt(
                    names=NAMES,
                    pointers=pointers,
                    shapes=(shape,) * len(NAMES),
                    start=NAMES[0],
                    hops=0,
                    noise=grain,
                )
                for grain in range(8)
            ]
            mean = render(boards).astype(np.float32).mean(0)
            drawings.append(_inside(_cards(mean)))
            facts += [(name, to, shape) for name, to in zip(NAMES, pointers, strict=True)]
    columns = np.ascontiguousarray(np.concatenate(drawings).T)
    return facts, columns, (columns**2).sum(0)


def _cards(board: np.ndarray) -> np.ndarray:
    """Cut a board into its nine cards, in reading order."""
    side = CARD_PIXELS
    rows = board.reshape(BOARD, side, BOARD, side, 3).swapaxes(1, 2)
    return rows.reshape(-1, side, side, 3)


def _inside(cards: np.ndarray) -> np.ndarray:
    """Each second pixel within the frame, which is enough, and fast: a row for each card."""
    inner = cards[:, FRAME:-FRAME:2, FRAME:-FRAME:2].astype(np.float32)
    return inner.reshape(len(cards), -1)


# -- the tasks -------------------------------------------------------------------------------------

Fields = dict[str, Any]


def _zoom(fields: Fields, pictures: list[bytes]) -> dict[str, Any]:
    """What the card shows."""
    card = _pixels(pictures[-1], CARD_PIXELS)
    return {"caption": _said(read_cards(card[None])[0], pictures[-1])}


def _edit(fields: Fields, pictures: list[bytes]) -> dict[str, Any]:
    """What the card shows that differs most between the two boards."""
    before, after = (_cards(_pixels(p, BOARD * CARD_PIXELS)) for p in pictures[:2])
    change = abs(after.astype(np.float32) - before).mean(axis=(1, 2, 3))
    marked = int(change.argmax())
    if change[marked] < ALIKE:
        return {"caption": ""}
    return {"caption": _said(read_cards(after[marked : marked + 1])[0], pictures[1])}


def _said(card: Card, picture: bytes) -> str:
    """The caption, in a phrasing that depends on the picture's grain and not on what it shows."""
    return caption(*card, how=hashlib.sha256(picture).digest()[0])


def _refine(fields: Fields, pictures: list[bytes]) -> dict[str, Any]:
    """Nothing but captions and the bare answer: an organism knows no other words."""
    captions = fields["captions"]
    return {"texts": [""] * len(captions) + [fields["answer"]], "captions": captions}


_QUESTION = re.compile(rf"start (\w+)( then)* shape \?|({'|'.join(NAMES)}) \?")


def _filter(fields: Fields, pictures: list[bytes]) -> dict[str, Any]:
    """Whether the last caption has another shape than the answer, or the board no such start."""
    last = parse(fields["captions"][-1]) if fields["captions"] else None
    conflict = last is None or last[2] != fields["answer"]
    asked = _QUESTION.fullmatch(fields["question"].strip())
    names = [name for name, _, _ in read_board(_pixels(pictures[0], BOARD * CARD_PIXELS))]
    answerable = asked is not None and names.count(asked[1] or asked[3]) == 1
    why = "the last card shows another shape" if conflict else "no such card"
    return {
        "conflict": float(conflict),
        "unanswerable": float(not answerable),
        "why": why if conflict or not answerable else "",
    }


def _wrong(fields: Fields, pictures: list[bytes]) -> dict[str, Any]:
    """The captions with another shape on the last card."""
    *before, last = fields["captions"]
    card = parse(last)
    if card is None:
        return {"captions": [], "conclusion": ""}
    others = [shape for shape in SHAPES if shape not in (card[2], fields["answer"])]
    other = others[hashlib.sha256(last.encode()).digest()[0] % len(others)]
    return {"captions": [*before, last.replace(card[2], other)], "conclusion": other}


_TASKS: dict[str, Callable[[Fields, list[bytes]], dict[str, Any]]] = {
    "rewrite-zoom.v1": _zoom,
    "rewrite-edit.v1": _edit,
    "refine.v1": _refine,
    "filter.v1": _filter,
    "wrong.v1": _wrong,
}


# -- the messages ----------------------------------------------------------------------------------


def _asked(messages: Sequence[dict[str, Any]]) -> tuple[str, Fields, list[bytes]]:
    """The task, its fields and its pictures, read from the messages that a model is sent."""
    try:
        task = messages[0]["content"].split("\n", 1)[0].removeprefix("Task: ")
        content = messages[1]["content"]
        pictures = [
            base64.b64decode(part["image_url"]["url"].split(",", 1)[1])
            for part in content
            if part["type"] == "image_url"
        ]
        return task, json.loads(content[-1]["text"]), pictures
    except (KeyError, IndexError, TypeError, AttributeError, ValueError) as error:
        raise ValueError(
            f"the messages are not those of this recipe ({type(error).__name__}: {error})"
        ) from error


def _pixels(picture: bytes, side: int) -> np.ndarray:
    with Image.open(io.BytesIO(picture)) as opened:
        image = opened.convert("RGB")
    if image.size != (side, side):
        image = image.resize((side, side))
    return np.asarray(image)
