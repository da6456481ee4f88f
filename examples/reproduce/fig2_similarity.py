"""Figure 2b: are latents of different inputs alike? The paper's do(X) -> Z."""

from collections.abc import Mapping

import imaginelens as il
from examples.reproduce import similar
from examples.reproduce.exhibit import Arms, Exhibit, Measured
from examples.reproduce.subjects import Subject

ALIKE = "latents of different inputs"
SETS = ("vstar", "mme", "ocrbench-v2", "mme-realworld-lite", "tablevqa", "vsp")


def measure(subject: Subject, *, n: int, seed: int) -> Measured:
    """Per-step cosines between inputs and between the steps of one, with baselines."""
    return similar.study(
        subject, SETS, at=il.latent, site="hook_latent", n=n, seed=seed, what="latents"
    )


def compare(found: Mapping[str, Measured]) -> list[str]:
    """That likeness does not say who uses its latents."""
    if not found:
        return []
    alike = ", ".join(
        f"{name} {max(one.facts['raw']):.2f} ({one.facts['finding']})"
        for name, one in found.items()
    )
    return [f"largest mean cosine between inputs at any step: {alike}"]


EXHIBIT = Exhibit(
    name="fig2",
    title="Are the latents of different inputs alike?",
    covers=("Figure 2b", "README heat-maps"),
    asks="Does the input cause the latents? 100 inputs, a matrix of cosines for each latent step.",
    paper={
        "paper, Monet-7B": {ALIKE: "distinct at first, extremely alike from step 5 (drawn only)"},
        "paper, LVR-7B": {ALIKE: "extremely alike from step 2; some low cosines remain (drawn "
                                 "only)"},
        "paper, Mirage": {ALIKE: "extremely alike at all steps (drawn only)"},
    },
    reports=(
        "latents are extremely alike across instances and tasks (shown in pictures only)",
        "Monet is distinct at first, then collapses; it loses distinctiveness from step 5",
        "LVR collapses at step 2, but keeps a low cosine for several inputs even at the last step",
        "Mirage is highly alike at all steps; states of text keep a low cosine",
    ),
    trust="A",
    unknown=("which 100 instances, and the seed; here as many of each of five sets, drawn by ours",
             "the layer of the 'inner representation after the input', and whether text and image "
             "tokens are embeddings or hidden states; here all are behind the final norm",
             "all numbers: curves and matrices are only drawn"),
    limits=("a raw cosine near 1 says little, for hidden states share a large common vector: look "
            "at the centred matrix, at the same prompts with one constant latent, and at whether "
            "the nearest other input is a case of the same; and a low cosine does not say that "
            "anything is used: latents of latent-ignored-aligned are as unlike as those of "
            "latent-content, and nobody reads them",),
    answers=("iii: centred and whitened cosines, the same prompts with a constant latent, and a "
             "permutation test stand beside the raw cosine",),
    organisms=("latent-content", "latent-pointer", "latent-ignored", "latent-ignored-aligned"),
    families=("monet", "monet-vllm", "lvr", "lvr-latent-end", "mirage", "mirage-release"),
    benchmarks=SETS,
    n=100,
    size="similarity",
    unit="mean cosine; 1 is the same direction",
    measure=measure,
    compare=compare,
    arms=Arms(generations=2, forwards=1),
)  # fmt: skip
