"""Effects from potential outcomes: identities, published numbers, and what is refused."""

import csv
from functools import cache
from importlib.resources import files
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy import stats
from statsmodels.stats.mediation import Mediation

import imaginelens as il
from imaginelens.estimates import Estimate, EstimateError
from imaginelens.mediation import effects as module

NAN = float("nan")
WORLDS = ("y00", "y11", "y10", "y01", "c0", "c1")
EFFECTS = ("te", "pnde", "tnde", "pnie", "tnie", "cde", "int_ref", "int_med")


def worlds_of(rows: Any, **options: Any) -> il.PotentialOutcomes:
    """Potential outcomes from an array (world, example)."""
    return il.PotentialOutcomes.from_arrays(
        **dict(zip(WORLDS, np.asarray(rows, dtype=float), strict=False)), **options
    )


def random_worlds(n: int = 30, seed: int = 0, **options: Any) -> il.PotentialOutcomes:
    return worlds_of(np.random.default_rng(seed).normal(1, 1, (6, n)), **options)


def binary_worlds(n: int = 40, seed: int = 0, **options: Any) -> il.PotentialOutcomes:
    draw = np.random.default_rng(seed).random((6, n))
    shares = np.array([0.1, 0.9, 0.4, 0.6, 0.2, 0.7])[:, None]
    return worlds_of(draw < shares, binary=True, **options)


def values(effects: il.Effects) -> dict[str, np.ndarray]:
    return {name: getattr(effects, name).values for name in EFFECTS}


# --- identities ---------------------------------------------------------------------------------

numbers = st.floats(-1e3, 1e3, allow_nan=False)


@given(arrays(np.float64, (6, 3), elements=numbers))
@settings(deadline=None, max_examples=60)
def test_identities_hold_for_every_example(rows: np.ndarray) -> None:
    e = values(worlds_of(rows).effects())
    for one, other in (
        (e["te"], e["pnde"] + e["tnie"]),
        (e["te"], e["tnde"] + e["pnie"]),
        (e["te"], e["pnde"] + e["pnie"] + e["int_med"]),
        (e["te"], e["cde"] + e["int_ref"] + e["int_med"] + e["pnie"]),
        (e["int_med"], e["tnde"] - e["pnde"]),
        (e["int_ref"], e["pnde"] - e["cde"]),
    ):
        np.testing.assert_allclose(one, other, rtol=0, atol=1e-12 * max(1, np.abs(rows).max()))


@pytest.mark.parametrize("make", [random_worlds, binary_worlds])
@pytest.mark.parametrize("scale", ["difference", "ratio"])
def test_decompositions_add_up(make: Any, scale: str) -> None:
    worlds = make()
    if scale == "ratio":
        worlds = worlds_of(np.abs([worlds.arms[name] for name in WORLDS]), binary=worlds.binary)
    effects = worlds.effects(scale=scale)
    for ways, names in ((2, 2), (3, 3), (4, 4)):
        parts = effects.decompose(ways=ways)
        assert len(parts) == names
        assert sum(part.value for part in parts.values()) == pytest.approx(effects.te.value)


@given(arrays(np.int8, (4, 6), elements=st.integers(0, 1)))
@settings(deadline=None, max_examples=30)
def test_exchanging_base_and_source_changes_signs(rows: np.ndarray) -> None:
    """Base and source trade places: total and pure effects do so, too, with the other sign."""
    one = worlds_of(rows, binary=True).effects()
    other = worlds_of(rows[[1, 0, 3, 2]], binary=True).effects()
    for name, name_there in (("te", "te"), ("tnie", "pnie"), ("tnde", "pnde")):
        mine, theirs = getattr(one, name), getattr(other, name_there)
        np.testing.assert_array_equal(mine.values, -theirs.values)
        assert mine.ci().low == pytest.approx(-theirs.ci().high, abs=1e-9)


def test_an_estimate_knows_its_total_and_its_unit() -> None:
    effects = random_worlds(unit="logits").effects()
    assert effects.tnie.unit == "logits"
    assert effects.tnie.total is effects.te
    assert effects.te.total is None
    assert effects.prop_mediated.unit == ""
    margin = 0.5 * abs(effects.te.value)
    relative, absolute = (
        effects.pnie.equivalence(il.relative(0.5)),
        effects.pnie.equivalence(margin),
    )
    assert relative.equivalent in (True, False)
    assert absolute.margin == margin


# --- published numbers --------------------------------------------------------------------------


def test_bilinear() -> None:
    """M = .3 + .8 x and Y = .5 + x + 2 M + .75 x M, with x from 0 to 1."""

    def y(x: float, m: float) -> list[float]:
        return [0.5 + x + 2 * m + 0.75 * x * m] * 2

    m0, m1 = 0.3, 1.1
    effects = worlds_of([y(0, m0), y(1, m1), y(1, m0), y(0, m1), y(0, 0), y(1, 0)]).effects()
    published = {
        "te": 3.425, "pnde": 1.225, "tnde": 1.825, "pnie": 1.6, "tnie": 2.2, "cde": 1.0,
        "int_ref": 0.225, "int_med": 0.6, "prop_mediated": 0.642336, "prop_eliminated": 0.708029,
    }  # fmt: skip
    assert {name: round(getattr(effects, name).value, 6) for name in published} == published


# The moment matrix of the JOBS II data (899 people), of which all linear models are functions:
# sums of products of 1, treat, econ_hard, sex, age, job_seek, depress2.
JOBS = [
    [899],
    [600, 600],
    [2718.699999, 1813.299999, 9095.528601],
    [482, 310, 1431.629999, 482],
    [33770.991821, 22613.120562, 102128.833374, 18236.824684, 1366700.180596],
    [3634.966663, 2439.466665, 11039.218324, 1945.63333, 137001.546336, 15173.912192],
    [1565.520201, 1032.2, 4850.241048, 860.709091, 58774.677481, 6221.924572, 3107.626719],
]
ONE, TREAT, ECON, SEX, AGE, SEEK, DEPRESS = range(7)


@cache
def jobs_moments() -> np.ndarray:
    lower = np.zeros((7, 7))
    for i, row in enumerate(JOBS):
        lower[i, : len(row)] = row
    return lower + np.tril(lower, -1).T


def regression(outcome: int, *on: int) -> np.ndarray:
    m = jobs_moments()
    return np.linalg.solve(m[np.ix_(on, on)], m[np.ix_(on, [outcome])])[:, 0]


def linear_worlds(a: float, m0: float, treat: float, seek: float, both: float) -> il.Effects:
    """Worlds of mean outcomes: mediator m0 + a x, outcome treat x + seek m + both x m."""

    def y(x: float, m: float) -> list[float]:
        return [treat * x + seek * m + both * x * m] * 2

    m1 = m0 + a
    return worlds_of([y(0, m0), y(1, m1), y(1, m0), y(0, m1), y(0, 0), y(1, 0)]).effects()


def test_jobs() -> None:
    """R mediation's data (Vinokur & Schul 1997), with the regressions done from the moments."""
    mediator = regression(SEEK, ONE, TREAT, ECON, SEX, AGE)
    outcome = regression(DEPRESS, ONE, TREAT, SEEK, ECON, SEX, AGE)
    effects = linear_worlds(mediator[1], 0.0, outcome[1], outcome[2], 0.0)
    published = {"tnie": -0.01574465, "pnie": -0.01574465, "pnde": -0.0402647, "te": -0.05600935}
    for name, number in published.items():  # the moments are rounded themselves
        assert getattr(effects, name).value == pytest.approx(number, abs=1e-8)
    assert round(effects.prop_mediated.value, 7) == 0.2811075


def test_jobs_with_interaction() -> None:
    """The published coefficients of the outcome model with treat x job_seek; the moment matrix has
    no products, so that only the mediator model is done here."""
    treat, seek, both = -0.39208717, -0.30142013, 0.08753677
    mediator = regression(SEEK, ONE, TREAT, ECON, SEX, AGE)
    means = jobs_moments()[0] / jobs_moments()[0, 0]
    m0 = mediator @ np.array([1, 0, means[ECON], means[SEX], means[AGE]])  # of the untreated
    effects = linear_worlds(mediator[1], m0, treat, seek, both)
    published = {
        "pnie": -0.01977768, "tnie": -0.01403396, "pnde": -0.04197925, "te": -0.05601321,
        "int_med": 0.00574373, "cde": -0.39208717, "int_ref": 0.35010792,
    }  # fmt: skip
    for name, number in published.items():  # the coefficients are rounded to 8 digits
        assert getattr(effects, name).value == pytest.approx(number, abs=3e-8)


def framing() -> dict[str, np.ndarray]:
    """Brader, Valentino & Suhay (2008), as shipped with statsmodels."""
    path = files("statsmodels.stats.tests.results") / "framing.csv"
    rows = list(csv.DictReader(path.read_text().splitlines()))

    def numeric(name: str) -> np.ndarray:
        return np.array([float(row[name]) for row in rows])

    levels = sorted({row["educ"] for row in rows})
    dummies = [np.array([row["educ"] == level for row in rows], float) for level in levels[1:]]
    gender = np.array([row["gender"] == "male" for row in rows], float)
    return {
        "emo": numeric("emo"), "treat": numeric("treat"), "y": numeric("cong_mesg"),
        "covariates": np.column_stack(
            [np.ones(len(rows)), numeric("age"), *dummies, gender, numeric("income")]
        ),
    }  # fmt: skip


@pytest.mark.parametrize("interaction", [False, True])
def test_framing(interaction: bool) -> None:
    """Linear mediator, probit outcome: E Phi(eta) in closed form, per unit."""
    import statsmodels.api as sm

    data = framing()
    x, w = data["treat"], data["covariates"]
    first = sm.OLS(data["emo"], np.column_stack([x, w])).fit()
    a, variance = first.params[0], first.scale
    products = [data["emo"] * x] if interaction else []
    design = np.column_stack([data["emo"], x, *products, w])
    second = sm.Probit(data["y"], design).fit(disp=0)
    b, c, *rest = second.params
    d = rest.pop(0) if interaction else 0.0
    without = w @ np.array(rest)
    m = w @ first.params[1:]

    def y(x: int, m: np.ndarray) -> np.ndarray:
        slope = b + d * x
        return stats.norm.cdf((without + c * x + slope * m) / np.sqrt(1 + slope**2 * variance))

    effects = worlds_of([y(0, m), y(1, m + a), y(1, m), y(0, m + a)]).effects()
    published = dict(
        zip(
            ("pnie", "tnie", "pnde", "tnde", "te"),
            (0.0776886, 0.1013657, -0.0077526, 0.0159245, 0.0936131)
            if interaction
            else (0.0841180, 0.0851487, 0.0115622, 0.0125930, 0.0967109),
            strict=True,
        )
    )
    for name, number in published.items():
        assert round(getattr(effects, name).value, 7) == number


def test_framing_agrees_with_the_simulation_of_statsmodels() -> None:
    """Its constants for the same data (bootstrap, seed 4231) lie where a simulation would."""
    assert Mediation is not None
    for published, exact in ((0.085106, 0.0841180), (0.085674, 0.0851487)):
        assert published == pytest.approx(exact, abs=2e-3)


# --- the ratio scale ----------------------------------------------------------------------------


def test_vigs_ratios() -> None:
    """Vig et al. (2020): y = p(c2)/p(c1), TE = (y_set - y_null)/y_null, and the same for the pure
    effects, averaged over examples."""
    rows = np.random.default_rng(0).uniform(0.1, 2, (4, 12))
    rows[0] = 0.4  # with one and the same y_null, the mean of ratios is the ratio of means
    effects = worlds_of(rows).effects(scale="ratio")
    null, whole, direct, indirect = rows
    for name, y in (("te", whole), ("pnde", direct), ("pnie", indirect)):
        assert getattr(effects, name).value == pytest.approx(np.mean((y - null) / null))
        assert getattr(effects, name).procedure == "Fieller"
    total = effects.pnde.value + effects.pnie.value  # which is not TE, as they say
    assert total != pytest.approx(effects.te.value)
    assert effects.pnde.value + effects.tnie.value == pytest.approx(effects.te.value)


def test_ratios_weigh_examples_by_their_base() -> None:
    rows = np.random.default_rng(1).uniform(0.1, 2, (4, 12))
    effects = worlds_of(rows).effects(scale="ratio")
    of_each = (rows[3] - rows[0]) / rows[0]
    assert effects.pnie.value == pytest.approx(np.average(of_each, weights=rows[0]))
    assert effects.prop_mediated.value == worlds_of(rows).effects().prop_mediated.value


def test_ratios_of_negative_outcomes_are_refused() -> None:
    with pytest.raises(il.InputError, match=r"y10 of example 1 is -0\.5, and a share of negative"):
        worlds_of([[1, 1], [1, 1], [1, -0.5], [1, 1]]).effects(scale="ratio")
    effects = random_worlds().effects()
    object.__setattr__(effects, "scale", "log")
    with pytest.raises(il.InputError, match="scale is 'log'; choose 'difference' or 'ratio'"):
        effects.__post_init__()


# --- proportions --------------------------------------------------------------------------------


def test_the_proportion_mediated_is_a_ratio_of_means_by_fieller() -> None:
    worlds = random_worlds(200, seed=3)
    effects = worlds.effects()
    te, tnie = effects.te.values, effects.tnie.values
    share = effects.prop_mediated
    assert share.value == pytest.approx(tnie.mean() / te.mean())
    assert share.value != pytest.approx(np.mean(tnie / te))
    bounded = worlds_of(np.random.default_rng(3).normal([[0], [3], [1], [2]], 1, (4, 50))).effects()
    interval = bounded.prop_mediated.ci()
    assert not interval.unbounded
    for end in (interval.low, interval.high):  # where the contrast is just significant
        contrast = Estimate.mean(bounded.tnie.values - end * bounded.te.values)
        assert contrast.pvalue() == pytest.approx(0.05, abs=1e-6)


def test_a_share_of_nothing_is_flagged_unbounded() -> None:
    rng = np.random.default_rng(0)
    effects = worlds_of(rng.normal([[0], [0], [1], [1]], 1, (4, 20))).effects()
    assert effects.te.pvalue() > 0.05
    assert effects.prop_mediated.ci().unbounded
    assert "unbounded" in repr(effects)
    assert effects.prop_mediated.verdict(margin=0.5) != "equivalent"


# --- 0/1 outcomes -------------------------------------------------------------------------------


def test_contrasts_of_0_1_outcomes_are_never_taken_for_certain() -> None:
    """All is mediated, in all 50 examples: the interaction is 0 and the share is 1, but not
    exactly."""
    zeros, ones = np.zeros(50), np.ones(50)
    effects = worlds_of([zeros, ones, zeros, ones, zeros, zeros], binary=True).effects()
    expected = {
        "te": "Tango score", "tnie": "Tango score", "cde": "Tango score",
        "int_med": "bounded score", "int_ref": "bounded score",
        "prop_mediated": "bounded Fieller", "prop_eliminated": "bounded Fieller",
    }  # fmt: skip
    for name, procedure in expected.items():
        estimate = getattr(effects, name)
        assert estimate.procedure == procedure
        assert estimate.ci().high - estimate.ci().low > 0.05
        assert estimate.value in estimate.ci()
    # twice the score interval of a single difference, for an example can count twice
    assert effects.int_med.ci().high == pytest.approx(2 * effects.pnde.ci().high, abs=1e-9)
    assert effects.int_med.verdict(margin=0.05) == "inconclusive"
    assert effects.pnde.verdict(margin=0.08) == "equivalent"
    assert effects.prop_mediated.value == 1


def test_what_a_contrast_can_be_is_enumerated() -> None:
    assert module._possible(module.CONTRAST["int_med"]).ravel().tolist() == [-2, -1, 0, 1, 2]
    pairs = module._possible(module.CONTRAST["tnie"], module.CONTRAST["te"]).tolist()
    assert pairs == [[-1, -1], [-1, 0], [0, -1], [0, 0], [0, 1], [1, 0], [1, 1]]
    assert [1, -1] not in pairs  # y11 - y10 = 1 needs y11 = 1, and y11 - y00 = -1 needs y11 = 0


def test_the_ratio_scale_of_0_1_outcomes_is_bounded_too() -> None:
    effects = binary_worlds(60).effects(scale="ratio")
    for name in ("te", "int_med", "cde"):
        assert getattr(effects, name).procedure == "bounded Fieller"
        assert getattr(effects, name).value in getattr(effects, name).ci()


def test_groups_reach_every_procedure() -> None:
    groups = [i // 2 for i in range(40)]
    for worlds in (random_worlds(40, groups=groups), binary_worlds(40, groups=groups)):
        for name, estimate in worlds.effects().all.items():
            assert estimate.n_groups == 20, name
            assert "cluster" in estimate.procedure


# --- steps --------------------------------------------------------------------------------------


def stepped(binary: bool) -> il.PotentialOutcomes:
    """Two steps, each world of its own."""
    rng = np.random.default_rng(4)
    rows = rng.normal(0, 1, (7, 30))
    rows = (rows > 0) * 1.0 if binary else rows
    y00, y11, y10, y01, first, second, _ = rows
    steps = {frozenset({0}): first, frozenset({1}): second, frozenset({0, 1}): y01}
    return il.PotentialOutcomes(y00, y11, y10, y01, binary=binary, steps=steps)


@pytest.mark.parametrize("binary", [False, True])
@pytest.mark.parametrize("scale", ["difference", "ratio"])
def test_parts_of_steps_add_up_to_the_pure_indirect_effect(binary: bool, scale: str) -> None:
    worlds = stepped(binary)
    if scale == "ratio" and not binary:
        worlds = il.PotentialOutcomes(
            *(np.abs(v) for v in worlds.arms.values()),
            steps={done: np.abs(v) for done, v in worlds.steps.items()},
        )
    effects = worlds.effects(scale=scale)
    for method, procedure in (("telescoping", "Tango score"), ("shapley", "bounded score")):
        parts = effects.by_step(method=method)
        assert sum(p.value for p in parts.values()) == pytest.approx(effects.pnie.value)
        if binary and scale == "difference":
            assert {p.procedure for p in parts.values()} == {procedure}
    first, second = worlds.steps[frozenset({0})], worlds.steps[frozenset({1})]
    if scale == "difference":
        shapley = (first - worlds.y00 + worlds.y01 - second) / 2
        np.testing.assert_allclose(effects.by_step(method="shapley")[0].values, shapley, atol=1e-12)


def test_steps_rest_on_the_examples_that_have_all_worlds() -> None:
    worlds = stepped(False)
    worlds.steps[frozenset({0})][3] = NAN
    worlds.y10[5] = NAN
    parts = worlds.effects().by_step()
    for part in parts.values():
        assert np.flatnonzero(np.isnan(part.values)).tolist() == [3, 5]
    kept = np.setdiff1d(np.arange(30), [3, 5])
    pnie = (worlds.y01 - worlds.y00)[kept].mean()
    assert sum(part.value for part in parts.values()) == pytest.approx(pnie)


def test_steps_that_were_not_run_are_asked_for() -> None:
    worlds = stepped(False)
    half = {k: v for k, v in worlds.steps.items() if k != frozenset({1})}
    effects = il.PotentialOutcomes(*worlds.arms.values(), steps=half).effects()
    assert len(effects.by_step()) == 2
    with pytest.raises(il.InputError, match=r"no worlds for 'shapley'; run il\.counterfactuals"):
        effects.by_step(method="shapley")
    with pytest.raises(il.InputError, match="no worlds for 'telescoping'"):
        random_worlds().effects().by_step()


# --- missing outcomes ---------------------------------------------------------------------------


def test_missing_outcomes_are_left_out_alike_everywhere_and_counted() -> None:
    rows = np.random.default_rng(0).normal(0, 1, (6, 20))
    rows[0, 1], rows[2, 4], rows[5, 7] = NAN, NAN, NAN  # y00, y10, c1
    worlds = worlds_of(rows)
    effects = worlds.effects()
    for name in ("te", "pnde", "tnde", "pnie", "tnie", "int_med", "prop_mediated"):
        assert getattr(effects, name).missing == 2, name
    for name in ("cde", "int_ref", "prop_eliminated"):
        assert getattr(effects, name).missing == 3, name
    assert effects.te.value == pytest.approx(effects.pnde.value + effects.tnie.value)
    kept = np.setdiff1d(np.arange(20), [1, 4])
    assert effects.tnde.value == pytest.approx((rows[1] - rows[3])[kept].mean())
    four = effects.decompose(ways=4)
    assert {part.n for part in four.values()} == {17}
    everyone = np.setdiff1d(np.arange(20), [1, 4, 7])
    total = (rows[1] - rows[0])[everyone].mean()
    assert sum(part.value for part in four.values()) == pytest.approx(total)
    assert worlds.parse_coverage == {
        "y00": 0.95, "y11": 1.0, "y10": 0.95, "y01": 1.0, "c0": 1.0, "c1": 0.95,
    }  # fmt: skip
    assert "2 of 20 examples miss an outcome and are left out" in repr(effects)
    assert "parse coverage below 100%: y00 95.0%, y10 95.0%, c1 95.0%" in repr(worlds)


# --- what is shown ------------------------------------------------------------------------------


def test_the_table_names_every_effect_with_its_formula_and_interval() -> None:
    effects = random_worlds().effects()
    shown = repr(effects)
    assert shown.startswith("Effects on outcome of 30 examples")
    for name, estimate in effects.all.items():
        assert name in shown
        assert f"{estimate.value:.4g}" in shown
        assert module.MEANING[name] in shown
    without = worlds_of(np.zeros((4, 3)) + np.arange(3)).effects()
    assert set(effects.all) - set(without.all) == {"cde", "int_ref", "prop_eliminated"}
    assert "as a share of y00" in repr(worlds_of(np.ones((4, 3))).effects(scale="ratio"))


def test_worlds_become_a_table() -> None:
    worlds = il.PotentialOutcomes(
        *np.arange(8.0).reshape(4, 2), groups=("a", "b"), emitted=np.array([[2, 0], [1, 1]]),
        flags=("not_emitted", None),
    )  # fmt: skip
    frame = worlds.to_dataframe()
    assert list(frame.columns) == [
        "y00", "y11", "y10", "y01", "group", "emitted_base", "emitted_source", "flag",
    ]  # fmt: skip
    assert frame["emitted_source"].tolist() == [0, 1]
    always = worlds.always_emitters()
    assert always.y00.tolist() == [1.0]
    assert always.groups == ("b",)
    only = worlds.subset([True, False])
    assert only.flags == ("not_emitted",)
    with pytest.raises(il.InputError, match="1 emit as base, 0 as source and none as both"):
        only.always_emitters()


# --- refusals -----------------------------------------------------------------------------------

GOOD: dict[str, Any] = {name: [0.0, 1.0, 1.0] for name in ("y00", "y11", "y10", "y01")}


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"y10": [1.0]}, r"unequal lengths \{'y00': 3, 'y11': 3, 'y10': 1, 'y01': 3\}"),
        ({"groups": ["a", "b"]}, r"unequal lengths .*'groups': 2"),
        ({"y00": [[0.0, 1.0, 1.0]]}, r"y00 has shape \(1, 3\), expected one value per example"),
        ({"y01": 1.0}, r"y01 has shape \(\), expected one value"),
        ({"y11": [0, 1, np.inf]}, "y11 of example 2 is inf; use nan for what is missing"),
        ({"y11": ["a", "b", "c"]}, "y11 cannot be read as numbers"),
        ({"c0": [0, 0, 0]}, "needs both c0 and c1; give both, or neither"),
        ({"y00": [0, 0.5, 1], "binary": True}, "y00 holds 0.5, which is not 0 or 1"),
        ({name: [] for name in GOOD}, "the worlds are empty"),
    ],
)
def test_bad_arrays_are_refused_in_a_sentence(changes: dict[str, Any], sentence: str) -> None:
    with pytest.raises(il.InputError, match=sentence) as error:
        il.PotentialOutcomes.from_arrays(**GOOD | changes)
    assert "\n" not in str(error.value)


def test_too_little_for_an_interval_is_refused_by_each_estimate_and_said_in_the_table() -> None:
    one = worlds_of(np.ones((4, 1)))
    with pytest.raises(EstimateError, match="an interval needs 2"):
        one.effects().te  # noqa: B018
    assert "no intervals: 1 of 1 examples has a value" in repr(one.effects())
    group = worlds_of(np.ones((4, 6)), groups=["a"] * 6)
    with pytest.raises(EstimateError, match="6 examples in 1 group are too few groups"):
        group.effects().tnie  # noqa: B018
    nothing = worlds_of(np.full((4, 3), NAN))
    with pytest.raises(EstimateError, match="0 of 3 examples have a value"):
        nothing.effects().te  # noqa: B018
    assert "mean outcome: y00 nan" in repr(nothing)


def test_what_needs_a_reference_says_so() -> None:
    effects = il.PotentialOutcomes.from_arrays(**GOOD).effects()
    for name in ("cde", "int_ref", "prop_eliminated"):
        with pytest.raises(
            il.InputError, match="needs the worlds with the mediator at a reference"
        ):
            getattr(effects, name)
    with pytest.raises(il.InputError, match=r"decompose\(ways=4\) needs the worlds"):
        effects.decompose(ways=4)


def test_a_margin_is_asked_for() -> None:
    with pytest.raises(EstimateError, match="a claim of no effect needs a margin"):
        random_worlds().effects().tnie.verdict()


def test_subsets_are_of_examples() -> None:
    worlds = random_worlds(5)
    for keep in ([True] * 4, [0, 1], np.zeros(5, int)):
        with pytest.raises(il.InputError, match="for 5 examples; give True or False for each"):
            worlds.subset(keep)
    with pytest.raises(il.InputError, match="none of the 5 examples is kept"):
        worlds.subset([False] * 5)
    with pytest.raises(il.InputError, match="not made by runs"):
        worlds.always_emitters()
