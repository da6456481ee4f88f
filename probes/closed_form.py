"""Cross-validation without refitting: what probes fitted without a fold predict for that fold.

For ridge regression with a free intercept, let A = I - H be what a fit on all rows leaves of its
targets. A fit without the rows f predicts for them y_f - A_ff^-1 (A y)_f, exactly: leaving rows out
is giving each of them a parameter of its own. So one Gram matrix of the states and one inverse for
each penalty give every fold of every set of targets, permuted ones among them, and leaving out two
folds at once gives the inner folds by which each outer fold chooses its penalty.

Source: the identity for one row, Allen (1974), Technometrics 16:125-127; for blocks it is the same
algebra, e.g. Cook and Weisberg (1982), Residuals and Influence in Regression, section 3.6.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from itertools import combinations

import torch
from jaxtyping import Float, Int
from torch import Tensor

# shares of the mean squared distance of a state from the mean
PENALTIES = (1e-3, 1e-2, 1e-1, 1.0, 10.0)
_COLUMNS = 1024  # targets worked on at a time: 8 MB at 1,000 rows

Loss = Callable[[Float[Tensor, "row column set"], Tensor, slice], Float[Tensor, "row set"]]


def gram(x: Float[Tensor, "row d_model"]) -> Float[Tensor, "row row"]:
    """The products of the centred states with each other, in float64.

    They are summed in the type that the states have.

    >>> gram(torch.tensor([[0.0, 1.0], [2.0, 1.0]]))
    tensor([[ 1., -1.],
            [-1.,  1.]], dtype=torch.float64)
    """
    moved = x - x.mean(0)
    return centred((moved @ moved.T).double())


def centred(products: Float[Tensor, "row row"]) -> Float[Tensor, "row row"]:
    """The same Gram matrix with the mean of all rows at the origin."""
    means = products.mean(0)
    return products - means - means[:, None] + means.mean()


def scale(products: Float[Tensor, "row row"]) -> float:
    """The mean squared distance of the states from their mean: the unit of a penalty; 1 if 0."""
    return float(products.diagonal().mean()) or 1.0


def left_out(
    products: Float[Tensor, "row row"],
    targets: Float[Tensor, "row column"],
    folds: Int[Tensor, " row"],
    *,
    penalty: float,
) -> Float[Tensor, "row column"]:
    """What ridge regressions that never saw a row's fold predict for it.

    Args:
        products: the centred Gram matrix of the states, from `gram`.
        penalty: of the squared norm of the weights, in units of the states, as scikit-learn's
            `Ridge(alpha=...)`; the intercept is free.

    >>> x = torch.tensor([[0.0], [1.0], [2.0], [3.0]])
    >>> found = left_out(gram(x), 2 * x.double(), torch.tensor([0, 1, 0, 1]), penalty=1e-9)
    >>> found.round(decimals=6)
    tensor([[0.],
            [2.],
            [4.],
            [6.]], dtype=torch.float64)
    """
    residual = _residual_maker(products, penalty)
    error, found = residual @ targets, targets.clone()
    for fold in folds.unique():
        rows = (folds == fold).nonzero()[:, 0]
        found[rows] -= _inverse(residual[rows][:, rows]) @ error[rows]
    return found


@dataclass(frozen=True, eq=False)
class Nested:
    """The loss of every row where its fold was left out, for every set of targets.

    Attributes:
        loss: (row, set).
        chosen: the number of the penalty that was best in the inner folds, (fold, set).
    """

    loss: Float[Tensor, "row set"]
    chosen: Int[Tensor, "fold set"]


def nested_ridge(
    products: Float[Tensor, "row row"],
    targets: Float[Tensor, "row column set"],
    folds: Int[Tensor, " row"],
    loss: Loss,
    *,
    penalties: tuple[float, ...] = PENALTIES,
) -> Nested:
    """Ridge regression by nested cross-validation: each fold with a penalty chosen without it.

    For the outer fold f and each other fold g, a fit without both is tested on g; the penalty with
    the least loss over all g (the largest of those that tie) is the one that predicts f.

    Args:
        products: the centred Gram matrix of the states, from `gram`.
        targets: of every set of labels, the columns to regress on.
        folds: the fold of each row, 0 to the number of folds - 1, three at least.
        loss: of predictions (row, column, set), given also which rows these are and which sets.
        penalties: in units of `scale(products)`, increasing.
    """
    order = folds.argsort(stable=True)  # folds are blocks then, and parts of arrays are views
    ends = folds.bincount().cumsum(0).tolist()
    blocks = [slice(start, end) for start, end in zip([0, *ends], ends, strict=False)]
    found = _Losses.none(len(penalties), len(blocks), targets)
    unit, sorted_products = scale(products), products[order][:, order]
    for p, penalty in enumerate(penalties):
        _score(
            _residual_maker(sorted_products, penalty * unit),
            targets[order],
            blocks,
            lambda predicted, rows, part: loss(predicted, order[rows], part),
            found.outer[p],
            found.inner[p],
        )
    largest_first = found.inner.flip(0)  # argmin takes the first of those that tie
    chosen = len(penalties) - 1 - largest_first.argmin(0)
    losses = torch.empty_like(found.outer[0])
    losses[order] = found.outer.gather(0, chosen[folds[order]][None])[0]
    return Nested(losses, chosen)


@dataclass(frozen=True, eq=False)
class _Losses:
    """The loss of each row without its fold, and the sums of the folds inside each outer one."""

    outer: Float[Tensor, "penalty row set"]
    inner: Float[Tensor, "penalty fold set"]

    @staticmethod
    def none(penalties: int, folds: int, targets: Tensor) -> "_Losses":
        rows, _, sets = targets.shape
        return _Losses(
            torch.zeros((penalties, rows, sets), dtype=torch.float64, device=targets.device),
            torch.zeros((penalties, folds, sets), dtype=torch.float64, device=targets.device),
        )


def _score(
    residual: Float[Tensor, "row row"],
    targets: Float[Tensor, "row column set"],
    blocks: list[slice],
    loss: Loss,
    outer: Float[Tensor, "row set"],
    inner: Float[Tensor, "fold set"],
) -> None:
    """Fill in the losses of one penalty, leaving out every fold and every two folds."""
    _, columns, sets = targets.shape
    singles = [_Left.out(residual, [rows]) for rows in blocks]
    pairs = {
        (f, g): _Left.out(residual, [blocks[f], blocks[g]])
        for f, g in combinations(range(len(blocks)), 2)
    }
    step = max(1, _COLUMNS // columns)
    for start in range(0, sets, step):
        part = slice(start, min(start + step, sets))
        some = targets[:, :, part]
        flat = some.reshape(len(some), -1)
        error = residual @ flat
        for rows, left in zip(blocks, singles, strict=True):
            outer[rows, part] = left.losses(flat, error, loss, some.shape[1:], part)
        for (f, g), left in pairs.items():
            losses = left.losses(flat, error, loss, some.shape[1:], part)
            cut = blocks[f].stop - blocks[f].start
            inner[g, part] += losses[:cut].sum(0)  # predicted without g, so an inner fold of it
            inner[f, part] += losses[cut:].sum(0)


@dataclass(frozen=True, eq=False)
class _Left:
    """Some blocks of rows that are left out together."""

    blocks: list[slice]
    root: Float[Tensor, "left left"]

    @staticmethod
    def out(residual: Tensor, blocks: list[slice]) -> "_Left":
        square = torch.cat([torch.cat([residual[a, b] for b in blocks], 1) for a in blocks])
        return _Left(blocks, torch.linalg.cholesky(square))

    @cached_property
    def inverse(self) -> Tensor:
        return torch.cholesky_inverse(self.root)

    def losses(
        self, flat: Tensor, error: Tensor, loss: Loss, shape: torch.Size, part: slice
    ) -> Tensor:
        """The losses of these rows, predicted by a fit without them."""
        own = torch.cat([error[rows] for rows in self.blocks])
        many = own.shape[1] > len(self.root) // 4  # for a few columns, solving costs less
        undone = self.inverse @ own if many else torch.cholesky_solve(own, self.root)
        found = torch.cat([flat[rows] for rows in self.blocks]) - undone
        rows = torch.cat([torch.arange(rows.start, rows.stop) for rows in self.blocks])
        return loss(found.reshape(-1, *shape), rows.to(flat.device), part)


def nearest_mean(
    products: Float[Tensor, "row row"],
    targets: Float[Tensor, "row column set"],
    folds: Int[Tensor, " row"],
) -> Float[Tensor, "row column set"]:
    """How near each state is to the mean of each class, of rows outside of its fold: mass-mean.

    The score of a class is mu . x - |mu|^2 / 2: its argmax is the nearest mean, which for two
    classes cuts at the midpoint, along the difference of the means. A class that no other fold has
    scores -inf.

    Args:
        targets: one column per class, 1 where the row has it.
    """
    n = len(targets)
    flat = targets.reshape(n, -1)
    members = [(folds == fold).nonzero()[:, 0] for fold in range(int(folds.max()) + 1)]
    shares = [products[:, rows] @ flat[rows] for rows in members]
    total, counts = torch.stack(shares).sum(0), flat.sum(0)
    found = torch.empty_like(flat)
    for rows, share in zip(members, shares, strict=True):
        others = torch.ones(n, dtype=torch.bool, device=flat.device)
        others[rows] = False
        summed, count = total - share, counts - flat[rows].sum(0)
        norms = (flat[others] * summed[others]).sum(0)
        score = summed[rows] / count - norms / count**2 / 2
        found[rows] = torch.where(count > 0, score, -torch.inf)
    return found.reshape(targets.shape)


def _residual_maker(products: Tensor, penalty: float) -> Tensor:
    """I - H of ridge regression with a free intercept, from a centred Gram matrix.

    The direction of the intercept, in which the Gram matrix has 0, is made as large as the others
    while inverting: 1 / penalty in it would drown the rest by rounding.
    """
    n, raised = len(products), len(products) * scale(products)
    shifted = products + raised / n
    shifted.diagonal().add_(penalty)
    return _inverse(shifted).sub_(1 / (n * (raised + penalty))).mul_(penalty)


def _inverse(matrix: Tensor) -> Tensor:
    return torch.cholesky_inverse(torch.linalg.cholesky(matrix))
