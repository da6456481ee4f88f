"""Figures as users get them: plotly's, with a picture for pages that run no scripts."""

import base64
import io
from pathlib import Path
from typing import Any

import plotly.graph_objects as go
from PIL import Image

from imaginelens.hooks.errors import InputError
from imaginelens.view import static


class Figure(go.Figure):
    """A plotly figure that also leaves a PNG in notebooks, and saves without a browser.

    >>> Figure(go.Scatter(x=[0, 1], y=[0, 1])).png()[:4]
    b'\\x89PNG'
    """

    @property
    def alt(self) -> str:
        """What the figure shows, in words, for those who cannot see it."""
        return str((self.layout.meta or {}).get("alt", ""))

    def png(self, *, scale: float = 2.0) -> bytes:
        """The figure as PNG, `scale` pixels for each of its own; drawn by matplotlib."""
        return static.draw(self, "png", scale)

    def svg(self) -> str:
        """The figure as SVG; drawn by matplotlib."""
        return static.draw(self, "svg", 1.0).decode()

    def save(self, path: str | Path, *, cdn: bool = False) -> Path:
        """Write the figure as .png, .svg, .pdf, .html or .json, by the ending of `path`.

        Args:
            cdn: the page loads plotly's script from the network, and is 4.8 MB smaller.

        Raises:
            InputError: there is no such format.
        """
        path = Path(path)
        kind = path.suffix.lower().lstrip(".")
        if kind in ("png", "svg", "pdf"):
            path.write_bytes(static.draw(self, kind, 2.0))
        elif kind == "html":
            path.write_text(self.page(cdn=cdn), encoding="utf-8")
        elif kind == "json":
            path.write_text(self.to_json(), encoding="utf-8")
        else:
            raise InputError(
                f"{path.name!r} ends in .{kind or '?'}; name a file that ends in .png, .svg, .pdf, "
                ".html or .json"
            )
        return path

    def page(self, *, cdn: bool = False) -> str:
        """The figure as a page of its own; with `cdn` its script comes from the network."""
        return str(self.to_html(include_plotlyjs="cdn" if cdn else True, full_html=True))

    # plotly's own would show it without a picture, or load a script from the network
    _ipython_display_ = _repr_html_ = None

    def _repr_mimebundle_(self, include: Any = None, exclude: Any = None, **kwargs: Any) -> Any:
        bundle = {
            "application/vnd.plotly.v1+json": self.to_plotly_json(),
            "text/plain": self.alt or "Figure",
        }
        try:
            picture = smaller(self.png(scale=1.5))
            bundle["image/png"] = base64.b64encode(picture).decode("ascii")
        except ImportError:  # matplotlib comes with imaginelens[notebook]
            pass
        return bundle


def smaller(png: bytes) -> bytes:
    """The same picture in 256 colours, which is a quarter of the bytes."""
    out = io.BytesIO()
    whole = Image.open(io.BytesIO(png)).convert("RGB")
    whole.quantize(256, dither=Image.Dither.NONE).save(out, "PNG", optimize=True)
    return out.getvalue()
