"""Necessity: the do(Z) table finds what the organisms need, and nothing where nothing is needed."""

from dataclasses import dataclass, replace
from functools import cache
from typing import Any, ClassVar

import numpy as np
import planted
import pytest
import torch
from transformers.generation import LogitsProcessor, LogitsProcessorList

import imaginelens as il
from imaginelens.estimates import EstimateError
from imaginelens.hooks.metrics import accuracy
from imaginelens.hooks.states import States
from imaginelens.mediation import ControlError
from imaginelens.mediation.degeneration import loops, ran_on, repeats, written
from imaginelens.mediation.edit_effects import EditEffect
from imaginelens.mediation.folds import Reference, Rows, Within, joined, reach, two_folds
from imaginelens.mediation.manifold import Manifold
from imaginelens.mediation.necessity import BANK, check

EDITS = [il.Mean(), il.Noise(), il.Zero(), il.Resample()]
D = 4


@cache
def organism(name: str, dtype: torch.dtype = torch.float32) -> il.Organism:
    return il.load(name, dtype=dtype)


@cache
def table_of(name: str, n: int = 32) -> il.Necessity:
    lens = organism(name)
    return il.necessity(lens, lens.task(n=n, seed=0), edits=EDITS)


def close(found: Any, wanted: Any, tol: float = 1e-9) -> bool:
    return np.allclose(np.asarray(found), np.asarray(wanted), atol=tol, rtol=0, equal_nan=True)


# ---- what it finds -------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["latent-content", "latent-pointer"])
def test_organisms_that_use_their_latents_need_them(name: str) -> None:
    table = table_of(name)
    for row in table:
        if not row.control:
            assert row.change.value <= -0.5
            assert row.verdict(margin=0.05) == "effect"
            assert row.flips >= 0.5
            assert row.text_changed >= row.flips
        assert (row.cells, row.expected, row.parse_coverage) == (64, 64, 1.0)
        assert (row.repeating, row.ran_on, row.not_emitted, row.beyond) == (0, 0, 0, 0)


@pytest.mark.parametrize("name", ["latent-ignored", "latent-ignored-aligned"])
def test_organisms_that_ignore_their_latents_do_not(name: str) -> None:
    table = table_of(name)
    for row in table:
        assert abs(row.change.value) <= 0.02
        assert row.verdict(margin=0.05) != "effect"
        assert row.cells == row.expected == 64
        assert row.control or row.relative_change > 0.1  # the states did change
    assert "no text and no answer changed where states did: Mean() fired in" in table.notes[0]


def test_enough_examples_show_that_nothing_is_needed() -> None:
    lens = organism("latent-ignored")
    table = il.necessity(lens, lens.task(n=256, seed=1), edits=[il.Noise()], batch_size=128)
    assert table["Noise()"].verdict(margin=0.05) in ("equivalent", "both")
    assert "none beyond the margin of 0.05" in table.describe(margin=0.05)


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["latent-content", "latent-pointer", "latent-ignored", "latent-ignored-aligned"]
)
def test_verdicts_on_organisms_over_twenty_samples(name: str) -> None:
    right = ("equivalent", "both") if "ignored" in name else ("effect",)
    lens, found = organism(name), []
    for seed in range(20):
        table = il.necessity(lens, lens.task(n=256, seed=seed), edits=EDITS, batch_size=128)
        found += [row.verdict(margin=0.05) in right for row in table if not row.control]
    assert len(found) == 80
    assert np.mean(found) >= 0.95


def test_the_sham_is_exactly_nothing() -> None:
    for name in ("latent-content", "latent-ignored"):
        sham = table_of(name).sham
        assert np.array_equal(sham.before, sham.after)
        assert (sham.change.value, sham.flips, sham.text_changed) == (0.0, 0.0, 0.0)
        assert (sham.relative_change, sham.norm_ratio) == (0.0, 1.0)
        assert sham.off_manifold == pytest.approx(1.0, abs=0.02)


def test_the_contract_line_runs_and_the_whole_bank_is_the_default() -> None:
    lens = organism("latent-content")
    task = lens.task(n=8, seed=0)
    necessity = il.necessity(lens, task, edits=[il.Constant(), il.AddNoise(0.3), il.Noise(), il.Zero(), il.Sham()], metric=il.accuracy)  # noqa: E501  # fmt: skip
    names = ["Constant()", "AddNoise(0.3)", "Noise()", "Zero()", "Sham()"]
    assert [row.name for row in necessity] == names
    bank = il.necessity(lens, task)
    assert len(bank) == len(BANK) + 1
    assert close(bank["Zero()"].after, necessity["il.Zero()"].after)


# ---- against the known mechanism -----------------------------------------------------------


XS20 = tuple(2.0 + i for i in range(20))
XS = tuple(float(x) for x in np.linspace(-1, 0.5, 12))


@cache
def chain() -> planted.Planted:
    p = planted.planted("chain", xs0=XS, xs1=[1.0 + x for x in range(12)])
    return replace(p, pairs=replace(p.pairs, groups=range(12)))


def log_prob_a(y: np.ndarray) -> np.ndarray:
    """The log probability of "A" where logit(B) - logit(A) is y."""
    return -np.logaddexp(0, y)


def test_edits_have_their_exact_effects_with_references_from_the_other_half() -> None:
    p = chain()
    table = il.necessity(
        p.lens, p.pairs, edits=[il.Zero(), il.Mean(), il.Constant(), il.FirstRepeat()],
        metric=il.log_prob, seed=3,
    )  # fmt: skip
    z, folds = p.latents(p.x0), two_folds(range(12), seed=3)
    other = np.stack([z[folds != fold].mean(0) for fold in folds])
    wanted = {
        "Zero()": 0 * z,
        "Mean()": other,
        "Constant()": np.repeat(other.mean(1, keepdims=True), 3, axis=1),
        "FirstRepeat()": np.repeat(z[:, :1], 3, axis=1),
        "Sham()": z,
    }
    for name, latents in wanted.items():
        assert close(table[name].before, log_prob_a(p.y(p.x0, z)))
        assert close(table[name].after, log_prob_a(p.y(p.x0, latents)))
    effect = log_prob_a(p.y(p.x0, other)) - log_prob_a(p.y(p.x0, z))
    assert table["Mean()"].change.value == pytest.approx(effect.mean(), abs=1e-12)
    assert table["Mean()"].change.unit == "nats"
    assert table["Zero()"].norm_ratio == 0.0
    assert table["Zero()"].change.procedure == "cluster-robust t"


def test_latents_that_nobody_reads_have_exactly_no_effect() -> None:
    p = planted.planted("masked", xs0=XS, xs1=[1.0 + x for x in range(12)])
    table = il.necessity(p.lens, p.pairs, edits=EDITS, metric=il.log_prob)
    for row in table:
        assert not (row.after - row.before).any()
        assert row.verdict(margin=0.05) == "equivalent"


@pytest.mark.parametrize("context", ["free", "fixed"])
def test_draws_are_averaged_and_agree_with_ablate(context: Any) -> None:
    p = chain()
    reference = p.lens.run(p.pairs.source)
    edits = [il.Noise(reference, draws=2), il.AddNoise(0.5, reference, seed=4)]
    table = il.necessity(p.lens, p.pairs, edits=edits, metric=il.log_prob, context=context)
    for row, edit in zip(table, edits, strict=False):
        one = p.lens.ablate(
            p.pairs.base, edit, metric=il.log_prob, context=context, answers=["A"] * 12
        )
        assert close(row.after, one.after)
        assert close(row.before, one.before)
        assert row.draws == getattr(edit, "draws", 1)
        assert row.cells == row.expected == 36 * row.draws


# ---- laws ----------------------------------------------------------------------------------


def test_the_size_of_batches_changes_nothing() -> None:
    p = ragged()
    donor = torch.zeros(12, 3, p.lens.structure.d_model, dtype=torch.float64)
    donor[..., p.lens.model.registers["z"]] = torch.arange(72.0).reshape(12, 3, 2).cos()
    edits = [il.Noise(draws=2), il.Resample(), il.Shuffle(), il.Slerp(donor)]
    small, large = (
        il.necessity(p.lens, p.pairs, edits=edits, metric=il.log_prob, batch_size=size)
        for size in (4, 12)
    )
    for one, other in zip(small, large, strict=True):
        assert one.name == other.name
        assert close(one.before, other.before)
        assert close(one.after, other.after)
        assert one.answers == other.answers
        assert one.texts == other.texts
        for name in ("cells", "expected", "not_emitted", "identical", "text_changed", "flips"):
            assert getattr(one, name) == getattr(other, name)
        assert one.beyond == other.beyond
        for name in ("relative_change", "norm_ratio", "off_manifold"):
            assert close(getattr(one, name), getattr(other, name))
    assert small.provenance.inputs == large.provenance.inputs


@dataclass(frozen=True)
class Recording(il.Mean):
    """A mean that notes whose states it replaced, and whose it was fitted on."""

    seen: ClassVar[list[tuple[tuple[str, ...], tuple[str, ...]]]] = []

    def apply(self, act: Any, ctx: il.EditContext) -> Any:
        assert ctx.given is not None
        assert ctx.given.keys is not None
        self.seen.append((ctx.keys, ctx.given.keys))
        return super().apply(act, ctx)


def test_a_reference_never_holds_a_rows_own_group() -> None:
    p = planted.planted("chain", xs0=[x / 16 for x in range(-10, 10)], xs1=XS20)
    groups = [i % 10 for i in range(20)]
    group_of = dict(zip(p.lens.prompt(p.pairs.base).keys, groups, strict=True))
    Recording.seen.clear()
    il.necessity(p.lens, replace(p.pairs, groups=groups), edits=[Recording()], batch_size=4)
    served = set()
    for rows, reference in Recording.seen:
        assert not {group_of[key] for key in rows} & {group_of[key] for key in reference}
        assert len(reference) == 10
        served |= set(rows)
    assert served == set(group_of)


def test_equal_inputs_are_one_group_where_there_are_none() -> None:
    p = planted.planted("chain")
    parts = (p.pairs.base, p.pairs.source, p.pairs.base_answers, p.pairs.source_answers)
    twice = il.Pairs(*[[*part, *part] for part in parts])
    Recording.seen.clear()
    il.necessity(p.lens, twice, edits=[Recording()])
    assert Recording.seen
    assert all(not set(rows) & set(reference) for rows, reference in Recording.seen)


def test_folds_split_groups_into_halves() -> None:
    labels = [i // 3 for i in range(30)]
    folds = two_folds(labels, seed=1)
    assert np.array_equal(folds, np.repeat(folds[::3], 3))
    assert sorted(np.bincount(folds)) == [15, 15]
    assert not np.array_equal(folds, two_folds(labels, seed=2))
    assert np.array_equal(folds, two_folds(labels, seed=1))
    assert set(two_folds(["same"] * 4)) == {0}


def test_forwards_are_counted_and_the_model_is_left_as_it_was() -> None:
    p = chain()
    writing = p.lens.run(p.pairs.base).forwards
    read = il.necessity(p.lens, p.pairs, edits=[il.Zero()], context="fixed")
    assert read.forwards == 2 * (writing + 1 + 2)  # two halves: write, read, and read each edit
    wrote = il.necessity(p.lens, p.pairs, edits=[il.Zero()])
    assert wrote.forwards == 2 * (writing + 1 + 2 * (writing + 1))
    assert not p.lens.model._forward_pre_hooks
    assert not p.lens.registry.entries
    assert read.seconds > 0


# ---- who has no latents, or fewer -------------------------------------------------------------


def ragged(xs: tuple[float, ...] = XS) -> planted.Planted:
    """The chain, whose spans now end before a latent whose first number exceeds 0.3."""
    p = planted.planted("chain", xs0=xs, xs1=[2.0 + x for x in xs])
    at = p.lens.model.registers["z"].start
    spec = replace(p.lens.spec, fixed=False, criterion=lambda z: z[:, at] > 0.3)
    return replace(p, lens=il.LatentModel(p.lens.model, p.lens.tokenizer, spec))


def test_examples_with_fewer_latents_are_flagged_and_count_with_no_effect() -> None:
    p = ragged()
    emitted = np.array(p.lens.run(p.pairs.base).trigger.emitted)
    assert set(emitted) == {0, 2, 3}
    short = emitted < 3
    table = il.necessity(
        p.lens, p.pairs, edits=[il.Zero(), il.Mean()], at=il.latent[2], metric=il.log_prob,
        batch_size=6,
    )  # fmt: skip
    for row in table:
        assert row.not_emitted == short.sum()
        assert not (row.after - row.before)[short].any()
        assert row.cells == row.expected == (~short).sum()
    assert (table["Zero()"].after - table["Zero()"].before)[~short].all()
    assert table.reached == tuple(int(not s) for s in short)
    mean = (table["Zero()"].after - table["Zero()"].before)[~short].mean()
    told = f"{short.sum()} of 12 examples have no state at latent[2] without an edit"
    assert any(note.startswith(told) and f"Zero() {mean:+.3g}" in note for note in table.notes)


def test_all_latents_of_ragged_runs_are_replaced() -> None:
    p = ragged()
    edits = [il.Mean(), il.Noise(), il.Resample(), il.Shuffle()]
    table = il.necessity(p.lens, p.pairs, edits=edits, metric=il.log_prob)
    none = np.array(p.lens.run(p.pairs.base).trigger.emitted) == 0
    for row in table:
        assert row.cells == row.expected >= 3 * (~none).sum() - 4
        assert row.not_emitted == none.sum()
        assert not (row.after - row.before)[none].any()


def test_steps_that_no_reference_reached_take_the_last_that_was() -> None:
    p = ragged(tuple(float(x) for x in np.linspace(0.19, 0.29, 8)))
    assert set(p.lens.run(p.pairs.base).trigger.emitted) == {2}
    table = il.necessity(p.lens, p.pairs, edits=[il.AddNoise(99.0), il.Constant()])
    noisy, constant = table["AddNoise"], table["Constant"]
    assert noisy.cells == noisy.expected
    assert noisy.beyond > 0  # strange latents let the model go on
    assert any(f"{noisy.beyond} of {noisy.cells} states stand at" in note for note in table.notes)
    assert constant.beyond == 0


def states(*counts: int) -> States:
    values = torch.arange(len(counts) * 3 * D, dtype=torch.float64).reshape(-1, 3, D)
    mask = torch.arange(3) < torch.tensor(counts)[:, None]
    return States(values * mask[..., None], mask, tuple(f"k{i}" for i in range(len(counts))))


def context(given: States, ordinals: list[int]) -> il.EditContext:
    n = len(ordinals)
    return il.EditContext(
        site="hook_latent",
        rows=np.arange(n),
        positions=np.arange(n),
        ordinals=np.array(ordinals),
        steps=np.array(ordinals),
        given=given,
        keys=tuple(f"row{i}" for i in range(n)),
    )


def test_within_serves_steps_that_the_reference_has_not() -> None:
    given = states(3, 2, 2, 1)  # two examples have step 1, one has step 2
    assert (reach(given), reach(states(1, 0))) == (1, -1)
    act = torch.zeros(4, D, dtype=torch.float64)
    ctx = context(given, [0, 1, 2, 7])
    mean = Within(il.Mean(given)).apply(act, ctx)
    assert torch.equal(mean[0], given.pooled(0).mean(0))
    assert torch.equal(mean[1], given.pooled(1).mean(0))
    assert torch.equal(mean[2], mean[1])
    assert torch.equal(mean[3], mean[1])
    picked = Within(il.Resample(given)).apply(act, ctx)
    held = {tuple(given.values[i, 1].tolist()) for i in range(3)}
    assert {tuple(row) for row in picked[1:].tolist()} <= held
    inside = context(given, [0, 1])
    noise = il.Noise(given, seed=2)
    assert torch.equal(Within(noise).apply(act[:2], inside), noise.apply(act[:2], inside))
    alone = replace(ctx, keys=("row",) * 4, ordinals=np.array([1, 1, 2, 3]))
    drawn = Within(noise).apply(act, alone)
    assert torch.equal(drawn[0], drawn[1])  # the same example at the same step
    assert not torch.equal(drawn[2], drawn[3])  # steps beyond have draws of their own
    with pytest.raises(il.DonorError, match=r"Mean takes its statistics .* fewer than 2 of them"):
        Within(il.Mean(states(1, 0))).apply(act[:1], context(states(1, 0), [0]))


def test_a_wrong_landing_is_refused() -> None:
    p = chain()
    with pytest.raises(il.EditTouchedNothing, match=r"none of the 12 unedited .* latent\[5\] .* 3"):
        il.necessity(p.lens, p.pairs, edits=[il.Zero()], at=il.latent[5])
    silent = p.lens.run(p.pairs.source, latents=il.Skip())
    with pytest.raises(il.EditTouchedNothing, match=r"Swap\(\) touched no state .* its donor"):
        il.necessity(p.lens, p.pairs, edits=[il.Swap(silent)])
    with pytest.raises(il.EditTouchedNothing, match=r"FirstRepeat\(\) left every state .* as it"):
        il.necessity(p.lens, p.pairs, edits=[il.FirstRepeat()], at=il.latent[0])
    with pytest.raises(il.PositionError, match="counts from the end"):
        il.necessity(p.lens, p.pairs, edits=[il.Zero()], at=il.latent[-1])


def test_edits_of_the_bank_that_can_do_nothing_are_left_out() -> None:
    p = planted.planted("fully_mediated", xs0=XS, xs1=[1.0 + x for x in range(12)])
    table = il.necessity(p.lens, p.pairs)
    assert len(table) == len(BANK) + 1 - 2
    assert [note.split(" left")[0] for note in table.left_out] == [
        "not in the table: Shuffle()",
        "not in the table: FirstRepeat()",
    ]


def test_a_donor_lines_up_with_the_examples_whatever_the_batches() -> None:
    p = chain()
    donor, tokens = p.lens.run(p.pairs.source), p.lens.run(p.pairs.base).tokens
    table = il.necessity(p.lens, p.pairs, edits=[il.Swap(donor)], metric=il.log_prob, batch_size=5)
    assert close(table["Swap()"].after, log_prob_a(p.truth["y01"]))
    rows = Rows(donor, (3, 1), 12)
    assert torch.equal(rows.states("hook_latent", il.latent).values, donor.latents[[3, 1]])
    assert rows.tokens is not None
    assert rows.tokens.keys == (donor.tokens.keys[3], donor.tokens.keys[1])
    assert rows.tokens.text(1) == donor.tokens.text(1)
    assert len(Rows(donor.latents[:1], (3, 1), 12).states("hook_latent", il.latent)) == 1
    assert Rows(donor.latents, (3, 1), 12).tokens is None
    with pytest.raises(il.DonorError, match="the donor has 12 rows and there are 5 examples"):
        Rows(donor, (0,), 5).states("hook_latent", il.latent)
    assert Reference([donor]).tokens.keys == donor.tokens.keys
    assert len(tokens) == 12


def test_states_of_batches_are_joined() -> None:
    parts = [states(3, 1), States(torch.ones(1, 1, D, dtype=torch.float64), torch.ones(1, 1) > 0)]
    whole = joined(parts)
    assert whole.counts() == [3, 1, 1]
    assert torch.equal(whole.values[:2], parts[0].values)
    assert whole.keys is None
    assert joined([parts[0], parts[0]]).keys == ("k0", "k1") * 2


# ---- degeneration --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("ids", "share"),
    [
        ([1, 2, 3] * 8, 1.0),
        ([1, 2, 3] * 7 + [1, 2], 1.0),  # the last copy is cut off
        ([9, 8, 7, 6] + [5] * 20, 20 / 24),
        (list(range(30)) + [1, 2] * 10, 20 / 50),
        (list(range(40)), 0.0),
        ([1, 2, 3, 4] * 2 + list(range(5, 40)), 0.0),  # twice is not a loop
        ([7] * 15, 0.0),  # too short to tell
        ([], 0.0),
        (list(range(10)) * 3 + list(range(50, 80)), 0.5),
    ],
)
def test_loops_are_found(ids: list[int], share: float) -> None:
    inside = loops(ids)
    assert len(inside) == len(ids)
    assert (inside.mean() if len(ids) else 0.0) == pytest.approx(share)


def test_random_text_has_no_loops_and_planted_ones_are_found() -> None:
    rng = np.random.default_rng(0)
    for _ in range(200):
        text = rng.integers(0, 200, size=rng.integers(0, 400)).tolist()
        assert not loops(text).any()
        piece = rng.integers(0, 200, size=rng.integers(6, 40)).tolist()
        planted_in = text[:100] + piece * 4 + text[100:]
        assert loops(planted_in)[len(text[:100]) :][: 4 * len(piece)].all()
        assert loops(planted_in).sum() <= 4 * len(piece) + 2  # a neighbour may happen to go on


def test_a_text_repeats_itself_by_half_or_to_its_end() -> None:
    normal, loop = list(range(100, 140)), [1, 2, 3, 4] * 5
    assert repeats([*normal[:20], *loop])
    assert not repeats([*normal, *loop])
    assert repeats([*normal, *loop], ran_on=True)
    assert not repeats([*loop, *normal], ran_on=True)
    assert not repeats([], ran_on=True)


class Only(LogitsProcessor):
    """Sampling control: nothing but these tokens, in turn."""

    def __init__(self, tokens: list[int]) -> None:
        self.tokens = tokens

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        scores = torch.full_like(scores, -torch.inf)
        scores[:, self.tokens[input_ids.shape[1] % len(self.tokens)]] = 0
        return scores


def test_a_generation_that_is_made_to_repeat_is_found() -> None:
    lens = organism("latent-content")
    task = lens.task(n=2, seed=0)
    made = LogitsProcessorList([Only(lens.encode("circle then square"))])
    run = lens.run(task.base, generation={"logits_processor": made}, max_new_tokens=40)
    ends = [lens.model.generation_config.eos_token_id]
    for row in range(2):
        assert len(written(run, row)) == 40
        assert ran_on(run, row, limit=40, ends=ends)
        assert repeats(written(run, row))
    usual = lens.run(task.base)
    for row in range(2):
        assert usual.trigger.emitted[row] == 2
        assert lens.spec is not None
        assert lens.span_tokens.pad not in written(usual, row)
        assert not ran_on(usual, row, limit=256, ends=ends)
        assert not repeats(written(usual, row))
    cut = lens.run(task.base, max_new_tokens=2)  # inside the span: the last latent is not read
    assert all(ran_on(cut, row, limit=2, ends=ends) for row in range(2))


@pytest.fixture
def stutterer() -> planted.Planted:
    """A model that writes B for ever once it has written one, and A once."""
    p = planted.planted("fully_mediated", xs0=(0.0, 0.1, -0.5, 0.2), xs1=(1.0, 2.0, 3.0, 4.0))
    b = p.lens.tokenizer.convert_tokens_to_ids("B")
    embed = p.lens.model.model.embed_tokens.weight
    with torch.no_grad():
        embed[b] = 0
        embed[b, p.lens.model.registers["y"]] = 1
    p.lens.model.generation_config.max_new_tokens = 40
    return p


def test_a_drop_by_degeneration_is_called_that(stutterer: planted.Planted) -> None:
    p = stutterer
    up = torch.zeros(p.lens.structure.d_model, dtype=torch.float64)
    up[p.lens.model.registers["z"]] = 3
    table = il.necessity(p.lens, p.pairs, edits=[il.Steer(up), il.Zero()])
    broken, fine = table["Steer"], table["Zero"]
    assert (broken.change.value, broken.repeating, broken.ran_on) == (-1.0, 1.0, 1.0)
    assert (broken.repeating_before, broken.ran_on_before) == (0.0, 0.0)
    assert (fine.change.value, fine.repeating, fine.ran_on) == (0.0, 0.0, 0.0)
    assert "Steer(): 100% of texts repeat themselves (0% unedited)" in table.notes[0]
    assert "(100% of its texts repeat themselves.)" in table.describe(margin=0.5)
    assert not fine.degenerates


# ---- off the manifold ----------------------------------------------------------------------


def cloud(n: int, seed: int, spread: float = 1.0) -> torch.Tensor:
    """Points of a narrow cone: far from zero, near to each other."""
    draw = np.random.default_rng(seed).normal(size=(n, 1, 8))
    return torch.tensor(10 + spread * draw)


def ratio(new: torch.Tensor, real: torch.Tensor) -> float:
    mask = torch.ones(len(real), 1, dtype=torch.bool)
    manifold = Manifold(States(real, mask), [f"real {i}" for i in range(len(real))])
    n = len(new)
    return float(np.median(manifold.distances(new[:, 0], np.zeros(n, dtype=int), ["new"] * n)))


def test_real_states_lie_near_real_ones_and_strange_ones_far() -> None:
    real = cloud(200, 0)
    assert ratio(cloud(200, 1), real) == pytest.approx(1, abs=0.15)
    assert ratio(0 * cloud(50, 1), real) > 10
    assert ratio(cloud(50, 1, spread=20), real) > 10
    assert ratio(real.mean(0, keepdim=True), real) < 1.5


def test_distances_are_counted_in_those_of_the_real_states() -> None:
    line = torch.tensor([0.0, 1.0, 2.0, 3.0, 50.0], dtype=torch.float64)[:, None, None]
    values = torch.cat([line, 10 * line], 1)
    mask = torch.tensor([[True, True]] * 4 + [[True, False]])
    manifold = Manifold(States(values, mask), ["a", "b", "c", "d", "d"])
    new = torch.tensor([[8.0], [3.0], [47.0], [36.0]], dtype=torch.float64)
    found = manifold.distances(new, np.array([0, 0, 0, 1]), ["x", "d", "x", "x"])
    assert found.tolist() == [5.0, 1.0, 3.0, 0.6]  # own group left out; step 1 has steps of 10
    assert np.isnan(manifold.distances(new[:1], np.array([2]), ["x"])).all()
    same = Manifold(States(0 * values, mask), ["a", "b", "c", "d", "d"])
    assert np.isnan(same.distances(new[:1], np.array([0]), ["x"])).all()
    alone = Manifold(States(values, mask), ["a"] * 5)
    assert np.isnan(alone.distances(new[:1], np.array([0]), ["x"])).all()


def test_edited_latents_are_compared_with_real_ones() -> None:
    table = table_of("latent-content")
    lens = organism("latent-content")
    far = il.necessity(lens, lens.task(n=32, seed=0), edits=[il.AddNoise(5.0)])["AddNoise"]
    assert table["Resample()"].off_manifold == pytest.approx(1, abs=0.15)
    assert table["Noise()"].off_manifold > table["Resample()"].off_manifold
    assert far.off_manifold > 4
    assert any("times as far from real ones" in note for note in far.notes())
    assert table["Zero()"].norm_ratio == 0.0
    assert far.norm_ratio > 2


@pytest.mark.parametrize("context", ["free", "fixed"])
def test_it_works_at_any_site(context: Any) -> None:
    p = chain()
    sites = ["hook_latent", "blocks.0.hook_resid_post"]
    table = il.necessity(
        p.lens, p.pairs, edits=[il.Mean(), il.Shuffle(), il.Swap(p.lens.run(
            p.pairs.source, names_filter=sites[1]))], metric=il.log_prob, context=context,
        site=sites, batch_size=6,
    )  # fmt: skip
    for row in table:
        assert row.cells == row.expected == 72
        assert np.isnan(row.off_manifold)
    folds, z = two_folds(range(12), seed=0), p.latents(p.x0)
    other = np.stack([z[folds != fold].mean(0) for fold in folds])
    assert close(table["Mean()"].after, log_prob_a(p.y(p.x0, other)))
    assert close(table["Swap()"].after, log_prob_a(p.truth["y01"]))
    assert np.isnan(table["Mean()"].text_changed) == (context == "fixed")
    assert np.isnan(table["Mean()"].repeating) == (context == "fixed")
    assert table.site == ", ".join(sites)


# ---- written imagination -------------------------------------------------------------------


def test_written_imagination_is_edited_as_text() -> None:
    lens = organism("text")
    task = lens.task(n=8, seed=0)
    table = il.necessity(lens, task, at=il.imagination)
    assert [row.name for row in table] == [
        "Delete()", "Truncate()", "Shuffle()", "Resample()", "Sham()"
    ]  # fmt: skip
    assert all(row.cells == row.expected == 8 for row in table)
    assert table["Resample()"].change.value <= -0.5
    assert np.isnan(table["Resample()"].off_manifold)
    assert table["Truncate()"].flips > 0.3
    assert table.site == "text"


@pytest.mark.parametrize("context", ["free", "fixed"])
def test_texts_line_up_with_the_examples_whatever_the_batches(context: Any) -> None:
    lens = organism("text")
    task = lens.task(n=4, seed=0)
    edits = [il.Swap(lens.run(task.source)), il.Rewrite([f"{a} x" for a in task.base_answers])]
    small, large = (
        il.necessity(lens, task, edits=edits, at=il.imagination, context=context, batch_size=size)
        for size in (1, 4)
    )
    for one, other in zip(small, large, strict=True):
        assert one.texts == other.texts
        assert close(one.after, other.after)
    with pytest.raises(il.InputError, match="Rewrite has 2 texts and there are 4 examples"):
        il.necessity(lens, task, edits=[il.Rewrite(["a", "b"])], at=il.imagination)


def test_a_text_edit_counts_the_text_around_it() -> None:
    lens = organism("text")
    task = lens.task(n=8, seed=0)
    table = il.necessity(lens, task, edits=[il.Rewrite("red red")], at=il.imagination)
    row = table["Rewrite('red red')"]
    assert row.texts != table.texts
    assert row.text_changed == row.flips  # around it there is but the answer


# ---- answers -------------------------------------------------------------------------------


def test_answers_that_are_not_found_are_missing_and_counted() -> None:
    def finder(text: str) -> str | None:
        return None if "square" in text else text.replace("<|im_end|>", "").strip()

    lens = il.load("latent-content", answer=finder)
    task = lens.task(n=16, seed=0)
    table = il.necessity(lens, task, edits=[il.Noise(), il.Noise(seed=1, draws=2)])
    squares = sum("square" in text for text in table.texts)
    row, drawn = table["Noise()"], table["Noise(seed=1, draws=2)"]
    assert 0 < squares < 16
    assert row.parse_coverage_before == 1 - squares / 16
    assert row.change.n + row.change.missing == 16
    assert row.change.missing >= squares
    assert drawn.change.missing >= row.change.missing  # missing in any draw
    assert 0 < drawn.parse_coverage < 1
    nothing = il.load("latent-content", answer=lambda text: None)
    with pytest.raises(il.InputError, match="no answer was found in what the 16 unedited runs"):
        il.necessity(nothing, task, edits=[il.Zero()])


def test_a_few_unread_answers_in_a_batch_of_one_are_no_error() -> None:
    lens = il.load("latent-content", answer=lambda t: None if "bar" in t else t[-20:-10])
    task = lens.task(n=4, seed=0)
    one, all_of_them = (
        il.necessity(lens, task, edits=[il.Zero()], metric=il.flip, batch_size=size)
        for size in (1, 4)
    )
    assert close(one["Zero"].after, all_of_them["Zero"].after)


# ---- what is claimed -----------------------------------------------------------------------


def effect(before: list[float], after: list[float], **fields: Any) -> EditEffect:
    return EditEffect(
        "Zero()", accuracy, np.array(before), np.array(after), None,
        answers=(None,) * len(before), texts=("",) * len(before), **fields,
    )  # fmt: skip


def test_the_procedure_follows_the_values() -> None:
    rng = np.random.default_rng(0)
    ones, zeros = np.ones(40), rng.integers(0, 2, 40).astype(float)
    same = effect(ones.tolist(), zeros.tolist()).change
    wanted = il.Estimate.paired(zeros, ones)
    assert same.procedure == "Tango score"
    assert (same.ci().low, same.ci().high) == (wanted.ci().low, wanted.ci().high)
    drawn = effect(ones.tolist(), (zeros / 2).tolist(), draws=2).change
    assert drawn.procedure == "t"
    # draws that all agree are still 0 or 1, and equal ones prove as little as one draw
    agreed = effect(ones.tolist(), ones.tolist(), draws=2)
    assert agreed.change.procedure == "Tango score"
    assert agreed.change.ci().high > 0.05
    nan = float("nan")
    few = effect([1, nan, nan], [0, 1, nan])
    with pytest.raises(EstimateError, match="1 of 3 examples has a value"):
        few.verdict(margin=0.05)


def test_groups_are_passed_on() -> None:
    p = chain()
    change = il.necessity(p.lens, p.pairs, edits=[il.Zero()])["Zero"].change
    assert change.groups == tuple(range(12))
    assert change.procedure == "cluster-adjusted Tango score"


def test_the_table_reads_well() -> None:
    table = table_of("latent-content")
    lines = repr(table).splitlines()
    assert lines[0] == (
        "Necessity of hook_latent at latent for accuracy: 32 examples, free context"
    )
    assert lines[1].split()[:4] == ["edit", "before", "after", "change"]
    assert len({len(line) for line in lines[1:7]}) == 1
    assert max(map(len, lines[:7])) <= 120
    assert "0 (control)" in lines[6]
    frame = table.to_dataframe().set_index("edit")
    assert frame.loc["Zero()", "change"] == table["Zero()"].change.value
    assert frame.loc["Zero()", "low"] == table["Zero()"].change.ci().low
    assert frame.loc["Sham()", "control"]
    sentences = table.describe(margin=0.05).splitlines()
    assert len(sentences) == len(table) == 5
    assert sentences[0].startswith("change of accuracy under Mean() is -0.")
    assert sentences[0].endswith("an effect.")
    assert sentences[-1] == "Sham(), the control, changed nothing, as it must."
    assert (table.n, table.seed, table.context) == (32, 0, "free")
    with pytest.raises(EstimateError, match="needs a margin"):
        table.describe()
    with pytest.raises(il.InputError, match=r"'Slerp' names 0 rows of this table; .* Mean\(\), "):
        table["Slerp"]


def test_a_table_without_answers_can_be_shown() -> None:
    nan = float("nan")
    row = effect([1, nan, 0], [nan, nan, nan], cells=3, expected=4, parse_coverage=0.0,
                 parse_coverage_before=2 / 3)  # fmt: skip
    table = replace(table_of("latent-content"), rows=(row, table_of("latent-content").sham))
    assert "too few answers" in repr(table)
    assert "nothing can be said of Zero(): 0 of 3 examples have a value" in table.describe(0.05)
    assert np.isnan(table.to_dataframe()["change"][0])
    notes = list(row.notes())
    assert "an answer was found in 0.0% of texts (66.7% unedited)" in notes[0]
    assert notes[1] == "Zero(): it touched 3 of 4 states"


def test_a_users_own_reference_that_holds_the_rows_is_named() -> None:
    p = chain()
    mine = il.Mean(p.lens.run(p.pairs.base[:3]))
    table = il.necessity(p.lens, p.pairs, edits=[mine, il.Mean()])
    assert (table["Mean()"].held, table["Mean() #2"].held) == (3, 0)
    assert any("its own reference holds 3 of the 12" in note for note in table.notes)


# ---- guards --------------------------------------------------------------------------------


def test_a_sham_that_moves_anything_stops_the_study() -> None:
    lens = organism("latent-content")
    task = lens.task(n=2, seed=0)
    rng = torch.Generator().manual_seed(0)

    def shake(act: torch.Tensor, hook: Any) -> torch.Tensor:
        return act + 1e-3 * torch.randn(act.shape, generator=rng)

    with (
        lens.hooks([("blocks.0.hook_resid_post", shake)]),
        pytest.raises(ControlError, match=r"moved the outcome of 2 of 2 examples"),
    ):
        il.necessity(lens, task, edits=[il.Zero()], metric=il.log_prob)
    assert not lens.registry.entries
    assert issubclass(ControlError, il.ImagineLensError)


def test_what_cannot_be_run_is_refused_in_a_sentence() -> None:
    lens = organism("latent-content")
    task = lens.task(n=4, seed=0)
    unknown = replace(task, source_answers=[None] * 4)
    with pytest.raises(il.InputError, match="edits is empty; name some"):
        il.necessity(lens, task, edits=[])
    with pytest.raises(il.InputError, match="example 0 has no source answer"):
        il.necessity(lens, unknown, metric=il.logit_diff)
    with pytest.raises(il.InputError, match="batch_size is 0"):
        il.necessity(lens, task, batch_size=0)
    with pytest.raises(EstimateError, match="too few groups to tell"):
        il.necessity(lens, replace(task, groups=[0, 1, 2, 3]))
    with pytest.raises(EstimateError, match="needs 2"):
        il.necessity(lens, task[:1], edits=[il.Zero()])
    alike = il.Pairs([task.base[0]] * 3, task.source[:3], task.base_answers[:1] * 3, [None] * 3)
    with pytest.raises(il.InputError, match=r"Mean take their statistics .* 3 examples in 1 group"):
        il.necessity(lens, alike, edits=[il.Mean(), il.Zero()])
    good = (task, None, il.accuracy, il.latent, "free", 1)
    check(*good)  # the tests' type checks come before these
    for place, value, said in (
        (0, [1], "pairs is a list, expected il.Pairs"),
        (1, il.Zero(), r"edits is Zero\(\), expected a list"),
        (1, [il.Zero], "expected something like il.Zero"),
        (2, "accuracy", "metric is 'accuracy'"),
        (3, "latent", "at is 'latent'"),
        (4, "loose", "choose 'free' or 'fixed'"),
    ):
        given = [*good[:place], value, *good[place + 1 :]]
        with pytest.raises(il.InputError, match=said):
            check(*given)
