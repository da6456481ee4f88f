"""Causal tracing: which single state brings the answer back after its subject was blurred?

Source: Meng et al. (2022), "Locating and editing factual associations in GPT", section 2.1. Noise
is drawn anew for each example; noise that is the same for all is no sample of anything.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Shaped
from tqdm import tqdm

from imaginelens.hooks import Edit, LatentModel, Pairs, Run, Swap
from imaginelens.hooks.edits import EditContext
from imaginelens.hooks.errors import InputError
from imaginelens.hooks.metrics import Metric, prob
from imaginelens.hooks.names import NamesFilter
from imaginelens.hooks.patching import check_arguments
from imaginelens.hooks.positions import (
    ImagePositions,
    LatentPositions,
    Positions,
    before_answer,
    latent,
)
from imaginelens.mediation.arm import Watched
from imaginelens.mediation.asked import Asked, asked, check_data
from imaginelens.mediation.effect_map import NOT_MEASURED, EffectMap
from imaginelens.mediation.ends import donating
from imaginelens.mediation.joint import Part
from imaginelens.mediation.selecting import cells_of, split
from imaginelens.mediation.sweep import Chunk, Selected, Sweep, joined, sweep

_ALONE = "the noise is laid on token by token, and a prefix cannot hold it"


def causal_trace(
    lens: LatentModel,
    data: Pairs | Sequence[Any],
    *,
    subject: Positions = latent,
    noise: float = 3.0,
    draws: int = 10,
    corrupt: Literal["noise", "source"] = "noise",
    sites: NamesFilter = "resid_post",
    positions: Positions | Sequence[Positions] | None = None,
    window: int = 1,
    metric: Metric = prob,
    batch_size: int = 16,
    seed: int = 0,
) -> EffectMap:
    """Blur what enters at the subject, put one state back as it was, and see how much returns.

    The map's `before` is the metric of the blurred run, `other` that of the run as it is, both in
    fixed context; a cell's effect is what restoring it brings back (the indirect effect; its mean
    is the AIE), `map.total` what the blur took away (the total effect), and `recovery` their ratio.
    Values are means over the draws of noise.

    Noise has `noise` standard deviations of the subject's states over all examples and positions,
    for each dimension its own: one number for all, as in the paper, would be that of the few
    dimensions which are very large in states that are fed back.

    Args:
        data: examples, whose answer is the one the model gives; or `il.Pairs`, whose bases are
            traced, with the answers that are given there.
        subject: where noise is added: to the latents that are fed back at `il.latent`, to image
            features at `il.image`, to token embeddings elsewhere, as at `il.text.find("cube")`.
        corrupt: "source" runs the pairs' sources instead of blurred bases (symmetric replacement,
            Zhang & Nanda 2024): `il.sweep` in the direction "noise", with that map's signs. There
            is no noise then, and nothing to draw.
        positions: where states are restored; None is each step of the subject, and
            `il.before_answer`.
        window: how many neighbouring layers are restored together; single layers of "mlp_out" and
            "attn_out" often do little.

    Raises:
        EditTouchedNothing: no example has a subject.
        InputError: an argument is not what it should be, or the subject is the same in all
            examples.

    >>> import imaginelens as il
    >>> lens = il.load("latent-content")
    >>> trace = causal_trace(lens, lens.task(n=3, seed=0).base, draws=2)
    >>> trace.axes["position"]
    ('latent[0]', 'latent[1]', 'before_answer')
    >>> trace.recovery.round(1)[0, 2].tolist()
    [0.0, 0.0, 1.0]
    """
    _check(subject, noise, draws, corrupt, metric, data, batch_size)
    if corrupt == "source":
        assert isinstance(data, Pairs)
        runs = [lens.run(list(data.base[:batch_size]))]
        return sweep(
            lens, data, sites=sites, positions=_restored(runs, subject, positions), metric=metric,
            direction="noise", context="fixed", window=window, batch_size=batch_size, seed=seed,
        )  # fmt: skip
    trace = _Trace.of(lens, data, subject, metric, batch_size, seed)
    blur = Blur(noise * trace.spread(), seed)
    runs = [part.run for part in trace.parts]
    where = _restored(runs, subject, positions)
    cells = cells_of(lens, runs, sites=sites, positions=where, window=window)
    found = []
    with tqdm(total=len(runs) * draws, desc="trace", unit="draw", delay=3, leave=False) as bar:
        for part in trace.parts:
            donor, drawn = trace.donor(part, cells), []
            for draw in range(draws):
                drawn.append(trace.measured(part, blur, donor, cells, draw))
                bar.update()
            found.append(_mean(drawn))
    return joined(found)


@dataclass(frozen=True)
class Blur(Edit):
    """Add normal noise of a standard deviation for each dimension, drawn for each example alone."""

    std: Shaped[torch.Tensor, " d_model"]
    seed: int

    def apply(
        self, act: Shaped[torch.Tensor, "cell ..."], ctx: EditContext
    ) -> Shaped[torch.Tensor, "cell ..."]:
        return act + self.std.to(act) * ctx.normal(self.seed, act)


@dataclass(frozen=True, eq=False)
class _Trace:
    lens: LatentModel
    subject: Positions
    site: str
    metric: Metric
    parts: tuple[Asked, ...]
    seed: int

    @classmethod
    def of(
        cls,
        lens: LatentModel,
        data: Pairs | Sequence[Any],
        subject: Positions,
        metric: Metric,
        size: int,
        seed: int,
    ) -> "_Trace":
        """Run and read all examples as they are."""
        parts = tuple(asked(lens, data, metric=metric, size=size))
        return cls(lens, subject, _site(subject), metric, parts, seed)

    def spread(self) -> torch.Tensor:
        """The standard deviation of the subject's states, for each dimension."""
        found = []
        for part in self.parts:
            donor, _ = donating(self.lens, part.run, [(self.site, self.subject)], "fixed")
            states = donor.states(self.site, self.subject)
            found.append(states.values[states.mask].double())
        pooled = torch.cat(found)
        std = pooled.std(0) if len(pooled) > 1 else torch.zeros(0)
        if not bool((std > 0).any()):
            raise InputError(
                f"the {len(pooled)} states at {self.subject!r} of all examples are equal, so that "
                "noise of their standard deviation is none; trace more examples, or another subject"
            )
        return std

    def donor(self, part: Asked, cells: Selected) -> Run:
        """The run as it is, with what is put back."""
        states = [(site, at) for cell, at in cells for site in cell.sites]
        return donating(self.lens, part.run, states, "fixed")[0]

    def measured(
        self, part: Asked, blur: Blur, donor: Run, cells: Selected, draw: int
    ) -> EffectMap:
        """The map of some examples under one draw of noise."""
        started, sites = time.perf_counter(), (self.site,)
        noise = Part(sites, blur, self.subject, Watched("Blur", repr(self.subject), sites), draw)
        with self.lens.registry.scope([noise]):
            self.lens.registry.begin()
            before = self.lens.read_answer(part.run, part.targets, unedited=part.read)
            self.lens.registry.judge(len(part.run), str(part.run.trigger), part.run.acted)
        absent = [row for row, flag in noise.landing.flags.items() if flag == "not_emitted"]
        fed = self.site == "hook_latent"
        study = Sweep(
            lens=self.lens, pairs=part.pairs, sites="resid_post", positions=self.subject,
            metric=self.metric, direction="denoise", context="fixed", edit=None, heads=False,
            window=1, batch_size=len(part.run), fast=fed, verify=0, seed=self.seed,
        )  # fmt: skip
        chunk = Chunk(
            study=study, number=0, pairs=part.pairs, partner=part.run, cells=cells,
            run=_fed(part.run, noise.landing) if fed else part.run, edit=Swap(donor),
            targets=part.targets, before=before,
            before_values=self.metric(before).double().cpu().numpy(),
            other_values=self.metric(part.read).double().cpu().numpy(),
            forwards=part.forwards + 3 if draw == 0 else 1, started=started,
        )  # fmt: skip
        with self.lens.registry.scope([] if fed else [noise]):
            found = study.measured(chunk)
        flags = found.flags.copy()
        flags[:, absent] = NOT_MEASURED
        name = self.metric.name
        return replace(
            found,
            flags=flags,
            edit=f"restored after noise at {self.subject!r}",
            notes=found.notes if fed else (f"all cells one forward each: {_ALONE}",),
            provenance=replace(
                found.provenance,
                formula=f"{name}(noised, restored) - {name}(noised), fixed context",
            ),
        )


def _fed(run: Run, landing: Any) -> Run:
    """The run as if the noised latents had been fed back: a latent is data."""
    latents = run.latents.clone()
    for rows, columns, new in landing.new:
        latents[rows, run.tokens.step[rows, columns]] = new.to(latents)
    return replace(run, latents=latents)


def _mean(drawn: Sequence[EffectMap]) -> EffectMap:
    """The mean of a batch's maps over the draws."""
    first = drawn[0]
    if len(drawn) == 1:
        return first
    shams = [one.sham for one in drawn if one.sham is not None]
    return replace(
        first,
        before=np.mean([one.before for one in drawn], axis=0),
        after=np.mean([one.after for one in drawn], axis=0),
        change=np.mean([one.change for one in drawn], axis=0),
        binary=False,
        limits=(-1.0, 1.0) if first.binary else None,
        sham=np.abs(shams).max(0) if shams else None,
        provenance=replace(
            first.provenance,
            formula=f"{first.provenance.formula}, mean of {len(drawn)} draws",
            forwards=sum(one.provenance.forwards for one in drawn),
            seconds=sum(one.provenance.seconds for one in drawn),
        ),
    )


def _restored(
    runs: Sequence[Run], subject: Positions, positions: Positions | Sequence[Positions] | None
) -> Positions | Sequence[Positions]:
    """Where states are put back, if nothing else is asked for: in each part of the subject, and
    where the answer is decided."""
    return [*split(runs, subject), before_answer] if positions is None else positions


def _site(subject: Positions) -> str:
    """Where the subject enters."""
    if isinstance(subject, LatentPositions):
        return "hook_latent"
    return "vision_projector.hook_out" if isinstance(subject, ImagePositions) else "hook_embed"


def _check(
    subject: Any, noise: Any, draws: Any, corrupt: Any, metric: Any, data: Any, batch_size: Any
) -> None:
    check_arguments(at=subject, metric=metric)
    if corrupt not in ("noise", "source"):
        raise InputError(f"corrupt is {corrupt!r}; choose 'noise' or 'source'")
    check_data(data, batch_size)
    if corrupt == "source" and not isinstance(data, Pairs):
        raise InputError("corrupt='source' needs the sources of il.Pairs; give those, or 'noise'")
    if metric.name in ("kl", "flip"):
        raise InputError(
            f"{metric!r} compares with another run, and here two are compared already; use il.prob,"
            " il.log_prob or il.logit_diff"
        )
    number = isinstance(noise, int | float) and not isinstance(noise, bool)
    if not number or not 0 < noise < float("inf"):
        raise InputError(f"noise is {noise!r}, expected a number of standard deviations, as 3.0")
    if type(draws) is not int or draws < 1:
        raise InputError(f"draws is {draws!r}, expected a number from 1 on")
