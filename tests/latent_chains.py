"""Chains for the tests of the latent baselines: ragged ones for tiny models, and treasure hunts."""

from pathlib import Path

import tiny
import torch
from transformers import PreTrainedModel

from examples.capimagine.chains import Chain, Part, Picture
from imaginelens.hooks import FAMILIES, LatentModel, LatentSpec
from imaginelens.organisms import checkpoint
from imaginelens.organisms.hunt import CARD_PIXELS, sample


def ragged(folder: Path) -> list[Chain]:
    """Prompts of different lengths, with none to two pictures of different sizes, in any order."""
    folder.mkdir(parents=True, exist_ok=True)
    asked: list[tuple[Part, ...]] = [
        (_picture(folder, 40, 24), "red?"),
        ("which of", _picture(folder, 24, 16), "and", _picture(folder, 56, 40), "is the larger?"),
        (_picture(folder, 16, 16), "?"),
        ("no picture at all",),
    ]
    shown = [
        (_picture(folder, 8, 8), _picture(folder, 8, 8)),
        (_picture(folder, 24, 16),),
        (_picture(folder, 16, 8), _picture(folder, 8, 8)),
        (_picture(folder, 8, 8),),
    ]
    return [
        Chain(
            id=str(i),
            subset="ragged",
            folder=folder,
            prompt=prompt,
            reply=("see", *pictures, "so"),
            answer=answer,
        )
        for i, (prompt, pictures, answer) in enumerate(
            zip(asked, shown, ["no", "b", "maybe", "yes"], strict=True)
        )
    ]


def _picture(folder: Path, width: int, height: int) -> Picture:
    number = len(list(folder.glob("*.png")))
    tiny.image(width, height, seed=number).save(folder / f"{number}.png")
    return Picture(f"{number}.png")


def tiny_lens(family: str, *, dtype: torch.dtype = torch.float64) -> LatentModel:
    """A random Qwen2.5-VL that feeds two latents as a family does, with the organisms' tokens."""
    spec = FAMILIES[family]
    assert isinstance(spec, LatentSpec)
    opened, closed, pad = checkpoint.LATENT
    spec = LatentSpec(**{**vars(spec), "open": opened, "close": closed, "pad": pad, "max_steps": 2})
    model, processor = tiny.fresh("qwen2_5_vl", dtype=dtype)
    processor.chat_template = checkpoint.CHAT_TEMPLATE
    return LatentModel(model.eval(), processor, spec)


def hunts(folder: Path, n: int, *, seed: int, hops: int = 2) -> list[Chain]:
    """Treasure hunts as raw chains: the reply shows a crop of each card that is visited."""
    folder.mkdir(parents=True, exist_ok=True)
    chains = []
    for i, hunt in enumerate(sample(n, hops=hops, seed=seed)):
        board = hunt.image()
        board.save(folder / f"{seed}-{i}.png", compress_level=1)
        crops = []
        for step, name in enumerate(hunt.path[1:]):
            row, column = divmod(hunt.names.index(name), 3)
            x, y = column * CARD_PIXELS, row * CARD_PIXELS
            crop = board.crop((x, y, x + CARD_PIXELS, y + CARD_PIXELS))
            crop.save(folder / f"{seed}-{i}-{step}.png", compress_level=1)
            crops.append(Picture(f"{seed}-{i}-{step}.png"))
        chains.append(
            Chain(
                id=f"{seed}/{i}",
                subset="Visual_CoT",
                folder=folder,
                prompt=(Picture(f"{seed}-{i}.png"), hunt.question),
                reply=(*crops, f"\\boxed{{{hunt.answer}}}"),
                answer=hunt.answer,
            )
        )
    return chains


def parameters(model: PreTrainedModel) -> list[torch.Tensor]:
    """Copies of all weights."""
    return [weight.detach().clone() for weight in model.parameters()]
