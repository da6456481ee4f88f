"""References that never hold the row they serve: two folds, each the reference of the other."""

from collections import Counter
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from jaxtyping import Int

from imaginelens.hooks import Edit, EditContext, Run
from imaginelens.hooks.edits import Act
from imaginelens.hooks.errors import DonorError
from imaginelens.hooks.positions import Positions
from imaginelens.hooks.states import Donor, States, states_of
from imaginelens.hooks.tokens import Kind, TokenMap

ENOUGH = 2  # examples that a reference needs of a step, for a standard deviation


def two_folds(labels: Sequence[Hashable], *, seed: int = 0) -> Int[np.ndarray, " example"]:
    """Split examples into two halves so that no group is in both: the fold, 0 or 1, of each.

    Groups are drawn in random order and go to the smaller fold.

    >>> folds = two_folds(["a", "a", "b", "c"])
    >>> folds[0] == folds[1], sorted(folds.tolist())
    (np.True_, [0, 0, 1, 1])
    """
    members = Counter(labels)
    groups, sizes, fold_of = list(members), [0, 0], {}
    for k in np.random.default_rng(seed).permutation(len(groups)):
        fold_of[groups[k]] = int(sizes[1] < sizes[0])
        sizes[fold_of[groups[k]]] += members[groups[k]]
    return np.array([fold_of[label] for label in labels], dtype=int)


@dataclass
class Reference:
    """The unedited runs of one fold, as one donor of states, or of written imagination."""

    runs: Sequence[Run]
    _states: dict[tuple[str, str], States] = field(default_factory=dict)

    def states(self, site: str, at: Positions) -> States:
        """The states of all runs at a site and selector."""
        key = site, repr(at)
        if key not in self._states:
            self._states[key] = joined([run.states(site, at) for run in self.runs])
        return self._states[key]

    @property
    def tokens(self) -> TokenMap:
        """What all runs wrote, without their prompts: spans of imagination are found there."""
        parts = [run.tokens for run in self.runs]
        width = max(part.width - part.prompt_width for part in parts)
        ids = np.concatenate([_own(part, part.ids, width, 0) for part in parts])
        kind = np.concatenate([_own(part, part.kind, width, Kind.PAD) for part in parts])
        blank = np.full(ids.shape, -1)
        return TokenMap(
            ids=ids,
            kind=kind,
            image=blank,
            cell=np.stack([blank] * 2, -1),
            box=np.full((*ids.shape, 4), np.nan),
            span=blank,
            step=blank,
            grids=((),) * len(ids),
            tokenizer=parts[0].tokenizer,
            prompt_width=0,
            keys=tuple(key for part in parts for key in part.keys),
        )


@dataclass(frozen=True)
class Rows:
    """Some rows of a donor that lines its rows up with the examples, for a batch of these."""

    donor: Donor
    rows: tuple[int, ...]
    n: int

    def states(self, site: str, at: Positions) -> States:
        """The states of these rows; a donor of a single row serves all."""
        whole = states_of(self.donor, site, at)
        if len(whole) == 1:
            return whole
        if len(whole) != self.n:
            raise DonorError(
                f"the donor has {len(whole)} rows and there are {self.n} examples; give it one row "
                "for all, or one for each"
            )
        rows = list(self.rows)
        keys = None if whole.keys is None else tuple(whole.keys[row] for row in rows)
        return States(whole.values[rows], whole.mask[rows], keys)

    @property
    def tokens(self) -> TokenMap | None:
        """The map of these rows, if the donor is a run, for its spans of imagination."""
        whole = getattr(self.donor, "tokens", None)
        if not isinstance(whole, TokenMap) or len(whole) == 1:
            return whole
        rows = list(self.rows)
        arrays = ("ids", "kind", "image", "cell", "box", "span", "step")
        return replace(
            whole,
            **{name: getattr(whole, name)[rows] for name in arrays},
            grids=tuple(whole.grids[row] for row in rows),
            keys=tuple(whole.keys[row] for row in rows),
            videos=tuple(whole.videos[row] for row in rows if whole.videos),
        )


@dataclass(frozen=True)
class Within(Edit):
    """An edit that takes its statistics from a fold, also at steps that the fold never reached: the
    last step that at least two of its examples reached stands for all later ones.

    An edited run can go on for longer than any unedited one.
    """

    edit: Edit

    @property
    def given(self) -> Donor | None:
        return self.edit.given

    def apply(self, act: Act, ctx: EditContext) -> Act:
        last = reach(self._states(ctx))
        if last < 0:
            raise DonorError(
                f"{type(self.edit).__name__} takes its statistics from examples of other groups, "
                f"and fewer than {ENOUGH} of them have a state at {ctx.site!r} there; use more "
                "examples, or give it a reference"
            )
        if ctx.ordinals.max() <= last:
            return self.edit.apply(act, ctx)
        return torch.cat(
            [self.edit.apply(act[[i]], _cell(ctx, i, last)) for i in range(len(ctx.ordinals))]
        )


def reach(states: States) -> int:
    """The last ordinal that at least two examples have; -1 if there is none."""
    return int((states.mask.sum(0) >= ENOUGH).sum()) - 1


def joined(parts: Sequence[States]) -> States:
    """The states of several batches as those of one."""
    width = max(part.mask.shape[1] for part in parts)
    values, masks = [], []
    for part in parts:
        more = width - part.mask.shape[1]
        blank = part.values.new_zeros(len(part), more, *part.values.shape[2:])
        values.append(torch.cat([part.values, blank], 1))
        masks.append(torch.cat([part.mask, part.mask.new_zeros(len(part), more)], 1))
    keys = [part.keys for part in parts]
    known = None if None in keys else tuple(key for some in keys for key in some or ())
    return States(torch.cat(values), torch.cat(masks), known)


def _cell(ctx: EditContext, i: int, last: int) -> EditContext:
    """One cell of a context, at the last ordinal at most; its noise is drawn by its own ordinal."""
    ordinal = int(ctx.ordinals[i])
    return replace(
        ctx,
        site=ctx.site if ordinal <= last else f"{ctx.site} {ordinal}",
        rows=ctx.rows[[i]],
        positions=ctx.positions[[i]],
        ordinals=np.minimum(ctx.ordinals[[i]], last),
        steps=ctx.steps[[i]],
        first=None if ctx.first is None else ctx.first[[i]],
        keys=ctx.keys[i : i + 1],
    )


def _own(tokens: TokenMap, values: np.ndarray, width: int, blank: int) -> np.ndarray:
    """What stands behind the prompt, filled up on the right."""
    own = values[:, tokens.prompt_width :]
    return np.pad(own, ((0, 0), (0, width - own.shape[1])), constant_values=blank)
