"""Videos, as a processor encodes them: they reach the model, are mapped, selected and edited."""

from typing import Any

import numpy as np
import pytest
import tiny
import torch
import walk_checks
import walk_inputs

import imaginelens as il
from imaginelens.hooks import controls, media
from imaginelens.hooks.positions import video
from imaginelens.hooks.tokens import Kind

Inputs = dict[str, torch.Tensor]
QWEN = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl")
NAMES = (*QWEN, "llava_onevision")
SPEC = il.LatentSpec(
    name="test", open="<|latent_start|>", close="<|latent_end|>", pad="<|latent_pad|>", max_steps=3
)
SHAPES = ((2, 2, 3), (3, 2, 2))  # frames, rows and columns of the two videos


def lens_of(name: str, spec: Any = SPEC) -> il.LatentModel:
    return il.LatentModel(*tiny.build(name), spec=spec)


def encoded(lens: il.LatentModel, which: int) -> Inputs:
    """What a processor with a video processor returns for one video, made by hand."""
    config, tok = lens.model.config, lens.tokenizer
    pad = media.video_token_id(config)
    generator = torch.Generator().manual_seed(which)
    before, behind = (tok(t)["input_ids"] for t in ("look: ", ("what?", "and now, what?")[which]))

    def pixels(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    if config.model_type == "llava_onevision":  # 9 patches of a frame are pooled to 4; a row end
        shown, fields = [pad] * (2 * 4 + 1), {"pixel_values_videos": pixels(1, 2, 3, 24, 24)}
    else:
        frames, rows, cols = SHAPES[which]
        n, vision = frames * rows * cols, config.vision_config
        depth = 3 * vision.temporal_patch_size * vision.patch_size**2
        fields = {"pixel_values_videos": pixels(4 * n, depth)}
        fields["video_grid_thw"] = torch.tensor([[frames, 2 * rows, 2 * cols]])
        start, end = (tok.convert_tokens_to_ids(f"<|vision_{s}|>") for s in ("start", "end"))
        shown = [start, *[pad] * n, end]
        if config.model_type == "qwen3_vl":  # a time stands before each frame
            times = [tok(f"<{t}.0 seconds>")["input_ids"] for t in range(frames)]
            shown = [c for time in times for c in (*time, start, *[pad] * (rows * cols), end)]
        if config.model_type == "qwen2_5_vl":
            fields["second_per_grid_ts"] = torch.tensor([1.0])
    ids = torch.tensor([[*before, *shown, *behind]])
    fields |= {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if config.model_type != "llava_onevision":
        fields["mm_token_type_ids"] = 2 * (ids == pad).long()
    return fields


def with_image(lens: il.LatentModel) -> Inputs:
    """A video behind an image, in one prompt."""
    name = lens.model.config.model_type
    given = tiny.inputs(name, lens.processor, ["and "], [tiny.image(32, 16, 0)])
    film = encoded(lens, 0)
    joined = {**{k: v for k, v in film.items() if k not in given}, **given}
    for row in walk_inputs.ALONG_ROW:
        if row in given:
            joined[row] = torch.cat([given[row], film[row].to(given[row])], dim=1)
    return joined


def run_of(lens: il.LatentModel, given: Inputs) -> il.Run:
    return lens.run(given, latents=il.Force(3, at=1), max_new_tokens=8, keep_logits=True)


# ---- they reach the model --------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_one_changed_pixel_changes_the_logits_and_a_run_is_read_as_generated(name: str) -> None:
    lens = lens_of(name)
    given = encoded(lens, 0)
    with torch.no_grad():
        plain = lens.run_with_hooks(given)
        other = lens.run_with_hooks(walk_inputs.other_pixel(given, "pixel_values_videos", by=1.0))
        torch.testing.assert_close(plain, lens.model(**given, use_cache=False).logits)
    assert (plain - other).abs().max() > 1e-6
    assert controls.path_gap(lens, run_of(lens, given)) < 1e-9


@pytest.mark.parametrize("name", NAMES)
def test_a_batch_gives_what_its_rows_give_alone(name: str) -> None:
    lens = lens_of(name)
    rows = [encoded(lens, 0), encoded(lens, 1)]
    together = run_of(lens, walk_inputs.stacked(rows))
    assert controls.path_gap(lens, together) < 1e-9
    for row, given in enumerate(rows):
        alone = run_of(lens, given)
        assert together.texts[row] == alone.texts[0]
        torch.testing.assert_close(together.latents[row], alone.latents[0], rtol=0, atol=1e-9)
        own = [c - together.tokens.start(row) for c in video.resolve(together.tokens, row)]
        assert own == video.resolve(alone.tokens, 0).tolist()


@pytest.mark.parametrize("name", QWEN)
def test_a_run_writes_what_stock_generate_writes(name: str) -> None:
    lens = lens_of(name, spec=False)
    given = encoded(lens, 1)
    stock = lens.model.generate(**given, max_new_tokens=5, do_sample=False)
    assert torch.equal(lens.run(given, max_new_tokens=5).sequences, stock)


# ---- the map ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_every_video_token_has_its_frame_and_cell(name: str) -> None:
    lens = lens_of(name)
    given = encoded(lens, 0)
    tokens = lens.tokens(given)
    columns = torch.nonzero(given["input_ids"][0] == media.video_token_id(lens.model.config))[:, 0]
    assert np.flatnonzero(tokens.kind[0] == Kind.VIDEO).tolist() == columns.tolist()
    assert video.resolve(tokens, 0).tolist() == columns.tolist()
    assert il.image.resolve(tokens, 0).tolist() == []
    assert not set(columns.tolist()) & set(il.text.resolve(tokens, 0).tolist())
    shown = [tokens.token(0, int(c)) for c in columns]
    frames, rows, cols = (2, 2, 2) if name == "llava_onevision" else SHAPES[0]
    cells = [(t, r, c) for t in range(frames) for r in range(rows) for c in range(cols)]
    ends = [(-1, -1, -1)] * (len(columns) - len(cells))
    assert [(t.frame, t.row, t.col) for t in shown] == cells + ends
    assert len(ends) == int(name == "llava_onevision")
    assert {t.video for t in shown} == {0}
    assert {t.image for t in shown} == {-1}


@pytest.mark.parametrize("name", QWEN)
def test_a_cell_is_where_its_pixels_are(name: str) -> None:
    """The oracle: of one patch changed before the tower, what moves most behind the projector."""
    lens = lens_of(name)
    given = encoded(lens, 0)
    tokens = lens.tokens(given)
    _, rows, cols = SHAPES[0]
    first, site = "blocks.0.hook_resid_pre", lambda x: lens.run_with_cache(x, names_filter=first)[1]
    before = site(given)[first]
    for frame, row, col in ((0, 0, 0), (1, 1, 2), (1, 0, 1)):
        token = (frame * rows + row) * cols + col
        other = {**given, "pixel_values_videos": given["pixel_values_videos"].clone()}
        other["pixel_values_videos"][4 * token : 4 * token + 4] += 3.0  # its four patches
        moved = (site(other)[first] - before)[0].norm(dim=-1)
        assert [int(moved.argmax())] == video[0][frame, row, col].resolve(tokens, 0).tolist()


@pytest.mark.parametrize("name", QWEN)
def test_selectors_pick_videos_frames_and_cells(name: str) -> None:
    lens = lens_of(name)
    tokens = lens.tokens(walk_inputs.stacked([encoded(lens, 0), encoded(lens, 1)]))
    for row, (frames, rows, cols) in enumerate(SHAPES):
        grid = video.resolve(tokens, row).reshape(frames, rows, cols)
        assert video[0].resolve(tokens, row).tolist() == grid.ravel().tolist()
        assert video[0][1].resolve(tokens, row).tolist() == grid[1].ravel().tolist()
        found = video[0][0:2, 1, 0:2].resolve(tokens, row)
        assert found.tolist() == grid[0:2, 1, 0:2].ravel().tolist()
        assert video[:, -1, :].resolve(tokens, row).tolist() == grid[:, -1].ravel().tolist()
    with pytest.raises(il.PositionError, match=r"video 1 is outside of 0\.\.0"):
        video[1].resolve(tokens, 0)
    with pytest.raises(il.PositionError, match=r"frame 2 is outside of 0\.\.1"):
        video[0][2].resolve(tokens, 0)
    with pytest.raises(il.PositionError, match=r"\[frames, rows, columns\], not 2 indices"):
        video[0][1, 2]
    shown = [video, video[0], video[0][1], video[0][1, 0:2, 3], video[:, 0, 1]]
    assert [repr(v) for v in shown] == [
        "video", "video[0]", "video[0][1]", "video[0][1, 0:2, 3]", "video[:, 0, 1]",
    ]  # fmt: skip
    text = lens.tokens({"text": "no video"})
    assert video[0][1].resolve(text, 0).tolist() == []


def test_frames_written_with_image_tokens_are_told_by_their_type() -> None:
    """GLM has one token for both, and says by its type which it is."""
    lens = il.LatentModel(walk_checks.build("glm4v"), spec=False)
    given, _ = walk_inputs.found_image_inputs(lens.model, 0)
    picture = il.image.resolve(lens.tokens(given), 0)
    film = {
        "pixel_values_videos": given["pixel_values"], "video_grid_thw": given["image_grid_thw"],
        "mm_token_type_ids": 2 * given["mm_token_type_ids"],
    }  # fmt: skip
    film |= {name: given[name] for name in ("input_ids", "attention_mask")}
    tokens = lens.tokens(film)
    assert video.resolve(tokens, 0).tolist() == picture.tolist()
    assert il.image.resolve(tokens, 0).tolist() == []


# ---- edits -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", QWEN)
def test_an_edit_at_the_projector_lands_at_the_token_that_was_named(name: str) -> None:
    """Also where the tower works in window order (Qwen2.5-VL)."""
    lens = lens_of(name)
    given = walk_inputs.stacked([encoded(lens, 0), encoded(lens, 1)])
    tokens, first = lens.tokens(given), "blocks.0.hook_resid_pre"
    _, before = lens.run_with_cache(given, names_filter=first)
    for at in (video[0][1, 0, 1], video[0][0], video):
        with lens.edit(il.Zero(), at=at, site="vision_projector.hook_out") as landing:
            _, after = lens.run_with_cache(given, names_filter=first)
        moved = (after[first] - before[first]).abs().amax(-1) > 0
        for row in range(2):
            wanted = at.resolve(tokens, row).tolist()
            assert torch.nonzero(moved[row])[:, 0].tolist() == wanted
        assert len(landing.cells) == sum(len(at.resolve(tokens, row)) for row in range(2))


@pytest.mark.parametrize("name", NAMES)
def test_an_edit_in_the_stream_lands(name: str) -> None:
    lens = lens_of(name)
    given = encoded(lens, 0)
    plain = run_of(lens, given)
    with lens.edit(il.Zero(), at=video, site="blocks.1.hook_resid_pre") as landing:
        run = run_of(lens, given)
    assert landing.positions[0] == video.resolve(plain.tokens, 0).tolist()
    assert (run.latents - plain.latents).abs().max() > 1e-6
    with pytest.raises(il.SiteUnavailable, match=r"selects video positions, whose token embedding"):
        with lens.edit(il.Zero(), at=video, site="hook_embed"):
            lens.run_with_hooks(given)


@pytest.mark.parametrize("name", QWEN)
def test_a_video_beside_an_image(name: str) -> None:
    lens = lens_of(name)
    given = with_image(lens)
    run = run_of(lens, given)
    assert controls.path_gap(lens, run) < 1e-9
    pictures, films = il.image.resolve(run.tokens, 0), video.resolve(run.tokens, 0)
    assert (len(pictures), len(films)) == (8, 12)
    assert not set(pictures) & set(films)
    site, first = "vision_projector.hook_out", "blocks.0.hook_resid_pre"
    _, before = lens.run_with_cache(given, names_filter=first)
    with lens.edit(il.Zero(), at=il.image[0][1, 2], site=site):
        _, after = lens.run_with_cache(given, names_filter=first)
    moved = (after[first] - before[first])[0].abs().amax(-1) > 0
    assert torch.nonzero(moved)[:, 0].tolist() == il.image[0][1, 2].resolve(run.tokens, 0).tolist()
    with lens.edit(il.Zero(), at=video, site="blocks.0.hook_resid_pre") as landing:
        lens.run_with_hooks(given)
    assert len(landing.cells) == 12
    said = r"selects a video beside images, .* in a second call .*edit blocks\.0\.hook_resid_pre"
    cut = lens.edit(il.Zero(), at=video, site=site)
    with cut, pytest.raises(il.SiteUnavailable, match=said):
        lens.run_with_hooks(given)


# ---- what is refused -------------------------------------------------------------------------


@pytest.mark.parametrize("medium", ["videos", "audio"])
def test_raw_videos_and_sounds_are_refused_and_not_left_out(medium: str) -> None:
    lens = lens_of("qwen2_5_vl")
    frames = [tiny.image(32, 16, seed) for seed in range(4)]
    with pytest.raises(il.InputError, match=rf"example 0 has {medium}, and only images are encod"):
        lens.run({medium: frames, "text": "what happens?"})
    lens.run({medium: None, "text": "what happens?"}, max_new_tokens=1)


def test_video_tokens_without_a_video_are_refused() -> None:
    lens = lens_of("qwen2_vl")
    given = encoded(lens, 0)
    del given["pixel_values_videos"]
    with pytest.raises(il.InputError, match="has 12 video tokens and no pixel_values_videos"):
        lens.run(given)


def test_missing_token_types_are_refused() -> None:
    lens = lens_of("qwen2_vl")
    given = encoded(lens, 0)
    del given["mm_token_type_ids"]
    with pytest.raises(il.InputError, match="needs mm_token_type_ids"):
        lens.run(given)


def test_times_are_neither_left_out_nor_rounded() -> None:
    """Positions of frames are counted from them: in half precision other ones would come out."""
    model, processor = tiny.build("qwen2_5_vl", dtype=torch.bfloat16)
    lens = il.LatentModel(model, processor, spec=False)
    given = encoded(lens, 1) | {"second_per_grid_ts": torch.tensor([2 / 2.997])}
    kept = lens.prompt(given).inputs
    assert kept["second_per_grid_ts"].dtype == torch.float32
    assert kept["pixel_values_videos"].dtype == torch.bfloat16
    with pytest.raises(il.InputError, match=r"'second_per_grid_ts' is a list, .*tensors='pt'"):
        lens.prompt({**given, "second_per_grid_ts": [0.66]})


def test_a_token_of_a_video_that_the_model_writes_is_read_as_a_word() -> None:
    lens = lens_of("qwen2_vl", spec=False)
    pad = media.video_token_id(lens.model.config)

    class Writes(torch.nn.Module):
        def forward(self, ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
            scores[:, pad] = scores.max() + 1
            return scores

    options = {"logits_processor": [Writes()]}
    run = lens.run(encoded(lens, 0), max_new_tokens=3, keep_logits=True, generation=options)
    assert run.sequences[0, -3:].tolist() == [pad] * 3
    assert controls.path_gap(lens, run) < 1e-9


def test_videos_are_described() -> None:
    assert "videos: il.video selects their tokens" in str(lens_of("qwen2_vl").describe())
    assert "videos:" not in str(lens_of("llava").describe())
