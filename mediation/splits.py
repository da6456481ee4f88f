"""Which forwards did not fit into memory and were run in halves: kept, so that they are again."""

import json
from dataclasses import dataclass, field
from pathlib import Path

from imaginelens.hooks.errors import CheckpointError, brief
from imaginelens.mediation.behind_prefix import Forward
from imaginelens.mediation.map_files import check_file, write_whole


@dataclass
class Splits:
    """The forwards of a study that were run in halves, by chunk.

    How many rows share a forward changes the last bits of what it computes. So a chunk that is
    measured again splits what was split before, whether or not it would fit now.

    Attributes:
        folder: where they are kept, a file for each chunk that has some; None is in memory.

    >>> Splits().of(3)
    set()
    """

    folder: Path | None = None
    _known: dict[int, set[str]] = field(default_factory=dict)

    def of(self, chunk: int) -> set[str]:
        """The names of the forwards of a chunk that are split.

        Raises:
            CheckpointError: the file that should say so cannot be read.
        """
        if chunk not in self._known:
            self._known[chunk] = self._read(chunk)
        return self._known[chunk]

    def holds(self, chunk: int, forward: Forward) -> bool:
        """Whether a forward of a chunk is to be run in halves."""
        return name_of(forward) in self.of(chunk)

    def add(self, chunk: int, forward: Forward) -> None:
        """Keep that a forward did not fit, on the disk before anything else is done."""
        names = self.of(chunk)
        names.add(name_of(forward))
        if self.folder is not None:
            write_whole(self._path(chunk), json.dumps(sorted(names)).encode())

    def _read(self, chunk: int) -> set[str]:
        if self.folder is None or not self._path(chunk).exists():
            return set()
        path = self._path(chunk)
        check_file(path)
        try:
            names = json.loads(path.read_bytes())
        except (ValueError, RecursionError) as error:
            raise CheckpointError(
                f"{path!s} cannot be read ({brief(error)}); remove it, and the part of the map "
                "with the same number"
            ) from error
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise CheckpointError(
                f"{path!s} does not hold a list of names; remove it, and the part of the map with "
                "the same number"
            )
        return set(names)

    def _path(self, chunk: int) -> Path:
        assert self.folder is not None
        return self.folder / f"splits-{chunk:06d}.json"


def name_of(forward: Forward) -> str:
    """What tells a forward from the others of its chunk: where it begins, and what it holds."""
    first, last = forward.tasks[0], forward.tasks[-1]
    ends = f"{first.cell}.{first.example}-{last.cell}.{last.example}"
    return f"block {forward.start} column {forward.stop} rows {len(forward.tasks)} {ends}"
