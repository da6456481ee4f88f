"""What a bank of edits did to the answers: one row per edit, and the table they make."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Float

from imaginelens.estimates import Estimate, EstimateError
from imaginelens.estimates.estimate import Verdict
from imaginelens.estimates.margin import Margin
from imaginelens.hooks.errors import InputError
from imaginelens.hooks.metrics import Metric
from imaginelens.hooks.patching import Context
from imaginelens.mediation.provenance import Provenance
from imaginelens.mediation.result_files import Saved

if TYPE_CHECKING:
    import pandas as pd

NAN = float("nan")
FAR = 2.0  # times as far from real states as those from each other: worth a word
MORE_REPEATS = 0.1  # of the texts, above the unedited ones


@dataclass(frozen=True, repr=False, eq=False)
class EditEffect:
    """What one edit did, over all examples and draws.

    Shares are of examples, averaged over draws; nan is what was not measured: texts in fixed
    context, where they stay, norms and distances of written imagination.

    Attributes:
        before, after: the metric of each example without and with the edit, averaged over draws;
            nan where the answer was not found, with the edit in any draw.
        groups: the label of each example's group, or None.
        draws: how often a random edit was drawn.
        fired: in how many forwards the edit touched a state.
        cells, expected: states (or spans of text) it touched, and those its selector has in the
            runs that it acted in, over all draws.
        not_emitted, identical: examples that no draw changed, for they have no such position (or
            their donor has none), or the new state equals the old one. Their effect is 0.
        beyond: cells at steps that too few examples of the reference reached; see `folds.Within`.
        held: examples that are in the edit's own reference, because the user's holds them.
        relative_change: mean of ||new - old|| / ||old||, of the tokens of a text their share.
        norm_ratio: mean of ||new|| / ||old||.
        off_manifold: how far edited latents lie from real ones of the same step and other groups,
            in units of how far those lie from each other: nearest-neighbour distances, the median
            over cells. 1 is as near as real ones.
        text_changed: share whose text differs from the unedited one; of an edit of written
            imagination, the text around it.
        flips: share whose answer differs from the unedited one, where both were found.
        repeating, ran_on: share of texts that repeat themselves (see `degeneration.repeats`), and
            that were cut off by the length limit; `_before`, of the unedited texts.
        parse_coverage: share whose answer was found; the others are missing, not wrong.
        answers, texts: of each example, in the first draw.
        control: whether this is the sham.
    """

    name: str
    metric: Metric
    before: Float[np.ndarray, " example"]
    after: Float[np.ndarray, " example"]
    groups: tuple[Any, ...] | None
    answers: tuple[str | None, ...]
    texts: tuple[str, ...]
    draws: int = 1
    fired: int = 0
    cells: int = 0
    expected: int = 0
    not_emitted: int = 0
    identical: int = 0
    beyond: int = 0
    held: int = 0
    relative_change: float = NAN
    norm_ratio: float = NAN
    off_manifold: float = NAN
    text_changed: float = NAN
    flips: float = NAN
    repeating: float = NAN
    repeating_before: float = NAN
    ran_on: float = NAN
    ran_on_before: float = NAN
    parse_coverage: float = NAN
    parse_coverage_before: float = NAN
    control: bool = False

    @cached_property
    def change(self) -> Estimate:
        """after - before, as an `Estimate`.

        Outcomes that are 0 or 1 are compared by the score test; averages over draws that are not,
        and all other metrics, by Student's t.

        Raises:
            EstimateError: fewer than two examples have an answer before and after.
        """
        name = f"change of {self.metric.name} under {self.name}"
        if self.metric.binary and _all_0_or_1(self.before) and _all_0_or_1(self.after):
            return Estimate.paired(self.after, self.before, name=name, groups=self.groups)
        unit = "" if self.metric.binary else self.metric.unit
        values = self.after - self.before
        return Estimate.mean(values, name=name, unit=unit, groups=self.groups)

    def verdict(self, margin: Margin | None = None) -> Verdict:
        """What the change shows: "effect", "equivalent", "both" or "inconclusive".

        Raises:
            EstimateError: the margin is missing, or too few examples have an answer.
        """
        return self.change.verdict(margin)

    @property
    def moved_nothing(self) -> bool:
        """Whether states were changed, and no text and no answer with them."""
        return not self.control and self.cells > 0 and self.flips == 0 and not self.text_changed > 0

    @property
    def degenerates(self) -> bool:
        """Whether many more texts repeat themselves than without the edit."""
        return self.repeating - self.repeating_before >= MORE_REPEATS

    def describe(self, margin: Margin | None = None) -> str:
        """One sentence with the change, its interval, the verdict, and what else may explain it.

        Raises:
            EstimateError: the margin is missing, or not one.
        """
        if self.control:
            return f"{self.name}, the control, changed nothing, as it must."
        try:
            change = self.change
        except EstimateError as error:
            return f"nothing can be said of {self.name}: {error}."
        return change.describe(margin) + (
            f" ({self.repeating:.0%} of its texts repeat themselves.)" if self.degenerates else ""
        )

    def notes(self) -> Iterator[str]:
        """What a reader of the row must know, in sentences."""
        n = len(self.before)
        if self.degenerates:
            yield (
                f"{self.name}: {self.repeating:.0%} of texts repeat themselves "
                f"({self.repeating_before:.0%} unedited); what they lost is lost to degeneration, "
                "and shows no content that the states held"
            )
        if self.ran_on - self.ran_on_before >= MORE_REPEATS:
            yield (
                f"{self.name}: {self.ran_on:.0%} of texts ran on to the length limit "
                f"({self.ran_on_before:.0%} unedited)"
            )
        if self.parse_coverage < self.parse_coverage_before:
            yield (
                f"{self.name}: an answer was found in {self.parse_coverage:.1%} of texts "
                f"({self.parse_coverage_before:.1%} unedited); the others are missing, not wrong"
            )
        if self.off_manifold >= FAR and self._lost():
            yield (
                f"{self.name}: its states lie {self.off_manifold:.1f} times as far from real ones "
                "as those from each other, so that strangeness may cost what content did not"
            )
        if self.not_emitted:
            yield (
                f"{self.name}: {self.not_emitted} of {n} examples have no state there (or their "
                "donor has none); they were left as they were and count with an effect of 0"
            )
        if self.identical:
            yield (
                f"{self.name}: {self.identical} of {n} examples got states that equal their own; "
                "they count with an effect of 0"
            )
        if self.cells != self.expected:
            yield f"{self.name}: it touched {self.cells} of {self.expected} states"
        if self.beyond:
            yield (
                f"{self.name}: {self.beyond} of {self.cells} states stand at steps that fewer than "
                "2 examples of the reference reached; the last step reached stood for them"
            )
        if self.held:
            yield (
                f"{self.name}: its own reference holds {self.held} of the {n} examples; leave the "
                "reference out, and each is served by examples of other groups"
            )

    def _lost(self) -> bool:
        try:
            return self.change.pvalue() < 0.05
        except EstimateError:
            return False


@dataclass(frozen=True, repr=False, eq=False)
class Necessity(Saved):
    """The do(Z) table: what the answers lose when states are replaced.

    Intervals are those of each edit by itself, not adjusted for their number. The columns that are
    printed: cells touched of those expected; `moved` relative_change, `norm` norm_ratio, `off`
    off_manifold; shares of examples: `text` text_changed, `flip` flips, `repeat` repeating,
    `found` parse_coverage. A dash is what was not measured.

    Attributes:
        rows: one per edit, the sham among them; `necessity["Zero()"]` is one of them.
        at, site, context: what was edited, and whether text was written anew.
        reached: how many of the positions (or spans) each example has in its unedited run.
        answers, texts: of the unedited runs.
        left_out: why edits of the bank are not in the table.
        provenance: model, versions, inputs, seed, forwards and seconds.
    """

    rows: tuple[EditEffect, ...]
    at: str
    site: str
    context: Context
    reached: tuple[int, ...]
    answers: tuple[str | None, ...]
    texts: tuple[str, ...]
    left_out: tuple[str, ...]
    provenance: Provenance

    def __len__(self) -> int:
        return len(self.rows)

    def __iter__(self) -> Iterator[EditEffect]:
        return iter(self.rows)

    def __getitem__(self, name: str) -> EditEffect:
        """The row of an edit, by its name in the table or, where one row has it, by its class."""
        found = [row for row in self.rows if name in (row.name, f"il.{row.name}")]
        found = found or [row for row in self.rows if row.name.split("(")[0] == name]
        if len(found) != 1:
            raise InputError(
                f"{name!r} names {len(found)} rows of this table; its rows are "
                f"{', '.join(row.name for row in self.rows)}"
            )
        return found[0]

    @property
    def n(self) -> int:
        """How many examples there are."""
        return len(self.reached)

    @property
    def seed(self) -> int:
        """What the folds were drawn by; edits have seeds of their own."""
        return self.provenance.seed

    @property
    def forwards(self) -> int:
        """How often the model was called."""
        return self.provenance.forwards

    @property
    def seconds(self) -> float:
        """How long it took."""
        return self.provenance.seconds

    @property
    def sham(self) -> EditEffect:
        """The control: the states put back as they were, on the same path."""
        return next(row for row in self.rows if row.control)

    @cached_property
    def notes(self) -> tuple[str, ...]:
        """What a reader of the table must know, in sentences."""
        notes = [note for row in self.rows for note in row.notes()]
        if still := [row for row in self.rows if row.moved_nothing]:
            what = "answer changed" if self.context == "fixed" else "text and no answer changed"
            changes = "; ".join(
                f"{row.name} fired in {row.fired} forwards and changed its states by "
                f"{row.relative_change:.0%}"
                for row in still
            )
            notes.append(f"no {what} where states did: {changes}")
        without = sum(count == 0 for count in self.reached)
        if without:
            there = np.array(self.reached) > 0
            means = [
                f"{row.name} {_mean((row.after - row.before)[there]):+.3g}"
                for row in self.rows
                if not row.control
            ]
            notes.append(
                f"{without} of {self.n} examples have no state at {self.at} without an edit; the "
                f"mean changes of the other {self.n - without}: {', '.join(means)}"
            )
        return (*notes, *self.left_out)

    def describe(self, margin: Margin | None = None) -> str:
        """One sentence for each edit: the change, its interval and the verdict at the margin.

        Args:
            margin: in the metric's unit: 0.05 is 5 points of accuracy.

        Raises:
            EstimateError: the margin is missing, or not one.
        """
        return "\n".join(row.describe(margin) for row in self.rows)

    def to_dataframe(self) -> "pd.DataFrame":
        """One line per edit, with the interval (95%) and the p-value of its change."""
        import pandas as pd

        numbers = (
            "draws fired cells expected not_emitted identical beyond held relative_change "
            "norm_ratio off_manifold text_changed flips repeating repeating_before ran_on "
            "ran_on_before parse_coverage parse_coverage_before control"
        ).split()
        return pd.DataFrame(
            [
                {"edit": row.name, **_claims(row), **{name: getattr(row, name) for name in numbers}}
                for row in self.rows
            ]
        )

    def __repr__(self) -> str:
        first = self.rows[0]
        head = ["edit", "before", "after", "change [95% interval]", "cells", "moved", "norm", "off"]
        head += ["text", "flip", "repeat", "found"]
        lines = [
            f"Necessity of {self.site} at {self.at} for {first.metric.name}: {self.n} examples, "
            f"{self.context} context",
            *_aligned([head, *map(_cells, self.rows)]),
            f"  {self.provenance}",
        ]
        return "\n".join(lines + [f"  note: {note}" for note in self.notes])


def _claims(row: EditEffect) -> dict[str, float]:
    """What may be claimed of a row; nan where too few examples have an answer."""
    means = {"before": _mean(row.before), "after": _mean(row.after)}
    try:
        interval, change = row.change.ci(), row.change
    except EstimateError:
        nothing = dict.fromkeys(("change", "low", "high", "pvalue"), NAN)
        both = ~np.isnan(row.after - row.before)
        return {**means, **nothing, "n": int(both.sum()), "missing": int((~both).sum())}
    return {
        **means,
        "change": change.value,
        "low": interval.low,
        "high": interval.high,
        "pvalue": change.pvalue(),
        "n": change.n,
        "missing": change.missing,
    }


def _cells(row: EditEffect) -> list[str]:
    """A row as the table shows it."""
    claims = _claims(row)
    change = "0 (control)" if row.control else "too few answers"
    if not row.control and not math.isnan(claims["change"]):
        change = f"{claims['change']:.3g} [{claims['low']:.3g}, {claims['high']:.3g}]"
    return [
        row.name,
        *(_number(claims[name]) for name in ("before", "after")),
        change,
        f"{row.cells}/{row.expected}",
        *(_number(v) for v in (row.relative_change, row.norm_ratio, row.off_manifold)),
        *(_percent(v) for v in (row.text_changed, row.flips, row.repeating, row.parse_coverage)),
    ]


def _aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """Rows of cells as lines, the first column to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  "
        + "  ".join(
            cell.ljust(width) if i == 0 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    ]


def _number(value: float) -> str:
    return "-" if math.isnan(value) else f"{value:.3g}"


def _percent(value: float) -> str:
    return "-" if math.isnan(value) else f"{value:.0%}"


def _mean(values: Float[np.ndarray, " example"]) -> float:
    there = values[~np.isnan(values)]
    return float(there.mean()) if len(there) else NAN


def _all_0_or_1(values: Float[np.ndarray, " example"]) -> bool:
    return bool((np.isnan(values) | (values == 0) | (values == 1)).all())
