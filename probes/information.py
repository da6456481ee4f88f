"""V-information: how many bits about a label a family of probes can get out of states.

H_V(Y) - H_V(Y | X): the mean bits that the best constant prediction spends on a label, minus those
that the probe spends (Xu et al. 2020, arXiv 2002.10689). Unlike mutual information it may grow by
processing, and it is 0 where the family can make nothing of the states; out of fold it may be
below 0. Its terms, one per example, are pointwise V-information (Ethayarajh et al. 2022, arXiv
2110.08420).
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float, Int, Shaped

from imaginelens.estimates import Estimate
from imaginelens.hooks.errors import InputError
from imaginelens.probes.result import ProbeResult
from imaginelens.probes.states import Cell, States


def v_information(
    given: Any,
    y: Any = None,
    *,
    classes: Any = None,
    groups: Any = None,
    step: int | None = None,
    site: str | int | None = None,
    kind: str = "logistic",
    seed: int = 0,
) -> Estimate:
    """How many bits about the label a probe gets out of the states, out of fold, per example.

    Args:
        given: a result of `fit_probe` with probabilities; `States` or a `Cell`, to which a probe is
            then fitted; or probabilities (example, class) from elsewhere, of examples that whatever
            made them has not learned from.
        y: with probabilities, the label of each example.
        classes: with probabilities, what their columns stand for; the sorted labels if left out.
        groups: with probabilities, one label per example.
        step, site: which cell of `States`.
        kind: the probe to fit: one with probabilities that mean what they say.

    Raises:
        InputError: labels are quantities, or do not fit the probabilities; a true class has
            probability 0, which would cost infinitely many bits.

    >>> v_information(np.array([[0.5, 0.5], [0.5, 0.5]]), ["a", "b"]).value
    0.0
    """
    if isinstance(given, States | Cell):
        given = _fitted(given, step, site, kind, seed)
    if isinstance(given, ProbeResult):
        groups = given.groups
    values = pointwise_v_information(given, y, classes=classes)
    return Estimate.mean(values, name="V-information", unit="bits", groups=groups)


def pointwise_v_information(
    given: Any, y: Any = None, *, classes: Any = None
) -> Float[np.ndarray, " example"]:
    """The bits that the states of each example save on its label; below 0 where they mislead.

    Args:
        given, y, classes: as `v_information`, but for states.

    Raises:
        InputError: as `v_information`.

    >>> pointwise_v_information(np.array([[1.0, 0.0], [0.5, 0.5]]), ["a", "b"]).tolist()
    [1.0, 0.0]
    """
    told = _of_result(given) if isinstance(given, ProbeResult) else _of_array(given, y, classes)
    return np.asarray(np.log2(told.given_states) - np.log2(told.without))


@dataclass(frozen=True, eq=False)
class _Told:
    """The probability of each example's own label, with its states and without."""

    given_states: Float[np.ndarray, " example"]
    without: Float[np.ndarray, " example"]


def _of_result(result: ProbeResult) -> _Told:
    """Without states: the share of the label in the other folds."""
    if result.probabilities is None or result.classes is None:
        raise InputError(
            "the labels are quantities, and bits are counted for classes; bin them, or use .r2"
        )
    code = np.searchsorted(np.array(result.classes), result.y)
    without = np.empty((len(code), len(result.classes)))
    for fold in np.unique(result.folds):
        others = np.bincount(code[result.folds != fold], minlength=len(result.classes))
        without[result.folds == fold] = others / others.sum()
    return _Told(_own(result.probabilities, code, "the probe"), _own(without, code, "no states"))


def _of_array(given: Any, y: Any, classes: Any) -> _Told:
    """Without states: the share of the label among all examples."""
    shares = np.asarray(given, dtype=np.float64)
    if y is None or shares.ndim != 2:
        raise InputError(
            f"probabilities of shape {shares.shape} came {'without' if y is None else 'with'} "
            "labels; give (example, class) and one label per example"
        )
    labels = np.asarray(y)
    known = np.unique(labels) if classes is None else np.asarray(classes)
    if len(labels) != len(shares) or shares.shape[1] != len(known):
        raise InputError(
            f"probabilities of shape {shares.shape} came with {len(labels)} labels and "
            f"{len(known)} classes; give one row per label and one column per class"
        )
    if not (shares >= 0).all() or np.abs(shares.sum(1) - 1).max() > 1e-3:
        raise InputError("each row of probabilities must be from 0 to 1 and sum to 1; give shares")
    code = _codes(labels, known)
    counts = np.bincount(code, minlength=len(known)) / len(code)
    return _Told(_own(shares, code, "the probe"), counts[code])


def _codes(
    labels: Shaped[np.ndarray, " example"], known: Shaped[np.ndarray, " class"]
) -> Int[np.ndarray, " example"]:
    number = {name: k for k, name in enumerate(known.tolist())}
    strange = [name for name in labels.tolist() if name not in number]
    if strange:
        raise InputError(f"label {strange[0]!r} is none of the classes {known.tolist()}; name all")
    return np.array([number[name] for name in labels.tolist()])


def _own(
    shares: Float[np.ndarray, "example class"], code: Int[np.ndarray, " example"], who: str
) -> Float[np.ndarray, " example"]:
    found = shares[np.arange(len(code)), code]
    if (found == 0).any():
        raise InputError(
            f"{who} gave {int((found == 0).sum())} of {len(found)} examples' own class probability "
            "0, which costs infinitely many bits; use kind='logistic'"
        )
    return np.asarray(found)


def _fitted(
    given: States | Cell, step: int | None, site: str | int | None, kind: str, seed: int
) -> ProbeResult:
    from imaginelens.probes.fitting import fit_probe

    if isinstance(given, States):
        return fit_probe(given, kind=kind, step=step, site=site, seed=seed, controls=())
    if given.y is None:
        raise InputError("the cell has no labels; use states.relabelled(labels)")
    groups = None if given.groups is None else given.groups.tolist()
    alone = States.of(given.x, given.y.tolist(), groups=groups)
    return fit_probe(alone, kind=kind, seed=seed, controls=())
