"""What the numbers of a study say about its latents, in sentences for someone new to all this.

The name of the model plays no part: the same numbers give the same words.
"""

from dataclasses import dataclass

from imaginelens.view.numerals import between, quantity
from imaginelens.view.report import Measure, Mechanism, Prediction

MARGIN = 0.05  # of accuracy: what is lost below it counts as nothing
_SMALL = 0.1  # of the total effect: less is hardly read
_ALIKE = 0.5  # of the runs: more look right; by chance it is 1 in 81 with nine cards, two steps

MEANINGS = {
    "content": "the answer itself: the source's",
    "pointer": "where to look: what the base has there",
    "ignored": "nothing that is used: the base's own answer",
    "other": "none of these",
}
_CARRIED = {
    "content": (
        "The latents carry the answer itself (content)",
        "Put into another run, they bring their answer along: in {swaps} the model gives the "
        "answer of the run they came from.",
    ),
    "pointer": (
        "The latents point to where the answer is (pointer)",
        "Put into another run, they say where to look: in {swaps} the model gives what its own "
        "picture shows at the place they point to.",
    ),
}
_KEPT = "With the latents of another run in their place, the model keeps its own answer in {swaps}."


@dataclass(frozen=True)
class Verdict:
    """One sentence, and what it rests on."""

    headline: str
    detail: str


def verdict(
    mechanism: Mechanism | None, *, drop: float, denoised: float, likeness: Measure
) -> Verdict:
    """Say in plain words what the latents do.

    Args:
        mechanism: whose prediction came true after the swap; None if no pair was decisive.
        drop: accuracy lost under the worst edit, out of 1.
        denoised: the largest effect of one moved state, as a share of the total effect.
        likeness: how often the latents look like what they should stand for.
    """
    cost = _cost(drop)
    if mechanism is None:
        return Verdict(
            "The swaps cannot tell what the latents do (undetermined).",
            f"No pair that was answered tells the explanations apart: take more pairs. {cost}",
        )
    swaps = _swaps(mechanism)
    if mechanism.winner is None:
        return Verdict(
            "The swaps do not settle what the latents do (undetermined).",
            f"What came true most often, {_named(mechanism.leader)}, did so in {swaps}. {cost}",
        )
    if mechanism.winner == "ignored":
        return _ignored(swaps, drop, denoised, likeness)
    claim, evidence = _CARRIED[mechanism.winner]
    spared = ", yet the model can do without them" if drop < MARGIN else ""
    return Verdict(f"{claim}{spared}.", f"{evidence.format(swaps=swaps)} {cost}")


def _ignored(swaps: str, drop: float, denoised: float, likeness: Measure) -> Verdict:
    """Whose latents they are does not decide the answer; that alone is not "of no use"."""
    evidence = f"{_KEPT.format(swaps=swaps)} {_cost(drop)}"
    if drop >= MARGIN:
        return Verdict("The latents are needed, but not for what they hold (ignored).", evidence)
    if abs(denoised) >= _SMALL:
        return Verdict("The latents are read, but do not decide the answer (ignored).", evidence)
    headline = "The latents are written, but the answer makes no use of them (ignored)."
    if likeness.interval is not None and likeness.interval[0] >= _ALIKE:
        headline = "The latents look right, but the answer makes no use of them (ignored)."
        alike = f"{quantity(likeness.value, '%')} {between(likeness.interval, '%')}"
        evidence = f"In {alike} of runs they look like the very cards to visit. {evidence}"
    return Verdict(headline, evidence)


def _named(prediction: Prediction) -> str:
    return "none of the explanations" if prediction.shown is None else prediction.name


def _swaps(mechanism: Mechanism) -> str:
    share = mechanism.leader.share
    interval = f" {between(share.interval, '%')}" if share.interval else ""
    swaps = "decisive swap" if share.n == 1 else "decisive swaps"
    return f"{quantity(share.value, '%')}{interval} of {share.n} {swaps}"


def _cost(drop: float) -> str:
    if drop < MARGIN:
        return f"Destroying them costs at most {quantity(max(drop, 0.0), 'points')} of accuracy."
    return f"Destroying them costs up to {quantity(drop, 'points')} of accuracy."
