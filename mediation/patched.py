"""The cells of a map in one batch: which states of a run they name, and what replaces them."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from jaxtyping import Float, Int8

from imaginelens.hooks import LatentModel, Run
from imaginelens.hooks.errors import DonorError, InputError
from imaginelens.hooks.landing import differing
from imaginelens.hooks.patching import Context
from imaginelens.hooks.positions import Positions
from imaginelens.hooks.tokens import Kind, TokenMap
from imaginelens.mediation.cells import Cell
from imaginelens.mediation.taps import Columns, Moved, Spots, States, union

LATENT = "hook_latent"
FIRED, NOT_EMITTED, IDENTICAL_DONOR = range(3)
Selected = Sequence[tuple[Cell, Positions]]
ByCell = Float[np.ndarray, "cell example"]


@dataclass(frozen=True, eq=False)
class Takes:
    """What one cell takes: for each of its states the row, its spot, and the number of the state
    that is given."""

    rows: list[int]
    spots: list[int]
    given: list[int]


@dataclass(frozen=True, eq=False)
class Patched:
    """The cells of a map in one batch.

    Attributes:
        spots: by site, where the cells are; all latents at `hook_latent`.
        given: by site, the states of the other run that some cell takes.
        takes: what each cell takes.
    """

    cells: Selected
    n_rows: int
    spots: dict[str, Spots]
    given: dict[str, States]
    takes: tuple[Takes, ...]

    @property
    def sites(self) -> list[str]:
        """The sites of the cells, each once."""
        return list(self.spots)

    def only(self, chosen: Sequence[int]) -> "Patched":
        """Some of the cells."""
        cells, takes = [self.cells[i] for i in chosen], tuple(self.takes[i] for i in chosen)
        return replace(self, cells=cells, takes=takes)

    def flags(self, states: dict[str, States]) -> Int8[np.ndarray, "cell example"]:
        """Why a cell's state is as it was: 0 it is not, 1 a run has no such position, 2 the state
        that is given is the same, up to rounding."""
        found = np.full((len(self.cells), self.n_rows), NOT_EMITTED, dtype=np.int8)
        for i, ((cell, _), take) in enumerate(zip(self.cells, self.takes, strict=True)):
            site = cell.sites[0]
            old, new = states[site][take.spots], self.given[site][take.given]
            heads = (_of_head(old, cell), _of_head(new, cell))
            differs = differing(*heads, donated=True).tolist()
            found[i, take.rows] = IDENTICAL_DONOR
            found[i, [row for row, d in zip(take.rows, differs, strict=True) if d]] = FIRED
        return found

    def products(self, gradients: dict[str, States], states: dict[str, States]) -> ByCell:
        """Gradient times what the states would change by, summed over each cell."""
        found = np.zeros((len(self.cells), self.n_rows))
        for i, ((cell, _), take) in enumerate(zip(self.cells, self.takes, strict=True)):
            site = cell.sites[0]
            change = self.given[site][take.given].double() - states[site][take.spots].double()
            product = _of_head(gradients[site][take.spots].double() * change, cell)
            np.add.at(found[i], take.rows, product.flatten(1).sum(1).cpu().numpy())
        return found

    def moved(self, chosen: Sequence[int], states: States, share: float) -> Moved:
        """The states of some cells of one site, moved by a share of the way to what is given.

        Raises:
            InputError: two of the cells are at the same state.
        """
        site = self.cells[chosen[0]][0].sites[0]
        goal, mask = states.clone(), torch.zeros_like(states, dtype=torch.bool)
        for i in chosen:
            cell, take = self.cells[i][0], self.takes[i]
            where = (take.spots,) if cell.head is None else (take.spots, cell.head)
            what = (take.given,) if cell.head is None else (take.given, cell.head)
            if bool(mask[where].any()):
                raise InputError(
                    f"{cell.position} shares states with another cell of {site!r}, and one path "
                    "cannot give both theirs; choose positions that do not overlap, or path='cell'"
                )
            goal[where], mask[where] = self.given[site][what], True
        way = states.double() + share * (goal.double() - states.double())
        return Moved(goal if share == 1 else way.to(states), mask)


def patched(
    lens: LatentModel, run: Run, tokens: TokenMap, partner: Run, cells: Selected, context: Context
) -> tuple[Patched, int]:
    """Find the cells of a batch, and run the partner for what it gives; also, in how many forwards.

    Args:
        tokens: the map of what is read of `run`.

    Raises:
        InputError: a site holds no states of these positions.
        DonorError: the partner has some of a cell's positions, but not all.
    """
    donor, forwards = donor_of(lens, partner, cells, context)
    pairs = {
        (cell.sites[0] == LATENT, repr(at)): _pairs(
            tokens, donor, at, latents=cell.sites[0] == LATENT
        )
        for cell, at in cells
    }
    names = ", ".join(dict.fromkeys(repr(at) for _, at in cells))
    n_rows = len(tokens)
    spots: dict[str, Spots] = {}
    given: dict[str, States] = {}
    number: dict[str, dict[tuple[int, int], int]] = {}
    for site in dict.fromkeys(cell.sites[0] for cell, _ in cells):
        _check_site(lens, site)
        mine = [pairs[site == LATENT, repr(at)] for cell, at in cells if cell.sites[0] == site]
        places = [(row, column) for found in mine for row, column, _ in found]
        if site == LATENT:
            places = [(r, int(c)) for r in range(n_rows) for c in tokens.columns(r, Kind.LATENT)]
        if lens.registry[site].is_vision:
            _check_image(tokens, places, site, names)
        spots[site] = union(n_rows, places, names)
        wanted = union(n_rows, [(row, other) for found in mine for row, _, other in found], names)
        held = donor.states(site, Columns(wanted.of_rows, names))
        given[site] = held.values[held.mask]
        number[site] = wanted.index()
    takes = []
    for cell, at in cells:
        site = cell.sites[0]
        at_spots, found = spots[site].index(), pairs[site == LATENT, repr(at)]
        takes.append(
            Takes(
                [row for row, _, _ in found],
                [at_spots[row, column] for row, column, _ in found],
                [number[site][row, other] for row, _, other in found],
            )
        )
    return Patched(cells, n_rows, spots, given, tuple(takes)), forwards


def donor_of(lens: LatentModel, run: Run, cells: Selected, context: Context) -> tuple[Run, int]:
    """A run with its states captured at all cells, on the path that an edited one takes."""
    modules = [s for s in dict.fromkeys(s for cell, _ in cells for s in cell.sites) if s != LATENT]
    positions = tuple({repr(at): at for _, at in cells}.values())  # slices are no keys
    if not modules:
        return run, 0
    if context == "free":
        donor = lens.rerun(run, names_filter=modules, positions=positions)
        return donor, donor.forwards
    with torch.no_grad():
        _, cache = lens.run_with_cache(run, names_filter=modules, positions=positions)
    return replace(run, cache=cache), 1


def _pairs(
    tokens: TokenMap, donor: Run, at: Positions, *, latents: bool
) -> list[tuple[int, int, int]]:
    """Row, column of the run and column of the donor of what a selector exchanges, by number."""
    found = []
    for row in range(len(tokens)):
        mine = list(enumerate(at.resolve(tokens, row).tolist()))
        theirs = at.resolve(donor.tokens, row).tolist()
        if latents:
            mine = [(k, c) for k, c in mine if tokens.kind[row, c] == Kind.LATENT]
            theirs = [c for c in theirs if donor.tokens.kind[row, c] == Kind.LATENT]
        for ordinal, column in mine:
            if not theirs:
                break
            if ordinal >= len(theirs):
                raise DonorError(
                    f"row {row} of the donor has {len(theirs)} states at {at!r} and the run has "
                    f"more; select single ones, as in positions=il.latent"
                )
            found.append((row, column, theirs[ordinal]))
    return found


def _check_site(lens: LatentModel, name: str) -> None:
    if lens.registry[name].kind.slot == "pattern":
        raise InputError(
            f"{name!r} holds a number per key, and two runs have other keys, so that no difference "
            "is defined; name 'z', 'rot_q' or 'rot_k' instead"
        )


def _check_image(
    tokens: TokenMap, places: Sequence[tuple[int, int]], site: str, names: str
) -> None:
    if any(tokens.kind[place] != Kind.IMAGE for place in places):
        raise InputError(
            f"{names} selects positions that show no image, and {site!r} has only image tokens; "
            "select with il.image"
        )


def _of_head(states: torch.Tensor, cell: Cell) -> torch.Tensor:
    """The part of some states, (spot, ...), that is of the cell's head."""
    return states if cell.head is None else states[:, cell.head : cell.head + 1]
