"""Soft tokens: what Soft Thinking feeds is a mean of token embeddings, weighted by probability."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int


@dataclass(frozen=True, kw_only=True)
class Mixture:
    """Feeds the mean embedding of the likeliest tokens, and ends when they no longer differ.

    Soft Thinking (eric-ai-lab/Soft-Thinking, layers/sampler.py, layers/vocab_parallel_embedding.py
    :494-512 and managers/schedule_batch.py:726-760): z = sum_i p_i E[i] over the `top_k` tokens of
    the distribution that tokens are sampled from, with p renormalised over them.

    Attributes:
        top_k: how many tokens are mixed.
        calm_below: a step is calm if the entropy of its next token, in nats, is below this.
        patience: so many calm steps in a row end the span.

    >>> Mixture(top_k=2)(torch.tensor([[0.0, 0.0, -9.0]]), lambda ids: ids[..., None].float())
    tensor([[0.5000]])
    """

    top_k: int = 10
    calm_below: float = 0.01
    patience: int = 256

    def __post_init__(self) -> None:
        if self.top_k < 1 or self.patience < 1:
            raise ValueError(
                f"Mixture(top_k={self.top_k}, patience={self.patience}) mixes nothing or ends "
                "before it begins; both must be 1 or more"
            )

    def __call__(
        self,
        scores: Float[torch.Tensor, "row vocab"],
        embedding: Callable[[Int[torch.Tensor, "row token"]], torch.Tensor],
    ) -> Float[torch.Tensor, "row d_model"]:
        """Mix embeddings by scores, which are logits as they are sampled from."""
        likeliest = scores.softmax(-1).topk(min(self.top_k, scores.shape[-1]))
        weights = likeliest.values / likeliest.values.sum(-1, keepdim=True)
        embedded = embedding(likeliest.indices)
        return (weights.to(embedded.dtype)[..., None] * embedded).sum(-2)

    def is_calm(
        self, logits: Float[torch.Tensor, "row vocab"], temperature: float
    ) -> Bool[torch.Tensor, " row"]:
        """Which rows are sure of their next token, before any filter cuts the distribution."""
        entropy = torch.distributions.Categorical(logits=logits / temperature).entropy()
        return entropy < self.calm_below
