"""Tests without an assumed distribution: McNemar's for paired 0/1 outcomes, and sign flips."""

import itertools
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float
from scipy import stats

from imaginelens.estimates.errors import EstimateError
from imaginelens.estimates.inputs import group_codes, labels, numbers, outcomes, same_length

_ENUMERATED = 14  # units: 16384 ways to flip them
_AT_ONCE = 1_000_000  # numbers in memory


@dataclass(frozen=True)
class McNemar:
    """How many examples changed in each direction, and the p-values of "as many either way".

    Attributes:
        gained, lost: how many went from 0 to 1, and from 1 to 0.
        missing: examples left out because an outcome of theirs is nan.
        exact: the two-sided binomial p-value; at most 5% of true nulls are rejected at 0.05.
        mid_p: the same less half the probability of what was seen: less conservative, not exact.
    """

    gained: int
    lost: int
    n: int
    missing: int
    exact: float
    mid_p: float


def mcnemar(after: Any, before: Any) -> McNemar:
    """McNemar's test of paired 0/1 outcomes, exact and mid-P.

    Examples must be independent: with groups use `Estimate.paired(..., groups=)`.

    Raises:
        EstimateError: the lengths differ, or a value is neither 0, 1 nor nan.

    >>> test = mcnemar([1, 1, 1, 1, 1, 0, 1], [0, 0, 0, 0, 0, 1, 1])
    >>> test.gained, test.lost, test.exact, test.mid_p
    (5, 1, 0.21875, 0.125)
    """
    new, old = outcomes(after, "after"), outcomes(before, "before")
    same_length(new, old, ("after", "before"))
    change = (new - old)[~np.isnan(new - old)]
    gained, lost = int((change == 1).sum()), int((change == -1).sum())
    fewer, discordant = min(gained, lost), gained + lost
    up_to, below = np.asarray(stats.binom.cdf([fewer, fewer - 1], discordant, 0.5)).tolist()
    exact, mid_p = min(1.0, 2 * up_to), up_to + below
    return McNemar(gained, lost, len(change), new.size - len(change), exact, mid_p)


def sign_flip(values: Any, *, groups: Any = None, draws: int = 10_000, seed: int = 0) -> float:
    """The two-sided p-value of "the values are symmetric about 0", by flipping their signs.

    All ways to flip are counted where there are at most 14 units (examples, or groups, which are
    flipped whole); beyond, `draws` random ones and the observed one, so that p is never 0.

    Raises:
        EstimateError: there are fewer than 2 values or groups, or a label is missing.

    >>> sign_flip([1.0, 2.0, 3.0])
    0.25
    """
    given = numbers(values, "values").ravel()
    present = ~np.isnan(given)
    named = labels(groups)
    codes = np.arange(len(given)) if named is None else group_codes(named, len(given))
    units = np.unique(codes[present], return_inverse=True)[1]
    sums = np.bincount(units, weights=given[present])
    if len(sums) < 2:
        kind = "values" if groups is None else "groups"
        raise EstimateError(
            f"{len(sums)} of the {kind} can be flipped, and a test needs at least 2; use more data"
        )
    if draws < 1:
        raise EstimateError(f"{draws} draws give no p-value; use 10000")
    if len(sums) <= _ENUMERATED:
        every = np.array(list(itertools.product((-1.0, 1.0), repeat=len(sums))))
        return _as_far(every, sums) / len(every)
    generator, step = np.random.default_rng(seed), max(1, _AT_ONCE // len(sums))
    hits = sum(
        _as_far(generator.choice((-1.0, 1.0), size=(min(step, draws - start), len(sums))), sums)
        for start in range(0, draws, step)
    )
    return (hits + 1) / (draws + 1)


def _as_far(signs: Float[np.ndarray, "flip unit"], sums: Float[np.ndarray, " unit"]) -> int:
    """How many flips lead at least as far from 0 as the data; equal up to rounding is as far."""
    slack = 1e-12 * np.abs(sums).sum()
    return int((np.abs(signs @ sums) >= np.abs(sums.sum()) - slack).sum())
