"""Latent vectors as thin signed colour strips, each with its norm."""

import numpy as np
from jaxtyping import Float, UInt8

from imaginelens.view.colour import UNMEASURED, ColourScale
from imaginelens.view.markup import Markup, element, join
from imaginelens.view.numerals import fixed
from imaginelens.view.png import strip_address

_WIDEST = 256


def latent_strips(latents: Float[np.ndarray, "step d_model"], limit: float) -> Markup:
    """One line per step: its name, its values from left to right, and the Euclidean norm."""
    lines = [_line(step, z, limit) for step, z in enumerate(latents)]
    return element("ol", *lines, class_="latents", aria_label="latent vectors")


def _line(step: int, z: Float[np.ndarray, " d_model"], limit: float) -> Markup:
    norm = float(np.linalg.norm(z.astype(float)))
    strip = element("img", src=strip_address(strip_pixels(z, limit)), alt=_alt(z), class_="strip")
    size = element("span", f"‖z‖ {fixed(norm)}", class_="norm", data_value=norm)
    return element("li", element("span", f"z{step}", class_="z"), strip, size)


def _alt(z: Float[np.ndarray, " d_model"]) -> str:
    known = z[np.isfinite(z)]
    spread = (
        f"from {fixed(float(known.min()))} to {fixed(float(known.max()))}"
        if known.size
        else "none finite"
    )
    return f"{z.size} values, {spread}"


def strip_pixels(z: Float[np.ndarray, " d_model"], limit: float) -> UInt8[np.ndarray, "1 width 3"]:
    """One pixel per dimension; a wide vector shows the strongest value of each bin."""
    colours = ColourScale(limit).rgb(_strongest(z.astype(float)))
    grey = [int(UNMEASURED[i : i + 2], 16) for i in (1, 3, 5)]
    colours = np.where(np.isnan(colours), grey, colours)
    return colours.round().astype(np.uint8)[None]


def _strongest(z: Float[np.ndarray, " d_model"]) -> Float[np.ndarray, " width"]:
    if z.size <= _WIDEST:
        return z
    bins = np.array_split(z, _WIDEST)
    return np.array([part[np.argmax(np.abs(part))] for part in bins])


def strips_note(latents: Float[np.ndarray, "step d_model"], limit: float) -> Markup:
    """How to read the strips."""
    width = latents.shape[1]
    binned = f", strongest of each of {_WIDEST} bins" if width > _WIDEST else ""
    text = f"{width} dimensions{binned}; red below zero, blue above, colours end at ±{fixed(limit)}"
    return join([text, " in all studies."])
