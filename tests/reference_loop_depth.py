"""Huginn in plain torch, from its weights alone: the judge of depth recurrence.

One example at a time, no cache, no padding: every step reads the whole sequence anew, attention is
written out, and the initial states are given. Written from the description of
recpre/raven_modeling_minimal.py (seal-rg/recurrent-pretraining: forward, iterate_forward,
core_block_forward); nothing here is shared with the library or with the tiny model.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch

Weights = Mapping[str, torch.Tensor]


@dataclass(frozen=True)
class Sizes:
    """What the weights do not tell."""

    heads: int
    prelude: int
    core: int
    coda: int
    steps: int
    rope_base: float
    eps: float


@dataclass
class Trace:
    """All ids, prompt included, and the states (position, d_model) of every recurrence: the initial
    ones first, those that leave the last one behind."""

    ids: list[int]
    states: list[torch.Tensor] = field(default_factory=list)
    fed: dict[int, torch.Tensor] = field(default_factory=dict)  # nothing is


def normed(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    return x * torch.rsqrt((x * x).mean(-1, keepdim=True) + eps) * weight


def rotated(x: torch.Tensor, base: float) -> torch.Tensor:
    """Pairs of neighbouring features turned by position x frequency; x is (position, head, d)."""
    n, _, d = x.shape
    out = torch.empty_like(x)
    for pair in range(d // 2):
        angle = torch.arange(n, dtype=torch.float64) * base ** (-2 * pair / d)
        c, s = angle.cos()[:, None], angle.sin()[:, None]
        a, b = x[..., 2 * pair], x[..., 2 * pair + 1]
        out[..., 2 * pair], out[..., 2 * pair + 1] = a * c - b * s, a * s + b * c
    return out


def attention(w: Weights, at: str, x: torch.Tensor, sizes: Sizes) -> torch.Tensor:
    n, d = x.shape
    q, k, v = (x @ part.T for part in w[f"{at}.Wqkv.weight"].split(d))
    q, k, v = (part.view(n, sizes.heads, -1) for part in (q, k, v))
    bias = w[f"{at}.qk_bias"]
    q, k = (rotated(part + b, sizes.rope_base) for part, b in zip((q, k), bias, strict=True))
    mixed = torch.zeros_like(v)
    for head in range(sizes.heads):
        scores = q[:, head] @ k[:, head].T / q.shape[-1] ** 0.5
        scores = scores.masked_fill(torch.ones(n, n).triu(1).bool(), -torch.inf)
        mixed[:, head] = scores.softmax(-1) @ v[:, head]
    return mixed.reshape(n, d) @ w[f"{at}.proj.weight"].T


def block(w: Weights, at: str, x: torch.Tensor, sizes: Sizes) -> torch.Tensor:
    def norm(k: int, y: torch.Tensor) -> torch.Tensor:
        return normed(y, w[f"{at}.norm_{k}.weight"], sizes.eps)

    x = norm(2, attention(w, f"{at}.attn", norm(1, x), sizes) + x)
    gate, up = (norm(3, x) @ w[f"{at}.mlp.fc.weight"].T).chunk(2, -1)
    return norm(4, (gate * gate.sigmoid() * up) @ w[f"{at}.mlp.proj.weight"].T + x)


def read(
    w: Weights, ids: list[int], initial: torch.Tensor, sizes: Sizes
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """The logits of every position and the states of every recurrence."""
    t = "transformer"
    e = w[f"{t}.wte.weight"][ids] * initial.shape[-1] ** 0.5
    for k in range(sizes.prelude):
        e = block(w, f"{t}.prelude.{k}", e, sizes)
    states = [initial]
    for _ in range(sizes.steps):
        x = torch.cat([states[-1], e], -1) @ w[f"{t}.adapter.weight"].T
        for k in range(sizes.core):
            x = block(w, f"{t}.core_block.{k}", x, sizes)
        states.append(x)
    ln_f = w[f"{t}.ln_f.weight"]
    x = normed(states[-1], ln_f, sizes.eps)
    for k in range(sizes.coda):
        x = block(w, f"{t}.coda.{k}", x, sizes)
    return normed(x, ln_f, sizes.eps) @ w["lm_head.weight"].T, states


def huginn(
    w: Weights,
    ids: list[int],
    initial: Callable[[int], torch.Tensor],
    sizes: Sizes,
    *,
    max_new: int,
    eos: int,
) -> Trace:
    """Greedy decoding; `initial` gives the state that a position begins with."""
    trace = Trace(list(ids))
    while len(trace.ids) - len(ids) < max_new:
        begun = torch.stack([initial(place) for place in range(len(trace.ids))])
        logits, trace.states = read(w, trace.ids, begun, sizes)
        trace.ids.append(int(logits[-1].argmax()))
        if trace.ids[-1] == eos:
            break
    return trace
