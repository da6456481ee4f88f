"""The organism that imagines in words: its text carries names, and editing it is followed."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch

import imaginelens as il
from imaginelens.hooks.textspans import find_spans

N = 128
NAMES = "red green blue yellow magenta cyan white orange gray".split()


@pytest.fixture(scope="module")
def lens() -> il.Organism:
    return il.load("text", dtype=torch.float64)


@pytest.fixture(scope="module")
def task(lens: il.Organism) -> il.Pairs:
    return lens.task(n=N, seed=21)


@pytest.fixture(scope="module")
def runs(lens: il.Organism, task: il.Pairs) -> tuple[il.Run, il.Run]:
    return lens.run(task.base), lens.run(task.source)


@pytest.fixture(scope="module")
def few(lens: il.Organism, task: il.Pairs) -> tuple[il.Run, il.Run]:
    return lens.run(task.base[:24]), lens.run(task.source[:24])


def share(found: Sequence[str | None], wanted: Sequence[str | None]) -> float:
    return float(np.mean([f == w for f, w in zip(found, wanted, strict=True)]))


def answers(task: il.Pairs) -> dict[str, list[str]]:
    return {"base_answers": task.base_answers, "source_answers": task.source_answers}


def imagined(run: il.Run) -> list[str]:
    """What each row wrote between the markers."""
    return [t.split("<think_image>")[1].split("</think_image>")[0].strip() for t in run.texts]


def test_it_is_recognised_and_writes_what_it_sees(lens: il.Organism, task: il.Pairs) -> None:
    assert lens.family == il.FAMILIES["capimagine"]
    assert lens.spec is None
    assert "capimagine: imagines in words" in str(lens.describe())
    run = lens.run(task.base[:32])
    assert share(imagined(run), [" ".join(e["hunt"].path[1:]) for e in task.base[:32]]) >= 0.95
    assert share(run.answers, task.base_answers[:32]) >= 0.95
    assert run.parse_coverage == 1.0
    assert run.trigger.rate == 0.0  # it feeds no state back
    assert run.trigger.emitted == (0,) * 32
    for row in range(32):
        (span,) = find_spans(run.tokens, row)
        assert (span.start - span.opened, span.stop - span.start, span.end - span.stop) == (1, 2, 1)
        assert il.imagination.resolve(run.tokens, row).tolist() == [span.start, span.start + 1]


@pytest.mark.parametrize("context", ["free", "fixed"])
def test_swapped_imagination_is_followed(
    lens: il.Organism, task: il.Pairs, runs: tuple[il.Run, il.Run], context: str
) -> None:
    result = lens.swap(*runs, at=il.imagination, context=context, **answers(task))
    predicted = [task.hypotheses["pointer"](base, source, None) for base, source in task]
    assert share(result.answers_after, predicted) >= 0.95
    assert share(result.answers_before, task.base_answers) >= 0.95
    for rival in ("content", "ignored"):
        other = [task.hypotheses[rival](base, source, None) for base, source in task]
        assert share(result.answers_after, other) <= 0.4
    assert imagined(result.run) == imagined(runs[1])
    assert result.landing.fired == 1
    assert len(result.landing.cells) == N
    same = [a == b for a, b in zip(*map(imagined, runs), strict=True)]
    assert sorted(result.landing.flags) == [i for i, equal in enumerate(same) if equal]
    assert set(result.landing.flags.values()) <= {"identical_donor"}


@pytest.mark.parametrize("context", ["free", "fixed"])
def test_rewritten_imagination_is_followed(
    lens: il.Organism, task: il.Pairs, runs: tuple[il.Run, il.Run], context: str
) -> None:
    """The shape on the base's card of the name that was put there."""
    rng = np.random.default_rng(3)
    names = [str(name) for name in rng.choice(NAMES, N)]
    texts = [f"{first} {name}" for first, name in zip(names[::-1], names, strict=True)]
    result = lens.ablate(
        runs[0], il.Rewrite(texts), at=il.imagination, context=context, metric=il.accuracy,
        answers=task.base_answers,
    )  # fmt: skip
    predicted = [e["hunt"].shape_of(n) for e, n in zip(task.base, names, strict=True)]
    assert imagined(result.run) == texts
    assert share(result.answers_after, predicted) >= 0.95
    assert result.landing.relative_change > 0.5


def test_free_and_fixed_agree_where_only_the_answer_is_left(
    lens: il.Organism, task: il.Pairs, few: tuple[il.Run, il.Run]
) -> None:
    free, fixed = (
        lens.swap(*few, at=il.imagination, context=c, **answers(task[:24]))
        for c in ("free", "fixed")
    )
    torch.testing.assert_close(free.after, fixed.after, rtol=0, atol=1e-9)
    assert free.answers_after == fixed.answers_after


@pytest.mark.parametrize("context", ["free", "fixed"])
def test_sham_is_exactly_nothing(
    lens: il.Organism, few: tuple[il.Run, il.Run], context: str
) -> None:
    for metric in (il.log_prob, il.kl):
        result = lens.ablate(few[0], il.Sham(), at=il.imagination, context=context, metric=metric)
        assert torch.equal(result.before, result.after)
        assert result.texts_after == result.texts_before
        assert result.landing.flags == {}
        assert len(result.landing.cells) == 24


def test_its_own_text_is_no_edit(lens: il.Organism, few: tuple[il.Run, il.Run]) -> None:
    for edit in (il.Rewrite(imagined(few[0])), il.Swap(few[0])):
        with pytest.raises(il.EditTouchedNothing, match="all 24 touched rows bit for bit"):
            lens.ablate(few[0], edit, at=il.imagination)


@pytest.mark.parametrize("context", ["free", "fixed"])
def test_another_examples_imagination_leaves_chance(
    lens: il.Organism, task: il.Pairs, runs: tuple[il.Run, il.Run], context: str
) -> None:
    """A card drawn at random shows the right shape in 1 of 6 cases, the right card in 1 of 9."""
    result = lens.ablate(
        runs[0], il.Resample(runs[1], seed=2), at=il.imagination, context=context,
        metric=il.accuracy, answers=task.base_answers,
    )  # fmt: skip
    assert float(result.before.mean()) >= 0.95
    assert 0.12 <= float(result.after.mean()) <= 0.42
    taken = imagined(result.run)
    assert set(taken) <= set(imagined(runs[1]))
    shown = [e["hunt"].shape_of(t.split()[-1]) for e, t in zip(task.base, taken, strict=True)]
    assert share(result.answers_after, shown) >= 0.95


def test_emptied_cut_shuffled_and_removed(lens: il.Organism, few: tuple[il.Run, il.Run]) -> None:
    run = few[0]
    shuffled = lens.ablate(run, il.Shuffle(), at=il.imagination, metric=il.accuracy)
    for before, after in zip(imagined(run), imagined(shuffled.run), strict=True):
        assert after.split() == before.split()[::-1]
    empty = lens.ablate(run, il.Truncate(0), at=il.imagination, context="fixed", metric=il.accuracy)
    assert set(imagined(empty.run)) == {""}
    assert float(empty.after.mean()) <= 0.5
    removed = lens.ablate(run, il.Delete(), at=il.imagination, metric=il.accuracy)
    assert not any(text.startswith("<think_image>") for text in removed.texts_after)
    fixed = lens.ablate(run, il.Delete(), at=il.imagination, context="fixed", metric=il.kl)
    assert [t.split() for t in fixed.texts_after] == [t.split()[-2:] for t in run.texts]
    assert bool((fixed.after > 1e-3).any())


def test_the_verbs_and_the_context_manager_do_the_same(
    lens: il.Organism, task: il.Pairs, few: tuple[il.Run, il.Run]
) -> None:
    edit = il.Rewrite("cyan gray")
    with lens.edit(edit, at=il.imagination[0]) as landing:
        run = lens.run(task.base[:24])
    result = lens.ablate(few[0], edit, at=il.imagination[0], metric=il.kl)
    assert tuple(run.texts) == result.texts_after
    assert run.answers == list(result.answers_after)
    assert landing.cells == result.landing.cells
    assert (landing.fired, landing.flags) == (1, result.landing.flags)
    assert lens.run(task.base[:24]).texts == few[0].texts


def test_a_batch_gives_what_its_rows_give_alone_in_any_order(
    lens: il.Organism, task: il.Pairs
) -> None:
    six, order = task[:6], [3, 0, 5, 1, 4, 2]
    for edit in ("swap", "resample", "shuffle"):

        def after(base: Any, source: Any, edit: str = edit) -> tuple[Any, torch.Tensor]:
            made = {
                "swap": lambda: il.Swap(lens.run(source)),
                "resample": lambda: il.Resample(lens.run(six.source), seed=5),
                "shuffle": lambda: il.Shuffle(seed=5),
            }[edit]()
            result = lens.ablate(base, made, at=il.imagination)
            return result.texts_after, result.after

        texts, values = after(six.base, six.source)
        mixed, moved = after([six.base[i] for i in order], [six.source[i] for i in order])
        assert mixed == tuple(texts[i] for i in order)
        torch.testing.assert_close(moved, values[order], rtol=0, atol=1e-9)
        for i in (0, 4):
            single, value = after(six.base[i], six.source[i])
            assert single == (texts[i],)
            torch.testing.assert_close(value[0], values[i], rtol=0, atol=1e-9)


def test_interchange_names_the_pointer(lens: il.Organism, task: il.Pairs) -> None:
    found = il.interchange(lens, task[:64], at=il.imagination)
    assert found.winner() == "pointer"
    assert found.shares()["pointer"].value >= 0.95
    assert found.steps is None
    assert repr(found).startswith("Interchange at imagination on ")
    with pytest.raises(il.InputError, match=r"imagination\[0\] selects spans of text"):
        il.interchange(lens, task, at=il.imagination[0])


@pytest.mark.parametrize("name", ["direct", "base"])
def test_organisms_that_imagine_nothing(name: str) -> None:
    lens = il.load(name, dtype=torch.float64)
    task = lens.task(n=16, seed=1)
    run = lens.run(task.base)
    message = r"rows wrote 0 to 0 spans <think_image> \.\.\. </think_image>"
    with pytest.raises(il.EditTouchedNothing, match=message):
        lens.ablate(run, il.Rewrite("red"), at=il.imagination, answers=task.base_answers)
    with (
        pytest.raises(il.EditTouchedNothing, match=message),
        lens.edit(il.Rewrite("red"), at=il.imagination),
    ):
        lens.run(task.base)
    plain = il.load(name, spec=False, dtype=torch.float64)
    assert plain.run(task.base).texts == run.texts
    assert plain.run(task.base).answers == run.answers


def test_states_are_captured_under_an_edit_of_the_text(lens: il.Organism, task: il.Pairs) -> None:
    site = "blocks.*.hook_resid_post"
    with lens.edit(il.Rewrite("cyan gray"), at=il.imagination):
        run = lens.run(task.base[:8], names_filter=site, positions=(il.imagination, il.answer))
    _, cache = lens.run_with_cache(run, names_filter=site)
    for name in lens.registry.match(site):
        columns = run.cache.columns[name]
        for row in range(8):
            wanted = il.imagination.resolve(run.tokens, row).tolist()
            held = columns[row].tolist()
            assert held == [*wanted, wanted[-1] + 2]  # the answer stands behind the marker
            mine, read = run.cache[name][row], cache[name][row, held]
            torch.testing.assert_close(mine, read, rtol=0, atol=1e-9)


def test_states_under_the_imagination_are_edited_by_naming_a_site(
    lens: il.Organism, task: il.Pairs
) -> None:
    run, site = lens.run(task.base[:16]), "blocks.0.hook_resid_post"
    for context in ("free", "fixed"):
        result = lens.ablate(run, il.Zero(), at=il.imagination, site=site, context=context)
        assert result.landing.positions == {
            row: il.imagination.resolve((result.run or run).tokens, row).tolist()
            for row in range(16)
        }
        assert result.landing.sites == (site,)
        assert bool((result.after != result.before).all())
    sham = lens.ablate(run, il.Sham(), at=il.imagination, site=site)
    assert torch.equal(sham.before, sham.after)
    pairs = lens.patch(
        base=run, source=lens.run(task.source[:16]), site=site, at=il.imagination,
        base_answers=task.base_answers[:16], source_answers=task.source_answers[:16],
    )  # fmt: skip
    assert len(pairs.landing.cells) == 32
