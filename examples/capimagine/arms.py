"""What is done to imagination, in words and in latents: the same arms for both, as far as they go.

The paper (arXiv 2602.22766) replaces latents by something uninformative, and rewrites text toward
a wrong conclusion: two things at once differ between its two experiments, the space and the aim.
Here each aim meets each space. Neutral arms take content away, or leave it and change its form;
they point to no answer. Targeted arms put there what leads to an answer that is known beforehand.

There is no exact analogue in latents of a paraphrase. We add noise of a tenth of each latent's
norm, which is small, and say so. The analogue of text that was rewritten is what the model itself
imagines when the input is edited in that point: its latents then say what the rewritten text says.
"""

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch

import imaginelens as il
from examples.capimagine.benchmark_layouts import Question
from examples.capimagine.matcher import LETTERS
from examples.capimagine.phrasing import caption, paraphrase, parse, phrased
from imaginelens.hooks import LatentModel, Run
from imaginelens.hooks.edits import Edit, EditContext
from imaginelens.hooks.positions import Positions
from imaginelens.hooks.textedits import Ids, Rewrite, TextContext, TextEdit, respell
from imaginelens.hooks.textspans import TextSpec, find_spans
from imaginelens.mediation.folds import Reference, Within
from imaginelens.organisms.hunt import NAMES, SHAPES, Hunt
from imaginelens.organisms.organism import example as hunt_example

Context = Literal["free", "fixed"]
Form = Literal["captions", "names", "words", "latents", "nothing"]
SMALL = 0.1  # of a latent's norm: the noise that stands for a paraphrase


@dataclass(frozen=True)
class Arm:
    """One thing to do.

    Attributes:
        kind: `control` must change nothing; `neutral` points to no answer; `targeted` to a known
            one.
        words, latents: what it is in either space.
    """

    name: str
    kind: Literal["control", "neutral", "targeted"]
    words: str
    latents: str


ARMS = (
    Arm("sham", "control", "put back as it was", "put back as they were"),
    Arm("paraphrase", "neutral", "the same in other words", f"noise of {SMALL:.0%} of the norm"),
    Arm("shuffle", "neutral", "its tokens in another order", "steps in another order"),
    Arm("other instance", "neutral", "of another input, at random", "of another input, at random"),
    Arm("delete", "neutral", "removed with its markers", "never fed (fixed: hidden from all)"),
    Arm("donor", "targeted", "of an input with another answer", "of an input with another answer"),
    Arm("wrong shape", "targeted", "the last caption's shape", "of the hunt with that shape"),
    Arm("wrong card", "targeted", "as of a hunt that leads elsewhere", "of that hunt"),
    Arm("first step", "targeted", "the first card of such a hunt", "the first latent of it"),
    Arm("wrong conclusion", "targeted", "rewritten by a model", "none: needs an edited input"),
)


@dataclass(frozen=True)
class Item:
    """One example, and the other one that it may get its imagination from."""

    question: Question
    partner: Question
    hunt: Hunt | None = None
    other: Hunt | None = None


@dataclass(frozen=True)
class Deed:
    """An arm on a batch.

    Attributes:
        readings: for each way to read what is put there, the answer that it leads to, by example;
            None where nothing was put, or its answer is not known.
    """

    edit: Edit | il.Skip
    at: Positions
    readings: Mapping[str, Sequence[str | None]] = field(default_factory=dict)


Captions = Callable[[Sequence[Item], Sequence[Sequence[str]], Sequence[str | None]], Any]


@dataclass(frozen=True)
class Rewriters:
    """Models that rewrite captions: of some items, their captions and answers.

    Attributes:
        same: gives the captions in other words; None for an example where it could not.
        wrong: gives the captions and the answer that they lead to.
    """

    same: Captions | None = None
    wrong: Captions | None = None


@dataclass
class Batch:
    """Some examples before anything is done, and what arms draw on.

    Attributes:
        run, source: unedited runs of the items and of their partners.
        reference: unedited runs of all partners.
    """

    lens: LatentModel
    items: Sequence[Item]
    run: Run
    source: Run
    reference: Reference
    answers: Sequence[str | None]
    form: Form
    rewriters: Rewriters
    seed: int = 0

    @property
    def at(self) -> Positions:
        """What is imagined."""
        family = self.lens.family
        if isinstance(family, TextSpec):
            return il.imagination.between(family.open, family.close)
        return il.latent

    def lined_up(self, donor: Run) -> Positions:
        """What a donor's imagination is put in place of: of latents, as many as each example of it
        has, as an edited run may open another span and go on for longer than its donor."""
        counts = [n for n in donor.trigger.emitted if n] if self.form == "latents" else []
        return il.latent[: min(counts)] if counts else self.at

    @property
    def captions(self) -> list[list[str]]:
        """What each example imagined in words, span by span."""
        return imagined(self.lens, self.run)

    @property
    def own(self) -> list[str]:
        """The right answers."""
        return [item.question.answer for item in self.items]


def imagined(lens: LatentModel, run: Run) -> list[list[str]]:
    """The words in the spans of each row of a run; none for models that imagine in latents."""
    if not isinstance(lens.family, TextSpec):
        return [[] for _ in range(len(run))]
    open, close = lens.family.open, lens.family.close
    return [
        [
            "".join(run.tokens.texts(row, list(range(span.start, span.stop)))).strip()
            for span in find_spans(run.tokens, row, open, close)
        ]
        for row in range(len(run))
    ]


def form_of(lens: LatentModel, run: Run) -> Form:
    """How a model imagines: as the captions of `phrasing`, as bare names of cards, or in any words.

    It is what most examples do.
    """
    if lens.spec is not None:
        return "latents" if any(run.trigger.emitted) else "nothing"
    spans = [text for row in imagined(lens, run) for text in row]
    if not spans:
        return "nothing"
    if 2 * sum(parse(text) is not None for text in spans) > len(spans):
        return "captions"
    names = sum(bool(text) and set(text.split()) <= set(NAMES) for text in spans)
    return "names" if 2 * names > len(spans) else "words"


# ---- edits that only this study needs ----------------------------------------------------------


@dataclass(frozen=True)
class SpanTexts(TextEdit):
    """Write texts of their own into each row's spans; None leaves a span as it is."""

    to: tuple[tuple[str | None, ...], ...]


@respell.register
def _(edit: SpanTexts, ids: Ids, ctx: TextContext) -> Ids | None:
    texts = edit.to[ctx.row]
    new = texts[ctx.number] if ctx.number < len(texts) else None
    return list(ids) if new is None else respell(Rewrite(new), ids, ctx)


@dataclass(frozen=True)
class Jitter(Edit):
    """Add to each state noise of `size` times its norm, in a random direction."""

    size: float = SMALL
    seed: int = 0

    def apply(self, act: torch.Tensor, ctx: EditContext) -> torch.Tensor:
        noise = ctx.normal(self.seed, act).double()
        noise = noise / noise.norm(dim=-1, keepdim=True)
        norm = act.double().norm(dim=-1, keepdim=True)
        return (act.double() + self.size * norm * noise).to(act)


# ---- hunts, edited in one point ----------------------------------------------------------------


def with_shape(hunt: Hunt, seed: int) -> Hunt:
    """The hunt with another shape on its last card, drawn by the seed.

    >>> from imaginelens.organisms.hunt import sample
    >>> hunt = sample(1, hops=2, seed=0)[0]
    >>> edited = with_shape(hunt, seed=1)
    >>> edited.path == hunt.path, edited.answer != hunt.answer
    (True, True)
    """
    wrong = _draw(seed, hunt, [shape for shape in SHAPES if shape != hunt.answer])
    shapes = list(hunt.shapes)
    for place, name in enumerate(hunt.names):
        if name == hunt.path[-1]:
            shapes[place] = wrong
    return replace(hunt, shapes=tuple(shapes))


def with_step(hunt: Hunt, step: int, seed: int) -> Hunt | None:
    """The hunt with another card after `step` hops, so that it ends at another shape.

    Only the pointer that leads there is changed. None if there is no such card.

    >>> from imaginelens.organisms.hunt import sample
    >>> hunt = sample(1, hops=2, seed=0)[0]
    >>> edited = with_step(hunt, 2, seed=1)
    >>> edited.path[:2] == hunt.path[:2], edited.answer != hunt.answer
    (True, True)
    """
    place = hunt.names.index(hunt.path[step - 1])
    possible = []
    for name in NAMES:
        if name in (hunt.path[step - 1], hunt.path[step]):
            continue
        pointers = (*hunt.pointers[:place], name, *hunt.pointers[place + 1 :])
        edited = replace(hunt, pointers=pointers)
        # on the board as it is, too: a path that comes back must not meet the edit again
        last = hunt.follow(name, hunt.hops - step)[-1]
        if hunt.shape_of(last) == edited.answer != hunt.answer:
            possible.append(edited)
    return _draw(seed, hunt, possible) if possible else None


def _draw(seed: int, hunt: Hunt, choices: Sequence[Any]) -> Any:
    return random.Random(f"{seed} {hunt.noise} {hunt.start} {hunt.names}").choice(choices)


def letter(shape: str) -> str:
    """A shape as the letter that it has among the options of a hunt."""
    return LETTERS[SHAPES.index(shape)]


# ---- arms on a batch ---------------------------------------------------------------------------


def deed(batch: Batch, arm: Arm, context: Context) -> Deed | None:
    """What an arm is for a batch; None where it is nothing there."""
    bank = _WORDS
    if batch.form in ("latents", "nothing"):  # of nothing, so that it is seen to touch nothing
        bank = _LATENTS if batch.form == "latents" else _BOTH
    make = bank.get(arm.name)
    return None if make is None else make(batch, context)


def _donor(batch: Batch, context: Context) -> Deed:
    readings: dict[str, Sequence[str | None]] = {"content": _donated(batch)}
    hunts = [(item.hunt, item.other) for item in batch.items]
    if all(base and other for base, other in hunts):
        readings["pointer"] = [
            letter(base.shape_of(other.path[-1])) for base, other in hunts if base and other
        ]
    at = batch.lined_up(batch.source)
    return Deed(il.Swap(batch.source), at, {**readings, "own": batch.own})


def _donated(batch: Batch) -> list[str | None]:
    """The partner's answer as a letter of the base's own options, if it is among them."""
    found: list[str | None] = []
    for item in batch.items:
        options, other = item.question.options, item.partner
        if not options:
            found.append(other.answer)
            continue
        said = other.options[LETTERS.index(other.answer)] if other.options else other.answer
        same = [i for i, option in enumerate(options) if option.casefold() == said.casefold()]
        found.append(LETTERS[same[0]] if same else None)
    return found


def _edited(batch: Batch, how: str) -> list[Hunt | None]:
    """The hunts of a batch, edited in one point."""

    def one(hunt: Hunt | None) -> Hunt | None:
        if hunt is None:
            return None
        if how == "wrong shape":
            return with_shape(hunt, batch.seed)
        step = hunt.hops if how == "wrong card" else 1
        if how == "first step" and hunt.hops < 2:
            return None
        return with_step(hunt, step, batch.seed)

    return [one(item.hunt) for item in batch.items]


def _aims(batch: Batch, how: str, hunts: Sequence[Hunt | None]) -> dict[str, Sequence[str | None]]:
    """What is put there leads to the edited hunt's answer, if it is read at all."""
    reading = "content" if how == "wrong shape" else "followed"
    return {reading: [None if h is None else letter(h.answer) for h in hunts], "own": batch.own}


def _latents_of(how: str) -> Callable[[Batch, Context], Deed | None]:
    """Latents of the same hunts, edited in one point."""

    def make(batch: Batch, context: Context) -> Deed | None:
        hunts = _edited(batch, how)
        if not any(hunts):
            return None
        given = [h or item.hunt for h, item in zip(hunts, batch.items, strict=True)]
        donor = batch.lens.run([hunt_example(h) for h in given if h is not None])
        at = il.latent[0] if how == "first step" else batch.lined_up(donor)
        return Deed(il.Swap(donor), at, _aims(batch, how, hunts))

    return make


def _words_of(how: str) -> Callable[[Batch, Context], Deed | None]:
    """The words for the same hunts, edited in one point."""

    def make(batch: Batch, context: Context) -> Deed | None:
        hunts = _edited(batch, how)
        texts = [
            None if hunt is None else _respoken(hunt, spans, batch.form, how)
            for hunt, spans in zip(hunts, batch.captions, strict=True)
        ]
        if not any(texts):
            return None
        aims = _aims(batch, how, [h if t else None for h, t in zip(hunts, texts, strict=True)])
        return Deed(SpanTexts(tuple(t or () for t in texts)), batch.at, aims)

    return make


def _respoken(
    hunt: Hunt, spans: Sequence[str], form: Form, how: str
) -> tuple[str | None, ...] | None:
    """What stands in the spans when an edited hunt is imagined, in the phrasings that they had."""
    if form == "captions":
        if len(spans) != hunt.hops or not all(parse(span) for span in spans):
            return None
        last = 1 if how == "first step" else hunt.hops  # the model itself goes on from the first
        return tuple(
            caption(name, hunt.follow(name, 1)[-1], hunt.shape_of(name), how=phrased(span) or 0)
            for name, span in zip(hunt.path[1 : last + 1], spans, strict=False)
        )
    if form != "names" or how != "wrong card" or not spans:
        return None
    words = spans[-1].split()
    return (*[None] * (len(spans) - 1), " ".join([*words[:-1], hunt.path[-1]]))


def _paraphrased(batch: Batch, context: Context) -> Deed | None:
    if batch.form == "captions":
        again = lambda old: paraphrase(old, batch.seed) if parse(old) else old  # noqa: E731
        return Deed(Rewrite(again), batch.at)
    if batch.form != "words" or batch.rewriters.same is None:
        return None
    texts = batch.rewriters.same(batch.items, batch.captions, batch.answers)
    return Deed(SpanTexts(tuple(tuple(t or ()) for t in texts)), batch.at)


def _misled(batch: Batch, context: Context) -> Deed | None:
    if batch.rewriters.wrong is None:
        return None
    found = batch.rewriters.wrong(batch.items, batch.captions, batch.answers)
    texts = tuple(tuple(captions or ()) for captions, _ in found)
    return Deed(SpanTexts(texts), batch.at, {"content": [a for _, a in found], "own": batch.own})


def _deleted(batch: Batch, context: Context) -> Deed:
    return Deed(il.Skip() if context == "free" else il.Forget(), batch.at)


_Make = Callable[[Batch, Context], Deed | None]
_BOTH: dict[str, _Make] = {
    "sham": lambda batch, context: Deed(il.Sham(), batch.at),
    "donor": _donor,
}
_WORDS: dict[str, _Make] = {
    **_BOTH,
    "paraphrase": _paraphrased,
    "shuffle": lambda batch, context: Deed(il.Shuffle(seed=batch.seed), batch.at),
    "other instance": lambda batch, context: Deed(
        il.Resample(batch.reference, seed=batch.seed), batch.at
    ),
    "delete": lambda batch, context: Deed(il.Delete(), batch.at),
    "wrong conclusion": _misled,
    **{how: _words_of(how) for how in ("wrong shape", "wrong card", "first step")},
}
_LATENTS: dict[str, _Make] = {
    **_BOTH,
    "paraphrase": lambda batch, context: Deed(Jitter(seed=batch.seed), batch.at),
    "shuffle": lambda batch, context: Deed(
        il.Shuffle(batch.run, seed=batch.seed), batch.lined_up(batch.run)
    ),
    "other instance": lambda batch, context: Deed(
        Within(il.Resample(batch.reference, seed=batch.seed)), batch.at
    ),
    "delete": _deleted,
    **{how: _latents_of(how) for how in ("wrong shape", "wrong card", "first step")},
}
