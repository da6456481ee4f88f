"""Latent Sketchpad as a family: its entry, its head's weights, and what its pictures must be.

Read from hwanyu112/Latent-Sketchpad, model/uni_qwen.py (`_sample`, `perceiver_inference`) and
model/perceiver.py. No checkpoint of its language models is public, so that ids, config and weight
names are those that its code would save. Its Gemma 3 variant is not modelled.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch

from imaginelens.hooks.errors import CheckpointError, InputError
from imaginelens.hooks.sketchpad import HEAD, Cue, Sketcher, build_sketch_head
from imaginelens.hooks.spec import LatentSpec
from imaginelens.hooks.tokens import TokenMap


def _equip_sketchpad(
    spec: LatentSpec, config: Any, weights: Mapping[str, torch.Tensor]
) -> LatentSpec:
    """Latent Sketchpad with its vision head, without which there are no latents."""
    if spec.project is not None:
        return spec
    if not any(name.startswith(HEAD) for name in weights):
        raise CheckpointError(
            f"latent-sketchpad needs the weights {HEAD}* of its vision head, and the checkpoint "
            "holds none; open the folder that its training wrote with il.load, or pass "
            "spec=dataclasses.replace(il.FAMILIES['latent-sketchpad'], project=...)"
        )
    head = build_sketch_head(weights, config.vision_config.num_heads)
    return replace(spec, project=Sketcher(head))


def check_canvas(
    tokens: TokenMap, spec: LatentSpec | None, *, mrope: bool, forced: bool = False
) -> None:
    """Refuse prompts whose sketches would have no place: a sketch has the cells of the row's last
    picture, and as many of them as there are latents.

    Args:
        mrope: whether the model's tokens have several position axes.
        forced: whether the number of latents is the user's, who may draw a part of the cells.

    Raises:
        CheckpointError: the model has no positions on a grid.
        InputError: a row has no picture, or its last one has other cells.
    """
    if spec is None or not spec.on_grid:
        return
    if not mrope:
        raise CheckpointError(
            f"the latents of {spec.name} stand on a grid, and this model's positions have one axis "
            "only; use a Qwen2.5-VL"
        )
    for row, grids in enumerate(tokens.grids):
        cells = grids[-1].rows * grids[-1].cols if grids else 0
        if not grids or (cells != spec.max_steps and not (forced and spec.max_steps < cells)):
            shown = f"shows its last picture in {cells} cells" if grids else "shows no picture"
            raise InputError(
                f"row {row} {shown}, and {spec.name} draws {spec.max_steps} latents on the grid of "
                "the last picture; give a picture of as many cells (256 are 448 x 448 pixels), or "
                "set .with_steps(n)"
            )


SKETCH_FAMILIES: dict[str, LatentSpec] = {
    # The release opens a span three places behind token 522 (two are sampled, the third is forced),
    # or where the open token is sampled; nothing that is sampled inside ends it. A latent is drawn
    # by the head from all pictures and all states of the span, and goes through the model's own
    # merger; it stands on the grid of the last picture. Released at batch size one.
    "latent-sketchpad": LatentSpec(
        name="latent-sketchpad",
        open="<|vision_start|>",
        close="<|vision_end|>",
        pad="<|image_pad|>",
        config_keys={
            "open": "vision_start_token_id",
            "close": "vision_end_token_id",
            "pad": "image_token_id",
        },
        max_steps=256,
        fixed=True,
        cue=Cue(token=522, after=3),
        on_grid=True,
        extras=(HEAD,),
        equip=_equip_sketchpad,
    ),
}
