"""0/1 outcomes of independent examples: every possible outcome, with its probability."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache, partial

import numpy as np
from scipy import special, stats

import imaginelens.estimates as ie
from calibrating.intervals import Ends
from calibrating.rows import Row, Task, exactly
from imaginelens.estimates.score import score_interval

SIZES, DISCORDANCES = (20, 50, 191), (0.02, 0.05, 0.10)
MARGINS = (0.02, 0.05, 0.10)


@dataclass(frozen=True, eq=False)
class Outcomes:
    """Every possible (gained, lost) of n examples."""

    gained: np.ndarray
    lost: np.ndarray
    n: int

    def chance(self, discordance: float, difference: float) -> np.ndarray:
        """The probability of each, by the multinomial law."""
        same = self.n - self.gained - self.lost
        shares = (discordance + difference) / 2, (discordance - difference) / 2, 1 - discordance
        log = special.gammaln(self.n + 1)
        for count, share in zip((self.gained, self.lost, same), shares, strict=True):
            log = log + special.xlogy(count, max(share, 0.0)) - special.gammaln(count + 1)
        return np.exp(log)

    @cache  # noqa: B019  as many as there are sizes
    def ends(self, level: float) -> Ends:
        """The interval of `Estimate.paired` for each."""
        return score_interval(self.gained, self.lost, self.n, level=level, df=self.n - 1)

    @cache  # noqa: B019
    def equivalent(self, margin: float) -> np.ndarray:
        """Which of them TOST takes for equivalent."""
        low, high = self.ends(0.90)
        return (low > -margin) & (high < margin)


@cache
def outcomes(n: int) -> Outcomes:
    gained, lost = (side.ravel() for side in np.mgrid[0 : n + 1, 0 : n + 1])
    there = gained + lost <= n
    found = Outcomes(gained[there], lost[there], n)
    low, high = found.ends(0.95)
    for i in range(0, len(low), max(1, len(low) // 40)):  # the library says the same
        b, c = int(found.gained[i]), int(found.lost[i])
        after = np.r_[np.ones(b), np.zeros(n - b)]
        before = np.r_[np.zeros(b), np.ones(c), np.zeros(n - b - c)]
        estimate = ie.Estimate.paired(after, before)
        assert np.allclose([low[i], high[i]], [estimate.ci().low, estimate.ci().high], atol=1e-9)
        for margin in MARGINS:
            assert found.equivalent(margin)[i] == estimate.equivalence(margin).equivalent
        test = ie.mcnemar(after, before)
        assert np.allclose(mcnemar(np.array([b]), np.array([c])).T, [[test.exact, test.mid_p]])
    return found


def mcnemar(gained: np.ndarray, lost: np.ndarray) -> np.ndarray:
    """Exact and mid-P p-values of every outcome."""
    fewer, discordant = np.minimum(gained, lost), gained + lost
    twice = 2 * stats.binom.cdf(fewer, discordant, 0.5)
    return np.stack([np.minimum(twice, 1), twice - stats.binom.pmf(fewer, discordant, 0.5)])


def paired_coverage(n: int, discordance: float, difference: float) -> float:
    """How often the interval of `Estimate.paired` holds the true difference."""
    low, high = outcomes(n).ends(0.95)
    chance = outcomes(n).chance(discordance, difference)
    return float(chance @ ((low <= difference) & (difference <= high)))


def paired_tost(n: int, discordance: float, margin: float) -> float:
    """How often an effect at the margin is taken for equivalent."""
    at = outcomes(n)
    return float(at.chance(discordance, margin) @ at.equivalent(margin))


def paired() -> Iterator[Task]:
    """`Estimate.paired` and McNemar's tests of independent examples."""
    for n in SIZES:
        yield f"paired, n = {n}", partial(paired_rows, n)


def paired_rows(n: int) -> list[Row]:
    at, many = outcomes(n), np.linspace(0.001, 1, 1000)
    pvalues = dict(zip(("exact", "mid-P"), mcnemar(at.gained, at.lost), strict=True))
    rows = []
    for discordance in DISCORDANCES:
        data = f"n = {n}, {discordance:.0%} discordant, difference"
        for difference in (0.0, discordance / 2, discordance):
            rate = paired_coverage(n, discordance, difference)
            name = f"{data} {100 * difference:g} points"
            rows.append(exactly("Tango score", name, "coverage", rate))
        rows.append(exactly("Tango score", f"{data} 0 points", "test", size(n, discordance)))
        for kind, p in pvalues.items():
            rate = at.chance(discordance, 0.0) @ (p <= 0.05)
            rows.append(exactly(f"McNemar, {kind}", f"{data} 0 points", "test", rate))
    worst = f"n = {n}, the worst discordance"
    rows.append(exactly("Tango score", worst, "test", max(size(n, d) for d in many)))
    for kind, p in pvalues.items():
        rate = max(at.chance(d, 0.0) @ (p <= 0.05) for d in many)
        rows.append(exactly(f"McNemar, {kind}", worst, "test", rate))
    for margin in MARGINS:
        for discordance in (0.02, 0.05, 0.06, 0.10, 0.20):
            if discordance >= margin:
                name = f"n = {n}, {discordance:.0%} discordant, margin {margin:.0%}"
                rate = paired_tost(n, discordance, margin)
                rows.append(exactly("Tango score", name, "TOST", rate))
        rate = max(paired_tost(n, d, margin) for d in many[many >= margin])
        rows.append(exactly("Tango score", f"{worst}, margin {margin:.0%}", "TOST", rate))
    return rows


def size(n: int, discordance: float) -> float:
    """How often the two-sided test of `Estimate.paired` rejects "no effect" where it is true."""
    return 1 - paired_coverage(n, discordance, 0.0)


def shares() -> Iterator[Task]:
    """`Estimate.share` of independent examples."""
    for n in SIZES:
        yield f"share, n = {n}", partial(share_rows, n)


def share_rows(n: int) -> list[Row]:
    hits, rows = np.arange(n + 1), []

    def decided(p: float, chance: float, say: Callable[[ie.Estimate], bool]) -> float:
        said = [say(ie.Estimate.share(np.arange(n) < hit, chance=chance)) for hit in hits]
        return float(stats.binom.pmf(hits, n, p) @ np.array(said))

    for p in (0.1, 0.25, 0.5, 0.9):
        data = f"n = {n}, share {p:g}"
        rate = decided(p, p, lambda e, p=p: p in e.ci())
        rows.append(exactly("Wilson score", data, "coverage", rate))
        rate = decided(p, p, lambda e: e.pvalue() < 0.05)
        rows.append(exactly("Wilson score", data, "test", rate))
    for chance, p in ((0.5, 0.6), (0.25, 0.35), (0.25, 0.15)):
        data = f"n = {n}, share {p:g}, chance {chance:g}, margin 10%"
        rate = decided(p, chance, lambda e: e.equivalence(0.1).equivalent)
        rows.append(exactly("Wilson score", data, "TOST", rate))
    return rows
