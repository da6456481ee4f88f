"""Erasers and maps of probes on the Hub: what their `save` writes, with a card."""

from pathlib import Path
from typing import Any

from imaginelens.hooks import hub

ERASER = ("eraser.safetensors", "eraser.json", hub.CARD)
MAP = ("map.safetensors", "map.json", hub.CARD)


def push(
    found: Any,
    repo_id: str,
    *,
    tags: tuple[str, ...],
    told: str,
    private: bool,
    token: str | None,
    license: str | None,
) -> hub.Address:
    """Put an `Eraser` or a `ProbeMap` on the Hub, as a repository of models; returns its address.

    Args:
        told: what a reader of the card must know.
    """
    name = type(found).__name__
    numbers = "\n".join(f"    {line}" for line in repr(found).splitlines())

    def put(folder: Path) -> None:
        found.save(folder)
        (folder / hub.CARD).write_text(
            f"""{hub.header(tags=tags, license=license)}

# {name}

{numbers}

{told}

```python
import imaginelens as il

found = il.probes.{name}.load("REPOSITORY_OR_FOLDER")
```
""",
            encoding="utf-8",
        )

    message = f"{name}, with imaginelens"
    return hub.upload(put, repo_id, message=message, private=private, token=token)
