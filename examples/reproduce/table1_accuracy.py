"""Table 1: accuracy, of the models and of organisms that imagine in words, in latents or not."""

from collections.abc import Mapping, Sequence
from typing import Any

from examples.reproduce.exhibit import Arms, Cell, Exhibit, Measured, percent
from examples.reproduce.subjects import HUNT, Subject
from imaginelens.hooks.metrics import same

NAMED = {
    "vstar": "V*", "hrbench4k": "HR-Bench-4K", "hrbench8k": "HR-Bench-8K",
    "mme-realworld-lite": "MME-RW-Lite", "blink": "BLINK",
}  # fmt: skip
SPLITS = ("attribute", "spatial", "FSP", "FCP", "Jigsaw", "Multi-view_Reasoning")
_ROWS = ("V*", "HR-Bench-4K", "HR-Bench-8K", "MME-RW-Lite", "BLINK Jigsaw",
         "BLINK Multi-view_Reasoning")  # fmt: skip
_PAPER = {
    "GPT-4o": (67.5, 59.0, 55.5, 52.0, 55.3, 59.4),
    "Qwen2.5-VL-7B": (76.4, 68.0, 63.8, 45.8, 62.7, 42.9),
    "PixelReasoner": (80.6, 72.9, 66.9, 49.7, None, None),
    "DeepEyes": (90.0, 75.1, 72.6, 53.2, None, None),
    "LVR-7B": (81.7, 70.8, 63.0, 50.6, 52.0, 46.6),
    "Monet-7B": (83.3, 71.0, 68.0, 46.9, 50.0, 47.4),
    "CapImagine-7B": (85.9, 74.1, 70.7, 54.8, 64.7, 49.6),
}
_SPLITS = {
    "Qwen2.5-VL-7B": {"V* attribute": 77.4, "V* spatial": 75.0, "HR-Bench-4K FSP": 80.3,
                      "HR-Bench-4K FCP": 55.8},
    "CapImagine-7B": {"V* attribute": 87.8, "V* spatial": 82.9, "HR-Bench-4K FSP": 88.5,
                      "HR-Bench-4K FCP": 59.8},
}  # fmt: skip


def measure(subject: Subject, *, n: int, seed: int) -> Measured:
    """Answer every question once, greedily, and count exact matches; not found is wrong."""
    column, told = dict[str, Cell](), list[str]()
    for benchmark in subject.benchmarks(tuple(NAMED)):
        rows, missing = accuracies(subject, benchmark, splits=SPLITS, n=n, seed=seed)
        title = NAMED.get(benchmark, HUNT)
        column |= {f"{title} {split}".strip(): cell for split, cell in rows.items()}
        told.append(f"{title}: {missing}")
    facts = {row: cell.value for row, cell in column.items() if not isinstance(cell, str)}
    return Measured({"": column}, tuple(told), facts=facts)


def accuracies(
    subject: Subject, benchmark: str, *, splits: Sequence[str], n: int, seed: int
) -> tuple[dict[str, Cell], str]:
    """Accuracy on all of a benchmark (""), and on those of the splits that it has; and what was
    not parsed."""
    pairs = subject.pairs(benchmark, n=n, seed=seed)
    answers = answers_of(subject, pairs.base, seed=seed)
    right = [same(a, wanted) for a, wanted in zip(answers, pairs.base_answers, strict=True)]
    found: dict[str, Cell] = {"": percent(right, groups=_grouped(pairs.groups))}
    for split in splits:
        rows = [i for i, example in enumerate(pairs.base) if example.get("split") == split]
        if len(rows) > 1:
            groups = None if pairs.groups is None else [pairs.groups[i] for i in rows]
            found[split] = percent([right[i] for i in rows], groups=_grouped(groups))
    missing = sum(answer is None for answer in answers)
    return found, f"no answer found in {missing} of {len(pairs)}, which count as wrong"


def answers_of(subject: Subject, examples: Sequence[Any], *, seed: int) -> list[str | None]:
    """What is answered, in batches."""
    how, found = subject.settings, list[str | None]()
    for start in range(0, len(examples), how.batch_size):
        batch = list(examples[start : start + how.batch_size])
        found += subject.lens.run(batch, max_new_tokens=how.max_new_tokens, seed=seed).answers
    return found


def compare(found: Mapping[str, Measured]) -> list[str]:
    """The accuracies in one line."""
    told = [f"{name} {one.facts[HUNT]:.0f}%" for name, one in found.items() if HUNT in one.facts]
    return [f"right on the {HUNT}: {', '.join(told)}"] if told else []


def _grouped(groups: Sequence[Any] | None) -> list[Any] | None:
    """Groups, where any has two members."""
    return None if groups is None or len(set(groups)) == len(groups) else list(groups)


EXHIBIT = Exhibit(
    name="table1",
    title="Accuracy",
    covers=("Table 1",),
    asks="How often is the answer right: direct, with imagination in words, in latents?",
    paper={
        f"paper, {model}": {
            row: value for row, value in zip(_ROWS, values, strict=True) if value is not None
        } | _SPLITS.get(model, {})
        for model, values in _PAPER.items()
    },
    unknown=("decoding parameters (Monet's example script: temperature 0.1, 4096 new tokens)",
             "the judge that extracts answers; here the answer finder of the config, without a "
             "judge: examples.capimagine.evaluate reads replies with more rules, and takes a judge",
             "splits of HR-Bench-8K and MME-RW-Lite", "intervals; none are given"),
    arithmetic=("V* has 191 questions, so that a 95% interval is 5.3 points to each side: 85.9 "
                "against 83.3 is 164 against 159 questions",
                "the text claims +4.0 points on HR-Bench-8K, +4.9 on MME-RW-Lite and +3.44 on "
                "HR-Bench on average over Monet; the table's differences are +2.7, +7.9 and about "
                "+2.9"),
    limits=("accuracies of organisms say nothing on those of 7B models, and were trained for: "
            "organisms that ignore their latents solve an easier task without them",),
    organisms=("direct", "text", "latent-content", "latent-pointer", "latent-ignored",
               "latent-ignored-aligned"),
    families=("monet", "monet-vllm", "lvr", "lvr-latent-end", "capimagine"),
    benchmarks=tuple(NAMED),
    n=191,
    unit="accuracy in %, 95% interval",
    measure=measure,
    compare=compare,
    arms=Arms(generations=1),
)  # fmt: skip
