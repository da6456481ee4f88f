"""States: what was collected at the steps and layers of many examples, with what to read there."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Bool, Float, Int, Shaped

from imaginelens.hooks.errors import InputError

Labels = Shaped[np.ndarray, " example"] | Shaped[np.ndarray, "example step"]


@runtime_checkable
class Cells(Protocol):
    """Where states lie, in memory or on disk: read one cell of (step, layer) at a time."""

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """(example, step, layer, d_model)."""
        ...

    def read(
        self, step: int, layer: int, rows: Int[np.ndarray, " row"]
    ) -> Float[np.ndarray, "row d_model"]:
        """The states of some examples at one step and layer."""
        ...


@dataclass(frozen=True, eq=False)
class InMemory:
    """States in an array, (example, step, layer, d_model)."""

    values: Float[np.ndarray, "example step layer d_model"]

    @property
    def shape(self) -> tuple[int, int, int, int]:
        n, steps, layers, width = self.values.shape
        return n, steps, layers, width

    def read(
        self, step: int, layer: int, rows: Int[np.ndarray, " row"]
    ) -> Float[np.ndarray, "row d_model"]:
        return self.values[rows, step, layer]


@dataclass(frozen=True, eq=False)
class Cell:
    """The examples that have one step, at one layer.

    Attributes:
        x: their states.
        y: their labels; None where there are none.
        groups: the number of each one's group; None if each is on its own.
        rows: which examples they are.
    """

    x: Float[np.ndarray, "row d_model"]
    y: Shaped[np.ndarray, " row"] | None
    groups: Int[np.ndarray, " row"] | None
    rows: Int[np.ndarray, " row"]


@dataclass(frozen=True, repr=False, eq=False)
class States:
    """States of many examples by step and layer, with labels; `il.probes.collect` makes one.

    Attributes:
        cells: the states, (example, step, layer, d_model), in memory or on disk.
        mask: which steps each example has.
        sites: hook names, one for each layer of `cells`.
        labels: what a probe is to read, one per example or one per (example, step); None if there
            are none yet. Names or whole numbers are classes, other numbers are quantities.
        groups: examples of one group (one image, say) are never on both sides of a split.
        label: the name of what the labels say.
        at: the selector that the steps come from.
        controls: the same examples seen otherwise, by name: "random model", "raw input", "dummy".
        keys: what identifies each example's content.
        notes: what is missing, and why: controls that could not be made, steps that were not there.

    Raises:
        InputError: parts do not fit each other, or states are not finite numbers.
    """

    cells: Cells
    mask: Bool[np.ndarray, "example step"]
    sites: tuple[str, ...]
    labels: Labels | None = None
    groups: tuple[Any, ...] | None = None
    label: str = "label"
    at: str = "latent"
    controls: Mapping[str, "States"] = field(default_factory=lambda: MappingProxyType({}))
    keys: tuple[str, ...] | None = None
    notes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        _check(self)

    @staticmethod
    def of(
        values: Any,
        labels: Any = None,
        *,
        mask: Any = None,
        sites: Sequence[str] | None = None,
        groups: Sequence[Any] | None = None,
        label: str = "label",
    ) -> "States":
        """States you have, (example, d_model), (example, step, d_model) or (..., layer, d_model).

        Args:
            labels: one per example, or one per (example, step).
            mask: (example, step), False where an example has no such step; must be given where
                states are nan because steps are missing.
            sites: the name of each layer; "layer 0", "layer 1", ... if left out.

        Raises:
            InputError: as the class.

        >>> states = States.of(np.zeros((4, 2, 8)), ["cat", "dog", "cat", "dog"])
        >>> states
        States(4 examples x 2 steps x 1 layer x 8, label: 2 classes)
        """
        array = _array(values)
        there = np.ones(array.shape[:2], bool) if mask is None else np.asarray(mask, dtype=bool)
        if there.shape != array.shape[:2]:
            raise InputError(
                f"the mask has shape {there.shape} and the states have {array.shape[:2]} examples "
                "and steps; give one True or False for each"
            )
        _check_finite(array, there)
        array = np.where(there[:, :, None, None], array, 0)
        names = tuple(sites) if sites else tuple(f"layer {k}" for k in range(array.shape[2]))
        given = None if labels is None else _labels(labels, there)
        own = None if groups is None else tuple(groups)
        return States(InMemory(array), there, names, given, own, label)

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """(example, step, layer, d_model)."""
        return self.cells.shape

    def __len__(self) -> int:
        return self.shape[0]

    def layer(self, site: str | int) -> int:
        """The number of a layer, by its hook name or its number.

        Raises:
            InputError: there is no such layer.
        """
        if isinstance(site, str) and site in self.sites:
            return self.sites.index(site)
        if isinstance(site, int) and -len(self.sites) <= site < len(self.sites):
            return site % len(self.sites)
        raise InputError(f"there is no site {site!r} in these states; they have {self.sites}")

    def cell(self, *, step: int, site: str | int = 0) -> Cell:
        """The examples that have a step, with their states at a site and their labels.

        Raises:
            InputError: there is no such step or site, or no example has it.
        """
        n_steps = self.shape[1]
        if not -n_steps <= step < n_steps:
            raise InputError(f"there is no step {step} in states of {n_steps} steps, 0 the first")
        step %= n_steps
        rows = self.having(step)
        if not len(rows):
            raise InputError(f"none of the {len(self)} examples has step {step}")
        x = self.cells.read(step, self.layer(site), rows)
        return Cell(x, self.target(step, rows), self.units(rows), rows)

    def having(self, step: int) -> Int[np.ndarray, " row"]:
        """The examples that have a step and a label for it (None and nan are no label)."""
        there = self.mask[:, step].copy()
        if self.labels is not None:
            known = self.labels if self.labels.ndim == 1 else self.labels[:, step]
            there &= np.array([not _missing(value) for value in known.tolist()])
        return np.flatnonzero(there)

    def target(self, step: int, rows: Int[np.ndarray, " row"]) -> Shaped[np.ndarray, " row"] | None:
        """The labels of some examples at a step."""
        if self.labels is None:
            return None
        return _plain(self.labels[rows] if self.labels.ndim == 1 else self.labels[rows, step])

    def units(self, rows: Int[np.ndarray, " row"]) -> Int[np.ndarray, " row"] | None:
        """The numbers of some examples' groups; None if each is on its own."""
        if self.groups is None:
            return None
        number: dict[Any, int] = {}
        return np.array([number.setdefault(self.groups[row], len(number)) for row in rows])

    def relabelled(self, labels: Any, *, label: str = "label") -> "States":
        """The same states and controls with other labels: one per example, or (example, step).

        Raises:
            InputError: there is not one for each.
        """
        controls = {
            name: replace(control, labels=_labels(labels, control.mask), label=label)
            for name, control in self.controls.items()
        }
        return replace(self, labels=_labels(labels, self.mask), label=label, controls=controls)

    def plot(self, **options: Any) -> Any:
        """The states of each example by step, in the plane of two principal components."""
        from imaginelens.view.latent_plane import trajectories

        return trajectories(self, **options)

    def __repr__(self) -> str:
        counts = zip(self.shape, ("example", "step", "layer"), strict=False)
        size = " x ".join(f"{n} {what}{'s' * (n != 1)}" for n, what in counts)
        known = "no labels"
        if self.labels is not None:
            kinds = {value for value in self.labels.ravel().tolist() if not _missing(value)}
            floats = any(isinstance(value, float) for value in kinds)
            known = f"{self.label}: " + ("quantity" if floats else f"{len(kinds)} classes")
        return f"States({size} x {self.shape[3]}, {known})"


def load(folder: str | Path) -> States:
    """Open states that `collect(out=folder)` wrote; they stay on disk until a cell is read."""
    from imaginelens.probes.shards import open_states

    return open_states(Path(folder))


def _array(values: Any) -> Float[np.ndarray, "example step layer d_model"]:
    found = values.detach().cpu().numpy() if hasattr(values, "detach") else np.asarray(values)
    if found.ndim not in (2, 3, 4) or found.dtype.kind not in "fiu":
        raise InputError(
            f"states of shape {found.shape} and type {found.dtype} came; give numbers (example, "
            "d_model), (example, step, d_model) or (example, step, layer, d_model)"
        )
    if found.ndim == 2:
        found = found[:, None]
    if found.ndim == 3:
        found = found[:, :, None]
    return found if found.dtype in (np.float32, np.float64) else found.astype(np.float32)


def _labels(labels: Any, mask: Bool[np.ndarray, "example step"]) -> Labels:
    """Labels as an array of objects or numbers, one per example or (example, step)."""
    plain = labels.tolist() if hasattr(labels, "tolist") else list(labels)
    nested = bool(plain) and isinstance(plain[0], list | tuple)
    shape = mask.shape if nested else mask.shape[:1]
    found = np.empty(shape, dtype=object)
    lengths = {len(row) for row in plain} if nested else {mask.shape[1]}
    if len(plain) != len(mask) or lengths != {mask.shape[1]}:
        given = f"{len(plain)} x {sorted(lengths)}" if nested else f"{len(plain)}"
        raise InputError(
            f"{given} labels came with {len(mask)} examples of {mask.shape[1]} steps; give one "
            "label per example, or one per (example, step)"
        )
    for i, row in enumerate(plain):
        found[i] = row
    return found


def _plain(labels: Shaped[np.ndarray, " row"]) -> Shaped[np.ndarray, " row"]:
    """Labels of one cell in the type they have: whole numbers, numbers or strings."""
    kinds = {type(value) for value in labels.tolist()}
    if kinds <= {int, bool}:
        return labels.astype(np.int64)
    if kinds <= {int, bool, float}:
        return labels.astype(np.float64)
    return labels.astype(str)


def _missing(value: Any) -> bool:
    return value is None or value != value


def _check_finite(
    array: Float[np.ndarray, "example step layer d_model"], mask: Bool[np.ndarray, "example step"]
) -> None:
    finite = np.isfinite(array).all((2, 3)) | ~mask
    if not finite.all():
        row, step = np.argwhere(~finite)[0]
        raise InputError(
            f"{int((~finite).sum())} states are nan or infinite (the first: example {row}, step "
            f"{step}); pass mask= with False where an example has no such step, or drop it"
        )


def _check(states: States) -> None:
    n, steps, layers, _ = states.shape
    if states.mask.shape != (n, steps):
        raise InputError(
            f"a mask of shape {states.mask.shape} came with {n} examples of {steps} steps; give "
            "one for each"
        )
    if len(states.sites) != layers or len(set(states.sites)) != layers:
        raise InputError(f"{layers} layers need {layers} different names, not {states.sites}")
    if states.labels is not None and states.labels.shape not in {(n,), (n, steps)}:
        raise InputError(
            f"labels of shape {states.labels.shape} came with {n} examples of {steps} steps; give "
            "one label per example, or one per (example, step)"
        )
    if states.groups is not None and len(states.groups) != n:
        raise InputError(f"{len(states.groups)} groups came with {n} examples; give one each")
