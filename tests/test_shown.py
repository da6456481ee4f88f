"""Results can be looked at whatever they hold: with too few examples they say so."""

from collections.abc import Callable
from functools import cache
from typing import Any

import pytest

import imaginelens as il
from imaginelens.estimates import EstimateError
from imaginelens.estimates.errors import spoken

NONE = "no interval"


@cache
def lens() -> il.Organism:
    return il.load("latent-content")


def swept(pairs: il.Pairs) -> il.EffectMap:
    return il.sweep(lens(), pairs, context="fixed")


def worlds(pairs: il.Pairs) -> il.PotentialOutcomes:
    return il.counterfactuals(lens(), pairs, controls=False, reference=False)


ANY: dict[str, Callable[[il.Pairs], Any]] = {
    "sweep": swept,
    "sufficiency": lambda pairs: il.sufficiency(lens(), pairs, swept(pairs).cells[:2]),
    "counterfactuals": worlds,
    "effects": lambda pairs: worlds(pairs).effects(),
    "attribute": lambda pairs: il.attribute(lens(), pairs),
    "step_influence": lambda pairs: il.step_influence(lens(), pairs),
    "causal_trace": lambda pairs: il.causal_trace(lens(), pairs, draws=2),
}
TWO: dict[str, Callable[[il.Pairs], Any]] = {  # one of them is tested on
    "selectivity": lambda pairs: il.selectivity(lens(), pairs, swept(pairs), k=1),
    "faithfulness_curve": lambda pairs: il.faithfulness_curve(
        lens(), pairs, swept(pairs), shares=(0.5, 1.0)
    ),
    "interchange": lambda pairs: il.interchange(lens(), pairs),
    "input_dependence": lambda pairs: il.input_dependence(lens(), pairs),
}


def shown(result: Any) -> str:
    html = getattr(result, "_repr_html_", None)
    assert html is None or html()
    return repr(result)


@pytest.mark.parametrize("name", ANY)
def test_one_example_is_shown(name: str) -> None:
    told = shown(ANY[name](lens().task(n=1, seed=0)))
    tells = {"sweep", "causal_trace", "sufficiency", "effects"}
    assert (NONE in told) == (name in tells), told


@pytest.mark.parametrize("name", ANY)
def test_one_group_is_shown(name: str) -> None:
    task = lens().task(n=3, seed=0)
    pairs = il.Pairs(task.base, task.source, task.base_answers, task.source_answers, groups="aaa")
    told = shown(ANY[name](pairs))
    assert (NONE in told) == (name in {"sufficiency", "effects"}), told


@pytest.mark.parametrize("name", TWO)
def test_two_examples_are_shown(name: str) -> None:
    told = shown(TWO[name](lens().task(n=2, seed=0)))
    assert (NONE in told) == (name in {"selectivity", "faithfulness_curve"}), told


def test_only_a_missing_estimate_is_told_not_raised() -> None:
    def fails() -> object:
        raise KeyError("another thing")

    def few() -> object:
        raise EstimateError("too few")

    assert spoken(lambda: 1) == "1"
    assert spoken(few) == "no interval (too few)"
    with pytest.raises(KeyError):
        spoken(fails)
