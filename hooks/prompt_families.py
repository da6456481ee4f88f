"""Families whose latents are opened by no sampled token: by the prompt, the loop, or at once.

Sources are named as far as their code was read; ids, configs and weights of the released
checkpoints are not verified.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch

from imaginelens.hooks import answers
from imaginelens.hooks.errors import CheckpointError
from imaginelens.hooks.heads import OnAll, build_head
from imaginelens.hooks.insertion import Insertion
from imaginelens.hooks.mixture import Mixture
from imaginelens.hooks.spec import LatentSpec

CODI_HEAD = "prj."


def _equip_codi(spec: LatentSpec, config: Any, weights: Mapping[str, torch.Tensor]) -> LatentSpec:
    """CODI with its head, and with the three ids that it adds behind a vocabulary."""
    size = config.get_text_config(decoder=True).vocab_size
    if spec.open is None:  # src/model.py: pad, begin and end of thought, none with a string
        spec = replace(spec, pad=size - 3, open=size - 2, close=size - 1)
    if spec.project is not None:
        return spec
    own = {name.removeprefix("module."): value for name, value in weights.items()}
    if not any(name.startswith(CODI_HEAD) for name in own):
        raise CheckpointError(
            f"codi needs the weights {CODI_HEAD}1, {CODI_HEAD}3 and {CODI_HEAD}ln of its head, and "
            f"the checkpoint holds {', '.join(sorted(own)) or 'no extra weights'}; for one trained "
            "without a head pass spec=dataclasses.replace(il.FAMILIES['codi'], equip=None, "
            "open=..., close=..., pad=...) with ids"
        )
    return replace(spec, project=OnAll(build_head(own, CODI_HEAD)))


# facebookresearch/coconut, coconut.py:96-156: the input at a placeholder is the last hidden state,
# behind the final norm, of the position before it; the prompt goes on behind the placeholders.
# Released at batch size one. c_thought x max_latent_stage = 2 x 3 placeholders (args/*.yaml).
_COCONUT = LatentSpec(
    name="coconut",
    open="<|start-latent|>",
    close="<|end-latent|>",
    pad="<|latent|>",
    trigger="prompt",
    max_steps=6,
    answer=answers.first_found(answers.after("###"), answers.tail),
)

PROMPT_FAMILIES: dict[str, LatentSpec] = {
    "coconut": _COCONUT,
    # InternLM/SIM-CoT, Coconut/coconut.py: the same loop over 2 x 5 placeholders; its auxiliary
    # decoder is for training only. Nothing in a tokenizer tells it from Coconut.
    "sim-cot": replace(_COCONUT, name="sim-cot", max_steps=10),
    # FYYDCC/IVT-LR, qwen_vl/qwen_ivtlr.py: Coconut's loop on Qwen2-VL, and before each latent the
    # 32 image tokens that the position before it looks at most. Its evaluation writes three
    # placeholders behind the generation prompt, without start and end tokens. Released at batch
    # size one, as LoRA in pickles; a first token that ends the text did not end it there. Its
    # tokenizer is Coconut's. Its variant for Chameleon (64 tokens) is not modelled.
    "ivt-lr": replace(
        _COCONUT,
        name="ivt-lr",
        open=None,
        close=None,
        max_steps=3,
        inserts=Insertion(patches=32),
        answer=answers.first_found(answers.after("answer is"), answers.tail),
        checkpoints=("FYYDCC/IVTLR",),
    ),
    # zhenyi4/codi, test.py:213-245. The begin-of-thought id is written behind the prompt, six
    # latents follow, the state behind the last of them is discarded, the end-of-thought id is
    # forced. This is what its scripts run (remove_eos); these eight tokens count as generated.
    "codi": LatentSpec(
        name="codi",
        open=None,
        close=None,
        pad=None,
        trigger="forced",
        forced_at=0,
        max_steps=6,
        fixed=True,
        extras=(CODI_HEAD, f"module.{CODI_HEAD}"),
        equip=_equip_codi,
        answer=answers.first_found(answers.after("The answer is:"), answers.tail),
        checkpoints=("zen-E/CODI-gpt2", "zen-E/CODI-llama3.2-1b-Instruct"),
    ),
    # eric-ai-lab/Soft-Thinking, layers/sampler.py, layers/vocab_parallel_embedding.py:494-512,
    # managers/schedule_batch.py:726-760. Needs no training, so any model with the close token can
    # be run like this, by name only. Its Dirichlet noise, which the paper does not use, is left
    # out. Released greedy decoding mixes nothing; here it does, at temperature 1.
    "soft-thinking": LatentSpec(
        name="soft-thinking",
        open=None,
        close="</think>",
        pad=None,
        trigger="always",
        feeds=Mixture(),
        max_steps=32768,  # thinking has no cap of its own: longer than any generation
        emit="sampled",
        answer=answers.first_found(answers.boxed, answers.tail),
    ),
    # eric-ai-lab/DMLR, DMLR/inference.py:169,490-740,790. Its placeholders are free vectors, which
    # it optimises per example (noise, a reward of confidence). That search is the user's: write
    # vectors with an edit or a hook at hook_latent, and read the reward from run.logits. They begin
    # as the placeholder's own embedding, and keep the positions that the prompt gives them.
    "dmlr": LatentSpec(
        name="dmlr",
        open=None,
        close=None,
        pad="<|endoftext|>",
        trigger="prompt",
        feeds="embedding",
        max_steps=8,
    ),
}

# The others are chosen by name: a checkpoint does not show that it is meant so.
PROMPT_RECOGNISED = ("coconut",)
