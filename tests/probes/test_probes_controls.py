"""Controls say what else a label could have been read from: each gives its known answer."""

from dataclasses import replace

import numpy as np
import pytest

from imaginelens.hooks.errors import InputError
from imaginelens.probes import fitting
from imaginelens.probes.estimators import probe
from imaginelens.probes.fitting import fit_probe
from imaginelens.probes.label_controls import control_labels, random_features, shuffles
from imaginelens.probes.states import States


def readable(n: int = 100, *, seed: int = 0):
    rng = np.random.default_rng([seed, 4])
    y = np.arange(n) % 2
    x = rng.normal(size=(n, 6))
    x[:, 1] += 4 * y
    return x, y


def with_controls(x, y, **controls) -> States:
    made = {
        name.replace("_", " "): States.of(each, y.tolist(), label="colour")
        for name, each in controls.items()
    }
    return replace(States.of(x, y.tolist(), label="colour"), controls=made)


# ---- states as controls ------------------------------------------------------------------------


def test_a_raw_input_that_is_read_as_well_is_named() -> None:
    x, y = readable()
    pixels = np.random.default_rng(9).normal(size=(100, 20))
    pixels[:, 3] += 4.5 * y
    found = fit_probe(with_controls(x, y, raw_input=pixels, random_model=pixels[:, 4:]), kind="lda")
    assert found.verdict() == "decodable"
    raw = found.controls["raw input"].value
    assert raw > 0.95
    assert f"But it is read as well from raw input ({raw:.2f})" in found.summary()
    assert "It is read less well from random features" in found.summary()
    assert "random model" in found.summary().split("less well")[1]
    less = found.over("random model")
    assert less.procedure == "Tango score"
    assert less.value == pytest.approx(found.accuracy.value - found.controls["random model"].value)
    assert less.pvalue() < 0.001
    assert "raw input" in repr(found)


def test_controls_by_step_and_by_site() -> None:
    x, y = readable()
    steps = np.stack([np.zeros_like(x), x], axis=1)
    blank = with_controls(steps, y, dummy=np.stack([x, 0 * x], axis=1), raw_input=x)
    found = fit_probe(blank, kind="lda", step=1)
    assert found.accuracy.value > 0.9
    assert found.controls["dummy"].value < 0.7  # the dummy's own step 1, which is empty
    assert found.controls["raw input"].value > 0.9  # has no steps
    sites = States.of(np.stack([x, x], axis=1)[:, None], y.tolist(), sites=("a", "b"))
    other = States.of(np.stack([0 * x, x], axis=1)[:, None], y.tolist(), sites=("a", "b"))
    both = replace(sites, controls={"random model": other})
    assert fit_probe(both, kind="lda", site="a").controls["random model"].value < 0.7
    assert fit_probe(both, kind="lda", site="b").controls["random model"].value > 0.9
    renamed = replace(both, controls={"random model": replace(other, sites=("c", "d"))})
    with pytest.raises(InputError, match="the control has the sites"):
        fit_probe(renamed, kind="lda", site="b")


def test_a_control_that_lacks_rows_is_compared_on_those_it_has() -> None:
    x, y = readable()
    mask = np.ones((100, 1), bool)
    mask[:7] = False
    control = States.of(x, y.tolist(), mask=mask)
    found = fit_probe(
        replace(States.of(x, y.tolist()), controls={"random model": control}), kind="lda"
    )
    assert found.over("random model").n == 93
    assert found.controls["random model"].missing == 7
    short = replace(States.of(x, y.tolist()), controls={"dummy": States.of(x[:50])})
    with pytest.raises(InputError, match="the control has 50 examples and the states have more"):
        fit_probe(short, kind="lda")


def test_a_norm_that_carries_the_label_is_found_by_random_features() -> None:
    """No direction says anything; the length of the state does."""
    rng = np.random.default_rng(2)
    y = np.arange(200) % 2
    x = rng.normal(size=(200, 3))
    x /= np.linalg.norm(x, axis=1, keepdims=True)
    x *= (1 + 4 * y)[:, None]
    found = fit_probe(x, y, kind=probe("mlp", epochs=80), permutations=20)
    assert found.verdict() == "decodable"
    assert found.controls["random features"].value > 0.9
    assert "But it is read as well from random features" in found.summary()
    x = rng.normal(size=(200, 3))
    x[:, 1] += 6 * y - 3  # both classes are as long
    flat = fit_probe(x, y, kind=probe("mlp", epochs=80), permutations=20)
    assert flat.controls["random features"].value < 0.65
    assert flat.over("random features").pvalue() < 0.05


def test_controls_may_be_chosen_by_name_or_left_out() -> None:
    x, y = readable()
    states = with_controls(x, y, raw_input=x)
    assert set(fit_probe(states, kind="lda").controls) == {
        "shuffled labels",
        "control task",
        "random features",
        "raw input",
    }
    one = fit_probe(states, kind="lda", controls=["raw input"])
    assert set(one.controls) == {"raw input"}
    assert one.verdict() == "untested"
    assert fit_probe(states, kind="lda", controls=()).controls == {}
    name = fit_probe(states, kind="lda", controls="control task")
    assert name.selectivity.value > 0.2


# ---- the control task --------------------------------------------------------------------------


def words(n_types: int, per_type: int, *, width: int = 40, seed: int = 0):
    """States that say which word they stand for, and nothing more; a label for each word."""
    rng = np.random.default_rng([seed, 2])
    types = np.tile(np.arange(n_types), per_type)
    x = rng.normal(size=(n_types, width))[types] * 3 + 0.3 * rng.normal(size=(len(types), width))
    return x, (np.arange(n_types) % 2)[types], types


def test_selectivity_finds_a_probe_that_remembers_words() -> None:
    """Hewitt and Liang: any label of 20 words can be read from states that say the word."""
    x, y, types = words(20, 10)
    found = fit_probe(x, y, kind="lda", types=types)
    assert found.accuracy.value > 0.95
    assert found.controls["control task"].value > 0.95
    assert abs(found.selectivity.value) < 0.05
    assert found.verdict() == "not decodable"
    assert "above the control task (1.00)" in found.summary()
    assert not found.notes


def test_selectivity_is_large_where_the_state_says_the_label_and_not_the_word() -> None:
    rng = np.random.default_rng(0)
    types = np.tile(np.arange(20), 10)
    y = types % 2
    x = rng.normal(size=(200, 40))
    x[:, 0] += 5 * y
    found = fit_probe(x, y, kind="lda", types=types)
    assert found.accuracy.value > 0.95
    assert found.controls["control task"].value < 0.75
    assert found.selectivity.pvalue() < 0.001
    assert found.verdict() == "decodable"


def test_types_that_never_recur_are_said_to_tell_nothing_of_memory() -> None:
    x, y = readable()
    found = fit_probe(x, y, kind="lda")
    (note,) = found.notes
    assert "no type is in two folds" in note
    grouped = fit_probe(x, y, kind="lda", groups=np.arange(100) // 2)
    assert any("no type is in two folds" in each for each in grouped.notes)
    split = fit_probe(x, y, kind="lda", types=np.arange(100) // 2)
    assert not split.notes


def test_control_labels_are_one_per_type_and_as_frequent_as_the_true_ones() -> None:
    y = np.repeat([0, 1, 2, 2], 25)
    types = np.arange(100) // 5
    found = control_labels(y, types, seed=0)
    assert all(len(set(found[types == t])) == 1 for t in range(20))
    assert np.bincount(found).tolist() == [25, 25, 50]
    assert (control_labels(y, types, seed=0) == found).all()
    assert (control_labels(y, types, seed=1) != found).any()
    quantities = control_labels(np.linspace(0, 1, 100), np.arange(100), seed=0)
    assert sorted(quantities) == pytest.approx(np.linspace(0, 1, 100))


# ---- shuffled labels and random features -------------------------------------------------------


def test_shuffled_labels_are_read_at_chance() -> None:
    x, y = readable(60)
    found = fit_probe(x, y, kind="mass_mean", permutations=200)
    assert found.shuffled.shape == (200,)
    assert found.controls["shuffled labels"].value == pytest.approx(0.5, abs=0.03)
    assert found.controls["shuffled labels"].null is None
    assert found.pvalue == pytest.approx(1 / 201)


def test_shuffling_is_within_folds_and_without_groups_every_row_moves() -> None:
    y, split = np.arange(60) % 2, np.arange(60) // 12
    orders, amount = shuffles(y, split, None, n=40, seed=0)
    assert amount > 20
    for order in orders:
        assert (split[order] == split).all()
        assert np.bincount(y[order]).tolist() == [30, 30]


def test_few_ways_to_shuffle_are_said(monkeypatch: pytest.MonkeyPatch) -> None:
    """Groups of ten sizes cannot change places; rows within them can, or nothing could."""
    rng = np.random.default_rng(0)
    sizes = np.arange(4, 14)
    groups = np.repeat(np.arange(10), sizes)
    y = np.concatenate([np.arange(n) % 2 for n in sizes])
    x = rng.normal(size=(len(y), 4))
    assert not any("ways" in note for note in fit_probe(x, y, kind="ridge", groups=groups).notes)
    fixed = np.tile(np.arange(len(y)), (200, 1))
    monkeypatch.setattr(fitting, "shuffles", lambda *given, **options: (fixed, 0.0))
    found = fit_probe(x, y, kind="ridge", groups=groups)
    assert "the labels can be shuffled in 1 ways only" in found.notes


def test_random_features_keep_norms_and_missing_steps() -> None:
    x = np.random.default_rng(0).normal(size=(10, 3, 5))
    x[2, 1] = np.nan
    drawn = random_features(x, seed=0)
    np.testing.assert_allclose(
        np.linalg.norm(drawn, axis=-1), np.linalg.norm(x, axis=-1), rtol=1e-12
    )
    assert np.isnan(drawn[2, 1]).all()
    # not what a user's own generator of that seed gives
    own = np.random.default_rng(0).normal(size=(10, 3, 5))
    assert not np.isclose(drawn, own).any()
    np.testing.assert_array_equal(random_features(x, seed=0), drawn)


def test_pairs_of_opposite_labels_are_shuffled_within() -> None:
    """Base and source of a pair are one group, with one label each, in one order."""
    groups, y = np.repeat(np.arange(30), 2), np.tile([0, 1], 30)
    x = np.random.default_rng(0).normal(size=(60, 4)) + 3 * y[:, None]
    found = fit_probe(x, y, groups=groups, kind="lda")
    assert found.verdict() == "decodable"
    assert found.pvalue is not None
    assert found.pvalue < 0.02
