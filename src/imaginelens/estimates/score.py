"""Tango's score interval: a paired 0/1 outcome, changed in some examples and not in the others.

`gained` counts the examples that went from 0 to 1, `lost` those that went from 1 to 0, of `n`.
Every argument may be an array; they are broadcast against each other.

Source: Tango (1998), Statistics in Medicine 17:891-908.
"""

import numpy as np
from numpy.typing import ArrayLike

from imaginelens.estimates.errors import EstimateError
from imaginelens.estimates.student import critical

_HALVINGS = 60  # of an interval at most 2 long: beyond what float64 resolves


def score_z(gained: ArrayLike, lost: ArrayLike, n: ArrayLike, difference: ArrayLike) -> np.ndarray:
    """The score statistic of "P(gained) - P(lost) = difference": positive where more was gained.

    It is standard normal for large n, falls as `difference` rises, and at 0 it is McNemar's
    (gained - lost) / sqrt(gained + lost). With no discordant example it is 0 at difference 0.

    Raises:
        EstimateError: a count is negative, the two exceed n, or |difference| exceeds 1.

    >>> score_z(6, 16, 161, [-0.1, 0.0]).round(4)
    array([ 1.2489, -2.132 ])
    """
    b, c, n, d = _counts(gained, lost, n, difference)
    if not (np.abs(d) <= 1).all():
        raise EstimateError(
            f"a difference of {d.ravel()[~(np.abs(d) <= 1).ravel()][0]:g} lies outside [-1, 1]; "
            "give it as a proportion, 0.05 for 5 points"
        )
    return _score(b, c, n, d)


def score_interval(
    gained: ArrayLike,
    lost: ArrayLike,
    n: ArrayLike,
    *,
    level: float = 0.95,
    inflation: ArrayLike = 1.0,
    df: ArrayLike | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Tango's interval (low, high) for P(gained) - P(lost): the differences not rejected.

    Args:
        inflation: what the variance is multiplied by: the design effect of clusters.
        df: degrees of freedom of a t quantile; the normal one if left out.

    Raises:
        EstimateError: a count is negative, the two exceed n, the level is no
            probability, or the inflation is not positive.

    >>> low, high = score_interval(6, 16, 161)
    >>> float(low.round(4)), float(high.round(4))
    (-0.124, -0.0054)
    """
    factor = np.asarray(inflation, dtype=np.float64)
    if not (factor > 0).all():
        raise EstimateError(
            f"a variance cannot be multiplied by {factor.min():g}; give a design effect, which is "
            "1 for independent examples"
        )
    b, c, n, widened = _counts(gained, lost, n, np.sqrt(factor) * critical(level, df))
    return _low(b, c, n, widened), np.asarray(-_low(c, b, n, widened))


def _counts(
    gained: ArrayLike, lost: ArrayLike, n: ArrayLike, other: ArrayLike
) -> tuple[np.ndarray, ...]:
    """The arguments in float64, all of one shape."""
    given = (np.asarray(a, dtype=np.float64) for a in (gained, lost, n, other))
    b, c, n, other = np.broadcast_arrays(*given)
    right = (b >= 0) & (c >= 0) & (n >= 1) & (b + c <= n)
    if not right.all():
        first = np.flatnonzero(~right.ravel())[0]
        raise EstimateError(
            f"{b.ravel()[first]:g} gained and {c.ravel()[first]:g} lost of {n.ravel()[first]:g} "
            "examples are no counts; give whole numbers >= 0 that add up to n at most"
        )
    return b, c, n, other


def _score(b: np.ndarray, c: np.ndarray, n: np.ndarray, d: np.ndarray) -> np.ndarray:
    """The statistic, worked out for |d|: with d, gained and lost change places, and the sign."""
    sign = np.where(d < 0, -1.0, 1.0)
    b, c, d = np.where(d < 0, c, b), np.where(d < 0, b, c), np.asarray(np.abs(d))
    above = b - c - n * d
    variance = n * (2 * _constrained(b, c, n, d) + d * (1 - d))
    # Both are 0 when nothing speaks against d (no discordant example at d=0, all gained at d=1).
    with np.errstate(divide="ignore", invalid="ignore"):
        z = np.where(above == 0, 0.0, above / np.sqrt(variance))
    return np.asarray(sign * z)


def _constrained(b: np.ndarray, c: np.ndarray, n: np.ndarray, d: np.ndarray) -> np.ndarray:
    """The most likely P(lost) where P(gained) - P(lost) = d >= 0: root of a quadratic."""
    linear = 2 * n * d - b * (1 + d) - c * (1 - d)
    constant = -c * d * (1 - d)
    root = np.sqrt(linear**2 - 8 * n * constant)
    # Of two equal formulas the one that subtracts no nearly equal numbers.
    with np.errstate(divide="ignore", invalid="ignore"):
        q = np.where(linear > 0, -2 * constant / (linear + root), (root - linear) / (4 * n))
    return np.asarray(q)


def _low(b: np.ndarray, c: np.ndarray, n: np.ndarray, widened: np.ndarray) -> np.ndarray:
    """The lower end, by halving between -1 and the observed difference."""
    out, inside = np.full(b.shape, -1.0), np.asarray((b - c) / n)
    for _ in range(_HALVINGS):
        middle = np.asarray((out + inside) / 2)
        rejected = _score(b, c, n, middle) > widened
        out, inside = np.where(rejected, middle, out), np.where(rejected, inside, middle)
    return inside
