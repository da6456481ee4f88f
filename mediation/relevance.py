"""Relevance patching: attribution patching with the coefficients of relevance propagation.

Gradients are replaced by those of a model that is linear in its states where the real one bends
them (RelP, Jafari et al. 2025): norms divide by a constant, attention mixes by a constant pattern,
activations scale by a constant, and each factor of a gated product gets half of it. All numbers of
the forward stay as they are; only the way back differs, and only in this one forward.
"""

from collections.abc import Callable

import torch
from torch import nn

from imaginelens.hooks.engine import Worker, first_tensor, with_first
from imaginelens.hooks.entries import Entry, HookEntry
from imaginelens.hooks.errors import InputError
from imaginelens.hooks.structure import Block
from imaginelens.mediation.gradients import Reading, Rules, keeping
from imaginelens.mediation.patched import Patched
from imaginelens.mediation.query_keys import FIXED

_MLP = {"gate_proj", "up_proj", "down_proj", "act_fn"}
_ATTENTION = {"q_proj", "k_proj", "v_proj", "o_proj"}
_BESIDE = {"q_norm", "k_norm", "v_norm", "rotary_emb", "dropout"}
_LINEAR = (nn.Linear, nn.Identity, nn.Dropout)
Linearised = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def relevance_rules(reading: Reading, cells: Patched) -> Rules:
    """How the backward pass of this model differs from its gradient.

    Raises:
        InputError: a norm, an MLP or an attention of this model is none of those for which the
            coefficients are defined, or a cell is a query or key, of which patterns are constants.
        SiteUnavailable: its attention pattern cannot be reached.
    """
    lens = reading.lens
    model, structure = lens.model, lens.structure
    silent = sorted({cell.site for cell, _ in cells.cells} & set(FIXED))
    if silent:
        raise InputError(
            f"method='relp' holds attention patterns constant, so that every value at "
            f"{silent[0]!r} would be 0; use method='qk' there"
        )
    norms = [structure.final_norm]
    workers: list[Worker] = []
    first: list[Entry] = []
    for layer, block in enumerate(structure.blocks):
        norms += _check_block(model, block)
        assert block.mlp is not None
        up: list[torch.Tensor] = []
        act: list[torch.Tensor] = []
        paths = {name: f"{block.mlp}.{name}" for name in _MLP}
        workers.append(_worker(lens.nnsight, paths["up_proj"], _kept(up)))
        workers.append(_worker(lens.nnsight, paths["act_fn"], _scaled(act)))
        first.append(HookEntry((f"blocks.{layer}.mlp.hook_post",), _halved(block.mlp, act, up)))
        first.append(HookEntry((f"blocks.{layer}.attn.hook_pattern",), _constant))
    entries: list[Entry] = []
    for path in norms:
        module = model.get_submodule(path)
        if isinstance(module, _LINEAR):
            continue
        seen: list[torch.Tensor] = []
        for site in cells.sites:  # a tap at its input, which the worker would come before
            if lens.registry[site].path == path and lens.registry[site].kind.slot == "mid":
                entries.append(HookEntry((site,), keeping(seen)))
        workers.append(_worker(lens.nnsight, path, _divided(path, module, seen)))
    for entry in first:
        lens.registry.match(entry.sites)  # raises where a site cannot be reached
    return Rules(first=tuple(first), entries=tuple(entries), workers=tuple(workers))


def _check_block(model: nn.Module, block: Block) -> list[str]:
    """The norms of a block, by path; refuses a block of another structure."""
    module = model.get_submodule(block.path)
    of = type(module).__name__
    if block.by_difference or block.attention is None or block.mlp is None:
        raise InputError(
            f"method='relp' is defined for blocks of an attention and an MLP, and {of} gates, "
            "scales or replaces one of them; use method='ig' or 'atp'"
        )
    for path, wanted, beside in (
        (block.attention, _ATTENTION, _BESIDE),
        (block.mlp, _MLP, _BESIDE),
    ):
        held = dict(model.get_submodule(path).named_children())
        if not wanted <= set(held) <= wanted | beside:
            raise InputError(
                f"method='relp' has no coefficients for {type(model.get_submodule(path)).__name__},"
                f" which holds {', '.join(held) or 'no modules'} and not "
                f"{', '.join(sorted(wanted))}; use method='ig' or 'atp'"
            )
    sublayers = {block.attention.rpartition(".")[2], block.mlp.rpartition(".")[2]}
    norms = [f"{block.path}.{name}" for name, _ in module.named_children() if name not in sublayers]
    norms += (
        [f"{block.attention}.v_norm"]
        if hasattr(model.get_submodule(block.attention), "v_norm")
        else []
    )
    return norms


# ---- the rules ----------------------------------------------------------------------------------


def _constant(act: torch.Tensor, hook: object) -> torch.Tensor:
    """A pattern that the states do not change."""
    return act.detach()


def _scaled(into: list[torch.Tensor]) -> Linearised:
    """An activation as its input times a constant."""

    def scale(given: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
        factor = torch.where(given == 0, 0.0, out / torch.where(given == 0, 1.0, given)).detach()
        new = _worth(out, given * factor)
        into[:] = [new]
        return new

    return scale


def _kept(into: list[torch.Tensor]) -> Linearised:
    def keep(given: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
        into[:] = [out]
        return out

    return keep


def _halved(
    path: str, act: list[torch.Tensor], up: list[torch.Tensor]
) -> Callable[..., torch.Tensor]:
    """A product whose two factors get half of it each."""

    def halve(product: torch.Tensor, hook: object) -> torch.Tensor:
        if not act or not up or not torch.equal(product, act[0] * up[0]):
            raise InputError(
                f"method='relp' has no coefficients for {path!r}, whose down_proj does not read "
                "act_fn(gate_proj) * up_proj; use method='ig' or 'atp'"
            )
        return product / 2 + (product / 2).detach()

    return halve


def _divided(path: str, module: nn.Module, seen: list[torch.Tensor]) -> Linearised:
    """A norm that divides by a constant; checked against what it really returns."""

    def divide(given: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
        x = seen[0] if seen else given
        for candidate in _norms(module, x):
            if _same(candidate, out):
                return _worth(out, candidate)
        raise InputError(
            f"method='relp' has no coefficients for {path!r}, a {type(module).__name__} that is "
            "neither an RMSNorm nor a LayerNorm; use method='ig' or 'atp'"
        )

    return divide


def _norms(module: nn.Module, x: torch.Tensor) -> list[torch.Tensor]:
    """What the norms that are known would return, their denominators constants."""
    eps = next((getattr(module, n) for n in ("variance_epsilon", "eps") if hasattr(module, n)), 0.0)
    weight = getattr(module, "weight", None)
    bias = getattr(module, "bias", None)
    shift = 0.0 if bias is None else bias.detach()
    scales = [torch.ones((), dtype=x.dtype, device=x.device)]
    if weight is not None:
        scales = [weight.detach(), 1 + weight.detach()]
    found = []
    for centred in (x, x - x.mean(-1, keepdim=True)):
        size = (centred.double().pow(2).mean(-1, keepdim=True) + float(eps or 0.0)).sqrt()
        found += [centred / size.detach().to(x) * scale + shift for scale in scales]
    return found


def _same(one: torch.Tensor, other: torch.Tensor) -> bool:
    off = (one.detach().double() - other.detach().double()).abs().max()
    near = 1e-5 if other.dtype in (torch.float64, torch.float32) else 0.05
    return bool(off <= near * other.detach().double().abs().max().clamp_min(1e-30))


def _worth(value: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """A value, to the bit, with the gradient of another."""
    return value.detach() + (like - like.detach())


def _worker(wrapped: object, path: str, rule: Linearised) -> Worker:
    def worker() -> None:
        envoy = wrapped.get(path)  # type: ignore[attr-defined]
        given = first_tensor(envoy.input)
        out = envoy.output
        value = first_tensor(out)
        new = rule(given, value)
        if new is not value:
            envoy.output = with_first(out, new)

    return worker
