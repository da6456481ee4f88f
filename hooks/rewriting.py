"""Write a run again with its imagination edited: everything before is kept, token by token.

In free context the model goes on by itself behind each edited span. In fixed context the text
behind it stays what it was. Both go through the same generation, so captures and hooks work.
"""

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import torch
from transformers.generation import LogitsProcessor, StoppingCriteria

from imaginelens.hooks.edits import EditContext, Swap
from imaginelens.hooks.errors import DonorError, InputError
from imaginelens.hooks.run import Run
from imaginelens.hooks.textedits import Ids, TextContext, TextEntry, respell
from imaginelens.hooks.textspans import ImaginationPositions, TextSpan, find_spans
from imaginelens.hooks.tokens import Kind

Context = Literal["free", "fixed"]


class ForcedText(LogitsProcessor):
    """Sampling control: each row writes its ids first, and then goes on by itself.

    Attributes:
        width: columns of the prompt.
        ids: for each row what it must write.
        limits: for each row how many tokens it may write in all.
        banned: for each row the tokens that it may not write next.
    """

    dictates = True  # the loop mixes soft tokens of what the model itself would write

    def __init__(
        self,
        width: int,
        ids: Sequence[Ids],
        limits: Sequence[int],
        banned: Sequence[Collection[int]],
    ) -> None:
        self.width, self.ids, self.limits, self.banned = width, ids, limits, banned

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        step = input_ids.shape[1] - self.width
        scores = scores.clone()
        for row, (ids, banned) in enumerate(zip(self.ids, self.banned, strict=True)):
            if step < len(ids):
                scores[row] = -torch.inf
                scores[row, ids[step]] = 0.0
            elif step == len(ids) and banned:
                scores[row, list(banned)] = -torch.inf
        return scores


class OwnLimit(StoppingCriteria):
    """Each row ends at its own limit, whatever the others of the batch may write."""

    def __init__(self, forced: ForcedText) -> None:
        self.forced = forced

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        limits = torch.tensor(self.forced.limits, device=input_ids.device)
        return input_ids.shape[1] - self.forced.width >= limits


Write = Callable[[ForcedText], Run]


@dataclass(frozen=True)
class Speller:
    """Between text and token ids."""

    encode: Callable[[str], Ids]
    decode: Callable[[Sequence[int]], str]


def rewritten(
    run: Run,
    entries: Sequence[TextEntry],
    context: Context,
    *,
    limit: int,
    write: Write,
    spell: Speller,
) -> Run:
    """The run with its imagination edited by `entries`.

    Args:
        limit: how many tokens a row may write. A row that an edit makes longer may write as many
            more, so that it does not end before its answer.
        write: generates again under a `ForcedText`.

    Raises:
        InputError: the entries select between different markers.
    """
    marks = {(entry.at.open, entry.at.close) for entry in entries}
    if len(marks) > 1:
        raise InputError(
            f"imagination is edited between {len(marks)} kinds of markers at once "
            f"({', '.join(sorted(open for open, _ in marks))}); edit one kind in a run"
        )
    for entry in entries:
        entry.look(run.tokens)
    if context == "fixed":
        return _fixed(run, entries, write, spell)
    return _free(run, entries, limit, write, spell)


def _fixed(run: Run, entries: Sequence[TextEntry], write: Write, spell: Speller) -> Run:
    """All spans edited at once, and the text between and behind them kept."""
    drafts = [_Draft.of(run, row) for row in range(len(run))]
    for draft in drafts:
        spans = draft.spans(entries[0].at)
        for number in reversed(range(len(spans))):  # from the end, so that columns stay true
            draft.edit(entries, spans[number], number, len(spans), spell)
    limits = [max(1, len(draft.ids)) for draft in drafts]
    free = [()] * len(drafts)
    new = write(ForcedText(run.tokens.prompt_width, [d.ids for d in drafts], limits, free))
    return _with_answers(new, run, drafts)


@dataclass
class _Progress:
    """How far a row has come: of its spans, `done` are settled and `removed` of those are gone.

    Attributes:
        n: how many spans the unedited run has.
        longer: by how many tokens the edits have made the row longer so far.
        banned: the tokens that may not be written behind the first `cut`, where a span was removed.
    """

    n: int
    done: int = 0
    removed: int = 0
    longer: int = 0
    cut: int = -1
    banned: tuple[int, ...] = ()


def _free(run: Run, entries: Sequence[TextEntry], limit: int, write: Write, spell: Speller) -> Run:
    """Span after span: a later one is known only once the text behind the earlier is written."""
    at = entries[0].at
    rows = [_Progress(len(_spans(run, row, at))) for row in range(len(run))]
    while True:
        drafts = [_Draft.of(run, row) for row in range(len(run))]
        found = [draft.spans(at) for draft in drafts]
        ahead = [p.done - p.removed < len(s) for p, s in zip(rows, found, strict=True)]
        if not any(ahead):
            return run
        for row in np.flatnonzero(ahead):
            draft, progress = drafts[row], rows[row]
            place = progress.done - progress.removed
            span = found[row][place]
            shared = place > 0 and found[row][place - 1].end > span.opened
            draft.edit(entries, span, progress.done, progress.n, spell, keep_lead=shared)
            progress.done += 1
            progress.longer += draft.longer
            if draft.deleted:
                # else a marker that can be spelled in two ways would come back for ever
                before = progress.banned if progress.cut == draft.settled else ()
                progress.banned = (*before, int(run.tokens.ids[row, span.opened]))
                progress.cut = draft.settled
                progress.removed += 1
        if any(draft.edited for draft in drafts):
            ids = [draft.ids[: draft.settled] for draft in drafts]
            limits = [limit + max(0, p.longer) for p in rows]
            banned = [p.banned if d.deleted else () for p, d in zip(rows, drafts, strict=True)]
            run = write(ForcedText(run.tokens.prompt_width, ids, limits, banned))


def _spans(run: Run, row: int, at: ImaginationPositions) -> list[TextSpan]:
    return find_spans(run.tokens, row, at.open, at.close)


Piece = tuple[Ids, int]


@dataclass
class _Draft:
    """What one row is to write, in pieces: the ids that stand in the place of a token of the run,
    and that place; -1 for what is not from there.

    Attributes:
        settled: how many of the ids the model is not free to write anew.
        longer: by how many ids the last edit has made it longer.
    """

    run: Run
    row: int
    pieces: list[Piece]
    settled: int
    longer: int = 0
    edited: bool = False
    deleted: bool = False

    @classmethod
    def of(cls, run: Run, row: int) -> "_Draft":
        real = np.flatnonzero(run.tokens.kind[row] != Kind.PAD)
        ids = run.tokens.ids[row, run.tokens.prompt_width : int(real[-1]) + 1].tolist()
        return cls(run, row, [([token], place) for place, token in enumerate(ids)], len(ids))

    @property
    def ids(self) -> Ids:
        return _ids(self.pieces)

    @property
    def places(self) -> list[int]:
        """For each of the ids its place in the run."""
        return [place for ids, place in self.pieces for _ in ids]

    def spans(self, at: ImaginationPositions) -> list[TextSpan]:
        return _spans(self.run, self.row, at)

    def edit(
        self,
        entries: Sequence[TextEntry],
        span: TextSpan,
        number: int,
        n: int,
        spell: Speller,
        *,
        keep_lead: bool = True,
    ) -> None:
        """Put what the entries make of a span in its place.

        Args:
            number, n: the number of the span in its row, whose unedited text has `n`.
            keep_lead: keep what the first token holds before the marker, if the span is removed.
        """
        active = [entry for entry in entries if entry.at.holds(number, n)]
        if not active:
            return
        old: Ids = self.run.tokens.ids[self.row, span.start : span.stop].tolist()
        new: Ids | None = old
        for entry in active:
            new = None if new is None else _after(entry, new, self, span, number, spell)
        first = self.run.tokens.prompt_width
        start, stop = span.opened - first, span.end - first
        whole, at = self.pieces[start:stop], entries[0].at
        put: list[Piece] = []
        behind: list[Piece] = []
        if new is None:
            lead, tail = _around(spell.decode(_ids(whole)), at)
            put = _spelled(lead if keep_lead else "", spell)
            behind = _spelled(tail, spell)
        elif new == old:
            put = whole  # as it was, also where it is not closed
        else:
            head, end = self._markers(span, at, spell)
            put = [*head, (new, -1), *end]
        self.pieces[start:stop] = [*put, *behind]
        self.settled = len(_ids(self.pieces[: start + len(put)]))
        self.longer = len(_ids(put)) - len(_ids(whole))
        self.edited, self.deleted = True, new is None

    def _markers(
        self, span: TextSpan, at: ImaginationPositions, spell: Speller
    ) -> tuple[list[Piece], list[Piece]]:
        """The tokens of a span's markers; spelled anew where one of them is not there by itself."""
        first = self.run.tokens.prompt_width
        head = self.pieces[span.opened - first : span.start - first]
        end = self.pieces[span.stop - first : span.end - first]
        if span.stop < span.start:  # one token ends the one marker and begins the other
            text = spell.decode(_ids(self.pieces[span.opened - first : span.end - first]))
            lead, inner = text.find(at.open), text.find(at.open) + len(at.open)
            head = [*_spelled(text[:lead], spell), *_spelled(text[lead:inner], spell)]
            end = _spelled(text[inner:], spell)
        return head, end if span.closed else _spelled(at.close, spell)


def _ids(pieces: Sequence[Piece]) -> Ids:
    return [token for ids, _ in pieces for token in ids]


def _spelled(text: str, spell: Speller) -> list[Piece]:
    """A text as one piece of its own."""
    return [(spell.encode(text), -1)] if text else []


def _around(text: str, at: ImaginationPositions) -> tuple[str, str]:
    """What the tokens of a span hold before and behind it."""
    opened = text.find(at.open)
    end = text.find(at.close, opened + len(at.open))
    return text[:opened], text[end + len(at.close) :] if end >= 0 else ""


def _after(
    entry: TextEntry, ids: Ids, draft: _Draft, span: TextSpan, number: int, spell: Speller
) -> Ids | None:
    """What one entry makes of a span's ids, noted in its landing."""
    run, row = draft.run, draft.row
    given, keys = entry.donor_spans(run.tokens.tokenizer)
    if given is not None and isinstance(entry.edit, Swap):
        if len(given) not in (1, len(run)):
            raise DonorError(
                f"the donor of Swap has {len(given)} rows and the run has {len(run)}; give it one "
                "row, or as many rows as the run"
            )
        if number >= len(given[0 if len(given) == 1 else row]):
            entry.landing.donorless.add(row)
            return ids
    one = np.array([0])
    cell = EditContext(
        site="text",
        rows=one + row,
        positions=one + span.start,
        ordinals=one + number,
        steps=one - 1,
        draw=entry.draw,
        keys=(run.tokens.keys[row],),
    )
    ctx = TextContext(
        row, len(run), number, cell, given, keys, entry.at.close, spell.encode, spell.decode
    )
    new = respell(entry.edit, ids, ctx)
    entry.landing.record_text(row, span.start, ids, new or [], run, removed=new is None)
    return new


def _with_answers(new: Run, run: Run, drafts: Sequence[_Draft]) -> Run:
    """A run in fixed context: its answers are those of the run it was made from, wherever they
    stand now; none where an edit has gone through them."""
    first, kind = run.tokens.prompt_width, new.tokens.kind.copy()
    kind[kind == Kind.ANSWER] = Kind.TEXT
    columns: list[np.ndarray] = []
    answers: list[str | None] = []
    for row, draft in enumerate(drafts):
        kind[row, first + len(draft.ids) :] = Kind.PAD
        old = run.tokens.columns(row, Kind.ANSWER) - first
        kept = [first + i for i, place in enumerate(draft.places) if place in old]
        whole = len(kept) == len(old)
        columns.append(np.array(kept if whole else [], dtype=int))
        answers.append(run.found_answers[row] if whole else None)
    tokens = replace(new.tokens, kind=kind).finished(columns)
    return replace(new, tokens=tokens, found_answers=tuple(answers))


def as_written_by(run: Run) -> ForcedText:
    """Write what a run wrote, row by row, with its own latents in the same places."""
    ids = [_Draft.of(run, row).ids for row in range(len(run))]
    return ForcedText(run.tokens.prompt_width, ids, list(map(len, ids)), [()] * len(ids))
