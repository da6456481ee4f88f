"""How many examples are needed, and what those at hand can show: plan before you run.

The plan is for the tests of `Estimate.paired` and `Estimate.mean`. For paired 0/1 outcomes (an
answer is right or not, without and with the edit) what matters is the discordance: the share of
examples whose outcome changes, either way. Power is summed over all outcomes of the experiment, so
that it holds for few examples, too. For continuous outcomes it is that of Student's t.

The normal formulas, on request and as a first guess: with v the variance of one difference, which
is discordance - difference^2 for 0/1 outcomes, and z_p the normal quantile,

    equivalence, true difference 0:   n = (z_{1-alpha} + z_{(1+power)/2})^2 v / margin^2
    effect:                           n = (z_{1-alpha/2} sqrt(v0) + z_{power} sqrt(v))^2 / diff^2

v0 is v under "no effect": the discordance itself. So 80% power at alpha .05 takes z_.95 and z_.90
for equivalence: both one-sided tests must succeed, and each may fail in 10% of the experiments.
Where few examples are discordant the formula promises too much: at 2% discordance and a margin of 3
points its 191 examples have a power of 54%, and 281 are needed.

Sources: Tango (1998), Statistics in Medicine 17:891-908; Connor (1987), Biometrics 43:207-211; for
the t distribution, Phillips (1990), J. Pharmacokinetics and Biopharmaceutics 18:137-144.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np
from scipy import optimize, stats

from imaginelens.estimates.errors import EstimateError
from imaginelens.estimates.score import score_interval, score_z
from imaginelens.estimates.student import critical

_TAIL = 1e-13  # of a distribution: left out of a sum or an integral
_MOST = 10**9  # examples: nobody plans for more


def power_equivalence(
    n: int,
    *,
    margin: float,
    discordance: float | None = None,
    sd: float | None = None,
    difference: float = 0.0,
    alpha: float = 0.05,
    design_effect: float = 1.0,
) -> float:
    """The chance that n examples show the effect to be smaller than the margin, if it is.

    Args:
        margin: what is too small to matter, in the outcome's unit: 0.03 for 3 points.
        discordance: for 0/1 outcomes, the share of examples that change, either way.
        sd: for continuous outcomes, the standard deviation of one example's effect.
        difference: the true mean effect.
        alpha: of each of the two one-sided tests.
        design_effect: how many clustered examples tell as much as one alone: 1 + (m - 1) ICC for
            clusters of m. The plan is that for n / design_effect examples.

    Raises:
        EstimateError: not one of discordance and sd was given, or a number is out of its range.

    >>> round(power_equivalence(191, margin=0.03, discordance=0.02), 3)
    0.541
    >>> round(power_equivalence(191, margin=0.03, discordance=0.10), 3)
    0.001
    """
    outcome = _outcome(discordance, sd, difference, alpha, design_effect)
    return outcome.equivalence(_number(n, design_effect), _margin(margin, outcome))


def power_effect(
    n: int,
    *,
    difference: float,
    discordance: float | None = None,
    sd: float | None = None,
    alpha: float = 0.05,
    design_effect: float = 1.0,
) -> float:
    """The chance that n examples show an effect of this size to differ from 0, two-sided.

    The arguments and errors are those of `power_equivalence`.

    >>> round(power_effect(191, difference=0.05, discordance=0.10), 3)
    0.597
    """
    outcome = _outcome(discordance, sd, difference, alpha, design_effect)
    return outcome.effect(_number(n, design_effect))


def sample_size(
    *,
    margin: float | None = None,
    discordance: float | None = None,
    sd: float | None = None,
    difference: float = 0.0,
    power: float = 0.8,
    alpha: float = 0.05,
    design_effect: float = 1.0,
    method: Literal["exact", "normal"] = "exact",
) -> int:
    """How many examples to run: for equivalence within `margin`, or to find `difference` without.

    From the answer on, power stays above the target: that of 0/1 outcomes goes up and down a
    little from one n to the next, and "exact" looks past that. "normal" is the textbook formula.

    Args:
        power: the chance of success to plan for; the others are those of `power_equivalence`.

    Raises:
        EstimateError: the power cannot be reached, because the difference is not smaller than the
            margin, or there is neither a margin nor a difference.

    >>> sample_size(margin=0.03, discordance=0.02, method="normal")
    191
    >>> sample_size(margin=0.03, discordance=0.02)
    281
    """
    outcome = _outcome(discordance, sd, difference, alpha, design_effect)
    _share(power, "power")
    if margin is None and difference == 0:
        raise EstimateError(
            "an effect of 0 is found by no number of examples; give a difference to find, or a "
            "margin for equivalence"
        )
    if margin is not None and abs(difference) >= _margin(margin, outcome):
        raise EstimateError(
            f"a true difference of {difference:g} is not smaller than the margin of {margin:g}, so "
            "no number of examples shows it to be; widen the margin, or plan to find an effect"
        )
    guess = outcome.guess(margin, power)
    if guess * design_effect > _MOST:
        raise EstimateError(f"this takes {guess * design_effect:.3g} examples; nothing is planned")
    if method == "normal":
        return int(np.ceil(guess * design_effect - 1e-9))

    def enough(n: int) -> bool:
        reached = outcome.effect(n) if margin is None else outcome.equivalence(n, margin)
        return reached >= power

    alone = _from_here_on(enough, max(2, int(guess)), outcome.wave(margin, guess))
    return int(np.ceil(alone * design_effect - 1e-9))


def smallest_margin(
    n: int,
    *,
    discordance: float | None = None,
    sd: float | None = None,
    difference: float = 0.0,
    alpha: float = 0.05,
    design_effect: float = 1.0,
) -> float:
    """The smallest margin within which such data show equivalence; report it with any "no effect".

    It is the larger end, in absolute value, of the 1 - 2 alpha interval. For 0/1 outcomes the data
    are whole numbers: the net change nearest to n * difference, and the fewest discordant examples
    from n * discordance (rounded) on that allow it.

    Args:
        difference: as observed, like the others, which are those of `power_equivalence`.

    Raises:
        EstimateError: as for `power_equivalence`.

    >>> round(smallest_margin(191, discordance=0.05, difference=1 / 191), 3)
    0.037
    """
    outcome = _outcome(discordance, sd, difference, alpha, design_effect)
    return outcome.smallest_margin(_whole(n), design_effect)


@dataclass(frozen=True)
class _Paired:
    """A 0/1 outcome without and with the edit."""

    discordance: float
    difference: float
    alpha: float

    @property
    def variance(self) -> float:
        return self.discordance - self.difference**2

    def guess(self, margin: float | None, power: float) -> float:
        return _normal(self.variance, self.discordance, self.difference, self.alpha, margin, power)

    def wave(self, margin: float | None, n: float) -> int:
        """How far ahead power may still fall back.

        What a number of discordant examples must be split into changes every 2 / margin examples,
        and the waves of as many such numbers as are likely cancel.
        """
        likely = np.sqrt(n * self.discordance * (1 - self.discordance))
        return int(10 + 4 / (margin or self.discordance) / max(1.0, likely))

    def equivalence(self, n: float, margin: float) -> float:
        """Sum over the number of discordant examples: what they must be split into is a range."""
        whole = int(n)
        t = float(critical(1 - 2 * self.alpha, whole - 1))

        def shown(discordant: np.ndarray, gained: np.ndarray) -> np.ndarray:
            return np.asarray(score_z(gained, discordant - gained, whole, -margin) > t)

        return self._sum(whole, shown, both=True)

    def effect(self, n: float) -> float:
        """Sum over the number of discordant examples, as `equivalence`."""
        whole = int(n)
        t = float(critical(1 - self.alpha, whole - 1))

        def shown(discordant: np.ndarray, gained: np.ndarray) -> np.ndarray:
            return np.asarray(score_z(gained, discordant - gained, whole, 0.0) > t)

        return self._sum(whole, shown, both=False)

    def _sum(
        self, n: int, shown: Callable[[np.ndarray, np.ndarray], np.ndarray], *, both: bool
    ) -> float:
        """The chance of a split that `shown` accepts, and its mirror image: both, or either.

        `shown` accepts all splits from some number of gained examples on.
        """
        if self.discordance == 0:
            discordant = np.zeros(1, dtype=int)
        else:
            ends = np.asarray(stats.binom.ppf([_TAIL, 1 - _TAIL], n, self.discordance), dtype=int)
            discordant = np.arange(ends[0], ends[1] + 1)
        least = _first(discordant, shown)
        chance = stats.binom.pmf(discordant, n, self.discordance)
        up = (1 + self.difference / self.discordance) / 2 if self.discordance else 0.5
        below = stats.binom.cdf(least - 1, discordant, up)
        above = stats.binom.cdf(discordant - least, discordant, up)  # the mirror image of `least`
        split = np.maximum(above - below, 0) if both else (1 - below) + above
        return float(np.clip(chance @ split, 0, 1))

    def smallest_margin(self, n: int, design_effect: float) -> float:
        net, discordant = round(n * self.difference), round(n * self.discordance)
        discordant = max(discordant, abs(net))
        discordant += (discordant - net) % 2
        gained, lost = (discordant + net) // 2, (discordant - net) // 2
        low, high = score_interval(
            gained,
            lost,
            n,
            level=1 - 2 * self.alpha,
            inflation=design_effect,
            df=n / design_effect - 1,
        )
        return float(max(-low, high))


@dataclass(frozen=True)
class _Continuous:
    """An outcome on a scale, with normal differences."""

    sd: float
    difference: float
    alpha: float

    def guess(self, margin: float | None, power: float) -> float:
        return _normal(self.sd**2, self.sd**2, self.difference, self.alpha, margin, power)

    def wave(self, margin: float | None, n: float) -> int:
        """Power only rises."""
        return 0

    def equivalence(self, n: float, margin: float) -> float:
        error = self.sd / np.sqrt(n)
        low, high = (-margin - self.difference) / error, (margin - self.difference) / error
        return _power_tost(float(low), float(high), n - 1, self.alpha)

    def effect(self, n: float) -> float:
        shift = abs(self.difference) * np.sqrt(n) / self.sd
        t = float(critical(1 - self.alpha, n - 1))
        return float(stats.nct.sf(t, n - 1, shift) + stats.nct.cdf(-t, n - 1, shift))

    def smallest_margin(self, n: int, design_effect: float) -> float:
        alone = n / design_effect
        t = float(critical(1 - 2 * self.alpha, alone - 1))
        return float(abs(self.difference) + t * self.sd / np.sqrt(alone))


def _first(
    discordant: np.ndarray, shown: Callable[[np.ndarray, np.ndarray], np.ndarray]
) -> np.ndarray:
    """The smallest number of gained examples that is accepted, by halving; one more for none."""
    low, high = np.full_like(discordant, -1), discordant + 1
    while (high - low > 1).any():
        middle = np.clip((low + high) // 2, 0, discordant)
        accepted = shown(discordant, middle)
        open_ = high - low > 1
        high = np.where(open_ & accepted, middle, high)
        low = np.where(open_ & ~accepted, middle, low)
    return high


def _power_tost(low: float, high: float, df: float, alpha: float) -> float:
    """Two one-sided t-tests: the bounds are in standard errors from the true mean.

    Given the estimated standard error w (in units of the true one), both tests succeed when the
    mean lies in [low + t w, high - t w]; this is integrated over w.
    """
    t = float(stats.t.isf(alpha, df))
    ends = np.sqrt(np.array([stats.chi2.ppf(_TAIL, df), stats.chi2.isf(_TAIL, df)]) / df)
    least, most = ends[0], min(ends[1], (high - low) / (2 * t))
    if most <= least:
        return 0.0
    nodes, weights = np.polynomial.legendre.leggauss(400)
    w = least + (most - least) * (nodes + 1) / 2
    density = stats.chi2.pdf(df * w**2, df) * 2 * df * w
    inside = stats.norm.cdf(high - t * w) - stats.norm.cdf(low + t * w)
    return float((most - least) / 2 * (weights @ (density * inside)))


def _normal(
    variance: float,
    null: float,
    difference: float,
    alpha: float,
    margin: float | None,
    power: float,
) -> float:
    """Examples by the normal formulas of this module, not rounded."""
    if margin is None:
        z = stats.norm.isf(alpha / 2) * np.sqrt(null) + stats.norm.ppf(power) * np.sqrt(variance)
        return float((z / difference) ** 2)
    z = float(stats.norm.isf(alpha))

    def short(log_n: float) -> float:
        error = np.sqrt(variance / np.exp(log_n))
        ends = (margin - difference) / error - z, (margin + difference) / error - z
        return float(stats.norm.cdf(ends[0]) + stats.norm.cdf(ends[1]) - 1 - power)

    if variance == 0:
        return 2.0
    middle = np.log(variance / (margin - abs(difference)) ** 2)
    return float(np.exp(optimize.brentq(short, middle - 10, middle + 10, xtol=1e-12)))


def _from_here_on(enough: Callable[[int], bool], guess: int, ahead: int) -> int:
    """The smallest n that is enough, and so are all within `ahead` of it."""
    high = guess
    while not enough(high):
        high = high * 5 // 4 + 1
    low = 1
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if enough(middle) else (middle, high)
    seen = high  # everything from high to seen is enough
    while seen < high + ahead:
        seen += 1
        if not enough(seen):
            high = seen + 1
    while high > 2 and enough(high - 1):
        high -= 1
    return high


def _outcome(
    discordance: float | None,
    sd: float | None,
    difference: float,
    alpha: float,
    design_effect: float,
) -> _Paired | _Continuous:
    """Which of the two outcomes is planned, checked."""
    if (discordance is None) == (sd is None):
        given = "neither" if sd is None else "both"
        raise EstimateError(
            f"{given} of discordance and sd came; give discordance for 0/1 outcomes, sd for others"
        )
    if not 0 < alpha < 0.5:
        raise EstimateError(f"alpha is {alpha:g}; give the level of a test, such as 0.05")
    if not 0 < design_effect < np.inf:
        raise EstimateError(f"a design effect of {design_effect:g} means nothing; give 1 or more")
    if not np.isfinite(difference):
        raise EstimateError(f"a difference of {difference:g} is no number to plan with")
    if sd is not None:
        if not 0 < sd < np.inf:
            raise EstimateError(f"an sd of {sd:g} cannot be; give a positive number")
        return _Continuous(sd, difference, alpha)
    assert discordance is not None
    if not abs(difference) <= discordance <= 1:
        raise EstimateError(
            f"a discordance of {discordance:g} and a difference of {difference:g} cannot be "
            "together; give shares with |difference| <= discordance <= 1"
        )
    return _Paired(discordance, difference, alpha)


def _margin(margin: float, outcome: _Paired | _Continuous) -> float:
    widest = 1.0 if isinstance(outcome, _Paired) else np.inf
    if not 0 < margin < widest:
        below = " and below 1: 0.03 for 3 points" if widest == 1 else ""
        raise EstimateError(f"the margin is {margin:g}; give a number above 0{below}")
    return margin


def _share(value: float, name: str) -> None:
    if not 0 < value < 1:
        raise EstimateError(f"{name} is {value:g}; give a share between 0 and 1, such as 0.8")


def _whole(n: int) -> int:
    if n < 2:
        raise EstimateError(f"nothing can be planned for {n} examples; give 2 at least")
    return n


def _number(n: int, design_effect: float) -> float:
    """How many unrelated examples n are worth."""
    alone = _whole(n) / design_effect
    if alone < 2:
        raise EstimateError(
            f"{n} examples with a design effect of {design_effect:g} are worth {alone:.2g}; "
            "2 are needed at least"
        )
    return alone
