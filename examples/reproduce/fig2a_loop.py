"""Figure 2a: the latent loop. How many examples feed latents back, how many, and what ends them."""

from collections import Counter
from collections.abc import Mapping

from examples.reproduce.exhibit import Arms, Cell, Exhibit, Measured, Number, percent
from examples.reproduce.subjects import Subject

EMIT, STEPS = "examples that emit latents, %", "latents of an example that feeds any"
RANGE, ENDS = "fewest to most", "end"
SETS = ("vstar", "hrbench4k", "mme-realworld-lite", "vsp")


def measure(subject: Subject, *, n: int, seed: int) -> Measured:
    """Run every question once and look at its latent spans."""
    columns: dict[str, dict[str, Cell]] = {}
    names = subject.benchmarks(SETS)
    for benchmark in names:
        emitted, ends = _loops(subject, benchmark, n, seed)
        fed = [count for count in emitted if count]
        column: dict[str, Cell] = {EMIT: percent([count > 0 for count in emitted])}
        if fed:
            column |= {STEPS: Number(sum(fed) / len(fed), n=len(fed)),
                       RANGE: f"{min(fed)} to {max(fed)}"}  # fmt: skip
        why = ", ".join(f"{times} x {end}" for end, times in ends.most_common())
        column[ENDS] = why or "no span opened"
        columns[benchmark if len(names) > 1 else ""] = column
        share = len(fed) / len(emitted)
    return Measured(columns, facts={"rate": share})


def compare(found: Mapping[str, Measured]) -> list[str]:
    """Who emits latents."""
    all_ = [name for name, one in found.items() if one.facts["rate"] == 1]
    none = [name for name, one in found.items() if one.facts["rate"] == 0]
    said = [f"every example feeds latents back in {', '.join(all_)}"] * bool(all_)
    return said + [f"none does in {', '.join(none)}"] * bool(none)


def _loops(subject: Subject, benchmark: str, n: int, seed: int) -> tuple[list[int], Counter[str]]:
    """How many latents each example fed back, and why spans ended."""
    how, emitted, ends = subject.settings, list[int](), Counter[str]()
    base = subject.pairs(benchmark, n=n, seed=seed).base
    for start in range(0, len(base), how.batch_size):
        run = subject.lens.run(
            base[start : start + how.batch_size], max_new_tokens=how.max_new_tokens, seed=seed
        )
        emitted += run.trigger.emitted
        ends.update(str(span.ended_by) for span in run.trigger.spans)
    return emitted, ends


EXHIBIT = Exhibit(
    name="fig2a",
    title="The latent loop",
    covers=("Figure 2a",),
    asks="How many examples feed hidden states back at all, for how many steps?",
    paper={
        "paper, Monet-7B": {STEPS: "10 (Latent_Size)"}, "paper, LVR-7B": {STEPS: "8 (Latent_Size)"},
        "paper, Mirage": {STEPS: "4 (Latent_Size)"},
    },
    trust="A",
    unknown=("how many examples emit a latent at all: accuracies are over all examples, those "
             "without latents included, and users report that Monet often emits none",
             "whether 10, 8 and 4 are what was fed or the most that may be (Mirage's code says 8)"),
    answers=("iv: emission is counted, and `monet_do_z` tells the change of those that emit",),
    organisms=("latent-content", "latent-pointer", "latent-ignored", "latent-ignored-aligned",
               "direct", "text"),
    families=("monet", "monet-vllm", "lvr", "lvr-latent-end", "mirage", "mirage-release"),
    benchmarks=SETS,
    unit="as the row says, with a 95% interval",
    measure=measure,
    compare=compare,
    arms=Arms(generations=1),
)  # fmt: skip
