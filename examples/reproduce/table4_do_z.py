"""Table 4 (appendix B): Mirage under do(Z), stage 1 and stage 2, on VSP."""

from collections.abc import Mapping

from examples.reproduce import do_z
from examples.reproduce.exhibit import Arms, Exhibit, Measured
from examples.reproduce.subjects import Subject

LATENT = ("latent-content", "latent-pointer", "latent-ignored", "latent-ignored-aligned")
CANNOT = (
    "do(Z) cannot tell a pointer from content: it only says whether answers need a latent at all. "
    "latent-content, whose latents carry the answer, and latent-pointer, whose latents carry the "
    "name of a card that is looked up in the picture, lose alike here; the exhibit `mechanism` "
    "tells them apart"
)


def measure(subject: Subject, *, n: int, seed: int) -> Measured:
    """Accuracy under the four edits of the paper, and their variants."""
    return do_z.measure(subject, n=n, seed=seed, benchmarks=("vsp",))


def compare(found: Mapping[str, Measured]) -> list[str]:
    """Who needs its latents, and that this does not say what for."""
    told = []
    for name, one in found.items():
        verdicts = set(one.facts["verdicts"].values())
        changes = one.facts["changes"].values()
        if not verdicts:
            told.append(f"{name}: too few answers were found to say anything")
        elif verdicts <= {"equivalent", "both"}:
            told.append(f"{name} does not need its latents: every edit is equivalent to none, "
                        f"within {100 * do_z.MARGIN:g} points")  # fmt: skip
        elif verdicts == {"effect"}:
            told.append(f"{name} needs its latents: it loses {-max(changes):.0f} to "
                        f"{-min(changes):.0f} points")  # fmt: skip
        else:
            told.append(f"{name}: {', '.join(sorted(verdicts))}, depending on the edit")
    return told


EXHIBIT = Exhibit(
    name="table4",
    title="do(Z) on Mirage",
    covers=("Table 4",),
    asks="Does the answer change when every latent is replaced while the model generates?",
    paper={
        "paper, Mirage stage 1": {
            do_z.NONE: 64.2, do_z.SAME: "64.0 (-0.2)", do_z.ADD: "64.0 (-0.2)",
            do_z.PURE: "64.5 (+0.3)", do_z.ZERO: "65.0 (+0.8)",
        },
        "paper, Mirage stage 2": {
            do_z.NONE: 77.0, do_z.SAME: "77.2 (+0.2)", do_z.ADD: "76.7 (-0.3)",
            do_z.PURE: "76.2 (-0.8)", do_z.ZERO: "35.5 (-41.5)",
        },
    },
    reports=("the drop of stage 2 under near-zero is put down to texts that repeat themselves, not "
             "to lost content",),
    unknown=("the value of tau", "sigma", "mu", "seeds and the number of noise draws",
             "decoding temperature", "intervals; none are given",
             "how a VSP path is scored; here the boxed answer must be equal"),
    limits=(CANNOT,),
    arithmetic=("all ten accuracies lie on a grid of 0.25 points, cut to one decimal, so that the "
                "VSP test has 400 questions (inferred, not stated); at 400 questions a 95% "
                "interval of one accuracy is about 4 to 5 points to each side",),
    answers=("vi: two values of tau, the distance of edited latents from real ones, and a finder "
             "of repetition stand beside each accuracy",),
    organisms=LATENT,
    families=("mirage", "mirage-release"),
    benchmarks=("vsp",),
    n=400,
    unit="accuracy in %, change in points with its 95% interval, verdict at a margin of 5 points",
    measure=measure,
    compare=compare,
    arms=Arms(generations=2),  # unedited, and the sham
    do_z=True,
)  # fmt: skip
