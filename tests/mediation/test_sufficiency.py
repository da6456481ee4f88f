"""Sets of cells: gates need both inputs, and cells that were chosen are tested on other pairs."""

from dataclasses import replace

import numpy as np
import planted
import pytest
from planted import Planted
from scipy import stats

import imaginelens as il
from imaginelens.mediation.cells import Cell
from imaginelens.mediation.effect_map import EffectMap
from imaginelens.mediation.ranking import check_size, halves, ranked, settings_of
from imaginelens.mediation.sufficiency import (
    other_sets,
    permutation_pvalue,
    selectivity,
    sufficiency,
)
from imaginelens.mediation.sweep import sweep

N = 6


def made(kind: str, **words: object) -> tuple[Planted, EffectMap]:
    p = planted.planted(kind, xs0=np.linspace(-0.5, 0.25, N), xs1=np.linspace(1, 2, N))
    given = {"sites": "hook_latent", "context": "fixed", **words}
    return p, sweep(p.lens, p.pairs, **given)


# --- sufficiency --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "direction", "alone", "both"),
    [
        ("and_gate", "denoise", 0.0, 1.0),
        ("and_gate", "noise", -1.0, -1.0),
        ("or_gate", "denoise", 1.0, 1.0),
        ("or_gate", "noise", 0.0, -1.0),
        ("cancelling", "denoise", 2.0, 0.0),
    ],
)
def test_gates(kind: str, direction: str, alone: float, both: float) -> None:
    p, effects = made(kind, direction=direction)
    for k, wanted in ((1, alone), (2, both)):
        found = sufficiency(p.lens, p.pairs, effects, k=k)
        assert len(found.cells) == k
        assert found.recovery.value == pytest.approx(wanted, abs=1e-12)
        assert found.map.direction == direction
        assert len(found.tested) == N // 2


def test_free_context_and_single_cells_equal_the_sweep() -> None:
    p, effects = made("chain", context="free")
    for cell in effects.cells:
        found = sufficiency(p.lens, p.pairs, [cell], context="free")
        assert np.allclose(found.effect.values, effects[cell].values, rtol=0, atol=1e-12)
        assert found.tested == tuple(range(N))
    whole = sufficiency(p.lens, p.pairs, list(effects.cells))
    assert np.allclose(whole.effect.values, p.truth["pnie"], rtol=0, atol=1e-12)
    assert whole.map.context == "free"


def test_cells_of_heads_layers_and_windows() -> None:
    p, _ = made("chain")
    close = planted.CLOSE
    heads = sweep(
        p.lens, p.pairs, sites="z", positions=[close], context="fixed", heads=True, window=2
    )
    found = sufficiency(p.lens, p.pairs, [c for c in heads.cells if c.head in (1, 3)])
    wanted = p.truth["single_fixed_denoise"][:, [0, 2]].sum(1)
    assert np.allclose(found.effect.values, wanted, rtol=0, atol=1e-12)


def test_cells_are_chosen_on_pairs_that_they_are_not_tested_on() -> None:
    """A map that is a lie on the testing half chooses by the other half alone."""
    p, effects = made("cancelling")
    choosing, testing = halves(effects, p.pairs, seed=0)
    lie = effects.after.copy()
    lie[:, testing] = lie[::-1, testing]
    fooled = replace(effects, after=lie)
    assert ranked(fooled, np.arange(N)) != ranked(fooled, testing)
    found = sufficiency(p.lens, p.pairs, fooled, k=1)
    assert found.cells[0].position == "latent[0]"
    assert found.tested == tuple(testing.tolist())
    assert not set(choosing) & set(testing)
    turned = sufficiency(p.lens, p.pairs, replace(effects, after=effects.after[::-1]), k=1)
    assert turned.recovery.value == pytest.approx(-2.0, abs=1e-12)


def test_groups_are_not_split() -> None:
    p, effects = made("linear")
    grouped = replace(p.pairs, groups=["a", "a", "b", "b", "c", "c"])
    for seed in range(5):
        one, two = halves(effects, grouped, seed=seed)
        names = [{grouped.groups[i] for i in half} for half in (one, two)]
        assert not names[0] & names[1]
    with pytest.raises(il.InputError, match="all pairs are of one group"):
        halves(effects, replace(p.pairs, groups=["a"] * N), seed=0)
    with pytest.raises(il.InputError, match="the map holds 6 examples"):
        halves(effects, p.pairs[:2], seed=0)


def test_the_way_to_the_other_run_is_what_ranks() -> None:
    cells = [Cell("z", i, "latent[0]", None, ()) for i in range(3)]
    words = {"cells": cells, "before": [1.0, 1.0], "after": [[0.0, 0.5], [2.0, 3.0], [1.0, 1.0]]}
    rows = np.arange(2)
    up, down = (EffectMap.from_arrays(**words, other=[o, o]) for o in (5.0, -5.0))
    assert [c.layer for c in ranked(up, rows)] == [1, 2, 0]
    assert [c.layer for c in ranked(down, rows)] == [0, 2, 1]
    assert [c.layer for c in ranked(EffectMap.from_arrays(**words), rows)] == [1, 0, 2]


# --- selectivity --------------------------------------------------------------------------------


def test_the_one_cell_that_matters_is_selective() -> None:
    p, effects = made("linear", sites="resid_post", positions=[planted.NUMBER, il.latent[0]])
    found = selectivity(p.lens, p.pairs, effects, k=1)
    assert [(c.layer, c.position) for c in found.cells] == [(0, "latent[0]")]
    assert found.exhaustive
    assert found.random.shape == (3, N // 2)
    assert found.pvalue == 1 / 4
    half = list(found.tested)
    assert np.allclose(found.difference.values, p.truth["pnie"][half], rtol=0, atol=1e-12)


def test_cells_that_are_like_all_others_are_not() -> None:
    p, effects = made("or_gate")
    found = selectivity(p.lens, p.pairs, effects, k=1)
    assert found.pvalue == 1.0
    assert not found.difference.values.any()
    with pytest.raises(il.InputError, match="no other set"):
        selectivity(p.lens, p.pairs, effects, k=2)


def test_noising_counts_downwards() -> None:
    p, effects = made(
        "linear", sites="resid_post", positions=[planted.NUMBER, il.latent[0]], direction="noise"
    )
    found = selectivity(p.lens, p.pairs, effects, k=1)
    assert found.sign == -1
    assert found.pvalue == 1 / 4
    assert found.difference.value < 0


def test_binary_differences_have_bounds() -> None:
    p, effects = made("or_gate", metric=il.source_answer)
    found = selectivity(p.lens, p.pairs, effects, k=1, metric=il.source_answer)
    assert found.difference.procedure == "bounded score"
    assert sufficiency(p.lens, p.pairs, effects, k=1, metric=il.source_answer).recovery.value == 1


def test_random_sets_match_the_kinds_of_sites() -> None:
    cells = [Cell(kind, i, "latent[0]", None, ()) for kind in ("z", "mlp_out") for i in range(6)]
    chosen = (cells[0], cells[1], cells[7])
    others, exhaustive = other_sets(cells, chosen, draws=40, seed=0)
    assert not exhaustive
    assert len({frozenset(one) for one in others}) == 40
    for one in others:
        assert sorted(cell.site for cell in one) == ["mlp_out", "z", "z"]
        assert set(one) != set(chosen)
    every, exhaustive = other_sets(cells, chosen, draws=89, seed=0)
    assert exhaustive
    assert len(every) == 15 * 6 - 1
    assert other_sets(cells, chosen, draws=40, seed=0) == (others, False)
    assert other_sets(cells, chosen, draws=40, seed=1) != (others, False)


def test_the_permutation_pvalue_is_uniform_or_larger() -> None:
    rng = np.random.default_rng(0)
    p = [permutation_pvalue(x[0], x[1:]) for x in rng.normal(size=(4000, 20))]
    assert stats.kstest(np.array(p) - rng.uniform(0, 1 / 20, 4000), "uniform").pvalue > 0.01
    assert permutation_pvalue(2.0, np.array([1.0, np.nan])) == 2 / 3
    assert permutation_pvalue(np.nan, np.array([1.0, 0.0])) == 1.0
    assert max(p) == 1.0
    assert min(p) == 1 / 20


def test_the_organism_carries_its_answer_where_it_is_found() -> None:
    lens = il.load("latent-content")
    task = lens.task(n=16, seed=1)
    effects = sweep(lens, task, context="fixed")
    assert sufficiency(lens, task, effects, k=1).recovery.value > 0.8
    assert selectivity(lens, task, effects, k=1).pvalue == 1 / 6


# --- refusals -----------------------------------------------------------------------------------


def test_bad_arguments_are_refused() -> None:
    p, effects = made("linear")
    for k in (0, 2, None, True, 1.0):
        with pytest.raises(il.InputError, match="from 1 to 1"):
            check_size(k, 1)
    with pytest.raises(il.InputError, match="the map's metric is 'logit_diff'"):
        settings_of(effects, il.log_prob, None, None)
    with pytest.raises(il.InputError, match="the map's context is 'fixed'"):
        settings_of(effects, il.logit_diff, None, "free")
    with pytest.raises(il.InputError, match="mixture"):
        settings_of(replace(effects, direction="mixed"), il.logit_diff, None, None)
    with pytest.raises(il.InputError, match="expected a map, or some of its cells"):
        sufficiency(p.lens, p.pairs, [])
    with pytest.raises(il.InputError, match="leave it out"):
        sufficiency(p.lens, p.pairs, list(effects.cells), k=1)
    with pytest.raises(il.InputError, match="draws is 0"):
        selectivity(p.lens, p.pairs, effects, k=1, draws=0)
