"""Which rows a probe reads: one step, all steps side by side, their mean, each step, or the set."""

from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
from jaxtyping import Bool, Float, Int, Shaped

from imaginelens.hooks.errors import InputError
from imaginelens.probes.states import InMemory, States
from imaginelens.probes.streamed_rows import Streamed

Way = Literal["step", "beside", "mean", "each", "set"]
Rows = Float[np.ndarray, "row d_model"] | Float[np.ndarray, "row step d_model"]

HELD = 2**27  # bytes of states in float64; fitting makes several copies


@dataclass(frozen=True, eq=False)
class Selection:
    """Rows of states with their labels.

    Attributes:
        way: how an example's steps became rows.
        rows: the number of each row's example.
        steps: the step that each row is of.
        groups: the number of each row's group; None if each is on its own.
        where: the place, in words.
    """

    way: Way
    x: Rows | Streamed
    y: Shaped[np.ndarray, " row"]
    rows: Int[np.ndarray, " row"]
    steps: Int[np.ndarray, " row"]
    groups: Int[np.ndarray, " row"] | None
    site: str | int
    where: str
    notes: tuple[str, ...] = ()

    def of_control(self, control: States) -> tuple[Rows | Streamed, Bool[np.ndarray, " row"]]:
        """The same rows of a control, and which of them it has; streamed where these are."""
        layer: str | int = self.site if self.site in control.sites else 0
        if len(control.sites) > 1 and layer == 0:
            raise InputError(
                f"the control has the sites {control.sites} and not {self.site!r}; collect it at "
                "the same sites, or at one"
            )
        if int(self.rows.max()) >= len(control):
            raise InputError(
                f"the control has {len(control)} examples and the states have more; give it the "
                "same examples"
            )
        way, steps = self.way, self.steps
        if control.shape[1] == 1:  # an example's picture has no steps
            way, steps = ("set" if self.way == "set" else "step"), np.zeros_like(self.steps)
        if isinstance(self.x, Streamed):
            found = streamed(control, way, layer, self.rows, steps)
            return found, there(control, way, self.rows, steps)
        return read(control, way, layer, self.rows, steps)


def select(
    states: States,
    *,
    step: int | None,
    site: str | int | None,
    pool: str | None,
    takes_sets: bool,
    stream: bool | None = False,
) -> Selection:
    """Choose the rows that a probe reads; see `fit_probe` for what is chosen when.

    Args:
        stream: leave the states where they are, to be read block by block; None for those that are
            on the disk and would take more than `HELD` bytes.

    Raises:
        InputError: there are no labels, several sites and none named, or steps that some examples
            lack and nothing that says what to do about it.
    """
    if states.labels is None:
        raise InputError(
            "the states have no labels; pass y=, or collect them with labels, or use .relabelled"
        )
    if site is None and len(states.sites) > 1:
        raise InputError(
            f"the states have {len(states.sites)} sites, {states.sites[0]} to {states.sites[-1]}; "
            "name one by site=, or use il.probes.probe_map for all"
        )
    if pool not in (None, "mean"):
        raise InputError(f"pool is {pool!r}; 'mean' is the one there is")
    if step is not None and pool is not None:
        raise InputError(f"step={step} and pool={pool!r} came together; give one of them")
    place = states.sites[states.layer(0 if site is None else site)]
    way = _way(states, step, pool, takes_sets)
    rows, steps = _rows(states, way, step)
    if way == "beside" and not states.mask[rows].all():
        lacking = int((~states.mask[rows]).any(1).sum())
        raise InputError(
            f"{lacking} of {len(rows)} examples lack some of the {states.shape[1]} steps, so they "
            "cannot stand side by side; give step=, pool='mean', or kind='attentive', which takes "
            "what there is"
        )
    lying = streamed(states, way, place, rows, steps)
    held = 8 * len(rows) * lying.width <= HELD or isinstance(states.cells, InMemory)
    holds = stream is False or (stream is None and held)
    x = read(states, way, place, rows, steps)[0] if holds else lying
    y = np.concatenate([_labels(states, t, rows[steps == t]) for t in np.unique(steps).tolist()])
    groups, notes = _groups(states, rows, way)
    return Selection(way, x, y, rows, steps, groups, place, _words(states, way, place, step), notes)


def there(states: States, way: Way, rows: Any, steps: Any) -> Bool[np.ndarray, " row"]:
    """Which rows have all that they need."""
    if way in ("step", "each"):
        return states.mask[rows, steps]
    return states.mask[rows].all(1) if way == "beside" else states.mask[rows].any(1)


def streamed(states: States, way: Way, site: str | int, rows: Any, steps: Any) -> Streamed:
    """The same rows as `read` gives, read as they are needed."""

    def fetch(some: Any, at: Any) -> np.ndarray:
        return read(states, way, site, some, at)[0]

    width = states.shape[3] * (states.shape[1] if way == "beside" else 1)
    return Streamed(fetch, rows, steps, width)


def read(
    states: States, way: Way, site: str | int, rows: Any, steps: Any
) -> tuple[Rows, Bool[np.ndarray, " row"]]:
    """The states of some rows, and which of them are there."""
    layer, n_steps = states.layer(site), states.shape[1]
    has = there(states, way, rows, steps)
    if way in ("step", "each"):
        x = np.zeros((len(rows), states.shape[3]))
        for t in np.unique(steps).tolist():
            x[steps == t] = states.cells.read(t, layer, rows[steps == t])
        return x, has
    held = states.mask[rows]
    each = np.stack([states.cells.read(t, layer, rows) for t in range(n_steps)], axis=1)
    each = np.where(held[..., None], each.astype(np.float64), 0.0)
    if way == "beside":
        return each.reshape(len(rows), -1), has
    if way == "mean":
        return each.sum(1) / np.maximum(held.sum(1), 1)[:, None], has
    return np.where(held[..., None], each, np.nan), has


def regrouped(states: States, groups: Any) -> States:
    """The same states with other groups, one per example."""
    plain = groups.tolist() if hasattr(groups, "tolist") else groups
    return replace(states, groups=tuple(plain))


def _way(states: States, step: int | None, pool: str | None, takes_sets: bool) -> Way:
    assert states.labels is not None
    by_step = states.labels.ndim == 2
    if step is not None:
        return "step"
    if by_step and (pool or (takes_sets and states.shape[1] > 1)):
        what = f"pool={pool!r}" if pool else "kind='attentive'"
        raise InputError(
            f"the labels are one per (example, step), and {what} reads all steps of an example at "
            "once; give step=, or labels that are one per example"
        )
    if states.shape[1] == 1:
        return "step"
    if by_step:
        return "each"
    if pool == "mean":
        return "mean"
    return "set" if takes_sets else "beside"


def _rows(states: States, way: Way, step: int | None) -> tuple[np.ndarray, np.ndarray]:
    """The examples and steps of all rows."""
    n_steps = states.shape[1]
    if way == "step":
        t = 0 if step is None else step
        if not -n_steps <= t < n_steps:
            raise InputError(f"there is no step {t} in states of {n_steps} steps, 0 the first")
        rows = states.having(t % n_steps)
        steps = np.full(len(rows), t % n_steps)
    else:
        having = [states.having(t) for t in range(n_steps)]
        if way == "each":
            rows = np.concatenate(having)
            steps = np.repeat(np.arange(n_steps), [len(each) for each in having])
        else:
            rows = np.unique(np.concatenate(having))
            steps = np.zeros(len(rows), dtype=np.int64)
    if not len(rows):
        raise InputError(f"none of the {len(states)} examples has a state and a label here")
    return rows, steps


def _labels(states: States, step: int, rows: np.ndarray) -> np.ndarray:
    found = states.target(int(step), rows)
    assert found is not None
    return found


def _groups(
    states: States, rows: np.ndarray, way: Way
) -> tuple[np.ndarray | None, tuple[str, ...]]:
    """The group of each row, and what is to be said about it."""
    given = states.units(rows)
    notes: tuple[str, ...] = ()
    keys = None
    if states.keys is not None:
        keys = np.unique(np.asarray(states.keys)[rows], return_inverse=True)[1]
    if given is None and keys is not None and len(np.unique(keys)) < len(np.unique(rows)):
        given, notes = keys, ("examples of equal content were kept in one group",)
    elif given is None and way == "each":
        given = np.unique(rows, return_inverse=True)[1]
    elif given is not None and keys is not None:
        _check_leak(given, keys, rows)
    return given, notes


def _check_leak(groups: np.ndarray, keys: np.ndarray, rows: np.ndarray) -> None:
    """Refuse groups that put the same content on both sides of a split."""
    first: dict[int, int] = {}
    for i, key in enumerate(keys.tolist()):
        j = first.setdefault(key, i)
        if groups[i] != groups[j]:
            raise InputError(
                f"examples {int(rows[j])} and {int(rows[i])} have the same content and are in "
                "different groups, so that a probe could learn on one and be tested on the other; "
                "give them one group"
            )


def _words(states: States, way: Way, site: str, step: int | None) -> str:
    if way == "step":
        t = (0 if step is None else step) % states.shape[1]
        return f"{site} at {states.at}[{t}]" if states.shape[1] > 1 else f"{site} at {states.at}"
    said = {
        "beside": f"all {states.shape[1]} steps side by side",
        "mean": "mean over steps",
        "each": "every step a row of its own",
        "set": "the set of steps",
    }[way]
    return f"{site} at {states.at}, {said}"
