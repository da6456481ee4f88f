"""captum's methods on the latents, and on the picture, of a model that reasons in latents.

For users of captum 0.8 or later. Its methods attribute the output of a function to the tensor it is
given. `il.captum_forward(lens, run)` is a run as such a function: of its latents, or of the states
at any site and positions, to the answer's logits or a metric. The rest of the run stays as it is.
Each number stands beside its oracle, our own exact effects or our own attribution. From the root of
a clone:

    python -m examples.interop.with_captum
"""

import warnings
from typing import Any

import numpy as np
import torch
from captum import attr

import imaginelens as il
from imaginelens.mediation.captum_forward import CaptumForward, captum_forward


def latents(lens: Any, task: il.Pairs) -> tuple[CaptumForward, torch.Tensor]:
    """The base runs as functions of their latents, and the latents of the sources."""
    run, other = lens.run(task.base), lens.run(task.source)
    forward = captum_forward(
        lens, run, metric=il.logit_diff, source_answers=list(task.source_answers)
    )
    return forward, forward.states_of(other)


def integrated_gradients(lens: Any, task: il.Pairs) -> tuple[np.ndarray, float]:
    """The share of each latent, (step, example), and how far from `il.attribute`'s."""
    forward, given = latents(lens, task)
    captum = attr.IntegratedGradients(forward).attribute(
        given, baselines=forward.inputs, n_steps=6, method="gausslegendre"
    )
    found = captum.sum(-1).detach().numpy().T
    ours = il.attribute(lens, task, sites="hook_latent", method="ig", steps=6)
    return found, float(np.abs(found - ours.values).max())


def ablation(lens: Any, task: il.Pairs) -> tuple[np.ndarray, float]:
    """What each latent alone does when it is replaced, and how far from `il.sweep`'s cells."""
    forward, given = latents(lens, task)
    captum = attr.FeatureAblation(forward).attribute(
        forward.inputs, baselines=given, feature_mask=forward.features
    )
    found = -captum[..., 0].numpy().T  # captum's is own minus replaced
    ours = il.sweep(lens, task, sites="hook_latent", context="fixed", metric=il.logit_diff)
    return found, float(np.abs(found - ours.values.reshape(found.shape)).max())


def shapley(lens: Any, task: il.Pairs) -> tuple[np.ndarray, float, float]:
    """KernelShap and exact Shapley values of one example's latents: the values, how far the two
    are apart, and how far they are from summing to the joint effect."""
    forward, given = latents(lens, task[:1] if len(task) > 1 else task)
    options = {"baselines": forward.inputs, "feature_mask": forward.features}
    with torch.no_grad():
        exact = attr.ShapleyValues(forward).attribute(given, **options)[0, :, 0]
        kernel = attr.KernelShap(forward).attribute(given, n_samples=64, **options)[0, :, 0]
        joint = forward(given) - forward(forward.inputs)
    apart, missing = (exact - kernel).abs().max(), (exact.sum() - joint).abs().max()
    return exact.numpy(), float(apart), float(missing)


def through_a_layer(lens: Any, task: il.Pairs) -> float:
    """LayerIntegratedGradients at a module of the model: how far from integrating over the states
    at that site ourselves. Captum hooks the module, so that it sees one run at a time."""
    forward, given = latents(lens, task[:1])
    layer = lens.model.model.language_model.layers[0]
    captum = attr.LayerIntegratedGradients(forward, layer).attribute(
        given, baselines=forward.inputs, n_steps=5, method="gausslegendre", internal_batch_size=1
    )
    everywhere = il.positions(list(range(forward.run.tokens.width)))
    there = captum_forward(
        lens, forward.run, site="blocks.0.hook_resid_post", at=everywhere, metric=il.logit_diff,
        source_answers=task.source_answers[0],
    )  # fmt: skip
    with lens.edit(il.Replace(given[0]), at=il.latent):
        moved = there.states_of(forward.run)
    ours = attr.IntegratedGradients(there).attribute(
        moved, baselines=there.inputs, n_steps=5, method="gausslegendre"
    )
    width = min(captum.shape[1], ours.shape[1])
    return float((captum[:, :width] - ours[:, :width]).abs().max())


def picture(lens: Any, task: il.Pairs) -> tuple[torch.Tensor, tuple[str, float]]:
    """Which image tokens the answer's logit comes from: ablated one by one with the states of the
    other picture, (row, column) of the grid; and the same for the largest by our own patch."""
    base, source = lens.run(task.base[0]), lens.run(task.source[0])
    forward = captum_forward(lens, base, site="blocks.0.hook_resid_pre", at=il.image)
    token = lens.encode(str(task.base_answers[0]))[0]
    given = forward.states_of(source)
    found = attr.FeatureAblation(forward).attribute(
        forward.inputs, baselines=given, feature_mask=forward.features, target=token
    )[0, :, 0]
    grid = found.reshape(3, 3)
    cell = int(found.abs().argmax())
    row, column = divmod(cell, 3)
    edit = il.Replace(given[0, [cell]])
    with lens.edit(edit, at=il.image[0][row, column], site="blocks.0.hook_resid_pre"):
        edited = lens.read_answer(base, forward.targets).logits[0, token]
    own = lens.read_answer(base, forward.targets).logits[0, token]
    return grid, (f"cell {row}, {column}", abs(float(grid[row, column] - (own - edited))))


def main() -> None:
    """Print each number beside what it should be."""
    lens = il.load("latent-content")
    lens.model.double()
    task = lens.task(n=2, seed=0)
    found, gap = integrated_gradients(lens, task)
    print(f"integrated gradients of z0, z1: {found[:, 0].round(2)}, off by {gap:.1g} from ours")
    found, gap = ablation(lens, task)
    print(f"ablation of z0, z1:             {found[:, 0].round(2)}, off by {gap:.1g} from il.sweep")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # KernelShap says that its samples are few
        values, apart, missing = shapley(lens, task)
    print(
        f"Shapley values of z0, z1:       {values.round(2)}, KernelShap off by {apart:.1g}, "
        f"sum off by {missing:.1g}"
    )
    print(f"through a layer, off by {through_a_layer(lens, task):.1g}")
    grid, (where, gap) = picture(lens, task)
    print(f"image tokens:\n{grid.numpy().round(2)}\n{where} off by {gap:.1g} from an edit of ours")


if __name__ == "__main__":
    main()
