"""A file is in its place when all of it is on the disk, and before that not at all."""

import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from imaginelens.hooks.errors import CheckpointError, brief


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


def _settle(folder: Path) -> None:
    """Have the name on the disk, too."""
    if os.name != "posix":
        return
    opened = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(opened)
    finally:
        os.close(opened)
