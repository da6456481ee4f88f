"""TransformerLens' own functions on our models: they read the picture and the latents as well."""

from typing import Any

import oracle
import pytest
import tiny
import torch
from transformer_lens import ActivationCache, patching
from transformer_lens.model_bridge.sources._bridge_builder import build_bridge_from_module
from transformer_lens.model_bridge.supported_architectures.llava import LlavaArchitectureAdapter
from transformer_lens.model_bridge.supported_architectures.qwen2_5_vl import (
    Qwen2_5_VLArchitectureAdapter,
)
from transformer_lens.model_protocol import (
    TransformerLensModel,
    TransformerLensModelWithWeights,
)
from transformer_lens.tools.analysis import interchange, logit_lens
from transformer_lens.tools.analysis.attribution_patching import cache_activation_and_gradient
from transformer_lens.tools.analysis.sparse_probing import fit_sparse_probe

import imaginelens as il
from imaginelens.hooks.bound import BoundModel, from_transformer_lens, to_transformer_lens

SPEC = il.LatentSpec(
    name="test", open="<|latent_start|>", close="<|latent_end|>", pad="<|latent_pad|>", max_steps=3
)


def lens_of(name: str) -> il.LatentModel:
    return il.LatentModel(*tiny.build(name), spec=SPEC)


def shown(name: str, seed: int) -> dict[str, Any]:
    """The same question about another picture of the same size."""
    return {"images": tiny.image(32, 24, seed), "text": tiny.prompt(name, "what?")}


def metric(logits: torch.Tensor) -> torch.Tensor:
    return logits[0, -1, 5] - logits[0, -1, 9]


@pytest.fixture(scope="module")
def organism() -> tuple[il.LatentModel, il.Run, il.Run]:
    lens = il.load("latent-content")
    task = lens.task(n=3, seed=0)
    return lens, lens.run(task.base), lens.run(task.source)


# ---- its patching, unchanged -----------------------------------------------------------------

PATCHING = {
    "hook_resid_pre": patching.get_act_patch_resid_pre,
    "hook_resid_mid": patching.get_act_patch_resid_mid,
    "hook_attn_out": patching.get_act_patch_attn_out,
    "hook_mlp_out": patching.get_act_patch_mlp_out,
}


@pytest.mark.parametrize("site", PATCHING)
@pytest.mark.parametrize("name", ["qwen2_5_vl", "llava"])
def test_patching_equals_plain_torch_hooks_to_the_last_bit(name: str, site: str) -> None:
    lens = lens_of(name)
    base, source = (lens.transformer_lens(shown(name, seed)) for seed in (0, 1))
    with torch.no_grad():
        _, cache = source.run_with_cache(source.tokens)
        found = PATCHING[site](base, base.tokens, cache, metric)
    model = lens.model
    inputs, donor = (
        {**lens.prompt(shown(name, s)).inputs, "position_ids": tiny.positions(model, batch)}
        if name == "qwen2_5_vl"
        else batch
        for s in (0, 1)
        for batch in [lens.prompt(shown(name, s)).inputs]
    )
    assert found.shape == (3, base.tokens.shape[1])
    for layer, position in [(0, 3), (1, 7), (2, -2), (1, -1)]:
        at = f"blocks.{layer}.{site}"
        given = oracle.read(name, model, at, donor)

        def put(act: torch.Tensor, given: torch.Tensor = given, p: int = position) -> torch.Tensor:
            new = act.clone()
            new[:, p] = given[:, p]
            return new

        wanted = metric(oracle.edited(name, model, at, inputs, put))
        assert abs(found[layer, position].item() - wanted.item()) < 1e-6  # its table is float32
        with torch.no_grad():
            hook = lambda act, hook, put=put: put(act)  # noqa: E731
            ours = base.run_with_hooks(base.tokens, fwd_hooks=[(at, hook)])
        assert torch.equal(metric(ours), wanted)


def bridged(name: str) -> tuple[Any, il.LatentModel]:
    """A TransformerBridge of a new model, and our lens on the same weights without a bridge."""
    adapter = {"qwen2_5_vl": Qwen2_5_VLArchitectureAdapter, "llava": LlavaArchitectureAdapter}[name]
    adapter.required_libraries = []  # torchvision, which only its own loader uses
    model, _ = tiny.fresh(name, dtype=torch.float32)
    bridge = build_bridge_from_module(model, type(model).__name__, hf_config=model.config)
    return bridge, il.LatentModel(*tiny.build(name, dtype=torch.float32), spec=SPEC)


@pytest.mark.parametrize("name", ["qwen2_5_vl", "llava"])
def test_the_same_call_on_a_bridge_never_sees_the_picture(name: str) -> None:
    bridge, lens = bridged(name)
    table = patching.get_act_patch_resid_pre
    ours, theirs = [], []
    for seed in (0, 1):
        base = lens.transformer_lens(shown(name, seed))
        source = lens.transformer_lens(shown(name, 2))
        with torch.no_grad():
            _, cache = source.run_with_cache(source.tokens)
            ours.append(table(base, base.tokens, cache, metric))
            _, cache = bridge.run_with_cache(base.tokens)
            theirs.append(table(bridge, base.tokens, cache, metric))
    assert torch.equal(*theirs)  # whatever the picture was
    assert not torch.allclose(*ours, atol=1e-3)


def test_latents_are_patched_as_our_own_sweep_does_it(
    organism: tuple[il.LatentModel, il.Run, il.Run],
) -> None:
    lens = organism[0]
    task = lens.task(n=1, seed=0)
    base, source = lens.run(task.base), lens.run(task.source)
    bound, donor = lens.transformer_lens(base), lens.transformer_lens(source)
    _, cache = donor.run_with_cache(donor.tokens)
    script = lens.script(base)
    (read_at,) = script.read_at
    right, wrong = (lens.encode(a)[0] for a in (task.source_answers[0], task.base_answers[0]))
    columns = il.latent.resolve(base.tokens, 0)

    def diff(logits: torch.Tensor) -> torch.Tensor:
        return logits[:, read_at, right] - logits[:, read_at, wrong]

    with torch.no_grad():
        table = patching.get_act_patch_resid_pre(
            bound, bound.tokens, cache, diff, reduce="none", baseline=True
        )
    assert type(table).__name__ == "PatchingResult"
    effect = table.effect()[..., 0]
    ours = il.sweep(
        lens, task, sites="resid_pre", positions=il.latent, metric=il.logit_diff, context="fixed"
    ).to_dataframe()
    assert len(ours) == 6
    for row in ours.itertuples():
        step = int(str(row.position).split("[")[1].rstrip("]"))
        assert effect[row.layer, columns[step]].item() == pytest.approx(row.effect, abs=1e-4)


def test_heads_and_patterns_have_its_axes(
    organism: tuple[il.LatentModel, il.Run, il.Run],
) -> None:
    lens, base, source = organism
    bound, donor = lens.transformer_lens(base), lens.transformer_lens(source)
    _, cache = donor.run_with_cache(donor.tokens)
    _, own = lens.run_with_cache(source, names_filter="*.attn.hook_*")
    assert cache["pattern", 1].shape[1] == bound.cfg.n_heads
    assert torch.equal(cache["pattern", 1], own["pattern", 1].transpose(1, 2))
    assert torch.equal(cache["z", 1], own["z", 1])
    torch.testing.assert_close(cache["pattern", 1].sum(-1), torch.ones(3, 4, bound.tokens.shape[1]))
    for function in (
        patching.get_act_patch_attn_head_out_all_pos,
        patching.get_act_patch_attn_head_pattern_all_pos,
    ):
        assert function(bound, bound.tokens, cache, metric).shape == (3, 4)


# ---- its other tools -------------------------------------------------------------------------


def test_its_logit_lens_ends_in_the_logits(
    organism: tuple[il.LatentModel, il.Run, il.Run],
) -> None:
    lens, base, _ = organism
    bound = lens.transformer_lens(base)
    assert isinstance(bound, TransformerLensModel)
    assert isinstance(bound, TransformerLensModelWithWeights)
    found = logit_lens(bound, bound.tokens, positions=None)
    assert found.labels == ["0_pre", "1_pre", "2_pre", "final_post"]
    torch.testing.assert_close(found.values[-1], bound(bound.tokens), rtol=0, atol=1e-4)
    assert (found.values[1] - found.values[-1]).abs().max() > 1


def test_its_attribution_caches_our_gradients(
    organism: tuple[il.LatentModel, il.Run, il.Run],
) -> None:
    lens, base, _ = organism
    bound = lens.transformer_lens(base)
    found = cache_activation_and_gradient(bound, bound.tokens, metric)
    kept: dict[str, torch.Tensor] = {}

    def keep(act: torch.Tensor, hook: Any) -> None:
        kept[hook.name] = act

    sites = ["blocks.0.hook_mlp_out", "blocks.2.attn.hook_z", "hook_embed"]
    value = metric(lens.run_with_hooks(base, fwd_hooks=[(site, keep) for site in sites]))
    acts = [kept[site] for site in sites]
    for site, wanted in zip(sites, torch.autograd.grad(value, acts), strict=True):
        assert found.gradients[site] is not None
        torch.testing.assert_close(found.gradients[site], wanted)


def test_its_interchange_is_our_swap(organism: tuple[il.LatentModel, il.Run, il.Run]) -> None:
    lens, base, source = organism
    bound, donor = lens.transformer_lens(base), lens.transformer_lens(source)
    site = "blocks.1.hook_resid_post"
    at = torch.tensor([int(il.latent.resolve(base.tokens, row)[0]) for row in range(3)])
    states = interchange.collect_activations(donor, site, donor.tokens, donor, positions=at)
    whole = interchange.SubspaceInterchange(torch.eye(64))
    with torch.no_grad():
        found = interchange.run_with_intervention(
            bound, site, whole, bound.tokens, states, bound, positions=at
        )
        given = lens.run(lens.task(n=3, seed=0).source, names_filter=site, positions=[il.latent])
        with lens.edit(il.Swap(given), at=il.latent[0], site=site):
            wanted = lens.run_with_hooks(base)
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-5)


def test_its_sparse_probe_reads_our_states(
    organism: tuple[il.LatentModel, il.Run, il.Run],
) -> None:
    lens = organism[0]
    task = lens.task(n=64, seed=1)
    run = lens.run(task.base)
    bound = lens.transformer_lens(run)
    at = torch.tensor([int(il.latent.resolve(run.tokens, row)[1]) for row in range(64)])
    states = interchange.collect_activations(
        bound, "blocks.2.hook_resid_post", bound.rows, bound, positions=at
    )
    labels = torch.tensor([answer == "circle" for answer in task.base_answers]).long()
    assert 4 < int(labels.sum()) < 60
    found = fit_sparse_probe(states, labels, k=8, test_fraction=0.3, seed=0)
    assert found is not None


# ---- what it refuses, and what it leaves behind ----------------------------------------------


def test_other_tokens_are_refused(organism: tuple[il.LatentModel, il.Run, il.Run]) -> None:
    lens, base, source = organism
    bound, other = lens.transformer_lens(base), lens.transformer_lens(source)
    with pytest.raises(il.InputError, match="not those of the bound input"):
        bound(other.tokens)
    with pytest.raises(il.InputError, match="not those of the bound input"):
        bound(bound.tokens[:1])
    with pytest.raises(il.InputError, match="take the logits"):
        bound(bound.tokens, return_type="loss")
    with pytest.raises(il.InputError, match="pixel_values"):
        bound(bound.tokens, pixel_values=torch.zeros(1))
    assert bound(return_type=None) is None
    with pytest.raises(il.InputError, match="2 tokens"):
        bound.to_single_token("green then")
    assert bound.to_single_token("green") == lens.encode("green")[0]


def test_rows_that_only_their_pictures_tell_apart_are_not_reordered() -> None:
    lens = lens_of("qwen2_5_vl")
    bound = lens.transformer_lens([shown("qwen2_5_vl", 0), shown("qwen2_5_vl", 1)])
    with pytest.raises(il.InputError, match="order cannot be told"):
        bound(bound.tokens[[1, 0]])
    assert torch.equal(bound(bound.tokens), bound(bound.rows))
    with pytest.raises(il.InputError, match="read as a whole"):
        bound(bound.rows.flip(0))


def test_nothing_stays_active_after_an_error(
    organism: tuple[il.LatentModel, il.Run, il.Run],
) -> None:
    lens, base, _ = organism
    bound = lens.transformer_lens(base)
    before = bound()

    def broken(act: torch.Tensor, hook: Any) -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        bound.run_with_hooks(bound.tokens, fwd_hooks=[("blocks.0.hook_resid_pre", broken)])
    assert torch.equal(bound(), before)
    assert lens.registry.entries == []
    assert torch.equal(lens.run_with_hooks(base), before)


def test_its_hooks_and_ours_act_together(
    organism: tuple[il.LatentModel, il.Run, il.Run],
) -> None:
    lens, base, _ = organism
    bound = lens.transformer_lens(base)
    site = "blocks.0.hook_resid_post"
    hooks = [(site, lambda act, hook: act + 1)]
    with lens.hooks(hooks):
        both = bound.run_with_hooks(bound.tokens, fwd_hooks=hooks)
    twice = lens.run_with_hooks(base, fwd_hooks=[(site, lambda act, hook: act + 2)])
    torch.testing.assert_close(both, twice, rtol=0, atol=1e-4)
    assert not torch.allclose(both, bound(), atol=1e-2)


# ---- caches ----------------------------------------------------------------------------------


def test_caches_convert_both_ways(organism: tuple[il.LatentModel, il.Run, il.Run]) -> None:
    lens, base, _ = organism
    bound = lens.transformer_lens(base)
    _, ours = lens.run_with_cache(base)
    _, theirs = bound.run_with_cache(bound.tokens)
    made = to_transformer_lens(ours, bound)
    assert isinstance(made, ActivationCache)
    assert set(made) == set(theirs)
    assert all(torch.equal(made[name], theirs[name]) for name in theirs)
    stack, labels = made.accumulated_resid(return_labels=True)
    assert (stack.shape[0], labels[-1]) == (4, "final_post")
    back = from_transformer_lens(theirs, ours)
    assert all(torch.equal(back[name], ours[name]) for name in ours)
    assert back.axes == ours.axes
    assert back.columns.keys() == ours.columns.keys()
    with pytest.raises(il.InputError, match="is not in the cache"):
        from_transformer_lens({"blocks.9.hook_resid_pre": torch.zeros(1)}, ours)
    with pytest.raises(il.InputError, match="has shape"):
        from_transformer_lens({"hook_embed": torch.zeros(1)}, ours)


# ---- a bridge that is there already ----------------------------------------------------------


@pytest.mark.parametrize("name", ["qwen2_5_vl", "llava"])
def test_a_bridge_can_be_wrapped_and_its_sites_are_the_plain_ones(name: str) -> None:
    bridge, plain = bridged(name)
    lens = il.LatentModel(bridge, processor=plain.processor, spec=SPEC)
    run = plain.run(shown(name, 0), max_new_tokens=4, latents=il.Force(2, at=1))
    assert run.trigger.emitted[0] > 0
    with torch.no_grad():
        _, wanted = plain.run_with_cache(run)
        _, found = lens.run_with_cache(run)
    inside = {n for n in wanted if n.endswith(("hook_pattern", "hook_rot_q", "hook_rot_k"))}
    assert set(wanted) - set(found) == inside  # the bridge computes attention itself
    for site in found:
        size = wanted[site].abs().max()
        torch.testing.assert_close(found[site] / size, wanted[site] / size, rtol=0, atol=1e-4)


def test_a_bridges_hooks_go_on_acting_once() -> None:
    bridge, plain = bridged("llava")
    lens = il.LatentModel(bridge, processor=plain.processor, spec=SPEC)
    given = shown("llava", 0)
    site = "blocks.1.hook_resid_post"
    calls: list[str] = []

    def plus(act: torch.Tensor, hook: Any) -> torch.Tensor:
        calls.append(str(hook.name))
        return act + 1

    with torch.no_grad():
        with bridge.hooks(fwd_hooks=[("blocks.1.hook_out", plus)]):
            both = lens.run_with_hooks(given, fwd_hooks=[(site, lambda act, hook: act + 1)])
        twice = plain.run_with_hooks(given, fwd_hooks=[(site, lambda act, hook: act + 2)])
    assert len(calls) == 1
    torch.testing.assert_close(both, twice, rtol=0, atol=2e-3)


def test_its_repr_says_what_is_bound(organism: tuple[il.LatentModel, il.Run, il.Run]) -> None:
    lens, base, _ = organism
    bound = BoundModel(lens, base)
    assert repr(bound).startswith("BoundModel(Qwen2_5_VLForConditionalGeneration with a run of 3 x")
    assert bound.to_str_tokens()[-1].startswith("<|")
    assert torch.equal(bound.to_tokens(), bound.tokens)
    assert bound.tokens_to_residual_directions("green").shape == (64,)
