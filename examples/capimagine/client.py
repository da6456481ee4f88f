"""Imports openai's client where nnsight is loaded already.

nnsight 0.8 mounts `.save` on every object. anyio, which openai's client needs, looks at all
attributes of its own classes when it is first imported, and takes that one for a mistake of theirs.
So it is imported while `.save` is not there.
"""

import importlib
import sys

ANYIO = "anyio._backends._asyncio"


def load_client() -> None:
    """Import what openai's client imports, however late.

    Raises:
        ImportError: openai is not installed; it comes with `imaginelens[train]`.
    """
    if ANYIO in sys.modules or not hasattr(object, "save"):
        importlib.import_module("openai")
        return
    nnsight = importlib.import_module("nnsight")
    mounts = importlib.import_module("nnsight._c")
    mounts.unmount("save")
    try:
        importlib.import_module("openai")
        importlib.import_module(ANYIO)
    finally:
        mounts.mount(nnsight.save, "save")
