"""Sparse dictionaries on a model that reasons in latents: read, set and swap their features.

For users of SAELens, dictionary_learning or a dictionary of their own: `il.Features(sae, ...)` is
an edit like any other, at any site and positions, also at the latents themselves. What the
dictionary does not express stays in the state. `il.features(states, sae)` reads. Here the right
answers are known: a dictionary with a feature for each shape of the treasure is made for an
organism that reasons by that shape, and for one that only carries the shape along. From the root of
a clone:

    python -m examples.interop.with_sae
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

import imaginelens as il
from examples.interop import sae_record
from imaginelens.hooks.dictionaries import Features, features

RECORDED = Path(__file__).with_name("sae_recorded.json")
SHAPES = ("bar", "circle", "cross", "ring", "square", "triangle")
LAST = il.latent[1]  # the step at which the hunt has arrived


class Shapes(nn.Module):
    """A dictionary of latents: a feature for each shape, on where linear discriminants find it; and
    two features for the ends of a direction in which shapes are alike: the placebo."""

    def __init__(self, states: torch.Tensor, shapes: Sequence[str]) -> None:
        super().__init__()
        labels = torch.tensor([SHAPES.index(shape) for shape in shapes])
        self.means = torch.stack([states[labels == k].mean(0) for k in range(len(SHAPES))])
        self.centre = self.means.mean(0)
        noise = torch.cov((states - self.means[labels]).T) + 1e-3 * torch.eye(states.shape[1])
        self.weights = torch.linalg.solve(noise, self.means.T)
        self.offset = -0.5 * (self.means * self.weights.T).sum(-1)
        telling = torch.cat([self.means - self.centre, self.weights.T - self.weights.mean(1)])
        used = torch.linalg.svd(telling)[2][: 2 * (len(SHAPES) - 1)]
        rest = (states - self.centre) - (states - self.centre) @ used.T @ used
        self.aside = torch.linalg.svd(rest, full_matrices=False)[2][0]

    def encode(self, x: torch.Tensor) -> torch.Tensor:
        """1 for the shape that is found, and where the state lies along the placebo's direction."""
        found = (x @ self.weights + self.offset).argmax(-1)
        along = ((x - self.centre) @ self.aside)[..., None]
        shape = nn.functional.one_hot(found, len(SHAPES)).to(x)
        return torch.cat([shape, along.relu(), (-along).relu()], -1)

    def decode(self, f: torch.Tensor) -> torch.Tensor:
        """The shape's mean, moved along the placebo's direction."""
        along = (f[..., -2:-1] - f[..., -1:]) * self.aside
        return f[..., : len(SHAPES)] @ (self.means - self.centre) + along + self.centre


SHAPE, PLACEBO = list(range(len(SHAPES))), [len(SHAPES), len(SHAPES) + 1]


def dictionary_of(lens: Any, n: int = 256) -> Shapes:
    """The dictionary of an organism's last latents, from examples of its task."""
    learn = lens.task(n=n, seed=1)
    found = [lens.variables["shape"](example, 1) for example in learn.base]
    return Shapes(lens.run(learn.base).latents[:, 1], found)


def swapped(name: str, n: int = 24) -> dict[str, float]:
    """Swap features between pairs of inputs: how often the answer becomes the donor's."""
    lens = il.load(name)
    sae, task = dictionary_of(lens), lens.task(n=n, seed=0)
    base, donor = lens.run(task.base), lens.run(task.source)
    shape = lens.variables["shape"]
    read = features(donor.latents[:, 1], sae)[:, SHAPE].argmax(-1).tolist()
    seen = [SHAPES[k] == shape(example, 1) for k, example in zip(read, task.source, strict=True)]
    shares = {"shape read from the feature": sum(seen) / n}
    for what, chosen in (("shape", SHAPE), ("placebo", PLACEBO)):
        with lens.edit(Features(sae, chosen, donor=donor), at=LAST) as landing:
            changed = lens.run(task.base)
        moved = [a == b for a, b in zip(changed.answers, task.source_answers, strict=True)]
        stayed = [a == b for a, b in zip(changed.answers, base.answers, strict=True)]
        shares[f"{what} swapped: donor's answer"] = sum(moved) / n
        shares[f"{what} swapped: own answer"] = sum(stayed) / n
        shares[f"{what} swapped: change of the state"] = landing.relative_change
    return shares


class AsSaeLens(nn.Module):
    """A SAE by SAELens' arithmetic in plain torch, for environments without SAELens."""

    def __init__(self, kind: str, norm: str) -> None:
        super().__init__()
        self.kind, self.norm = kind, norm
        for name, value in sae_record.weights().items():
            self.register_parameter(name, nn.Parameter(value))

    def encode(self, x: torch.Tensor) -> torch.Tensor:
        """Normalise, note how, and find features."""
        self.shift, self.size = torch.zeros(()), torch.ones(())
        if self.norm == "constant_norm_rescale":
            self.size = x.norm(dim=-1, keepdim=True) / sae_record.WIDTH**0.5
        if self.norm == "layer_norm":
            self.shift = x.mean(-1, keepdim=True)
            self.size = (x - self.shift).std(-1, keepdim=True)
        eps = 1e-5 if self.norm == "layer_norm" else 0.0
        pre = ((x - self.shift) / (self.size + eps) - self.b_dec) @ self.W_enc + self.b_enc
        if self.kind == "jumprelu":
            return pre.relu() * (pre > sae_record.threshold())
        if self.kind == "topk":
            top = pre.topk(sae_record.TOP, dim=-1)
            return torch.zeros_like(pre).scatter(-1, top.indices, top.values.relu())
        return pre.relu()

    def decode(self, f: torch.Tensor) -> torch.Tensor:
        """Decode, and undo the normalisation, which is then forgotten."""
        states = (f @ self.W_dec + self.b_dec) * self.size + self.shift
        del self.size, self.shift
        return states


def against_saelens() -> dict[str, float]:
    """Our edit against SAELens' own hooked forward: the largest difference, by kind of SAE."""
    import numpy as np

    from imaginelens.hooks.edits import EditContext

    rows = np.arange(sae_record.CELLS)
    ctx = EditContext("blocks.1.hook_resid_post", rows, rows, 0 * rows, 0 * rows)
    edit = {"features": list(sae_record.EDITED), "value": list(sae_record.EDITED.values())}
    found = {}
    for name, wanted in json.loads(RECORDED.read_text())["saes"].items():
        sae = AsSaeLens(*name.split(", "))
        with torch.no_grad():
            new = Features(sae, **edit).apply(sae_record.states(), ctx)
        found[name] = float((new - torch.tensor(wanted["edited"], dtype=new.dtype)).abs().max())
    return found


def main() -> None:
    """Print what swapping features does, beside what is known."""
    known = {
        "latent-content": "reasons by the shape: the donor's answer, always",
        "latent-pointer": "carries the shape and goes by the name: its own answer",
    }
    for name, oracle in known.items():
        print(f"{name} ({oracle})")
        for what, share in swapped(name).items():
            print(f"  {what}: {share:.2f}")
    worst = max(against_saelens().values())
    print(f"largest difference from SAELens' own hooked forward, 9 kinds of SAE: {worst:.1e}")


if __name__ == "__main__":
    main()
