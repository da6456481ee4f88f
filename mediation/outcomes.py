"""Potential outcomes: what was measured in each nested world, one value per example.

World yab is the outcome with the direct input of level a and the mediator of level b: y10 is
Y(x1, Z(x0)). In a network all four can be run, so nothing is modelled and nothing is assumed
beyond what is randomised over: the sample of inputs (Pearl 2001; Robins & Greenland 1992).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from jaxtyping import Int

from imaginelens.hooks.errors import InputError
from imaginelens.mediation.controls import Controls
from imaginelens.mediation.provenance import Provenance
from imaginelens.mediation.result_files import Saved
from imaginelens.mediation.study import Values

if TYPE_CHECKING:
    import pandas as pd

    from imaginelens.mediation.effects import Effects, Scale

Flag = Literal["unaligned", "not_emitted", "identical_donor"]
NATURAL, CONTROLLED = ("y00", "y11", "y10", "y01"), ("c0", "c1")


@dataclass(frozen=True, repr=False, eq=False)
class PotentialOutcomes(Saved):
    """The outcome of every example in every world; nan where it is missing.

    Attributes:
        y00, y11: base and source as they are. y10: the source's input with the base's mediator;
            y01: the base's input with the source's mediator.
        c0, c1: base and source with the mediator held at a reference, or None.
        binary: whether outcomes are 0 or 1.
        groups: a label per example that depends on others, or None.
        metric, unit: what was measured.
        estimand: the mediator, context and alignment, in words: a part of every effect's name.
        emitted: (example, side), how many states base and source fed, or tokens they wrote, at the
            mediator's positions; None if these are no runs.
        flags: why an example's mediator was not swapped, None where it was: its numbers of states
            differ ("unaligned": left out), one of its sides has none ("not_emitted": its indirect
            effect is 0), or the two are equal ("identical_donor": also 0). Empty if no runs.
        steps: the outcome of the base's input when only some steps have the source's states, by
            the set of those steps; empty if not asked for.
        controls, provenance: what was checked, and where the numbers come from.

    Raises:
        InputError: lengths differ, a value is infinite, or not 0 or 1 where it should be.
    """

    y00: Values
    y11: Values
    y10: Values
    y01: Values
    c0: Values | None = None
    c1: Values | None = None
    binary: bool = False
    groups: tuple[Any, ...] | None = None
    metric: str = "outcome"
    unit: str = ""
    estimand: str = ""
    emitted: Int[np.ndarray, "example side"] | None = None
    flags: tuple[Flag | None, ...] = ()
    steps: Mapping[frozenset[int], Values] = field(default_factory=dict)
    controls: Controls | None = None
    provenance: Provenance | None = None

    def __post_init__(self) -> None:
        _check_lengths({**self.arms, "groups": self.groups})
        if (self.c0 is None) != (self.c1 is None):
            raise InputError("a controlled effect needs both c0 and c1; give both, or neither")
        for name, values in self.arms.items():
            _check_values(name, values, self.binary)

    @staticmethod
    def from_arrays(
        *,
        y00: Any,
        y11: Any,
        y10: Any,
        y01: Any,
        c0: Any = None,
        c1: Any = None,
        binary: bool = False,
        groups: Sequence[Any] | np.ndarray | None = None,
        unit: str = "",
    ) -> "PotentialOutcomes":
        """Take the worlds from plain arrays, of any model or simulation: one value per example.

        Args:
            binary: outcomes are 0 or 1, and get the intervals that are right for those.
            groups: a label per example that depends on others, of the same image, say.

        Raises:
            InputError: values are no numbers, or infinite, or not 0 or 1 where they should be, or
                lengths differ.

        >>> worlds = PotentialOutcomes.from_arrays(
        ...     y00=[0.0, 0.1, 0.2], y11=[1.0, 1.3, 1.1], y10=[0.4, 0.6, 0.5], y01=[0.5, 0.7, 0.7])
        >>> round(worlds.effects().tnie.value, 3)
        0.633
        """
        natural = {"y00": y00, "y11": y11, "y10": y10, "y01": y01}
        controlled = {"c0": c0, "c1": c1}
        arrays = {
            name: None if values is None and name in controlled else _numbers(name, values)
            for name, values in (natural | controlled).items()
        }
        labels = None if groups is None else tuple(np.asarray(groups, dtype=object).tolist())
        _check_lengths({**arrays, "groups": labels})
        return PotentialOutcomes(**arrays, binary=binary, groups=labels, unit=unit)  # type: ignore[arg-type]

    def __len__(self) -> int:
        return len(self.y00)

    @property
    def arms(self) -> dict[str, Values]:
        """The worlds that were measured, by name."""
        return {n: v for n in (*NATURAL, *CONTROLLED) if (v := getattr(self, n)) is not None}

    @property
    def unaligned(self) -> int:
        """How many examples are left out because their two numbers of states differ."""
        return self.flags.count("unaligned")

    @property
    def parse_coverage(self) -> dict[str, float]:
        """The share of examples with an outcome, by world; the others are missing, not wrong.

        Examples that could not be aligned are not counted: they have no such worlds.
        """
        there = np.array([flag != "unaligned" for flag in self.flags] or [True] * len(self))
        n = int(there.sum())
        return {
            name: float((~np.isnan(v[there])).sum() / n) if n else float("nan")
            for name, v in self.arms.items()
        }

    def effects(self, *, scale: "Scale" = "difference") -> "Effects":
        """Every effect as an `Estimate`: `.te .pnde .tnde .pnie .tnie .cde` and what is made of
        them.

        Args:
            scale: "ratio" gives effects as shares of the mean outcome of the base, for outcomes
                that are positive (Vig et al. 2020, who average each example's ratio).

        Raises:
            InputError: the scale is neither, or "ratio" of outcomes of which some are negative.
        """
        from imaginelens.mediation.effects import Effects

        return Effects(self, scale)

    def subset(self, keep: Any) -> "PotentialOutcomes":
        """Only the examples where `keep` is True. Controls stay those of all examples.

        Raises:
            InputError: `keep` is not one flag per example, or keeps none.
        """
        mask = np.asarray(keep)
        if mask.shape != self.y00.shape or mask.dtype != bool:
            raise InputError(
                f"keep has shape {mask.shape} and dtype {mask.dtype} for {len(self)} examples; "
                "give True or False for each"
            )
        if not mask.any():
            raise InputError(f"none of the {len(self)} examples is kept, so nothing can be said")
        kept = np.flatnonzero(mask)
        return replace(
            self,
            **{name: values[mask] for name, values in self.arms.items()},
            groups=None if self.groups is None else tuple(self.groups[i] for i in kept),
            emitted=None if self.emitted is None else self.emitted[mask],
            flags=tuple(self.flags[i] for i in kept) if self.flags else (),
            steps={done: values[mask] for done, values in self.steps.items()},
        )

    def always_emitters(self) -> "PotentialOutcomes":
        """Only the examples in which base and source both emit without an edit.

        Whether an *edited* run emits is a consequence of the edit, so it is no ground to select by.

        Raises:
            InputError: these worlds are no runs, or no example emits on both sides.
        """
        if self.emitted is None:
            raise InputError("these worlds were not made by runs, so nothing is known of emission")
        emit = (self.emitted > 0).all(1)
        if not emit.any():
            base, source = (self.emitted > 0).sum(0)
            raise InputError(
                f"of {len(self)} examples {base} emit as base, {source} as source and none as "
                "both, so there are no always-emitters; use latents=il.Force(k)"
            )
        return replace(self.subset(emit), estimand=f"{self.estimand}; always-emitters")

    def to_dataframe(self) -> "pd.DataFrame":
        """One row per example, one column per world."""
        import pandas as pd

        frame = pd.DataFrame(self.arms)
        if self.groups is not None:
            frame["group"] = list(self.groups)
        if self.emitted is not None:
            frame["emitted_base"], frame["emitted_source"] = self.emitted.T
        if self.flags:
            frame["flag"] = list(self.flags)
        return frame

    def __repr__(self) -> str:
        means = ", ".join(f"{name} {_mean(values):.4g}" for name, values in self.arms.items())
        lines = [f"PotentialOutcomes of {len(self)} examples, mean {self.metric}: {means}"]
        lines += [f"  {self.estimand}"] if self.estimand else []
        missing = {n: c for n, c in self.parse_coverage.items() if c < 1}
        if missing:
            shown = ", ".join(f"{n} {c:.1%}" for n, c in missing.items())
            lines.append(f"  parse coverage below 100%: {shown}")
        for flag, then in (
            ("unaligned", "left out, for base and source have different numbers of states"),
            ("not_emitted", "with nothing to swap; their indirect effects are 0"),
            ("identical_donor", "whose two states are equal; their indirect effects are 0"),
        ):
            n = self.flags.count(flag)
            lines += [f"  {n} of {len(self)} examples {then}"] if n else []
        lines += [] if self.controls is None else [f"  {line}" for line in self.controls.lines()]
        lines += [] if self.provenance is None else [f"  {self.provenance}"]
        return "\n".join(lines)


def _mean(values: Values) -> float:
    return float("nan") if np.isnan(values).all() else float(np.nanmean(values))


def _numbers(name: str, given: Any) -> Values:
    try:
        values = np.array(given, dtype=float)
    except (TypeError, ValueError, RuntimeError) as error:  # the last by a tensor with a gradient
        raise InputError(
            f"{name} cannot be read as numbers ({error}); give one number per example"
        ) from error
    if values.ndim != 1:
        raise InputError(f"{name} has shape {values.shape}, expected one value per example")
    return values


def _check_lengths(parts: Mapping[str, Any]) -> None:
    lengths = {name: len(part) for name, part in parts.items() if part is not None}
    if len(set(lengths.values())) != 1:
        raise InputError(
            f"the worlds have unequal lengths {lengths}; give one value per example, nan where it "
            "is missing"
        )
    if not lengths["y00"]:
        raise InputError("the worlds are empty; give at least one example")


def _check_values(name: str, values: Values, binary: bool) -> None:
    if np.isinf(values).any():
        where = int(np.flatnonzero(np.isinf(values))[0])
        raise InputError(
            f"{name} of example {where} is {values[where]}; use nan for what is missing"
        )
    odd = values[~np.isnan(values) & (values != 0) & (values != 1)]
    if binary and len(odd):
        raise InputError(f"{name} holds {odd[0]:g}, which is not 0 or 1; leave out binary=True")
