"""fit_probe: cross-fit a probe on states, with the controls that its accuracy must beat."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from imaginelens.estimates.inputs import check_groups
from imaginelens.hooks.errors import InputError
from imaginelens.probes.estimators import Probe, encoded, probe, restored
from imaginelens.probes.frames import States as Rows
from imaginelens.probes.label_controls import control_labels, random_features, shuffles
from imaginelens.probes.readouts import Scores
from imaginelens.probes.result import CONTROL_TASK, RANDOM_FEATURES, SHUFFLED, ProbeResult
from imaginelens.probes.selecting import Selection, regrouped, select
from imaginelens.probes.splitting import folds
from imaginelens.probes.states import States
from imaginelens.probes.streamed_rows import Streamed
from imaginelens.probes.streaming import Streaming, streams
from imaginelens.probes.streaming import cross_fit as streaming

FEW = 20  # permutations of rows that are streamed


def fit_probe(
    states: Any,
    y: Any = None,
    *,
    kind: str | Probe = "logistic",
    step: int | None = None,
    site: str | int | None = None,
    pool: str | None = None,
    groups: Sequence[Any] | np.ndarray | None = None,
    types: Sequence[Any] | np.ndarray | None = None,
    n_folds: int = 5,
    seed: int = 0,
    controls: Sequence[str] | None = None,
    permutations: int | None = None,
    strengths: tuple[float, ...] | None = None,
    stream: bool | None = None,
) -> ProbeResult:
    """Ask whether labels can be read from states, and from what else they can be read as well.

    Every row is predicted by a probe that has seen no row of its group. Penalties are chosen by
    inner folds within the training rows; standardisation is learned there, too.

    With several steps and no `step`, the steps of an example stand side by side as one row; the
    attentive kind takes them as a set; labels that are one per (example, step) make each step a row
    of its own, and an example's rows one group.

    Args:
        states: `States`, as `collect` makes them, or an array (example, d_model), (example, step,
            d_model) or (example, step, layer, d_model), with y.
        y: one label per example, or per (example, step); those of the states if left out.
        kind: "logistic", "ridge", "mass_mean", "lda", "sparse", "mlp" or "attentive"; or a probe
            with settings of your own, e.g. `il.probes.probe("sparse", k=4)`.
        step: which step; negative ones count from the end.
        site: which layer, by hook name or number, if there are several.
        pool: "mean" over the steps that an example has.
        groups: examples of one group are never on both sides of a split; those of the states if
            left out.
        types: what the control task gives random labels to, one per example; the groups, or else
            the examples, if left out.
        controls: which to fit: "shuffled labels", "control task", "random features" and the names
            of `states.controls`; all if left out, none for ().
        permutations: of the labels; each kind has its own default, 20 or more.
        strengths: the penalties to choose among.
        stream: "ridge" and "logistic" can read the rows block by block, as often as needed, with
            the same results (20 permutations, if left out). None: where states lie on the disk and
            would take more than 128 MiB in float64.

    Raises:
        InputError: unknown kinds, sites, steps or controls; labels that are missing, of the wrong
            length or of one class; states that are nan or lack steps; groups that leak.
        EstimateError: fewer than 10 groups.

    >>> x = np.random.default_rng(0).normal(size=(60, 4))
    >>> fit_probe(x, (x[:, 0] > 0).astype(int), kind="ridge").verdict()
    'decodable'
    """
    given = _states(states, y, groups)
    settings: dict[str, Any] = {} if strengths is None else {"strengths": strengths}
    chosen = probe(kind, **settings)
    if not isinstance(kind, Probe) and "seed" in chosen.get_params():
        chosen.set_params(seed=seed)
    possible = stream if stream is not None or streams(chosen) else False
    rows = select(given, step=step, site=site, pool=pool, takes_sets=chosen.sets, stream=possible)
    wanted = _wanted(controls, given)
    chosen.check_labels(rows.y)
    if rows.groups is not None:
        check_groups(rows.groups)
    split = folds(rows.y, groups=rows.groups, n_folds=n_folds, seed=seed)
    classes, target = encoded(rows.y)
    notes = (*given.notes, *rows.notes, *_check_training(target, classes, split))
    kinds_of = _types(types, given, rows)

    labellings, count = [target], 0
    if CONTROL_TASK in wanted:
        labellings.append(control_labels(target, kinds_of, seed=seed))
        if len(np.unique(kinds_of)) < 2:
            raise InputError("types= has a single type, to which no random labels can be given")
        notes += _on_types(kinds_of, split)
    if SHUFFLED in wanted:
        own = FEW if isinstance(rows.x, Streamed) else chosen.permutations
        count = own if permutations is None else permutations
        if count < 20:
            raise InputError(
                f"{count} permutations cannot give a p-value below 0.05; use 20 or more, or leave "
                f"{SHUFFLED!r} out of controls="
            )
        orders, amount = shuffles(target, split, rows.groups, n=count, seed=seed)
        labellings += [target[order] for order in orders]
        if amount < np.log(20):
            notes += (f"the labels can be shuffled in {round(np.exp(amount))} ways only",)

    n_classes = None if classes is None else len(classes)
    kept = len(labellings) - count
    made = _crossed(chosen, rows.x, labellings, n_classes, split, rows.groups, kept=kept)
    against = baseline(target, n_classes, split)
    beside: dict[str, Float[np.ndarray, " row"]] = {}
    if CONTROL_TASK in wanted:
        labels = labellings[1]
        own_chance = baseline(labels, n_classes, split)
        beside[CONTROL_TASK] = outcome(made.scores[1], labels, own_chance, n_classes)
    if RANDOM_FEATURES in wanted:
        if isinstance(rows.x, Streamed):
            drawn: Any = rows.x.random(seed=seed)
        else:
            drawn = random_features(rows.x, seed=seed)
        (found,) = cross_fit(chosen, drawn, [target], n_classes, split, rows.groups)
        beside[RANDOM_FEATURES] = outcome(found, target, against, n_classes)
    for name in wanted:
        if name in given.controls:
            beside[name] = _of_control(
                chosen, given.controls[name], rows, target, n_classes, split, against
            )

    first = made.scores[0]
    return ProbeResult(
        kind=chosen.kind,
        label=given.label,
        where=rows.where,
        y=rows.y,
        rows=rows.rows,
        steps=rows.steps,
        groups=rows.groups,
        folds=split,
        predictions=first[:, 0] if classes is None else classes[first.argmax(1)],
        probabilities=None if classes is None else chosen.probabilities(first),
        baseline=against,
        beside=beside,
        shuffled=made.rates,
        probe=_fitted(chosen, rows, classes, made),
        n_steps=given.shape[1] if rows.way == "beside" else 1,
        notes=notes,
    )


@dataclass(frozen=True, eq=False)
class _Crossed:
    """Scores out of fold of the first labellings, and the rates of all others.

    Attributes:
        whole: what a probe learned of all rows in the same readings, if they were streamed.
    """

    scores: list[Scores]
    rates: Float[np.ndarray, " shuffle"]
    whole: Streaming | None = None


def _crossed(
    kind: Probe,
    x: Rows | Streamed,
    labellings: Sequence[np.ndarray],
    n_classes: int | None,
    split: Int[np.ndarray, " row"],
    groups: Int[np.ndarray, " row"] | None,
    *,
    kept: int,
) -> _Crossed:
    """Cross-fit all labellings, of which scores are kept for the first ones."""

    def chance(labels: np.ndarray) -> np.ndarray:
        return baseline(labels, n_classes, split)

    if not isinstance(x, Streamed):
        scores = cross_fit(kind, x, labellings, n_classes, split, groups)
        others = zip(scores[kept:], labellings[kept:], strict=True)
        rates = [
            rate(outcome(each, y, chance(y), n_classes), chance(y), n_classes) for each, y in others
        ]
        return _Crossed(scores[:kept], np.array(rates))
    made = streaming(kind, x, labellings, n_classes, split, groups, kept=kept, whole=True)
    rates = made.reached.tolist()
    if n_classes is None:
        sums = [max(chance(y).sum(), 1e-300) for y in labellings[kept:]]
        rates = [1 - error / total for error, total in zip(rates, sums, strict=True)]
    return _Crossed(made.scores, np.array(rates), made)


def _fitted(kind: Probe, rows: Selection, classes: Any, made: _Crossed) -> Probe:
    """A probe that was fitted to all rows."""
    if made.whole is None:
        return probe(kind).fit(rows.x, rows.y, rows.groups)
    assert made.whole.readout is not None
    found = restored(kind.kind, kind.get_params(), classes, made.whole.readout.arrays)
    found.strength_ = made.whole.strength
    return found


def cross_fit(
    kind: Probe,
    x: Rows | Streamed,
    labellings: Sequence[np.ndarray],
    n_classes: int | None,
    split: Int[np.ndarray, " row"],
    groups: Int[np.ndarray, " row"] | None,
) -> list[Scores]:
    """The scores of each row, under each labelling, by probes that were fitted on other folds."""
    if isinstance(x, Streamed):
        kept = len(labellings)
        return streaming(kind, x, labellings, n_classes, split, groups, kept=kept).scores
    found = [np.zeros((len(x), n_classes or 1)) for _ in labellings]
    rows = kind._rows(x)
    for k in np.unique(split):
        train, test = split != k, split == k
        design = kind.design(rows[train], None if groups is None else groups[train])
        unseen = design.frame(rows[test])
        readouts = kind.learn(design, [labels[train] for labels in labellings], n_classes)
        for scores, readout in zip(found, readouts, strict=True):
            scores[test] = readout.scores(unseen)
    return found


def baseline(
    target: np.ndarray, n_classes: int | None, split: Int[np.ndarray, " row"]
) -> Float[np.ndarray, " row"]:
    """What each row would give without its states: the share of the commonest class among the
    training rows of its fold, or the squared distance of a quantity from their mean."""
    found = np.empty(len(target))
    for k in np.unique(split):
        train, test = target[split != k], split == k
        if n_classes is None:
            found[test] = (target[test] - train.mean()) ** 2
        else:
            found[test] = np.bincount(train).max() / len(train)
    return found


def outcome(
    scores: Scores, target: np.ndarray, against: Float[np.ndarray, " row"], n_classes: int | None
) -> Float[np.ndarray, " row"]:
    """1.0 where a row was read right; of quantities, by how much the squared error is smaller than
    that of the training mean."""
    if n_classes is None:
        return against - (scores[:, 0] - target) ** 2
    return (scores.argmax(1) == target).astype(np.float64)


def rate(
    reached: Float[np.ndarray, " row"], against: Float[np.ndarray, " row"], n_classes: int | None
) -> float:
    """The accuracy, or R^2 of quantities."""
    return float(reached.mean() if n_classes else reached.sum() / max(against.sum(), 1e-300))


def _states(states: Any, y: Any, groups: Any) -> States:
    """What the user gave, as `States`."""
    if isinstance(states, States):
        given = states if y is None else states.relabelled(y)
    elif y is None:
        raise InputError("states that are an array need y=, one label per example")
    else:
        given = States.of(states, y)
    return given if groups is None else regrouped(given, groups)


def _wanted(controls: Sequence[str] | None, states: States) -> tuple[str, ...]:
    there = (SHUFFLED, CONTROL_TASK, RANDOM_FEATURES, *states.controls)
    if controls is None:
        return there
    for name in [controls] if isinstance(controls, str) else controls:
        if name not in there:
            raise InputError(f"there is no control {name!r} here; there are {', '.join(there)}")
    return (controls,) if isinstance(controls, str) else tuple(controls)


def _check_training(target: np.ndarray, classes: Any, split: np.ndarray) -> tuple[str, ...]:
    """Refuse folds that leave one class to learn from; say which classes a fold cannot learn."""
    if classes is None:
        return ()
    unlearned = set()
    for k in np.unique(split):
        known = np.unique(target[split != k])
        if len(known) < 2:
            raise InputError(
                f"without fold {k} all labels are {classes[known[0]]}, so that nothing is left to "
                "tell apart; collect more examples, or lower n_folds="
            )
        unlearned |= set(np.unique(target[split == k])) - set(known)
    if not unlearned:
        return ()
    named = ", ".join(str(classes[k]) for k in sorted(unlearned))
    return (f"class {named} is in a single fold, where no probe could have learned it",)


def _types(types: Any, states: States, rows: Selection) -> Int[np.ndarray, " row"]:
    """The number of each row's type."""
    if types is None:
        return np.arange(len(rows.y)) if rows.groups is None else rows.groups
    plain = types.tolist() if hasattr(types, "tolist") else list(types)
    if len(plain) != len(states):
        raise InputError(f"{len(plain)} types came with {len(states)} examples; give one each")
    number: dict[Any, int] = {}
    return np.array([number.setdefault(plain[row], len(number)) for row in rows.rows])


def _on_types(types: np.ndarray, split: np.ndarray) -> tuple[str, ...]:
    """What the control task cannot tell, if no type is both learned and tested."""
    pairs = np.unique(np.stack([types, split]), axis=1)
    if len(np.unique(pairs[0])) < pairs.shape[1]:
        return ()
    return (
        "no type is in two folds, so the control task cannot be learned from memory, and "
        "selectivity is accuracy above chance; pass types= (words, colours) that recur",
    )


def _of_control(
    kind: Probe,
    control: States,
    rows: Selection,
    target: np.ndarray,
    n_classes: int | None,
    split: np.ndarray,
    against: np.ndarray,
) -> Float[np.ndarray, " row"]:
    """How each row is read from a control; nan where the control lacks it."""
    x, has = rows.of_control(control)
    reached = np.full(len(target), np.nan)
    groups = None if rows.groups is None else rows.groups[has]
    (found,) = cross_fit(kind, x[has], [target[has]], n_classes, split[has], groups)
    reached[has] = outcome(found, target[has], against[has], n_classes)
    return reached
