"""Norms are read from what they do, and weights are offered where they mean what they seem to."""

import pytest
import torch
from torch import nn
from transformers import OPTConfig, OPTForCausalLM, StableLmConfig, StableLmForCausalLM
from transformers.models.cohere.modeling_cohere import CohereLayerNorm
from transformers.models.gemma3.modeling_gemma3 import Gemma3RMSNorm

import imaginelens as il
from imaginelens.hooks.weights import NormReading, read_norm

D = 8


def filled(norm: nn.Module) -> nn.Module:
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in norm.parameters():
            parameter.copy_(torch.randn_like(parameter))
    return norm.double()


def reading(norm: nn.Module) -> NormReading | None:
    with torch.no_grad():
        return read_norm(norm, torch.zeros(D, dtype=torch.float64))


@pytest.mark.parametrize(
    ("norm", "gain", "centred"),
    [
        (nn.LayerNorm(D), lambda m: m.weight, True),
        (nn.LayerNorm(D, elementwise_affine=False), lambda m: torch.ones(D).double(), True),
        (nn.RMSNorm(D, eps=1e-5), lambda m: m.weight, False),
        (Gemma3RMSNorm(D), lambda m: 1 + m.weight, False),
        (CohereLayerNorm(D), lambda m: m.weight, True),
    ],
    ids=["layer", "bare", "rms", "gemma", "cohere"],
)
def test_gain_and_scale_of_every_kind_of_norm(norm: nn.Module, gain: object, centred: bool) -> None:
    found = reading(filled(norm))
    assert found is not None
    assert found.centred is centred
    # some classes compute in float32, whatever they are given
    torch.testing.assert_close(found.gain, gain(norm).detach(), rtol=0, atol=1e-6)  # type: ignore[operator]
    x = torch.randn(3, 5, D, dtype=torch.float64) + 2
    inner = x - x.mean(-1, keepdim=True) if centred else x
    scale = found.scale(x)
    assert scale is not None
    torch.testing.assert_close(
        scale, inner.square().mean(-1, keepdim=True).sqrt(), rtol=1e-3, atol=0
    )
    with torch.no_grad():
        made = inner * found.gain / scale + found.shift
        torch.testing.assert_close(made, norm(x), rtol=0, atol=1e-5)


class Capped(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.tanh(x)


class Mixing(nn.Module):
    """Makes one stream of four."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.unflatten(-1, (4, -1)).sum(-2)


def test_what_is_no_norm_is_not_taken_for_one() -> None:
    found = reading(Capped())
    assert found is not None
    assert found.scale(torch.randn(3, D, dtype=torch.float64)) is None
    assert reading(Mixing()) is None
    assert reading(nn.Linear(2 * D, D).double()) is None


def test_terms_of_a_stream_behind_a_layer_norm_add_up_to_the_logits() -> None:
    config = StableLmConfig(
        vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, use_qkv_bias=True,
        max_position_embeddings=64, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    torch.manual_seed(0)
    model = filled(StableLmForCausalLM(config)).eval()
    bound = il.LatentModel(model).transformer_lens({"input_ids": torch.tensor([[3, 4, 5, 6]])})
    assert bound.cfg.normalization_type == "LN"
    with torch.no_grad():
        logits, cache = bound.run_with_cache()
        parts = cache.get_full_resid_decomposition()
        found = cache.logit_attrs(parts, 7, 9)
    shift = bound.ln_final(torch.zeros(1, 1, 16).double())[0, 0]  # no term's, but the norm's own
    wanted = logits[..., 7] - logits[..., 9] - shift @ (bound.W_U[:, 7] - bound.W_U[:, 9])
    assert "hook_pos_embed" not in cache
    torch.testing.assert_close(found.sum(0), wanted, rtol=1e-9, atol=1e-9)
    assert bound.blocks[0].attn.W_K.shape == (2, 16, 4)
    assert bound.blocks[1].attn.b_Q.shape == (4, 4)


def test_weights_that_are_no_terms_of_the_stream_are_not_offered() -> None:
    config = OPTConfig(
        vocab_size=32, hidden_size=16, ffn_dim=24, num_hidden_layers=1, num_attention_heads=4,
        max_position_embeddings=64, word_embed_proj_dim=16,
    )  # fmt: skip
    bound = il.LatentModel(OPTForCausalLM(config).eval()).transformer_lens(
        {"input_ids": torch.tensor([[3, 4, 5]])}
    )
    with pytest.raises(il.SiteUnavailable, match=r"blocks\.0\.attn\.W_O is not offered: .*between"):
        _ = bound.blocks[0].attn.W_O
