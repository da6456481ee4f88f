"""Selectors of positions by meaning: `il.latent[2]`, `il.image[0][3:6, 2:9]`, `il.before_answer`.

A selector is a frozen value. It resolves against one row of a `TokenMap` to sorted columns.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from imaginelens.hooks.errors import PositionError
from imaginelens.hooks.tokens import Kind, TokenMap

Index = int | slice | None


class Positions:
    """What every selector can do: say which columns of a row it means."""

    def resolve(self, tokens: TokenMap, row: int) -> np.ndarray:
        """The sorted columns of one row; empty where the row has no such position (yet)."""
        raise NotImplementedError(f"{type(self).__name__} does not say how it resolves")


@dataclass(frozen=True)
class LatentPositions(Positions):
    """Latent steps: positions whose input is a fed-back state. Index them like a list.

    Without a span, steps count over all spans of the run.
    """

    span: int | None = None
    index: Index = None

    def __getitem__(self, index: int | slice) -> "LatentPositions":
        return LatentPositions(self.span, index)

    def resolve(self, tokens: TokenMap, row: int) -> np.ndarray:
        columns = tokens.columns(row, Kind.LATENT)
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


class Spans:
    """The latent spans of a run; index them: `il.span[0].latent[1]`."""

    def __getitem__(self, number: int) -> Span:
        return Span(number)


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

    def resolve(self, tokens: TokenMap, row: int) -> np.ndarray:
        if not tokens.final:
            raise PositionError(
                f"{self!r} is not known while the run is still being generated; "
                "use context='fixed', or edit the finished run with run_with_hooks(run, ...)"
            )
        columns = tokens.columns(row, Kind.ANSWER)
        return columns[:1] - 1 if self.before else columns

    def __repr__(self) -> str:
        return "before_answer" if self.before else "answer"


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


latent = LatentPositions()
span = Spans()
image = ImagePositions()
text = TextPositions()
answer = AnswerPositions()
before_answer = AnswerPositions(before=True)
last_prompt = LastPrompt()


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
