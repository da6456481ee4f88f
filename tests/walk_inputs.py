"""Inputs for a model nobody wrote a processor for: pixels as its `forward` asks for them.

Ways to pack an image are told apart by the names of the forward's arguments, not by the model. The
number of image tokens is what `get_image_features` returns, or what the model's own error says.
"""

import inspect
import itertools
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedConfig, PreTrainedModel
from walk_shrink import IMAGE, PATCH

Inputs = dict[str, torch.Tensor]
ROWS = ("input_ids", "attention_mask", "mm_token_type_ids", "token_type_ids")
# beside the ids, what has one entry per token
ALONG_ROW = (*ROWS, "cross_attention_mask", "image_attention_mask", "image_embeds_position_mask")
SIZE_FIELDS = ("image_grid_thw", "image_grid_hw", "spatial_shapes", "target_sizes")
FRAMES = 2  # of a video, as the tower counts them
TEXT = ((111, 127, 135, 144, 152), (163, 119, 133))  # before and after the image


@dataclass(frozen=True)
class Geometry:
    """How the vision tower cuts a picture."""

    patch: int
    merge: int
    frames: int
    channels: int
    side: int
    tiles: int


def found_image_inputs(
    model: PreTrainedModel, seed: int, *, rows: int = 2, cols: int = 3
) -> tuple[Inputs, list[str]]:
    """One prompt with one image that the model accepts, and why other ways were refused.

    Args:
        rows, cols: merged patches of the image, where the model takes any number.
    """
    refused = []
    for way, pixels in _ways(model, seed, (rows, cols)):
        try:
            inputs = _with_tokens(model, pixels)
            with torch.no_grad():
                model(**inputs, use_cache=False)
        except Exception as error:  # whatever a model raises on pixels it does not take
            refused.append(f"{way}: {type(error).__name__}: {str(error).splitlines()[0][:160]}")
        else:
            return inputs, refused
    if not refused:
        raise ValueError("its forward takes no pixels")
    raise ValueError(f"none of {len(refused)} ways to pack an image is taken; {refused[0]}")


def found_video_inputs(model: PreTrainedModel, seed: int) -> Inputs:
    """One prompt with one video that the model accepts and looks at: its tokens in one piece, or
    frame by frame.

    Raises:
        ValueError: no way to pack a video is taken.
    """
    refused = []
    for pixels in _video_ways(model, seed):
        for token, split in itertools.product(_video_tokens(model.config), (False, True)):
            try:
                inputs = _video_prompt(model, pixels, token, split=split)
                other = other_pixel(inputs, "pixel_values_videos", by=10.0)
                with torch.no_grad():
                    seen, changed = (model(**x, use_cache=False).logits for x in (inputs, other))
            except Exception as error:  # whatever a model raises on pixels it does not take
                refused.append(f"{type(error).__name__}: {str(error).splitlines()[0][:160]}")
            else:
                if not torch.equal(seen, changed):
                    return inputs
                refused.append("one changed pixel of a video does not change the logits")
    raise ValueError(f"none of {len(refused)} ways to pack a video is taken; {refused[0]}")


def text_inputs(model: PreTrainedModel, seed: int = 0, n: int = 12) -> Inputs:
    """One prompt without an image."""
    ids = torch.randint(100, 200, (1, n), generator=torch.Generator().manual_seed(seed))
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    names = inspect.signature(model.forward).parameters
    for name in ("mm_token_type_ids", "token_type_ids"):
        if name in names:
            inputs[name] = torch.zeros_like(ids)
    return inputs


def stacked(rows: list[Inputs]) -> Inputs:
    """A batch of prompts, padded on the left, their pixels one behind the other."""
    width = max(row["input_ids"].shape[1] for row in rows)
    batch: Inputs = {}
    for name in rows[0]:
        parts = [row[name] for row in rows]
        if name in ALONG_ROW:
            parts = [_padded(part, width) for part in parts]
        # a strip of patches goes on along its length, and pooling counts patches over the batch
        if name == "image_token_pooling":
            n = rows[0]["pixel_values"].shape[:2].numel()
            batch[name] = torch.cat([part + i * n for i, part in enumerate(parts)])
        elif name == "pixel_values" and "target_sizes" in rows[0]:
            batch[name] = torch.cat(parts, dim=-1)
        else:
            batch[name] = torch.cat(parts)
    return batch


def side_by_side(one: Inputs, two: Inputs) -> Inputs:
    """One prompt with the images of two, one behind the other."""
    joined = stacked([one, two])
    for name in ALONG_ROW:
        if name in one:
            joined[name] = torch.cat([one[name], two[name]], dim=1)
    return joined


def lengthened(inputs: Inputs, n: int) -> Inputs:
    """The same prompt with `n` more tokens of text behind it."""
    longer = dict(inputs)
    for name in ALONG_ROW:
        if name in inputs:
            row = inputs[name]
            new = row[:, -1:].repeat(1, n, *[1] * (row.dim() - 2))
            longer[name] = torch.cat([row, new], dim=1)
    longer["input_ids"][:, -n:] = torch.arange(171, 171 + n)
    return longer


def _padded(part: torch.Tensor, width: int) -> torch.Tensor:
    blank = part.new_zeros(len(part), width - part.shape[1], *part.shape[2:])
    return torch.cat([blank, part], dim=1)


def other_pixel(inputs: Inputs, name: str, *, by: float) -> Inputs:
    """The inputs with one number of one pixel changed."""
    pixels = inputs[name].clone()
    flat = pixels.view(-1)
    flat[flat.numel() // 3] += by
    return {**inputs, name: pixels}


def pixel_name(inputs: Mapping[str, Any]) -> str | None:
    """The field of the inputs that holds pixels."""
    names = ("pixel_values", "image_pixel_values", "pixel_values_images", "flattened_patches")
    names += ("image_patches",)
    return next((n for n in names if n in inputs), None)


# ---- geometry --------------------------------------------------------------------------------


def geometry(config: PreTrainedConfig) -> Geometry:
    """What the config says of patches, merging, channels and the size of an image."""
    return Geometry(
        patch=_number(config, ("patch_size",), PATCH),
        merge=_number(
            config,
            (
                "spatial_merge_size",
                "merge_size",
                "merge_kernel_size",
                "downsample_factor",
                "pool_size",
            ),
            1,
        ),
        frames=_number(config, ("temporal_patch_size", "patch_temporal"), 1),
        channels=_number(config, ("num_channels", "in_channels"), 3),
        side=_number(config, ("image_size", "img_size", "resolution"), IMAGE),
        tiles=_number(config, ("max_num_tiles",), 1),
    )


def _number(config: PreTrainedConfig, names: tuple[str, ...], default: int) -> int:
    for part in _parts(config):
        for name in names:
            value = vars(part).get(name)
            value = value[0] if isinstance(value, list | tuple) and value else value
            if isinstance(value, int) and value > 0:
                return value
    return default


def _parts(config: PreTrainedConfig) -> Iterator[PreTrainedConfig]:
    """The vision config and what lies in it, then the model's own, never the text's."""
    inner = [(k, v) for k, v in vars(config).items() if isinstance(v, PreTrainedConfig)]
    for name, part in sorted(inner, key=lambda kv: "vision" not in kv[0]):
        if not any(word in name for word in ("text", "audio", "decoder", "speech", "talker")):
            yield from _parts(part)
    yield config


# ---- ways to pack an image -------------------------------------------------------------------


def _ways(
    model: PreTrainedModel, seed: int, shape: tuple[int, int]
) -> Iterator[tuple[str, Inputs]]:
    names = set(inspect.signature(model.forward).parameters)
    names |= set(inspect.signature(model.base_model.forward).parameters)
    g = geometry(model.config)
    dtype = next(model.parameters()).dtype
    generator = torch.Generator().manual_seed(seed)

    def pixels(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    rows, cols = (side * g.merge for side in shape)
    n, depth = rows * cols, g.channels * g.patch**2
    grid = torch.tensor([[1, rows, cols]])
    square, size = pixels(1, g.channels, g.side, g.side), torch.tensor([[g.side, g.side]])
    if "image_grid_thw" in names:
        for frames in (g.frames, 1):
            packed = {"pixel_values": pixels(n, depth * frames), "image_grid_thw": grid}
            yield "packed patches", packed
            cubes = pixels(n, g.channels, g.patch, g.patch)
            yield "patches as squares", {"pixel_values": cubes, "image_grid_thw": grid}
        yield (
            "nested squares",
            {
                "pixel_values": pixels(1, n, g.channels, g.patch, g.patch),
                "image_grid_thw": grid,
            },
        )
        merged = grid // torch.tensor([1, g.merge, g.merge])
        wide = pixels(n // g.merge**2, g.patch * g.merge, g.patch * g.merge, g.channels)
        yield "merged squares", {"pixel_values": wide, "image_grid_thw": merged}
        yield "merged squares", {"pixel_values": wide, "image_grid_thw": grid}
        yield "patches as flat rows", {"pixel_values": pixels(1, n, depth), "image_grid_thw": grid}
        if "image_merge_sizes" in names:
            merges = torch.tensor([g.merge])
            yield "packed, merged", {**packed, "image_merge_sizes": merges}
    if "image_grid_hw" in names:
        hw = torch.tensor([[2 * rows, 2 * cols]])
        packed = pixels(4 * n, depth)
        yield "packed patches, hw", {"pixel_values": packed, "image_grid_hw": hw}
    if "spatial_shapes" in names:
        yield (
            "patches with shapes",
            {
                "pixel_values": pixels(1, n, depth),
                "spatial_shapes": torch.tensor([[rows, cols]]),
                "pixel_attention_mask": torch.ones(1, n, dtype=torch.long),
            },
        )
    if "target_sizes" in names:
        for k in (4, 8):
            strip = pixels(1, g.channels, g.patch, g.patch * k * k)
            sizes = {"target_sizes": torch.tensor([[k, k]])}
            yield "strip of patches", {"pixel_values": strip, **sizes}
    if "image_position_ids" in names:
        for patch in (g.patch, 3 * g.patch):
            yield "patches with places", _placed(pixels, 6, 6, g.channels * patch**2)
    if "image_token_pooling" in names:
        yield from _pooled(pixels, g)
    if "tile_fine_mask" in names:
        real = torch.ones(1, 1, dtype=torch.bool)
        yield "masked tiles", {"pixel_values": square[:, None], "pixel_attention_mask": real}
    if "image_attention_mask" in names and "image_encoder_embeddings" in names:
        yield "images beside the text", {"pixel_values": square[:, None]}
    if "image_embeds_position_mask" in names and "pixel_values" in names:
        yield "image in a mask", {"pixel_values": square}
    if "tile_fine_mask" in names or "pixel_attention_mask" in names:
        yield "images in a row", {"pixel_values": square[:, None]}
    if "aspect_ratio_ids" in names:
        yield "tiles by aspect", _by_aspect(pixels, g)
    if "flattened_patches" in names:
        yield from _flattened(pixels, depth)
    if "image_pixel_values" in names:
        yield (
            "crops",
            {
                "image_pixel_values": pixels(1, 2, g.channels, g.side, g.side),
                "image_sizes": size,
                "image_attention_mask": torch.ones(1, 2, g.side // g.patch, g.side // g.patch),
            },
        )
    if "high_res_pixel_values" in names:
        for high in (4 * g.side, 2 * g.side, g.side):
            more = pixels(1, g.channels, high, high)
            yield "two resolutions", {"pixel_values": square, "high_res_pixel_values": more}
    if "image_patches" in names:
        yield "linear patches", {"image_patches": pixels(1, 6, depth)}
    if "pixel_values_images" in names:
        yield "one image", {"pixel_values_images": square}
    if "pixel_values" in names and "qformer_input_ids" in names:
        q = torch.randint(3, 100, (1, 4), generator=generator)
        asked = {"qformer_input_ids": q, "qformer_attention_mask": torch.ones_like(q)}
        yield "image with question", {"pixel_values": square, **asked}
        yield "video with question", {"pixel_values": square[:, None], **asked}
    if "pixel_values" in names:
        if "image_sizes" in names:
            yield "image with size", {"pixel_values": square, "image_sizes": size}
            tiles = pixels(1, 5, g.channels, g.side, g.side)
            yield "tiles with size", {"pixel_values": tiles, "image_sizes": 2 * size}
            tiles = pixels(1, 2, g.channels, g.side, g.side)
            yield "two tiles with size", {"pixel_values": tiles, "image_sizes": size}
        yield "one image", {"pixel_values": square}
        yield "images in a row", {"pixel_values": square[:, None]}
        cubes = pixels(6, g.frames, g.patch, g.patch, g.channels)
        yield "cubes of pixels", {"pixel_values": cubes}
        if "pixel_mask" in names:
            mask = torch.ones(1, g.side, g.side, dtype=torch.long)
            yield "image with mask", {"pixel_values": square, "pixel_mask": mask}
        for side in (8 * g.patch, 16 * g.patch, 64, 128, 192, 256):
            yield f"image of {side}", {"pixel_values": pixels(1, g.channels, side, side)}


def _video_ways(model: PreTrainedModel, seed: int) -> Iterator[Inputs]:
    names = set(inspect.signature(model.forward).parameters)
    g = geometry(model.config)
    generator = torch.Generator().manual_seed(seed)

    def pixels(*shape: int) -> torch.Tensor:
        drawn = torch.randn(*shape, generator=generator, dtype=torch.float64)
        return drawn.to(next(model.parameters()).dtype)

    rows, cols = 2 * g.merge, 3 * g.merge
    n, depth = FRAMES * rows * cols, g.channels * g.patch**2
    if "video_grid_thw" in names:
        for frames in (g.frames, 1):
            packed = {"pixel_values_videos": pixels(n, depth * frames)}
            packed["video_grid_thw"] = torch.tensor([[FRAMES, rows, cols]])
            if "video_merge_sizes" in names:
                packed["video_merge_sizes"] = torch.tensor([g.merge])
                packed["video_compression_mask"] = torch.ones(n // g.merge**2, dtype=torch.bool)
            yield packed
    for frames in (FRAMES, 8):
        yield {"pixel_values_videos": pixels(1, frames, g.channels, g.side, g.side)}


def _video_tokens(config: PreTrainedConfig) -> list[int]:
    found = (getattr(config, name, None) for name in ("video_token_id", "video_token_index"))
    tokens = dict.fromkeys((*found, image_token(config)))
    return [token for token in tokens if token is not None]


def _video_prompt(model: PreTrainedModel, pixels: Inputs, token: int, *, split: bool) -> Inputs:
    def prompt(n: int) -> Inputs:
        shown = [token] * n
        if split:
            shown = [c for t in range(FRAMES) for c in (*[token] * (n // FRAMES), 140 + t)]
        ids = torch.tensor([[*TEXT[0], *shown, *TEXT[1]]])
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), **pixels}
        for name in ("mm_token_type_ids", "token_type_ids"):
            if name in inspect.signature(model.forward).parameters:
                inputs[name] = 2 * (ids == token).long()
        return inputs

    n = _count(model, pixels, "get_video_features")
    if n is None:
        n = _complained(model, prompt(1))
    return prompt(1 if n is None else n)


def _placed(pixels: Any, rows: int, cols: int, depth: int) -> Inputs:
    y, x = torch.meshgrid(torch.arange(rows), torch.arange(cols), indexing="ij")
    places = torch.stack([x.flatten(), y.flatten()], dim=-1)[None]
    return {"pixel_values": pixels(1, rows * cols, depth), "image_position_ids": places}


def _pooled(pixels: Any, g: Geometry) -> Iterator[tuple[str, Inputs]]:
    side = g.side // g.patch
    index = torch.arange(side * side).view(side // 2, 2, side // 2, 2).transpose(1, 2)
    yield (
        "pooled patches",
        {
            "pixel_values": pixels(1, side * side, g.channels * g.patch**2),
            "image_token_pooling": index.reshape(-1, 4),
            "image_grids": torch.tensor([[side // 2, side // 2, 0, 0]]),
            "image_num_crops": torch.tensor([1]),
        },
    )


def _by_aspect(pixels: Any, g: Geometry) -> Inputs:
    return {
        "pixel_values": pixels(1, 1, g.tiles, g.channels, g.side, g.side),
        "aspect_ratio_ids": torch.tensor([[1]]),
        "aspect_ratio_mask": torch.tensor([[[1] + [0] * (g.tiles - 1)]]),
    }


def _flattened(pixels: Any, depth: int) -> Iterator[tuple[str, Inputs]]:
    places = torch.stack([torch.arange(6) // 3 + 1, torch.arange(6) % 3 + 1], dim=-1)
    flat = torch.cat([places[None].to(pixels(1)), pixels(1, 6, depth)], dim=-1)
    yield "flat patches", {"flattened_patches": flat}


# ---- tokens ----------------------------------------------------------------------------------


def _with_tokens(model: PreTrainedModel, pixels: Inputs) -> Inputs:
    """Ids with as many image tokens as the pixels become."""
    n = _count(model, pixels)
    inputs = _prompt(model, pixels, 1 if n is None else n)
    if n is None:
        n = _complained(model, inputs)
        inputs = _prompt(model, pixels, 1 if n is None else n)
    return inputs


def image_token(config: PreTrainedConfig) -> int | None:
    """The id of the token that image features are written over."""
    for part in (config, getattr(config, "vision_config", None)):
        for name in (
            "image_token_id",
            "image_token_index",
            "media_placeholder_token_id",
            "video_token_index",
        ):
            value = getattr(part, name, None)
            if isinstance(value, int):
                return value
    return None


def _count(
    model: PreTrainedModel, pixels: Inputs, accessor: str = "get_image_features"
) -> int | None:
    extract = getattr(model, accessor, None)
    if extract is None:
        extract = getattr(model.base_model, accessor, None)
    if extract is None:
        return None
    taken = inspect.signature(extract).parameters
    free = any(p.kind is p.VAR_KEYWORD for p in taken.values())
    kwargs = {k: v for k, v in pixels.items() if free or k in taken}
    try:
        with torch.no_grad():
            found = extract(**kwargs)
    except TypeError:  # it asks for what forward works out
        return None
    found = getattr(found, "pooler_output", found)
    if isinstance(found, list | tuple):
        found = torch.cat([f.reshape(-1, f.shape[-1]) for f in found])
    if not isinstance(found, torch.Tensor):
        return None
    return found.numel() // found.shape[-1]


def _complained(model: PreTrainedModel, inputs: Inputs) -> int | None:
    """How many image tokens the model says it wants, if it complains about one."""
    try:
        with torch.no_grad():
            model(**inputs, use_cache=False)
    except Exception as error:  # its sentence has both numbers
        said = re.findall(
            r"features:? *(?:torch\.Size\(\[)?(\d+)|tensor of shape \[(\d+)", str(error)
        )
        return next((int(n) for pair in said for n in pair if n), None)
    return None


def _prompt(model: PreTrainedModel, pixels: Inputs, n: int) -> Inputs:
    token = image_token(model.config)
    shown = [] if token is None else [token] * n
    ids = torch.tensor([[*TEXT[0], *shown, *TEXT[1]]])
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), **pixels}
    names = set(inspect.signature(model.forward).parameters)
    is_image = (ids == token).long() if token is not None else torch.zeros_like(ids)
    if token is None and "image_embeds_position_mask" in names:  # any ids under a mask
        n = _number(model.config, ("latent_query_num",), 1)
        ids = torch.tensor([[*TEXT[0], *range(100, 100 + n), *TEXT[1]]])
        is_image = torch.zeros_like(ids)
        is_image[:, len(TEXT[0]) : len(TEXT[0]) + n] = 1
        inputs |= {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if "mm_token_type_ids" in names:
        inputs["mm_token_type_ids"] = is_image
    if "token_type_ids" in names:
        inputs["token_type_ids"] = is_image
    if "image_embeds_position_mask" in names:
        inputs["image_embeds_position_mask"] = is_image
    if "image_attention_mask" in names and "pixel_values" in pixels:
        inputs["image_attention_mask"] = torch.ones(1, ids.shape[1], 1, dtype=torch.long)
    if model.config.is_encoder_decoder and "decoder_input_ids" in names:
        inputs["decoder_input_ids"] = ids[:, :3]
    if "cross_attention_mask" in names and "aspect_ratio_mask" in pixels:
        tiles = pixels["aspect_ratio_mask"].shape[-1]
        inputs["cross_attention_mask"] = torch.ones(1, ids.shape[1], 1, tiles, dtype=torch.long)
    return inputs
