"""Sparse dictionaries: edit states in the features of a sparse autoencoder, and read them there.

A dictionary is any object with `encode` (states to features) and `decode` (features to states): an
SAE of SAELens or of dictionary_learning, or a module of your own. What it cannot express, the error
term, stays in the state: new = decode(new features) + (old - decode(encode(old))).
"""

import numbers
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Protocol, cast, runtime_checkable

import numpy as np
import torch

from imaginelens.hooks.cache import ActivationCache
from imaginelens.hooks.edits import Act, Edit, EditContext, Swap
from imaginelens.hooks.errors import DonorError, InputError
from imaginelens.hooks.positions import Positions
from imaginelens.hooks.states import Donor, States, states_of


@runtime_checkable
class Dictionary(Protocol):
    """What turns states into features and back; the last axis is the one that changes."""

    def encode(self, x: torch.Tensor) -> torch.Tensor:
        """Features of states."""
        ...

    def decode(self, f: torch.Tensor) -> torch.Tensor:
        """States that features stand for."""
        ...


@dataclass(frozen=True, repr=False)
class Features(Edit):
    """Set, scale or swap some features of a sparse dictionary, and leave all else of the state.

    Say one of `value`, `scale` and `donor`. A cell whose features stay as they are keeps its state
    to the last bit, so `scale=1.0` changes nothing.

    Args:
        dictionary: what has `encode` and `decode`, such as a SAE of SAELens; where its metadata
            names a hook, the edit acts there and nowhere else. A transcoder, whose metadata names
            two, reads the first (also of the donor) in the same forward and changes the second.
        features: numbers of features, counted from 0; None is all of them.
        value: what they become: one number, or one for each of `features`.
        scale: what they are multiplied with; 0 switches them off.
        donor: the run whose features they become, row by row and in order, as in `il.Swap`.

    Raises:
        InputError: the arguments do not say one thing to do, or name a feature that is not there,
            or the dictionary belongs to another site.
        DonorError: the dictionary is of another width, dtype or device than the states, or gives
            features or states that are not finite.

    >>> import imaginelens as il
    >>> class Halves:  # one feature for each sign of the first coordinate
    ...     def encode(self, x):
    ...         return torch.stack([x[..., 0].relu(), (-x[..., 0]).relu()], -1)
    ...     def decode(self, f):
    ...         return torch.nn.functional.pad((f[..., :1] - f[..., 1:]), (0, 63))
    >>> lens = il.load("latent-content")
    >>> edit = Features(Halves(), features=[0, 1], scale=0.0)
    >>> with lens.edit(edit, at=il.latent, site="hook_latent") as landing:
    ...     changed = lens.run(lens.task(n=1).base)
    >>> len(landing.cells), changed.latents[0, :, 0].abs().max().item() < 1e-6
    (2, True)
    """

    lines_up: ClassVar[bool] = True

    dictionary: Any
    features: Sequence[int] | np.ndarray | None = None
    value: float | Sequence[float] | np.ndarray | torch.Tensor | None = None
    scale: float | None = None
    donor: Donor | None = None

    def __post_init__(self) -> None:
        _check_kind(self.dictionary)
        chosen = _chosen(self.features)
        object.__setattr__(self, "features", chosen)
        said = [name for name in ("value", "scale", "donor") if getattr(self, name) is not None]
        if len(said) != 1:
            raise InputError(
                f"Features was given {' and '.join(said) or 'nothing to do'}; give one of "
                "value=0.0 (set), scale=2.0 (multiply) and donor=run (swap)"
            )
        _check_numbers("scale", self.scale, None)
        _check_numbers("value", self.value, chosen)

    @property
    def given(self) -> Donor | None:
        reads = self.reads
        return self.donor if self.donor is None or reads is None else _AtSite(self.donor, reads)

    @property
    def reads(self) -> str | None:
        """The site that a transcoder reads, where it is another than the one it writes."""
        at, out = hook_names(self.dictionary)
        return None if out in (None, at) else at

    def sites_among(self, names: Collection[str], chosen: tuple[str, ...]) -> tuple[str, ...]:
        """The sites at which it acts: those that were chosen, if they are the dictionary's."""
        reads, out = hook_names(self.dictionary)
        own, of = out or reads, _of(self.dictionary)
        chosen = tuple(site for site in chosen if site != self.reads) or chosen
        if self.reads is not None and self.reads not in names:
            raise InputError(
                f"this {of} reads {self.reads!r} and writes {own!r}, and this model does not offer "
                "the first; use a dictionary that reads a site of lens.registry, or, where it "
                "reads behind a norm, wrap it so that it norms hook_resid_mid itself"
            )
        wrong = [site for site in chosen if site != own]
        if own is None or not wrong or not _spelled(own):
            return chosen
        known = f"pass site={own!r}" if own in names else "which this model does not offer"
        raise InputError(
            f"this {of} was made for {own!r}, {known}; the edit is at {', '.join(wrong[:3])}"
        )

    def apply(self, act: Act, ctx: EditContext) -> Act:
        """Return the new states of the touched cells."""
        states, read = _flat(self.dictionary, act), self._read(act, ctx)
        donated = None
        if self.donor is not None:  # before the states' own: a dictionary may note what it read
            donor = _flat(self.dictionary, Swap(self.donor).apply(act, ctx))
            donated = encoded(self.dictionary, donor, ctx.site)
        own = encoded(self.dictionary, read, ctx.site)
        rebuilt = decoded(self.dictionary, own, states, ctx.site)
        new = self._changed(own, donated)
        # SAEs that normalise their input note its norm, and forget it once they have decoded
        encoded(self.dictionary, read, ctx.site)
        edited = decoded(self.dictionary, new, states, ctx.site) + (states - rebuilt)
        same = (new == own).all(-1).reshape(-1, *[1] * (states.dim() - 1))
        return torch.where(same, states, edited).reshape(act.shape)

    def _read(self, act: Act, ctx: EditContext) -> torch.Tensor:
        """What is encoded: the states themselves, or those that a transcoder reads."""
        if self.reads is None:
            return _flat(self.dictionary, act)
        if ctx.read is None:
            raise InputError(
                f"this {_of(self.dictionary)} reads {self.reads!r}, which was not passed in this "
                f"forward before {ctx.site!r}; it has to come first"
            )
        return _flat(self.dictionary, ctx.read)

    def _changed(self, own: torch.Tensor, donated: torch.Tensor | None) -> torch.Tensor:
        """The features after the edit, (cell, feature)."""
        count = own.shape[-1]
        chosen = range(count) if self.features is None else self.features
        if max(chosen) >= count:
            raise InputError(
                f"features names feature {max(chosen)} of a {_of(self.dictionary)} with features 0 "
                f"to {count - 1}"
            )
        new, columns = own.clone(), list(chosen)
        if donated is not None:
            new[:, columns] = donated[:, columns]
        elif self.scale is not None:
            new[:, columns] = own[:, columns] * self.scale
        else:
            new[:, columns] = torch.as_tensor(self.value).to(own)
        return new

    def __repr__(self) -> str:
        chosen = "all features" if self.features is None else f"features={list(self.features)}"
        do = "donor" if self.donor is not None else f"scale={self.scale}"
        do = f"value={self.value}" if self.value is not None else do
        return f"Features({_of(self.dictionary)}, {chosen}, {do})"


@dataclass(frozen=True)
class _AtSite:
    """A donor asked for one site, wherever its states go."""

    of: Donor
    site: str

    def states(self, site: str, at: Positions) -> States:
        """The donor's states at the site that is read."""
        return states_of(self.of, self.site, at)


def features(states: Any, dictionary: Any) -> Any:
    """Read states in the features of a dictionary.

    Args:
        states: a tensor (..., d_model), as `cache["resid_post", 1]` or `run.latents`; the `States`
            of `run.states(site, at)`; or a cache, of which the dictionary's own site is read.
        dictionary: what has `encode` and `decode`; where it names a hook, that is the cache's.

    Returns:
        Features in place of the last axis (at a site with heads, of the last two); of `States`,
        `States`. 0 where a cache or `States` are filled up.

    Raises:
        DonorError: the dictionary does not fit the states, or the cache does not hold its site.

    >>> import imaginelens as il
    >>> class Signs:
    ...     def encode(self, x):
    ...         return torch.cat([x.relu(), (-x).relu()], -1)
    ...     def decode(self, f):
    ...         return f[..., : f.shape[-1] // 2] - f[..., f.shape[-1] // 2 :]
    >>> run = il.load("latent-content").run(il.load("latent-content").task(n=3).base)
    >>> features(run.latents, Signs()).shape
    torch.Size([3, 2, 128])
    """
    _check_kind(dictionary)
    if isinstance(states, States):
        values = _read(states.values, states.mask, dictionary)
        return replace(states, values=values)
    if isinstance(states, ActivationCache):
        name = _held(states, dictionary)
        there = states.columns[name] >= 0 if name in states.columns else None
        return _read(states[name], there, dictionary)
    if isinstance(states, torch.Tensor):
        return _read(states, None, dictionary)
    raise InputError(
        f"features reads a tensor, States or an ActivationCache, not a {type(states).__name__}; of "
        "a run, pass run.latents, or run.states(site, at)"
    )


def hook_names(dictionary: Any) -> tuple[str | None, str | None]:
    """The hooks that a dictionary reads and writes, in TransformerLens' spelling, where it says so.

    SAELens keeps them in `cfg.metadata`, its older versions in `cfg`.

    >>> hook_names(torch.nn.Identity())
    (None, None)
    """
    cfg = getattr(dictionary, "cfg", None)
    for held in (getattr(cfg, "metadata", None), cfg):
        name, out = (getattr(held, key, None) for key in ("hook_name", "hook_name_out"))
        if isinstance(name, str) and name:
            return name, out if isinstance(out, str) and out else None
    return None, None


def encoded(dictionary: Any, states: torch.Tensor, where: str) -> torch.Tensor:
    """Features of states (cell, ...), as (cell, feature).

    Raises:
        DonorError: they do not fit, or are not finite.
    """
    _check_tensor(dictionary, states, where)
    try:
        found = dictionary.encode(states)
    except RuntimeError as error:  # torch's own words for shapes that do not fit
        raise DonorError(
            f"this {_of(dictionary)} cannot encode states of width {states.shape[-1]} at {where}; "
            f"take one made for this site of this model ({error})"
        ) from error
    if not isinstance(found, torch.Tensor) or found.dim() != 2 or len(found) != len(states):
        shape = tuple(found.shape) if isinstance(found, torch.Tensor) else type(found).__name__
        raise DonorError(
            f"encode of this {_of(dictionary)} gave {shape} for {len(states)} states, expected a "
            "tensor (state, feature)"
        )
    return _finite(found, "features", dictionary, where)


def decoded(dictionary: Any, found: torch.Tensor, like: torch.Tensor, where: str) -> torch.Tensor:
    """States that features stand for, of the shape, dtype and device of `like`.

    Raises:
        DonorError: they are of another width, or are not finite.
    """
    states = dictionary.decode(found)
    shape = tuple(getattr(states, "shape", ()))
    if shape != tuple(like.shape):
        raise DonorError(
            f"this {_of(dictionary)} decodes to shape {shape}, and the states at {where} have "
            f"shape {tuple(like.shape)}; take one made for this site of this model"
        )
    return _finite(cast(torch.Tensor, states).to(like), "states", dictionary, where)


def _read(states: torch.Tensor, there: torch.Tensor | None, dictionary: Any) -> torch.Tensor:
    """Features of (..., d) states, 0 where nothing is `there`."""
    heads = 1 + _keeps_heads(dictionary)
    outer = states.shape[:-heads]
    width = _known_width(dictionary)
    if heads == 1 and states.dim() > 2 and width not in (None, states.shape[-1]):
        flat = states.flatten(-2)  # a site with heads, and a dictionary of all of them
        outer, states = (outer[:-1], flat) if flat.shape[-1] == width else (outer, states)
    cells = states.reshape(-1, *states.shape[len(outer) :])
    found = encoded(dictionary, cells, "what is read").reshape(*outer, -1)
    return found if there is None else found * there[..., None].to(found)


def _held(cache: ActivationCache, dictionary: Any) -> str:
    name, _ = hook_names(dictionary)
    if name is not None and name in cache:
        return name
    if name is not None:
        raise DonorError(
            f"this {_of(dictionary)} reads {name!r}, which the cache does not hold; pass "
            f"names_filter={name!r} to lens.run_with_cache"
        )
    raise DonorError(
        f"this {_of(dictionary)} does not say which site it reads; pass that activation, such as "
        "cache['resid_post', 1]"
    )


def _flat(dictionary: Any, act: torch.Tensor) -> torch.Tensor:
    """States as a dictionary takes them: (cell, d), or with heads, where it joins them itself."""
    return act if _keeps_heads(dictionary) else act.flatten(1)


def _keeps_heads(dictionary: Any) -> bool:
    """Whether it takes (cell, head, d_head): SAELens' SAEs of `hook_z` do."""
    return bool(getattr(dictionary, "hook_z_reshaping_mode", False))


def _known_width(dictionary: Any) -> int | None:
    """The width of the states it encodes, where it says so."""
    for held, name in (
        (getattr(dictionary, "cfg", None), "d_in"),  # SAELens
        (dictionary, "activation_dim"),  # dictionary_learning
        (dictionary, "d_in"),
    ):
        width = getattr(held, name, None)
        if isinstance(width, int):
            return width
    return None


def _check_kind(dictionary: Any) -> None:
    if not isinstance(dictionary, Dictionary) or isinstance(dictionary, type):
        raise InputError(
            f"dictionary is {_shown(dictionary)}, expected an object with encode and decode, such "
            "as SAE.from_pretrained(...) of SAELens gives"
        )


def _check_tensor(dictionary: Any, states: torch.Tensor, where: str) -> None:
    """Refuse what would be cast or crash: nothing is converted behind the user's back."""
    width = _known_width(dictionary)
    own = states.shape[1:].numel()
    if width is not None and width != own:
        raise DonorError(
            f"this {_of(dictionary)} encodes states of width {width}, and those at {where} have "
            f"width {own}; take one made for this site of this model"
        )
    weights = getattr(dictionary, "parameters", None)
    first = next(iter(weights()), None) if callable(weights) else None
    if not isinstance(first, torch.Tensor):
        return
    if first.dtype != states.dtype or first.device != states.device:
        raise DonorError(
            f"this {_of(dictionary)} is in {first.dtype} on {first.device}, and the states at "
            f"{where} are in {states.dtype} on {states.device}; convert it with "
            f"dictionary.to({str(states.device)!r}, {states.dtype}) first"
        )


def _finite(values: torch.Tensor, what: str, dictionary: Any, where: str) -> torch.Tensor:
    if not bool(torch.isfinite(values).all()):
        row = int((~torch.isfinite(values)).flatten(1).any(1).nonzero()[0])
        raise DonorError(
            f"this {_of(dictionary)} gives {what} that are not finite, the first in cell {row} at "
            f"{where}; look for states or weights that overflow in {values.dtype}"
        )
    return values


def _chosen(given: Any) -> tuple[int, ...] | None:
    """Numbers of features, in the order given."""
    if given is None:
        return None
    listed = not isinstance(given, str) and hasattr(given, "__len__")
    if not listed or not len(given):
        raise InputError(
            f"features is {given!r}, expected numbers such as [3, 17], or None for all"
        )
    for number in given:
        whole = isinstance(number, numbers.Integral) and not isinstance(number, bool)
        if not whole or number < 0:
            raise InputError(f"features holds {number!r}; give whole numbers, counted from 0")
    found = tuple(int(number) for number in given)
    if len(set(found)) < len(found):
        twice = next(number for number in found if found.count(number) > 1)
        raise InputError(f"features names feature {twice} twice; name each once")
    return found


def _check_numbers(name: str, given: Any, chosen: tuple[int, ...] | None) -> None:
    if given is None:
        return
    try:
        values = torch.as_tensor(given, dtype=torch.float64)
    except (TypeError, ValueError, RuntimeError):
        values = torch.tensor(float("nan"))
    if not bool(torch.isfinite(values).all()):
        raise InputError(f"{name} is {given!r}, expected finite numbers, such as 0.0")
    wanted = None if chosen is None else (len(chosen),)
    if values.dim() and (name == "scale" or tuple(values.shape) != wanted):
        raise InputError(
            f"{name} has shape {tuple(values.shape)}, expected one number"
            + ("" if name == "scale" else f" or one for each of {chosen or 'the named features'}")
        )


def _spelled(name: str) -> bool:
    """Whether a hook name is in TransformerLens' spelling, so that it can be compared."""
    return name.rpartition(".")[2].startswith("hook_")


def _of(dictionary: Any) -> str:
    return type(dictionary).__name__


def _shown(value: Any) -> str:
    return f"the class {value.__name__}" if isinstance(value, type) else f"a {_of(value)}"
