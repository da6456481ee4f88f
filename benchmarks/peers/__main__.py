"""Run every peer on every task and write one table: `python -m benchmarks.peers`.

    python -m benchmarks.peers [--only NAME ...] [--envs DIR] [--rounds 1.0] [--out FILE.json]

From the root of a clone. Peers that cannot be installed beside the library get environments of
their own, which are made at the first run and kept in `--envs`.
"""

import argparse
import json
import os
import platform
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from datetime import date
from pathlib import Path
from typing import Any

from benchmarks.overhead import Median, cpu_name
from benchmarks.peers import problem
from benchmarks.peers.registry import PEERS, Peer, envs_folder
from benchmarks.peers.table import page
from benchmarks.peers.tasks import TASKS, Task, lines

DEFAULT = problem.ROOT / "benchmarks" / "results" / "peers.json"
MODELS = (
    "Shipped organisms, Qwen2.5-VL of 3 layers and width 64, float32: `direct` (22 positions, 9 of "
    "them a picture), for T4 `latent-content`"
)


def asked(peer: Peer, task: Task, only: Sequence[str]) -> bool:
    """Whether `--only` leaves it in: the peers named, the tasks named, or both."""
    peers = [name for name in only if name in {p.name for p in PEERS}]
    tasks = [name for name in only if name in {t.name for t in TASKS}]
    return (not peers or peer.name in peers) and (not tasks or task.name in tasks)


def ran(peer: Peer, tasks: Sequence[str], case: Path, envs: Path, rounds: float) -> dict[str, Any]:
    """What a worker found in the peer's environment."""
    out = case.with_name(f"{peer.module}.json")
    command = [
        str(peer.python(envs)), "-W", "ignore", "-m", "benchmarks.peers.worker", peer.module,
        str(case), str(out), "--rounds", str(rounds), "--tasks", *tasks,
    ]  # fmt: skip
    quiet = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error"}
    subprocess.run(command, check=True, cwd=problem.ROOT, env={**os.environ, **quiet})
    return json.loads(out.read_text())


def row(peer: Peer, task: Task, found: Mapping[str, Any]) -> dict[str, Any]:
    """One line of the table."""
    seconds = found.get("seconds") or {}
    pairs = list(zip(seconds.get("peer", []), seconds.get("plain", []), strict=True))
    ratio = Median.of([own / plain for own, plain in pairs]) if pairs else None
    counted = 0 if found["state"] == "not asked" else lines(peer.module, task.does)
    return {
        "task": task.name,
        "peer": peer.name,
        "state": found["state"],
        "why": found.get("why", ""),
        "off": found.get("off"),
        "allowed": found.get("allowed"),
        "ratio": None if ratio is None else vars(ratio),
        "rounds": len(pairs),
        "memory": found.get("memory"),
        "lines": counted,
    }


def main() -> None:
    """Measure what is asked for, keep the rest of the file, write the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    names = [peer.name for peer in PEERS] + [task.name for task in TASKS]
    parser.add_argument("--only", nargs="*", default=[], choices=names, metavar="NAME")
    parser.add_argument("--envs", type=Path, default=envs_folder())
    parser.add_argument("--rounds", type=float, default=1.0, help="times each task's own number")
    parser.add_argument("--out", type=Path, default=DEFAULT)
    args = parser.parse_args()
    results: dict[str, Any] = {"rows": [], "versions": {}}
    if args.only and args.out.exists():
        results = json.loads(args.out.read_text())
    about = {
        "date": date.today().isoformat(),
        "cpu": cpu_name(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "models": MODELS,
        "setup": {peer.name: lines(peer.module, "setup") for peer in PEERS},
    }
    args.out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        case = Path(folder) / "case.pt"
        problem.write(case)
        for peer in PEERS:
            tasks = [task for task in TASKS if asked(peer, task, args.only)]
            if not tasks:
                continue
            load = os.getloadavg()[0]
            found = ran(peer, [task.name for task in tasks], case, args.envs, args.rounds)
            fresh = [row(peer, task, found["tasks"][task.name]) for task in tasks]
            done = {(one["peer"], one["task"]) for one in fresh}
            kept = [one for one in results["rows"] if (one["peer"], one["task"]) not in done]
            versions = {**results["versions"], peer.name: found["versions"]}
            results = {**about, "load": load, "rows": kept + fresh, "versions": versions}
            # after every peer, since all of them take half an hour
            args.out.write_text(json.dumps(results, indent=1) + "\n")
            args.out.with_suffix(".md").write_text(page(results))
    print(page(results))


if __name__ == "__main__":
    main()
