"""TransformerLens' own functions on our models: they read the picture and the latents as well."""

from collections.abc import Iterator
from functools import partial
from typing import Any

import oracle
import pandas as pd
import pytest
import tiny
import torch
import untouched
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
from transformer_lens.SVDInterpreter import SVDInterpreter
from transformer_lens.tools.analysis import (
    attention_head_subspace_affinity,
    direct_logit_attribution,
    interchange,
    logit_lens,
)
from transformer_lens.tools.analysis.attribution_patching import (
    EdgeAttributionConfig,
    attribution_patch,
    cache_activation_and_gradient,
)
from transformer_lens.tools.analysis.jacobian_lens import JacobianLens
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


def plain_inputs(name: str, model: Any, lens: il.LatentModel, seed: int) -> dict[str, Any]:
    """What a plain forward of the model is given for the same input."""
    batch = lens.prompt(shown(name, seed)).inputs
    if name != "qwen2_5_vl":
        return batch
    return {**batch, "position_ids": tiny.positions(model, batch)}


@pytest.fixture
def in_float64() -> Iterator[None]:
    """TransformerLens keeps its tables in torch's default dtype."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


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


def only(cells: list[tuple[int, ...]], *axes: str) -> dict[str, Any]:
    """Its options for some cells of a table."""
    return {"index_axis_names": None, "index_df": pd.DataFrame(cells, columns=list(axes))}


@pytest.mark.usefixtures("in_float64")
@pytest.mark.parametrize("site", PATCHING)
@pytest.mark.parametrize("name", ["qwen2_5_vl", "llava"])
def test_patching_equals_plain_torch_hooks_to_the_last_bit(name: str, site: str) -> None:
    lens = lens_of(name)
    base, source = (lens.transformer_lens(shown(name, seed)) for seed in (0, 1))
    cells = [(0, 3), (1, 7), (2, base.tokens.shape[1] - 2), (1, base.tokens.shape[1] - 1)]
    with torch.no_grad():
        _, cache = source.run_with_cache(names_filter=lambda name: name.endswith(site))
        if (name, site) == ("llava", "hook_resid_mid"):  # one whole table, for the others cells
            found = PATCHING[site](base, base.tokens, cache, metric)
            assert found.shape == (3, base.tokens.shape[1])
        else:
            found = torch.zeros(3, base.tokens.shape[1])
            found[tuple(zip(*cells, strict=True))] = PATCHING[site](
                base, base.tokens, cache, metric, **only(cells, "layer", "pos")
            )
    model = lens.model
    inputs, donor = (plain_inputs(name, model, lens, seed) for seed in (0, 1))
    for layer, position in cells:
        at = f"blocks.{layer}.{site}"
        given = oracle.read(name, model, at, donor)

        def put(act: torch.Tensor, given: torch.Tensor = given, p: int = position) -> torch.Tensor:
            new = act.clone()
            new[:, p] = given[:, p]
            return new

        wanted = metric(oracle.edited(name, model, at, inputs, put))
        assert found[layer, position] == wanted
        with torch.no_grad():
            hook = lambda act, hook, put=put: put(act)  # noqa: E731
            ours = base.run_with_hooks(base.tokens, fwd_hooks=[(at, hook)])
        assert torch.equal(metric(ours), wanted)


HEADS = {
    "hook_z": patching.get_act_patch_attn_head_out_all_pos,
    "hook_q": patching.get_act_patch_attn_head_q_all_pos,
    "hook_k": patching.get_act_patch_attn_head_k_all_pos,
    "hook_v": patching.get_act_patch_attn_head_v_all_pos,
}


BY_POS = {
    "hook_z": patching.get_act_patch_attn_head_out_by_pos,
    "hook_q": patching.get_act_patch_attn_head_q_by_pos,
    "hook_k": patching.get_act_patch_attn_head_k_by_pos,
    "hook_v": patching.get_act_patch_attn_head_v_by_pos,
}


@pytest.mark.usefixtures("in_float64")
@pytest.mark.parametrize("site", HEADS)
@pytest.mark.parametrize("name", ["qwen2_5_vl", "gemma3"])
def test_heads_are_patched_as_plain_torch_hooks_do_it(name: str, site: str) -> None:
    lens = lens_of(name)
    base, source = (lens.transformer_lens(shown(name, seed)) for seed in (0, 1))
    n_heads = base.cfg.n_key_value_heads if site in ("hook_k", "hook_v") else base.cfg.n_heads
    cells = [(0, 0), (1, n_heads - 1), (base.cfg.n_layers - 1, 0)]
    with torch.no_grad():
        _, cache = source.run_with_cache(names_filter=lambda name: name.endswith(site))
        found = HEADS[site](base, base.tokens, cache, metric, **only(cells, "layer", "head"))
        (one,) = BY_POS[site](
            base, base.tokens, cache, metric, **only([(1, 4, 1)], "layer", "pos", "head")
        )
    inputs, donor = (plain_inputs(name, lens.model, lens, seed) for seed in (0, 1))
    for (layer, head), value in zip(cells, found, strict=True):
        at = f"blocks.{layer}.attn.{site}"
        given = oracle.read(name, lens.model, at, donor).unflatten(-1, (n_heads, -1))

        def put(act: torch.Tensor, given: torch.Tensor = given, h: int = head) -> torch.Tensor:
            new = act.clone().unflatten(-1, (len(given[0, 0]), -1))
            new[:, :, h] = given[:, :, h]
            return new.flatten(-2)

        assert value == metric(oracle.edited(name, lens.model, at, inputs, put))
    assert found.unique().numel() == found.numel()  # no cell stood still
    at = f"blocks.1.attn.{site}"
    given = oracle.read(name, lens.model, at, donor).unflatten(-1, (n_heads, -1))

    def put_one(act: torch.Tensor) -> torch.Tensor:
        new = act.clone().unflatten(-1, (n_heads, -1))
        new[:, 4, 1] = given[:, 4, 1]
        return new.flatten(-2)

    assert one == metric(oracle.edited(name, lens.model, at, inputs, put_one))


@pytest.mark.usefixtures("in_float64")
def test_patterns_are_patched_as_written_out_by_hand() -> None:
    lens = lens_of("llava")
    base, source = (lens.transformer_lens(shown("llava", seed)) for seed in (0, 1))
    with torch.no_grad():
        _, cache = source.run_with_cache(source.tokens)
        _, own = base.run_with_cache(base.tokens)
        cells = [(0, 1), (2, 0)]
        found = patching.get_act_patch_attn_head_pattern_all_pos(
            base, base.tokens, cache, metric, **only(cells, "layer", "head_index")
        )
    heads = base.cfg.n_heads
    for (layer, head), value in zip(cells, found, strict=True):
        v = own["v", layer].repeat_interleave(heads // own["v", layer].shape[2], dim=2)
        z = torch.einsum("bqk,bkd->bqd", cache["pattern", layer][:, head], v[:, :, head])

        def put(act: torch.Tensor, z: torch.Tensor = z, h: int = head) -> torch.Tensor:
            new = act.clone().unflatten(-1, (heads, -1))
            new[:, :, h] = z
            return new.flatten(-2)

        inputs = plain_inputs("llava", lens.model, lens, 0)
        logits = oracle.edited("llava", lens.model, f"blocks.{layer}.attn.hook_z", inputs, put)
        assert value.item() == pytest.approx(metric(logits).item(), abs=1e-6)


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
    table = partial(
        patching.get_act_patch_resid_pre, **only([(0, 3), (1, 4), (2, 9)], "layer", "pos")
    )
    ours, theirs = [], []
    for seed in (0, 1):
        base = lens.transformer_lens(shown(name, seed))
        source = lens.transformer_lens(shown(name, 2))
        with torch.no_grad():
            stream = lambda name: name.endswith("hook_resid_pre")  # noqa: E731
            _, cache = source.run_with_cache(source.tokens, names_filter=stream)
            ours.append(table(base, base.tokens, cache, metric))
            _, cache = bridge.run_with_cache(base.tokens, names_filter=stream)
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

    cells = [(layer, int(column)) for layer in range(3) for column in columns]
    with torch.no_grad():
        table = patching.get_act_patch_resid_pre(
            bound, bound.tokens, cache, diff, reduce="none", baseline=True,
            **only(cells, "layer", "pos"),
        )  # fmt: skip
    assert type(table).__name__ == "PatchingResult"
    effect = dict(zip(cells, table.effect()[:, 0], strict=True))
    ours = il.sweep(
        lens, task, sites="resid_pre", positions=il.latent, metric=il.logit_diff, context="fixed"
    ).to_dataframe()
    assert len(ours) == 6
    for row in ours.itertuples():
        step = int(str(row.position).split("[")[1].rstrip("]"))
        assert effect[row.layer, int(columns[step])].item() == pytest.approx(row.effect, abs=1e-4)


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


def test_its_attribution_patching_is_autograd_on_two_pictures_of_one_text() -> None:
    name = "qwen2_5_vl"
    lens = lens_of(name)
    before = untouched.fingerprint(lens.model)
    both = lens.transformer_lens([shown(name, 0), shown(name, 1)])
    assert torch.equal(both.tokens[0], both.tokens[1])  # only their place tells the rows apart
    scores = attribution_patch(both, both.tokens[:1], both.tokens[1:], metric).node_scores
    assert untouched.same(before, untouched.fingerprint(lens.model))
    assert all(parameter.grad is None for parameter in lens.model.parameters())
    clean, corrupt = (plain_inputs(name, lens.model, lens, seed) for seed in (0, 1))
    for layer in range(3):
        at = f"blocks.{layer}.hook_mlp_out"
        kept: list[torch.Tensor] = []

        def keep(act: torch.Tensor, kept: list[torch.Tensor] = kept) -> torch.Tensor:
            kept.append(act)
            return act

        with oracle.hooked(name, lens.model, at, keep):
            value = metric(lens.model(**corrupt, use_cache=False).logits)
        (gradient,) = torch.autograd.grad(value, kept)
        change = oracle.read(name, lens.model, at, clean) - kept[0].detach()
        wanted = (change * gradient).sum(-1)[0]
        found = {n.position: v for n, v in scores.items() if n.hook_name == at}
        assert [found[i] for i in range(len(wanted))] == pytest.approx(wanted.tolist(), abs=1e-9)
    # pictures enter behind hook_embed: its nodes are words, and these are the same
    assert {score for node, score in scores.items() if node.kind == "embed"} == {0.0}


@pytest.mark.parametrize("name", ["qwen2_5_vl", "llava", "gemma3"])
def test_its_direct_attribution_adds_up_to_the_logits(name: str) -> None:
    lens = lens_of(name)
    bound = lens.transformer_lens([shown(name, 0), shown(name, 1)])
    with torch.no_grad():
        logits = bound(bound.tokens)
        parts = direct_logit_attribution(bound, bound.tokens, 5, 9, pos=None)
        layers = direct_logit_attribution(bound, bound.tokens, 5, 9, unit="layer", pos=-1)
    wanted = logits[..., 5] - logits[..., 9]
    # transformers' norms compute in float32, whatever the model's dtype
    torch.testing.assert_close(parts.attribution.sum(0), wanted, rtol=0, atol=1e-5)
    torch.testing.assert_close(layers.attribution[-1], wanted[:, -1], rtol=0, atol=1e-5)
    assert parts.labels[:2] == ["embed", "pos_embed"]  # pos_embed: here, the pictures
    unfolded = parts.attribution.sum(0) / wanted
    gain = bound.tokens_to_residual_directions(5) / bound.W_U[:, 5]
    assert gain.std() > 0.01  # without it the sum would be another
    assert unfolded.std() < 1e-3


def test_logits_that_are_transformed_have_no_directions() -> None:
    lens = il.LatentModel(*tiny.fresh("llava"), spec=SPEC)
    bound = lens.transformer_lens(shown("llava", 0))
    handle = lens.model.lm_head.register_forward_hook(lambda m, args, out: torch.tanh(out))
    with pytest.raises(il.SiteUnavailable, match="no direction of the stream stands for a token"):
        direct_logit_attribution(bound, bound.tokens, 5)
    handle.remove()


def test_what_it_needs_and_is_not_here_is_refused_in_a_sentence(
    organism: tuple[il.LatentModel, il.Run, il.Run],
) -> None:
    bound = organism[0].transformer_lens(organism[1])
    with torch.no_grad():
        _, cache = bound.run_with_cache(bound.tokens)
    with pytest.raises(il.SiteUnavailable, match="paths between heads cannot be patched"):
        patching.get_act_patch_direct_path(
            bound, bound.tokens, cache, cache, lambda x: x.sum(), src_layer=0, src_head=0
        )
    with pytest.raises(il.SiteUnavailable, match="paths between heads cannot be patched"):
        attribution_patch(
            bound, bound.tokens[:1], bound.tokens[1:2], metric, EdgeAttributionConfig("edge")
        )
    with pytest.raises(il.SiteUnavailable, match="parameters are not renamed here"):
        SVDInterpreter(bound)
    with pytest.raises(TypeError, match="supports TransformerBridge only"):
        JacobianLens.fit(bound, ["what"], corpus="one")
    with pytest.raises(il.InputError, match="tokens, of shape"):
        bound(bound.to_tokens("what?"))


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
        bound(bound.tokens[:, :5])
    with pytest.raises(il.InputError, match="read from its pictures to its logits"):
        bound(bound.tokens, stop_at_layer=1)
    with pytest.raises(il.InputError, match="incl_bwd"):
        bound.run_with_cache(bound.tokens, incl_bwd=True)
    with pytest.raises(il.InputError, match="take the logits"):
        bound(bound.tokens, return_type="loss")
    with pytest.raises(il.InputError, match="pixel_values"):
        bound(bound.tokens, pixel_values=torch.zeros(1))
    assert bound(return_type=None) is None
    with pytest.raises(il.InputError, match="2 tokens"):
        bound.to_single_token("green then")
    assert bound.to_single_token("green") == lens.encode("green")[0]


def test_some_rows_are_answered_as_all_of_them_are() -> None:
    lens = lens_of("qwen2_5_vl")
    bound = lens.transformer_lens([shown("qwen2_5_vl", seed) for seed in (0, 1, 2)])
    site = "blocks.1.hook_resid_post"

    def third(act: torch.Tensor, hook: Any) -> None:
        act[:, 2:5] *= 3

    with torch.no_grad():
        whole = bound(bound.tokens)
        assert not torch.equal(whole[0], whole[1])
        for rows in (bound.tokens[1:], bound.rows[1:]):
            assert torch.equal(bound(rows), whole[1:])
        assert torch.equal(bound(bound.tokens[::2]), whole[::2])
        assert torch.equal(bound(bound.rows[[2, 0]]), whole[[2, 0]])
        edited = bound.run_with_hooks(bound.tokens, fwd_hooks=[(site, third)])
        part = bound.run_with_hooks(bound.rows[[2, 1]], fwd_hooks=[(site, third)])
        _, cache = bound.run_with_cache(bound.rows[[2, 1]], names_filter=site)
        assert torch.equal(part, edited[[2, 1]])
        assert torch.equal(
            cache[site], bound.run_with_cache(bound.tokens, names_filter=site)[1][site][[2, 1]]
        )
    with pytest.raises(il.InputError, match="order cannot be told"):
        bound(bound.tokens[[1, 0, 2]])
    for wrong in ([1, 1], [3], [-1], []):
        with pytest.raises(il.InputError, match="each once"):
            bound(torch.tensor(wrong, dtype=torch.long))
    with pytest.raises(il.InputError, match="holds the pictures of the whole batch"):
        bound.run_with_cache(bound.tokens[:1], names_filter="vision_projector.hook_out")


# ---- hooks as there ----------------------------------------------------------------------------


def test_its_verbs_do_what_they_do_there_and_leave_nothing() -> None:
    lens = lens_of("llava")
    before = untouched.fingerprint(lens.model)
    bound = lens.transformer_lens(shown("llava", 0))
    site = "blocks.1.hook_resid_post"
    calls: list[str] = []

    def into(act: torch.Tensor, hook: Any) -> torch.Tensor:  # writes in place
        calls.append(hook.name)
        act[:, -1] += 1
        return act

    with torch.no_grad():
        plain = bound()
        once = bound.run_with_hooks(fwd_hooks=[(site, into)])
        wanted = lens.run_with_hooks(bound.inputs, fwd_hooks=[(site, into)])
        assert torch.equal(once, wanted)
        assert not torch.equal(once, plain)
        assert torch.equal(bound(), plain)

        bound.add_perma_hook(site, into)
        bound.add_hook(lambda name: name == site, into)
        twice = bound()
        bound.reset_hooks()
        assert torch.equal(bound(), once)
        assert [name for name, _ in bound.list_hooks().items()] == [site]
        bound.reset_hooks(including_permanent=True)
        assert torch.equal(bound(), plain)

        with bound.hooks(fwd_hooks=[(site, into)]):
            with bound.hooks(fwd_hooks=[(site, into)]):
                torch.testing.assert_close(bound(), twice, rtol=0, atol=1e-9)
            assert torch.equal(bound(), once)
        bound.run_with_hooks(fwd_hooks=[(site, into)], reset_hooks_end=False)
        assert torch.equal(bound(), once)
        bound.reset_hooks()
        assert torch.equal(bound(), plain)
    assert set(calls) == {site}
    assert bound.list_hooks() == {}
    assert lens.registry.entries == []
    assert untouched.same(before, untouched.fingerprint(lens.model))


def test_filters_and_slices_are_those_there() -> None:
    lens = lens_of("llava")
    bound = lens.transformer_lens(shown("llava", 0))
    names = ["blocks.0.hook_mlp_out", "blocks.2.attn.hook_z"]
    with torch.no_grad():
        _, everything = bound.run_with_cache()
        _, one = bound.run_with_cache(names_filter=names[0])
        _, two = bound.run_with_cache(names_filter=names, pos_slice=-1)
        _, flat = bound.run_with_cache(
            bound.tokens, names_filter=lambda n: n in names, remove_batch_dim=True
        )
        _, as_dict = bound.run_with_cache(names_filter=names, return_cache_object=False)
    assert list(one) == names[:1]
    assert list(two) == list(flat) == list(as_dict) == names
    assert type(as_dict) is dict
    for name in names:
        # patterns are in `everything`, so that attention was written out: equal but for rounding
        torch.testing.assert_close(two[name], everything[name][:, -1:], rtol=0, atol=1e-12)
        torch.testing.assert_close(flat[name], everything[name][0], rtol=0, atol=1e-12)
    assert set(everything) - set(lens.registry) == {"hook_pos_embed", "ln_final.hook_scale"}
    # a glob is no filter there, and an unknown name would cache nothing without a word
    with pytest.raises(il.HookNameError, match="letter by letter"):
        bound.run_with_cache(names_filter="*.hook_mlp_out")
    for name in ("blocks.0.hook_mlp_in", "blocks.9.hook_mlp_out"):
        with pytest.raises(il.HookNameError, match="did you mean 'blocks"):
            bound.run_with_hooks(fwd_hooks=[(name, lambda act, hook: act)])
    with pytest.raises(il.InputError, match="returned shape"):
        bound.run_with_hooks(fwd_hooks=[(names[0], lambda act, hook: act[:, :1])])
    with pytest.raises(il.HookNameError, match="was not cached, only"):
        one["resid_post", 1]


def test_an_edit_of_ours_acts_first_and_its_landing_counts() -> None:
    lens = il.load("latent-content")
    base = lens.run(lens.task(n=2, seed=0).base)
    bound = lens.transformer_lens(base)
    site = "blocks.1.hook_resid_post"
    columns = [int(il.latent[0].resolve(base.tokens, row)[0]) for row in range(2)]
    seen: list[torch.Tensor] = []

    def plus(act: torch.Tensor, hook: Any) -> torch.Tensor:
        seen.append(act[range(2), columns].clone())
        return act + 1

    def both(act: torch.Tensor, hook: Any) -> torch.Tensor:
        new = act.clone()
        new[range(2), columns] = 0
        return new + 1

    with torch.no_grad():
        with lens.edit(il.Zero(), at=il.latent[0], site=site) as landing:
            found = bound.run_with_hooks(bound.tokens, fwd_hooks=[(site, plus)])
        assert torch.equal(found, lens.run_with_hooks(base, fwd_hooks=[(site, both)]))
        assert landing.fired == 1
        assert not seen[0].any()
        assert torch.equal(bound(), lens.run_with_hooks(base))
        with lens.edit(il.Zero(), at=il.latent):  # what the run fed back, too
            assert torch.equal(bound(), lens.run_with_hooks(base))
        # an edit that the bound prompt cannot reach is refused, as everywhere
        prompt = lens.transformer_lens(lens.task(n=1, seed=0).base[0])
        with lens.edit(il.Zero(), at=il.latent, site=site), pytest.raises(il.EditTouchedNothing):
            prompt()


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
    assert made["hook_pos_embed"][:, 3:12].abs().max() > 0.1  # the picture, over its placeholder
    back = from_transformer_lens(theirs, ours)
    assert all(torch.equal(back[name], ours[name]) for name in ours)
    assert back.axes == ours.axes
    assert back.columns.keys() == ours.columns.keys()
    with pytest.raises(il.InputError, match="is not in the cache"):
        from_transformer_lens({"blocks.9.hook_resid_pre": torch.zeros(1)}, ours)
    with pytest.raises(il.InputError, match="has shape"):
        from_transformer_lens({"hook_embed": torch.zeros(1)}, ours)


@pytest.mark.parametrize("name", ["qwen2_5_vl", "llava", "qwen3_vl"])
def test_methods_of_its_cache_equal_what_is_computed_by_hand(name: str) -> None:
    lens = lens_of(name)
    bound = lens.transformer_lens(shown(name, 0))
    with torch.no_grad():
        _, cache = bound.run_with_cache(bound.tokens)
        layers, heads = bound.cfg.n_layers, bound.cfg.n_heads
        stack, labels = cache.stack_head_results(return_labels=True)
        assert labels[:2] == ["L0H0", "L0H1"]
        z = cache["z", 1].flatten(-2)
        for head in range(heads):
            weight = oracle.place(name, lens.model, "blocks.1.attn.hook_z")[0].weight
            size = weight.shape[1] // heads
            part = slice(head * size, (head + 1) * size)
            wanted = z[..., part] @ weight[:, part].T
            torch.testing.assert_close(stack[heads + head], wanted, rtol=0, atol=1e-12)
        neurons = cache.get_neuron_results(0)
        down = oracle.place(name, lens.model, "blocks.0.mlp.hook_post")[0].weight
        wanted = cache["post", 0][..., None] * down.T
        torch.testing.assert_close(neurons, wanted, rtol=0, atol=1e-12)
        streams = cache.accumulated_resid(incl_mid=True)
        assert torch.equal(streams[1], cache["resid_mid", 0])
        assert torch.equal(streams[-1], cache["resid_post", -1])
        normed = cache.accumulated_resid(apply_ln=True)[-1]
        torch.testing.assert_close(normed, cache["normalized"], rtol=0, atol=1e-6)
        # Qwen3-VL adds picture features between blocks as well, which are no site here
        between = sum(
            cache["resid_pre", layer + 1] - cache["resid_post", layer]
            for layer in range(layers - 1)
        )
        assert bool(torch.any(between.abs() > 0)) is (name == "qwen3_vl")
        for parts in (
            cache.decompose_resid(),
            cache.get_full_resid_decomposition(),
            cache.get_full_resid_decomposition(expand_neurons=False),
        ):
            whole = parts.sum(0) + between
            torch.testing.assert_close(whole, cache["resid_post", -1], rtol=0, atol=1e-9)
        for layer in (cache.logit_lens(positions=-1).values[-1], bound.unembed(normed)[:, -1]):
            torch.testing.assert_close(layer, bound()[:, -1], rtol=0, atol=1e-5)
    with pytest.raises(KeyError, match="Cached LN scale not found"):
        cache.decompose_resid(1, apply_ln=True)


def test_its_affinity_of_heads_reads_the_weights_of_the_model() -> None:
    lens = lens_of("llava")
    bound = lens.transformer_lens(shown("llava", 0))
    found = attention_head_subspace_affinity(bound, target_role="Q", rank=2)
    bases = []
    for layer, site in ((0, "hook_z"), (1, "hook_q")):
        weight = oracle.place("llava", lens.model, f"blocks.{layer}.attn.{site}")[0].weight
        weight = weight if site == "hook_z" else weight.T
        vectors = torch.linalg.svd(weight[:, : bound.cfg.d_head], full_matrices=False)[0]
        bases.append(vectors[:, :2])
    wanted = (bases[0].T @ bases[1]).square().sum()
    score = found.scores[0, 0, 1, 0]
    torch.testing.assert_close(score, wanted, rtol=0, atol=1e-9)


def test_heads_behind_a_norm_have_no_part_of_their_own() -> None:
    lens = lens_of("gemma3")
    bound = lens.transformer_lens(shown("gemma3", 0))
    with torch.no_grad():
        _, cache = bound.run_with_cache(bound.tokens)
        parts = cache.decompose_resid()
    torch.testing.assert_close(parts.sum(0), cache["resid_post", -1], rtol=0, atol=1e-9)
    with pytest.raises(il.SiteUnavailable, match=r"blocks.0.attn.W_O is not offered: post_attent"):
        cache.stack_head_results()
    with pytest.raises(il.SiteUnavailable, match=r"blocks.0.mlp.W_out is not offered: post_feedf"):
        cache.get_neuron_results(0)
    assert bound.blocks[0].attn.W_Q.shape == (4, bound.cfg.d_model, bound.cfg.d_head)


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
