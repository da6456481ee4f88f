"""What each baseline learns from, one small function each, with what is simplified.

Every function takes a `Learner` and a `Batch` and gives one number. The parts they are made of come
first: they see tensors only. All are means over examples of means within the example, so that
accumulated small batches give the gradient of the big one.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from examples.latent_baselines.encoding import Batch
from examples.latent_baselines.loop import Answers, Span, Thought, think

# (number of the base, number of the source, steps swapped) -> token ids of the answer that the
# mechanism implies, or None where it implies none
Rule = Callable[[int, int, tuple[int, ...]], Tensor | None]


@dataclass(frozen=True)
class Learner:
    """Who learns: the model, its span, and what an objective may need beside them.

    Attributes:
        teacher: what an earlier stage made, frozen.
        draw: randomness of this update.
        rule: what a swap of latents should do, for `interchange`.
    """

    model: Any
    span: Span
    draw: torch.Generator
    teacher: Any = None
    rule: Rule | None = None


Objective = Callable[[Learner, Batch], Tensor]


# ---- parts -------------------------------------------------------------------------------------


def words_loss(logits: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
    """Cross-entropy of the tokens that are not masked, averaged in each example, then over them.

    Args:
        logits: (example, position, vocab); ids, mask: (example, position).
    """
    losses = F.cross_entropy(logits.transpose(1, 2).float(), ids, reduction="none")
    return ((losses * mask).sum(1) / mask.sum(1)).mean()


def away(states: Tensor, aims: Tensor) -> Tensor:
    """1 - cosine, averaged over everything but the last axis."""
    return 1 - F.cosine_similarity(states.float(), aims.float(), dim=-1).mean()


def apart(states: Tensor, aims: Tensor) -> Tensor:
    """Mean squared difference."""
    return F.mse_loss(states.float(), aims.float())


def layers_away(states: Tensor, aims: Tensor, mask: Tensor) -> Tensor:
    """1 - cosine at the positions that are not masked, of all layers alike.

    Args:
        states, aims: (layer, example, position, d_model).
        mask: (example, position).
    """
    cosines = F.cosine_similarity(states.float(), aims.float(), dim=-1)
    kept = mask.to(cosines)
    return 1 - ((cosines * kept).sum(2) / kept.sum(1)).mean()


def through_latents(loss: Tensor, own: Tensor, fed: list[Tensor]) -> Tensor:
    """A number whose gradient is the loss's, as far as it goes through the latents.

    `fed` are leaves, equal to `own` in value: the gradient at them is handed to what made them, and
    nothing else learns from the loss.
    """
    gradients = torch.autograd.grad(loss, fed, retain_graph=True)
    return (own * torch.stack(gradients, dim=1)).sum()


def spoken(learner: Learner, thought: Thought, answers: Answers) -> Tensor:
    """Cross-entropy of all that the model writes: open marker, close marker, answer.

    Nothing is asked of the output at latent steps, as in all the recipes below.
    """
    opened, closed = (
        torch.full_like(answers.ids[:, :1], token)
        for token in (learner.span.open, learner.span.close)
    )
    states = torch.cat(
        [thought.opening[:, None], thought.closing[:, None], thought.answering], dim=1
    )
    ids = torch.cat([opened, closed, answers.ids], dim=1)
    marks = torch.ones_like(ids[:, :2])
    return words_loss(learner.model.lm_head(states), ids, torch.cat([marks, answers.mask], dim=1))


def _aims(batch: Batch) -> Tensor:
    if batch.targets is None:
        raise ValueError("a chain of this batch shows no picture in its reply to align latents to")
    return batch.targets


def _hint(batch: Batch) -> Any:
    if batch.hinted is None:
        raise ValueError("a chain of this batch shows no picture in its reply for the teacher")
    return batch.hinted


# ---- objectives --------------------------------------------------------------------------------


def coconut(learner: Learner, batch: Batch) -> Tensor:
    """Nothing but words: latents are what helps to say them (Coconut, arXiv 2412.06769).

    Simplified: no curriculum that replaces written steps by latents one after the other; all are
    latent from the first update.
    """
    thought = think(learner.model, learner.span, batch.page, batch.answers)
    return spoken(learner, thought, batch.answers)


def mirage_align(learner: Learner, batch: Batch) -> Tensor:
    """Mirage's first stage: 0.1 * cross-entropy + (1 - cosine to the helper's features).

    The features themselves are fed (src/trainer.py:17-24 and modeling:2089-2143 of its release).
    Simplified: one span before the answer, whatever text the chain has between its pictures.
    """
    aims = _aims(batch)
    thought = think(
        learner.model, learner.span, batch.page, batch.answers, edit=lambda step, _: aims[:, step]
    )
    return 0.1 * spoken(learner, thought, batch.answers) + away(thought.own, aims)


def mirage_free(learner: Learner, batch: Batch) -> Tensor:
    """Mirage's second stage: the model's own states are fed, and only words are scored."""
    return coconut(learner, batch)


def lvr(learner: Learner, batch: Batch) -> Tensor:
    """LVR's first stage: cross-entropy + 0.1 * MSE to the region's visual tokens, which are fed.

    Simplified: as many latents as the span has steps, where LVR has one for each token of the
    region; no reinforcement learning behind it; no head.
    """
    aims = _aims(batch)
    thought = think(
        learner.model, learner.span, batch.page, batch.answers, edit=lambda step, _: aims[:, step]
    )
    return spoken(learner, thought, batch.answers) + 0.1 * apart(thought.own, aims)


def monet_teach(learner: Learner, batch: Batch) -> Tensor:
    """Monet's first stage: answering with the auxiliary pictures in view, and no latents.

    Simplified: all pictures stand before the answer, and there is no observation whose words would
    count double.
    """
    plain = replace(learner, span=replace(learner.span, steps=0))
    thought = think(plain.model, plain.span, _hint(batch), batch.answers)
    return spoken(plain, thought, batch.answers)


def monet_distil(learner: Learner, batch: Batch) -> Tensor:
    """Monet's second stage: latents that see the pictures stand in for them.

    Each latent sees the pictures up to its own, not those of later steps. What follows the span
    sees none, and its states, of all layers, are drawn to the first stage's, which sees all:
    2.0 * (1 - cosine), learned through the latents alone. Simplified: one span behind all pictures;
    the states aligned are those of the close marker and the answer, for there is no observation;
    its extra weights on observations (4.0) and on the latents' gradient (2.0) are left out.
    """
    hint, answers = _hint(batch), batch.answers
    with torch.no_grad():
        shown = think(
            learner.teacher, replace(learner.span, steps=0), hint, answers, layers=True
        ).answering_layers
    leaves: list[Tensor] = []

    def cut(step: int, state: Tensor) -> Tensor:
        leaves.append(state.detach().requires_grad_())
        return leaves[-1]

    thought = think(
        learner.model, learner.span, hint, answers, edit=cut, layers=True, hide_aid=True
    )
    loss = layers_away(thought.answering_layers, shown, answers.mask)
    return spoken(learner, thought, answers) + 2.0 * through_latents(loss, thought.own, leaves)


def monet_recall(learner: Learner, batch: Batch) -> Tensor:
    """Monet's third stage: without the pictures, latents like the second stage's.

    Cross-entropy + 2.0 * (1 - cosine), of the states of all layers from which latents are fed.
    Simplified: the second stage's model computes them beside the student, where Monet stores them.
    """
    with torch.no_grad():
        taught = think(
            learner.teacher, learner.span, _hint(batch), batch.answers, layers=True
        ).own_layers
    thought = think(learner.model, learner.span, batch.page, batch.answers, layers=True)
    everywhere = torch.ones_like(thought.own[..., 0])
    return spoken(learner, thought, batch.answers) + 2.0 * layers_away(
        thought.own_layers, taught, everywhere
    )


def interchange(learner: Learner, batch: Batch) -> Tensor:
    """Interchange-intervention training (arXiv 2112.00826): latents mean what the rule says.

    A second copy of each example is fed latents of the example before it, at a random set of steps;
    right is what the rule says. With pictures in the replies, plus 5.0 * (1 - cosine) to them, as
    the organisms of this library were made. Ours; no released model was trained so.
    """
    if learner.rule is None:
        raise ValueError("interchange training needs a rule: what a swap of latents should do")
    swapped, twisted = _draw_swaps(learner, batch)

    def edit(step: int, state: Tensor) -> Tensor:
        clean, twin = state[::2], state[1::2]
        twin = torch.where(swapped[:, step, None], clean.roll(1, 0), twin)
        return torch.stack([clean, twin], dim=1).flatten(0, 1)

    answers = _interleaved(batch.answers, twisted)
    thought = think(learner.model, learner.span, batch.page, answers, edit=edit, copies=2)
    loss = 2 * spoken(learner, thought, answers)
    if batch.targets is not None:
        loss = loss + 5.0 * away(thought.own[::2], batch.targets)
    return loss


def _draw_swaps(learner: Learner, batch: Batch) -> tuple[Tensor, list[Tensor]]:
    """Which steps are swapped in each example, and the answer that is right then.

    Steps for which the rule says nothing are not swapped, and the answer stays.
    """
    assert learner.rule is not None
    steps, bases = learner.span.steps, batch.numbers.tolist()
    sources = bases[-1:] + bases[:-1]
    picks = torch.randint(1, 2**steps, (len(bases),), generator=learner.draw).tolist()
    masks, right = [], []
    for row, (base, source, bits) in enumerate(zip(bases, sources, picks, strict=True)):
        chosen = tuple(t for t in range(steps) if bits >> t & 1)
        answer = learner.rule(base, source, chosen)
        if answer is None:
            real = batch.answers.mask[row].bool()
            chosen, answer = (), batch.answers.ids[row, real]
        masks.append([t in chosen for t in range(steps)])
        right.append(answer.to(batch.answers.ids.device))
    return torch.tensor(masks, device=batch.answers.ids.device), right


def _interleaved(answers: Answers, twisted: list[Tensor]) -> Answers:
    """Rows 2i are the answers, rows 2i + 1 the twisted ones."""
    plain = [ids[mask.bool()] for ids, mask in zip(answers.ids, answers.mask, strict=True)]
    rows = [row for both in zip(plain, twisted, strict=True) for row in both]
    masks = [torch.ones_like(row) for row in rows]
    together = torch.nn.utils.rnn.pad_sequence
    return Answers(together(rows, batch_first=True), together(masks, batch_first=True))
