"""Figure 2c, right, and figure 6 (appendix A): derived questions answered from latents alone."""

from collections.abc import Mapping
from typing import Any

import imaginelens as il
from examples.reproduce.exhibit import Arms, Cell, Exhibit, Measured, Number
from examples.reproduce.subjects import Subject
from imaginelens.hooks.errors import InputError
from imaginelens.organisms.hunt import NAMES, SHAPES

LATENT_ONLY, TEXT_ONLY, OTHER, IMAGE = (
    "latents only", "text only", "latents of another picture", "with image",
)  # fmt: skip
ROWS = {LATENT_ONLY: "latent", TEXT_ONLY: "text", OTHER: "other", IMAGE: "image"}


def measure(subject: Subject, *, n: int, seed: int) -> Measured:
    """Ask the derived questions in four arms."""
    if subject.organism:
        asked: Any = derived(subject, n=n, seed=seed)
    elif subject.questions is None:
        raise InputError(
            f"{subject.name} names no file of derived questions; set questions under [data]"
        )
    else:
        asked = subject.questions
    spec = subject.lens.spec
    found = il.probes.behavioural_probe(
        subject.lens, asked, chance=1 / len(SHAPES) if subject.organism else None,
        suffix=spec.prompt.suffix, batch_size=subject.settings.batch_size,
        max_new_tokens=subject.settings.max_new_tokens, seed=seed,
    )  # fmt: skip
    column: dict[str, Cell] = {}
    for row, arm in ROWS.items():
        one, ends = found[arm], found[arm].ci()
        number = Number(100 * one.correct / one.n, 100 * ends.low, 100 * ends.high, one.n)
        column[row] = f"{number} ({one.correct}/{one.n})"
    shares = {arm: found[arm].correct / found[arm].n for arm in ROWS.values()}
    return Measured({"": column}, (found.summary(),), facts=shares)


def compare(found: Mapping[str, Measured]) -> list[str]:
    """Each arm, of each."""
    return [
        f"{name}: {100 * one.facts['latent']:.0f}% from latents only, "
        f"{100 * one.facts['text']:.0f}% from text only, {100 * one.facts['image']:.0f}% with image"
        for name, one in found.items()
    ]


def derived(subject: Subject, *, n: int, seed: int) -> list[dict[str, Any]]:
    """Hunts with another question on the same card: it starts elsewhere and ends there.

    The paper asks for other attributes of the same region; organisms know one attribute only.
    """
    found = list[dict[str, Any]]()
    for example in subject.pairs("", n=8 * n, seed=seed).base:
        hunt = example["hunt"]
        ends = [s for s in NAMES if hunt.follow(s, hunt.hops)[-1] == hunt.path[-1]]
        starts = [start for start in ends if start != hunt.start]
        if starts and len(found) < n:
            probe = hunt.question.replace(f"start {hunt.start}", f"start {starts[0]}", 1)
            found.append({**example, "probe": probe, "answer": hunt.answer})
    return found


EXHIBIT = Exhibit(
    name="fig2c_probe",
    title="Derived questions, answered from latents alone",
    covers=("Figure 2c, right", "Figure 6"),
    asks="Do latents hold enough of the picture to answer another question on the same region?",
    paper={
        "paper, Monet-7B": {LATENT_ONLY: "worse than text only (in the figure only)",
                            TEXT_ONLY: "in the figure only", IMAGE: "76.67 (23/30)"},
        "paper, Qwen3-VL-32B": {IMAGE: "76.67 (23/30)"},
    },
    unknown=("the accuracy from latents alone, and that of text only",
             "who wrote the 30 questions, how many options they have, the exact prompt",
             "which questions of V* they were derived from"),
    limits=("what is not answered from latents alone may still be used: latents that point into "
            "the picture answer nothing without it, and latent-pointer is not shown to answer "
            "anything here, though it loses most of its accuracy without its latents (`table4`)",),
    arithmetic=("30 questions give a 95% interval of about 15 points to each side, and show a "
                "difference between two arms only from 37 points on (chance 1/4, power 80%): "
                "'below chance' is not supported",),
    organisms=("latent-content", "latent-pointer", "latent-ignored", "latent-ignored-aligned"),
    families=("monet", "monet-vllm", "lvr", "lvr-latent-end", "mirage", "mirage-release"),
    benchmarks=("questions",),
    n=30,
    unit="right answers in %, exact 95% interval",
    measure=measure,
    compare=compare,
    arms=Arms(generations=5),
)  # fmt: skip
