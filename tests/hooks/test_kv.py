"""Keys and values as the cache holds them, against a cache that is edited in plain torch."""

from collections.abc import Callable
from typing import Any

import numpy as np
import oracle
import pytest
import tiny
import torch
from transformers import DynamicCache, LogitsProcessor

import imaginelens as il
from imaginelens.hooks.knockout import Knockout
from imaginelens.hooks.positions import after, generated
from imaginelens.hooks.tokens import Kind

ARCHS = (
    "qwen2_5_vl",
    "gemma3",
    "llava",
)  # plain; windows and two-way image blocks; no 3-D positions
SPEC = il.LatentSpec(
    name="test", open="<|latent_start|>", close="<|latent_end|>", pad="<|latent_pad|>", max_steps=3
)
LAYER, HEAD = 1, 1  # of two key/value heads


def lens_of(name: str) -> il.LatentModel:
    return il.LatentModel(*tiny.build(name), spec=SPEC)


def example(name: str, seed: int = 0) -> dict[str, Any]:
    text = tiny.prompt(name, ("what colour?", "where is the cat?")[seed])
    return {"images": tiny.image(48, 32, seed=seed), "text": text}


class Opens(LogitsProcessor):
    """Opens a span as the second token, and writes no other token of spans."""

    def __init__(self, lens: il.LatentModel, width: int) -> None:
        ids, self.width = lens.span_tokens, width
        self.open, self.banned = ids.open, [ids.open, ids.close, ids.pad]
        self.banned.append(lens.tokenizer.eos_token_id)

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        scores = scores.clone()
        scores[:, self.banned] = -1e9
        if input_ids.shape[1] == self.width + 1:
            scores[:, self.open] = 1e9
        return scores


def ran(lens: il.LatentModel, given: Any, **options: Any) -> il.Run:
    opens = Opens(lens, lens.prompt(given).inputs["input_ids"].shape[1])
    return lens.run(
        given, max_new_tokens=9, generation={"logits_processor": [opens]}, keep_logits=True,
        **options,
    )  # fmt: skip


class Edited(DynamicCache):
    """A cache that holds other keys or values at some columns of one layer and head."""

    def __init__(self, config: Any, part: str, columns: list[int], new: torch.Tensor) -> None:
        super().__init__(config=config)
        self.part, self.columns, self.new, self.read = part, columns, new, 0

    def update(self, key: Any, value: Any, layer: int, *args: Any, **kwargs: Any) -> Any:
        n = key.shape[2]
        if layer == LAYER:
            held = (key if self.part == "k" else value).clone()
            for i, column in enumerate(self.columns):
                if self.read <= column < self.read + n:
                    held[0, HEAD, column - self.read] = self.new[i]
            key, value = (held, value) if self.part == "k" else (key, held)
            self.read += n
        return super().update(key, value, layer, *args, **kwargs)


@torch.no_grad()
def replayed(
    name: str,
    lens: il.LatentModel,
    run: il.Run,
    cache: DynamicCache,
    between: Callable[[int, DynamicCache], None] = lambda column, cache: None,
) -> torch.Tensor:
    """The logits of a run's tokens and latents, read one by one in plain torch on a given cache;
    every latent must be the state that came before it. `between` acts on the cache before the
    forward that reads a column."""
    inputs, width = dict(run.prompt.inputs), run.tokens.prompt_width
    final: list[torch.Tensor] = []
    handle = oracle.decoder(name, lens.model).norm.register_forward_hook(
        lambda m, a, out: final.append(out[0, -1])
    )
    out = lens.model(
        **inputs, position_ids=run.position_ids[..., :width], past_key_values=cache, use_cache=True
    )
    logits = [out.logits[:, -1]]
    for column in range(width, run.position_ids.shape[-1]):
        between(column, cache)
        embeds = lens.model.get_input_embeddings()(run.sequences[:, column : column + 1])
        if run.tokens.kind[0, column] == Kind.LATENT:
            z = run.latents[0, run.tokens.step[0, column]]
            torch.testing.assert_close(z, final[-1], rtol=0, atol=1e-10)
            embeds = z[None, None]
        out = lens.model(
            inputs_embeds=embeds,
            attention_mask=torch.ones(1, column + 1, dtype=torch.long),
            position_ids=run.position_ids[..., column : column + 1],
            past_key_values=cache,
            use_cache=True,
        )
        logits.append(out.logits[:, -1])
    handle.remove()
    return torch.stack(logits, 1)


@pytest.mark.parametrize("where", ["latent", "image"])
@pytest.mark.parametrize("part", ["k", "v"])
@pytest.mark.parametrize("name", ARCHS)
def test_keys_and_values_in_the_cache_are_edited_as_in_plain_torch(
    name: str, part: str, where: str
) -> None:
    lens, given = lens_of(name), example(name)
    at = getattr(il, where)
    site = f"blocks.{LAYER}.attn.{'hook_rot_k' if part == 'k' else 'hook_v'}"
    base = ran(lens, given)
    donor = ran(lens, example(name, 1), names_filter=site, positions=[at])
    states = donor.states(site, at).values  # (example, position, head, d_head)
    assert states.shape[2] == 2  # as many as the cache has, not as many as queries have
    with lens.edit(il.Swap(donor), at=at, site=site, heads=[HEAD]) as landing:
        run = ran(lens, given)
    columns = at.resolve(run.tokens, 0).tolist()
    text = lens.model.config.get_text_config()
    cache = Edited(text, part, columns, states[0, : len(columns), HEAD])
    torch.testing.assert_close(run.logits, replayed(name, lens, run, cache), rtol=0, atol=1e-10)
    assert (run.logits - base.logits).abs().max() > 1e-3
    assert landing.positions == {0: columns}
    assert len(landing.cells) == len(columns)  # once each, however often the cache is read
    # and read in one forward it is the same
    with lens.edit(il.Swap(donor), at=at, site=site, heads=[HEAD]):
        read = lens.run_with_hooks(run)
    width, n = run.tokens.prompt_width, run.logits.shape[1]
    torch.testing.assert_close(read[:, width - 1 : width - 1 + n], run.logits, rtol=0, atol=1e-9)


READERS = {"image": generated, "latent": after(il.latent)}


@pytest.mark.parametrize("where", READERS)
@pytest.mark.parametrize("part", ["k", "v"])
@pytest.mark.parametrize("name", ARCHS)
def test_edits_for_readers_are_edits_of_past_key_values_between_two_forwards(
    name: str, part: str, where: str
) -> None:
    """The image's cells before the first forward of decoding, the latents' after the last latent:
    what was computed before saw the old ones."""
    lens, given, at = lens_of(name), example(name), getattr(il, where)
    site = f"blocks.{LAYER}.attn.{'hook_rot_k' if part == 'k' else 'hook_v'}"
    base, donor = ran(lens, given), ran(lens, example(name, 1), names_filter=site, positions=[at])
    states = donor.states(site, at).values
    options = {"at": at, "site": site, "heads": [HEAD], "readers": READERS[where]}
    with lens.edit(il.Swap(donor), **options) as landing:
        run = ran(lens, given)
    columns = at.resolve(run.tokens, 0)
    first = run.tokens.prompt_width if where == "image" else int(columns[-1]) + 1

    def between(column: int, cache: DynamicCache) -> None:
        if column == first:
            held = cache.layers[LAYER].keys if part == "k" else cache.layers[LAYER].values
            assert held.shape[2] == column
            held[0, HEAD, columns] = states[0, : len(columns), HEAD]

    cache = DynamicCache(config=lens.model.config.get_text_config())
    wanted = replayed(name, lens, run, cache, between)
    torch.testing.assert_close(run.logits, wanted, rtol=0, atol=1e-10)
    assert torch.equal(run.latents, base.latents) == (where == "latent")
    assert (run.logits - base.logits).abs().max() > 1e-3
    assert landing.positions == {0: columns.tolist()}
    assert len(landing.cells) == len(columns)
    readers = run.logits.shape[1] - 1 - (first - run.tokens.prompt_width)
    assert landing.edges == len(columns) * readers
    with lens.edit(il.Swap(donor), **options):
        read = lens.run_with_hooks(run)
    width, n = run.tokens.prompt_width, run.logits.shape[1]
    torch.testing.assert_close(read[:, width - 1 : width - 1 + n], run.logits, rtol=0, atol=1e-9)


def test_a_value_that_reads_as_zero_takes_away_what_its_edges_carried() -> None:
    """Along all edges but the own ones, zeroed values are attention without those terms."""
    name = "qwen2_5_vl"
    lens = lens_of(name)
    run = ran(lens, example(name))
    sites = [f"blocks.1.attn.hook_{part}" for part in ("pattern", "v", "z")]
    _, cache = lens.run_with_cache(run, names_filter=sites)
    pattern, v, z = (cache[site][0] for site in sites)
    readers = after(il.latent)
    with lens.edit(il.Zero(), at=il.latent, site=sites[1], readers=readers):
        _, edited = lens.run_with_cache(run, names_filter=sites[2])
    looking, seen = (at.resolve(run.tokens, 0) for at in (readers, il.latent))
    gone = torch.einsum(
        "qhk,khd->qhd", pattern[looking][:, :, seen], v[seen].repeat_interleave(2, dim=1)
    )
    wanted = z.clone()
    wanted[looking] -= gone
    torch.testing.assert_close(edited[sites[2]][0], wanted, rtol=0, atol=1e-12)
    assert gone.abs().max() > 1e-3


def test_a_sham_for_readers_changes_nothing() -> None:
    lens, given = lens_of("gemma3"), example("gemma3")
    sites = ["blocks.1.attn.hook_rot_k", "blocks.2.attn.hook_v"]
    with lens.hooks([([*sites, "blocks.2.attn.hook_pattern"], lambda act, hook: None)]):
        base = ran(lens, given)
    with lens.edit(il.Sham(), at=il.latent | il.image, site=sites, readers=generated) as landing:
        again = ran(lens, given)
    assert torch.equal(again.logits, base.logits)
    assert landing.edges > 0
    assert landing.relative_change == 0.0


def test_readers_that_cannot_be_told_apart_are_refused() -> None:
    model, processor = tiny.fresh("qwen2_5_vl")
    one, two = (model.model.language_model.layers[i].self_attn for i in (0, 1))

    class Private(type(one)):  # type: ignore[misc]
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            return super().forward(*args, **kwargs)

    one.__class__ = Private
    two.v_norm = torch.nn.Identity()  # as in models whose cached values are not those of v_proj
    lens = il.LatentModel(model, processor, spec=SPEC)
    run = ran(lens, example("qwen2_5_vl"))
    for site, sentence in (
        ("blocks.0.attn.hook_v", "does not ask for a registered attention function"),
        ("blocks.1.attn.hook_v", "normalises its values before they are cached"),
    ):
        with pytest.raises(il.SiteUnavailable, match=sentence):
            with lens.edit(il.Zero(), at=il.latent, site=site, readers=generated):
                lens.run_with_hooks(run)


def test_what_readers_cannot_do_is_refused() -> None:
    lens = lens_of("qwen2_5_vl")
    run = ran(lens, example("qwen2_5_vl"))
    site = "blocks.1.attn.hook_v"
    given: dict[str, Any] = {"at": il.latent, "context": "fixed"}
    with pytest.raises(il.InputError, match="only keys and values are read by others"):
        lens.ablate(run, il.Zero(), readers=generated, **given)
    with pytest.raises(il.InputError, match=r"has queries of its own; write il.Knockout\(gener"):
        lens.ablate(run, Knockout(), readers=generated, **given)
    with pytest.raises(il.EditTouchedNothing):
        lens.ablate(run, il.Zero(), site=site, readers=il.last_prompt, **given)
    with lens.edit(il.Zero(), at=il.latent[0], site=site, readers=generated):
        with pytest.raises(il.InputError, match=r"two edits with readers are at 'bl"):
            lens.ablate(run, il.Zero(), site=site, readers=generated, **given)
    before = lens.run_with_hooks(run)
    found = lens.ablate(run, il.Zero(), site=site, readers=generated, metric=il.kl, **given)
    every = lens.ablate(run, il.Zero(), site=site, metric=il.kl, **given)
    assert 0 < found.after[0] != every.after[0]
    assert torch.equal(lens.run_with_hooks(run), before)


@pytest.mark.parametrize("name", ARCHS)
def test_rotated_queries_and_keys_are_those_that_make_the_pattern(name: str) -> None:
    lens = lens_of(name)
    run = ran(lens, example(name))
    names = [f"blocks.2.attn.hook_{part}" for part in ("rot_q", "rot_k", "pattern")]
    _, cache = lens.run_with_cache(run, names_filter=names)
    q, k, pattern = (cache[n][0] for n in names)
    scores = torch.einsum("qhd,khd->qhk", q, k.repeat_interleave(2, dim=1))
    config = lens.model.config.get_text_config()
    scale = getattr(config, "query_pre_attn_scalar", q.shape[-1]) ** -0.5
    seen = pattern > 0
    by_hand = torch.where(seen, scores * scale, -torch.inf).softmax(-1)
    torch.testing.assert_close(pattern, by_hand, rtol=0, atol=1e-12)
    live = ran(lens, example(name), names_filter=names[:2], positions=[il.latent, il.image])
    for site in names[:2]:
        columns = live.cache.columns[site][0]
        torch.testing.assert_close(live.cache[site][0], cache[site][0, columns], rtol=0, atol=1e-9)


@pytest.mark.parametrize("name", ARCHS)
def test_shams_in_the_cache_change_nothing(name: str) -> None:
    lens, given = lens_of(name), example(name)
    sites = ["blocks.1.attn.hook_rot_k", "blocks.1.attn.hook_rot_q", "blocks.2.attn.hook_v"]
    with lens.hooks([(sites, lambda act, hook: None)]):
        base = ran(lens, given)
    with lens.edit(il.Sham(), at=il.latent | il.image, site=sites, heads=[0]) as landing:
        again = ran(lens, given)
    assert torch.equal(again.logits, base.logits)
    assert landing.relative_change == 0.0


def test_a_hook_on_keys_sees_all_that_a_forward_reads() -> None:
    lens, given = lens_of("llava"), example("llava")
    seen: list[tuple[int, list[int]]] = []

    def watch(act: torch.Tensor, hook: Any) -> None:
        seen.append((act.shape[1], hook.columns.tolist()))

    with lens.hooks([("blocks.1.attn.hook_rot_k", watch)]):
        run = ran(lens, given)
    for i, (n, at) in enumerate(seen):
        assert at == list(range(run.tokens.prompt_width + i))
        assert n == len(at)


@pytest.mark.parametrize("site", ["attn.hook_z", "attn.hook_q", "attn.hook_v"])
def test_an_edit_of_some_heads_leaves_the_others(site: str) -> None:
    name = "qwen2_5_vl"
    lens = lens_of(name)
    run = ran(lens, example(name))
    where = il.latent.resolve(run.tokens, 0)
    full = f"blocks.1.{site}"
    n_heads = 2 if site.endswith("v") else 4

    def put(act: torch.Tensor) -> torch.Tensor:
        act = act.unflatten(-1, (n_heads, -1)).clone()
        act[0, where, 1] = 0
        return act.flatten(2)

    with lens.edit(il.Zero(), at=il.latent, site=full, heads=[1]) as landing:
        found = lens.run_with_hooks(run)
    with oracle.hooked(name, lens.model, full, put):
        wanted = lens.run_with_hooks(run)
    assert torch.equal(found, wanted)
    assert 0 < landing.relative_change < 1
    result = lens.ablate(run, il.Zero(), at=il.latent, site=full, heads=[1], metric=il.kl)
    again = lens.ablate(
        run, il.Zero(), at=il.latent, site=full, heads=list(range(n_heads)), metric=il.kl
    )
    assert 0 < result.after[0] != again.after[0]


def test_patching_some_heads_is_swapping_them() -> None:
    name = "qwen2_5_vl"
    lens = lens_of(name)
    base, source = ran(lens, example(name)), ran(lens, example(name, 1))
    site = "blocks.1.attn.hook_rot_k"
    given: dict[str, Any] = {"site": site, "at": il.latent, "metric": il.kl, "context": "fixed"}
    some = lens.patch(base=base, source=source, heads=[0], **given)
    every = lens.patch(base=base, source=source, **given)
    both = lens.patch(base=base, source=source, heads=[0, 1], **given)
    assert every.after == both.after
    assert some.after != every.after


def test_heads_where_there_are_none_are_refused() -> None:
    lens = lens_of("qwen2_5_vl")
    run = ran(lens, example("qwen2_5_vl"))
    for heads, site, sentence in (
        ([0], "blocks.1.hook_resid_post", "has the axes example, position, d_model and no heads"),
        ([2], "blocks.1.attn.hook_rot_k", "heads names head 2 of .* which has heads 0 to 1"),
        ([], "blocks.1.attn.hook_z", r"heads is \[\], expected numbers"),
        ([0], "hook_latent", "has the axes example, position, d_model and no heads"),
    ):
        with pytest.raises(il.InputError, match=sentence):
            lens.ablate(run, il.Zero(), at=il.latent, site=site, heads=heads, context="fixed")
    assert np.isfinite(float(run.latents.sum()))


def test_estimated_bytes_of_keys_are_those_that_are_kept() -> None:
    lens = lens_of("gemma3")
    run = ran(lens, example("gemma3"))
    for site in ("blocks.1.attn.hook_rot_k", "blocks.1.attn.hook_rot_q"):
        _, cache = lens.run_with_cache(run, names_filter=site)
        n = cache[site].shape[1]
        assert lens.estimate_bytes(site, n_examples=1, n_positions=n) == cache.nbytes()
