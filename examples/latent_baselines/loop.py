"""The latent loop, differentiable, in batches of any chains: `think`.

It runs a Qwen2.5-VL as the library's own loop does: prompt and open marker in one forward, then one
short forward per latent step, whose input embedding is the final-norm hidden state of the position
before; then the close marker and the answer. One key/value cache holds it all, and gradients run
through it. Prompts are padded on the left, so that pictures of any size, and any number of them,
share a batch; answers are padded on the right.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from imaginelens.hooks import LatentModel, LatentSpec
from imaginelens.hooks.errors import InputError

# sees (step, state about to be fed, (row, d_model)) and returns what is fed instead
Edit = Callable[[int, Tensor], Tensor]
SHAPED_LIKE = ("qwen2_vl", "qwen2_5_vl")  # Qwen3-VL adds visual features between its layers as well


@dataclass(frozen=True)
class Span:
    """What opens a latent span, what closes it, and how many steps it has."""

    open: int
    close: int
    steps: int


@dataclass(frozen=True)
class Page:
    """A batch of prompts, padded on the left, each with the open marker as its last token.

    Attributes:
        ids, mask: (example, position).
        positions: of the model's `get_rope_index`: (axis, example, position).
        features: the visual tokens of all pictures, in order: (image token, d_model).
        aid: (example, position), marks hints: pictures of the reply that are shown to the model
            before it imagines them. k + 1 at a picture that belongs to step k, 0 elsewhere.
    """

    ids: Tensor
    mask: Tensor
    positions: Tensor
    features: Tensor
    aid: Tensor


@dataclass(frozen=True)
class Answers:
    """What is to be written behind the span, end token included, padded on the right.

    Attributes:
        ids, mask: (example, position).
    """

    ids: Tensor
    mask: Tensor


@dataclass(frozen=True)
class Thought:
    """Final-norm hidden states of a run, each named by what it has to predict.

    Attributes:
        opening: predicts the open marker: (row, d_model).
        own: what the model would feed at each step: (row, step, d_model).
        fed: what was fed, edits included: (row, step, d_model).
        closing: predicts the close marker: (row, d_model).
        answering: predicts the answer's tokens: (row, position, d_model).
        own_layers: of every layer, where `own` was read: (layer, row, step, d_model); only if
            layers were asked for.
        answering_layers: the same of `answering`: (layer, row, position, d_model).
    """

    opening: Tensor
    own: Tensor
    fed: Tensor
    closing: Tensor
    answering: Tensor
    own_layers: Tensor | None = None
    answering_layers: Tensor | None = None


def span_of(lens: LatentModel, *, steps: int | None = None) -> Span:
    """The span of a model, if `think` runs it as the library does.

    Args:
        steps: how many latents; None is what the family's spec says.

    Raises:
        InputError: the model, or the way its family feeds latents, is not one that `think` runs.
    """
    kind, spec = lens.model.config.model_type, lens.spec
    if kind not in SHAPED_LIKE:
        raise InputError(f"a {kind} cannot be trained here; take one of {', '.join(SHAPED_LIKE)}")
    if spec is None or lens.span_tokens is None:
        raise InputError(
            "the model has no latent family; open it with checkpoints.open_to_train, which adds one"
        )
    if other := _unlike(spec):
        raise InputError(
            f"the {spec.name} family has {other}, and this loop feeds the last hidden state as it "
            "is, behind an open marker that the model writes; train another family"
        )
    return Span(lens.span_tokens.open, lens.span_tokens.close, steps or spec.max_steps)


def _unlike(spec: LatentSpec) -> str:
    """What this loop would do otherwise than the family's spec says; empty if nothing."""
    wanted: dict[str, Any] = {
        "trigger": "sampled", "feeds": "state", "slot": "after", "project": None, "on_grid": False,
        "criterion": None, "inserts": None, "cue": None,
    }  # fmt: skip
    return ", ".join(
        f"{k}={getattr(spec, k)!r}" for k, v in wanted.items() if getattr(spec, k) != v
    )


def think(
    model: Any,
    span: Span,
    page: Page,
    answers: Answers,
    *,
    edit: Edit | None = None,
    copies: int = 1,
    layers: bool = False,
    hide_aid: bool = False,
) -> Thought:
    """Read prompts, feed latents, and read the right answers after them.

    Args:
        edit: changes what is fed.
        copies: how often every example runs, from one reading of its prompt; rows i * copies and
            following are example i, and `answers` has as many, so that an edit can change one copy
            by another.
        layers: also give the states of every layer.
        hide_aid: the state that becomes latent k sees the hints up to that of step k, as if they
            stood between the latents, and nothing behind the span sees any.
    """
    cache = DynamicCache(config=model.config.get_text_config())
    embed = model.get_input_embeddings()
    inputs = _with_pictures(model, embed(page.ids), page)
    mask, place = page.mask, page.positions[:, :, -1:]
    if hide_aid:  # the open marker on its own, for it sees less than stands before it
        read = _forward(
            model, inputs[:, :-1], page.positions[:, :, :-1], mask[:, :-1], cache, layers
        )
        seen = _hidden(mask, page.aid, above=1)
        marker = _forward(model, inputs[:, -1:], place, seen, cache, layers)
        read = torch.cat([read[:, :, -1:], marker], dim=2)
    else:
        read = _forward(model, inputs, page.positions, mask, cache, layers)
    if copies > 1:
        cache.batch_repeat_interleave(copies)
    aid, mask = (t.repeat_interleave(copies, dim=0) for t in (page.aid, mask))
    read = read.repeat_interleave(copies, dim=1)
    place = place.repeat_interleave(copies, dim=1)
    state = read[-1][:, -1]
    trace, own, fed = [read[:, :, -1]], [], []
    for step in range(span.steps):
        own.append(state)
        fed.append(state if edit is None else edit(step, state))
        place = place + 1
        mask = torch.cat([mask, torch.ones_like(mask[:, :1])], dim=1)
        seen = _hidden(mask, aid, above=step + 2) if hide_aid else mask
        trace.append(_forward(model, fed[-1][:, None], place, seen, cache, layers)[:, :, -1])
        state = trace[-1][-1]
    close = torch.full_like(answers.ids[:, :1], span.close)
    tail = torch.cat([close, answers.ids[:, :-1]], dim=1)
    after = torch.arange(1, tail.shape[1] + 1, device=tail.device)
    seen = _hidden(mask, aid, above=0) if hide_aid else mask
    seen = torch.cat([seen, answers.mask.to(seen)], dim=1)
    said = _forward(model, embed(tail), place + after, seen, cache, layers)
    blank = state.new_zeros(len(state), 0, state.shape[-1])
    return Thought(
        opening=read[-1][:, -2],
        own=torch.stack(own, dim=1) if own else blank,
        fed=torch.stack(fed, dim=1) if fed else blank,
        closing=state,
        answering=said[-1],
        own_layers=torch.stack(trace[:-1], dim=2) if layers and own else None,
        answering_layers=said if layers else None,
    )


def _hidden(mask: Tensor, aid: Tensor, *, above: int) -> Tensor:
    """The mask without the hints of later steps; positions behind the prompt are no hints."""
    later = torch.zeros_like(mask, dtype=torch.bool)
    later[:, : aid.shape[1]] = aid > above
    return mask.masked_fill(later, 0)


def _with_pictures(model: Any, embeds: Tensor, page: Page) -> Tensor:
    """Lay the visual tokens over the embeddings of their placeholders."""
    is_image = (page.ids == model.config.image_token_id)[..., None]
    return embeds.masked_scatter(is_image, page.features.to(embeds))


def _forward(
    model: Any, inputs: Tensor, positions: Tensor, mask: Tensor, cache: DynamicCache, layers: bool
) -> Tensor:
    """Hidden states of every layer, the final norm's last; without `layers` only that."""
    out = model.model.language_model(
        inputs_embeds=inputs,
        position_ids=positions,
        # nothing to hide: the kernel that needs no mask is faster
        attention_mask=None if bool(mask.all()) else mask,
        past_key_values=cache,
        use_cache=True,
        output_hidden_states=layers,
    )
    if not layers:
        return out.last_hidden_state[None]
    found: Sequence[Tensor] = out.hidden_states
    return torch.stack([*found[1:-1], out.last_hidden_state])
