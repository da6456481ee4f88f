"""nnterp's names: against what nnterp itself recorded, and against plain torch hooks."""

import json
from typing import Any

import nnsight
import pytest
import tiny
import tiny_huginn
import torch

import imaginelens as il
from examples.interop import nnterp_record, with_nnterp

# where transformers keeps the decoder of each family
DECODERS = {
    "qwen2_5_vl": "model.language_model",
    "llava": "model.language_model",
    "gemma3": "model.language_model",
    "idefics3": "model.text_model",
}


@pytest.fixture
def lens() -> Any:
    lens = il.load(nnterp_record.NAME)
    lens.model.double()
    return lens


@torch.no_grad()
def test_every_name_gives_what_nnterp_recorded(lens: Any) -> None:
    gaps = with_nnterp.off_from_nnterp(lens)
    assert len(gaps) == 13
    assert max(gaps.values()) < 1e-9, gaps
    sizes = json.loads(with_nnterp.RECORDED.read_text())["sizes"]
    assert {name: getattr(lens.nnterp, name) for name in sizes} == sizes


def test_the_example_runs_as_a_script(capsys: pytest.CaptureFixture[str]) -> None:
    with_nnterp.main()
    said = capsys.readouterr().out
    assert "off from nnterp 1.3.0 on nnsight 0.7.0:" in said
    assert "off by 0 from our edit" in said


@torch.no_grad()
def test_another_model_does_not_give_what_nnterp_recorded(lens: Any) -> None:
    """The record tells models apart: one that was trained otherwise has other numbers."""
    other = il.load("latent-ignored")
    other.model.double()
    gaps = with_nnterp.off_from_nnterp(other)
    assert min(gap for name, gap in gaps.items() if name != "token_embeddings") > 1e-3


@torch.no_grad()
def test_a_latent_is_steered_as_by_our_edit(lens: Any) -> None:
    moved, gap = with_nnterp.steered_latents(lens, lens.task(n=1, seed=0).base[0])
    assert moved > 0.1
    assert gap == 0.0


@pytest.mark.parametrize("name", DECODERS)
@torch.no_grad()
def test_names_are_those_modules_in_every_family(name: str) -> None:
    model, processor = tiny.build(name)
    lens = il.LatentModel(model.double().eval(), processor, spec=False)
    inputs = tiny.inputs(name, processor, ["what?"], [tiny.image(48, 32, seed=0)])
    decoder = model.get_submodule(DECODERS[name])
    modules = {
        "layers": decoder.layers[1],
        "attentions": decoder.layers[1].self_attn,
        "mlps": decoder.layers[1].mlp,
        "ln_final": decoder.norm,
        "embed_tokens": decoder.embed_tokens,
        "lm_head": model.lm_head,
    }
    seen: dict[str, torch.Tensor] = {}

    def keep(key: str) -> Any:
        def hook(module: Any, args: Any, out: Any) -> None:
            seen[key] = (out[0] if isinstance(out, tuple) else out).clone()

        return hook

    handles = [module.register_forward_hook(keep(key)) for key, module in modules.items()]
    logits = model(**inputs).logits
    for handle in handles:
        handle.remove()
    nn = lens.nnterp
    with nn.trace(**inputs):
        ids = nnsight.save(nn.input_ids)
        mask = nnsight.save(nn.attention_mask)
        embedded = nnsight.save(nn.token_embeddings.clone())
        attended = nnsight.save(nn.attentions_output[1].clone())
        thought = nnsight.save(nn.mlps_output[1].clone())
        left = nnsight.save(nn.layers_output[1].clone())
        normed = nnsight.save(nn.ln_final.output.clone())
        head = nnsight.save(nn.lm_head.output.clone())
        probs = nnsight.save(nn.next_token_probs)
    found = {
        "embed_tokens": embedded, "attentions": attended, "mlps": thought, "layers": left,
        "ln_final": normed, "lm_head": head,
    }  # fmt: skip
    for key, value in found.items():
        assert torch.equal(value, seen[key]), key
    assert torch.equal(ids, inputs["input_ids"])
    assert torch.equal(mask, inputs["attention_mask"])
    torch.testing.assert_close(probs, logits[:, -1].softmax(-1), rtol=0, atol=1e-12)
    assert nn.layers[-1]._module is decoder.layers[-1]
    assert (len(nn.layers), nn.num_layers, nn.hidden_size) == (3, 3, 64)


@torch.no_grad()
def test_what_is_assigned_is_what_the_model_goes_on_with(lens: Any) -> None:
    nn, inputs = lens.nnterp, nnterp_record.inputs(lens.model.config.image_token_id)
    with nn.trace(**inputs):
        nn.token_embeddings = nn.token_embeddings * 0 + 2
        embedded = nnsight.save(nn.embed_tokens.output)
        nn.layers_input[1] = nn.layers_input[1] * 0
        entered = nnsight.save(nn.attentions_input[1])
        kept = nnsight.save(nn.layers_input[2].clone())
        nn.attentions_output[2] = nn.attentions_output[2] * 0
        nn.mlps_output[2] = nn.mlps_output[2] * 0
        left = nnsight.save(nn.layers_output[2])
    assert (embedded == 2).all()
    assert not entered.any()
    assert torch.equal(left, kept)  # both sublayers add nothing
    with nn.trace(**inputs):
        nn.steer([0, 1], nnterp_record.vector(), token_positions=[0, 2], batch_index=0)
        two = nnsight.save(nn.layers_output[2])
    with nn.trace(**inputs):
        for layer in (0, 1):
            nn.layers_output[layer][:, [0, 2]] += nnterp_record.vector()
        by_hand = nnsight.save(nn.layers_output[2])
    assert torch.equal(two, by_hand)
    with nn.trace(**inputs):
        first = nnsight.save(nn.layers_input[0].clone())
        nn.skip_layers(0, 1, skip_with=first)
        skipped = nnsight.save(nn.layers_input[2])
    assert torch.equal(skipped, first)


def test_what_has_no_such_name_says_what_to_use(lens: Any) -> None:
    with pytest.raises(il.SiteUnavailable, match=r"names_filter='\*\.attn\.hook_pattern'"):
        _ = lens.nnterp.attention_probabilities
    with pytest.raises(AttributeError, match="have no 'layer_output'; what this model itself"):
        _ = lens.nnterp.layer_output
    with pytest.raises(IndexError, match="there is no layer 3 of 3"):
        _ = lens.nnterp.layers[3]
    assert lens.nnterp is lens.nnterp


def test_a_model_that_runs_its_blocks_again_has_raw_traces_and_no_such_names() -> None:
    tok = tiny.tokenizer(bos=False)
    config = tiny_huginn.HuginnConfig(vocab_size=len(tok), mean_recurrence=2, pad_token_id=0)
    lens = il.LatentModel(tiny_huginn.HuginnForCausalLM(config).double().eval(), tok)
    with pytest.raises(il.InputError, match="nnterp's names say nothing of which time"):
        _ = lens.nnterp
    ids = torch.tensor([tok.encode("2 and 2?")])
    site = "recurrences.1.hook_state"
    with lens.edit(il.Zero(), at=il.last_prompt, site=site):
        expected = lens.run_with_hooks({"input_ids": ids})
    with lens.edit(il.Zero(), at=il.last_prompt, site=site) as landing:
        with lens.nnsight.trace(input_ids=ids):
            found = nnsight.save(lens.nnsight.output.logits)
    assert torch.equal(found, expected)
    assert landing.fired == 1
