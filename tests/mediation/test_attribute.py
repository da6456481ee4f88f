"""Attribution against closed forms, the exact effects of planted models, and organisms."""

import dataclasses
from functools import cache
from typing import Any

import numpy as np
import planted
import pytest
import torch
import untouched
from planted import Planted

import imaginelens as il
from imaginelens.hooks.errors import InputError
from imaginelens.hooks.metrics import Metric
from imaginelens.mediation.attribute import attribute
from imaginelens.mediation.attribution import Attribution
from imaginelens.mediation.gradients import Reading
from imaginelens.mediation.rules import points
from imaginelens.mediation.sweep import sweep

DIRECTIONS, CONTEXTS = ("denoise", "noise"), ("fixed", "free")
every_direction = pytest.mark.parametrize("direction", DIRECTIONS)
every_context = pytest.mark.parametrize("context", CONTEXTS)
UNCHECKED = getattr(attribute, "__wrapped__", attribute)
METHODS = ("atp", "ig", "qk", "grad_drop", "relp")


@cache
def made(kind: str) -> Planted:
    return planted.planted(kind)


def attributed(p: Planted | str, **options: Any) -> Attribution:
    p = made(p) if isinstance(p, str) else p
    return attribute(p.lens, p.pairs, **{"sites": "hook_latent", **options})


def truth(kind: str, context: str, direction: str) -> np.ndarray:
    """(step, pair): the exact effect of exchanging each step alone."""
    return made(kind).truth[f"single_{context}_{direction}"].T


def sigmoid(v: float) -> float:
    return 1 / (1 + np.exp(-v))


# --- closed forms -------------------------------------------------------------------------------


@every_direction
@every_context
@pytest.mark.parametrize("kind", ["linear", "chain", "cancelling"])
@pytest.mark.parametrize("method", ["atp", "ig"])
def test_a_linear_model_is_met_exactly(
    kind: str, method: str, context: str, direction: str
) -> None:
    path = {"path": "cell", "steps": 2} if method == "ig" else {}
    found = attributed(kind, method=method, context=context, direction=direction, **path)
    assert np.allclose(found.values, truth(kind, context, direction), rtol=0, atol=1e-10)
    if context == "fixed":  # no loop between the steps: one path for all gives the same
        joint = attributed(kind, method="ig", context=context, direction=direction, steps=2)
        assert np.allclose(joint.values, found.values, rtol=0, atol=1e-10)


@every_context
def test_both_directions_take_the_gradient_where_their_own_run_is(context: str) -> None:
    """y = .5 + x + 2 z + .75 x z: the gradient at z is 2 + .75 x of the run that receives."""
    p = made("bilinear")
    z0, z1 = p.latents(p.x0)[:, 0, 0], p.latents(p.x1)[:, 0, 0]
    x0, x1 = p.x0[:, 0], p.x1[:, 0]
    for direction, x, change in (("denoise", x0, z1 - z0), ("noise", x1, z0 - z1)):
        found = attributed(p, context=context, direction=direction)
        assert np.allclose(found.values, [(2 + 0.75 * x) * change], rtol=0, atol=1e-12)
        assert np.allclose(found.before, p.y(x[:, None], p.latents(x[:, None])))


def test_a_saturated_readout_as_published() -> None:
    """y = sigmoid(2 z), z from -5 to 5: exact .99991, and what each method makes of it."""
    p = planted.planted("saturating", xs0=[0.0], xs1=[1.0])
    slope = 2 * sigmoid(-10) * (1 - sigmoid(-10))
    exact = sigmoid(10) - sigmoid(-10)
    assert round(exact, 5) == 0.99991

    def integral(rule: Any, steps: int) -> float:
        where, weights = points(rule, steps)
        return float(
            sum(
                w * 20 * (s := sigmoid(20 * a - 10)) * (1 - s)
                for a, w in zip(where, weights, strict=True)
            )
        )

    for options, value, published in (
        ({"method": "atp"}, 10 * slope, 0.00091),
        ({"method": "ig", "rule": "left", "steps": 5}, integral("left", 5), 0.860),
        ({"method": "ig", "steps": 16}, integral("gauss-legendre", 16), 0.9985),
        ({"method": "ig", "rule": "midpoint", "steps": 16}, integral("midpoint", 16), 0.9999),
    ):
        found = attributed(p, **options)
        assert np.allclose(found.values, value, rtol=0, atol=1e-12)
        assert round(float(found.values[0, 0]), len(str(published)) - 2) == published
        if options["method"] == "ig":
            gap = abs(value - exact)
            assert np.allclose(found.completeness_gap, gap, rtol=0, atol=1e-12)


def test_rules_on_a_cubic_as_published() -> None:
    """The integral of 3 a^2 over 0..1, from five points."""
    for rule, value in (("left", 0.72), ("right", 1.32), ("midpoint", 0.99), ("gauss-legendre", 1)):
        where, weights = points(rule, 5)
        assert np.isclose(weights @ (3 * where**2), value, rtol=0, atol=1e-12)
        assert np.isclose(weights.sum(), 1)


@every_context
def test_redundant_steps_share_and_single_ones_do_nothing(context: str) -> None:
    """y = max(z_1, z_2) - .5, both from 1 to 0: none matters alone; together they do."""
    p = planted.planted("or_gate", xs0=[0.0], xs1=[1.0])
    options = {"direction": "noise", "context": context}
    joint = attributed(p, method="ig", **options)
    assert np.allclose(joint.values, -0.5, rtol=0, atol=1e-12)
    assert np.allclose(joint.values.T, p.truth["shapley_fixed_noise"], rtol=0, atol=1e-12)
    assert np.allclose(joint.completeness_gap, 0, atol=1e-12)
    alone = attributed(p, method="ig", path="cell", context="fixed", direction="noise")
    assert np.allclose(alone.values, 0, atol=1e-12)
    atp = attributed(p, context="fixed", direction="noise")
    assert np.allclose(atp.values, -0.5)  # at a tie the slope is half of each
    assert atp.check().fails
    assert not alone.check().fails
    assert alone.check().verdict.endswith("agree that nothing here has an effect")


def test_latents_that_nobody_reads_get_exactly_nothing() -> None:
    for context in CONTEXTS:
        for method in ("atp", "ig", "grad_drop"):
            found = attributed("masked", method=method, context=context, steps=2)
            assert (found.values == 0).all()
    check = attributed("masked").check()
    assert check.verdict.endswith("agree that nothing here has an effect")
    assert not check.fails


@every_direction
@every_context
def test_paths_sum_to_their_joint_effect(context: str, direction: str) -> None:
    p = made("random")
    found = attributed(
        p,
        sites=["hook_latent", "blocks.0.hook_resid_post"],
        method="ig",
        steps=10,
        context=context,
        direction=direction,
    )
    steps = range(p.mechanism.steps)
    joint = p.edited(steps, context=context, direction=direction)
    joint = joint - p.edited([], context=context, direction=direction)
    for site in ("hook_latent", "blocks.0.hook_resid_post"):
        mine = [cell.sites == (site,) for cell in found]
        assert np.allclose(found.values[mine].sum(0), joint, rtol=0, atol=1e-5), site
    assert found.completeness_gap.max() < 1e-5


def test_a_path_per_cell_is_the_exact_effect() -> None:
    found = attributed("random", method="ig", path="cell", context="free", steps=12)
    exact = truth("random", "free", "denoise")
    assert np.allclose(found.values, exact, rtol=0, atol=1e-5)
    assert found.gap is not None
    assert found.gap.max() < 1e-5


def test_a_narrow_bend_is_found_where_the_way_is_halved() -> None:
    coarse = attributed("saturating", method="ig", steps=4)
    fine = attributed("saturating", method="ig", steps=6, tolerance=1e-6)
    assert coarse.completeness_gap.max() > 0.05
    assert fine.completeness_gap.max() < 1e-6
    assert np.allclose(fine.values, truth("saturating", "fixed", "denoise"), rtol=0, atol=1e-6)
    assert fine.provenance.forwards > coarse.provenance.forwards


def test_the_loop_counts_in_free_context_only() -> None:
    free, fixed = (attributed("chain", context=c).values for c in ("free", "fixed"))
    assert not np.allclose(free[0], fixed[0])
    assert np.allclose(free[-1], fixed[-1])  # behind the last step nothing is fed


# --- check --------------------------------------------------------------------------------------


def test_check_reports_that_a_saturated_gradient_fails() -> None:
    atp = attributed("saturating").check(5)
    assert atp.fails
    assert "FAILS" in atp.verdict
    assert "must not be reported" in atp.verdict
    assert atp.relative_error > 0.9
    assert np.allclose(atp.exact, truth("saturating", "fixed", "denoise"), rtol=0, atol=1e-12)
    ig = attributed("saturating", method="ig").check(5)
    assert not ig.fails
    assert "agrees with exact patching" in ig.verdict
    assert ig.relative_error < 0.01


@every_direction
@every_context
def test_check_patches_what_the_values_approximate(context: str, direction: str) -> None:
    options = {"context": context, "direction": direction}
    check = attributed("chain", sites=["hook_latent", "resid_post"], **options).check(20)
    mine = [cell.site == "hook_latent" for cell in check.cells]
    assert np.allclose(check.exact[mine], truth("chain", context, direction), rtol=0, atol=1e-12)
    assert check.max_error < 1e-10
    assert check.pearson > 1 - 1e-9
    assert check.recall == 1
    assert "agrees" in check.verdict


def test_check_draws_by_its_seed() -> None:
    found = attributed("chain", sites=["hook_latent", "resid_post", "attn_out", "mlp_out"])
    once, twice, other = (found.check(4, seed=s, top=1) for s in (0, 0, 1))
    drawn = [{c for c, d in zip(x.cells, x.drawn, strict=True) if d} for x in (once, twice, other)]
    assert drawn[0] == drawn[1] != drawn[2]
    assert [len(d) for d in drawn] == [4, 4, 4]
    assert int(once.named.sum()) == 1
    for k, top in ((0, None), (3, 0)):
        with pytest.raises(InputError, match=r"is 0, expected a number of cells"):
            found.check(k, top=top)


def test_heads_are_parts_of_their_site() -> None:
    whole = attributed("random", sites="z", positions=[il.before_answer])
    parts = attributed("random", sites="z", positions=[il.before_answer], heads=True)
    for i, cell in enumerate(whole):
        of = [j for j, part in enumerate(parts) if part.layer == cell.layer]
        assert len(of) == 1 + made("random").mechanism.steps
        assert np.allclose(parts.values[of].sum(0), whole.values[i], rtol=0, atol=1e-12)
    assert np.abs(whole.values).max() > 0.1
    check = attributed("linear", sites="z", positions=[il.before_answer], heads=True).check(9)
    assert check.max_error < 1e-10


# --- organisms ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["latent-content", "latent-ignored"])
def test_completeness_and_the_known_mechanism_of_organisms(name: str) -> None:
    lens = il.load(name)
    task = lens.task(n=2, seed=0)
    found = attribute(lens, task, sites="hook_latent", method="ig", steps=8, tolerance=1e-3)
    assert found.completeness_gap.max() < 1e-3
    joint = lens.swap(
        task.base, task.source, context="fixed",
        base_answers=task.base_answers, source_answers=task.source_answers,
    )  # fmt: skip
    assert np.allclose(found.values.sum(0), joint.effect.numpy(), rtol=0, atol=2e-3)
    check = found.check()
    assert not check.fails
    assert "agrees" in check.verdict
    size = np.abs(found.values).max(0)
    assert (size > 5).all() if name == "latent-content" else (size < 0.1).all()


def test_attribution_patching_of_a_trained_organism_is_found_to_fail() -> None:
    lens = il.load("latent-content")
    assert attribute(lens, lens.task(n=4, seed=0), sites="hook_latent").check().fails


# --- rows, flags, maps --------------------------------------------------------------------------


def test_pairs_are_read_in_batches_as_alone() -> None:
    once = attributed("random", sites=["hook_latent", "resid_post"], context="free")
    twice = attributed("random", sites=["hook_latent", "resid_post"], context="free", batch_size=1)
    assert np.allclose(once.values, twice.values, rtol=0, atol=1e-12)


def test_a_donor_that_is_the_same_is_flagged() -> None:
    p = planted.planted("chain", xs0=[0.5, 0.0], xs1=[0.5, 1.0])
    found = attributed(p)
    assert found.flags.tolist() == [[2, 0]] * 3
    assert (found.values[:, 0] == 0).all()
    assert np.allclose(found.check().exact[:, 0], 0)


def test_a_position_that_a_run_has_not_is_flagged() -> None:
    found = attributed("chain", sites="resid_post", positions=[il.text.find("so "), il.latent[0]])
    assert found.flags.tolist() == [[1, 2, 2, 1], [0, 0, 0, 0]] * 2
    assert (found.values[::2] == 0).all()
    assert (found.check().exact[::2] == 0).all()
    with pytest.raises(il.EditTouchedNothing, match="4 times not_emitted and 4 times identical"):
        attributed("chain", sites="resid_post", positions=[il.text.find("so ")])


def test_a_map_says_that_it_is_an_approximation() -> None:
    found = attributed("chain")
    as_map = found.to_map()
    assert np.allclose(as_map.effect, found.values, rtol=0, atol=1e-12)
    assert as_map.notes[0].startswith("atp approximation")
    assert as_map.cells == found.cells
    total = np.abs(as_map.total - made("chain").truth["te"]).max()
    assert total < 1e-12
    assert "latent[2]" in repr(found)
    off = sweep(made("chain").lens, made("chain").pairs, sites="hook_latent", context="fixed")
    assert np.abs((off - as_map).effect).max() < 1e-10


# --- the model stays as it was, and refusals ----------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
def test_the_model_is_untouched(method: str) -> None:
    lens = il.load("latent-content")
    before = untouched.fingerprint(lens.model)
    next(lens.model.parameters()).requires_grad_(False)  # one that the user has frozen
    asked = [p.requires_grad for p in lens.model.parameters()]
    assert set(asked) == {True, False}
    sites = "rot_q" if method == "qk" else "resid_mid"
    options = {"sites": sites, "method": method, "steps": 2}
    attribute(lens, lens.task(n=2), **options)

    def fails(readout: Any) -> torch.Tensor:
        raise RuntimeError("planted")

    bad = Metric("bad", fails, "logits")
    with pytest.raises(RuntimeError, match="planted"):
        attribute(lens, lens.task(n=2), metric=bad, **options)
    assert untouched.same(before, untouched.fingerprint(lens.model))
    assert not lens.registry.entries
    assert [p.requires_grad for p in lens.model.parameters()] == asked
    assert all(p.grad is None for p in lens.model.parameters())


def test_what_does_not_fit_is_refused_in_a_sentence() -> None:
    for options, message in (
        ({"method": "magic"}, "method is 'magic'; choose 'atp' or"),
        ({"context": "frozen"}, "context is 'frozen'"),
        ({"direction": "up"}, "direction is 'up'"),
        ({"path": "long"}, "path is 'long'"),
        ({"rule": "simpson"}, "rule is 'simpson'; choose"),
        ({"steps": 0}, "steps is 0, expected a number of points"),
        ({"tolerance": 0.0}, "tolerance is 0.0, expected how large"),
        ({"tolerance": float("nan")}, "tolerance is nan"),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"metric": il.source_answer}, "il.source_answer is 0 or 1, which has no gradient"),
        ({"metric": il.kl}, "smallest at the unedited run"),
        ({"method": "qk"}, "method='qk' is about queries and keys, and the sites are hook_latent"),
        ({"method": "relp"}, "no coefficients for Writes, which holds no modules"),
        ({"sites": "pattern", "positions": [il.last_prompt]}, "holds a number per key"),
        ({"positions": [il.latent], "context": "free"}, "change each other through the loop"),
        (
            {"positions": [il.latent[0], il.latent[0:2]], "method": "ig"},
            "shares states with another cell",
        ),
        ({"sites": "vision_projector.hook_out"}, "vision_projector"),
    ):
        with pytest.raises((InputError, il.SiteUnavailable), match=message):
            UNCHECKED(made("chain").lens, made("chain").pairs, **{"sites": "hook_latent"} | options)
    with pytest.raises(InputError, match="follows no path"):
        _ = attributed("chain").completeness_gap
    p = made("chain")
    unknown = dataclasses.replace(p.pairs, source_answers=[None] * len(p.pairs))
    with pytest.raises(InputError, match="that of pair 0 is unknown"):
        attribute(p.lens, unknown)


def test_runs_without_an_answer_are_missing() -> None:
    lens = il.load("latent-content", answer=il.answers.after("nowhere:"))
    with pytest.raises(InputError, match="no answer was found in what the 2 unedited runs wrote"):
        attribute(lens, lens.task(n=2))


def test_a_loop_that_is_not_what_its_rule_says_is_refused() -> None:
    p = planted.planted("chain")
    spec = p.lens.spec
    assert spec is not None
    p.lens.spec = dataclasses.replace(spec, project=lambda h, inside: 2 * h)
    runs = attributed(p, context="free").values
    assert np.isfinite(runs).all()  # the run was made under the same rule
    honest = planted.planted("chain")
    lens, made_by = honest.lens, honest.lens.run

    def wrong(*args: Any, **options: Any) -> il.Run:
        run = made_by(*args, **options)
        return dataclasses.replace(run, latents=run.latents + 0.1)

    lens.run = wrong  # type: ignore[method-assign]
    with pytest.raises(InputError, match="are not what the planted family's rule makes"):
        attribute(lens, honest.pairs, sites="hook_latent", context="free")
    attribute(lens, honest.pairs, sites="hook_latent", context="fixed")


def test_a_loop_that_feeds_mixtures_is_refused_in_free_context() -> None:
    p = planted.planted("chain")
    (batch,) = attribute(p.lens, p.pairs, sites="hook_latent").batches
    spec = p.lens.spec
    assert spec is not None
    p.lens.spec = dataclasses.replace(spec, feeds=il.Mixture())
    options = (p.lens, batch.run, batch.targets, il.logit_diff)
    with pytest.raises(InputError, match="planted family feeds mixtures of token embeddings"):
        _ = Reading(*options, "free", batch.before).feedback
    assert Reading(*options, "fixed", batch.before).feedback is None


def test_what_is_registered_at_the_loop_is_refused_in_free_context() -> None:
    p = planted.planted("chain")
    with p.lens.hooks([("hook_latent", lambda act, hook: act * 0.5)]):
        with pytest.raises(InputError, match="registered at 'hook_latent'"):
            attribute(p.lens, p.pairs, sites="resid_post", context="free")
        attribute(p.lens, p.pairs, sites="resid_post", context="fixed")


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("rule", "theirs"),
    [("left", "riemann_left"), ("midpoint", "riemann_middle"), ("gauss-legendre", "gausslegendre")],
)
def test_captum_integrates_to_the_same(rule: str, theirs: str) -> None:
    from captum import attr as captum

    p = made("random")
    z0, z1 = (torch.tensor(p.latents(x)) for x in (p.x0, p.x1))
    x = torch.tensor(p.x0)
    outcome = lambda z: p.mechanism.answer(x.repeat(len(z) // len(x), 1), *z.unbind(1))[:, 0]  # noqa: E731
    integral = captum.IntegratedGradients(outcome)
    by_captum = integral.attribute(z1, baselines=z0, n_steps=6, method=theirs).sum(-1)
    found = attributed(p, method="ig", rule=rule, steps=6)
    assert np.allclose(found.values.T, by_captum.detach().numpy(), rtol=0, atol=1e-6)
