"""What the arms did: effects with intervals, which reading was followed, one table, one figure."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from examples.capimagine.arms import ARMS, Arm, Context, Form
from examples.capimagine.scores import Share
from imaginelens.estimates import Estimate, EstimateError

MARGIN = 0.05  # of accuracy: what counts as no effect
NEUTRAL = "other instance"  # what targeted arms are compared with: as much taken away, and no aim
Answers = tuple[str | None, ...]


@dataclass(frozen=True)
class Outcome:
    """What one arm did in one context.

    Attributes:
        answers: with the edit; None where none was found.
        touched: whether it changed anything in an example.
        readings: the answer that each reading of what was put there leads to.
        again: share of the replies that, with the imagination removed, wrote the end of one all
            the same: it was only written elsewhere. nan where there is nothing to tell.
        error: why it could not be done; "" if it could.
    """

    arm: str
    context: Context
    answers: Answers
    touched: tuple[bool, ...]
    readings: Mapping[str, Answers]
    again: float = math.nan
    error: str = ""


@dataclass(frozen=True)
class Studied:
    """All that was measured of one model.

    Attributes:
        truths: the right answers; `unedited`: what it answers by itself.
        seconds, tokens: medians of the decode stage of one example at a time, unedited.
    """

    name: str
    form: Form
    truths: tuple[str, ...]
    unedited: Answers
    outcomes: tuple[Outcome, ...]
    seconds: float
    tokens: float

    def outcome(self, arm: str, context: Context = "free") -> Outcome | None:
        """What an arm did; None if it is nothing for this model."""
        found = (o for o in self.outcomes if (o.arm, o.context) == (arm, context) and not o.error)
        return next(found, None)

    @property
    def accuracy(self) -> Share:
        """Of the unedited model."""
        return Share.of([a == t for a, t in zip(self.unedited, self.truths, strict=True)])

    def changed(self, arm: str, context: Context = "free") -> Share | None:
        """How many answers are others than without the edit; those not found count as others."""
        outcome = self.outcome(arm, context)
        if outcome is None:
            return None
        pairs = zip(outcome.answers, self.unedited, strict=True)
        return Share.of([a != b for a, b in pairs])

    def change(self, arm: str, context: Context = "free") -> Estimate | None:
        """The paired change of accuracy; examples without an answer are missing."""
        outcome = self.outcome(arm, context)
        if outcome is None:
            return None
        return self._paired(
            self._right(outcome.answers), self._right(self.unedited), f"accuracy, {arm}"
        )

    def beyond_neutral(self, arm: str, context: Context = "free") -> Estimate | None:
        """The accuracy under a targeted arm minus that under the neutral one, paired."""
        outcome, neutral = self.outcome(arm, context), self.outcome(NEUTRAL, context)
        if outcome is None or neutral is None or not outcome.readings:
            return None
        name = f"accuracy, {arm} minus {NEUTRAL}"
        return self._paired(self._right(outcome.answers), self._right(neutral.answers), name)

    def aimed(self, arm: str, context: Context = "free") -> Estimate | None:
        """How much more often the aimed answer is given than under the neutral arm, paired.

        The aim is the reading that is followed most, where one is followed; else the content.
        """
        outcome, neutral = self.outcome(arm, context), self.outcome(NEUTRAL, context)
        if outcome is None or neutral is None or not outcome.readings:
            return None
        followed = self.follows(arm, context)
        aims = outcome.readings.get(followed) if followed != "own" else None
        aims = aims or next(iter(outcome.readings.values()))

        def hits(answers: Answers) -> np.ndarray:
            both = zip(answers, aims, strict=True)
            return np.array([math.nan if g is None else float(a == g) for a, g in both])

        name = f"aimed answer, {arm} minus {NEUTRAL}"
        return self._paired(hits(outcome.answers), hits(neutral.answers), name)

    def decisive(self, arm: str, context: Context = "free") -> np.ndarray:
        """The examples in which all readings of an arm lead to different answers."""
        outcome = self.outcome(arm, context)
        if outcome is None or not outcome.readings:
            return np.zeros(len(self.truths), dtype=bool)
        rows = zip(*outcome.readings.values(), strict=True)
        return np.array([None not in row and len(set(row)) == len(row) for row in rows])

    def followed(self, arm: str, context: Context = "free") -> dict[str, Share]:
        """For each reading, in how many decisive examples its answer was given."""
        outcome, rows = self.outcome(arm, context), self.decisive(arm, context)
        if outcome is None:
            return {}
        return {
            reading: Share.of([outcome.answers[i] == answers[i] for i in np.flatnonzero(rows)])
            for reading, answers in outcome.readings.items()
        }

    def follows(self, arm: str, context: Context = "free") -> str:
        """The reading that is surely followed in more than half of the decisive examples; `own` is
        the base's own answer, which is what a model gives that reads nothing. "mixed" if none is,
        "" if there is nothing to follow."""
        shares = self.followed(arm, context)
        if not shares or not next(iter(shares.values())).n:
            return ""
        return next((r for r, share in shares.items() if share.n > 1 and share.low > 0.5), "mixed")

    def _right(self, answers: Answers) -> np.ndarray:
        pairs = zip(answers, self.truths, strict=True)
        return np.array([math.nan if a is None else float(a == t) for a, t in pairs])

    @staticmethod
    def _paired(after: np.ndarray, before: np.ndarray, name: str) -> Estimate | None:
        try:
            return Estimate.paired(after, before, name=name)
        except EstimateError:
            return None

    def record(self, arm: Arm, context: Context) -> dict[str, Any] | None:
        """All numbers of an arm, for a file or a table."""
        outcome = self.outcome(arm.name, context)
        if outcome is None:
            return None
        changed = self.changed(arm.name, context)
        found = {
            "model": self.name,
            "form": self.form,
            "arm": arm.name,
            "kind": arm.kind,
            "context": context,
            "n": len(self.truths),
            "touched": float(np.mean(outcome.touched)),
            "again": outcome.again,
            "answered": float(np.mean([a is not None for a in outcome.answers])),
            "changed": None if changed is None else vars(changed),
            "followed": {r: vars(share) for r, share in self.followed(arm.name, context).items()},
            "follows": self.follows(arm.name, context),
        }
        for name, estimate in (
            ("change", self.change(arm.name, context)),
            ("beyond_neutral", self.beyond_neutral(arm.name, context)),
            ("aimed", self.aimed(arm.name, context)),
        ):
            found[name] = None if estimate is None else _told(estimate)
        return found


def _told(estimate: Estimate) -> dict[str, Any]:
    interval = estimate.ci()
    return {
        "value": estimate.value,
        "low": interval.low,
        "high": interval.high,
        "pvalue": estimate.pvalue(),
        "verdict": estimate.verdict(margin=MARGIN),
        "n": estimate.n,
        "missing": estimate.missing,
    }


@dataclass(frozen=True)
class Compared:
    """Models side by side: rows are arms, columns are models.

    Attributes:
        notes: what a reader must know.
    """

    models: tuple[Studied, ...]
    contexts: tuple[Context, ...] = ("free", "fixed")
    notes: tuple[str, ...] = ()

    @classmethod
    def read(cls, paths: Sequence[Path]) -> "Compared":
        """Put together what `causal.py` wrote of several models, each in its own `causal.json`."""
        found = [json.loads(path.read_text(encoding="utf-8")) for path in paths]
        models = tuple(_studied(model) for one in found for model in one["models"])
        contexts = dict.fromkeys(o.context for model in models for o in model.outcomes)
        notes = dict.fromkeys(note for one in found for note in one["notes"])
        return cls(models, tuple(contexts), tuple(notes))

    def __getitem__(self, name: str) -> Studied:
        return next(model for model in self.models if model.name == name)

    @property
    def records(self) -> list[dict[str, Any]]:
        """All numbers, one record for each model, arm and context that there is."""
        found = (
            model.record(arm, context)
            for context in self.contexts
            for arm in ARMS
            for model in self.models
        )
        return [record for record in found if record is not None]

    def table(self) -> str:
        """The table in Markdown; a dash is what there is not for a model."""
        heads = [f"{m.name} ({m.form})" for m in self.models]
        lines = []
        for context in self.contexts:
            lines += [
                f"| {context} context | {' | '.join(heads)} |",
                f"|-|{'-|' * len(heads)}",
                f"| unedited accuracy | {' | '.join(str(m.accuracy) for m in self.models)} |",
            ]
            for arm in ARMS:
                cells = [_cell(model, arm, context) for model in self.models]
                if any(cell != "-" for cell in cells):
                    lines.append(f"| {arm.kind}: {arm.name} | {' | '.join(cells)} |")
            for arm in ARMS:
                cells = [_difference(model, arm, context) for model in self.models]
                if any(cell != "-" for cell in cells):
                    lines.append(f"| {arm.name} minus {NEUTRAL} | {' | '.join(cells)} |")
            lines.append("")
        seconds = [f"{m.seconds:.3f} s, {m.tokens:.0f} tokens" for m in self.models]
        lines += [
            f"| one example, decode stage | {' | '.join(heads)} |",
            f"|-|{'-|' * len(heads)}",
            f"| median | {' | '.join(seconds)} |",
            "",
        ]
        return "\n".join([*lines, *(f"- {note}" for note in self.notes)])

    def figure(self, context: Context = "free") -> Any:
        """The change of accuracy under every arm of every model, with the margin of no effect."""
        from imaginelens.view import forest

        estimates = {
            f"{arm.name}: {model.name}": estimate
            for arm in ARMS
            for model in self.models
            if arm.kind != "control" and (estimate := model.change(arm.name, context)) is not None
        }
        title = f"Change of accuracy when imagination is edited, {context} context"
        return forest(estimates, margin=MARGIN, span=(-1.05, 0.25), title=title)

    def to_json(self) -> dict[str, Any]:
        """The numbers, and every answer behind them."""
        return {
            "margin": MARGIN,
            "neutral": NEUTRAL,
            "notes": list(self.notes),
            "arms": [vars(arm) for arm in ARMS],
            "records": self.records,
            "models": [
                {
                    "name": m.name,
                    "form": m.form,
                    "accuracy": vars(m.accuracy),
                    "seconds": m.seconds,
                    "tokens": m.tokens,
                    "truths": m.truths,
                    "unedited": m.unedited,
                    "outcomes": [{**vars(o), "readings": dict(o.readings)} for o in m.outcomes],
                }
                for m in self.models
            ],
        }


def _studied(record: Mapping[str, Any]) -> Studied:
    """A model of `to_json` again."""
    outcomes = tuple(
        Outcome(
            o["arm"],
            o["context"],
            tuple(o["answers"]),
            tuple(o["touched"]),
            {reading: tuple(answers) for reading, answers in o["readings"].items()},
            math.nan if o["again"] is None else o["again"],
            o["error"],
        )
        for o in record["outcomes"]
    )
    kept = {key: record[key] for key in ("name", "form", "seconds", "tokens")}
    answers: dict[str, Any] = {key: tuple(record[key]) for key in ("truths", "unedited")}
    return Studied(outcomes=outcomes, **kept, **answers)


def _cell(model: Studied, arm: Arm, context: Context) -> str:
    outcome = model.outcome(arm.name, context)
    if outcome is None:
        return "-"
    if arm.kind == "control":
        moved = sum(a != b for a, b in zip(outcome.answers, model.unedited, strict=True))
        return f"{moved} of {len(model.truths)} answers changed"
    change, changed = model.change(arm.name, context), model.changed(arm.name, context)
    parts = []
    if change is not None:
        interval = change.ci()
        parts.append(
            f"{change.value:+.2f} [{interval.low:+.2f}, {interval.high:+.2f}] "
            f"{change.verdict(margin=MARGIN)}"
        )
    if changed is not None:
        parts.append(f"changed {changed.value:.0%}")
    shares = model.followed(arm.name, context)
    told = [f"{reading} {share.value:.0%}" for reading, share in shares.items() if share.n]
    if told:
        n = next(iter(shares.values())).n
        parts.append(f"{', '.join(told)} of {n}: {_in_words(model, arm, context)}")
    if None in outcome.answers:
        parts.append(f"answered {np.mean([a is not None for a in outcome.answers]):.0%}")
    if outcome.again > 0:
        parts.append(f"imagined again {outcome.again:.0%}")
    if not all(outcome.touched):
        parts.append(f"touched {np.mean(outcome.touched):.0%}")
    return "; ".join(parts)


def _difference(model: Studied, arm: Arm, context: Context) -> str:
    aimed, accuracy = model.aimed(arm.name, context), model.beyond_neutral(arm.name, context)
    parts = [
        f"{what} {estimate.value:+.2f} {estimate.ci()}"
        for what, estimate in (("aimed answer", aimed), ("accuracy", accuracy))
        if estimate is not None
    ]
    return "; ".join(parts) or "-"


def _in_words(model: Studied, arm: Arm, context: Context) -> str:
    words = {
        "own": "keeps its own",
        "followed": "follows it",
        "content": "follows it",
        "pointer": "follows it as a pointer",
    }
    follows = model.follows(arm.name, context)
    return words.get(follows, follows)


def merged(parts: Sequence[Sequence[Outcome]]) -> tuple[Outcome, ...]:
    """The outcomes of several batches as those of one; an arm that failed in one has failed."""
    found = []
    keys = dict.fromkeys((o.arm, o.context) for part in parts for o in part)
    for arm, context in keys:
        own = [o for part in parts for o in part if (o.arm, o.context) == (arm, context)]
        errors = [o.error for o in own if o.error] or (
            [] if len(own) == len(parts) else ["it could not be done in every batch"]
        )
        found.append(
            Outcome(
                arm,
                context,
                tuple(a for o in own for a in o.answers),
                tuple(t for o in own for t in o.touched),
                {r: tuple(a for o in own for a in o.readings[r]) for r in own[0].readings},
                float(np.average([o.again for o in own], weights=[len(o.answers) for o in own])),
                errors[0] if errors else "",
            )
        )
    return tuple(found)
