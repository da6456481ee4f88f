"""The treasure hunt and its symbolic causal model, against slow restatements of the rules."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from imaginelens.organisms import hunt as hunts
from imaginelens.organisms.hunt import CARDS, HYPOTHESES, NAMES, SHAPES, Hunt, pairs, sample


def walk(board: Hunt, name: str, hops: int) -> str:
    """Follow pointers card by card, on a dictionary."""
    points_to = dict(zip(board.names, board.pointers, strict=True))
    for _ in range(hops):
        name = points_to[name]
    return name


def shape(board: Hunt, name: str) -> str:
    return dict(zip(board.names, board.shapes, strict=True))[name]


@pytest.mark.parametrize("hops", [0, 1, 2, 5])
def test_the_answer_is_the_shape_at_the_end_of_the_walk(hops: int) -> None:
    for h in sample(50, hops=hops, seed=1):
        assert h.answer == shape(h, walk(h, h.start, hops))
        assert len(h.path) == hops + 1
        assert h.path[0] == h.start
        assert h.question == f"start {h.start} {'then ' * hops}shape ?"


def test_samples_are_deterministic_prefix_stable_and_differ_by_seed() -> None:
    assert sample(20, hops=2, seed=5)[:7] == sample(7, hops=2, seed=5)
    assert sample(20, hops=2, seed=5) != sample(20, hops=2, seed=6)
    base, source = pairs(20, hops=2, seed=5)
    assert pairs(7, hops=2, seed=5) == (base[:7], source[:7])


def test_every_field_is_drawn_uniformly() -> None:
    drawn = sample(4000, hops=2, seed=0)
    starts = np.unique([h.start for h in drawn], return_counts=True)[1]
    answers = np.unique([h.answer for h in drawn], return_counts=True)[1]
    first_names = np.unique([h.names[0] for h in drawn], return_counts=True)[1]
    targets = [h.names.index(h.pointers[0]) for h in drawn]
    assert set(targets) == set(range(1, CARDS))  # card 0 points to every card but itself
    for counts, kinds in [(starts, CARDS), (answers, len(SHAPES)), (first_names, CARDS)]:
        expected = len(drawn) / kinds
        assert len(counts) == kinds
        assert abs(counts - expected).max() < 5 * np.sqrt(expected)


def test_pairs_differ_in_their_answers_and_are_independent() -> None:
    base, source = pairs(2000, hops=2, seed=0)
    assert all(b.answer != s.answer for b, s in zip(base, source, strict=True))
    assert all(
        len(b.question.split()) == len(s.question.split())
        for b, s in zip(base, source, strict=True)
    )
    same_start = np.mean([b.start == s.start for b, s in zip(base, source, strict=True)])
    assert abs(same_start - 1 / CARDS) < 0.03


def test_the_hypotheses_disagree_in_most_pairs() -> None:
    share = hunts.disagree(*pairs(4000, hops=2, seed=0)).mean()
    assert 0.55 < share < 0.65


def test_swapping_all_steps() -> None:
    for base, source in zip(*pairs(200, hops=2, seed=3), strict=True):
        for steps in (None, (0, 1), (1,)):
            assert hunts.content(base, source, steps) == source.answer
            assert hunts.pointer(base, source, steps) == shape(base, walk(source, source.start, 2))
            assert hunts.ignored(base, source, steps) == base.answer


def test_swapping_the_first_step_restarts_the_hunt_in_the_base() -> None:
    for base, source in zip(*pairs(200, hops=2, seed=3), strict=True):
        expected = shape(base, walk(base, walk(source, source.start, 1), 1))
        assert hunts.restart(base, source, (0,)) == expected
        assert hunts.content(base, source, (0,)) == expected
        assert hunts.pointer(base, source, (0,)) == expected


def test_steps_beyond_the_hops_hold_the_last_card() -> None:
    for base, source in zip(*pairs(50, hops=1, seed=3), strict=True):
        assert hunts.pointer(base, source, (0,)) == hunts.pointer(base, source, (1,))
        assert hunts.content(base, source, (0,)) == source.answer


@pytest.mark.parametrize("steps", [None, (), (0,), (1,), (0, 1)])
@pytest.mark.parametrize("name", HYPOTHESES)
def test_swapping_a_run_into_itself_changes_nothing(name: str, steps: tuple[int, ...]) -> None:
    for h in sample(50, hops=2, seed=4):
        assert HYPOTHESES[name](h, h, steps) == h.answer


@pytest.mark.parametrize("name", HYPOTHESES)
def test_swapping_no_step_changes_nothing(name: str) -> None:
    for base, source in zip(*pairs(50, hops=2, seed=4), strict=True):
        assert HYPOTHESES[name](base, source, ()) == base.answer


def test_a_hypothesis_reads_only_what_it_says() -> None:
    base, source = (side[0] for side in pairs(1, hops=2, seed=8))
    bare = replace(source, shapes=("bar",) * CARDS)
    assert hunts.pointer(base, bare) == hunts.pointer(base, source)
    assert hunts.content(base, bare) == "bar"
    assert hunts.content(replace(base, shapes=("bar",) * CARDS), source) == source.answer


def test_rendering_many_equals_rendering_one() -> None:
    drawn = sample(6, hops=2, seed=2)
    assert all(
        (np.asarray(h.image()) == row).all()
        for h, row in zip(drawn, hunts.render(drawn), strict=True)
    )


def test_pixels_show_names_pointers_and_shapes() -> None:
    h = sample(1, hops=2, seed=2)[0]
    pixels = np.asarray(h.image()).astype(int)
    for card in range(CARDS):
        top, left = (card // 3) * 28, (card % 3) * 28
        corner = pixels[top : top + 3, left : left + 3].mean((0, 1))
        assert closest(corner) == h.names[card]
        cell = pixels[top : top + 28, left : left + 28]
        other = abs(cell - np.array(hunts.COLORS[h.names[card]])).max(-1) > 40
        assert closest(cell[other].mean(0)) == h.pointers[card]


def closest(color: np.ndarray) -> str:
    return min(NAMES, key=lambda name: np.abs(np.array(hunts.COLORS[name]) - color).sum())


def test_noise_changes_pixels_but_little() -> None:
    h = sample(1, hops=2, seed=2)[0]
    one, two = (np.asarray(replace(h, noise=n).image()).astype(int) for n in (1, 2))
    assert 0 < abs(one - two).max() <= 31


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"names": ("red",) * 9}, "names must be"),
        ({"pointers": ("red",) * 8}, "pointers must be"),
        ({"shapes": ("star",) * 9}, "shapes must be"),
        ({"start": "pink"}, "start must be one of"),
        ({"hops": -1}, "hops must be 0 or more, not -1"),
    ],
)
def test_an_impossible_hunt_is_refused(change: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(sample(1, hops=2, seed=0)[0], **change)


def test_a_card_may_not_point_to_itself() -> None:
    h = sample(1, hops=2, seed=0)[0]
    with pytest.raises(ValueError, match="may not point to itself"):
        replace(h, pointers=(h.names[0], *h.pointers[1:]))
