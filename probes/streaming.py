"""Cross-fitting probes on rows that are too many to hold, with the results that holding them gives.

Ridge regression reads them twice: once for the sums that every fold, inner fold and label vector is
solved from, once for what it predicts. Logistic regression descends as `Softmax` does, all folds
and label vectors together, and reads them once for each step.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from imaginelens.hooks.errors import InputError
from imaginelens.probes.estimators import Probe
from imaginelens.probes.frames import deal
from imaginelens.probes.linear import INNER_FOLDS, LogisticProbe, RidgeProbe, choose
from imaginelens.probes.moments import Moments, gathered, runs
from imaginelens.probes.readouts import Linear, Scores
from imaginelens.probes.softmax import EXACT, descend
from imaginelens.probes.streamed_rows import Streamed

MATRICES = 2**29  # bytes of sums of products that are held at a time
WHOLE = -1  # the number of the fold that nothing is left out for


@dataclass(frozen=True, eq=False)
class Streaming:
    """What was found by cross-fitting.

    Attributes:
        scores: of every row out of fold, for the first label vectors.
        reached: for all other label vectors the share of rows that were read right; of quantities
            the summed squared error.
        readout, strength: of a fit of the first label vector on all rows, and its penalty.
    """

    scores: list[Scores]
    reached: Float[np.ndarray, " labelling"]
    readout: Linear | None = None
    strength: float | None = None


@dataclass(frozen=True, eq=False)
class Fold:
    """What was learned without one fold, of all label vectors, on x itself.

    Attributes:
        weights: (d_model, labelling, class), or one column for a quantity.
        biases: (labelling, class); -inf for a class that no training row has.
    """

    weights: Float[np.ndarray, "d_model labelling score"]
    biases: Float[np.ndarray, "labelling score"]
    strengths: Sequence[float]


def streams(kind: Probe) -> bool:
    """Whether a kind of probe learns from rows that are read block by block."""
    return type(kind) in (LogisticProbe, RidgeProbe)


def cross_fit(
    kind: Probe,
    x: Streamed,
    labellings: Sequence[np.ndarray],
    n_classes: int | None,
    split: Int[np.ndarray, " row"],
    groups: Int[np.ndarray, " row"] | None,
    *,
    kept: int = 1,
    whole: bool = False,
) -> Streaming:
    """The scores of each row, under each labelling, by probes that were fitted on other folds.

    Args:
        kept: for how many of the labellings all scores are kept.
        whole: fit the first labelling to all rows as well.

    Raises:
        InputError: this kind holds all rows, or a penalty is not positive.
    """
    if not streams(kind):
        raise InputError(
            f"a {kind.kind} probe holds all of the {len(x)} rows of width {x.width}, and these are "
            "to be read block by block; use kind='ridge' or 'logistic', or fewer rows"
        )
    strengths: tuple[float, ...] = kind.get_params()["strengths"]
    if min(strengths) <= 0:
        raise InputError(f"the penalties are {strengths}; rows that are streamed need them above 0")
    work = _Work(x, labellings, n_classes, split, groups, strengths, kind.get_params()["seed"])
    asked = [*range(int(split.max()) + 1), *([WHOLE] if whole else [])]
    found = work.ridge(asked) if isinstance(kind, RidgeProbe) else work.logistic(asked)
    scores, reached = work.predicted(found, kept)
    if not whole:
        return Streaming(scores, reached)
    last = found[WHOLE]
    readout = Linear(np.ascontiguousarray(last.weights[:, 0].T), last.biases[0])
    return Streaming(scores, reached, readout, float(last.strengths[0]))


@dataclass(frozen=True, eq=False)
class _Work:
    """Rows, their labels, and how they are split."""

    x: Streamed
    labellings: Sequence[np.ndarray]
    n_classes: int | None
    split: Int[np.ndarray, " row"]
    groups: Int[np.ndarray, " row"] | None
    strengths: tuple[float, ...]
    seed: int

    @property
    def n_scores(self) -> int:
        return self.n_classes or 1

    def training(self, fold: int) -> Any:
        """Which rows are learned from."""
        return self.split != fold  # none is in the fold WHOLE

    def labels(self, part: Any) -> np.ndarray:
        """Those of some rows, (labelling, row)."""
        return np.stack([labels[part] for labels in self.labellings])

    def targets(self, part: slice) -> Float[np.ndarray, "row target"]:
        """The columns to regress on, of all label vectors side by side."""
        labels = self.labels(part)
        if self.n_classes is None:
            return np.ascontiguousarray(labels.T, dtype=np.float64)
        return np.eye(self.n_classes)[labels.T].reshape(labels.shape[1], -1)

    def origin(self) -> Float[np.ndarray, " d_model"]:
        """A point near the rows: the mean of the first block."""
        return next(x for _, x in self.x.blocks()).mean(0)

    def present(self, fold: int) -> Any:
        """Which classes the training rows of each label vector have, (labelling, class)."""
        if self.n_classes is None:
            return np.ones((len(self.labellings), 1), dtype=bool)
        rows = self.training(fold)
        counts = [np.bincount(y[rows], minlength=self.n_classes) for y in self.labellings]
        return np.stack(counts) > 0

    def predicted(
        self, folds: dict[int, Fold], kept: int
    ) -> tuple[list[Scores], Float[np.ndarray, " labelling"]]:
        """What each row is read as by the probe that was learned without its fold."""
        n, n_labels = len(self.x), len(self.labellings)
        scores = [np.zeros((n, self.n_scores)) for _ in range(kept)]
        reached = np.zeros(n_labels - kept)
        for part, x in self.x.blocks():
            own = np.empty((len(x), n_labels, self.n_scores))
            for fold, there in runs(self.split[part]):
                with_ = folds[fold]
                flat = with_.weights.reshape(len(with_.weights), -1)
                own[there] = (x[there] @ flat).reshape(-1, *own.shape[1:]) + with_.biases
            for k in range(kept):
                scores[k][part] = own[:, k]
            labels = self.labels(part)[kept:].T
            if self.n_classes is None:
                reached += ((own[:, kept:, 0] - labels) ** 2).sum(0)
            else:
                reached += (own[:, kept:].argmax(2) == labels).sum(0) / n
        return scores, reached

    # ---- ridge ---------------------------------------------------------------------------------

    def ridge(self, asked: Sequence[int]) -> dict[int, Fold]:
        origin = self.origin()
        if len(self.strengths) == 1:  # nothing to choose: the sums of folds are enough
            (of_fold,) = gathered(
                self.x, self.targets, [self.split], int(self.split.max()) + 1, origin
            )
            parts = {f: [m for k, m in enumerate(of_fold) if k != f] for f in asked}
            return {f: self._solved(f, parts[f]) for f in asked}
        found: dict[int, Fold] = {}
        at_once = max(1, MATRICES // (8 * INNER_FOLDS * self.x.width**2))
        for start in range(0, len(asked), at_once):
            some = asked[start : start + at_once]
            partitions = [self._inner(np.zeros(len(self.x)), fold) for fold in some]
            made = gathered(self.x, self.targets, partitions, INNER_FOLDS, origin)
            found |= {f: self._solved(f, each) for f, each in zip(some, made, strict=True)}
        return found

    def _inner(self, labels: np.ndarray, fold: int) -> Int[np.ndarray, " row"]:
        """The inner fold of each training row; -1 for the others."""
        rows = self.training(fold)
        found = np.full(len(rows), -1, dtype=np.int8)
        groups = None if self.groups is None else self.groups[rows]
        found[rows] = deal(labels[rows], groups, INNER_FOLDS, self.seed)
        return found

    def _solved(self, fold: int, parts: Sequence[Moments]) -> Fold:
        """The fit of one fold, its penalties chosen as `RidgeProbe` chooses them."""
        parts = [part for part in parts if part.n]
        every = Moments.total(parts)
        scale = np.where(every.varies > 0, every.scale, np.inf)
        size = max(every.size, 1e-12) * every.n
        shape = len(self.labellings), self.n_scores
        falling = sorted(self.strengths, reverse=True)
        chosen = np.zeros(shape[0], dtype=np.int64)
        if len(falling) > 1 and len(parts) > 1:
            errors = np.zeros((len(falling), shape[0]))
            for k, held in enumerate(parts):
                others = Moments.total([part for i, part in enumerate(parts) if i != k])
                for i, strength in enumerate(falling):
                    error = held.error(*others.weights(scale, strength * size))
                    errors[i] += error.reshape(shape).sum(1)
            chosen = (errors <= errors.min(0) * (1 + 1e-12)).argmax(0)
        weights = np.zeros((self.x.width, *shape))
        biases = np.zeros(shape)
        for i in np.unique(chosen).tolist():
            own = chosen == i
            slope, bias = every.weights(scale, falling[i] * size)
            bias = bias - every.origin @ slope
            weights[:, own] = slope.reshape(-1, *shape)[:, own]
            biases[own] = bias.reshape(shape)[own]
        biases[~self.present(fold)] = -np.inf
        return Fold(weights, biases, [falling[i] for i in chosen.tolist()])

    # ---- logistic ------------------------------------------------------------------------------

    def logistic(self, asked: Sequence[int]) -> dict[int, Fold]:
        assert self.n_classes is not None
        origin = self.origin()

        def nothing(part: slice) -> np.ndarray:
            return np.zeros((len(range(*part.indices(len(self.x)))), 0))

        (of_fold,) = gathered(self.x, nothing, [self.split], int(self.split.max()) + 1, origin)
        frames = {
            f: _Frame.of(Moments.total([m for k, m in enumerate(of_fold) if k != f])) for f in asked
        }
        del of_fold
        # of the fit on all rows only the first label vector is wanted
        count = {f: 1 if f == WHOLE else len(self.labellings) for f in asked}
        of_fit = [(f, k) for f in asked for k in range(count[f])]
        known = {f: self.present(f) for f in asked}
        fits = _Fits(self, frames, known, of_fit, [None] * len(of_fit), {}, origin)
        sizes = np.array([frames[f].size for f, _ in of_fit])
        chosen = np.full(len(of_fit), self.strengths[0])
        if len(self.strengths) > 1:
            inner = {fit: self._inner(self.labellings[fit[1]], fit[0]) for fit in of_fit}
            repeated = [fit for fit in of_fit for _ in range(INNER_FOLDS)]
            # a single group cannot be held out
            held = [
                k if len(np.unique(parts[parts >= 0])) > 1 else None
                for parts in inner.values()
                for k in range(INNER_FOLDS)
            ]
            several = replace(fits, of_fit=repeated, held=held, inner=inner)
            chosen = choose(several, self.strengths, sizes)
        learned = fits.outside(fits.fit(chosen * np.maximum(sizes, 1e-12)))
        found: dict[int, Fold] = {}
        start = 0
        for f in asked:
            own = slice(start, start + count[f])
            start += count[f]
            weights, biases = learned[0][own], learned[1][own]
            biases[~known[f][: count[f]]] = -np.inf
            found[f] = Fold(np.moveaxis(weights, 0, 1), biases, chosen[own].tolist())
        return found


@dataclass(frozen=True, eq=False)
class _Frame:
    """The coordinates of the singular vectors of some training rows, standardised.

    Attributes:
        mean: of the rows less the origin.
        into: (d_model, coordinate), what takes centred rows there.
        values: the squared singular values.
    """

    mean: Float[np.ndarray, " d_model"]
    into: Float[np.ndarray, "d_model coordinate"]
    values: Float[np.ndarray, " coordinate"]
    size: float
    n: int

    @staticmethod
    def of(moments: Moments) -> "_Frame":
        scale = np.where(moments.varies > 0, moments.scale, np.inf)
        values, vectors = np.linalg.eigh(moments.products(scale))
        into = vectors / scale[:, None]
        mean = moments.x / moments.n
        return _Frame(mean, into, np.maximum(values, 0.0), moments.size, moments.n)


@dataclass(frozen=True, eq=False)
class _Fits:
    """Logistic regressions that read the rows together; they fit as `Softmax` does.

    Attributes:
        known: which classes the training rows of a fold have, (labelling, class).
        of_fit: the fold that each leaves out, and the number of its label vector.
        held: the inner fold that it leaves out as well; None for none.
        inner: the inner fold of each row, by fold and label vector.
    """

    work: _Work
    frames: dict[int, _Frame]
    known: dict[int, Any]
    of_fit: Sequence[tuple[int, int]]
    held: Sequence[int | None]
    inner: dict[tuple[int, int], Int[np.ndarray, " row"]]
    origin: Float[np.ndarray, " d_model"]

    def some(self, fits: Int[np.ndarray, " fit"]) -> "_Fits":
        """Some of the fits."""
        of_fit = [self.of_fit[i] for i in fits.tolist()]
        return replace(self, of_fit=of_fit, held=[self.held[i] for i in fits.tolist()])

    def fit(
        self,
        penalty: Float[np.ndarray, " fit"],
        start: Float[np.ndarray, "fit coordinate_and_bias class"] | None = None,
        *,
        tolerance: float = EXACT,
    ) -> Float[np.ndarray, "fit coordinate_and_bias class"]:
        """See `Softmax.fit`."""
        n_classes = self.work.n_scores
        shape = len(self.of_fit), self.work.x.width + 1, n_classes
        w = np.zeros(shape) if start is None else start.copy()
        known, counts = self._known(), self._counts()
        frames = [self.frames[fold] for fold, _ in self.of_fit]
        curvature = np.stack([np.append(frame.values, frame.n) for frame in frames])
        curvature = (0.5 * curvature / counts[:, None])[:, :, None]
        two = np.where(known.sum(1) == 2, 2, 1)
        ridge = np.repeat((penalty * two)[:, None, None], shape[1], axis=1)
        ridge[:, -1] = 0.0

        def slope(at: np.ndarray, live: np.ndarray) -> np.ndarray:
            return self.some(live)._slope(at, counts[live]) + ridge[live] * at

        return descend(w, slope, curvature + ridge, tolerance=tolerance)

    def unseen(self, w: Float[np.ndarray, "..."]) -> Float[np.ndarray, " fit"]:
        """The summed log loss of the rows of the inner fold that each fit leaves out."""
        total = np.zeros(len(self.of_fit))

        def one(part: slice, shares: np.ndarray, truth: np.ndarray, moved: np.ndarray) -> None:
            own = np.take_along_axis(shares, truth[:, :, None], 2)[:, :, 0]
            with np.errstate(divide="ignore"):
                total[:] -= np.where(self._unseen(part), np.log(own), 0.0).sum(0)

        self._pass(w, one)
        return total

    def outside(
        self, w: Float[np.ndarray, "..."]
    ) -> tuple[Float[np.ndarray, "fit dim class"], Float[np.ndarray, "fit class"]]:
        """Weights on x, and biases."""
        weights, biases = self._moved(w)
        return weights, biases - np.einsum("d,fdc->fc", self.origin, weights)

    def _slope(self, w: np.ndarray, counts: np.ndarray) -> np.ndarray:
        """The gradient of the mean log loss."""
        of_x = np.zeros((self.work.x.width, len(w) * w.shape[2]))
        bias = np.zeros((len(w), w.shape[2]))

        def one(part: slice, shares: np.ndarray, truth: np.ndarray, moved: np.ndarray) -> None:
            wrong = shares
            fits, rows = np.arange(truth.shape[1]), np.arange(len(truth))[:, None]
            wrong[rows, fits, truth] -= 1.0
            wrong *= (self._used(part) / counts)[:, :, None]
            of_x[:] += moved.T @ wrong.reshape(len(wrong), -1)
            bias[:] += wrong.sum(0)

        self._pass(w, one)
        of_x = of_x.reshape(-1, *bias.shape)
        found = np.empty_like(w)
        found[:, -1] = bias
        for i, (fold, _) in enumerate(self.of_fit):
            frame = self.frames[fold]
            found[i, :-1] = frame.into.T @ (of_x[:, i] - np.outer(frame.mean, bias[i]))
        return found

    def _pass(self, w: np.ndarray, one: Callable[..., None]) -> None:
        """Give a function each block: probabilities (row, fit, class), labels (row, fit), rows."""
        weights, biases = self._moved(w)
        biases = np.where(self._known(), biases, -np.inf)
        flat = np.ascontiguousarray(np.moveaxis(weights, 0, 1)).reshape(self.work.x.width, -1)
        labels = [k for _, k in self.of_fit]
        for part, x in self.work.x.blocks():
            moved = x - self.origin
            scores = (moved @ flat).reshape(len(x), *biases.shape) + biases
            shares = np.exp(scores - scores.max(2, keepdims=True))
            shares /= shares.sum(2, keepdims=True)
            one(part, shares, self.work.labels(part)[labels].T, moved)

    def _moved(self, w: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Weights (fit, d_model, class) and biases on x less the origin."""
        frames = [self.frames[fold] for fold, _ in self.of_fit]
        weights = np.stack([f.into @ each[:-1] for f, each in zip(frames, w, strict=True)])
        shifts = [f.mean @ each for f, each in zip(frames, weights, strict=True)]
        return weights, w[:, -1] - np.stack(shifts)

    def _known(self) -> Any:
        """Which classes each fit can tell, (fit, class)."""
        return np.stack([self.known[fold][k] for fold, k in self.of_fit])

    def _unseen(self, part: slice) -> Any:
        """Which rows are of the inner fold that a fit leaves out, (row, fit)."""
        rows = range(*part.indices(len(self.work.x)))
        none = np.zeros(len(rows), dtype=bool)
        return np.stack(
            [
                none if held is None else self.inner[fit][part] == held
                for fit, held in zip(self.of_fit, self.held, strict=True)
            ],
            axis=1,
        )

    def _used(self, part: slice) -> Any:
        """Which rows each fit learns from, (row, fit)."""
        left_out = np.stack([self.work.split[part] == fold for fold, _ in self.of_fit], axis=1)
        return ~left_out & ~self._unseen(part)

    def _counts(self) -> Float[np.ndarray, " fit"]:
        """How many rows each fit learns from."""
        of = [self.frames[fold].n for fold, _ in self.of_fit]
        out = [
            0 if held is None else int((self.inner[fit] == held).sum())
            for fit, held in zip(self.of_fit, self.held, strict=True)
        ]
        return np.array(of, dtype=np.float64) - np.array(out)
