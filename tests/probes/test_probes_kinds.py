"""Each kind of probe against closed forms, scikit-learn, TransformerLens and planted answers."""

import pickle
import re
from math import erf

import numpy as np
import pytest
import torch
from sklearn.base import clone
from sklearn.covariance import ledoit_wolf_shrinkage
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.neighbors import NearestCentroid
from transformer_lens.tools.analysis.sparse_probing import fit_sparse_probe

from imaginelens.hooks.errors import InputError
from imaginelens.probes.attentive import AttentiveProbe
from imaginelens.probes.estimators import Probe, kinds, probe
from imaginelens.probes.frames import Design, Frame, deal
from imaginelens.probes.label_controls import shuffles
from imaginelens.probes.linear import LogisticProbe, RidgeProbe
from imaginelens.probes.mass_mean import LdaProbe, MassMeanProbe, ledoit_wolf
from imaginelens.probes.mlp import MlpProbe
from imaginelens.probes.softmax import Softmax
from imaginelens.probes.sparse import SparseProbe, largest_differences

KINDS = sorted(kinds())
LINEAR = ("logistic", "ridge", "mass_mean", "lda", "sparse")


def classes(n: int, width: int, *, n_classes: int = 3, shift: float = 3.0, seed: int = 0):
    """Normal states whose class moves one coordinate each."""
    rng = np.random.default_rng([seed, 99])
    y = rng.integers(0, n_classes, n)
    x = rng.normal(size=(n, width))
    x[np.arange(n), y] += shift
    return x, y


# ---- the contract of all kinds -----------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_the_contract(kind: str) -> None:
    x, y = classes(60, 5)
    names = np.array(["ring", "bar", "cross"])[y]
    fresh = probe(kind)
    assert not [name for name in vars(fresh) if name.endswith("_")]
    with pytest.raises(InputError, match="has learned nothing yet; call fit"):
        fresh.predict(x)
    copy = clone(fresh)
    assert type(copy) is type(fresh)
    assert copy.get_params() == fresh.get_params()
    assert fresh.fit(x, names) is fresh
    assert set(vars(fresh)) - set(fresh.get_params()) == {"classes_", "readout_", "strength_"}
    assert fresh.classes_.tolist() == ["bar", "cross", "ring"]
    shares = fresh.predict_proba(x)
    assert shares.shape == (60, 3)
    np.testing.assert_allclose(shares.sum(1), 1)
    assert (fresh.classes_[shares.argmax(1)] == fresh.predict(x)).all()
    assert (fresh.predict(x) == names).mean() > 0.75
    again = probe(kind).fit(x, names)
    np.testing.assert_array_equal(again.predict_proba(x), shares)


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_learned_does_not_depend_on_how_coordinates_are_scaled(kind: str) -> None:
    x, y = classes(80, 4, n_classes=2)
    fitted = probe(kind).fit(x, y).predict(x)
    scale = 1.0 if kind in ("mass_mean", "lda") else np.array([1e3, 1.0, 1e-3, 1.0])
    np.testing.assert_array_equal(probe(kind).fit(7 + x * scale, y).predict(7 + x * scale), fitted)


@pytest.mark.parametrize("kind", LINEAR)
def test_the_direction_points_from_the_first_class_to_the_second(kind: str) -> None:
    rng = np.random.default_rng(3)
    y = np.arange(200) % 2
    x = rng.normal(size=(200, 6))
    x[:, 2] += 4 * y
    found = probe(kind).fit(x, y).direction_
    assert found.shape == (6,)
    assert found[2] / np.linalg.norm(found) > 0.9
    three = probe(kind).fit(*classes(90, 5)).direction_
    assert three.shape == (3, 5)
    np.testing.assert_allclose(three.sum(0), 0, atol=1e-12)


@pytest.mark.parametrize("kind", ["mlp", "attentive"])
def test_a_probe_that_is_not_linear_has_no_direction(kind: str) -> None:
    with pytest.raises(InputError, match="is not linear and has no direction"):
        _ = probe(kind).fit(*classes(40, 3)).direction_


@pytest.mark.parametrize("kind", ["ridge", "mlp", "attentive"])
def test_quantities(kind: str) -> None:
    rng = np.random.default_rng(1)
    x = rng.normal(size=(300, 4))
    y = 100 + 5 * x[:, 0] + 0.5 * rng.normal(size=300)
    fitted = probe(kind).fit(x[:200], y[:200])
    error = ((fitted.predict(x[200:]) - y[200:]) ** 2).mean()
    assert 1 - error / y[200:].var() > 0.9
    with pytest.raises(InputError, match="quantities, which have no probabilities"):
        fitted.predict_proba(x)


def test_an_unknown_kind_names_the_nearest() -> None:
    with pytest.raises(InputError, match=r"no kind of probe 'logit'; did you mean 'logistic'\?"):
        probe("logit")
    with pytest.raises(InputError, match="no parameter 'c'; it has strengths, seed"):
        probe("logistic", c=1)


@pytest.mark.parametrize(
    ("kind", "x", "y", "said"),
    [
        ("ridge", np.ones((3, 2)), [1, 1, 1], "all 3 labels are 1"),
        ("ridge", np.ones((3, 2)), [1, 0], "2 labels came with 3 rows"),
        ("ridge", [[1.0, np.nan], [0, 0]], [1, 0], "1 of 2 rows of states are nan or infinite"),
        ("lda", np.ones((3, 2)), [0.5, 1.5, 2.5], "reads classes, and the labels are quantities"),
        ("ridge", np.ones((3, 2)), [0.5, np.nan, 2.5], "1 labels are nan or infinite"),
        ("ridge", np.ones(3), [0, 1, 0], re.escape("takes (row, d_model)")),
        ("ridge", [["a"]], [0], "cannot be read as numbers"),
        ("attentive", np.full((2, 2, 2), np.nan), [0, 1], "2 of 2 rows of states are nan"),
        ("attentive", [[[1, np.nan]], [[0, 0]]], [0, 1], "1 of 2 rows of states are nan"),
        ("ridge", np.ones((2, 2)), [[0], [1]], "one name or number per row"),
        ("sparse", np.eye(3), [0, 1, 0], "k is 0"),
    ],
)
def test_bad_input_is_told_in_a_sentence(kind: str, x, y, said: str) -> None:
    made = probe(kind, k=0) if kind == "sparse" else probe(kind)
    with pytest.raises(InputError, match=said):
        made.fit(np.asarray(x), y)


def test_states_of_another_width_are_refused() -> None:
    x, y = classes(40, 4)
    for kind in KINDS:
        with pytest.raises(InputError, match="width 3 came to a probe that was fitted at width 4"):
            probe(kind).fit(x, y).predict(x[:, :3])


def test_labels_come_as_lists_tensors_or_objects() -> None:
    x, y = classes(60, 4, n_classes=2)
    want = probe("ridge").fit(x, y)
    for given in (y.tolist(), torch.from_numpy(y), y.astype(bool), np.array(y, dtype=object)):
        got = probe("ridge").fit(torch.from_numpy(x), given)
        assert got.classes_.tolist() == [0, 1]
        np.testing.assert_array_equal(got.predict(x), want.predict(x))


# ---- the same as others compute ----------------------------------------------------------------


@pytest.mark.parametrize("n_classes", [2, 4])
@pytest.mark.parametrize("strength", [1e-3, 1e-1, 1.0])
def test_logistic_is_the_optimum_of_sklearn(n_classes: int, strength: float) -> None:
    x, y = classes(90, 7, n_classes=n_classes, shift=1.5)
    mine = LogisticProbe(strengths=(strength,)).fit(x, y)
    z = (x - x.mean(0)) / x.std(0)
    theirs = LogisticRegression(C=1 / (strength * 7 * len(x)), tol=1e-10, max_iter=9999).fit(z, y)
    np.testing.assert_allclose(mine.predict_proba(x), theirs.predict_proba(z), atol=2e-4)


def test_many_label_vectors_together_are_what_each_is_alone() -> None:
    x, _ = classes(40, 6)
    z = x - x.mean(0)
    y = np.random.default_rng(0).integers(0, 3, (5, 40))
    used = np.random.default_rng(1).random((5, 40)) < 0.8
    penalty = np.array([0.01, 0.1, 1.0, 0.3, 3.0])
    together = Softmax.of(z, y, n_classes=3, used=used).fit(penalty, tolerance=1e-16)
    for i in range(5):
        alone = Softmax.of(z[used[i]] - 0, y[i : i + 1, used[i]], n_classes=3)
        shared = Softmax.of(z, y[i : i + 1], n_classes=3, used=used[i : i + 1])
        one = shared.fit(penalty[i : i + 1], tolerance=1e-16)
        np.testing.assert_allclose(together[i], one[0], atol=1e-6)
        w, b = alone.outside(alone.fit(penalty[i : i + 1], tolerance=1e-16))
        theirs = LogisticRegression(C=1 / (penalty[i] * used[i].sum()), tol=1e-10, max_iter=9999)
        theirs.fit(z[used[i]], y[i, used[i]])
        want = theirs.decision_function(z)
        got = shared.scores(one)[0]
        np.testing.assert_allclose(
            got - got.mean(1, keepdims=True), want - want.mean(1, keepdims=True), atol=1e-3
        )
        assert w.shape == (1, 3, 6)
        assert b.shape == (1, 3)


def test_ridge_is_sklearns_and_so_is_its_choice_of_penalty() -> None:
    rng = np.random.default_rng(0)
    x = rng.normal(size=(60, 30))
    y = x[:, 0] + rng.normal(size=60)
    mine = RidgeProbe(strengths=(0.1,)).fit(x, y)
    z = (x - x.mean(0)) / x.std(0)
    theirs = Ridge(alpha=0.1 * 30 * 60).fit(z, y)
    np.testing.assert_allclose(mine.predict(x), theirs.predict(z), atol=1e-10)

    # the closed form of whole inner folds against refitting without each
    frame = Frame.of(x, standardise=True, rotate=True)
    parts = deal(np.zeros(60), None, 3, 0)
    strengths = RidgeProbe().strengths
    errors = []
    for strength in strengths:
        out = np.zeros(60)
        for k in range(3):
            model = Ridge(alpha=strength * frame.size * 60).fit(z[parts != k], y[parts != k])
            out[parts == k] = model.predict(z[parts == k])
        errors.append(((out - y) ** 2).sum())
    assert RidgeProbe().fit(x, y).strength_ == strengths[int(np.argmin(errors))]
    assert len(set(errors)) == len(errors)


def test_ridge_in_the_span_of_few_rows_is_ridge_in_all_coordinates() -> None:
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(20, 300)), np.arange(20) % 2
    new = rng.normal(size=(50, 300))
    design = Design(x - x.mean(0), Frame.of(x, standardise=True, rotate=True), None)
    assert design.frame(x).shape == (20, 20)
    z, znew = (x - x.mean(0)) / x.std(0), (new - x.mean(0)) / x.std(0)
    for strength in (1e-3, 1.0):
        mine = RidgeProbe(strengths=(strength,)).fit(x, y).readout_.scores(new)[:, 1]
        theirs = Ridge(alpha=strength * 300 * 20).fit(z, y).predict(znew)
        np.testing.assert_allclose(mine, theirs, atol=1e-9)


def test_mass_mean_is_the_nearest_mean_and_its_direction_the_difference() -> None:
    x, y = classes(90, 5, shift=1.5)
    np.testing.assert_array_equal(
        MassMeanProbe().fit(x, y).predict(x), NearestCentroid().fit(x, y).predict(x)
    )
    two = y < 2
    found = MassMeanProbe().fit(x[two], y[two])
    theta = x[y == 1].mean(0) - x[y == 0].mean(0)
    direction = found.direction_
    np.testing.assert_allclose(direction / np.linalg.norm(direction), theta / np.linalg.norm(theta))
    midpoint = (x[y == 1].mean(0) + x[y == 0].mean(0)) / 2
    np.testing.assert_allclose(found.predict_proba(midpoint[None]), [[0.5, 0.5]])


def test_mass_mean_far_from_the_origin_loses_no_digits() -> None:
    x, y = classes(90, 5, shift=1.5)
    near, far = MassMeanProbe().fit(x, y), MassMeanProbe().fit(x + 1e6, y)
    np.testing.assert_allclose(far.predict_proba(x + 1e6), near.predict_proba(x), atol=1e-5)


@pytest.mark.parametrize("width", [4, 200])
def test_lda_is_sklearns_at_the_same_shrinkage(width: int) -> None:
    x, y = classes(60, width, shift=2)
    mine = LdaProbe(shrinkage=0.3).fit(x, y)
    within = x - np.stack([x[y == k].mean(0) for k in range(3)])[y]
    covariance = 0.7 * within.T @ within / 60
    covariance += 0.3 * np.trace(within.T @ within / 60) / width * np.eye(width)
    means = np.stack([x[y == k].mean(0) for k in range(3)])
    weights = np.linalg.solve(covariance, means.T).T
    bias = -(weights * means).sum(1) / 2 + np.log(np.bincount(y) / 60)
    new = np.random.default_rng(5).normal(size=(40, width))
    want = new @ weights.T + bias
    got = mine.readout_.scores(new)
    np.testing.assert_allclose(
        got - got.mean(1, keepdims=True), want - want.mean(1, keepdims=True), atol=1e-8
    )
    if width == 4:  # scikit-learn scales each class before it shrinks, so only without shrinkage
        theirs = LinearDiscriminantAnalysis(solver="lsqr").fit(x, y)
        np.testing.assert_allclose(
            LdaProbe(shrinkage=0.0).fit(x, y).predict_proba(new),
            theirs.predict_proba(new),
            atol=1e-8,
        )


@pytest.mark.parametrize(("n", "width"), [(50, 5), (20, 60)])
def test_the_share_of_ledoit_and_wolf(n: int, width: int) -> None:
    x = np.random.default_rng(0).normal(size=(n, width)) * np.arange(1, width + 1)
    x -= x.mean(0)
    want = ledoit_wolf_shrinkage(x, assume_centered=True)
    assert ledoit_wolf(x, width=width) == pytest.approx(want, abs=1e-12)
    rotated = x @ np.linalg.qr(x.T)[0]  # in coordinates of their span, the same
    assert ledoit_wolf(rotated, width=width) == pytest.approx(want, abs=1e-9)


@pytest.mark.parametrize("k", [1, 3, 6])
def test_sparse_chooses_the_coordinates_of_transformer_lens(k: int) -> None:
    x, y = classes(200, 40, n_classes=2, shift=1.0)
    x[:, 5:9] += 0.6 * y[:, None]
    first = fit_sparse_probe(torch.from_numpy(x), torch.from_numpy(y), k=k, seed=0)
    train = first.train_indices.numpy()
    # theirs takes raw differences; on coordinates of one spread, both are the same
    x = (x - x[train].mean(0)) / x[train].std(0)
    theirs = fit_sparse_probe(torch.from_numpy(x), torch.from_numpy(y), k=k, seed=0)
    assert (theirs.train_indices == first.train_indices).all()
    mine = SparseProbe(k=k).fit(x[train], y[train])
    assert mine.coordinates_.tolist() == sorted(theirs.selected_features.tolist())
    test = theirs.test_indices.numpy()
    accuracy = (mine.predict(x[test]) == y[test]).mean()
    assert abs(accuracy - theirs.metrics.accuracy) <= 0.05


def test_sparse_with_many_classes_finds_one_coordinate_of_each() -> None:
    x, y = classes(300, 50, n_classes=5)
    fitted = SparseProbe(k=5).fit(x, y)
    assert fitted.coordinates_.tolist() == [0, 1, 2, 3, 4]
    assert (fitted.readout_.arrays["weights"][:, 5:] == 0).all()
    assert largest_differences(x, y, 5)[:5].tolist() != [0, 1, 2, 3, 5]


# ---- what each can and cannot read -------------------------------------------------------------


def test_mlp_reads_what_no_line_does() -> None:
    rng = np.random.default_rng(2)
    x = rng.normal(size=(600, 8))
    y = (x[:, 0] * x[:, 1] > 0).astype(int)
    rates = {
        kind: (probe(kind).fit(x[:400], y[:400]).predict(x[400:]) == y[400:]).mean()
        for kind in ("mlp", "logistic")
    }
    assert rates["mlp"] > 0.9
    assert rates["logistic"] < 0.6


def slots(n: int, n_steps: int, width: int, seed: int = 0):
    """States of which one step, marked on coordinate 0, has the label on coordinate 1."""
    rng = np.random.default_rng([seed, 7])
    x, y = rng.normal(size=(n, n_steps, width)), rng.integers(0, 2, n)
    where = rng.integers(0, n_steps, n)
    x[..., 1] *= 4  # the other steps shout
    x[np.arange(n), where, 0] += 8
    x[np.arange(n), where, 1] = (2 * y - 1) * 2 + 0.2 * rng.normal(size=n)
    return x, y, where


def test_attentive_finds_the_step_that_holds_the_label_and_the_mean_does_not() -> None:
    x, y, where = slots(500, 6, 8)
    fitted = AttentiveProbe().fit(x[:350], y[:350])
    assert (fitted.predict(x[350:]) == y[350:]).mean() > 0.97
    pooled = probe("logistic").fit(x[:350].mean(1), y[:350])
    assert (pooled.predict(x[350:].mean(1)) == y[350:]).mean() < 0.75
    looked = fitted.attention(x[350:])
    np.testing.assert_allclose(looked.sum(2), 1)
    assert (looked.mean(1).argmax(1) == where[350:]).mean() > 0.9


def test_attentive_does_not_know_the_order_of_steps_nor_of_missing_ones() -> None:
    x, y, _ = slots(120, 4, 5)
    x[::3, 3] = np.nan
    fitted = AttentiveProbe().fit(x, y)
    want = fitted.predict_proba(x)
    np.testing.assert_allclose(fitted.predict_proba(x[:, [2, 0, 3, 1]]), want, atol=1e-12)
    np.testing.assert_allclose(fitted.predict_proba(x[::3, :3]), want[::3], atol=1e-12)
    assert (fitted.attention(x)[::3, :, 3] == 0).all()


def test_a_probe_with_hidden_parts_in_the_span_of_few_rows_is_the_one_it_was_trained_as() -> None:
    x, y = classes(30, 200)
    for made in (MlpProbe(), AttentiveProbe()):
        rows = made._rows(x)
        design = made.design(rows, None)
        (inside,) = made.learn(design, [y], 3)
        want = inside.scores(design.frame(rows))
        np.testing.assert_allclose(inside.outside(design.frame).scores(rows), want, atol=1e-8)


def test_training_many_label_vectors_together_changes_none() -> None:
    x, y = classes(50, 6)
    labellings = [y, np.roll(y, 7), y[::-1].copy()]
    for made in (MlpProbe(epochs=40), AttentiveProbe(epochs=40)):
        design = made.design(made._rows(x), None)
        together = made.learn(design, labellings, 3)
        for labels, readout in zip(labellings, together, strict=True):
            (alone,) = made.learn(design, [labels], 3)
            np.testing.assert_allclose(
                readout.scores(design.z), alone.scores(design.z), rtol=1e-3, atol=1e-3
            )


def test_a_class_without_rows_is_never_predicted() -> None:
    x, y = classes(60, 4)
    for kind in KINDS:
        made = probe(kind)
        kept = y != 1
        rows = made._rows(x)
        design = made.design(rows[kept], None)
        found, lone = made.learn(design, [y[kept], np.full(kept.sum(), 2)], 3)
        scores = found.scores(design.frame(rows))
        assert (scores[:, 1] == -np.inf).all()
        assert (made.probabilities(scores)[:, 1] == 0).all()
        assert (lone.scores(design.frame(rows)).argmax(1) == 2).all()


# ---- parts -------------------------------------------------------------------------------------


def test_a_constant_coordinate_is_left_alone() -> None:
    x, y = classes(60, 4, n_classes=2)
    x = np.hstack([x, np.full((60, 1), 0.1)])  # a mean of 0.1s is not 0.1 to the last bit
    for kind in KINDS:
        far = x.copy()
        far[:, 4] += 100
        fitted = probe(kind).fit(x, y)
        if kind not in ("mass_mean", "lda"):
            assert np.isfinite(fitted.predict_proba(far)).all()


def test_dealing_keeps_groups_whole_and_classes_even() -> None:
    groups = np.repeat(np.arange(30), 4)
    y = np.repeat(np.arange(30) % 3, 4)
    part = deal(y, groups, 5, seed=0)
    assert all(len(set(part[groups == g])) == 1 for g in range(30))
    counts = np.array([[((part == k) & (y == c)).sum() for c in range(3)] for k in range(5)])
    assert (counts == 8).all()


def test_shuffled_labels_keep_groups_and_the_balance_of_folds() -> None:
    rng = np.random.default_rng(0)
    groups = np.repeat(np.arange(40), 3)
    y, split = np.repeat(rng.integers(0, 2, 40), 3), np.repeat(np.arange(40) % 5, 3)
    orders, amount = shuffles(y, split, groups, n=30, seed=0)
    assert amount > np.log(1000)
    for order in orders:
        assert sorted(order) == list(range(120))
        assert (split[order] == split).all()
        assert (y[order].reshape(40, 3).std(1) == 0).all()
    assert len({tuple(y[order]) for order in orders}) > 25


def test_groups_of_unequal_size_with_one_label_each_change_places_too() -> None:
    sizes = np.arange(1, 21)
    groups, split = np.repeat(np.arange(20), sizes), np.repeat(np.arange(20) % 4, sizes)
    y = np.repeat(np.arange(20) % 2, sizes)
    orders, amount = shuffles(y, split, groups, n=20, seed=1)
    assert amount > np.log(1000)
    for order in orders:
        shuffled = y[order]
        assert all(len(set(shuffled[groups == g])) == 1 for g in range(20))
    assert len({tuple(y[order]) for order in orders}) > 10


def test_bayes_accuracy_of_known_distance() -> None:
    """x = N(+-1, 1) along one direction: the best accuracy is Phi(1) = .8413."""
    bayes = 0.5 * (1 + erf(1 / 2**0.5))
    assert round(bayes, 4) == 0.8413
    rng = np.random.default_rng(11)
    y = rng.integers(0, 2, 4000)
    x = rng.normal(size=(4000, 4)) + np.outer(2.0 * y - 1, np.eye(4)[3])
    for kind in ("logistic", "ridge", "lda", "mass_mean", "sparse"):
        fitted = probe(kind).fit(x[:1000], y[:1000])
        assert (fitted.predict(x[1000:]) == y[1000:]).mean() == pytest.approx(bayes, abs=0.02)
        gap = abs(fitted.predict_proba(x[1000:])[:, 1].mean() - y[1000:].mean())
        assert gap < 0.02


def test_a_probe_is_no_closure_that_could_not_be_copied() -> None:
    x, y = classes(40, 4)
    for kind in KINDS:
        fitted = probe(kind).fit(x, y)
        copy: Probe = pickle.loads(pickle.dumps(fitted))
        np.testing.assert_array_equal(copy.predict_proba(x), fitted.predict_proba(x))
