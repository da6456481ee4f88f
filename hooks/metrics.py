"""What is measured at the answer: one value per example, the same function in every arm."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float

from imaginelens.hooks.errors import InputError
from imaginelens.hooks.run import Run
from imaginelens.hooks.tokens import Kind, TokenMap


@dataclass(frozen=True)
class Targets:
    """The answers a metric speaks of, and their tokens in the context of the base run.

    Attributes:
        base_answers, source_answers: as text; None where there is no source.
        base_ids: the base answer's tokens.
        base_token, source_token: the first tokens in which the two answers differ; -1 if unknown.
        differ_at: how many tokens the two answers share before that.
    """

    base_answers: tuple[str | None, ...]
    source_answers: tuple[str | None, ...]
    base_ids: tuple[tuple[int, ...], ...]
    base_token: tuple[int, ...]
    source_token: tuple[int, ...]
    differ_at: tuple[int, ...]


@dataclass(frozen=True)
class Readout:
    """What one arm shows at the answer.

    Attributes:
        logits: at the position that decides between the two answers; nan where no answer was found.
        log_prob: of the whole base answer, given the text before it, in nats.
        answers: what was answered; in fixed context, what the deciding token says.
    """

    logits: Float[torch.Tensor, "example vocab"]
    log_prob: Float[torch.Tensor, " example"]
    answers: tuple[str | None, ...]
    targets: Targets
    unedited: "Readout | None" = None


@dataclass(frozen=True)
class Metric:
    """A named function of a `Readout`.

    Attributes:
        unit: of its values; "share" are 0 or 1.
        needs_source: it compares with a source answer, and refuses runs that have none.
        nested: it is the same function in every nested world. `accuracy` is not, for what is right
            depends on the input that runs.
    """

    name: str
    fn: Callable[[Readout], Float[torch.Tensor, " example"]]
    unit: str
    needs_source: bool = False
    nested: bool = True

    @property
    def binary(self) -> bool:
        """Whether every value is 0 or 1."""
        return self.unit == "share"

    def __call__(self, readout: Readout) -> Float[torch.Tensor, " example"]:
        """One value per example; nan where the answer is missing."""
        if self.needs_source:
            self.check(readout.targets)
        return self.fn(readout)

    def check(self, targets: Targets) -> None:
        """Refuse answers this metric cannot compare.

        Raises:
            InputError: a pair has no source answer, or the two answers are equal.
        """
        if not self.needs_source:
            return
        pairs = zip(targets.base_answers, targets.source_answers, strict=True)
        for i, (base, source) in enumerate(pairs):
            if source is None:
                raise InputError(
                    f"{self.name} compares two answers and example {i} has no source answer; "
                    "pass source_answers=[...], or use il.log_prob"
                )
            if base is not None and same(base, source):
                raise InputError(
                    f"{self.name} needs two different answers and pair {i} has {base!r} twice; "
                    "leave such pairs out"
                )

    def __repr__(self) -> str:
        return f"il.{self.name}"


def same(one: str | None, other: str | None) -> bool:
    """Whether two answers are the same text, case and outer spaces aside.

    >>> same("Circle ", "circle"), same(None, "circle")
    (True, False)
    """
    if one is None or other is None:
        return False
    return one.strip().casefold() == other.strip().casefold()


def _logit_diff(readout: Readout) -> torch.Tensor:
    rows = torch.arange(len(readout.logits))
    source = readout.logits[rows, list(readout.targets.source_token)]
    return source - readout.logits[rows, list(readout.targets.base_token)]


def _kl(readout: Readout) -> torch.Tensor:
    if readout.unedited is None:
        return readout.logits[:, 0] * 0  # nan where there is no answer
    before = readout.unedited.logits.log_softmax(-1)
    return (before.exp() * (before - readout.logits.log_softmax(-1))).sum(-1)


def _matches(readout: Readout, answers: Sequence[str | None]) -> torch.Tensor:
    values = [
        float("nan") if found is None else float(same(found, wanted))
        for found, wanted in zip(readout.answers, answers, strict=True)
    ]
    return torch.tensor(values, dtype=torch.float64)


def _flip(readout: Readout) -> torch.Tensor:
    before = readout.answers if readout.unedited is None else readout.unedited.answers
    kept = _matches(readout, before)
    missing = torch.tensor([b is None for b in before])
    return torch.where(missing, torch.full_like(kept, float("nan")), 1 - kept)


logit_diff = Metric("logit_diff", _logit_diff, "logits", needs_source=True)
log_prob = Metric("log_prob", lambda r: r.log_prob, "nats")
prob = Metric("prob", lambda r: r.log_prob.exp(), "probability")
kl = Metric("kl", _kl, "nats")
source_answer = Metric(
    "source_answer", lambda r: _matches(r, r.targets.source_answers), "share", needs_source=True
)
base_answer = Metric("base_answer", lambda r: _matches(r, r.targets.base_answers), "share")
accuracy = Metric("accuracy", lambda r: _matches(r, r.targets.base_answers), "share", nested=False)
flip = Metric("flip", _flip, "share", nested=False)


def targets_of(
    run: Run,
    base_answers: Sequence[str | None],
    source_answers: Sequence[str | None],
    encode: Callable[[str], list[int]],
) -> Targets:
    """Find the tokens of both answers in the context of the base run.

    Raises:
        InputError: one answer's tokens are the beginning of the other's.
    """
    base_ids, pairs = [], []
    for row, (base, source) in enumerate(zip(base_answers, source_answers, strict=True)):
        ids = () if base is None else _ids_in_context(run, row, base, encode)
        other = None if source is None else _ids_in_context(run, row, source, encode)
        base_ids.append(ids)
        pairs.append(_first_difference(ids, other, base, source))
    return Targets(
        tuple(base_answers),
        tuple(source_answers),
        tuple(base_ids),
        tuple(b for b, _, _ in pairs),
        tuple(s for _, s, _ in pairs),
        tuple(at for _, _, at in pairs),
    )


def _first_difference(
    ids: tuple[int, ...], other: tuple[int, ...] | None, base: str | None, source: str | None
) -> tuple[int, int, int]:
    if other is None or not ids or same(base, source):
        return (ids[0] if ids else -1), -1, 0
    for at, (one, two) in enumerate(zip(ids, other, strict=False)):
        if one != two:
            return one, two, at
    raise InputError(
        f"the tokens of {base!r} and {source!r} never differ before one of them ends; "
        "choose answers of which neither is the beginning of the other"
    )


def _ids_in_context(
    run: Run, row: int, answer: str, encode: Callable[[str], list[int]]
) -> tuple[int, ...]:
    """The answer's tokens as they follow what the run wrote before its own answer."""
    tokens = run.tokens
    columns = tokens.columns(row, Kind.ANSWER)
    found = run.found_answers[row]
    if not len(columns) or found is None:
        return tuple(encode(answer))
    if same(found, answer):
        return tuple(int(i) for i in tokens.ids[row, columns])
    lead = _lead(tokens, row, int(columns[0]), int(columns[-1]) + 1, found)
    before = tokens.text(row, max(tokens.start(row), int(columns[0]) - 8), int(columns[0]))
    prefix, whole = encode(before), encode(before + lead + answer)
    if whole[: len(prefix)] == prefix and len(whole) > len(prefix):
        return tuple(whole[len(prefix) :])
    return tuple(encode(lead + answer))


def _lead(tokens: TokenMap, row: int, start: int, stop: int, answer: str) -> str:
    """What the answer's first token holds before the answer itself: a space, or a brace."""
    text = tokens.text(row, max(tokens.start(row), start - 1), stop)
    before = tokens.text(row, max(tokens.start(row), start - 1), start)
    own = text[len(before) :]
    return own[: max(own.find(answer), 0)]
