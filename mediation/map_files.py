"""A map as one file, and back: arrays and words in one safetensors file, written whole or not at
all, and read with suspicion. No pickle, no path in any file."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save as to_bytes

from imaginelens.hooks.appearing import appearing
from imaginelens.hooks.errors import CheckpointError, InputError, brief, quoted
from imaginelens.mediation.cells import Cell
from imaginelens.mediation.effect_map import EffectMap
from imaginelens.mediation.provenance import Provenance

VERSION = 1
ARRAYS = ("before", "other", "after", "flags", "change", "sham")
OPTIONAL = ("other", "sham")
HEADER = "imaginelens"
_ODD = (ValueError, TypeError, LookupError, AttributeError, ArithmeticError)
KINDS: dict[str, type] = {
    "metric": str,
    "unit": str,
    "binary": bool,
    "direction": str,
    "context": str,
    "edit": str,
}


def write_map(path: Path, map: EffectMap) -> None:
    """Write a map to a file that appears when all of it is on the disk.

    Raises:
        InputError: a group label is neither a string nor a whole number, or a word is no text.
    """
    arrays = {
        name: np.ascontiguousarray(getattr(map, name))  # safetensors writes others in wrong order
        for name in ARRAYS
        if getattr(map, name) is not None
    }
    words = {
        field.name: getattr(map, field.name) for field in fields(map) if field.name not in ARRAYS
    }
    words |= {"cells": [asdict(cell) for cell in map.cells], "groups": _labels(map.groups)}
    words["provenance"] = asdict(map.provenance)
    try:
        header = {"version": VERSION, "digest": _digest(arrays, words), "map": words}
        text = json.dumps(header, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise InputError(
            f"the words of the map cannot be written ({error}); give plain texts and finite numbers"
        ) from error
    write_whole(path, to_bytes(arrays, metadata={HEADER: text}))


def read_map(path: Path) -> EffectMap:
    """Read a file that `write_map` wrote.

    Raises:
        CheckpointError: it is missing, torn, of another version, or holds something else.
    """
    check_file(path)
    try:
        with safe_open(path, framework="numpy") as file:
            header = json.loads((file.metadata() or {}).get(HEADER, "null"))
            check_version(header, path)
            arrays = {name: file.get_tensor(name) for name in file.keys()}
    except (SafetensorError, OSError, ValueError, TypeError, KeyError, RecursionError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(
            f"{path!s} is torn or no map ({brief(error)}); remove it and make this part again"
        ) from error
    try:
        return _built(header, arrays)
    except (*_ODD, RecursionError) as error:
        raise CheckpointError(
            f"{path!s} does not hold a map as this version writes it ({brief(error)}); remove it "
            "and make this part again"
        ) from error


def write_whole(path: Path, content: bytes) -> None:
    """Put a file in its place when all of it is on the disk, so that no part of it is ever read."""
    with appearing(path) as partial:
        partial.write_bytes(content)


def check_file(path: Path) -> None:
    """Refuse what is not there, or leads somewhere else.

    Raises:
        CheckpointError: it is no plain file.
    """
    if path.is_symlink():
        raise CheckpointError(
            f"{path!s} is a link, which is not followed; put the file itself there"
        )
    if not path.is_file():
        raise CheckpointError(f"{path!s} is missing; make this part of the map again")


def check_version(header: Any, path: Path) -> None:
    """Refuse what no version, or a later one, has written.

    Raises:
        CheckpointError: the version is not ours.
    """
    version = header.get("version") if isinstance(header, dict) else None
    if type(version) is not int or version != VERSION:
        raise CheckpointError(
            f"{path!s} has the version {quoted(version)} of the format of maps, and this "
            "version of "
            f"imaginelens reads {VERSION}; read it with the version that wrote it"
        )


def _labels(groups: tuple[Any, ...] | None) -> list[Any] | None:
    """Group labels as JSON has them: strings and whole numbers."""
    if groups is None:
        return None
    plain = [label.item() if isinstance(label, np.generic) else label for label in groups]
    for i, label in enumerate(plain):
        if not isinstance(label, str | int):
            raise InputError(
                f"the group of example {i} is {label!r}, and a saved map holds strings and whole "
                "numbers; name the groups by str(label)"
            )
    return plain


def _digest(arrays: Mapping[str, np.ndarray], words: Mapping[str, Any]) -> str:
    """What changes when any bit of a map does."""
    digest = hashlib.blake2b(json.dumps(words, sort_keys=True).encode(), digest_size=16)
    for name in sorted(arrays):
        array = arrays[name]
        digest.update(f"{name} {array.dtype.str} {array.shape}".encode())
        digest.update(array.tobytes())
    return digest.hexdigest()


def _built(header: dict[str, Any], arrays: dict[str, np.ndarray]) -> EffectMap:
    words = header["map"]
    _check_names("the words of the map", words, {f.name for f in fields(EffectMap)} - {*ARRAYS})
    _check_names("the arrays of the map", {**dict.fromkeys(OPTIONAL), **arrays}, set(ARRAYS))
    if header.get("digest") != _digest(arrays, words):
        raise InputError("its content does not have the digest that was written with it")
    limits, groups = words["limits"], words["groups"]
    made = {
        **words,
        **{name: arrays.get(name) for name in ARRAYS},
        "cells": tuple(_cell(cell) for cell in _listed(words, "cells")),
        "groups": None if groups is None else _listed(words, "groups"),
        "notes": _listed(words, "notes"),
        "keys": _listed(words, "keys"),
        "limits": None if limits is None else (float(limits[0]), float(limits[1])),
        "provenance": _provenance(words["provenance"]),
    }
    for name, kind in KINDS.items():
        if type(made[name]) is not kind:
            raise InputError(f"{name} is {made[name]!r}, expected {kind.__name__}")
    for name in ("notes", "keys"):
        if not all(type(word) is str for word in made[name]):
            raise InputError(f"{name} holds something that is no text")
    if not all(isinstance(label, str | int) for label in made["groups"] or ()):
        raise InputError("groups holds something that is neither a text nor a whole number")
    return EffectMap(**made)


def _cell(given: Any) -> Cell:
    _check_names("a cell", given, {field.name for field in fields(Cell)})
    cell = Cell(**{**given, "sites": _listed(given, "sites")})
    texts = (cell.site, cell.position, *cell.sites)
    whole = (number for number in (cell.layer, cell.head) if number is not None)
    if not all(type(t) is str for t in texts) or not all(type(number) is int for number in whole):
        raise InputError(f"{cell!r} is no cell")
    return cell


def _provenance(given: Any) -> Provenance:
    _check_names("the provenance", given, {field.name for field in fields(Provenance)})
    versions = tuple((str(name), str(number)) for name, number in _listed(given, "versions"))
    made = Provenance(**{**given, "versions": versions, "seconds": float(given["seconds"])})
    for field in fields(Provenance):
        value = getattr(made, field.name)
        if field.type in (str, int, float) and type(value) is not field.type:
            raise InputError(f"{field.name} is {value!r} in the provenance")
    return made


def _listed(words: Mapping[str, Any], name: str) -> tuple[Any, ...]:
    if not isinstance(words[name], list):
        raise InputError(f"{name} is {words[name]!r}, expected a list")
    return tuple(words[name])


def _check_names(what: str, given: Any, expected: set[str]) -> None:
    names = set(given) if isinstance(given, Mapping) else set()
    if names != expected:
        odd = sorted(map(str, names ^ expected))
        raise InputError(f"{what} should have {', '.join(sorted(expected))}; look at {odd[0]!r}")
