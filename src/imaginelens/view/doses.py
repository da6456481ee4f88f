"""Dose-response: how the metric follows a direction, beside random directions of its norm."""

import numpy as np
from jaxtyping import Float

from imaginelens.estimates import Estimate
from imaginelens.estimates.margin import Margin
from imaginelens.estimates.margin import words as margin_in_words
from imaginelens.probes.steering import DoseResponse
from imaginelens.view.charts import FAINT, chart, words
from imaginelens.view.figure import Figure

_INK, _RANDOM = "#1f5a94", "#9a9a9a"


def dose_response(
    found: DoseResponse, *, margin: Margin | None = None, title: str | None = None
) -> Figure:
    """Draw the change of the metric at each dose, and along random directions of the same norm.

    Bars are 95% intervals; dose 0 is the unedited run, whose change is 0. A filled point differs
    from the random directions (Holm over doses), an open one is not shown to.

    Args:
        margin: of the slope, per dose of 1; with it the verdict is written below.

    Raises:
        EstimateError: the margin is none.

    >>> from imaginelens.hooks.metrics import logit_diff
    >>> before = np.arange(4.0)
    >>> found = DoseResponse(
    ...     doses=(1.0,), metric=logit_diff, before=before, after=before[None] + [2.0, 2.1, 1.9, 2],
    ...     random=np.stack([[before, before + 0.1]]), groups=None, flags={}, change=(0.5,),
    ...     where="latent of hook_latent", context="free")
    >>> dose_response(found).layout.yaxis.title.text
    'change of logit_diff, logits'
    """
    import plotly.graph_objects as go

    unit = f", {found.metric.unit}" if found.metric.unit else ""
    about = title or f"Steering at {found.where}, {found.context} context"
    figure = chart(
        about, x="dose (times the direction)", y=f"change of {found.metric.name}{unit}",
        alt=_alt(found, about, margin), width=720, right=200, notes=_notes(found, margin),
    )  # fmt: skip
    doses, zero = _with_zero(found.doses), found.doses.index
    for draw in range(found.random.shape[1]):
        line = [0.0 if d == 0 else _mean(found.random[zero(d), draw] - found.before) for d in doses]
        figure.add_trace(
            go.Scatter(
                x=doses, y=line, mode="lines", line={"color": _RANDOM, "width": 1}, opacity=0.6,
                name="one random direction", showlegend=draw == 0, hoverinfo="skip",
            )
        )  # fmt: skip
    along = [None if d == 0 else _along_random(found, zero(d)) for d in doses]
    figure.add_trace(
        go.Scatter(
            x=doses, y=_values(along), error_y=_bars(along), name="random, mean",
            mode="lines+markers", line={"color": _RANDOM, "dash": "dash"},
            marker={"symbol": "square", "size": 6, "color": _RANDOM},
            customdata=[words(_told(e, d)) for e, d in zip(along, doses, strict=True)],
            hovertemplate="%{customdata}<extra></extra>",
        )
    )  # fmt: skip
    effects = [None if d == 0 else found.effects[zero(d)] for d in doses]
    figure.add_trace(
        go.Scatter(
            x=doses, y=_values(effects), error_y=_bars(effects), mode="lines", name="the direction",
            line={"color": _INK, "width": 2}, hoverinfo="skip",
        )
    )  # fmt: skip
    beyond = {dose: p < 0.05 for dose, p in zip(found.doses, found.pvalues, strict=True)}
    for filled, name in ((True, "differs from random"), (False, "not shown to differ")):
        own = [d for d in found.doses if bool(beyond[d]) is filled]
        if own:
            figure.add_trace(
                go.Scatter(
                    x=own, y=[found.effects[zero(d)].value for d in own], mode="markers", name=name,
                    marker={"symbol": "circle", "size": 9,
                            "color": _INK if filled else "#ffffff",
                            "line": {"width": 2, "color": _INK}},
                    customdata=[words(_hover(found, zero(d))) for d in own],
                    hovertemplate="%{customdata}<extra></extra>",
                )
            )  # fmt: skip
    for axis in ("x", "y"):
        across = axis == "y"
        figure.add_shape(
            type="line", x0=0, x1=1 if across else 0, y0=0, y1=0 if across else 1,
            xref="x domain" if across else "x", yref="y" if across else "y domain",
            line={"color": FAINT, "width": 1.2}, layer="below",
        )  # fmt: skip
    figure.update_xaxes(tickmode="array", tickvals=doses, ticktext=[f"{d:g}" for d in doses])
    return figure


def _with_zero(doses: tuple[float, ...]) -> list[float]:
    return sorted([0.0, *doses])


def _along_random(found: DoseResponse, k: int) -> Estimate:
    """The change along random directions, averaged over them, as an estimate over examples."""
    changes = found.random[k].mean(0) - found.before
    name = f"random directions at dose {found.doses[k]:g}"
    if found.metric.binary:
        return Estimate.bounded(changes, low=-1.0, high=1.0, name=name, groups=found.groups)
    return Estimate.mean(changes, name=name, unit=found.metric.unit, groups=found.groups)


def _mean(changes: Float[np.ndarray, " example"]) -> float:
    there = changes[~np.isnan(changes)]
    return float(there.mean()) if len(there) else float("nan")


def _values(line: list[Estimate | None]) -> list[float]:
    return [0.0 if estimate is None else estimate.value for estimate in line]


def _bars(line: list[Estimate | None]) -> dict[str, list[float]]:
    """How far each interval reaches above and below its estimate; nothing at dose 0."""
    above, below = [], []
    for estimate in line:
        interval = None if estimate is None else estimate.ci()
        above.append(0.0 if interval is None else interval.high - _values([estimate])[0])
        below.append(0.0 if interval is None else _values([estimate])[0] - interval.low)
    return {"array": above, "arrayminus": below}


# ---- words -------------------------------------------------------------------------------------


def _told(estimate: Estimate | None, dose: float) -> str:
    if estimate is None:
        return f"dose {dose:g}: the unedited run"
    return f"{estimate.name}: {estimate.value:.4g}\n95% interval: {estimate.ci()}\nn: {estimate.n}"


def _hover(found: DoseResponse, k: int) -> str:
    beyond = found.beyond_random[k]
    return "\n".join(
        [
            _told(found.effects[k], found.doses[k]),
            f"beyond random: {beyond.value:.4g} {beyond.ci()}",
            f"p, adjusted for {len(found.doses)} doses: {found.pvalues[k]:.3g}",
            f"states moved by {found.change[k]:.0%} of their norm",
        ]
    )


def _slope(found: DoseResponse, margin: Margin | None) -> list[str]:
    slope, n = found.slope, found.random.shape[1]
    said = [
        f"slope {slope.value:.3g} {slope.ci()}, along random directions "
        f"{found.slope_random.value:.3g}; {found.as_steep} of {n} of these are as steep"
    ]
    if margin is not None:
        said.append(f"{found.verdict(margin)} (margin of the slope: {margin_in_words(margin)})")
    return said


def _notes(found: DoseResponse, margin: Margin | None) -> list[str]:
    lines = _slope(found, margin)
    counts = f"bars: 95% intervals, n = {found.slope.n}"
    if found.flags:
        counts += f"; {len(found.flags)} examples were not changed by the largest dose"
    return [*lines, counts]


def _alt(found: DoseResponse, about: str, margin: Margin | None) -> str:
    random = [_along_random(found, k).value for k in range(len(found.doses))]
    points = "; ".join(
        f"dose {dose:g}: {effect.value:.3g} {effect.ci()}, random {random[k]:.3g}"
        for k, (dose, effect) in enumerate(zip(found.doses, found.effects, strict=True))
    )
    return f"{about}: change of {found.metric.name}. {points}. {', '.join(_slope(found, margin))}."
