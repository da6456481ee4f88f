"""Where a model's weights may lie, and where our forwards would not find them."""

from collections.abc import Iterable
from typing import Any

from torch import nn

from imaginelens.hooks.errors import InputError
from imaginelens.hooks.tensor_parallel import is_split


def check_placed(model: nn.Module) -> None:
    """Refuse a model whose weights are not where its forwards need them.

    Layers may lie on several devices, in the processor's memory or on the disk, as `device_map`
    puts them there; that changes no number. Processes may share layers as `tp_plan` says. Two
    things do not work. Weights that are shared in other ways, such as by FSDP: each process works
    on rows of its own. And first weights that are elsewhere than on a device: inputs go where they
    are.

    Raises:
        InputError: it is one of these.

    >>> check_placed(nn.Linear(2, 2))
    """
    weights: Iterable[tuple[str, Any]] = model.named_parameters()
    for name, weight in weights:
        if type(weight).__name__ != "DTensor":
            continue
        split = is_split(model.get_submodule(name.rpartition(".")[0]))
        if not split or weight.device_mesh.ndim > 1:
            raise InputError(
                f"{name!r} is shared out among processes otherwise than by tensor parallelism "
                "alone (FSDP, or both); load the model with a tp_plan, or over several devices by "
                "il.load(..., device_map='auto')"
            )
    places: dict[str, object] = dict(getattr(model, "hf_device_map", {}))
    first = next(iter(model.named_parameters()), None)
    if first is None or not first[1].is_meta or set(places.values()) <= {"meta"}:
        return
    part = next((key for key in places if first[0].startswith(key)), "")
    raise InputError(
        f"device_map puts {part or 'the whole model'!r} on {places.get(part)!r}, and the inputs go "
        f"where the first weights are ({first[0]!r}); keep these on a device, and put decoder "
        "layers elsewhere"
    )
