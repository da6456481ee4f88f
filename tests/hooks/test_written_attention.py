"""The attention that is written out here is the class's own, or it refuses: nothing that a class
has its attention use is left out in silence."""

import pytest
import tiny
import torch
import walk_checks
import walk_inputs

import imaginelens as il
from imaginelens.hooks import attention

TOP = 64  # keys that each query keeps, in the tiny sparse models


@pytest.fixture(params=["dots3_note", "mistral_large4"], scope="module")
def sparse(request: pytest.FixtureRequest) -> il.LatentModel:
    return il.LatentModel(walk_checks.build(request.param), spec=False)


def long_prompt(lens: il.LatentModel) -> dict[str, torch.Tensor]:
    return walk_inputs.text_inputs(lens.model, n=TOP + 26)


def patterns(lens: il.LatentModel) -> list[str]:
    return [name for name in lens.registry if name.endswith("hook_pattern")]


def test_keys_that_a_sparse_class_drops_are_dropped_here(sparse: il.LatentModel) -> None:
    """Its fused path is the oracle: for it the class writes what is dropped into the mask."""
    given = long_prompt(sparse)
    with torch.no_grad():
        wanted = sparse.model(**given, use_cache=False).logits
    logits, cache = sparse.run_with_cache(given, names_filter=patterns(sparse))
    torch.testing.assert_close(logits, wanted, rtol=0, atol=1e-5)
    for name in patterns(sparse):
        assert int((cache[name][0, -1] > 0).any(0).sum()) == TOP
        torch.testing.assert_close(cache[name].sum(-1), torch.ones_like(cache[name][..., 0]))


def test_left_out_it_shows(sparse: il.LatentModel, monkeypatch: pytest.MonkeyPatch) -> None:
    given = long_prompt(sparse)
    with torch.no_grad():
        wanted = sparse.model(**given, use_cache=False).logits
    monkeypatch.setattr(attention, "_sparse", lambda query, key, mask, indices: mask)
    logits, _ = sparse.run_with_cache(given, names_filter=patterns(sparse))
    assert (logits - wanted).abs().max() > 1e-3


def test_an_unknown_tensor_is_refused_in_one_sentence() -> None:
    lens = il.LatentModel(walk_checks.build("llava"), spec=False)
    given = {**walk_inputs.text_inputs(lens.model), "block_bias": torch.ones(1, 4, 12, 12)}
    said = (
        r"LlamaAttention gives its attention the tensor 'block_bias', which the attention written "
        r"out here does not know, .*; edit hook_z instead$"
    )
    for name in ("blocks.0.attn.hook_pattern", "blocks.1.attn.hook_rot_k"):
        with pytest.raises(il.SiteUnavailable, match=said):
            lens.run_with_cache(given, names_filter=name)
    cut = lens.edit(il.Knockout(), at=il.positions([2]))
    with cut, pytest.raises(il.SiteUnavailable, match=said):
        lens.run_with_hooks(given)
    assert lens.registry.entries == []


def test_positions_and_numbers_that_are_passed_along_are_none_of_its_business() -> None:
    lens = il.LatentModel(walk_checks.build("llava"), spec=False)
    given = walk_inputs.text_inputs(lens.model)
    given["position_ids"] = torch.arange(12)[None]
    with torch.no_grad():
        wanted = lens.model(**given, use_cache=False).logits
    logits, _ = lens.run_with_cache(given, names_filter="*.hook_pattern")
    torch.testing.assert_close(logits, wanted, rtol=0, atol=1e-9)


def test_what_a_class_only_hands_through_is_no_business_of_attention() -> None:
    """LLaVA-OneVision hands all of its arguments down, also which logits to keep."""
    lens = il.LatentModel(*tiny.build("llava_onevision"), spec=False)
    text = tiny.prompt("llava_onevision", "red?")
    run = lens.run({"images": tiny.image(40, 24, seed=0), "text": text}, max_new_tokens=3)
    options = {"at": il.last_prompt, "context": "fixed"}
    for site in ("attn.hook_rot_k", "attn.hook_v"):
        result = lens.ablate(run, il.Zero(), site=f"blocks.1.{site}", **options)
        assert float(result.effect.abs()) > 0
