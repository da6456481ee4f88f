"""Figure 2c, left: Monet with one tensor in the place of every latent."""

from examples.reproduce import do_z
from examples.reproduce.exhibit import Arms, Exhibit, Measured
from examples.reproduce.subjects import Subject
from examples.reproduce.table4_do_z import CANNOT, LATENT, compare

SETS = ("vstar", "hrbench4k", "mme-realworld-lite")


def measure(subject: Subject, *, n: int, seed: int) -> Measured:
    """Accuracy with one shared tensor, and under the other edits of table 4."""
    return do_z.measure(subject, n=n, seed=seed, benchmarks=SETS)


EXHIBIT = Exhibit(
    name="monet_do_z",
    title="do(Z) on Monet: one tensor for every latent",
    covers=("Figure 2c, left",),
    asks="Does accuracy fall when every latent of every question becomes the same tensor?",
    paper={
        "paper, Monet-7B on V*": {do_z.NONE: 82.7, do_z.SAME: "83.3 (+0.5)"},
        "paper, Monet-7B on HR-Bench-4K": {do_z.NONE: 71.1, do_z.SAME: "70.1 (-1.0)"},
        "paper, Monet-7B on MME-RW-Lite": {do_z.NONE: 46.9, do_z.SAME: "46.2 (-0.7)"},
    },
    unknown=("the value of tau", "seeds", "decoding temperature", "intervals; none are given",
             "how many questions made Monet emit a latent at all"),
    limits=(CANNOT,),
    arithmetic=("V* has 191 questions: 82.7 is 158/191 and 83.3 is 159/191 (83.2), one question",
                "table 1 of the same paper quotes Monet with 83.3 on V* and 71.0 on HR-Bench-4K, "
                "from another run than this baseline"),
    answers=("iv: examples that emit no latent are counted, and the change of the others is told",),
    organisms=LATENT,
    families=("monet", "monet-vllm", "lvr", "lvr-latent-end"),
    benchmarks=SETS,
    n=191,
    unit="accuracy in %, change in points with its 95% interval, verdict at a margin of 5 points",
    measure=measure,
    compare=compare,
    arms=Arms(generations=2),  # unedited, and the sham
    do_z=True,
)  # fmt: skip
