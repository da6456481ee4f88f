"""The same numbers give the same words; other numbers give others, and too few give none."""

from dataclasses import replace

import pytest

from imaginelens.hooks.landing import Landing
from imaginelens.mediation import Interchange
from imaginelens.view import Measure, Mechanism, Prediction
from imaginelens.view.parts import mechanism, shown_pair
from imaginelens.view.verdict import Verdict, verdict

N = 40
PREDICTIONS = {"content": ("ring",) * N, "pointer": ("bar",) * N, "ignored": ("cross",) * N}
CERTAIN, NEVER = Measure(1.0, N, (0.91, 1.0)), Measure(0.0, N, (0.0, 0.09))


def planted(*answers: str | None) -> Mechanism | None:
    """A study in which the swap gave these answers, repeated over all pairs."""
    given = tuple(answers[i % len(answers)] for i in range(N))
    found = Interchange(given, PREDICTIONS, None, Landing("Swap", "latent", ("hook_latent",)))
    return mechanism(found, shown=shown_pair(found))


def said(*answers: str | None, drop: float, denoised: float = 0.5, likeness=NEVER) -> Verdict:
    return verdict(planted(*answers), drop=drop, denoised=denoised, likeness=likeness)


@pytest.mark.parametrize(
    ("answer", "name", "words"),
    [
        ("ring", "content", "carry the answer itself"),
        ("bar", "pointer", "point to where the answer is"),
        ("cross", "ignored", "needed, but not for what they hold"),
    ],
)
def test_what_was_answered_decides_the_sentence(answer: str, name: str, words: str) -> None:
    found = said(answer, drop=0.8)
    assert words in found.headline
    assert found.headline.endswith(f"({name}).")
    assert "in 100% [91%, 100%] of 40 decisive swaps" in found.detail
    assert found.detail.endswith("costs up to 80 points of accuracy.")


def test_ignored_is_said_only_where_nothing_else_speaks_against_it() -> None:
    calm = {"drop": 0.0, "denoised": 0.003}
    assert "written, but the answer makes no use" in said("cross", **calm).headline
    alike = said("cross", **calm, likeness=CERTAIN)
    assert "look right, but the answer makes no use" in alike.headline
    assert alike.detail.startswith("In 100% [91%, 100%] of runs they look like")
    for against in ({"drop": 0.05}, {"denoised": 0.1}, {"denoised": -0.1}):
        assert "no use" not in said("cross", **{**calm, **against}).headline


def test_a_likeness_that_may_be_chance_is_not_called_right() -> None:
    for likeness in (NEVER, Measure(0.6, N, (0.45, 0.74)), Measure(1.0, N)):
        found = said("cross", drop=0.0, denoised=0.0, likeness=likeness)
        assert "look right" not in found.headline + found.detail


def test_a_mechanism_the_model_can_do_without_is_said_to_be_one() -> None:
    assert "can do without them" in said("ring", drop=0.01).headline
    assert "can do without them" not in said("ring", drop=0.05).headline


@pytest.mark.parametrize(
    ("answers", "best"),
    [
        (("ring", "ring", "bar"), "content"),
        (("square", "square", "bar"), "none of the explanations"),
    ],
)
def test_a_mixture_is_undetermined(answers: tuple[str, ...], best: str) -> None:
    found = said(*answers, drop=0.8)
    assert found.headline.endswith("(undetermined).")
    assert f"most often, {best}, did so in 68% [52%, 80%] of 40" in found.detail


def test_no_answer_settles_nothing() -> None:
    assert planted(None) is None
    assert said(None, drop=0.8).headline.endswith("cannot tell what the latents do (undetermined).")


def test_what_is_missing_is_counted_and_the_pair_shown_has_an_answer() -> None:
    found = planted(None, "ring")
    assert found is not None
    assert (found.missing, found.leader.share.n, found.n_pairs) == (20, 20, 40)
    assert found.answered == "ring"


def test_a_drop_below_nothing_is_nothing() -> None:
    assert "at most 0 points" in said("cross", drop=-0.02).detail


def test_a_mechanism_needs_its_winner_among_the_predictions() -> None:
    only = Prediction("content", "the answer", CERTAIN, "ring")
    whole = Mechanism((only,), "content", N)
    with pytest.raises(
        ValueError, match=r"the winner 'pointer' came with predictions \['content'\]"
    ):
        replace(whole, winner="pointer")
    with pytest.raises(ValueError, match="needs predictions"):
        Mechanism((), None, 0)
