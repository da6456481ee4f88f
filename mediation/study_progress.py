"""How far a study is, or the demo: one bar in a terminal, and a line for each tenth elsewhere."""

import sys
import time
from typing import Any

from tqdm import tqdm

_FORM = "{percentage:3.0f}% |{bar}| {elapsed}, {remaining} left, {desc}"


class Progress:
    """One bar over all maps and chunks of a study, in pairs.

    Args:
        total: pairs times maps, of this process.
        done: how many of them were there before.
        shown: False tells nothing, as other processes than the first do.
    """

    def __init__(self, total: int, *, done: int = 0, shown: bool = True, to: Any = None) -> None:
        self.total, self.done, self.shown = total, float(done), shown
        self._to = sys.stderr if to is None else to
        self._began, self._first = time.monotonic(), float(done)
        self._told = int(10 * done / total) if total else 10
        self._what = ""
        self._bar = None
        if shown and self._to.isatty():
            self._bar = tqdm(
                total=total,
                initial=done,
                file=self._to,
                bar_format=_FORM,
                leave=False,
                disable=False,
            )

    def now(self, what: str) -> None:
        """Say what is being worked on."""
        self._what = what
        if self._bar is not None:
            self._bar.set_description_str(what)

    def tick(self, pairs: float) -> None:
        """So many pairs' worth of work are done."""
        self.done += pairs
        if self._bar is not None:
            self._bar.update(min(pairs, max(self.total - self._bar.n, 0)))
        tenth = min(int(10 * self.done / self.total + 1e-9), 10)
        if self.shown and self._bar is None and tenth > self._told:
            self._told = tenth
            print(f"{10 * tenth}% {self._what}{self._left()}", file=self._to, flush=True)

    def _left(self) -> str:
        made = self.done - self._first
        if made <= 0 or self.done >= self.total - 1e-9:
            return ""
        seconds = (self.total - self.done) * (time.monotonic() - self._began) / made
        return f", about {duration(seconds)} left"

    def close(self) -> None:
        """Take the bar away."""
        if self._bar is not None:
            self._bar.close()


def duration(seconds: float) -> str:
    """A length of time in words that one can plan with.

    >>> duration(3.2), duration(200), duration(8000), duration(400000)
    ('3 s', '3 min', '2.2 h', '4.6 days')
    """
    for size, unit, after in ((86_400, "days", 2), (3_600, "h", 1), (60, "min", 1)):
        if seconds >= after * size:
            number = seconds / size
            return f"{number:.0f} {unit}" if unit == "min" else f"{number:.1f} {unit}"
    return f"{seconds:.0f} s"
