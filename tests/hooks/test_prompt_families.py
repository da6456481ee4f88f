"""Families whose latents no sampled token opens: each equals its reference, each folder loads."""

import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import reference_loops_prompt as loops
import tiny
import torch
import transformers as hf
from safetensors.torch import save_file

import imaginelens as il
from imaginelens.hooks import controls, heads
from imaginelens.hooks.families import FAMILIES
from imaginelens.hooks.unverified import UNVERIFIED_FAMILIES

COCONUT = ("<|start-latent|>", "<|end-latent|>", "<|latent|>")
D, MAX_NEW = 64, 7
CODI_NEW = 8 + MAX_NEW
TEXTS = ("what is two and two?", "one plus seven is", "how many cats are there now, all in all?")


# ---- tiny text models --------------------------------------------------------------------------


def text_model(kind: str, size: int, seed: int = 0) -> hf.PreTrainedModel:
    """A random GPT-2 or Llama whose weights are loud enough that every position matters."""
    if kind == "gpt2":
        config: Any = hf.GPT2Config(
            n_embd=D, n_layer=3, n_head=4, n_positions=256, vocab_size=size,
            bos_token_id=None, eos_token_id=2,
        )  # fmt: skip
        model: Any = hf.GPT2LMHeadModel(config)
    else:
        config = hf.LlamaConfig(
            hidden_size=D, intermediate_size=96, num_hidden_layers=3, num_attention_heads=4,
            num_key_value_heads=2, vocab_size=size, bos_token_id=None, eos_token_id=2,
            pad_token_id=0,
        )  # fmt: skip
        model = hf.LlamaForCausalLM(config)
    generator = torch.Generator().manual_seed(seed)
    model = model.double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            if parameter.ndim == 1:
                parameter += 0.1 * noise
            else:
                parameter.copy_(1.2 * parameter.shape[-1] ** -0.5 * noise)
    model.generation_config = hf.GenerationConfig(
        do_sample=False, eos_token_id=2, pad_token_id=0, max_new_tokens=CODI_NEW
    )
    return model


@cache
def built(kind: str, strings: tuple[str, ...], more: int = 0) -> tuple[Any, Any]:
    """A text model and its tokenizer, with `more` ids that have no string."""
    with mock.patch.object(tiny, "LATENT", strings):
        tok = tiny.tokenizer(bos=False)
    return text_model(kind, len(tok) + more), tok


@cache
def built_vlm(kind: str, strings: tuple[str, ...]) -> tuple[Any, Any]:
    with mock.patch.object(tiny, "LATENT", strings):
        return tiny.fresh(kind)


def question(i: int = 0, *, n: int = 3) -> dict[str, Any]:
    """A question with `n` placeholders in Coconut's layout."""
    latents = "<|start-latent|>" + n * "<|latent|>" + "<|end-latent|>"
    return {"text": f"{TEXTS[i]}\n{latents}"}


def machine(lens: il.LatentModel, given: Any, **more: Any) -> loops.Machine:
    inputs = dict(lens.prompt(given).inputs)
    return loops.Machine(lens.model, inputs, MAX_NEW, 2, **more)


def error_of(run: il.Run, trace: loops.Trace, row: int = 0) -> float:
    """The largest difference of latents; asserts that ids and places are the same."""
    real = run.tokens.start(row)
    n = len(trace.ids)
    assert run.sequences[row, real : real + n].tolist() == trace.ids
    assert set(run.tokens.kind[row, real + n :].tolist()) <= {0}
    columns = il.latent.resolve(run.tokens, row) - real
    assert columns.tolist() == sorted(trace.fed)
    assert run.trigger.emitted[row] == len(trace.fed)
    assert run.latent_mask[row].sum() == len(trace.fed)
    assert sum(s.steps for s in run.trigger.spans if s.row == row) == len(trace.fed)
    if not trace.fed:
        return 0.0
    return float((run.latents[row, : len(trace.fed)] - trace.latents).abs().max())


def assert_same(run: il.Run, trace: loops.Trace, row: int = 0) -> None:
    assert error_of(run, trace, row) < 1e-10


# ---- Coconut and SIM-CoT -----------------------------------------------------------------------


def coconut_lens(kind: str = "gpt2", name: str = "coconut") -> il.LatentModel:
    return il.LatentModel(*built(kind, COCONUT), spec=FAMILIES[name])


def coconut_trace(lens: il.LatentModel, given: Any) -> loops.Trace:
    return loops.coconut(machine(lens, given), latent_token_id=lens.span_tokens.pad)


@pytest.mark.parametrize("n", [1, 2, 6])
@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_coconut_equals_its_reference(kind: str, n: int) -> None:
    lens = coconut_lens(kind)
    run = lens.run(question(n=n), max_new_tokens=MAX_NEW, keep_logits=True)
    assert_same(run, coconut_trace(lens, question(n=n)))
    assert controls.path_gap(lens, run) < 1e-9
    assert [(s.opened_by, s.ended_by, s.steps) for s in run.trigger.spans] == [
        ("prompt", "prompt", n)
    ]
    assert run.forwards == n + MAX_NEW


def test_sim_cot_is_coconuts_loop_over_ten_placeholders() -> None:
    spec = FAMILIES["sim-cot"]
    lens = coconut_lens("llama", "sim-cot")
    given = {"text": TEXTS[0] + "\n" + spec.placeholders}
    run = lens.run(given, max_new_tokens=MAX_NEW)
    assert run.trigger.emitted == (10,)
    assert_same(run, coconut_trace(lens, given))
    assert FAMILIES["coconut"].placeholders.count("<|latent|>") == 6


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_a_batch_of_prompts_equals_the_reference_row_by_row(kind: str) -> None:
    """Rows of unequal length, with placeholders at other columns, none, or in two spans."""
    lens = coconut_lens(kind)
    given = [
        question(0),
        question(1, n=5),
        {"text": TEXTS[2]},
        {"text": question(2, n=2)["text"] + " and then" + "<|latent|>" * 2 + "?"},
    ]
    run = lens.run(given, max_new_tokens=MAX_NEW, keep_logits=True)
    for row, one in enumerate(given):
        assert_same(run, coconut_trace(lens, one), row)
    assert run.trigger.emitted == (3, 5, 0, 4)
    assert run.latent_span[3].tolist() == [0, 0, 1, 1, -1]
    assert controls.path_gap(lens, run) < 1e-9
    assert il.span[1].latent.resolve(run.tokens, 3).tolist() == (
        il.latent.resolve(run.tokens, 3)[2:].tolist()
    )


def test_every_placeholder_is_a_latent_position_before_and_after_the_run() -> None:
    lens = coconut_lens()
    run = lens.run(question(), max_new_tokens=2)
    for tokens in (lens.tokens(question()), run.tokens):
        columns = il.latent.resolve(tokens, 0)
        assert tokens.ids[0, columns].tolist() == [lens.span_tokens.pad] * 3
        assert tokens.step[0, columns].tolist() == [0, 1, 2]
    assert "<|latent|>" not in run.text
    assert run.text == run.tokens.text(0, run.tokens.prompt_width)


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_edits_of_prompt_latents_in_free_and_fixed_context(kind: str) -> None:
    """A latent that is replaced changes the later ones as the reference says, and no earlier."""
    lens = coconut_lens(kind)
    run = lens.run(question(), max_new_tokens=MAX_NEW, keep_logits=True)
    vector = torch.full((D,), 0.7, dtype=torch.float64)
    with lens.edit(il.Replace(vector), at=il.latent[1]) as landing:
        free = lens.run(question(), max_new_tokens=MAX_NEW, keep_logits=True)
        fixed = lens.run_with_hooks(run)
        read_again = lens.run_with_hooks(free)
    assert landing.fired
    torch.testing.assert_close(free.latents[0, 0], run.latents[0, 0], rtol=0, atol=1e-12)
    assert torch.equal(free.latents[0, 1], vector)
    assert (free.latents[0, 2] - run.latents[0, 2]).abs().max() > 1e-3
    m = machine(lens, question())
    trace = m.begin()
    places = [i for i, token in enumerate(trace.ids) if token == lens.span_tokens.pad]
    for step, place in enumerate(places):
        trace.fed[place] = vector if step == 1 else m.read(trace, place)[0]
    assert_same(free, m.write_on(trace))
    # fixed: the third latent keeps the value it had
    kept = loops.Trace(run.sequences[0].tolist(), dict(zip(places, run.latents[0], strict=True)))
    kept.fed[places[1]] = vector
    torch.testing.assert_close(fixed[0, -1], m.read(kept)[1], rtol=0, atol=1e-9)
    start = run.tokens.prompt_width - 1
    gap = (read_again[:, start : start + MAX_NEW] - free.logits)[:, : len(trace.ids)].abs()
    assert gap[:, :2].max() < 1e-9


def test_sham_on_prompt_latents_changes_nothing_and_swap_brings_the_donors() -> None:
    lens = coconut_lens()
    base = lens.run([question(0), question(1)], max_new_tokens=MAX_NEW)
    source = lens.run([question(2), question(2)], max_new_tokens=MAX_NEW)
    for site in ("hook_latent", "blocks.1.hook_resid_post", "ln_final.hook_normalized"):
        assert controls.sham_difference(lens, base, site=site, at=il.latent)[0] == 0.0
        with lens.edit(il.Sham(), at=il.latent, site=site):
            again = lens.run([question(0), question(1)], max_new_tokens=MAX_NEW)
        assert torch.equal(again.latents, base.latents)
        assert torch.equal(again.sequences, base.sequences)
    with lens.edit(il.Swap(source), at=il.latent):
        swapped = lens.run([question(0), question(1)], max_new_tokens=MAX_NEW)
    assert torch.equal(swapped.latents, source.latents)
    for context in ("free", "fixed"):
        result = lens.swap(
            [question(0), question(1)], [question(2), question(2)], context=context,
            metric=il.kl,
        )  # fmt: skip
        assert (result.after > 1e-6).all()


def test_a_state_is_captured_and_patched_at_prompt_latents() -> None:
    """The last layer at latent t decides z of t + 1."""
    lens = coconut_lens()
    site = "blocks.2.hook_resid_post"
    run = lens.run(question(), names_filter=[site, "hook_embed"], max_new_tokens=3)
    held = run.cache.columns[site][0].tolist()
    assert set(il.latent.resolve(run.tokens, 0).tolist()) <= set(held)
    with lens.edit(il.Zero(), at=il.latent[0], site=site):
        changed = lens.run(question(), max_new_tokens=3)
    assert torch.equal(changed.latents[0, 0], run.latents[0, 0])
    bias = lens.model.transformer.ln_f.bias.detach()
    torch.testing.assert_close(changed.latents[0, 1], bias, rtol=0, atol=1e-12)


def test_skip_reads_placeholders_as_words_and_force_says_where_they_belong() -> None:
    lens = coconut_lens()
    run = lens.run(question(), max_new_tokens=4, latents=il.Skip())
    assert run.trigger.emitted == (0,)
    inputs = lens.prompt(question()).inputs
    stock = lens.model.generate(
        **inputs, max_new_tokens=4, do_sample=False, suppress_tokens=[lens.span_tokens.open]
    )
    assert torch.equal(run.sequences[:, : stock.shape[1]], stock)
    with pytest.raises(il.CheckpointError, match="write 2 of them into it"):
        lens.run(question(), latents=il.Force(2))


def test_prompts_whose_latents_cannot_be_computed_are_refused() -> None:
    lens = coconut_lens()
    with pytest.raises(il.InputError, match=r"row 1 begins with the latent placeholder"):
        lens.run([question(), {"text": "<|latent|> hm"}])
    for read in (lens.run_with_cache, lens.run_with_hooks):
        with pytest.raises(il.InputError, match=r"the prompt holds 3 latent placeholders"):
            read(question())
    with pytest.raises(ValueError, match="has no placeholders to write into a prompt"):
        _ = FAMILIES["monet"].placeholders
    model, processor = built_vlm("qwen2_5_vl", COCONUT)
    seeing = il.LatentModel(model, processor, spec=FAMILIES["coconut"])
    behind = {"images": tiny.image(48, 32, seed=0), "text": "a <|latent|> b " + PICTURE}
    with pytest.raises(il.InputError, match="images are read at once; put the images first"):
        seeing.run(behind)


PICTURE = tiny.prompt("qwen2_5_vl", "")


def test_a_model_whose_prompt_looks_ahead_is_refused() -> None:
    """PaliGemma: a state before a placeholder also depends on what stands behind it."""
    lens = il.LatentModel(*built_vlm("paligemma", COCONUT), spec=FAMILIES["coconut"])
    text = tiny.prompt("paligemma", question()["text"])
    with pytest.raises(il.InputError, match="also depends on what comes behind"):
        lens.run({"images": tiny.image(32, 32, seed=0), "text": text})


@pytest.mark.parametrize("kind", ["gemma3", "llava", "mistral3", "llava_onevision"])
def test_a_prompt_read_in_segments_is_a_prompt_read_at_once(kind: str) -> None:
    """Sliding windows, image blocks that look ahead, tiles: generating and reading agree."""
    lens = il.LatentModel(*built_vlm(kind, COCONUT), spec=FAMILIES["coconut"])
    given = [
        {"images": tiny.image(48, 32, seed=i), "text": tiny.prompt(kind, question(i)["text"])}
        for i in range(2)
    ]
    batch = lens.run(given, max_new_tokens=4, keep_logits=True)
    assert controls.path_gap(lens, batch) < 1e-9
    _, cache_ = lens.run_with_cache(batch, names_filter="ln_final.hook_normalized")
    h = cache_["ln_final.hook_normalized"]
    for row, one in enumerate(given):
        columns = il.latent.resolve(batch.tokens, row)
        torch.testing.assert_close(batch.latents[row], h[row, columns - 1], rtol=0, atol=1e-9)
        alone = lens.run(one, max_new_tokens=4)
        torch.testing.assert_close(alone.latents[0], batch.latents[row], rtol=0, atol=1e-9)


@pytest.mark.parametrize("kind", ["qwen2_5_vl", "qwen3_vl"])
def test_placeholders_work_behind_pictures_too(kind: str) -> None:
    """Nobody released this, but multi-axis positions and deepstack must survive the segments."""
    lens = il.LatentModel(*built_vlm(kind, COCONUT), spec=FAMILIES["coconut"])
    given = [
        {"images": tiny.image(48, 32, seed=i), "text": tiny.prompt(kind, question(i)["text"])}
        for i in range(2)
    ]
    run = lens.run(given[0], max_new_tokens=MAX_NEW, keep_logits=True)
    trace = coconut_trace(lens, given[0])
    assert_same(run, trace)
    assert controls.path_gap(lens, run) < 1e-9
    batch = lens.run(given, max_new_tokens=MAX_NEW)
    for row, one in enumerate(given):
        assert_same(batch, coconut_trace(lens, one), row)


def test_a_wrong_convention_is_told_apart_from_the_reference() -> None:
    lens = coconut_lens()
    off = il.LatentModel(
        lens.model, lens.tokenizer, spec=replace(lens.spec, project=lambda h, _: h + 1e-6)
    )
    with pytest.raises(AssertionError):
        assert_same(off.run(question(), max_new_tokens=MAX_NEW), coconut_trace(lens, question()))


# ---- CODI --------------------------------------------------------------------------------------


def prj_weights(d_mlp: int = 48, *, ln: bool = True, prefix: str = "prj.") -> dict[str, Any]:
    generator = torch.Generator().manual_seed(7)
    shapes = {"1.weight": (d_mlp, D), "1.bias": (d_mlp,), "3.weight": (D, d_mlp), "3.bias": (D,)}
    shapes |= {"ln.weight": (D,), "ln.bias": (D,)} if ln else {}
    return {
        prefix + name: torch.randn(*shape, generator=generator, dtype=torch.float64) / 4
        for name, shape in shapes.items()
    }


def plain_prj(weights: Mapping[str, torch.Tensor]) -> Callable[[torch.Tensor], torch.Tensor]:
    """Linear, GELU, linear, layer norm (src/model.py) as formulas."""
    w = {name.split("prj.")[1]: value for name, value in weights.items()}

    def prj(h: torch.Tensor) -> torch.Tensor:
        x = w["1.weight"] @ h + w["1.bias"]
        x = x * 0.5 * (1 + torch.erf(x / 2**0.5))
        x = w["3.weight"] @ x + w["3.bias"]
        if "ln.weight" not in w:
            return x
        x = (x - x.mean()) / (x.var(unbiased=False) + 1e-5).sqrt()
        return x * w["ln.weight"] + w["ln.bias"]

    return prj


def codi_lens(kind: str = "gpt2", *, ln: bool = True) -> il.LatentModel:
    model, tok = built(kind, ("<a>", "<b>", "<c>"), 3)
    size = model.config.vocab_size
    head = heads.build_head(prj_weights(ln=ln), "prj.")
    spec = replace(FAMILIES["codi"], project=heads.OnAll(head))
    lens = il.LatentModel(model, tok, spec=spec)
    ids = lens.span_tokens
    assert (ids.pad, ids.open, ids.close) == (size - 3, size - 2, size - 1)
    assert len(tok) == size - 3
    return lens


def codi_trace(
    lens: il.LatentModel, given: Any, *, ln: bool = True, max_new: int = MAX_NEW
) -> loops.Trace:
    ids = lens.span_tokens
    m = loops.Machine(lens.model, dict(lens.prompt(given).inputs), max_new, 2)
    prj = plain_prj(prj_weights(ln=ln))
    return loops.codi(m, bot=ids.open, eot=ids.close, pad=ids.pad, n=6, prj=prj)


@pytest.mark.parametrize("ln", [True, False])
@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_codi_equals_its_reference(kind: str, ln: bool) -> None:
    lens = codi_lens(kind, ln=ln)
    given = {"text": TEXTS[0]}
    run = lens.run(given, max_new_tokens=CODI_NEW, keep_logits=True)
    assert_same(run, codi_trace(lens, given, ln=ln, max_new=CODI_NEW))
    assert [(s.opened_by, s.ended_by, s.steps) for s in run.trigger.spans] == [("forced", "cap", 6)]
    written = run.sequences[0, run.tokens.prompt_width :].tolist()
    ids = lens.span_tokens
    assert written[:8] == [ids.open, *[ids.pad] * 6, ids.close]
    assert controls.path_gap(lens, run) < 1e-9


def test_a_batch_of_codi_equals_the_reference_row_by_row() -> None:
    lens = codi_lens()
    given = [{"text": text} for text in TEXTS]
    run = lens.run(given, max_new_tokens=CODI_NEW)
    for row, one in enumerate(given):
        assert_same(run, codi_trace(lens, one, max_new=CODI_NEW), row)


def check_edits(lens: il.LatentModel, given: Any, other: Any, limit: int) -> None:
    """Sham is exact, a replaced step leaves earlier ones alone, and swap brings the donor's."""
    run = lens.run(given, max_new_tokens=limit, keep_logits=True)
    with lens.hooks([("hook_latent", lambda act, hook: act + 0.1)]):
        donor = lens.run(other, max_new_tokens=limit)
    assert controls.sham_difference(lens, run, site="hook_latent", at=il.latent)[0] == 0.0
    with lens.edit(il.Sham(), at=il.latent):
        again = lens.run(given, max_new_tokens=limit, keep_logits=True)
    assert torch.equal(again.logits, run.logits)
    assert torch.equal(again.latents, run.latents)
    vector = torch.full((D,), 0.7, dtype=torch.float64)
    with lens.edit(il.Replace(vector), at=il.latent[1]) as landing:
        free = lens.run(given, max_new_tokens=limit, keep_logits=True)
        fixed = lens.run_with_hooks(run)
    assert landing.fired
    assert torch.equal(free.latents[0, 0], run.latents[0, 0])
    assert torch.equal(free.latents[0, 1], vector)
    assert controls.path_gap(lens, free) < 1e-9
    unedited = lens.run_with_hooks(run)
    first = int(il.latent.resolve(run.tokens, 0)[1])
    assert torch.equal(fixed[0, :first], unedited[0, :first])
    assert (fixed[0, first:] - unedited[0, first:]).abs().max() > 1e-3
    n = min(run.latents.shape[1], donor.latents.shape[1])
    with lens.edit(il.Swap(donor), at=il.latent[:n]):
        swapped = lens.run(given, max_new_tokens=limit)
    assert torch.equal(swapped.latents[0, :n], donor.latents[0, :n])
    reread = lens.run_with_cache(swapped, names_filter="blocks.0.hook_resid_pre")
    assert reread[0].shape[1] == swapped.tokens.width
    for context in ("free", "fixed"):  # the same as verbs, with the donor's rows as they are
        result = lens.swap(run, donor, at=il.latent[:n], context=context, metric=il.kl)
        assert (result.after > 1e-9).all()


def test_edits_of_codis_latents() -> None:
    check_edits(codi_lens(), {"text": TEXTS[0]}, {"text": TEXTS[1]}, CODI_NEW)


# ---- Soft Thinking -----------------------------------------------------------------------------

THINK = ("<think>", "</think>", "<other>")


class Steering:
    """Has `</think>` be likeliest at one generated step, and the end of the text at another."""

    def __init__(self, width: int, plan: Mapping[int, int], never: list[int]) -> None:
        self.width, self.plan, self.never = width, plan, never

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        step = input_ids.shape[1] - self.width
        scores = scores.clone()
        scores[:, self.never] = -torch.inf
        if step in self.plan:
            scores[:, self.plan[step]] = scores.max() + 1
        return scores


class Steered(hf.LogitsProcessor):
    def __init__(self, steering: Steering) -> None:
        self.steering = steering

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        return self.steering(input_ids, scores)


def soft_lens(kind: str = "llama", **mixture: Any) -> il.LatentModel:
    spec = FAMILIES["soft-thinking"]
    spec = replace(spec, feeds=replace(spec.feeds, **mixture))
    made = built(kind, THINK) if kind in ("gpt2", "llama") else built_vlm(kind, THINK)
    return il.LatentModel(*made, spec=spec)


def thought(
    lens: il.LatentModel, given: Any, plan: Mapping[int, str], **options: Any
) -> tuple[il.Run, list[loops.Trace]]:
    """A run and its references under one plan, e.g. {4: "close"}."""
    ids = {"close": lens.span_tokens.close, "eos": 2}
    steps = {step: ids[what] for step, what in plan.items()}
    width = lens.prompt(given).inputs["input_ids"].shape[1]
    never = [] if "eos" in plan.values() and "close" in plan.values() else list(ids.values())
    processor = Steered(Steering(width, steps, never))
    generation = {"logits_processor": [processor], **options}
    run = lens.run(given, max_new_tokens=MAX_NEW, generation=generation, keep_logits=True)
    traces = []
    for one in given if isinstance(given, list) else [given]:
        inputs = dict(lens.prompt(one).inputs)
        own = Steering(inputs["input_ids"].shape[1], steps, never)
        mixture = lens.spec.feeds
        traces.append(
            loops.soft_thinking(
                loops.Machine(lens.model, inputs, MAX_NEW, 2, own),
                think_end=ids["close"],
                embedding=lens.model.get_input_embeddings().weight.detach(),
                max_topk=mixture.top_k,
                entropy_threshold=mixture.calm_below,
                length_threshold=mixture.patience,
                temperature=options.get("temperature", 1.0),
            )
        )
        # the length ended it before this one was read
        traces[-1].fed.pop(inputs["input_ids"].shape[1] + MAX_NEW - 1, None)
    return run, traces


@pytest.mark.parametrize("plan", [{}, {3: "close"}, {0: "close"}, {1: "close", 4: "eos"}])
@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_soft_thinking_equals_its_reference(kind: str, plan: dict[int, str]) -> None:
    lens = soft_lens(kind)
    run, (trace,) = thought(lens, {"text": TEXTS[0]}, plan)
    assert_same(run, trace)
    end = next((step for step, what in plan.items() if what == "close"), MAX_NEW - 1)
    assert run.trigger.emitted == (end,)
    assert [s.opened_by for s in run.trigger.spans] == ["always"]
    assert controls.path_gap(lens, run) < 1e-9


@pytest.mark.parametrize("kind", ["qwen2_5_vl", "llava"])
def test_soft_thinking_works_on_models_with_pictures(kind: str) -> None:
    lens = soft_lens(kind)
    given = [
        {"images": tiny.image(48, 32, seed=i), "text": tiny.prompt(kind, TEXTS[i])}
        for i in range(2)
    ]
    run, (trace,) = thought(lens, given[0], {4: "close"})
    assert_same(run, trace)
    assert controls.path_gap(lens, run) < 1e-9
    batch, traces = thought(lens, given, {4: "close"})
    for row, trace in enumerate(traces):
        assert_same(batch, trace, row)


def test_a_batch_of_thoughts_equals_the_reference_row_by_row() -> None:
    lens = soft_lens("llama", top_k=4)
    given = [{"text": text} for text in TEXTS]
    run, traces = thought(lens, given, {4: "close"})
    for row, trace in enumerate(traces):
        assert_same(run, trace, row)


@pytest.mark.parametrize("patience", [1, 3])
def test_steps_that_are_sure_end_the_thought(patience: int) -> None:
    """The entropy that counts is of the whole distribution: no filter makes a step sure."""
    lens = soft_lens("llama", calm_below=100.0, patience=patience)
    run, (trace,) = thought(lens, {"text": TEXTS[0]}, {})
    assert_same(run, trace)
    assert [(s.steps, s.ended_by) for s in run.trigger.spans] == [(patience - 1, "criterion")]
    entropy = torch.distributions.Categorical(logits=run.logits[0]).entropy()
    lens = soft_lens("llama", calm_below=float(entropy[:3].max()) + 1e-9, patience=2)
    run, (trace,) = thought(lens, {"text": TEXTS[0]}, {})
    assert_same(run, trace)


def test_a_thought_that_writes_the_end_of_the_text_ends_there() -> None:
    lens = soft_lens()
    run, (trace,) = thought(lens, {"text": TEXTS[0]}, {2: "eos", 5: "close"})
    assert_same(run, trace)
    assert [(s.steps, s.ended_by) for s in run.trigger.spans] == [(2, "end of text")]
    batch, traces = thought(lens, [{"text": t} for t in TEXTS], {2: "eos", 5: "close"})
    for row, trace in enumerate(traces):
        assert_same(batch, trace, row)


def test_filters_and_temperature_shape_the_mixture_and_sampling_does_not() -> None:
    """While it thinks it writes the likeliest token, whatever is drawn elsewhere."""
    lens = soft_lens()
    options = {"do_sample": True, "temperature": 0.7, "top_k": 0, "top_p": 1.0}
    run, (trace,) = thought(lens, {"text": TEXTS[0]}, {}, **options)
    assert_same(run, trace)
    narrow, _ = thought(lens, {"text": TEXTS[0]}, {}, do_sample=True, top_k=1, temperature=0.7)
    own = lens.model.get_input_embeddings().weight[narrow.sequences[0, narrow.tokens.prompt_width]]
    torch.testing.assert_close(narrow.latents[0, 0], own.detach(), rtol=0, atol=1e-15)


def test_edits_and_loop_control_of_thoughts() -> None:
    lens = soft_lens("llama")
    given = {"text": TEXTS[0]}
    short = il.LatentModel(lens.model, lens.tokenizer, spec=lens.spec.with_steps(3))
    check_edits(short, given, {"text": TEXTS[1]}, MAX_NEW)
    forced = lens.run(given, max_new_tokens=MAX_NEW, latents=il.Force(3))
    assert forced.trigger.emitted == (3,)
    assert forced.sequences[0, forced.tokens.prompt_width + 3] == lens.span_tokens.close
    skipped = lens.run(given, max_new_tokens=4, latents=il.Skip())
    assert skipped.trigger.emitted == (0,)
    with pytest.raises(il.CheckpointError, match="leave `at` out"):
        lens.run(given, latents=il.Force(2, at=1))


def test_a_retold_thought_mixes_its_own_tokens() -> None:
    lens = soft_lens("llama")
    one, other = (lens.run({"text": TEXTS[i]}, max_new_tokens=5) for i in range(2))
    told = lens.retell(one, like=other)
    assert told.tokens.text(0, told.tokens.prompt_width) == other.text
    torch.testing.assert_close(told.latents[0, 0], one.latents[0, 0], rtol=0, atol=1e-12)


def test_a_mixture_of_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="mixes nothing or ends before it begins"):
        il.FAMILIES["soft-thinking"].feeds.__class__(top_k=0)
    with pytest.raises(ValueError, match="set trigger='prompt'"):
        replace(FAMILIES["monet"], feeds="embedding")


# ---- DMLR --------------------------------------------------------------------------------------

DMLR = ("<|endoftext|>", "<b>", "<c>")


def dmlr_lens(kind: str) -> il.LatentModel:
    made = built(kind, DMLR) if kind in ("gpt2", "llama") else built_vlm(kind, DMLR)
    return il.LatentModel(*made, spec=FAMILIES["dmlr"])


def free_prompt(kind: str, i: int = 0, n: int = 2) -> dict[str, Any]:
    text = n * "<|endoftext|>" + TEXTS[i]
    if kind in ("gpt2", "llama"):
        return {"text": text}
    return {"images": tiny.image(48, 32, seed=i), "text": tiny.prompt(kind, text)}


def vectors(n: int, seed: int = 3) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, D, generator=generator, dtype=torch.float64)


def dmlr_trace(lens: il.LatentModel, given: Any, given_vectors: torch.Tensor) -> loops.Trace:
    m = machine(lens, given)
    return loops.dmlr(m, placeholder=lens.span_tokens.pad, vectors=list(given_vectors))


@pytest.mark.parametrize("kind", ["llama", "llava", "qwen2_5_vl"])
def test_dmlrs_vectors_stand_where_its_placeholders_do(kind: str) -> None:
    lens = dmlr_lens(kind)
    given, z = free_prompt(kind), vectors(2)
    with lens.edit(il.Replace(z), at=il.latent) as landing:
        run = lens.run(given, max_new_tokens=MAX_NEW, keep_logits=True)
    assert landing.fired
    assert_same(run, dmlr_trace(lens, given, z))
    assert torch.equal(run.latents[0], z)
    assert controls.path_gap(lens, run) < 1e-9
    # unedited they are the placeholder's own embedding, and nothing differs from a plain model
    plain = lens.run(given, max_new_tokens=MAX_NEW)
    own = lens.model.get_input_embeddings().weight[lens.span_tokens.pad].detach()
    assert_same(plain, dmlr_trace(lens, given, own.expand(2, -1)))
    bare = il.LatentModel(lens.model, lens.processor, spec=False)
    assert torch.equal(bare.run(given, max_new_tokens=MAX_NEW).sequences, plain.sequences)


def test_a_batch_of_free_vectors_equals_the_reference_row_by_row() -> None:
    lens = dmlr_lens("llava")
    given, z = [free_prompt("llava", i, n=i + 1) for i in range(3)], vectors(3)
    with lens.edit(il.Replace(z[0]), at=il.latent[0]):
        run = lens.run(given, max_new_tokens=MAX_NEW)
    own = lens.model.get_input_embeddings().weight[lens.span_tokens.pad].detach()
    for row, one in enumerate(given):
        wanted = torch.stack([z[0], *[own] * row])
        assert_same(run, dmlr_trace(lens, one, wanted), row)
    assert run.trigger.emitted == (1, 2, 3)


def test_a_users_search_over_free_vectors_finds_a_more_confident_answer() -> None:
    """DMLR's loop in a user's hands: noise on the vectors, the best by mean top log-probability."""
    lens = dmlr_lens("llama")
    given = free_prompt("llama")

    def reward(run: il.Run) -> float:
        top = run.logits[0].log_softmax(-1).topk(5, dim=-1).values
        return float(top.mean())

    def with_noise(noise: torch.Tensor) -> il.Run:
        def add(act: torch.Tensor, hook: Any) -> torch.Tensor:
            return act + noise

        with lens.hooks([("hook_latent", add)]):
            return lens.run(given, max_new_tokens=4, keep_logits=True)

    start = reward(with_noise(torch.zeros(D, dtype=torch.float64)))
    tried = [with_noise(z) for z in vectors(6, seed=11)]
    best = max(tried, key=reward)
    assert reward(best) > start
    with lens.edit(il.Replace(best.latents[0]), at=il.latent):
        again = lens.run(given, max_new_tokens=4, keep_logits=True)
    torch.testing.assert_close(again.logits, best.logits, rtol=0, atol=1e-12)


def test_edits_of_free_vectors() -> None:
    check_edits(dmlr_lens("llama"), free_prompt("llama"), free_prompt("llama", 1), MAX_NEW)


# ---- on disk -----------------------------------------------------------------------------------


def write(
    folder: Path,
    made: tuple[Any, Any],
    *,
    prefix: str = "",
    extras: Mapping[str, torch.Tensor] | None = None,
    keys: Mapping[str, Any] | None = None,
    leave_out: str = "-",
    shards: int = 1,
) -> None:
    """Write a checkpoint as training would leave it: the weights of a wrapped model, and more."""
    model, tok = made
    folder.mkdir(exist_ok=True)
    for old in folder.iterdir():
        old.unlink()
    config = type(model.config).from_dict(model.config.to_dict() | dict(keys or {}))
    config.dtype, config.architectures = torch.float64, [type(model).__name__]
    config.save_pretrained(folder)
    model.generation_config.save_pretrained(folder)
    tok.save_pretrained(folder)
    weights = {
        prefix + name: value.clone()
        for name, value in model.state_dict().items()
        if leave_out not in name
    } | dict(extras or {})
    if shards == 1:
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
        return
    where = {name: f"model-{i % shards}.safetensors" for i, name in enumerate(sorted(weights))}
    for file in sorted(set(where.values())):
        part = {name: weights[name] for name in weights if where[name] == file}
        save_file(part, folder / file, metadata={"format": "pt"})
    index = {"metadata": {}, "weight_map": where}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def same_weights(lens: il.LatentModel, model: Any) -> bool:
    held = lens.model.state_dict()
    return all(torch.equal(value, held[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("prefix", ["", "module.", "base_causallm.", "module.base_causallm."])
@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_a_coconut_folder_is_recognised_and_reproduces_its_latents(
    tmp_path: Path, kind: str, prefix: str
) -> None:
    made = built(kind, COCONUT)
    more = {}
    if "base_causallm" in prefix:  # the wrapper's second name of the embedding, and SIM-CoT's aid
        outer = prefix.removesuffix("base_causallm.")
        embedding = made[0].get_input_embeddings().weight.detach().clone()
        more = {f"{outer}embedding.weight": embedding}
        more[f"{outer}expainable_llm.lm_head.weight"] = torch.ones(3, 3, dtype=torch.float64)
    write(tmp_path, made, prefix=prefix, extras=more, shards=1 if kind == "gpt2" else 2)
    lens = il.load(tmp_path)
    assert lens.spec == FAMILIES["coconut"]
    assert lens.model.dtype == torch.float64
    assert same_weights(lens, made[0])
    assert not lens.model.training
    given = [question(0), question(1, n=6)]
    run = lens.run(given, max_new_tokens=MAX_NEW)
    for row, one in enumerate(given):
        assert_same(run, coconut_trace(coconut_lens(kind), one), row)
    assert "coconut: one for each '<|latent|>' of the prompt" in str(lens.describe())


def test_sim_cot_is_told_by_name_or_by_its_config(tmp_path: Path) -> None:
    made = built("gpt2", COCONUT)
    write(tmp_path, made)
    assert il.load(tmp_path, spec=FAMILIES["sim-cot"]).spec.max_steps == 10
    write(tmp_path, made, keys={"imaginelens_family": "sim-cot"})
    lens = il.load(tmp_path)
    assert lens.spec == FAMILIES["sim-cot"]
    given = {"text": TEXTS[1] + lens.spec.placeholders}
    assert_same(lens.run(given, max_new_tokens=MAX_NEW), coconut_trace(lens, given))


@pytest.mark.parametrize("missing", [1, 2])
def test_a_coconut_folder_with_tokens_in_part_is_refused(tmp_path: Path, missing: int) -> None:
    strings = tuple("<x>" if i == missing else s for i, s in enumerate(COCONUT))
    write(tmp_path, built("gpt2", strings))
    with pytest.raises(il.CheckpointError, match="has latent tokens in part") as error:
        il.load(tmp_path)
    assert repr(COCONUT[missing]) in str(error.value)
    assert "<|start-latent|>" in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("prefix", "head"),
    [("codi.", "prj."), ("module.codi.", "module.prj."), ("", "prj."),
     ("codi.base_model.model.", "prj.")],
)  # fmt: skip
@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_a_codi_folder_is_told_by_its_head(
    tmp_path: Path, kind: str, prefix: str, head: str
) -> None:
    made = built(kind, ("<a>", "<b>", "<c>"), 3)
    write(tmp_path, made, prefix=prefix, extras=prj_weights(prefix=head))
    lens = il.load(tmp_path)
    assert lens.spec.name == "codi"
    assert same_weights(lens, made[0])
    given = [{"text": text} for text in TEXTS[:2]]
    run = lens.run(given, max_new_tokens=CODI_NEW)
    for row, one in enumerate(given):
        assert_same(run, codi_trace(codi_lens(kind), one, max_new=CODI_NEW), row)


def test_codi_folders_that_are_not_whole_are_refused(tmp_path: Path) -> None:
    made = built("gpt2", ("<a>", "<b>", "<c>"), 3)
    head = prj_weights()
    write(tmp_path, made, prefix="codi.")
    with pytest.raises(il.CheckpointError, match=r"codi needs the weights prj\.1.* holds no extra"):
        il.load(tmp_path, spec=FAMILIES["codi"])
    write(tmp_path, made, prefix="codi.", extras={k: v for k, v in head.items() if "3.b" not in k})
    with pytest.raises(il.CheckpointError, match=r"do not fit its head: .*3\.bias"):
        il.load(tmp_path)
    write(tmp_path, made, prefix="codi.", extras={"prj.gate.weight": head["prj.3.bias"]})
    with pytest.raises(il.CheckpointError, match=r"the weights hold gate\.weight; expected"):
        il.load(tmp_path)
    lora = {"codi.base_model.model.h.0.lora_A.default.weight": torch.ones(2, 2)}
    write(tmp_path, made, prefix="codi.", extras=head | lora)
    with pytest.raises(il.CheckpointError, match=r"holds 1 adapter weights.*merge_and_unload"):
        il.load(tmp_path)
    write(tmp_path, made, prefix="codi.", extras=head, leave_out="h.1.mlp.c_fc.weight")
    with pytest.raises(il.CheckpointError, match=r"lacks 1 weights of its GPT2LMHeadModel.*c_fc"):
        il.load(tmp_path)


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_a_text_folder_is_opened_for_soft_thinking_by_name(tmp_path: Path, kind: str) -> None:
    made = built(kind, THINK)
    write(tmp_path, made)
    with pytest.raises(il.CheckpointError, match="does not list as image-text-to-text"):
        il.load(tmp_path)
    lens = il.load(tmp_path, spec=FAMILIES["soft-thinking"])
    assert same_weights(lens, made[0])
    run, (trace,) = thought(lens, {"text": TEXTS[0]}, {3: "close"})
    assert_same(run, trace)
    write(tmp_path, built(kind, COCONUT))
    with pytest.raises(il.CheckpointError, match="soft-thinking family needs its close token"):
        il.load(tmp_path, spec=FAMILIES["soft-thinking"])


def write_vlm(folder: Path, strings: tuple[str, ...]) -> None:
    model, processor = built_vlm("qwen2_5_vl", strings)
    config = type(model.config).from_dict(model.config.to_dict())
    config.dtype = torch.float64
    config.save_pretrained(folder)
    model.generation_config.save_pretrained(folder)
    processor.tokenizer.save_pretrained(folder)
    processor.image_processor.save_pretrained(folder)
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def test_training_free_families_open_a_folder_with_pictures_by_name(tmp_path: Path) -> None:
    write_vlm(tmp_path, THINK)
    lens = il.load(tmp_path, spec=FAMILIES["soft-thinking"], dtype=torch.float64)
    given = {"images": tiny.image(48, 32, seed=0), "text": tiny.prompt("qwen2_5_vl", TEXTS[0])}
    run, (trace,) = thought(lens, given, {4: "close"})
    assert_same(run, trace)
    write_vlm(tmp_path, DMLR)
    lens = il.load(tmp_path, spec=FAMILIES["dmlr"], dtype=torch.float64)
    z = vectors(2)
    with lens.edit(il.Replace(z), at=il.latent):
        run = lens.run(free_prompt("qwen2_5_vl"), max_new_tokens=MAX_NEW)
    assert_same(run, dmlr_trace(lens, free_prompt("qwen2_5_vl"), z))
    assert il.load(tmp_path).spec is None


# ---- the table -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [*FAMILIES])
def test_every_counted_family_is_in_the_table_that_is_shipped(name: str) -> None:
    """Its rows are written by `python tests/family_table.py --write`, never by hand."""
    if name in ("organism", "capimagine") or not isinstance(FAMILIES[name], il.LatentSpec):
        return
    file = Path(__file__).parents[2] / "benchmarks" / "results" / "families.json"
    rows = {row["family"]: row for row in json.loads(file.read_text())}
    if name in UNVERIFIED_FAMILIES:
        assert name not in rows
        return
    assert rows[name]["tokens_equal"]
    assert max(rows[name]["latent_error"], rows[name]["folder_error"]) < 1e-10
    assert rows[name]["kind"] == FAMILIES[name].kind


@pytest.mark.parametrize(
    "wrong",
    [
        {"project": None},
        {"project": heads.OnLatents},
        {"max_steps": 5},
        {"slot": "replace"},
        {"force_close": False},
    ],
    ids=str,
)
def test_other_conventions_of_codi_are_told_apart(wrong: dict[str, Any]) -> None:
    """The comparison can fail: no head, one that skips the first latent, another number or slot."""
    lens = codi_lens()
    trace = codi_trace(lens, {"text": TEXTS[0]}, max_new=CODI_NEW)
    if wrong.get("project"):
        wrong = {"project": heads.OnLatents(lens.spec.project.head)}
    spec = replace(lens.spec, equip=None, **wrong)
    off = il.LatentModel(lens.model, lens.tokenizer, spec=spec)
    with pytest.raises(AssertionError):
        assert_same(off.run({"text": TEXTS[0]}, max_new_tokens=CODI_NEW), trace)


def test_other_mixtures_are_told_apart() -> None:
    lens = soft_lens()
    run, (trace,) = thought(lens, {"text": TEXTS[0]}, {3: "close"})
    for wrong in ({"top_k": 9}, {"top_k": 11}, {"calm_below": 100.0, "patience": 2}):
        other, _ = thought(soft_lens(**wrong), {"text": TEXTS[0]}, {3: "close"})
        with pytest.raises(AssertionError):
            assert_same(other, trace)
    assert_same(run, trace)


def test_estimators_take_latents_of_the_prompt() -> None:
    """A swap is the pure indirect effect, pair by pair, and a sham is nothing."""
    lens = coconut_lens("llama")
    base, source = ([question(i) for i in rows] for rows in ((0, 1, 2), (1, 2, 0)))
    pairs = il.Pairs(
        base=base, source=source, base_answers=["a", "c", "e"], source_answers=["b", "d", "f"]
    )
    worlds = il.counterfactuals(lens, pairs, metric=il.logit_diff, reference=False)
    assert worlds.controls.sham == 0
    effects = worlds.effects()
    swap = lens.swap(
        base, source, at=il.latent, metric=il.logit_diff, base_answers=pairs.base_answers,
        source_answers=pairs.source_answers,
    )  # fmt: skip
    assert abs(swap.effect.numpy() - effects.pnie.values).max() < 1e-9
    assert swap.effect.abs().min() > 1e-3
    table = il.necessity(lens, pairs, edits=[il.Zero()], metric=il.log_prob)
    assert (table["Zero()"].before != table["Zero()"].after).all()
    assert il.input_dependence(lens, pairs).states.shape[1] == 3
