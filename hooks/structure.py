"""Where a Hugging Face model keeps its decoder, blocks, vision tower, projector, norm and head.

Found through the generic accessors (`get_decoder`, `get_encoder`, embeddings), by name only where
there is no accessor. Paths are relative to the wrapped model: `model.language_model.layers`.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from imaginelens.hooks.errors import SiteUnavailable

_NORMS = ("norm", "ln_f", "final_layernorm", "final_layer_norm", "embedding_norm", "norm_f")
_PROJECTORS = (
    "multi_modal_projector",
    "mm_projector",
    "merger",
    "connector",
    "aligner",
    "embed_vision",
    "projector",
    "vision_adapter",
    "vision_resampler",
)
_ATTENTION = ("self_attn", "attn", "attention", "self_attention")
_MLP = ("mlp", "feed_forward", "ffn", "block_sparse_moe")


@dataclass(frozen=True)
class Block:
    """The parts of one decoder block, as paths; None where this block class has no such part."""

    path: str
    attention: str | None  # the attention module itself
    attn_out: str | None  # whose output is added to the residual stream
    mlp: str | None
    mlp_out: str | None
    mid: str | None  # whose input is the residual stream between attention and MLP
    q: str | None
    k: str | None
    v: str | None
    o: str | None
    mlp_pre: str | None
    mlp_down: str | None


@dataclass(frozen=True)
class Structure:
    """Paths and sizes of one model.

    Attributes:
        windowed: the projector's rows are in window order, not in token order (Qwen2.5-VL).
        prefix_lm: generated tokens are told from the prompt by `token_type_ids` (PaliGemma).
    """

    decoder: str
    embed: str
    blocks: tuple[Block, ...]
    final_norm: str
    head: str
    vision: str | None
    vision_blocks: tuple[str, ...]
    projector: str | None
    image_token_id: int | None
    d_model: int
    n_heads: int
    n_kv_heads: int
    d_vocab: int
    windowed: bool
    prefix_lm: bool


def find_structure(model: PreTrainedModel) -> Structure:
    """Find the parts of `model` that sites are attached to.

    Raises:
        SiteUnavailable: the model has no list of decoder blocks, embedding, final norm or head.
    """
    paths = {id(module): path for path, module in model.named_modules()}
    config = model.config.get_text_config(decoder=True)
    decoder, blocks = _find_blocks(model, config.num_hidden_layers)
    final_norm = next((m for n, m in decoder.named_children() if n in _NORMS), None)
    head = model.get_output_embeddings()
    for part, what in ((final_norm, "final norm"), (head, "output head")):
        if part is None:
            raise SiteUnavailable(
                f"{type(model).__name__} has no {what} that the generic accessors find; "
                "latent reasoning needs one, so wrap the language model that has it"
            )
    vision = _find_vision(model)
    projector = _find_projector(model)
    return Structure(
        decoder=paths[id(decoder)],
        embed=paths[id(model.get_input_embeddings())],
        blocks=tuple(_block(paths[id(b)], b) for b in blocks),
        final_norm=paths[id(final_norm)],
        head=paths[id(head)],
        vision=None if vision is None else paths[id(vision)],
        vision_blocks=() if vision is None else tuple(paths[id(b)] for b in _longest_list(vision)),
        projector=None if projector is None else paths[id(projector)],
        image_token_id=_image_token_id(model),
        d_model=config.hidden_size,
        n_heads=config.num_attention_heads,
        n_kv_heads=getattr(config, "num_key_value_heads", None) or config.num_attention_heads,
        d_vocab=head.out_features,
        windowed=vision is not None and hasattr(vision, "permute_input_for_window_attn"),
        prefix_lm=model.config.model_type in ("paligemma",),
    )


def _find_blocks(model: PreTrainedModel, n_layers: int) -> tuple[nn.Module, nn.ModuleList]:
    for decoder in _decoder_chain(model):
        for child in decoder.children():
            if isinstance(child, nn.ModuleList) and len(child) == n_layers:
                return decoder, child
    raise SiteUnavailable(
        f"{type(model).__name__} has no list of {n_layers} decoder blocks below get_decoder(); "
        "pass the language model that holds them, or a model with the usual structure"
    )


def _decoder_chain(model: PreTrainedModel) -> Iterator[nn.Module]:
    """The decoder, then what lies inside it: some accessors stop one wrapper too early."""
    module: Any = model.get_decoder()
    seen: set[int] = set()
    while module is not None and id(module) not in seen:
        yield module
        seen.add(id(module))
        inner: Any = module.get_decoder() if hasattr(module, "get_decoder") else None
        if inner is None or id(inner) in seen:
            names = ("model", "decoder", "language_model", "transformer")
            inner = next((getattr(module, n) for n in names if hasattr(module, n)), None)
        module = inner


def _find_vision(model: PreTrainedModel) -> nn.Module | None:
    encoder = model.get_encoder(modality="image")
    return None if encoder is None or encoder in (model, model.base_model) else encoder


def _find_projector(model: PreTrainedModel) -> nn.Module | None:
    named = dict(model.named_modules())
    for wanted in _PROJECTORS:
        found = [p for p in named if p.split(".")[-1] == wanted and p.count(".") <= 2]
        if found:
            return named[min(found, key=len)]
    return None


def _longest_list(tower: nn.Module) -> list[nn.Module]:
    lists = [m for m in tower.modules() if isinstance(m, nn.ModuleList) and len(m) > 0]
    alike: list[nn.ModuleList] = [m for m in lists if len({type(child) for child in m}) == 1]
    return list(sorted(alike, key=len)[-1]) if alike else []


def _image_token_id(model: PreTrainedModel) -> int | None:
    for config in (model.config, getattr(model.config, "vision_config", None)):
        for name in ("image_token_id", "image_token_index"):
            token = getattr(config, name, None)
            if token is not None:
                return int(token)
    return None


def _block(path: str, block: nn.Module) -> Block:
    children = dict(block.named_children())

    def child(*names: str) -> str | None:
        return next((f"{path}.{n}" for n in names if n in children), None)

    attention, mlp = child(*_ATTENTION), child(*_MLP)
    # Gemma and GLM put a norm behind each sublayer: its output is what the residual receives.
    sandwich = "pre_feedforward_layernorm" in children
    after_both = "post_feedforward_layernorm" in children and not sandwich
    attn_norm = child("post_self_attn_layernorm")
    if sandwich or after_both:
        attn_norm = child("post_attention_layernorm")
    if sandwich:
        mid = child("pre_feedforward_layernorm")
    elif after_both:
        mid = mlp
    else:
        mid = child("post_attention_layernorm", "ffn_norm", "ln_2", "layernorm_after")
    inner_a = _inner(block, attention, path)
    inner_m = _inner(block, mlp, path)
    return Block(
        path=path,
        attention=attention,
        attn_out=attn_norm or attention,
        mlp=mlp,
        mlp_out=child("post_mlp_layernorm", "post_feedforward_layernorm") or mlp,
        mid=mid,
        q=inner_a.get("q_proj"),
        k=inner_a.get("k_proj"),
        v=inner_a.get("v_proj"),
        o=inner_a.get("o_proj") or inner_a.get("out_proj"),
        mlp_pre=inner_m.get("gate_proj") or inner_m.get("w1") or inner_m.get("fc1"),
        mlp_down=inner_m.get("down_proj") or inner_m.get("w2") or inner_m.get("fc2"),
    )


def _inner(block: nn.Module, path: str | None, root: str) -> dict[str, str]:
    """Names of the children of a sublayer, mapped to their full paths."""
    if path is None:
        return {}
    module = block.get_submodule(path[len(root) + 1 :])
    return {name: f"{path}.{name}" for name, _ in module.named_children()}
