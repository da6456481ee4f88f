"""One progress bar, told in shares of the work."""

from types import TracebackType

from tqdm import tqdm

_PARTS = 1000
_FORM = "{desc} {percentage:3.0f}% |{bar}| {elapsed}<{remaining}"


class Progress:
    """A bar over `total` units of work, shown where it takes a while.

    >>> with Progress("sweep", 2) as bar:
    ...     bar.tick(0.5)
    >>> bar.done
    0.5
    """

    def __init__(self, what: str, total: int) -> None:
        self.total, self.done = total, 0.0
        self._bar = tqdm(total=_PARTS, desc=what, bar_format=_FORM, delay=3, leave=False)

    def tick(self, units: float) -> None:
        """Tell how much has been done since the last time, in units or parts of one."""
        self.done += units
        reached = min(_PARTS, round(_PARTS * self.done / self.total))
        self._bar.update(max(0, reached - self._bar.n))

    def __enter__(self) -> "Progress":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._bar.close()
