"""Where a Hugging Face model keeps its decoder, blocks, vision tower, projector, norm and head.

Found where the user said (`register_structure`), else through the generic accessors (`get_decoder`,
`get_encoder`, embeddings), by name only where there is no accessor. Paths are relative to the
wrapped model: `model.language_model.layers`.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from imaginelens.hooks.errors import SiteUnavailable
from imaginelens.hooks.registering import PARTS, registered

_NORMS = (
    "norm",
    "ln_f",
    "final_layernorm",
    "final_layer_norm",
    "embedding_norm",
    "norm_f",
    "layer_norm",
    "hyper_connection_mixer",
)
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
    "vision_projection",
    "language_projection",
    "resampler_model",
    "patch_merger",
    "visual_embeddings_table",
    "vision_embed_tokens",
    "image_to_text_projection",
    "layerwise_projectors",
)
_ATTENTION = ("self_attn", "attn", "attention", "self_attention")
# What some blocks have in attention's place: no patterns, but the same place in the stream.
_MIXERS = ("linear_attn", "cross_attn", "conv", "mixer")
_MLP = ("mlp", "feed_forward", "ffn", "block_sparse_moe")
# Gates and factors between a sublayer and the stream; a factor of 1 changes nothing.
_FACTORS = (
    "residual_multiplier",
    "layer_scalar",
    "cross_attn_attn_gate",
    "post_attention_residual_gate",
)
# Several streams side by side: what reads them all before the second sublayer.
_LANES = ("ffn_hc", "mlp_hyper_connection")


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
    # what is added is no module's output: it is gated, scaled or flattened on its way
    by_difference: bool = False
    mid_leaves: bool = False  # `mid` is the module that puts out that stream
    call: int = 0  # which call of the block within one forward it is, where blocks recur


@dataclass(frozen=True)
class Structure:
    """Paths and sizes of one model.

    Attributes:
        windowed: the projector's rows are in window order, not in token order (Qwen2.5-VL).
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


def find_structure(model: PreTrainedModel) -> Structure:
    """Find the parts of `model` that sites are attached to.

    Raises:
        SiteUnavailable: the model has no list of decoder blocks, embedding, final norm or head, its
            config does not tell their sizes, or a registered path does not exist.
    """
    paths = {id(module): path for path, module in model.named_modules()}
    config = model.config.get_text_config(decoder=True)
    said = registered(model.config.model_type)
    own = {what: _said(model, what, path) for what, path in said.items() if what not in PARTS}
    decoder, blocks = _find_blocks(model, config, own)
    norms = (m for n, m in decoder.named_children() if n in _NORMS)
    final_norm = own.get("final_norm") or next(norms, None)
    head: Any = own.get("head") or _find_head(model)
    for part, what, name in ((final_norm, "final norm", "final_norm"), (head, "head", "head")):
        if part is None:
            raise SiteUnavailable(
                f"{type(model).__name__} has no {what} that the generic accessors find"
                f"{_beside(model)}; latent reasoning needs one, so wrap the language model that "
                f"has it, or name it: il.register_structure({model.config.model_type!r}, "
                f"{name}=...)"
            )
    vision = own.get("vision") or _find_vision(model)
    projector = own.get("projector") or _find_projector(model, vision)
    heads = _size(model, config, "num_attention_heads")
    return Structure(
        decoder=paths[id(decoder)],
        embed=paths[id(own.get("embed") or _find_embedding(model))],
        blocks=_blocks(model, paths, blocks, said),
        final_norm=paths[id(final_norm)],
        head=paths[id(head)],
        vision=None if vision is None else paths[id(vision)],
        vision_blocks=() if vision is None else tuple(paths[id(b)] for b in _longest_list(vision)),
        projector=None if projector is None else paths[id(projector)],
        image_token_id=_image_token_id(model),
        d_model=_size(model, config, "hidden_size"),
        n_heads=heads,
        n_kv_heads=getattr(config, "num_key_value_heads", None) or heads,
        d_vocab=head.out_features,
        windowed=vision is not None and hasattr(vision, "permute_input_for_window_attn"),
    )


def _size(model: PreTrainedModel, config: Any, name: str) -> int:
    size = getattr(config, name, None)
    if size is None:
        raise SiteUnavailable(
            f"{type(config).__name__}, which is the text config of {type(model).__name__}, has no "
            f"{name}, so that it is no language model of decoder blocks; wrap the language model "
            "inside it"
        )
    return int(size)


def _said(model: PreTrainedModel, what: str, path: str) -> nn.Module:
    """The module at a path that the user registered."""
    module: nn.Module = model
    for step in path.split("."):
        inner = dict(module.named_children())
        if step not in inner:
            raise SiteUnavailable(
                f"{what}={path!r} was registered for {model.config.model_type!r}, and "
                f"{type(model).__name__} has no {step!r} there, only {', '.join(inner) or 'a leaf'}"
            )
        module = inner[step]
    return module


def _beside(model: PreTrainedModel) -> str:
    """Why a decoder may lack what others have."""
    if not model.config.is_encoder_decoder:
        return ""
    return " (it is an encoder-decoder, whose decoder does not hold the prompt)"


def _find_blocks(
    model: PreTrainedModel, config: Any, own: Mapping[str, nn.Module]
) -> tuple[nn.Module, nn.ModuleList | nn.Sequential]:
    if "blocks" in own:
        blocks = own["blocks"]
        path = registered(model.config.model_type)["blocks"]
        if not isinstance(blocks, nn.ModuleList | nn.Sequential) or not len(blocks):
            raise SiteUnavailable(
                f"blocks={path!r} was registered for {model.config.model_type!r}, and it is a "
                f"{type(blocks).__name__}; name the ModuleList that holds the decoder blocks"
            )
        parent = model.get_submodule(path.rpartition(".")[0])
        return own.get("decoder", parent), blocks
    n_layers = _size(model, config, "num_hidden_layers")
    for decoder in _decoder_chain(model):
        for child in decoder.children():
            if isinstance(child, nn.ModuleList) and len(child) == n_layers:
                return decoder, child
    raise SiteUnavailable(
        f"{type(model).__name__} has no list of {n_layers} decoder blocks below get_decoder()"
        f"{_beside(model)}; pass the language model that holds them, or name them: "
        f"il.register_structure({model.config.model_type!r}, blocks=...)"
    )


def _blocks(
    model: PreTrainedModel, paths: Mapping[int, str], blocks: Any, said: Mapping[str, str]
) -> tuple[Block, ...]:
    found = tuple(_block(paths[id(b)], b) for b in blocks)
    for part in (p for p in said if p in PARTS):
        names = [dict(b.named_modules()) for b in blocks]
        if not any(said[part] in inside for inside in names):
            raise SiteUnavailable(
                f"{part}={said[part]!r} was registered for {model.config.model_type!r}, and no "
                f"block of {type(model).__name__} has that; a block holds "
                f"{', '.join(n for n, _ in blocks[0].named_children())}"
            )
        found = tuple(
            _with_part(b, part, said[part]) if said[part] in inside else b
            for b, inside in zip(found, names, strict=True)
        )
    return found


def _find_embedding(model: PreTrainedModel) -> nn.Module:
    try:
        return model.get_input_embeddings()
    except NotImplementedError:
        raise SiteUnavailable(
            f"{type(model).__name__} has no token embedding that get_input_embeddings() finds"
            f"{_beside(model)}; wrap the language model that has it, or name it: "
            f"il.register_structure({model.config.model_type!r}, embed=...)"
        ) from None


def _with_part(block: Block, part: str, name: str) -> Block:
    changed: dict[str, Any] = {part: f"{block.path}.{name}"}
    return replace(block, **changed)


def _find_head(model: PreTrainedModel) -> nn.Module | None:
    """The output embedding; some classes leave it to the language model they hold."""
    holders = (model, *(getattr(model, name, None) for name in ("language_model", "text_model")))
    heads = (h.get_output_embeddings() for h in holders if isinstance(h, PreTrainedModel))
    return next((head for head in heads if head is not None), None)


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


def _find_projector(model: PreTrainedModel, vision: nn.Module | None) -> nn.Module | None:
    named = dict(model.named_modules())
    # a TransformerBridge keeps what it stands for one step deeper
    plain = {path: path.replace("._original_component", "") for path in named}
    for wanted in _PROJECTORS:
        found = [p for p in named if p.split(".")[-1] == wanted and plain[p].count(".") <= 2]
        if found:
            projector = named[min(found, key=len)]
            # of several, the first: what enters the first layer
            return projector[0] if isinstance(projector, nn.ModuleList) else projector
    # a tower that knows the width of the text model projects by itself
    knows = hasattr(getattr(vision, "config", None), "text_hidden_size")
    return vision if knows else None


def _longest_list(tower: nn.Module) -> list[nn.Module]:
    lists = [m for m in tower.modules() if isinstance(m, nn.ModuleList) and len(m) > 0]
    alike: list[nn.ModuleList] = [m for m in lists if len({type(child) for child in m}) == 1]
    return list(sorted(alike, key=len)[-1]) if alike else []


def _image_token_id(model: PreTrainedModel) -> int | None:
    for config in (model.config, getattr(model.config, "vision_config", None)):
        for name in ("image_token_id", "image_token_index", "video_token_index"):
            token = getattr(config, name, None)
            if token is not None:
                return int(token)
    return None


def _block(path: str, block: nn.Module) -> Block:
    if type(block).__module__.startswith("transformer_lens."):
        return _bridged(path, block)
    children = dict(block.named_children())

    def child(*names: str) -> str | None:
        return next((f"{path}.{n}" for n in names if n in children), None)

    attention, mlp = child(*_ATTENTION), child(*_MLP)
    if "mixer" in children:  # one sublayer a block, now this, now that
        inside = dict(children["mixer"].named_children())
        attention = child("mixer") if "q_proj" in inside else attention
        mlp = child("mixer") if "down_proj" in inside or "experts" in inside else mlp
    mixer = attention or (None if mlp == child("mixer") else child(*_MIXERS))
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
        mid = child(*_LANES, "post_attention_layernorm", "ffn_norm", "ln_2", "layernorm_after")
        if mid is None and "encoder_attn" not in children:  # beside one it stands behind the MLP
            mid = child("final_layer_norm")
    if not getattr(block, "do_layer_norm_before", True):
        mid = None  # a norm stands on the stream itself
    # Others name the norm, or a convolution, after the sublayer it stands behind.
    attn_norm = child("post_norm1", "post_operator_norm", "attn_sconv") or attn_norm
    mlp_norm = child("post_norm2", "post_ffn_norm", "mlp_sconv")
    inner_a = _inner(block, attention, path)
    inner_m = _inner(block, mlp, path)
    return Block(
        path=path,
        attention=attention,
        attn_out=attn_norm or mixer,
        mlp=mlp,
        mlp_out=mlp_norm or child("post_mlp_layernorm", "post_feedforward_layernorm") or mlp,
        mid=mid,
        q=inner_a.get("q_proj"),
        k=inner_a.get("k_proj"),
        v=inner_a.get("v_proj"),
        o=inner_a.get("o_proj") or inner_a.get("out_proj"),
        mlp_pre=inner_m.get("gate_proj") or inner_m.get("w1") or inner_m.get("fc1"),
        mlp_down=inner_m.get("down_proj") or inner_m.get("w2") or inner_m.get("fc2"),
        by_difference=_by_difference(block, mlp),
    )


def _bridged(path: str, block: nn.Module) -> Block:
    """A block inside a TransformerBridge, whose parts have TransformerLens' names."""
    # all its names: its own component, too, holds the parts, and one module is listed once
    inside = {name for name, _ in block.named_modules(remove_duplicate=False)}

    def part(*names: str) -> str | None:
        return next((f"{path}.{n}" for n in names if n in inside), None)

    return Block(
        path=path,
        attention=part("attn"),
        attn_out=part("ln1_post", "attn"),
        mlp=part("mlp"),
        mlp_out=part("ln2_post", "mlp"),
        mid=part("ln2"),
        q=part("attn.q"),
        k=part("attn.k"),
        v=part("attn.v"),
        o=part("attn.o"),
        mlp_pre=part("mlp.gate", "mlp.in"),
        mlp_down=part("mlp.out"),
    )


def _by_difference(block: nn.Module, mlp: str | None) -> bool:
    """Whether what a sublayer adds to the stream is another tensor than what a module returns."""
    factors = [getattr(block, name) for name in _FACTORS if hasattr(block, name)]
    scaled = any(not isinstance(factor, int | float) or factor != 1 for factor in factors)
    several = any(hasattr(block, name) for name in _LANES)
    flattened = mlp is None and hasattr(block, "fc2")  # OPT has its MLP in the block itself
    return scaled or several or flattened


def _inner(block: nn.Module, path: str | None, root: str) -> dict[str, str]:
    """Names of the children of a sublayer, mapped to their full paths."""
    if path is None:
        return {}
    module = block.get_submodule(path[len(root) + 1 :])
    return {name: f"{path}.{name}" for name, _ in module.named_children()}
