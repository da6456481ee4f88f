"""What a model is like from outside: weights, hooks, attention setting, remembered positions."""

from collections.abc import Callable
from typing import Any

import torch


def fingerprint(model: torch.nn.Module) -> dict[str, Any]:
    hooks: dict[str, Callable[..., Any]] = {
        path: (len(m._forward_hooks), len(m._forward_pre_hooks), m.training, sorted(vars(m)))
        for path, m in model.named_modules()
    }
    config = {
        p: m.config._attn_implementation for p, m in model.named_modules() if hasattr(m, "config")
    }
    deltas = {p: m.rope_deltas for p, m in model.named_modules() if "rope_deltas" in vars(m)}
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    return {"hooks": hooks, "config": config, "deltas": deltas, "weights": weights}


def same(one: dict[str, Any], two: dict[str, Any]) -> bool:
    weights = all(torch.equal(v, two["weights"][k]) for k, v in one["weights"].items())
    return weights and all(one[k] == two[k] for k in ("hooks", "config", "deltas"))
