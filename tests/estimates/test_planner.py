"""Plans against full enumeration of what the estimates decide, and against published numbers."""

import itertools
import re

import numpy as np
import pytest
from scipy import integrate, stats
from statsmodels.stats.power import TTestPower

from imaginelens.estimates import Estimate, EstimateError
from imaginelens.estimates.planner import (
    _power_tost,
    power_effect,
    power_equivalence,
    sample_size,
    smallest_margin,
)


def changes(gained: int, lost: int, n: int) -> Estimate:
    after = np.r_[np.ones(gained), np.zeros(n - gained)]
    before = np.r_[np.zeros(gained), np.ones(lost), np.zeros(n - gained - lost)]
    return Estimate.paired(after, before)


def enumerated(n: int, discordance: float, difference: float, margin: float | None) -> float:
    """The chance that `Estimate` decides so, summed over every possible outcome."""
    up, down = (discordance + difference) / 2, (discordance - difference) / 2
    power = 0.0
    for gained, lost in itertools.product(range(n + 1), repeat=2):
        if gained + lost <= n:
            found = changes(gained, lost, n)
            shown = (
                found.pvalue() < 0.05 if margin is None else found.equivalence(margin).equivalent
            )
            counts = [gained, lost, n - gained - lost]
            power += shown * stats.multinomial.pmf(counts, n, [up, down, 1 - up - down])
    return float(power)


@pytest.mark.parametrize(
    ("n", "discordance", "difference", "margin"),
    [(12, 0.2, 0.0, 0.4), (15, 0.1, 0.05, 0.3), (15, 0.4, -0.3, 0.3), (9, 1.0, 0.2, 0.9)],
)
def test_power_is_that_of_the_estimate(
    n: int, discordance: float, difference: float, margin: float
) -> None:
    found = power_equivalence(n, margin=margin, discordance=discordance, difference=difference)
    assert found == pytest.approx(enumerated(n, discordance, difference, margin), abs=1e-10)
    found = power_effect(n, discordance=discordance, difference=difference)
    assert found == pytest.approx(enumerated(n, discordance, difference, None), abs=1e-10)


def test_nothing_discordant_is_decided_by_n_alone() -> None:
    assert power_equivalence(20, margin=0.03, discordance=0.0) == 0
    assert power_equivalence(200, margin=0.03, discordance=0.0) == pytest.approx(1)
    assert power_effect(200, difference=0.0, discordance=0.0) == 0


@pytest.mark.parametrize("n", [20, 50, 191])
@pytest.mark.parametrize("discordance", [0.02, 0.06, 0.1, 0.3])
def test_at_the_margin_power_is_the_size_of_the_test(n: int, discordance: float) -> None:
    size = power_equivalence(n, margin=0.02, discordance=discordance, difference=0.02)
    assert size <= 0.05
    assert power_effect(n, difference=0.0, discordance=discordance) <= 0.05


@pytest.mark.parametrize(("n", "difference"), [(10, 0.5), (34, 0.5), (200, 0.1), (5, 2.0)])
def test_the_power_of_t_is_that_of_statsmodels(n: int, difference: float) -> None:
    expected = TTestPower().power(difference / 1.5, n, 0.05)
    assert power_effect(n, difference=difference, sd=1.5) == pytest.approx(expected, abs=1e-9)


def test_the_power_of_tost_is_published() -> None:
    """R's PowerTOST, CV 0.3, 40 subjects in two periods, true ratio 0.95, bounds 0.8 to 1.25."""
    error = np.sqrt(np.log(1.09) * 2 / 40)
    low, high = (np.log(bound) - np.log(0.95) for bound in (0.8, 1.25))
    assert _power_tost(low / error, high / error, 38, 0.05) == pytest.approx(0.815845, abs=1e-6)


@pytest.mark.parametrize(
    ("n", "margin", "difference"),
    [(8, 1.0, 0.0), (36, 0.5, 0.1), (12, 0.3, 0.0), (300, 0.2, -0.05)],
)
def test_the_power_of_tost_is_an_integral_and_bounded_by_noncentral_t(
    n: int, margin: float, difference: float
) -> None:
    t, root = stats.t.isf(0.05, n - 1), np.sqrt(n)

    def given(w: float) -> float:  # the estimated sd
        ends = root * (margin - difference) - t * w, root * (-margin - difference) + t * w
        density = stats.chi2.pdf((n - 1) * w**2, n - 1) * 2 * (n - 1) * w
        return max(stats.norm.cdf(ends[0]) - stats.norm.cdf(ends[1]), 0) * density

    top = min(margin * root / t, 5.0)
    expected = integrate.quad(given, 0, top, epsabs=1e-12, limit=500)[0]
    found = power_equivalence(n, margin=margin, sd=1.0, difference=difference)
    assert found == pytest.approx(expected, abs=1e-9)
    either = stats.nct.sf(t, n - 1, (margin + difference) * root)
    other = stats.nct.cdf(-t, n - 1, (difference - margin) * root)
    assert found >= either + other - 1 - 1e-9


# The reference report's table: 80% power, true difference 0, by the normal formula.
NORMAL = {
    0.02: (1713, 429, 191, 69),
    0.05: (4282, 1071, 476, 172),
    0.10: (8564, 2141, 952, 343),
    0.20: (17128, 4282, 1904, 686),
}
EXACT = {
    0.02: (1848, 530, 281, 131),
    0.05: (4336, 1123, 520, 211),
    0.10: (8590, 2167, 974, 364),
    0.20: (17136, 4291, 1913, 694),
}
MARGINS = (0.01, 0.02, 0.03, 0.05)


@pytest.mark.parametrize("discordance", NORMAL)
def test_the_normal_formula_gives_the_usual_table(discordance: float) -> None:
    for margin, expected in zip(MARGINS, NORMAL[discordance], strict=True):
        found = sample_size(margin=margin, discordance=discordance, method="normal")
        assert found == expected
        z = stats.norm.ppf(0.95) + stats.norm.ppf(0.90)
        assert found == int(np.ceil(z**2 * discordance / margin**2))


@pytest.mark.parametrize("discordance", EXACT)
def test_the_exact_plan_keeps_its_promise_and_the_formula_does_not(discordance: float) -> None:
    for margin, n in zip(MARGINS, EXACT[discordance], strict=True):
        assert sample_size(margin=margin, discordance=discordance) == n
        ahead = [
            power_equivalence(k, margin=margin, discordance=discordance)
            for k in (n - 1, *range(n, n + 30), *range(n + 30, 2 * n, n // 25 + 1))
        ]
        assert ahead[0] < 0.8 <= min(ahead[1:])
        usual = NORMAL[discordance][MARGINS.index(margin)]
        assert power_equivalence(usual, margin=margin, discordance=discordance) < 0.8


@pytest.mark.parametrize(
    "plan",
    [
        {"margin": 0.5, "sd": 1.0},
        {"margin": 0.3, "sd": 1.0, "difference": 0.1},
        {"difference": 0.4, "sd": 1.0},
        {"difference": 0.05, "discordance": 0.1},
        {"difference": -0.05, "discordance": 0.1, "power": 0.9},
        {"margin": 0.05, "discordance": 0.1, "difference": 0.01, "alpha": 0.01},
    ],
)
def test_the_sample_is_the_smallest_that_is_enough(plan: dict) -> None:
    n = sample_size(**plan)
    target = plan.get("power", 0.8)
    power = power_equivalence if "margin" in plan else power_effect
    rest = {k: v for k, v in plan.items() if k != "power"}
    assert power(n - 1, **rest) < target <= min(power(n + k, **rest) for k in range(40))
    assert sample_size(**plan, method="normal") == pytest.approx(n, rel=0.12)


def drawn(rng: np.random.Generator, plan: dict, n: int) -> Estimate:
    """An experiment as planned."""
    difference = plan.get("difference", 0.0)
    if "sd" in plan:
        return Estimate.mean(rng.normal(difference, plan["sd"], n))
    up, down = (plan["discordance"] + difference) / 2, (plan["discordance"] - difference) / 2
    gained, lost, _ = rng.multinomial(n, [up, down, 1 - up - down])
    return changes(int(gained), int(lost), n)


@pytest.mark.parametrize(
    "plan",
    [
        {"margin": 0.4, "sd": 1.0},
        {"difference": 0.4, "sd": 1.0},
        {"margin": 0.05, "discordance": 0.05},
        {"difference": 0.05, "discordance": 0.1},
    ],
)
def test_the_planned_sample_has_the_planned_power_in_simulated_experiments(plan: dict) -> None:
    n, rng = sample_size(**plan, power=0.8), np.random.default_rng(0)
    shown = []
    for _ in range(4000):  # the rate's own error: 0.6 points
        found = drawn(rng, plan, n)
        margin = plan.get("margin")
        shown.append(found.equivalence(margin).equivalent if margin else found.pvalue() < 0.05)
    assert np.mean(shown) == pytest.approx(0.8, abs=0.03)
    assert np.mean(shown) > 0.78


def test_the_sample_of_statsmodels() -> None:
    expected = TTestPower().solve_power(0.4, power=0.8, alpha=0.05)
    assert sample_size(difference=0.4, sd=1.0) == int(np.ceil(expected))


def test_clusters_take_more() -> None:
    alone = sample_size(margin=0.05, discordance=0.1)
    assert sample_size(margin=0.05, discordance=0.1, design_effect=2.8) == int(np.ceil(2.8 * alone))
    plan = {"margin": 0.05, "discordance": 0.1}
    assert power_equivalence(800, **plan, design_effect=2.0) == power_equivalence(400, **plan)
    assert smallest_margin(800, discordance=0.1, design_effect=2.0) > smallest_margin(
        800, discordance=0.1
    )


# The reference report's rows: n, net change, and margins in points at 2, 5, 10 and 20%.
SMALLEST = [
    (191, 1, (3.0, 3.7, 4.5, 6.0)),
    (800, -8, (1.9, 2.4, 2.9, 3.6)),
    (1919, -13, (1.2, 1.5, 1.9, 2.4)),
    (400, 1, (1.7, 2.3, 3.0, 4.0)),
    (400, -3, (2.2, 2.8, 3.5, 4.5)),
]


@pytest.mark.parametrize(("n", "net", "expected"), SMALLEST)
def test_the_smallest_margins_of_the_paper(n: int, net: int, expected: tuple) -> None:
    found = [
        smallest_margin(n, discordance=share, difference=net / n)
        for share in (0.02, 0.05, 0.10, 0.20)
    ]
    assert tuple(round(100 * margin, 1) for margin in found) == expected


def test_the_smallest_margin_is_that_of_the_estimate() -> None:
    found = smallest_margin(100, discordance=0.10, difference=0.02)
    own = changes(6, 4, 100)
    assert found == pytest.approx(own.min_margin(), abs=1e-12)
    assert own.equivalence(found + 1e-6).equivalent
    assert not own.equivalence(found - 1e-6).equivalent
    # 11 cannot be split into a net change of 2
    assert smallest_margin(100, discordance=0.11, difference=0.02) == pytest.approx(
        changes(7, 5, 100).min_margin()
    )
    values = np.random.default_rng(0).normal(0.1, 2, 50)
    found = smallest_margin(50, sd=float(values.std(ddof=1)), difference=float(values.mean()))
    assert found == pytest.approx(Estimate.mean(values).min_margin())


@pytest.mark.parametrize(
    ("plan", "words"),
    [
        ({"margin": 0.1}, "neither of discordance and sd"),
        ({"margin": 0.1, "sd": 1.0, "discordance": 0.1}, "both of discordance and sd"),
        ({"margin": 0.0, "sd": 1.0}, "the margin is 0"),
        ({"margin": 1.0, "discordance": 0.1}, "the margin is 1; give a number above 0 and below 1"),
        ({"margin": float("nan"), "sd": 1.0}, "the margin is nan"),
        ({"margin": 0.1, "discordance": 1.1}, "discordance of 1.1"),
        ({"margin": 0.1, "discordance": 0.05, "difference": 0.06}, "cannot be together"),
        ({"margin": 0.1, "sd": -1.0}, "sd of -1"),
        ({"margin": 0.1, "sd": 1.0, "difference": float("inf")}, "difference of inf"),
        ({"margin": 0.1, "sd": 1.0, "alpha": 0.6}, "alpha is 0.6"),
        ({"margin": 0.1, "sd": 1.0, "design_effect": 0.0}, "design effect of 0"),
    ],
)
def test_what_cannot_be_planned_is_refused(plan: dict, words: str) -> None:
    with pytest.raises(EstimateError, match=re.escape(words)):
        power_equivalence(100, **plan)
    with pytest.raises(EstimateError, match=re.escape(words)):
        sample_size(**plan)


def test_a_power_out_of_reach_is_refused() -> None:
    with pytest.raises(EstimateError, match=re.escape("not smaller than the margin of 0.05")):
        sample_size(margin=0.05, discordance=0.1, difference=0.05)
    with pytest.raises(EstimateError, match="an effect of 0"):
        sample_size(discordance=0.1)
    with pytest.raises(EstimateError, match="power is 1"):
        sample_size(margin=0.05, discordance=0.1, power=1.0)
    with pytest.raises(EstimateError, match="nothing is planned"):
        sample_size(margin=1e-6, discordance=0.1)
    with pytest.raises(EstimateError, match="1 examples"):
        power_equivalence(1, margin=0.1, sd=1.0)
    with pytest.raises(EstimateError, match=re.escape("worth 1.2")):
        power_effect(5, difference=0.1, sd=1.0, design_effect=4.0)
