"""The decodability gap: what can be read at the answer, minus what can be read at the latents."""

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Bool, Float

from imaginelens.estimates import Estimate, EstimateError
from imaginelens.estimates.multiplicity import Adjustment, adjust
from imaginelens.hooks.errors import InputError
from imaginelens.probes.grid_text import lines
from imaginelens.probes.map_result import ProbeMap
from imaginelens.probes.mapping import probe_map
from imaginelens.probes.states import States

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True, repr=False, eq=False)
class Gap:
    """Accuracy at the answer minus accuracy at each latent; `decodability_gap` makes one.

    The comparison is between probes of the same examples, so that each example is its own control.
    After PRISM (arXiv 2606.05753), where it is one number without an interval.

    Attributes:
        latents: the map of the latents, (step, site).
        answers: the map of the answer position, (1, site).
        adjust: how `q` allows for the number of cells.
    """

    latents: ProbeMap
    answers: ProbeMap
    adjust: Adjustment = "bh"

    @property
    def sites(self) -> tuple[str, ...]:
        """Hook names, one per layer of the latents."""
        return self.latents.sites

    @cached_property
    def value(self) -> Float[np.ndarray, "step site"]:
        """The gap, (step, site): above 0 where more can be read at the answer."""
        return self._grid(lambda cell: cell.value)

    @cached_property
    def low(self) -> Float[np.ndarray, "step site"]:
        """The lower end of each cell's interval; nan where there are too few groups for one."""
        return self._grid(lambda cell: cell.ci(level=self.latents.level).low)

    @cached_property
    def high(self) -> Float[np.ndarray, "step site"]:
        """The upper end of each cell's interval."""
        return self._grid(lambda cell: cell.ci(level=self.latents.level).high)

    @cached_property
    def p(self) -> Float[np.ndarray, "step site"]:
        """Two-sided p-values of no gap, not adjusted."""
        return self._grid(Estimate.pvalue)

    @cached_property
    def q(self) -> Float[np.ndarray, "step site"]:
        """P-values adjusted for the number of cells, by `adjust`."""
        return self.p if np.isnan(self.p).all() else adjust(self.p, method=self.adjust)

    def differs(self, alpha: float = 0.05) -> Bool[np.ndarray, "step site"]:
        """The cells with a gap, to either side."""
        return np.asarray(self.q <= alpha)

    def estimate(self, *, step: int, site: str | int = 0) -> Estimate:
        """The gap of one cell as an `Estimate` over the examples that have both.

        Raises:
            InputError: there is no such cell, or it was not probed.
            EstimateError: fewer than 10 groups.
        """
        s, k = self.latents.cell(step, site)
        before, groups = self.latents.scores[s, k], self.latents.groups
        after = self.answers.scores[0, self._at_answer[k]]
        name = f"gap of {self.latents.label} at step {s}, {self.sites[k]}"
        if self.latents.error is not None:
            return Estimate.ratio(after - before, self.latents.error[s], name=name, groups=groups)
        return Estimate.paired(after, before, name=name, groups=groups)

    def summary(self, alpha: float = 0.05) -> str:
        """What can be read where, in two sentences; never where the answer comes from."""
        found, cells = self.differs(alpha), int((~np.isnan(self.value)).sum())
        more, less = int((found & (self.value > 0)).sum()), int((found & (self.value < 0)).sum())
        s, k = np.unravel_index(np.nanargmax(self.latents.accuracy), self.value.shape)
        label, measure = self.latents.label, self.latents.measure
        ends = f"[{self.low[s, k]:.3g}, {self.high[s, k]:.3g}]"
        answer = self.answers.accuracy[0, self._at_answer[k]]
        return (
            f"{label}: more is decodable at the answer than at the latents in {more} of {cells} "
            f"cells, less in {less} ({self.adjust}-adjusted p <= {alpha:g}); at the latents' best "
            f"cell, step {s}, {self.sites[k]}, {measure} is {self.latents.accuracy[s, k]:.3g}, at "
            f"the answer {answer:.3g}: a gap of {self.value[s, k]:.3g} {ends}. "
            "Where the answer takes it from needs a causal test."
        )

    def to_dataframe(self) -> "pd.DataFrame":
        """One row per cell: step, site, latent, answer, gap, low, high, p, q."""
        import pandas as pd

        steps, sites = self.value.shape
        answer = self.answers.accuracy[0, self._at_answer]
        return pd.DataFrame(
            {
                "step": np.repeat(np.arange(steps), sites),
                "site": list(self.sites) * steps,
                "latent": self.latents.accuracy.ravel(),
                "answer": np.tile(answer, steps),
                "gap": self.value.ravel(),
                "low": self.low.ravel(),
                "high": self.high.ravel(),
                "p": self.p.ravel(),
                "q": self.q.ravel(),
            }
        )

    def __repr__(self) -> str:
        head = (
            f"Gap({self.latents.label}: {self.latents.measure} at the answer minus at the latent, "
            f"by {self.latents.kind}; * {self.adjust}-adjusted p <= 0.05)"
        )
        return "\n".join([head, *lines(self.value, self.sites, self.differs())])

    @property
    def _at_answer(self) -> list[int]:
        """The layer of the answer that each layer of the latents is compared with."""
        if len(self.answers.sites) == 1:
            return [0] * len(self.sites)
        return [self.answers.sites.index(site) for site in self.sites]

    def _grid(self, of: Any) -> Float[np.ndarray, "step site"]:
        found = np.full(self.latents.shape, np.nan)
        for s, k in np.argwhere(~np.isnan(self.latents.accuracy)).tolist():
            try:
                found[s, k] = of(self.estimate(step=s, site=k))
            except EstimateError:  # too few groups to tell how much they differ
                continue
        return found


def decodability_gap(
    latents: States,
    answers: States,
    *,
    kind: str = "ridge",
    n_folds: int = 5,
    seed: int = 0,
    permutations: int | None = None,
    adjust: Adjustment = "bh",
    level: float = 0.95,
    device: str | torch.device = "cpu",
) -> Gap:
    """How much more can be read at the answer than at each latent step and layer.

    Args:
        latents: states of the latent steps, with labels.
        answers: states of one position of the same examples in the same order, with the same
            labels: at the sites of the latents, or at a single one.

    Raises:
        InputError: the two are not of the same examples, labels or sites, or as `probe_map`.

    >>> rng = np.random.default_rng(0)
    >>> kinds = np.arange(60) % 2
    >>> early, late = rng.normal(size=(2, 60, 1, 8))
    >>> late[:, 0, 0] += 6 * kinds
    >>> gap = decodability_gap(States.of(early, kinds.tolist()), States.of(late, kinds.tolist()))
    >>> bool(gap.value[0, 0] > 0.3), gap.differs().tolist()
    (True, [[True]])
    """
    _check(latents, answers)
    options: dict[str, Any] = {
        "kind": kind,
        "n_folds": n_folds,
        "seed": seed,
        "controls": False,
        "permutations": permutations,
        "adjust": adjust,
        "level": level,
        "device": device,
    }
    return Gap(probe_map(latents, **options), probe_map(answers, **options), adjust)


def _check(latents: States, answers: States) -> None:
    if len(latents) != len(answers):
        raise InputError(
            f"{len(latents)} examples have latents and {len(answers)} answers; give states of the "
            "same examples in the same order"
        )
    if answers.shape[1] != 1:
        raise InputError(
            f"the answers have {answers.shape[1]} steps, and the gap is to one position; collect "
            "at il.before_answer"
        )
    if len(answers.sites) > 1 and not set(latents.sites) <= set(answers.sites):
        missing = sorted(set(latents.sites) - set(answers.sites))
        raise InputError(
            f"the answers lack the sites {missing}; collect both at the same, or the answers at one"
        )
    if latents.keys is not None and answers.keys is not None and latents.keys != answers.keys:
        raise InputError(
            "latents and answers are of different examples (their keys differ); collect both from "
            "the same runs"
        )
    if latents.groups != answers.groups:
        raise InputError("latents and answers have different groups; give both the same")
    if latents.labels is not None and answers.labels is not None:
        own = latents.labels
        same = own.ndim == 2 or answers.labels.ndim == 2 or (own == answers.labels).all()
        if not same:
            raise InputError("latents and answers have different labels; give both the same")
