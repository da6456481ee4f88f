"""All studies in short: what was found of each, in sentences, and one table of their numbers.

On a narrow screen a line of the table becomes a block, and each cell names its column.
"""

from imaginelens.view.markup import Markup, element
from imaginelens.view.numerals import between, quantity, sample_size
from imaginelens.view.report import KeyNumber, Measure, Mechanism, Report, Study
from imaginelens.view.tables import scrollable

_STUDY, _SWAP = "Model", "All latents swapped: whose prediction comes true"
_UNDETERMINED = "undetermined"


def verdicts(report: Report) -> Markup:
    """The verdict on every study and what it rests on, as sentences."""
    return element("ul", *map(_sentences, report.studies), class_="verdicts")


def _sentences(study: Study) -> Markup:
    return element(
        "li",
        element("p", element("bdi", study.name), class_="name"),
        element("p", study.headline, class_="verdict"),
        element("p", study.detail, class_="because") if study.detail else None,
    )


def overview_table(report: Report) -> Markup:
    """One line per study; the columns are its key numbers, by label, and what won the swap."""
    labels = list(dict.fromkeys(n.label for study in report.studies for n in study.numbers))
    head = [element("th", name, scope="col") for name in (_STUDY, *labels, _SWAP)]
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
