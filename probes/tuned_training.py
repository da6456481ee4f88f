"""Training the translators of a tuned lens, and measuring them on examples held out."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool

from imaginelens.estimates import Estimate
from imaginelens.hooks import LatentModel, Pairs, Run
from imaginelens.hooks.errors import InputError
from imaginelens.hooks.inputs import pictures_key
from imaginelens.hooks.positions import Positions
from imaginelens.probes.unembedding import Unembedding, last_site, read

_AT_ONCE = 256  # states whose logits are held at a time
_ROUND, _PATIENCE = 5, 4  # iterations between two looks at the validation examples; rounds without

TRAIN, VALID, TEST = 0, 1, 2
Affine = tuple[torch.Tensor, torch.Tensor]


@dataclass(frozen=True, eq=False)
class Collected:
    """States of many examples by site, with whose they are and what the model made of them.

    Attributes:
        last: the states behind the last block, whose unembedding is the target.
        owner: the number of the example of every state.
        groups: the label of every example's group.
    """

    states: dict[str, torch.Tensor]
    last: torch.Tensor
    is_latent: Bool[torch.Tensor, " cell"]
    owner: np.ndarray
    groups: tuple[Any, ...]
    unembed: Unembedding

    @staticmethod
    def of(
        lens: LatentModel,
        data: Any,
        sites: Sequence[str],
        at: Positions,
        groups: Sequence[Any] | None,
        batch_size: int,
    ) -> "Collected":
        last = last_site(lens)
        wanted = list(dict.fromkeys([*sites, last]))
        kept: dict[str, list[torch.Tensor]] = {site: [] for site in wanted}
        latents: list[torch.Tensor] = []
        owner: list[np.ndarray] = []
        keys: list[str] = []
        for run in _runs(lens, data, batch_size):
            reading = read(lens, run, sites=wanted, at=at)
            for site in wanted:
                kept[site].append(reading.states(site))
            latents.append(reading.is_latent[reading.mask])
            rows = torch.nonzero(reading.mask)[:, 0] + len(keys)
            owner.append(rows.numpy())
            keys += _pictures(run)
        named = tuple(keys if groups is None else groups)
        if len(named) != len(keys):
            raise InputError(f"{len(named)} groups came with {len(keys)} examples; give one each")
        states = {site: torch.cat(parts) for site, parts in kept.items()}
        return Collected(
            states, states[last], torch.cat(latents), np.concatenate(owner), named, reading.unembed
        )

    def split(self, held_out: float, seed: int) -> np.ndarray:
        """Which part each example is in, by whole groups: train, validation, test."""
        number: dict[Any, int] = {}
        unit = np.array([number.setdefault(group, len(number)) for group in self.groups])
        n = len(number)
        n_test = max(2, round(n * held_out))
        n_valid = max(1, round((n - n_test) / 5))
        least = 10 if n < len(self.groups) else 2
        if n_test < least or n - n_test - n_valid < 2:
            raise InputError(
                f"{len(self.groups)} examples in {n} groups leave {n_test} groups to report on and "
                f"{max(n - n_test - n_valid, 0)} to learn from, and {least} and 2 are needed; use "
                "more examples"
            )
        order = np.random.default_rng(seed).permutation(n)
        part = np.full(n, TRAIN)
        part[order[:n_test]] = TEST
        part[order[n_test : n_test + n_valid]] = VALID
        return part[unit]

    def cells(self, examples: np.ndarray) -> torch.Tensor:
        """The numbers of the states of some examples."""
        return torch.as_tensor(np.flatnonzero(np.isin(self.owner, examples)))

    def pieces(self, cells: torch.Tensor) -> Iterator[torch.Tensor]:
        """Those numbers, so many at a time."""
        yield from cells.split(_AT_ONCE)

    def kl(self, site: str, affine: Affine, cells: torch.Tensor) -> torch.Tensor:
        """KL(final || lens) of some states, in nats."""
        with torch.no_grad():
            goal = self.unembed(self.last[cells], self.is_latent[cells]).log_softmax(-1)
        own = self.states[site][cells]
        moved = translated(own, *affine)
        found = self.unembed(moved, self.is_latent[cells]).log_softmax(-1)
        return (goal.exp() * (goal - found)).sum(-1)

    @torch.no_grad()
    def per_state(self, site: str, affine: Affine, cells: torch.Tensor) -> torch.Tensor:
        """The same for many states, piece by piece, as float64 on the CPU."""
        return torch.cat(
            [self.kl(site, affine, piece).double().cpu() for piece in self.pieces(cells)]
        )

    def estimate(self, site: str, affine: Affine, examples: np.ndarray, name: str) -> Estimate:
        """KL in bits of some examples, the mean of each one's states; nan where one has none."""
        cells = self.cells(examples)
        values = self.per_state(site, affine, cells).numpy() / np.log(2)
        owner = self.owner[cells.numpy()]
        means = [values[owner == e].mean() if (owner == e).any() else np.nan for e in examples]
        alone = len(set(self.groups)) == len(self.groups)
        groups = None if alone else [str(self.groups[e]) for e in examples]
        return bits(np.array(means), site, name, groups)


def bits(values: np.ndarray, site: str, lens: str, groups: Sequence[Any] | None) -> Estimate:
    """The mean KL of some examples."""
    return Estimate.mean(values, name=f"{site}: {lens}", unit="bits", groups=groups)


def _runs(lens: LatentModel, data: Any, batch_size: int) -> Iterator[Run]:
    if isinstance(data, Run):
        yield data
        return
    inputs = data.base if isinstance(data, Pairs) else data
    if not isinstance(inputs, Sequence) or not len(inputs) or isinstance(inputs, str):
        raise InputError(
            f"data is a {type(data).__name__}; give a Run, a Pairs or a list of inputs with at "
            "least one"
        )
    for start in range(0, len(inputs), batch_size):
        yield lens.run(list(inputs[start : start + batch_size]))


def _pictures(run: Run) -> list[str]:
    """What examples of the same pictures share; the content of those whose pictures are unknown."""
    shown = run.prompt.pictures
    if shown is None:
        return list(run.tokens.keys)
    return [
        pictures_key({"images": list(own)}) if own else key
        for own, key in zip(shown, run.tokens.keys, strict=True)
    ]


def identity(states: torch.Tensor) -> Affine:
    """The translator that is the logit lens."""
    width = states.shape[-1]
    dtype = torch.promote_types(states.dtype, torch.float32)
    return (
        torch.zeros(width, width, dtype=dtype, device=states.device),
        torch.zeros(width, dtype=dtype, device=states.device),
    )


def translated(states: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """h + A h + b, in the type of h."""
    own = states.to(weight)
    return (own + own @ weight.T + bias).to(states)


def trained(seen: Collected, site: str, parts: np.ndarray, max_rounds: int) -> Affine:
    """L-BFGS on all training states; what was best on the validation examples is kept."""
    train, valid = (seen.cells(np.flatnonzero(parts == part)) for part in (TRAIN, VALID))
    weight, bias = (part.requires_grad_() for part in identity(seen.states[site]))
    search = torch.optim.LBFGS(
        [weight, bias], max_iter=_ROUND, line_search_fn="strong_wolfe", tolerance_grad=1e-12
    )

    def closure() -> torch.Tensor:
        total = torch.zeros((), dtype=weight.dtype, device=weight.device)
        slopes = [torch.zeros_like(weight), torch.zeros_like(bias)]
        for piece in seen.pieces(train):
            with torch.enable_grad():
                loss = seen.kl(site, (weight, bias), piece).sum() / len(train)
            # not .backward(): the model's own parameters must not gather gradients
            for slope, more in zip(slopes, torch.autograd.grad(loss, [weight, bias]), strict=True):
                slope += more
            total += loss.detach()
        weight.grad, bias.grad = slopes
        return total

    best = (weight.detach().clone(), bias.detach().clone())
    least = float(seen.per_state(site, best, valid).mean())
    waited = 0
    for _ in range(max_rounds):
        search.step(closure)
        now = (weight.detach().clone(), bias.detach().clone())
        reached = float(seen.per_state(site, now, valid).mean())
        waited = 0 if reached < least else waited + 1
        if reached < least:
            best, least = now, reached
        if waited == _PATIENCE or not np.isfinite(reached):
            break
    return best
