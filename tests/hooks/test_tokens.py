"""Every position is what the map says it is, for every way of laying an image into the text."""

import itertools

import numpy as np
import pytest
import tiny
import torch

import imaginelens as il
from imaginelens.hooks.tokens import Kind

SIZES = [(64, 64), (96, 40), (40, 96), (33, 57)]


def expected(name: str, width: int, height: int) -> list[tuple[float, float, float, float] | None]:
    """The pixel box of every image token, from tiny.GRID alone."""
    boxes: list[tuple[float, float, float, float] | None] = []
    for tile in tiny.GRID[name](width, height):
        left, top, right, bottom = tile.box
        w, h = (right - left) / tile.cols, (bottom - top) / tile.rows
        for r in range(tile.rows):
            for c in range(tile.cols):
                x, y = left + c * w, top + r * h
                boxes.append((x * width, y * height, (x + w) * width, (y + h) * height))
            boxes += [None] * (tile.end == "newline")
    return boxes


@pytest.mark.parametrize(("name", "size"), list(itertools.product(tiny.FAMILIES, SIZES)))
def test_image_tokens_show_what_the_map_says(name: str, size: tuple[int, int]) -> None:
    lens = il.LatentModel(*tiny.build(name), spec=False)
    tokens = lens.tokens({"images": tiny.image(*size, seed=0), "text": tiny.prompt(name, "what?")})
    found = [t for t in tokens[0] if t.kind == Kind.IMAGE]
    wanted = expected(name, *size)
    assert len(found) == len(wanted)
    # split pictures are padded or rounded to whole tiles: boxes are right to a part of a cell
    tolerance = 4.0 if name in ("llava_onevision", "idefics3", "internvl") else 1e-6
    for token, box in zip(found, wanted, strict=True):
        assert (token.box is None) == (box is None)
        if box is not None:
            assert token.box == pytest.approx(box, abs=tolerance)


@pytest.mark.parametrize("name", ["qwen2_vl", "qwen2_5_vl", "qwen3_vl"])
def test_one_bright_patch_lights_up_its_own_cell(name: str) -> None:
    """The 2 x 2 merge order is right: one bright cell moves that cell's token most."""
    from PIL import Image

    model, processor = tiny.fresh(name)
    for part, weight in model.model.visual.named_parameters():
        if "attn.proj" in part:  # a random tower mixes patches: leave each to itself
            weight.data.zero_()
    lens = il.LatentModel(model, processor, spec=False)
    rows, cols, side = 4, 6, tiny.CELL
    text = tiny.prompt(name, "where?")

    def projected(picture: np.ndarray) -> torch.Tensor:
        inputs = {"images": Image.fromarray(picture), "text": text}
        with torch.no_grad():
            _, cache = lens.run_with_cache(inputs, names_filter="blocks.0.hook_resid_pre")
        return cache["resid_pre", 0][0]

    dark = np.full((rows * side, cols * side, 3), 96, np.uint8)
    tokens = lens.tokens({"images": Image.fromarray(dark), "text": text})
    hits = 0
    for r, c in itertools.product(range(rows), range(cols)):
        bright = dark.copy()
        bright[r * side : (r + 1) * side, c * side : (c + 1) * side] = 255
        moved = (projected(bright) - projected(dark)).norm(dim=-1)
        (cell,) = il.image[0][r, c].resolve(tokens, 0)
        hits += int(moved.argmax()) == cell
    assert hits == rows * cols


def test_selectors_resolve_in_left_padded_rows() -> None:
    lens = il.LatentModel(*tiny.build("qwen2_5_vl"), spec=False)
    text = [tiny.prompt("qwen2_5_vl", t) for t in ("a red cube", "where is the red cube?")]
    examples = [
        {"images": tiny.image(32, 16, 0), "text": text[0]},
        {"images": tiny.image(16, 32, 1), "text": text[1]},
    ]
    tokens = lens.tokens(examples)
    for row in (0, 1):
        columns = il.text.find("red cube").resolve(tokens, row)
        assert tokens.text(row, int(columns[0]), int(columns[-1]) + 1) == "red cube"
        assert len(il.image.resolve(tokens, row)) == 8
        start = tokens.start(row)
        np.testing.assert_array_equal(il.positions([2, 0]).resolve(tokens, row), [start, start + 2])
        assert il.last_prompt.resolve(tokens, row) == tokens.width - 1
    assert tokens.start(0) > tokens.start(1) == 0
    assert (tokens.kind[0, : tokens.start(0)] == Kind.PAD).all()
    wide, tall = (il.image[0][0].resolve(tokens, row) for row in (0, 1))
    assert (len(wide), len(tall)) == (4, 2)  # the first row of a 2 x 4 and of a 4 x 2 grid


def test_system_message_is_told_from_the_question() -> None:
    lens = il.LatentModel(*tiny.build("qwen2_5_vl"), spec=False)
    text = "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n" + tiny.prompt(
        "qwen2_5_vl", "what?"
    )
    tokens = lens.tokens({"images": tiny.image(16, 16, 0), "text": text})
    system = tokens.columns(0, Kind.SYSTEM)
    assert (
        tokens.text(0, int(system[0]), int(system[-1]) + 1)
        == "<|im_start|>system\nBe brief.<|im_end|>\n"
    )
    assert "Be brief" not in "".join(t.text for t in tokens[0] if t.kind == Kind.TEXT)
