"""Which part of which image each image token shows: one rule per way of laying images out.

A rule turns an image into tiles: consecutive tokens, row by row, over one rectangle of the picture.
The finest tiling gives an image its grid of cells; tokens outside it (thumbnails, row ends) have no
cell, but thumbnails still have a box.
"""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from transformers import PreTrainedModel

from imaginelens.hooks.media import video_columns

_TILE = re.compile(r"<row_(\d+)_col_(\d+)>$")
_THUMBNAIL = "<global-img>"
_QUERIES = (
    "query_tokens",
    "latent_query",
    "perceiver_resampler.latents",
    "multi_modal_projector.query",
)
Size = tuple[float, float]  # width, height
Box = tuple[float, float, float, float]  # left, top, right, bottom


@dataclass(frozen=True)
class Tile:
    """Consecutive image tokens, row by row.

    Attributes:
        rows, cols: how many cells; 0 rows where the layout is not known (`extra` counts tokens).
        box: what it shows, as fractions of the picture.
        at: row and column of its first cell in the image's grid; None for a thumbnail.
        newline: each row ends with one more image token that shows nothing.
        extra: tokens behind the cells that show nothing that is known.
    """

    rows: int
    cols: int
    box: Box = (0.0, 0.0, 1.0, 1.0)
    at: tuple[int, int] | None = (0, 0)
    newline: bool = False
    extra: int = 0

    def tokens(self) -> tuple[np.ndarray, np.ndarray]:
        """Cell (token, 2) and box (token, 4; fractions of the picture) of every token of this tile;
        -1 and nan for tokens that show nothing."""
        left, top, right, bottom = self.box
        width, height = (right - left) / max(self.cols, 1), (bottom - top) / max(self.rows, 1)
        line = self.cols + self.newline
        cells = np.full((self.rows, line, 2), -1)
        boxes = np.full((self.rows, line, 4), np.nan)
        if self.at is not None:
            cells[:, : self.cols, 0] = self.at[0] + np.arange(self.rows)[:, None]
            cells[:, : self.cols, 1] = self.at[1] + np.arange(self.cols)
        x, y = left + np.arange(self.cols) * width, top + np.arange(self.rows)[:, None] * height
        for side, value in enumerate((x, y, x + width, y + height)):
            boxes[:, : self.cols, side] = value
        return (
            np.concatenate([cells.reshape(-1, 2), np.full((self.extra, 2), -1)]),
            np.concatenate([boxes.reshape(-1, 4), np.full((self.extra, 4), np.nan)]),
        )


@dataclass(frozen=True)
class ImageGrid:
    """The grid of cells over one image; 0 x 0 where its layout is not known."""

    rows: int
    cols: int


@dataclass(frozen=True)
class Layout:
    """The image tokens of one example: their columns, image, cell and pixel box."""

    columns: np.ndarray  # (token,)
    image: np.ndarray  # (token,)
    cells: np.ndarray  # (token, 2); -1 where there is none
    boxes: np.ndarray  # (token, 4); nan where there is none, or the picture is unknown
    grids: tuple[ImageGrid, ...]


def lay_out(
    ids: np.ndarray,
    model: PreTrainedModel,
    processor: Any,
    inputs: Mapping[str, Any],
    image_token_id: int | None,
    pictures: Sequence[Sequence[Any]] | None = None,
) -> list[Layout]:
    """Find the image tokens of every row of `ids` and what each of them shows.

    Args:
        ids: token ids, (example, position).
        inputs: the processor's dict, whose `image_grid_thw` or `image_sizes` give the grids.
        pictures: the original images per example, for pixel boxes and for tilings that depend on
            the picture's shape.
    """
    exact = _exact_grids(model, inputs)
    layouts, used = [], 0
    for row, row_ids in enumerate(ids):
        if "image_embeds_position_mask" in inputs:  # Kosmos: whatever ids stand there
            columns = np.flatnonzero(inputs["image_embeds_position_mask"][row].cpu().numpy())
        elif image_token_id is None:
            columns = np.zeros(0, dtype=int)
        else:
            columns = np.flatnonzero(row_ids == image_token_id)
        columns = np.setdiff1d(columns, video_columns(ids, row, model, inputs))
        sizes = [] if pictures is None else [p.size for p in pictures[row]]
        if exact is None:
            images = _tiled_by_runs(columns, row_ids, model, processor, sizes)
        else:
            images = _tiled_by_count(len(columns), exact[used:])
            used += len(images)
        layouts.append(_layout(columns, images, _frames(processor, sizes, len(images))))
    return layouts


def _layout(columns: np.ndarray, images: list[list[Tile]], frames: list[Box | None]) -> Layout:
    image = [np.zeros(0, dtype=int)]
    cells = [np.zeros((0, 2), dtype=int)]
    boxes = [np.zeros((0, 4))]
    for number, (tiles, frame) in enumerate(zip(images, frames, strict=True)):
        for tile in tiles:
            where, shown = tile.tokens()
            image.append(np.full(len(where), number))
            cells.append(where)
            boxes.append(_in_pixels(shown, frame))
    n = len(columns)
    if n and sum(map(len, cells)) != n:  # tokens between the cells that nothing tells of
        return Layout(
            columns,
            np.zeros(n, dtype=int),
            np.full((n, 2), -1),
            np.full((n, 4), np.nan),
            (ImageGrid(0, 0),),
        )
    return Layout(
        columns,
        np.concatenate(image)[:n],
        np.concatenate(cells)[:n],
        np.concatenate(boxes)[:n],
        tuple(_grid(tiles) for tiles in images),
    )


def _in_pixels(boxes: np.ndarray, frame: Box | None) -> np.ndarray:
    if frame is None:
        return np.full_like(boxes, np.nan)
    left, top, right, bottom = frame
    size = np.array([right - left, bottom - top] * 2)
    return np.array([left, top] * 2) + boxes * size


def _grid(tiles: list[Tile]) -> ImageGrid:
    placed = [(t.at[0] + t.rows, t.at[1] + t.cols) for t in tiles if t.at is not None and t.rows]
    if not placed:
        return ImageGrid(0, 0)
    return ImageGrid(max(r for r, _ in placed), max(c for _, c in placed))


def _exact_grids(model: PreTrainedModel, inputs: Mapping[str, Any]) -> list[tuple[int, int]] | None:
    """Rows and columns of every image of the batch, where the processor says them."""
    config = model.config
    vision = getattr(config, "vision_config", None)
    if inputs.get("image_grid_thw") is not None:
        merge = getattr(vision, "spatial_merge_size", 1)
        return [(t * h // merge, w // merge) for t, h, w in inputs["image_grid_thw"].tolist()]
    if inputs.get("image_sizes") is not None and hasattr(config, "spatial_merge_size"):
        cell = config.spatial_merge_size * getattr(vision, "patch_size", 1)
        return [(h // cell, w // cell) for h, w in inputs["image_sizes"].tolist()]
    return None


def _tiled_by_count(n: int, grids: list[tuple[int, int]]) -> list[list[Tile]]:
    """As many of the grids, in order, as it takes to cover `n` tokens."""
    images: list[list[Tile]] = []
    while n > 0 and len(images) < len(grids):
        rows, cols = grids[len(images)]
        images.append([Tile(rows, cols)])
        n -= rows * cols
    return images


def _tiled_by_runs(
    columns: np.ndarray,
    ids: np.ndarray,
    model: PreTrainedModel,
    processor: Any,
    sizes: list[Size],
) -> list[list[Tile]]:
    """Square tiles: each run of tokens is an image, or a tile of one after a tile token."""
    if resampled(model):
        return [[Tile(0, 0, extra=len(run))] for run in _runs(columns)]
    side = _side(model, processor)
    images: list[list[Tile]] = []
    for run in _runs(columns):
        before = _piece(int(run[0]) - 1, ids, processor)
        tile = _TILE.search(before)
        if tile is not None:
            at = (int(tile[1]) - 1) * side, (int(tile[2]) - 1) * side
            if at == (0, 0):
                images.append([])
            images[-1].append(Tile(side, side, at=at))
        elif before == _THUMBNAIL and images and len(images[-1]) > 1 and not _closed(images[-1]):
            images[-1] = [*_spread(images[-1]), Tile(side, side, at=None)]
        else:
            size = sizes[len(images)] if len(images) < len(sizes) else None
            images.append(_tiles(len(run), side, size))
    return images


def resampled(model: PreTrainedModel) -> bool:
    """Whether learned queries look at the whole picture, so that no token shows a cell of it."""
    return any(name.endswith(_QUERIES) for name, _ in model.named_parameters())


def _closed(tiles: list[Tile]) -> bool:
    return tiles[-1].at is None


def _spread(tiles: list[Tile]) -> list[Tile]:
    """Give the tiles of a split image their part of the picture."""
    grid = _grid(tiles)
    spread = []
    for tile in tiles:
        r, c = tile.at or (0, 0)
        box = (
            c / grid.cols,
            r / grid.rows,
            (c + tile.cols) / grid.cols,
            (r + tile.rows) / grid.rows,
        )
        spread.append(Tile(tile.rows, tile.cols, box, tile.at))
    return spread


def _tiles(n: int, side: int, size: Size | None) -> list[Tile]:
    """The tiles of one run of `n` tokens."""
    square = side * side
    if not square or n < square:
        root = math.isqrt(n)
        return [Tile(root, root)] if root * root == n else [Tile(0, 0, extra=n)]
    if n == square:
        return [Tile(side, side)]
    if size is None:
        return [Tile(0, 0, extra=n)]
    aspect = size[0] / size[1]
    if n % square == 0:  # several tiles, then a thumbnail of the whole
        count = n // square - 1
        rows, cols = min(_factors(count), key=lambda rc: abs(aspect - rc[1] / rc[0]))
        tiles = [
            Tile(side, side, at=(r * side, c * side)) for r in range(rows) for c in range(cols)
        ]
        return [*_spread(tiles), Tile(side, side, at=None)]
    # a thumbnail, then all tiles as one grid with a row end after each row
    rest = n - square
    shapes = [(r, c - 1) for r, c in _factors(rest) if c > 1]
    rows, cols = min(shapes, key=lambda rc: abs(math.log(rc[1] / rc[0] / aspect)))
    return [Tile(side, side, at=None), Tile(rows, cols, newline=True)]


def _factors(n: int) -> list[tuple[int, int]]:
    return [(d, n // d) for d in range(1, n + 1) if n % d == 0]


def _runs(columns: np.ndarray) -> list[np.ndarray]:
    if len(columns) == 0:
        return []
    return np.split(columns, np.flatnonzero(np.diff(columns) != 1) + 1)


def _side(model: PreTrainedModel, processor: Any) -> int:
    """Cells along one side of a square image or tile."""
    for holder, name in (
        (model.config, "mm_tokens_per_image"),
        (processor, "image_seq_length"),
        (processor, "image_seq_len"),
        (processor, "num_image_tokens"),
        (model.config, "image_seq_length"),
    ):
        tokens = getattr(holder, name, None)
        if isinstance(tokens, int) and tokens > 0 and math.isqrt(tokens) ** 2 == tokens:
            return math.isqrt(tokens)
    vision = getattr(model.config, "vision_config", None)
    size, patch = getattr(vision, "image_size", 0), getattr(vision, "patch_size", 1)
    size, patch = (v[0] if isinstance(v, list | tuple) else v for v in (size, patch))
    return int(size) // int(patch)


def _piece(column: int, ids: np.ndarray, processor: Any) -> str:
    tokenizer = getattr(processor, "tokenizer", processor)
    if column < 0 or tokenizer is None:
        return ""
    return str(tokenizer.decode([int(ids[column])]))


def _frames(processor: Any, sizes: list[Size], n: int) -> list[Box | None]:
    """The part of each picture, in pixels, that its tiles cover: all of it, or the central crop."""
    if len(sizes) != n:
        return [None] * n
    crop = bool(getattr(getattr(processor, "image_processor", None), "do_center_crop", False))
    return [_frame(width, height, crop) for width, height in sizes]


def _frame(width: float, height: float, crop: bool) -> Box:
    if not crop:
        return (0.0, 0.0, width, height)
    side = min(width, height)
    left, top = (width - side) / 2, (height - side) / 2
    return (left, top, left + side, top + side)
