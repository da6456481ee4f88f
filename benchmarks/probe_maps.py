"""What a probe map costs: 28 layers x 10 steps x 1,000 examples of width 3,584, with controls.

    python benchmarks/probe_maps.py [--steps 10] [--layers 28] [--examples 1000] [--width 3584]
        [--classes 4] [--permutations 100] [--device cpu] [--threads 2] [--out FILE]

States are made when a cell is read, as they would be read from disk: noise around a common vector,
and in the upper half of the layers, from the middle step on, the class besides. So the right answer
is known, and checked. The goal is 300 seconds for the full size on two cores.
"""

import argparse
import json
import platform
import resource
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from imaginelens.probes.mapping import probe_map
from imaginelens.probes.states import States

GOAL = 300.0
COMMON, SIGNAL = 3.0, 6.0  # how far all states, and the classes, lie from the origin, in noise


@dataclass(frozen=True)
class Made:
    """States that are drawn when they are read."""

    shape: tuple[int, int, int, int]
    classes: np.ndarray

    def read(self, step: int, layer: int, rows: np.ndarray) -> np.ndarray:
        n, steps, layers, width = self.shape
        generator = torch.Generator().manual_seed(step * layers + layer)
        x = torch.randn((n, width), generator=generator).numpy()
        x += COMMON
        if told(step, layer, steps, layers):
            x[np.arange(n), self.classes] += SIGNAL
        return x[rows]


def told(step: int, layer: int, steps: int, layers: int) -> bool:
    """Whether a cell holds the class."""
    return step >= steps // 2 and layer >= layers // 2


def main() -> None:
    asked = arguments()
    torch.set_num_threads(asked.threads)
    shape = asked.examples, asked.steps, asked.layers, asked.width
    classes = np.random.default_rng(0).integers(0, asked.classes, asked.examples)
    states = States(
        Made(shape, classes),
        np.ones(shape[:2], dtype=bool),
        tuple(f"blocks.{k}.hook_resid_post" for k in range(asked.layers)),
        np.array([f"class {k}" for k in classes], dtype=object),
        label="class",
    )
    before, started, worked = peak(), time.perf_counter(), time.process_time()
    found = probe_map(states, permutations=asked.permutations, device=asked.device)
    seconds = time.perf_counter() - started
    grid = [
        [told(s, k, asked.steps, asked.layers) for k in range(asked.layers)]
        for s in range(asked.steps)
    ]
    right = found.decodable() == np.array(grid)
    cells = asked.steps * asked.layers
    result = {
        "shape": {"examples": shape[0], "steps": shape[1], "layers": shape[2], "width": shape[3]},
        "permutations": asked.permutations,
        "device": asked.device,
        "threads": asked.threads,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "seconds": round(seconds, 1),
        "cpu_seconds_per_cell": round((time.process_time() - worked) / cells, 3),
        "seconds_per_cell": round(seconds / cells, 3),
        "seconds_of_280_cells": round(280 * seconds / cells, 1),
        "goal_met_at_that_pace": 280 * seconds / cells < GOAL,
        "peak_rss_mb": round(peak()),
        "rss_before_mb": round(before),
        "cell_mb": round(4e-6 * asked.examples * asked.width, 1),
        "cells_right": f"{int(right.sum())} of {cells}",
    }
    print(found.summary())
    print(json.dumps(result, indent=1))
    if asked.out:
        asked.out.write_text(json.dumps(result, indent=1) + "\n")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, default in (
        ("steps", 10),
        ("layers", 28),
        ("examples", 1000),
        ("width", 3584),
        ("classes", 4),
        ("permutations", 100),
        ("threads", 2),
    ):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path)
    return parser.parse_args()


def peak() -> float:
    """The most memory that this process has held, in MB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (
        2**20 if sys.platform == "darwin" else 2**10
    )


if __name__ == "__main__":
    main()
