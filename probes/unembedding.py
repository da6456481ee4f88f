"""From a state of the residual stream to logits, by the model's own final norm and output head.

What a model does behind its head (a scale, a soft cap) is in the code of its class, not in a module
that could be called. So it is recognised by what it does: the lens of the last layer is compared
with the logits of the same forward, in every call, and a lens that does not give them is refused.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float

from imaginelens.hooks import LatentModel, Run
from imaginelens.hooks.cache import ActivationCache
from imaginelens.hooks.errors import InputError
from imaginelens.hooks.positions import Positions
from imaginelens.hooks.sketchpad import Sketcher
from imaginelens.hooks.spec import LatentSpec
from imaginelens.hooks.tokens import Kind

States = Float[torch.Tensor, "cell d_model"]
Logits = Float[torch.Tensor, "cell vocab"]
LATENT = "hook_latent"
_AT_ONCE = 64  # states: a vocabulary of 150,000 in float64 takes 77 MB then


@dataclass(frozen=True, eq=False)
class Unembedding:
    """How a model turns states into logits.

    Attributes:
        behind: what it does to the head's output; None is nothing.
    """

    lens: LatentModel
    behind: Callable[[Logits], Logits] | None = None

    def __call__(self, states: States, is_latent: Bool[torch.Tensor, " cell"]) -> Logits:
        """The logits of states in the stream, whose inputs were latents or not."""
        spec, normal = self.lens.spec, self.normalised(states)
        if spec is not None and spec.project_unembeds and spec.project is not None:
            assert not isinstance(spec.project, Sketcher)  # its spec is refused
            normal = spec.project(normal, is_latent.to(normal.device))
        return self.of_latents(normal)

    def normalised(self, states: States) -> States:
        """States behind the final norm."""
        norm = self.lens.model.get_submodule(self.lens.structure.final_norm)
        found = norm(states)
        return found[0] if isinstance(found, tuple) else found

    def of_latents(self, states: States) -> Logits:
        """The logits of states that are what the head reads: what a family feeds back as it is."""
        head = self.lens.model.get_submodule(self.lens.structure.head)
        logits = head(states)
        return logits if self.behind is None else self.behind(logits)


def reads_latents(spec: LatentSpec | None) -> bool:
    """Whether what a family feeds back is what its output head reads, the norm included."""
    if spec is None or spec.feeds != "state":
        return False
    return spec.project is None or spec.project_unembeds


def last_site(lens: LatentModel) -> str:
    """The stream behind the last block."""
    return f"blocks.{len(lens.structure.blocks) - 1}.hook_resid_post"


def unembedding(
    lens: LatentModel,
    last: States,
    is_latent: Bool[torch.Tensor, " cell"],
    logits: Logits,
) -> tuple[Unembedding, float]:
    """How this model unembeds, with the largest difference from its own logits.

    Args:
        last: states behind the last block, whose logits are `logits`.

    Raises:
        InputError: neither the head's output, nor a scale or a soft cap of it, are the logits.
    """
    plain = Unembedding(lens)
    raw = plain(last, is_latent)
    ways: list[Callable[[Logits], Logits] | None] = [None]
    cap = getattr(lens.model.config.get_text_config(decoder=True), "final_logit_softcapping", None)
    if cap:
        ways.append(lambda x: cap * torch.tanh(x / cap))
    scale = float((raw.double() * logits.double()).sum() / raw.double().square().sum())
    ways.append(lambda x: x * scale)
    gaps = [float(((raw if way is None else way(raw)) - logits).abs().max()) for way in ways]
    # a factor of rounding: in bfloat16 a soft cap can be hard to tell from none, so the best counts
    slack = 32 * torch.finfo(logits.dtype).eps * max(1.0, float(logits.abs().max()))
    most = min(slack, 2 * min(gaps))
    fitting = [(gap, way) for gap, way in zip(gaps, ways, strict=True) if gap <= most]
    if not fitting:
        raise InputError(
            f"the lens of the last layer is {min(gaps):.3g} away from the logits of "
            f"{type(lens.model).__name__}, which does more between its last block and its logits "
            "than its final norm and its head (or an edit is active there); no lens is made of it"
        )
    gap, way = fitting[0]
    return Unembedding(lens, way), gap


@dataclass(frozen=True, eq=False)
class Reading:
    """The states of a run at some sites and positions, and how they are unembedded.

    Attributes:
        cache: the states, by site, (example, step, d_model).
        mask: (example, step), whether an example has that position.
        is_latent: (example, step), whether its input was a latent.
        gap: how far the lens of the last layer is from the model's own logits, at most.
    """

    cache: ActivationCache
    mask: Bool[torch.Tensor, "example step"]
    is_latent: Bool[torch.Tensor, "example step"]
    unembed: Unembedding
    gap: float

    def states(self, site: str) -> States:
        """The states at a site that are there, one after the other."""
        return self.cache[site][self.mask.to(self.cache[site].device)]

    def logits(
        self, site: str, move: Callable[[States], States] = lambda states: states
    ) -> Iterator[Logits]:
        """What the lens makes of them, so many at a time; `move` is done to states before."""
        is_latent = self.is_latent[self.mask].split(_AT_ONCE)
        for states, there in zip(self.states(site).split(_AT_ONCE), is_latent, strict=True):
            if site == LATENT:
                yield self.unembed.of_latents(move(states))
            else:
                yield self.unembed(move(states), there)


@torch.no_grad()
def read(lens: LatentModel, run: Run, *, sites: Sequence[str], at: Positions) -> Reading:
    """Read a run once more in one forward, and keep the stream at some positions.

    Raises:
        InputError: no example has such a position, a site is not in the stream or, at
            `hook_latent`, is not what the output head reads.
    """
    _check_sites(lens, sites, at, run)
    last = last_site(lens)
    wanted = list(dict.fromkeys([*sites, last]))
    logits, cache = lens.run_with_cache(run, names_filter=wanted, positions=[at])
    if last not in cache:
        raise InputError(
            f"{at!r} selects no position in any of the {len(run)} examples ({run.trigger}); choose "
            "other positions"
        )
    columns = cache.columns[last]
    mask = columns >= 0
    rows = torch.arange(len(run))[:, None].expand_as(columns)[mask]
    kind = torch.as_tensor(run.tokens.kind)
    is_latent = (kind.gather(1, columns.clamp_min(0)) == Kind.LATENT) & mask
    there = logits[rows.to(logits.device), columns[mask].to(logits.device)]
    unembed, gap = unembedding(lens, cache[last][mask], is_latent[mask], there.to(cache[last]))
    return Reading(cache, mask, is_latent, unembed, gap)


def _check_sites(lens: LatentModel, sites: Sequence[str], at: Positions, run: Run) -> None:
    for name in sites:
        axes = lens.registry[name].kind.axes
        if axes != ("example", "position", "d_model"):
            raise InputError(
                f"{name!r} has the axes {', '.join(axes)}, and a lens reads states of the residual "
                "stream, (example, position, d_model); choose sites such as "
                "'blocks.*.hook_resid_post'"
            )
    if LATENT not in sites:
        return
    if not reads_latents(lens.spec):
        name = "no family" if lens.spec is None else lens.spec.name
        raise InputError(
            f"what {name} feeds back is not what the output head reads, so that a logit lens of "
            "'hook_latent' would mean nothing; use il.probes.nearest, which compares it with "
            "embeddings, or sites='blocks.*.hook_resid_post'"
        )
    kinds = {int(run.tokens.kind[r, c]) for r in range(len(run)) for c in at.resolve(run.tokens, r)}
    if kinds - {Kind.LATENT}:
        raise InputError(
            f"{at!r} also selects positions that are no latents, where 'hook_latent' has no state; "
            "use at=il.latent, or sites='blocks.*.hook_resid_post'"
        )
