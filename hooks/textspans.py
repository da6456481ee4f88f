"""Imagination written as text, between two markers: where its spans are in what a model wrote.

CapImagine (arXiv 2602.22766) writes what a latent model would imagine, as `<think_image> ...
</think_image>`. Its spans are selected like latents, `il.imagination[k]`, and edited as text.
"""

from dataclasses import dataclass, field, replace

import numpy as np

from imaginelens.hooks.answers import AnswerFinder
from imaginelens.hooks.errors import InputError, PositionError
from imaginelens.hooks.positions import Index, Positions, spell
from imaginelens.hooks.spec import PromptStyle
from imaginelens.hooks.tokens import Kind, TokenMap

OPEN, CLOSE = "<think_image>", "</think_image>"


@dataclass(frozen=True, kw_only=True)
class TextSpec:
    """How a family writes its imagination as text: the markers around it.

    Attributes:
        name: the family's name.
        open, close: the markers, each one token or several. `il.imagination` selects between the
            usual ones, `il.imagination.between(open, close)` between others.
        prompt: how its authors prompted it.
        answer: finds the answer in what it writes, unless a user gives another finder.
        checkpoints: Hub ids of the family, by which it is recognised.

    >>> TextSpec(name="mine", open="<see>", close="</see>").name
    'mine'
    """

    name: str
    open: str = OPEN
    close: str = CLOSE
    prompt: PromptStyle = field(default_factory=PromptStyle)
    answer: AnswerFinder | None = None
    checkpoints: tuple[str, ...] = ()


@dataclass(frozen=True)
class TextSpan:
    """One span of written imagination: columns of a row of the map.

    Attributes:
        opened: the first column of the opening marker; `start` the first behind it.
        stop: the column behind the last of the content; before `start` where one token holds parts
            of both markers.
        end: the column behind the closing marker, or behind as much of it as was written.
        closed: whether the closing marker is whole.
    """

    opened: int
    start: int
    stop: int
    end: int
    closed: bool


def find_spans(tokens: TokenMap, row: int, open: str = OPEN, close: str = CLOSE) -> list[TextSpan]:
    """Find the spans that a row has written, in order.

    A token that holds a part of a marker belongs to the marker. An opening marker inside a span is
    content. A span that was not closed lasts to the end of the text, but what ends the text is no
    content, nor is what may be the beginning of the closing marker.

    Raises:
        InputError: there is no tokenizer, without which nothing was written.
    """
    columns = _written(tokens, row)
    parts = tokens.texts(row, columns.tolist())
    ends = np.cumsum([len(part) for part in parts], dtype=int)
    starts = ends - [len(part) for part in parts]
    columns = np.append(columns, columns[-1] + 1 if len(columns) else tokens.width)

    def behind(char: int) -> int:
        """The first column whose token begins at or behind a character."""
        return int(columns[np.searchsorted(starts, char)])

    def holding(char: int) -> int:
        """The column of the token that holds a character."""
        return int(columns[np.searchsorted(ends, char, side="right")])

    text, spans = "".join(parts), []
    at = text.find(open)
    while at >= 0:
        inner = at + len(open)
        end = text.find(close, inner)
        closed = end >= 0
        end = end if closed else len(text) - _begun(text[inner:], close)
        after = end + len(close) if closed else len(text)
        spans.append(TextSpan(holding(at), behind(inner), holding(end), behind(after), closed))
        at = text.find(open, after)
    return spans


def _written(tokens: TokenMap, row: int) -> np.ndarray:
    """The columns that a row has written, without the token that ended it."""
    tokenizer = tokens.tokenizer
    if tokenizer is None:
        raise InputError(
            "il.imagination is found by its markers, which takes a tokenizer, and this model has "
            "none; pass processor=... to il.LatentModel"
        )
    columns = np.arange(tokens.prompt_width, tokens.width)
    columns = columns[tokens.kind[row, columns] != Kind.PAD]
    final = (tokenizer.eos_token_id, tokenizer.pad_token_id)
    return columns[:-1] if len(columns) and tokens.ids[row, columns[-1]] in final else columns


def _begun(text: str, marker: str) -> int:
    """How many characters of a marker, but not all, stand at the end of a text."""
    most = min(len(text), len(marker) - 1)
    return next((n for n in range(most, 0, -1) if text.endswith(marker[:n])), 0)


@dataclass(frozen=True)
class ImaginationPositions(Positions):
    """The content of written imagination, markers left out. Index spans like a list."""

    index: Index = None
    open: str = OPEN
    close: str = CLOSE

    def __getitem__(self, index: int | slice) -> "ImaginationPositions":
        return replace(self, index=index)

    def between(self, open: str, close: str) -> "ImaginationPositions":
        """Select the spans between other markers.

        >>> imagination.between("<see>", "</see>")[0]
        imagination.between('<see>', '</see>')[0]
        """
        if not open or not close or open == close:
            raise InputError(
                f"between({open!r}, {close!r}) does not tell where a span ends; give it two "
                "different markers"
            )
        return replace(self, open=open, close=close)

    def resolve(self, tokens: TokenMap, row: int) -> np.ndarray:
        if not tokens.final and self._counts_from_end:
            raise PositionError(
                f"{self!r} counts from the end, which is not known while the run is still being "
                "generated; count from the beginning, or use context='fixed'"
            )
        spans = find_spans(tokens, row, self.open, self.close)
        chosen = [s for k, s in enumerate(spans) if self.holds(k, len(spans))]
        return np.concatenate([np.zeros(0, int), *(np.arange(s.start, s.stop) for s in chosen)])

    def holds(self, number: int, n: int) -> bool:
        """Whether a span is selected by its number; negative indices count from the end of `n`."""
        if isinstance(self.index, int):
            return number == self.index + n * (self.index < 0)
        chosen = self.index or slice(None)
        start, stop = (
            e if e is None or e >= 0 else max(e + n, 0) for e in (chosen.start, chosen.stop)
        )
        return number in range(max(n, number + 1))[start : stop : chosen.step]

    @property
    def _counts_from_end(self) -> bool:
        index = self.index
        ends = (index,) if isinstance(index, int) else (index.start, index.stop) if index else ()
        return any(e is not None and e < 0 for e in ends)

    def __repr__(self) -> str:
        usual = (self.open, self.close) == (OPEN, CLOSE)
        marks = "" if usual else f".between({self.open!r}, {self.close!r})"
        return f"imagination{marks}{spell(self.index)}"


imagination = ImaginationPositions()
