"""Processors load without torchvision, stay real processors, and say clearly what is missing."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import transformers
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, ProcessorMixin
from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil
from transformers.models.llava_onevision.image_processing_pil_llava_onevision import (
    LlavaOnevisionImageProcessorPil,
)
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from imaginelens.hooks import processors
from imaginelens.hooks.processors import image_only, load_processor

IMAGE = Image.fromarray(np.random.default_rng(0).integers(0, 256, size=(56, 84, 3), dtype=np.uint8))
QWEN_TOKENS = {
    "image_token": "<|image_pad|>",
    "video_token": "<|video_pad|>",
    "vision_start_token": "<|vision_start|>",
    "vision_end_token": "<|vision_end|>",
}
QWEN_IMAGE = "<|vision_start|><|image_pad|><|vision_end|>"
QWEN_SIZE = {"shortest_edge": 28 * 28, "longest_edge": 28 * 28 * 100}


def words(special: dict[str, str], image: str) -> PreTrainedTokenizerFast:
    vocabulary = ["<unk>", "<pad>", "look", *dict.fromkeys(special.values())]
    word_level = Tokenizer(
        models.WordLevel({w: i for i, w in enumerate(vocabulary)}, unk_token="<unk>")
    )
    word_level.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    template = (
        "{% for m in messages %}{% for p in m['content'] %}"
        "{% if p['type'] == 'image' %}" + image + "{% else %}{{ p['text'] }}{% endif %} "
        "{% endfor %}{% endfor %}"
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=word_level,
        unk_token="<unk>",
        pad_token="<pad>",
        extra_special_tokens=special,
        chat_template=template,
    )


def build(name: str, image_processor: Any, special: dict[str, str], image: str, **kw: Any) -> Any:
    tokenizer = words(special, image)
    return image_only(getattr(transformers, name))(
        image_processor=image_processor,
        tokenizer=tokenizer,
        chat_template=tokenizer.chat_template,
        **kw,
    )


def qwen(name: str, patch: int = 14) -> Any:
    image_processor = Qwen2VLImageProcessorPil(size=QWEN_SIZE, patch_size=patch)
    return build(name, image_processor, QWEN_TOKENS, QWEN_IMAGE)


FAMILIES: dict[str, Callable[[], Any]] = {
    "Qwen2VLProcessor": lambda: qwen("Qwen2VLProcessor"),
    "Qwen2_5_VLProcessor": lambda: qwen("Qwen2_5_VLProcessor"),
    "Qwen3VLProcessor": lambda: qwen("Qwen3VLProcessor", patch=16),
    "LlavaOnevisionProcessor": lambda: build(
        "LlavaOnevisionProcessor",
        LlavaOnevisionImageProcessorPil(
            size={"height": 56, "width": 56}, image_grid_pinpoints=[[56, 56], [56, 112]]
        ),
        {"image_token": "<image>", "video_token": "<video>"},
        "<image>",
        num_image_tokens=16,
        vision_feature_select_strategy="full",
    ),
    "InternVLProcessor": lambda: build(
        "InternVLProcessor",
        GotOcr2ImageProcessorPil(size={"height": 56, "width": 56}),
        {
            "start_image_token": "<img>",
            "end_image_token": "</img>",
            "context_image_token": "<IMG_CONTEXT>",
            "video_token": "<video>",
        },
        "<IMG_CONTEXT>",
        image_seq_length=4,
    ),
}


def chat(text: str) -> list[dict[str, Any]]:
    content = [{"type": "image", "image": IMAGE}, {"type": "text", "text": text}]
    return [{"role": "user", "content": content}]


@pytest.fixture(params=FAMILIES)
def processor(request: pytest.FixtureRequest) -> ProcessorMixin:
    return FAMILIES[request.param]()


def test_an_image_only_processor_is_its_stock_class(processor: ProcessorMixin) -> None:
    stock = getattr(transformers, type(processor).__name__)
    assert isinstance(processor, stock)
    assert "video_processor" not in processor.get_attributes()
    assert image_only(stock) is type(processor)


def test_saved_and_loaded_processors_agree(processor: ProcessorMixin, tmp_path: Path) -> None:
    processor.save_pretrained(tmp_path)
    again = load_processor(tmp_path)
    assert isinstance(again, getattr(transformers, type(processor).__name__))
    assert_same(encode(processor), encode(again))


def test_the_template_and_the_call_agree(processor: ProcessorMixin) -> None:
    templated = processor.apply_chat_template(
        [chat("look"), chat("look look")],
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        processor_kwargs={"padding": True, "padding_side": "left"},
    )
    assert_same(encode(processor), templated)


def test_padding_is_on_the_left(processor: ProcessorMixin) -> None:
    mask = encode(processor)["attention_mask"]
    assert mask[0, 0] == 0
    assert mask[:, -1].all()
    assert mask[1].all()


def encode(processor: ProcessorMixin) -> Any:
    return processor(
        text=[processor.apply_chat_template(chat(t)) for t in ("look", "look look")],
        images=[IMAGE, IMAGE],
        padding=True,
        padding_side="left",
        return_tensors="pt",
    )


def assert_same(one: Any, two: Any) -> None:
    assert one.keys() == two.keys()
    assert all((one[key] == two[key]).all() for key in one)


@pytest.mark.parametrize("name", ["Qwen2VLProcessor", "Qwen2_5_VLProcessor", "Qwen3VLProcessor"])
def test_qwen_processors_mark_image_positions(name: str) -> None:
    batch = encode(FAMILIES[name]())
    is_image = batch["input_ids"] == words(QWEN_TOKENS, QWEN_IMAGE).convert_tokens_to_ids(
        "<|image_pad|>"
    )
    assert is_image.any()
    assert (batch["mm_token_type_ids"] == is_image).all()


def test_a_processor_without_video_slot_goes_through_the_auto_class(tmp_path: Path) -> None:
    tokenizer = words({"image_token": "<image>"}, "<image>")
    transformers.LlavaProcessor(
        image_processor=Qwen2VLImageProcessorPil(),
        tokenizer=tokenizer,
        patch_size=14,
        chat_template=tokenizer.chat_template,
    ).save_pretrained(tmp_path)
    assert type(load_processor(tmp_path)) is transformers.LlavaProcessor


def test_a_processor_class_named_only_by_the_config(tmp_path: Path) -> None:
    qwen("Qwen2_5_VLProcessor").tokenizer.save_pretrained(tmp_path)
    Qwen2VLImageProcessorPil(size=QWEN_SIZE).save_pretrained(tmp_path)
    transformers.Qwen2_5_VLConfig().save_pretrained(tmp_path)
    assert isinstance(load_processor(tmp_path), transformers.Qwen2_5_VLProcessor)


# -- what is missing -----------------------------------------------------------------------------


def test_videos_are_refused_by_naming_torchvision() -> None:
    with pytest.raises(ImportError, match="Videos need torchvision"):
        qwen("Qwen2_5_VLProcessor")(
            text="<|video_pad|> look", videos=[np.zeros((4, 28, 28, 3), np.uint8)]
        )


def test_missing_pillow_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(processors, "is_vision_available", lambda: False)
    with pytest.raises(ImportError, match="need Pillow: pip install pillow"):
        load_processor(tmp_path)


def test_a_folder_that_does_not_exist(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"nowhere' is not a folder"):
        load_processor(tmp_path / "nowhere")


def test_an_empty_folder(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"found nothing; expected config\.json"):
        load_processor(tmp_path)


def test_a_folder_of_something_else(tmp_path: Path) -> None:
    (tmp_path / "holiday.txt").write_text("sun")
    with pytest.raises(FileNotFoundError, match=r"found holiday\.txt; expected config\.json"):
        load_processor(str(tmp_path))


def test_a_checkpoint_that_reads_no_images(tmp_path: Path) -> None:
    words({}, "").save_pretrained(tmp_path)
    transformers.LlamaConfig().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="but no multimodal processor: expected"):
        load_processor(tmp_path)


def test_another_missing_package_is_passed_on_in_one_sentence(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def fail(*args: object, **kw: object) -> None:
        raise ImportError("\nSmolVLM requires the num2words library.\nmore\nlines")

    transformers.LlamaConfig().save_pretrained(tmp_path)
    monkeypatch.setattr(processors.AutoProcessor, "from_pretrained", fail)
    with pytest.raises(ImportError, match=r"SmolVLM requires the num2words library\.\)\.$"):
        load_processor(tmp_path)
