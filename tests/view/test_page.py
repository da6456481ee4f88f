"""The page is one inert file, whatever the model wrote, and shows the numbers it was given."""

import base64
import io
import re
import unicodedata
from dataclasses import replace
from functools import cache

import numpy as np
import pytest
from PIL import Image
from view.planted_report import CARD, content, ignored, planted_report, tokens
from view.reading import Node, read

from imaginelens.view import (
    Cell,
    Check,
    EditRow,
    Example,
    KeyNumber,
    Measure,
    Mechanism,
    Picture,
    Prediction,
    Report,
    Token,
    render,
    write,
)
from imaginelens.view.colour import UNMEASURED, ColourScale
from imaginelens.view.numerals import sample_size
from imaginelens.view.strips import strip_pixels
from imaginelens.view.tokens import chips

NONE = "\N{EN DASH}"
HOSTILE = (
    "</title></style><script>alert(1)</script><img src=http://evil.example/x onerror=alert(1)>"
    "\" onmouseover=\"alert(1)\" ' onclick='x'\x00\x1b[31m\u202egnp.exe\u2066\u200f\ud800"
    "<svg/onload=alert(1)>]]>--><!--javascript:alert(1)&lt;\u2028\u05e9\u05dc\u05d5\u05dd مرحبا"
)
TAGS = set(
    "html head meta title style body main header footer article section div p h1 h2 h3 ol ul li dl "
    "dt dd figure figcaption q b i bdi span small img details summary table thead tbody tr th td "
    "svg g rect path circle text image".split()
)


def hostile_report() -> Report:
    """The model's words in every field that takes words."""
    study = content()
    cell = Cell(0.5, n=1, before=HOSTILE, after=HOSTILE)
    heatmap = replace(
        study.heatmap,
        rows=tuple(replace(row, site=HOSTILE, label=HOSTILE) for row in study.heatmap.rows),
        columns=tuple(replace(c, label=HOSTILE, token=HOSTILE) for c in study.heatmap.columns),
        cells=((cell,) * 3,) * 4,
        unit=HOSTILE,
        caption=HOSTILE,
        row_axis=HOSTILE,
        column_axis=HOSTILE,
    )
    hostile = replace(
        study,
        name=HOSTILE,
        headline=HOSTILE,
        base=Example(HOSTILE, HOSTILE, replace(study.base.picture, alt=HOSTILE)),
        source=Example(HOSTILE, HOSTILE),
        tokens=tuple(replace(token, text=HOSTILE) for token in study.tokens),
        heatmap=heatmap,
        edits=tuple(replace(row, edit=HOSTILE) for row in study.edits),
        checks=tuple(Check(HOSTILE, HOSTILE, ok, HOSTILE) for ok in (True, False, None)),
        numbers=(KeyNumber(HOSTILE, Measure(0.5, 3), note=HOSTILE),),
        detail=HOSTILE,
        mechanism=Mechanism(
            (Prediction(HOSTILE, HOSTILE, Measure(0.5, 3), HOSTILE),), HOSTILE, 3, 1, HOSTILE
        ),
    )
    return Report(
        title=HOSTILE,
        studies=(hostile,),
        subtitle=HOSTILE,
        provenance={HOSTILE: HOSTILE},
        how_to_read=(HOSTILE,),
        interval_name=HOSTILE,
        overview_note=HOSTILE,
    )


@cache
def page() -> Node:
    return read(render(planted_report()))


@pytest.fixture(scope="module", params=[planted_report, hostile_report], ids=["planted", "hostile"])
def rendered(request) -> str:
    return render(request.param())


def test_only_known_elements_and_no_event_handler(rendered):
    for node in read(rendered).walk():
        assert node.tag in TAGS | {"document"}
        assert not [name for name in node.attributes if name.startswith("on")]


def test_nothing_is_fetched(rendered):
    for node in read(rendered).walk():
        for name in ("src", "href", "srcset", "action", "data", "xlink:href"):
            address = node.attributes.get(name)
            assert address is None or re.fullmatch(
                r"data:image/(png|jpeg);base64,[\w+/=]+", address
            )
    style = read(rendered).one("style").text
    assert "url(" not in style
    assert "@import" not in style
    policy = next(m for m in read(rendered).all("meta") if "http-equiv" in m.attributes)
    assert policy["content"].startswith("default-src 'none'")


def test_a_calm_report_names_no_address_at_all():
    assert "://" not in render(planted_report())


def test_no_invisible_or_reordering_character_is_left(rendered):
    bad = {c for c in rendered if unicodedata.category(c) in {"Cc", "Cf", "Cs", "Zl", "Zp"}}
    assert bad <= {"\n"}
    rendered.encode("utf-8")


def test_hostile_words_are_shown_as_words():
    tree = read(render(hostile_report()))
    headline = tree.one("p", "headline").text
    assert "<script>alert(1)</script>" in headline
    assert "[U+0000]" in headline
    assert "[U+202E]gnp.exe[U+2066][U+200F][U+D800]" in headline
    assert headline.endswith("\u05e9\u05dc\u05d5\u05dd مرحبا")


def test_right_to_left_words_cannot_reorder_their_neighbours():
    tree = read(render(hostile_report()))
    for chip in tree.one("ol", "tokens").all("li"):
        assert [child.tag for child in chip.children] == ["bdi"]
    assert [child.tag for child in tree.one("span", "answer-line").one("b").children] == ["bdi"]


def test_an_endless_answer_does_not_flood_the_page():
    flood = replace(content(), base=Example("q", "x" * 1_000_000))
    flood = replace(flood, tokens=(Token("x" * 1_000_000, "answer"),))
    text = render(planted_report(studies=(flood,)))
    assert len(text) < 100_000
    assert "(+998000 characters)" in text


def test_same_report_same_page():
    assert render(planted_report()) == render(planted_report())


def test_size():
    assert len(render(planted_report()).encode()) < 200_000
    photo = Image.fromarray(np.random.default_rng(0).integers(0, 255, (900, 1200, 3), np.uint8))
    heavy = replace(content(), base=Example("q", "a", Picture(photo)))
    assert len(render(planted_report(studies=(heavy, ignored()))).encode()) < 500_000


def test_write_is_whole_or_not_at_all(tmp_path, monkeypatch):
    target = tmp_path / "new" / "report.html"
    assert write(planted_report(), target) == target
    whole = target.read_bytes()
    assert whole.decode() == render(planted_report())

    def fail(report):
        raise RuntimeError("no page today")

    monkeypatch.setattr("imaginelens.view.page.render", fail)
    with pytest.raises(RuntimeError, match="no page today"):
        write(planted_report(), target)
    assert target.read_bytes() == whole
    assert [path.name for path in target.parent.iterdir()] == ["report.html"]


def test_picture_shows_the_image_and_its_grid():
    picture = page().one("svg", "picture")
    data = picture.one("image")["href"].partition("base64,")[2]
    seen = Image.open(io.BytesIO(base64.b64decode(data)))
    assert np.array_equal(np.array(seen), np.array(content().base.picture.image))
    drawn = picture.all("g", "grid-cell")
    assert [cell.one("text").text for cell in drawn] == [
        f"{row},{column}" for row in range(3) for column in range(3)
    ]
    for cell in drawn:
        corner = (float(cell.one("rect")["x"]), float(cell.one("rect")["y"]))
        assert corner == (int(cell["data-column"]) * CARD, int(cell["data-row"]) * CARD)
    assert picture["aria-label"] == (
        "nine coloured cards, with its 3 by 3 grid of image tokens drawn on it"
    )


@pytest.mark.parametrize("mode", ["L", "LA", "P", "RGBA", "CMYK", "1", "I;16"])
def test_pictures_of_any_mode(mode):
    study = replace(content(), base=Example("q", "a", Picture(Image.new(mode, (40, 30)))))
    assert "data:image/png" in render(planted_report(studies=(study,)))


def test_token_strip_keeps_order_and_names_latents():
    labels = [chip.label for chip in chips(tokens("ring"))]
    assert labels[3] == "image \N{MULTIPLICATION SIGN} 9"
    assert [label for label in labels if label.startswith("z")] == ["z0", "z1", "z2"]
    assert labels[-2:] == ["ring", "<|im_end|>"]
    shown = page().one("ol", "tokens").all("li")
    assert [chip.text for chip in shown] == labels
    assert shown[3]["title"].startswith("positions 3 to 11, image")


def test_a_long_prompt_is_shortened_in_the_middle():
    labels = [chip.label for chip in chips([Token(f"w{i}", "text") for i in range(500)])]
    assert len(labels) == 61
    assert labels[30] == "… 440 tokens …"
    assert labels[-1] == "w499"


def test_latent_strips_hold_the_values_and_norms():
    study = content()
    lines = page().one("ol", "latents").all("li")
    norms = [float(line.one("span", "norm")["data-value"]) for line in lines]
    assert norms == pytest.approx(np.linalg.norm(study.latents, axis=1))
    limit = planted_report().latent_limit
    data = lines[1].one("img")["src"].partition("base64,")[2]
    pixels = np.array(Image.open(io.BytesIO(base64.b64decode(data))))
    seen = ["#" + bytes(pixel).hex() for pixel in pixels[0]]
    assert seen == [ColourScale(limit).colour(value) for value in study.latents[1].tolist()]
    assert lines[1].one("img")["alt"].startswith("64 values, from")


def test_wide_and_broken_latents():
    wide = np.zeros(3584)
    wide[100] = -2.0
    pixels = strip_pixels(wide, 2.0)
    assert pixels.shape == (1, 256, 3)
    assert pixels[0, 100 * 256 // 3584].tolist() == [103, 0, 31]
    grey = strip_pixels(np.array([np.nan, 0.0]), 2.0)[0, 0]
    assert "#" + bytes(grey).hex() == UNMEASURED


def table_rows(study: int) -> list[Node]:
    return page().all("section", "do-z")[study].one("tbody").all("tr")


@pytest.mark.parametrize("index", [0, 1])
def test_edits_table_holds_the_numbers(index):
    study = planted_report().studies[index]
    rows = table_rows(index)
    assert len(rows) == len(study.edits)
    for row, edit in zip(rows, study.edits, strict=True):
        accuracy, change, flipped, relative, landed = row.all("td")
        assert row.one("th").text == edit.edit
        assert float(accuracy["data-value"]) == edit.accuracy.value
        assert accuracy.one("b").text == f"{edit.accuracy.value:.2f}"
        assert int(accuracy["data-n"]) == edit.accuracy.n
        if edit.change is None:
            continue
        low, high = edit.change.interval
        assert float(change["data-value"]) == edit.change.value
        assert (float(change["data-low"]), float(change["data-high"])) == (low, high)
        assert float(flipped["data-value"]) == edit.flipped
        assert float(relative["data-value"]) == edit.relative_change
        assert landed.text == f"✓ {edit.fired}/{edit.expected}"


def test_an_edit_that_did_not_land_is_marked():
    row = EditRow("Zero", Measure(0.9, 8), Measure(0.0, 8), 0.0, 0.0, fired=3, expected=8)
    study = replace(content(), edits=(row,))
    cells = read(render(planted_report(studies=(study,)))).one("section", "do-z").all("td")
    assert cells[-1].text == "✕ 3/8"
    assert cells[-1].all("span", "fail")


def test_checks_say_passed_failed_or_neither():
    checks = (Check("a", "1", True), Check("b", "2", False), Check("c", "3", None))
    study = replace(content(), checks=checks)
    items = read(render(planted_report(studies=(study,)))).one("ul", "checks").all("li")
    assert [item.one("span", "mark")["aria-label"] for item in items] == [
        "passed",
        "failed",
        "information",
    ]
    assert [item.one("span", "value").text for item in items] == ["1", "2", "3"]


def test_every_table_has_headers_and_every_drawing_a_name():
    for table in page().all("table"):
        assert table["aria-label"]
        assert all(head["scope"] == "col" for head in table.one("thead").all("th"))
        assert all(row.one("th")["scope"] == "row" for row in table.one("tbody").all("tr"))
    for drawing in page().all("svg"):
        assert drawing.attributes.get("aria-hidden") == "true" or drawing["aria-label"]
    assert all(image["alt"] for image in page().all("img"))


def test_numbers_table_repeats_the_heatmap():
    study = content()
    rows = page().all("details")[0].one("tbody").all("tr")
    values = [[float(cell["data-value"]) for cell in row.all("td")] for row in rows]
    assert values == study.heatmap.effects.tolist()
    second = page().all("details")[1].one("tbody").all("td")
    assert second[-1].text == "not measured"


def test_provenance_and_reading_help_are_there():
    terms = {div.one("dt").text: div.one("dd").text for div in page().one("footer").all("div")}
    assert terms == {key: str(value) for key, value in planted_report().provenance.items()}
    helps = page().one("section", "reading").all("li")
    assert [item.text for item in helps] == list(planted_report().how_to_read)


@pytest.mark.parametrize("count", [0, 1, 4])
def test_any_number_of_studies(count):
    tree = read(
        render(planted_report(studies=(content(), ignored(), content(), ignored())[:count]))
    )
    articles = tree.all("article")
    assert len(articles) == count
    names = {heading["id"] for heading in tree.all("h2") if "id" in heading.attributes}
    assert {article["aria-labelledby"] for article in articles} == names
    # the eight sections line up across studies only if each has all of them
    assert {len(article.children) for article in articles} <= {8}
    assert len(tree.all("section", "overview")) == (count > 0)


def test_the_style_gives_a_study_as_many_rows_as_it_has():
    rows = re.findall(r"grid-row: span (\d+)", page().one("style").text)
    assert str(len(page().one("article").children)) in rows


def test_a_study_without_edits_or_checks_keeps_its_rows():
    bare = replace(content(), edits=(), checks=(), numbers=(), detail="", mechanism=None)
    tree = read(render(planted_report(studies=(bare, ignored()))))
    assert {len(article.children) for article in tree.all("article")} == {8}
    line = tree.one("section", "overview").one("tbody").all("tr")[0]
    assert [cell.text for cell in line.all("td")] == [NONE, NONE, NONE]
    said = tree.one("ul", "verdicts").all("li")[0]
    assert [part.text for part in said.all("p")] == [bare.name, bare.headline]


def test_the_overview_has_a_line_per_study_and_a_column_per_number():
    overview = page().one("section", "overview")
    assert overview.one("p", "note").text == "TE and TNIE of 64 pairs."
    heads = [head.text for head in overview.one("thead").all("th")]
    labels = [number.label for number in content().numbers]
    assert heads == ["Model", *labels, "All latents swapped: whose prediction comes true"]
    for line, study in zip(overview.one("tbody").all("tr"), (content(), ignored()), strict=True):
        *numbers, swap = line.all("td")
        assert [cell["data-label"] for cell in line.all("td")] == heads[1:]
        assert line.one("th").text == study.name
        for cell, number in zip(numbers, study.numbers, strict=True):
            low, high = number.measure.interval
            assert float(cell["data-value"]) == number.measure.value
            assert (float(cell["data-low"]), float(cell["data-high"])) == (low, high)
        assert swap.one("b").text == study.mechanism.winner
        assert swap.one("small").text == f"95% [83%, 98%], {sample_size(38)}"


def test_the_verdicts_come_before_any_number_that_is_not_in_a_sentence():
    verdicts = page().one("ul", "verdicts").all("li")
    for said, study in zip(verdicts, (content(), ignored()), strict=True):
        assert [part.text for part in said.all("p")] == [study.name, study.headline, study.detail]
    order = [node for node in page().walk() if node.tag in ("ul", "table", "svg", "dl", "article")]
    assert order[0].classes == ["verdicts"]


def test_numbers_of_other_names_get_columns_of_their_own():
    mine = replace(ignored(), numbers=(KeyNumber("Mine", Measure(0.5, 3), "note", "points"),))
    tree = read(render(planted_report(studies=(content(), mine)))).one("section", "overview")
    first, second = tree.one("tbody").all("tr")
    assert [cell.text for cell in first.all("td")][2] == NONE
    assert [cell.text for cell in second.all("td")][:3] == [NONE, NONE, "50 points note"]


def test_undetermined_is_written_with_what_came_closest():
    vague = replace(content(), mechanism=replace(content().mechanism, winner=None))
    tree = read(render(planted_report(studies=(vague, ignored()))))
    cell = tree.one("section", "overview").one("tbody").one("tr").all("td")[2]
    assert cell.one("b").text == "undetermined"
    assert cell.one("small").text == f"content 95% [83%, 98%], {sample_size(38)}"
    assert not tree.all("article")[0].all("tr", "winner")


@pytest.mark.parametrize("index", [0, 1])
def test_predictions_table_holds_the_shares(index):
    mechanism = planted_report().studies[index].mechanism
    section = page().all("section", "swap")[index]
    rows = section.one("tbody").all("tr")
    for row, prediction in zip(rows, mechanism.predictions, strict=True):
        shown, share = row.all("td")
        assert row.one("th").text == prediction.name + prediction.meaning
        assert float(share["data-value"]) == prediction.share.value
        assert (float(share["data-low"]), float(share["data-high"])) == prediction.share.interval
        assert ("winner" in row.classes) == (prediction.name == mechanism.winner)
        right = " ✓" if prediction.shown == mechanism.answered else ""
        assert shown.text == f"{prediction.shown or NONE}{right}"
    assert section.one("p", "after").text.endswith(f"answers {mechanism.answered}")
    assert "Decisive: 38 of 64 pairs" in section.one("p", "note").text


def test_decisive_pairs_without_an_answer_are_counted():
    lossy = replace(content(), mechanism=replace(content().mechanism, missing=4, answered=None))
    section = read(render(planted_report(studies=(lossy,)))).one("section", "swap")
    assert "42 of 64 pairs" in section.one("p", "note").text
    assert "4 of them gave no answer" in section.one("p", "note").text
    assert section.one("p", "after").text.endswith("answers nothing")
    assert "✓" not in section.text
