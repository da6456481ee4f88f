"""Knockout maps: masks written by hand, edges without weight, and what each organism needs."""

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import planted
import pytest
import torch

import imaginelens as il
from imaginelens.mediation.attention_knockout import _check, attention_knockout
from imaginelens.mediation.effect_map import NOT_EMITTED, EffectMap


@contextmanager
def masked_by_hand(
    lens: il.LatentModel, layer: int, queries: list[int], keys: list[int], head: int | None
) -> Iterator[None]:
    """Plain torch: the attention of one layer gets a mask of its own, of a single row."""
    attention = lens.model.get_submodule(lens.structure.blocks[layer].attention)

    def cut(module: torch.nn.Module, args: tuple, given: dict) -> tuple[tuple, dict]:
        hidden = given["hidden_states"] if "hidden_states" in given else args[0]
        n, heads = hidden.shape[1], lens.structure.n_heads
        visible = torch.ones(n, n, dtype=torch.bool).tril().repeat(heads, 1, 1)
        for q in queries:
            for k in keys:
                visible[slice(None) if head is None else head, q, k] = False
        mask = torch.zeros(1, heads, n, n, dtype=hidden.dtype)
        mask = mask.masked_fill(~visible[None], torch.finfo(hidden.dtype).min)
        return args, {**given, "attention_mask": mask}

    handle = attention.register_forward_pre_hook(cut, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


@pytest.mark.parametrize("heads", [False, True])
def test_cells_are_masks_written_by_hand(heads: bool) -> None:
    lens = il.load("latent-content", dtype=torch.float64)
    task = lens.task(n=1, seed=3)
    found = attention_knockout(lens, task, queries=il.deciding, keys=il.latent, heads=heads)
    run = lens.run(list(task.base))
    queries, keys = (at.resolve(run.tokens, 0).tolist() for at in (il.deciding, il.latent))
    for cell, after in zip(found.cells, found.after, strict=True):
        if cell.layer is None:
            continue
        with masked_by_hand(lens, cell.layer, queries, keys, cell.head):
            wanted = lens.ablate(
                run, il.Sham(), at=il.latent, metric=il.log_prob, context="fixed",
                answers=task.base_answers,
            ).before  # fmt: skip
        assert after[0] == pytest.approx(float(wanted[0]), abs=1e-12), cell
    assert len(found) == (12 if heads else 3) + 1
    assert np.abs(found.effect).max() > 0.1


def needs(name: str, **words: object) -> EffectMap:
    lens = il.load(name)
    given = {"queries": il.deciding, "keys": il.latent, "metric": il.base_answer, **words}
    return attention_knockout(lens, lens.task(n=16, seed=1), **given)


def test_organisms_show_whether_the_answer_looks_at_latents() -> None:
    content, ignored = needs("latent-content"), needs("latent-ignored")
    assert content.before.mean() > 0.9
    assert content["all layers"].value < -0.5
    assert content["pattern", 1].value < -0.2  # the layer that reads them
    assert content["pattern", 0].value == content["pattern", 2].value == 0.0
    assert ignored["all layers"].value == 0.0
    assert not content.sham.any()


def test_the_window_of_all_layers_is_the_total() -> None:
    whole = needs("latent-content", window=3, metric=il.log_prob)
    assert np.array_equal(whole["pattern", 0].values, whole["all layers"].values)


def test_edges_without_weight_have_exactly_no_effect() -> None:
    """Block 1 of the planted model reads z at the token before the answer, and nothing else does:
    cut off, it reads zeros, the controlled world. Where its heads look elsewhere, no edge to a
    latent has any weight."""
    for kind in ("chain", "masked"):
        p = planted.planted(kind)
        found = attention_knockout(
            p.lens, p.pairs, queries=il.before_answer, keys=il.latent, metric=il.logit_diff
        )
        wanted = p.truth["c0"] - p.truth["y00"]
        assert wanted.any() == (kind == "chain")
        assert not found["pattern", 0].values.any()
        for cell in (found["pattern", 1], found["all layers"]):
            assert np.allclose(cell.values, wanted, rtol=0, atol=1e-12)
            assert cell.values.any() == wanted.any()


def test_generation_is_cut_in_free_context() -> None:
    found = needs("latent-content", queries=il.after(il.latent), context="free")
    assert found["all layers"].value < -0.5
    assert found.context == "free"


def test_examples_are_taken_with_the_answers_the_model_gives() -> None:
    lens = il.load("latent-content")
    task = lens.task(n=6, seed=2)
    words = {"queries": None, "keys": il.latent}
    own = attention_knockout(lens, list(task.base), **words)
    given = attention_knockout(lens, task, **words, batch_size=4)
    assert lens.run(list(task.base)).answers == list(task.base_answers)
    assert np.allclose(own.effect, given.effect, atol=1e-5)


def test_keys_that_are_not_there() -> None:
    lens = il.load("latent-content")
    task = lens.task(n=2, seed=0)
    found = attention_knockout(
        lens, task, queries=il.deciding, keys=il.latent | il.text.find("no such text")
    )
    assert (found.flags == 0).all()
    with pytest.raises(il.InputError, match="no run has a position"):
        attention_knockout(lens, task, queries=None, keys=il.text.find("no such text"))
    with pytest.raises(il.EditTouchedNothing, match="changed nothing"):
        attention_knockout(lens, task, queries=il.image[0][0, 0], keys=il.latent)  # they are later
    assert NOT_EMITTED == 1


def test_bad_arguments_are_refused() -> None:
    p = planted.planted("linear")
    for words, said in (
        ({"keys": "latent"}, "at is 'latent'"),
        ({"queries": il.answer}, "leaves out the position"),
        ({"context": "both"}, "choose 'free' or 'fixed'"),
        ({"data": "x"}, "list of examples"),
        ({"batch_size": True}, "batch_size is True"),
    ):
        given = {
            "queries": None,
            "keys": il.latent,
            "metric": il.prob,
            "context": "fixed",
            "batch_size": 1,
        }
        with pytest.raises(il.InputError, match=said):
            _check(**{**given, "data": p.pairs, **words})
