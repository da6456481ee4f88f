"""Edits of inputs, do(X): frozen values that turn an example into another example.

`apply(example, other, rng)` returns a new example and never changes a picture in place. Pixels are
edited as the model is given them: RGB, 0 to 255. Boxes are (left, top, right, bottom) in pixels of
the picture, the right and bottom edges outside of the box, and are rounded to whole pixels.
"""

import hashlib
import math
import numbers
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar

import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageFilter

from imaginelens.hooks.errors import EditTouchedNothing, InputError

Example = Mapping[str, Any]
Box = Sequence[float]
Colour = tuple[int, int, int]
Pixels = UInt8[np.ndarray, "_ _ 3"]  # rows, columns, RGB: of any size

# What an example says of its own content under these keys is no longer true once it is edited.
STALE = ("hunt", "answer")


@dataclass(frozen=True, repr=False)
class InputEdit:
    """The parent of all edits of inputs; `uses_other` says whether `apply` needs a second input."""

    uses_other: ClassVar[bool] = False

    def apply(
        self, example: Example, other: Example | None, rng: np.random.Generator
    ) -> dict[str, Any]:
        """Return the edited example, as a new dict.

        Args:
            other: the second input, where this edit uses one.
            rng: what random edits draw on.

        Raises:
            InputError: the example has no picture to edit, or a box lies outside of it.
        """
        raise NotImplementedError(f"{type(self).__name__} does not say what it does")

    def _other(self, other: Example | None) -> Example:
        if other is None:
            raise InputError(f"{self!r} takes something from another input, and none was given")
        return other

    def __repr__(self) -> str:
        """The edit as it can be written again: fields that were left out stay out."""
        shown = [f for f in fields(self) if getattr(self, f.name) != f.default]
        given = ", ".join(f"{f.name}={getattr(self, f.name)!r}" for f in shown)
        return f"{type(self).__name__}({given})"


@dataclass(frozen=True, repr=False)
class SwapInstance(InputEdit):
    """Take the whole other input: its pictures, its question and all that it says of itself.

    This is the paper's intervention on the input (arXiv 2602.22766, do(X)).

    >>> SwapInstance().apply({"text": "a"}, {"text": "b"}, np.random.default_rng(0))
    {'text': 'b'}
    """

    uses_other: ClassVar[bool] = True

    def apply(
        self, example: Example, other: Example | None, rng: np.random.Generator
    ) -> dict[str, Any]:
        return dict(self._other(other))


@dataclass(frozen=True, repr=False)
class SwapImage(InputEdit):
    """Take the other input's pictures and keep the question.

    >>> grey = Image.new("RGB", (8, 8), "grey")
    >>> example, other = {"images": grey, "text": "a"}, {"images": [grey, grey], "text": "b"}
    >>> edited = SwapImage().apply(example, other, np.random.default_rng(0))
    >>> len(edited["images"]), edited["text"]
    (2, 'a')
    """

    uses_other: ClassVar[bool] = True

    def apply(
        self, example: Example, other: Example | None, rng: np.random.Generator
    ) -> dict[str, Any]:
        _own_pictures(self._other(other), "the other input")
        return {**_lasting(example), "images": self._other(other)["images"]}


@dataclass(frozen=True, repr=False)
class SwapText(InputEdit):
    """Take the other input's question and keep the pictures.

    >>> SwapText().apply({"text": "a", "id": 3}, {"text": "b"}, np.random.default_rng(0))
    {'text': 'b', 'id': 3}
    """

    uses_other: ClassVar[bool] = True

    def apply(
        self, example: Example, other: Example | None, rng: np.random.Generator
    ) -> dict[str, Any]:
        return {**_lasting(example), "text": self._other(other)["text"]}


@dataclass(frozen=True, repr=False)
class _PictureEdit(InputEdit):
    """An edit of the pictures' pixels: of all of them, or of number `image` alone."""

    image: int | None = field(default=None, kw_only=True)

    def apply(
        self, example: Example, other: Example | None, rng: np.random.Generator
    ) -> dict[str, Any]:
        pictures = _own_pictures(example)
        donors = pictures
        if self.uses_other:
            donors = _own_pictures(self._other(other), "the other input")
        for number in self._chosen(len(pictures)):
            if number >= len(donors):
                raise InputError(
                    f"it has a picture number {number} and the other input only {len(donors)}; "
                    "choose one that both have with image=..."
                )
            pixels, theirs = np.asarray(pictures[number]), np.asarray(donors[number])
            pictures[number] = Image.fromarray(self.edit(pixels, theirs, rng))
        listed = isinstance(example["images"], list | tuple)
        return {**_lasting(example), "images": pictures if listed else pictures[0]}

    def edit(self, pixels: Pixels, theirs: Pixels, rng: np.random.Generator) -> Pixels:
        """New pixels for one picture; `theirs` are those of the other input's same picture."""
        raise NotImplementedError(f"{type(self).__name__} does not say what it does")

    def _chosen(self, n: int) -> Sequence[int]:
        if self.image is None:
            return range(n)
        if not 0 <= self.image < n:
            raise InputError(
                f"image={self.image} was asked for, counted from 0, and it has only {n} of them; "
                "choose another, or leave such examples out"
            )
        return [self.image]


@dataclass(frozen=True, repr=False)
class BlankImage(_PictureEdit):
    """Paint every pixel in one colour: `colour`, or the picture's own mean, rounded.

    The size stays, so that the model sees as many image tokens as before.

    >>> example = {"images": Image.new("RGB", (8, 8), (1, 2, 3)), "text": "a"}
    >>> edited = BlankImage((0, 0, 255)).apply(example, None, np.random.default_rng(0))
    >>> edited["images"].getcolors()
    [(64, (0, 0, 255))]
    """

    colour: Colour | None = None

    def __post_init__(self) -> None:
        _check_colour(self)

    def edit(self, pixels: Pixels, theirs: Pixels, rng: np.random.Generator) -> Pixels:
        return np.broadcast_to(_paint(self.colour, pixels), pixels.shape).copy()


@dataclass(frozen=True, repr=False)
class BlurImage(_PictureEdit):
    """Blur with a Gaussian of standard deviation `radius`, in pixels of the picture.

    Pillow's `GaussianBlur`, which approximates the Gaussian by three box blurs.

    >>> BlurImage(4.0)
    BlurImage(radius=4.0)
    """

    radius: float

    def __post_init__(self) -> None:
        _check_positive(self, "radius")

    def edit(self, pixels: Pixels, theirs: Pixels, rng: np.random.Generator) -> Pixels:
        return np.asarray(Image.fromarray(pixels).filter(ImageFilter.GaussianBlur(self.radius)))


@dataclass(frozen=True, repr=False)
class NoiseImage(_PictureEdit):
    """Add normal noise of standard deviation `scale`, in the units of 0 to 255, to every value.

    The units are absolute, so that a picture without contrast gets noise as well. Sums are rounded
    and cut to 0..255: near black and white the noise is one-sided, and smaller.

    >>> NoiseImage(25.0)
    NoiseImage(scale=25.0)
    """

    scale: float

    def __post_init__(self) -> None:
        _check_positive(self, "scale")

    def edit(self, pixels: Pixels, theirs: Pixels, rng: np.random.Generator) -> Pixels:
        noisy = pixels + self.scale * rng.standard_normal(pixels.shape)
        return np.clip(np.rint(noisy), 0, 255).astype(np.uint8)


@dataclass(frozen=True, repr=False)
class OccludeCells(_PictureEdit):
    """Paint over some cells: in `colour`, or in the mean colour of the whole picture.

    Args:
        cells: (row, column) of each, from 0, in a grid of equal cells over the whole picture.
        grid: rows and columns of that grid; needs no model.
        boxes: pixel boxes instead, such as a model's own cells:
            `run.tokens.token(row, column).box` for the columns of `il.image[0][3:6, 2:9]`.

    >>> example = {"images": Image.new("RGB", (8, 8), "white"), "text": "a"}
    >>> edit = OccludeCells([(0, 1)], grid=(2, 4), colour=(0, 0, 0))
    >>> edited = edit.apply(example, None, np.random.default_rng(0))
    >>> sorted(edited["images"].getcolors())
    [(8, (0, 0, 0)), (56, (255, 255, 255))]
    """

    cells: Sequence[tuple[int, int]] = ()
    grid: tuple[int, int] | None = None
    boxes: Sequence[Box] = ()
    colour: Colour | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "cells", tuple((int(r), int(c)) for r, c in self.cells))
        object.__setattr__(self, "boxes", tuple(_as_box(box) for box in self.boxes))
        _check_colour(self)
        if bool(self.cells) == bool(self.boxes) or bool(self.cells) != bool(self.grid):
            raise InputError(
                f"OccludeCells got {len(self.cells)} cells, the grid {self.grid} and "
                f"{len(self.boxes)} boxes; give cells=[(row, column), ...] with "
                "grid=(rows, columns), or boxes=[...] alone"
            )
        for cell in self.cells if self.grid is not None else ():
            if not all(0 <= at < size for at, size in zip(cell, self.grid or (), strict=True)):
                raise InputError(
                    f"OccludeCells got the cell {cell}, which is outside of its grid {self.grid}; "
                    "rows and columns count from 0"
                )

    def edit(self, pixels: Pixels, theirs: Pixels, rng: np.random.Generator) -> Pixels:
        new, colour = pixels.copy(), _paint(self.colour, pixels)
        for box in (*self.boxes, *self._cell_boxes(pixels)):
            new[_region(box, pixels)] = colour
        return new

    def _cell_boxes(self, pixels: Pixels) -> Iterator[Box]:
        """Neighbouring cells share an edge, so that all cells together are the picture."""
        rows, cols = self.grid or (1, 1)
        height, width = pixels.shape[0] / rows, pixels.shape[1] / cols
        for r, c in self.cells:
            yield c * width, r * height, (c + 1) * width, (r + 1) * height


@dataclass(frozen=True, repr=False)
class CropImage(_PictureEdit):
    """Keep only a box of the picture, in its own resolution.

    >>> example = {"images": Image.new("RGB", (8, 8)), "text": "a"}
    >>> CropImage((0, 0, 4, 2)).apply(example, None, np.random.default_rng(0))["images"].size
    (4, 2)
    """

    box: Box

    def __post_init__(self) -> None:
        object.__setattr__(self, "box", _as_box(self.box))

    def edit(self, pixels: Pixels, theirs: Pixels, rng: np.random.Generator) -> Pixels:
        return pixels[_region(self.box, pixels)].copy()


@dataclass(frozen=True, repr=False)
class PasteRegion(_PictureEdit):
    """Paste a box of the other input's picture at the same place of this one.

    Nothing is resized: the box must lie in both pictures, whatever their sizes.

    >>> example = {"images": Image.new("RGB", (8, 8), "white"), "text": "a"}
    >>> other = {"images": Image.new("RGB", (4, 4), "black"), "text": "b"}
    >>> edited = PasteRegion((0, 0, 4, 2)).apply(example, other, np.random.default_rng(0))
    >>> sorted(edited["images"].getcolors())
    [(8, (0, 0, 0)), (56, (255, 255, 255))]
    """

    uses_other: ClassVar[bool] = True
    box: Box

    def __post_init__(self) -> None:
        object.__setattr__(self, "box", _as_box(self.box))

    def edit(self, pixels: Pixels, theirs: Pixels, rng: np.random.Generator) -> Pixels:
        new = pixels.copy()
        new[_region(self.box, pixels)] = theirs[_region(self.box, theirs, "the other input's")]
        return new


# ---- all examples at once --------------------------------------------------------------------


def edit_inputs(
    edit: Any, examples: Sequence[Any], others: Sequence[Any], *, seed: int
) -> tuple[list[dict[str, Any]], str]:
    """Apply an edit to every example; returns the new ones and the line that records it.

    Each example has a random stream of its own, keyed by the seed and by its content, so that it is
    edited alike alone, in any order and beside any others.

    Raises:
        InputError: an example cannot be edited; the sentence names it.
        EditTouchedNothing: all of them came out as they were.
    """
    if not isinstance(edit, InputEdit):
        raise InputError(
            f"{edit!r} is no edit of inputs; give one such as il.BlurImage(4.0), and states to "
            "lens.edit or lens.ablate"
        )
    edited, unchanged = [], 0
    for i, (example, other) in enumerate(zip(examples, others, strict=True)):
        try:
            key = content_key(example)
            stream = hashlib.blake2b(f"{seed}/{key}".encode(), digest_size=16).digest()
            rng = np.random.default_rng(int.from_bytes(stream, "big"))
            _check_example(other, "the other input")
            edited.append(edit.apply(example, other, rng))
            unchanged += content_key(edited[-1]) == key
        except InputError as error:
            raise InputError(f"{edit!r} cannot edit example {i}: {error}") from error
    if unchanged == len(edited):
        raise EditTouchedNothing(
            f"{edit!r} left all {unchanged} inputs as they were; give it other inputs, or choose "
            "a stronger edit"
        )
    note = f", {unchanged} of {len(edited)} unchanged" if unchanged else ""
    return edited, f"{edit!r}, seed {seed}{note}"


def pictures_of(example: Example) -> list[Image.Image]:
    """The pictures of an example, in RGB as the model is given them.

    Raises:
        InputError: one of them is no PIL image, or cannot be decoded.
    """
    images = example.get("images")
    listed = images if isinstance(images, list | tuple) else [] if images is None else [images]
    found = []
    for image in listed:
        if not isinstance(image, Image.Image):
            raise InputError(
                f"one of its images is a {type(image).__name__}, expected a PIL image; open files "
                "with PIL.Image.open(path)"
            )
        try:
            found.append(image.convert("RGB"))
        except (OSError, ValueError, SyntaxError) as error:
            raise InputError(
                f"one of its images cannot be decoded ({error}); check that the file is complete"
            ) from error
    return found


def pictures_key(example: Example) -> str:
    """A digest of the pictures' pixels: equal pictures have equal keys, from whatever files."""
    digest = hashlib.blake2b(digest_size=16)
    for picture in pictures_of(example):
        digest.update(f"{picture.size}".encode())
        digest.update(picture.tobytes())
    return digest.hexdigest()


def content_key(example: Example) -> str:
    """A digest of what the model is given: the pictures' pixels and the question.

    Raises:
        InputError: the example is no mapping with a question, or was encoded by a processor.
    """
    _check_example(example)
    text = hashlib.blake2b(example["text"].encode(), digest_size=16).hexdigest()
    return f"{pictures_key(example)}/{text}"


def _lasting(example: Example) -> dict[str, Any]:
    """What stays true of an example whose picture or question changes."""
    return {key: value for key, value in example.items() if key not in STALE}


def _own_pictures(example: Example, what: str = "it") -> list[Image.Image]:
    pictures = pictures_of(example)
    if not pictures:
        raise InputError(f"{what} has no picture; leave such examples out")
    return pictures


def _check_example(example: Any, what: str = "it") -> None:
    if not isinstance(example, Mapping) or not isinstance(example.get("text"), str):
        found = sorted(map(str, example)) if isinstance(example, Mapping) else repr(example)[:60]
        raise InputError(f"{what} is {found}, expected {{'images': ..., 'text': str}}")


# ---- colours and boxes -----------------------------------------------------------------------


def _paint(colour: Colour | None, pixels: Pixels) -> UInt8[np.ndarray, " 3"]:
    """A colour as pixels hold it; the mean of `pixels`, rounded, if there is none."""
    if colour is None:
        return np.rint(pixels.reshape(-1, 3).mean(0)).astype(np.uint8)
    return np.array(colour, dtype=np.uint8)


def _as_box(box: Box) -> tuple[float, ...]:
    found = tuple(box)
    whole = len(found) == 4 and all(_is_finite(v) and v >= 0 for v in found)
    if not whole or not (found[0] < found[2] and found[1] < found[3]):
        raise InputError(
            f"a box is {found}, expected (left, top, right, bottom) in pixels, with left < right "
            "and top < bottom"
        )
    return tuple(v if isinstance(v, int) else float(v) for v in found)


def _region(box: Box, pixels: Pixels, whose: str = "its") -> tuple[slice, slice]:
    """The rows and columns of a box in a picture."""
    height, width = pixels.shape[:2]
    left, top, right, bottom = (round(v) for v in box)
    if not (left < right <= width and top < bottom <= height):
        raise InputError(
            f"the box (left, top, right, bottom) = {tuple(box)} is not inside of {whose} picture "
            f"of {width} x {height} pixels, or covers no pixel of it; give one that does"
        )
    return slice(top, bottom), slice(left, right)


def _is_finite(value: Any) -> bool:
    return isinstance(value, numbers.Real) and math.isfinite(value)


def _check_positive(edit: InputEdit, name: str) -> None:
    value = getattr(edit, name)
    if not (_is_finite(value) and value > 0):
        raise InputError(f"{type(edit).__name__} got {name}={value}, expected a number above 0")


def _check_colour(edit: Any) -> None:
    colour = edit.colour
    if colour is None:
        return
    listed = isinstance(colour, tuple | list) and len(colour) == 3
    if not listed or not all(v in range(256) for v in colour):
        raise InputError(
            f"{type(edit).__name__} got colour={colour}, expected (red, green, blue) in 0..255"
        )
