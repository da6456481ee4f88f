"""From what a user asks for, "resid_post" at `il.latent`, to the single cells of a map."""

import re
from collections.abc import Sequence
from itertools import pairwise, product
from typing import Any

from imaginelens.hooks import LatentModel, Run
from imaginelens.hooks.errors import InputError
from imaginelens.hooks.names import NamesFilter
from imaginelens.hooks.positions import ImagePositions, LatentPositions, Positions
from imaginelens.hooks.sites import Site
from imaginelens.mediation.alignment import counts
from imaginelens.mediation.cells import Cell

_IN_A_LAYER = re.compile(r"blocks\.\d+\.(?:attn\.|mlp\.)?hook_(\w+)")


def cells_of(
    lens: LatentModel,
    runs: Sequence[Run],
    *,
    sites: NamesFilter,
    positions: Positions | Sequence[Any],
    heads: bool = False,
    window: int = 1,
    lenient: bool = False,
) -> list[tuple[Cell, Positions]]:
    """List the cells of a map, kind by kind, then by layer, head and position.

    Args:
        runs: of all inputs that the cells are for; a selector is split by what they hold.
        sites: a short name ("resid_post": in all layers), hook names, or patterns of them.
        positions: one selector, which is split: `il.latent` into its steps, as many as the longest
            run has, `il.image` into the cells of its grid; all others stay whole. Or a list of
            selectors, one cell each, as they are.
        heads: a cell for each head of the sites, which must have heads.
        window: how many neighbouring layers a cell edits together; there is one cell for each
            layer that it can start at.
        lenient: positions that no run has are no error, as these runs are some of many; a selector
            that selects nothing has its first step as its only cell.

    Raises:
        InputError: nothing to select, no such window, or sites without heads, layers or positions.
        HookNameError: no site matches.

    >>> import imaginelens as il
    >>> lens = il.load("latent-content")
    >>> runs = [lens.run(lens.task(n=1).base[0])]
    >>> found = cells_of(lens, runs, sites="resid_post", positions=il.latent[0:2])
    >>> [(cell.layer, cell.position) for cell, _ in found][:3]
    [(0, 'latent[0]'), (0, 'latent[1]'), (1, 'latent[0]')]
    """
    if not runs:
        raise InputError("no runs were given, so positions cannot be told apart; give at least one")
    if type(window) is not int or window < 1:
        raise InputError(f"window is {window!r}, expected a number of layers, 1 or more")
    selectors = split(runs, positions, lenient=lenient)
    found: list[tuple[Cell, Positions]] = []
    for kind, names in _by_kind(lens, sites).items():
        for layer, together in _windows(lens, kind, names, window):
            numbers = range(_n_heads(lens, together[0])) if heads else (None,)
            found += [
                (Cell(kind, layer, repr(at), head, together), at)
                for head, at in product(numbers, selectors)
            ]
    return found


def split(
    runs: Sequence[Run], positions: Positions | Sequence[Any], *, lenient: bool = False
) -> list[Positions]:
    """The selectors of a map's cells: a single one in its parts, a list as it is.

    Raises:
        InputError: there is no selector, one is none or twice there, or no run has its positions.
    """
    if isinstance(positions, Positions):
        found = _parts(runs, positions, lenient)
    else:
        found = list(positions)
    if not found:
        raise InputError("positions is empty; name at least one selector, such as il.latent[0]")
    for at in found:
        if not isinstance(at, Positions):
            raise InputError(
                f"positions holds {at!r}, expected selectors such as il.latent[0] or il.image[0]"
            )
    names = [repr(at) for at in found]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise InputError(f"positions holds {twice} twice; a map has one cell for each position")
    for at in found:
        if not lenient and not any(counts(run, at).any() for run in runs):
            raise InputError(
                f"no run has a position at {at!r}; look at run.tokens, and name what is there"
            )
    return found


def _parts(runs: Sequence[Run], at: Positions, lenient: bool) -> list[Positions]:
    if isinstance(at, LatentPositions) and not isinstance(at.index, int):
        return _steps(runs, at, lenient)
    if isinstance(at, ImagePositions):
        return _grid_cells(runs, at)
    return [at]


def _steps(runs: Sequence[Run], at: LatentPositions, lenient: bool) -> list[Positions]:
    whole = LatentPositions(at.span)
    sizes = {int(n) for run in runs for n in counts(run, whole)}
    most = max(sizes)
    wanted = slice(None) if at.index is None else at.index
    assert isinstance(wanted, slice)
    from_end = any(end is not None and end < 0 for end in (wanted.start, wanted.stop))
    if from_end and len(sizes) > 1:
        raise InputError(
            f"{at!r} counts from the end, and the runs have {min(sizes)} to {most} steps; count "
            "from the beginning"
        )
    steps = range(most)[wanted]
    if not steps and lenient:
        return [whole[max(wanted.start or 0, 0)]]
    if not steps:
        raise InputError(
            f"no run has a position at {at!r}: {'one has' if most else 'none has'} "
            f"{f'{most} steps at most' if most else 'a latent step'}; run inputs that feed latents "
            "back, or name other positions"
        )
    return [whole[step] for step in steps]


def _grid_cells(runs: Sequence[Run], at: ImagePositions) -> list[Positions]:
    """The cells of the grids; image tokens that show none of the picture are no cells."""
    grids = {of_row for run in runs for of_row in run.tokens.grids}
    sizes = {tuple((grid.rows, grid.cols) for grid in of_row) for of_row in grids}
    if len(sizes) > 1:
        raise InputError(
            f"{at!r} cannot be split, for the inputs have images of {len(sizes)} different grids "
            f"({', '.join(map(str, sorted(sizes)[:3]))}, ...); give images of one size, or a list "
            "of selectors"
        )
    cells = set()
    for run in runs:
        for row in range(len(run)):
            for column in at.resolve(run.tokens, row):
                place = (run.tokens.image[row, column], *run.tokens.cell[row, column])
                cells.add(tuple(int(number) for number in place))
    found: list[Positions] = [
        ImagePositions(k)[r, c] for k, r, c in sorted(cells) if min(r, c) >= 0
    ]
    return found or [at]


def _by_kind(lens: LatentModel, sites: NamesFilter) -> dict[str, list[str]]:
    """The names that a filter selects, by their kind: the short name, or the whole one of sites
    that are in no layer."""
    found: dict[str, list[str]] = {}
    for name in lens.registry.match(sites):
        if name.startswith("vision_encoder."):
            raise InputError(
                f"{name!r} holds patches, not tokens, so that no position selects in it; name "
                "'vision_projector.hook_out', or a short name such as 'resid_post'"
            )
        in_a_layer = _IN_A_LAYER.fullmatch(name)
        found.setdefault(name if in_a_layer is None else in_a_layer[1], []).append(name)
    return found


def _windows(
    lens: LatentModel, kind: str, names: Sequence[str], window: int
) -> list[tuple[int | None, tuple[str, ...]]]:
    """Each window of neighbouring layers: where it starts, and its sites."""
    layers: list[Site] = [lens.registry[name] for name in names]
    if layers[0].layer is None:
        if window > 1:
            raise InputError(
                f"{kind!r} is in no layer, so that a window of {window} layers has no meaning "
                "there; leave window out, or name a site such as 'attn_out'"
            )
        return [(None, tuple(names))]
    starts = range(len(layers) - window + 1)
    found = [tuple(layers[start : start + window]) for start in starts]
    whole = [(s[0].layer, tuple(site.name for site in s)) for s in found if _neighbours(s)]
    if not whole:
        held = ", ".join(str(site.layer) for site in layers)
        raise InputError(
            f"no {window} neighbouring layers have {kind!r} selected, which is in {held}; choose a "
            "smaller window"
        )
    return whole


def _neighbours(sites: Sequence[Site]) -> bool:
    layers = [site.layer for site in sites if site.layer is not None]
    return all(later == layer + 1 for layer, later in pairwise(layers))


def _n_heads(lens: LatentModel, name: str) -> int:
    site = lens.registry[name]
    if site.kind.axes[2:3] != ("head",):
        raise InputError(
            f"{name!r} has the axes {', '.join(site.kind.axes)} and no heads; leave heads out, or "
            "name a site such as 'z'"
        )
    if site.kind.slot == "rot_k":
        return lens.structure.n_kv_heads
    return lens.structure.n_heads if site.heads is None else site.heads
