"""do(Z): every latent of every input is replaced, and the answers are counted. Shared by exhibits.

The paper gives the formulas (same tensor Z_i = tau, add noise Z_i + eps, pure noise Z_i = eps,
near-zero Z_i = mu) and neither tau, sigma, mu nor a seed. All values here are ours, as `Settings`
and the configs say: statistics are of other examples' latents, never of the edited one's own.
"""

import math
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

import imaginelens as il
from examples.reproduce.exhibit import Cell, Measured, of, percent
from examples.reproduce.subjects import Subject
from imaginelens.hooks.edits import Act, Edit, EditContext
from imaginelens.hooks.states import Donor
from imaginelens.mediation.edit_effects import EditEffect

MARGIN = 0.05  # of accuracy: 5 points
NONE, SAME, ADD, PURE, ZERO = "none", "same tensor", "add noise", "pure noise", "near-zero"


@dataclass(frozen=True)
class RandomTensor(Edit):
    """Set all states to one random direction, as long as the reference's states are on average."""

    reference: Donor | None = None
    seed: int = 0

    @property
    def given(self) -> Donor | None:
        """The states that the length is taken from."""
        return self.reference

    def fit(self, reference: Donor) -> Edit:
        """The same edit with its length taken from `reference`."""
        return replace(self, reference=reference)

    def apply(self, act: Act, ctx: EditContext) -> Act:
        """One vector for all cells."""
        states = self._states(ctx)
        length = states.values[states.mask].double().norm(dim=-1).mean()
        draw = ctx.generator(self.seed, "tau")
        value = torch.randn(act.shape[-1], generator=draw, dtype=torch.float64)
        return (value / value.norm() * length.cpu()).to(act).expand_as(act).clone()


@dataclass(frozen=True)
class PureNoise(Edit):
    """Set states to eps ~ N(0, sigma^2), sigma in standard deviations of the reference's states."""

    scale: float
    reference: Donor | None = None
    seed: int = 0
    draws: int = 1

    @property
    def given(self) -> Donor | None:
        """The states that the standard deviations are taken from."""
        return self.reference

    def fit(self, reference: Donor) -> Edit:
        """The same edit with its deviations taken from `reference`."""
        return replace(self, reference=reference)

    def apply(self, act: Act, ctx: EditContext) -> Act:
        """Noise of its own for each example and step."""
        states = self._states(ctx)
        std = ctx.per_cell(act, lambda k: states.pooled(k).double().std(0))
        return self.scale * std * ctx.normal(self.seed, act)


def edits_of(subject: Subject) -> dict[str, Edit]:
    """The edits of the table, by their row; the first of each kind is the paper's row."""
    how, found = subject.settings, dict[str, Edit]()
    taus: dict[str, Edit] = {"mean": il.Constant(), "random": RandomTensor()}
    for tau in how.tau:
        found[_row(SAME, f"tau = {tau}", found)] = taus[tau]
    for sigma in how.sigma:
        found[_row(ADD, f"sigma = {sigma:g}", found)] = il.AddNoise(sigma, draws=how.draws)
    for sigma in how.sigma:
        found[_row(PURE, f"sigma = {sigma:g}", found)] = PureNoise(sigma, draws=how.draws)
    for mu in how.mu:
        value = torch.full((subject.lens.structure.d_model,), mu)
        weights = subject.lens.model.get_input_embeddings().weight
        near = il.Constant(value=value.to(weights.device, weights.dtype)) if mu else il.Zero()
        found[_row(ZERO, f"mu = {mu:g}", found)] = near
    return found


def choices(subject: Subject) -> str:
    """What the rows of `edits_of` stand for, in words."""
    how = subject.settings
    first = [f"tau = {how.tau[0]}"] if how.tau else []
    first += [f"sigma = {how.sigma[0]:g} standard deviations"] if how.sigma else []
    first += [f"mu = {how.mu[0]:g}"] if how.mu else []
    return (
        f"rows named as in the paper have {', '.join(first)}: ours, for the paper tells none of "
        "them; rows with another value say which"
    )


def table(subject: Subject, *, benchmark: str, n: int, seed: int) -> il.Necessity:
    """Accuracy under each edit, on one benchmark."""
    pairs = subject.pairs(benchmark, n=n, seed=seed)
    return il.necessity(
        subject.lens,
        pairs,
        edits=list(edits_of(subject).values()),
        metric=il.accuracy,
        batch_size=subject.settings.batch_size,
        seed=seed,
    )


def cells(subject: Subject, found: il.Necessity) -> dict[str, Cell]:
    """A column of the table in percent: the accuracy, and its change with a 95% interval."""
    before = found.rows[0].before
    made: dict[str, Cell] = {NONE: percent(before)}
    for row, effect in zip(edits_of(subject), found.rows, strict=False):
        if not measurable(effect):
            made[row] = "too few answers found"
            continue
        change = of(effect.change, scale=100)
        verdict = effect.change.verdict(MARGIN)
        made[row] = (
            f"{100 * _mean(effect.after):.1f} ({change.value:+.1f} [{change.low:+.1f}, "
            f"{change.high:+.1f}]; {verdict})"
        )
    return made


def says(subject: Subject, found: il.Necessity) -> tuple[str, ...]:
    """What a reader of the column must know: degeneration, distance from real states, the sham."""
    rows = dict(zip(edits_of(subject), found.rows, strict=False))
    repeating = ", ".join(f"{name} {100 * row.repeating:.0f}%" for name, row in rows.items())
    off = ", ".join(f"{name} {row.off_manifold:.1f}" for name, row in rows.items())
    return (
        f"texts that repeat themselves (unedited {100 * found.rows[0].repeating_before:.0f}%): "
        f"{repeating}",
        f"how far edited latents lie from real ones (1: as far as those from each other): {off}",
        f"the sham, each latent put back as it was, changed {found.sham.change.value:g}",
        *found.notes,
    )


def measure(subject: Subject, *, n: int, seed: int, benchmarks: tuple[str, ...]) -> Measured:
    """The table on every benchmark that the subject has."""
    columns: dict[str, dict[str, Cell]] = {}
    told: list[str] = [choices(subject)]
    facts: dict[str, dict[str, Any]] = {"verdicts": {}, "changes": {}}
    names = subject.benchmarks(benchmarks)
    for benchmark in names:
        found = table(subject, benchmark=benchmark, n=n, seed=seed)
        heading = benchmark if len(names) > 1 else ""
        columns[heading] = cells(subject, found)
        told += [f"{heading}: {line}" if heading else line for line in says(subject, found)]
        for row, effect in zip(edits_of(subject), found.rows, strict=False):
            if measurable(effect):
                facts["verdicts"][f"{heading}{row}"] = effect.change.verdict(MARGIN)
                facts["changes"][f"{heading}{row}"] = 100 * effect.change.value
    return Measured(columns, tuple(told), facts=facts)


def measurable(effect: EditEffect) -> bool:
    """Whether two examples at least have an answer with the edit and without."""
    return bool((~np.isnan(effect.after - effect.before)).sum() > 1)


def _row(kind: str, value: str, taken: dict[str, Edit]) -> str:
    """The paper's name for the first of a kind; others say their value."""
    return f"{kind}, {value}" if kind in taken else kind


def _mean(values: object) -> float:
    there = [float(v) for v in values if not math.isnan(v)]  # type: ignore[attr-defined]
    return sum(there) / len(there) if there else math.nan
