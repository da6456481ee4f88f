"""Beyond the paper: at which step, and in which layer, latents act on the answer."""

from collections.abc import Mapping

import imaginelens as il
from examples.reproduce.exhibit import Arms, Cell, Drawing, Exhibit, Measured
from examples.reproduce.subjects import Subject
from imaginelens.mediation.map_axes import name_of

SETS = ("vstar", "hrbench4k", "vsp")


def measure(subject: Subject, *, n: int, seed: int) -> Measured:
    """The source's state put into the base at each layer and step; the text stays as it is."""
    name = subject.benchmarks(SETS)[0]
    pairs = subject.pairs(name, n=n, seed=seed)
    found = il.sweep(
        subject.lens, pairs, sites=["hook_latent", "resid_post"], positions=il.latent,
        metric=il.logit_diff, context="fixed", batch_size=subject.settings.batch_size,
    )  # fmt: skip
    column: dict[str, Cell] = {}
    for cell, estimate in zip(found.cells, found.estimates, strict=True):
        if estimate is not None:
            ends = estimate.ci()
            column[name_of(cell)] = f"{estimate.value:.2f} [{ends.low:.2f}, {ends.high:.2f}]"
    known = [(c, e) for c, e in zip(found.cells, found.estimates, strict=True) if e is not None]
    cell, most = max(known, key=lambda one: abs(one[1].value))
    top = f"{most.value:.2f} logits {most.ci()} at {name_of(cell)}"
    drawn = Drawing.of(found.plot(), "map", "effect on the logits of the answer, by layer and step")
    return Measured({"": column}, (f"{len(found)} cells, on {name}",), (drawn,), {"top": top})


def compare(found: Mapping[str, Measured]) -> list[str]:
    """Where the largest effect is."""
    return [f"{name}: the largest effect is {one.facts['top']}" for name, one in found.items()]


EXHIBIT = Exhibit(
    name="where",
    title="Beyond the paper: which step, which layer",
    asks="Which latent, in which layer, moves the answer toward the source's?",
    answers=("v: every step and layer by itself, not the block of latents as a whole",),
    limits=("with the text fixed, and of logits: a real effect on them need not change an answer",),
    organisms=("latent-content", "latent-pointer", "latent-ignored"),
    families=("monet", "lvr", "mirage"),
    benchmarks=SETS,
    n=48,
    size="map",
    unit="logits, 95% interval of each cell by itself",
    measure=measure,
    compare=compare,
    arms=Arms(generations=2, forwards=30),
)  # fmt: skip
