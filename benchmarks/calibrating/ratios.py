"""Ratios, and margins that are a share of the total effect."""

from collections.abc import Iterator
from functools import partial

import numpy as np

import imaginelens.estimates as ie
from calibrating.intervals import grouped, single, t_ends
from calibrating.means import change_estimate
from calibrating.rows import Task
from calibrating.sampling import (
    DISTRIBUTIONS,
    FAST,
    GROUPS,
    SIZES,
    Draw,
    change_shares,
    codes_of,
    decisions,
    normal_groups,
)
from imaginelens.estimates.score import score_interval
from imaginelens.estimates.student import critical


def ratios() -> Iterator[Task]:
    """`Estimate.ratio`: numerator and denominator correlate at 0.5, and the ratio is 0.4."""
    for name in ("normal", "lognormal"):
        for n, size in ((20, 1.0), (30, 0.3), (50, 1.0), (191, 0.3)):
            data = f"{name}, n = {n}, denominator's mean {size:g} sd"
            yield fieller(data, None, n, partial(ratio_pairs, name=name, n=n, size=size))
    for sizes, pattern in GROUPS.items():
        codes = codes_of(20, pattern)
        data = f"normal, 20 groups of {sizes}, ICC 0.3, denominator's mean 1 sd"
        draw = partial(ratio_groups, codes=codes, size=1.0)
        yield fieller(data, codes, len(codes), draw)


def ratio_pairs(g: np.random.Generator, runs: int, name: str, n: int, size: float) -> np.ndarray:
    """(run, numerator or denominator, example)."""
    x = DISTRIBUTIONS[name](g, (runs, 2, n))
    if name == "lognormal":
        x = x / np.sqrt((np.e - 1) * np.e)
    return _tied(x, size)


def ratio_groups(g: np.random.Generator, runs: int, codes: np.ndarray, size: float) -> np.ndarray:
    x = normal_groups(g, 2 * runs, codes, 0.3).reshape(runs, 2, len(codes))
    return _tied(x, size)


def _tied(x: np.ndarray, size: float) -> np.ndarray:
    x = x.copy()
    x[:, 0] = 0.5 * x[:, 1] + np.sqrt(0.75) * x[:, 0] + 0.4 * size
    x[:, 1] += size
    return x


def fieller(
    data: str,
    codes: np.ndarray | None,
    n: int,
    draw: Draw,
) -> Task:
    df = n - 1 if codes is None else int(codes.max())
    variance = single if codes is None else partial(grouped, codes=codes)
    t, inner = float(critical(0.95, df)), float(critical(0.90, df))

    def statistic(x: np.ndarray, at: float) -> np.ndarray:
        contrast = x[:, 0] - at * x[:, 1]
        return contrast.mean(1) / np.sqrt(variance(contrast))

    def decide(x: np.ndarray) -> dict[str, np.ndarray]:
        bottom = x[:, 1].mean(1) / np.sqrt(variance(x[:, 1]))
        inside = (statistic(x, -0.4) * np.sign(bottom) > inner) & (
            statistic(x, 0.4) * np.sign(bottom) < -inner
        )
        return {
            "coverage": np.abs(statistic(x, 0.4)) <= t,
            "TOST": inside & (np.abs(bottom) > t),
        }

    def library(x: np.ndarray) -> dict[str, bool]:
        estimate = ie.Estimate.ratio(x[0], x[1], groups=codes)
        return {"coverage": 0.4 in estimate.ci(), "TOST": estimate.equivalence(0.4).equivalent}

    name = "Fieller" if codes is None else "cluster-robust Fieller"
    return decisions(name, data, draw, decide, library, runs=FAST, numbers=4 * n)


def relative_margins() -> Iterator[Task]:
    """Margins of 20% of the total effect, at an effect of exactly that size."""
    for n in SIZES:
        yield decisions(
            "t, relative margin",
            f"normal, n = {n}, total effect 1 sd, correlation 0.5",
            partial(_relative_pairs, n=n),
            _relative_means,
            _relative_mean_by_library,
            numbers=4 * n,
            runs=FAST,
        )
        for discordance in (0.1, 0.2):
            yield decisions(
                "Tango score, relative margin",
                f"n = {n}, {discordance:.0%} discordant, difference 10 points of a total of 50",
                partial(_relative_counts, n=n, discordance=discordance),
                partial(_relative_changes, n=n),
                partial(_relative_changes_by_library, n=n),
                numbers=20,
                runs=FAST,
                binary=True,
            )


def _relative_pairs(g: np.random.Generator, runs: int, n: int) -> np.ndarray:
    x = g.normal(size=(runs, 2, n))
    x[:, 0] = 0.5 * x[:, 1] + np.sqrt(0.75) * x[:, 0] + 0.2
    x[:, 1] += 1.0
    return x


def _relative_means(x: np.ndarray) -> dict[str, np.ndarray]:
    effect, total, df = x[:, 0], x[:, 1], x.shape[2] - 1
    mean = total.mean(1)
    known = np.abs(mean) / np.sqrt(single(total)) > critical(0.95, df)
    share = 0.2 * np.sign(mean)[:, None] * total
    low = t_ends((effect + share).mean(1), single(effect + share), df, 0.90)[0]
    high = t_ends((effect - share).mean(1), single(effect - share), df, 0.90)[1]
    return {"TOST": known & (low > 0) & (high < 0)}


def _relative_mean_by_library(x: np.ndarray) -> dict[str, bool]:
    estimate = ie.Estimate.mean(x[0], total=ie.Estimate.mean(x[1]))
    return {"TOST": estimate.equivalence(ie.relative(0.2)).equivalent}


def _relative_counts(g: np.random.Generator, runs: int, n: int, discordance: float) -> np.ndarray:
    """(run, effect or total, gained or lost)."""
    effect = change_shares(discordance, 0.1)
    found = [g.multinomial(n, shares, runs)[:, ::-2] for shares in (effect, (0.05, 0.4, 0.55))]
    return np.stack(found, axis=1)


def _relative_changes(x: np.ndarray, n: int) -> dict[str, np.ndarray]:
    (gained, lost), (up, down) = x[:, 0].T, x[:, 1].T
    low, high = score_interval(up, down, n, level=0.95, df=n - 1)
    known = (low > 0) | (high < 0)
    low, high = score_interval(up, down, n, level=1 - 0.1 * 0.05, df=n - 1)
    least = 0.2 * np.where(up >= down, low, -high)
    low, high = score_interval(gained, lost, n, level=1 - 2 * 0.9 * 0.05, df=n - 1)
    return {"TOST": known & (least > 0) & (low > -least) & (high < least)}


def _relative_changes_by_library(x: np.ndarray, n: int) -> dict[str, bool]:
    changes = [np.repeat([1.0, -1.0, 0.0], [b, c, n - b - c]) for b, c in x]
    total = change_estimate(changes[1])
    estimate = change_estimate(changes[0], total=total)
    return {"TOST": estimate.equivalence(ie.relative(0.2)).equivalent}
