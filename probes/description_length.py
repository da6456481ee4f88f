"""How many bits it takes to tell the labels to someone who has the states: the online code.

Labels are sent in blocks, each twice as long as all before it. The first is sent at log2 K bits per
item; every further one by a probe fitted to those before. A label that is easy to read needs few
examples to be read, so that the sum tells accuracy and effort at once: where accuracy alone says
the same of a signal and of a memorised labelling, this does not (Voita and Titov 2020, arXiv
2003.12298).
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float, Int, Shaped

from imaginelens.estimates import Estimate
from imaginelens.hooks.errors import InputError
from imaginelens.probes.estimators import probe
from imaginelens.probes.permuting import permuted
from imaginelens.probes.states import Cell, States

_FIRST = 16  # rows at the least that are sent without a probe


@dataclass(frozen=True, repr=False, eq=False)
class DescriptionLength:
    """The online code of the labels, beside that of shuffled ones.

    Attributes:
        code: the bits spent on each row.
        shuffled: the bits spent on each row by the code of shuffled labels, one line per shuffle.
        blocks: the number of the block in which each row was sent; 0 is the first.
        n_classes: how many classes there are.
        groups: the number of each row's group; None if each is on its own.
    """

    code: Float[np.ndarray, " row"]
    shuffled: Float[np.ndarray, "shuffle row"]
    blocks: Int[np.ndarray, " row"]
    n_classes: int
    groups: Int[np.ndarray, " row"] | None = None
    kind: str = "logistic"

    @property
    def bits(self) -> float:
        """The length of the whole code."""
        return float(self.code.sum())

    @property
    def shuffled_bits(self) -> float:
        """The length of the code of shuffled labels, the mean over shuffles."""
        return float(self.shuffled.sum(1).mean())

    @property
    def uniform_bits(self) -> float:
        """n log2 K: what the labels cost without any probe."""
        return float(len(self.code) * np.log2(self.n_classes))

    @property
    def compression(self) -> float:
        """n log2 K over the length of the code: 1 where the states are of no help."""
        return self.uniform_bits / self.bits

    @property
    def per_item(self) -> Estimate:
        """Bits per row.

        Raises:
            EstimateError: fewer than 10 groups.
        """
        return Estimate.mean(self.code, name="bits per item", unit="bits", groups=self.groups)

    @property
    def saved(self) -> Estimate:
        """Bits per row that the code is shorter than that of shuffled labels, row by row.

        Raises:
            EstimateError: fewer than 10 groups.
        """
        less = self.shuffled.mean(0) - self.code
        return Estimate.mean(less, name="bits saved per item", unit="bits", groups=self.groups)

    def summary(self) -> str:
        """The lengths in one sentence."""
        return (
            f"The online code by {self.kind} probes takes {self.bits:.0f} bits for "
            f"{len(self.code)} labels of {self.n_classes} classes, shuffled labels take "
            f"{self.shuffled_bits:.0f} and no probe {self.uniform_bits:.0f} (compression "
            f"{self.compression:.2f})."
        )

    def __repr__(self) -> str:
        return (
            f"DescriptionLength({self.bits:.1f} bits, {self.bits / len(self.code):.3f} per item, "
            f"shuffled {self.shuffled_bits:.1f}, uniform {self.uniform_bits:.1f}, "
            f"compression {self.compression:.2f})"
        )


def description_length(
    given: Any,
    y: Any = None,
    *,
    groups: Any = None,
    step: int = 0,
    site: str | int = 0,
    kind: str = "logistic",
    shuffles: int = 5,
    seed: int = 0,
) -> DescriptionLength:
    """The online code of labels given states, in blocks that double, groups whole in a block.

    Args:
        given: `States`, a `Cell`, or states (example, d_model).
        y: with an array, one label per example.
        groups: with an array, one label per example.
        step, site: which cell of `States`.
        kind: a probe with probabilities; each block's is mixed with one uniform guess per class, so
            that no label costs infinitely many bits.
        shuffles: how many shuffled labellings are sent for comparison.

    Raises:
        InputError: no labels, one class, quantities, or too few rows for two blocks.

    >>> x = np.random.default_rng(0).normal(size=(80, 2))
    >>> found = description_length(x, (x[:, 0] > 0).tolist(), shuffles=2)
    >>> found.bits < found.shuffled_bits
    True
    """
    cell = _cell(given, y, groups, step, site)
    assert cell.y is not None
    if cell.y.dtype.kind == "f":
        raise InputError("the labels are quantities, and bits are counted for classes; bin them")
    names, code = np.unique(cell.y, return_inverse=True)
    if len(names) < 2:
        raise InputError(
            f"all {len(code)} labels are {names[0]}; collect examples of another class"
        )
    if shuffles < 1:
        raise InputError(f"{shuffles} shuffles leave nothing to compare with; use 5")
    blocks = _blocks(len(code), cell.groups, max(_FIRST, 2 * len(names)), seed)
    one_fold = np.zeros(len(code), dtype=np.int64)
    others = permuted(code, one_fold, cell.groups, n=shuffles, seed=seed)
    lengths = [
        _lengths(cell.x, labels, cell.groups, blocks, len(names), kind)
        for labels in (code, *others)
    ]
    return DescriptionLength(
        lengths[0], np.stack(lengths[1:]), blocks, len(names), cell.groups, kind
    )


def _cell(given: Any, y: Any, groups: Any, step: int, site: str | int) -> Cell:
    if isinstance(given, Cell):
        cell = given
    elif isinstance(given, States):
        cell = given.cell(step=step, site=site)
    else:
        cell = States.of(given, y, groups=groups).cell(step=0)
    if cell.y is None:
        raise InputError("there are no labels to send; give y=, or use states.relabelled(labels)")
    return cell


def _blocks(
    n: int, groups: Int[np.ndarray, " row"] | None, first: int, seed: int
) -> Int[np.ndarray, " row"]:
    """The number of each row's block: groups in a random order, cut where they double."""
    units = np.arange(n) if groups is None else np.unique(groups, return_inverse=True)[1]
    order = np.random.default_rng(seed).permutation(int(units.max()) + 1)
    rank = np.empty_like(order)
    rank[order] = np.arange(len(order))
    ends = np.bincount(units)[order].cumsum()  # rows sent with each group, in order
    cuts = [n]
    while cuts[-1] >= 2 * first:
        cuts.append(cuts[-1] // 2)
    block_of = np.searchsorted(np.array(cuts[::-1]), ends)
    found = np.unique(block_of, return_inverse=True)[1][rank[units]]
    if found.max() < 1:
        raise InputError(
            f"{n} rows in {len(order)} groups do not fill two blocks of {first} or more, one to "
            "learn from and one to send; collect more"
        )
    return np.asarray(found)


def _lengths(
    x: Float[np.ndarray, "row d_model"],
    code: Shaped[np.ndarray, " row"],
    groups: Int[np.ndarray, " row"] | None,
    blocks: Int[np.ndarray, " row"],
    n_classes: int,
    kind: str,
) -> Float[np.ndarray, " row"]:
    """The bits of each row's label."""
    found = np.full(len(code), np.log2(n_classes))
    for block in range(1, int(blocks.max()) + 1):
        known, sent = blocks < block, blocks == block
        shares = _shares(
            x[known],
            code[known],
            None if groups is None else groups[known],
            x[sent],
            n_classes,
            kind,
        )
        mixed = (known.sum() * shares + 1) / (known.sum() + n_classes)
        found[sent] = -np.log2(mixed[np.arange(len(mixed)), code[sent]])
    return found


def _shares(
    x: Float[np.ndarray, "row d_model"],
    code: Shaped[np.ndarray, " row"],
    groups: Int[np.ndarray, " row"] | None,
    new: Float[np.ndarray, "new d_model"],
    n_classes: int,
    kind: str,
) -> Float[np.ndarray, "new class"]:
    """The probability of every class; where too little is known to fit a probe, its frequency."""
    shares = np.zeros((len(new), n_classes))
    counts = np.bincount(code, minlength=n_classes)
    n_groups = len(code) if groups is None else len(np.unique(groups))
    if (counts > 0).sum() < 2 or n_groups < 2:
        return shares + counts / counts.sum()
    fitted = probe(kind).fit(x, code, groups)
    assert fitted.classes_ is not None
    shares[:, fitted.classes_] = fitted.predict_proba(new)
    return shares
