"""What is said of a record that cannot be used: it is counted, and never stops the rest."""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass


class SourceError(ValueError):
    """A source, or a setting, that cannot be used at all: one sentence, with what to do next."""


@dataclass(frozen=True)
class Refused:
    """A record that is left out.

    Attributes:
        id: of the record, or the file and place if it has none.
        reason: one sentence, with what was found.
        kind: the reason in a few words, the same for all like it, for counting.
    """

    id: str
    reason: str
    kind: str


class Refusal(Exception):
    """Raised where a record proves unusable; whoever knows its id makes a `Refused` of it."""

    def __init__(self, kind: str, reason: str) -> None:
        super().__init__(reason)
        self.kind, self.reason, self.id = kind, reason, ""

    def of(self, id: str) -> Refused:
        """Say which record it was, unless that was known where it was raised."""
        return Refused(self.id or id, self.reason, self.kind)


def count(refused: Iterable[Refused]) -> dict[str, int]:
    """How many were refused for each kind of reason, the most frequent first.

    >>> count([Refused("1", "a.png is not there", "missing picture")])
    {'missing picture': 1}
    """
    return dict(Counter(one.kind for one in refused).most_common())
