"""Attention knockout, layer by layer: along which edges does what the answer needs come?

Source: Geva et al. (2023), "Dissecting recall of factual associations in auto-regressive language
models", section 5: edges are cut in windows of layers.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from tqdm import tqdm

from imaginelens.hooks import Edit, Knockout, LatentModel, Pairs, Sham
from imaginelens.hooks.errors import InputError
from imaginelens.hooks.metrics import Metric, Readout, log_prob
from imaginelens.hooks.patching import Context, check_arguments
from imaginelens.hooks.positions import Positions
from imaginelens.mediation.arm import Arm, do
from imaginelens.mediation.asked import Asked, asked, check_data
from imaginelens.mediation.behind_prefix import FLAGS
from imaginelens.mediation.cells import Cell
from imaginelens.mediation.effect_map import EffectMap
from imaginelens.mediation.provenance import Provenance
from imaginelens.mediation.selecting import cells_of
from imaginelens.mediation.sweep import joined


def attention_knockout(
    lens: LatentModel,
    data: Pairs | Sequence[Any],
    *,
    queries: Positions | None,
    keys: Positions,
    window: int = 1,
    heads: bool = False,
    metric: Metric = log_prob,
    context: Context = "fixed",
    batch_size: int = 16,
) -> EffectMap:
    """Cut the edges of attention from `queries` to `keys` in each window of layers, and in all.

    A cell's effect is metric(cut) - metric(uncut): `map["pattern", 3]` in the window that starts at
    layer 3, `map["all layers"]` in all at once, which is not what windows add up to. Uncut runs
    take the same written-out attention, so that an edge that no head gives any weight has an effect
    of exactly 0.

    Args:
        data: examples, whose answer is the one the model gives; or `il.Pairs`, whose bases are run.
        queries: who no longer looks; None is everyone. In fixed context `il.deciding` is what
            writes the answer.
        keys: what is no longer looked at.
        window: how many neighbouring layers are cut together; there is one cell for each layer that
            a window can start at.
        heads: a cell for each head.

    Raises:
        EditTouchedNothing: no edge was cut in any example.
        InputError: an argument is not what it should be.
        SiteUnavailable: the model's attention cannot be reached.

    >>> import imaginelens as il
    >>> lens = il.load("latent-content")
    >>> task = lens.task(n=4, seed=0)
    >>> cut = attention_knockout(lens, task, queries=il.deciding, keys=il.latent)
    >>> [cut["pattern", layer].value < -1 for layer in range(3)], cut["all layers"].value < -1
    ([False, True, False], True)
    """
    _check(queries, keys, metric, context, data, batch_size)
    parts = list(asked(lens, data, metric=metric, size=batch_size, context=context))
    runs = [part.run for part in parts]
    name = f"{'everyone' if queries is None else repr(queries)} -> {keys!r}"
    chosen = cells_of(lens, runs, sites="pattern", positions=[keys], heads=heads, window=window)
    cells = [replace(cell, position=name) for cell, _ in chosen]
    every = tuple(dict.fromkeys(site for cell in cells for site in cell.sites))
    cells.append(Cell("all layers", None, name, None, every))
    study = _Cuts(lens, queries, keys, tuple(cells), metric, context)
    with tqdm(total=len(runs), desc="knockout", unit="batch", delay=3, leave=False) as bar:
        return joined([study.measured(part, bar) for part in parts])


@dataclass(frozen=True, eq=False)
class _Cuts:
    lens: LatentModel
    queries: Positions | None
    keys: Positions
    cells: tuple[Cell, ...]
    metric: Metric
    context: Context

    def measured(self, part: Asked, bar: Any) -> EffectMap:
        """The map of some inputs."""
        started, forwards = time.perf_counter(), part.forwards
        every = self.cells[-1].sites
        arms = [self._arm(part, part.read, Sham(), every[:1])]
        before = arms[0].after
        arms.append(self._arm(part, before, Sham(), every[-1:]))
        for cell in self.cells:
            heads = None if cell.head is None else [cell.head]
            arms.append(self._arm(part, before, Knockout(self.queries, heads=heads), cell.sites))
        bar.update()
        plain, uncut, sham, *after = (
            self._values(read, before) for read in (part.read, *(arm.after for arm in arms))
        )
        forwards += sum(1 if a.run is part.run else 1 + a.run.forwards for a in arms)
        gap = float(np.nanmax(np.abs(uncut - plain), initial=0.0))
        told = [_told(arm) for arm in arms[2:]]
        return EffectMap(
            cells=self.cells,
            before=uncut,
            other=None,
            after=np.stack(after),
            flags=np.stack([flags for flags, _ in told]),
            change=np.stack([change for _, change in told]),
            groups=None if part.pairs.groups is None else tuple(part.pairs.groups),
            metric=self.metric.name,
            unit=self.metric.unit,
            binary=self.metric.binary,
            direction="denoise",
            context=self.context,
            edit="Knockout",
            sham=sham - uncut,
            notes=(
                "each cell one forward: edges are cut inside attention",
                f"attention written out moves the metric of uncut runs by {gap:.0e} at most",
            ),
            provenance=Provenance.of(
                self.lens,
                keys=part.run.tokens.keys,
                seed=0,
                formula=f"{self.metric.name}(cut) - {self.metric.name}(uncut), {self.context} "
                "context",
                forwards=forwards,
                seconds=time.perf_counter() - started,
            ),
        )

    def _arm(self, part: Asked, before: Readout, edit: Edit, sites: Sequence[str]) -> Arm:
        return do(
            self.lens, part.run, before, edit, name=type(edit).__name__, sites=sites, at=self.keys,
            context=self.context,
        )  # fmt: skip

    def _values(self, read: Readout, before: Readout) -> np.ndarray:
        return self.metric(replace(read, unedited=before)).double().cpu().numpy()


def _told(arm: Arm) -> tuple[np.ndarray, np.ndarray]:
    """Flag and relative change of each row."""
    n = len(arm.run)
    flags, change = np.zeros(n, dtype=np.int8), np.full(n, np.nan)
    for row, flag in arm.landing.flags.items():
        flags[row] = FLAGS[flag]
    change[arm.landing.rows] = 1.0  # an edge is cut wholly
    return flags, change


def _check(queries: Any, keys: Any, metric: Any, context: Any, data: Any, batch_size: Any) -> None:
    check_arguments(at=keys, metric=metric)
    check_data(data, batch_size)
    Knockout(queries)  # refuses what is no selector
    if context not in ("free", "fixed"):
        raise InputError(f"context is {context!r}; choose 'free' or 'fixed'")
