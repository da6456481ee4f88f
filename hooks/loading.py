"""Opening a checkpoint from a folder or the Hub, or saying what is wrong with it."""

from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModelForImageTextToText,
    AutoModelForMultimodalLM,
    PreTrainedModel,
)

from imaginelens.hooks.errors import CheckpointError


def load_model(
    name: str | Path,
    *,
    dtype: torch.dtype | str = "auto",
    device_map: Any = None,
    attn_implementation: str | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
) -> PreTrainedModel:
    """Open the model of a checkpoint, from safetensors only.

    Raises:
        CheckpointError: the folder is not a checkpoint, or holds no multimodal model.
    """
    _check_folder(name)
    options = {"revision": revision, "trust_remote_code": trust_remote_code}
    try:
        config = AutoConfig.from_pretrained(name, **options)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{name!s} has no config that can be read: {error}") from error
    auto = AutoModelForImageTextToText
    if type(config) not in auto._model_mapping:
        auto = AutoModelForMultimodalLM
    if type(config) not in auto._model_mapping and not trust_remote_code:
        raise CheckpointError(
            f"{name!s} is a {config.model_type!r} model, which transformers does not list as "
            "image-text-to-text; instantiate it yourself and pass it to il.LatentModel(model)"
        )
    return auto.from_pretrained(
        name,
        dtype=dtype,
        device_map=device_map,
        attn_implementation=attn_implementation,
        use_safetensors=True,  # never a pickle
        **options,
    )


def _check_folder(name: str | Path) -> None:
    path = Path(name)
    if path.is_file():
        raise CheckpointError(f"{name!s} is a file, expected a checkpoint folder or a Hub id")
    if not path.is_dir():
        if (
            isinstance(name, Path)
            or str(name).startswith((".", "/", "~"))
            or str(name).count("/") != 1
        ):
            raise CheckpointError(
                f"{name!s} is neither a folder nor a Hub id of the form 'owner/name'; "
                "check the path, or ask il.organisms.available() for the shipped ones"
            )
        return
    held = sorted(p.name for p in path.iterdir())
    if "config.json" not in held:
        shown = ", ".join(held[:5]) or "nothing"
        raise CheckpointError(
            f"{name!s} is not a checkpoint: it holds {shown} and no config.json; "
            "pass the folder that save_pretrained wrote"
        )
    if not any(n.endswith((".safetensors", ".safetensors.index.json")) for n in held):
        raise CheckpointError(
            f"{name!s} has a config.json and no .safetensors weights; save them with "
            "model.save_pretrained(folder)"
        )
