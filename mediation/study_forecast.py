"""What a study would cost, found out by measuring one chunk of it and writing nothing."""

import json
import resource
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch

from imaginelens.hooks import Pairs
from imaginelens.hooks.inputs import pictures_of
from imaginelens.mediation.cells import Cell
from imaginelens.mediation.effect_map import EffectMap
from imaginelens.mediation.run_study import Load, Study, fitting_rows
from imaginelens.mediation.study_config import MapConfig, StudyConfig
from imaginelens.mediation.study_progress import duration
from imaginelens.mediation.study_summary import summary
from imaginelens.mediation.sweep import Chunk, Sweep

_PATIENCE = 60.0  # seconds of forwards of a map after which the rest is reckoned


@dataclass(frozen=True)
class MapForecast:
    """What one map costs.

    Attributes:
        runs: inputs that are run as they are, each once; `forwards` all that the model computes.
        bytes: on the disk.
    """

    name: str
    cells: int
    chunks: int
    runs: int
    forwards: int
    bytes: int
    seconds: float


@dataclass(frozen=True)
class Forecast:
    """What a study costs.

    Attributes:
        opening: seconds until the first chunk begins.
        memory: bytes at the peak, of the process; `device_memory` of the accelerator, if any.
        reckoned: maps whose pilot chunk was not measured to its end.
    """

    maps: tuple[MapForecast, ...]
    opening: float
    memory: int
    device_memory: int | None
    rows: int
    pairs: int
    batch_size: int
    reckoned: tuple[str, ...]

    @property
    def seconds(self) -> float:
        """All of it, on this machine, by one process."""
        return self.opening + sum(each.seconds for each in self.maps)

    @property
    def totals(self) -> dict[str, float]:
        """Forwards, bytes on disk and seconds of all maps."""
        forwards, disk = (
            sum(getattr(m, name) for m in self.maps) for name in ("forwards", "bytes")
        )
        return {"forwards": forwards, "bytes": disk, "seconds": self.seconds}

    def __str__(self) -> str:
        lines = [
            f"{each.name}: {each.cells} cells x {self.pairs} pairs in {each.chunks} chunks; "
            f"{each.runs:,} unedited runs, about {each.forwards:,} forwards, "
            f"{size(each.bytes)} on disk, about {duration(each.seconds)}"
            for each in self.maps
        ]
        device = ""
        if self.device_memory is not None:
            device = f", and {size(self.device_memory)} on the device"
        lines += [
            f"in all: about {sum(each.forwards for each in self.maps):,} forwards of {self.rows} "
            f"rows at most, {size(sum(each.bytes for each in self.maps))} on disk, about "
            f"{duration(self.seconds)} for one process",
            f"peak memory: {size(self.memory)}{device}, at {self.batch_size} pairs in a chunk",
        ]
        lines += [
            f"the pilot of {name} was stopped after {_PATIENCE:.0f} s; the rest of its chunk is "
            "reckoned"
            for name in self.reckoned
        ]
        return "\n".join([*lines, "nothing was written"])


def forecast(config: StudyConfig, load: Load, *, device: str | None = None) -> Forecast:
    """Measure one chunk of each map of a study, that of the largest inputs, and reckon the rest.

    Nothing is written. The peak is that of this process, which has then done all that the study
    does: opened the model, measured a chunk, and summarised a map of all examples.

    Raises:
        InputError: as `run_study`; so also the others.
    """
    started = time.perf_counter()
    study = Study.of(config, load, device=device)
    rows = fitting_rows(study)
    opening = time.perf_counter() - started
    maps = [_forecast(study, each, rows) for each in config.maps]
    on_device = None
    if study.lens.model.device.type == "cuda":
        on_device = int(torch.cuda.max_memory_reserved(study.lens.model.device))
    return Forecast(
        maps=tuple(each for each, _ in maps),
        opening=opening,
        memory=peak_memory(),
        device_memory=on_device,
        rows=rows,
        pairs=len(study.data.pairs),
        batch_size=config.run.batch_size,
        reckoned=tuple(each.name for each, finished in maps if not finished),
    )


class _Enough(Exception):
    """The pilot has taken long enough."""


@dataclass
class _Clock:
    """Adds up the work that is done, and ends it when it takes too long."""

    began: float
    pairs: float = 0.0

    def tick(self, pairs: float) -> None:
        self.pairs += pairs
        if time.perf_counter() - self.began > _PATIENCE:
            raise _Enough


@dataclass(frozen=True)
class _Pilot:
    """What one chunk took: its forwards, and seconds for runs as they are and for edited ones."""

    cells: tuple[Cell, ...]
    key: str
    pairs: int
    forwards: float
    ran: float
    edited: float
    finished: bool


def _pilot(sweep: Sweep) -> _Pilot:
    """Measure a chunk; its states are gone when this returns, as they are in the study."""
    number = largest(sweep)
    began = time.perf_counter()
    chunk = Chunk.of(sweep, number)
    unedited = chunk.forwards
    clock = _Clock(time.perf_counter())
    share, finished = 1.0, True
    try:
        sweep.measured(chunk, tick=clock.tick)
    except _Enough:
        share, finished = max(clock.pairs / len(chunk.pairs), 1e-9), False
    return _Pilot(
        cells=tuple(cell for cell, _ in chunk.cells),
        key=chunk.keys[0],
        pairs=len(chunk.pairs),
        forwards=unedited + (chunk.forwards - unedited) / share,
        ran=clock.began - began,
        edited=(time.perf_counter() - clock.began) / share,
        finished=finished,
    )


def _forecast(study: Study, each: MapConfig, rows: int) -> tuple[MapForecast, bool]:
    """What a map costs, and whether its pilot came to its end."""
    began = time.perf_counter()
    sweep = replace(study.sweep(each, fitted=True), limit=rows)
    fitting = time.perf_counter() - began
    pilot = _pilot(sweep)
    began = time.perf_counter()
    on_disk = _written(study, each, pilot)
    closing = time.perf_counter() - began
    pairs = len(study.data.pairs)
    whole = MapForecast(
        name=each.name,
        cells=len(pilot.cells),
        chunks=sweep.n_chunks,
        runs=2 * pairs + (study.config.data.reference if each.edit.needs_reference else 0),
        forwards=round(pilot.forwards * sweep.n_chunks),
        bytes=on_disk,
        seconds=fitting + (pilot.ran + pilot.edited) * pairs / pilot.pairs + closing,
    )
    return whole, pilot.finished


def largest(sweep: Sweep) -> int:
    """The chunk with the largest inputs, by pixels and letters; the first of equals."""
    size, pairs = sweep.batch_size, sweep.pairs
    most = [_largest_input(pairs[i : i + size]) for i in range(0, len(pairs), size)]
    return most.index(max(most))


def _largest_input(pairs: Pairs) -> int:
    """A batch is as wide as its widest row: pixels over 100, about a token, and letters over 4."""
    return max(
        sum(picture.width * picture.height // 100 for picture in pictures_of(example))
        + len(str(example.get("text", ""))) // 4
        for example in (*pairs.base, *pairs.source)
    )


def _written(study: Study, each: MapConfig, pilot: _Pilot) -> int:
    """The bytes of a map's files. A map of that size, of made-up numbers, is summarised, for that
    takes memory, too."""
    n, sweep, cells = len(study.data.pairs), study.sweep(each), pilot.cells
    draw = np.random.default_rng(0)
    values = draw.normal(size=(len(cells), n))
    if sweep.metric.binary:
        values = (values > 0).astype(float)
    made = EffectMap.from_arrays(
        cells=cells,
        before=np.zeros(n),
        other=np.ones(n),
        after=values,
        groups=study.data.pairs.groups,
        metric=sweep.metric.name,
        unit=sweep.metric.unit,
        binary=sweep.metric.binary,
        direction=sweep.direction,
        context=sweep.context,
        keys=[f"{i}:{pilot.key}" for i in range(n)],
    )
    told = summary(each.name, made)
    arrays = made.after.nbytes + made.flags.nbytes + made.change.nbytes + 3 * made.before.nbytes
    words = len(json.dumps([asdict(cell) for cell in cells])) + 1100
    keys = len(json.dumps(made.keys))
    parts = arrays + keys + words * sweep.n_chunks
    return parts + arrays + keys + words + len(told.csv) + len(told.json) + 950


def peak_memory() -> int:
    """The most memory that this process has held, in bytes."""
    status = Path("/proc/self/status")
    if status.is_file():
        line = next(x for x in status.read_text().splitlines() if x.startswith("VmHWM"))
        return int(line.split()[1]) * 1024
    return int(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)  # bytes on a Mac


def size(count: int) -> str:
    """A number of bytes, as one says it.

    >>> size(900), size(2_500_000), size(12 * 2**30)
    ('900 B', '2.4 MiB', '12.0 GiB')
    """
    number = float(count)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if number < 1024:
            return f"{number:.0f} B" if unit == "B" else f"{number:.1f} {unit}"
        number /= 1024
    return f"{number:.1f} TiB"
