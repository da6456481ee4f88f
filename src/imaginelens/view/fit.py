"""Bring text onto one line, and shorten it to fit a box drawn in SVG, where nothing wraps."""

import unicodedata

from imaginelens.view.markup import inert

_ADVANCE = 0.58  # mean width of a character in ems, on the safe side for sans-serif fonts


def one_line(text: str | None) -> str:
    """Inert text without line breaks; a missing one is said to be missing."""
    if text is None:
        return "(none)"
    return inert(text, limit=300).replace("\n", "⏎").replace("\t", " ")


def width(text: str, size: float) -> float:
    """About how wide the text is at this font size, in the same unit."""
    return sum(_ems(character) for character in text) * _ADVANCE * size


def fit(text: str, room: float, size: float) -> str:
    """The text, or its beginning and an ellipsis; empty when not even that fits.

    >>> fit("triangle", 90.0, 10.0), fit("triangle", 30.0, 10.0), fit("triangle", 9.0, 10.0)
    ('triangle', 'tria…', '')
    """
    text = one_line(text)
    if width(text, size) <= room:
        return text
    kept = ""
    for character in text:
        if width(kept + character + "…", size) > room:
            break
        kept += character
    return f"{kept}…" if kept else ""


def _ems(character: str) -> float:
    if unicodedata.combining(character):
        return 0.0
    return 1.8 if unicodedata.east_asian_width(character) in "WF" else 1.0
