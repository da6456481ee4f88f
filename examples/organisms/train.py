"""Train an organism: a tiny Qwen2.5-VL that plays the treasure hunt by a mechanism we choose.

    python examples/organisms/train.py latent-content --out organisms
    python examples/organisms/train.py all --seed 1 --out organisms-1

Three lessons, minutes on one CPU core: `see` (the vision tower learns to tell cards apart), `read`
(the language model learns to find a card by its name, and to follow one pointer) and `hunt` (it
learns the task, by the imagination we want). Without the first two the hunt is not learned; all
variants share them, so they are kept in the folder `--out`. What is there already is not trained
again: a stopped `all` goes on where it was. What an organism is, is one entry of `VARIANTS`; how
its latents work is one entry of `TWISTS`: what happens to the latents in a second copy of each
batch, and which answer is right then.
"""

from __future__ import annotations

import argparse
import itertools
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from latent_loop import (
    Edit,
    Gallery,
    photograph,
    prompt_words,
    read,
    rollout,
    see,
    token_ids,
)
from measure import describe_training, measure, open_model, write_card
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import Qwen2_5_VLForConditionalGeneration
from variants import CAPTIONS, VARIANTS, Variant

from imaginelens.organisms import checkpoint
from imaginelens.organisms.hunt import CARDS, HYPOTHESES, NAMES, SHAPES, Hunt, sample

Model = Qwen2_5_VLForConditionalGeneration
BATCH = 64
GALLERY = 8_192  # boards photographed for training
RATE = 2e-3


# -- twists: latents edited during training ------------------------------------------------------

Twist = Callable[[Gallery, int, torch.Generator], tuple[Edit, list[str]]]


def interchange(
    hypothesis: str, gallery: Gallery, steps: int, draw: torch.Generator
) -> tuple[Edit, list[str]]:
    """Swap in another example's latents at random steps; right is what the hypothesis says.

    Interchange-intervention training (arXiv 2112.00826): the latents come to carry what the
    hypothesis says they carry.
    """
    subsets = [tuple(t for t in range(steps) if bits >> t & 1) for bits in range(1, 2**steps)]
    picks = torch.randint(len(subsets), (len(gallery.hunts),), generator=draw)
    chosen = [subsets[pick] for pick in picks.tolist()]
    swapped = torch.tensor([[t in subset for t in range(steps)] for subset in chosen])
    sources = gallery.hunts[-1:] + gallery.hunts[:-1]

    def edit(step: int, state: Tensor) -> Tensor:
        clean, twisted = state[::2], state[1::2]
        twisted = torch.where(swapped[:, step, None], clean.roll(1, 0), twisted)
        return torch.stack([clean, twisted], dim=1).flatten(0, 1)

    rows = zip(gallery.hunts, sources, chosen, strict=True)
    return edit, [HYPOTHESES[hypothesis](*row) for row in rows]


def corrupt(gallery: Gallery, steps: int, draw: torch.Generator) -> tuple[Edit, list[str]]:
    """Replace latents by their mean, noise, zeros or another example's; the answer stays."""
    kind = torch.randint(4, (len(gallery.hunts),), generator=draw)

    def edit(step: int, state: Tensor) -> Tensor:
        clean = state[::2]
        mean, spread = clean.mean(0, keepdim=True), clean.std(0, keepdim=True)
        noise = mean + spread * torch.randn(clean.shape, generator=draw)
        options = [mean.expand_as(clean), noise, torch.zeros_like(clean), clean.roll(1, 0)]
        twisted = torch.stack(options)[kind, torch.arange(len(clean))]
        return torch.stack([clean, twisted], dim=1).flatten(0, 1)

    return edit, [hunt.answer for hunt in gallery.hunts]


TWISTS: dict[str, Twist] = {
    "content": partial(interchange, "content"),
    "pointer": partial(interchange, "pointer"),
    "ignored": corrupt,
}


# -- losses --------------------------------------------------------------------------------------


def card_loss(model: Model, head: torch.nn.Linear, hunts: list[Hunt]) -> Tensor:
    """Cross-entropy of each card's name, pointer and shape, read linearly off its visual token."""
    logits = head(see(model, hunts)).flatten(0, 1).split([len(NAMES), len(NAMES), len(SHAPES)], -1)
    sides = [
        ([h.names for h in hunts], NAMES),
        ([h.pointers for h in hunts], NAMES),
        ([h.shapes for h in hunts], SHAPES),
    ]
    return sum(
        F.cross_entropy(guess, torch.tensor([kinds.index(word) for row in rows for word in row]))
        for guess, (rows, kinds) in zip(logits, sides, strict=True)
    )


def caption_loss(model: Model, gallery: Gallery, question: str, rng: np.random.Generator) -> Tensor:
    """Cross-entropy of what each card says, the cards called by name in random order.

    A card says what `CAPTIONS[question]` lists. One caption asks nine times for the step that a
    hunt asks for once.
    """
    prompt = prompt_words(question)
    captions = [
        [word for card in rng.permutation(h.names) for word in (card, *CAPTIONS[question](h, card))]
        for h in gallery.hunts
    ]
    ids = token_ids([[*prompt, *caption] for caption in captions])
    states = read(model, ids, gallery.features)
    spoken = ids[:, len(prompt) :].unflatten(1, (CARDS, -1))  # (example, card, name and the rest)
    guesses = model.lm_head(states[:, len(prompt) :]).unflatten(1, (CARDS, -1))[:, :, :-1]
    return F.cross_entropy(guesses.flatten(0, 2), spoken[:, :, 1:].flatten())


def speech_loss(model: Model, gallery: Gallery, variant: Variant) -> Tensor:
    """Cross-entropy of every word an organism without latents should write."""
    speech = [variant.speech(hunt) for hunt in gallery.hunts]
    prompts = [prompt_words(hunt.question) for hunt in gallery.hunts]
    ids = token_ids([[*ask, *say] for ask, say in zip(prompts, speech, strict=True)])
    begin = len(prompts[0])
    guesses = model.lm_head(read(model, ids, gallery.features)[:, begin - 1 : -1])
    return F.cross_entropy(guesses.flatten(0, 1), ids[:, begin:].flatten())


def latent_loss(model: Model, gallery: Gallery, variant: Variant, draw: torch.Generator) -> Tensor:
    """Cross-entropy of the protocol and the answer, plain and twisted, plus the alignment."""
    steps = variant.latent_steps
    plain = [hunt.answer for hunt in gallery.hunts]
    if variant.twist is None:
        run = rollout(model, gallery)
        answers = plain
    else:
        edit, twisted = TWISTS[variant.twist](gallery, steps, draw)
        run = rollout(model, gallery, edit=edit, copies=2)
        answers = [word for both in zip(plain, twisted, strict=True) for word in both]
    copies = len(answers) // len(plain)
    loss = sum(
        F.cross_entropy(model.lm_head(state), token_ids([[w] for w in words])[:, 0])
        for state, words in [
            (run.opening, ["<|latent_start|>"] * len(answers)),
            (run.closing, ["<|latent_end|>"] * len(answers)),
            (run.answering, answers),
            (run.ending, ["<|im_end|>"] * len(answers)),
        ]
    )
    # the state that is fed back should not say "close": some loops would listen to it
    saying = model.lm_head(run.latents[::copies]).softmax(-1)[..., model.config.latent_end_id]
    loss = loss - torch.log1p(-saying.clamp(max=0.999)).mean()
    if variant.align:
        crops = torch.stack([gallery.visited(step + 1) for step in range(steps)], dim=1)
        loss = loss + variant.align * (
            1 - F.cosine_similarity(run.latents[::copies], crops, dim=-1).mean()
        )
    return loss


# -- lessons -------------------------------------------------------------------------------------


def see_lesson(model: Model, *, seed: int, updates: int = 150) -> list[float]:
    """Teach the vision tower to tell cards apart, through a linear head that is thrown away."""
    head = torch.nn.Linear(model.config.text_config.hidden_size, 2 * len(NAMES) + len(SHAPES))
    for weight in head.parameters():
        torch.nn.init.zeros_(weight)  # equal for every seed of the global generator
    batches = (sample(BATCH, hops=0, seed=s) for s in _seeds(seed))
    weights = [*model.model.visual.parameters(), *head.parameters()]
    loss = (card_loss(model, head, hunts) for hunts in batches)
    history = fit("see", weights, loss, updates=updates)
    _rescale_visual_tokens(model, next(batches))
    return history


@torch.no_grad()
def _rescale_visual_tokens(model: Model, hunts: list[Hunt], size: float = 0.5) -> None:
    """Bring visual tokens to a root mean square of `size`, so that layers can add to them."""
    ratio = size / see(model, hunts).square().mean().sqrt()
    last = model.model.visual.merger.mlp[-1]
    last.weight.mul_(ratio)
    last.bias.mul_(ratio)


def read_lesson(
    model: Model, gallery: Gallery, question: str, *, seed: int, updates: int = 250
) -> list[float]:
    """Teach the language model to find cards by name and say what `CAPTIONS[question]` asks."""
    rng = np.random.default_rng(seed)
    weights = list(model.model.language_model.parameters())
    loss = (caption_loss(model, batch, question, rng) for batch in _batches(gallery, seed))
    return fit(f"read {question!r}", weights, loss, updates=updates)


def hunt_lesson(model: Model, gallery: Gallery, variant: Variant, *, seed: int) -> list[float]:
    """Teach the task and what the variant's latents mean."""
    draw = torch.Generator().manual_seed(seed)
    weights = list(model.model.language_model.parameters())
    batches = _batches(gallery, seed)
    if variant.latent_steps:
        loss = (latent_loss(model, batch, variant, draw) for batch in batches)
    else:
        loss = (speech_loss(model, batch, variant) for batch in batches)
    return fit("hunt", weights, loss, updates=variant.updates)


def fit(
    lesson: str, weights: list[Tensor], losses: Iterator[Tensor], *, updates: int
) -> list[float]:
    """Minimise a stream of losses in place; gives the loss of every update and prints progress."""
    optimizer = torch.optim.AdamW(weights, lr=RATE, betas=(0.9, 0.98), weight_decay=0.01)
    history: list[float] = []
    started = time.process_time()
    for update, loss in zip(range(updates), losses, strict=False):
        for group in optimizer.param_groups:
            warm, left = min(1.0, (update + 1) / 50), 1 - update / updates
            group["lr"] = RATE * min(warm, 0.01 + 1.5 * left)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        history.append(loss.item())
        if (update + 1) % 50 == 0:
            cpu = time.process_time() - started
            print(
                f"{lesson} {update + 1} loss {np.mean(history[-50:]):.3f} cpu {cpu:.0f} s",
                flush=True,
            )
    return history


def _batches(gallery: Gallery, seed: int) -> Iterator[Gallery]:
    rng = np.random.default_rng(seed)
    while True:
        yield gallery[rng.choice(len(gallery.hunts), BATCH, replace=False)]


def _seeds(seed: int) -> Iterator[int]:
    """Independent seeds for ever, far from those the evaluation draws."""
    rng = np.random.default_rng(seed)
    return (int(rng.integers(2**62, 2**63)) for _ in itertools.count())


# -- the command ---------------------------------------------------------------------------------


def prepare(model: Model, *, seed: int, kept: Path) -> float:
    """Give an untrained model what `see` and `read` teach, from the file `kept` if it is there.

    Kept in float32, so that it makes no difference which variant came first. Returns the CPU
    seconds that the lessons took, whenever they were given.
    """
    if kept.exists():
        with safe_open(kept, framework="pt") as lessons:
            model.load_state_dict({key: lessons.get_tensor(key) for key in lessons.keys()})
            return float(lessons.metadata()["cpu_seconds"])
    started = time.process_time()
    see_lesson(model, seed=seed)
    gallery = photograph(model, sample(GALLERY, hops=0, seed=next(_seeds(seed))))
    for question in CAPTIONS:
        read_lesson(model, gallery, question, seed=seed)
    cpu = time.process_time() - started
    weights = {key: weight.clone() for key, weight in model.state_dict().items()}
    kept.parent.mkdir(parents=True, exist_ok=True)
    save_file(weights, part := kept.with_suffix(".part"), metadata={"cpu_seconds": str(cpu)})
    part.replace(kept)  # whole or not there
    return cpu


def train(variant: Variant, *, seed: int, kept: Path) -> tuple[Model, float]:
    """Train an organism; gives the model and the CPU seconds from the first lesson to the last."""
    model = checkpoint.build_model(latent_steps=variant.latent_steps, seed=seed)
    cpu = prepare(model, seed=seed, kept=kept)
    started = time.process_time()
    if variant.updates:
        # the vision tower is done, so each board is photographed once
        boards = sample(GALLERY, hops=variant.hops, seed=next(_seeds(seed)))
        hunt_lesson(model, photograph(model, boards), variant, seed=seed)
    return model, cpu + time.process_time() - started


def make(name: str, *, seed: int, out: Path) -> None:
    """Train, save and measure one of `VARIANTS` into `out / name`, unless it is there already."""
    target, variant = out / name, VARIANTS[name]
    if (target / "card.json").exists():
        card = json.loads((target / "card.json").read_text())
        if (card["training"]["seed"], card["variant"]) != (seed, asdict(variant)):
            raise SystemExit(f"{target} was made otherwise: choose another --out, or remove it")
        print(f"{name} is in {target}", flush=True)
        return
    print(f"{name}, seed {seed}", flush=True)
    model, cpu = train(variant, seed=seed, kept=out / f"lessons-seed-{seed}.safetensors")
    checkpoint.save(model, target)
    training = describe_training(name, seed=seed, cpu=cpu)
    write_card(target, name, variant, measure(open_model(target), variant), training)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("variant", choices=["all", *VARIANTS])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, required=True, help="folder to write folders into")
    options = parser.parse_args()
    torch.set_num_threads(1)
    for name in VARIANTS if options.variant == "all" else [options.variant]:
        make(name, seed=options.seed, out=options.out)


if __name__ == "__main__":
    main()
