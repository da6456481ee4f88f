"""Latent decoding of each released family, in plain torch: the judge of the engine's loop.

One example at a time, no cache: every step reads the whole sequence anew. Written from
reference/latent_models.md and the public sources it cites, whose variable names are kept; nothing
here is shared with the library. File and line of each transition stand beside it.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import tiny
import torch
from torch import nn
from transformers import LogitsProcessor, PreTrainedModel

Vector = torch.Tensor


@dataclass
class Tokens:
    """The ids of a family's span tokens."""

    open: int
    close: int
    pad: int
    eos: int


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
    """A model, the prompt of one example, and how a token is chosen from logits."""

    model: PreTrainedModel
    inputs: dict[str, torch.Tensor]
    processor: LogitsProcessor
    tokens: Tokens
    max_new: int

    def read(self, trace: Trace) -> Vector:
        """The last hidden state behind the final norm, over the prompt and all that was written."""
        whole = {k: v for k, v in self.inputs.items() if k != "labels"}
        new = torch.tensor([trace.written], dtype=torch.long)
        whole["input_ids"] = torch.cat([self.inputs["input_ids"], new], 1)
        whole["attention_mask"] = torch.ones_like(whole["input_ids"])
        types = self.inputs["mm_token_type_ids"]
        whole["mm_token_type_ids"] = torch.cat([types, torch.zeros_like(new).to(types)], 1)
        positions = tiny.positions(self.model, whole)
        width = self.inputs["input_ids"].shape[1]

        def lay(module: nn.Module, args: Any, out: torch.Tensor) -> torch.Tensor:
            out = out.clone()
            for place, z in trace.fed.items():
                out[0, width + place] = z
            return out

        handle = self.model.get_input_embeddings().register_forward_hook(lay)
        try:
            with torch.no_grad():
                base = self.model.model(**whole, position_ids=positions, use_cache=False)
        finally:
            handle.remove()
        return base.last_hidden_state[0, -1]

    def choose(self, trace: Trace, hidden: Vector) -> int:
        """The greedy token, from what the output head makes of a hidden state."""
        new = torch.tensor([trace.written], dtype=torch.long)
        ids = torch.cat([self.inputs["input_ids"], new], 1)
        with torch.no_grad():
            logits = self.model.lm_head(hidden)[None].float()
        return int(self.processor(ids, logits).argmax())


Loop = Callable[[Machine], Trace]


def capimagine(m: Machine, *, max_latent_len: int) -> Trace:
    """The loop the CapImagine paper ran for Monet and Mirage (Michael4933/CapImagine README, "Code
    Implementation"): Mirage's loop with its second span cured, the open token consumed first."""
    t, trace = m.tokens, Trace()
    in_latent_mode = latent_start = latent_end = False
    latent_num = 0
    while len(trace.written) < m.max_new:
        if in_latent_mode and latent_start:  # the open token's own embedding is read
            latent_start = False
        hidden = m.read(trace)
        token = m.choose(trace, hidden)
        if token == t.open:
            in_latent_mode, latent_start, latent_end = True, True, False
        elif token == t.close:
            latent_num, latent_end, in_latent_mode = 0, True, False
        elif in_latent_mode:
            token = t.pad
        if in_latent_mode and not latent_end and not latent_start:
            latent_num += 1
            if latent_num > max_latent_len:
                latent_end, in_latent_mode, latent_start = True, False, False
                token, latent_num = t.close, 0
        trace.written.append(token)
        if token == t.eos:
            break
        if in_latent_mode and not latent_start:  # inputs_embeds = outputs.hidden_states
            trace.fed[len(trace.written) - 1] = hidden
    return trace


def mirage_release(m: Machine, *, max_latent_len: int) -> Trace:
    """Mirage as released (transformers/generation/utils.py:3286-3450, batch of one): `latent_end`
    is never set back and the end counter must equal the batch size, so that a second span, after a
    first one that was closed, neither counts its latents nor ends."""
    t, trace = m.tokens, Trace()
    in_latent_mode = latent_start = latent_end = False
    latent_num = latent_end_num = 0
    while len(trace.written) < m.max_new:
        if in_latent_mode and latent_start:
            latent_start = False
        hidden = m.read(trace)
        token = m.choose(trace, hidden)
        if token == t.open:
            in_latent_mode = latent_start = True
        elif token == t.close:
            latent_end_num += 1
            if latent_end_num == 1:
                latent_end, in_latent_mode = True, False
        elif in_latent_mode:
            token = t.pad
        if in_latent_mode and not latent_end and not latent_start:
            latent_num += 1
            if latent_num > max_latent_len:
                latent_end, in_latent_mode, token = True, False, t.close
        trace.written.append(token)
        if token == t.eos:
            break
        if in_latent_mode and not latent_start:
            trace.fed[len(trace.written) - 1] = hidden
    return trace


def ilvr(m: Machine, *, latent_size: int) -> Trace:
    """ILVR, a batch of one (transformers/generation/utils.py, `_sample` :3286-3450): Mirage's loop,
    in which :3380-3404 sets everything back when a span opens and when it ends; the cap is
    `config.latent_size`. Its ids are written into the code, and are those of these strings."""
    t, trace = m.tokens, Trace()
    in_latent_mode = latent_start = False
    latent_num = 0
    while len(trace.written) < m.max_new:
        if in_latent_mode and latent_start:  # as in Mirage: the open token's embedding is read
            latent_start = False
        hidden = m.read(trace)
        token = m.choose(trace, hidden)
        if token == t.open:  # :3380-3389, also inside a span, whose count begins anew
            in_latent_mode, latent_start, latent_num = True, True, 0
        elif token == t.close:  # :3396-3404
            in_latent_mode, latent_start, latent_num = False, False, 0
        elif in_latent_mode:  # the pad takes the place of what was sampled
            token = t.pad
        if in_latent_mode and not latent_start:
            latent_num += 1
            if latent_num > latent_size:  # :3415, one more than may be fed: the close token instead
                in_latent_mode, token = False, t.close
        trace.written.append(token)
        if token == t.eos:
            break
        if in_latent_mode and not latent_start:  # inputs_embeds = outputs.hidden_states, post-norm
            trace.fed[len(trace.written) - 1] = hidden
    return trace


def skila(m: Machine, *, quota: int) -> Trace:
    """SkiLa (src/model/skila.py:122-213): a quota that counts down; it is twice
    `sketch_token_num` (:125)."""
    t, trace = m.tokens, Trace()
    in_sketch_mode, remaining = False, quota  # :122, :128-129
    while len(trace.written) < m.max_new:
        hidden = m.read(trace)
        token = m.choose(trace, hidden)
        last = trace.written[-1] if trace.written else int(m.inputs["input_ids"][0, -1])  # :194
        temp_mode = in_sketch_mode or last == t.open  # :195, :198
        just_entered = temp_mode and not in_sketch_mode  # :200
        remaining = quota if just_entered else remaining  # :202
        remaining -= int(in_sketch_mode)  # :203
        force_end = in_sketch_mode and remaining <= 0  # :205
        sketch_end = token == t.close or force_end  # :196, :206
        in_sketch_mode = temp_mode and not sketch_end  # :208
        token = t.pad if in_sketch_mode else t.close if sketch_end else token  # :212-213
        trace.written.append(token)  # :214
        if in_sketch_mode:  # monkey_patch_forward_skila.py:99-101, fed from :247
            trace.fed[len(trace.written) - 1] = hidden
        if token == t.eos:
            break
    return trace


def swimbird(m: Machine, *, max_latent_token: int) -> Trace:
    """SwimBird (src/model/swimbird.py, Qwen3-VL :117-230, Qwen2.5-VL :355-470): the open token is
    read as any other; from the next place on the last state behind the final norm (:565) stands in
    the place of the embedding (src/train/monkey_patch_forward.py:378-380), up to twice
    `max_latent_token` times or up to a sampled close token. Its authors' file is not at hand: this
    is what the report says of it, not a copy of SkiLa's loop, which it is said to equal."""
    t, trace = m.tokens, Trace()
    most = 2 * max_latent_token
    while len(trace.written) < m.max_new:
        count = 0  # latents of the span that reaches up to here
        while len(trace.written) - 1 - count in trace.fed:
            count += 1
        last = trace.written[-1] if trace.written else int(m.inputs["input_ids"][0, -1])
        inside = count > 0 or last == t.open
        hidden = m.read(trace)
        token = m.choose(trace, hidden)
        if inside and token != t.close and count < most:
            trace.written.append(t.pad)
            trace.fed[len(trace.written) - 1] = hidden
            continue
        if inside:  # closed by itself, or because the cap is met
            token = t.close
        trace.written.append(token)
        if token == t.eos:
            break
    return trace


def monet_vllm(m: Machine, *, latent_size: int) -> Trace:
    """Monet's vLLM runner (inference/vllm/monet_gpu_model_runner.py): the input row of the step
    after the open token is overwritten by the state that predicted it (:1434-1463, :1641-1667), so
    the open token's embedding is never read. The ids keep what was sampled; the close token is
    forced when the next token is sampled at full length. Its missing guard against EOS inside the
    span is not repeated here."""
    t, trace = m.tokens, Trace()
    active, current_len = False, 0
    while len(trace.written) < m.max_new:
        hidden = m.read(trace)
        token = m.choose(trace, hidden)
        pending = None
        if active:
            if current_len >= latent_size:
                token, active = t.close, False
            elif token == t.close:
                active = False
            else:
                pending, current_len = hidden, current_len + 1
        elif token == t.open:
            active, pending, current_len = True, hidden, 1
        trace.written.append(token)
        if pending is not None:
            trace.fed[len(trace.written) - 1] = pending
        elif token == t.eos:
            break
    return trace


def lvr_steps(
    m: Machine, *, lvr_steps: int, lvr_head: Callable[[Vector], Vector] | None = None
) -> Trace:
    """LVR's evaluated strategy (src/model/qwen_lvr_model.py, `_lvr_deocding_by_steps` :855,
    switches :1027-1049): a quota that only runs out; the ids keep what was sampled; nothing is
    forced; no stopping while latents are fed."""
    t, trace = m.tokens, Trace()
    lvr_mode_switch, remaining = False, lvr_steps
    while len(trace.written) < m.max_new:
        hidden = m.read(trace)
        if lvr_mode_switch and lvr_head is not None:  # :1050-1052; the head of the model reads it
            hidden = lvr_head(hidden)
        token = m.choose(trace, hidden)
        last = trace.written[-1] if trace.written else int(m.inputs["input_ids"][0, -1])
        new_mode_switch = lvr_mode_switch or last == t.open
        if new_mode_switch and not lvr_mode_switch:
            remaining = lvr_steps
        remaining -= int(lvr_mode_switch)
        lvr_mode_switch = new_mode_switch and remaining > 0
        trace.written.append(token)
        if lvr_mode_switch:  # monkey_patch_forward_lvr.py:392-403, fed from :543
            trace.fed[len(trace.written) - 1] = hidden
        elif token == t.eos:  # unfinished = mode | (unfinished & ~stopping)
            break
    return trace


def lvr_latent_end(
    m: Machine,
    *,
    lvr_latent_end_emb: Vector,
    lvr_end_threshold: float,
    lvr_max_steps: int,
    lvr_head: Callable[[Vector], Vector] | None = None,
) -> Trace:
    """LVR's learned end (src/model/qwen_lvr_model.py, `_lvr_deocding_with_latentend` :583): the
    state compared is that of the step before, which by then has been fed. (As released the method
    returns after its first token, for its return stands inside the loop; here it goes on. It also
    sets the counter back when an open token is sampled inside a span, which is left out.)"""
    t, trace = m.tokens, Trace()
    lvr_mode_switch, counter = False, 0
    last_position_hidden_state: Vector | None = None
    while len(trace.written) < m.max_new:
        hidden = m.read(trace)
        if lvr_mode_switch and lvr_head is not None:
            hidden = lvr_head(hidden)
        token = m.choose(trace, hidden)
        last = trace.written[-1] if trace.written else int(m.inputs["input_ids"][0, -1])
        lvr_end_switch = False
        if last_position_hidden_state is not None:
            distance = ((last_position_hidden_state - lvr_latent_end_emb) ** 2).mean()
            lvr_end_switch = bool(distance < lvr_end_threshold)
        counter += int(lvr_mode_switch)
        entered = last == t.open and not lvr_mode_switch
        counter = 0 if entered else counter
        mode = lvr_mode_switch or last == t.open
        lvr_mode_switch = mode and not lvr_end_switch and counter < lvr_max_steps
        last_position_hidden_state = hidden
        trace.written.append(token)
        if lvr_mode_switch:
            trace.fed[len(trace.written) - 1] = hidden
        elif token == t.eos:
            break
    return trace
