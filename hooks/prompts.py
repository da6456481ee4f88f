"""From what users hold in hand (pictures and a question, or a processor's dict) to one batch."""

import hashlib
import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from transformers import BatchFeature, PreTrainedModel

from imaginelens.hooks.errors import InputError
from imaginelens.hooks.media import video_token_id
from imaginelens.hooks.spec import PromptStyle

PIXELS = (
    "pixel_values",
    "pixel_values_videos",
    "pixel_values_images",
    "image_pixel_values",
    "image_patches",
    "flattened_patches",
)
# Fields with one row per example; the others (pixels, grids) are packed over the batch.
ROW_FIELDS = (
    "input_ids",
    "attention_mask",
    "mm_token_type_ids",
    "token_type_ids",
    "position_ids",
    "image_embeds_position_mask",
)
# Seconds from one frame of a video to the next, from which positions are counted: never rounded.
TIMES = ("second_per_grid_ts", "video_second_per_grid")
# Where images come by cross-attention: which of them each token sees, (example, position, ...).
SIGHT_FIELDS = ("cross_attention_mask", "image_attention_mask")


@dataclass(frozen=True)
class Prompt:
    """One batch, ready for the model.

    Attributes:
        inputs: the full dict of the processor, left-padded.
        pictures: the original pictures of every example, where they are known.
        single: whether the user gave one example rather than a list.
    """

    inputs: dict[str, torch.Tensor]
    pictures: tuple[tuple[Image.Image, ...], ...] | None = None
    single: bool = False

    def __len__(self) -> int:
        return len(self.inputs["input_ids"])

    @property
    def has_images(self) -> bool:
        """Whether the vision side will run."""
        return any(self.inputs.get(name) is not None for name in PIXELS)

    @property
    def vision_inputs(self) -> dict[str, torch.Tensor]:
        """Everything that only the vision side reads."""
        others = {*ROW_FIELDS, *self.sight}
        return {k: v for k, v in self.inputs.items() if k not in others}

    @property
    def sight(self) -> dict[str, torch.Tensor]:
        """Which images each token sees, in models with cross-attention; elsewhere fields of these
        names speak of crops."""
        shape = self.inputs["input_ids"].shape
        found = {name: self.inputs[name] for name in SIGHT_FIELDS if name in self.inputs}
        return {name: seen for name, seen in found.items() if seen.shape[:2] == shape}

    @property
    def keys(self) -> tuple[str, ...]:
        """What identifies each example by its content: its token ids and its pictures; where the
        pictures are not known, also its number in the batch."""
        found = []
        for row, (ids, mask) in enumerate(zip(self.inputs["input_ids"], self.mask, strict=True)):
            content = hashlib.blake2b(ids[mask.bool()].cpu().numpy().tobytes(), digest_size=8)
            for picture in self.pictures[row] if self.pictures is not None else ():
                content.update(picture.tobytes())
            if self.pictures is None:
                content.update(str(row).encode())
            found.append(content.hexdigest())
        return tuple(found)

    @property
    def mask(self) -> torch.Tensor:
        """(example, position), 1 at real tokens."""
        ids = self.inputs["input_ids"]
        return self.inputs.get("attention_mask", torch.ones_like(ids))


def make_prompt(
    inputs: Any,
    *,
    images: Any = None,
    text: str | Sequence[str] | None = None,
    model: PreTrainedModel,
    processor: Any,
    image_token_id: int | None,
    style: PromptStyle | None = None,
) -> Prompt:
    """Turn what a user gave into one left-padded batch on the model's device.

    Args:
        inputs: an example `{"images": ..., "text": ...}`, a list of them, or a processor's dict.
        images, text: the parts of one example, instead of `inputs`.
        style: how the family was prompted, for texts that go through the chat template.

    Raises:
        InputError: nothing was given, an image is broken, or the model cannot take the input.
    """
    if inputs is None:
        if text is None:
            raise InputError("nothing to run: pass an example, or images=... and text=...")
        inputs = {"images": images, "text": text}
    elif images is not None or text is not None:
        raise InputError("pass either an example or images=... and text=..., not both")
    if _is_encoded(inputs):
        prompt = Prompt(dict(inputs), None, single=len(inputs["input_ids"]) == 1)
    else:
        examples = [inputs] if isinstance(inputs, Mapping) else _as_list(inputs)
        pictured = any(isinstance(e, Mapping) and _pictured(e.get("images")) for e in examples)
        if pictured and not _takes(model, *PIXELS):
            name = type(model).__name__
            raise InputError(f"{name} is a text-only model and got images; leave them out")
        if examples and all(_is_encoded(e) for e in examples):
            raise InputError(
                f"a list of {len(examples)} encoded inputs cannot be padded safely here; call the "
                "processor once with all texts and images, or pass the raw examples as a list"
            )
        single = isinstance(inputs, Mapping)
        prompt = _encode(examples, processor, image_token_id, style or PromptStyle(), single=single)
    return _checked(prompt, model, image_token_id)


def _as_list(inputs: Any) -> list[Any]:
    if hasattr(inputs, "base") and hasattr(inputs, "source"):
        raise InputError("cannot run Pairs as they are; run pairs.base or pairs.source")
    if isinstance(inputs, str | bytes) or not isinstance(inputs, Sequence):
        raise InputError(
            f"cannot run a {type(inputs).__name__}; pass {{'images': ..., 'text': ...}}, a list of "
            "such examples, or the dict a processor returns"
        )
    if not inputs:
        raise InputError("cannot run an empty list; pass at least one example")
    return list(inputs)


def _pictured(images: Any) -> bool:
    return images is not None and (not isinstance(images, list | tuple) or len(images) > 0)


def _is_encoded(inputs: Any) -> bool:
    return isinstance(inputs, Mapping | BatchFeature) and "input_ids" in inputs


def _encode(
    examples: list[Any],
    processor: Any,
    image_token_id: int | None,
    style: PromptStyle,
    *,
    single: bool,
) -> Prompt:
    if processor is None:
        raise InputError(
            "this model was wrapped without a processor, so it takes only encoded inputs "
            "(input_ids, pixel_values, ...); pass processor=... to il.LatentModel"
        )
    texts, pictures = [], []
    for i, example in enumerate(examples):
        if not isinstance(example, Mapping) or not isinstance(example.get("text"), str):
            raise InputError(
                f"example {i} is {_shown(example)}, expected {{'images': ..., 'text': str}}"
            )
        for medium in (m for m in ("videos", "audio") if example.get(m) is not None):
            raise InputError(
                f"example {i} has {medium}, and only images are encoded here; encode it yourself, "
                f"inputs = processor(text=..., {medium}=..., return_tensors='pt'), which may need "
                "torchvision or librosa, and pass that dict"
            )
        found = _pictures(example.get("images"), i)
        pictures.append(found)
        texts.append(_templated(example["text"], len(found), processor, image_token_id, style))
    kwargs: dict[str, Any] = {"text": texts, "return_tensors": "pt"}
    if any(pictures):
        kwargs["images"] = [list(p) for p in pictures]
    if len(texts) > 1:
        kwargs |= {"padding": True, "padding_side": "left"}
    try:
        encoded = dict(processor(**kwargs))
    except ValueError as error:
        counts = [len(p) for p in pictures]
        raise InputError(
            f"{type(processor).__name__} cannot encode the examples, which have {counts} images: "
            + str(error).rstrip(".")
        ) from error
    return Prompt(encoded, tuple(pictures), single)


def _pictures(images: Any, number: int) -> tuple[Image.Image, ...]:
    if images is None:
        return ()
    found = images if isinstance(images, list | tuple) else [images]
    return tuple(_picture(image, number) for image in found)


def _picture(image: Any, number: int) -> Image.Image:
    if not isinstance(image, Image.Image):
        raise InputError(
            f"an image of example {number} is a {type(image).__name__}, expected a PIL image; "
            "open files with PIL.Image.open(path)"
        )
    try:
        loaded = image.convert("RGB")  # reads the file, so that a torn one fails here
    except (OSError, ValueError, SyntaxError) as error:
        raise InputError(
            f"an image of example {number} cannot be decoded ({error}); "
            "check that the file is complete"
        ) from error
    if min(loaded.size) < 1:
        raise InputError(f"an image of example {number} is empty: {loaded.size}")
    return loaded


def _templated(
    text: str, n_images: int, processor: Any, image_token_id: int | None, style: PromptStyle
) -> str:
    """The text as the model expects it: through the chat template, unless it is already there."""
    tokenizer = getattr(processor, "tokenizer", processor)
    marker = getattr(processor, "boi_token", None) or getattr(processor, "image_token", None)
    if marker is None and image_token_id is not None:
        marker = tokenizer.convert_ids_to_tokens(image_token_id)
    if marker is not None and marker in text:
        return text
    if getattr(processor, "chat_template", None) is None:
        if n_images:
            raise InputError(
                f"the text has no {marker!r} to show where the image goes, and the processor has "
                f"no chat template to put it there; write {marker!r} into the text"
            )
        return text
    content = [{"type": "image"}] * n_images + [{"type": "text", "text": text}]
    messages: list[dict[str, Any]] = [{"role": "user", "content": content}]
    if style.system is not None:
        system = [{"type": "text", "text": style.system}]
        messages = [{"role": "system", "content": system}, *messages]
    written = processor.apply_chat_template(
        messages, add_generation_prompt=style.reply is None, tokenize=False
    )
    return str(written) + (style.reply or "")


def _checked(prompt: Prompt, model: PreTrainedModel, image_token_id: int | None) -> Prompt:
    inputs = {k: v for k, v in prompt.inputs.items() if v is not None}
    ids = inputs["input_ids"]
    if not isinstance(ids, torch.Tensor) or ids.dim() != 2:
        raise InputError("input_ids must be a tensor (example, position); use return_tensors='pt'")
    name = type(model).__name__
    if prompt.has_images and not _takes(model, *PIXELS):
        raise InputError(f"{name} is a text-only model and got images; leave them out")
    mask = inputs.get("attention_mask")
    if mask is not None and bool((mask[:, -1] == 0).any()):
        raise InputError(
            "the batch is padded on the right, where generation continues; "
            "call the processor with padding_side='left'"
        )
    counts_by_type = hasattr(model.base_model, "get_rope_index")
    untyped = prompt.has_images and "mm_token_type_ids" not in inputs
    if untyped and counts_by_type and _takes(model, "mm_token_type_ids"):
        raise InputError(
            f"{name} needs mm_token_type_ids beside its images, or its positions are silently "
            "one-dimensional; pass the processor's full output"
        )
    for what, token in (("image", image_token_id), ("video", video_token_id(model.config))):
        n = 0 if token is None or prompt.has_images else int((ids == token).sum())
        if n:
            lacks = "pixel_values" if what == "image" else "pixel_values_videos"
            raise InputError(
                f"the prompt has {n} {what} tokens and no {lacks}; pass the processor's full output"
            )
    for field in (k for k, v in inputs.items() if isinstance(v, list) and _takes(model, k)):
        raise InputError(
            f"{field!r} is a list, which the model would not be given; call the processor with "
            "return_tensors='pt'"
        )
    weight = next(model.parameters())
    device = torch.device("cpu") if weight.is_meta else weight.device  # weights may be elsewhere
    moved = {
        k: v.to(device, weight.dtype if v.is_floating_point() and k not in TIMES else None)
        for k, v in inputs.items()
        if isinstance(v, torch.Tensor) and k != "labels"  # PaliGemma's processor adds some
    }
    return Prompt(moved, prompt.pictures, prompt.single)


def _takes(model: PreTrainedModel, *names: str) -> bool:
    """Whether the model's forward has one of these arguments; a wrapper's may have any."""
    arguments = inspect.signature(model.forward).parameters
    return "input_ids" not in arguments or any(name in arguments for name in names)


def _shown(value: Any) -> str:
    return (
        f"a mapping with keys {sorted(value)}" if isinstance(value, Mapping) else repr(value)[:60]
    )
