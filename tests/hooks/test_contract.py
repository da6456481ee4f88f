"""The contract of the engine over every tiny architecture; a new class is one line in tiny.py."""

import itertools
from dataclasses import replace
from typing import Any

import numpy as np
import oracle
import pytest
import tiny
import torch
from transformers import LogitsProcessor
from untouched import fingerprint, same

import imaginelens as il
from imaginelens.hooks import controls

NAMES = list(tiny.FAMILIES)
SPEC = il.LatentSpec(
    name="test", open="<|latent_start|>", close="<|latent_end|>", pad="<|latent_pad|>", max_steps=3
)
PLAIN = (  # sites whose value is the input or output of one module
    "hook_resid_pre", "hook_resid_mid", "hook_resid_post", "hook_attn_out", "hook_mlp_out",
    "attn.hook_q", "attn.hook_k", "attn.hook_v", "attn.hook_z", "mlp.hook_pre", "mlp.hook_post",
)  # fmt: skip
SITES = [f"blocks.1.{site}" for site in PLAIN] + [
    "hook_embed", "ln_final.hook_normalized", "unembed.hook_out", "vision_projector.hook_out",
]  # fmt: skip


def lens_of(name: str, spec: Any = SPEC) -> il.LatentModel:
    return il.LatentModel(*tiny.build(name), spec=spec)


def examples(name: str, n: int = 1) -> list[dict[str, Any]]:
    texts = ("what colour?", "where is the red cube?", "how many cats are there now?")
    sizes = ((48, 32), (24, 40), (40, 40))
    return [
        {"images": tiny.image(*sizes[i], seed=i), "text": tiny.prompt(name, texts[i])}
        for i in range(n)
    ]


def plain_inputs(lens: il.LatentModel, given: Any) -> dict[str, torch.Tensor]:
    """What a plain forward must be given: the processor's dict and explicit positions."""
    inputs = dict(lens.prompt(given).inputs)
    return {**inputs, "position_ids": tiny.positions(lens.model, inputs)}


class Plan(LogitsProcessor):
    """Makes rows write given tokens at given steps, and no span token anywhere else."""

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


def planned(
    lens: il.LatentModel, given: Any, plans: list[dict[int, int]], **options: Any
) -> il.Run:
    """A run in which row i opens spans exactly at the steps that plan i says."""
    ids = lens.span_tokens
    banned = [ids.open, ids.close, ids.pad, lens.tokenizer.eos_token_id]
    plan = Plan(plans, lens.prompt(given).inputs["input_ids"].shape[1], banned)
    generation = {"logits_processor": [plan]}
    return lens.run(given, max_new_tokens=12, generation=generation, **options)


def opening(lens: il.LatentModel, *steps: int) -> dict[int, int]:
    return {step: lens.span_tokens.open for step in steps}


# ---- sites -----------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "site"), list(itertools.product(NAMES, SITES)))
def test_reading_and_editing_a_site_equal_plain_torch(name: str, site: str) -> None:
    lens, given = lens_of(name), examples(name, 2)
    inputs = plain_inputs(lens, given)
    wanted = oracle.read(name, lens.model, site, inputs)

    def edit(act: torch.Tensor) -> torch.Tensor:
        return torch.cat([act[:, :-2], act[:, -2:] * 0.5 + 0.25], dim=1)

    edited = oracle.edited(name, lens.model, site, inputs, edit)
    with torch.no_grad():
        plain = lens.model(**inputs, use_cache=False).logits
        logits, cache = lens.run_with_cache(given, names_filter=site)

        def hook(act: torch.Tensor, hook: Any) -> torch.Tensor:
            assert hook.name == site
            return edit(act.reshape(wanted.shape)).reshape(act.shape)

        changed = lens.run_with_hooks(given, fwd_hooks=[(site, hook)])
    assert torch.equal(logits, plain)
    assert torch.equal(cache[site].reshape(wanted.shape), wanted)
    assert torch.equal(changed, edited)
    assert not torch.equal(changed, plain)  # the edit is not vacuous


@pytest.mark.parametrize("name", NAMES)
def test_vision_blocks_are_read_and_written(name: str) -> None:
    lens, given = lens_of(name), examples(name, 2)
    site = "vision_encoder.blocks.0.hook_resid_post"
    seen: list[torch.Tensor] = []
    module = lens.model.get_submodule(lens.registry[site].path)
    handle = module.register_forward_hook(
        lambda m, a, out: seen.append((out[0] if isinstance(out, tuple) else out).clone())
    )
    with torch.no_grad():
        lens.model(**plain_inputs(lens, given), use_cache=False)
        handle.remove()
        logits, cache = lens.run_with_cache(given, names_filter=site)
        changed = lens.run_with_hooks(given, fwd_hooks=[(site, lambda act, hook: act * 0.5)])
    assert torch.equal(cache[site], seen[0])
    assert not torch.equal(changed, logits)


@pytest.mark.parametrize("name", NAMES)
def test_pattern_edits_equal_attention_written_by_hand(name: str) -> None:
    lens, given = lens_of(name), examples(name, 2)
    names = ["blocks.1.attn.hook_pattern", "blocks.1.attn.hook_v", "blocks.1.attn.hook_z"]
    with torch.no_grad():
        logits, cache = lens.run_with_cache(given, names_filter=names)
        plain = lens.run_with_hooks(given)

        def uniform(act: torch.Tensor, hook: Any) -> torch.Tensor:
            seen = (act > 0).to(act)
            return seen / seen.sum(-1, keepdim=True).clamp_min(1)

        changed = lens.run_with_hooks(given, fwd_hooks=[(names[0], uniform)])
    pattern, v = cache[names[0]], cache[names[1]]  # (example, query, head, key), (.., kv_head, d)
    values = v.repeat_interleave(pattern.shape[2] // v.shape[2], dim=2)
    by_hand = torch.einsum("bqhk,bkhd->bqhd", pattern, values)
    torch.testing.assert_close(cache[names[2]], by_hand, rtol=0, atol=1e-12)
    rows = torch.as_tensor(lens.tokens(given).kind > 0)
    torch.testing.assert_close(logits[rows], plain[rows], rtol=0, atol=1e-9)  # written out = fused
    torch.testing.assert_close(pattern.sum(-1)[rows], torch.ones_like(pattern.sum(-1)[rows]))
    z = torch.einsum("bqhk,bkhd->bqhd", uniform(pattern, None), values)
    with torch.no_grad():
        wanted = lens.run_with_hooks(
            given,
            fwd_hooks=[(names[0], lambda act, hook: None), (names[2], lambda act, hook: z)],
        )
    torch.testing.assert_close(changed, wanted, rtol=0, atol=1e-12)
    assert (changed - logits).abs().max() > 1e-3


@pytest.mark.parametrize("name", NAMES)
def test_sites_obey_the_identities_between_them(name: str) -> None:
    lens, given = lens_of(name), examples(name, 2)
    _, c = lens.run_with_cache(given, names_filter="blocks.*")
    close = {"rtol": 0, "atol": 1e-12}
    torch.testing.assert_close(c["resid_pre", 1] + c["attn_out", 1], c["resid_mid", 1], **close)
    torch.testing.assert_close(c["resid_mid", 1] + c["mlp_out", 1], c["resid_post", 1], **close)
    text = torch.as_tensor(lens.tokens(given).kind == 2)  # deepstack adds at image positions
    assert torch.equal(c["resid_post", 1][text], c["resid_pre", 2][text])

    d = torch.randn(lens.structure.d_model, dtype=torch.float64)

    def plus(site: str) -> torch.Tensor:
        with torch.no_grad():
            return lens.run_with_hooks(given, fwd_hooks=[(site, lambda act, hook: act + d)])

    torch.testing.assert_close(
        plus("blocks.1.hook_resid_mid"), plus("blocks.1.hook_attn_out"), **close
    )
    torch.testing.assert_close(
        plus("blocks.1.hook_resid_post"), plus("blocks.1.hook_mlp_out"), **close
    )
    assert (plus("blocks.1.hook_resid_mid") - plus("blocks.1.hook_mlp_out")).abs().max() > 1e-3


@pytest.mark.parametrize("name", NAMES)
def test_order_of_registration_on_different_sites_does_not_matter(name: str) -> None:
    lens, given = lens_of(name), examples(name)
    hooks = [
        ("blocks.2.hook_resid_mid", lambda act, hook: act * 0.5),
        ("blocks.0.attn.hook_z", lambda act, hook: act + 0.1),
        ("vision_projector.hook_out", lambda act, hook: act * 0.9),
        ("blocks.2.hook_resid_post", lambda act, hook: act + 0.2),
        ("blocks.1.attn.hook_pattern", lambda act, hook: act * 0.7),
    ]
    with torch.no_grad():
        forth = lens.run_with_hooks(given, fwd_hooks=hooks)
        back = lens.run_with_hooks(given, fwd_hooks=hooks[::-1])
    assert torch.equal(forth, back)


# ---- batches ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_a_batch_gives_what_its_rows_give_alone(name: str) -> None:
    lens, given = lens_of(name), examples(name, 3)
    with torch.no_grad():
        together, cache = lens.run_with_cache(given, names_filter="blocks.1.*")
        for row, one in enumerate(given):
            alone, own = lens.run_with_cache(one, names_filter="blocks.1.*")
            n = alone.shape[1]
            torch.testing.assert_close(together[row, -n:], alone[0], rtol=0, atol=1e-10)
            for site in own:
                if site.endswith("pattern"):
                    padded = cache[site][row, -n:, :, -n:]
                else:
                    padded = cache[site][row, -n:]
                torch.testing.assert_close(padded, own[site][0], rtol=0, atol=1e-10)


@pytest.mark.parametrize("name", NAMES)
def test_rows_that_open_at_different_steps_twice_or_never(name: str) -> None:
    lens, given = lens_of(name), examples(name, 3)
    plans = [opening(lens, 1, 7), opening(lens, 3), {}]
    batch = planned(lens, given, plans)
    assert batch.trigger.emitted == (6, 3, 0)
    assert [s.ended_by for s in batch.trigger.spans] == ["cap"] * 3
    assert batch.latent_span.tolist() == [[0] * 3 + [1] * 3, [0] * 3 + [-1] * 3, [-1] * 6]
    for row, one in enumerate(given):
        alone = planned(lens, one, plans[row : row + 1])
        assert alone.texts[0] == batch.texts[row]
        k = batch.trigger.emitted[row]
        torch.testing.assert_close(batch.latents[row, :k], alone.latents[0, :k], rtol=0, atol=1e-10)
    spans = [il.span[k].latent.resolve(batch.tokens, 0) for k in (0, 1)]
    width = batch.tokens.prompt_width
    assert [list(s - width) for s in spans] == [[2, 3, 4], [8, 9, 10]]
    assert list(il.latent[3].resolve(batch.tokens, 0)) == [spans[1][0]]


# ---- latents ---------------------------------------------------------------------------------


def reference_loop(name: str, lens: il.LatentModel, given: Any, open_at: int, n: int) -> Any:
    """Latent decoding by full recomputation, without cache: ids and latents of one example."""
    inputs = dict(lens.prompt(given).inputs)
    ids = lens.span_tokens
    banned = [ids.open, ids.close, ids.pad, lens.tokenizer.eos_token_id]
    embed = lens.model.get_input_embeddings()
    written: list[int] = []
    latents: list[torch.Tensor] = []
    where: list[int] = []
    width = inputs["input_ids"].shape[1]
    typed = "mm_token_type_ids" if "mm_token_type_ids" in inputs else "token_type_ids"
    for step in range(n):
        whole = {k: v for k, v in inputs.items() if k != "labels"}
        new = torch.tensor([written], dtype=torch.long)
        whole["input_ids"] = torch.cat([inputs["input_ids"], new], 1)
        whole["attention_mask"] = torch.ones_like(whole["input_ids"])
        if typed in whole:
            kind = 1 if name == "paligemma" else 0
            whole[typed] = torch.cat([inputs[typed], torch.full_like(new, kind)], 1)
        whole["position_ids"] = tiny.positions(lens.model, whole)
        final: list[torch.Tensor] = []

        def lay(module: Any, args: Any, out: torch.Tensor) -> torch.Tensor:
            out = out.clone()
            for column, z in zip(where, latents, strict=True):
                out[0, column] = z
            return out

        handles = [
            embed.register_forward_hook(lay),
            oracle.decoder(name, lens.model).norm.register_forward_hook(
                lambda m, a, out, final=final: final.append(out[0, -1])
            ),
        ]
        with torch.no_grad():
            logits = lens.model(**whole, use_cache=False).logits[0, -1].clone()
        for handle in handles:
            handle.remove()
        logits[banned] = -1e9
        fed = len(latents)
        if step == open_at:
            written.append(ids.open)
        elif open_at < step <= open_at + 3:
            latents.append(final[0])
            where.append(width + step)
            written.append(ids.pad)
        elif fed and step == open_at + 4:
            written.append(ids.close)
        else:
            written.append(int(logits.argmax()))
    return written, torch.stack(latents)


@pytest.mark.parametrize("name", NAMES)
def test_the_loop_equals_full_recomputation_without_a_cache(name: str) -> None:
    lens, given = lens_of(name), examples(name)[0]
    written, latents = reference_loop(name, lens, given, open_at=2, n=12)
    run = planned(lens, given, [opening(lens, 2)])
    assert run.sequences[0, run.tokens.prompt_width :].tolist() == written
    torch.testing.assert_close(run.latents[0], latents, rtol=0, atol=1e-10)


@pytest.mark.parametrize("name", NAMES)
def test_without_latents_the_loop_is_stock_generate(name: str) -> None:
    lens, given = lens_of(name, spec=False), examples(name, 2)
    prompt = lens.prompt(given)
    stock = lens.model.generate(**prompt.inputs, max_new_tokens=6, do_sample=False)
    run = lens.run(given, max_new_tokens=6)
    assert torch.equal(run.sequences, stock)


@pytest.mark.parametrize("name", NAMES)
def test_reading_a_run_gives_the_logits_that_generating_it_gave(name: str) -> None:
    lens, given = lens_of(name), examples(name, 3)
    run = planned(lens, given, [opening(lens, 1, 7), opening(lens, 3), {}], keep_logits=True)
    assert controls.path_gap(lens, run) < 1e-9


@pytest.mark.parametrize("name", NAMES)
def test_steps_before_an_edit_stay_and_later_ones_are_regenerated(name: str) -> None:
    lens, given = lens_of(name), examples(name)[0]
    base = planned(lens, given, [opening(lens, 1)])
    with lens.edit(il.Zero(), at=il.latent[1]) as landing:
        changed = planned(lens, given, [opening(lens, 1)])
    assert torch.equal(changed.latents[0, 0], base.latents[0, 0])
    assert bool((changed.latents[0, 1] == 0).all())
    assert (changed.latents[0, 2] - base.latents[0, 2]).abs().max() > 1e-3
    assert landing.fired == 1
    assert landing.positions == {0: [base.tokens.prompt_width + 3]}
    assert landing.relative_change == 1.0


@pytest.mark.parametrize(("name", "site"), list(itertools.product(NAMES, ["hook_latent", *SITES])))
def test_sham_changes_nothing_on_the_same_path(name: str, site: str) -> None:
    lens, given = lens_of(name), examples(name)[0]
    run = planned(lens, given, [opening(lens, 1)])
    at = il.image if site.startswith("vision") else il.latent
    if site == "hook_embed":  # at latents it is overwritten, and an edit there is refused
        with pytest.raises(il.SiteUnavailable, match="edit 'hook_latent' there"):
            controls.sham_difference(lens, run, site=site, at=at)
        at = il.last_prompt
    if site.startswith("vision") and name == "llava_onevision":
        with pytest.raises(il.SiteUnavailable, match="image tokens"):
            controls.sham_difference(lens, run, site=site, at=at)
        return  # its projector's rows are not its image tokens
    change, landing = controls.sham_difference(lens, run, site=site, at=at)
    assert change == 0.0
    assert landing.fired >= 1
    with lens.edit(il.Sham(), at=at, site=site):
        again = planned(lens, given, [opening(lens, 1)])
    assert torch.equal(again.sequences, run.sequences)
    assert torch.equal(again.latents, run.latents)


@pytest.mark.parametrize("name", NAMES)
def test_full_swap_gives_the_sources_logits_and_a_misplaced_donor_does_not(name: str) -> None:
    lens = lens_of(name)
    pairs = [
        {"images": tiny.image(40, 40, seed=i), "text": tiny.prompt(name, "what?")} for i in (0, 1)
    ]
    base, source = (planned(lens, one, [opening(lens, 1)]) for one in pairs)
    assert controls.full_swap_difference(lens, base, source) < 1e-9
    assert controls.full_swap_difference(lens, base, source, permute=True) > 1e-3


@pytest.mark.parametrize("name", NAMES)
def test_swapped_states_arrive_where_they_belong(name: str) -> None:
    """A swap by our engine equals the same states put there by plain torch hooks."""
    lens, (one, two) = lens_of(name), examples(name, 2)
    site = "blocks.1.hook_resid_post"
    source, base = planned(lens, two, [opening(lens, 2)]), planned(lens, one, [opening(lens, 1)])
    result = lens.patch(
        base=base, source=source, site=site, at=il.latent, context="fixed", metric=il.kl
    )
    _, cache = lens.run_with_cache(source, names_filter=site)
    columns = [il.latent.resolve(run.tokens, 0) for run in (base, source)]
    assert result.landing.positions == {0: columns[0].tolist()}

    def put(act: torch.Tensor) -> torch.Tensor:
        act = act.clone()
        act[0, columns[0]] = cache[site][0, columns[1]]
        return act

    seen: list[torch.Tensor] = []
    with oracle.hooked(name, lens.model, site, put):
        seen.append(lens.run_with_hooks(base))
    plain = lens.run_with_hooks(base)
    position = il.before_answer.resolve(base.tokens, 0)[0]
    p, q = (x[0, position].log_softmax(-1) for x in (plain, seen[0]))
    torch.testing.assert_close(result.after[0], (p.exp() * (p - q)).sum(), rtol=1e-9, atol=1e-12)
    assert result.after[0] > 1e-6


# ---- leaving the model alone -----------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_an_interrupted_run_leaves_the_model_untouched(
    name: str, error: type[BaseException]
) -> None:
    lens, given = lens_of(name), examples(name)[0]
    with torch.no_grad():
        before_logits = lens.run_with_hooks(given)
    before = fingerprint(lens.model)

    def boom(act: torch.Tensor, hook: Any) -> torch.Tensor:
        raise error("on purpose")

    for site in (
        "blocks.1.hook_resid_mid",
        "blocks.0.attn.hook_pattern",
        "vision_projector.hook_out",
    ):
        with pytest.raises(error, match="on purpose"):
            lens.run_with_hooks(given, fwd_hooks=[(site, boom)])
        with pytest.raises(error, match="on purpose"), lens.hooks([(site, boom)]):
            lens.run(given, max_new_tokens=4)
    assert lens.registry.entries == []
    assert same(before, fingerprint(lens.model))
    with torch.no_grad():
        assert torch.equal(lens.run_with_hooks(given), before_logits)


@pytest.mark.parametrize("name", ["qwen2_vl", "qwen2_5_vl", "qwen3_vl"])
def test_interleaved_runs_do_not_disturb_each_other(name: str) -> None:
    """Another run between prefill and decoding must not lend its positions (rope_deltas)."""
    lens, (one, two) = lens_of(name), examples(name, 2)
    alone = planned(lens, one, [opening(lens, 1)])

    def interrupt(act: torch.Tensor, hook: Any) -> None:
        if hook.columns[0] == alone.tokens.prompt_width + 2:
            with torch.no_grad():  # a bare lens.model(...) is refused while hooks are active
                lens.model.forward(**lens.prompt(two).inputs)

    ids = lens.span_tokens
    with lens.hooks([("hook_latent", interrupt)]):
        between = planned(lens, one, [{1: ids.open}])
    assert torch.equal(between.sequences, alone.sequences)
    assert torch.equal(between.latents, alone.latents)


def test_gradients_flow_and_backward_hooks_see_them() -> None:
    lens, given = lens_of("qwen2_5_vl"), examples("qwen2_5_vl")[0]
    site, seen = "blocks.1.hook_resid_post", []
    logits = lens.run_with_hooks(
        given, bwd_hooks=[(site, lambda grad, hook: seen.append((hook.name, grad.clone())))]
    )
    logits[0, -1, 5].backward()
    kept: list[torch.Tensor] = []
    with oracle.hooked(
        "qwen2_5_vl", lens.model, site, lambda act: (act.retain_grad(), kept.append(act))[1] or act
    ):
        plain = lens.model(**plain_inputs(lens, given), use_cache=False).logits
    plain[0, -1, 5].backward()
    assert seen[0][0] == site
    torch.testing.assert_close(seen[0][1], kept[0].grad, rtol=0, atol=1e-12)
    lens.model.zero_grad()
    assert np.isfinite(float(seen[0][1].norm()))


@pytest.mark.parametrize("name", ["qwen2_5_vl", "qwen3_vl"])
def test_the_projectors_rows_are_found_also_in_window_order(name: str) -> None:
    """Qwen2.5-VL's merger works window by window; its rows are not in the order of the tokens."""
    lens = lens_of(name)
    given = {"images": tiny.image(64, 64, seed=3), "text": tiny.prompt(name, "what?")}
    site = "vision_projector.hook_out"
    run = planned(lens, given, [opening(lens, 1)], names_filter=site)
    _, cache = lens.run_with_cache(run, names_filter=[site, "blocks.0.hook_resid_pre"])
    columns = il.image.resolve(run.tokens, 0)
    entered = cache["resid_pre", 0][0, columns]
    for held in (run.states(site, il.image), replace(run, cache=cache).states(site, il.image)):
        assert torch.equal(held.values[0], entered)
    rows = run.cache.slots[site][:, 2].tolist()
    assert (rows == sorted(rows)) == (name != "qwen2_5_vl")
