"""The latent-reasoning families this library knows: one entry each.

What an entry says was read from the released code, named beside it; ids and configs of the released
checkpoints themselves are not verified. A family is recognised by the strings of its tokenizer,
then by config keys; where families share both, the Hub id or a key of its own tells them apart, or
nothing is guessed.
"""

import sys
from collections.abc import Collection, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import PreTrainedModel

from imaginelens.hooks import answers
from imaginelens.hooks.depth import DepthSpec
from imaginelens.hooks.depth_families import DEPTH_FAMILIES
from imaginelens.hooks.errors import CheckpointError, InputError
from imaginelens.hooks.heads import NearTo, OnLatents, build_head, read_extras
from imaginelens.hooks.prompt_families import PROMPT_FAMILIES, PROMPT_RECOGNISED
from imaginelens.hooks.sketch_family import SKETCH_FAMILIES
from imaginelens.hooks.spec import LatentSpec, PromptStyle
from imaginelens.hooks.textspans import CLOSE, TextSpec
from imaginelens.hooks.unverified import NOTES, UNVERIFIED_FAMILIES
from imaginelens.hooks.vocab_families import VOCAB_FAMILIES
from imaginelens.hooks.vocabspans import VocabSpec

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

Family = LatentSpec | TextSpec | VocabSpec | DepthSpec

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
    **PROMPT_FAMILIES,
    **SKETCH_FAMILIES,
    **VOCAB_FAMILIES,
    **DEPTH_FAMILIES,
    **UNVERIFIED_FAMILIES,
}

# The others are chosen by name: a checkpoint does not show that it is meant so.
RECOGNISED = ("monet", "lvr", "mirage", "ilvr", "skila", "swimbird")
_recognised = [*RECOGNISED, *PROMPT_RECOGNISED, *VOCAB_FAMILIES]


def register_family(spec: Family) -> None:
    """Add a family of your own to those that `il.load` recognises, and to `il.FAMILIES`.

    A checkpoint is recognised by all tokens of the family together, by its config keys or Hub ids.
    For one checkpoint alone, pass the spec to `il.load(..., spec=spec)` instead.

    Raises:
        InputError: `spec` is no spec; its name or a Hub id is taken; its tokens are also those of
            another family, so that neither could be told; or there is nothing to tell it by.

    >>> register_family(LatentSpec(name="doc", open="<o>", close="</o>", pad="<p>", max_steps=2))
    >>> FAMILIES.pop("doc").max_steps
    2
    """
    if not isinstance(spec, Family):
        raise InputError(
            f"a {type(spec).__name__} is no family; give il.LatentSpec(...), il.VocabSpec(...) or "
            "il.TextSpec(...)"
        )
    if not spec.name or spec.name in FAMILIES:
        raise InputError(
            f"there is a family {spec.name!r} already; give yours another name"
            if spec.name
            else "a family needs a name; give it one"
        )
    own = _signs(spec)
    for other in FAMILIES.values():
        theirs = _signs(other)
        if min(len(own), len(theirs)) > 1 and (own <= theirs or theirs <= own):
            raise InputError(
                f"{spec.name!r} has the tokens {', '.join(sorted(own & theirs))}, which are those "
                f"of {other.name!r}, so that no checkpoint would show which it is; rename them, or "
                "pass spec=... to il.load"
            )
        if taken := set(spec.checkpoints) & set(other.checkpoints):
            raise InputError(f"{min(taken)!r} belongs to the family {other.name!r} already")
    keys = isinstance(spec, LatentSpec) and {*(spec.config_keys or {})} >= {"open", "close", "pad"}
    if len(own) < 2 and not keys and not spec.checkpoints:
        raise InputError(
            f"{spec.name!r} could not be recognised by {len(own)} token; give it more tokens as "
            "strings, config_keys for them, or Hub ids as checkpoints"
        )
    FAMILIES[spec.name] = spec
    if not isinstance(spec, TextSpec):
        _recognised.append(spec.name)


def named(spec: Family | str | Literal[False]) -> Family | Literal[False]:
    """The family of a name; a spec as it is.

    Raises:
        CheckpointError: there is no such family.
    """
    if not isinstance(spec, str):
        return spec
    if spec not in FAMILIES:
        raise CheckpointError(
            f"there is no family {spec!r}; choose one of {', '.join(FAMILIES)}, or pass "
            "spec=il.LatentSpec(...)"
        )
    return FAMILIES[spec]


def check_rows(spec: Family, ids: Collection[int], model: PreTrainedModel) -> None:
    """Refuse token ids that a model has no embedding for: its vocabulary was never resized.

    Raises:
        CheckpointError: an id is not among the rows.
    """
    rows = len(model.get_input_embeddings().weight)
    if max(ids, default=0) >= rows:
        raise CheckpointError(
            f"the tokens of {spec.name} have ids up to {max(ids)}, and the {type(model).__name__} "
            f"has {rows} rows of token embeddings; open the checkpoint that was trained with them, "
            "or call model.resize_token_embeddings(len(tokenizer)) before you train"
        )


def note(spec: Family | None) -> None:
    """Say on stderr what is not verified about a family."""
    if spec is not None and spec.name in NOTES:
        print(f"imaginelens: {spec.name} is not verified: {NOTES[spec.name]}", file=sys.stderr)


def _signs(spec: Family) -> set[str]:
    """The tokens by which a family is recognised."""
    return {spec.open, spec.close} if isinstance(spec, TextSpec) else set(spec.strings)


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
    name = getattr(config, "imaginelens_family", None)
    if name is not None and name not in FAMILIES:
        raise CheckpointError(
            f"the config names the family {name!r}, which is not one of {', '.join(FAMILIES)}; "
            "pass spec=il.LatentSpec(...)"
        )
    vocabulary = {} if tokenizer is None else tokenizer.get_vocab()
    spec: Family | None = FAMILIES[name] if name is not None else in_depth(config)
    if spec is None:
        spec = _only(_candidates(config, vocabulary), config, vocabulary)
    if spec is None:
        return _in_words(config, tokenizer)
    if not isinstance(spec, LatentSpec):
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


def in_depth(config: Any) -> DepthSpec | None:
    """The family that recurs in depth, told by the type of its config."""
    model_type = getattr(config, "model_type", None)
    specs = [spec for spec in FAMILIES.values() if isinstance(spec, DepthSpec)]
    return next((spec for spec in specs if model_type in spec.model_types), None)


def _in_words(config: Any, tokenizer: Any) -> TextSpec | None:
    """The family that imagines in words, told by its Hub id or by markers that are tokens."""
    vocabulary = {} if tokenizer is None else tokenizer.get_vocab()
    for spec in FAMILIES.values():
        if isinstance(spec, TextSpec) and (
            _repository(config) in spec.checkpoints or {spec.open, spec.close} <= set(vocabulary)
        ):
            return spec
    return None


def _candidates(config: Any, vocabulary: Mapping[str, int]) -> list[LatentSpec | VocabSpec]:
    """Every family whose tokens the checkpoint has, by strings, or else by config keys."""
    others = TextSpec | DepthSpec | None
    specs = [s for n in _recognised if not isinstance(s := FAMILIES.get(n), others)]
    whole = [spec for spec in specs if _whole(spec, config, vocabulary)]
    if whole:
        return whole
    part = [spec for spec in specs if _begun(spec, vocabulary)]
    # tokens that are no strings of this tokenizer may still be named by the config
    by_keys: list[LatentSpec | VocabSpec] = [
        s
        for s in part or specs
        if isinstance(s, LatentSpec) and not _missing(s, config, vocabulary)
    ]
    if part and not by_keys:
        wanted = " or ".join(
            f"{spec.name} needs {', '.join(_missing(spec, config, vocabulary))}" for spec in part
        )
        there = next(token for token in part[0].strings if token in vocabulary)
        raise CheckpointError(
            f"{_name(config)} has latent tokens in part: its tokenizer holds {there!r}, but "
            f"{wanted}, in neither the tokenizer nor the config; add the tokens, or pass "
            "spec=il.LatentSpec(...) with ids, or spec=False"
        )
    return by_keys


def _whole(spec: LatentSpec | VocabSpec, config: Any, vocabulary: Mapping[str, int]) -> bool:
    """Whether a tokenizer holds a family's tokens. One token alone shows nothing."""
    if isinstance(spec, VocabSpec):
        return spec.fits(vocabulary) or (
            _repository(config) in spec.checkpoints
            and any(set(group) <= set(vocabulary) for group in spec.groups)
        )
    return len(spec.strings) > 1 and all(token in vocabulary for token in spec.strings)


def _begun(spec: LatentSpec | VocabSpec, vocabulary: Mapping[str, int]) -> bool:
    """Whether a tokenizer that does not hold all of a family's tokens holds what begins a span."""
    if isinstance(spec, VocabSpec):
        return len(spec.strings) > 1 and any(token in vocabulary for token in spec.strings)
    return spec.open in vocabulary


def _missing(spec: LatentSpec | VocabSpec, config: Any, vocabulary: Mapping[str, int]) -> list[str]:
    """The tokens of a family that a checkpoint names nowhere."""
    if isinstance(spec, VocabSpec):
        return [repr(token) for token in spec.strings if token not in vocabulary]
    keys = spec.config_keys or {}
    return [
        repr(token)
        for part in ("open", "close", "pad")
        if (token := getattr(spec, part)) not in vocabulary
        and getattr(config, keys.get(part, ""), None) is None
    ]


def _only(
    candidates: list[LatentSpec | VocabSpec], config: Any, vocabulary: Mapping[str, int]
) -> LatentSpec | VocabSpec | None:
    """The one family that fits; of several, the one that the Hub id or a config key tells."""
    if len(candidates) < 2:
        return candidates[0] if candidates else None
    told = [s for s in candidates if _repository(config) in s.checkpoints] or [
        s for s in candidates if any(hasattr(config, key) for key in s.marks)
    ]
    if len(told) == 1:
        return told[0]
    names = [spec.name for spec in candidates]
    shared = sorted(set.intersection(*(set(spec.strings) for spec in candidates)))
    if not shared and all(set(spec.strings) & set(vocabulary) for spec in candidates):
        why = "it has the tokens of each"
    else:
        alike = ", ".join(shared) or "config keys only"
        why = f"its tokens and config keys are theirs alike ({alike})"
    raise CheckpointError(
        f"{_name(config)} could be {' or '.join(names)}: {why}, so say which, e.g. "
        f"spec=il.FAMILIES[{names[0]!r}]"
    )


def _repository(config: Any) -> str:
    return str(getattr(config, "_name_or_path", ""))


def _name(config: Any) -> str:
    return repr(getattr(config, "_name_or_path", "") or "the checkpoint")
