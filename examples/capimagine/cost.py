"""What a training would take: parameters, memory of each GPU, tokens and compute. Nothing is run.

The model is built on the meta device, which has shapes and no memory. What the backward pass needs
is counted as the forward pass saves it; weights, gradients and optimizer states follow from how an
engine shares them out. Not counted: fragments, communication buffers, and the frozen vision tower's
working memory, which is let go at once. Leave 15% free.
"""

from __future__ import annotations

import argparse
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForImageTextToText, PreTrainedConfig, PreTrainedModel

from examples.capimagine.chains import load
from examples.capimagine.train import ADAPTED, accumulation, source_of
from examples.capimagine.training_data import Collator, dataset, direct, unopened
from imaginelens.hooks.processors import load_processor

CONFIGS = Path(__file__).parent / "configs"
SHIPPED = {"Qwen/Qwen2.5-VL-7B-Instruct": CONFIGS / "qwen2_5_vl_7b.json"}
TEXT = 500  # tokens of question and reply, where no chains are given: an assumption
LOGITS = 256  # tokens whose logits TRL has at once
PACE = 125e12  # operations a second: 40% of an A800's peak in bfloat16, an assumption
GIB = 2**30


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """Numbers of parameters, and bytes that the backward pass needs for one batch of a GPU."""

    all: int
    tower: int
    layers: int  # of the language model, together
    depth: int
    adapters: int
    ends: int  # embeddings and output head
    saved: int  # without checkpointing
    checkpointed: int


@dataclass(frozen=True, kw_only=True)
class Memory:
    """Bytes on each GPU."""

    engine: str
    weights: float
    gradients: float
    optimizer: float
    activations: float

    @property
    def total(self) -> float:
        return self.weights + self.gradients + self.optimizer + self.activations


def read_config(model: str) -> PreTrainedConfig:
    """The config of a model: numbers in a JSON file, a folder, an organism, or of the Hub."""
    path = SHIPPED.get(model, Path(model))
    if path.suffix == ".json":
        numbers = json.loads(path.read_text())
        return AutoConfig.for_model(numbers.pop("model_type"), **numbers)
    return AutoConfig.from_pretrained(source_of(model))


def measure(config: PreTrainedConfig, *, rows: int, tokens: int, rank: int) -> Sizes:
    """Build the model without memory and count; `rows` of `tokens` are what a GPU sees at once."""
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(config, dtype=torch.bfloat16)
    decoder = model.base_model.language_model
    adapted = [m for name, m in model.named_modules() if re.fullmatch(ADAPTED, name)]
    assert adapted, "the language model has no projections to adapt"
    held = saved_bytes(model, rows=rows, tokens=tokens)
    width, depth = config.get_text_config().hidden_size, len(decoder.layers)
    return Sizes(
        all=_count(model),
        tower=_count(model.base_model.visual),
        layers=_count(decoder.layers),
        depth=depth,
        adapters=rank * sum(sum(module.weight.shape) for module in adapted),
        ends=_count(model) - _count(model.base_model.visual) - _count(decoder.layers),
        saved=held,
        # the input of every layer, and what one layer saves while it is run again
        checkpointed=2 * depth * rows * tokens * width + held // depth,
    )


def _count(module: torch.nn.Module) -> int:
    return sum(weight.numel() for weight in module.parameters())


def saved_bytes(model: PreTrainedModel, *, rows: int, tokens: int) -> int:
    """Bytes that the language model's forward pass keeps for the backward pass, weights aside.

    Attention patterns (token x token) are left out, since fused attention keeps none.
    """
    decoder = model.base_model.language_model
    width = model.config.get_text_config().hidden_size
    weight = next(decoder.parameters())
    own = {w.untyped_storage()._cdata for w in model.parameters()}
    kept: dict[int, Any] = {}  # holds the storages, so that no address comes twice

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in own and tensor.shape[-2:] != (tokens, tokens):
            kept[storage._cdata] = storage
        return tensor

    inputs = torch.empty(rows, tokens, width, dtype=weight.dtype, device=weight.device)
    places = torch.zeros(3, rows, tokens, dtype=torch.long, device=weight.device)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        decoder(inputs_embeds=inputs.requires_grad_(), position_ids=places, use_cache=False)
    return sum(storage.nbytes() for storage in kept.values())


def memory(
    sizes: Sizes, config: PreTrainedConfig, *, gpus: int, checkpointing: bool
) -> list[Memory]:
    """What each engine puts on each of the GPUs; the vision tower is frozen in all."""
    trained = sizes.all - sizes.tower
    layer = sizes.layers // sizes.depth
    logits = 2 * 4 * LOGITS * config.get_text_config().vocab_size
    held = (sizes.checkpointed if checkpointing else sizes.saved) + logits
    return [
        Memory(  # all in bfloat16 on every GPU; gradients and float32 states are shared out
            engine="ZeRO-2",
            weights=2 * sizes.all,
            gradients=2 * trained / gpus,
            optimizer=12 * trained / gpus,
            activations=held,
        ),
        Memory(  # float32 shared out; two layers and the ends are gathered in bfloat16
            engine="FSDP2",
            weights=4 * sizes.all / gpus + 2 * (2 * layer + sizes.ends),
            gradients=4 * trained / gpus,
            optimizer=8 * trained / gpus,
            activations=held,
        ),
        Memory(  # the model in bfloat16, frozen; adapters in float32, all on every GPU
            engine="LoRA",
            weights=2 * sizes.all + 4 * sizes.adapters,
            gradients=4 * sizes.adapters,
            optimizer=8 * sizes.adapters,
            activations=held,
        ),
    ]


def sample_lengths(options: argparse.Namespace) -> tuple[float, int, str]:
    """Mean and longest length of a sample in tokens, and where the numbers are from."""
    if options.data is None:
        tokens = options.per_sample + TEXT
        return tokens, tokens, f"assumed: {options.per_sample} of pictures and {TEXT} of text"
    chains = load(options.data)[:64]
    processor = load_processor(source_of(options.model))
    collate = Collator(
        processor=processor, per_picture=options.per_picture, per_sample=options.per_sample
    )
    rows = unopened(dataset([direct(c) if options.direct else c for c in chains]))
    lengths = [int(collate([row])["input_ids"].shape[1]) for row in rows]
    return sum(lengths) / len(lengths), max(lengths), f"of the first {len(lengths)} chains"


def describe(options: argparse.Namespace) -> str:
    """What the options of a training would take, as text."""
    config = read_config(options.model)
    mean, longest, whence = sample_lengths(options)
    rank = options.lora or 64
    sizes = measure(config, rows=options.per_device, tokens=longest, rank=rank)
    share = accumulation(batch=options.batch, per_device=options.per_device, processes=options.gpus)
    tokens = options.batch * mean
    unit, name = (GIB, "GiB") if sizes.all > 1e9 else (2**20, "MiB")
    lines = [
        f"{options.model}: {sizes.all:,} parameters, {sizes.tower:,} of them in the vision tower, "
        f"which is frozen; LoRA of rank {rank} trains {sizes.adapters:,}",
        f"global batch {options.batch} = {options.gpus} GPUs x {options.per_device} x {share} "
        f"accumulated; {mean:,.0f} tokens a sample, {longest:,} at most ({whence}): "
        f"{tokens:,.0f} tokens per update",
        f"memory of each of {options.gpus} GPUs in {name}, an estimate; leave 15% free:",
        f"{'':8}{'weights':>9}{'gradients':>11}{'optimizer':>11}{'activations':>13}{'total':>8}"
        f"{'without checkpointing':>24}",
    ]
    both = [memory(sizes, config, gpus=options.gpus, checkpointing=on) for on in (True, False)]
    for kept, free in zip(*both, strict=True):
        lines.append(
            f"{kept.engine:8}{kept.weights / unit:9.1f}{kept.gradients / unit:11.1f}"
            f"{kept.optimizer / unit:11.1f}{kept.activations / unit:13.1f}{kept.total / unit:8.1f}"
            f"{free.total / unit:24.1f}"
        )
    # forward 2, backward 4 (2 where weights are frozen), forward again 2, per weight and token
    passes = (4 if options.lora else 6) + 2 * options.checkpointing
    work = tokens * (passes * sizes.layers + 4 * 2 * sizes.tower)  # four patches to a visual token
    hours = work / PACE / options.gpus / 3600
    lines.append(
        f"{work / 1e15:,.0f} PFLOP per update, at most; {hours * 60:.1f} minutes at "
        f"{PACE / 1e12:.0f} TFLOP/s a GPU (an assumption: 40% of an A800)"
    )
    updates = options.updates or options.epochs * _records(options) / options.batch
    lines.append(f"{updates:,.0f} updates: {updates * hours:,.1f} hours on {options.gpus} GPUs")
    return "\n".join(lines)


def _records(options: argparse.Namespace) -> int:
    """Chains to train on; the paper's 17k where none are given."""
    return len(load(options.data)) if options.data else 17_000
