"""Blocks that scale what their sublayers add: their sites are differences of the stream.

The judge is the block written out by hand, with the edits where they belong.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import GraniteConfig, GraniteForCausalLM

import imaginelens as il
from imaginelens.hooks import structure

EXACT = {"rtol": 0, "atol": 1e-12}
IDS = torch.arange(10, 19)[None]
SITES = ("resid_pre", "attn_out", "resid_mid", "mlp_out", "resid_post")
Edit = Callable[[torch.Tensor], torch.Tensor]
EDITS: dict[str, Edit] = {
    "resid_pre": lambda act: act * 0.9,
    "attn_out": lambda act: torch.cat([act[:, :4], act[:, 4:] + 0.3], dim=1),
    "resid_mid": lambda act: act * 1.1 - 0.2,
    "mlp_out": lambda act: act * 0.5 + 0.1,
    "resid_post": lambda act: act - 0.4,
}


def build(multiplier: float = 0.5) -> GraniteForCausalLM:
    torch.manual_seed(0)
    config = GraniteConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        residual_multiplier=multiplier,
        initializer_range=0.3,
    )
    return GraniteForCausalLM(config).to(torch.float64).eval()


@pytest.fixture
def lens() -> il.LatentModel:
    return il.LatentModel(build(), spec=False)


def logits(lens: il.LatentModel, edits: dict[str, Edit] | None = None) -> torch.Tensor:
    hooks = [
        (f"blocks.1.hook_{s}", lambda act, hook, f=f: f(act)) for s, f in (edits or {}).items()
    ]
    with torch.no_grad():
        return lens.run_with_hooks({"input_ids": IDS}, fwd_hooks=hooks)


def by_hand(
    monkeypatch: pytest.MonkeyPatch, lens: il.LatentModel, edits: dict[str, Edit]
) -> torch.Tensor:
    """The same edits in block 1 as plain code."""
    block = lens.model.model.layers[1]
    same: Edit = lambda act: act  # noqa: E731

    def forward(hidden_states: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        at = {site: edits.get(site, same) for site in SITES}
        pre = at["resid_pre"](hidden_states)
        attn, _ = block.self_attn(hidden_states=block.input_layernorm(pre), **kwargs)
        mid = at["resid_mid"](pre + at["attn_out"](attn * block.residual_multiplier))
        mlp = block.mlp(block.post_attention_layernorm(mid)) * block.residual_multiplier
        return at["resid_post"](mid + at["mlp_out"](mlp))

    with monkeypatch.context() as patch:
        patch.setattr(block, "forward", forward)
        return lens.model(input_ids=IDS, use_cache=False).logits


@pytest.mark.parametrize("site", SITES)
def test_an_edit_equals_the_block_written_by_hand(
    lens: il.LatentModel, monkeypatch: pytest.MonkeyPatch, site: str
) -> None:
    edits = {site: EDITS[site]}
    changed = logits(lens, edits)
    plain = by_hand(monkeypatch, lens, edits).detach()
    torch.testing.assert_close(changed, plain, **EXACT)
    assert (changed - logits(lens)).abs().max() > 1e-3


@pytest.mark.parametrize("order", [1, -1])
def test_edits_of_all_sites_act_in_the_order_of_the_stream(
    lens: il.LatentModel, monkeypatch: pytest.MonkeyPatch, order: int
) -> None:
    """Whatever the order of registration: sites share modules and tensors here."""
    edits = dict(list(EDITS.items())[::order])
    together = logits(lens, edits)
    plain = by_hand(monkeypatch, lens, EDITS).detach()
    torch.testing.assert_close(together, plain, **EXACT)


def test_what_is_read_adds_up_and_reading_changes_nothing(lens: il.LatentModel) -> None:
    names = [f"blocks.{i}.hook_{s}" for i in range(3) for s in SITES]
    read, cache = lens.run_with_cache({"input_ids": IDS}, names_filter=names)
    assert torch.equal(read, logits(lens))
    for i in range(3):
        pre, attn, mid, mlp, post = (cache[f"blocks.{i}.hook_{s}"] for s in SITES)
        torch.testing.assert_close(pre + attn, mid, **EXACT)
        torch.testing.assert_close(mid + mlp, post, **EXACT)


def test_a_read_is_the_scaled_output_of_the_sublayer(lens: il.LatentModel) -> None:
    seen: list[torch.Tensor] = []
    block = lens.model.model.layers[1]
    with torch.no_grad():
        handle = block.mlp.register_forward_hook(lambda m, a, out: seen.append(out * 0.5))
        _, cache = lens.run_with_cache({"input_ids": IDS}, names_filter="blocks.1.hook_mlp_out")
        handle.remove()
    torch.testing.assert_close(cache["mlp_out", 1], seen[0], **EXACT)


def test_a_sham_changes_no_bit(lens: il.LatentModel) -> None:
    plain = logits_of(lens)
    for site in SITES:
        with lens.edit(il.Sham(), at=il.positions([3, 5]), site=f"blocks.1.hook_{site}"):
            assert torch.equal(logits(lens), plain)


def logits_of(lens: il.LatentModel) -> torch.Tensor:
    with torch.no_grad():
        return lens.model(input_ids=IDS, use_cache=False).logits


@pytest.mark.parametrize("site", ["attn_out", "resid_mid", "mlp_out"])
def test_gradients_at_a_difference_are_those_of_what_is_added(
    lens: il.LatentModel, monkeypatch: pytest.MonkeyPatch, site: str
) -> None:
    seen: list[torch.Tensor] = []
    kept: list[torch.Tensor] = []
    name = f"blocks.1.hook_{site}"
    out = lens.run_with_hooks(
        {"input_ids": IDS}, bwd_hooks=[(name, lambda grad, hook: seen.append(grad.clone()))]
    )
    torch.testing.assert_close(out.detach(), logits(lens), **EXACT)
    out[0, -1, 7].backward()

    def keep(act: torch.Tensor) -> torch.Tensor:
        act.retain_grad()
        kept.append(act)
        return act

    by_hand(monkeypatch, lens, {site: keep})[0, -1, 7].backward()
    lens.model.zero_grad()
    torch.testing.assert_close(seen[0], kept[0].grad, **EXACT)
    assert seen[0].abs().max() > 1e-3


@pytest.mark.parametrize("site", ["attn_out", "resid_mid", "mlp_out"])
def test_an_edit_under_gradients_is_the_same_edit(lens: il.LatentModel, site: str) -> None:
    edit = EDITS[site]
    hooks = [(f"blocks.1.hook_{site}", lambda act, hook: edit(act))]
    out = lens.run_with_hooks({"input_ids": IDS}, fwd_hooks=hooks)
    assert out.requires_grad
    torch.testing.assert_close(out.detach(), logits(lens, {site: edit}), **EXACT)


def test_without_the_flag_the_sum_is_missed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(structure, "_FACTORS", ())
    lens = il.LatentModel(build(), spec=False)
    names = [f"blocks.1.hook_{s}" for s in SITES]
    _, cache = lens.run_with_cache({"input_ids": IDS}, names_filter=names)
    pre, attn, mid, _, _ = (cache[name] for name in names)
    assert (pre + attn - mid).abs().max() > 1e-2


def test_a_factor_of_one_leaves_the_sites_at_their_modules() -> None:
    plain = il.LatentModel(build(1.0), spec=False).registry
    scaled = il.LatentModel(build(0.5), spec=False).registry
    assert plain["blocks.1.hook_attn_out"].path.endswith("self_attn")
    assert scaled["blocks.1.hook_attn_out"].path.endswith("post_attention_layernorm")


def test_describe_says_which_sites_are_differences() -> None:
    said = "3 of 3 blocks gate or scale what their sublayers add"
    assert said in str(il.LatentModel(build(0.5), spec=False).describe())
    assert said not in str(il.LatentModel(build(1.0), spec=False).describe())
