"""Interchange names the right mechanism, and none where there is a mixture."""

import numpy as np
import pytest
import torch

import imaginelens as il
from imaginelens.hooks.landing import Landing
from imaginelens.mediation.interchange import UNDETERMINED

NAMES = {
    "latent-content": "content",
    "latent-pointer": "pointer",
    "latent-ignored": "ignored",
    "latent-ignored-aligned": "ignored",
}


def planted(answers: list[str | None], predictions: dict[str, list[str]]) -> il.Interchange:
    rows = {name: tuple(p) for name, p in predictions.items()}
    return il.Interchange(tuple(answers), rows, None, Landing("Swap", "latent", ("hook_latent",)))


@pytest.mark.parametrize("name", NAMES)
def test_it_names_the_mechanism_of_every_organism(name: str) -> None:
    lens = il.load(name)
    found = il.interchange(lens, lens.task(n=256, seed=0))
    assert found.winner() == NAMES[name]
    shares = found.shares()
    assert shares[NAMES[name]].value >= 0.9
    assert all(s.value <= 0.05 for n, s in shares.items() if n not in (NAMES[name], "other"))
    assert sum(s.value for s in shares.values()) == pytest.approx(1.0)
    assert len(found.landing.cells) == 512


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_it_names_it_over_twenty_samples(name: str) -> None:
    torch.set_num_threads(1)
    lens = il.load(name)
    tasks = [lens.task(n=128, seed=seed) for seed in range(20)]
    assert [il.interchange(lens, task).winner() for task in tasks] == [NAMES[name]] * 20


def test_a_planted_mixture_is_undetermined() -> None:
    rng = np.random.default_rng(0)
    n = 1000
    predictions = {"content": ["circle"] * n, "pointer": ["square"] * n, "ignored": ["bar"] * n}
    for weight, expected in ((1.0, "content"), (0.5, UNDETERMINED), (0.7, UNDETERMINED)):
        answers = [str(a) for a in rng.choice(["circle", "square"], n, p=[weight, 1 - weight])]
        found = planted(answers, predictions)
        assert found.winner() == expected
        assert found.shares()["content"].value == pytest.approx(weight, abs=0.05)
        assert found.shares()["ignored"].value == 0


def test_only_pairs_that_tell_the_hypotheses_apart_count() -> None:
    predictions = {"content": ["circle", "circle", "bar"], "ignored": ["square", "circle", "ring"]}
    found = planted(["circle", "circle", None], predictions)
    assert found.decisive == [0, 2]
    assert found.missing == 1
    assert found.shares()["content"].n == 1
    found = planted(["triangle"] * 3, predictions)
    assert found.shares()["other"].value == 1.0


def test_what_cannot_be_compared_is_refused() -> None:
    lens = il.load("latent-content")
    task = lens.task(n=2, seed=0)
    with pytest.raises(il.InputError, match="needs two"):
        il.interchange(lens, task, hypotheses={"content": task.hypotheses["content"]})
    alike = planted(["circle"], {"a": ["circle"], "b": ["circle"]})
    with pytest.raises(il.InputError, match="tells a, b apart"):
        alike.shares()
    with pytest.raises(il.InputError, match="has no end"):
        il.interchange(lens, task, at=il.latent[0:])


def test_a_users_own_hypotheses_and_single_steps() -> None:
    lens = il.load("latent-content")
    task = lens.task(n=64, seed=2)
    mine = {
        "carried": lambda base, source, steps: source["hunt"].answer,
        "not used": lambda base, source, steps: base["hunt"].answer,
    }
    assert il.interchange(lens, task, hypotheses=mine, at=il.latent[1]).winner() == "carried"


def test_a_result_that_tells_nothing_can_be_printed() -> None:
    same = planted(["x", "y"], {"a": ["x", "y"], "b": ["x", "y"]})
    assert repr(same) == "Interchange at latent: none of 2 pairs tells the hypotheses apart"
    unanswered = planted([None], {"a": ["x"], "b": ["y"]})
    assert "none with an answer of 1 pairs" in repr(unanswered)
