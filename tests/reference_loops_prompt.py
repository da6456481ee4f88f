"""Latent decoding of Coconut, SIM-CoT, CODI, Soft Thinking and DMLR in plain torch: the judge.

One example at a time, no cache: every step reads the whole sequence anew. Written from
reference/latent_models.md and the public sources it cites, whose variable names are kept; nothing
here is shared with the library. File and line of each transition stand beside it.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

Vector = torch.Tensor
Processor = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


@dataclass
class Trace:
    """All ids, prompt included, and what was fed at which of their places."""

    ids: list[int]
    fed: dict[int, Vector] = field(default_factory=dict)

    @property
    def latents(self) -> Vector:
        """The latents in order, (step, d_model)."""
        return torch.stack([self.fed[place] for place in sorted(self.fed)])


@dataclass
class Machine:
    """A model, the inputs of one unpadded example, and what changes its scores, if anything."""

    model: PreTrainedModel
    inputs: Mapping[str, torch.Tensor]
    max_new: int
    eos: int
    processor: Processor = lambda ids, scores: scores

    def begin(self) -> Trace:
        return Trace(self.inputs["input_ids"][0].tolist())

    def read(self, trace: Trace, upto: int | None = None) -> tuple[Vector, Vector]:
        """The last hidden state behind the final norm, and its logits, over the ids so far."""
        ids = torch.tensor([trace.ids[:upto]])
        whole: dict[str, Any] = {k: v for k, v in self.inputs.items() if k != "labels"}
        whole |= {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        types = whole.get("mm_token_type_ids")
        if types is not None:
            new = types.new_zeros(1, max(ids.shape[1] - types.shape[1], 0))
            whole["mm_token_type_ids"] = torch.cat([types, new], 1)[:, : ids.shape[1]]
            names = ("input_ids", "attention_mask", "mm_token_type_ids", "image_grid_thw")
            rope = self.model.model.get_rope_index(**{n: whole[n] for n in names})
            whole["position_ids"] = rope[0]
        else:
            whole["position_ids"] = torch.arange(ids.shape[1])[None]

        def lay(module: nn.Module, args: Any, out: torch.Tensor) -> torch.Tensor:
            if out.shape[1] != ids.shape[1]:
                return out
            out = out.clone()
            for place, z in trace.fed.items():
                if place < ids.shape[1]:
                    out[0, place] = z
            return out

        handle = self.model.get_input_embeddings().register_forward_hook(lay)
        try:
            with torch.no_grad():
                out = self.model(**whole, use_cache=False, output_hidden_states=True)
        finally:
            handle.remove()
        return out.hidden_states[-1][0, -1], out.logits[0, -1]

    def choose(self, trace: Trace, logits: Vector) -> int:
        """The greedy token."""
        scores = self.processor(torch.tensor([trace.ids]), logits[None].float())
        return int(scores.argmax())

    def write_on(self, trace: Trace) -> Trace:
        """Greedy decoding up to the limit or the end of the text."""
        width = self.inputs["input_ids"].shape[1]
        while len(trace.ids) - width < self.max_new:
            token = self.choose(trace, self.read(trace)[1])
            trace.ids.append(token)
            if token == self.eos:
                break
        return trace


def coconut(m: Machine, *, latent_token_id: int) -> Trace:
    """Coconut (coconut.py:96-156) and SIM-CoT, whose loop is the same: one pass for each
    placeholder in order, the input at p becomes hidden_states[-1] at p - 1; then the rest of the
    prompt and greedy decoding of what follows."""
    trace = m.begin()
    latent_list = [place for place, token in enumerate(trace.ids) if token == latent_token_id]
    for place in latent_list:
        hidden, _ = m.read(trace, place)
        trace.fed[place] = hidden
    return m.write_on(trace)


def codi(
    m: Machine, *, bot: int, eot: int, pad: int, n: int, prj: Callable[[Vector], Vector]
) -> Trace:
    """CODI (test.py:213-245): `bot` behind the question, prj of its state is the first latent; n
    forwards, of which the last one's latent is discarded; then the embedding of `eot`."""
    trace = m.begin()
    trace.ids.append(bot)
    latent_embd = prj(m.read(trace)[0])
    for _ in range(n):
        trace.fed[len(trace.ids)] = latent_embd
        trace.ids.append(pad)  # no id is read here
        latent_embd = prj(m.read(trace)[0])
    trace.ids.append(eot)
    return m.write_on(trace)


def soft_thinking(
    m: Machine,
    *,
    think_end: int,
    embedding: torch.Tensor,
    max_topk: int = 10,
    entropy_threshold: float = 0.01,
    length_threshold: int = 256,
    temperature: float = 1.0,
) -> Trace:
    """Soft Thinking: sum of p_i E[i] over the renormalised top k (vocab_parallel_embedding.py:494-
    512), on from step 0, until the likeliest token is `</think>` or the entropy stayed low for so
    many steps, when that token takes its place (schedule_batch.py:726-760). The token that is
    written meanwhile is the likeliest."""
    trace, width = m.begin(), m.inputs["input_ids"].shape[1]
    soft_thinking_mode, low_entropy_steps = True, 0
    while len(trace.ids) - width < m.max_new:
        _, logits = m.read(trace)
        probs = (logits / temperature).softmax(-1)
        entropy = -(probs * probs.clamp(min=1e-12).log()).sum()
        mixed = m.processor(torch.tensor([trace.ids]), logits[None] / temperature)[0].softmax(-1)
        order = mixed.argsort(descending=True)[:max_topk]
        weights = mixed[order] / mixed[order].sum()
        token = int(order[0])
        if soft_thinking_mode:
            low_entropy_steps = low_entropy_steps + 1 if entropy < entropy_threshold else 0
            if low_entropy_steps >= length_threshold:
                token = think_end
            if token == think_end:
                soft_thinking_mode = False
        trace.ids.append(token)
        if token == m.eos:
            break
        if soft_thinking_mode:
            trace.fed[len(trace.ids) - 1] = weights @ embedding[order]
    return trace


def dmlr(m: Machine, *, placeholder: int, vectors: Sequence[Vector]) -> Trace:
    """DMLR (DMLR/inference.py:490-740, 790): given vectors stand at the placeholders of the prompt,
    and plain greedy decoding follows."""
    trace = m.begin()
    places = [place for place, token in enumerate(trace.ids) if token == placeholder]
    trace.fed = dict(zip(places, vectors, strict=True))
    return m.write_on(trace)
