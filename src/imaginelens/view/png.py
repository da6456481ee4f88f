"""Images as `data:` addresses, so that the page needs no other file."""

import base64
import io

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from imaginelens.view.markup import Markup

_SIDE, _BYTES = 448, 60_000


def image_address(image: Image.Image, *, side: int = _SIDE, most: int = _BYTES) -> Markup:
    """The image as PNG, or as JPEG where that has over `most` bytes; at most `side` pixels, on
    white."""
    image = _flatten(image)
    image.thumbnail((side, side))
    png = _encode(image, "PNG", optimize=True)
    return png if len(png) <= most else _encode(image, "JPEG", quality=85)


def strip_address(pixels: UInt8[np.ndarray, "height width 3"]) -> Markup:
    """Pixels as PNG, exactly."""
    return _encode(Image.fromarray(pixels), "PNG", optimize=True)


def _flatten(image: Image.Image) -> Image.Image:
    """A copy in plain RGB, so that no profile, alpha or metadata travels along."""
    colours = image.convert("RGBA")
    paper = Image.new("RGBA", colours.size, "white")
    return Image.alpha_composite(paper, colours).convert("RGB")


def _encode(image: Image.Image, kind: str, **options: int | bool) -> Markup:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    data = base64.b64encode(buffer.getvalue()).decode("ascii")
    return Markup(f"data:image/{kind.lower()};base64,{data}")
