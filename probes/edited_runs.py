"""Run examples unedited and under several edits, batch by batch, and keep a metric of each."""

from collections.abc import Hashable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from jaxtyping import Float

from imaginelens.estimates import Estimate
from imaginelens.hooks.edits import Edit
from imaginelens.hooks.errors import EditTouchedNothing, InputError
from imaginelens.hooks.landing import Flag
from imaginelens.hooks.metrics import Metric, Readout, Targets, targets_of
from imaginelens.hooks.model import LatentModel
from imaginelens.hooks.pairs import Pairs
from imaginelens.hooks.patching import Context, check_arguments
from imaginelens.hooks.positions import Positions
from imaginelens.hooks.run import Run

Values = Float[np.ndarray, " example"]


@dataclass(frozen=True)
class Setting:
    """Where edits act, on what, and what is measured."""

    lens: LatentModel
    data: Pairs
    metric: Metric
    site: str
    at: Positions
    context: Context
    batch_size: int

    def __post_init__(self) -> None:
        _check(self)


@dataclass
class Measured:
    """What was measured under each edit, by its name.

    Attributes:
        before: the metric of each unedited example; nan where no answer was found.
        after: the same under each edit.
        flags: examples that an edit did not change, and why; their effect is 0.
        change: mean of ||new - old|| / ||old|| over the states an edit touched.
        cells: how many those are.
    """

    before: Values
    after: dict[Hashable, Values]
    flags: dict[Hashable, dict[int, Flag]]
    change: dict[Hashable, float] = field(default_factory=dict)
    cells: dict[Hashable, int] = field(default_factory=dict)


def measure(setting: Setting, edits: Mapping[Hashable, Edit]) -> Measured:
    """Run the base inputs unedited and under every edit.

    Raises:
        InputError: no answer was found in any unedited run.
        EditTouchedNothing: an edit changed nothing in any example.
    """
    n = len(setting.data)
    blank = {name: np.full(n, np.nan) for name in edits}
    found = Measured(np.full(n, np.nan), blank, {name: {} for name in edits})
    changes: dict[Hashable, list[float]] = {name: [] for name in edits}
    for rows, run, before in _batches(setting):
        found.before[rows] = _numbers(setting.metric, before)
        for name, edit in edits.items():
            after, flags, moved = _edited(setting, run, before, edit)
            found.after[name][rows] = _numbers(setting.metric, after)
            found.flags[name] |= {rows[i]: flag for i, flag in flags.items()}
            changes[name] += moved
    for name, edit in edits.items():
        if len(found.flags[name]) == n:
            kinds = sorted(set(found.flags[name].values()))
            raise EditTouchedNothing(
                f"{type(edit).__name__} at {setting.at!r} of {setting.site} changed none of the "
                f"{n} examples ({', '.join(kinds)}); look at lens.run(pairs.base).trigger for the "
                "positions there are"
            )
        found.change[name] = float(np.mean(changes[name]))
        found.cells[name] = len(changes[name])
    return found


def _batches(setting: Setting) -> Iterator[tuple[list[int], Run, Readout]]:
    """Rows, their unedited run, and what it answers."""
    data, lens = setting.data, setting.lens
    answered = False
    for start in range(0, len(data), setting.batch_size):
        rows = list(range(start, min(start + setting.batch_size, len(data))))
        run = lens.run([data.base[row] for row in rows])
        others = [data.source_answers[row] if setting.metric.needs_source else None for row in rows]
        targets = targets_of(run, [data.base_answers[row] for row in rows], others, lens.encode)
        answered |= run.parse_coverage > 0
        yield rows, run, lens.read_answer(run, targets, free=setting.context == "free")
    if not answered:
        raise InputError(
            f"no answer was found in what the {len(data)} unedited runs wrote; pass "
            "answer=il.answers.boxed, .letter, .after('...') or a callable to il.load"
        )


def _edited(
    setting: Setting, run: Run, before: Readout, edit: Edit
) -> tuple[Readout, dict[int, Flag], list[float]]:
    """What is answered under an edit, the rows it did not change, and how far states moved.

    That it changed nothing in a whole batch is no error here, for other batches may differ.
    """
    lens, at = setting.lens, setting.at
    try:
        with lens.edit(edit, at=at, site=setting.site) as landing:
            if setting.context == "fixed":
                lens.registry.begin()
                after = lens.read_answer(run, before.targets, unedited=before)
                lens.registry.judge(len(run), str(run.trigger), run.acted)
            else:
                new = lens.rerun(run)
    except EditTouchedNothing:
        if len(landing.flags) < len(run):  # of something else that the user has registered
            raise
        return before, dict(landing.flags), []
    moved = [change for *_, change in landing.cells]
    if setting.context == "fixed":
        return after, dict(landing.flags), moved
    modules = [site for site in landing.sites if site != "hook_latent"]
    if not modules:  # its latents are what the edit made of them
        answer = lens.read_answer(new, before.targets, unedited=before, free=True)
        return answer, dict(landing.flags), moved
    with lens.edit(edit, at=at, site=modules):
        answer = lens.read_answer(new, before.targets, unedited=before, free=True)
    return answer, dict(landing.flags), moved


def _numbers(metric: Metric, readout: Readout) -> Values:
    return np.asarray(metric(readout).double().cpu().numpy(), dtype=np.float64)


def _check(setting: Setting) -> None:
    """Refuse what cannot be run before anything is.

    Raises:
        InputError: an argument is not what it should be, or the metric needs answers that are
            missing.
        EstimateError: there are too few examples, or groups, to tell anything.
    """
    data: Any = setting.data
    if not isinstance(data, Pairs):
        raise InputError(
            f"data is a {type(data).__name__}, expected il.Pairs; make one with "
            "il.Pairs.from_examples(examples), or lens.task() on an organism"
        )
    check_arguments(at=setting.at, metric=setting.metric)
    if setting.context not in ("free", "fixed"):
        raise InputError(f"context is {setting.context!r}; choose 'free' or 'fixed'")
    if setting.batch_size < 1:
        raise InputError(f"batch_size is {setting.batch_size}; run at least 1 example at a time")
    if len(setting.lens.registry.match(setting.site)) != 1:
        raise InputError(
            f"{setting.site!r} names {len(setting.lens.registry.match(setting.site))} sites, and "
            "states are learned from one; name it, such as 'hook_latent'"
        )
    n = len(data)
    answers = tuple(data.base_answers), tuple(data.source_answers)
    setting.metric.check(Targets(*answers, ((),) * n, (-1,) * n, (-1,) * n, (0,) * n))
    Estimate.mean(np.zeros(n), groups=data.groups)
