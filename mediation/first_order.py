"""First-order approximations of patching: gradient at the unedited run times change of the state.

Attribution patching (Nanda 2023; Syed et al. 2023, arXiv 2310.10348) is exact where the metric is
linear in the state and misses what is saturated there. GradDrop (Kramar et al. 2024, arXiv
2403.00745) averages over gradients that skip one layer each, so that paths that cancel are seen.
"""

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int8

from imaginelens.hooks.entries import HookEntry, HookPoint
from imaginelens.hooks.errors import InputError
from imaginelens.mediation.gradients import Graph, Reading, Rules
from imaginelens.mediation.patched import ByCell, Patched
from imaginelens.mediation.taps import States, tap


@dataclass(frozen=True, eq=False)
class Approximated:
    """What an approximation found in one batch.

    Attributes:
        values: the effects.
        flags: why a state was not changed, as in `Patched.flags`.
        before: the metric of the unedited run.
        gap: how far the cells of each one's path are from the joint effect; None without a path.
    """

    values: ByCell
    flags: Int8[np.ndarray, "cell example"]
    before: Float[np.ndarray, " example"]
    gap: ByCell | None = None


def read_all(
    reading: Reading, cells: Patched, rules: Rules | None = None
) -> tuple[Graph, dict[str, States]]:
    """Read the unedited run with a tap at every cell; also, the states there."""
    taps = {site: tap(site, spots) for site, spots in cells.spots.items()}
    graph = reading.graph(list(taps.values()), rules)
    return graph, {site: one.states for site, one in taps.items()}


def linear(reading: Reading, cells: Patched, rules: Rules | None = None) -> Approximated:
    """Gradient times change; under `rules`, with the gradient that they make."""
    graph, states = read_all(reading, cells, rules)
    values = cells.products(graph.gradients(), states)
    return Approximated(values, cells.flags(states), graph.values)


def dropped(reading: Reading, cells: Patched) -> Approximated:
    """The size of gradient times change, averaged over gradients that skip one layer each.

    Where L layers can be skipped, the sum over them is divided by L - 1 for cells inside a layer,
    which have no gradient where their own is skipped (equation 11 of arXiv 2403.00745, quoted from
    memory and from a third party's code), and by L for those in the stream between layers.

    Raises:
        InputError: there are fewer than two layers to skip.
    """
    lens = reading.lens
    wanted = ("hook_attn_out", "hook_mlp_out")
    names = [n for n in lens.registry if n.startswith("blocks.") and n.endswith(wanted)]
    layers = sorted({int(name.split(".")[1]) for name in names})
    if len(layers) < 2:
        raise InputError(
            f"method='grad_drop' skips one layer of several, and {type(lens.model).__name__} has "
            f"{len(layers)} with known outputs; use method='atp'"
        )
    skipped: list[int] = []

    def skip(grad: torch.Tensor, hook: HookPoint) -> torch.Tensor | None:
        return torch.zeros_like(grad) if hook.layer() in skipped else None

    graph, states = read_all(reading, cells, Rules(entries=(HookEntry(tuple(names), skip, "bwd"),)))
    sizes = np.zeros((len(cells.cells), cells.n_rows))
    for layer in layers:
        skipped[:] = [layer]
        sizes += np.abs(cells.products(graph.gradients(), states))
    inside = np.array(
        [cell.layer is not None and "resid" not in cell.site for cell, _ in cells.cells]
    )
    values = sizes / (len(layers) - inside.astype(float))[:, None]
    return Approximated(values, cells.flags(states), graph.values)
