"""A batch several times over in one script, each copy to be edited elsewhere."""

from dataclasses import replace
from typing import Any

import torch

from imaginelens.hooks import LatentModel
from imaginelens.hooks.prefix import picked_tokens
from imaginelens.hooks.prompts import ROW_FIELDS
from imaginelens.hooks.script import Script

# What is known to hold one example, or the patches of one, behind the other.
_PACKED = {
    "pixel_values", "image_grid_thw", "image_sizes", "pixel_attention_mask", "batch_num_images",
    "use_cache",
}  # fmt: skip


def may_repeat(lens: LatentModel, script: Script) -> bool:
    """Whether copies of a script's rows in one forward are read as the rows are."""
    registry = lens.registry
    known = all(name in ROW_FIELDS or name in _PACKED for name in script.inputs)
    # a hook of the user's own, and noise that is drawn for a batch, are about these rows alone
    return known and not registry.entries and registry.depth is None


def tiled(script: Script, times: int) -> Script:
    """All rows, then all rows again, `times` times; a picture for each copy."""
    rows = [*range(len(script.tokens))] * times
    return replace(
        script,
        inputs={name: _again(name, value, times) for name, value in script.inputs.items()},
        tokens=picked_tokens(script.tokens, rows),
        laid=script.laid[rows],
        embeds=script.embeds[rows],
        read_at=script.read_at * times,
    )


def _again(name: str, value: Any, times: int) -> Any:
    if not isinstance(value, torch.Tensor):
        return value
    # positions on several axes have those axes before the rows
    axis = value.dim() - 2 if name == "position_ids" else 0
    return torch.cat([value] * times, dim=axis)
