"""Path patching: what one part of the network tells another, and what that does to the answer.

Source: Wang et al. (2023), "Interpretability in the wild", section 3.1; Goldowsky-Dill et al.
(2023), "Localizing model behavior with path patching". Three readings of one text:

    1. as it is, where everything is remembered;
    2. with the senders' states of the other run, and all that sublayers write held as it was, but
       for the receivers: the senders reach these along the stream alone, and what they would be is
       remembered;
    3. with the receivers as they then were, and all behind them free.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Shaped

from imaginelens.hooks import Edit, LatentModel, Pairs, Swap
from imaginelens.hooks.edits import EditContext, whole_numbers
from imaginelens.hooks.entries import CaptureEntry, Chunk, Entry
from imaginelens.hooks.errors import InputError
from imaginelens.hooks.metrics import Metric, Readout, logit_diff
from imaginelens.hooks.patching import check_arguments
from imaginelens.hooks.positions import Positions
from imaginelens.hooks.sites import Site
from imaginelens.mediation.cells import Cell
from imaginelens.mediation.effect_map import EffectMap
from imaginelens.mediation.ends import Direction, Ends, batches, check_study, ends_of
from imaginelens.mediation.joint import Part, part
from imaginelens.mediation.joint import told as told_of
from imaginelens.mediation.sweep import joined

End = tuple[str, Positions] | tuple[str, Positions, Sequence[int]]
# What is held inside a sublayer that an end is in, so that nothing but this end moves it.
_INSIDE = {
    "attn.hook_q": ("attn.hook_q", "attn.hook_k", "attn.hook_v"),
    "attn.hook_k": ("attn.hook_q", "attn.hook_k", "attn.hook_v"),
    "attn.hook_v": ("attn.hook_q", "attn.hook_k", "attn.hook_v"),
    "attn.hook_z": ("attn.hook_z",),
    "mlp.hook_post": ("mlp.hook_post",),
}
_STREAM = ("hook_latent", "hook_embed", "hook_resid_pre", "hook_resid_mid", "hook_resid_post")
_WRITTEN = ("hook_attn_out", "hook_mlp_out")
_IN_A_BLOCK = re.compile(r"(blocks\.\d+)\.(.+)")


def path_patch(
    lens: LatentModel,
    pairs: Pairs,
    *,
    senders: Sequence[End],
    receivers: Sequence[End],
    metric: Metric = logit_diff,
    direction: Direction = "denoise",
    batch_size: int = 16,
) -> EffectMap:
    """Let the senders change, tell nobody but the receivers, and see what that does to the answer.

    The map has one cell, the path; `map.recovery` is its share of the total effect. From a sender
    to a receiver a path goes along the residual stream, through no attention or MLP that is not a
    receiver itself; behind the receivers everything follows. Several senders change together, and
    so do several receivers: with all that is behind the senders as receivers the effect is that of
    patching the senders. A path that does not exist has an effect of exactly 0.

    All is read in fixed context, so that later latents stay as they were. Blocks must add to the
    stream what their sublayers put out: `hook_attn_out` and `hook_mlp_out` in every layer.

    Args:
        senders: sites and positions, such as `("blocks.0.hook_attn_out", il.latent)`, or with
            heads, `("blocks.1.attn.hook_z", il.latent, [0, 3])`: latents (`hook_latent`),
            embeddings, the stream, what sublayers write, q, k, v and z of attention, and
            `mlp.hook_post`.
        receivers: the same, and any other site of a layer, `("blocks.2.attn.hook_q",
            il.before_answer)`; `("ln_final.hook_normalized", il.deciding)` is the answer itself.
        direction: "denoise" runs the base and tells it of the source, "noise" the other way round.

    Raises:
        EditTouchedNothing: no sender has a state in any example, or all are the donor's already.
        InputError: an argument is not what it should be.
        SiteUnavailable: a layer's `hook_attn_out` or `hook_mlp_out` cannot be held.

    >>> import imaginelens as il
    >>> lens = il.load("latent-content")
    >>> said = path_patch(lens, lens.task(n=3, seed=0), senders=[("hook_latent", il.latent)],
    ...     receivers=[("blocks.0.hook_mlp_out", il.latent), ("blocks.1.attn.hook_v", il.latent)])
    >>> said.cells[0].position.split(' -> ')[0], bool(said.recovery > 0.5)
    ('hook_latent at latent', True)
    """
    check_study(
        lens, pairs, metric=metric, direction=direction, context="fixed", batch_size=batch_size
    )
    path = _Path.of(lens, senders, receivers)
    found = []
    for some in batches(pairs, batch_size, "path"):
        states = [(site, end.at) for end in path.senders for site in end.sites]
        ends = ends_of(
            lens, some, metric=metric, direction=direction, context="fixed", states=states
        )
        found.append(path.measured(ends))
    return joined(found)


@dataclass(frozen=True)
class _End:
    """One sender or receiver."""

    sites: tuple[str, ...]
    at: Positions
    heads: tuple[int, ...] | None

    @classmethod
    def of(cls, lens: LatentModel, name: str, given: Any) -> "_End":
        if not isinstance(given, tuple) or len(given) not in (2, 3):
            raise InputError(
                f"{name} holds {given!r}, expected (site, positions) or (site, positions, heads), "
                "such as ('blocks.0.attn.hook_z', il.latent, [0])"
            )
        site, at, *heads = given
        check_arguments(at=at)
        return cls(tuple(lens.registry.match(site)), at, whole_numbers("heads", *(heads or [None])))

    def part(self, edit: Edit) -> Part:
        return part(edit, self.at, self.sites, heads=self.heads)

    def __str__(self) -> str:
        heads = "" if self.heads is None else f" heads {list(self.heads)}"
        return f"{', '.join(self.sites)}{heads} at {self.at!r}"


@dataclass(frozen=True, eq=False)
class Put(Edit):
    """Set states to what whole activations, (example, position, ...), are there."""

    states: Mapping[str, torch.Tensor]

    def apply(
        self, act: Shaped[torch.Tensor, "cell ..."], ctx: EditContext
    ) -> Shaped[torch.Tensor, "cell ..."]:
        return self.states[ctx.site][ctx.rows, ctx.positions].to(act)


@dataclass(eq=False)
class Hold(Entry):
    """Holds whole activations as they were, but where something may pass."""

    states: Mapping[str, torch.Tensor]
    passing: "Sequence[_End]"

    def on(self, site: Site, act: torch.Tensor, chunk: Chunk, columns: np.ndarray) -> torch.Tensor:
        held = self.states[site.name].clone()
        for end in self.passing:
            if site.name not in end.sites:
                continue
            for row in range(len(held)):
                at = torch.as_tensor(end.at.resolve(chunk.tokens, row), device=held.device)
                new = act[row, at] if end.heads is None else held[row, at]
                if end.heads is not None:
                    new[:, list(end.heads)] = act[row, at][:, list(end.heads)]
                held[row, at] = new
        return held


@dataclass(frozen=True)
class _Path:
    lens: LatentModel
    senders: tuple[_End, ...]
    receivers: tuple[_End, ...]
    hold: tuple[str, ...]

    @classmethod
    def of(cls, lens: LatentModel, senders: Any, receivers: Any) -> "_Path":
        ends = {}
        for name, given in (("senders", senders), ("receivers", receivers)):
            if not isinstance(given, list | tuple) or not given:
                raise InputError(
                    f"{name} is {given!r}, expected a list with one (site, positions) at least"
                )
            ends[name] = tuple(_End.of(lens, name, one) for one in given)
        for end in ends["receivers"]:
            given_to_it = [s for s in end.sites if s in ("hook_latent", "hook_embed")]
            if given_to_it or any(lens.registry[site].is_vision for site in end.sites):
                raise InputError(
                    f"{end.sites[0]!r} is given to a reading in fixed context, so that nothing can "
                    "be told to it; name a receiver in a layer"
                )
        hold = _held(lens, *([s for end in some for s in end.sites] for some in ends.values()))
        return cls(lens, ends["senders"], ends["receivers"], hold)

    def __str__(self) -> str:
        from_, to = ("; ".join(map(str, ends)) for ends in (self.senders, self.receivers))
        return f"{from_} -> {to}"

    def measured(self, ends: Ends) -> EffectMap:
        """The map of some pairs."""
        received = tuple(dict.fromkeys(site for end in self.receivers for site in end.sites))
        as_it_is = CaptureEntry(tuple(dict.fromkeys((*self.hold, *received))), None)
        self._read(ends, [as_it_is])
        held = {site: as_it_is.whole[site] for site in self.hold}
        sent = [end.part(Swap(ends.donor)) for end in self.senders]
        told = [self._told(ends, held, received, parts) for parts in ((), sent)]
        put = [[end.part(Put(states)) for end in self.receivers] for states in told]
        before, after = (ends.value(self._read(ends, parts)) for parts in put)
        ends.forwards += 5
        return ends.map(
            [Cell("path", None, str(self), None, received)],
            formula=f"{ends.metric.name}(receivers told) - {ends.metric.name}(not told), "
            f"{ends.direction}, fixed context",
            before=before,
            after=after[None],
            flags=told_of(sent, ends.n)[0].astype(np.int8)[None],
            change=told_of(put[1], ends.n)[1][None],
            edit="path",
            sham=before - ends.value(ends.before),
            notes=("`change` is that of the receivers; five readings of each batch",),
        )

    def _told(
        self,
        ends: Ends,
        held: Mapping[str, torch.Tensor],
        received: tuple[str, ...],
        parts: Sequence[Part],
    ) -> Mapping[str, torch.Tensor]:
        """What the receivers would be if the senders changed, and nothing else did."""
        capture = CaptureEntry(received, None)  # before it is held, where it is
        self._read(ends, [capture, Hold(self.hold, held, self.receivers), *parts])
        return capture.whole

    def _read(self, ends: Ends, entries: Sequence[Entry]) -> Readout:
        run = ends.run
        with self.lens.registry.scope(entries):
            self.lens.registry.begin()
            read = self.lens.read_answer(run, ends.before.targets, unedited=ends.before)
            self.lens.registry.judge(len(run), str(run.trigger), run.acted)
        return read


def _held(lens: LatentModel, senders: Sequence[str], receivers: Sequence[str]) -> tuple[str, ...]:
    """The sites to hold: what every sublayer writes, or what is inside it where an end is."""
    inside: dict[str, dict[str, None]] = {}
    for site in (*senders, *receivers):
        in_block = _IN_A_BLOCK.fullmatch(site)
        block, kind = in_block.groups() if in_block else ("", site)
        if kind in _INSIDE:
            written = f"{block}.hook_{kind.partition('.')[0]}_out"
            own = dict.fromkeys(f"{block}.{name}" for name in _INSIDE[kind])
            inside.setdefault(written, {}).update(own)
        elif site in senders and kind not in (*_STREAM, *_WRITTEN):
            raise InputError(
                f"{site!r} cannot send, for what is beside it in its sublayer cannot be held; name "
                f"one of {', '.join((*_STREAM, *_WRITTEN, *_INSIDE))}"
            )
    found: list[str] = []
    for layer in range(len(lens.structure.blocks)):
        for written in (f"blocks.{layer}.{name}" for name in _WRITTEN):
            found += [lens.registry[site].name for site in inside.get(written, (written,))]
    return tuple(found)
