"""How a model family writes latent tokens, as data: one frozen `LatentSpec` per family."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float

from imaginelens.hooks.errors import CheckpointError

Token = str | int | None


@dataclass(frozen=True, kw_only=True)
class LatentSpec:
    """Which token opens a latent span, which closes it, what is fed back and for how many steps.

    Attributes:
        name: the family's name.
        open, close, pad: the span's tokens, as strings (looked up in the tokenizer) or ids.
            `pad` stands in the token ids where a latent is fed.
        config_keys: config keys that hold the ids, tried after the strings.
        trigger: who opens a span: the model by sampling `open`, or the loop (`forced`) at
            generated position `forced_at`.
        slot: `after`: the open token's embedding is consumed, z_0 goes into the next slot.
            `replace`: z_0 overwrites the open token's own slot.
        max_steps: the most latents of one span.
        fixed: always `max_steps` latents; a sampled close token does not end the span early.
        force_close: at the cap the close token is emitted, whatever was sampled.
        emit: what the token ids show inside a span: `pad`, or the tokens as `sampled`.
        multi_span: whether a second span ends like the first (False reproduces Mirage's release,
            in which it never does).
        project: maps the last hidden state (after the final norm) to the fed embedding.
        criterion: ends a span by its state: True where the row's hidden state is the end.

    >>> LatentSpec(name="mine", open="<lat>", close="</lat>", pad="<pad>", max_steps=4).slot
    'after'
    """

    name: str
    open: Token
    close: Token
    pad: Token
    max_steps: int
    config_keys: Mapping[str, str] | None = None
    trigger: Literal["sampled", "forced"] = "sampled"
    forced_at: int = 0
    slot: Literal["after", "replace"] = "after"
    fixed: bool = False
    force_close: bool = True
    emit: Literal["pad", "sampled"] = "pad"
    multi_span: bool = True
    project: Callable[[torch.Tensor], torch.Tensor] | None = None
    criterion: Callable[[Float[torch.Tensor, "row d_model"]], Bool[torch.Tensor, " row"]] | None = (
        None
    )

    def __post_init__(self) -> None:
        if self.max_steps < 1:
            raise ValueError(
                f"LatentSpec {self.name!r} has max_steps={self.max_steps}, expected 1 or more; "
                "for a model without latents pass spec=None"
            )

    def resolve(self, tokenizer: Any, config: Any) -> "SpanTokens":
        """Find the ids of the span's tokens: by string, then by config key, then as given.

        Raises:
            CheckpointError: a token is in neither the tokenizer nor the config.
        """
        ids = {part: self._token(part, tokenizer, config) for part in ("open", "close", "pad")}
        return SpanTokens(**ids)

    def _token(self, part: str, tokenizer: Any, config: Any) -> int:
        token: Token = getattr(self, part)
        if isinstance(token, int):
            return token
        vocabulary = {} if tokenizer is None else tokenizer.get_vocab()
        if token in vocabulary:
            return int(vocabulary[token])
        key = (self.config_keys or {}).get(part)
        value = None if key is None else getattr(config, key, None)
        if value is not None:
            return int(value)
        raise CheckpointError(
            f"the {self.name} family needs a {part} token: {token!r} is not in the tokenizer"
            f"{f' and {key!r} is not in the config' if key else ''}; "
            f"pass spec=LatentSpec(..., {part}=<id>)"
        )


@dataclass(frozen=True)
class SpanTokens:
    """The token ids of a family's spans in one checkpoint."""

    open: int
    close: int
    pad: int


@dataclass(frozen=True)
class Skip:
    """Loop control: the open token is never sampled, so no span opens."""


@dataclass(frozen=True)
class Force:
    """Loop control: every span has exactly `steps` latents; with `at`, one opens at that generated
    position whatever the model would have written there."""

    steps: int
    at: int | None = None

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise ValueError(f"Force({self.steps}) asks for no latents; use il.Skip() for that")

    def applied_to(self, spec: LatentSpec | None) -> LatentSpec:
        """The family's spec with this control in force."""
        if spec is None:
            raise CheckpointError(
                "il.Force needs a model with a latent family; pass spec=LatentSpec(...) to it"
            )
        forced = replace(spec, max_steps=self.steps, fixed=True, force_close=True, criterion=None)
        return forced if self.at is None else replace(forced, trigger="forced", forced_at=self.at)
