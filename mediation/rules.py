"""Rules that weigh the points of a path between 0 and 1, for integrals over it."""

from collections.abc import Callable
from typing import Literal, get_args

import numpy as np

from imaginelens.hooks.errors import InputError

Rule = Literal["gauss-legendre", "midpoint", "left", "right"]
Points = tuple[np.ndarray, np.ndarray]


def points(rule: Rule, steps: int) -> Points:
    """Where a rule looks, and with which weights; the weights sum to 1.

    `gauss-legendre` is exact for polynomials up to degree 2 steps - 1; `left`, `right` and
    `midpoint` are Riemann sums, with which other tools approximate integrated gradients.

    Raises:
        InputError: no such rule, or no steps.

    >>> where, weights = points("gauss-legendre", 5)
    >>> round(float(weights @ (3 * where**2)), 12), round(float(points("left", 5)[0].max()), 1)
    (1.0, 0.8)
    """
    if rule not in get_args(Rule):
        raise InputError(f"rule is {rule!r}; choose {', '.join(map(repr, get_args(Rule)))}")
    if type(steps) is not int or steps < 1:
        raise InputError(f"steps is {steps!r}, expected a number of points on the path, 1 or more")
    return _RULES[rule](steps)


def _gauss_legendre(steps: int) -> Points:
    where, weights = np.polynomial.legendre.leggauss(steps)
    return (where + 1) / 2, weights / 2


def _riemann(shift: float) -> Callable[[int], Points]:
    return lambda steps: ((np.arange(steps) + shift) / steps, np.full(steps, 1 / steps))


_RULES: dict[str, Callable[[int], Points]] = {
    "gauss-legendre": _gauss_legendre,
    "midpoint": _riemann(0.5),
    "left": _riemann(0.0),
    "right": _riemann(1.0),
}
