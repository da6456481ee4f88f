"""The study behind `imaginelens demo`: shipped organisms, from picture to proof, as one report."""

import platform
import time
from collections.abc import Callable, Iterable, Sequence
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
from scipy import stats

from imaginelens.hooks import (
    AddNoise,
    Edit,
    Mean,
    Noise,
    Pairs,
    PatchResult,
    Resample,
    Run,
    Sham,
    Shuffle,
    Zero,
    accuracy,
    image,
    latent,
    logit_diff,
)
from imaginelens.hooks.controls import check_integrity
from imaginelens.hooks.metrics import same, targets_of
from imaginelens.organisms import Organism, load
from imaginelens.view.page import write
from imaginelens.view.report import (
    Cell,
    Check,
    Column,
    EditRow,
    Example,
    GridCell,
    HeatMap,
    Measure,
    Picture,
    Report,
    Row,
    Study,
    Token,
)

ORGANISMS = ("latent-content", "latent-ignored")
TITLE = "Do the latent tokens do anything?"
Tick = Callable[[str], None]


def run_demo(out: Path, *, n: int = 64, seed: int = 0, tick: Tick = lambda what: None) -> Path:
    """Study the shipped organisms on `n` pairs each and write `report.html` into a folder.

    Args:
        tick: called with the name of each step when it begins, `steps()` times in all.
    """
    started = time.perf_counter()
    studies = []
    for name in ORGANISMS:
        lens = load(name)
        assert isinstance(lens, Organism)
        studies.append(study(lens, n=n, seed=seed, tick=tick))
    report = Report(
        title=TITLE,
        subtitle=(
            "Two tiny models, trained so that the mechanism is known. Both feed hidden states back "
            "as latent tokens before they answer; only one of them uses what those tokens hold."
        ),
        studies=tuple(studies),
        provenance=_provenance(n, seed, time.perf_counter() - started),
    )
    return write(report, out / "report.html")


def steps() -> int:
    """How many steps `run_demo` announces."""
    return len(ORGANISMS) * (3 + 2 * 4 + len(_edits(None)))


def study(lens: Organism, *, n: int, seed: int, tick: Tick) -> Study:
    """Study one organism: its run, its denoising map, its do(Z) table and the checks."""
    task = lens.task(n, seed)
    tick(f"{lens.name}: base and source runs")
    base = lens.run(task.base, keep_logits=True)
    source = lens.run(task.source, keep_logits=True)
    tick(f"{lens.name}: reference runs")
    reference = lens.run(lens.task(n, seed + 1).base)
    heatmap, total = _denoise(lens, task, base, source, tick)
    edits = _necessity(lens, task, base, reference, tick)
    tick(f"{lens.name}: checks")
    return Study(
        name=lens.name,
        headline=_headline(heatmap, edits, total),
        base=_example(lens, task, base, 0),
        source=Example(task.source[0]["text"], str(source.answers[0]), _picture(lens, task, 0)),
        tokens=tuple(
            Token(token.text.strip() or token.text, token.kind.name.lower())  # type: ignore[arg-type]
            for token in base.tokens[0]
        ),
        latents=base.latents[0].numpy(),
        heatmap=heatmap,
        edits=tuple(edits),
        checks=tuple(_checks(lens, base, source, edits)),
    )


# ---- the map -----------------------------------------------------------------------------------


def _denoise(
    lens: Organism, task: Pairs, base: Run, source: Run, tick: Tick
) -> tuple[HeatMap, float]:
    """The base runs and receives the source's state, one site and latent step at a time."""
    layers = range(len(lens.structure.blocks))
    sites = ["hook_latent", *(f"blocks.{i}.hook_resid_post" for i in layers)]
    donor = lens.rerun(source, names_filter=sites[1:])
    n_steps = base.latents.shape[1]
    cells = []
    for site in sites:
        row = []
        for step in range(n_steps):
            tick(f"{lens.name}: {site} at step {step}")
            result = lens.patch(
                base=base,
                source=donor,
                site=site,
                at=latent[step],
                metric=logit_diff,
                base_answers=task.base_answers,
                source_answers=task.source_answers,
            )
            row.append(_cell(result))
        cells.append(tuple(row))
    total = _total_effect(lens, task, base, source)
    heatmap = HeatMap(
        rows=(Row(sites[0], sites[0]), *(Row(sites[i + 1], f"layer {i}", i) for i in layers)),
        columns=tuple(Column(t, f"z{t}", "<|latent_pad|>") for t in range(n_steps)),
        cells=tuple(cells),
        unit="logits",
        caption=(
            f"Denoising: {len(task)} base runs receive one state of their source run and go on "
            f"freely. Effect on logit(source answer) - logit(base answer); changing the whole "
            f"input moves it by {total:.1f}."
        ),
    )
    return heatmap, total


def _cell(result: PatchResult) -> Cell:
    effects = result.effect.double().numpy()
    known = effects[~np.isnan(effects)]
    mean, half = float(known.mean()), 0.0
    if len(known) > 1 and known.std() > 0:
        half = float(stats.t.ppf(0.975, len(known) - 1) * known.std(ddof=1) / len(known) ** 0.5)
    return Cell(
        effect=mean,
        n=len(known),
        interval=(mean - half, mean + half),
        before=result.answers_before[0],
        after=result.answers_after[0],
    )


def _total_effect(lens: Organism, task: Pairs, base: Run, source: Run) -> float:
    targets = targets_of(base, task.base_answers, task.source_answers, lens.encode)
    at_base = logit_diff(lens.read_answer(base, targets))
    at_source = logit_diff(lens.read_answer(source, targets))
    return float((at_source - at_base).double().nanmean())


# ---- the do(Z) table ---------------------------------------------------------------------------


def _edits(reference: Run | None) -> list[tuple[str, Edit]]:
    return [
        ("Mean of other runs", Mean(reference)),
        ("Noise of the same spread", Noise(reference)),
        ("Noise added (1 sd)", AddNoise(1.0, reference)),
        ("Zero", Zero()),
        ("Steps shuffled", Shuffle()),
        ("Another example's", Resample(reference)),
        ("Sham (own states)", Sham()),
    ]


def _necessity(lens: Organism, task: Pairs, base: Run, reference: Run, tick: Tick) -> list[EditRow]:
    unedited = _share(same(a, r) for a, r in _with_right(base.answers, task))
    rows = [EditRow("unedited", unedited)]
    for name, edit in _edits(reference):
        tick(f"{lens.name}: {name.lower()}")
        result = lens.ablate(base, edit, at=latent, metric=accuracy, answers=task.base_answers)
        right = _share(same(a, r) for a, r in _with_right(result.answers_after, task))
        flips = [
            not same(b, a) for b, a in zip(result.answers_before, result.answers_after, strict=True)
        ]
        rows.append(
            EditRow(
                name,
                right,
                Measure(right.value - unedited.value, right.n),
                float(np.mean(flips)),
                result.landing.relative_change,
                len(result.landing.cells),
                sum(base.trigger.emitted),
            )
        )
    return rows


def _with_right(answers: Sequence[str | None], task: Pairs) -> list[tuple[str, str]]:
    """The answers that were found, with the right ones; the others are missing, not wrong."""
    both = zip(answers, task.base_answers, strict=True)
    return [(found, right) for found, right in both if found is not None]


def _share(flags: Iterable[bool]) -> Measure:
    """A share with Wilson's 95% interval."""
    found = [bool(flag) for flag in flags]
    interval = stats.binomtest(sum(found), len(found)).proportion_ci(method="wilson")
    return Measure(float(np.mean(found)), len(found), (float(interval.low), float(interval.high)))


# ---- checks and words --------------------------------------------------------------------------


def _checks(lens: Organism, base: Run, source: Run, edits: list[EditRow]) -> list[Check]:
    at = "blocks.*.hook_resid_post"
    found = check_integrity(lens, base, source, site=at, at=latent)
    landed = sum(row.fired or 0 for row in edits[1:])
    expected = sum(row.expected or 0 for row in edits[1:])
    return [
        Check(
            "Sham", f"{found.sham:.1g}" if found.sham else "0.0", found.sham == 0.0,
            "Largest change of any logit when every layer gets its own latent states back.",
        ),
        Check(
            "Full swap", f"{found.full_swap:.1g}", found.full_swap < 1e-4,
            "Distance from the source's logits when the base gets all that enters its text model.",
        ),
        Check(
            "Misplaced donor", f"{found.misplaced:.2g}", found.misplaced > 1e-2,
            "The same with the rows in the wrong order: must be far away.",
        ),
        Check(
            "Path gap", f"{found.path_gap:.1g}", found.path_gap < 1e-3,
            "Between writing token by token and reading in one forward, in logits (float32).",
        ),
        Check(
            "Landings", f"{landed} of {expected}", landed == expected,
            "Latent states that the edits of the table were to change, and did reach.",
        ),
        Check(
            "Trigger", f"{base.trigger.rate:.0%}", base.trigger.rate == 1.0, str(base.trigger),
        ),
    ]  # fmt: skip


def _headline(heatmap: HeatMap, edits: list[EditRow], total: float) -> str:
    strongest = max(abs(cell.effect or 0.0) for row in heatmap.cells for cell in row)
    drop = max(0.0, *(-row.change.value for row in edits if row.change))
    if strongest > 0.5 * abs(total) and drop > 0.5:
        return (
            f"The answer goes through the latents: one swapped state moves it by {strongest:.1f} "
            f"of {total:.1f} logits, and without them accuracy falls by {100 * drop:.0f} points."
        )
    if drop < 0.05 and strongest < 0.1 * abs(total):
        return (
            f"The latents are there and do nothing: no swapped state moves the answer by more than "
            f"{strongest:.2g} of {total:.1f} logits, and destroying them costs at most "
            f"{100 * drop:.0f} points of accuracy."
        )
    return (
        f"The latents matter somewhat: at most {strongest:.1f} of {total:.1f} logits by a swap, "
        f"{100 * drop:.0f} points of accuracy when they are destroyed."
    )


def _example(lens: Organism, task: Pairs, run: Run, i: int) -> Example:
    cells = tuple(
        GridCell(token.row, token.col, token.box)
        for column in image.resolve(run.tokens, i)
        if (token := run.tokens.token(i, int(column))).box is not None
    )
    picture = Picture(task.base[i]["images"], cells, alt="the base picture with its token grid")
    return Example(task.base[i]["text"], str(run.answers[i]), picture)


def _picture(lens: Organism, task: Pairs, i: int) -> Picture:
    return Picture(task.source[i]["images"], (), alt="the source picture")


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
