"""Is a paired 0/1 effect within a share of its total effect?

The contrast "effect - share * total" is no 0/1 outcome, and a t test of it would take an effect
that was never seen for one that cannot be. So a bound m is put between the two: the effect is shown
to be below m, and the share of the total to be above it. The error rate is split between these two
tests (Bonferroni), mostly to the effect, because the total is large where such a margin is of use.
"""

from collections.abc import Callable

from imaginelens.estimates.method import Method

_TO_TOTAL = 0.05  # of the error rate, in each of the two directions that the total may have
_TO_EFFECT = 1 - 2 * _TO_TOTAL
_HALVINGS = 30


def within_total(effect: Method, total: Method, share: float, value: float) -> tuple[float, float]:
    """The p-values of "the effect is at most -share * |total|" and "at least share * |total|".

    Args:
        value: of the total.
    """
    most = share * abs(value)

    def smaller_total(m: float) -> float:
        return (total.greater(m / share) if value > 0 else total.less(-m / share)) / _TO_TOTAL

    def lower(m: float) -> float:
        return effect.greater(-m) / _TO_EFFECT

    def upper(m: float) -> float:
        return effect.less(m) / _TO_EFFECT

    return _best(lower, smaller_total, most), _best(upper, smaller_total, most)


def _best(falls: Callable[[float], float], rises: Callable[[float], float], most: float) -> float:
    """The least that the larger of two p-values can be, over all m from 0 to `most`."""
    low, high = 0.0, most
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        low, high = (middle, high) if falls(middle) > rises(middle) else (low, middle)
    return min(1.0, max(falls(low), rises(low)), max(falls(high), rises(high)))
