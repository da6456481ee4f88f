"""Attribution patching with the softmax of attention computed anew: for queries and keys.

Where attention is saturated its gradient is nearly 0, and plain attribution patching misses what
other queries or keys would change. The fix (Kramar et al. 2024, arXiv 2403.00745, section 3.1.1)
patches the query or key for itself, and multiplies the change of the pattern by the gradient with
respect to the pattern.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from imaginelens.hooks import Edit, Landing
from imaginelens.hooks.entries import Chunk, EditEntry, HookEntry
from imaginelens.hooks.errors import InputError
from imaginelens.hooks.positions import generated
from imaginelens.mediation.cells import Cell
from imaginelens.mediation.first_order import Approximated
from imaginelens.mediation.gradients import Reading, Rules, keeping
from imaginelens.mediation.patched import Patched
from imaginelens.mediation.taps import Spots, Tap, tap

FIXED = ("q", "k", "rot_q", "rot_k")


@dataclass(eq=False)
class _Scores(EditEntry):
    """A read of the scores of attention, masked."""

    kept: dict[str, torch.Tensor] = field(default_factory=dict)

    @property
    def along_edges(self) -> bool:
        return True

    def cut(self, site: str, chunk: Chunk, scores: torch.Tensor) -> torch.Tensor:
        self.kept[site] = scores.detach()
        return scores


@dataclass(frozen=True, eq=False)
class _Attention:
    """One layer's attention in the unedited run: queries and keys after rotation as (example, head,
    position, d_head), scores and the gradient at the pattern as (example, head, query, key)."""

    queries: torch.Tensor
    keys: torch.Tensor
    scores: torch.Tensor
    gradient: torch.Tensor
    scale: float
    cap: float | None

    @property
    def visible(self) -> torch.Tensor:
        """Which edges the mask leaves."""
        return self.scores > torch.finfo(self.scores.dtype).min / 2

    def scored(self, queries: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
        """Scores of (head, position, d_head), or of one of the two (head, d_head) only."""
        scores = queries @ keys.transpose(-1, -2) * self.scale
        return scores if self.cap is None else self.cap * torch.tanh(scores / self.cap)

    @property
    def per_key(self) -> int:
        """How many heads read one key head."""
        return self.queries.shape[1] // self.keys.shape[1]

    def off(self) -> float:
        """How far scores that are computed here are from the model's."""
        keys = self.keys.repeat_interleave(self.per_key, dim=1)
        found = torch.where(self.visible, self.scored(self.queries, keys) - self.scores, 0.0)
        size = torch.where(self.visible, self.scores, 0.0).abs().max().clamp_min(1e-30)
        return float(found.abs().max() / size)

    def with_query(self, row: int, column: int, head: int | None, new: torch.Tensor) -> float:
        """What a query (head, d_head) would change, to first order behind the pattern."""
        keys = self.keys[row].repeat_interleave(self.per_key, dim=0)
        there = self.visible[row, :, column]
        old = self.scores[row, :, column]
        scores = torch.where(there, self.scored(new[:, None], keys)[:, 0], old)
        change = _softmax(scores) - _softmax(old)
        product = (change * self.gradient[row, :, column].double()).sum(-1)
        return float(product.sum() if head is None else product[head])

    def with_keys(
        self, row: int, columns: Sequence[int], head: int | None, new: torch.Tensor
    ) -> float:
        """What keys (position, head, d_head) would change, to first order behind the pattern."""
        total = 0.0
        for group in range(self.keys.shape[1]) if head is None else (head,):
            heads = slice(group * self.per_key, (group + 1) * self.per_key)
            old = self.scores[row, heads]
            put = self.scored(self.queries[row, heads], new[:, group])
            there = self.visible[row, heads][..., list(columns)]
            scores = old.clone()
            scores[..., list(columns)] = torch.where(there, put, old[..., list(columns)])
            change = _softmax(scores) - _softmax(old)
            total += float((change * self.gradient[row, heads].double()).sum())
        return total


def with_patterns(reading: Reading, cells: Patched) -> Approximated:
    """Attribution patching; at queries and keys, with their pattern computed anew.

    Raises:
        InputError: no site is a query or key, or attention computes its scores in another way.
    """
    lens = reading.lens
    layers = sorted(
        {cell.layer for cell, _ in cells.cells if cell.site in FIXED and cell.layer is not None}
    )
    if not layers:
        held = ", ".join(dict.fromkeys(cell.site for cell, _ in cells.cells))
        raise InputError(
            f"method='qk' is about queries and keys, and the sites are {held}; name 'q', 'k', "
            "'rot_q' or 'rot_k', or use method='atp'"
        )
    for layer in layers:
        lens.registry.match(_of(layer, "pattern"))  # raises where it cannot be reached
    whole = Spots(tuple(tuple(range(reading.script.tokens.width)) for _ in reading.run.texts))
    taps = {site: tap(site, spots) for site, spots in cells.spots.items()}
    patterns = {layer: tap(_of(layer, "pattern"), whole) for layer in layers}
    kept: dict[str, list[torch.Tensor]] = {
        _of(layer, slot): [] for layer in layers for slot in ("rot_q", "rot_k")
    }
    sites = tuple(one.sites[0] for one in patterns.values())
    scores = _Scores(sites, Edit(), generated, Landing("", "", sites))
    reads = tuple(HookEntry((name,), keeping(into)) for name, into in kept.items())
    graph = reading.graph([*taps.values(), *patterns.values()], Rules(entries=(*reads, scores)))
    gradients = graph.gradients()
    states = {site: one.states for site, one in taps.items()}
    values = cells.products(gradients, states)
    for layer in layers:
        attention = _attention(reading, layer, patterns[layer], gradients, kept, scores)
        rotated = _rotated(reading, cells, states, layer)
        for i, (cell, _) in enumerate(cells.cells):
            if cell.layer == layer and cell.site in FIXED:
                values[i] = _value(attention, cells, i, cell, rotated)
    return Approximated(values, cells.flags(states), graph.values)


def _of(layer: int, slot: str) -> str:
    return f"blocks.{layer}.attn.hook_{slot}"


def _attention(
    reading: Reading,
    layer: int,
    pattern: Tap,
    gradients: dict[str, torch.Tensor],
    kept: dict[str, list[torch.Tensor]],
    scores: _Scores,
) -> _Attention:
    lens, site = reading.lens, pattern.sites[0]
    module = lens.model.get_submodule(lens.registry[site].path)
    queries, keys = (
        kept[_of(layer, slot)][0].detach().transpose(1, 2) for slot in ("rot_q", "rot_k")
    )
    scale = getattr(module, "scaling", None)
    found = _Attention(
        queries,
        keys,
        scores.kept[site],
        gradients[site].unflatten(0, (len(queries), -1)).transpose(1, 2),
        float(queries.shape[-1] ** -0.5 if scale is None else scale),
        getattr(module, "attn_logit_softcapping", None),
    )
    if found.off() > (1e-9 if queries.dtype == torch.float64 else 0.02):
        raise InputError(
            f"{type(module).__name__} does not score queries and keys by their scaled product "
            f"(off by {found.off():.2g}), so their pattern cannot be computed anew; use "
            "method='atp'"
        )
    return found


def _rotated(
    reading: Reading, cells: Patched, states: dict[str, torch.Tensor], layer: int
) -> dict[str, torch.Tensor]:
    """By site, the queries or keys that each cell's states become behind rotation (example,
    position, head, d_head); those after rotation are given as they are."""
    found = {}
    for slot in ("q", "k"):
        site = _of(layer, slot)
        chosen = [i for i, (cell, _) in enumerate(cells.cells) if cell.sites[0] == site]
        if chosen:
            seen: list[torch.Tensor] = []
            moved = tap(site, cells.spots[site], cells.moved(chosen, states[site], 1.0))
            reading.look([moved], [HookEntry((_of(layer, f"rot_{slot}"),), keeping(seen))])
            found[site] = seen[0]
    return found


def _value(
    attention: _Attention, cells: Patched, i: int, cell: Cell, rotated: dict[str, torch.Tensor]
) -> np.ndarray:
    """The value of one cell in every example."""
    take, site = cells.takes[i], cell.sites[0]
    places = cells.spots[site].places
    found = np.zeros(cells.n_rows)
    for row in dict.fromkeys(take.rows):
        mine = [j for j, r in enumerate(take.rows) if r == row]
        columns = [places[take.spots[j]][1] for j in mine]
        new = (
            rotated[site][row, columns]
            if site in rotated
            else cells.given[site][[take.given[j] for j in mine]]
        )
        if cell.site.endswith("k"):
            found[row] = attention.with_keys(row, columns, cell.head, new)
        else:
            found[row] = sum(
                attention.with_query(row, column, cell.head, one)
                for column, one in zip(columns, new, strict=True)
            )
    return found


def _softmax(scores: torch.Tensor) -> torch.Tensor:
    return scores.double().softmax(-1)
