"""What a class cannot do is one sentence, said when it is wrapped or asked, never a bare error."""

import pytest
import torch
import walk_checks
from transformers import T5Config, T5ForConditionalGeneration

import imaginelens as il
from imaginelens.hooks.bytoken import by_token
from imaginelens.hooks.structure import find_structure


@pytest.mark.parametrize(
    ("model_type", "said"),
    [
        ("pi0", r"PI0Config, which is the text config of PI0ForCond.*, has no num_hidden_layers"),
        ("pp_formulanet", r"has no token embedding that get_input_embeddings\(\) finds \(it is an"),
        ("florence2", r"has no final norm .* \(it is an encoder-decoder, whose decoder does not"),
        ("blip", r"has no list of 2 decoder blocks below .*; .*il\.register_structure"),
    ],
)
def test_a_class_that_cannot_be_wrapped_says_why(model_type: str, said: str) -> None:
    with pytest.raises(il.SiteUnavailable, match=said):
        find_structure(walk_checks.build(model_type))


def test_a_class_whose_images_are_words_says_that_nothing_is_projected() -> None:
    lens = il.LatentModel(walk_checks.build("chameleon"), spec=False)
    with pytest.raises(il.SiteUnavailable, match=r"become ids of a codebook \(model\.vqmodel\)"):
        lens.registry["vision_projector.hook_out"]


def test_a_class_with_a_bias_of_its_own_offers_no_pattern() -> None:
    """The attention written out here would leave the bias out, and edits would be of another."""
    lens = il.LatentModel(walk_checks.build("inkling_mm_model"), spec=False)
    with pytest.raises(il.SiteUnavailable, match="adds a position bias of its own to the scores"):
        lens.registry["blocks.0.attn.hook_pattern"]


def test_images_by_cross_attention_are_described() -> None:
    lens = il.LatentModel(walk_checks.build("mllama"), spec=False)
    said = str(lens.describe())
    assert (
        "images come by cross-attention (layers.1.cross_attn): no position shows a part of" in said
    )
    assert "il.image finds only what stands for a whole one" in said
    assert "grid: none (images come by cross-attention)" in said


def test_an_encoder_decoder_is_read_and_not_run() -> None:
    torch.manual_seed(0)
    config = T5Config(vocab_size=32, d_model=16, d_kv=4, d_ff=24, num_layers=2, num_heads=4)
    model = T5ForConditionalGeneration(config).eval()
    said = "T5ForConditionalGeneration is an encoder-decoder: its decoder does not hold the prompt"
    with pytest.raises(il.SiteUnavailable, match=said), by_token(model, {}):
        pass


def test_what_a_class_is_given_for_a_run_is_taken_back() -> None:
    model = walk_checks.build("blip-2")
    before = sorted(vars(model)), len(model._forward_pre_hooks)
    with by_token(model, {}):
        assert sorted(vars(model)) != before[0]
    with pytest.raises(ZeroDivisionError), by_token(model, {}):
        raise ZeroDivisionError
    assert (sorted(vars(model)), len(model._forward_pre_hooks)) == before
