"""Text-only checkpoints: opened where they are a latent family, and only there.

Coconut, CODI and SIM-CoT save the module that wraps their model, so that the names of its weights
begin with the name of an attribute; these beginnings are left off.
"""

import re
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from transformers import AutoModelForMultimodalLM as Multimodal
from transformers.dynamic_module_utils import get_class_from_dynamic_module

from imaginelens.hooks.depth import DepthSpec
from imaginelens.hooks.errors import CheckpointError
from imaginelens.hooks.families import FAMILIES, Family, family_of, in_depth
from imaginelens.hooks.heads import weight_names
from imaginelens.hooks.loading import check_folder
from imaginelens.hooks.prompt_families import CODI_HEAD

# coconut.py and codi's src/model.py name the wrapped model so; "module." is of distributed training
_WRAPPED = tuple(
    f"{outer}{inner}"
    for outer in ("module.", "")
    for inner in ("base_causallm.", "codi.base_model.model.", "codi.", "")
)[:-1]


@dataclass(frozen=True)
class TextCheckpoint:
    """A text-only checkpoint of a latent family.

    Attributes:
        tokenizer: with a padding token, so that batches can be padded; None if it has none.
        family: as the user named it, or as it was recognised.
        wrapped: what the names of the model's weights begin with; empty if they are its own.
    """

    name: str
    tokenizer: Any
    family: Family
    wrapped: str

    def load(self, **options: Any) -> PreTrainedModel:
        """Open the model, from safetensors only.

        Raises:
            CheckpointError: weights of the model are not in the files.
        """
        names = {f"^{re.escape(self.wrapped)}": ""} if self.wrapped else None
        if isinstance(self.family, DepthSpec):
            _tie_as_now(self.name, self.family.embed, **options)
        model, info = AutoModelForCausalLM.from_pretrained(
            self.name,
            use_safetensors=True,  # never a pickle
            key_mapping=names,
            output_loading_info=True,
            **options,
        )
        missing = sorted(info["missing_keys"])
        if missing:
            raise CheckpointError(
                f"{self.name} lacks {len(missing)} weights of its {type(model).__name__}, the "
                f"first is {missing[0]!r}; save it with model.save_pretrained(folder)"
            )
        return model


def text_checkpoint(
    name: str | Path,
    spec: Family | Literal[False] | None,
    *,
    revision: str | None = None,
    trust_remote_code: bool = False,
) -> TextCheckpoint | None:
    """What a text-only checkpoint of a latent family is; None for any other checkpoint.

    Args:
        spec: the family, if the user names one; None recognises it, `False` is none.

    Raises:
        CheckpointError: the name leads nowhere, the family's tokens are there in part, or its
            weights are adapters that were not merged.
    """
    check_folder(name)
    options = {"revision": revision, "trust_remote_code": trust_remote_code}
    try:
        config = AutoConfig.from_pretrained(name, **options)
    except ImportError:
        raise
    except Exception:  # transformers raises errors of all kinds
        return None  # `load_model` says what is wrong with it
    deep = isinstance(spec, DepthSpec) or (spec is None and in_depth(config) is not None)
    textual = deep or type(config) in AutoModelForCausalLM._model_mapping
    if spec is False or type(config) in Multimodal._model_mapping or not textual:
        return None
    tokenizer = _tokenizer(name, **options)
    held = weight_names(name, revision=revision)
    family = spec or family_of(config, tokenizer) or _told_by_weights(held)
    if family is None:
        return None
    adapters = [weight for weight in held if ".lora_" in weight]
    if adapters:
        raise CheckpointError(
            f"{name!s} holds {len(adapters)} adapter weights, the first is {adapters[0]!r}; merge "
            "them into the model before saving it (peft: merge_and_unload), because their scale is "
            "not in the weights"
        )
    wrapped = next((w for w in _WRAPPED if any(n.startswith(w) for n in held)), "")
    return TextCheckpoint(str(name), tokenizer, family, wrapped)


def _tokenizer(name: str | Path, **options: Any) -> Any:
    """The checkpoint's tokenizer, able to pad, or None where it has none."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, **options)
    except (OSError, ValueError):
        return None
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def _tie_as_now(
    name: str, embed: str, *, revision: str | None, trust_remote_code: bool, **options: Any
) -> None:
    """Let code that was written for transformers 4 say which weights are tied as it is said now:
    a list of names can no longer be opened."""
    config = AutoConfig.from_pretrained(
        name, revision=revision, trust_remote_code=trust_remote_code
    )
    code = (getattr(config, "auto_map", None) or {}).get("AutoModelForCausalLM")
    if code is None:
        return
    own: Any = get_class_from_dynamic_module(code, name, revision=revision)
    if isinstance(own._tied_weights_keys, list):
        own._tied_weights_keys = {key: f"{embed}.weight" for key in own._tied_weights_keys}


def _told_by_weights(held: Collection[str]) -> Family | None:
    """CODI, whose tokens have no strings: its head is what shows."""
    head = [name for name in held if name.removeprefix("module.").startswith(CODI_HEAD)]
    return FAMILIES["codi"] if head else None
