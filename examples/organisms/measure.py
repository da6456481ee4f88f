"""Measure an organism and write its card: accuracy, do(Z) profile, swap shares, geometry.

    python examples/organisms/measure.py latent-content

prints what was found, and says where the organism's card says otherwise. Numbers are of the saved
bfloat16 weights loaded as float32, on hunts no organism was trained on.
"""

from __future__ import annotations

import argparse
import json
import platform
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
import transformers
from latent_loop import (
    Edit,
    Gallery,
    Rewrite,
    Rollout,
    next_words,
    photograph,
    prompt_words,
    read,
    rollout,
    speak,
    token_ids,
)
from torch import Tensor
from transformers import Qwen2_5_VLForConditionalGeneration
from variants import CAPTIONS, Variant

from imaginelens.organisms import checkpoint
from imaginelens.organisms.hunt import CARDS, HYPOTHESES, NAMES, SHAPES, disagree, pairs, sample

Model = Qwen2_5_VLForConditionalGeneration
HELD_OUT = 10**9  # seed of the evaluation hunts


def open_model(folder: Path) -> Model:
    """Open a saved organism in float32."""
    return Model.from_pretrained(folder, dtype=torch.float32).eval()


def _solved(model: Model, gallery: Gallery, run: Rollout) -> list[bool]:
    """Did the run open a span, give the right answer after it, and stop?

    The answer is teacher-forced before the end token, so for solved hunts this is free generation.
    """
    said = (next_words(model, s) for s in (run.opening, run.answering, run.ending))
    return [
        words == ("<|latent_start|>", hunt.answer, "<|im_end|>")
        for words, hunt in zip(zip(*said, strict=True), gallery.hunts, strict=True)
    ]


def _share(flags: list[bool]) -> float:
    return round(sum(flags) / len(flags), 4)


@torch.no_grad()
def measure(model: Model, variant: Variant, n: int = 1024) -> dict[str, Any]:
    """Everything a card reports, on `n` hunts and `n` pairs."""
    gallery = photograph(model, sample(n, hops=variant.hops, seed=HELD_OUT))
    report = _measure_latents if variant.latent_steps else _measure_words
    return {"n": n, **report(model, gallery, variant)}


def _measure_latents(model: Model, gallery: Gallery, variant: Variant) -> dict[str, Any]:
    run = rollout(model, gallery)
    return {
        "accuracy": _share(_solved(model, gallery, run)),
        **_protocol(model, run),
        "do_z": {
            name: _share(_solved(model, gallery, rollout(model, gallery, edit=edit)))
            for name, edit in _replacements(run.latents).items()
        },
        "swap": _swaps(model, variant, n=len(gallery.hunts)),
        "geometry": _geometry(gallery, run.latents),
    }


def _measure_words(model: Model, gallery: Gallery, variant: Variant) -> dict[str, Any]:
    expected = [variant.speech(hunt) for hunt in gallery.hunts]
    said = speak(model, gallery, length=len(expected[0]))
    found: dict[str, Any] = {
        "accuracy": _share([s == e for s, e in zip(said, expected, strict=True)])
    }
    if not variant.imagines:
        found["guess"] = _guesses(gallery, [words[0] for words in said])
    if not variant.updates:
        found["reads"] = {ask: _share(_read(model, gallery, ask)) for ask in CAPTIONS}
    if variant.imagines:
        found["rewrite"] = _rewritten(model, gallery, variant)
        found["swap"] = _swaps(model, variant, n=len(gallery.hunts))
    return found


def _guesses(gallery: Gallery, said: list[str]) -> dict[str, float]:
    """What the first word is, whether or not the model stops then; and what guessing would give.

    The best guess of who cannot walk is the shape that most cards of the board show.
    """
    counts = [Counter(hunt.shapes) for hunt in gallery.hunts]
    most = [{s for s in SHAPES if c[s] == max(c.values())} for c in counts]
    rows = list(zip(said, gallery.hunts, most, strict=True))
    chance = sum((hunt.answer in common) / len(common) for _, hunt, common in rows) / len(rows)
    return {
        "right": _share([word == hunt.answer for word, hunt, _ in rows]),
        "a_shape": _share([word in SHAPES for word, _, _ in rows]),
        "a_commonest_shape": _share([word in common for word, _, common in rows]),
        "commonest_shape_is_right": round(chance, 4),
    }


def _read(model: Model, gallery: Gallery, question: str) -> list[bool]:
    """Is all right that is said about each card, the cards called in reading order?"""
    prompt = prompt_words(question)
    captions = [
        [word for card in hunt.names for word in (card, *CAPTIONS[question](hunt, card))]
        for hunt in gallery.hunts
    ]
    ids = token_ids([[*prompt, *caption] for caption in captions])
    right = model.lm_head(read(model, ids, gallery.features)).argmax(-1)[:, :-1] == ids[:, 1:]
    cards = right[:, len(prompt) - 1 :].unflatten(1, (CARDS, -1))[..., 1:]  # the name is given
    return cards.all(-1).flatten().tolist()


def _rewritten(model: Model, gallery: Gallery, variant: Variant) -> dict[str, dict[str, float]]:
    """How the answer follows a visited card's name when another is written in its place.

    Names after the changed one are the model's own. `followed` is the share of answers the changed
    walk leads to, `decisive` the share of hunts in which that is another shape than the true one,
    `decisive_followed` and `decisive_kept` the shares of both answers among these.
    """
    rng = np.random.default_rng(HELD_OUT + 2)
    table = {}
    for hop in range(1, variant.hops + 1):
        others = [
            str(rng.choice([name for name in NAMES if name != hunt.path[hop]]))
            for hunt in gallery.hunts
        ]
        said = _answers(
            model, gallery, variant, lambda i, words, on=hop, to=others: to if i == on else words
        )
        rows = [
            (word, hunt.shape_of(hunt.follow(to, variant.hops - hop)[-1]), hunt.answer)
            for word, to, hunt in zip(said, others, gallery.hunts, strict=True)
        ]
        decisive = [row for row in rows if row[1] != row[2]]
        table[f"step {hop - 1}"] = {
            "decisive": _share([led != true for _, led, true in rows]),
            "followed": _share([word == led for word, led, _ in rows]),
            "decisive_followed": _share([word == led for word, led, _ in decisive]),
            "decisive_kept": _share([word == true for word, _, true in decisive]),
        }
    return table


def _answers(
    model: Model, gallery: Gallery, variant: Variant, rewrite: Rewrite | None = None
) -> list[str]:
    """The word where the answer belongs, after an imagination as long as it should be."""
    length = len(variant.speech(gallery.hunts[0])) - 1
    return [said[-1] for said in speak(model, gallery, length=length, rewrite=rewrite)]


def _protocol(model: Model, run: Rollout) -> dict[str, float]:
    """How the span would open and close if nobody forced it."""
    inside = [next_words(model, run.latents[:, t]) for t in range(run.latents.shape[1])]
    return {
        "opens": _share([word == "<|latent_start|>" for word in next_words(model, run.opening)]),
        "closes_unforced": _share(
            [word == "<|latent_end|>" for word in next_words(model, run.closing)]
        ),
        "closes_early": _share(["<|latent_end|>" in said for said in zip(*inside, strict=True)]),
    }


def _replacements(latents: Tensor) -> dict[str, Edit]:
    """The do(Z) edits; statistics are per step over the unedited latents."""
    mean, spread = latents.mean(0, keepdim=True), latents.std(0, keepdim=True)
    draw = torch.randn(latents.shape, generator=torch.Generator().manual_seed(0))
    values = {
        "mean": mean.expand_as(latents),
        "zero": torch.zeros_like(latents),
        "shuffle": latents.roll(1, 0),
        "noise": mean + spread * draw,
        "norm-matched noise": F.normalize(draw, dim=-1) * latents.norm(dim=-1, keepdim=True),
    }
    return {name: lambda step, state, z=z: z[:, step] for name, z in values.items()}


def _swaps(model: Model, variant: Variant, *, n: int) -> dict[str, dict[str, float]]:
    """Which hypothesis the answer follows when source latents are swapped into the base.

    Of an organism that imagines in words, the names are swapped. Steps after a swapped one are
    recomputed. Shares are over all pairs; `decisive` are the pairs where the three hypotheses
    disagree, and `decisive_*` the shares among them.
    """
    base, source = pairs(n, hops=variant.hops, seed=HELD_OUT + 1)
    bases, sources = photograph(model, base), photograph(model, source)
    swap = _swap_words if variant.imagines else _swap_latents
    steps = variant.hops if variant.imagines else variant.latent_steps
    subsets = {"all": None} | {f"step {t}": (t,) for t in range(steps)}
    table = {}
    for name, subset in subsets.items():
        said = swap(model, bases, sources, variant, subset or tuple(range(steps)))
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


def _swap_latents(
    model: Model, bases: Gallery, sources: Gallery, variant: Variant, steps: tuple[int, ...]
) -> list[str]:
    donors = rollout(model, sources).latents
    run = rollout(model, bases, edit=lambda t, state: donors[:, t] if t in steps else state)
    return next_words(model, run.answering)


def _swap_words(
    model: Model, bases: Gallery, sources: Gallery, variant: Variant, steps: tuple[int, ...]
) -> list[str]:
    donors = list(zip(*speak(model, sources, length=variant.hops + 1), strict=True))
    return _answers(
        model, bases, variant, lambda i, words: list(donors[i]) if i - 1 in steps else words
    )


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


# -- cards ---------------------------------------------------------------------------------------


def describe_training(name: str, *, seed: int, cpu: float) -> dict[str, Any]:
    """How an organism was trained: with what, and for how long."""
    return {
        "command": f"python examples/organisms/train.py {name} --seed {seed} --out organisms",
        "seed": seed,
        "cpu_seconds": round(cpu),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def write_card(
    target: Path,
    name: str,
    variant: Variant,
    results: dict[str, Any],
    training: dict[str, Any],
) -> None:
    """Write `card.json` for programs and `card.md` for people."""
    card = {
        "name": name,
        "hops": variant.hops,
        "latent_steps": variant.latent_steps,
        **results,
        "variant": asdict(variant),
        "training": training,
    }
    (target / "card.md").write_text("\n".join(_markdown(card)) + "\n")
    (target / "card.json").write_text(json.dumps(card, indent=2) + "\n")


def _markdown(card: dict[str, Any]) -> Iterator[str]:
    training, steps = card["training"], card["latent_steps"]
    yield f"# {card['name']}"
    yield ""
    yield "A tiny Qwen2.5-VL (0.2 M parameters) that plays the treasure hunt of"
    yield "`imaginelens.organisms.hunt`."
    yield f"Free greedy accuracy {card['accuracy']:.3f} on {card['n']} held-out hunts"
    yield f"(hops: {card['hops']}, latent steps: {steps})."
    if "guess" in card:
        yield ""
        seen = card["guess"]["commonest_shape_is_right"]
        yield f"A shape drawn blindly is right in {1 / len(SHAPES):.3f}, the shape that most cards"
        yield f"of the board show in {seen:.3f}. Its first word is:"
        yield ""
        words = ("right", "a_shape", "a_commonest_shape")
        yield from _table(
            "", {"share": {word.replace("_", " "): card["guess"][word] for word in words}}
        )
    if "reads" in card:
        yield ""
        yield "Share of cards about which it says everything right, by question:"
        yield ""
        yield from _table("question", {ask: {"right": s} for ask, s in card["reads"].items()})
    if "rewrite" in card:
        yield ""
        yield "Right is the whole imagination, names in order, and the answer."
        yield "Share answered as the walk ends when another name is written in the place of one and"
        yield "the rest is the model's own (`decisive`: hunts in which that changes the shape):"
        yield ""
        yield from _table("rewritten", card["rewrite"])
    if "do_z" in card:
        yield ""
        yield "Accuracy when every latent is replaced:"
        yield ""
        yield from _table("", {"accuracy": card["do_z"]})
    if "swap" in card:
        what = "latent steps" if steps else "imagined names"
        yield ""
        yield f"Share of {card['n']} pairs answered as each hypothesis predicts when these {what}"
        yield "come from the source run and later ones are recomputed:"
        yield ""
        yield from _table(
            "swapped",
            {on: {name: row[name] for name in HYPOTHESES} for on, row in card["swap"].items()},
        )
    if "geometry" in card:
        yield ""
        yield "Mean cosine of the latents, to the visited card's visual token and between examples:"
        yield ""
        rows = {name.replace("_", " "): values for name, values in card["geometry"].items()}
        yield from _table(
            "", {name: {f"step {t}": v for t, v in enumerate(row)} for name, row in rows.items()}
        )
    yield ""
    yield f"Trained in {training['cpu_seconds']} CPU seconds by"
    yield f"`{training['command']}`"
    yield f"(torch {training['torch']}, transformers {training['transformers']}). Measured by"
    yield f"`python examples/organisms/measure.py {card['name']}`."


def _table(corner: str, rows: dict[str, dict[str, float]]) -> Iterator[str]:
    columns = list(next(iter(rows.values())))
    yield f"| {' | '.join([corner, *columns])} |"
    yield "|" + "-|" * (len(columns) + 1)
    for label, row in rows.items():
        yield f"| {' | '.join([label, *(f'{row[column]:.3f}' for column in columns)])} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("organism", help="the name of a shipped organism, or a folder")
    parser.add_argument("--write", action="store_true", help="write the card anew")
    options = parser.parse_args()
    torch.set_num_threads(1)
    shipped = options.organism in checkpoint.available()
    folder = checkpoint.folder(options.organism) if shipped else Path(options.organism)
    card = json.loads((folder / "card.json").read_text())
    variant = Variant(**card["variant"])
    results = measure(open_model(folder), variant, n=card["n"])
    print(json.dumps(results, indent=2))
    if options.write:
        write_card(folder, card["name"], variant, results, card["training"])
    elif changed := [key for key in results if results[key] != card.get(key)]:
        raise SystemExit(f"the card of {card['name']} says otherwise about {', '.join(changed)}")


if __name__ == "__main__":
    main()
