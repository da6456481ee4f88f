"""IVT-LR: image tokens that come again before each latent, in a prompt that is read in segments."""

from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import reference_loops_ivtlr as loops
import tiny
import torch
from safetensors.torch import save_file

import imaginelens as il
from imaginelens.hooks import controls
from imaginelens.hooks.families import FAMILIES
from imaginelens.hooks.insertion import Insertion
from imaginelens.hooks.positions import inserted
from imaginelens.hooks.tokens import Kind

STRINGS = ("<|start-latent|>", "<|end-latent|>", "<|latent|>")
D, PATCHES, MAX_NEW = 64, 4, 6
SIZES = ((48, 32), (24, 40), (40, 40))  # 24, 15 and 25 tokens
TEXTS = ("what colour?", "where is the red cube?", "how many cats are there now, all in all?")
PICTURE = tiny.prompt("qwen2_vl", "")


@cache
def built(kind: str = "qwen2_vl") -> tiny.Built:
    with mock.patch.object(tiny, "LATENT", STRINGS):
        return tiny.fresh(kind)


def spec_of(inserts: Insertion | None = None) -> il.LatentSpec:
    return replace(FAMILIES["ivt-lr"], inserts=inserts or Insertion(patches=PATCHES))


def lens_of(inserts: Insertion | None = None, kind: str = "qwen2_vl") -> il.LatentModel:
    return il.LatentModel(*built(kind), spec=spec_of(inserts))


def example(i: int = 0, n: int = 3, behind: str = "") -> dict[str, Any]:
    text = tiny.prompt("qwen2_vl", TEXTS[i]) + n * "<|latent|>" + behind
    return {"images": tiny.image(*SIZES[i], seed=i), "text": text}


def judged(
    lens: il.LatentModel,
    given: Any,
    *,
    patches: int = PATCHES,
    max_new: int = MAX_NEW,
    **more: Any,
) -> loops.Trace:
    prompt = lens.prompt(given)
    plain = getattr(prompt, "plain", None) or prompt
    machine = loops.Machine(lens.model, dict(plain.inputs), max_new, lens.tokenizer.eos_token_id)
    pad = lens.span_tokens.pad
    return loops.ivtlr(machine, latent_token_id=pad, num_selected_patches=patches, **more)


def assert_same(run: il.Run, trace: loops.Trace, row: int = 0) -> None:
    start, n = run.tokens.start(row), len(trace.ids)
    assert run.sequences[row, start : start + n].tolist() == trace.ids
    assert set(run.tokens.kind[row, start + n :].tolist()) <= {0}
    assert (il.latent.resolve(run.tokens, row) - start).tolist() == sorted(trace.fed)
    assert run.trigger.emitted[row] == len(trace.fed)
    again = inserted.resolve(run.tokens, row)
    assert (again - start).tolist() == sorted(trace.again)
    if not trace.fed:
        return
    mine = run.latents[row, : len(trace.fed)]
    torch.testing.assert_close(mine, trace.latents, rtol=0, atol=1e-10)
    numbers, embeddings = zip(*(trace.again[place] for place in sorted(trace.again)), strict=True)
    mine = run.inserted[row, : len(again)]
    torch.testing.assert_close(mine, torch.stack(embeddings), rtol=0, atol=1e-10)
    last = run.tokens.grids[row][-1]
    cells = run.tokens.cell[row, again]
    assert (cells[:, 0] * last.cols + cells[:, 1]).tolist() == list(numbers)


# ---- the loop equals its reference ---------------------------------------------------------------


@pytest.mark.parametrize("n", [1, 2, 3])
@pytest.mark.parametrize("behind", ["", " so?"])
@pytest.mark.parametrize("i", [0, 1, 2])
def test_the_loop_equals_its_reference(i: int, n: int, behind: str) -> None:
    """A cache that is read on from equals reading everything anew, with what has been put in."""
    lens = lens_of()
    run = lens.run(example(i, n, behind), max_new_tokens=MAX_NEW, keep_logits=True)
    assert_same(run, judged(lens, example(i, n, behind)))
    assert controls.path_gap(lens, run) < 1e-9
    found = [(s.opened_by, s.ended_by, s.steps) for s in run.trigger.spans]
    assert found == [("prompt", "prompt", n)]
    assert run.forwards == n + run.logits.shape[1]


def test_a_batch_equals_the_reference_row_by_row() -> None:
    """Left padding, other pictures, placeholders at other columns, of other number, or none."""
    lens = lens_of()
    given = [
        example(0),
        example(1, n=1, behind=" and more"),
        example(2, n=0),
        example(2, behind=" so?"),
        example(0, behind=" s"),
    ]
    run = lens.run(given, max_new_tokens=MAX_NEW, keep_logits=True)
    for row, one in enumerate(given):
        assert_same(run, judged(lens, one), row)
    assert run.trigger.emitted == (3, 1, 0, 3, 3)
    assert run.latent_span[0].tolist() == [0, 0, 0]
    assert controls.path_gap(lens, run) < 1e-9


def test_blocks_of_two_rows_that_begin_one_column_apart() -> None:
    """Each cut of one row's block falls into a block of the other."""
    lens = lens_of()
    for gap in range(1, PATCHES + 2):
        given = [example(0), example(0, behind="x" * gap)]
        run = lens.run(given, max_new_tokens=3, keep_logits=True)
        for row, one in enumerate(given):
            assert_same(run, judged(lens, one, max_new=3), row)
        assert controls.path_gap(lens, run) < 1e-9


def test_several_pictures_and_only_the_last_comes_again() -> None:
    lens = lens_of()
    pictures = [tiny.image(*SIZES[i], seed=7 + i) for i in (2, 0)]
    given = {"images": pictures, "text": 2 * PICTURE + "which?" + 3 * "<|latent|>"}
    run = lens.run(given, max_new_tokens=MAX_NEW)
    assert_same(run, judged(lens, given))
    assert set(run.tokens.image[0, inserted.resolve(run.tokens, 0)].tolist()) == {1}


def test_every_cell_comes_at_most_once_and_all_may() -> None:
    lens = lens_of(Insertion(patches=5))
    run = lens.run(example(1), max_new_tokens=2)  # 15 tokens, three times five
    assert_same(run, judged(lens, example(1), patches=5, max_new=2))
    cells = {tuple(c) for c in run.tokens.cell[0, inserted.resolve(run.tokens, 0)].tolist()}
    assert len(cells) == 15


def test_positions_count_one_by_one_over_pictures_too() -> None:
    lens = lens_of()
    run = lens.run([example(0), example(1)], max_new_tokens=3)
    for row in range(2):
        start = run.tokens.start(row)
        own = run.position_ids[-3:, row, start:]
        assert torch.equal(own, torch.arange(own.shape[-1]).expand_as(own))


def test_the_references_attention_is_the_models() -> None:
    """What the reference computes by hand is what `output_attentions` rounds to float32."""
    lens = lens_of()
    model = lens.model
    prompt = lens.prompt(example(n=0))
    machine = loops.Machine(model, dict(prompt.inputs), 1, 2)
    embeds = machine.embed()
    _, mine = machine.read(embeds)
    language = model.model.language_model
    before = model.config._attn_implementation
    model.set_attn_implementation("eager")
    try:
        with torch.no_grad():
            out = language(
                inputs_embeds=embeds[None],
                position_ids=torch.arange(len(embeds)).expand(3, 1, -1),
                output_attentions=True,
                use_cache=False,
            )
    finally:
        model.set_attn_implementation(before)
    theirs = torch.stack([a[0, :, -1] for a in out.attentions])
    torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-5)


# ---- comparisons that must fail ------------------------------------------------------------------


class Other(Insertion):
    """Averages attention over something else than all layers and heads."""

    def pick(self, looked: torch.Tensor, used: torch.Tensor) -> torch.Tensor:
        return super().pick(looked[self.part], used)


class LastLayer(Other):
    part = slice(-1, None)


class FirstHead(Other):
    part = (slice(None), slice(0, 1))


class Forgetful(Insertion):
    """Lets a token come twice."""

    def pick(self, looked: torch.Tensor, used: torch.Tensor) -> torch.Tensor:
        return super().pick(looked, torch.zeros_like(used))


@pytest.mark.parametrize("wrong", [LastLayer, FirstHead, Forgetful])
def test_another_choice_is_told_apart_from_the_reference(wrong: type[Insertion]) -> None:
    trace = judged(lens_of(), example())
    run = lens_of(wrong(patches=PATCHES)).run(example(), max_new_tokens=MAX_NEW)
    with pytest.raises(AssertionError):
        assert_same(run, trace)


@pytest.mark.parametrize(
    ("part", "wrong"),
    [(slice(-1, None), LastLayer), ((slice(None), slice(0, 1)), FirstHead)],
)
def test_the_other_choice_equals_a_reference_that_chooses_so(
    part: Any, wrong: type[Insertion]
) -> None:
    """They differ in that choice alone."""

    def average(attentions: torch.Tensor) -> torch.Tensor:
        return attentions[part].flatten(0, 1).mean(0)

    run = lens_of(wrong(patches=PATCHES)).run(example(), max_new_tokens=MAX_NEW)
    assert_same(run, judged(lens_of(), example(), average=average))


def test_coconuts_loop_and_positions_are_told_apart_from_the_reference() -> None:
    lens = lens_of()
    trace = judged(lens, example())
    plain = il.LatentModel(*built(), spec=replace(spec_of(), inserts=None))
    with pytest.raises(AssertionError):
        assert_same(plain.run(example(), max_new_tokens=MAX_NEW), trace)
    with mock.patch("imaginelens.hooks.generate.count_on", lambda positions, _: positions):
        run = lens.run(example(), max_new_tokens=MAX_NEW)
    with pytest.raises(AssertionError):
        assert_same(run, trace)


# ---- the map and its selectors -------------------------------------------------------------------


def test_what_comes_again_is_marked_before_and_after_the_run() -> None:
    lens = lens_of()
    run = lens.run(example(), max_new_tokens=2)
    before = lens.tokens(example())
    for tokens in (before, run.tokens):
        assert il.latent.resolve(tokens, 0).tolist() == (
            np.flatnonzero(tokens.kind[0] == Kind.LATENT).tolist()
        )
        for step in range(3):
            columns = inserted[step].resolve(tokens, 0)
            latent = int(il.latent[step].resolve(tokens, 0)[0])
            assert columns.tolist() == list(range(latent - PATCHES, latent))
        assert len(inserted.resolve(tokens, 0)) == 3 * PATCHES
        assert len(il.image.resolve(tokens, 0)) == 24
    assert (repr(inserted), repr(inserted[1])) == ("inserted", "inserted[1]")
    shown = run.tokens[0][int(inserted.resolve(run.tokens, 0)[0])]
    assert (shown.kind, shown.image, shown.step) == (Kind.INSERTED, 0, 0)
    assert shown.row >= 0
    assert shown.box is not None
    assert before.token(0, shown.column).row == -1  # not known yet
    assert "12 inserted" in repr(run.tokens)


def test_states_are_captured_and_edited_where_image_tokens_come_again() -> None:
    lens = lens_of()
    site = "blocks.1.hook_resid_post"
    run = lens.run(
        example(), names_filter=[site, "blocks.0.hook_resid_pre"], positions=[inserted],
        max_new_tokens=2, keep_logits=True,
    )  # fmt: skip
    laid = run.cache["blocks.0.hook_resid_pre"][0]
    torch.testing.assert_close(laid, run.inserted[0], rtol=0, atol=1e-12)
    with lens.edit(il.Zero(), at=inserted[1], site=site) as landing:
        changed = lens.run(example(), max_new_tokens=2, keep_logits=True)
    assert landing.fired
    assert torch.equal(changed.latents[0, :2], run.latents[0, :2])
    assert (changed.latents[0, 2] - run.latents[0, 2]).abs().max() > 1e-3
    with pytest.raises(il.SiteUnavailable, match=r"edit 'blocks\.0\.hook_resid_pre' there"):
        with lens.edit(il.Zero(), at=inserted, site="hook_embed"):
            lens.run(example(), max_new_tokens=2)


# ---- edits ---------------------------------------------------------------------------------------


def test_edits_of_latents_land() -> None:
    lens = lens_of()
    run = lens.run(example(), max_new_tokens=MAX_NEW, keep_logits=True)
    assert controls.sham_difference(lens, run, site="hook_latent", at=il.latent)[0] == 0.0
    with lens.edit(il.Sham(), at=il.latent):
        again = lens.run(example(), max_new_tokens=MAX_NEW, keep_logits=True)
    assert torch.equal(again.logits, run.logits)
    assert torch.equal(again.latents, run.latents)
    zero = torch.zeros(D, dtype=torch.float64)
    with lens.edit(il.Zero(), at=il.latent[1]) as landing:
        free = lens.run(example(), max_new_tokens=MAX_NEW, keep_logits=True)
        fixed = lens.run_with_hooks(run)
    assert landing.fired
    assert torch.equal(free.latents[0, 0], run.latents[0, 0])
    assert torch.equal(free.inserted[0, : 2 * PATCHES], run.inserted[0, : 2 * PATCHES])
    assert (free.latents[0, 2] - run.latents[0, 2]).abs().max() > 1e-3
    assert_same(free, judged(lens, example(), replaced={1: zero}))
    assert controls.path_gap(lens, free) < 1e-9
    unedited = lens.run_with_hooks(run)
    first = int(il.latent.resolve(run.tokens, 0)[1])
    assert torch.equal(fixed[0, :first], unedited[0, :first])
    assert (fixed[0, first:] - unedited[0, first:]).abs().max() > 1e-3


def test_a_latent_edit_changes_what_comes_again_behind_it() -> None:
    lens = lens_of()
    run = lens.run(example(), max_new_tokens=2)
    far = torch.full((D,), 9.0, dtype=torch.float64)
    with lens.edit(il.Replace(far), at=il.latent[0]):
        changed = lens.run(example(), max_new_tokens=2)
    assert torch.equal(changed.inserted[0, :PATCHES], run.inserted[0, :PATCHES])
    assert not torch.equal(changed.inserted, run.inserted)
    assert_same(changed, judged(lens, example(), replaced={0: far}, max_new=2))


def test_an_edited_picture_comes_again_edited_and_an_edited_pattern_picks_others() -> None:
    lens = lens_of()
    run = lens.run(example(), max_new_tokens=2)
    with lens.edit(il.Zero(), at=il.image, site="vision_projector.hook_out"):
        dark = lens.run(example(), max_new_tokens=2)
    assert not dark.inserted.any()
    with lens.edit(il.Zero(), at=il.image, site="blocks.0.hook_resid_pre"):
        stream = lens.run(example(), max_new_tokens=2)
    assert stream.inserted.any()  # the stream was edited, not the embeddings
    columns = il.image.resolve(run.tokens, 0)
    chosen = int(columns[0])

    def stare(act: torch.Tensor, hook: Any) -> torch.Tensor:
        act = act.clone()
        if act.shape[-1] > chosen:
            act[..., chosen] = 9.0
        return act

    with lens.hooks([("blocks.*.attn.hook_pattern", stare)]):
        stared = lens.run(example(), max_new_tokens=2)
    first = inserted[0].resolve(stared.tokens, 0)
    assert [0, 0] in stared.tokens.cell[0, first].tolist()


def test_a_swap_brings_the_donors_latents() -> None:
    lens = lens_of()
    donor = lens.run([example(1), example(2)], max_new_tokens=2)
    with lens.edit(il.Swap(donor), at=il.latent):
        swapped = lens.run([example(0), example(0)], max_new_tokens=2)
    assert torch.equal(swapped.latents, donor.latents)
    for context in ("free", "fixed"):
        result = lens.swap(example(0), example(1), context=context, metric=il.kl)
        assert (result.after > 1e-6).all()


# ---- loop control --------------------------------------------------------------------------------


def test_skip_reads_the_prompt_as_it_was_and_force_says_where_they_belong() -> None:
    lens = lens_of()
    run = lens.run(example(), max_new_tokens=4, latents=il.Skip())
    assert run.trigger.emitted == (0,)
    assert run.inserted is None
    assert not len(inserted.resolve(run.tokens, 0))
    plain = lens.prompt(example()).plain.inputs
    stock = lens.model.generate(**plain, max_new_tokens=4, do_sample=False)
    assert torch.equal(run.sequences[:, : stock.shape[1]], stock)
    assert torch.equal(lens.rerun(run).sequences, run.sequences)
    with pytest.raises(il.CheckpointError, match="write 2 of them into it"):
        lens.run(example(), latents=il.Force(2))


def test_a_run_is_made_again_from_its_widened_prompt() -> None:
    lens = lens_of()
    run = lens.run([example(0), example(1, n=2)], max_new_tokens=4)
    again = lens.rerun(run)
    assert torch.equal(again.sequences, run.sequences)
    assert torch.equal(again.latents, run.latents)
    assert torch.equal(lens.retell(run, like=run).latents, run.latents)


# ---- what is refused -----------------------------------------------------------------------------


def test_prompts_in_which_nothing_can_come_again_are_refused() -> None:
    lens = lens_of()
    with pytest.raises(il.InputError, match=r"row 0 has 3 latents, .* its last picture has 0"):
        lens.run({"text": "what?" + 3 * "<|latent|>"})
    with pytest.raises(il.InputError, match=r"give a picture of 16 tokens or more"):
        lens.run(example(1, n=4))
    with pytest.raises(il.InputError, match="row 1 do not stand side by side"):
        lens.run([example(0), example(0, n=1, behind=" and <|latent|>")])
    behind = {"images": example()["images"], "text": "a" + 3 * "<|latent|>" + PICTURE}
    with pytest.raises(il.InputError, match="put the images first"):
        lens.run(behind)
    inputs = dict(lens.prompt(example()).plain.inputs)
    inputs["position_ids"] = torch.zeros_like(inputs["input_ids"])
    with pytest.raises(il.InputError, match="brings position_ids"):
        lens.run(inputs)


def test_a_picture_of_one_row_in_the_block_of_another_is_refused() -> None:
    """A block begins before its placeholder, and the pictures of all rows before that."""
    lens = lens_of()
    many = {"images": tiny.image(64, 64, seed=1), "text": PICTURE + "?"}
    with pytest.raises(il.InputError, match="run examples one by one"):
        lens.run([example(1, behind=" x" * 20), many])


def test_specs_that_cannot_insert_are_refused() -> None:
    with pytest.raises(ValueError, match=r"Insertion\(patches=0\) puts nothing in"):
        Insertion(patches=0)
    with pytest.raises(ValueError, match="inserts image tokens before placeholders"):
        replace(spec_of(), feeds="embedding")


# ---- folders -------------------------------------------------------------------------------------


def opened(folder: Path, inserts: Insertion | None = None) -> il.LatentModel:
    """A checkpoint as merging its adapters would leave it."""
    model, processor = built()
    config = type(model.config).from_dict(model.config.to_dict())
    config.dtype = torch.float64
    config.save_pretrained(folder)
    model.generation_config.save_pretrained(folder)
    processor.tokenizer.save_pretrained(folder)
    processor.image_processor.save_pretrained(folder)
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return il.load(folder, spec=spec_of(inserts), dtype=torch.float64)


def test_a_folder_opens_by_name_and_reproduces_its_latents(tmp_path: Path) -> None:
    lens = opened(tmp_path)
    assert_same(lens.run(example(), max_new_tokens=MAX_NEW), judged(lens_of(), example()))
    named = il.load(tmp_path, spec="ivt-lr", dtype=torch.float64)
    assert named.spec == FAMILIES["ivt-lr"]
    assert named.spec.inserts.patches == 32
    assert named.spec.placeholders == 3 * "<|latent|>"
    shown = "one for each '<|latent|>' of the prompt, 32 image tokens before each"
    assert shown in str(named.describe())


@pytest.mark.parametrize("kind", ["qwen2_5_vl", "llava"])
def test_other_models_can_be_run_so(kind: str) -> None:
    """Nobody released this, but generating and reading agree, and a batch is its rows."""
    lens = lens_of(kind=kind)
    given = [
        {
            "images": tiny.image(32, 32, seed=i),
            "text": tiny.prompt(kind, TEXTS[i]) + 3 * "<|latent|>",
        }
        for i in range(2)
    ]
    batch = lens.run(given, max_new_tokens=3, keep_logits=True)
    assert controls.path_gap(lens, batch) < 1e-9
    for row, one in enumerate(given):
        alone = lens.run(one, max_new_tokens=3)
        torch.testing.assert_close(alone.latents[0], batch.latents[row], rtol=0, atol=1e-9)
        torch.testing.assert_close(alone.inserted[0], batch.inserted[row], rtol=0, atol=1e-9)
