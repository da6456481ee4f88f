"""What a swap of latents should do: the hypotheses that interchange training and audits go by.

Of any chains we can say what happens if the last latent carries the answer itself (`content`), or
nothing (`ignored`). Of treasure hunts we know the rule of the task, so that `pointer` can be told
as well, and what follows when only early steps are swapped; their boards are read off the pixels.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import Any

import numpy as np
import torch

from examples.capimagine.chains import Chain, open_picture
from examples.capimagine.template import read_board
from examples.latent_baselines.objectives import Rule
from imaginelens.hooks.errors import InputError
from imaginelens.organisms import hunt
from imaginelens.organisms.hunt import IMAGE_PIXELS, NAMES, Hunt

Hypothesis = Callable[[Any, Any, tuple[int, ...] | None], str]
QUESTION = re.compile(rf"start ({'|'.join(NAMES)})((?: then)*) shape \?")


def content(base: Mapping[str, Any], source: Mapping[str, Any], steps: Any = None) -> str:
    """The source's answer: it is in the latents. Says nothing of early steps alone."""
    return str(source["answer"])


def ignored(base: Mapping[str, Any], source: Mapping[str, Any], steps: Any = None) -> str:
    """The base's answer: nobody reads the latents."""
    return str(base["answer"])


def hypotheses(chains: Sequence[Chain]) -> dict[str, Hypothesis]:
    """What can be told of these chains: of hunts all three mechanisms, of others these two.

    They take examples that `example` made.
    """
    if all(hunt_of(chain) is not None for chain in chains[:1]):
        return {name: _of_hunts(rule) for name, rule in hunt.HYPOTHESES.items()}
    return {"content": content, "ignored": ignored}


def _of_hunts(rule: hunt.Hypothesis) -> Hypothesis:
    return lambda base, source, steps: rule(base["hunt"], source["hunt"], steps)


def example(chain: Chain, asked: Mapping[str, Any]) -> dict[str, Any]:
    """What the model is asked, with what hypotheses need to know of it."""
    return {**asked, "answer": chain.answer, "hunt": hunt_of(chain)}


RULES = ("content", "pointer")


def make(name: str, chains: Sequence[Chain], tokenizer: Any, *, steps: int) -> Rule:
    """The rule of that name for these chains, as interchange training takes it.

    Raises:
        InputError: `pointer` is asked for, and a chain is no treasure hunt.
    """
    hunts = [hunt_of(chain) for chain in chains]
    known = all(hunt is not None for hunt in hunts)
    if name == "pointer" and not known:
        first = next(chain.id for chain, found in zip(chains, hunts, strict=True) if found is None)
        raise InputError(
            f"chain {first} is no treasure hunt, so that nobody knows what its latents should "
            "point to; use the rule 'content'"
        )

    def rule(base: int, source: int, swapped: tuple[int, ...]) -> torch.Tensor | None:
        b, s = hunts[base], hunts[source]
        if b is not None and s is not None and known:
            return spelled(hunt.HYPOTHESES[name](b, s, swapped))
        return spelled(chains[source].answer) if steps - 1 in swapped else None

    @cache
    def spelled(answer: str) -> torch.Tensor:
        ids = tokenizer(answer, add_special_tokens=False).input_ids
        return torch.tensor([*ids, tokenizer.eos_token_id])

    return rule


# ---- reading a board ---------------------------------------------------------------------------


def hunt_of(chain: Chain) -> Hunt | None:
    """The treasure hunt that a chain asks about, read from its picture; None if it is none.

    The grain of the picture is not read.
    """
    question = QUESTION.search(" ".join(chain.question.split()))
    pictures = chain.pictures(chain.prompt)
    if question is None or len(pictures) != 1:
        return None
    board = np.asarray(open_picture(pictures[0]))
    if board.shape != (IMAGE_PIXELS, IMAGE_PIXELS, 3):
        return None
    names, pointers, shapes = zip(*read_board(board), strict=True)
    if sorted(names) != sorted(NAMES):
        return None
    hops = question[2].count("then")
    return Hunt(names, pointers, shapes, start=question[1], hops=hops, noise=0)
