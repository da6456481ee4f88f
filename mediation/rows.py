"""Many cells of a map in one forward: each row has a selector of its own, and its own donor."""

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace

import numpy as np

from imaginelens.hooks import Edit
from imaginelens.hooks.edits import EdgeEdit
from imaginelens.hooks.positions import Positions
from imaginelens.hooks.states import Donor, States, pad, states_of
from imaginelens.hooks.tokens import TokenMap


@dataclass(frozen=True)
class RowPositions(Positions):
    """A selector for each row of a batch; None selects nothing there."""

    selectors: tuple[Positions | None, ...]

    def resolve(self, tokens: TokenMap, row: int) -> np.ndarray:
        selector = self.selectors[row]
        return np.zeros(0, dtype=int) if selector is None else selector.resolve(tokens, row)

    def __str__(self) -> str:
        """The selectors as the user wrote them, each once: errors name positions by this."""
        return ", ".join(dict.fromkeys(str(s) for s in self.selectors if s is not None))


@dataclass(frozen=True)
class RowDonor:
    """What each row of a batch receives: the states of one example of a donor, at its selector."""

    of: Donor
    examples: tuple[int, ...]

    def states(self, site: str, at: Positions) -> States:
        """The states at a site, for rows that each have their selector."""
        assert isinstance(at, RowPositions)
        selectors = {repr(s): s for s in at.selectors if s is not None}
        given = {name: states_of(self.of, site, selector) for name, selector in selectors.items()}
        rows = []
        for selector, example in zip(at.selectors, self.examples, strict=True):
            whole = given[next(iter(given)) if selector is None else repr(selector)]
            row = 0 if len(whole) == 1 else example
            own = whole.values[row][whole.mask[row]]
            rows.append(own[:0] if selector is None else own)
        return pad(rows)


@dataclass(frozen=True)
class OfSelector:
    """A reference asked for one selector, whatever rows the edit is for."""

    of: Donor
    selector: Positions

    def states(self, site: str, at: Positions) -> States:
        """The reference's states at the selector."""
        return states_of(self.of, site, self.selector)


def fits_rows(edit: Edit) -> bool:
    """Whether an edit can act on rows that each have a selector of their own."""
    if isinstance(edit, EdgeEdit) or edit.reads is not None:
        return False
    return edit.given is None or _holder(edit) is not None


def has_reference(edit: Edit) -> bool:
    """Whether an edit takes statistics, which differ from selector to selector."""
    return edit.given is not None and not edit.lines_up


def of_rows(edit: Edit, examples: Sequence[int], selector: Positions) -> Edit:
    """The same edit for rows that are copies of these examples.

    `selector` is that of all rows, where the edit has a reference.
    """
    name = _holder(edit)
    if edit.given is None or name is None:
        return edit
    donor: Donor = RowDonor(edit.given, tuple(examples))
    return replace(edit, **{name: donor if edit.lines_up else OfSelector(edit.given, selector)})


def _holder(edit: Edit) -> str | None:
    """The field that holds what an edit is given."""
    own = {field.name for field in fields(edit)}
    return next((name for name in ("donor", "reference", "run") if name in own), None)
