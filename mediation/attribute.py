"""Attribution: what patching every cell of a map would do, from gradients of a few forwards."""

import time
from collections.abc import Sequence
from typing import Any, Literal, get_args

import numpy as np
from tqdm import tqdm

from imaginelens.hooks import EditTouchedNothing, Force, LatentModel, Pairs
from imaginelens.hooks.errors import InputError
from imaginelens.hooks.metrics import Metric, kl, logit_diff, targets_of
from imaginelens.hooks.names import NamesFilter
from imaginelens.hooks.patching import Context, check_arguments
from imaginelens.hooks.positions import Positions, latent
from imaginelens.mediation.attribution import Attribution, Direction, Method
from imaginelens.mediation.exact_cells import Batch
from imaginelens.mediation.first_order import Approximated, dropped, linear
from imaginelens.mediation.gradients import Reading
from imaginelens.mediation.integrated import Way, integrated
from imaginelens.mediation.patched import IDENTICAL_DONOR, NOT_EMITTED, Patched, Selected, patched
from imaginelens.mediation.provenance import Provenance
from imaginelens.mediation.query_keys import with_patterns
from imaginelens.mediation.relevance import relevance_rules
from imaginelens.mediation.rules import Rule, points
from imaginelens.mediation.selecting import cells_of

Path = Literal["joint", "cell"]


def attribute(
    lens: LatentModel,
    pairs: Pairs,
    *,
    sites: NamesFilter = "resid_post",
    positions: Positions | Sequence[Any] = latent,
    metric: Metric = logit_diff,
    direction: Direction = "denoise",
    method: Method = "atp",
    context: Context = "fixed",
    steps: int = 16,
    rule: Rule = "gauss-legendre",
    tolerance: float | None = None,
    path: Path = "joint",
    heads: bool = False,
    latents: Force | None = None,
    batch_size: int = 8,
) -> Attribution:
    """Approximate the effect of patching every cell of a map, from gradients: fast, and checked.

    What is approximated is what `il.sweep` measures: the metric with the states of the other input
    at a cell, minus the metric without. The gradient is taken at the unedited run that receives
    states. In free context it goes through the latents that are fed back, with the text held.

    Args:
        sites, positions, heads: the cells, as in `il.sweep`.
        direction: "denoise" runs the base with states of the source, "noise" the source with states
            of the base. The metric's contrast is the same in both.
        method: "atp", gradient times change; "ig", its mean over the way from one state to the
            other; "qk", atp with the softmax of attention computed anew at sites `q`, `k`, `rot_q`
            and `rot_k`; "grad_drop", the mean size of atp with one layer skipped; "relp", atp with
            the coefficients of relevance propagation.
        steps, rule: of "ig", how many points of the way are looked at, and which.
        tolerance: of "ig", how large the completeness gap may be, in the metric's unit: the way is
            halved, each half with as many points, where it is larger. None looks once.
        path: of "ig", "joint" moves all cells of a site at once, and shares their joint effect
            among them; "cell" moves one after the other, each its own effect, at a cost that
            exceeds patching it exactly.
        latents: `il.Force(k)`, as in `lens.run`.
        batch_size: pairs that are read at once; where they are fewer, "ig" in fixed context reads
            them several times in one forward, each time at another point of the way.

    Raises:
        EditTouchedNothing: no cell would change anything.
        InputError: an argument is not what it should be, the metric has no gradient, or the method
            does not fit the model or the cells.

    >>> import imaginelens as il
    >>> lens = il.load("latent-content")
    >>> found = attribute(lens, lens.task(n=2), sites="hook_latent", method="ig", tolerance=1e-3)
    >>> bool(found.completeness_gap.max() < 1e-3), [cell.position for cell in found]
    (True, ['latent[0]', 'latent[1]'])
    """
    _check(pairs, metric, direction, method, context, path, rule, batch_size, tolerance)
    way = Way(points(rule, steps), tolerance, batch_size)
    started = time.perf_counter()
    batches = _batches(lens, pairs, metric, direction, context, latents, batch_size)
    cells = cells_of(
        lens,
        [run for batch in batches for run in (batch.run, batch.partner)],
        sites=sites,
        positions=positions,
        heads=heads,
    )
    found: list[Approximated] = []
    forwards = 0
    for batch in tqdm(batches, desc="attribution", unit="batch", delay=3, leave=False):
        targets = batch.targets
        reading = Reading(lens, batch.run, targets, metric, context, batch.before)
        tokens = reading.script.tokens
        of_batch, more = patched(lens, batch.run, tokens, batch.partner, cells, context)
        _check_cells(reading, of_batch, method)
        found.append(_approximated(reading, of_batch, method, way, path))
        forwards += reading.forwards + more + 2 + batch.run.forwards + batch.partner.forwards
    flags = np.concatenate([one.flags for one in found], axis=1)
    if (flags > 0).all():
        raise EditTouchedNothing(
            f"patching changes nothing in {len(cells)} cells and {len(pairs)} examples: "
            f"{int((flags == NOT_EMITTED).sum())} times not_emitted and "
            f"{int((flags == IDENTICAL_DONOR).sum())} times identical_donor; look at the trigger "
            "of lens.run(pairs.base) and at what the donors hold there"
        )
    before = np.concatenate([batch.values for batch in batches])
    missing = np.isnan(before)
    if missing.all():
        raise InputError(
            f"no answer was found in what the {len(missing)} unedited runs wrote (the first: "
            f"{batches[0].run.texts[0][:60]!r}); pass answer=il.answers.boxed, .letter, "
            ".after('...') or a callable to il.load"
        )
    gaps = [one.gap for one in found if one.gap is not None]
    sides = [
        pair for b in batches for pair in zip(b.run.tokens.keys, b.partner.tokens.keys, strict=True)
    ]
    keys = tuple(f"{i}:{own}/{other}" for i, (own, other) in enumerate(sides))
    return Attribution(
        cells=tuple(cell for cell, _ in cells),
        positions=tuple(at for _, at in cells),
        values=np.where(missing, np.nan, np.concatenate([one.values for one in found], axis=1)),
        flags=flags,
        before=before,
        other=np.concatenate([batch.other_values for batch in batches]),
        gap=np.where(missing, np.nan, np.concatenate(gaps, axis=1)) if gaps else None,
        method=method,
        metric=metric,
        direction=direction,
        context=context,
        notes=_notes(method, context, path, way),
        provenance=Provenance.of(
            lens,
            keys=keys,
            seed=0,
            formula=f"{method} approximation of {metric.name}(patched) - {metric.name}(unpatched), "
            f"{direction}, {context} context",
            forwards=forwards,
            seconds=time.perf_counter() - started,
        ),
        groups=None if pairs.groups is None else tuple(pairs.groups),
        keys=keys,
        batches=tuple(batches),
    )


def _batches(
    lens: LatentModel,
    pairs: Pairs,
    metric: Metric,
    direction: Direction,
    context: Context,
    latents: Force | None,
    size: int,
) -> list[Batch]:
    """Run both inputs of all pairs as they are."""
    found = []
    for start in tqdm(range(0, len(pairs), size), desc="runs", unit="batch", delay=3, leave=False):
        some = pairs[start : start + size]
        base, source = (lens.run(list(x), latents=latents) for x in (some.base, some.source))
        run, partner = (base, source) if direction == "denoise" else (source, base)
        answers = some.source_answers if metric.needs_source else [None] * len(some)
        targets = targets_of(base, some.base_answers, answers, lens.encode)
        metric.check(targets)
        found.append(Batch.of(lens, run, partner, targets, metric, context))
    return found


def _approximated(
    reading: Reading, cells: Patched, method: Method, way: Way, path: Path
) -> Approximated:
    if method == "ig":
        sets = _sets(cells.cells) if path == "joint" else [[i] for i in range(len(cells.cells))]
        return integrated(reading, cells, way, sets)
    if method == "grad_drop":
        return dropped(reading, cells)
    if method == "qk":
        return with_patterns(reading, cells)
    return linear(reading, cells, relevance_rules(reading, cells) if method == "relp" else None)


def _sets(cells: Selected) -> list[list[int]]:
    """The cells of each site, by number."""
    found: dict[str, list[int]] = {}
    for i, (cell, _) in enumerate(cells):
        found.setdefault(cell.sites[0], []).append(i)
    return list(found.values())


def _notes(method: Method, context: Context, path: Path, way: Way) -> tuple[str, ...]:
    notes = []
    if context == "free":
        notes.append("later latents follow from the states that change; the text is held")
    if method == "ig" and path == "joint":
        notes.append(
            f"shares of the joint effect of all cells of a site, {len(way.points[0])} points"
        )
    if method == "grad_drop":
        notes.append("sizes, without sign")
    return tuple(notes)


def _check(
    pairs: Any,
    metric: Any,
    direction: Any,
    method: Any,
    context: Any,
    path: Any,
    rule: Any,
    batch_size: Any,
    tolerance: Any,
) -> None:
    check_arguments(metric=metric)
    if not isinstance(pairs, Pairs):
        raise InputError(
            f"pairs is a {type(pairs).__name__}, expected il.Pairs; make them with "
            "il.Pairs.from_examples(examples), or lens.task() on an organism"
        )
    for name, value, known in (
        ("direction", direction, get_args(Direction)),
        ("method", method, get_args(Method)),
        ("context", context, get_args(Context)),
        ("path", path, get_args(Path)),
        ("rule", rule, get_args(Rule)),
    ):
        if value not in known:
            raise InputError(f"{name} is {value!r}; choose {' or '.join(map(repr, known))}")
    if type(batch_size) is not int or batch_size < 1:
        raise InputError(f"batch_size is {batch_size!r}, expected a number of pairs, 1 or more")
    if tolerance is not None and not (np.isfinite(tolerance) and tolerance > 0):
        raise InputError(
            f"tolerance is {tolerance!r}, expected how large the completeness gap may be, such as "
            "1e-3, or None"
        )
    if metric.binary:
        raise InputError(
            f"{metric!r} is 0 or 1, which has no gradient; use il.logit_diff, il.log_prob or "
            "il.prob, or patch exactly with il.sweep"
        )
    if metric.name == kl.name and method != "ig":
        raise InputError(
            f"{metric!r} is smallest at the unedited run, where its gradient is 0 in every cell; "
            "use il.logit_diff, or method='ig'"
        )
    if metric.needs_source and None in pairs.source_answers:
        row = pairs.source_answers.index(None)
        raise InputError(
            f"{metric!r} compares with the source's answer, and that of pair {row} is unknown; use "
            "il.log_prob or il.prob, or give answers"
        )


def _check_cells(reading: Reading, cells: Patched, method: Method) -> None:
    """Refuse cells whose states change each other through the loop, which one gradient counts
    twice."""
    if reading.feedback is None or method == "ig":
        return
    fed = reading.latents.of_rows
    for (cell, at), take in zip(cells.cells, cells.takes, strict=True):
        spots = cells.spots[cell.sites[0]].places
        for row in set(take.rows):
            mine = [spots[s][1] for r, s in zip(take.rows, take.spots, strict=True) if r == row]
            if any(min(mine) < column <= max(mine) for column in fed[row]):
                raise InputError(
                    f"{at!r} holds states of several steps, which change each other through the "
                    "loop; give single steps, as positions=il.latent does, or use method='ig' or "
                    "context='fixed'"
                )
