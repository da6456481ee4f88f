"""What a report says, as plain values: no model, no tensor, no HTML.

Whoever ran the study fills these in; `imaginelens.view.page` draws them. Everything is checked here
once, so drawing cannot meet a row with a missing cell. Text may be anything: it is made inert when
drawn.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal, get_args

import numpy as np
from jaxtyping import Float
from PIL import Image

from imaginelens.view.numerals import Unit

Interval = tuple[float, float]
TokenKind = Literal["system", "text", "image", "latent", "answer", "pad"]

HOW_TO_READ = (
    "Base and source are two inputs with different answers. The model runs on the base input, and "
    "at one place its state is replaced by the state from the source input.",
    "Each cell of a map is one such place. Blue: the answer moves towards the source's, so the "
    "state carries it. Red: away from it. White: nothing moves; a bare 0 is exactly zero. Grey: "
    "not measured. All maps share one scale.",
    "The swap moves all latent tokens at once. Where the explanations of what latents do predict "
    "different answers, it asks whose prediction comes true.",
    "The edits table asks the opposite: if the latent tokens are destroyed, is the answer still "
    "right? The checks below it say whether the edits took place at all.",
)


@dataclass(frozen=True)
class GridCell:
    """One image token: its place in the grid, and `box` = (left, top, right, bottom) in pixels."""

    row: int
    column: int
    box: tuple[float, float, float, float]


@dataclass(frozen=True)
class Picture:
    """An image as the model saw it, with the cells its image tokens stand for."""

    image: Image.Image
    cells: tuple[GridCell, ...] = ()
    alt: str = "input image"


@dataclass(frozen=True)
class Example:
    """One input and the model's unedited answer to it."""

    question: str
    answer: str
    picture: Picture | None = None


@dataclass(frozen=True)
class Token:
    """One position of the run: its text, and what kind of position it is."""

    text: str
    kind: TokenKind

    def __post_init__(self) -> None:
        if self.kind not in get_args(TokenKind):
            raise ValueError(f"token kind {self.kind!r} is not one of {get_args(TokenKind)}.")


@dataclass(frozen=True)
class Measure:
    """A number with what it rests on: how many examples, and its interval where there is one."""

    value: float
    n: int
    interval: Interval | None = None

    def __post_init__(self) -> None:
        _check_finite("a measure", self.value, self.interval)


@dataclass(frozen=True)
class KeyNumber:
    """A named result at the top of a study, e.g. the indirect effect through the latents.

    `unit`: "%" and "points" are written out of 100, the measure itself is out of 1. Numbers of the
    same label stand in one column of the overview.
    """

    label: str
    measure: Measure
    note: str = ""
    unit: Unit = ""


@dataclass(frozen=True)
class Prediction:
    """What one explanation of the latents predicts, and how often that came true.

    `shown` is its prediction for the pair shown; None if it makes none ("other").
    """

    name: str
    meaning: str
    share: Measure
    shown: str | None = None


@dataclass(frozen=True)
class Mechanism:
    """Whose prediction came true when the source's latents went into the base.

    Attributes:
        predictions: one per explanation, over the decisive pairs: those in which no two agree.
        winner: the one that explains them; None is undetermined.
        n_pairs: how many pairs were swapped, decisive or not.
        missing: decisive pairs without an answer; they are in no share.
        answered: what the pair shown answered after the swap.
        bar: the share that the winner's whole interval has to reach.
    """

    predictions: tuple[Prediction, ...]
    winner: str | None
    n_pairs: int
    missing: int = 0
    answered: str | None = None
    bar: float = 0.8

    def __post_init__(self) -> None:
        names = [prediction.name for prediction in self.predictions]
        if not names or (self.winner is not None and self.winner not in names):
            raise ValueError(
                f"a mechanism needs predictions, its winner among them: the winner "
                f"{self.winner!r} came with predictions {names}."
            )

    @property
    def leader(self) -> Prediction:
        """The winner, or where nothing is determined the prediction that came true most often."""
        named = [p for p in self.predictions if p.name == self.winner]
        return named[0] if named else max(self.predictions, key=lambda p: p.share.value)


@dataclass(frozen=True)
class Row:
    """A heat-map row: a site. `layer` is None for the fed-back embedding itself (`hook_latent`)."""

    site: str
    label: str
    layer: int | None = None


@dataclass(frozen=True)
class Column:
    """A heat-map column: a latent step, with the token that stands at it. Labels may repeat."""

    step: int
    label: str
    token: str = ""


@dataclass(frozen=True)
class Cell:
    """One patched place: the mean effect, and what it did to the pair shown above.

    `effect=None` (or NaN) is a place that was not measured.
    """

    effect: float | None
    n: int = 0
    interval: Interval | None = None
    before: str | None = None
    after: str | None = None

    def __post_init__(self) -> None:
        if self.effect is not None and math.isnan(self.effect):
            object.__setattr__(self, "effect", None)
        if self.effect is not None:
            _check_finite("a heat-map cell", self.effect, self.interval)

    @property
    def excludes_zero(self) -> bool:
        """Whether there is an interval, and zero lies outside it."""
        return self.effect is not None and self.interval is not None and (
            self.interval[0] > 0 or self.interval[1] < 0
        )  # fmt: skip


@dataclass(frozen=True)
class HeatMap:
    """Effects by row (site, first on top) and column (latent step)."""

    rows: tuple[Row, ...]
    columns: tuple[Column, ...]
    cells: tuple[tuple[Cell, ...], ...]
    unit: str = "recovery"
    caption: str = ""
    row_axis: str = "layer"
    column_axis: str = "latent step"

    def __post_init__(self) -> None:
        lengths = [len(row) for row in self.cells]
        n_rows, n_columns = len(self.rows), len(self.columns)
        if not n_rows or not n_columns or lengths != [n_columns] * n_rows:
            raise ValueError(
                f"a heat-map needs one cell per row and column, one of each at least: {n_rows} "
                f"rows and {n_columns} columns came with rows of {lengths} cells."
            )

    @property
    def effects(self) -> Float[np.ndarray, "layer step"]:
        """The effects as an array; NaN where nothing was measured."""
        rows = [
            [math.nan if cell.effect is None else cell.effect for cell in row] for row in self.cells
        ]
        return np.array(rows, dtype=float).reshape(len(self.rows), len(self.columns))


@dataclass(frozen=True)
class EditRow:
    """One line of the do(Z) table. The unedited line has only an accuracy."""

    edit: str
    accuracy: Measure
    change: Measure | None = None
    flipped: float | None = None
    relative_change: float | None = None
    fired: int | None = None
    expected: int | None = None

    def __post_init__(self) -> None:
        for value in (self.flipped, self.relative_change):
            if value is not None:
                _check_finite(f"edit {self.edit!r}", value, None)


@dataclass(frozen=True)
class Check:
    """One integrity line. `ok=None` is information, neither passed nor failed."""

    label: str
    value: str
    ok: bool | None = None
    explanation: str = ""


@dataclass(frozen=True, eq=False)
class Study:
    """One model, from its input to what its latents cause.

    `headline` is the verdict in one sentence, `detail` what it rests on, both in plain words.
    """

    name: str
    headline: str
    base: Example
    source: Example
    tokens: tuple[Token, ...]
    latents: Float[np.ndarray, "step d_model"]
    heatmap: HeatMap
    edits: tuple[EditRow, ...] = ()
    checks: tuple[Check, ...] = ()
    numbers: tuple[KeyNumber, ...] = ()
    detail: str = ""
    mechanism: Mechanism | None = None

    def __post_init__(self) -> None:
        if self.latents.ndim != 2:
            raise ValueError(
                f"latents of {self.name!r} need shape [step, d_model], got {self.latents.shape}."
            )


@dataclass(frozen=True, eq=False)
class Report:
    """Studies side by side, on one colour scale.

    `colour_limit=None` takes the largest |effect| of all studies. Give one (1.0 for recovery) when
    every effect may be small, so that noise is not painted in full colour. `overview_note` says how
    to read the table of all studies.
    """

    title: str
    studies: tuple[Study, ...]
    subtitle: str = ""
    provenance: Mapping[str, object] = field(default_factory=dict)
    how_to_read: tuple[str, ...] = HOW_TO_READ
    colour_limit: float | None = None
    interval_name: str = "95% interval"
    overview_note: str = ""

    def __post_init__(self) -> None:
        units = {study.heatmap.unit for study in self.studies}
        if len(units) > 1:
            raise ValueError(
                f"heat-maps in {sorted(units)} cannot share one scale: give all studies one unit."
            )

    @property
    def limit(self) -> float:
        """The effect at which the shared colour scale ends."""
        if self.colour_limit is not None:
            return self.colour_limit
        return largest([study.heatmap.effects for study in self.studies])

    @property
    def latent_limit(self) -> float:
        """The same for the latents, which have a unit of their own."""
        return largest([study.latents for study in self.studies])


def largest(arrays: list[Float[np.ndarray, "..."]]) -> float:
    """The largest finite magnitude in any of the arrays, or 1.0 if there is none above zero."""
    magnitudes = [np.abs(array[np.isfinite(array)]) for array in arrays]
    return max((float(m.max()) for m in magnitudes if m.size), default=0.0) or 1.0


def _check_finite(what: str, value: float, interval: Interval | None) -> None:
    numbers = (value, *(interval or ()))
    if not all(math.isfinite(number) for number in numbers):
        raise ValueError(
            f"{what} needs finite numbers, got {numbers}; use None for what was not measured."
        )
    if interval is not None and interval[0] > interval[1]:
        raise ValueError(f"{what} has its interval the wrong way round: {interval}.")
