"""Docstrings as the documentation shows them: examples as code. mkdocs.yml names this file."""

import re
from typing import Any

import griffe

_EXAMPLE = re.compile(r"^>>> .*(?:\n.+)*", re.MULTILINE)  # to the next empty line
_NAMES = re.compile(r"^ +\w+(?:, \w+)+(?=: )", re.MULTILINE)  # that are described together


class Examples(griffe.Extension):
    """Fences examples, which Markdown would take for quotations and links; keeps names together,
    of which griffe would take the second for a type."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        """Change the docstring of an object that was found."""
        if obj.docstring is not None:
            value = _NAMES.sub(lambda found: kept(found[0]), obj.docstring.value)
            obj.docstring.value = fenced(value)


def kept(names: str) -> str:
    """Names with spaces between them that part nothing.

    >>> kept("    at, site")
    '    at,\\xa0site'
    """
    return names.replace(", ", ",\xa0")


def fenced(docstring: str) -> str:
    r"""A docstring with its examples as blocks of code.

    >>> fenced("Add.\n\n>>> 1 + 1\n2")
    'Add.\n\n```pycon\n>>> 1 + 1\n2\n```'
    """
    return _EXAMPLE.sub(lambda found: f"```pycon\n{found[0]}\n```", docstring)
