"""Tiny random multimodal models of the stock transformers classes, each with its own image path.

Every family of the registry as a model of 2-3 layers with a processor and a byte-level tokenizer,
made from nothing (no network, no torchvision) in well under a second. Weights are random but
loud: every bias, norm weight and image cell matters, so that a test which edits the wrong thing
fails. For models whose *mechanism* is known use `planted.py` instead.

>>> model, processor = build("qwen2_5_vl")
>>> batch = inputs("qwen2_5_vl", processor, ["red?"], [image(40, 24, seed=0)], torch.float64)
>>> tuple(model(**batch).logits.shape[:2]) == tuple(batch["input_ids"].shape)
True
"""

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from typing import Any
from unittest import mock

import numpy as np
import torch
import transformers as hf
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerFast, ProcessorMixin

LATENT = ("<|latent_start|>", "<|latent_end|>", "<|latent_pad|>")
CELL = 8  # pixels along one side of what one image token sees, before any resizing
Built = tuple[PreTrainedModel, ProcessorMixin]


# --- parts every family shares ------------------------------------------------------------------


def tokenizer(*special: str, bos: bool, **roles: str) -> PreTrainedTokenizerFast:
    """One token per byte plus special tokens: any text round-trips. Pads on the left.

    `roles` are special tokens that a processor asks for by name (`tokenizer.boi_token`).
    """
    special = (*LATENT, *special)
    names = ["<pad>", "<bos>", "<eos>", *special, *roles.values()]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(models.BPE({c: i for i, c in enumerate(names + alphabet)}, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens(names)
    if bos:
        core.post_processor = processors.TemplateProcessing("<bos> $A", None, [("<bos>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token="<pad>",
        bos_token="<bos>",
        eos_token="<eos>",
        extra_special_tokens=list(special),
        model_specific_special_tokens=roles,
        padding_side="left",
    )


def text_config(tok: PreTrainedTokenizerFast, **fields: Any) -> dict[str, Any]:
    """The decoder's config: 3 layers, hidden 64, 4 query heads on 2 key/value heads."""
    return {
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": len(tok),
        "max_position_embeddings": 2048,
        "bos_token_id": tok.bos_token_id,
        "eos_token_id": tok.eos_token_id,
        "pad_token_id": tok.pad_token_id,
        **fields,
    }


def vision_config(**fields: Any) -> dict[str, Any]:
    """The vision tower's config: 2 blocks, hidden 32, 2 heads."""
    return {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        **fields,
    }


def no_video(cls: type[ProcessorMixin]) -> type[ProcessorMixin]:
    """`cls` without its video processor, which cannot be made without torchvision."""

    class ImageOnly(cls):  # a processor asks for those parts that its __init__ names
        def __init__(self, image_processor, tokenizer, **options):
            super().__init__(image_processor, tokenizer, video_processor=None, **options)

    ImageOnly.__name__ = cls.__name__
    return ImageOnly


def pixtral_processor() -> type[ProcessorMixin]:
    """`PixtralProcessor`. Its module imports a helper from the torchvision image processor; the
    Pillow one has the same helper and takes its place during the import."""
    package = "transformers.models.pixtral"
    wanted = f"{package}.image_processing_pixtral"
    if f"{package}.processing_pixtral" not in sys.modules:
        sys.modules[wanted] = import_module(f"{package}.image_processing_pil_pixtral")
        try:
            import_module(f"{package}.processing_pixtral")
        finally:
            del sys.modules[wanted]
    return sys.modules[f"{package}.processing_pixtral"].PixtralProcessor


# --- families -----------------------------------------------------------------------------------


def _qwen(config: Any, model: Any, processor: Any, vision: dict[str, Any], **text: Any) -> Built:
    marks = ("<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")
    tok = tokenizer(*marks, bos=False)
    start, end, image_pad, video_pad = tok.convert_tokens_to_ids(list(marks))
    built = model(
        config(
            text_config=text_config(tok, **text),
            vision_config=dict(patch_size=CELL // 2, spatial_merge_size=2, num_heads=2, **vision),
            image_token_id=image_pad,
            video_token_id=video_pad,
            vision_start_token_id=start,
            vision_end_token_id=end,
            tie_word_embeddings=False,
        )
    )
    pixels = hf.Qwen2VLImageProcessorPil(
        patch_size=CELL // 2, size={"shortest_edge": 4 * CELL**2, "longest_edge": 64 * CELL**2}
    )
    return built, no_video(processor)(pixels, tok)


def _mrope(*sections: int, **fields: Any) -> dict[str, Any]:
    return {
        "rope_type": "default",
        "rope_theta": 10_000.0,
        "mrope_section": list(sections),
        **fields,
    }


def qwen2_vl() -> Built:
    return _qwen(
        hf.Qwen2VLConfig,
        hf.Qwen2VLForConditionalGeneration,
        hf.Qwen2VLProcessor,
        {"depth": 2, "embed_dim": 32, "hidden_size": 64, "mlp_ratio": 2},
        rope_parameters=_mrope(2, 3, 3),
    )


def qwen2_5_vl() -> Built:
    return _qwen(
        hf.Qwen2_5_VLConfig,
        hf.Qwen2_5_VLForConditionalGeneration,
        hf.Qwen2_5_VLProcessor,
        {
            "depth": 2,
            "hidden_size": 32,
            "intermediate_size": 48,
            "out_hidden_size": 64,
            "window_size": 2 * CELL,
            "fullatt_block_indexes": [1],
        },
        rope_parameters=_mrope(2, 3, 3),
    )


def qwen3_vl() -> Built:
    return _qwen(
        hf.Qwen3VLConfig,
        hf.Qwen3VLForConditionalGeneration,
        hf.Qwen3VLProcessor,
        {
            "depth": 3,
            "hidden_size": 32,
            "intermediate_size": 48,
            "out_hidden_size": 64,
            "num_position_embeddings": 64,
            "deepstack_visual_indexes": [0, 1],
        },
        rope_parameters=_mrope(4, 4, 4, mrope_interleaved=True),
        head_dim=24,
    )


def llava() -> Built:
    tok = tokenizer("<image>", bos=True)
    config = hf.LlavaConfig(
        text_config=text_config(tok, model_type="llama"),
        vision_config=vision_config(
            model_type="clip_vision_model", num_hidden_layers=3, image_size=32, patch_size=CELL
        ),
        image_token_index=tok.convert_tokens_to_ids("<image>"),
        image_seq_length=16,
    )
    pixels = hf.CLIPImageProcessorPil(
        size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}
    )
    processor = hf.LlavaProcessor(
        pixels,
        tok,
        patch_size=CELL,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
    )
    return hf.LlavaForConditionalGeneration(config), processor


def llava_onevision() -> Built:
    tok = tokenizer("<image>", "<video>", bos=False)
    pinpoints = [[24, 24], [24, 48], [48, 24], [48, 48]]  # (height, width) of tilings, in pixels
    config = hf.LlavaOnevisionConfig(
        text_config=text_config(tok, model_type="qwen2"),
        vision_config=vision_config(
            model_type="siglip_vision_model", image_size=24, patch_size=CELL, vision_use_head=False
        ),
        image_token_index=tok.convert_tokens_to_ids("<image>"),
        video_token_index=tok.convert_tokens_to_ids("<video>"),
        image_grid_pinpoints=pinpoints,
        tie_word_embeddings=False,
    )
    pixels = hf.LlavaOnevisionImageProcessorPil(
        size={"height": 24, "width": 24}, image_grid_pinpoints=pinpoints
    )
    processor = no_video(hf.LlavaOnevisionProcessor)(
        pixels, tok, num_image_tokens=9, vision_feature_select_strategy="full"
    )
    return hf.LlavaOnevisionForConditionalGeneration(config), processor


def internvl() -> Built:
    tok = tokenizer(
        bos=False,
        start_image_token="<img>",
        end_image_token="</img>",
        context_image_token="<IMG_CONTEXT>",
        video_token="<video>",
    )
    config = hf.InternVLConfig(
        text_config=text_config(tok, model_type="qwen2"),
        vision_config=vision_config(
            model_type="internvl_vision", image_size=[24, 24], patch_size=[4, 4]
        ),
        image_token_id=tok.context_image_token_id,
        image_seq_length=9,
        tie_word_embeddings=False,
    )
    pixels = hf.GotOcr2ImageProcessorPil(size={"height": 24, "width": 24}, max_patches=4)
    processor = no_video(hf.InternVLProcessor)(pixels, tok, image_seq_length=9)
    return hf.InternVLForConditionalGeneration(config), processor


def gemma3() -> Built:
    tok = tokenizer(
        bos=True,
        boi_token="<start_of_image>",
        eoi_token="<end_of_image>",
        image_token="<image_soft_token>",
    )
    config = hf.Gemma3Config(
        text_config=text_config(
            tok,
            head_dim=24,
            query_pre_attn_scalar=24,
            sliding_window=24,
            layer_types=["sliding_attention", "full_attention", "sliding_attention"],
        ),
        vision_config=vision_config(image_size=32, patch_size=4, vision_use_head=False),
        mm_tokens_per_image=16,
        boi_token_index=tok.boi_token_id,
        eoi_token_index=tok.eoi_token_id,
        image_token_index=tok.image_token_id,
    )
    pixels = hf.Gemma3ImageProcessorPil(size={"height": 32, "width": 32})
    processor = hf.Gemma3Processor(pixels, tok, image_seq_length=16)
    return hf.Gemma3ForConditionalGeneration(config), processor


def _idefics(config: Any, model: Any) -> tuple[PreTrainedModel, PreTrainedTokenizerFast]:
    tiles = [f"<row_{row}_col_{col}>" for row in (1, 2) for col in (1, 2)]
    marks = ("<image>", "<fake_token_around_image>", "<end_of_utterance>", "<global-img>")
    tok = tokenizer(*marks, *tiles, bos=True)
    built = model(
        config(
            text_config=text_config(tok, model_type="llama"),
            vision_config=vision_config(image_size=24, patch_size=4),
            image_token_id=tok.convert_tokens_to_ids("<image>"),
            scale_factor=2,
            pad_token_id=tok.pad_token_id,
            tie_word_embeddings=False,
        )
    )
    return built, tok


def idefics3() -> Built:
    model, tok = _idefics(hf.Idefics3Config, hf.Idefics3ForConditionalGeneration)
    pixels = hf.Idefics3ImageProcessorPil(
        size={"longest_edge": 48}, max_image_size={"longest_edge": 24}, do_image_splitting=True
    )
    return model, hf.Idefics3Processor(pixels, tok, image_seq_len=9)


def smolvlm() -> Built:
    model, tok = _idefics(hf.SmolVLMConfig, hf.SmolVLMForConditionalGeneration)
    pixels = hf.SmolVLMImageProcessorPil(
        size={"longest_edge": 24}, max_image_size={"longest_edge": 24}, do_image_splitting=False
    )
    source = import_module("transformers.models.smolvlm.processing_smolvlm")
    with mock.patch.object(source, "num2words", str):  # demanded, but only videos are put in words
        processor = no_video(hf.SmolVLMProcessor)(pixels, tok, image_seq_len=9)
    return model, processor


def paligemma() -> Built:
    tok = tokenizer("<image>", bos=False)  # the processor itself writes <bos> after the image
    pixels = hf.SiglipImageProcessorPil(size={"height": 32, "width": 32}, image_seq_length=16)
    processor = hf.PaliGemmaProcessor(pixels, tok)  # adds 1152 location and segment tokens
    config = hf.PaliGemmaConfig(
        text_config=text_config(tok, model_type="gemma", head_dim=16),
        vision_config=vision_config(
            model_type="siglip_vision_model",
            image_size=32,
            patch_size=CELL,
            projection_dim=64,
            vision_use_head=False,
        ),
        image_token_index=processor.image_token_id,
        projection_dim=64,
        hidden_size=64,
    )
    return hf.PaliGemmaForConditionalGeneration(config), processor


def mistral3() -> Built:
    tok = tokenizer("[IMG]", "[IMG_BREAK]", "[IMG_END]", bos=True)
    config = hf.Mistral3Config(
        text_config=text_config(tok, model_type="mistral", sliding_window=None, head_dim=16),
        vision_config=vision_config(model_type="pixtral", image_size=64, patch_size=4, head_dim=16),
        image_token_index=tok.convert_tokens_to_ids("[IMG]"),
        tie_word_embeddings=False,
        spatial_merge_size=2,
        vision_feature_layer=-1,
    )
    pixels = hf.PixtralImageProcessorPil(
        size={"longest_edge": 64}, patch_size={"height": 4, "width": 4}
    )
    processor = pixtral_processor()(pixels, tok, patch_size=4, spatial_merge_size=2)
    return hf.Mistral3ForConditionalGeneration(config), processor


FAMILIES: dict[str, Callable[[], Built]] = {
    "qwen2_vl": qwen2_vl,
    "qwen2_5_vl": qwen2_5_vl,
    "qwen3_vl": qwen3_vl,
    "llava": llava,
    "llava_onevision": llava_onevision,
    "internvl": internvl,
    "gemma3": gemma3,
    "idefics3": idefics3,
    "smolvlm": smolvlm,
    "paligemma": paligemma,
    "mistral3": mistral3,
}


# --- building -----------------------------------------------------------------------------------


@torch.no_grad()
def randomize(model: PreTrainedModel, seed: int) -> None:
    """Draws every parameter anew, ten times as large as the stock initialisation: the last token
    depends on every image cell, and norm weights and biases differ from their neutral 1 and 0."""
    generator = torch.Generator().manual_seed(seed)
    head, embedding = model.get_output_embeddings().weight, model.get_input_embeddings().weight
    seen = set()
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            if parameter in seen:
                continue
            seen.add(parameter)
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            if parameter.ndim == 1:
                parameter += 0.1 * noise
            elif isinstance(module, nn.Embedding) and head is not embedding:
                parameter.copy_(0.5 * noise)
            else:  # a tied embedding has to serve as the head too
                gain = 0.5 if parameter is embedding else 1.5
                parameter.copy_(gain * parameter[0].numel() ** -0.5 * noise)
    # a generated image token would be taken for a missing image: keep its logit near zero
    head[model.config.image_token_id] *= 0.01


def fresh(name: str, *, dtype: torch.dtype = torch.float64, seed: int = 0) -> Built:
    """A new model of the family, in eval mode and decoding greedily, and its processor."""
    with torch.random.fork_rng():  # vectors (a class token, a newline) keep part of their start
        torch.manual_seed(seed)
        model, processor = FAMILIES[name]()
    model = model.to(torch.float64)
    randomize(model, seed)
    ids = processor.tokenizer
    model.generation_config = hf.GenerationConfig(
        do_sample=False, eos_token_id=ids.eos_token_id, pad_token_id=ids.pad_token_id
    )
    return model.to(dtype).eval(), processor


def build(name: str, *, dtype: torch.dtype = torch.float64, seed: int = 0) -> Built:
    """As `fresh`, but the same objects each time: for tests that leave the model as it was."""
    return _cached(name, dtype, seed)


@cache
def _cached(name: str, dtype: torch.dtype, seed: int) -> Built:
    return fresh(name, dtype=dtype, seed=seed)


# --- inputs -------------------------------------------------------------------------------------

PROMPT = {  # {text} is the user's; PaliGemma wants its image first
    **dict.fromkeys(
        ("qwen2_vl", "qwen2_5_vl", "qwen3_vl"),
        "look: <|vision_start|><|image_pad|><|vision_end|>{text}",
    ),
    **dict.fromkeys(("llava", "llava_onevision", "idefics3", "smolvlm"), "look: <image>\n{text}"),
    "internvl": "look: <IMG_CONTEXT>\n{text}",
    "gemma3": "look: <start_of_image>{text}",
    "paligemma": "<image>{text}",
    "mistral3": "look: [IMG]{text}",
}


def image(width: int, height: int, seed: int) -> Image.Image:
    """A picture of smooth random blobs: each cell differs, and resizing keeps the content."""
    rng = np.random.default_rng(seed)
    blobs = rng.integers(0, 256, (max(1, height // CELL), max(1, width // CELL), 3), np.uint8)
    return Image.fromarray(blobs).resize((width, height), Image.Resampling.NEAREST)


def prompt(name: str, text: str) -> str:
    """`text` after one image, as the family's processor expects it."""
    return PROMPT[name].format(text=text)


def inputs(
    name: str,
    processor: ProcessorMixin,
    texts: Sequence[str],
    images: Sequence[Image.Image],
    dtype: torch.dtype = torch.float64,
) -> dict[str, torch.Tensor]:
    """Everything the processor returns for rows of one text and one image, padded on the left."""
    batch = processor(
        text=[prompt(name, text) for text in texts],
        images=[[picture] for picture in images],
        padding=True,
        return_tensors="pt",
    )
    return {
        key: value.to(dtype) if value.is_floating_point() else value for key, value in batch.items()
    }


def positions(model: PreTrainedModel, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """The `position_ids` with which `generate` runs these rows: padding does not count.

    Without them a plain forward numbers left padding too, and since rotary angles are rounded to
    float32 a padded row then differs by 1e-7 from the same row alone.
    Shape: (3, example, position) for families with 3-D positions, else (example, position).
    """
    if hasattr(model.model, "get_rope_index"):  # pure, unlike the forward that stores rope_deltas
        wanted = ("input_ids", "attention_mask", "mm_token_type_ids", "image_grid_thw")
        return model.model.get_rope_index(**{name: batch[name] for name in wanted})[0]
    counted = (batch["attention_mask"].cumsum(-1) - 1).clamp(min=0)
    return counted + 1 if model.config.model_type == "paligemma" else counted


def teacher_forced(
    model: PreTrainedModel, batch: dict[str, torch.Tensor], generated_ids: torch.Tensor
) -> torch.Tensor:
    """One forward over prompt and generated tokens: the logits that chose each generated token.

    Shape: (example, generated token, vocab). Equal to the incremental logits but for their last
    bits; what `generate(output_logits=True)` returns is those rounded to float32.
    """
    text = torch.zeros_like(generated_ids)
    causal = torch.ones_like(generated_ids)
    suffix = {
        "input_ids": generated_ids,
        "attention_mask": causal,
        "mm_token_type_ids": text,
        # PaliGemma's 0 is the prefix, which sees both ways; Gemma3's 1 is the inside of an image
        "token_type_ids": causal if model.config.model_type == "paligemma" else text,
    }
    whole = {name: value for name, value in batch.items() if name != "labels"}
    for name in suffix.keys() & whole.keys():
        whole[name] = torch.cat([whole[name], suffix[name]], dim=1)
    logits = model(**whole, position_ids=positions(model, whole), use_cache=False).logits
    return logits[:, -generated_ids.shape[1] - 1 : -1]


# --- where image tokens lie ---------------------------------------------------------------------


@dataclass(frozen=True)
class Tile:
    """Consecutive image tokens of one picture, row by row.

    `box` is the part of the picture they show as fractions (left, top, right, bottom); it may
    reach over the edge into padding. `end` is what closes each row: "" nothing; "newline" one
    more image token, a learned vector; "break" a token that is not an image token.
    """

    rows: int
    cols: int
    box: tuple[float, float, float, float] = (0.0, 0.0, 1.0, 1.0)
    end: str = ""

    @property
    def tokens(self) -> int:
        """How many image tokens the tile takes."""
        return self.rows * (self.cols + (self.end == "newline"))


def _tiling(rows: int, cols: int, side: int) -> tuple[Tile, ...]:
    """`rows` x `cols` tiles of `side` x `side` tokens, then the whole picture once more."""
    boxes = [
        (col / cols, row / rows, (col + 1) / cols, (row + 1) / rows)
        for row in range(rows)
        for col in range(cols)
    ]
    return (*(Tile(side, side, box) for box in boxes), Tile(side, side))


def _qwen_grid(width: int, height: int) -> tuple[Tile, ...]:
    """Each side is rounded to whole cells (half to even), as long as 4 to 64 cells result."""
    rows, cols = round(height / CELL), round(width / CELL)
    if not 4 <= rows * cols <= 64:
        raise ValueError(f"{width} x {height} gives {rows} x {cols} cells: 4 to 64 are kept as is")
    return (Tile(rows, cols),)


def _llava_grid(width: int, height: int) -> tuple[Tile, ...]:
    """The shorter side fills the tile; of the longer one the middle is kept."""
    side = min(width, height)
    left, top = (width - side) / 2 / width, (height - side) / 2 / height
    return (Tile(4, 4, (left, top, 1 - left, 1 - top)),)


def _onevision_grid(width: int, height: int) -> tuple[Tile, ...]:
    """The whole picture squashed to 3 x 3, then the picture on the best-fitting canvas of 1 or 2
    tiles each way, padding rows or columns cut off, each row closed by a newline vector."""

    def fit(canvas: tuple[int, int]) -> tuple[int, int]:
        scale = min(canvas[0] / width, canvas[1] / height)
        used = min(int(width * scale) * int(height * scale), width * height)
        return used, -(canvas[0] * canvas[1] - used)

    canvas_w, canvas_h = max([(24, 24), (48, 24), (24, 48), (48, 48)], key=fit)
    scale = min(canvas_w / width, canvas_h / height)
    shown_w = min(-int(-width * scale // 1), canvas_w)
    shown_h = min(-int(-height * scale // 1), canvas_h)
    cols, rows = canvas_w // CELL, canvas_h // CELL
    cut_cols = cut_rows = 0
    if width / height > cols / rows:
        cut_rows = (rows - int(round(height * cols / width, 7))) // 2
    else:
        cut_cols = (cols - int(round(width * rows / height, 7))) // 2
    left = (cut_cols * CELL - (canvas_w - shown_w) // 2) / shown_w
    top = (cut_rows * CELL - (canvas_h - shown_h) // 2) / shown_h
    rows, cols = rows - 2 * cut_rows, cols - 2 * cut_cols
    box = (left, top, left + cols * CELL / shown_w, top + rows * CELL / shown_h)
    return (Tile(3, 3), Tile(rows, cols, box, end="newline"))


def _internvl_grid(width: int, height: int) -> tuple[Tile, ...]:
    """Up to 4 tiles in the arrangement closest in shape (of equals the largest, if the picture
    has over half its pixels), then the whole picture; a single tile is not repeated."""
    arrangements = [(1, 1), (1, 2), (2, 1), (1, 3), (3, 1), (1, 4), (2, 2), (4, 1)]  # cols, rows

    def miss(arrangement: tuple[int, int]) -> float:
        return abs(width / height - arrangement[0] / arrangement[1])

    best = min(arrangements, key=miss)  # the first, so the smallest, of equals
    for other in arrangements:
        big_enough = width * height > 0.5 * 24 * 24 * other[0] * other[1]
        if miss(other) == miss(best) and big_enough:
            best = other
    cols, rows = best
    return (Tile(3, 3),) if rows * cols == 1 else _tiling(rows, cols, 3)


def _split_grid(width: int, height: int) -> tuple[Tile, ...]:
    """The longer side becomes two tiles, the shorter one or two; then the whole picture."""
    longer, shorter = max(width, height), min(width, height)
    other = int(48 * shorter / longer)
    other = 1 if other + other % 2 <= 24 else 2
    return _tiling(other, 2, 3) if width >= height else _tiling(2, other, 3)


def _mistral_grid(width: int, height: int) -> tuple[Tile, ...]:
    """Shrunk to fit 64 x 64 pixels, then filled up to whole cells; a break token after each row,
    an end token after the last."""
    shrink = max(width / 64, height / 64, 1.0)
    rows, cols = (-int(-int(side / shrink) // CELL) for side in (height, width))
    return (Tile(rows, cols, end="break"),)


GRID: dict[str, Callable[[int, int], tuple[Tile, ...]]] = {
    "qwen2_vl": _qwen_grid,
    "qwen2_5_vl": _qwen_grid,
    "qwen3_vl": _qwen_grid,
    "llava": _llava_grid,
    "llava_onevision": _onevision_grid,
    "internvl": _internvl_grid,
    "gemma3": lambda width, height: (Tile(4, 4),),
    "idefics3": _split_grid,
    "smolvlm": lambda width, height: (Tile(3, 3),),
    "paligemma": lambda width, height: (Tile(4, 4),),
    "mistral3": _mistral_grid,
}
