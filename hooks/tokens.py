"""What every position of a batch is: system, text, image cell, latent step, answer or padding."""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import IntEnum
from functools import lru_cache
from typing import Any

import numpy as np

from imaginelens.hooks.grid import ImageGrid, Layout
from imaginelens.hooks.media import Videos


class Kind(IntEnum):
    """The kinds of a position."""

    PAD = 0
    SYSTEM = 1
    TEXT = 2
    IMAGE = 3
    LATENT = 4
    ANSWER = 5
    VOCAB = 6  # a latent that is a written token: nothing is laid over its embedding
    VIDEO = 7
    AUDIO = 8
    INSERTED = 9  # an image token that comes again before a latent


_SYSTEM = re.compile(
    r"<\|im_start\|>\s*system.*?<\|im_end\|>\n?"
    r"|<\|start_header_id\|>system<\|end_header_id\|>.*?<\|eot_id\|>",
    re.DOTALL,
)


@dataclass(frozen=True)
class Token:
    """One position of one example.

    Attributes:
        column: where it stands in the padded batch; `index` counts from the row's first real token.
        image, row, col: the image and grid cell it shows; -1 if none.
        span, step: its latent span and its step over all spans of the run; -1 if none.
        box: the cell's pixels as left, top, right, bottom, where the picture is known.
        video, frame: the video and the frame of it, whose cell `row` and `col` are; -1 if none.
    """

    column: int
    index: int
    kind: Kind
    text: str
    image: int = -1
    row: int = -1
    col: int = -1
    span: int = -1
    step: int = -1
    box: tuple[float, float, float, float] | None = None
    video: int = -1
    frame: int = -1


@dataclass(frozen=True, repr=False)
class TokenMap:
    """The map of a batch, one row per example; left padding included.

    `keys` identify the examples by their content, whatever batch they are in. All arrays are
    (example, position). While a run is being generated the map grows by a column per step and
    `final` is False: places that depend on what is still to come do not resolve yet.
    """

    ids: np.ndarray
    kind: np.ndarray
    image: np.ndarray
    cell: np.ndarray  # (example, position, 2)
    box: np.ndarray  # (example, position, 4) in pixels of the picture
    span: np.ndarray
    step: np.ndarray
    grids: tuple[tuple[ImageGrid, ...], ...]
    tokenizer: Any
    prompt_width: int
    keys: tuple[str, ...]
    final: bool = True
    markers: tuple[int, int] | None = None  # the ids that open and close a latent span
    spoken: Mapping[int, int] = field(default_factory=dict)  # written latents: token id -> group
    videos: tuple[Videos, ...] = ()  # of each example, where there are any

    def __repr__(self) -> str:
        rows = [
            f"  {row}: " + ", ".join(f"{n} {kind}" for kind, n in describe(self, row).items() if n)
            for row in range(min(len(self), 4))
        ]
        more = ["  ..."] if len(self) > 4 else []
        return "\n".join([f"TokenMap of {len(self)} x {self.width} positions", *rows, *more])

    def _repr_html_(self) -> str:
        from imaginelens.view.run_cards import tokens_card

        return tokens_card(self)

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def width(self) -> int:
        """Columns of the padded batch."""
        return self.ids.shape[1]

    def __getitem__(self, row: int) -> list[Token]:
        """The tokens of one example, padding left out."""
        real = np.flatnonzero(self.kind[row] != Kind.PAD)
        return [self.token(row, int(column)) for column in real]

    def token(self, row: int, column: int) -> Token:
        """What stands at one column of one row."""
        image, (r, c) = int(self.image[row, column]), map(int, self.cell[row, column])
        video = frame = -1
        if self.kind[row, column] == Kind.VIDEO and self.videos:
            video, frame, r, c = self.videos[row].of(column)
        return Token(
            column=column,
            index=column - self.start(row),
            kind=Kind(int(self.kind[row, column])),
            text=self._piece_at(row, column),
            image=image,
            row=r,
            col=c,
            span=int(self.span[row, column]),
            step=int(self.step[row, column]),
            box=_known(self.box[row, column]),
            video=video,
            frame=frame,
        )

    def start(self, row: int) -> int:
        """The column of the row's first real token."""
        real = np.flatnonzero(self.kind[row] != Kind.PAD)
        return int(real[0]) if len(real) else self.width

    def columns(self, row: int, kind: Kind) -> np.ndarray:
        """The columns of one row that are of this kind."""
        return np.flatnonzero(self.kind[row] == kind)

    def latents(self, row: int) -> np.ndarray:
        """The columns of one row that are latent steps, fed back or written as tokens."""
        kind = self.kind[row]
        return np.flatnonzero((kind == Kind.LATENT) | (kind == Kind.VOCAB))

    def marked_spans(self, row: int) -> list[tuple[int, int]]:
        """The columns of the tokens that open and close each latent span; -1 where none closes it.

        An open token is one where the model writes, at a place that is no latent or, where the
        first latent takes its slot, at the first of a span.
        """
        if self.markers is None:
            return []
        found: list[tuple[int, int]] = []
        inside = np.isin(np.arange(self.width), self.latents(row))
        follows = np.append(False, inside[:-1])  # a latent
        for column in np.flatnonzero(np.isin(self.ids[row], self.markers)):
            behind_open = bool(found) and found[-1][0] == column - 1
            if self.ids[row, column] == self.markers[0] and self.kind[row, column] != Kind.PAD:
                slot = inside[column] and not follows[column] and not behind_open
                in_prompt = column < self.prompt_width and column + 1 < self.width
                opens = inside[column + 1] if in_prompt else not inside[column]
                if slot or opens:
                    found.append((int(column), -1))
            elif found and found[-1][1] < 0 and not inside[column]:
                if follows[column] or behind_open:
                    found[-1] = (found[-1][0], int(column))
        return found

    def text(self, row: int, start: int = 0, stop: int | None = None) -> str:
        """The decoded text between two columns, padding left out."""
        keep = [c for c in range(*slice(start, stop).indices(self.width)) if self.kind[row, c]]
        return "".join(self.texts(row, keep))

    def asked(self, row: int) -> str:
        """The words of the prompt, without image tokens and the system message."""
        columns = self.columns(row, Kind.TEXT)
        return "".join(self.texts(row, columns[columns < self.prompt_width].tolist()))

    def texts(self, row: int, columns: Sequence[int]) -> list[str]:
        """The text that each of the columns adds to the one before it."""
        return pieces(self.tokenizer, [int(self.ids[row, c]) for c in columns])

    def _piece_at(self, row: int, column: int) -> str:
        prev = [column - 1] if column > self.start(row) else []
        return self.texts(row, [*prev, column])[-1]

    def find(self, row: int, needle: str) -> np.ndarray:
        """The columns of the tokens that overlap the first occurrence of `needle`."""
        columns = np.flatnonzero(self.kind[row] != Kind.PAD)
        return self.overlapping(row, columns, lambda text: _first(text, needle))

    def overlapping(
        self, row: int, columns: np.ndarray, finder: Callable[[str], tuple[int, int] | None]
    ) -> np.ndarray:
        """Those of the columns whose tokens overlap the character range that `finder` finds."""
        parts = self.texts(row, columns.tolist())
        found = finder("".join(parts))
        if found is None:
            return np.zeros(0, dtype=int)
        ends = np.cumsum([len(part) for part in parts])
        starts = ends - [len(part) for part in parts]
        return columns[(ends > found[0]) & (starts < found[1])]

    def grown(
        self, ids: np.ndarray, kind: np.ndarray, span: np.ndarray, step: np.ndarray
    ) -> "TokenMap":
        """The map with one more column, as one more token of every row is about to be read."""

        def join(old: np.ndarray, new: np.ndarray) -> np.ndarray:
            return np.concatenate([old, new[:, None].astype(old.dtype)], axis=1)

        blank = np.full(len(ids), -1)
        new = replace(
            self,
            ids=join(self.ids, ids),
            kind=join(self.kind, kind),
            image=join(self.image, blank),
            cell=join(self.cell, np.stack([blank] * 2, -1)),
            box=join(self.box, np.full((len(ids), 4), np.nan)),
            span=join(self.span, span),
            step=join(self.step, step),
        )
        new._mark_spoken(range(self.width, new.width))
        return new

    def speaking(self, spoken: Mapping[int, int]) -> "TokenMap":
        """The same map with written latents marked: those tokens, by id; side by side in one group
        they are one span."""
        if not spoken:
            return self
        new = replace(
            self,
            kind=self.kind.copy(),
            span=self.span.copy(),
            step=self.step.copy(),
            spoken=dict(spoken),
        )
        new._mark_spoken(range(new.width))
        return new

    def showing(self, videos: Sequence[Videos], audio: int | None) -> "TokenMap":
        """The same prompt with its video tokens marked, and those that stand for sound, by id."""
        kind = self.kind.copy()
        for row, shown in enumerate(videos):
            kind[row, shown.columns] = Kind.VIDEO
        if audio is not None:
            kind[(self.ids == audio) & (kind == Kind.TEXT)] = Kind.AUDIO
        return replace(self, kind=kind, videos=tuple(videos))

    def _mark_spoken(self, columns: range) -> None:
        """In place, from left to right."""
        if not self.spoken:
            return
        for row, column in np.argwhere(np.isin(self.ids, list(self.spoken))).tolist():
            if column not in columns or self.kind[row, column] != Kind.TEXT:
                continue
            before = self.columns(row, Kind.VOCAB)
            before = before[before < column]
            last = int(before[-1]) if len(before) else -1
            groups = [self.spoken.get(int(self.ids[row, c])) for c in (last, column)]
            joined = len(before) > 0 and last == column - 1 and groups[0] == groups[1]
            span = int(self.span[row, last]) if len(before) else -1
            self.kind[row, column] = Kind.VOCAB
            self.span[row, column] = span + (not joined)
            self.step[row, column] = len(before)

    def finished(self, answers: Sequence[np.ndarray]) -> "TokenMap":
        """The map of a completed run, with the columns of each row's answer marked."""
        kind = self.kind.copy()
        for row, columns in enumerate(answers):
            kind[row, columns] = Kind.ANSWER
        return replace(self, kind=kind, final=True)


def map_prompt(
    ids: np.ndarray,
    mask: np.ndarray,
    layouts: Sequence[Layout],
    tokenizer: Any,
    keys: Sequence[str],
) -> TokenMap:
    """Map the tokens of a left-padded prompt batch."""
    kind = np.where(mask == 0, Kind.PAD, Kind.TEXT).astype(np.int8)
    image = np.full(ids.shape, -1, dtype=np.int16)
    cell = np.full((*ids.shape, 2), -1, dtype=np.int32)
    box = np.full((*ids.shape, 4), np.nan)
    blank = np.full(ids.shape, -1, dtype=np.int32)
    for row, layout in enumerate(layouts):
        kind[row, layout.columns] = Kind.IMAGE
        image[row, layout.columns] = layout.image
        cell[row, layout.columns] = layout.cells
        box[row, layout.columns] = layout.boxes
    grids = tuple(layout.grids for layout in layouts)
    tokens = TokenMap(
        ids,
        kind,
        image,
        cell,
        box,
        blank,
        blank.copy(),
        grids,
        tokenizer,
        ids.shape[1],
        tuple(keys),
    )
    for row in range(len(ids)):
        _mark_system(tokens, row)
    return tokens


def _system_message(text: str) -> tuple[int, int] | None:
    found = _SYSTEM.search(text)
    return None if found is None else found.span()


def _first(text: str, needle: str) -> tuple[int, int] | None:
    at = text.find(needle) if needle else -1
    return None if at < 0 else (at, at + len(needle))


def _mark_system(tokens: TokenMap, row: int) -> None:
    if tokens.tokenizer is None:
        return
    real = np.flatnonzero(tokens.kind[row] != Kind.PAD)
    columns = tokens.overlapping(row, real, _system_message)
    tokens.kind[row, columns[tokens.kind[row, columns] == Kind.TEXT]] = Kind.SYSTEM


def _known(box: np.ndarray) -> tuple[float, float, float, float] | None:
    left, top, right, bottom = (float(v) for v in box)
    return None if np.isnan(left) else (left, top, right, bottom)


def pieces(tokenizer: Any, ids: Sequence[int]) -> list[str]:
    """The text each token adds to what stands before it, special tokens spelled out.

    Token by token would lose the spaces that some tokenizers put between words.
    """
    if tokenizer is None:
        return [f"[{token}]" for token in ids]
    key = _Hashable(tokenizer)
    before = [None, *ids][: len(ids)]
    return [_piece(key, prev, token) for prev, token in zip(before, ids, strict=True)]


class _Hashable:
    """A tokenizer as a cache key: by identity, for tokenizers need not be hashable."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer

    def __hash__(self) -> int:
        return id(self.tokenizer)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Hashable) and other.tokenizer is self.tokenizer


@lru_cache(maxsize=65536)
def _piece(key: _Hashable, prev: int | None, token: int) -> str:
    def decode(*ids: int) -> str:
        return str(key.tokenizer.decode(list(ids), clean_up_tokenization_spaces=False))

    if prev is None:
        return decode(token)
    alone, both = decode(prev), decode(prev, token)
    return both[len(alone) :] if both.startswith(alone) else decode(token)


def describe(tokens: TokenMap, row: int = 0) -> Mapping[str, int]:
    """How many positions of each kind one row has."""
    return {kind.name.lower(): int((tokens.kind[row] == kind).sum()) for kind in Kind}
