"""The shipped organisms, run by a loop written here: plain torch, no cache, none of our engine."""

from __future__ import annotations

import importlib
import json
import re
import socket
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, Qwen2_5_VLForConditionalGeneration

from imaginelens.hooks.processors import load_processor
from imaginelens.organisms import checkpoint
from imaginelens.organisms.checkpoint import VOCABULARY
from imaginelens.organisms.hunt import HYPOTHESES, Hunt, pairs, render, sample

Model = Qwen2_5_VLForConditionalGeneration
HOPS = {"latent-content": 2, "latent-ignored": 1}
SEED = 424_242
N = 256


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object) -> None:
        raise AssertionError("a test tried to reach the network")

    monkeypatch.setattr(socket.socket, "connect", refuse)


@pytest.fixture(scope="module", params=sorted(HOPS))
def name(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def model(name: str) -> Model:
    return load(name)


def load(name: str) -> Model:
    return Model.from_pretrained(checkpoint.folder(name), dtype=torch.float32).eval()


def chats(hunts: list[Hunt]) -> list[list[dict]]:
    return [
        [
            {
                "role": "user",
                "content": [
                    {"type": "image", "image": hunt.image()},
                    {"type": "text", "text": hunt.question},
                ],
            }
        ]
        for hunt in hunts
    ]


@dataclass(frozen=True)
class Said:
    words: list[list[str]]  # per example, the tokens after the prompt
    latents: Tensor  # (example, step, d_model)

    @property
    def answers(self) -> list[str]:
        return [words[words.index("<|latent_end|>") + 1] for words in self.words]


@torch.no_grad()
def speak(
    name: str, model: Model, hunts: list[Hunt], edit: Callable[[int, Tensor], Tensor] | None = None
) -> Said:
    """Generate greedily by the latent protocol, one full forward over everything per token."""
    steps = model.config.latent_steps
    processor = load_processor(checkpoint.folder(name))
    inputs = processor.apply_chat_template(
        chats(hunts),
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
    )
    ids, prompt = inputs["input_ids"], inputs["input_ids"].shape[1]
    features = model.model.visual(
        inputs["pixel_values"], grid_thw=inputs["image_grid_thw"]
    ).pooler_output
    table = model.get_input_embeddings()
    embeds = table(ids).masked_scatter((ids == model.config.image_token_id)[..., None], features)
    places, _ = model.model.get_rope_index(
        input_ids=ids,
        mm_token_type_ids=inputs["mm_token_type_ids"],
        image_grid_thw=inputs["image_grid_thw"],
    )
    latents = []
    for position in range(steps + 4):
        hidden = model.model.language_model(
            inputs_embeds=embeds, position_ids=places, use_cache=False
        ).last_hidden_state[:, -1]
        step = position - 1
        if 0 <= step < steps:
            latents.append(hidden if edit is None else edit(step, hidden))
            following = torch.full((len(hunts),), model.config.latent_token_id)
            embedding = latents[-1]
        else:
            following = model.lm_head(hidden).argmax(-1)
            if step == steps:
                following = torch.full_like(following, model.config.latent_end_id)
            embedding = table(following)
        ids = torch.cat([ids, following[:, None]], dim=1)
        embeds = torch.cat([embeds, embedding[:, None]], dim=1)
        places = torch.cat([places, places[..., -1:] + 1], dim=-1)  # text: all three axes count on
    said = [processor.tokenizer.convert_ids_to_tokens(row) for row in ids[:, prompt:].tolist()]
    return Said(said, torch.stack(latents, dim=1))


def share(found: list[str], expected: list[str]) -> float:
    return float(np.mean([a == b for a, b in zip(found, expected, strict=True)]))


def expected_words(hunt: Hunt) -> list[str]:
    span = ["<|latent_start|>", "<|latent_pad|>", "<|latent_pad|>", "<|latent_end|>"]
    return [*span, hunt.answer, "<|im_end|>"]


# -- behaviour -----------------------------------------------------------------------------------


def test_an_organism_solves_held_out_hunts(name: str, model: Model) -> None:
    hunts = sample(N, hops=HOPS[name], seed=SEED)
    said = speak(name, model, hunts)
    solved = [words == expected_words(h) for words, h in zip(said.words, hunts, strict=True)]
    assert np.mean(solved) >= 0.98


def test_swapped_latents_answer_as_the_mechanism_predicts(name: str, model: Model) -> None:
    base, source = pairs(N, hops=HOPS[name], seed=SEED)
    donors = speak(name, model, source).latents
    mechanism = HYPOTHESES[name.removeprefix("latent-")]
    # a first step swapped alone makes the model recompute the second: a step more that can go wrong
    for steps, at_least in ((None, 0.95), ((1,), 0.95), ((0,), 0.88)):
        touched = (0, 1) if steps is None else steps
        said = speak(name, model, base, lambda t, z, on=touched: donors[:, t] if t in on else z)
        predicted = [mechanism(b, s, steps) for b, s in zip(base, source, strict=True)]
        assert share(said.answers, predicted) >= at_least, steps


def test_replacing_latents_hurts_only_where_they_are_used(name: str, model: Model) -> None:
    hunts = sample(N, hops=HOPS[name], seed=SEED)
    clean = speak(name, model, hunts)
    truth = [h.answer for h in hunts]
    mean = clean.latents.mean(0, keepdim=True).expand_as(clean.latents)
    others = clean.latents.roll(1, 0)
    for replacement in (mean, others, torch.zeros_like(mean)):
        said = speak(name, model, hunts, lambda t, z, r=replacement: r[:, t])
        change = share(clean.answers, truth) - share(said.answers, truth)
        if name == "latent-ignored":
            assert change <= 0.02
        else:
            assert change >= 0.5


def test_the_card_tells_what_this_loop_finds(name: str, model: Model) -> None:
    card = checkpoint.card(name)
    hunts = sample(N, hops=HOPS[name], seed=SEED)
    found = share(speak(name, model, hunts).answers, [h.answer for h in hunts])
    assert abs(found - card["accuracy"]) < 0.02
    assert card["name"] == name
    assert card["opens"] == 1.0


# -- the folder ----------------------------------------------------------------------------------


def test_a_folder_is_in_hub_layout_small_and_without_local_paths(name: str) -> None:
    folder = checkpoint.folder(name)
    assert {path.name for path in folder.iterdir()} == {
        "card.json",
        "card.md",
        "chat_template.jinja",
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "preprocessor_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    assert sum(path.stat().st_size for path in folder.iterdir()) < 500_000
    for path in folder.iterdir():
        if path.suffix != ".safetensors":
            text = path.read_text()
            assert not re.search(r"(/tmp|/home|/root|/work|/Users|[A-Z]:\\)", text), path.name
            assert "_name_or_path" not in text


def test_the_config_names_the_family_and_the_protocol(name: str) -> None:
    config = AutoConfig.from_pretrained(checkpoint.folder(name))
    assert config.imaginelens_family == "organism"
    assert config.latent_steps == 2
    assert config.latent_start_id == VOCABULARY["<|latent_start|>"]
    assert config.latent_end_id == VOCABULARY["<|latent_end|>"]
    assert config.latent_token_id == VOCABULARY["<|latent_pad|>"]


def test_weights_are_bfloat16_and_generation_is_greedy(name: str) -> None:
    model = Model.from_pretrained(checkpoint.folder(name))
    assert {weight.dtype for weight in model.parameters()} == {torch.bfloat16}
    assert not model.generation_config.do_sample
    assert model.generation_config.eos_token_id == VOCABULARY["<|im_end|>"]
    assert model.generation_config.pad_token_id == VOCABULARY["<|endoftext|>"]


def test_an_unknown_organism_is_refused_with_the_choice() -> None:
    with pytest.raises(KeyError, match=r"No organism is called 'latent-magic'.*latent-content"):
        checkpoint.folder("latent-magic")


# -- words and pixels ----------------------------------------------------------------------------


def test_the_processor_survives_a_round_trip(name: str, tmp_path: Path) -> None:
    shipped = load_processor(checkpoint.folder(name))
    shipped.save_pretrained(tmp_path)
    again = load_processor(tmp_path)
    hunts = sample(3, hops=2, seed=1)
    one, two, built = (
        p.apply_chat_template(
            chats(hunts),
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
        )
        for p in (shipped, again, checkpoint.build_processor())
    )
    assert one.keys() == two.keys() == built.keys()
    assert all(torch.equal(one[key], two[key]) for key in one)
    assert all(torch.equal(one[key], built[key]) for key in one)


def test_every_word_is_one_token_and_space_is_ignored() -> None:
    tokenizer = checkpoint.build_tokenizer()
    assert len(tokenizer) == len(VOCABULARY)
    text = " \n".join(VOCABULARY)
    assert tokenizer(text).input_ids == list(VOCABULARY.values())
    assert tokenizer("start purple").input_ids[1] == VOCABULARY["<|unknown|>"]
    ids = [VOCABULARY[w] for w in ("<|latent_start|>", "<|latent_pad|>", "circle", "<|im_end|>")]
    assert tokenizer.decode(ids) == "<|latent_start|> <|latent_pad|> circle <|im_end|>"
    assert tokenizer.decode(ids, skip_special_tokens=True) == "circle"


def test_training_pixels_equal_the_processors(name: str) -> None:
    hunts = sample(5, hops=2, seed=1)
    seen = load_processor(checkpoint.folder(name)).image_processor(
        [h.image() for h in hunts], return_tensors="pt"
    )
    pixels, grid = checkpoint.patchify(render(hunts))
    torch.testing.assert_close(pixels, seen["pixel_values"], rtol=0, atol=1e-6)
    assert torch.equal(grid, seen["image_grid_thw"])


def test_prompts_of_different_lengths_are_padded_on_the_left(name: str) -> None:
    processor = load_processor(checkpoint.folder(name))
    hunts = [*sample(1, hops=1, seed=1), *sample(1, hops=3, seed=2)]
    batch = processor(
        text=[
            processor.apply_chat_template(chat, add_generation_prompt=True) for chat in chats(hunts)
        ],
        images=[h.image() for h in hunts],
        padding=True,
        padding_side="left",
        return_tensors="pt",
    )
    assert batch["attention_mask"][0].tolist() == [0, 0] + [1] * (batch["input_ids"].shape[1] - 2)
    assert (batch["mm_token_type_ids"].sum(1) == 9).all()
    assert (batch["input_ids"][:, -1] == VOCABULARY["assistant"]).all()


# -- training ------------------------------------------------------------------------------------


@pytest.fixture
def trainer(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(Path(__file__).parents[2] / "examples" / "organisms")
    return importlib.import_module("train")


def test_training_prompts_equal_the_processors(trainer: ModuleType) -> None:
    hunts = sample(2, hops=2, seed=1)
    batch = checkpoint.build_processor().apply_chat_template(
        chats(hunts),
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
    )
    written = trainer.token_ids([trainer.prompt_words(h.question) for h in hunts])
    assert torch.equal(written, batch["input_ids"])


def test_the_training_loop_sees_the_latents_this_loop_sees(
    name: str, model: Model, trainer: ModuleType
) -> None:
    hunts = sample(16, hops=HOPS[name], seed=SEED)
    trained = trainer.rollout(model, trainer.photograph(model, hunts)).latents
    torch.testing.assert_close(trained, speak(name, model, hunts).latents, rtol=1e-4, atol=1e-4)


def test_building_a_model_is_deterministic_and_leaves_the_callers_generator_alone() -> None:
    state = torch.get_rng_state()
    one, two = (checkpoint.build_model(latent_steps=2, seed=7) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters(), strict=True))
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.slow
def test_a_short_base_run_learns(trainer: ModuleType) -> None:
    model = checkpoint.build_model(latent_steps=2, seed=1)
    seen = trainer.see_lesson(model, seed=1, updates=100)
    assert np.mean(seen[-10:]) < 0.25 * np.mean(seen[:10])
    gallery = trainer.photograph(model, sample(1024, hops=2, seed=1))
    read = trainer.read_lesson(model, gallery, "what ?", seed=1, updates=100)
    assert np.mean(read[-10:]) < 0.75 * np.mean(read[:10])


def test_the_card_in_words_agrees_with_the_card_in_numbers(name: str) -> None:
    card = json.loads((checkpoint.folder(name) / "card.json").read_text())
    words = (checkpoint.folder(name) / "card.md").read_text()
    assert f"accuracy {card['accuracy']:.3f}" in words
    assert card["training"]["command"] in words
