"""The report in a real browser: words of a model stay words, and nothing is loaded from outside."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from browser.chromium import Chromium
from view.test_page import HOSTILE, hostile_report

from imaginelens.view import write

pytestmark = pytest.mark.browser

SCRIPT = "<script>alert(1)</script>"


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Chromium]:
    with Chromium(tmp_path_factory.mktemp("chromium")) as found:
        yield found


def test_a_script_in_a_report_is_shown_as_text(browser: Chromium, tmp_path: Path) -> None:
    assert SCRIPT in HOSTILE
    browser.size(1200, 1250)
    browser.open(write(hostile_report(), tmp_path / "report.html"))
    browser.drawn()
    assert SCRIPT in browser.evaluate("document.body.innerText")
    assert browser.evaluate("document.body.textContent").count(SCRIPT) > 10
    assert browser.evaluate("document.querySelectorAll('script').length") == 0
    assert (
        browser.evaluate("document.querySelectorAll('[onclick], [onload], [onerror]').length") == 0
    )
    assert browser.problems() == []
    assert browser.dialogs() == []
    assert browser.outside() == []


def test_the_same_words_as_markup_would_be_found(browser: Chromium, tmp_path: Path) -> None:
    page = tmp_path / "bad.html"
    page.write_text(f"<!doctype html><body><p>{SCRIPT}</p></body>", encoding="utf-8")
    browser.open(page)
    assert browser.dialogs() == ["1"]
    assert SCRIPT not in browser.evaluate("document.body.innerText")
