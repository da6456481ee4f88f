"""Latent spans: the record of one, and where a prompt holds them.

Some families (Coconut, SIM-CoT) have a placeholder in the prompt for every latent. Its input is the
state one position earlier, which a model has only when it has read that far: such a prompt is read
in segments, each of which begins with a latent.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal

import numpy as np
import torch

from imaginelens.hooks.behaviour import Behaviour
from imaginelens.hooks.errors import InputError
from imaginelens.hooks.spec import LatentSpec, SpanTokens
from imaginelens.hooks.tokens import Kind, TokenMap

OpenedBy = Literal["sampled", "forced", "prompt", "always"]
EndedBy = Literal[
    "close", "cap", "criterion", "budget", "reopened", "length", "prompt", "end of text"
]
# A prompt's inputs with one value for every position.
_BY_POSITION = ("input_ids", "position_ids", "token_type_ids", "mm_token_type_ids")


@dataclass
class SpanRecord:
    """Why one latent span opened and why it ended.

    Attributes:
        column: of the first latent; -1 if the span closed before it fed any.
        steps: how many latents were fed.
    """

    row: int
    opened_by: OpenedBy
    column: int = -1
    steps: int = 0
    ended_by: EndedBy = "length"


def mark_placeholders(
    tokens: TokenMap, spec: LatentSpec | None, ids: SpanTokens | None, behaviour: Behaviour
) -> TokenMap:
    """Mark the placeholders of a prompt as latents, in place; neighbours are one span.

    Raises:
        InputError: a placeholder has no token before it, an image stands behind one, or the model's
            tokens see later ones, so that the state it is fed cannot be computed.
    """
    if spec is None or ids is None or spec.trigger != "prompt":
        return tokens
    for row in range(len(tokens)):
        columns = tokens.columns(row, Kind.TEXT)
        columns = columns[tokens.ids[row, columns] == ids.pad]
        tokens.kind[row, columns] = Kind.LATENT
        tokens.step[row, columns] = np.arange(len(columns))
        tokens.span[row, columns] = np.cumsum(np.diff(columns, prepend=columns[:1]) > 1)
        if spec.feeds == "state" and tokens.start(row) in columns:
            raise InputError(
                f"row {row} begins with the latent placeholder {spec.pad!r}, which is fed the "
                "state of the token before it; put the question before the placeholders"
            )
    if spec.feeds == "state":
        _check_images(tokens, spec)
        for start, _ in segments(tokens, spec)[1:]:
            _check_cut(tokens, spec, behaviour, start)
    return tokens


def _check_cut(tokens: TokenMap, spec: LatentSpec, behaviour: Behaviour, column: int) -> None:
    if not behaviour.may_cut(tokens, column):
        raise InputError(
            f"the latent placeholder {spec.pad!r} at position {column} is fed a state of what "
            "comes before it, which in this model also depends on what comes behind; use a model "
            "whose prompt is read causally, or a family that opens its spans by itself"
        )


def _check_images(tokens: TokenMap, spec: LatentSpec) -> None:
    cuts = segments(tokens, spec)[1:]
    images = np.flatnonzero(np.isin(tokens.kind, (Kind.IMAGE, Kind.VIDEO, Kind.AUDIO)).any(0))
    if cuts and len(images) and images[-1] >= cuts[0][0]:
        raise InputError(
            f"an image at position {images[-1]} stands behind the latent placeholder {spec.pad!r} "
            f"at {cuts[0][0]}, and images are read at once; put the images first, and run examples "
            "one by one where a batch shifts them"
        )


def without_latents(tokens: TokenMap) -> TokenMap:
    """A prompt that is to be read alone.

    Raises:
        InputError: it holds placeholders, which only a run fills.
    """
    n = int((tokens.kind == Kind.LATENT).sum())
    if n:
        raise InputError(
            f"the prompt holds {n} latent placeholders, which a plain read would take for words; "
            "generate first, run = lens.run(...), and read the run"
        )
    return tokens


def records(tokens: TokenMap) -> list[SpanRecord]:
    """One record for every latent span of a prompt."""
    found = []
    for row in range(len(tokens)):
        columns = tokens.columns(row, Kind.LATENT)
        for span in np.unique(tokens.span[row, columns]):
            own = columns[tokens.span[row, columns] == span]
            found.append(SpanRecord(row, "prompt", int(own[0]), len(own), "prompt"))
    return found


def segments(tokens: TokenMap, spec: LatentSpec | None) -> list[tuple[int, int]]:
    """The columns, from and to, of each forward that reads the prompt: where a latent is computed
    from the states before it, a new one begins; where image tokens come again before it, with
    them."""
    latents = (tokens.kind == Kind.LATENT).any(0)
    computed = spec is not None and spec.feeds == "state"
    ahead = spec.inserts.patches if spec is not None and spec.inserts is not None else 0
    cuts = (np.flatnonzero(latents) - ahead).tolist() if computed else []
    return list(pairwise([0, *cuts, tokens.width]))


def part_of(
    inputs: Mapping[str, Any], start: int, stop: int, vision: Collection[str]
) -> dict[str, Any]:
    """A prepared prompt's inputs for the columns from `start` to `stop`; what lies before is in the
    cache, `vision` inputs included."""
    seen = {*vision, "mm_encoder_outputs"} if start else set()
    part = {name: value for name, value in inputs.items() if name not in seen}
    for name in _BY_POSITION:
        if isinstance(part.get(name), torch.Tensor):
            part[name] = part[name][..., start:stop]
    if isinstance(part.get("attention_mask"), torch.Tensor):
        part["attention_mask"] = part["attention_mask"][..., :stop]
    return part
