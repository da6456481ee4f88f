"""Where the answer is in what a model wrote: finders from text to a character range.

A finder takes the text behind the last latent span and returns (start, stop), or None if it finds
no answer. A missing answer is counted as missing, never guessed.
"""

import re
from collections.abc import Callable

AnswerFinder = Callable[[str], tuple[int, int] | None]

_SPECIAL = re.compile(r"<\|[^|<>]*\|>|</?[A-Za-z_]+>")
_LETTER = re.compile(r"(?<![A-Za-z])\(?([A-H])\)?(?![A-Za-z])")


def tail(text: str) -> tuple[int, int] | None:
    """All that was written up to the first special token.

    >>> text = " circle<|im_end|>"
    >>> text[slice(*tail(text))]
    'circle'
    """
    end = next((m.start() for m in _SPECIAL.finditer(text) if text[: m.start()].strip()), len(text))
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


def from_callable(fn: Callable[[str], str | None]) -> AnswerFinder:
    """Make a finder of a function that returns the answer's text, as it stands in what was written.

    >>> text = "I say: four"
    >>> text[slice(*from_callable(lambda written: written.split()[-1])(text))]
    'four'
    """

    def find(text: str) -> tuple[int, int] | None:
        found = fn(text)
        if not found:
            return None
        at = text.rfind(found)
        return None if at < 0 else (at, at + len(found))

    return find
