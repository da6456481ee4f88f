"""A store of states that is larger than memory, made, opened and probed under a limit.

    python -m benchmarks.big_store [--gigabytes 20] [--limit 2] [--width 512] [--steps 2]
        [--sites 4] [--folder DIR] [--out benchmarks/results/big_store.json]

Each state is noise of variance 1 in every direction. In the upper half of the sites a class of two
is planted: states of the classes lie 1 apart from the middle, along one direction. No reader can do
better there than Phi(1) = 84.13 %, and the best one does that; in the lower half, and for a second
label that is nowhere, all readers are at 50 %. Both are asserted.

The limit is the system's (RLIMIT_DATA): all memory that this process may write to, from its first
import to its last number, used or not; an allocation beyond it fails. The pages of files that are
read through a map belong to the system's cache and are not in it. The store is deleted at the end.
"""

import argparse
import json
import os
import platform
import resource
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

SHARD = 4096  # examples
PICTURES = 1000  # groups of examples
PLANTED = 0.8413447460685429  # Phi(1)
CLOSE = 0.005


@dataclass(frozen=True)
class Made:
    """States that are drawn when they are read, a shard at a time."""

    shape: tuple[int, int, int, int]
    classes: np.ndarray

    def read(self, step: int, layer: int, rows: np.ndarray) -> np.ndarray:
        _, _, layers, width = self.shape
        x = np.empty((len(rows), width), dtype=np.float32)
        for shard in np.unique(rows // SHARD).tolist():
            own = rows // SHARD == shard
            rng = np.random.default_rng([step, layer, shard])
            drawn = np.frombuffer(rng.bytes(SHARD * width), dtype=np.int8).reshape(SHARD, width)
            x[own] = drawn[rows[own] % SHARD]
        x += 0.5  # whole numbers from -128 to 127
        x /= np.sqrt((256**2 - 1) / 12)
        if 2 * layer >= layers:
            towards = np.random.default_rng([step, layer]).normal(size=width)
            towards /= np.linalg.norm(towards)
            x += np.outer(2 * self.classes[rows] - 1, towards).astype(np.float32)
        return x


@dataclass
class Watch:
    """The most memory of its own that the process was seen to use."""

    most: int = 0
    over: threading.Event = field(default_factory=threading.Event)

    def look(self) -> None:
        while not self.over.wait(0.05):
            self.most = max(self.most, told("RssAnon"))


@contextmanager
def watched() -> Iterator[Watch]:
    """Look at the memory every 50 ms."""
    watch = Watch()
    thread = threading.Thread(target=watch.look, daemon=True)
    thread.start()
    yield watch
    watch.over.set()
    thread.join()


def told(name: str) -> int:
    """A number of bytes from what Linux says of this process."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith(name)).split()[1])


def measure(
    *, gigabytes: float, limit: float, width: int, steps: int, sites: int, folder: Path | None
) -> dict[str, Any]:
    """Make a store, probe it, delete it, and say what it took."""
    resource.setrlimit(resource.RLIMIT_DATA, (int(limit * 1e9), resource.RLIM_INFINITY))
    from imaginelens.probes.shards import open_states, save_states
    from imaginelens.probes.states import States

    n = round(gigabytes * 1e9 / (4 * width * steps * sites))
    rng = np.random.default_rng(0)
    classes, absent = rng.integers(0, 2, n), rng.integers(0, 2, n).tolist()
    with tempfile.TemporaryDirectory(dir=folder) as name, watched() as watch:
        began = time.perf_counter(), time.process_time()
        made = States(
            Made((n, steps, sites, width), classes),
            np.ones((n, steps), dtype=bool),
            tuple(f"blocks.{k}.hook_resid_post" for k in range(sites)),
            classes.astype(object),
            tuple((np.arange(n) % PICTURES).tolist()),
            label="planted",
        )
        path = save_states(made, Path(name) / "states", shard_size=SHARD)
        making = spent(began)
        states = open_states(path)
        size = sum(file.stat().st_size for file in path.iterdir())
        cells = probed(states, absent)
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {
        "store": {
            "gigabytes": round(size / 1e9, 2),
            "examples": n,
            "steps": steps,
            "sites": sites,
            "width": width,
            "gigabytes_of_a_cell": round(size / 1e9 / steps / sites, 2),
        },
        "memory": {
            "limit_gigabytes": limit,
            "peak_anonymous_gigabytes": round(watch.most / 1e9, 3),
            "peak_with_pages_of_files_gigabytes": round(told("VmHWM") / 1e9, 3),
        },
        "making": making,
        "probes": cells,
        "machine": {
            "cores": os.cpu_count(),
            "memory_gigabytes": round(memory / 1e9),
            "threads": int(os.environ.get("OMP_NUM_THREADS", os.cpu_count() or 1)),
            "python": platform.python_version(),
            "numpy": np.__version__,
        },
    }


def probed(states: Any, absent: list[int]) -> list[dict[str, Any]]:
    """Every cell by ridge; one by logistic regression; and one for what is not there."""
    from imaginelens.probes.fitting import fit_probe

    steps, sites = states.shape[1], len(states.sites)
    last = steps - 1, sites - 1
    jobs = [("ridge", states, t, k, ()) for t in range(steps) for k in range(sites)]
    tested = ("shuffled labels", "control task")
    jobs += [("ridge", states.relabelled(absent, label="absent"), *last, tested)]
    jobs += [("logistic", states, *last, ())]
    found = []
    for kind, given, step, site, controls in jobs:
        began = time.perf_counter(), time.process_time()
        result = fit_probe(
            given,
            kind=kind,
            step=step,
            site=site,
            controls=controls,
            strengths=(0.01,),
            n_folds=3 if kind == "logistic" else 5,
            stream=True,
        )
        there = given.label == "planted" and 2 * site >= sites
        reached, wanted = float(result.accuracy.value), PLANTED if there else 0.5
        found.append(
            {
                "kind": kind,
                "label": given.label,
                "step": step,
                "site": site,
                "accuracy": round(reached, 4),
                "right_answer": round(wanted, 4),
                "verdict": result.verdict(),
                **spent(began),
            }
        )
        print(json.dumps(found[-1]), f"anonymous memory {told('RssAnon') / 1e9:.2f} GB", flush=True)
        # three standard errors, and what estimating as many weights as the width costs
        slack = 3 * 0.5 / np.sqrt(len(given)) + given.shape[3] / len(given)
        assert abs(reached - wanted) < CLOSE + slack, found[-1]
        assert result.verdict() != "decodable" or there, found[-1]
    return found


def spent(began: tuple[float, float]) -> dict[str, float]:
    """Seconds since then, on the clock and of the processor."""
    return {
        "seconds": round(time.perf_counter() - began[0], 1),
        "cpu_seconds": round(time.process_time() - began[1], 1),
    }


def main(given: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gigabytes", type=float, default=20.0)
    parser.add_argument("--limit", type=float, default=2.0, help="of memory, in gigabytes")
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--sites", type=int, default=4)
    parser.add_argument("--folder", type=Path, help="where the store is made; a temporary folder")
    parser.add_argument("--out", type=Path)
    asked = vars(parser.parse_args(given))
    out = asked.pop("out")
    result = measure(**asked)
    print(json.dumps(result["memory"]))
    if out is not None:
        out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
