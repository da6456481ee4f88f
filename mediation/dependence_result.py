"""Whether latents depend on the input: similarities, their controls, two tests and a verdict."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from jaxtyping import Bool, Float, Int

from imaginelens.estimates import Estimate
from imaginelens.estimates.alike import Inter, Intra, by_unit, mean
from imaginelens.estimates.inputs import group_codes
from imaginelens.estimates.similarity import (
    NothingToFind,
    Rank,
    Retrieval,
    rank,
    retrieval,
)
from imaginelens.hooks.errors import InputError
from imaginelens.mediation.dependence_runs import Baseline, relative
from imaginelens.mediation.provenance import Provenance
from imaginelens.mediation.result_files import Saved

if TYPE_CHECKING:
    import pandas as pd

Finding = Literal["tells inputs apart", "changes", "constant"]
ALPHA = 0.05
FEWEST = 3  # inputs at a step, below which nothing is said of it
PER_STEP = 40  # permutations, so that a p-value times the number of steps can be below 0.05
NEAR_ONE = 0.9  # a raw cosine that looks like collapse

_SHOWN = {
    "raw": "raw",
    "centred": "centred",
    "whitened": "whitened",
    "raw_constant": "constant",
    "raw_previous": "previous",
    "effective_rank": "rank",
    "effective_rank_null": "null rank",
    "relative_change": "change",
}
_LEGEND = (
    "  cosines between inputs: raw, centred, whitened; constant: raw, with one constant latent at "
    "every step\n  previous: raw cosine with the step before; change: ||Z(x1) - Z(x0)|| / ||Z(x0)||"
)


@dataclass(frozen=True, repr=False, eq=False)
class Dependence(Saved):
    """Whether the latents depend on the input: similarities, their controls, and two tests.

    `il.input_dependence` makes one, `Dependence.of` makes one of any states.

    Attributes:
        states: of every input at every step of `at`, counted from 0.
        mask: which steps each input has.
        labels: what the nearest other input is to share, one per input, None where not known;
            `label` says what they are.
        groups: inputs of one group are never compared for labels, and count as one in intervals.
        pairs: the numbers of x0 and x1 in `states`, equal where the input was not changed; for a
            list of inputs None, and each input is then compared with all others.
        twins: each x1 is its x0, mildly changed: it is no instance of its own, and without labels
            the test is whether x0 finds it among all x1.
        control: the same inputs with one constant latent at every step: how alike states are
            because prompts are alike. Its step 0 is made before anything differs.
        baselines: how alike tokens and other states of the same prompts are.
        sham: for inputs that were run twice, how far states moved, relative to their norm.
        permutations: at the least; 40 for each step if that is more.

    Raises:
        InputError: fewer than 3 inputs have states, or parts do not fit each other.
    """

    states: Float[np.ndarray, "input step dim"]
    mask: Bool[np.ndarray, "input step"]
    labels: tuple[Any, ...] | None = None
    groups: tuple[Any, ...] | None = None
    pairs: Int[np.ndarray, "pair 2"] | None = None
    twins: bool = False
    control: "Dependence | None" = None
    baselines: tuple[Baseline, ...] = ()
    sham: Float[np.ndarray, " repeated"] | None = None
    label: str = "label"
    site: str = "hook_latent"
    at: str = "latent"
    permutations: int = 1000
    seed: int = 0
    provenance: Provenance | None = None

    def __post_init__(self) -> None:
        _check(self)

    @staticmethod
    def of(
        states: Any,
        *,
        mask: Any = None,
        labels: Any = None,
        groups: Any = None,
        pairs: Any = None,
        twins: bool = False,
        permutations: int = 1000,
        seed: int = 0,
    ) -> "Dependence":
        """The same study of states that you have already, (input, step, dimension).

        Args:
            mask: (input, step), False where an input has no such step; all are there if left out.
            labels, groups, pairs, twins: as the attributes.

        Raises:
            InputError: states are no numbers of that shape, or parts do not fit each other.

        >>> kinds = np.repeat([0, 1], 10)
        >>> noise = np.random.default_rng(0).normal(size=(20, 1, 64))
        >>> found = Dependence.of(50 + noise + 4 * np.eye(2, 64)[kinds][:, None], labels=kinds)
        >>> found.inter(0).mean() > 0.99, found.finding
        (True, 'tells inputs apart')
        """
        array, there = _arrays(states, mask)
        return Dependence(
            array,
            there,
            labels=None if labels is None else tuple(labels),
            groups=None if groups is None else tuple(groups),
            pairs=None if pairs is None else np.asarray(pairs, dtype=np.int64).reshape(-1, 2),
            twins=twins,
            site="states",
            at="steps",
            permutations=permutations,
            seed=seed,
        )

    # ---- similarities ----------------------------------------------------------------------

    @cached_property
    def steps(self) -> tuple[int, ...]:
        """The steps that at least 3 inputs have; the others are left out."""
        return tuple(np.flatnonzero(self._there.sum(0) >= FEWEST).tolist())

    @property
    def n(self) -> int:
        """How many inputs count as instances: edited twins do not."""
        return int(self._instances.sum())

    @property
    def missing(self) -> int:
        """How many of the instances have no state at all, and are left out."""
        return int((self._instances & ~self.mask.any(1)).sum())

    @property
    def forwards(self) -> int:
        """How many forwards it took."""
        return 0 if self.provenance is None else self.provenance.forwards

    def inter(self, step: int) -> Inter:
        """How alike a step's states are between inputs.

        Raises:
            InputError: fewer than 3 inputs have that step.
        """
        rows = self._rows(step)
        return Inter.of(self.states[rows, step], rows)

    @cached_property
    def intra(self) -> Intra:
        """How alike the steps of one input are."""
        rows = np.flatnonzero(self._there.any(1))
        steps = max(self.steps) + 1
        return Intra(self.states[rows, :steps], self._there[rows, :steps], self._units[rows])

    def rank(self, step: int) -> Rank:
        """How many dimensions a step's states fill, beside as many isotropic ones.

        Raises:
            InputError: fewer than 3 inputs have that step.
        """
        return rank(self.states[self._rows(step), step])

    # ---- tests -----------------------------------------------------------------------------

    def changes(self, step: int) -> Float[np.ndarray, " pair"]:
        """||Z(x1) - Z(x0)|| / ||Z(x0)|| of each pair; nan where a state is missing, or zero, or the
        pair's inputs are equal.

        Without pairs, of each input against all others, averaged.

        Raises:
            InputError: fewer than 3 inputs have that step.
        """
        rows = self._rows(step)
        if self.pairs is None:
            return self._against_all(rows, step)
        first, second = self.pairs.T
        both = self.mask[first, step] & self.mask[second, step] & (first != second)
        old, new = self.states[first, step], self.states[second, step]
        return np.where(both, relative(new - old, old), np.nan)

    def relative_change(self, step: int) -> Estimate:
        """How far a step's state moves when the input changes, as an `Estimate` over pairs.

        Raises:
            InputError: fewer than 3 inputs have that step.
            EstimateError: fewer than 2 pairs have both states.
        """
        units = self._units if self.pairs is None else self._units[self.pairs[:, 0]]
        return Estimate.mean(
            by_unit(self.changes(step), units), name=f"relative change of step {step}"
        )

    @property
    def by(self) -> Literal["label", "twin"] | None:
        """What the nearest other input is asked for: its label, or to be the edited twin."""
        if self.labels is not None:
            return "label"
        return "twin" if self.twins else None

    def retrieval(self, step: int) -> Estimate:
        """How often the nearest other input is the right one, beside chance (`.null`).

        Nearest by the centred cosine. The interval takes inputs (or groups) as independent;
        `permutation_p` does not.

        Raises:
            InputError: fewer than 3 inputs have that step, or there is nothing to find.
        """
        found = self._retrieved(step)
        if found is None:
            raise InputError(f"at step {step} {self._untested}")
        name, hits = f"retrieval at step {step}", found.hits
        if self.groups is None and np.isin(hits[~np.isnan(hits)], (0.0, 1.0)).all():
            return Estimate.share(hits, name=name, chance=found.chance_level)
        units = self._units[self._queries(step)]
        chance = float(mean(by_unit(np.where(np.isnan(hits), np.nan, found.chance), units)))
        return replace(Estimate.mean(by_unit(hits, units), name=name), null=chance)

    def permutation_p(self, step: int) -> float:
        """The p-value of the step's retrieval when labels (or twins) are permuted.

        Inputs of a pair or group are never each other's neighbours, and change places together.
        nan where there is nothing to find.
        """
        found = self._retrieved(step)
        return math.nan if found is None else found.pvalue

    @property
    def pvalue(self) -> float:
        """The smallest `permutation_p`, times the number of steps (Bonferroni); nan without."""
        found = [p for p in map(self.permutation_p, self.steps) if not math.isnan(p)]
        return min(1.0, len(found) * min(found)) if found else math.nan

    @property
    def repeated(self) -> float:
        """How far states moved at most when inputs were run again: 0 if none was."""
        return float(self.sham.max()) if self.sham is not None and self.sham.size else 0.0

    @property
    def finding(self) -> Finding:
        """What the data show.

        "tells inputs apart": retrieval beats chance (p < 0.05 over all steps). "constant": at no
        step do states move further, in the mean, than when an input is repeated. "changes": they
        move, and it was not shown that this tells inputs apart.
        """
        if self.pvalue < ALPHA:
            return "tells inputs apart"
        return "constant" if self._moved <= self.repeated else "changes"

    def verdict(self) -> str:
        """One sentence: whether the latents depend on the input, and what shows it.

        >>> states = np.tile(np.arange(1.0, 5.0), (6, 2, 1))
        >>> print(Dependence.of(states, labels="ababab").verdict())
        The states do not depend on the input: between 6 inputs they change by 0 of their norm, no
        more than when an input is repeated (0).
        """
        what, moved = ("latents" if self.site == "hook_latent" else "states"), self._moved
        if self.finding == "tells inputs apart":
            step = min(self.steps, key=lambda s: (self.permutation_p(s), -self._excess(s)))
            raw = self.inter(step).mean()
            although = "although their raw cosine is" if raw >= NEAR_ONE else "with a raw cosine of"
            return (
                f"The {what} depend on the input: {self._says(step)}, {although} {raw:.3f}"
                f"{self._under(step)}."
            )
        if self.finding == "constant":
            of = f"between {self.n} inputs" if self.pairs is None else f"in {len(self.pairs)} pairs"
            return (
                f"The {what} do not depend on the input: {of} they change by {moved:.2g} of their "
                f"norm, no more than when an input is repeated ({self.repeated:.2g})."
            )
        if math.isnan(self.pvalue):
            rest = f"whether that tells inputs apart was not tested, for {self._untested}"
        else:
            step = max(self.steps, key=self._excess)
            rest = f"but it was not shown that this tells inputs apart: {self._says(step)}"
        return (
            f"The {what} change with the input, by {moved:.2g} of their norm ({self.repeated:.2g} "
            f"when an input is repeated); {rest}."
        )

    # ---- what is shown ---------------------------------------------------------------------

    def to_dataframe(self) -> "pd.DataFrame":
        """One row per step: similarities, ranks and tests; nan is what cannot be said."""
        import pandas as pd

        return pd.DataFrame([self._row(step) for step in self.steps])

    def __repr__(self) -> str:
        of = f"{self.n} inputs" + (f" ({self.missing} without)" if self.missing else "")
        lines = [f"Dependence of {self.site} at {self.at} on the input: {of}", *self._table()]
        lines.append(_LEGEND)
        lines += [
            f"  {b.name} at {b.site}: raw {b.raw:.3f}, centred {b.centred:.3f}"
            + ("" if math.isnan(b.adjacent) else f", adjacent {b.adjacent:.3f}")
            for b in self.baselines
        ]
        return "\n".join([*lines, f"  {self.verdict()}"])

    def _table(self) -> Iterator[str]:
        heads = "".join(f"{head:>10}" for head in _SHOWN.values())
        yield f"  {'step':>4}{heads}   retrieval (chance, p)"
        for step in self.steps:
            row = self._row(step)
            cells = "".join(f"{row[name]:>10.3f}" for name in _SHOWN).replace("nan", "  -")
            found = "-"
            if not math.isnan(row["retrieval"]):
                found = f"{row['retrieval']:.3f} ({row['chance']:.3f}, {row['p']:.3g})"
            yield f"  {step:>4}{cells}   {found}"

    def _row(self, step: int) -> dict[str, float]:
        inter, ranks, under = self.inter(step), self.rank(step), self.control
        found = None if self._retrieved(step) is None else self.retrieval(step)
        previous = self._between_steps[step, step - 1] if step else math.nan
        return {
            "step": step,
            "n": len(inter.inputs),
            "raw": inter.mean("raw"),
            "centred": inter.mean("centred"),
            "whitened": inter.mean("whitened"),
            "raw_constant": (
                under.inter(step).mean() if under and step in under.steps else math.nan
            ),
            "raw_previous": float(previous),
            "effective_rank": ranks.effective,
            "effective_rank_null": ranks.null_effective,
            "participation": ranks.participation,
            "participation_null": ranks.null_participation,
            "relative_change": float(mean(self.changes(step))),
            "retrieval": math.nan if found is None else found.value,
            "chance": math.nan if found is None or found.null is None else found.null,
            "p": self.permutation_p(step),
        }

    @cached_property
    def _between_steps(self) -> Float[np.ndarray, "step step"]:
        return self.intra.matrix()

    def _says(self, step: int) -> str:
        found = self.retrieval(step)
        right = f"other input shares its {self.label}"
        if self.by == "twin":
            right = "edited input is its own twin"
        return (
            f"at step {step} the nearest {right} in {found.value:.0%} of {found.n} cases "
            f"({found.null:.0%} by chance, p = {self.pvalue:.2g} over {len(self.steps)} "
            f"step{'s' * (len(self.steps) != 1)})"
        )

    def _under(self, step: int) -> str:
        if self.control is None or step not in self.control.steps:
            return ""
        return f" ({self.control.inter(step).mean():.3f} with one constant latent at every step)"

    def _excess(self, step: int) -> float:
        found = self._retrieved(step)
        return -math.inf if found is None else found.value - found.chance_level

    @property
    def _moved(self) -> float:
        """The mean relative change at the step where it is largest; where no pair has both of its
        states, of inputs against all others."""
        changes = [self.changes(step) for step in self.steps]
        if all(np.isnan(change).all() for change in changes):
            changes = [self._against_all(self._rows(step), step) for step in self.steps]
        known = [float(mean(change)) for change in changes if not np.isnan(change).all()]
        return max(known, default=0.0)

    def _against_all(self, rows: Int[np.ndarray, " row"], step: int) -> np.ndarray:
        """The relative change from each input to every other, averaged; nan where it has none."""
        found, z = np.full(len(self.states), np.nan), self.states[rows, step]
        for i, row in enumerate(rows):
            found[row] = mean(relative(np.delete(z, i, axis=0) - z[i], z[i][None]))
        return found

    @property
    def _untested(self) -> str:
        if self.by is None:
            return "no labels are known (pass labels=...)"
        if self.by == "twin":
            return f"fewer than {FEWEST} inputs have a twin that differs and a state (use more)"
        return "no two inputs of different groups share a label, or all do (pass other labels=...)"

    # ---- which rows ------------------------------------------------------------------------

    @cached_property
    def _instances(self) -> Bool[np.ndarray, " input"]:
        found = np.ones(len(self.states), dtype=bool)
        if self.twins and self.pairs is not None:
            found[self.pairs[:, 1]] = False
            found[self.pairs[:, 0]] = True
        return found

    @property
    def _there(self) -> Bool[np.ndarray, "input step"]:
        return self.mask & self._instances[:, None]

    def _rows(self, step: int) -> Int[np.ndarray, " row"]:
        if step not in self.steps:
            raise InputError(
                f"step {step} was asked for, and {FEWEST} inputs or more have the steps "
                f"{list(self.steps)}; choose one of these"
            )
        return np.flatnonzero(self._there[:, step])

    @cached_property
    def _units(self) -> Int[np.ndarray, " input"]:
        """What was drawn independently: groups, else pairs, else inputs."""
        n = len(self.states)
        if self.groups is not None:
            return np.asarray(group_codes(self.groups, n))
        found = np.arange(n)
        if self.pairs is not None:
            numbers = n + np.arange(len(self.pairs))
            found[self.pairs[::-1, 1]] = numbers[::-1]
            found[self.pairs[::-1, 0]] = numbers[::-1]
        return found

    def _queries(self, step: int) -> Int[np.ndarray, " query"]:
        """The inputs whose neighbours are looked at."""
        rows = self._rows(step)
        if self.by == "label":
            assert self.labels is not None
            return np.array([row for row in rows if self.labels[row] is not None], dtype=int)
        return self._twinned(step)[:, 0]

    def _twinned(self, step: int) -> Int[np.ndarray, "twin 2"]:
        """The pairs that have both states; an input that an edit left as it was is no twin."""
        assert self.pairs is not None
        there = self.mask[self.pairs, step].all(1) & (self.pairs[:, 0] != self.pairs[:, 1])
        return self.pairs[there]

    @cached_property
    def _found(self) -> dict[int, Retrieval | None]:
        return {step: self._retrieve(step) for step in self.steps}

    def _retrieved(self, step: int) -> Retrieval | None:
        self._rows(step)
        return self._found[step]

    def _retrieve(self, step: int) -> Retrieval | None:
        if self.by is None:
            return None
        rows = self._queries(step)
        if len(rows) < FEWEST:
            return None
        draws = max(self.permutations, PER_STEP * len(self.steps))
        gallery, names, others = None, None, None
        if self.by == "label":
            assert self.labels is not None
            wanted: Sequence[Any] = [self.labels[row] for row in rows]
        else:
            gallery = self.states[self._twinned(step)[:, 1], step]
            wanted = names = list(range(len(rows)))
            others = self._units[rows]
        try:
            return retrieval(
                self.states[rows, step],
                gallery,
                labels=wanted,
                gallery_labels=names,
                groups=self._units[rows],
                gallery_groups=others,
                permutations=draws,
                seed=self.seed,
            )
        except NothingToFind:
            return None


def _arrays(states: Any, mask: Any) -> tuple[np.ndarray, np.ndarray]:
    """States and mask as arrays."""
    try:
        array = np.asarray(states, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise InputError(
            f"the states cannot be read as one array of numbers ({error}); where inputs have "
            "unequal numbers of steps, fill up with zeros and pass mask=(input, step)"
        ) from error
    if array.ndim != 3:
        raise InputError(
            f"the states have the shape {array.shape}, expected (input, step, dimension); with one "
            "step per input give states[:, None]"
        )
    there = np.ones(array.shape[:2], dtype=bool) if mask is None else np.asarray(mask, dtype=bool)
    if there.shape != array.shape[:2]:
        raise InputError(
            f"the mask has the shape {there.shape} and the states {array.shape}; give one cell "
            "(input, step) for each state"
        )
    gaps = np.isnan(array).all(axis=-1).any(axis=-1)
    if mask is None and gaps.any():
        raise InputError(
            f"{int(gaps.sum())} of {len(array)} inputs lack steps (all nan) and no mask "
            "came with them; pass mask=(input, step), False where an input has no such step"
        )
    return array, there


def _check(made: Dependence) -> None:
    """Refuse states that do not say what they are of."""
    n = len(made.states)
    for name, value in (("labels", made.labels), ("groups", made.groups)):
        if value is not None and len(value) != n:
            raise InputError(f"{len(value)} {name} came with {n} inputs; give one each")
    if made.pairs is not None and not np.isin(made.pairs, np.arange(n)).all():
        raise InputError(f"the pairs name inputs outside of 0..{n - 1}; give rows of the states")
    if made.twins and made.pairs is None:
        raise InputError("twins=True came without pairs; say which input is whose twin")
    bad = ~np.isfinite(made.states).all(2) & made.mask
    if bad.any():
        first = np.argwhere(bad)[0]
        raise InputError(
            f"{int(bad.any(1).sum())} of {n} inputs have states that are nan or infinite (the "
            f"first is input {first[0]}, step {first[1]}); leave them out, or look at the model's "
            "dtype"
        )
    there = made._there.any(1)
    if not made.steps:
        raise InputError(
            f"{int(there.sum())} of {made.n} inputs have states, and {FEWEST} at one step are "
            "needed to compare any; use more inputs, or latents=il.Force(k)"
        )
    if len(np.unique(made._units[there])) < 2:
        raise InputError(
            f"all {int(there.sum())} inputs are of one group, so that none can be compared with "
            "another; use inputs of other groups"
        )
