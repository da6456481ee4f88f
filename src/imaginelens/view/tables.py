"""The tables of a study: predictions, edits, integrity checks, and the heat-map in numbers."""

from collections.abc import Sequence

from imaginelens.view.fit import one_line
from imaginelens.view.markup import Markup, element, join
from imaginelens.view.numerals import Unit, between, fixed, quantity, signed
from imaginelens.view.report import Cell, Check, EditRow, HeatMap, Measure, Mechanism, Prediction

_EDIT_COLUMNS = ("Edit", "Accuracy", "Change", "Flipped", "‖Δz‖ / ‖z‖", "Landed")
_PREDICTION_COLUMNS = ("The latents hold", "Predicts for the pair shown", "Came true")
_MARKS = {True: ("✓", "passed"), False: ("✕", "failed"), None: ("•", "information")}


def edits_table(edits: Sequence[EditRow]) -> Markup:
    """The do(Z) table: what is left of the accuracy when the latents are edited."""
    head = element("tr", *(element("th", name, scope="col") for name in _EDIT_COLUMNS))
    reference = next((row.accuracy.value for row in edits if row.change is None), None)
    rows = [_edit(row, reference) for row in edits]
    label = "accuracy after each edit of the latents"
    return scrollable(element("thead", head), element("tbody", *rows), label=label)


def predictions_table(mechanism: Mechanism) -> Markup:
    """What each explanation predicts for the pair shown, and how often it came true."""
    head = element("tr", *(element("th", name, scope="col") for name in _PREDICTION_COLUMNS))
    rows = [_prediction(prediction, mechanism) for prediction in mechanism.predictions]
    label = "how often the prediction of each explanation came true after the swap"
    return scrollable(element("thead", head), element("tbody", *rows), label=label)


def checks_list(checks: Sequence[Check]) -> Markup:
    """Integrity lines, each with what it means."""
    return element("ul", *(_check(check) for check in checks), class_="checks")


def numbers_table(heatmap: HeatMap) -> Markup:
    """The heat-map as a table, for screen readers and for copying."""
    corner = element("th", f"{heatmap.row_axis} \\ {heatmap.column_axis}", scope="col")
    head = element("tr", corner, *(element("th", c.label, scope="col") for c in heatmap.columns))
    rows = [
        element("tr", element("th", row.label, scope="row"), *(_cell(cell) for cell in cells))
        for row, cells in zip(heatmap.rows, heatmap.cells, strict=True)
    ]
    label = f"effects ({heatmap.unit}) by {heatmap.row_axis} and {heatmap.column_axis}"
    return scrollable(element("thead", head), element("tbody", *rows), label=label)


def scrollable(*parts: Markup, label: str) -> Markup:
    """A table that scrolls sideways by itself on a narrow screen, also with the keyboard."""
    table = element("table", *parts, aria_label=label)
    return element("div", table, class_="scroll", tabindex=0, role="region", aria_label=label)


def _edit(row: EditRow, reference: float | None) -> Markup:
    return element(
        "tr",
        element("th", element("bdi", row.edit), scope="row"),
        _measure(row.accuracy, fixed(row.accuracy.value), _dot_plot(row.accuracy, reference)),
        _missing() if row.change is None else _measure(row.change, signed(row.change.value)),
        _number(row.flipped),
        _number(row.relative_change),
        _landed(row),
    )


def _prediction(prediction: Prediction, mechanism: Mechanism) -> Markup:
    """The winner's line stands out; `other` makes no prediction."""
    share = prediction.share
    plot = _dot_plot(share, mechanism.bar)
    return element(
        "tr",
        element(
            "th",
            element("bdi", prediction.name),
            element("small", element("bdi", prediction.meaning)),
            scope="row",
        ),
        _shown(prediction, mechanism),
        _measure(share, quantity(share.value, "%"), plot, unit="%"),
        class_="winner" if prediction.name == mechanism.winner else None,
    )


def _shown(prediction: Prediction, mechanism: Mechanism) -> Markup:
    if prediction.shown is None:
        return _missing()
    words = element("bdi", one_line(prediction.shown))
    answered = mechanism.answered or ""
    if prediction.shown.strip().casefold() != answered.strip().casefold():
        return element("td", words)
    tick = element("span", " ✓", class_="mark pass", role="img", aria_label="came true")
    return element("td", words, tick)


def _measure(measure: Measure, text: str, plot: Markup | None = None, *, unit: Unit = "") -> Markup:
    low, high = measure.interval or (None, None)
    interval = element("small", between(measure.interval, unit)) if measure.interval else None
    return element(
        "td",
        element("b", text),
        plot,
        " ",
        interval,
        data_value=measure.value,
        data_n=measure.n,
        data_low=low,
        data_high=high,
        title=f"n = {measure.n}",
    )


def _number(value: float | None) -> Markup:
    return _missing() if value is None else element("td", fixed(value), data_value=value)


def _missing() -> Markup:
    return element("td", "\N{EN DASH}", class_="none", title="does not apply")


def _landed(row: EditRow) -> Markup:
    if row.fired is None or row.expected is None:
        return _missing()
    whole = row.fired == row.expected
    return element(
        "td",
        element("span", "✓ " if whole else "✕ ", class_="mark pass" if whole else "mark fail"),
        f"{row.fired}/{row.expected}",
        data_fired=row.fired,
        data_expected=row.expected,
        title="edits that took place / that were asked for",
    )


def _dot_plot(measure: Measure, reference: float | None) -> Markup:
    """Accuracy from 0 to 1 as a dot, its interval as a line, the unedited accuracy as a tick."""
    low, high = (_along(end) for end in measure.interval or (measure.value, measure.value))
    tick = None if reference is None else f"M{_along(reference)} 1V15"
    return element(
        "svg",
        element("path", d="M4 8H48", stroke="currentColor", opacity=0.2),
        element("path", d=tick, stroke="currentColor", opacity=0.55, stroke_dasharray="2 2"),
        element("path", d=f"M{low} 8H{high}", stroke="currentColor", stroke_width=2),
        element("circle", cx=_along(measure.value), cy=8, r=3.2, fill="currentColor"),
        class_="dots",
        viewBox="0 0 52 16",
        width=52,
        height=16,
        aria_hidden="true",
    )


def _along(share: float) -> float:
    """Where a number from 0 to 1 stands on the axis of the dot plot."""
    return round(4 + 44 * min(max(share, 0.0), 1.0), 2)


def _cell(cell: Cell) -> Markup:
    if cell.effect is None:
        return element("td", "not measured", class_="none")
    parts = [
        element("b", fixed(cell.effect, 3)),
        element("small", between(cell.interval)) if cell.interval else None,
        element("small", f"n {cell.n}"),
        _answers(cell),
    ]
    return element("td", join(parts), data_value=cell.effect)


def _answers(cell: Cell) -> Markup:
    before, after = (element("bdi", one_line(text)) for text in (cell.before, cell.after))
    return element("small", before, " → ", after)


def _check(check: Check) -> Markup:
    sign, meaning = _MARKS[check.ok]
    kind = {True: "pass", False: "fail", None: "info"}[check.ok]
    return element(
        "li",
        element("span", sign, class_=f"mark {kind}", role="img", aria_label=meaning),
        element("span", check.label, class_="what"),
        element("span", element("bdi", check.value), class_="value"),
        element("span", check.explanation, class_="why") if check.explanation else None,
        class_=kind,
    )
