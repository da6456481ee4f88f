"""Sums, differences and multiples of maps, example by example."""

import math
from dataclasses import fields, replace
from typing import Any

import numpy as np

from imaginelens.hooks.errors import InputError
from imaginelens.mediation.effect_map import FIRED, NOT_MEASURED, EffectMap
from imaginelens.mediation.map_merging import order_of
from imaginelens.mediation.provenance import Provenance


def combined(a: EffectMap, b: EffectMap, sign: int) -> EffectMap:
    """a + b, or a - b where `sign` is -1.

    What either needs to be judged (flags, limits, notes, cost) is kept; the total effect is not,
    for that of a sum is none of the pairs'.
    """
    _check_examples(a, b)
    order = order_of(b.cells, a.cells)
    of_b = sign * b.effect[order]
    flags_b = b.flags[order]
    unmeasured = (a.flags == NOT_MEASURED) | (flags_b == NOT_MEASURED)
    flags = np.where(a.flags == flags_b, a.flags, FIRED)
    ends = None
    if (one := _limits(a)) is not None and (two := _limits(b)) is not None:
        two = two if sign > 0 else (-two[1], -two[0])
        ends = (one[0] + two[0], one[1] + two[1])
    symbol = "+" if sign > 0 else "-"
    return replace(
        _plain(a, a.effect + of_b),
        flags=np.where(unmeasured, NOT_MEASURED, flags).astype(np.int8),
        limits=ends,
        direction=a.direction if a.direction == b.direction else "mixed",
        context=a.context if a.context == b.context else "mixed",
        edit=f"({a.edit}) {symbol} ({b.edit})",
        sham=None if a.sham is None or b.sham is None else a.sham + sign * b.sham,
        notes=(
            f"this map is A {symbol} B, example by example; A is {_what(a)}; B is {_what(b)}",
            *(f"A: {note}" for note in a.notes),
            *(f"B: {note}" for note in b.notes),
        ),
        provenance=_of_both(a.provenance, b.provenance, symbol),
    )


def scaled(a: EffectMap, factor: float) -> EffectMap:
    """a times a number."""
    if not math.isfinite(factor) or factor == 0:
        raise InputError(f"a map times {factor:g} says nothing; give a finite number other than 0")
    ends = _limits(a)
    if ends is not None:
        ends = (min(factor * end for end in ends), max(factor * end for end in ends))
    return replace(
        _plain(a, factor * a.effect),
        limits=ends,
        edit=f"{factor:g} * ({a.edit})",
        sham=None if a.sham is None else factor * a.sham,
        notes=(f"this map is {factor:g} * A, example by example; A is {_what(a)}", *a.notes),
    )


def _plain(a: EffectMap, effect: np.ndarray) -> EffectMap:
    """A map with these effects, and nothing known of the outcomes that they are differences of."""
    return replace(
        a,
        before=np.zeros(a.n),
        other=None,
        after=effect,
        change=np.full(effect.shape, np.nan),
        binary=False,
        limits=None,
    )


def _limits(a: EffectMap) -> tuple[float, float] | None:
    return (-1.0, 1.0) if a.binary else a.limits


def _what(a: EffectMap) -> str:
    return (
        f"{a.edit} ({a.direction}, {a.context} context, {a.provenance.model or 'no model named'})"
    )


def _check_examples(a: EffectMap, b: EffectMap) -> None:
    """Refuse maps of other examples, groups or metrics; name the first difference."""
    for name in ("metric", "unit", "n"):
        one, two = getattr(a, name), getattr(b, name)
        if one != two:
            what = "the number of examples" if name == "n" else name
            raise InputError(
                f"the two maps differ in {what}, {one!r} and {two!r}, so their effects cannot be "
                "combined; make both with the same"
            )
    if a.keys and b.keys:
        for i, (one, two) in enumerate(zip(a.keys, b.keys, strict=True)):
            if one != two:
                raise InputError(
                    f"the two maps differ in example {i}, {one!r} and {two!r}; make both with the "
                    "same examples in the same order"
                )
    elif a.provenance.inputs != b.provenance.inputs:
        raise InputError(
            f"the two maps differ in their inputs, {a.provenance.inputs!r} and "
            f"{b.provenance.inputs!r}; make both with the same examples in the same order"
        )
    if a.groups != b.groups:
        raise InputError("the two maps differ in the groups of their examples; make both with one")


def _of_both(a: Provenance, b: Provenance, symbol: str) -> Provenance:
    """Where both came from: what differs is given twice."""
    words: dict[str, Any] = {}
    for field in fields(Provenance):
        one, two = getattr(a, field.name), getattr(b, field.name)
        if isinstance(one, str) and one != two:
            words[field.name] = f"{one} | {two}"
    words["formula"] = f"({a.formula}) {symbol} ({b.formula})"
    words["versions"] = tuple(dict.fromkeys((*a.versions, *b.versions)))
    words["forwards"], words["seconds"] = a.forwards + b.forwards, a.seconds + b.seconds
    return replace(a, **words)
