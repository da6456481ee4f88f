"""Where pyvene's interventions act: its `unit_locations`, sources and subspaces, in our words."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import numpy as np
import torch

from imaginelens.hooks.errors import InputError
from imaginelens.hooks.positions import Positions
from imaginelens.hooks.run import Run
from imaginelens.hooks.states import States, pad
from imaginelens.hooks.tokens import TokenMap

if TYPE_CHECKING:
    from imaginelens.hooks.model import LatentModel


@runtime_checkable
class Part(Protocol):
    """What is known of an intervention."""

    @property
    def site(self) -> str:
        """The name of its site."""
        ...

    @property
    def kind(self) -> str:
        """Its type."""
        ...

    @property
    def by_head(self) -> bool:
        """Whether it acts on single heads."""
        ...


@dataclass(frozen=True)
class Columns(Positions):
    """Columns by number, as pyvene counts them (padding included); one row serves all examples."""

    rows: tuple[tuple[int, ...], ...]

    def resolve(self, tokens: TokenMap, row: int) -> np.ndarray:
        """The columns of one row, sorted."""
        if len(self.rows) not in (1, len(tokens)):
            raise InputError(
                f"unit_locations are for {len(self.rows)} examples and the run has {len(tokens)}"
            )
        return np.array(sorted(self.rows[0 if len(self.rows) == 1 else row]), dtype=int)


@dataclass(frozen=True)
class Place:
    """Where one intervention acts: in the base, in its source, in which heads."""

    base: Positions
    source: Positions
    heads: tuple[int, ...] | None = None


def places_of(locations: Mapping[str, Any], parts: Sequence[Part]) -> list[Place]:
    """Where each intervention acts.

    Raises:
        InputError: the locations are not of pyvene's form, or do not fit the interventions.
    """
    if not isinstance(locations, Mapping) or set(locations) not in ({"sources->base"}, {"base"}):
        raise InputError(
            f"unit_locations is {locations!r}, expected {{'sources->base': ...}} or {{'base': ...}}"
        )
    ((name, where),) = locations.items()
    ends = (where, where)
    if name == "sources->base" and isinstance(where, tuple) and len(where) == 2:
        ends = where
    sources, bases = (_by_part(end, len(parts)) for end in ends)
    found = []
    for part, base, source in zip(parts, bases, sources, strict=True):
        into, heads = _positions(base, part)
        out_of, given = (into, heads) if source is None else _positions(source, part)
        if given != heads:
            raise InputError(
                f"unit_locations take heads {list(given or ())} of the source to heads "
                f"{list(heads or ())} of the base; they have to be the same"
            )
        found.append(Place(*_paired(into, out_of), heads))
    return found


def _by_part(where: Any, n: int) -> list[Any]:
    """What is said of each of `n` interventions, on one side; None where nothing is."""
    if where is None or isinstance(where, Positions | int) or _is_row(where):
        return [where] * n
    if not isinstance(where, list | tuple) or len(where) != n:
        raise InputError(
            f"unit_locations has {where!r} for {n} interventions; give columns, or a list of "
            "columns by intervention, example and unit"
        )
    return list(where)


def _is_row(where: Any) -> bool:
    """Whether it is a plain list of columns."""
    return isinstance(where, list | tuple) and all(isinstance(c, int) for c in where)


def _positions(where: Any, part: Part) -> tuple[Positions, tuple[int, ...] | None]:
    if not part.by_head:
        return (where if isinstance(where, Positions) else _columns(where)), None
    if not isinstance(where, list | tuple) or len(where) != 2:
        raise InputError(
            f"{part.kind} acts on heads of {part.site}, so its unit_locations are a pair: heads by "
            "example, and columns by example"
        )
    heads, columns = where
    rows = _columns(heads).rows
    if len(set(rows)) != 1:
        raise InputError("unit_locations name other heads in other examples; name the same in all")
    return (columns if isinstance(columns, Positions) else _columns(columns)), rows[0]


def _columns(where: Any) -> Columns:
    where = [where] if isinstance(where, int) else where
    rows = [where] if _is_row(where) else where
    try:
        found = tuple(tuple(int(column) for column in row) for row in rows)
    except (TypeError, ValueError):
        found = ()
    if not found or any(len(set(row)) < len(row) or min(row, default=-1) < 0 for row in found):
        raise InputError(
            f"unit_locations holds {where!r}, expected the columns of each example, each once, "
            "counted from 0"
        )
    return Columns(found)


def _paired(base: Positions, source: Positions) -> tuple[Positions, Positions]:
    """The same, with columns in the order of the base's: its units pair with the source's."""
    if not isinstance(base, Columns) or not isinstance(source, Columns):
        return base, source
    n = max(len(base.rows), len(source.rows))
    ours, theirs = (list(one.rows) * (n if len(one.rows) == 1 else 1) for one in (base, source))
    if len(ours) != len(theirs) or list(map(len, ours)) != list(map(len, theirs)):
        raise InputError("unit_locations name other numbers of columns in sources and base")
    orders = [np.argsort(row, kind="stable") for row in ours]
    return base, _Ordered(
        tuple(tuple(row[i] for i in o) for row, o in zip(theirs, orders, strict=True))
    )


class _Ordered(Columns):
    """Columns of a source in the order in which they pair with the base's."""

    def resolve(self, tokens: TokenMap, row: int) -> np.ndarray:
        return np.array(self.rows[0 if len(self.rows) == 1 else row], dtype=int)


def donor_at(lens: "LatentModel", site: str, place: Place, source: Any) -> States:
    """A source's states at its own locations, in the order of the base's."""
    tokens = source.tokens if isinstance(source, Run) else lens.tokens(source)
    with torch.no_grad():
        _, cache = lens.run_with_cache(source, names_filter=site)
    states = cache[site]
    rows = []
    for row in range(len(states)):
        columns = place.source.resolve(tokens, row)
        if len(columns) and max(columns) >= states.shape[1]:
            raise InputError(
                f"unit_locations name column {max(columns)} of a source that has {states.shape[1]}"
            )
        rows.append(states[row, columns])
    return pad(rows)


def one_each(sources: Any, n: int) -> list[Any]:
    """A source for each of `n` interventions."""
    if sources is None:
        return [None] * n
    if isinstance(sources, Run | Mapping) or not isinstance(sources, list | tuple):
        sources = [sources]
    if len(sources) not in (1, n):
        raise InputError(
            f"{len(sources)} sources were given for {n} interventions that take one; give one "
            "each, or one for all"
        )
    return list(sources) * (n if len(sources) == 1 else 1)


def subspaces_of(given: Any, n: int) -> list[list[int] | None]:
    """The subspaces of each of `n` interventions, the same in all examples."""
    if given is None:
        return [None] * n
    if isinstance(given, int):
        given = [given]
    if all(isinstance(one, int) for one in given):
        return [list(given)] * n
    if len(given) != n:
        raise InputError(f"subspaces are for {len(given)} interventions, and there are {n}")
    found: list[list[int] | None] = []
    for one in given:
        rows = None if one is None else {tuple(row) for row in one}
        if rows is not None and len(rows) != 1:
            raise InputError("subspaces differ between examples; give the same for all")
        found.append(None if rows is None else list(rows.pop()))
    return found
