"""Families whose latents are written tokens: stock generation, states of the residual stream."""

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import reference_loops as loops
import tiny
import torch
import walk_shrink
from planted_words import Words
from safetensors.torch import save_file
from transformers import AutoModelForImageTextToText, LogitsProcessor, LogitsProcessorList

import imaginelens as il
from imaginelens.hooks import controls
from imaginelens.hooks.families import family_of, register_family
from imaginelens.hooks.tokens import Kind
from imaginelens.hooks.unverified import NOTES
from imaginelens.hooks.vocab_families import VOCAB_FAMILIES
from imaginelens.hooks.vocabspans import VocabSpec
from imaginelens.mediation import degeneration

NAMES = list(VOCAB_FAMILIES)
SITE = "blocks.1.hook_resid_post"
# What each family writes behind its prompt, by number of group: two spans or more, a plain token
# (None) between them
WRITES: dict[str, list[str]] = {
    "covt": [
        *("<|anchor_start|>", *["<|sam_pad|>"] * 8, "<|anchor_end|>", "a"),
        *("<|anchor_start|>", *["<|depth_pad|>"] * 4, *["<|dino_pad|>"] * 4, "<|anchor_end|>"),
    ],
    "lavit": ["<lvr1>", "<lvr2>", "<lvr3>", "<lvr4>", "a", "<lvr1>", "<lvr2>"],
    "heima": ["<THINKING_OF_SUMMARY>", "<THINKING_OF_CAPTION>", "<THINKING_OF_REASONING>", "a"],
}
SPANS = {"covt": [8, 4, 4], "lavit": [4, 2], "heima": [1, 1, 1]}


@cache
def built(strings: tuple[str, ...], kind: str = "qwen2_5_vl") -> Any:
    """A tiny model whose tokenizer has these strings, and its processor."""
    with mock.patch.object(tiny, "LATENT", strings):
        return tiny.fresh(kind)


def lens_of(name: str, kind: str = "qwen2_5_vl", **options: Any) -> il.LatentModel:
    return il.LatentModel(*built(VOCAB_FAMILIES[name].strings, kind), **options)


def example(i: int = 0) -> dict[str, Any]:
    texts = ("what colour?", "where is the red cube?", "how many cats are there now?")
    sizes = ((48, 32), (24, 40), (40, 40))
    return {"images": tiny.image(*sizes[i], seed=i), "text": tiny.prompt("qwen2_5_vl", texts[i])}


class Writing(LogitsProcessor):
    """Has rows write given tokens from a step on; None leaves a step to the model."""

    def __init__(self, ids: list[Mapping[int, int]], width: int, banned: list[int]) -> None:
        self.ids, self.width, self.banned = ids, width, banned

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        step = input_ids.shape[1] - self.width
        scores = scores.clone()
        scores[:, self.banned] = -1e9
        for row, ids in enumerate(self.ids):
            if step in ids:
                scores[row] = -1e9
                scores[row, ids[step]] = 0
        return scores


def writing(lens: il.LatentModel, given: Any, plans: list[tuple[int, list[str]]]) -> Writing:
    """Rows that write these tokens from these steps on, and no special token anywhere else."""
    tokenizer = lens.tokenizer
    ids = [
        {start + k: tokenizer.convert_tokens_to_ids(t) for k, t in enumerate(tokens)}
        for start, tokens in plans
    ]
    banned = [*tokenizer.convert_tokens_to_ids(list(lens.family.strings)), tokenizer.eos_token_id]
    return Writing(ids, lens.prompt(given).inputs["input_ids"].shape[1], banned)


def wrote(
    lens: il.LatentModel, given: Any, plans: list[tuple[int, list[str]]], n: int, **options: Any
) -> il.Run:
    processor = writing(lens, given, plans)
    return lens.run(
        given, max_new_tokens=n, generation={"logits_processor": [processor]}, **options
    )


def stock(lens: il.LatentModel, one: Any, plan: tuple[int, list[str]], n: int) -> loops.Trace:
    """One example in the model's own `generate`, then read anew as a whole: the last states behind
    the final norm, by a hook of torch's, at the tokens whose strings the family names."""
    inputs = {k: v for k, v in lens.prompt(one).inputs.items()}
    width = inputs["input_ids"].shape[1]
    chosen = LogitsProcessorList([writing(lens, one, [plan])])
    ids = lens.model.generate(**inputs, max_new_tokens=n, do_sample=False, logits_processor=chosen)
    whole = inputs | {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    types = inputs["mm_token_type_ids"]
    new = types.new_zeros(1, ids.shape[1] - width)
    whole["mm_token_type_ids"] = torch.cat([types, new], 1)
    seen: list[torch.Tensor] = []
    norm = lens.model.model.language_model.norm
    handle = norm.register_forward_hook(lambda _, __, out: seen.append(out.detach()))
    with torch.no_grad():
        positions = tiny.positions(lens.model, whole)
        lens.model(**whole, position_ids=positions, use_cache=False)
    handle.remove()
    groups = VOCAB_FAMILIES[lens.family.name].groups
    names = [token for group in groups for token in group]
    latent = set(lens.tokenizer.convert_tokens_to_ids(names))
    written = ids[0, width:].tolist()
    fed = {k: seen[0][0, width + k] for k, t in enumerate(written[:-1]) if t in latent}
    return loops.Trace(written, fed)


def measured(lens: il.LatentModel) -> Iterator[tuple[il.Run, loops.Trace, int]]:
    """Runs of one and of three examples, with what they must equal: run, trace, row."""
    tokens = WRITES[lens.family.name]
    plans, given = [(2, tokens), (12, tokens), (0, [])], [example(i) for i in range(3)]
    for some in (given[:1], given):
        run = wrote(lens, some, plans[: len(some)], 22)
        for row, one in enumerate(some):
            yield run, stock(lens, one, plans[row], 22), row


@pytest.mark.parametrize("kind", ["qwen2_5_vl", "qwen3_vl"])
@pytest.mark.parametrize("name", NAMES)
def test_rows_are_those_of_stock_generate_read_anew(name: str, kind: str) -> None:
    for run, trace, row in measured(lens_of(name, kind)):
        start = run.tokens.prompt_width
        assert run.sequences[row, start:].tolist()[: len(trace.written)] == trace.written
        columns = il.latent.resolve(run.tokens, row)
        assert (columns - start).tolist() == sorted(trace.fed)
        if trace.fed:
            states = run.latents[row, : len(columns)]
            torch.testing.assert_close(states, trace.latents, rtol=0, atol=1e-10)


def one_sentence(error: pytest.ExceptionInfo[Any]) -> str:
    message = str(error.value)
    assert "\n" not in message
    assert len(message) < 600
    assert not re.search(r"\. [A-Z]", message)
    return message


# ---- what a run is -----------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["qwen2_5_vl", "qwen3_vl"])
@pytest.mark.parametrize("name", NAMES)
def test_tokens_are_those_of_stock_generate(name: str, kind: str) -> None:
    """Nothing is fed back, so that generation is the model's own."""
    lens, given = lens_of(name, kind), [example(i) for i in range(3)]
    plans = [(2, WRITES[name]), (0, WRITES[name]), (9, [])]
    inputs = dict(lens.prompt(given).inputs)
    for processor in (writing(lens, given, plans), None):
        own = [] if processor is None else [processor]
        stock = lens.model.generate(
            **inputs, max_new_tokens=26, do_sample=False, logits_processor=LogitsProcessorList(own)
        )
        run = lens.run(given, max_new_tokens=26, generation={"logits_processor": own})
        assert torch.equal(run.sequences, stock)
        if own:  # else a random model writes what it likes
            assert run.trigger.emitted == (sum(SPANS[name]), sum(SPANS[name]), 0)


@pytest.mark.parametrize("kind", ["qwen2_5_vl", "qwen3_vl"])
@pytest.mark.parametrize("name", NAMES)
def test_states_are_those_of_plain_torch_hooks(name: str, kind: str) -> None:
    """One forward over the whole sequence, without a cache, with hooks of torch alone."""
    lens = lens_of(name, kind)
    run = wrote(lens, example(), [(2, WRITES[name])], 26, names_filter="*.hook_resid_post")
    inputs = dict(lens.prompt(example()).inputs)
    new = run.sequences[:, run.tokens.prompt_width :]
    inputs["input_ids"] = run.sequences
    inputs["attention_mask"] = torch.ones_like(run.sequences)
    types = inputs["mm_token_type_ids"]
    inputs["mm_token_type_ids"] = torch.cat([types, torch.zeros_like(new).to(types)], 1)
    seen: dict[str, torch.Tensor] = {}

    def keep(where: str) -> Any:
        return lambda _, __, out: seen.__setitem__(where, out.detach())

    decoder = lens.model.model.language_model
    modules = {"ln_final.hook_normalized": decoder.norm}
    modules |= {f"blocks.{i}.hook_resid_post": block for i, block in enumerate(decoder.layers)}
    handles = [module.register_forward_hook(keep(where)) for where, module in modules.items()]
    with torch.no_grad():
        positions = tiny.positions(lens.model, inputs)
        lens.model(**inputs, position_ids=positions, use_cache=False)
    for handle in handles:
        handle.remove()
    columns = il.latent.resolve(run.tokens, 0)
    assert len(columns) == sum(SPANS[name])
    plain = seen["ln_final.hook_normalized"][0, columns]
    torch.testing.assert_close(run.latents[0], plain, rtol=0, atol=1e-10)
    for site in ("blocks.0.hook_resid_post", SITE):  # not of the last, deepstack or not
        states = run.states(site, il.latent).values[0]
        torch.testing.assert_close(states, seen[site][0, columns], rtol=0, atol=1e-10)
    assert controls.path_gap(lens, wrote(lens, example(), [(2, WRITES[name])], 26, keep_logits=True)
    ) < 1e-9  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_spans_and_steps_are_counted_over_groups(name: str) -> None:
    lens = lens_of(name)
    run = wrote(lens, example(), [(2, WRITES[name])], 26)
    assert [s.steps for s in run.trigger.spans] == SPANS[name]
    assert {(s.opened_by, s.ended_by) for s in run.trigger.spans} == {("sampled", "close")}
    strings = [t for t in WRITES[name] if not t.startswith("<|anchor") and t != "a"]
    ids = lens.tokenizer.convert_tokens_to_ids(strings)
    columns = il.latent.resolve(run.tokens, 0)
    assert run.sequences[0, columns].tolist() == ids
    assert run.tokens.step[0, columns].tolist() == list(range(len(ids)))
    assert run.latent_mask.tolist() == [[True] * len(ids)]
    wanted = [k for k, n in enumerate(SPANS[name]) for _ in range(n)]
    assert run.latent_span.tolist() == [wanted]
    for k, n in enumerate(SPANS[name]):
        own = il.span[k].latent.resolve(run.tokens, 0)
        assert len(own) == n
        assert run.latent_span[0, [columns.tolist().index(c) for c in own]].unique().item() == k
    assert il.latent[1].resolve(run.tokens, 0).tolist() == [columns[1]]
    assert not set(il.text.resolve(run.tokens, 0)) & set(columns)
    assert str(run.trigger).startswith("1 of 1 examples wrote latent tokens; ")
    assert il.hooks.tokens.describe(run.tokens)["vocab"] == len(ids)
    assert columns[-1] < il.answer.resolve(run.tokens, 0)[0]
    text = degeneration.written(run, 0)  # eight equal pads are no sign that a text repeats itself
    assert not set(text) & set(ids)
    assert len(text) == 26 - len(ids)


@pytest.mark.parametrize("name", NAMES)
def test_a_batch_gives_what_its_rows_give_alone(name: str) -> None:
    lens, given = lens_of(name), [example(i) for i in range(3)]
    plans = [(2, WRITES[name]), (12, WRITES[name]), (0, [])]  # the second is cut by the length
    batch = wrote(lens, given, plans, 16, names_filter=SITE)
    for row, one in enumerate(given):
        alone = wrote(lens, one, [plans[row]], 16, names_filter=SITE)
        n = alone.trigger.emitted[0]
        assert batch.trigger.emitted[row] == n == int(batch.latent_mask[row].sum())
        torch.testing.assert_close(batch.latents[row, :n], alone.latents[0], rtol=0, atol=1e-10)
        assert batch.answers[row] == alone.answers[0]
        mine = [replace(s, row=0, column=0) for s in batch.trigger.spans if s.row == row]
        assert mine == [replace(s, column=0) for s in alone.trigger.spans]
    assert batch.trigger.emitted[0] >= batch.trigger.emitted[1] > batch.trigger.emitted[2] == 0


def test_heima_runs_on_its_own_class_as_far_as_text_goes() -> None:
    """Mllama, whose images are not in the sequence; here without one, the tokens in the prompt."""
    spec = VOCAB_FAMILIES["heima"]
    config = walk_shrink.shrunken("mllama")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = AutoModelForImageTextToText.from_config(config).double().eval()
    with mock.patch.object(tiny, "LATENT", spec.strings):
        tokenizer = tiny.tokenizer(bos=True)
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    lens = il.LatentModel(model, tokenizer)
    assert lens.family is spec
    given = {"text": "what?" + "".join(spec.strings)}
    run = lens.run(given, max_new_tokens=5)
    inputs = lens.prompt(given).inputs
    assert torch.equal(run.sequences, model.generate(**inputs, max_new_tokens=5, do_sample=False))
    assert [s.steps for s in run.trigger.spans] == [1, 1, 1]
    with lens.edit(il.Zero(), at=il.latent, site="blocks.0.hook_resid_post") as landing:
        changed = lens.rerun(run)
    assert landing.fired == 1
    assert (changed.latents - run.latents).abs().amax(-1).min() > 1e-6


def test_a_last_token_that_nothing_read_is_no_latent() -> None:
    lens = lens_of("lavit")
    run = wrote(lens, example(), [(2, WRITES["lavit"])], 5)
    assert run.trigger.emitted == (2,)  # of three that were written
    assert [(s.steps, s.ended_by) for s in run.trigger.spans] == [(2, "length")]
    assert run.tokens.kind[0, -1] in (Kind.TEXT, Kind.ANSWER)
    assert run.latents.shape[:2] == run.latent_mask.shape == (1, 2)
    whole = wrote(lens, example(), [(2, WRITES["lavit"])], 12)
    torch.testing.assert_close(run.latents[0], whole.latents[0, :2], rtol=0, atol=1e-12)


def test_tokens_of_the_prompt_are_latents_as_well() -> None:
    """A few shots, a reply begun for the model, or a family that has its tokens in the prompt."""
    lens, given = lens_of("lavit"), example()
    given["text"] += "<lvr1><lvr2><lvr3><lvr4>"
    assert lens.tokens(given).columns(0, Kind.VOCAB).tolist() == list(
        range(lens.tokens(given).width - 4, lens.tokens(given).width)
    )
    run = lens.run(given, max_new_tokens=6)
    assert run.trigger.emitted == (4,)
    assert [(s.opened_by, s.steps) for s in run.trigger.spans] == [("prompt", 4)]
    # another way to the same: the model has written them itself
    written = wrote(lens, example(), [(0, WRITES["lavit"][:4])], 10)
    torch.testing.assert_close(run.latents[0], written.latents[0], rtol=0, atol=1e-10)
    _, cached = lens.run_with_cache(given, names_filter=SITE, positions=(il.latent,))
    assert cached[SITE].shape == (1, 4, 64)


# ---- what there is not -------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_a_state_that_is_fed_back_is_refused_and_the_residual_named(name: str) -> None:
    lens = lens_of(name)
    run = wrote(lens, example(), [(2, WRITES[name])], 22)
    assert "hook_latent" not in lens.registry
    task = il.Pairs([example(0)] * 2, [example(1)] * 2, ["a"] * 2, ["b"] * 2)
    for attempt in (
        lambda: lens.edit(il.Zero(), at=il.latent).__enter__(),
        lambda: lens.swap(run, run),
        lambda: lens.ablate(run, il.Zero()),
        lambda: il.counterfactuals(lens, task),
        lambda: il.necessity(lens, task, edits=[il.Zero()]),
        lambda: il.input_dependence(lens, task),
        lambda: lens.run(example(), names_filter="hook_latent"),
    ):
        with pytest.raises(il.SiteUnavailable, match="feeds nothing back") as error:
            attempt()
        assert "blocks.0.hook_resid_post" in one_sentence(error)
    with pytest.raises(il.DonorError, match="nothing was fed back") as caught:
        run.states("hook_latent", il.latent)
    one_sentence(caught)
    with pytest.raises(il.InputError, match="writes its latents as tokens") as refused:
        lens.run(example(), latents=il.Force(2))
    one_sentence(refused)
    assert "hook_latent" in lens.describe().unsupported


@pytest.mark.parametrize("name", NAMES)
def test_skip_keeps_latents_from_being_written(name: str) -> None:
    """Without it the processor below makes each of them the likeliest token."""
    lens = lens_of(name)
    strings = [t for t in VOCAB_FAMILIES[name].strings if t != "<|anchor_end|>"]
    ids = lens.tokenizer.convert_tokens_to_ids(strings)

    class Likely(LogitsProcessor):
        def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
            scores = scores.clone()
            scores[:, ids] += 1e3
            return scores

    options = {"max_new_tokens": 6, "generation": {"logits_processor": [Likely()]}}
    assert set(lens.run(example(), **options).sequences[0, -6:].tolist()) <= set(ids)
    skipped = lens.run(example(), latents=il.Skip(), **options)
    assert not set(skipped.sequences[0, -6:].tolist()) & set(ids)
    assert skipped.trigger.emitted == (0,)


# ---- edits -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_an_edit_equals_the_same_edit_in_plain_torch(name: str) -> None:
    lens = lens_of(name)
    run = wrote(lens, example(), [(2, WRITES[name])], 22)
    columns = il.span[1].latent.resolve(run.tokens, 0)
    with lens.edit(il.Zero(), at=il.span[1].latent, site=SITE) as landing:
        ours = lens.run_with_hooks(run)
    assert landing.positions == {0: columns.tolist()}

    def zero(_: Any, __: Any, out: torch.Tensor) -> torch.Tensor:
        out = out.clone()
        out[0, columns] = 0
        return out

    handle = lens.model.model.language_model.layers[1].register_forward_hook(zero)
    plain = lens.run_with_hooks(run)
    handle.remove()
    assert torch.equal(ours, plain)
    assert (ours - lens.run_with_hooks(run)).abs().max() > 1e-3


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("site", ["hook_embed", SITE, "blocks.*.hook_resid_post"])
def test_a_sham_changes_nothing_and_a_zero_does(name: str, site: str) -> None:
    lens, plan = lens_of(name), [(2, WRITES[name])]
    run = wrote(lens, example(), plan, 26, keep_logits=True)
    with lens.edit(il.Sham(), at=il.latent, site=site) as landing:
        again = wrote(lens, example(), plan, 26, keep_logits=True)
    assert torch.equal(again.logits, run.logits)
    assert torch.equal(again.latents, run.latents)
    assert len(landing.rows) == 1
    with lens.edit(il.Zero(), at=il.latent, site=site):
        changed = wrote(lens, example(), plan, 26, keep_logits=True)
    assert (changed.logits[0, -1] - run.logits[0, -1]).abs().max() > 1e-3


def test_steps_before_an_edit_are_unchanged() -> None:
    lens, plan = lens_of("covt"), [(2, WRITES["covt"])]
    run = wrote(lens, example(), plan, 26)
    with lens.edit(il.Zero(), at=il.latent[5], site="blocks.0.hook_resid_post"):
        changed = wrote(lens, example(), plan, 26)
    assert torch.equal(changed.latents[0, :5], run.latents[0, :5])
    assert (changed.latents[0, 5:] - run.latents[0, 5:]).abs().amax(-1).min() > 1e-6


# ---- mechanisms that are known -----------------------------------------------------------------

KINDS = ["linear", "bilinear", "and_gate", "saturating", "random"]


@pytest.mark.parametrize("context", ["free", "fixed"])
@pytest.mark.parametrize("site", ["blocks.0.hook_resid_post", "*.hook_resid_post"])
@pytest.mark.parametrize("kind", KINDS)
def test_nested_worlds_of_written_latents_are_known_exactly(
    kind: str, site: str, context: Any
) -> None:
    words = Words(kind)
    worlds = il.counterfactuals(
        words.lens, words.pairs, metric=il.logit_diff, site=site, context=context, reference=False
    )
    for name, truth in words.truth.items():
        np.testing.assert_allclose(getattr(worlds, name), truth, rtol=0, atol=1e-9)
    assert worlds.emitted.tolist() == [[words.mechanism.steps] * 2] * 4


def test_the_last_layer_is_too_late_for_what_later_positions_read() -> None:
    """An edit there reaches the next token alone: no mediator, however well it decodes."""
    words = Words("bilinear")
    result = lens_patch(words, "blocks.1.hook_resid_post")
    assert result.effect.abs().max() == 0
    np.testing.assert_allclose(
        lens_patch(words, "blocks.0.hook_resid_post").after.numpy(), words.truth["y01"], atol=1e-9
    )


def lens_patch(words: Words, site: str) -> il.PatchResult:
    return words.lens.patch(
        base=list(words.pairs.base),
        source=list(words.pairs.source),
        site=site,
        at=il.latent,
        metric=il.logit_diff,
        base_answers=["A"] * 4,
        source_answers=["B"] * 4,
    )


def test_masked_latents_have_no_effect_at_all() -> None:
    words = Words("masked")
    worlds = il.counterfactuals(
        words.lens, words.pairs, metric=il.logit_diff, site="blocks.0.hook_resid_post",
        reference=False,
    )  # fmt: skip
    assert np.array_equal(worlds.y01, worlds.y00)
    assert np.array_equal(worlds.y10, worlds.y11)
    for kind, matters in (("masked", False), ("bilinear", True)):
        edited = Words(kind).lens.ablate(
            list(words.pairs.base),
            il.Zero(),
            site="blocks.0.hook_resid_post",
            metric=il.log_prob,
            context="fixed",  # in free context it would forget which word comes next
        )
        assert bool((edited.effect != 0).all()) is matters
        assert bool((edited.effect == 0).all()) is not matters


def test_necessity_tells_latents_that_matter_from_masked_ones() -> None:
    changes = {}
    for kind in ("fully_mediated", "masked"):
        words = Words(kind)
        asked = list(words.pairs.source)  # all answer B, by their latents alone or by x alone
        own = [str(answer) for answer in words.lens.run(asked).answers]
        table = il.necessity(
            words.lens,
            il.Pairs(asked, list(words.pairs.base), own, ["A"] * 4),
            edits=[il.Zero(), il.Sham()],
            site="blocks.0.hook_resid_post",
            metric=il.accuracy,
            context="fixed",
        )
        assert table.sham.change.value == 0.0
        changes[kind] = table["Zero()"].change.value
    assert changes == {"fully_mediated": -1.0, "masked": 0.0}


def test_the_registers_hold_the_planted_latents() -> None:
    words = Words("linear")
    run = words.lens.run(list(words.pairs.base), names_filter="blocks.0.hook_resid_post")
    states = run.states("blocks.0.hook_resid_post", il.latent).values
    z = states[:, 0, words.lens.model.registers["z"]].numpy()
    np.testing.assert_allclose(z, words.z(words.x0), atol=1e-12)


# ---- on disk -----------------------------------------------------------------------------------

KEYS: dict[str, dict[str, Any]] = {
    "covt": {},
    "lavit": {"v_top_dim": 5120, "loss_scale_vtop": 1.0, "use_trajectory_supervision": True},
    "heima": {},
}


def write(
    folder: Path,
    strings: tuple[str, ...],
    keys: Mapping[str, Any],
    extras: Mapping[str, torch.Tensor] | None = None,
) -> Any:
    """Write a checkpoint as training would leave it; gives the model it was written from."""
    model, processor = built(strings)
    config = type(model.config).from_dict(model.config.to_dict() | dict(keys))
    config.dtype = torch.float64
    config.save_pretrained(folder)
    model.generation_config.save_pretrained(folder)
    processor.tokenizer.save_pretrained(folder)
    processor.image_processor.save_pretrained(folder)
    weights = {k: v.clone() for k, v in model.state_dict().items()} | dict(extras or {})
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return model


@pytest.mark.parametrize("name", NAMES)
def test_a_folder_is_recognised_and_runs(tmp_path: Path, name: str) -> None:
    extras = {}
    if name == "lavit":  # its training heads lie beside the model and are not needed
        extras = {"v_top_head.mlp.0.weight": torch.ones(2, 2), "traj_head.w": torch.ones(1)}
    model = write(tmp_path, VOCAB_FAMILIES[name].strings, KEYS[name], extras)
    lens = il.load(tmp_path, dtype=torch.float64)
    assert lens.family == il.FAMILIES[name]
    assert lens.spec is None
    assert all(torch.equal(v, lens.model.state_dict()[k]) for k, v in model.state_dict().items())
    run = wrote(lens, example(), [(2, WRITES[name])], 26)
    same = wrote(lens_of(name), example(), [(2, WRITES[name])], 26)
    assert torch.equal(run.sequences, same.sequences)
    assert torch.equal(run.latents, same.latents)
    assert f"latents as {name}" in repr(lens)
    assert il.load(tmp_path, spec=False).family is None
    assert il.load(tmp_path, spec=name, dtype=torch.float64).family == il.FAMILIES[name]


def test_covt_with_fewer_experts_is_covt(tmp_path: Path) -> None:
    strings = ("<|anchor_start|>", "<|anchor_end|>", "<|depth_pad|>")
    write(tmp_path, strings, {})
    lens = il.load(tmp_path, dtype=torch.float64)
    assert lens.family.name == "covt"
    plan = [(1, ["<|anchor_start|>", *["<|depth_pad|>"] * 4, "<|anchor_end|>"])]
    ids = lens.tokenizer.convert_tokens_to_ids(plan[0][1])
    processor = Writing([dict(enumerate(ids, 1))], lens.prompt(example()).inputs["input_ids"].shape[1], [])  # fmt: skip  # noqa: E501
    run = lens.run(example(), max_new_tokens=9, generation={"logits_processor": [processor]})
    assert run.trigger.emitted == (4,)


@pytest.mark.parametrize(
    ("strings", "match"),
    [
        (("<lvr1>", "<lvr2>", "<lvr3>"), "lavit needs '<lvr4>'"),
        (("<THINKING_OF_SUMMARY>",), "heima needs '<THINKING_OF_CAPTION>'"),
        (("<|anchor_start|>", "<|sam_pad|>"), r"covt needs '<\|anchor_end\|>'"),
    ],
)
def test_tokens_in_part_are_refused(tmp_path: Path, strings: tuple[str, ...], match: str) -> None:
    write(tmp_path, strings, {})
    with pytest.raises(il.CheckpointError, match=match) as error:
        il.load(tmp_path)
    assert "latent tokens in part" in one_sentence(error)
    assert il.load(tmp_path, spec=False).family is None


def test_a_tokenizer_with_the_tokens_of_two_families_is_refused_until_the_user_says(
    tmp_path: Path,
) -> None:
    covt, lvr = VOCAB_FAMILIES["covt"], il.FAMILIES["lvr"]
    write(tmp_path, (*covt.strings, *lvr.strings), {})
    with pytest.raises(
        il.CheckpointError, match="could be lvr or covt: it has the tokens"
    ) as error:
        il.load(tmp_path)
    one_sentence(error)
    assert il.load(tmp_path, spec="covt").family == covt
    assert il.load(tmp_path, spec="lvr").spec == lvr
    # a config key that one of them writes tells them apart
    write(tmp_path, (*VOCAB_FAMILIES["lavit"].strings, *covt.strings), KEYS["lavit"])
    assert il.load(tmp_path).family.name == "lavit"


class Config:
    """A config with some keys."""

    def __init__(self, **keys: Any) -> None:
        vars(self).update(keys)


def test_the_hub_id_tells_families_apart() -> None:
    both = built((*VOCAB_FAMILIES["covt"].strings, *VOCAB_FAMILIES["lavit"].strings))[1].tokenizer
    for name in ("covt", "lavit"):
        (id_, *_) = VOCAB_FAMILIES[name].checkpoints
        assert family_of(Config(_name_or_path=id_), both).name == name


def test_a_spec_without_its_tokens_is_refused() -> None:
    model, processor = built(VOCAB_FAMILIES["lavit"].strings)
    with pytest.raises(il.CheckpointError, match="covt family needs tokens that are missing") as e:
        il.LatentModel(model, processor, "covt")
    one_sentence(e)
    with pytest.raises(il.CheckpointError, match="a tokenizer tells, and there is none"):
        il.LatentModel(model, None, "lavit")
    with pytest.raises(il.CheckpointError, match="there is no family 'lavitt'; choose one of"):
        il.LatentModel(model, processor, "lavitt")


@pytest.mark.parametrize(
    ("groups", "match"),
    [((), "at least one group"), (((),), "at least one token"), ((("a",), ("a",)), "two groups")],
)
def test_a_spec_that_says_nothing_is_refused(groups: Any, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        VocabSpec(name="x", groups=groups)


@pytest.mark.parametrize(
    ("name", "text", "found"),
    [
        ("covt", "<|anchor_end|> so <answer> B <|sam_pad|></answer>", "B"),
        ("covt", "<|anchor_end|> red", "red"),
        ("lavit", "<answer>C</answer>", "C"),
        ("heima", "<THINKING_OF_CAPTION> two", "two"),
    ],
)
def test_answers_survive_stray_latent_tokens(name: str, text: str, found: str) -> None:
    where = lens_of(name).find_answer(text)
    assert where is not None
    assert text[slice(*where)].strip() == found


# ---- families of one's own ---------------------------------------------------------------------


@pytest.fixture
def own_families() -> Any:
    """Families that a test registers are gone behind it."""
    from imaginelens.hooks import families

    before, known = dict(families.FAMILIES), list(families._recognised)
    yield
    families.FAMILIES.clear()
    families.FAMILIES.update(before)
    families._recognised[:] = known


MINE = VocabSpec(name="mine", groups=(("<see>",) * 2, ("<far>", "<near>")))


@pytest.mark.usefixtures("own_families")
def test_a_registered_family_is_recognised_on_disk(tmp_path: Path) -> None:
    write(tmp_path, MINE.strings, {})
    assert il.load(tmp_path).family is None
    register_family(MINE)
    assert il.load(tmp_path).family is MINE
    assert il.FAMILIES["mine"] is MINE
    fed = il.LatentSpec(name="fed", open="<in>", close="</in>", pad="<z>", max_steps=3)
    register_family(fed)
    (tmp_path / "fed").mkdir()
    write(tmp_path / "fed", fed.strings, {})
    lens = il.load(tmp_path / "fed", dtype=torch.float64)
    assert lens.spec is fed
    run = lens.run(example(), max_new_tokens=8, latents=il.Force(2, at=1))
    assert run.trigger.emitted == (2,)
    told = il.TextSpec(name="told", open="<tell>", close="</tell>")
    register_family(told)
    (tmp_path / "told").mkdir()
    write(tmp_path / "told", (told.open, told.close, "<q>"), {})
    assert il.load(tmp_path / "told").family is told
    with_keys = il.LatentSpec(
        name="keys", open=None, close=None, pad=None, max_steps=2, trigger="sampled",
        config_keys={"open": "my_open", "close": "my_close", "pad": "my_pad"},
    )  # fmt: skip
    register_family(with_keys)
    assert family_of(Config(my_open=1, my_close=2, my_pad=3), None) is with_keys
    assert family_of(Config(my_open=1, my_close=2), None) is None


@pytest.mark.usefixtures("own_families")
@pytest.mark.parametrize(
    ("spec", "match"),
    [
        (replace(MINE, name="covt"), "there is a family 'covt' already"),
        (replace(MINE, name=""), "a family needs a name"),
        (VocabSpec(name="x", groups=(("<lvr1>", "<lvr2>", "<lvr3>", "<lvr4>"),)), "of 'lavit'"),
        (VocabSpec(name="x", groups=(("<lvr1>", "<lvr2>"),)), "of 'lavit'"),
        (replace(VOCAB_FAMILIES["covt"], name="x", checkpoints=()), "which are those of 'covt'"),
        (replace(il.FAMILIES["lvr"], name="x", checkpoints=()), "which are those of 'lvr'"),
        (replace(MINE, checkpoints=("Svard/LaViT-3B",)), "'Svard/LaViT-3B' belongs to"),
        (VocabSpec(name="x", groups=(("<one>",),)), "could not be recognised by 1 token"),
        (
            il.LatentSpec(name="x", open=5, close=6, pad=7, max_steps=2),
            "could not be recognised by 0 token",
        ),
        (il.TextSpec(name="x"), "of 'capimagine'"),
    ],
)
def test_families_that_could_not_be_told_are_refused(spec: Any, match: str) -> None:
    before = dict(il.FAMILIES)
    with pytest.raises(il.InputError, match=re.escape(match)) as error:
        register_family(spec)
    one_sentence(error)
    assert before == il.FAMILIES


@pytest.mark.usefixtures("own_families")
def test_one_token_is_recognised_by_its_hub_id_alone() -> None:
    single = VocabSpec(name="single", groups=(("<see>",),), checkpoints=("me/single",))
    register_family(single)
    tokenizer = built(("<see>", "<b>", "<c>"))[1].tokenizer
    assert family_of(Config(), tokenizer) is None
    assert family_of(Config(_name_or_path="me/single"), tokenizer) is single
    with pytest.raises(il.InputError, match="there is a family 'single' already"):
        register_family(single)


# ---- semantics unverified ----------------------------------------------------------------------


@pytest.mark.parametrize("name", sorted(NOTES))
def test_unverified_families_load_by_name_with_a_note(
    tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    spec = il.FAMILIES[name]
    write(tmp_path, tuple(dict.fromkeys(spec.strings)), {})
    assert il.load(tmp_path).family is None
    assert "not verified" not in capsys.readouterr().err
    lens = il.load(tmp_path, spec=name, dtype=torch.float64)
    assert f"imaginelens: {name} is not verified: " in capsys.readouterr().err
    assert lens.spec == spec
    run = lens.run(example(), max_new_tokens=12, latents=il.Force(3, at=0))
    assert run.trigger.emitted == (3,)
    named = json.loads((tmp_path / "config.json").read_text()) | {"imaginelens_family": name}
    (tmp_path / "config.json").write_text(json.dumps(named))
    assert il.load(tmp_path).spec == spec
    assert "not verified" in capsys.readouterr().err


def test_laser_opens_by_itself_and_valr_feeds_a_fixed_number() -> None:
    laser = il.FAMILIES["laser"]
    run = il.LatentModel(*built(laser.strings), spec=laser).run(example(), max_new_tokens=14)
    assert [(s.opened_by, s.steps) for s in run.trigger.spans][:1] == [("forced", 8)]
