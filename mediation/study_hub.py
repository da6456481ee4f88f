"""The folder of a study on the Hub: its maps, tables and report, without its unmerged parts."""

import shutil
from pathlib import Path

from imaginelens.hooks import hub
from imaginelens.hooks.errors import CheckpointError
from imaginelens.mediation.map_store import MANIFEST
from imaginelens.mediation.run_study import CHUNKS

KINDS = (".json", ".csv", ".safetensors", ".toml", ".md", ".html", ".png", ".svg")


def push_study(
    folder: str | Path,
    repo_id: str,
    *,
    private: bool = False,
    token: str | None = None,
    license: str | None = None,
) -> hub.Address:
    """Put the folder that `imaginelens study` wrote on the Hugging Face Hub, as a dataset.

    Only safetensors, JSON, tables, texts and pictures are put there, and no parts of maps that are
    merged beside them. Returns the address.

    Args:
        license: the Hub's word for it, such as "cc-by-4.0"; the card names none if left out.

    Raises:
        CheckpointError: it is no folder of a finished study, holds a file of another kind, the Hub
            cannot be reached, or one may not write there.
    """
    home = Path(folder)
    files = _files(home)
    maps = sorted(
        {path.parent.relative_to(home).as_posix() for path in files if path.name == MANIFEST}
    )
    if not maps:
        raise CheckpointError(
            f"{home!s} holds no map of a finished study; finish it with --resume, or give the "
            "folder that imaginelens study wrote"
        )

    def put(target: Path) -> None:
        for path in files:
            copied = target / path.relative_to(home)
            copied.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, copied)
        (target / hub.CARD).write_text(_card(maps, license), encoding="utf-8")

    return hub.upload(
        put,
        repo_id,
        message=f"Study of {len(maps)} maps, with imaginelens",
        private=private,
        token=token,
        repo_type="dataset",
    )


def fetch_study(name: str | Path, *, revision: str | None = None) -> Path:
    """The folder of a study that was put on the Hub: `il.EffectMap.load(folder / "layers")` reads a
    map of it. Its own name is the commit.

    Raises:
        CheckpointError: there is none, or the Hub cannot be reached and has not been asked before.
    """
    files = [f"*{kind}" for kind in KINDS]
    folder, origin = hub.fetch(name, revision=revision, files=files, repo_type="dataset")
    return folder if origin is None else hub.plain_files(folder)


def _files(home: Path) -> list[Path]:
    """What is put on the Hub, of a kind that runs no code."""
    if not home.is_dir():
        raise CheckpointError(f"there is no folder {home!s}; give the one that a study wrote")
    found = [
        path
        for path in sorted(home.rglob("*"))
        if path.is_file() and CHUNKS not in path.relative_to(home).parts[:-1]
    ]
    odd = [path for path in found if path.is_symlink() or path.suffix not in KINDS]
    if odd:
        raise CheckpointError(
            f"{home!s} holds {odd[0].relative_to(home).as_posix()!r}, which no study writes and "
            "which is not put on the Hub; move it elsewhere"
        )
    return found


def _card(maps: list[str], license: str | None) -> str:
    names = "\n".join(f"- `{name}`" for name in maps)
    first = maps[0]
    return f"""{hub.header(tags=("causal-mediation", "activation-patching"), license=license)}

# A study of causal effects

Its maps:

{names}

## Use

```python
import imaginelens as il
from imaginelens.mediation.study_hub import fetch_study

folder = fetch_study("REPOSITORY")
il.EffectMap.load(folder / {first!r}).plot()
```
"""
