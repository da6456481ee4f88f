"""Images that come by cross-attention: which of them a token sees goes on behind the prompt."""

from typing import Any

import pytest
import torch
import walk_checks
import walk_inputs

import imaginelens as il
from imaginelens.hooks import controls, script

Inputs = dict[str, torch.Tensor]
MASK = {"mllama": "cross_attention_mask", "idefics": "image_attention_mask"}


@pytest.fixture(params=list(MASK), scope="module")
def lens(request: pytest.FixtureRequest) -> il.LatentModel:
    return il.LatentModel(walk_checks.build(request.param), spec=walk_checks.SPEC)


def seeing(model: Any, seed: int, part: int) -> Inputs:
    """A prompt whose last tokens see another part of the image than those before: of two tiles one,
    or of two images one."""
    given, _ = walk_inputs.found_image_inputs(model, seed)
    if model.config.model_type == "idefics":
        other, _ = walk_inputs.found_image_inputs(model, seed + 7)
        pixels = [one["pixel_values"] for one in (given, other)]
        given = {**given, "pixel_values": torch.cat(pixels, dim=1)}
        given["image_attention_mask"] = given["image_attention_mask"].repeat(1, 1, 2)
    else:
        given = {**given, "aspect_ratio_mask": torch.ones_like(given["aspect_ratio_mask"])}
        given["aspect_ratio_ids"] = torch.tensor([[6]])
    seen = torch.zeros_like(given[MASK[model.config.model_type]])
    seen[:, 5:7, ..., 1 - part] = 1
    seen[:, 7:, ..., part] = 1
    return {**given, MASK[model.config.model_type]: seen}


def run_of(lens: il.LatentModel, inputs: Inputs) -> il.Run:
    return lens.run(inputs, latents=il.Force(2, at=1), max_new_tokens=7, keep_logits=True)


def rows_of(lens: il.LatentModel) -> list[Inputs]:
    return [seeing(lens.model, 0, 0), walk_inputs.lengthened(seeing(lens.model, 1, 1), 3)]


def test_reading_a_run_is_generating_it_alone_and_in_a_batch(lens: il.LatentModel) -> None:
    rows = rows_of(lens)
    together = run_of(lens, walk_inputs.stacked(rows))
    assert controls.path_gap(lens, together) < 1e-9
    for row, inputs in enumerate(rows):
        alone = run_of(lens, inputs)
        assert controls.path_gap(lens, alone) < 1e-9
        assert together.texts[row] == alone.texts[0]
        torch.testing.assert_close(together.latents[row], alone.latents[0], rtol=0, atol=1e-9)


def test_reading_is_the_plain_forward_over_the_continued_mask(lens: il.LatentModel) -> None:
    """The oracle: the model's own forward, with the last row of the mask repeated by hand."""
    inputs = rows_of(lens)[0]
    run = lens.run(inputs, max_new_tokens=5, latents=il.Skip())
    name, n = MASK[lens.model.config.model_type], 5
    whole = {**inputs, "input_ids": run.sequences}
    whole["attention_mask"] = torch.ones_like(run.sequences)
    whole[name] = torch.cat([inputs[name], *[inputs[name][:, -1:]] * n], dim=1)
    with torch.no_grad():
        wanted = lens.model(**whole, use_cache=False).logits
        found = lens.run_with_hooks(run)
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-9)


@pytest.mark.parametrize("all_of_it", [0, 1])
def test_another_sight_behind_the_prompt_is_noticed(
    lens: il.LatentModel, all_of_it: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = run_of(lens, rows_of(lens)[1])
    name, width = MASK[lens.model.config.model_type], run.tokens.prompt_width
    kept = script._row_fields

    def otherwise(*args: Any) -> dict[str, torch.Tensor]:
        fields = kept(*args)
        fields[name][:, width:] = all_of_it
        return fields

    assert controls.path_gap(lens, run) < 1e-9
    monkeypatch.setattr(script, "_row_fields", otherwise)
    assert controls.path_gap(lens, run) > 1e-4


def test_a_prompt_with_computed_latents_keeps_its_sight() -> None:
    """A prompt that is read in segments: each of them sees what its own tokens see."""
    spec = il.LatentSpec(
        name="walk", open=walk_checks.OPEN, close=walk_checks.CLOSE, pad=walk_checks.PAD,
        max_steps=3, trigger="prompt",
    )  # fmt: skip
    lens = il.LatentModel(walk_checks.build("mllama"), spec=spec)
    given = rows_of(lens)[1]
    given["input_ids"][0, -3:-1] = walk_checks.PAD
    run = lens.run(given, max_new_tokens=4, keep_logits=True)
    assert run.latents.shape[1] == 2
    assert controls.path_gap(lens, run) < 1e-9


def test_crops_of_the_same_name_are_no_sight() -> None:
    """Phi-4 names the mask of its crops like the sight of Idefics: it is the vision side's."""
    lens = il.LatentModel(walk_checks.build("phi4_multimodal"), spec=False)
    given, _ = walk_inputs.found_image_inputs(lens.model, 0)
    assert given["image_attention_mask"].dim() == 4
    assert lens.prompt(given).sight == {}
    assert "image_attention_mask" in lens.prompt(given).vision_inputs
