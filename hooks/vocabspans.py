"""Latents that are words: vocabulary tokens a model writes, at which its states carry the thought.

CoVT (arXiv 2511.19418), LaViT and Heima (arXiv 2501.19201) sample such tokens like any other, and
nothing is fed back: their input is the token's own embedding, always the same. What differs from
one picture to the next is the residual stream above it, which later positions attend to.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from imaginelens.hooks.answers import AnswerFinder
from imaginelens.hooks.entries import CaptureEntry
from imaginelens.hooks.errors import CheckpointError
from imaginelens.hooks.positions import latent
from imaginelens.hooks.sites import SiteTable
from imaginelens.hooks.spans import EndedBy, OpenedBy, SpanRecord
from imaginelens.hooks.spec import PromptStyle
from imaginelens.hooks.tokens import Kind, TokenMap

Cell = tuple[int, int, torch.Tensor]


@dataclass(frozen=True, kw_only=True)
class VocabSpec:
    """Which written tokens are a family's latents.

    They are selected like latents that are fed back, `il.latent[t]` and `il.span[k].latent`, and
    edited in the residual stream, `site="blocks.1.hook_resid_post"`; `hook_latent` is not offered.

    Attributes:
        name: the family's name.
        groups: the tokens of each kind of span, as its authors write it: `("<see>",) * 4`. Tokens
            of one group that stand side by side are one span, however many a model writes.
        open, close: tokens around a span, if it has any. They are no latents.
        site: where `run.latents` are read: the state that the family's authors decode or align.
        decodes: what they make of it.
        prompt, answer: as in `il.LatentSpec`.
        marks: config keys that only this family writes.
        checkpoints: Hub ids of the family.

    Raises:
        ValueError: there is no group, or no token in one, or a token belongs to two groups.

    >>> VocabSpec(name="mine", groups=(("<see>",) * 4, ("<far>", "<near>"))).strings
    ('<see>', '<far>', '<near>')
    """

    name: str
    groups: tuple[tuple[str, ...], ...]
    open: str | None = None
    close: str | None = None
    site: str = "ln_final.hook_normalized"
    decodes: str = ""
    prompt: PromptStyle = field(default_factory=PromptStyle)
    answer: AnswerFinder | None = None
    marks: tuple[str, ...] = ()
    checkpoints: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not self.groups or not all(self.groups):
            raise ValueError(
                f"VocabSpec {self.name!r} has groups={self.groups!r}; give at least one group of "
                "at least one token"
            )
        tokens = [token for group in self.groups for token in dict.fromkeys(group)]
        twice = sorted({token for token in tokens if tokens.count(token) > 1})
        if twice:
            raise ValueError(
                f"VocabSpec {self.name!r} has {twice[0]!r} in two groups, so that a span of it has "
                "no kind; put each token into one"
            )

    @property
    def kind(self) -> str:
        """What its latents are: `vocab`, tokens that are written."""
        return "vocab"

    @property
    def markers(self) -> tuple[str, ...]:
        """The tokens around a span."""
        return tuple(token for token in (self.open, self.close) if token is not None)

    @property
    def strings(self) -> tuple[str, ...]:
        """All tokens of the family, each once."""
        tokens = [token for group in self.groups for token in group]
        return tuple(dict.fromkeys([*self.markers, *tokens]))

    def fits(self, vocabulary: Collection[str]) -> bool:
        """Whether a tokenizer shows the family: both markers and a whole group, or, where it has
        no markers, every group. A single token shows nothing."""
        if len(self.strings) < 2:
            return False
        whole = [set(group) <= set(vocabulary) for group in self.groups]
        enough = any(whole) if len(self.markers) == 2 else all(whole)
        return enough and set(self.markers) <= set(vocabulary)

    def resolve(self, tokenizer: Any) -> dict[int, int]:
        """The ids of the latent tokens that a checkpoint has, and the group of each.

        Raises:
            CheckpointError: there is no tokenizer, or it has no group whole.
        """
        vocabulary: Mapping[str, int] = {} if tokenizer is None else tokenizer.get_vocab()
        found = [number for number, group in enumerate(self.groups) if set(group) <= {*vocabulary}]
        if not found:
            lacks = sorted(set(self.strings) - {*vocabulary})
            raise CheckpointError(
                f"the {self.name} family needs tokens that "
                f"{'a tokenizer tells, and there is none' if tokenizer is None else 'are missing'} "
                f"({', '.join(map(repr, lacks))}); pass the checkpoint's own processor, or "
                "spec=False"
            )
        return {int(vocabulary[token]): number for number in found for token in self.groups[number]}

    def suppressed(self, tokenizer: Any) -> list[int]:
        """What is never sampled where latents are skipped: the open token and the latents."""
        vocabulary: Mapping[str, int] = tokenizer.get_vocab()
        opens = [] if self.open is None else [int(vocabulary[self.open])]
        return sorted({*opens, *self.resolve(tokenizer)})


def without_feedback(table: SiteTable, spec: VocabSpec) -> SiteTable:
    """The sites of a model of such a family: there is no state that is fed back."""
    why = (
        f"{spec.name} feeds nothing back, its latents are tokens it writes and carry their content "
        "in the residual stream; name a site there, such as 'blocks.0.hook_resid_post', or "
        "'blocks.*.hook_resid_post' for all layers at once"
    )
    sites = {name: site for name, site in table.items() if name != "hook_latent"}
    return replace(table, sites=sites, unavailable={**table.unavailable, "hook_latent": why})


def states_of_words(spec: VocabSpec) -> CaptureEntry:
    """What reads the states that become `run.latents`."""
    return CaptureEntry((spec.site,), latent.resolve)


def read_cells(entry: CaptureEntry, tokens: TokenMap) -> list[Cell]:
    """Row, column and state of every latent that was read, in order."""
    cells = [cell for cells in entry.cells.values() for cell in cells]
    return sorted(
        (c for c in cells if tokens.kind[c[0], c[1]] == Kind.VOCAB), key=lambda c: (c[0], c[1])
    )


def forget_unread(tokens: TokenMap) -> None:
    """In place: a row's last token was written and never read. As a latent it had no state, so it
    is none."""
    for row in range(len(tokens)):
        real = (tokens.kind[row] != Kind.PAD).nonzero()[0]
        if len(real) and tokens.kind[row, real[-1]] == Kind.VOCAB:
            tokens.kind[row, real[-1]] = Kind.TEXT
            tokens.span[row, real[-1]] = tokens.step[row, real[-1]] = -1


def word_records(tokens: TokenMap) -> list[SpanRecord]:
    """One record for every span of written latents."""
    found = []
    for row in range(len(tokens)):
        columns = tokens.columns(row, Kind.VOCAB)
        for span in sorted(set(tokens.span[row, columns].tolist())):
            own = columns[tokens.span[row, columns] == span]
            opened: OpenedBy = "prompt" if own[0] < tokens.prompt_width else "sampled"
            ended: EndedBy = "length" if _goes_on(tokens, row, int(own[-1])) else "close"
            found.append(SpanRecord(row, opened, int(own[0]), len(own), ended))
    return found


def _goes_on(tokens: TokenMap, row: int, column: int) -> bool:
    """Whether behind the last latent of a span stands one more, which nothing has read."""
    if column + 1 >= tokens.width:
        return False
    behind, here = (int(tokens.ids[row, c]) for c in (column + 1, column))
    unread = Kind(tokens.kind[row, column + 1]) is not Kind.VOCAB
    return unread and tokens.spoken.get(behind) == tokens.spoken[here]
