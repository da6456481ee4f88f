"""Latent Sketchpad: a head with a state, places on a grid, a span that a cue opens."""

from collections.abc import Mapping
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import reference_loops_sketch as loops
import tiny
import torch
import transformers as hf
from safetensors.torch import save_file
from transformers import LogitsProcessor

import imaginelens as il
from imaginelens.hooks import controls
from imaginelens.hooks.families import FAMILIES, family_of
from imaginelens.hooks.sketch_family import check_canvas
from imaginelens.hooks.sketchpad import HEAD, Cue, Sketch, Sketcher, build_sketch_head

D, VISION, HEADS, CELLS, ROOM, MAX_NEW = 64, 64, 2, 6, 24, 24
ACTION = "#"  # a byte of the tiny tokenizer
SIZES = ((24, 16), (16, 24), (48, 8))  # six cells each, in other grids
TEXTS = ("what colour?", "where is the red cube?", "how many cats are there now?")


# ---- the tiny model ------------------------------------------------------------------------------


def qwen() -> tiny.Built:
    """A Qwen2.5-VL whose vision heads are as wide as the head's rotary positions."""
    vision = {
        "depth": 2, "hidden_size": VISION, "intermediate_size": 48, "out_hidden_size": D,
        "window_size": 2 * tiny.CELL, "fullatt_block_indexes": [1],
    }  # fmt: skip
    return tiny._qwen(
        hf.Qwen2_5_VLConfig, hf.Qwen2_5_VLForConditionalGeneration, hf.Qwen2_5_VLProcessor,
        vision, rope_parameters=tiny._mrope(2, 3, 3),
    )  # fmt: skip


@cache
def built() -> tiny.Built:
    with mock.patch.dict(tiny.FAMILIES, {"sketching": qwen}):
        return tiny.fresh("sketching")


@cache
def weights(seed: int = 3) -> Mapping[str, torch.Tensor]:
    """Loud weights of the head, by the names that its training saves."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    def matrix(*shape: int) -> torch.Tensor:
        return 1.5 * draw(*shape) / shape[-1] ** 0.5

    def norm(name: str) -> dict[str, torch.Tensor]:
        return {f"{name}.weight": 1 + 0.1 * draw(VISION), f"{name}.bias": 0.1 * draw(VISION)}

    def feed(name: str) -> dict[str, torch.Tensor]:
        return {
            **norm(f"{name}.0"),
            f"{name}.1.weight": matrix(4 * VISION, VISION),
            f"{name}.4.weight": matrix(VISION, 4 * VISION),
        }

    found = {
        "mlp.0.weight": matrix(D, D), "mlp.0.bias": 0.1 * draw(D),
        "mlp.2.weight": matrix(4 * VISION, D), "mlp.2.bias": 0.1 * draw(4 * VISION),
        "perceiver.pos_emb.weight": draw(4 * (ROOM + CELLS) + 8, VISION),
        "perceiver.rotary_pos_emb.inv_freq": 10_000.0 ** -(torch.arange(16).double() / 16),
    }  # fmt: skip
    for i in range(2):
        name = f"perceiver.perceive_layers.{i}"
        found |= norm(f"{name}.0.norm") | norm(f"{name}.0.context_norm") | feed(f"{name}.1")
        found |= {
            f"{name}.0.to_q.weight": matrix(VISION, VISION),
            f"{name}.0.to_kv.weight": matrix(2 * VISION, VISION),
            f"{name}.0.to_out.weight": matrix(VISION, VISION),
            f"{name}.0.to_out.bias": 0.1 * draw(VISION),
        }
    for i in range(3):
        name = f"perceiver.layers.{i}"
        found |= norm(f"{name}.0.norm") | feed(f"{name}.1")
        found |= {
            f"{name}.0.to_qkv.weight": matrix(3 * VISION, VISION),
            f"{name}.0.to_out.weight": matrix(VISION, VISION),
        }
    return {HEAD + name: value for name, value in found.items()}


def sketcher() -> Sketcher:
    return Sketcher(build_sketch_head(weights(), HEADS), room=ROOM)


def spec_of(project: Sketcher | None = None) -> il.LatentSpec:
    cue = Cue(token=built()[1].tokenizer(ACTION)["input_ids"][0], after=3)
    return replace(
        FAMILIES["latent-sketchpad"].with_steps(CELLS), project=project or sketcher(), cue=cue
    )


def lens_of(project: Sketcher | None = None) -> il.LatentModel:
    return il.LatentModel(*built(), spec=spec_of(project))


def example(i: int = 0) -> dict[str, Any]:
    picture = tiny.image(*SIZES[i], seed=i)
    return {"images": picture, "text": tiny.prompt("qwen2_5_vl", TEXTS[i])}


# ---- plans and their judge -----------------------------------------------------------------------


class Plan(LogitsProcessor):
    """Has rows sample given tokens at given steps, and no special token anywhere else."""

    def __init__(self, plans: list[dict[int, int]], width: int, banned: list[int]) -> None:
        self.plans, self.width, self.banned = plans, width, banned

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        step = input_ids.shape[1] - self.width
        scores = scores.clone()
        scores[:, self.banned] = -1e9
        for row, plan in enumerate(self.plans):
            if step in plan:
                scores[row] = -1e9
                scores[row, plan[step]] = 0
        return scores


def plan_of(lens: il.LatentModel, plans: list[dict[int, str]], width: int) -> Plan:
    ids = lens.span_tokens
    roles = {"open": ids.open, "close": ids.close, "pad": ids.pad, "action": lens.spec.cue.token}
    roles["eos"] = lens.tokenizer.eos_token_id
    spelled = [{step: roles[role] for step, role in plan.items()} for plan in plans]
    return Plan(spelled, width, list(roles.values()))


def planned(
    lens: il.LatentModel,
    given: Any,
    plans: list[dict[int, str]],
    max_new: int = MAX_NEW,
    **more: Any,
) -> il.Run:
    width = lens.prompt(given).inputs["input_ids"].shape[1]
    generation = {"logits_processor": [plan_of(lens, plans, width)]}
    return lens.run(given, max_new_tokens=max_new, generation=generation, **more)


def judged(
    lens: il.LatentModel,
    given: Any,
    plan: dict[int, str],
    max_new: int = MAX_NEW,
    *,
    forgets: bool = False,
    replaced: Mapping[int, torch.Tensor] | None = None,
) -> loops.Trace:
    inputs = dict(lens.prompt(given).inputs)
    head = loops.regression_head(
        weights(), heads=HEADS, max_prefix_len=ROOM, image_seq_len=CELLS, forgets=forgets
    )
    ids = lens.span_tokens
    machine = loops.Machine(
        lens.model, inputs, plan_of(lens, [plan], inputs["input_ids"].shape[1]), max_new,
        lens.tokenizer.eos_token_id, ids.open, ids.close, CELLS,
    )  # fmt: skip
    cue = lens.spec.cue.token
    return loops.sketchpad(machine, action_id=cue, head=head, replaced=replaced)


def assert_same(run: il.Run, trace: loops.Trace, row: int = 0) -> None:
    start, n = run.tokens.prompt_width, len(trace.written)
    assert run.sequences[row, start : start + n].tolist() == trace.written
    assert set(run.tokens.kind[row, start + n :].tolist()) <= {0}
    columns = il.latent.resolve(run.tokens, row) - start
    assert columns.tolist() == sorted(trace.fed)
    assert run.trigger.emitted[row] == len(trace.fed)
    if trace.fed:
        mine = run.latents[row, : len(trace.fed)]
        torch.testing.assert_close(mine, trace.latents, rtol=0, atol=1e-10)


PLANS: dict[str, dict[int, str]] = {
    "never": {},
    "open": {1: "open"},
    "cue": {1: "action"},
    "cue at once": {0: "action"},
    "two cues side by side": {1: "action", 2: "action"},
    "a cue that overtakes the count": {1: "action", 3: "action"},
    "a cue, then open before its time": {1: "action", 2: "open"},
    "a cue, and open at its last place": {1: "action", 3: "open"},
    "two spans": {1: "action", 12: "open"},
    "two spans side by side": {1: "open", 9: "open"},
    "close, open, end and cue inside": {
        1: "open", 3: "close", 4: "open", 5: "eos", 6: "action",
    },
    "ends at the cap": {1: "open", 8: "eos"},
    "ends behind": {1: "open", 10: "eos"},
    "cut by length": {20: "open"},
}  # fmt: skip


@pytest.mark.parametrize("plan", PLANS)
def test_the_loop_equals_its_reference(plan: str) -> None:
    lens = lens_of()
    run = planned(lens, example(), [PLANS[plan]], keep_logits=True)
    assert_same(run, judged(lens, example(), PLANS[plan]))
    assert controls.path_gap(lens, run) < 1e-9


@pytest.mark.parametrize("i", [1, 2])
def test_other_grids_equal_the_reference(i: int) -> None:
    lens = lens_of()
    run = planned(lens, example(i), [PLANS["two spans"]], keep_logits=True)
    assert_same(run, judged(lens, example(i), PLANS["two spans"]))
    assert controls.path_gap(lens, run) < 1e-9


def test_a_batch_equals_the_reference_row_by_row() -> None:
    """Left padding, other grids, rows that open at other steps, twice or never."""
    lens = lens_of()
    given = [example(i) for i in range(3)]
    for plans in (
        [PLANS["two spans"], PLANS["cue"], PLANS["never"]],
        [PLANS["ends behind"], PLANS["open"], PLANS["two spans side by side"]],
    ):
        run = planned(lens, given, plans, keep_logits=True)
        for row, one in enumerate(given):
            assert_same(run, judged(lens, one, plans[row]), row)
        assert controls.path_gap(lens, run) < 1e-9


def test_who_opened_a_span_is_told() -> None:
    lens = lens_of()
    run = planned(lens, example(), [PLANS["two spans"]])
    found = [(s.opened_by, s.ended_by, s.steps) for s in run.trigger.spans]
    assert found == [("forced", "cap", CELLS), ("sampled", "cap", CELLS)]
    written = run.sequences[0, run.tokens.prompt_width :].tolist()
    ids = lens.span_tokens
    assert written[4:12] == [ids.open, *[ids.pad] * CELLS, ids.close]


def test_positions_are_those_of_a_picture_in_the_place_of_the_sketch() -> None:
    lens = lens_of()
    run = planned(lens, example(1), [PLANS["open"]])
    columns = il.latent.resolve(run.tokens, 0)
    base = int(run.position_ids[-1, 0, columns[0] - 1]) + 1
    grid = run.tokens.grids[0][-1]
    assert (grid.rows, grid.cols) == (3, 2)
    cells = [(base, base + r, base + c) for r in range(3) for c in range(2)]
    assert run.position_ids[-3:, 0, columns].T.tolist() == [list(cell) for cell in cells]
    assert run.position_ids[-3:, 0, columns[-1] + 1].tolist() == [base + 3] * 3
    assert run.position_ids[-3:, 0, columns[-1] + 2].tolist() == [base + 4] * 3


# ---- comparisons that must fail ------------------------------------------------------------------


class Forgetful(Sketcher):
    """A head without a state: it sees the newest hidden state only."""

    def begin(self, images: torch.Tensor, merger: torch.nn.Module) -> Sketch:
        class Last(Sketch):
            def draw(self, h: torch.Tensor) -> torch.Tensor:
                self.states.clear()
                return super().draw(h)

        return Last(self, images, merger)


class Blind(Sketcher):
    """A head that does not look at the pictures."""

    def begin(self, images: torch.Tensor, merger: torch.nn.Module) -> Sketch:
        return super().begin(images[:0], merger)


def test_wrong_heads_and_places_are_told_apart_from_the_reference() -> None:
    right = sketcher()
    trace = judged(lens_of(), example(), PLANS["two spans"])
    for wrong in (Forgetful(right.head, ROOM), Blind(right.head, ROOM), Sketcher(right.head, 20)):
        run = planned(lens_of(wrong), example(), [PLANS["two spans"]])
        with pytest.raises(AssertionError):
            assert_same(run, trace)
    flat = il.LatentModel(*built(), spec=replace(spec_of(), on_grid=False))
    with pytest.raises(AssertionError):
        assert_same(planned(flat, example(), [PLANS["two spans"]]), trace)
    forgot = judged(lens_of(), example(), PLANS["open"], forgets=True)
    run = planned(lens_of(), example(), [PLANS["open"]])
    with pytest.raises(AssertionError):  # and the reference's own head can forget
        assert_same(run, forgot)


def test_a_first_latent_needs_no_memory_and_later_ones_do() -> None:
    right = sketcher()
    run = planned(lens_of(), example(), [PLANS["open"]])
    wrong = planned(lens_of(Forgetful(right.head, ROOM)), example(), [PLANS["open"]])
    assert torch.equal(run.latents[0, 0], wrong.latents[0, 0])
    assert (run.latents[0, 1] - wrong.latents[0, 1]).abs().max() > 1e-3


def test_the_second_sketch_looks_at_the_first() -> None:
    lens = lens_of()
    plan = PLANS["two spans side by side"]
    run = planned(lens, example(), [plan])
    with lens.edit(il.Zero(), at=il.span[0].latent[0]):
        changed = planned(lens, example(), [plan])
    assert (changed.latents[0, CELLS] - run.latents[0, CELLS]).abs().max() > 1e-6


# ---- edits and loop control ----------------------------------------------------------------------


def test_edits_of_latents_land() -> None:
    lens = lens_of()
    plan = [PLANS["cue"]]
    run = planned(lens, example(), plan, keep_logits=True)
    assert controls.sham_difference(lens, run, site="hook_latent", at=il.latent)[0] == 0.0
    with lens.edit(il.Sham(), at=il.latent):
        again = planned(lens, example(), plan, keep_logits=True)
    assert torch.equal(again.logits, run.logits)
    assert torch.equal(again.latents, run.latents)
    with lens.edit(il.Zero(), at=il.latent[2]) as landing:
        free = planned(lens, example(), plan, keep_logits=True)
        fixed = lens.run_with_hooks(run)
    assert landing.fired
    assert torch.equal(free.latents[0, :2], run.latents[0, :2])
    assert not free.latents[0, 2].any()
    assert (free.latents[0, 3] - run.latents[0, 3]).abs().max() > 1e-3
    assert controls.path_gap(lens, free) < 1e-9
    unedited = lens.run_with_hooks(run)
    first = int(il.latent.resolve(run.tokens, 0)[2])
    assert torch.equal(fixed[0, :first], unedited[0, :first])
    assert (fixed[0, first:] - unedited[0, first:]).abs().max() > 1e-3


def test_a_replaced_latent_changes_the_later_ones_as_the_reference_says() -> None:
    """In its own sketch through the model's states, in the next one also as a picture."""
    lens = lens_of()
    vector = torch.full((D,), 0.7, dtype=torch.float64)
    plan = PLANS["two spans side by side"]
    with lens.edit(il.Replace(vector), at=il.latent[2]):
        changed = planned(lens, example(), [plan])
    assert_same(changed, judged(lens, example(), plan, replaced={2: vector}))


def test_a_prompt_with_several_pictures() -> None:
    """The last one gives the grid, and the head sees them all."""
    lens = lens_of()
    pictures = [tiny.image(16, 16, seed=5), tiny.image(*SIZES[1], seed=6)]
    given = {"images": pictures, "text": 2 * tiny.prompt("qwen2_5_vl", "and then ")}
    run = planned(lens, given, [PLANS["two spans"]], keep_logits=True)
    assert_same(run, judged(lens, given, PLANS["two spans"]))
    assert controls.path_gap(lens, run) < 1e-9
    plans = [PLANS["cue"], PLANS["open"]]
    batch = planned(lens, [example(), given], plans)
    for row, one in enumerate([example(), given]):
        assert_same(batch, judged(lens, one, plans[row]), row)


def test_a_swap_brings_the_donors_sketch() -> None:
    lens = lens_of()
    base, source = [example(0), example(1)], [example(2), example(2)]
    plans = [PLANS["open"], PLANS["cue"]]
    donor = planned(lens, source, plans)
    with lens.edit(il.Swap(donor), at=il.latent):
        swapped = planned(lens, base, plans)
    assert torch.equal(swapped.latents, donor.latents)


def test_an_edited_picture_is_what_the_head_looks_at() -> None:
    """An edit behind the projector reaches the head; one of the stream alone reaches its states."""
    lens = lens_of()
    run = planned(lens, example(), [PLANS["open"]])
    blind = planned(lens_of(Blind(sketcher().head, ROOM)), example(), [PLANS["open"]])
    assert (run.latents[0, 0] - blind.latents[0, 0]).abs().max() > 1e-6
    with lens.edit(il.Zero(), at=il.image, site="vision_projector.hook_out"):
        dark = planned(lens, example(), [PLANS["open"]])
    with lens.edit(il.Zero(), at=il.image, site="blocks.0.hook_resid_pre"):
        stream = planned(lens, example(), [PLANS["open"]])
    assert (dark.latents[0, 0] - stream.latents[0, 0]).abs().max() > 1e-6


def test_skip_and_force() -> None:
    lens = lens_of()
    width = lens.prompt(example()).inputs["input_ids"].shape[1]
    cue = {"logits_processor": [plan_of(lens, [PLANS["cue"]], width)]}
    skipped = lens.run(example(), max_new_tokens=8, latents=il.Skip(), generation=cue)
    assert skipped.trigger.emitted == (0,)
    assert lens.span_tokens.open not in skipped.sequences[0, width:].tolist()
    forced = planned(lens, example(), [{}], latents=il.Force(4, at=2), keep_logits=True)
    assert [(s.opened_by, s.steps) for s in forced.trigger.spans] == [("forced", 4)]
    assert controls.path_gap(lens, forced) < 1e-9
    columns = il.latent.resolve(forced.tokens, 0)
    gone = forced.position_ids[-3:, 0, columns[-1] + 1] - forced.position_ids[-1, 0, columns[0]]
    assert gone.tolist() == [3, 3, 3]  # two rows of three cells
    with pytest.raises(il.InputError, match="in 6 cells, and latent-sketchpad draws 7 latents"):
        lens.run(example(), latents=il.Force(7, at=2))


def test_a_cue_counts_as_the_release_does() -> None:
    assert not Cue(token=7, after=3).opens([])
    assert Cue(token=7, after=1).opens([7])
    assert Cue(token=7, after=3).opens([7, 7])  # the second counts as one more place
    assert not Cue(token=7, after=3).opens([7, 1, 7])  # and here the count runs past
    assert Cue(token=7, after=3).opens([7, 1, 2, 9, 9, 7, 1, 2])
    with pytest.raises(ValueError, match=r"Cue\(after=0\)"):
        Cue(token=7, after=0)


# ---- what is refused -----------------------------------------------------------------------------


def test_prompts_without_a_place_for_the_sketch_are_refused() -> None:
    lens = lens_of()
    small = {"images": tiny.image(16, 16, seed=0), "text": example()["text"]}
    with pytest.raises(il.InputError, match="row 1 shows its last picture in 4 cells"):
        lens.run([example(), small])
    with pytest.raises(il.InputError, match="row 0 shows no picture"):
        lens.run({"text": "draw"})
    with pytest.raises(il.CheckpointError, match="positions have one axis only"):
        check_canvas(lens.tokens(example()), lens.spec, mrope=False)
    crowded = lens_of(Sketcher(sketcher().head, room=5))
    with pytest.raises(il.InputError, match=r"6 image tokens before a sketch, .* look back at 5"):
        planned(crowded, example(), [PLANS["open"]])


def test_a_spec_that_draws_and_projects_is_refused() -> None:
    for change in ({"project_unembeds": True}, {"slot": "replace"}, {"open": None}):
        with pytest.raises(ValueError, match="draws its latents"):
            replace(spec_of(), **change)


# ---- folders -------------------------------------------------------------------------------------


def write(folder: Path, extras: Mapping[str, torch.Tensor]) -> None:
    """A checkpoint as its training leaves it: the names of transformers 4.54, its own class."""
    model, processor = built()
    folder.mkdir(exist_ok=True)
    config = type(model.config).from_dict(model.config.to_dict())
    config.dtype, config.architectures = torch.float64, ["UniQwenForConditionalGeneration"]
    config.save_pretrained(folder)
    model.generation_config.save_pretrained(folder)
    processor.tokenizer.save_pretrained(folder)
    processor.image_processor.save_pretrained(folder)
    own = {k: v.clone() for k, v in model.state_dict().items()}
    tower = {  # kept for training alone
        k.replace("model.visual.", "vision_tower."): v.clone()
        for k, v in own.items()
        if k.startswith("model.visual.") and ".merger.mlp" not in k
    }
    legacy = {
        k.replace("model.language_model.", "model.").replace("model.visual.", "visual."): v
        for k, v in own.items()
    }
    held = {**legacy, **tower, **extras}
    save_file(held, folder / "model.safetensors", metadata={"format": "pt"})


def opened(folder: Path) -> il.LatentModel:
    """The model of a folder, with the tiny cue, sketches of six cells and little room."""
    write(folder, weights())
    lens = il.load(folder, spec=replace(spec_of(), project=None), dtype=torch.float64)
    small = replace(lens.spec, project=replace(lens.spec.project, room=ROOM))
    return il.LatentModel(lens.model, lens.processor, spec=small)


def test_a_folder_opens_by_name_and_reproduces_its_latents(tmp_path: Path) -> None:
    write(tmp_path, weights())
    named = il.load(tmp_path, spec="latent-sketchpad", dtype=torch.float64)
    assert named.spec.name == "latent-sketchpad"
    assert isinstance(named.spec.project, Sketcher)
    assert named.spec.project.room == 4096
    shown = str(named.describe())
    assert "exactly 256 steps" in shown
    assert "(sampled, or 3 places behind token 522)" in shown
    for name, value in named.spec.project.head.state_dict().items():
        assert torch.equal(value, weights()[HEAD + name])
    run = planned(opened(tmp_path), example(), [PLANS["two spans"]])
    assert_same(run, judged(lens_of(), example(), PLANS["two spans"]))


def test_a_folder_without_the_head_is_refused(tmp_path: Path) -> None:
    write(tmp_path, {})
    with pytest.raises(il.CheckpointError, match=r"needs the weights regression_head\.\* of its"):
        il.load(tmp_path, spec="latent-sketchpad")
    for gone in ("perceiver.rotary_pos_emb.inv_freq", "perceiver.layers.1.0.to_qkv.weight"):
        write(tmp_path, {k: v for k, v in weights().items() if k != HEAD + gone})
        with pytest.raises(il.CheckpointError, match="regression_head"):
            il.load(tmp_path, spec="latent-sketchpad")
    with pytest.raises(il.CheckpointError, match="of its vision head, and the checkpoint holds no"):
        il.LatentModel(*built(), spec="latent-sketchpad")


def test_no_qwen_is_taken_for_a_sketchpad() -> None:
    """Its tokens are those of every Qwen2.5-VL."""
    model, processor = built()
    assert set(FAMILIES["latent-sketchpad"].strings) <= set(processor.tokenizer.get_vocab())
    with mock.patch.object(tiny, "LATENT", ("<a>", "<b>", "<c>")):
        plain = tiny.tokenizer("<|vision_start|>", "<|vision_end|>", "<|image_pad|>", bos=False)
    assert family_of(model.config, plain) is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_head_takes_the_precision_of_its_weights(dtype: torch.dtype) -> None:
    held = {name: value.to(dtype) for name, value in weights().items()}
    head = build_sketch_head(held, HEADS)
    z = head(torch.ones(2, D, dtype=dtype), torch.ones(1, D, dtype=dtype), ROOM)
    assert z.dtype == dtype
    assert z.shape == (4, VISION)
    assert z.isfinite().all()
    far = head.perceiver.rotary_pos_emb(torch.tensor([16384, 16385]))
    assert torch.equal(far[0], far[1]) == (dtype == torch.bfloat16)  # as released


def test_a_latent_is_known_to_depend_on_more_than_the_state_before_it() -> None:
    assert spec_of().looks_back
    assert FAMILIES["ivt-lr"].looks_back
    assert not FAMILIES["coconut"].looks_back
    assert not FAMILIES["lvr"].looks_back
