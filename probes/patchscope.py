"""Patchscope: put a state into another prompt and let the model say what it makes of it.

Ghandeharioun et al. (2024, arXiv 2401.06102). A state that is taken from one run takes the place of
a placeholder in an inspection prompt, and the model goes on from there.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from imaginelens.hooks import Landing, LatentModel, Run, Swap, latent
from imaginelens.hooks import text as anywhere
from imaginelens.hooks.errors import InputError
from imaginelens.hooks.positions import Positions
from imaginelens.hooks.states import States
from imaginelens.probes.lens_table import shown
from imaginelens.probes.unembedding import LATENT


@dataclass(frozen=True, repr=False, eq=False)
class Patchscope:
    """What the model went on to write with each state in the place of the placeholder.

    Attributes:
        texts: (example, step); None where an example has no such step.
        unpatched: what it writes with the placeholder left as it is.
        landings: the proof of each batch's edit.
        site, into: where the states were taken, and where they were put.
    """

    texts: tuple[tuple[str | None, ...], ...]
    unpatched: str
    landings: tuple[Landing, ...]
    site: str
    into: str
    at: str
    placeholder: str

    @property
    def changed(self) -> float:
        """The share of states with which the model wrote something else than without."""
        found = [text for row in self.texts for text in row if text is not None]
        return sum(text != self.unpatched for text in found) / len(found)

    def __repr__(self) -> str:
        lines = [
            f"Patchscope: {self.site} at {self.at} into {self.into} at {self.placeholder}; "
            f"{self.changed:.0%} of the texts differ from the unpatched one",
            f"  unpatched: {shown(self.unpatched)}",
        ]
        for i, row in enumerate(self.texts[:4]):
            said = "  ".join(
                f"step {t}: {shown(text)}" for t, text in enumerate(row) if text is not None
            )
            lines.append(f"  example {i}  {said}")
        return "\n".join(lines + (["  ..."] if len(self.texts) > 4 else []))


def patchscope(
    lens: LatentModel,
    run: Run,
    *,
    prompt: str | Mapping[str, Any],
    placeholder: str | Positions,
    at: Positions = latent,
    site: str = LATENT,
    into: str | None = None,
    max_new_tokens: int = 16,
    batch_size: int = 32,
) -> Patchscope:
    """Put each state of a run into an inspection prompt, and read what the model then writes.

    Args:
        prompt: the inspection prompt: its text, or an example `{"images": ..., "text": ...}`.
        placeholder: the piece of its text, or the selector, whose states are replaced; a piece of
            several tokens gets the same state at each.
        at: which states of the run.
        site: where they are taken.
        into: where they are put; the same site if left out, and what enters the first block for
            `hook_latent`, which is an embedding.

    Raises:
        InputError: the run has no such state.
        EditTouchedNothing: the prompt has no such placeholder.

    >>> import imaginelens as il
    >>> lens = il.load("latent-content")
    >>> run = lens.run(lens.task(n=2, seed=0).base)
    >>> found = patchscope(lens, run, prompt="start red shape ?", placeholder="red")
    >>> len(found.texts), found.landings[0].fired
    (2, 1)
    """
    example = {"text": prompt} if isinstance(prompt, str) else dict(prompt)
    where = anywhere.find(placeholder) if isinstance(placeholder, str) else placeholder
    target = into or ("blocks.0.hook_resid_pre" if site == LATENT else site)
    values, mask = states_at(lens, run, site=site, at=at)
    unpatched = lens.run([example], max_new_tokens=max_new_tokens)
    n_tokens = len(where.resolve(unpatched.tokens, 0)) or 1
    donors = values[mask][:, None].expand(-1, n_tokens, -1)
    texts: list[str] = []
    landings: list[Landing] = []
    for part in donors.split(batch_size):
        given = States(part, torch.ones(part.shape[:2], dtype=torch.bool))
        with lens.edit(Swap(given), at=where, site=target) as landing:
            written = lens.run([example] * len(part), max_new_tokens=max_new_tokens)
        texts += written.texts
        landings.append(landing)
    told = iter(texts)
    rows = tuple(tuple(next(told) if there else None for there in row) for row in mask.tolist())
    return Patchscope(
        rows, unpatched.texts[0], tuple(landings), site, target, repr(at), repr(where)
    )


@torch.no_grad()
def states_at(
    lens: LatentModel, run: Run, *, site: str, at: Positions
) -> tuple[torch.Tensor, torch.Tensor]:
    """A run's states at a site and selector, (example, step, d_model), and which are there.

    Raises:
        InputError: there is none, or they are not states of the residual stream.
    """
    if lens.registry[site].kind.axes != ("example", "position", "d_model"):
        raise InputError(
            f"{site!r} holds no states of the residual stream; choose 'hook_latent' or a site such "
            "as 'blocks.1.hook_resid_post'"
        )
    if site == LATENT:
        states = run.states(site, at)
        values, mask = states.values, states.mask
    else:
        _, cache = lens.run_with_cache(run, names_filter=site, positions=[at])
        if site not in cache:
            values, mask = torch.zeros(0), torch.zeros(0, dtype=torch.bool)
        else:
            values, mask = cache[site], cache.columns[site] >= 0
    if not mask.any():
        raise InputError(
            f"{at!r} selects no state of {site!r} in any of the {len(run)} examples "
            f"({run.trigger}); choose other positions"
        )
    return values, mask.to(values.device)
