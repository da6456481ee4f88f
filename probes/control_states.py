"""The same examples seen otherwise: without training, without a model, without their latents.

What a probe reads from a trained model's states it may read from these as well; then it was no
finding about what the model has learned to put there.

"random model": the same architecture with fresh weights reads the same inputs, writes the same
text and feeds its own latents at the same steps. "dummy": the same model, inputs and text with one
constant latent fed at every step; what is kept at `hook_latent` is what the model would have fed.
"raw input": no model at all, a coarse picture and a bag of words.
"""

import copy
import difflib
import hashlib
import re
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from PIL import Image

from imaginelens.hooks import LatentModel
from imaginelens.hooks.errors import InputError
from imaginelens.hooks.inputs import Example, pictures_of
from imaginelens.probes.shards import Part, Trace

RANDOM, RAW, DUMMY = "random model", "raw input", "dummy"
CONTROLS = (DUMMY, RANDOM, RAW)
GRID = 8  # cells along one side of the coarse picture
WORDS = 256  # columns that words are hashed to
_WORD = re.compile(r"\w+|[^\w\s]")


def chosen(controls: Any) -> tuple[str, ...]:
    """The names of the controls that a user asks for.

    Raises:
        InputError: there is no such control.

    >>> chosen(True), chosen(("dummy",)), chosen(False)
    (('dummy', 'random model', 'raw input'), ('dummy',), ())
    """
    if isinstance(controls, bool):
        return CONTROLS if controls else ()
    names = (controls,) if isinstance(controls, str) else tuple(controls)
    for name in names:
        if name not in CONTROLS:
            near = difflib.get_close_matches(str(name), CONTROLS, n=1, cutoff=0.3)
            there = f"did you mean {near[0]!r}?" if near else f"there are {', '.join(CONTROLS)}"
            raise InputError(f"there is no control {name!r}; {there}")
    return tuple(name for name in CONTROLS if name in names)


# ---- without training --------------------------------------------------------------------------


def random_model(lens: LatentModel, *, seed: int = 0) -> LatentModel:
    """The same architecture with fresh weights, drawn by the seed as its class draws them.

    It is made on the CPU from the config that is there, and moved to the model's device; nothing is
    downloaded, and no other random stream is touched.

    Raises:
        InputError: its class cannot be made from its config, or a part of it lies beside it.

    >>> from imaginelens.organisms import load
    >>> lens = load("latent-content")
    >>> random_model(lens).structure.d_model == lens.structure.d_model
    True
    """
    model, spec = lens.model, lens.spec
    if spec is not None and spec.extras and spec.project is not None:
        raise InputError(
            f"{spec.name} has a latent head beside the model, which cannot be made anew; leave out "
            f"the control {RANDOM!r}"
        )
    try:
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)
            made: Any = type(model)._from_config(copy.deepcopy(model.config), dtype=model.dtype)
        made = made.to(model.device).eval()
        if [p.shape for p in made.parameters()] != [p.shape for p in model.parameters()]:
            raise ValueError("it has other weights than the model")
        made.generation_config = copy.deepcopy(model.generation_config)
        fresh = LatentModel(made, lens.processor, lens.family or False)
    except Exception as error:  # a class of the user's own can raise anything
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise InputError(
            f"{type(model).__name__} cannot be made anew from its config ({reason[0]}); leave out "
            f"the control {RANDOM!r}"
        ) from error
    fresh.find_answer = lens.find_answer
    return fresh


# ---- without a model ---------------------------------------------------------------------------


def raw_part(examples: Sequence[Example], dtype: str) -> Part:
    """What is in some inputs, as states of one step and layer."""
    values = np.stack([raw_input(example) for example in examples])
    mask = np.ones((len(values), 1), dtype=bool)
    return Part(values[:, None, None].astype(dtype), Trace.bare(mask))


def raw_input(example: Example) -> Float[np.ndarray, " feature"]:
    """An input without a model: a coarse picture, then a bag of words; 448 numbers.

    The mean colour of each cell of an 8 x 8 grid over the picture (RGB, 0 to 1; zero without one,
    the mean over several), and how often words of each of 256 hashed columns are in the question
    (feature hashing, Weinberger et al. 2009, without signs).

    >>> raw_input({"text": "Red? red!"})[192:].sum()
    np.float64(4.0)
    """
    pictures = [
        np.asarray(picture.resize((GRID, GRID), Image.Resampling.BOX), dtype=np.float64) / 255
        for picture in pictures_of(example)
    ]
    seen = np.mean(pictures, axis=0).ravel() if pictures else np.zeros(3 * GRID**2)
    said = np.zeros(WORDS)
    for word in _WORD.findall(example["text"].casefold()):
        digest = hashlib.blake2b(word.encode(), digest_size=4).digest()
        said[int.from_bytes(digest, "big") % WORDS] += 1
    return np.concatenate([seen, said])


# ---- without its latents -----------------------------------------------------------------------


def no_dummy(traces: Sequence[Trace]) -> str:
    """Why there is no control with one constant latent; "" if there can be one."""
    if all(trace.first is None for trace in traces):
        return "no latent was fed back"
    if not any(trace.late for trace in traces):
        return "all positions stand before the first latent"
    return ""
