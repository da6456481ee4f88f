"""A map by the fast path is the map of one forward for each cell, wherever it claims to be."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import tiny
import torch

import imaginelens as il
from imaginelens.hooks import EditTouchedNothing, InputError, SiteUnavailable
from imaginelens.hooks.prefix import prefix_of, why_not
from imaginelens.mediation import behind_prefix
from imaginelens.mediation.errors import ControlError
from imaginelens.mediation.sweep import Sweep, sweep, widened

SPEC = il.LatentSpec(
    name="test", open="<|latent_start|>", close="<|latent_end|>", pad="<|latent_pad|>",
    max_steps=3, trigger="forced", forced_at=1, fixed=True,
)  # fmt: skip
IN_BLOCKS = (
    "hook_resid_pre", "attn.hook_q", "attn.hook_k", "attn.hook_v", "attn.hook_rot_q",
    "attn.hook_rot_k", "attn.hook_z", "hook_attn_out", "hook_resid_mid", "mlp.hook_pre",
    "mlp.hook_post", "hook_mlp_out", "hook_resid_post",
)  # fmt: skip
AROUND = ["hook_latent", "ln_final.hook_normalized", "unembed.hook_out"]
SITES = [f"blocks.*.{site}" for site in IN_BLOCKS] + AROUND
SIZES = ((48, 32), (24, 40), (40, 40), (48, 32))
TEXTS = ("what colour?", "where is the red cube?", "how many cats?", "what is it?")
UNCHECKED = getattr(sweep, "__wrapped__", sweep)  # by its own sentences, not by beartype
REPRESENTATIVE = ("qwen2_5_vl", "qwen3_vl", "gemma3", "llava", "paligemma")


def lens_of(name: str, spec: Any = SPEC) -> il.LatentModel:
    lens = il.LatentModel(*tiny.build(name), spec=spec, answer=lambda text: text[-4:-2] or None)
    lens.model.generation_config.max_new_tokens = 10
    return lens


def pairs_of(name: str) -> il.Pairs:
    """Two pairs; no two of the four inputs have one length or one picture size."""
    examples = [
        {"images": tiny.image(*size, seed=i), "text": tiny.prompt(name, text)}
        for i, (size, text) in enumerate(zip(SIZES, TEXTS, strict=True))
    ]
    return il.Pairs(
        base=examples[:2], source=examples[2:], base_answers=["a", "b"], source_answers=["x", "y"]
    )


def same(fast: il.EffectMap, slow: il.EffectMap, *, off: float = 1e-12) -> None:
    assert fast.cells == slow.cells
    assert np.array_equal(fast.flags, slow.flags)
    np.testing.assert_allclose(fast.effect, slow.effect, rtol=0, atol=off)
    np.testing.assert_allclose(fast.before, slow.before, rtol=0, atol=off)
    np.testing.assert_allclose(fast.change, slow.change, rtol=0, atol=off)


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[] if name in REPRESENTATIVE else [pytest.mark.slow])
        for name in tiny.FAMILIES
    ],
)
def test_fast_is_slow_at_every_site(name: str) -> None:
    lens, pairs = lens_of(name), pairs_of(name)
    fast = sweep(lens, pairs, sites=SITES, context="fixed")
    slow = sweep(lens, pairs, sites=SITES, context="fixed", fast=False)
    assert fast.notes == ()  # nothing took the slow path
    assert len(slow.notes) == 1
    same(fast, slow)
    assert np.abs(slow.effect).max() > 0.01
    assert fast.sham is not None
    assert np.abs(fast.sham).max() < 1e-12
    assert lens.registry.entries == []


@pytest.mark.parametrize("name", REPRESENTATIVE)
def test_fast_is_slow_where_attention_itself_is_edited(name: str) -> None:
    lens, pairs = lens_of(name), pairs_of(name)
    options = {"sites": "blocks.*.attn.hook_pattern", "edit": il.Zero(), "context": "fixed"}
    fast = sweep(lens, pairs, **options)
    same(fast, sweep(lens, pairs, fast=False, **options))
    assert np.abs(fast.effect).max() > 0.01


@pytest.mark.parametrize("name", tiny.FAMILIES)
def test_fast_is_slow_in_free_context_or_says_why_not(name: str) -> None:
    lens, pairs = lens_of(name), pairs_of(name)
    options = {
        "sites": ["blocks.*.hook_resid_post", "blocks.1.attn.hook_z", "hook_latent"],
        "metric": il.log_prob,
    }
    fast = sweep(lens, pairs, **options)
    same(fast, sweep(lens, pairs, fast=False, **options), off=1e-11)
    assert np.abs(fast.effect).max() > 0.01
    if name in ("gemma3", "paligemma"):
        assert "one forward each" in fast.notes[0]
    else:
        assert fast.notes == ()
        assert np.abs(fast.sham).max() < 1e-11


@pytest.mark.parametrize(
    "options",
    [
        {"direction": "noise"},
        {"positions": [il.latent, il.latent[1:]]},
        {"edit": il.Zero()},
        {"sites": "z", "heads": True, "positions": [il.latent[2]]},
        {"metric": il.flip},
        {"batch_size": 1},
    ],
    ids=str,
)
def test_free_context_is_the_same_in_every_setting(options: dict[str, Any]) -> None:
    lens, pairs = lens_of("qwen2_5_vl"), pairs_of("qwen2_5_vl")
    fast = sweep(lens, pairs, **options)
    same(fast, sweep(lens, pairs, fast=False, **options), off=1e-11)
    assert fast.notes == ()


def test_rows_that_open_at_different_steps_are_taken_up_where_they_did() -> None:
    """Two organisms' worth of rows: edits in free context change what is written and answered."""
    lens = il.load("latent-content")
    task = lens.task(n=6, seed=4)
    fast = sweep(lens, task, sites="hook_latent", metric=il.source_answer)
    slow = sweep(lens, task, sites="hook_latent", metric=il.source_answer, fast=False)
    same(fast, slow, off=0)
    assert fast.mean.max() == 1.0  # a swapped state is the source's answer


def test_positions_before_the_latents_are_generated_one_by_one() -> None:
    lens, pairs = lens_of("qwen2_5_vl"), pairs_of("qwen2_5_vl")
    found = sweep(lens, pairs, positions=[il.last_prompt, il.latent[0]], sites="*.1.hook_mlp_out")
    assert found.notes == (
        "1 of 2 cells one forward each: in free context a run is taken up at latents, and its "
        "edit begins elsewhere",
    )


@pytest.mark.parametrize(
    "options",
    [
        {"direction": "noise"},
        {"sites": "z", "heads": True},
        {"sites": "attn_out", "window": 2},
        {"positions": [il.latent, il.latent[1:3] | il.last_prompt, il.before_answer, il.answer]},
        {"edit": il.Zero()},
        {"edit": il.Sham()},
        {"edit": il.Shuffle(), "positions": [il.latent]},
        {"sites": ["blocks.1.attn.hook_pattern"], "edit": il.Zero(), "positions": [il.latent[1]]},
        {"metric": il.log_prob},
        {"metric": il.kl},
        {"metric": il.prob, "batch_size": 1},
    ],
    ids=str,
)
def test_fast_is_slow_in_every_setting(options: dict[str, Any]) -> None:
    lens, pairs = lens_of("qwen2_5_vl"), pairs_of("qwen2_5_vl")
    fast = sweep(lens, pairs, context="fixed", **options)
    same(fast, sweep(lens, pairs, context="fixed", fast=False, **options))
    assert fast.notes == ()


def test_edits_with_a_reference_take_its_statistics_cell_by_cell() -> None:
    lens, pairs = lens_of("qwen2_5_vl"), pairs_of("qwen2_5_vl")
    reference = lens.run(list(pairs.source), names_filter="*.hook_resid_post")
    for edit in (il.Mean(reference), il.AddNoise(0.5, reference), il.Resample(reference)):
        fast = sweep(lens, pairs, context="fixed", edit=edit)
        same(fast, sweep(lens, pairs, context="fixed", edit=edit, fast=False))
        assert fast.notes == ()
        means = np.abs(fast.effect).mean(1)
        assert len(set(means.round(9))) > len(means) // 2  # cells differ


def test_a_cell_is_what_patch_measures() -> None:
    lens, pairs = lens_of("qwen2_5_vl"), pairs_of("qwen2_5_vl")
    for context in ("fixed", "free"):
        found = sweep(lens, pairs, context=context, positions=[il.latent[1]])
        for i in range(2):
            alone = lens.patch(
                base=pairs.base[i], source=pairs.source[i], site="blocks.1.hook_resid_post",
                at=il.latent[1], context=context, base_answers=pairs.base_answers[i],
                source_answers=pairs.source_answers[i],
            )  # fmt: skip
            cell = next(k for k, c in enumerate(found.cells) if c.layer == 1)
            assert abs(found.effect[cell, i] - float(alone.effect[0])) < 1e-10


@pytest.mark.parametrize("rows", [1, 3, 7])
def test_how_many_rows_share_a_forward_does_not_matter(rows: int) -> None:
    lens, pairs = lens_of("qwen2_5_vl"), pairs_of("qwen2_5_vl")
    whole = sweep(lens, pairs, context="fixed")
    study = Sweep(
        lens, pairs, "resid_post", il.latent, il.logit_diff, "denoise", "fixed", None, False, 1,
        2, True, 0, 0, limit=rows,
    )  # fmt: skip
    same(study.measure(0), whole)


def test_rows_without_such_a_position_are_flagged_and_have_no_effect() -> None:
    lens, pairs = lens_of("qwen2_5_vl"), pairs_of("qwen2_5_vl")
    options = {"context": "fixed", "edit": il.Zero(), "positions": [il.text.find("red")]}
    fast = sweep(lens, pairs, **options)
    same(fast, sweep(lens, pairs, fast=False, **options))
    assert set(fast.flags[:, 0]) == {1}
    assert np.all(fast.effect[:, 0] == 0)
    assert set(fast.flags[:, 1]) == {0}
    assert np.abs(fast.effect[0, 1]) > 1e-3


# ---- where it would be wrong -------------------------------------------------------------------


def test_images_behind_the_edit_take_the_slow_path() -> None:
    lens, pairs = lens_of("gemma3"), pairs_of("gemma3")
    at = [il.image[0][0, 0], il.latent[0]]
    with pytest.raises(InputError, match="look at positions behind it"):
        _prefix_inside_an_image(lens, pairs)
    found = sweep(
        lens, _one_size(pairs), context="fixed", positions=at, sites="blocks.1.hook_resid_post"
    )
    assert found.notes == ("1 of 2 cells one forward each: " + _why_images(lens, _one_size(pairs)),)


def _one_size(pairs: il.Pairs) -> il.Pairs:
    images = [tiny.image(48, 32, seed=i) for i in range(4)]
    base = [{**e, "images": images[i]} for i, e in enumerate(pairs.base)]
    source = [{**e, "images": images[2 + i]} for i, e in enumerate(pairs.source)]
    return replace(pairs, base=base, source=source)


def _why_images(lens: il.LatentModel, pairs: il.Pairs) -> str:
    run = lens.run(list(pairs.base))
    script = lens.script(run)
    stop = min(int(il.image[0][0, 0].resolve(script.tokens, row)[0]) for row in range(2))
    return str(why_not(lens, script, stop))


def _prefix_inside_an_image(lens: il.LatentModel, pairs: il.Pairs) -> None:
    run = lens.run(list(pairs.base))
    script = lens.script(run)
    stop = int(il.image.resolve(script.tokens, 0)[1])
    width = script.tokens.width
    prefix_of(lens, script, stop=stop, columns=[width - 1], end=width)


def test_a_prefix_inside_an_image_would_be_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    """The guard is needed: tokens of one image look at each other, also at later ones."""
    lens, pairs = lens_of("gemma3"), pairs_of("gemma3")
    monkeypatch.setattr("imaginelens.hooks.prefix.why_not", lambda lens, script, stop: None)
    run = lens.run(pairs.base[0])
    script = lens.script(run)
    stop = int(il.image.resolve(script.tokens, 0)[1])
    width = script.tokens.width
    with pytest.raises(Exception):  # noqa: B017, PT011  the pictures' features no longer fit
        prefix_of(lens, script, stop=stop, columns=[width - 1], end=width)


def test_hooks_of_the_user_take_the_slow_path() -> None:
    lens, pairs = lens_of("qwen2_5_vl"), pairs_of("qwen2_5_vl")
    plain = sweep(lens, pairs, context="fixed")
    with lens.hooks([("blocks.0.hook_resid_post", lambda act, hook: act * 0.9)]):
        hooked = sweep(lens, pairs, context="fixed")
        same(hooked, sweep(lens, pairs, context="fixed", fast=False))
    assert "hooks or edits of the user's own" in hooked.notes[0]
    assert np.abs(hooked.effect - plain.effect).max() > 1e-3


def test_knockouts_take_the_slow_path() -> None:
    lens, pairs = lens_of("qwen2_5_vl"), pairs_of("qwen2_5_vl")
    found = sweep(
        lens, pairs, context="fixed", sites="*.attn.hook_pattern", edit=il.Knockout(),
        positions=[il.latent],
    )  # fmt: skip
    assert "Knockout does not act on single rows" in found.notes[0]


def test_verify_finds_a_wrong_cell(monkeypatch: pytest.MonkeyPatch) -> None:
    lens, pairs = lens_of("qwen2_5_vl"), pairs_of("qwen2_5_vl")
    checked = sweep(lens, pairs, context="fixed", verify=4)
    assert "4 cells measured again" in checked.notes[0]
    true_start = behind_prefix.start_of

    def one_block_late(*args: Any) -> tuple[int, bool]:
        start, enters = true_start(*args)
        return min(start + 1, 3), enters

    monkeypatch.setattr(behind_prefix, "start_of", one_block_late)
    with pytest.raises(ControlError, match="differs by"):
        sweep(lens, pairs, context="fixed", verify=9)


def test_a_forward_that_does_not_fit_is_halved(monkeypatch: pytest.MonkeyPatch) -> None:
    lens, pairs = lens_of("qwen2_5_vl"), pairs_of("qwen2_5_vl")
    whole = sweep(lens, pairs, context="fixed")
    run, sizes = behind_prefix.Batch.run, []

    def small(self: Any, forward: Any, edit: Any = None) -> Any:
        sizes.append(len(forward.tasks))
        if len(forward.tasks) > 2:
            raise torch.OutOfMemoryError
        return run(self, forward, edit)

    monkeypatch.setattr(behind_prefix.Batch, "run", small)
    monkeypatch.setattr(behind_prefix.Batch, "sham", lambda self, plan: np.zeros(2))
    same(sweep(lens, pairs, context="fixed"), whole)
    assert max(sizes) > 2


# ---- what it says ------------------------------------------------------------------------------


@pytest.mark.parametrize("mechanism", ["content", "pointer", "ignored"])
def test_a_map_shows_which_step_carries_what_the_symbolic_model_says(mechanism: str) -> None:
    """The rule of the task says which answer a swap of each latent gives, for each mechanism; the
    map of the organism that has it agrees step by step, and with no other mechanism's."""
    lens = il.load(f"latent-{mechanism}")
    task = lens.task(n=48, seed=3)
    found = sweep(lens, task, sites="hook_latent", metric=il.source_answer, batch_size=48)
    assert found.notes == ()
    predicted = {
        name: np.array(
            [
                [
                    float(rule(base, source, (step,)) == answer)
                    for base, source, answer in zip(
                        task.base, task.source, task.source_answers, strict=True
                    )
                ]
                for step in range(2)
            ]
        )
        for name, rule in task.hypotheses.items()
    }
    off = {name: np.nanmean(np.abs(found.effect - p)) for name, p in predicted.items()}
    assert off[mechanism] < 0.08
    assert all(
        off[name] > 0.1
        for name, p in predicted.items()
        if np.abs(p - predicted[mechanism]).mean() > 0.2
    )


def test_which_layer_carries_it_follows_from_the_loop() -> None:
    """What the last layer makes of one latent is the next: so its cell is that of the next latent,
    in free context, and carries nothing where later latents stay as they were."""
    lens = il.load("latent-content")
    task = lens.task(n=16, seed=3)
    names = ["hook_latent", "blocks.*.hook_resid_post"]
    free = sweep(lens, task, sites=names)
    fixed = sweep(lens, task, sites=names, context="fixed")
    last = free.axes["layer"][-1]
    second = free.cell(site="hook_latent", position="latent[1]").value
    handed_on = free.cell(site="resid_post", layer=last, position="latent[0]").value
    assert second > 5
    assert abs(handed_on - second) < 1e-3
    for position in fixed.axes["position"]:
        assert abs(fixed.cell(site="resid_post", layer=last, position=position).value) < 1e-4
    early = [
        fixed.cell(site="resid_post", layer=k, position="latent[1]").value for k in range(last)
    ]
    assert max(early) > 0.5 * second  # some layer below still has it
    ignored = il.load("latent-ignored")
    nothing = sweep(ignored, ignored.task(n=16, seed=3), sites=names, context="fixed")
    assert np.abs(nothing.mean[~np.isnan(nothing.mean)]).max() < 0.2


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"direction": "up"}, "direction is 'up'"),
        ({"context": "loose"}, "context is 'loose'"),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"verify": -1}, "verify is -1"),
        ({"metric": "kl"}, "metric is 'kl'"),
        ({"edit": "zero"}, "edit is 'zero'"),
        ({"window": 9}, "window|neighbouring"),
    ],
)
def test_bad_arguments_are_named(options: dict[str, Any], words: str) -> None:
    lens, pairs = lens_of("qwen2_5_vl"), pairs_of("qwen2_5_vl")
    with pytest.raises(InputError, match=words):
        UNCHECKED(lens, pairs, **options)


def test_pairs_are_asked_for() -> None:
    lens, pairs = lens_of("qwen2_5_vl"), pairs_of("qwen2_5_vl")
    with pytest.raises(InputError, match="pairs is a list"):
        UNCHECKED(lens, list(pairs.base))


def test_an_overwritten_site_is_named_with_the_position_as_the_user_wrote_it() -> None:
    lens, pairs = lens_of("qwen2_5_vl"), pairs_of("qwen2_5_vl")
    with pytest.raises(
        SiteUnavailable, match=r"^latent\[0\], latent\[1\].* selects latent .* 'hook_latent'"
    ):
        sweep(lens, pairs, sites="hook_embed", positions=il.latent, context="fixed")


def test_a_map_that_touched_nothing_is_an_error() -> None:
    lens, pairs = lens_of("qwen2_5_vl"), pairs_of("qwen2_5_vl")
    twin = replace(pairs, source=pairs.base)
    with pytest.raises(EditTouchedNothing, match="identical_donor"):
        sweep(lens, twin, context="fixed")


def test_a_twin_among_the_pairs_has_effects_of_exactly_nothing() -> None:
    """Whatever forwards of other shapes round otherwise on this processor."""
    lens, pairs = lens_of("qwen2_5_vl"), pairs_of("qwen2_5_vl")
    mixed = replace(pairs, source=[pairs.base[0], *pairs.source[1:]])
    for fast in (True, False):
        found = sweep(lens, mixed, context="fixed", fast=fast)
        assert (found.flags[:, 0] == 2).all()
        assert (found.effect[:, 0] == 0).all()
        assert (found.flags[:, 1] == 0).all()
        assert np.abs(found.effect[:, 1]).max() > 0.01


def test_chunks_are_joined_cell_by_cell() -> None:
    lens, pairs = lens_of("qwen2_5_vl"), pairs_of("qwen2_5_vl")
    whole = sweep(lens, pairs, context="fixed")
    same(sweep(lens, pairs, context="fixed", batch_size=1), whole, off=1e-10)
    few = replace(
        whole, cells=whole.cells[:2], after=whole.after[:2], flags=whole.flags[:2],
        change=whole.change[:2],
    )  # fmt: skip
    more = widened(few, whole.cells)
    assert more.cells == whole.cells
    assert np.all(more.flags[2:] == 1)
    assert np.all(more.effect[2:] == 0)


def test_a_chunk_without_such_a_position_does_not_stop_the_others() -> None:
    lens, pairs = lens_of("qwen2_5_vl"), pairs_of("qwen2_5_vl")
    options = {"context": "fixed", "edit": il.Zero(), "positions": [il.text.find("red"), il.latent]}
    one_by_one = sweep(lens, pairs, batch_size=1, **options)
    same(one_by_one, sweep(lens, pairs, **options), off=1e-10)
    nowhere = {**options, "positions": [il.text.find("zebra")]}
    with pytest.raises(EditTouchedNothing, match="6 times not_emitted; look"):
        sweep(lens, pairs, batch_size=1, **nowhere)
    with pytest.raises(InputError, match="no run has a position at"):
        sweep(lens, pairs, **nowhere)
    unopened = replace(SPEC, trigger="sampled", fixed=False)
    silent = lens_of("qwen2_5_vl", unopened)
    silent.model.generation_config.suppress_tokens = [silent.span_tokens.open]
    with pytest.raises(EditTouchedNothing, match=r"in 3 cells and 2"):
        sweep(silent, pairs, batch_size=1, context="fixed")
    with pytest.raises(InputError, match="none has a latent step"):
        sweep(silent, pairs, context="fixed")
