"""HTML that is safe by construction: everything is escaped unless it was built here.

A model can write anything: `<script>`, quotes, null bytes, marks that reverse the reading order. So
text reaches the page only through `element`, which makes it inert. A `Markup` passes unchanged.

>>> element("td", "<b>", class_="answer", data_value=0.5)
'<td class="answer" data-value="0.5">&lt;b&gt;</td>'
"""

import html
import unicodedata
from collections.abc import Iterable

_VOID = frozenset({"meta", "img", "br"})
_KEPT = frozenset("\n\t\u200c\u200d")  # line breaks, and the joiners that scripts and emoji need
_REPLACED = frozenset({"Cc", "Cf", "Cs", "Zl", "Zp"})


class Markup(str):
    """Text that is already HTML."""

    __slots__ = ()


def inert(text: str, limit: int = 2000) -> str:
    """The text with invisible and reordering characters written out, cut at `limit` characters.

    >>> inert("a\\x00b\\u202ec")
    'a[U+0000]b[U+202E]c'
    """
    if len(text) > limit:
        text = f"{text[:limit]}… (+{len(text) - limit} characters)"
    return "".join(_visible(character) for character in text)


def element(
    name: str, /, *children: str | None, **attributes: str | int | float | bool | None
) -> Markup:
    """One element. `class_` is `class`, `data_value` is `data-value`; None leaves it out."""
    opening = name + "".join(_attribute(key, value) for key, value in attributes.items())
    if name in _VOID:
        return Markup(f"<{opening}>")
    return Markup(f"<{opening}>{join(children)}</{name}>")


def join(parts: Iterable[str | None]) -> Markup:
    """The parts one after the other; plain text among them is made inert."""
    return Markup("".join(_child(part) for part in parts if part is not None))


def _visible(character: str) -> str:
    if character in _KEPT or unicodedata.category(character) not in _REPLACED:
        return character
    return f"[U+{ord(character):04X}]"


def _child(part: str) -> str:
    return part if isinstance(part, Markup) else html.escape(inert(part))


def _attribute(key: str, value: str | int | float | bool | None) -> str:
    if value is None or value is False:
        return ""
    name = key.rstrip("_").replace("_", "-")
    if value is True:
        return f" {name}"
    return f' {name}="{html.escape(_written(value))}"'


def _written(value: str | int | float) -> str:
    if isinstance(value, str):
        return value if isinstance(value, Markup) else inert(value)
    return repr(float(value)) if isinstance(value, float) else str(value)  # never `np.float64(…)`
