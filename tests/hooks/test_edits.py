"""Edits: closed forms, purity and private randomness; and the proof that they landed in a run."""

import dataclasses
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from jaxtyping import Float
from transformers import LogitsProcessor

import imaginelens as il
from imaginelens.hooks.entries import EditEntry
from imaginelens.hooks.landing import Landing
from imaginelens.hooks.states import States

SPEC = il.LatentSpec(
    name="test", open="<|latent_start|>", close="<|latent_end|>", pad="<|latent_pad|>", max_steps=3
)
THREE = il.Force(3, at=1)
ROWS, STEPS, D = 4, 3, 8


def gaussian(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


REFERENCE = gaussian(ROWS, STEPS, D, seed=1) * torch.arange(1, D + 1) + 5
DIRECTIONS = gaussian(2, D, seed=2)
ACT = gaussian(ROWS * STEPS, D, seed=3)


def context(act: torch.Tensor = ACT, given: Any = None, **changes: Any) -> il.EditContext:
    """Cells row by row: row 0 step 0, row 0 step 1, ..."""
    rows, ordinals = np.divmod(np.arange(len(act)), STEPS)
    states = given
    if isinstance(given, torch.Tensor):
        states = States(given, torch.ones(given.shape[:2], dtype=torch.bool))
    fields = dict(
        site="hook_latent",
        rows=rows,
        positions=ordinals + 10,
        ordinals=ordinals,
        steps=ordinals,
        given=states,
        first=act.reshape(-1, STEPS, *act.shape[1:])[:, :1].expand(-1, STEPS, D).reshape(-1, D)
        if act.dim() == 2 and len(act) % STEPS == 0
        else None,
    )
    return il.EditContext(**(fields | changes))


def ragged(*counts: int) -> States:
    """The reference, with only so many steps in each example; nan where there is none."""
    mask = torch.arange(STEPS)[None] < torch.tensor(counts)[:, None]
    values = REFERENCE[: len(counts)].masked_fill(~mask[..., None], float("nan"))
    return States(values, mask)


EDITS: dict[str, il.Edit] = {
    "Zero": il.Zero(),
    "Mean": il.Mean(REFERENCE),
    "Constant": il.Constant(reference=REFERENCE),
    "Constant value": il.Constant(torch.ones(D, dtype=torch.float64)),
    "Replace": il.Replace(torch.ones(D, dtype=torch.float64)),
    "Swap": il.Swap(REFERENCE),
    "Resample": il.Resample(REFERENCE),
    "AddNoise": il.AddNoise(0.3, REFERENCE),
    "Noise": il.Noise(REFERENCE),
    "Steer": il.Steer(DIRECTIONS[0], 2.0),
    "Slerp": il.Slerp(REFERENCE, 0.3),
    "Shuffle": il.Shuffle(REFERENCE),
    "FirstRepeat": il.FirstRepeat(),
    "Project": il.Project(DIRECTIONS, reference=REFERENCE),
    "Sham": il.Sham(),
}
RANDOM = ("Resample", "AddNoise", "Noise", "Shuffle")


def apply(edit: il.Edit, act: torch.Tensor = ACT, **changes: Any) -> torch.Tensor:
    return edit.apply(act, context(act, **({"given": edit.given} | changes)))


# ---- laws of every edit ----------------------------------------------------------------------


@pytest.mark.parametrize("name", list(EDITS))
def test_an_edit_is_pure_and_frozen(name: str) -> None:
    edit, act, reference = EDITS[name], ACT.clone(), REFERENCE.clone()
    new = apply(edit, act)
    assert torch.equal(act, ACT)
    assert torch.equal(reference, REFERENCE)
    assert new.shape == act.shape
    assert new.dtype == act.dtype
    for held in (act, REFERENCE, *(v for v in vars(edit).values() if isinstance(v, torch.Tensor))):
        assert new.untyped_storage().data_ptr() != held.untyped_storage().data_ptr()
    with pytest.raises(dataclasses.FrozenInstanceError):
        edit.anything = 1  # type: ignore[attr-defined]


@pytest.mark.parametrize("name", list(EDITS))
def test_an_edit_keeps_dtype_and_takes_states_with_heads(name: str) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        edit = EDITS[name]
        for field in ("value", "direction", "directions"):  # nothing is cast behind one's back
            if isinstance(value := getattr(edit, field, None), torch.Tensor):
                with pytest.raises(
                    il.DonorError, match=r"float64 on cpu cannot go into .* in torch"
                ):
                    apply(edit, ACT.to(dtype))
                edit = dataclasses.replace(edit, **{field: value.to(dtype)})
        new = apply(edit, ACT.to(dtype))
        assert new.dtype == dtype
        torch.testing.assert_close(new.double(), apply(EDITS[name]), rtol=0.1, atol=0.3)
    edit = EDITS[name]
    heads = gaussian(ROWS * STEPS, 2, D, seed=4)
    given = gaussian(ROWS, STEPS, 2, D, seed=5)
    changes = {} if edit.given is None else {"given": given}
    assert apply(edit, heads, first=heads, **changes).shape == heads.shape


@pytest.mark.parametrize("name", list(EDITS))
def test_cells_do_not_depend_on_the_other_cells_of_the_call(name: str) -> None:
    """Cell by cell, and in another order, as generation does it, gives what all at once gives."""
    edit, whole = EDITS[name], apply(EDITS[name])
    full = context(ACT, edit.given)
    for cells in ([7], [11, 2, 5]):
        some = dataclasses.replace(
            full, rows=full.rows[cells], positions=full.positions[cells],
            ordinals=full.ordinals[cells], steps=full.steps[cells], first=full.first[cells],
        )  # fmt: skip
        torch.testing.assert_close(edit.apply(ACT[cells], some), whole[cells], rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", RANDOM)
def test_random_edits_are_reproducible_private_and_vary_with_seed_draw_and_site(name: str) -> None:
    edit = EDITS[name]
    before = torch.get_rng_state()
    numpy_before = np.random.get_state()[1].copy()
    first = apply(edit)
    torch.manual_seed(123)
    again = apply(edit)
    torch.set_rng_state(before)
    apply(edit)
    assert torch.equal(torch.get_rng_state(), before)
    assert np.array_equal(np.random.get_state()[1], numpy_before)
    assert torch.equal(first, again)
    seeds = [apply(dataclasses.replace(edit, seed=s)) for s in range(4)]
    draws = [apply(edit, draw=d) for d in range(4)]
    sites = [apply(edit, site=f"blocks.{i}.hook_resid_post") for i in range(4)]
    for variants in (seeds, draws):
        assert any(not torch.equal(v, variants[0]) for v in variants[1:])
    vary = any(not torch.equal(v, sites[0]) for v in sites[1:])
    # one donor and one order of the steps for all sites of an example, but noise of its own
    assert vary == (name in ("AddNoise", "Noise"))


@pytest.mark.parametrize("name", ["Mean", "Constant", "AddNoise", "Noise", "Resample"])
def test_statistics_come_from_the_reference_only(name: str) -> None:
    edit = EDITS[name]
    other = ACT * 3 + 1
    change = apply(edit, other) - apply(edit, ACT)
    wanted = other - ACT if name == "AddNoise" else torch.zeros_like(ACT)
    torch.testing.assert_close(change, wanted, rtol=0, atol=1e-12)
    moved = apply(edit, ACT, given=REFERENCE * 2 + 1)
    assert not torch.allclose(moved, apply(edit, ACT))  # and the reference matters


@pytest.mark.parametrize("name", ["Mean", "Constant", "AddNoise", "Noise", "Resample", "Project"])
def test_fit_fills_in_a_missing_reference_and_keeps_a_given_one(name: str) -> None:
    given = EDITS[name]
    bare = dataclasses.replace(given, reference=None)
    assert bare.given is None
    assert bare.fit(REFERENCE).given is REFERENCE
    assert given.fit(ACT.reshape(ROWS, STEPS, D)).given is REFERENCE


@pytest.mark.parametrize(
    ("edit", "keyword"),
    [
        (il.Mean(), "reference"), (il.Constant(), "reference"), (il.AddNoise(1.0), "reference"),
        (il.Noise(), "reference"), (il.Resample(), "reference"), (il.Shuffle(), "run"),
    ],
    ids=lambda value: getattr(value, "__class__", type(value)).__name__,
)  # fmt: skip
def test_a_missing_reference_is_asked_for_by_its_name(edit: il.Edit, keyword: str) -> None:
    with pytest.raises(il.DonorError) as error:
        apply(edit)
    message = str(error.value)
    assert type(edit).__name__ in message
    assert f"{keyword}=lens.run(" in message  # the advice can be typed as it stands
    dataclasses.replace(edit, **{keyword: REFERENCE})


# ---- closed forms ----------------------------------------------------------------------------


def test_closed_forms_of_the_plain_edits() -> None:
    one = torch.full((D,), 3.0, dtype=torch.float64)
    assert torch.equal(apply(il.Zero()), torch.zeros_like(ACT))
    assert torch.equal(apply(il.Sham()), ACT)
    assert torch.equal(apply(il.Constant(one)), one.expand_as(ACT))
    assert torch.equal(apply(il.Replace(one)), one.expand_as(ACT))
    steps = ACT[:STEPS] * 2  # one state per ordinal, the same in every row
    assert torch.equal(apply(il.Replace(steps)), steps.repeat(ROWS, 1))
    assert torch.equal(apply(il.Steer(DIRECTIONS[0], 2.0)), ACT + 2 * DIRECTIONS[0])
    firsts = ACT.reshape(ROWS, STEPS, D)[:, 0].repeat_interleave(STEPS, 0)
    assert torch.equal(apply(il.FirstRepeat()), firsts)
    assert torch.equal(apply(il.Swap(REFERENCE)), REFERENCE.reshape(-1, D))
    lone = apply(il.Swap(REFERENCE[2:3]))  # one donor row serves every row
    assert torch.equal(lone, REFERENCE[2].repeat(ROWS, 1))


def test_mean_and_constant_count_only_the_steps_there_are() -> None:
    states = ragged(3, 1, 2, 1)
    mean = apply(il.Mean(), given=states).reshape(ROWS, STEPS, D)
    wanted = torch.stack([REFERENCE[:, 0].mean(0), REFERENCE[[0, 2], 1].mean(0), REFERENCE[0, 2]])
    torch.testing.assert_close(mean, wanted.expand_as(mean), rtol=0, atol=1e-12)
    grand = torch.cat([REFERENCE[0], REFERENCE[1, :1], REFERENCE[2, :2], REFERENCE[3, :1]]).mean(0)
    found = apply(il.Constant(), given=states)
    torch.testing.assert_close(found, grand.expand_as(found), rtol=0, atol=1e-12)
    short = States(REFERENCE[:, :2], torch.ones(ROWS, 2, dtype=torch.bool))
    with pytest.raises(il.DonorError, match=r"no state number 2 .*have 2; use a reference"):
        apply(il.Mean(), given=short)


def is_standard_normal(x: Float[torch.Tensor, "cell d"]) -> bool:
    """Mean, variance and fourth moment of every dimension, and neighbours uncorrelated: all within
    five standard errors."""
    n = len(x)
    mean, var, fourth = x.mean(0), x.var(0), (x**4).mean(0)
    step, side = (x[1:] * x[:-1]).mean(0), (x[:, 1:] * x[:, :-1]).mean(0)
    bounds = ((mean, 1), (var - 1, 2**0.5), (fourth - 3, 96**0.5), (step, 1), (side, 1))
    return all(bool((moment.abs() < 5 * spread / n**0.5).all()) for moment, spread in bounds)


def noise_of(edit: il.Edit, act: torch.Tensor, site: str = "hook_latent") -> torch.Tensor:
    """What an edit drew, freed from the reference's mean and spread, step by step."""
    rows, ordinals = np.divmod(np.arange(len(act)), STEPS)
    new = edit.apply(act, context(act, REFERENCE, rows=rows, ordinals=ordinals, site=site))
    std = REFERENCE.std(0)[ordinals]
    mean = REFERENCE.mean(0)[ordinals]
    return (new - act) / (0.3 * std) if isinstance(edit, il.AddNoise) else (new - mean) / std


@pytest.mark.parametrize("edit", [il.AddNoise(0.3), il.Noise()], ids=["AddNoise", "Noise"])
def test_noise_has_the_references_moments_in_every_dimension(edit: il.Edit) -> None:
    act = gaussian(3000, D, seed=6) * 7
    assert is_standard_normal(noise_of(edit, act))


def test_the_normality_check_can_fail() -> None:
    good = gaussian(3000, D, seed=7)
    assert is_standard_normal(good)
    repeated = good.repeat_interleave(2, 0)[:3000]
    for bad in (good * 1.1, good + 0.2, good.sign(), repeated, good[:, :1].expand_as(good)):
        assert not is_standard_normal(bad)


def test_a_spread_needs_two_examples() -> None:
    for edit in (il.AddNoise(0.3), il.Noise()):
        with pytest.raises(il.DonorError, match="the reference has 1 example"):
            apply(edit, given=REFERENCE[:1])


# ---- resample, shuffle -----------------------------------------------------------------------


def test_resample_gives_whole_other_examples_each_equally_often() -> None:
    picked = np.zeros((ROWS, ROWS), dtype=int)
    for seed in range(300):
        new = apply(il.Resample(REFERENCE, seed=seed)).reshape(ROWS, STEPS, D)
        for row in range(ROWS):
            (source,) = [i for i in range(ROWS) if torch.equal(new[row], REFERENCE[i])]
            picked[row, source] += 1
    assert (np.diag(picked) == 0).all()
    others = picked[~np.eye(ROWS, dtype=bool)]
    assert (np.abs(others - 100) < 5 * (300 * 1 / 3 * 2 / 3) ** 0.5).all()


def test_resample_skips_examples_that_stopped_earlier() -> None:
    for seed in range(20):
        new = apply(il.Resample(seed=seed), given=ragged(3, 1, 3, 1)).reshape(ROWS, STEPS, D)
        assert torch.equal(new[0, 2], REFERENCE[2, 2])
        assert torch.equal(new[2, 2], REFERENCE[0, 2])
        assert torch.isfinite(new).all()


@pytest.mark.parametrize("given", [ragged(3), ragged(3, 1, 1, 2)], ids=["alone", "only_one_so_far"])
def test_resample_refuses_where_only_the_rows_own_example_could_be_picked(given: States) -> None:
    act = ACT[:STEPS]  # row 0
    with pytest.raises(il.DonorError, match="example"):
        il.Resample().apply(act, context(act, given))


@pytest.mark.parametrize("n", [2, 3, 5])
def test_shuffle_permutes_and_leaves_no_step_in_place(n: int) -> None:
    run = gaussian(6, n, D, seed=8)
    orders = set()
    for seed in range(40):
        rows, ordinals = np.divmod(np.arange(6 * n), n)
        act = gaussian(6 * n, D, seed=9)  # what the current run holds does not matter
        new = il.Shuffle(run, seed=seed).apply(
            act, context(act, run, rows=rows, ordinals=ordinals, steps=ordinals, first=act)
        )
        for row, steps in enumerate(new.reshape(6, n, D)):
            order = [int(torch.nonzero((run[row] == z).all(1))[0, 0]) for z in steps]
            assert sorted(order) == list(range(n))
            assert all(k != source for k, source in enumerate(order))
            orders.add(tuple(order))
    assert len(orders) == {2: 1, 3: 2, 5: 24}[n]  # all cycles come up


def test_shuffle_refuses_a_run_that_does_not_fit() -> None:
    act, rows = ACT, np.repeat(np.arange(ROWS), STEPS)
    short = States(REFERENCE[:, :2], torch.ones(ROWS, 2, dtype=torch.bool))
    with pytest.raises(il.DonorError, match="2"):
        il.Shuffle().apply(act, context(act, short))
    with pytest.raises(il.DonorError, match="2"):
        il.Shuffle().apply(act, context(act, REFERENCE[:2], rows=rows))


# ---- geometry --------------------------------------------------------------------------------


def projector(directions: torch.Tensor) -> torch.Tensor:
    return torch.linalg.pinv(directions) @ directions


def test_project_removes_exactly_the_subspace() -> None:
    p = projector(DIRECTIONS)
    removed, kept = apply(il.Project(DIRECTIONS)), apply(il.Project(DIRECTIONS, keep=True))
    torch.testing.assert_close(removed, ACT - ACT @ p, rtol=0, atol=1e-12)
    torch.testing.assert_close(kept, ACT @ p, rtol=0, atol=1e-12)
    torch.testing.assert_close(removed + kept, ACT, rtol=0, atol=1e-12)
    torch.testing.assert_close(removed @ DIRECTIONS.T, torch.zeros(len(ACT), 2).double())
    twice = apply(il.Project(DIRECTIONS), removed)
    torch.testing.assert_close(twice, removed, rtol=0, atol=1e-12)
    single = apply(il.Project(DIRECTIONS[0] * -3))
    torch.testing.assert_close(single, ACT - ACT @ projector(DIRECTIONS[:1]), rtol=0, atol=1e-12)


def test_project_relative_to_the_references_mean() -> None:
    p, mean = projector(DIRECTIONS), REFERENCE.mean(0).repeat(ROWS, 1)
    removed = apply(il.Project(DIRECTIONS, reference=REFERENCE))
    kept = apply(il.Project(DIRECTIONS, keep=True, reference=REFERENCE))
    torch.testing.assert_close(removed, ACT - (ACT - mean) @ p, rtol=0, atol=1e-11)
    torch.testing.assert_close(kept, mean + (ACT - mean) @ p, rtol=0, atol=1e-11)
    again = apply(il.Project(DIRECTIONS, reference=REFERENCE), removed)
    torch.testing.assert_close(again, removed, rtol=0, atol=1e-11)


@pytest.mark.parametrize(
    "directions",
    [
        torch.stack([DIRECTIONS[0], DIRECTIONS[0]]),
        torch.stack([DIRECTIONS[0], torch.zeros(D, dtype=torch.float64)]),
        torch.stack([DIRECTIONS[0], DIRECTIONS[1], DIRECTIONS.sum(0)]),
    ],
    ids=["twice", "with_zero", "with_sum"],
)
def test_project_removes_no_more_than_the_span_of_dependent_directions(
    directions: torch.Tensor,
) -> None:
    wanted = ACT - ACT @ projector(directions)
    torch.testing.assert_close(apply(il.Project(directions)), wanted, rtol=0, atol=1e-12)


def test_project_is_exact_in_low_precision() -> None:
    """One rounding of the result is all that bfloat16 may cost."""
    act = (gaussian(ROWS * STEPS, D, seed=12) * 10).to(torch.bfloat16)
    directions = DIRECTIONS.to(torch.bfloat16)
    wanted = act.double() - act.double() @ projector(directions.double())
    found = apply(il.Project(directions), act).double()
    torch.testing.assert_close(found, wanted, rtol=2**-8, atol=1e-3)


@pytest.mark.parametrize("weight", [0.0, 0.25, 0.5, 1.0])
def test_slerp_turns_by_its_share_of_the_angle_and_interpolates_the_norm(weight: float) -> None:
    a, b = ACT, REFERENCE.reshape(-1, D)
    new = apply(il.Slerp(REFERENCE, weight))

    def angle(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        x, y = x / x.norm(dim=-1, keepdim=True), y / y.norm(dim=-1, keepdim=True)
        return 2 * torch.atan2((x - y).norm(dim=-1), (x + y).norm(dim=-1))

    whole = angle(a, b)
    norm = (1 - weight) * a.norm(dim=-1) + weight * b.norm(dim=-1)
    torch.testing.assert_close(new.norm(dim=-1), norm, rtol=0, atol=1e-10)
    torch.testing.assert_close(angle(a, new), weight * whole, rtol=0, atol=1e-7)
    torch.testing.assert_close(angle(new, b), (1 - weight) * whole, rtol=0, atol=1e-7)
    if weight in (0.0, 1.0):
        torch.testing.assert_close(new, b if weight else a, rtol=0, atol=1e-10)


def test_slerp_of_parallel_and_opposite_states() -> None:
    parallel = apply(il.Slerp((ACT * 3).reshape(ROWS, STEPS, D), 0.5))
    torch.testing.assert_close(parallel, ACT * 2, rtol=0, atol=1e-9)
    for weight in (0.25, 0.75):  # any half circle will do, but the length is known
        opposite = apply(il.Slerp((-ACT).reshape(ROWS, STEPS, D), weight))
        torch.testing.assert_close(opposite.norm(dim=-1), ACT.norm(dim=-1), rtol=0, atol=1e-6)


def test_slerp_in_low_precision_is_slerp_rounded() -> None:
    near = ACT + 0.02 * gaussian(*ACT.shape, seed=10)
    a, b = ACT.to(torch.bfloat16), near.to(torch.bfloat16).reshape(ROWS, STEPS, D)
    found = apply(il.Slerp(b, 0.5), a)
    wanted = apply(il.Slerp(b.double(), 0.5), a.double())
    torch.testing.assert_close(found.double(), wanted, rtol=2**-7, atol=2**-7)


def test_slerp_from_a_zero_state_is_finite_in_half_precision() -> None:
    new = apply(il.Slerp(REFERENCE, 0.5), torch.zeros_like(ACT).half())
    assert torch.isfinite(new).all()


def test_values_of_another_width_are_refused_by_number() -> None:
    for edit in (il.Constant(torch.ones(5)), il.Replace(torch.ones(5)), il.Steer(torch.ones(5)),
                 il.Project(torch.ones(2, 5))):  # fmt: skip
        with pytest.raises(il.DonorError, match=r"width 5 \(shape .*\) cannot go into .* width 8"):
            apply(edit)
    with pytest.raises(il.DonorError, match="2"):
        apply(il.Replace(torch.ones(2, D, dtype=torch.float64)))  # 12 cells, not 2


# ---- in a run --------------------------------------------------------------------------------


def lens_of(name: str = "qwen2_5_vl", dtype: torch.dtype = torch.float64) -> il.LatentModel:
    return il.LatentModel(*tiny.build(name, dtype=dtype), spec=SPEC)


def examples(name: str = "qwen2_5_vl", n: int = 1) -> list[dict[str, Any]]:
    texts = ("is a red cube here?", "where in this picture is the red cube?", "a red cube, no?")
    sizes = ((48, 32), (24, 40), (40, 40))
    return [
        {"images": tiny.image(*sizes[i], seed=i), "text": tiny.prompt(name, texts[i])}
        for i in range(n)
    ]


class Opens(LogitsProcessor):
    """Row i opens one span at step `at[i]` (None: never) and no other."""

    def __init__(self, lens: il.LatentModel, at: tuple[int | None, ...], width: int) -> None:
        self.at, self.width, self.open = at, width, lens.span_tokens.open
        self.banned = [self.open, lens.span_tokens.close, lens.span_tokens.pad,
                       lens.tokenizer.eos_token_id]  # fmt: skip

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        scores = scores.clone()
        scores[:, self.banned] = -1e9
        for row, at in enumerate(self.at):
            if at == input_ids.shape[1] - self.width:
                scores[row] = -1e9
                scores[row, self.open] = 0
        return scores


def opened(lens: il.LatentModel, given: Any, at: tuple[int | None, ...], **options: Any) -> il.Run:
    plan = Opens(lens, at, lens.prompt(given).inputs["input_ids"].shape[1])
    generation = {"logits_processor": [plan]}
    return lens.run(given, max_new_tokens=9, generation=generation, **options)


@pytest.mark.parametrize("name", ["qwen2_5_vl", "llava", "gemma3"])
def test_a_landing_tells_where_it_fired_and_by_how_much(name: str) -> None:
    lens, given = lens_of(name), examples(name, 2)
    plain = opened(lens, given, (1, 3))
    with lens.edit(il.Steer(torch.ones(64, dtype=torch.float64)), at=il.latent[:2]) as landing:
        changed = opened(lens, given, (1, 3))
    width = plain.tokens.prompt_width
    assert landing.rows == [0, 1]
    assert landing.positions == {0: [width + 2, width + 3], 1: [width + 4, width + 5]}
    assert landing.fired == 4  # the rows open two steps apart, so no forward serves both
    assert landing.flags == {}
    before = changed.latents[:, :2] - 1
    wanted = (8 / before.norm(dim=-1)).mean()
    assert landing.relative_change == pytest.approx(float(wanted), rel=1e-9)
    assert torch.allclose(before[:, 0], plain.latents[:, 0], rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("dtype", "rounding", "real"),
    [(torch.float64, 1e-15, 1e-12), (torch.float32, 3e-7, 1e-4), (torch.bfloat16, 0.0, 0.01)],
)
def test_a_donor_that_differs_by_rounding_is_identical(
    dtype: torch.dtype, rounding: float, real: float
) -> None:
    """Processors round the same state otherwise in forwards of other shapes; a user's own edit, be
    it that small, is one."""
    old = torch.ones(1, 64, dtype=dtype)
    for donated, size, flags in (
        (True, rounding, {0: "identical_donor"}),
        (True, real, {}),
        (False, real, {}),
        (False, rounding, {} if rounding else {0: "identical_donor"}),
    ):
        landing = Landing("Swap", "latent", ("hook_latent",))
        where = np.array([0]), np.array([3])
        landing.record("hook_latent", *where, old, old + size, object(), donated=donated)
        if flags:
            with pytest.raises(il.EditTouchedNothing, match="as they were"):
                landing.judge(1, may_be_identical=False, seen="")
        else:
            landing.judge(1, may_be_identical=False, seen="")
        assert landing.flags == flags


def test_fired_counts_forwards_not_sites() -> None:
    lens, given = lens_of(), examples()[0]
    sites = ["blocks.0.hook_resid_post", "blocks.1.hook_resid_post"]
    with lens.edit(il.Zero(), at=il.last_prompt, site=sites) as landing:
        lens.run_with_hooks(given)
    assert sorted(site for _, _, site, _ in landing.cells) == sites
    assert landing.fired == 1  # "in how many forwards it touched at least one cell"


def test_rows_that_emitted_nothing_and_rows_with_their_own_donor_are_flagged() -> None:
    lens, given = lens_of(), examples(n=3)
    base = opened(lens, given, (1, None, 1))
    other = opened(lens, [given[1], given[1], given[2]], (1, 1, 1))
    with lens.edit(il.Swap(other), at=il.latent) as landing:
        changed = opened(lens, given, (1, None, 1))
    assert landing.flags == {1: "not_emitted", 2: "identical_donor"}
    assert landing.rows == [0, 2]
    torch.testing.assert_close(changed.latents[0], other.latents[0], rtol=0, atol=0)
    torch.testing.assert_close(changed.latents[2], base.latents[2], rtol=0, atol=1e-12)


def test_a_donor_row_that_emitted_nothing_is_flagged_and_left_alone() -> None:
    lens, given = lens_of(), examples(n=2)
    base = opened(lens, given, (1, 1))
    donor = opened(lens, given[::-1], (1, None))
    with lens.edit(il.Swap(donor), at=il.latent) as landing:
        changed = opened(lens, given, (1, 1))
    assert landing.flags == {1: "not_emitted"}
    assert landing.rows == [0]
    assert torch.equal(changed.latents[1], base.latents[1])
    assert torch.equal(changed.latents[0], donor.latents[0])
    silent = opened(lens, given, (None, None))
    with lens.edit(il.Swap(silent), at=il.latent):
        with pytest.raises(il.EditTouchedNothing, match="donor") as error:
            opened(lens, given, (1, 1))
    assert "\n" not in str(error.value)


def test_an_edit_that_did_nothing_is_refused_in_each_of_three_cases() -> None:
    lens, given = lens_of(), examples(n=2)
    with pytest.raises(il.EditTouchedNothing, match=r"no position in 2 rows.*0 of 2 examples"):
        with lens.edit(il.Zero(), at=il.latent):  # no row fired: nothing was fed back
            opened(lens, given, (None, None))
    with pytest.raises(il.EditTouchedNothing, match="touched no position in 1 row: "):
        with lens.edit(il.Zero(), at=il.text.find("zebra"), site="blocks.1.hook_resid_post"):
            opened(lens, given[0], (1,))  # it has latents, but nothing of what was selected
    base = opened(lens, given, (1, 1))
    with pytest.raises(il.EditTouchedNothing, match="left all 2 touched rows bit for bit"):
        with lens.edit(il.Swap(base), at=il.latent):  # fired and touched, and changed no bit
            opened(lens, given, (1, 1))
    assert lens.registry.entries == []


def test_a_prompt_alone_is_refused_where_latents_are_edited() -> None:
    lens, given = lens_of(), examples()[0]
    with pytest.raises(il.EditTouchedNothing, match="a prompt alone holds no latents"):
        with lens.edit(il.Zero(), at=il.latent, site="blocks.1.hook_resid_post"):
            lens.run_with_hooks(given)


def test_an_unchanged_output_is_a_result_and_a_sham_may_change_nothing() -> None:
    lens, given = lens_of(), examples()[0]
    plain = opened(lens, given, (1,))
    last = "blocks.2.hook_resid_post"  # nothing reads an image position behind the last layer
    with lens.edit(il.Zero(), at=il.image, site=last) as landing:
        same = opened(lens, given, (1,))
    assert torch.equal(same.sequences, plain.sequences)
    assert landing.relative_change == 1.0
    with lens.edit(il.Sham(), at=il.image, site=last) as landing:
        opened(lens, given, (1,))
    assert landing.relative_change == 0.0
    assert landing.flags == {}
    with pytest.raises(il.EditTouchedNothing, match=r"Sham at latent .* touched no position"):
        with lens.edit(il.Sham(), at=il.latent):  # but it has to fire
            opened(lens, given, (None,))


@pytest.mark.parametrize(
    ("site", "at"),
    [
        ("hook_latent", il.last_prompt), ("hook_latent", il.image),
        ("hook_embed", il.latent), ("hook_embed", il.image),
    ],
    ids=["latent@last_prompt", "latent@image", "embed@latent", "embed@image"],
)  # fmt: skip
def test_an_edit_whose_value_is_never_used_is_not_reported_as_landed(site: str, at: Any) -> None:
    """hook_latent outside the latents goes nowhere; hook_embed is overwritten at latents and
    images. A landing would be a false proof."""
    lens, given = lens_of(), examples()[0]
    run = opened(lens, given, (1,))
    with torch.no_grad():
        plain = lens.run_with_hooks(run)
        try:
            with lens.edit(il.Steer(torch.ones(64).double()), at=at, site=site) as landing:
                changed = lens.run_with_hooks(run)
        except (il.EditTouchedNothing, il.PositionError, il.SiteUnavailable):
            return
    assert landing.fired == 0 or not torch.equal(changed, plain)


def test_relative_change_from_a_zero_state_is_no_number_made_up() -> None:
    lens, given = lens_of(), examples()[0]
    with (
        lens.edit(il.Zero(), at=il.latent[0]),
        lens.edit(il.Steer(torch.ones(64).double()), at=il.latent[0]) as landing,
    ):
        opened(lens, given, (1,))
    assert not 1e3 < landing.relative_change < float("inf")  # inf or nan says it, 8e300 does not


class Whisper(il.Edit):
    """Changes a state by less than the model's dtype can hold."""

    def apply(self, act: torch.Tensor, ctx: il.EditContext) -> torch.Tensor:
        return act.double() + 1e-12


def test_a_change_lost_in_rounding_is_no_change() -> None:
    lens, given = lens_of(dtype=torch.float32), examples()[0]
    with pytest.raises(il.EditTouchedNothing, match="bit for bit"):
        with lens.edit(Whisper(), at=il.last_prompt, site="blocks.1.hook_resid_post"):
            lens.run_with_hooks(given)


@pytest.mark.parametrize("site", ["hook_latent", "blocks.1.hook_resid_post"])
def test_two_edits_on_one_cell_compose_in_the_order_of_registration(site: str) -> None:
    lens, given = lens_of(), examples()[0]
    run, d = opened(lens, given, (1,)), torch.linspace(-1, 1, 64, dtype=torch.float64)

    def state(*edits: il.Edit) -> torch.Tensor:
        with torch.no_grad():
            for edit in edits:
                lens.registry.add(site, edit, at=il.latent[1])
            _, cache = lens.run_with_cache(run, names_filter=site, positions=[il.latent[1]])
            lens.reset_hooks()
        return cache[site][0, 0]

    steer, zero, double = il.Steer(d), il.Zero(), il.Project(d, keep=True)
    old = state()
    assert torch.equal(state(steer, zero), torch.zeros_like(d))
    assert torch.equal(state(zero, steer), d)
    torch.testing.assert_close(state(steer, steer), old + 2 * d, rtol=0, atol=1e-12)
    unit = d / d.norm()
    inside = (old @ unit) * unit
    torch.testing.assert_close(state(steer, double), inside + d, rtol=0, atol=1e-12)
    torch.testing.assert_close(state(double, steer), inside + d, rtol=0, atol=1e-12)
    assert lens.registry.entries == []


@pytest.mark.parametrize("name", ["qwen2_5_vl", "llava"])
def test_first_repeat_follows_the_run_it_is_in(name: str) -> None:
    lens, given = lens_of(name), examples(name, 2)
    plain = opened(lens, given, (1, 3))
    with lens.edit(il.FirstRepeat(), at=il.latent):
        for _ in range(2):  # nothing is remembered from one run to the next
            changed = opened(lens, given, (1, 3))
            for row in range(2):
                wanted = plain.latents[row, 0].expand(3, -1)
                torch.testing.assert_close(changed.latents[row], wanted, rtol=0, atol=1e-12)


def test_shuffle_reads_the_unedited_run() -> None:
    lens, given = lens_of(), examples(n=2)
    plain = opened(lens, given, (1, 3))
    with lens.edit(il.Shuffle(plain), at=il.latent):
        changed = opened(lens, given, (1, 3))
    for row in range(2):
        order = [
            int(torch.nonzero((plain.latents[row] == z).all(1))[0, 0]) for z in changed.latents[row]
        ]
        assert sorted(order) == [0, 1, 2]
        assert all(k != source for k, source in enumerate(order))


def test_a_tensor_of_all_touched_cells_replaces_them_while_generating() -> None:
    lens, given = lens_of(), examples()[0]
    run, value = opened(lens, given, (1,)), gaussian(3, 64, seed=11)
    with lens.edit(il.Replace(value), at=il.latent), torch.no_grad():
        _, cache = lens.run_with_cache(run, names_filter="hook_latent", positions=[il.latent])
    assert torch.equal(cache["hook_latent"][0], value)  # all at once, in one forward
    with lens.edit(il.Replace(value), at=il.latent):
        changed = opened(lens, given, (1,))
    assert torch.equal(changed.latents[0], value)  # and step by step


@pytest.mark.parametrize("name", RANDOM)
def test_a_random_edit_gives_an_example_in_a_batch_what_it_gives_it_alone(name: str) -> None:
    lens, given = lens_of(), examples(n=3)
    reference = opened(lens, given, (1, 1, 1))
    keyword = "run" if name == "Shuffle" else "reference"
    edit = dataclasses.replace(EDITS[name], **{keyword: reference})
    with lens.edit(edit, at=il.latent):
        batch = opened(lens, given, (1, 1, 1))
    alone = []
    for one in given:  # the shuffled run is the example's own
        own = dataclasses.replace(edit, run=opened(lens, one, (1,))) if keyword == "run" else edit
        with lens.edit(own, at=il.latent):
            alone.append(opened(lens, one, (1,)))
    for row in range(3):
        torch.testing.assert_close(alone[row].latents[0], batch.latents[row], rtol=0, atol=1e-9)


def test_resample_does_not_give_an_example_its_own_state_when_it_runs_alone() -> None:
    lens, given = lens_of(), examples(n=3)
    reference = opened(lens, given, (1, 1, 1))
    for seed in range(8):
        with lens.edit(il.Resample(reference, seed=seed), at=il.latent[0]):
            changed = opened(lens, given[1], (1,))
        assert (changed.latents[0, 0] - reference.latents[1, 0]).abs().max() > 1e-6


def test_ablate_averages_over_draws_and_they_differ() -> None:
    lens, given = lens_of(), examples(n=2)
    reference = opened(lens, examples(n=3), (1, 1, 1))
    run = opened(lens, given, (1, 1))
    edit = il.AddNoise(1.0, reference, draws=3)
    result = lens.ablate(run, edit, metric=il.log_prob, context="fixed", answers=["a", "b"])
    from imaginelens.hooks.metrics import targets_of

    targets = targets_of(run, ["a", "b"], [None, None], lens.encode)
    values = []
    for draw in range(3):
        landing = Landing("AddNoise", "latent", ("hook_latent",))
        entry = EditEntry(("hook_latent",), edit, il.latent, landing, draw)
        with lens.registry.scope([entry]):
            values.append(lens.read_answer(run, targets).log_prob)
    torch.testing.assert_close(result.after, torch.stack(values).mean(0), rtol=0, atol=1e-12)
    assert not torch.allclose(values[0], values[1])


# ---- donors that do not fit ------------------------------------------------------------------


def one_sentence(error: pytest.ExceptionInfo[Any], *parts: str) -> None:
    message = str(error.value)
    assert "\n" not in message
    for part in parts:
        assert part in message, f"{part!r} is not in {message!r}"


def test_donors_that_do_not_fit_are_refused_with_their_numbers() -> None:
    lens, given = lens_of(), examples(n=3)
    donor = opened(lens, given[:2], (1, 1))
    with pytest.raises(il.DonorError) as error, lens.edit(il.Swap(donor), at=il.latent):
        opened(lens, given, (1, 1, 1))
    one_sentence(error, "2 rows", "run has 3")

    short = opened(lens, given[0], (1,), latents=il.Force(2))
    with pytest.raises(il.DonorError) as error, lens.edit(il.Swap(short), at=il.latent):
        opened(lens, given[1], (1,))
    one_sentence(error, "2 states", "number 3", "il.latent[:2]")

    narrow = torch.zeros(1, 3, 32, dtype=torch.float64)
    with pytest.raises(il.DonorError) as error, lens.edit(il.Swap(narrow), at=il.latent):
        opened(lens, given[0], (1,))
    one_sentence(error, "(32,)", "(64,)", "hook_latent")

    flat = torch.zeros(64, dtype=torch.float64)
    with pytest.raises(il.DonorError) as error, lens.edit(il.Swap(flat), at=il.latent):
        opened(lens, given[0], (1,))
    one_sentence(error, "(64,)", "tensor[None, None]")

    uncached = "blocks.1.hook_resid_post"
    with (
        pytest.raises(il.DonorError) as error,
        lens.edit(il.Swap(short), at=il.latent, site=uncached),
    ):
        opened(lens, given[0], (1,))
    one_sentence(error, "nothing", uncached, "names_filter=")

    elsewhere = opened(lens, given[0], (1,), names_filter=uncached, positions=[il.latent[0]])
    with (
        pytest.raises(il.DonorError) as error,
        lens.edit(il.Swap(elsewhere), at=il.latent, site=uncached),
    ):
        opened(lens, given[0], (1,))
    width = elsewhere.tokens.prompt_width
    one_sentence(error, uncached, str([width + 3, width + 4]), "positions=")

    other = "blocks.0.attn.hook_z"
    with (
        pytest.raises(il.DonorError) as error,
        lens.edit(il.Swap(elsewhere), at=il.latent[0], site=other),
    ):
        opened(lens, given[0], (1,))
    one_sentence(error, other, uncached)
    assert lens.registry.entries == []


def test_advice_to_select_fewer_keeps_the_selector_that_was_used() -> None:
    lens, given = lens_of(), examples(n=2)
    site = "blocks.0.hook_resid_pre"
    small = opened(lens, given[1], (1,), names_filter=site, positions=[il.image])  # 3 x 5 cells
    with pytest.raises(il.DonorError) as error, lens.edit(il.Swap(small), at=il.image, site=site):
        opened(lens, given[0], (1,))  # 6 x 4 cells
    one_sentence(error, "15 states", "number 16")
    assert "il.latent" not in str(error.value)


# ---- positions that differ between base and source -------------------------------------------


@pytest.mark.parametrize("name", ["qwen2_5_vl", "mistral3"])
@pytest.mark.parametrize(
    "at",
    [il.latent, il.image[0][1:3, 0:2], il.image[0][2], il.image[0][-1, -1],
     il.text.find("red cube"), il.last_prompt],
    ids=repr,
)  # fmt: skip
def test_swap_finds_its_positions_in_each_run(name: str, at: Any) -> None:
    lens, (one, two, _) = lens_of(name), examples(name, 3)
    base, source = opened(lens, one, (1,)), opened(lens, two, (3,))
    site = "blocks.1.hook_resid_post"
    columns = [at.resolve(run.tokens, 0) for run in (base, source)]
    assert columns[0].tolist() != columns[1].tolist()
    with torch.no_grad():
        _, given = lens.run_with_cache(source, names_filter=site)
        _, own = lens.run_with_cache(base, names_filter=site)
    donor = dataclasses.replace(source, cache=given)
    if at == il.image[0][2]:  # a row of cells: as wide as the picture
        with pytest.raises(il.DonorError, match=r"row 0 of the donor has \d states .* number \d"):
            with lens.edit(il.Swap(donor), at=at, site=site):
                lens.run_with_hooks(base)
        return
    with torch.no_grad(), lens.edit(il.Swap(donor), at=at, site=site) as landing:
        _, cache = lens.run_with_cache(base, names_filter=site)
    wanted = own[site].clone()
    wanted[0, columns[0]] = given[site][0, columns[1]]
    assert torch.equal(cache[site], wanted)
    assert landing.positions == {0: columns[0].tolist()}


@pytest.mark.parametrize(
    "at", [il.latent, il.image[0][1:3, 0:2], il.text.find("red cube")], ids=repr
)
def test_swap_finds_its_positions_while_a_batch_is_generated(at: Any) -> None:
    lens, given = lens_of(), examples(n=3)
    site = "hook_latent" if at is il.latent else "blocks.1.hook_resid_post"
    keep = {"names_filter": site, "positions": [at]}
    donor = opened(lens, given[::-1], (3, 1, 1), **keep)
    with lens.edit(il.Swap(donor), at=at, site=site) as landing:
        changed = opened(lens, given, (1, 2, 1), **keep)
    assert torch.equal(changed.cache[site], donor.cache[site])
    assert landing.rows == [0, 1, 2]
    assert landing.flags == {1: "identical_donor"} or at is il.latent or landing.flags == {}


def test_image_cells_count_within_their_own_image() -> None:
    lens = lens_of()
    slot = "<|vision_start|><|image_pad|><|vision_end|>"
    pictures = [tiny.image(48, 32, 0), tiny.image(24, 24, 1)]  # 4 x 6 and 3 x 3 cells
    tokens = lens.tokens({"images": pictures, "text": f"{slot}{slot} which?"})
    second = il.image[1].resolve(tokens, 0)
    assert il.image[1][-1].resolve(tokens, 0).tolist() == second[-3:].tolist()
    assert il.image[1][:, -1].resolve(tokens, 0).tolist() == second[2::3].tolist()
    with pytest.raises(il.PositionError, match="3"):
        il.image[1][3].resolve(tokens, 0)


def test_a_slice_of_images_is_those_images_or_refused() -> None:
    lens = lens_of()
    tokens = lens.tokens(examples()[0])
    try:
        found = il.image[0:1].resolve(tokens, 0)
    except il.PositionError:
        return
    assert found.tolist() == il.image[0].resolve(tokens, 0).tolist()


@pytest.mark.parametrize(
    "selector",
    ["latent[::2]", "latent[1:]", "span[1].latent[0]", "image[0][2]", "image[0][1:3, 0:2]",
     "image[:, -1]", "text.find('a')", "positions([4, 7])"],
)  # fmt: skip
def test_a_selector_shows_how_it_is_written(selector: str) -> None:
    """Landings and errors quote it: typed again, it is the same selector."""
    at = eval(f"il.{selector}")
    assert eval(f"il.{at!r}") == at


def test_patching_the_projector_moves_the_cells_themselves() -> None:
    """vision_projector.hook_out is the site for image cells: same as the residual that enters."""
    lens, (one, two) = lens_of(), examples(n=2)
    base, source = opened(lens, one, (1,)), opened(lens, two, (1,))
    at = il.image[0][0:2, 0:2]
    how = {"base": base, "source": source, "at": at, "metric": il.kl, "context": "fixed"}
    wanted = lens.patch(site="blocks.0.hook_resid_pre", **how)
    found = lens.patch(site="vision_projector.hook_out", **how)
    torch.testing.assert_close(found.after, wanted.after, rtol=0, atol=1e-12)
    assert wanted.after[0] > 1e-9


# ---- edits while other edits are active -------------------------------------------------------


@pytest.mark.parametrize("site", ["hook_latent", "blocks.1.hook_resid_post"])
def test_the_answer_of_an_edited_run_is_read_as_it_was_generated(site: str) -> None:
    """Free context: the logits a metric sees are those that wrote the edited text."""
    lens, given = lens_of(), examples()[0]
    base = opened(lens, given, (1,), keep_logits=True)
    edit = il.Steer(torch.linspace(-1, 1, 64, dtype=torch.float64), 2.0)
    result = lens.ablate(base, edit, site=site, metric=il.kl)
    step = [
        int(il.before_answer.resolve(run.tokens, 0)[0]) - run.tokens.prompt_width + 1
        for run in (base, result.run)
    ]
    p, q = (
        run.logits[0, k].log_softmax(-1) for run, k in zip((base, result.run), step, strict=True)
    )
    assert float(result.after[0]) == pytest.approx(float((p.exp() * (p - q)).sum()), rel=1e-9)
    assert result.after[0] > 1e-6


def test_an_edit_around_a_run_is_not_applied_twice_when_the_run_is_read() -> None:
    """A run's latents already are what an active edit made of them."""
    lens, given = lens_of(), examples()[0]
    edit = il.Steer(torch.linspace(-1, 1, 64, dtype=torch.float64), 2.0)
    with torch.no_grad(), lens.edit(edit, at=il.latent):
        run = opened(lens, given, (1,), keep_logits=True)
        result = lens.ablate(run, il.Zero(), at=il.latent[2], metric=il.kl, context="fixed")
        within = lens.read_answer(run, _no_targets(lens, run)).logits[0]
    step = int(il.before_answer.resolve(run.tokens, 0)[0]) - run.tokens.prompt_width + 1
    torch.testing.assert_close(within, run.logits[0, step], rtol=0, atol=1e-9)
    assert result.after[0] > 0


def _no_targets(lens: il.LatentModel, run: il.Run) -> Any:
    from imaginelens.hooks.metrics import targets_of

    return targets_of(run, run.answers, [None] * len(run), lens.encode)
