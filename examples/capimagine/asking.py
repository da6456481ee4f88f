"""Ask a model through a ledger: once for each request, within a budget, again where it was busy."""

import asyncio
import random
from collections import Counter
from dataclasses import dataclass, field

from examples.capimagine.backends import (
    Busy,
    Reply,
    Request,
    Rewriter,
    Sampling,
    digest,
    fingerprint,
)
from examples.capimagine.ledger import Entry, Ledger
from examples.capimagine.refused import SourceError


class Stopped(Exception):
    """No further call is made: the budget is spent, or someone wants to stop."""


class Unpaid(Exception):
    """The reply is not in the ledger, and nobody is there to ask."""

    def __init__(self, request: Request) -> None:
        super().__init__(request.prompt.name)
        self.request = request


@dataclass(frozen=True)
class Budget:
    """What one run may spend; None is no limit.

    Attributes:
        calls: requests sent, those that were answered by an error too.
        tokens: of prompts and replies together. They are known afterwards, so that calls that are
            in flight when it is reached may exceed it.
    """

    calls: int | None = None
    tokens: int | None = None


@dataclass
class Asking:
    """One run's conversation with a model.

    Args:
        ledger: what was paid for, and where new replies go before anything else.
        backend: who answers; None to use nothing but the ledger.
        model: the name that counts in the ledger.
        retries: how often to ask again where the endpoint was busy, after `backoff` seconds, and
            twice as many each time, or as many as it says.

    Attributes:
        calls: requests sent in this run, by stage.
        reused: replies taken from the ledger, by stage.
        tokens: tokens of the replies of this run, by kind.
        busy: how often the endpoint was.
    """

    ledger: Ledger
    backend: Rewriter | None
    model: str
    sampling: Sampling = field(default_factory=Sampling)
    budget: Budget = field(default_factory=Budget)
    retries: int = 6
    backoff: float = 0.5
    calls: Counter[str] = field(default_factory=Counter)
    reused: Counter[str] = field(default_factory=Counter)
    tokens: Counter[str] = field(default_factory=Counter)
    busy: int = 0
    stopped: str = ""
    _pending: dict[str, asyncio.Future[Entry]] = field(default_factory=dict)

    def key(self, request: Request) -> str:
        """The hash a request goes by: of the very body that an endpoint is sent."""
        messages = request.messages(digest)
        return fingerprint({"model": self.model, "messages": messages, **self.sampling.options()})

    def stop(self, why: str) -> None:
        """Make no further call; those in flight are waited for."""
        self.stopped = self.stopped or why

    async def ask(self, request: Request, *, stage: str, id: str) -> str:
        """The reply to a request, from the ledger if it was paid for.

        Raises:
            Stopped: the budget is spent, or `stop` was called.
            Unpaid: there is no backend.
            Refusal: the endpoint says that this request is at fault.
            SourceError: the endpoint does not answer.
        """
        key = self.key(request)
        if entry := self.ledger.get(key):
            self.reused[stage] += 1
            return entry.text
        if self.backend is None:
            raise Unpaid(request)
        if key in self._pending:  # another chain asks the same right now
            entry = await asyncio.shield(self._pending[key])
            self.reused[stage] += 1
            return entry.text
        mine = self._pending[key] = asyncio.get_running_loop().create_future()
        try:
            reply = await self._sent(request, stage)
            entry = Entry(key, stage, id, reply.text, reply.prompt_tokens, reply.completion_tokens)
            self.ledger.add(entry)
            self.tokens["prompt"] += reply.prompt_tokens
            self.tokens["completion"] += reply.completion_tokens
            mine.set_result(entry)
            return entry.text
        except Exception as error:
            mine.set_exception(error)
            mine.exception()  # read, as nobody else may be waiting for it
            raise
        finally:
            del self._pending[key]
            mine.cancel()  # does nothing to one that is done

    async def _sent(self, request: Request, stage: str) -> Reply:
        assert self.backend is not None
        for attempt in range(self.retries + 1):
            self._spend(stage)
            try:
                return await self.backend.ask(request)
            except Busy as busy:
                self.busy += 1
                if attempt == self.retries:
                    raise SourceError(
                        f"the endpoint did not answer {attempt + 1} times, the last time: {busy}"
                    ) from busy
                longer = self.backoff * 2**attempt * random.uniform(0.5, 1.0)
                await asyncio.sleep(longer if busy.wait is None else min(busy.wait, 60.0))
        raise AssertionError("the last attempt returns or raises")

    def _spend(self, stage: str) -> None:
        sent, used = sum(self.calls.values()), sum(self.tokens.values())
        if self.budget.calls is not None and sent >= self.budget.calls:
            self.stop(f"the budget of {self.budget.calls} calls is spent")
        if self.budget.tokens is not None and used >= self.budget.tokens:
            self.stop(f"the budget of {self.budget.tokens} tokens is spent ({used})")
        if self.stopped:
            raise Stopped(self.stopped)
        self.calls[stage] += 1
