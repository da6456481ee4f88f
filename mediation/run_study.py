"""Run the study that a config describes: chunk by chunk, each kept as soon as it is measured.

A chunk is what is measured at once, written at once and, after an interruption, measured again.
Chunk i of a map belongs to process i % count; what a process measures depends on nothing that
another one does, so that the maps are the same to the last bit however many there are.
"""

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from imaginelens.hooks import EditTouchedNothing, LatentModel, Run
from imaginelens.hooks.appearing import alone
from imaginelens.hooks.errors import CheckpointError, ImagineLensError, InputError
from imaginelens.mediation.budget import rows_that_fit
from imaginelens.mediation.folds import Reference
from imaginelens.mediation.map_files import write_whole
from imaginelens.mediation.map_store import MapStore
from imaginelens.mediation.processes import Processes
from imaginelens.mediation.splits import Splits
from imaginelens.mediation.study_config import METRICS, MapConfig, StudyConfig
from imaginelens.mediation.study_data import StudyData, study_data
from imaginelens.mediation.study_plan import plan_of, weights_key
from imaginelens.mediation.study_progress import Progress
from imaginelens.mediation.study_summary import summary
from imaginelens.mediation.sweep import Sweep, joined

Load = Callable[..., LatentModel]
CHUNKS = "chunks"  # the folder of a map's parts, in the map's own
_PILOT = 2  # pairs that are run to see how wide inputs are


@dataclass(frozen=True)
class Study:
    """An open study: its model and its pairs.

    Attributes:
        config: what is to be done.
        data: the pairs; `lens` the model.
    """

    config: StudyConfig
    lens: LatentModel
    data: StudyData

    @staticmethod
    def of(config: StudyConfig, load: Load, *, device: str | None = None) -> "Study":
        """Open the model and read the pairs.

        Args:
            load: opens a model by name, as `il.load` does.
            device: what a launcher gave to this process; the config's own comes first.

        Raises:
            CheckpointError: there is no such model.
            InputError: the pairs cannot be read, or do not go with a map.
            HookNameError: a site does not exist.
        """
        lens = opened(config, load, device=device)
        study = Study(config, lens, study_data(config, getattr(lens, "task", None)))
        for each in config.maps:
            try:
                lens.registry.match(_filter(each))
                study.sweep(each).check()
            except InputError as error:
                raise InputError(f"map {each.name!r}: {error}") from error
        return study

    def sweep(self, each: MapConfig, *, fitted: bool = False) -> Sweep:
        """The sweep of one map; `fitted` runs the pairs kept aside, where its edit needs them."""
        edit = each.edit.edit
        if fitted and edit is not None and each.edit.needs_reference:
            edit = edit.fit(self.reference(each))
        return Sweep(
            lens=self.lens, pairs=self.data.pairs, sites=_filter(each), positions=each.selectors,
            metric=METRICS[each.metric], direction=_direction(each), context=_context(each),
            edit=edit, heads=each.heads, window=each.window,
            batch_size=self.config.run.batch_size, fast=True, verify=each.verify,
            seed=self.config.run.seed,
        )  # fmt: skip

    def reference(self, each: MapConfig) -> Reference:
        """The unedited runs of the pairs kept aside, with their states at a map's sites."""
        aside = self.data.reference
        assert aside is not None
        inputs = list(aside.base if each.direction == "denoise" else aside.source)
        size = self.config.run.batch_size
        selectors = each.selectors
        at = (*selectors,) if isinstance(selectors, list) else (selectors,)
        sites = [s for s in self.lens.registry.match(_filter(each)) if s != "hook_latent"]
        runs: list[Run] = [
            self.lens.run(inputs[i : i + size], names_filter=sites or False, positions=at)
            for i in range(0, len(inputs), size)
        ]
        return Reference(runs)

    def folder(self, each: MapConfig) -> Path:
        """Where a map goes."""
        return self.config.out / each.name


@dataclass(frozen=True)
class Measured:
    """What was found out about this machine before the first chunk, and is kept with the plan.

    Attributes:
        rows: how many rows share a forward.
        threads: of the processor; another number adds up in another order.
    """

    rows: int
    threads: int


def run_study(
    config: StudyConfig,
    load: Load,
    *,
    resume: bool = False,
    processes: Processes | None = None,
    say: Callable[[str], Any] = print,
    shown: bool = True,
) -> bool:
    """Measure all maps of a study that are not there yet, and put each together.

    `out/NAME` holds the map (`il.EffectMap.load` reads it), summary.csv and summary.json, and its
    parts in out/NAME/chunks. Returns whether every map changed something.

    Args:
        load: opens a model by name, as `il.load` does.
        resume: go on with what is in the folder; without, it must be empty.
        processes: which part of the work is done here; `launched()` finds out.
        say: is given each piece of text that a user should see.
        shown: whether progress is told on stderr.

    Raises:
        InputError: the folder is not empty, or another process is measuring it, or pairs and maps
            do not go together.
        CheckpointError: the model cannot be opened, or the folder holds another study; the first
            key that differs is named.
        ControlError: a verified cell differs.
        KeyboardInterrupt: the user stopped it; all finished chunks are kept.
    """
    here = Processes() if processes is None else processes
    if here.first:
        check_folder(config, resume=resume)
    study = Study.of(config, load, device=here.device)
    held = alone(
        config.out,
        doing="measuring the study in",
        instead="start all processes together, with `accelerate launch`, so that they share it",
    )
    with held if here.first else nullcontext():
        return _shared(study, here, say, shown=shown)


def _shared(study: Study, here: Processes, say: Callable[[str], Any], *, shown: bool) -> bool:
    """Measure what is this process' to measure; the first one then puts the maps together."""
    config = study.config
    stores = planned(study, here)
    share = {
        each: [k for k in range(store.shards or 0) if here.owns(k)]
        for each, store in stores.items()
    }
    size, n = config.run.batch_size, len(study.data.pairs)

    def pairs_in(chunks: Any) -> int:
        return sum(min(size, n - k * size) for k in chunks)

    done = {each: store.done() for each, store in stores.items()}
    progress = Progress(
        sum(pairs_in(share[each]) for each in stores),
        done=sum(pairs_in(set(share[each]) & done[each]) for each in stores),
        shown=shown and here.first,
    )
    try:
        for each, store in stores.items():
            missing = [k for k in share[each] if k not in done[each]]
            if missing:
                _measure(study, each, store, missing, progress)
        here.wait()
    finally:
        progress.close()
    return finish(study, stores, say) if here.first else True


def check_folder(config: StudyConfig, *, resume: bool) -> None:
    """Refuse to write over, or among, what is there.

    Raises:
        InputError: the folder is a file, or is not empty and the study is not to be resumed.
    """
    out = config.out
    if out.exists() and not out.is_dir():
        raise InputError(f"{str(out)!r} is a file, expected a folder; name another one with --out")
    if not resume and out.is_dir() and any(out.iterdir()):
        raise InputError(
            f"{str(out)!r} is not empty; go on with the study in it with --resume, or name another "
            "folder with --out"
        )


def opened(config: StudyConfig, load: Load, *, device: str | None = None) -> LatentModel:
    """Open the model of a study.

    Raises:
        CheckpointError: there is no such model.
    """
    model = config.model
    name: str | Path = model.name
    if model.name.startswith(("./", "../")):
        name = config.folder / model.name
    chosen = model.device
    if device is not None and chosen in ("auto", device.split(":")[0]):
        chosen = device
    if chosen == "auto":
        chosen = "cuda" if torch.cuda.is_available() else "cpu"
    return load(
        name,
        answer=model.finder,
        spec=model.spec,
        dtype="auto" if model.dtype == "auto" else getattr(torch, model.dtype),
        device_map=None if chosen == "cpu" else chosen,
        attn_implementation=model.attn_implementation,
        revision=model.revision,
    )


# ---- before the first chunk ---------------------------------------------------------------------


def planned(study: Study, here: Processes) -> dict[MapConfig, MapStore]:
    """The store of every map, with its plan; the first process makes those that are not there.

    Raises:
        CheckpointError: a folder holds another study.
    """
    weights = weights_key(study.lens.model)
    plans = {
        each: plan_of(study.config, each, study.lens, study.data, weights)
        for each in study.config.maps
    }
    stores = _stores(study, plans, make=True) if here.first else {}
    here.wait()
    if not here.first:
        stores = _stores(study, plans, make=False)
    return stores


def _stores(
    study: Study, plans: Mapping[MapConfig, Mapping[str, Any]], *, make: bool
) -> dict[MapConfig, MapStore]:
    kept = {each: _kept(study.folder(each) / CHUNKS) for each in plans}
    known = next((found for found in kept.values() if found is not None), None)
    if known is not None:
        torch.set_num_threads(known.threads)
    if known is None:
        known = Measured(fitting_rows(study), torch.get_num_threads()) if make else None
    assert known is not None, "the first process has made the plans"
    stores = {}
    for each, plan in plans.items():
        found = kept[each] or known
        whole = {**plan, "measured": {"rows": found.rows, "threads": found.threads}}
        folder = study.folder(each) / CHUNKS
        stores[each] = MapStore(folder, plan=whole, shards=study.sweep(each).n_chunks)
    return stores


def _kept(folder: Path) -> Measured | None:
    """What a study that was begun there has measured, or None."""
    if not folder.is_dir() or not any(folder.glob("*.json")):
        return None
    found: Any = MapStore(folder).plan.get("measured")
    try:
        made = Measured(**found)
        right = type(made.rows) is int and type(made.threads) is int
    except TypeError:
        right = False
    if not right or made.rows < 1 or made.threads < 1:
        raise CheckpointError(
            f"{str(folder)!r} says {found!r} of its rows and threads, which no study has written; "
            "choose another folder"
        )
    return made


def fitting_rows(study: Study) -> int:
    """How many rows fit into a forward of a study, as a power of 2: the same, for most purposes,
    whatever else is in memory just now."""
    pairs = study.data.pairs[:_PILOT]
    widths = [study.lens.run(list(side)).tokens.width for side in (pairs.base, pairs.source)]
    width = max(widths)
    return int(2 ** np.floor(np.log2(rows_that_fit(study.lens, width=width, suffix=width))))


# ---- chunks -------------------------------------------------------------------------------------


def _measure(
    study: Study, each: MapConfig, store: MapStore, missing: list[int], progress: Progress
) -> None:
    """Measure chunks of a map and keep each."""
    progress.now(each.name)
    rows = store.plan["measured"]["rows"]
    sweep = replace(study.sweep(each, fitted=True), limit=rows, splits=Splits(store.folder))
    size = study.config.run.batch_size
    for number in missing:
        progress.now(f"{each.name}, chunk {number + 1} of {store.shards}")
        try:
            part = sweep.measure(number, tick=progress.tick)
        except torch.OutOfMemoryError as error:
            raise InputError(
                f"chunk {number} of map {each.name!r} does not fit into memory; begin anew, in "
                f"another folder, with a batch_size below {size}"
            ) from error
        except ImagineLensError as error:
            error.add_note(f"in chunk {number} of map {each.name!r}")
            raise
        store.write_shard(number, part)


# ---- after the last chunk -----------------------------------------------------------------------


def finish(study: Study, stores: Mapping[MapConfig, MapStore], say: Callable[[str], Any]) -> bool:
    """Put the parts of each map together and say what was found."""
    whole = True
    for each, store in stores.items():
        folder = study.folder(each)
        try:
            found = joined([store.read_shard(number) for number in range(store.shards or 0)])
        except EditTouchedNothing as error:
            whole = False
            say(f"{each.name}: {error}")
            continue
        found.save(folder)
        told = summary(each.name, found, seed=study.config.run.seed)
        write_whole(folder / "summary.csv", told.csv.encode())
        write_whole(folder / "summary.json", told.json.encode())
        say(told.text)
    say(f"maps and tables: {study.config.out}")
    return whole


def stopped(config: StudyConfig, command: str) -> str:
    """What to tell a user who has interrupted a study: what is kept, and how to go on."""
    kept, wanted = 0, 0
    for each in config.maps:
        folder = config.out / each.name / CHUNKS
        if (folder / "map.json").is_file():
            store = MapStore(folder)
            kept, wanted = kept + len(store.done()), wanted + (store.shards or 0)
    held = f"{kept} of {wanted} chunks are kept" if wanted else "no chunk was measured yet"
    return f"stopped; {held}, go on with: {command} --resume"


# ---- words of a config as those of a sweep ------------------------------------------------------


def _filter(each: MapConfig) -> Any:
    return each.sites if isinstance(each.sites, str) else list(each.sites)


def _direction(each: MapConfig) -> Any:
    return each.direction


def _context(each: MapConfig) -> Any:
    return each.context
