"""What a model is to this library: printed by `lens.describe()`."""

import inspect
from collections.abc import Iterator
from dataclasses import dataclass

from transformers import PreTrainedModel

from imaginelens.hooks.behaviour import Behaviour
from imaginelens.hooks.depth import Depth, DepthSpec
from imaginelens.hooks.grid import resampled
from imaginelens.hooks.media import audio_token_id, video_token_id
from imaginelens.hooks.sites import SiteTable
from imaginelens.hooks.spec import LatentSpec
from imaginelens.hooks.structure import Structure
from imaginelens.hooks.textspans import TextSpec
from imaginelens.hooks.vocabspans import VocabSpec


@dataclass(frozen=True)
class Description:
    """Family, sizes, sites and image rule of one model, and what is not supported and why."""

    model: str
    family: str
    layers: int
    d_model: int
    heads: int
    vision_layers: int
    sites: int
    grid_rule: str
    dtype: str
    attention: str
    behaviour: tuple[str, ...]
    unsupported: dict[str, str]

    def __str__(self) -> str:
        lines = [
            f"{self.model} ({self.dtype}, attention {self.attention})",
            f"  latents    {self.family}",
            f"  decoder    {self.layers} layers, d_model {self.d_model}, {self.heads} heads",
            f"  vision     {self.vision_layers} layers, grid: {self.grid_rule}",
            f"  sites      {self.sites}",
        ]
        lines += [f"  behaviour  {line}" for line in self.behaviour]
        lines += [f"  missing    {name}: {why}" for name, why in self.unsupported.items()]
        return "\n".join(lines)

    __repr__ = __str__


def describe(
    model: PreTrainedModel,
    structure: Structure,
    behaviour: Behaviour,
    table: SiteTable,
    spec: LatentSpec | TextSpec | VocabSpec | DepthSpec | None,
    depth: Depth | None = None,
) -> Description:
    """Describe a model from what was found in it."""
    text = model.config.get_text_config(decoder=True)
    return Description(
        model=type(model).__name__,
        family="none" if spec is None else _latents(spec),
        layers=len(structure.blocks),
        d_model=structure.d_model,
        heads=structure.n_heads,
        vision_layers=len(structure.vision_blocks),
        sites=len(table),
        grid_rule=_grid_rule(model, structure),
        dtype=str(next(model.parameters()).dtype).removeprefix("torch."),
        attention=str(text._attn_implementation),
        behaviour=(
            *behaviour.lines(),
            *_ways(model, structure),
            *_media(model),
            *(() if depth is None else depth.lines()),
        ),
        unsupported=_by_kind(table),
    )


def _latents(spec: LatentSpec | TextSpec | VocabSpec | DepthSpec) -> str:
    if isinstance(spec, DepthSpec):
        return f"{spec.name}: states along the depth, recurrences.{{r}}.hook_state; none fed back"
    if isinstance(spec, TextSpec):
        return f"none; {spec.name}: imagines in words, between {spec.open!r} and {spec.close!r}"
    if isinstance(spec, VocabSpec):
        groups = ", ".join(f"{' '.join(dict.fromkeys(g))} x {len(g)}" for g in spec.groups)
        read = f" ({spec.decodes})" if spec.decodes else ""
        return f"{spec.name}: written as tokens, {groups}; nothing fed back; {spec.site}{read}"
    steps = f"exactly {spec.max_steps}" if spec.fixed else f"up to {spec.max_steps}"
    head = "" if spec.project is None else ", through an extra head"
    end = "" if spec.criterion is None else ", ended by a learned state"
    if spec.trigger == "prompt":
        again = "" if spec.inserts is None else f", {spec.inserts.patches} image tokens before each"
        return f"{spec.name}: one for each {spec.pad!r} of the prompt{again}{head}"
    cue = "" if spec.cue is None else f", or {spec.cue.after} places behind token {spec.cue.token}"
    if spec.trigger == "always":
        return f"{spec.name}: from the first generated token until {spec.close!r}{head}{end}"
    return (
        f"{spec.name}: {steps} steps, opened by {spec.open!r} ({spec.trigger}{cue}), "
        f"slot {spec.slot}{head}{end}"
    )


def _ways(model: PreTrainedModel, structure: Structure) -> Iterator[str]:
    """How sublayers and images reach the stream, where it is not as usual."""
    blocks = structure.blocks
    scaled = sum(block.by_difference for block in blocks)
    if scaled:
        yield (
            f"{scaled} of {len(blocks)} blocks gate or scale what their sublayers add: there "
            "hook_attn_out and hook_mlp_out are differences of the stream"
        )
    looking = _looking(model, structure)
    if looking:
        found = "none" if structure.image_token_id is None else "only what stands for a whole one"
        yield (
            f"images come by cross-attention ({', '.join(looking)}): no position shows a part of "
            f"one, and il.image finds {found}; edit vision_projector.hook_out or the blocks behind"
        )


def _media(model: PreTrainedModel) -> Iterator[str]:
    """Which other media it takes, and how their tokens are selected."""
    takes = inspect.signature(model.forward).parameters
    if "pixel_values_videos" in takes and video_token_id(model.config) is not None:
        yield "videos: il.video selects their tokens, by frame and cell where the layout is known"
    hears = getattr(model.config, "audio_config", True) is not None
    if hears and audio_token_id(model.config) is not None and "input_features" in takes:
        yield "audio: il.audio selects its tokens; no site inside the audio tower, edit the stream"


def _looking(model: PreTrainedModel, structure: Structure) -> list[str]:
    """The parts of the decoder that look at images by cross-attention."""
    decoder = model.get_submodule(structure.decoder)
    return [path for path, _ in decoder.named_modules() if path.endswith(".cross_attn")]


def _grid_rule(model: PreTrainedModel, structure: Structure) -> str:
    if resampled(model):
        return "none (learned queries look at the whole image)"
    if structure.image_token_id is None:
        return "none (text only)" if structure.vision is None else "none (no token shows an image)"
    if _looking(model, structure):
        return "none (images come by cross-attention)"
    vision = getattr(model.config, "vision_config", None)
    merge = getattr(vision, "spatial_merge_size", None) or getattr(
        model.config, "spatial_merge_size", None
    )
    if merge is not None and vision is not None:
        return f"patches of {vision.patch_size} px, merged {merge} x {merge}, row by row"
    return "square tiles, row by row"


def _by_kind(table: SiteTable) -> dict[str, str]:
    """One line per kind of missing site, not one per layer."""
    found: dict[str, tuple[str, int]] = {}
    for name, why in table.unavailable.items():
        parts = name.split(".")
        kind = ".".join("{i}" if part.isdigit() else part for part in parts)
        found[kind] = (why, found.get(kind, (why, 0))[1] + 1)
    return {f"{kind} (x{n})" if n > 1 else kind: why for kind, (why, n) in found.items()}
