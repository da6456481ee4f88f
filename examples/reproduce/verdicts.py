"""Beyond the paper: how much of the answer goes through the latents, with a verdict."""

from collections.abc import Mapping
from typing import Any

import imaginelens as il
from examples.reproduce.exhibit import Arms, Cell, Exhibit, Measured, of
from examples.reproduce.subjects import Subject

MARGIN = 0.05
SETS = ("vstar", "hrbench4k", "mme-realworld-lite", "vsp")
ROWS = {"te": "total effect of the input", "tnie": "through the latents, seen from the source",
        "pnie": "through the latents, seen from the base"}  # fmt: skip


def measure(subject: Subject, *, n: int, seed: int) -> Measured:
    """The four worlds of each pair, and their effects on whether the answer is the source's."""
    columns: dict[str, dict[str, Cell]] = {}
    facts: dict[str, Any] = {}
    names = subject.benchmarks(SETS)
    at = il.imagination if isinstance(subject.lens.family, il.TextSpec) else il.latent
    for benchmark in names:
        pairs = subject.pairs(benchmark, n=n, seed=seed)
        effects = il.counterfactuals(
            subject.lens, pairs, metric=il.source_answer, at=at, controls=False,
            batch_size=subject.settings.batch_size,
        ).effects()  # fmt: skip
        column: dict[str, Cell] = {}
        for name, said in ROWS.items():
            effect = getattr(effects, name)
            verdict = effect.verdict(MARGIN)
            facts[name] = {"value": effect.value, "verdict": verdict}
            column[said] = f"{of(effect, scale=100)}: {verdict}"
        columns[benchmark if len(names) > 1 else ""] = column
    return Measured(columns, facts=facts)


def compare(found: Mapping[str, Measured]) -> list[str]:
    """Which verdicts there are."""
    said = {
        "effect": "the answer goes through them",
        "equivalent": f"nothing, within {100 * MARGIN:g} points",
        "both": f"an effect, smaller than {100 * MARGIN:g} points",
        "inconclusive": "not decided by as many pairs",
    }
    return [
        f"{name}: {said[one.facts['tnie']['verdict']]} "
        f"({100 * one.facts['tnie']['value']:.0f} points)"
        for name, one in found.items()
    ]


EXHIBIT = Exhibit(
    name="verdicts",
    title="Beyond the paper: the effect through the latents, with a verdict",
    asks="Of what changing the input does to the answer, how much goes through the latents?",
    reports=("the paper tests two edges, X -> Z and Z -> Y; it runs no nested counterfactual, such "
             "as this input with the latents of that one",),
    answers=("ii: each effect has a paired test, an interval and an equivalence test, so that "
             "'nothing' is a claim with a margin",),
    limits=("an effect through the latents does not say what they hold: see `mechanism`",),
    organisms=("text", "latent-content", "latent-pointer", "latent-ignored",
               "latent-ignored-aligned"),
    families=("monet", "monet-vllm", "lvr", "lvr-latent-end", "mirage", "capimagine"),
    benchmarks=SETS,
    size="beyond",
    n=192,
    unit="points of answers that are the source's, 95% interval, verdict at 5 points",
    measure=measure,
    compare=compare,
    arms=Arms(generations=4),
)  # fmt: skip
