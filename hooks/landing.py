"""The proof of an edit: where it fired, what it touched and by how much it changed it."""

import difflib
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import torch
from jaxtyping import Bool, Float

from imaginelens.hooks.errors import EditTouchedNothing

Flag = Literal["not_emitted", "identical_donor"]
_ROWS, _COLUMNS = 3, 6  # that are named in words
# Two forwards of other shapes round a state that is the same otherwise, relative to its norm. In
# half precision that is as much as a real difference may be, so there only equal is the same.
_ROUNDING = {torch.float64: 1e-13, torch.float32: 1e-5}


def differing(
    old: Float[torch.Tensor, "cell ..."], new: Float[torch.Tensor, "cell ..."], *, donated: bool
) -> Bool[torch.Tensor, " cell"]:
    """Which states are not what they were.

    Any difference counts, also one too small for a norm to show; of states that are `donated`, any
    beyond what two forwards may round otherwise.

    >>> old, new = torch.ones(2, 4), torch.tensor([[1.0] * 4, [1.000001] * 4])
    >>> differing(old, new, donated=False).tolist(), differing(old, new, donated=True).tolist()
    ([False, True], [False, False])
    """
    differs = (old != new).flatten(1).any(1)
    allowed = _ROUNDING.get(old.dtype)
    if not donated or allowed is None:
        return differs
    before, after = old.detach().flatten(1).double(), new.detach().flatten(1).double()
    return differs & ~((after - before).norm(dim=1) <= allowed * before.norm(dim=1))


@dataclass(repr=False)
class Landing:
    """What one edit did, over all runs made while it was active.

    Attributes:
        fired: in how many forwards it touched at least one cell.
        cells: row, column, site and relative change of norm of every touched cell.
        flags: rows that the last run did not change, and why: the row, or its donor, had no such
            position (`not_emitted`), or the new state equals the old one (`identical_donor`); a
            donor's, which another forward has computed, up to the rounding of float32 and float64.
        donorless: rows of the last run that were left alone because their donor has no state.
        edges: how many (layer, query, key) edges of attention were cut by a knockout, or led some
            readers to an edited key or value.
    """

    edit: str
    at: str
    sites: tuple[str, ...]
    fired: int = 0
    cells: list[tuple[int, int, str, float]] = field(default_factory=list)
    flags: dict[int, Flag] = field(default_factory=dict)
    donorless: set[int] = field(default_factory=set)
    edges: int = 0
    _call: list[tuple[int, bool]] = field(default_factory=list)
    _forward: object = None

    @property
    def rows(self) -> list[int]:
        """The rows it touched."""
        return sorted({row for row, *_ in self.cells})

    @property
    def positions(self) -> dict[int, list[int]]:
        """The columns it touched, by row."""
        return {
            row: sorted({column for r, column, *_ in self.cells if r == row}) for row in self.rows
        }

    @property
    def touched(self) -> str:
        """What it touched, in words: how many cells, and the columns of the first rows.

        >>> landing = Landing("Swap", "latent[1]", ("hook_latent",))
        >>> landing.cells.append((0, 29, "hook_latent", 1.5))
        >>> landing.touched
        '1 cell in 1 row: column 29 of row 0'
        """
        columns: dict[int, set[int]] = {}
        for row, column, *_ in self.cells:
            columns.setdefault(row, set()).add(column)
        told = [_columns(sorted(columns[row]), row) for row in sorted(columns)[:_ROWS]]
        more = [f"{len(columns) - _ROWS} more rows"] * (len(columns) > _ROWS)
        count = f"{_many(len(self.cells), 'cell')} in {_many(len(columns), 'row')}"
        return f"{count}: {', '.join(told + more)}" if columns else count

    @property
    def relative_change(self) -> float:
        """Mean of ||new - old|| / ||old|| over the touched cells; nan before it fired."""
        return float(np.mean([change for *_, change in self.cells])) if self.cells else float("nan")

    def __repr__(self) -> str:
        flags = f", flags {self.flags}" if self.flags else ""
        edges = f", {self.edges} edges" if self.edges else ""
        return (
            f"Landing({self.edit} at {self.at} of {', '.join(self.sites[:3])}: fired in "
            f"{_many(self.fired, 'forward')}, {self.touched}; relative change "
            f"{self.relative_change:.3g}{edges}{flags})"
        )

    def _repr_html_(self) -> str:
        from imaginelens.view.run_cards import landing_card

        return landing_card(self)

    def record(
        self,
        site: str,
        rows: np.ndarray,
        columns: np.ndarray,
        old: torch.Tensor,
        new: torch.Tensor,
        forward: object,
        *,
        donated: bool = False,
    ) -> None:
        """Note that the cells at these rows and columns went from `old` to `new` in a forward;
        whether `new` is of states that another forward has computed."""
        before, after = old.detach().flatten(1).double(), new.detach().flatten(1).double()
        size, moved = before.norm(dim=1), (after - before).norm(dim=1)
        # from a zero state there is no relative change: infinite, or 0 where nothing moved
        change = torch.where(moved == 0, moved, moved / size)
        differs = differing(old, new, donated=donated)
        if forward is not self._forward:
            self._forward = forward
            self.fired += 1
        for row, column, c, d in zip(rows, columns, change.tolist(), differs.tolist(), strict=True):
            self.cells.append((int(row), int(column), site, c))
            self._call.append((int(row), bool(d)))

    def record_text(
        self,
        row: int,
        column: int,
        old: Sequence[int],
        new: Sequence[int],
        writing: object,
        *,
        removed: bool = False,
    ) -> None:
        """Note that a piece of text went from the tokens `old` to `new`, or was `removed` with its
        markers: its relative change is the share of tokens that differ."""
        if writing is not self._forward:
            self._forward = writing
            self.fired += 1
        self.cells.append((row, column, "text", text_change(old, new)))
        self._call.append((row, removed or list(old) != list(new)))

    def begin(self) -> None:
        """Start a new call: what it touches is judged at its end."""
        self._call.clear()
        self.flags.clear()
        self.donorless.clear()

    def judge(self, n_rows: int, *, may_be_identical: bool, seen: str) -> None:
        """Flag the rows that the call did not change; refuse a call that changed none.

        Raises:
            EditTouchedNothing: nothing was touched, or every touched row is as it was.
        """
        touched = {row for row, _ in self._call}
        changed = {row for row, differs in self._call if differs}
        for row in range(n_rows):
            if row not in touched:
                self.flags[row] = "not_emitted"
            elif row not in changed and not may_be_identical:
                self.flags[row] = "identical_donor"
        where = f"{self.edit} at {self.at} of {', '.join(self.sites[:3])}"
        if not touched and self.donorless:
            raise EditTouchedNothing(
                f"{where} touched nothing, for the donor has no state there in any of the rows "
                f"{sorted(self.donorless)}; look at the donor run's trigger"
            )
        if not touched:
            raise EditTouchedNothing(
                f"{where} touched no position in {n_rows} row{'s' * (n_rows != 1)}: {seen}; "
                "look at run.trigger and run.tokens for the positions there are"
            )
        if not changed and not may_be_identical:
            raise EditTouchedNothing(
                f"{where} left all {len(touched)} touched rows bit for bit as they were (a donor's "
                "state: up to rounding); give it another donor, or use il.Sham() if that is what "
                "you mean"
            )


def text_change(old: Sequence[int], new: Sequence[int]) -> float:
    """The share of tokens that differ: 0 for equal texts, 1 where nothing is in common.

    >>> text_change([1, 2, 3, 4], [1, 2, 3, 5])
    0.25
    """
    return 1.0 - difflib.SequenceMatcher(None, list(old), list(new), autojunk=False).ratio()


def _columns(columns: Sequence[int], row: int) -> str:
    listed = ", ".join(map(str, columns[:_COLUMNS]))
    more = f" and {len(columns) - _COLUMNS} more" if len(columns) > _COLUMNS else ""
    return f"column{'s' * (len(columns) != 1)} {listed}{more} of row {row}"


def _many(count: int, what: str) -> str:
    return f"{count} {what}{'s' * (count != 1)}"
