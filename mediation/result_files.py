"""Results as a folder, and back: arrays in safetensors, words in JSON, a table and a card.

A result is a frozen dataclass of arrays, words and other such dataclasses. Each is written as the
name of its class and its fields; only the classes named below are ever made of a file, by their
own constructors, which check what they get. No pickle.
"""

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load as from_bytes
from safetensors.numpy import save as to_bytes

from imaginelens.hooks import hub, metrics
from imaginelens.hooks.appearing import alone
from imaginelens.hooks.errors import CheckpointError, InputError, brief, quoted
from imaginelens.hooks.metrics import Metric
from imaginelens.mediation.map_files import write_whole

VERSION = 1
ARRAYS, WORDS, TABLE = "result.safetensors", "result.json", "table.csv"
FILES = (ARRAYS, WORDS, TABLE, hub.CARD)
_MEDIATION, _HOOKS = "imaginelens.mediation", "imaginelens.hooks"
CLASSES = {  # what a file may hold -> where it is
    "Agreement": f"{_MEDIATION}.agreement",
    "Baseline": f"{_MEDIATION}.dependence_runs",
    "Cell": f"{_MEDIATION}.cells",
    "Controls": f"{_MEDIATION}.controls",
    "Dependence": f"{_MEDIATION}.dependence_result",
    "EditEffect": f"{_MEDIATION}.edit_effects",
    "EffectMap": f"{_MEDIATION}.effect_map",
    "Effects": f"{_MEDIATION}.effects",
    "FaithfulnessCurve": f"{_MEDIATION}.faithfulness",
    "Interchange": f"{_MEDIATION}.interchange",
    "Interventional": f"{_MEDIATION}.interventional",
    "Landing": f"{_HOOKS}.landing",
    "Necessity": f"{_MEDIATION}.edit_effects",
    "PotentialOutcomes": f"{_MEDIATION}.outcomes",
    "Provenance": f"{_MEDIATION}.provenance",
    "Selectivity": f"{_MEDIATION}.sufficiency",
    "StepInfluence": f"{_MEDIATION}.step_influence",
    "Sufficiency": f"{_MEDIATION}.sufficiency",
}
T = TypeVar("T", bound="Saved")
_UNREADABLE = (
    OSError, SafetensorError, ValueError, TypeError, LookupError, AttributeError, RecursionError,
    ArithmeticError,
)  # fmt: skip


class Saved:
    """What results have in common: they can be kept in a folder, and on the Hub."""

    def save(self, folder: str | Path) -> Path:
        """Write the result to a folder: safetensors, JSON, a table where it has one, and a card.

        Raises:
            CheckpointError: the folder holds a result already, or is a file.
            InputError: a part of it cannot be kept, such as a metric of your own.
        """
        return save(self, Path(folder))

    @classmethod
    def load(cls: type[T], name: str | Path, *, revision: str | None = None) -> T:
        """Read what `save` or `push_to_hub` wrote, from a folder or the Hub.

        Args:
            revision: a branch, tag or commit of the Hub; the newest if left out. `il.hub_origin`
                says which commit it was.

        Raises:
            CheckpointError: nothing of the kind is there, or it is torn or of another version.
        """
        folder, origin = hub.fetch(name, revision=revision, files=FILES, repo_type="dataset")
        found = load(folder)
        if not isinstance(found, cls):
            raise CheckpointError(
                f"{name!s} holds a {type(found).__name__}, not a {cls.__name__}; read it with "
                f"il.{type(found).__name__}.load"
            )
        return hub.remembered(found, origin)

    def push_to_hub(
        self,
        repo_id: str,
        *,
        private: bool = False,
        token: str | None = None,
        license: str | None = None,
    ) -> hub.Address:
        """Put the saved result on the Hugging Face Hub, as a dataset; returns its address.

        Args:
            license: the Hub's word for it, such as "cc-by-4.0"; the card names none if left out.

        Raises:
            CheckpointError: the Hub cannot be reached, or one may not write there.
            InputError: as `save`.
        """
        return hub.upload(
            lambda folder: save(self, folder, license=license),
            repo_id,
            message=f"{type(self).__name__}, imaginelens {version('imaginelens')}",
            private=private,
            token=token,
            repo_type="dataset",
        )


def save(result: Any, folder: Path, *, license: str | None = None) -> Path:
    """Write a result to a folder; the file with the words comes last, and is the proof."""
    if folder.exists() and not folder.is_dir():
        raise CheckpointError(f"{folder!s} is a file; give a folder to save the result to")
    if (folder / WORDS).exists():
        raise CheckpointError(f"{folder!s} holds a result already; choose another folder")
    arrays: dict[str, np.ndarray] = {}
    words = _words(result, arrays, type(result).__name__)
    content = to_bytes(arrays)
    header = {
        "version": VERSION,
        "imaginelens": version("imaginelens"),
        "digest": _digest(content, words),
        "result": words,
    }
    frame = result.to_dataframe() if hasattr(result, "to_dataframe") else None
    table = None if frame is None else TABLE
    told = card(result, table=table, license=license)
    text = json.dumps(header, indent=1, allow_nan=False)
    with alone(folder, proof=WORDS):
        write_whole(folder / ARRAYS, content)
        if frame is not None:
            write_whole(folder / TABLE, frame.to_csv(index=False).encode())
        write_whole(folder / hub.CARD, told.encode())
        write_whole(folder / WORDS, text.encode())
    return folder


def load(folder: Path) -> Any:
    """Read what `save` wrote.

    Raises:
        CheckpointError: there is none, it is torn, or another version wrote it.
    """
    if not (folder / WORDS).is_file() or not (folder / ARRAYS).is_file():
        raise CheckpointError(
            f"there is no result in {folder!s}, which would have {WORDS} and {ARRAYS}; give the "
            "folder that .save() wrote"
        )
    try:
        header = json.loads((folder / WORDS).read_text(encoding="utf-8"))
        content = (folder / ARRAYS).read_bytes()
        if header["version"] != VERSION:
            raise CheckpointError(
                f"{folder!s} has version {quoted(header['version'])} of the format of "
                f"results, and this version of imaginelens reads {VERSION}; read it with "
                f"imaginelens {brief(header.get('imaginelens'))}"
            )
        if header["digest"] != _digest(content, header["result"]):
            raise CheckpointError(
                f"{WORDS} and {ARRAYS} in {folder!s} do not belong together, or were changed; save "
                "the result again"
            )
        return _value(header["result"], from_bytes(content))
    except _UNREADABLE as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(
            f"{folder!s} does not hold a result as this version writes it ({brief(error)}); save "
            "it again"
        ) from error


def card(result: Any, *, table: str | None, license: str | None = None) -> str:
    """The README of a saved result, in the Hub's conventions."""
    name = type(result).__name__
    numbers = "\n".join(f"    {line}" for line in repr(result).splitlines())
    also = f" `{TABLE}` is the table, for eyes and other tools." if table else ""
    tags = ("causal-mediation", name.lower())
    return f"""{hub.header(tags=tags, license=license, table=table)}

# {name}

{numbers}

## Use

```python
import imaginelens as il

result = il.{name}.load("REPOSITORY_OR_FOLDER")
```

`{ARRAYS}` has the value of every example, `{WORDS}` what was done, with what, and how
often.{also} Texts, answers and group labels go along where the result has them.
"""


def _digest(content: bytes, words: Any) -> str:
    """What changes when any bit of a result does."""
    digest = hashlib.sha256(content)
    digest.update(json.dumps(words, sort_keys=True).encode())
    return digest.hexdigest()


# ---- values as JSON ------------------------------------------------------------------------------


def _words(value: Any, arrays: dict[str, np.ndarray], where: str) -> Any:
    """A value as JSON holds it; arrays go into `arrays` under their place."""
    if isinstance(value, np.generic):
        value = value.item()
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else {"float": repr(value)}
    if isinstance(value, np.ndarray) and value.dtype.kind in "biuf":
        arrays[where] = np.ascontiguousarray(value)  # safetensors writes others in wrong order
        return {"array": where}
    if isinstance(value, Metric):
        name = value.name
        if getattr(metrics, name, None) is not value:
            raise InputError(
                f"{where} is {value!r}, a metric of your own, which is a function and cannot be "
                "saved; keep the numbers with .to_dataframe()"
            )
        return {"metric": name}
    if isinstance(value, tuple | list):
        parts = [_words(each, arrays, f"{where}.{i}") for i, each in enumerate(value)]
        return {"tuple" if isinstance(value, tuple) else "list": parts}
    if isinstance(value, frozenset | set):
        parts = sorted((_words(each, arrays, where) for each in value), key=repr)
        return {"frozenset" if isinstance(value, frozenset) else "set": parts}
    if isinstance(value, Mapping):
        return {
            "dict": [
                [_words(key, arrays, where), _words(each, arrays, f"{where}.{i}")]
                for i, (key, each) in enumerate(value.items())
            ]
        }
    if is_dataclass(value) and CLASSES.get(type(value).__name__) == type(value).__module__:
        return {
            "class": type(value).__name__,
            "fields": {
                each.name: _words(getattr(value, each.name), arrays, f"{where}.{each.name}")
                for each in fields(value)
                if each.init and not each.name.startswith("_")
            },
        }
    raise InputError(
        f"{where} is a {type(value).__name__}, which a saved result cannot hold; keep the numbers "
        "with .to_dataframe()"
    )


def _value(words: Any, arrays: Mapping[str, np.ndarray]) -> Any:
    """What `_words` was given."""
    if not isinstance(words, dict):
        return words
    (kind, content), *others = words.items()
    if kind == "class":
        if content not in CLASSES:
            raise ValueError(f"it holds a {content!r}, which is no class of a result")
        made = getattr(import_module(CLASSES[content]), content)
        return made(**{name: _value(each, arrays) for name, each in words["fields"].items()})
    if others:
        raise ValueError(f"a part of it has {', '.join(words)}")
    match kind:
        case "float":
            return float(content)
        case "array":
            return arrays[content]
        case "metric":
            found = getattr(metrics, content)
            if not isinstance(found, Metric):
                raise ValueError(f"{content!r} is no metric")
            return found
        case "tuple":
            return tuple(_value(each, arrays) for each in content)
        case "list":
            return [_value(each, arrays) for each in content]
        case "frozenset":
            return frozenset(_value(each, arrays) for each in content)
        case "set":
            return {_value(each, arrays) for each in content}
        case "dict":
            return {_value(key, arrays): _value(each, arrays) for key, each in content}
    raise ValueError(f"a part of it is a {kind!r}")
