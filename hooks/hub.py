"""Folders put on the Hugging Face Hub, and taken from it at one commit that is remembered.

Only safetensors, JSON, CSV and cards are put there and taken from there: nothing that runs code.
"""

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal, TypeVar

from imaginelens.hooks.errors import CheckpointError

RepoType = Literal["model", "dataset"]
T = TypeVar("T")
CARD = "README.md"
_COMMIT = re.compile("[0-9a-f]{40}")
_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")


class Address(str):
    """The address of a repository, as text; `.revision` is the commit that was made."""

    revision: str = ""


@dataclass(frozen=True)
class Origin:
    """Where on the Hub something was read from; `revision` is the commit, not a branch."""

    repo_id: str
    repo_type: RepoType
    revision: str

    def __str__(self) -> str:
        return f"{self.repo_id} at {self.revision[:8]}"


def hub_origin(found: Any) -> Origin | None:
    """Where something was read from: repository and commit; None if it was not from the Hub.

    What is made of it, by `dataclasses.replace` or a method, is something else and has none.

    >>> hub_origin("no result") is None
    True
    """
    return getattr(found, "_hub_origin", None)


def remembered(found: T, origin: Origin | None) -> T:
    """The same object, which now knows where it was read from."""
    if origin is not None:
        object.__setattr__(found, "_hub_origin", origin)
    return found


def upload(
    save: Callable[[Path], Any],
    repo_id: str,
    *,
    message: str,
    private: bool,
    token: str | None,
    repo_type: RepoType = "model",
) -> Address:
    """Create the repository if it is not there, put in what `save` writes, return its address.

    Raises:
        CheckpointError: the Hub cannot be reached, the id is none, or one may not write there.
    """
    from huggingface_hub import HfApi

    with TemporaryDirectory() as folder:
        save(Path(folder))  # first, so that what cannot be saved leaves no empty repository
        try:
            api = HfApi(token=token)
            url = api.create_repo(repo_id, repo_type=repo_type, private=private, exist_ok=True)
            made = api.upload_folder(
                repo_id=repo_id, folder_path=folder, commit_message=message, repo_type=repo_type
            )
        except _errors() as error:
            raise CheckpointError(
                f"{repo_id!r} was not put on the Hub: {_why(error, repo_id, None)}"
            ) from error
    address = Address(url)
    address.revision = str(getattr(made, "oid", ""))
    return address


def fetch(
    name: str | Path,
    *,
    revision: str | None,
    files: Sequence[str],
    repo_type: RepoType = "model",
) -> tuple[Path, Origin | None]:
    """The folder of this name, if there is one, or else the repository's, and where it is from.

    Args:
        revision: a branch, tag or commit; the newest if None. The origin has the commit.
        files: patterns of what is taken.

    Raises:
        CheckpointError: there is neither, a revision is asked of a folder, or the Hub cannot be
            reached and has not been asked before.
    """
    path = Path(name)
    if path.is_dir():
        if revision is not None:
            raise CheckpointError(
                f"{str(name)!r} is a folder here, and folders have no revision {revision!r}; leave "
                "it out, or rename the folder if you meant the Hub's repository"
            )
        return path, None
    if isinstance(name, Path):  # a folder was meant: its reader says what should be there
        return path, None
    if not _ID.fullmatch(name):
        raise CheckpointError(
            f"there is no folder {str(name)!r}, and the Hub has ids of the form 'owner/name'; give "
            "a folder that .save() wrote, or a repository's id"
        )
    from huggingface_hub import snapshot_download

    try:
        found = snapshot_download(
            str(name), repo_type=repo_type, revision=revision, allow_patterns=[*files]
        )
    except _errors() as error:
        raise CheckpointError(
            f"there is no folder {str(name)!r}, and the Hub gave none of that name "
            f"({_why(error, str(name), revision)}); give a folder that .save() wrote, or a "
            "repository's id"
        ) from error
    folder = Path(found)
    commit = folder.name if _COMMIT.fullmatch(folder.name) else (revision or "")
    return folder, Origin(str(name), repo_type, commit)


def plain_files(folder: Path) -> Path:
    """A snapshot, whose files are links within the Hub's cache, as plain files beside it: the only
    kind that readers take which follow no link."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    if not any(path.is_symlink() for path in files):
        return folder
    home = folder.parent.parent / "imaginelens" / folder.name
    for path in files:
        copied = home / path.relative_to(folder)
        if not copied.is_file():
            copied.parent.mkdir(parents=True, exist_ok=True)
            part = copied.with_name(f".{copied.name}.partial")
            part.write_bytes(path.read_bytes())
            part.replace(copied)
    return home


def header(
    *, tags: Sequence[str], license: str | None = None, table: str | None = None, **words: Any
) -> str:
    """The first lines of a card, for the Hub's index: YAML between dashes.

    Args:
        license: the Hub's word for it; none is written if None, for it is the owner's to choose.
        table: a CSV file of a dataset repository, which the Hub then shows and `datasets` reads.

    >>> print(header(tags=["probe"]))
    ---
    library_name: imaginelens
    tags:
    - imaginelens
    - interpretability
    - probe
    ---
    """
    lines = ["---", "library_name: imaginelens"]
    lines += [f"license: {json.dumps(license)}"] if license is not None else []
    lines += [f"{name}: {json.dumps(value)}" for name, value in words.items()]
    lines += [
        "tags:",
        *(f"- {tag}" for tag in dict.fromkeys(("imaginelens", "interpretability", *tags))),
    ]
    if table is not None:
        lines += ["configs:", "- config_name: default", f"  data_files: {json.dumps(table)}"]
    return "\n".join([*lines, "---"])


def _errors() -> tuple[type[Exception], ...]:
    """What huggingface_hub raises; of its transport errors not all are OSErrors."""
    from huggingface_hub import errors

    return OSError, ValueError, getattr(errors, "HTTPError", OSError)


def _why(error: Exception, repo_id: str, revision: str | None) -> str:
    """What went wrong, in words, and what to do."""
    from huggingface_hub import errors

    if isinstance(error, errors.OfflineModeIsEnabled | errors.LocalEntryNotFoundError):
        return "it cannot be reached, or HF_HUB_OFFLINE is set, and the cache does not hold it"
    if isinstance(error, errors.RevisionNotFoundError):
        return f"it has no revision {revision!r}"
    if isinstance(error, errors.GatedRepoError):
        return "its owner must grant you access first"
    if isinstance(error, errors.RepositoryNotFoundError):
        return "there is none, or you may not see it: run `hf auth login`, or pass token=..."
    if isinstance(error, errors.HFValidationError):
        return f"{repo_id!r} is no id of the form 'owner/name'"
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
