"""Classes that nobody has seen: usual ones work at once, odd ones after one call."""

import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from torch import nn
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, LlamaModel
from transformers.models.llama.modeling_llama import LlamaAttention, LlamaMLP, LlamaRMSNorm

import imaginelens as il
from imaginelens.hooks import registering
from imaginelens.hooks.registering import register_structure

IDS = {"input_ids": torch.arange(10, 19)[None]}
SPEC = il.LatentSpec(name="odd", open=60, close=61, pad=62, max_steps=3)
SIZES = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "initializer_range": 0.3,
}
ODD = {
    "blocks": "model.trunk.cells",
    "decoder": "model",
    "final_norm": "model.last",
    "attention": "look",
    "attn_out": "look",
    "mid": "second",
    "mlp": "think",
    "mlp_out": "think",
    "q": "look.q_proj",
    "o": "look.o_proj",
}


class OddConfig(LlamaConfig):
    model_type = "odd_words"


class OddBlock(nn.Module):
    """A Llama block in which nothing has its usual name."""

    def __init__(self, config: OddConfig, layer: int) -> None:
        super().__init__()
        self.look, self.think = LlamaAttention(config, layer), LlamaMLP(config)
        self.first = LlamaRMSNorm(config.hidden_size)
        self.second = LlamaRMSNorm(config.hidden_size)

    def forward(self, hidden_states: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        seen, _ = self.look(hidden_states=self.first(hidden_states), **kwargs)
        hidden_states = hidden_states + seen
        return hidden_states + self.think(self.second(hidden_states))


class OddModel(LlamaModel):
    def __init__(self, config: OddConfig) -> None:
        super().__init__(config)
        del self._modules["layers"], self._modules["norm"]
        self.trunk = nn.Module()
        blocks = [OddBlock(config, i) for i in range(config.num_hidden_layers)]
        self.trunk.cells = nn.ModuleList(blocks)
        self.last = LlamaRMSNorm(config.hidden_size)

    @property
    def layers(self) -> nn.ModuleList:
        return self.trunk.cells

    @property
    def norm(self) -> nn.Module:
        return self.last


class OddForWords(LlamaForCausalLM):
    config_class = OddConfig

    def __init__(self, config: OddConfig) -> None:
        super().__init__(LlamaConfig(**SIZES))
        self.config = config
        self.model = OddModel(config)


def odd() -> OddForWords:
    torch.manual_seed(0)
    return ready(OddForWords(OddConfig(**SIZES)))


def ready(model: Any) -> Any:
    model.generation_config = GenerationConfig(do_sample=False, pad_token_id=0, eos_token_id=2)
    return model.to(torch.float64).eval()


def usual(model: OddForWords) -> LlamaForCausalLM:
    """The same weights in the class whose names are usual."""
    names = {
        "model.trunk.cells": "model.layers",
        "model.last": "model.norm",
        ".look.": ".self_attn.",
        ".think.": ".mlp.",
        ".first.": ".input_layernorm.",
        ".second.": ".post_attention_layernorm.",
    }
    weights = {}
    for name, value in model.state_dict().items():
        for old, new in names.items():
            name = name.replace(old, new)
        weights[name] = value
    plain = ready(LlamaForCausalLM(LlamaConfig(**SIZES)))
    plain.load_state_dict(weights)
    return plain


@pytest.fixture(autouse=True)
def unregistered() -> Iterator[None]:
    yield
    registering._REGISTERED.clear()


def test_an_odd_class_is_refused_with_the_call_that_helps() -> None:
    said = r"OddForWords has no list of 3 decoder blocks.*register_structure\('odd_words', blocks="
    with pytest.raises(il.SiteUnavailable, match=said):
        il.LatentModel(odd(), spec=SPEC)


def test_after_one_call_it_does_what_the_usual_class_does() -> None:
    register_structure("odd_words", **ODD)
    model = odd()
    strange, plain = (il.LatentModel(m, spec=SPEC) for m in (model, usual(model)))
    runs = [lens.run(IDS, max_new_tokens=7, latents=il.Force(2, at=1)) for lens in (strange, plain)]
    assert torch.equal(runs[0].sequences, runs[1].sequences)
    assert runs[0].latents.shape[1] == 2
    assert torch.equal(runs[0].latents, runs[1].latents)
    sites = ["hook_resid_pre", "hook_attn_out", "hook_resid_mid", "hook_mlp_out",
             "hook_resid_post", "attn.hook_pattern", "attn.hook_z", "attn.hook_q"]  # fmt: skip
    for site in (f"blocks.{i}.{s}" for i in range(3) for s in sites):
        hooks = [(site, halved)]
        with torch.no_grad():
            one, two = (lens.run_with_hooks(IDS, fwd_hooks=hooks) for lens in (strange, plain))
            assert torch.equal(one, two), site
            assert not torch.equal(one, plain.run_with_hooks(IDS)), site


def halved(act: torch.Tensor, hook: Any) -> torch.Tensor:
    return torch.cat([act[:, :-1], act[:, -1:] * 0.5], dim=1)


def test_parts_that_nobody_named_are_missing_with_the_call_that_adds_them() -> None:
    register_structure("odd_words", blocks="model.trunk.cells", final_norm="model.last")
    lens = il.LatentModel(odd(), spec=SPEC)
    said = (
        r"OddBlock holds look, think, first, second, none of which is known to be its MLP; if one "
        r"is, il\.register_structure\('odd_words', mlp_out=\.\.\.\)"
    )
    with pytest.raises(il.SiteUnavailable, match=said):
        lens.registry["blocks.0.hook_mlp_out"]
    assert "blocks.0.hook_resid_post" in lens.registry


@pytest.mark.parametrize(
    ("paths", "said"),
    [
        ({"blocks": "model.trunk.rooms"}, r"has no 'rooms' there, only cells"),
        ({"blocks": "model.last"}, r"is a LlamaRMSNorm; name the ModuleList"),
        ({**ODD, "mid": "third"}, r"no block of OddForWords has that; a block holds look, think"),
        ({"final_norm": "last"}, r"OddForWords has no 'last' there, only model, lm_head"),
    ],
)
def test_a_path_that_is_not_there_is_an_error_at_wrapping(paths: Any, said: str) -> None:
    register_structure("odd_words", **paths)
    with pytest.raises(il.SiteUnavailable, match=said):
        il.LatentModel(odd(), spec=SPEC)


@pytest.mark.parametrize(
    ("model_type", "paths", "said"),
    [
        ("", {"head": "out"}, r"a model type is a name, not ''"),
        ("odd", {}, r"register_structure\('odd'\) names no part; name at least one of decoder"),
        ("odd", {"heart": "a.b"}, r"'heart' is no part that register_structure knows"),
        ("odd", {"head": "a..b"}, r"head='a..b' is no path"),
        ("odd", {"head": ""}, r"head='' is no path"),
    ],
)
def test_a_call_that_says_nothing_is_an_error(model_type: str, paths: Any, said: str) -> None:
    with pytest.raises(il.InputError, match=said):
        register_structure(model_type, **paths)


def test_a_second_call_replaces_the_first() -> None:
    register_structure("odd_words", final_norm="wrong")
    register_structure("odd_words", **ODD)
    il.LatentModel(odd(), spec=SPEC)


# ---- classes that need no call ---------------------------------------------------------------


def test_a_subclass_of_a_supported_class_works_as_it_is() -> None:
    model, processor = tiny.fresh("llava")
    sub = type("Mine", (type(model),), {})
    given = {"images": tiny.image(24, 24, seed=0), "text": tiny.prompt("llava", "what?")}
    spec = il.LatentSpec(
        name="sub", open="<|latent_start|>", close="<|latent_end|>", pad="<|latent_pad|>",
        max_steps=2,
    )  # fmt: skip
    runs = []
    for cls in (type(model), sub):
        model.__class__ = cls
        lens = il.LatentModel(model, processor, spec=spec)
        runs.append(lens.run(given, max_new_tokens=5, latents=il.Force(2, at=1)))
    assert torch.equal(runs[0].sequences, runs[1].sequences)
    assert torch.equal(runs[0].latents, runs[1].latents)
    assert runs[1].latents.shape[1] == 2


CODE = """
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, LlamaModel
from transformers.models.llama.modeling_llama import LlamaAttention, LlamaMLP, LlamaRMSNorm

class TheirConfig(LlamaConfig):
    model_type = "their_words"

class TheirBlock(nn.Module):
    def __init__(self, config, layer):
        super().__init__()
        self.input_layernorm = LlamaRMSNorm(config.hidden_size)
        self.self_attn = LlamaAttention(config, layer)
        self.post_attention_layernorm = LlamaRMSNorm(config.hidden_size)
        self.mlp = LlamaMLP(config)

    def forward(self, hidden_states, **kwargs):
        seen, _ = self.self_attn(hidden_states=self.input_layernorm(hidden_states), **kwargs)
        hidden_states = hidden_states + seen
        return hidden_states + self.mlp(self.post_attention_layernorm(hidden_states))

class TheirModel(LlamaModel):
    def __init__(self, config):
        super().__init__(config)
        self.layers = nn.ModuleList(TheirBlock(config, i) for i in range(config.num_hidden_layers))

class TheirForCausalLM(LlamaForCausalLM):
    config_class = TheirConfig

    def __init__(self, config):
        super().__init__(config)
        self.model = TheirModel(config)
"""


def test_a_class_of_a_users_file_works_as_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As the code of a checkpoint would be: own classes, own type, usual names."""
    file = tmp_path / "modeling_theirs.py"
    file.write_text(CODE)
    found = importlib.util.spec_from_file_location("modeling_theirs", file)
    assert found is not None
    assert found.loader is not None
    module = importlib.util.module_from_spec(found)
    monkeypatch.setitem(sys.modules, "modeling_theirs", module)
    found.loader.exec_module(module)
    torch.manual_seed(0)
    theirs = ready(module.TheirForCausalLM(module.TheirConfig(**SIZES)))
    plain = ready(LlamaForCausalLM(LlamaConfig(**SIZES)))
    plain.load_state_dict(theirs.state_dict())
    lenses = [il.LatentModel(m, spec=SPEC) for m in (theirs, plain)]
    assert set(lenses[0].registry) == set(lenses[1].registry)
    one, two = (lens.run(IDS, max_new_tokens=6, latents=il.Force(2, at=1)) for lens in lenses)
    assert torch.equal(one.sequences, two.sequences)
    assert torch.equal(one.latents, two.latents)
