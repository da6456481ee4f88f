"""Causal effects from potential outcomes: natural, controlled, and their decompositions.

Formulas: Robins & Greenland 1992, Pearl 2001, VanderWeele 2014 (four-way). X goes from the base x0
to the source x1, Z is the mediator, z* its reference.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import permutations, product
from typing import Any, Literal, get_args

import numpy as np

from imaginelens.estimates import Estimate, EstimateError
from imaginelens.hooks.errors import InputError
from imaginelens.mediation.outcomes import NATURAL, PotentialOutcomes
from imaginelens.mediation.result_files import Saved
from imaginelens.mediation.study import Values

Scale = Literal["difference", "ratio"]
Weights = Mapping[str, Literal[1, -1]]  # of the worlds that a contrast is made of

CONTRAST: Mapping[str, Weights] = {
    "te": {"y11": 1, "y00": -1},
    "pnde": {"y10": 1, "y00": -1},
    "tnde": {"y11": 1, "y01": -1},
    "tnie": {"y11": 1, "y10": -1},
    "pnie": {"y01": 1, "y00": -1},
    "cde": {"c1": 1, "c0": -1},
    "int_ref": {"y10": 1, "y00": -1, "c1": -1, "c0": 1},
    "int_med": {"y11": 1, "y10": -1, "y01": -1, "y00": 1},
}
DIFFERS = "differs from 0"
ELIMINATED: Weights = {"y11": 1, "y00": -1, "c1": -1, "c0": 1}
BASE: Weights = {"y00": 1}
FORMULA = {
    "te": "y11 - y00",
    "pnde": "y10 - y00",
    "tnde": "y11 - y01",
    "tnie": "y11 - y10",
    "pnie": "y01 - y00",
    "cde": "c1 - c0",
    "int_ref": "pnde - cde",
    "int_med": "tnie - pnie",
    "prop_mediated": "tnie / te",
    "prop_eliminated": "(te - cde) / te",
}
MEANING = {
    "te": "total effect of the input",
    "pnde": "direct effect, latents of the base",
    "tnde": "direct effect, latents of the source",
    "tnie": "effect through the latents, input of the source",
    "pnie": "effect through the latents, input of the base",
    "cde": "direct effect, latents held at a reference",
    "int_ref": "interaction with the reference latents",
    "int_med": "interaction of input and latents",
    "prop_mediated": "share of the total through the latents",
    "prop_eliminated": "share of the total that holding the latents removes",
}


@dataclass(frozen=True, repr=False, eq=False)
class Effects(Saved):
    """The effects of one study, each an `Estimate` in the metric's unit.

    All of them rest on the examples that have an outcome in y00, y11, y10 and y01, so that
    TE = PNDE + TNIE = TNDE + PNIE holds for the means, too; those with a reference also need c0 and
    c1. Outcomes that are 0 or 1 get score intervals, all others Student's t, and shares Fieller's.

    On the ratio scale each is a share of the mean outcome of the base. The same sums hold there;
    Vig et al. (2020) compare the total with PNDE and PNIE, which need not add up to it.

    Raises:
        InputError: the scale is unknown, or "ratio" of outcomes of which some are negative.

    >>> worlds = PotentialOutcomes.from_arrays(
    ...     y00=[0.5, 0.4], y11=[3.9, 3.8], y10=[1.7, 1.6], y01=[2.1, 2.0])
    >>> effects = worlds.effects()
    >>> round(effects.te.value, 3), round(effects.tnie.value + effects.pnde.value, 3)
    (3.4, 3.4)
    """

    worlds: PotentialOutcomes
    scale: Scale = "difference"

    def __post_init__(self) -> None:
        if self.scale not in get_args(Scale):
            raise InputError(f"scale is {self.scale!r}; choose 'difference' or 'ratio'")
        if self.scale == "ratio":
            for name, values in self.worlds.arms.items():
                if (values < 0).any():
                    row = int(np.flatnonzero(values < 0)[0])
                    raise InputError(
                        f"{name} of example {row} is {values[row]:.4g}, and a share of negative "
                        "outcomes says nothing; use scale='difference', which for a logit or log "
                        "probability already is the logarithm of a ratio"
                    )

    @cached_property
    def te(self) -> Estimate:
        """Total effect, y11 - y00: how far the answer moves when the whole input changes."""
        return self._effect("te")

    @cached_property
    def pnde(self) -> Estimate:
        """Pure natural direct effect, y10 - y00: the input changes under the base's mediator."""
        return self._effect("pnde")

    @cached_property
    def tnde(self) -> Estimate:
        """Total natural direct effect, y11 - y01: the input changes under the source's mediator."""
        return self._effect("tnde")

    @cached_property
    def tnie(self) -> Estimate:
        """Total natural indirect effect, y11 - y10: the mediator changes under the source's input
        (the negative of noising)."""
        return self._effect("tnie")

    @cached_property
    def pnie(self) -> Estimate:
        """Pure natural indirect effect, y01 - y00: the mediator changes under the base's input
        (denoising)."""
        return self._effect("pnie")

    @cached_property
    def cde(self) -> Estimate:
        """Controlled direct effect, c1 - c0: the input changes, the mediator is held at a
        reference."""
        return self._effect("cde")

    @cached_property
    def int_ref(self) -> Estimate:
        """Reference interaction, PNDE - CDE."""
        return self._effect("int_ref")

    @cached_property
    def int_med(self) -> Estimate:
        """Mediated interaction, TNIE - PNIE = TNDE - PNDE."""
        return self._effect("int_med")

    @cached_property
    def prop_mediated(self) -> Estimate:
        """Proportion mediated, TNIE / TE: a ratio of means with Fieller's interval."""
        return self._ratio("prop_mediated", CONTRAST["tnie"], CONTRAST["te"])

    @cached_property
    def prop_eliminated(self) -> Estimate:
        """Proportion eliminated, (TE - CDE) / TE: a ratio of means with Fieller's interval."""
        return self._ratio("prop_eliminated", ELIMINATED, CONTRAST["te"])

    def decompose(self, *, ways: Literal[2, 3, 4] = 2) -> dict[str, Estimate]:
        """Parts that add up to the total effect, by name.

        2: PNDE + TNIE. 3: PNDE + PNIE + INTmed. 4: CDE + INTref + INTmed + PNIE (VanderWeele 2014),
        on the examples that have all six outcomes.

        Raises:
            InputError: another number of ways, or four without the worlds at a reference.
        """
        names = {2: ("pnde", "tnie"), 3: ("pnde", "pnie", "int_med")}
        if ways in names:
            return {name: getattr(self, name) for name in names[ways]}
        if ways != 4:
            raise InputError(f"a decomposition in {ways} ways is not known; choose 2, 3 or 4")
        self._check_reference("decompose(ways=4)")
        whole = self.worlds.subset(~np.isnan(np.stack([*self.worlds.arms.values()])).any(0))
        effects = Effects(whole, self.scale)
        return {name: getattr(effects, name) for name in ("cde", "int_ref", "int_med", "pnie")}

    def by_step(
        self, *, method: Literal["telescoping", "shapley"] = "telescoping"
    ) -> dict[int, Estimate]:
        """The pure indirect effect, split over latent steps: the parts add up to it, on the
        examples that have an outcome in every world.

        telescoping: steps receive the source's states in their order; what a step adds depends on
        those before it. shapley: the mean over all orders (Shapley 1953).

        Raises:
            InputError: the study did not run the worlds for it.
        """
        steps = self.worlds.steps
        n = max((len(chosen) for chosen in steps), default=0)
        orders = [tuple(range(n))] if method == "telescoping" else list(permutations(range(n)))
        needed = {frozenset(order[:k]) for order in orders for k in range(1, n + 1)}
        if method not in ("telescoping", "shapley") or not steps or not needed <= set(steps):
            raise InputError(
                f"the study has no worlds for {method!r}; run il.counterfactuals(..., "
                "steps='telescoping') or steps='shapley'"
            )
        arms = {frozenset[int](): self._complete(BASE)["y00"], **steps}
        missing = np.isnan(np.stack([*arms.values()])).any(0)
        arms = {done: np.where(missing, np.nan, values) for done, values in arms.items()}

        def around(order: tuple[int, ...], step: int) -> tuple[Values, Values]:
            k = order.index(step)
            return arms[frozenset(order[: k + 1])], arms[frozenset(order[:k])]

        parts = {}
        for step in range(n):
            pairs = [around(order, step) for order in orders]
            parts[step] = self._part(f"{method} part of step {step}", pairs)
        return parts

    # ---- how an estimate is made ---------------------------------------------------------------

    def _effect(self, name: str) -> Estimate:
        weights = CONTRAST[name]
        if self.scale == "ratio":
            return self._ratio(name, weights, BASE)
        arms, values = self._complete(weights), self._sum(weights)
        words: dict[str, Any] = {"name": name, "unit": self.worlds.unit}
        words |= {"groups": self.worlds.groups, "total": None if name == "te" else self.te}
        if not self.worlds.binary:
            return Estimate.mean(values, **words)
        if len(weights) == 2:
            after, before = sorted(weights, key=weights.__getitem__, reverse=True)
            return Estimate.paired(arms[after], arms[before], **words)
        ends = _possible(weights)
        return Estimate.bounded(values, low=float(ends.min()), high=float(ends.max()), **words)

    def _ratio(self, name: str, top: Weights, bottom: Weights) -> Estimate:
        for weights in (top, bottom):
            if set(weights) - set(NATURAL):
                self._check_reference(name)
        possible = _possible(top, bottom) if self.worlds.binary else None
        return Estimate.ratio(
            self._sum(top),
            self._sum(bottom),
            name=name,
            groups=self.worlds.groups,
            possible=possible,
        )

    def _part(self, name: str, pairs: list[tuple[Values, Values]]) -> Estimate:
        """The mean gain over several pairs of worlds, after and before."""
        gain = np.mean([after - before for after, before in pairs], axis=0)
        words: dict[str, Any] = {"name": name, "groups": self.worlds.groups}
        if self.scale == "ratio":
            possible = [(g, y) for g in (-1, 1) for y in (0, 1)] if self.worlds.binary else None
            return Estimate.ratio(gain, self._complete(BASE)["y00"], possible=possible, **words)
        words |= {"unit": self.worlds.unit, "total": self.te}
        if not self.worlds.binary:
            return Estimate.mean(gain, **words)
        if len(pairs) == 1:
            return Estimate.paired(*pairs[0], **words)
        return Estimate.bounded(gain, low=-1.0, high=1.0, **words)

    def _sum(self, weights: Weights) -> Values:
        """A contrast of worlds, per example."""
        arms = self._complete(weights)
        gained, lost = (
            np.sum([arms[name] for name, weight in weights.items() if weight == sign], axis=0)
            for sign in (1, -1)
        )
        return gained - lost  # exactly 0 where both are made of the same numbers

    def _complete(self, weights: Weights) -> dict[str, Values]:
        """The worlds of a contrast, on the examples that have these and all natural ones."""
        if set(weights) - set(NATURAL):
            self._check_reference("a controlled effect")
        arms = {name: self.worlds.arms[name] for name in dict.fromkeys((*NATURAL, *weights))}
        missing = np.isnan(np.stack([*arms.values()])).any(0)
        return {name: np.where(missing, np.nan, values) for name, values in arms.items()}

    def _check_reference(self, name: str) -> None:
        if self.worlds.c0 is None:
            raise InputError(
                f"{name} needs the worlds with the mediator at a reference, c0 and c1; run "
                "il.counterfactuals without reference=False (of text, with reference="
                "il.Rewrite(...)), or give both arrays"
            )

    @property
    def all(self) -> dict[str, Estimate]:
        """Every effect that the worlds allow, by name."""
        needs = {"cde", "int_ref", "prop_eliminated"}
        names = [n for n in FORMULA if self.worlds.c0 is not None or n not in needs]
        return {name: getattr(self, name) for name in names}

    def plot(self, **options: Any) -> Any:
        """The effects as a forest plot with 95% and 90% intervals; `margin=` is drawn as a band."""
        from imaginelens.view.forest_plot import forest

        return forest(self, **options)

    def _repr_html_(self) -> str:
        from imaginelens.view.result_cards import effects_card

        return effects_card(self)

    def __repr__(self) -> str:
        worlds = self.worlds
        head = f"Effects on {worlds.metric} of {len(worlds)} examples"
        lines = [f"{head}, as a share of y00" if self.scale == "ratio" else head]
        lines += [f"  {worlds.estimand}"] if worlds.estimand else []
        try:
            lines += [self._line(name, estimate) for name, estimate in self.all.items()]
            real = [name for name, each in self.all.items() if against_zero(each) == DIFFERS]
        except EstimateError as error:
            return "\n".join([lines[0], f"  no intervals: {error}"])
        lines.append(
            f"  {DIFFERS} at 5%, each by itself: {', '.join(real) or 'none'}; no effect is a claim "
            "about a margin: .te.verdict(margin=...)"
        )
        if self.te.missing:
            lines.append(
                f"  {self.te.missing} of {len(worlds)} examples miss an outcome and are left out"
            )
        return "\n".join(lines)

    def _line(self, name: str, estimate: Estimate) -> str:
        interval = estimate.ci()
        ends = "unbounded" if interval.unbounded else str(interval)
        return (
            f"  {name:<15} {estimate.value:>9.4g}  95% {ends:<22} {FORMULA[name]:<15} "
            f"{MEANING[name]}"
        )


def against_zero(estimate: Estimate) -> str:
    """What the 95% interval says of 0, in words; that there is no effect takes a margin.

    >>> against_zero(Estimate.mean([0.9, 1.0, 1.1])), against_zero(Estimate.mean([-1.0, 0.0, 1.1]))
    ('differs from 0', 'not told from 0')
    """
    return DIFFERS if estimate.pvalue() < 0.05 else "not told from 0"


def _possible(*contrasts: Weights) -> np.ndarray:
    """What contrasts of 0/1 outcomes can be: one row for each way in which they can turn out.

    >>> _possible(CONTRAST["te"]).ravel().tolist()
    [-1, 0, 1]
    """
    worlds = list(dict.fromkeys(name for weights in contrasts for name in weights))
    rows = {
        tuple(
            sum(weight * outcome[worlds.index(name)] for name, weight in weights.items())
            for weights in contrasts
        )
        for outcome in product((0, 1), repeat=len(worlds))
    }
    return np.array(sorted(rows))
