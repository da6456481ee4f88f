"""What can go wrong, each as one sentence: what came, what was expected, what to do next."""


class ImagineLensError(Exception):
    """The parent of every error this library raises on purpose."""


class HookNameError(ImagineLensError, KeyError):
    """A hook name or filter that matches no site of this model."""

    def __str__(self) -> str:  # KeyError would show the repr of the sentence
        return str(self.args[0])


class SiteUnavailable(ImagineLensError, NotImplementedError):
    """A site that this model class, or its attention implementation, cannot offer."""


class InputError(ImagineLensError, ValueError):
    """An input that the model or its processor cannot take as it is."""


class PositionError(ImagineLensError, LookupError):
    """A position selector that finds nothing, or is not known yet, in this run."""


class DonorError(ImagineLensError, ValueError):
    """A donor or reference whose rows, steps, width or sites do not fit the run it goes into."""


class EditTouchedNothing(ImagineLensError, RuntimeError):
    """An edit that reached no cell, or left every touched cell as it was: not a result."""


class CheckpointError(ImagineLensError, OSError):
    """A folder or id that is not a checkpoint this library can open."""


def quoted(value: object, longest: int = 200) -> str:
    r"""A value that came from a file, as a sentence may show it.

    >>> quoted(["a", 500 * "x"], longest=12), quoted("\x1b")
    ("['a', 'xxxxx ...", "'\\x1b'")
    """
    try:
        return brief(repr(value), longest)
    except RecursionError:
        return f"a {type(value).__name__} of too many levels"


def brief(words: object, longest: int = 200) -> str:
    r"""Words that came from a file, as a sentence may show them: printable, and not too many.

    >>> brief("no key '\x1b[31m" + 500 * "x", longest=20)
    "no key '\\x1b[31mxxxxxxx ..."
    """
    said = str(words)
    shown = said if len(said) <= longest else said[:longest] + " ..."
    if shown.isprintable():
        return shown
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in shown)
