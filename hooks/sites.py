"""The table of sites: every place of a model that can be read or edited, by name."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Literal

from torch import nn
from transformers import PreTrainedModel

from imaginelens.hooks.attention import offers_pattern
from imaginelens.hooks.errors import HookNameError, SiteUnavailable
from imaginelens.hooks.names import match
from imaginelens.hooks.structure import Block, Structure

Slot = Literal["output", "input", "mid", "pattern", "latent"]


@dataclass(frozen=True)
class SiteKind:
    """One row of the table: what a site of this kind is, whichever layer it is in.

    Attributes:
        part: the field of `Block` or `Structure` whose module carries the site.
        slot: how that module carries it: at its output or input, `mid` (the residual stream between
            two sublayers), `pattern` (inside the attention function), `latent` (the loop's state).
        axes: names of the tensor's axes as a hook sees them.
        at_image: what the value means at image positions.
        at_latent: what the value means at a latent step, the position whose input is z_t.
    """

    name: str
    part: str
    slot: Slot
    axes: tuple[str, ...]
    at_image: str
    at_latent: str


_RESID = ("example", "position", "d_model")
_HEADS = ("example", "position", "head", "d_head")
_IMG, _LAT = "after image features are in place", "computed from z_t"

KINDS: tuple[SiteKind, ...] = (
    SiteKind("hook_latent", "embed", "latent", _RESID, "absent", "z_t itself, before it is fed"),
    SiteKind(
        "hook_embed", "embed", "output", _RESID,
        "overwritten by image features: use vision_projector.hook_out",
        "the placeholder's embedding, overwritten by z_t: use hook_latent",
    ),
    SiteKind("blocks.{i}.hook_resid_pre", "path", "input", _RESID, _IMG, _LAT),
    SiteKind("blocks.{i}.attn.hook_q", "q", "output", _HEADS, "before rotation", "before rotation"),
    SiteKind("blocks.{i}.attn.hook_k", "k", "output", _HEADS, "before rotation", "before rotation"),
    SiteKind("blocks.{i}.attn.hook_v", "v", "output", _HEADS, _IMG, _LAT),
    SiteKind(
        "blocks.{i}.attn.hook_pattern", "attention", "pattern",
        ("example", "position", "head", "key"), "who it looks at", "who z_t looks at",
    ),
    SiteKind("blocks.{i}.attn.hook_z", "o", "input", _HEADS, _IMG, _LAT),
    SiteKind("blocks.{i}.hook_attn_out", "attn_out", "output", _RESID, _IMG, _LAT),
    SiteKind("blocks.{i}.hook_resid_mid", "mid", "mid", _RESID, _IMG, _LAT),
    SiteKind(
        "blocks.{i}.mlp.hook_pre", "mlp_pre", "output", ("example", "position", "d_mlp"), _IMG, _LAT
    ),
    SiteKind(
        "blocks.{i}.mlp.hook_post", "mlp_down", "input", ("example", "position", "d_mlp"),
        _IMG, _LAT,
    ),
    SiteKind("blocks.{i}.hook_mlp_out", "mlp_out", "output", _RESID, _IMG, _LAT),
    SiteKind(
        "blocks.{i}.hook_resid_post", "path", "output", _RESID,
        "before deepstack features, where a model adds them between layers",
        "in the last layer it decides z_{t+1}",
    ),
    SiteKind(
        "ln_final.hook_normalized", "final_norm", "output", _RESID, "read by the head only",
        "z_{t+1} before projection",
    ),
    SiteKind(
        "unembed.hook_out", "head", "output", ("example", "position", "vocab"), "logits",
        "logits that the span ignores, but for the close token",
    ),
)  # fmt: skip

VISION_KINDS: tuple[SiteKind, ...] = (
    SiteKind(
        "vision_encoder.blocks.{i}.hook_resid_post", "vision_blocks", "output",
        ("patch", "d_vision"), "all images of the batch, patches as the tower packs them", "absent",
    ),
    SiteKind(
        "vision_projector.hook_out", "projector", "output", ("image_token", "d_model"),
        "what is written over the image placeholders, in the projector's own order", "absent",
    ),
)  # fmt: skip


@dataclass(frozen=True)
class Site:
    """One place of one model: a kind of site at a module path."""

    name: str
    path: str
    kind: SiteKind
    heads: int | None = None
    block: str | None = None  # the block's path, for sites that need it
    layer: int | None = None

    @property
    def is_vision(self) -> bool:
        """Whether it lies before the image meets the text, so that it has no token positions."""
        return self.name.startswith("vision_")


@dataclass(frozen=True)
class SiteTable(Mapping[str, Site]):
    """All sites of a model by name, and why the others are missing."""

    sites: dict[str, Site]
    unavailable: dict[str, str] = field(default_factory=dict)
    model: str = "model"

    def __getitem__(self, name: str) -> Site:
        """Look a site up; an unknown or unavailable name says what to use instead."""
        if name in self.sites:
            return self.sites[name]
        if name in self.unavailable:
            raise SiteUnavailable(
                f"{name!r} is not offered by {self.model}: {self.unavailable[name]}"
            )
        try:
            match(self.sites, name)
        except HookNameError as error:
            raise HookNameError(f"{self.model}: {error}") from None
        raise HookNameError(f"{name!r} is a pattern; select with .match({name!r})")

    def __contains__(self, name: object) -> bool:
        return name in self.sites

    def __iter__(self) -> Iterator[str]:
        return iter(self.sites)

    def __len__(self) -> int:
        return len(self.sites)


def find_sites(model: PreTrainedModel, structure: Structure) -> SiteTable:
    """List every site that `model` offers, and for the rest of the table why it does not."""
    table = SiteTable({}, {}, type(model).__name__)
    for kind in KINDS:
        if "{i}" not in kind.name:
            _add(table, kind, kind.name, getattr(structure, kind.part))
            continue
        for i, block in enumerate(structure.blocks):
            _add_block(table, model, structure, kind, block, i)
    blocks, projector = VISION_KINDS
    for i, path in enumerate(structure.vision_blocks):
        _add(table, blocks, blocks.name.format(i=i), path, layer=i)
    if not structure.vision_blocks:
        name = blocks.name.format(i=0)
        table.unavailable[name] = "no vision tower was found, so read the text sites instead"
    _add(table, projector, projector.name, structure.projector)
    return table


def _add(
    table: SiteTable,
    kind: SiteKind,
    name: str,
    path: str | None,
    *,
    heads: int | None = None,
    block: str | None = None,
    layer: int | None = None,
) -> None:
    if path is None:
        table.unavailable[name] = (
            f"its modules have no part that serves as {kind.part!r}; lens.describe() lists what has"
        )
    else:
        table.sites[name] = Site(name, path, kind, heads, block, layer)


def _add_block(
    table: SiteTable,
    model: PreTrainedModel,
    structure: Structure,
    kind: SiteKind,
    block: Block,
    layer: int,
) -> None:
    name = kind.name.format(i=layer)
    path = getattr(block, kind.part)
    if (
        kind.slot == "pattern"
        and path is not None
        and not offers_pattern(model.get_submodule(path))
    ):
        table.unavailable[name] = (
            "its attention class does not ask for a registered attention function; "
            "edit hook_z or hook_attn_out instead"
        )
        return
    heads = None
    if kind.axes == _HEADS and path is not None:
        heads = _count_heads(model.get_submodule(path), kind.part, structure)
    _add(table, kind, name, path, heads=heads, block=block.path, layer=layer)


def _count_heads(projection: nn.Module, part: str, structure: Structure) -> int:
    return structure.n_kv_heads if part in ("k", "v") else structure.n_heads
