"""Erasing: the part of states from which a concept can be read linearly, and states without it.

An erasing is an affine map x -> x - left right^T (x - mean) at each step. LEACE (Belrose et al.
2023, arXiv 2306.03819, theorem 4.3) changes states least among all after which no linear classifier
reads the concept; INLP (Ravfogel et al. 2020, arXiv 2004.07667) removes the directions of logistic
probes, one after the other; the mean projection removes the span of class means. The first two
differ where the concept correlates with the rest of the state: projections take that along.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
from jaxtyping import Float, Shaped

from imaginelens.estimates import Estimate
from imaginelens.hooks import hub
from imaginelens.hooks.appearing import alone, appearing
from imaginelens.hooks.errors import CheckpointError, InputError, brief
from imaginelens.probes.hub import ERASER, push
from imaginelens.probes.splitting import folds
from imaginelens.probes.states import Cell, States

Method = Literal["leace", "inlp", "mean"]
_CARD = {"method": str, "concept": str, "site": str, "at": str, "n_steps": int}
_CARD |= {"learned_from": dict, "keys": list, "groups": list}
_UNREADABLE = (OSError, ValueError, TypeError, LookupError, RecursionError)
Matrix = Float[np.ndarray, "d_model rank"]


@dataclass(frozen=True, eq=False)
class Erasure:
    """What is erased at one step: x -> x - left right^T (x - mean).

    Attributes:
        mean: what erased states keep their mean at.
        left: how states are moved.
        right: what is read of them to know how far; equal to `left` for orthogonal projections.
        n: how many examples it was learned from.
    """

    mean: Float[np.ndarray, " d_model"]
    left: Matrix
    right: Matrix
    n: int

    @property
    def rank(self) -> int:
        """How many dimensions are erased."""
        return self.left.shape[1]

    @property
    def projection(self) -> Float[np.ndarray, "d_model d_model"]:
        """P = I - left right^T."""
        return np.eye(len(self.mean)) - self.left @ self.right.T

    def transform(self, x: Float[np.ndarray, "row d_model"]) -> Float[np.ndarray, "row d_model"]:
        """The states without the concept, in float64."""
        states = np.asarray(x, dtype=np.float64)
        return states - (states - self.mean) @ self.right @ self.left.T


@dataclass(frozen=True, repr=False, eq=False)
class Eraser:
    """A concept's erasing at each step; `erase` makes one, and `Erase(eraser)` is its edit.

    Attributes:
        steps: what is erased at each step of its states; None where states are left alone.
        method: "leace", "inlp" or "mean".
        concept: the name of what is erased.
        site, at: the hook name and the selector of the states that it was learned from.
        keys, groups: what identifies the examples, and the groups, that it was learned from; empty
            where that is not known.
    """

    steps: tuple[Erasure | None, ...]
    method: Method
    concept: str = "label"
    site: str = ""
    at: str = "latent"
    keys: frozenset[str] = frozenset()
    groups: frozenset[str] = frozenset()

    @property
    def active(self) -> dict[int, Erasure]:
        """The steps at which something is erased."""
        return {step: erasure for step, erasure in enumerate(self.steps) if erasure is not None}

    @property
    def rank(self) -> tuple[int, ...]:
        """How many dimensions are erased at each step; 0 where states are left alone."""
        return tuple(0 if erasure is None else erasure.rank for erasure in self.steps)

    @property
    def projection(self) -> Float[np.ndarray, "step d_model d_model"]:
        """P of each step; the identity where states are left alone."""
        same = np.eye(self.width)
        return np.stack([same if e is None else e.projection for e in self.steps])

    @property
    def mean(self) -> Float[np.ndarray, "step d_model"]:
        """What erased states keep their mean at; zero where states are left alone."""
        zero = np.zeros(self.width)
        return np.stack([zero if e is None else e.mean for e in self.steps])

    @property
    def width(self) -> int:
        """d_model of its states."""
        return len(next(iter(self.active.values())).mean)

    def at_step(self, step: int) -> Erasure | None:
        """What is erased at a step; None if nothing is.

        Raises:
            InputError: it has learned nothing of that step.
        """
        if not 0 <= step < len(self.steps):
            raise InputError(
                f"the eraser of {self.concept} knows steps 0 to {len(self.steps) - 1} and the "
                f"states have a step {step}; learn it from states that have as many"
            )
        return self.steps[step]

    def only(self, *steps: int) -> "Eraser":
        """The same eraser that leaves all other steps alone.

        Raises:
            InputError: nothing is erased at one of these steps.
        """
        if not steps or not set(steps) <= set(self.active):
            raise InputError(
                f"only{steps} asks for steps at which {self.concept} is not erased; choose of "
                f"{sorted(self.active)}"
            )
        kept = [e if step in steps else None for step, e in enumerate(self.steps)]
        return replace(self, steps=tuple(kept))

    def random(self, seed: int) -> "Eraser":
        """The control: at each step a random subspace of the same rank, about the same mean."""
        draw = np.random.default_rng(seed)
        drawn = [None if e is None else _projecting(e, _subspace(e, draw)) for e in self.steps]
        return replace(self, steps=tuple(drawn), concept=f"random subspace {seed}")

    def transform(self, x: Any, *, step: int | None = None) -> Float[np.ndarray, "..."]:
        """States without the concept, in float64.

        Args:
            x: (example, step, d_model), or (example, d_model) of one step.
            step: which one; may be left out where the eraser has learned only one.

        Raises:
            InputError: the states do not fit, or `step` is missing.
        """
        states = np.asarray(x, dtype=np.float64)
        if states.ndim not in (2, 3) or states.shape[-1] != self.width:
            raise InputError(
                f"states of shape {states.shape} came, expected (example, {self.width}) or "
                f"(example, step, {self.width}); take them from the site the eraser was learned at"
            )
        if states.ndim == 3:
            found = [self.at_step(k) for k in range(states.shape[1])]
            pairs = zip(found, states.swapaxes(0, 1), strict=True)
            return np.stack([z if e is None else e.transform(z) for e, z in pairs], axis=1)
        if step is None and len(self.steps) > 1:
            raise InputError(
                f"states of one step came and the eraser has {len(self.steps)}; say which, step=0"
            )
        erasure = self.at_step(step or 0)
        return states if erasure is None else erasure.transform(states)

    def leaves(
        self, states: States, concept: Any = None, *, step: int, n_folds: int = 5, seed: int = 0
    ) -> Estimate:
        """How much of the concept a logistic probe, fitted anew, still reads from erased states.

        On the states it was learned from that is no more than guessing the commonest label; on
        others a rest remains where the eraser was learned from few examples. Groups stay whole.

        Args:
            states: the same ones, or others; with labels, or give these as `concept`.

        Returns:
            The share read right in cross-validation; its chance is the share of the commonest
            label.

        Raises:
            InputError: as `folds`, or the labels are quantities.
        """
        cell = _cell(states, concept, self.site, step)
        assert cell.y is not None
        if cell.y.dtype.kind == "f":
            raise InputError("the labels are quantities, and a logistic probe reads classes")
        x, hits = self.transform(cell.x, step=step), np.zeros(len(cell.y))
        fold = folds(cell.y, groups=cell.groups, n_folds=n_folds, seed=seed)
        for k in range(n_folds):
            probe = _logistic(x[fold != k], cell.y[fold != k])
            hits[fold == k] = (
                probe.predict(x[fold == k] / _scale(x[fold != k])) == cell.y[fold == k]
            )
        chance = np.unique(cell.y, return_counts=True)[1].max() / len(cell.y)
        name = f"{self.concept} read at step {step} after erasing"
        return Estimate.share(hits, name=name, chance=float(chance), groups=cell.groups)

    # ---- to disk -----------------------------------------------------------------------------

    def save(self, folder: str | Path) -> Path:
        """Write eraser.safetensors and eraser.json into a folder; returns it.

        Raises:
            InputError: there is one already.
        """
        from safetensors.numpy import save

        home = Path(folder)
        if (home / "eraser.json").exists():
            raise InputError(f"{home} holds an eraser already; choose another folder")
        parts = ("mean", "left", "right")
        tensors = {
            f"{step}.{part}": np.ascontiguousarray(getattr(erasure, part))
            for step, erasure in self.active.items()
            for part in parts
        }
        content = save(tensors)
        card = {
            "digest": hashlib.sha256(content).hexdigest(),
            "method": self.method,
            "concept": self.concept,
            "site": self.site,
            "at": self.at,
            "n_steps": len(self.steps),
            "learned_from": {str(step): erasure.n for step, erasure in self.active.items()},
            "keys": sorted(self.keys),
            "groups": sorted(self.groups),
        }
        text = json.dumps(card, indent=2) + "\n"
        with alone(home, proof="eraser.json"):
            with appearing(home / "eraser.safetensors") as partial:
                partial.write_bytes(content)
            with appearing(home / "eraser.json") as partial:
                partial.write_text(text)
        return home

    def push_to_hub(
        self,
        repo_id: str,
        *,
        private: bool = False,
        token: str | None = None,
        license: str | None = None,
    ) -> hub.Address:
        """Put the saved eraser on the Hugging Face Hub and return its address.

        Args:
            license: the Hub's word for it, such as "mit"; the card names none if left out.

        Raises:
            CheckpointError: the Hub cannot be reached, or one may not write there.
        """
        told = (
            f"Erases {self.concept} from states at `{self.site}` (`{self.at}`), as it was learned "
            "from the states of one model: on another model's states it means nothing."
        )
        tags = ("concept-erasure", self.method)
        return push(
            self, repo_id, tags=tags, told=told, private=private, token=token, license=license
        )

    @staticmethod
    def load(folder: str | Path, *, revision: str | None = None) -> "Eraser":
        """Read what `save` or `push_to_hub` wrote, from a folder or the Hub.

        Raises:
            InputError: the folder holds no eraser.
            CheckpointError: there is neither, or what it holds is torn, or was changed.
        """
        from safetensors import SafetensorError
        from safetensors.numpy import load as from_bytes

        home, origin = hub.fetch(folder, revision=revision, files=ERASER)
        if not (home / "eraser.json").exists():
            raise InputError(f"{home} holds no eraser.json; save one with eraser.save(folder)")
        try:
            card = json.loads((home / "eraser.json").read_text(encoding="utf-8"))
            content = (home / "eraser.safetensors").read_bytes()
            if isinstance(card, dict) and "digest" in card:  # older ones have none
                if card["digest"] != hashlib.sha256(content).hexdigest():
                    raise ValueError("eraser.json and eraser.safetensors do not belong together")
            found = _built(card, from_bytes(content))
            return hub.remembered(found, origin)
        except (
            OSError,
            SafetensorError,
            ValueError,
            TypeError,
            LookupError,
            RecursionError,
            ArithmeticError,
        ) as error:
            raise CheckpointError(
                f"{home} does not hold an eraser as this version writes it ({brief(error)}); save "
                "it again"
            ) from error

    def __repr__(self) -> str:
        ranks = ", ".join(f"step {k}: {e.rank} of {self.width}" for k, e in self.active.items())
        learned = min(e.n for e in self.active.values())
        where = f" at {self.site}" if self.site else ""
        return f"Eraser({self.method}, {self.concept}{where}, {ranks}, n={learned})"


def _built(card: Any, tensors: dict[str, np.ndarray]) -> Eraser:
    """An eraser from what its files hold."""
    for name, kind in _CARD.items():
        if not isinstance(card, dict) or not isinstance(card.get(name), kind):
            raise ValueError(f"it has no {name}")
    if card["method"] not in get_args(Method) or not all(
        isinstance(key, str) for name in ("keys", "groups") for key in card[name]
    ):
        raise ValueError("its method, keys or groups are none")
    learned = {step: n for step, n in card["learned_from"].items() if type(n) is int}
    numbers = sorted(int(step) for step in learned)
    if [str(k) for k in numbers] != sorted(learned, key=int) or len(learned) < 1:
        raise ValueError("its steps are no numbers")
    if not 0 <= numbers[0] <= numbers[-1] < card["n_steps"] <= 10**6:
        raise ValueError(f"it has steps {numbers[0]} to {numbers[-1]} of {card['n_steps']}")
    steps: list[Erasure | None] = [None] * card["n_steps"]
    for step, n in learned.items():
        mean, left, right = (tensors[f"{step}.{part}"] for part in ("mean", "left", "right"))
        floats = all(array.dtype.kind == "f" for array in (mean, left, right))
        if not floats or left.shape != right.shape or left.shape[:-1] != mean.shape:
            raise ValueError(f"its arrays of step {step} do not fit each other")
        if not all(np.isfinite(array).all() for array in (mean, left, right)):
            raise ValueError(f"its arrays of step {step} are not finite")
        steps[int(step)] = Erasure(mean, left, right, n)
    if len({len(e.mean) for e in steps if e is not None}) > 1:
        raise ValueError("its steps have different widths")
    return Eraser(
        steps=tuple(steps),
        method=card["method"],
        concept=card["concept"],
        site=card["site"],
        at=card["at"],
        keys=frozenset(card["keys"]),
        groups=frozenset(card["groups"]),
    )


def erase(
    states: Any,
    concept: Any = None,
    *,
    method: Method = "leace",
    site: str | int = 0,
    steps: Sequence[int] | None = None,
    rounds: int = 20,
    seed: int = 0,
) -> Eraser:
    """Learn to erase a concept from states, at each step by itself.

    Learn it from many examples: from n of them LEACE erases what is linear in these, exactly, and
    leaves in others what it could not estimate; `eraser.leaves(other_states, step=)` says how much.

    Args:
        states: a `States`, or an array (example, d_model) or (example, step, d_model).
        concept: the labels to erase, one per example or (example, step); the states' own if left
            out. LEACE takes quantities too.
        site: which layer of the states.
        steps: at which steps; all if left out.
        rounds: of INLP, at most; it stops where a probe no longer reads held-out examples better
            than by their commonest label (score test at 5%).
        seed: of INLP's held-out fifth.

    Raises:
        InputError: labels are missing or of one class, a method needs classes, or there is nothing
            to erase.

    >>> x = np.random.default_rng(0).normal(size=(200, 6))
    >>> y = (x[:, 0] > 0).astype(int)
    >>> eraser = erase(x, y)
    >>> eraser
    Eraser(leace, label at layer 0, step 0: 1 of 6, n=200)
    >>> bool(abs(np.cov(eraser.transform(x).T, y)[-1, :-1]).max() < 1e-12)
    True
    """
    if method not in get_args(Method):
        raise InputError(f"there is no method {method!r} of erasing; use 'leace', 'inlp' or 'mean'")
    if rounds < 1:
        raise InputError(f"rounds is {rounds}; INLP needs at least 1")
    given = states if isinstance(states, States) else States.of(states)
    given = given if concept is None else given.relabelled(concept, label=given.label)
    wanted = range(given.shape[1]) if steps is None else steps
    found: list[Erasure | None] = [None] * given.shape[1]
    for step in wanted:
        cell = _cell(given, None, site, step)
        found[step] = _learn(cell, method, rounds, seed, f"{given.label} at step {step}")
    if all(erasure is None for erasure in found):
        raise InputError("steps is empty; name some, steps=[0], or leave it out for all")
    return Eraser(
        steps=tuple(found),
        method=method,
        concept=given.label,
        site=given.sites[given.layer(site)],
        at=given.at,
        keys=frozenset(given.keys or ()),
        groups=frozenset(str(group) for group in given.groups or ()),
    )


def _cell(states: States, concept: Any, site: str | int, step: int) -> Cell:
    """The labelled examples of a step, if there are enough to learn from."""
    labelled = states if concept is None else states.relabelled(concept, label=states.label)
    if labelled.labels is None:
        raise InputError("the states have no labels; give one per example as the concept")
    cell = labelled.cell(step=step, site=site)
    assert cell.y is not None
    kinds = np.unique(cell.y)
    if len(kinds) < 2:
        raise InputError(
            f"all {len(cell.y)} labels at step {step} are {kinds[0]!s}, so that there is nothing "
            "to erase; collect examples of another class"
        )
    return cell


def _learn(cell: Cell, method: Method, rounds: int, seed: int, what: str) -> Erasure:
    x, y = np.asarray(cell.x, dtype=np.float64), cell.y
    assert y is not None
    mean = x.mean(0)
    quantity = y.dtype.kind == "f"
    if quantity and method != "leace":
        raise InputError(f"{what} is a quantity, and {method!r} needs classes; use 'leace'")
    if method == "leace":
        concept = y[:, None].astype(np.float64) if quantity else _indicators(y)
        left, right = _leace(x - mean, concept - concept.mean(0))
    elif method == "mean":
        left = right = _span(np.stack([x[y == k].mean(0) - mean for k in np.unique(y)], axis=1))
    else:
        left = right = _inlp(x - mean, y, cell.groups, rounds, seed)
    if not left.shape[1]:
        raise InputError(
            f"there is nothing to erase of {what}: {method} finds no direction that tells its "
            f"labels apart among {len(x)} examples; leave the step out with steps=[...]"
        )
    return Erasure(mean, left, right, len(x))


def _leace(
    x: Float[np.ndarray, "row d_model"], z: Float[np.ndarray, "row concept"]
) -> tuple[Matrix, Matrix]:
    """left, right with P = I - W^+ P_{W S_xz} W = I - left right^T, of centred x and z.

    With the singular values x = U s V^T, the whitening is W = V (sqrt(n) / s) V^T, and W S_xz is
    V U^T z / sqrt(n): nothing is squared, so that near-singular states keep their digits.
    """
    u, s, vt = np.linalg.svd(x, full_matrices=False)
    there = s > _cut(s, x.shape)
    u, s, v = u[:, there], s[there], vt[there].T
    basis = _span(u.T @ z)
    scale = (s / np.sqrt(len(x)))[:, None]
    return v @ (scale * basis), v @ (basis / scale)


def _inlp(
    x: Float[np.ndarray, "row d_model"],
    y: Shaped[np.ndarray, " row"],
    groups: Any,
    rounds: int,
    seed: int,
) -> Matrix:
    """Directions of logistic probes, each fitted where the ones before read nothing."""
    held = folds(y, groups=groups, seed=seed) == 0
    found = np.zeros((x.shape[1], 0))
    for _ in range(rounds):
        rest = x - x @ found @ found.T
        if found.shape[1] == x.shape[1] or not np.any(np.abs(rest) > _cut(np.abs(x), x.shape)):
            break
        probe = _logistic(rest[~held], y[~held])
        right = probe.predict(rest[held] / _scale(rest[~held])) == y[held]
        chance = np.unique(y[held], return_counts=True)[1].max() / held.sum()
        read = Estimate.share(right, chance=min(float(chance), 1 - 1e-9))
        if read.value <= chance or read.pvalue() >= 0.05:
            break
        weights = probe.coef_ - (probe.coef_.mean(0) if len(probe.coef_) > 1 else 0)
        found = _span(np.concatenate([found, _span(weights.T)], axis=1))
    return found


def _logistic(x: Float[np.ndarray, "row d_model"], y: Shaped[np.ndarray, " row"]) -> Any:
    """A logistic probe of states in units of their spread, so that its penalty has no unit."""
    try:
        from sklearn.linear_model import LogisticRegression
    except ImportError as error:
        raise ImportError("probes need scikit-learn: pip install 'imaginelens[probes]'") from error
    return LogisticRegression(max_iter=2000).fit(x / _scale(x), y)


def _scale(x: Float[np.ndarray, "row d_model"]) -> float:
    return float(np.sqrt(np.mean((x - x.mean(0)) ** 2))) or 1.0


def _indicators(y: Shaped[np.ndarray, " row"]) -> Float[np.ndarray, "row concept"]:
    return (y[:, None] == np.unique(y)[None]).astype(np.float64)


def _span(columns: Float[np.ndarray, "row column"]) -> Float[np.ndarray, "row rank"]:
    """An orthonormal basis of the columns' span."""
    u, s, _ = np.linalg.svd(columns, full_matrices=False)
    return u[:, s > _cut(s, columns.shape)]


def _cut(s: Float[np.ndarray, "..."], shape: tuple[int, ...]) -> float:
    """Below this, a singular value is rounding: relative to the largest."""
    return float(s.max(initial=0.0)) * max(shape) * float(np.finfo(np.float64).eps)


def _subspace(erasure: Erasure, draw: np.random.Generator) -> Matrix:
    return np.linalg.qr(draw.normal(size=erasure.left.shape))[0]


def _projecting(erasure: Erasure, basis: Matrix) -> Erasure:
    return replace(erasure, left=basis, right=basis)
