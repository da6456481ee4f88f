"""Similarity of collected states: closed forms, the same as input_dependence, and what fools it."""

import numpy as np
import pytest

import imaginelens as il
from imaginelens.estimates import NothingToFind, cka
from imaginelens.hooks.errors import InputError
from imaginelens.mediation import Dependence
from imaginelens.probes.mapping import probe_map
from imaginelens.probes.similarity import similarity
from imaginelens.probes.states import States


def drawn(
    n: int = 60, steps: int = 3, layers: int = 2, d: int = 40, mean: float = 0.0
) -> np.ndarray:
    return mean + np.random.default_rng(0).normal(size=(n, steps, layers, d))


# ---- closed forms ------------------------------------------------------------------------------


def test_the_mean_raw_cosine_is_the_share_of_the_common_vector() -> None:
    """|mu|^2 / (|mu|^2 + tr S), and centred -1 / (n - 1)."""
    x = np.random.default_rng(0).normal(size=(200, 1, 1, 900)) + 3.0
    found = similarity(States.of(x))
    assert found.curve()[0].value == pytest.approx(9 / (9 + 1), abs=0.005)
    assert found.inter(0).mean("centred") == pytest.approx(-1 / 199, abs=1e-3)
    assert found.inter(0).mean("raw") == pytest.approx(found.curve()[0].value)


def test_cka_of_independent_states_is_zero_and_of_rotated_ones_one() -> None:
    rng = np.random.default_rng(0)
    rotation = np.linalg.qr(rng.normal(size=(40, 40)))[0]
    values = drawn(100)
    values[:, 0, 1] = 3 * values[:, 0, 0] @ rotation + 7
    found = similarity(States.of(values))
    assert found.cka(0, 1, step=0) == pytest.approx(1)
    assert abs(found.cka(0, 1, step=1)) < 0.05
    assert abs(found.cka(0, 0, step=0, other_step=1)) < 0.05
    assert cka(values[:, 1, 0], values[:, 1, 1], debiased=False) > 0.25  # what debiasing is for


def test_ten_equal_variances_have_rank_ten() -> None:
    corners = np.concatenate([np.eye(10, 30), -np.eye(10, 30)])
    found = similarity(States.of(corners[:, None, None])).rank(0)
    assert found.effective == pytest.approx(10)
    assert found.participation == pytest.approx(10)
    assert found.null_effective < 19


def test_rsa_has_a_permutation_test() -> None:
    values = drawn(40)
    values[:, 1, 1] = 2 * values[:, 1, 0]
    found = similarity(States.of(values))
    assert found.rsa(0, 1, step=1).correlation == pytest.approx(1)
    assert found.rsa(0, 1, step=1, permutations=99).pvalue == 0.01
    assert found.rsa(0, 1, step=0, permutations=99).pvalue > 0.05


def test_a_cone_fools_the_raw_cosine_and_not_the_probe() -> None:
    """A cosine of .987 between all states, and a label that is read without an error."""
    kinds = np.arange(100) % 2
    x = 20 + np.random.default_rng(0).normal(size=(100, 1, 1, 400))
    x[:, 0, 0, 0] += 40.0 * (kinds - 0.5)
    given = States.of(x, kinds.tolist())
    found = similarity(given)
    assert found.curve()[0].value > 0.98
    assert probe_map(given, permutations=20).accuracy[0, 0] == 1.0
    assert found.retrieval(0).value == 1.0
    assert found.retrieval(0, permutations=99).pvalue == 0.01
    assert "does not say what can be read" in found.summary()


# ---- shared with input_dependence --------------------------------------------------------------


def test_it_is_the_same_as_input_dependence() -> None:
    values, labels = drawn(30), (np.arange(30) % 3).tolist()
    mask = np.ones((30, 3), bool)
    mask[20:, 2] = False
    given = States.of(values, labels, mask=mask)
    found, other = similarity(given), Dependence.of(values[:, :, 1], mask=mask, labels=labels)
    for step in (0, 2):
        for kind in ("raw", "centred", "whitened"):
            mine, theirs = found.inter(step, 1), other.inter(step)
            np.testing.assert_allclose(getattr(mine, kind), getattr(theirs, kind), atol=1e-12)
        assert found.retrieval(step, 1).value == other.retrieval(step).value
        assert found.rank(step, 1) == other.rank(step)
    np.testing.assert_allclose(found.matrix(1), other.intra.matrix("raw"))
    before = found.steps_curve(1)
    assert before[1].value == pytest.approx(other.intra.between(0, 1).value)
    assert before[2].n == 20


def test_the_interval_of_a_mean_over_pairs_covers() -> None:
    """200 draws of 20 states: rows of a matrix are not independent, and t on pairs covers less."""
    rng = np.random.default_rng(0)
    truth, covered = 0.8, []
    for _ in range(200):
        x = 2.0 + rng.normal(size=(20, 1, 1, 50))
        interval = similarity(States.of(x)).curve()[0].ci()
        covered.append(interval.low <= truth <= interval.high)
    assert 0.90 <= np.mean(covered) <= 0.985


def test_pairs_of_one_group_are_left_out() -> None:
    rng = np.random.default_rng(0)
    images = np.repeat(np.arange(15), 2)
    x = rng.normal(size=(15, 1, 1, 50))[images]
    whole = similarity(States.of(x, groups=images.tolist())).curve()[0]
    split = similarity(States.of(x)).curve()[0]
    assert split.value == pytest.approx(whole.value * 28 / 29 + 1 / 29)
    assert whole.n == 15


# ---- controls, tables, refusals ----------------------------------------------------------------


def with_controls() -> States:
    base = States.of(drawn(20, mean=1.0), (np.arange(20) % 2).tolist())
    dummy = States.of(drawn(20, mean=9.0))
    pixels = States.of(drawn(20, steps=1, layers=1, d=5))
    both = {"dummy": dummy, "raw input": pixels}
    return States(base.cells, base.mask, base.sites, base.labels, controls=both)


def test_controls_stand_beside() -> None:
    found = similarity(with_controls())
    frame = found.to_dataframe()
    assert len(frame) == 6
    assert (frame["raw, dummy"] > 0.95).all()
    assert (frame["raw, raw input"].abs() < 0.1).all()
    assert (frame.raw_low < frame.raw).all()
    assert frame.previous.isna().tolist() == [True, True, False, False, False, False]
    assert found.controls["dummy"].curve()[0].value > 0.95
    assert abs(found.cka(0, 0, control="raw input")) < 0.5
    assert found.rsa(0, 0, control="dummy", permutations=99).pvalue == 0.01  # the same noise
    assert "dummy 0.98" in found.summary()


@pytest.mark.parametrize(
    ("asked", "match"),
    [
        (lambda s: s.inter(3), "step 3 was asked for"),
        (lambda s: s.inter(0, "blocks.9"), "no site 'blocks.9'"),
        (lambda s: s.cka(0, 1, control="pixels"), "no control 'pixels'"),
    ],
)
def test_what_is_not_there_is_refused(asked: object, match: str) -> None:
    with pytest.raises(InputError, match=match):
        asked(similarity(with_controls()))


def test_too_little_to_compare_is_refused() -> None:
    with pytest.raises(InputError, match="no step is had by 3 examples"):
        similarity(States.of(np.zeros((2, 1, 4))))
    with pytest.raises(InputError, match="no labels to find"):
        similarity(States.of(drawn(10))).retrieval(0)
    with pytest.raises(NothingToFind):
        similarity(States.of(drawn(10), list(range(10)))).retrieval(0)


# ---- organisms ---------------------------------------------------------------------------------


def test_latents_that_are_aligned_look_collapsed_and_others_do_not() -> None:
    """latent-ignored-aligned is trained to be alike; latent-content must tell shapes apart."""
    found = {}
    for name in ("latent-ignored-aligned", "latent-content"):
        lens = il.load(name)
        runs = lens.run(lens.task(n=60, seed=0).base)
        found[name] = similarity(States.of(runs.latents.float().cpu().numpy()))
    aligned, content = (found[name].steps_curve()[1].value for name in found)
    assert aligned > content + 0.3
