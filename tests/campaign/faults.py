"""What goes wrong on machines, on purpose: nothing is lost, nothing stays behind, and it is said.

`python tests/campaign/faults.py --out FILE`. Five kinds:
torn files (each file of each kind of folder, cut at random), exceptions at every site (of forwards
and of generation), a disk that is full after some bytes, folders that may not be written to, and
running out of memory in the middle of a sweep.
"""

import argparse
import errno
import json
import os
import resource
import shutil
import signal
import sys
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any
from unittest.mock import patch

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parents[2]))

import numpy as np
import torch
from campaign.readers import OURS, READERS, Reader, some_states

import imaginelens as il
from imaginelens.mediation import behind_prefix

ORGANISMS = ("latent-content", "latent-pointer", "latent-ignored", "latent-ignored-aligned")


@dataclass
class Figures:
    """What was injected of one kind.

    Attributes:
        kind: of fault.
        injected: how many faults.
        told: how many were told in a sentence of ours, or surfaced as they were raised.
        unharmed: how many changed nothing: the work went on, or the file was whole all the same.
        hooks_left: how many left an edit or a hook behind.
        lost: how many lost a result that was on the disk before.
        wrong: what else happened, in words.
    """

    kind: str
    injected: int = 0
    told: int = 0
    unharmed: int = 0
    hooks_left: int = 0
    lost: int = 0
    wrong: list[str] = field(default_factory=list)


# ---- torn files ---------------------------------------------------------------------------------


def torn(per_file: int, seed: int = 0) -> Figures:
    """Each file of each folder is cut at random; it is refused, or read as it was."""
    figures, rng = Figures("torn files"), np.random.default_rng(seed)
    for reader in READERS:
        with tempfile.TemporaryDirectory() as folder:
            home = Path(folder)
            reader.write(home)
            whole = (home / reader.file).read_bytes()
            for end in rng.integers(0, len(whole), per_file):
                (home / reader.file).write_bytes(whole[:end])
                _read(reader, home, figures, f"{reader.name} cut at {end}")
            (home / reader.file).write_bytes(whole)
            reader.read(home)  # what was there is still read
    return figures


def _read(reader: Reader, home: Path, figures: Figures, what: str) -> None:
    figures.injected += 1
    try:
        reader.read(home)
        figures.unharmed += 1
    except reader.refuses:
        figures.told += 1
    except Exception as error:
        figures.wrong.append(f"{what}: {type(error).__name__}: {error}"[:300])


# ---- exceptions at every site -------------------------------------------------------------------


class Planned(RuntimeError):
    """What an injected hook raises."""


def raising(names: tuple[str, ...] = ORGANISMS) -> Figures:
    """A hook raises at every site, in a forward and in generation; the next run is what it was."""
    figures = Figures("exceptions at sites")
    for name in names:
        lens = il.load(name)
        base = lens.task(n=1, seed=0).base
        run = lens.run(base)
        logits = lens.run_with_hooks(run)
        for site in lens.registry:
            for what in ("forward", "generation"):
                _raise_at(lens, base, run, site, what, figures)
        again = lens.run(base)
        if again.text != run.text or not torch.equal(lens.run_with_hooks(run), logits):
            figures.wrong.append(f"{name} is not what it was")
    return figures


def _raise_at(
    lens: il.LatentModel, base: Any, run: il.Run, site: str, what: str, figures: Figures
) -> None:
    def broken(act: torch.Tensor, hook: Any) -> torch.Tensor:
        raise Planned(site)

    figures.injected += 1
    try:
        with lens.hooks(fwd_hooks=[(site, broken)]):
            lens.run_with_hooks(run) if what == "forward" else lens.run(base)
        figures.unharmed += 1  # a site that does not act there, such as a latent's in a prompt
    except Planned:
        figures.told += 1
    except OURS:
        figures.told += 1
    except Exception as error:
        figures.wrong.append(f"{site}, {what}: {type(error).__name__}: {error}"[:300])
    figures.hooks_left += bool(lens.registry.active)


# ---- a full disk, and folders that may not be written to ----------------------------------------


def _writers() -> dict[str, tuple[Callable[[Path], Any], Callable[[Path], Any]]]:
    """Each kind of result: how it is written into a folder, and read again."""
    from imaginelens.hooks.cache import ActivationCache
    from imaginelens.probes.erasing import Eraser, erase
    from imaginelens.probes.fitting import fit_probe
    from imaginelens.probes.map_result import ProbeMap
    from imaginelens.probes.mapping import probe_map
    from imaginelens.probes.saving import load_probe
    from imaginelens.probes.shards import open_states, save_states

    lens = il.load("latent-content")
    task = lens.task(n=4, seed=0)
    how = {"sites": "resid_post", "positions": il.latent, "metric": il.logit_diff}
    found = il.sweep(lens, task, **how)
    _, cache = lens.run_with_cache(task.base, names_filter="*.hook_resid_post")
    states, pairs = some_states(), _plain(task)
    probe, eraser, grid = fit_probe(states), erase(states, steps=[1]), probe_map(states)
    return {
        "effect map": (found.save, il.EffectMap.load),
        "cache": (
            lambda folder: cache.save(_made(folder) / "cache.safetensors"),
            lambda folder: ActivationCache.load(folder / "cache.safetensors"),
        ),
        "probe": (probe.save, load_probe),
        "eraser": (eraser.save, Eraser.load),
        "probe map": (grid.save, ProbeMap.load),
        "states": (
            lambda folder: save_states(states, folder),
            lambda folder: open_states(folder).cell(step=0),
        ),
        "pairs": (
            pairs.save_jsonl,
            lambda folder: il.Pairs.from_jsonl(folder / "pairs.jsonl"),
        ),
    }


def _plain(task: il.Pairs) -> il.Pairs:
    """The pairs without the objects that an organism's examples carry along."""

    def plain(examples: Any) -> list[Any]:
        return [{key: example[key] for key in ("images", "text")} for example in examples]

    answers = task.base_answers, task.source_answers
    return il.Pairs(plain(task.base), plain(task.source), *answers)


def _made(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def full_disk(limits: tuple[int, ...] = (0, 1, 100, 1000, 4000, 20_000)) -> Figures:
    """Files may not grow beyond some bytes. What is left is refused or whole, never half; a second
    try with room succeeds; results of other folders stay."""
    figures = Figures("a full disk")
    for name, (write, read) in _writers().items():
        for limit in limits:
            with tempfile.TemporaryDirectory() as folder:
                home = Path(folder)
                write(home / "before")
                figures.injected += 1
                told = _in_child(lambda w=write, h=home: w(h / "now"), limit=limit)
                _judge(name, f"limit {limit}", told, home, write, read, figures)
    return figures


def forbidden() -> Figures:
    """The folder belongs to somebody else, and may be read only."""
    figures = Figures("read-only folders")
    for name, (write, read) in _writers().items():
        with tempfile.TemporaryDirectory() as folder:
            home = Path(folder)
            write(home / "before")
            home.chmod(0o555)
            figures.injected += 1
            told = _in_child(lambda w=write, h=home: w(h / "now"), nobody=True)
            home.chmod(0o755)
            _judge(name, "read-only", told, home, write, read, figures)
    return figures


def _judge(
    name: str,
    what: str,
    told: str,
    home: Path,
    write: Callable[[Path], Any],
    read: Callable[[Path], Any],
    figures: Figures,
) -> None:
    if told == "":
        figures.unharmed += 1
    elif told.startswith("told "):
        figures.told += 1
    else:
        figures.wrong.append(f"{name}, {what}: {told}"[:300])
    try:
        read(home / "before")
    except Exception as error:
        figures.lost += 1
        figures.wrong.append(f"{name}, {what}: what was there is lost: {error}"[:300])
    left = home / "now"
    if left.exists() and told:
        try:
            read(left)
            figures.wrong.append(f"{name}, {what}: half a result is read as a whole one")
        except OURS:
            pass
        except Exception as error:
            figures.wrong.append(f"{name}, {what}: what is left is read with {error!r}"[:300])
        shutil.rmtree(left)
        write(left)
        read(left)


def _in_child(act: Callable[[], Any], *, limit: int | None = None, nobody: bool = False) -> str:
    """Do it in a process with limits: "" if it went well, "told ..." for an error that says so."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reading)
        told = "died"
        try:
            if nobody and os.geteuid() == 0:
                os.setgid(65534)
                os.setuid(65534)
            if limit is not None:
                signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
                resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
            act()
            told = ""
        except OURS as error:
            told = f"told {error}"
        except OSError as error:  # the system's own words say what is the matter
            known = error.errno in (errno.EFBIG, errno.ENOSPC, errno.EACCES, errno.EROFS)
            told = f"told {error}" if known else f"{type(error).__name__}: {error}"
        except BaseException as error:
            told = f"{type(error).__name__}: {error}"
        finally:
            os.write(writing, told.encode()[:4000])
            os._exit(0)
    os.close(writing)
    with os.fdopen(reading, "rb") as pipe:
        told = pipe.read().decode()
    os.waitpid(child, 0)
    return told


# ---- out of memory ------------------------------------------------------------------------------


def out_of_memory(times: int = 8) -> Figures:
    """The k-th forward of a sweep runs out of memory: it goes on in smaller parts, to the same."""
    figures = Figures("out of memory")
    lens = il.load("latent-content", dtype=torch.float64)
    task = lens.task(n=4, seed=0)
    how = {"sites": "resid_post", "positions": il.latent, "metric": il.logit_diff}
    wanted = il.sweep(lens, task, **how)
    run = behind_prefix.Batch.run
    for k in range(times):
        seen = [0]

        def starved(self: Any, *args: Any, seen: list[int] = seen, k: int = k) -> Any:
            seen[0] += 1
            if seen[0] == k + 1:
                raise torch.OutOfMemoryError("planned")
            return run(self, *args)

        figures.injected += 1
        try:
            with patch.object(behind_prefix.Batch, "run", starved):
                found = il.sweep(lens, task, **how)
            close = np.allclose(found.after, wanted.after, rtol=0, atol=1e-10)
            figures.unharmed += bool(close)
            if not close:
                figures.wrong.append(f"forward {k}: other numbers")
        except (torch.OutOfMemoryError, *OURS):
            figures.told += 1
        figures.hooks_left += bool(lens.registry.active)
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cuts", type=int, default=100, help="of each file")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    kinds = (lambda: torn(options.cuts), raising, full_disk, forbidden, out_of_memory)
    found = []
    for kind in kinds:
        found.append(asdict(kind()))
        print(json.dumps(found[-1], indent=1), flush=True)
    if options.out is not None:
        options.out.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
