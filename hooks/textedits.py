"""What an edit makes of a piece of written imagination: token ids in, token ids out."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import singledispatch
from typing import Any

import torch

from imaginelens.hooks.edits import (
    EdgeEdit,
    Edit,
    EditContext,
    Resample,
    Sham,
    Shuffle,
    Swap,
    whole_numbers,
)
from imaginelens.hooks.entries import EditEntry, Entry
from imaginelens.hooks.errors import DonorError, InputError
from imaginelens.hooks.landing import Landing
from imaginelens.hooks.positions import Positions
from imaginelens.hooks.textspans import ImaginationPositions, find_spans
from imaginelens.hooks.tokens import TokenMap

Ids = list[int]


@dataclass(frozen=True)
class TextContext:
    """Which span is edited, and what its edit may draw on.

    Attributes:
        row, rows: the row of the batch, and how many there are.
        number: the number of the span in its row.
        cell: the same as edits of states see it, with its private random streams.
        given: the spans of the edit's donor or reference, by row and number; None without one.
        keys: what identifies each of that donor's examples.
        close: the marker that ends a span.
        encode, decode: between text and token ids.
    """

    row: int
    rows: int
    number: int
    cell: EditContext
    given: list[list[Ids]] | None
    keys: tuple[str, ...]
    close: str
    encode: Callable[[str], Ids]
    decode: Callable[[Sequence[int]], str]


@dataclass(frozen=True)
class TextEdit(Edit):
    """The parent of edits that make sense for text alone, at `il.imagination`."""

    def apply(self, act: object, ctx: EditContext) -> object:  # type: ignore[override]
        raise InputError(_not_states(self))


@dataclass(frozen=True)
class Rewrite(TextEdit):
    """Write something else in the span: a text, one text per row, or a function of the text.

    The spaces around the old text stay around the new one.

    Raises:
        InputError: `to` is none of these; or, in a run, there are more or fewer texts than rows, or
            the function returns no string, or a text that holds the closing marker.

    >>> Rewrite("a red cube")
    Rewrite(to='a red cube')
    """

    to: str | Sequence[str] | Callable[[str], str]

    def __post_init__(self) -> None:
        if isinstance(self.to, str) or callable(self.to):
            return
        if not isinstance(self.to, list | tuple) or not all(isinstance(t, str) for t in self.to):
            raise InputError(
                f"Rewrite({self.to!r}) is no text; give a string, a list with one string for each "
                "row, or a function from the old text to the new"
            )
        object.__setattr__(self, "to", tuple(self.to))


@dataclass(frozen=True)
class Truncate(TextEdit):
    """Keep the first `keep` tokens of the span, and close it."""

    keep: int = 0

    def __post_init__(self) -> None:
        if self.keep < 0:
            raise InputError(f"Truncate({self.keep}) keeps no number of tokens; use 0 or more")


@dataclass(frozen=True)
class Delete(TextEdit):
    """Remove the span with its markers; the model goes on as if it had never begun one there."""


@dataclass(eq=False)
class TextEntry(Entry):
    """An edit of written imagination, with its landing."""

    edit: Edit
    at: ImaginationPositions
    landing: Landing
    draw: int = 0
    _seen: str = ""
    _given: list[list[Ids]] | None = field(default=None, init=False)
    _keys: tuple[str, ...] = field(default=(), init=False)

    def begin(self) -> None:
        """Forget what belongs to one run."""
        self._seen = "nothing was written in this call"
        self.landing.begin()

    def look(self, tokens: TokenMap) -> None:
        """Note how many spans the rows of the unedited run have written."""
        at = self.at
        counts = [len(find_spans(tokens, row, at.open, at.close)) for row in range(len(tokens))]
        self._seen = f"the rows wrote {min(counts)} to {max(counts)} spans {at.open} ... {at.close}"

    def judge(self, n_rows: int, seen: str) -> None:
        """Refuse a call in which this edit did nothing."""
        self.landing.judge(n_rows, may_be_identical=isinstance(self.edit, Sham), seen=self._seen)

    def donor_spans(self, tokenizer: Any) -> tuple[list[list[Ids]] | None, tuple[str, ...]]:
        """The spans of the donor or reference, by row and number, and the keys of its examples.

        Args:
            tokenizer: of the run that receives them.
        """
        donor = self.edit.given
        if donor is None or self._given is not None:
            return self._given, self._keys
        name = type(self.edit).__name__
        tokens = getattr(donor, "tokens", None)
        if not isinstance(tokens, TokenMap):
            raise DonorError(
                f"{name} at {self.at!r} takes its text from a run, not from "
                f"{type(donor).__name__}; pass lens.run(inputs)"
            )
        if not _same_words(tokens.tokenizer, tokenizer):
            raise DonorError(
                f"{name} at {self.at!r} has a donor whose tokenizer has other tokens than this "
                "model's; use il.Rewrite with the donor's text"
            )
        self._keys = tokens.keys
        self._given = [
            [
                tokens.ids[row, s.start : s.stop].tolist()
                for s in find_spans(tokens, row, self.at.open, self.at.close)
            ]
            for row in range(len(tokens))
        ]
        return self._given, self._keys


def edit_entry(
    edit: Edit,
    at: Positions,
    sites: Sequence[str],
    *,
    draw: int = 0,
    heads: Sequence[int] | None = None,
    readers: Positions | None = None,
) -> EditEntry | TextEntry:
    """An edit as it becomes active. What is fed back is a state in a latent span and text in
    written imagination, so `hook_latent` at `il.imagination` means the text.

    Raises:
        InputError: an edit of text is to act on states, or the other way round, or heads are given
            for what has none.
    """
    name = type(edit).__name__
    chosen = whole_numbers("heads", heads)
    at_text = isinstance(at, ImaginationPositions) and tuple(sites) == ("hook_latent",)
    if isinstance(edit, EdgeEdit) or not at_text:
        if isinstance(edit, TextEdit):
            raise InputError(_not_states(edit))
        if isinstance(edit, EdgeEdit) and chosen is not None:
            raise InputError(f"{name} has heads of its own; write il.{name}(heads={list(chosen)})")
        if isinstance(edit, EdgeEdit) and readers is not None:
            raise InputError(f"{name} has queries of its own; write il.{name}({readers!r})")
        landing = Landing(name, repr(at), tuple(sites))
        return EditEntry(tuple(sites), edit, at, landing, draw, chosen, readers)
    if respell.dispatch(type(edit)) is respell.dispatch(object):
        raise InputError(_not_text(edit))
    if chosen is not None or readers is not None:
        raise InputError(f"{at!r} is text, which has no heads and no readers; leave them out")
    assert isinstance(at, ImaginationPositions)
    return TextEntry((), edit, at, Landing(name, repr(at), ("text",)), draw)


@singledispatch
def respell(edit: Edit, ids: Ids, ctx: TextContext) -> Ids | None:
    """What an edit makes of a span's token ids; None removes the span, markers included.

    Raises:
        InputError: the edit knows nothing to do with text, or makes none of it.
        DonorError: its donor has no such span.
    """
    raise InputError(_not_text(edit))


@respell.register
def _(edit: Sham, ids: Ids, ctx: TextContext) -> Ids:
    return list(ids)


@respell.register
def _(edit: Rewrite, ids: Ids, ctx: TextContext) -> Ids:
    old = ctx.decode(ids)
    text = _new_text(edit, old.strip(), ctx)
    if text == old.strip():  # other tokens for the same text would be an edit that nobody sees
        return list(ids)
    if ctx.close in text:
        raise InputError(
            f"Rewrite({text[:60]!r}) holds the marker {ctx.close!r}, which would end the span; "
            "leave it out"
        )
    lead = old[: len(old) - len(old.lstrip())]
    tail = old[len(old.rstrip()) :] if old.strip() else ""
    return ctx.encode(lead + text + tail)


def _new_text(edit: Rewrite, old: str, ctx: TextContext) -> str:
    new = edit.to
    if isinstance(new, str):
        return new.strip()
    if not callable(new):
        if len(new) != ctx.rows:
            raise InputError(
                f"Rewrite has {len(new)} texts and the run {ctx.rows} rows; give one for each row"
            )
        return new[ctx.row].strip()
    made: object = new(old)
    if not isinstance(made, str):
        raise InputError(
            f"the function given to Rewrite returned {made!r} for {old[:60]!r}; return a string"
        )
    return made.strip()


@respell.register
def _(edit: Truncate, ids: Ids, ctx: TextContext) -> Ids:
    return list(ids[: edit.keep])


@respell.register
def _(edit: Delete, ids: Ids, ctx: TextContext) -> None:
    return None


@respell.register
def _(edit: Swap, ids: Ids, ctx: TextContext) -> Ids:
    given = _spans(edit, ctx)
    return list(given[0 if len(given) == 1 else ctx.row][ctx.number])


@respell.register
def _(edit: Resample, ids: Ids, ctx: TextContext) -> Ids:
    given, own = _spans(edit, ctx), ctx.cell.key(0)
    others = [i for i, key in enumerate(ctx.keys) if key != own]
    reached = [i for i in others if ctx.number < len(given[i])]
    if not reached:
        raise DonorError(
            f"Resample finds no other example with a span number {ctx.number} among the "
            f"{len(given)} of its reference; use a reference on more, and other, inputs"
        )
    # as for states: one example for all spans, the next that has as many where it has too few
    draw = ctx.cell.generator(edit.seed, own)
    start = others[int(torch.randint(len(others), (), generator=draw))]
    return list(given[next((i for i in reached if i >= start), reached[0])][ctx.number])


@respell.register
def _(edit: Shuffle, ids: Ids, ctx: TextContext) -> Ids:
    return [ids[i] for i in edit.order(len(ids), ctx.cell, 0)]


def _spans(edit: Edit, ctx: TextContext) -> list[list[Ids]]:
    if ctx.given is None:
        raise DonorError(
            f"{type(edit).__name__} needs a run whose imagination it can take; pass "
            f"il.{type(edit).__name__}(lens.run(other_inputs))"
        )
    return ctx.given


def _same_words(one: Any, other: Any) -> bool:
    """Whether two tokenizers give every token the same id."""
    return one is other or bool(one.get_vocab() == other.get_vocab())


def _not_states(edit: Edit) -> str:
    return (
        f"{type(edit).__name__} edits written imagination, not states; use it with "
        "at=il.imagination and no site, or il.Swap, il.Zero and the like for states"
    )


def _not_text(edit: Edit) -> str:
    return (
        f"{type(edit).__name__} edits states, and il.imagination selects text; use il.Rewrite, "
        "il.Truncate, il.Delete, il.Swap, il.Resample or il.Shuffle there, or name a site such as "
        "'blocks.0.hook_resid_post'"
    )
