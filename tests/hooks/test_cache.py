"""Captured activations: named, addressed, cut, saved, and the same however they were captured."""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch

import imaginelens as il
from imaginelens.hooks.positions import selectors

SPEC = il.LatentSpec(
    name="test", open="<|latent_start|>", close="<|latent_end|>", pad="<|latent_pad|>", max_steps=3
)
SITES = [
    "hook_latent", "hook_embed", "blocks.1.hook_resid_pre", "blocks.1.hook_resid_mid",
    "blocks.1.hook_resid_post", "blocks.1.attn.hook_q", "blocks.1.attn.hook_k",
    "blocks.1.attn.hook_z", "blocks.1.mlp.hook_post", "ln_final.hook_normalized",
    "unembed.hook_out",
]  # fmt: skip


def lens_of(name: str = "qwen2_5_vl") -> il.LatentModel:
    return il.LatentModel(*tiny.build(name), spec=SPEC)


def examples(name: str = "qwen2_5_vl", n: int = 2) -> list[dict[str, Any]]:
    texts, sizes = ("what colour?", "where is the red cube?"), ((48, 32), (24, 40))
    return [
        {"images": tiny.image(*sizes[i], seed=i), "text": tiny.prompt(name, texts[i])}
        for i in range(n)
    ]


def a_run(lens: il.LatentModel, given: Any, **options: Any) -> il.Run:
    return lens.run(given, latents=il.Force(3, at=1), max_new_tokens=8, **options)


@pytest.fixture(scope="module")
def cache() -> il.ActivationCache:
    lens = lens_of()
    with torch.no_grad():
        return lens.run_with_cache(a_run(lens, examples()))[1]


# ---- addressing ------------------------------------------------------------------------------


def test_a_cache_is_addressed_by_name_by_short_name_and_by_layer(cache: il.ActivationCache) -> None:
    for key, name in (
        (("resid_post", 1), "blocks.1.hook_resid_post"),
        (("z", 0), "blocks.0.attn.hook_z"),
        (("post", 2), "blocks.2.mlp.hook_post"),
        ("latent", "hook_latent"),
        ("embed", "hook_embed"),
        ("blocks.1.hook_resid_mid", "blocks.1.hook_resid_mid"),
    ):
        assert cache.name(key) == name
        assert cache[key] is cache[name]
        assert key in cache
    assert len(list(cache)) == len(cache) == len(dict(cache)) > 40
    assert sum(v.numel() * v.element_size() for v in cache.values()) == cache.nbytes()
    assert ("resid_post", 3) not in cache
    assert "resid_past" not in cache


def test_the_last_layer_is_minus_one_as_in_transformer_lens(cache: il.ActivationCache) -> None:
    assert cache["resid_post", -1] is cache["resid_post", 2]


def test_an_unknown_key_says_what_was_captured(cache: il.ActivationCache) -> None:
    some = il.ActivationCache({n: v for n, v in cache.items() if n.startswith("blocks.1")})
    with pytest.raises(il.HookNameError) as error:
        some["resid_post", 2]
    assert "'blocks.2.hook_resid_post'" in str(error.value)
    assert "did you mean 'blocks.1.hook_resid_post'" in str(error.value)
    with pytest.raises(
        il.HookNameError, match=r"nothing was captured, so there is no .* names_filter="
    ):
        il.ActivationCache()["resid_post", 0]
    with pytest.raises(il.HookNameError):  # a pattern that matches is still no key
        some["*.hook_resid_post"]
    assert some.get("blocks.7.hook_resid_post") is None


def test_axes_name_every_dimension(cache: il.ActivationCache) -> None:
    assert cache.axes["blocks.1.attn.hook_k"] == ("example", "position", "head", "d_head")
    assert cache["k", 1].shape[2:] == (2, 16)
    assert cache["q", 1].shape[2:] == (4, 16)
    assert cache["pattern", 1].shape[1] == cache["pattern", 1].shape[3]
    for name, value in cache.items():
        assert len(cache.axes[name]) == value.dim(), name
        if cache.axes[name][0] == "example":
            assert cache.columns[name].shape == value.shape[:2]
        else:
            assert name not in cache.columns
    shown = repr(cache)
    assert f"{len(cache)} sites" in shown
    assert "hook_latent: example 2, position" in shown
    assert len(shown.splitlines()) == 10


# ---- saving ----------------------------------------------------------------------------------


def test_saved_then_loaded_equals_kept_in_memory(cache: il.ActivationCache, tmp_path: Path) -> None:
    path = cache.save(tmp_path / "states.safetensors")
    back = il.ActivationCache.load(path)
    assert list(back) == list(cache) or set(back) == set(cache)
    assert back.axes == cache.axes
    for name in cache:
        assert back[name].dtype == cache[name].dtype
        assert torch.equal(back[name], cache[name])
        if name in cache.columns:
            assert torch.equal(back.columns[name], cache.columns[name])
    assert [p.name for p in tmp_path.iterdir()] == ["states.safetensors"]  # nothing half-written
    assert back.nbytes() == cache.nbytes()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.int64])
def test_saving_keeps_every_bit_of_every_dtype(dtype: torch.dtype, tmp_path: Path) -> None:
    if dtype.is_floating_point:
        value = torch.tensor([[[0.1, -0.0, float("inf"), 1e-7, 3.0]]]).to(dtype)
    else:
        value = torch.tensor([[[1, -2, 2**62]]])
    strided = value.clone().transpose(1, 2)
    cache = il.ActivationCache(
        {"a": value, "b": strided, "c": value.clone()}, {}, {"a": ("example", "x", "y")}
    )
    back = il.ActivationCache.load(cache.save(str(tmp_path / "x")))
    for name in "abc":
        assert back[name].dtype == dtype
        bits = [c[name].flatten().view(torch.uint8).tolist() for c in (back, cache)]
        assert bits[0] == bits[1]
    assert back.axes == {"a": ("example", "x", "y")}


def test_an_empty_cache_is_saved_too(tmp_path: Path) -> None:
    back = il.ActivationCache.load(il.ActivationCache().save(tmp_path / "none"))
    assert len(back) == 0


def test_to_moves_the_values_and_leaves_the_original(cache: il.ActivationCache) -> None:
    few = il.ActivationCache({n: cache[n] for n in SITES}, cache.columns, cache.axes)
    moved = few.to("meta")
    assert all(v.device.type == "meta" for v in moved.values())
    assert few["embed"].device.type == "cpu"
    assert moved.axes == few.axes
    assert moved.columns.keys() == few.columns.keys()
    with pytest.raises(dataclasses.FrozenInstanceError):
        few.axes = {}  # type: ignore[misc]


# ---- what is captured ------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["qwen2_5_vl", "llava", "gemma3"])
def test_capture_while_generating_equals_teacher_forced_capture(name: str) -> None:
    lens = lens_of(name)
    at = [il.image[0][1:3], il.last_prompt, il.latent, il.answer]
    run = a_run(lens, examples(name), names_filter=SITES, positions=at)
    with torch.no_grad():
        _, read = lens.run_with_cache(run, names_filter=SITES, positions=at)
    for site in SITES:
        for row in range(2):
            latents = il.latent.resolve(run.tokens, row).tolist()
            image = il.image.resolve(run.tokens, row).tolist()
            wanted = sorted({int(c) for p in at for c in p.resolve(run.tokens, row)})
            wanted = [c for c in wanted if c < run.tokens.width - 1]  # the last is never read
            if site == "hook_latent":  # only where something is fed back
                wanted = latents
            if site == "unembed.hook_out":  # of the prompt, generation asks for the last logits
                wanted = [c for c in wanted if c >= run.tokens.prompt_width - 1]
            if site == "hook_embed":  # elsewhere it is a placeholder's, and overwritten
                wanted = [c for c in wanted if c not in latents + image]
            held = [cache.columns[site][row].tolist() for cache in (run.cache, read)]
            assert set(wanted) <= set(held[0]), site
            one, two = (
                cache[site][row, [columns.index(c) for c in wanted]]
                for cache, columns in zip((run.cache, read), held, strict=True)
            )
            assert len(one) == len(wanted) > 0
            torch.testing.assert_close(one, two, rtol=0, atol=1e-9)


@pytest.mark.parametrize("name", ["qwen2_5_vl", "llava"])
def test_cutting_to_positions_equals_a_slice_of_the_whole(name: str) -> None:
    lens = lens_of(name)
    run = a_run(lens, examples(name))
    at = [il.latent[1:], il.image[0][0], il.before_answer]
    sites = [*SITES, "blocks.1.attn.hook_pattern"]
    with torch.no_grad():
        logits, whole = lens.run_with_cache(run, names_filter=sites)
        again, cut = lens.run_with_cache(run, names_filter=sites, positions=at)
    assert torch.equal(logits, again)
    for site in sites:
        for row in range(2):
            wanted = np.unique(np.concatenate([p.resolve(run.tokens, row) for p in at]))
            columns = cut.columns[site][row]
            assert columns[columns >= 0].tolist() == wanted.tolist()
            assert torch.equal(cut[site][row, : len(wanted)], whole[site][row, wanted])
            assert not cut[site][row, len(wanted) :].any()


def test_a_slice_does_not_keep_the_whole_alive() -> None:
    lens = lens_of()
    run = a_run(lens, examples(n=1)[0])
    site = "blocks.1.hook_resid_post"
    with torch.no_grad():
        _, cut = lens.run_with_cache(run, names_filter=site, positions=[il.latent[0]])
    assert cut[site].untyped_storage().nbytes() == 64 * 8


def test_a_prompt_is_read_alone_and_a_run_whole() -> None:
    lens, given = lens_of(), examples(n=1)[0]
    run = a_run(lens, given)
    with torch.no_grad():
        prompt_logits, prompt = lens.run_with_cache(given, names_filter="*.hook_resid_post")
        run_logits, whole = lens.run_with_cache(run, names_filter="*.hook_resid_post")
        plain = lens.model(
            **lens.prompt(given).inputs,
            position_ids=tiny.positions(lens.model, lens.prompt(given).inputs),
        ).logits
    width = run.tokens.prompt_width
    assert torch.equal(prompt_logits, plain)
    assert prompt_logits.shape[1] == width
    assert run_logits.shape[1] == run.tokens.width == width + 8
    torch.testing.assert_close(run_logits[:, :width], plain, rtol=0, atol=1e-9)
    torch.testing.assert_close(
        whole["resid_post", 1][:, :width], prompt["resid_post", 1], rtol=0, atol=1e-9
    )


def test_what_is_captured_while_generating_does_not_change_the_run() -> None:
    lens, given = lens_of(), examples()
    plain = a_run(lens, given)
    quiet = a_run(lens, given, names_filter=SITES, positions=[il.latent, il.image])
    assert torch.equal(plain.latents, quiet.latents)
    assert len(plain.cache) == 0
    assert set(quiet.cache) == set(SITES)


def test_patterns_are_captured_while_generating_although_their_keys_grow() -> None:
    lens, given = lens_of(), examples()
    site = "blocks.1.attn.hook_pattern"
    run = a_run(lens, given, names_filter=site, positions=[il.latent])
    with torch.no_grad():
        _, read = lens.run_with_cache(run, names_filter=site, positions=[il.latent])
    n = run.cache[site].shape[-1]
    torch.testing.assert_close(run.cache[site], read[site][..., :n], rtol=0, atol=1e-9)
    assert not read[site][..., n:].any()  # nobody looks ahead


def test_a_run_without_latents_has_nothing_at_them() -> None:
    lens, given = lens_of(), examples(n=1)[0]
    site = "blocks.1.hook_resid_post"
    run = lens.run(
        given, latents=il.Skip(), max_new_tokens=3, names_filter=site, positions=[il.latent]
    )
    assert len(run.cache) == 0
    assert run.latents.shape == (1, 0, 64)


@pytest.mark.parametrize("name", ["qwen2_5_vl", "qwen3_vl"])  # d_head 16 and 24
@pytest.mark.parametrize(
    "site",
    ["*.hook_resid_post", "*.hook_q", "*.hook_k", "*.hook_v", "*.hook_z", "*.mlp.*",
     "*.hook_pattern", "unembed.*", "hook_embed"],
)  # fmt: skip
def test_the_estimated_size_is_the_size(name: str, site: str) -> None:
    lens, given = lens_of(name), examples(name, 1)[0]
    with torch.no_grad():
        names = [n for n in lens.registry.match(site) if not n.startswith("vision")]
        logits, cache = lens.run_with_cache(given, names_filter=names)
    size = lens.estimate_bytes(names, n_examples=1, n_positions=logits.shape[1])
    assert size == cache.nbytes() > 0


def test_values_taken_with_gradients_can_be_differentiated() -> None:
    lens, given = lens_of(), examples(n=1)[0]
    logits, cache = lens.run_with_cache(given, names_filter="blocks.1.hook_resid_post")
    assert cache["resid_post", 1].requires_grad == logits.requires_grad
    with torch.no_grad():
        _, quiet = lens.run_with_cache(given, names_filter="blocks.1.hook_resid_post")
    assert not quiet["resid_post", 1].requires_grad


def test_a_donor_says_what_it_did_not_see() -> None:
    """The last token is written and never read; a column that was not captured can be asked for."""
    lens = il.load("latent-content")
    base, site = lens.task(n=1, seed=0).base, "blocks.1.hook_resid_post"
    whole = lens.run(base, names_filter=site, positions=il.text)
    with pytest.raises(il.DonorError, match=r"column 27 \(text\) .* the last token written"):
        whole.states(site, il.text)
    assert whole.states(site, il.text.find("which")).mask.all()
    latents = lens.run(base, names_filter=site, positions=il.latent)
    with pytest.raises(il.DonorError, match=r"did not capture .* positions=il\.last_prompt"):
        latents.states(site, il.last_prompt)
    for wrong in ("text", [il.text, 3]):
        with pytest.raises(il.InputError, match=r"positions (is|holds) .*; give selectors"):
            selectors(wrong)
