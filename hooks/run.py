"""What one run leaves behind: text, answer, latents, the map of its tokens, and why it stopped."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int

from imaginelens.hooks.answers import AnswerFinder
from imaginelens.hooks.cache import ActivationCache
from imaginelens.hooks.entries import CaptureEntry
from imaginelens.hooks.errors import DonorError, InputError
from imaginelens.hooks.generate import LatentLoop
from imaginelens.hooks.positions import Positions
from imaginelens.hooks.prompts import Prompt
from imaginelens.hooks.sites import SiteTable
from imaginelens.hooks.spans import SpanRecord
from imaginelens.hooks.states import States, pad
from imaginelens.hooks.tokens import Kind, TokenMap
from imaginelens.hooks.vocabspans import Cell, forget_unread, read_cells, word_records

_SHOWN = 120  # letters of a text in a terminal


@dataclass(frozen=True)
class Trigger:
    """Why latent spans opened and ended in a run.

    Attributes:
        spans: one record per span: row, who opened it, how many steps, what ended it.
        emitted: for each example, how many latents it fed back.
        written: the family writes its latents as tokens, and "fed back" reads "written".
    """

    spans: tuple[SpanRecord, ...]
    emitted: tuple[int, ...]
    written: bool = False

    @property
    def rate(self) -> float:
        """Share of examples that fed back at least one latent."""
        return float(np.mean([n > 0 for n in self.emitted]))

    @property
    def emitters(self) -> list[int]:
        """The rows that fed back at least one latent."""
        return [row for row, n in enumerate(self.emitted) if n > 0]

    def __str__(self) -> str:
        ends: dict[str, int] = {}
        for span in self.spans:
            key = f"opened by {span.opened_by}, ended by {span.ended_by}"
            ends[key] = ends.get(key, 0) + 1
        steps = ", ".join(f"{n} x {what}" for what, n in sorted(ends.items())) or "no span opened"
        emitted = sum(n > 0 for n in self.emitted)
        did = "wrote latent tokens" if self.written else "fed latents back"
        return f"{emitted} of {len(self.emitted)} examples {did}; {steps}"


@dataclass(frozen=True)
class Run:
    """One generation of a batch.

    Attributes:
        prompt: what went in.
        sequences: token ids, prompt included, (example, position); pads stand for latents.
        tokens: what every position is; answers are marked.
        latents: the states as they were fed back, zero where an example fed fewer. In families that
            write their latents as tokens: the states there, at the site their authors read.
        latent_mask: which (example, step) are real. Steps count over all spans.
        latent_span: the span of every step, -1 where there is none.
        trigger: why spans opened and ended.
        cache: captured activations, if `names_filter` was given.
        logits: of every generated position, if `keep_logits` was given.
        inserted: embeddings of the image tokens that came again before latents (`il.inserted`), in
            the order of their columns; None in families that have none.
        found_answers: the answer of each example; read `answer` or `answers` instead.
        position_ids: the positions the model was given, of everything it read.
        acted: what was active at `hook_latent`: the latents already are what it made of them.
        options: how it was generated, so that it can be generated again.
        seconds, forwards: what it cost.
    """

    prompt: Prompt
    sequences: Int[torch.Tensor, "example position"]
    tokens: TokenMap
    latents: Float[torch.Tensor, "example step d_model"]
    latent_mask: Bool[torch.Tensor, "example step"]
    latent_span: Int[torch.Tensor, "example step"]
    trigger: Trigger
    cache: ActivationCache
    found_answers: tuple[str | None, ...]
    position_ids: torch.Tensor | None = None
    acted: frozenset[int] = frozenset()
    options: tuple[Any, ...] = ()
    logits: Float[torch.Tensor, "example generated vocab"] | None = None
    inserted: Float[torch.Tensor, "example place d_model"] | None = None
    seconds: float = 0.0
    forwards: int = 0

    def __len__(self) -> int:
        return len(self.sequences)

    @cached_property
    def texts(self) -> list[str]:
        """What each example wrote, special tokens spelled out, trailing padding left out."""
        return [self.wrote(row) for row in range(len(self))]

    def wrote(self, row: int) -> str:
        """What one example wrote, as in `texts`."""
        return self.tokens.text(row, self.tokens.prompt_width)

    @property
    def answers(self) -> list[str | None]:
        """Each example's answer; None where the finder found none."""
        return list(self.found_answers)

    @property
    def text(self) -> str | list[str]:
        """What was written: a string for one example, a list for a batch."""
        return self.texts[0] if self.prompt.single else self.texts

    @property
    def answer(self) -> str | list[str | None] | None:
        """The answer: a string for one example, a list for a batch; None where none was found."""
        return self.answers[0] if self.prompt.single else self.answers

    @property
    def parse_coverage(self) -> float:
        """Share of examples whose answer was found."""
        return float(np.mean([answer is not None for answer in self.answers]))

    def states(self, site: str, at: Positions) -> States:
        """The states this run gives as a donor, at a site and selector.

        Raises:
            DonorError: the run did not capture that site at all of those positions.
        """
        columns = [at.resolve(self.tokens, row) for row in range(len(self))]
        return replace(self._states(site, at, columns), keys=self.tokens.keys)

    def _states(self, site: str, at: Positions, columns: Sequence[np.ndarray]) -> States:
        if site == "hook_latent" and self.trigger.written:
            raise DonorError(
                f"nothing was fed back in this run, whose latents are written tokens, so it has no "
                f"states at 'hook_latent' for {at!r}; name a site in the residual stream, such as "
                "'blocks.0.hook_resid_post'"
            )
        if site == "hook_latent":
            return pad([self._latents_at(row, c) for row, c in enumerate(columns)])
        if site not in self.cache:
            held = ", ".join(self.cache) or "nothing"
            raise DonorError(
                f"the donor run captured {held}, not {site!r}; make it with "
                f"lens.run(inputs, names_filter={site!r}, positions=il.{at!r})"
            )
        if site in self.cache.slots:
            return pad([self._projected_at(site, row, c, at) for row, c in enumerate(columns)])
        if site not in self.cache.columns:
            raise DonorError(
                f"{site!r} has no token positions, so {at!r} cannot be found in the donor run; "
                "pass a tensor (example, position, ...) as the donor"
            )
        return pad([self._cached_at(site, row, c, at) for row, c in enumerate(columns)])

    def _latents_at(self, row: int, columns: np.ndarray) -> torch.Tensor:
        columns = columns[self.tokens.kind[row, columns] == Kind.LATENT]
        return self.latents[row, self.tokens.step[row, columns]]

    def _projected_at(
        self, site: str, row: int, columns: np.ndarray, at: Positions
    ) -> torch.Tensor:
        """States of image tokens at the projector, whose rows are tokens in an order of its own."""
        slots = {(r, c): i for r, c, i in self.cache.slots[site].tolist()}
        missing = [int(c) for c in columns if (row, int(c)) not in slots]
        if missing:
            raise DonorError(
                f"columns {missing} ({at!r}) of row {row} show no image, and {site!r} has only "
                "image tokens; select with il.image"
            )
        flat = self.cache.activations[site].flatten(0, -2)
        return flat[[slots[row, int(c)] for c in columns]]

    def _cached_at(self, site: str, row: int, columns: np.ndarray, at: Positions) -> torch.Tensor:
        held = self.cache.columns[site][row].tolist()
        missing = [int(c) for c in columns if int(c) not in held]
        if missing == [int(np.flatnonzero(self.tokens.kind[row] != Kind.PAD)[-1])]:
            raise DonorError(
                f"column {missing[0]} ({at!r}) of row {row} is the last token written, which the "
                f"model did not read, so there is no state of it at {site!r}; select less, such as "
                "il.last_prompt, or use context='fixed', which reads the finished run"
            )
        if missing:
            raise DonorError(
                f"the donor run did not capture {site!r} at columns {missing} ({at!r}) of row "
                f"{row}; make it with positions=il.{at!r}"
            )
        return self.cache.activations[site][row, [held.index(int(c)) for c in columns]]

    def __repr__(self) -> str:
        lines = [f"Run of {len(self)} example{'s' * (len(self) != 1)}: {self.trigger}"]
        for row in range(min(len(self), 4)):
            asked, wrote = self.tokens.asked(row), self.wrote(row)
            lines.append(f"  {row}: asked {asked[:_SHOWN]!r}" + "..." * (len(asked) > _SHOWN))
            lines.append(
                f"     wrote {wrote[:_SHOWN]!r}" + "..." * (len(wrote) > _SHOWN)
                + f", answer {self.answers[row]!r}"
            )  # fmt: skip
        return "\n".join(lines + (["  ..."] if len(self) > 4 else []))

    def _repr_html_(self) -> str:
        from imaginelens.view.run_cards import run_card

        return run_card(self)


def always_emitters(*runs: Run) -> list[int]:
    """The rows that feed back latents in every one of several unedited runs, base and source, say.

    Whether an edited run emits is a consequence of the edit: do not select by it.

    Raises:
        InputError: the runs have unequal numbers of rows.
    """
    sizes = {len(run) for run in runs}
    if len(sizes) != 1:
        raise InputError(f"runs of {sorted(sizes)} rows do not pair up; give runs of equal size")
    return sorted(set.intersection(*(set(run.trigger.emitters) for run in runs)))


def finish(
    loop: LatentLoop,
    sequences: torch.Tensor,
    prompt: Prompt,
    finder: AnswerFinder,
    capture: CaptureEntry | None,
    positions: Sequence[Positions],
    table: SiteTable,
    no_latents: torch.Tensor,
    words: CaptureEntry | None = None,
) -> Run:
    """Put together the run that a finished loop left behind.

    `no_latents` is an empty (0, d_model) tensor of the model's dtype, on its device. `words` has
    read the states of latents that are written tokens.
    """
    if words is not None:
        forget_unread(loop.tokens)
    tokens, answers = find_answers(loop.tokens, finder)
    cells = loop.fed if words is None else read_cells(words, tokens)
    latents, mask, span = _collect_latents(cells, tokens, no_latents)
    spans = loop.spans if words is None else word_records(tokens)
    logits = torch.stack(loop.logits, 1) if loop.logits else None
    return Run(
        prompt=prompt,
        sequences=sequences,
        tokens=tokens,
        latents=latents,
        latent_mask=mask,
        latent_span=span,
        trigger=Trigger(
            tuple(spans), tuple(int(n) for n in mask.sum(1)), written=words is not None
        ),
        cache=assemble(capture, tokens, positions, table),
        found_answers=tuple(answers),
        position_ids=loop.position_ids,
        logits=logits,
        inserted=_padded(loop.inserted, no_latents),
        seconds=loop.seconds,
        forwards=loop.forwards,
    )


def find_answers(tokens: TokenMap, finder: AnswerFinder) -> tuple[TokenMap, list[str | None]]:
    """Mark each row's answer, searched behind its last latent span."""
    columns: list[np.ndarray] = []
    answers: list[str | None] = []
    for row in range(len(tokens)):
        latents = tokens.latents(row)
        start = max(tokens.prompt_width, int(latents[-1]) + 1 if len(latents) else 0)
        real = np.flatnonzero(tokens.kind[row] != Kind.PAD)
        behind = real[real >= start]
        text = tokens.text(row, start)
        found = finder(text)
        answers.append(None if found is None else text[slice(*found)])
        columns.append(tokens.overlapping(row, behind, finder) if found else behind[:0])
    return tokens.finished(columns), answers


def assemble(
    capture: CaptureEntry | None,
    tokens: TokenMap,
    positions: Sequence[Positions] | None,
    table: SiteTable,
) -> ActivationCache:
    """Make the cache of what was captured, cut to `positions` (None keeps what was captured)."""
    if capture is None:
        return ActivationCache()
    axes = {name: table[name].kind.axes for name in capture.sites}
    values, columns = dict(capture.whole), {}
    for name, act in capture.whole.items():
        if not table[name].is_vision:
            columns[name] = torch.arange(tokens.width)[-act.shape[1] :].repeat(len(act), 1)
    for name, cells in capture.cells.items():
        cells = _alike(cells)
        rows = [_row_cells(cells, row, tokens, positions) for row in range(len(tokens))]
        filled = [torch.stack([v for _, v in row]) for row in rows if row]
        if not filled:
            continue
        blank = filled[0][:0]
        values[name] = pad(
            [torch.stack([v for _, v in row]) if row else blank for row in rows]
        ).values
        width = values[name].shape[1]
        columns[name] = torch.tensor([[c for c, _ in r] + [-1] * (width - len(r)) for r in rows])
    ordered = {name: values[name] for name in capture.sites if name in values}
    blocks = [int(n.split(".")[1]) for n in table if n.startswith("blocks.")]
    return ActivationCache(ordered, columns, axes, dict(capture.slots), max(blocks) + 1)


def _alike(
    cells: Sequence[tuple[int, int, torch.Tensor]],
) -> list[tuple[int, int, torch.Tensor]]:
    """The cells with their last axis filled up with zeros: patterns grow by a key per step."""
    width = max((value.shape[-1] for _, _, value in cells), default=0)
    return [
        (row, column, torch.nn.functional.pad(value, (0, width - value.shape[-1])))
        for row, column, value in cells
    ]


def _row_cells(
    cells: Sequence[tuple[int, int, torch.Tensor]],
    row: int,
    tokens: TokenMap,
    positions: Sequence[Positions] | None,
) -> list[tuple[int, torch.Tensor]]:
    found = {column: value for r, column, value in cells if r == row}
    if positions is not None:
        wanted = {int(c) for at in positions for c in at.resolve(tokens, row)}
        found = {c: v for c, v in found.items() if c in wanted}
    return sorted(found.items(), key=lambda pair: pair[0])


def wanted_while_generating(
    positions: Sequence[Positions],
) -> Callable[[TokenMap, int], np.ndarray]:
    """What to capture when some selectors resolve only once the run is complete: for those, every
    generated position, cut down afterwards."""

    def wanted(tokens: TokenMap, row: int) -> np.ndarray:
        found = [np.zeros(0, dtype=int)]
        for at in positions:
            if at.awaits_answer:
                found.append(np.arange(max(tokens.prompt_width - 1, 0), tokens.width))
            else:
                found.append(at.resolve(tokens, row))
        return np.unique(np.concatenate(found))

    return wanted


def _padded(rows: Sequence[torch.Tensor] | None, no_latents: torch.Tensor) -> torch.Tensor | None:
    """Rows of states in one tensor, (example, position, d_model), filled up with zeros."""
    if rows is None:
        return None
    blank = no_latents.new_zeros(len(rows), max(map(len, rows)), no_latents.shape[-1])
    for row, states in enumerate(rows):
        blank[row, : len(states)] = states if len(states) else 0
    return blank


def _collect_latents(
    cells: Sequence[Cell], tokens: TokenMap, no_latents: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    n_rows = len(tokens)
    rows: list[list[torch.Tensor]] = [[] for _ in range(n_rows)]
    spans: list[list[int]] = [[] for _ in range(n_rows)]
    for row, column, z in cells:
        rows[row].append(z)
        spans[row].append(int(tokens.span[row, column]))
    width = max(map(len, rows), default=0)
    latents = no_latents.new_zeros(n_rows, width, no_latents.shape[-1])
    mask = torch.zeros(n_rows, width, dtype=torch.bool)
    span = torch.full((n_rows, width), -1)
    for row, zs in enumerate(rows):
        if zs:
            latents[row, : len(zs)] = torch.stack(zs)
            mask[row, : len(zs)] = True
            span[row, : len(zs)] = torch.tensor(spans[row])
    return latents, mask, span
