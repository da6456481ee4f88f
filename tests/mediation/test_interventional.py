"""Interventional effects: closed forms by enumerating donors, and what is refused."""

from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np
import planted
import pytest
from planted import Planted

import imaginelens as il
from imaginelens.estimates import EstimateError
from imaginelens.mediation.interventional import _draw

CONTEXTS = ("free", "fixed")


@cache
def made(kind: str) -> tuple[Planted, il.Pairs]:
    p = planted.planted(kind)
    return p, replace(p.pairs, history=["x moved up, seed 0"])


def run(kind: str, **options: Any) -> il.Interventional:
    p, pairs = made(kind)
    return il.interventional(p.lens, pairs, **{"metric": il.logit_diff, "donors": 3} | options)


def enumerated(p: Planted, donors: tuple[int, ...]) -> dict[str, np.ndarray]:
    """Each world of every recipient with the latents of every donor, own cells missing."""
    z0, z1 = p.latents(p.x0), p.latents(p.x1)
    n = len(p.pairs)
    found = {}
    for name, x, z in (("y00", p.x0, z0), ("y11", p.x1, z1), ("y10", p.x1, z0)):
        cells = np.stack([p.y(x, np.repeat(z[[donor]], n, axis=0)) for donor in donors], axis=1)
        cells[list(donors), range(len(donors))] = np.nan
        found[name] = cells
    return found


@pytest.mark.parametrize("context", CONTEXTS)
@pytest.mark.parametrize("kind", ["bilinear", "chain"])
def test_cells_and_effects_are_those_of_enumeration(kind: str, context: str) -> None:
    p, _ = made(kind)
    found = run(kind, context=context, batch_size=3)
    truth = enumerated(p, found.donors)
    assert len(found.donors) == 3
    for name, cells in truth.items():
        np.testing.assert_allclose(getattr(found, name), cells, rtol=0, atol=1e-12)
    means = {name: np.nanmean(cells) for name, cells in truth.items()}
    assert found.overall.value == pytest.approx(means["y11"] - means["y00"], abs=1e-12)
    assert found.rnde.value == pytest.approx(means["y10"] - means["y00"], abs=1e-12)
    assert found.rnie.value == pytest.approx(means["y11"] - means["y10"], abs=1e-12)
    assert found.overall.procedure == "two-way crossed t"
    assert found.parse_coverage == 1.0
    assert found.crossed.sum() == 9
    assert f"{context} context" in found.estimand


def test_the_overall_effect_is_the_sum_in_every_cell_and_not_the_total() -> None:
    p, _ = made("bilinear")
    found = run("bilinear", donors=8)
    assert found.donors == (0, 1, 2, 3)  # all there are
    overall, rnde, rnie = (getattr(found, n).values for n in ("overall", "rnde", "rnie"))
    np.testing.assert_array_equal(np.isnan(overall), np.eye(4, dtype=bool))
    np.testing.assert_allclose(overall, rnde + rnie, rtol=0, atol=1e-12)
    # Z and X interact, so that latents of others are not one's own on average
    assert found.overall.value != pytest.approx(p.truth["te"].mean(), abs=1e-3)
    assert not hasattr(found, "prop_mediated")
    assert found.rnie.total is found.overall


def test_latents_that_nothing_reads_have_exactly_no_effect() -> None:
    found = run("masked")
    assert not np.nan_to_num(found.rnie.values).any()
    assert found.rnie.verdict(margin=0.01) == "equivalent"
    np.testing.assert_array_equal(found.rnde.values, found.overall.values)
    assert found.overall.value > 1


def test_batches_and_seeds() -> None:
    one, two = (run("linear", batch_size=size, context="fixed") for size in (1, 32))
    np.testing.assert_allclose(one.y10, two.y10, rtol=0, atol=1e-12)
    assert one.donors == two.donors
    assert one.provenance.forwards > two.provenance.forwards
    assert one.provenance.inputs == two.provenance.inputs
    assert len({_draw(range(4), 2, seed) for seed in range(3)}) > 1


def test_donors_are_of_other_groups_one_of_each() -> None:
    p, pairs = made("chain")
    grouped = replace(pairs, groups=["a", "b", "a", "c"])
    found = il.interventional(p.lens, grouped, metric=il.logit_diff, context="fixed")
    assert len(found.donors) == 3
    assert {grouped.groups[d] for d in found.donors} == {"a", "b", "c"}
    for column, donor in enumerate(found.donors):
        own = [g == grouped.groups[donor] for g in grouped.groups]
        np.testing.assert_array_equal(~found.crossed[:, column], own)
    truth = enumerated(p, found.donors)
    effect = np.where(found.crossed, truth["y11"] - truth["y10"], np.nan)
    by_group = np.stack([(effect[0] + effect[2]) / 2, effect[1], effect[3]])
    assert found.rnie.values.shape == (3, 3)
    np.testing.assert_allclose(found.rnie.values, by_group, rtol=0, atol=1e-12)
    with pytest.raises(il.InputError, match="the 4 pairs are of one group, and donors"):
        il.interventional(p.lens, replace(pairs, groups=["a"] * 4))


def test_the_same_input_is_no_donor_of_itself() -> None:
    p = planted.planted("chain", xs0=[0.0, 0.5, 0.0, 0.25], xs1=[1.0, 1.5, 2.0, 1.25])
    same = replace(p.pairs, base=[*p.pairs.base[:2], p.pairs.base[0], p.pairs.base[3]])
    pairs = replace(same, history=["x moved"])
    found = il.interventional(p.lens, pairs, metric=il.logit_diff, context="fixed")
    wanted = ~np.eye(4, dtype=bool)
    wanted[0, 2] = wanted[2, 0] = False
    np.testing.assert_array_equal(found.crossed, wanted)


def test_donors_with_other_numbers_of_latents() -> None:
    p = planted.planted("chain", xs0=[0.25, 0.125, 0.0, 0.75], xs1=[0.125, 0.25, 0.0625, 0.8125])
    first = p.lens.model.registers["z"].start
    spec = replace(p.lens.family, fixed=False, criterion=lambda h: h[:, first] > 0.9)
    lens = il.LatentModel(p.lens.model, p.lens.tokenizer, spec)
    pairs = replace(p.pairs, history=["x moved"])
    options: dict[str, Any] = {"metric": il.logit_diff, "donors": 4}  # in free context
    strict = il.interventional(lens, pairs, **options)  # three emit 3, and one emits 2
    assert strict.unaligned == 6
    assert "6 cells left out: their numbers of states differ" in repr(strict)
    assert strict.parse_coverage == 1.0
    assert strict.crossed.sum() == 6
    padded = il.interventional(lens, pairs, align="pad", **options)
    assert padded.unaligned == 0
    assert padded.crossed.sum() == 12
    np.testing.assert_allclose(padded.y10[strict.crossed], strict.y10[strict.crossed], atol=1e-12)
    assert "aligned: pad" in padded.estimand


def test_written_imagination_of_other_examples() -> None:
    lens = il.load("text")
    pairs = lens.task(n=6, seed=0).do(il.SwapText())
    found = il.interventional(lens, pairs, donors=2, at=il.imagination)
    donor = found.donors[0]
    texts = lens.run(pairs.base[donor])
    with lens.edit(il.Swap(texts), at=il.imagination):
        wanted = lens.run(pairs.base)
    hits = [float(a == b) for a, b in zip(wanted.answers, pairs.base_answers, strict=True)]
    there = found.crossed[:, 0]
    np.testing.assert_array_equal(found.y00[there, 0], np.array(hits)[there])


@pytest.mark.parametrize("name", ["latent-content", "latent-ignored"])
def test_an_organism_under_an_edit_of_its_input(name: str) -> None:
    lens = il.load(name)
    pairs = lens.task(n=16, seed=0).do(il.BlankImage())
    found = il.interventional(lens, pairs, donors=4, metric=il.log_prob, context="fixed")
    assert "BlankImage(), seed 0" in repr(found)
    if name == "latent-ignored":  # a blank picture costs the answer, whatever the latents hold
        assert found.overall.ci().high < -1
        assert abs(found.rnie.value) < 0.2 * abs(found.overall.value)
    else:  # latents of others say other things, before and after
        assert abs(found.rnde.value) < abs(found.rnie.value)
    answers = il.interventional(lens, pairs, donors=4, context="fixed")
    assert answers.overall.procedure == "two-way crossed Tango score"
    assert answers.rnie.value == pytest.approx(answers.overall.value - answers.rnde.value)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"donors": 1}, "donors is 1; at least 2 are needed"),
        ({"metric": il.accuracy}, "not the same function in every nested world"),
        ({"metric": il.logit_diff}, "that of pair 0 is unknown; use il.base_answer"),
        ({"batch_size": 0}, "batch_size is 0"),
    ],
)
def test_what_cannot_be_run_is_refused(options: dict[str, Any], sentence: str) -> None:
    p, pairs = made("chain")
    unknown = replace(pairs, source_answers=[None] * 4)
    with pytest.raises(il.InputError, match=sentence) as error:
        il.interventional(p.lens, unknown, **options)
    assert "\n" not in str(error.value)


def test_levels_that_mean_nothing_are_refused() -> None:
    p, pairs = made("chain")
    with pytest.raises(il.InputError, match="do not say what was done to their inputs"):
        il.interventional(p.lens, p.pairs)
    swapped = replace(pairs, history=["SwapInstance(), seed 0"])
    with pytest.raises(il.InputError, match=r"SwapInstance\(\) makes another example of each"):
        il.interventional(p.lens, swapped)
    silent = planted.planted("chain", xs0=[0.5, 0.5], xs1=[1.5, 1.5])
    closed = [{"text": e["text"] + planted.LATENT_END} for e in silent.pairs.base]
    never = replace(silent.pairs, base=closed, source=closed, history=["nothing moved"])
    with pytest.raises(il.EditTouchedNothing, match="no recipient got states at latent other"):
        il.interventional(silent.lens, never)


def test_too_few_cells_have_no_interval_and_say_so() -> None:
    p, pairs = made("chain")
    found = il.interventional(p.lens, pairs[:2], metric=il.logit_diff, context="fixed")
    assert found.overall.n == 2
    lost = replace(found, crossed=np.zeros((2, 2), bool), y00=found.y00 * np.nan)
    assert lost.parse_coverage == 0.0
    with pytest.raises(EstimateError, match="recipients and 0 donors"):
        lost.overall  # noqa: B018
    assert "no intervals" in repr(lost)
