"""One diverging colour scale: red below zero, white at zero, blue above, grey: not measured.

ColorBrewer's RdBu, which readers with the common forms of colour blindness can tell apart, in
plotly's orientation (low is red).
"""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

UNMEASURED = "#c4c4c4"
DARK, LIGHT = "#000000", "#ffffff"  # less than black would fall below 4.5:1 in mid-blue
_STOPS = np.array(
    [
        (103, 0, 31), (178, 24, 43), (214, 96, 77), (244, 165, 130), (253, 219, 199),
        (247, 247, 247),
        (209, 229, 240), (146, 197, 222), (67, 147, 195), (33, 102, 172), (5, 48, 97),
    ],
    dtype=float,
)  # fmt: skip


@dataclass(frozen=True)
class ColourScale:
    """Signed numbers to colours, symmetric about zero; beyond `limit` the end colour stays.

    >>> ColourScale(limit=2.0).colour(0.0), ColourScale(limit=2.0).colour(2.0)
    ('#f7f7f7', '#053061')
    """

    limit: float

    def __post_init__(self) -> None:
        if not (np.isfinite(self.limit) and self.limit > 0):
            raise ValueError(f"a colour scale needs a finite limit above 0, got {self.limit}.")

    def rgb(self, values: Float[np.ndarray, "..."]) -> Float[np.ndarray, "... 3"]:
        """Channels in 0..255; NaN gives NaN."""
        place = (np.clip(values / self.limit, -1, 1) + 1) / 2
        grid = np.linspace(0, 1, len(_STOPS))
        return np.stack([np.interp(place, grid, channel) for channel in _STOPS.T], axis=-1)

    def colour(self, value: float | None) -> str:
        """The colour as `#rrggbb`; None and NaN are grey."""
        if value is None or np.isnan(value):
            return UNMEASURED
        return "#" + "".join(
            f"{round(channel):02x}" for channel in self.rgb(np.array(float(value)))
        )

    def ink(self, value: float | None) -> str:
        """The text colour that reads best on `colour(value)`."""
        return ink_on(self.colour(value))


def ink_on(colour: str) -> str:
    """Black or white, whichever has the higher contrast (WCAG 2 luminance) on `#rrggbb`."""
    luminance = _luminance(colour)
    on_dark = (luminance + 0.05) / (_luminance(DARK) + 0.05)
    on_light = 1.05 / (luminance + 0.05)
    return DARK if on_dark >= on_light else LIGHT


def _luminance(colour: str) -> float:
    channels = np.array([int(colour[i : i + 2], 16) for i in (1, 3, 5)]) / 255
    linear = np.where(channels <= 0.04045, channels / 12.92, ((channels + 0.055) / 1.055) ** 2.4)
    return float(linear @ (0.2126, 0.7152, 0.0722))
