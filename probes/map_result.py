"""ProbeMap: how well a label is read from every step and layer, with controls and tests."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Bool, Float, Int

from imaginelens.estimates import Estimate, EstimateError
from imaginelens.hooks import hub
from imaginelens.hooks.appearing import alone, appearing
from imaginelens.hooks.errors import CheckpointError, InputError, brief
from imaginelens.probes.grid_text import lines
from imaginelens.probes.hub import MAP, push
from imaginelens.probes.map_tests import Adjust, adjusted, pvalues
from imaginelens.probes.result import CONTROL_TASK

if TYPE_CHECKING:
    import pandas as pd

Grid = Float[np.ndarray, "step site"]
_VERSION = 1
_UNREADABLE = (
    OSError, ValueError, TypeError, LookupError, AttributeError, RecursionError, ArithmeticError,
)  # fmt: skip
_ARRAYS = ("scores", "error", "chance", "null", "penalties", "groups")
_WORDS = ("sites", "kind", "label", "at", "n_folds", "seed", "adjust", "level", "notes")


@dataclass(frozen=True, repr=False, eq=False)
class ProbeMap:
    """How well a label is read out of fold at every step and layer; `probe_map` makes one.

    For classes the score of an example is 1 where it was read rightly and 0 where not, and the mean
    is the accuracy; for quantities it is the squared error that was saved, and the mean over that
    of guessing the mean is R^2.

    Attributes:
        sites: hook names, one per layer. Steps count from 0.
        scores: of every example; nan where it has no such step, or no label.
        error: for quantities the squared error of guessing the mean of the other folds, else None.
        chance: what needs no states: the share of the most frequent class; 0 for quantities.
        null: accuracies after permuting labels, whole groups at a time, within folds.
        control_scores: scores of the controls, by name.
        penalties: what each fold chose, in units of the states' mean squared distance from their
            mean; None for kinds that have none.
        groups: the number of each example's group; None if each is on its own.
        adjust, level: how `q` allows for the number of cells, and the level of intervals.
        notes: steps that could not be probed, and why.
    """

    sites: tuple[str, ...]
    scores: Float[np.ndarray, "step site example"]
    error: Float[np.ndarray, "step example"] | None
    chance: Float[np.ndarray, " step"]
    null: Float[np.ndarray, "step site permutation"]
    control_scores: Mapping[str, Float[np.ndarray, "step site example"]] = field(
        default_factory=lambda: MappingProxyType({})
    )
    penalties: Float[np.ndarray, "step site fold"] | None = None
    groups: Int[np.ndarray, " example"] | None = None
    kind: str = "ridge"
    label: str = "label"
    at: str = "latent"
    n_folds: int = 5
    seed: int = 0
    adjust: Adjust = "bh"
    level: float = 0.95
    notes: tuple[str, ...] = ()

    # ---- the grid --------------------------------------------------------------------------

    @property
    def shape(self) -> tuple[int, int]:
        """(step, site)."""
        steps, sites, _ = self.scores.shape
        return steps, sites

    @cached_property
    def accuracy(self) -> Grid:
        """Accuracy out of fold (R^2 for quantities), (step, site); nan where not probed."""
        return self._means(self.scores)

    @cached_property
    def controls(self) -> Mapping[str, Grid]:
        """The accuracy of each control, (step, site), by its name."""
        return MappingProxyType(
            {name: self._means(found) for name, found in self.control_scores.items()}
        )

    @property
    def selectivity(self) -> Grid:
        """Accuracy minus that of the control task: random labels, equal for equal content.

        Hewitt and Liang (2019), arXiv 1909.03368.

        Raises:
            InputError: the map was made without controls.
        """
        return self.accuracy - self._control(CONTROL_TASK)[1]

    @cached_property
    def low(self) -> Grid:
        """The lower end of each cell's interval; nan where there are too few groups for one."""
        return self._ends[0]

    @cached_property
    def high(self) -> Grid:
        """The upper end of each cell's interval."""
        return self._ends[1]

    @cached_property
    def p(self) -> Grid:
        """The one-sided p-value of each cell against permuted labels, not adjusted."""
        return pvalues(self.accuracy, self.null)

    @cached_property
    def q(self) -> Grid:
        """P-values adjusted for the number of cells, by `adjust`: compare them with your level."""
        return adjusted(self.accuracy, self.null, method=self.adjust)

    def decodable(self, alpha: float = 0.05) -> Bool[np.ndarray, "step site"]:
        """The cells in which the label is read better than permuted labels are."""
        return np.asarray(self.q <= alpha)

    def estimate(self, *, step: int, site: str | int = 0, over: str | None = None) -> Estimate:
        """The accuracy of a cell as an `Estimate`, or what it is over a control's, paired.

        Its interval takes the examples as independent, though folds share what they learned from:
        for "is it decodable at all" use `p` and `q`, which permute labels. Where labels say nothing
        the estimate's own p-value was below 0.05 in 8% of small data sets of 2 dimensions, and in
        15% of 3,584; `p` in 3% and 6%.

        Args:
            over: the name of a control, as in `controls`.

        Raises:
            InputError: there is no such cell or control, or it could not be probed.
            EstimateError: fewer than 10 groups.
        """
        s, k = self.cell(step, site)
        values = self.scores[s, k]
        name = f"{self.measure} of {self.label} at step {s}, {self.sites[k]}"
        if over is not None:
            return self._over(values, self._control(over)[0][s, k], f"{name}, over {over}", s)
        if self.error is not None:
            return Estimate.ratio(values, self.error[s], name=name, groups=self.groups)
        chance = float(self.chance[s])
        return Estimate.share(values, name=name, groups=self.groups, chance=chance)

    # ---- told ------------------------------------------------------------------------------

    def summary(self, alpha: float = 0.05) -> str:
        """What decodes, where best, beside chance and controls; never what is made of it."""
        found, cells = self.decodable(alpha), int((~np.isnan(self.q)).sum())
        named = {"bh": "false discovery rate", "by": "false discovery rate"}.get(
            self.adjust, "chance of any false one"
        )
        how = f"{named} {alpha:g}"
        s, k = np.unravel_index(np.nanargmax(self.accuracy), self.shape)
        beside = [f"chance {self.chance[s]:.3g}"] if self.error is None else []
        beside += [
            f"{name} {grid[s, k]:.3g}"
            for name, grid in self.controls.items()
            if not np.isnan(grid[s, k])
        ]
        best = (
            f"{self.measure} {self.accuracy[s, k]:.3g} "
            f"[{self.low[s, k]:.3g}, {self.high[s, k]:.3g}] at step {s}, {self.sites[k]}"
            + (f" ({', '.join(beside)})" if beside else "")
        )
        if not found.any():
            return f"{self.label}: not decodable at any of {cells} cells ({how}); best {best}."
        as_well = self._as_well(int(s), int(k))
        return (
            f"{self.label}: decodable at {int(found.sum())} of {cells} cells ({how}); best {best}. "
            + f"There it is read as well from {' and '.join(as_well)}. " * bool(as_well)
            + "Whether it is used takes a causal test."
        )

    def plot(self, **options: Any) -> Any:
        """The map as a figure: sites down, steps across, a panel for each control.

        White is chance; outlined cells are read better than permuted labels are.

        Args:
            options: of `imaginelens.view.probe_heatmap`: controls, palette, title.
        """
        from imaginelens.view.probing import probe_heatmap

        return probe_heatmap(self, **options)

    def to_dataframe(self) -> "pd.DataFrame":
        """One row per cell: step, site, layer, n, accuracy, low, high, chance, p, q, decodable,
        and the accuracy of each control under its name."""
        import pandas as pd

        steps, sites = self.shape
        frame = pd.DataFrame(
            {
                "step": np.repeat(np.arange(steps), sites),
                "site": list(self.sites) * steps,
                "layer": np.tile(np.arange(sites), steps),
                "n": (~np.isnan(self.scores)).sum(2).ravel(),
            }
        )
        for name in ("accuracy", "low", "high"):
            frame[name] = getattr(self, name).ravel()
        frame["chance"] = np.repeat(self.chance, sites)
        frame["p"], frame["q"] = self.p.ravel(), self.q.ravel()
        frame["decodable"] = self.decodable().ravel()
        for name, grid in self.controls.items():
            frame[name] = grid.ravel()
        return frame

    def __repr__(self) -> str:
        steps, sites = self.shape
        n = int((~np.isnan(self.scores)).any((0, 1)).sum())
        head = (
            f"ProbeMap({self.label} by {self.kind}: {self.measure}, {steps} "
            f"step{'s' * (steps != 1)} x {sites} site{'s' * (sites != 1)}, n = {n}; "
            f"* {self.adjust}-adjusted p <= 0.05)"
        )
        told = [
            head,
            *lines(self.accuracy, self.sites, self.decodable()),
            *(f"  note: {note}" for note in self.notes),
        ]
        return "\n".join(told)

    def _repr_html_(self) -> str:
        from imaginelens.view.result_cards import probe_map_card

        return probe_map_card(self)

    # ---- kept ------------------------------------------------------------------------------

    def save(self, folder: str | Path) -> None:
        """Write `map.safetensors` and `map.json` into a folder.

        Raises:
            InputError: it holds a map already.

        >>> import tempfile
        >>> made = ProbeMap(("layer 0",), np.ones((1, 1, 4)), None, np.ones(1) / 2,
        ...                 np.full((1, 1, 20), 0.5))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     made.save(folder)
        ...     ProbeMap.load(folder).accuracy.tolist()
        [[1.0]]
        """
        from safetensors.numpy import save

        path = Path(folder)
        arrays = {name: getattr(self, name) for name in _ARRAYS}
        arrays |= {f"control:{name}": found for name, found in self.control_scores.items()}
        kept = {name: np.ascontiguousarray(a) for name, a in arrays.items() if a is not None}
        content = save(kept)
        words = {"version": _VERSION} | {name: getattr(self, name) for name in _WORDS}
        words["controls"] = list(self.control_scores)
        words["digest"] = hashlib.sha256(content).hexdigest()
        text = json.dumps(words, indent=1) + "\n"
        with alone(path, proof="map.json"):
            with appearing(path / "map.safetensors") as partial:
                partial.write_bytes(content)
            with appearing(path / "map.json") as partial:
                partial.write_text(text)

    def push_to_hub(
        self,
        repo_id: str,
        *,
        private: bool = False,
        token: str | None = None,
        license: str | None = None,
    ) -> hub.Address:
        """Put the saved map on the Hugging Face Hub and return its address.

        Args:
            license: the Hub's word for it, such as "mit"; the card names none if left out.

        Raises:
            CheckpointError: the Hub cannot be reached, or one may not write there.
        """
        told = "That a label can be read from a state does not say that the model uses it."
        tags = ("probe", self.kind)
        return push(
            self, repo_id, tags=tags, told=told, private=private, token=token, license=license
        )

    @staticmethod
    def load(folder: str | Path, *, revision: str | None = None) -> "ProbeMap":
        """Read what `save` or `push_to_hub` wrote, from a folder or the Hub.

        Raises:
            CheckpointError: a file is missing or holds something else.
        """
        from safetensors import SafetensorError
        from safetensors.numpy import load as from_bytes

        path, origin = hub.fetch(folder, revision=revision, files=MAP)
        try:
            words: dict[str, Any] = json.loads((path / "map.json").read_text())
            if words.pop("version") != _VERSION:
                raise CheckpointError(f"{path} was written by another version; make the map again")
            content = (path / "map.safetensors").read_bytes()
            if "digest" in words and words.pop("digest") != hashlib.sha256(content).hexdigest():
                raise ValueError("map.json and map.safetensors do not belong together")
            arrays: dict[str, Any] = dict(from_bytes(content))
            names = [name for name in arrays if name.startswith("control:")]
            found = {name.removeprefix("control:"): arrays.pop(name) for name in names}
            controls = {name: found[name] for name in words.pop("controls")}
            for name in ("sites", "notes"):
                words[name] = tuple(words[name])
            optional: dict[str, Any] = {"error": None, "penalties": None, "groups": None}
            made = ProbeMap(**optional | arrays, control_scores=controls, **words)
            return hub.remembered(made, origin)
        except (*_UNREADABLE, SafetensorError) as error:
            if isinstance(error, CheckpointError):
                raise
            raise CheckpointError(
                f"{path} holds no probe map as this version writes it ({brief(error)}); make it "
                "again"
            ) from error

    # ---- parts -----------------------------------------------------------------------------

    @property
    def measure(self) -> str:
        """ "accuracy" of classes, "R^2" of quantities."""
        return "accuracy" if self.error is None else "R^2"

    def _means(self, scores: Float[np.ndarray, "step site example"]) -> Grid:
        there = ~np.isnan(scores)
        total = np.where(there, scores, 0).sum(2)
        if self.error is None:
            size = there.sum(2).astype(np.float64)
        else:
            size = np.where(there, self.error[:, None], 0).sum(2)
        return np.divide(total, size, out=np.full(total.shape, np.nan), where=size > 0)

    def _control(self, name: str) -> tuple[Float[np.ndarray, "step site example"], Grid]:
        if name not in self.control_scores:
            raise InputError(
                f"the map has no control {name!r}; it has {sorted(self.control_scores) or 'none'}, "
                "and probe_map(..., controls=True) runs them"
            )
        return self.control_scores[name], self.controls[name]

    def _over(
        self,
        values: Float[np.ndarray, " example"],
        control: Float[np.ndarray, " example"],
        name: str,
        step: int,
    ) -> Estimate:
        if self.error is not None:
            difference = values - control
            return Estimate.ratio(difference, self.error[step], name=name, groups=self.groups)
        known = control[~np.isnan(control)]
        if np.isin(known, (0.0, 1.0)).all():
            return Estimate.paired(values, control, name=name, groups=self.groups)
        return Estimate.mean(values - control, name=name, groups=self.groups)

    def cell(self, step: int, site: str | int) -> tuple[int, int]:
        """The numbers of a step and a layer that was probed.

        Raises:
            InputError: there is none.
        """
        steps, sites = self.shape
        if not -steps <= step < steps:
            raise InputError(f"there is no step {step} in a map of {steps} steps, 0 the first")
        if isinstance(site, str):
            if site not in self.sites:
                raise InputError(f"there is no site {site!r} in this map; it has {self.sites}")
            site = self.sites.index(site)
        if not -sites <= site < sites:
            raise InputError(f"there is no layer {site} in a map of {sites}, 0 the first")
        if np.isnan(self.accuracy[step, site]):
            raise InputError(f"step {step % steps} was not probed: {' '.join(self.notes)}")
        return step % steps, site % sites

    def _as_well(self, step: int, site: int) -> list[str]:
        """The controls that a cell is not above, by a paired test."""
        found = []
        for name, grid in self.controls.items():
            if np.isnan(grid[step, site]):
                continue
            try:
                over = self.estimate(step=step, site=site, over=name)
                above = over.value > 0 and over.pvalue() < 0.05
            except EstimateError:  # too few groups to tell
                continue
            if not above:
                found.append(name)
        return found

    @cached_property
    def _ends(self) -> tuple[Grid, Grid]:
        low, high = np.full(self.shape, np.nan), np.full(self.shape, np.nan)
        for s, k in np.argwhere(~np.isnan(self.accuracy)):
            try:
                found = self.estimate(step=int(s), site=int(k)).ci(level=self.level)
            except EstimateError:  # too few groups to tell how much they differ
                continue
            low[s, k], high[s, k] = found.low, found.high
        return low, high
