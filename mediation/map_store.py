"""A folder that holds a map in parts, and grows: the piece that a study can be resumed from.

Each part is one file that appears whole or not at all, so that a study may be killed at any
instant: what `done` names is there to the last bit, all else is made again.
"""

import json
import re
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

from imaginelens.hooks import hub
from imaginelens.hooks.errors import CheckpointError, InputError, brief, quoted
from imaginelens.mediation.effect_map import EffectMap
from imaginelens.mediation.map_files import (
    VERSION,
    check_file,
    check_version,
    read_map,
    write_map,
    write_whole,
)

MANIFEST = "map.json"
SHARD = "shard-{:06d}.safetensors"
_NAME = re.compile(r"shard-(\d{6})\.safetensors")
TABLE = "table.csv"
MOST = 10**6  # parts: their names have six digits
_SHOWN = 8  # missing parts in an error message


class MapStore:
    """The parts of a map in a folder, by number, and the plan that they follow.

    Several processes may write parts of one plan at the same time. What a killed one leaves behind
    (files that end in .partial) is ignored.

    Args:
        folder: made if it is not there and a plan is given.
        plan: what is being done, as JSON can hold it; a study of another plan is refused. Left out,
            the plan in the folder is taken as it is.
        shards: how many parts there will be, if that is known.

    Raises:
        CheckpointError: the folder has another plan, of which the first differing key is named; no
            plan is there and none was given; or what is there is no plan.
        InputError: the plan, or the number of parts, is none.

    >>> from tempfile import TemporaryDirectory
    >>> from imaginelens.mediation.cells import Cell
    >>> cells = [Cell("hook_latent", None, "latent[0]", None, ())]
    >>> part = EffectMap.from_arrays(cells=cells, before=[0.0], after=[[1.0]], keys=["a"])
    >>> with TemporaryDirectory() as folder:
    ...     store = MapStore(folder, plan={"metric": "logit_diff"}, shards=1)
    ...     store.write_shard(0, part)
    ...     store.done(), store.load().effect
    ({0}, array([[1.]]))
    """

    def __init__(
        self,
        folder: str | Path,
        *,
        plan: Mapping[str, Any] | None = None,
        shards: int | None = None,
    ) -> None:
        self.folder = Path(folder)
        if shards is not None and (type(shards) is not int or not 1 <= shards <= MOST):
            raise InputError(
                f"shards is {shards!r}, expected how many parts there are, 1 to {MOST:,}"
            )
        path = self.folder / MANIFEST
        if plan is not None:
            wanted = {"version": VERSION, "shards": shards, "plan": _plain(dict(plan), "the plan")}
            if not path.exists() and not path.is_symlink():
                self.folder.mkdir(parents=True, exist_ok=True)
                write_whole(path, json.dumps(wanted, indent=1, allow_nan=False).encode())
        elif not path.exists() and not path.is_symlink():
            raise CheckpointError(
                f"there is no map in {self.folder!s} (no {MANIFEST}); pass the folder that a map "
                "or a study was saved to, or plan= to begin a study"
            )
        found = _manifest(path)
        if plan is not None and (where := _difference(found["plan"], wanted["plan"])):
            raise CheckpointError(
                f"{self.folder!s} holds a study with another plan: {where}; choose another folder, "
                "or go on with the plan that is there"
            )
        if shards is not None and found["shards"] != shards:
            raise CheckpointError(
                f"{self.folder!s} holds a study of {found['shards']} parts, and this one has "
                f"{shards}; choose another folder"
            )
        self.plan: dict[str, Any] = found["plan"]
        self.shards: int | None = found["shards"]

    def write_shard(self, number: int, map: EffectMap) -> None:
        """Write one part; it replaces an earlier one of the same number.

        Raises:
            InputError: the number is none of this study, or a group label is neither a string nor
                a whole number.
        """
        write_map(self._path(number), map)

    def done(self) -> set[int]:
        """The numbers of the parts that are there."""
        found = (_NAME.fullmatch(path.name) for path in self.folder.iterdir())
        return {int(match[1]) for match in found if match}

    def missing(self) -> list[int]:
        """The numbers of the parts that are still to be made; where it is not known how many there
        will be, of those below the largest that is there."""
        done = self.done()
        return sorted(set(range(self.shards or max(done, default=0) + 1)) - done)

    def read_shard(self, number: int) -> EffectMap:
        """Read one part.

        Raises:
            CheckpointError: it is missing, torn, a link, or of another version.
            InputError: the number is none of this study.
        """
        return read_map(self._path(number))

    def load(self, *, partial: bool = False) -> EffectMap:
        """Read all parts as one map, in the order of their numbers.

        Args:
            partial: take what is there of a study that is not finished.

        Raises:
            CheckpointError: a part is missing (or, with `partial`, all are) or cannot be read, or
                the parts do not fit together.
        """
        done, missing = sorted(self.done()), self.missing()
        if not done or (missing and not partial):
            names = ", ".join(map(str, missing[:_SHOWN])) + ", ..." * (len(missing) > _SHOWN)
            raise CheckpointError(
                f"part {names} of the map in {self.folder!s} is missing; go on with the study, or "
                "take what there is with MapStore(folder).load(partial=True)"
            )
        if self.shards is not None and done[-1] >= self.shards:
            raise CheckpointError(
                f"{self.folder!s} holds part {done[-1]} of a study of {self.shards} parts, 0 to "
                f"{self.shards - 1}; remove {SHARD.format(done[-1])}"
            )
        parts = [self.read_shard(number) for number in done]
        try:
            return EffectMap.merge(parts)
        except InputError as error:
            raise CheckpointError(
                f"the parts in {self.folder!s} do not make one map: {brief(error)}"
            ) from error

    def _path(self, number: Any) -> Path:
        last = (self.shards or MOST) - 1
        if type(number) is not int or not 0 <= number <= last:
            raise InputError(
                f"{number!r} is no part of this study; its parts are numbered from 0 to {last}"
            )
        return self.folder / SHARD.format(number)

    def __repr__(self) -> str:
        of = "" if self.shards is None else f" of {self.shards}"
        return f"MapStore({str(self.folder)!r}: {len(self.done())}{of} parts done)"


def save(map: EffectMap, folder: str | Path) -> Path:
    """See `EffectMap.save`."""
    store = MapStore(folder, plan={}, shards=1)
    store.write_shard(0, map)
    return store.folder


def load(name: str | Path, *, revision: str | None = None) -> EffectMap:
    """See `EffectMap.load`."""
    files = (MANIFEST, "shard-*.safetensors", TABLE, hub.CARD)
    folder, origin = hub.fetch(name, revision=revision, files=files, repo_type="dataset")
    if origin is None:
        return MapStore(folder).load()
    return hub.remembered(MapStore(hub.plain_files(folder)).load(), origin)


def push(
    map: EffectMap, repo_id: str, *, private: bool, token: str | None, license: str | None
) -> hub.Address:
    """See `EffectMap.push_to_hub`."""

    def put(folder: Path) -> None:
        save(map, folder)
        write_whole(folder / TABLE, map.to_dataframe().to_csv(index=False).encode())
        write_whole(folder / hub.CARD, card(map, license=license).encode())

    return hub.upload(
        put,
        repo_id,
        message=f"EffectMap of {len(map)} cells, imaginelens {version('imaginelens')}",
        private=private,
        token=token,
        repo_type="dataset",
    )


def card(map: EffectMap, *, license: str | None = None) -> str:
    """The README of a map on the Hub."""
    numbers = "\n".join(f"    {line}" for line in repr(map).splitlines())
    tags = ("causal-mediation", "activation-patching", "effectmap")
    return f"""{hub.header(tags=tags, license=license, table=TABLE)}

# EffectMap

{numbers}

## Use

```python
import imaginelens as il

effect_map = il.EffectMap.load("REPOSITORY_OR_FOLDER")
effect_map.plot()
```

The value of every example in every cell is in `{SHARD.format(0)}`; `{TABLE}` has one row for each
cell, for eyes and other tools.
"""


def _manifest(path: Path) -> dict[str, Any]:
    """What a folder says it holds, checked."""
    check_file(path)
    try:
        found = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise CheckpointError(
            f"{path!s} cannot be read ({brief(error)}); it is not the file that a study wrote"
        ) from error
    check_version(found, path)
    shards = found.get("shards")
    if (
        set(found) != {"version", "shards", "plan"}
        or not isinstance(found["plan"], dict)
        or not (shards is None or (type(shards) is int and shards >= 1))
    ):
        raise CheckpointError(
            f"{path!s} should hold version, shards and plan, and holds {brief(', '.join(found))}; "
            "it is not the file that a study wrote"
        )
    if shards is not None and shards > MOST:
        raise CheckpointError(
            f"{path!s} says that there are {quoted(shards)} parts, expected 1 to {MOST:,}; it is "
            "not the file that a study wrote"
        )
    return found


def _plain(value: Any, where: str) -> Any:
    """A plan as JSON gives it back: tuples are lists; all else that would change is refused."""
    if isinstance(value, Mapping):
        for key in value:
            if not isinstance(key, str):
                raise InputError(f"{where} has the key {key!r}; use strings")
        return {key: _plain(each, f"{where}, {key}") for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(each, f"{where}, {i}") for i, each in enumerate(value)]
    finite = isinstance(value, float) and value == value and abs(value) != float("inf")
    if value is None or finite or isinstance(value, str | int):
        return value
    raise InputError(
        f"{where} is {value!r}, which a JSON file cannot hold; give strings, finite numbers, lists "
        "and dicts of them"
    )


def _difference(there: Any, here: Any, where: str = "") -> str:
    """The first key in which two plans differ, with both values; "" if they are equal."""
    if isinstance(there, dict) and isinstance(here, dict):
        for key in dict.fromkeys((*there, *here)):
            dotted = f"{where}.{key}" if where else key
            if key not in here:
                return f"only there is {dotted!r} = {there[key]!r}"
            if key not in there:
                return f"only here is {dotted!r} = {here[key]!r}"
            if found := _difference(there[key], here[key], dotted):
                return found
        return ""
    same = type(there) is type(here) and there == here
    return "" if same else f"{where!r} is {there!r} there and {here!r} here"
