"""Similarity against closed forms, enumeration, published numbers and sets built to mislead."""

from collections import Counter
from itertools import permutations
from math import comb

import numpy as np
import pytest
from jaxtyping import Float
from scipy import stats

from imaginelens.estimates import EstimateError
from imaginelens.estimates.similarity import (
    Kind,
    block_permutations,
    cka,
    cosines,
    effective_rank,
    isotropic_ranks,
    mean_offdiagonal,
    nearest,
    participation_ratio,
    permutation_pvalue,
    rank,
    retrieval,
    rsa,
    shrinkage,
    standardised,
)

KINDS: tuple[Kind, ...] = ("raw", "centred", "whitened")
Array = Float[np.ndarray, "row dim"]


def draw(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape)


def rotation(d: int, seed: int = 1) -> np.ndarray:
    return np.linalg.qr(draw(d, d, seed=seed))[0]


def cone(n: int, d: int, *, classes: int = 2, shift: float = 8.0, common: float = 10.0) -> Array:
    """Noise of unit variance on a common vector, with a shift of its own for each class."""
    signal = np.repeat(np.eye(classes, d) * shift, n // classes, axis=0)
    return draw(n, d) + common + signal


# ---- cosines -----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("n", "d"), [(12, 40), (40, 6)])
def test_cosines_do_not_know_rotation_and_scale(kind: Kind, n: int, d: int) -> None:
    x = draw(n, d) * np.linspace(0.1, 3, d) + 2
    same = cosines(x, kind=kind)
    np.testing.assert_allclose(cosines(7.5 * x @ rotation(d), kind=kind), same, atol=1e-9)
    np.testing.assert_allclose(np.diag(same), 1.0)
    if kind != "raw":
        np.testing.assert_allclose(cosines(x + draw(d, seed=3), kind=kind), same, atol=1e-9)


def test_raw_and_centred_means_are_those_of_theory() -> None:
    """raw: |mu|^2 / (|mu|^2 + tr S); centred: -1 / (n - 1). Measured .901 and -.0101 at n = 100."""
    n, d = 100, 3584
    x = draw(n, d) + 3.0
    raw, centred = (mean_offdiagonal(cosines(x, kind=kind)) for kind in ("raw", "centred"))
    assert raw == pytest.approx(9 / (9 + 1), abs=0.001)
    assert centred == pytest.approx(-1 / (n - 1), abs=1e-4)


def test_full_whitening_of_few_rows_is_a_simplex_and_shrinkage_prevents_it() -> None:
    x = cone(40, 200)
    u, _, _ = np.linalg.svd(x - x.mean(0), full_matrices=False)
    fully = cosines(u[:, :39])  # whitened without shrinkage
    np.testing.assert_allclose(fully[~np.eye(40, dtype=bool)], -1 / 39, atol=1e-12)
    kept = cosines(x, kind="whitened")
    same = np.kron(np.eye(2), np.ones((20, 20))).astype(bool)
    assert kept[~np.eye(40, dtype=bool)].std() > 0.01
    alike, unlike = mean_offdiagonal(np.where(same, kept, np.nan)), kept[~same].mean()
    assert alike > unlike + 0.01


def test_shrinkage_is_that_of_ledoit_and_wolf() -> None:
    for n, d in ((20, 8), (15, 30), (200, 5)):
        x = draw(n, d) * np.linspace(0.5, 3, d)
        c = x - x.mean(0)
        s = c.T @ c / n
        m = np.trace(s) / d
        delta = ((s - m * np.eye(d)) ** 2).sum() / d
        beta = sum(((np.outer(row, row) - s) ** 2).sum() for row in c) / d / n**2
        assert shrinkage(x) == pytest.approx(min(beta / delta, 1.0), rel=1e-9)


def test_shrinkage_leaves_noise_and_evens_out_what_is_established() -> None:
    noise = draw(60, 2000)
    assert shrinkage(noise) > 0.9
    off = ~np.eye(60, dtype=bool)
    white, centred = (cosines(noise, kind=kind)[off] for kind in ("whitened", "centred"))
    assert np.corrcoef(white, centred)[0, 1] > 0.99
    many = draw(5000, 3) * [1.0, 2.0, 4.0]
    assert shrinkage(many) < 0.01
    white = standardised(many, kind="whitened")
    np.testing.assert_allclose(white.T @ white / 5000, np.eye(3), atol=0.01)


@pytest.mark.parametrize(("n", "d"), [(30, 8), (8, 30)])
def test_whitened_rows_have_the_shrunk_inverse_covariance(n: int, d: int) -> None:
    x = draw(n, d) * np.linspace(0.5, 3, d)
    c = x - x.mean(0)
    s, weight = c.T @ c / n, shrinkage(x)
    inverse = np.linalg.inv((1 - weight) * s + weight * np.trace(s) / d * np.eye(d))
    white = standardised(x, kind="whitened")
    np.testing.assert_allclose(white @ white.T, c @ inverse @ c.T, atol=1e-9)


def test_cosines_of_two_sets_centre_over_both() -> None:
    x, y = draw(5, 7) + 4, draw(3, 7, seed=1) + 4
    whole = cosines(np.vstack([x, y]), kind="centred")
    np.testing.assert_allclose(cosines(x, y, kind="centred"), whole[:5, 5:], atol=1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_rows_without_a_direction_are_nan(kind: Kind) -> None:
    x = np.vstack([draw(4, 6) + 1, np.zeros((1, 6))])
    x[4] = 0 if kind == "raw" else x[:4].mean(0)
    found = cosines(x, kind=kind)
    assert np.isnan(found[4]).all()
    assert np.isnan(found[:, 4]).all()
    assert np.isfinite(found[:4, :4]).all()
    equal = cosines(np.full((5, 3), 0.1), kind=kind)
    assert np.isnan(equal).all() == (kind != "raw")
    assert np.isnan(mean_offdiagonal(equal)) == (kind != "raw")


# ---- CKA and RSA -------------------------------------------------------------------------------


def test_cka_is_one_for_equal_sets_and_does_not_know_rotation_and_scale() -> None:
    x, y = draw(30, 12) + 5, draw(30, 9, seed=1)
    for debiased in (True, False):
        assert cka(x, x, debiased=debiased) == pytest.approx(1.0)
        moved = 0.01 * x @ rotation(12) + draw(12, seed=4)
        assert cka(moved, x, debiased=debiased) == pytest.approx(1.0)
        assert cka(moved, y, debiased=debiased) == pytest.approx(cka(x, y, debiased=debiased))
        assert cka(y, x, debiased=debiased) == pytest.approx(cka(x, y, debiased=debiased))


@pytest.mark.parametrize(("n", "d", "biased"), [(100, 3584, 0.973), (100, 256, 0.719)])
def test_debiased_cka_of_independent_sets_is_nothing(n: int, d: int, biased: float) -> None:
    """The plain one has the published sizes, .973 and .719; the debiased one is about 0."""
    found = [(draw(n, d, seed=2 * s), draw(n, d, seed=2 * s + 1)) for s in range(10)]
    assert np.mean([cka(x, y, debiased=False) for x, y in found]) == pytest.approx(biased, abs=5e-3)
    assert abs(np.mean([cka(x, y) for x, y in found])) < 0.015


def test_debiased_cka_has_mean_zero_with_few_rows() -> None:
    found = [cka(draw(20, 64, seed=2 * s), draw(20, 64, seed=2 * s + 1)) for s in range(300)]
    assert abs(np.mean(found)) < 4 * np.std(found) / np.sqrt(300)
    assert np.min(found) < 0  # unbiased: it can be negative


def test_hsic_is_the_u_statistic() -> None:
    """Debiased CKA from all quadruples of rows, by enumeration."""
    x, y = draw(6, 3) + 1, draw(6, 4, seed=1)

    def hsic(a: np.ndarray, b: np.ndarray) -> float:
        k, m = a @ a.T, b @ b.T
        total = sum(
            k[i, j] * (m[i, j] + m[q, r] - 2 * m[i, q]) for i, j, q, r in permutations(range(6), 4)
        )
        return total / (6 * 5 * 4 * 3)

    assert cka(x, y) == pytest.approx(hsic(x, y) / np.sqrt(hsic(x, x) * hsic(y, y)))


def test_cka_of_no_geometry_is_nan_and_of_equal_rows_refused() -> None:
    assert np.isnan(cka(np.eye(6), draw(6, 3)))
    with pytest.raises(EstimateError, match="all 6 rows of y are equal"):
        cka(np.eye(6), np.ones((6, 3)))


def test_rsa_is_spearmans_correlation_of_the_distances() -> None:
    x, y = draw(12, 5) + 1, draw(12, 7, seed=1)
    upper = np.triu_indices(12, 1)
    for kind in KINDS:
        distances = [(1 - cosines(s, kind=kind))[upper] for s in (x, y)]
        expected = stats.spearmanr(*distances).statistic
        assert rsa(x, y, kind=kind).correlation == pytest.approx(expected)


def test_rsa_does_not_know_rotation_and_scale_and_its_null_is_uniform() -> None:
    x = draw(15, 6)
    found = rsa(x, 3 * x @ rotation(6))
    assert found.correlation == pytest.approx(1.0)
    assert found.pvalue == 1 / 1001
    null = [
        rsa(draw(10, 4, seed=2 * s), draw(10, 4, seed=2 * s + 1), permutations=99).pvalue
        for s in range(200)
    ]
    assert stats.kstest(null, "uniform").pvalue > 0.01
    assert np.mean(np.array(null) <= 0.05) <= 0.095


def test_rsa_of_the_same_clusters_needs_no_common_coordinates() -> None:
    x, y = cone(20, 50, classes=4), cone(20, 30, classes=4) @ rotation(30)
    assert rsa(x, y).pvalue < 0.01
    with pytest.raises(EstimateError, match="1 of 5 rows are zero or equal"):
        rsa(np.vstack([draw(4, 3), np.zeros((1, 3))]), draw(5, 3), kind="raw")
    with pytest.raises(EstimateError, match="6 distances within one of the sets are equal"):
        rsa(np.eye(4), draw(4, 3))


# ---- ranks -------------------------------------------------------------------------------------


def test_ranks_of_a_known_spectrum() -> None:
    """Ten equal variances are ten dimensions; variances 2, 1, 1 have exp(H) = 2^1.5, PR = 16/6."""
    corners = np.vstack([np.eye(10), -np.eye(10)]) @ np.eye(10, 30) @ rotation(30)
    for ten in (corners, 1e6 * corners + 5):
        assert effective_rank(ten) == pytest.approx(10)
        assert participation_ratio(ten) == pytest.approx(10)
    axes = np.diag(np.sqrt([2.0, 1, 1]))
    three = np.vstack([axes, -axes])
    assert effective_rank(three) == pytest.approx(2**1.5)
    assert participation_ratio(three) == pytest.approx(16 / 6)


def test_ranks_of_equal_rows_are_zero_and_of_two_rows_one() -> None:
    assert (effective_rank(np.full((7, 3), 0.1)), participation_ratio(np.ones((7, 3)))) == (0, 0)
    assert effective_rank(draw(2, 9)) == pytest.approx(1)


def test_isotropic_rows_have_their_null_rank() -> None:
    """Measured 97.7 and 96.4 at n = 100, d = 3584; and at other shapes against direct draws."""
    assert isotropic_ranks(100, 3584) == pytest.approx((97.65, 96.35), abs=0.1)
    for n, d in ((20, 7), (12, 40), (5, 1)):
        drawn = [draw(n, d, seed=s) + 3 for s in range(200)]
        direct = [np.mean([f(x) for x in drawn]) for f in (effective_rank, participation_ratio)]
        assert isotropic_ranks(n, d) == pytest.approx(direct, rel=0.03)
    found = rank(draw(30, 400))
    assert found.effective == pytest.approx(found.null_effective, rel=0.02)
    assert found.participation == pytest.approx(found.null_participation, rel=0.02)
    assert rank(draw(30, 2) @ draw(2, 400)).effective < 3 < found.null_effective


# ---- retrieval and permutation tests -----------------------------------------------------------


def test_a_separable_signal_is_found_behind_a_raw_cosine_near_one() -> None:
    """Two classes, apart by 20 standard deviations, at a mean raw cosine of 0.987."""
    x = cone(100, 3584, shift=20.0, common=8.9)
    assert mean_offdiagonal(cosines(x)) == pytest.approx(0.987, abs=0.001)
    kinds = np.repeat([0, 1], 50)
    for kind in KINDS:
        found = retrieval(x, labels=kinds, kind=kind)
        assert found.value == 1.0 or (kind == "whitened" and found.value > 0.9)
        assert found.pvalue == 1 / 1001
        assert found.chance_level == pytest.approx(49 / 99)
    noise = retrieval(cone(100, 3584, shift=0.0, common=8.9), labels=kinds)
    assert noise.pvalue > 0.05


def test_retrieval_in_a_gallery() -> None:
    first = draw(30, 50)
    second = first[::-1] + 0.3 * draw(30, 50, seed=1)
    names = list(range(30))
    found = retrieval(first, second, labels=names, gallery_labels=names[::-1])
    assert (found.value, found.chance_level) == (1.0, pytest.approx(1 / 30))
    assert found.pvalue == 1 / 1001
    blind = retrieval(first, draw(30, 50, seed=2), labels=names, gallery_labels=names)
    assert blind.value < 0.2
    assert blind.pvalue > 0.05


def test_ties_are_counted_in_shares() -> None:
    x = [[1.0, 0.0], [1.0, 0.0], [1.0, 0.0], [0.0, 1.0]]
    found = retrieval(x, labels="aabb", kind="raw", permutations=20)
    np.testing.assert_allclose(found.hits, [0.5, 0.5, 0.0, 1 / 3])
    np.testing.assert_allclose(found.chance, 1 / 3)
    assert nearest(np.array([[0.3, 0.3 + 1e-15, 0.2]]), np.ones((1, 3), bool)).tolist() == [
        [0.5, 0.5, 0]
    ]


def test_equal_rows_are_found_by_chance() -> None:
    """Their centred rows are rounding, which must not decide."""
    x = np.tile(draw(1, 33) + 0.1, (40, 1))
    kinds = np.repeat([0, 1, 2, 3], 10)
    for kind in KINDS:
        found = retrieval(x, labels=kinds, kind=kind)
        np.testing.assert_allclose(found.hits, found.chance)
        assert found.pvalue == 1.0


def test_a_query_without_a_partner_is_left_out() -> None:
    found = retrieval(draw(5, 3), labels="aabbc", permutations=20)
    assert np.isnan(found.hits).tolist() == [False, False, False, False, True]
    assert found.chance_level == pytest.approx(1 / 4)


def test_a_row_never_finds_its_own_group() -> None:
    """Copies within a group would be found at once, and say nothing of their label."""
    x = np.repeat(draw(20, 30), 2, axis=0) + 1e-3 * draw(40, 30, seed=1)
    groups = np.repeat(np.arange(20), 2)
    kinds = np.repeat(np.random.default_rng(5).permutation(20) % 2, 2)
    alone = retrieval(x, labels=kinds)
    assert (alone.value, alone.pvalue) == (1.0, 1 / 1001)  # fooled by the copies
    found = retrieval(x, labels=kinds, groups=groups)
    assert found.pvalue > 0.05
    assert found.chance_level == pytest.approx(18 / 38)
    twins = retrieval(
        x, x + 1e-3, labels=range(40), gallery_labels=range(40), groups=groups,
        gallery_groups=groups,
    )  # fmt: skip
    assert (twins.value, twins.chance_level) == (1.0, pytest.approx(1 / 39))


def test_the_null_of_retrieval_is_uniform_in_groups_and_out() -> None:
    for size in (1, 3):
        found = []
        for seed in range(200):
            rng = np.random.default_rng(seed)
            x = np.repeat(rng.normal(size=(24 // size, 5)), size, axis=0)
            x += 0.2 * rng.normal(size=x.shape)
            kinds = np.repeat(rng.permutation(24 // size) % 2, size)
            groups = None if size == 1 else np.repeat(np.arange(24 // size), size)
            found.append(retrieval(x, labels=kinds, groups=groups, permutations=99).pvalue)
        assert np.mean(np.array(found) <= 0.05) <= 0.095  # 0.05 + 2.9 standard errors
        assert np.mean(found) > 0.45


def test_permutations_move_whole_groups_of_a_size() -> None:
    groups = ["a", "b", "b", "c", "d", "d", "e"]
    orders = block_permutations(7, groups=groups, permutations=500)
    for order in orders:
        assert sorted(order) == list(range(7))
        assert tuple(order[[1, 2]]) in {(1, 2), (4, 5)}
        assert {order[0], order[3], order[6]} == {0, 3, 6}
    assert len(set(map(tuple, orders))) == 2 * 6
    single = Counter(map(tuple, block_permutations(3, permutations=6000)))
    assert len(single) == 6
    assert stats.chisquare(list(single.values())).pvalue > 0.001
    again = block_permutations(7, groups=groups, permutations=500)
    assert np.array_equal(orders, again)
    assert not np.array_equal(
        orders, block_permutations(7, groups=groups, permutations=500, seed=1)
    )


def test_a_permutation_pvalue_against_enumeration() -> None:
    """Four pairs of close rows, against all 70 ways to label them: in 6 of them no pair is split.

    Close rows find each other, so that their hits go together, which the permutations must keep.
    """
    angles = np.repeat([0.0, 0.5, 1.0, 1.5], 2) + np.tile([0.0, 0.01], 4)
    x = np.stack([np.cos(angles), np.sin(angles)], axis=1)
    found = retrieval(x, labels="aabbaabb", kind="raw", permutations=20000)
    assert found.value == 1.0
    close = nearest(cosines(x), ~np.eye(8, dtype=bool))
    hits = []
    for order in set(permutations("aaaabbbb")):
        names = np.array(order)
        hits.append((close * (names[:, None] == names)).sum())
    assert len(hits) == comb(8, 4)
    assert np.mean(np.array(hits) >= 8 - 1e-9) == pytest.approx(6 / 70)
    assert found.pvalue == pytest.approx(6 / 70, abs=0.008)  # 4 standard errors


def test_a_pvalue_counts_ties_and_itself() -> None:
    assert permutation_pvalue(1.0, [0.0, 1.0 - 1e-15, 2.0]) == 3 / 4
    assert permutation_pvalue(5.0, np.zeros(99)) == 0.01


# ---- what is refused ---------------------------------------------------------------------------


def test_bad_input_is_refused_with_a_sentence() -> None:
    x = draw(5, 3)
    bad = x.copy()
    bad[3, 1] = np.nan
    with pytest.raises(EstimateError, match="1 of 5 rows of the states hold nan or infinity"):
        cosines(bad)
    with pytest.raises(EstimateError, match=r"have the shape \(5, 3, 1\)"):
        effective_rank(x[..., None])
    with pytest.raises(EstimateError, match="at least 2 rows"):
        rank(x[:1])
    with pytest.raises(EstimateError, match="cannot be read as numbers"):
        cosines([[1.0], [2.0, 3.0]])
    with pytest.raises(EstimateError, match=r"of width 3 .* of width 2"):
        cosines(x, x[:, :2])
    with pytest.raises(EstimateError, match="x has 5 rows and y 4, expected equal numbers"):
        rsa(x, x[:4])
    with pytest.raises(EstimateError, match="at least 4"):
        cka(x[:3], x[:3])
    with pytest.raises(EstimateError, match="no kind 'white'"):
        standardised.__wrapped__(x, kind="white")
    with pytest.raises(EstimateError, match="4 labels came with 5 queries"):
        retrieval(x, labels="aabb")
    with pytest.raises(EstimateError, match="0 with 5 rows to find"):
        retrieval(x, x, labels="aabbc")
    with pytest.raises(EstimateError, match=r"none of the rows .* \(5 labels on 5 rows\)"):
        retrieval(x, labels="abcde")
    with pytest.raises(EstimateError, match=r"all of the rows .* \(1 labels"):
        retrieval(x, labels="aaaaa")
    with pytest.raises(EstimateError, match="1 of 10 group labels are missing"):
        retrieval(x, x, labels="aabbb", gallery_labels=["a", "a", "b", "b", None])
    with pytest.raises(EstimateError, match="3 group labels came with 5 examples"):
        retrieval(x, labels="aabbb", groups=[1, 2, 3])
    with pytest.raises(EstimateError, match="groups came without gallery_groups"):
        retrieval(x, x, labels="aabbb", gallery_labels="aabbb", groups=range(5))
    with pytest.raises(EstimateError, match="10 permutations cannot give"):
        retrieval(x, labels="aabbb", permutations=10)
