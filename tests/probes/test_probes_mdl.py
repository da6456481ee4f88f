"""Description length: shuffled labels cost log2 K bits each, a clear signal far less."""

import numpy as np
import pytest

from imaginelens.hooks.errors import InputError
from imaginelens.probes.description_length import _blocks, description_length
from imaginelens.probes.states import States


def four_classes(n: int, d: int = 20, shift: float = 4.0) -> tuple[np.ndarray, list[str]]:
    rng = np.random.default_rng(0)
    kinds = rng.permutation(np.arange(n) % 4)
    x = rng.normal(size=(n, d)) + shift * np.eye(4, d)[kinds]
    return x, [("north", "east", "south", "west")[k] for k in kinds]


def test_shuffled_labels_of_four_classes_cost_two_bits_each() -> None:
    x, labels = four_classes(400)
    found = description_length(x, labels, shuffles=2)
    assert found.uniform_bits == 800
    assert found.shuffled_bits == pytest.approx(800, rel=0.04)
    assert found.bits < 300
    assert found.compression > 2.5
    assert found.saved.ci().low > 1
    assert found.per_item.value == pytest.approx(found.bits / 400)
    assert found.per_item.unit == "bits"
    assert "no probe 800" in found.summary()


@pytest.mark.slow
def test_a_thousand_shuffled_labels_cost_two_thousand_bits() -> None:
    x, labels = four_classes(1000, d=512)
    found = description_length(x, labels, shuffles=3)
    assert found.shuffled_bits == pytest.approx(2000, rel=0.03)


def test_noise_is_not_compressed_at_few_rows_in_many_dimensions() -> None:
    rng = np.random.default_rng(0)
    x = rng.normal(size=(100, 600))
    found = description_length(x, (rng.permutation(100) % 2).tolist(), shuffles=3)
    assert found.compression < 1.05
    assert found.saved.value < 0.1


def test_the_first_block_is_sent_without_a_probe() -> None:
    x, labels = four_classes(120)
    found = description_length(x, labels, shuffles=1)
    np.testing.assert_array_equal(found.code[found.blocks == 0], 2.0)
    assert np.bincount(found.blocks).tolist() == [30, 30, 60]
    assert (found.code[found.blocks > 0] != 2.0).all()


def test_more_data_of_the_same_signal_compress_better() -> None:
    few, many = (description_length(*four_classes(n), shuffles=1) for n in (80, 320))
    assert many.compression > few.compression > 1


def test_blocks_double_and_keep_groups_whole() -> None:
    groups = np.repeat(np.arange(50), 3)
    blocks = _blocks(150, groups, 16, 0)
    sizes = np.bincount(blocks)
    assert sizes.sum() == 150
    assert all(len(set(blocks[groups == g])) == 1 for g in range(50))
    np.testing.assert_allclose(sizes.cumsum() / 150, [1 / 8, 1 / 4, 1 / 2, 1], atol=0.02)
    assert not (np.diff(blocks) >= 0).all()  # drawn at random, not in the order given


def test_equal_rows_of_a_group_are_never_learned_before_they_are_sent() -> None:
    """30 images, four equal rows each, random labels: who splits images reads three of four."""
    rng = np.random.default_rng(0)
    images = np.repeat(np.arange(60), 4)
    x = rng.normal(size=(60, 300))[images]
    labels = (rng.permutation(60) % 2)[images].tolist()
    split = description_length(x, labels, shuffles=1)
    whole = description_length(x, labels, groups=images.tolist(), shuffles=1)
    assert split.compression > 1.3
    assert whole.compression < 1.1


def test_states_cells_and_arrays_give_the_same_code() -> None:
    x, labels = four_classes(80)
    given = States.of(x, labels)
    array = description_length(x, labels, shuffles=1)
    for other in (given, given.cell(step=0)):
        np.testing.assert_array_equal(description_length(other, shuffles=1).code, array.code)


@pytest.mark.parametrize(
    ("labels", "match"),
    [
        (None, "no labels to send"),
        (["a"] * 40, "all 40 labels are a"),
        ([0.5 * k for k in range(40)], "labels are quantities"),
    ],
)
def test_labels_that_have_no_code_are_refused(labels: list | None, match: str) -> None:
    x = np.random.default_rng(0).normal(size=(40, 3))
    with pytest.raises(InputError, match=match):
        description_length(x, labels)


def test_too_few_rows_are_refused() -> None:
    x = np.random.default_rng(0).normal(size=(20, 3))
    with pytest.raises(InputError, match="20 rows in 20 groups do not fill two blocks of 16"):
        description_length(x, list("ab" * 10))
