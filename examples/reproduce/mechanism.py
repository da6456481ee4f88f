"""Beyond the paper: which mechanism the latents have, by swaps that mechanisms predict apart."""

from collections.abc import Mapping

import imaginelens as il
from examples.reproduce.exhibit import Cell, Exhibit, Measured, Number
from examples.reproduce.subjects import Subject


def measure(subject: Subject, *, n: int, seed: int) -> Measured:
    """Swap all latents (or words) of pairs, and see whose prediction comes true."""
    pairs = subject.pairs("", n=n, seed=seed)
    at = il.imagination if isinstance(subject.lens.family, il.TextSpec) else il.latent
    found = il.interchange(subject.lens, pairs, at=at)
    column: dict[str, Cell] = {"found": found.winner()}
    for name, share in found.shares().items():
        column[name] = Number(100 * share.value, 100 * share.low, 100 * share.high, share.n)
    told = f"{len(found.decisive)} of {len(pairs)} pairs tell the three apart; others are unused"
    return Measured({"": column}, (told,), facts={"winner": found.winner()})


def compare(found: Mapping[str, Measured]) -> list[str]:
    """The mechanism of each."""
    means = {
        "content": "holds the answer itself (content)",
        "pointer": "names a card, which is looked up in the picture (pointer)",
        "ignored": "is not read (ignored)",
    }
    return [
        f"{name}: what is imagined {means.get(one.facts['winner'], one.facts['winner'])}"
        for name, one in found.items()
    ]


EXHIBIT = Exhibit(
    name="mechanism",
    title="Beyond the paper: what the latents hold",
    asks="After a swap, does the answer become the source's (content), what the source's card "
         "shows in the base's picture (pointer), or does it stay (ignored)?",
    limits=("this takes pairs for which mechanisms predict different answers: organisms have them, "
            "benchmarks do not",),
    organisms=("text", "latent-content", "latent-pointer", "latent-ignored",
               "latent-ignored-aligned"),
    n=192,
    unit="% of the pairs that tell them apart, 95% interval",
    measure=measure,
    compare=compare,
)  # fmt: skip
