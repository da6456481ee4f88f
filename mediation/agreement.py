"""How an approximation of patching compares with patching itself, on cells drawn at random."""

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from jaxtyping import Bool, Float
from scipy import stats

from imaginelens.mediation.cells import Cell
from imaginelens.mediation.result_files import Saved

CLOSE, ROUGH = 0.1, 0.5  # relative error of what agrees, and of what fails
RANKED = 0.8  # rank correlation of an order that holds


@dataclass(frozen=True, eq=False, repr=False)
class Agreement(Saved):
    """An approximation and exact patching, side by side.

    Some cells were drawn at random from the whole map: the errors and correlations are of these,
    over all examples. The cells that the approximation names as largest were patched as well, so
    that what it missed can be bounded.

    Attributes:
        cells: those that were patched, and `drawn` which of them at random, `named` which as the
            largest by the approximation (mean size over examples).
        approximate, exact: their effects; nan where there is no answer.
        n_cells: how many cells the map has.
        method: what is compared.
        unit: of the effects.
        floor: what counts as no effect at all, for rounding.
    """

    cells: tuple[Cell, ...]
    approximate: Float[np.ndarray, "cell example"]
    exact: Float[np.ndarray, "cell example"]
    drawn: Bool[np.ndarray, " cell"]
    named: Bool[np.ndarray, " cell"]
    n_cells: int
    method: str
    unit: str
    floor: float = 0.0

    @cached_property
    def _points(self) -> tuple[np.ndarray, np.ndarray]:
        """What is compared: every drawn cell in every example that has a value."""
        found, true = self.approximate[self.drawn].ravel(), self.exact[self.drawn].ravel()
        there = ~np.isnan(found + true)
        return found[there], true[there]

    @cached_property
    def _sizes(self) -> np.ndarray:
        """The mean size of each cell's exact effect."""
        return mean_size(self.exact)

    @property
    def n(self) -> int:
        """How many effects are compared: drawn cells times examples with an answer."""
        return len(self._points[0])

    @cached_property
    def pearson(self) -> float:
        """Pearson's correlation; nan with fewer than three points, or if a side does not vary."""
        return _correlation(*self._points)

    @cached_property
    def spearman(self) -> float:
        """Spearman's rank correlation; nan as `pearson`."""
        found, true = self._points
        return _correlation(stats.rankdata(found), stats.rankdata(true))

    @cached_property
    def max_error(self) -> float:
        """The largest difference."""
        found, true = self._points
        return float(np.abs(found - true).max(initial=0.0))

    @cached_property
    def relative_error(self) -> float:
        """Root of sum (approximate - exact)^2 / sum exact^2: 1 is as wrong as finding nothing."""
        found, true = self._points
        error, size = float(((found - true) ** 2).sum()), float((true**2).sum())
        return float(np.sqrt(error / size)) if size else (0.0 if error == 0 else float("inf"))

    @cached_property
    def recall(self) -> float:
        """Of the largest cells among those patched, as many as are named: the share it names."""
        k = int(self.named.sum())
        largest = np.argsort(-np.nan_to_num(self._sizes), kind="stable")[:k]
        return float(self.named[largest].mean())

    @cached_property
    def missed(self) -> float:
        """The largest exact effect, by mean size, of a drawn cell that is not named; 0 if all are
        named."""
        return float(np.nan_to_num(self._sizes[self.drawn & ~self.named]).max(initial=0.0))

    @property
    def exceeding(self) -> tuple[int, int]:
        """How many of the drawn cells that are not named exceed the smallest named, and of how
        many."""
        others = self._sizes[self.drawn & ~self.named]
        smallest = np.nan_to_num(self._sizes[self.named]).min()
        return int((others > smallest).sum()), len(others)

    def missed_share(self, *, level: float = 0.95) -> float:
        """An upper bound on the share of cells not named whose effect exceeds the smallest named.

        Clopper and Pearson's, one-sided, from the drawn cells; the share itself if all cells were
        patched.

        >>> cells = tuple(Cell("z", i, "latent[0]", None, ()) for i in range(3))
        >>> effects = np.array([[3.0], [1.0], [0.0]])
        >>> draws, names = np.array([True, True, True]), np.array([True, False, False])
        >>> found = Agreement(cells, effects, effects, draws, names, 10, "atp", "logits")
        >>> round(found.missed_share(), 4)
        0.7764
        """
        x, n = self.exceeding
        if n == self.n_cells - int(self.named.sum()):
            return x / n if n else 0.0
        return 1.0 if x == n else float(stats.beta.ppf(level, x + 1, n - x))

    @property
    def fails(self) -> bool:
        """Whether the values must not be reported: they are off by more than half of the exact
        effects."""
        return not self._nothing and self.relative_error > ROUGH

    @property
    def _nothing(self) -> bool:
        """Whether neither side finds more than rounding."""
        return all(np.abs(side).max(initial=0.0) <= self.floor for side in self._points)

    @property
    def verdict(self) -> str:
        """What to do with the approximation, in a sentence."""
        if not self.n:
            return (
                f"{self.method} could not be compared: no drawn cell has an effect with an answer"
            )
        if self._nothing:
            return f"{self.method} and exact patching agree that nothing here has an effect"
        off = f"off by {self.relative_error:.1%} of the exact effects"
        if self.fails:
            holds = self.spearman >= RANKED and self.recall == 1
            order = "though its order holds" if holds else "nor does its order hold"
            return (
                f"{self.method} FAILS here: it is {off}, so its values must not be reported, "
                f"{order} (rank correlation {self.spearman:.2f}); patch the cells exactly with "
                "il.sweep, or try another method"
            )
        if self.relative_error > CLOSE:
            return (
                f"{self.method} is rough here: it is {off} (rank correlation {self.spearman:.2f}); "
                "use it to choose cells, and report exact effects"
            )
        return f"{self.method} agrees with exact patching: it is {off}"

    def __repr__(self) -> str:
        x, n = self.exceeding
        return "\n".join(
            [
                f"Agreement on {int(self.drawn.sum())} of {self.n_cells} cells, {self.n} effects "
                f"({self.unit}): {self.verdict}",
                f"  Pearson {self.pearson:.3f}, Spearman {self.spearman:.3f}, largest error "
                f"{self.max_error:.3g}",
                f"  of the {int(self.named.sum())} largest patched cells it names "
                f"{self.recall:.0%}; of cells not named {x} of {n} exceed the smallest named (at "
                f"most {self.missed_share():.0%} of all, 95%), the largest is {self.missed:.3g}",
            ]
        )


def mean_size(effects: np.ndarray) -> np.ndarray:
    """The mean of |effect| over the examples that have one; nan where none has."""
    there = ~np.isnan(effects)
    total = np.where(there, np.abs(effects), 0.0).sum(1)
    return np.divide(total, there.sum(1), out=np.full(len(effects), np.nan), where=there.any(1))


def _correlation(one: np.ndarray, other: np.ndarray) -> float:
    if len(one) < 3 or np.ptp(one) == 0 or np.ptp(other) == 0:
        return float("nan")
    return float(np.corrcoef(one, other)[0, 1])
