"""The axes of a map: which coordinates its cells have, and which cells a user means."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float

from imaginelens.hooks.errors import InputError
from imaginelens.hooks.positions import Positions
from imaginelens.mediation.cells import Cell

NAMES = ("site", "layer", "position", "head")
Axes = dict[str, tuple[Any, ...]]
_SHOWN = 8  # coordinates in an error message


def axes_of(cells: Iterable[Cell]) -> Axes:
    """The values that each coordinate takes, without those that no cell has.

    Layers and heads are sorted, cells without one first; sites and positions keep their order.

    >>> cells = [Cell("z", layer, "latent[0]", None, ()) for layer in (2, 1)]
    >>> axes_of(cells)
    {'site': ('z',), 'layer': (1, 2), 'position': ('latent[0]',)}
    """
    axes: Axes = {}
    listed = list(cells)
    for name in NAMES:
        values = list(dict.fromkeys(getattr(cell, name) for cell in listed))
        if values == [None]:
            continue
        if name in ("layer", "head"):
            values.sort(key=lambda number: -1 if number is None else number)
        axes[name] = tuple(values)
    return axes


def dense(
    cells: Sequence[Cell], axes: Axes, values: Float[np.ndarray, "cell ..."]
) -> Float[np.ndarray, "..."]:
    """Values of cells as an array over the axes; nan where there is no such cell."""
    full = np.full((*map(len, axes.values()), *values.shape[1:]), np.nan)
    numbers = [{value: i for i, value in enumerate(axis)} for axis in axes.values()]
    places = [
        [number[getattr(cell, name)] for cell in cells]
        for name, number in zip(axes, numbers, strict=True)
    ]
    full[tuple(map(np.array, places))] = values
    return full


def flat(
    cells: Sequence[Cell], axes: Axes, full: Float[np.ndarray, "..."]
) -> Float[np.ndarray, " cell"]:
    """What `dense` laid out, in the order of the cells again."""
    order = dense(cells, axes, np.arange(len(cells), dtype=np.float64))
    there = ~np.isnan(order)
    values = np.empty(len(cells))
    values[order[there].astype(int)] = full[there]
    return values


def means(values: Float[np.ndarray, "cell example"]) -> Float[np.ndarray, " cell"]:
    """The mean of what is there of each cell; nan where nothing is.

    >>> means(np.array([[1.0, np.nan, 3.0], [np.nan, np.nan, np.nan]]))
    array([ 2., nan])
    """
    there = ~np.isnan(values)
    counts, sums = there.sum(-1), np.where(there, values, 0.0).sum(-1)
    return np.asarray(np.divide(sums, counts, out=np.full(len(values), np.nan), where=counts > 0))


def name_of(cell: Cell) -> str:
    """A cell's coordinates in words.

    >>> name_of(Cell("z", 2, "latent[0]", 1, ()))
    'z, layer 2, latent[0], head 1'
    """
    layer = "" if cell.layer is None else f", layer {cell.layer}"
    head = "" if cell.head is None else f", head {cell.head}"
    return f"{cell.site}{layer}, {cell.position}{head}"


def place(cell: Cell) -> tuple[Any, ...]:
    """What tells a cell from the others of its map."""
    return tuple(getattr(cell, name) for name in NAMES)


def chosen(cells: Sequence[Cell], axes: Axes, wanted: Mapping[str, Any]) -> list[int]:
    """The numbers of the cells that have the wanted coordinates; None wants them all.

    Raises:
        InputError: an axis does not exist, or has no such value.
    """
    allowed = {
        name: _values(name, given, axes) for name, given in wanted.items() if given is not None
    }
    return [
        i
        for i, cell in enumerate(cells)
        if all(getattr(cell, name) in values for name, values in allowed.items())
    ]


def _values(name: str, given: Any, axes: Axes) -> list[Any]:
    """One coordinate or several, as the cells spell them."""
    several = isinstance(given, Iterable) and not isinstance(given, str | Positions)
    values = [_spelled(name, value) for value in (given if several else [given])]
    if name not in axes:
        raise InputError(f"no cell of this map has a {name}; its axes are {', '.join(axes)}")
    for value in values:
        if value not in axes[name]:
            there = ", ".join(map(str, axes[name][:_SHOWN]))
            more = f", ... ({len(axes[name])} in all)" if len(axes[name]) > _SHOWN else ""
            raise InputError(
                f"there is no {name} {value!r} in this map; its {name}s are {there}{more}"
            )
    return values


def _spelled(name: str, value: Any) -> Any:
    if name != "position":
        return value
    return repr(value) if isinstance(value, Positions) else str(value).removeprefix("il.")
