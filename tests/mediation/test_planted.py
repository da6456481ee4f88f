"""The planted models do what they are said to do, and the truth about them is true."""

import doctest
from functools import cache
from itertools import combinations
from math import factorial
from typing import Any

import numpy as np
import planted
import pytest
import torch
from planted import CHAIN_A, CHAIN_B, CHAIN_C, CHAIN_D, KINDS, Planted
from transformers import PreTrainedModel

import imaginelens as il
from imaginelens.hooks import controls

LOOPS = [k for k in KINDS if planted.MECHANISMS[k].steps > 1 and k != "masked"]
CONTEXTS, DIRECTIONS = ("free", "fixed"), ("denoise", "noise")
every_kind = pytest.mark.parametrize("kind", KINDS)
every_loop = pytest.mark.parametrize("kind", LOOPS)


@cache
def made(kind: str) -> tuple[Planted, il.Run, il.Run]:
    p = planted.planted(kind)
    base, source = (p.lens.run(half, keep_logits=True) for half in (p.pairs.base, p.pairs.source))
    return p, base, source


def answers(p: Planted) -> dict[str, Any]:
    """In every arm, also where the source runs: y is logit(B) - logit(A)."""
    return {"base_answers": p.pairs.base_answers, "source_answers": p.pairs.source_answers}


def swapped(kind: str, context: str, direction: str, at: Any = il.latent) -> il.PatchResult:
    p, base, source = made(kind)
    runs = (base, source) if direction == "denoise" else (source, base)
    return p.lens.swap(*runs, at=at, context=context, **answers(p))


def is_close(found: Any, wanted: Any, tolerance: float = 1e-12) -> bool:
    return np.shape(found) == np.shape(wanted) and bool(
        np.allclose(found, wanted, rtol=0, atol=tolerance)
    )


# --- the truth, against closed forms ------------------------------------------------------------


def test_the_docstring_is_true() -> None:
    assert doctest.testmod(planted) == doctest.TestResults(failed=0, attempted=3)


def test_bilinear_has_the_published_effects() -> None:
    truth = planted.planted("bilinear", xs0=[0.0], xs1=[1.0]).truth
    published = {
        "te": 3.425, "pnde": 1.225, "tnde": 1.825, "pnie": 1.6, "tnie": 2.2, "cde": 1.0,
        "int_ref": 0.225, "int_med": 0.6, "prop_mediated": 0.642336, "prop_eliminated": 0.708029,
    }  # fmt: skip
    assert {name: round(truth[name].item(), 6) for name in published} == published


@every_kind
def test_effects_decompose(kind: str) -> None:
    t = made(kind)[0].truth
    assert is_close(t["te"], t["pnde"] + t["tnie"])
    assert is_close(t["te"], t["tnde"] + t["pnie"])
    assert is_close(t["te"], t["cde"] + t["int_ref"] + t["int_med"] + t["pnie"])
    assert np.unique(t["te"]).size > 1  # pairs differ
    for context in CONTEXTS:
        for direction, joint in (("denoise", t["pnie"]), ("noise", -t["tnie"])):
            assert is_close(t[f"ordered_{context}_{direction}"].sum(1), joint)
            assert is_close(t[f"shapley_{context}_{direction}"].sum(1), joint)
    assert is_close(t["telescope"].sum(1), t["tnie"])


def test_linear_has_the_products_of_its_paths() -> None:
    p, t = made("linear")[0], made("linear")[0].truth
    change = (p.x1 - p.x0)[:, 0]
    for direct in ("pnde", "tnde", "cde"):
        assert is_close(t[direct], 0.7 * change)
    for indirect in ("pnie", "tnie"):
        assert is_close(t[indirect], 2 * 1.3 * change)
    assert is_close(t["int_ref"], 0 * change)
    assert is_close(t["int_med"], 0 * change)


def test_chain_has_its_closed_form() -> None:
    """z_t changing by d_t, free is the sum over s >= t of C_s A^(s-t) d_t, and fixed is C_t d_t."""
    p, t = made("chain")[0], made("chain")[0].truth
    power = [np.linalg.matrix_power(CHAIN_A, n) for n in range(3)]
    unit = np.array([sum(power[:n]) @ CHAIN_B for n in (1, 2, 3)])  # z_t of x = 1
    assert is_close(p.latents(p.x1), p.x1[:, :, None] * unit)
    change = p.x1 - p.x0
    onwards = np.array([sum(CHAIN_C[s] @ power[s - i] for s in range(i, 3)) for i in range(3)])
    free, fixed = (onwards * unit).sum(1), (CHAIN_C * unit).sum(1)
    for sign, direction in ((1, "denoise"), (-1, "noise")):
        assert is_close(t[f"single_free_{direction}"], sign * change * free)
        assert is_close(t[f"single_fixed_{direction}"], sign * change * fixed)
        assert is_close(t[f"shapley_fixed_{direction}"], sign * change * fixed)
        # behind z_1 to z_{t-1} of the source, z_t of the source differs from what follows by B dx
        assert is_close(t[f"ordered_free_{direction}"], sign * change * (onwards @ CHAIN_B))
    assert is_close(t["telescope"], change * fixed)
    assert is_close(t["pnde"], CHAIN_D * change[:, 0])
    assert np.abs(free - fixed)[:2].min() > 0.1  # the contexts do differ


@every_loop
@pytest.mark.parametrize("context", CONTEXTS)
def test_shapley_effects_are_those_of_the_coalition_formula(kind: str, context: str) -> None:
    p = made(kind)[0]
    n = p.mechanism.steps

    def value(steps: tuple[int, ...]) -> np.ndarray:
        return p.edited(steps, context=context)

    for t in range(n):
        others = [s for s in range(n) if s != t]
        wanted = sum(
            factorial(size) * factorial(n - size - 1) / factorial(n) * (value((*s, t)) - value(s))
            for size in range(n)
            for s in combinations(others, size)
        )
        assert is_close(p.truth[f"shapley_{context}_denoise"][:, t], wanted)


def test_gates_tell_denoising_from_noising() -> None:
    for kind, seen, unseen in (
        ("and_gate", "noise", "denoise"),
        ("or_gate", "denoise", "noise"),
    ):
        p, t = made(kind)[0], made(kind)[0].truth
        whole = (p.x1 - p.x0) * (1 if seen == "denoise" else -1)
        for context in CONTEXTS:
            assert not t[f"single_{context}_{unseen}"].any()
            assert is_close(t[f"single_{context}_{seen}"], np.repeat(whole, 2, axis=1))
            assert is_close(t[f"shapley_{context}_{seen}"], np.repeat(whole, 2, axis=1) / 2)


def test_cancelling_paths_sum_to_nothing() -> None:
    p, t = made("cancelling")[0], made("cancelling")[0].truth
    change = p.x1 - p.x0
    assert not t["pnie"].any()
    assert not t["tnie"].any()
    for context in CONTEXTS:
        assert is_close(t[f"single_{context}_denoise"], change * [1, -1])
    assert is_close(t["te"], change[:, 0] / 2)


def test_a_saturated_answer_has_no_slope_left() -> None:
    p, t = made("saturating")[0], made("saturating")[0].truth
    assert t["te"][0] == pytest.approx(np.tanh(5))
    assert round(t["te"][0], 5) == 0.99991
    assert not t["pnde"].any()
    (z0,) = p.latents(p.x0)[0, 0]
    slope = 2 * np.cosh(z0) ** -2 / 4  # of sigmoid(2 z), at z = -5
    assert round(slope * 10, 5) == 0.00091  # what a gradient finds


def test_full_mediation_and_none() -> None:
    t = made("fully_mediated")[0].truth
    assert not t["pnde"].any()
    assert not t["cde"].any()
    assert t["prop_mediated"] == 1
    t = made("masked")[0].truth
    assert not t["pnie"].any()
    assert not t["tnie"].any()
    assert t["prop_mediated"] == 0
    assert is_close(t["cde"], t["te"])


# --- the models, against the truth --------------------------------------------------------------


def by_hand(p: Planted, text: str) -> tuple[np.ndarray, float]:
    """Latents and y by plain forwards over the whole sequence, without cache and without lens."""
    model, tok, ids = p.lens.model, p.lens.tokenizer, p.lens.span_tokens
    embed = model.get_input_embeddings()

    def read(embeds: torch.Tensor) -> Any:
        return model(inputs_embeds=embeds, use_cache=False, output_hidden_states=True)

    embeds = embed(tok(text, return_tensors="pt").input_ids)
    assert read(embeds).logits[0, -1].argmax() == ids.open
    embeds = torch.cat([embeds, embed(torch.tensor([[ids.open]]))], dim=1)
    fed = []
    for _ in range(p.mechanism.steps):
        fed.append(read(embeds).hidden_states[-1][:, -1:])
        embeds = torch.cat([embeds, fed[-1]], dim=1)
    logits = read(torch.cat([embeds, embed(torch.tensor([[ids.close]]))], dim=1)).logits[0, -1]
    a, b = tok.convert_tokens_to_ids(["A", "B"])
    return torch.cat(fed, dim=1).numpy(), (logits[b] - logits[a]).item()


@torch.no_grad()
@every_kind
def test_the_bare_model_computes_its_mechanism(kind: str) -> None:
    p, base, _ = made(kind)
    assert isinstance(p.lens.model, PreTrainedModel)
    assert {w.dtype for w in p.lens.model.parameters()} == {torch.float64}
    for row, example in enumerate(p.pairs.base):
        fed, y = by_hand(p, example["text"])
        assert is_close(fed[0], base.latents[row])
        assert is_close(y, p.truth["y00"][row])


@every_kind
def test_runs_feed_back_the_latents_and_write_the_same_text(kind: str) -> None:
    p, base, source = made(kind)
    for run, x, y in ((base, p.x0, p.truth["y00"]), (source, p.x1, p.truth["y11"])):
        assert is_close(p.latents_of(run), p.latents(x))
        assert set(run.trigger.emitted) == {p.mechanism.steps}
        assert run.answers == ["B" if value > 0 else "A" for value in y]
        span = "<|latent_start|>" + "<|latent_pad|>" * p.mechanism.steps + "<|latent_end|>"
        assert run.texts == [f"{span}{answer}<eos>" for answer in run.answers]
        assert len(set(run.prompt.mask.sum(1).tolist())) > 1  # rows are padded
        assert controls.path_gap(p.lens, run) < 1e-12
    if kind != "bilinear":
        assert base.answers == list(p.pairs.base_answers)
        assert source.answers == list(p.pairs.source_answers)


@every_kind
def test_rows_of_a_batch_are_rows_alone(kind: str) -> None:
    p, base, _ = made(kind)
    for row, example in enumerate(p.pairs.base[:2]):
        alone = p.lens.run(example, keep_logits=True)
        assert is_close(alone.latents[0], base.latents[row])
        assert is_close(alone.logits[0], base.logits[row])


@every_kind
@pytest.mark.parametrize("context", CONTEXTS)
def test_swaps_make_the_worlds(kind: str, context: str) -> None:
    p = made(kind)[0]
    for direction, before, after in (("denoise", "y00", "y01"), ("noise", "y11", "y10")):
        result = swapped(kind, context, direction)
        assert is_close(result.before, p.truth[before])
        assert is_close(result.after, p.truth[after])
        assert result.landing.relative_change > 0


@every_loop
@pytest.mark.parametrize("context", CONTEXTS)
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_swaps_of_steps_have_their_effects(kind: str, context: str, direction: str) -> None:
    p = made(kind)[0]
    name, done = f"{context}_{direction}", p.truth["y00" if direction == "denoise" else "y11"]
    for t in range(p.mechanism.steps):
        single = swapped(kind, context, direction, il.latent[t])
        assert is_close(single.effect, p.truth[f"single_{name}"][:, t])
        prefix = single if t == 0 else swapped(kind, context, direction, il.latent[: t + 1])
        assert is_close(prefix.after.numpy() - done, p.truth[f"ordered_{name}"][:, t])
        done = prefix.after.numpy()


def log_prob_b(y: np.ndarray) -> np.ndarray:
    return -np.logaddexp(0, -y)


@every_kind
def test_zeroed_latents_give_the_controlled_worlds(kind: str) -> None:
    p, base, source = made(kind)
    for run, context, y, wanted in ((base, "free", "y00", "c0"), (source, "fixed", "y11", "c1")):
        result = p.lens.ablate(
            run, il.Zero(), metric=il.log_prob, context=context, answers=["B"] * len(run)
        )
        assert is_close(result.before, log_prob_b(p.truth[y]))
        assert is_close(result.after, log_prob_b(p.truth[wanted]))


@every_kind
def test_a_run_without_latents_is_the_controlled_world(kind: str) -> None:
    p = made(kind)[0]
    run = p.lens.run(p.pairs.base, latents=il.Skip(), keep_logits=True)
    assert set(run.trigger.emitted) == {0}
    a, b = p.lens.tokenizer.convert_tokens_to_ids(["A", "B"])
    assert is_close(run.logits[:, 1, b] - run.logits[:, 1, a], p.truth["c0"])


@every_kind
def test_a_sham_changes_nothing_at_all(kind: str) -> None:
    p, base, _ = made(kind)
    for context in CONTEXTS:
        result = p.lens.ablate(base, il.Sham(), context=context)
        assert torch.equal(result.before, result.after)
    sites = ["hook_latent", "*.hook_resid_post", "*.hook_v"]
    assert controls.sham_difference(p.lens, base, site=sites, at=il.latent)[0] == 0.0


@pytest.mark.parametrize("context", CONTEXTS)
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_masked_latents_have_exactly_no_effect(context: str, direction: str) -> None:
    p, base, source = made("masked")
    assert (base.latents - source.latents).abs().amax((1, 2)).min() > 0.5  # they do differ
    for at in (il.latent, *(il.latent[t] for t in range(3))):
        result = swapped("masked", context, direction, at)
        assert result.landing.relative_change > 0.1
        assert not result.effect.any()
    unmasked = made("chain")[0].truth[f"single_{context}_{direction}"]
    assert np.abs(unmasked).min() > 0.1
    noisy = p.lens.ablate(base, il.Noise(reference=source), context=context)
    assert torch.equal(noisy.before, noisy.after)


def test_the_pattern_of_a_masked_model_has_no_weight_on_latents() -> None:
    name = "blocks.1.attn.hook_pattern"
    for kind, weight in (("chain", 1.0), ("masked", 0.0)):
        p, base, _ = made(kind)
        _, cache = p.lens.run_with_cache(base, names_filter=name)
        for row in range(len(base)):
            (reader,) = il.before_answer.resolve(base.tokens, row)
            by_head = cache[name][row, reader][:, il.latent.resolve(base.tokens, row)]
            assert torch.equal(by_head[1:], weight * torch.eye(3, dtype=torch.float64))
            assert not by_head[0].any()  # it looks at the number


@pytest.mark.parametrize("kind", ["chain", "saturating"])
def test_gradients_are_the_slopes_of_the_mechanism(kind: str) -> None:
    p, base, _ = made(kind)
    fed: list[torch.Tensor] = []

    def remember(act: torch.Tensor, hook: Any) -> torch.Tensor:
        fed.append(act.detach().requires_grad_())
        return fed[0]

    logits = p.lens.run_with_hooks(base, fwd_hooks=[("hook_latent", remember)])
    a, b = p.lens.tokenizer.convert_tokens_to_ids(["A", "B"])
    rows = range(len(base))
    ends = [il.before_answer.resolve(base.tokens, row)[0] for row in rows]
    y = torch.stack([logits[row, end, b] - logits[row, end, a] for row, end in enumerate(ends)])
    assert is_close(y.detach(), p.truth["y00"])
    (slopes,) = torch.autograd.grad(y.sum(), fed[0])
    at = [il.latent.resolve(base.tokens, row) for row in rows]
    found = np.stack([slopes[row, at[row], p.lens.model.registers["z"]] for row in rows])
    wanted = {
        "chain": np.stack([CHAIN_C] * len(base)),
        "saturating": np.cosh(p.latents(p.x0)) ** -2 / 2,
    }
    assert is_close(found, wanted[kind])


@pytest.mark.parametrize(("site", "at"), planted.WORLDS, ids=str)
def test_sites_carry_what_they_are_said_to(site: str, at: Any) -> None:
    p, base, source = made("chain")
    for context, world in zip(CONTEXTS, planted.WORLDS[site, at], strict=True):
        result = p.lens.patch(
            base=base, source=source, site=site, at=at, context=context, **answers(p)
        )
        assert is_close(result.before, p.truth["y00"])
        assert is_close(result.after, p.truth[world])


def test_the_close_token_is_before_the_answer() -> None:
    tokens = made("chain")[1].tokens
    for row in range(len(tokens)):
        wanted = il.before_answer.resolve(tokens, row)
        assert np.array_equal(planted.CLOSE.resolve(tokens, row), wanted)


def test_a_latent_outside_its_register_is_found() -> None:
    p, base, _ = made("chain")
    stray = torch.zeros(p.lens.structure.d_model, dtype=torch.float64)
    stray[p.lens.model.registers["z"].stop] = 1
    with p.lens.edit(il.Steer(stray), at=il.latent[1]):
        run = p.lens.rerun(base)
    with pytest.raises(AssertionError):
        p.latents_of(run)
