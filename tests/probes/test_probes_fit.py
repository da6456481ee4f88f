"""fit_probe gives the known answer, and is not fooled by what looks like one."""

from math import erf

import numpy as np
import pytest

from imaginelens.estimates import Estimate
from imaginelens.estimates.errors import EstimateError
from imaginelens.hooks.errors import InputError
from imaginelens.organisms import load
from imaginelens.probes.collecting import collect
from imaginelens.probes.estimators import kinds, probe
from imaginelens.probes.fitting import fit_probe
from imaginelens.probes.states import States

KINDS = sorted(kinds())
FAST = ("ridge", "mass_mean", "lda")


def signal(n: int, width: int, distance: float, *, seed: int = 0):
    """x = N(+-distance / 2, 1) along one direction, y which of the two."""
    rng = np.random.default_rng([seed, 5])
    y = np.arange(n) % 2
    x = rng.normal(size=(n, width))
    x[:, 0] += (y - 0.5) * distance
    return x, y


def shorter(kind: str) -> dict[str, int]:
    """Settings with which a probe that is trained takes little time."""
    return {"epochs": 100} if kind in ("mlp", "attentive") else {}


# ---- known answers -----------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["logistic", "ridge", "lda", "mass_mean"])
def test_the_interval_holds_bayes_accuracy(kind: str) -> None:
    """At D = 2 the best accuracy is Phi(1) = .8413."""
    x, y = signal(800, 3, 2.0)
    found = fit_probe(x, y, kind=kind, permutations=20)
    assert 0.5 * (1 + erf(1 / 2**0.5)) in found.accuracy.ci()
    assert found.accuracy.value == pytest.approx(0.8413, abs=0.03)
    assert found.chance == pytest.approx(0.5)
    assert found.verdict() == "decodable"
    direction = found.direction
    assert direction.shape == (3,)
    assert direction[0] / np.linalg.norm(direction) > 0.99
    assert found.accuracy.pvalue() < 1e-6
    assert found.pvalue == pytest.approx(1 / 21)


@pytest.mark.parametrize("kind", KINDS)
def test_random_labels_of_wide_states_are_not_decodable(kind: str) -> None:
    rng = np.random.default_rng(123)
    x, y = rng.normal(size=(100, 3584)), np.arange(100) % 2
    found = fit_probe(x, y, kind=probe(kind, **shorter(kind)), permutations=20)
    assert found.verdict() == "not decodable"
    assert "is not decodable" in found.summary()
    assert found.pvalue > 0.05
    assert 0.5 in found.accuracy.ci()


@pytest.mark.parametrize(
    ("kind", "weak"), [("logistic", 1e-3), ("ridge", 1e-6), ("mass_mean", None), ("lda", None)]
)
def test_the_same_probes_remember_random_labels(kind: str, weak: float | None) -> None:
    """What makes the test above one that could fail: on the rows learned from they are perfect."""
    rng = np.random.default_rng(123)
    x, y = rng.normal(size=(100, 3584)), np.arange(100) % 2
    made = probe(kind, **({} if weak is None else {"strengths": (weak,)}))
    assert (made.fit(x, y).predict(x) == y).all()


@pytest.mark.parametrize("kind", KINDS)
def test_a_signal_in_a_narrow_cone_is_decodable(kind: str) -> None:
    """Raw cosine .987 between states, and every label can be read."""
    rng = np.random.default_rng(1)
    y = np.arange(120) % 2
    x = rng.normal(size=(120, 64)) * 0.1
    x[:, 0] += (2 * y - 1) * 1.2
    x += 13 * np.eye(64)[5]
    unit = x / np.linalg.norm(x, axis=1, keepdims=True)
    cosine = (unit @ unit.T)[~np.eye(120, dtype=bool)].mean()
    assert cosine == pytest.approx(0.987, abs=0.004)
    found = fit_probe(x, y, kind=probe(kind, **shorter(kind)), permutations=20)
    assert found.accuracy.value > 0.98
    assert found.verdict() == "decodable"


def test_quantities_have_r2() -> None:
    rng = np.random.default_rng(0)
    x = rng.normal(size=(400, 5))
    y = 3 + x[:, 0] + rng.normal(size=400)  # R^2 = 1/2
    found = fit_probe(x, y, kind="ridge", permutations=50)
    assert found.verdict() == "decodable"
    assert 0.5 in found.r2.ci()
    assert found.r2.value == pytest.approx(0.5, abs=0.08)
    by_hand = np.zeros(400)
    for k in range(5):
        by_hand[found.folds == k] = y[found.folds != k].mean()
    error, base = ((found.predictions - y) ** 2).sum(), ((y - by_hand) ** 2).sum()
    assert found.r2.value == pytest.approx(1 - error / base, abs=1e-12)
    assert found.direction.shape == (5,)
    for refused in ("accuracy",):
        with pytest.raises(InputError, match=r"use \.r2"):
            getattr(found, refused)
    with pytest.raises(InputError, match=r"use \.r2"):
        found.confusion()
    assert "R^2 0.5" in found.summary() or "R^2 0.4" in found.summary()
    nothing = fit_probe(x, rng.normal(size=400), kind="ridge", permutations=50)
    assert nothing.verdict() == "not decodable"


# ---- what would fool it ------------------------------------------------------------------------


def test_few_balanced_rows_without_signal_are_rarely_called_decodable() -> None:
    """n = 30: leaving one out would be biased below chance (.47); nothing here is either way."""
    rates, called = [], 0
    for seed in range(30):
        x = np.random.default_rng([seed, 3]).normal(size=(30, 10))
        found = fit_probe(x, np.arange(30) % 2, kind="lda", seed=seed, permutations=20)
        rates.append(found.accuracy.value)
        called += found.verdict() == "decodable"
        assert found.chance == pytest.approx(0.5)
    assert abs(np.mean(rates) - 0.5) < 0.035
    assert called <= 3


def test_the_permutation_test_holds_its_level() -> None:
    ps = [
        fit_probe(
            np.random.default_rng([seed, 8]).normal(size=(40, 6)),
            np.arange(40) % 4 // 3,
            kind="mass_mean",
            seed=seed,
            permutations=39,
            controls="shuffled labels",
        ).pvalue
        for seed in range(40)
    ]
    assert np.mean(np.array(ps) <= 0.05) <= 0.15
    assert 0.3 < np.mean(ps) < 0.75


def test_a_probe_that_remembers_pictures_is_found_out_by_groups() -> None:
    rng = np.random.default_rng(4)
    picture = np.repeat(np.arange(40), 5)  # five questions about each of 40 pictures
    y = np.repeat(rng.permutation(np.arange(40) % 2), 5)
    x = rng.normal(size=(40, 60))[picture] + 0.1 * rng.normal(size=(200, 60))
    naive = fit_probe(x, y, kind="lda")
    assert naive.accuracy.value > 0.95
    assert naive.verdict() == "decodable"  # 200 rows that are said to be independent
    found = fit_probe(x, y, kind="lda", groups=picture)
    assert found.verdict() == "not decodable"
    assert 0.5 in found.accuracy.ci()
    assert all(len(set(found.folds[picture == k])) == 1 for k in range(40))
    # and the control task says so even without groups, if it is told what could be remembered
    told = fit_probe(x, y, kind="lda", types=picture)
    assert told.controls["control task"].value > 0.9
    assert told.verdict() == "not decodable"
    assert "the control task" in told.summary()


def test_unequal_classes_have_the_larger_one_as_chance() -> None:
    rng = np.random.default_rng(0)
    y = (np.arange(200) % 5 == 0).astype(int)  # 80% are 0
    found = fit_probe(rng.normal(size=(200, 4)), y, kind="ridge", permutations=50)
    assert found.chance == pytest.approx(0.8, abs=0.001)
    assert found.accuracy.value > 0.7
    assert found.verdict() == "not decodable"


def test_seeds_and_repeats() -> None:
    x, y = signal(80, 4, 1.0)
    one, two = (fit_probe(x, y, kind="lda", permutations=20) for _ in range(2))
    np.testing.assert_array_equal(one.probabilities, two.probabilities)
    np.testing.assert_array_equal(one.shuffled, two.shuffled)
    other = fit_probe(x, y, kind="lda", permutations=20, seed=1)
    assert (other.folds != one.folds).any()


def test_standardisation_never_sees_the_rows_held_out() -> None:
    """One row far away, tested last, changes no prediction of the rows of its own fold."""
    x, y = signal(50, 3, 2.0)
    found = fit_probe(x, y, kind="ridge", controls=())
    mates = found.folds == found.folds[7]
    far = x.copy()
    far[7] *= 1e6
    again = fit_probe(far, y, kind="ridge", controls=())
    mates[7] = False
    np.testing.assert_allclose(again.probabilities[mates], found.probabilities[mates], atol=1e-9)


@pytest.mark.parametrize("kind", KINDS)
def test_states_that_are_all_equal_say_nothing(kind: str) -> None:
    x, y = np.full((60, 5), 0.1), np.arange(60) % 3
    found = fit_probe(x, y, kind=probe(kind, **shorter(kind)), permutations=20)
    assert found.verdict() == "not decodable"
    assert np.isfinite(found.probabilities).all()
    assert found.accuracy.value < 0.5


# ---- steps, sites and labels -------------------------------------------------------------------


def steps_of(n: int = 90, seed: int = 0):
    """Two steps: the label is on step 1 alone."""
    rng = np.random.default_rng([seed, 6])
    y = np.arange(n) % 3
    x = rng.normal(size=(n, 2, 6))
    x[np.arange(n), 1, y] += 4
    return x, y


def test_steps_stand_side_by_side_or_are_chosen_or_pooled() -> None:
    x, y = steps_of()
    beside = fit_probe(x, y, kind="lda", controls=())
    assert beside.accuracy.value > 0.85
    assert beside.where == "layer 0 at latent, all 2 steps side by side"
    direction = beside.direction
    assert direction.shape == (3, 2, 6)
    assert np.abs(direction[:, 1, :3]).max() > 3 * np.abs(direction[:, 0]).max()
    first = fit_probe(x, y, kind="lda", step=0, permutations=20)
    assert first.verdict() == "not decodable"
    last = fit_probe(x, y, kind="lda", step=-1, permutations=20)
    assert last.verdict() == "decodable"
    assert last.where == "layer 0 at latent[1]"
    pooled = fit_probe(x, y, kind="lda", pool="mean", controls=())
    assert 0.5 < pooled.accuracy.value
    assert pooled.where == "layer 0 at latent, mean over steps"


def test_ragged_steps() -> None:
    x, y = steps_of()
    mask = np.ones((90, 2), bool)
    mask[::4, 0] = False
    ragged = States.of(x, y.tolist(), mask=mask)
    with pytest.raises(InputError, match=r"23 of 90 examples lack .* kind='attentive'"):
        fit_probe(ragged, kind="lda")
    assert fit_probe(ragged, kind="lda", pool="mean", controls=()).accuracy.n == 90
    assert fit_probe(ragged, kind="lda", step=0, controls=()).accuracy.n == 67
    found = fit_probe(ragged, kind="attentive", controls=())
    assert found.accuracy.value > 0.8
    assert found.where.endswith("the set of steps")
    x[::4, 0] = np.nan
    with pytest.raises(InputError, match="pass mask="):
        fit_probe(x, y)


def test_labels_by_step_make_each_step_a_row_and_an_example_a_group() -> None:
    rng = np.random.default_rng(0)
    y = rng.integers(0, 2, (60, 3))
    x = rng.normal(size=(60, 3, 4))
    x[..., 0] += 5 * y
    found = fit_probe(States.of(x, y.tolist()), kind="lda", permutations=20)
    assert found.accuracy.n == 180
    assert found.accuracy.n_groups == 60
    assert found.verdict() == "decodable"
    assert all(len(set(found.folds[found.rows == i])) == 1 for i in range(60))
    for i in range(180):
        assert found.y[i] == y[found.rows[i], found.steps[i]]
    with pytest.raises(InputError, match=r"one per .example, step., and pool='mean' reads all"):
        fit_probe(States.of(x, y.tolist()), kind="lda", pool="mean")
    with pytest.raises(InputError, match="kind='attentive' reads all"):
        fit_probe(States.of(x, y.tolist()), kind="attentive")


def test_several_sites_must_be_named() -> None:
    rng = np.random.default_rng(0)
    y = np.arange(60) % 2
    x = rng.normal(size=(60, 1, 2, 4))
    x[:, 0, 1, 2] += 5 * y
    states = States.of(x, y.tolist(), sites=("early", "late"))
    with pytest.raises(InputError, match="2 sites, early to late; name one by site="):
        fit_probe(states)
    assert fit_probe(states, kind="lda", site="late", controls=()).accuracy.value > 0.9
    assert fit_probe(states, kind="lda", site=0, controls=()).accuracy.value < 0.8
    with pytest.raises(InputError, match="no site 'middle'"):
        fit_probe(states, site="middle")


def test_rows_without_a_label_are_left_out() -> None:
    x, y = signal(60, 3, 4.0)
    labels = [None if i < 10 else int(v) for i, v in enumerate(y)]
    found = fit_probe(States.of(x, labels), kind="lda", controls=())
    assert found.accuracy.n == 50
    assert found.rows.min() == 10


def test_labels_given_beside_states_replace_theirs() -> None:
    x, y = signal(60, 3, 4.0)
    states = States.of(x, ["a", "b", "c"] * 20, label="letter")
    found = fit_probe(states, y.tolist(), kind="lda", groups=np.arange(60), controls=())
    assert found.classes == (0, 1)
    assert found.groups is not None


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"kind": "ride"}, "no kind of probe 'ride'; did you mean 'ridge'"),
        ({"y": None}, "need y="),
        ({"y": [0] * 60}, "needs two"),
        ({"y": [0, 1] * 20}, "40 labels came with 60 examples"),
        ({"y": [0.5] * 60}, "needs two"),
        ({"y": np.linspace(0, 1, 60), "kind": "lda"}, "reads classes"),
        ({"y": [0] * 59 + [1]}, "cannot be both learned and tested"),
        ({"n_folds": 61}, "60 rows are too few for 61 folds"),
        ({"groups": [0] * 30 + [1] * 29}, "59 groups came with 60 examples"),
        ({"step": 3}, "no step 3 in states of 1 steps"),
        ({"step": 0, "pool": "mean"}, "give one of them"),
        ({"pool": "max"}, "'mean' is the one"),
        ({"controls": ["nonsense"]}, "no control 'nonsense' here; there are shuffled labels"),
        ({"permutations": 10}, "10 permutations cannot give a p-value below 0.05"),
        ({"types": [1, 2]}, "2 types came with 60 examples"),
        ({"types": [1] * 60}, "a single type"),
        ({"kind": "mass_mean", "strengths": (1.0,)}, "no parameter 'strengths'; it has none"),
    ],
)
def test_what_does_not_fit_is_told_in_a_sentence(change: dict, said: str) -> None:
    x, y = signal(60, 3, 1.0)
    given = {"y": y, "kind": "ridge", **change}
    with pytest.raises(InputError, match=said) as caught:
        fit_probe(x, **given)
    assert "\n" not in str(caught.value)


def test_nan_states_and_too_few_groups() -> None:
    x, y = signal(60, 3, 1.0)
    with pytest.raises(EstimateError, match="9 groups are too few groups"):
        fit_probe(x, y, groups=np.arange(60) % 9)
    x[4, 1] = np.nan
    with pytest.raises(InputError, match="1 states are nan"):
        fit_probe(x, y)


def test_groups_that_leak_equal_content_are_refused_or_made() -> None:
    x, y = signal(60, 3, 1.0)
    keys = tuple(f"picture {i // 2}" for i in range(60))
    y = np.repeat(y[:30], 2)
    states = States.of(x, y.tolist())
    same = States(states.cells, states.mask, states.sites, states.labels, keys=keys)
    found = fit_probe(same, kind="lda", controls=())
    assert found.accuracy.n_groups == 30
    assert found.notes[0] == "examples of equal content were kept in one group"
    with pytest.raises(InputError, match="examples 0 and 1 have the same content and are in diff"):
        fit_probe(same, kind="lda", groups=np.arange(60))


# ---- the result --------------------------------------------------------------------------------


def test_confusion_and_calibration() -> None:
    x, y = steps_of(300)
    found = fit_probe(x, np.array(["bar", "cross", "ring"])[y], kind="lda", step=1, controls=())
    table = found.confusion()
    assert table.counts.sum() == 300
    assert table.counts.trace() / 300 == found.accuracy.value
    assert table.classes == ("bar", "cross", "ring")
    assert len(repr(table).splitlines()) == 5
    honest = found.calibration()
    assert honest.counts.sum() == 300
    assert honest.ece < 0.08
    truth = np.eye(3)[y]
    by_hand = ((found.probabilities - truth) ** 2).sum(1).mean()
    assert honest.brier.value == pytest.approx(by_hand)
    assert isinstance(honest.brier, Estimate)
    with pytest.raises(InputError, match="0 bins"):
        found.calibration(bins=0)


def test_calibration_finds_a_probe_that_is_too_sure() -> None:
    x, y = signal(200, 150, 1.0)
    bold = fit_probe(x, y, kind=probe("logistic", strengths=(1e-5,)), controls=())
    meek = fit_probe(x, y, kind="logistic", controls=())
    assert bold.calibration().ece > 2 * meek.calibration().ece
    assert bold.calibration().brier.value > meek.calibration().brier.value


@pytest.mark.parametrize("kind", FAST)
def test_the_text_of_a_result(kind: str) -> None:
    x, y = signal(60, 3, 4.0)
    found = fit_probe(States.of(x, y.tolist(), label="colour"), kind=kind, permutations=20)
    text = repr(found)
    assert text.startswith(f"colour: decodable   ({kind} probe, layer 0 at latent)")
    assert len(text.splitlines()) < 12
    said = found.summary()
    assert said.startswith(f"Colour is decodable from layer 0 at latent ({kind} probe): accuracy")
    assert said.endswith("does not say that the model uses it.")
    untested = fit_probe(x, y, kind=kind, controls="random features")
    assert untested.verdict() == "untested"
    assert "nothing is claimed" in untested.summary()
    assert np.isnan(untested.pvalue)
    with pytest.raises(InputError, match="no control 'control task' to compare with"):
        _ = untested.selectivity


# ---- organisms ---------------------------------------------------------------------------------

MECHANISMS = ("uses the", "pointer", "points", "stores", "computes", "because", "mechanism")


@pytest.mark.parametrize("name", ["latent-content", "latent-pointer"])
def test_shape_and_name_decode_from_the_latents_of_both_organisms(name: str) -> None:
    lens = load(name)
    task = lens.task(n=128, seed=3)
    states = collect(lens, task, labels="name", batch_size=64)
    last = fit_probe(states, kind="lda", step=1, permutations=40)
    hunts = [each["hunt"] for each in task.base]
    shapes = [[hunt.shape_of(hunt.path[t + 1]) for t in range(2)] for hunt in hunts]
    both = (last, fit_probe(states.relabelled(shapes, label="shape"), kind="lda", step=1))
    for found in both:
        assert found.verdict() == "decodable", found
        assert not any(word in found.summary().replace("model uses it", "") for word in MECHANISMS)
    assert set(last.controls) >= {"random model", "raw input", "dummy", "control task"}
    for control in ("random model", "dummy", "random features"):
        assert last.over(control).value > 0
        assert last.over(control).pvalue() < 0.05
