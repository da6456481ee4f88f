"""Opening a model to teach it a latent span, and writing it where `il.load` finds it again."""

from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

import imaginelens as il
from imaginelens.hooks import LatentModel
from imaginelens.hooks.processors import load_processor
from imaginelens.organisms import checkpoint

FAMILY = "organism"  # always `latent_steps` latents, and then the close marker


def open_to_train(name: str | Path, *, steps: int, dtype: torch.dtype) -> LatentModel:
    """Open a shipped organism, a local folder or a Hub id as a model that has a latent span.

    One that has none is given the organisms' protocol: three new tokens, or the three that the
    organisms without latents hold free for them, and `latent_steps` in its config. Its weights stay
    as they are, its vision tower is frozen.

    Args:
        steps: latents of a span; a model that has a family already keeps the family, not its steps.

    >>> open_to_train("base", steps=2, dtype=torch.float32).spec.max_steps
    2
    """
    shipped = str(name) in checkpoint.available()
    folder = checkpoint.folder(str(name)) if shipped else name
    lens = il.load(folder, dtype=dtype, spec=None)
    model, processor = lens.model, lens.processor
    if lens.spec is None and _is_organism(lens):
        model = _with_latents(model, steps)
        processor = checkpoint.build_processor()
    elif lens.spec is None:
        _add_tokens(model, processor)
    if lens.spec is None or lens.spec.name == FAMILY:
        _name_protocol(model, processor.tokenizer, steps)
    if hasattr(model.model, "visual"):
        model.model.visual.requires_grad_(False)
    return LatentModel(model.train(), processor)


def _is_organism(lens: LatentModel) -> bool:
    """Whether its words are the organisms', with three of them free."""
    theirs = checkpoint.build_tokenizer(latent=False).get_vocab()
    return bool(lens.tokenizer.get_vocab() == theirs)


def _with_latents(plain: PreTrainedModel, steps: int) -> PreTrainedModel:
    """The same weights under the config of an organism that thinks in latents."""
    model = checkpoint.build_model(latent_steps=steps, seed=0).to(plain.dtype)
    model.load_state_dict(plain.state_dict())
    return model


def _add_tokens(model: PreTrainedModel, processor: Any) -> None:
    """Give a model and its tokenizer the three tokens, and as many rows as they need."""
    tokenizer = processor.tokenizer
    tokenizer.add_tokens(list(checkpoint.LATENT), special_tokens=True)
    # never fewer rows: released checkpoints have more rows than their tokenizers have tokens
    if len(tokenizer) > len(model.get_input_embeddings().weight):
        model.resize_token_embeddings(len(tokenizer))


def _name_protocol(model: PreTrainedModel, tokenizer: Any, steps: int) -> None:
    opened, closed, pad = tokenizer.convert_tokens_to_ids(list(checkpoint.LATENT))
    model.config.imaginelens_family = FAMILY
    model.config.latent_steps = steps
    model.config.latent_start_id, model.config.latent_end_id = opened, closed
    model.config.latent_token_id = pad


def write(lens: LatentModel, target: Path) -> None:
    """Write a folder that `il.load` opens: weights as they were trained, configs, processor."""
    lens.model.save_pretrained(target)
    lens.processor.save_pretrained(target)
    load_processor(target)  # a folder whose processor cannot be read is no use to anyone
