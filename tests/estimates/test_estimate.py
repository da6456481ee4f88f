"""Estimate: its laws (one test behind all claims), oracles, refusals, what it says of itself."""

from collections.abc import Callable
from dataclasses import FrozenInstanceError, replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from statsmodels.stats.proportion import proportions_ztest
from statsmodels.stats.weightstats import ttost_paired

from imaginelens.estimates import Estimate, EstimateError, score_interval

NAN = float("nan")
GROUPS = np.repeat(np.arange(12), 5)
Maker = Callable[[np.random.Generator], Estimate]


def arms(rng: np.random.Generator, shape: Any = 60) -> tuple[np.ndarray, np.ndarray]:
    """Two 0/1 outcomes that mostly agree."""
    before = rng.random(shape) < 0.5
    change = rng.random(shape) < rng.uniform(0, 0.4)
    towards = rng.random(shape) < rng.uniform(0, 1)
    return np.where(change, towards, before).astype(float), before.astype(float)


def skewed(rng: np.random.Generator, shape: Any = 60) -> np.ndarray:
    return rng.exponential(1.0, size=shape) - rng.uniform(0.6, 1.4)


def hits(rng: np.random.Generator) -> np.ndarray:
    return (rng.random(60) < rng.uniform(0, 0.7)).astype(float)


MAKERS: dict[str, Maker] = {
    "t": lambda r: Estimate.mean(skewed(r)),
    "cluster-robust t": lambda r: Estimate.mean(skewed(r), groups=GROUPS),
    "two-way crossed t": lambda r: Estimate.crossed(skewed(r, (6, 10))),
    "studentised bootstrap": lambda r: Estimate.mean(skewed(r), bootstrap=True),
    "studentised group bootstrap": lambda r: Estimate.mean(
        skewed(r), groups=GROUPS, bootstrap=True
    ),
    "Tango score": lambda r: Estimate.paired(*arms(r)),
    "cluster-adjusted Tango score": lambda r: Estimate.paired(*arms(r), groups=GROUPS),
    "two-way crossed Tango score": lambda r: Estimate.paired(*arms(r, (6, 10))),
    "Wilson score": lambda r: Estimate.share(hits(r), chance=0.25),
    "cluster-adjusted Wilson score": lambda r: Estimate.share(hits(r), groups=GROUPS, chance=0.25),
    "Fieller": lambda r: Estimate.ratio(skewed(r), skewed(r) + r.uniform(0, 2)),
    "cluster-robust Fieller": lambda r: Estimate.ratio(
        skewed(r), skewed(r) + r.uniform(0, 2), groups=GROUPS
    ),
}


@pytest.mark.parametrize("procedure", MAKERS)
def test_the_type_of_outcome_chooses_the_procedure(procedure: str) -> None:
    for seed in range(3):
        estimate = MAKERS[procedure](np.random.default_rng(seed))
        assert estimate.procedure == procedure
        assert estimate.ci().procedure == procedure


def test_values_do_not_choose_the_procedure() -> None:
    """0/1 numbers, constants and gaps: the constructor alone decides."""
    for values in ([0.0, 1.0, 1.0], [0.0, 0.0, 0.0], [2.0, NAN, 3.0], [1e300, -1e-300, 0.0]):
        assert Estimate.mean(values).procedure == "t"
    assert Estimate.paired([0, 0], [0, 0]).procedure == "Tango score"
    assert Estimate.paired([1, 0, NAN], [0, 0, 1]).procedure == "Tango score"


@pytest.mark.parametrize("procedure", MAKERS)
@settings(max_examples=12, deadline=None)
@given(seed=st.integers(0, 10**6))
def test_all_claims_are_one_test(procedure: str, seed: int) -> None:
    estimate = MAKERS[procedure](np.random.default_rng(seed))
    null = 0.25 if "Wilson" in procedure else 0.0
    p, interval = estimate.pvalue(), estimate.ci()
    assert 0 <= p <= 1
    assert (p < 0.05) == (null not in interval)
    assert estimate.value in interval
    for level in (0.5, 0.9, 0.99):
        assert (p < 1 - level) == (null not in estimate.ci(level=level))
    margin = estimate.min_margin()
    if 1e-9 < margin < (1 if "score" in procedure else np.inf):
        assert estimate.equivalence(margin * (1 + 1e-6)).equivalent
        assert not estimate.equivalence(margin=margin * (1 - 1e-6)).equivalent
        ninety = estimate.ci(level=0.9)
        assert margin == pytest.approx(max(abs(ninety.low - null), abs(ninety.high - null)))
    if margin == np.inf:
        assert not estimate.equivalence(1e9).equivalent


@pytest.mark.parametrize("procedure", MAKERS)
def test_wider_levels_contain_narrower_ones(procedure: str) -> None:
    estimate = MAKERS[procedure](np.random.default_rng(5))
    if procedure.endswith("Fieller"):
        estimate = Estimate.ratio([1.0, 2.0, 1.5, 1.2] * 3, [2.0, 3.0, 2.2, 2.9] * 3)
    narrow, wide = estimate.ci(level=0.8), estimate.ci(level=0.99)
    assert wide.low < narrow.low < narrow.high < wide.high


def changed(estimate: Estimate, order: np.ndarray, sign: float = 1.0) -> Estimate:
    groups = None if estimate.groups is None else tuple(np.array(estimate.groups)[order])
    bottom = None if estimate.denominator is None else estimate.denominator[order]
    return replace(
        estimate, values=sign * estimate.values[order], groups=groups, denominator=bottom
    )


@pytest.mark.parametrize("procedure", MAKERS)
@pytest.mark.parametrize("seed", [0, 1])
def test_the_order_of_examples_does_not_matter(procedure: str, seed: int) -> None:
    rng = np.random.default_rng(seed)
    estimate = MAKERS[procedure](rng)
    again = changed(estimate, rng.permutation(len(estimate.values)))
    # the bootstrap draws examples by their place, so another order is another set of draws
    close = 0.05 if "bootstrap" in procedure else 1e-9
    for level in (0.5, 0.95):
        one, two = estimate.ci(level=level), again.ci(level=level)
        assert (one.low, one.high) == pytest.approx((two.low, two.high), rel=close, abs=close)
    assert again.pvalue() == pytest.approx(estimate.pvalue(), abs=close)


@pytest.mark.parametrize("procedure", [p for p in MAKERS if "Wilson" not in p])
@pytest.mark.parametrize("seed", [0, 1])
def test_a_change_of_sign_mirrors_everything(procedure: str, seed: int) -> None:
    estimate = MAKERS[procedure](np.random.default_rng(seed))
    mirrored = changed(estimate, np.arange(len(estimate.values)), -1.0)
    one, two = estimate.ci(), mirrored.ci()
    assert (one.low, one.high) == pytest.approx((-two.high, -two.low))
    assert one.unbounded == two.unbounded
    assert mirrored.value == pytest.approx(-estimate.value)
    assert mirrored.pvalue() == pytest.approx(estimate.pvalue())
    assert mirrored.min_margin() == pytest.approx(estimate.min_margin())
    there, back = estimate.equivalence(0.3), mirrored.equivalence(0.3)
    assert (there.lower_p, there.upper_p) == pytest.approx((back.upper_p, back.lower_p))


@pytest.mark.parametrize("procedure", [p for p in MAKERS if "cluster" in p or "group" in p])
def test_names_of_groups_do_not_matter(procedure: str) -> None:
    estimate = MAKERS[procedure](np.random.default_rng(2))
    named = replace(estimate, groups=tuple(f"image {label}" for label in reversed(GROUPS)))
    assert named.ci() == estimate.ci()
    assert named.n_groups == 12


@pytest.mark.parametrize("procedure", MAKERS)
def test_missing_examples_are_left_out_and_counted(procedure: str) -> None:
    estimate = MAKERS[procedure](np.random.default_rng(3))
    assert (estimate.n, estimate.missing) == (60, 0)
    if estimate.values.ndim == 2:
        more = np.vstack([estimate.values, np.full((1, 10), NAN)])
        padded, added = replace(estimate, values=more), 10
    else:
        groups = None if estimate.groups is None else (*estimate.groups, "another", 0)
        bottom = estimate.denominator
        bottom = None if bottom is None else np.append(bottom, [1.0, NAN])
        more = np.append(estimate.values, [NAN, NAN if bottom is None else 1.0])
        padded = replace(estimate, values=more, groups=groups, denominator=bottom)
        added = 2
    assert (padded.n, padded.missing, padded.n_groups) == (60, added, estimate.n_groups)
    assert padded.ci() == estimate.ci()
    assert padded.value == estimate.value
    assert f"{added} missing" in repr(padded)
    assert "missing" not in repr(estimate)


# Oracles


@pytest.mark.parametrize("margin", [0.05, 0.5])
def test_tost_is_statsmodels(margin: float) -> None:
    rng = np.random.default_rng(0)
    after, before = rng.normal(0.1, 1, size=40), rng.normal(0, 1, size=40)
    found = Estimate.mean(after - before).equivalence(margin)
    p, lower, upper = ttost_paired(after, before, -margin, margin)
    assert (found.lower_p, found.upper_p) == pytest.approx((lower[1], upper[1]))
    assert found.pvalue == pytest.approx(p)
    assert found.equivalent == (p < 0.05)


def test_mean_is_scipys_t_test() -> None:
    values = np.random.default_rng(1).normal(0.3, 1, size=25)
    estimate, theirs = Estimate.mean(values), stats.ttest_1samp(values, 0.0)
    assert estimate.value == pytest.approx(values.mean())
    assert estimate.pvalue() == pytest.approx(theirs.pvalue)
    ends = theirs.confidence_interval(0.9)
    assert (estimate.ci(level=0.9).low, estimate.ci(level=0.9).high) == pytest.approx(tuple(ends))


def test_paired_is_tangos_with_a_t_quantile() -> None:
    after = [1] * 6 + [0] * 16 + [1] * 59 + [0] * 80
    before = [0] * 6 + [1] * 16 + [1] * 59 + [0] * 80
    estimate = Estimate.paired(after, before)
    assert estimate.value == pytest.approx(-10 / 161)
    low, high = score_interval(6, 16, 161, df=160)
    interval = estimate.ci()
    assert (interval.low, interval.high) == pytest.approx((float(low), float(high)))
    published = (-0.1240, -0.0054)  # with the normal quantile
    assert (interval.low, interval.high) == pytest.approx(published, abs=8e-4)
    assert interval.low < published[0] < published[1] < interval.high


def test_share_is_wilsons() -> None:
    flags = np.array([1] * 13 + [0] * 3)
    estimate = Estimate.share(flags, chance=0.5)
    theirs = stats.binomtest(13, 16).proportion_ci(0.9, method="wilson")
    ours = estimate.ci(level=0.9)
    assert (ours.low, ours.high) == pytest.approx((theirs.low, theirs.high))
    p = proportions_ztest(13, 16, 0.5, prop_var=0.5)[1]
    assert estimate.pvalue() == pytest.approx(p)
    assert (Estimate.share([0] * 9).ci().low, Estimate.share([1] * 9).ci().high) == (0.0, 1.0)


def test_groups_of_one_change_nothing_but_the_name() -> None:
    rng = np.random.default_rng(2)
    values, pair, labels = skewed(rng), arms(rng), np.arange(60)
    for alone, grouped in (
        (Estimate.mean(values), Estimate.mean(values, groups=labels)),
        (Estimate.paired(*pair), Estimate.paired(*pair, groups=labels)),
    ):
        one, two = alone.ci(), grouped.ci()
        assert (one.low, one.high) == pytest.approx((two.low, two.high), abs=1e-12)
        assert alone.pvalue() == pytest.approx(grouped.pvalue())


@pytest.mark.parametrize("kind", ["mean", "paired", "share", "ratio"])
def test_repeating_every_example_adds_nothing_with_groups(kind: str) -> None:
    rng = np.random.default_rng(4)
    groups = np.repeat(np.arange(60), 5)
    data = {
        "mean": (skewed(rng),),
        "paired": ((rng.random(60) < 0.7).astype(float), (rng.random(60) < 0.3).astype(float)),
        "share": (hits(rng),),
        "ratio": (skewed(rng), skewed(rng) + 3),
    }[kind]
    make = getattr(Estimate, kind)
    once, repeated = make(*data).ci(), make(*[np.repeat(d, 5) for d in data], groups=groups).ci()
    rate = (repeated.high - repeated.low) / (once.high - once.low)
    assert rate == pytest.approx(1.0, abs=0.04)  # Wilson's plain interval uses a normal quantile
    alone = make(*[np.repeat(d, 5) for d in data]).ci()
    assert (alone.high - alone.low) / (once.high - once.low) < 0.6


# Equal values


def test_equal_numbers_are_taken_at_their_word() -> None:
    for options in ({}, {"groups": GROUPS}, {"bootstrap": True}):
        nothing = Estimate.mean(np.zeros(60), **options)
        assert (nothing.ci().low, nothing.ci().high, nothing.pvalue()) == (0.0, 0.0, 1.0)
        assert nothing.verdict(1e-12) == "equivalent"
        assert nothing.min_margin() == 0.0
        constant = Estimate.mean(np.full(60, 0.1), **options)
        assert (constant.ci().low, constant.ci().high, constant.pvalue()) == (0.1, 0.1, 0.0)
        assert constant.verdict(0.2) == "both"
        assert constant.verdict(0.05) == "effect"
    crossed = Estimate.crossed(np.zeros((4, 5)))
    assert (crossed.ci().low, crossed.ci().high, crossed.pvalue()) == (0.0, 0.0, 1.0)
    share = Estimate.ratio(np.zeros(9), [1.0, 2.0, 3.0] * 3)
    assert (share.ci().low, share.ci().high, share.pvalue()) == (0.0, 0.0, 1.0)
    assert share.verdict(0.05) == "equivalent"


def test_equal_outcomes_prove_little() -> None:
    for options in ({}, {"groups": GROUPS}):
        nothing = Estimate.paired(np.zeros(60), np.zeros(60), **options)
        assert nothing.ci().low < -0.05 < 0.05 < nothing.ci().high
        assert nothing.pvalue() == 1.0
        assert nothing.verdict(0.04) == "inconclusive"
        never = Estimate.share(np.zeros(60), **options)
        assert (never.ci().low, never.value) == (0.0, 0.0)
        assert never.ci().high > 0.05
    with_groups = Estimate.paired(np.zeros(60), np.zeros(60), groups=GROUPS)
    assert with_groups.min_margin() > 2 * Estimate.paired(np.zeros(60), np.zeros(60)).min_margin()
    crossed = Estimate.paired(np.zeros((6, 10)), np.zeros((6, 10)))
    assert crossed.min_margin() > with_groups.min_margin()


# Verdicts


def planted(mean: float, spread: float) -> Estimate:
    """100 values of exactly this mean and spread."""
    shape = np.linspace(-1, 1, 100)
    return Estimate.mean(mean + spread * shape / shape.std(ddof=1), name="effect", unit="points")


@pytest.mark.parametrize(
    ("mean", "spread", "verdict", "words"),
    [
        (0.50, 1.0, "effect", "n = 100: an effect."),
        (0.00, 0.1, "equivalent", "n = 100: none beyond the margin of 0.05."),
        (0.02, 0.05, "both", "n = 100: real but smaller than the margin of 0.05."),
        (0.10, 1.0, "inconclusive", "neither an effect nor its absence within the margin of 0.05"),
    ],
)
def test_the_four_verdicts(mean: float, spread: float, verdict: str, words: str) -> None:
    for sign in (1, -1):
        estimate = planted(sign * mean, spread)
        assert estimate.verdict(0.05) == estimate.verdict(margin=0.05) == verdict
        assert words in estimate.describe(0.05)
        assert estimate.describe(margin=0.05).startswith(
            f"effect is {estimate.value:.4g} points, 95%"
        )
        ninety, wide = estimate.ci(level=0.9), estimate.ci()
        assert (verdict in ("effect", "both")) == (0 not in wide)
        inside = -0.05 < ninety.low and ninety.high < 0.05
        assert (verdict in ("equivalent", "both")) == inside


def test_a_ratio_to_what_may_be_zero_is_never_small() -> None:
    rng = np.random.default_rng(6)
    ratio = Estimate.ratio(rng.normal(0, 1e-6, size=20), rng.normal(0.05, 1, size=20))
    assert ratio.ci().unbounded
    assert ratio.min_margin() == np.inf
    found = ratio.equivalence(0.5)
    assert (found.pvalue, found.equivalent) == (1.0, False)
    assert "the denominator's own interval contains 0" in found.note
    assert np.isnan(Estimate.ratio([1.0, 2.0], [1.0, -1.0]).value)


def test_a_share_is_judged_against_chance_and_not_against_zero() -> None:
    rng = np.random.default_rng(7)
    at_chance = Estimate.share(rng.random(2000) < 0.25, chance=0.25)
    assert at_chance.verdict(0.05) == "equivalent"
    above = Estimate.share(rng.random(200) < 0.6, chance=0.25)
    assert above.verdict(0.05) == "effect"
    with pytest.raises(EstimateError, match="hit rate has no null"):
        Estimate.share([1, 0, 1], name="hit rate").pvalue()
    for ask in ("verdict", "equivalence", "describe"):
        with pytest.raises(EstimateError, match=r"chance=0\.25"):
            getattr(Estimate.share([1, 0, 1]), ask)(0.05)
    with pytest.raises(EstimateError, match="has no null"):
        Estimate.share([1, 0, 1]).min_margin()
    rare = Estimate.share(np.zeros(500), chance=0.02)  # chance - margin lies below 0
    assert rare.equivalence(0.05).lower_p == 0.0
    assert rare.verdict(0.05) == "both"


# Refusals


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: Estimate.mean([]), "0 of 0 examples have a value"),
        (lambda: Estimate.mean([1.0]), "1 of 1 examples has a value"),
        (lambda: Estimate.mean([NAN, NAN, NAN]), r"0 of 3 examples have a value \(3 missing\)"),
        (lambda: Estimate.mean([1.0, float("inf"), 2.0]), "1 of 3 values are infinite"),
        (lambda: Estimate.mean(["a", "b"]), "the values cannot be read as numbers"),
        (lambda: Estimate.mean([[1.0, 2.0], [3.0]]), "the values cannot be read as numbers"),
        (lambda: Estimate.mean(np.zeros((3, 4))), r"shape \(3, 4\) came where \(example\)"),
        (lambda: Estimate.mean(3.0), r"shape \(\) came where \(example\)"),
        (lambda: Estimate.crossed(np.zeros(4)), r"shape \(4,\) came where \(recipient, donor\)"),
        (lambda: Estimate.crossed(np.zeros((1, 4))), "values of 1 recipients and 4 donors"),
        (lambda: Estimate.crossed(np.full((3, 3), NAN)), "values of 0 recipients and 0 donors"),
        (
            lambda: Estimate.paired(np.zeros((20, 3)), np.zeros((20, 3)), groups=range(20)),
            "shape .20, 3. came where .example. was expected",
        ),
        (lambda: Estimate.paired([0, 1, 2], [0, 0, 0]), "1 of 3 after are neither 0 nor 1"),
        (lambda: Estimate.paired([0, 1], [0, 0.5]), "1 of 2 before are neither 0 nor 1"),
        (lambda: Estimate.paired([0, 1], [0, 1, 1]), r"after has shape \(2,\) and before \(3,\)"),
        (lambda: Estimate.paired([0, NAN], [NAN, 1]), "0 of 2 examples have a value"),
        (lambda: Estimate.share([0.3, 1]), "1 of 2 hits are neither 0 nor 1"),
        (lambda: Estimate.share([1, 0], chance=0.0), "chance level of 0.0"),
        (lambda: Estimate.share([1, 0], chance=25.0), "chance level of 25.0"),
        (lambda: Estimate.ratio([1.0, 2.0], [1.0]), r"the numerator has shape \(2,\)"),
        (lambda: Estimate.ratio([1.0, NAN], [NAN, 1.0]), "0 of 2 examples have a value"),
        (lambda: Estimate.mean(np.ones(4), groups=[1, 2]), "2 group labels came with 4 examples"),
        (lambda: Estimate.mean(np.ones(3), groups=[1, NAN, 2]), "1 of 3 group labels are missing"),
        (lambda: Estimate.mean(np.ones(3), groups=["a", None, "b"]), "1 of 3 group labels"),
        (lambda: Estimate.mean(np.ones(3), groups=7), "groups cannot be read as labels"),
        (lambda: Estimate.mean(np.ones(2), groups=[[1], [2]]), "groups cannot be read as labels"),
        (lambda: Estimate.mean(np.ones(9), groups=[0] * 9), "9 examples in 1 group are too few"),
        (lambda: Estimate.mean(np.ones(18), groups=[*range(9)] * 2), "18 examples in 9 groups"),
        (lambda: Estimate.share(np.ones(9), groups=range(9)), "9 examples in 9 groups"),
        (lambda: Estimate.ratio(np.ones(9), np.ones(9), groups=range(9)), "in 9 groups"),
        (
            lambda: Estimate.paired([1] * 9 + [NAN], [0] * 10, groups=range(10)),
            "9 examples in 9 groups",
        ),
    ],
)
def test_what_no_estimate_can_be_made_of_is_refused(
    make: Callable[[], Estimate], words: str
) -> None:
    with pytest.raises(EstimateError, match=words):
        make()


def test_an_unknown_procedure_is_refused() -> None:
    unchecked = Estimate.__new__(Estimate)
    object.__setattr__(unchecked, "procedure", "percentile bootstrap")
    with pytest.raises(EstimateError, match="no procedure 'percentile bootstrap'"):
        unchecked.__post_init__()


@pytest.mark.parametrize("ask", ["equivalence", "verdict", "describe"])
def test_a_margin_must_be_given_and_be_one(ask: str) -> None:
    estimate = Estimate.mean([1.0, 2.0])
    with pytest.raises(EstimateError, match="needs a margin"):
        getattr(estimate, ask)()
    for wrong in (0.0, -0.05, NAN, float("inf"), 0):
        with pytest.raises(EstimateError, match="is none; give a positive number"):
            getattr(estimate, ask)(wrong)
    for points in (Estimate.paired([1, 0], [0, 0]), Estimate.share([1, 0], chance=0.5)):
        with pytest.raises(EstimateError, match=r"margin of 5 is none.*0.05 is 5 points"):
            getattr(points, ask)(5)


def test_impossible_levels_are_refused() -> None:
    for procedure, make in MAKERS.items():
        estimate = make(np.random.default_rng(0))
        with pytest.raises(EstimateError, match="level of 95"):
            estimate.ci(level=95)
        for alpha in (0.0, 0.5, 5.0):
            with pytest.raises(EstimateError, match=f"alpha of {alpha}"):
                estimate.min_margin(alpha=alpha)
        assert procedure


# What it is


def test_it_keeps_its_examples_and_cannot_be_changed() -> None:
    given_values = np.array([1.0, NAN, 3.0])
    estimate = Estimate.mean(given_values)
    given_values[0] = 9.0
    assert estimate.values[0] == 1.0
    with pytest.raises(FrozenInstanceError):
        estimate.values = given_values  # type: ignore[misc]
    with pytest.raises(ValueError, match="read-only"):
        estimate.values[0] = 9.0
    assert Estimate.paired([1, 0, NAN], [0, 0, 1]).values.tolist()[:2] == [1.0, 0.0]


@pytest.mark.parametrize("procedure", MAKERS)
def test_its_repr_is_one_line_with_everything(procedure: str) -> None:
    estimate = replace(MAKERS[procedure](np.random.default_rng(8)), name="tnie", unit="logits")
    line = repr(estimate)
    assert "\n" not in line
    assert line.startswith(f"Estimate(tnie = {estimate.value:.4g} logits, 95% ")
    assert str(estimate.ci()) in line
    assert f", n={estimate.n}," in line
    assert line.endswith(f", {procedure})")
    assert ("12 groups" in line) == (estimate.groups is not None)
    assert ("6 recipients x 10 donors" in line) == (estimate.values.ndim == 2)


def test_intervals_without_end_say_so() -> None:
    rng = np.random.default_rng(9)
    outside = Estimate.ratio(rng.normal(2, 0.5, size=30), rng.normal(0.05, 0.5, size=30))
    assert outside.ci().unbounded == "outside"
    assert "(-inf, " in repr(outside)
    assert "] or [" in repr(outside)
    assert 0 not in outside.ci()
    assert outside.verdict(0.1) == "effect"
    nothing = Estimate.ratio(rng.normal(0, 1, size=30), rng.normal(0, 1, size=30))
    assert str(nothing.ci()) == "(-inf, inf)"
    half = Estimate.mean([0.0] * 19 + [1.0], bootstrap=True)
    assert str(half.ci()).endswith(", inf)")
    assert half.min_margin() == np.inf


def test_bools_and_none_are_read() -> None:
    estimate = Estimate.paired([True, False, None, True], np.array([False, False, True, False]))
    assert (estimate.value, estimate.n, estimate.missing) == (pytest.approx(2 / 3), 3, 1)
