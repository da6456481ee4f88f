"""Attention knockout: edges between two sets of positions are cut, the rest is renormalised.

An edge runs from a query, who looks, to a key, which is looked at. The scores of cut edges are
minus infinity before the softmax, so what a query no longer sees is shared out among what it
still sees.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field, fields

import numpy as np
import torch

from imaginelens.hooks.edits import Act, EdgeEdit, EditContext, whole_numbers
from imaginelens.hooks.errors import InputError, SiteUnavailable
from imaginelens.hooks.positions import AnswerPositions, Positions, edges, generated
from imaginelens.hooks.tokens import TokenMap

SITE = "blocks.{i}.attn.hook_pattern"


@dataclass(frozen=True, repr=False)
class Knockout(EdgeEdit):
    """Hide the positions it is used at, as keys, from the attention of other positions.

    `lens.edit(il.Knockout(queries=il.latent), at=il.image)` cuts latent -> image. A position always
    goes on looking at itself, so that no query is left without a key. While a run is generated the
    cut holds in every step, for keys in the cache as well.

    Args:
        queries: who no longer looks there; None is every other position.
        layers: numbers of the layers in which edges are cut, such as `range(2, 5)`; None is all.
        heads: numbers of the query heads; None is all.

    Raises:
        InputError: the queries are `il.answer`, or layers or heads are no list of numbers.

    >>> import imaginelens as il
    >>> lens = il.load("latent-content")
    >>> cut = Knockout(queries=il.before_answer, layers=range(3))
    >>> lens.ablate(lens.task(n=8, seed=0).base, cut, at=il.latent, context="fixed").landing
    Landing(Knockout at latent of ... 16 cells in 8 rows: ...; relative change 1, 48 edges)
    """

    queries: Positions | None = None
    layers: Sequence[int] | None = field(default=None, kw_only=True)
    heads: Sequence[int] | None = field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        if self.queries is not None and not isinstance(self.queries, Positions):
            raise InputError(
                f"queries is {self.queries!r}, expected positions such as il.latent or "
                "il.after(il.latent)"
            )
        if isinstance(self.queries, AnswerPositions) and repr(self.queries) == "answer":
            raise InputError(
                "queries=il.answer leaves out the position whose logits decide the answer's first "
                "token, which is the one before it; use queries=il.deciding, or "
                "il.after(il.latent) while a run is generated"
            )
        for name in ("layers", "heads"):
            object.__setattr__(self, name, whole_numbers(name, getattr(self, name)))

    def apply(self, act: Act, ctx: EditContext) -> Act:
        raise SiteUnavailable(
            f"{self!r} cuts edges of attention and has no states to edit; use it with lens.edit, "
            "lens.ablate or il.necessity"
        )

    def sites_among(self, names: Collection[str], chosen: tuple[str, ...]) -> tuple[str, ...]:
        """The patterns of its layers.

        Raises:
            InputError: a site was chosen that is no pattern, or a layer that the model has not.
            SiteUnavailable: a layer's attention cannot be reached.
        """
        own = [name for name in chosen if name != "hook_latent"]
        if own and self.layers is None and all(n.endswith("attn.hook_pattern") for n in own):
            return tuple(own)
        if own and own != [name for name in self._of_layers(names) if name in own]:
            raise InputError(
                f"{self!r} acts inside attention and not at {own[0]!r}; leave the site out, and "
                "choose layers=[...] if not all are meant"
            )
        found = self._of_layers(names)
        missing = [name for name in found if name not in names]
        if missing:
            raise SiteUnavailable(
                f"{self!r} cannot cut edges in {len(missing)} of {len(found)} layers "
                f"({missing[0]!r} is not offered: its attention class does not ask for a "
                "registered attention function); name others with layers=[...]"
            )
        return tuple(found)

    def _of_layers(self, names: Collection[str]) -> list[str]:
        """The names of its layers' patterns, whether the model offers them or not."""
        blocks = {int(n.split(".")[1]) for n in names if n.startswith("blocks.")}
        n = max(blocks, default=-1) + 1
        layers = range(n) if self.layers is None else self.layers
        if max(layers, default=-1) >= n:
            raise InputError(
                f"{self!r} names layer {max(layers)} of a model with layers 0 to {n - 1}"
            )
        return [SITE.format(i=i) for i in layers]

    def edges(
        self, at: Positions, tokens: TokenMap, queries: np.ndarray, keys: np.ndarray
    ) -> np.ndarray:
        """Which edges to cut between these columns: (example, query, key)."""
        return edges(self.queries, at, tokens, queries, keys)

    def heads_among(self, n: int) -> torch.Tensor:
        """Which of a layer's `n` query heads are cut, as a mask."""
        chosen = range(n) if self.heads is None else self.heads
        if max(chosen) >= n:
            raise InputError(
                f"{self!r} names head {max(chosen)} of a layer with heads 0 to {n - 1}"
            )
        mask = torch.zeros(n, dtype=torch.bool)
        mask[list(chosen)] = True
        return mask

    def __repr__(self) -> str:
        """The edit as it can be written again: what was left out stays out."""
        shown = [f.name for f in fields(self) if getattr(self, f.name) != f.default]
        given = ", ".join(f"{name}={getattr(self, name)!r}" for name in shown)
        return f"{type(self).__name__}({given})"


@dataclass(frozen=True, repr=False)
class Forget(Knockout):
    """Hide the positions it is used at from everything that is generated, as if they were dropped
    from the cache before decoding.

    `lens.edit(il.Forget(), at=il.image)`: what the model wrote, latents included, has not seen the
    image except through the prompt's own states. `il.Forget(il.onward(il.latent))` begins later, at
    the first latent. The first generated token is decided in the prompt, before anything is hidden.

    >>> import imaginelens as il
    >>> lens = il.load("latent-content")
    >>> with lens.edit(Forget(), at=il.image) as landing:
    ...     run = lens.run(lens.task(n=1, seed=0).base[0])
    >>> len(landing.cells), landing.edges  # 9 image tokens, 3 layers, 5 generated queries
    (9, 135)
    """

    queries: Positions | None = generated
