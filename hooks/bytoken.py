"""What some classes must be given so that `generate` runs our loop, token by token."""

import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

from torch import nn
from transformers import PreTrainedModel

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
    with _told_of_its_kind(model):
        if model.main_input_name == "input_ids":
            yield
        else:
            with _given_its_pixels(model, inputs):
                yield


@contextmanager
def _told_of_its_kind(model: PreTrainedModel) -> Iterator[None]:
    """Mllama asks, for every token, whether it is an encoder-decoder; others have a default."""
    update = model._update_model_kwargs_for_generation
    asks = inspect.signature(update).parameters.get("is_encoder_decoder")
    if asks is None or asks.default is not _NONE:
        yield
        return
    told: Any = partial(update, is_encoder_decoder=False)
    model._update_model_kwargs_for_generation = told
    try:
        yield
    finally:
        del model._update_model_kwargs_for_generation


@contextmanager
def _given_its_pixels(model: PreTrainedModel, inputs: Mapping[str, Any]) -> Iterator[None]:
    """A class that writes through its language model alone (BLIP-2): its own forward cannot be
    called without the pixels, not even for a token that is generated, and counts positions by the
    mask; so it is given both."""
    arguments = inspect.signature(model.forward).parameters
    asked = {n: v for n, v in inputs.items() if n in arguments and arguments[n].default is _NONE}
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
