"""The treasure hunt: a visual task whose every counterfactual answer is known exactly.

A hunt is nine cards on a 3x3 board. A card's background colour is its *name* (all nine differ),
the colour of its glyph is the name of the card it *points* to (never itself), and the glyph's
*shape* is its payload. The question `start green then then shape ?` says: begin at the green card,
follow two pointers, name the shape you arrive at.

Because the rule is symbolic, this file also states what a model *should* answer when latent steps
of one hunt (the source) are swapped into another (the base), for each mechanism a model may have
learned: `content`, `pointer` or `ignored` (see `HYPOTHESES`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Int, UInt8
from PIL import Image

COLORS: dict[str, tuple[int, int, int]] = {
    "red": (225, 30, 30),
    "green": (30, 180, 50),
    "blue": (40, 60, 230),
    "yellow": (235, 220, 40),
    "magenta": (215, 40, 215),
    "cyan": (40, 215, 225),
    "white": (245, 245, 245),
    "orange": (245, 140, 20),
    "gray": (110, 110, 110),
}
NAMES = tuple(COLORS)
SHAPES = ("circle", "square", "triangle", "cross", "ring", "bar")
BOARD = 3  # cards per side
CARDS = BOARD * BOARD
CARD_PIXELS = 28  # one merged visual token: patch 14, merge 2
IMAGE_PIXELS = BOARD * CARD_PIXELS
GRAIN_SHIFT = 3  # pixel noise is uniform on -16..15: a random signed byte shifted right by this


@dataclass(frozen=True)
class Hunt:
    """One board and one question; equal fields give equal pixels.

    `names`, `pointers` and `shapes` list the nine cards in reading order; `noise` seeds the grain
    of the image.

    >>> hunt = Hunt(
    ...     names=("red", "green", "blue", "yellow", "magenta", "cyan", "white", "orange", "gray"),
    ...     pointers=("green", "blue", "red", "red", "red", "red", "red", "red", "red"),
    ...     shapes=("circle", "square", "ring", "bar", "bar", "bar", "bar", "bar", "bar"),
    ...     start="red",
    ...     hops=2,
    ...     noise=0,
    ... )
    >>> hunt.question, hunt.path, hunt.answer
    ('start red then then shape ?', ('red', 'green', 'blue'), 'ring')
    """

    names: tuple[str, ...]
    pointers: tuple[str, ...]
    shapes: tuple[str, ...]
    start: str
    hops: int
    noise: int

    def __post_init__(self) -> None:
        if sorted(self.names) != sorted(NAMES):
            raise ValueError(f"names must be {NAMES} in some order, not {self.names}.")
        if len(self.pointers) != CARDS or not set(self.pointers) <= set(NAMES):
            raise ValueError(f"pointers must be {CARDS} of {NAMES}, not {self.pointers}.")
        selfish = [name for name, to in zip(self.names, self.pointers, strict=True) if name == to]
        if selfish:
            raise ValueError(f"A card may not point to itself, but {selfish} do.")
        if len(self.shapes) != CARDS or not set(self.shapes) <= set(SHAPES):
            raise ValueError(f"shapes must be {CARDS} of {SHAPES}, not {self.shapes}.")
        if self.start not in NAMES:
            raise ValueError(f"start must be one of {NAMES}, not {self.start!r}.")
        if self.hops < 0:
            raise ValueError(f"hops must be 0 or more, not {self.hops}.")

    @property
    def question(self) -> str:
        """The words to put to the model after the image."""
        return " ".join(["start", self.start, *["then"] * self.hops, "shape", "?"])

    @property
    def path(self) -> tuple[str, ...]:
        """The names of the visited cards, the start first: `hops + 1` of them."""
        return self.follow(self.start, self.hops)

    @property
    def answer(self) -> str:
        """The shape on the last visited card."""
        return self.shape_of(self.path[-1])

    def follow(self, name: str, hops: int) -> tuple[str, ...]:
        """Follow `hops` pointers on this board from the card called `name`."""
        path = [name]
        for _ in range(hops):
            path.append(self.pointers[self.names.index(path[-1])])
        return tuple(path)

    def shape_of(self, name: str) -> str:
        """The shape on the card called `name`."""
        return self.shapes[self.names.index(name)]

    def image(self) -> Image.Image:
        """The board as an 84x84 RGB photograph with a little grain.

        >>> sample(1, hops=2, seed=0)[0].image().size
        (84, 84)
        """
        return Image.fromarray(render([self])[0])


def sample(n: int, *, hops: int, seed: int) -> list[Hunt]:
    """Draw `n` random hunts; a longer sample of the same seed starts with the shorter one.

    Names are a uniform permutation, each pointer is uniform over the eight other cards, shapes and
    the start are uniform.

    >>> sample(2, hops=1, seed=3) == sample(5, hops=1, seed=3)[:2]
    True
    """
    # one row of uniforms per hunt keeps samples prefix-stable
    draws = np.random.default_rng(seed).random((n, 3 * CARDS + 2))
    order, offset, shape, rest = np.split(draws, [CARDS, 2 * CARDS, 3 * CARDS], axis=1)
    name = order.argsort(axis=1)
    steps = 1 + (offset * (CARDS - 1)).astype(int)  # 1..8 cells on, so never the card itself
    target = np.take_along_axis(name, (np.arange(CARDS) + steps) % CARDS, axis=1)
    return [
        Hunt(
            names=tuple(NAMES[i] for i in name[row]),
            pointers=tuple(NAMES[i] for i in target[row]),
            shapes=tuple(SHAPES[int(u * len(SHAPES))] for u in shape[row]),
            start=NAMES[int(rest[row, 0] * CARDS)],
            hops=hops,
            noise=int(rest[row, 1] * 2**31),
        )
        for row in range(n)
    ]


def pairs(n: int, *, hops: int, seed: int) -> tuple[list[Hunt], list[Hunt]]:
    """Draw `n` independent (base, source) pairs with different answers and equally long prompts.

    `content`, `pointer` and `ignored` predict three different answers in about 59% of the pairs (in
    the others `pointer` agrees with one of the two); filter with `disagree` if you need only those.
    Like `sample`, a longer draw of the same seed starts with the shorter one.

    >>> base, source = pairs(8, hops=2, seed=0)
    >>> all(b.answer != s.answer for b, s in zip(base, source))
    True
    """
    wanted = 2 * n
    while True:
        hunts = sample(wanted, hops=hops, seed=seed)
        drawn = zip(hunts[::2], hunts[1::2], strict=True)
        kept = [(b, s) for b, s in drawn if b.answer != s.answer]
        if len(kept) >= n:
            return [b for b, _ in kept[:n]], [s for _, s in kept[:n]]
        wanted = 2 * wanted + 16


# -- what a swap of latent steps should do -------------------------------------------------------

Hypothesis = Callable[[Hunt, Hunt, tuple[int, ...] | None], str]


def restart(base: Hunt, source: Hunt, steps: tuple[int, ...] | None = None) -> str:
    """The answer if the hunt restarts in the base image at the card the last swapped step names.

    Latent step `t` holds the card after `t + 1` hops (the last card, once the hops are used up);
    steps after the last swapped one are recomputed in the base image. `steps=None` swaps all.

    >>> base, source = sample(2, hops=2, seed=0)
    >>> restart(base, source, (0,)) == base.shape_of(base.follow(source.path[1], 1)[-1])
    True
    """
    if steps == ():
        return base.answer
    done = base.hops if steps is None else min(max(steps) + 1, base.hops)
    return base.shape_of(base.follow(source.path[done], base.hops - done)[-1])


def content(base: Hunt, source: Hunt, steps: tuple[int, ...] | None = None) -> str:
    """The answer if the last latent step carries the *shape* itself: the source's answer.

    If the last step is not among the swapped ones it is recomputed, and the hunt restarts as in
    `restart`.
    """
    if steps is None or max(steps, default=-1) + 1 >= base.hops:
        return source.answer
    return restart(base, source, steps)


def pointer(base: Hunt, source: Hunt, steps: tuple[int, ...] | None = None) -> str:
    """The answer if latents carry card *names*: the source's, looked up in the base image.

    With the last step swapped that is the shape of the source's last visited name on the base's
    board; otherwise the hunt restarts there, as in `restart`.
    """
    return restart(base, source, steps)


def ignored(base: Hunt, source: Hunt, steps: tuple[int, ...] | None = None) -> str:
    """The answer if nobody reads the latents: the base's own."""
    return base.answer


HYPOTHESES: dict[str, Hypothesis] = {"content": content, "pointer": pointer, "ignored": ignored}


def disagree(
    base: Sequence[Hunt], source: Sequence[Hunt], steps: tuple[int, ...] | None = None
) -> Bool[np.ndarray, " example"]:
    """Mark the pairs in which all three `HYPOTHESES` predict different answers.

    >>> disagree(*pairs(1000, hops=2, seed=0)).mean().round(1)
    np.float64(0.6)
    """
    predictions = [
        {hypothesis(b, s, steps) for hypothesis in HYPOTHESES.values()}
        for b, s in zip(base, source, strict=True)
    ]
    return np.array([len(answers) == len(HYPOTHESES) for answers in predictions], dtype=bool)


# -- pixels --------------------------------------------------------------------------------------


def render(hunts: Sequence[Hunt]) -> UInt8[np.ndarray, "example height width 3"]:
    """Draw many boards at once; row `i` equals `hunts[i].image()`.

    >>> render(sample(4, hops=2, seed=0)).shape
    (4, 84, 84, 3)
    """
    name = _indices([h.names for h in hunts], NAMES)
    pointer = _indices([h.pointers for h in hunts], NAMES)
    shape = _indices([h.shapes for h in hunts], SHAPES)
    cards = _CARD_IMAGES[name, pointer, shape]  # (example, card, y, x, channel)
    cards = cards.reshape(-1, BOARD, BOARD, CARD_PIXELS, CARD_PIXELS, 3).swapaxes(2, 3)
    boards = cards.reshape(-1, IMAGE_PIXELS, IMAGE_PIXELS, 3)
    grain = np.stack([_grain(h.noise) for h in hunts])
    return np.clip(boards + grain, 0, 255).astype(np.uint8)


def _indices(
    rows: Sequence[Sequence[str]], words: Sequence[str]
) -> Int[np.ndarray, "example card"]:
    index = {word: i for i, word in enumerate(words)}
    return np.array([[index[word] for word in row] for row in rows])


def _grain(seed: int) -> Int[np.ndarray, "height width 3"]:
    size = (IMAGE_PIXELS, IMAGE_PIXELS, 3)
    noise = np.frombuffer(np.random.default_rng(seed).bytes(math.prod(size)), dtype=np.int8)
    return (noise >> GRAIN_SHIFT).reshape(size)


def _glyphs() -> Bool[np.ndarray, "shape y x"]:
    """Masks of the six shapes, in the order of `SHAPES`."""
    y, x = np.mgrid[:CARD_PIXELS, :CARD_PIXELS] - (CARD_PIXELS - 1) / 2
    radius = np.hypot(x, y)
    drawn = {
        "circle": radius < 9,
        "square": np.maximum(abs(x), abs(y)) < 8,
        "triangle": (abs(y) < 9) & (abs(x) < 0.55 * (y + 9)),
        "cross": (np.minimum(abs(x), abs(y)) < 3) & (np.maximum(abs(x), abs(y)) < 10),
        "ring": (radius > 6) & (radius < 10),
        "bar": (abs(y) < 4) & (abs(x) < 11),
    }
    return np.stack([drawn[shape] for shape in SHAPES])


def _card_images() -> Int[np.ndarray, "name pointer shape y x 3"]:
    """Every possible card, so that rendering is one look-up."""
    palette = np.array(list(COLORS.values()), dtype=np.int16)
    paper = palette[:, None, None, None, None]
    ink = palette[None, :, None, None, None]
    return np.where(_glyphs()[..., None], ink, paper)


_CARD_IMAGES = _card_images()
