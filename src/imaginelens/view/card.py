"""The parts that cards in notebooks are made of.

A card takes the notebook's own colours and font, so that it is read on light and dark alike.
"""

from collections.abc import Iterable, Sequence

from imaginelens.view.markup import Markup, element

NAMES = 8  # of a list; more are counted
_LETTERS = 400
_LINE = "1px solid rgba(128,128,128,.4)"
_CELL = f"text-align:left;vertical-align:top;padding:2px 14px 2px 0;border-bottom:{_LINE}"


def card(head: str, *parts: Markup | None) -> Markup:
    """A card under its heading."""
    title = element("div", element("b", head), style="margin-bottom:4px")
    return element("div", title, *parts, style="max-width:75em;overflow-x:auto;line-height:1.5")


def table(columns: Sequence[str], rows: Iterable[Sequence[str]], label: str) -> Markup:
    """A table; the first of each row names it, and `label` is what it is called when read aloud."""
    head = [element("th", name, scope="col", style=_CELL) for name in columns]
    body = [
        element(
            "tr", element("th", short(first), scope="row", style=_CELL),
            *(element("td", element("bdi", short(each)), style=_CELL) for each in others),
        )
        for first, *others in rows
    ]  # fmt: skip
    return element(
        "table", element("thead", element("tr", *head)) if head else None,
        element("tbody", *body), style="border-collapse:collapse;margin:4px 0", aria_label=label,
    )  # fmt: skip


def lines(texts: Sequence[str]) -> list[Markup]:
    """Notes, one below the other."""
    more = len(texts) - NAMES
    shown = [*texts[:NAMES], f"... and {many(more, 'note')} more"] if more > 0 else texts
    return [line(short(words)) for words in shown]


def line(words: str) -> Markup:
    """A line of small print."""
    return element("div", words, style="opacity:.8")


def text(told: str) -> Markup:
    """What the terminal shows."""
    return element("pre", told, style="line-height:1.35;margin:4px 0")


def rest(more: int, what: str, where: str) -> Markup | None:
    """How many are not shown, and where they are."""
    return line(f"{more} more {what}: {where}") if more > 0 else None


def short(words: str) -> str:
    """Words with their end cut off, if they are many."""
    if len(words) <= _LETTERS:
        return words
    return f"{words[:_LETTERS]}… (+{len(words) - _LETTERS})"


def cut(names: Iterable[object], most: int = NAMES) -> str:
    """The first of many names, and how many more there are."""
    listed = [str(name) for name in names]
    more = len(listed) - most
    return ", ".join(listed[:most]) + (f" and {more} more" if more > 0 else "")


def many(count: int, what: str) -> str:
    """A number of things.

    >>> many(1, "row"), many(2, "row")
    ('1 row', '2 rows')
    """
    return f"{count} {what}{'s' * (count != 1)}"
