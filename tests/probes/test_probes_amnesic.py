"""Erasing while the model runs: the known answer on each organism, and what would fool it."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cache
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

import imaginelens as il
from imaginelens.estimates import EstimateError
from imaginelens.hooks.edits import Edit, EditContext
from imaginelens.hooks.errors import EditTouchedNothing, InputError
from imaginelens.hooks.inputs import content_key
from imaginelens.probes import edited_runs
from imaginelens.probes.amnesic import Amnesic, amnesic
from imaginelens.probes.collecting import collect
from imaginelens.probes.edited_runs import Setting, measure
from imaginelens.probes.erase_edit import Blank, Displace, Erase
from imaginelens.probes.erasing import Eraser, Method, erase
from imaginelens.probes.fitting import fit_probe
from imaginelens.probes.states import States
from imaginelens.probes.use import used

FIT, LAST = 320, 1
CONCEPTS = ("name", "shape")


@cache
def organism(name: str) -> il.Organism:
    return il.load(name)


def card(example: Any, step: int, concept: str) -> str:
    """What latent step `step` stands for: the card after step + 1 hops."""
    hunt = example["hunt"]
    name = hunt.path[min(step + 1, hunt.hops)]
    return name if concept == "name" else hunt.shape_of(name)


@cache
def states(name: str, concept: str) -> States:
    """Latents of the tasks of one seed, labelled; the tests run those of other seeds."""
    task = organism(name).task(n=FIT, seed=1)
    z = latents(name)
    labels = [[card(example, step, concept) for step in (0, LAST)] for example in task.base]
    found = States.of(z, labels, sites=["hook_latent"], label=concept)
    return replace(found, keys=tuple(content_key(example) for example in task.base))


@cache
def latents(name: str) -> np.ndarray:
    lens = organism(name)
    base = lens.task(n=FIT, seed=1).base
    parts = [lens.run(list(base[i : i + 160])).latents for i in range(0, FIT, 160)]
    return torch.cat(parts).double().numpy()


def erased(
    name: str, concept: str, *, n: int = 96, method: Method = "leace", **how: Any
) -> Amnesic:
    """What the last latent loses, read at the same text."""
    eraser = erase(states(name, concept), method=method, steps=[LAST])
    how = {"context": "fixed", "draws": 2, "batch_size": 96} | how
    return amnesic(organism(name), organism(name).task(n=n, seed=2), eraser, **how)


# --- which concept is used ------------------------------------------------------------------------

USED = {"latent-content": "shape", "latent-pointer": "name"}


@pytest.mark.parametrize("concept", CONCEPTS)
@pytest.mark.parametrize("name", USED)
def test_each_organism_loses_its_answer_with_the_concept_that_it_uses(
    name: str, concept: str
) -> None:
    found = erased(name, concept)
    if USED[name] == concept:
        assert found.verdict(margin=0.05) == "used"
        assert found.drop.value > 0.6
        assert found.drop_beyond_random.ci().low > 0.4
        assert found.drop_beyond_displaced.ci().low > 0.3
        assert found.as_bad == 0
    else:
        assert found.verdict(margin=0.05) == "not used"
        assert abs(found.drop.value) < 0.02
        assert found.drop_whole.value > 0.6  # though all of it is there to lose
        assert found.change["erased"] > 0.1  # and the states moved


@pytest.mark.parametrize(
    ("name", "concept"),
    [
        ("latent-ignored-aligned", "shape"),
        pytest.param("latent-ignored-aligned", "name", marks=pytest.mark.slow),
        pytest.param("latent-ignored", "shape", marks=pytest.mark.slow),
    ],
)
def test_what_nobody_reads_is_decodable_and_not_used(name: str, concept: str) -> None:
    found = erased(name, concept)
    eraser = erase(states(name, concept), steps=[LAST])
    probe = Probe(eraser_reads(name, concept))
    assert probe.score.ci().low > probe.score.null + 0.1  # type: ignore[operator]
    left = eraser.leaves(states(name, concept), step=LAST, n_folds=2)
    assert left.ci().low < left.null  # type: ignore[operator]
    use = used(probe, found, margin=0.05)
    assert use.verdict == "decodable, not used"
    assert found.change["erased"] > 0.05
    assert "decodable, not used: a probe reads it with accuracy" in repr(use)


def test_a_projection_takes_the_name_along_and_so_proves_no_use() -> None:
    """The pointer organism does not read shapes. LEACE finds that; the mean projection destroys the
    answer beyond all controls, and no use is claimed from it."""
    found = erased("latent-pointer", "shape", method="mean")
    assert found.drop.value > 0.2
    assert found.drop_beyond_random.pvalue() < 0.05
    assert found.drop_beyond_displaced.pvalue() < 0.05
    assert found.verdict(margin=0.05) == "undecided"
    assert "mean takes along what overlaps with it" in found.describe(margin=0.05)


def test_erasing_an_early_step_starves_the_next() -> None:
    """Content's answer does not read step 0, but its next latent does: free differs from fixed."""
    eraser = erase(states("latent-content", "name"), steps=[0])
    lens = organism("latent-content")
    free, fixed = (
        amnesic(lens, lens.task(n=24, seed=2), eraser, draws=2, context=context)
        for context in ("free", "fixed")
    )
    assert free.drop.ci().low > 0.2
    assert fixed.drop.value == 0.0


@pytest.mark.slow
@pytest.mark.parametrize("concept", CONCEPTS)
@pytest.mark.parametrize("name", [*USED, "latent-ignored", "latent-ignored-aligned"])
def test_the_whole_table_in_free_context(name: str, concept: str) -> None:
    """4 organisms x name, shape, at the last step and at both. What drops by .02 by chance
    is told from a margin of .05 by 320 examples, and not by 128."""
    lens, found = organism(name), {}
    for steps in ([LAST], [0, LAST]):
        eraser = erase(states(name, concept), steps=steps)
        found[len(steps)] = amnesic(lens, lens.task(n=320, seed=2), eraser, draws=2, batch_size=80)
        print(f"{name}\n{found[len(steps)]!r}\n  {found[len(steps)].verdict(0.05)}")
    expected = "used" if USED.get(name) == concept else "not used"
    assert found[1].verdict(margin=0.05) == expected
    if (name, concept) != ("latent-content", "name"):  # there step 0 is needed for the next
        assert found[2].verdict(margin=0.05) == expected


# --- the edit is what it says ---------------------------------------------------------------------


@pytest.fixture(scope="module")
def exact() -> il.Organism:
    return il.load("latent-content", dtype=torch.float64)


@pytest.fixture(scope="module")
def eraser() -> Eraser:
    return erase(states("latent-content", "shape"))


def test_it_is_replacing_latents_by_transformed_ones(exact: il.Organism, eraser: Eraser) -> None:
    run = exact.run(exact.task(n=1, seed=2).base)
    by_hand = torch.tensor(eraser.transform(run.latents.numpy()))[0]
    how = {"at": il.latent, "metric": il.kl, "context": "fixed"}
    ours, theirs = (
        exact.ablate(run, Erase(eraser), **how),
        exact.ablate(run, il.Replace(by_hand), **how),
    )
    torch.testing.assert_close(ours.after, theirs.after, rtol=0, atol=1e-10)
    assert float(ours.after) > 0.1


def test_a_latent_is_erased_as_its_own_step_whichever_are_selected(
    exact: il.Organism, eraser: Eraser
) -> None:
    run = exact.run(exact.task(n=4, seed=2).base)
    how = {"metric": il.kl, "context": "fixed"}
    one = exact.ablate(run, Erase(eraser), at=il.latent[1], **how)
    other = exact.ablate(run, Erase(eraser.only(1)), at=il.latent, **how)
    torch.testing.assert_close(one.after, other.after, rtol=0, atol=1e-12)
    wrong = exact.ablate(run, Erase(replace(eraser, at="elsewhere")), at=il.latent[1], **how)
    assert not torch.allclose(one.after, wrong.after, atol=1e-3)  # its first place, not step 1


def test_at_a_module_cells_are_counted_in_order(exact: il.Organism) -> None:
    """At image positions there are no steps: place k is erased as the k-th of the states."""
    site, at = "blocks.1.hook_resid_post", il.image[0][0, 0:2]
    task = exact.task(n=48, seed=1)
    run = exact.run(task.base)
    _, cache = exact.run_with_cache(run, names_filter=site)
    columns = [at.resolve(run.tokens, row) for row in range(48)]
    z = np.stack([cache[site][row, list(c)].detach().numpy() for row, c in enumerate(columns)])
    shapes = [[e["hunt"].shapes[0], e["hunt"].shapes[1]] for e in task.base]
    eraser = replace(erase(z, shapes), at=repr(at), site=site)
    data = exact.task(n=8, seed=2)
    found = amnesic(exact, data, eraser, site=site, at=at, metric=il.log_prob, draws=2)
    assert found.context == "free"
    assert not found.flags
    assert found.change["displaced"] == pytest.approx(found.change["erased"], rel=1e-6)


def test_displaced_states_move_exactly_as_far() -> None:
    eraser = erase(states("latent-content", "shape"))
    act = torch.tensor(latents("latent-content")[:10].reshape(20, -1))
    steps = np.tile([0, 1], 10)
    ctx = EditContext("hook_latent", np.arange(20) // 2, steps + 5, steps, steps)
    far = (Erase(eraser).apply(act, ctx) - act).norm(dim=1)
    moved = Displace(eraser, 3).apply(act, ctx) - act
    torch.testing.assert_close(moved.norm(dim=1), far)
    assert np.linalg.matrix_rank(moved[::2].numpy(), tol=1e-9) == eraser.rank[0]
    assert not torch.equal(moved, Displace(eraser, 4).apply(act, ctx) - act)
    mean = torch.tensor(eraser.mean)
    torch.testing.assert_close(Blank(eraser).apply(act, ctx), mean.repeat(10, 1))


def test_it_works_in_studies_of_mediation(exact: il.Organism, eraser: Eraser) -> None:
    data = exact.task(n=6, seed=2)
    last = eraser.only(LAST)
    found = amnesic(exact, data, last, draws=2)
    table = il.necessity(exact, data, edits=[Erase(last)])
    row = next(row for row in table.rows if not row.control)
    assert row.change.value == pytest.approx(-found.drop.value)
    cells = il.sweep(
        exact,
        data[:2],
        sites="hook_latent",
        positions=il.latent,
        metric=il.logit_diff,
        edit=Erase(eraser),
    )
    assert "Erase" in repr(cells)


# --- how it is measured ---------------------------------------------------------------------------


def test_batches_and_draws_do_not_change_what_is_found(exact: il.Organism, eraser: Eraser) -> None:
    data = exact.task(n=12, seed=2)
    how = {"metric": il.log_prob, "draws": 2, "context": "fixed"}
    one, other = (amnesic(exact, data, eraser, batch_size=size, **how) for size in (5, 12))
    for part in ("before", "after", "random", "displaced", "blank"):
        np.testing.assert_allclose(getattr(one, part), getattr(other, part), atol=1e-9)
    more = amnesic(exact, data, eraser, **how | {"draws": 3})
    np.testing.assert_allclose(more.random[:2], other.random, atol=1e-9)
    again = amnesic(exact, data, eraser, **how, seed=1)
    assert np.abs(again.random - other.random).max() > 1e-6


def test_numbers_have_their_own_test_and_groups_count(exact: il.Organism, eraser: Eraser) -> None:
    data = replace(exact.task(n=24, seed=2), groups=[i // 2 for i in range(24)])
    found = amnesic(exact, data, eraser, metric=il.log_prob, draws=2, context="fixed")
    assert found.drop.procedure == "cluster-robust t"
    assert found.drop_beyond_random.n_groups == 12
    np.testing.assert_allclose(found.drop.values, found.before - found.after)
    np.testing.assert_allclose(
        found.drop_beyond_displaced.values, found.displaced.mean(0) - found.after
    )


@dataclass(frozen=True)
class OnlyOf(Edit):
    """Zeros, and only in some examples."""

    keys: frozenset[str]

    def apply(self, act: torch.Tensor, ctx: EditContext) -> torch.Tensor:
        mine = torch.tensor([key in self.keys for key in ctx.keys])
        return torch.where(mine[:, None], torch.zeros_like(act), act)


@pytest.mark.parametrize("batch_size", [3, 8])
def test_what_an_edit_leaves_alone_is_flagged_with_no_effect(
    exact: il.Organism, batch_size: int
) -> None:
    data = exact.task(n=8, seed=2)
    keys = exact.prompt(list(data.base)).keys
    setting = Setting(exact, data, il.log_prob, "hook_latent", il.latent, "fixed", batch_size)
    found = measure(setting, {"some": OnlyOf(frozenset(keys[2:4])), "none": il.Zero()})
    assert found.flags["some"] == dict.fromkeys([0, 1, 4, 5, 6, 7], "identical_donor")
    assert not found.flags["none"]
    changed = found.after["some"] != found.before
    assert changed.tolist() == [False] * 2 + [True] * 2 + [False] * 4
    np.testing.assert_allclose(found.after["some"][2:4], found.after["none"][2:4], atol=1e-9)
    with pytest.raises(EditTouchedNothing, match="changed none of the 8 examples"):
        measure(setting, {"nobody": OnlyOf(frozenset())})


# --- what may be claimed --------------------------------------------------------------------------


def made(after: Any, random: Any, displaced: Any = None, **changes: Any) -> Amnesic:
    """Of 200 examples that were all right before: shares that are right after, by arm."""

    def hits(share: float) -> np.ndarray:
        return (np.arange(200) < share * 200).astype(float)

    draws = np.stack([hits(share) for share in random])
    other = draws if displaced is None else np.stack([hits(share) for share in displaced])
    found = Amnesic(
        "name", "leace", il.accuracy, hits(1), hits(after), draws, other, hits(0.2), None, {},
        dict.fromkeys(("erased", "random", "displaced", "blank"), 0.5), "latent", "free",
    )  # fmt: skip
    return replace(found, **changes)


@pytest.mark.parametrize(
    ("found", "verdict"),
    [
        (made(0.3, [0.95, 0.9]), "used"),
        (made(1.0, [0.95, 0.9]), "not used"),
        (made(1.0, [0.3, 0.2]), "not used"),
        (made(0.98, [1.0, 1.0]), "not used"),  # real or not, within the margin
        (made(0.3, [0.3, 0.9]), "undecided"),  # one random subspace is as bad
        (made(0.3, [0.95, 0.9], [0.95, 0.25]), "undecided"),
        (made(0.3, [0.32, 0.31]), "undecided"),  # hardly more than they
        (made(0.9, [1.0, 1.0]), "used"),
        (made(0.955, [1.0, 1.0], before=np.r_[np.ones(190), np.zeros(10)]), "not used"),
        (made(0.3, [0.95, 0.9], method="inlp"), "undecided"),
        (made(1.0, [0.95, 0.9], method="inlp"), "not used"),
    ],
)
def test_verdicts(found: Amnesic, verdict: str) -> None:
    assert found.verdict(margin=0.05) == verdict
    assert found.describe(margin=0.05).startswith("without name at latent the accuracy drops by ")


def test_a_gain_is_a_use_too_and_the_other_side_is_none() -> None:
    found = made(1.0, [0.5, 0.5])
    before = (np.arange(200) < 100).astype(float)
    assert replace(found, before=before).verdict(margin=0.05) == "used"
    assert replace(found, before=before, random=np.ones((2, 200))).verdict(0.05) == "undecided"
    with pytest.raises(EstimateError, match="needs a margin"):
        found.verdict()


def test_from_collecting_to_use() -> None:
    """The whole way: states and labels collected, read by a probe with its controls, erased."""
    lens = organism("latent-content")
    known = collect(lens, lens.task(n=160, seed=1), labels="shape", controls=False)
    probe = fit_probe(known, step=LAST, kind="mass_mean")
    eraser = erase(known, steps=[LAST])
    assert eraser.site == "hook_latent"
    lost = amnesic(lens, lens.task(n=64, seed=2), eraser, context="fixed", draws=2)
    assert used(probe, lost, margin=0.05).verdict == "decodable and used"
    with pytest.raises(InputError, match="8 of 8 examples are among those"):
        amnesic(lens, lens.task(n=160, seed=1)[:8], eraser)
    with pytest.raises(InputError, match="8 groups of the data"):  # another question, same pictures
        amnesic(lens, lens.task(n=160, seed=1)[:8], replace(eraser, keys=frozenset()))


@dataclass
class Probe:
    """What of a probe's result counts here."""

    score: il.Estimate
    said: str = "decodable"

    def verdict(self) -> str:
        return self.said


def eraser_reads(name: str, concept: str) -> il.Estimate:
    """What a logistic probe reads before anything is erased: an eraser of nothing."""
    known = states(name, concept)
    eraser = erase(known, steps=[LAST])
    nothing = replace(eraser, steps=tuple(None for _ in eraser.steps))
    nothing = replace(nothing, steps=(eraser.at_step(LAST), None))
    found = nothing.leaves(known, step=LAST, n_folds=2)
    return replace(found, name="accuracy")


def test_use_needs_both() -> None:
    score = il.Estimate.share([1] * 90 + [0] * 10, chance=0.25, name="accuracy")
    yes, no, open_ = made(0.3, [0.9, 0.9]), made(1.0, [0.9, 0.9]), made(0.3, [0.3, 0.9])
    expected = {
        "decodable and used": used(Probe(score), yes, margin=0.05),
        "decodable, not used": used(Probe(score), no, margin=0.05),
        "decodable, use undecided": used(Probe(score), open_, margin=0.05),
    }
    for verdict, use in expected.items():
        assert use.verdict == verdict
        assert repr(use).startswith(f"name is {verdict}: a probe reads it with accuracy 0.9 [0.8")
        assert "chance 0.25; without name at latent" in repr(use)
    for found in (yes, no, open_):
        use = used(Probe(score, "not decodable"), found, margin=0.05)
        assert use.verdict == "not decodable"
        assert "without name" not in repr(use)
    with pytest.raises(InputError, match="the probe is untested: it was fitted without"):
        used(Probe(score, "untested"), yes, margin=0.05)
    with pytest.raises(EstimateError, match="a margin of -1 is none"):
        used(Probe(score), yes, margin=-1)


# --- what cannot be done --------------------------------------------------------------------------


def wrong(lens: il.Organism, eraser: Eraser) -> Iterator[tuple[str, Callable[[], Any]]]:
    data = lens.task(n=12, seed=2)
    plain: Any = getattr(amnesic, "__wrapped__", amnesic)

    def call(data: Any = data, eraser: Any = eraser, **how: Any) -> Callable[[], Any]:
        return lambda: plain(lens, data, eraser, **how)

    seen = lens.task(n=12, seed=1)
    mixed = il.Pairs(
        base=(*data.base, *seen.base[:2]),
        source=(*data.source, *seen.source[:2]),
        base_answers=(*data.base_answers, *seen.base_answers[:2]),
        source_answers=(*data.source_answers, *seen.source_answers[:2]),
    )
    yield "2 of 14 examples are among those that the eraser of shape was learned from", call(mixed)
    grouped = replace(data, groups=[f"image {i}" for i in range(12)])
    shared = replace(eraser, groups=frozenset({"image 3", "image 99"}))
    yield "1 groups of the data, such as 'image 3', are among", call(grouped, shared)
    yield "learned at hook_latent and would act at blocks.0", call(site="blocks.0.hook_resid_post")
    yield "draws is 1", call(draws=1)
    yield "eraser is a str", call(eraser="leace")
    yield "names 5 sites", call(eraser=replace(eraser, site=""), site="*.hook_resid_post")
    yield "batch_size is 0", call(batch_size=0)
    narrow = erase(np.random.default_rng(0).normal(size=(50, 3)), [0, 1] * 25)
    yield "eraser of states of width 3 .from layer 0. cannot act", call(eraser=narrow)
    short = replace(eraser, steps=eraser.steps[:1])
    yield "knows steps 0 to 0 and the states have a step 1", call(eraser=short)


def test_one_sentence_says_what_is_wrong(eraser: Eraser) -> None:
    lens = organism("latent-content")
    for message, call in wrong(lens, eraser):
        with pytest.raises(InputError, match=message):
            call()
    check: Any = getattr(edited_runs._check, "__wrapped__", edited_runs._check)
    with pytest.raises(InputError, match=r"data is a list, expected il\.Pairs"):
        check(SimpleNamespace(data=[]))
    with pytest.raises(EditTouchedNothing, match=r"changed none of the 12 examples \(not_emitted"):
        amnesic(lens, lens.task(n=12, seed=2), eraser, at=il.latent[4:6], draws=2)
