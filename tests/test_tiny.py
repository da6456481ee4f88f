"""The tiny models are sound subjects: exact in float64, sensitive, and laid out as GRID says."""

import numpy as np
import pytest
import tiny
import torch
from PIL import ImageChops
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import eager_mask

TEXTS = ["what?", "which colour is it?"]
SIZES = [(40, 24), (24, 48)]  # width, height; other grids where the family has them
every_family = pytest.mark.parametrize("name", tiny.FAMILIES)


@pytest.fixture(autouse=True)
def _one_thread_without_gradients():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with torch.no_grad():
        yield
    torch.set_num_threads(threads)


def pictures(seed=0, sizes=SIZES):
    return [tiny.image(*size, seed=seed + i) for i, size in enumerate(sizes)]


def rows(name, texts=TEXTS, images=None):
    """The processor's fields without `labels`, and the positions `generate` would use."""
    model, processor = tiny.build(name)
    batch = tiny.inputs(name, processor, texts, images or pictures())
    batch.pop("labels", None)
    return batch | {"position_ids": tiny.positions(model, batch)}


def logits(name, **changed):
    model, _ = tiny.build(name)
    return model(**rows(name, **changed)).logits


def difference(a, b):
    return (a - b).abs().max().item()


@every_family
def test_is_small_and_speaks(name):
    model, processor = tiny.build(name)
    ids, config = processor.tokenizer, model.config.get_text_config()
    assert sum(p.numel() for p in model.parameters()) < 500_000
    assert config.num_key_value_heads < config.num_attention_heads
    assert len(ids) == config.vocab_size
    text = "Grüße, 世界 🙂 <|latent_start|><|latent_pad|><|latent_end|>\n"
    assert ids.decode(ids.encode(text, add_special_tokens=False)) == text
    for token in tiny.LATENT:
        assert len(ids.encode(token, add_special_tokens=False)) == 1
    settings = model.generation_config
    assert (settings.eos_token_id, settings.pad_token_id) == (ids.eos_token_id, ids.pad_token_id)
    assert settings.do_sample is False


@every_family
def test_build_is_cached_and_a_seed_fixes_every_weight(name):
    model, _ = tiny.build(name)
    assert tiny.build(name, dtype=torch.float64)[0] is model
    again, other = tiny.fresh(name)[0], tiny.fresh(name, seed=1, dtype=torch.float32)[0]
    assert again is not model
    assert other.dtype == torch.float32
    pairs = zip(model.named_parameters(), again.parameters(), other.parameters(), strict=True)
    for (path, weight), same, different in pairs:
        assert torch.equal(weight, same), path
        assert difference(weight, different) > 0.01, path


@every_family
def test_fields_of_a_row_are_those_of_the_row_alone(name):
    _, processor = tiny.build(name)
    batch = tiny.inputs(name, processor, TEXTS, pictures())
    assert {v.dtype for v in batch.values() if v.is_floating_point()} == {torch.float64}
    per_token = [k for k, v in batch.items() if v.shape == batch["input_ids"].shape]
    assert set(per_token) >= {"input_ids", "attention_mask"}
    for i, (text, picture) in enumerate(zip(TEXTS, pictures(), strict=True)):
        alone = tiny.inputs(name, processor, [text], [picture])
        length = alone["input_ids"].shape[1]
        assert batch["attention_mask"][i, :-length].sum() == 0
        for field in per_token:
            assert torch.equal(batch[field][i, -length:], alone[field][0]), field
    assert batch["attention_mask"].min() == 0  # one row is padded: the test is not empty


@every_family
def test_rows_equal_rows_alone(name):
    together, mask = logits(name), rows(name)["attention_mask"].bool()
    assert together.isfinite().all()
    for i, picture in enumerate(pictures()):
        alone = logits(name, texts=TEXTS[i : i + 1], images=[picture])
        assert difference(together[i, mask[i]], alone[0]) < 1e-10


@every_family
def test_image_and_text_matter(name):
    last = logits(name)[:, -1]
    other_image = logits(name, images=pictures(seed=9))[:, -1]
    other_text = logits(name, texts=["that?", "which colour ai it?"])[:, -1]
    for other in (other_image, other_text):
        assert ((other - last).abs().amax(-1) > 0.1 * last.std()).all()
    many = logits(name, texts=TEXTS[:1] * 8, images=pictures(sizes=[(40, 24)] * 8))[:, -1]
    assert many.std(0).mean() > 0.2 * many.std()  # not the same guess with a little noise


@every_family
def test_teacher_forcing_equals_incremental_generation(name):
    model, processor = tiny.build(name)
    batch = tiny.inputs(name, processor, TEXTS, pictures())
    steps = []  # generate's own output_logits are rounded to float32
    hook = model.lm_head.register_forward_hook(lambda *call: steps.append(call[-1][:, -1]))
    try:
        whole = model.generate(**batch, max_new_tokens=4)
    finally:
        hook.remove()
    generated = whole[:, batch["input_ids"].shape[1] :]
    assert generated.shape == (2, 4)
    assert (generated != model.config.image_token_id).all()
    forced = tiny.teacher_forced(model, batch, generated)
    assert difference(forced, torch.stack(steps, dim=1)) < 1e-9
    assert torch.equal(forced[:, 0].argmax(-1), generated[:, 0])


def written_out(module, query, key, value, attention_mask, scaling, **_):
    """Attention in the dtype of its input: query (example, head, position, d_head)."""
    group = query.shape[1] // key.shape[1]
    scores = query @ key.repeat_interleave(group, 1).mT * scaling
    pattern = (scores if attention_mask is None else scores + attention_mask).softmax(-1)
    return (pattern @ value.repeat_interleave(group, 1)).transpose(1, 2).contiguous(), pattern


AttentionInterface.register("written_out", written_out)
AttentionMaskInterface.register("written_out", eager_mask)


@every_family
def test_attention_written_out_equals_sdpa(name):
    model, _ = tiny.fresh(name)
    batch = rows(name)
    mask = batch["attention_mask"].bool()
    sdpa = model(**batch).logits[mask]
    model.set_attn_implementation("written_out")
    assert difference(model(**batch).logits[mask], sdpa) < 1e-9


@every_family
def test_stock_eager_attention_rounds_and_cannot_pad_in_float64(name):
    """Its softmax runs in float32, where float64's lowest mask value is -inf: a query that sees
    nothing becomes NaN and spreads. PaliGemma's padding sees its prefix."""
    model, _ = tiny.fresh(name)
    padded, alone = rows(name), rows(name, TEXTS[:1], pictures()[:1])
    sdpa = model(**alone).logits
    model.set_attn_implementation("eager")
    assert 1e-9 < difference(model(**alone).logits, sdpa) < 1e-4
    assert model(**padded).logits[:, -1].isnan().any() == (name != "paligemma")


def silence_vision_attention(model):
    """Each patch of the vision tower then sees only itself."""
    for module in model.get_encoder(modality="image").modules():
        if type(module).__name__.endswith("Attention"):
            *_, out = [child for child in module.children() if isinstance(child, torch.nn.Linear)]
            out.weight.zero_()
            if out.bias is not None:
                out.bias.zero_()


def image_embeddings(model, processor, name, pictures):
    """What the first decoder layer reads at the image tokens: (picture, token, d_model)."""
    batch, read = tiny.inputs(name, processor, ["?"] * len(pictures), pictures), []
    batch.pop("labels", None)
    layer = model.get_decoder().layers[0]
    hook = layer.register_forward_pre_hook(lambda _, args: read.append(args[0]))
    try:
        model(**batch)
    finally:
        hook.remove()
    is_image = batch["input_ids"] == model.config.image_token_id
    return read[0][is_image].view(len(pictures), -1, read[0].shape[-1])


def part(tile, row, col):
    """The edges of one cell of the tile as fractions of the picture."""
    left, top, right, bottom = tile.box
    across, down = (right - left) / tile.cols, (bottom - top) / tile.rows
    return (
        left + across * col,
        top + down * row,
        left + across * (col + 1),
        top + down * (row + 1),
    )


LAYOUTS = [(40, 24), (24, 48), (48, 48), (80, 40), (33, 61), (27, 22), (64, 16), (100, 30)]


@every_family
@pytest.mark.parametrize("size", LAYOUTS, ids=str)
def test_grid_counts_image_tokens(name, size):
    model, processor = tiny.build(name)
    tiles = tiny.GRID[name](*size)
    ids = tiny.inputs(name, processor, ["?"], [tiny.image(*size, seed=0)])["input_ids"][0]
    where = (ids == model.config.image_token_id).nonzero()[:, 0]
    assert len(where) == sum(tile.tokens for tile in tiles)
    if tiles[0].end == "break":
        first, (tile,) = where[0].item(), tiles
        lines = ids[first : first + tile.rows * (tile.cols + 1)].view(tile.rows, tile.cols + 1)
        assert (lines[:, :-1] == model.config.image_token_id).all()
        marks = processor.tokenizer.convert_ids_to_tokens(lines[:, -1].tolist())
        assert marks == ["[IMG_BREAK]"] * (tile.rows - 1) + ["[IMG_END]"]


@every_family
@pytest.mark.parametrize("size", [(80, 48), (40, 96), (64, 16)], ids=str)
def test_grid_cells_show_their_part_of_the_image(name, size):
    """Where patches see only themselves, inverting one cell's pixels moves its token most."""
    model, processor = tiny.fresh(name)
    silence_vision_attention(model)
    picture = tiny.image(*size, seed=3)
    tiles = tiny.GRID[name](*size)
    cells = [
        (t, r, c) for t in range(len(tiles)) for r, c in np.ndindex(tiles[t].rows, tiles[t].cols)
    ]
    inverted = []
    for t, row, col in cells:
        edges = zip(part(tiles[t], row, col), size * 2, strict=True)
        box = tuple(max(0, round(edge * pixels)) for edge, pixels in edges)
        inverted.append(picture.copy())
        inverted[-1].paste(ImageChops.invert(picture.crop(box)), box)
    before, *after = image_embeddings(model, processor, name, [picture, *inverted])
    starts = np.cumsum([0] + [tile.tokens for tile in tiles])
    for (t, row, col), shown in zip(cells, after, strict=True):
        tokens = slice(starts[t], starts[t + 1])
        moved = (shown - before)[tokens].norm(dim=-1).argmax().item()
        assert divmod(moved, tiles[t].tokens // tiles[t].rows) == (row, col), (tiles[t], row, col)
    if tiles[-1].end == "newline":
        lines = before[starts[-2] :].view(tiles[-1].rows, tiles[-1].cols + 1, -1)
        assert (lines[:, -1] == model.model.image_newline).all()
