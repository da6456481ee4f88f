"""Table 3: imagination in words, rewritten so that it leads to a wrong conclusion.

Neutral controls stand beside it, which the paper has none of: the words shuffled, another
example's, none at all.
"""

from collections.abc import Mapping
from typing import Any

import imaginelens as il
from examples.reproduce.exhibit import Arms, Cell, Exhibit, Measured, of, percent
from examples.reproduce.subjects import Subject
from imaginelens.hooks.errors import InputError
from imaginelens.hooks.metrics import same

WHOLE, WRONG, FOLLOW = "as imagined", "do(Z): rewritten toward a wrong conclusion", "follows it, %"
CONTROLS = {
    "shuffled": il.Shuffle(), "of another example": il.Resample(), "emptied": il.Truncate(),
    "deleted (it may be imagined anew)": il.Delete(),
}  # fmt: skip
SETS = {"vstar": "V*", "hrbench4k": "HR-Bench-4K"}


def measure(subject: Subject, *, n: int, seed: int) -> Measured:
    """Accuracy as imagined, rewritten, and under neutral edits."""
    columns: dict[str, dict[str, Cell]] = {}
    names, facts, told = subject.benchmarks(tuple(SETS)), dict[str, Any](), list[str]()
    for benchmark in names:
        pairs = subject.pairs(benchmark, n=n, seed=seed)
        wanted, rewrite = misleading(subject, pairs, seed=seed)
        found = il.necessity(
            subject.lens, pairs, edits=[rewrite, *CONTROLS.values()], at=il.imagination,
            batch_size=subject.settings.batch_size, seed=seed,
        )  # fmt: skip
        wrong, *controls = found.rows
        column: dict[str, Cell] = {
            WHOLE: percent(wrong.before),
            WRONG: percent(wrong.after),
            "change, points": of(wrong.change, scale=100),
        }
        if wanted is not None:
            follows = [same(a, w) for a, w in zip(wrong.answers, wanted, strict=True)]
            column[FOLLOW] = percent(follows)
            facts["follows"] = sum(follows) / len(follows)
        for name, row in zip(CONTROLS, controls, strict=False):
            column[f"{name}, change in points"] = of(row.change, scale=100)
        columns[SETS[benchmark] if len(names) > 1 else ""] = column
        facts |= {"before": float(wrong.before.mean()), "after": float(wrong.after.mean())}
        told += [f"the sham changed {found.sham.change.value:g}", *found.notes]
    return Measured(columns, tuple(told), facts=facts)


def misleading(
    subject: Subject, pairs: il.Pairs, *, seed: int
) -> tuple[list[str] | None, il.Rewrite]:
    """Imagination that misleads, and what an organism should then answer.

    An organism writes the names of the cards it visits; here the last one becomes a card with
    another shape. Other models take a rewriter, which is asked with a prompt of ours.
    """
    if subject.organism:
        told = [_elsewhere(example["hunt"]) for example in pairs.base]
        return [answer for _, answer in told], il.Rewrite([text for text, _ in told])
    if subject.rewriter is None:
        raise InputError(f"{subject.name} names no rewriter; add [rewriter] to its config")
    return None, il.Rewrite(Rewriting(subject, pairs, seed))


def _elsewhere(hunt: Any) -> tuple[str, str]:
    """The names on the way, with a last card of another shape, and that shape."""
    others = [name for name in hunt.names if hunt.shape_of(name) != hunt.answer]
    last = others[hunt.noise % len(others)]
    return " ".join([*hunt.path[1:-1], last]), hunt.shape_of(last)


class Rewriting:
    """What the rewriter makes of each piece of imagination, asked once for each."""

    def __init__(self, subject: Subject, pairs: il.Pairs, seed: int) -> None:
        self.rewriter = subject.rewriter
        self.made: dict[str, str] = {}
        self.known = self._imagined(subject, pairs, seed)

    def _imagined(self, subject: Subject, pairs: il.Pairs, seed: int) -> Mapping[str, Any]:
        """By what was imagined, the question and its answer."""
        found, how = dict[str, Any](), subject.settings
        spec = subject.lens.family
        for start in range(0, len(pairs), how.batch_size):
            batch = pairs[start : start + how.batch_size]
            run = subject.lens.run(list(batch.base), max_new_tokens=how.max_new_tokens, seed=seed)
            for row, text in enumerate(run.texts):
                for piece in text.split(spec.open)[1:]:
                    old = piece.split(spec.close)[0].strip()
                    found[old] = (batch.base[row]["text"], batch.base_answers[row])
        return found

    def __call__(self, old: str) -> str:
        """The rewritten piece; one that was written only after an edit is asked without answer."""
        if old not in self.made:
            question, answer = self.known.get(old, ("", ""))
            self.made[old] = self.rewriter(question, old, answer)
        return self.made[old]


def compare(found: Mapping[str, Measured]) -> list[str]:
    """How far the words are followed."""
    return [
        f"{name}: {100 * one.facts['before']:.0f}% right as imagined, "
        f"{100 * one.facts['after']:.0f}% after rewriting, and "
        f"{100 * one.facts['follows']:.0f}% of answers are what the rewritten words say"
        for name, one in found.items()
        if "follows" in one.facts
    ]


EXHIBIT = Exhibit(
    name="table3",
    title="do(Z) on imagination in words",
    covers=("Table 3",),
    asks="Does the answer follow the imagined words when they are rewritten to mislead?",
    paper={
        "paper, CapImagine-7B on V*": {WHOLE: 85.9, WRONG: 22.5, "change, points": -63.4},
        "paper, on V* attributes": {WHOLE: 87.8, WRONG: 20.0, "change, points": -67.8},
        "paper, on V* spatial": {WHOLE: 82.9, WRONG: 26.3, "change, points": -56.6},
        "paper, CapImagine-7B on HR-Bench-4K": {WHOLE: 74.1, WRONG: 24.0, "change, points": -50.1},
        "paper, on HR-Bench-4K FSP": {WHOLE: 88.5, WRONG: 20.0, "change, points": -68.5},
        "paper, on HR-Bench-4K FCP": {WHOLE: 59.8, WRONG: 28.0, "change, points": -31.8},
    },
    reports=("answers are removed, Qwen3-32B rewrites the imagination so that it leads to an "
             "incorrect conclusion, and the model completes the corrupted trace",),
    unknown=("the rewriter's prompt (ours: rewriter.py)", "decoding parameters",
             "whether the words outside of the markers were rewritten, too",
             "what a neutral rewriting changes; there is no such control"),
    limits=("words are rewritten to mislead, latents are replaced by something uninformative "
            "(`table4`): the two drops are not of the same intervention; see `matched`",),
    arithmetic=("22.5 is 43/191",),
    answers=("i: neutral edits of the words stand beside the misleading one, and `matched` applies "
             "both kinds to words and to latents",),
    organisms=("text",),
    families=("capimagine",),
    benchmarks=tuple(SETS),
    n=191,
    unit="accuracy in %, 95% interval",
    measure=measure,
    compare=compare,
    arms=Arms(generations=7),
)  # fmt: skip
