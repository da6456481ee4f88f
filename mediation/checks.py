"""Run the controls of a mediation study: those of the engine, and edits that are not its own."""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import torch

from imaginelens.hooks import LatentModel, Run, Swap
from imaginelens.hooks.controls import full_swap_difference, path_gap
from imaginelens.hooks.errors import CheckpointError, InputError
from imaginelens.hooks.patching import donor_run
from imaginelens.hooks.positions import Positions
from imaginelens.hooks.states import States
from imaginelens.hooks.tokens import Kind, TokenMap
from imaginelens.mediation.alignment import FirstOf
from imaginelens.mediation.controls import Controls
from imaginelens.mediation.donors import Picked
from imaginelens.mediation.study import Batch, Side, Study, Values

FEW = 4  # pairs on which the engine's own controls are run
SMALL = 50_000_000  # parameters up to which a model with random weights is made


def run_controls(study: Study, batches: Sequence[Batch], y00: Values, seed: int) -> Controls:
    """Run what can be run, and say why the rest was not."""
    full_swap, gap, not_run = _engine(study)
    arms, more = _others(study, batches, y00, seed)
    return Controls(
        full_swap=full_swap,
        path_gap=gap,
        arms=arms,
        not_run={**not_run, **more},
        binary=study.metric.binary,
        unit=study.metric.unit,
        groups=None if study.pairs.groups is None else tuple(study.pairs.groups),
    )


def _engine(study: Study) -> tuple[float | None, float, dict[str, str]]:
    """Full swap and path gap on the first few pairs, and why one was not run."""
    lens, few = study.lens, study.pairs[:FEW]
    base, source = (
        lens.run(list(inputs), latents=study.latents, keep_logits=True)
        for inputs in (few.base, few.source)
    )
    study.forwards += base.forwards + source.forwards + 4
    gap = path_gap(lens, base)
    try:
        return full_swap_difference(lens, base, source), gap, {}
    except InputError as error:
        return None, gap, {"full swap": str(error)}


def _others(
    study: Study, batches: Sequence[Batch], y00: Values, seed: int
) -> tuple[dict[str, tuple[Values, Values]], dict[str, str]]:
    """The base under edits that are not the mediator's: outcomes before and after."""
    if study.in_words:
        why = "they are edits of states, and the mediator is text"
        return {}, {"random donor, noise of the same size, random site, random weights": why}
    arms: dict[str, Callable[[Batch], Values]] = {
        "noise of the same size": partial(_noise, study, seed),
        "random site": partial(_random_site, study, _text_positions(batches, seed)),
    }
    not_run: dict[str, str] = {}
    strangers = _strangers(study.labels, seed)
    if strangers is None:
        not_run["random donor"] = "a pair's group holds all pairs, so that none is of another"
    else:
        arms["random donor"] = partial(_random_donor, study, batches, strangers)
    found = {name: (y00, study.collect(batches, name, arm)) for name, arm in arms.items()}
    fresh = _random_model(study, seed)
    if isinstance(fresh, str):
        not_run["random weights"] = fresh
    else:
        found["random weights"] = _random_weights(study, fresh, batches)
    return found, not_run


# ---- a random donor ----------------------------------------------------------------------------


def _strangers(labels: Sequence[object], seed: int) -> tuple[int, ...] | None:
    """For each pair the number of another one, of another group; None if there is none."""
    start = np.random.default_rng(seed).permutation(len(labels)).tolist()
    partners = []
    for row, label in enumerate(labels):
        others = (i for i in start[row:] + start[:row] if labels[i] != label)
        partners.append(next(others, None))
    return None if None in partners else tuple(int(p) for p in partners if p is not None)


def _random_donor(
    study: Study, batches: Sequence[Batch], strangers: Sequence[int], batch: Batch
) -> Values:
    picked = []
    for row in batch.rows:
        theirs = next(other for other in batches if strangers[row] in other.rows)
        picked.append((theirs.source.donor, strangers[row] - theirs.rows.start))
    swap = Swap(Picked(tuple(picked), batch.base.takes))
    return study.value(batch, study.arm(batch, batch.base, swap).after)


# ---- noise -------------------------------------------------------------------------------------


def _noise(study: Study, seed: int, batch: Batch) -> Values:
    swap = Swap(_SameSize(batch.base.donor, batch.source.donor, batch.base.takes, seed))
    return study.value(batch, study.arm(batch, batch.base, swap).after)


@dataclass(frozen=True)
class _SameSize:
    """The base's states moved as far as the source's lie away, in a random direction."""

    base: Run
    source: Run
    counts: tuple[int, ...]
    seed: int

    def states(self, site: str, at: Positions) -> States:
        rows = range(len(self.base))
        mine, theirs = (
            Picked(tuple((run, row) for row in rows), self.counts).states(site, at)
            for run in (self.base, self.source)
        )
        moved = torch.zeros_like(mine.values)
        for row, key in enumerate(self.base.tokens.keys):
            far = theirs.values[row].double() - mine.values[row].double()
            noise = self._draw(f"{self.seed}/{site}/{key}", far)
            step = noise / noise.norm(dim=-1, keepdim=True) * far.norm(dim=-1, keepdim=True)
            moved[row] = step.to(moved)
        return States(mine.values + moved, mine.mask & theirs.mask)

    def _draw(self, key: str, like: torch.Tensor) -> torch.Tensor:
        """Noise that belongs to an example: ordinal by ordinal, so that no batch changes it."""
        drawn = []
        for ordinal in range(len(like)):
            digest = hashlib.blake2b(f"{key}/{ordinal}".encode(), digest_size=8).digest()
            stream = torch.Generator().manual_seed(int.from_bytes(digest, "big") >> 1)
            drawn.append(torch.randn(like.shape[1:], generator=stream, dtype=torch.float64))
        return torch.stack(drawn).to(like) if drawn else like


# ---- a random site -----------------------------------------------------------------------------


@dataclass(frozen=True)
class _RandomText(Positions):
    """A few positions of the prompt's text, drawn at random, alike in rows of equal length."""

    n: int
    seed: int

    def resolve(self, tokens: TokenMap, row: int) -> np.ndarray:
        columns = tokens.columns(row, Kind.TEXT)
        columns = columns[columns < tokens.prompt_width]
        drawn = np.random.default_rng(self.seed).permutation(len(columns))[: self.n]
        return np.sort(columns[drawn])

    def __repr__(self) -> str:
        return f"{self.n} random text positions"


def _text_positions(batches: Sequence[Batch], seed: int) -> _RandomText:
    """As many as there are latents to swap."""
    return _RandomText(max(1, *(n for batch in batches for n in batch.base.takes)), seed)


def _random_site(study: Study, at: _RandomText, batch: Batch) -> Values:
    """The source's states in the middle of the model, at text of the prompt."""
    site = (f"blocks.{len(study.lens.structure.blocks) // 2}.hook_resid_post",)
    donor = donor_run(study.lens, batch.source.run, site, at, study.context)
    study.forwards += 1 if study.context == "fixed" else donor.forwards
    takes = batch.base.takes
    picked = Picked(tuple((donor, row) for row in range(len(donor))), takes)
    where = FirstOf(at, takes)
    arm = study.arm(batch, batch.base, Swap(picked), at=where, sites=site)
    return study.value(batch, arm.after)


# ---- random weights ----------------------------------------------------------------------------


def _random_model(study: Study, seed: int) -> LatentModel | str:
    """A model like this one as it is before any training; or why there is none."""
    lens = study.lens
    size = sum(p.numel() for p in lens.model.parameters())
    if study.context == "free":
        return "it would write another text; run it in fixed context"
    if size > SMALL:
        return f"it has {size / 1e6:.0f} M parameters, and is made up to {SMALL / 1e6:.0f} M"
    kind, config = type(lens.model), lens.model.config
    # not the seed itself: a model made after torch.manual_seed(0) would meet itself
    own = int(np.random.SeedSequence([seed, 7]).generate_state(1)[0])
    with torch.random.fork_rng():
        torch.manual_seed(own)
        try:
            fresh = kind(config).to(lens.model.device, lens.model.dtype).eval()
        except TypeError:
            return f"{kind.__name__} cannot be made from its config alone"
    try:
        return LatentModel(fresh, lens.processor, lens.family or False)
    except CheckpointError as error:
        return str(error)


def _random_weights(
    study: Study, fresh: LatentModel, batches: Sequence[Batch]
) -> tuple[Values, Values]:
    """The pure indirect effect in a model with random weights, at the same text."""
    theirs = replace(study, lens=fresh, forwards=0)
    made: Mapping[int, Batch] = {
        batch.rows.start: replace(
            batch,
            base=_as_written(theirs, batch, batch.base),
            source=_as_written(theirs, batch, batch.source),
        )
        for batch in batches
    }

    def before(batch: Batch) -> Values:
        own = made[batch.rows.start]
        return theirs.value(own, own.base.read)

    def after(batch: Batch) -> Values:
        own = made[batch.rows.start]
        return theirs.value(own, theirs.swap(own, own.base).after)

    found = tuple(study.collect(batches, "random weights", arm) for arm in (before, after))
    study.forwards += theirs.forwards
    return found[0], found[1]


def _as_written(study: Study, batch: Batch, side: Side) -> Side:
    """A side's input in another model, at the text that all worlds write."""
    told = study.lens.retell(side.run, like=batch.base.run)
    return study.side(told, side.read.targets, side.takes)
