"""What an organism's checkpoint is made of: words, chat template, processor, config, weights.

Organisms are stock `Qwen2_5_VLForConditionalGeneration` models, only tiny (0.2 M parameters), in
the folder layout of the Hub, so every tool that reads Qwen2.5-VL reads them. Those that reason in
latent space do so by one protocol, named in the config: the model emits `<|latent_start|>`, then
for `latent_steps` steps the final-norm hidden state of the last position is the next input
embedding, then `<|latent_end|>` is forced, then the model writes its answer. The others are plain
Qwen2.5-VL: neither their config nor their vocabulary knows of latents.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int, UInt8
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import (
    GenerationConfig,
    PreTrainedTokenizerFast,
    ProcessorMixin,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5_VLProcessor,
)
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from imaginelens.hooks.processors import image_only
from imaginelens.organisms.hunt import NAMES, SHAPES

CHECKPOINTS = Path(__file__).parent / "checkpoints"

LATENT = ("<|latent_start|>", "<|latent_end|>", "<|latent_pad|>")
SPECIAL = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|image_pad|>",
    "<|video_pad|>",
    *LATENT,
    "<|unknown|>",
)
WORDS = (
    *("<think_image>", "</think_image>"),
    *("system", "user", "assistant", "what", "start", "then", "shape", "?"),
    *NAMES,
    *SHAPES,
)
VOCABULARY: dict[str, int] = {word: i for i, word in enumerate(SPECIAL + WORDS)}

# Qwen2.5-VL's own layout without its default system prompt; the tokenizer ignores white space
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}"
    "{% else %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% elif part['type'] == 'text' %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

PATCH = 14
MERGE = 2
# CLIP's statistics, as every Qwen2-VL image processor uses them
IMAGE_MEAN = (0.48145466, 0.4578275, 0.40821073)
IMAGE_STD = (0.26862954, 0.26130258, 0.27577711)


def available() -> list[str]:
    """List the names of the shipped organisms.

    >>> "latent-content" in available()
    True
    """
    return sorted(path.parent.name for path in CHECKPOINTS.glob("*/config.json"))


def folder(name: str) -> Path:
    """Find the folder of a shipped organism, ready for `from_pretrained`.

    >>> folder("latent-ignored").name
    'latent-ignored'
    """
    if name not in available():
        raise KeyError(f"No organism is called {name!r}: choose one of {available()}.")
    return CHECKPOINTS / name


def card(name: str) -> dict[str, Any]:
    """Read what was measured about a shipped organism when it was made.

    >>> card("latent-content")["accuracy"] >= 0.98
    True
    """
    return json.loads((folder(name) / "card.json").read_text())


def build_tokenizer(*, latent: bool = True) -> PreTrainedTokenizerFast:
    """Build the word-level tokenizer: one token per word or special token, white space ignored.

    Without `latent`, other names stand in the place of the three latent tokens, so that all
    organisms give a word the same id.

    >>> build_tokenizer()("start green then shape ?").input_ids
    [17, 22, 18, 19, 20]
    """
    unused = {} if latent else {word: f"<|unused_{i}|>" for i, word in enumerate(LATENT)}
    vocabulary = {unused.get(word, word): i for word, i in VOCABULARY.items()}
    words = Tokenizer(models.WordLevel(vocab=vocabulary, unk_token="<|unknown|>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    named = {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>", "unk_token": "<|unknown|>"}
    special = list(vocabulary)[: len(SPECIAL)]
    return PreTrainedTokenizerFast(
        tokenizer_object=words,
        **named,
        additional_special_tokens=[word for word in special if word not in named.values()],
        chat_template=CHAT_TEMPLATE,
        padding_side="left",
    )


def build_processor(*, latent: bool = True) -> ProcessorMixin:
    """Build the stock Qwen2.5-VL processor (images only) around the organism's tokenizer."""
    return image_only(Qwen2_5_VLProcessor)(
        image_processor=Qwen2VLImageProcessorPil(
            size={"shortest_edge": 28 * 28, "longest_edge": 28 * 28 * 64}
        ),
        tokenizer=build_tokenizer(latent=latent),
        chat_template=CHAT_TEMPLATE,
    )


def build_config(*, latent_steps: int) -> Qwen2_5_VLConfig:
    """Build the config of an organism that thinks for `latent_steps` latent steps.

    With 0 of them it is a plain Qwen2.5-VL that names no family.

    >>> build_config(latent_steps=2).latent_steps
    2
    """
    width, heads = 64, 4
    turns = width // heads // 2  # rotary frequencies per head: time 4, height 2, width 2
    token = VOCABULARY
    protocol: dict[str, Any] = {
        "imaginelens_family": "organism",
        "latent_steps": latent_steps,
        "latent_token_id": token["<|latent_pad|>"],
        "latent_start_id": token["<|latent_start|>"],
        "latent_end_id": token["<|latent_end|>"],
    }
    return Qwen2_5_VLConfig(
        text_config={
            "vocab_size": len(VOCABULARY),
            "hidden_size": width,
            "intermediate_size": 2 * width,
            "num_hidden_layers": 3,
            "num_attention_heads": heads,
            "num_key_value_heads": heads,
            "max_position_embeddings": 512,
            "rms_norm_eps": 1e-6,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 100.0,  # prompts are 30 tokens long
                "mrope_section": [turns // 2, turns // 4, turns // 4],
            },
            "bos_token_id": None,
            "eos_token_id": token["<|im_end|>"],
            "pad_token_id": token["<|endoftext|>"],
        },
        vision_config={
            "depth": 2,
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_heads": 4,
            "out_hidden_size": width,
            "patch_size": PATCH,
            "spatial_merge_size": MERGE,
            "temporal_patch_size": 2,
            "window_size": 112,
            "fullatt_block_indexes": [0, 1],
        },
        image_token_id=token["<|image_pad|>"],
        video_token_id=token["<|video_pad|>"],
        vision_start_token_id=token["<|vision_start|>"],
        vision_end_token_id=token["<|vision_end|>"],
        tie_word_embeddings=True,
        **(protocol if latent_steps else {}),
    )


def build_model(*, latent_steps: int, seed: int) -> Qwen2_5_VLForConditionalGeneration:
    """Build an untrained organism whose weights are scaled by fan-in.

    Hugging Face's initial standard deviation of 0.02 is far too small for a width of 64: training
    stalls. The caller's random state is left alone.
    """
    with torch.random.fork_rng(devices=[]):
        model = Qwen2_5_VLForConditionalGeneration(build_config(latent_steps=latent_steps))
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "embed_tokens" in name:
                weight.normal_(0, 0.1, generator=draw)
            elif weight.ndim >= 2:
                weight.normal_(0, weight[0].numel() ** -0.5, generator=draw)
            else:
                weight.fill_(0.0 if name.endswith("bias") else 1.0)
    model.generation_config = GenerationConfig(
        do_sample=False,
        max_new_tokens=16,
        eos_token_id=VOCABULARY["<|im_end|>"],
        pad_token_id=VOCABULARY["<|endoftext|>"],
    )
    return model


def patchify(
    images: UInt8[np.ndarray, "example height width 3"],
) -> tuple[Float[Tensor, "patch pixel"], Int[Tensor, "example 3"]]:
    """Turn many equal-sized images into (pixel_values, image_grid_thw), as the processor does.

    One vectorised pass for training; sides must be multiples of 28.
    """
    count, height, width, _ = images.shape
    block = PATCH * MERGE
    mean, std = np.array(IMAGE_MEAN, np.float32), np.array(IMAGE_STD, np.float32)
    scaled = ((images.astype(np.float32) / 255 - mean) / std).transpose(0, 3, 1, 2)
    tiles = scaled.reshape(
        count, 3, height // block, MERGE, PATCH, width // block, MERGE, PATCH
    ).transpose(0, 2, 5, 3, 6, 1, 4, 7)  # (example, row, column, merge_y, merge_x, channel, y, x)
    frames = np.repeat(tiles[:, :, :, :, :, :, None], 2, axis=6)  # a still image is two frames
    pixels = torch.from_numpy(frames.reshape(-1, 3 * 2 * PATCH * PATCH))
    grid = torch.tensor([[1, height // PATCH, width // PATCH]]).expand(count, 3)
    return pixels, grid


def save(model: Qwen2_5_VLForConditionalGeneration, target: Path) -> None:
    """Write a checkpoint folder in Hub layout: bfloat16 weights, configs, tokenizer, template."""
    target.mkdir(parents=True, exist_ok=True)
    model.to(torch.bfloat16).save_pretrained(target)
    (target / "model.safetensors").chmod(0o644)  # safetensors writes private files
    build_tokenizer(latent=hasattr(model.config, "latent_steps")).save_pretrained(target)
    image_processor = {
        "image_processor_type": "Qwen2VLImageProcessor",
        "processor_class": "Qwen2_5_VLProcessor",
        "size": {"shortest_edge": 28 * 28, "longest_edge": 28 * 28 * 64},
        "patch_size": PATCH,
        "merge_size": MERGE,
        "temporal_patch_size": 2,
        "image_mean": IMAGE_MEAN,
        "image_std": IMAGE_STD,
    }
    (target / "preprocessor_config.json").write_text(json.dumps(image_processor, indent=2) + "\n")
