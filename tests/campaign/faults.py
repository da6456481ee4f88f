"""What goes wrong on machines, on purpose: nothing is lost, nothing stays behind, and it is said.

`python tests/campaign/faults.py --out FILE`. Torn files (each file of each kind of folder, and of a
checkpoint, cut at random), exceptions at every site (of forwards and of generation), a disk that is
full after some bytes, folders that may not be written to, SIGKILL in the middle of writing, two
writers of one folder at once, and running out of memory in the middle of a sweep. Processes that
are killed, or meet, in the middle of a study are in `tests/mediation/test_study_scale.py`.
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
from functools import cache
from pathlib import Path
from typing import Any
from unittest.mock import patch

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parents[2]))

import numpy as np
import torch
from campaign.readers import OURS, READERS, some_lens, some_map, some_result, some_states

import imaginelens as il
from imaginelens.hooks.errors import InputError
from imaginelens.mediation import behind_prefix
from imaginelens.organisms import checkpoint

Write = Callable[[Path], Any]
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
            for k, end in enumerate(rng.integers(0, len(whole), per_file)):
                (home / reader.file).write_bytes(whole[:end])
                if reader.mend is not None and k % 2:  # else a digest tells it
                    reader.mend(home, whole[:end])
                what = f"{reader.name} cut at {end}"
                _read(reader.read, reader.refuses, home, figures, what)
            (home / reader.file).write_bytes(whole)
            if reader.mend is not None:
                reader.mend(home, whole)
            reader.read(home)  # what was there is still read
    return figures


def torn_checkpoints(per_file: int, name: str = "direct", seed: int = 0) -> Figures:
    """Each file of a checkpoint is cut at random; it is refused, or opened."""
    figures, rng = Figures("torn checkpoints"), np.random.default_rng(seed)
    with tempfile.TemporaryDirectory() as folder:
        home = Path(folder) / name
        shutil.copytree(checkpoint.folder(name), home)
        for file in sorted(home.iterdir()):
            whole = file.read_bytes()
            for end in rng.integers(0, len(whole), per_file):
                file.write_bytes(whole[:end])
                what = f"{file.name} of {name} cut at {end}"
                _read(il.load, OURS, home, figures, what)
            file.write_bytes(whole)
        il.load(home)
    return figures


def _read(
    read: Write, refuses: tuple[type[Exception], ...], home: Path, figures: Figures, what: str
) -> None:
    figures.injected += 1
    try:
        read(home)
        figures.unharmed += 1
    except refuses:
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


@cache
def _writers(seed: int = 0) -> dict[str, tuple[Write, Write]]:
    """Each kind of result: how it is written into a folder, and read again."""
    from imaginelens.hooks.cache import ActivationCache
    from imaginelens.mediation.graph_export import save_graph
    from imaginelens.mediation.sufficiency import Sufficiency
    from imaginelens.probes.erasing import Eraser, erase
    from imaginelens.probes.fitting import fit_probe
    from imaginelens.probes.map_result import ProbeMap
    from imaginelens.probes.mapping import probe_map
    from imaginelens.probes.saving import load_probe
    from imaginelens.probes.shards import open_states, save_states
    from imaginelens.probes.tuned_lens import TunedLens

    lens = il.load("latent-content")
    task = lens.task(n=4, seed=seed)
    found, result, tuned = some_map(seed), some_result(seed), some_lens(seed)
    _, cache = lens.run_with_cache(task.base, names_filter="*.hook_resid_post")
    latents = il.Latents.of(lens.run(task.base), ids=list("abcd"))
    states, pairs = some_states(seed), _plain(task)
    probe, eraser, grid = fit_probe(states), erase(states, steps=[1]), probe_map(states)
    graph = {"metadata": {"slug": f"hunt-{seed}"}, "nodes": list(range(500))}
    return {
        "result": (result.save, Sufficiency.load),
        "tuned lens": (tuned.save, TunedLens.from_pretrained),
        "recorded latents": (
            lambda folder: latents.save(_made(folder) / "latents.safetensors"),
            lambda folder: il.Latents.load(folder / "latents.safetensors"),
        ),
        "graph": (
            lambda folder: save_graph(graph, folder),
            lambda folder: _graphs(folder),
        ),
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


def _graphs(folder: Path) -> Any:
    """The graphs that the list of a folder names, as a tool for graphs reads them."""
    listed = folder / "graph-metadata.json"
    if not listed.exists():
        raise InputError("there is no list of graphs")
    named = json.loads(listed.read_text())["graphs"]
    return [json.loads((folder / f"{one['slug']}.json").read_text()) for one in named]


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
    return _said(*_begun(act, limit=limit, nobody=nobody))


def _begun(
    act: Callable[[], Any],
    *,
    limit: int | None = None,
    nobody: bool = False,
    gate: tuple[int, int] | None = None,
) -> tuple[int, int]:
    """The process, once the gate opens, and where it says how it went."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reading)
        told = "died"
        try:
            if gate is not None:
                os.close(gate[1])
                os.read(gate[0], 1)
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
    return child, reading


def _said(child: int, reading: int) -> str:
    with os.fdopen(reading, "rb") as pipe:
        told = pipe.read().decode("utf-8", "replace")
    os.waitpid(child, 0)
    return told


# ---- killed ----


def killed(times: int = 40, seed: int = 0) -> Figures:
    """SIGKILL in the middle of writing, at calls drawn at random, most of which touch a file. What
    was there is there; what is new is whole, or refused and written at a second try."""
    figures, rng = Figures("SIGKILL while writing"), np.random.default_rng(seed)
    for name, (write, read) in _writers().items():
        with tempfile.TemporaryDirectory() as folder:
            home = Path(folder)
            write(home / "before")
            whole = _files(home / "before")
            calls = np.array(_calls(lambda w=write, h=home: w(h / "counted")))
            touching = np.flatnonzero(calls)
            for k in range(times):
                at = int(rng.integers(len(calls)) if k % 4 == 3 else rng.choice(touching))
                left = home / ("before" if k % 4 == 2 else "now")  # a result that is there already
                figures.injected += 1
                _dies(lambda w=write, p=left: w(p), at)
                what = f"{name}, killed at call {at} of {len(calls)}"
                _judge_killed(what, left, whole, write, read, figures)
                if _files(home / "before") != whole:
                    figures.lost += 1
                    figures.wrong.append(f"{what}: what was there is lost")
    return figures


def _judge_killed(
    what: str, left: Path, whole: dict[str, bytes], write: Write, read: Write, figures: Figures
) -> None:
    if left.name == "before":
        figures.unharmed += 1
        return
    try:
        read(left)
        figures.unharmed += 1
        if _files(left) != whole:
            figures.wrong.append(f"{what}: half a result is read as a whole one")
    except OURS:
        figures.told += 1
        try:
            write(left)
        except OURS:  # what is left stands in the way, and that is said
            shutil.rmtree(left)
            write(left)
        read(left)
    except Exception as error:
        figures.wrong.append(f"{what}: what is left is read with {error!r}"[:300])
    shutil.rmtree(left, ignore_errors=True)


def _files(folder: Path) -> dict[str, bytes]:
    """What is in a folder, but for what killed writers leave, which nothing reads."""
    return {
        path.relative_to(folder).as_posix(): _content(path)
        for path in folder.rglob("*")
        if path.is_file() and path.suffix != ".partial"
    }


def _content(path: Path) -> bytes:
    """What a file says: the words in safetensors' header come in any order."""
    found = path.read_bytes()
    if path.suffix != ".safetensors":
        return found
    end = 8 + int.from_bytes(found[:8], "little")
    return json.dumps(json.loads(found[8:end]), sort_keys=True).encode() + found[end:]


def _touches(event: str, called: Any) -> bool:
    """Whether a call of a function in C is one that changes the disk."""
    owner = (
        getattr(called, "__module__", None) or type(getattr(called, "__self__", None)).__module__
    )
    return event == "c_call" and str(owner).split(".")[0] in ("posix", "io", "_io", "safetensors")


def _calls(act: Callable[[], Any]) -> list[bool]:
    """Every call that an act makes, and whether it touches a file."""
    found: list[bool] = []

    def seen(frame: Any, event: str, called: Any) -> None:
        if event in ("call", "c_call"):
            found.append(_touches(event, called))

    sys.setprofile(seen)
    try:
        act()
    finally:
        sys.setprofile(None)
    return found


def _dies(act: Callable[[], Any], at: int) -> None:
    """Do it in a process that is killed at the call of this number."""
    child = os.fork()
    if child == 0:
        left = at

        def count(frame: Any, event: str, called: Any) -> None:
            nonlocal left
            if event in ("call", "c_call"):
                left -= 1
                if left < 0:
                    os.kill(os.getpid(), signal.SIGKILL)

        try:
            sys.setprofile(count)
            act()
        finally:
            os._exit(0)
    os.waitpid(child, 0)


# ---- files that grow line by line ----


def _appenders() -> dict[str, tuple[Callable[[Path, Callable[[], Any]], Any], Write]]:
    """Each kind: how entries are added to what is there, with a call behind each, and how many are
    read again."""
    from examples.capimagine.evaluate import Predictions, load
    from examples.capimagine.ledger import Entry, Ledger
    from examples.capimagine.scores import Prediction

    text = "x" * 300

    def ledger(home: Path, done: Callable[[], Any]) -> None:
        with Ledger(home / "ledger.jsonl") as opened:
            for _ in range(10):
                key = f"{os.getpid()}-{len(opened)}"
                opened.add(Entry(key=key, stage="refine", id="7", text=text))
                done()

    def entries(home: Path) -> int:
        with Ledger(home / "ledger.jsonl") as opened:
            return len(opened)

    def predictions(home: Path, done: Callable[[], Any]) -> None:
        opened = Predictions(home / "made.jsonl", {"model": "x"}, resume=True)
        said = ("question", (), False, "red", text, 1, True, 5, 0.5)
        for k in range(10):
            opened.add(Prediction(f"{os.getpid()}-{k}", "split", "none", *said))
            done()

    def made(home: Path) -> int:
        return len(load(home / "made.jsonl")[1]) if (home / "made.jsonl").exists() else 0

    return {"ledger": (ledger, entries), "predictions": (predictions, made)}


def appended(times: int = 40, seed: int = 0) -> Figures:
    """SIGKILL, or a full disk, while lines are added: each that was said to be there is there."""
    figures, rng = Figures("lines cut short"), np.random.default_rng(seed)
    for name, (add, count) in _appenders().items():
        with tempfile.TemporaryDirectory() as folder:
            home = Path(folder)
            calls = np.flatnonzero(_calls(lambda a=add, h=home: a(_made(h / "counted"), int)))
            safe = 0
            for k in range(times):
                figures.injected += 1
                said = home / "said"
                said.write_bytes(b"")

                def act(add: Any = add, home: Path = home, said: Path = said) -> None:
                    told = os.open(said, os.O_WRONLY | os.O_APPEND)
                    add(home, lambda: os.write(told, b"."))

                if k % 2:
                    _dies(act, int(rng.choice(calls)))
                    figures.unharmed += 1
                else:
                    there = sum(path.stat().st_size for path in home.glob("*.jsonl"))
                    limit = there + int(rng.integers(3000))
                    told = _in_child(act, limit=limit)
                    figures.told += told.startswith("told ")
                    figures.unharmed += told == ""
                    if told and not told.startswith("told "):
                        figures.wrong.append(f"{name}, limit {limit}: {told}"[:300])
                safe += said.stat().st_size
                there = count(home)
                if there < safe:
                    figures.lost += safe - there
                    figures.wrong.append(f"{name}: {safe} were said to be there, {there} are")
                safe = there
    return figures


# ---- two writers ----


def met(times: int = 10) -> Figures:
    """Two processes write different results into one folder at once: one of them is there, whole,
    and a writer that was not told otherwise is the one whose result it is."""
    figures = Figures("two writers at once")
    for name, (write, read) in _writers().items():
        other = _writers(1)[name][0]
        for _ in range(times):
            with tempfile.TemporaryDirectory() as folder:
                home = Path(folder)
                write(home / "a")
                other(home / "b")
                first, second = (_files(home / name) for name in "ab")
                figures.injected += 1
                told = _both(*(lambda w=w, h=home: w(h / "now") for w in (write, other)))
                _judge_met(name, told, home / "now", (first, second), read, figures)
    return figures


def _judge_met(
    name: str,
    told: tuple[str, str],
    now: Path,
    wholes: tuple[dict[str, bytes], dict[str, bytes]],
    read: Write,
    figures: Figures,
) -> None:
    for words in told:
        if words and not words.startswith("told "):
            figures.wrong.append(f"{name}: {words}"[:300])
    figures.told += any(told)
    figures.unharmed += not any(told)
    if all(told):
        figures.wrong.append(f"{name}: both were refused: {told}"[:300])
    try:
        found = read(now)
    except Exception as error:
        figures.lost += 1
        figures.wrong.append(f"{name}: neither is there: {error!r}"[:300])
        return
    there, shared = _files(now), {"graph-metadata.json"}  # that lists all graphs of a folder
    written = [whole for whole, words in zip(wholes, told, strict=True) if not words]
    kept = [all(there.get(p) == whole[p] for p in {*whole} - shared) for whole in written]
    if not (all(kept) and len(found) == len(kept) if name == "graph" else any(kept)):
        figures.lost += 1
        figures.wrong.append(f"{name}: what is there is not what was written")


def _both(first: Callable[[], Any], second: Callable[[], Any]) -> tuple[str, str]:
    """Do both at once, in a process each; what each said."""
    gate = os.pipe()
    one, two = _begun(first, gate=gate), _begun(second, gate=gate)
    for end in gate:
        os.close(end)  # which lets both go
    return _said(*one), _said(*two)


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
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    few = options.small
    found = []
    for kind in (
        lambda: torn(2 if few else 100),
        lambda: torn_checkpoints(1 if few else 10),
        raising,
        full_disk,
        forbidden,
        lambda: killed(2 if few else 40),
        lambda: appended(4 if few else 100),
        lambda: met(1 if few else 10),
        out_of_memory,
    ):
        found.append(asdict(kind()))
        print(json.dumps(found[-1], indent=1), flush=True)
    if options.out is not None:  # at the end: it is all of them or none
        options.out.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
