"""How numbers are written: an exact zero as `0`, a real minus sign, never `-0.00`.

The page shows few digits and keeps the whole number in a `data-` attribute next to them.
"""

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


def between(interval: tuple[float, float]) -> str:
    """An interval in brackets.

    >>> between((0.1, 0.25))
    '[0.10, 0.25]'
    """
    low, high = interval
    return f"[{fixed(low)}, {fixed(high)}]"
