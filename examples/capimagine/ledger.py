r"""What was paid for is never paid twice: an append-only file of the replies of models.

A line of JSON for each reply, found again by a hash of all that was sent: model, messages with the
hashes of their pictures, sampling settings. A prompt's version is part of the messages.

Each line is handed to the operating system in one write as soon as the reply is there, before
anything else happens with it: a process that is killed loses the calls in flight, at most. The disk
is told (`fsync`) once a second and at the end: a computer that loses power loses about a second.
A last line that was torn is ended, so that the next begins on a new line, and then ignored. One
process at a time may hold a ledger.
"""

import fcntl
import json
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

from examples.capimagine.refused import SourceError

SYNC_SECONDS = 1.0


@dataclass(frozen=True)
class Entry:
    """One reply that was paid for.

    Attributes:
        key: hash of the request.
        stage: which stage asked; for people, like `id`.
        id: the record it was asked for.
        text: what came back.
        prompt_tokens: as the endpoint counted them; 0 if it does not say.
        completion_tokens: likewise.
    """

    key: str
    stage: str
    id: str
    text: str
    prompt_tokens: int = 0
    completion_tokens: int = 0


class Ledger:
    """The replies so far, and a file that new ones are appended to.

    Args:
        path: the file; it is made if it is not there.

    Raises:
        SourceError: another process holds it.

    >>> import tempfile
    >>> folder = Path(tempfile.mkdtemp())
    >>> with Ledger(folder / "ledger.jsonl") as ledger:
    ...     ledger.add(Entry(key="a1", stage="refine", id="7", text="{}"))
    >>> with Ledger(folder / "ledger.jsonl") as ledger:
    ...     ledger.get("a1").id
    '7'
    """

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self.path = path
        self.torn = 0  # lines that hold no entry
        self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
        try:
            self._lock()
            self._entries = {entry.key: entry for entry in self._read()}
        except BaseException:
            os.close(self._file)
            raise
        self._synced = time.monotonic()

    def get(self, key: str) -> Entry | None:
        """The reply to a request, if it was paid for."""
        return self._entries.get(key)

    def add(self, entry: Entry) -> None:
        """Write down a reply, before anything else is done with it."""
        line = json.dumps(vars(entry), ensure_ascii=True).encode() + b"\n"
        written = os.write(self._file, line)
        while written < len(line):  # a disk that is nearly full takes a part
            written += os.write(self._file, line[written:])
        self._entries[entry.key] = entry
        if time.monotonic() - self._synced > SYNC_SECONDS:
            self.sync()

    def sync(self) -> None:
        """Have the disk write down what the operating system holds."""
        os.fsync(self._file)
        self._synced = time.monotonic()

    def close(self) -> None:
        """Sync, and let others have it."""
        if self._file >= 0:
            self.sync()
            os.close(self._file)
            self._file = -1

    def __len__(self) -> int:
        return len(self._entries)

    def __iter__(self) -> Iterator[Entry]:
        return iter(self._entries.values())

    def __enter__(self) -> "Ledger":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _lock(self) -> None:
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise SourceError(
                f"{self.path} is held by another process; wait for it, or give another --ledger"
            ) from error

    def _read(self) -> Iterator[Entry]:
        with self.path.open("rb") as file:
            whole = True
            for line in file:
                whole = line.endswith(b"\n")
                if entry := _entry(line):
                    yield entry
                elif line.strip():
                    self.torn += 1
        if not whole:
            os.write(self._file, b"\n")


def _entry(line: bytes) -> Entry | None:
    try:
        entry = Entry(**json.loads(line))
    except (ValueError, TypeError, RecursionError):
        return None
    return entry if isinstance(entry.key, str) and isinstance(entry.text, str) else None
