"""Wrong files that a fuzzer of bytes seldom makes: valid but for one value, or one array.

Each value of a JSON file becomes another kind of thing in turn, and each key is left out; each
array of a safetensors file gets another shape, dtype or content.
"""

import copy
import json
from collections.abc import Iterator
from typing import Any

import numpy as np

DEEP = 900  # brackets: below what JSON can be nested in, above what recursive code can follow
VALUES: tuple[Any, ...] = (
    None, True, -1, 0, 3, 10**400, 1e300, float("nan"), float("inf"), "", "x", "\ud800", "\x1b[31m",
    "x" * 5000, "../../x", [], [[]], {}, {"x": 1}, [None], ["x", 1], [1, [2]],
)  # fmt: skip


def of_json(valid: bytes) -> Iterator[bytes]:
    """Files of JSON, or of JSON lines, that differ from a valid one in one value or key."""
    try:
        json.loads(valid)
        lines, ends = [valid.decode()], ""
    except ValueError:
        lines, ends = valid.decode().splitlines(), "\n"
    for number, line in enumerate(lines[:2]):
        above, below = (ends.join([*part, ""]) for part in (lines[:number], lines[number + 1 :]))
        for new in _others(json.loads(line)):
            yield (above + new + ends + below).encode()


def _others(found: Any) -> Iterator[str]:
    """Everything that differs from it in one place."""
    deep = "[" * DEEP + "]" * DEEP
    for path in _paths(found):
        for value in (*VALUES, "DEEP"):
            yield json.dumps(_put(found, path, value)).replace('"DEEP"', deep)
        if path:
            yield json.dumps(_put(found, path))


def of_arrays(valid: bytes) -> Iterator[bytes]:
    """Files of safetensors that differ from a valid one in one array."""
    from safetensors.numpy import load, save

    words = json.loads(valid[8 : 8 + int.from_bytes(valid[:8], "little")]).get("__metadata__")
    arrays = load(valid)
    for name, array in arrays.items():
        with np.errstate(invalid="ignore"):
            whole = array.astype(np.int8)
        others = (
            array[:0], array[None], array.reshape(-1), array.reshape(-1)[:1], np.float64(1) * array,
            whole, array.astype(np.bool_), np.full(array.shape, np.nan),
            np.full(array.shape, np.inf), np.full(array.shape, -7), np.full(array.shape, 2**62),
            np.zeros((0, 0)), np.zeros(()), np.concatenate([array.reshape(-1)] * 2),
            np.swapaxes(array, 0, -1) if array.ndim else array.reshape(1),
        )  # fmt: skip
        for other in others:
            yield save({**arrays, name: np.ascontiguousarray(other)}, metadata=words)
        yield save({each: arrays[each] for each in arrays if each != name}, metadata=words)
        yield save({**arrays, "other": array}, metadata=words)


def _paths(found: Any, above: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    yield above
    if isinstance(found, dict | list):
        for key, each in found.items() if isinstance(found, dict) else enumerate(found[:3]):
            yield from _paths(each, (*above, key))


def _put(found: Any, path: tuple[Any, ...], *value: Any) -> Any:
    """A copy with a value at a place; without it, if none is given."""
    if not path:
        return value[0]
    new = copy.deepcopy(found)
    inner = new
    for key in path[:-1]:
        inner = inner[key]
    if value:
        inner[path[-1]] = value[0]
    else:
        del inner[path[-1]]
    return new
