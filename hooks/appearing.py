"""A file is in its place when all of it is on the disk, and before that not at all."""

import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from imaginelens.hooks.errors import CheckpointError, InputError, brief


@contextmanager
def appearing(path: Path) -> Iterator[Path]:
    """A path to write to; what is there at the end takes its place, whole, or leaves no trace.

    Raises:
        CheckpointError: it cannot be written; what was in its place is still there.

    >>> import tempfile
    >>> folder = Path(tempfile.mkdtemp())
    >>> with appearing(folder / "a.txt") as partial:
    ...     _ = partial.write_text("all of it")
    >>> [path.name for path in folder.iterdir()]
    ['a.txt']
    """
    partial = path.with_name(f".{path.name}.{os.getpid()}-{secrets.token_hex(4)}.partial")
    try:
        yield partial
        with open(partial, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(partial, path)
        _settle(path.parent)
    except CheckpointError:
        raise
    except (OSError, SafetensorError) as error:
        raise CheckpointError(
            f"{path!s} cannot be written ({brief(error)}); make room, or choose another folder"
        ) from error
    finally:
        partial.unlink(missing_ok=True)


@contextmanager
def alone(
    folder: Path,
    *,
    proof: str | None = None,
    doing: str = "saving into",
    instead: str = "choose another folder",
) -> Iterator[None]:
    """Hold a folder, made if it is not there, while a result of several files is written into it.

    So nothing that was saved is ever half replaced. The system lets go of the folder when the
    process ends, however it ends. Where a file system has no locks, or on Windows, nothing is held.

    Args:
        proof: the file that is written last; where it is there, there is a result already. None
            is a folder to which results are added.
        doing, instead: what another process is then told to be doing, and what to do about it.

    Raises:
        InputError: there is a result already, or another process holds the folder.

    >>> import tempfile
    >>> folder = Path(tempfile.mkdtemp())
    >>> with alone(folder, proof="words.json"):
    ...     _ = (folder / "words.json").write_text("{}")
    >>> with alone(folder, proof="words.json"):
    ...     pass
    Traceback (most recent call last):
    imaginelens.hooks.errors.InputError: ... holds words.json already; choose another folder
    """
    folder.mkdir(parents=True, exist_ok=True)
    held = _held(folder, f"another process is {doing} {folder!s}; wait for it, or {instead}")
    try:
        if proof is not None and (folder / proof).exists():
            raise InputError(f"{folder!s} holds {proof} already; choose another folder")
        yield
    finally:
        if held is not None:
            os.close(held)


def _held(folder: Path, otherwise: str) -> int | None:
    """A lock on a folder, which closing it lets go; None where there are none."""
    if os.name != "posix":
        return None
    import fcntl

    opened = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(opened, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        os.close(opened)
        raise InputError(otherwise) from error
    except OSError:  # a file system without locks
        pass
    return opened


def _settle(folder: Path) -> None:
    """Have the name on the disk, too."""
    if os.name != "posix":
        return
    opened = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(opened)
    finally:
        os.close(opened)
