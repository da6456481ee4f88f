"""The explorer in a real browser: what a user does and sees, and that all stays on the page."""

import base64
import csv
import io
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from browser import axe_core
from browser.chromium import Chromium, executable
from browser.live import LivePage, cells, choose
from browser.rules import LOW_CONTRAST, OVERFLOW, nameless
from PIL import Image

import imaginelens as il
from imaginelens.hooks.tokens import TokenMap
from imaginelens.view import explorer_state
from imaginelens.view.colour import UNMEASURED, ColourScale
from imaginelens.view.explorer import PatchExplorer, explore

pytestmark = pytest.mark.browser

SCRIPT = "<script>alert(1)</script>"
DETAIL_FITS = """(() => {
  const detail = document.querySelector(".il-detail");
  return detail.scrollWidth <= detail.clientWidth && detail.clientWidth > 200;
})()"""


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Chromium]:
    with Chromium(tmp_path_factory.mktemp("chromium")) as found:
        yield found


@pytest.fixture(scope="module")
def lens() -> Any:
    return il.load("latent-content")


@pytest.fixture(scope="module")
def pairs(lens: Any) -> il.Pairs:
    return lens.task(n=3, seed=0)


@pytest.fixture
def widget(lens: Any, pairs: il.Pairs) -> Iterator[PatchExplorer]:
    made = explore(lens, pairs)
    yield made
    made.close()


@pytest.fixture
def live(browser: Chromium, widget: PatchExplorer, tmp_path: Path) -> Iterator[LivePage]:
    """The widget on a page; whatever a test did there, nothing went wrong or outside."""
    browser.size(1200, 1250)
    page = LivePage(browser, widget, tmp_path / "live.html")
    yield page
    assert browser.problems() == []
    assert browser.dialogs() == []
    assert browser.outside() == []


@pytest.fixture
def saved(browser: Chromium, widget: PatchExplorer, tmp_path: Path) -> Iterator[Chromium]:
    """A saved page, with a map, one cell that was run and a token that would be markup."""
    with pytest.MonkeyPatch.context() as patch:
        own = TokenMap._piece_at
        patch.setattr(
            TokenMap, "_piece_at",
            lambda self, row, column: SCRIPT if column == 1 else own(self, row, column),
        )  # fmt: skip
        widget.choose()
        widget.run(1, 0)
        widget.map()
        page = widget.to_html(tmp_path / "saved.html")
    browser.size(1200, 1250)
    browser.open(page)
    browser.drawn()
    yield browser
    assert browser.problems() == []
    assert browser.dialogs() == []
    assert browser.outside() == []


def patched(lens: Any, pairs: il.Pairs, layer: int, at: Any, **how: Any) -> Any:
    return lens.patch(
        base=pairs.base[0], source=pairs.source[0], site=f"blocks.{layer}.hook_resid_post",
        base_answers=pairs.base_answers[0], source_answers=pairs.source_answers[0], at=at, **how,
    )  # fmt: skip


def read(text: str) -> float:
    """A number as the page writes it."""
    return float(text.replace("\N{MINUS SIGN}", "-"))


def effect(told: str) -> float:
    assert told.startswith("effect ")
    return read(told.removeprefix("effect "))


def numbers(browser: Chromium) -> dict[str, list[float]]:
    """The table of metrics: of each, unedited, donor, patched, effect."""
    rows = browser.evaluate(
        "[...document.querySelectorAll('.il-numbers tr')].slice(1)"
        ".map((row) => [...row.children].map((part) => part.textContent))"
    )
    return {name.partition(" ")[0]: list(map(read, values)) for name, *values in rows}


def pixel(browser: Chromium, at: tuple[float, float]) -> str:
    """The colour at a place of the window."""
    shot = Image.open(io.BytesIO(browser.screenshot())).convert("RGB")
    found = shot.getpixel((round(at[0]), round(at[1])))
    assert isinstance(found, tuple)
    return "#" + "".join(f"{channel:02x}" for channel in found)


def near(cell: tuple[float, float]) -> tuple[float, float]:
    """A place in a cell that is beside its number."""
    return cell[0] - 18, cell[1] + 8


# ---- a cell ------------------------------------------------------------------------------------


def test_a_click_runs_the_patch_and_tells_before_and_after(
    live: LivePage, lens: Any, pairs: il.Pairs
) -> None:
    browser = live.browser
    at = cells(browser)
    assert list(at) == [f"layer {r}, position latent[{c}]" for r in range(3) for c in range(2)]
    assert {told for told, _ in at.values()} == {"not measured"}
    assert browser.text(".il-detail").startswith("Run a cell")
    place = at["layer 1, position latent[0]"][1]
    assert pixel(browser, near(place)) == UNMEASURED
    browser.click(place)
    live.settle()
    direct = patched(lens, pairs, 1, il.latent[0])
    told = numbers(browser)
    assert list(told) == ["logit_diff", "log_prob", "prob", "source_answer"]
    before, _, after, change = told["logit_diff"]
    assert before == pytest.approx(direct.before.item(), rel=1e-3)
    assert after == pytest.approx(direct.after.item(), rel=1e-3)
    assert change == pytest.approx(direct.effect.item(), rel=1e-3)
    other = patched(lens, pairs, 1, il.latent[0], metric=il.prob)
    assert told["prob"][2] == pytest.approx(other.after.item(), rel=1e-3)
    answers = browser.text(".il-answers").split("\n")
    assert answers == [
        "unedited", str(direct.answers_before[0]), "donor", "circle",
        "patched", f"{direct.answers_after[0]} (flips the answer)",
    ]  # fmt: skip
    at = cells(browser)
    measured = {name for name, (told, _) in at.items() if told != "not measured"}
    assert measured == {"layer 1, position latent[0]"}
    assert direct.effect.item() > 0
    assert pixel(browser, near(place)) == ColourScale(1.0).colour(1.0)  # the largest there is
    assert pixel(browser, near(at["layer 0, position latent[0]"][1])) == UNMEASURED
    assert "one example: no interval" in browser.text(".il-legend")


def test_a_cell_is_reached_and_run_by_keyboard(live: LivePage, lens: Any, pairs: il.Pairs) -> None:
    browser = live.browser
    for _ in range(40):
        browser.key("Tab")
        if browser.evaluate("document.activeElement.className") == "il-heat":
            break
    else:
        raise AssertionError("the Tab key does not reach the heat-map")
    browser.key("ArrowDown")  # the first arrow selects the first cell
    live.settle()
    assert browser.text(".il-cell") == "layer 0, position latent[0]: not measured"
    for key in ("ArrowDown", "ArrowRight", "ArrowRight"):  # the last one is at the edge
        browser.key(key)
        live.settle()
    assert live.widget.selected == {"row": 1, "column": 1}
    assert live.widget.session.result.empty
    browser.key("Enter")
    live.settle()
    direct = patched(lens, pairs, 1, il.latent[1])
    assert numbers(browser)["logit_diff"][3] == pytest.approx(direct.effect.item(), rel=1e-3)
    assert browser.evaluate("document.activeElement.className") == "il-heat"
    browser.key("Home")
    live.settle()
    assert browser.text(".il-cell") == "layer 1, position latent[0]: not measured"
    browser.key(" ")
    live.settle()
    assert live.widget.selected == {"row": 1, "column": 0}
    assert set(live.widget.session.result.position) == {"latent[0]", "latent[1]"}


def test_a_cell_that_runs_is_seen_to_run(live: LivePage) -> None:
    browser = live.browser
    browser.click(cells(browser)["layer 1, position latent[0]"][1])
    assert browser.evaluate("document.querySelector('.il-shimmer').hidden") is False
    live.settle()
    assert browser.evaluate("document.querySelector('.il-shimmer').hidden") is True


def test_probabilities_are_drawn_as_long_as_they_are(live: LivePage) -> None:
    live.browser.click(cells(live.browser)["layer 1, position latent[0]"][1])
    live.settle()
    drawn = live.browser.evaluate(
        "[...document.querySelectorAll('.il-bars td')].map((cell) => "
        "[cell.firstChild.getBoundingClientRect().width, parseFloat(cell.textContent)])"
    )
    told = [token[when] for token in live.widget.detail["tokens"] for when in ("before", "after")]
    assert len(drawn) == len(told) >= 10
    for (width, percent), share in zip(drawn, told, strict=True):
        assert percent == pytest.approx(100 * share, abs=0.051)
        assert width == pytest.approx(max(1.0, 72 * share), abs=0.6)


# ---- all cells ---------------------------------------------------------------------------------


def test_all_cells_are_those_of_a_sweep(live: LivePage, lens: Any, pairs: il.Pairs) -> None:
    browser = live.browser
    live.press("map")
    live.settle()
    direct = il.sweep(lens, pairs[0:1])
    effects = [effect(told) for told, _ in cells(browser).values()]
    assert effects == pytest.approx(direct.effect.ravel().tolist(), rel=1e-3, abs=1e-4)
    assert browser.text(".il-status").startswith("3 rows measured")
    scale = ColourScale(np.abs(direct.effect).max())
    for (_, place), value in zip(cells(browser).values(), direct.effect.ravel(), strict=True):
        channels = bytes.fromhex(pixel(browser, near(place))[1:])
        assert list(channels) == pytest.approx(scale.rgb(np.array(value)).tolist(), abs=9)
    # The page has 21 stops of the scale, Python 11, and between them both mix.


def test_a_map_is_cancelled_between_rows(live: LivePage) -> None:
    browser = live.browser
    live.press("map")
    live.carry(1)  # it begins
    live.carry(1)  # the first row
    assert browser.text(".il-status") == "measured 1 of 3 rows"
    assert browser.evaluate("document.querySelector('.il-head progress').value") == 1 / 3
    assert browser.evaluate("document.querySelector('.il-shimmer').hidden") is False
    assert browser.evaluate("document.querySelector('button[name=map]').disabled") is True
    live.press("cancel")  # when the second row has been asked for
    live.settle()
    assert browser.text(".il-status") == "cancelled: 2 of 3 rows are measured, and stay"
    told = [told for told, _ in cells(browser).values()]
    assert [t != "not measured" for t in told] == [True] * 4 + [False] * 2
    assert browser.evaluate("document.querySelector('.il-shimmer').hidden") is True
    assert browser.evaluate("document.querySelector('button[name=cancel]').disabled") is True
    live.press("map")
    live.settle()
    assert "not measured" not in {told for told, _ in cells(browser).values()}


def test_escape_cancels_wherever_the_focus_is(live: LivePage) -> None:
    live.press("map")
    live.carry(1)
    live.browser.evaluate("document.querySelector('select[name=metric]').focus()")
    live.browser.key("Escape")
    live.settle()
    assert live.browser.text(".il-status").startswith("cancelled: 1 of 3 rows")


# ---- what the columns are ----------------------------------------------------------------------


def test_image_cells_are_patched_where_they_are(live: LivePage, lens: Any, pairs: il.Pairs) -> None:
    browser = live.browser
    live.choose("tab", "image cells")
    assert live.widget.shape == [4, 3, 9]
    left, top, width, height = browser.box(".il-picture")
    at = [(left + width * (k % 3 + 0.5) / 3, top + height * (k // 3 + 0.5) / 3) for k in range(9)]
    browser.click(at[5])
    live.settle()
    direct = patched(lens, pairs, 0, il.image[0][1, 2])
    assert "image[0][1, 2]" in browser.text(".il-status")
    assert numbers(browser)["logit_diff"][3] == pytest.approx(direct.effect.item(), rel=1e-3)
    browser.drag([at[1], at[4], at[5]])
    live.settle()
    assert live.widget.columns[-1] == "image[0][0:2, 1:3]"
    assert browser.text(".il-cell") == "layer 0, position image[0][0:2, 1:3]: not measured"
    browser.evaluate("document.querySelector('.il-heat').focus()")
    browser.key("Enter")
    live.settle()
    direct = patched(lens, pairs, 0, il.image[0][0:2, 1:3])
    assert direct.effect.item() != 0
    assert numbers(browser)["logit_diff"][3] == pytest.approx(direct.effect.item(), rel=1e-3)
    browser.drag([at[1], at[4], at[5]])
    live.settle()
    assert len(live.widget.columns) == 10  # brushed again, it is the same column


def test_effects_are_drawn_over_the_image(live: LivePage) -> None:
    browser = live.browser
    live.choose("tab", "image cells")
    left, top, width, height = browser.box(".il-picture")
    before = Image.open(io.BytesIO(browser.screenshot((left, top, width, height))))
    live.press("map")
    live.settle()
    box = browser.box(".il-picture")
    after = Image.open(io.BytesIO(browser.screenshot(box)))
    assert after.size == before.size
    assert "effects of layer 0" in browser.text(".il-under")
    name = "image 0 of the edited run with its 3 by 3 image tokens, effects of layer 0"
    assert [told for _, told in browser.accessible()].count(name) == 1
    change = np.abs(
        np.asarray(after.convert("RGB"), dtype=int) - np.asarray(before.convert("RGB"), dtype=int)
    ).sum(-1)
    third = len(change) // 3
    by_cell = [
        change[r * third + 9 : (r + 1) * third - 9, c * third + 9 : (c + 1) * third - 9].mean()
        for r in range(3)
        for c in range(3)
    ]
    effects = [abs(effect(told)) for told, _ in list(cells(browser).values())[:9]]
    assert int(np.argmax(by_cell)) == int(np.argmax(effects))
    assert min(by_cell) < 0.1 * max(by_cell)


def test_tokens_become_columns(live: LivePage) -> None:
    browser = live.browser
    chips = browser.evaluate(
        "[...document.querySelectorAll('.il-chip button')].map((chip) => chip.innerText)"
    )
    assert chips == [token["text"] for token in live.widget.tokens]
    first = chips.index("z0")
    browser.click(f".il-chip:nth-child({first + 2}) button")
    live.settle()
    assert browser.text(".il-cell").startswith("layer 0, position latent[1]")
    words = [k for k, token in enumerate(live.widget.tokens) if token["kind"] == "text"][:2]
    for k in words:
        browser.click(f".il-chip:nth-child({k + 1}) button")
    browser.evaluate(
        "[...document.querySelectorAll('button')].find((b) => b.innerText === 'Add as column')"
        ".click()"
    )
    live.settle()
    at = [live.widget.tokens[k]["first"] for k in words]
    assert live.widget.columns[-1] == f"positions({at})"
    assert browser.text(".il-status") == f"positions({at}) is a column now; Enter runs it"


def test_another_metric_and_the_share_of_the_difference(live: LivePage) -> None:
    browser = live.browser
    live.press("map")
    live.settle()
    raw = [effect(told) for told, _ in cells(browser).values()]
    browser.click("input[name=normal]")
    shares = [effect(told) for told, _ in cells(browser).values()]
    before, other = live.widget.ends[0]
    expected = [value / (other - before) for value in raw]
    assert shares == pytest.approx(expected, rel=2e-3, abs=1e-4)
    assert "share of the pair's difference" in browser.text(".il-legend")
    live.choose("metric", "prob")
    assert {told for told, _ in cells(browser).values()} == {"not measured"}  # not logit_diff's
    assert "effect on prob" in browser.text(".il-legend")


# ---- what is taken away ------------------------------------------------------------------------


def test_exports_are_files_that_hold_what_is_shown(live: LivePage, tmp_path: Path) -> None:
    browser = live.browser
    live.press("map")
    live.settle()
    browser.click(cells(browser)["layer 1, position latent[0]"][1])
    live.settle()
    found = {}
    for kind in ("html", "csv", "png"):
        live.press(kind)
        live.settle()
        name = f"explorer-pair0.{kind}"
        found[kind] = browser.downloaded(name).read_bytes()
        assert browser.text(".il-status") == f"exported {name}"
    rows = list(csv.DictReader(io.StringIO(found["csv"].decode())))
    assert [float(row["effect"]) for row in rows] == live.widget.result.effect.tolist()
    picture = Image.open(io.BytesIO(found["png"]))
    assert min(picture.size) > 200
    (state,) = re.findall(r'id="state">(.*?)</script>', found["html"].decode())
    z = base64.b64decode(json.loads(state)["z"]["base64"])
    assert z == live.widget.z
    for kind in found:
        (browser.downloads / f"explorer-pair0.{kind}").unlink()


@pytest.mark.parametrize("clipboard", ["there", "refused"])
def test_the_copied_code_measures_the_cell(
    live: LivePage, lens: Any, pairs: il.Pairs, clipboard: str
) -> None:
    browser = live.browser
    assert browser.evaluate("document.querySelector('button[name=copy]').disabled") is True
    browser.click(cells(browser)["layer 1, position latent[1]"][1])
    live.settle()
    write = "copied.push(text)" if clipboard == "there" else "throw new Error('no permission')"
    browser.evaluate(f"""(() => {{
      window.copied = [];
      navigator.clipboard.writeText = async (text) => {{ {write}; }};
      document.addEventListener("copy", () => copied.push(document.activeElement.value));
    }})()""")
    live.press("copy")
    live.settle()
    (code,) = browser.evaluate("window.copied")
    names: dict[str, Any] = {"lens": lens, "pairs": pairs}
    exec(code, names)
    direct = patched(lens, pairs, 1, il.latent[1])
    assert names["found"].effect.item() == direct.effect.item()
    assert browser.text(".il-status") == "copied: the call that measures this cell"
    assert browser.evaluate("document.querySelectorAll('textarea').length") == 0


# ---- what goes wrong ---------------------------------------------------------------------------


def test_an_error_is_a_sentence_and_stays_text(
    live: LivePage, monkeypatch: pytest.MonkeyPatch
) -> None:
    browser = live.browser

    def broken(*args: Any, **kwargs: Any) -> None:
        raise RuntimeError(f"CUDA out of memory {SCRIPT}")

    place = cells(browser)["layer 1, position latent[0]"][1]
    with monkeypatch.context() as patch:
        patch.setattr(explorer_state, "do", broken)
        for _ in range(2):  # the second is told, too
            browser.click(place)
            live.settle()
            assert browser.text(".il-status") == f"RuntimeError: CUDA out of memory {SCRIPT}"
            assert browser.evaluate("document.querySelector('.il-shimmer').hidden") is True
    assert browser.evaluate("document.querySelector('.il-status').dataset.kind") == "error"
    assert browser.evaluate("document.querySelectorAll('#explorer script').length") == 0
    browser.click(place)
    live.settle()
    assert "effect" in browser.text(".il-status")


def test_a_refused_choice_is_shown_as_it_was(
    live: LivePage, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(*args: Any, **kwargs: Any) -> None:
        raise il.InputError("edit is 'zero'; choose another")

    shown = "document.querySelector('select[name=edit]').value"
    with monkeypatch.context() as patch:
        patch.setattr(explorer_state.Explorer, "choose", refused)
        live.choose("edit", "zero")
    assert live.browser.text(".il-status") == "edit is 'zero'; choose another"
    assert live.browser.evaluate(shown) == "swap"
    live.choose("edit", "zero")
    assert live.browser.evaluate(shown) == "zero"
    assert live.widget.session.setting.edit == "zero"


def test_a_closed_widget_says_so(live: LivePage) -> None:
    live.widget.close()
    live.push()
    live.settle()
    assert live.browser.text(".il-status") == "closed: the model was let go of"
    assert live.browser.evaluate("document.querySelector('button[name=map]')") is None


# ---- how it looks ------------------------------------------------------------------------------


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", [1200, 920, 360])
def test_it_fits_and_can_be_read(live: LivePage, width: int, dark: bool) -> None:
    browser = live.browser
    live.press("map")
    live.settle()
    browser.click(cells(browser)["layer 1, position latent[0]"][1])
    live.settle()
    browser.evaluate("document.querySelector('.il-detail details').open = true")
    browser.size(width, 1250, dark=dark)
    assert browser.evaluate(OVERFLOW) == []
    assert browser.evaluate(LOW_CONTRAST) == []
    shot = Image.open(io.BytesIO(browser.screenshot())).convert("L")
    assert (float(np.median(np.asarray(shot))) < 60) is dark
    columns = browser.evaluate(
        "getComputedStyle(document.querySelector('.il-panels'))"
        ".gridTemplateColumns.split(' ').length"
    )
    assert columns == (1 if width == 360 else 2)
    assert browser.evaluate(DETAIL_FITS)
    live.choose("tab", "image cells")
    assert browser.evaluate(OVERFLOW) == []


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_words_on_the_canvas_follow_the_colour_scheme(live: LivePage, dark: bool) -> None:
    browser = live.browser
    browser.size(1200, 1250, dark=dark)
    left, top, _, height = browser.box(".il-heat")
    labels = Image.open(io.BytesIO(browser.screenshot((left, top, 20, height)))).convert("L")
    pixels = np.asarray(labels, dtype=int)
    ground = int(np.median(pixels))
    ink = int(pixels.max() if dark else pixels.min())
    assert (ground < 60, ground > 200) == (dark, not dark)
    assert abs(ink - ground) > 120


def test_a_panel_grows_and_shrinks(live: LivePage) -> None:
    browser = live.browser
    width = browser.box(".il-panel")[2]
    browser.click(".il-grow")
    assert browser.box(".il-panel")[2] > 1.4 * width
    assert browser.evaluate(OVERFLOW) == []
    assert browser.evaluate("document.querySelector('.il-grow').ariaPressed") == "true"
    browser.click(".il-grow")
    assert browser.box(".il-panel")[2] == width


# ---- who cannot see or point -------------------------------------------------------------------


def test_everything_that_acts_has_a_name(live: LivePage) -> None:
    browser = live.browser
    browser.click(cells(browser)["layer 1, position latent[0]"][1])
    live.settle()
    told = browser.accessible()
    assert nameless(told) == []
    count = browser.evaluate(
        "[...document.querySelectorAll('button, select, canvas, input')]"
        ".filter((node) => node.checkVisibility()).length"
    )
    roles = ("button", "combobox", "checkbox", "application", "image", "img", "Canvas")
    assert sum(role in roles for role, _ in told) >= count > 20
    (heat,) = [name for role, name in told if role == "application"]
    assert heat.startswith("3 rows by 2 columns, 1 cell measured, largest")


def test_tab_goes_through_everything_in_reading_order(live: LivePage) -> None:
    browser = live.browser
    browser.click(cells(browser)["layer 1, position latent[0]"][1])
    live.settle()
    wanted = browser.evaluate(
        "[...document.querySelectorAll('button, select, input, canvas[tabindex], summary')]"
        ".filter((node) => !node.disabled && node.checkVisibility()).length"
    )
    browser.evaluate("document.querySelector('.il-explorer button').focus()")
    browser.evaluate("window.reached = [document.activeElement]")
    browser.evaluate("document.addEventListener('focusin', (event) => reached.push(event.target))")
    browser.key("Tab", times=wanted - 1)
    assert browser.evaluate("new Set(reached).size") == wanted
    order = browser.evaluate(
        "reached.slice(1).every((node, k) => "
        "reached[k].compareDocumentPosition(node) & Node.DOCUMENT_POSITION_FOLLOWING)"
    )
    assert order is True
    outlines = browser.evaluate(
        "getComputedStyle(document.activeElement).outlineStyle + "
        "getComputedStyle(document.activeElement).outlineWidth"
    )
    assert outlines == "solid2px"


@pytest.fixture(scope="module")
def axe() -> str:
    """axe-core's script."""
    return axe_core.script()


def broken_rules(browser: Chromium, axe: str) -> list[str]:
    """What axe-core finds, as rule and element."""
    browser.evaluate(f"{axe}; null")
    return browser.evaluate(
        "axe.run(document).then((found) => found.violations.flatMap((rule) => "
        "rule.nodes.map((node) => `${rule.id}: ${node.html.slice(0, 120)}`)))"
    )


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_axe_finds_nothing(live: LivePage, axe: str, dark: bool) -> None:
    browser = live.browser
    browser.size(1200, 1250, dark=dark)
    browser.click(cells(browser)["layer 1, position latent[0]"][1])
    live.settle()
    assert broken_rules(browser, axe) == []
    browser.evaluate("document.querySelector('button[name=map]').textContent = ''")
    assert [rule.partition(":")[0] for rule in broken_rules(browser, axe)] == ["button-name"]


# ---- the saved page ----------------------------------------------------------------------------


def test_a_saved_page_works_without_a_kernel(saved: Chromium, widget: PatchExplorer) -> None:
    assert saved.text(".il-status") == "saved page: cells that were run can be opened"
    for name in ("map", "cancel", "html"):
        assert saved.evaluate(f"document.querySelector('button[name={name}]')") is None
    effects = widget.session.effect_map.effect.ravel().tolist()
    shown = [effect(told) for told, _ in cells(saved).values()]
    assert shown == pytest.approx(effects, rel=1e-3, abs=1e-4)
    saved.evaluate("document.querySelector('.il-heat').focus()")
    saved.key("ArrowDown", times=2)
    assert saved.text(".il-cell").startswith("layer 1, position latent[0]: effect")
    saved.key("Enter")
    value = widget.session.run(1, 0).values["logit_diff"]
    assert numbers(saved)["logit_diff"][3] == pytest.approx(value.effect, rel=1e-3)
    saved.click(cells(saved)["layer 2, position latent[1]"][1])
    assert saved.text(".il-status") == "this cell was not run on its own"
    assert saved.text(".il-detail").startswith("Run a cell")


def test_a_saved_page_shows_another_metric(saved: Chromium, widget: PatchExplorer) -> None:
    choose(saved, "metric", "prob")
    assert "effect on prob" in saved.text(".il-legend")
    told = {name: told for name, (told, _) in cells(saved).items()}
    value = widget.session.run(1, 0).values["prob"]
    assert effect(told.pop("layer 1, position latent[0]")) == pytest.approx(value.effect, rel=1e-3)
    assert set(told.values()) == {"not measured"}


def test_text_in_a_saved_page_stays_text(saved: Chromium) -> None:
    chips = saved.evaluate("[...document.querySelectorAll('.il-chip')].map((c) => c.innerText)")
    assert chips[1] == SCRIPT
    assert saved.evaluate("document.querySelectorAll('script').length") == 2  # state and module
    assert saved.evaluate("document.querySelectorAll('#explorer script').length") == 0
    assert saved.dialogs() == []


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_a_saved_page_fits_and_can_be_read(saved: Chromium, axe: str, dark: bool) -> None:
    saved.evaluate("document.querySelector('.il-heat').focus()")
    saved.key("ArrowDown", times=2)
    saved.key("Enter")
    for width in (1200, 360):
        saved.size(width, 1250, dark=dark)
        assert saved.evaluate(OVERFLOW) == []
        assert saved.evaluate(LOW_CONTRAST) == []
    assert nameless(saved.accessible()) == []
    assert broken_rules(saved, axe) == []


# ---- the checks can fail -----------------------------------------------------------------------


def test_the_rules_find_what_breaks_them(browser: Chromium, tmp_path: Path) -> None:
    page = tmp_path / "bad.html"
    page.write_text(
        "<!doctype html><body style='background:#fff'><p style='color:#767676'>just enough</p>"
        "<p style='color:#777777'>too pale</p><p style='opacity:0.5'>half gone</p>"
        "<div style='background:#000'><p>black on black</p></div>"
        "<select style='color:#888'><option>pale choice</select>"
        "<div style='overflow:auto'><div style='width:2000px'>scrolls</div></div>"
        "<div id=wide style='width:2000px'>wide</div>"
        "<button></button><canvas role=img></canvas><button aria-label=fine></button>",
        encoding="utf-8",
    )
    browser.size(800, 600)
    browser.open(page)
    pale = [text for text, _ in browser.evaluate(LOW_CONTRAST)]
    assert sorted(pale) == ["black on black", "half gone", "pale choice", "too pale"]
    assert browser.evaluate(OVERFLOW) == ["DIV "]
    found = nameless(browser.accessible())
    assert len(found) == 3  # the button, the canvas, and the select
    assert found.count("button") == 1


def test_the_driver_sees_what_goes_wrong(browser: Chromium, tmp_path: Path) -> None:
    page = tmp_path / "loud.html"
    page.write_text(
        "<!doctype html><img src='http://example.invalid/x.png'><script>console.error('told');"
        "console.log('not a problem'); alert('hello'); throw new Error('thrown');</script>",
        encoding="utf-8",
    )
    browser.open(page)
    problems = " ".join(browser.problems())
    assert "told" in problems
    assert "thrown" in problems
    assert "example.invalid" in problems
    assert "not a problem" not in problems
    assert browser.dialogs() == ["hello"]
    assert browser.outside() == ["http://example.invalid/x.png"]
    with pytest.raises(RuntimeError, match="no such thing"):
        browser.evaluate("(() => { throw new Error('no such thing'); })()")


def test_without_a_browser_the_tests_fail() -> None:
    with pytest.raises(pytest.fail.Exception, match="apt-get install chromium"):
        executable(lambda name: None)
    assert executable(lambda name: f"/x/{name}") == "/x/chromium"
    assert executable(lambda name: "/y" if name == "google-chrome" else None) == "/y"


def test_without_axe_the_tests_fail() -> None:
    with pytest.raises(pytest.fail.Exception, match=r"pip install --no-deps .* no-such-axe"):
        axe_core.script("no-such-axe")
    assert "axe v4" in axe_core.script()[:100]
