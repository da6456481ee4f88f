"""The loops in plain PyTorch, batched: `rollout` thinks in latents, `speak` in words.

`rollout` is differentiable, `train.py` trains through it. It runs the model exactly as a decoder
with a key/value cache does: prompt and `<|latent_start|>` in one forward, then one short forward
per latent step, whose input embedding is the final-norm hidden state of the position before. Boards
all have the same size, so prompts need no padding.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from transformers import DynamicCache, Qwen2_5_VLForConditionalGeneration

from imaginelens.organisms.checkpoint import VOCABULARY, patchify
from imaginelens.organisms.hunt import CARDS, Hunt, render

WORDS = list(VOCABULARY)

# sees (step, state about to be fed, (example, d_model)) and returns what is fed instead
Edit = Callable[[int, Tensor], Tensor]
# sees (index, words just written, one per example) and returns what the model reads instead
Rewrite = Callable[[int, list[str]], list[str]]


@dataclass(frozen=True)
class Gallery:
    """Hunts with the visual tokens of their images, encoded once by a frozen vision tower."""

    hunts: list[Hunt]
    features: Tensor  # (example, card, d_model)

    def __getitem__(self, rows: np.ndarray) -> Gallery:
        return Gallery([self.hunts[row] for row in rows], self.features[torch.from_numpy(rows)])

    def visited(self, hop: int) -> Tensor:
        """The visual token of the card reached after `hop` hops: (example, d_model)."""
        cells = [hunt.names.index(hunt.path[min(hop, hunt.hops)]) for hunt in self.hunts]
        return self.features[torch.arange(len(cells)), cells]


@dataclass(frozen=True)
class Rollout:
    """Final-norm hidden states of a run, each named by the token it has to predict."""

    opening: Tensor  # predicts <|latent_start|>, (example, d_model)
    latents: Tensor  # as fed, edits included, (example, step, d_model)
    closing: Tensor  # predicts <|latent_end|>, (example, d_model)
    answering: Tensor  # predicts the answer word, (example, d_model)
    ending: Tensor  # predicts <|im_end|> after the right answer, (example, d_model)


def see(model: Qwen2_5_VLForConditionalGeneration, hunts: Sequence[Hunt]) -> Tensor:
    """Encode the images of many hunts: (example, card, d_model)."""
    pixels, grid = patchify(render(hunts))
    return model.model.visual(pixels, grid_thw=grid).pooler_output.view(len(hunts), CARDS, -1)


@torch.no_grad()
def photograph(model: Qwen2_5_VLForConditionalGeneration, hunts: list[Hunt]) -> Gallery:
    """Encode a collection of hunts without gradients, in chunks that fit the processor's cache."""
    chunks = [hunts[i : i + 64] for i in range(0, len(hunts), 64)]
    return Gallery(hunts, torch.cat([see(model, chunk) for chunk in chunks]))


def token_ids(rows: Sequence[Sequence[str]]) -> Tensor:
    """Look up rows of words: (example, position)."""
    return torch.tensor([[VOCABULARY[word] for word in row] for row in rows])


def prompt_words(question: str) -> list[str]:
    """The chat template's words for one image and one question, generation prompt included."""
    image = ["<|vision_start|>", *["<|image_pad|>"] * CARDS, "<|vision_end|>"]
    user = ["<|im_start|>", "user", *image, *question.split(), "<|im_end|>"]
    return [*user, "<|im_start|>", "assistant"]


def embed(model: Qwen2_5_VLForConditionalGeneration, ids: Tensor, features: Tensor) -> Tensor:
    """Input embeddings with the visual tokens in place: (example, position, d_model)."""
    is_image = (ids == model.config.image_token_id)[..., None]
    return model.get_input_embeddings()(ids).masked_scatter(is_image, features)


def positions(model: Qwen2_5_VLForConditionalGeneration, ids: Tensor) -> Tensor:
    """The 3-D rotary positions of equally laid out rows: (3, example, position)."""
    side = int(CARDS**0.5) * model.config.vision_config.spatial_merge_size
    one, _ = model.model.get_rope_index(
        input_ids=ids[:1],
        mm_token_type_ids=(ids[:1] == model.config.image_token_id).int(),
        image_grid_thw=torch.tensor([[1, side, side]]),
    )
    return one.expand(-1, len(ids), -1)


def rollout(
    model: Qwen2_5_VLForConditionalGeneration,
    gallery: Gallery,
    *,
    edit: Edit | None = None,
    copies: int = 1,
) -> Rollout:
    """Run the latent protocol on each hunt, its right answer teacher-forced after the span.

    `copies=2` runs every example twice from one prompt forward; rows 2i and 2i+1 are copies of
    example i, so an `edit` can change the second by the first.
    """
    steps = model.config.latent_steps
    pad = ["<|latent_pad|>"] * steps
    ids = token_ids(
        [
            [*prompt_words(h.question), "<|latent_start|>", *pad, "<|latent_end|>", h.answer]
            for h in gallery.hunts
        ]
    )
    opened = ids.shape[1] - steps - 2  # positions up to and including <|latent_start|>
    places = positions(model, ids).repeat_interleave(copies, dim=1)
    cache = DynamicCache(config=model.config)
    inputs = embed(model, ids[:, :opened], gallery.features)
    prompt = _decode(model, inputs, places[:, ::copies, :opened], cache)
    cache.batch_repeat_interleave(copies)
    state = prompt[:, -1].repeat_interleave(copies, dim=0)
    latents = []
    for step in range(steps):
        latents.append(state if edit is None else edit(step, state))
        place = places[..., opened + step, None]
        state = _decode(model, latents[-1][:, None], place, cache)[:, 0]
    tail = model.get_input_embeddings()(ids[:, -2:]).repeat_interleave(copies, dim=0)
    final = _decode(model, tail, places[..., -2:], cache)
    return Rollout(
        opening=prompt[:, -2].repeat_interleave(copies, dim=0),
        latents=torch.stack(latents, dim=1),
        closing=state,
        answering=final[:, 0],
        ending=final[:, 1],
    )


def _decode(
    model: Qwen2_5_VLForConditionalGeneration, inputs: Tensor, places: Tensor, cache: DynamicCache
) -> Tensor:
    return model.model.language_model(
        inputs_embeds=inputs, position_ids=places, past_key_values=cache, use_cache=True
    ).last_hidden_state


def read(model: Qwen2_5_VLForConditionalGeneration, ids: Tensor, features: Tensor) -> Tensor:
    """Final-norm hidden states of equally long rows, all given: (example, position, d_model)."""
    return model.model.language_model(
        inputs_embeds=embed(model, ids, features),
        position_ids=positions(model, ids),
        use_cache=False,
    ).last_hidden_state


@torch.no_grad()
def speak(
    model: Qwen2_5_VLForConditionalGeneration,
    gallery: Gallery,
    *,
    length: int,
    rewrite: Rewrite | None = None,
) -> list[list[str]]:
    """Write greedily for `length` words; the words of each example, as it wrote them.

    What `rewrite` changes is what is read afterwards, and returned.
    """
    ids = token_ids([prompt_words(hunt.question) for hunt in gallery.hunts])
    blank = torch.zeros(len(ids), length, dtype=ids.dtype)
    places = positions(model, torch.cat([ids, blank], dim=1))
    inputs = embed(model, ids, gallery.features)
    cache = DynamicCache(config=model.config)
    said: list[list[str]] = []
    for index in range(length):
        begin = cache.get_seq_length()
        place = places[..., begin : begin + inputs.shape[1]]
        words = next_words(model, _decode(model, inputs, place, cache)[:, -1])
        said.append(words if rewrite is None else rewrite(index, words))
        inputs = model.get_input_embeddings()(token_ids([[word] for word in said[-1]]))
    return [list(row) for row in zip(*said, strict=True)]


def next_words(model: Qwen2_5_VLForConditionalGeneration, states: Tensor) -> list[str]:
    """The greedy next word after each hidden state."""
    return [WORDS[i] for i in model.lm_head(states).argmax(-1).tolist()]
