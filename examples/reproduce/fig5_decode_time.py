"""Figure 5: what decoding costs in seconds, words against latents against neither."""

import math
import statistics
from collections.abc import Mapping

from examples.reproduce.exhibit import Arms, Cell, Exhibit, Measured, Number
from examples.reproduce.subjects import Subject

SETS = ("vstar",)
DECODE, PREFILL, TOKENS = "decoding, ms per reply", "prompt, ms", "positions generated"


def measure(subject: Subject, *, n: int, seed: int) -> Measured:
    """Each question by itself: the whole reply, and its first token alone; decoding is the rest."""
    columns: dict[str, dict[str, Cell]] = {}
    names = subject.benchmarks(SETS)
    for benchmark in names:
        base = subject.pairs(benchmark, n=n, seed=seed).base
        most = subject.settings.max_new_tokens
        subject.lens.run(base[0], max_new_tokens=most)  # the first run of a process is slower
        whole, first, tokens = list[float](), list[float](), list[float]()
        for example in base:
            run = subject.lens.run(example, max_new_tokens=most, seed=seed)
            whole.append(1000 * run.seconds)
            first.append(1000 * subject.lens.run(example, max_new_tokens=1, seed=seed).seconds)
            tokens.append(float(run.tokens.width - run.tokens.prompt_width))
        rest = [w - f for w, f in zip(whole, first, strict=True)]
        columns[benchmark if len(names) > 1 else ""] = {
            DECODE: _median(rest), PREFILL: _median(first), TOKENS: _median(tokens),
        }  # fmt: skip
    return Measured(columns, ("medians, with the middle half in brackets; one reply at a time",),
                    facts={"positions": statistics.median(tokens)})  # fmt: skip


def compare(found: Mapping[str, Measured]) -> list[str]:
    """How many positions each generates; seconds are in the table."""
    said = ", ".join(f"{name} {one.facts['positions']:g}" for name, one in found.items())
    return [f"positions generated for a reply: {said}"] if found else []


def _median(values: list[float]) -> Number:
    if len(values) < 2:
        return Number(values[0] if values else math.nan, n=len(values))
    low, middle, high = statistics.quantiles(values, n=4)
    return Number(middle, low, high, len(values))


EXHIBIT = Exhibit(
    name="fig5",
    title="Decode time",
    covers=("Figure 5",),
    asks="What does imagination in words cost against latents, in the decode stage alone?",
    paper={"paper, V*": {"CapImagine against Monet": "about as long (drawn only)",
                         "DeepEyes against CapImagine": "about twice (drawn only)"}},
    reports=("CapImagine takes about as long as Monet, DeepEyes about twice as long (bars only)",),
    trust="B=C",
    unknown=("all seconds: they are only drawn", "hardware, engine and batch size of the timing"),
    limits=("seconds of organisms say nothing on those of 7B models; positions generated carry "
            "over: a latent is a position as a word is", "times are of this machine as it was busy "
            "then; latents go through a loop of Python here, and no serving engine"),
    organisms=("direct", "text", "latent-content"),
    families=("monet", "monet-vllm", "lvr", "lvr-latent-end", "mirage", "capimagine"),
    benchmarks=SETS,
    n=24,
    size="timing",
    unit="milliseconds or positions; medians, middle half",
    measure=measure,
    compare=compare,
    arms=Arms(generations=1, forwards=1),
)  # fmt: skip
