"""EffectMap: what one edit does at many cells, per example: the result of a sweep."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from importlib import import_module
from itertools import product
from numbers import Real
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np
from jaxtyping import Float, Int8

from imaginelens.estimates import EquivalenceMap, Estimate, EstimateError, equivalence_map
from imaginelens.estimates.margin import check_margin
from imaginelens.hooks.errors import InputError
from imaginelens.hooks.hub import Address
from imaginelens.mediation import map_axes
from imaginelens.mediation.cells import Cell
from imaginelens.mediation.map_axes import means, name_of
from imaginelens.mediation.provenance import Provenance

if TYPE_CHECKING:
    import pandas as pd

    from imaginelens.mediation.map_adjusting import AdjustedMap, Method

FIRED, NOT_EMITTED, IDENTICAL_DONOR, NOT_MEASURED = range(4)
FLAGS = ("fired", "not_emitted", "identical_donor", "not_measured")
Direction = Literal["denoise", "noise", "mixed"]
Context = Literal["free", "fixed", "mixed"]


@dataclass(frozen=True, repr=False, eq=False)
class EffectMap:
    """The effect of an edit in every cell (site, layer, position, head) on every example.

    `map["resid_post", 3, "latent[2]"]` is the `Estimate` of a cell, `map.mean` all means,
    `map.adjust()` the test of all cells at once. One map is one edit, metric, direction and
    context; what a map holds of single examples is never averaged away.

    Attributes:
        cells: the coordinates, each once.
        before: the metric of the unedited run that is edited, per example; nan where no answer was
            found. 0 in a map made by arithmetic.
        other: the metric of the other unedited run of the pair (the source when denoising), or
            None.
        after: the metric with the edit; nan where no answer was found or nothing was run.
        flags: why an example's state was not changed: 0 it was ("fired"), 1 "not_emitted", 2
            "identical_donor" (the effect of both is 0), 3 "not_measured" (it is missing).
        change: relative change of norm of the states that were touched; nan where none was.
        groups: a label per example that depends on others, or None.
        binary: whether the metric is 0 or 1.
        direction: "denoise": the base runs and receives; "noise": the source does. "mixed" in
            arithmetic between the two; so also `context`.
        edit: what was done, in words.
        sham: the effect of the self-swap on the same path, per example; None if it was not run.
        notes: what a reader must know: what took the slow path and why, what is missing.
        keys: what identifies each example, one each; empty if nothing is known but
            `provenance.inputs`.
        limits: the smallest and largest effect that an example can have, where the values are
            contrasts of 0/1 outcomes; None for numbers, and for `binary`, whose limits are known.

    Raises:
        InputError: shapes do not fit, a cell comes twice, values are infinite, or not 0 or 1 where
            they should be.

    >>> cells = [Cell("resid_post", layer, "latent[0]", None, ()) for layer in (0, 1)]
    >>> found = EffectMap.from_arrays(
    ...     cells=cells, before=[0.0, 0.1, 0.2], after=[[0.0, 0.1, 0.2], [1.0, 1.3, 1.1]])
    >>> found.mean.round(3).tolist()
    [[[0.0], [1.033]]]
    >>> found["resid_post", 1, "latent[0]"]
    Estimate(effect at resid_post, layer 1, latent[0] = 1.033, 95% [0.6539, 1.413], n=3, t)
    """

    cells: tuple[Cell, ...]
    before: Float[np.ndarray, " example"]
    other: Float[np.ndarray, " example"] | None
    after: Float[np.ndarray, "cell example"]
    flags: Int8[np.ndarray, "cell example"]
    change: Float[np.ndarray, "cell example"]
    groups: tuple[Any, ...] | None
    metric: str
    unit: str
    binary: bool
    direction: Direction
    context: Context
    edit: str
    sham: Float[np.ndarray, " example"] | None
    notes: tuple[str, ...]
    provenance: Provenance
    keys: tuple[str, ...] = ()
    limits: tuple[float, float] | None = None

    def __post_init__(self) -> None:
        _check_words(self)
        _check_cells(self.cells)
        _check_shapes(self)
        _check_values(self)

    @staticmethod
    def from_arrays(
        *,
        cells: Sequence[Cell],
        before: Any,
        after: Any,
        other: Any = None,
        groups: Any = None,
        metric: str = "outcome",
        unit: str = "",
        binary: bool = False,
        direction: Direction = "denoise",
        context: Context = "free",
        edit: str = "edit",
        keys: Sequence[str] = (),
    ) -> "EffectMap":
        """Take a map from plain arrays, of any tool or simulation.

        Args:
            before, other: one value per example.
            after: (cell, example), in the order of `cells`; nan where it is missing.
            keys: a name for each example, so that maps can be compared and merged.

        Raises:
            InputError: as `EffectMap`, or values are no numbers.
        """
        from imaginelens.mediation.map_merging import hash_of

        table = _numbers("after", after)
        unknown = Provenance("", "", "", "", (), 0, hash_of(keys) if keys else "", "", 0, 0.0)
        return EffectMap(
            cells=tuple(cells),
            before=_numbers("before", before),
            other=None if other is None else _numbers("other", other),
            after=table,
            flags=np.zeros(table.shape, np.int8),
            change=np.full(table.shape, np.nan),
            groups=None if groups is None else tuple(np.asarray(groups, dtype=object).tolist()),
            metric=metric,
            unit=unit,
            binary=binary,
            direction=direction,
            context=context,
            edit=edit,
            sham=None,
            notes=(),
            provenance=unknown,
            keys=tuple(keys),
        )

    # ---- the numbers ---------------------------------------------------------------------------

    @property
    def n(self) -> int:
        """How many examples there are."""
        return len(self.before)

    def __len__(self) -> int:
        """How many cells there are."""
        return len(self.cells)

    def __iter__(self) -> Iterator[Cell]:
        return iter(self.cells)

    @property
    def untouched(self) -> np.ndarray:
        """(cell, example): the edit changed no state there, so that its effect is 0."""
        return np.isin(self.flags, (NOT_EMITTED, IDENTICAL_DONOR))

    @cached_property
    def outcome(self) -> Float[np.ndarray, "cell example"]:
        """The metric with the edit: `before` where nothing was touched, nan where not measured."""
        same = np.where(self.untouched, self.before, self.after)
        return np.where(self.flags == NOT_MEASURED, np.nan, same)

    @cached_property
    def effect(self) -> Float[np.ndarray, "cell example"]:
        """after - before: 0 where no state was touched; nan where either is missing."""
        return np.asarray(self.outcome - self.before)

    @cached_property
    def axes(self) -> dict[str, tuple[Any, ...]]:
        """The coordinates, by "site", "layer", "position" and "head", those that cells have."""
        return map_axes.axes_of(self.cells)

    @cached_property
    def values(self) -> Float[np.ndarray, "..."]:
        """The effects over (*axes, example); nan where there is no such cell, too."""
        return self.dense(self.effect)

    @cached_property
    def mean(self) -> Float[np.ndarray, "..."]:
        """The mean effect over the axes, of the examples that have one; nan where none has."""
        return self.dense(means(self.effect))

    @cached_property
    def total(self) -> Float[np.ndarray, " example"]:
        """The total effect, source - base, of the unedited runs.

        Raises:
            InputError: the map has no other run, or is a mixture of directions.
        """
        if self.other is None or self.direction == "mixed":
            raise InputError(
                "this map does not hold the other unedited run of each pair, so there is no total "
                "effect to compare with; make it with il.sweep, or give other="
            )
        sign = 1.0 if self.direction == "denoise" else -1.0
        return np.asarray(sign * (self.other - self.before))

    @cached_property
    def recovery(self) -> Float[np.ndarray, "..."]:
        """Mean effect / mean total effect over the axes, of the examples that have both.

        Denoising, 1 is all of the effect given; noising, -1 is all of it taken away, for both are
        measured in the direction from base to source. nan where the mean total effect is 0. See
        `recovery_at` for the interval.

        Raises:
            InputError: as `total`.
        """
        there = ~np.isnan(self.effect + self.total)
        top = means(np.where(there, self.effect, np.nan))
        bottom = means(np.where(there, self.total, np.nan))
        return self.dense(np.divide(top, bottom, out=np.full_like(top, np.nan), where=bottom != 0))

    def dense(self, values: Float[np.ndarray, "cell ..."]) -> Float[np.ndarray, "..."]:
        """Lay values, one for each of `cells`, out over the axes; nan where there is no cell."""
        return map_axes.dense(self.cells, self.axes, values)

    # ---- cells and estimates -------------------------------------------------------------------

    def __getitem__(self, key: Any) -> Estimate:
        """The effect in a cell, named by its coordinates in the order of `axes`.

        Raises:
            InputError: no cell is there, or several are.
            EstimateError: fewer than two examples have a value.
        """
        return self._estimate(self._row(key))

    def cell(
        self, *, site: Any = None, layer: Any = None, position: Any = None, head: Any = None
    ) -> Estimate:
        """The effect in a cell; coordinates that tell nothing apart may be left out.

        Raises:
            InputError: no cell is there, or several are.
            EstimateError: fewer than two examples have a value.
        """
        wanted = {"site": site, "layer": layer, "position": position, "head": head}
        return self._estimate(self._only(wanted))

    def recovery_at(self, *key: Any) -> Estimate:
        """Mean effect / mean total effect in a cell: a ratio of means with Fieller's interval.

        Args:
            key: the coordinates, as in `map[...]`.

        Raises:
            InputError: no cell is there, or several are, or as `total`.
            EstimateError: fewer than two examples have both effects.
        """
        return self._recovery(self._row(key))

    def sel(
        self, *, site: Any = None, layer: Any = None, position: Any = None, head: Any = None
    ) -> "EffectMap":
        """The cells with these coordinates, each one value or a list; all, if left out.

        A test over a part of a map that was chosen after looking at the whole finds too much:
        adjust first, or choose beforehand.

        Raises:
            InputError: an axis has no such value, or no cell has them all.
        """
        wanted = {"site": site, "layer": layer, "position": position, "head": head}
        rows = map_axes.chosen(self.cells, self.axes, wanted)
        if not rows:
            raise InputError(f"no cell of this map has {_asked(wanted)}; look at map.cells")
        return replace(
            self,
            cells=tuple(self.cells[row] for row in rows),
            after=self.after[rows],
            flags=self.flags[rows],
            change=self.change[rows],
        )

    @cached_property
    def estimates(self) -> tuple[Estimate | None, ...]:
        """The effect in every cell, in the order of `cells`; None where too few have a value."""
        return tuple(_or_none(self._estimate, row) for row in range(len(self)))

    @cached_property
    def recoveries(self) -> tuple[Estimate | None, ...]:
        """`recovery_at` for every cell, in the order of `cells`; None where too few have a value.

        Raises:
            InputError: as `total`.
        """
        return tuple(_or_none(self._recovery, row) for row in range(len(self)))

    def _row(self, key: Any) -> int:
        if isinstance(key, tuple) and len(key) == 1:
            (key,) = key
        if isinstance(key, Cell):
            if key not in self.cells:
                raise InputError(f"this map has no cell {name_of(key)}; look at map.cells")
            return self.cells.index(key)
        given = key if isinstance(key, tuple) else (key,)
        if len(given) > len(self.axes):
            raise InputError(
                f"{len(given)} coordinates were given, and this map has {len(self.axes)} axes: "
                f"{', '.join(self.axes)}"
            )
        return self._only(dict(zip(self.axes, given, strict=False)))

    def _only(self, wanted: dict[str, Any]) -> int:
        rows = map_axes.chosen(self.cells, self.axes, wanted)
        if len(rows) != 1:
            raise InputError(
                f"{len(rows) or 'no'} cells of this map have {_asked(wanted)}, and one was "
                f"expected; its axes are {', '.join(self.axes)}"
            )
        return rows[0]

    def _estimate(self, row: int) -> Estimate:
        name = f"effect at {name_of(self.cells[row])}"
        words: dict[str, Any] = {"name": name, "groups": self.groups, "total": self._total}
        if self.binary:
            return Estimate.paired(self.outcome[row], self.before, **words)
        if self.limits is not None:
            low, high = self.limits
            return Estimate.bounded(self.effect[row], low=low, high=high, **words)
        return Estimate.mean(self.effect[row], unit=self.unit, **words)

    @cached_property
    def _total(self) -> Estimate | None:
        """The total effect, where there is one to tell."""
        if self.other is None or self.direction == "mixed":
            return None
        words: dict[str, Any] = {"name": "total effect", "groups": self.groups}
        ends = (
            (self.other, self.before) if self.direction == "denoise" else (self.before, self.other)
        )
        try:
            if self.binary:
                return Estimate.paired(*ends, **words)
            return Estimate.mean(self.total, unit=self.unit, **words)
        except EstimateError:
            return None

    def _recovery(self, row: int) -> Estimate:
        possible = None
        if self.binary:  # of what before, after and other can be, as effect and total effect
            sign = 1 if self.direction == "denoise" else -1
            worlds = product((0, 1), repeat=3)
            possible = sorted({(a - b, sign * (o - b)) for b, a, o in worlds})
        return Estimate.ratio(
            self.effect[row],
            self.total,
            name=f"recovery at {name_of(self.cells[row])}",
            groups=self.groups,
            possible=possible,
        )

    # ---- all cells at once ---------------------------------------------------------------------

    def adjust(
        self, method: "Method" = "max_t", *, draws: int = 9_999, seed: int = 0
    ) -> "AdjustedMap":
        """Test every cell against "no effect", with p-values that bear their number.

        Args:
            method: "max_t" flips signs and so uses that cells go together; "holm" bounds the chance
                of one false finding, "bh" and "by" the share of false ones among the findings.
            draws, seed: of the sign flips of "max_t".

        Raises:
            InputError: there is no such method.
            EstimateError: there are fewer than two examples, or groups.

        >>> cells = [Cell("resid_post", layer, "latent[0]", None, ()) for layer in (0, 1)]
        >>> found = EffectMap.from_arrays(
        ...     cells=cells, before=[0.0] * 6, after=[[0.0] * 6, [1.0, 1.3, 1.1, 0.9, 1.2, 1.0]])
        >>> found.adjust().pvalues.ravel().tolist()
        [1.0, 0.03125]
        """
        from imaginelens.mediation.map_adjusting import adjusted

        return adjusted(self, method, draws=draws, seed=seed)

    def equivalence(self, margin: float) -> EquivalenceMap:
        """Test every cell for having no effect beyond the margin; see `EquivalenceMap`.

        Args:
            margin: in the metric's unit: 0.05 is 5 points of a 0/1 outcome.

        Raises:
            EstimateError: the margin is not positive, or there are fewer than two examples, or ten
                groups.
        """
        if self.limits is None:
            values = np.moveaxis(self.values, -1, 0)
            return equivalence_map(values, margin=margin, groups=self.groups, binary=self.binary)
        check_margin(margin, below=max(map(abs, self.limits)))
        tests = [None if e is None else e.equivalence(margin) for e in self.estimates]
        p = np.array([np.nan if test is None else test.pvalue for test in tests])
        return EquivalenceMap(margin, self.dense(p))

    def to_dataframe(self, *, per_example: bool = False) -> "pd.DataFrame":
        """One row per cell, with the interval (95%) and p-value of its mean effect, not adjusted;
        or one row per cell and example.

        Columns: the coordinates; n, missing; how many examples were not_emitted, identical_donor,
        not_measured; effect, ci_low, ci_high, p (nan where fewer than two examples have a value);
        change, the mean relative change of norm; and, where the other run is known, recovery with
        its interval (nan where that has no end).
        """
        from imaginelens.mediation import map_tables

        return map_tables.long(self) if per_example else map_tables.by_cell(self)

    def to_xarray(self) -> Any:
        """The effects as an `xarray.DataArray` with the axes' names and coordinates.

        Raises:
            ImportError: xarray is not installed.
        """
        try:
            xarray = import_module("xarray")
        except ImportError as error:
            raise ImportError(
                "to_xarray needs xarray, which is not installed: pip install xarray, or use "
                "map.to_dataframe() or map.values with map.axes"
            ) from error
        example: dict[str, Any] = {"example": list(self.keys) or list(range(self.n))}
        if self.groups is not None:
            example["group"] = ("example", list(self.groups))
        words = ("metric", "unit", "direction", "context", "edit")
        return xarray.DataArray(
            self.values,
            dims=(*self.axes, "example"),
            coords={**{name: list(axis) for name, axis in self.axes.items()}, **example},
            name="effect",
            attrs={**{w: getattr(self, w) for w in words}, "provenance": str(self.provenance)},
        )

    # ---- maps together -------------------------------------------------------------------------

    def __sub__(self, other: Any) -> "EffectMap":
        """The difference of two maps of the same cells and examples, example by example.

        Raises:
            InputError: coordinates, examples, groups or metrics differ; the first is named.
        """
        return self._combined(other, -1)

    def __add__(self, other: Any) -> "EffectMap":
        """The sum of two maps of the same cells and examples, example by example.

        Raises:
            InputError: coordinates, examples, groups or metrics differ; the first is named.
        """
        return self._combined(other, 1)

    def _combined(self, other: Any, sign: int) -> "EffectMap":
        from imaginelens.mediation.map_arithmetic import combined

        return combined(self, other, sign) if isinstance(other, EffectMap) else NotImplemented

    def __neg__(self) -> "EffectMap":
        return self * -1

    def __mul__(self, factor: Any) -> "EffectMap":
        """Every effect times a number.

        Raises:
            InputError: the number is not finite, or 0.
        """
        from imaginelens.mediation.map_arithmetic import scaled

        if not isinstance(factor, Real) or isinstance(factor, bool):
            return NotImplemented
        return scaled(self, float(factor))

    __rmul__ = __mul__

    @staticmethod
    def merge(maps: Iterable["EffectMap"]) -> "EffectMap":
        """One map of several: the same cells on other examples, or other cells on the same ones.

        Examples come in the order of the maps. Whether two maps have the same examples is told by
        their `keys`, and where these are not known by `provenance.inputs`. The merged `inputs` is
        the hash of all keys, as `Provenance.of(keys=map.keys)` makes it.

        Raises:
            InputError: what was done, measured or run differs; or examples or cells overlap.

        >>> cells = [Cell("hook_latent", None, "latent[0]", None, ())]
        >>> one = EffectMap.from_arrays(cells=cells, before=[0.0], after=[[1.0]], keys=["a"])
        >>> two = EffectMap.from_arrays(cells=cells, before=[0.0], after=[[2.0]], keys=["b"])
        >>> EffectMap.merge([one, two]).effect
        array([[1., 2.]])
        """
        from imaginelens.mediation.map_merging import merge

        return merge(maps)

    def plot(self, **options: Any) -> Any:
        """The map as a plotly figure: a panel for each site, layers down; steps, regions or heads
        across.

        White is no effect, grey was not measured; an outlined cell's interval leaves out 0. The
        figure is returned, not shown; `.save("map.png")` needs no browser.

        Args:
            options: of `imaginelens.view.maps.heatmap`: level, limit, palette, title, labels.
        """
        from imaginelens.view.maps import heatmap

        return heatmap(self, **options)

    def save(self, folder: str | Path) -> Path:
        """Write the map to a folder, whole or not at all, and return the folder.

        Raises:
            CheckpointError: the folder holds a study, or something else under the same names.
            InputError: a group label is neither a string nor a whole number.
        """
        from imaginelens.mediation.map_store import save

        return save(self, folder)

    @staticmethod
    def load(folder: str | Path, *, revision: str | None = None) -> "EffectMap":
        """Read a map that `save` or `push_to_hub` wrote, or the merged map of a finished study.

        Args:
            folder: a folder, or a dataset repository of the Hub.
            revision: a branch, tag or commit of the Hub; the newest if left out. `il.hub_origin`
                says which commit it was.

        Raises:
            CheckpointError: there is none, or a part of it is missing, torn, or of another version.
        """
        from imaginelens.mediation.map_store import load

        return load(folder, revision=revision)

    def push_to_hub(
        self,
        repo_id: str,
        *,
        private: bool = False,
        token: str | None = None,
        license: str | None = None,
    ) -> Address:
        """Put the saved map on the Hugging Face Hub, as a dataset; returns its address.

        Args:
            license: the Hub's word for it, such as "cc-by-4.0"; the card names none if left out.

        Raises:
            CheckpointError: the Hub cannot be reached, or one may not write there.
        """
        from imaginelens.mediation.map_store import push

        return push(self, repo_id, private=private, token=token, license=license)

    def __repr__(self) -> str:
        from imaginelens.mediation import map_tables

        return map_tables.text(self)

    def _repr_html_(self) -> str:
        from imaginelens.view.result_cards import map_card

        return map_card(self)


def _or_none(make: Any, row: int) -> Estimate | None:
    try:
        return make(row)
    except EstimateError:
        return None


def _asked(wanted: dict[str, Any]) -> str:
    named = [f"{name} {value!r}" for name, value in wanted.items() if value is not None]
    return ", ".join(named) or "any coordinates"


def _numbers(name: str, given: Any) -> Float[np.ndarray, "..."]:
    try:
        return np.array(given, dtype=np.float64)
    except (TypeError, ValueError, RuntimeError) as error:  # the last by a tensor with a gradient
        raise InputError(
            f"{name} cannot be read as numbers ({error}); give one number per example, nan where "
            "it is missing"
        ) from error


def _check_words(given: EffectMap) -> None:
    for name, kind in (("direction", Direction), ("context", Context)):
        value = getattr(given, name)
        if value not in get_args(kind):
            raise InputError(f"{name} is {value!r}, expected one of {', '.join(get_args(kind))}")
    if given.binary and given.limits is not None:
        raise InputError("limits came with binary=True, whose limits are -1 and 1; leave them out")
    if given.limits is not None and not given.limits[0] < 0 < given.limits[1]:
        raise InputError(
            f"limits are {given.limits}, expected the smallest and largest effect that an example "
            "can have, on both sides of 0"
        )


def _check_cells(cells: tuple[Cell, ...]) -> None:
    if not cells:
        raise InputError("a map needs cells, and none came; select sites and positions that exist")
    seen: set[tuple[Any, ...]] = set()
    for cell in cells:
        whole = [type(n) is int for n in (cell.layer, cell.head) if n is not None]
        texts = [isinstance(text, str) for text in (cell.site, cell.position, *cell.sites)]
        if not all(whole + texts):
            raise InputError(
                f"{cell!r} is no coordinate; give texts (repr(selector) for a position), and whole "
                "numbers or None for layer and head"
            )
        if map_axes.place(cell) in seen:
            raise InputError(
                f"the cell {name_of(cell)} comes twice; make one map of each window of layers"
            )
        seen.add(map_axes.place(cell))


def _check_shapes(given: EffectMap) -> None:
    if given.before.ndim != 1 or not len(given.before):
        raise InputError(
            f"before has shape {given.before.shape}, expected one value per example, and at least "
            "one example"
        )
    n, full = (given.n,), (len(given.cells), given.n)
    shapes = {"before": n, "other": n, "sham": n, "after": full, "flags": full, "change": full}
    for name, shape in shapes.items():
        array, dtype = getattr(given, name), np.int8 if name == "flags" else np.float64
        if array is None and name in ("other", "sham"):
            continue
        if array.shape != shape or array.dtype != dtype:
            raise InputError(
                f"{name} has shape {array.shape} and dtype {array.dtype}, expected {shape} and "
                f"{np.dtype(dtype)} for {len(given.cells)} cells and {given.n} examples"
            )
    for name, labels in (("groups", given.groups), ("keys", given.keys or None)):
        if labels is not None and len(labels) != given.n:
            raise InputError(
                f"{len(labels)} {name} came with {given.n} examples; give one per example"
            )


def _check_values(given: EffectMap) -> None:
    for name in ("before", "other", "after", "sham"):
        array = getattr(given, name)
        if array is None:
            continue
        if np.isinf(array).any():
            where = tuple(map(int, np.argwhere(np.isinf(array))[0]))
            raise InputError(
                f"{name} is {array[where]} at {where}; use nan for what is missing, and a metric "
                "that is finite"
            )
        odd = array[~np.isnan(array) & (array != 0) & (array != 1)]
        if given.binary and name != "sham" and len(odd):
            raise InputError(
                f"{name} holds {odd[0]:g}, which is not 0 or 1; leave out binary=True, and give "
                "limits=(-1.0, 1.0) for averages of 0/1 outcomes"
            )
    strange = given.flags[(given.flags < 0) | (given.flags >= len(FLAGS))]
    if len(strange):
        raise InputError(
            f"flags holds {strange[0]}, expected "
            + ", ".join(f"{i} ({flag})" for i, flag in enumerate(FLAGS))
        )
    if given.limits is not None:
        low, high = given.limits
        beyond = given.effect[(given.effect < low) | (given.effect > high)]
        if len(beyond):
            raise InputError(f"an effect is {beyond[0]:g}, beyond its limits {low:g} and {high:g}")
