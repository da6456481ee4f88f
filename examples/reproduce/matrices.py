"""Square matrices of cosines beside each other: small files, though a matrix has 10,000 cells."""

import base64
import html
import io
from collections.abc import Mapping, Sequence
from itertools import groupby

import numpy as np
from PIL import Image, ImageDraw

from examples.reproduce.exhibit import Drawing
from imaginelens.view.colour import ColourScale
from imaginelens.view.markup import inert

_SIDE, _GAP, _LEFT, _TOP, _ROW = 190, 16, 110, 56, 5
_SCALE = ColourScale(limit=1.0)


def drawing(
    panels: Mapping[str, np.ndarray], groups: Sequence[str], *, name: str, title: str
) -> Drawing:
    """The matrices as one drawing; red is -1, white 0, blue 1.

    Args:
        panels: by title, all of the same inputs in the same order.
        groups: what each input is a case of, with equal ones side by side.
    """
    pictures = {panel: _pixels(matrix) for panel, matrix in panels.items()}
    means = "; ".join(f"{panel} {_mean(matrix):.2f}" for panel, matrix in panels.items())
    alt = f"{title}. Mean of different inputs: {means}."
    return Drawing(name, title, alt, _svg(pictures, groups, title), _png(pictures, groups, title))


def _pixels(matrix: np.ndarray) -> Image.Image:
    colours = np.where(np.isnan(matrix)[..., None], 196.0, _SCALE.rgb(np.nan_to_num(matrix)))
    return Image.fromarray(colours.round().astype(np.uint8))


def _mean(matrix: np.ndarray) -> float:
    return float(np.nanmean(matrix[~np.eye(len(matrix), dtype=bool)]))


def _places(count: int) -> tuple[list[tuple[int, int]], int, int]:
    """Where each panel lies, and the size of the whole."""
    at = [
        (_LEFT + (k % _ROW) * (_SIDE + _GAP), _TOP + (k // _ROW) * (_SIDE + 2 * _GAP + 10))
        for k in range(count)
    ]
    width = max(x for x, _ in at) + _SIDE + 80
    return at, max(width, 560), max(y for _, y in at) + _SIDE + 20


def _named(groups: Sequence[str]) -> list[tuple[str, float]]:
    """Each group with the middle of its place on the side of a panel."""
    found, start = list[tuple[str, float]](), 0
    for group, members in groupby(groups):
        stop = start + len(list(members))
        found.append((group, (start + stop) / 2 / len(groups) * _SIDE))
        start = stop
    return found


def _svg(pictures: Mapping[str, Image.Image], groups: Sequence[str], title: str) -> str:
    at, width, height = _places(len(pictures))
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" '
        f'width="{width}" height="{height}" font-family="sans-serif" font-size="12">',
        '<rect width="100%" height="100%" fill="#fff"/>',
        _text(_LEFT, 22, title, size=15),
    ]
    for (x, y), (panel, picture) in zip(at, pictures.items(), strict=True):
        parts += [
            _text(x, y - 6, panel),
            f'<image x="{x}" y="{y}" width="{_SIDE}" height="{_SIDE}" '
            f'style="image-rendering:pixelated" href="{_address(picture)}"/>',
        ]
        if x == _LEFT:
            parts += [
                _text(x - 8, y + middle + 4, name, anchor="end") for name, middle in _named(groups)
            ]
    x, y = at[min(len(at), _ROW) - 1][0] + _SIDE + 20, _TOP
    bar = _pixels(np.linspace(1, -1, 100)[:, None])
    parts.append(
        f'<image x="{x}" y="{y}" width="12" height="{_SIDE}" preserveAspectRatio="none" '
        f'href="{_address(bar)}"/>'
    )
    ends = (("1", 10), ("0", _SIDE / 2 + 4), ("-1", _SIDE))
    parts += [_text(x + 18, y + place, said) for said, place in ends]
    return "".join([*parts, "</svg>"])


def _text(x: float, y: float, said: str, *, size: int = 12, anchor: str = "start") -> str:
    return (
        f'<text x="{x:g}" y="{y:g}" font-size="{size}" text-anchor="{anchor}" fill="#1a1a1a">'
        f"{html.escape(inert(said, 60))}</text>"
    )


def _address(picture: Image.Image) -> str:
    return "data:image/png;base64," + base64.b64encode(_encoded(picture)).decode("ascii")


def _encoded(picture: Image.Image) -> bytes:
    out = io.BytesIO()
    picture.save(out, "PNG", optimize=True)
    return out.getvalue()


def _png(pictures: Mapping[str, Image.Image], groups: Sequence[str], title: str) -> bytes:
    at, width, height = _places(len(pictures))
    page = Image.new("RGB", (width, height), "white")
    pen = ImageDraw.Draw(page)
    pen.text((_LEFT, 12), inert(title, 60), fill="black")
    for (x, y), (panel, picture) in zip(at, pictures.items(), strict=True):
        page.paste(picture.resize((_SIDE, _SIDE), Image.Resampling.NEAREST), (x, y))
        pen.text((x, y - 16), inert(panel, 60), fill="black")
        if x == _LEFT:
            for name, middle in _named(groups):
                pen.text((4, y + middle - 6), inert(name, 16), fill="black")
    return _encoded(page)
