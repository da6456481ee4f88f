"""Causal tracing finds the planted path, and nothing where latents are not read."""

from functools import cache

import numpy as np
import planted
import pytest
import torch
from planted import Planted

import imaginelens as il
from imaginelens.hooks.edits import EditContext
from imaginelens.hooks.entries import EditEntry
from imaginelens.mediation.causal_trace import Blur, _check, causal_trace
from imaginelens.mediation.effect_map import EffectMap

CONTEXT = EditContext("s", *(np.arange(3) for _ in range(4)), keys=("a", "b", "a"))


@cache
def made(kind: str, n: int = 5) -> Planted:
    return planted.planted(kind, xs0=np.linspace(-1, 1, n), xs1=np.linspace(1.5, 2, n))


def traced(kind: str, n: int = 5, **words: object) -> EffectMap:
    p = made(kind, n)
    given = {"sites": ["resid_post", "attn_out"], "metric": il.logit_diff, "draws": 2, **words}
    return causal_trace(p.lens, p.pairs, **given)


def test_what_comes_back_is_what_passes_there() -> None:
    """y = 0.7 x + 1.3 z - 1: block 1 reads z at its own input, and writes it before the answer."""
    found = traced("linear")
    p = made("linear")
    assert np.allclose(found.other, p.truth["y00"], rtol=0, atol=1e-12)
    assert np.abs(found.total).min() > 0.1
    assert np.abs(found.sham).max() == 0.0
    whole = {("resid_post", 0, "latent[0]"), ("attn_out", 1, "before_answer")}
    whole |= {("resid_post", 1, "before_answer")}
    for cell, effect in zip(found.cells, found.effect, strict=True):
        wanted = found.total * ((cell.site, cell.layer, cell.position) in whole)
        assert np.allclose(effect, wanted, rtol=0, atol=1e-12), cell


def test_noise_has_the_size_asked_for_and_differs_between_examples() -> None:
    n = 60
    p, noise = made("linear", n), 2.0
    found = causal_trace(
        p.lens, p.pairs, noise=noise, draws=1, metric=il.logit_diff, sites="hook_latent"
    )
    sd = p.latents(p.x0).std(ddof=1)
    drawn = -found.total / 1.3 / noise / sd  # y moves by 1.3 times the noise
    assert len(np.unique(drawn.round(9))) == n
    assert abs(drawn.mean()) < 3 / np.sqrt(n)
    assert abs(drawn.var(ddof=1) - 1) < 3 * np.sqrt(2 / n)
    assert np.allclose(found.effect[0], found.total, rtol=0, atol=1e-12)


def test_draws_are_averaged() -> None:
    one, three = (traced("linear", draws=d) for d in (1, 3))
    assert (one.total != three.total).all()
    p = made("linear")
    latents, sd = p.latents(p.x0)[:, 0, 0], p.latents(p.x0).std(ddof=1)
    run = p.lens.run(list(p.pairs.base))
    width, register = run.latents.shape[-1], p.lens.model.registers["z"].start
    std = torch.zeros(width, dtype=torch.float64)
    std[register] = 3 * sd
    blur, drawn = Blur(std, 0), []
    for draw in range(3):
        ctx = EditContext(
            "hook_latent", np.arange(5), np.arange(5), np.zeros(5, int), np.zeros(5, int),
            draw=draw, keys=tuple(run.tokens.keys),
        )  # fmt: skip
        noised = blur.apply(run.latents[:, 0], ctx)[:, register].numpy()
        drawn.append(1.3 * (noised - latents))
    assert np.allclose(three.before - three.other, np.mean(drawn, axis=0), rtol=0, atol=1e-12)
    assert np.allclose(one.before - one.other, drawn[0], rtol=0, atol=1e-12)


def test_the_same_example_gets_the_same_noise_wherever_it_is() -> None:
    words = {"draws": 1, "sites": "hook_latent", "positions": [il.latent[0]]}
    whole, alone = traced("linear", **words), traced("linear", batch_size=3, **words)
    assert np.allclose(whole.effect, alone.effect, rtol=0, atol=1e-12)
    assert not np.allclose(whole.total, traced("linear", seed=1, **words).total)
    ones = torch.zeros(3, 4, dtype=torch.float64)
    new = Blur(torch.ones(4, dtype=torch.float64), 0).apply(ones, CONTEXT)
    assert not torch.equal(new[0], new[1])


def test_latents_that_nothing_reads_bring_nothing_back() -> None:
    found = traced("masked")
    assert not found.total.any()
    assert not found.effect.any()


def test_both_paths_say_the_same() -> None:
    """The fast one puts noised latents into the run; the slow one adds noise while it is read."""
    p = made("chain")
    fast = traced("chain", draws=1, metric=il.log_prob, positions=[il.latent[1], il.before_answer])
    run = p.lens.run(list(p.pairs.base))
    register = p.lens.model.registers["z"]
    std = torch.zeros(run.latents.shape[-1], dtype=torch.float64)
    std[register] = torch.as_tensor(3 * p.latents(p.x0).reshape(-1, 2).std(0, ddof=1))
    landing = il.Landing("Blur", "latent", ("hook_latent",))
    noise = EditEntry(("hook_latent",), Blur(std, 0), il.latent, landing)
    with p.lens.registry.scope([noise]):
        blurred = p.lens.ablate(
            run, il.Sham(), metric=il.log_prob, context="fixed", answers=p.pairs.base_answers
        )
    assert np.allclose(fast.before, blurred.before.numpy(), rtol=0, atol=1e-12)
    _, held = p.lens.run_with_cache(run, names_filter="blocks.1.hook_attn_out")
    (column,) = il.before_answer.resolve(run.tokens, 0)
    with p.lens.registry.scope([noise]):
        back = p.lens.ablate(
            run, il.Replace(held["blocks.1.hook_attn_out"][0, column]), at=il.before_answer,
            site="blocks.1.hook_attn_out", metric=il.log_prob, context="fixed",
            answers=p.pairs.base_answers,
        )  # fmt: skip
    after = fast.sel(site="attn_out", layer=1, position="before_answer").after[0]
    assert after[0] == pytest.approx(float(back.after[0]), abs=1e-12)


def test_text_subjects() -> None:
    """Noise on the number: what block 0 has not yet read comes back there, and not later."""
    p = made("linear")
    found = causal_trace(
        p.lens, p.pairs, subject=planted.NUMBER, sites=["hook_embed", "resid_post"],
        metric=il.logit_diff, draws=2,
    )  # fmt: skip
    assert np.abs(found.total).min() > 0.01
    assert np.allclose(found["hook_embed", None, planted.NUMBER].values, found.total, atol=1e-12)
    assert not found["resid_post", 0, planted.NUMBER].values.any()
    assert "one forward each" in found.notes[0]


def test_sources_in_the_place_of_noise() -> None:
    p = made("linear")
    found = causal_trace(p.lens, p.pairs, corrupt="source", metric=il.logit_diff)
    assert found.direction == "noise"
    te, indirect = p.truth["te"], 2.6 * (p.x1 - p.x0)[:, 0]
    assert np.allclose(found.total, te, atol=1e-12)
    assert np.allclose(found["resid_post", 0, "latent[0]"].values, -indirect, atol=1e-12)


def test_organisms_show_their_mechanism() -> None:
    content, ignored = (il.load(f"latent-{name}") for name in ("content", "ignored"))
    where = [il.latent[0], il.latent[1]]
    found = causal_trace(content, content.task(n=12, seed=1).base, draws=2, positions=where)
    assert found.total.mean() > 0.2
    last = found.recovery_at("resid_post", 0, "latent[1]")
    assert last.value > 0.8
    nothing = causal_trace(ignored, ignored.task(n=12, seed=1).base, draws=2, positions=where)
    assert abs(nothing.total.mean()) < 0.02


def test_windows_restore_layers_together() -> None:
    found = traced("linear", sites="attn_out", window=2)
    (cell,) = found.sel(position="before_answer").cells
    assert cell.sites == ("blocks.0.hook_attn_out", "blocks.1.hook_attn_out")
    whole = found.cell(position="before_answer").values
    assert np.allclose(whole, found.total, rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ({"noise": 0.0}, "standard deviations"),
        ({"noise": True}, "standard deviations"),
        ({"noise": float("nan")}, "standard deviations"),
        ({"draws": 0}, "draws is 0"),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"metric": il.kl}, "two are compared already"),
    ],
)
def test_bad_arguments_are_refused(words: dict[str, object], said: str) -> None:
    with pytest.raises(il.InputError, match=said):
        traced("linear", **words)


def test_data_that_cannot_be_traced_are_refused() -> None:
    p = made("linear")
    for data in ([], "x"):
        with pytest.raises(il.InputError, match="list of examples"):
            causal_trace(p.lens, data)
    with pytest.raises(il.InputError, match="choose 'noise' or 'source'"):
        _check(il.latent, 3.0, 1, "zero", il.prob, p.pairs, 1)
    with pytest.raises(il.InputError, match="at is 'latent'"):
        _check("latent", 3.0, 1, "noise", il.prob, p.pairs, 1)
    with pytest.raises(il.InputError, match="needs the sources"):
        causal_trace(p.lens, p.pairs.base, corrupt="source")
    with pytest.raises(il.InputError, match="are equal"):
        causal_trace(p.lens, [p.pairs.base[0]] * 2, metric=il.prob)
