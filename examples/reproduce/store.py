"""Results on disk: each is kept at once, and not measured again while its key is the same."""

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from examples.reproduce.exhibit import Cell, Columns, Drawing, Measured, Number
from imaginelens.hooks.errors import InputError

FORM = 2  # of what is kept; another one is measured again


@dataclass(frozen=True)
class Kept:
    """A result with what its column is headed by, and the key it was measured under."""

    heading: str
    measured: Measured
    key: dict[str, Any]


@dataclass(frozen=True)
class Store:
    """A folder of results, `EXHIBIT/SUBJECT.json` each, with its figures beside it."""

    folder: Path

    def save(self, exhibit: str, subject: str, kept: Kept) -> Path:
        """Write a result, whole or not at all; its figures first."""
        place = self.folder / exhibit
        place.mkdir(parents=True, exist_ok=True)
        found, figures = kept.measured, list[dict[str, str]]()
        for drawing in found.figures:
            name = f"{subject}-{drawing.name}"
            _write(place / f"{name}.svg", drawing.svg.encode())
            if drawing.png:
                _write(place / f"{name}.png", drawing.png)
            figures.append({"name": drawing.name, "caption": drawing.caption, "alt": drawing.alt})
        record = {
            "heading": kept.heading, "key": kept.key, "columns": _plain(found.columns),
            "says": list(found.says), "facts": found.facts, "figures": figures, "n": found.n,
            "seed": found.seed, "seconds": round(found.seconds, 2),
        }  # fmt: skip
        path = place / f"{subject}.json"
        _write(path, json.dumps(record, indent=1, ensure_ascii=False, default=float).encode())
        return path

    def read(self, exhibit: str, subject: str) -> Kept | None:
        """What was kept of a subject; None if there is nothing.

        Raises:
            InputError: the file is there and is no such result.
        """
        path = self.folder / exhibit / f"{subject}.json"
        if not path.is_file():
            return None
        try:
            record = json.loads(path.read_text(encoding="utf-8"))
            figures = tuple(
                Drawing(**told, svg=(path.parent / f"{subject}-{told['name']}.svg").read_text(
                    encoding="utf-8"))
                for told in record["figures"]
            )  # fmt: skip
            measured = Measured(
                _read(record["columns"]), tuple(record["says"]), figures, record["facts"],
                record["n"], record["seed"], record["seconds"],
            )  # fmt: skip
            return Kept(record["heading"], measured, record["key"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise InputError(
                f"{path} is no result ({type(error).__name__}: {error}); delete it, or pass --fresh"
            ) from error

    def subjects(self, exhibit: str) -> list[str]:
        """Whose results there are, in the order of their names."""
        return sorted(path.stem for path in (self.folder / exhibit).glob("*.json"))


def _plain(columns: Columns) -> dict[str, dict[str, Any]]:
    return {
        column: {row: _cell(cell) for row, cell in cells.items()}
        for column, cells in columns.items()
    }


def _cell(cell: Cell) -> Any:
    """A cell as JSON has it, which knows no nan."""
    if isinstance(cell, str):
        return cell
    numbers = (cell.value, cell.low, cell.high)
    return [*(None if math.isnan(v) else float(v) for v in numbers), int(cell.n)]


def _read(columns: dict[str, dict[str, Any]]) -> Columns:
    def cell(found: Any) -> Cell:
        if isinstance(found, str):
            return found
        value, low, high = (math.nan if v is None else float(v) for v in found[:3])
        return Number(value, low, high, found[3])

    return {
        column: {row: cell(found) for row, found in cells.items()}
        for column, cells in columns.items()
    }


def _write(path: Path, data: bytes) -> None:
    part = path.with_name(f".{path.name}.part")
    part.write_bytes(data)
    part.replace(path)
