"""A chain: what is asked, thought on the way, and answered. It passes through the whole recipe.

Saved, a chain is one line of JSON; its pictures are files beside it, named relative to that file.
"""

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from PIL import Image

from imaginelens.hooks.errors import brief

OPEN, CLOSE = "<think_image>", "</think_image>"


@dataclass(frozen=True)
class Picture:
    """A picture file, relative to the folder of the chains that show it."""

    path: str


Part = str | Picture


@dataclass(frozen=True, kw_only=True)
class Chain:
    """One example of reasoning about pictures.

    Attributes:
        id: unique within a file of chains.
        subset: the collection it is from, such as `Visual_CoT`.
        folder: where its pictures are.
        prompt: what the user shows and asks, pictures and texts in order.
        reply: what the assistant shows and says. Raw chains of latent models show pictures here;
            rewritten ones say `<think_image> ... </think_image>` instead.
        answer: the final answer alone, as it is scored.
        system: what the system prompt says, if there is one.

    >>> chain = Chain(id="1", subset="s", folder=Path("."), prompt=("red?",), reply=("no",),
    ...               answer="no")
    >>> chain.question
    'red?'
    """

    id: str
    subset: str
    folder: Path
    prompt: tuple[Part, ...]
    reply: tuple[Part, ...]
    answer: str
    system: str = ""

    @property
    def question(self) -> str:
        """The words of the prompt, without its pictures."""
        return "\n".join(part for part in self.prompt if isinstance(part, str))

    @property
    def imagined(self) -> tuple[str, ...]:
        """The texts between the markers of the reply, in order."""
        said = "".join(part for part in self.reply if isinstance(part, str))
        return tuple(rest.split(CLOSE)[0].strip() for rest in said.split(OPEN)[1:])

    def pictures(self, parts: Iterable[Part]) -> list[Path]:
        """The files of the pictures among some parts, the prompt's or the reply's."""
        return [self.folder / part.path for part in parts if isinstance(part, Picture)]

    def messages(self, *, reply: bool = True) -> list[dict[str, Any]]:
        """The chat as chat templates take it; without the reply, what a model is asked."""
        turns: list[tuple[str, tuple[Part, ...]]] = []
        turns += [("system", (self.system,))] if self.system else []
        turns += [("user", self.prompt), *([("assistant", self.reply)] if reply else [])]
        return [{"role": role, "content": [_content(p) for p in parts]} for role, parts in turns]

    def example(self) -> dict[str, Any]:
        """The prompt as `lens.run` takes it: the pictures and the question."""
        return {
            "images": [open_picture(p) for p in self.pictures(self.prompt)],
            "text": self.question,
        }


def open_picture(path: Path) -> Image.Image:
    """Read a picture file whole, as RGB, and close it."""
    with Image.open(path) as picture:
        return picture.convert("RGB")


def save(chains: Iterable[Chain], path: Path) -> int:
    """Write chains as JSON lines, whole or not at all; gives how many.

    Pictures are not copied: they are named relative to the folder of `path`, or in full where they
    are outside of it.
    """
    part = path.with_suffix(path.suffix + ".part")
    path.parent.mkdir(parents=True, exist_ok=True)
    count = 0
    with part.open("w", encoding="utf-8") as lines:
        for count, chain in enumerate(chains, 1):  # noqa: B007
            moved = _moved(chain, path.parent)
            record = {
                "id": moved.id,
                "subset": moved.subset,
                "system": moved.system,
                "prompt": [_content(p) for p in moved.prompt],
                "reply": [_content(p) for p in moved.reply],
                "answer": moved.answer,
            }
            lines.write(json.dumps(record, ensure_ascii=False) + "\n")
    part.replace(path)
    return count


def load(path: Path) -> list[Chain]:
    """Read what `save` wrote.

    Raises:
        ValueError: a line is no chain; says which, and what is wrong with it.
    """
    return list(_read(path))


def _read(path: Path) -> Iterator[Chain]:
    # not splitlines(), which also breaks at characters that JSON leaves as they are
    for number, line in enumerate(
        path.read_text(encoding="utf-8").removesuffix("\n").split("\n"), 1
    ):
        try:
            record = json.loads(line)
            yield Chain(
                id=record["id"],
                subset=record["subset"],
                folder=path.parent,
                prompt=tuple(_part(p) for p in record["prompt"]),
                reply=tuple(_part(p) for p in record["reply"]),
                answer=record["answer"],
                system=record.get("system", ""),
            )
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise ValueError(
                f"line {number} of {path.name} is no chain ({type(error).__name__}: "
                f"{brief(error)}); write such files with examples.capimagine.data"
            ) from error


def _moved(chain: Chain, folder: Path) -> Chain:
    """The same chain with its pictures named from another folder."""
    here, there = chain.folder.resolve(), folder.resolve()
    if here == there:
        return chain

    def named(part: Part) -> Part:
        if isinstance(part, str):
            return part
        whole = here / part.path
        return Picture(str(whole.relative_to(there) if whole.is_relative_to(there) else whole))

    return replace(
        chain,
        folder=there,
        prompt=tuple(map(named, chain.prompt)),
        reply=tuple(map(named, chain.reply)),
    )


def _content(part: Part) -> dict[str, str]:
    if isinstance(part, str):
        return {"type": "text", "text": part}
    return {"type": "image", "image": part.path}


def _part(content: dict[str, str]) -> Part:
    if content["type"] == "image":
        return Picture(content["image"])
    if content["type"] != "text":
        raise ValueError(f"a part is {content['type']!r}, not text or image")
    return content["text"]
