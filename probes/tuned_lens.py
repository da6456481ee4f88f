"""The tuned lens: a logit lens that first translates each layer into the terms of the last.

Belrose et al. (2023, arXiv 2303.08112): at layer l an affine translator h + A h + b stands before
the model's own final norm and head, trained so that what comes out is close to the model's final
distribution, by KL(final || lens). It starts as the identity, which is the logit lens; at the last
layer it stays that, for there the logit lens is exact.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Float

from imaginelens.estimates import Estimate
from imaginelens.hooks import LatentModel, Run, latent
from imaginelens.hooks.errors import InputError
from imaginelens.hooks.hub import Address
from imaginelens.hooks.names import NamesFilter
from imaginelens.hooks.positions import Positions
from imaginelens.probes.lens_table import LensTable
from imaginelens.probes.logit_lens import tabulate
from imaginelens.probes.tuned_training import TEST, Collected, identity, trained, translated
from imaginelens.probes.unembedding import LATENT, Logits, States, last_site, read

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True, repr=False, eq=False)
class TunedLens:
    """Translators of some layers, with what they were worth on examples they had not seen.

    Attributes:
        weights, biases: A and b of each site; both zero is the logit lens.
        kl_before, kl_after: KL(final || lens) in bits of each held-out example (the mean over its
            positions), under the logit lens and under this one.
        at: the positions it was trained at.
        model: the class of the model it belongs to.
    """

    sites: tuple[str, ...]
    weights: Mapping[str, Float[torch.Tensor, "d_model d_model"]]
    biases: Mapping[str, Float[torch.Tensor, " d_model"]]
    kl_before: Mapping[str, Estimate]
    kl_after: Mapping[str, Estimate]
    at: str
    model: str

    @staticmethod
    def fit(
        lens: LatentModel,
        data: Any,
        *,
        sites: NamesFilter = "blocks.*.hook_resid_post",
        at: Positions = latent,
        groups: Sequence[Any] | None = None,
        held_out: float = 0.25,
        max_rounds: int = 40,
        batch_size: int = 16,
        seed: int = 0,
    ) -> "TunedLens":
        """Train a translator per layer, by L-BFGS from the identity; the seed draws the splits.

        Whole groups are held out for the report, and others to stop in time: a translator has
        d_model squared numbers, so a few hundred states are not many. Where it does not help on
        those it stays the identity.

        Args:
            data: a `Run`, a `Pairs` (its base inputs), or a list of inputs.
            sites: of the residual stream behind or before blocks.
            at: the positions whose states are translated; more than latents is more to learn from.
            groups: one label per example; None puts examples of the same pictures together.
            held_out: the share of groups that the report is on.

        Raises:
            InputError: too few groups, a site that is not in the stream, or no such positions.

        >>> import imaginelens as il
        >>> lens = il.load("latent-content")
        >>> tuned = TunedLens.fit(lens, lens.task(n=64, seed=0), sites="blocks.1.hook_resid_post")
        >>> site = tuned.sites[0]
        >>> tuned.kl_after[site].value < tuned.kl_before[site].value
        True
        """
        if not 0 < held_out < 1 or max_rounds < 1:
            raise InputError(
                f"held_out={held_out} and max_rounds={max_rounds} came; give a share between 0 and "
                "1, such as 0.25, and 1 round or more"
            )
        chosen = lens.registry.match(sites)
        if LATENT in chosen:
            raise InputError(
                "'hook_latent' has passed the final norm, so that no translator stands before it; "
                "use sites='blocks.*.hook_resid_post'"
            )
        seen = Collected.of(lens, data, chosen, at, groups, batch_size)
        parts = seen.split(held_out, seed)
        weights, biases, before, after = {}, {}, {}, {}
        for site in chosen:
            if site == last_site(lens):
                weights[site], biases[site] = identity(seen.states[site])
            else:
                weights[site], biases[site] = trained(seen, site, parts, max_rounds)
            rows = np.flatnonzero(parts == TEST)
            nothing = identity(seen.states[site])
            before[site] = seen.estimate(site, nothing, rows, "logit lens")
            after[site] = seen.estimate(site, (weights[site], biases[site]), rows, "tuned lens")
        name = type(lens.model).__name__
        return TunedLens(tuple(chosen), weights, biases, before, after, repr(at), name)

    def translate(self, site: str, states: States) -> States:
        """States of a layer in the terms of the last: h + A h + b.

        Raises:
            InputError: there is no translator for that site, or the states have another width.
        """
        if site not in self.weights:
            raise InputError(f"there is no translator for {site!r}; there are {self.sites}")
        width = len(self.biases[site])
        if states.shape[-1] != width:
            raise InputError(
                f"states of width {states.shape[-1]} came to a lens of width {width}; it belongs "
                f"to another model, a {self.model}"
            )
        return translated(states, self.weights[site], self.biases[site])

    def __call__(
        self,
        lens: LatentModel,
        inputs: Any,
        *,
        at: Positions = latent,
        top: int = 5,
        watch: Sequence[str | int] = (),
    ) -> LensTable:
        """The table of `logit_lens`, with each layer translated first.

        Raises:
            InputError: as `logit_lens`, or the lens belongs to another model.
        """
        run = inputs if isinstance(inputs, Run) else lens.run(inputs)
        self._check(lens)
        reading = read(lens, run, sites=self.sites, at=at)

        def logits_of(site: str) -> Iterator[Logits]:
            return reading.logits(site, partial(self.translate, site))

        return tabulate(
            lens, run, reading, self.sites, logits_of, at=at, top=top, watch=watch,
            kind="tuned lens",
        )  # fmt: skip

    def gain(self, site: str) -> Estimate:
        """By how many bits the held-out examples are nearer to the model's own output.

        Raises:
            InputError: there is no translator for that site.
        """
        if site not in self.weights:
            raise InputError(f"there is no translator for {site!r}; there are {self.sites}")
        before, after = self.kl_before[site], self.kl_after[site]
        return Estimate.mean(
            before.values - after.values, name=f"{site}: logit - tuned", unit="bits",
            groups=before.groups,
        )  # fmt: skip

    def to_dataframe(self) -> "pd.DataFrame":
        """One line per site: KL before and after with 95% intervals, and how much was gained."""
        import pandas as pd

        return pd.DataFrame(
            [
                {
                    "site": site,
                    **_told("kl_before", self.kl_before[site]),
                    **_told("kl_after", self.kl_after[site]),
                    **_told("gain", self.gain(site)),
                    "n": self.kl_after[site].n,
                }
                for site in self.sites
            ]
        )

    def __repr__(self) -> str:
        lines = [f"TunedLens of {self.model} at {self.at}; KL(final || lens) in bits, held out"]
        width = max(map(len, self.sites))
        for site in self.sites:
            before, after = self.kl_before[site], self.kl_after[site]
            lines.append(f"  {site:<{width}}  {before.value:.3g} -> {after.value:.3g} {after.ci()}")
        return "\n".join(lines)

    def save(self, folder: str | Path) -> Path:
        """Write weights (safetensors), words (JSON) and a card into a folder; returns it.

        Raises:
            InputError: the folder holds a tuned lens already.
        """
        from imaginelens.probes.tuned_saving import save

        return save(self, Path(folder))

    @staticmethod
    def from_pretrained(name: str | Path, *, revision: str | None = None) -> "TunedLens":
        """Open a lens from a folder that `save` wrote, or from the Hub.

        Raises:
            CheckpointError: there is no tuned lens, or one that cannot be read.
        """
        from imaginelens.probes.tuned_saving import from_pretrained

        return from_pretrained(name, revision=revision)

    def push_to_hub(
        self,
        repo_id: str,
        *,
        private: bool = False,
        token: str | None = None,
        license: str | None = None,
    ) -> Address:
        """Upload weights, words and card to a model repository of the Hub; returns its address.

        Args:
            license: the Hub's word for it, such as "mit"; the card names none if left out.

        Raises:
            CheckpointError: the Hub cannot be reached, or one may not write there.
        """
        from imaginelens.probes.tuned_saving import push

        return push(self, repo_id, private=private, token=token, license=license)

    def _check(self, lens: LatentModel) -> None:
        width = len(next(iter(self.biases.values())))
        missing = [site for site in self.sites if site not in lens.registry]
        if width != lens.structure.d_model or missing:
            raise InputError(
                f"the lens was trained on a {self.model} of width {width} at {len(self.sites)} "
                f"sites, and this {type(lens.model).__name__} has width {lens.structure.d_model}"
                + (f" and no {missing[0]!r}" if missing else "")
                + "; fit one on this model"
            )


def _told(name: str, estimate: Estimate) -> dict[str, float]:
    interval = estimate.ci()
    return {name: estimate.value, f"{name}_low": interval.low, f"{name}_high": interval.high}
