"""Beyond the paper: the same interventions on words and on latents, neutral and targeted."""

from collections.abc import Mapping
from typing import Any

import imaginelens as il
from examples.reproduce.do_z import measurable
from examples.reproduce.exhibit import Arms, Cell, Exhibit, Measured, of, percent
from examples.reproduce.subjects import Subject
from imaginelens.hooks.errors import InputError
from imaginelens.hooks.metrics import same

SETS = ("vstar", "hrbench4k", "mme-realworld-lite", "vsp")
CHANGED = "answers changed, %"
SHAM, DROPPED, OTHER, TARGET = (
    "own, put back", "taken away", "of another example, drawn", "of a donor with another answer"
)  # fmt: skip


def measure(subject: Subject, *, n: int, seed: int) -> Measured:
    """How often answers change under four edits, in words or in latents as the model has them."""
    found: dict[str, dict[str, Cell]] = {}
    facts: dict[str, Any] = {}
    names = subject.benchmarks(SETS)
    textual = isinstance(subject.lens.family, il.TextSpec)
    kind, told = "words" if textual else "latents", list[str]()
    at = il.imagination if textual else il.latent
    for benchmark in names:
        pairs = subject.pairs(benchmark, n=n, seed=seed)
        table = il.necessity(
            subject.lens, pairs, at=at, metric=il.flip, seed=seed,
            edits=[il.Truncate() if textual else il.Zero(), il.Resample()],
            batch_size=subject.settings.batch_size,
        )  # fmt: skip
        gone, other = table.rows[:2]
        alike = pairs.select(_alike(subject, pairs, textual=textual))
        told.append(f"{len(alike)} of {len(pairs)} pairs have a donor with as many {kind}; "
                    "only these are swapped")  # fmt: skip
        after, before = _swapped(subject, alike, at)
        changed = [not same(a, b) for a, b in zip(after, before, strict=True)]
        followed = [same(a, s) for a, s in zip(after, alike.source_answers, strict=True)]
        found[benchmark if len(names) > 1 else ""] = {
            f"{SHAM}: {CHANGED}": of(table.sham.change, scale=100),
            f"{DROPPED}: {CHANGED}": _changed(gone),
            f"{OTHER}: {CHANGED}": _changed(other),
            f"{TARGET}: {CHANGED}": percent(changed),
            f"{TARGET}: answers that become the donor's, %": percent(followed),
        }
        facts = {"targeted": sum(changed) / len(changed), "donor": sum(followed) / len(followed)}
        facts |= {"dropped": gone.change.value} if measurable(gone) else {}
    return Measured(found, tuple(told), facts=facts | {"kind": kind})


def _changed(row: Any) -> Cell:
    """How many answers an edit changes; an edit may leave none to compare."""
    return of(row.change, scale=100) if measurable(row) else "too few answers found"


def _alike(subject: Subject, pairs: il.Pairs, *, textual: bool) -> list[int]:
    """The pairs of which base and source feed as many latents back, or write as many spans.

    Raises:
        InputError: there are none.
    """
    how, counts = subject.settings, list[list[int]]()
    for side in (pairs.base, pairs.source):
        found = list[int]()
        for start in range(0, len(side), how.batch_size):
            batch = list(side[start : start + how.batch_size])
            run = subject.lens.run(batch, max_new_tokens=how.max_new_tokens)
            spans = [text.count(subject.lens.family.open) for text in run.texts] if textual else []
            found += spans or run.trigger.emitted
        counts.append(found)
    rows = [i for i, (one, other) in enumerate(zip(*counts, strict=True)) if one == other > 0]
    if not rows:
        raise InputError(
            f"no pair of {len(pairs)} has a base and a source with as many spans or latents, so "
            "that nothing can be swapped; look at the exhibit fig2a"
        )
    return rows


def _swapped(subject: Subject, pairs: il.Pairs, at: Any) -> tuple[list[Any], list[Any]]:
    """What is answered with the source's words or latents, and without them."""
    after, before, size = list[Any](), list[Any](), subject.settings.batch_size
    for start in range(0, len(pairs), size):
        batch = pairs[start : start + size]
        result = subject.lens.swap(
            batch.base, batch.source, at=at, metric=il.kl, base_answers=list(batch.base_answers),
            source_answers=list(batch.source_answers),
        )  # fmt: skip
        after += result.answers_after
        before += result.answers_before
    return after, before


def compare(found: Mapping[str, Measured]) -> list[str]:
    """What words and latents lose under the same."""
    return [
        f"{name} ({one.facts['kind']}): {_dropped(one.facts)} when they are taken away; with a "
        f"donor's {100 * one.facts['targeted']:.0f}% change, and {100 * one.facts['donor']:.0f}% "
        "become the donor's answer"
        for name, one in found.items()
    ]


def _dropped(facts: Mapping[str, Any]) -> str:
    if "dropped" not in facts:
        return "too few answers are left to compare"
    return f"{100 * facts['dropped']:.0f}% of answers change"


EXHIBIT = Exhibit(
    name="matched",
    title="Beyond the paper: the same edits of words and latents",
    asks="The paper misleads words and blanks latents. What do both do under both?",
    answers=("i: taken away, of another example, and of a donor with another answer, on words and "
             "latents alike, with the sham of each",),
    limits=("'taken away' leaves an empty pair of markers of words, and zeros for latents, which "
            "stay as positions",
            "that an answer changes does not make it the donor's: words and latents that point "
            "into the picture are looked up in the base's"),
    organisms=("text", "latent-content", "latent-pointer", "latent-ignored",
               "latent-ignored-aligned"),
    families=("monet", "monet-vllm", "lvr", "lvr-latent-end", "mirage", "capimagine"),
    benchmarks=SETS,
    size="beyond",
    unit="% of answers, 95% interval",
    measure=measure,
    compare=compare,
    arms=Arms(generations=8),
)  # fmt: skip
