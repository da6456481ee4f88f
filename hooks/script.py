"""A teacher-forced sequence: a run's tokens and latents, read in one parallel forward.

Scripts carry everything that generation used (pixels, positions, masks, token types), so that
reading a script gives the logits that generating it gave.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch

from imaginelens.hooks.run import Run
from imaginelens.hooks.tokens import Kind, TokenMap


@dataclass(frozen=True)
class Script:
    """One batch to be read in one forward.

    Attributes:
        inputs: the model's inputs.
        tokens: what every position is.
        laid: (example, position) where an embedding is laid over the token's own.
        embeds: those embeddings, (example, position, d_model).
        read_at: for each example the column whose logits decide its first answer token; -1 if the
            run it was made of has no answer.
    """

    inputs: dict[str, Any]
    tokens: TokenMap
    laid: torch.Tensor
    embeds: torch.Tensor
    read_at: tuple[int, ...]


def script_of(
    run: Run,
    *,
    embedding: torch.nn.Module,
    filler: int,
    media: Sequence[int] = (),
    written_type: int = 0,
    endings: Sequence[Sequence[int]] | None = None,
) -> Script:
    """Make the script of a run.

    Args:
        embedding: the model's token embedding.
        filler: an ordinary token id, put in the place of ids that the model cannot embed or would
            take for an image. Other latents keep their ids, which some models read in every layer.
        media: ids of tokens at which the model looks for a picture, a video or a sound.
        written_type: the token type of tokens that the model wrote.
        endings: token ids to put in the place of each row's answer and what follows it; None reads
            the run as it was.
    """
    tokens = run.tokens if endings is None else _with_endings(run.tokens, endings)
    ids = torch.as_tensor(tokens.ids, device=run.sequences.device)
    laid, embeds = _overlay(run, tokens, ids, embedding, media)
    untold = ids >= len(cast(torch.Tensor, embedding.weight))
    untold |= torch.isin(ids, torch.tensor(media, dtype=ids.dtype, device=ids.device))
    ids = torch.where(laid & untold, torch.full_like(ids, filler), ids)
    inputs: dict[str, Any] = run.prompt.vision_inputs
    inputs |= _row_fields(run, ids, written_type) | {"input_ids": ids, "use_cache": False}
    starts = [tokens.columns(row, Kind.ANSWER) for row in range(len(tokens))]
    read_at = tuple(int(s[0]) - 1 if len(s) else -1 for s in starts)
    return Script(inputs, tokens, laid, embeds, read_at)


def _with_endings(tokens: TokenMap, endings: Sequence[Sequence[int]]) -> TokenMap:
    """The map up to each row's answer, then the ending as the answer, then padding."""
    keep = []
    for row in range(len(tokens)):
        answer = tokens.columns(row, Kind.ANSWER)
        real = np.flatnonzero(tokens.kind[row] != Kind.PAD)
        keep.append(int(answer[0]) if len(answer) else int(real[-1]) + 1)
    width = max(k + len(e) for k, e in zip(keep, endings, strict=True))
    widened = tokens
    blank = np.full(len(tokens), -1)
    while widened.width < width:
        widened = widened.grown(np.zeros_like(blank), np.full_like(blank, Kind.PAD), blank, blank)
    ids, kind = widened.ids[:, :width].copy(), widened.kind[:, :width].copy()
    span, step = widened.span[:, :width].copy(), widened.step[:, :width].copy()
    for row, (start, ending) in enumerate(zip(keep, endings, strict=True)):
        stop = start + len(ending)
        ids[row, start:stop], kind[row, start:stop] = list(ending), Kind.ANSWER
        kind[row, stop:] = Kind.PAD
        if not len(tokens.columns(row, Kind.ANSWER)):
            kind[row, start:stop] = Kind.PAD  # this row has no place for an answer
        span[row, start:], step[row, start:] = -1, -1
    return TokenMap(
        ids=ids,
        kind=kind,
        image=widened.image[:, :width],
        cell=widened.cell[:, :width],
        box=widened.box[:, :width],
        span=span,
        step=step,
        grids=tokens.grids,
        tokenizer=tokens.tokenizer,
        prompt_width=tokens.prompt_width,
        keys=tokens.keys,
        markers=tokens.markers,
        videos=tokens.videos,
    )


def _overlay(
    run: Run,
    tokens: TokenMap,
    ids: torch.Tensor,
    embedding: torch.nn.Module,
    media: Sequence[int],
) -> tuple[torch.Tensor, torch.Tensor]:
    latent = torch.as_tensor(tokens.kind == Kind.LATENT, device=ids.device)
    written = torch.zeros_like(latent)
    for token in media:  # a model may write this token: no image belongs to it
        written[:, tokens.prompt_width :] |= ids[:, tokens.prompt_width :] == token
    width = run.latents.shape[-1] or 1
    embeds = torch.zeros(*ids.shape, width, dtype=run.latents.dtype, device=ids.device)
    for row in range(len(tokens)):
        columns = tokens.columns(row, Kind.LATENT)
        embeds[row, columns] = run.latents[row, tokens.step[row, columns]]
    again = torch.as_tensor(tokens.kind == Kind.INSERTED, device=ids.device)
    for row, held in enumerate(run.inserted if run.inserted is not None else ()):
        columns = tokens.columns(row, Kind.INSERTED)
        embeds[row, columns] = held[: len(columns)]
    latent |= again
    written &= ~latent
    if bool(written.any()):
        own = embedding(ids).detach()
        embeds = torch.where(latent[..., None], embeds.to(own), own)
    return latent | written, embeds


def _row_fields(run: Run, ids: torch.Tensor, written_type: int) -> dict[str, torch.Tensor]:
    """Positions, masks and token types, continued or cut to the width of `ids`."""
    width = ids.shape[1]
    fields: dict[str, torch.Tensor] = {}
    mask = run.prompt.mask
    ones = mask.new_ones(len(mask), width - mask.shape[1])
    fields["attention_mask"] = torch.cat([mask, ones], dim=1)
    positions = run.position_ids
    if positions is not None:
        more = torch.arange(1, max(width - positions.shape[-1], 0) + 1, device=positions.device)
        positions = torch.cat([positions, positions[..., -1:] + more], dim=-1)
        fields["position_ids"] = positions[..., :width]
    prompt_width = run.tokens.prompt_width
    for name, generated in (
        ("mm_token_type_ids", 0),
        ("token_type_ids", written_type),
        ("image_embeds_position_mask", 0),
    ):
        types = run.prompt.inputs.get(name)
        if types is not None:
            new = types.new_full((len(types), width - prompt_width), generated)
            fields[name] = torch.cat([types, new], dim=1)
    for name, seen in run.prompt.sight.items():  # what is written sees what the last token saw
        new = seen[:, -1:].repeat_interleave(width - prompt_width, dim=1)
        fields[name] = torch.cat([seen, new], dim=1)
    return fields
