"""Every possible outcome of n paired 0/1 examples with its probability: no simulation needed."""

from dataclasses import dataclass
from functools import cache

import numpy as np
from scipy.special import gammaln, xlogy


@dataclass(frozen=True)
class Outcomes:
    """All counts of gained and lost that n examples can have."""

    gained: np.ndarray
    lost: np.ndarray
    n: int

    def probability(self, discordant: float, difference: float) -> np.ndarray:
        """How likely each is, if this share is discordant and this is P(gained) - P(lost)."""
        up, down = (discordant + difference) / 2, (discordant - difference) / 2
        counts = (self.gained, self.lost, self.n - self.gained - self.lost)
        shares = (up, down, max(1 - discordant, 0.0))
        log = gammaln(self.n + 1) + sum(
            xlogy(k, p) - gammaln(k + 1) for k, p in zip(counts, shares, strict=True)
        )
        return np.exp(log)


@cache
def outcomes(n: int) -> Outcomes:
    pairs = [(b, c) for b in range(n + 1) for c in range(n + 1 - b)]
    gained, lost = np.array(pairs, dtype=float).T
    return Outcomes(gained, lost, n)
