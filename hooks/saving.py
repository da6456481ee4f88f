"""Pairs on disk: one JSON line for each pair, and its pictures as PNG files, without loss."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from imaginelens.hooks.appearing import alone, appearing
from imaginelens.hooks.errors import InputError
from imaginelens.hooks.inputs import Example, pictures_key, pictures_of
from imaginelens.hooks.reading import HISTORY

if TYPE_CHECKING:
    from imaginelens.hooks.pairs import Pairs

NAME = "pairs.jsonl"
RESERVED = ("answer", "group", "source", HISTORY)


def save_jsonl(pairs: "Pairs", folder: Path) -> Path:
    """Write pairs into a folder, which must not have any yet; returns the path of the lines."""
    path = folder / NAME
    if path.exists():
        raise InputError(f"{str(path)!r} is there already; choose another folder")
    if pairs.hypotheses:
        raise InputError(
            f"the hypotheses {', '.join(pairs.hypotheses)} are functions, which cannot be saved; "
            "leave them out with dataclasses.replace(pairs, hypotheses={})"
        )
    lines = [_line(pairs, i) for i in range(len(pairs))]  # all checked before anything is written
    with alone(folder, proof=NAME):
        for example in (*pairs.base, *pairs.source):
            _save_pictures(example, folder)
        with appearing(path) as partial:  # last, so that what it names is there
            partial.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    return path


def _line(pairs: "Pairs", i: int) -> str:
    raw = {
        **_raw(pairs.base[i], pairs.base_answers[i], f"base {i}"),
        "source": _raw(pairs.source[i], pairs.source_answers[i], f"source {i}"),
    }
    if pairs.groups is not None:
        raw["group"] = _plain(pairs.groups[i])
    if pairs.history:
        raw[HISTORY] = list(pairs.history)
    for key, value in [*raw.items(), *raw["source"].items()]:
        try:
            same = json.loads(json.dumps(value)) == value
        except (TypeError, ValueError):
            same = False
        if not same:
            raise InputError(
                f"pair {i} has a {type(value).__name__} under {key!r}, which JSON cannot hold as "
                "it is; save the pairs without it"
            )
    return json.dumps(raw, ensure_ascii=False)


def _raw(example: Example, answer: str | None, where: str) -> dict[str, Any]:
    taken = [key for key in RESERVED if key in example]
    if taken:
        raise InputError(
            f"{where} has {taken[0]!r} among its own keys, where the file keeps something else; "
            "rename it"
        )
    others = {key: _plain(value) for key, value in example.items()}
    return {**others, "images": _names(example), "answer": answer}


def _names(example: Example) -> Any:
    """Where the pictures lie: named by their content, so that each is there once."""
    images = example.get("images")
    listed = isinstance(images, list | tuple)
    names = [f"images/{pictures_key({'images': p})}.png" for p in pictures_of(example)]
    return names if listed else names[0] if names else None


def _save_pictures(example: Example, folder: Path) -> None:
    names = _names(example)
    listed = names if isinstance(names, list) else [] if names is None else [names]
    for name, picture in zip(listed, pictures_of(example), strict=True):
        path = folder / name
        path.parent.mkdir(exist_ok=True)
        if not path.exists():
            with appearing(path) as partial:
                picture.save(partial, "PNG")


def _plain(value: Any) -> Any:
    return value.item() if isinstance(value, np.generic) else value
