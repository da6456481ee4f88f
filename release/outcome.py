"""How a step ends when it does not end well."""


class Failed(Exception):
    """The release must wait; the sentence says for what."""


class NotChecked(Exception):
    """What the step needs is not at hand; the sentence says how to get it."""
