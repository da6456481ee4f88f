"""`collect`: the states of many runs, by step and layer, with labels, groups and controls."""

import gc
import hashlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool
from tqdm import tqdm

from imaginelens.hooks import Force, LatentModel, Skip
from imaginelens.hooks.errors import InputError
from imaginelens.hooks.names import NamesFilter
from imaginelens.hooks.positions import LatentPositions, Positions, latent
from imaginelens.probes.capturing import Capture
from imaginelens.probes.control_states import (
    DUMMY,
    RANDOM,
    RAW,
    chosen,
    no_dummy,
    random_model,
    raw_part,
)
from imaginelens.probes.labelling import Inputs, inputs_of, labelling
from imaginelens.probes.shards import (
    CONTROLS,
    SHARD_SIZE,
    Folder,
    Part,
    Trace,
    beside,
    joined,
    open_states,
    plain,
    shards_of,
    slug,
    traced,
)
from imaginelens.probes.states import Cells, InMemory, States

PACKAGES = ("imaginelens", "torch", "transformers", "nnsight")
_LOOK = 0.2  # seconds between two looks at what other processes have made


def collect(
    lens: LatentModel,
    data: Any,
    *,
    sites: NamesFilter = "hook_latent",
    at: Positions = latent,
    labels: Any = None,
    groups: Sequence[Any] | None = None,
    side: str = "base",
    controls: bool | Sequence[str] = True,
    out: str | Path | None = None,
    batch_size: int = 16,
    shard_size: int = SHARD_SIZE,
    share: tuple[int, int] | None = None,
    max_new_tokens: int | None = None,
    latents: Skip | Force | None = None,
    dtype: str = "float32",
    seed: int = 0,
) -> States:
    """Run inputs and keep their states at some sites and positions, for probes to read.

    Args:
        data: pairs, a list of examples `{"images": ..., "text": ...}`, or a list of texts.
        sites: hook names, a glob, a short name such as "resid_post", or a list of them.
        at: where; the positions of one example, in order, are its steps. An example that has fewer
            is masked there.
        labels: what a probe is to read: the name of a column of the examples ("colour"), or of a
            variable of an organism's mechanism ("name", "shape"); a callable (example) -> label or
            (example, step) -> label; or labels, one per example or one per (example, step). None:
            the answers.
        groups: one for each input; if left out those of the pairs, each example's own "group", or
            its picture, so that no picture is on both sides of a split.
        side: of pairs: "base", "source" or "both".
        controls: what is run and kept as well, in `.controls`: all of "random model", "raw input"
            and "dummy" that this model and selector make possible (`.notes` says which are not),
            some of them by name, or False. Each but "raw input" costs as much as the states do.
        out: a folder to stream to, in shards of `shard_size` examples, which is what is held in
            memory; called again with the same arguments, only missing shards are made.
        share: (number of this process, how many there are), such as accelerate's `process_index`
            and `num_processes`: every process makes its part of the shards, waits for those of the
            others, and gets all states. Needs `out`, a folder that they all see; called again after
            one of them was killed, they make what is missing.
        max_new_tokens, latents: as in `lens.run`.
        dtype: "float32" or "float64", as states are kept.
        seed: of the random model's weights.

    Raises:
        InputError: an input or label is not as above, a site has another width than the residual
            stream, no example has such a position, or a control asked for by name is impossible.
        CheckpointError: the folder holds states that were collected otherwise.

    >>> from imaginelens.organisms import load
    >>> lens = load("latent-content")
    >>> collect(lens, lens.task(n=4), labels="shape", controls=False)
    States(4 examples x 2 steps x 1 layer x 64, shape: 4 classes)
    """
    if dtype not in ("float32", "float64"):
        raise InputError(f"dtype is {dtype!r}, expected 'float32' or 'float64'")
    for name, number in (("batch_size", batch_size), ("shard_size", shard_size)):
        if number < 1:
            raise InputError(f"{name} is {number}, expected 1 or more")
    inputs = inputs_of(data, side=side, groups=groups)
    told = labelling(labels, inputs, getattr(lens, "variables", {}))
    capture = Capture(_sites(lens, sites), at, max_new_tokens, latents, dtype)
    wanted = chosen(controls)
    if out is not None and lens.registry.entries:
        raise InputError(
            f"{len(lens.registry.entries)} hooks or edits are active, which a folder does not keep "
            "for later; collect into memory (out=None), or deactivate them with "
            "lens.registry.clear()"
        )
    work = _Work(lens, inputs, capture, batch_size, shard_size, seed, _checked(share, out))
    early = None if told.fixed is None else plain(told.fixed, "label")
    words: dict[str, Any] = {"label": told.name, "labels": early, "groups": list(inputs.groups)}
    if out is not None:
        words["groups"] = plain(words["groups"], "group")
    kept = work.kept(None if out is None else Path(out), words)
    with work.progress(1 + len({RANDOM, DUMMY} & set(wanted))):
        work.fill(kept, lambda _, shard: work.part(lens, shard))
        traces = [kept.trace(k) for k in range(len(work.shards))]
        whole = traced(traces)
        if not whole.mask.any():
            raise InputError(_nothing(lens, at, len(inputs)))
        notes = _fewer(whole.mask)
        made: dict[str, Any] = {}
        for name in wanted:
            try:
                made[name] = work.control(name, kept, traces)
            except InputError as error:
                if not isinstance(controls, bool):
                    raise
                notes.append(f"no control {name!r}: {error}")
    found = told.values(whole.mask, whole.steps)
    found = None if found is None else plain(found, "label")
    if isinstance(kept, Folder):
        kept.finish(**{**words, "labels": found, "notes": notes, "provenance": _provenance(lens)})
        return open_states(kept.folder)
    states = States(
        kept.cells(),
        whole.mask,
        capture.sites,
        groups=inputs.groups,
        at=repr(at),
        keys=inputs.keys,
        notes=tuple(notes),
    )
    states = replace(states, controls={name: _control(states, made[name], name) for name in made})
    return states if found is None else states.relabelled(found, label=told.name)


# ---- the work ----------------------------------------------------------------------------------


class _InMemory:
    """Shards that are kept in memory."""

    def __init__(self, n: int) -> None:
        self.parts: list[Part | None] = [None] * n

    def missing(self) -> list[int]:
        return [k for k, part in enumerate(self.parts) if part is None]

    def write(self, number: int, part: Part) -> None:
        self.parts[number] = part

    def trace(self, number: int) -> Trace:
        part = self.parts[number]
        assert part is not None
        return part.trace

    def cells(self) -> Cells:
        return InMemory(joined([part for part in self.parts if part is not None]).values)


_Kept = Folder | _InMemory


@dataclass
class _Work:
    """What is run, shard by shard and in each of them batch by batch, whatever is there already."""

    lens: LatentModel
    inputs: Inputs
    capture: Capture
    batch_size: int
    shard_size: int
    seed: int
    share: tuple[int, int] = (0, 1)
    bar: Any = None

    @property
    def shards(self) -> list[range]:
        return shards_of(len(self.inputs), self.shard_size)

    def kept(self, folder: Path | None, words: Mapping[str, Any], **more: Any) -> _Kept:
        """Where the shards of a plan go: into a folder, or else into memory."""
        if folder is None:
            return _InMemory(len(self.shards))
        return Folder(folder, plan={**self.plan, **more}, words=words)

    @property
    def plan(self) -> dict[str, Any]:
        """All that decides what states there will be, to the last bit."""
        lens, capture = self.lens, self.capture
        return {
            "n": len(self.inputs),
            "model": _model_name(lens),
            "weights": _weights(lens),
            "sites": list(capture.sites),
            "at": repr(capture.at),
            "dtype": capture.dtype,
            "shard_size": self.shard_size,
            "batch_size": self.batch_size,
            "max_new_tokens": capture.max_new_tokens,
            "latents": None if capture.latents is None else repr(capture.latents),
            "keys": list(self.inputs.keys),
        }

    @contextmanager
    def progress(self, passes: int) -> Iterator[None]:
        total = passes * sum(len(self.batches(shard)) for shard in self.shards)
        with tqdm(total=total, desc="collect", unit="batch", delay=3, leave=False) as bar:
            self.bar = bar
            yield

    def batches(self, shard: range) -> list[range]:
        """Batches do not cross shards, so that a shard is made alike whenever it is made."""
        return [shard[i : i + self.batch_size] for i in range(0, len(shard), self.batch_size)]

    def fill(self, kept: _Kept, make: Callable[[int, range], Part], *, told: bool = True) -> None:
        """Make this process' missing shards, and wait for the others'; `told` where the bar counts
        them."""
        index, count = self.share
        missing = kept.missing()
        for number, shard in enumerate(self.shards):
            if number in missing and number % count == index:
                kept.write(number, make(number, shard))
            elif told:
                self.bar.update(len(self.batches(shard)))
        while kept.missing():  # whoever starts the processes ends them all when one of them fails
            time.sleep(_LOOK)

    def part(
        self,
        lens: LatentModel,
        shard: range,
        like: Trace | None = None,
        constant: np.ndarray | None = None,
    ) -> Part:
        """The states of one shard; `like` another run of it, whose text is dictated."""
        parts = []
        for batch in self.batches(shard):
            examples = [self.inputs.examples[i] for i in batch]
            if like is None:
                parts.append(self.capture.batch(lens, examples))
            else:
                own = _rows(like, slice(batch.start - shard.start, batch.stop - shard.start))
                parts.append(self.capture.dictated(lens, examples, own, constant))
            _check_finite(parts[-1], batch, self.capture)
            self.bar.update()
        return joined(parts)

    def control(self, name: str, kept: _Kept, traces: Sequence[Trace]) -> _Kept:
        """Make a control.

        Raises:
            InputError: it is impossible, and why.
        """
        folder = kept.folder / CONTROLS / slug(name) if isinstance(kept, Folder) else None
        words = {"control": name, "repeated": name == RAW}
        if name == RAW:
            there = self.kept(folder, words, control=name, sites=["input"])
            examples = self.inputs.examples
            dtype = self.capture.dtype
            self.fill(there, lambda _, s: raw_part(examples[s.start : s.stop], dtype), told=False)
        elif name == DUMMY:
            if why := no_dummy(traces):
                raise InputError(why)
            constant = next(trace.first for trace in traces if trace.first is not None)
            there = self.kept(folder, words, control=name)
            self.fill(there, lambda k, s: self.part(self.lens, s, traces[k], constant))
        else:
            if self.lens.registry.entries:
                raise InputError("hooks or edits are active, which a fresh model would not have")
            there = self.kept(folder, words, control=name, seed=self.seed)
            if there.missing():
                fresh = random_model(self.lens, seed=self.seed)
                self.fill(there, lambda k, s: self.part(fresh, s, traces[k]))
                del fresh
                gc.collect()  # a wrapped model is in cycles
                if torch.cuda.is_available():
                    torch.cuda.empty_cache()
        if isinstance(there, Folder):
            there.finish(**words, notes=[])
        return there


def _control(states: States, kept: _InMemory, name: str) -> States:
    """A control that was kept in memory, beside its states."""
    cells = kept.cells()
    if name == RAW:
        one = np.ones((len(states), 1), dtype=bool)
        return beside(states, States(cells, one, ("input",)), True)
    mask = traced([kept.trace(k) for k in range(len(kept.parts))]).mask
    return beside(states, States(cells, mask, states.sites), False)


def _rows(trace: Trace, rows: slice) -> Trace:
    return replace(
        trace, mask=trace.mask[rows], steps=trace.steps[rows], written=trace.written[rows]
    )


# ---- what is refused and said ------------------------------------------------------------------


def _checked(share: Any, out: Any) -> tuple[int, int]:
    """The part of the shards that is made here."""
    if share is None:
        return 0, 1
    numbers = share if isinstance(share, tuple) and len(share) == 2 else (-1, 0)
    if not all(isinstance(each, int) for each in numbers) or not 0 <= numbers[0] < numbers[1]:
        raise InputError(
            f"share is {share!r}, expected the number of this process, counted from 0, and how "
            "many there are"
        )
    if out is None and numbers[1] > 1:
        raise InputError("share= cuts the work into parts that meet in a folder; name it by out=")
    return numbers


def _sites(lens: LatentModel, wanted: NamesFilter) -> tuple[str, ...]:
    """The names of sites whose states are as wide as the residual stream."""
    names = lens.registry.match(wanted)
    for name in names:
        axes = lens.registry[name].kind.axes
        if axes[-1] != "d_model":
            raise InputError(
                f"{name!r} has the axes ({', '.join(axes)}), and states to probe are d_model wide; "
                "name sites of the residual stream, such as '*.hook_resid_post'"
            )
    return tuple(names)


def _check_finite(part: Part, batch: range, capture: Capture) -> None:
    bad = np.argwhere(~np.isfinite(part.values).all(-1))
    if len(bad):
        row, step, layer = bad[0].tolist()
        raise InputError(
            f"the states at {capture.sites[layer]!r} are nan or infinite in {capture.dtype} (the "
            f"first: input {batch[row]}, step {step}); run the model in another dtype, or leave "
            "that site out"
        )


def _nothing(lens: LatentModel, at: Positions, n: int) -> str:
    cure = "choose another selector"
    if lens.spec is not None and isinstance(at, LatentPositions):
        cure = "force them with latents=il.Force(steps), or choose another selector"
    return f"none of the {n} inputs has a position that {at!r} selects; {cure}"


def _fewer(mask: Bool[np.ndarray, "example step"]) -> list[str]:
    """How many examples have fewer steps than others."""
    n, steps = mask.shape
    none, some = int((~mask.any(1)).sum()), int((~mask.all(1)).sum())
    if not some:
        return []
    return [f"{some} of {n} examples have fewer than {steps} steps, {none} of them none"]


def _model_name(lens: LatentModel) -> str:
    """The class, and the checkpoint's name if it has one; of a path its last part alone."""
    given = getattr(lens, "name", "") or str(getattr(lens.model.config, "_name_or_path", ""))
    hub = given.count("/") == 1 and not Path(given).exists()
    own = given if hub else Path(given).name
    return " ".join(part for part in (type(lens.model).__name__, own) if part)


@torch.no_grad()
def _weights(lens: LatentModel) -> str:
    """What differs between models of one name: a digest of a few numbers of each weight."""
    digest = hashlib.blake2b(digest_size=8)
    for name, weight in lens.model.named_parameters():
        digest.update(f"{name}{tuple(weight.shape)}{weight.dtype}".encode())
        if weight.device.type != "meta":
            some = weight.reshape(-1)[:: max(1, weight.numel() // 16)]
            digest.update(some.detach().to("cpu", torch.float64).numpy().tobytes())
    return digest.hexdigest()


def _provenance(lens: LatentModel) -> dict[str, Any]:
    """What belongs to the record and does not keep a collection from going on."""
    return {
        "lens": type(lens).__name__,
        "revision": str(getattr(lens.model.config, "_commit_hash", None) or ""),
        "dtype": str(lens.model.dtype).removeprefix("torch."),
        "device": str(lens.model.device),
        "versions": {package: version(package) for package in PACKAGES},
    }
