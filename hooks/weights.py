"""Weights in the axes in which TransformerLens' functions ask for them: by head, and a norm's gain.

A weight is offered only where it says what TransformerLens takes it to say: a head's output weights
are those with which its values enter the residual stream, so nothing may stand between the two.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import cast

import torch
from torch import nn

from imaginelens.hooks.errors import SiteUnavailable
from imaginelens.hooks.structure import Block, Structure
from imaginelens.hooks.tensor_parallel import whole_weight

Weights = dict[str, Callable[[], torch.Tensor]]

_LARGE = 1e4  # beside which a norm's epsilon is nothing, and whose square half precision holds


def attention_weights(model: nn.Module, structure: Structure, layer: int) -> Weights:
    """`W_Q W_K W_V` (head, d_model, d_head), `W_O` (head, d_head, d_model), and their biases.

    Each is made when it is asked for.

    Raises:
        SiteUnavailable: when asked, the block has no such layer, or a norm or a gate stands behind.
    """
    block = structure.blocks[layer]
    heads = {"q": structure.n_heads, "k": structure.n_kv_heads, "v": structure.n_kv_heads}
    found: Weights = {}
    for part, n in heads.items():
        linear = partial(_linear, model, block, part, f"blocks.{layer}.attn.W_{part.upper()}")
        found[f"W_{part.upper()}"] = partial(_into_heads, linear, n)
        found[f"b_{part.upper()}"] = partial(_bias, linear, n)
    linear = partial(_linear, model, block, "o", f"blocks.{layer}.attn.W_O")
    found["W_O"] = partial(_out_of_heads, linear, structure.n_heads)
    found["b_O"] = partial(_bias, linear)
    return found


def mlp_weights(model: nn.Module, structure: Structure, layer: int) -> Weights:
    """`W_out` (neuron, d_model) and its bias.

    Each is made when it is asked for.

    Raises:
        SiteUnavailable: when asked, the block has no such layer, or a norm or a gate stands behind.
    """
    block = structure.blocks[layer]
    linear = partial(_linear, model, block, "mlp_down", f"blocks.{layer}.mlp.W_out")
    return {"W_out": lambda: whole_weight(linear()).T, "b_out": partial(_bias, linear)}


def _linear(model: nn.Module, block: Block, part: str, name: str) -> nn.Linear:
    path = getattr(block, part)
    module = None if path is None else model.get_submodule(path)
    if not isinstance(module, nn.Linear) or not module.weight.is_floating_point():
        kind = "no such layer" if module is None else f"a {type(module).__name__} there"
        raise SiteUnavailable(
            f"{name} is not offered: the block has {kind}, and a linear layer of floats was "
            "expected; use activations, such as hook_attn_out and hook_mlp_out"
        )
    ends = {"o": (block.attn_out, block.attention), "mlp_down": (block.mlp_out, block.mlp)}
    out, inside = ends.get(part, (path, path))
    if out not in (inside, path) or block.by_difference:
        raise SiteUnavailable(
            f"{name} is not offered: {out.rpartition('.')[2] if out else 'a gate'} stands between "
            "this layer and the residual stream, so its parts are no terms of the stream; use "
            "hook_attn_out and hook_mlp_out, which are"
        )
    return module


def _into_heads(linear: Callable[[], nn.Linear], heads: int) -> torch.Tensor:
    return whole_weight(linear()).unflatten(0, (heads, -1)).transpose(1, 2)


def _out_of_heads(linear: Callable[[], nn.Linear], heads: int) -> torch.Tensor:
    return whole_weight(linear()).T.unflatten(0, (heads, -1))


def _bias(linear: Callable[[], nn.Linear], heads: int | None = None) -> torch.Tensor:
    layer = linear()
    bias = layer.weight.new_zeros(layer.out_features) if layer.bias is None else layer.bias
    bias = bias.full_tensor() if hasattr(bias, "full_tensor") else bias
    return bias if heads is None else bias.unflatten(0, (heads, -1))


@dataclass(frozen=True)
class NormReading:
    """What a norm does, told from what it makes of three vectors: `gain * x / scale(x) + shift`.

    Attributes:
        centred: it takes the mean away first, as a LayerNorm does.
    """

    norm: nn.Module
    gain: torch.Tensor
    shift: torch.Tensor
    centred: bool

    def scale(self, x: torch.Tensor) -> torch.Tensor | None:
        """By what it divides each vector, (..., 1); None if it does something else.

        >>> norm = nn.RMSNorm(4)
        >>> read_norm(norm, torch.ones(4)).scale(torch.tensor([[3.0, 4.0, 0.0, 0.0]]))
        tensor([[2.5000]])
        """
        with torch.no_grad():
            out = self.norm(x) - self.shift
            wanted = (x - x.mean(-1, keepdim=True) if self.centred else x) * self.gain
            size = out.norm(dim=-1, keepdim=True)
            scale = torch.where(size > 0, wanted.norm(dim=-1, keepdim=True) / size, 1)
            wrong = (wanted / scale - out).norm()
        return scale if bool(wrong <= 0.02 * out.norm()) else None


def read_norm(norm: nn.Module, like: torch.Tensor) -> NormReading | None:
    """Find a norm's gain and shift, whatever its class calls them; `like` is one vector it takes.

    None if it does not make one vector of one: it mixes several streams, say.

    >>> norm = nn.LayerNorm(4)
    >>> _ = norm.weight.data.mul_(3)
    >>> read_norm(norm, torch.ones(4)).gain.tolist()
    [3.0, 3.0, 3.0, 3.0]
    """
    signs = torch.ones_like(like)
    try:
        shift = cast(torch.Tensor, norm(torch.zeros_like(like)[None, None]))[0, 0]
    except (RuntimeError, TypeError, ValueError, IndexError):  # as the class words it
        return None
    if shift.shape != like.shape:
        return None
    flat = norm(signs[None, None] * _LARGE)[0, 0] - shift
    centred = isinstance(norm, nn.LayerNorm) or bool(flat.abs().max() < 1e-2)
    if centred:
        signs[1::2] = -1
    gain = (norm(signs[None, None] * _LARGE)[0, 0] - shift) * signs
    return NormReading(norm, gain, shift, centred)
