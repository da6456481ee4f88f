"""Models whose layers several processes share (`tp_plan`): what hooks see of them is whole.

transformers puts the collectives into a `forward` around each layer that it has split. nnsight is
told to leave them inside the places where it reads and writes. There all is whole but two things:
what a linear layer that is split by columns puts out, and what one that is split by rows is given.
Of these, a hook is shown all parts together, and what it returns is split again.

All processes must do the same with the same input, for each waits for the parts of the others.
"""

import inspect
from collections.abc import Callable

import torch
from nnsight.intervention.source import BODY_FORWARD
from torch import nn

from imaginelens.hooks.errors import InputError, SiteUnavailable

Hook = Callable[[torch.Tensor], torch.Tensor]


def is_split(module: nn.Module) -> bool:
    """Whether transformers has put a `forward` with collectives around this module's own.

    >>> is_split(nn.Linear(2, 2))
    False
    """
    forward = module.__dict__.get("forward")
    wrapped = ".install_forward.<locals>." in getattr(forward, "__qualname__", "")
    return wrapped or bool(module.__dict__.get(BODY_FORWARD))


def keep_collectives(model: nn.Module) -> None:
    """Have nnsight run the collectives of split layers inside its places; before it wraps them.

    Raises:
        InputError: positions or experts are split among the processes, too: a state is then whole
            nowhere, or nobody has tried.
    """
    for name, module in model.named_modules():
        if not is_split(module) or module.__dict__.get(BODY_FORWARD):
            continue
        around = inspect.getclosurevars(module.forward).nonlocals.get("self")
        kind = type(around)
        if kind.__name__ == "SequenceParallel" or kind.__module__.endswith(".expert_parallel"):
            raise InputError(
                f"{name!r} is split by positions or experts ({kind.__name__}), and its states "
                "would not be put together here; leave it out of tp_plan"
            )
        module.__dict__[BODY_FORWARD] = True


def shown_whole(module: nn.Module, end: str, name: str, fn: Hook) -> Hook:
    """`fn` for the "input" or "output" of a module, shown all of what this process has a part of.

    Raises:
        SiteUnavailable: when it runs, the parts cannot be put together.
    """
    if not isinstance(module, nn.Linear) or not is_split(module):
        return fn
    width, dim = (module.in_features, 1) if end == "input" else (module.out_features, 0)

    def shown(part: torch.Tensor) -> torch.Tensor:
        from torch.distributed.tensor import DTensor, Replicate, Shard

        if part.shape[-1] == width:
            return fn(part)
        weight = module.weight
        if not isinstance(weight, DTensor) or weight.placements != (Shard(dim),):
            raise SiteUnavailable(
                f"{name!r} is split in a way that is not put together here; use a site of the "
                "residual stream, or load the model without tp_plan"
            )
        shape = torch.Size((*part.shape[:-1], width))
        stride = torch.empty(shape, device="meta").stride()
        parts = DTensor.from_local(
            part, weight.device_mesh, [Shard(-1)], run_check=False, shape=shape, stride=stride
        )
        act = parts.full_tensor()
        new = fn(act)
        if new is act and not act.requires_grad:  # else the gradient has to pass through it
            return part
        whole = DTensor.from_local(new, weight.device_mesh, [Replicate()], run_check=False)
        return whole.redistribute(placements=[Shard(-1)]).to_local()

    return shown


def whole_weight(module: nn.Module) -> torch.Tensor:
    """All of a module's weight, of which this process may have a part."""
    weight = module.weight
    assert isinstance(weight, torch.Tensor)
    return weight.full_tensor() if hasattr(weight, "full_tensor") else weight
