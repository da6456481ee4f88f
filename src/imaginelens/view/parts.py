"""What the demo measures on one organism: its map, do(Z) table, swap, likeness and checks."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from scipy import stats

from imaginelens.hooks import (
    AddNoise,
    Edit,
    LatentModel,
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
from imaginelens.mediation.interchange import UNDETERMINED, Interchange
from imaginelens.organisms.hunt import Hunt
from imaginelens.view.report import (
    Cell,
    Check,
    Column,
    EditRow,
    HeatMap,
    Measure,
    Mechanism,
    Prediction,
    Row,
)
from imaginelens.view.verdict import MEANINGS

LAYERS = "blocks.*.hook_resid_post"
CARDS = "vision_projector.hook_out"


# ---- the map -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Denoising:
    """The map, and its strongest cell as a share of what changing the whole input does."""

    heatmap: HeatMap
    share: Measure
    place: str


def map_sites(lens: LatentModel) -> list[str]:
    """The rows of the map: the fed-back embedding, and the output of every layer."""
    return ["hook_latent", *lens.registry.match(LAYERS)]


def patched(
    lens: LatentModel, task: Pairs, base: Run, source: Run, *, site: str, step: int
) -> PatchResult:
    """The base runs and receives the source's state at one site and latent step."""
    return lens.patch(
        base=base,
        source=source,
        site=site,
        at=latent[step],
        metric=logit_diff,
        base_answers=task.base_answers,
        source_answers=task.source_answers,
    )


def denoising(
    lens: LatentModel,
    task: Pairs,
    base: Run,
    source: Run,
    results: Sequence[Sequence[PatchResult]],
    *,
    shown: int,
) -> Denoising:
    """Put the map together from its results, by site and step; `shown` is the pair on display."""
    total = _total_effect(lens, task, base, source)
    whole = float(total.double().nanmean())
    rows = [Row("hook_latent", "hook_latent")]
    rows += [Row(site, f"layer {i}", i) for i, site in enumerate(map_sites(lens)[1:])]
    columns = [Column(t, f"z{t}", "<|latent_pad|>") for t in range(len(results[0]))]
    heatmap = HeatMap(
        rows=tuple(rows),
        columns=tuple(columns),
        cells=tuple(tuple(_cell(result, shown) for result in row) for row in results),
        unit="logits",
        caption=(
            f"Denoising: {len(task)} base runs receive one state of their source run and go on "
            f"freely. Effect on logit(source answer) - logit(base answer); changing the whole "
            f"input moves it by {whole:.1f}. Below each effect: the answer of the pair shown."
        ),
    )
    i, j = divmod(int(np.nanargmax(np.abs(heatmap.effects))), len(columns))
    share = share_of_total(results[i][j].effect.double().numpy(), total.double().numpy())
    return Denoising(heatmap, share, f"{rows[i].label} at {columns[j].label}")


def share_of_total(
    effects: Float[np.ndarray, " example"], totals: Float[np.ndarray, " example"]
) -> Measure:
    """Mean effect over mean total effect, with the linearised t interval of a ratio of means.

    Pairs that miss one of the two are left out. Source: Cochran (1977), Sampling Techniques, 3rd
    ed., section 6.3.

    >>> share_of_total(np.array([1.0, 2.0, 3.0]), np.array([2.0, 4.0, 6.0]))
    Measure(value=0.5, n=3, interval=(0.5, 0.5))
    """
    known = ~(np.isnan(effects) | np.isnan(totals))
    effects, totals = effects[known], totals[known]
    share = float(effects.mean() / totals.mean())
    half = _half_width(effects - share * totals) / abs(float(totals.mean()))
    return Measure(share, len(effects), (share - half, share + half))


def _cell(result: PatchResult, shown: int) -> Cell:
    effects = result.effect.double().numpy()
    known = effects[~np.isnan(effects)]
    if not len(known):
        return Cell(None)
    mean, half = float(known.mean()), _half_width(known)
    return Cell(
        effect=mean,
        n=len(known),
        interval=(mean - half, mean + half),
        before=result.answers_before[shown],
        after=result.answers_after[shown],
    )


def _half_width(values: Float[np.ndarray, " example"]) -> float:
    """Half of the 95% t interval of the mean; 0 where the values do not vary."""
    n = len(values)
    if n < 2 or values.std() == 0:
        return 0.0
    return float(stats.t.ppf(0.975, n - 1) * values.std(ddof=1) / n**0.5)


def _total_effect(
    lens: LatentModel, task: Pairs, base: Run, source: Run
) -> Float[torch.Tensor, " example"]:
    targets = targets_of(base, task.base_answers, task.source_answers, lens.encode)
    at_base = logit_diff(lens.read_answer(base, targets))
    return logit_diff(lens.read_answer(source, targets)) - at_base


# ---- the swap ----------------------------------------------------------------------------------


def shown_pair(found: Interchange) -> int:
    """The pair to display: the first decisive one that answered, or the first of all."""
    return next((i for i in found.decisive if found.answers[i] is not None), 0)


def mechanism(found: Interchange, *, shown: int) -> Mechanism | None:
    """The shares of an interchange for the page; None if no decisive pair has an answer."""
    if len(found.decisive) == found.missing:
        return None
    winner = found.winner(at_least=Mechanism.bar)
    predictions = [
        Prediction(
            name,
            MEANINGS[name],
            Measure(share.value, share.n, (share.low, share.high)),
            found.predictions[name][shown] if name in found.predictions else None,
        )
        for name, share in found.shares().items()
    ]
    return Mechanism(
        predictions=tuple(predictions),
        winner=None if winner == UNDETERMINED else winner,
        n_pairs=len(found.answers),
        missing=found.missing,
        answered=found.answers[shown],
    )


# ---- what the latents look like ----------------------------------------------------------------


def likeness(task: Pairs, base: Run) -> Measure:
    """The share of runs in which every latent is most like the card to visit at its step.

    Like is cosine similarity with the image tokens of the run's own nine cards, which the base run
    has captured. This decodes: it does not say whether anybody reads the latents.
    """
    cards = base.states(CARDS, image).values
    near = torch.cosine_similarity(base.latents[:, :, None], cards[:, None], dim=-1).argmax(-1)
    rows = zip(task.base, near.tolist(), strict=True)
    return _share(_visited(example["hunt"], len(row)) == row for example, row in rows)


def _visited(hunt: Hunt, steps: int) -> list[int]:
    """Which card, in reading order, each latent step stands for: the last one once arrived."""
    return [hunt.names.index(hunt.path[min(step + 1, hunt.hops)]) for step in range(steps)]


# ---- the do(Z) table ---------------------------------------------------------------------------


def latent_edits(reference: Run | None) -> dict[str, Edit]:
    """The edits of the table, by the name they have there."""
    return {
        "Mean of other runs": Mean(reference),
        "Noise of the same spread": Noise(reference),
        "Noise added (1 sd)": AddNoise(1.0, reference),
        "Zero": Zero(),
        "Steps shuffled": Shuffle(),
        "Another example's": Resample(reference),
        "Sham (own states)": Sham(),
    }


def unedited_row(task: Pairs, base: Run) -> EditRow:
    """The line that the others are compared with."""
    return EditRow("unedited", _right(base.answers, task))


def edited_row(
    lens: LatentModel, task: Pairs, base: Run, unedited: EditRow, *, name: str, edit: Edit
) -> EditRow:
    """One line of the do(Z) table: all latents edited."""
    result = lens.ablate(base, edit, at=latent, metric=accuracy, answers=task.base_answers)
    right = _right(result.answers_after, task)
    both = zip(result.answers_before, result.answers_after, strict=True)
    return EditRow(
        name,
        right,
        Measure(right.value - unedited.accuracy.value, right.n),
        float(np.mean([not same(before, after) for before, after in both])),
        result.landing.relative_change,
        len(result.landing.cells),
        sum(base.trigger.emitted),
    )


def worst(edits: Sequence[EditRow]) -> EditRow:
    """The edit after which the fewest answers are right."""
    return min((row for row in edits if row.change), key=lambda row: row.accuracy.value)


def _right(answers: Sequence[str | None], task: Pairs) -> Measure:
    """The share of right answers among those found: the others are missing, not wrong."""
    both = zip(answers, task.base_answers, strict=True)
    return _share(same(found, right) for found, right in both if found is not None)


def _share(flags: Iterable[bool]) -> Measure:
    """A share with Wilson's 95% interval."""
    found = list(flags)
    interval = stats.binomtest(sum(found), len(found)).proportion_ci(method="wilson")
    return Measure(float(np.mean(found)), len(found), (float(interval.low), float(interval.high)))


# ---- checks ------------------------------------------------------------------------------------


def checks(
    lens: LatentModel, base: Run, source: Run, edits: Sequence[EditRow], found: Interchange
) -> tuple[Check, ...]:
    """Whether the numbers can be trusted, from what the controls measured."""
    controls = check_integrity(lens, base, source, site=LAYERS, at=latent)
    landed = sum(row.fired or 0 for row in edits) + len(found.landing.cells)
    expected = sum(row.expected or 0 for row in edits) + sum(base.trigger.emitted)
    return (
        Check(
            "Sham", f"{controls.sham:.1g}" if controls.sham else "0.0", controls.sham == 0.0,
            "Largest change of any logit when every layer gets its own latent states back.",
        ),
        Check(
            "Full swap", f"{controls.full_swap:.1g}", controls.full_swap < 1e-4,
            "Distance from the source's logits when the base gets all that enters its text model.",
        ),
        Check(
            "Misplaced donor", f"{controls.misplaced:.2g}", controls.misplaced > 1e-2,
            "The same with the rows in the wrong order: must be far away.",
        ),
        Check(
            "Path gap", f"{controls.path_gap:.1g}", controls.path_gap < 1e-3,
            "Between writing token by token and reading in one forward, in logits (float32).",
        ),
        Check(
            "Landings", f"{landed} of {expected}", landed == expected,
            "Latent states that the swap and the edits of the table were to change, and did reach.",
        ),
        Check(
            "Trigger", f"{base.trigger.rate:.0%}", base.trigger.rate == 1.0,
            f"Runs that wrote latents at all. {base.trigger}.",
        ),
    )  # fmt: skip
