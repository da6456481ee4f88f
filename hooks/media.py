"""Videos and sounds: which tokens stand for them, and what each video token shows.

A video is a grid of frames, rows and columns, as the vision tower counts them: Qwen takes two
pictures together as one frame.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedConfig, PreTrainedModel

_IMAGE = ("image_token_id", "image_token_index")
_VIDEO = ("video_token_id", "video_token_index")
_AUDIO = ("audio_token_id", "audio_token_index")
_VIDEO_TYPE = 2  # of mm_token_type_ids


@dataclass(frozen=True)
class VideoGrid:
    """The cells of one video; 0 x 0 x 0 where its layout is not known."""

    frames: int
    rows: int
    cols: int


@dataclass(frozen=True)
class Videos:
    """The video tokens of one example, in order.

    Attributes:
        columns: where they stand.
        video: the number of the video that each shows.
        cells: (token, 3), frame, row and column; -1 where a token shows none that is known.
        grids: of every video.
    """

    columns: np.ndarray
    video: np.ndarray
    cells: np.ndarray
    grids: tuple[VideoGrid, ...] = ()

    def of(self, column: int) -> tuple[int, int, int, int]:
        """Video, frame, row and column in the frame of the token at a column of the batch.

        >>> cells = np.array([[0, 0, 0], [0, 0, 1], [1, 0, 0], [1, 0, 1]])
        >>> shown = Videos(np.arange(5, 9), np.zeros(4, dtype=int), cells, (VideoGrid(2, 1, 2),))
        >>> shown.of(8)
        (0, 1, 0, 1)
        """
        (place,) = np.flatnonzero(self.columns == column)
        frame, row, col = (int(number) for number in self.cells[place])
        return int(self.video[place]), frame, row, col


def video_token_id(config: PreTrainedConfig) -> int | None:
    """The id of the token that stands for a part of a video, if it is another than an image's.

    >>> from transformers import LlavaConfig, Qwen2VLConfig
    >>> video_token_id(Qwen2VLConfig()), video_token_id(LlavaConfig())
    (151656, None)
    """
    image, video = _token(config, _IMAGE), _token(config, _VIDEO)
    return None if image is None or video == image else video


def audio_token_id(config: PreTrainedConfig) -> int | None:
    """The id of the token that stands for a part of a sound.

    >>> from transformers import GlmAsrConfig
    >>> audio_token_id(GlmAsrConfig())
    59260
    """
    return _token(config, _AUDIO)


def _token(config: PreTrainedConfig, names: Sequence[str]) -> int | None:
    found = (getattr(config, name, None) for name in names)
    return next((int(token) for token in found if isinstance(token, int)), None)


def video_columns(
    ids: np.ndarray, row: int, model: PreTrainedModel, inputs: Mapping[str, Any]
) -> np.ndarray:
    """The columns of one row that show a video: told by their id, or, where a frame is written with
    the tokens of an image (GLM), by their type."""
    config = model.config
    shown = ids[row] == (-1 if (token := video_token_id(config)) is None else token)
    types = inputs.get("mm_token_type_ids")
    if types is not None and inputs.get("pixel_values_videos") is not None:
        image = _token(config, _IMAGE)
        typed = types[row].cpu().numpy() == _VIDEO_TYPE
        shown |= typed & (ids[row] == (-1 if image is None else image))
    return np.flatnonzero(shown)


def lay_out_videos(
    ids: np.ndarray, model: PreTrainedModel, inputs: Mapping[str, Any]
) -> tuple[Videos, ...]:
    """Find the video tokens of every row of `ids` and what each of them shows."""
    exact = _exact_grids(model, inputs)
    found, used = [], 0
    for row in range(len(ids)):
        columns = video_columns(ids, row, model, inputs)
        if exact is None:
            lengths = _runs(columns)
            grids = [_even_grid(n, inputs.get("pixel_values_videos")) for n in lengths]
        else:
            grids = _covering(len(columns), exact[used:])
            lengths = [g.frames * g.rows * g.cols for g in grids]
            used += len(grids)
            if sum(lengths) != len(columns):  # tokens were merged or left out
                grids, lengths = [VideoGrid(0, 0, 0)], [len(columns)]
        parts = [_cells(grid, n) for grid, n in zip(grids, lengths, strict=True)]
        found.append(
            Videos(
                columns,
                np.repeat(np.arange(len(grids)), lengths),
                np.concatenate([np.zeros((0, 3), dtype=int), *parts]),
                tuple(grids),
            )
        )
    return tuple(found)


def _exact_grids(model: PreTrainedModel, inputs: Mapping[str, Any]) -> list[VideoGrid] | None:
    grids = inputs.get("video_grid_thw")
    if grids is None:
        return None
    merge = getattr(getattr(model.config, "vision_config", None), "spatial_merge_size", 1)
    return [VideoGrid(t, h // merge, w // merge) for t, h, w in grids.tolist()]


def _covering(n: int, grids: Sequence[VideoGrid]) -> list[VideoGrid]:
    """As many of the grids, in order, as it takes to cover `n` tokens."""
    taken: list[VideoGrid] = []
    for grid in grids:
        if n <= 0:
            break
        taken.append(grid)
        n -= grid.frames * grid.rows * grid.cols
    return taken


def _runs(columns: np.ndarray) -> list[int]:
    """The lengths of runs of neighbouring columns: a video each."""
    ends = np.flatnonzero(np.diff(columns) != 1) + 1
    return [len(run) for run in np.split(columns, ends) if len(run)]


def _even_grid(n: int, pixels: torch.Tensor | None) -> VideoGrid:
    """Square frames, as many as there are pictures, with one token behind the last at most."""
    frames = pixels.shape[1] if pixels is not None and pixels.dim() == 5 else 0
    side = math.isqrt(n // frames) if frames else 0
    known = side > 0 and n - frames * side**2 in (0, 1)
    return VideoGrid(frames, side, side) if known else VideoGrid(0, 0, 0)


def _cells(grid: VideoGrid, n: int) -> np.ndarray:
    """Frame, row and column of the `n` tokens of a video."""
    cells, shape = np.full((n, 3), -1), (grid.frames, grid.rows, grid.cols)
    if min(shape):
        shown = np.arange(math.prod(shape))
        cells[: len(shown)] = np.stack(np.unravel_index(shown, shape), -1)
    return cells
