"""The latent-reasoning families this library knows: one entry each."""

from dataclasses import replace
from typing import Any

from imaginelens.hooks.spec import LatentSpec

# Mirage-style checkpoints share their strings, so `family_of` needs more than one token to agree.
FAMILIES: dict[str, LatentSpec] = {
    "organism": LatentSpec(
        name="organism",
        open="<|latent_start|>",
        close="<|latent_end|>",
        pad="<|latent_pad|>",
        max_steps=2,
        fixed=True,
        config_keys={
            "open": "latent_start_id",
            "close": "latent_end_id",
            "pad": "latent_token_id",
        },
    ),
    "mirage": LatentSpec(
        name="mirage",
        open="<|latent_start|>",
        close="<|latent_end|>",
        pad="<|latent_pad|>",
        max_steps=8,
        config_keys={
            "open": "latent_start_id",
            "close": "latent_end_id",
            "pad": "latent_token_id",
        },
    ),
}


def family_of(config: Any, tokenizer: Any) -> LatentSpec | None:
    """Recognise a checkpoint's family; None is a model without latent tokens.

    A config that names its family (`imaginelens_family`) is believed; otherwise all three span
    strings of a family must be in the tokenizer.
    """
    named = getattr(config, "imaginelens_family", None)
    if named in FAMILIES:
        spec = FAMILIES[named]
        steps = getattr(config, "latent_steps", None)
        return spec if steps is None else replace(spec, max_steps=int(steps))
    vocabulary = {} if tokenizer is None else tokenizer.get_vocab()
    for name, spec in FAMILIES.items():
        if name != "organism" and all(t in vocabulary for t in (spec.open, spec.close, spec.pad)):
            return spec
    return None
