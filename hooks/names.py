"""Hook names in TransformerLens spelling, and the filters that select among them."""

import difflib
import re
from collections.abc import Callable, Iterable, Sequence
from fnmatch import fnmatchcase

from imaginelens.hooks.errors import HookNameError

NamesFilter = str | Sequence[str] | Callable[[str], bool] | None

_IN_ATTENTION = ("q", "k", "v", "z", "rot_q", "rot_k", "pattern")
_IN_MLP = ("pre", "post")
_ALIASES = {
    "attn": "pattern",
    "query": "q",
    "key": "k",
    "value": "v",
    "mlp_pre": "pre",
    "mlp_post": "post",
}
_NUMBERED = re.compile(r"([a-z]+)(\d+)")


def get_act_name(short: str, layer: int | None = None) -> str:
    """Spell out a short activation name, as TransformerLens' function of the same name does.

    >>> get_act_name("resid_post", 3), get_act_name("z1"), get_act_name("attn", 0)
    ('blocks.3.hook_resid_post', 'blocks.1.attn.hook_z', 'blocks.0.attn.hook_pattern')
    >>> get_act_name("latent"), get_act_name("normalized")
    ('hook_latent', 'ln_final.hook_normalized')
    """
    if layer is None and ("." in short or short.startswith("hook_")):
        return short
    numbered = _NUMBERED.fullmatch(short)
    if numbered is not None:
        short, layer = numbered[1], int(numbered[2])
    short = _ALIASES.get(short, short)
    if layer is None:
        return f"ln_final.hook_{short}" if short in ("scale", "normalized") else f"hook_{short}"
    group = "attn." if short in _IN_ATTENTION else "mlp." if short in _IN_MLP else ""
    return f"blocks.{layer}.{group}hook_{short}"


def match(names: Iterable[str], names_filter: NamesFilter) -> list[str]:
    """List the names that a filter selects: a name or glob, a list of them, a predicate, or None.

    A short name ("resid_post") selects that activation in every layer of the text model.

    >>> match(["hook_embed", "blocks.0.hook_resid_post"], "*.hook_resid_post")
    ['blocks.0.hook_resid_post']

    Raises:
        HookNameError: nothing matches; the message lists the nearest names.
    """
    known = list(names)
    if names_filter is None:
        return known
    if callable(names_filter):
        found = [name for name in known if names_filter(name)]
        if not found:
            raise HookNameError(
                f"the names_filter {_label(names_filter)} is true for none of the {len(known)} "
                f"sites; names look like {_examples(known)}"
            )
        return found
    patterns = [names_filter] if isinstance(names_filter, str) else list(names_filter)
    if not patterns:
        raise HookNameError("names_filter is an empty list: name at least one site, or pass None")
    chosen = {name for pattern in patterns for name in _match_one(known, pattern)}
    return [name for name in known if name in chosen]


def _match_one(known: list[str], pattern: str) -> list[str]:
    found = [name for name in known if fnmatchcase(name, pattern)]
    if not found and "." not in pattern:  # a short name, in every layer
        group = "attn." if pattern in _IN_ATTENTION else "mlp." if pattern in _IN_MLP else ""
        spelled = (f"hook_{pattern}", f"blocks.*.{group}hook_{pattern}")
        found = [name for name in known if any(fnmatchcase(name, s) for s in spelled)]
    if not found:
        raise HookNameError(f"no site matches {pattern!r}{_nearest(known, pattern)}")
    return found


def _nearest(known: list[str], pattern: str) -> str:
    near = difflib.get_close_matches(pattern, known, n=3, cutoff=0.5)
    layers = sorted({int(n.split(".")[1]) for n in known if n.startswith("blocks.")})
    span = f"; layers are 0..{layers[-1]}" if layers else ""
    return (
        f"{span}; did you mean {' or '.join(map(repr, near))}?"
        if near
        else f"{span}; names look like {_examples(known)}"
    )


def _examples(known: list[str]) -> str:
    shown = known[:: max(1, len(known) // 4)][:4]
    return ", ".join(map(repr, shown))


def _label(predicate: Callable[[str], bool]) -> str:
    return getattr(predicate, "__name__", repr(predicate))
