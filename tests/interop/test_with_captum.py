"""captum on a run of ours: against our own effects, closed forms, and a model that ignores."""

import itertools
from typing import Any

import numpy as np
import pytest
import torch
from captum import attr

import imaginelens as il
from examples.interop import with_captum
from imaginelens.mediation.captum_forward import captum_forward

pytestmark = pytest.mark.filterwarnings("ignore")  # captum's own


def organism(name: str = "latent-content") -> Any:
    lens = il.load(name)
    lens.model.double()
    return lens


def test_the_example_finds_what_we_find() -> None:
    lens = organism()
    task = lens.task(n=2, seed=1)
    _, gap = with_captum.integrated_gradients(lens, task)
    assert gap < 1e-6
    values, gap = with_captum.ablation(lens, task)
    assert gap < 1e-10
    assert (values[1] > values[0]).all()
    _, apart, missing = with_captum.shapley(lens, task)
    assert apart < 0.05
    assert missing < 1e-5
    assert with_captum.through_a_layer(lens, task) < 1e-10
    grid, (_, gap) = with_captum.picture(lens, task)
    assert grid.shape == (3, 3)
    assert gap < 1e-10


def test_the_example_runs_as_a_script(capsys: pytest.CaptureFixture[str]) -> None:
    with_captum.main()
    said = capsys.readouterr().out
    assert "off by 0 from il.sweep" in said
    assert "off by 0 from an edit of ours" in said


def test_shapley_values_are_the_mean_over_all_orders() -> None:
    lens = organism()
    task = lens.task(n=1, seed=2)
    values, _, _ = with_captum.shapley(lens, task)
    run, other = lens.run(task.base), lens.run(task.source)
    outcome: dict[tuple[int, ...], float] = {}
    for chosen in ((), (0,), (1,), (0, 1)):  # by our own edits
        options = dict(targets=with_captum.latents(lens, task)[0].targets)
        if not chosen:
            outcome[chosen] = float(il.logit_diff(lens.read_answer(run, **options)))
            continue
        at = il.latent if len(chosen) == 2 else il.latent[chosen[0]]
        with lens.edit(il.Swap(other), at=at):
            outcome[chosen] = float(il.logit_diff(lens.read_answer(run, **options)))
    for step in (0, 1):
        gains = []
        for order in itertools.permutations((0, 1)):
            before = tuple(sorted(order[: order.index(step)]))
            after = tuple(sorted((*before, step)))
            gains.append(outcome[after] - outcome[before])
        assert values[step] == pytest.approx(np.mean(gains), abs=1e-5)


@pytest.mark.parametrize(("name", "used"), [("latent-content", True), ("latent-ignored", False)])
def test_latents_that_are_ignored_get_little(name: str, used: bool) -> None:
    lens = organism(name)
    task = lens.task(n=2, seed=0)
    forward, given = with_captum.latents(lens, task)
    found = attr.FeatureAblation(forward).attribute(
        forward.inputs, baselines=given, feature_mask=forward.features
    )
    largest = float(found.abs().max())
    assert largest > 5 if used else largest < 1


def test_without_a_metric_captums_target_names_a_token() -> None:
    lens = organism()
    task = lens.task(n=2, seed=0)
    run = lens.run(task.base)
    forward = captum_forward(lens, run)
    assert torch.equal(forward.inputs, run.latents)
    logits = forward(forward.inputs)
    assert torch.equal(logits, lens.read_answer(run, forward.targets).logits)
    tokens = [lens.encode(str(answer))[0] for answer in run.answers]
    found = attr.Saliency(forward).attribute(
        forward.inputs.requires_grad_(), target=tokens, abs=False
    )
    z = run.latents.clone().requires_grad_()
    with lens.hooks([("hook_latent", lambda act, hook: _put(act, hook, z))]):
        by_hand = lens.run_with_hooks(run)
    column = lens.script(run).read_at
    chosen = sum(by_hand[row, column[row], tokens[row]] for row in range(2))
    (gradient,) = torch.autograd.grad(chosen, z)
    torch.testing.assert_close(found, gradient, rtol=0, atol=1e-10)


def _put(act: torch.Tensor, hook: Any, z: torch.Tensor) -> torch.Tensor:
    new = act.clone()
    for row in range(len(z)):
        new[row, hook.tokens.latents(row)] = z[row]
    return new


def test_stacked_states_are_read_one_behind_the_other() -> None:
    lens = organism()
    task = lens.task(n=2, seed=0)
    forward, given = with_captum.latents(lens, task)
    stacked = forward(torch.cat([forward.inputs, given]))
    apart = torch.cat([forward(forward.inputs), forward(given)])
    assert torch.equal(stacked, apart)
    assert not torch.equal(stacked[:2], stacked[2:])
    assert not [weight for weight in lens.model.parameters() if not weight.requires_grad]
    assert lens.registry.entries == []


def test_edits_that_are_active_act_on_the_function_too() -> None:
    lens = organism()
    task = lens.task(n=1, seed=0)
    forward, _ = with_captum.latents(lens, task)
    plain = forward(forward.inputs)
    with lens.edit(il.Zero(), at=il.before_answer, site="blocks.2.hook_resid_post"):
        edited = forward(forward.inputs)
    assert not torch.equal(plain, edited)


def test_what_is_no_function_of_one_tensor_is_refused() -> None:
    lens = organism()
    task = lens.task(n=2, seed=0)
    run = lens.run(task.base)
    forward = captum_forward(lens, run)
    with pytest.raises(il.InputError, match=r"states of shape \(3, 2, 64\) were given, expected"):
        forward(torch.zeros(3, 2, 64, dtype=torch.float64))
    with pytest.raises(il.InputError, match="selects no position of 'hook_latent' in this run"):
        captum_forward(lens, lens.run(task.base, latents=il.Skip()))
    with pytest.raises(il.InputError, match="names 5 sites; a forward function is about one"):
        captum_forward(lens, run, site="*.hook_resid_post")
    with pytest.raises(il.InputError, match=r"1 answers were given for 2 examples"):
        captum_forward(lens, run, source_answers="bar")
    with pytest.raises(il.InputError, match="example 0 has no source answer"):
        captum_forward(lens, run, metric=il.logit_diff)
    short = lens.run(task.base[0], max_new_tokens=1)
    with pytest.raises(il.InputError, match=r"the examples \[0\] have no answer"):
        captum_forward(lens, short)
    ragged = lens.run([task.base[0], {**task.base[0], "text": "start"}])
    with pytest.raises(il.InputError, match="a tensor holds equally many of each"):
        captum_forward(
            lens, ragged, site="blocks.0.hook_resid_pre", at=il.text, base_answers=["bar"] * 2
        )
