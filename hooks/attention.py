"""The inside of attention: rotated queries and keys, scores and the pattern, made visible.

Fused kernels hold neither scores nor pattern. While something acts inside attention, the text model
runs on the attention function below, which transformers lets us register: hooks may replace what it
reads (queries after rotation, keys as the cache holds them), cut edges of its scores, or replace
its pattern before that meets the values.
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
SLOTS = ("rot_q", "rot_k", "scores", "pattern")  # what can be reached inside, in this order
Hook = Callable[[torch.Tensor], torch.Tensor]
# of keys or values (example, head, key, d_head) and the edges there are, (example, query, key):
# what else is read, and along which of them; None is nothing
ReadHook = Callable[[torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor] | None]
Inside = dict[str, Any]  # by slot: a Hook; at "read_k" and "read_v" a ReadHook

# Tensors that classes pass on to whatever attention function there is, and that say nothing of who
# sees whom beyond the mask.
_NOT_OF_ATTENTION = ("position_ids", "cache_position", "image_sizes", "logits_to_keep")

_ACTIVE: dict[int, Inside] = {}  # by id of the attention module


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
    indices: torch.Tensor | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention written out. The classes' own eager versions round to float32 also in float64,
    where a padded row's mask then overflows."""
    if s_aux is not None:
        raise SiteUnavailable(
            f"{type(module).__name__} has attention sinks, which hook_pattern and il.Knockout do "
            "not model; edit hook_z instead"
        )
    _check_known(module, kwargs)
    if indices is not None:
        attention_mask = _sparse(query, key, attention_mask, indices)
    hooks = _ACTIVE.get(id(module), {})
    query, key = _shown(hooks, "rot_q", query), _shown(hooks, "rot_k", key)
    repeats = query.shape[1] // key.shape[1]
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling

    def of_heads(held: torch.Tensor) -> torch.Tensor:
        return held.repeat_interleave(repeats, dim=1)

    def scored(keys: torch.Tensor) -> torch.Tensor:
        scores = query @ of_heads(keys).transpose(2, 3) * scale
        return scores if softcap is None else softcap * torch.tanh(scores / softcap)

    scores = scored(key)
    read = _read(hooks, "read_k", module, key, scores, attention_mask)
    if read is not None:
        scores = torch.where(read[1][:, None], scored(read[0]), scores)
    if attention_mask is not None:
        scores = scores + attention_mask
    scores = _shown(hooks, "scores", scores)
    precise = torch.promote_types(query.dtype, torch.float32)
    pattern = torch.softmax(scores, dim=-1, dtype=precise).to(query.dtype)
    pattern = nn.functional.dropout(pattern, p=dropout, training=module.training)
    pattern = _shown(hooks, "pattern", pattern)
    mixed = pattern @ of_heads(value)
    read = _read(hooks, "read_v", module, value, scores, attention_mask)
    if read is not None:
        mixed = mixed + pattern * read[1][:, None] @ of_heads(read[0] - value)
    return mixed.transpose(1, 2).contiguous(), pattern


def _check_known(module: nn.Module, given: Mapping[str, Any]) -> None:
    """Refuse what a class would have its attention use beyond queries, keys, values and a mask."""
    for name, value in given.items():
        if isinstance(value, torch.Tensor) and name not in _NOT_OF_ATTENTION:
            raise SiteUnavailable(
                f"{type(module).__name__} gives its attention the tensor {name!r}, which the "
                "attention written out here does not know, so that hook_pattern, hook_rot_q, "
                "hook_rot_k and il.Knockout would be of another; edit hook_z instead"
            )


def _sparse(
    query: torch.Tensor, key: torch.Tensor, mask: torch.Tensor | None, indices: torch.Tensor
) -> torch.Tensor:
    """The mask of sparse attention, from the keys (example, query, key number) that each query
    keeps; classes with an indexer write it into the mask for attention functions they know."""
    n_rows, n_queries, n_keys = len(indices), query.shape[2], key.shape[2]
    hidden = indices.new_ones(n_rows, n_queries, n_keys, dtype=torch.bool)
    hidden = hidden.scatter(-1, indices.long(), False)[:, None]
    mask = torch.zeros_like(hidden, dtype=query.dtype) if mask is None else mask
    return mask.masked_fill(hidden, torch.finfo(mask.dtype).min)


def _shown(hooks: Inside, slot: str, value: torch.Tensor) -> torch.Tensor:
    return hooks[slot](value) if slot in hooks else value


def _read(
    hooks: Inside,
    slot: str,
    module: nn.Module,
    held: torch.Tensor,
    scores: torch.Tensor,
    mask: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor] | None:
    """What else some queries read of the keys or values, and along which edges."""
    if slot not in hooks:
        return None
    if slot == "read_v" and getattr(module, "v_norm", None) is not None:
        raise SiteUnavailable(
            f"{type(module).__name__} normalises its values before they are cached, so that they "
            "are not those of hook_v; leave readers out"
        )
    n_rows, _, *edges = scores.shape
    if mask is None:
        visible = torch.ones(n_rows, *edges, dtype=torch.bool, device=scores.device)
    else:
        visible = (mask > torch.finfo(mask.dtype).min / 2).any(1).expand(n_rows, *edges)
    found: tuple[torch.Tensor, torch.Tensor] | None = hooks[slot](held, visible)
    return found


AttentionInterface.register(NAME, _pattern_attention)
AttentionMaskInterface.register(NAME, eager_mask)


@contextmanager
def inside(model: PreTrainedModel, hooks: Mapping[str, Inside]) -> Iterator[None]:
    """Show what is inside the attention modules at these paths to their hooks, for one forward.

    Args:
        hooks: by path, then by slot: "rot_q" and "rot_k" (example, head, position, d_head),
            "scores" and "pattern" (example, head, query, key); scores come masked; and "read_k" and
            "read_v", a `ReadHook` each.
    """
    if not hooks:
        yield
        return
    modules = {path: model.get_submodule(path) for path in hooks}
    # The mask is made by whoever holds the root config, the attention by whoever holds the text's.
    configs = {id(c): c for c in (model.config, *(m.config for m in modules.values()))}
    before = [(c, c._attn_implementation_internal) for c in configs.values()]
    _ACTIVE.update({id(modules[path]): slots for path, slots in hooks.items()})
    try:
        for config, _ in before:
            config._attn_implementation_internal = NAME
        yield
    finally:
        for config, implementation in before:
            config._attn_implementation_internal = implementation
        for module in modules.values():
            _ACTIVE.pop(id(module), None)
