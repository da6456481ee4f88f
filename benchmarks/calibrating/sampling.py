"""Simulated data sets, many at a time, and how often a procedure is right about them."""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np

import imaginelens.estimates as ie
from calibrating.intervals import AtLevel
from calibrating.rows import Row, Task, counted

FAST, SLOW, MAPS = 100_000, 20_000, 60_000  # data sets
AT_ONCE = 2_000_000  # numbers held at a time
SIZES = (20, 50, 191)
CLUSTERS, CORRELATIONS = (10, 20, 50), (0.3, 0.6)
GROUPS = {"4 each": (4,), "1, 2, 4 or 9": (1, 2, 4, 9)}

Draw = Callable[[np.random.Generator, int], np.ndarray]


@dataclass(frozen=True)
class Case:
    """One procedure on one kind of data.

    Attributes:
        draw: (generator, runs) -> data sets, the first axis.
        ends: data sets -> level -> the ends of their intervals, vectorised.
        estimate: one data set -> `Estimate`, which must give the same.
        margin: for TOST, where it is not simulated at both ends of a wide margin by shifting.
        runs: how many data sets.
        checked: how many of them are given to `Estimate`.
    """

    procedure: str
    data: str
    draw: Callable[[np.random.Generator, int], np.ndarray]
    ends: Callable[[np.ndarray], AtLevel]
    estimate: Callable[[np.ndarray], ie.Estimate]
    truth: float = 0.0
    null: float = 0.0
    margin: float | None = None
    binary: bool = False
    runs: int = FAST
    checked: int = 20
    numbers: int = 200  # in one data set, with what is computed from it


def task(case: Case) -> Task:
    return f"{case.procedure} | {case.data}", partial(simulate, case)


def simulate(case: Case) -> list[Row]:
    """Coverage, and how often the tests reject what is true."""
    generator = np.random.default_rng(seed_of(f"{case.procedure}, {case.data}"))
    batch, done = max(1, AT_ONCE // case.numbers), 0
    hits = dict.fromkeys(("coverage", "test", "TOST", "below", "above"), 0)
    while done < case.runs:
        data = case.draw(generator, min(batch, case.runs - done))
        if not done:
            check(case, data[: case.checked])
        done += len(data)
        ends = case.ends(data)
        (low, high), (inner_low, inner_high) = ends(0.95), ends(0.90)
        hits["coverage"] += int(((low <= case.truth) & (case.truth <= high)).sum())
        hits["test"] += int(((low > case.null) | (high < case.null)).sum())
        hits["below"] += int((inner_high < case.truth).sum())
        hits["above"] += int((inner_low > case.truth).sum())
        if case.margin is not None:
            inside = (inner_low > case.null - case.margin) & (inner_high < case.null + case.margin)
            hits["TOST"] += int(inside.sum())
    row = partial(counted, case.procedure, case.data, runs=case.runs, binary=case.binary)
    rows = [row("coverage", hits["coverage"])]
    if case.truth == case.null:
        rows.append(row("test", hits["test"]))
    if case.margin is not None:
        rows.append(row("TOST", hits["TOST"]))
    elif not case.binary:  # a shift of the values shifts the interval: the worse end of the margin
        rows.append(row("TOST", max(hits["below"], hits["above"])))
    return rows


def check(case: Case, data: np.ndarray) -> None:
    """`Estimate` must give these intervals and decisions.

    Raises:
        AssertionError: it does not, so that the calibration would be of something else.
    """
    ends = case.ends(data)
    low_high = {level: ends(level) for level in (0.95, 0.90)}
    for i, one in enumerate(data):
        estimate = case.estimate(one)
        for level, (lows, highs) in low_high.items():
            low, high, found = lows[i], highs[i], estimate.ci(level=level)
            assert np.allclose([low, high], [found.low, found.high], rtol=1e-6, atol=1e-8), (
                f"{case.procedure}, {case.data}: {low, high} here and {found} by Estimate"
            )


def seed_of(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=6).digest(), "big")


def decisions(
    procedure: str,
    data: str,
    draw: Callable[[np.random.Generator, int], np.ndarray],
    decide: Callable[[np.ndarray], dict[str, np.ndarray]],
    library: Callable[[np.ndarray], dict[str, bool]],
    *,
    runs: int = SLOW,
    numbers: int = 500,
    checked: int = 40,
    binary: bool = False,
) -> Task:
    """Rates of decisions that are no matter of an interval's ends; `library` must agree."""

    def rows() -> list[Row]:
        found = _decided(f"{procedure}, {data}", draw, decide, library, runs, numbers, checked)
        return [counted(procedure, data, name, hit, runs, binary) for name, hit in found.items()]

    return f"{procedure} | {data}", rows


def _decided(
    name: str,
    draw: Callable[[np.random.Generator, int], np.ndarray],
    decide: Callable[[np.ndarray], dict[str, np.ndarray]],
    library: Callable[[np.ndarray], dict[str, bool]],
    runs: int,
    numbers: int,
    checked: int,
) -> dict[str, int]:
    generator = np.random.default_rng(seed_of(name))
    batch, done, hits = max(1, AT_ONCE // numbers), 0, dict[str, int]()
    while done < runs:
        given = draw(generator, min(batch, runs - done))
        found = decide(given)
        for i in range(0 if done else min(checked, len(given))):
            here = {what: bool(values[i]) for what, values in found.items()}
            there = library(given[i])
            assert there == here, f"{name}: data set {i}, {here} here and {there} by the library"
        done += len(given)
        for what, values in found.items():
            hits[what] = hits.get(what, 0) + int(values.sum())
    return hits


DISTRIBUTIONS: dict[str, Callable[..., np.ndarray]] = {
    "normal": lambda g, shape: g.normal(size=shape),
    "t, 3 df": lambda g, shape: g.standard_t(3, size=shape),
    "lognormal": lambda g, shape: g.lognormal(size=shape) - np.exp(0.5),
}


def codes_of(clusters: int, sizes: tuple[int, ...]) -> np.ndarray:
    return np.repeat(np.arange(clusters), np.resize(sizes, clusters))


def normal_groups(g: np.random.Generator, runs: int, codes: np.ndarray, icc: float) -> np.ndarray:
    shared = g.normal(size=(runs, codes.max() + 1))[:, codes]
    return np.sqrt(icc) * shared + np.sqrt(1 - icc) * g.normal(size=(runs, len(codes)))


def copied_groups(
    g: np.random.Generator, runs: int, codes: np.ndarray, icc: float, shares: tuple[float, ...]
) -> np.ndarray:
    """Categories 0, 1, ...; an example takes that of its group with probability sqrt(icc)."""
    edges = np.cumsum(shares)[:-1]
    common = np.searchsorted(edges, g.random((runs, codes.max() + 1)), side="right")[:, codes]
    own = np.searchsorted(edges, g.random((runs, len(codes))), side="right")
    return np.where(g.random((runs, len(codes))) < np.sqrt(icc), common, own)


def change_shares(discordance: float, difference: float) -> tuple[float, ...]:
    """The shares of -1, 0 and 1."""
    return (discordance - difference) / 2, 1 - discordance, (discordance + difference) / 2


def normal_cells(
    g: np.random.Generator, runs: int, shape: tuple[int, int], row: float, column: float
) -> np.ndarray:
    by_row = np.sqrt(row) * g.normal(size=(runs, shape[0], 1))
    by_column = np.sqrt(column) * g.normal(size=(runs, 1, shape[1]))
    return by_row + by_column + np.sqrt(1 - row - column) * g.normal(size=(runs, *shape))


def copied_cells(
    g: np.random.Generator, runs: int, shape: tuple[int, int], shares: tuple[float, ...]
) -> np.ndarray:
    """A pair takes the change of its recipient, or of its donor, with probability sqrt(0.2)."""
    edges = np.cumsum(shares)[:-1]

    def drawn(*size: int) -> np.ndarray:
        return np.searchsorted(edges, g.random((runs, *size)), side="right") - 1.0

    which, copied = g.random((runs, *shape)), np.sqrt(0.2)
    kept = np.where(which < 2 * copied, drawn(1, shape[1]), drawn(*shape))
    return np.where(which < copied, drawn(shape[0], 1), kept)
