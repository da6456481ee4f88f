"""What every task is about: one file that any environment can read, with torch and transformers.

The file is written where ImagineLens is installed; it holds tensors and words only. The models are
the checkpoints of shipped organisms, which stock transformers opens.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, Qwen2_5_VLForConditionalGeneration

ROOT = Path(__file__).parents[2]
CHECKPOINTS = ROOT / "src" / "imaginelens" / "organisms" / "checkpoints"
MODELS = ("direct", "latent-content")  # answers at once; imagines two latent steps first
PROBED = 200
SHAPE = "circle"  # whether the board has two of these or more is what the probes are asked
IG_POINTS = 16  # Gauss-Legendre, captum's own rule


@dataclass
class Given:
    """One organism, a pair of inputs for it, and what is to be found out.

    Attributes:
        model: stock transformers, float32; every peer gets a copy of its own.
        base, source: what the processor made of one example: token ids, mask, pixels, grid.
        examples: the same two as a user has them: a picture as an array, and a question.
        answers: the two examples' answers, in words; `tokens` are their ids.
        image: the positions of the picture's tokens.
        cell: the layer and the position of the one cell to patch.
        positions: which ones the sweep edits.
        many: 200 examples in one processor dict, whose `labels` the probes are asked for;
            `many_examples` are the same as pictures and questions.
        marks: the ids of the tokens that open and close a latent span and hold its places.
    """

    name: str
    model: PreTrainedModel
    base: dict[str, torch.Tensor]
    source: dict[str, torch.Tensor]
    examples: list[dict[str, Any]]
    answers: list[str]
    tokens: list[int]
    image: torch.Tensor
    cell: tuple[int, int]
    positions: list[int]
    many: dict[str, torch.Tensor]
    many_examples: list[dict[str, Any]]
    labels: torch.Tensor
    marks: dict[str, int]

    @property
    def folder(self) -> Path:
        """The checkpoint, as `from_pretrained` takes it."""
        return CHECKPOINTS / self.name

    @property
    def blocks(self) -> Any:
        """The decoder's blocks."""
        return self.model.model.language_model.layers

    def effect(self, logits: torch.Tensor) -> torch.Tensor:
        """The source answer's logit minus the base answer's, at the last position."""
        return logits[..., -1, self.tokens[1]] - logits[..., -1, self.tokens[0]]


def stock(name: str) -> PreTrainedModel:
    """A shipped organism as stock transformers opens it."""
    model = Qwen2_5_VLForConditionalGeneration.from_pretrained(
        CHECKPOINTS / name, dtype=torch.float32
    )
    return model.eval()


def read(file: Path, name: str) -> Given:
    """What `write` wrote about one organism, with the model."""
    told = torch.load(file, weights_only=True)[name]
    return Given(name=name, model=stock(name), **told)


def write(file: Path) -> None:
    """Draw the examples and write them; needs ImagineLens."""
    import imaginelens as il

    told = {}
    for name in MODELS:
        lens = il.load(name)
        task = lens.task(n=PROBED, seed=0)
        examples = [task.base[0], task.source[0]]
        base, source = (tensors(lens.prompt(example).inputs) for example in examples)
        tokenizer = lens.processor.tokenizer
        answers = [task.base_answers[0], task.source_answers[0]]
        picture = tokenizer.convert_tokens_to_ids("<|image_pad|>")
        image = (base["input_ids"][0] == picture).nonzero()[:, 0]
        marks = ("open", "close", "pad") if lens.spec is not None else ()
        told[name] = {
            "base": base,
            "source": source,
            "examples": [plain(example) for example in examples],
            "answers": answers,
            "tokens": tokenizer.convert_tokens_to_ids(answers),
            "image": image,
            "cell": (0, int(image[0])),
            "positions": list(range(base["input_ids"].shape[1])),
            "many": tensors(lens.prompt(list(task.base)).inputs),
            "many_examples": [plain(example) for example in task.base],
            "labels": torch.tensor([e["hunt"].shapes.count(SHAPE) >= 2 for e in task.base]).long(),
            "marks": {m: tokenizer.convert_tokens_to_ids(getattr(lens.spec, m)) for m in marks},
        }
        told[name]["cell"] = strongest(Given(name=name, model=stock(name), **told[name]))
    torch.save(told, file)


def strongest(given: Given) -> tuple[int, int]:
    """The cell of the picture, behind the first block, whose patch moves the answer most.

    One that moves nothing would call right whoever patches nothing.
    """
    from benchmarks.peers.plain_torch import sweep_cells

    given.positions = given.image.tolist()
    effect = sweep_cells(given.model, given)[0].abs()
    return 0, given.positions[int(effect.argmax())]


def tensors(inputs: Any) -> dict[str, torch.Tensor]:
    """The tensors of a processor dict."""
    return {key: value for key, value in inputs.items() if isinstance(value, torch.Tensor)}


def plain(example: dict[str, Any]) -> dict[str, Any]:
    """A picture as bytes and a question, without anything that only ImagineLens knows."""
    import numpy as np

    return {"images": torch.from_numpy(np.array(example["images"])), "text": example["text"]}


def opened(example: dict[str, Any]) -> dict[str, Any]:
    """The picture and the question as a user has them."""
    from PIL import Image

    return {"images": Image.fromarray(example["images"].numpy()), "text": example["text"]}
