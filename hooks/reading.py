"""Rows of data in files and datasets, read as examples with their answers and groups."""

import csv
import io
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

from PIL import Image, ImageOps, UnidentifiedImageError

from imaginelens.hooks.errors import InputError, brief, quoted
from imaginelens.hooks.inputs import pictures_key, pictures_of

TEXTS = ("text", "question")
HISTORY = "imaginelens_history"  # what was done to saved pairs
METADATA = ("metadata.jsonl", "metadata.csv")
BESIDE = "imaginelens_source"  # where a row's source is put together, of columns beside the base's
_NAMED = 8  # refused rows that an error names by number


@dataclass(frozen=True)
class Columns:
    """Under which keys a row holds what: the pictures, the question, the answer and so on.

    Attributes:
        text: the first of "text" and "question" that a row has, if None.
        group: "image" groups rows by the content of their pictures; None takes "group" if it is
            there.
        source: an object with the source's pictures, question and answer, if a row has it.
    """

    images: str
    text: str | None = None
    answer: str = "answer"
    group: str | None = None
    source: str | None = None

    def text_in(self, raw: Mapping[str, Any]) -> str:
        """The key of a row's question."""
        if self.text is not None:
            return self.text
        return next((key for key in TEXTS if key in raw), TEXTS[0])


@dataclass(frozen=True)
class Row:
    """One row as it was read; `where` names it in errors."""

    where: str
    example: dict[str, Any]
    answer: str | None
    group: Any = None
    source: "Row | None" = None
    history: tuple[str, ...] = ()


def read_row(raw: Mapping[str, Any], columns: Columns, folder: Path, where: str) -> Row:
    """Read one row; paths of pictures count from `folder`. Other columns come along as they are.

    Raises:
        InputError: a key is missing, a value has the wrong type, or a picture cannot be opened.
    """
    row = _read_example(raw, columns, folder, where)
    if row.answer is None:
        raise InputError(_missing(columns.answer, raw, where))
    group = raw.get(columns.group or "group")
    if columns.group == "image":
        if not pictures_of(row.example):
            raise InputError(f"{where} has no picture to group by; leave it out, or give group ids")
        group = pictures_key(row.example)
    elif columns.group is not None and group is None:
        raise InputError(_missing(columns.group, raw, where))
    source = raw.get(columns.source) if columns.source is not None else None
    if source is None:
        return replace(row, group=group)
    if not isinstance(source, Mapping):
        raise InputError(
            f"{where} has {quoted(source)} under {columns.source!r}, expected an object with the "
            "source's images, text and answer; pass source=None if it is something else"
        )
    other = _read_example(source, columns, folder, f"the source in {where}")
    return replace(row, group=group, source=other)


def read_rows(
    found: Iterable[tuple[str, dict[str, Any]]], columns: Columns, folder: Path
) -> list[Row]:
    """Read all rows, or say of all that cannot be read which they are, and why the first cannot.

    Raises:
        InputError: as `read_row`; or a row of a dataset has one answer on both sides.
    """
    rows, refused = [], list[tuple[str, InputError]]()
    for where, raw in found:
        try:
            row = read_row(raw, columns, folder, where)
            if columns.source == BESIDE:
                _check_sides(row)
            rows.append(row)
        except InputError as error:
            refused.append((where, error))
    if not refused:
        return rows
    first = refused[0][1]
    if len(refused) == 1:
        raise first
    others = ", ".join(where for where, _ in refused[1:_NAMED]) + ", ..." * (len(refused) > _NAMED)
    raise InputError(
        f"{first} ({len(refused)} of {len(refused) + len(rows)} rows are refused; also {others})"
    ) from first


def _check_sides(row: Row) -> None:
    """Refuse a row that brings its source, if no swap could be told from none."""
    if row.source is None or row.source.answer is None or row.answer is None:
        return
    if row.answer.strip().casefold() == row.source.answer.strip().casefold():
        raise InputError(
            f"{row.where} has the answer {quoted(row.answer)} on both sides, so no swap can be "
            "told from none; leave it out"
        )


def sources_beside(
    found: Iterable[tuple[str, dict[str, Any]]], columns: Columns, source: Mapping[str, str]
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Rows whose source stands in columns of its own beside the base's, with the source put
    together under one key; what `source` does not name is shared.

    Raises:
        InputError: `source` names no column, another part than images, text and answer, or a column
            that a row does not have.
    """
    parts = {"images": columns.images, "text": columns.text, "answer": columns.answer}
    odd = sorted(set(source) - set(parts))
    if odd or not source:
        raise InputError(
            f"source names {odd or 'nothing'}, expected columns for some of {', '.join(parts)}"
        )
    for where, raw in found:
        missing = [key for key in source.values() if key not in raw]
        if missing:
            raise InputError(_missing(missing[0], raw, where))
        theirs = {own: raw[source.get(part, own)] for part, own in parts.items() if own in raw}
        rest = {key: value for key, value in raw.items() if key not in source.values()}
        shared = {own: raw[own] for own in parts.values() if own in raw}
        yield where, {**rest, **shared, BESIDE: theirs}


def _read_example(raw: Mapping[str, Any], columns: Columns, folder: Path, where: str) -> Row:
    used = (columns.images, columns.text_in(raw), columns.answer)
    for key in used[:2]:
        if key not in raw:
            raise InputError(_missing(key, raw, where))
    images, text, answer = (raw.get(key) for key in used)
    for key, value in zip(used[1:], (text, answer), strict=True):
        if not isinstance(value, str) and not (value is None and key == columns.answer):
            raise InputError(
                f"{where} has {quoted(value)} under {key!r}, expected text; convert it with "
                "str(...)"
            )
    left_out = {*used, columns.source, HISTORY, *({"group"} if columns.group is None else ())}
    others = {key: value for key, value in raw.items() if key not in left_out}
    example = {**others, "images": _open_all(images, folder, where), "text": text}
    return Row(where, example, answer, history=tuple(raw.get(HISTORY, ())))


def _missing(key: str, raw: Mapping[str, Any], where: str) -> str:
    return (
        f"{where} has no {key!r}, only {brief(sorted(map(str, raw)))}; add it, or say which key "
        "holds it"
    )


# ---- pictures --------------------------------------------------------------------------------


def _open_all(images: Any, folder: Path, where: str) -> Any:
    if images is None:
        return None
    if isinstance(images, list | tuple):
        return [_open(image, folder, where) for image in images]
    return _open(images, folder, where)


def _open(image: Any, folder: Path, where: str) -> Image.Image:
    """A picture in RGB, read to its end: from memory, a path, or a dataset's undecoded dict."""
    if isinstance(image, Mapping) and ("bytes" in image or "path" in image):
        image = image.get("path") if image.get("bytes") is None else image["bytes"]
    name = repr(image)[:60] if isinstance(image, str | Path) else "given"
    try:
        match image:
            case Image.Image():
                return image.convert("RGB")
            case bytes():
                return _upright(io.BytesIO(image))
            case str() | Path():
                return _upright(folder / image)
    except (FileNotFoundError, IsADirectoryError):
        raise InputError(
            f"{where} names the image {name}, and there is no such file in {str(folder)!r}; give "
            "its path from there"
        ) from None
    except UnidentifiedImageError as error:
        raise InputError(
            f"the image {name} of {where} is in no format that Pillow reads"
        ) from error
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise InputError(
            f"the image {name} of {where} cannot be decoded ({brief(error)}); check that it is "
            "complete"
        ) from error
    raise InputError(
        f"{where} has an image that is a {type(image).__name__}, expected a path or a PIL image"
    )


def _upright(file: Path | io.BytesIO) -> Image.Image:
    """As viewers show it: turned where a camera has noted that it was held on its side."""
    with Image.open(file) as opened:
        return ImageOps.exif_transpose(opened).convert("RGB")


# ---- files and datasets ----------------------------------------------------------------------


def jsonl_rows(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """The objects in a file of JSON lines, each with the words that name it; empty lines are none.

    Raises:
        InputError: the file is missing, or a line is no JSON object.
    """
    for number, line in enumerate(_text(path).split("\n"), start=1):
        if not line.strip():
            continue
        where = f"line {number} of {path.name}"
        try:
            raw = json.loads(line)
        except (ValueError, RecursionError) as error:
            why = brief(error)
            if isinstance(error, json.JSONDecodeError):
                why = f"{error.msg}, column {error.colno}"
            raise InputError(f"{where} is no JSON ({why}); write one object per line") from error
        if not isinstance(raw, dict):
            raise InputError(f"{where} is {str(raw)[:60]!r}, expected an object {{...}}")
        yield where, raw


def folder_rows(folder: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """The rows of an image folder's metadata.jsonl or metadata.csv, their pictures under "images".

    Raises:
        InputError: there is none of the two files, or both, or a row names no file.
    """
    found = [name for name in METADATA if (folder / name).is_file()]
    if len(found) != 1:
        raise InputError(
            f"{str(folder)!r} has {' and '.join(found) or 'neither metadata.jsonl nor .csv'}; it "
            "must have one of them, with a column file_name"
        )
    path = folder / found[0]
    for where, raw in jsonl_rows(path) if path.suffix == ".jsonl" else _csv_rows(path):
        names = [key for key in ("file_name", "file_names") if raw.get(key) is not None]
        if not names:
            raise InputError(_missing("file_name", raw, where))
        yield where, {**raw, "images": raw[names[0]]}


def _csv_rows(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    reader = csv.DictReader(io.StringIO(_text(path), newline=""), strict=True)
    try:
        for number, raw in enumerate(reader, start=1):
            where = f"row {number} of {path.name}"
            if None in raw or None in raw.values():
                raise InputError(
                    f"{where} does not have the {len(reader.fieldnames or ())} fields of the "
                    "header; put texts with commas into quotes"
                )
            yield where, dict(raw)
    except csv.Error as error:
        raise InputError(
            f"{path.name} is not CSV ({brief(error)}, line {reader.reader.line_num})"
        ) from error


def dataset_rows(dataset: Any, limit: int | None) -> Iterator[tuple[str, dict[str, Any]]]:
    """The first `limit` rows of a dataset, or all; of a stream only with a limit.

    Raises:
        InputError: it is no dataset of rows, or has no end that is known.
    """
    if limit is not None and limit < 1:
        raise InputError(f"limit={limit} asks for no rows; give 1 or more, or None for all")
    for number, raw in enumerate(_taken(dataset, limit)):
        where = f"row {number} of the dataset"
        if not isinstance(raw, Mapping):
            raise InputError(
                f"{where} is a {type(raw).__name__}, expected a mapping of columns; open the "
                "dataset first, as with datasets.load_dataset(name, split=...)"
            )
        yield where, dict(raw)


def _taken(dataset: Any, limit: int | None) -> Iterable[Any]:
    kind = type(dataset).__name__
    if isinstance(dataset, Mapping):
        names = [str(name) for name in dataset]
        raise InputError(f"a {kind} of {names} is not one dataset; choose one of its splits")
    if hasattr(dataset, "__len__") and hasattr(dataset, "__getitem__"):
        n = len(dataset) if limit is None else min(limit, len(dataset))
        return _by_number(dataset, n)
    if not isinstance(dataset, Iterable):
        raise InputError(f"a {kind} has no rows; give a dataset, or a list of dicts")
    if limit is None:
        raise InputError(f"a {kind} has no length and may never end; pass limit=...")
    return islice(dataset, limit)


def _by_number(dataset: Any, n: int) -> Iterator[Any]:
    for number in range(n):
        try:
            row = dataset[number]
        except KeyError as error:  # a table that is indexed by column
            raise InputError(
                f"a {type(dataset).__name__} gives no row for the number {number}; give a list of "
                "dicts, as df.to_dict('records') makes"
            ) from error
        yield row


def _text(path: Path) -> str:
    if not path.is_file():
        raise InputError(f"there is no file {str(path)!r}; check the path")
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"{path.name} is not UTF-8 ({error.reason}); save it as UTF-8") from error


# ---- rows that belong together ---------------------------------------------------------------


def pair_up(rows: Sequence[Row], key: str) -> list[Row]:
    """Make one row of every two that have the same value under `key`: base first, then source.

    Raises:
        InputError: a row lacks the key, has a source already, or a value is not there twice.
    """
    found: dict[Any, list[Row]] = {}
    for row in rows:
        if not isinstance(row.example.get(key), str | int):
            raise InputError(
                f"{row.where} has {quoted(row.example.get(key))} under {key!r}, expected the name "
                "of its pair"
            )
        if row.source is not None:
            raise InputError(f"{row.where} brings its own source; leave out pair={key!r}")
        found.setdefault(row.example[key], []).append(row)
    for value, members in found.items():
        if len(members) != 2:
            lines = ", ".join(row.where for row in members[:3])
            raise InputError(
                f"the pair {quoted(value)} has {len(members)} rows ({lines}), expected 2: the "
                "base, then the source"
            )
    return [replace(base, source=source) for base, source in found.values()]


def check_alike(rows: Sequence[Row]) -> None:
    """Refuse rows of which some have a source, or a group, and others have none.

    Raises:
        InputError: there are no rows, or they differ in what they have.
    """
    if not rows:
        raise InputError("there are no rows to read; give at least one")
    for what in ("source", "group"):
        having = [getattr(row, what) is not None for row in rows]
        if any(having) and not all(having):
            raise InputError(
                f"{rows[having.index(False)].where} has no {what} and "
                f"{rows[having.index(True)].where} has one; give it to all rows or to none"
            )
    histories = {row.history for row in rows}
    if len(histories) > 1:
        raise InputError(
            f"the rows have {len(histories)} different histories under {HISTORY!r}; save pairs "
            "that were made differently in files of their own"
        )
