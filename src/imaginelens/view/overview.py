"""All studies in one table: a line each, with its key numbers, what won the swap, and the verdict.

On a narrow screen a line becomes a block, and each cell names its column.
"""

from imaginelens.view.markup import Markup, element
from imaginelens.view.numerals import between, quantity, sample_size
from imaginelens.view.report import KeyNumber, Measure, Mechanism, Report, Study
from imaginelens.view.tables import scrollable

_STUDY, _SWAP, _VERDICT = "Model", "Swap: whose prediction comes true", "Verdict"
_UNDETERMINED = "undetermined"


def overview_table(report: Report) -> Markup:
    """One line per study; the columns between are the key numbers, by label."""
    labels = list(dict.fromkeys(n.label for study in report.studies for n in study.numbers))
    head = [element("th", name, scope="col") for name in (_STUDY, *labels, _SWAP, _VERDICT)]
    rows = [_line(study, labels) for study in report.studies]
    parts = element("thead", element("tr", *head)), element("tbody", *rows)
    return scrollable(*parts, label="all studies in short")


def _line(study: Study, labels: list[str]) -> Markup:
    numbers = {number.label: number for number in study.numbers}
    return element(
        "tr",
        element("th", element("bdi", study.name), scope="row"),
        *(_number(label, numbers.get(label)) for label in labels),
        _swap(study.mechanism),
        element("td", study.headline, class_="verdict", data_label=_VERDICT),
    )


def _number(label: str, number: KeyNumber | None) -> Markup:
    if number is None:
        return _none(label)
    shown = quantity(number.measure.value, number.unit)
    interval = number.measure.interval
    rest = between(interval, number.unit) if interval else number.note
    return _cell(label, shown, rest, number.measure, number.note)


def _swap(mechanism: Mechanism | None) -> Markup:
    if mechanism is None:
        return _none(_SWAP)
    share = mechanism.leader.share
    interval = f" {between(share.interval, '%')}" if share.interval else ""
    found = f"{quantity(share.value, '%')}{interval}, {sample_size(share.n)}"
    if mechanism.winner is None:
        return _cell(_SWAP, _UNDETERMINED, f"{mechanism.leader.name} {found}", share)
    return _cell(_SWAP, mechanism.winner, found, share)


def _cell(label: str, shown: str, rest: str, measure: Measure, title: str = "") -> Markup:
    low, high = measure.interval or (None, None)
    return element(
        "td",
        element("b", element("bdi", shown)),
        " ",
        element("small", element("bdi", rest)) if rest else None,
        data_label=label,
        data_value=measure.value,
        data_n=measure.n,
        data_low=low,
        data_high=high,
        title=f"{title}\nn = {measure.n}".strip(),
    )


def _none(label: str) -> Markup:
    return element("td", "\N{EN DASH}", class_="none", data_label=label, title="not measured")
