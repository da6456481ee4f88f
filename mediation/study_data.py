"""The pairs of a study: an organism's task, or a file of the user, in the same order every time."""

import csv
import hashlib
import io
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

from imaginelens.hooks import Pairs
from imaginelens.hooks.errors import InputError, brief
from imaginelens.hooks.inputs import Example, content_key
from imaginelens.hooks.reading import TEXTS
from imaginelens.mediation.study_config import ColumnsConfig, StudyConfig


@dataclass(frozen=True)
class StudyData:
    """The pairs that are mapped, and those that are kept aside for statistics.

    Attributes:
        keys: what tells each mapped pair: its number and a digest of its content.
    """

    pairs: Pairs
    reference: Pairs | None
    keys: tuple[str, ...]

    @property
    def content(self) -> str:
        """A digest of all that the study reads, in order."""
        aside = () if self.reference is None else keys_of(self.reference)
        text = "/".join((*self.keys, "aside", *aside))
        return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def study_data(config: StudyConfig, task: Callable[..., Pairs] | None) -> StudyData:
    """Draw or read the pairs of a study.

    Args:
        task: the model's own, as `lens.task` of an organism; None if it has none.

    Raises:
        InputError: the model has no task, the file cannot be read, or too few pairs are left when
            the reference has its own.
    """
    data = config.data
    if data.task is not None:
        if task is None:
            raise InputError(
                f"[data] has a task, and {config.model.name!r} is no organism and has none; give "
                "your own pairs with file"
            )
        seed = config.run.seed if data.task.seed is None else data.task.seed
        pairs = task(n=data.task.n, seed=seed)
    else:
        assert data.file is not None
        pairs = read_pairs(config.folder / data.file, data.columns, seed=config.run.seed)
    kept = pairs[: data.limit]
    if not data.reference:
        return StudyData(kept, None, keys_of(kept))
    if len(pairs) - data.reference < 1:
        raise InputError(
            f"[data] keeps {data.reference} pairs aside as reference, and there are {len(pairs)}; "
            "keep fewer, or give more pairs"
        )
    aside = pairs[len(pairs) - data.reference :]
    mapped = pairs[: min(data.limit or len(pairs), len(pairs) - data.reference)]
    _check_apart(mapped, aside)
    return StudyData(mapped, aside, keys_of(mapped))


def read_pairs(path: Path, columns: ColumnsConfig, *, seed: int) -> Pairs:
    """Read pairs from a file of JSON lines, JSON, CSV or Parquet; paths of pictures count from it.

    Raises:
        InputError: the file, or a row of it, cannot be read.
    """
    given = {name: key for name, key in asdict(columns).items() if key is not None}
    if path.suffix.lower() == ".jsonl":
        return Pairs.from_jsonl(path, seed=seed, **given)
    if "source" in given:
        raise InputError(
            f"columns names a source, and sources are read from JSON lines; save {path.name!r} as "
            ".jsonl, or name the pairs in a column: pair"
        )
    rows = _rows(path)
    if not rows:
        raise InputError(f"{path.name} has no rows; give at least one")
    images = given.pop("images", None) or next((k for k in ("images", "image") if k in rows[0]), "")
    text = given.pop("text", None) or next((k for k in TEXTS if k in rows[0]), TEXTS[0])
    if not images:  # a question without a picture
        images = "images"
        rows = [{**row, images: None} for row in rows]
    rows = [{**row, images: _beside(row.get(images), path.parent)} for row in rows]
    return Pairs.from_dataset(rows, images=images, text=text, seed=seed, **given)


def keys_of(pairs: Pairs) -> tuple[str, ...]:
    """What identifies each pair: its number, so that all differ, and a digest of its content."""
    groups: Sequence[Any] = pairs.groups or [None] * len(pairs)
    found = []
    for i in range(len(pairs)):
        parts = (
            _content(pairs.base[i]), _content(pairs.source[i]), pairs.base_answers[i],
            pairs.source_answers[i], groups[i],
        )  # fmt: skip
        digest = hashlib.blake2b(repr(parts).encode(), digest_size=8).hexdigest()
        found.append(f"{i}-{digest}")
    return tuple(found)


def _content(example: Example) -> str:
    """A digest of an input: its pictures, its question and what else it says in plain words."""
    plain = {k: v for k, v in example.items() if isinstance(v, str | int | float | bool)}
    return f"{content_key(example)}/{sorted(plain.items(), key=lambda item: item[0])}"


def _check_apart(mapped: Pairs, aside: Pairs) -> None:
    """Refuse a reference that holds what is mapped."""
    if mapped.groups is not None and aside.groups is not None:
        both = set(mapped.groups) & set(aside.groups)
        if both:
            raise InputError(
                f"{len(both)} groups, the first is {sorted(map(str, both))[0]!r}, are both among "
                "the mapped pairs and the last ones, which are the reference; sort the file by "
                "group, or keep another number aside"
            )
    held = {_content(example) for example in (*aside.base, *aside.source)}
    for i, example in enumerate(mapped.base):
        if _content(example) in held:
            raise InputError(
                f"the input of pair {i} is also among the pairs that are kept aside as reference; "
                "leave one of them out"
            )


# ---- files --------------------------------------------------------------------------------------


def _rows(path: Path) -> list[dict[str, Any]]:
    if not path.is_file():
        raise InputError(
            f"there is no file {str(path)!r}; its path counts from the config's folder"
        )
    suffix = path.suffix.lower()
    if suffix == ".parquet":
        return _parquet(path)
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"{path.name} is not UTF-8 ({error.reason}); save it as UTF-8") from error
    return _csv(text, path.name) if suffix == ".csv" else _json(text, path.name)


def _csv(text: str, name: str) -> list[dict[str, Any]]:
    reader = csv.DictReader(io.StringIO(text, newline=""), strict=True)
    rows = []
    try:
        for number, raw in enumerate(reader, 1):
            if None in raw or None in raw.values():
                raise InputError(
                    f"row {number} of {name} does not have the {len(reader.fieldnames or ())} "
                    "fields of the header; put texts with commas into quotes"
                )
            rows.append(dict(raw))
    except csv.Error as error:
        raise InputError(
            f"{name} is not CSV ({brief(error)}, line {reader.reader.line_num})"
        ) from error
    return rows


def _json(text: str, name: str) -> list[dict[str, Any]]:
    try:
        rows = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{name} is no JSON ({brief(error)}); write a list of objects") from error
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise InputError(f"{name} holds no list of objects; write [{{...}}, {{...}}]")
    return rows


def _parquet(path: Path) -> list[dict[str, Any]]:
    try:
        parquet = import_module("pyarrow.parquet")
    except ImportError as error:
        raise InputError(
            f"{path.name} needs pyarrow, which is not installed: pip install pyarrow; or save it "
            "as .csv or .jsonl"
        ) from error
    try:
        rows: list[dict[str, Any]] = parquet.read_table(path).to_pylist()
    except (OSError, ValueError) as error:  # pyarrow's errors are of these
        raise InputError(f"{path.name} is no Parquet file ({brief(error)})") from error
    return rows


def _beside(images: Any, folder: Path) -> Any:
    """Paths of pictures, from the folder of their file; the rest as it is."""
    if isinstance(images, list | tuple):
        return [_path(each, folder) for each in images]
    return _path(images, folder)


def _path(image: Any, folder: Path) -> Any:
    if isinstance(image, str):
        return str(folder / image) if image else None
    return image
