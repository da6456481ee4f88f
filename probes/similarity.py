"""How alike states are, between examples, steps and sites, with what is needed to read it.

The formulas are those of `imaginelens.estimates.similarity`, shared with `il.input_dependence`:
here they are asked of collected states. A raw cosine near 1 says little: hidden states share a
large common vector, and a label may be read perfectly beside it (see `probe_map`). So the centred
and whitened cosine, the rank of as many isotropic rows and the controls that came with the states
stand beside it.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Bool, Float, Int

from imaginelens.estimates import Estimate, EstimateError, Rank, Retrieval, Rsa
from imaginelens.estimates import cka as cka_of
from imaginelens.estimates import cosines as cosines_of
from imaginelens.estimates import rank as rank_of
from imaginelens.estimates import retrieval as retrieval_of
from imaginelens.estimates import rsa as rsa_of
from imaginelens.estimates.alike import Inter, Intra, by_unit
from imaginelens.estimates.similarity import Kind
from imaginelens.hooks.errors import InputError
from imaginelens.probes.states import States

if TYPE_CHECKING:
    import pandas as pd

FEWEST = 3  # examples at a step, below which nothing is said of it
_KINDS: tuple[Kind, ...] = ("raw", "centred", "whitened")


@dataclass(frozen=True, repr=False, eq=False)
class Similarity:
    """How alike collected states are; `similarity` makes one. Nothing is computed before asked.

    Attributes:
        states: with `.controls`, the same examples seen otherwise, for comparison.
    """

    states: States

    @cached_property
    def steps(self) -> tuple[int, ...]:
        """The steps that at least 3 examples have; the others are left out."""
        return tuple(np.flatnonzero(self.states.mask.sum(0) >= FEWEST).tolist())

    def inter(self, step: int, site: str | int = 0) -> Inter:
        """The cosines of all pairs of examples at one step: the paper's heat-maps.

        Raises:
            InputError: fewer than 3 examples have that step, or there is no such site.
        """
        rows = self._rows(step)
        return Inter.of(self._read(step, site, rows), rows)

    def intra(self, site: str | int = 0) -> Intra:
        """The cosines of the steps of each example.

        Raises:
            InputError: there is no such site.
        """
        states, layer = self.states, self.states.layer(site)
        rows = np.flatnonzero(states.mask.any(1))
        steps = states.shape[1]
        values = np.zeros((len(rows), steps, states.shape[3]))
        mask = states.mask[rows]
        for step in range(steps):
            there = mask[:, step]
            if there.any():
                values[there, step] = states.cells.read(step, layer, rows[there])
        return Intra(values, mask, self._units[rows])

    def matrix(self, site: str | int = 0, *, kind: Kind = "raw") -> Float[np.ndarray, "step step"]:
        """The mean cosine of every two steps of an example."""
        return self.intra(site).matrix(kind)

    def curve(self, site: str | int = 0, *, kind: Kind = "raw") -> dict[int, Estimate]:
        """The mean cosine between examples at each step, with its interval: the paper's Figure 2.

        A mean over pairs is a U-statistic; its interval is that of each example's part in it, and
        pairs of one group are left out. Centred, the mean is about -1/(n - 1) whatever the states
        are: read single pairs there, or `retrieval`.
        """
        return {step: self._between(step, site, kind) for step in self.steps}

    def steps_curve(self, site: str | int = 0, *, kind: Kind = "raw") -> dict[int, Estimate]:
        """The mean cosine of each step with the one before in the same example, from step 1."""
        intra = self.intra(site)
        found = intra.per_input(kind)
        made = {}
        for step in range(1, found.shape[1]):
            values = by_unit(found[:, step - 1, step], intra.units)
            if (~np.isnan(values)).sum() >= 2:
                name = f"{kind} cosine of steps {step - 1} and {step}"
                made[step] = Estimate.mean(values, name=name)
        return made

    def rank(self, step: int, site: str | int = 0) -> Rank:
        """How many dimensions a step's states fill, beside as many isotropic rows.

        Raises:
            InputError: as `inter`.
        """
        return rank_of(self._read(step, site, self._rows(step)))

    def cka(
        self,
        first: str | int,
        second: str | int,
        *,
        step: int = 0,
        other_step: int | None = None,
        control: str | None = None,
    ) -> float:
        """Debiased CKA of two sites, at one step or two, or of a site and a control's.

        Args:
            second: a site of these states, or of the control.
            other_step: the step of the second; the same if left out.
            control: the name of one of `states.controls`, whose states the second are.

        Raises:
            InputError: there is no such step, site or control.
            EstimateError: fewer than 4 examples have both.
        """
        return cka_of(*self._both(first, second, step, other_step, control)[0])

    def rsa(
        self,
        first: str | int,
        second: str | int,
        *,
        step: int = 0,
        other_step: int | None = None,
        control: str | None = None,
        kind: Kind = "centred",
        permutations: int = 1000,
        seed: int = 0,
    ) -> Rsa:
        """Spearman's correlation of the distances at two sites, with a permutation test.

        Args:
            first, second, step, other_step, control: as `cka`.

        Raises:
            InputError, EstimateError: as `cka`.
        """
        (x, y), rows = self._both(first, second, step, other_step, control)
        groups = None if self.states.groups is None else self._units[rows].tolist()
        return rsa_of(x, y, kind=kind, groups=groups, permutations=permutations, seed=seed)

    def retrieval(
        self,
        step: int,
        site: str | int = 0,
        *,
        kind: Kind = "centred",
        permutations: int = 1000,
        seed: int = 0,
    ) -> Retrieval:
        """How often the nearest other example has the same label, beside chance; ties in shares.

        Raises:
            InputError: the states have no labels, or as `inter`.
            NothingToFind: all or none share a label.
        """
        if self.states.labels is None:
            raise InputError("the states have no labels to find; use states.relabelled(labels)")
        rows = self._rows(step)
        rows = rows[np.isin(rows, self.states.having(step))]
        labels = self.states.target(step, rows)
        assert labels is not None
        return retrieval_of(
            self._read(step, site, rows),
            labels=labels.tolist(),
            groups=None if self.states.groups is None else self._units[rows].tolist(),
            kind=kind,
            permutations=permutations,
            seed=seed,
        )

    @cached_property
    def controls(self) -> Mapping[str, "Similarity"]:
        """The same of the controls that came with the states: how alike dummies are, say."""
        return MappingProxyType(
            {name: Similarity(control) for name, control in self.states.controls.items()}
        )

    def plot(self, site: str | int = 0, **options: Any) -> Any:
        """The cosine of every two examples as a figure, a panel for each step.

        Args:
            options: of `imaginelens.view.probing.similarity_matrices`: kind, steps, order, title.
        """
        from imaginelens.view.probing import similarity_matrices

        return similarity_matrices(self, site=site, **options)

    def to_dataframe(self) -> "pd.DataFrame":
        """One row per step and site: n, the mean cosines between examples (raw with its interval),
        the raw cosine with the step before, ranks beside isotropic ones, and "raw, NAME" for each
        control that has the step and site."""
        import pandas as pd

        rows = []
        for site in self.states.sites:
            before = self.steps_curve(site)
            rows += [self._row(step, site, before.get(step)) for step in self.steps]
        return pd.DataFrame(rows).sort_values("step", kind="stable", ignore_index=True)

    def summary(self, site: str | int = 0) -> str:
        """How alike the states of different examples are, beside the controls, in one sentence."""
        curve = self.curve(site)
        step = max(curve, key=lambda s: curve[s].value)
        name = self.states.sites[self.states.layer(site)]
        beside = [
            f"{control} {value:.3f}"
            for control, value in self._beside(step, name).items()
            if not np.isnan(value)
        ]
        return (
            f"States of different examples are most alike at step {step} of {len(curve)}, {name}: "
            f"mean raw cosine {curve[step].value:.3f} {curve[step].ci()}"
            + (f" ({', '.join(beside)})" if beside else "")
            + f", effective rank {self.rank(step, site)}; a raw cosine does not say what can be "
            "read there."
        )

    def __repr__(self) -> str:
        return f"Similarity(of {self.states!r}; steps {list(self.steps)})"

    # ---- parts -----------------------------------------------------------------------------

    @cached_property
    def _units(self) -> Int[np.ndarray, " example"]:
        every = np.arange(len(self.states))
        units = self.states.units(every)
        return every if units is None else units

    def _rows(self, step: int) -> Int[np.ndarray, " row"]:
        if step not in self.steps:
            raise InputError(
                f"step {step} was asked for, and {FEWEST} examples or more have the steps "
                f"{list(self.steps)}; choose one of these"
            )
        return np.flatnonzero(self.states.mask[:, step])

    def _read(
        self, step: int, site: str | int, rows: Int[np.ndarray, " row"]
    ) -> Float[np.ndarray, "row d_model"]:
        return self.states.cells.read(step, self.states.layer(site), rows).astype(np.float64)

    def _between(self, step: int, site: str | int, kind: Kind) -> Estimate:
        rows = self._rows(step)
        found = cosines_of(self._read(step, site, rows), kind=kind)
        units = self._units[rows]
        found[units[:, None] == units] = np.nan
        return Estimate.mean(
            by_unit(_parts(found), units), name=f"{kind} cosine between examples at step {step}"
        )

    def _both(
        self,
        first: str | int,
        second: str | int,
        step: int,
        other_step: int | None,
        control: str | None,
    ) -> tuple[tuple[Float[np.ndarray, "row a"], Float[np.ndarray, "row b"]], np.ndarray]:
        """Two sets of states of the same examples, and which examples."""
        if control is not None and control not in self.controls:
            there = ", ".join(self.controls) or "none"
            raise InputError(f"there is no control {control!r}; these states have {there}")
        other = self if control is None else self.controls[control]
        if other_step is None:
            other_step = 0 if other.states.shape[1] == 1 else step
        rows = np.intersect1d(self._rows(step), other._rows(other_step))
        return (self._read(step, first, rows), other._read(other_step, second, rows)), rows

    def _row(self, step: int, site: str, before: Estimate | None) -> dict[str, Any]:
        inter, found = self.inter(step, site), self.rank(step, site)
        raw = self._between(step, site, "raw")
        low, high = raw.ci().low, raw.ci().high
        row = {"step": step, "site": site, "n": len(inter.inputs)}
        row |= {"raw": raw.value, "raw_low": low, "raw_high": high}
        row |= {kind: inter.mean(kind) for kind in _KINDS[1:]}
        row["previous"] = float("nan") if before is None else before.value
        row |= {"effective_rank": found.effective, "effective_rank_null": found.null_effective}
        row |= {
            "participation": found.participation,
            "participation_null": found.null_participation,
        }
        return row | {f"raw, {name}": value for name, value in self._beside(step, site).items()}

    def _beside(self, step: int, site: str) -> dict[str, float]:
        """The mean raw cosine of each control at a step and site; nan where it has none."""
        found = {}
        for name, control in self.controls.items():
            own = step if control.states.shape[1] > 1 else 0
            where = 0 if len(control.states.sites) == 1 else site
            known = where == 0 or site in control.states.sites
            there = known and own in control.steps
            found[name] = control._between(own, where, "raw").value if there else float("nan")
        return found


def similarity(states: States) -> Similarity:
    """How alike states of different examples, steps and sites are.

    Raises:
        InputError: no step is had by 3 examples.

    >>> noise = np.random.default_rng(0).normal(size=(20, 2, 64))
    >>> found = similarity(States.of(50 + noise))
    >>> {step: round(cosine.value, 2) for step, cosine in found.curve().items()}
    {0: 1.0, 1: 1.0}
    >>> round(found.inter(0).mean("centred"), 3)
    -0.052
    """
    made = Similarity(states)
    if not made.steps:
        most = int(states.mask.sum(0).max(initial=0))
        raise InputError(
            f"no step is had by {FEWEST} examples (the most: {most}), and fewer compare nothing; "
            "collect more"
        )
    return made


def _parts(cosines: Float[np.ndarray, "row row"]) -> Float[np.ndarray, " row"]:
    """What each row adds to the mean over pairs: values with that mean, and the spread that a
    U-statistic's first-order variance asks for (twice that of the rows' means)."""
    there: Bool[np.ndarray, "row row"] = ~np.isnan(cosines)
    counts = there.sum(1)
    if not counts.any():
        raise EstimateError("no two examples are of different groups; collect other groups")
    total = np.where(there, cosines, 0.0).sum(1)
    own = np.divide(total, counts, out=np.full(len(total), np.nan), where=counts > 0)
    whole = total.sum() / counts.sum()
    spread = 2 * (own - whole)
    return np.asarray(whole + spread - np.nanmean(spread))
