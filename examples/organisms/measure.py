"""Measure an organism and write its card: accuracy, do(Z) profile, swap shares, geometry.

Numbers are of the saved bfloat16 weights loaded as float32, on hunts no organism was trained on.
"""

from __future__ import annotations

import json
import platform
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import transformers
from latent_loop import Edit, Gallery, Rollout, photograph, rollout
from torch import Tensor
from transformers import Qwen2_5_VLForConditionalGeneration

from imaginelens.organisms.checkpoint import VOCABULARY
from imaginelens.organisms.hunt import HYPOTHESES, disagree, pairs, sample

Model = Qwen2_5_VLForConditionalGeneration
WORDS = list(VOCABULARY)
HELD_OUT = 10**9  # seed of the evaluation hunts


def words(model: Model, states: Tensor) -> list[str]:
    """The greedy next word after each hidden state."""
    return [WORDS[i] for i in model.lm_head(states).argmax(-1).tolist()]


def _solved(model: Model, gallery: Gallery, run: Rollout) -> list[bool]:
    """Did the run open a span, give the right answer after it, and stop?

    The answer is teacher-forced before the end token, so for solved hunts this is free generation.
    """
    said = zip(*(words(model, s) for s in (run.opening, run.answering, run.ending)), strict=True)
    return [
        word == ("<|latent_start|>", hunt.answer, "<|im_end|>")
        for word, hunt in zip(said, gallery.hunts, strict=True)
    ]


def _share(flags: list[bool]) -> float:
    return round(sum(flags) / len(flags), 4)


@torch.no_grad()
def measure(model: Model, *, hops: int, n: int = 1024) -> dict[str, Any]:
    """Everything a card reports, on `n` hunts and `n` pairs."""
    model.eval()
    gallery = photograph(model, sample(n, hops=hops, seed=HELD_OUT))
    run = rollout(model, gallery)
    return {
        "n": n,
        "accuracy": _share(_solved(model, gallery, run)),
        **_protocol(model, run),
        "do_z": {
            name: _share(_solved(model, gallery, rollout(model, gallery, edit=edit)))
            for name, edit in _replacements(run.latents).items()
        },
        "swap": _swaps(model, hops=hops, n=n),
        "geometry": _geometry(gallery, run.latents),
    }


def _protocol(model: Model, run: Rollout) -> dict[str, float]:
    """How the span would open and close if nobody forced it."""
    inside = [words(model, run.latents[:, t]) for t in range(run.latents.shape[1])]
    return {
        "opens": _share([word == "<|latent_start|>" for word in words(model, run.opening)]),
        "closes_unforced": _share([word == "<|latent_end|>" for word in words(model, run.closing)]),
        "closes_early": _share(["<|latent_end|>" in said for said in zip(*inside, strict=True)]),
    }


def _replacements(latents: Tensor) -> dict[str, Edit]:
    """The do(Z) edits; statistics are per step over the unedited latents."""
    mean, spread = latents.mean(0, keepdim=True), latents.std(0, keepdim=True)
    noise = mean + spread * torch.randn(latents.shape, generator=torch.Generator().manual_seed(0))
    values = {
        "mean": mean.expand_as(latents),
        "zero": torch.zeros_like(latents),
        "shuffle": latents.roll(1, 0),
        "noise": noise,
    }
    return {name: lambda step, state, z=z: z[:, step] for name, z in values.items()}


def _swaps(model: Model, *, hops: int, n: int) -> dict[str, dict[str, float]]:
    """Which hypothesis the answer follows when source latents are swapped into the base.

    Steps after a swapped one are recomputed. Shares are over all pairs; `decisive` are the pairs
    where the three hypotheses disagree, and `decisive_*` the shares among them.
    """
    base, source = pairs(n, hops=hops, seed=HELD_OUT + 1)
    bases = photograph(model, base)
    donors = rollout(model, photograph(model, source)).latents
    steps = donors.shape[1]
    subsets = {"all": None} | {f"step {t}": (t,) for t in range(steps)}
    table = {}
    for name, subset in subsets.items():
        touched = range(steps) if subset is None else subset
        run = rollout(
            model, bases, edit=lambda t, state, on=touched: donors[:, t] if t in on else state
        )
        said = words(model, run.answering)
        decisive = disagree(base, source, subset).tolist()
        row = {"decisive": _share(decisive)}
        for hypothesis, predict in HYPOTHESES.items():
            told = [predict(b, s, subset) for b, s in zip(base, source, strict=True)]
            hits = [a == b for a, b in zip(said, told, strict=True)]
            row[hypothesis] = _share(hits)
            if any(decisive):
                chosen = [hit for hit, use in zip(hits, decisive, strict=True) if use]
                row[f"decisive_{hypothesis}"] = _share(chosen)
        table[name] = row
    return table


def _geometry(gallery: Gallery, latents: Tensor) -> dict[str, list[float]]:
    """Per step: cosine to the visited card's visual token, and mean cosine between examples."""
    count, steps, _ = latents.shape
    unit = F.normalize(latents, dim=-1)
    between = (unit.sum(0).square().sum(-1) - count) / (count * (count - 1))
    crops = torch.stack([gallery.visited(step + 1) for step in range(steps)], dim=1)
    aligned = F.cosine_similarity(latents, crops, dim=-1).mean(0)
    return {
        "cosine_to_card": [round(c, 3) for c in aligned.tolist()],
        "cosine_between_examples": [round(c, 3) for c in between.tolist()],
    }


def write_card(
    target: Path, name: str, variant: Any, results: dict[str, Any], *, seed: int, cpu: float
) -> None:
    """Write `card.json` for programs and `card.md` for people."""
    card = {
        "name": name,
        "hops": variant.hops,
        "latent_steps": variant.latent_steps,
        **results,
        "variant": asdict(variant),
        "training": {
            "command": f"python examples/organisms/train.py {name} --seed {seed} --out {name}",
            "seed": seed,
            "cpu_seconds": round(cpu),
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
    }
    (target / "card.json").write_text(json.dumps(card, indent=2) + "\n")
    (target / "card.md").write_text(_markdown(card))


def _markdown(card: dict[str, Any]) -> str:
    training = card["training"]
    edits = " | ".join(card["do_z"])
    values = " | ".join(f"{value:.3f}" for value in card["do_z"].values())
    swaps = [
        f"| {steps} | {row['content']:.3f} | {row['pointer']:.3f} | {row['ignored']:.3f} |"
        for steps, row in card["swap"].items()
    ]
    return "\n".join(
        [
            f"# {card['name']}",
            "",
            "A tiny Qwen2.5-VL (0.2 M parameters) that plays the treasure hunt of",
            "`imaginelens.organisms.hunt`.",
            f"Free greedy accuracy {card['accuracy']:.3f} on {card['n']} held-out hunts",
            f"(hops: {card['hops']}, latent steps: {card['latent_steps']}).",
            "",
            "Accuracy when every latent is replaced:",
            "",
            f"| {edits} |",
            "|" + "-|" * len(card["do_z"]),
            f"| {values} |",
            "",
            f"Share of {card['n']} pairs answered as each hypothesis predicts when these latent",
            "steps come from the source run and later ones are recomputed:",
            "",
            "| swapped | content | pointer | ignored |",
            "|-|-|-|-|",
            *swaps,
            "",
            f"Trained in {training['cpu_seconds']} CPU seconds by",
            f"`{training['command']}`",
            f"(torch {training['torch']}, transformers {training['transformers']}).",
            "",
        ]
    )
