"""Opening a checkpoint from a folder or the Hub, or saying what is wrong with it."""

import importlib.util
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoModelForImageTextToText,
    AutoModelForMultimodalLM,
    PreTrainedModel,
)

from imaginelens.hooks.errors import CheckpointError, brief, quoted

_HUB_ID = re.compile(r"(?!.*(--|\.\.))\w([\w.-]*\w)?/\w([\w.-]*\w)?", re.ASCII)


def load_model(
    name: str | Path,
    *,
    dtype: torch.dtype | str = "auto",
    device_map: Any = None,
    attn_implementation: str | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
) -> PreTrainedModel:
    """Open the model of a checkpoint, from safetensors only. Adapters (LoRA, by peft) are merged
    into the model they were trained on.

    Raises:
        CheckpointError: the folder is not a checkpoint, or holds no multimodal model, or not all of
            its weights; or a package is missing that its weights need.
    """
    check_folder(name)
    adapted = adapts(name)
    if adapted is not None:
        _refuse_circle(name)
        base = load_model(
            adapted,
            dtype=dtype,
            device_map=device_map,
            attn_implementation=attn_implementation,
            trust_remote_code=trust_remote_code,
        )
        return _merged(base, name)
    options = {"revision": revision, "trust_remote_code": trust_remote_code}
    try:
        config = AutoConfig.from_pretrained(name, **options)
    except ImportError:
        raise
    except Exception as error:  # transformers raises errors of all kinds
        raise CheckpointError(f"{name!s} has no config that can be read: {brief(error)}") from error
    auto = AutoModelForImageTextToText
    if type(config) not in auto._model_mapping:
        auto = AutoModelForMultimodalLM
    if type(config) not in auto._model_mapping and not trust_remote_code:
        raise CheckpointError(
            f"{name!s} is a {config.model_type!r} model, which transformers does not list as "
            "image-text-to-text; instantiate it yourself and pass it to il.LatentModel(model)"
        )
    try:
        model, info = auto.from_pretrained(
            name,
            dtype=dtype,
            device_map=device_map,
            attn_implementation=attn_implementation,
            use_safetensors=True,  # never a pickle
            output_loading_info=True,
            **options,
        )
    except ImportError as error:
        raise CheckpointError(_needs(name, config, error)) from error
    except SafetensorError as error:
        raise CheckpointError(
            f"{name!s} has weights that cannot be read ({brief(error)}); fetch or save it again"
        ) from error
    except RuntimeError as error:
        if "mismatch" not in str(error):
            raise
        raise CheckpointError(
            f"{name!s} has weights of other sizes than its config.json says "
            f"({_embedding_rows(config)} rows of token embeddings), as after a resize of the "
            "vocabulary that was not saved with the config; correct vocab_size there"
        ) from error
    missing = sorted(info["missing_keys"])
    if missing:
        raise CheckpointError(
            f"{name!s} lacks {len(missing)} weights of its {type(model).__name__}, the first is "
            f"{missing[0]!r}; save it with model.save_pretrained(folder)"
        )
    return model


def adapts(name: str | Path) -> str | None:
    """The model that a folder of adapters was trained on; None if the folder holds a model.

    Raises:
        CheckpointError: peft is missing, the adapters do not say what they adapt, or a model lies
            beside them.
    """
    path = Path(name)
    if not (path / "adapter_config.json").is_file():
        return None
    if _has_model(path):
        raise CheckpointError(
            f"{name!s} holds a model and adapters beside it, and does not say whether they are in "
            "the model already; remove adapter_config.json if they are, or move the adapters to a "
            "folder of their own"
        )
    try:
        words = json.loads((path / "adapter_config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(
            f"{name!s} has an adapter_config.json that cannot be read ({brief(error)}); save the "
            "adapters again with model.save_pretrained(folder)"
        ) from error
    base = words.get("base_model_name_or_path") if isinstance(words, dict) else None
    if not isinstance(base, str) or not base:
        raise CheckpointError(
            f"{name!s} holds adapters and does not say of which model; write its folder or Hub id "
            "into adapter_config.json as base_model_name_or_path"
        )
    if importlib.util.find_spec("peft") is None:
        raise CheckpointError(
            f"{name!s} holds adapters of {quoted(base)}, and peft, which merges them, is "
            "missing: "
            "pip install peft; or merge them yourself and save the model"
        )
    return base


def _refuse_circle(name: str | Path) -> None:
    """Refuse adapters of adapters of themselves."""
    seen = [Path(name).resolve()]
    while (base := adapts(seen[-1])) is not None:
        if Path(base).resolve() in seen:
            raise CheckpointError(
                f"the adapters in {name!s} lead back to {quoted(base)}, which is no model; "
                "write the folder or Hub id of their model into adapter_config.json as "
                "base_model_name_or_path"
            )
        seen.append(Path(base).resolve())


@contextmanager
def readable(name: str | Path) -> Iterator[None]:
    """Turn what goes wrong as a processor is read into a sentence about the checkpoint.

    Raises:
        CheckpointError: one of its files is torn, or holds something else.
    """
    try:
        yield
    except (ImportError, FileNotFoundError, CheckpointError):  # these say what is missing
        raise
    except Exception as error:  # transformers and tokenizers raise errors of all kinds
        raise CheckpointError(
            f"{name!s} has a processor or tokenizer that cannot be read ({brief(error)}); fetch it "
            "again, or save it with processor.save_pretrained(folder)"
        ) from error


def processor_home(name: str | Path) -> str | Path:
    """Where a checkpoint's processor lies: adapters may leave it with their model."""
    adapted = adapts(name)
    if adapted is None or (Path(name) / "processor_config.json").is_file():
        return name
    return adapted


def _merged(base: PreTrainedModel, name: str | Path) -> PreTrainedModel:
    from peft import PeftModel

    try:
        model: PreTrainedModel = PeftModel.from_pretrained(base, str(name)).merge_and_unload()
    except (RuntimeError, ValueError) as error:
        first = str(error).splitlines()[0]
        raise CheckpointError(
            f"the adapters of {name!s} do not fit {type(base).__name__}: {first}"
        ) from error
    return model


def _needs(name: str | Path, config: Any, error: ImportError) -> str:
    """What is missing for weights that are stored in another way."""
    stored = getattr(config, "quantization_config", None)
    stored = stored if isinstance(stored, dict) else vars(stored) if stored else {}
    method = stored.get("quant_method")
    method = str(getattr(method, "value", method))
    if not stored:
        return f"{name!s} cannot be opened: {str(error).strip().splitlines()[0]}"
    told = re.search(r"pip install (?:-U )?([\w.-]+)", str(error))
    package = told[1] if told else method
    return (
        f"{name!s} is quantised with {method}, which needs a package: pip install {package}; or "
        "open a checkpoint that is not quantised"
    )


def _embedding_rows(config: Any) -> Any:
    return getattr(config.get_text_config(decoder=True), "vocab_size", "unknown")


def _has_model(path: Path) -> bool:
    """Whether a folder holds a whole model's weights, not adapters alone."""
    files = [p.name for p in path.glob("*.safetensors*")]
    return any(not n.startswith("adapter_") for n in files)


def is_hub_id(name: str) -> bool:
    """Whether a name has the form of a repository of the Hub.

    >>> is_hub_id("owner/name"), is_hub_id("name"), is_hub_id("owner/na me")
    (True, False, False)
    """
    return _HUB_ID.fullmatch(name) is not None


def check_folder(name: str | Path) -> None:
    """Refuse what is neither a checkpoint's folder nor a Hub id, and say what it is."""
    path = Path(name)
    if path.is_file():
        raise CheckpointError(f"{name!s} is a file, expected a checkpoint folder or a Hub id")
    if not path.is_dir():
        if (
            isinstance(name, Path)
            or str(name).startswith((".", "/", "~"))
            or not is_hub_id(str(name))
        ):
            raise CheckpointError(
                f"{brief(name)} is neither a folder nor a Hub id of the form 'owner/name'; "
                "check the path, or ask il.organisms.available() for the shipped ones"
            )
        return
    held = sorted(p.name for p in path.iterdir())
    if "adapter_config.json" in held and not _has_model(path):
        return
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
