"""From chains to what a trainer reads: the data set's columns, and batches with their labels.

`dataset` gives TRL's columns, so any TRL trainer reads it. `Collator` makes the batches. We use it
instead of TRL's (1.16), which takes no picture in a completion, and with `assistant_only_loss` has
the model learn the image tokens of the assistant's turns, and needs a chat template that it knows.
"""

from __future__ import annotations

import io
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image
from torch import Tensor

from examples.capimagine.chains import Chain, Picture, open_picture
from imaginelens.hooks.errors import InputError

if TYPE_CHECKING:
    from datasets import Dataset

IGNORED = -100  # a label that is not learned
BY_TOKEN = ("input_ids", "attention_mask", "token_type_ids", "mm_token_type_ids")
IMAGE_TOKENS = ("<|vision_start|>", "<|image_pad|>", "<|video_pad|>", "<|vision_end|>")


def direct(chain: Chain) -> Chain:
    r"""The chain with nothing but its answer as the reply: the control of what imagination adds.

    The answer is boxed if it was boxed in the chain.

    >>> chain = Chain(id="1", subset="s", folder=Path("."), prompt=("shape?",), answer="bar",
    ...               reply=("<think_image> a bar </think_image> \\boxed{bar}",))
    >>> direct(chain).reply
    ('\\boxed{bar}',)
    """
    boxed = any(isinstance(part, str) and "\\boxed{" in part for part in chain.reply)
    return replace(chain, reply=(f"\\boxed{{{chain.answer}}}" if boxed else chain.answer,))


def dataset(chains: Sequence[Chain]) -> Dataset:
    """The chains in TRL's columns; pictures stay files that are opened when a row is read.

    Columns are `id`, `images` and `prompt` and `completion`; if any reply shows pictures, as those
    of Monet's first stage do, `messages` stands for the last two.

    Raises:
        InputError: there is no chain, a reply is empty, or a picture's file is missing.
    """
    from datasets import Dataset, Features, List, Value
    from datasets import Image as Pictures

    for chain in chains:
        _refuse_broken(chain)
    if not chains:
        raise InputError("there is no chain to learn; the file of chains is empty")
    interleaved = any(isinstance(part, Picture) for chain in chains for part in chain.reply)
    turn = {
        "role": Value("string"),
        "content": List({"type": Value("string"), "text": Value("string")}),
    }
    columns: dict[str, list[Any]] = {"id": [chain.id for chain in chains]}
    columns["images"] = [
        [str(path.resolve()) for path in chain.pictures((*chain.prompt, *chain.reply))]
        for chain in chains
    ]
    if interleaved:
        columns["messages"] = [_turns(chain.messages()) for chain in chains]
    else:
        columns["prompt"] = [_turns(chain.messages(reply=False)) for chain in chains]
        columns["completion"] = [_turns(chain.messages()[-1:]) for chain in chains]
    turns = {name: List(turn) for name in columns if name not in ("id", "images")}
    features = {"id": Value("string"), "images": List(Pictures(mode="RGB")), **turns}
    return Dataset.from_dict(columns, features=Features(features))


def _refuse_broken(chain: Chain) -> None:
    if not any(part if isinstance(part, str) else part.path for part in chain.reply):
        raise InputError(f"chain {chain.id!r} has an empty reply, so there is nothing to learn")
    for path in chain.pictures((*chain.prompt, *chain.reply)):
        if not os.path.isfile(path):  # which Path.is_file raises for names that are too long
            raise InputError(f"chain {chain.id!r} shows {path.name}, which is not at {path}")


def _turns(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Messages whose pictures are places, to be filled from the column `images` in order."""
    return [
        {**turn, "content": [{"type": c["type"], "text": c.get("text")} for c in turn["content"]]}
        for turn in messages
    ]


def unopened(data: Dataset) -> Dataset:
    """The same rows with pictures as they are stored, so that `Collator` opens them itself.

    It reads them as `lens.run` is given them; the decoder of `datasets` would also turn pictures
    that a camera says to be turned.
    """
    from datasets import Image as Pictures
    from datasets import List

    return data.cast_column("images", List(Pictures(mode="RGB", decode=False)))


@dataclass(frozen=True, kw_only=True)
class Collator:
    """Makes a batch of rows of `dataset`: what the processor gives for each whole chat, and labels.

    What is learned is the reply up to the token that ends the turn, without the tokens of pictures
    in it. Prompt and reply are tokenised apart, as they are when the model is asked.

    Attributes:
        processor: the model's.
        per_picture: visual tokens of one picture at most (Monet's default once a sample is too
            large: 1280).
        per_sample: visual tokens of a sample at most; all its pictures shrink by one factor to
            get there (Monet's default: 2000; the one factor is ours).
    """

    processor: Any
    per_picture: int = 1280
    per_sample: int = 2000

    def __call__(self, rows: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
        """Batch rows; every tensor of tokens is (row, position), padded on the right.

        Raises:
            InputError: a chat template does not continue the prompt, a reply has no end of turn or
                words that the tokenizer does not know.
        """
        texts = [text for row in rows for text in self._halves(row)]
        seen = self._seen(texts, [row["images"] for row in rows], padding_side="right")
        whole = seen["attention_mask"].bool()
        by_token = [key for key in BY_TOKEN if key in seen]
        halves = [{key: seen[key][i][whole[i]] for key in by_token} for i in range(len(texts))]
        joined = []
        for row, asked, said in zip(rows, halves[::2], halves[1::2], strict=True):
            both = {key: torch.cat([asked[key], said[key]]) for key in by_token}
            unlearned = torch.full_like(asked["input_ids"], IGNORED)
            both["labels"] = torch.cat([unlearned, self._learned(said["input_ids"], row)])
            joined.append(both)
        fill = {"input_ids": self.processor.tokenizer.pad_token_id, "labels": IGNORED}
        batch = {key: seen[key] for key in seen if key not in by_token}
        for key in (*by_token, "labels"):
            batch[key] = torch.nn.utils.rnn.pad_sequence(
                [row[key] for row in joined], batch_first=True, padding_value=fill.get(key, 0)
            )
        return batch

    def prompts(self, rows: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
        """Batch the prompts alone, padded on the left, to let a model go on from them.

        Raises:
            InputError: as for batches to learn; or a reply shows pictures, which no model writes.
        """
        if any("messages" in row for row in rows):
            raise InputError("replies that show pictures cannot be written by a model of words")
        asked = [self._halves(row)[0] for row in rows]
        return dict(self._seen(asked, [row["images"] for row in rows], padding_side="left"))

    def _seen(self, texts: list[str], stored: list[Any], *, padding_side: str) -> Any:
        sizes = self.processor.image_processor
        pictures = [
            picture
            for of_row in stored
            for picture in within(
                [opened(one) for one in of_row],
                per_picture=self.per_picture,
                per_sample=self.per_sample,
                side=sizes.patch_size * sizes.merge_size,
            )
        ]
        return self.processor(
            images=pictures or None,
            text=texts,
            padding=True,
            padding_side=padding_side,
            add_special_tokens=False,
            return_tensors="pt",
        )

    def _halves(self, row: dict[str, Any]) -> tuple[str, str]:
        """The words of the prompt, with what opens the reply, and those of the reply."""
        chat = row["messages"] if "messages" in row else [*row["prompt"], *row["completion"]]
        write = self.processor.apply_chat_template
        asked = write(chat[:-1], tokenize=False, add_generation_prompt=True)
        whole = write(chat, tokenize=False)
        if not whole.startswith(asked):
            raise InputError(
                f"the chat template writes the prompt of {row.get('id')!r} in one way to ask and "
                "in another with the reply, so the reply cannot be told apart; use a template that "
                "only adds to the prompt"
            )
        return asked, whole.removeprefix(asked)

    def _learned(self, said: Tensor, row: dict[str, Any]) -> Tensor:
        """The reply's labels: its tokens up to the end of the turn, those of pictures ignored."""
        tokenizer = self.processor.tokenizer
        ends = (said == tokenizer.eos_token_id).nonzero()
        if not len(ends):
            raise InputError(
                f"the reply of {row.get('id')!r} has no {tokenizer.eos_token}, so the model would "
                "never learn to stop; its chat template and its end-of-turn token do not fit"
            )
        if tokenizer.unk_token_id is not None and (said == tokenizer.unk_token_id).any():
            raise InputError(
                f"the reply of {row.get('id')!r} has words that the tokenizer does not know: "
                f"{tokenizer.decode(said)!r}"
            )
        vocabulary = tokenizer.get_vocab()
        image = torch.tensor([vocabulary[t] for t in IMAGE_TOKENS if t in vocabulary])
        labels = said.masked_fill(torch.isin(said, image), IGNORED)
        labels[int(ends[-1]) + 1 :] = IGNORED  # templates write a new line behind it
        return labels


def opened(stored: Any) -> Image.Image:
    """A picture of a data set's row as RGB: decoded already, or a file, or the bytes of one."""
    if isinstance(stored, Image.Image):
        return stored.convert("RGB")
    if stored["bytes"] is not None:
        with Image.open(io.BytesIO(stored["bytes"])) as picture:
            return picture.convert("RGB")
    return open_picture(Path(stored["path"]))


def within(
    pictures: list[Image.Image], *, per_picture: int, per_sample: int, side: int
) -> list[Image.Image]:
    """Shrink the pictures of a sample that has too many visual tokens, `side` x `side` pixels each.

    A sample within `per_sample` is given as it is. Of another, first no picture keeps more than
    `per_picture`, then all shrink by one factor.

    >>> [small] = within([Image.new("RGB", (560, 280))], per_picture=50, per_sample=90, side=28)
    >>> small.size
    (280, 140)
    """
    tokens = [picture.width * picture.height / side**2 for picture in pictures]
    if sum(tokens) <= per_sample:
        return pictures
    kept = [min(count, per_picture) for count in tokens]
    share = min(1.0, per_sample / sum(kept))
    shrunk = []
    for picture, count, keep in zip(pictures, tokens, kept, strict=True):
        factor = (keep * share / count) ** 0.5
        size = [max(side, int(length * factor)) for length in picture.size]
        same = keep * share >= count
        shrunk.append(picture if same else picture.resize(size, Image.Resampling.BICUBIC))
    return shrunk


def learned_text(batch: dict[str, Tensor], row: int, processor: Any) -> str:
    """What is learned of one row of a batch, as text: print it before a long training."""
    labels = batch["labels"][row]
    text: str = processor.tokenizer.decode(labels[labels != IGNORED])
    return text
