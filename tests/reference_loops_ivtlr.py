"""Latent decoding of IVT-LR in plain torch: the judge of image tokens that come again.

One example at a time, no cache: every pass reads the whole sequence anew, which grows by what is
put in. Attention is computed here from the projections, because the classes' own patterns are
rounded to float32. Written from the public source (FYYDCC/IVT-LR, qwen_vl/qwen_ivtlr.py, `forward`
and `generate`), whose variable names are kept; nothing here is shared with the library.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

Vector = torch.Tensor
Average = Callable[[torch.Tensor], torch.Tensor]


def all_layers_and_heads(attentions: torch.Tensor) -> torch.Tensor:
    """torch.cat(attentions, dim=1).mean(dim=1), of the last row: (layer, head, key) to (key)."""
    return attentions.flatten(0, 1).mean(0)


@dataclass
class Trace:
    """The sequence as it was read at last.

    Attributes:
        ids: what was put in has the placeholder's id.
        fed: latents, by their place in the grown sequence.
        again: what was put in, by place: the number of the image token, and its embedding.
    """

    ids: list[int] = field(default_factory=list)
    fed: dict[int, Vector] = field(default_factory=dict)
    again: dict[int, tuple[int, Vector]] = field(default_factory=dict)

    @property
    def latents(self) -> Vector:
        """The latents in order, (step, d_model)."""
        return torch.stack([self.fed[place] for place in sorted(self.fed)])


@dataclass
class Machine:
    """A Qwen2-VL and the prompt of one example."""

    model: PreTrainedModel
    inputs: Mapping[str, torch.Tensor]
    max_new: int
    eos: int

    @property
    def language(self) -> nn.Module:
        return self.model.model.language_model

    def embed(self) -> torch.Tensor:
        """The prompt's embeddings, those of its pictures in their places, (position, d_model)."""
        found: list[torch.Tensor] = []

        def keep(module: nn.Module, args: Any, kwargs: Any) -> None:
            found.append(kwargs["inputs_embeds"].detach())

        handle = self.language.register_forward_pre_hook(keep, with_kwargs=True)
        try:
            with torch.no_grad():
                self.model.model(**self.inputs)
        finally:
            handle.remove()
        return found[0][0]

    def read(self, inputs_embeds: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Last hidden states behind the final norm, and how the last position looks at all of them:
        (layer, head, key). Positions are an `arange` in all three axes."""
        n = len(inputs_embeds)
        positions = torch.arange(n)
        seen: list[tuple[Vector, torch.Tensor]] = []
        handles = []
        for layer in self.language.layers:

            def keep(module: nn.Module, args: Any, kwargs: Any) -> None:
                x = kwargs["hidden_states"][0]
                seen.append((module.q_proj(x[-1]), module.k_proj(x)))

            hook = layer.self_attn.register_forward_pre_hook(keep, with_kwargs=True)
            handles.append(hook)
        try:
            with torch.no_grad():
                out = self.language(
                    inputs_embeds=inputs_embeds[None],
                    position_ids=positions.expand(3, 1, n),
                    use_cache=False,
                )
                attentions = [self._pattern(query, keys, positions) for query, keys in seen]
        finally:
            for handle in handles:
                handle.remove()
        return out.last_hidden_state[0], torch.stack(attentions)

    def _pattern(self, query: Vector, keys: torch.Tensor, positions: Vector) -> torch.Tensor:
        config = self.model.config.get_text_config()
        d_head = config.hidden_size // config.num_attention_heads
        freqs = positions.float()[:, None] * self.language.rotary_emb.inv_freq.float()
        cos, sin = (f(torch.cat([freqs, freqs], -1)).to(query) for f in (torch.cos, torch.sin))

        def turned(t: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
            first, second = t.chunk(2, -1)
            return t * cos + torch.cat([-second, first], -1) * sin

        q = turned(query.reshape(-1, d_head), cos[-1:], sin[-1:])  # (head, d_head)
        k = turned(keys.reshape(len(keys), -1, d_head).transpose(0, 1), cos, sin)
        k = k.repeat_interleave(len(q) // len(k), dim=0)
        return torch.einsum("hd,hkd->hk", q * d_head**-0.5, k).softmax(-1)


def ivtlr(
    m: Machine,
    *,
    latent_token_id: int,
    num_selected_patches: int,
    average: Average = all_layers_and_heads,
    replaced: Mapping[int, Vector] | None = None,
) -> Trace:
    """Each pass reads up to the next placeholder; the image tokens of the last picture that its
    last position looks at most, and that have not come yet, are put in before the placeholder,
    whose input is the state of that position. Then greedy decoding.

    Args:
        replaced: what is fed in the place of some latents, by their number.
    """
    ids = m.inputs["input_ids"][0].tolist()
    trace, inputs_embeds = Trace(list(ids)), m.embed()
    vs = max(i for i, token in enumerate(ids) if token == m.model.config.vision_start_token_id)
    ve = max(i for i, token in enumerate(ids) if token == m.model.config.vision_end_token_id)
    image_mask = torch.zeros(len(ids), dtype=torch.bool)
    image_mask[vs + 1 : ve] = True
    latent_list = [i for i, token in enumerate(ids) if token == latent_token_id]
    end = latent_list[0] if latent_list else len(ids)
    for pass_idx in range(len(latent_list)):
        hidden_states, attentions = m.read(inputs_embeds[:end])
        scores = average(attentions).masked_fill(~image_mask[:end], -torch.inf)
        topk_rel = scores[vs + 1 : ve].topk(num_selected_patches, sorted=False)[1]
        abs_idxs = vs + 1 + topk_rel
        image_mask[abs_idxs] = False
        picked = inputs_embeds[abs_idxs]
        z = (replaced or {}).get(pass_idx, hidden_states[latent_list[pass_idx] - 1])
        inputs_embeds = inputs_embeds.clone()
        inputs_embeds[latent_list[pass_idx]] = z
        inputs_embeds = torch.cat([inputs_embeds[:end], picked, inputs_embeds[end:]])
        blank = torch.zeros(num_selected_patches, dtype=torch.bool)
        image_mask = torch.cat([image_mask[:end], blank, image_mask[end:]])
        trace.ids[end:end] = [latent_token_id] * num_selected_patches
        for place, (index, embedding) in enumerate(zip(abs_idxs.tolist(), picked, strict=True)):
            trace.again[end + place] = (index - vs - 1, embedding)
        trace.fed[end + num_selected_patches] = z
        latent_list = [p + num_selected_patches if p > end else p for p in latent_list]
        end = end + 1 + num_selected_patches
    width = len(trace.ids)
    while len(trace.ids) - width < m.max_new:
        hidden_states, _ = m.read(inputs_embeds)
        with torch.no_grad():
            token = int(m.model.lm_head(hidden_states[-1]).float().argmax())
            embedding = m.model.get_input_embeddings()(torch.tensor([token]))
        trace.ids.append(token)
        inputs_embeds = torch.cat([inputs_embeds, embedding])
        if token == m.eos:
            break
    return trace
