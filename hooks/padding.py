"""Left padding hidden from models that do not mask it, while they run.

Some classes ignore the attention mask, so that a shorter row of a batch reads its own padding.
Their calls of torch's attention function are given the mask here; the model itself is not touched.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from imaginelens.hooks.errors import SiteUnavailable

_POSITIONAL = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal")


class _Hiding(TorchFunctionMode):
    """Adds the padding to the mask of every attention that has none, and counts them."""

    def __init__(self, starts: Sequence[int]) -> None:
        super().__init__()
        self.starts, self.seen = torch.tensor(starts), 0

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is not F.scaled_dot_product_attention:
            return func(*args, **kwargs)
        given = dict(zip(_POSITIONAL, args, strict=False)) | kwargs
        if given.get("attn_mask") is None:
            self.seen += 1
            given |= {"attn_mask": self._visible(given["query"], given["key"]), "is_causal": False}
        return func(**given)

    def _visible(self, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
        """Which keys each query sees, (example, 1, query, key). Padding sees itself, so that no
        row of the softmax is empty."""
        keys = torch.arange(key.shape[-2])
        queries = keys[-query.shape[-2] :, None]
        real = (keys >= self.starts[:, None])[:, None]
        return (((keys <= queries) & real) | (keys == queries))[:, None].to(query.device)


@contextmanager
def hidden_padding(starts: Sequence[int]) -> Iterator[None]:
    """Hide each row's columns before its start from the causal attention of one forward.

    Args:
        starts: the column of each row's first real token.

    Raises:
        SiteUnavailable: the forward did not call torch's `scaled_dot_product_attention`.
    """
    if not any(starts):
        yield
        return
    with _Hiding(starts) as mode:
        yield
    if not mode.seen:
        raise SiteUnavailable(
            "the rows of the batch have unequal lengths, and the model's attention is not torch's "
            "scaled_dot_product_attention, where padding can be hidden from it; run the inputs one "
            "by one"
        )
