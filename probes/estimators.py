"""The contract of all kinds of probes: store, fit, then predict; what is learned ends in `_`."""

import difflib
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any, ClassVar

import numpy as np
from jaxtyping import Float, Shaped

from imaginelens.hooks.errors import InputError
from imaginelens.probes.frames import Design, Frame, States
from imaginelens.probes.readouts import READOUTS, Readout, Scores, Spread


@dataclass(eq=False)
class Probe:
    """The parent of all kinds of probes; make one by its class, or by name with `probe("ridge")`.

    The constructor only stores. `fit` learns from rows (row, d_model) and returns the probe;
    `predict` gives a label for each row and `predict_proba` a probability for each class. Labels
    that are numbers with a fraction are quantities, all others are classes. Rows are standardised
    with the mean and spread of the rows given to `fit`. scikit-learn's `clone` works.

    Attributes:
        classes_: the classes, sorted; None where quantities were learned.
        readout_: the learned arrays, on the coordinates of x.
        strength_: the penalty that the inner folds chose; None where a kind has none to choose.

    >>> x = np.array([[0.0], [1.0], [4.0], [5.0]])
    >>> fitted = probe("mass_mean").fit(x, ["low", "low", "high", "high"])
    >>> fitted.predict(np.array([[4.2]])).tolist()
    ['high']
    """

    kind: ClassVar[str] = ""
    quantities: ClassVar[bool] = False  # whether it can learn them
    sets: ClassVar[bool] = False  # whether it takes (row, step, d_model)
    standardises: ClassVar[bool] = True
    rotates: ClassVar[bool] = True
    permutations: ClassVar[int] = 20  # of the labels, where `fit_probe` is not told how many
    readout: ClassVar[str] = "linear"

    def fit(self, x: Any, y: Any, groups: Any = None) -> "Probe":
        """Learn to read y from x.

        Args:
            x: (row, d_model), or for the attentive kind (row, step, d_model), where a step that a
                row lacks is nan.
            y: one label per row.
            groups: one label per row; the inner folds that choose the penalty keep groups whole.

        Raises:
            InputError: x and y do not fit each other, x is not finite, all labels are equal, or
                quantities came and this kind reads classes.
        """
        rows, labels = self._rows(x), as_labels(y)
        if len(rows) != len(labels):
            raise InputError(
                f"{len(labels)} labels came with {len(rows)} rows of states; give one for each"
            )
        self.check_labels(labels)
        units = None if groups is None else np.unique(np.asarray(groups), return_inverse=True)[1]
        self.classes_, target = encoded(labels)
        design = self.design(rows, units)
        n_classes = None if self.classes_ is None else len(self.classes_)
        ((found, self.strength_),) = self._solve(design, [target], n_classes)
        self.readout_: Readout = found.outside(design.frame)
        return self

    def predict(self, x: Any) -> Shaped[np.ndarray, " row"]:
        """The label of each row: the class with the largest score, or the number.

        Raises:
            InputError: the probe has learned nothing yet, or x has another width.
        """
        scores = self._scores(x)
        return scores[:, 0] if self.classes_ is None else self.classes_[scores.argmax(1)]

    def predict_proba(self, x: Any) -> Float[np.ndarray, "row class"]:
        """The probability of each class, in the order of `classes_`.

        Raises:
            InputError: as `predict`, or the probe reads quantities.
        """
        scores = self._scores(x)
        if self.classes_ is None:
            raise InputError(
                f"this {self.kind} probe reads quantities, which have no probabilities; use predict"
            )
        return self.probabilities(scores)

    @property
    def direction_(self) -> Float[np.ndarray, "..."]:
        """Where the label grows: (d_model,) for two classes, towards the second, and for
        quantities; else (class, d_model), relative to their mean.

        Raises:
            InputError: this kind is not linear, or the probe has learned nothing yet.
        """
        self._check_fitted()
        if self.readout != "linear":
            raise InputError(
                f"a probe of kind {self.kind!r} is not linear and has no direction; use "
                "'logistic', 'mass_mean' or 'lda'"
            )
        weights = self.readout_.arrays["weights"]
        if len(weights) == 1:
            return weights[0]
        return weights[1] - weights[0] if len(weights) == 2 else weights - weights.mean(0)

    def get_params(self, deep: bool = True) -> dict[str, Any]:
        """What the constructor was given, by name (scikit-learn's contract)."""
        return {each.name: getattr(self, each.name) for each in fields(self)}

    def set_params(self, **params: Any) -> "Probe":
        """Change what the constructor was given; fit again afterwards."""
        for name, value in params.items():
            if name not in self.get_params():
                raise InputError(
                    f"a {self.kind} probe has no parameter {name!r}; it has "
                    f"{', '.join(self.get_params()) or 'none'}"
                )
            setattr(self, name, value)
        return self

    # what fitting by folds uses: the same steps on rows that share a frame

    def design(self, x: States, groups: Any) -> Design:
        """Training rows in the frame that this kind learns in."""
        frame = Frame.of(x, standardise=self.standardises, rotate=self.rotates)
        return Design(frame(x), frame, groups)

    def learn(
        self, design: Design, labellings: Sequence[np.ndarray], n_classes: int | None
    ) -> list[Readout]:
        """A readout, in the design's coordinates, for each vector of class numbers or, if n_classes
        is None, of quantities; classes without a row are never predicted."""
        present = [np.unique(y) if n_classes else np.arange(0) for y in labellings]
        whole = [n_classes is None or len(each) == n_classes for each in present]
        full = [y for y, all_there in zip(labellings, whole, strict=True) if all_there]
        solved = iter(self._solve(design, full, n_classes) if full else [])
        found: list[Readout] = []
        for y, known, all_there in zip(labellings, present, whole, strict=True):
            if all_there:
                found.append(next(solved)[0])
                continue
            assert n_classes is not None
            inner = None
            if len(known) > 1:
                inner = self._solve(design, [np.searchsorted(known, y)], len(known))[0][0]
            found.append(Spread(inner, known, n_classes))
        return found

    def probabilities(self, scores: Scores) -> Float[np.ndarray, "row class"]:
        """Scores as probabilities: softmax."""
        shares = np.exp(scores - scores.max(1, keepdims=True))
        return np.asarray(shares / shares.sum(1, keepdims=True))

    def check_labels(self, labels: Shaped[np.ndarray, " row"]) -> None:
        """Refuse labels that this kind cannot learn."""
        if labels.dtype.kind == "f":
            if not self.quantities:
                raise InputError(
                    f"a {self.kind} probe reads classes, and the labels are quantities; use "
                    "kind='ridge', 'mlp' or 'attentive', or give whole numbers or names"
                )
            if not np.isfinite(labels).all():
                raise InputError(f"{int((~np.isfinite(labels)).sum())} labels are nan or infinite")
        if len(np.unique(labels)) < 2:
            raise InputError(
                f"all {len(labels)} labels are {labels[0] if len(labels) else 'absent'}, and a "
                "probe needs two to tell apart; collect examples of another one"
            )

    def _solve(
        self, design: Design, labellings: Sequence[np.ndarray], n_classes: int | None
    ) -> list[tuple[Readout, float | None]]:
        """The readout of each label vector, and the penalty that its inner folds chose."""
        raise NotImplementedError(f"{type(self).__name__} does not say how it learns")

    def _scores(self, x: Any) -> Scores:
        self._check_fitted()
        rows = self._rows(x)
        arrays = self.readout_.arrays
        width = arrays["inner"].shape[0] if "inner" in arrays else self._width(arrays)
        if rows.shape[-1] != width:
            raise InputError(
                f"states of width {rows.shape[-1]} came to a probe that was fitted at width "
                f"{width}; give states of the site it was fitted at"
            )
        return self.readout_.scores(rows)

    @staticmethod
    def _width(arrays: dict[str, np.ndarray]) -> int:
        return int(arrays["query" if "query" in arrays else "weights"].shape[-1])

    def _check_fitted(self) -> None:
        if not hasattr(self, "readout_"):
            raise InputError(
                f"this {self.kind} probe has learned nothing yet; call fit(x, y) before it predicts"
            )

    def _rows(self, x: Any) -> States:
        """States as numbers (row, d_model), or (row, step, d_model) for sets."""
        try:
            found = np.asarray(x.detach().cpu() if hasattr(x, "detach") else x, dtype=np.float64)
        except (TypeError, ValueError) as error:
            raise InputError(f"the states cannot be read as numbers ({error})") from error
        axes = ("row", "step", "d_model") if self.sets else ("row", "d_model")
        if self.sets and found.ndim == 2:
            found = found[:, None]
        if found.ndim != len(axes) or 0 in found.shape:
            raise InputError(
                f"states of shape {found.shape} came to a {self.kind} probe, which takes "
                f"({', '.join(axes)})"
            )
        steps: Any = found[:, None] if found.ndim == 2 else found
        bad = ~np.isfinite(steps).all(2)
        if self.sets:  # a step may be lacking, if not all of a row's are
            lacking = np.isnan(steps).all(2)
            bad &= ~lacking | lacking.all(1, keepdims=True)
        rows = np.flatnonzero(bad.any(1))
        if len(rows):
            raise InputError(
                f"{len(rows)} of {len(found)} rows of states are nan or infinite (the first is row "
                f"{rows[0]}); leave them out"
            )
        return found


def as_labels(y: Any) -> Shaped[np.ndarray, " row"]:
    """Labels in the type they have: strings, whole numbers (classes) or numbers (quantities).

    Raises:
        InputError: they are not one value per row.
    """
    found = np.asarray(y.detach().cpu() if hasattr(y, "detach") else y)
    if found.dtype.kind == "O":
        kinds = {type(value) for value in found.ravel().tolist()}
        numeric = kinds <= {int, bool, float}
        found = found.astype((np.float64 if float in kinds else np.int64) if numeric else str)
    if found.dtype.kind == "b":
        found = found.astype(np.int64)
    if found.ndim != 1 or found.dtype.kind not in "fiuU":
        raise InputError(
            f"labels of shape {found.shape} and type {found.dtype} came; give one name or number "
            "per row"
        )
    return found


def encoded(labels: Shaped[np.ndarray, " row"]) -> tuple[np.ndarray | None, np.ndarray]:
    """The classes and the number of each label's; None and the labels, where they are quantities.

    >>> encoded(np.array(["b", "a"]))[1]
    array([1, 0])
    """
    if labels.dtype.kind == "f":
        return None, labels.astype(np.float64)
    return np.unique(labels, return_inverse=True)


def kinds() -> dict[str, type[Probe]]:
    """All kinds of probes, by name."""
    from imaginelens.probes.attentive import AttentiveProbe
    from imaginelens.probes.linear import LogisticProbe, RidgeProbe
    from imaginelens.probes.mass_mean import LdaProbe, MassMeanProbe
    from imaginelens.probes.mlp import MlpProbe
    from imaginelens.probes.sparse import SparseProbe

    every = (LogisticProbe, RidgeProbe, MassMeanProbe, LdaProbe, SparseProbe, MlpProbe)
    return {each.kind: each for each in (*every, AttentiveProbe)}


def probe(kind: str | Probe, **params: Any) -> Probe:
    """A probe of a kind, by name, that has learned nothing yet; a probe is copied, unfitted.

    Raises:
        InputError: there is no such kind, or it has no such parameter.

    >>> probe("sparse", k=4)
    SparseProbe(k=4, strengths=(0.0001, 0.001, 0.01, 0.1, 1.0), seed=0)
    """
    if isinstance(kind, Probe):
        return type(kind)(**kind.get_params()).set_params(**params)
    every = kinds()
    if kind not in every:
        near = difflib.get_close_matches(kind.lower(), every, n=1, cutoff=0.3)
        raise InputError(
            f"there is no kind of probe {kind!r}; "
            + (f"did you mean {near[0]!r}?" if near else f"there are {', '.join(every)}")
        )
    return every[kind]().set_params(**params)


def restored(kind: str, params: dict[str, Any], classes: Any, arrays: dict[str, Any]) -> Probe:
    """A fitted probe from what `get_params`, `classes_` and `readout_.arrays` gave."""
    found = probe(kind, **params)
    found.classes_ = None if classes is None else np.asarray(classes)
    found.readout_ = READOUTS[found.readout](**arrays)
    return found
