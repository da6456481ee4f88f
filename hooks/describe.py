"""What a model is to this library: printed by `lens.describe()`."""

from dataclasses import dataclass

from transformers import PreTrainedModel

from imaginelens.hooks.sites import SiteTable
from imaginelens.hooks.spec import LatentSpec
from imaginelens.hooks.structure import Structure
from imaginelens.hooks.textspans import TextSpec


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
    unsupported: dict[str, str]

    def __str__(self) -> str:
        lines = [
            f"{self.model} ({self.dtype}, attention {self.attention})",
            f"  latents    {self.family}",
            f"  decoder    {self.layers} layers, d_model {self.d_model}, {self.heads} heads",
            f"  vision     {self.vision_layers} layers, grid: {self.grid_rule}",
            f"  sites      {self.sites}",
        ]
        lines += [f"  missing    {name}: {why}" for name, why in self.unsupported.items()]
        return "\n".join(lines)

    __repr__ = __str__


def describe(
    model: PreTrainedModel,
    structure: Structure,
    table: SiteTable,
    spec: LatentSpec | TextSpec | None,
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
        unsupported=_by_kind(table),
    )


def _latents(spec: LatentSpec | TextSpec) -> str:
    if isinstance(spec, TextSpec):
        return f"none; {spec.name}: imagines in words, between {spec.open!r} and {spec.close!r}"
    steps = f"exactly {spec.max_steps}" if spec.fixed else f"up to {spec.max_steps}"
    head = "" if spec.project is None else ", through an extra head"
    end = "" if spec.criterion is None else ", ended by a learned state"
    return (
        f"{spec.name}: {steps} steps, opened by {spec.open!r} ({spec.trigger}), slot {spec.slot}"
        f"{head}{end}"
    )


def _grid_rule(model: PreTrainedModel, structure: Structure) -> str:
    if structure.image_token_id is None:
        return "none (text only)"
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
