"""Which word, or which patch of the picture, does a latent lie next to: by cosine, with its null.

There is always a nearest one. Whether it is nearer than chance depends on what chance is: for the
vocabulary, how near a random direction comes to its nearest token; for the patches of a picture,
how near the same state comes to the nearest patch of other examples' pictures.
"""

import html
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from jaxtyping import Bool, Float, Int, Shaped

from imaginelens.estimates import Estimate, cosines
from imaginelens.hooks import LatentModel, Run, latent
from imaginelens.hooks.errors import InputError
from imaginelens.hooks.positions import Positions
from imaginelens.probes.lens_table import shown
from imaginelens.probes.logit_lens import spelled
from imaginelens.probes.patchscope import states_at
from imaginelens.probes.unembedding import LATENT

if TYPE_CHECKING:
    import pandas as pd

Kind = Literal["raw", "centred"]
_KINDS: tuple[Kind, ...] = ("raw", "centred")
_AT_ONCE = 16384  # candidates: 470 MB in float64 at d_model 3584
_DIRECTIONS = 200


@dataclass(frozen=True, repr=False, eq=False)
class Nearest:
    """The nearest words or patches of each state, the nearest first.

    Attributes:
        kind: the cosine that orders them; raw cosines of states in one cone are all high.
        labels: (example, step, rank): a token, or "image 0 (row 1, column 2)"; "" where there is
            no such step or patch.
        numbers: of each, its token id, or the column of the patch in the run; -1 where none is.
        cells: (example, step, rank, 3): image, row and column of a patch; -1 for words.
        raw, centred: the cosine with each, nan where none is.
        typical: (example, step): the mean cosine, of this kind, with all words; or with all
            patches of the other examples.
        null: (example, step): how near the nearest is where there is nothing to find: a random
            direction among the words, or other examples' pictures (nan where there is none).
    """

    among: str
    kind: str
    site: str
    at: str
    labels: Shaped[np.ndarray, "example step rank"]
    numbers: Int[np.ndarray, "example step rank"]
    cells: Int[np.ndarray, "example step rank 3"]
    raw: Float[np.ndarray, "example step rank"]
    centred: Float[np.ndarray, "example step rank"]
    typical: Float[np.ndarray, "example step"]
    null: Float[np.ndarray, "example step"]
    mask: Bool[np.ndarray, "example step"]

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def cosine(self) -> Float[np.ndarray, "example step rank"]:
        """The cosines of the kind that orders them."""
        return self.raw if self.kind == "raw" else self.centred

    def excess(self, *, step: int, groups: Sequence[Any] | None = None) -> Estimate:
        """How much nearer the nearest is than its null, at one step.

        Raises:
            InputError: there is no such step.
            EstimateError: fewer than two examples have a null.
        """
        if not 0 <= step < self.mask.shape[1]:
            raise InputError(f"there is no step {step} in a table of {self.mask.shape[1]} steps")
        values = (self.cosine[:, :, 0] - self.null)[:, step]
        name = f"{self.site} at step {step}: cosine with the nearest, less its null"
        return Estimate.mean(values, name=name, groups=groups)

    def to_dataframe(self) -> "pd.DataFrame":
        """One line per example, step and rank."""
        import pandas as pd

        example, step, rank = np.nonzero(self.numbers >= 0)
        where = example, step, rank
        return pd.DataFrame(
            {
                "example": example,
                "step": step,
                "rank": rank,
                "nearest": self.labels[where],
                "number": self.numbers[where],
                "cosine": self.raw[where],
                "centred_cosine": self.centred[where],
                "typical": self.typical[example, step],
                "null": self.null[example, step],
            }
        )

    def summary(self) -> str:
        """What lies next to the states in one sentence, which says nothing of what they do."""
        found = self.labels[..., 0][self.mask]
        texts, counts = np.unique(found.astype(str), return_counts=True)
        best = int(counts.argmax())
        near = float(np.nanmean(self.cosine[..., 0]))
        null = self.null[~np.isnan(self.null)]
        against = f"{null.mean():.3f} where there is nothing to find" if null.size else "no null"
        return (
            f"nearest of the {self.among} to {self.site} at {self.at}: {len(texts)} different ones "
            f"for {len(found)} states, most often {self._shown(str(texts[best]))!r} "
            f"({counts[best] / len(found):.0%}); {self.kind} cosine {near:.3f}, against {against}. "
            "What a state lies next to is not evidence of what it is used for."
        )

    def __repr__(self) -> str:
        lines = [f"nearest of the {self.among} by {self.kind} cosine, {self.site} at {self.at}"]
        for i in range(min(len(self), 4)):
            for t in np.flatnonzero(self.mask[i]).tolist():
                near = "  ".join(f"{text} {c:.2f}" for text, c in self._row(i, t))
                lines.append(f"  example {i} step {t}: {near}  (null {self.null[i, t]:.2f})")
        return "\n".join(lines + (["  ..."] if len(self) > 4 else []))

    def _repr_html_(self) -> str:
        rows = "".join(
            f"<tr><th>example {i}, step {t}</th>"
            + "".join(
                f"<td style='white-space:nowrap'><bdi>{html.escape(text)}</bdi> "
                f"<small>{c:.2f}</small></td>"
                for text, c in self._row(i, t)
            )
            + f"<td><small>null {self.null[i, t]:.2f}</small></td></tr>"
            for i in range(min(len(self), 4))
            for t in np.flatnonzero(self.mask[i]).tolist()
        )
        head = html.escape(f"nearest of the {self.among} by {self.kind} cosine, {self.site}")
        return f"<div><p><b>{head}</b></p><table>{rows}</table></div>"

    def _row(self, example: int, step: int) -> list[tuple[str, float]]:
        there = self.numbers[example, step] >= 0
        texts = [self._shown(text) for text in self.labels[example, step][there]]
        return list(zip(texts, self.cosine[example, step][there].tolist(), strict=True))

    def _shown(self, label: str) -> str:
        """A word is whatever the tokenizer holds; a patch has the name that it was given here."""
        return shown(label) if self.among == "vocabulary" else label


def nearest(
    lens: LatentModel,
    run: Run,
    *,
    among: str = "vocabulary",
    kind: str = "centred",
    at: Positions = latent,
    site: str = LATENT,
    top: int = 5,
    seed: int = 0,
) -> Nearest:
    """Find the words, or the patches of the example's own pictures, that each state lies next to.

    Words are rows of the input embedding; patches are what the projector writes over the image
    tokens. Both are inputs of the first block, as latents are: states of other sites are not.

    Args:
        among: "vocabulary" or "image".
        kind: the cosine that orders them, "raw" or "centred", which takes the mean of all
            states and candidates away, so that what they all share does not count.
        seed: of the random directions that are the vocabulary's null.

    Raises:
        InputError: the run has no such state, or no picture.
        SiteUnavailable: the model has no projector.

    >>> import imaginelens as il
    >>> lens = il.load("latent-pointer")
    >>> found = nearest(lens, lens.run(lens.task(n=4, seed=0).base), among="image", top=1)
    >>> found.labels[0, 0]
    array(['image 0 (row 0, column 1)'], dtype=object)
    """
    if among not in ("vocabulary", "image") or kind not in _KINDS or top < 1:
        raise InputError(
            f"among={among!r}, kind={kind!r}, top={top} came; give among='vocabulary' or 'image', "
            "kind='raw' or 'centred', and top=1 or more"
        )
    values, mask = states_at(lens, run, site=site, at=at)
    states, there = _numbers(values[mask]), mask.cpu().numpy()
    rows = np.nonzero(there)[0]
    if among == "vocabulary":
        parts = _of_words(lens, states, kind=kind, top=top, seed=seed)
        texts = np.array([[spelled(lens, n) for n in row] for row in parts[0].tolist()], object)
        cells = np.full((*parts[0].shape, 3), -1)
    else:
        patches, owner, columns = _patches(lens, run)
        parts = _of_patches(states, rows, patches, owner, columns, kind=kind, top=top)
        texts, cells = _places(run, rows, parts[0])
    shape = there.shape

    def laid(found: np.ndarray, fill: Any) -> np.ndarray:
        whole = np.full((*shape, *found.shape[1:]), fill, dtype=found.dtype)
        whole[there] = found
        return whole

    numbers, raw, centred, typical, null = parts
    nan = float("nan")
    return Nearest(
        among, kind, site, repr(at), laid(texts, ""), laid(numbers, -1), laid(cells, -1),
        laid(raw, nan), laid(centred, nan), laid(typical, nan), laid(null, nan), there,
    )  # fmt: skip


Parts = tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, np.ndarray]


def _of_words(lens: LatentModel, states: np.ndarray, *, kind: str, top: int, seed: int) -> Parts:
    """Ids, raw and centred cosines of the nearest words; mean cosine and null of each state."""
    embedding = lens.model.get_submodule(lens.structure.embed)
    table: Any = embedding.weight
    size = len(table)
    top = min(top, size)

    def words(start: int) -> np.ndarray:
        ids = torch.arange(start, min(start + _AT_ONCE, size), device=table.device)
        with torch.no_grad():
            return _numbers(embedding(ids))

    starts = range(0, size, _AT_ONCE)
    total = states.sum(0) + sum((words(s).sum(0) for s in starts), np.zeros(states.shape[1]))
    mean = total / (len(states) + size)
    drawn = np.random.default_rng(seed).standard_normal((_DIRECTIONS, states.shape[1]))
    found: dict[str, np.ndarray] = {k: np.full((len(states), size), np.nan) for k in _KINDS}
    best = np.full(_DIRECTIONS, -1.0)
    for start in starts:
        piece = words(start)
        for k in _KINDS:
            off = mean if k == "centred" else 0.0
            found[k][:, start : start + len(piece)] = cosines(states - off, piece - off)
        off = mean if kind == "centred" else 0.0
        best = np.fmax(best, np.nanmax(cosines(drawn, piece - off), axis=1))
    order = _order(found[kind], top)
    raw, centred = (np.take_along_axis(found[k], order, 1) for k in _KINDS)
    null = np.full(len(states), best.mean())
    return order, raw, centred, np.nanmean(found[kind], axis=1), null


def _of_patches(
    states: np.ndarray,
    rows: Int[np.ndarray, " state"],
    patches: Float[np.ndarray, "patch d_model"],
    owner: Int[np.ndarray, " patch"],
    columns: Int[np.ndarray, " patch"],
    *,
    kind: str,
    top: int,
) -> Parts:
    """Columns, raw and centred cosines of the nearest patches; mean cosine and null, by others."""
    found: dict[str, np.ndarray] = {k: cosines(states, patches, kind=k) for k in _KINDS}
    n, used = len(states), found[kind]
    numbers = np.full((n, top), -1)
    kept = {k: np.full((n, top), np.nan) for k in _KINDS}
    typical, null = np.full(n, np.nan), np.full(n, np.nan)
    alike = _same_pictures(patches, owner)
    for i, row in enumerate(rows.tolist()):
        own = np.flatnonzero(owner == row)
        order = own[_order(used[[i]][:, own], min(top, len(own)))[0]]
        numbers[i, : len(order)] = columns[order]
        for k in _KINDS:
            kept[k][i, : len(order)] = found[k][i, order]
        others = [used[i, owner == o] for o in np.unique(owner) if o not in alike[row]]
        if others:
            typical[i] = np.concatenate(others).mean()
            null[i] = np.mean([other.max() for other in others])
    return numbers, kept["raw"], kept["centred"], typical, null


def _same_pictures(
    patches: Float[np.ndarray, "patch d_model"], owner: Int[np.ndarray, " patch"]
) -> dict[int, set[int]]:
    """For each example, those that show the same patches, itself included."""
    seen: dict[bytes, set[int]] = {}
    for row in np.unique(owner).tolist():
        seen.setdefault(patches[owner == row].tobytes(), set()).add(row)
    return {row: group for group in seen.values() for row in group}


@torch.no_grad()
def _patches(lens: LatentModel, run: Run) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """What the projector wrote over each image token, whose example it is, and its column."""
    site = "vision_projector.hook_out"
    lens.registry[site]  # says why, where a model has none
    _, cache = lens.run_with_cache(run, names_filter=site)
    slots = cache.slots.get(site)
    if slots is None or not len(slots):
        raise InputError(
            f"none of the {len(run)} examples has an image token, so no patch is near; use "
            "among='vocabulary'"
        )
    missing = sorted(set(range(len(run))) - set(slots[:, 0].tolist()))
    if missing:
        raise InputError(
            f"examples {missing} have no image token, so that no patch of theirs is near; run them "
            "apart, with among='vocabulary'"
        )
    flat = _numbers(cache[site].flatten(0, -2))
    owner, columns, place = (slots[:, k].cpu().numpy() for k in range(3))
    return flat[place], owner, columns


def _places(
    run: Run, rows: Int[np.ndarray, " state"], columns: Int[np.ndarray, "state rank"]
) -> tuple[np.ndarray, np.ndarray]:
    """What to call each patch, and its image and grid cell."""
    texts = np.full(columns.shape, "", dtype=object)
    cells = np.full((*columns.shape, 3), -1)
    for (i, k), column in np.ndenumerate(columns):
        if column < 0:
            continue
        token = run.tokens.token(int(rows[i]), int(column))
        cells[i, k] = token.image, token.row, token.col
        inside = f"row {token.row}, column {token.col}" if token.row >= 0 else "no cell"
        texts[i, k] = f"image {token.image} ({inside})"
    return texts, cells


def _order(values: np.ndarray, top: int) -> np.ndarray:
    """The places of the largest of each row, the first of equals first; nan is last."""
    lowest = np.where(np.isnan(values), -np.inf, values)
    return np.argsort(-lowest, axis=1, kind="stable")[:, :top]


def _numbers(tensor: torch.Tensor) -> np.ndarray:
    return tensor.detach().double().cpu().numpy()
