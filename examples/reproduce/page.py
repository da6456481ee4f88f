"""All exhibits as one HTML file that needs nothing else: no script, no network, no second file."""

import re
from collections.abc import Mapping
from importlib import resources
from itertools import zip_longest
from pathlib import Path

from examples.reproduce.exhibit import TRUST, Drawing, Exhibit
from examples.reproduce.grid import NOTHING, grid, sections
from examples.reproduce.registry import CRITIQUE, EXHIBITS, NOT_KNOWN
from examples.reproduce.store import Kept
from imaginelens.view.markup import Markup, element, join
from imaginelens.view.tables import scrollable

TITLE = "The figures and tables of arXiv 2602.22766, one by one"
SUBTITLE = (
    "Imagination Helps Visual Reasoning, But Not Yet in Latent Space. What the paper reports "
    "stands beside what was measured here. The two are not of the same models: no number of an "
    "organism reproduces a number of a 7B model. Organisms are tiny models whose mechanism is "
    "known, and show what each exhibit can tell, and what it cannot."
)
_POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:; form-action 'none'"
_FOLDED = ("Notes on the measurements",)
_STYLE = """
.exhibit { background: var(--card); border: 1px solid var(--line); border-radius: 16px;
  padding: 26px; margin-top: 20px; }
.exhibit > * + * { margin-top: 16px; }
.exhibit h2 { font-size: 21px; line-height: 1.3; }
.exhibit .covers { color: var(--latent); font: 600 12.5px/1.4 var(--mono); }
.figures { display: flex; flex-wrap: wrap; gap: 24px; }
.exhibit figure { flex: 0 1 auto; max-width: 100%; }
.exhibit figure.small { max-width: min(100%, 510px); }
.exhibit figcaption { margin: 0 0 6px; font-weight: 620; overflow-wrap: anywhere; }
.exhibit figure img { display: block; max-width: 100%; background: #fff; border-radius: 8px; }
.exhibit .asks { color: var(--muted); font-size: 17px; }
.exhibit table, .contents table { border-collapse: collapse; font-size: 13.5px; }
.exhibit th, .exhibit td, .contents th, .contents td { text-align: left; vertical-align: top;
  padding: 5px 14px 5px 0; border-bottom: 1px solid var(--line); white-space: normal; }
.exhibit table { border-collapse: separate; border-spacing: 0; }
.exhibit tr > * { border-top: 0; }
.exhibit thead th { min-width: 12ch; max-width: 26ch; font-weight: 640; line-height: 1.3; }
.exhibit tr > th:first-child { position: sticky; left: 0; background: var(--card); }
.exhibit tbody th { min-width: 20ch; max-width: 40ch; font-weight: 400; }
.exhibit td { min-width: 11ch; max-width: 34ch; }
.contents tbody th { font: 600 13.5px/1.4 var(--sans); }
.exhibit .paper { background: var(--soft); padding-left: 10px; }
.exhibit .first { border-left: 2px solid var(--latent); padding-left: 12px; }
.exhibit ul, .contents ul { list-style: disc; padding-left: 20px; font-size: 14px; }
.exhibit li, .contents li { overflow-wrap: anywhere; }
.exhibit .found li { font-weight: 620; }
.exhibit h3 { margin-bottom: 4px; }
.exhibit a, .contents a { color: var(--latent); }
.exhibit summary { cursor: pointer; font-weight: 640; font-size: 13.5px; }
.contents h3 { margin: 14px 0 4px; }
code { font: 0.93em var(--mono); }
@media (max-width: 640px) {
  .exhibit { padding: 18px 16px; }
  .exhibit thead th:first-child, .exhibit tbody th { min-width: 12ch; max-width: 15ch; }
}
"""


def render(found: Mapping[str, Mapping[str, Kept]], *, about: Mapping[str, str]) -> str:
    """The page of all exhibits.

    Args:
        found: by exhibit and subject; what is not there is shown with the paper's numbers alone.
        about: versions, seed and the like, for the end of the page.
    """
    style = resources.files("imaginelens.view").joinpath("report.css").read_text(encoding="utf-8")
    head = element(
        "head",
        element("meta", charset="utf-8"),
        element("meta", http_equiv="Content-Security-Policy", content=_POLICY),
        element("meta", name="viewport", content="width=device-width, initial-scale=1"),
        element("meta", name="color-scheme", content="light dark"),
        element("title", TITLE),
        element("style", Markup(style + _STYLE)),
    )
    opening = element(
        "header",
        element("p", "ImagineLens", class_="brand"),
        element("h1", TITLE),
        element("p", SUBTITLE, class_="subtitle"),
    )
    parts = [_exhibit(one, found.get(one.name, {})) for one in EXHIBITS.values()]
    main = element("main", opening, _contents(found), *parts, _critique(), _about(about))
    return f"<!doctype html>\n{element('html', head, element('body', main), lang='en')}\n"


def write(
    folder: Path, found: Mapping[str, Mapping[str, Kept]], *, about: Mapping[str, str]
) -> Path:
    """Write `report.html` into a folder, whole or not at all."""
    folder.mkdir(parents=True, exist_ok=True)
    path, part = folder / "report.html", folder / ".report.html.part"
    part.write_text(render(found, about=about), encoding="utf-8", newline="\n")
    part.replace(path)
    return path


def _contents(found: Mapping[str, Mapping[str, Kept]]) -> Markup:
    rows = []
    for one in EXHIBITS.values():
        kept = found.get(one.name, {})
        told = one.compare({name: k.measured for name, k in kept.items()})
        state = f"measured on {len(kept)}" if kept else "the paper's numbers only"
        told = told or ((one.stated,) if one.stated else ())
        rows.append(
            element(
                "tr",
                element("th", element("a", one.title, href=f"#{one.name}"), scope="row"),
                element("td", ", ".join(one.covers) or "beyond the paper"),
                element("td", state),
                element("td", *(element("div", _words(line)) for line in told)),
            )
        )
    heads = ("exhibit", "of the paper", "here", "found here")
    head = element("thead", element("tr", *(element("th", h, scope="col") for h in heads)))
    return element(
        "section",
        element("h2", "In short"),
        scrollable(head, element("tbody", *rows), label="all exhibits"),
        element("p", NOT_KNOWN, class_="note"),
        element("h3", "Where the paper's numbers are from"),
        element(
            "ul", *(element("li", f"[{tag}] {said}") for tag, said in TRUST.items()), class_="note"
        ),
        class_="overview contents",
    )


def _exhibit(one: Exhibit, found: Mapping[str, Kept]) -> Markup:
    covers = ", ".join(one.covers) or "beyond the paper"
    trust = f" · the paper's numbers: [{one.trust}]" if one.paper else ""
    drawn = [[_figure(kept, d) for d in kept.measured.figures] for kept in found.values()]
    figures = [figure for alike in zip_longest(*drawn) for figure in alike if figure]
    return element(
        "section",
        element("p", f"{one.name} · {covers}{trust}", class_="covers"),
        element("h2", one.title),
        element("p", _words(one.asks), class_="asks"),
        element("p", f"Ours: {one.unit}.", class_="note") if one.unit and found else None,
        _table(one, found),
        *(_section(name, told) for name, told in sections(one, found) if name not in _FOLDED),
        element("div", *figures, class_="figures") if figures else None,
        *(_folded(name, told) for name, told in sections(one, found) if name in _FOLDED),
        class_="exhibit",
        id=one.name,
    )


def _figure(kept: Kept, drawing: Drawing) -> Markup:
    """A drawing below its caption; one that is narrow may have another one beside it."""
    width = re.search(r"<svg[^>]*? width=\"([\d.]+)", drawing.svg)
    return element(
        "figure",
        element("figcaption", f"{kept.heading}: {drawing.caption}"),
        element("img", src=Markup(drawing.source), alt=drawing.alt),
        class_="small" if width and float(width[1]) < 600 else None,
    )


def _words(line: str) -> Markup:
    """A line with what stands between backticks as code, and an exhibit's name as a link to it."""
    parts = list[str]()
    for k, part in enumerate(re.split(r"`(\w+)`", line)):
        code = element("code", part) if k % 2 else part
        parts.append(element("a", code, href=f"#{part}") if k % 2 and part in EXHIBITS else code)
    return join(parts)


def _table(one: Exhibit, found: Mapping[str, Kept]) -> Markup | None:
    made = grid(one, found)
    if not made.rows:
        return None
    kinds = [
        "paper" if paper else "first" if k and made.papers[k - 1] else None
        for k, paper in enumerate(made.papers)
    ]
    heads = [
        element("th", heading, scope="col", class_=kind)
        for heading, kind in zip(made.headings, kinds, strict=True)
    ]
    rows = [
        element(
            "tr",
            element("th", name, scope="row"),
            *(
                element("td", cell, class_=kind, title="none" if cell == NOTHING else None)
                for cell, kind in zip(cells, kinds, strict=True)
            ),
        )
        for name, cells in made.rows
    ]
    head = element("thead", element("tr", element("th", "", scope="col"), *heads))
    return scrollable(head, element("tbody", *rows), label=f"{one.name}: the paper and ours")


def _section(name: str, told: tuple[str, ...]) -> Markup:
    lines = element("ul", *(element("li", _words(line)) for line in told))
    return element(
        "div", element("h3", name), lines, class_="found" if name == "Found here" else None
    )


def _folded(name: str, told: tuple[str, ...]) -> Markup:
    return element(
        "details",
        element("summary", f"{name} ({len(told)})"),
        element("ul", *(element("li", _words(line)) for line in told)),
    )


def _critique() -> Markup:
    """Each point of the critique, with the exhibits that answer it."""
    lines = []
    for point, said in CRITIQUE.items():
        links = [
            element("a", one.name, href=f"#{one.name}")
            for one in EXHIBITS.values()
            if any(answer.startswith(f"{point}:") for answer in one.answers)
        ]
        apart = [part for link in links for part in (link, " ")]
        lines.append(element("li", f"({point}) {said}: ", *apart))
    return element(
        "section",
        element("h2", "What the paper's causal analysis leaves open, and where it is taken up"),
        element("ul", *lines),
        class_="exhibit contents",
    )


def _about(about: Mapping[str, str]) -> Markup:
    items = [
        element("div", element("dt", key), element("dd", element("bdi", value)))
        for key, value in about.items()
    ]
    return element("footer", element("h2", "Provenance"), element("dl", *items))
