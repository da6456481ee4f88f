"""How numbers are written: an exact zero as `0`, a real minus sign, never `-0.00`.

The page shows few digits and keeps the whole number in a `data-` attribute next to them.
"""

from typing import Literal

Unit = Literal["", "%", "points"]
MINUS = "\N{MINUS SIGN}"


def fixed(value: float, digits: int = 2) -> str:
    """A number with fixed decimals. Exactly zero is `0`, so it differs from "small".

    >>> fixed(0.0), fixed(-0.001), fixed(1.25)
    ('0', '0.00', '1.25')
    """
    if value == 0:
        return "0"
    text = f"{value:.{digits}f}"
    if float(text) == 0:
        text = text.lstrip("-")
    return text.replace("-", MINUS)


def signed(value: float, digits: int = 2) -> str:
    """As `fixed`, with a plus sign on positive numbers: for differences.

    >>> signed(0.25), signed(0.001), signed(0.0)
    ('+0.25', '0.00', '0')
    """
    text = fixed(value, digits)
    return f"+{text}" if value > 0 and float(text) > 0 else text


def precise(value: float) -> str:
    """Four significant digits: for hover texts.

    >>> precise(0.98337)
    '0.9834'
    """
    return f"{value:.4g}".replace("-", MINUS)


def quantity(value: float, unit: Unit) -> str:
    """A number in its unit: a share as "%" or "points" out of 100, "" as it is.

    In those, only what is exactly 0 or 100 is written as `0` or `100`.

    >>> quantity(0.976, "%"), quantity(0.998, "%"), quantity(1.0, "%"), quantity(-0.0004, "%")
    ('98%', '99.8%', '100%', '0.0%')
    >>> quantity(0.88, "points"), quantity(0.0, "points"), quantity(0.976, "")
    ('88 points', '0 points', '0.98')
    """
    return _number(value, unit) + {"": "", "%": "%", "points": " points"}[unit]


def between(interval: tuple[float, float], unit: Unit = "") -> str:
    """An interval in brackets, its ends in a unit.

    >>> between((0.1, 0.25)), between((0.898, 1.0), "%")
    ('[0.10, 0.25]', '[90%, 100%]')
    """
    low, high = (_number(end, unit) + ("%" if unit == "%" else "") for end in interval)
    return f"[{low}, {high}]"


def sample_size(n: int) -> str:
    """`n = 64` in one piece: no line ends inside it.

    >>> sample_size(64).split()
    ['n', '=', '64']
    """
    return f"n = {n}".replace(" ", "\N{NO-BREAK SPACE}")


def _number(value: float, unit: Unit) -> str:
    if not unit:
        return fixed(value)
    hundredths = round(100 * value, 9)  # 99.99999999999999 comes from rounding, not from the data
    whole = round(hundredths)
    return fixed(hundredths, 1 if whole in (0, 100) and hundredths != whole else 0)
