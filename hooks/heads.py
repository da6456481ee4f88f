"""Weights that a checkpoint holds beside its model: heads of LVR and CODI, LVR's learned end.

transformers loads the model and leaves these aside. They are read from the safetensors files here,
into modules of ours, so that no code of a checkpoint is ever run.
"""

import json
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool, Float
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers.activations import ACT2FN
from transformers.utils import cached_file

from imaginelens.hooks.errors import CheckpointError, brief

_UNREADABLE = (OSError, ValueError, TypeError, LookupError, AttributeError)


class SimpleHead(nn.Module):
    """LVR's `simple` head (src/model/lvr_heads.py): norm, linear, GELU, linear."""

    def __init__(self, d_model: int) -> None:
        super().__init__()
        self.ln_q = nn.LayerNorm(d_model, eps=1e-6)
        self.mlp = nn.Sequential(
            nn.Linear(d_model, d_model), nn.GELU(), nn.Linear(d_model, d_model)
        )

    def forward(self, h: Float[torch.Tensor, "*cell d_model"]) -> torch.Tensor:
        """Map hidden states to what is fed back."""
        return self.mlp(self.ln_q(h))


class GatedHead(nn.Module):
    """LVR's `glu` head (src/model/lvr_heads.py): a gated linear unit with biases."""

    def __init__(self, d_model: int, d_mlp: int, activation: str) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(d_model, d_mlp)
        self.up_proj = nn.Linear(d_model, d_mlp)
        self.down_proj = nn.Linear(d_mlp, d_model)
        self.act_fn = ACT2FN[activation]

    def forward(self, h: Float[torch.Tensor, "*cell d_model"]) -> torch.Tensor:
        """Map hidden states to what is fed back."""
        return self.down_proj(self.act_fn(self.gate_proj(h)) * self.up_proj(h))


@dataclass(frozen=True, eq=False)
class OnLatents:
    """Applies a head where the input was itself a latent, so that the first of a span skips it.

    This is what LVR's released inference does (src/train/monkey_patch_forward_lvr.py:1050-1052);
    its training applies the head to the first latent as well (:1038-1044).
    """

    head: nn.Module

    def __call__(
        self, h: Float[torch.Tensor, "*cell d_model"], is_latent: Bool[torch.Tensor, "*cell"]
    ) -> torch.Tensor:
        return torch.where(is_latent[..., None], self.head(h), h)


@dataclass(frozen=True, eq=False)
class OnAll:
    """Applies a head to every state that is fed back, the first of a span included (CODI)."""

    head: nn.Module

    def __call__(
        self, h: Float[torch.Tensor, "*cell d_model"], is_latent: Bool[torch.Tensor, "*cell"]
    ) -> torch.Tensor:
        return self.head(h)


@dataclass(frozen=True, eq=False)
class NearTo:
    """Whether a state is near a learned one: mean squared difference below a threshold."""

    target: torch.Tensor
    threshold: float

    def __call__(self, h: Float[torch.Tensor, "row d_model"]) -> torch.Tensor:
        return (h - self.target.to(h)).square().mean(-1) < self.threshold


def _projection(own: Mapping[str, torch.Tensor]) -> nn.Module:
    """CODI's `prj` (src/model.py): linear, GELU, linear and, unless it was left out, a norm. The
    dropout that comes first in its numbering has no weights."""
    d_mlp, d_model = own["1.weight"].shape
    parts: OrderedDict[str, nn.Module] = OrderedDict()
    parts["1"], parts["2"] = nn.Linear(d_model, d_mlp), nn.GELU()
    parts["3"] = nn.Linear(d_mlp, d_model)
    if "ln.weight" in own:
        parts["ln"] = nn.LayerNorm(d_model)
    return nn.Sequential(parts)


def build_head(
    weights: Mapping[str, torch.Tensor], prefix: str, activation: str = "silu"
) -> nn.Module:
    """Make the head whose weights begin with `prefix`; their names tell of which kind it is.

    Raises:
        CheckpointError: the weights are not those of a head that is known.
    """
    own = {k.removeprefix(prefix): v for k, v in weights.items() if k.startswith(prefix)}
    head: nn.Module
    if "gate_proj.weight" in own:
        d_mlp, d_model = own["gate_proj.weight"].shape
        head = GatedHead(d_model, d_mlp, activation)
    elif "ln_q.weight" in own:
        head = SimpleHead(len(own["ln_q.weight"]))
    elif "1.weight" in own:
        head = _projection(own)
    else:
        raise CheckpointError(
            f"the config asks for a head {prefix}* and the weights hold "
            f"{', '.join(sorted(own)) or 'none'}; expected {prefix}ln_q, {prefix}mlp (simple) or "
            f"{prefix}gate_proj, {prefix}up_proj, {prefix}down_proj (glu) or {prefix}1, {prefix}3, "
            f"{prefix}ln (codi), so open the folder that training wrote with il.load"
        )
    like = next(iter(own.values()))
    head = head.to(like.device, like.dtype).eval().requires_grad_(False)
    try:
        head.load_state_dict(own)
    except RuntimeError as error:
        found = " ".join(str(error).split())
        raise CheckpointError(f"the weights {prefix}* do not fit its head: {found}") from error
    return head


def read_extras(
    folder_or_id: str | Path, names: Sequence[str], *, revision: str | None = None
) -> dict[str, torch.Tensor]:
    """Read the weights whose names begin with one of `names` from a checkpoint's safetensors."""
    found: dict[str, torch.Tensor] = {}
    for file in _weight_files(folder_or_id, revision):
        with _opened(file) as weights:
            for name in weights.keys():
                if name.startswith(tuple(names)):
                    found[name] = weights.get_tensor(name)
    return found


def weight_names(folder_or_id: str | Path, *, revision: str | None = None) -> list[str]:
    """The names of all weights of a checkpoint's safetensors."""
    found: list[str] = []
    for file in _weight_files(folder_or_id, revision):
        with _opened(file) as weights:
            found += weights.keys()
    return found


def _weight_files(folder_or_id: str | Path, revision: str | None) -> list[str]:
    def file(name: str) -> str | None:
        return cached_file(
            str(folder_or_id), name, revision=revision, _raise_exceptions_for_missing_entries=False
        )

    index = file("model.safetensors.index.json")
    if index is None:
        return [f for f in [file("model.safetensors")] if f is not None]
    try:
        words = json.loads(Path(index).read_text(encoding="utf-8"))
        shards = sorted(set(words["weight_map"].values()))
        if odd := [name for name in shards if Path(name).name != name]:
            raise ValueError(f"{odd[0]!r} is no name of a file beside it")
    except (*_UNREADABLE, RecursionError) as error:
        raise CheckpointError(
            f"{folder_or_id!s} has a model.safetensors.index.json that cannot be read "
            f"({brief(error)}); save the model again with model.save_pretrained(folder)"
        ) from error
    return [f for f in map(file, shards) if f is not None]


@contextmanager
def _opened(file: str) -> Iterator[Any]:
    """A file of weights, for reading.

    Raises:
        CheckpointError: it is torn, or no safetensors file.
    """
    try:
        with safe_open(file, framework="pt") as weights:
            yield weights
    except (OSError, SafetensorError) as error:
        raise CheckpointError(
            f"{file} cannot be read as safetensors ({brief(error)}); fetch or save it again"
        ) from error
