"""One batch of runs: the states at some sites and positions, and where they were found."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from transformers.generation import StoppingCriteriaList

from imaginelens.hooks import EditContext, EditTouchedNothing, Force, LatentModel, Run, Skip
from imaginelens.hooks.edits import Act, Constant
from imaginelens.hooks.errors import InputError
from imaginelens.hooks.inputs import Example
from imaginelens.hooks.positions import Positions, latent
from imaginelens.hooks.rewriting import ForcedText, OwnLimit
from imaginelens.hooks.states import pad
from imaginelens.hooks.tokens import Kind
from imaginelens.probes.shards import Part, Trace

FED = "hook_latent"


@dataclass(frozen=True)
class Capture:
    """What to read of runs.

    Attributes:
        sites: hook names, in the order of the model.
        at: the selector of positions.
        dtype: the states' type as they are kept.
    """

    sites: tuple[str, ...]
    at: Positions
    max_new_tokens: int | None = None
    latents: Skip | Force | None = None
    dtype: str = "float32"

    def batch(self, lens: LatentModel, examples: Sequence[Example]) -> Part:
        """The states of the runs that a model makes of some inputs by itself."""
        return self._part(self._run(lens, examples, self.max_new_tokens))

    def dictated(
        self,
        lens: LatentModel,
        examples: Sequence[Example],
        like: Trace,
        constant: Float[np.ndarray, " d_model"] | None = None,
    ) -> Part:
        """The states that a model makes of some inputs while it writes what is dictated.

        Latents are its own, and as many as in the runs that wrote the text.

        Args:
            like: of the runs that wrote it; steps that it does not have are left out.
            constant: what is fed in the place of every latent. At `hook_latent` the states are
                those that the model made and did not get to feed.
        """
        ids = [row[row >= 0].tolist() for row in like.written]
        forced = _Dictation(ids)
        options = {
            "logits_processor": [forced],
            "stopping_criteria": StoppingCriteriaList([OwnLimit(forced)]),
        }
        # one more than was written: a latent that ends a row is read before the row can stop
        limit = 1 + max(map(len, ids))
        if constant is None:
            return _within(self._part(self._run(lens, examples, limit, options)), like)
        weight = next(lens.model.parameters())
        edit = _Dummy(torch.from_numpy(constant).to(weight.device, weight.dtype))
        try:
            with lens.edit(edit, at=latent):
                run = self._run(lens, examples, limit, options)
        except EditTouchedNothing:  # nothing was fed, or nothing else than the constant
            return _within(self._part(self._run(lens, examples, limit, options)), like)
        made = torch.zeros_like(run.latents)
        for (row, step), state in edit.seen.items():
            made[row, step] = state
        return _within(self._part(replace(run, latents=made)), like)

    def _run(
        self,
        lens: LatentModel,
        examples: Sequence[Example],
        limit: int | None,
        options: dict[str, Any] | None = None,
    ) -> Run:
        return lens.run(
            list(examples),
            names_filter=[site for site in self.sites if site != FED] or False,
            positions=[self.at],
            max_new_tokens=limit,
            latents=self.latents,
            generation=options,
        )

    def _part(self, run: Run) -> Part:
        values, masks = [], []
        anywhere = any(len(self.at.resolve(run.tokens, row)) for row in range(len(run)))
        for site in self.sites:
            # a batch in which no row has such a position captures nothing
            found = run.states(site, self.at) if anywhere else pad([run.latents[0, :0]] * len(run))
            # numpy has no bfloat16; float32 holds its numbers exactly
            exact = torch.promote_types(found.values.dtype, torch.float32)
            values.append(found.values.detach().to("cpu", exact).numpy().astype(self.dtype))
            masks.append(found.mask.cpu().numpy())
        _check_alike(self.sites, masks, self.at)
        return Part(np.stack(values, axis=2), self._trace(run, masks[0]))

    def _trace(self, run: Run, mask: Bool[np.ndarray, "example step"]) -> Trace:
        tokens = run.tokens
        steps, late = np.full(mask.shape, -1), False
        for row in range(len(run)):
            columns = self.at.resolve(tokens, row)
            if FED in self.sites:
                columns = columns[tokens.kind[row, columns] == Kind.LATENT]
            steps[row, : len(columns)] = tokens.step[row, columns]
            fed = tokens.latents(row)
            late |= bool(len(fed) and len(columns) and columns[-1] >= fed[0])
        fed_all = run.latents[run.latent_mask]
        feeds = len(fed_all) > 0 and not run.trigger.written
        first = fed_all[0].detach().to("cpu", torch.float64).numpy() if feeds else None
        return Trace(mask, steps, _written(run), first, late)


class _Dictation(ForcedText):
    """Text that each row has to write, from wherever its prompt ends."""

    def __init__(self, ids: Sequence[list[int]]) -> None:
        super().__init__(-1, ids, list(map(len, ids)), [()] * len(ids))

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        if self.width < 0:
            self.width = input_ids.shape[1]
        return super().__call__(input_ids, scores)


@dataclass(frozen=True)
class _Dummy(Constant):
    """One constant latent, which notes what the model would have fed, by row and step."""

    seen: dict[tuple[int, int], torch.Tensor] = field(default_factory=dict)

    def apply(self, act: Act, ctx: EditContext) -> Act:
        for cell, (row, step) in enumerate(zip(ctx.rows, ctx.steps, strict=True)):
            self.seen[int(row), int(step)] = act[cell].detach().clone()
        return super().apply(act, ctx)


def _written(run: Run) -> Int[np.ndarray, "example token"]:
    """The ids that each row wrote, up to its last token; -1 behind it."""
    start = run.tokens.prompt_width
    ids = run.tokens.ids[:, start:].astype(np.int64)
    real = run.tokens.kind[:, start:] != Kind.PAD
    lasts = [int(np.flatnonzero(row)[-1]) + 1 if row.any() else 0 for row in real]
    behind = np.arange(ids.shape[1])[None] >= np.array(lasts)[:, None]
    return np.where(behind, -1, ids)


def _within(part: Part, like: Trace) -> Part:
    """A part with the steps of another, and only those."""
    have = part.trace.mask
    width = like.mask.shape[1]
    shared = min(width, have.shape[1])
    mask = np.zeros(like.mask.shape, dtype=bool)
    mask[:, :shared] = have[:, :shared] & like.mask[:, :shared]
    values = np.zeros((len(mask), width, *part.values.shape[2:]), dtype=part.values.dtype)
    values[:, :shared] = part.values[:, :shared] * mask[:, :shared, None, None]
    return Part(values, Trace(mask, like.steps, like.written, None, like.late))


def _check_alike(sites: Sequence[str], masks: Sequence[np.ndarray], at: Positions) -> None:
    """Sites whose states are at different positions have no steps in common."""
    for site, mask in zip(sites, masks, strict=True):
        if mask.shape != masks[0].shape or (mask != masks[0]).any():
            raise InputError(
                f"at {at!r}, {sites[0]!r} has {int(masks[0].sum())} states in a batch and {site!r} "
                f"has {int(mask.sum())}, so their steps are not the same; collect them one by one"
            )
