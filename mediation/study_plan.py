"""What fixes the numbers of a study: if any of it changes, a study cannot be gone on with."""

import hashlib
from collections.abc import Mapping
from dataclasses import asdict
from importlib.metadata import version
from typing import Any

import torch

from imaginelens.hooks import LatentModel
from imaginelens.mediation.provenance import PACKAGES
from imaginelens.mediation.study_config import MapConfig, StudyConfig
from imaginelens.mediation.study_data import StudyData


def plan_of(
    config: StudyConfig, each: MapConfig, lens: LatentModel, data: StudyData, weights: str
) -> dict[str, Any]:
    """The plan of one map, as plain values. Where files lie is no part of it, but what is in them.

    Args:
        weights: `weights_key(lens.model)`, which takes a while.
    """
    how = asdict(each)
    how["edit"] = {"name": each.edit.name, **dict(each.edit.settings)}
    del how["name"]
    run = {"batch_size": config.run.batch_size, "seed": config.run.seed}
    packages = {package: version(package) for package in PACKAGES}
    return {
        "map": how,
        "run": run,
        "data": {
            "pairs": len(data.pairs),
            "reference": config.data.reference,
            "content": data.content,
        },
        "model": {
            "name": config.model.name,
            "spec": config.model.spec,
            "answer": config.model.answer,
            "attn_implementation": config.model.attn_implementation,
            "class": type(lens.model).__name__,
            "revision": str(getattr(lens.model.config, "_commit_hash", None) or ""),
            "dtype": str(lens.model.dtype).removeprefix("torch."),
            "device": lens.model.device.type,
            "weights": weights,
        },
        "versions": packages,
    }


def weights_key(model: torch.nn.Module) -> str:
    """A digest of a model's weights: names, shapes and the sums of their bits, which are exact and
    do not depend on an order.

    >>> one, two = torch.nn.Linear(2, 2), torch.nn.Linear(2, 2)
    >>> weights_key(one) == weights_key(one), weights_key(one) == weights_key(two)
    (True, False)
    """
    digest = hashlib.blake2b(digest_size=16)
    named: Mapping[str, torch.Tensor] = {**dict(model.named_parameters()), **_stored(model)}
    for name, weight in sorted(named.items()):
        digest.update(f"{name} {weight.dtype} {tuple(weight.shape)} {_sum(weight)}".encode())
    return digest.hexdigest()


def _stored(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """The buffers that a checkpoint holds."""
    there = set(model.state_dict())
    return {name: buffer for name, buffer in model.named_buffers() if name in there}


_WHOLE = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def _sum(weight: torch.Tensor) -> str:
    """The sum of a tensor's bits, read as whole numbers; they wrap around alike everywhere."""
    bits = _WHOLE.get(weight.element_size())
    if weight.device.type == "meta" or bits is None or weight.is_complex():
        return "unread"
    return str(int(weight.detach().contiguous().view(bits).sum(dtype=torch.int64)))
