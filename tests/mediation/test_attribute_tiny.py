"""Gradients of a tiny Qwen2.5-VL against plain torch, finite differences and forwards by hand."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np
import pytest
import tiny
import torch
import untouched
from torch import nn

import imaginelens as il
from imaginelens.hooks.errors import InputError
from imaginelens.hooks.metrics import targets_of
from imaginelens.mediation.attribute import attribute
from imaginelens.mediation.attribution import Attribution
from imaginelens.mediation.gradients import Reading
from imaginelens.mediation.patched import patched
from imaginelens.mediation.query_keys import FIXED
from imaginelens.mediation.relevance import _divided
from imaginelens.mediation.selecting import cells_of
from imaginelens.mediation.taps import Spots, tap

SPEC = il.LatentSpec(
    name="test", open="<|latent_start|>", close="<|latent_end|>", pad="<|latent_pad|>", max_steps=3
)
ARCH, LAYERS = "qwen2_5_vl", 3
CLOSE = 1e-10
METRIC = il.log_prob


class Norm(nn.Module):
    """An RMSNorm that stays in float64, where the class's own rounds to float32."""

    def __init__(self, old: nn.Module) -> None:
        super().__init__()
        self.weight, self.variance_epsilon = old.weight, old.variance_epsilon

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x / (x.pow(2).mean(-1, keepdim=True) + self.variance_epsilon).sqrt() * self.weight


def lens_of(change: Callable[[nn.Module], None] | None = None) -> il.LatentModel:
    model, processor = tiny.fresh(ARCH, dtype=torch.float64)
    decoder = model.model.language_model
    decoder.norm = Norm(decoder.norm)
    for block in decoder.layers:
        block.input_layernorm = Norm(block.input_layernorm)
        block.post_attention_layernorm = Norm(block.post_attention_layernorm)
    if change is not None:
        change(decoder)
    model.generation_config.eos_token_id = None
    return il.LatentModel(model, processor, spec=SPEC)


def pairs_of() -> il.Pairs:
    base, source = (
        [
            {"images": tiny.image(40, 24, seed=seed), "text": tiny.prompt(ARCH, text)},
            {"images": tiny.image(24, 24, seed=seed + 5), "text": tiny.prompt(ARCH, f"{text} so?")},
        ]
        for seed, text in ((0, "red?"), (1, "big?"))
    )
    return il.Pairs(base, source, ["A", "C"], ["B", "D"])


class Study:
    """A model with pairs that it runs with three latents and four tokens of text."""

    def __init__(self, change: Callable[[nn.Module], None] | None = None) -> None:
        self.lens, self.pairs = lens_of(change), pairs_of()
        run = self.lens.run
        self.lens.run = lambda inputs, **more: run(  # type: ignore[method-assign]
            inputs, **{"latents": il.Force(3, at=0), "max_new_tokens": 7, **more}
        )

    def attributed(self, **options: Any) -> Attribution:
        return attribute(self.lens, self.pairs, latents=il.Force(3, at=0), **options)

    @property
    def runs(self) -> tuple[il.Run, il.Run]:
        return self.lens.run(list(self.pairs.base)), self.lens.run(list(self.pairs.source))

    def reading(self, context: Any = "fixed") -> Reading:
        run, _ = self.runs
        targets = targets_of(
            run, self.pairs.base_answers, self.pairs.source_answers, self.lens.encode
        )
        before = self.lens.read_answer(run, targets)
        return Reading(self.lens, run, targets, il.logit_diff, context, before)


@cache
def study() -> Study:
    return Study()


def cached(lens: il.LatentModel, run: il.Run, sites: list[str]) -> Any:
    with torch.no_grad():
        return lens.run_with_cache(run, names_filter=sites)[1]


def blocks(lens: il.LatentModel) -> nn.ModuleList:
    return lens.model.model.language_model.layers


@contextmanager
def hooked(module: nn.Module, hook: Callable[..., Any]) -> Iterator[None]:
    handle = module.register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()


def by_hand(reading: Reading) -> torch.Tensor:
    """logit(source answer) - logit(base answer) in plain torch: the script and its latents."""
    script, model = reading.script, reading.lens.model
    laid, deltas = script.laid[..., None], model.model.rope_deltas
    lay = lambda module, given, out: torch.where(laid, script.embeds, out)  # noqa: E731
    with hooked(model.get_input_embeddings(), lay):
        logits = model(**script.inputs).logits
    model.model.rope_deltas = deltas
    rows = torch.arange(len(reading.run))
    at = [r + d for r, d in zip(script.read_at, reading.targets.differ_at, strict=True)]
    said = logits[rows, at]
    source, base = reading.targets.source_token, reading.targets.base_token
    return said[rows, list(source)] - said[rows, list(base)]


def gradient_by_hand(reading: Reading, module: nn.Module) -> tuple[torch.Tensor, torch.Tensor]:
    """What a module puts out, and the gradient with respect to it."""
    kept: list[torch.Tensor] = []

    def keep(module: nn.Module, given: Any, out: Any) -> None:
        kept.append(out if isinstance(out, torch.Tensor) else out[0])

    with hooked(module, keep):
        outcome = by_hand(reading)
    return kept[0].detach(), torch.autograd.grad(outcome.sum(), kept[0])[0]


# --- one forward --------------------------------------------------------------------------------


@pytest.mark.parametrize("site", ["resid_post", "attn_out", "mlp_out"])
def test_gradient_times_change_equals_plain_torch(site: str) -> None:
    s, reading = study(), study().reading()
    found = s.attributed(sites=site, positions=[il.latent[1], il.last_prompt, il.before_answer])
    _, source = s.runs
    cache = cached(s.lens, source, [site])
    for cell, at, values in zip(found, found.positions, found.values, strict=True):
        assert cell.layer is not None
        block = blocks(s.lens)[cell.layer]
        module = {"resid_post": block, "attn_out": block.self_attn, "mlp_out": block.mlp}[site]
        act, gradient = gradient_by_hand(reading, module)
        for row in range(2):
            mine = at.resolve(reading.script.tokens, row)
            theirs = at.resolve(source.tokens, row)
            change = cache[cell.sites[0]][row, theirs] - act[row, mine]
            by_torch = float((gradient[row, mine] * change).sum())
            assert abs(values[row] - by_torch) < CLOSE
    assert np.abs(found.values).max() > 1e-3


def test_image_tokens_at_the_projector_are_those_that_enter_the_first_layer() -> None:
    """The tower works in window order; the first layer reads what the projector wrote."""
    s = study()
    at = [il.image[0][r, c] for r in range(3) for c in range(3)]
    projected, entering = (
        s.attributed(sites=site, positions=at)
        for site in ("vision_projector.hook_out", "blocks.0.hook_resid_pre")
    )
    assert np.allclose(projected.values, entering.values, rtol=0, atol=CLOSE)
    assert np.abs(projected.values).min() > 0


def test_a_single_pair_has_its_image_split_into_tokens() -> None:
    s = study()
    found = attribute(
        s.lens, s.pairs[:1], sites="vision_projector.hook_out", positions=il.image, method="ig",
        steps=6, tolerance=0.01, latents=il.Force(3, at=0),
    )  # fmt: skip
    assert len(found) == 15
    assert found.completeness_gap.max() < 0.01
    assert found.check(3).relative_error < 1  # shares, not single effects


def test_plain_torch_integrates_to_the_same() -> None:
    """The integral of equation 1 of arXiv 1703.01365, over a path of the second latent, by hand."""
    s, reading = study(), study().reading()
    found = s.attributed(sites="hook_latent", positions=[il.latent[1]], method="ig", steps=5)
    _, source = s.runs
    where, weights = np.polynomial.legendre.leggauss(5)
    total = torch.zeros(2, reading.run.latents.shape[-1], dtype=torch.float64)
    rows = torch.arange(2)
    columns = [int(il.latent[1].resolve(reading.script.tokens, row)[0]) for row in range(2)]
    own, embeds = reading.script.embeds[rows, columns].clone(), reading.script.embeds
    change = source.latents[:, 1] - own
    for point, weight in zip((where + 1) / 2, weights / 2, strict=True):
        moved = (own + point * change).requires_grad_()
        put = embeds.clone()
        put[rows, columns] = moved
        object.__setattr__(reading.script, "embeds", put)
        total += weight * torch.autograd.grad(by_hand(reading).sum(), moved)[0]
    object.__setattr__(reading.script, "embeds", embeds)
    assert np.allclose(found.values[0], (total * change).sum(-1), rtol=0, atol=CLOSE)


# --- through the loop ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("site", "at"),
    [
        ("hook_latent", il.latent[0]),
        ("blocks.0.hook_resid_post", il.latent[0]),
        ("blocks.1.hook_attn_out", il.last_prompt),
        ("blocks.2.hook_mlp_out", il.latent[1]),
    ],
)
def test_gradients_through_the_loop_are_those_of_the_loop(site: str, at: Any) -> None:
    """Against central differences of free generations, whose text does not change."""
    s, reading = study(), study().reading("free")
    run = reading.run
    direction = torch.randn(64, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    step, ends = 1e-5, []
    for sign in (1, -1):
        result = s.lens.ablate(
            run, il.Steer(direction, sign * step), at=at, site=site, metric=METRIC,
            answers=["A", "C"],
        )  # fmt: skip
        assert result.texts_before == result.texts_after
        ends.append(result.after.numpy())
    columns = [tuple(map(int, at.resolve(reading.script.tokens, row))) for row in range(2)]
    spots = reading.latents if site == "hook_latent" else None
    mine = tap(site, spots or Spots(tuple(columns)))
    reading.metric = METRIC
    gradient = reading.graph([mine]).gradients()[site]
    index = mine.spots.index()
    here = gradient[[index[row, columns[row][0]] for row in range(2)]]
    found = (here @ direction).numpy()
    assert np.allclose(found, (ends[0] - ends[1]) / (2 * step), rtol=0, atol=1e-6)
    held = study().reading("fixed")
    held.metric = METRIC
    fixed = held.graph([other := tap(site, mine.spots)]).gradients()[site]
    del other
    through = np.abs(
        found - (fixed[[index[r, columns[r][0]] for r in range(2)]] @ direction).numpy()
    )
    assert through.min() > 1e-5  # the loop matters here


def test_a_path_in_free_context_follows_the_loop() -> None:
    """One step moves, later ones follow: the end of the path is the exact effect."""
    s = study()
    found = s.attributed(
        sites="hook_latent",
        positions=[il.latent[0]],
        method="ig",
        context="free",
        steps=8,
        tolerance=1e-3,
    )
    check = found.check()
    assert found.completeness_gap.max() < 1e-3
    assert check.max_error < 1e-3
    assert np.abs(check.exact).min() > 0.01
    assert check.exact.shape == (1, 2)


@pytest.mark.parametrize("context", ["fixed", "free"])
@pytest.mark.parametrize("arch", list(tiny.GRID))
def test_the_same_place_has_one_gradient(arch: str, context: Any) -> None:
    """What is added at a sublayer's output is added to the stream behind it, in every class."""
    model, processor = tiny.fresh(arch)
    model.generation_config.eos_token_id = None
    lens = il.LatentModel(model, processor, spec=SPEC)
    example = {"images": tiny.image(48, 32, seed=0), "text": tiny.prompt(arch, "red?")}
    run = lens.run(example, latents=il.Force(2, at=0), max_new_tokens=9)
    targets = targets_of(run, ["A"], ["B"], lens.encode)
    reading = Reading(lens, run, targets, METRIC, context, lens.read_answer(run, targets))
    column = int(il.last_prompt.resolve(reading.script.tokens, 0)[0])
    of = "blocks.{}.hook_{}".format
    names = [of(0, "attn_out"), of(0, "resid_mid"), of(0, "resid_post"), of(1, "resid_pre")]
    gradients = reading.graph([tap(n, Spots(((column,),))) for n in names]).gradients()
    assert float(gradients[of(0, "attn_out")].abs().max()) > 0
    for one, other in (("attn_out", "resid_mid"), ("resid_post", None)):
        mine, theirs = (
            gradients[of(0, one)],
            gradients[of(0, other) if other else of(1, "resid_pre")],
        )
        assert torch.allclose(mine, theirs, rtol=1e-6, atol=1e-12), (one, other)


# --- rules --------------------------------------------------------------------------------------


def test_skipped_layers_equal_detached_ones() -> None:
    s, reading = study(), study().reading()
    at = [il.latent[0], il.last_prompt]
    sites = ["resid_post", "mlp_out"]
    found = s.attributed(sites=sites, positions=at, method="grad_drop")
    _, source = s.runs
    cache = cached(s.lens, source, sites)

    def detach(module: nn.Module, inputs: Any, out: Any) -> Any:
        return (out[0].detach(), *out[1:]) if isinstance(out, tuple) else out.detach()

    for cell, at_cell, values in zip(found, found.positions, found.values, strict=True):
        assert cell.layer is not None
        block = blocks(s.lens)[cell.layer]
        sizes = np.zeros(2)
        for skipped in range(LAYERS):
            of = blocks(s.lens)[skipped]
            module = block if cell.site == "resid_post" else block.mlp
            if cell.site == "mlp_out" and skipped == cell.layer:
                continue  # its own layer: nothing is left
            with hooked(of.self_attn, detach), hooked(of.mlp, detach):
                act, gradient = gradient_by_hand(reading, module)
            for row in range(2):
                mine = at_cell.resolve(reading.script.tokens, row)
                theirs = at_cell.resolve(source.tokens, row)
                change = cache[cell.sites[0]][row, theirs] - act[row, mine]
                sizes[row] += abs(float((gradient[row, mine] * change).sum()))
        by = LAYERS - (cell.site == "mlp_out")
        assert np.allclose(values, sizes / by, rtol=0, atol=CLOSE), cell


@pytest.mark.parametrize("heads", [False, True])
@pytest.mark.parametrize("kind", FIXED)
def test_patterns_computed_anew_are_those_of_the_patched_model(kind: str, heads: bool) -> None:
    """Query or key patched in the model: the pattern it makes, times plain torch's gradient."""
    s = study()
    at = il.latent[1]
    found = s.attributed(sites=kind, positions=[at], method="qk", heads=heads)
    _, source = s.runs
    reading = s.reading()
    patterns = [f"blocks.{layer}.attn.hook_pattern" for layer in range(LAYERS)]
    donor = il.Swap(replace(source, cache=cached(s.lens, source, [kind])))
    clean = _patterns(reading, patterns)
    outcome = reading.graph([tap(p, _everywhere(reading)) for p in patterns])
    gradients = outcome.gradients()
    for cell, values in zip(found, found.values, strict=True):
        assert cell.layer is not None
        name = patterns[cell.layer]
        chosen = None if cell.head is None else [cell.head]
        with s.lens.edit(donor, at=at, site=cell.sites[0], heads=chosen):
            edited = _patterns(reading, patterns)[name]
        gradient = gradients[name].unflatten(0, (2, -1))
        by_model = ((edited - clean[name]) * gradient).flatten(1).sum(1).numpy()
        assert np.allclose(values, by_model, rtol=0, atol=CLOSE), cell
    assert np.abs(found.values).max() > 1e-4


def _everywhere(reading: Reading) -> Spots:
    return Spots(tuple(tuple(range(reading.script.tokens.width)) for _ in range(2)))


def _patterns(reading: Reading, names: list[str]) -> dict[str, torch.Tensor]:
    kept: dict[str, torch.Tensor] = {}

    def keep(act: torch.Tensor, hook: Any) -> None:
        kept[hook.name] = act.detach().clone()

    with reading.lens.hooks([(name, keep) for name in names]), torch.no_grad():
        reading.values([])
    return kept


def test_the_fix_sees_what_saturated_attention_hides() -> None:
    s = Study(_sharpen)
    options = {"sites": "rot_q", "positions": [il.before_answer, il.latent[2]], "heads": True}
    plain = s.attributed(**options).check(40)
    fixed = s.attributed(**options, method="qk").check(40)
    assert fixed.relative_error < plain.relative_error
    assert fixed.pearson > plain.pearson


def _sharpen(decoder: Any) -> None:
    with torch.no_grad():
        for block in decoder.layers:
            block.self_attn.q_proj.weight *= 40


def test_relevance_is_the_gradient_of_a_forward_with_constant_factors() -> None:
    s, reading = study(), study().reading()
    at = [il.latent[0], il.before_answer]
    sites = ["resid_post", "resid_mid", "post", "z"]
    found = s.attributed(sites=sites, positions=at, method="relp")
    _, source = s.runs
    given = cached(s.lens, source, sites)
    linear = Linear(reading)
    assert torch.allclose(linear.outcome, by_hand(reading), rtol=0, atol=1e-8)
    for cell, at_cell, values in zip(found, found.positions, found.values, strict=True):
        act = linear.states[cell.sites[0]]
        gradient = torch.autograd.grad(linear.outcome.sum(), act, retain_graph=True)[0]
        for row in range(2):
            mine = at_cell.resolve(reading.script.tokens, row)
            theirs = at_cell.resolve(source.tokens, row)
            theirs_act = given[cell.sites[0]][row, theirs].reshape(len(theirs), -1)
            change = theirs_act - act[row, mine].detach().reshape(len(mine), -1)
            value = float((gradient[row, mine].reshape(len(mine), -1) * change).sum())
            assert abs(values[row] - value) < CLOSE, cell
    plain = s.attributed(sites=sites, positions=at)
    assert np.abs(found.values - plain.values).max() > 1e-3


class Linear:
    """The decoder written out, with constants where relevance propagation has them."""

    def __init__(self, reading: Reading) -> None:
        model = reading.lens.model
        names = [f"blocks.{i}.attn.hook_pattern" for i in range(LAYERS)]
        patterns = _patterns(reading, names)
        kept: list[torch.Tensor] = []

        def keep(act: torch.Tensor, hook: Any) -> None:
            kept.append(act.detach().clone())

        with reading.lens.hooks([("blocks.0.hook_resid_pre", keep)]), torch.no_grad():
            reading.values([])
        h = kept[0].requires_grad_()
        self.states: dict[str, torch.Tensor] = {}
        for i, block in enumerate(blocks(reading.lens)):
            attention, mlp = block.self_attn, block.mlp
            v = attention.v_proj(self.norm(block.input_layernorm, h))
            v = v.unflatten(-1, (-1, attention.head_dim)).repeat_interleave(2, dim=2)
            pattern = patterns[names[i]].transpose(1, 2)
            z = (pattern @ v.transpose(1, 2)).transpose(1, 2)
            self.states[f"blocks.{i}.attn.hook_z"] = z
            h = h + attention.o_proj(z.flatten(2))
            self.states[f"blocks.{i}.hook_resid_mid"] = h
            x = self.norm(block.post_attention_layernorm, h)
            gate, up = mlp.gate_proj(x), mlp.up_proj(x)
            act = gate * (nn.functional.silu(gate) / gate).detach()
            product = 0.5 * act * up + 0.5 * (act * up).detach()
            self.states[f"blocks.{i}.mlp.hook_post"] = product
            h = h + mlp.down_proj(product)
            self.states[f"blocks.{i}.hook_resid_post"] = h
        logits = model.lm_head(self.norm(model.model.language_model.norm, h))
        rows, targets = torch.arange(2), reading.targets
        at = [r + d for r, d in zip(reading.script.read_at, targets.differ_at, strict=True)]
        said = logits[rows, at]
        source, base = list(targets.source_token), list(targets.base_token)
        self.outcome = said[rows, source] - said[rows, base]

    @staticmethod
    def norm(module: nn.Module, x: torch.Tensor) -> torch.Tensor:
        size = (x.pow(2).mean(-1, keepdim=True) + module.variance_epsilon).sqrt()
        return x / size.detach() * module.weight


# --- untouched ----------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["atp", "ig", "grad_drop", "relp", "qk"])
def test_the_tiny_model_is_as_it_was_also_after_an_error(method: str) -> None:
    s = study()
    before = untouched.fingerprint(s.lens.model)
    site = "resid_mid" if method == "relp" else "rot_k"
    options = {"method": method, "steps": 1, "sites": site, "positions": [il.latent[0]]}
    s.attributed(**options)

    def fails(*args: Any) -> None:
        raise RuntimeError("planted")

    with hooked(blocks(s.lens)[1].mlp, fails), pytest.raises(RuntimeError, match="planted"):
        s.attributed(**options)
    assert untouched.same(before, untouched.fingerprint(s.lens.model))
    s.lens.run(s.pairs.base[0])  # the model is read as before
    with gradients_fail(), pytest.raises(RuntimeError, match="planted"):
        s.attributed(**options)
    assert untouched.same(before, untouched.fingerprint(s.lens.model))
    assert not s.lens.registry.entries


@contextmanager
def gradients_fail() -> Iterator[None]:
    """Every backward pass raises, long after the forward it is of."""

    def fails(*args: Any, **options: Any) -> None:
        raise RuntimeError("planted")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.autograd, "grad", fails)
        yield


class Tanh(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.tanh(x)


def _other_norm(decoder: Any) -> None:
    decoder.layers[1].input_layernorm = Tanh()


def _other_product(decoder: Any) -> None:
    mlp = decoder.layers[1].mlp
    mlp.forward = lambda x: mlp.down_proj(mlp.act_fn(mlp.gate_proj(x)) + mlp.up_proj(x))


def _other_attention(decoder: Any) -> None:
    decoder.layers[1].self_attn.gate = nn.Linear(4, 4)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_other_attention, "which holds q_proj, k_proj, v_proj, o_proj,.* gate and not"),
        (_other_norm, "a Tanh that is neither an RMSNorm nor a LayerNorm"),
        (_other_product, r"whose down_proj does not read act_fn\(gate_proj\) \* up_proj"),
    ],
)
def test_another_norm_or_product_has_no_coefficients(change: Any, message: str) -> None:
    s = Study(change)
    before = untouched.fingerprint(s.lens.model)
    with pytest.raises(InputError, match=message):
        s.attributed(sites="resid_post", method="relp")
    assert untouched.same(before, untouched.fingerprint(s.lens.model))


def test_relevance_of_what_it_holds_constant_is_refused() -> None:
    with pytest.raises(InputError, match="every value at 'rot_q' would be 0"):
        study().attributed(sites=["rot_q", "resid_post"], method="relp")


def test_a_layer_norm_divides_by_a_constant_and_still_centres() -> None:
    """d/dx of w (x - mean) / c is w (g - mean(g)) / c, for a gradient w g from behind."""
    norm = nn.LayerNorm(6, dtype=torch.float64)
    generator = torch.Generator().manual_seed(0)
    x, behind, weight = torch.randn(3, 6, generator=generator, dtype=torch.float64).unbind()
    with torch.no_grad():
        norm.weight.copy_(weight)
    x.requires_grad_()
    out = norm(x)
    linear = _divided("ln", norm, [])(x, out)
    assert torch.equal(linear, out)
    (found,) = torch.autograd.grad(linear @ behind, x)
    size = ((x - x.mean()).pow(2).mean() + norm.eps).sqrt()
    given = weight * behind
    assert torch.allclose(found, (given - given.mean()) / size, rtol=0, atol=1e-12)


def test_attention_with_other_scores_is_not_computed_anew() -> None:
    s = Study()
    blocks(s.lens)[0].self_attn.attn_logit_softcapping = 0.1  # said, but not done
    with pytest.raises(InputError, match="does not score queries and keys by their scaled product"):
        s.attributed(sites="rot_q", positions=[il.last_prompt], method="qk")


def test_cells_of_the_study_are_those_of_a_sweep() -> None:
    s = study()
    run, source = s.runs
    cells = cells_of(s.lens, [run, source], sites="resid_post", positions=il.latent)
    found = s.attributed(sites="resid_post")
    assert found.cells == tuple(cell for cell, _ in cells)
    reading = s.reading()
    of_batch, _ = patched(s.lens, run, reading.script.tokens, source, cells, "fixed")
    assert list(of_batch.sites) == [f"blocks.{layer}.hook_resid_post" for layer in range(LAYERS)]


# --- points of a way in one forward -------------------------------------------------------------


def image_way(lens: il.LatentModel, pairs: il.Pairs, site: str, rows: int, **more: Any) -> Any:
    at = more.pop("positions", [il.image, il.latent[1]])
    return attribute(
        lens, pairs, sites=site, positions=at, method="ig", steps=5, metric=METRIC,
        latents=il.Force(2, at=0), batch_size=rows, **more,
    )  # fmt: skip


@pytest.mark.parametrize("arch", list(tiny.GRID))
def test_points_that_share_a_forward_are_as_alone(arch: str) -> None:
    """In every class: pictures, positions and token types belong to each copy of the rows."""
    model, processor = tiny.fresh(arch)
    model.generation_config.eos_token_id = None
    lens = il.LatentModel(model, processor, spec=SPEC)
    run = lens.run
    lens.run = lambda x, **more: run(x, **{"max_new_tokens": 9, **more})  # type: ignore[method-assign]
    base, source = (
        [{"images": tiny.image(48, 32, seed=k), "text": tiny.prompt(arch, "red?")} for k in ks]
        for ks in ((0, 1), (2, 3))
    )
    two = il.Pairs(base, source, ["A", "C"], ["B", "D"])
    for pairs, rows, forwards in ((two[:1], 8, 4), (two, 4, 2)):
        alone = image_way(lens, pairs, "resid_pre", len(pairs))
        shared = image_way(lens, pairs, "resid_pre", rows)
        size = np.abs(alone.values).max()
        assert size > 1e-6
        np.testing.assert_allclose(shared.values, alone.values, rtol=0, atol=1e-9 * size)
        sites = len({cell.sites for cell in alone})
        assert alone.provenance.forwards - shared.provenance.forwards == forwards * sites
