"""The families whose latents are written vocabulary tokens: one entry each.

Token strings, counts and what is decoded were read from the released code, named beside each entry;
what the released checkpoints' tokenizers hold is not verified. All three use the stock model class
and stock `generate`.
"""

from imaginelens.hooks import answers
from imaginelens.hooks.vocabspans import VocabSpec

_TAGGED = answers.first_found(answers.between("<answer>", "</answer>"), answers.tail)

VOCAB_FAMILIES: dict[str, VocabSpec] = {
    # Wakals/CoVT, covt_qwen2_5_vl.py:1312 (plain token embeddings). Checkpoints trained on fewer
    # experts write fewer of the groups. An edit of the last layer reaches only the next token:
    # what later positions read of these is the residual below it.
    "covt": VocabSpec(
        name="covt",
        open="<|anchor_start|>",
        close="<|anchor_end|>",
        groups=(
            ("<|sam_pad|>",) * 8,
            ("<|depth_pad|>",) * 4,
            ("<|dino_pad|>",) * 4,
            ("<|pidinet_pad|>",) * 4,
        ),
        decodes="projected to SAM, DepthAnything, DINO and PIDINet in training",
        answer=_TAGGED,
        checkpoints=(
            "Wakals/CoVT-7B-seg",
            "Wakals/CoVT-7B-depth",
            "Wakals/CoVT-7B-seg_depth_dino",
            "Wakals/CoVT-7B-seg_depth_dino_edge",
            "Wakals/CoVT-LLaVA-13B-depth",
        ),
    ),
    # Svardfox/LaViT, training/src/modeling_lavit.py: hidden_states[-1] at the last of the four
    "lavit": VocabSpec(
        name="lavit",
        groups=(("<lvr1>", "<lvr2>", "<lvr3>", "<lvr4>"),),
        decodes="at <lvr4> aligned with a teacher's visual state and attention in training",
        answer=_TAGGED,
        marks=("v_top_dim", "use_trajectory_supervision"),
        checkpoints=("Svard/LaViT-3B",),
    ),
    # shawnricecake/Heima: one token for each stage of LLaVA-CoT. Released for torchtune; a folder
    # that transformers opens has to be converted first.
    "heima": VocabSpec(
        name="heima",
        groups=(
            ("<THINKING_OF_SUMMARY>",),
            ("<THINKING_OF_CAPTION>",),
            ("<THINKING_OF_REASONING>",),
        ),
        decodes="projected into a text model that spells the stage out",
        checkpoints=("shawnricecake/Heima",),
    ),
}
