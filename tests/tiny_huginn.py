"""A tiny model of Huginn's architecture, and of its class's manners, written from its description.

It stands for recpre/raven_modeling_minimal.py of seal-rg/recurrent-pretraining, which is remote
code: names of modules, arguments and config keys are those, and so are its odd manners. It ignores
the attention mask, counts positions for the batch as a whole, prepares inputs by `cache_position`,
makes its own cache over the unrolled depth, and draws an initial state in every forward. The file
needs nothing beside torch and transformers, so that it can be a checkpoint's own code.
"""

from math import sqrt
from typing import Any, ClassVar

import torch
from torch import nn
from torch.nn import functional as F
from transformers import DynamicCache, GenerationMixin, PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast


class HuginnConfig(PreTrainedConfig):
    model_type = "huginn_raven"
    attribute_map: ClassVar[dict[str, str]] = {
        "hidden_size": "n_embd",
        "num_attention_heads": "n_heads",
        "num_hidden_layers": "n_layers",
    }

    def __init__(
        self,
        n_embd: int = 24,
        n_heads: int = 3,
        vocab_size: int = 64,
        intermediate_size: int = 32,
        n_layers_in_prelude: int = 2,
        n_layers_in_recurrent_block: int = 3,
        n_layers_in_coda: int = 2,
        mean_recurrence: int = 4,
        mean_backprop_depth: int = 2,
        block_size: int = 256,
        rope_base: float = 50_000.0,
        norm_eps: float = 1e-6,
        tie_embeddings: bool = True,
        **kwargs: Any,
    ) -> None:
        self.n_embd, self.n_heads, self.num_key_value_heads = n_embd, n_heads, n_heads
        self.n_layers = n_layers_in_prelude + n_layers_in_recurrent_block + n_layers_in_coda
        self.vocab_size, self.intermediate_size = vocab_size, intermediate_size
        self.n_layers_in_prelude, self.n_layers_in_coda = n_layers_in_prelude, n_layers_in_coda
        self.n_layers_in_recurrent_block = n_layers_in_recurrent_block
        self.mean_recurrence, self.mean_backprop_depth = mean_recurrence, mean_backprop_depth
        self.block_size, self.rope_base, self.norm_eps = block_size, rope_base, norm_eps
        self.tie_embeddings = tie_embeddings
        self.init_values = {"std": sqrt(2 / (5 * n_embd)), "embed_scale": sqrt(n_embd)}
        super().__init__(**{**kwargs, "tie_word_embeddings": tie_embeddings})


class Norm(nn.Module):
    def __init__(self, config: HuginnConfig) -> None:
        super().__init__()
        self.eps, self.weight = config.norm_eps, nn.Parameter(torch.ones(config.n_embd))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.weight * x / (x.square().mean(-1, keepdim=True) + self.eps).sqrt()


class DepthCache(DynamicCache):
    """Keys and values by the number of the block as it is run, not as it is stored."""

    def __init__(self) -> None:
        super().__init__()
        self.held: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def append(self, number: int, *new: torch.Tensor) -> tuple[torch.Tensor, ...]:
        old = self.held.get(number)
        joined = new if old is None else tuple(map(lambda *p: torch.cat(p, -2), old, new))
        self.held[number] = joined
        return joined

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.held[0][0].shape[-2] if self.held else 0


class Attention(nn.Module):
    def __init__(self, config: HuginnConfig) -> None:
        super().__init__()
        d, self.n_heads = config.n_embd, config.n_heads
        self.Wqkv, self.proj = nn.Linear(d, 3 * d, bias=False), nn.Linear(d, d, bias=False)
        self.qk_bias = nn.Parameter(torch.zeros(2, 1, self.n_heads, d // self.n_heads))

    def forward(self, x: torch.Tensor, turn: torch.Tensor, number: int, cache: Any) -> torch.Tensor:
        q, k, v = self.Wqkv(x).unflatten(-1, (3, self.n_heads, -1)).unbind(-3)
        q, k = turned(q + self.qk_bias[0], turn), turned(k + self.qk_bias[1], turn)
        q, k, v = (part.transpose(1, 2) for part in (q, k, v))
        if cache is not None:
            k, v = cache.append(number, k, v)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=q.shape[2] == k.shape[2])
        return self.proj(mixed.transpose(1, 2).flatten(2))


def turned(x: torch.Tensor, turn: torch.Tensor) -> torch.Tensor:
    """Rotary positions: neighbouring features are one complex number each."""
    return torch.view_as_real(torch.view_as_complex(x.unflatten(-1, (-1, 2))) * turn).flatten(-2)


class GatedMLP(nn.Module):
    def __init__(self, config: HuginnConfig) -> None:
        super().__init__()
        self.fc = nn.Linear(config.n_embd, 2 * config.intermediate_size, bias=False)
        self.proj = nn.Linear(config.intermediate_size, config.n_embd, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        gate, up = self.fc(x).chunk(2, -1)
        return self.proj(F.silu(gate) * up)


class SandwichBlock(nn.Module):
    def __init__(self, config: HuginnConfig) -> None:
        super().__init__()
        self.norm_1, self.attn, self.norm_2 = Norm(config), Attention(config), Norm(config)
        self.norm_3, self.mlp, self.norm_4 = Norm(config), GatedMLP(config), Norm(config)

    def forward(self, x: torch.Tensor, turn: torch.Tensor, number: int, cache: Any) -> torch.Tensor:
        x = self.norm_2(x + self.attn(self.norm_1(x), turn, number, cache))
        return self.norm_4(x + self.mlp(self.norm_3(x)))


class HuginnForCausalLM(PreTrainedModel, GenerationMixin):
    config_class = HuginnConfig
    _tied_weights_keys: ClassVar[dict[str, str]] = {"lm_head.weight": "transformer.wte.weight"}

    def __init__(self, config: HuginnConfig) -> None:
        super().__init__(config)

        def blocks(n: int) -> nn.ModuleList:
            return nn.ModuleList(SandwichBlock(config) for _ in range(n))

        self.transformer = nn.ModuleDict(
            {
                "wte": nn.Embedding(config.vocab_size, config.n_embd),
                "prelude": blocks(config.n_layers_in_prelude),
                "adapter": nn.Linear(2 * config.n_embd, config.n_embd, bias=False),
                "core_block": blocks(config.n_layers_in_recurrent_block),
                "coda": blocks(config.n_layers_in_coda),
                "ln_f": Norm(config),
            }
        )
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        self.scale = config.init_values["embed_scale"]
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        pass

    def get_input_embeddings(self) -> nn.Module:
        return self.transformer["wte"]

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head

    def initialize_state(self, like: torch.Tensor) -> torch.Tensor:
        std = self.config.init_values["std"]
        x = torch.empty_like(like)
        return nn.init.trunc_normal_(x, std=std, a=-3 * std, b=3 * std) * self.scale

    def _n_steps(self) -> tuple[int, int]:
        if not self.training:
            return self.config.mean_recurrence, 0
        drawn = int(torch.poisson(torch.tensor(float(self.config.mean_recurrence)))) + 1
        return drawn, self.config.mean_backprop_depth

    def forward(
        self,
        input_ids: torch.Tensor,
        input_embeds: torch.Tensor | None = None,
        input_states: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        num_steps: Any = None,
        past_key_values: Any = None,
        use_cache: bool = False,
        cache_position: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        places = torch.arange(input_ids.shape[1]) if cache_position is None else cache_position
        if position_ids is not None:
            places = position_ids.squeeze()
        d_head = self.config.n_embd // self.config.n_heads
        rate = self.config.rope_base ** -(torch.arange(0, d_head, 2, dtype=torch.float64) / d_head)
        angles = torch.arange(self.config.block_size)[:, None] * rate
        turn = torch.polar(torch.ones_like(angles), angles).index_select(0, places)[:, None]
        turn = turn.to(torch.complex128 if self.dtype == torch.float64 else torch.complex64)

        cache = DepthCache() if use_cache and past_key_values is None else past_key_values
        e = self.transformer["wte"](input_ids) if input_embeds is None else input_embeds
        e, number = e * self.scale, 0
        for block in self.transformer["prelude"]:
            e, number = block(e, turn, number, cache), number + 1
        x = self.initialize_state(e) if input_states is None else input_states.clone()
        several = hasattr(num_steps, "__len__") and len(num_steps) > 1
        blind, seeing = num_steps if several else (num_steps, 0)
        blind, seeing = self._n_steps() if num_steps is None else (blind, seeing)
        for r in range(blind + seeing):
            with torch.set_grad_enabled(torch.is_grad_enabled() and r >= blind):
                x = self.transformer["adapter"](torch.cat([x, e], -1))
                for block in self.transformer["core_block"]:
                    x, number = block(x, turn, number, cache), number + 1
        x = self.transformer["ln_f"](x)
        for k, block in enumerate(self.transformer["coda"]):
            x = block(x, turn, -1 - k, cache)
        logits = self.lm_head(self.transformer["ln_f"](x))
        return CausalLMOutputWithPast(logits=logits, past_key_values=cache)

    def prepare_inputs_for_generation(
        self, input_ids: torch.Tensor, cache_position: Any = None, **kwargs: Any
    ) -> dict[str, Any]:
        """As its class does it: transformers 5 gives no `cache_position` any more."""
        return {**kwargs, "input_ids": input_ids[:, cache_position]}
