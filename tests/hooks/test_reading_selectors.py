"""A selector that is written as text is the selector, and other text is refused and never run."""

import os

import pytest

import imaginelens as il
from imaginelens.hooks.errors import PositionError
from imaginelens.hooks.positions import Positions, audio, inserted, video
from imaginelens.hooks.reading_selectors import _KNOWN, parse_selector
from imaginelens.mediation.rows import RowPositions

EVERY = [
    il.latent,
    il.latent[2],
    il.latent[-1],
    il.latent[1:4],
    il.latent[::2],
    il.span[0].latent,
    il.span[1].latent[0:2],
    il.span[0].open,
    il.span[2].close,
    il.markers,
    il.image,
    il.image[0],
    il.image[0:2],
    il.image[0][3:6, 2:9],
    il.image[0][3],
    il.image[-1][:, 2],
    il.image[3:6, 2:9],
    video,
    video[1],
    video[0][2],
    video[0][0:2, :, 3],
    audio,
    il.text,
    il.text.find("red cube"),
    il.text.find('it\'s "here"\n\\d'),
    il.answer,
    il.before_answer,
    il.deciding,
    il.generated,
    il.format,
    il.last_prompt,
    il.positions([4, 7]),
    il.after(il.latent),
    il.onward(il.latent[1]),
    il.after(il.latent | il.markers),
    inserted,
    inserted[2],
    il.imagination,
    il.imagination[0],
    il.imagination.between("<see>", "</see>")[1:],
    il.latent | il.markers,
    il.latent[0] | il.image[0] | il.last_prompt,
]


@pytest.mark.parametrize("selector", EVERY, ids=repr)
def test_what_a_selector_shows_is_read_as_itself(selector: Positions) -> None:
    assert parse_selector(repr(selector)) == selector
    assert parse_selector(f"  {selector!r} ") == selector


def test_every_class_of_selector_is_among_them() -> None:
    known, waiting = set(), [Positions]
    while waiting:
        waiting += (below := waiting.pop().__subclasses__())
        known |= {kind for kind in below if kind.__module__.startswith("imaginelens.hooks")}
    known -= {kind for kind in known if kind.__module__.endswith("pyvene_places")}  # not written
    assert {type(selector) for selector in EVERY} == known
    assert not isinstance(RowPositions((None,)), tuple(known))  # a class of the fast path's own


def test_il_may_be_written() -> None:
    assert parse_selector("il.span[0].latent[1] | il.markers") == il.span[0].latent[1] | il.markers
    assert parse_selector("il.after(il.latent)") == il.after(il.latent)
    assert parse_selector("il.positions((4, 7))") == il.positions([4, 7])


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("latnet[2]", "did you mean 'latent'"),
        ("latent[2", "was never closed"),
        ("", "invalid syntax"),
        ("latent[2][3]", "cannot be indexed again"),
        ("image[0][1, 2][3]", "cannot be indexed again"),
        ("image[1, 2, 3]", "not 3 numbers"),
        ("video[1, 2]", "[frames, rows, columns], not 2 numbers"),
        ("inserted[0:2]", "no whole number"),
        ("latent[1.5]", "'1.5' is no whole number"),
        ("latent[True]", "no whole number"),
        ("latent[-True]", "no whole number"),
        ("latent[::0]", "step 0"),
        ("answer[0]", "cannot be indexed"),
        ("span", "a span is no position"),
        ("span[0]", "a span is no position"),
        ("span[-1].latent", "counted from 0"),
        ("span[0].latent | span[1]", "is a span"),
        ("latent.open", "only a single span"),
        ("text.find(3)", "cannot be called"),
        ("text.find('')", "for something"),
        ("image.find('a')", "only text can be searched"),
        ("text.find('a').find('b')", "only text can be searched"),
        ("imagination.between('a', 'a')", "two different markers"),
        ("latent.between('a', 'b')", "cannot be called"),
        ("positions", "positions([4, 7])"),
        ("positions(4)", "list of numbers"),
        ("positions([-1])", "from 0"),
        ("positions(['a'])", "no whole number"),
        ("after", "after(latent)"),
        ("after(latent, image)", "cannot be called"),
        ("latent & image", "selects nothing"),
        ("latent, image", "selects nothing"),
        ("3", "selects nothing"),
        ("latent\0", "null bytes"),
        ("(" * 300 + "latent" + ")" * 300, "too many nested"),
        ("latent" * 1000, "6000 characters"),
    ],
)
def test_what_is_no_selector_is_refused(text: str, words: str) -> None:
    with pytest.raises(PositionError) as caught:
        parse_selector(text)
    assert words in str(caught.value)
    assert "latent[2]" in str(caught.value)


@pytest.mark.parametrize(
    "text",
    [
        "__import__('os').mkdir('{there}')",
        "latent[__import__('os').mkdir('{there}')]",
        "text.find(open('{there}', 'w').name)",
        "(lambda: open('{there}', 'w'))()",
        "latent.__class__.__init__.__globals__",
        "[x for x in open('{there}', 'w')]",
        "positions([x := 1])",
        "latent if open('{there}', 'w') else image",
    ],
)
def test_text_is_never_run(text: str, tmp_path: os.PathLike[str]) -> None:
    there = os.path.join(tmp_path, "there")
    with pytest.raises(PositionError, match="no selector"):
        parse_selector(text.format(there=there))
    assert not os.path.exists(there)


def test_no_text_is_refused() -> None:
    with pytest.raises(Exception, match=r"no selector|type"):
        parse_selector(3)  # type: ignore[arg-type]


def test_many_alternatives_are_read() -> None:
    text = " | ".join(f"latent[{k}]" for k in range(70))
    assert repr(parse_selector(text)) == text


def test_every_known_name_is_one_of_il() -> None:
    assert all(hasattr(il, name) for name in set(_KNOWN))
