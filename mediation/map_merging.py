"""One map of several: parts of a study, over other examples or other cells."""

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from imaginelens.hooks.errors import InputError
from imaginelens.mediation.cells import Cell
from imaginelens.mediation.effect_map import EffectMap
from imaginelens.mediation.map_axes import name_of, place
from imaginelens.mediation.provenance import Provenance

SAME = ("metric", "unit", "binary", "limits", "direction", "context", "edit")
SAME_RUN = ("model", "revision", "dtype", "versions", "seed", "formula")
TABLES = ("after", "flags", "change")  # (cell, example)
ALL_OR_NONE = ("other", "groups", "keys")


def hash_of(keys: Iterable[str]) -> str:
    """The hash of examples, in order, as `Provenance.of` makes it.

    >>> hash_of(["a", "b"])
    '0debd2558bca8fa0'
    """
    return hashlib.blake2b("/".join(keys).encode(), digest_size=8).hexdigest()


def merge(maps: Iterable[EffectMap]) -> EffectMap:
    """See `EffectMap.merge`."""
    given = list(maps)
    if not given:
        raise InputError("no map was given to merge; give at least one")
    for number, other in enumerate(given[1:], 1):
        _check_same(given[0], other, number)
    by_examples: dict[Any, list[EffectMap]] = {}
    for each in given:
        by_examples.setdefault(each.keys or each.provenance.inputs, []).append(each)
    return _in_a_row([_united(parts) for parts in by_examples.values()])


def order_of(cells: Sequence[Cell], like: Sequence[Cell]) -> list[int]:
    """Where the cells of a map are in another map of the same coordinates.

    Raises:
        InputError: their coordinates differ; the first difference is named.
    """
    number = {place(cell): i for i, cell in enumerate(cells)}
    theirs = {place(cell) for cell in like}
    for only, side in ((set(number) - theirs, cells), (theirs - set(number), like)):
        if only:
            cell = next(cell for cell in side if place(cell) in only)
            raise InputError(
                f"only one of the two maps has the cell {name_of(cell)} ({len(only)} such cells); "
                "take the cells of both with map.sel(...)"
            )
    return [number[place(cell)] for cell in like]


def _check_same(first: EffectMap, other: EffectMap, number: int) -> None:
    """Refuse parts of different studies."""
    pairs: list[tuple[str, Any, Any]] = [(name, first, other) for name in SAME]
    pairs += [(name, first.provenance, other.provenance) for name in SAME_RUN]
    for name, one, two in pairs:
        if getattr(one, name) != getattr(two, name):
            raise InputError(
                f"maps 0 and {number} differ in {name}, {getattr(one, name)!r} and "
                f"{getattr(two, name)!r}, so they are no parts of one study; merge those that agree"
            )
    for name in ALL_OR_NONE:
        absent = [
            getattr(each, name) is None or not len(getattr(each, name)) for each in (first, other)
        ]
        if absent[0] != absent[1]:
            raise InputError(
                f"of maps 0 and {number} only map {0 if absent[1] else number} has {name}; make "
                "all parts with it, or none"
            )


def _united(parts: list[EffectMap]) -> EffectMap:
    """The cells of maps of the same examples."""
    first = parts[0]
    if len(parts) == 1:
        return first
    seen = {place(cell) for cell in first.cells}
    for part in parts[1:]:
        for cell in part.cells:
            if place(cell) in seen:
                raise InputError(
                    f"two maps of the same examples both have the cell {name_of(cell)}; merge maps "
                    "of other examples, or of other cells"
                )
            seen.add(place(cell))
        if part.groups != first.groups:
            raise InputError("two maps of the same examples differ in groups; make both with one")
        for name in ("before", "other"):
            one, two = getattr(first, name), getattr(part, name)
            if one is not None and not np.array_equal(one, two, equal_nan=True):
                where = int(np.flatnonzero(~((one == two) | (np.isnan(one) & np.isnan(two))))[0])
                raise InputError(
                    f"two maps of the same examples differ in {name} of example {where}, "
                    f"{one[where]:g} and {two[where]:g}; make both in one sweep"
                )
    tables: dict[str, Any] = {
        name: np.concatenate([getattr(part, name) for part in parts]) for name in TABLES
    }
    return replace(
        first,
        **tables,
        cells=tuple(cell for part in parts for cell in part.cells),
        sham=_worst([part.sham for part in parts]),
        notes=_notes(parts),
        provenance=_joined(parts, first.provenance.inputs),
    )


def _in_a_row(parts: list[EffectMap]) -> EffectMap:
    """The examples of maps of the same cells, one map after the other."""
    first = parts[0]
    if len(parts) == 1:
        return first
    seen: set[str] = set()
    for part in parts:
        if both := [key for key in part.keys if key in seen]:
            raise InputError(
                f"two maps share {len(both)} examples, the first is {both[0]!r}, and not all; "
                "merge maps of separate examples"
            )
        seen.update(part.keys)
    rows = [order_of(part.cells, first.cells) for part in parts]
    for part, order in zip(parts, rows, strict=True):
        for cell, row in zip(first.cells, order, strict=True):
            if part.cells[row] != cell:
                raise InputError(
                    f"the cell {name_of(cell)} is {', '.join(cell.sites)} in one map and "
                    f"{', '.join(part.cells[row].sites)} in another; merge maps of one window"
                )
    keys = tuple(key for part in parts for key in part.keys)
    tables: dict[str, Any] = {
        name: np.concatenate(
            [getattr(part, name)[order] for part, order in zip(parts, rows, strict=True)], axis=1
        )
        for name in TABLES
    }
    return replace(
        first,
        **tables,
        before=np.concatenate([part.before for part in parts]),
        other=None if first.other is None else np.concatenate([_there(p.other) for p in parts]),
        groups=None if first.groups is None else tuple(g for p in parts for g in p.groups or ()),
        sham=_shams(parts),
        notes=_notes(parts),
        provenance=_joined(parts, hash_of(keys or [part.provenance.inputs for part in parts])),
        keys=keys,
    )


def _there(values: np.ndarray | None) -> np.ndarray:
    assert values is not None
    return values


def _worst(shams: list[np.ndarray | None]) -> np.ndarray | None:
    """Of several controls of the same examples, the one furthest from 0; None if one is missing."""
    ran = [sham for sham in shams if sham is not None]
    if len(ran) < len(shams):
        return None
    table = np.stack(ran)
    furthest = np.where(np.isnan(table), np.inf, np.abs(table)).argmax(0)  # unknown is worst
    return np.asarray(table[furthest, np.arange(table.shape[1])])


def _shams(parts: list[EffectMap]) -> np.ndarray | None:
    """The controls one after the other; nan where a part ran none."""
    if all(part.sham is None for part in parts):
        return None
    return np.concatenate(
        [np.full(part.n, np.nan) if part.sham is None else part.sham for part in parts]
    )


def _notes(parts: list[EffectMap]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(note for part in parts for note in part.notes))


def _joined(parts: list[EffectMap], inputs: str) -> Provenance:
    made = [part.provenance for part in parts]
    return replace(
        made[0],
        device=", ".join(dict.fromkeys(each.device for each in made)),
        inputs=inputs,
        forwards=sum(each.forwards for each in made),
        seconds=sum(each.seconds for each in made),
    )
