"""Prompts with room for image tokens that come again before each latent (IVT-LR).

How many there are is known before the model runs, so the prompt is widened first and its new
columns are filled while it is read. Reading on from a cache is then reading the whole at once.
"""

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool

from imaginelens.hooks.errors import InputError
from imaginelens.hooks.insertion import Insertion, last_picture
from imaginelens.hooks.prompts import ROW_FIELDS, Prompt
from imaginelens.hooks.tokens import Kind, TokenMap


@dataclass(frozen=True)
class Widened(Prompt):
    """A prompt with columns for what comes again.

    Attributes:
        plain: the prompt as it was.
        inserted: (example, position), which columns are new.
    """

    plain: Prompt | None = None
    inserted: Bool[torch.Tensor, "example position"] | None = None


def widened(prompt: Prompt, insertion: Insertion, *, pad: int, padding: int) -> Prompt:
    """The prompt with new columns before each placeholder; as it is, if it has none.

    Args:
        pad: the placeholder's id, which the new columns have as well.
        padding: the id to pad rows with that have fewer placeholders.

    Raises:
        InputError: the prompt brings positions of its own.
    """
    ids, mask = prompt.inputs["input_ids"], prompt.mask
    if isinstance(prompt, Widened) or not bool(((ids == pad) & (mask != 0)).any()):
        return prompt
    if "position_ids" in prompt.inputs:
        raise InputError(
            "the prompt brings position_ids, and image tokens that are put in move its positions; "
            "leave them out"
        )
    rows = [
        _sources(own, seen, pad, insertion.patches) for own, seen in zip(ids, mask, strict=True)
    ]
    width = max(map(len, rows))
    source = torch.tensor([[_PADDED] * (width - len(row)) + row for row in rows])
    source = source.to(ids.device)
    inputs = dict(prompt.inputs) | {"attention_mask": mask}
    fills = {"input_ids": (pad, padding), "attention_mask": (1, 0)}
    for name in ROW_FIELDS:
        if name in inputs and inputs[name].shape == ids.shape:
            inputs[name] = _moved(inputs[name], source, *fills.get(name, (0, 0)))
    fields = vars(prompt) | {"inputs": inputs}
    return Widened(**fields, plain=prompt, inserted=source == _INSERTED)


_INSERTED, _PADDED = -1, -2  # in place of a column that a column of a widened prompt comes from


def _sources(ids: torch.Tensor, mask: torch.Tensor, pad: int, patches: int) -> list[int]:
    """For each column of a widened row, the column that it was."""
    found: list[int] = []
    for column in mask.nonzero()[:, 0].tolist():
        found += [_INSERTED] * (patches * int(ids[column] == pad)) + [column]
    return found


def _moved(values: torch.Tensor, source: torch.Tensor, new: int, padding: int) -> torch.Tensor:
    moved = values.gather(1, source.clamp_min(0))
    moved = moved.masked_fill(source == _INSERTED, new)
    return moved.masked_fill(source == _PADDED, padding)


def mark_inserted(tokens: TokenMap, prompt: Prompt) -> TokenMap:
    """Mark the new columns of a widened prompt, in place."""
    if isinstance(prompt, Widened) and prompt.inserted is not None:
        tokens.kind[prompt.inserted.cpu().numpy()] = Kind.INSERTED
    return tokens


def settle_inserted(tokens: TokenMap, insertion: Insertion) -> TokenMap:
    """Number the new columns as the latents they come before, in place.

    Raises:
        InputError: placeholders do not stand side by side, or a row's last picture has too few
            tokens.
    """
    for row in range(len(tokens)):
        latents = tokens.columns(row, Kind.LATENT)
        if not len(latents):
            continue
        if (np.diff(latents) != insertion.patches + 1).any():
            raise InputError(
                f"the latent placeholders of row {row} do not stand side by side, and what would "
                "come again between them is not defined; write them one behind the other"
            )
        cells, needed = len(last_picture(tokens, row)), insertion.patches * len(latents)
        if cells < needed:
            raise InputError(
                f"row {row} has {len(latents)} latents, before each of which {insertion.patches} "
                f"image tokens come again, and its last picture has {cells}; give a picture of "
                f"{needed} tokens or more"
            )
        inserted = tokens.columns(row, Kind.INSERTED)
        tokens.step[row, inserted] = np.repeat(np.arange(len(latents)), insertion.patches)
        tokens.span[row, inserted] = tokens.span[row, latents] = 0
    return tokens


def count_on(positions: torch.Tensor, tokens: TokenMap) -> torch.Tensor:
    """Positions counted one by one, padding left out, in the shape that the model was given."""
    real = torch.as_tensor(tokens.kind != Kind.PAD)
    line = (real.long().cumsum(-1) - 1).clamp_min(0)
    return line.to(positions).expand_as(positions).clone()
