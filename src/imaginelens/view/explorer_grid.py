"""What the explorer is set to, and the grid of cells that this shows."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from imaginelens.hooks import Run
from imaginelens.hooks.errors import InputError
from imaginelens.hooks.patching import Context
from imaginelens.hooks.positions import ImagePositions, Positions
from imaginelens.hooks.tokens import Kind
from imaginelens.mediation.cells import Cell
from imaginelens.mediation.sweep import Direction

Tab = Literal["steps", "image", "regions", "heads"]
TABS: tuple[Tab, ...] = get_args(Tab)
_MOST_BLOCKS = 8  # image cells along one side, before neighbours are taken together


@dataclass(frozen=True)
class Setting:
    """What the next cell is run with.

    Attributes:
        pair: which pair is looked at; `donor` the pair whose other side donates.
        tab: what the columns are: latent steps, image cells, regions of the run, or heads.
        at: of the tab "heads", whose states; written as in `il.`.
        edit: "swap", "zero", "sham", or a name of the edits that were given.
    """

    pair: int
    donor: int
    site: str
    tab: Tab
    at: str
    edit: str
    metric: str
    direction: Direction
    context: Context


@dataclass(frozen=True)
class Grid:
    """The cells that are shown: a site in each row (its layers), a selector or a head in each
    column.

    Attributes:
        cells: by row and column.
        at: the selector of each cell, by the name the cell has it under.
    """

    rows: tuple[str, ...]
    columns: tuple[str, ...]
    row_axis: str
    column_axis: str
    cells: tuple[tuple[Cell, ...], ...]
    at: Mapping[str, Positions]

    @property
    def shape(self) -> tuple[int, int]:
        return len(self.rows), len(self.columns)

    def cell(self, row: int, column: int) -> Cell:
        """The cell in a row and column.

        Raises:
            InputError: there is none.
        """
        n_rows, n_columns = self.shape
        if not (0 <= row < n_rows and 0 <= column < n_columns):
            raise InputError(
                f"there is no cell in row {row} and column {column} of a grid of {n_rows} x "
                f"{n_columns}; count from 0"
            )
        return self.cells[row][column]


def blocks(run: Run) -> list[Positions]:
    """The cells of the images' grids; of a large grid, blocks of neighbours, 8 x 8 at most.

    Raises:
        InputError: the run has no image whose grid is known.
    """
    found: list[Positions] = []
    for number, grid in enumerate(run.tokens.grids[0]):
        down, across = (-(-n // _MOST_BLOCKS) for n in (grid.rows, grid.cols))
        for r in range(0, grid.rows, max(down, 1)):
            for c in range(0, grid.cols, max(across, 1)):
                cells = (r, c) if down == across == 1 else (
                    slice(r, min(r + down, grid.rows)), slice(c, min(c + across, grid.cols))
                )  # fmt: skip
                found.append(ImagePositions(number, cells))
    if not found:
        raise InputError(
            "this run has no image whose grid is known; choose the tab 'regions' or 'steps'"
        )
    return found


def question_of(runs: Sequence[Run]) -> list[int]:
    """The numbers of the prompt's text tokens, where all runs have theirs at the same places."""
    found = []
    for run in runs:
        prompt = [t for t in run.tokens[0] if t.column < run.tokens.prompt_width]
        found.append([t.index for t in prompt if t.kind == Kind.TEXT])
    return found[0] if all(numbers == found[0] for numbers in found) else []
