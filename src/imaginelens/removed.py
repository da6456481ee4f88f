"""Public names that went away, and what to use instead.

`docs/stability.md` has the rules and shows the same table. A name is deprecated for one minor
version, then removed; its line stays here for good.
"""

import warnings

# What `il.NAME` was -> the public name that is to be used, which `il.NAME` still gives, warning.
DEPRECATED: dict[str, str] = {}
# What `il.NAME` was -> one sentence: since when it is gone, and what to use.
REMOVED: dict[str, str] = {}


def instead_of(name: str) -> str:
    """The name to use for one that `imaginelens` no longer lists.

    A deprecated one is a FutureWarning; any other an AttributeError, which says what to do.

    >>> instead_of("no_such_name")
    Traceback (most recent call last):
    AttributeError: imaginelens has no 'no_such_name'; see dir(imaginelens)
    """
    if name in REMOVED:
        raise AttributeError(f"imaginelens has no {name!r} any more: {REMOVED[name]}")
    if name not in DEPRECATED:
        raise AttributeError(f"imaginelens has no {name!r}; see dir(imaginelens)")
    instead = DEPRECATED[name]
    warnings.warn(
        f"il.{name} is deprecated and goes away in the next minor version; use il.{instead}",
        FutureWarning,
        stacklevel=3,
    )
    return instead
