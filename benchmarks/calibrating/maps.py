"""Sign flips of one outcome and of a map of cells, and maps of equivalence tests."""

from collections.abc import Iterator
from functools import cache, partial

import numpy as np

import imaginelens.estimates as ie
from calibrating.intervals import t_ends
from calibrating.rows import Row, Task, counted
from calibrating.sampling import (
    DISTRIBUTIONS,
    FAST,
    GROUPS,
    MAPS,
    SLOW,
    Draw,
    change_shares,
    codes_of,
    copied_groups,
    decisions,
    normal_groups,
    seed_of,
)
from imaginelens.estimates.score import score_z
from imaginelens.estimates.student import critical

DRAWS = 399


def flips() -> Iterator[Task]:
    """`sign_flip`, of symmetric values: the same sign vectors for every data set, as its seed."""
    for name in ("normal", "t, 3 df"):
        for n in (10, 50):
            yield decisions(
                "sign flips",
                f"{name}, n = {n}",
                lambda g, runs, name=name, n=n: DISTRIBUTIONS[name](g, (runs, n)),
                lambda x: {"test": flip_pvalues(x) <= 0.05},
                lambda x: {"test": ie.sign_flip(x) <= 0.05},
                runs=FAST,
                numbers=20_000,
            )


@cache
def signs(n: int) -> np.ndarray:
    if n <= 14:
        return 1.0 - 2.0 * (np.arange(2**n)[:, None] >> np.arange(n) & 1)
    generator, step = np.random.default_rng(0), 1_000_000 // n
    return np.concatenate(
        [
            generator.choice((-1.0, 1.0), size=(min(step, 10_000 - start), n))
            for start in range(0, 10_000, step)
        ]
    )


def flip_pvalues(x: np.ndarray) -> np.ndarray:
    vectors = signs(x.shape[1])
    seen = np.abs(x.sum(1)) - 1e-12 * np.abs(x).sum(1)
    hits = (np.abs(vectors @ x.T) >= seen).sum(0)
    return hits / len(vectors) if x.shape[1] <= 14 else (hits + 1) / (len(vectors) + 1)


def maps() -> Iterator[Task]:
    """`max_t` and `equivalence_map`: cells that correlate at 0.5."""
    shapes = {
        "normal": ((20, 30), (50, 30), (50, 280)),
        "t, 3 df": ((20, 30), (50, 30)),
        "lognormal": ((50, 30),),
    }
    for name, of_name in shapes.items():
        for n, cells in of_name:
            yield flipped_map(
                f"{name}, {cells} cells, n = {n}",
                partial(_map_values, name=name, n=n, cells=cells),
                None,
                n,
                cells,
                symmetric=name != "lognormal",
            )
    for sizes, pattern in GROUPS.items():
        codes = codes_of(20, pattern)
        yield flipped_map(
            f"normal, 30 cells, 20 groups of {sizes}, ICC 0.3",
            partial(_map_groups, codes=codes, cells=30),
            codes,
            20,
            30,
            symmetric=True,
        )
    data = "10% discordant, 12 cells, n = 50"
    yield f"max-T, 0/1 | {data}", partial(changing_map, data, 50, 0.10, cells=12)
    yield from equivalent_maps()


def _map_values(g: np.random.Generator, runs: int, name: str, n: int, cells: int) -> np.ndarray:
    draw = DISTRIBUTIONS[name]
    x = draw(g, (runs, n, 1)) + draw(g, (runs, n, cells))
    return x


def _map_groups(g: np.random.Generator, runs: int, codes: np.ndarray, cells: int) -> np.ndarray:
    x = normal_groups(g, runs * (cells + 1), codes, 0.3).reshape(runs, cells + 1, -1)
    return (x[:, 1:] + x[:, :1]).transpose(0, 2, 1)


@cache
def random_signs(units: int) -> np.ndarray:
    """The sign vectors of `max_t` with its default seed."""
    bits = np.random.default_rng(0).integers(0, 2, (DRAWS, units), dtype=np.int8)
    return 1.0 - 2.0 * bits


def flipped_map(
    data: str,
    draw: Draw,
    codes: np.ndarray | None,
    units: int,
    cells: int,
    *,
    symmetric: bool,
) -> Task:
    """The chance of any false finding, and of all intervals to hold the truth (which is 0)."""

    def largest(sums: np.ndarray) -> np.ndarray:
        """The largest |statistic| of every sign vector and data set, (draw, run)."""
        scaled = sums / np.sqrt((sums**2).sum(1, keepdims=True))
        flipped = random_signs(units) @ scaled.transpose(1, 0, 2).reshape(units, -1)
        return np.abs(flipped, out=flipped).reshape(DRAWS, len(sums), cells).max(2)

    def by_unit(x: np.ndarray) -> np.ndarray:
        if codes is None:
            return x
        return np.stack([x[:, codes == unit].sum(1) for unit in range(units)], axis=1)

    def decide(x: np.ndarray) -> dict[str, np.ndarray]:
        sums = by_unit(x)
        statistic = np.abs(sums.sum(1)) / np.sqrt((sums**2).sum(1))  # (run, cell)
        top = statistic.max(1)
        p = ((largest(sums) >= top - 1e-9).sum(0) + 1) / (DRAWS + 1)
        residuals = by_unit(x - x.mean(1, keepdims=True))
        t, spared = float(critical(0.95, units - 1)), (DRAWS + 1) // 20
        one_cell = t * (units / (units - 1 + t**2)) ** 0.5
        k = np.maximum(np.partition(largest(residuals), -spared, axis=0)[-spared], one_cell)
        return {"any cell": p <= 0.05, "all cells": top <= k}

    def library(x: np.ndarray) -> dict[str, bool]:
        found = ie.max_t(x, groups=codes, draws=DRAWS)
        low, high = found.intervals()
        joint = bool(((low <= 0) & (high >= 0)).all())
        return {"any cell": bool((found.pvalues <= 0.05).any()), "all cells": joint}

    numbers = max(DRAWS * cells, 4 * units * cells)
    data += "" if symmetric else " (not symmetric)"
    return decisions("max-T", data, draw, decide, library, runs=MAPS, numbers=numbers)


def changing_map(data: str, n: int, discordance: float, cells: int) -> list[Row]:
    """0/1 outcomes, by the library itself: which signs are flipped differs between data sets."""
    generator, runs = np.random.default_rng(seed_of(data)), SLOW
    shares, t = change_shares(discordance, 0.0), float(critical(0.95, n - 1))
    false = joint = 0
    for run in range(runs):
        x = copied_groups(generator, n, np.zeros(cells, dtype=int), 0.5, shares) - 1.0
        found = ie.max_t(x, binary=True, draws=DRAWS)
        # 0 is in Tango's interval at the critical value k if its statistic is at most k
        k = max(found._critical(0.95), t)
        z = np.abs(score_z((x == 1).sum(0), (x == -1).sum(0), n, 0.0)).max()
        if run < 40:
            low, high = found.intervals()
            assert ((low <= 0) & (high >= 0)).all() == (z <= k)
        false += bool((found.pvalues <= 0.05).any())
        joint += bool(z <= k)
    return [
        counted("max-T, 0/1", data, "any cell", false, runs, True),
        counted("max-T, 0/1", data, "all cells", joint, runs, True),
    ]


def equivalent_maps() -> Iterator[Task]:
    """The two claims of `equivalence_map`, each where it is hardest."""
    n, cells, margin = 50, 30, 0.5
    for name, where in (("every", np.eye(cells)[0]), ("these", np.ones(cells))):
        level = 0.90 if name == "every" else 1 - 2 * 0.05 / cells

        def draw(g: np.random.Generator, runs: int, where: np.ndarray = where) -> np.ndarray:
            x = (g.normal(size=(runs, n, 1)) + g.normal(size=(runs, n, cells))) / np.sqrt(8)
            return x + margin * where

        def decide(x: np.ndarray, level: float = level, name: str = name) -> dict[str, np.ndarray]:
            low, high = t_ends(x.mean(1), x.var(1, ddof=1) / n, n - 1, level)
            inside = (low > -margin) & (high < margin)
            return {"TOST": inside.all(1) if name == "every" else inside.any(1)}

        def library(x: np.ndarray, name: str = name) -> dict[str, bool]:
            found = ie.equivalence_map(x, margin=margin)
            shown = found.every < 0.05 if name == "every" else (found.these < 0.05).any()
            return {"TOST": bool(shown)}

        hard = "one cell at the margin" if name == "every" else "all cells at the margin"
        data = f"normal, {cells} cells, n = {n}, {hard}"
        procedure = f"equivalence map, {name}"
        yield decisions(procedure, data, draw, decide, library, runs=FAST, numbers=2 * n * cells)
