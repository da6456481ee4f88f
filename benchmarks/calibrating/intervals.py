"""The intervals of `estimates`, of many data sets at a time: the first axis."""

from collections.abc import Callable
from functools import cache

import numpy as np

from imaginelens.estimates import design
from imaginelens.estimates.score import score_interval
from imaginelens.estimates.student import critical

Ends = tuple[np.ndarray, np.ndarray]
AtLevel = Callable[[float], Ends]


def t_ends(mean: np.ndarray, variance: np.ndarray, df: int, level: float) -> Ends:
    half = critical(level, df) * np.sqrt(variance)
    return mean - half, mean + half


def single(x: np.ndarray) -> np.ndarray:
    """The variance of the mean of each data set (run, example)."""
    return x.var(1, ddof=1) / x.shape[1]


def grouped(x: np.ndarray, codes: np.ndarray) -> np.ndarray:
    """The same with groups, CR2."""
    n, sizes = x.shape[1], np.bincount(codes)
    member = (codes[:, None] == np.arange(len(sizes))).astype(float)
    sums = (x - x.mean(1, keepdims=True)) @ member
    variance = (sums**2 / (1 - sizes / n)).sum(1) / n**2
    alone = single(x)
    return np.where((variance <= 1e-20 * alone) & (alone > 0), alone, variance)


def crossed(x: np.ndarray) -> np.ndarray:
    """The same for (run, recipient, donor)."""
    flat = x.reshape(len(x), -1)
    rows, columns = (side.ravel() for side in np.indices(x.shape[1:]))
    row, column = grouped(flat, rows), grouped(flat, columns)
    return np.maximum(row + column - single(flat), np.maximum(row, column))


def telling(x: np.ndarray, codes: np.ndarray) -> np.ndarray:
    """In how many groups something other than the most frequent value happened."""
    found = np.unique(x)
    counts = np.stack([(x == value).sum(1) for value in found])
    member = (codes[:, None] == np.arange(codes.max() + 1)).astype(float)
    groups = np.stack([(((x != value) @ member) > 0).sum(1) for value in found])
    return np.where(counts == counts.max(0), groups, len(codes)).min(0)


def group_effect(x: np.ndarray, codes: np.ndarray) -> np.ndarray:
    """The design effect of 0/1 outcomes or changes in groups."""
    largest = (np.bincount(codes) ** 2).sum() / x.shape[1]
    return _effect(largest, grouped(x, codes), single(x), telling(x, codes))


def crossed_effect(x: np.ndarray) -> np.ndarray:
    """The design effect of recipients crossed with donors."""
    flat = x.reshape(len(x), -1)
    rows, columns = (side.ravel() for side in np.indices(x.shape[1:]))
    least = np.minimum(telling(flat, rows), telling(flat, columns))
    return _effect(flat.shape[1] / min(x.shape[1:]), crossed(x), single(flat), least)


def _effect(
    largest: float, variance: np.ndarray, alone: np.ndarray, telling: np.ndarray
) -> np.ndarray:
    with np.errstate(divide="ignore", invalid="ignore"):
        observed = np.where(alone > 0, np.maximum(1.0, variance / alone), 1.0)
    more = design._MORE_GROUPS
    return (telling * observed + more * largest) / (telling + more)


def change_ends(x: np.ndarray, effect: np.ndarray, df: int) -> AtLevel:
    """Tango's interval of (run, example) changes, with a design effect."""
    counts = (x == 1).sum(1), (x == -1).sum(1), x.shape[1]
    return lambda level: score_interval(*counts, level=level, inflation=effect, df=df)


def hit_ends(x: np.ndarray, effect: np.ndarray, df: int, level: float) -> Ends:
    """Wilson's interval of (run, example) hits, with a design effect."""
    n = x.shape[1]
    p, m, z = x.mean(1), n / effect, float(critical(level, df))
    centre = (p + z**2 / (2 * m)) / (1 + z**2 / m)
    half = z / (1 + z**2 / m) * np.sqrt(p * (1 - p) / m + z**2 / (4 * m**2))
    return np.where(p == 0, 0.0, centre - half), np.where(p == 1, 1.0, centre + half)


@cache
def resamples(groups: int) -> np.ndarray:
    """How often each group is in each of the library's resamples: its generator, its seed."""
    generator, step = np.random.default_rng(0), max(1, 1_000_000 // groups)
    counts = []
    for start in range(0, 10_000, step):
        picked = generator.integers(groups, size=(min(step, 10_000 - start), groups))
        cells = picked + groups * np.arange(len(picked))[:, None]
        counts.append(np.bincount(cells.ravel(), minlength=picked.size).reshape(picked.shape))
    return np.concatenate(counts).astype(float)


def bootstrap_ends(x: np.ndarray, codes: np.ndarray) -> AtLevel:
    """The studentised bootstrap of every data set, by matrix products with the counts."""
    sizes = np.bincount(codes)
    member = (codes[:, None] == np.arange(len(sizes))).astype(float)
    mean = x.mean(1)
    sums = ((x - mean[:, None]) @ member).T  # (group, run)
    counts = resamples(len(sizes))
    n = (counts @ sizes)[:, None]
    moved = counts @ sums / n
    variance = np.zeros_like(moved)
    for size in np.unique(sizes):
        own = counts[:, sizes == size]
        first, second = own @ sums[sizes == size], own @ sums[sizes == size] ** 2
        squares = second - 2 * size * moved * first + own.sum(1)[:, None] * (size * moved) ** 2
        variance += squares / (1 - size / n)
    with np.errstate(divide="ignore", invalid="ignore"):
        t = moved / np.sqrt(np.maximum(variance, 0) / n**2)
    cuts = {level: int((1 - level) / 2 * (len(t) + 1)) for level in (0.95, 0.90)}
    t = np.partition(t, [k for c in cuts.values() for k in (c - 1, len(t) - c)], axis=0)
    quantiles = {level: (t[len(t) - cut], t[cut - 1]) for level, cut in cuts.items()}
    error = np.sqrt(grouped(x, codes))

    def at(level: float) -> Ends:
        most, least = quantiles[level]
        return mean - most * error, mean - least * error

    return at
