"""do(X) -> Z: latents that depend on the input are told from constant ones, whatever the cosine."""

from collections.abc import Callable
from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np
import pytest
from PIL import Image
from planted import planted

import imaginelens as il
from imaginelens.estimates import EstimateError
from imaginelens.estimates.similarity import cosines, mean_offdiagonal
from imaginelens.hooks.inputs import InputEdit
from imaginelens.mediation import Dependence, forwards_needed, input_dependence
from imaginelens.mediation.dependence_runs import baseline, inputs_of

KINDS = np.repeat([0, 1, 2, 3], 6)


def draw(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape)


def cone(*, signal: float, steps: int = 2, seed: int = 0, d: int = 500) -> np.ndarray:
    """States of 24 inputs in a cone: a common vector of size 400, noise, a signal per kind."""
    own = np.eye(4, d)[KINDS][:, None] * signal
    return draw(24, steps, d, seed=seed) + 400 / np.sqrt(d) + own


@cache
def lens_of(name: str) -> Any:
    return il.load(name)


@cache
def study(name: str, label: str = "") -> Dependence:
    """48 inputs of an organism's task, labelled by their answers or by a name on the path."""
    visited = {"first": 1, "last": -1}
    by: Callable[[Any], str] | None = None
    if label:
        by = lambda example: example["hunt"].path[visited[label]]  # noqa: E731
    lens = lens_of(name)
    return il.input_dependence(lens, lens.task(n=24, seed=0), labels=by)


# ---- organisms -----------------------------------------------------------------------------------


def test_latents_that_hold_the_answer_find_it() -> None:
    """latent-content: the last step finds the answer, the first cannot know it yet."""
    found = study("latent-content")
    assert found.finding == "tells inputs apart"
    last = found.retrieval(1)
    assert last.null == pytest.approx(0.18, abs=0.02)
    assert last.value > 0.4
    assert last.ci().low > 1.5 * last.null
    assert found.permutation_p(0) > 0.05
    assert found.pvalue == 2 * found.permutation_p(1)
    assert found.verdict().startswith(
        "The latents depend on the input: at step 1 the nearest other input shares its answer in"
    )


def test_latents_that_point_find_the_name() -> None:
    """latent-pointer: step 0 holds the first visited name, step 1 the last, and not the first."""
    first, last = study("latent-pointer", "first"), study("latent-pointer", "last")
    assert first.finding == last.finding == "tells inputs apart"
    assert first.retrieval(0).value > 0.6
    assert last.retrieval(1).value > 0.6
    assert max(first.retrieval(0).null or 1, last.retrieval(1).null or 1) < 0.2
    assert first.retrieval(1).value < 0.25
    assert "shares its label" in last.verdict()


def test_latents_that_are_ignored_depend_on_the_input_all_the_same() -> None:
    found = study("latent-ignored")
    assert found.finding != "constant"
    assert found.relative_change(0).ci().low > 0.4
    assert found.relative_change(1).ci().low > 0.2
    assert found.inter(1).mean() > 0.9  # which the raw cosine would call collapsed
    assert found.repeated < 1e-3


@pytest.mark.parametrize("edit", ["constant", "zero"])
def test_constant_latents_do_not_depend_on_the_input(edit: str) -> None:
    lens = lens_of("latent-content")
    task = lens.task(n=6, seed=0)
    given = il.Zero()
    if edit == "constant":
        given = il.Constant(value=lens.run(task.base[0]).latents[0, 0])
    with lens.edit(given, at=il.latent) as landing:
        found = input_dependence(lens, task)
    assert landing.fired > 0
    assert found.finding == "constant"
    assert found.verdict() == (
        "The latents do not depend on the input: in 6 pairs they change by 0 of their norm, no "
        "more than when an input is repeated (0)."
    )
    for step in (0, 1):
        assert not found.changes(step).any()
        shown = found.retrieval(step)
        assert shown.value == pytest.approx(shown.null)
        assert found.permutation_p(step) == 1.0
        assert found.rank(step).effective == 0
        assert np.isnan(found.inter(step).mean("centred"))
    raw = found.inter(1).mean()
    assert np.isnan(raw) if edit == "zero" else raw == pytest.approx(1.0)
    assert "  0.000" in repr(found)


def test_nothing_stays_on_the_model() -> None:
    lens = lens_of("latent-content")
    study("latent-content")
    assert not lens.registry.entries
    with pytest.raises(il.InputError):
        input_dependence(lens, lens.task(n=4, seed=0), latents=il.Skip())
    assert not lens.registry.entries


# ---- edited twins --------------------------------------------------------------------------------


def test_an_input_finds_its_edited_twin() -> None:
    lens = lens_of("latent-content")
    found = input_dependence(lens, lens.task(n=16, seed=0).do(il.NoiseImage(10.0)))
    assert (found.by, found.n, len(found.states)) == ("twin", 16, 32)
    assert found.finding == "tells inputs apart"
    for step in (0, 1):
        assert found.retrieval(step).value == 1.0
        assert found.retrieval(step).null == pytest.approx(1 / 16)
        assert found.relative_change(step).value < 0.2
    assert "the nearest edited input is its own twin in 100% of 16 cases" in found.verdict()
    assert len(found.inter(0).inputs) == 16
    assert found.baselines
    assert all(b.n == 16 for b in found.baselines)


def test_a_blanked_picture_leaves_nothing_to_find() -> None:
    lens = lens_of("latent-content")
    found = input_dependence(lens, lens.task(n=16, seed=0).do(il.BlankImage((90, 90, 90))))
    assert found.by == "twin"
    assert found.finding == "changes"
    assert found.relative_change(0).value > 0.5


def test_a_source_that_equals_its_base_is_no_pair() -> None:
    grey = Image.new("RGB", (8, 8), (90, 90, 90))
    red = Image.new("RGB", (8, 8), "red")
    examples = [{"images": image, "text": text} for image in (grey, red) for text in "ab"]
    pairs = il.Pairs(examples, examples, "wxyz", [None] * 4).do(il.BlankImage((90, 90, 90)))
    found = inputs_of(pairs, None, None)
    assert found.pairs is not None
    assert found.pairs.tolist() == [[0, 0], [1, 1], [2, 0], [3, 1]]  # red, blanked, is grey
    assert found.edited == set()
    states = draw(4, 1, 5)
    made = Dependence.of(states, pairs=found.pairs, twins=True)
    assert np.isnan(made.changes(0)).tolist() == [True, True, False, False]
    assert (made.n, made.relative_change(0).n, made.by) == (4, 2, "twin")
    assert np.isnan(made.pvalue)
    assert "not tested, for fewer than 3 inputs have a twin that differs" in made.verdict()
    with pytest.raises(il.InputError, match="all 4 sources equal their bases"):
        inputs_of(il.Pairs(examples, examples, "wxyz", [None] * 4), None, None)


@pytest.mark.parametrize(
    ("edit", "twins"),
    [
        (il.BlurImage(1.0), True),
        (il.OccludeCells([(0, 0)], grid=(3, 3)), True),
        (il.SwapInstance(), False),
        (il.SwapImage(), False),
        (il.SwapText(), False),
    ],
)
def test_only_edits_that_take_nothing_from_another_input_make_twins(
    edit: InputEdit, twins: bool
) -> None:
    task = lens_of("latent-content").task(n=4, seed=0)
    found = inputs_of(task.do(edit), None, None)
    assert found.twins == twins
    assert found.edited == ({4, 5, 6, 7} if twins else set())
    assert (found.labels is None) == twins
    labelled = inputs_of(task.do(edit), ["a"] * 8, None)
    assert set(labelled.labels or ()) == {"a"}


# ---- cosines that mislead ------------------------------------------------------------------------


def test_a_signal_inside_a_cone_is_found_although_the_raw_cosine_is_near_one() -> None:
    found = Dependence.of(cone(signal=15.0), labels=KINDS)
    assert found.inter(0).mean() > 0.995
    assert found.finding == "tells inputs apart"
    assert ", although their raw cosine is 0.99" in found.verdict()
    assert found.retrieval(0).value > 0.9


def test_noise_inside_a_cone_changes_and_tells_nothing() -> None:
    found = Dependence.of(cone(signal=0.0), labels=KINDS)
    assert found.inter(0).mean() > 0.995
    assert found.finding == "changes"
    assert "it was not shown that this tells inputs apart" in found.verdict()


def test_a_small_raw_cosine_is_no_dependence_either() -> None:
    """Directions that differ by input only as they differ when the same input is repeated."""
    states = draw(24, 1, 500)
    moved = Dependence.of(states, labels=KINDS)
    assert abs(moved.inter(0).mean()) < 0.05
    repeated = replace(moved, sham=np.full(5, 2.0))
    assert (moved.finding, repeated.finding) == ("changes", "constant")


def test_rounding_is_told_from_dependence_by_the_repeated_inputs() -> None:
    base = np.broadcast_to(draw(1, 2, 64), (24, 2, 64))
    found = Dependence.of(base + 1e-6 * draw(24, 2, 64, seed=1), labels=KINDS)
    assert found.finding == "changes"
    assert replace(found, sham=np.array([1e-7, 3e-6])).finding == "constant"


def test_centred_means_say_nothing_and_their_matrices_do() -> None:
    for signal in (0.0, 15.0):
        found = Dependence.of(cone(signal=signal), labels=KINDS)
        assert found.inter(0).mean("centred") == pytest.approx(-1 / 23, abs=2e-3)
    centred = found.inter(0).centred
    same = KINDS[:, None] == KINDS
    assert centred[same & ~np.eye(24, dtype=bool)].mean() > 0.1
    assert centred[~same].mean() < 0


def test_the_claim_holds_over_all_steps() -> None:
    """With labels at random over 3 steps, one study in 20 at the most finds anything."""
    wrong = 0
    for seed in range(40):
        kinds = np.random.default_rng(seed).permutation(KINDS)
        found = Dependence.of(draw(24, 3, 8, seed=seed), labels=kinds, permutations=100)
        assert found.pvalue == min(1.0, 3 * min(map(found.permutation_p, range(3))))
        wrong += found.finding == "tells inputs apart"
    assert wrong <= 6  # of 40 at 5%: more has a probability of 0.003


# ---- what is measured ----------------------------------------------------------------------------


def test_matrices_are_those_of_the_states() -> None:
    found = study("latent-content")
    inter = found.inter(1)
    for kind in ("raw", "centred", "whitened"):
        matrix = cosines(found.states[:, 1], kind=kind)
        np.testing.assert_array_equal(getattr(inter, kind), matrix)
        assert inter.mean(kind) == mean_offdiagonal(matrix)
    assert inter.inputs.tolist() == list(range(48))


def test_the_change_of_a_planted_model_is_the_one_written_into_it() -> None:
    """z = 0.1 + 2x, so that ||Z(x1) - Z(x0)|| / ||Z(x0)|| = |2 (x1 - x0)| / |0.1 + 2 x0|."""
    model = planted("linear")
    found = input_dependence(model.lens, model.pairs, labels="abcdefgh")
    x0, x1 = model.x0[:, 0], model.x1[:, 0]
    expected = np.abs(2 * (x1 - x0)) / np.abs(0.1 + 2 * x0)
    np.testing.assert_allclose(found.changes(0), expected, rtol=1e-12)
    estimate = found.relative_change(0)
    assert (estimate.value, estimate.n) == (pytest.approx(expected.mean()), 4)
    assert found.finding == "changes"
    assert "not tested, for no two inputs of different groups share a label" in found.verdict()
    assert found.repeated == 0
    assert [b.name for b in found.baselines] == ["text tokens", "text tokens", "last prompt token"]


def test_of_a_list_each_input_is_compared_with_all_others() -> None:
    states = draw(5, 1, 4)
    found = Dependence.of(states, labels="aabba")
    z = states[:, 0]
    expected = [
        np.mean([np.linalg.norm(z[j] - z[i]) / np.linalg.norm(z[i]) for j in range(5) if j != i])
        for i in range(5)
    ]
    np.testing.assert_allclose(found.changes(0), expected)
    assert found.relative_change(0).n == 5


def test_a_zero_state_that_moves_is_missing_not_infinite() -> None:
    states = draw(6, 1, 3)
    states[0] = 0
    found = Dependence.of(states, pairs=[[0, 1], [2, 3], [4, 5]])
    assert np.isnan(found.changes(0)).tolist() == [True, False, False]
    assert found.relative_change(0).missing == 1
    still = Dependence.of(states * 0, pairs=[[0, 1], [2, 3], [4, 5]])
    assert not still.changes(0).any()
    assert still.finding == "constant"


def test_steps_of_one_input_are_compared_input_by_input() -> None:
    states = draw(9, 3, 6) + 1
    found = Dependence.of(states, labels="aabbccaab").intra
    expected = np.array(
        [
            [
                [z[s] @ z[t] / np.linalg.norm(z[s]) / np.linalg.norm(z[t]) for t in range(3)]
                for s in range(3)
            ]
            for z in states
        ]
    )
    np.testing.assert_allclose(found.per_input(), expected)
    np.testing.assert_allclose(found.matrix(), expected.mean(0))
    assert found.between(0, 2).value == pytest.approx(expected[:, 0, 2].mean())
    adjacent = expected[:, [0, 1], [1, 2]].mean(1)
    np.testing.assert_allclose(found.adjacent().values, adjacent)
    middle = states.reshape(-1, 6).mean(0)
    centred = states - middle
    z = centred / np.linalg.norm(centred, axis=-1, keepdims=True)
    np.testing.assert_allclose(found.per_input("centred"), z @ z.swapaxes(1, 2))
    assert found.adjacent(kind="whitened").n == 9


def test_collapse_over_steps_is_seen() -> None:
    """Steps that repeat have the cosine 1; the ignored-aligned organism's nearly do."""
    states = np.repeat(draw(8, 1, 20), 4, axis=1)
    found = Dependence.of(states, labels="aabbccdd")
    np.testing.assert_allclose(found.intra.matrix(), 1.0)
    aligned = study("latent-ignored-aligned").intra.adjacent()
    assert aligned.ci().low > 0.98
    assert study("latent-content").intra.adjacent().value < 0.3
    assert aligned.n == 24  # pairs, not inputs


def test_the_constant_latent_of_the_control() -> None:
    """Its first step is the plain one, its second what the model makes of one fed constant."""
    lens = lens_of("latent-content")
    found = study("latent-content")
    control = found.control
    assert control is not None
    np.testing.assert_allclose(control.states[:, 0], found.states[:, 0], atol=1e-5)
    task = lens.task(n=24, seed=0)
    dummy = lens.run(task.base[0]).latents[0, 0]
    site = "ln_final.hook_normalized"
    with lens.edit(il.Constant(value=dummy), at=il.latent):
        run = lens.run([*task.base, *task.source], names_filter=site, positions=[il.latent[0]])
    expected = run.cache[site][:, 0].double().numpy()
    np.testing.assert_allclose(control.states[:, 1], expected, atol=1e-4)
    # what the second step holds comes through the first latent, not around it
    assert control.permutation_p(1) > 0.05 > found.permutation_p(1)
    assert "with one constant latent at every step)" in found.verdict()


def test_a_baseline_is_the_mean_over_all_pairs_of_tokens() -> None:
    tokens = [draw(3, 5) + 1, draw(1, 5, seed=1) + 1, draw(4, 5, seed=2) + 1, np.zeros((0, 5))]
    found = baseline("text tokens", "hook_embed", tokens)
    unit = [t / np.linalg.norm(t, axis=1, keepdims=True) for t in tokens]
    pairs = [
        np.mean(unit[i] @ unit[j].T) for i in range(3) for j in range(3) if i != j
    ]  # inputs count alike, however many tokens they have
    assert found.raw == pytest.approx(np.mean(pairs))
    steps = [np.mean([u[k] @ u[k + 1] for k in range(len(u) - 1)]) for u in (unit[0], unit[2])]
    assert found.adjacent == pytest.approx(np.mean(steps))
    assert found.n == 3
    assert np.isnan(baseline("text tokens", "hook_embed", tokens[:1]).raw)


def test_baselines_are_read_where_they_say() -> None:
    found = study("latent-content")
    lens = lens_of("latent-content")
    task = lens.task(n=24, seed=0)
    sites = ["blocks.0.hook_resid_pre", "ln_final.hook_normalized"]
    inputs = [*task.base, *task.source]
    run = lens.run(inputs, names_filter=sites, positions=[il.image, il.last_prompt])
    states = run.states(sites[0], il.image).values.double().numpy()
    image = baseline("image tokens", sites[0], list(states))
    last = run.states(sites[1], il.last_prompt).values[:, 0].double().numpy()
    shown = {(b.name, b.site): b for b in found.baselines}
    assert shown["image tokens", sites[0]].raw == pytest.approx(image.raw, abs=1e-5)
    assert shown["last prompt token", sites[1]].raw == pytest.approx(
        mean_offdiagonal(cosines(last)), abs=1e-5
    )
    assert {("text tokens", site) for site in sites} < set(shown)


def test_results_do_not_depend_on_batches_and_cost_what_was_said() -> None:
    lens = lens_of("latent-content")
    task = lens.task(n=10, seed=0)
    whole, parts = (input_dependence(lens, task, batch_size=size) for size in (32, 6))
    np.testing.assert_allclose(whole.states, parts.states, atol=1e-5)
    assert whole.control is not None
    assert parts.control is not None
    np.testing.assert_allclose(whole.control.states, parts.control.states, atol=1e-4)
    assert [whole.permutation_p(t) for t in (0, 1)] == [parts.permutation_p(t) for t in (0, 1)]
    for found, size in ((whole, 32), (parts, 6)):
        most = forwards_needed(20, new_tokens=6, batch_size=size)
        assert 0.7 * most < found.forwards <= most
    assert whole.provenance is not None
    assert parts.provenance is not None
    assert whole.provenance.inputs == parts.provenance.inputs


def test_other_sites_and_positions() -> None:
    lens = lens_of("latent-content")
    task = lens.task(n=8, seed=0)
    found = input_dependence(lens, task, site="blocks.1.hook_resid_post", at=il.latent[1])
    assert found.steps == (0,)
    assert found.verdict().startswith("The states ")
    assert found.control is not None
    last = input_dependence(lens, task, at=il.latent[-1])
    np.testing.assert_allclose(last.states[:, 0], study("latent-content").states[_first(8), 1])
    words = lens_of("text")
    found = input_dependence(
        words, words.task(n=12, seed=0), site="ln_final.hook_normalized", at=il.imagination
    )
    assert found.control is None
    assert len(found.steps) > 1


def _first(n: int) -> list[int]:
    """The first n bases and sources of 24 pairs."""
    return [*range(n), *range(24, 24 + n)]


# ---- which inputs --------------------------------------------------------------------------------


def test_equal_inputs_count_once() -> None:
    """As a base here and a source there, an input would find itself."""
    lens = lens_of("latent-content")
    task = lens.task(n=12, seed=0)
    examples = [{**e, "answer": a} for e, a in zip(task.base, task.base_answers, strict=True)]
    pairs = il.Pairs.from_examples(examples)
    found = input_dependence(lens, pairs)
    assert (found.n, len(found.states)) == (12, 12)
    assert found.pairs is not None
    assert found.pairs.shape == (12, 2)
    alone = input_dependence(lens, [*examples, *examples])
    np.testing.assert_allclose(alone.states, found.states, atol=1e-6)
    assert [alone.permutation_p(t) for t in (0, 1)] == [found.permutation_p(t) for t in (0, 1)]
    assert alone.label == "answer"
    plain = input_dependence(lens, task.base)
    assert plain.by is None
    assert np.isnan(plain.pvalue)
    assert "no labels are known" in plain.verdict()


def test_labels_and_groups_of_inputs() -> None:
    task = lens_of("latent-content").task(n=3, seed=0)
    found = inputs_of(task, None, ["g", "h", "g"])
    assert found.groups == ("g", "h", "g", "g", "h", "g")
    assert found.labels == (*task.base_answers, *task.source_answers)
    grouped = il.Pairs(
        task.base, task.source, task.base_answers, task.source_answers, groups=[7, 8, 7]
    )
    assert inputs_of(grouped, None, None).groups == (7, 8, 7, 7, 8, 7)
    listed = [{"text": "a", "answer": "X "}, {"text": "b", "group": 1}]
    with pytest.raises(il.InputError, match=r"1 of 2 inputs have no group \(the first is input 0"):
        inputs_of(listed, None, None)
    assert inputs_of(listed[:1], None, None).labels == ("x",)
    assert inputs_of([{"text": "a"}, {"text": "b"}], [1, None], None).labels == (1, None)
    twice = [{"text": "a"}, {"text": "a", "answer": "y"}, {"text": "b"}]
    assert inputs_of(twice, None, None).labels == ("y", None)


def test_a_group_is_never_its_own_neighbour_and_counts_once() -> None:
    """Eight groups of three near copies: found at once without groups, not with them."""
    rng = np.random.default_rng(3)
    states = np.repeat(draw(8, 1, 40), 3, axis=0) + 0.01 * draw(24, 1, 40, seed=1)
    kinds = np.repeat(rng.permutation(np.repeat([0, 1], 4)), 3)
    groups = np.repeat(np.arange(8), 3)
    fooled = Dependence.of(states, labels=kinds)
    found = Dependence.of(states, labels=kinds, groups=groups)
    assert fooled.finding == "tells inputs apart"
    assert found.finding == "changes"
    assert found.relative_change(0).n == 8
    assert found.retrieval(0).n == 8
    assert found.to_dataframe()["retrieval"][0] == found.retrieval(0).value
    assert found.intra.units.tolist() == groups.tolist()


def test_pairs_change_places_together() -> None:
    """The two of a pair are never each other's neighbours, though they be copies."""
    base = draw(12, 1, 30)
    states = np.concatenate([base, base + 1e-3])
    labels = ["a", "b"] * 6 + ["b", "a"] * 6
    pairs = np.stack([np.arange(12), np.arange(12, 24)], axis=1)
    found = Dependence.of(states, labels=labels, pairs=pairs)
    assert found.retrieval(0).null == pytest.approx(11 / 22)
    assert found.permutation_p(0) > 0.05
    assert found.relative_change(0).n == 12


# ---- what is missing -----------------------------------------------------------------------------


def test_inputs_without_latents_are_left_out_and_counted() -> None:
    states, mask = cone(signal=15.0, steps=3), np.ones((24, 3), dtype=bool)
    mask[[2, 9]] = False
    mask[:, 2] = np.arange(24) < 2  # of which input 2 has none: too few
    mask[2] = False
    states[~mask] = np.nan
    found = Dependence.of(states, mask=mask, labels=KINDS)
    assert (found.n, found.missing, found.steps) == (24, 2, (0, 1))
    assert len(found.inter(0).inputs) == 22
    assert found.retrieval(0).n == 22
    assert found.relative_change(0).missing == 2
    assert found.finding == "tells inputs apart"
    assert "24 inputs (2 without)" in repr(found)
    with pytest.raises(il.InputError, match=r"step 2 was asked for, .* have the steps \[0, 1\]"):
        found.inter(2)
    kept = Dependence.of(states[mask[:, 0]][:, :2], labels=KINDS[mask[:, 0]])
    np.testing.assert_array_equal(found.inter(0).raw, kept.inter(0).raw)
    assert found.retrieval(0).value == kept.retrieval(0).value


def test_steps_that_only_some_reach() -> None:
    mask = np.ones((24, 2), dtype=bool)
    mask[10:, 1] = False
    found = Dependence.of(cone(signal=0.0), mask=mask, labels=KINDS)
    assert found.intra.between(0, 1).n == 10
    assert len(found.inter(1).inputs) == 10
    assert np.isnan(found.intra.per_input()[10:, 0, 1]).all()


def test_organism_inputs_that_open_no_span_are_counted() -> None:
    """A question that the organism was not trained on is answered without latents."""
    lens = lens_of("latent-content")
    task = lens.task(n=8, seed=0)
    odd = [{"images": Image.new("RGB", (84, 84), c), "text": "?"} for c in ("red", "blue", "gray")]
    emitted = lens.run(odd).trigger.emitted
    found = input_dependence(lens, [*task.base, *odd], labels="aabbccaaddd")
    assert found.missing == emitted.count(0)
    assert found.n == 11


def test_a_shown_table() -> None:
    found = study("latent-content")
    table = found.to_dataframe()
    assert table["step"].tolist() == [0, 1]
    assert table["retrieval"][1] == found.retrieval(1).value
    assert table["p"][1] == found.permutation_p(1)
    assert np.isnan(table["raw_previous"][0])
    assert table["effective_rank"][0] < table["effective_rank_null"][0]
    assert found.control is not None
    assert table["raw_constant"][1] == found.control.inter(1).mean()
    text = repr(found)
    assert "Dependence of hook_latent at latent on the input: 48 inputs" in text
    assert found.verdict() in text
    assert "image tokens at blocks.0.hook_resid_pre: raw " in text
    assert "nan" not in text


# ---- what is refused -----------------------------------------------------------------------------


def test_calls_that_cannot_be_run_are_refused() -> None:
    lens = lens_of("latent-content")
    task = lens.task(n=4, seed=0)
    with pytest.raises(il.InputError, match="2 distinct inputs came, and 3 are needed"):
        input_dependence(lens, [task.base[0], task.base[1], task.base[0]])
    with pytest.raises(il.InputError, match="0 distinct inputs came"):
        input_dependence(lens, [])
    with pytest.raises(il.InputError, match=r"none of 8 inputs has a state of hook_latent .*Force"):
        input_dependence(lens, task, latents=il.Skip())
    with pytest.raises(il.InputError, match="selects 5 sites; name one"):
        input_dependence(lens, task, site="*.hook_resid_post")
    with pytest.raises(il.HookNameError, match="hook_latents"):
        input_dependence(lens, task, site="hook_latents")
    with pytest.raises(il.InputError, match=r"at is image; select with il\.latent"):
        input_dependence(lens, task, at=il.image)
    with pytest.raises(il.InputError, match="batch_size is 0"):
        input_dependence(lens, task, batch_size=0)
    with pytest.raises(il.InputError, match="10 permutations cannot"):
        input_dependence(lens, task, permutations=10)
    with pytest.raises(il.InputError, match="has no latent family"):
        input_dependence(lens_of("text"), task)
    with pytest.raises(il.InputError, match="input 1 cannot be read"):
        input_dependence(lens, [task.base[0], {"images": 3, "text": "a"}, task.base[1]])
    with pytest.raises(il.InputError, match="3 labels came with 8 inputs, the bases and then"):
        input_dependence(lens, task, labels="abc")
    with pytest.raises(il.InputError, match=r"label of input 0 is \['a'\]"):
        input_dependence(lens, task, labels=lambda example: ["a"])
    with pytest.raises(il.InputError, match="5 groups came with 4 pairs"):
        input_dependence(lens, task, groups=[1, 2, 3, 4, 5])
    with pytest.raises(il.InputError, match="all 8 inputs are of one group"):
        input_dependence(lens, task, groups=[1, 1, 1, 1])
    with pytest.raises(EstimateError, match="4 of 8 group labels are missing"):
        input_dependence(lens, task, groups=[1, None, None, 2])


def test_states_that_say_nothing_are_refused() -> None:
    states = draw(6, 2, 4)
    holes = states.copy()
    holes[3, 1] = np.nan
    with pytest.raises(il.InputError, match=r"1 of 6 inputs lack steps \(all nan\) and no mask"):
        Dependence.of(holes)
    with pytest.raises(il.InputError, match=r"cannot be read as one array .* pass mask="):
        Dependence.of([states[0], states[1][:1], states[2]])
    holes[3, 1, 1:] = 0.0
    with pytest.raises(il.InputError, match=r"nan or infinite \(the first is input 3, step 1\)"):
        Dependence.of(holes)
    with pytest.raises(il.InputError, match=r"shape \(6, 4\), expected \(input, step, dimension\)"):
        Dependence.of(states[:, 0])
    with pytest.raises(il.InputError, match=r"mask has the shape \(6,\)"):
        Dependence.of(states, mask=np.ones(6, dtype=bool))
    with pytest.raises(il.InputError, match="2 of 6 inputs have states, and 3 at one step"):
        Dependence.of(states, mask=np.arange(12).reshape(6, 2) < 4)
    with pytest.raises(il.InputError, match="5 labels came with 6 inputs"):
        Dependence.of(states, labels="aabbc")
    with pytest.raises(il.InputError, match=r"pairs name inputs outside of 0\.\.5"):
        Dependence.of(states, pairs=[[0, 6]])
    with pytest.raises(il.InputError, match="twins=True came without pairs"):
        Dependence.of(states, twins=True)
    with pytest.raises(EstimateError, match="there is 1 step, which follows no other"):
        Dependence.of(states[:, :1]).intra.adjacent()
    with pytest.raises(il.InputError, match="at step 0 no labels are known"):
        Dependence.of(states).retrieval(0)
    with pytest.raises(il.InputError, match="at step 0 no two inputs of different groups share"):
        Dependence.of(states, labels="abcdef").retrieval(0)
