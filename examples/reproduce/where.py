"""Beyond the paper: at which step, and in which layer, latents act on the answer."""

from collections.abc import Mapping

import imaginelens as il
from examples.reproduce.exhibit import Arms, Cell, Drawing, Exhibit, Measured
from examples.reproduce.subjects import Subject
from imaginelens.estimates import Estimate
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
            column[name_of(cell)] = _logits(estimate)
    known = [(c, e) for c, e in zip(found.cells, found.estimates, strict=True) if e is not None]
    cell, most = max(known, key=lambda one: abs(one[1].value))
    top = f"{_logits(most)} logits at {name_of(cell)}"
    drawn = Drawing.of(found.plot(), "map", "effect on the logits of the answer, by layer and step")
    return Measured({"": column}, (f"{len(found)} cells, on {name}",), (drawn,), {"top": top})


def _logits(estimate: Estimate) -> str:
    ends = estimate.ci()
    value, low, high = (round(v, 2) + 0.0 for v in (estimate.value, ends.low, ends.high))  # no -0
    return f"{value:.2f} [{low:.2f}, {high:.2f}]"


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
