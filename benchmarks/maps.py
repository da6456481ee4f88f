"""How long a whole map takes: every cell's interval, corrected over the map by sign flips.

    python benchmarks/maps.py [--out benchmarks/results/maps.json]

280 cells (28 layers x 10 latent steps) of 500 examples, on one core. Beside seconds it gives the
ratio to one multiplication of all sign vectors with all values, which is the least that any max-T
over these flips has to do.
"""

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before numpy

import numpy as np

import imaginelens.estimates as ie

OUT = Path(__file__).parent / "results" / "maps.json"
CELLS, EXAMPLES, DRAWS, GOAL = 280, 500, 9999, 5.0


def seconds(work: Callable[[], object], rounds: int = 5) -> float:
    """The median over rounds of the CPU time of some work."""
    found = []
    for _ in range(rounds):
        start = time.process_time()
        work()
        found.append(time.process_time() - start)
    return statistics.median(found)


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=OUT)
    out = parser.parse_args().out
    rng = np.random.default_rng(0)
    values = rng.normal(size=(EXAMPLES, CELLS))
    changes = (rng.random((EXAMPLES, CELLS)) < 0.06) * 1.0
    changes -= rng.random((EXAMPLES, CELLS)) < 0.05
    groups = np.repeat(np.arange(50), EXAMPLES // 50)
    signs = rng.choice((-1.0, 1.0), size=(DRAWS, EXAMPLES))
    least = seconds(lambda: signs @ values)
    works: dict[str, Callable[[], object]] = {
        "max-T of values": lambda: ie.max_t(values, draws=DRAWS),
        "max-T of 0/1 changes": lambda: ie.max_t(changes, binary=True, draws=DRAWS),
        "max-T of values in 50 groups": lambda: ie.max_t(values, groups=groups, draws=DRAWS),
        "every cell equivalent": lambda: ie.equivalence_map(values, margin=0.2),
    }
    rows = {name: seconds(work) for name, work in works.items()}
    found = {
        "cells": CELLS, "examples": EXAMPLES, "draws": DRAWS, "goal_seconds": GOAL,
        "one_product_seconds": round(least, 4),
        "work": {
            name: {"seconds": round(s, 4), "ratio": round(s / least, 2), "met": s < GOAL}
            for name, s in rows.items()
        },
    }  # fmt: skip
    out.write_text(json.dumps(found, indent=1) + "\n")
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
