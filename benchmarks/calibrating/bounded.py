"""Contrasts of several 0/1 outcomes: double differences, in groups too, and their ratios."""

from collections.abc import Iterator
from functools import partial

import numpy as np

import imaginelens.estimates as ie
from calibrating.rows import Row, Task, counted
from calibrating.sampling import FAST, GROUPS, SIZES, SLOW, codes_of, copied_groups, seed_of
from imaginelens.estimates.bounded import bounded_mean, bounded_ratio

# The shares of -2, -1, 0, 1 and 2 in a double difference.
CONTRASTS = {
    "2% change, both ways": (0.0, 0.01, 0.98, 0.01, 0.0),
    "10% change, both ways": (0.01, 0.04, 0.90, 0.04, 0.01),
    "5% change, by 1": (0.0, 0.0, 0.95, 0.05, 0.0),
    "10% change, by 1 or 2": (0.0, 0.0, 0.90, 0.05, 0.05),
    "60% change": (0.05, 0.20, 0.40, 0.25, 0.10),
}
# The shares of (y00, y10, y11): an effect of 0.5, of which 0.2 by y11 - y10. And the same, rarer.
WORLDS = np.array([[0, 0, 0], [0, 0, 1], [0, 1, 1], [1, 1, 1], [1, 0, 0], [0, 1, 0], [1, 0, 1]])
RATIOS = {
    "effect 0.5": (0.20, 0.20, 0.33, 0.20, 0.02, 0.02, 0.03),
    "effect 0.1": (0.40, 0.03, 0.08, 0.43, 0.02, 0.01, 0.03),
}
POSSIBLE = np.array(
    [(c - b, c - a) for a in (0, 1) for b in (0, 1) for c in (0, 1)], dtype=float
)  # numerator, denominator


def contrasts() -> Iterator[Task]:
    """`Estimate.bounded` and `Estimate.ratio(possible=...)`."""
    for n in SIZES:
        for name, shares in CONTRASTS.items():
            data = f"{name}, n = {n}"
            yield f"bounded score | {data}", partial(mean_rows, data, np.arange(n), 0.0, shares)
        for name, shares in RATIOS.items():
            data = f"{name}, n = {n}"
            yield f"bounded Fieller | {data}", partial(ratio_rows, data, n, shares)
    for sizes, pattern in GROUPS.items():
        codes = codes_of(20, pattern)
        for name, shares in CONTRASTS.items():
            data = f"{name}, 20 groups of {sizes}, ICC 0.3"
            compute = partial(mean_rows, data, codes, 0.3, shares)
            yield f"cluster-adjusted bounded score | {data}", compute


def mean_rows(data: str, codes: np.ndarray, icc: float, shares: tuple[float, ...]) -> list[Row]:
    """Coverage, size of the test, and of TOST at a margin of exactly the effect."""
    clustered, truth = icc > 0, round(float(np.arange(-2, 3) @ shares), 12)
    generator, runs = np.random.default_rng(seed_of(data)), SLOW if clustered else FAST
    groups, known = codes if clustered else None, dict[bytes, tuple[bool, bool]]()
    if clustered:
        drawn = copied_groups(generator, runs, codes, icc, shares) - 2.0
    else:
        drawn = generator.multinomial(len(codes), shares, runs)
    hits = {"coverage": 0, "TOST" if truth else "test": 0}
    for run, given in enumerate(drawn):
        key = given.tobytes()
        if key not in known or run < 20:
            x = given if clustered else np.repeat(np.arange(-2.0, 3.0), given)
            known[key] = decided(x, groups, truth)
            if run < 20:
                check(x, groups, truth, known[key])
        for name, hit in zip(hits, known[key], strict=True):
            hits[name] += hit
    procedure = "cluster-adjusted bounded score" if clustered else "bounded score"
    return [counted(procedure, data, name, hit, runs, True) for name, hit in hits.items()]


def decided(x: np.ndarray, groups: np.ndarray | None, truth: float) -> tuple[bool, bool]:
    """Whether the interval holds the truth, and whether the test or TOST rejects."""
    if abs(x.mean() - truth) < 1e-12:  # but for rounding the mean itself: never rejected
        return True, False
    found = bounded_mean(x, -2.0, 2.0, groups)
    p = 2 * min(found.greater(truth), found.less(truth))
    if not truth:
        return p >= 0.05, p < 0.05
    opposite = abs(x.mean() + truth) < 1e-12  # so that the mean is -margin
    return p >= 0.05, not opposite and max(found.greater(-truth), found.less(truth)) < 0.05


def check(x: np.ndarray, groups: np.ndarray | None, truth: float, here: tuple[bool, bool]) -> None:
    """`Estimate` must decide the same."""
    if truth and abs(abs(x.mean()) - truth) < 1e-12:
        return
    estimate = ie.Estimate.bounded(x, low=-2, high=2, groups=groups)
    found = estimate.equivalence(truth).equivalent if truth else estimate.pvalue() < 0.05
    assert (truth in estimate.ci(), found) == here, f"{estimate}, truth {truth}: {here} here"


def ratio_rows(data: str, n: int, shares: tuple[float, ...]) -> list[Row]:
    """Coverage of the ratio (y11 - y10) / (y11 - y00)."""
    generator = np.random.default_rng(seed_of(data))
    pairs = np.stack([WORLDS[:, 2] - WORLDS[:, 1], WORLDS[:, 2] - WORLDS[:, 0]], axis=1)
    mean = np.array(shares) @ pairs
    truth, known, hits = float(mean[0] / mean[1]), dict[bytes, bool](), 0
    for run, given in enumerate(generator.multinomial(n, shares, FAST)):
        key = given.tobytes()
        if key not in known or run < 10:
            top, bottom = np.repeat(pairs, given, axis=0).T.astype(float)
            itself = abs(top.sum() - truth * bottom.sum()) < 1e-9  # but for rounding
            found = bounded_ratio(top, bottom, POSSIBLE)
            known[key] = itself or min(found.greater(truth), found.less(truth)) >= 0.025
            if run < 10 and not itself:
                estimate = ie.Estimate.ratio(top, bottom, possible=POSSIBLE)
                assert (truth in estimate.ci()) == known[key], f"{estimate}, ratio {truth}"
        hits += known[key]
    return [counted("bounded Fieller", data, "coverage", hits, FAST, True)]
