"""Adjusted p-values, max-T and equivalence maps against enumeration, statsmodels and Estimate."""

import itertools
import re
import time
import tracemalloc

import numpy as np
import pytest
from statsmodels.stats.multitest import multipletests

from imaginelens.estimates import Estimate, EstimateError, mcnemar, multiplicity, score_z, sign_flip
from imaginelens.estimates.multiplicity import adjust, equivalence_map, max_t

# Benjamini and Hochberg (1995), section 4.1
BENJAMINI_HOCHBERG = [
    0.0001, 0.0004, 0.0019, 0.0095, 0.0201, 0.0278, 0.0298, 0.0344, 0.0459, 0.3240, 0.4262, 0.5719,
    0.6528, 0.7590, 1.0000,
]  # fmt: skip
NAN = float("nan")


def correlated(
    examples: int = 40, cells: tuple[int, ...] = (3, 4), effect: float = 0.0, seed: int = 0
) -> np.ndarray:
    rng = np.random.default_rng(seed)
    shared = rng.normal(size=(examples, *(1 for _ in cells)))
    return 0.7 * shared + 0.7 * rng.normal(size=(examples, *cells)) + effect


@pytest.mark.parametrize(
    ("method", "theirs"), [("holm", "holm"), ("bh", "fdr_bh"), ("by", "fdr_by")]
)
def test_adjusted_pvalues_are_those_of_statsmodels(method: str, theirs: str) -> None:
    rng = np.random.default_rng(1)
    for p in (rng.uniform(size=20), rng.uniform(size=1), rng.uniform(size=60).round(1) ** 3):
        expected = multipletests(p, method=theirs)[1]
        np.testing.assert_allclose(adjust(p, method=method), expected, atol=1e-12)


def test_the_published_example() -> None:
    assert (adjust(BENJAMINI_HOCHBERG, method="bh") <= 0.05).sum() == 4
    assert (adjust(BENJAMINI_HOCHBERG, method="holm") <= 0.05).sum() == 3


@pytest.mark.parametrize("method", ["holm", "bh", "by"])
def test_a_missing_test_is_no_test(method: str) -> None:
    p = np.array([[0.01, NAN, 0.2], [0.03, 0.04, NAN]])
    adjusted = adjust(p, method=method)
    assert adjusted.shape == p.shape
    np.testing.assert_array_equal(np.isnan(adjusted), np.isnan(p))
    there = ~np.isnan(p)
    np.testing.assert_array_equal(adjusted[there], adjust(p[there], method=method))


@pytest.mark.parametrize(
    ("p", "method", "words"),
    [
        ([], "holm", "none of the 0 p-values"),
        ([NAN], "holm", "none of the 1 p-values"),
        ([0.1, 1.5], "holm", "1.5 is no p-value"),
        ([-0.1], "bh", "-0.1 is no p-value"),
        (["a"], "bh", "cannot be read as numbers"),
    ],
)
def test_what_is_no_pvalue_is_refused(p: list, method: str, words: str) -> None:
    with pytest.raises(EstimateError, match=re.escape(words)):
        adjust(p, method=method)


def brute(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Step-down and single-step p-values of a (unit, cell) map, sign vector by sign vector."""
    scale = np.sqrt((values**2).sum(0))
    every = [
        np.abs(np.array(signs) @ values) / scale
        for signs in itertools.product((1, -1), repeat=len(values))
    ]
    seen = every[0]

    def reached(cell: int, among: np.ndarray) -> float:
        return float(np.mean([flipped[among].max() >= seen[cell] - 1e-12 for flipped in every]))

    cells = range(values.shape[1])
    single = np.array([reached(cell, np.full(len(seen), True)) for cell in cells])
    remaining = np.array([reached(cell, seen <= seen[cell]) for cell in cells])
    down = np.array([remaining[seen >= seen[cell]].max() for cell in cells])
    return down, single


def test_few_units_are_enumerated() -> None:
    for seed in range(5):
        values = correlated(7, (4,), effect=0.5, seed=seed)
        found = max_t(values)
        down, single = brute(values)
        np.testing.assert_allclose(found.pvalues, down, atol=1e-12)
        np.testing.assert_allclose(found.single_step, single, atol=1e-12)
        assert (found.draws, found.exact, found.units) == (64, True, 7)


def test_groups_are_flipped_whole() -> None:
    values, groups = correlated(16, (3,), effect=0.4), list("aabbbcddeefffghh")
    labels = np.array(groups)
    sums = np.stack([values[labels == g].sum(0) for g in sorted(set(groups))])
    found = max_t(values, groups=groups)
    np.testing.assert_allclose(found.pvalues, brute(sums)[0], atol=1e-12)
    np.testing.assert_allclose(found.value, values.mean(0))
    assert (found.units, found.n.tolist()) == (8, [16] * 3)


def test_one_cell_is_the_sign_flip_test() -> None:
    values = np.random.default_rng(0).normal(0.4, 1, 12)
    assert float(max_t(values).pvalues) == sign_flip(values)
    np.testing.assert_allclose(max_t([[1.0], [2.0], [3.0]]).pvalues, [0.25])


@pytest.mark.parametrize(("gained", "lost"), [(6, 1), (8, 0), (3, 3), (1, 0), (0, 0), (9, 4)])
def test_one_cell_of_changes_is_the_exact_mcnemar_test(gained: int, lost: int) -> None:
    changes = np.array([1.0] * gained + [-1.0] * lost + [0.0] * 30)
    found = max_t(changes[:, None], binary=True)
    expected = mcnemar(changes > 0, changes < 0).exact
    np.testing.assert_allclose(found.pvalues, [expected], atol=1e-12)
    np.testing.assert_allclose(found.statistic, [score_z(gained, lost, 30 + gained + lost, 0.0)])
    assert found.units == gained + lost


def test_random_flips_come_close_to_all() -> None:
    values = correlated(14, (5,), effect=0.5)
    every, some = max_t(values, draws=8_192), max_t(values, draws=8_191)
    assert every.exact
    assert not some.exact
    assert np.abs(every.pvalues - some.pvalues).max() < 0.02
    assert (some.pvalues >= 1 / 8_192).all()
    np.testing.assert_array_equal(some.pvalues, max_t(values, draws=8_191).pvalues)
    assert (max_t(values, draws=8_191, seed=1).pvalues != some.pvalues).any()


def test_the_chance_of_a_false_finding_is_exactly_bounded() -> None:
    """Over all sign flips of one data set, each as likely as the other under "no effect"."""
    values, level = correlated(7, (6,), seed=3), 0.1
    flipped = [np.array(s)[:, None] * values for s in itertools.product((1, -1), repeat=7)]
    false = np.mean([(max_t(v).pvalues <= level).any() for v in flipped])
    assert false <= level
    # what the guard finds: each cell tested by itself
    alone = np.mean([any(sign_flip(c) <= level for c in v.T) for v in flipped])
    assert alone > level


def test_what_a_map_contains_beside_a_cell() -> None:
    values = correlated(9, (3,), effect=0.6)
    found = max_t(values)
    np.testing.assert_allclose(max_t(np.repeat(values, 2, axis=1)).pvalues, found.pvalues.repeat(2))
    np.testing.assert_allclose(max_t(values[:, [2, 0, 1]]).pvalues, found.pvalues[[2, 0, 1]])
    np.testing.assert_allclose(max_t(values * [1e-9, 1.0, 1e170]).pvalues, found.pvalues)
    constant = max_t(np.concatenate([values, np.zeros((9, 2))], axis=1))
    np.testing.assert_array_equal(constant.pvalues[:3], found.pvalues)
    np.testing.assert_array_equal(constant.pvalues[3:], [1.0, 1.0])
    np.testing.assert_array_equal(max_t(np.zeros((5, 2, 2))).pvalues, np.ones((2, 2)))
    assert max_t(values.reshape(9, 3, 1)).pvalues.shape == (3, 1)


def test_step_down_gives_no_larger_pvalues_in_the_same_order() -> None:
    values = correlated(30, (4, 5), seed=2)
    values[:, 0] += 0.5
    found = max_t(values, draws=999)
    assert (found.pvalues <= found.single_step).all()
    assert (found.pvalues < found.single_step).any()
    order = np.argsort(-np.abs(found.statistic), axis=None)
    assert (np.diff(found.pvalues.ravel()[order]) >= 0).all()


def test_missing_values_are_left_out_and_counted() -> None:
    values = correlated(9, (3,), effect=0.5)
    values[:4, 1] = NAN
    values[:, 2] = NAN
    found = max_t(values)
    assert found.n.tolist() == [9, 5, 0]
    np.testing.assert_allclose(found.value[1], values[4:, 1].mean())
    for result in (found.value, found.pvalues, found.statistic, *found.intervals()):
        assert np.isnan(result).tolist() == [False, False, True]
    np.testing.assert_allclose(max_t(values[:, 1:]).pvalues[0], brute(values[4:, 1:2])[0])
    assert "2 cells (1 more without data)" in found.describe()


def test_memory_is_bounded_and_the_chunks_do_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    values = correlated(11, (6,), effect=0.4)
    whole = max_t(values)
    monkeypatch.setattr(multiplicity, "_AT_ONCE", 50)
    np.testing.assert_array_equal(max_t(values).pvalues, whole.pvalues)
    some = max_t(values, draws=100)
    assert some.draws == 100


def test_a_large_map_takes_seconds_and_little_memory() -> None:
    values = correlated(500, (28, 10))
    max_t(values, draws=9)
    start = time.process_time()
    max_t(values)
    assert time.process_time() - start < 5
    tracemalloc.start()
    max_t(values, draws=2_000).intervals()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 60e6


def test_the_interval_of_one_cell_is_no_narrower_than_its_own() -> None:
    for seed in range(10):
        values = correlated(25, (1,), effect=0.3, seed=seed)
        low, high = max_t(values).intervals()
        own = Estimate.mean(values[:, 0]).ci()
        assert low[0] <= own.low + 1e-12
        assert high[0] >= own.high - 1e-12
        assert high[0] - low[0] < 1.2 * (own.high - own.low)
    changes = np.array([1.0] * 4 + [-1.0] + [0.0] * 40)
    (low,), (high,) = max_t(changes[:, None], binary=True).intervals()
    own = Estimate.paired(changes > 0, changes < 0).ci()
    assert low <= own.low + 1e-9
    assert high >= own.high - 1e-9
    np.testing.assert_allclose([low, high], [own.low, own.high], atol=0.02)
    groups = np.arange(45) // 4
    (low,), (high,) = max_t(changes[:, None], binary=True, groups=groups).intervals()
    own = Estimate.paired(changes > 0, changes < 0, groups=groups).ci()
    assert low <= own.low + 1e-9
    assert high >= own.high - 1e-9


def test_intervals_move_with_the_values() -> None:
    groups = np.random.default_rng(0).integers(0, 15, 60)
    for given in (None, groups):
        values = correlated(60, (4,), effect=0.2)
        low, high = max_t(values, groups=given).intervals()
        moved = max_t(3 * values + 5, groups=given).intervals()
        np.testing.assert_allclose(moved, (3 * low + 5, 3 * high + 5), atol=1e-9)
        mirrored = max_t(-values, groups=given).intervals()
        np.testing.assert_allclose(mirrored, (-high, -low), atol=1e-9)


def test_intervals_invert_the_statistic() -> None:
    """At an end the map's own statistic, of the values measured from it, is the critical value."""
    values, groups = correlated(40, (3,), effect=0.2), np.arange(40) // 2
    for end in max_t(values, groups=groups).intervals():
        reached = np.abs([max_t(values - e, groups=groups).statistic[i] for i, e in enumerate(end)])
        np.testing.assert_allclose(reached, reached[0], rtol=1e-9)


def test_intervals_hold_in_all_cells_at_once() -> None:
    """In simulations with skewed, correlated cells; intervals of single cells do not."""
    rng = np.random.default_rng(0)
    joint, alone = [], []
    for _ in range(200):
        shared = rng.normal(size=(40, 1))
        values = shared + rng.normal(size=(40, 12)) + 1.0
        low, high = max_t(values, draws=499).intervals()
        joint.append(((low <= 1) & (high >= 1)).all())
        alone.append(all(1 in Estimate.mean(cell).ci() for cell in values.T))
    assert np.mean(joint) > 0.91
    assert np.mean(alone) < 0.85


def test_levels_nest_and_too_few_units_have_no_ends() -> None:
    values = correlated(30, (4,))
    narrow, wide = max_t(values).intervals(0.8), max_t(values).intervals(0.99)
    assert (wide[0] < narrow[0]).all()
    assert (wide[1] > narrow[1]).all()
    low, high = max_t(values[:4]).intervals(0.95)
    assert (low == -np.inf).all()
    assert (high == np.inf).all()
    changes = np.array([[1.0], [0.0], [0.0], [-1.0]])
    low, high = max_t(changes, binary=True).intervals(0.99)
    assert (low.tolist(), high.tolist()) == ([-1.0], [1.0])


def test_cells_that_never_changed() -> None:
    zeros = np.zeros((100, 2))
    low, high = max_t(zeros).intervals()
    assert (low == 0).all()
    assert (high == 0).all()
    low, high = max_t(zeros, binary=True).intervals()
    own = Estimate.paired(zeros[:, 0], zeros[:, 0]).ci()
    np.testing.assert_allclose([low[0], high[0]], [own.low, own.high], atol=1e-9)


@pytest.mark.parametrize(
    ("values", "options", "words"),
    [
        (np.zeros((5, 0)), {}, "shape (5, 0) has no cells"),
        (3.0, {}, "shape () has no cells"),
        ([[1.0, 2.0]], {}, "1 examples in one unit"),
        ([[1.0], [2.0]], {"groups": ["a", "a"]}, "2 examples in one unit"),
        ([[1.0], [2.0]], {"groups": ["a"]}, "1 group labels"),
        ([[1.0], [2.0]], {"groups": ["a", None]}, "1 of 2 group labels are missing"),
        ([[1.0], [np.inf]], {}, "1 of 2 values are infinite"),
        ([[NAN], [NAN]], {}, "all 2 values are nan"),
        ([[1.0], [0.5]], {"binary": True}, "1 of 2 values are no change"),
        ([["x"], ["y"]], {}, "cannot be read as numbers"),
    ],
)
def test_what_is_no_map_is_refused(values: object, options: dict, words: str) -> None:
    with pytest.raises(EstimateError, match=re.escape(words)):
        max_t(values, **options)
    with pytest.raises(EstimateError, match=re.escape(words)):
        equivalence_map(values, margin=0.1, **options)


def test_what_cannot_be_drawn_is_refused() -> None:
    with pytest.raises(EstimateError, match="0 draws"):
        max_t(correlated(), draws=0)
    with pytest.raises(EstimateError, match="level of 2"):
        max_t(correlated()).intervals(2)


def test_the_summary_names_the_smallest_pvalue() -> None:
    values = correlated(30, (3, 4))
    values[:, 1, 2] += 3
    words = max_t(values).describe()
    assert "1 cell differs from 0" in words
    assert "at cell (1, 2)" in words
    assert "12 cells: 9,999 random sign flips of 30 units" in words
    assert words in repr(max_t(values))


@pytest.mark.parametrize("binary", [False, True])
@pytest.mark.parametrize("grouped", [False, True])
def test_a_cell_has_the_equivalence_test_of_its_estimate(binary: bool, grouped: bool) -> None:
    values = correlated(60, (2, 3), effect=0.05)
    if binary:
        values = np.sign(values) * (np.abs(values) > 1.2)
    values[::7, 0, 1] = NAN
    groups = np.arange(60) // 3 if grouped else None
    found = equivalence_map(values, margin=0.3, groups=groups, binary=binary)
    for cell in np.ndindex(2, 3):
        column = values[:, *cell]
        if binary:
            after = np.where(np.isnan(column), NAN, column > 0)
            estimate = Estimate.paired(after, np.where(column < 0, 1.0, 0.0), groups=groups)
        else:
            estimate = Estimate.mean(column, groups=groups)
        assert found.pvalues[cell] == estimate.equivalence(0.3).pvalue


def test_the_two_claims_are_told_apart() -> None:
    """The largest p for all cells, Holm for those picked after looking."""
    values = np.random.default_rng(0).normal(0, 1, (60, 5))
    found = equivalence_map(values, margin=0.4)
    assert found.every == found.pvalues.max()
    np.testing.assert_array_equal(found.these, adjust(found.pvalues, method="holm"))
    assert '"Every cell is equivalent" can' in found.describe()
    assert '"These cells are equivalent" can be claimed of' in found.describe()
    values[:, 2] += 1
    worse = equivalence_map(values, margin=0.4)
    assert worse.every > 0.9
    assert '"Every cell is equivalent" cannot be claimed' in worse.describe()
    assert (worse.these < 0.05).sum() == int(
        re.search(r"claimed of (\d+) by name", worse.describe())[1]
    )


def test_every_cell_at_the_margin_is_rarely_claimed_equivalent() -> None:
    """The size of the intersection-union test, where it is largest: one cell at the margin."""
    rng = np.random.default_rng(1)
    at_margin = np.array([0.4, 0, 0, 0])
    tested = [equivalence_map(rng.normal(at_margin, 1, (200, 4)), margin=0.4) for _ in range(400)]
    every = np.mean([found.every < 0.05 for found in tested])
    assert 0.02 < every < 0.08


def test_an_untested_cell_is_named() -> None:
    values = np.random.default_rng(0).normal(0, 1, (60, 3))
    values[:, 1] = NAN
    found = equivalence_map(values, margin=0.5)
    assert np.isnan(found.pvalues).tolist() == [False, True, False]
    assert "2 cells (1 more without data)" in found.describe()
    values[0, 1] = 0.1  # one value cannot be tested, and so stands against the claim of every cell
    found = equivalence_map(values, margin=0.5)
    assert found.every == 1.0


def test_what_equivalence_cannot_be_asked_of_is_refused() -> None:
    values = correlated(40, (2,))
    for margin, binary in ((0, False), (-1, False), (NAN, False), (1, True)):
        with pytest.raises(EstimateError, match="margin of"):
            equivalence_map(np.sign(values), margin=margin, binary=binary)
    with pytest.raises(EstimateError, match="9 groups are too few"):
        equivalence_map(values, margin=0.1, groups=np.arange(40) % 9)
