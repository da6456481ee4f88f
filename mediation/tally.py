"""Counting what one edit does, batch by batch and draw by draw."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from imaginelens.hooks import Edit
from imaginelens.hooks.metrics import Readout, same
from imaginelens.mediation.arm import Arm
from imaginelens.mediation.errors import ControlError


@dataclass
class Tally:
    """What one edit has done so far.

    Attributes:
        before, found_before: the metric, and whether an answer was found, by example.
        after, flips, found, changed, repeating, cut: the metric, whether the answer differs and was
            found, whether the text differs, repeats itself and was cut off, by (draw, example).
        not_emitted, identical: the rows that landings have flagged, by (draw, example).
        changes, norms, distances: by cell: relative change, norms before and after, and how far
            from real states.
        answers, texts: of the first draw.
    """

    name: str
    edit: Edit
    n: int
    fired: int = 0
    expected: int = 0
    beyond: int = 0
    changes: list[float] = field(default_factory=list)
    norms: list[tuple[float, float]] = field(default_factory=list)
    distances: list[np.ndarray] = field(default_factory=list)

    def __post_init__(self) -> None:
        shape = self.draws, self.n
        self.before, self.found_before = np.full(self.n, np.nan), np.zeros(self.n)
        self.answers: list[str | None] = [None] * self.n
        self.texts = [""] * self.n
        self.after, self.flips, self.found = (np.full(shape, np.nan) for _ in range(3))
        self.changed, self.repeating, self.cut = (np.full(shape, np.nan) for _ in range(3))
        self.not_emitted, self.identical = (np.zeros(shape, dtype=bool) for _ in range(2))

    @property
    def draws(self) -> int:
        """How often the edit is drawn."""
        return draws_of(self.edit)

    def add_values(
        self,
        rows: Sequence[int],
        draw: int,
        before: torch.Tensor,
        after: torch.Tensor,
        read: Readout,
        arm: Arm,
    ) -> None:
        """The metric and the answers of a batch, `read` unedited. Rows that the edit did not reach
        keep theirs."""
        for i, row in enumerate(rows):
            untouched = i in arm.landing.flags
            old, new = read.answers[i], (read if untouched else arm.after).answers[i]
            self.before[row] = float(before[i])
            self.after[draw, row] = float((before if untouched else after)[i])
            self.found[draw, row], self.found_before[row] = new is not None, old is not None
            if old is not None and new is not None:
                self.flips[draw, row] = not same(old, new)
            if draw == 0:
                self.answers[row], self.texts[row] = new, arm.run.texts[i]

    def add_landing(self, rows: Sequence[int], draw: int, arm: Arm) -> None:
        """Where the edit fired, and which rows it left as they were."""
        landing = arm.landing
        self.fired += landing.fired
        self.changes += [change for *_, change in landing.cells]
        self.norms += landing.norms
        for i, flag in landing.flags.items():
            kind = self.not_emitted if flag == "not_emitted" else self.identical
            kind[draw, rows[i]] = True

    def why_nothing(self, where: str) -> str:
        """Why the edit changed no example, or ""."""
        if not (self.not_emitted | self.identical).all():
            return ""
        if self.not_emitted.all():
            return (
                f"{self.name} touched no state {where} in any of {self.n} examples: there is none, "
                "or its donor has none; look at the triggers of both runs"
            )
        return (
            f"{self.name} left every state {where} bit for bit as it was, in all {self.n} "
            "examples: it has nothing else to put there"
        )

    def check_sham(self) -> None:
        """Refuse a sham that is not exactly nothing.

        Raises:
            ControlError: an outcome, an answer or a text differs from the unedited one.
        """
        equal = (self.after == self.before) | (np.isnan(self.after) & np.isnan(self.before))
        flips, texts = int(np.nansum(self.flips)), int(np.nansum(self.changed))
        if equal.all() and not flips and not texts:
            return
        known = np.abs(self.after - self.before)
        gap = float(np.nanmax(known, initial=0.0))
        raise ControlError(
            f"the sham, which puts every state back as it was, moved the outcome of "
            f"{int((~equal).any(0).sum())} of {self.n} examples (by up to {gap:.2g}), {flips} "
            f"answers and {texts} texts, so that no number of this study holds; look for "
            "randomness (lens.model.eval(), nondeterministic kernels) and run `imaginelens doctor`"
        )


def draws_of(edit: Edit) -> int:
    """How often an edit is drawn: once, unless it says so.

    >>> from imaginelens.hooks import Noise, Zero
    >>> draws_of(Noise(draws=3)), draws_of(Zero())
    (3, 1)
    """
    return int(getattr(edit, "draws", 1))
