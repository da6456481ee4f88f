"""Checkpoints of the paper's families with known mechanisms, and configs that name them.

An organism's weights in a folder with a family's tokens: only the weights differ from a release.
"""

import json
import shutil
from pathlib import Path
from typing import Any

import imaginelens as il
from imaginelens.organisms.checkpoint import LATENT, folder

CONFIGS = Path(__file__).parents[2] / "examples" / "reproduce" / "configs"


def checkpoint(organism: str, family: str, to: Path) -> Path:
    """An organism under the tokens of a family, and without what names it as one of ours."""
    shutil.copytree(folder(organism), to)
    (to / "card.json").unlink()
    spec = il.FAMILIES[family]
    strings = getattr(spec, "strings", LATENT)  # words have their own markers already
    for file in to.glob("*.json"):
        text = file.read_text()
        for ours, theirs in zip(LATENT, strings, strict=True):
            text = text.replace(json.dumps(ours)[1:-1], json.dumps(theirs)[1:-1])
        file.write_text(text)
    config = json.loads((to / "config.json").read_text())
    kept = {k: v for k, v in config.items() if not k.startswith(("latent_", "imaginelens"))}
    (to / "config.json").write_text(json.dumps(kept))
    return to


def benchmark(to: Path, *, n: int, seed: int = 0, split: str = "") -> Path:
    """A benchmark's folder: pictures, and questions.jsonl."""
    to.mkdir(parents=True)
    base = il.load("latent-content").task(n=n, seed=seed).base
    lines = []
    for i, example in enumerate(base):
        example["images"].save(to / f"{i}.png")
        line = {"images": f"{i}.png", "text": example["text"], "answer": example["hunt"].answer}
        lines.append(line | ({"split": split} if split else {}))
    (to / "questions.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return to


def derived(folder: Path) -> Path:
    """The questions of a folder as derived ones, with options."""
    shapes = ["circle", "square", "triangle", "cross", "ring", "bar"]
    file = folder / "derived.jsonl"
    lines = [json.loads(line) for line in (folder / "questions.jsonl").read_text().splitlines()]
    made = [{**line, "probe": line["text"], "options": shapes} for line in lines]
    file.write_text("".join(json.dumps(line) + "\n" for line in made))
    return file


def config(shipped: str, to: Path, *, data: dict[str, Path], **changes: Any) -> Path:
    """A shipped config with other weights, data and sizes; all other lines as they are."""
    lines, section = [], ""
    for line in (CONFIGS / shipped).read_text().splitlines():
        key = line.split("=")[0].strip()
        if line.startswith("["):
            section = line.strip("[] ").split("]")[0]
            lines.append(line)
            if section == "data":
                lines += [f"{name} = {json.dumps(str(path))}" for name, path in data.items()]
        elif section == "data" and "=" in line:
            continue
        elif f"{section}.{key}" in changes:
            lines.append(f"{key} = {json.dumps(changes[f'{section}.{key}'])}")
        else:
            lines.append(line)
    to.write_text("\n".join(lines) + "\n")
    return to
