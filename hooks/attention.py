"""Attention patterns as a readable, writable site, through a registered attention function.

Fused kernels never hold the pattern. While a pattern site is active, the text model runs on the
attention function below, whose pattern our hooks may replace before it meets the values.
"""

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.masking_utils import eager_mask

from imaginelens.hooks.errors import SiteUnavailable

NAME = "imaginelens_pattern"
PatternHook = Callable[[torch.Tensor], torch.Tensor]

_ACTIVE: dict[int, PatternHook] = {}  # by id of the attention module


def offers_pattern(attention: nn.Module) -> bool:
    """Whether this attention class asks the registry for its function, so that ours is used."""
    forward = inspect.unwrap(type(attention).forward)
    return "ALL_ATTENTION_FUNCTIONS" in forward.__code__.co_names


def _pattern_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention written out. The classes' own eager versions round to float32 also in float64,
    where a padded row's mask then overflows."""
    if s_aux is not None:
        raise SiteUnavailable(
            f"{type(module).__name__} has attention sinks, which hook_pattern does not model; "
            "edit hook_z instead"
        )
    repeats = query.shape[1] // key.shape[1]
    keys, values = (t.repeat_interleave(repeats, dim=1) for t in (key, value))
    scores = (
        query @ keys.transpose(2, 3) * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    )
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    if attention_mask is not None:
        scores = scores + attention_mask
    precise = torch.promote_types(query.dtype, torch.float32)
    pattern = torch.softmax(scores, dim=-1, dtype=precise).to(query.dtype)
    pattern = nn.functional.dropout(pattern, p=dropout, training=module.training)
    hook = _ACTIVE.get(id(module))
    if hook is not None:
        pattern = hook(pattern)
    return (pattern @ values).transpose(1, 2).contiguous(), pattern


AttentionInterface.register(NAME, _pattern_attention)
AttentionMaskInterface.register(NAME, eager_mask)


@contextmanager
def patterns(model: PreTrainedModel, hooks: Mapping[str, PatternHook]) -> Iterator[None]:
    """Show the attention pattern of the modules at these paths to their hooks, for one forward."""
    if not hooks:
        yield
        return
    modules = {path: model.get_submodule(path) for path in hooks}
    # The mask is made by whoever holds the root config, the attention by whoever holds the text's.
    configs = {id(c): c for c in (model.config, *(m.config for m in modules.values()))}
    before = [(c, c._attn_implementation_internal) for c in configs.values()]
    _ACTIVE.update({id(modules[path]): hook for path, hook in hooks.items()})
    try:
        for config, _ in before:
            config._attn_implementation_internal = NAME
        yield
    finally:
        for config, implementation in before:
            config._attn_implementation_internal = implementation
        for module in modules.values():
            _ACTIVE.pop(id(module), None)
