"""The metric of a run and its gradient at taps, in one forward; through the latent loop if asked.

In fixed context the sequence is read as it is, latents included, and a gradient counts what reaches
the answer with every later latent held. In free context a later latent is what the model would
make of the states before it. One forward holds all that is needed for that: with m the metric, Z_t
the latents that were fed and H_t(Z_<t) what the loop computed for them,

    dm/dx = d_m/d_x + sum_t (dm/dZ_t) d_H_t/d_x,   dm/dZ_t as dm/dx, from the last step back,

where d_ is the derivative of that one forward. The text is held in both.
"""

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from jaxtyping import Float

from imaginelens.hooks import LatentModel, Run
from imaginelens.hooks.engine import Worker
from imaginelens.hooks.entries import Entry, HookEntry, HookPoint
from imaginelens.hooks.errors import InputError
from imaginelens.hooks.metrics import Metric, Readout, Targets
from imaginelens.hooks.patching import Context
from imaginelens.hooks.readout import answer_columns, read_out
from imaginelens.hooks.script import Script
from imaginelens.hooks.sketchpad import Sketcher
from imaginelens.hooks.spec import Force, LatentSpec
from imaginelens.hooks.tokens import Kind
from imaginelens.mediation.behind_prefix import picked_readout, picked_targets
from imaginelens.mediation.taps import Spots, Tap, tap, union
from imaginelens.mediation.tiled import may_repeat, tiled

LATENT, FINAL = "hook_latent", "ln_final.hook_normalized"
_OFF = {torch.float64: 1e-6, torch.float32: 1e-3}  # how far a replayed latent may be off


@dataclass(frozen=True, eq=False)
class Rules:
    """How a backward pass differs from the true gradient.

    Attributes:
        first: what acts at sites before the taps; `entries` after them.
        workers: what acts at modules, before all of these.
    """

    first: tuple[Entry, ...] = ()
    entries: tuple[Entry, ...] = ()
    workers: tuple[Worker, ...] = ()


@dataclass
class Reading:
    """A run to be read with gradients.

    Attributes:
        before: what the unedited run answers; `il.kl` compares with it.
        forwards: how many were run.
    """

    lens: LatentModel
    run: Run
    targets: Targets
    metric: Metric
    context: Context
    before: Readout
    forwards: int = 0
    script: Script = field(init=False)

    def __post_init__(self) -> None:
        self.script = self.lens.script(self.run, endings=self.targets.base_ids)

    @property
    def feedback(self) -> LatentSpec | None:
        """The family, if a state of this run becomes a later input and that counts here."""
        if self.context == "fixed" or not self.latents:
            return None
        spec = self.lens.spec
        assert spec is not None
        forced = self.run.options[1]
        spec = forced.applied_to(spec) if isinstance(forced, Force) else spec
        if spec.feeds == "embedding":
            return None
        if spec.feeds != "state":
            raise InputError(
                f"the {spec.name} family feeds mixtures of token embeddings, drawn and filtered as "
                "text is, through which no gradient is taken; use context='fixed'"
            )
        if spec.looks_back:
            raise InputError(
                f"more than the state before it decides what is fed at a latent of {spec.name}, "
                "through which no gradient is taken; use context='fixed'"
            )
        if self.lens.registry.acting(LATENT):
            raise InputError(
                "something is registered at 'hook_latent', through which no gradient is taken; "
                "call lens.reset_hooks(including_permanent=True), or use context='fixed'"
            )
        return spec

    @property
    def latents(self) -> Spots:
        """Where latents are fed."""
        tokens = self.script.tokens
        if self.run.trigger.written:
            return Spots(())
        columns = (tokens.columns(row, Kind.LATENT) for row in range(len(tokens)))
        return Spots(tuple(tuple(int(c) for c in of_row) for of_row in columns))

    def values(self, taps: Sequence[Tap]) -> Float[np.ndarray, " example"]:
        """The metric with states moved as the taps say; nan where there is no answer."""
        with torch.no_grad():
            return numbers(self._read(self._settled(taps), taps))

    def graph(self, taps: Sequence[Tap], rules: Rules | None = None) -> "Graph":
        """Read once, and keep what gradients are taken of.

        Raises:
            InputError: no gradient goes through this family's loop, or the states that it fed are
                not what its rule makes of the states before them.
        """
        spec, rules = self.feedback, rules or Rules()
        script = self._settled(taps)
        if spec is None:
            with torch.enable_grad(), weights_held(self.lens.model):
                return Graph(self._read(script, taps, rules), tuple(taps))
        loop = next((t for t in taps if t.sites == (LATENT,)), None)
        if loop is None:
            loop = tap(LATENT, self.latents)
            taps = [*taps, loop]
        assert loop.spots.of_rows == self.latents.of_rows
        final: list[torch.Tensor] = []
        see = HookEntry((FINAL,), keeping(final))
        with torch.enable_grad(), weights_held(self.lens.model):
            values = self._read(script, taps, replace(rules, entries=(*rules.entries, see)))
            made = self._made(spec, final[0], loop.spots)
        if all(t.moved is None for t in taps):
            self._check_loop(spec, made.detach(), loop.states)
        return Graph(values, tuple(taps), loop, made)

    @property
    def repeats(self) -> bool:
        """Whether `again` is possible: nothing is fed back, and nothing else is active."""
        return self.context == "fixed" and may_repeat(self.lens, self.script)

    def again(self, times: int) -> "Reading":
        """The same reading of a batch that holds all rows several times, one copy behind the
        other."""
        rows, wide = [*range(len(self.run))] * times, copy.copy(self)
        wide.script, wide.forwards = tiled(self.script, times), 0
        wide.targets = picked_targets(self.targets, rows)
        wide.before = picked_readout(self.before, rows)
        return wide

    def look(self, taps: Sequence[Tap], entries: Sequence[Entry]) -> None:
        """Read once with states moved, the latents as they were, for what `entries` see."""
        with torch.no_grad():
            self._read(self.script, taps, Rules(entries=tuple(entries)))

    def _read(
        self, script: Script, taps: Sequence[Tap], rules: Rules | None = None
    ) -> torch.Tensor:
        """The metric of each example."""
        rules = rules or Rules()
        self.forwards += 1
        columns = answer_columns(script, self.targets)
        with self.lens.registry.scope([*rules.first, *taps, *rules.entries]):
            logits = self.lens._read_script(script, columns, rules.workers, self.run.acted)
        decode = self.lens.decode
        return self.metric(read_out(script, self.targets, logits, columns, decode, self.before))

    # ---- the loop ---------------------------------------------------------------------------

    def _made(self, spec: LatentSpec, final: torch.Tensor, spots: Spots) -> torch.Tensor:
        """What the loop feeds at some spots, of the last hidden states: one position earlier."""
        rows, columns = np.array(spots.places).reshape(-1, 2).T
        states = final[rows, columns - 1]
        if spec.project is None:
            return states
        assert not isinstance(spec.project, Sketcher)  # refused as `feedback`
        kinds = self.script.tokens.kind[rows, columns - 1]
        return spec.project(states, torch.as_tensor(kinds == Kind.LATENT).to(states.device))

    def _settled(self, taps: Sequence[Tap]) -> Script:
        """The script with the latents that follow from the states that taps move."""
        spec = self.feedback
        if spec is None or all(t.moved is None for t in taps):
            return self.script
        embeds = self.script.embeds.clone()
        for column in sorted({column for _, column in self.latents.places}):
            here = union(
                len(self.run), [place for place in self.latents.places if place[1] == column]
            )
            final: list[torch.Tensor] = []
            see = HookEntry((FINAL,), keeping(final))
            with torch.no_grad():
                self._read(replace(self.script, embeds=embeds.clone()), taps, Rules(entries=(see,)))
                rows = [row for row, _ in here.places]
                embeds[rows, column] = self._made(spec, final[0], here).to(embeds)
        return replace(self.script, embeds=embeds)

    def _check_loop(self, spec: LatentSpec, made: torch.Tensor, fed: torch.Tensor) -> None:
        off = (made.double() - fed.double()).norm(dim=-1) / fed.double().norm(dim=-1).clamp_min(
            1e-30
        )
        worst = float(off.max()) if len(off) else 0.0
        if worst > _OFF.get(fed.dtype, 0.2):
            raise InputError(
                f"the latents of this run are not what the {spec.name} family's rule makes of the "
                f"states before them (off by {worst:.2g} of their size), so that no gradient goes "
                "through its loop; use context='fixed'"
            )


@dataclass(frozen=True, eq=False)
class Graph:
    """One forward, with what its gradients are taken of.

    Attributes:
        loop: the tap at all latents, and `made`, what the loop computed for each; None where
            nothing is fed back.
    """

    outcome: torch.Tensor
    taps: tuple[Tap, ...]
    loop: Tap | None = None
    made: torch.Tensor | None = None
    leaves: tuple[torch.Tensor, ...] = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "leaves", tuple(t.leaf for t in self.taps))

    @property
    def values(self) -> Float[np.ndarray, " example"]:
        """The metric; nan where there is no answer."""
        return numbers(self.outcome)

    def gradients(self) -> dict[str, torch.Tensor]:
        """The gradient of each example's metric with respect to its own states, by site."""
        found = self._of(self.outcome.sum())
        if self.loop is not None and self.made is not None:
            found = self._through(self.loop, self.made, found)
        return {t.sites[0]: g for t, g in zip(self.taps, found, strict=True)}

    def _of(self, outcome: torch.Tensor) -> list[torch.Tensor]:
        if not outcome.requires_grad:  # no example has an answer
            return [torch.zeros_like(leaf) for leaf in self.leaves]
        return list(
            torch.autograd.grad(
                outcome, self.leaves, retain_graph=True, allow_unused=True, materialize_grads=True
            )
        )

    def _through(
        self, loop: Tap, made: torch.Tensor, found: list[torch.Tensor]
    ) -> list[torch.Tensor]:
        """Add what goes through the latents that were fed, from the last one back."""
        number = self.taps.index(loop)
        columns = np.array([column for _, column in loop.spots.places], dtype=int)
        for column in sorted(set(columns.tolist()), reverse=True):
            here = torch.as_tensor(columns == column).to(made.device)
            weight = torch.where(here[:, None] & ~_held(loop), found[number], 0.0)
            if bool(weight.any()):
                more = self._of((made * weight.detach().to(made)).sum())
                found = [one + other for one, other in zip(found, more, strict=True)]
        return found


@contextmanager
def weights_held(model: torch.nn.Module) -> Iterator[None]:
    """No gradient of the weights for a block: a graph then holds only what taps can reach."""
    wanted = [weight for weight in model.parameters() if weight.requires_grad]
    try:
        for weight in wanted:
            weight.requires_grad_(False)
        yield
    finally:
        for weight in wanted:
            weight.requires_grad_(True)


def numbers(values: torch.Tensor) -> Float[np.ndarray, " example"]:
    """One value per example, as numpy's floats."""
    return np.asarray(values.detach().double().cpu().numpy())


def _held(loop: Tap) -> torch.Tensor:
    """Which latents are put there, and so depend on nothing."""
    if loop.moved is None:
        return torch.zeros(len(loop.spots), 1, dtype=torch.bool, device=loop.states.device)
    return loop.moved.mask


def keeping(into: list[torch.Tensor]) -> Callable[..., None]:
    """A hook that keeps what it sees."""

    def keep(act: torch.Tensor, hook: HookPoint) -> None:
        into.append(act)

    return keep
