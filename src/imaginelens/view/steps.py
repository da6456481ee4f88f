"""Step by step: how far each latent moves where an earlier one was replaced."""

import numpy as np

from imaginelens.estimates import Estimate, EstimateError
from imaginelens.mediation.effect_map import EffectMap
from imaginelens.mediation.step_influence import StepInfluence
from imaginelens.view.figure import Figure
from imaginelens.view.maps import marks
from imaginelens.view.numerals import precise
from imaginelens.view.panels import Palette, Panel, Sheet, draw


def step_heatmap(
    found: StepInfluence,
    *,
    level: float = 0.95,
    limit: float | None = None,
    palette: Palette = "RdBu",
    title: str | None = None,
) -> Figure:
    """Draw how far each step (across) moves where a step (down) was replaced: ||z' - z|| / ||z||.

    White is no change, as before the replaced step; grey was not measured, or no run has both
    steps. An outlined cell's interval leaves out 0. The diagonal is the replacement itself.

    Args:
        level: of the intervals, 0 to 1.
        limit: where the colour scale ends, so that several figures can share it.
    """
    names = [f"z[{t}]" for t in range(found.steps)]
    shape = found.steps, found.steps
    outlined = np.zeros(shape, dtype=bool)
    hover = [["" for _ in names] for _ in names]
    for s, t in np.ndindex(shape):
        hover[s][t], outlined[s, t] = _told(found, s, t, level)
    panel = Panel(found.mean, names, names, "replaced", "moved", hover=hover, outlined=outlined)
    free = found.free
    words = title or f"replaced latents and those behind them, {free.direction}"
    drawn = Sheet([panel], words, "relative change", limit=limit, marks=marks(free))
    figure = draw(drawn, palette=palette)
    figure.layout.meta["alt"] += " " + "; ".join(
        f"effect on {each.metric} in {each.context} context: "
        + ", ".join(f"{name} {_effect(each, s)}" for s, name in enumerate(names))
        for each in (free, found.fixed)
    )
    return figure


def _told(found: StepInfluence, replaced: int, moved: int, level: float) -> tuple[str, bool]:
    """What a cell says, and whether its interval leaves out 0."""
    values = found.change[replaced, moved]
    there = values[~np.isnan(values)]
    lines = [f"replaced: z[{replaced}]", f"moved: z[{moved}]"]
    if not len(there):
        return "\n".join([*lines, "not measured: no run has both"]), False
    lines.append(f"relative change: {precise(float(there.mean()))}")
    outside = False
    estimate = _estimate(found, replaced, moved)
    if estimate is not None:
        interval = estimate.ci(level=level)
        lines.append(f"{level:.0%} interval: {interval}")
        outside = 0.0 not in interval
    lines.append(f"n: {len(there)}")
    if moved == replaced:
        lines += [
            f"effect on {each.metric} in {each.context} context: {_effect(each, replaced)}"
            for each in (found.free, found.fixed)
        ]
    return "\n".join(lines), bool(outside)


def _estimate(found: StepInfluence, replaced: int, moved: int) -> Estimate | None:
    """None where fewer than two examples have both steps."""
    try:
        return found.at(replaced=replaced, moved=moved)
    except EstimateError:
        return None


def _effect(effects: EffectMap, step: int) -> str:
    values = effects.effect[step]
    there = values[~np.isnan(values)]
    return precise(float(there.mean())) if len(there) else "not measured"
