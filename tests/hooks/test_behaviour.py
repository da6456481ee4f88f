"""What a model does beyond a plain causal decoder: each fact is measured, and ignoring it shows.

A check takes the behaviour that it believes in. It holds with the behaviour that was found, and
fails with one that says otherwise.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import tiny
import torch
import walk_checks
import walk_inputs
from transformers import DynamicCache

import imaginelens as il
from imaginelens.hooks import controls
from imaginelens.hooks.behaviour import Behaviour
from imaginelens.hooks.tokens import Kind

NAMES = list(tiny.FAMILIES)
SPEC = il.LatentSpec(
    name="test", open="<|latent_start|>", close="<|latent_end|>", pad="<|latent_pad|>", max_steps=3
)
MROPE = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl")


def lens_of(name: str, spec: Any = SPEC) -> il.LatentModel:
    return il.LatentModel(*tiny.build(name), spec=spec)


def one(name: str, seed: int = 0, text: str = "what colour?") -> dict[str, Any]:
    return {"images": tiny.image(48, 32, seed=seed), "text": tiny.prompt(name, text)}


def believing(name: str, behaviour: Behaviour) -> il.LatentModel:
    lens = lens_of(name)
    lens.behaviour = behaviour
    return lens


def run_of(lens: il.LatentModel, given: Any) -> il.Run:
    return lens.run(given, latents=il.Force(3, at=1), max_new_tokens=8, keep_logits=True)


def ids_of(lens: il.LatentModel, given: Any) -> torch.Tensor:
    return lens.prompt(given).inputs["input_ids"]


# ---- the positions of a row ------------------------------------------------------------------


def check_a_prompt_has_the_positions_of_generate(name: str, behaviour: Behaviour) -> None:
    """A padded prompt that is only read gets the positions with which `generate` runs it."""
    lens = believing(name, behaviour)
    given = [one(name), one(name, 1, "and here, in this larger one?")]
    with torch.no_grad():
        logits = lens.run_with_hooks(given)
        for row, example in enumerate(given):
            inputs = dict(lens.prompt(example).inputs)
            inputs["position_ids"] = tiny.positions(lens.model, inputs)
            alone = lens.model(**inputs, use_cache=False).logits[0]
            assert (logits[row, -len(alone) :] - alone).abs().max() < 1e-9


def check_generation_is_read_as_it_was(name: str, behaviour: Behaviour) -> None:
    lens = believing(name, behaviour)
    assert controls.path_gap(lens, run_of(lens, one(name))) < 1e-9


def check_a_run_leaves_no_offset_behind(name: str, behaviour: Behaviour) -> None:
    """Positions of the last prompt are put back, so that a plain call afterwards is as before."""
    lens = believing(name, behaviour)
    modules = [m for m in lens.model.modules() if "rope_deltas" in vars(m)]
    before = [m.rope_deltas for m in modules]
    run_of(lens, one(name))
    after = [m.rope_deltas for m in modules]
    for module, kept in zip(modules, before, strict=True):
        module.rope_deltas = kept
    assert all(a is b for a, b in zip(after, before, strict=True))


# ---- who sees whom ---------------------------------------------------------------------------


def check_what_may_be_cut(name: str, behaviour: Behaviour) -> None:
    """Columns before a cut are the same whether or not those behind it are there."""
    lens = lens_of(name)
    inputs = dict(lens.prompt(one(name)).inputs)
    tokens = lens.tokens(one(name))
    inputs["position_ids"] = tiny.positions(lens.model, inputs)
    embeds: list[torch.Tensor] = []
    _, cache = lens.run_with_cache(one(name), names_filter="blocks.0.hook_resid_pre")
    embeds.append(cache["resid_pre", 0])
    types = {k: v for k, v in inputs.items() if k.endswith("token_type_ids")}
    rows = {"position_ids": inputs["position_ids"], "attention_mask": inputs["attention_mask"]}

    def read(width: int) -> torch.Tensor:
        kept = {k: v[..., :width] for k, v in {**rows, **types}.items()}
        return lens.model(inputs_embeds=embeds[0][:, :width], use_cache=False, **kept).logits[0]

    image = tokens.columns(0, Kind.IMAGE)
    with torch.no_grad():
        scale = 1.0
        whole = read(tokens.width)
        for column in (int(image[len(image) // 2]), int(image[-1]) + 1, tokens.width - 2):
            same = bool((read(column) - whole[:column]).abs().max() < 1e-8 * scale)
            assert behaviour.may_cut(tokens, column) == same


def check_deepstack_adds_between_layers(name: str, behaviour: Behaviour) -> None:
    lens, given = lens_of(name), one(name)
    _, cache = lens.run_with_cache(given, names_filter="blocks.*.hook_resid_*")
    image = torch.as_tensor(lens.tokens(given).kind == Kind.IMAGE)
    for i in range(len(lens.structure.blocks) - 1):
        post, pre = cache["resid_post", i], cache["resid_pre", i + 1]
        assert torch.equal(post[~image], pre[~image])
        assert torch.equal(post[image], pre[image]) == (i not in behaviour.deepstack)


def check_a_cache_can_be_cut_back(model: Any, ids: torch.Tensor, behaviour: Behaviour) -> None:
    """Forget the last tokens of a cache and read others there: as if they had never been."""
    other = ids.clone()
    other[:, -2:] = ids[:, :2] + 1
    with torch.no_grad():
        wanted = model(input_ids=other, use_cache=False).logits[:, -2:]
        cache = DynamicCache(config=model.config.get_text_config(decoder=True))
        model(input_ids=ids, past_key_values=cache)
        try:
            cache.crop(-2)
            found = model(input_ids=other[:, -2:], past_key_values=cache).logits
            same = bool((found - wanted).abs().max() < 1e-8)
        except (ValueError, AttributeError, RuntimeError, NotImplementedError):
            same = False
    assert same == behaviour.crops


def check_the_head_is_the_embedding(name: str, behaviour: Behaviour) -> None:
    lens = lens_of(name)
    token = lens.tokenizer.convert_tokens_to_ids("Q")
    assert moves_its_logit(lens.model, dict(lens.prompt(one(name)).inputs), token) == behaviour.tied


def moves_its_logit(model: Any, inputs: dict[str, Any], token: int) -> bool:
    """Whether another embedding of a token that is not there moves that token's logit."""
    assert not bool((inputs["input_ids"] == token).any())
    weight = model.get_input_embeddings().weight
    with torch.no_grad():
        before = model(**inputs).logits[0, -1, token].clone()
        kept = weight[token].clone()
        weight[token] += 1
        moved = bool(model(**inputs).logits[0, -1, token] != before)
        weight[token] = kept
    return moved


# ---- found as it is, on every architecture ---------------------------------------------------

POSITIONS: tuple[Callable[[str, Behaviour], None], ...] = (
    check_a_prompt_has_the_positions_of_generate, check_generation_is_read_as_it_was,
    check_a_run_leaves_no_offset_behind, check_deepstack_adds_between_layers,
    check_the_head_is_the_embedding,
)  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_a_model_behaves_as_was_found(name: str) -> None:
    behaviour = lens_of(name).behaviour
    for check in POSITIONS:
        check(name, behaviour)
    if name not in (*MROPE, "llama4"):  # those need ids to count positions from
        check_what_may_be_cut(name, behaviour)


def test_facts_of_the_tiny_models() -> None:
    found = {name: lens_of(name).behaviour for name in NAMES}
    assert {n for n in NAMES if found[n].mrope} == set(MROPE)
    assert {n for n in NAMES if found[n].remembers} == set(MROPE)
    assert {n: found[n].looks_ahead for n in NAMES if found[n].looks_ahead != "no"} == {
        "gemma3": "images", "paligemma": "prompt",
    }  # fmt: skip
    assert {n: found[n].deepstack for n in NAMES if found[n].deepstack} == {"qwen3_vl": (0, 1)}
    assert [n for n in NAMES if found[n].first_position] == ["paligemma"]
    assert [n for n in NAMES if not found[n].crops] == ["gemma3"]
    described = str(lens_of("gemma3").describe())
    assert "tokens of one image see each other" in described
    assert "behaviour" not in str(lens_of("llava").describe())


# ---- ignored, it shows -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "otherwise", "check"),
    [
        ("paligemma", {"first_position": 0}, check_a_prompt_has_the_positions_of_generate),
        ("paligemma", {"written_type": 0}, check_generation_is_read_as_it_was),
        ("qwen2_5_vl", {"mrope": False}, check_a_prompt_has_the_positions_of_generate),
        ("qwen2_5_vl", {"remembers": ()}, check_a_run_leaves_no_offset_behind),
        ("qwen3_vl", {"deepstack": ()}, check_deepstack_adds_between_layers),
        ("qwen2_vl", {"deepstack": (0,)}, check_deepstack_adds_between_layers),
        ("gemma3", {"looks_ahead": "no"}, check_what_may_be_cut),
        ("paligemma", {"looks_ahead": "no"}, check_what_may_be_cut),
        ("llava", {"looks_ahead": "images"}, check_what_may_be_cut),
        ("llava", {"tied": True}, check_the_head_is_the_embedding),
    ],
)
def test_ignored_it_shows(
    name: str, otherwise: dict[str, Any], check: Callable[[str, Behaviour], None]
) -> None:
    found = lens_of(name).behaviour
    wrong = replace(found, **otherwise)
    assert wrong != found
    check(name, found)
    with pytest.raises(AssertionError):
        check(name, wrong)


def test_token_types_are_carried_into_the_reading(monkeypatch: pytest.MonkeyPatch) -> None:
    """Gemma 3 makes its mask from them; without them its pictures are read causally."""
    from imaginelens.hooks import script

    lens = lens_of("gemma3")
    run = run_of(lens, one("gemma3"))
    assert controls.path_gap(lens, run) < 1e-9
    fields = script._row_fields

    def without(*args: Any) -> dict[str, torch.Tensor]:
        return {k: v for k, v in fields(*args).items() if k != "token_type_ids"}

    monkeypatch.setattr(script, "_row_fields", without)
    assert controls.path_gap(lens, run) > 1e-3


# ---- mixing, windows and per-layer inputs: types that the walk builds ------------------------


def test_a_tied_head_moves_with_the_embedding() -> None:
    for model_type, tied in (("gemma3", True), ("llava", False)):
        model = walk_checks.build(model_type).double()
        assert il.LatentModel(model, spec=False).behaviour.tied == tied
        assert moves_its_logit(model, walk_inputs.text_inputs(model), 70) == tied


def test_per_layer_inputs_read_the_token_that_stands_at_a_latent(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Gemma 4 looks its token ids up again in every layer: sampled ids inside a span matter."""
    from imaginelens.hooks import script

    model = walk_checks.build("gemma4").double()
    spec = replace(walk_checks.SPEC, emit="sampled")
    lens = il.LatentModel(model, spec=spec)
    assert lens.behaviour.per_layer_inputs
    assert not lens_of("gemma3").behaviour.per_layer_inputs
    run = run_of(lens, walk_inputs.text_inputs(model))
    written = run.sequences[0, run.tokens.prompt_width :]
    assert int((written == spec.pad).sum()) == 0
    assert controls.path_gap(lens, run) < 1e-9
    kept = script._overlay

    def padded(run: Any, tokens: Any, ids: torch.Tensor, *rest: Any) -> Any:
        laid, embeds = kept(run, tokens, ids, *rest)
        ids[laid] = spec.pad  # as if the ids under latents did not matter
        return laid, embeds

    monkeypatch.setattr(script, "_overlay", padded)
    assert controls.path_gap(lens, run) > 1e-3


@pytest.mark.parametrize(
    ("model_type", "kinds"),
    [
        ("llava", {"full_attention"}),
        ("gemma3", {"sliding_attention", "full_attention"}),
        ("qwen3_5", {"linear_attention", "full_attention"}),
    ],
)
def test_which_caches_can_be_cut_back(model_type: str, kinds: set[str]) -> None:
    model = walk_checks.build(model_type).double()
    lens = il.LatentModel(model, spec=False)
    assert set(lens.behaviour.mixing) == kinds
    ids = torch.as_tensor(np.random.default_rng(0).integers(5, 60, (1, 100)))
    check_a_cache_can_be_cut_back(model, ids, lens.behaviour)
    other = ("sliding_attention",) if lens.behaviour.crops else ("full_attention",)
    with pytest.raises(AssertionError):
        check_a_cache_can_be_cut_back(model, ids, replace(lens.behaviour, mixing=other))
