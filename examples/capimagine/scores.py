"""What predictions are worth: accuracies with intervals, with and without a judge, never mixed.

The accuracy without a judge counts what the matcher could not read as wrong, as VLMEvalKit does;
the parse coverage says how much that was. With a judge, only those replies go to it. Intervals are
Wilson's (95%), adjusted for questions that come several times; the interval of an unweighted mean
of sub-splits is put together from theirs (MOVER: Zou and Donner, Statistics in Medicine 2008).
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from examples.capimagine.benchmark_layouts import BENCHMARKS
from examples.capimagine.judging import Judge
from examples.capimagine.matcher import LETTERS, Match, match, same
from imaginelens.estimates import Estimate

MARGIN = 0.05  # what counts as no change of accuracy


@dataclass(frozen=True)
class Prediction:
    """One reply to one question, with all that scoring it takes.

    Attributes:
        id, split, group: of the question.
        do: what was done to the imagination; "none" for nothing.
        question, options, lettered, truth: what was asked, and the right answer.
        reply: what the model wrote, special tokens and all.
        emitted: how many latents it fed back, or how many spans of imagination it wrote.
        touched: whether `do` changed anything in this example; False where nothing was emitted.
        tokens: how many it wrote, latents included.
        seconds: of the decode stage: from the first token that was chosen to the last. None where
            words were edited, and the reply written several times.
    """

    id: str
    split: str
    do: str
    question: str
    options: tuple[str, ...]
    lettered: bool
    truth: str
    reply: str
    emitted: int
    touched: bool
    tokens: int
    seconds: float | None
    group: str = ""

    @property
    def match(self) -> Match:
        """What the matcher reads from the reply."""
        return match(self.reply, self.options, lettered=self.lettered)

    def right(self, answer: str | None) -> bool:
        """Whether an answer is the right one."""
        if answer is None:
            return False
        return answer == self.truth if self.options else _same_list(answer, self.truth)

    def record(self) -> dict[str, Any]:
        """As JSON holds it; what the matcher reads is there for people."""
        found = self.match
        return {**asdict(self), "answer": found.answer, "rule": found.rule}

    @classmethod
    def of(cls, record: Mapping[str, Any]) -> "Prediction":
        """The prediction of a record.

        Raises:
            KeyError: the record is of something else.
        """
        fields = {name: record[name] for name in cls.__dataclass_fields__}
        return cls(**{**fields, "options": tuple(fields["options"])})


def _same_list(answer: str, truth: str) -> bool:
    """Whether two open answers are the same, where one may list several with `|`."""
    wanted = [part for part in truth.split("|") if part.strip()]
    if len(wanted) < 2:
        return same(answer, truth)
    given = [part for part in answer.replace(" and ", "|").replace(",", "|").split("|") if part]
    return len(given) == len(wanted) and all(any(same(g, w) for g in given) for w in wanted)


@dataclass(frozen=True)
class Share:
    """A share with its 95% interval; nan where there are too few questions for one."""

    value: float
    low: float
    high: float
    n: int

    @classmethod
    def of(cls, hits: Sequence[bool], groups: Sequence[str] | None = None) -> "Share":
        """Wilson's interval of some hits; groups of dependent ones widen it."""
        n = len(hits)
        if n < 2:
            return cls(float(hits[0]) if n else math.nan, 0.0, 1.0, n)
        many = groups is not None and len(set(groups)) >= 10 and len(set(groups)) < n
        estimate = Estimate.share(np.array(hits, float), groups=groups if many else None)
        interval = estimate.ci()
        return cls(estimate.value, interval.low, interval.high, n)

    @classmethod
    def mean(cls, shares: Sequence["Share"]) -> "Share":
        """The unweighted mean of independent shares.

        >>> Share.mean([Share(0.5, 0.4, 0.6, 90), Share(0.7, 0.6, 0.8, 90)])
        Share(value=0.6, low=0.529..., high=0.670..., n=180)
        """
        w = 1 / len(shares)
        value = w * sum(s.value for s in shares)
        below = math.sqrt(sum((w * (s.value - s.low)) ** 2 for s in shares))
        above = math.sqrt(sum((w * (s.high - s.value)) ** 2 for s in shares))
        return cls(value, value - below, value + above, sum(s.n for s in shares))

    def __str__(self) -> str:
        return f"{self.value:.3f} [{self.low:.3f}, {self.high:.3f}]"


@dataclass(frozen=True)
class Score:
    """What one sub-split, or all of them, came to under one `do`.

    Attributes:
        accuracy: without a judge; what was not parsed is wrong.
        judged: with one; None without.
        parsed: share that the matcher read; `ambiguous`: share where a rule found no one answer.
        turned: share of questions that are right however their options are turned; None where
            there is nothing to turn.
        emission: share of examples that imagined at all.
        touched: share that the `do` changed anything in; nan without one.
        seconds: median of the decode seconds; `tokens`: of the tokens written.
    """

    do: str
    split: str
    accuracy: Share
    judged: Share | None
    parsed: Share
    ambiguous: float
    turned: Share | None
    emission: Share
    touched: float
    seconds: float
    tokens: float


@dataclass(frozen=True)
class Scored:
    """The scores of a file of predictions.

    Attributes:
        rows: for each `do` each sub-split, and then "all".
        changes: for each `do` but none: the paired change of accuracy, over all questions and over
            those whose unedited reply imagined something.
        notes: what a reader must know.
    """

    benchmark: str
    rows: tuple[Score, ...]
    changes: Mapping[tuple[str, str], Estimate]
    notes: tuple[str, ...]

    def __getitem__(self, place: tuple[str, str]) -> Score:
        """The score of a `do` in a sub-split, or in "all"."""
        return next(row for row in self.rows if (row.do, row.split) == place)

    def __str__(self) -> str:
        head = f"{'do':12} {'split':28} {'n':>5}  {'accuracy [95%]':23} {'with judge':23} "
        lines = [self.benchmark, head + "parsed  imagined  tokens  decode s"]
        alone = {do for do in (r.do for r in self.rows) if len(self._splits(do)) == 1}
        for r in self.rows:
            if r.do in alone and r.split != "all":
                continue
            judged = "-" if r.judged is None else str(r.judged)
            lines.append(
                f"{r.do:12} {r.split:28} {r.accuracy.n:5}  {r.accuracy!s:23} {judged:23} "
                f"{r.parsed.value:6.1%} {r.emission.value:9.1%} {r.tokens:7.0f} "
                f"{_shown(r.seconds):>9}"
            )
            if r.turned is not None:
                lines.append(f"{'':12} {'  right however turned':28} {r.turned.n:5}  {r.turned}")
        lines += [estimate.describe(margin=MARGIN) for estimate in self.changes.values()]
        return "\n".join([*lines, *(f"note: {note}" for note in self.notes)])

    def _splits(self, do: str) -> list[str]:
        return [r.split for r in self.rows if r.do == do and r.split != "all"]

    def to_json(self) -> dict[str, Any]:
        """All numbers, for a file."""
        return {
            "benchmark": self.benchmark,
            "rows": [asdict(row) for row in self.rows],
            "changes": [
                {
                    "do": do,
                    "over": over,
                    "change": e.value,
                    "low": e.ci().low,
                    "high": e.ci().high,
                    "pvalue": e.pvalue(),
                    "verdict": e.verdict(margin=MARGIN),
                    "margin": MARGIN,
                    "n": e.n,
                }
                for (do, over), e in self.changes.items()
            ],
            "notes": list(self.notes),
        }


def score(
    predictions: Sequence[Prediction], benchmark: str, *, judge: Judge | None = None
) -> Scored:
    """Score predictions, each `do` and each sub-split for itself.

    Args:
        judge: is asked for replies that the matcher cannot read.
    """
    found = [p.match for p in predictions]
    answers = [m.answer for m in found]
    judged = [_judged(p, a, judge) for p, a in zip(predictions, answers, strict=True)]
    table = [
        _Row(p, p.right(a), p.right(j), m)
        for p, a, j, m in zip(predictions, answers, judged, found, strict=True)
    ]
    rows: list[Score] = []
    for do in dict.fromkeys(p.do for p in predictions):
        own = [row for row in table if row.of.do == do]
        splits = list(dict.fromkeys(row.of.split for row in own))
        turned = BENCHMARKS[benchmark].turned
        parts = [
            _score([r for r in own if r.of.split == split], do, split, judge is not None, turned)
            for split in splits
        ]
        whole = _score(own, do, "all", judge is not None, turned)
        if BENCHMARKS[benchmark].overall == "splits":
            whole = replace(
                whole,
                accuracy=Share.mean([p.accuracy for p in parts]),
                judged=Share.mean([p.judged for p in parts if p.judged]) if judge else None,
            )
        rows += [*parts, whole]
    notes = [*_notes(rows, benchmark), *_unmoved(table)]
    return Scored(BENCHMARKS[benchmark].title, tuple(rows), _changes(table), tuple(notes))


def _shown(seconds: float) -> str:
    return "-" if math.isnan(seconds) else f"{seconds:.3f}"


@dataclass(frozen=True)
class _Row:
    """A prediction with what it came to."""

    of: Prediction
    right: bool
    judged: bool
    match: Match


def _judged(prediction: Prediction, answer: str | None, judge: Judge | None) -> str | None:
    """The answer, or what a judge makes of a reply that has none."""
    if answer is not None or judge is None:
        return answer
    options = prediction.options
    if prediction.lettered or not options:
        return judge(prediction.question, options, prediction.reply)
    said = judge(prediction.question, (), prediction.reply)  # in words, for none has a letter
    found = [i for i, option in enumerate(options) if said is not None and same(option, said)]
    return LETTERS[found[0]] if found else None


def _score(rows: Sequence[_Row], do: str, split: str, judged: bool, turned: bool) -> Score:
    groups = [row.of.group or row.of.id for row in rows]
    whole: dict[str, bool] = {}
    for group, row in zip(groups, rows, strict=True):
        whole[group] = whole.get(group, True) and row.right
    return Score(
        do=do,
        split=split,
        accuracy=Share.of([row.right for row in rows], groups),
        judged=Share.of([row.judged for row in rows], groups) if judged else None,
        parsed=Share.of([row.match.answer is not None for row in rows], groups),
        ambiguous=float(np.mean([row.match.ambiguous for row in rows])),
        turned=Share.of(list(whole.values())) if turned else None,
        emission=Share.of([row.of.emitted > 0 for row in rows], groups),
        touched=math.nan if do == "none" else float(np.mean([row.of.touched for row in rows])),
        seconds=float(np.median(seconds)) if (seconds := _known(rows)) else math.nan,
        tokens=float(np.median([row.of.tokens for row in rows])),
    )


def _known(rows: Sequence[_Row]) -> list[float]:
    return [row.of.seconds for row in rows if row.of.seconds is not None]


def _changes(table: Sequence[_Row]) -> dict[tuple[str, str], Estimate]:
    """What each `do` changed, of the same questions."""
    unedited = {row.of.id: row for row in table if row.of.do == "none"}
    changes = {}
    for do in dict.fromkeys(row.of.do for row in table if row.of.do not in ("none", "sham")):
        pairs = [
            (row, unedited[row.of.id]) for row in table if row.of.do == do and row.of.id in unedited
        ]
        emitters = [(after, before) for after, before in pairs if before.of.emitted]
        for over, own in (("all", pairs), ("emitters", emitters)):
            if len(own) < 2 or (over == "emitters" and len(own) == len(pairs)):
                continue
            groups = [after.of.group or after.of.id for after, _ in own]
            many = 10 <= len(set(groups)) < len(groups)
            changes[do, over] = Estimate.paired(
                [float(after.right) for after, _ in own],
                [float(before.right) for _, before in own],
                name=f"the change of accuracy under do({do}), {over}",
                groups=groups if many else None,
            )
    return changes


def _notes(rows: Sequence[Score], benchmark: str) -> list[str]:
    notes = []
    sizes = BENCHMARKS[benchmark].sizes
    for row in rows:
        if row.do == "none" and row.split in sizes and row.accuracy.n != sizes[row.split]:
            notes.append(
                f"{row.split} has {sizes[row.split]} questions, of which {row.accuracy.n} are here"
            )
        if row.split == "all" and row.parsed.value < 0.95:
            notes.append(
                f"{1 - row.parsed.value:.1%} of the replies under do({row.do}) were not parsed "
                f"({row.ambiguous:.1%} ambiguous) and count as wrong without a judge"
            )
    return notes


def _unmoved(table: Sequence[_Row]) -> list[str]:
    """Where a `do` touched examples and not one reply is another: has it landed at all?"""
    unedited = {row.of.id: row.of.reply for row in table if row.of.do == "none"}
    notes = []
    for do in dict.fromkeys(row.of.do for row in table if row.of.do != "none"):
        own = [row.of for row in table if row.of.do == do and row.of.id in unedited]
        moved = sum(p.reply != unedited[p.id] for p in own)
        if do == "sham":
            notes.append(f"the sham, the control, changed {moved} of {len(own)} replies")
        elif not any(p.touched for p in own):
            notes.append(f"do({do}) touched no example: nothing was imagined that it could change")
        elif not moved:
            notes.append(
                f"do({do}) touched {sum(p.touched for p in own)} examples, changed no word"
            )
    return notes
