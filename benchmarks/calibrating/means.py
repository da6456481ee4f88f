"""Means, shares and paired outcomes: independent, in groups, and of recipients and donors."""

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np

import imaginelens.estimates as ie
from calibrating.intervals import (
    bootstrap_ends,
    change_ends,
    crossed,
    crossed_effect,
    group_effect,
    grouped,
    hit_ends,
    single,
    t_ends,
)
from calibrating.rows import Task
from calibrating.sampling import (
    CLUSTERS,
    CORRELATIONS,
    DISTRIBUTIONS,
    GROUPS,
    SIZES,
    SLOW,
    Case,
    change_shares,
    codes_of,
    copied_cells,
    copied_groups,
    normal_cells,
    normal_groups,
    task,
)


def change_estimate(x: np.ndarray, **options: Any) -> ie.Estimate:
    return ie.Estimate.paired((x > 0).astype(float), (x < 0).astype(float), **options)


def means() -> Iterator[Task]:
    """`Estimate.mean` of independent examples: t and the studentised bootstrap."""
    for name, draw in DISTRIBUTIONS.items():
        for n in SIZES:
            case = Case(
                procedure="t",
                data=f"{name}, n = {n}",
                draw=lambda g, runs, draw=draw, n=n: draw(g, (runs, n)),
                ends=lambda x: partial(t_ends, x.mean(1), single(x), x.shape[1] - 1),
                estimate=ie.Estimate.mean,
            )
            yield task(case)
            yield task(
                replace(
                    case,
                    procedure="studentised bootstrap",
                    ends=lambda x: bootstrap_ends(x, np.arange(x.shape[1])),
                    estimate=partial(ie.Estimate.mean, bootstrap=True),
                    runs=SLOW,
                    checked=3,
                    numbers=10_000,
                )
            )


def clusters() -> Iterator[Task]:
    """Estimates with groups."""
    for count in CLUSTERS:
        for sizes, pattern in GROUPS.items():
            for icc in CORRELATIONS:
                codes, data = codes_of(count, pattern), f"{count} groups of {sizes}, ICC {icc:g}"
                yield from cluster_means(codes, data, icc)
                yield from cluster_changes(codes, data, icc)
                yield from cluster_shares(codes, data, icc)


def cluster_means(codes: np.ndarray, data: str, icc: float) -> Iterator[Task]:
    df = int(codes.max())
    case = Case(
        procedure="cluster-robust t",
        data=f"normal, {data}",
        draw=lambda g, runs: normal_groups(g, runs, codes, icc),
        ends=lambda x: partial(t_ends, x.mean(1), grouped(x, codes), df),
        estimate=partial(ie.Estimate.mean, groups=codes),
        numbers=4 * len(codes),
    )
    yield task(case)
    yield task(
        replace(
            case,
            procedure="studentised group bootstrap",
            ends=lambda x: bootstrap_ends(x, codes),
            estimate=partial(ie.Estimate.mean, groups=codes, bootstrap=True),
            runs=SLOW,
            checked=3,
            numbers=10_000,
        )
    )


def cluster_changes(codes: np.ndarray, data: str, icc: float) -> Iterator[Task]:
    for discordance, difference in (
        (0.02, 0.0),
        (0.05, 0.0),
        (0.10, 0.0),
        (0.02, 0.01),
        (0.05, 0.025),
        (0.10, 0.05),
        (0.20, 0.10),
    ):
        shares = change_shares(discordance, difference)
        points = f"{discordance:.0%} discordant, difference {100 * difference:g} points"
        yield task(
            Case(
                procedure="cluster-adjusted Tango score",
                data=f"{points}, {data}",
                draw=lambda g, runs, shares=shares: (
                    copied_groups(g, runs, codes, icc, shares) - 1.0
                ),
                ends=lambda x: change_ends(x, group_effect(x, codes), int(codes.max())),
                estimate=partial(change_estimate, groups=codes),
                truth=difference,
                margin=difference or None,
                binary=True,
                runs=SLOW,
                numbers=6 * len(codes),
            )
        )


def cluster_shares(codes: np.ndarray, data: str, icc: float) -> Iterator[Task]:
    for p in (0.25, 0.5, 0.9):
        yield task(
            Case(
                procedure="cluster-adjusted Wilson score",
                data=f"share {p:g}, {data}",
                draw=lambda g, runs, p=p: copied_groups(g, runs, codes, icc, (1 - p, p)) + 0.0,
                ends=lambda x: partial(hit_ends, x, group_effect(x, codes), int(codes.max())),
                estimate=partial(ie.Estimate.share, groups=codes, chance=p),
                truth=p,
                null=p,
                binary=True,
                runs=SLOW,
                numbers=6 * len(codes),
            )
        )


def pairs_of_donors() -> Iterator[Task]:
    """Recipients crossed with donors."""
    for rows, columns in ((10, 10), (20, 20), (50, 20)):
        shape, df = (rows, columns), min(rows, columns) - 1
        for row, column in ((0.3, 0.3), (0.6, 0.0), (0.0, 0.0)):
            yield task(
                Case(
                    procedure="two-way crossed t",
                    data=f"normal, {rows} x {columns}, ICC {row:g} and {column:g}",
                    draw=lambda g, runs, s=shape, r=row, c=column: normal_cells(g, runs, s, r, c),
                    ends=lambda x, df=df: partial(t_ends, x.mean((1, 2)), crossed(x), df),
                    estimate=ie.Estimate.crossed,
                    numbers=4 * rows * columns,
                )
            )
        for discordance, difference in (
            (0.05, 0.0),
            (0.10, 0.0),
            (0.05, 0.025),
            (0.10, 0.05),
            (0.20, 0.10),
        ):
            points = f"{discordance:.0%} discordant, difference {100 * difference:g} points"
            shares = change_shares(discordance, difference)
            yield task(
                Case(
                    procedure="two-way crossed Tango score",
                    data=f"{points}, {rows} x {columns}, ICC 0.2 and 0.2",
                    draw=lambda g, runs, s=shape, p=shares: copied_cells(g, runs, s, p),
                    ends=lambda x, df=df: change_ends(x.reshape(len(x), -1), crossed_effect(x), df),
                    estimate=change_estimate,
                    truth=difference,
                    margin=difference or None,
                    binary=True,
                    runs=SLOW,
                    numbers=6 * rows * columns,
                )
            )
