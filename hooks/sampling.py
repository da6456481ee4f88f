"""Choosing the next token from scores, as `generate` was asked to."""

from typing import Any

import torch


class Sampler:
    """Greedy, or multinomial from a private generator, as `generation_config` says.

    Attributes:
        pad: what a row writes that has stopped.
        ends: the tokens that end a text.
        temperature: what logits are divided by before tokens are drawn; 1 where none are.
    """

    def __init__(self, config: Any, seed: int | None, device: torch.device) -> None:
        self.do_sample = bool(config.do_sample)
        pad = config._pad_token_tensor
        self.pad = torch.tensor(0, device=device) if pad is None else pad.to(device)
        ends = config._eos_token_tensor
        self.ends = frozenset([] if ends is None else ends.flatten().tolist())
        self.temperature = float((self.do_sample and config.temperature) or 1.0)
        self.generator = torch.Generator(device).manual_seed(0 if seed is None else seed)

    def __call__(self, scores: torch.Tensor) -> torch.Tensor:
        if not self.do_sample:
            return scores.argmax(dim=-1)
        probabilities = torch.softmax(scores, dim=-1)
        return torch.multinomial(probabilities, 1, generator=self.generator)[:, 0]
