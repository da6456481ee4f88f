"""Imports openai's client where nnsight is loaded already, and checks the address it is given.

nnsight 0.8 mounts `.save` on every object. anyio, which openai's client needs, looks at all
attributes of its own classes when it is first imported, and takes that one for a mistake of theirs.
So it is imported while `.save` is not there.
"""

import importlib
import sys
from urllib.parse import urlsplit

from imaginelens.hooks.errors import InputError

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


def plain_address(url: str) -> str:
    """The address of an endpoint, if it holds no password, which errors and logs would repeat.

    Raises:
        InputError: it holds one, or is no http address.

    >>> plain_address("http://localhost:8000/v1")
    'http://localhost:8000/v1'
    """
    try:
        parts = urlsplit(url)
        named = parts.scheme in ("http", "https") and parts.hostname is not None
    except ValueError:
        named = False
    if "@" in url or "?" in url:
        raise InputError(
            "the endpoint's address holds a '@' or a '?', and with it perhaps a key, which logs "
            "would repeat; put keys into the environment variable OPENAI_API_KEY, and give an "
            "address such as http://localhost:8000/v1"
        )
    if not named:
        raise InputError(f"{url!r} is no http address; give one such as http://localhost:8000/v1")
    return url
