"""The latent-reasoning families this library knows: one entry each.

What an entry says was read from the released code, named beside it; ids and configs of the released
checkpoints themselves are not verified. A family is recognised by the strings of its tokenizer,
then by config keys; where families share both, nothing is guessed.
"""

from collections.abc import Collection, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import PreTrainedModel

from imaginelens.hooks import answers
from imaginelens.hooks.errors import CheckpointError
from imaginelens.hooks.heads import NearTo, OnLatents, build_head, read_extras
from imaginelens.hooks.spec import LatentSpec, PromptStyle
from imaginelens.hooks.textspans import CLOSE, TextSpec

LVR_END = "lvr_latent_end_emb"
_KEYS = {"open": "latent_start_id", "close": "latent_end_id", "pad": "latent_token_id"}


def _equip_lvr(spec: LatentSpec, config: Any, weights: Mapping[str, torch.Tensor]) -> LatentSpec:
    """LVR with the head and the learned end that this checkpoint holds."""
    if spec.project is None and getattr(config, "lvr_head", False):
        activation = config.get_text_config(decoder=True).hidden_act
        head = build_head(weights, "lvr_head.", activation)
        spec = replace(spec, project=OnLatents(head), project_unembeds=True)
    if spec.name == "lvr-latent-end" and spec.criterion is None:
        if LVR_END not in weights:
            raise CheckpointError(
                f"lvr-latent-end needs the weight {LVR_END}, and the checkpoint holds "
                f"{', '.join(sorted(weights)) or 'no extra weights'}; pass "
                "spec=il.FAMILIES['lvr'] for a fixed number of steps"
            )
        spec = replace(spec, criterion=NearTo(weights[LVR_END], 0.02))
    return spec


# NOVAglow646/Monet. Its training and the CapImagine paper consume the open token's embedding
# (src/monet_qwen_model/modeling_qwen2_5_vl_monet.py:1904-1926); its vLLM runner overwrites it.
_MONET = LatentSpec(
    name="monet",
    open="<abs_vis_token>",
    close="</abs_vis_token>",
    pad="<abs_vis_token_pad>",
    config_keys=_KEYS,
    max_steps=10,
    prompt=PromptStyle(
        system="You are a helpful multimodal assistant. You are required to answer the question "
        "based on the image provided. Put your final answer in \\boxed{}."
    ),
    reopens=True,
    answer=answers.boxed,
    marks=("answer_start_pattern",),
    checkpoints=("NOVAglow646/Monet-7B", "NOVAglow646/Monet-SFT-7B"),
)

# VincentLeebang/lvr, src/model/qwen_lvr_model.py: `_lvr_deocding_by_steps` (:855), the strategy
# that is evaluated. Steps are the user's choice of 4, 8 and 16: FAMILIES["lvr"].with_steps(4).
_LVR = LatentSpec(
    name="lvr",
    open="<|lvr_start|>",
    close="<|lvr_end|>",
    pad="<|lvr|>",
    config_keys={"open": "lvr_start_id", "close": "lvr_end_id", "pad": "lvr_id"},
    max_steps=8,
    fixed=True,
    force_close=False,
    emit="sampled",
    extras=("lvr_head.", LVR_END),
    equip=_equip_lvr,
    prompt=PromptStyle(suffix="\nAnswer with the option's letter from the given choices directly."),
    answer=answers.first_found(answers.between("<answer>", "</answer>"), answers.letter),
    marks=("lvr_id",),
    checkpoints=("vincentleebang/LVR-7B",),
)

# `_lvr_deocding_with_latentend` (:583), for checkpoints that hold the learned end
_LVR_LATENT_END = replace(_LVR, name="lvr-latent-end", max_steps=16)

# UMass-Embodied-AGI/Mirage, transformers/src/transformers/generation/utils.py:3286-3450
_MIRAGE = LatentSpec(
    name="mirage",
    open="<|latent_start|>",
    close="<|latent_end|>",
    pad="<|latent_pad|>",
    config_keys=_KEYS,
    max_steps=8,  # trained with 4: FAMILIES["mirage"].with_steps(4)
    reopens=True,
    prompt=PromptStyle(reply="<|im_start|>assistant"),
    answer=answers.boxed,
    checkpoints=("Miiche/vsp_spatial_planning_direct_sft",),
)

Family = LatentSpec | TextSpec

FAMILIES: dict[str, Family] = {
    "organism": LatentSpec(
        name="organism",
        open="<|latent_start|>",
        close="<|latent_end|>",
        pad="<|latent_pad|>",
        config_keys=_KEYS,
        steps_key=("latent_steps", 1),
        max_steps=2,
        fixed=True,
    ),
    "monet": _MONET,
    # inference/vllm/monet_gpu_model_runner.py:1434-1463, 1641-1667, and its RL code: tokens sampled
    # inside the span stay in the ids
    "monet-vllm": replace(_MONET, name="monet-vllm", slot="replace", emit="sampled", reopens=False),
    "lvr": _LVR,
    "lvr-latent-end": _LVR_LATENT_END,
    "mirage": _MIRAGE,
    "mirage-release": replace(_MIRAGE, name="mirage-release", multi_span=False),
    # XD111ds/ILVR, the same file (:3380-3404 is the cure of the second span)
    "ilvr": replace(
        _MIRAGE,
        name="ilvr",
        steps_key=("latent_size", 1),
        prompt=PromptStyle(),
        answer=answers.first_found(answers.boxed, answers.tail),
        checkpoints=("shuai22/comt_ckpt",),
    ),
    # TungChintao/SkiLa, src/model/skila.py:122-213
    "skila": LatentSpec(
        name="skila",
        open="<|sketch_start|>",
        close="<|sketch_end|>",
        pad="<|skila|>",
        config_keys={"open": "sketch_start_id", "close": "sketch_end_id", "pad": "skila_id"},
        steps_key=("sketch_token_num", 2),
        max_steps=54,
        marks=("sketch_token_num",),
        checkpoints=("JosephTong/SkiLa-7B",),
    ),
    # Accio-Lab/SwimBird, src/model/swimbird.py:117-230
    "swimbird": LatentSpec(
        name="swimbird",
        open="<|latent_start|>",
        close="<|latent_end|>",
        pad="<|latent|>",
        config_keys={"open": "latent_start_id", "close": "latent_end_id", "pad": "latent_id"},
        steps_key=("max_latent_token", 2),
        max_steps=64,
        marks=("max_latent_token",),
        checkpoints=("Accio-Lab/SwimBird-8B",),
    ),
    # Michael4933/CapImagine, README: a plain Qwen2.5-VL that imagines in words
    "capimagine": TextSpec(
        name="capimagine",
        answer=answers.first_found(answers.boxed, answers.after(CLOSE), answers.tail),
        checkpoints=("Michael4933/CapImagine-7B",),
    ),
}

# The others are chosen by name: a checkpoint does not show that it is meant so.
RECOGNISED = ("monet", "lvr", "mirage", "ilvr", "skila", "swimbird")


def family_of(config: Any, tokenizer: Any, held: Collection[str] = ()) -> Family | None:
    """Recognise a checkpoint's family; None is a model that imagines neither in latents nor between
    the markers of a family that imagines in words.

    A config that names its family (`imaginelens_family`) is believed. Otherwise all three span
    strings of a family must be in the tokenizer, or, where a checkpoint has none of any family's
    strings, all three of its config keys in the config. Families that share them are told apart by
    the Hub id or by config keys that only one of them writes.

    Args:
        held: names of the weights that the checkpoint holds beside the model.

    Raises:
        CheckpointError: several families fit, or a family's tokens are there in part.
    """
    named = getattr(config, "imaginelens_family", None)
    if named is not None and named not in FAMILIES:
        raise CheckpointError(
            f"the config names the family {named!r}, which is not one of {', '.join(FAMILIES)}; "
            "pass spec=il.LatentSpec(...)"
        )
    spec = FAMILIES[named] if named is not None else _only(_candidates(config, tokenizer), config)
    if spec is None:
        return _in_words(config, tokenizer)
    if isinstance(spec, TextSpec):
        return spec
    if spec.name == "lvr" and LVR_END in held:
        spec = _LVR_LATENT_END
    key, times = spec.steps_key or ("", 1)
    steps = getattr(config, key, None) if key else None
    return spec if steps is None else replace(spec, max_steps=times * int(steps))


def equipped(spec: LatentSpec, model: PreTrainedModel) -> LatentSpec:
    """The spec with the extra weights that an instantiated model carries itself."""
    if spec.equip is None:
        return spec
    own = {k: v for k, v in model.state_dict().items() if k.startswith(spec.extras)}
    return spec.equip(spec, model.config, own)


def family_on_disk(
    name: str | Path,
    model: PreTrainedModel,
    processor: Any,
    spec: Family | Literal[False] | None,
    *,
    revision: str | None = None,
) -> Family | None:
    """The family of a checkpoint that was loaded, with the extra weights of its files.

    Args:
        spec: the family, if the user names one; None recognises it, `False` is none.
    """
    tokenizer = getattr(processor, "tokenizer", processor)
    found = family_of(model.config, tokenizer) if spec is None else spec or None
    if not isinstance(found, LatentSpec) or found.equip is None:
        return found
    like = model.get_output_embeddings().weight
    extras = read_extras(name, found.extras, revision=revision)
    weights = {k: v.to(like.device, like.dtype) for k, v in extras.items()}
    if spec is None:
        found = family_of(model.config, tokenizer, weights) or found
    assert isinstance(found, LatentSpec)
    assert found.equip is not None
    return found.equip(found, model.config, weights)


def _in_words(config: Any, tokenizer: Any) -> TextSpec | None:
    """The family that imagines in words, told by its Hub id or by markers that are tokens."""
    vocabulary = {} if tokenizer is None else tokenizer.get_vocab()
    repository = str(getattr(config, "_name_or_path", ""))
    for spec in FAMILIES.values():
        if isinstance(spec, TextSpec) and (
            repository in spec.checkpoints or {spec.open, spec.close} <= set(vocabulary)
        ):
            return spec
    return None


def _candidates(config: Any, tokenizer: Any) -> list[LatentSpec]:
    """Every family whose tokens the checkpoint has, by strings, or else by config keys."""
    vocabulary = {} if tokenizer is None else tokenizer.get_vocab()
    specs = [s for name in RECOGNISED if isinstance(s := FAMILIES[name], LatentSpec)]
    whole = [spec for spec in specs if all(t in vocabulary for t in spec.strings)]
    if whole:
        return whole
    part = [spec for spec in specs if spec.open in vocabulary]
    # tokens that are no strings of this tokenizer may still be named by the config
    by_keys = [s for s in part or specs if not _missing(s, config, vocabulary)]
    if part and not by_keys:
        wanted = " or ".join(
            f"{spec.name} needs {', '.join(_missing(spec, config, vocabulary))}" for spec in part
        )
        raise CheckpointError(
            f"{_name(config)} has latent tokens in part: its tokenizer holds {part[0].open!r}, but "
            f"{wanted}, in neither the tokenizer nor the config; add the tokens, or pass "
            "spec=il.LatentSpec(...) with ids, or spec=False"
        )
    return by_keys


def _missing(spec: LatentSpec, config: Any, vocabulary: Mapping[str, int]) -> list[str]:
    """The tokens of a family that a checkpoint names nowhere."""
    keys = spec.config_keys or {}
    return [
        repr(token)
        for part in ("open", "close", "pad")
        if (token := getattr(spec, part)) not in vocabulary
        and getattr(config, keys.get(part, ""), None) is None
    ]


def _only(candidates: list[LatentSpec], config: Any) -> LatentSpec | None:
    """The one family that fits; of several, the one that the Hub id or a config key tells."""
    if len(candidates) < 2:
        return candidates[0] if candidates else None
    repository = str(getattr(config, "_name_or_path", ""))
    told = [s for s in candidates if repository in s.checkpoints] or [
        s for s in candidates if any(hasattr(config, key) for key in s.marks)
    ]
    if len(told) == 1:
        return told[0]
    names = [spec.name for spec in candidates]
    shared = sorted(set.intersection(*(set(spec.strings) for spec in candidates)))
    raise CheckpointError(
        f"{_name(config)} could be {' or '.join(names)}: its tokens and config keys are theirs "
        f"alike ({', '.join(shared) or 'config keys only'}), so say which, e.g. "
        f"spec=il.FAMILIES[{names[0]!r}]"
    )


def _name(config: Any) -> str:
    return repr(getattr(config, "_name_or_path", "") or "the checkpoint")
