"""What can go wrong in a study, as one sentence: what came, what was expected, what to do next."""

from imaginelens.hooks.errors import ImagineLensError


class ControlError(ImagineLensError, RuntimeError):
    """A control that must change nothing has changed something: no number of the study holds."""
