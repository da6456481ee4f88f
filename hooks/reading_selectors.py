"""Selectors written as text, as in a config file: `latent[1:4]`, `text.find('red cube')`.

The text is parsed, never run: what is no selector is refused.
"""

import ast
import difflib
import warnings
from typing import Any, NoReturn

from imaginelens.hooks.errors import ImagineLensError, PositionError
from imaginelens.hooks.positions import (
    FixedPositions,
    ImagePositions,
    InsertedPositions,
    LatentPositions,
    Positions,
    Span,
    Spans,
    TextPositions,
    VideoPositions,
    after,
    answer,
    audio,
    before_answer,
    deciding,
    format,
    generated,
    image,
    inserted,
    last_prompt,
    latent,
    markers,
    onward,
    span,
    text,
    video,
)
from imaginelens.hooks.textspans import ImaginationPositions, imagination

Read = Positions | Spans | Span
_LONGEST = 1000  # characters; nobody writes more, and a parser can be made to run out of stack
_NAMES: dict[str, Read] = {
    "latent": latent,
    "span": span,
    "markers": markers,
    "image": image,
    "video": video,
    "audio": audio,
    "text": text,
    "imagination": imagination,
    "inserted": inserted,
    "last_prompt": last_prompt,
    "before_answer": before_answer,
    "answer": answer,
    "deciding": deciding,
    "format": format,
    "generated": generated,
}
_LATER = {"after": after, "onward": onward}
_KNOWN = (*_NAMES, *_LATER, "positions")


def parse_selector(written: str) -> Positions:
    """Read a selector as it is written in Python, or as its `repr` shows it; `il.` may be left out.

    Raises:
        PositionError: the text is no selector.

    >>> parse_selector("span[0].latent[1:4] | markers")
    span[0].latent[1:4] | markers
    >>> parse_selector("image[0][3:6, 2:9]")
    image[0][3:6, 2:9]
    """
    if not isinstance(written, str):
        raise PositionError(f"{written!r} is no selector; write one as text, such as 'latent[2]'")
    try:
        if len(written) > _LONGEST:
            _refuse(f"it has {len(written)} characters, and {_LONGEST} are the most")
        found = _read(_parsed(written))
        if not isinstance(found, Positions):
            _refuse("a span is no position; write span[0].latent, span[0].open or span[0].close")
    except _NotOne as error:
        shown = written if len(written) <= 60 else f"{written[:60]}..."
        raise PositionError(
            f"{shown!r} is no selector: {error}; write one such as 'latent[2]', 'image[0]' or "
            "'before_answer'"
        ) from None
    return found


class _NotOne(Exception):
    """Why a text is no selector."""


def _refuse(why: str) -> NoReturn:
    raise _NotOne(why)


def _parsed(written: str) -> ast.expr:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of odd escapes in a needle, which stay as written
            return ast.parse(written.strip(), mode="eval").body
    except SyntaxError as error:
        _refuse(f"{error.msg}, at character {error.offset or 1}")
    except (ValueError, MemoryError, RecursionError):
        _refuse("it cannot be read")


def _read(node: ast.expr) -> Read:
    match node:
        case ast.Name(id=name) | ast.Attribute(value=ast.Name(id="il"), attr=name):
            return _named(name)
        case ast.Attribute(value=inner, attr="latent" | "open" | "close" as part):
            owner = _read(inner)
            if not isinstance(owner, Span):
                _refuse(f"only a single span has .{part}, as in span[0].{part}")
            return getattr(owner, part)
        case ast.Subscript(value=inner, slice=index):
            return _indexed(_read(inner), index)
        case ast.Call(func=function, args=arguments, keywords=[]):
            return _called(function, arguments)
        case ast.BinOp(left=one, op=ast.BitOr(), right=other):
            return _selector(one) | _selector(other)
    _refuse(f"{ast.unparse(node)[:60]!r} selects nothing")


def _named(name: str) -> Read:
    if name in _NAMES:
        return _NAMES[name]
    if name in ("positions", *_LATER):
        given = "[4, 7]" if name == "positions" else "latent"
        _refuse(f"{name} needs to be told what, as in {name}({given})")
    near = difflib.get_close_matches(name, _KNOWN, n=1)
    _refuse(f"there is no {name!r}" + (f", did you mean {near[0]!r}?" if near else ""))


def _selector(node: ast.expr) -> Positions:
    found = _read(node)
    if not isinstance(found, Positions):
        _refuse(f"{ast.unparse(node)!r} is a span, not its positions, as span[0].latent")
    return found


def _called(function: ast.expr, arguments: list[ast.expr]) -> Positions:
    match function, arguments:
        case ((ast.Name(id=name) | ast.Attribute(value=ast.Name(id="il"), attr=name)), [of]):
            if name == "positions":
                return _by_number(of)
            if name in _LATER:
                return _LATER[name](_selector(of))
        case ast.Attribute(value=inner, attr="find"), [ast.Constant(value=str(needle))]:
            owner = _read(inner)
            if owner == text and needle:
                return TextPositions(needle)
            _refuse("only text can be searched, and for something, as in text.find('red cube')")
        case (
            ast.Attribute(value=inner, attr="between"),
            [ast.Constant(value=str(start)), ast.Constant(value=str(stop))],
        ):
            owner = _read(inner)
            if isinstance(owner, ImaginationPositions):
                try:
                    return owner.between(start, stop)
                except ImagineLensError as error:
                    _refuse(str(error))
    _refuse(f"{ast.unparse(function)[:60]!r} cannot be called like that")


def _by_number(node: ast.expr) -> FixedPositions:
    if not isinstance(node, ast.List | ast.Tuple):
        _refuse("positions takes a list of numbers, as in positions([4, 7])")
    numbers = [_number(each) for each in node.elts]
    if any(number < 0 for number in numbers):
        _refuse("positions takes numbers from 0, the first token of a row")
    return FixedPositions(tuple(numbers))


def _indexed(owner: Read, node: ast.expr) -> Read:
    if isinstance(owner, Spans):
        number = _number(node)
        if number < 0:
            _refuse("spans are counted from 0")
        return owner[number]
    if isinstance(owner, InsertedPositions) and owner.step is None:
        return owner[_number(node)]
    if isinstance(owner, ImagePositions | VideoPositions) and owner.cells is None:
        if not isinstance(node, ast.Tuple):
            return owner[_index(node)]
        axes = "[rows, columns]" if isinstance(owner, ImagePositions) else "[frames, rows, columns]"
        if len(node.elts) != axes.count(",") + 1:
            _refuse(f"its cells are {axes}, not {len(node.elts)} numbers")
        return owner[tuple(_index(each) for each in node.elts)]
    if isinstance(owner, LatentPositions | ImaginationPositions) and owner.index is None:
        return owner[_index(node)]
    _refuse(f"{owner!r} cannot be indexed" + (" again" if "[" in repr(owner) else ""))


def _index(node: ast.expr) -> Any:
    """A number, or a slice."""
    if not isinstance(node, ast.Slice):
        return _number(node)
    ends = (node.lower, node.upper, node.step)
    found = slice(*(None if end is None else _number(end) for end in ends))
    if found.step == 0:
        _refuse("a slice cannot have step 0")
    return found


def _number(node: ast.expr) -> int:
    match node:
        case ast.Constant(value=int(number)) if type(number) is int:
            return number
        case ast.UnaryOp(op=ast.USub(), operand=ast.Constant(value=int(number))) if (
            type(number) is int
        ):
            return -number
    _refuse(f"{ast.unparse(node)[:60]!r} is no whole number")
