"""Collecting: what is kept is what plain runs make, whatever the batch; labels and controls."""

import gc
import weakref
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from typing import Any
from unittest import mock

import numpy as np
import pytest
import tiny
import torch
import transformers as hf
from PIL import Image
from planted import planted

import imaginelens as il
from imaginelens.hooks import HookNameError, InputError, heads
from imaginelens.hooks.inputs import pictures_key
from imaginelens.probes import collecting
from imaginelens.probes.collecting import collect
from imaginelens.probes.control_states import random_model, raw_input
from imaginelens.probes.states import States

SITES = ["hook_latent", "blocks.*.hook_resid_post", "ln_final.hook_normalized"]
N = 6


@cache
def organism(name: str = "latent-content") -> Any:
    return il.load(name, dtype=torch.float64)


def task(n: int = N, seed: int = 0) -> il.Pairs:
    return organism().task(n, seed)


@cache
def content() -> States:
    """Six examples in one batch, in float64, with all controls."""
    return collect(organism(), task(), sites=SITES, labels="name", dtype="float64")


def values(states: States) -> np.ndarray:
    """All states, (example, step, layer, d_model)."""
    n, steps, layers, _ = states.shape
    everyone = np.arange(n)
    return np.stack(
        [
            np.stack([states.cells.read(t, k, everyone) for k in range(layers)], 1)
            for t in range(steps)
        ],
        1,
    )


# ---- states --------------------------------------------------------------------------------------


def test_states_are_those_that_plain_runs_capture_one_at_a_time() -> None:
    lens, found = organism(), content()
    assert found.shape == (N, 2, 5, 64)
    assert found.sites == tuple(lens.registry.match(SITES))
    assert found.mask.all()
    assert (found.at, found.label, found.notes) == ("latent", "name", ())
    captured = [site for site in found.sites if site != "hook_latent"]
    for i, example in enumerate(task().base):
        run = lens.run(example, names_filter=captured)
        for site in found.sites:
            plain = (
                run.latents[0] if site == "hook_latent" else run.states(site, il.latent).values[0]
            )
            for step in range(2):
                here = found.cell(step=step, site=site).x[i]
                np.testing.assert_allclose(here, plain[step].numpy(), atol=1e-10, rtol=0)


def test_batches_and_shards_change_nothing() -> None:
    one = collect(
        organism(), task(), sites=SITES, batch_size=1, shard_size=4, dtype="float64", controls=True
    )
    np.testing.assert_allclose(values(one), values(content()), atol=1e-10, rtol=0)
    for name, control in one.controls.items():
        other = content().controls[name]
        assert (control.mask == other.mask).all()
        np.testing.assert_allclose(values(control), values(other), atol=1e-10, rtol=0)


def test_states_are_kept_in_float32_unless_asked_otherwise() -> None:
    found = collect(il.load("latent-content"), task(3), controls=False)
    x = found.cell(step=1).x
    assert x.dtype == np.float32
    np.testing.assert_allclose(x, content().cell(step=1).x[:3], rtol=1e-4, atol=1e-4)


def test_a_state_that_is_no_number_is_named() -> None:
    lens = organism()

    def spoil(act: torch.Tensor, hook: Any) -> torch.Tensor | None:
        return act * torch.nan if len(act) == 1 else None  # the second batch

    site = "blocks.2.hook_mlp_out"
    with (
        lens.hooks([(site, spoil)]),
        pytest.raises(InputError, match=rf"'{site}' are nan .* input 2, step 0"),
    ):
        collect(lens, task(3), sites=site, batch_size=2, controls=False, latents=il.Force(2, at=0))


# ---- steps that are not there --------------------------------------------------------------------


@cache
def coconut() -> Any:
    """A text-only model whose latents are placeholders in the prompt, and its tokenizer."""
    with mock.patch.object(tiny, "LATENT", il.FAMILIES["coconut"].strings):
        tok = tiny.tokenizer(bos=False)
    config = hf.LlamaConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, vocab_size=len(tok), bos_token_id=None, eos_token_id=2,
        pad_token_id=0,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = hf.LlamaForCausalLM(config).double().eval()
    model.generation_config = hf.GenerationConfig(
        do_sample=False, eos_token_id=2, pad_token_id=0, max_new_tokens=4
    )
    return il.LatentModel(model, tok, il.FAMILIES["coconut"])


def question(n: int) -> str:
    return f"how many {'very ' * n}?\n<|start-latent|>" + n * "<|latent|>" + "<|end-latent|>"


@pytest.mark.parametrize("batch_size", [1, 3])
def test_examples_with_fewer_steps_are_masked_and_counted(batch_size: int) -> None:
    """Prompts of 3, 0, 1 and 2 latents, as texts, alone or left-padded beside each other."""
    counts = [3, 0, 1, 2]
    found = collect(
        coconut(), [question(n) for n in counts], sites=["hook_latent", "resid_post"],
        labels=counts, batch_size=batch_size, dtype="float64",
    )  # fmt: skip
    assert found.mask.tolist() == [[t < n for t in range(3)] for n in counts]
    assert found.notes == ("3 of 4 examples have fewer than 3 steps, 1 of them none",)
    assert found.cell(step=2).rows.tolist() == [0]
    assert found.cell(step=1).y.tolist() == [3, 2]
    assert set(found.controls) == {"dummy", "random model", "raw input"}
    for control in found.controls.values():
        assert (control.mask == found.mask).all()
        assert np.isfinite(values(control)).all()
    for i, n in enumerate(counts):
        run = coconut().run({"text": question(n)}, names_filter="resid_post")
        if n:
            alone = run.states("blocks.1.hook_resid_post", il.latent).values[0].numpy()
            here = values(found)[i, :n, found.layer("blocks.1.hook_resid_post")]
            np.testing.assert_allclose(here, alone, atol=1e-10, rtol=0)


def forced(criterion: Any = None) -> Any:
    """A tiny model whose loop opens a span of at most 4 latents at the second position."""
    opened, close, pad = tiny.LATENT
    spec = il.LatentSpec(
        name="mine", open=opened, close=close, pad=pad, max_steps=4, trigger="forced", forced_at=1,
        budget=4, criterion=criterion,
    )  # fmt: skip
    return il.LatentModel(*tiny.build("qwen2_5_vl"), spec)


def test_rows_that_end_at_different_steps_have_controls_with_the_same_steps() -> None:
    """The span of one row ends by its state; those of the controls, which do not reach that state,
    end where it did."""
    data = [
        {"images": tiny.image(40, 32, seed=i), "text": tiny.prompt("qwen2_5_vl", text)}
        for i, text in enumerate(["red?", "how many cats?", "blue, or what?"])
    ]
    free = forced().run(data[1], max_new_tokens=12)
    assert free.trigger.emitted == (4,)
    lens = forced(heads.NearTo(free.latents[0, 1], 1e-6))
    found = collect(lens, data, max_new_tokens=12, dtype="float64", labels=[0, 1, 0])
    assert found.mask.sum(1).tolist() == [4, 2, 4]
    assert set(found.controls) == {"dummy", "random model", "raw input"}
    for control in found.controls.values():
        assert (control.mask == found.mask).all()
    dummy = found.controls["dummy"]
    assert (dummy.cell(step=0).x == found.cell(step=0).x).all()
    assert (dummy.cell(step=1).x[1:] != found.cell(step=1).x[1:]).any(1).all()


def test_a_run_that_is_cut_within_a_span_has_controls_with_the_same_steps() -> None:
    data = [{"images": tiny.image(40, 32, seed=0), "text": tiny.prompt("qwen2_5_vl", "red?")}]
    found = collect(forced(), data, max_new_tokens=5, labels=["a"])
    assert found.mask.tolist() == [[True, True]]  # text, open, two that are read, one that is not
    for control in found.controls.values():
        assert (control.mask == found.mask).all()


def test_without_any_step_it_is_said_what_to_do() -> None:
    data = [{"images": tiny.image(40, 32, seed=0), "text": tiny.prompt("qwen2_5_vl", "red?")}]
    lens = forced()
    with pytest.raises(InputError, match=r"none of the 1 inputs has .* latent\[7\] .*il.Force"):
        collect(lens, data, at=il.latent[7], max_new_tokens=6)
    with pytest.raises(InputError, match=r"none of the 1 inputs has .* text.find\('xyz'\)"):
        collect(lens, data, at=il.text.find("xyz"), sites="resid_post", max_new_tokens=6)


# ---- controls ------------------------------------------------------------------------------------


def test_the_dummy_is_the_same_prefix_and_one_constant_latent() -> None:
    """At hook_latent it is what the model would have fed: first its own latent, then what it makes
    of the constant, as a plain edited run says."""
    lens, found = organism(), content()
    dummy = found.controls["dummy"]
    assert (dummy.cell(step=0).x == found.cell(step=0).x).all()
    own, other = found.cell(step=1).x, dummy.cell(step=1).x
    # the constant is the first example's own first latent, so its second is its own as well
    assert np.abs(own - other).max(1)[0] < 1e-10
    assert (np.abs(own - other).max(1)[1:] > 0.1).all()
    constant = torch.from_numpy(found.cell(step=0).x[0])
    for i, example in enumerate(task().base):
        with lens.edit(il.Constant(constant), at=il.latent):
            run = lens.run(
                example, names_filter=["blocks.1.hook_resid_post", "ln_final.hook_normalized"]
            )
        # the last layer at latent[0] decides z_1
        would = run.states("ln_final.hook_normalized", il.latent).values[0, 0].numpy()
        np.testing.assert_allclose(other[i], would, atol=1e-10)
        inside = run.states("blocks.1.hook_resid_post", il.latent).values[0].numpy()
        for step in range(2):
            here = dummy.cell(step=step, site="blocks.1.hook_resid_post").x[i]
            np.testing.assert_allclose(here, inside[step], atol=1e-10)


def test_the_random_model_is_another_and_the_same_for_a_seed() -> None:
    before = torch.random.get_rng_state()
    data = task(3)

    def latents(seed: int) -> np.ndarray:
        found = collect(organism(), data, controls=["random model"], seed=seed, dtype="float64")
        assert list(found.controls) == ["random model"]
        return values(found.controls["random model"])

    one, again, other = latents(0), latents(0), latents(1)
    assert (one == again).all()
    assert (one != other).any(-1).all()
    own = values(content())[:3, :, :1]
    assert (np.linalg.norm(one - own, axis=-1) > 1).all()
    assert (torch.random.get_rng_state() == before).all()
    # what the inputs are still makes a difference to it
    assert (np.linalg.norm(one[0] - one[1], axis=-1) > 1e-3).all()


def test_the_random_model_equals_a_model_made_by_hand_that_writes_the_same() -> None:
    lens = organism()
    with torch.random.fork_rng():
        torch.manual_seed(7)
        config = hf.AutoConfig.from_pretrained(il.organisms.checkpoint.folder("latent-content"))
        made = hf.Qwen2_5_VLForConditionalGeneration(config).double().eval()
    mine = random_model(lens, seed=7)
    ours = dict(mine.model.named_parameters())
    for name, weight in made.named_parameters():
        assert (weight.std() - ours[name].std()).abs() < 1e-2, name
    assert mine.model.dtype == torch.float64
    found = collect(lens, task(2), controls=["random model"], seed=7, dtype="float64")
    for i, example in enumerate(task(2).base):
        spoken = lens.run(example)
        run = mine.retell(mine.run(example, max_new_tokens=1), like=spoken)
        np.testing.assert_allclose(
            values(found.controls["random model"])[i, :, 0], run.latents[0].numpy(), atol=1e-10
        )


def test_the_random_model_is_gone_afterwards() -> None:
    seen = []

    def made(lens: Any, *, seed: int) -> Any:
        fresh = random_model(lens, seed=seed)
        seen.append(weakref.ref(fresh.model))
        return fresh

    with mock.patch.object(collecting, "random_model", made):
        collect(organism(), task(2), controls=["random model"])
    gc.collect()
    assert len(seen) == 1
    assert seen[0]() is None


def test_the_raw_input_is_a_coarse_picture_and_a_bag_of_words() -> None:
    left = Image.new("RGB", (16, 16), (255, 0, 0))
    left.paste((0, 0, 255), (8, 0, 16, 16))
    found = raw_input({"images": left, "text": "Red or blue ?"})
    cells = found[:192].reshape(8, 8, 3)
    assert (cells[:, :4] == [1, 0, 0]).all()
    assert (cells[:, 4:] == [0, 0, 1]).all()
    assert found[192:].sum() == 4
    assert (raw_input({"images": left, "text": "blue or red?"}) == found).all()
    two = raw_input({"images": [left, Image.new("RGB", (4, 4))], "text": "Red or blue ?"})
    assert (two[:192] == found[:192] / 2).all()
    assert (raw_input({"text": "red or blue?"})[:192] == 0).all()


def test_the_raw_input_is_the_same_at_every_step_and_site() -> None:
    raw = content().controls["raw input"]
    assert raw.shape == (N, 2, 5, 448)
    assert raw.sites == content().sites
    oracle = np.stack([raw_input(example) for example in task().base])
    for step in range(2):
        for site in raw.sites:
            assert (raw.cell(step=step, site=site).x == oracle).all()


def test_controls_have_the_labels_and_groups_of_their_states() -> None:
    for control in content().controls.values():
        assert control.labels is not None
        assert (control.labels == content().labels).all()
        assert control.groups == content().groups
        assert control.keys == content().keys


def test_what_cannot_be_made_is_left_out_and_said() -> None:
    found = collect(organism(), task(3), sites="resid_post", at=il.last_prompt)
    assert set(found.controls) == {"random model", "raw input"}
    assert found.notes == ("no control 'dummy': all positions stand before the first latent",)
    case = planted("chain")  # a class of the tests' own, whose weights are written by hand
    found = collect(case.lens, case.pairs)
    assert set(found.controls) == {"dummy", "raw input"}
    assert len(found.notes) == 1
    assert found.notes[0].startswith("no control 'random model': PlantedModel cannot be made anew")
    with pytest.raises(InputError, match="PlantedModel cannot be made anew from its config"):
        collect(case.lens, case.pairs, controls=["random model"])
    silent = il.LatentModel(case.lens.model, case.lens.processor, False)
    found = collect(silent, case.pairs, sites="resid_post", at=il.last_prompt, max_new_tokens=3)
    assert set(found.controls) == {"raw input"}
    assert "no control 'dummy': no latent was fed back" in found.notes


def test_a_head_that_is_no_part_of_the_model_cannot_be_made_anew() -> None:
    lens = forced()
    spec = replace(lens.spec, project=lambda h, _: h / 2, extras=("head.",))
    lens = il.LatentModel(lens.model, lens.processor, spec)
    with pytest.raises(InputError, match="mine has a latent head beside the model"):
        random_model(lens)


def test_latents_that_are_written_tokens_have_no_dummy() -> None:
    family = il.FAMILIES["lavit"]
    with mock.patch.object(tiny, "LATENT", family.strings):
        lens = il.LatentModel(*tiny.fresh("qwen2_5_vl"), family)
    text = tiny.prompt("qwen2_5_vl", "red?") + "<lvr1><lvr2><lvr3><lvr4>"
    data = [{"images": tiny.image(40, 32, seed=i), "text": text} for i in range(2)]
    found = collect(lens, data, sites="resid_post", max_new_tokens=3, dtype="float64")
    assert found.shape[:2] == (2, 4)
    assert set(found.controls) == {"random model", "raw input"}
    assert found.notes == ("no control 'dummy': no latent was fed back",)
    assert (found.controls["random model"].mask == found.mask).all()
    with pytest.raises(il.SiteUnavailable, match="feeds nothing back"):
        collect(lens, data)


def test_image_tokens_at_the_projector() -> None:
    found = collect(organism(), task(2), sites="vision_projector.hook_out", at=il.image)
    assert found.shape == (2, 9, 1, 64)
    assert set(found.controls) == {"random model", "raw input"}


def test_controls_at_the_answer_are_at_the_same_text() -> None:
    lens = organism()
    found = collect(lens, task(3), sites="resid_post", at=il.before_answer, labels="answer")
    assert found.mask.shape == (3, 1)
    assert set(found.controls) == {"dummy", "random model", "raw input"}
    run = lens.run(list(task(3).base), names_filter="resid_post", positions=[il.before_answer])
    plain = run.states("blocks.2.hook_resid_post", il.before_answer).values[:, 0].numpy()
    x = found.cell(step=0, site="blocks.2.hook_resid_post").x
    np.testing.assert_allclose(x, plain, rtol=1e-5, atol=1e-4)
    dummy = found.controls["dummy"].cell(step=0, site="blocks.2.hook_resid_post").x
    assert (np.abs(dummy - x).max(1)[1:] > 0.1).all()


def test_a_planted_chain_gives_the_latents_that_its_formula_says() -> None:
    case = planted("chain")
    found = collect(case.lens, case.pairs, dtype="float64", controls=False)
    z = values(found)[:, :, 0, case.lens.model.registers["z"]]
    np.testing.assert_allclose(z, case.latents(case.x0), atol=1e-12)


def test_active_edits_are_collected_under_and_keep_off_a_folder(tmp_path: Any) -> None:
    lens = organism()
    with lens.edit(il.Zero(), at=il.latent[0]):
        found = collect(lens, task(2), sites="blocks.0.hook_resid_pre", dtype="float64")
        with pytest.raises(InputError, match="1 hooks or edits are active"):
            collect(lens, task(2), out=tmp_path / "states")
    assert (found.cell(step=0).x == 0).all()
    assert (found.cell(step=1).x != 0).any()
    assert "no control 'random model': hooks or edits are active" in found.notes[0]
    assert not (tmp_path / "states").exists()


def test_the_model_is_as_it_was() -> None:
    lens = organism()
    before = {name: weight.clone() for name, weight in lens.model.state_dict().items()}
    plain = lens.run(task().base[0])
    collect(lens, task(3), sites=SITES)
    assert not lens.registry.entries
    for name, weight in lens.model.state_dict().items():
        assert torch.equal(weight, before[name]), name
    again = lens.run(task().base[0])
    assert torch.equal(plain.latents, again.latents)
    assert plain.text == again.text


# ---- labels and groups ---------------------------------------------------------------------------


def shape_at(example: Any, step: int) -> str:
    game = example["hunt"]
    return game.shape_of(game.path[step + 1])


def test_labels_of_every_kind() -> None:
    lens, pairs = organism(), task(4)
    hunts = [example["hunt"] for example in pairs.base]
    answers = [[hunt.answer] for hunt in hunts]
    names = [[*hunt.path[1:]] for hunt in hunts]
    shapes = [[hunt.shape_of(name) for name in hunt.path[1:]] for hunt in hunts]
    starts = [[hunt.start] for hunt in hunts]
    coloured = [{**example, "colour": i / 2} for i, example in enumerate(pairs.base)]
    cases: list[tuple[Any, Any, str, list[list[Any]]]] = [
        (pairs, None, "answer", answers),
        (pairs, "name", "name", names),
        (pairs, "shape", "shape", shapes),
        (pairs, "answer", "answer", answers),
        (list(pairs.base), "answer", "answer", [a * 2 for a in answers]),
        (pairs, shape_at, "shape_at", shapes),
        (pairs, lambda example: example["hunt"].start, "label", starts),
        (pairs, lambda example, k=0: example["hunt"].start, "label", starts),
        (pairs, [3, 1, None, 2], "label", [[3], [1], [None], [2]]),
        (pairs, np.arange(8).reshape(4, 2), "label", [[0, 1], [2, 3], [4, 5], [6, 7]]),
        (coloured, "colour", "colour", [[0.0], [0.5], [1.0], [1.5]]),
        (coloured, "shape", "shape", shapes),
        (list(pairs.base), None, "label", []),
        ([{**e, "answer": str(i)} for i, e in enumerate(pairs.base)], None, "answer",
         [["0"], ["1"], ["2"], ["3"]]),
    ]  # fmt: skip
    kept = collecting._Work.part
    made: dict[int, Any] = {}

    def once(self: Any, model: Any, shard: range, *more: Any) -> Any:
        """The states do not depend on labels: one run for all cases."""
        if 0 not in made:
            made[0] = kept(self, model, shard, *more)
        return made[0]

    with mock.patch.object(collecting._Work, "part", once):
        for data, given, name, wanted in cases:
            found = collect(lens, data, labels=given, controls=False)
            assert found.label == name
            if not wanted:
                assert found.labels is None
                continue
            assert found.labels is not None
            assert found.labels.reshape(4, -1).tolist() == wanted


def test_steps_of_labels_count_latents_for_variables_and_positions_for_callables() -> None:
    lens, pairs = organism(), task(3)
    later = collect(lens, pairs, at=il.latent[1:], labels="name", controls=False)
    assert later.labels is not None
    assert later.labels.tolist() == [[example["hunt"].path[2]] for example in pairs.base]
    counted = collect(lens, pairs, at=il.latent[1:], labels=lambda e, step: step, controls=False)
    assert counted.labels is not None
    assert counted.labels.tolist() == [[0]] * 3
    with pytest.raises(InputError, match="'name' is known for latent steps"):
        collect(lens, pairs, sites="resid_post", at=il.last_prompt, labels="name", controls=False)


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (["a", "b"], "2 labels came with 3 inputs"),
        ([["a"], ["b"], ["c"]], "labels of 1 steps came with 2 steps"),
        ("shap", "no input has 'shap'.* 'shape'"),
        ("text ", "there (is|are) .*'text'"),
        (
            ["a", ("b", "c"), "d"],
            "1 of 3 labels is a list, one label for each step, and others are none",
        ),
        ([1.0, float("inf"), 2.0], r"the label \[1\] is inf"),
        (["a", object(), "b"], r"the label \[1\] is <object"),
    ],
)
def test_labels_that_do_not_fit_are_refused(labels: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        collect(organism(), task(3), labels=labels, controls=False)


def test_an_error_in_a_callable_names_its_input() -> None:
    with pytest.raises(KeyError) as caught:
        collect(organism(), task(2), labels=lambda example: example["colour"], controls=False)
    assert "label of input 0" in "".join(caught.value.__notes__)


def test_a_column_that_only_some_have_is_refused() -> None:
    base = task(3).base
    data = [{**base[0], "colour": "red"}, base[1], base[2]]
    with pytest.raises(InputError, match=r"2 of 3 inputs have no 'colour' .* input 1"):
        collect(organism(), data, labels="colour", controls=False)


def test_an_example_without_its_hunt_has_no_variables() -> None:
    pairs = task(2).do(il.BlurImage(2.0))
    with pytest.raises(InputError, match="brings no hunt"):
        collect(organism(), pairs, side="source", labels="name", controls=False)


def groups_of(data: Any, **options: Any) -> Any:
    from imaginelens.probes.labelling import inputs_of

    return inputs_of(data, **options).groups


def test_groups_are_given_their_own_or_their_pictures() -> None:
    pairs = task(3)
    pictures = [pictures_key(example) for example in pairs.base]
    assert content().groups == tuple(pictures_key(example) for example in task().base)
    assert groups_of(pairs) == tuple(pictures)
    assert groups_of(pairs, groups="abc") == ("a", "b", "c")
    assert groups_of(replace(pairs, groups=[1, 1, 2])) == (1, 1, 2)
    assert groups_of(replace(pairs, groups=[1, 1, 2]), side="both") == (1, 1, 2, 1, 1, 2)
    assert groups_of([{**e, "group": i % 2} for i, e in enumerate(pairs.base)]) == (0, 1, 0)
    twice = [pairs.base[0], {**pairs.base[1], "images": pairs.base[0]["images"]}, pairs.base[2]]
    assert groups_of(twice) == (pictures[0], pictures[0], pictures[2])
    # a source that is its base after an edit shows what its base shows
    assert groups_of(pairs.do(il.BlurImage(2.0)), side="both") == (*pictures, *pictures)
    assert len(set(groups_of(pairs, side="both"))) == 6
    assert len(set(groups_of(["a", "b", "a"]))) == 2  # texts without pictures
    with pytest.raises(InputError, match="2 groups came with 3 inputs"):
        groups_of(pairs, groups=[1, 2])
    with pytest.raises(InputError, match=r"2 of 3 inputs have no group \(the first is input 1\)"):
        groups_of([{**pairs.base[0], "group": 1}, *pairs.base[1:]])


def test_sides_of_pairs() -> None:
    from imaginelens.probes.labelling import inputs_of

    pairs = task(3)
    both = inputs_of(pairs, side="both")
    assert both.examples == (*pairs.base, *pairs.source)
    assert both.answers == (*pairs.base_answers, *pairs.source_answers)
    assert inputs_of(pairs, side="source").examples == tuple(pairs.source)


# ---- what is refused -----------------------------------------------------------------------------


def wrong(**options: Any) -> Callable[[], Any]:
    return lambda: collect(organism(), options.pop("data", task(2)), **options)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (wrong(sites="blocks.0.attn.hook_z"), InputError, r"has the axes \(example, position,"),
        (wrong(sites="*"), InputError, "states to probe are d_model wide"),
        (wrong(sites="resid_pots"), HookNameError, "no site matches 'resid_pots'"),
        (wrong(controls=["dumy"]), InputError, "no control 'dumy'; did you mean 'dummy'?"),
        (wrong(data=[]), InputError, "there are no inputs"),
        (wrong(data={"text": "a"}), InputError, "the inputs are a dict"),
        (wrong(data=[{"images": None}]), InputError, "input 0 cannot be read"),
        (wrong(side="left"), InputError, "side is 'left'"),
        (wrong(dtype="float16"), InputError, "dtype is 'float16'"),
        (wrong(batch_size=0), InputError, "batch_size is 0"),
        (wrong(sites=["hook_latent", "resid_post"], at=il.latent | il.last_prompt), InputError,
         "'hook_latent' has 4 states in a batch and 'blocks.0.hook_resid_post' has 6"),
    ],
)  # fmt: skip
def test_what_cannot_be_collected_is_refused(
    call: Callable[[], Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        call()
