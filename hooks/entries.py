"""What can be active at a site: a user's hook, an edit, a capture; and which cells they touch."""

from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from itertools import count
from typing import Any, Literal

import numpy as np
import torch
from torch.nn.functional import pad

from imaginelens.hooks.edits import EdgeEdit, Edit, EditContext, Sham
from imaginelens.hooks.errors import DonorError, InputError, SiteUnavailable
from imaginelens.hooks.landing import Landing
from imaginelens.hooks.positions import Positions, edges
from imaginelens.hooks.sites import Site
from imaginelens.hooks.states import States, states_of
from imaginelens.hooks.tokens import Kind, TokenMap

HookFn = Callable[..., torch.Tensor | None]


@dataclass(frozen=True)
class Chunk:
    """The part of a batch that one forward reads: columns `start` to `stop` of the map.

    Attributes:
        projector_rows: for every image token of the batch, in order, its row in the projector's
            output; None if the two have the same order.
        points: what hook functions see of each site, shared by all hooks of the site.
    """

    tokens: TokenMap
    start: int
    stop: int
    has_images: bool = False
    projector_rows: np.ndarray | None = None
    points: "dict[str, HookPoint]" = field(default_factory=dict)


@dataclass
class HookPoint:
    """What a hook function gets as `hook`, as in TransformerLens.

    Attributes:
        name: the site's name; `layer()` its layer.
        ctx: a dict that lives as long as the hook does.
        columns: the columns of the batch that `act` shows, along its position axis.
        tokens: the map of the batch so far.
    """

    name: str
    ctx: dict[str, Any] = field(default_factory=dict)
    columns: np.ndarray = field(default_factory=lambda: np.zeros(0, dtype=int))
    tokens: TokenMap | None = None

    def layer(self) -> int:
        """The layer that the site's name holds."""
        return int(self.name.split("blocks.")[1].split(".")[0])


@dataclass(eq=False)
class Entry:
    """Something that is active at some sites, by name."""

    sites: tuple[str, ...]
    number: int = field(default_factory=count().__next__, init=False)

    def on(self, site: Site, act: torch.Tensor, chunk: Chunk, columns: np.ndarray) -> torch.Tensor:
        """Act on the value at a site; the same tensor back is a read."""
        raise NotImplementedError(f"{type(self).__name__} does not say how it acts")

    def settle(self, names: Collection[str]) -> None:
        """Take its place among the sites of a model, as it becomes active."""


@dataclass(eq=False)
class HookEntry(Entry):
    """A user's function at some sites, with TransformerLens' signature `fn(act, hook=...)`."""

    fn: HookFn
    direction: Literal["fwd", "bwd"] = "fwd"
    permanent: bool = False

    def on(self, site: Site, act: torch.Tensor, chunk: Chunk, columns: np.ndarray) -> torch.Tensor:
        point = chunk.points.setdefault(site.name, HookPoint(site.name))
        point.columns, point.tokens = columns, chunk.tokens
        if self.direction == "bwd":
            if act.requires_grad:
                act.register_hook(lambda grad: self.fn(grad, hook=point))
            return act
        new = self.fn(act, hook=point)
        if new is not None and new.shape != act.shape:
            raise DonorError(
                f"the hook at {site.name!r} returned shape {tuple(new.shape)} for an activation of "
                f"shape {tuple(act.shape)}; return a tensor of the same shape, or None to only read"
            )
        return act if new is None else new


@dataclass(eq=False)
class EditEntry(Entry):
    """An edit at some sites and positions, with its landing."""

    edit: Edit
    at: Positions
    landing: Landing
    draw: int = 0
    heads: tuple[int, ...] | None = None
    readers: Positions | None = None
    _given: dict[str, States | None] = field(default_factory=dict)
    _first: dict[tuple[str, int], torch.Tensor] = field(default_factory=dict)
    _found: tuple[Chunk, int, tuple[np.ndarray, np.ndarray, np.ndarray]] | None = None
    _edges: tuple[Chunk, int, torch.Tensor] | None = None
    _counted: set[tuple[str, int, int]] = field(default_factory=set)
    _beside: tuple[Chunk, torch.Tensor] | None = None  # at the site that the edit only reads

    @property
    def along_edges(self) -> bool:
        """Whether it acts inside attention, edge by edge, not on the value of its sites."""
        return self.readers is not None or isinstance(self.edit, EdgeEdit)

    def settle(self, names: Collection[str]) -> None:
        self.sites = self.landing.sites = self.edit.sites_among(names, self.sites)
        if self.edit.reads is not None:
            self.sites = (self.edit.reads, *self.sites)
        for site in self.sites if self.readers is not None else ():
            if not site.endswith(("attn.hook_rot_k", "attn.hook_v")):
                raise InputError(
                    f"readers={self.readers!r} with {site!r}: only keys and values are read by "
                    "others; name sites such as 'blocks.0.attn.hook_rot_k' or '*.attn.hook_v'"
                )
            if f"{site.rpartition('.')[0]}.hook_pattern" not in names:
                raise SiteUnavailable(
                    f"readers of {site!r} cannot be told apart, for its attention class does not "
                    "ask for a registered attention function; leave readers out"
                )

    def begin(self) -> None:
        """Forget what belongs to one run."""
        self._first.clear()
        self._counted.clear()
        self._beside = None
        self.landing.begin()

    def on(self, site: Site, act: torch.Tensor, chunk: Chunk, columns: np.ndarray) -> torch.Tensor:
        if site.name == self.edit.reads:
            self._beside = (chunk, act)
            return act
        changed = None if self.along_edges else self._changed(site, act, chunk, columns)
        if changed is None:
            return act
        rows, places, at_columns, old, new = changed
        fresh = site.is_vision | (at_columns >= chunk.start)  # not those that wait in the cache
        if fresh.any():
            self.landing.record(
                site.name, rows[fresh], at_columns[fresh], old[fresh], new[fresh], chunk,
                donated=self.edit.lines_up,
            )  # fmt: skip
        return _scatter(site, act, chunk, rows, places, new)

    def _changed(
        self, site: Site, act: torch.Tensor, chunk: Chunk, columns: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray, torch.Tensor, torch.Tensor] | None:
        """The cells it touches, as rows, places and columns, and their states before and after."""
        if site.is_vision:
            rows, places, ordinals, old = _vision_cells(site, act, chunk, self.at)
        else:
            rows, places, ordinals = self._touched(chunk, columns)
            keep = _read_by_the_model(site, chunk, rows, columns[places], self.at)
            rows, places, ordinals = rows[keep], places[keep], ordinals[keep]
            old = act[rows, places]
        if len(rows) == 0:
            return None
        given = self._states(site.name)
        keep = self._has_donor(given, rows, ordinals, len(chunk.tokens), site.name)
        rows, places, ordinals, old = rows[keep], places[keep], ordinals[keep], old[keep]
        if len(rows) == 0:
            return None
        at_columns = places if site.is_vision else columns[places]
        ctx = EditContext(
            site=site.name,
            rows=rows,
            positions=at_columns,
            ordinals=ordinals,
            steps=chunk.tokens.step[rows, at_columns],
            given=given,
            first=self._remember_first(site.name, rows, ordinals, old),
            draw=self.draw,
            keys=tuple(chunk.tokens.keys[int(row)] for row in rows),
            read=None if self._beside is None else self._read_there(chunk, rows, places),
        )
        _check_fit(given, old, site, self.edit)
        new = self.edit.apply(old, ctx)
        if new.shape != old.shape:
            raise DonorError(
                f"{type(self.edit).__name__} returned shape {tuple(new.shape)} for {len(old)} "
                f"cells of shape {tuple(old.shape)} at {site.name!r}; an edit keeps its shape"
            )
        new = new.to(old)  # before it is judged: a change can be lost in rounding
        if self.heads is not None:
            new = _in_heads(self.heads, site, old, new)
        return rows, places, at_columns, old, new

    def _read_there(
        self, chunk: Chunk, rows: np.ndarray, places: np.ndarray
    ) -> torch.Tensor | None:
        """What the same cells hold at the site that the edit reads, in this forward."""
        assert self._beside is not None
        seen, act = self._beside
        return act[rows, places] if seen is chunk else None

    def read(
        self, site: Site, chunk: Chunk, held: torch.Tensor, visible: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor] | None:
        """What its readers see of keys or values (example, head, key, d_head), and along which
        edges (example, query, key). A cell counts once in a call, when it is read."""
        act, n_keys = held.transpose(1, 2), held.shape[2]
        wanted = self._wanted(chunk, visible.shape[1], n_keys).to(visible.device) & visible
        columns = np.arange(chunk.stop - n_keys, chunk.stop)
        changed = self._changed(site, act, chunk, columns) if bool(wanted.any()) else None
        if changed is None:
            return None
        rows, places, at_columns, old, new = changed
        self.landing.edges += int(wanted.sum())
        is_read = wanted.any(1).cpu().numpy()[rows, places]
        fresh = is_read & self._first_time(site.name, rows, at_columns, is_read)
        self.landing.record(
            site.name, rows[fresh], at_columns[fresh], old[fresh], new[fresh], chunk,
            donated=self.edit.lines_up,
        )  # fmt: skip
        return _scatter(site, act, chunk, rows, places, new).transpose(1, 2), wanted

    def _first_time(
        self, site: str, rows: np.ndarray, columns: np.ndarray, counts: np.ndarray
    ) -> np.ndarray:
        """Which of the cells have not been counted in this call; those that count now are."""
        cells = [(site, int(r), int(c)) for r, c in zip(rows, columns, strict=True)]
        new = np.array([cell not in self._counted for cell in cells], dtype=bool)
        self._counted.update(cell for cell, count in zip(cells, counts, strict=True) if count)
        return new

    def cut(self, site: str, chunk: Chunk, scores: torch.Tensor) -> torch.Tensor:
        """Cut edges of one forward and layer: masked scores (example, head, query, key).

        A key that is hidden is a touched cell, once in a call; `landing.edges` counts edges.
        """
        assert isinstance(self.edit, EdgeEdit)
        wanted = self._wanted(chunk, *scores.shape[-2:]).to(scores.device)
        visible = (scores > torch.finfo(scores.dtype).min / 2).any(1)
        wanted = wanted & visible
        self.landing.edges += int(wanted.sum())
        rows, keys = np.nonzero(wanted.any(1).cpu().numpy())
        if len(rows) == 0:
            return scores
        columns = keys + chunk.stop - scores.shape[-1]
        new = self._first_time("", rows, columns, np.ones(len(rows)))
        whole = torch.ones(int(new.sum()), 1)  # an edge is cut wholly: a relative change of 1
        self.landing.record(site, rows[new], columns[new], whole, torch.zeros_like(whole), chunk)
        of_heads = self.edit.heads_among(scores.shape[1]).to(scores.device)
        return scores.masked_fill(wanted[:, None] & of_heads[:, None, None], float("-inf"))

    def _wanted(self, chunk: Chunk, n_queries: int, n_keys: int) -> torch.Tensor:
        """The edges it means in a forward: the same in all of its layers, but for their windows."""
        if self._edges is None or self._edges[0] is not chunk or self._edges[1] != n_keys:
            if n_keys > chunk.stop:
                raise SiteUnavailable(
                    f"the cache holds {n_keys} keys of {chunk.stop} positions, so it was made in "
                    "advance, and edges need one that grows; leave cache_implementation out"
                )
            queries, keys = (np.arange(chunk.stop - n, chunk.stop) for n in (n_queries, n_keys))
            if isinstance(self.edit, EdgeEdit):
                wanted = self.edit.edges(self.at, chunk.tokens, queries, keys)
            else:
                wanted = edges(self.readers, self.at, chunk.tokens, queries, keys)
            self._edges = (chunk, n_keys, torch.as_tensor(wanted))
        return self._edges[2]

    def _touched(
        self, chunk: Chunk, columns: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The cells of a forward: the same at all of its sites, so found once."""
        if self._found is None or self._found[0] is not chunk or self._found[1] != len(columns):
            self._found = (chunk, len(columns), _cells(chunk, columns, self.at))
        return self._found[2]

    def judge(self, n_rows: int, seen: str) -> None:
        """Refuse a call in which this edit did nothing."""
        self.landing.judge(n_rows, may_be_identical=isinstance(self.edit, Sham), seen=seen)

    def _states(self, site: str) -> States | None:
        if site not in self._given:
            given = self.edit.given
            self._given[site] = None if given is None else states_of(given, site, self.at)
        return self._given[site]

    def _has_donor(
        self, given: States | None, rows: np.ndarray, ordinals: np.ndarray, n_rows: int, site: str
    ) -> np.ndarray:
        """Which cells a donor can serve; a donor row without such a state leaves its row be."""
        keep = np.ones(len(rows), dtype=bool)
        if given is None or not self.edit.lines_up:
            return keep
        if len(given) not in (1, n_rows):
            raise DonorError(
                f"the donor of {type(self.edit).__name__} has {len(given)} rows and the run has "
                f"{n_rows}; give it one row, or as many rows as the run"
            )
        counts = given.counts()
        for i, (row, ordinal) in enumerate(zip(rows, ordinals, strict=True)):
            has = counts[0 if len(given) == 1 else row]
            keep[i] = has > 0
            if has == 0:
                self.landing.donorless.add(int(row))
            if 0 < has <= ordinal:
                raise DonorError(
                    f"row {row} of the donor has {has} states at {self.at!r} of {site!r} and the "
                    f"run has reached its number {ordinal + 1}; select fewer, {self._fewer(has)}"
                )
        return keep

    def _fewer(self, n: int) -> str:
        return f"at=il.latent[:{n}]" if repr(self.at) == "latent" else f"at most {n}"

    def _remember_first(
        self, site: str, rows: np.ndarray, ordinals: np.ndarray, old: torch.Tensor
    ) -> torch.Tensor | None:
        for i in np.flatnonzero(ordinals == 0):
            self._first[site, int(rows[i])] = old[i]
        blank = torch.zeros_like(old[0])
        found = [self._first.get((site, int(row)), blank) for row in rows]
        if any(first.shape[-1] > blank.shape[-1] for first in found):
            return None  # a window has moved on, and its first pattern has other keys
        # a pattern grows by a key per step: what came later was not looked at
        width = blank.shape[-1]
        return torch.stack(
            [f if f.shape[-1] == width else pad(f, (0, width - f.shape[-1])) for f in found]
        )


@dataclass(eq=False)
class CaptureEntry(Entry):
    """A read that keeps a copy of the states at some positions; None keeps whole activations."""

    wanted: Callable[[TokenMap, int], np.ndarray] | None
    device: torch.device | str | None = None
    whole: dict[str, torch.Tensor] = field(default_factory=dict)
    cells: dict[str, list[tuple[int, int, torch.Tensor]]] = field(default_factory=dict)
    slots: dict[str, torch.Tensor] = field(default_factory=dict)
    _planned: tuple[Chunk, int, np.ndarray] | None = None

    def on(self, site: Site, act: torch.Tensor, chunk: Chunk, columns: np.ndarray) -> torch.Tensor:
        if site.is_vision or self.wanted is None:
            self.whole[site.name] = self._copy(act)
            slots = _image_slots(chunk)
            if site.name == "vision_projector.hook_out" and len(slots) == act[..., 0].numel():
                self.slots[site.name] = torch.tensor([(r, c, i) for (r, c), i in slots.items()])
            return act
        rows, places = self._plan(chunk, columns)
        if len(rows):
            copies = self._copy(act[rows, places]).unbind(0)
            kept = self.cells.setdefault(site.name, [])
            kept += zip(rows.tolist(), columns[places].tolist(), copies, strict=True)
        return act

    def _plan(self, chunk: Chunk, columns: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Which cells of a forward to keep: the same at all of its sites."""
        assert self.wanted is not None
        if (
            self._planned is None
            or self._planned[0] is not chunk
            or self._planned[1] != len(columns)
        ):
            cells = [
                (row, int(place))
                for row in range(len(chunk.tokens))
                for place in np.flatnonzero(np.isin(columns, self.wanted(chunk.tokens, row)))
                if columns[place] >= chunk.start  # keys in the cache were captured when new
            ]
            plan = np.array(cells, dtype=int).reshape(-1, 2)
            self._planned = (chunk, len(columns), plan)
        plan = self._planned[2]
        return plan[:, 0], plan[:, 1]

    def _copy(self, act: torch.Tensor) -> torch.Tensor:
        # A clone, so that the full activation a slice belongs to can be freed.
        copy = act.clone() if act.requires_grad else act.detach().clone()
        return copy if self.device is None else copy.to(self.device)


def _cells(
    chunk: Chunk, columns: np.ndarray, at: Positions
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The touched cells of a forward: row, place along the position axis, ordinal."""
    rows: list[int] = []
    places: list[int] = []
    ordinals: list[int] = []
    for row in range(len(chunk.tokens)):
        resolved = at.resolve(chunk.tokens, row)
        for ordinal in np.flatnonzero(np.isin(resolved, columns)):
            rows.append(row)
            places.append(int(np.searchsorted(columns, resolved[ordinal])))
            ordinals.append(int(ordinal))
    return np.array(rows, dtype=int), np.array(places, dtype=int), np.array(ordinals, dtype=int)


def _read_by_the_model(
    site: Site, chunk: Chunk, rows: np.ndarray, columns: np.ndarray, at: Positions
) -> np.ndarray:
    """Which cells of a site the model goes on to read: elsewhere an edit would change nothing."""
    kinds = chunk.tokens.kind[rows, columns]
    if site.name == "hook_latent":
        return np.asarray(kinds == Kind.LATENT)
    if site.name == "hook_embed":
        for kind, instead in (
            (Kind.LATENT, "hook_latent"),
            (Kind.IMAGE, "vision_projector.hook_out"),
            (Kind.VIDEO, "vision_projector.hook_out"),
            (Kind.AUDIO, "blocks.0.hook_resid_pre"),
            (Kind.INSERTED, "blocks.0.hook_resid_pre"),
        ):
            if (kinds == kind).any():
                raise SiteUnavailable(
                    f"{at} selects {kind.name.lower()} positions, whose token embedding is "
                    f"overwritten before anything reads it; edit {instead!r} there"
                )
    return np.ones(len(rows), dtype=bool)


def _image_slots(chunk: Chunk) -> dict[tuple[int, int], int]:
    """The projector's row for every image token of the batch, by (row, column); of video tokens
    where there are no images, which are projected first, in a call of their own."""
    tokens = chunk.tokens
    kind = Kind.IMAGE if bool((tokens.kind == Kind.IMAGE).any()) else Kind.VIDEO
    slots = [(row, int(c)) for row in range(len(tokens)) for c in tokens.columns(row, kind)]
    order = range(len(slots)) if chunk.projector_rows is None else chunk.projector_rows
    return {slot: int(i) for slot, i in zip(slots, order, strict=False)}


def _vision_cells(
    site: Site, act: torch.Tensor, chunk: Chunk, at: Positions
) -> tuple[np.ndarray, np.ndarray, np.ndarray, torch.Tensor]:
    """Cells of the projector's output: row, column, ordinal, and their states."""
    flat = act.reshape(-1, act.shape[-1])
    slots = _image_slots(chunk)
    if site.name != "vision_projector.hook_out" or len(slots) != len(flat):
        raise SiteUnavailable(
            f"{site.name!r} has {len(flat)} rows and the batch {len(slots)} image tokens, so "
            f"{at!r} cannot be found in it; use a hook function, or edit blocks.0.hook_resid_pre"
        )
    rows, columns, ordinals = _cells(chunk, np.arange(chunk.tokens.width), at)
    where = [slots.get((int(r), int(c)), -1) for r, c in zip(rows, columns, strict=True)]
    if -1 in where and (chunk.tokens.kind[rows, columns] == Kind.VIDEO).any():
        raise SiteUnavailable(
            f"{at!r} selects a video beside images, which {site.name!r} projects in a second call "
            "that no hook sees; edit blocks.0.hook_resid_pre, or leave the images out"
        )
    if -1 in where:
        raise SiteUnavailable(
            f"{at!r} selects positions that show no image, and {site.name!r} has only image "
            "tokens; select with il.image"
        )
    return rows, columns, ordinals, flat[where]


def _scatter(
    site: Site,
    act: torch.Tensor,
    chunk: Chunk,
    rows: np.ndarray,
    places: np.ndarray,
    new: torch.Tensor,
) -> torch.Tensor:
    out = act.clone()
    if not site.is_vision:
        out[rows, places] = new
        return out
    slots = _image_slots(chunk)
    where = [slots[int(r), int(c)] for r, c in zip(rows, places, strict=True)]
    out.view(-1, act.shape[-1])[where] = new
    return out


def _in_heads(
    heads: tuple[int, ...], site: Site, old: torch.Tensor, new: torch.Tensor
) -> torch.Tensor:
    """The new states in some heads, the old ones in the others: (cell, head, ...)."""
    if site.kind.axes[2:3] != ("head",):
        raise InputError(
            f"{site.name!r} has the axes {', '.join(site.kind.axes)} and no heads; leave heads "
            "out, or name a site such as 'blocks.0.attn.hook_z'"
        )
    if max(heads) >= old.shape[1]:
        raise InputError(
            f"heads names head {max(heads)} of {site.name!r}, which has heads 0 to "
            f"{old.shape[1] - 1}"
        )
    mixed = old.clone()
    mixed[:, list(heads)] = new[:, list(heads)]
    return mixed


def _check_fit(given: States | None, act: torch.Tensor, site: Site, edit: Edit) -> None:
    if given is not None and given.values.shape[2:] != act.shape[1:]:
        raise DonorError(
            f"{type(edit).__name__} brings states of shape {tuple(given.values.shape[2:])} to "
            f"{site.name!r}, whose states have shape {tuple(act.shape[1:])}; "
            "take them from the same site of the same model"
        )
    if given is not None and (given.values.dtype != act.dtype or given.values.device != act.device):
        raise DonorError(
            f"{type(edit).__name__} brings states in {given.values.dtype} on "
            f"{given.values.device} to {site.name!r}, whose states are in {act.dtype} on "
            f"{act.device}; make the donor run with the same model, dtype and device"
        )
