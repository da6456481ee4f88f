"""Edits of the pixels that some image tokens see, before the processor runs.

The cells are found in the map of the input's tokens, so that the same selector edits a cell in
pixels and, at `vision_projector.hook_out`, behind the vision tower.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from imaginelens.hooks.errors import EditTouchedNothing, InputError
from imaginelens.hooks.inputs import (
    BlankImage,
    BlurImage,
    Box,
    InputEdit,
    NoiseImage,
    OccludeCells,
    edit_inputs,
    pictures_of,
)
from imaginelens.hooks.positions import Positions
from imaginelens.hooks.tokens import TokenMap

if TYPE_CHECKING:
    from imaginelens.hooks.model import LatentModel


@dataclass(frozen=True, repr=False)
class PixelEdit:
    """An input with some cells edited, and the record of what was done to it.

    Attributes:
        example: the new input, for `lens.run`.
        cells: image, row and column of each cell that was selected.
        boxes: the pixels of each cell as left, top, right, bottom, cut to the picture.
        changed: share of the pixels in those boxes that changed; elsewhere none did.
        moved: mean absolute change of a value in those boxes, in the units of 0 to 255.
        done: the edit, as it can be written again, and its seed.
    """

    example: dict[str, Any]
    cells: tuple[tuple[int, int, int], ...]
    boxes: tuple[tuple[float, float, float, float], ...]
    changed: float
    moved: float
    done: str

    def __repr__(self) -> str:
        n = len(self.cells)
        return (
            f"PixelEdit({self.done}, in {n} cell{'s' * (n != 1)}: {self.changed:.0%} of their "
            f"pixels changed, by {self.moved:.3g} of 255 on average)"
        )


def edit_pixels(
    lens: "LatentModel", example: Any, edit: InputEdit, *, at: Positions, seed: int
) -> PixelEdit:
    """Edit the pixels of some cells of one input's pictures; all others stay as they are."""
    if not isinstance(edit, BlankImage | BlurImage | NoiseImage) or edit.image is not None:
        raise InputError(
            f"{edit!r} cannot be kept to some cells; give il.BlankImage(), il.BlurImage(radius) or "
            "il.NoiseImage(scale), and choose pictures with at=il.image[k]"
        )
    if not isinstance(example, Mapping) or not isinstance(example.get("text"), str):
        raise InputError(
            "pixels are edited before the processor runs; give one input "
            "{'images': ..., 'text': ...}, not a list and not what a processor returned"
        )
    pictures = [np.asarray(picture) for picture in pictures_of(example)]
    cells, boxes = _cells(lens.tokens(example), at, pictures)
    (whole,), done = edit_inputs(edit, [example], [example], seed=seed)
    new, share, moved = [], [], []
    for number, (pixels, edited) in enumerate(zip(pictures, pictures_of(whole), strict=True)):
        own = [box for (image, *_), box in zip(cells, boxes, strict=True) if image == number]
        mask = _mask(own, pixels)
        new.append(np.where(mask[..., None], np.asarray(edited), pixels))
        change = np.abs(new[-1].astype(int) - pixels)[mask]
        share.append(change.any(-1))
        moved.append(change.ravel())
    if not np.concatenate(share).any():
        raise EditTouchedNothing(
            f"{done} left every pixel of {len(cells)} cells as it was; choose other cells, or a "
            "stronger edit"
        )
    images = [Image.fromarray(picture) for picture in new]
    listed = isinstance(example["images"], list | tuple)
    return PixelEdit(
        example={**whole, "images": images if listed else images[0]},
        cells=tuple(cells),
        boxes=tuple(boxes),
        changed=float(np.concatenate(share).mean()),
        moved=float(np.concatenate(moved).mean()),
        done=done,
    )


def _cells(
    tokens: TokenMap, at: Positions, pictures: list[np.ndarray]
) -> tuple[list[tuple[int, int, int]], list[tuple[float, float, float, float]]]:
    """The selected cells, and their boxes inside of their pictures."""
    cells, boxes = [], []
    for column in at.resolve(tokens, 0).tolist():
        token = tokens.token(0, column)
        if token.image < 0:
            raise InputError(
                f"{at!r} selects column {column}, which shows no image; select with il.image"
            )
        if token.box is None:
            continue  # a learned vector, such as the end of a row of cells
        height, width = pictures[token.image].shape[:2]
        left, top, right, bottom = token.box
        box = max(left, 0.0), max(top, 0.0), min(right, float(width)), min(bottom, float(height))
        if round(box[0]) < round(box[2]) and round(box[1]) < round(box[3]):
            cells.append((token.image, token.row, token.col))
            boxes.append(box)
    if not cells:
        raise InputError(
            f"{at!r} selects no cell whose pixels are known; look at lens.tokens(example) for the "
            "cells there are"
        )
    return cells, boxes


def _mask(boxes: Sequence[Box], pixels: np.ndarray) -> np.ndarray:
    """Which pixels of a picture are in one of the boxes."""
    black = np.zeros_like(pixels)
    if not boxes:
        return black[..., 0] > 0
    painted = OccludeCells(boxes=boxes, colour=(255, 255, 255))
    return painted.edit(black, black, np.random.default_rng(0))[..., 0] > 0
