"""What can go wrong with an estimate, as one sentence: what came, what was expected, what to do."""

from collections.abc import Callable


class EstimateError(ValueError):
    """Data, a margin or a level that an estimate cannot be made from."""


def spoken(estimate: Callable[[], object]) -> str:
    """An estimate in words, or why there is none; what a user looks at must not raise."""
    try:
        return str(estimate())
    except EstimateError as error:
        return f"no interval ({error})"
