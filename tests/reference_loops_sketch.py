"""Latent decoding of Latent Sketchpad in plain torch: the judge of a head that has a state.

One example at a time, no cache: every step reads the whole sequence anew, and the head reads all
places that the release gives it, those it masks included. Written from the public source
(hwanyu112/Latent-Sketchpad, model/uni_qwen.py and model/perceiver.py), whose variable names are
kept; nothing here is shared with the library.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from transformers import PreTrainedModel

Vector = torch.Tensor
Weights = Mapping[str, torch.Tensor]
Head = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


@dataclass
class Trace:
    """What was written behind the prompt, and what was fed at which of those places."""

    written: list[int] = field(default_factory=list)
    fed: dict[int, Vector] = field(default_factory=dict)

    @property
    def latents(self) -> Vector:
        """The latents in order, (step, d_model)."""
        return torch.stack([self.fed[place] for place in sorted(self.fed)])


@dataclass
class Machine:
    """A Qwen2.5-VL, the prompt of one example, and how a token is chosen from logits."""

    model: PreTrainedModel
    inputs: Mapping[str, torch.Tensor]
    processor: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
    max_new: int
    eos: int
    boi: int
    eoi: int
    image_seq_len: int

    def pictures(self) -> torch.Tensor:
        """The embeddings of the prompt's image tokens, in order."""
        found: list[torch.Tensor] = []

        def keep(module: nn.Module, args: Any, kwargs: Any) -> None:
            found.append(kwargs["inputs_embeds"].detach())

        language = self.model.model.language_model
        handle = language.register_forward_pre_hook(keep, with_kwargs=True)
        try:
            with torch.no_grad():
                self.model.model(**self.inputs, position_ids=self.positions(Trace()))
        finally:
            handle.remove()
        return found[0][0, self.inputs["input_ids"][0] == self.model.config.image_token_id]

    def positions(self, trace: Trace) -> torch.Tensor:
        """`get_rope_index` of the sequence with its last image made whole, as at its open token
        (:605-607), up to where it has been written."""
        width = self.inputs["input_ids"].shape[1]
        ids = self.inputs["input_ids"][0].tolist() + trace.written
        types = self.inputs["mm_token_type_ids"][0].tolist()
        types += [int(place in trace.fed) for place in range(len(trace.written))]
        n = len(trace.fed)
        if n % self.image_seq_len:
            rest = self.image_seq_len - n % self.image_seq_len
            ids, types = ids + [0] * rest, types + [1] * rest
        grid = self.inputs["image_grid_thw"]
        more = grid[-1:].repeat(-(-n // self.image_seq_len), 1)
        index, _ = self.model.model.get_rope_index(
            torch.tensor([ids]),
            mm_token_type_ids=torch.tensor([types]),
            image_grid_thw=torch.cat([grid, more]),
            attention_mask=torch.ones(1, len(ids), dtype=torch.long),
        )
        return index[..., : width + len(trace.written)]

    def read(self, trace: Trace) -> Vector:
        """The last hidden state behind the final norm."""
        width = self.inputs["input_ids"].shape[1]
        new = [0 if place in trace.fed else t for place, t in enumerate(trace.written)]
        whole = {k: v for k, v in self.inputs.items() if k != "mm_token_type_ids"}
        whole["input_ids"] = torch.cat(
            [self.inputs["input_ids"], torch.tensor([new], dtype=torch.long)], 1
        )
        whole["attention_mask"] = torch.ones_like(whole["input_ids"])

        def lay(module: nn.Module, args: Any, out: torch.Tensor) -> torch.Tensor:
            out = out.clone()
            for place, z in trace.fed.items():
                out[0, width + place] = z
            return out

        handle = self.model.get_input_embeddings().register_forward_hook(lay)
        try:
            with torch.no_grad():
                base = self.model.model(
                    **whole, position_ids=self.positions(trace), use_cache=False
                )
        finally:
            handle.remove()
        return base.last_hidden_state[0, -1]

    def choose(self, trace: Trace, hidden: Vector) -> int:
        """The greedy token."""
        new = torch.tensor([trace.written], dtype=torch.long)
        ids = torch.cat([self.inputs["input_ids"], new], 1)
        with torch.no_grad():
            logits = self.model.lm_head(hidden)[None].float()
        return int(self.processor(ids, logits).argmax())


def sketchpad(
    m: Machine, *, action_id: int, head: Head, replaced: Mapping[int, Vector] | None = None
) -> Trace:
    """The `_sample` of model/uni_qwen.py with GENERATION_TYPE=multimodal: `in_action` counts from
    the action token, and at 4 the token is the open one; inside an image nothing that is sampled
    counts, and the head reads all image embeddings and all hidden states of the image.

    Args:
        replaced: what is fed in the place of some latents, by their number.
    """
    trace = Trace()
    in_image, in_action = False, 0
    pictures = m.pictures()
    image_hidden_states: list[Vector] = []
    prefix = pictures
    while len(trace.written) < m.max_new:
        hidden = m.read(trace)
        next_token = m.choose(trace, hidden)
        if in_action > 0:
            in_action += 1
        if in_action == 4:
            next_token, in_action = m.boi, 0
        drawn = None
        if in_image:
            fin_image = len(image_hidden_states) == m.image_seq_len
            if fin_image:
                next_token, in_image = m.eoi, False
            else:
                next_token = m.model.config.image_token_id
                image_hidden_states.append(hidden)
                parts = head(prefix, torch.stack(image_hidden_states))
                drawn = m.model.model.visual.merger(parts)[0].detach()
                drawn = (replaced or {}).get(len(trace.fed), drawn)
        if next_token == m.boi:
            in_image, image_hidden_states = True, []
            prefix = torch.cat([pictures, trace.latents]) if trace.fed else pictures
        in_action += int(next_token == action_id)
        trace.written.append(next_token)
        if drawn is not None:
            trace.fed[len(trace.written) - 1] = drawn
        elif next_token == m.eos:
            break
    trace.fed.pop(m.max_new - 1, None)  # the length ended it before this one was read
    return trace


# ---- the head ------------------------------------------------------------------------------------


def regression_head(
    weights: Weights,
    *,
    heads: int,
    max_prefix_len: int,
    image_seq_len: int,
    forgets: bool = False,
) -> Head:
    """`perceiver_inference` and `RegressionHeadPerceiver`: a prefix of fixed length, filled from
    its end and masked elsewhere, then the states of one image, of which the later ones are noise.

    Args:
        forgets: a head that sees the newest state only, which is wrong.
    """
    w = {name.removeprefix("regression_head."): value for name, value in weights.items()}
    width = w["perceiver.pos_emb.weight"].shape[1]

    def mlp(x: torch.Tensor) -> torch.Tensor:
        x = F.gelu(F.linear(x, w["mlp.0.weight"], w["mlp.0.bias"]))
        return F.linear(x, w["mlp.2.weight"], w["mlp.2.bias"])

    def norm(x: torch.Tensor, name: str) -> torch.Tensor:
        return F.layer_norm(x, (width,), w[f"{name}.weight"], w[f"{name}.bias"])

    def feed(x: torch.Tensor, name: str) -> torch.Tensor:
        inner = F.gelu(norm(x, f"{name}.0") @ w[f"{name}.1.weight"].T)
        return inner @ w[f"{name}.4.weight"].T

    def turned(t: torch.Tensor, pos: torch.Tensor) -> torch.Tensor:
        pos = pos[-t.shape[-2] :]
        n = pos.shape[-1]
        first, second = t[..., : n // 2], t[..., n // 2 : n]
        swapped = torch.cat([-second, first], -1)
        return torch.cat([t[..., :n] * pos.cos() + swapped * pos.sin(), t[..., n:]], -1)

    def attend(
        q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, pos: torch.Tensor, mask: torch.Tensor
    ) -> torch.Tensor:
        split = [t.reshape(len(t), heads, -1).permute(1, 0, 2) for t in (q, k, v)]
        scale = split[0].shape[-1] ** -0.5
        sim = torch.einsum("hid,hjd->hij", turned(split[0] * scale, pos), turned(split[1], pos))
        i, j = sim.shape[-2:]
        big = -torch.finfo(sim.dtype).max
        sim = sim.masked_fill(~F.pad(mask, (0, j - len(mask)), value=True), big)
        sim = sim.masked_fill(torch.ones(i, j, dtype=torch.bool).triu(j - i + 1), big)
        out = torch.einsum("hij,hjd->hid", sim.softmax(-1), split[2])
        return out.permute(1, 0, 2).reshape(i, -1)

    def perceiver(x: torch.Tensor, n_prefix: int, mask: torch.Tensor) -> torch.Tensor:
        x = x + w["perceiver.pos_emb.weight"][: len(x)]
        freqs = torch.arange(len(x)).to(x)[:, None] * w["perceiver.rotary_pos_emb.inv_freq"]
        pos = torch.cat([freqs, freqs], -1)
        prefix, x = x[:n_prefix], x[n_prefix:]
        layer = 0
        while (name := f"perceiver.perceive_layers.{layer}") + ".0.to_q.weight" in w:
            own, context = norm(x, f"{name}.0.norm"), norm(prefix, f"{name}.0.context_norm")
            k, v = (torch.cat([context, own]) @ w[f"{name}.0.to_kv.weight"].T).chunk(2, -1)
            out = attend(own @ w[f"{name}.0.to_q.weight"].T, k, v, pos, mask)
            x = F.linear(out, w[f"{name}.0.to_out.weight"], w[f"{name}.0.to_out.bias"]) + x
            x = feed(x, f"{name}.1") + x
            layer += 1
        layer, everything = 0, torch.ones(0, dtype=torch.bool)
        while (name := f"perceiver.layers.{layer}") + ".0.to_qkv.weight" in w:
            qkv = (norm(x, f"{name}.0.norm") @ w[f"{name}.0.to_qkv.weight"].T).chunk(3, -1)
            x = attend(*qkv, pos, everything) @ w[f"{name}.0.to_out.weight"].T + x
            x = feed(x, f"{name}.1") + x
            layer += 1
        return x

    def head(images: torch.Tensor, states: torch.Tensor) -> torch.Tensor:
        place, noise = len(states) - 1, torch.Generator().manual_seed(11)
        hidden = torch.randn(image_seq_len, images.shape[1], generator=noise, dtype=images.dtype)
        hidden[: place + 1] = states
        if forgets:
            hidden[:place] = 0
        total = torch.arange(max_prefix_len) >= max_prefix_len - len(images)
        out = torch.randn(
            max_prefix_len + image_seq_len, len(w["mlp.2.bias"]), generator=noise,
            dtype=images.dtype,
        )  # fmt: skip
        out[:max_prefix_len][total] = mlp(images)
        out[max_prefix_len:] = mlp(hidden)
        parts = out.shape[1] // width
        made = perceiver(
            out.reshape(-1, width), max_prefix_len * parts, total.repeat_interleave(parts)
        )
        return made[place * parts : (place + 1) * parts]

    return head
