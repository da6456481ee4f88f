"""Figure 4: the same likeness of the hidden states of imagination in words."""

from collections.abc import Mapping

import imaginelens as il
from examples.reproduce import similar
from examples.reproduce.exhibit import Arms, Exhibit, Measured
from examples.reproduce.subjects import Subject

SETS = ("vstar", "mme", "ocrbench-v2", "mme-realworld-lite", "tablevqa")


def compare(found: Mapping[str, Measured]) -> list[str]:
    """That words whose rewriting decides the answer can have states that are alike."""
    return [
        f"{name}: mean cosine between inputs {', '.join(f'{v:.2f}' for v in one.facts['raw'])} at "
        "the steps shown: words may be alike and yet decide the answer (`table3`)"
        for name, one in found.items()
    ]


def measure(subject: Subject, *, n: int, seed: int) -> Measured:
    """Cosines of the states behind the final norm at each token of the imagination."""
    return similar.study(
        subject, SETS, at=il.imagination, site=similar.LAST, n=n, seed=seed,
        what="imagination in words",
    )  # fmt: skip


EXHIBIT = Exhibit(
    name="fig4",
    title="Are the states of imagination in words alike?",
    covers=("Figure 4",),
    asks="The matrices of figure 2 for the tokens between the markers of imagination in words.",
    paper={"paper, CapImagine-7B": {
        "tokens of different imaginations": "low (drawn only)",
        "tokens that follow each other": "diverse (drawn only)"}},
    reports=("low similarity between inputs, and diverse states of tokens that follow each other "
             "(shown in pictures only)",),
    unknown=("the layer; here behind the final norm", "instances and seed",
             "all numbers: they are only drawn", "which tokens are compared where imaginations "
             "differ in length; here the k-th token of each"),
    limits=("words differ because they are different tokens: a low cosine of text says as little "
            "about use as that of latents",),
    organisms=("text",),
    families=("capimagine",),
    benchmarks=SETS,
    n=100,
    size="similarity",
    unit="mean cosine; 1 is the same direction",
    measure=measure,
    compare=compare,
    arms=Arms(generations=2, forwards=2),
)  # fmt: skip
