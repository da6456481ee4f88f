"""What an exhibit is: what the paper reports, what it leaves open, and how it is measured here.

The paper's numbers and ours never share a column: one of the paper is headed "paper, Monet-7B", one
of ours by what was measured, such as "organism latent-content (0.2 M parameters)".
"""

import base64
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from examples.reproduce.subjects import Subject
from imaginelens.estimates import Estimate

# How far to trust what we know of the paper: its full text was not at hand when this was written.
TRUST = {
    "A": "the abstract or the authors' README",
    "B=C": "two independent notes on the paper, which agree",
    "B": "one note on the paper, by itself",
    "calc": "our arithmetic on the paper's numbers",
}


@dataclass(frozen=True)
class Number:
    """A measured number with its interval (95%) and how many examples it is of.

    >>> str(Number(12.5, 8.0, 17.5, n=96)), str(Number(0.5))
    ('12.5 [8, 17.5]', '0.5')
    """

    value: float
    low: float = math.nan
    high: float = math.nan
    n: int = 0

    def __str__(self) -> str:
        if math.isnan(self.value):
            return "not measured"
        ends = "" if math.isnan(self.low) else f" [{_short(self.low)}, {_short(self.high)}]"
        return _short(self.value) + ends


Cell = Number | str
Columns = Mapping[str, Mapping[str, Cell]]  # what is below a column's heading: row -> cell


def of(estimate: Estimate, *, scale: float = 1.0) -> Number:
    """A number of an `Estimate`; `scale=100` makes points of shares."""
    ends = estimate.ci()
    return Number(scale * estimate.value, scale * ends.low, scale * ends.high, estimate.n)


def percent(hits: Any, *, groups: Sequence[Any] | None = None) -> Number:
    """A share of 0/1 outcomes in percent, with Wilson's interval; nan is left out.

    >>> str(percent([1, 1, 1, 0]))
    '75 [30.1, 95.4]'
    """
    return of(Estimate.share(np.asarray(hits, dtype=float), groups=groups), scale=100)


@dataclass(frozen=True)
class Drawing:
    """A figure as SVG, and as PNG where it was drawn just now."""

    name: str
    caption: str
    alt: str
    svg: str
    png: bytes = field(default=b"", compare=False)

    @staticmethod
    def of(figure: Any, name: str, caption: str) -> "Drawing":
        """What a figure of `imaginelens.view` shows; it needs matplotlib.

        Raises:
            ImportError: matplotlib is not installed.
        """
        return Drawing(name, caption, figure.alt, figure.svg(), figure.png(scale=1.5))

    @property
    def source(self) -> str:
        """The SVG as the address of a picture, which runs nothing."""
        return "data:image/svg+xml;base64," + base64.b64encode(self.svg.encode()).decode("ascii")


@dataclass(frozen=True)
class Measured:
    """What was found on one subject.

    Attributes:
        columns: by the rest of the heading ("" where the subject has one column): row -> cell.
        says: sentences on these numbers.
        figures: drawings of them.
        facts: numbers and names that sentences across subjects are made of.
        n, seed, seconds: examples asked for, how they were drawn, and what it took.
    """

    columns: Columns
    says: tuple[str, ...] = ()
    figures: tuple[Drawing, ...] = ()
    facts: Mapping[str, Any] = field(default_factory=dict)
    n: int = 0
    seed: int = 0
    seconds: float = 0.0


Measure = Callable[..., Measured]  # (subject, *, n, seed)


@dataclass(frozen=True)
class Arms:
    """What a measurement costs per example: generations, and single forwards beside them."""

    generations: int
    forwards: int = 0


@dataclass(frozen=True, kw_only=True)
class Exhibit:
    """One figure or table of the paper, or what it lacks.

    Attributes:
        name: as on the command line.
        title: what it shows, in a few words.
        covers: the paper's figures and tables that it stands for; none of what is beyond the paper.
        asks: the question, in one sentence.
        paper: the paper's columns: heading -> row -> what it reports there, verbatim.
        trust: where those numbers are from, a key of `TRUST`.
        reports: what the paper says beside numbers.
        unknown: what it leaves open that would be needed to repeat it.
        limits: what no result of this exhibit can show.
        arithmetic: what follows from the paper's own numbers.
        answers: the points of the critique (i to vi) that it takes up.
        organisms: the organisms it is measured on.
        families: the model families whose configs it takes.
        benchmarks: what a config's data are asked for; the first that is there, or all.
        n: examples of each organism.
        size: the key of [run] in a config that says how many of each benchmark.
        unit: of the measured cells.
        measure: measures one subject; None where nothing can be measured, and `stated` says why.
        compare: sentences on all subjects together: name -> Measured -> sentences.
        arms: what it costs on each example of a config's data; with a do(Z) table, beside that.
        do_z: whether it measures the table of do(Z), whose rows a config chooses.
    """

    name: str
    title: str
    covers: tuple[str, ...] = ()
    asks: str
    paper: Mapping[str, Mapping[str, float | str]] = field(default_factory=dict)
    trust: str = "B=C"
    reports: tuple[str, ...] = ()
    unknown: tuple[str, ...] = ()
    limits: tuple[str, ...] = ()
    arithmetic: tuple[str, ...] = ()
    answers: tuple[str, ...] = ()
    organisms: tuple[str, ...] = ()
    families: tuple[str, ...] = ()
    benchmarks: tuple[str, ...] = ()
    n: int = 96
    size: Literal["tables", "similarity", "timing", "map", "beyond"] = "tables"
    unit: str = ""
    measure: Measure | None = None
    stated: str = ""
    compare: Callable[[Mapping[str, Measured]], Sequence[str]] = lambda found: ()
    arms: Arms = Arms(0)
    do_z: bool = False

    def run(self, subject: Subject, *, n: int, seed: int) -> Measured:
        """Measure one subject.

        Raises:
            InputError: the subject has not what it takes, such as a benchmark's folder.
        """
        assert self.measure is not None
        found: Measured = self.measure(subject, n=n, seed=seed)
        return found


def _short(value: float) -> str:
    return f"{round(value, 1 if abs(value) >= 1 else 3):g}"
