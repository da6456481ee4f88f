"""States in a folder: shards that appear whole or not at all, read one cell at a time.

A shard is one safetensors file with a tensor for each (site, step), so that one cell is read
without the rest; beside it lies what is needed to go on with the collecting and to make controls.
`states.json` says what the folder holds. No pickle, and no path in any file.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from imaginelens.hooks.appearing import appearing
from imaginelens.hooks.errors import CheckpointError, InputError, brief, quoted
from imaginelens.probes.states import Cells, States

VERSION = 1
MANIFEST = "states.json"
SHARD = "shard-{:06d}.safetensors"
HEADER = "imaginelens"
CONTROLS = "controls"
SHARD_SIZE = 64
_PLAN = ("n", "sites", "at", "dtype", "shard_size")  # what every plan says


# ---- what a shard holds ------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Trace:
    """Where the states of some runs were found, and what it takes to run the like again.

    Attributes:
        mask: which steps each example has.
        steps: the latent step that each of them is; -1 where it is none.
        written: the token ids that each example wrote, -1 behind them.
        first: the first latent that any of them fed; None if none did.
        late: whether a step stands at or behind a latent, so that it can depend on one.
    """

    mask: Bool[np.ndarray, "example step"]
    steps: Int[np.ndarray, "example step"]
    written: Int[np.ndarray, "example token"]
    first: Float[np.ndarray, " d_model"] | None = None
    late: bool = False

    @staticmethod
    def bare(mask: Bool[np.ndarray, "example step"]) -> "Trace":
        """That of states which no run is known for."""
        return Trace(mask, np.full(mask.shape, -1), np.zeros((len(mask), 0), dtype=np.int64))


@dataclass(frozen=True, eq=False)
class Part:
    """The states of some examples, zero where the mask of their trace is False."""

    values: Float[np.ndarray, "example step layer d_model"]
    trace: Trace


def joined(parts: Sequence[Part]) -> Part:
    """Parts one after another, with as many steps as the longest has.

    >>> one, two = (Part(np.ones((1, k, 1, 2)), Trace.bare(np.ones((1, k), bool))) for k in (1, 2))
    >>> joined([one, two]).trace.mask.tolist()
    [[True, False], [True, True]]
    """
    return Part(_stacked([part.values for part in parts], 0), traced([p.trace for p in parts]))


def traced(traces: Sequence[Trace]) -> Trace:
    """The traces of parts as that of all their examples."""
    return Trace(
        _stacked([trace.mask for trace in traces], False),
        _stacked([trace.steps for trace in traces], -1),
        _stacked([trace.written for trace in traces], -1),
        next((trace.first for trace in traces if trace.first is not None), None),
        any(trace.late for trace in traces),
    )


def _stacked(arrays: Sequence[np.ndarray], fill: Any) -> np.ndarray:
    """Arrays one after another, the second axis filled up."""
    width = max(array.shape[1] for array in arrays)
    filled = [
        np.pad(a, [(0, 0), (0, width - a.shape[1]), *[(0, 0)] * (a.ndim - 2)], constant_values=fill)
        for a in arrays
    ]
    return np.concatenate(filled)


def shards_of(n: int, size: int) -> list[range]:
    """The examples of each shard.

    >>> shards_of(5, 2)
    [range(0, 2), range(2, 4), range(4, 5)]
    """
    return [range(start, min(start + size, n)) for start in range(0, n, size)]


# ---- cells -------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class OnDisk:
    """States in the shards of a folder; `read` opens what it needs and closes it again.

    Attributes:
        stamp: what the shards of this folder say they belong to.
        mask: which steps each example has.
        checked: what has been compared with its digest since it was last written, so that states
            which are read many times are not compared many times.
    """

    folder: Path
    stamp: str
    shards: tuple[range, ...]
    mask: Bool[np.ndarray, "example step"]
    layers: int
    width: int
    dtype: str
    checked: set[tuple[str, str, int]] = field(default_factory=set)

    @property
    def shape(self) -> tuple[int, int, int, int]:
        n, steps = self.mask.shape
        return n, steps, self.layers, self.width

    def read(
        self, step: int, layer: int, rows: Int[np.ndarray, " row"]
    ) -> Float[np.ndarray, "row d_model"]:
        """The states of some examples; zero where one has no such step.

        Raises:
            CheckpointError: a shard is missing or torn.
        """
        found = np.zeros((len(rows), self.width), dtype=self.dtype)
        wanted = self.mask[rows, step]
        starts = np.array([shard.start for shard in self.shards])
        of_row = np.searchsorted(starts, rows, side="right") - 1
        for number in np.unique(of_row[wanted]).tolist():
            shard = self.shards[number]
            there = wanted & (of_row == number)
            held = np.flatnonzero(self.mask[shard.start : shard.stop, step])
            with _opened(self.folder / SHARD.format(number), self.stamp) as file:
                values = file.tensor(f"{layer}.{step}", self.checked)
            if values.shape != (len(held), self.width):
                raise CheckpointError(
                    f"{self.folder / SHARD.format(number)!s} has {values.shape} states at layer "
                    f"{layer}, step {step}, where {(len(held), self.width)} belong; remove it and "
                    "collect again"
                )
            found[there] = values[np.searchsorted(held, rows[there] - shard.start)]
        return found


@dataclass(frozen=True, eq=False)
class Repeated:
    """One state per example, shown at every step and layer."""

    cells: Cells
    steps: int
    layers: int

    @property
    def shape(self) -> tuple[int, int, int, int]:
        n, _, _, width = self.cells.shape
        return n, self.steps, self.layers, width

    def read(
        self, step: int, layer: int, rows: Int[np.ndarray, " row"]
    ) -> Float[np.ndarray, "row d_model"]:
        return self.cells.read(0, 0, rows)


# ---- a folder ----------------------------------------------------------------------------------


class Folder:
    """Shards in a folder, and the plan they were made by.

    Args:
        plan: what is being collected, as JSON holds it; a folder of another plan is refused.
        words: what belongs to it and does not decide what is run (`label`, `labels`, `groups`),
            as far as it is known; compared with a folder that is finished.

    Raises:
        CheckpointError: the folder holds something else, of which the first difference is named,
            or what is there cannot be read.
    """

    def __init__(
        self, folder: Path, *, plan: Mapping[str, Any], words: Mapping[str, Any] | None = None
    ) -> None:
        self.folder = folder
        plan = json.loads(json.dumps(plan))  # as the file gives it back
        self.shards = shards_of(plan["n"], plan["shard_size"])
        self.stamp = _stamp(plan)
        path = folder / MANIFEST
        if path.exists() or path.is_symlink():
            there = _manifest(folder)
            _check_same(folder, there["plan"], dict(plan))
            given = {k: v for k, v in (words or {}).items() if v is not None}
            known = {k: v for k, v in there["words"].items() if k in given}
            _check_same(folder, known, {k: given[k] for k in known})
            self._manifest, self._begun = there, True
            return
        # labels, say, may still be mistaken, and are written at the end
        self._manifest = {"version": VERSION, "finished": False, "plan": plan, "words": {}}
        self._begun = False

    def missing(self) -> list[int]:
        """The numbers of the shards that are still to be made."""
        return [k for k in range(len(self.shards)) if not self._path(k).is_file()]

    def write(self, number: int, part: Part) -> None:
        """Write a shard; it appears when all of it is on the disk."""
        if not self._begun:
            self._save()
        trace = part.trace
        tensors = {"mask": trace.mask, "steps": trace.steps, "written": trace.written}
        if trace.first is not None:
            tensors["first"] = trace.first
        for step in range(trace.mask.shape[1]):
            held = trace.mask[:, step]
            for layer in range(part.values.shape[2]):
                tensors[f"{layer}.{step}"] = part.values[held, step, layer]
        # safetensors writes arrays that are not contiguous in the wrong order
        tensors = {name: np.ascontiguousarray(array) for name, array in tensors.items()}
        header = {
            "version": VERSION,
            "stamp": self.stamp,
            "late": trace.late,
            "width": part.values.shape[3],
            "digests": {name: _digest(array) for name, array in tensors.items()},
        }
        with appearing(self._path(number)) as partial:
            save_file(tensors, partial, metadata={HEADER: json.dumps(header)})

    def trace(self, number: int) -> Trace:
        """What a shard says about its runs."""
        return _trace(self._path(number), self.stamp)

    def mask(self) -> Bool[np.ndarray, "example step"]:
        """Which steps each example has, of all shards."""
        return _stacked([self.trace(k).mask for k in range(len(self.shards))], False)

    def cells(self) -> OnDisk:
        """The states of all shards.

        Raises:
            CheckpointError: one is missing or torn.
        """
        plan = self._manifest["plan"]
        with _opened(self._path(0), self.stamp) as file:
            width = int(file.header["width"])
        mask = self.mask()
        if len(mask) != plan["n"]:
            raise CheckpointError(
                f"the shards in {self.folder!s} hold {len(mask)} examples, and {MANIFEST} says "
                f"{plan['n']}; collect again into another folder"
            )
        return OnDisk(
            self.folder,
            self.stamp,
            tuple(self.shards),
            mask,
            len(plan["sites"]),
            width,
            plan["dtype"],
        )

    def finish(self, **words: Any) -> None:
        """Say that all is there, and what is known now.

        Raises:
            CheckpointError: the folder was finished before with other labels, say.
        """
        fixed = {k: v for k, v in words.items() if k != "notes"}
        if self._manifest["finished"]:
            there = self._manifest["words"]
            _check_same(self.folder, {k: there.get(k) for k in fixed}, fixed)
        self._manifest["words"] |= words
        self._manifest["finished"] = True
        self._save()

    def _save(self) -> None:
        try:
            text = json.dumps(self._manifest, allow_nan=False)
        except (TypeError, ValueError) as error:
            raise InputError(
                f"what describes the states cannot be written ({error}); give labels and groups as "
                "texts and finite numbers"
            ) from error
        self.folder.mkdir(parents=True, exist_ok=True)
        with appearing(self.folder / MANIFEST) as partial:
            partial.write_text(text, encoding="utf-8")
        self._begun = True

    def _path(self, number: int) -> Path:
        return self.folder / SHARD.format(number)


def open_states(folder: str | Path) -> States:
    """Open the states that a folder holds; they stay there until a cell is read.

    A control that was never completed is left out, and `.notes` says so.

    Raises:
        CheckpointError: there are none, not all of them, or what is there is torn or of another
            version.
    """
    path = Path(folder)
    manifest = _manifest(path)
    plan, words = manifest["plan"], manifest["words"]
    held = Folder(path, plan=plan)
    missing = held.missing()
    if missing or not manifest["finished"]:
        what = f"{len(missing)} of {len(held.shards)} shards are missing"
        raise CheckpointError(
            f"the states in {path!s} are not complete ({what}); call collect(..., out=) again with "
            "the same arguments"
        )
    cells = held.cells()
    groups, keys, label = words.get("groups"), plan.get("keys"), words.get("label") or "label"
    states = States(
        cells,
        cells.mask,
        tuple(plan["sites"]),
        groups=None if groups is None else tuple(groups),
        label=label,
        at=plan["at"],
        keys=None if keys is None else tuple(keys),
        notes=tuple(words.get("notes") or ()),
    )
    controls, notes = {}, list(states.notes)
    for file in sorted((path / CONTROLS).glob(f"*/{MANIFEST}")):
        control = _manifest(file.parent)
        known = control["plan"] | control["words"]
        name = str(known.get("control", file.parent.name))
        if not control["finished"]:
            notes.append(f"no control {name!r}: it was not completed")
            continue
        controls[name] = beside(states, open_states(file.parent), control["words"].get("repeated"))
    states = replace(states, controls=controls, notes=tuple(notes))
    labels = words.get("labels")
    return states if labels is None else states.relabelled(labels, label=label)


def beside(states: States, control: States, repeated: Any) -> States:
    """A control as it stands beside the states: the same examples, groups and, where it has one
    state per example, steps and layers."""
    if repeated:
        cells = Repeated(control.cells, states.shape[1], len(states.sites))
        control = replace(control, cells=cells, mask=states.mask, sites=states.sites)
    return replace(
        control, groups=states.groups, label=states.label, keys=states.keys, at=states.at
    )


def save_states(states: States, folder: str | Path, *, shard_size: int = SHARD_SIZE) -> Path:
    """Write states, from wherever they are, with their controls; returns the folder.

    Args:
        shard_size: examples in a shard, which is what is held in memory.

    Raises:
        InputError: the folder has states already, or labels or groups are neither texts nor finite
            numbers.

    >>> from tempfile import TemporaryDirectory
    >>> with TemporaryDirectory() as folder:
    ...     path = save_states(States.of(np.ones((3, 2, 4)), ["a", "b", "a"]), folder)
    ...     open_states(path).cell(step=1).y.tolist()
    ['a', 'b', 'a']
    """
    path = Path(folder)
    if (path / MANIFEST).exists():
        raise InputError(f"{path!s} holds states already; choose another folder")
    labels = None if states.labels is None else plain(states.labels.tolist(), "label")
    words = {
        "label": states.label,
        "labels": labels,
        "groups": None if states.groups is None else plain(list(states.groups), "group"),
    }
    _write(states, path, shard_size, words, list(states.notes))
    for name, control in states.controls.items():
        own = {"control": name, "repeated": isinstance(control.cells, Repeated)}
        if isinstance(control.cells, Repeated):
            one = np.ones((len(control), 1), dtype=bool)
            inner = control.cells.cells
            control = replace(control, cells=inner, mask=one, sites=("input",), labels=None)
        _write(control, path / CONTROLS / slug(name), shard_size, own, list(control.notes))
    return path


def slug(name: str) -> str:
    """A control's name as that of a folder.

    >>> slug("random model")
    'random-model'
    """
    return "".join(c if c.isalnum() else "-" for c in name.casefold())


def plain(values: Any, what: str, where: str = "") -> Any:
    """Labels or groups as JSON has them: nan, which is no label, becomes None.

    Raises:
        InputError: one is neither a text, nor a finite number, nor None.

    >>> plain([np.int64(1), "a", float("nan")], "label")
    [1, 'a', None]
    """
    if isinstance(values, list | tuple):
        return [plain(value, what, f"{where}[{i}]") for i, value in enumerate(values)]
    value = values.item() if isinstance(values, np.generic) else values
    if value is None or (isinstance(value, float) and value != value):
        return None
    if not isinstance(value, str | int | float) or value in (float("inf"), -float("inf")):
        raise InputError(
            f"the {what} {where} is {value!r}, expected a text, a finite number or None; name it, "
            "by str(...), say"
        )
    return value


def _write(
    states: States, folder: Path, shard_size: int, words: Mapping[str, Any], notes: list[str]
) -> None:
    n, steps, layers, _ = states.shape
    probe = states.cells.read(0, 0, np.arange(min(n, 1)))
    plan = {
        "n": n,
        "sites": list(states.sites),
        "at": states.at,
        "dtype": str(probe.dtype),
        "shard_size": shard_size,
        "keys": None if states.keys is None else list(states.keys),
    }
    held = Folder(folder, plan=plan, words=words)
    for number, shard in enumerate(held.shards):
        rows = np.arange(shard.start, shard.stop)
        values = np.stack(
            [
                np.stack([states.cells.read(t, k, rows) for k in range(layers)], axis=1)
                for t in range(steps)
            ],
            axis=1,
        )
        held.write(number, Part(values, Trace.bare(states.mask[shard.start : shard.stop])))
    held.finish(**words, notes=notes)


# ---- files -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Shard:
    """An open shard: its header, and its tensors on demand, each checked."""

    path: Path
    file: Any
    header: Mapping[str, Any]

    def tensor(self, name: str, checked: set[tuple[str, str, int]] | None = None) -> np.ndarray:
        array = np.asarray(self.file.get_tensor(name))
        this = self.path.name, name, self.path.stat().st_mtime_ns
        if checked is not None and this in checked:
            return array
        if _digest(array) != self.header["digests"][name]:
            raise ValueError(f"{name} has changed since it was written")
        if checked is not None:
            checked.add(this)
        return array


@contextmanager
def _opened(path: Path, stamp: str) -> Iterator[_Shard]:
    """Open a shard for reading.

    Raises:
        CheckpointError: it is missing, a link, torn, of another version, or of another folder.
    """
    if path.is_symlink() or not path.is_file():
        state = "a link, which is not followed" if path.is_symlink() else "missing"
        raise CheckpointError(
            f"{path!s} is {state}; call collect(..., out=) again with the same arguments"
        )
    try:
        with safe_open(path, framework="numpy") as file:
            header = json.loads((file.metadata() or {}).get(HEADER, "null"))
            _check_version(header, path)
            if header["stamp"] != stamp:
                raise CheckpointError(
                    f"{path!s} belongs to other states than {MANIFEST} beside it; remove it and "
                    "collect again"
                )
            yield _Shard(path, file, header)
    except (SafetensorError, OSError, ValueError, TypeError, LookupError, RecursionError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(
            f"{path!s} is torn or no shard of states ({brief(error)}); remove it and call "
            "collect(..., out=) again with the same arguments"
        ) from error


def _trace(path: Path, stamp: str) -> Trace:
    with _opened(path, stamp) as file:
        first = file.tensor("first") if "first" in file.header["digests"] else None
        mask, steps, written = (file.tensor(name) for name in ("mask", "steps", "written"))
        return Trace(mask, steps, written, first, bool(file.header["late"]))


def _manifest(folder: Path) -> dict[str, Any]:
    """What a folder says it holds, checked."""
    path = folder / MANIFEST
    if path.is_symlink() or not path.is_file():
        raise CheckpointError(
            f"there are no states in {folder!s} (no {MANIFEST}); pass the folder that "
            "collect(..., out=) or save_states wrote"
        )
    try:
        found = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise CheckpointError(
            f"{path!s} cannot be read ({brief(error)}); it is not the file that collect wrote"
        ) from error
    _check_version(found, path)
    plan, words = found.get("plan"), found.get("words")
    whole = isinstance(plan, dict) and isinstance(words, dict) and "finished" in found
    if not whole or [key for key in _PLAN if key not in plan]:
        raise CheckpointError(
            f"{path!s} does not say what was collected ({', '.join(_PLAN)}); it is not the file "
            "that collect wrote"
        )
    if odd := _odd(plan, words):
        raise CheckpointError(
            f"{path!s} has {quoted(odd[1])} as {odd[0]}; it is not the file that collect wrote"
        )
    return dict(found)


def _odd(plan: Mapping[str, Any], words: Mapping[str, Any]) -> tuple[str, Any] | None:
    """The first thing in a manifest that is not of its kind, by name; None if there is none."""
    for name in ("n", "shard_size"):
        if type(plan[name]) is not int or not 0 < plan[name] < 10**12:
            return name, plan[name]
    if plan["n"] > 10**6 * plan["shard_size"]:  # the names of shards have six digits
        return "n", plan["n"]
    held = {**{k: plan.get(k) for k in ("sites", "keys")}, **words}
    for name in ("sites", "keys", "groups", "labels", "notes"):
        if not isinstance(held.get(name), list | None) or (name == "sites" and not held[name]):
            return name, held.get(name)
    for name in ("sites", "keys", "notes"):
        for each in held.get(name) or ():
            if not isinstance(each, str):
                return name, each
    for name in ("groups", "labels"):
        for each in held.get(name) or ():  # labels may be one for each step of each example
            several = each if isinstance(each, list) and name == "labels" else [each]
            if not all(isinstance(one, str | int | float | None) for one in several):
                return name, each
    texts = (("at", plan.get("at")), ("dtype", plan.get("dtype")), ("label", words.get("label")))
    return next((one for one in texts if not isinstance(one[1], str | None)), None)


def _check_version(found: Any, path: Path) -> None:
    version = found.get("version") if isinstance(found, dict) else None
    if version != VERSION:
        raise CheckpointError(
            f"{path!s} has the version {quoted(version)} of the format of states, and this "
            f"version of imaginelens reads {VERSION}; read it with the version that wrote it"
        )


def _check_same(folder: Path, there: Mapping[str, Any], here: Mapping[str, Any]) -> None:
    """Refuse to go on with something else than what is there; names the first difference."""
    for key in dict.fromkeys((*there, *here)):
        old, new = there.get(key), here.get(key)
        if old == new:
            continue
        how = f"{_told(old)} there and {_told(new)} here"
        if isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
            first = [a == b for a, b in zip(old, new, strict=True)].index(False)
            how += f", the first that differs is number {first}"
        more = "; other labels go on with open_states(folder).relabelled(labels)" * (
            key in ("label", "labels")
        )
        raise CheckpointError(
            f"{folder!s} holds states with other {_NAMED.get(key, key)!r}: {how}; choose another "
            f"folder, or the arguments of then{more}"
        )


def _told(value: Any) -> str:
    return f"{len(value)} of them" if isinstance(value, list) else repr(value)


_NAMED = {"keys": "inputs", "n": "inputs"}


def _stamp(plan: Mapping[str, Any]) -> str:
    """What tells the shards of one plan from those of others."""
    text = json.dumps(plan, sort_keys=True)
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def _digest(array: np.ndarray) -> str:
    """What changes when any bit of an array does."""
    digest = hashlib.blake2b(f"{array.dtype}{array.shape}".encode(), digest_size=16)
    digest.update(np.ascontiguousarray(array).data)
    return digest.hexdigest()
