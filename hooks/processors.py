"""Load a checkpoint's processor, also where torchvision is missing.

Qwen2-VL, Qwen2.5-VL, Qwen3-VL, LLaVA-OneVision, InternVL and SmolVLM processors insist on a video
processor, which needs torchvision, and torchvision has no build for torch's CPU wheel. Images need
none of it, so `load_processor` gives `AutoProcessor`'s answer where that works and otherwise the
same stock class with its video slot left out (`image_only`).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NoReturn

from transformers import AutoConfig, AutoProcessor, ProcessorMixin
from transformers.models.auto.processing_auto import PROCESSOR_MAPPING, processor_class_from_name
from transformers.utils import cached_file, is_torchvision_available, is_vision_available

# where a checkpoint may name its processor class, in AutoProcessor's order
CLASS_FILES = ("processor_config.json", "preprocessor_config.json", "tokenizer_config.json")


def load_processor(
    folder_or_id: str | Path,
    *,
    revision: str | None = None,
    local_files_only: bool = False,
    trust_remote_code: bool = False,
) -> ProcessorMixin:
    """Load the processor of a local folder or Hub id; images and text always work, videos may not.

    Without torchvision the result is the checkpoint's own processor class, except that it refuses
    videos: `apply_chat_template`, calling it and `save_pretrained` work as in the stock class.

    >>> from imaginelens.organisms import checkpoint
    >>> type(load_processor(checkpoint.folder("latent-content"))).__name__
    'Qwen2_5_VLProcessor'
    """
    if not is_vision_available():
        raise ImportError("Image processors need Pillow: pip install pillow.")
    _refuse_empty_folder(folder_or_id)
    source = {"revision": revision or "main", "local_files_only": local_files_only}
    stock = _processor_class(folder_or_id, trust_remote_code=trust_remote_code, **source)
    if stock is not None and _video_slots(stock) and not is_torchvision_available():
        return image_only(stock).from_pretrained(str(folder_or_id), **source)
    processor = _auto_processor(folder_or_id, trust_remote_code=trust_remote_code, **source)
    if not isinstance(processor, ProcessorMixin):
        raise ValueError(
            f"{str(folder_or_id)!r} has a {type(processor).__name__} but no multimodal processor: "
            f"expected one of {', '.join(CLASS_FILES)} to name a processor_class."
        )
    return processor


def image_only(stock: type[ProcessorMixin]) -> type[ProcessorMixin]:
    """Make `stock` without its video processor: a thin subclass of the same name.

    The name is kept because `save_pretrained` writes it, and the saved folder should load as the
    stock class wherever torchvision is installed.

    >>> from transformers import Qwen2VLProcessor
    >>> image_only(Qwen2VLProcessor).get_attributes()
    ['image_processor', 'tokenizer']
    """
    if stock not in _MADE:
        _MADE[stock] = type(stock.__name__, (stock, _WithoutVideo), {"__doc__": stock.__doc__})
    return _MADE[stock]


_MADE: dict[type[ProcessorMixin], type[ProcessorMixin]] = {}  # so that equal means identical


class _RefuseVideos:
    """Stands where the video processor would; any use of it says what to install."""

    def __call__(self, *args: Any, **kwargs: Any) -> NoReturn:
        raise ImportError("Videos need torchvision, which is missing: pip install torchvision.")


class _WithoutVideo(ProcessorMixin):
    """Comes after the stock class in the method order, so the stock `__init__` calls ours.

    The stock class passes its parts on by position, video processor included; we drop that one.
    """

    # a class attribute, so that it is neither a part to save nor a value to serialise
    video_processor = _RefuseVideos()

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        parts = dict(zip(super().get_attributes(), args, strict=False)) | kwargs
        for slot in _video_slots(type(self)):
            parts.pop(slot, None)
        super().__init__(**parts)

    @classmethod
    def get_attributes(cls) -> list[str]:
        return [part for part in super().get_attributes() if "video" not in part]

    @classmethod
    def from_args_and_dict(
        cls, args: list[Any], processor_dict: dict[str, Any], **kwargs: Any
    ) -> ProcessorMixin:
        parts = dict(zip(cls.get_attributes(), args, strict=True))
        every_slot = [parts.get(name) for name in super().get_attributes()]
        return super().from_args_and_dict(every_slot, processor_dict, **kwargs)


def _video_slots(cls: type[ProcessorMixin]) -> list[str]:
    """The names under which a processor class takes a video processor."""
    # asked of ProcessorMixin itself, because image-only classes hide theirs
    parts = ProcessorMixin.get_attributes.__func__(cls)
    return [part for part in parts if "video" in part]


def _refuse_empty_folder(folder_or_id: str | Path) -> None:
    folder = Path(folder_or_id)
    looks_local = isinstance(folder_or_id, Path) or folder.is_absolute() or folder.is_dir()
    if not looks_local:
        return
    if not folder.is_dir():
        raise FileNotFoundError(f"{str(folder)!r} is not a folder: expected a checkpoint folder.")
    if not any((folder / name).is_file() for name in (*CLASS_FILES, "config.json")):
        found = ", ".join(sorted(path.name for path in folder.iterdir())[:8]) or "nothing"
        raise FileNotFoundError(
            f"{str(folder)!r} is not a checkpoint: found {found}; expected config.json and one of "
            f"{', '.join(CLASS_FILES)}."
        )


def _processor_class(
    folder_or_id: str | Path, *, trust_remote_code: bool, **source: Any
) -> type[ProcessorMixin] | None:
    """The stock class AutoProcessor would choose, or None where only remote code knows."""
    for file in CLASS_FILES:
        path = cached_file(
            str(folder_or_id), file, _raise_exceptions_for_missing_entries=False, **source
        )
        name = json.loads(Path(path).read_text()).get("processor_class") if path else None
        if name is not None:
            return processor_class_from_name(name)
    config = AutoConfig.from_pretrained(
        str(folder_or_id), trust_remote_code=trust_remote_code, **source
    )
    return PROCESSOR_MAPPING[type(config)] if type(config) in PROCESSOR_MAPPING else None


def _auto_processor(folder_or_id: str | Path, **source: Any) -> Any:
    try:
        return AutoProcessor.from_pretrained(str(folder_or_id), **source)
    except ImportError as error:
        raise ImportError(
            f"The processor of {str(folder_or_id)!r} needs a package that is not installed, "
            f"usually torchvision ({str(error).strip().splitlines()[0]})."
        ) from error
