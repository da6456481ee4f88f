"""A tuned lens as a folder, and back: weights in safetensors, words in JSON, a card. No pickle."""

import hashlib
import json
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load as from_bytes
from safetensors.torch import save as to_bytes

from imaginelens.hooks import hub
from imaginelens.hooks.appearing import alone, appearing
from imaginelens.hooks.errors import CheckpointError, InputError, brief
from imaginelens.probes.tuned_lens import TunedLens
from imaginelens.probes.tuned_training import bits

WEIGHTS, WORDS, CARD = "tuned_lens.safetensors", "tuned_lens.json", hub.CARD
_UNREADABLE = (
    OSError, ValueError, TypeError, LookupError, AttributeError, RecursionError, ArithmeticError,
)  # fmt: skip
VERSION = 1


def save(lens: TunedLens, folder: Path, *, license: str | None = None) -> Path:
    """Write a lens to a folder; the file with the words comes last, and is the proof."""
    if (folder / WORDS).exists():
        raise InputError(f"{str(folder)!r} holds a tuned lens already; choose another folder")
    tensors = {f"weight/{s}": w.contiguous().cpu() for s, w in lens.weights.items()}
    tensors |= {f"bias/{s}": b.contiguous().cpu() for s, b in lens.biases.items()}
    for name, found in (("kl_before", lens.kl_before), ("kl_after", lens.kl_after)):
        tensors |= {f"{name}/{s}": torch.tensor(e.values) for s, e in found.items()}
    content = to_bytes(tensors, metadata={"format": "pt"})
    groups = lens.kl_before[lens.sites[0]].groups
    words = {
        "format": VERSION,
        "digest": hashlib.sha256(content).hexdigest(),
        "sites": list(lens.sites),
        "at": lens.at,
        "model": lens.model,
        "groups": None if groups is None else [str(group) for group in groups],
    }
    with alone(folder, proof=WORDS):
        with appearing(folder / WEIGHTS) as partial:
            partial.write_bytes(content)
        with appearing(folder / CARD) as partial:
            partial.write_text(card(lens, license=license), encoding="utf-8")
        with appearing(folder / WORDS) as partial:
            partial.write_text(json.dumps(words, indent=2) + "\n", encoding="utf-8")
    return folder


def from_pretrained(name: str | Path, *, revision: str | None = None) -> TunedLens:
    """Read a lens from a folder, if there is one of this name, or else from the Hub."""
    folder, origin = hub.fetch(name, revision=revision, files=(WEIGHTS, WORDS, CARD))
    try:
        words = json.loads((folder / WORDS).read_text(encoding="utf-8"))
        content = (folder / WEIGHTS).read_bytes()
        if words["format"] != VERSION:
            raise ValueError(f"its format is {words['format']!r}, and this version reads {VERSION}")
        if words["digest"] != hashlib.sha256(content).hexdigest():
            raise ValueError(f"{WEIGHTS} and {WORDS} do not belong together")
        return hub.remembered(_built(words, from_bytes(content)), origin)
    except (*_UNREADABLE, SafetensorError) as error:
        raise CheckpointError(
            f"{str(name)!r} does not hold a tuned lens that can be read ({brief(error)}); make "
            "one with TunedLens.fit(...).save(folder)"
        ) from error


def push(
    lens: TunedLens, repo_id: str, *, private: bool, token: str | None, license: str | None
) -> hub.Address:
    """Create a repository of models on the Hub, if it is not there, and put the lens in it."""
    message = f"Tuned lens of a {lens.model}"
    put = partial(save, lens, license=license)
    return hub.upload(put, repo_id, message=message, private=private, token=token)


def card(lens: TunedLens, *, license: str | None = None) -> str:
    """The README of a saved lens, in the Hub's conventions."""
    rows = [
        f"| {s} | {lens.kl_before[s].value:.4f} {lens.kl_before[s].ci()} "
        f"| {lens.kl_after[s].value:.4f} {lens.kl_after[s].ci()} |"
        for s in lens.sites
    ]
    return f"""{hub.header(tags=("tuned-lens",), license=license)}
# Tuned lens of a {lens.model}

Affine translators of {len(lens.sites)} sites (Belrose et al. 2023), trained at `{lens.at}`.
KL(final || lens) in bits on {lens.kl_after[lens.sites[0]].n} held-out examples, 95% intervals:

| site | logit lens | tuned lens |
|-|-|-|
{chr(10).join(rows)}

What a state reads as is not evidence of what it is used for.

```python
import imaginelens as il
tuned = il.probes.TunedLens.from_pretrained("this repository")
print(tuned(lens, lens.run(inputs)))
```
"""


def _built(words: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]) -> TunedLens:
    sites, groups = tuple(words["sites"]), words["groups"]
    for site in sites:
        weight, bias = tensors[f"weight/{site}"], tensors[f"bias/{site}"]
        if bias.dim() != 1 or tuple(weight.shape) != 2 * tuple(bias.shape):
            raise ValueError(
                f"{site} has weights {tuple(weight.shape)} and a bias {tuple(bias.shape)}"
            )
        if not all(t.is_floating_point() and bool(t.isfinite().all()) for t in (weight, bias)):
            raise ValueError(f"the translator of {site} is not of finite numbers")
    if not sites or not all(isinstance(words[name], str) for name in ("at", "model")):
        raise ValueError("it has no sites, or does not say what it belongs to")
    return TunedLens(
        sites,
        {s: tensors[f"weight/{s}"] for s in sites},
        {s: tensors[f"bias/{s}"] for s in sites},
        {s: bits(tensors[f"kl_before/{s}"].numpy(), s, "logit lens", groups) for s in sites},
        {s: bits(tensors[f"kl_after/{s}"].numpy(), s, "tuned lens", groups) for s in sites},
        words["at"],
        words["model"],
    )
