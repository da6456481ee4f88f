"""How alike states are, measured so that the cone of hidden states does not mislead.

States are (row, dimension), a row for each input. Three kinds of cosine:

raw       of the states as they are. Hidden states share a large common vector mu: the mean raw
          cosine of independent ones is |mu|^2 / (|mu|^2 + tr S), often above 0.9 whatever they say.
centred   after the mean of all rows is taken away. The mean of all pairs is then about -1/(n - 1)
          by construction; what tells is which pairs lie above it.
whitened  after centring, with the directions of large variance scaled down. n rows in d >= n
          dimensions, fully whitened, are the corners of a simplex: every pair has -1/(n - 1), and
          nothing is left. So the covariance is first shrunk towards a multiple of the identity, by
          Ledoit and Wolf's estimate: few rows of isotropic noise stay as they are, while directions
          that the rows do establish are evened out. Whitening turns down what the rows differ in
          most, be it the cone or the signal, so read it beside the centred cosine.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal, get_args

import numpy as np
from jaxtyping import Bool, Float, Int
from scipy import linalg, stats

from imaginelens.estimates import inputs
from imaginelens.estimates.errors import EstimateError

Kind = Literal["raw", "centred", "whitened"]


class NothingToFind(EstimateError):
    """All or none of the rows share a label, so that retrieval says nothing."""


# Differences below this share of the states' norm are rounding, and so are those of two cosines
ROUNDING = 1e-12
NULL_DRAWS = 50


def cosines(
    states: Any, others: Any = None, *, kind: Kind = "raw"
) -> Float[np.ndarray, "row other"]:
    """The cosine of every pair of rows, or of every row with every one of `others`.

    Centring and whitening then use the rows of both. A row without a direction (zero, or equal to
    the mean) has nan.

    Raises:
        EstimateError: states are no finite numbers (row, dimension), or of unequal widths.

    >>> cosines([[2.0, 0.0], [1.0, 1.0]]).round(3)
    array([[1.   , 0.707],
           [0.707, 1.   ]])
    """
    first = rows(states, "states")
    n = len(first)
    both = first if others is None else _stacked(first, rows(others, "others"))
    moved = standardised(both, kind=kind)
    norms = np.linalg.norm(moved, axis=1, keepdims=True)
    unit = np.divide(moved, norms, out=np.zeros_like(moved), where=norms > 0)
    left, right = slice(0, n), slice(0 if others is None else n, None)
    found = np.clip(unit[left] @ unit[right].T, -1.0, 1.0)
    found[norms[left, 0] == 0] = np.nan
    found[:, norms[right, 0] == 0] = np.nan
    return found


def standardised(states: Any, *, kind: Kind) -> Float[np.ndarray, "row coordinate"]:
    """Coordinates of the rows whose plain cosine is the cosine of this kind.

    A centred row that is nothing but rounding is exactly zero.

    Raises:
        EstimateError: as `cosines`, or there is no such kind.

    >>> standardised([[1.0, 5.0], [3.0, 5.0]], kind="centred")
    array([[-1.,  0.],
           [ 1.,  0.]])
    """
    given = rows(states, "states")
    if kind not in get_args(Kind):
        raise EstimateError(f"there is no kind {kind!r} of cosine; use raw, centred or whitened")
    if kind == "raw":
        return given
    centred = _centred(given)
    return _whitened(centred) if kind == "whitened" else centred


def shrinkage(states: Any) -> float:
    """How far the covariance of the rows is moved towards a multiple of the identity: 0 not at all.

    Ledoit and Wolf (2004), J. Multivariate Analysis 88:365-411, with the mean taken away.

    >>> round(shrinkage([[0.0, 0.0], [1.0, 0.0], [0.0, 1.0], [1.0, 1.0]]), 3)
    1.0
    """
    centred = _centred(rows(states, "states"))
    return _shrinkage(centred, _spectrum(centred))


def mean_offdiagonal(matrix: Float[np.ndarray, "row row"]) -> float:
    """The mean of all cells off the diagonal; cells that are nan are left out, nan if all are.

    >>> mean_offdiagonal(np.array([[1.0, 0.5], [0.3, 1.0]]))
    0.4
    """
    cells = matrix[~np.eye(len(matrix), dtype=bool)]
    there = cells[~np.isnan(cells)]
    return float(there.mean()) if there.size else float("nan")


# ---- two sets of states of the same rows -------------------------------------------------------


def cka(x: Any, y: Any, *, debiased: bool = True) -> float:
    """How alike two sets of states of the same rows are: linear CKA, 1 for equal up to a rotation.

    The plain one (Kornblith et al. 2019, arXiv 1905.00414) is close to 1 for any two sets with few
    rows and many dimensions: 0.97 for independent ones at n = 100, d = 3584. So it is debiased by
    default, with the unbiased HSIC of Song et al. (2012), JMLR 13:1393-1434, and then has mean
    about 0 for independent sets, and may be below 0; nan where the rows of a set are all equally
    far from each other, which is no geometry.

    Raises:
        EstimateError: unequal numbers of rows, fewer than 4, or all rows of a set equal.

    >>> x = np.random.default_rng(0).normal(size=(8, 3))
    >>> round(cka(x, 3 * x), 6)
    1.0
    """
    first, second = _pair(x, y, at_least=4)
    k, other = (_unit_gram(first, "x"), _unit_gram(second, "y"))
    inner = _hsic if debiased else _frobenius
    sizes = inner(k, k), inner(other, other)
    if min(sizes) <= ROUNDING:
        return float("nan")
    return inner(k, other) / float(np.sqrt(sizes[0] * sizes[1]))


@dataclass(frozen=True)
class Rsa:
    """How alike two geometries are: Spearman's correlation and its one-sided permutation p."""

    correlation: float
    pvalue: float


def rsa(
    x: Any,
    y: Any,
    *,
    kind: Kind = "centred",
    groups: Any = None,
    permutations: int = 1000,
    seed: int = 0,
) -> Rsa:
    """Correlate the distances (1 - cosine) of all pairs of rows in two sets of states.

    Representational similarity analysis (Kriegeskorte et al. 2008). The p-value permutes the rows
    of one set, for the pairs of rows are not independent; with groups whole groups change places.

    Raises:
        EstimateError: as `cka`, with 3 rows; or a row has no direction.

    >>> x = np.random.default_rng(0).normal(size=(8, 3))
    >>> found = rsa(x, 2 * x)
    >>> round(found.correlation, 6), found.pvalue < 0.01
    (1.0, True)
    """
    first, second = _pair(x, y, at_least=3)
    upper = np.triu_indices(len(first), 1)
    ranked = [_ranked(_directed(cosines(s, kind=kind)), upper) for s in (first, second)]
    spread = np.sqrt(np.prod([(r[upper] ** 2).sum() for r in ranked]))
    if not spread:
        raise EstimateError(
            f"all {len(upper[0])} distances within one of the sets are equal, so that nothing can "
            "be correlated with them; use more rows, or another kind of cosine"
        )

    def correlation(order: Int[np.ndarray, " row"]) -> float:
        return float((ranked[0][upper] * ranked[1][np.ix_(order, order)][upper]).sum() / spread)

    orders = block_permutations(len(first), groups=groups, permutations=permutations, seed=seed)
    observed = correlation(np.arange(len(first)))
    return Rsa(observed, permutation_pvalue(observed, [correlation(order) for order in orders]))


# ---- how many dimensions the rows fill ---------------------------------------------------------


@dataclass(frozen=True)
class Rank:
    """How many dimensions the states fill, and how many isotropic ones with as many rows would.

    Attributes:
        effective: exp(H) of the shares of variance, after Roy and Vetterli (2007), who took shares
            of singular values.
        participation: (sum s)^2 / sum s^2 of the variances s.
        null_effective, null_participation: the same of n isotropic normal rows, in the mean: n - 1
            at the most, so that few rows always look of low rank.
    """

    effective: float
    participation: float
    null_effective: float
    null_participation: float
    n: int

    def __str__(self) -> str:
        return f"{self.effective:.3g} (isotropic {self.null_effective:.3g}, n = {self.n})"


def rank(states: Any) -> Rank:
    """The ranks of the states beside those of as many isotropic rows in as many dimensions.

    >>> print(rank(np.eye(4)))
    3 (isotropic 2.04, n = 4)
    """
    given = rows(states, "states")
    effective, participation = isotropic_ranks(*given.shape)
    return Rank(
        effective_rank(given), participation_ratio(given), effective, participation, len(given)
    )


def effective_rank(states: Any) -> float:
    """exp(H) of the shares of variance, from 1 to the rank; 0 where all rows are equal.

    >>> round(effective_rank([[1.0, 0.0], [-1.0, 0.0], [0.0, 1.0], [0.0, -1.0]]), 6)
    2.0
    """
    return _exp_entropy(_spectrum(_centred(rows(states, "states"))))


def participation_ratio(states: Any) -> float:
    """(sum s)^2 / sum s^2 of the variances s, from 1 to the rank; 0 where all rows are equal.

    >>> round(participation_ratio([[1.0, 0.0], [-1.0, 0.0], [0.0, 1.0], [0.0, -1.0]]), 6)
    2.0
    """
    return _participation(_spectrum(_centred(rows(states, "states"))))


@lru_cache(maxsize=256)
def isotropic_ranks(n: int, d: int) -> tuple[float, float]:
    """The mean effective rank and participation ratio of n isotropic normal rows in d dimensions.

    Over 50 draws of their spectrum, by Bartlett's decomposition, so that d costs nothing.

    >>> effective, participation = isotropic_ranks(100, 3584)
    >>> round(effective, 1), round(participation, 1)
    (97.6, 96.3)
    """
    small, large = sorted((n - 1, d))
    rng = np.random.default_rng(0)
    drawn = []
    for _ in range(NULL_DRAWS):
        root = np.tril(rng.standard_normal((small, small)), -1)
        root[np.diag_indices(small)] = np.sqrt(rng.chisquare(large - np.arange(small)))
        spectrum = np.linalg.svd(root, compute_uv=False) ** 2
        drawn.append((_exp_entropy(spectrum), _participation(spectrum)))
    effective, participation = np.mean(drawn, axis=0)
    return float(effective), float(participation)


# ---- which row a row finds ---------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Retrieval:
    """Whether the nearest row shares the query's label, and how often it would by chance.

    Attributes:
        hits: for each query the share of its nearest rows (one, but for ties) that have its label;
            nan where no row that it may find has it.
        chance: for each query the share of the rows it may find that have its label.
        pvalue: of as many hits or more when labels are permuted.
    """

    hits: Float[np.ndarray, " query"]
    chance: Float[np.ndarray, " query"]
    pvalue: float

    @property
    def value(self) -> float:
        """The share of hits: retrieval@1."""
        return float(np.nanmean(self.hits))

    @property
    def chance_level(self) -> float:
        """The share of hits to be expected by chance."""
        return float(self.chance[~np.isnan(self.hits)].mean())


def retrieval(
    queries: Any,
    gallery: Any = None,
    *,
    labels: Any,
    gallery_labels: Any = None,
    groups: Any = None,
    gallery_groups: Any = None,
    kind: Kind = "centred",
    permutations: int = 1000,
    seed: int = 0,
) -> Retrieval:
    """Retrieval@1 with a permutation test: does the nearest row have the same label?

    Without a gallery each query looks among the other queries, never in its own group, and labels
    are permuted over the queries. With one (another view of the same inputs, say) it looks there,
    in its own group only among rows of its label, and the gallery's labels are permuted. Ties are
    counted in shares: of k nearest rows, m with the label are m/k of a hit.

    Args:
        labels, gallery_labels: one number or name per row.
        groups, gallery_groups: one per row, too; whole groups change places in permutations, with
            groups of their size.

    Raises:
        NothingToFind: all or none of the rows share a label.
        EstimateError: labels or groups are not one per row, or one is missing.

    >>> found = retrieval([[0.0, 1.0], [0.1, 1.0], [1.0, 0.0], [1.0, 0.1]], labels="aabb")
    >>> found.value, round(found.chance_level, 3)
    (1.0, 0.333)
    """
    others = queries if gallery is None else gallery
    other_labels = labels if gallery is None else gallery_labels
    other_groups = groups if gallery is None else gallery_groups
    similarity = cosines(queries, gallery, kind=kind)
    wanted, given = _coded(labels, other_labels, similarity.shape)
    match = wanted[:, None] == given
    allowed = _allowed(groups, other_groups, match, within=gallery is None)
    weights = nearest(similarity, allowed)
    chance = (match & allowed).sum(1) / np.maximum(allowed.sum(1), 1)
    if not ((chance > 0) & (chance < 1)).any():
        which = "all" if chance.any() else "none"
        raise NothingToFind(
            f"{which} of the rows that a query may find share its label "
            f"({len(np.unique(wanted))} labels on {len(wanted)} rows), so there is nothing to "
            "tell; use labels that some rows share"
        )
    hits = (weights * match).sum(1)
    i, j = np.nonzero(weights)
    orders = block_permutations(
        len(others), groups=other_groups, permutations=permutations, seed=seed
    )

    def share(order: Int[np.ndarray, " row"]) -> float:
        asked = wanted[order][i] if gallery is None else wanted[i]
        return float((weights[i, j] * (asked == given[order][j])).sum())

    pvalue = permutation_pvalue(float(hits.sum()), [share(order) for order in orders])
    return Retrieval(np.where(chance > 0, hits, np.nan), chance, pvalue)


def nearest(
    similarity: Float[np.ndarray, "query row"], allowed: Bool[np.ndarray, "query row"]
) -> Float[np.ndarray, "query row"]:
    """The weight of every row as a query's nearest: 1, or 1/k for each of k that tie.

    Cosines that differ by rounding tie; one that is nan counts as 0. A query that may find nothing
    has no weight.

    >>> nearest(np.array([[0.9, 0.9, 0.1]]), np.array([[True, True, True]]))
    array([[0.5, 0.5, 0. ]])
    """
    found = np.where(allowed, np.nan_to_num(similarity), -np.inf)
    ties = allowed & (found >= found.max(1, keepdims=True) - ROUNDING)
    return ties / np.maximum(ties.sum(1, keepdims=True), 1)


# ---- permutation tests -------------------------------------------------------------------------


def block_permutations(
    n: int, *, groups: Any = None, permutations: int = 1000, seed: int = 0
) -> Int[np.ndarray, "permutation row"]:
    """Random orders of n rows; with groups, whole groups change places with groups of their size.

    Rows keep their order within a group, so that what groups have in common stays as it is.

    Raises:
        EstimateError: fewer than 20 permutations, which cannot give p < 0.05, or groups are not one
            per row.

    >>> orders = block_permutations(4, groups="aabb", permutations=20)
    >>> sorted(set(map(tuple, orders.tolist())))
    [(0, 1, 2, 3), (2, 3, 0, 1)]
    """
    if permutations < 20:
        raise EstimateError(
            f"{permutations} permutations cannot give a p-value below 0.05; use 1000"
        )
    codes = _codes(groups, n)
    members = [np.flatnonzero(codes == code) for code in range(int(codes.max()) + 1)]
    sizes = sorted({len(block) for block in members})
    classes = [np.stack([b for b in members if len(b) == size]) for size in sizes]
    rng = np.random.default_rng(seed)
    orders = np.empty((permutations, n), dtype=np.int64)
    for order in orders:
        for blocks in classes:
            order[blocks] = blocks[rng.permutation(len(blocks))]
    return orders


def permutation_pvalue(observed: float, null: Sequence[float] | np.ndarray) -> float:
    """The one-sided p-value of a statistic among its permuted values: (1 + those at least as large)
    / (1 + all), which is never 0 (Phipson and Smyth 2010).

    >>> permutation_pvalue(3.0, [1.0, 2.0, 3.0, 0.0])
    0.4
    """
    values = np.asarray(null, dtype=np.float64)
    slack = ROUNDING * max(1.0, abs(observed))
    return float((1 + (values >= observed - slack).sum()) / (1 + len(values)))


# ---- parts -------------------------------------------------------------------------------------


def rows(given: Any, what: str) -> Float[np.ndarray, "row dim"]:
    """States as a float64 array (row, dimension).

    Raises:
        EstimateError: they are no such numbers, not finite, or fewer than 2 rows.

    >>> rows([[1, 2], [3, 4]], "states").dtype
    dtype('float64')
    """
    try:
        array = np.asarray(given, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise EstimateError(
            f"the {what} cannot be read as numbers ({error}); give an array (row, dimension)"
        ) from error
    if array.ndim != 2 or min(array.shape) < 1 or len(array) < 2:
        raise EstimateError(
            f"the {what} have the shape {array.shape}, expected (row, dimension) with at least 2 "
            "rows; give one row per input"
        )
    if not np.isfinite(array).all():
        bad = np.flatnonzero(~np.isfinite(array).all(1))
        raise EstimateError(
            f"{len(bad)} of {len(array)} rows of the {what} hold nan or infinity (the first is row "
            f"{bad[0]}); leave them out"
        )
    return array


def _stacked(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    if first.shape[1] != second.shape[1]:
        raise EstimateError(
            f"states of width {first.shape[1]} cannot be compared with others of width "
            f"{second.shape[1]}; take both from the same site, or compare geometries with rsa"
        )
    return np.vstack([first, second])


def _pair(x: Any, y: Any, *, at_least: int) -> tuple[np.ndarray, np.ndarray]:
    first, second = rows(x, "x"), rows(y, "y")
    if len(first) != len(second) or len(first) < at_least:
        raise EstimateError(
            f"x has {len(first)} rows and y {len(second)}, expected equal numbers of at least "
            f"{at_least}; give both for the same inputs in the same order"
        )
    return first, second


def _centred(given: np.ndarray) -> np.ndarray:
    moved = given - given.mean(0)
    largest = np.linalg.norm(given, axis=1).max()
    moved[np.linalg.norm(moved, axis=1) <= ROUNDING * largest] = 0
    return moved


def _unit_gram(given: np.ndarray, what: str) -> np.ndarray:
    """The Gram matrix of the centred rows, in a scale of its own, if they differ at all."""
    moved = _centred(given)
    if not moved.any():
        raise EstimateError(
            f"all {len(given)} rows of {what} are equal, so that nothing can be like them; look "
            "at what made the states"
        )
    gram = moved @ moved.T
    return np.asarray(gram * (len(gram) / np.linalg.norm(gram)))


def _directed(found: np.ndarray) -> np.ndarray:
    """The cosines, if every row has a direction."""
    if np.isnan(found).any():
        raise EstimateError(
            f"{int(np.isnan(np.diag(found)).sum())} of {len(found)} rows are zero or equal to the "
            "mean, and have no direction to compare; leave them out"
        )
    return found


def _spectrum(centred: np.ndarray) -> np.ndarray:
    """The eigenvalues of the scatter matrix, from the smaller side."""
    wide = centred.shape[0] <= centred.shape[1]
    square = centred @ centred.T if wide else centred.T @ centred
    return np.clip(linalg.eigvalsh(square), 0, None)


def _whitened(centred: np.ndarray) -> np.ndarray:
    n, d = centred.shape
    square = centred @ centred.T if n <= d else centred.T @ centred
    spectrum, vectors = linalg.eigh(square)
    spectrum = np.clip(spectrum, 0, None)
    scores = vectors * np.sqrt(spectrum) if n <= d else centred @ vectors
    weight = _shrinkage(centred, spectrum)
    variance = (1 - weight) * spectrum / n + weight * spectrum.sum() / n / d
    kept = spectrum > ROUNDING * max(spectrum.max(), np.finfo(float).tiny)
    scores = scores[:, kept] / np.sqrt(variance[kept]) if kept.any() else scores * 0
    scores[~centred.any(1)] = 0
    return scores


def _shrinkage(centred: np.ndarray, spectrum: np.ndarray) -> float:
    n, d = centred.shape
    variances = spectrum / n
    level, size = variances.sum() / d, (variances**2).sum()
    distance = size / d - level**2
    noise = (((centred**2).sum(1) ** 2).sum() / n - size) / n / d
    return 1.0 if distance <= ROUNDING * size else float(np.clip(noise / distance, 0, 1))


def _exp_entropy(spectrum: np.ndarray) -> float:
    shares = spectrum[spectrum > 0] / (spectrum.sum() or 1)
    return float(np.exp(-(shares * np.log(shares)).sum())) if shares.size else 0.0


def _participation(spectrum: np.ndarray) -> float:
    size = float((spectrum**2).sum())
    return float(spectrum.sum()) ** 2 / size if size else 0.0


def _frobenius(k: np.ndarray, other: np.ndarray) -> float:
    return float((k * other).sum())


def _hsic(k: np.ndarray, other: np.ndarray) -> float:
    """The unbiased estimate of HSIC from two Gram matrices, HSIC_1 of Song et al. (2012)."""
    n = len(k)
    k, other = k - np.diag(np.diag(k)), other - np.diag(np.diag(other))
    sums = k.sum(0) @ other.sum(0)
    whole = k.sum() * other.sum()
    inner = (k * other).sum() + whole / ((n - 1) * (n - 2)) - 2 * sums / (n - 2)
    return float(inner / (n * (n - 3)))


def _ranked(similarity: np.ndarray, upper: tuple[np.ndarray, np.ndarray]) -> np.ndarray:
    """The ranks of the distances, from their mean, as a symmetric matrix."""
    ranks = stats.rankdata(1 - similarity[upper].round(12))
    found = np.zeros_like(similarity)
    found[upper] = ranks - ranks.mean()
    return found + found.T


def _coded(first: Any, second: Any, shape: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
    """Equal labels get equal numbers."""
    wanted, given = (inputs.labels(names) or () for names in (first, second))
    if (len(wanted), len(given)) != shape:
        raise EstimateError(
            f"{len(wanted)} labels came with {shape[0]} queries and {len(given)} with {shape[1]} "
            "rows to find; give one label per row, those of a gallery as gallery_labels"
        )
    codes = np.asarray(inputs.group_codes(wanted + given, sum(shape)))
    return codes[: shape[0]], codes[shape[0] :]


def _allowed(groups: Any, other: Any, match: np.ndarray, *, within: bool) -> np.ndarray:
    """Which rows a query may find: not itself, nor its group; in a gallery, its label always."""
    n, m = match.shape
    if (groups is None) != (other is None):
        raise EstimateError("groups came without gallery_groups, or these alone; give both or none")
    if within:
        own = _codes(groups, n)
        return own[:, None] != own
    if groups is None:
        return np.ones_like(match)
    both = _codes((*(inputs.labels(groups) or ()), *(inputs.labels(other) or ())), n + m)
    return match | (both[:n, None] != both[n:])


def _codes(groups: Any, n: int) -> np.ndarray:
    """The number of every row's group; without groups each row is its own."""
    found = inputs.labels(groups)
    return np.arange(n) if found is None else np.asarray(inputs.group_codes(found, n))
