"""What a card of the treasure hunt looks like in words: a caption, in one of several phrasings.

The organism's vocabulary has 42 words, so captions are made of `start`, `then`, `shape`, the nine
names and the six shapes. Two phrasings of one card say the same and differ in nothing but words,
which is what a neutral edit of imagination needs.
"""

import random
import re

from imaginelens.organisms.hunt import NAMES, SHAPES

phrasings: tuple[str, ...] = (
    "{name} then {to} shape {shape}",
    "{name} shape {shape} then {to}",
    "start {name} then {to} shape {shape}",
    "start {name} shape {shape} then {to}",
)

_WORDS = {"name": "|".join(NAMES), "to": "|".join(NAMES), "shape": "|".join(SHAPES)}
_READERS = tuple(
    re.compile(template.format(**{part: f"(?P<{part}>{words})" for part, words in _WORDS.items()}))
    for template in phrasings
)


def caption(name: str, to: str, shape: str, *, how: int) -> str:
    """Say what a card shows: its name, the name that it points to, its shape.

    Args:
        how: which of the `phrasings`; any whole number, counted around.

    Raises:
        ValueError: a word is no name, or no shape.

    >>> caption("cyan", "yellow", "triangle", how=0)
    'cyan then yellow shape triangle'
    >>> caption("cyan", "yellow", "triangle", how=7)
    'start cyan shape triangle then yellow'
    """
    for word, words in ((name, NAMES), (to, NAMES), (shape, SHAPES)):
        if word not in words:
            raise ValueError(f"{word!r} is none of {', '.join(words)}")
    return phrasings[how % len(phrasings)].format(name=name, to=to, shape=shape)


def parse(caption: str) -> tuple[str, str, str] | None:
    """Read (name, to, shape) from a caption in any of the phrasings; None if it is none of them.

    >>> parse("cyan shape triangle then yellow")
    ('cyan', 'yellow', 'triangle')
    >>> parse("cyan yellow") is None
    True
    """
    said = " ".join(caption.split())
    for reader in _READERS:
        if found := reader.fullmatch(said):
            return found["name"], found["to"], found["shape"]
    return None


def phrased(caption: str) -> int | None:
    """Which of the phrasings a caption is in; None if it is none of them.

    >>> phrased("start cyan shape triangle then yellow")
    3
    """
    said = " ".join(caption.split())
    return next((how for how, reader in enumerate(_READERS) if reader.fullmatch(said)), None)


def paraphrase(caption: str, seed: int) -> str:
    """Say the same about the same card in another phrasing, drawn by the seed.

    Raises:
        ValueError: the text is no caption of a card.

    >>> paraphrase("cyan then yellow shape triangle", seed=0)
    'start cyan shape triangle then yellow'
    >>> parse(paraphrase("start red shape bar then gray", seed=5))
    ('red', 'gray', 'bar')
    """
    card = parse(caption)
    if card is None:
        raise ValueError(f"{caption!r} is no caption of a card; see phrasing.phrasings")
    name, to, shape = card
    said = " ".join(caption.split())
    others = [t for t in phrasings if t.format(name=name, to=to, shape=shape) != said]
    chosen = random.Random(f"{seed} {said}").choice(others)
    return chosen.format(name=name, to=to, shape=shape)
