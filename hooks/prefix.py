"""A script read up to a column once, and read on from there many times, each time edited elsewhere.

What an edit cannot reach is not computed again: columns before the earliest edited one keep their
keys and values, and blocks below the edited one are skipped inside the nnsight trace, their place
taken by what they made of the unedited rows. Rows are copies of the script's rows, as many as
there are edits to try; each joins the forward at the block where its edit begins.
"""

import copy
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Float
from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

from imaginelens.hooks import engine
from imaginelens.hooks.entries import Chunk, Entry
from imaginelens.hooks.errors import InputError
from imaginelens.hooks.generate import unembed_projected
from imaginelens.hooks.prompts import PIXELS, ROW_FIELDS, SIGHT_FIELDS
from imaginelens.hooks.script import Script
from imaginelens.hooks.tokens import Kind, TokenMap

if TYPE_CHECKING:
    from imaginelens.hooks.model import LatentModel

MIXING = {"full_attention", "sliding_attention"}  # a cache of these can be read on from
Logits = Float[torch.Tensor, "row column vocab"]


def why_not(lens: "LatentModel", script: Script, stop: int) -> str | None:
    """Why a script cannot be read on from column `stop`, in words; None if it can be."""
    behaviour, inputs = lens.behaviour, script.inputs
    if not set(behaviour.mixing) <= MIXING:
        others = ", ".join(sorted(set(behaviour.mixing) - MIXING))
        return f"some layers mix positions by {others}, whose state cannot be read on from"
    if lens.model.config.is_encoder_decoder:
        return "the model is an encoder and a decoder"
    if any(name in inputs for name in SIGHT_FIELDS):
        return "images come by cross-attention"
    if lens.registry.depth is not None:
        return "blocks are run several times in one forward"
    if lens.registry.entries:
        return "hooks or edits of the user's own are active"
    if not behaviour.may_cut(script.tokens, stop):
        return f"positions before column {stop} look at positions behind it"
    if np.isin(script.tokens.kind[:, stop:], (Kind.IMAGE, Kind.VIDEO, Kind.AUDIO)).any():
        return f"there are images at or behind column {stop}"
    mask = inputs.get("attention_mask")
    if "position_ids" not in inputs and mask is not None and not bool(mask.all()):
        return "the model takes no positions, and rows are padded"
    return None


@dataclass(frozen=True, eq=False)
class Prefix:
    """A script whose columns before `stop` have been read.

    Attributes:
        stop: where the columns begin that are read again; `end` is behind the last of them.
        cache: the keys and values of the columns before `stop`; never written to.
        whole: those of all columns, where a cache can be cut back; else None.
        streams: the output of every block at the columns from `stop` on, without any edit; None
            where blocks cannot be skipped.
        logits: without any edit, at the columns that were asked for.
    """

    lens: "LatentModel"
    script: Script
    stop: int
    end: int
    columns: tuple[int, ...]
    cache: DynamicCache
    whole: DynamicCache | None
    streams: tuple[torch.Tensor, ...] | None
    logits: Logits

    def read(
        self,
        rows: Sequence[int],
        entries: Sequence[Entry],
        *,
        starts: Sequence[int] = (),
        enter: Callable[[torch.Tensor, Chunk], torch.Tensor] | None = None,
        acted: frozenset[int] = frozenset(),
    ) -> Logits:
        """Read on, with copies of some rows and with `entries` active.

        Args:
            rows: the script's row that each row of this forward is a copy of.
            starts: for each row the first block that runs on it, in rising order; none is 0.
            enter: what to make of the states with which the rows enter those blocks.
            acted: what has acted on the script's latents before, and does not again.
        """
        tokens = picked_tokens(self.script.tokens, rows)
        chunk = Chunk(tokens, self.stop, self.end)
        workers: list[engine.Worker] = []
        running = self._running(starts or [0] * len(rows))
        if running[0] < len(rows):
            assert self.streams is not None
            below = [
                self.streams[max(start - 1, 0)][row]
                for start, row in zip(starts, rows, strict=True)
            ]
            stream = torch.stack(below)
            stream = stream if enter is None else enter(stream, chunk)
            workers.append(_joining(self.lens, running, stream))
        cache = repeated(self.cache, rows, running)
        with torch.no_grad(), self.lens.registry.scope(entries):
            return _read(self.lens, self.script, chunk, rows, self.columns, cache, workers, acted)

    def _running(self, starts: Sequence[int]) -> list[int]:
        """How many rows, the first ones, each block runs on."""
        blocks = range(len(self.lens.structure.blocks) + 1)
        return [sum(start <= block for start in starts) for block in blocks]

    def moved(self, stop: int) -> "Prefix":
        """The same script read up to a later column; itself where the cache cannot be cut back."""
        if stop == self.stop or self.whole is None:
            return self
        streams = self.streams and tuple(s[:, stop - self.stop :] for s in self.streams)
        return replace(self, stop=stop, cache=_cut(self.whole, stop), streams=streams)


def prefix_of(
    lens: "LatentModel", script: Script, *, stop: int, columns: Sequence[int], end: int
) -> Prefix:
    """Read a script up to a column, then those from there to `end` once without edits.

    Args:
        columns: whose logits every read returns; none of them before `stop` or from `end` on.

    Raises:
        InputError: the script cannot be read on from there; `why_not` says so beforehand.
    """
    reason = why_not(lens, script, stop)
    if reason is not None:
        raise InputError(f"columns 0 to {stop} cannot be read by themselves: {reason}")
    outside = [column for column in columns if not stop <= column < end]
    if outside:
        raise InputError(
            f"the logits of column {outside[0]} are asked for, and columns {stop} to {end - 1} are "
            "read again; stop at or before that column, and end behind it"
        )
    tokens, rows = script.tokens, range(len(script.tokens))
    cache = DynamicCache(config=lens.model.config.get_text_config(decoder=True))
    with torch.no_grad():
        if stop:
            _read(lens, script, Chunk(tokens, 0, stop), rows, (), cache, ())
        _check(cache)
        streams: dict[int, Any] = {}
        kept = [_keep(lens, layer, streams) for layer in range(len(lens.structure.blocks))]
        rest, grown = Chunk(tokens, stop, end), repeated(cache, rows)
        logits = _read(lens, script, rest, rows, columns, grown, kept)
    held = None
    if _skippable(lens) and all(isinstance(s, torch.Tensor) for s in streams.values()):
        held = tuple(streams[layer] for layer in range(len(streams)))
    whole = grown if lens.behaviour.crops else None
    return Prefix(lens, script, stop, end, tuple(columns), cache, whole, held, logits)


def picked_tokens(tokens: TokenMap, rows: Sequence[int]) -> TokenMap:
    """A map whose rows are copies of some rows of another."""
    at = list(rows)
    return replace(
        tokens,
        ids=tokens.ids[at],
        kind=tokens.kind[at],
        image=tokens.image[at],
        cell=tokens.cell[at],
        box=tokens.box[at],
        span=tokens.span[at],
        step=tokens.step[at],
        grids=tuple(tokens.grids[row] for row in at),
        keys=tuple(tokens.keys[row] for row in at),
        videos=tuple(tokens.videos[row] for row in at if tokens.videos),
    )


def repeated(
    cache: DynamicCache, rows: Sequence[int], running: Sequence[int] | None = None
) -> DynamicCache:
    """A copy of a cache that can grow by itself, with copies of some rows.

    Args:
        running: how many of these rows, the first ones, each layer runs on; None is all.
    """
    new = copy.copy(cache)
    new.layers = [copy.copy(layer) for layer in cache.layers]
    for number, layer in enumerate(new.layers):
        index = list(rows) if running is None else list(rows[: running[number]])
        if layer.keys is None or index == list(range(len(layer.keys))) or not index:
            continue
        if len(set(index)) == 1:  # a view: what grows by concatenation is copied then
            layer.keys, layer.values = (
                held[index[:1]].expand(len(index), *held.shape[1:])
                for held in (layer.keys, layer.values)
            )
        else:
            layer.keys, layer.values = layer.keys[index], layer.values[index]
    return new


def _cut(cache: DynamicCache, stop: int) -> DynamicCache:
    """A cache of the first columns of another, which it shares its memory with."""
    new = copy.copy(cache)
    new.layers = [copy.copy(layer) for layer in cache.layers]
    for layer in new.layers:
        layer.keys, layer.values = layer.keys[..., :stop, :], layer.values[..., :stop, :]
    return new


def _read(
    lens: "LatentModel",
    script: Script,
    chunk: Chunk,
    rows: Sequence[int],
    columns: Sequence[int],
    cache: DynamicCache,
    workers: Sequence[engine.Worker],
    acted: frozenset[int] = frozenset(),
) -> torch.Tensor:
    """Read the columns of a chunk behind what the cache holds; no columns asked for are one."""
    start, stop, index = chunk.start, chunk.stop, list(rows)
    inputs = _inputs(script, start, stop, index)
    device = inputs["input_ids"].device
    keep = torch.tensor([c - start for c in columns] or [stop - start - 1], device=device)
    inputs |= {"past_key_values": cache, "use_cache": True}
    if "unembed.hook_out" not in lens.registry.active:
        inputs["logits_to_keep"] = keep
    if start == 0:
        has_images = any(name in inputs for name in PIXELS)
        chunk = replace(
            chunk, has_images=has_images, projector_rows=lens.projector_rows(script.inputs)
        )
    here = slice(start, stop)
    laid = script.laid[:, here][index]
    embeds = script.embeds[:, here][index]
    embeds = lens.registry.on_latents(embeds, chunk, np.arange(start, stop), acted)
    overlay = None
    if bool(laid.any()):
        overlay = lambda own: torch.where(laid[..., None], embeds.to(own), own)  # noqa: E731
    is_latent = torch.as_tensor(chunk.tokens.kind[:, here] == Kind.LATENT)
    projected = unembed_projected(lens.nnsight, lens.registry, lens.spec, is_latent, keep.cpu())
    with engine.untouched(lens.remembering), _keys_once(device):
        outputs = lens.registry.run(
            lens.nnsight,
            lens.model,
            inputs,
            chunk,
            overlay=overlay,
            workers=[*workers, *projected],
        )
    logits: torch.Tensor = outputs.logits
    return logits if logits.shape[1] == len(keep) else logits[:, keep]


@contextmanager
def _keys_once(device: torch.device) -> Iterator[None]:
    """On a CPU, attention reads the keys that query heads share where they lie; transformers would
    else copy them for every head, row by row, which is a quarter of the time behind long prefixes.
    On other devices torch has no fast kernel for that under a mask."""
    name = "TRANSFORMERS_SDPA_FORCE_GQA"
    if device.type != "cpu" or name in os.environ:
        yield
        return
    os.environ[name] = "1"
    try:
        yield
    finally:
        del os.environ[name]


def _inputs(script: Script, start: int, stop: int, rows: list[int]) -> dict[str, Any]:
    """The model's inputs for some columns of some rows; pictures go in with the first column."""
    fields = {k: v for k, v in script.inputs.items() if k in ROW_FIELDS}
    found: dict[str, Any] = {}
    for name, value in fields.items():
        if name == "position_ids":
            here = value[..., start:stop]
            found[name] = here[rows] if here.dim() == 2 else here[:, rows]
        else:
            found[name] = value[:, (0 if name == "attention_mask" else start) : stop][rows]
    if start == 0:
        found |= {k: v for k, v in script.inputs.items() if k not in ROW_FIELDS}
    return found


def _keep(lens: "LatentModel", layer: int, into: dict[int, Any]) -> engine.Worker:
    """A worker that keeps what a block puts out."""
    path = lens.structure.blocks[layer].path

    def worker() -> None:
        into[layer] = lens.nnsight.get(path).output

    return worker


def _joining(lens: "LatentModel", running: Sequence[int], stream: torch.Tensor) -> engine.Worker:
    """A worker that has each block run on its first rows alone; the others join them with their
    states in `stream`, (row, ...), as they enter the first block that runs on them, or the final
    norm."""
    paths = [*(block.path for block in lens.structure.blocks), lens.structure.final_norm]
    before = [running[0], *running]
    steps = [s for s in zip(paths, before, running, strict=False) if s[1] < len(stream)]

    def worker() -> None:
        for path, held, now in steps:
            envoy = lens.nnsight.get(path)
            if now == 0:
                envoy.skip(stream[:1])
                continue
            envoy.inputs = _first(envoy.inputs, now, len(stream))
            if now > held:
                envoy.input = torch.cat([envoy.input[:held], stream[held:now]])

    return worker


def _first(value: Any, n: int, rows: int) -> Any:
    """The first `n` of the `rows` of whatever a block is given: states, masks, rotations."""
    if isinstance(value, Mapping):
        return {k: _first(v, n, rows) for k, v in value.items()}
    if isinstance(value, tuple | list):
        return type(value)(_first(part, n, rows) for part in value)
    if not isinstance(value, torch.Tensor) or value.dim() < 2:
        return value
    # positions on several axes, and their rotations, have those axes before the rows
    of_axes = value.dim() == 4 if value.is_floating_point() else value.dim() == 3
    axis = int(of_axes and value.shape[0] in (3, 4) and value.shape[1] == rows)
    return value.narrow(axis, 0, n) if value.shape[axis] == rows else value


def _skippable(lens: "LatentModel") -> bool:
    """Whether a block can be left out when its output is known: no later one reads its keys."""
    config = lens.model.config.get_text_config(decoder=True)
    return not getattr(config, "num_kv_shared_layers", 0)


def _check(cache: DynamicCache) -> None:
    kinds = {type(layer) for layer in cache.layers} - {DynamicLayer, DynamicSlidingWindowLayer}
    if kinds:
        names = ", ".join(sorted(kind.__name__ for kind in kinds))
        raise InputError(f"the cache has layers of {names}, which cannot be copied row by row")
