"""Selectors of positions by meaning: `il.latent[2]`, `il.image[0][3:6, 2:9]`, `il.before_answer`.

A selector is a frozen value. It resolves against one row of a `TokenMap` to sorted columns.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from imaginelens.hooks.errors import InputError, PositionError
from imaginelens.hooks.media import VideoGrid
from imaginelens.hooks.tokens import Kind, TokenMap

Index = int | slice | None


class Positions:
    """What every selector can do: say which columns of a row it means."""

    @property
    def awaits_answer(self) -> bool:
        """Whether it resolves only once the run is complete."""
        return False

    def resolve(self, tokens: TokenMap, row: int) -> np.ndarray:
        """The sorted columns of one row; empty where the row has no such position (yet)."""
        raise NotImplementedError(f"{type(self).__name__} does not say how it resolves")

    def __or__(self, other: "Positions") -> "EitherPositions":
        """Select what either selects, as in `il.latent | il.markers`."""
        return EitherPositions(self, other)


@dataclass(frozen=True, repr=False)
class EitherPositions(Positions):
    """What one selector or the other selects, as `il.latent | il.markers`."""

    one: Positions
    other: Positions

    @property
    def awaits_answer(self) -> bool:
        return self.one.awaits_answer or self.other.awaits_answer

    def resolve(self, tokens: TokenMap, row: int) -> np.ndarray:
        found = [selector.resolve(tokens, row) for selector in (self.one, self.other)]
        return np.unique(np.concatenate(found)).astype(int)

    def __repr__(self) -> str:
        return f"{self.one!r} | {self.other!r}"


@dataclass(frozen=True)
class LatentPositions(Positions):
    """Latent steps: positions whose input is a fed-back state, or, in families that write their
    latents as tokens, those tokens. Index them like a list.

    Without a span, steps count over all spans of the run.
    """

    span: int | None = None
    index: Index = None

    def __getitem__(self, index: int | slice) -> "LatentPositions":
        return LatentPositions(self.span, index)

    def resolve(self, tokens: TokenMap, row: int) -> np.ndarray:
        columns = tokens.latents(row)
        if self.span is not None:
            columns = columns[tokens.span[row, columns] == self.span]
        return _take(columns, self.index, tokens, self)

    def __repr__(self) -> str:
        prefix = "latent" if self.span is None else f"span[{self.span}].latent"
        return prefix + spell(self.index)


@dataclass(frozen=True)
class Span:
    """One latent span of a run, as `il.span[k]`."""

    number: int

    @property
    def latent(self) -> LatentPositions:
        """The steps of this span, counted from its own beginning."""
        return LatentPositions(self.number)

    @property
    def open(self) -> "MarkerPositions":
        """The token that opens this span. Where the first latent takes its slot
        (`slot="replace"`), its embedding is never read: the position is `latent[0]`."""
        return MarkerPositions(self.number, "open")

    @property
    def close(self) -> "MarkerPositions":
        """The token that closes this span; none where it ended without one."""
        return MarkerPositions(self.number, "close")


class Spans:
    """The latent spans of a run; index them: `il.span[0].latent[1]`."""

    def __getitem__(self, number: int) -> Span:
        return Span(number)


@dataclass(frozen=True)
class MarkerPositions(Positions):
    """The tokens that open and close latent spans: `il.markers` all of them, `il.span[0].open` one.

    Spans are counted as they open, also those that close before they feed a latent back.
    """

    span: int | None = None
    side: Literal["open", "close"] | None = None

    def resolve(self, tokens: TokenMap, row: int) -> np.ndarray:
        found = [
            column
            for number, (opened, closed) in enumerate(tokens.marked_spans(row))
            for side, column in (("open", opened), ("close", closed))
            if column >= 0 and self.span in (None, number) and self.side in (None, side)
        ]
        return np.array(sorted(found), dtype=int)

    def __repr__(self) -> str:
        return "markers" if self.span is None else f"span[{self.span}].{self.side}"


@dataclass(frozen=True)
class ImagePositions(Positions):
    """Image tokens; `[k]` picks an image, `[rows, cols]` cells of its grid."""

    image: Index = None
    cells: tuple[Index, Index] | None = None

    def __getitem__(self, index: Any) -> "ImagePositions":
        if isinstance(index, tuple):
            if len(index) != 2:
                raise PositionError(f"image cells are [rows, columns], not {len(index)} indices")
            return ImagePositions(self.image, index)
        if self.image is not None:
            return ImagePositions(self.image, (index, None))
        return ImagePositions(index)

    def resolve(self, tokens: TokenMap, row: int) -> np.ndarray:
        columns = tokens.columns(row, Kind.IMAGE)
        grids = tokens.grids[row]
        wanted = np.arange(len(grids))[_as_slice(self.image, len(grids), "image")]
        kept = [c for k in wanted for c in columns[tokens.image[row, columns] == k]]
        if self.cells is not None:
            kept = [c for c in kept if self._shows(tokens, row, int(c))]
        return np.array(sorted(kept), dtype=int)

    def _shows(self, tokens: TokenMap, row: int, column: int) -> bool:
        """Whether a token's cell is among those asked for, counted in its own image's grid."""
        assert self.cells is not None
        grid = tokens.grids[row][int(tokens.image[row, column])]
        return all(
            int(cell) in range(size)[_as_slice(index, size, "cell")]
            for cell, size, index in zip(
                tokens.cell[row, column], (grid.rows, grid.cols), self.cells, strict=True
            )
        )

    def __repr__(self) -> str:
        image = f"image{spell(self.image)}"
        if self.cells is None:
            return image
        shown = [c for c in self.cells if c is not None] if self.image is not None else self.cells
        return f"{image}[{', '.join(spell(c)[1:-1] or ':' for c in shown)}]"


@dataclass(frozen=True)
class VideoPositions(Positions):
    """Video tokens; `[k]` picks a video, `[frames, rows, cols]` cells of its frames.

    Frames are those of the vision tower: Qwen takes two pictures together as one.

    >>> video[0][2], video[0][0:2, 3, 4], video[:, 0, 1]
    (video[0][2], video[0][0:2, 3, 4], video[:, 0, 1])
    """

    video: Index = None
    cells: tuple[Index, Index, Index] | None = None

    def __getitem__(self, index: Any) -> "VideoPositions":
        if isinstance(index, tuple):
            if len(index) != 3:
                raise PositionError(
                    f"video cells are [frames, rows, columns], not {len(index)} indices"
                )
            return VideoPositions(self.video, index)
        if self.video is not None:
            return VideoPositions(self.video, (index, None, None))
        return VideoPositions(index)

    def resolve(self, tokens: TokenMap, row: int) -> np.ndarray:
        columns = tokens.columns(row, Kind.VIDEO)
        if self.video is None and self.cells is None:
            return columns
        if not len(columns):
            return columns
        shown = tokens.videos[row]
        wanted = np.arange(len(shown.grids))[_as_slice(self.video, len(shown.grids), "video")]
        keep = np.isin(shown.video, wanted)
        if self.cells is not None:
            keep &= [
                self._shows(shown.grids[k], c)
                for k, c in zip(shown.video, shown.cells, strict=True)
            ]
        return np.asarray(shown.columns[keep])

    def _shows(self, grid: VideoGrid, cell: np.ndarray) -> bool:
        assert self.cells is not None
        sizes = (grid.frames, grid.rows, grid.cols)
        named = zip(("frame", "cell", "cell"), cell, sizes, self.cells, strict=True)
        return all(int(c) in range(n)[_as_slice(index, n, what)] for what, c, n, index in named)

    def __repr__(self) -> str:
        video = f"video{spell(self.video)}"
        if self.cells is None:
            return video
        alone = self.video is not None and self.cells[1:] == (None, None)
        shown = self.cells[:1] if alone else self.cells
        return f"{video}[{', '.join(spell(c)[1:-1] or ':' for c in shown)}]"


@dataclass(frozen=True)
class AudioPositions(Positions):
    """The tokens that stand for sound."""

    def resolve(self, tokens: TokenMap, row: int) -> np.ndarray:
        return tokens.columns(row, Kind.AUDIO)

    def __repr__(self) -> str:
        return "audio"


@dataclass(frozen=True)
class InsertedPositions(Positions):
    """Image tokens that come again before a latent (IVT-LR); `[t]` those before `latent[t]`.

    In a run, `run.tokens` says of each which cell of the picture it shows.
    """

    step: int | None = None

    def __getitem__(self, step: int) -> "InsertedPositions":
        return InsertedPositions(step)

    def resolve(self, tokens: TokenMap, row: int) -> np.ndarray:
        columns = tokens.columns(row, Kind.INSERTED)
        return columns if self.step is None else columns[tokens.step[row, columns] == self.step]

    def __repr__(self) -> str:
        return f"inserted{spell(self.step)}"


@dataclass(frozen=True)
class TextPositions(Positions):
    """The tokens of a piece of text, as `il.text.find("red cube")`: its first occurrence."""

    needle: str | None = None

    def find(self, needle: str) -> "TextPositions":
        """Select the tokens that overlap the first occurrence of `needle`."""
        return TextPositions(needle)

    def resolve(self, tokens: TokenMap, row: int) -> np.ndarray:
        if self.needle is None:
            return tokens.columns(row, Kind.TEXT)
        return tokens.find(row, self.needle)

    def __repr__(self) -> str:
        return "text" if self.needle is None else f"text.find({self.needle!r})"


@dataclass(frozen=True)
class AnswerPositions(Positions):
    """The answer's tokens, or (`before`) the position whose logits decide the first of them."""

    before: bool = False

    @property
    def awaits_answer(self) -> bool:
        return True

    def resolve(self, tokens: TokenMap, row: int) -> np.ndarray:
        columns = _answer(tokens, row, self)
        return columns[:1] - 1 if self.before else columns

    def __repr__(self) -> str:
        return "before_answer" if self.before else "answer"


@dataclass(frozen=True)
class DecidingPositions(Positions):
    """The positions whose logits decide the answer's tokens: each one before the token itself."""

    @property
    def awaits_answer(self) -> bool:
        return True

    def resolve(self, tokens: TokenMap, row: int) -> np.ndarray:
        return _answer(tokens, row, self) - 1

    def __repr__(self) -> str:
        return "deciding"


@dataclass(frozen=True)
class FormatPositions(Positions):
    """What was written that is neither a latent, nor a marker of a span, nor the answer."""

    @property
    def awaits_answer(self) -> bool:
        return True

    def resolve(self, tokens: TokenMap, row: int) -> np.ndarray:
        others = np.concatenate([_answer(tokens, row, self), markers.resolve(tokens, row)])
        written = generated.resolve(tokens, row)
        written = np.setdiff1d(written, tokens.latents(row))
        return written[~np.isin(written, others)]

    def __repr__(self) -> str:
        return "format"


@dataclass(frozen=True)
class GeneratedPositions(Positions):
    """Everything behind the prompt, latents included, padding left out."""

    def resolve(self, tokens: TokenMap, row: int) -> np.ndarray:
        columns = np.arange(tokens.prompt_width, tokens.width)
        return columns[tokens.kind[row, columns] != Kind.PAD]

    def __repr__(self) -> str:
        return "generated"


@dataclass(frozen=True, repr=False)
class LaterPositions(Positions):
    """Everything behind the first position that `of` selects; `onward` with what it selects."""

    of: Positions
    onward: bool = False

    @property
    def awaits_answer(self) -> bool:
        return self.of.awaits_answer

    def resolve(self, tokens: TokenMap, row: int) -> np.ndarray:
        selected = self.of.resolve(tokens, row)
        if len(selected) == 0:
            return np.zeros(0, dtype=int)
        columns = np.arange(selected[0], tokens.width)
        columns = columns[tokens.kind[row, columns] != Kind.PAD]
        return columns if self.onward else columns[~np.isin(columns, selected)]

    def __repr__(self) -> str:
        return f"{'onward' if self.onward else 'after'}({self.of!r})"


@dataclass(frozen=True)
class LastPrompt(Positions):
    """The last token of the prompt."""

    def resolve(self, tokens: TokenMap, row: int) -> np.ndarray:
        return np.array([tokens.prompt_width - 1])

    def __repr__(self) -> str:
        return "last_prompt"


@dataclass(frozen=True)
class FixedPositions(Positions):
    """Positions by number, counted from each row's first real token (padding left out)."""

    indices: tuple[int, ...]

    def resolve(self, tokens: TokenMap, row: int) -> np.ndarray:
        columns = np.array(sorted(self.indices), dtype=int) + tokens.start(row)
        return columns[columns < tokens.width]

    def __repr__(self) -> str:
        return f"positions({list(self.indices)})"


def positions(indices: Sequence[int]) -> FixedPositions:
    """Select positions by number, counted from each row's first real token.

    >>> positions([4, 7])
    positions([4, 7])
    """
    if any(i < 0 for i in indices):
        raise PositionError(
            f"positions({list(indices)}) has a negative number; count from the row's first token"
        )
    return FixedPositions(tuple(int(i) for i in indices))


def after(of: Positions) -> LaterPositions:
    """Select everything behind the first position that another selector selects, but for what it
    selects itself: `il.after(il.latent)` is all that can read a latent and is none.

    >>> after(latent)
    after(latent)
    """
    return LaterPositions(of)


def onward(of: Positions) -> LaterPositions:
    """Select everything from the first position on that another selector selects.

    >>> onward(latent[1])
    onward(latent[1])
    """
    return LaterPositions(of, onward=True)


latent = LatentPositions()
span = Spans()
image = ImagePositions()
inserted = InsertedPositions()
video = VideoPositions()
audio = AudioPositions()
text = TextPositions()
answer = AnswerPositions()
before_answer = AnswerPositions(before=True)
last_prompt = LastPrompt()
deciding = DecidingPositions()
generated = GeneratedPositions()
markers = MarkerPositions()
format = FormatPositions()


def selectors(given: Any) -> tuple[Positions, ...]:
    """One selector or several, as a tuple.

    Raises:
        InputError: something among them selects no positions.

    >>> selectors(latent), selectors([image, answer])
    ((latent,), (image, answer))
    """
    found = (given,) if isinstance(given, Positions) else given
    if isinstance(found, str) or not isinstance(found, Sequence):
        raise InputError(f"positions is {given!r}; give selectors, such as [il.latent, il.answer]")
    for one in found:
        if not isinstance(one, Positions):
            raise InputError(
                f"positions holds {one!r}, which selects no positions; give selectors, such as "
                "il.latent, il.positions([4, 7]) or il.text.find('red cube')"
            )
    return tuple(found)


def _answer(tokens: TokenMap, row: int, selector: Positions) -> np.ndarray:
    if not tokens.final:
        raise PositionError(
            f"{selector!r} is not known while the run is still being generated; "
            "use context='fixed', or edit the finished run with run_with_hooks(run, ...)"
        )
    return tokens.columns(row, Kind.ANSWER)


def edges(
    queries: Positions | None,
    at: Positions,
    tokens: TokenMap,
    looking: np.ndarray,
    seen: np.ndarray,
) -> np.ndarray:
    """The edges of attention between these columns that run from `queries` (None: everyone) to
    `at`, as (example, query, key). No edge of a position to itself is among them."""
    found = np.zeros((len(tokens), len(looking), len(seen)), dtype=bool)
    for row in range(len(tokens)):
        keys = np.isin(seen, at.resolve(tokens, row))
        if not keys.any():
            continue
        from_here = tokens.kind[row, looking] != Kind.PAD
        if queries is not None:
            from_here &= np.isin(looking, queries.resolve(tokens, row))
        found[row] = from_here[:, None] & keys[None]
    return found & (looking[:, None] != seen[None])


def _take(columns: np.ndarray, index: Index, tokens: TokenMap, selector: Positions) -> np.ndarray:
    if index is None:
        return columns
    ends = (index,) if isinstance(index, int) else (index.start, index.stop)
    if not tokens.final and any(e is not None and e < 0 for e in ends):
        raise PositionError(
            f"{selector!r} counts from the end, which is not known while the run is still being "
            "generated; count from the beginning, or use context='fixed'"
        )
    if isinstance(index, int):
        return columns[index : index + 1 or None]
    return columns[index]


def _as_slice(index: Index, size: int, what: str) -> slice:
    if index is None:
        return slice(None)
    if isinstance(index, int):
        if not -size <= index < size:
            raise PositionError(f"{what} {index} is outside of 0..{size - 1}")
        return slice(index, index + 1 or None)
    return index


def spell(index: Index) -> str:
    """An index as it was written, brackets included; nothing for None."""
    if index is None:
        return ""
    if isinstance(index, int):
        return f"[{index}]"
    start, stop = ("" if e is None else e for e in (index.start, index.stop))
    return f"[{start}:{stop}{'' if index.step is None else f':{index.step}'}]"
