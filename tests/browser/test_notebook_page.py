"""The explorer where its users have it: in JupyterLab, with a kernel that runs the model."""

import base64
import csv
import io
import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from browser import jupyter
from browser.chromium import Chromium
from browser.live import cells, choose
from PIL import Image

import imaginelens as il

pytest.importorskip("jupyterlab")
pytestmark = pytest.mark.browser

SECONDS = 120.0  # for what the kernel is asked to do
SLOW = re.compile(r"Plugin \S+ .*activate\.")  # JupyterLab, of itself, on a busy machine


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[jupyter.Jupyter]:
    with jupyter.Jupyter(tmp_path_factory.mktemp("jupyter")) as found:
        yield found


@pytest.fixture(scope="module")
def opened(lab: jupyter.Jupyter, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Chromium]:
    with Chromium(tmp_path_factory.mktemp("chromium")) as browser:
        browser.size(1300, 1800)
        jupyter.explore(lab, browser)
        yield browser


@pytest.fixture
def page(opened: Chromium, lab: jupyter.Jupyter) -> Iterator[Chromium]:
    """The notebook with the widget in it; whatever a test did there, nothing went wrong or out."""
    yield opened
    assert [text for text in opened.problems() if not SLOW.fullmatch(text)] == []
    assert opened.dialogs() == []
    assert opened.outside(lab.server) == []


def told(browser: Chromium, words: str) -> str:
    """What the widget says, once it says this."""
    wanted = f"{jupyter.STATUS}.match({json.dumps(words)}) ? {jupyter.STATUS} : ''"
    said = browser.until(wanted, seconds=SECONDS)
    browser.drawn()
    return said


def test_a_click_is_answered_by_the_kernel(page: Chromium) -> None:
    assert page.text(".il-detail").startswith("Run a cell")
    lens = il.load("latent-content")
    task = lens.task(n=3, seed=0)
    effects = []
    # At layer 1 the card's shape has been read from step 1, so that a patch there comes too late.
    for step, flips in ((0, True), (1, False)):
        cell = f"layer 1, position latent[{step}]"
        page.click(cells(page)[cell][1])
        told(page, re.escape(f"latent[{step}]") + ".*effect")
        direct = lens.patch(
            base=task.base[0], source=task.source[0], site="blocks.1.hook_resid_post",
            base_answers=task.base_answers[0], source_answers=task.source_answers[0],
            at=il.latent[step],
        )  # fmt: skip
        assert (direct.answers_after[0] == task.source_answers[0]) is flips
        assert page.text(".il-answers").split("\n") == [
            "unedited", str(direct.answers_before[0]), "donor", task.source_answers[0],
            "patched", f"{direct.answers_after[0]} ({'flips' if flips else 'keeps'} the answer)",
        ]  # fmt: skip
        said = cells(page)[cell][0].removeprefix("effect ")
        shown = float(said.replace("\N{MINUS SIGN}", "-"))
        assert shown == pytest.approx(direct.effect.item(), rel=1e-3)
        effects.append(shown)
    assert effects[0] > 10 * effects[1] > 0


def test_a_map_is_cancelled_while_the_kernel_works(page: Chromium) -> None:
    choose(page, "tab", "image cells")
    page.until("document.querySelector('.il-under') !== null", seconds=SECONDS)
    told(page, "click a cell")
    page.click("button[name=map]")
    page.until("!document.querySelector('button[name=cancel]').disabled", seconds=SECONDS)
    page.click("button[name=cancel]")
    done = int(re.findall(r"cancelled: (\d) of 3 rows", told(page, "^cancelled"))[0])
    assert done < 3
    effects = [said for said, _ in cells(page).values()]
    measured = [True] * 9 * done + [False] * 9 * (3 - done)
    assert [said != "not measured" for said in effects] == measured
    choose(page, "tab", "latent steps")
    told(page, "click a cell")


def test_exports_are_downloads(page: Chromium) -> None:
    page.click("button[name=map]")
    told(page, "3 rows measured")
    found = {}
    for kind in ("html", "csv", "png"):
        page.click(f"button[name={kind}]")
        name = f"explorer-pair0.{kind}"
        found[kind] = page.downloaded(name).read_bytes()
        told(page, f"exported {name}")
    rows = list(csv.DictReader(io.StringIO(found["csv"].decode())))
    steps = [row for row in rows if row["position"].startswith("latent")]
    assert {(row["layer"], row["position"]) for row in steps if row["metric"] == "logit_diff"} == {
        (str(layer), f"latent[{step}]") for layer in range(3) for step in range(2)
    }
    assert min(Image.open(io.BytesIO(found["png"])).size) > 200
    assert "circle" in re.findall(r'id="state">(.*?)</script>', found["html"].decode())[0]


def test_the_saved_notebook_has_a_picture_for_who_has_no_kernel(
    page: Chromium, lab: jupyter.Jupyter
) -> None:
    kept = jupyter.save(lab, page)
    (output,) = kept["cells"][1]["outputs"]
    assert {"application/vnd.jupyter.widget-view+json", "image/png", "text/plain"} <= {
        *output["data"]
    }
    picture = Image.open(io.BytesIO(base64.b64decode(output["data"]["image/png"])))
    assert min(picture.size) > 200
    assert "layer" in "".join(output["data"]["text/plain"])
    assert Path(lab.notebooks / jupyter.NAME).stat().st_size < 300_000


def test_what_goes_outside_would_be_seen(opened: Chromium, lab: jupyter.Jupyter) -> None:
    assert opened.outside()  # all that the page is made of
    opened.evaluate("fetch('https://example.invalid/x').catch(() => null)")
    opened.evaluate("void new WebSocket('ws://127.0.0.1:1/other')")
    opened.evaluate("console.error('our module fails')")
    assert opened.outside(lab.server) == ["https://example.invalid/x", "ws://127.0.0.1:1/other"]
    assert "our module fails" in opened.problems()
