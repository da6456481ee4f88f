"""ProbeResult: how well labels were read from states, against everything it must beat."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
from jaxtyping import Float, Int, Shaped

from imaginelens.estimates import Estimate, permutation_pvalue
from imaginelens.hooks.errors import InputError
from imaginelens.hooks.hub import Address
from imaginelens.probes.estimators import Probe

SHUFFLED, CONTROL_TASK, RANDOM_FEATURES = "shuffled labels", "control task", "random features"
Decoding = Literal["decodable", "not decodable", "untested"]
LEVEL = 0.05


@dataclass(frozen=True, repr=False, eq=False)
class Calibration:
    """Whether a probability of 0.8 is right 8 times in 10, out of fold.

    Attributes:
        confidence, correct: means of the probability of the predicted class, and of its being
            right, in bins of equal width.
        counts: how many rows are in each bin.
        ece: the expected calibration error: |confidence - correct|, weighted by counts. It is above
            0 by chance, too: the more so the fewer rows.
        brier: the mean squared distance of the probabilities from the truth, 0 best, 2 worst.
    """

    confidence: Float[np.ndarray, " bin"]
    correct: Float[np.ndarray, " bin"]
    counts: Int[np.ndarray, " bin"]
    ece: float
    brier: Estimate

    def __repr__(self) -> str:
        lines = [f"Calibration(expected error {self.ece:.3f}, {self.brier!r})"]
        for said, was, n in zip(self.confidence, self.correct, self.counts, strict=True):
            lines.append(f"  says {said:.2f}   is right {was:.2f}   n={n}")
        return "\n".join(lines)


@dataclass(frozen=True, repr=False, eq=False)
class Confusion:
    """How often each class (row) was read as each class (column), out of fold."""

    counts: Int[np.ndarray, "true read"]
    classes: tuple[Any, ...]

    def __repr__(self) -> str:
        names = [str(each) for each in self.classes]
        width = max([len(name) for name in names] + [len(str(self.counts.max()))]) + 2
        head = " " * width + "".join(name.rjust(width) for name in names)
        rows = [
            name.rjust(width) + "".join(str(n).rjust(width) for n in row)
            for name, row in zip(names, self.counts.tolist(), strict=True)
        ]
        return "\n".join([f"Confusion({int(self.counts.sum())} rows; true in rows)", head, *rows])


@dataclass(frozen=True, repr=False, eq=False)
class ProbeResult:
    """What a probe reads, row by row out of fold, with its controls; `fit_probe` makes one.

    Attributes:
        kind, label, where: which probe read what, and where.
        y: the labels.
        rows, steps: the example and the step of each row.
        groups: the number of each row's group; None if each is on its own.
        folds: in which fold each row was tested.
        predictions: by probes that saw no row of the fold.
        probabilities: (row, class), of such probes; None for quantities.
        baseline: what each row would give without its states: the share of the commonest class
            among the training rows of its fold, or the squared distance from their mean.
        beside: by control, 1.0 where it read a row right, nan where it lacks the row; for
            quantities by how much its squared error is below the baseline.
        shuffled: accuracy (R^2 for quantities) under each shuffle of the labels.
        probe: fitted on all rows; what `save` keeps, and what to steer with.
        n_steps: how many steps stand side by side in a row.
        notes: what a reader must know.
    """

    kind: str
    label: str
    where: str
    y: Shaped[np.ndarray, " row"]
    rows: Int[np.ndarray, " row"]
    steps: Int[np.ndarray, " row"]
    groups: Int[np.ndarray, " row"] | None
    folds: Int[np.ndarray, " row"]
    predictions: Shaped[np.ndarray, " row"]
    probabilities: Float[np.ndarray, "row class"] | None
    baseline: Float[np.ndarray, " row"]
    beside: Mapping[str, Float[np.ndarray, " row"]]
    shuffled: Float[np.ndarray, " shuffle"]
    probe: Probe
    n_steps: int = 1
    notes: tuple[str, ...] = ()

    @property
    def classes(self) -> tuple[Any, ...] | None:
        """The classes, sorted; None for quantities."""
        return None if self.probe.classes_ is None else tuple(self.probe.classes_.tolist())

    @property
    def chance(self) -> float:
        """The accuracy without states: the share of the commonest class among the training rows,
        averaged over rows; 0 for R^2."""
        return 0.0 if self.classes is None else float(self.baseline.mean())

    @property
    def accuracy(self) -> Estimate:
        """The share of rows that were read right out of fold; its null is `chance`.

        Raises:
            InputError: the labels are quantities.
        """
        if self.classes is None:
            raise InputError("the labels are quantities, which are never just right; use .r2")
        return self._estimate(self._reached, "accuracy")

    @property
    def r2(self) -> Estimate:
        """By what share the squared error is below that of the training mean, out of fold.

        Raises:
            InputError: the labels are classes.
        """
        if self.classes is not None:
            raise InputError("the labels are classes, which have no R^2; use .accuracy")
        return self._estimate(self._reached, "R^2")

    @property
    def score(self) -> Estimate:
        """`accuracy` of classes, `r2` of quantities."""
        return self.r2 if self.classes is None else self.accuracy

    @cached_property
    def controls(self) -> dict[str, Estimate]:
        """The same score for each control; for shuffled labels the mean over shuffles."""
        found = {name: self._estimate(values, name) for name, values in self.beside.items()}
        if not len(self.shuffled):
            return found
        mean = Estimate.mean(self.shuffled, name=SHUFFLED, unit="")
        return {SHUFFLED: replace(mean, null=None), **found}

    def over(self, control: str) -> Estimate:
        """By how much the probe's score is above a control's, on the same rows.

        Raises:
            InputError: that control was not fitted.
        """
        if control not in self.beside:
            raise InputError(
                f"there is no control {control!r} to compare with; there are "
                f"{', '.join(self.beside) or 'none'}"
            )
        name, other = f"over {control}", self.beside[control]
        if self.classes is None:
            return Estimate.ratio(
                self._reached - other, self.baseline, name=name, groups=self.groups
            )
        return Estimate.paired(self._reached, other, name=name, groups=self.groups)

    @property
    def selectivity(self) -> Estimate:
        """The score above that of the control task (Hewitt and Liang 2019, arXiv 1909.03368).

        Raises:
            InputError: the control task was left out.
        """
        return replace(self.over(CONTROL_TASK), name="selectivity")

    @property
    def pvalue(self) -> float:
        """How often shuffled labels are read as well: (1 + those) / (1 + all); nan without any."""
        if not len(self.shuffled):
            return float("nan")
        return permutation_pvalue(self.score.value, self.shuffled)

    @property
    def direction(self) -> Float[np.ndarray, "..."]:
        """Where the label grows, in the states' own coordinates, learned from all rows: (d_model,)
        for two classes, towards the second, and for quantities; else (class, d_model). With steps
        side by side (..., step, d_model). For `il.Steer`, `il.Project` and erasing.

        Raises:
            InputError: the kind of probe is not linear.
        """
        found = self.probe.direction_
        return found if self.n_steps == 1 else found.reshape(*found.shape[:-1], self.n_steps, -1)

    def verdict(self) -> Decoding:
        """ "decodable" if the score is above chance, above shuffled labels (p < 0.05) and above the
        control task (p < 0.05); "untested" if one of the latter two was left out."""
        if not len(self.shuffled) or CONTROL_TASK not in self.beside:
            return "untested"
        return "not decodable" if self._failed() else "decodable"

    def summary(self) -> str:
        """What was found, in two or three sentences. It says what can be read, never what for."""
        verdict, score = self.verdict(), self.score
        said = (
            f"{self.label} is {verdict} from {self.where} ({self.kind} probe)"
            if verdict != "untested"
            else f"{self.label} from {self.where} ({self.kind} probe) is untested"
        )
        numbers = (
            f"{score.name} {_number(score)} on held-out {self._units}, chance {self.chance:.2f}"
        )
        if len(self.shuffled):
            numbers += f", shuffled labels {self.shuffled.mean():.2f} (p = {self.pvalue:.3g})"
        if CONTROL_TASK in self.beside:
            numbers += f", selectivity {_number(self.selectivity)}"
        sentences = [f"{said}: {numbers}"]
        if verdict == "not decodable":
            sentences.append(
                f"It is not above {', '.join(self._failed())}; with {score.n} rows, up to "
                f"{score.ci().high:.2f} cannot be ruled out"
            )
        if verdict == "untested":
            sentences.append("Without shuffled labels and a control task nothing is claimed")
        sentences += self._read_elsewhere()
        sentences.append("That a label can be read does not say that the model uses it")
        return ". ".join(each[0].upper() + each[1:] for each in sentences) + "."

    def confusion(self) -> Confusion:
        """How often each class was read as each.

        Raises:
            InputError: the labels are quantities.
        """
        classes = self._classes()
        counts = np.zeros((len(classes), len(classes)), dtype=np.int64)
        np.add.at(counts, (self._codes(self.y), self._codes(self.predictions)), 1)
        return Confusion(counts, classes)

    def calibration(self, *, bins: int = 10) -> Calibration:
        """Whether the probabilities mean what they say: reliability by bin, and Brier's score.

        Raises:
            InputError: the labels are quantities, or there are no bins.
        """
        classes, shares = self._classes(), self.probabilities
        assert shares is not None
        if bins < 1:
            raise InputError(f"{bins} bins came; use 1 or more")
        truth = np.eye(len(classes))[self._codes(self.y)]
        top = shares.max(1)
        where = np.minimum((top * bins).astype(int), bins - 1)
        counts = np.bincount(where, minlength=bins)
        there = counts > 0
        said = np.bincount(where, top, bins)[there] / counts[there]
        was = np.bincount(where, self._reached, bins)[there] / counts[there]
        ece = float((np.abs(said - was) * counts[there]).sum() / len(top))
        squared = ((shares - truth) ** 2).sum(1)
        brier = replace(Estimate.mean(squared, name="Brier", groups=self.groups), null=None)
        return Calibration(said, was, counts[there], ece, brier)

    def save(self, folder: str | Path) -> Path:
        """Write the result and its probe to a folder: safetensors, JSON and a card; no pickle.

        Raises:
            InputError: a label is neither a string nor a number.
        """
        from imaginelens.probes.saving import save

        return save(self, Path(folder))

    def push_to_hub(
        self,
        repo_id: str,
        *,
        private: bool = False,
        token: str | None = None,
        license: str | None = None,
    ) -> Address:
        """Put the saved result on the Hugging Face Hub and return its address.

        The labels, predictions and groups of all rows go along, for the intervals need them.

        Args:
            license: the Hub's word for it, such as "mit"; the card names none if left out.

        Raises:
            CheckpointError: the Hub cannot be reached, or one may not write there.
        """
        from imaginelens.probes.saving import push

        return push(self, repo_id, private=private, token=token, license=license)

    @staticmethod
    def from_pretrained(name: str | Path, *, revision: str | None = None) -> "ProbeResult":
        """Read what `save` or `push_to_hub` wrote, from a folder or the Hub.

        Raises:
            CheckpointError: nothing of the kind is there, or it is torn.
        """
        from imaginelens.probes.saving import from_pretrained

        return from_pretrained(name, revision=revision)

    def __repr__(self) -> str:
        lines = [f"{self.label}: {self.verdict()}   ({self.kind} probe, {self.where})"]
        lines += [f"  {name:<16} {number}   {beside}" for name, number, beside in self.table()]
        return "\n".join([line.rstrip() for line in lines] + [f"  note: {n}" for n in self.notes])

    def table(self) -> list[tuple[str, str, str]]:
        """The score and each control in words: its name, its value with a 95% interval, and what
        it is held against."""
        score, kinds = self.score, "quantity"
        if self.classes is not None:
            kinds = f"{len(self.classes)} classes, chance {self.chance:.3f}"
        rows = [(score.name, _number(score, 3), f"n={score.n}, {kinds}")]
        for name, each in self.controls.items():
            beside = ""
            if name == SHUFFLED:
                beside = f"p={self.pvalue:.3g} of {len(self.shuffled)} shuffles"
            elif name in self.beside:
                beside = f"probe is above by {_number(self.over(name), 3)}"
            rows.append((name, _number(each, 3), beside))
        return rows

    def _repr_html_(self) -> str:
        from imaginelens.view.result_cards import probe_card

        return probe_card(self)

    @cached_property
    def _reached(self) -> Float[np.ndarray, " row"]:
        if self.classes is None:
            return np.asarray(self.baseline - (self.predictions - self.y) ** 2)
        return (self.predictions == self.y).astype(np.float64)

    @property
    def _units(self) -> str:
        return "rows" if self.groups is None else "groups"

    def _estimate(self, reached: Float[np.ndarray, " row"], name: str) -> Estimate:
        if self.classes is None:
            return Estimate.ratio(reached, self.baseline, name=name, groups=self.groups)
        return Estimate.share(reached, name=name, groups=self.groups, chance=self.chance)

    def _failed(self) -> list[str]:
        """What the score is not above."""
        score, above = self.score, self.over(CONTROL_TASK)
        failed = [f"chance ({self.chance:.2f})"] * (score.value <= self.chance or not _real(score))
        failed += [f"shuffled labels (p = {self.pvalue:.2g})"] * (not self.pvalue < LEVEL)
        rate = self.controls[CONTROL_TASK].value
        return failed + [f"the control task ({rate:.2f})"] * (above.value <= 0 or not _real(above))

    def _read_elsewhere(self) -> list[str]:
        """One sentence on the controls that are states of their own."""
        others = [name for name in self.beside if name != CONTROL_TASK]
        as_well = [n for n in others if self.over(n).value <= 0 or not _real(self.over(n))]
        less = [name for name in others if name not in as_well]
        said = []
        if as_well and self.verdict() != "not decodable":
            listed = " and ".join(f"{n} ({self.controls[n].value:.2f})" for n in as_well)
            said.append(f"But it is read as well from {listed}")
        if less:
            listed = ", ".join(f"{name} ({self.controls[name].value:.2f})" for name in less)
            said.append(f"It is read less well from {listed}")
        return said

    def _classes(self) -> tuple[Any, ...]:
        if self.classes is None:
            raise InputError("the labels are quantities, and this is about classes; use .r2")
        return self.classes

    def _codes(self, labels: Shaped[np.ndarray, " row"]) -> Int[np.ndarray, " row"]:
        assert self.probe.classes_ is not None
        return np.searchsorted(self.probe.classes_, labels)


def _real(estimate: Estimate) -> bool:
    return estimate.pvalue() < LEVEL


def _number(estimate: Estimate, digits: int = 2) -> str:
    interval = estimate.ci()
    if interval.unbounded:
        return f"{estimate.value:.{digits}f} {interval}"
    return f"{estimate.value:.{digits}f} [{interval.low:.{digits}f}, {interval.high:.{digits}f}]"
