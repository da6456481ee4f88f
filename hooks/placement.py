"""Where a model's weights may lie, and where our forwards would not find them."""

from torch import nn

from imaginelens.hooks.errors import InputError


def check_placed(model: nn.Module) -> None:
    """Refuse a model whose weights are not where its forwards need them.

    Layers may lie on several devices, in the processor's memory or on the disk, as `device_map`
    puts them there; that changes no number. Two things do not work. Weights that processes share
    out among them (tensor parallelism, FSDP): the forward that gathers them is not the one that
    nnsight runs. And first weights that are elsewhere than on a device: inputs go where they are.

    Raises:
        InputError: it is one of these.

    >>> check_placed(nn.Linear(2, 2))
    """
    for name, weight in model.named_parameters():
        if type(weight).__name__ == "DTensor":
            raise InputError(
                f"{name!r} is shared out among processes (tensor parallelism or FSDP), and our "
                "forwards need all of it; load the model without tp_plan or distributed_config, "
                "over several devices by il.load(..., device_map='auto')"
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
