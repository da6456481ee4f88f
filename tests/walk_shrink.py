"""Any default config of transformers made tiny, by what its fields are called.

No model is named here, but for `FIXES`: fields whose rule cannot be read off their name, each with
its reason. Equal meanings get equal sizes, so that parts which fit together still do.
"""

import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from transformers import CONFIG_MAPPING, PreTrainedConfig

WIDTH, HEADS, KV_HEADS, HEAD, FFN = 64, 4, 2, 32, 96
PATCH, IMAGE = 4, 32  # pixels along one side of a patch, of an image
VOCABULARY, TEXT_IDS, MOST_LAYERS = 512, 256, 6  # below TEXT_IDS no token means anything special
IMAGE_ID = TEXT_IDS + 100  # where the config leaves it open
FEW = 4  # experts, registers and other things there may be few of

_OPTIONAL = ("vision_config",)  # parts that a default config leaves out

# The first pattern that matches the whole name of a field says its new value; None keeps it.
Size = int | float | None
RULES: tuple[tuple[str, Size], ...] = (
    (r".*(temporal_patch_size|patch_temporal|tubelet).*", None),
    (r".*(audio|speech|mel|conv|kernel|stride|dilation|ratio|factor|rate|eps|std|theta).*", None),
    (r"num_(key_value|kv|sliding_key_value)_heads|swa_num_key_value_heads|n_kv_heads", KV_HEADS),
    (r".*linear_num_key_heads", KV_HEADS),
    (r"mm_embed_dim|output_proj_dims", WIDTH),
    (r"patch_embed_hidden_size", 3 * PATCH**2),
    (r"adapter_input_size|downsample_channels", WIDTH),
    (r"index_topk", 64),  # a multiple of what it is pooled by
    (r"(base_channels|hidden_channels)", 32),
    (r"pos_emb_(height|width)|max_(img|num_patches|vit).*|posemb_grid_size", 32),
    (r"codebook_size|num_embeddings|.*num_embeds|image_token_num_patches", 64),
    (r"index_n_heads|n_heads|num_heads|nhead|.*_(attention|value|mamba)_heads", HEADS),
    (r"linear_num_heads|resampler_n?_?heads|mamba_num_heads", HEADS),
    (r"qk_rope_head_dim", HEAD // 2),
    (r"qk_nope_head_dim", HEAD // 2),
    (r"qk_head_dim", HEAD),
    (r"(.*_)?head_dim|.*_dim_head|v_head_dim|dim_head|d_kv|rotary_dim", HEAD),
    (r".*(lora_rank|lowrank|laurel_rank|d_rel)", 16),
    (r".*(intermediate|ffn_dim|ffn_hidden|d_ff|mlp_dim).*", FFN),
    (r".*expert_dim|moe_hidden_size", FFN),
    (r"(unpadded_|mel_|codebook_)?vocab_size(_per_layer_input)?", VOCABULARY),
    (r"ssm_state_size|mamba_d_state", 16),
    (r"(hidden_size_per_layer_input|ple_embed_dim)", 16),
    (r".*(hidden_size|hidden_dim|embed_dim|d_model|emb_dim|embedding_size)", WIDTH),
    (r"(out_|vision_|projector_|.*_)?(output|out|projection|embed|proj|in|input)_dim", WIDTH),
    (r"hidden_sizes|encoder_dim|decoder_dim|output_dim|output_channels|.*_channels_out", WIDTH),
    (r".*num_image_tokens|num_query_tokens|.*n(um)?_latents|.*query_num", 16),
    (r"num_patches", (IMAGE // PATCH) ** 2),
    (r"num_position_embeddings|mm_tokens_per_image|image_seq_length", 16),
    (r"vision_soft_tokens_per_image", 16),
    (r".*image_size|resolution|img_size|crop_size", IMAGE),
    (r".*patch_size", PATCH),
    (r"window_size", 2 * PATCH),
    (r"(index_)?(n_routed|num_local|num)_experts|.*num_experts", FEW),
    (r".*experts_per_tok|.*top_?k(_experts)?|moe_k|.*topk_blocks", 2),
    (r"n_groups?|topk_group", 1),
    (r".*(max|original_max).*position.*|seq_len|.*max_pos_emb.*", 1024),
    (r".*sliding_window(_size)?|attention_chunk_size", 64),
    (r"first_k_dense_replace|num_nextn_predict_layers", 1),
    (r"num_kv_shared_layers", 0),
)  # fmt: skip
DEPTH = re.compile(
    r"(num_|n_|encoder_|decoder_|num_encoder_|num_decoder_|num_global_)?(hidden_)?layers?"
    r"|depth|resampler_depth|num_blocks|n_layer|conf_num_hidden_layers|.*num_hidden_layers"
)
IDS = re.compile(r".*(_ids?|token_index|token_indices|_token)$|.*_token_.*_id")
INDICES = (
    "vision_feature_layer",
    "_indexes",
    "_indices",
    "_idxs",
    "_layers",
    "_layer",
    "layer_ids",
)
NOT_IDS = re.compile(r"problem.*|.*layer_ids?|kv_.*")


def shrunken(model_type: str) -> PreTrainedConfig:
    """The default config of a model type with 2 to 6 layers and tiny widths.

    >>> shrunken("llava").text_config.hidden_size
    64
    """
    cls = CONFIG_MAPPING[model_type]
    config = cls()
    small = _shrink(config, _renumbered(config.to_dict()))
    for fix in (FIXES.get(model_type),):
        if fix is not None:
            fix(small)
    return cls.from_dict(small)


# ---- token ids -------------------------------------------------------------------------------


def _renumbered(fields: Mapping[str, Any]) -> dict[int, int]:
    """New numbers for the special tokens of a config, the same everywhere in it."""
    found = sorted({i for i in _ids(fields) if i >= TEXT_IDS})
    return {old: TEXT_IDS + n for n, old in enumerate(found)}


def _ids(fields: Mapping[str, Any]) -> Iterator[int]:
    for name, value in fields.items():
        if isinstance(value, dict):
            yield from _ids(value)
        elif _is_id(name):
            for one in value if isinstance(value, list | tuple) else [value]:
                if isinstance(one, int) and not isinstance(one, bool):
                    yield one


def _is_id(name: Any) -> bool:
    return isinstance(name, str) and bool(IDS.fullmatch(name)) and not NOT_IDS.fullmatch(name)


# ---- sizes -----------------------------------------------------------------------------------


def _shrink(config: PreTrainedConfig, ids: Mapping[int, int]) -> dict[str, Any]:
    fields = config.to_dict()
    keep = _layers_kept(fields)
    small: dict[str, Any] = {}
    for name, value in fields.items():
        inner = vars(config).get(name)
        if isinstance(inner, PreTrainedConfig):
            small[name] = _shrink(inner, ids)
        elif value is None and name in _OPTIONAL and name in type(config).sub_configs:
            small[name] = _shrink(type(config).sub_configs[name](), ids)
        elif value is None and name in ("image_token_id", "image_token_index", "video_token_index"):
            small[name] = IMAGE_ID
        elif name == "per_layer_config" and isinstance(value, dict):
            small[name] = _of_layers(value, ids, keep)
        elif isinstance(name, str) and not (isinstance(value, dict) and "rope" in name):
            small[name] = _small(name, value, ids, keep, _depth(fields))
    _agree(fields, small)
    _fit_rotation(config, fields, small)
    return small


def _layers_kept(fields: Mapping[str, Any]) -> list[int]:
    """Which layers represent all kinds of layers that a config lists: the first of each kind."""
    depth = _depth(fields)
    lists = [v for v in fields.values() if isinstance(v, list) and len(v) == depth]
    own = fields.get("per_layer_config")
    if isinstance(own, dict):
        own = {int(k): sorted(v) for k, v in own.items()}
        lists.append([own.get(i) for i in range(depth)])
    kinds = list(zip(*lists, strict=True)) if lists else [()] * depth
    first = sorted({str(kind): i for i, kind in reversed(list(enumerate(kinds)))}.values())
    more = [i for i in range(depth) if i not in first]
    return sorted(first[:MOST_LAYERS] + more[: max(0, 2 - len(first))])


def _of_layers(values: Mapping[Any, Any], ids: Mapping[int, int], keep: list[int]) -> Any:
    own = {int(k): v for k, v in values.items()}
    small = {}
    for new, old in enumerate(keep):
        if old in own:
            small[new] = {name: _small(name, value, ids, []) for name, value in own[old].items()}
            _agree(own[old], small[new])
    return small


def _depth(fields: Mapping[str, Any]) -> int:
    return next((v for k, v in fields.items() if _is_depth(k, v)), 0)


def _is_depth(name: Any, value: Any) -> bool:
    whole = isinstance(value, int) and not isinstance(value, bool)
    return whole and value > 0 and isinstance(name, str) and bool(DEPTH.fullmatch(name))


def _small(name: str, value: Any, ids: Mapping[int, int], keep: list[int], depth: int = 0) -> Any:
    if _is_id(name):
        if isinstance(value, list | tuple):
            return [ids.get(one, one) for one in value]
        return ids.get(value, value) if isinstance(value, int) else value
    if _is_depth(name, value):
        return min(value, max(len(keep), 2))
    if isinstance(value, list | tuple):
        return _small_list(name, value, keep, depth)
    new = _rule(name)
    whole = isinstance(value, int | float) and not isinstance(value, bool)
    return min(value, new) if whole and new is not None and value > 0 else value


def _small_list(name: str, values: Any, keep: list[int], depth: int) -> Any:
    if depth and len(values) == depth:
        return [values[i] for i in keep]
    if name.endswith(INDICES):  # numbers of layers, of which there are few
        return list(dict.fromkeys(max(-2, min(i, 1)) for i in values))
    if name == "image_grid_pinpoints":
        return [[IMAGE, 2 * IMAGE], [2 * IMAGE, IMAGE], [2 * IMAGE, 2 * IMAGE]]
    new = _rule(name)
    if new is None:
        return values
    return [min(new, one) if isinstance(one, int) else one for one in values]


def _rule(name: str) -> Size:
    return next((size for pattern, size in RULES if re.fullmatch(pattern, name)), None)


def _agree(fields: Mapping[str, Any], small: dict[str, Any]) -> None:
    """What was equal stays equal: as many key heads as query heads, and heads of one width."""
    for heads, kv in (("num_attention_heads", "num_key_value_heads"),):
        if fields.get(kv) is not None and fields.get(kv) == fields.get(heads):
            small[kv] = small[heads]
    rotated = fields.get("qk_rope_head_dim")
    if rotated and fields.get("head_dim") == rotated:
        small["head_dim"] = small["qk_rope_head_dim"]
        return
    width, heads = fields.get("hidden_size"), fields.get("num_attention_heads")
    if "head_dim" in fields and fields["head_dim"] in (None, width and heads and width // heads):
        small["head_dim"] = WIDTH // HEADS


def _fit_rotation(
    config: PreTrainedConfig, fields: Mapping[str, Any], small: dict[str, Any]
) -> None:
    """Sections of multi-axis rotary positions add up to half of the rotated part of a head."""
    sectioned = "mrope_section" in (getattr(config, "ignore_keys_at_rope_validation", None) or ())
    for name, rope in fields.items():
        if not isinstance(rope, dict) or "rope" not in str(name):
            continue
        kinds = {k: v for k, v in rope.items() if isinstance(v, dict)}
        if kinds:
            new = {k: _rotation(v, fields, small, sectioned) for k, v in kinds.items()}
        else:
            new = _rotation(rope, fields, small, sectioned)
        small[name] = new


def _rotation(
    rope: Mapping[str, Any], fields: Mapping[str, Any], small: Mapping[str, Any], sectioned: bool
) -> dict[str, Any]:
    new = dict(rope)
    sections = rope.get("mrope_section")
    if sections is not None or sectioned:
        sections = sections or (24, 20, 20)
        total = round(_head(small) * rope.get("partial_rotary_factor", 1.0)) // 2
        parts = [max(1, int(total * part / sum(sections))) for part in sections]
        parts[0] += total - sum(parts)
        new["mrope_section"] = parts
    if "original_max_position_embeddings" in new:
        new["original_max_position_embeddings"] = 512
    return new


def _head(fields: Mapping[str, Any]) -> float:
    if isinstance(fields.get("head_dim"), int):
        return float(fields["head_dim"])
    heads = fields.get("num_attention_heads")
    return fields["hidden_size"] / heads if heads and "hidden_size" in fields else 0.0


# ---- what no name tells ----------------------------------------------------------------------


def _images_as_vocabulary(small: dict[str, Any]) -> None:
    """Its image tokens are codes of a picture tokenizer, named in a vocabulary map."""
    codes = range(64)
    names = ["<image>", "<|extra_200|>", *(f"<|visual token {i:06d}|>" for i in codes)]
    names += [f"IMGIMG{''.join('ABCDEFGHIJ'[int(d)] for d in str(i))}Z" for i in codes]
    small["vocabulary_map"] = {name: TEXT_IDS + i for i, name in enumerate(names)}
    small["image_token_id"] = small["vocabulary_map"]["<image>"]
    if "attn_resolutions" in small["vq_config"] and "hidden_size" in small["vq_config"]:
        small["vq_config"]["hidden_size"] = 32 * small["vq_config"]["channel_multiplier"][-1]


def _patches_to_queries(small: dict[str, Any]) -> None:
    """The map from the number of patches to the number of tokens has defaults for real images."""
    small["projector_patch_to_query_dict"] = {(IMAGE // PATCH) ** 2: 16}
    small.pop("max_value_projector_patch_to_query_dict", None)


def _dense_first(small: dict[str, Any]) -> None:
    """The default config has no list of layer types, and the class fails without one."""
    depth = small["text_config"]["num_hidden_layers"]
    small["text_config"]["mlp_layer_types"] = ["dense"] + ["sparse"] * (depth - 1)
    small["text_config"] |= {"num_experts_per_tok": 2, "topk_group": 1, "n_group": 1}


def _equal_sides(small: dict[str, Any]) -> None:
    """Height and width take turns in its rotation, so their sections are equal."""
    small["text_config"]["rope_parameters"]["mrope_section"] = [3, 3, 2]


def _rotation_by_layer(small: dict[str, Any]) -> None:
    """The default config has no rotation at all, and the class fails without one per layer type."""
    rope = {"rope_type": "default", "rope_theta": 10_000.0, "mrope_section": [6, 5, 5]}
    kinds = set(small["text_config"]["layer_types"])
    small["text_config"]["rope_parameters"] = {kind: dict(rope) for kind in kinds}


def _one_deep_feature(small: dict[str, Any]) -> None:
    """The default config says not which vision layers go where, and the class fails without."""
    small["deepstack_layer_map"] = [[0, 0], [-1, 1]]
    small["downsample_rate"] = "4/8"


def _own_keys(small: dict[str, Any]) -> None:
    """A list says from which layer each layer takes its keys: from itself."""
    small["text_config"]["kv_source_layers"] = list(
        range(small["text_config"]["num_hidden_layers"])
    )


def _indexer(small: dict[str, Any]) -> None:
    """The default config leaves its sparse attention without sizes, and the class fails."""
    for name, size in {"n_heads": 4, "kv_heads": 1, "head_dim": HEAD}.items():
        small["text_config"][f"indexer_{name}"] = size
    small["text_config"] |= {"indexer_budget": 64, "indexer_compress_ratio": 4}


def _tiny_pictures(small: dict[str, Any]) -> None:
    """Positions are kept for the largest picture, whose size no pattern may touch elsewhere."""
    small["vision_config"] |= {"max_img_size": IMAGE, "patch_dim": 3 * PATCH**2}
    small["vision_config"] |= {"video_patch_dim": 6 * PATCH**2}
    small["image_token_id"] = IMAGE_ID


def _merged_width(small: dict[str, Any]) -> None:
    """Its projector reads several patches side by side."""
    for part in (small, small["vision_config"]):
        if "out_hidden_size" in part:
            part["out_hidden_size"] = 4 * WIDTH


def _shuffled_width(small: dict[str, Any]) -> None:
    """Its vision MLP reads several patches side by side."""
    small["vision_config"]["intermediate_size"] = 4 * WIDTH


def _stacked_width(small: dict[str, Any]) -> None:
    """Its projector reads the last layer and some others side by side."""
    chosen = small["vision_config"]["intermediate_layers_indices"]
    small["vision_config"]["vision_output_dim"] = WIDTH * (1 + len(chosen))


def _marks(small: dict[str, Any]) -> None:
    """The class reads ids that its default config lacks."""
    small["vision_start_token_id"], small["vision_end_token_id"] = IMAGE_ID + 1, IMAGE_ID + 2
    small["audio_start_token_id"] = IMAGE_ID + 3


def _window(small: dict[str, Any]) -> None:
    """The default config lists sliding layers and no window."""
    small["text_config"]["sliding_window"] = 64


def _positions_by_patch(small: dict[str, Any]) -> None:
    """It counts its patches by an older name of the image's size."""
    small["vision_config"] |= {"num_position_embeddings": (IMAGE // PATCH) ** 2}


def _sections(small: dict[str, Any]) -> None:
    """The sections of its rotation stand in the class, for the default width of a head."""
    small["text_config"]["rope_parameters"]["mrope_section"] = [4, 6, 6]


def _narrow_sound(config: dict[str, Any]) -> None:
    """Channels double with every downsampling, and the last stage has most of the layers."""
    for part in ("acoustic_tokenizer_encoder_config", "semantic_tokenizer_encoder_config"):
        config[part] |= {"num_filters": 1, "depths": [1] * len(config[part]["depths"])}


FIXES: dict[str, Callable[[dict[str, Any]], None]] = {
    "aria": _patches_to_queries,
    "chameleon": _images_as_vocabulary,
    "cohere_compass": _rotation_by_layer,
    "deepseek_ocr2": _dense_first,
    "emu3": _images_as_vocabulary,
    "ernie4_5_vl_moe": _equal_sides,
    "qwen4_exp": _indexer,
    "nemotron_h_omni": _tiny_pictures,
    "paddleocr_vl": _sections,
    "llama4": _shuffled_width,
    "mllama": _stacked_width,
    "molmo2": _positions_by_patch,
    "muse_glimmer": _merged_width,
    "muse_spark": _merged_width,
    "qwen2_5_omni_thinker": _marks,
    "qwen3_omni_moe_thinker": _marks,
    "step3p7": _window,
    "vibevoice_asr": _narrow_sound,
    "mistral_large4": _own_keys,
    "granite4_vision": _one_deep_feature,
}
