"""What both harness adapters share: questions that come from outside, asked with or without do(Z).

The harness scores the replies, so they are given to it without imagination: neither harness knows
of latent markers, and a matcher that reads imagined text finds answers that were never given.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from PIL import Image

from examples.capimagine.benchmark_layouts import Question
from examples.capimagine.evaluate import Evaluation
from examples.capimagine.matcher import MARKERS, visible
from examples.capimagine.refused import Refused
from imaginelens.hooks.families import Family
from imaginelens.hooks.textspans import TextSpec


def given(id: str, text: str, pictures: Sequence[Image.Image]) -> Question:
    """A question whose answer only the harness knows."""
    return Question(id, "harness", text, (), "known to the harness", tuple(pictures))


@dataclass
class Given(Evaluation):
    """An evaluation of questions that are given, not read.

    Attributes:
        known: questions that edits are fitted on; if there are none, those of the other half.
    """

    questions: Sequence[Question] = ()
    known: Sequence[Question] = ()

    def _rows(self) -> Iterator[Question | Refused]:
        yield from self.questions

    def _served_by(self, half: int) -> Iterator[Question]:
        return iter(self.known) if self.known else super()._served_by(half)


def replies(study: Given, questions: Sequence[Question]) -> list[str]:
    """What a model replies to each question, without what it imagined.

    What edits are fitted on is kept from call to call.
    """
    study.questions = questions
    do = study.dos[0] if study.dos else "none"
    said = {p.id: p.reply for p in study.run() if p.do == do}
    family = study.lens.family
    own = () if family is None or isinstance(family, TextSpec) else _markers(family)
    return [visible(said[q.id], (*MARKERS, *own)) for q in questions]


def _markers(family: Family) -> tuple[tuple[str, str], ...]:
    """A family's own, where `matcher.MARKERS` does not have them."""
    pair = getattr(family, "open", None), getattr(family, "close", None)
    return ((str(pair[0]), str(pair[1])),) if all(isinstance(p, str) for p in pair) else ()
