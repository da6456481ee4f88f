"""Planted models whose latents are written words: the residual above them is what matters.

As `planted.py`, but nothing is fed back: behind the open token the model writes the words <w1>,
<w2>, ... whose embeddings never change. Block 0 computes z = step(x, 0) at each of them, block 1
copies it to the position before the answer, so that y = answer(x, z, ..., z).
"""

from itertools import pairwise

import numpy as np
import tiny
import torch
from planted import LATENT_END, LATENT_START, LOW, MECHANISMS, PlantedModel, Writes
from transformers import PreTrainedTokenizerFast

import imaginelens as il
from imaginelens.hooks.vocabspans import VocabSpec

XS0, XS1 = (0.0, 0.25, -0.5, 0.125), (1.0, 1.5, 0.75, 2.0)


class PlantedWords(PlantedModel):
    """A planted model that writes its words in order between the open and the close token."""

    def __init__(
        self,
        kind: str,
        tok: PreTrainedTokenizerFast,
        numbers: dict[int, float],
        words: tuple[str, ...],
    ) -> None:
        super().__init__(MECHANISMS[kind], tok, numbers)
        used = max(part.stop for part in self.registers.values())
        assert used + 1 + len(words) <= self.registers.size
        self.is_word = slice(used + 1, used + 1 + len(words))
        chain = tok.convert_tokens_to_ids([LATENT_START, *words, LATENT_END])
        embed, head = self.model.embed_tokens.weight, self.lm_head.weight
        with torch.no_grad():
            for place, (token, following) in enumerate(pairwise(chain)):
                embed[token, used + place] = 1
                head[:, used + place] = -LOW
                head[following, used + place] = 0
                self.model.norm.weight[used + place, used + place] = 1
        self.model.layers[0].mlp = Writes(self._at_words, self.registers["z"])

    def _at_words(self, h: torch.Tensor) -> torch.Tensor:
        there = h[..., self.is_word].sum(-1, keepdim=True)
        none = 0 * h[..., self.registers["z"]]
        return there * self.mechanism.step(h[..., self.registers["x_read"]], none)


class Words:
    """A planted model of a kind, pairs for it, and the outcome of each world.

    Attributes:
        truth: y00, y11, y10 (the source's latents in the base is y01), one value per pair.
    """

    def __init__(self, kind: str) -> None:
        self.mechanism = MECHANISMS[kind]
        words = tuple(f"<w{t + 1}>" for t in range(self.mechanism.steps))
        marks = {f"<{x}>": x for x in (*XS0, *XS1)}
        tok = tiny.tokenizer(*marks, *words, bos=False)
        numbers = dict(zip(tok.convert_tokens_to_ids(list(marks)), marks.values(), strict=True))
        self.spec = VocabSpec(name="words", groups=(words,), open=LATENT_START, close=LATENT_END)
        self.lens = il.LatentModel(PlantedWords(kind, tok, numbers, words), tok, self.spec)
        base, source = (
            [{"text": f"{'so ' * (i % 3)}x is <{x}>?"} for i, x in enumerate(half)]
            for half in (XS0, XS1)
        )
        self.pairs = il.Pairs(base, source, ["A"] * len(base), ["B"] * len(source))
        self.x0, self.x1 = np.array(XS0)[:, None], np.array(XS1)[:, None]

    def z(self, x: np.ndarray) -> np.ndarray:
        """The latent of each input, the same at each of its words."""
        return self.mechanism.step(x, np.zeros((1, self.mechanism.width)))

    def y(self, x: np.ndarray, z: np.ndarray) -> np.ndarray:
        """The outcome of inputs x with the latents z at all words."""
        seen = np.zeros_like(z) if self.mechanism.masked else z
        return self.mechanism.answer(x, *[seen] * self.mechanism.steps)[:, 0]

    @property
    def truth(self) -> dict[str, np.ndarray]:
        sides = {"0": self.x0, "1": self.x1}
        return {f"y{a}{b}": self.y(sides[a], self.z(sides[b])) for a in "01" for b in "01"}
