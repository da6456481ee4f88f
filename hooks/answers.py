"""Where the answer is in what a model wrote: finders from text to a character range.

A finder takes the text behind the last latent span and returns (start, stop), or None if it finds
no answer. A missing answer is counted as missing, never guessed.
"""

import re
from collections.abc import Callable, Sequence
from typing import Any

AnswerFinder = Callable[[str], tuple[int, int] | None]

_SPECIAL = re.compile(r"<\|[^|<>]*\|>|</?[A-Za-z_]+>")
_LETTER = re.compile(r"(?<![A-Za-z0-9])\(?([A-H])\)?(?![A-Za-z0-9])")


def tail(text: str) -> tuple[int, int] | None:
    """All that was written up to the first special token.

    >>> text = " circle<|im_end|>"
    >>> text[slice(*tail(text))]
    'circle'
    """
    ends = (
        m.start() for m in _SPECIAL.finditer(text) if _SPECIAL.sub("", text[: m.start()]).strip()
    )
    end = next(ends, len(text))
    body = _SPECIAL.sub(lambda m: " " * len(m[0]), text[:end])
    return None if not body.strip() else (len(body) - len(body.lstrip()), len(body.rstrip()))


def boxed(text: str) -> tuple[int, int] | None:
    r"""What is inside the last \\boxed{...}, nested braces included.

    >>> text = r"so \\boxed{\\frac{1}{2}} it is"
    >>> text[slice(*boxed(text))]
    '\\\\frac{1}{2}'
    """
    start = text.rfind("\\boxed{")
    if start < 0:
        return None
    start += len("\\boxed{")
    depth = 1
    for i in range(start, len(text)):
        if text[i - 1] != "\\":  # an escaped brace is text
            depth += (text[i] == "{") - (text[i] == "}")
        if depth == 0:
            return (start, i) if i > start else None
    return None


def letter(text: str) -> tuple[int, int] | None:
    """The last stand-alone option letter, A to H.

    >>> text = "The answer is (B)."
    >>> text[slice(*letter(text))]
    'B'
    """
    found = list(_LETTER.finditer(text))
    return found[-1].span(1) if found else None


def after(marker: str) -> AnswerFinder:
    """Make a finder of what stands behind the last `marker`, up to the end of the line.

    >>> text = "Answer: two cats<|im_end|>"
    >>> text[slice(*after("Answer:")(text))]
    'two cats'
    """

    def find(text: str) -> tuple[int, int] | None:
        at = text.rfind(marker)
        if at < 0:
            return None
        begin = at + len(marker)
        found = tail(text[begin:].split("\n")[0])
        return None if found is None else (begin + found[0], begin + found[1])

    return find


def from_callable(fn: Callable[[str], Any]) -> AnswerFinder:
    """Make a finder of a function that returns the answer's text, as it stands in what was written,
    or its range, as finders do.

    >>> text = "I say: four"
    >>> text[slice(*from_callable(lambda written: written.split()[-1])(text))]
    'four'
    """

    def find(text: str) -> tuple[int, int] | None:
        found = fn(text)
        if not found or isinstance(found, tuple):
            return found or None
        at = text.rfind(found)
        return None if at < 0 else (at, at + len(found))

    return find


def between(start: str, stop: str) -> AnswerFinder:
    """Make a finder of what stands between the last `start` and the `stop` behind it, or up to the
    next special token where nothing stops it.

    >>> text = "so <answer> B </answer><|im_end|>"
    >>> text[slice(*between("<answer>", "</answer>")(text))]
    'B'
    """

    def find(text: str) -> tuple[int, int] | None:
        at = text.rfind(start)
        if at < 0:
            return None
        begin = at + len(start)
        end = text.find(stop, begin)
        inner = text[begin:end] if end >= 0 else text[begin:]
        if end < 0:
            found = tail(inner)
            return None if found is None else (begin + found[0], begin + found[1])
        kept = inner.strip()
        lead = len(inner) - len(inner.lstrip())
        return (begin + lead, begin + lead + len(kept)) if kept else None

    return find


def first_found(*finders: AnswerFinder) -> AnswerFinder:
    """Make a finder of several: the first of them that finds an answer.

    >>> text = "The answer is (C)."
    >>> text[slice(*first_found(boxed, letter)(text))]
    'C'
    """

    def find(text: str) -> tuple[int, int] | None:
        return next((found for f in finders if (found := f(text)) is not None), None)

    return find


def without(finder: AnswerFinder, strays: Sequence[str]) -> AnswerFinder:
    """Make a finder whose answer neither begins nor ends with one of `strays`, such as the tokens
    of a latent span that a model also wrote outside of it.

    >>> text = "\\\\boxed{<lat>B</lat>}"
    >>> text[slice(*without(boxed, ["<lat>", "</lat>"])(text))]
    'B'
    """
    either = "|".join(re.escape(s) for s in strays)
    around = re.compile(rf"(?:\s|{either})*(.*?)(?:\s|{either})*", re.DOTALL)

    def find(text: str) -> tuple[int, int] | None:
        found = finder(text)
        if found is None or not strays:
            return found
        kept = around.fullmatch(text, *found)
        assert kept is not None
        return kept.span(1) if kept[1] else None

    return find
