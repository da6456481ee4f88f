"""Markup is escaped unless it was built here."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from view.reading import read

from imaginelens.view.fit import fit, width
from imaginelens.view.markup import Markup, element, inert, join
from imaginelens.view.numerals import fixed, signed


@given(st.text())
def test_any_text_survives_as_text(text):
    node = read(element("p", text, title=text)).one("p")
    assert not node.children
    assert node["title"] == inert(text)
    assert node.text == inert(text)


@given(st.text())
def test_inert_is_idempotent(text):
    assert inert(inert(text)) == inert(text)


@given(st.text(max_size=60), st.floats(0, 400))
def test_fitted_text_fits(text, room):
    assert width(fit(text, room, 11.0), 11.0) <= room


def test_markup_passes_and_its_parts_do_not():
    inner = element("b", "<i>")
    assert inner == "<b>&lt;i&gt;</b>"
    assert element("p", inner, "<u>", None) == "<p><b>&lt;i&gt;</b>&lt;u&gt;</p>"
    assert isinstance(join([inner, "x"]), Markup)


def test_attributes():
    attributes = {"data_value": np.float64(0.1), "hidden": True, "x": None, "y": False}
    assert element("g", **attributes) == '<g data-value="0.1" hidden></g>'
    assert element("g", title='"<') == '<g title="&quot;&lt;"></g>'


@pytest.mark.parametrize(
    ("value", "text", "difference"),
    [(0.0, "0", "0"), (-0.0, "0", "0"), (1e-9, "0.00", "0.00"), (-1e-9, "0.00", "0.00"),
     (0.5, "0.50", "+0.50"), (-0.5, "\N{MINUS SIGN}0.50", "\N{MINUS SIGN}0.50")],
)  # fmt: skip
def test_zero_is_told_from_small(value, text, difference):
    assert fixed(value) == text
    assert signed(value) == difference
