"""Interchange subspaces: a planted rotated concept is found, and a placebo is not."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from scipy import linalg

import imaginelens as il
from imaginelens.hooks.errors import InputError
from imaginelens.probes.interchange import Subspace, _Reading, _Search, find_subspace

WIDTH, CORNERS = 16, torch.tensor([[2.0, 2.0], [2.0, -2.0], [-2.0, 2.0], [-2.0, -2.0]])
TURN = torch.tensor(np.linalg.qr(np.random.default_rng(5).normal(size=(WIDTH, WIDTH)))[0])
CARRIER = TURN[:, :2].double()  # no axis of the states, but two directions across all of them


class Planted(_Reading):
    """Answers one of four by the part of the state in a rotated plane, and by nothing else."""

    def logits(self, states: torch.Tensor) -> torch.Tensor:
        return 2 * (states @ CARRIER) @ CORNERS.T.to(states)


def planted(n: int, seed: int, *, ignoring: bool = False) -> tuple[Planted, np.ndarray]:
    """Base and source states, and the class that each source's state stands for."""
    draw = torch.Generator().manual_seed(seed)
    classes = torch.randint(4, (2 * n,), generator=draw)
    plane = CORNERS[classes].double() + 0.3 * torch.randn(2 * n, 2, generator=draw).double()
    rest = 2 * torch.randn(2 * n, WIDTH - 2, generator=draw).double()
    # a copy of the class that nothing reads, where a probe would find it as well
    rest[:, :2] += plane
    states = torch.cat([plane, rest], 1) @ TURN.T.double()
    if ignoring:
        states = states - states @ CARRIER @ CARRIER.T
    reading = object.__new__(Planted)
    parts = {"states": states, "tokens": (0, 1, 2, 3)}
    for name, value in parts.items():
        object.__setattr__(reading, name, value)
    return reading, classes[n:].numpy()


def search(train: Planted, test: Planted, *, rank: int = 2) -> _Search:
    found = object.__new__(_Search)
    parts = {"train": train, "test": test, "rank": rank, "epochs": 60, "lr": 0.05, "seed": 0}
    for name, value in parts.items():
        object.__setattr__(found, name, value)
    return found


def test_a_rotated_plane_is_found_and_a_placebo_is_not() -> None:
    (train, targets), (test, wanted) = planted(200, 0), planted(200, 1)
    find = search(train, test)
    basis, losses = find.learn(targets)
    angles = linalg.subspace_angles(basis.numpy(), CARRIER.numpy())
    assert np.rad2deg(angles.max()) < 30  # of random planes: 80
    assert losses[-1] < 0.3 < losses[0]
    assert find.hits(basis, wanted).mean() > 0.95
    assert find.hits(CARRIER, wanted).mean() > 0.95
    placebo = np.mean([find.placebo_hits(basis, wanted, seed) for seed in range(5)])
    assert placebo < 0.6
    copy = TURN[:, 2:4].double()  # decodable there, and of no use
    assert find.hits(copy, wanted).mean() < 0.4


def test_arbitrary_answers_are_not_learned() -> None:
    (train, targets), (test, wanted) = planted(200, 0), planted(200, 1)
    find = search(train, test)
    names = [f"class {k}" for k in (*targets, *wanted)]
    fake = find.arbitrary(names, 4)
    assert {(a, b) for a, b in zip(names, fake, strict=True)} == set(zip(names, fake, strict=True))
    assert len(set(zip(names, fake, strict=True))) == 4  # the same for the same
    basis, _ = find.learn(fake[:200])
    assert find.hits(basis, fake[200:]).mean() < 0.8


def test_where_the_plane_is_not_read_nothing_is_found() -> None:
    """The copy still tells the class: what decodes is not what is used."""
    (train, targets), (test, wanted) = (
        planted(200, 0, ignoring=True),
        planted(200, 1, ignoring=True),
    )
    find = search(train, test)
    basis, losses = find.learn(targets)
    assert losses[-1] > 0.9  # ln 4 is 1.39
    assert find.hits(basis, wanted).mean() < 0.5


def made(hits: float, placebo: float, arbitrary: float, n: int = 200) -> Subspace:
    def share(value: float) -> np.ndarray:
        return (np.arange(n) < value * n).astype(float)

    return Subspace(
        basis=np.eye(8)[:, :2],
        hypothesis="pointer",
        hits=share(hits),
        placebo=np.stack([share(placebo)] * 2),
        arbitrary=share(arbitrary),
        whole=share(1),
        groups=None,
        losses=(1.0, 0.1),
        where="latent[1] of hook_latent",
    )


@pytest.mark.parametrize(
    ("found", "verdict"),
    [
        (made(0.9, 0.2, 0.3), "found"),
        (made(0.9, 0.2, 0.9), "undecided"),  # any answers can be trained
        (made(0.9, 0.9, 0.3), "not found"),  # moving states as far does the same
        (made(0.2, 0.5, 0.1), "not found"),
        (made(0.3, 0.25, 0.1, n=20), "undecided"),
        (replace(made(0.9, 0.2, 0.3), whole=np.zeros(200)), "not found"),  # a sleeping path
    ],
)
def test_verdicts(found: Subspace, verdict: str) -> None:
    assert found.verdict(margin=0.05) == verdict
    assert repr(found).startswith("Subspace of rank 2 of 8 at latent[1] of hook_latent")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "hypothesis", "holds"),
    [
        ("latent-pointer", "pointer", True),
        ("latent-content", "content", True),
        ("latent-pointer", "content", False),
        ("latent-ignored-aligned", "content", False),
    ],
)
def test_organisms(name: str, hypothesis: str, holds: bool) -> None:
    lens = il.load(name)
    found = find_subspace(
        lens,
        lens.task(n=192, seed=3),
        hypothesis=hypothesis,
        rank=8,
        at=il.latent[1],
        epochs=25,
        batch_size=96,
    )
    print(found)
    assert (found.verdict(margin=0.05) == "found") == holds
    if holds:
        assert found.accuracy.ci().low > 0.8
        assert found.accuracy_whole.value > 0.95
        assert found.beyond_placebo.ci().low > 0.6
    else:
        assert found.accuracy.ci().high < 0.3
    np.testing.assert_allclose(found.basis.T @ found.basis, np.eye(8), atol=1e-5)
    assert all(parameter.requires_grad for parameter in lens.model.parameters())
    assert all(parameter.grad is None for parameter in lens.model.parameters())


def test_the_whole_space_is_a_swap() -> None:
    """With every dimension put in, the interchange is `lens.swap` at that step in fixed context."""
    lens = il.load("latent-content")
    task = lens.task(n=24, seed=3)
    answers = tuple(sorted({*task.base_answers, *task.source_answers}))
    reading = _Reading.of(lens, task, answers, "hook_latent", il.latent[1], 7)
    with torch.no_grad():
        swapped = reading.logits(reading.states[24:]).argmax(-1).tolist()
        kept = reading.logits(reading.states[:24] * (1 + 1e-6)).argmax(-1).tolist()
    result = lens.swap(task.base, task.source, at=il.latent[1], metric=il.kl, context="fixed")
    assert [answers[k] for k in swapped] == list(result.answers_after)
    assert [answers[k] for k in kept] == list(result.answers_before)
    assert swapped != kept


def wrong() -> Iterator[tuple[str, Callable[[], Any]]]:
    lens = il.load("latent-content")
    task = lens.task(n=40, seed=3)

    def call(pairs: Any = task, **how: Any) -> Callable[[], Any]:
        given = {"hypothesis": "content", "rank": 2, "at": il.latent[1]} | how
        return lambda: find_subspace(lens, pairs, **given)

    yield (
        "no hypothesis 'contents'; they have content, pointer, ignored",
        call(hypothesis="contents"),
    )
    yield "rank is 0; give at least 1", call(rank=0)
    yield "draws is 1; give at least 2", call(draws=1)
    yield "names 3 sites|names 5 sites", call(site="*.hook_resid_post")
    yield "latent selects 2 to 2 positions in a run", call(at=il.latent)
    yield "0 of 40 pairs are left to judge by", call(hypothesis="ignored")
    yield "2 of 4 pairs are left|1 of 4 pairs are left", call(task[:4])


def test_one_sentence_says_what_is_wrong() -> None:
    for message, call in wrong():
        with pytest.raises(InputError, match=message):
            call()


def test_groups_are_never_on_both_sides() -> None:
    from imaginelens.probes.interchange import _halves

    lens = il.load("latent-content")
    task = lens.task(n=60, seed=3)
    grouped = replace(task, groups=[i // 3 for i in range(60)])
    predicted = tuple(task.source_answers)
    halves: Any = getattr(_halves, "__wrapped__", _halves)
    train, test = halves(grouped, predicted, 0)
    assert not {row // 3 for row in train} & {row // 3 for row in test}
    assert len(train) == len(test) == 30
    again, _ = halves(grouped, predicted, 1)
    assert again != train
