"""Design effects: their ends, and that with them the score test keeps its size in groups."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from imaginelens.estimates import design
from imaginelens.estimates.paired import crossed, paired
from imaginelens.estimates.student import mean


def changes(shape: tuple[int, ...], up: float, down: float, rng: np.random.Generator) -> np.ndarray:
    u = rng.random(shape)
    return np.where(u < up, 1.0, np.where(u < up + down, -1.0, 0.0))


def test_groups_of_one_have_none() -> None:
    rng = np.random.default_rng(0)
    for values in (np.zeros(30), np.ones(30), changes((30,), 0.2, 0.1, rng)):
        assert design.grouped(values, rng.permutation(30)) == pytest.approx(1.0)


def test_without_any_change_each_group_is_one_example() -> None:
    codes = np.repeat(np.arange(12), 5)
    assert design.grouped(np.zeros(60), codes) == 5.0
    assert design.grouped(np.ones(60), codes) == 5.0
    uneven = np.repeat(np.arange(10), [1] * 9 + [11])
    assert design.grouped(np.zeros(20), uneven) == pytest.approx((9 + 121) / 20)
    assert design.two_way(np.zeros((8, 20))) == 20.0
    assert design.two_way(np.zeros((20, 8))) == 20.0


def test_many_changes_are_believed() -> None:
    """Repeats count as one example, independent ones as themselves, but for the two more groups."""
    rng = np.random.default_rng(1)
    codes = np.repeat(np.arange(400), 4)
    repeated = np.repeat(changes((400,), 0.3, 0.3, rng), 4)
    assert design.grouped(repeated, codes) == pytest.approx(4.0, rel=0.01)
    alone = changes((1600,), 0.3, 0.3, rng)
    assert 1.0 <= design.grouped(alone, codes) < 1.15


def test_two_more_groups_are_what_is_added() -> None:
    values, codes = np.zeros(48), np.repeat(np.arange(12), 4)
    values[[0, 1, 2, 9]] = 1.0  # three in one group and one in another
    observed = mean(values, codes).variance / mean(values).variance
    assert observed > 1
    assert design.grouped(values, codes) == pytest.approx((2 * observed + 2 * 4.0) / 4)


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 10**6))
def test_it_is_at_least_one_and_blind_to_signs_and_labels(seed: int) -> None:
    rng = np.random.default_rng(seed)
    codes = np.unique(rng.integers(0, 12, size=60), return_inverse=True)[1]
    values = changes((60,), *rng.uniform(0, 0.4, size=2), rng)
    found = design.grouped(values, codes)
    assert found >= 1 - 1e-12
    assert design.grouped(-values, codes) == pytest.approx(found)
    order = rng.permutation(60)
    assert design.grouped(values[order], codes[order]) == pytest.approx(found)


@pytest.mark.parametrize(
    ("groups", "discordant", "difference"), [(20, 0.1, 0.0), (50, 0.02, 0.02), (50, 0.1, 0.05)]
)
def test_paired_covers_in_groups_that_repeat_one_example(
    groups: int, discordant: float, difference: float
) -> None:
    """Groups of 4 whose examples all change alike. The ungrouped test covers far too little."""
    rng, codes = np.random.default_rng(2), np.repeat(np.arange(groups), 4)
    up, down = (discordant + difference) / 2, (discordant - difference) / 2
    samples = np.repeat(changes((300, groups), up, down, rng), 4, axis=1)
    tests = [(paired(s, codes), paired(s)) for s in samples]
    tails = [[min(t.greater(difference), t.less(difference)) for t in pair] for pair in tests]
    grouped, alone = np.mean(np.array(tails) >= 0.025, axis=0)
    assert grouped >= 0.93
    assert alone < 0.85


def test_paired_covers_where_donors_decide() -> None:
    """20 recipients x 20 donors; half of the donors' changes hit all recipients alike."""
    rng = np.random.default_rng(3)
    tails = []
    for _ in range(200):
        by_donor = np.broadcast_to(changes((1, 20), 0.1, 0.05, rng), (20, 20))
        own = changes((20, 20), 0.1, 0.05, rng)
        values = np.where(rng.random((20, 20)) < 0.5, by_donor, own)
        tests = (crossed(values), paired(values.ravel()))
        tails.append([min(t.greater(0.05), t.less(0.05)) for t in tests])
    two_way, alone = np.mean(np.array(tails) >= 0.025, axis=0)
    assert two_way >= 0.93
    assert alone < 0.85


def test_no_group_gives_the_plain_counts() -> None:
    values = np.array([1.0, 1.0, 0.0, -1.0, 0.0])
    test = paired(values)
    assert (test.gained, test.lost, test.n, test.inflation, test.df) == (2, 1, 5, 1.0, 4)
    half = crossed(np.array([[1.0, np.nan], [0.0, -1.0]]))
    assert (half.gained, half.lost, half.n, half.df) == (1, 1, 3, 1)
