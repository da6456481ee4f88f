"""Which examples a probe learns from and which it is tested on: whole groups, balanced classes."""

from typing import Any

import numpy as np
from jaxtyping import Int, Shaped

from imaginelens.hooks.errors import InputError


def folds(
    y: Shaped[np.ndarray, " row"],
    *,
    groups: Any = None,
    n_folds: int = 5,
    seed: int = 0,
) -> Int[np.ndarray, " row"]:
    """The number of the fold in which each row is tested, 0 to n_folds - 1.

    Classes are spread evenly and groups stay whole (scikit-learn's StratifiedGroupKFold); labels
    that are numbers with a fraction are quantities, and only groups count.

    Raises:
        InputError: fewer rows or groups than folds, or a class with rows in a single group, which
            could not be both learned and tested.

    >>> sorted(folds(np.array([0, 1, 0, 1]), n_folds=2).tolist())
    [0, 0, 1, 1]
    """
    sklearn = _model_selection()
    units = np.arange(len(y)) if groups is None else np.asarray(groups)
    if len(units) != len(y):
        raise InputError(f"{len(units)} groups came with {len(y)} labels; give one each")
    if len(np.unique(units)) < n_folds:
        what = "rows" if groups is None else "groups"
        raise InputError(
            f"{len(np.unique(units))} {what} are too few for {n_folds} folds; collect more, or "
            "lower n_folds="
        )
    found = np.full(len(y), -1)
    if y.dtype.kind == "f":
        splitter = sklearn.GroupKFold(n_folds, shuffle=True, random_state=seed)
    else:
        splitter = sklearn.StratifiedGroupKFold(n_folds, shuffle=True, random_state=seed)
        _check_classes(y, units)
    for k, (_, test) in enumerate(splitter.split(np.zeros(len(y)), y, units)):
        found[test] = k
    return found


def _check_classes(y: Shaped[np.ndarray, " row"], units: Shaped[np.ndarray, " row"]) -> None:
    classes = np.unique(y)
    if len(classes) < 2:
        raise InputError(
            f"all {len(y)} labels are {classes[0]!s}, and a probe needs two classes to tell apart; "
            "collect examples of another class"
        )
    for value in classes:
        if len(np.unique(units[y == value])) < 2:
            raise InputError(
                f"class {value!s} has {int((y == value).sum())} row(s), all in one group, so it "
                "cannot be both learned and tested; collect more, or label it None"
            )


def _model_selection() -> Any:
    try:
        from sklearn import model_selection
    except ImportError as error:
        raise ImportError("probes need scikit-learn: pip install 'imaginelens[probes]'") from error
    return model_selection
