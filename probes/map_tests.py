"""Which cells of a map are above what permuted labels give, and how sure that is."""

from typing import Literal, get_args

import numpy as np
from jaxtyping import Float

from imaginelens.estimates.multiplicity import adjust
from imaginelens.hooks.errors import InputError

Adjust = Literal["bh", "by", "holm", "max"]


def pvalues(
    observed: Float[np.ndarray, "*cells"], null: Float[np.ndarray, "*cells permutation"]
) -> Float[np.ndarray, "*cells"]:
    """The one-sided p-value of every cell, by what permuted labels give in all cells.

    Each cell is measured from the mean of its own permutations, in their standard deviations; these
    distances are then pooled over the map, so that B permutations of C cells resolve p-values of
    1 / (1 + B C). With one cell this is the exact test; with more it takes the standardised null
    distributions to be alike, which "max" of `adjusted` does not.

    >>> pvalues(np.array([3.0, np.nan]), np.array([[1.0, 2.0, 0.0], [np.nan] * 3])).tolist()
    [0.25, nan]
    """
    distance, permuted = _standardised(observed, null)
    still = _spread(null) == 0  # no distance to measure, so the cell's own ranks
    pool = np.sort(permuted[~(np.isnan(observed) | still)].ravel())
    above = len(pool) - np.searchsorted(pool, distance - 1e-9)
    found = (1 + above) / (1 + len(pool))
    own = (1 + (null >= observed[..., None]).sum(-1)) / (1 + null.shape[-1])
    return np.where(np.isnan(observed), np.nan, np.where(still, own, found))


def adjusted(
    observed: Float[np.ndarray, "*cells"],
    null: Float[np.ndarray, "*cells permutation"],
    *,
    method: Adjust = "bh",
) -> Float[np.ndarray, "*cells"]:
    """P-values that allow for the number of cells.

    "bh" bounds the share of false cells among those named, "by" also where cells depend on each
    other in any way, "holm" the chance of a single false one; "max" bounds that chance too, by the
    largest distance over the map in each permutation, whatever the cells' distributions.

    Raises:
        InputError: there is no such method.
    """
    check_method(method)
    if method != "max":
        return adjust(pvalues(observed, null), method=method)
    distance, permuted = _standardised(observed, null)
    largest = np.nanmax(permuted.reshape(-1, permuted.shape[-1]), axis=0)
    found = (1 + (largest >= distance[..., None] - 1e-9).sum(-1)) / (1 + len(largest))
    return np.where(np.isnan(observed), np.nan, found)


def check_method(method: str) -> None:
    """Refuse what is no way to allow for many cells.

    Raises:
        InputError: there is no such method.
    """
    if method not in get_args(Adjust):
        raise InputError(f"there is no adjustment {method!r}; use bh, by, holm or max")


def _standardised(
    observed: Float[np.ndarray, "*cells"], null: Float[np.ndarray, "*cells permutation"]
) -> tuple[Float[np.ndarray, "*cells"], Float[np.ndarray, "*cells permutation"]]:
    """Distances from the permutations' mean; a cell in which they do not vary has 0 or infinity."""
    mean, spread = null.mean(-1), _spread(null)
    moved, some = observed - mean, spread > 0
    distance = np.divide(moved, spread, out=np.zeros_like(moved), where=some)
    distance = np.where(some | (np.abs(moved) <= 1e-9), distance, np.copysign(np.inf, moved))
    permuted = np.divide(
        null - mean[..., None], spread[..., None], out=np.zeros_like(null), where=some[..., None]
    )
    return (
        np.where(np.isnan(observed), np.nan, distance),
        np.where(np.isnan(observed)[..., None], np.nan, permuted),
    )


def _spread(null: Float[np.ndarray, "*cells permutation"]) -> Float[np.ndarray, "*cells"]:
    """The standard deviation of each cell's permutations; 0 where they differ by rounding."""
    found = null.std(-1)
    return np.where(found > 1e-9, found, 0.0)
