"""The comparison of an approximation with exact effects, on numbers made by hand."""

from typing import Any

import numpy as np
import pytest
from scipy import stats

from imaginelens.mediation.agreement import Agreement
from imaginelens.mediation.cells import Cell

EXACT = np.random.default_rng(0).normal(size=(12, 5)) * np.arange(12, 0, -1)[:, None]


def agreement(approximate: Any, exact: Any = EXACT, **options: Any) -> Agreement:
    approximate, exact = np.array(approximate, dtype=float), np.array(exact, dtype=float)
    n = len(exact)
    largest = np.argsort(-np.abs(approximate).mean(1))[:2]
    arguments = {
        "cells": tuple(Cell("z", i, "latent[0]", None, ()) for i in range(n)),
        "drawn": np.ones(n, dtype=bool),
        "named": np.isin(np.arange(n), largest),
        "n_cells": n,
        "method": "a method",
        "unit": "logits",
    }
    return Agreement(approximate=approximate, exact=exact, **arguments | options)


def test_the_numbers_are_those_of_scipy() -> None:
    approximate = EXACT + np.random.default_rng(1).normal(size=EXACT.shape)
    found = agreement(approximate)
    assert np.isclose(found.pearson, stats.pearsonr(approximate.ravel(), EXACT.ravel())[0])
    assert np.isclose(found.spearman, stats.spearmanr(approximate.ravel(), EXACT.ravel())[0])
    assert np.isclose(found.max_error, np.abs(approximate - EXACT).max())
    error = np.linalg.norm(approximate - EXACT) / np.linalg.norm(EXACT)
    assert np.isclose(found.relative_error, error)
    assert found.n == 60


def test_the_verdict_follows_the_relative_error() -> None:
    for factor, word, fails in (
        (1.0, "agrees with exact patching: it is off by 0.0%", False),
        (1.09, "agrees", False),
        (1.3, "is rough here: it is off by 30.0%", False),
        (0.0, "FAILS here: it is off by 100.0%", True),
        (-1.0, "nor does its order hold", True),
        (2.0, "though its order holds", True),
    ):
        found = agreement(EXACT * factor)
        assert word in found.verdict, factor
        assert found.fails is fails
        assert found.verdict in repr(found)


def test_nothing_is_no_failure() -> None:
    zeros = np.zeros((3, 2))
    assert agreement(zeros, zeros).verdict.endswith("agree that nothing here has an effect")
    assert not agreement(zeros + 1e-12, zeros - 1e-12, floor=1e-9).fails
    assert agreement(zeros + 1e-3, zeros, floor=1e-9).fails
    assert agreement(zeros + 1e-3, zeros, floor=1e-9).relative_error == np.inf


def test_what_is_missed_is_counted_and_bounded() -> None:
    """Of ten cells drawn, the two that are named are the smallest; two others exceed both."""
    exact = np.array([1.0, 1.5, 3.0, 2.0, 0, 0, 0, 0, 0, 0])[:, None]
    approximate = np.array([9.0, 8.0, 0, 0, 0, 0, 0, 0, 0, 0])[:, None]
    found = agreement(approximate, exact, n_cells=100)
    assert found.recall == 0
    assert found.missed == 3.0
    assert found.exceeding == (2, 8)
    by_scipy = stats.binomtest(2, 8).proportion_ci(0.9, method="exact").high
    assert np.isclose(found.missed_share(), by_scipy)
    assert agreement(approximate, exact).missed_share() == 2 / 8  # all cells were patched
    perfect = agreement(exact, exact, n_cells=100)
    assert perfect.recall == 1
    assert perfect.exceeding == (0, 8)
    assert np.isclose(perfect.missed_share(), 1 - 0.05 ** (1 / 8))
    nobody = agreement(exact[:2], exact[:2], n_cells=100)
    assert nobody.missed_share() == 1.0  # nothing was drawn that is not named


def test_the_bound_holds_as_often_as_it_says() -> None:
    rng = np.random.default_rng(0)
    share, draws, held = 0.1, 20, 0
    for _ in range(400):
        above = rng.random(draws) < share
        exact = np.concatenate([[5.0], np.where(above, 9.0, 0.0)])[:, None]
        approximate = np.concatenate([[99.0], np.zeros(draws)])[:, None]
        named = np.arange(draws + 1) == 0
        found = agreement(approximate, exact, named=named, drawn=~named, n_cells=10**6)
        held += found.missed_share() >= share
    assert held / 400 >= 0.94


def test_correlations_of_too_little_are_missing() -> None:
    for approximate, exact in (([[1.0, 2.0]], [[1.0, 2.0]]), ([[1.0] * 5], [[1.0, 2, 3, 4, 5]])):
        found = agreement(approximate, exact, named=np.array([True]))
        assert np.isnan(found.pearson)
        assert np.isnan(found.spearman)


def test_examples_without_an_answer_are_left_out() -> None:
    exact = EXACT.copy()
    exact[:, 0] = np.nan
    found = agreement(EXACT, exact)
    assert found.n == 48
    assert found.relative_error == 0
    assert "could not be compared" in agreement(EXACT, EXACT * np.nan).verdict


@pytest.mark.parametrize("factor", [1.0, 0.5, 0.0])
def test_only_the_drawn_cells_are_compared(factor: float) -> None:
    drawn = np.arange(12) < 6
    approximate = np.where(drawn[:, None], EXACT, factor * EXACT)
    assert agreement(approximate, drawn=drawn).relative_error == 0
