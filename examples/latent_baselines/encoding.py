"""From raw chains to batches: prompts as the model reads them, pictures as visual tokens.

The vision tower is frozen, so each picture is encoded once. What the latents of a chain should look
like is made of the pictures that its reply shows: see `targets`.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers import PreTrainedModel

from examples.capimagine.chains import Chain, open_picture
from examples.capimagine.refused import Refused
from examples.latent_baselines.loop import Answers, Page, Span
from imaginelens.hooks import LatentModel
from imaginelens.hooks.errors import InputError

AT_ONCE = 64  # pictures and prompts that go through the processor and the vision tower together


@dataclass(frozen=True)
class Item:
    """One chain, ready to be learned from.

    Attributes:
        number: of the chain among those encoded.
        page: its prompt, a batch of one.
        hinted: the same with the pictures of the reply shown behind the prompt.
        targets: what each latent step should be, (step, d_model); None if the reply has no picture.
        answer: token ids, the end token last.
    """

    number: int
    page: Page
    hinted: Page | None
    targets: Tensor | None
    answer: Tensor


@dataclass(frozen=True)
class Batch:
    """Some items, padded: what an objective learns from."""

    numbers: Tensor
    page: Page
    answers: Answers
    targets: Tensor | None  # (example, step, d_model)
    hinted: Page | None


def asked(chain: Chain, processor: Any) -> dict[str, Any]:
    """What the model is asked, as `lens.run` takes it: pictures and text in the chain's order."""
    text = processor.apply_chat_template(
        chain.messages(reply=False), add_generation_prompt=True, tokenize=False
    )
    return {"images": [open_picture(p) for p in chain.pictures(chain.prompt)], "text": text}


@torch.no_grad()
def encode(
    lens: LatentModel, span: Span, chains: Sequence[Chain]
) -> tuple[list[Item], list[Refused]]:
    """Encode chains; gives those that can be learned from, and which are refused."""
    items: list[Item] = []
    refused: list[Refused] = []
    for begin in range(0, len(chains), AT_ONCE):
        ready = []
        for chain in chains[begin : begin + AT_ONCE]:
            try:
                ready.append(_Asked.of(chain, lens, span))
            except InputError as error:
                refused.append(Refused(chain.id, str(error), "cannot be shared out or spelled"))
            except OSError as error:
                refused.append(Refused(chain.id, str(error), "broken picture"))
        items += _encode(lens, span, ready, first=len(items))
    return items, refused


@dataclass(frozen=True)
class _Asked:
    """A chain whose pictures could be opened and whose answer could be spelled."""

    example: dict[str, Any]
    shown: list[Any]  # pictures of the reply
    answer: Tensor

    @classmethod
    def of(cls, chain: Chain, lens: LatentModel, span: Span) -> "_Asked":
        shown = [open_picture(p) for p in chain.pictures(chain.reply)]
        if shown and span.steps % len(shown):
            raise InputError(
                f"its reply shows {len(shown)} pictures, which {span.steps} latent steps cannot "
                "share equally; train with another number of steps, or leave such chains out"
            )
        ids = lens.tokenizer(chain.answer, add_special_tokens=False).input_ids
        unknown = lens.tokenizer.unk_token_id
        if not ids or (unknown is not None and unknown in ids):
            raise InputError(
                f"its answer {chain.answer!r} has words that the tokenizer does not know, or none"
            )
        answer = torch.tensor([*ids, lens.tokenizer.eos_token_id])
        return cls(asked(chain, lens.processor), shown, answer)


def _encode(
    lens: LatentModel, span: Span, ready: Sequence[_Asked], *, first: int
) -> Iterator[Item]:
    if not ready:
        return
    model = lens.model
    inputs = lens.prompt([one.example for one in ready]).inputs
    grids = inputs.get("image_grid_thw")
    own = iter(() if grids is None else _see(model, inputs["pixel_values"], grids))
    shown = _reply_pictures(lens, ready)
    places = _positions(model, inputs)
    grids_left = iter(() if grids is None else grids)
    blank = model.get_input_embeddings().weight[:0].detach()
    for row, one in enumerate(ready):
        real = inputs["attention_mask"][row].bool()
        ids, count = inputs["input_ids"][row, real], len(one.example["images"])
        # nothing first: torch cannot put no pictures together
        features = [blank, *(next(own) for _ in range(count))]
        grid = [next(grids_left) for _ in range(count)]
        hints = [next(shown) for _ in one.shown]
        page = _page(ids, places[:, row, real], features, span, torch.zeros_like(ids))
        yield Item(
            number=first + row,
            page=page,
            hinted=_hinted(model, span, ids, features, grid, hints) if hints else None,
            targets=targets([tokens for tokens, _ in hints], span.steps) if hints else None,
            answer=one.answer.to(ids.device),
        )


def targets(pictures: Sequence[Tensor], steps: int) -> Tensor:
    """What each latent step should be, of the visual tokens of the reply's pictures.

    With as many steps as pictures, step k is the mean of picture k's merged tokens (the token
    itself of a picture of 28x28 pixels). With m times as many, each picture's tokens, in reading
    order, are cut into m parts of nearly equal size, and a step is the mean of one part: the rule
    by which Mirage compresses its helper image. (step, d_model).

    >>> targets([torch.tensor([[0.0], [2.0]]), torch.tensor([[5.0]])], 2).tolist()
    [[1.0], [5.0]]
    """
    each = steps // len(pictures)
    # of fewer tokens than parts, some are used twice
    tokens = [p.repeat_interleave(-(-each // len(p)), dim=0) for p in pictures]
    return torch.stack([part.mean(0) for p in tokens for part in p.tensor_split(each)])


def collate(items: Sequence[Item], *, pad_id: int) -> dict[str, Any]:
    """A batch as dicts of tensors, which trainers know how to move; `as_batch` names its parts."""
    answers = [item.answer for item in items]
    width = max(map(len, answers))
    batch: dict[str, Any] = {
        "numbers": torch.tensor([item.number for item in items]),
        "page": _left_padded([item.page for item in items], pad_id),
        "answers": {
            "ids": torch.stack([pad(a, (0, width - len(a)), value=pad_id) for a in answers]),
            "mask": torch.stack([pad(torch.ones_like(a), (0, width - len(a))) for a in answers]),
        },
    }
    aims = [item.targets for item in items if item.targets is not None]
    hints = [item.hinted for item in items if item.hinted is not None]
    if len(aims) == len(items):
        batch |= {"targets": torch.stack(aims), "hinted": _left_padded(hints, pad_id)}
    return batch


def as_batch(tensors: dict[str, Any]) -> Batch:
    """The parts of what `collate` gave."""
    return Batch(
        numbers=tensors["numbers"],
        page=Page(**tensors["page"]),
        answers=Answers(**tensors["answers"]),
        targets=tensors.get("targets"),
        hinted=Page(**tensors["hinted"]) if "hinted" in tensors else None,
    )


def _left_padded(pages: Sequence[Page], pad_id: int) -> dict[str, Tensor]:
    width = max(page.ids.shape[1] for page in pages)

    def together(name: str, dim: int, value: int = 0) -> Tensor:
        parts = [getattr(page, name) for page in pages]
        return torch.cat([pad(p, (width - p.shape[-1], 0), value=value) for p in parts], dim=dim)

    return {
        "ids": together("ids", 0, pad_id),
        "mask": together("mask", 0),
        "positions": together("positions", 1),
        "features": torch.cat([page.features for page in pages]),
        "aid": together("aid", 0),
    }


# ---- pictures ----------------------------------------------------------------------------------


def _see(model: PreTrainedModel, pixels: Tensor, grids: Tensor) -> list[Tensor]:
    """The merged visual tokens of each picture: (token, d_model)."""
    tokens = model.model.visual(pixels.to(model.dtype), grid_thw=grids).pooler_output
    merge = model.config.vision_config.spatial_merge_size
    return list(tokens.split((grids.prod(-1) // merge**2).tolist()))


def _reply_pictures(lens: LatentModel, ready: Sequence[_Asked]) -> Iterator[tuple[Tensor, Tensor]]:
    """Visual tokens and grid of each picture of the replies, in order."""
    pictures = [picture for one in ready for picture in one.shown]
    if not pictures:
        return iter(())
    seen = lens.processor.image_processor(images=pictures, return_tensors="pt")
    grids = seen["image_grid_thw"].to(lens.model.device)
    tokens = _see(lens.model, seen["pixel_values"].to(lens.model.device), grids)
    return iter(list(zip(tokens, grids, strict=True)))


# ---- places ------------------------------------------------------------------------------------


def _positions(model: PreTrainedModel, inputs: dict[str, Tensor]) -> Tensor:
    """The model's own rotary positions: (axis, example, position)."""
    types = inputs.get("mm_token_type_ids", torch.zeros_like(inputs["input_ids"]))
    places, _ = model.model.get_rope_index(
        input_ids=inputs["input_ids"],
        mm_token_type_ids=types,
        image_grid_thw=inputs.get("image_grid_thw"),
        attention_mask=inputs["attention_mask"],
    )
    return places


def _page(ids: Tensor, places: Tensor, features: Sequence[Tensor], span: Span, aid: Tensor) -> Page:
    """A prompt with the open marker behind it."""
    return Page(
        ids=torch.cat([ids, ids.new_tensor([span.open])])[None],
        mask=torch.ones(1, len(ids) + 1, dtype=torch.long, device=ids.device),
        positions=torch.cat([places, places.max().expand(3, 1) + 1], dim=1)[:, None],
        features=torch.cat(list(features)),
        aid=pad(aid, (0, 1))[None],
    )


def _hinted(
    model: PreTrainedModel,
    span: Span,
    ids: Tensor,
    features: Sequence[Tensor],
    grid: Sequence[Tensor],
    hints: Sequence[tuple[Tensor, Tensor]],
) -> Page:
    """The prompt with the reply's pictures behind it, each between vision markers."""
    config = model.config
    shown = [
        ids.new_tensor(
            [config.vision_start_token_id, *[config.image_token_id] * len(tokens),
             config.vision_end_token_id]
        )
        for tokens, _ in hints
    ]  # fmt: skip
    whole = torch.cat([ids, *shown])
    places = _positions(
        model,
        {
            "input_ids": whole[None],
            "attention_mask": torch.ones_like(whole)[None],
            "mm_token_type_ids": (whole == config.image_token_id).long()[None],
            "image_grid_thw": torch.stack([*grid, *(g for _, g in hints)]),
        },
    )[:, 0]
    seen = [*features, *(tokens for tokens, _ in hints)]
    steps = range(1, span.steps + 1, span.steps // len(hints))
    marks = [torch.full_like(own, step) for own, step in zip(shown, steps, strict=True)]
    return _page(whole, places, seen, span, torch.cat([torch.zeros_like(ids), *marks]))
