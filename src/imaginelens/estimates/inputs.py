"""Reading what the user gave: numbers with missing ones, 0/1 outcomes, group labels."""

from typing import Any

import numpy as np
from jaxtyping import Float, Int

from imaginelens.estimates.errors import EstimateError

MIN_GROUPS = 10


def numbers(given: Any, what: str) -> Float[np.ndarray, "..."]:
    """The numbers in a new, read-only float64 array; nan (and None) is a missing one.

    Raises:
        EstimateError: something is no number, or infinite.

    >>> numbers([1, None, True], "values")
    array([ 1., nan,  1.])
    """
    try:
        array = np.array(given, dtype=np.float64)
    except (TypeError, ValueError, RuntimeError) as error:  # the last by a tensor with a gradient
        raise EstimateError(
            f"the {what} cannot be read as numbers ({error}); give one number per example, and nan "
            "where it is missing"
        ) from error
    if np.isinf(array).any():
        raise EstimateError(
            f"{int(np.isinf(array).sum())} of {array.size} {what} are infinite, and a mean of them "
            "says nothing; use an outcome that is finite, or nan if the example is to count as "
            "missing"
        )
    array.flags.writeable = False
    return array


def outcomes(given: Any, what: str) -> Float[np.ndarray, "..."]:
    """0/1 outcomes as floats; nan is a missing one.

    Raises:
        EstimateError: a value is neither 0, 1 nor nan.

    >>> outcomes([True, False, float("nan")], "hits")
    array([ 1.,  0., nan])
    """
    array = numbers(given, what)
    strange = array[~(np.isnan(array) | (array == 0) | (array == 1))]
    if strange.size:
        raise EstimateError(
            f"{strange.size} of {array.size} {what} are neither 0 nor 1 (the first is "
            f"{strange[0]:g}); use Estimate.mean for an outcome that is a number"
        )
    return array


def labels(groups: Any) -> tuple[Any, ...] | None:
    """The group labels, as a tuple; None if there are no groups.

    Raises:
        EstimateError: they are no sequence, or not single values.

    >>> labels(np.array([3, 3, 5]))
    (3, 3, 5)
    """
    if groups is None:
        return None
    try:
        found = tuple(groups.tolist() if hasattr(groups, "tolist") else groups)
        hash(found)
    except TypeError as error:
        raise EstimateError(
            f"groups cannot be read as labels ({error}); give one number or string per example"
        ) from error
    return found


def group_codes(groups: tuple[Any, ...], n: int) -> Int[np.ndarray, " example"]:
    """The number of each example's group, in order of first appearance.

    Raises:
        EstimateError: not one label per example, or a label is missing.

    >>> group_codes(("cat", "dog", "cat"), 3)
    array([0, 1, 0])
    """
    if len(groups) != n:
        raise EstimateError(
            f"{len(groups)} group labels came with {n} examples; give one label per example"
        )
    absent = sum(map(_absent, groups))
    if absent:
        raise EstimateError(
            f"{absent} of {n} group labels are missing (nan or None); give every example a group, "
            "one of its own if it shares nothing"
        )
    number: dict[Any, int] = {}
    return np.array([number.setdefault(label, len(number)) for label in groups], dtype=np.int64)


def _absent(label: Any) -> bool:
    try:
        return label is None or bool(label != label)
    except TypeError:  # pandas.NA does not say whether it equals itself
        return True


def check_groups(codes: Int[np.ndarray, " example"]) -> None:
    """Refuse too few groups to tell how much they differ.

    Raises:
        EstimateError: there are fewer than 10.
    """
    count = len(np.unique(codes))
    if count < MIN_GROUPS:
        raise EstimateError(
            f"{len(codes)} examples in {count} group{'s' * (count != 1)} are too few groups to "
            f"tell how much groups differ; have at least {MIN_GROUPS}, or average within each "
            "group and pass the averages without groups"
        )


def same_length(first: np.ndarray, second: np.ndarray, names: tuple[str, str]) -> None:
    """Refuse two arrays that cannot be paired.

    Raises:
        EstimateError: their shapes differ.
    """
    if first.shape != second.shape:
        raise EstimateError(
            f"{names[0]} has shape {first.shape} and {names[1]} {second.shape}; give both for the "
            "same examples in the same order, with nan where one is missing"
        )
