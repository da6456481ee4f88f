"""The tuned lens: exact where the last layer is, and where a layer is a rotation of it."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
import transformers as hf
from local_hub import LocalHub
from torch import nn

import imaginelens as il
from imaginelens.estimates import EstimateError
from imaginelens.hooks.errors import CheckpointError, InputError
from imaginelens.hooks.hub import Origin, hub_origin
from imaginelens.probes.logit_lens import logit_lens
from imaginelens.probes.tuned_lens import TunedLens
from imaginelens.probes.tuned_saving import CARD, WEIGHTS, WORDS

SPEC = il.LatentSpec(
    name="test", open="<|latent_start|>", close="<|latent_end|>", pad="<|latent_pad|>", max_steps=3
)
FORCED = il.Force(3, at=0)
WIDTH = 16
INPUTS = [{"text": f"{n:03d}{'?' * (n % 3 + 1)}"} for n in range(40)]


class Turn(nn.Module):
    """Adds to the stream what makes it a rotated and shifted one: h + (R - 1) h + c."""

    def __init__(self, matrix: torch.Tensor, shift: torch.Tensor) -> None:
        super().__init__()
        self.matrix, self.shift = matrix, shift

    def forward(self, h: torch.Tensor) -> torch.Tensor:
        return h @ (self.matrix - torch.eye(len(self.matrix))).T + self.shift


def turning() -> tuple[il.LatentModel, torch.Tensor, torch.Tensor]:
    """A Llama whose last block turns and shifts the stream, and does nothing else."""
    tok = tiny.tokenizer(bos=False)
    fields = dict(hidden_size=WIDTH, intermediate_size=24, num_hidden_layers=2, head_dim=4)
    torch.manual_seed(0)
    model: Any = hf.LlamaForCausalLM(hf.LlamaConfig(**tiny.text_config(tok, **fields)))
    model = model.double().eval()
    draw = lambda *shape: torch.randn(*shape, dtype=torch.float64)  # noqa: E731
    with torch.no_grad():
        for parameter in model.parameters():
            scale = 0.5 if parameter.ndim == 1 else parameter.shape[-1] ** -0.5
            parameter.copy_(scale * draw(*parameter.shape))
        model.model.norm.weight.copy_(1 + 0.3 * draw(WIDTH))
    matrix, shift = torch.linalg.qr(draw(WIDTH, WIDTH))[0], 0.3 * draw(WIDTH)
    last = model.model.layers[1]
    last.post_attention_layernorm = nn.Identity()
    with torch.no_grad():
        last.self_attn.o_proj.weight.zero_()
    last.mlp = Turn(matrix, shift)
    model.generation_config = hf.GenerationConfig(do_sample=False, pad_token_id=tok.pad_token_id)
    return il.LatentModel(model, tok, spec=SPEC), matrix, shift


@pytest.fixture(scope="module")
def fitted() -> tuple[il.LatentModel, il.Run, TunedLens]:
    lens, _, _ = turning()
    run = lens.run(INPUTS, latents=FORCED, max_new_tokens=6)
    return lens, run, TunedLens.fit(lens, run, at=il.generated | il.text, max_rounds=80)


def test_a_rotated_layer_is_recovered_where_the_logit_lens_reads_something_else(
    fitted: tuple[il.LatentModel, il.Run, TunedLens],
) -> None:
    _, _, tuned = fitted
    site = "blocks.0.hook_resid_post"
    assert tuned.kl_before[site].value > 0.3
    assert tuned.kl_after[site].value < 1e-3
    assert tuned.kl_after[site].ci().high < 1e-2
    assert tuned.gain(site).ci().low > 0.3
    assert tuned.gain(site).n == 10


def test_the_last_layer_stays_the_identity_and_costs_nothing(
    fitted: tuple[il.LatentModel, il.Run, TunedLens],
) -> None:
    lens, run, tuned = fitted
    last = "blocks.1.hook_resid_post"
    assert not tuned.weights[last].any()
    assert not tuned.biases[last].any()
    assert (tuned.kl_before[last].values == 0).all()
    assert (tuned.kl_after[last].values == 0).all()
    plain, found = logit_lens(lens, run, sites=tuned.sites), tuned(lens, run)
    assert found.kind == "tuned lens"
    np.testing.assert_array_equal(found.probabilities[:, :, 1], plain.probabilities[:, :, 1])
    assert not np.allclose(found.probabilities[:, :, 0], plain.probabilities[:, :, 0])
    np.testing.assert_allclose(found.entropy[:, :, 0], plain.entropy[:, :, 1], atol=0.1)


def test_the_report_is_the_divergence_of_the_held_out_by_hand(
    fitted: tuple[il.LatentModel, il.Run, TunedLens],
) -> None:
    """KL(final || lens) in bits of one held-out example, from the tables' whole distributions."""
    lens, run, tuned = fitted
    site, at = "blocks.0.hook_resid_post", il.generated | il.text
    every = list(range(lens.structure.d_vocab))
    table = tuned(lens, run, at=at, watch=every)
    order = [table.watched.index(n) for n in every]
    p = table.watched_probabilities[..., order]
    lens_p, final_p = p[:, :, 0], p[:, :, 1]
    with np.errstate(invalid="ignore"):
        kl = np.nanmean((final_p * np.log2(final_p / lens_p)).sum(-1), axis=1)
    for value in tuned.kl_after[site].values:
        assert np.abs(kl - value).min() < 1e-9


def test_the_truth_gives_no_divergence_and_translate_is_the_formula() -> None:
    lens, matrix, shift = turning()
    run = lens.run(INPUTS[:4], latents=FORCED, max_new_tokens=5)
    site = "blocks.0.hook_resid_post"
    done = TunedLens.fit(lens, lens.run(INPUTS, latents=FORCED, max_new_tokens=5), max_rounds=1)
    weights = {**done.weights, site: matrix - torch.eye(WIDTH, dtype=torch.float64)}
    truth = TunedLens(
        done.sites, weights, {**done.biases, site: shift}, done.kl_before, done.kl_after,
        done.at, done.model,
    )  # fmt: skip
    states = torch.randn(5, WIDTH, dtype=torch.float64)
    torch.testing.assert_close(truth.translate(site, states), states @ matrix.T + shift)
    table = truth(lens, run)
    np.testing.assert_allclose(table.entropy[:, :, 0], table.entropy[:, :, 1], atol=1e-9)
    assert (table.token_ids[:, :, 0] == table.token_ids[:, :, 1]).all()


def test_the_seed_decides_everything_and_the_model_is_left_alone() -> None:
    lens, _, _ = turning()
    before = {name: p.detach().clone() for name, p in lens.model.named_parameters()}
    run = lens.run(INPUTS, latents=FORCED, max_new_tokens=5)
    one, two, other = (TunedLens.fit(lens, run, seed=s, max_rounds=4) for s in (0, 0, 1))
    site = one.sites[0]
    assert torch.equal(one.weights[site], two.weights[site])
    assert not torch.equal(one.weights[site], other.weights[site])
    assert not np.array_equal(one.kl_before[site].values, other.kl_before[site].values)
    for name, parameter in lens.model.named_parameters():
        assert parameter.grad is None
        assert torch.equal(parameter, before[name])


def test_what_only_fits_the_training_examples_is_not_kept() -> None:
    """Few examples and pure noise in the way: the identity, or what is no worse on others."""
    lens = il.load("latent-ignored")
    tuned = TunedLens.fit(lens, lens.task(12, seed=0), sites="blocks.0.hook_resid_post")
    site = tuned.sites[0]
    assert tuned.kl_after[site].value < 1.5 * tuned.kl_before[site].value


def test_pictures_stay_whole() -> None:
    lens = il.load("latent-content")
    hunts = lens.task(12, seed=0).base
    shown_twice = [{**h, "text": h["text"]} for h in hunts for _ in range(2)]
    with pytest.raises(InputError, match="24 examples in 12 groups leave 3 groups to report on"):
        TunedLens.fit(lens, shown_twice)
    many = lens.task(40, seed=0).base
    tuned = TunedLens.fit(
        lens, [h for h in many for _ in range(2)], max_rounds=1, sites="blocks.1.hook_resid_post"
    )
    report = tuned.kl_after[tuned.sites[0]]
    assert report.n_groups == 10
    assert report.n == 20


# ---- on disk and on the Hub ---------------------------------------------------------------------


def assert_equal(one: TunedLens, two: TunedLens) -> None:
    assert (one.sites, one.at, one.model) == (two.sites, two.at, two.model)
    for site in one.sites:
        assert torch.equal(one.weights[site], two.weights[site])
        assert torch.equal(one.biases[site], two.biases[site])
        np.testing.assert_array_equal(one.kl_after[site].values, two.kl_after[site].values)
        assert one.kl_before[site].ci() == two.kl_before[site].ci()
        assert one.gain(site).pvalue() == two.gain(site).pvalue()


def test_saved_then_loaded_equals_kept_in_memory(
    fitted: tuple[il.LatentModel, il.Run, TunedLens], tmp_path: Path
) -> None:
    _, _, tuned = fitted
    folder = tuned.save(tmp_path / "lens")
    assert sorted(p.name for p in folder.iterdir()) == sorted([WEIGHTS, WORDS, CARD])
    assert_equal(TunedLens.from_pretrained(folder), tuned)
    card = (folder / CARD).read_text()
    assert card.startswith("---\nlibrary_name: imaginelens\n")
    assert "not evidence of what it is used for" in card
    with pytest.raises(InputError, match="holds a tuned lens already"):
        tuned.save(folder)
    for change, told in (
        ({"sites": []}, "has no sites"),
        ({"at": 3}, "has no sites, or does not say"),
        ({"sites": ["elsewhere"]}, "weight/elsewhere"),
    ):
        words = json.loads((folder / WORDS).read_text())
        (folder / WORDS).write_text(json.dumps(words | change))
        with pytest.raises(CheckpointError, match=told):
            TunedLens.from_pretrained(folder)
        (folder / WORDS).write_text(json.dumps(words))
    (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes()[:-1] + b"x")
    with pytest.raises(CheckpointError, match="do not belong together"):
        TunedLens.from_pretrained(folder)
    words = json.loads((folder / WORDS).read_text())
    (folder / WORDS).write_text(json.dumps({**words, "format": 99}))
    with pytest.raises(CheckpointError, match="its format is 99"):
        TunedLens.from_pretrained(folder)
    (folder / WORDS).write_text("{")
    with pytest.raises(CheckpointError, match="does not hold a tuned lens"):
        TunedLens.from_pretrained(folder)


def test_the_hub_gets_and_gives_the_same_files(
    fitted: tuple[il.LatentModel, il.Run, TunedLens],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    _, _, tuned = fitted
    hub = LocalHub(tmp_path, monkeypatch)
    address = tuned.push_to_hub("me/lens", private=True, token="t")
    assert address == "https://huggingface.co/me/lens"
    assert hub.calls[0] == ("HfApi", {"token": "t"})
    assert hub.private["model", "me/lens"]
    again = TunedLens.from_pretrained("me/lens", revision=address.revision)
    assert_equal(again, tuned)
    assert hub_origin(again) == Origin("me/lens", "model", address.revision)
    hub.offline = True
    with pytest.raises(CheckpointError, match="the Hub gave none of that name"):
        TunedLens.from_pretrained("me/none")


# ---- what is refused ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("data", "options", "words"),
    [
        ("run", {"sites": "hook_latent"}, "has passed the final norm"),
        ("run", {"groups": ["a"]}, "1 groups came with 40 examples"),
        ("run", {"held_out": 1.5}, "held_out=1.5"),
        ("run", {"groups": ["a", "b"] * 20}, "40 examples in 2 groups"),
        ([], {}, "data is a list"),
        ("text", {}, "data is a str"),
    ],
)
def test_bad_input_is_told_in_a_sentence(data: Any, options: dict[str, Any], words: str) -> None:
    lens, _, _ = turning()
    if data == "run":
        data = lens.run(INPUTS, latents=FORCED, max_new_tokens=5)
    with pytest.raises(InputError, match=words):
        TunedLens.fit(lens, data, **options)


def test_a_lens_of_another_model_is_refused(
    fitted: tuple[il.LatentModel, il.Run, TunedLens],
) -> None:
    _, _, tuned = fitted
    other = il.load("latent-content")
    with pytest.raises(InputError, match="of width 16 at 2 sites"):
        tuned(other, other.task(1).base)
    with pytest.raises(InputError, match="there is no translator for"):
        tuned.gain("blocks.7.hook_resid_post")
    with pytest.raises(InputError, match="states of width 3"):
        tuned.translate(tuned.sites[0], torch.zeros(2, 3))
    with pytest.raises(EstimateError):
        tuned.gain(tuned.sites[0]).equivalence()
    assert list(tuned.to_dataframe()["site"]) == list(tuned.sites)
    assert "held out" in repr(tuned)
