"""The registry: which hooks, edits and captures are active at which sites.

Everything that reaches into a running model is an entry here. Before each forward the engine asks
the registry for one worker per active site; entries of a site act in the order of registration.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from functools import partial
from typing import Any, Literal

import nnsight
import numpy as np
import torch
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

from imaginelens.hooks import engine
from imaginelens.hooks.attention import SLOTS, Hook, Inside, inside
from imaginelens.hooks.depth import Depth
from imaginelens.hooks.edits import Edit
from imaginelens.hooks.entries import Chunk, EditEntry, Entry, HookEntry, HookFn, HookPoint
from imaginelens.hooks.errors import InputError, SiteUnavailable
from imaginelens.hooks.names import NamesFilter, match
from imaginelens.hooks.positions import Positions
from imaginelens.hooks.sites import ORDER, Site, SiteTable
from imaginelens.hooks.tensor_parallel import shown_whole
from imaginelens.hooks.textedits import TextEntry, edit_entry


@dataclass(eq=False, repr=False)
class HookRegistry(Mapping[str, Site]):
    """Every site of a model by name, and what is active on it.

    `registry.match("*.hook_resid_post")` lists names, `registry.add(filter, fn_or_edit)` activates,
    `registry.clear()` removes everything that is not permanent. What is active is heard by the
    verbs of the lens and by traces of `lens.nnsight`; a call of the model itself is then refused.
    """

    table: SiteTable
    points: dict[str, HookPoint] = field(default_factory=dict)
    depth: Depth | None = None  # of a model that recurs in depth
    forwards: int = 0  # of this library, so far
    guard: Callable[[], RemovableHandle] | None = None  # refuses calls that hear of no entry
    _entries: list[Entry] = field(default_factory=list)
    _guarding: RemovableHandle | None = None

    @property
    def entries(self) -> list[Entry]:
        """What is active, in the order of registration."""
        return self._entries

    @entries.setter
    def entries(self, new: list[Entry]) -> None:
        self._entries = new
        if new and self._guarding is None and self.guard is not None:
            self._guarding = self.guard()
        elif not new and self._guarding is not None:
            self._guarding.remove()
            self._guarding = None

    def __contains__(self, name: object) -> bool:
        return name in self.table

    def __getitem__(self, name: str) -> Site:
        return self.table[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.table)

    def __len__(self) -> int:
        return len(self.table)

    def __repr__(self) -> str:
        of = self.table.model
        lines = [f"HookRegistry of {of}: {len(self)} sites, {len(self.entries)} active"]
        lines += [
            f"  {site}: {', '.join(_named(entry) for entry in entries)}"
            for site, entries in self.active.items()
        ]
        lines += [f"  text: {_named(entry)}" for entry in self.text_edits()]
        return "\n".join(lines)

    def match(self, names_filter: NamesFilter) -> list[str]:
        """List the names of the sites that a filter selects.

        Raises:
            HookNameError: nothing matches.
            SiteUnavailable: the filter names a site that this model cannot offer, and why.
        """
        if isinstance(names_filter, str) and names_filter in self.table:
            return [names_filter]
        wanted = [names_filter] if isinstance(names_filter, str) else names_filter
        if wanted is not None and not callable(wanted):
            for pattern in wanted:
                if not any(fnmatchcase(name, pattern) for name in self.table):
                    for name in self.table.unavailable:
                        if fnmatchcase(name, pattern):
                            self.table[name]  # raises with the reason
        return match(self.table, names_filter)

    def add(
        self,
        names_filter: NamesFilter,
        action: HookFn | Edit,
        *,
        at: Positions | None = None,
        direction: Literal["fwd", "bwd"] = "fwd",
        permanent: bool = False,
    ) -> HookEntry | EditEntry | TextEntry:
        """Activate a hook function or an edit at the sites that a filter selects.

        Edits need `at`, the positions they touch; hook functions see the whole activation. Until
        they are removed, calling the model itself raises `EditTouchedNothing`.
        """
        sites = tuple(self.match(names_filter))
        entry: HookEntry | EditEntry | TextEntry
        if isinstance(action, Edit):
            if at is None:
                raise TypeError(
                    f"{type(action).__name__} needs to know where: pass at=il.latent, "
                    "at=il.latent[2], at=il.image or another selector"
                )
            if permanent or direction != "fwd":
                raise TypeError(
                    f"{type(action).__name__} cannot be permanent or act backwards; hook functions "
                    "can, edits hold until registry.clear() or for a block of lens.edit"
                )
            entry = edit_entry(action, at, sites)
        else:
            entry = HookEntry(sites, action, direction, permanent)
        entry.settle(self.table)
        self.entries = [*self.entries, entry]
        return entry

    def remove(self, entry: Entry) -> None:
        """Deactivate one entry."""
        self.entries = [e for e in self.entries if e is not entry]

    def clear(self, *, including_permanent: bool = False) -> None:
        """Deactivate everything, permanent hooks only if asked to."""
        self.entries = [
            e for e in self.entries if getattr(e, "permanent", False) and not including_permanent
        ]

    @property
    def active(self) -> dict[str, list[Entry]]:
        """What is active, by site, in the order in which it acts."""
        found: dict[str, list[Entry]] = {}
        for entry in self.entries:
            for site in entry.sites:
                found.setdefault(site, []).append(entry)
        return found

    @contextmanager
    def scope(self, extra: Sequence[Entry] = ()) -> Iterator[None]:
        """Activate entries for the duration of a block; afterwards everything is as it was."""
        before = list(self.entries)
        for entry in extra:
            entry.settle(self.table)
        self.entries = before + list(extra)
        try:
            yield
        finally:
            self.entries = before
            kept = {site for entry in before for site in entry.sites}
            self.points = {site: p for site, p in self.points.items() if site in kept}

    def begin(self) -> None:
        """Start a call: landings are judged call by call."""
        for entry in self.edits():
            entry.begin()

    def edits(self) -> list[EditEntry | TextEntry]:
        """The active edits."""
        return [e for e in self.entries if isinstance(e, EditEntry | TextEntry)]

    def judge(self, n_rows: int, seen: str, acted: frozenset[int] = frozenset()) -> None:
        """End a call: refuse it if an active edit did nothing. Edits of latents that had `acted`
        before, on the run that is read, have nothing left to do."""
        for entry in self.edits():
            if entry.number not in acted or set(entry.sites) - {"hook_latent"}:
                entry.judge(n_rows, seen)

    def text_edits(self) -> list[TextEntry]:
        """The active edits of written imagination."""
        return [e for e in self.entries if isinstance(e, TextEntry)]

    def acting(self, site: str) -> frozenset[int]:
        """The numbers of what is active at a site."""
        return frozenset(entry.number for entry in self.entries if site in entry.sites)

    def on_latents(
        self,
        z: torch.Tensor,
        chunk: Chunk,
        columns: np.ndarray,
        acted: frozenset[int] = frozenset(),
    ) -> torch.Tensor:
        """Show the states about to be fed back, (example, position, d_model), to `hook_latent`,
        but not to what has `acted` on them before."""
        if not self.acting("hook_latent") - acted:
            return z
        chunk = replace(chunk, points=self.points)
        return self._compose("hook_latent", chunk, columns, acted)(z)

    def run(
        self,
        wrapped: nnsight.NNsight,
        model: PreTrainedModel,
        inputs: Mapping[str, Any],
        chunk: Chunk,
        *,
        overlay: Callable[[torch.Tensor], torch.Tensor] | None = None,
        read: Mapping[str, Callable[[torch.Tensor], None]] | None = None,
        workers: Sequence[engine.Worker] = (),
    ) -> Any:
        """Run one forward with everything that is active.

        Args:
            overlay: writes the latents over the token embeddings, after `hook_embed` has acted.
            read: functions shown the value of a site after all hooks (the loop's own reads).
            workers: bare workers for the same trace.
        """
        self.forwards += 1
        chunk = replace(chunk, points=self.points)
        values = {name: self._compose(name, chunk, None) for name in self.active}
        values.pop("hook_latent", None)
        if not chunk.has_images:
            values = {n: fn for n, fn in values.items() if not self.table[n].is_vision}
        if overlay is not None:
            values["hook_embed"] = _then(values.get("hook_embed"), overlay)
        last: list[engine.Worker] = []
        for name, fn in (read or {}).items():
            if engine.joins(wrapped) and self.table[name].kind.slot not in SLOTS:
                last.append(self._worker(wrapped, self.table[name], _reading(fn)))
            else:
                values[name] = _then(values.get(name), _reading(fn))
        sites = [self.table[n] for n in values if self.table[n].kind.slot not in SLOTS]
        # Sites may share a module, and a worker between sublayers also writes the block's output:
        # they act in the order in which the stream passes them.
        sites.sort(key=lambda site: ORDER[site.kind.name])
        at_sites = [self._worker(wrapped, site, values[site.name]) for site in sites]
        if self.depth is not None:
            inputs = self.depth.given(model, inputs, chunk)
            with self.depth.hidden(chunk):
                return engine.forward(wrapped, [*workers, *at_sites], inputs, last)
        with inside(model, self._inside(values, chunk)):
            return engine.forward(wrapped, [*workers, *at_sites], inputs, last)

    def _inside(self, values: Mapping[str, Hook], chunk: Chunk) -> dict[str, Inside]:
        """What acts inside attention, by the path of its module and by slot."""
        found: dict[str, Inside] = {}
        for name, fn in values.items():
            site = self.table[name]
            if site.kind.slot in SLOTS:
                found.setdefault(site.path, {})[site.kind.slot] = fn
        for entry in self.edits():
            if not isinstance(entry, EditEntry) or not entry.along_edges:
                continue
            for name in entry.sites:
                pattern = f"{name.rpartition('.')[0]}.hook_pattern"  # of the same attention
                slots = found.setdefault(self.table[pattern].path, {})
                if entry.readers is None:
                    cut = partial(entry.cut, name, chunk)
                    slots["scores"] = _then(slots.get("scores"), cut)
                    continue
                slot = f"read_{name[-1]}"
                if slot in slots:
                    raise InputError(
                        f"two edits with readers are at {name!r}, and what a reader sees of both "
                        "is not defined; use one at a time, or leave readers out of one"
                    )
                slots[slot] = partial(entry.read, self.table[name], chunk)
        return found

    def _worker(
        self, wrapped: nnsight.NNsight, site: Site, fn: Callable[[torch.Tensor], torch.Tensor]
    ) -> engine.Worker:
        slot = site.kind.slot
        if slot not in ("mid", "stream"):
            end = _ENDS.get(slot, slot)
            fn = shown_whole(wrapped._module.get_submodule(site.path), end, site.name, fn)
            worker = engine.visit(wrapped, site.path, end, fn)
            return worker if site.call == 0 else engine.at_call(worker, site.call)
        if site.block is None:
            raise SiteUnavailable(f"{site.name!r} belongs to no block")
        if slot == "mid":
            return engine.visit_residual(wrapped, site.block, site.path, fn)
        return engine.visit_stream(wrapped, site.block, site.path, site.kind.part, fn)

    def _compose(
        self,
        name: str,
        chunk: Chunk,
        columns: np.ndarray | None,
        acted: frozenset[int] = frozenset(),
    ) -> Callable[[torch.Tensor], torch.Tensor]:
        site = self.table[name]
        entries = [e for e in self.entries if name in e.sites and e.number not in acted]

        def act_on(value: torch.Tensor) -> torch.Tensor:
            act = _shaped(site, value)
            shown = act
            if columns is not None:
                where = columns
            elif site.is_vision:
                where = np.zeros(0, dtype=int)
            else:  # the head may be asked for the last logits only
                where = np.arange(chunk.stop - act.shape[1], chunk.stop)
            for entry in entries:
                act = entry.on(site, act, chunk, where)
            # where gradients are asked for, what was shown has to be what the model goes on with
            passed = act is shown and (shown is value or not shown.requires_grad)
            return value if passed else _unshaped(site, act, value)

        return act_on


def _named(entry: Entry) -> str:
    if isinstance(entry, EditEntry | TextEntry):
        return f"{type(entry.edit).__name__} at {entry.at!r}"
    return str(getattr(getattr(entry, "fn", entry), "__name__", type(entry).__name__))


def _then(
    first: Callable[[torch.Tensor], torch.Tensor] | None,
    second: Callable[[torch.Tensor], torch.Tensor],
) -> Callable[[torch.Tensor], torch.Tensor]:
    return second if first is None else lambda act: second(first(act))


def _reading(fn: Callable[[torch.Tensor], None]) -> Callable[[torch.Tensor], torch.Tensor]:
    def read(act: torch.Tensor) -> torch.Tensor:
        fn(act)
        return act

    return read


_ENDS = {"first_half": "input"}  # which end of its module a part of a value is at


def _shaped(site: Site, value: torch.Tensor) -> torch.Tensor:
    """The value with the axes that the site's row of the table names."""
    if site.kind.slot == "first_half":
        return value[..., : value.shape[-1] // 2]
    if site.kind.slot in SLOTS:
        return value.transpose(1, 2)  # (example, head, query, key) -> (example, query, head, key)
    if site.heads is not None:
        return value.unflatten(-1, (site.heads, -1))
    return value


def _unshaped(site: Site, act: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    if site.kind.slot in SLOTS:
        return act.transpose(1, 2)
    if site.kind.slot == "first_half":
        return torch.cat([act, like[..., act.shape[-1] :]], dim=-1)
    return act.reshape(like.shape)
