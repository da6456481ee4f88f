"""A language model rewrites what was imagined: in other words, or toward a wrong conclusion.

The latter is the paper's intervention (arXiv 2602.22766, section 5.5: Qwen3-32B, which sees no
image); prompts and the way to choose the wrong conclusion are not published, so ours are
`prompts/wrong.v1.txt`, where the model chooses it and says which. A reply that is not what was
asked for, or leads to the same answer, leaves its example as it is: it counts as not touched.
"""

import asyncio
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from examples.capimagine import replies
from examples.capimagine.arms import Item, Rewriters
from examples.capimagine.asking import Asking
from examples.capimagine.backends import OpenAI, Request, Rewriter, Sampling, prompt
from examples.capimagine.ledger import Ledger
from examples.capimagine.matcher import LETTERS, match, same
from examples.capimagine.refused import Refusal
from examples.capimagine.replies import BadReply

AT_ONCE = 16  # requests under way
T = TypeVar("T")


@dataclass(frozen=True)
class Rewriting:
    """Asks a backend, through a ledger, so that nothing is paid twice.

    Args:
        make: makes the backend. Each batch gets its own, as its connections end with it.
    """

    make: Any
    model: str
    ledger: Ledger
    sampling: Sampling

    def same(
        self,
        items: Sequence[Item],
        captions: Sequence[Sequence[str]],
        answers: Sequence[str | None],
    ) -> list[tuple[str, ...] | None]:
        """The captions of each item in other words; None where the reply will not do."""
        fields = [
            {"question": item.question.text, "captions": list(said)}
            for item, said in zip(items, captions, strict=True)
        ]
        read = [partial(replies.captions, count=len(said)) for said in captions]
        told = asyncio.run(self._asked("paraphrase.v1", fields, items, read))
        return [None if new is None else tuple(new) for new in told]

    def wrong(
        self,
        items: Sequence[Item],
        captions: Sequence[Sequence[str]],
        answers: Sequence[str | None],
    ) -> list[tuple[tuple[str, ...] | None, str | None]]:
        """The captions of each item rewritten, and the wrong answer that they lead to."""
        own = [in_words(item, answer) for item, answer in zip(items, answers, strict=True)]
        fields = [
            {"question": item.question.text, "answer": answer, "captions": list(said)}
            for item, said, answer in zip(items, captions, own, strict=True)
        ]
        read = [
            partial(replies.misled, before=said, answer=answer)
            for said, answer in zip(captions, own, strict=True)
        ]
        found: list[tuple[tuple[str, ...] | None, str | None]] = []
        told = asyncio.run(self._asked("wrong.v1", fields, items, read))
        for item, answer, reply in zip(items, own, told, strict=True):
            aim = None if reply is None else _aim(item, reply[1])
            if reply is None or aim is None or same(in_words(item, aim), answer):
                found.append((None, None))
            else:
                found.append((tuple(reply[0]), aim))
        return found

    async def _asked(
        self,
        name: str,
        fields: Sequence[Mapping[str, Any]],
        items: Sequence[Item],
        read: Sequence[Callable[[str], T]],
    ) -> list[T | None]:
        """What is read from each reply; None where nothing was imagined, or nothing can be read."""
        backend: Rewriter = self.make()
        asking = Asking(self.ledger, backend, self.model, sampling=self.sampling)
        room = asyncio.Semaphore(AT_ONCE)

        async def one(about: Mapping[str, Any], item: Item, read: Callable[[str], T]) -> T | None:
            if not about["captions"]:
                return None
            async with room:
                request = Request(prompt=prompt(name), fields=about)
                try:
                    return read(await asking.ask(request, stage=name, id=item.question.id))
                except (BadReply, Refusal):
                    return None

        try:
            return list(await asyncio.gather(*map(one, fields, items, read)))
        finally:
            if close := getattr(backend, "close", None):
                await close()


def asked(url: str, model: str, ledger: Path, *, api_key: str = "EMPTY") -> Rewriters:
    """Rewriters behind an OpenAI-compatible endpoint."""
    sampling = Sampling()
    rewriting = Rewriting(
        lambda: OpenAI(url, model, api_key=api_key, sampling=sampling),
        model,
        Ledger(ledger),
        sampling,
    )
    return Rewriters(rewriting.same, rewriting.wrong)


def in_words(item: Item, answer: str | None) -> str:
    """An answer as words, not as a letter, which says nothing to who does not see the options."""
    options = item.question.options
    if answer is None or not options:
        return answer or ""
    return options[LETTERS.index(answer)]


def _aim(item: Item, conclusion: str) -> str | None:
    """The wrong answer as answers are compared: the letter of an option, or words."""
    if not conclusion.strip():
        return None
    return match(conclusion, item.question.options, lettered=item.question.lettered).answer
