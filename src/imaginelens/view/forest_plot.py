"""Forest plot: effects one below the other, with intervals, the margin, and what they show."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from imaginelens.estimates import Estimate
from imaginelens.estimates.interval import Interval
from imaginelens.estimates.margin import Margin, Relative
from imaginelens.estimates.margin import words as margin_in_words
from imaginelens.hooks.errors import InputError
from imaginelens.mediation.effects import CONTRAST, FORMULA, MEANING, Effects
from imaginelens.view.charts import FAINT, chart, words
from imaginelens.view.figure import Figure

_ROW, _LEFT_MOST = 46, 330
_BAND = "#dcebdd"


@dataclass(frozen=True)
class _Look:
    """How a verdict is drawn: by shape as well as by colour."""

    symbol: str
    colour: str
    said: str
    filled: bool = True


LOOKS = {
    "effect": _Look("circle", "#1f5a94", "an effect"),
    "both": _Look("diamond", "#7b3294", "real, but below the margin"),
    "equivalent": _Look("square", "#1b7837", "none beyond the margin"),
    "inconclusive": _Look("circle", "#5f5f5f", "inconclusive", filled=False),
    "not shown": _Look("circle", "#5f5f5f", "no effect shown", filled=False),
    "no null": _Look("circle", "#1a1a1a", "", filled=False),
}


@dataclass(frozen=True)
class _Row:
    """One line of the plot.

    Attributes:
        band: what counts as no effect; None without a margin.
        wide, narrow: the 95% and the 90% interval.
    """

    name: str
    meaning: str
    estimate: Estimate
    verdict: str
    band: tuple[float, float] | None
    wide: Interval
    narrow: Interval

    @property
    def look(self) -> _Look:
        return LOOKS[self.verdict]


def forest(
    effects: Effects | Mapping[Any, Estimate],
    *,
    margin: Margin | None = None,
    span: tuple[float, float] | None = None,
    title: str | None = None,
) -> Figure:
    """Draw effects one below the other: thin lines are 95% intervals, thick ones 90%.

    An effect whose thick line lies within the shaded margin is shown to be none (TOST at 5%); one
    whose thin line leaves out 0 is shown to be there. An arrow means that the interval goes on:
    it has no end, or is clipped at the end of the axis. The figure is returned, not shown.

    Args:
        effects: of a mediation study, without its ratios; or any estimates, by name.
        margin: what counts as no effect, in the outcome's unit, or `il.relative(0.05)`. Without one
            no absence is claimed.
        span: where the axis ends; it holds all finite ends of intervals if left out.

    Raises:
        InputError: there are no estimates, or the span has no length.
        EstimateError: the margin is none, or there are too few examples for intervals.

    >>> from imaginelens.mediation.outcomes import PotentialOutcomes
    >>> worlds = PotentialOutcomes.from_arrays(
    ...     y00=[0.0, 0.1, 0.2], y11=[1.0, 1.3, 1.1], y10=[0.4, 0.6, 0.5], y01=[0.5, 0.7, 0.7])
    >>> forest(worlds.effects(), margin=0.1).alt[:44]
    'Effects on outcome of 3 examples. te 1.033 ['
    """
    if span is not None and not (np.isfinite(span).all() and span[0] < span[1]):
        raise InputError(f"span is {span}, expected two numbers, the smaller one first")
    rows = [_row(name, meaning, e, margin) for name, (meaning, e) in _listed(effects).items()]
    low, high = span or _span(rows)
    about = title or _title(effects)
    left = min(_LEFT_MOST, 40 + 6 * max(len(line) for r in rows for line in (r.name, r.meaning)))
    figure = chart(
        about, x=_unit(effects), y="", alt=f"{about}. {'; '.join(map(_in_words, rows))}.",
        width=left + 400 + 250, height=60 + _ROW * len(rows) + 96, left=left, right=250,
        notes=_notes(rows, margin),
    )  # fmt: skip
    for place, row in enumerate(rows):
        _under(figure, place, row, low, high)
    for verdict in dict.fromkeys(row.verdict for row in rows):
        _lines(figure, rows, verdict, low, high)
        _points(figure, rows, verdict)
    for place, row in enumerate(rows):
        _beside(figure, place, row, low, high, len(rows))
    figure.update_layout(showlegend=False)
    figure.update_xaxes(range=[low, high])
    figure.update_yaxes(
        range=[len(rows) - 0.5, -0.5], tickmode="array", tickvals=list(range(len(rows))),
        ticktext=[words("\n".join(filter(None, (r.name, r.meaning)))) for r in rows],
        showgrid=False, ticklabelstandoff=8,
    )  # fmt: skip
    return figure


def _listed(effects: Effects | Mapping[Any, Estimate]) -> dict[str, tuple[str, Estimate]]:
    if isinstance(effects, Effects):
        needs = {"cde", "int_ref"} if effects.worlds.c0 is None else set()
        names = [name for name in CONTRAST if name not in needs]
        return {name: (MEANING[name], getattr(effects, name)) for name in names}
    if not effects:
        raise InputError("there are no estimates to draw; give one or more by name")
    for name, estimate in effects.items():
        if not isinstance(estimate, Estimate):
            raise InputError(
                f"{name!r} is {type(estimate).__name__}, expected an Estimate; make one with "
                "il.Estimate.mean(values), .paired, .share or .ratio"
            )
    return {str(name): ("", estimate) for name, estimate in effects.items()}


def _row(name: str, meaning: str, estimate: Estimate, margin: Margin | None) -> _Row:
    if isinstance(margin, Relative) and estimate.total is None:
        margin = None  # it is the total effect itself
    wide, narrow = estimate.ci(level=0.95), estimate.ci(level=0.90)
    if estimate.null is None:
        return _Row(name, meaning, estimate, "no null", None, wide, narrow)
    if margin is None:
        shown = "effect" if estimate.pvalue() < 0.05 else "not shown"
        return _Row(name, meaning, estimate, shown, None, wide, narrow)
    verdict = estimate.verdict(margin)
    if isinstance(margin, Relative):
        assert estimate.total is not None
        far = margin.share * abs(estimate.total.value)
    else:
        far = margin
    band = estimate.null - far, estimate.null + far
    return _Row(name, meaning, estimate, verdict, band, wide, narrow)


def _span(rows: list[_Row]) -> tuple[float, float]:
    """An axis that holds all that is finite."""
    ends: list[float] = []
    for row in rows:
        ends += [row.estimate.value, row.wide.low, row.wide.high, row.narrow.low, row.narrow.high]
        ends += [] if row.estimate.null is None else [row.estimate.null]
        ends += row.band or ()
    finite = [end for end in ends if np.isfinite(end)] or [0.0]
    low, high = min(finite), max(finite)
    room = 0.06 * (high - low) or 1.0
    return low - room, high + room


# ---- what is drawn -----------------------------------------------------------------------------


def _under(figure: Figure, place: int, row: _Row, low: float, high: float) -> None:
    """The margin as a band, and the line of no effect."""
    top, bottom = place - 0.5, place + 0.5
    if row.band is not None:
        figure.add_shape(
            type="rect", x0=max(row.band[0], low), x1=min(row.band[1], high), y0=top, y1=bottom,
            fillcolor=_BAND, line={"width": 0}, layer="below",
        )  # fmt: skip
    if row.estimate.null is not None and low <= row.estimate.null <= high:
        null = row.estimate.null
        figure.add_shape(
            type="line", x0=null, x1=null, y0=top, y1=bottom, line={"color": FAINT, "width": 1.2},
            layer="below",
        )  # fmt: skip


def _lines(figure: Figure, rows: list[_Row], verdict: str, low: float, high: float) -> None:
    """Both intervals of all rows with a verdict, and arrows where they go on."""
    import plotly.graph_objects as go

    colour = LOOKS[verdict].colour
    arrows: dict[str, list[tuple[float, int]]] = {"triangle-left": [], "triangle-right": []}
    for level, width in (("wide", 1.6), ("narrow", 5.0)):
        x: list[float | None] = []
        y: list[float | None] = []
        for place, row in enumerate(rows):
            if row.verdict != verdict:
                continue
            for start, end in pieces(getattr(row, level)):
                x += [_within(start, low, high), _within(end, low, high), None]
                y += [place, place, None]
                if start < low:
                    arrows["triangle-left"].append((low, place))
                if end > high:
                    arrows["triangle-right"].append((high, place))
        line = {"color": colour, "width": width}
        figure.add_trace(go.Scatter(x=x, y=y, mode="lines", line=line, hoverinfo="skip"))
    for symbol, where in arrows.items():
        if where:
            at = list(dict.fromkeys(where))
            figure.add_trace(
                go.Scatter(
                    x=[x for x, _ in at], y=[y for _, y in at], mode="markers", hoverinfo="skip",
                    marker={"symbol": symbol, "size": 11, "color": colour}, cliponaxis=False,
                )
            )  # fmt: skip


def _points(figure: Figure, rows: list[_Row], verdict: str) -> None:
    import plotly.graph_objects as go

    look = LOOKS[verdict]
    own = [(place, row) for place, row in enumerate(rows) if row.verdict == verdict]
    figure.add_trace(
        go.Scatter(
            x=[row.estimate.value for _, row in own], y=[place for place, _ in own], mode="markers",
            name=look.said or verdict, customdata=[words(_hover(row)) for _, row in own],
            marker={"symbol": look.symbol, "size": 9,
                    "color": look.colour if look.filled else "#ffffff",
                    "line": {"width": 2, "color": look.colour}},
            hovertemplate="%{customdata}<extra></extra>",
        )
    )  # fmt: skip


def _beside(figure: Figure, place: int, row: _Row, low: float, high: float, n: int) -> None:
    """The numbers and the verdict, to the right of the row."""
    lines = [f"{_number(row.estimate.value)} {row.wide}", row.look.said]
    goes_on = _goes_on(row, low, high)
    lines[1] += f"{', ' if lines[1] and goes_on else ''}{goes_on}"
    figure.add_annotation(
        text=words("\n".join(filter(None, lines))), xref="paper", yref="paper", x=1,
        y=1 - (place + 0.5) / n, xanchor="left", yanchor="middle", xshift=14, showarrow=False,
        align="left", font={"size": 12, "color": row.look.colour},
    )  # fmt: skip


def pieces(interval: Interval) -> list[tuple[float, float]]:
    """The stretches that an interval is made of; some have no end.

    >>> pieces(Interval(-1.0, 2.0, 0.95, unbounded="outside"))
    [(-inf, -1.0), (2.0, inf)]
    """
    if interval.unbounded == "outside":
        return [(-np.inf, interval.low), (interval.high, np.inf)]
    if interval.unbounded == "everything":
        return [(-np.inf, np.inf)]
    return [(interval.low, interval.high)]


def _within(end: float, low: float, high: float) -> float:
    return float(np.clip(end, low, high))


# ---- words -------------------------------------------------------------------------------------


def _goes_on(row: _Row, low: float, high: float) -> str:
    if row.wide.unbounded:
        return "interval without end"
    ends = row.estimate.value, row.wide.low, row.wide.high
    return "clipped" if min(ends) < low or max(ends) > high else ""


def _hover(row: _Row) -> str:
    estimate = row.estimate
    lines = [f"{row.name}: {_number(estimate.value)}"]
    lines += [f"{FORMULA[row.name]}: {row.meaning}"] if row.meaning else []
    lines += [f"95% interval: {row.wide}", f"90% interval: {row.narrow}"]
    counts = f"n: {estimate.n}"
    counts += f", {estimate.missing} missing" if estimate.missing else ""
    counts += f", {estimate.n_groups} groups" if estimate.groups is not None else ""
    lines.append(counts)
    if estimate.null is not None:
        lines.append(f"p = {estimate.pvalue():.3g}")
    if row.band is not None:
        lines.append(f"margin: {row.band[0]:.4g} to {row.band[1]:.4g}")
    return "\n".join([*lines, estimate.procedure, *filter(None, [row.look.said])])


def _in_words(row: _Row) -> str:
    said = f": {row.look.said}" if row.look.said else ""
    return f"{row.name} {_number(row.estimate.value)} {row.wide}{said}"


def _number(value: float) -> str:
    return "undefined" if np.isnan(value) else f"{value:.4g}"


def _notes(rows: list[_Row], margin: Margin | None) -> list[str]:
    lines = ["thin: 95% interval, thick: 90%; each for itself, not adjusted for their number"]
    if margin is not None and any(row.band for row in rows):
        lines.append(f"shaded: ±{margin_in_words(margin)}, which counts as no effect")
    else:
        lines.append("no margin was given, so that nothing is shown to be absent")
    return lines


def _title(effects: Effects | Mapping[Any, Estimate]) -> str:
    if not isinstance(effects, Effects):
        return "Effects"
    worlds = effects.worlds
    return f"Effects on {worlds.metric or 'outcome'} of {len(worlds)} examples"


def _unit(effects: Effects | Mapping[Any, Estimate]) -> str:
    if isinstance(effects, Effects):
        of = effects.worlds.unit or effects.worlds.metric
        return "as a share of y00" if effects.scale == "ratio" else f"effect on {of or 'outcome'}"
    units = {estimate.unit for estimate in effects.values()}
    return next(iter(units)) if len(units) == 1 and "" not in units else "estimate"
