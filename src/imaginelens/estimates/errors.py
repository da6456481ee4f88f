"""What can go wrong with an estimate, as one sentence: what came, what was expected, what to do."""


class EstimateError(ValueError):
    """Data, a margin or a level that an estimate cannot be made from."""
