"""The table of sites: every place of a model that can be read or edited, by name."""

import inspect
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Literal

from torch import nn
from transformers import PreTrainedModel

from imaginelens.hooks.attention import SLOTS, offers_pattern
from imaginelens.hooks.errors import HookNameError, SiteUnavailable
from imaginelens.hooks.names import match
from imaginelens.hooks.structure import Block, Structure
from imaginelens.hooks.tensor_parallel import is_split

Slot = Literal[
    "output", "input", "first_half", "mid", "stream", "rot_q", "rot_k", "pattern", "latent"
]


@dataclass(frozen=True)
class SiteKind:
    """One row of the table: what a site of this kind is, whichever layer it is in.

    Attributes:
        part: the field of `Block` or `Structure` whose module carries the site.
        slot: how that module carries it: at its output or input, in the `first_half` of its
            input's features, `mid` (the residual stream between two sublayers), `stream` (the
            same, or what a sublayer adds to it, in blocks that gate or scale their sublayers: a
            difference of the stream), `rot_q`, `rot_k`, `pattern` (inside the attention function),
            `latent` (the loop's state).
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
        "blocks.{i}.attn.hook_rot_q", "attention", "rot_q", _HEADS,
        "after rotation", "after rotation",
    ),
    SiteKind(
        "blocks.{i}.attn.hook_rot_k", "attention", "rot_k", _HEADS,
        "after rotation: all keys that a forward reads, those in the cache included",
        "after rotation, as the cache holds it for every later position",
    ),
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


# The depth axis of models that recur in depth.
STATE = SiteKind(
    "recurrences.{r}.hook_state", "adapter", "first_half", _RESID, "absent",
    "the state that enters a recurrence",
)  # fmt: skip

_CODEBOOKS = ("vqmodel", "vqgan", "vq_model")
_WORDS = {
    "path": "block",
    "attention": "attention",
    "q": "query projection",
    "k": "key projection",
    "v": "value projection",
    "o": "attention output projection",
    "attn_out": "attention",
    "mid": "norm between attention and MLP",
    "mlp_pre": "first MLP layer",
    "mlp_down": "last MLP layer",
    "mlp_out": "MLP",
}

# Where the stream passes a kind of site, relative to the others of its block.
ORDER = {kind.name: number for number, kind in enumerate((*KINDS, *VISION_KINDS, STATE))}


@dataclass(frozen=True)
class Site:
    """One place of one model: a kind of site at a module path."""

    name: str
    path: str
    kind: SiteKind
    heads: int | None = None
    block: str | None = None  # the block's path, for sites that need it
    layer: int | None = None
    call: int = 0  # which call of the module within one forward

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
    why = _why_nothing_projects(model, structure)
    _add(table, projector, projector.name, structure.projector, why=why)
    return table


def _why_nothing_projects(model: PreTrainedModel, structure: Structure) -> str:
    codes = [path for path, _ in model.named_modules() if path.endswith(_CODEBOOKS)]
    if codes:
        return (
            f"its pictures become ids of a codebook ({codes[0]}) that are looked up like words, so "
            "nothing is projected; edit blocks.0.hook_resid_pre at il.image instead"
        )
    if structure.vision is None and structure.image_token_id is None:
        return "it takes no images, as far as its parts and its config tell"
    return (
        f"{type(model).__name__} has no module that is known to project its images; if one does, "
        f"il.register_structure({model.config.model_type!r}, projector=...)"
    )


def _add(
    table: SiteTable,
    kind: SiteKind,
    name: str,
    path: str | None,
    *,
    heads: int | None = None,
    block: str | None = None,
    layer: int | None = None,
    call: int = 0,
    why: str = "it has no such module",
) -> None:
    if path is None:
        table.unavailable[name] = why
    else:
        table.sites[name] = Site(name, path, kind, heads, block, layer, call)


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
    if block.by_difference and kind.part in ("attn_out", "mid", "mlp_out"):
        kind, path = replace(kind, slot="stream"), block.mid
    if block.mid_leaves and kind.part == "mid":
        kind = replace(kind, slot="output")
    if kind.slot in SLOTS and path is not None and not offers_pattern(model.get_submodule(path)):
        table.unavailable[name] = (
            "its attention class does not ask for a registered attention function; "
            "edit hook_z or hook_attn_out instead"
        )
        return
    if kind.slot in SLOTS and path is not None and _biased(model.get_submodule(path)):
        table.unavailable[name] = (
            "its attention class adds a position bias of its own to the scores, which the "
            "attention written out here does not have; edit hook_z or hook_attn_out instead"
        )
        return
    if (
        kind.slot in SLOTS
        and path is not None
        and any(is_split(part) for part in model.get_submodule(path).modules())
    ):
        table.unavailable[name] = (
            "its heads are split among processes, each of which looks at its own alone; edit "
            "hook_z or hook_attn_out instead, or load the model without tp_plan"
        )
        return
    heads = None
    if kind.axes == _HEADS and kind.slot not in SLOTS and path is not None:
        heads = _count_heads(model.get_submodule(path), kind.part, structure)
    why = _why(model, kind, block) if path is None else ""
    _add(
        table, kind, name, path,
        heads=heads, block=block.path, layer=layer, call=block.call, why=why,
    )  # fmt: skip


def _biased(attention: nn.Module) -> bool:
    """Whether this attention class gives its attention function more than queries, keys and values
    to make the pattern from (Inkling)."""
    forward = inspect.unwrap(type(attention).forward)
    return "position_bias" in forward.__code__.co_varnames


def _why(model: PreTrainedModel, kind: SiteKind, block: Block) -> str:
    """Why a block has no site of a kind, in a sentence that says what to do."""
    module = model.get_submodule(block.path)
    of = type(module).__name__
    if kind.part == "mid" and block.attn_out and block.mlp_out:
        return (
            f"in {of} no module reads the stream between attention and MLP, which may run side by "
            "side; edit hook_attn_out or hook_mlp_out instead"
        )
    mixer = block.attn_out and type(model.get_submodule(block.attn_out)).__name__
    if kind.part in ("attention", "q", "k", "v", "o") and block.attention is None and mixer:
        return f"{of} mixes positions by {mixer}, not by attention; edit hook_attn_out instead"
    inside = ", ".join(name for name, _ in module.named_children())
    alone = mixer or (block.mlp_out and type(model.get_submodule(block.mlp_out)).__name__)
    if alone and hasattr(module, "mixer"):
        return f"this {of} has one sublayer, {alone}; other blocks have the others"
    return (
        f"{of} holds {inside}, none of which is known to be its {_WORDS[kind.part]}; if one is, "
        f"il.register_structure({model.config.model_type!r}, {kind.part}=...)"
    )


def _count_heads(projection: nn.Module, part: str, structure: Structure) -> int:
    return structure.n_kv_heads if part in ("k", "v") else structure.n_heads
