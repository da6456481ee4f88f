"""Pictures of what probes and lenses found: maps, similarity matrices and curves, lens tables."""

from collections.abc import Sequence

import numpy as np

from imaginelens.estimates.similarity import Kind
from imaginelens.hooks.errors import InputError
from imaginelens.probes.lens_table import LensTable, shown
from imaginelens.probes.map_result import ProbeMap
from imaginelens.probes.similarity import Similarity
from imaginelens.view.figure import Figure
from imaginelens.view.panels import Palette, Panel, Sheet, draw

_LINES = ("#2166ac", "#b2182b", "#4d4d4d", "#1b7837", "#762a83", "#b35806")


def probe_heatmap(
    found: ProbeMap,
    *,
    controls: bool = True,
    palette: Palette = "RdBu",
    title: str | None = None,
) -> Figure:
    """Draw accuracy by layer and step, with a panel for each control on the same scale.

    White is chance; an outlined cell is read better than permuted labels are (adjusted for the
    number of cells). It shows what can be read, not what is used.
    """
    chance = float(np.nanmean(found.chance))
    names = list(found.controls) if controls else []
    grids = {found.measure: found.accuracy, **{name: found.controls[name] for name in names}}
    steps, _ = found.shape
    panels = [
        Panel(
            grid.T, found.sites, [str(s) for s in range(steps)], "site", "step", name,
            _hover(found, name, grid), found.decodable().T if name == found.measure else None,
        )
        for name, grid in grids.items()
    ]  # fmt: skip
    marks = [] if found.controls else ["no controls"]
    words = title or f"{found.label}, read by {found.kind}"
    sheet = Sheet(
        panels, words, f"{found.measure} (white: {chance:.2f}, chance)", centre=chance,
        limit=max(chance, 1 - chance), span=(0.0, 1.0), marks=marks,
    )  # fmt: skip
    return draw(sheet, palette=palette)


def similarity_matrices(
    found: Similarity,
    *,
    site: str | int = 0,
    kind: Kind = "raw",
    steps: Sequence[int] | None = None,
    order: Sequence[int] | None = None,
    title: str | None = None,
) -> Figure:
    """Draw the cosine of every two examples, a panel for each step (paper Figure 2).

    A raw cosine near 1 says little, for hidden states share a large common vector: look at the
    centred one as well.

    Args:
        order: the examples in the order to draw them in, by their label, say.

    Raises:
        InputError: fewer than 3 examples have one of the steps.
    """
    panels = []
    for step in found.steps if steps is None else steps:
        inter = found.inter(step, site)
        matrix = getattr(inter, kind).round(3)  # a quarter of the bytes
        if order is not None:
            place = {example: k for k, example in enumerate(inter.inputs.tolist())}
            rows = [place[example] for example in order if example in place]
            matrix = matrix[np.ix_(rows, rows)]
            names = [str(example) for example in order if example in place]
        else:
            names = [str(example) for example in inter.inputs.tolist()]
        panels.append(Panel(matrix, names, names, "example", "example", f"step {step}"))
    words = title or f"{kind} cosine between examples, {_site(found, site)}"
    return draw(Sheet(panels, words, "cosine", limit=1.0, numbers=False))


def similarity_curves(
    found: Similarity, *, site: str | int = 0, title: str | None = None
) -> Figure:
    """Draw the mean cosine between examples at each step, raw and centred, beside the controls.

    Bars are 95% intervals.
    """
    import plotly.graph_objects as go

    name = _site(found, site)
    lines = {"raw": found.curve(site), "centred": found.curve(site, kind="centred")}
    for control, other in found.controls.items():
        sites = other.states.sites
        if name in sites and other.states.shape[1] > 1:
            lines[f"raw, {control}"] = other.curve(name)
    figure = Figure()
    for colour, (label, curve) in zip(_LINES, lines.items(), strict=False):
        steps = list(curve)
        values = [curve[s].value for s in steps]
        ends = [curve[s].ci() for s in steps]
        figure.add_trace(
            go.Scatter(
                x=steps, y=values, name=label, mode="lines+markers", line={"color": colour},
                error_y={
                    "array": [e.high - v for e, v in zip(ends, values, strict=True)],
                    "arrayminus": [v - e.low for e, v in zip(ends, values, strict=True)],
                },
            )
        )  # fmt: skip
    told = "; ".join(
        f"{label} {min(c.value for c in curve.values()):.2f} to "
        f"{max(c.value for c in curve.values()):.2f}"
        for label, curve in lines.items()
    )
    words = title or f"mean cosine between examples, {name}"
    figure.update_layout(
        title={"text": words}, width=640, height=400, plot_bgcolor="#ffffff",
        margin={"l": 80, "r": 160, "t": 60, "b": 60}, meta={"alt": f"{words}: {told}."},
    )  # fmt: skip
    figure.update_xaxes(title="step", tickmode="array", tickvals=list(lines["raw"]), showgrid=True,
                        gridcolor="#e6e6e6")  # fmt: skip
    figure.update_yaxes(title="cosine", range=[-0.2, 1.05], showgrid=True, gridcolor="#e6e6e6")
    return figure


def lens_heatmap(found: LensTable, *, example: int = 0, title: str | None = None) -> Figure:
    """Draw what each state of an example reads as: the likeliest token, darker if more probable.

    Raises:
        InputError: there is no such example, or it has no such step.
    """
    if not -len(found) <= example < len(found):
        raise InputError(f"there is no example {example} in a table of {len(found)}")
    steps = np.flatnonzero(found.mask[example]).tolist()
    if not steps:
        raise InputError(f"example {example} has no states at {found.at}; choose another")
    texts = found.tokens[example]
    chances = found.probabilities[example]
    words = [
        [f"{shown(texts[t, j, 0], limit=12)}\n{chances[t, j, 0]:.2f}" for t in steps]
        for j in range(len(found.sites))
    ]
    hover = [
        [
            "\n".join(
                f"{shown(text)} {p:.3f}" for text, p in zip(texts[t, j], chances[t, j], strict=True)
            )
            for t in steps
        ]
        for j in range(len(found.sites))
    ]
    panel = Panel(
        chances[steps, :, 0].T, found.sites, [str(t) for t in steps], "site", "step",
        hover=hover, words=words,
    )  # fmt: skip
    about = title or f"{found.kind}, example {example}: what each state reads as"
    return draw(Sheet([panel], about, "probability", limit=1.0, span=(0.0, 1.0)))


def _hover(found: ProbeMap, name: str, grid: np.ndarray) -> list[list[str]]:
    steps, sites = found.shape
    told = []
    for k in range(sites):
        row = []
        for s in range(steps):
            lines = [f"site: {found.sites[k]}", f"step: {s}", f"{name}: {grid[s, k]:.3f}"]
            if name == found.measure:
                lines += [
                    f"{found.level:.0%} interval: [{found.low[s, k]:.3f}, {found.high[s, k]:.3f}]",
                    f"chance: {found.chance[s]:.3f}",
                    f"p = {found.p[s, k]:.3g}, adjusted {found.q[s, k]:.3g}",
                ]
            row.append("\n".join(lines))
        told.append(row)
    return told


def _site(found: Similarity, site: str | int) -> str:
    return found.states.sites[found.states.layer(site)]
