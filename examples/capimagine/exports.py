"""Write chains for other trainers: a folder of its own, with copies of the pictures.

trl       `train.jsonl` with the columns images, prompt and completion of TRL's vision path; if any
          reply shows pictures, messages stands for the last two
sharegpt  `train.json` and `dataset_info.json` for LLaMA-Factory
swift     `train.jsonl` for ms-swift

These trainers cannot be installed beside the versions this library is tested with, so the files
follow their documentation, and were not tried in them. Each record also has `id`, `subset` and
`answer`, which they leave alone.
"""

import hashlib
import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from examples.capimagine.chains import Chain, Part, Picture
from examples.capimagine.refused import Refusal, Refused

PLACE = "<image>"


def write_trl(chains: Sequence[Chain], out: Path) -> list[Refused]:
    """Write TRL's columns; gives the chains that were refused."""
    interleaved = any(isinstance(part, Picture) for chain in chains for part in chain.reply)

    def row(chain: Chain, images: dict[str, str]) -> dict[str, Any]:
        turns = _turns(chain)
        said = [{"role": r, "content": [_trl_part(p) for p in parts]} for r, parts in turns]
        if interleaved:
            return {"images": _shown(chain, images), "messages": said}
        return {"images": _shown(chain, images), "prompt": said[:-1], "completion": said[-1:]}

    rows, refused = _rows(chains, out, row, placeholders=False)
    _write_lines(rows, out / "train.jsonl")
    return refused


def write_sharegpt(chains: Sequence[Chain], out: Path) -> list[Refused]:
    """Write LLaMA-Factory's `conversations`; gives the chains that were refused."""

    def row(chain: Chain, images: dict[str, str]) -> dict[str, Any]:
        said = [
            {"from": {"user": "human", "assistant": "gpt"}[role], "value": _text(parts)}
            for role, parts in _turns(chain)
            if role != "system"
        ]
        return {
            "conversations": said,
            "system": chain.system,
            "images": _shown(chain, images),
        }

    rows, refused = _rows(chains, out, row)
    (out / "train.json").write_text(_json(rows, indent=1), encoding="utf-8")
    columns = {"messages": "conversations", "images": "images", "system": "system"}
    info = {"file_name": "train.json", "formatting": "sharegpt", "columns": columns}
    (out / "dataset_info.json").write_text(_json({"capimagine": info}, indent=1) + "\n")
    return refused


def write_swift(chains: Sequence[Chain], out: Path) -> list[Refused]:
    """Write ms-swift's `messages` with `<image>` for each picture; gives the refused chains."""

    def row(chain: Chain, images: dict[str, str]) -> dict[str, Any]:
        said = [{"role": role, "content": _text(parts)} for role, parts in _turns(chain)]
        return {"messages": said, "images": _shown(chain, images)}

    rows, refused = _rows(chains, out, row)
    _write_lines(rows, out / "train.jsonl")
    return refused


Writer = Callable[[Sequence[Chain], Path], list[Refused]]
EXPORTS: dict[str, Writer] = {
    "trl": write_trl,
    "sharegpt": write_sharegpt,
    "swift": write_swift,
}


def _rows(
    chains: Sequence[Chain],
    out: Path,
    row: Callable[[Chain, dict[str, str]], dict[str, Any]],
    *,
    placeholders: bool = True,
) -> tuple[list[dict[str, Any]], list[Refused]]:
    """A row of each chain that the format can hold, its pictures copied."""
    out.mkdir(parents=True, exist_ok=True)
    rows, refused = [], []
    for chain in chains:
        try:
            if placeholders and any(PLACE in part for part in _texts(chain)):
                reason = f"a text holds the word {PLACE}, which stands for a picture there"
                raise Refusal("word of the format", reason)
            images = {str(path): _copied(path, out) for path in _files(chain)}
        except Refusal as refusal:
            refused.append(refusal.of(chain.id))
            continue
        named = {"id": chain.id, "subset": chain.subset, "answer": chain.answer}
        rows.append({**named, **row(chain, images)})
    return rows, refused


def _copied(path: Path, out: Path) -> str:
    """Copy a picture under the name of its content; gives its path from the folder."""
    try:
        content = path.read_bytes()
        name = f"images/{hashlib.sha256(content).hexdigest()[:20]}{path.suffix.lower()}"
        if not (out / name).exists():
            (out / "images").mkdir(exist_ok=True)
            shutil.copyfile(path, out / name)
    except OSError as error:
        raise Refusal("missing picture", f"the picture cannot be copied: {error}") from error
    return name


def _turns(chain: Chain) -> list[tuple[str, Sequence[Part]]]:
    turns: list[tuple[str, Sequence[Part]]] = [("user", chain.prompt), ("assistant", chain.reply)]
    return [("system", (chain.system,)), *turns] if chain.system else turns


def _files(chain: Chain) -> list[Path]:
    return chain.pictures((*chain.prompt, *chain.reply))


def _shown(chain: Chain, images: dict[str, str]) -> list[str]:
    return [images[str(path)] for path in _files(chain)]


def _texts(chain: Chain) -> Iterator[str]:
    return (p for p in (chain.system, *chain.prompt, *chain.reply) if isinstance(p, str))


def _text(parts: Sequence[Part]) -> str:
    """The parts as one text; a line ends after each `<image>`, as these formats have it."""
    return "".join(f"{PLACE}\n" if isinstance(part, Picture) else part for part in parts)


def _trl_part(part: Part) -> dict[str, str | None]:
    if isinstance(part, Picture):
        return {"type": "image", "text": None}
    return {"type": "text", "text": part}


def _write_lines(rows: Sequence[dict[str, Any]], path: Path) -> None:
    path.write_text("".join(_json(row) + "\n" for row in rows), encoding="utf-8")


def _json(value: Any, indent: int | None = None) -> str:
    return json.dumps(value, ensure_ascii=False, indent=indent)
