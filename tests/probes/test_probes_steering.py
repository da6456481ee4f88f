"""Steering: an exact slope where it is planted, the known answer on organisms, and what is flat."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np
import planted
import pytest
import torch

import imaginelens as il
from imaginelens.estimates import EstimateError
from imaginelens.hooks.errors import InputError
from imaginelens.hooks.metrics import Metric
from imaginelens.probes.steering import DoseResponse, steer

FIT, TARGET = 256, "circle"


@cache
def organism(name: str) -> il.Organism:
    return il.load(name)


@cache
def towards_circle(name: str) -> np.ndarray:
    """Mean difference at the last latent between hunts that end at a circle and others."""
    lens = organism(name)
    task = lens.task(n=FIT, seed=1)
    z = torch.cat([lens.run(list(task.base[i : i + 128])).latents for i in range(0, FIT, 128)])
    last, circles = z[:, 1].double().numpy(), np.array(task.base_answers) == TARGET
    return last[circles].mean(0) - last[~circles].mean(0)


def steered(name: str, *, metric: Metric = il.source_answer, **how: Any) -> DoseResponse:
    """Hunts that end elsewhere, pushed towards the circle; the source answers circle."""
    lens = organism(name)
    task = lens.task(n=400, seed=2)
    rows = [row for row, answer in enumerate(task.source_answers) if answer == TARGET][:40]
    how = {"at": il.latent[1], "context": "fixed", "draws": 3, "doses": (-1, 1, 2)} | how
    return steer(lens, task.select(rows), towards_circle(name), metric=metric, batch_size=40, **how)


# --- exact ----------------------------------------------------------------------------------------


def test_on_a_linear_model_the_slope_is_the_weight() -> None:
    """y = 0.7 x + 1.3 z - 1: one unit of z is 1.3 logits, at every dose and in every example."""
    model = planted.planted("linear")
    z = model.lens.run(model.pairs.base[0]).latents[0, 0].numpy()
    towards_z = np.where(z != 0, np.sign(z), 0.0)
    assert np.abs(towards_z).sum() == 1  # the one dimension that holds z
    towards_z = np.abs(towards_z)
    found = steer(model.lens, model.pairs, towards_z, doses=[-2, 0.5, 3], draws=3, batch_size=3)
    np.testing.assert_allclose(found.slope.values, 1.3, atol=1e-9)
    for dose, effect in zip(found.doses, found.effects, strict=True):
        np.testing.assert_allclose(effect.values, 1.3 * dose, atol=1e-9)
    assert found.verdict(margin=0.1) == "steers"
    assert found.as_steep == 0
    np.testing.assert_allclose(
        found.slope_beyond_random.values, found.slope.values - found.slope_random.values, atol=1e-9
    )
    with_fits = np.polyfit([-2, 0, 0.5, 3], np.r_[-2.6, 0, 0.65, 3.9], 1)[0]
    assert found.slope.value == pytest.approx(with_fits)


def test_where_latents_are_masked_every_slope_is_zero() -> None:
    model = planted.planted("masked")
    z = model.lens.run(model.pairs.source[0]).latents[0, 0].numpy()
    found = steer(model.lens, model.pairs, z, doses=[-1, 1], draws=2)
    assert np.all(found.after == found.before)
    assert not found.flags
    assert found.verdict(margin=1e-6) == "does not steer"


# --- organisms ------------------------------------------------------------------------------------


def test_the_shape_steers_the_organism_that_carries_it() -> None:
    found = steered("latent-content")
    assert found.verdict(margin=0.05) == "steers"
    assert found.effects[-1].ci().low > 0.5  # two units: most become circles
    assert found.effects[0].value == 0.0  # away from the circle nothing becomes one
    assert found.pvalues[-1] < 0.001
    assert found.beyond_random[-1].ci().low > 0.4


@pytest.mark.parametrize("name", ["latent-pointer", "latent-ignored-aligned"])
def test_the_shape_can_be_read_there_too_and_steers_nothing(name: str) -> None:
    """Pointer's latents hold the shape but its answer reads the name; of the other nobody reads."""
    found = steered(name, metric=il.logit_diff)
    assert np.linalg.norm(towards_circle(name)) > 1  # as far as in the organism above
    assert found.verdict(margin=0.5) == "does not steer"
    assert min(found.change) > 0.1


def test_a_direction_that_breaks_as_much_as_random_ones_is_no_finding() -> None:
    found = made(np.full(60, 0.5), [np.full(60, 0.1), np.full(60, 0.6)])
    assert found.as_steep == 1
    assert found.verdict(margin=0.05) == "undecided"
    assert made(np.full(60, 0.5), [np.full(60, 0.1)] * 2).verdict(margin=0.05) == "steers"
    assert made(np.full(60, -0.5), [np.full(60, 0.1)] * 2).verdict(margin=0.05) == "steers"
    assert made(np.full(60, -0.5), [np.full(60, -0.6)] * 2).verdict(margin=0.05) == "undecided"
    assert made(np.full(60, 0.01), [np.full(60, 0.6)] * 2).verdict(margin=0.05) == "does not steer"
    with pytest.raises(EstimateError, match="needs a margin"):
        found.verdict()


def made(slope: np.ndarray, random: list[np.ndarray]) -> DoseResponse:
    """With doses -1 and 1 and these slopes in each example."""
    noise = np.random.default_rng(0).normal(scale=0.01, size=60)
    return DoseResponse(
        doses=(-1.0, 1.0),
        metric=il.log_prob,
        before=np.zeros(60),
        after=np.stack([-slope - noise, slope + noise]),
        random=np.stack([[-r for r in random], random]),
        groups=None,
        flags={},
        change=(0.1, 0.1),
        where="latent of hook_latent",
        context="free",
    )


def test_shares_have_the_score_test_and_groups_count() -> None:
    found = steered("latent-content", doses=[1], draws=2)
    assert found.effects[0].procedure == "Tango score"
    assert found.slope.procedure == "bounded score"
    slope = found.slope.possible
    assert slope is not None
    assert slope[:, 0].tolist() == [-1, 1]  # of doses 0 and 1 it is the difference itself
    grouped = replace(found, groups=tuple(i // 2 for i in range(len(found.before))))
    assert grouped.slope.n_groups == 20
    assert repr(found).startswith("DoseResponse at latent[1] of hook_latent, fixed context")


# --- what cannot be done --------------------------------------------------------------------------


def wrong() -> Iterator[tuple[str, Callable[[], Any]]]:
    lens = organism("latent-content")
    data = lens.task(n=4, seed=2)

    def call(direction: Any = None, **how: Any) -> Callable[[], Any]:
        given = np.ones(64) if direction is None else direction
        return lambda: steer(lens, data, given, **how)

    yield "doses are .0.0, 1.0.; give different numbers other than 0", call(doses=[0, 1])
    yield "doses are .1.0, 1.0.", call(doses=[1, 1.0])
    yield "doses are ..; give", call(doses=[])
    yield "draws is 1", call(draws=1)
    yield r"direction of shape \(2, 64\) came", call(np.ones((2, 64)))
    yield "finite numbers .d_model,. that are not all 0", call(np.zeros(64))
    yield "finite numbers", call(np.full(64, np.nan))
    yield "a value of width 3", call(np.ones(3))


def test_one_sentence_says_what_is_wrong() -> None:
    for message, call in wrong():
        with pytest.raises((InputError, il.DonorError), match=message):
            call()
