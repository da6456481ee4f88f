"""Trajectories: how the latents of each example move, step by step, in the plane of most variance.

A principal component is where states differ most, not what the model uses; and two states that lie
together in the plane may lie far apart in the dimensions that are left out.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Bool, Float

from imaginelens.hooks.errors import InputError
from imaginelens.hooks.positions import latent
from imaginelens.hooks.run import Run
from imaginelens.probes.states import States
from imaginelens.view.charts import COLOURS, DASHES, FAINT, chart, words
from imaginelens.view.figure import Figure


@dataclass(frozen=True, eq=False)
class Plane:
    """States in the plane of their first two principal components.

    Attributes:
        points: nan where an example has no such step.
        explained: the share of the variance that each of the two has.
    """

    points: Float[np.ndarray, "example step 2"]
    explained: tuple[float, float]


def plane_of(
    states: Float[np.ndarray, "example step d_model"], mask: Bool[np.ndarray, "example step"]
) -> Plane:
    """Fit two principal components to all states that are there, and project these.

    The sign of a component is that which makes its largest weight positive.

    Raises:
        InputError: there are fewer than two states, or all are equal.

    >>> line = np.arange(4.0)[None, :, None] * [3.0, 4.0]
    >>> plane = plane_of(line, np.ones((1, 4), bool))
    >>> plane.points[0, :, 0].round(9).tolist(), plane.explained
    ([-7.5, -2.5, 2.5, 7.5], (1.0, 0.0))
    """
    there = states[mask].astype(np.float64)
    if len(there) < 2:
        raise InputError(
            f"{len(there)} states are too few for a plane; run more examples, or steps"
        )
    centred = there - there.mean(0)
    _, sizes, axes = np.linalg.svd(centred, full_matrices=False)
    if sizes[0] <= 1e-12 * max(1.0, float(np.abs(there).max())):
        raise InputError(
            f"all {len(there)} states are equal, so that no direction tells them apart"
        )
    two = np.zeros((2, centred.shape[1]))
    two[: len(axes)] = axes[:2]
    two *= np.where(two[[0, 1], np.abs(two).argmax(1)] < 0, -1.0, 1.0)[:, None]
    points = np.full((*mask.shape, 2), np.nan)
    points[mask] = centred @ two.T
    shares = np.append(sizes**2 / (sizes**2).sum(), 0.0)
    rounded = [0.0 if share < 1e-12 else float(share) for share in shares[:2]]
    return Plane(points, (min(rounded[0], 1.0), rounded[1]))


def trajectories(
    of: Run | States,
    *,
    by: Sequence[Any] | None = None,
    site: str | int | None = None,
    title: str | None = None,
) -> Figure:
    """Draw the latents of each example as a line from step to step, coloured by label.

    The axes are the first two principal components of all states drawn. A ring is an example's
    first step, a square its last. The figure is returned, not shown.

    Args:
        of: a run, or states that were collected, whose labels are used if `by` is left out.
        by: a label for each example, or (example, step): then the points are coloured.
        site: of the states; of a run "hook_latent" (what is fed back), or one it captured.

    Raises:
        InputError: there is no such site, not one label for each, more than 27 different ones, or
            all states are equal.
        DonorError: the run did not capture that site.

    >>> states = np.random.default_rng(0).normal(size=(4, 3, 8))
    >>> trajectories(States.of(states, ["cat", "dog", "cat", "dog"])).alt[-15:]
    '; 2 cat, 2 dog.'
    """
    values, mask, where, known = _read(of, site)
    labels = _labels(known if by is None else by, mask)
    plane = plane_of(values, mask)
    first, second = plane.explained
    n, steps = mask.shape
    about = title or f"{where}, step by step"
    kinds = _kinds(labels, mask)
    figure = chart(
        about, x=f"component 1 ({first:.0%} of the variance)",
        y=f"component 2 ({second:.0%} of the variance)", width=760, height=560, right=200,
        alt=(
            f"{about}: {int(mask.any(1).sum())} examples of up to {steps} steps in the plane of "
            f"two principal components, which have {first:.1%} and {second:.1%} of the variance"
            f"{_counts(labels, mask, kinds)}."
        ),
        notes=["ring: first step, square: last; components are where states differ most, which is "
               "not what the model uses"],
    )  # fmt: skip
    per_step = labels is not None and labels.ndim == 2
    if per_step:
        _paths(figure, plane, mask, np.arange(n), FAINT, "solid", "")
    for number, kind in enumerate(kinds):
        colour = COLOURS[number % len(COLOURS)]
        dash = DASHES[number // len(COLOURS)]
        own = np.ones(mask.shape, bool)
        if labels is not None:
            own &= (labels if per_step else labels[:, None]) == kind
        name = "" if kind is None else words(kind)
        if not per_step:
            _paths(figure, plane, mask, np.flatnonzero(own.any(1)), colour, dash, name)
        _marks(figure, plane, mask, own & mask, labels, colour, name if per_step else "")
    figure.update_layout(showlegend=labels is not None)
    return figure


# ---- what is drawn -----------------------------------------------------------------------------


def _paths(
    figure: Figure, plane: Plane, mask: Any, rows: Any, colour: str, dash: str, name: str
) -> None:
    """The lines of some examples, as one broken line."""
    import plotly.graph_objects as go

    x: list[float | None] = []
    y: list[float | None] = []
    for row in rows:
        points = plane.points[row, mask[row]]
        x += [*points[:, 0].tolist(), None]
        y += [*points[:, 1].tolist(), None]
    opacity = 0.35 if len(mask) > 60 else 0.6
    figure.add_trace(
        go.Scatter(
            x=x, y=y, mode="lines", line={"color": colour, "width": 1.5, "dash": dash}, name=name,
            opacity=opacity, hoverinfo="skip", showlegend=bool(name), legendgroup=name,
        )
    )  # fmt: skip


def _marks(
    figure: Figure, plane: Plane, mask: Any, own: Any, labels: Any, colour: str, name: str
) -> None:
    """A ring at each first step, a dot at those between, a square at the last."""
    import plotly.graph_objects as go

    steps = np.arange(mask.shape[1])
    first = np.where(mask, steps, len(steps)).min(1)
    last = np.where(mask, steps, -1).max(1)
    roles: dict[tuple[str, int], list[tuple[int, int]]] = {}
    for row, step in np.argwhere(own).tolist():
        role = ("square", 8) if step == last[row] else ("circle", 5)
        role = ("circle-open", 9) if step == first[row] < last[row] else role
        roles.setdefault(role, []).append((row, step))
    for number, ((symbol, size), cells) in enumerate(roles.items()):
        at = np.array([plane.points[cell] for cell in cells])
        figure.add_trace(
            go.Scatter(
                x=at[:, 0].tolist(), y=at[:, 1].tolist(), mode="markers", name=name,
                marker={"symbol": symbol, "size": size, "color": colour,
                        "line": {"width": 2 if symbol.endswith("open") else 0, "color": colour}},
                customdata=[words(_hover(row, step, labels)) for row, step in cells],
                hovertemplate="%{customdata}<extra></extra>", legendgroup=name,
                showlegend=bool(name) and number == 0,
            )
        )  # fmt: skip


def _hover(row: int, step: int, labels: Any) -> str:
    lines = [f"example {row}", f"step {step}"]
    if labels is not None:
        lines.append(f"label: {labels[row] if labels.ndim == 1 else labels[row, step]}")
    return "\n".join(lines)


# ---- what came ---------------------------------------------------------------------------------


def _read(
    of: Run | States, site: str | int | None
) -> tuple[Float[np.ndarray, "example step d_model"], Bool[np.ndarray, "example step"], str, Any]:
    """The states, which of them are there, where they are from, and their labels."""
    if isinstance(of, Run):
        if isinstance(site, int):
            raise InputError(f"site is {site}; name a hook of the run, such as 'hook_latent'")
        name = site or "hook_latent"
        held = of.states(name, latent)
        values = held.values.detach().cpu().double().numpy()
        return values, held.mask.cpu().numpy(), f"latents at {name}", None
    layer = of.layer(0 if site is None else site)
    n, steps, _, width = of.shape
    values = np.zeros((n, steps, width))
    for step in range(steps):
        rows = np.flatnonzero(of.mask[:, step])
        values[rows, step] = of.cells.read(step, layer, rows)
    return values, of.mask, f"states at {of.sites[layer]}", of.labels


def _labels(given: Any, mask: Bool[np.ndarray, "example step"]) -> Any:
    """Labels as text, one per example or (example, step); None if there are none."""
    if given is None:
        return None
    plain = given.tolist() if hasattr(given, "tolist") else list(given)
    nested = bool(plain) and isinstance(plain[0], list | tuple)
    wanted = mask.shape if nested else mask.shape[:1]
    sizes = {len(row) for row in plain} if nested else {wanted[-1]}
    if len(plain) != len(mask) or sizes != {wanted[-1]}:
        got = f"{len(plain)} x {sorted(sizes)}" if nested else f"{len(plain)}"
        raise InputError(
            f"{got} labels came with {len(mask)} examples of {mask.shape[1]} steps; give one per "
            "example, or one per (example, step)"
        )
    found = np.empty(wanted, dtype=object)
    for index in np.ndindex(*wanted):
        found[index] = str(plain[index[0]][index[1]] if nested else plain[index[0]])
    return found


def _kinds(labels: Any, mask: Bool[np.ndarray, "example step"]) -> list[Any]:
    """The labels there are, in the order they come."""
    if labels is None:
        return [None]
    seen = labels[mask] if labels.ndim == 2 else labels[mask.any(1)]
    kinds = list(dict.fromkeys(seen.tolist()))
    most = len(COLOURS) * (len(DASHES) if labels.ndim == 1 else 1)
    if len(kinds) > most:
        raise InputError(
            f"there are {len(kinds)} different labels, and {most} can be told apart; give coarser "
            "ones, or leave by out"
        )
    return kinds


def _counts(labels: Any, mask: Bool[np.ndarray, "example step"], kinds: list[Any]) -> str:
    if labels is None:
        return ""
    seen = (labels[mask] if labels.ndim == 2 else labels[mask.any(1)]).tolist()
    return "; " + ", ".join(f"{seen.count(kind)} {kind}" for kind in kinds)
