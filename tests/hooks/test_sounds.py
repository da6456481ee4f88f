"""Models that hear: an encoded sound reaches the text, its tokens are selected and edited."""

from typing import Any

import pytest
import torch
import walk_checks
import walk_inputs

import imaginelens as il
from imaginelens.hooks import controls
from imaginelens.hooks.positions import audio
from imaginelens.hooks.tokens import Kind

Inputs = dict[str, torch.Tensor]
SOUND = 300  # the id, where a default config has none
# type: frames of the spectrogram, the field that masks them, tokens they become
TYPES: dict[str, tuple[int, str | None, int]] = {
    "glmasr": (96, "input_features_mask", 12),
    "qwen2_audio": (128, "feature_attention_mask", 32),
    "qwen2_5_omni_thinker": (128, "feature_attention_mask", 32),
    "voxtral": (128, None, 16),
}


def built(model_type: str, monkeypatch: pytest.MonkeyPatch) -> Any:
    whole = walk_checks.shrunken

    def shrunken(name: str) -> Any:
        """Short sounds; and what the default config of Voxtral lacks."""
        config = whole(name)
        if hasattr(config.audio_config, "max_source_positions"):
            config.audio_config.max_source_positions = 64
        if name == "voxtral":
            config.audio_token_id = SOUND
            config.audio_config.intermediate_size = 4 * config.audio_config.hidden_size
        return config

    monkeypatch.setattr(walk_checks, "shrunken", shrunken)
    return walk_checks.build(model_type)


def heard(model: Any, seed: int) -> Inputs:
    """A prompt with one sound, as its processor expands it."""
    frames, mask, n = TYPES[model.config.model_type]
    mels = model.config.audio_config.num_mel_bins
    generator = torch.Generator().manual_seed(seed)
    before, behind = walk_inputs.TEXT
    ids = torch.tensor([[*before, *[model.config.audio_token_id] * n, *behind]])
    given = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    given["input_features"] = torch.randn(1, mels, frames, generator=generator, dtype=torch.float64)
    if mask is not None:
        given[mask] = torch.ones(1, frames, dtype=torch.long)
    return given


def run_of(lens: il.LatentModel, given: Inputs) -> il.Run:
    ban = walk_checks._Ban(given["input_ids"].shape[1])
    return lens.run(
        given,
        latents=il.Force(2, at=1),
        max_new_tokens=6,
        keep_logits=True,
        generation={"logits_processor": [ban]},
    )


@pytest.mark.parametrize("model_type", list(TYPES))
def test_a_sound_is_heard_read_again_and_edited(
    model_type: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with walk_checks._Double():
        lens = il.LatentModel(built(model_type, monkeypatch), spec=walk_checks.SPEC)
        given = heard(lens.model, 0)
        plain = lens.run_with_hooks(given)
        other = lens.run_with_hooks(walk_inputs.other_pixel(given, "input_features", by=10.0))
        assert (plain - other).abs().max() > 1e-6
        run = run_of(lens, given)
        assert controls.path_gap(lens, run) < 1e-9
        # the oracle: every step reads everything anew, without a cache
        written, latents = walk_checks.recomputed(lens.model, given)
        torch.testing.assert_close(run.latents[0], latents, rtol=0, atol=1e-9)
        assert run.sequences[0, run.tokens.prompt_width :].tolist() == written
        # a batch gives what its rows give alone
        longer = walk_inputs.lengthened(heard(lens.model, 1), 3)
        together = run_of(lens, walk_inputs.stacked([given, longer]))
        for row, inputs in enumerate((given, longer)):
            alone = run_of(lens, inputs).latents[0]
            torch.testing.assert_close(together.latents[row], alone, rtol=0, atol=1e-9)
        with lens.edit(il.Zero(), at=audio, site="blocks.0.hook_resid_pre") as landing:
            changed = run_of(lens, given)
        assert len(landing.cells) == TYPES[model_type][2]
        assert (changed.latents - run.latents).abs().max() > 1e-6
    columns = torch.nonzero(given["input_ids"][0] == lens.model.config.audio_token_id)[:, 0]
    assert audio.resolve(run.tokens, 0).tolist() == columns.tolist()
    assert run.tokens.token(0, int(columns[0])).kind is Kind.AUDIO
    assert "audio: il.audio selects its tokens" in str(lens.describe())


def test_an_edit_of_what_is_overwritten_is_refused() -> None:
    lens = il.LatentModel(walk_checks.build("glmasr"), spec=False)
    given = heard(lens.model, 0)
    cut = lens.edit(il.Zero(), at=audio, site="hook_embed")
    said = r"audio selects audio positions, .* edit 'blocks\.0\.hook_resid_pre' there"
    with cut, pytest.raises(il.SiteUnavailable, match=said):
        lens.run_with_hooks(given)


def test_a_model_without_an_audio_tower_does_not_claim_one() -> None:
    lens = il.LatentModel(walk_checks.build("gemma4"), spec=False)
    assert lens.model.config.audio_config is None
    assert "audio:" not in str(lens.describe())
