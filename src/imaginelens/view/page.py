"""A report as one HTML file that needs nothing else: no script, no network, no second file.

>>> from imaginelens.view import Report, render
>>> render(Report(title="Empty", studies=())).startswith("<!doctype html>")
True
"""

import os
from importlib import resources
from pathlib import Path

from imaginelens.view.fit import one_line
from imaginelens.view.heatmap import heatmap_svg
from imaginelens.view.legend import legend
from imaginelens.view.markup import Markup, element, join
from imaginelens.view.numerals import between, quantity, sample_size
from imaginelens.view.overview import overview_table, verdicts
from imaginelens.view.picture import picture_svg
from imaginelens.view.report import Example, KeyNumber, Mechanism, Report, Study
from imaginelens.view.strips import latent_strips, strips_note
from imaginelens.view.tables import checks_list, edits_table, numbers_table, predictions_table
from imaginelens.view.tokens import token_strip

# Even if a tag slipped through, the browser would neither run nor load anything.
_POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:; form-action 'none'"
_KINDS = ("system", "text", "image", "latent", "answer")


def render(report: Report) -> str:
    """The report as HTML. Equal reports give equal pages."""
    body = element("main", _header(report), _studies(report), _provenance(report))
    return f"<!doctype html>\n{element('html', _head(report), element('body', body), lang='en')}\n"


def write(report: Report, path: str | os.PathLike[str]) -> Path:
    """Render to `path`, whole or not at all: a reader never sees half a file."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        partial.write_text(render(report), encoding="utf-8", newline="\n")
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
    return path


def _head(report: Report) -> Markup:
    style = resources.files("imaginelens.view").joinpath("report.css").read_text(encoding="utf-8")
    return element(
        "head",
        element("meta", charset="utf-8"),
        element("meta", http_equiv="Content-Security-Policy", content=_POLICY),
        element("meta", name="viewport", content="width=device-width, initial-scale=1"),
        element("meta", name="color-scheme", content="light dark"),
        element("title", report.title),
        element("style", Markup(style)),
    )


def _header(report: Report) -> Markup:
    steps = [element("li", text) for text in report.how_to_read]
    reading = element(
        "section", element("h2", "How to read this"), element("ol", *steps), class_="reading"
    )
    return element(
        "header",
        element("p", "ImagineLens", class_="brand"),
        element("h1", report.title),
        element("p", report.subtitle, class_="subtitle") if report.subtitle else None,
        _overview(report),
        reading if steps else None,
    )


def _overview(report: Report) -> Markup | None:
    """The verdicts, then their numbers, before anything else: a reader may stop here."""
    if not report.studies:
        return None
    note = element("p", report.overview_note, class_="note") if report.overview_note else None
    return element(
        "section",
        element("h2", "What was found"),
        verdicts(report),
        element("h3", "The numbers behind it"),
        overview_table(report),
        note,
        class_="overview",
    )


def _studies(report: Report) -> Markup:
    articles = [
        _study(study, report, f"study-{index}") for index, study in enumerate(report.studies)
    ]
    return element("div", *articles, class_="studies")


def _study(study: Study, report: Report, id_: str) -> Markup:
    """Eight sections, always the same: they line up across studies."""
    return element(
        "article",
        _study_header(study, report, id_),
        _inputs(study),
        _section("The base run, token by token", token_strip(study.tokens), _kinds(), class_="run"),
        _mechanism(study, report),
        _effects(study, report),
        _latents(study, report),
        _edits(study, report),
        _checks(study),
        class_="study",
        aria_labelledby=id_,
    )


def _study_header(study: Study, report: Report, id_: str) -> Markup:
    numbers = [_key_number(number, report.interval_name) for number in study.numbers]
    return element(
        "div",
        element("h2", element("bdi", study.name), id=id_),
        element("p", study.headline, class_="headline"),
        element("p", study.detail, class_="detail") if study.detail else None,
        element("dl", *numbers, class_="key-numbers") if numbers else None,
        class_="opening",
    )


def _key_number(number: KeyNumber, interval_name: str) -> Markup:
    measure = number.measure
    low, high = measure.interval or (None, None)
    ends = between(measure.interval, number.unit) if measure.interval else ""
    interval = f"{interval_name} {ends}, " if ends else ""
    note = f"{number.note} · " if number.note else ""
    value = element(
        "dd",
        quantity(measure.value, number.unit),
        data_value=measure.value,
        data_n=measure.n,
        data_low=low,
        data_high=high,
    )
    details = element("dd", f"{note}{interval}{sample_size(measure.n)}", class_="details")
    return element("div", element("dt", number.label), value, details)


def _section(heading: str, *parts: str | None, class_: str, note: str | None = None) -> Markup:
    lead = element("p", note, class_="note") if note else None
    return element("section", element("h3", heading), lead, *parts, class_=class_)


def _inputs(study: Study) -> Markup:
    pair = element(
        "div", _example("Base", study.base), _example("Source", study.source), class_="pair"
    )
    return _section("The pair shown", pair, class_="inputs")


def _example(role: str, example: Example) -> Markup:
    caption = element(
        "figcaption",
        element("span", role, class_="role"),
        element("q", example.question),
        element(
            "span", "answer ", element("b", element("bdi", example.answer)), class_="answer-line"
        ),
    )
    drawing = picture_svg(example.picture) if example.picture else None
    return element("figure", drawing, caption, class_=role.lower())


def _kinds() -> Markup:
    marks = [element("span", element("i", class_=f"chip {k}"), k, class_="swatch") for k in _KINDS]
    return element("p", *marks, class_="kinds", aria_hidden="true")


def _mechanism(study: Study, report: Report) -> Markup:
    if study.mechanism is None:
        return element("section", class_="swap")
    answered = study.mechanism.answered
    shown = element("bdi", "nothing" if answered is None else one_line(answered))
    return _section(
        "Swap all latents: whose prediction comes true?",
        predictions_table(study.mechanism),
        element(
            "p", "After the swap, the pair shown answers ", element("b", shown), class_="after"
        ),
        class_="swap",
        note=_swap_note(study.mechanism, report.interval_name),
    )


def _swap_note(mechanism: Mechanism, interval_name: str) -> str:
    decisive = mechanism.leader.share.n + mechanism.missing
    left_out = f" {mechanism.missing} of them gave no answer and are left out."
    return (
        "The base run receives all latents of its source run and goes on. Decisive: "
        f"{decisive} of {mechanism.n_pairs} pairs, those in which no two explanations predict the "
        f"same answer.{left_out * bool(mechanism.missing)} Came true: share of these, "
        f"{interval_name} in brackets; a winner has all of it above the dashed "
        f"{quantity(mechanism.bar, '%')}."
    )


def _effects(study: Study, report: Report) -> Markup:
    heatmap, effects = study.heatmap, study.heatmap.effects
    drawing = heatmap_svg(
        heatmap, report.limit, name=study.name, interval_name=report.interval_name
    )
    key = legend(
        report.limit,
        heatmap.unit,
        report.interval_name,
        clipped=bool((abs(effects) > report.limit).any()),
    )
    table = element(
        "details", element("summary", "The same numbers as a table"), numbers_table(heatmap)
    )
    plot = element("div", drawing, class_="scroll")
    return _section(
        "Move one state: what does it do to the answer?",
        plot,
        key,
        table,
        class_="effects",
        note=heatmap.caption,
    )


def _latents(study: Study, report: Report) -> Markup:
    limit = report.latent_limit
    note = strips_note(study.latents, limit)
    return _section(
        "The latents of the base run",
        latent_strips(study.latents, limit),
        class_="z-vectors",
        note=note,
    )


def _edits(study: Study, report: Report) -> Markup:
    if not study.edits:
        return element("section", class_="do-z")
    sizes = sorted({row.accuracy.n for row in study.edits})
    n = f"n = {sizes[0]}" if len(sizes) == 1 else f"n = {sizes[0]} to {sizes[-1]}"
    note = (
        f"do(Z): accuracy when all latents are edited, {n}, {report.interval_name} in brackets. "
        "Flipped: share of answers that changed. Landed: edits that took place, of those asked for."
    )
    return _section(
        "Destroy the latents: is the answer still right?",
        edits_table(study.edits),
        class_="do-z",
        note=note,
    )


def _checks(study: Study) -> Markup:
    if not study.checks:
        return element("section", class_="integrity")
    return _section("Can these numbers be trusted?", checks_list(study.checks), class_="integrity")


def _provenance(report: Report) -> Markup:
    items = [
        element("div", element("dt", str(key)), element("dd", element("bdi", str(value))))
        for key, value in report.provenance.items()
    ]
    listing = (
        join([element("h2", "Where the numbers come from"), element("dl", *items)])
        if items
        else None
    )
    return element("footer", listing)
