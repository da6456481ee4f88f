"""What a notebook shows of effects, maps and probes: a table or a picture.

They say what the terminal says, and stay small. A notebook that meets an error here shows it, and
the terminal's text.
"""

import base64
from collections.abc import Callable

from imaginelens.estimates import Estimate, EstimateError
from imaginelens.mediation import map_tables
from imaginelens.mediation.effect_map import EffectMap
from imaginelens.mediation.effects import FORMULA, MEANING, Effects, against_zero
from imaginelens.probes.map_result import ProbeMap
from imaginelens.probes.result import ProbeResult
from imaginelens.view.card import card, line, lines, many, table, text
from imaginelens.view.markup import Markup, element

_CELLS, _BYTES = 1500, 40_000  # of a picture; more is left to .plot()


def effects_card(effects: Effects) -> Markup:
    """Every effect with its interval, and whether it differs from 0."""
    worlds = effects.worlds
    head = f"Effects on {worlds.metric} of {many(len(worlds), 'example')}"
    try:
        rows = [
            (name, f"{each.value:.4g}", _interval(each), against_zero(each), FORMULA[name],
             MEANING[name])
            for name, each in effects.all.items()
        ]  # fmt: skip
        missing = effects.te.missing
    except EstimateError:  # too few examples, of which the text says more
        return card(head, text(repr(effects)))
    unit = "share of y00" if effects.scale == "ratio" else worlds.unit or worlds.metric
    columns = ("effect", unit, "95% interval", "at 5%, each by itself", "formula", "meaning")
    notes = [worlds.estimand] if worlds.estimand else []
    if missing:
        notes.append(f"{missing} of {len(worlds)} examples miss an outcome and are left out")
    notes.append("that there is no effect is a claim about a margin: .te.verdict(margin=...)")
    return card(head, table(columns, rows, head), *map(line, notes))


def map_card(found: EffectMap) -> Markup:
    """The heat-map, what it shows, and what it must not be read without."""
    head, *more = map_tables.opening(found)
    notes = [*map_tables.marks(found), *found.notes]
    how = "white is no effect, grey was not measured; an outlined interval leaves out 0"
    return card(
        head, line(more[0].strip()), _picture(found, len(found), found.plot, how),
        *lines(notes),
    )  # fmt: skip


def probe_card(result: ProbeResult) -> Markup:
    """How well a label was read, beside everything that it must beat."""
    head = f"{result.label}: {result.verdict()} ({result.kind} probe, {result.where})"
    columns = ("", "held-out score", "")
    return card(head, table(columns, result.table(), head), *lines(result.notes))


def probe_map_card(found: ProbeMap) -> Markup:
    """The heat-map of what can be read, beside its controls."""
    cells = found.accuracy.size * (1 + len(found.controls))
    how = "white is chance; outlined cells are read better than permuted labels are"
    head, *_ = repr(found).splitlines()
    return card(head, _picture(found, cells, found.plot, how), *lines(found.notes))


def _picture(found: object, cells: int, plot: Callable[[], object], how: str) -> Markup:
    """The figure as PNG; where matplotlib is not installed, or there is too much, the text."""
    if cells > _CELLS:
        return element("div", text(repr(found)), line(f"{cells} cells: .plot() draws them"))
    from imaginelens.view.figure import Figure, smaller

    figure = plot()
    assert isinstance(figure, Figure)
    try:
        png = smaller(figure.png(scale=1.0))
    except ImportError as error:
        if error.name != "matplotlib":
            raise
        return element("div", text(repr(found)), line(str(error)))
    if len(png) > _BYTES:
        return element("div", text(repr(found)), line("the picture is large: .plot() draws it"))
    address = Markup("data:image/png;base64," + base64.b64encode(png).decode("ascii"))
    style = "background:#fff;max-width:100%;border-radius:6px"
    return element("div", element("img", src=address, alt=figure.alt, style=style), line(how))


def _interval(estimate: Estimate) -> str:
    interval = estimate.ci()
    return "unbounded" if interval.unbounded else str(interval)
