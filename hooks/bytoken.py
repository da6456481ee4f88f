"""What some classes must be given so that `generate` runs our loop, token by token."""

import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from imaginelens.hooks.behaviour import behind_padding
from imaginelens.hooks.errors import SiteUnavailable

_NONE = inspect.Parameter.empty


@contextmanager
def by_token(model: PreTrainedModel, inputs: Mapping[str, Any]) -> Iterator[None]:
    """Have `generate` continue token ids by our loop also where the class would not; afterwards the
    model is as it was.

    Args:
        inputs: the full dict of the processor.

    Raises:
        SiteUnavailable: the class is an encoder-decoder.
    """
    if model.config.is_encoder_decoder:
        raise SiteUnavailable(
            f"{type(model).__name__} is an encoder-decoder: its decoder does not hold the prompt, "
            "so that no latent can be fed back behind it; read it with lens.run_with_cache(inputs)"
        )
    with _counting_from(model, behind_padding(model)):
        if model.main_input_name == "input_ids":
            yield
        else:
            with _given_its_pixels(model, inputs):
                yield


@contextmanager
def _counting_from(model: PreTrainedModel, first: int) -> Iterator[None]:
    """A class that counts positions from its padding id where it makes them (Kosmos), and there
    counts padding in the cache as well, is given those of its row."""
    if not first:
        yield
        return
    prepare = model.prepare_inputs_for_generation

    def counted(*args: Any, position_ids: torch.Tensor, **kwargs: Any) -> dict[str, Any]:
        given: dict[str, Any] = prepare(*args, position_ids=position_ids, **kwargs)
        own = position_ids[..., -given["input_ids"].shape[1] :]
        return {**given, "position_ids": own + first}

    instead: Any = counted
    model.prepare_inputs_for_generation = instead
    try:
        yield
    finally:
        del model.prepare_inputs_for_generation


@contextmanager
def _given_its_pixels(model: PreTrainedModel, inputs: Mapping[str, Any]) -> Iterator[None]:
    """A class that writes through its language model alone (BLIP-2, Kosmos-2): its own forward
    cannot be called without the pixels, not even for a token that is generated, and counts
    positions by the mask; so it is given both."""
    arguments = inspect.signature(model.forward).parameters
    needed = {n for n in arguments if arguments[n].default is _NONE} | {model.main_input_name}
    asked = {n: v for n, v in inputs.items() if n in needed}
    model.main_input_name, model.input_modalities = "input_ids", ("text",)

    def completed(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        given = {**asked, **kwargs}
        if given.get("attention_mask") is None:  # generate drops it where it is all 1
            cache, ids = given.get("past_key_values"), given["input_ids"]
            read = 0 if cache is None else cache.get_seq_length()
            given["attention_mask"] = ids.new_ones(len(ids), read + ids.shape[1])
        return args, given

    handle = model.register_forward_pre_hook(completed, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()
        del model.main_input_name, model.input_modalities
