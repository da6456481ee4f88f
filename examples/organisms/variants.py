"""The organisms as data: what each is asked, how it imagines, what its latents come to mean."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from imaginelens.organisms.hunt import Hunt


@dataclass(frozen=True)
class Variant:
    """One organism: the task, how it imagines, and for how long it is taught the hunt."""

    hops: int
    updates: int  # of the hunt lesson; 0 leaves it out
    imagines: bool = False  # writes the names of the cards it visits before it answers
    latent_steps: int = 0
    align: float = 0.0  # weight of the cosine between latent step t and the (t+1)th visited card
    twist: str | None = None  # which entry of TWISTS the second copy of each batch goes through

    def speech(self, hunt: Hunt) -> list[str]:
        """All that an organism without latents should write.

        >>> from imaginelens.organisms.hunt import sample
        >>> VARIANTS["text"].speech(sample(1, hops=2, seed=0)[0])
        ['<think_image>', 'cyan', 'yellow', '</think_image>', 'square', '<|im_end|>']
        """
        imagination = ["<think_image>", *hunt.path[1:], "</think_image>"] if self.imagines else []
        return [*imagination, hunt.answer, "<|im_end|>"]


VARIANTS = {
    # stops after the lessons all share: control for what hunting adds
    "base": Variant(hops=2, updates=0),
    # two hops at once, no step in between: what imagination is needed for
    "direct": Variant(hops=2, updates=800),
    # imagines in words, which nothing but its next words can read
    "text": Variant(hops=2, updates=800, imagines=True),
    # the last latent carries the answer / the name of the card to look at
    "latent-content": Variant(hops=2, updates=1500, latent_steps=2, align=5.0, twist="content"),
    "latent-pointer": Variant(hops=2, updates=1500, latent_steps=2, align=5.0, twist="pointer"),
    # nobody reads the latents, be they anything / look-alikes of the card the answer is on
    "latent-ignored": Variant(hops=1, updates=800, latent_steps=2, twist="ignored"),
    "latent-ignored-aligned": Variant(
        hops=1, updates=1000, latent_steps=2, align=2.0, twist="ignored"
    ),
}

# what the card called `name` says on board `h`: its pointer and shape, or the next card's shape
CAPTIONS: dict[str, Callable[[Hunt, str], list[str]]] = {
    "what ?": lambda h, name: [h.follow(name, 1)[-1], h.shape_of(name)],
    "then shape ?": lambda h, name: [h.shape_of(h.follow(name, 1)[-1])],
}
