"""V-information: closed forms of a logistic truth, out of fold, and what it costs to be misled."""

import numpy as np
import pytest
from scipy import integrate, stats

from imaginelens.hooks.errors import InputError
from imaginelens.probes.fitting import fit_probe
from imaginelens.probes.information import pointwise_v_information, v_information
from imaginelens.probes.states import States

# bits, of y ~ sigmoid(beta x) with x ~ N(0, 1)
CLOSED = {0: 0.0, 1: 0.1352, 2: 0.3335, 4: 0.5804}


def sigmoid(x: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-x))


def entropy(p: float) -> float:
    return -float(sum(q * np.log2(q) for q in (p, 1 - p) if q > 0))


def drawn(beta: float, n: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(n, 1))
    return x, (rng.random(n) < sigmoid(beta * x[:, 0])).astype(int)


@pytest.mark.parametrize(("beta", "bits"), CLOSED.items())
def test_the_closed_forms_are_those_of_the_integral(beta: float, bits: float) -> None:
    spent, _ = integrate.quad(
        lambda x: stats.norm.pdf(x) * entropy(float(sigmoid(np.array(beta * x)))), -12, 12
    )
    assert 1 - spent == pytest.approx(bits, abs=5e-5)


@pytest.mark.parametrize(("beta", "bits"), CLOSED.items())
def test_true_probabilities_reach_the_closed_form(beta: float, bits: float) -> None:
    x, y = drawn(beta, 40_000)
    p = sigmoid(beta * x[:, 0])
    found = v_information(np.stack([1 - p, p], 1), y)
    low, high = found.ci(level=0.999).low, found.ci(level=0.999).high
    assert low - 1e-4 <= bits <= high + 1e-4
    assert high - low < 0.05
    assert found.unit == "bits"


@pytest.mark.parametrize(("beta", "bits"), CLOSED.items())
def test_a_fitted_logistic_probe_reaches_the_closed_form(beta: float, bits: float) -> None:
    x, y = drawn(beta, 1500, seed=1)
    found = v_information(States.of(x, y.tolist()))
    assert found.value == pytest.approx(bits, abs=0.05)
    assert found.value <= found.ci().high


def test_noise_holds_no_information_out_of_fold() -> None:
    rng = np.random.default_rng(0)
    noise = States.of(rng.normal(size=(100, 400)), (rng.permutation(100) % 2).tolist())
    assert v_information(noise).value < 0.05  # in sample it would be 1 bit


def test_a_result_a_cell_and_probabilities_say_the_same() -> None:
    rng = np.random.default_rng(0)
    x, y = drawn(3, 200)
    given = States.of(np.concatenate([x, rng.normal(size=(200, 3))], 1), y.tolist())
    result = fit_probe(given, kind="logistic", controls=())
    found = v_information(result)
    assert v_information(given.cell(step=0)).value == pytest.approx(found.value)
    assert result.probabilities is not None
    alone = v_information(result.probabilities, result.y, classes=result.classes)
    assert alone.value == pytest.approx(found.value, abs=0.01)  # constant: of all rows, not folds
    np.testing.assert_allclose(pointwise_v_information(result), found.values)


def test_points_that_mislead_have_less_than_nothing() -> None:
    shares = np.array([[0.9, 0.1], [0.9, 0.1]])
    found = pointwise_v_information(shares, ["a", "b"])
    np.testing.assert_allclose(found, [np.log2(0.9) + 1, np.log2(0.1) + 1])
    assert found[1] < 0


def test_groups_widen_the_interval() -> None:
    x, y = drawn(2, 200)
    x, y = np.repeat(x[:50], 4, 0), np.repeat(y[:50], 4)
    p = sigmoid(2 * x[:, 0])
    shares = np.stack([1 - p, p], 1)
    alone = v_information(shares, y).ci()
    whole = v_information(shares, y, groups=np.repeat(np.arange(50), 4)).ci()
    assert whole.high - whole.low > 1.5 * (alone.high - alone.low)


@pytest.mark.parametrize(
    ("shares", "y", "told", "match"),
    [
        ([[0.5, 0.5]], None, {}, "without labels"),
        ([[0.5, 0.5]] * 3, ["a", "b"], {}, "came with 2 labels"),
        ([[0.5, 0.5]] * 2, ["a", "b"], {"classes": ["a", "c"]}, "label 'b' is none"),
        ([[0.5, 0.6]] * 2, ["a", "b"], {}, "sum to 1"),
        ([[0.0, 1.0], [0.0, 1.0]], ["a", "b"], {}, "infinitely many bits"),
    ],
)
def test_bad_probabilities_are_refused(shares: list, y: list, told: dict, match: str) -> None:
    with pytest.raises(InputError, match=match):
        v_information(np.array(shares), y, **told)


def test_quantities_have_no_bits() -> None:
    x = np.random.default_rng(0).normal(size=(40, 2))
    result = fit_probe(States.of(x, x[:, 0].tolist()), kind="ridge", controls=())
    with pytest.raises(InputError, match="labels are quantities"):
        v_information(result)
