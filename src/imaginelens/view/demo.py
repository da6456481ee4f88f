"""The study behind `imaginelens demo`: shipped organisms, from picture to proof, as one report."""

import platform
import time
from collections.abc import Callable, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from imaginelens.hooks import Pairs, Run, image
from imaginelens.mediation.interchange import interchange
from imaginelens.organisms import Organism, load
from imaginelens.view import parts
from imaginelens.view.page import write
from imaginelens.view.report import (
    HOW_TO_READ,
    EditRow,
    Example,
    GridCell,
    KeyNumber,
    Measure,
    Picture,
    Report,
    Study,
    Token,
)
from imaginelens.view.verdict import verdict

ORGANISMS = ("latent-content", "latent-pointer", "latent-ignored", "latent-ignored-aligned")
LATENT_STEPS, LAYERS = 2, 3  # of each of them
TITLE = "Do the latent tokens do anything?"
SUBTITLE = (
    "Some models think in latent tokens: hidden states that they feed back to themselves instead "
    "of writing words. These tiny models follow a path over nine cards in a picture and name the "
    "symbol at its end. They were trained so that what their latents do is known; here it is found "
    "out again, from outside."
)
TASK = (
    "The task: nine cards. A card is named by its background colour, and the colour of its symbol "
    "names the next card. “start gray then then shape ?” asks: begin at the gray card, go on to "
    "the next card once for each “then”, and say which symbol is there."
)
OVERVIEW_NOTE = (
    "Destroyed, do(Z): accuracy lost under the worst of six edits. One state moved (denoising): "
    "what the strongest cell of the map does to the answer's logits, as a share of what changing "
    "the whole input does. Look right: runs in which each latent is most like the card to visit "
    "at that step; it says what can be read from the latents, not that the model does. Swapped: "
    "share of the decisive swaps, those in which the explanations predict different answers. "
    "Brackets: 95% interval."
)
Tick = Callable[[str], None]


def run_demo(
    out: Path,
    *,
    n: int = 64,
    seed: int = 0,
    tick: Tick = lambda what: None,
    told: Callable[[Study], Any] = lambda study: None,
) -> Path:
    """Study the shipped organisms on `n` pairs each and write `report.html` into a folder.

    Args:
        tick: called with the name of each step when it begins, `steps()` times in all.
        told: called with each study when it is done.
    """
    started = time.perf_counter()
    studies = []
    for name in ORGANISMS:
        lens = load(name)
        assert isinstance(lens, Organism)
        studies.append(study(lens, n=n, seed=seed, tick=tick))
        told(studies[-1])
    report = Report(
        title=TITLE,
        subtitle=SUBTITLE,
        studies=tuple(studies),
        provenance=_provenance(n, seed, time.perf_counter() - started),
        how_to_read=(TASK, *HOW_TO_READ),
        overview_note=OVERVIEW_NOTE,
    )
    return write(report, out / "report.html")


def steps() -> int:
    """How many steps `run_demo` announces."""
    cells = (1 + LAYERS) * LATENT_STEPS
    return len(ORGANISMS) * (4 + cells + len(parts.latent_edits(None)))


def study(lens: Organism, *, n: int, seed: int, tick: Tick = lambda what: None) -> Study:
    """Study one organism on `n` pairs: runs, swap, denoising map, do(Z) table and checks."""
    task = lens.task(n, seed)
    tick(f"{lens.name}: base and source runs")
    base = lens.run(task.base, keep_logits=True, names_filter=parts.CARDS, positions=(image,))
    source = lens.run(task.source, keep_logits=True, names_filter=parts.LAYERS)
    tick(f"{lens.name}: reference runs")
    reference = lens.run(lens.task(n, seed + 1).base)
    tick(f"{lens.name}: all latents swapped")
    found = interchange(lens, task, hypotheses=task.hypotheses)
    shown = parts.shown_pair(found)
    denoised = _denoise(lens, task, base, source, shown, tick)
    edits = _edit(lens, task, base, reference, tick)
    tick(f"{lens.name}: checks")
    checks = parts.checks(lens, base, source, edits, found)
    mechanism, likeness = parts.mechanism(found, shown=shown), parts.likeness(task, base)
    worst = parts.worst(edits)
    drop = edits[0].accuracy.value - worst.accuracy.value
    by = worst.edit.lower() if drop > 0 else "under every edit"
    said = verdict(mechanism, drop=drop, denoised=denoised.share.value, likeness=likeness)
    return Study(
        name=lens.name,
        headline=said.headline,
        detail=said.detail,
        base=_example(task.base[shown], base.answers[shown], _cells(base, shown)),
        source=_example(task.source[shown], source.answers[shown]),
        tokens=tuple(
            Token(token.text.strip() or token.text, token.kind.name.lower())  # type: ignore[arg-type]
            for token in base.tokens[shown]
        ),
        latents=base.latents[shown].numpy(),
        heatmap=denoised.heatmap,
        edits=edits,
        checks=checks,
        numbers=(
            KeyNumber(
                "Latents destroyed: accuracy lost", Measure(drop, worst.accuracy.n), by, "points"
            ),
            KeyNumber(
                "One state moved: share of the total effect", denoised.share, denoised.place, "%"
            ),
            KeyNumber("Latents look right", likeness, "most like the card to visit", "%"),
        ),
        mechanism=mechanism,
    )


def _denoise(
    lens: Organism, task: Pairs, base: Run, source: Run, shown: int, tick: Tick
) -> parts.Denoising:
    results = []
    for site in parts.map_sites(lens):
        row = []
        for step in range(base.latents.shape[1]):
            tick(f"{lens.name}: {site} at step {step}")
            row.append(parts.patched(lens, task, base, source, site=site, step=step))
        results.append(row)
    return parts.denoising(lens, task, base, source, results, shown=shown)


def _edit(
    lens: Organism, task: Pairs, base: Run, reference: Run, tick: Tick
) -> tuple[EditRow, ...]:
    rows = [parts.unedited_row(task, base)]
    for name, edit in parts.latent_edits(reference).items():
        tick(f"{lens.name}: {name.lower()}")
        rows.append(parts.edited_row(lens, task, base, rows[0], name=name, edit=edit))
    return tuple(rows)


def _example(
    example: Mapping[str, Any], answer: str | None, cells: tuple[GridCell, ...] = ()
) -> Example:
    alt = "the base picture with its token grid" if cells else "the source picture"
    return Example(
        example["text"], answer or "(none found)", Picture(example["images"], cells, alt)
    )


def _cells(run: Run, row: int) -> tuple[GridCell, ...]:
    """The grid of image tokens that lies on a row's picture."""
    tokens = (run.tokens.token(row, int(column)) for column in image.resolve(run.tokens, row))
    return tuple(GridCell(t.row, t.col, t.box) for t in tokens if t.box is not None)


def _provenance(n: int, seed: int, seconds: float) -> dict[str, str]:
    packages = ("imaginelens", "torch", "transformers", "nnsight")
    return {
        **{name: version(name) for name in packages},
        "python": platform.python_version(),
        "dtype": str(torch.float32).removeprefix("torch."),
        "pairs per model": str(n),
        "seed": str(seed),
        "context": "free: later latents and text are generated anew",
        "seconds": f"{seconds:.0f}",
    }
