"""Reading and editing the same places with plain torch hooks: the judge of the engine.

Written from transformers' modelling files alone; nothing here is shared with the library.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

Act = torch.Tensor
Edit = Callable[[Act], Act]

LAYERS = {"idefics3": "model.text_model", "smolvlm": "model.text_model"}
PROJECTOR = {
    "qwen2_vl": "model.visual.merger",
    "qwen2_5_vl": "model.visual.merger",
    "qwen3_vl": "model.visual.merger",
    "idefics3": "model.connector",
    "smolvlm": "model.connector",
}
# where the output of a sublayer passes a norm before it reaches the residual stream
SANDWICH = {"gemma3": {"attn": "post_attention_layernorm", "mlp": "post_feedforward_layernorm"}}
MID = {"gemma3": "pre_feedforward_layernorm"}


def decoder(name: str, model: nn.Module) -> nn.Module:
    return model.get_submodule(LAYERS.get(name, "model.language_model"))


def place(name: str, model: nn.Module, site: str) -> tuple[nn.Module, str]:
    """The module of a site, and whether its input or output is meant."""
    text = decoder(name, model)
    if site == "hook_embed":
        return model.get_input_embeddings(), "output"
    if site == "ln_final.hook_normalized":
        return text.norm, "output"
    if site == "unembed.hook_out":
        return model.lm_head, "output"
    if site == "vision_projector.hook_out":
        return model.get_submodule(PROJECTOR.get(name, "model.multi_modal_projector")), "output"
    layer, _, hook = site.removeprefix("blocks.").partition(".")
    block = text.layers[int(layer)]
    sandwich = SANDWICH.get(name, {})
    inside = {
        "hook_resid_pre": (block, "input"),
        "hook_resid_post": (block, "output"),
        "hook_attn_out": (block.get_submodule(sandwich.get("attn", "self_attn")), "output"),
        "hook_mlp_out": (block.get_submodule(sandwich.get("mlp", "mlp")), "output"),
        "attn.hook_q": (block.self_attn.q_proj, "output"),
        "attn.hook_k": (block.self_attn.k_proj, "output"),
        "attn.hook_v": (block.self_attn.v_proj, "output"),
        "attn.hook_z": (block.self_attn.o_proj, "input"),
        "mlp.hook_pre": (block.mlp.gate_proj, "output"),
        "mlp.hook_post": (block.mlp.down_proj, "input"),
    }
    return inside[hook]


def _first(value: Any) -> Act:
    return value[0] if isinstance(value, tuple) else value


def _put(value: Any, act: Act) -> Any:
    return (act, *value[1:]) if isinstance(value, tuple) else act


@contextmanager
def hooked(name: str, model: nn.Module, site: str, fn: Edit) -> Iterator[None]:
    """Have `fn` act at a site, by plain torch hooks, in the flat shape of the module's tensor."""
    handles: list[Any] = []
    if site.endswith("hook_resid_mid"):
        handles = _hook_mid(name, model, site, fn)
    else:
        module, slot = place(name, model, site)
        if slot == "output":
            handles = [module.register_forward_hook(lambda m, a, out: _put(out, fn(_first(out))))]
        else:
            handles = [module.register_forward_pre_hook(lambda m, args: (fn(args[0]), *args[1:]))]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _hook_mid(name: str, model: nn.Module, site: str, fn: Edit) -> list[Any]:
    block = decoder(name, model).layers[int(site.split(".")[1])]
    norm = block.get_submodule(MID.get(name, "post_attention_layernorm"))
    change: list[Act] = []

    def at_norm(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        new = fn(args[0])
        change[:] = [new - args[0]]
        return (new, *args[1:])

    def behind_block(module: nn.Module, args: Any, out: Any) -> Any:
        return _put(out, _first(out) + change[0])

    return [norm.register_forward_pre_hook(at_norm), block.register_forward_hook(behind_block)]


@torch.no_grad()
def read(name: str, model: nn.Module, site: str, inputs: dict[str, Any]) -> Act:
    """The value at a site in a plain forward."""
    seen: list[Act] = []

    def keep(act: Act) -> Act:
        seen.append(act.clone())
        return act

    with hooked(name, model, site, keep):
        model(**inputs, use_cache=False)
    return seen[0]


@torch.no_grad()
def edited(name: str, model: nn.Module, site: str, inputs: dict[str, Any], fn: Edit) -> Act:
    """The logits of a plain forward with an edit at a site."""
    with hooked(name, model, site, fn):
        return model(**inputs, use_cache=False).logits
