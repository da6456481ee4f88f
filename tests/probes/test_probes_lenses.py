"""Lenses on latents: the last layer gives the model's own logits, and reading is not using."""

import dataclasses
import html
import importlib
from typing import Any

import numpy as np
import planted_words
import pytest
import tiny
import torch
import transformers as hf
from scipy import stats

import imaginelens as il
from imaginelens.estimates import EstimateError, cosines
from imaginelens.hooks.errors import EditTouchedNothing, InputError, SiteUnavailable
from imaginelens.hooks.heads import OnAll, OnLatents
from imaginelens.hooks.mixture import Mixture
from imaginelens.organisms.hunt import NAMES, SHAPES
from imaginelens.probes.lens_table import LensTable, shown
from imaginelens.probes.logit_lens import logit_lens
from imaginelens.probes.nearest import nearest
from imaginelens.probes.patchscope import patchscope
from imaginelens.probes.unembedding import read

nearest_module = importlib.import_module("imaginelens.probes.nearest")

SPEC = il.LatentSpec(
    name="test", open="<|latent_start|>", close="<|latent_end|>", pad="<|latent_pad|>", max_steps=3
)
FORCED = il.Force(3, at=0)
TEXTS = ("red?", "is it a blue one?")


def tiny_run(
    name: str, spec: il.LatentSpec = SPEC, **options: Any
) -> tuple[il.LatentModel, il.Run]:
    model, processor = tiny.build(name)
    lens = il.LatentModel(model, processor, spec=spec)
    pictures = [tiny.image(40, 24, seed=i) for i in range(2)]
    batch = tiny.inputs(name, processor, TEXTS, pictures)
    return lens, lens.run(batch, latents=FORCED, max_new_tokens=8, keep_logits=True, **options)


def written_logits(run: il.Run, row: int, column: int) -> torch.Tensor:
    """The logits that decided what stands at a generated column."""
    assert run.logits is not None
    return run.logits[row, column - run.tokens.prompt_width]


def assert_reads(table: LensTable, site: str, row: int, step: int, logits: torch.Tensor) -> None:
    """A cell of a table is the softmax of these logits, by an oracle that shares no code."""
    p = np.exp(logits.detach().double().numpy() - logits.max().item())
    p /= p.sum()
    j, order = table.sites.index(site), np.argsort(-p)
    top = table.token_ids.shape[-1]
    assert table.token_ids[row, step, j].tolist() == order[:top].tolist()
    np.testing.assert_allclose(table.probabilities[row, step, j], p[order[:top]], atol=1e-10)
    assert table.entropy[row, step, j] == pytest.approx(stats.entropy(p, base=2), abs=1e-9)
    for k, token in enumerate(table.watched):
        assert table.ranks[row, step, j, k] == (p > p[token]).sum()
        assert table.watched_probabilities[row, step, j, k] == pytest.approx(p[token], abs=1e-10)


# ---- the law ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", tiny.FAMILIES)
def test_the_last_layer_reads_as_the_model_writes_at_latents_and_in_text(name: str) -> None:
    lens, run = tiny_run(name)
    last = f"blocks.{len(lens.structure.blocks) - 1}.hook_resid_post"
    for at in (il.latent, il.generated):
        table = logit_lens(lens, run, at=at, sites="resid_post", watch=[3, 70])
        assert table.gap < 1e-10
        for row in range(2):
            columns = at.resolve(run.tokens, row)
            for step, column in enumerate(columns[:-1].tolist()):  # the last decides nothing
                assert_reads(table, last, row, step, written_logits(run, row, column + 1))


@pytest.mark.parametrize("name", ["qwen2_5_vl", "llava", "gemma3"])
def test_a_latent_reads_as_what_would_have_been_written_in_its_place(name: str) -> None:
    """It has passed the final norm once, and is not normed again."""
    lens, run = tiny_run(name)
    table = logit_lens(lens, run, sites="hook_latent")
    norm = lens.model.get_submodule(lens.structure.final_norm)
    head = lens.model.get_submodule(lens.structure.head)
    for row in range(2):
        for step, column in enumerate(il.latent.resolve(run.tokens, row).tolist()):
            logits = written_logits(run, row, column)
            assert_reads(table, "hook_latent", row, step, logits)
            with torch.no_grad():
                twice = head(norm(run.latents[row, step]))
            assert (twice - logits).abs().max() > 0.1


@pytest.mark.parametrize("site", ["blocks.0.hook_resid_post", "blocks.1.hook_resid_mid"])
def test_inner_layers_are_the_final_norm_and_the_head_of_the_stream_by_plain_torch(
    site: str,
) -> None:
    lens, run = tiny_run("qwen2_5_vl")
    table = logit_lens(lens, run, sites=site, watch=["a"])
    _, cache = lens.run_with_cache(run, names_filter=site, positions=[il.latent])
    text: Any = lens.model.model.language_model
    with torch.no_grad():
        h = cache[site].float()  # as this norm itself does
        scaled = h * (h.pow(2).mean(-1, keepdim=True) + text.norm.variance_epsilon).rsqrt()
        logits = (scaled.double() * text.norm.weight) @ lens.model.lm_head.weight.T
    for row in range(2):
        for step in range(3):
            assert_reads(table, site, row, step, logits[row, step])


def test_where_the_head_reads_projected_states_so_does_the_lens() -> None:
    torch.manual_seed(0)
    head = torch.nn.Linear(64, 64).double()
    spec = dataclasses.replace(SPEC, project=OnLatents(head), project_unembeds=True)
    lens, run = tiny_run("qwen2_5_vl", spec)
    table = logit_lens(lens, run)
    assert table.sites[0] == "hook_latent"
    assert table.gap < 1e-10
    last = table.sites[-1]
    for row in range(2):
        for step, column in enumerate(il.latent.resolve(run.tokens, row).tolist()):
            assert_reads(table, "hook_latent", row, step, written_logits(run, row, column))
            assert_reads(table, last, row, step, written_logits(run, row, column + 1))


@pytest.mark.parametrize(
    "spec",
    [
        dataclasses.replace(SPEC, project=OnAll(torch.nn.Identity())),
        dataclasses.replace(SPEC, feeds=Mixture(top_k=2)),
    ],
    ids=["projected", "mixture"],
)
def test_what_the_head_does_not_read_is_not_read_by_default_and_refused(
    spec: il.LatentSpec,
) -> None:
    lens, run = tiny_run("qwen2_5_vl", spec)
    assert "hook_latent" not in logit_lens(lens, run).sites
    with pytest.raises(InputError, match="is not what the output head reads"):
        logit_lens(lens, run, sites="hook_latent")


def test_families_that_write_what_they_imagine_are_read_in_the_stream() -> None:
    words = planted_words.Words("chain")
    table = logit_lens(words.lens, words.lens.run(words.pairs.base))
    assert table.sites == ("blocks.0.hook_resid_post", "blocks.1.hook_resid_post")
    assert table.gap < 1e-10
    # the first word is followed by the second, and so it reads in the last layer
    assert table.tokens[0, :2, 1, 0].tolist() == ["<w2>", "<w3>"]
    lens = il.load("text", dtype=torch.float64)
    told = logit_lens(lens, lens.task(2, seed=0).base, at=il.imagination)
    assert "hook_latent" not in told.sites
    assert told.gap < 1e-10


def text_model(kind: str, dtype: torch.dtype = torch.float64) -> il.LatentModel:
    tok = tiny.tokenizer(bos=False)
    common = tiny.text_config(tok)
    if kind == "capped":
        config = hf.Gemma2Config(**common, head_dim=16, final_logit_softcapping=2.0)
        model: Any = hf.Gemma2ForCausalLM(config)
    else:
        model = hf.CohereForCausalLM(hf.CohereConfig(**common, logit_scale=0.07))
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.3 * torch.randn(parameter.shape))
    model.generation_config = hf.GenerationConfig(
        do_sample=False, eos_token_id=tok.eos_token_id, pad_token_id=tok.pad_token_id
    )
    return il.LatentModel(model.to(dtype).eval(), tok, spec=SPEC)


@pytest.mark.parametrize("kind", ["capped", "scaled"])
def test_what_a_model_does_to_its_logits_is_done_in_the_lens(kind: str) -> None:
    lens = text_model(kind)
    run = lens.run(text="red?", latents=FORCED, max_new_tokens=6, keep_logits=True)
    table = logit_lens(lens, run, at=il.latent, sites="blocks.2.hook_resid_post")
    assert table.gap < 1e-10
    columns = il.latent.resolve(run.tokens, 0).tolist()
    for step, column in enumerate(columns):
        assert_reads(table, table.sites[0], 0, step, written_logits(run, 0, column + 1))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_soft_cap_is_told_from_none_in_low_precision(dtype: torch.dtype) -> None:
    lens = text_model("capped", dtype)
    run = lens.run(text="red?", latents=FORCED, max_new_tokens=6)
    reading = read(lens, run, sites=[], at=il.latent)
    assert reading.unembed.behind is not None
    assert reading.gap <= 32 * torch.finfo(dtype).eps * 2
    plain = il.LatentModel(*tiny.build("qwen2_5_vl", dtype=dtype), spec=SPEC)
    found = plain.run(text="red?", latents=FORCED, max_new_tokens=6)
    assert read(plain, found, sites=[], at=il.latent).unembed.behind is None


def test_a_model_whose_logits_are_more_than_its_head_is_refused() -> None:
    class Squared(hf.LlamaForCausalLM):
        def forward(self, *args: Any, **options: Any) -> Any:
            found = super().forward(*args, **options)
            found.logits = found.logits**3
            return found

    tok = tiny.tokenizer(bos=False)
    model = Squared(hf.LlamaConfig(**tiny.text_config(tok))).double().eval()
    model.generation_config = hf.GenerationConfig(pad_token_id=tok.pad_token_id)
    lens = il.LatentModel(model, tok, spec=SPEC)
    run = lens.run(text="red?", latents=FORCED, max_new_tokens=6)
    with pytest.raises(InputError, match="away from the logits of Squared"):
        logit_lens(lens, run)


def test_a_batch_reads_as_its_rows_alone() -> None:
    lens = il.load("latent-content", dtype=torch.float64)
    inputs = lens.task(3, seed=2).base
    whole = logit_lens(lens, inputs)
    for row, example in enumerate(inputs):
        alone = logit_lens(lens, example)
        assert (alone.token_ids[0] == whole.token_ids[row]).all()
        np.testing.assert_allclose(alone.probabilities[0], whole.probabilities[row], atol=1e-6)


def test_an_edit_that_is_active_is_read() -> None:
    lens, run = tiny_run("qwen2_5_vl")
    plain = logit_lens(lens, run, sites="resid_post")
    with lens.edit(il.Zero(), at=il.latent, site="blocks.0.hook_resid_post"):
        zeroed = logit_lens(lens, run, sites="resid_post")
    assert zeroed.gap < 1e-10
    assert np.abs(zeroed.entropy - plain.entropy).max() > 0.01
    assert not any(p.grad is not None for p in lens.model.parameters())


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"sites": "blocks.0.attn.hook_pattern"}, "states of the residual stream"),
        ({"sites": "hook_latent", "at": il.generated}, "positions that are no latents"),
        ({"at": il.latent[7:9]}, "selects no position"),
        ({"watch": ["two tokens"]}, "is 10 tokens"),
        ({"watch": [10**6]}, "where the vocabulary has"),
        ({"top": 0}, "top=0 came"),
    ],
)
def test_bad_input_is_told_in_a_sentence(options: dict[str, Any], words: str) -> None:
    lens, run = tiny_run("qwen2_5_vl")
    with pytest.raises(InputError, match=words):
        logit_lens(lens, run, **options)


def test_ragged_runs_keep_their_steps_apart() -> None:
    model, processor = tiny.build("qwen2_5_vl")
    lens = il.LatentModel(model, processor, spec=SPEC)
    pictures = [tiny.image(40, 24, seed=i) for i in range(2)]
    batch = tiny.inputs("qwen2_5_vl", processor, TEXTS, pictures)
    run = lens.run(batch, latents=FORCED, max_new_tokens=8)
    ragged = logit_lens(lens, run, at=il.text.find("blue"))
    assert ragged.mask.tolist() == [[False] * 4, [True] * 4]
    assert (ragged.token_ids[0] == -1).all()
    assert np.isnan(ragged.entropy[0]).all()
    assert set(ragged.to_dataframe()["example"]) == {1}
    assert "example 0: no such step" in repr(ragged)


# ---- the table ----------------------------------------------------------------------------------

EVIL = "<script>alert(1)</script>", "a\u202eb", "\x1b[31mred", "  \n", "'\"&"


def table(tokens: tuple[str, ...] = EVIL, *, steps: int = 2) -> LensTable:
    """A table of two examples in which every token of a list comes first somewhere."""
    n = len(tokens)
    ids = np.array([[[np.roll(np.arange(n), i + t)[:3]] for t in range(steps)] for i in range(2)])
    p = np.broadcast_to([0.6, 0.3, 0.1], ids.shape).copy()
    ranks = np.argsort([[[np.roll(np.arange(n), i + t)] for t in range(steps)] for i in range(2)])
    return LensTable(
        kind="logit lens", at="latent", sites=("blocks.0.hook_resid_post",), token_ids=ids,
        probabilities=p, entropy=np.full((2, steps, 1), 1.25), mask=np.ones((2, steps), bool),
        watched=tuple(range(n)), ranks=ranks, watched_probabilities=ranks / 10.0,
        texts=dict(enumerate(tokens)),
    )  # fmt: skip


def test_nothing_that_a_model_writes_is_markup_or_moves_the_text() -> None:
    page, plain = table()._repr_html_(), repr(table())
    assert "<script" not in page
    assert html.escape(EVIL[0]) in page
    for text in (page, plain, table().summary()):
        assert not set(text) & {"\u202e", "\x1b", "\x00"}
    assert shown("\u202e\x07\u00a0") == "\\u202e\\x07\\xa0"
    assert shown("") == "(empty)"
    assert page.count("<tr>") == page.count("</tr>") == 4


def test_a_summary_says_what_is_read_and_never_what_is_meant() -> None:
    said = table().summary()
    assert "reads most often as" in said
    assert "is not evidence of what it is used for" in said
    assert "mean" not in said


def test_ranks_choices_and_shares_of_watched_tokens() -> None:
    found = table(("cat", " dog", "cow", "emu"))
    assert found.tokens[0, 0, 0].tolist() == ["cat", " dog", "cow"]
    assert found.rank_of("cat")[:, :, 0].tolist() == [[0, 1], [1, 2]]
    assert found.rank_of(["cat", "emu"])[:, :, 0].tolist() == [[0, 1], [0, 1]]
    assert found.rank_of("dog").tolist() == found.rank_of(1).tolist()
    assert found.probability_of("cow")[0, 0, 0] == 0.2
    assert found.choice(["cat", "cow"])[:, :, 0].tolist() == [["cat", "cat"], ["cat", "cow"]]
    site = found.sites[0]
    share = found.share(["cat", "dog"], step=0, site=site, chance=0.25)
    assert share.values.tolist() == [1.0, 0.0]  # the second reads as emu
    with pytest.raises(EstimateError, match="1 missing"):
        found.share(["cat", None], step=0, site=site)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda t: t.rank_of("unicorn"), "was not watched"),
        (lambda t: t.rank_of(["cat"]), "1 tokens came for 2 examples"),
        (lambda t: t.choice(["cat"]), "is no choice"),
        (lambda t: t.share(["cat"], step=0, site=t.sites[0]), "1 expected tokens came"),
        (lambda t: t.share(["a", "b"], step=5, site=t.sites[0]), "no step 5"),
        (lambda t: t.share(["a", "b"], step=0, site="blocks.9"), "no site 'blocks.9'"),
    ],
)
def test_a_table_says_what_it_does_not_hold(call: Any, words: str) -> None:
    with pytest.raises(InputError, match=words):
        call(table(("cat", " dog", "cow", "emu")))


# ---- organisms: reading is not using ------------------------------------------------------------


def expected(hunts: list[Any], step: int) -> tuple[list[str], list[str]]:
    names = [h.path[min(step + 1, h.hops)] for h in hunts]
    return names, [h.shape_of(name) for h, name in zip(hunts, names, strict=True)]


def test_the_logit_lens_reads_the_answer_where_nobody_uses_it_and_not_where_it_is_carried() -> None:
    """Decided by interchange: content carries the shape, and nobody reads the ignored latents."""
    found = {}
    for name in ("latent-content", "latent-ignored"):
        lens = il.load(name)
        inputs = lens.task(128, seed=5).base
        read = logit_lens(lens, inputs, sites="hook_latent", watch=[*SHAPES, *NAMES])
        _, shapes = expected([e["hunt"] for e in inputs], 0 if name == "latent-ignored" else 1)
        step = 0 if name == "latent-ignored" else 1
        found[name] = read.share(shapes, step=step, site="hook_latent", among=SHAPES, chance=1 / 6)
        assert read.gap < 1e-4
        assert "not evidence" in read.summary()
    assert found["latent-ignored"].pvalue() < 1e-4
    assert found["latent-ignored"].value > 0.27
    assert found["latent-content"].value < 0.27


# ---- nearest ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def hunts() -> list[dict[str, Any]]:
    return il.load("latent-content").task(3, seed=5).base


@pytest.mark.parametrize(
    ("name", "there"),
    [
        ("latent-content", True),
        ("latent-pointer", True),
        ("latent-ignored-aligned", True),  # though nobody reads its latents
        ("latent-ignored", False),
    ],
)
def test_aligned_latents_lie_next_to_the_card_they_stand_for(name: str, there: bool) -> None:
    lens = il.load(name)
    hunts = lens.task(32, seed=5).base
    found = nearest(lens, lens.run(hunts), among="image", top=2)
    for step in range(2):
        names, _ = expected([e["hunt"] for e in hunts], step)
        cards = [e["hunt"].names.index(n) for e, n in zip(hunts, names, strict=True)]
        hits = [
            cell == [0, *divmod(card, 3)]
            for cell, card in zip(found.cells[:, step, 0].tolist(), cards, strict=True)
        ]
        excess = found.excess(step=step)
        if there:
            assert np.mean(hits) == 1
            assert excess.ci().low > 0.2
        else:
            assert np.mean(hits) < 0.35
            assert abs(excess.value) < 0.05
    assert "not evidence" in found.summary()
    assert found.labels[0, 0, 0].startswith("image 0 (row ")
    assert found.to_dataframe().shape[0] == 32 * 2 * 2


def test_patches_and_cosines_are_those_of_the_projector_and_of_estimates(
    hunts: list[dict[str, Any]],
) -> None:
    lens = il.load("latent-pointer")
    run = lens.run(hunts)
    site = "vision_projector.hook_out"
    _, cache = lens.run_with_cache(run, names_filter=site)
    patches = (
        dataclasses.replace(run, cache=cache).states(site, il.image).values.flatten(0, 1).detach()
    )
    states = run.latents.flatten(0, 1)
    for kind in ("raw", "centred"):
        found = nearest(lens, run, among="image", kind=kind, top=9)
        want = cosines(states.numpy(), patches.numpy(), kind=kind)
        own = np.stack([want[i, 9 * (i // 2) : 9 * (i // 2) + 9] for i in range(6)])
        np.testing.assert_allclose(found.cosine.reshape(6, 9), -np.sort(-own, axis=1), atol=1e-9)
        others = np.stack(
            [[want[i, 9 * j : 9 * j + 9].max() for j in range(3) if j != i // 2] for i in range(6)]
        )
        np.testing.assert_allclose(found.null.ravel(), others.mean(1), atol=1e-9)


def test_words_are_found_by_their_own_embeddings_whatever_is_held_at_a_time(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    lens, run = tiny_run("qwen2_5_vl")
    words = lens.model.get_input_embeddings().weight.detach()
    tokens = torch.tensor([[40, 41, 42], [50, 51, 52]])
    with lens.edit(il.Swap(words[tokens]), at=il.latent):
        put = lens.run(run.prompt.inputs, latents=FORCED, max_new_tokens=5)
    whole = nearest(lens, put, top=4)
    assert whole.numbers[..., 0].tolist() == tokens.tolist()
    np.testing.assert_allclose(whole.cosine[..., 0], 1, atol=1e-12)
    assert whole.excess(step=0).value > 0.2
    assert whole.labels[0, 0, 0] == lens.tokenizer.decode(40)
    monkeypatch.setattr(nearest_module, "_AT_ONCE", 7)
    pieces = nearest(lens, put, top=4)
    for kind in ("raw", "centred"):
        np.testing.assert_allclose(getattr(pieces, kind), getattr(whole, kind), atol=1e-12)
        want = cosines(put.latents.flatten(0, 1).numpy(), words.numpy(), kind=kind)
        got = getattr(whole, kind).reshape(6, 4)
        ids = whole.numbers.reshape(6, 4)
        np.testing.assert_allclose(got, np.take_along_axis(want, ids, 1), atol=1e-12)
    np.testing.assert_allclose(pieces.null, whole.null, atol=1e-12)


def test_a_random_direction_is_as_near_as_the_null_says() -> None:
    lens, run = tiny_run("qwen2_5_vl")
    noise = torch.randn(2, 3, 64, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    with lens.edit(il.Swap(noise), at=il.latent):
        put = lens.run(run.prompt.inputs, latents=FORCED, max_new_tokens=5)
    found = nearest(lens, put, kind="raw")
    assert abs((found.raw[..., 0] - found.null).mean()) < 0.05


def test_one_example_has_no_null_among_patches_and_says_so(hunts: list[dict[str, Any]]) -> None:
    lens = il.load("latent-pointer")
    found = nearest(lens, lens.run([hunts[0], hunts[0]]), among="image")
    assert np.isnan(found.null).all()  # the same picture is no other picture
    assert "no null" in found.summary()
    with pytest.raises(EstimateError, match="0 of 2 examples"):
        found.excess(step=0)
    with pytest.raises(InputError, match="no step 4"):
        found.excess(step=4)


def test_nearest_refuses_what_it_cannot_compare() -> None:
    lens, run = tiny_run("qwen2_5_vl")
    with pytest.raises(InputError, match="among='sounds'"):
        nearest(lens, run, among="sounds")
    with pytest.raises(InputError, match="top=0"):
        nearest(lens, run, top=0)
    words = text_model("capped")
    plain = words.run(text="red?", latents=FORCED, max_new_tokens=6)
    with pytest.raises(SiteUnavailable):
        nearest(words, plain, among="image")
    organism = il.load("latent-pointer")
    blind = organism.run([{"text": "start red shape ?"}], latents=il.Force(2, at=0))
    with pytest.raises(InputError, match="none of the 1 examples has an image token"):
        nearest(organism, blind, among="image")
    with pytest.raises(InputError, match="selects no state"):
        nearest(lens, run, at=il.latent[8:9])
    evil = dataclasses.replace(nearest(lens, run), labels=np.full((2, 3, 5), EVIL[0], object))
    assert "<script" not in evil._repr_html_()


# ---- patchscope ---------------------------------------------------------------------------------


def test_a_state_that_decides_the_next_token_decides_it_in_another_prompt() -> None:
    """The last state of the last layer, put in the place of another prompt's, is all that the next
    token depends on."""
    lens = text_model("capped")
    sources = [{"text": text} for text in ("red?", "is it blue", "0123")]
    run = lens.run(sources, latents=il.Skip(), max_new_tokens=1)
    site = "blocks.2.hook_resid_post"
    found = patchscope(
        lens, run, prompt="what is it", placeholder=il.last_prompt, at=il.last_prompt, site=site,
        max_new_tokens=1, batch_size=2,
    )  # fmt: skip
    assert [row[0] for row in found.texts] == run.texts
    assert len(set(run.texts)) > 1
    assert [landing.fired for landing in found.landings] == [1, 1]
    assert [len(landing.cells) for landing in found.landings] == [2, 1]
    assert "unpatched" in repr(found)


def test_latents_go_into_the_placeholder_as_embeddings_and_ragged_steps_stay_apart() -> None:
    lens = text_model("capped")
    run = lens.run([{"text": "red?"}, {"text": "ab"}], latents=FORCED, max_new_tokens=5)
    short = dataclasses.replace(run, latents=run.latents.clone())
    short.tokens.kind[1, short.tokens.latents(1)[2]] = 2  # the second fed two
    found = patchscope(lens, short, prompt="say xy now", placeholder="xy", max_new_tokens=3)
    assert found.into == "blocks.0.hook_resid_pre"
    assert found.texts[1][2] is None
    assert all(isinstance(text, str) for text in found.texts[0])
    cells = found.landings[0].cells
    assert len(cells) == 5 * 2  # five states, at both tokens of the placeholder
    by_hand = []
    for state in run.latents[0]:
        with lens.edit(il.Replace(state), at=il.text.find("xy"), site="blocks.0.hook_resid_pre"):
            by_hand.append(lens.run(text="say xy now", max_new_tokens=3).text)
    assert list(found.texts[0]) == by_hand


def test_a_placeholder_that_is_not_there_is_an_error() -> None:
    lens = text_model("capped")
    run = lens.run(text="red?", latents=FORCED, max_new_tokens=5)
    with pytest.raises(EditTouchedNothing):
        patchscope(lens, run, prompt="say it", placeholder="xy", max_new_tokens=2)
    with pytest.raises(InputError, match="selects no state"):
        patchscope(lens, run, prompt="say it", placeholder="it", at=il.latent[5:6])
    with pytest.raises(InputError, match="no states of the residual stream"):
        patchscope(lens, run, prompt="say it", placeholder="it", site="blocks.0.attn.hook_z")
