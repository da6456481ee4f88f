"""Interchange: which mechanism do the latents have? Swap them, and see whose prediction comes true.

Necessity tests cannot tell a latent that carries the answer from one that points to where the
answer is: both break when it is destroyed. A swap can, on pairs for which the mechanisms predict
different answers. See Geiger et al. (2021, arXiv 2106.02997) for interchange interventions.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from scipy import stats

from imaginelens.hooks import Landing, LatentModel, Pairs, latent
from imaginelens.hooks.errors import InputError
from imaginelens.hooks.metrics import kl, same
from imaginelens.hooks.pairs import Hypothesis, Steps
from imaginelens.hooks.positions import LatentPositions
from imaginelens.hooks.textspans import ImaginationPositions
from imaginelens.mediation.result_files import Saved

OTHER, UNDETERMINED = "other", "undetermined"


@dataclass(frozen=True)
class Share:
    """How often one hypothesis came true: a share with Wilson's interval, and on how many pairs."""

    value: float
    low: float
    high: float
    n: int

    def __str__(self) -> str:
        return f"{self.value:.3f} [{self.low:.3f}, {self.high:.3f}]"


@dataclass(frozen=True)
class Interchange(Saved):
    """What was answered after the swap, and what each hypothesis had predicted.

    Attributes:
        answers: one per pair; None where no answer was found.
        predictions: by hypothesis, one per pair.
        steps: the latent steps that were swapped; None for all.
        landing: the proof of the swap.
    """

    answers: tuple[str | None, ...]
    predictions: dict[str, tuple[str, ...]]
    steps: Steps
    landing: Landing

    @property
    def decisive(self) -> list[int]:
        """The pairs that can tell the hypotheses apart: no two of them predict the same answer."""
        rows = zip(*self.predictions.values(), strict=True)
        return [i for i, row in enumerate(rows) if len({a.casefold() for a in row}) == len(row)]

    @property
    def missing(self) -> int:
        """How many decisive pairs gave no answer; they are left out of the shares."""
        return sum(self.answers[i] is None for i in self.decisive)

    def shares(self, *, level: float = 0.95) -> dict[str, Share]:
        """The share of decisive pairs in which each hypothesis came true, and "other" for none.

        Raises:
            InputError: no pair is decisive, so that nothing can be told.
        """
        found = [i for i in self.decisive if self.answers[i] is not None]
        if not found:
            raise InputError(
                f"none of the {len(self.answers)} pairs tells {', '.join(self.predictions)} apart "
                "(with an answer found); use more pairs, or fewer hypotheses"
            )
        hits = {
            name: np.array([same(self.answers[i], predicted[i]) for i in found])
            for name, predicted in self.predictions.items()
        }
        hits[OTHER] = ~np.any(list(hits.values()), axis=0)
        return {name: _share(hit, level) for name, hit in hits.items()}

    def winner(self, *, at_least: float = 0.8) -> str:
        """The hypothesis that explains at least this share of the pairs, by its whole interval;
        "undetermined" if none does (a mixture, or too few pairs)."""
        named = [n for n, share in self.shares().items() if n != OTHER and share.low >= at_least]
        return named[0] if named else UNDETERMINED

    def __repr__(self) -> str:
        where, total = self.landing.at, len(self.answers)
        if len(self.decisive) == self.missing:
            told = "none with an answer" if self.missing else "none"
            return f"Interchange at {where}: {told} of {total} pairs tells the hypotheses apart"
        shares = self.shares()
        n = next(iter(shares.values())).n
        lines = [f"Interchange at {where} on {n} of {total} pairs: {self.winner()}"]
        lines += [f"  {name:<12} {share}" for name, share in shares.items()]
        return "\n".join(lines + ([f"  {self.missing} without an answer"] * bool(self.missing)))


def interchange(
    lens: LatentModel,
    pairs: Pairs,
    *,
    hypotheses: Mapping[str, Hypothesis] | None = None,
    at: LatentPositions | ImaginationPositions = latent,
) -> Interchange:
    """Swap the sources' latents into the bases and compare the answers with each hypothesis.

    Args:
        hypotheses: by name, `(base, source, steps) -> answer`; the pairs' own if left out.
        at: which latents; later ones are computed anew. Or `il.imagination`, all that was written.

    Raises:
        InputError: there are fewer than two hypotheses, so nothing is compared; or `at` is a part
            of what was written, which is no step that a hypothesis speaks of.
    """
    rules = pairs.hypotheses if hypotheses is None else hypotheses
    if len(rules) < 2:
        raise InputError(
            f"{len(rules)} hypotheses were given ({', '.join(rules) or 'none'}), and a comparison "
            "needs two; pass hypotheses={name: function(base, source, steps)}"
        )
    steps = _steps(at)
    result = lens.swap(
        pairs.base,
        pairs.source,
        at=at,
        metric=kl,
        base_answers=pairs.base_answers,
        source_answers=pairs.source_answers,
    )
    predictions = {
        name: tuple(rule(base, source, steps) for base, source in pairs)
        for name, rule in rules.items()
    }
    return Interchange(result.answers_after, predictions, steps, result.landing)


def _steps(at: LatentPositions | ImaginationPositions) -> Steps:
    """The steps a selector names, as hypotheses take them."""
    if at.index is None:
        return None
    if isinstance(at, ImaginationPositions):
        raise InputError(
            f"{at!r} selects spans of text, and hypotheses speak of steps; use at=il.imagination"
        )
    if isinstance(at.index, int):
        return (at.index,)
    if at.index.stop is None:
        raise InputError(f"{at!r} has no end; name the last step, e.g. il.latent[0:2]")
    return tuple(range(*at.index.indices(at.index.stop)))


def _share(hits: np.ndarray, level: float) -> Share:
    interval = stats.binomtest(int(hits.sum()), len(hits)).proportion_ci(level, method="wilson")
    return Share(float(hits.mean()), float(interval.low), float(interval.high), len(hits))
