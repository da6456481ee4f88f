"""Families whose semantics nobody can check, for there is no public inference that runs.

They load when they are asked for by name, with a note; no checkpoint is recognised as one of them,
and they are not counted among the families that are supported.
"""

from imaginelens.hooks import answers
from imaginelens.hooks.spec import LatentSpec

UNVERIFIED_FAMILIES: dict[str, LatentSpec] = {
    # ybb6/laser, src/model/qwen_laser_model.py:362-750. Left out, because the loop has no place for
    # it: three equal tokens end a span, and the first token of <answer> is forced behind it.
    "laser": LatentSpec(
        name="laser",
        open="<|laser_start|>",
        close="<|laser_end|>",
        pad="<|laser|>",
        config_keys={"open": "laser_start_id", "close": "laser_end_id", "pad": "laser_id"},
        trigger="forced",
        max_steps=8,
        emit="sampled",
        answer=answers.first_found(answers.between("<answer>", "</answer>"), answers.tail),
        checkpoints=("wybb/laser-7b",),
    ),
    # arXiv 2602.04476, text only: a fixed number of states between two tokens
    "valr": LatentSpec(
        name="valr",
        open="<latent>",
        close="</latent>",
        pad="<latent>",
        max_steps=8,
        fixed=True,
        emit="sampled",
    ),
}

NOTES: dict[str, str] = {
    "laser": "the released evaluation does not run and training never feeds states back, so this "
    "follows its generate loop alone, without its stop on three equal tokens",
    "valr": "there is no public code, the number of steps is a guess (set it with .with_steps(k)), "
    "and so is what stands in the token ids",
}
