"""Cells edited in pixels: only they change, and behind the projector it is they that move most."""

from typing import Any

import numpy as np
import pytest
import tiny
import torch
from PIL import Image

import imaginelens as il

# one image token per cell, in plain rows; in Qwen2.5-VL's towers the projector works in windows
ARCHS = ("qwen2_5_vl", "llava", "gemma3", "paligemma", "mistral3")


def lens_of(name: str) -> il.LatentModel:
    return il.LatentModel(*tiny.build(name), spec=False)


def example(name: str, n: int = 1, side: int = 48) -> dict[str, Any]:
    images = [tiny.image(side, side, seed=i) for i in range(n)]
    text = "".join(tiny.prompt(name, "and ") for _ in images) + "what?"
    return {"images": images if n > 1 else images[0], "text": text}


def projected(lens: il.LatentModel, given: Any) -> torch.Tensor:
    """What enters the text model at each image token, (token, d_model)."""
    with torch.no_grad():
        _, cache = lens.run_with_cache(given, names_filter="blocks.0.hook_resid_pre")
    return cache["resid_pre", 0][0, il.image.resolve(lens.tokens(given), 0)]


@pytest.mark.parametrize("name", ARCHS)
def test_a_cell_edited_in_pixels_moves_its_own_row_of_the_projector_most(name: str) -> None:
    """In towers that mix their patches little, as trained ones do; random ones are loud."""
    model, processor = tiny.fresh(name)
    with torch.no_grad():
        for path, weight in model.named_parameters():
            if "vision" in path or "visual" in path:
                weight *= 0.1 if path.endswith(("out_proj.weight", "attn.proj.weight")) else 1.0
                weight *= 0.1 if path.endswith("attention.o_proj.weight") else 1.0
    lens, given = il.LatentModel(model, processor, spec=False), example(name)
    grid, before = lens.tokens(given).grids[0][0], projected(lens, given)
    for r in range(grid.rows):
        for c in range(grid.cols):
            edited = lens.edit_pixels(given, il.BlankImage((0, 0, 0)), at=il.image[0][r, c])
            assert edited.cells == ((0, r, c),)
            moved = (projected(lens, edited.example) - before).norm(dim=-1)
            assert int(moved.argmax()) == r * grid.cols + c


@pytest.mark.parametrize(
    "edit", [il.BlankImage(), il.BlankImage((1, 2, 3)), il.BlurImage(3.0), il.NoiseImage(20.0)]
)
def test_only_the_pixels_of_the_cells_change_and_as_the_edit_says(edit: il.InputEdit) -> None:
    lens, given = lens_of("qwen2_5_vl"), example("qwen2_5_vl")
    old = np.asarray(given["images"]).copy()
    edited = lens.edit_pixels(given, edit, at=il.image[0][1:3, 2:5], seed=3)
    new = np.asarray(edited.example["images"])
    inside = np.zeros(old.shape[:2], dtype=bool)
    inside[8:24, 16:40] = True  # 8 pixels a cell
    assert np.array_equal(new[~inside], old[~inside])
    assert np.array_equal(np.asarray(given["images"]), old)
    change = np.abs(new.astype(int) - old)[inside]
    assert edited.changed == change.any(-1).mean() > 0.3
    assert edited.moved == pytest.approx(change.mean())
    assert edited.boxes[0] == (16.0, 8.0, 24.0, 16.0)
    assert len(edited.cells) == 6
    if isinstance(edit, il.BlankImage):
        colour = edit.colour or tuple(np.rint(old.reshape(-1, 3).mean(0)).astype(int))
        assert (new[inside] == np.array(colour)).all()
    again = lens.edit_pixels(given, edit, at=il.image[0][1:3, 2:5], seed=3)
    assert np.array_equal(np.asarray(again.example["images"]), new)
    assert repr(edited).startswith(f"PixelEdit({edit!r}, seed 3, in 6 cells: ")


def test_one_of_several_pictures_is_edited_and_the_answer_is_no_longer_claimed() -> None:
    lens = lens_of("qwen2_5_vl")
    given = {**example("qwen2_5_vl", n=2), "answer": "red"}
    edited = lens.edit_pixels(given, il.BlankImage(), at=il.image[1]).example
    assert edited["images"][0].tobytes() == given["images"][0].tobytes()
    assert edited["images"][1].tobytes() != given["images"][1].tobytes()
    assert "answer" not in edited
    assert edited["text"] == given["text"]


def test_what_cannot_be_edited_in_pixels_is_refused() -> None:
    lens, given = lens_of("qwen2_5_vl"), example("qwen2_5_vl")
    for edit in (il.CropImage((0, 0, 8, 8)), il.SwapText(), il.BlurImage(2.0, image=0)):
        with pytest.raises(il.InputError, match="cannot be kept to some cells"):
            lens.edit_pixels(given, edit, at=il.image[0])
    with pytest.raises(il.InputError, match="before the processor runs"):
        lens.edit_pixels(lens.prompt(given).inputs, il.BlankImage())
    with pytest.raises(il.InputError, match="shows no image; select with"):
        lens.edit_pixels(given, il.BlankImage(), at=il.last_prompt)
    with pytest.raises(il.InputError, match="selects no cell whose pixels are known"):
        lens.edit_pixels(given, il.BlankImage(), at=il.text.find("nowhere"))
    grey = {**given, "images": Image.new("RGB", (48, 48), "grey")}
    with pytest.raises(il.EditTouchedNothing):
        lens.edit_pixels(grey, il.BlankImage(), at=il.image[0][0, 0])
    half = np.asarray(given["images"]).copy()
    half[:24] = half.reshape(-1, 3).mean(0).round()
    flat = {**given, "images": Image.fromarray(half)}
    mean = tuple(int(v) for v in np.rint(half.reshape(-1, 3).mean(0)))
    half[:24] = mean
    flat = {**given, "images": Image.fromarray(half)}
    with pytest.raises(il.EditTouchedNothing, match="left every pixel of 1 cells as it was"):
        lens.edit_pixels(flat, il.BlankImage(mean), at=il.image[0][0, 0])
