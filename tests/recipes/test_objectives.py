"""Each objective is the number its paper writes, on tensors planted so that it is known."""

import math
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from latent_chains import hunts, ragged, tiny_lens
from torch import Tensor

from examples.latent_baselines import objectives, rules
from examples.latent_baselines.encoding import Batch, as_batch, collate, encode
from examples.latent_baselines.loop import Answers, Span, Thought, span_of, think
from examples.latent_baselines.objectives import Learner
from imaginelens.hooks.errors import InputError
from imaginelens.organisms.hunt import HYPOTHESES, sample


def _learner(folder: Path, *, rule: objectives.Rule | None = None) -> tuple[Learner, Batch]:
    """A tiny random model with a ragged batch, and another such model as its teacher."""
    folder.mkdir(parents=True, exist_ok=True)
    lens, span = tiny_lens("organism"), Span(3, 4, 2)
    assert span_of(lens) == span
    items, _ = encode(lens, span, ragged(folder))
    batch = as_batch(collate(items, pad_id=0))
    teacher = tiny_lens("organism").model.requires_grad_(False)
    draw = torch.Generator().manual_seed(0)
    return Learner(lens.model.requires_grad_(True), span, draw, teacher, rule), batch


def _close(found: Tensor, wanted: Tensor | float) -> None:
    torch.testing.assert_close(
        found.double(), torch.as_tensor(wanted).double(), rtol=1e-6, atol=1e-9
    )


# ---- parts -------------------------------------------------------------------------------------


def test_words_that_are_masked_are_not_scored_and_examples_weigh_alike() -> None:
    logits = torch.zeros(2, 3, 5, dtype=torch.float64)
    logits[0, 0, 1] = math.log(4)  # 4 of 8
    ids = torch.tensor([[1, 0, 0], [2, 3, 4]])
    mask = torch.tensor([[1, 0, 0], [1, 1, 1]])
    _close(objectives.words_loss(logits, ids, mask), (math.log(2) + math.log(5)) / 2)
    logits[0, 1:] = 7.0 * torch.arange(5)
    _close(objectives.words_loss(logits, ids, mask), (math.log(2) + math.log(5)) / 2)
    wrong = torch.tensor([[1, 1, 0], [1, 1, 1]])
    assert objectives.words_loss(logits, ids, wrong) > 5


def test_alignment_knows_the_angle_and_the_distance() -> None:
    aims = torch.eye(2, dtype=torch.float64).expand(3, 2, 2)
    _close(objectives.away(5 * aims, aims), 0.0)
    _close(objectives.away(-aims, aims), 2.0)
    _close(objectives.away(torch.ones_like(aims), aims), 1 - math.sqrt(0.5))
    _close(objectives.apart(5 * aims, aims), 8.0)
    # latents one step late are orthogonal to what they should be
    _close(objectives.away(aims.roll(1, 1), aims), 1.0)
    _close(objectives.apart(aims.roll(1, 1), aims), 1.0)


def test_layers_are_aligned_where_the_mask_says() -> None:
    aims = torch.tensor([1.0, 0.0]).expand(2, 1, 3, 2)  # two layers, one example, three positions
    states = torch.tensor(
        [[[[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0]]], [[[2.0, 0.0], [3.0, 0.0], [9.0, 9.0]]]]
    )
    mask = torch.tensor([[1, 1, 0]])
    _close(objectives.layers_away(states, aims, mask), 1 - (0.5 + 1.0) / 2)
    _close(objectives.layers_away(states, aims, mask.flip(1)), 1 - (-0.5 + (1 + 0.5**0.5) / 2) / 2)


def test_a_loss_is_learned_through_the_latents_alone() -> None:
    weight = torch.tensor(3.0, requires_grad=True)
    own = weight * torch.tensor([[[2.0], [5.0]]])  # (row, step, d_model)
    fed = [own[:, step].detach().requires_grad_() for step in range(2)]
    loss = (7 * fed[0] + fed[1] ** 2 + 100 * weight).sum()
    proxy = objectives.through_latents(loss, own, fed)
    (gradient,) = torch.autograd.grad(proxy, weight)
    _close(gradient, 7 * 2 + 2 * 15 * 5)  # nothing of the 100


def test_all_that_is_written_is_scored_and_nothing_else() -> None:
    """States are one-hot and the head is the identity: the model says what its states show."""
    size, span = 6, Span(open=1, close=2, steps=2)
    eye = 100 * torch.eye(size)
    thought = Thought(
        opening=eye[[1]],
        own=torch.full((1, 2, size), 9.0),
        fed=torch.full((1, 2, size), 9.0),
        closing=eye[[2]],
        answering=eye[[4, 5, 0]][None],
    )
    learner: Any = SimpleNamespace(model=SimpleNamespace(lm_head=lambda states: states), span=span)
    answers = Answers(torch.tensor([[4, 5, 3]]), torch.tensor([[1, 1, 0]]))
    _close(objectives.spoken(learner, thought, answers), 0.0)
    swapped = replace(thought, opening=eye[[2]], closing=eye[[1]])
    _close(objectives.spoken(learner, swapped, answers), 2 * 100 / 4)


# ---- objectives --------------------------------------------------------------------------------


def test_mirage_and_lvr_feed_the_pictures_and_compare_what_would_have_been_fed(
    tmp_path: Path,
) -> None:
    learner, batch = _learner(tmp_path)
    aims = batch.targets
    thought = think(
        learner.model, learner.span, batch.page, batch.answers, edit=lambda step, _: aims[:, step]
    )
    said = objectives.spoken(learner, thought, batch.answers)
    cosine = (thought.own * aims).sum(-1) / thought.own.norm(dim=-1) / aims.norm(dim=-1)
    _close(objectives.mirage_align(learner, batch), 0.1 * said + (1 - cosine).mean())
    squares = (thought.own - aims).square().mean()
    _close(objectives.lvr(learner, batch), said + 0.1 * squares)
    # pictures in the wrong order are other aims, and other inputs
    late = replace(batch, targets=aims.roll(1, 1))
    for objective in (objectives.mirage_align, objectives.lvr):
        assert (objective(learner, late) - objective(learner, batch)).abs() > 1e-4


@pytest.mark.parametrize("objective", [objectives.coconut, objectives.mirage_free])
def test_without_supervision_the_pictures_of_the_reply_do_not_matter(
    tmp_path: Path, objective: Callable[[Learner, Batch], Tensor]
) -> None:
    learner, batch = _learner(tmp_path)
    bare = replace(batch, targets=None, hinted=None)
    assert torch.equal(objective(learner, batch), objective(learner, bare))
    thought = think(learner.model, learner.span, batch.page, batch.answers)
    _close(objective(learner, batch), objectives.spoken(learner, thought, batch.answers))


def test_objectives_that_need_pictures_say_so(tmp_path: Path) -> None:
    learner, batch = _learner(tmp_path)
    bare = replace(batch, targets=None, hinted=None)
    for objective in (objectives.mirage_align, objectives.monet_teach, objectives.monet_recall):
        with pytest.raises(ValueError, match="shows no picture"):
            objective(learner, bare)


def test_monets_teacher_sees_the_pictures_and_has_no_latents(tmp_path: Path) -> None:
    learner, batch = _learner(tmp_path)
    none = replace(learner.span, steps=0)
    thought = think(learner.model, none, batch.hinted, batch.answers)
    assert thought.own.shape[1] == 0
    said = objectives.spoken(replace(learner, span=none), thought, batch.answers)
    _close(objectives.monet_teach(learner, batch), said)
    image = learner.model.config.image_token_id
    seen, more = ((page.ids == image).sum(1) for page in (batch.page, batch.hinted))
    pictures = torch.tensor([2, 1, 2, 1])
    assert torch.equal(
        (batch.hinted.aid > 0).sum(1), more - seen + 2 * pictures
    )  # two markers each
    assert not batch.page.aid.any()
    assert [sorted(set(row.tolist())) for row in batch.hinted.aid] == [
        [0, 1, 2], [0, 1], [0, 1, 2], [0, 1],
    ]  # fmt: skip


def test_monets_latents_are_drawn_to_the_teachers_states_and_nothing_else_is(
    tmp_path: Path,
) -> None:
    learner, batch = _learner(tmp_path)
    # a teacher that writes the very same, without latents and with the pictures in view
    fed: list[Tensor] = []

    def keep(step: int, state: Tensor) -> Tensor:
        fed.append(state.detach().requires_grad_())
        return fed[-1]

    thought = think(
        learner.model, learner.span, batch.hinted, batch.answers, edit=keep, layers=True,
        hide_aid=True,
    )  # fmt: skip
    shown = think(
        learner.teacher, replace(learner.span, steps=0), batch.hinted, batch.answers, layers=True
    ).answering_layers
    cosines = torch.nn.functional.cosine_similarity(thought.answering_layers, shown, dim=-1)
    mask = batch.answers.mask
    loss = 1 - torch.stack([(c * mask).sum(1) / mask.sum(1) for c in cosines]).mean()
    by_latent = torch.autograd.grad(loss, fed, retain_graph=True)
    said = objectives.spoken(learner, thought, batch.answers)
    wanted = said + 2 * sum(
        (thought.own[:, step] * by_latent[step]).sum() for step in range(learner.span.steps)
    )
    found = objectives.monet_distil(learner, batch)
    weight = learner.model.model.language_model.layers[1].self_attn.v_proj.weight
    gradients = [torch.autograd.grad(number, weight)[0] for number in (found, wanted)]
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-8)


def test_monets_last_stage_wants_the_second_stages_latents(tmp_path: Path) -> None:
    learner, batch = _learner(tmp_path)
    # the teacher is an equal model: shown what it is shown, nothing is left to learn but words
    same = replace(batch, page=batch.hinted)
    thought = think(learner.model, learner.span, same.page, same.answers)
    _close(
        objectives.monet_recall(learner, same), objectives.spoken(learner, thought, same.answers)
    )
    plain = think(learner.model, learner.span, batch.page, batch.answers)
    said = objectives.spoken(learner, plain, batch.answers)
    assert objectives.monet_recall(learner, batch) - said > 1e-3


# ---- interchange -------------------------------------------------------------------------------


def _spelled(*ids: int) -> Tensor:
    return torch.tensor([*ids, 2])


def test_swapped_copies_are_scored_by_the_rule(tmp_path: Path) -> None:
    asked: list[tuple[int, int, tuple[int, ...]]] = []

    def rule(base: int, source: int, steps: tuple[int, ...]) -> Tensor | None:
        asked.append((base, source, steps))
        return _spelled(50 + source) if 1 in steps else None

    learner, batch = _learner(tmp_path, rule=rule)
    batch = replace(batch, targets=None)
    loss = objectives.interchange(learner, batch)
    assert [(base, source) for base, source, _ in asked] == [(0, 3), (1, 0), (2, 1), (3, 2)]
    subsets = [steps for _, _, steps in asked]
    assert {(0,), (1,), (0, 1)} >= set(subsets) > {(0, 1)}

    plain = [ids[m.bool()] for ids, m in zip(batch.answers.ids, batch.answers.mask, strict=True)]
    clean = think(learner.model, learner.span, batch.page, batch.answers)
    scores = []
    for row, steps in enumerate(subsets):
        used = steps if 1 in steps else ()
        right = _spelled(50 + (row - 1) % 4) if used else plain[row]

        def edit(step: int, state: Tensor, used: Any = used) -> Tensor:
            return clean.own[:, step].roll(1, 0) if step in used else state

        answers = Answers(right.expand(4, -1), torch.ones(4, len(right), dtype=torch.long))
        one = think(learner.model, learner.span, batch.page, answers, edit=edit)
        picked = Thought(
            **{n: getattr(one, n)[[row]] for n in ("opening", "own", "fed", "closing", "answering")}
        )
        single = Answers(right[None], torch.ones(1, len(right), dtype=torch.long))
        scores.append(objectives.spoken(learner, picked, single))
    plainly = objectives.spoken(learner, clean, batch.answers)
    _close(loss, plainly + torch.stack(scores).mean())


def test_the_same_update_draws_the_same_swaps_and_another_draws_others(tmp_path: Path) -> None:
    seen: list[tuple[int, ...]] = []

    def rule(base: int, source: int, steps: tuple[int, ...]) -> Tensor:
        seen.append(steps)
        return _spelled(9)

    learner, batch = _learner(tmp_path, rule=rule)
    for seed in (1, 1, 2):
        objectives.interchange(replace(learner, draw=torch.Generator().manual_seed(seed)), batch)
    first, again, other = seen[:4], seen[4:8], seen[8:]
    assert first == again != other


def test_boards_are_read_off_their_pixels(tmp_path: Path) -> None:
    chains = hunts(tmp_path, 64, seed=5)
    read = [rules.hunt_of(chain) for chain in chains]
    assert read == [replace(hunt, noise=0) for hunt in sample(64, hops=2, seed=5)]
    assert rules.hunt_of(replace(chains[0], prompt=("start red then shape ?",))) is None
    assert rules.hunt_of(ragged(tmp_path / "other")[0]) is None


@pytest.mark.parametrize("name", rules.RULES)
def test_the_rules_of_hunts_are_the_organisms_hypotheses(tmp_path: Path, name: str) -> None:
    chains, true = hunts(tmp_path, 8, seed=6), sample(8, hops=2, seed=6)
    tokenizer = _organism_words()
    rule = rules.make(name, chains, tokenizer, steps=2)
    for steps in ((0,), (1,), (0, 1)):
        wanted = [HYPOTHESES[name](true[i], true[i - 1], steps) for i in range(8)]
        found = [tokenizer.decode(rule(i, (i - 1) % 8, steps)[:-1]) for i in range(8)]
        assert found == wanted


def test_of_other_chains_only_the_answer_can_be_in_the_last_latent(tmp_path: Path) -> None:
    lens = tiny_lens("organism")
    chains = ragged(tmp_path)
    rule = rules.make("content", chains, lens.tokenizer, steps=2)
    assert rule(0, 2, (0,)) is None
    assert lens.tokenizer.decode(rule(0, 2, (0, 1))[:-1]) == "maybe"
    with pytest.raises(InputError, match="no treasure hunt"):
        rules.make("pointer", chains, lens.tokenizer, steps=2)


@cache
def _organism_words() -> Any:
    from imaginelens.organisms.checkpoint import build_tokenizer

    return build_tokenizer()
