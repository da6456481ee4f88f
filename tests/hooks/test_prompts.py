"""What users hold in hand becomes one batch, or one sentence that says what to change."""

import io
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from PIL import Image
from transformers import LlamaConfig, LlamaForCausalLM

import imaginelens as il

TEMPLATE = (
    "{% for m in messages %}[{{ m.role }}]{% for part in m.content %}"
    "{% if part.type == 'image' %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% else %}{{ part.text }}{% endif %}{% endfor %}[end]{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)


def lens_of(name: str = "qwen2_5_vl") -> il.LatentModel:
    return il.LatentModel(*tiny.build(name), spec=False)


def example(name: str = "qwen2_5_vl", seed: int = 0) -> dict[str, Any]:
    text = ("what?", "where is the red cube?")[seed]
    return {"images": tiny.image(32 + 16 * seed, 16, seed), "text": tiny.prompt(name, text)}


def refused(lens: il.LatentModel, *args: Any, **kwargs: Any) -> str:
    """The one sentence with which an input is refused, everywhere it can be given."""
    with pytest.raises(il.InputError) as error:
        lens.run(*args, max_new_tokens=1, **kwargs)
    message = str(error.value)
    assert "\n" not in message
    assert message.endswith("...") or not message.endswith(".")
    assert lens.registry.entries == []
    assert isinstance(error.value, ValueError)
    return message


# ---- what is taken ---------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["qwen2_5_vl", "llava", "gemma3"])
def test_every_way_of_giving_an_example_gives_the_same_prompt(name: str) -> None:
    lens, one = lens_of(name), example(name)
    wanted = tiny.inputs(name, lens.processor, ["what?"], [one["images"]])
    encoded = lens.processor(text=[one["text"]], images=[[one["images"]]], return_tensors="pt")
    ways = [
        lens.prompt(one),
        lens.prompt({"images": [one["images"]], "text": one["text"]}),
        lens.prompt([one]),
        lens.prompt(images=one["images"], text=one["text"]),
        lens.prompt(encoded),
        lens.prompt(dict(wanted)),
    ]  # fmt: skip
    for prompt in ways:
        for key in prompt.inputs:
            assert torch.equal(prompt.inputs[key], wanted[key].to(prompt.inputs[key]))
        assert "pixel_values" in prompt.inputs
    assert [p.single for p in ways] == [True, True, False, True, True, True]
    assert [p.pictures is None for p in ways] == [False] * 4 + [True] * 2


@pytest.mark.parametrize("name", ["qwen2_5_vl", "llava"])
def test_one_example_gives_a_string_and_a_list_of_one_gives_a_list(name: str) -> None:
    lens, one = lens_of(name), example(name)
    single, batch = lens.run(one, max_new_tokens=2), lens.run([one], max_new_tokens=2)
    assert isinstance(single.text, str)
    assert batch.text == [single.text]
    assert batch.answer == [single.answer]


def test_lists_are_padded_on_the_left() -> None:
    lens = lens_of()
    prompt = lens.prompt([example(seed=0), example(seed=1)])
    assert prompt.mask[:, -1].tolist() == [1, 1]
    assert prompt.mask[:, 0].tolist() == [0, 1]
    assert len(prompt) == 2


def test_a_chat_template_is_used_unless_the_text_already_has_the_image() -> None:
    model, processor = tiny.fresh("qwen2_5_vl")
    processor.chat_template = TEMPLATE
    lens = il.LatentModel(model, processor, spec=False)
    picture = tiny.image(32, 16, 0)

    def text(given: dict[str, Any]) -> str:
        ids = lens.prompt(given).inputs["input_ids"][0]
        return lens.tokenizer.decode(ids).replace("<|image_pad|>", "")

    slot = "<|vision_start|><|vision_end|>"
    assert text({"images": picture, "text": "hi"}) == f"[user]{slot}hi[end][assistant]"
    assert text({"images": [picture] * 2, "text": "hi"}) == f"[user]{slot * 2}hi[end][assistant]"
    assert text({"text": "hi"}) == "[user]hi[end][assistant]"
    assert text({"images": picture, "text": tiny.prompt("qwen2_5_vl", "hi")}) == f"look: {slot}hi"


def test_images_of_every_mode_are_taken() -> None:
    lens, one = lens_of(), example()
    for mode in ("L", "RGBA", "P", "1", "CMYK"):
        prompt = lens.prompt({**one, "images": one["images"].convert(mode)})
        assert prompt.pictures[0][0].mode == "RGB"
        assert prompt.inputs["pixel_values"].dtype == torch.float64


def test_examples_with_and_without_an_image_share_a_batch() -> None:
    lens = lens_of()
    run = lens.run([example(), {"text": "no picture here"}], max_new_tokens=3)
    alone = lens.run({"text": "no picture here"}, max_new_tokens=3)
    assert run.texts[1] == alone.text
    assert len(il.image.resolve(run.tokens, 1)) == 0


# ---- what is refused -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ("look: what?", "cannot run a str; pass {'images': ..., 'text': ...}"),
        (7, "cannot run a int"),
        ([], "cannot run an empty list; pass at least one example"),
        ([{"images": None}], "example 0 is a mapping with keys ['images'], expected"),
        (["a", "b"], "example 0 is 'a', expected {'images': ..., 'text': str}"),
        ({"text": 3}, "example 0 is a mapping with keys ['text']"),
        ({"images": "cat.png", "text": "x"}, "is a str, expected a PIL image; open files with PIL"),
        ({"images": np.zeros((4, 4, 3)), "text": "x"}, "is a ndarray, expected a PIL image"),
        ({"images": [None], "text": "x"}, "is a NoneType, expected a PIL image"),
        ({"input_ids": torch.tensor([1, 2])}, "input_ids must be a tensor (example, position)"),
        (
            [{"input_ids": torch.ones(1, 2).long()}] * 2,
            "a list of 2 encoded inputs cannot be padded",
        ),
        (None, "nothing to run: pass an example, or images=... and text=..."),
    ],
    ids=str,
)
def test_a_wrong_type_is_refused(given: Any, words: str) -> None:
    assert words in refused(lens_of(), given)


def test_an_example_and_its_parts_are_not_given_twice() -> None:
    words = "pass either an example or images=... and text=..., not both"
    assert refused(lens_of(), example(), text="x") == words
    assert "text=" in refused(lens_of(), images=tiny.image(32, 16, 0))


def torn(extension: str) -> Image.Image:
    """A picture whose file ends in the middle."""
    whole = io.BytesIO()
    tiny.image(64, 64, 0).resize((256, 256)).save(whole, extension)
    return Image.open(io.BytesIO(whole.getvalue()[: len(whole.getvalue()) // 2]))


@pytest.mark.parametrize("extension", ["JPEG", "PNG"])
def test_a_torn_picture_is_refused_with_its_number(extension: str) -> None:
    given = [example(), {**example(), "images": torn(extension)}]
    message = refused(lens_of(), given)
    assert "an image of example 1 cannot be decoded (" in message
    assert "check that the file is complete" in message


def test_missing_token_types_are_refused() -> None:
    lens = lens_of()
    inputs = dict(lens.prompt(example()).inputs)
    del inputs["mm_token_type_ids"]
    message = refused(lens, inputs)
    assert "Qwen2_5_VLForConditionalGeneration needs mm_token_type_ids beside its images" in message
    assert "pass the processor's full output" in message


def test_image_tokens_without_pixels_are_refused() -> None:
    lens = lens_of()
    inputs = dict(lens.prompt(example()).inputs)
    n = int((inputs["input_ids"] == lens.structure.image_token_id).sum())
    del inputs["pixel_values"]
    assert f"the prompt has {n} image tokens and no pixel_values" in refused(lens, inputs)


@pytest.mark.parametrize("n", [1, 2])
def test_padding_on_the_right_is_refused(n: int) -> None:
    lens = lens_of("llava")
    inputs = lens.processor(
        text=[example("llava", i)["text"] for i in range(n)],
        images=[[example("llava", i)["images"]] for i in range(n)],
        padding="max_length", max_length=64, padding_side="right", return_tensors="pt",
    )  # fmt: skip
    assert not inputs["attention_mask"][:, -1].any()
    message = refused(lens, inputs)
    assert "padded on the right" in message
    assert "padding_side='left'" in message


@pytest.mark.parametrize(("slots", "pictures"), [(1, 0), (1, 2), (2, 1)])
def test_slots_and_pictures_that_do_not_match_are_refused(slots: int, pictures: int) -> None:
    slot = tiny.prompt("qwen2_5_vl", "")
    given = {"images": [tiny.image(32, 16, i) for i in range(pictures)], "text": slot * slots + "?"}
    message = refused(lens_of(), [example(), given])
    assert "image" in message
    assert str(slots) in message


def test_an_image_without_a_place_is_refused() -> None:
    message = refused(lens_of(), images=tiny.image(32, 16, 0), text="what?")
    assert "no '<|image_pad|>' to show where the image goes" in message
    assert "write '<|image_pad|>' into the text" in message


def test_raw_examples_need_a_processor_and_encoded_ones_do_not() -> None:
    lens, given = lens_of(), example()
    bare = il.LatentModel(lens.model, spec=False)
    assert "wrapped without a processor" in refused(bare, given)
    run = bare.run(dict(lens.prompt(given).inputs), max_new_tokens=2)
    assert torch.equal(run.sequences, lens.run(given, max_new_tokens=2).sequences)


# ---- text-only models ------------------------------------------------------------------------


@pytest.fixture(scope="module")
def text_only() -> il.LatentModel:
    tok = tiny.tokenizer(bos=False)
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**tiny.text_config(tok))).double().eval()
    model.generation_config.max_length = None
    return il.LatentModel(model, tok, spec=False)


def test_a_text_only_model_takes_text(text_only: il.LatentModel) -> None:
    given = {"text": "hello"}
    run = text_only.run(given, max_new_tokens=3)
    stock = text_only.model.generate(
        **text_only.prompt(given).inputs, max_new_tokens=3, do_sample=False
    )
    assert torch.equal(run.sequences, stock)
    assert "text only" in str(text_only.describe())
    batch = text_only.run([given, {"text": "a longer one"}], max_new_tokens=3)
    assert batch.texts[0] == run.text


def test_a_text_only_model_refuses_images(text_only: il.LatentModel) -> None:
    words = "LlamaForCausalLM is a text-only model and got images; leave them out"
    assert refused(text_only, {"images": tiny.image(8, 8, 0), "text": "x"}) == words
    encoded = {"input_ids": torch.ones(1, 3).long(), "pixel_values": torch.zeros(1, 3, 8, 8)}
    assert refused(text_only, encoded) == words


def test_sites_that_a_text_only_model_lacks_say_why(text_only: il.LatentModel) -> None:
    with pytest.raises(il.SiteUnavailable, match=r"vision_projector\.hook_out.* is not offered by"):
        text_only.registry["vision_projector.hook_out"]
    with pytest.raises(il.SiteUnavailable, match="is not offered by"):
        text_only.run_with_cache({"text": "x"}, names_filter="vision_projector.hook_out")
    assert "vision_projector.hook_out" not in text_only.registry
    with pytest.raises(il.SiteUnavailable, match="is not offered by"):
        text_only.registry.match("vision_projector.*")  # all that it means is missing
