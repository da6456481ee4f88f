"""A report with known content: one model whose latents carry the answer, one that ignores them."""

import numpy as np
from PIL import Image, ImageDraw

from imaginelens.view import (
    Cell,
    Check,
    Column,
    EditRow,
    Example,
    GridCell,
    HeatMap,
    KeyNumber,
    Measure,
    Mechanism,
    Picture,
    Prediction,
    Report,
    Row,
    Study,
    Token,
)

SIDE, CARD = 84, 28
COLOURS = (
    "#e11e1e", "#1eb432", "#283ce6", "#ebdc28", "#d728d7",
    "#28d7e1", "#f5f5f5", "#f58c14", "#6e6e6e",
)  # fmt: skip
ROWS = (
    Row(site="hook_latent", label="hook_latent"),
    *(Row(site=f"blocks.{i}.hook_resid_post", label=f"layer {i}", layer=i) for i in range(3)),
)
COLUMNS = tuple(Column(step=i, label=f"z{i}", token="<|latent_pad|>") for i in range(3))
CAUSAL = ((0.62, 0.98, 0.41), (0.55, 0.97, 0.38), (0.21, 0.93, 0.17), (0.08, 0.44, 0.0))
IGNORED = (
    (0.0, 0.004, -0.002),
    (0.003, -0.006, 0.001),
    (-0.001, 0.012, 0.002),
    (0.0, -0.004, None),
)


def cards(seed: int) -> Image.Image:
    """Nine cards with a glyph each, 84 by 84 pixels."""
    generator = np.random.default_rng(seed)
    image = Image.new("RGB", (SIDE, SIDE))
    draw = ImageDraw.Draw(image)
    for index, colour in enumerate(generator.permutation(9)):
        x, y = CARD * (index % 3), CARD * (index // 3)
        draw.rectangle((x, y, x + CARD, y + CARD), fill=COLOURS[colour])
        box = (x + 6, y + 8, x + 21, y + 23)
        ink = COLOURS[(colour + 1 + index) % 9]
        (draw.ellipse, draw.rectangle)[generator.integers(2)](box, fill=ink)
    return image


def picture(seed: int) -> Picture:
    boxes = [
        (c * CARD, r * CARD, (c + 1) * CARD, (r + 1) * CARD) for r in range(3) for c in range(3)
    ]
    cells = (GridCell(i // 3, i % 3, tuple(map(float, box))) for i, box in enumerate(boxes))
    return Picture(cards(seed), tuple(cells), alt="nine coloured cards")


def tokens(answer: str) -> tuple[Token, ...]:
    parts = [("<|im_start|>", "system"), ("user", "system"), ("<|vision_start|>", "system")]
    parts += [("<|image_pad|>", "image")] * 9 + [("<|vision_end|>", "system")]
    parts += [(word, "text") for word in ("start", " green", " then", " then", " shape", "?")]
    parts += [
        (word, "system") for word in ("<|im_end|>", "<|im_start|>", "assistant", "<|latent_start|>")
    ]
    parts += [("<|latent_pad|>", "latent")] * 3 + [("<|latent_end|>", "system"), (answer, "answer")]
    return tuple(Token(text, kind) for text, kind in [*parts, ("<|im_end|>", "system")])


def heatmap(effects: tuple[tuple[float | None, ...], ...]) -> HeatMap:
    cells = tuple(tuple(cell(effect) for effect in row) for row in effects)
    caption = (
        "Source state into the base run (denoise), logit difference, 64 pairs. "
        "1 is the source's answer, 0 the base's. In each cell: the shown pair's answer."
    )
    return HeatMap(ROWS, COLUMNS, cells, caption=caption)


def cell(effect: float | None) -> Cell:
    if effect is None:
        return Cell(None)
    spread = 0.0 if effect == 0 else 0.03
    after = "triangle" if effect > 0.5 else "ring"
    return Cell(
        effect, n=64, interval=(effect - spread, effect + spread), before="ring", after=after
    )


def edits(accuracies: dict[str, float]) -> tuple[EditRow, ...]:
    unedited = EditRow("unedited", Measure(0.984, 64, (0.918, 0.997)))
    sizes = {"Sham": 0.0, "AddNoise(0.3)": 0.297, "Constant": 1.12, "Noise": 1.38, "Zero": 1.0}
    rows = [
        EditRow(
            edit,
            Measure(value, 64, (max(0.0, value - 0.09), min(1.0, value + 0.08))),
            Measure(value - 0.984, 64, (value - 0.984 - 0.06, value - 0.984 + 0.06)),
            flipped=round(1 - value, 3) if edit != "Sham" else 0.0,
            relative_change=sizes[edit],
            fired=192,
            expected=192,
        )
        for edit, value in accuracies.items()
    ]
    return (unedited, *rows)


def swap(winner: str) -> Mechanism:
    """The winner came true in 36 of 38 decisive pairs, nothing in the other two."""
    predictions = [
        Prediction(
            name,
            f"what {name} means",
            Measure(0.947, 38, (0.827, 0.985))
            if name == winner
            else Measure(0.0, 38, (0.0, 0.092)),
            answer,
        )
        for name, answer in (("content", "triangle"), ("ignored", "ring"))
    ]
    predictions.append(Prediction("other", "neither", Measure(0.053, 38, (0.015, 0.173))))
    answered = "triangle" if winner == "content" else "ring"
    return Mechanism(tuple(predictions), winner, n_pairs=64, answered=answered)


def checks() -> tuple[Check, ...]:
    return (
        Check("Sham", "0.0", True, "Largest change of a logit when a run gets its own states."),
        Check("Full swap", "64 / 64", True, "All inputs of the source gave the source's logits."),
        Check("Landings", "960 / 960", True, "Every edit took place where it was meant to."),
        Check("Latents emitted", "64 / 64", None, "Runs that opened a latent span, of 3 steps."),
    )


def study(
    name: str,
    headline: str,
    effects,
    accuracies: dict[str, float],
    seed: int,
    tnie: float,
    winner: str,
) -> Study:
    generator = np.random.default_rng(seed)
    question = "start green then then shape?"
    return Study(
        name=name,
        headline=headline,
        base=Example(question, "ring", picture(seed)),
        source=Example(question, "triangle", picture(seed + 1)),
        tokens=tokens("ring"),
        latents=generator.normal(size=(3, 64)) * np.array([[0.8], [1.1], [0.9]]),
        heatmap=heatmap(effects),
        edits=edits(accuracies),
        checks=checks(),
        numbers=(
            KeyNumber(
                "Effect through the latents (TNIE)", Measure(tnie, 64, (tnie - 0.03, tnie + 0.02))
            ),
            KeyNumber("Total effect (TE)", Measure(0.984, 64, (0.918, 0.997)), unit="%"),
        ),
        detail="36 of 38 decisive swaps say so.",
        mechanism=swap(winner),
    )


def content() -> Study:
    headline = "The latents carry the answer: swap them and the answer follows."
    accuracies = {
        "Sham": 0.984, "AddNoise(0.3)": 0.92, "Constant": 0.172, "Noise": 0.188, "Zero": 0.156
    }  # fmt: skip
    return study("latent-content", headline, CAUSAL, accuracies, 3, 0.953, "content")


def ignored() -> Study:
    headline = "The latents are written and never read: no edit changes the answer."
    accuracies = {
        "Sham": 0.984, "AddNoise(0.3)": 0.984, "Constant": 0.984, "Noise": 0.969, "Zero": 0.984
    }  # fmt: skip
    return study("latent-ignored", headline, IGNORED, accuracies, 7, 0.002, "ignored")


def planted_report(**changes) -> Report:
    fields = {
        "title": "Do the latent tokens do anything?",
        "subtitle": "Two small models with equal accuracy. Both write three latent tokens before "
        "they answer; only one of them reads them.",
        "overview_note": "TE and TNIE of 64 pairs.",
        "studies": (content(), ignored()),
        "provenance": {
            "imaginelens": "0.1.0", "torch": "2.13.0+cpu", "transformers": "5.23.0",
            "nnsight": "0.8.1", "dtype": "float32", "seed": 0, "pairs": 64, "forwards": 1412,
            "seconds": 31.4,
        },
    }  # fmt: skip
    return Report(**{**fields, **changes})
