"""The engine against models whose mechanism is known: the right answer, and where it is not."""

import pytest
import torch

import imaginelens as il
from imaginelens.hooks import controls

MECHANISM = {
    "latent-content": "content",
    "latent-pointer": "pointer",
    "latent-ignored": "ignored",
    "latent-ignored-aligned": "ignored",
}
USED = ("latent-content", "latent-pointer")
N = 128


@pytest.fixture(scope="module", params=MECHANISM)
def lens(request: pytest.FixtureRequest) -> il.Organism:
    return il.load(request.param, dtype=torch.float64)


def share(flags: list[bool]) -> float:
    return sum(flags) / len(flags)


def test_shipped_organisms_answer_their_task(lens: il.Organism) -> None:
    task = lens.task(n=256, seed=11)
    run = lens.run(task.base)
    right = [a == r for a, r in zip(run.answers, task.base_answers, strict=True)]
    assert share(right) >= 0.97  # 0.98 or more on 1,024, by the card
    assert lens.card["accuracy"] >= 0.98
    assert run.trigger.rate == 1.0
    assert run.parse_coverage == 1.0
    assert set(run.trigger.emitted) == {2}
    assert {span.ended_by for span in run.trigger.spans} == {"cap"}


@pytest.mark.parametrize("context", ["free", "fixed"])
def test_swapped_latents_give_the_symbolic_counterfactual(lens: il.Organism, context: str) -> None:
    task = lens.task(n=N, seed=3)
    result = lens.swap(
        task.base,
        task.source,
        at=il.latent,
        context=context,
        base_answers=task.base_answers,
        source_answers=task.source_answers,
    )
    after = result.answers_after
    hypothesis = task.hypotheses[MECHANISM[lens.name]]
    predicted = [hypothesis(base, source, None) for base, source in task]
    assert share([a == p for a, p in zip(after, predicted, strict=True)]) >= 0.9
    kept = share([a == b for a, b in zip(after, result.answers_before, strict=True)])
    if lens.name not in USED:
        assert kept >= 0.98  # no change of answer
        assert abs(float(result.effect.mean())) < 0.5
    elif lens.name == "latent-content":
        assert kept <= 0.1
        assert float(result.effect.mean()) > 5.0
    else:  # a third answer: what the source's card shows in the base picture
        assert 0.1 <= kept <= 0.4


def test_another_mechanisms_prediction_fails(lens: il.Organism) -> None:
    """The guard above can fail: the rival hypothesis does not fit."""
    task = lens.task(n=N, seed=3)
    rival = task.hypotheses["ignored" if lens.name == "latent-content" else "content"]
    after = lens.swap(task.base, task.source, at=il.latent, metric=il.kl).answers_after
    predicted = [rival(base, source, None) for base, source in task]
    agrees = share([a == p for a, p in zip(after, predicted, strict=True)])
    assert agrees <= (0.3 if lens.name == "latent-pointer" else 0.1)  # some pairs agree by chance


def test_sham_full_swap_and_path_gap(lens: il.Organism) -> None:
    task = lens.task(n=16, seed=4)
    base, source = (lens.run(x, keep_logits=True) for x in (task.base, task.source))
    found = controls.check_integrity(
        lens, base, source, site="blocks.*.hook_resid_post", at=il.latent
    )
    assert found.sham == 0.0
    assert found.full_swap < 1e-9
    assert found.misplaced > 1e-2
    assert found.path_gap < 1e-9


def test_sham_at_the_fed_back_state_is_exact_in_both_contexts(lens: il.Organism) -> None:
    task = lens.task(n=16, seed=4)
    for context in ("free", "fixed"):
        result = lens.ablate(task.base, il.Sham(), at=il.latent, context=context)
        assert torch.equal(result.before, result.after)
        assert len(result.landing.cells) == 32


def test_free_and_fixed_agree_where_nothing_is_regenerated(lens: il.Organism) -> None:
    """A swap of all latents leaves nothing to regenerate but the answer itself."""
    task = lens.task(n=16, seed=5)
    free, fixed = (
        lens.swap(task.base, task.source, at=il.latent, context=c) for c in ("free", "fixed")
    )
    torch.testing.assert_close(free.after, fixed.after, rtol=0, atol=1e-9)


def test_a_batch_of_swaps_gives_what_its_pairs_give_alone(lens: il.Organism) -> None:
    task = lens.task(n=6, seed=6)
    together = lens.patch(
        base=task.base, source=task.source, site="blocks.0.hook_resid_post", at=il.latent[0]
    )
    for i, (base, source) in enumerate(task):
        alone = lens.patch(
            base=base, source=source, site="blocks.0.hook_resid_post", at=il.latent[0]
        )
        assert alone.answers_after[0] == together.answers_after[i]
        torch.testing.assert_close(alone.after[0], together.after[i], rtol=0, atol=1e-9)


def test_destroying_the_latents_costs_the_answer_only_where_they_are_used(
    lens: il.Organism,
) -> None:
    task, other = lens.task(n=N, seed=7), lens.task(n=N, seed=8)
    reference = lens.run(other.base)
    for edit in (il.Mean(reference), il.Noise(reference), il.Zero(), il.Resample(reference)):
        result = lens.ablate(
            task.base, edit, at=il.latent, metric=il.accuracy, answers=task.base_answers
        )
        assert result.parse_coverage >= 0.9  # the others are missing, not wrong
        drop = float(result.before.mean() - result.after.nanmean())
        if lens.name not in USED:
            assert abs(drop) <= 0.02
        else:
            assert drop >= 0.5


def test_metrics_of_a_swap_agree_with_each_other(lens: il.Organism) -> None:
    task = lens.task(n=32, seed=9)
    runs = lens.run(task.base), lens.run(task.source)
    common = {"at": il.latent, "base_answers": task.base_answers}
    results = {
        metric.name: lens.swap(*runs, metric=metric, source_answers=task.source_answers, **common)
        for metric in (il.logit_diff, il.source_answer, il.base_answer, il.prob, il.log_prob, il.kl)
    }
    torch.testing.assert_close(results["prob"].after, results["log_prob"].after.exp())
    assert bool((results["kl"].after >= -1e-12).all())
    assert torch.equal(results["kl"].before, torch.zeros(32, dtype=torch.float64))
    for i, answer in enumerate(results["logit_diff"].answers_after):
        assert results["source_answer"].after[i] == float(answer == task.source_answers[i])
        assert results["base_answer"].after[i] == float(answer == task.base_answers[i])


def pictures(task: il.Pairs) -> list[tuple[bytes, str]]:
    return [(base["images"].tobytes(), base["text"]) for base, _ in task]


def test_pairs_slice_and_keep_their_hypotheses() -> None:
    task = il.load("latent-content").task(n=8, seed=0)
    part = task[2:5]
    assert part.base_answers == task.base_answers[2:5]
    assert [text for _, text in pictures(part)] == [text for _, text in pictures(task)][2:5]
    assert list(part.hypotheses) == list(task.hypotheses)
