"""Checkpoints as they lie on disk: old names, other sizes, other numbers, adapters, refusals."""

import json
import re
import shutil
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file

import imaginelens as il
from imaginelens.hooks.heads import weight_names
from imaginelens.hooks.loading import adapts, load_model
from imaginelens.organisms import checkpoint

STRINGS = il.FAMILIES["monet"].strings
Weights = dict[str, torch.Tensor]


@cache
def built(kind: str = "qwen2_5_vl") -> Any:
    """A tiny model whose tokenizer has Monet's tokens, and its processor."""
    with mock.patch.object(tiny, "LATENT", STRINGS):
        return tiny.fresh(kind)


def example(kind: str = "qwen2_5_vl") -> dict[str, Any]:
    return {"images": tiny.image(48, 32, seed=0), "text": tiny.prompt(kind, "what?")}


def write(
    folder: Path,
    kind: str = "qwen2_5_vl",
    *,
    change: Callable[[Weights], Weights] = lambda weights: weights,
    keys: dict[str, Any] | None = None,
    model: Any = None,
) -> Any:
    """Write a checkpoint whose weights were changed on the way; gives the model as it was."""
    own, processor = built(kind)
    model = own if model is None else model
    model.config.dtype = model.dtype
    model.config.save_pretrained(folder)
    if keys:
        path = folder / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | keys))
    model.generation_config.save_pretrained(folder)
    processor.tokenizer.save_pretrained(folder)
    processor.image_processor.save_pretrained(folder)
    weights = change({k: v.clone() for k, v in model.state_dict().items()})
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return model


def one_sentence(error: pytest.ExceptionInfo[Any]) -> str:
    message = str(error.value)
    assert "\n" not in message
    assert len(message) < 600
    assert not re.search(r"\. [A-Z]", message)
    return message


def same(lens: il.LatentModel, model: Any) -> bool:
    held = lens.model.state_dict()
    return all(torch.equal(v, held[k]) for k, v in model.state_dict().items())


# ---- names -------------------------------------------------------------------------------------


def renamed(*rules: tuple[str, str]) -> Callable[[Weights], Weights]:
    def change(weights: Weights) -> Weights:
        new = {}
        for name, value in weights.items():
            for old, put in rules:
                name = re.sub(old, put, name)
            new[name] = value
        assert set(new) != set(weights)
        return new

    return change


QWEN = renamed((r"^model\.language_model\.", "model."), (r"^model\.visual\.", "visual."))
LLAVA = renamed(
    (r"^model\.language_model\.", "language_model.model."),
    (r"^model\.(vision_tower|multi_modal_projector)\.", r"\1."),
    (r"^lm_head\.", "language_model.lm_head."),
)


@pytest.mark.parametrize(
    ("kind", "change", "there"),
    [
        ("qwen2_vl", QWEN, "model.layers.0.mlp.up_proj.weight"),
        ("qwen2_5_vl", QWEN, "visual.patch_embed.proj.weight"),
        ("llava", LLAVA, "language_model.model.layers.0.mlp.up_proj.weight"),
    ],
)
def test_names_of_transformers_450_are_understood(
    tmp_path: Path, kind: str, change: Any, there: str
) -> None:
    model = write(tmp_path, kind, change=change)
    assert there in load_file(tmp_path / "model.safetensors")
    lens = il.load(tmp_path, spec=False)
    assert lens.model.dtype == torch.float64  # as it was saved
    assert same(lens, model)


@pytest.mark.parametrize("gone", ["lm_head.weight", "model.language_model.layers.1.mlp.up_proj.weight"])  # fmt: skip  # noqa: E501
def test_weights_that_are_missing_are_an_error_not_a_random_layer(
    tmp_path: Path, gone: str
) -> None:
    write(tmp_path, change=lambda weights: {k: v for k, v in weights.items() if k != gone})
    with pytest.raises(il.CheckpointError, match="lacks 1 weights") as error:
        il.load(tmp_path)
    assert repr(gone) in one_sentence(error)


def test_weights_beside_the_model_are_left_alone(tmp_path: Path) -> None:
    model = write(tmp_path, change=lambda weights: weights | {"extra.head": torch.ones(2)})
    assert same(il.load(tmp_path), model)


# ---- vocabularies ------------------------------------------------------------------------------


def resized(rows: int) -> Any:
    """A model whose vocabulary has another number of rows than the tokenizer has tokens."""
    with mock.patch.object(tiny, "LATENT", STRINGS):
        model, _ = tiny.fresh("qwen2_5_vl")
    model.resize_token_embeddings(rows, mean_resizing=False)
    return model


@pytest.mark.parametrize("extra", [0, 7, 128])
def test_a_vocabulary_may_have_more_rows_than_the_tokenizer_has_tokens(
    tmp_path: Path, extra: int
) -> None:
    """Qwen2.5-VL is padded to 152,064 rows for 151,665 tokens."""
    n = len(built()[1].tokenizer)
    model = write(tmp_path, model=resized(n + extra))
    lens = il.load(tmp_path)
    assert len(lens.model.get_input_embeddings().weight) == n + extra
    assert same(lens, model)
    run = lens.run(example(), max_new_tokens=8, latents=il.Force(2, at=1))
    assert run.trigger.emitted == (2,)


def test_a_vocabulary_may_be_cut_behind_the_familys_tokens(tmp_path: Path) -> None:
    """As Mirage's training does, down to the tokens there are: here to fewer than there are."""
    n = len(built()[1].tokenizer)
    write(tmp_path, model=resized(n - 2))
    lens = il.load(tmp_path)
    assert lens.run(example(), max_new_tokens=4, latents=il.Force(1, at=0)).trigger.emitted == (1,)


def test_tokens_without_an_embedding_are_refused(tmp_path: Path) -> None:
    processor = built()[1]
    first = min(processor.tokenizer.convert_tokens_to_ids(list(STRINGS)))
    write(tmp_path, model=resized(first + 1))
    with pytest.raises(il.CheckpointError, match="tokens of monet have ids up to") as error:
        il.load(tmp_path)
    assert f"{first + 1} rows" in one_sentence(error)
    assert il.load(tmp_path, spec=False).family is None


def test_a_config_that_was_not_resized_with_the_weights_is_refused(tmp_path: Path) -> None:
    n = len(built()[1].tokenizer)
    write(tmp_path, model=resized(n + 5))
    config = json.loads((tmp_path / "config.json").read_text())
    config["text_config"]["vocab_size"] = n
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(il.CheckpointError, match="other sizes than its config") as error:
        il.load(tmp_path)
    assert f"{n} rows" in one_sentence(error)


def test_tied_weights_are_saved_once_and_stay_tied(tmp_path: Path) -> None:
    with mock.patch.object(tiny, "LATENT", STRINGS):
        model, _ = tiny.fresh("qwen2_5_vl")
    model.config.tie_word_embeddings = True
    model.config.get_text_config().tie_word_embeddings = True
    model.tie_weights()
    assert model.lm_head.weight is model.get_input_embeddings().weight
    write(
        tmp_path,
        model=model,
        change=lambda weights: {k: v for k, v in weights.items() if k != "lm_head.weight"},
    )
    lens = il.load(tmp_path)
    assert lens.model.lm_head.weight is lens.model.get_input_embeddings().weight
    assert same(lens, model)
    own = il.LatentModel(model, built()[1]).run(example(), max_new_tokens=6)
    assert torch.equal(lens.run(example(), max_new_tokens=6).sequences, own.sequences)


# ---- numbers and devices -----------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_a_dtype_is_that_of_the_weights_the_latents_and_the_edits(
    tmp_path: Path, dtype: torch.dtype
) -> None:
    write(tmp_path)
    lens = il.load(tmp_path, dtype=dtype)
    assert {p.dtype for p in lens.model.parameters()} == {dtype}
    run = lens.run(example(), max_new_tokens=6, latents=il.Force(2, at=0))
    assert run.latents.dtype == dtype
    assert torch.isfinite(run.latents).all()
    with lens.edit(il.Sham(), at=il.latent) as landing:
        again = lens.rerun(run)
    assert landing.relative_change == 0
    assert torch.equal(again.latents, run.latents)
    with lens.edit(il.Swap(run), at=il.latent):
        other = {"images": tiny.image(48, 32, seed=9), "text": example()["text"]}
        swapped = lens.run(other, max_new_tokens=6, latents=il.Force(2, at=0))
    assert torch.equal(swapped.latents, run.latents)


def test_the_dtype_of_the_folder_is_kept(tmp_path: Path) -> None:
    with mock.patch.object(tiny, "LATENT", STRINGS):
        model, _ = tiny.fresh("qwen2_5_vl", dtype=torch.bfloat16)
    write(tmp_path, model=model)
    assert il.load(tmp_path).model.dtype == torch.bfloat16


SPLIT = {"model.visual": "cpu", "model.language_model": "cpu", "lm_head": "cpu"}


@pytest.mark.parametrize("device_map", ["auto", {"": "cpu"}, SPLIT])
def test_a_model_that_accelerate_has_placed_runs_as_it_did(tmp_path: Path, device_map: Any) -> None:
    model = write(tmp_path)
    lens = il.load(tmp_path, device_map=device_map)
    assert same(lens, model)
    options = {"max_new_tokens": 6, "latents": il.Force(2, at=0)}
    plain = il.LatentModel(model, built()[1]).run(example(), **options)
    run = lens.run(example(), **options)
    assert torch.equal(run.sequences, plain.sequences)
    torch.testing.assert_close(run.latents, plain.latents, rtol=0, atol=1e-12)


def test_a_device_map_reaches_transformers(tmp_path: Path) -> None:
    write(tmp_path)
    lens = il.load(tmp_path, device_map={"": "meta"})
    assert {p.device.type for p in lens.model.parameters()} == {"meta"}


@pytest.mark.parametrize(
    ("stored", "package"),
    [
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "bitsandbytes"),
        ({"quant_method": "hqq"}, "hqq"),
        ({"quant_method": "awq", "bits": 4}, "gptqmodel"),
    ],
)
def test_quantised_weights_name_the_package_they_need(
    tmp_path: Path, stored: dict[str, Any], package: str
) -> None:
    write(tmp_path, keys={"quantization_config": stored})
    with pytest.raises(il.CheckpointError, match="is quantised with") as error:
        il.load(tmp_path)
    assert f"pip install {package}" in one_sentence(error)


# ---- adapters ----------------------------------------------------------------------------------

RANK, ALPHA = 2, 6.0
TARGET = "model.language_model.layers.1.mlp.up_proj"


def adapt(folder: Path, base: Any) -> torch.Tensor:
    """Write adapters of one matrix in peft's files; gives what they add to it."""
    draw = torch.Generator().manual_seed(3)
    a, b = (
        torch.randn(*shape, generator=draw, dtype=torch.float64)
        for shape in ((RANK, 64), (96, RANK))
    )
    config = {"peft_type": "LORA", "r": RANK, "lora_alpha": ALPHA, "target_modules": [TARGET]}
    if base is not None:
        config["base_model_name_or_path"] = str(base)
    folder.mkdir()
    (folder / "adapter_config.json").write_text(json.dumps(config))
    names = (f"base_model.model.{TARGET}.lora_{side}.weight" for side in "AB")
    save_file(dict(zip(names, (a, b), strict=True)), folder / "adapter_model.safetensors")
    return ALPHA / RANK * b @ a


def test_adapters_without_peft_name_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    adapt(tmp_path / "lora", tmp_path / "base")
    with pytest.raises(il.CheckpointError, match="pip install peft") as error:
        il.load(tmp_path / "lora")
    assert str(tmp_path / "base") in one_sentence(error)


def test_adapters_are_merged_into_the_model_they_adapt(tmp_path: Path) -> None:
    (tmp_path / "base").mkdir()
    model = write(tmp_path / "base")
    change = adapt(tmp_path / "lora", tmp_path / "base")
    lens = il.load(tmp_path / "lora")
    assert lens.spec == il.FAMILIES["monet"]
    held, own = lens.model.state_dict(), model.state_dict()
    wanted = own[f"{TARGET}.weight"] + change
    assert torch.allclose(held[f"{TARGET}.weight"], wanted, rtol=0, atol=1e-12)
    assert all(torch.equal(held[k], v) for k, v in own.items() if k != f"{TARGET}.weight")
    assert lens.run(example(), max_new_tokens=4, latents=il.Force(1, at=0)).trigger.emitted == (1,)
    # adapters with a processor of their own, which may know more tokens, bring it along
    built()[1].save_pretrained(tmp_path / "lora")
    for file in ("preprocessor_config.json", "tokenizer.json", "tokenizer_config.json"):
        (tmp_path / "base" / file).unlink()
    assert il.load(tmp_path / "lora").spec == il.FAMILIES["monet"]


def test_adapters_that_peft_trained_and_saved(tmp_path: Path) -> None:
    """The whole way through peft: its model, with adapters at work, is the one that is opened."""
    from peft import LoraConfig, get_peft_model

    (tmp_path / "base").mkdir()
    write(tmp_path / "base")
    base = load_model(tmp_path / "base")
    config = LoraConfig(r=2, lora_alpha=6, target_modules=["q_proj", "down_proj"])
    config.init_lora_weights = False  # at random, as if they had been trained
    torch.manual_seed(0)
    adapted = get_peft_model(base, config).eval()
    adapted.save_pretrained(tmp_path / "lora")
    lens = il.load(tmp_path / "lora")
    inputs = dict(lens.prompt(example()).inputs)
    with torch.no_grad():
        wanted = adapted(**inputs).logits
        plain = load_model(tmp_path / "base")(**inputs).logits
        found = lens.model(**inputs).logits
    assert torch.allclose(found, wanted, rtol=0, atol=1e-10)
    assert not torch.allclose(found, plain, rtol=0, atol=1e-3)


def test_adapters_that_say_nothing_or_fit_nothing_are_refused(tmp_path: Path) -> None:
    adapt(tmp_path / "lost", None)
    with pytest.raises(il.CheckpointError, match="does not say of which model") as error:
        il.load(tmp_path / "lost")
    one_sentence(error)
    (tmp_path / "base").mkdir()
    write(tmp_path / "base")
    adapt(tmp_path / "lora", tmp_path / "base")
    held = load_file(tmp_path / "lora" / "adapter_model.safetensors")
    wrong = {k: v[:, :-1].clone() if "lora_A" in k else v for k, v in held.items()}
    save_file(wrong, tmp_path / "lora" / "adapter_model.safetensors")
    with pytest.raises(il.CheckpointError, match="do not fit Qwen2_5_VL") as error:
        il.load(tmp_path / "lora")
    one_sentence(error)


def test_a_model_beside_adapters_is_ambiguous(tmp_path: Path) -> None:
    """Some trainers leave both in one folder, merged or not; transformers would add them again."""
    write(tmp_path)
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(il.CheckpointError, match="holds a model and adapters beside it") as error:
        il.load(tmp_path)
    one_sentence(error)
    (tmp_path / "adapter_config.json").unlink()
    assert adapts(tmp_path) is None


@pytest.mark.parametrize(
    "content", ["", "{", "[" * 100_000, "[]", '{"base_model_name_or_path": 3}']
)
def test_a_config_of_adapters_that_is_none_is_refused(tmp_path: Path, content: str) -> None:
    (tmp_path / "adapter_config.json").write_text(content)
    with pytest.raises(il.CheckpointError, match=r"cannot be read|does not say of which") as error:
        il.load(tmp_path)
    one_sentence(error)


def test_adapters_of_themselves_are_refused(tmp_path: Path) -> None:
    adapt(tmp_path / "a", tmp_path / "b")
    adapt(tmp_path / "b", tmp_path / "a")
    with pytest.raises(il.CheckpointError, match="lead back to") as error:
        il.load(tmp_path / "a")
    one_sentence(error)


@pytest.mark.parametrize(
    ("file", "told"),
    [
        ("model.safetensors", "has weights that cannot be read"),
        ("config.json", "has no config that can be read"),
        ("tokenizer.json", "has a processor or tokenizer that cannot be read"),
        ("tokenizer_config.json", "has a processor or tokenizer that cannot be read"),
        ("preprocessor_config.json", "has a processor or tokenizer that cannot be read"),
    ],
)
def test_a_torn_checkpoint_is_refused(tmp_path: Path, file: str, told: str) -> None:
    home = tmp_path / "torn"
    shutil.copytree(checkpoint.folder("direct"), home)
    whole = (home / file).read_bytes()
    (home / file).write_bytes(whole[: len(whole) // 2])
    with pytest.raises(il.CheckpointError, match=told) as error:
        il.load(home)
    one_sentence(error)


@pytest.mark.parametrize(
    "content", ["{", "[]", '{"weight_map": [1]}', '{"weight_map": {"a": "../x"}}']
)
def test_an_index_of_weights_that_is_none_is_refused(tmp_path: Path, content: str) -> None:
    (tmp_path / "model.safetensors.index.json").write_text(content)
    with pytest.raises(il.CheckpointError, match=r"index\.json that cannot be read") as error:
        weight_names(tmp_path)
    one_sentence(error)


def test_weights_that_are_torn_are_refused(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"x" * 100)
    with pytest.raises(il.CheckpointError, match="cannot be read as safetensors") as error:
        weight_names(tmp_path)
    one_sentence(error)
