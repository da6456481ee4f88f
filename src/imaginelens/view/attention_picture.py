"""Where the answer looks: attention from the position that decides it to latents, image and text.

Attention says where a head reads, not what it does with it: knock it out to know that
(`il.Knockout`).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float

from imaginelens.hooks.errors import InputError
from imaginelens.hooks.model import LatentModel
from imaginelens.hooks.positions import Positions, before_answer
from imaginelens.hooks.run import Run
from imaginelens.hooks.tokens import Kind, TokenMap
from imaginelens.view.figure import Figure
from imaginelens.view.panels import Panel, Sheet, draw

_SITE = "blocks.*.attn.hook_pattern"
_REGIONS = {
    Kind.IMAGE: "image", Kind.INSERTED: "image, again", Kind.VIDEO: "video", Kind.AUDIO: "audio",
    Kind.SYSTEM: "system", Kind.TEXT: "text", Kind.ANSWER: "answer", Kind.PAD: "pad",
}  # fmt: skip


@dataclass(frozen=True, eq=False)
class AttentionShares:
    """How a position's attention is shared out; over regions the shares sum to 1.

    Attributes:
        regions: each latent step (z0, z1, ...), and all else by its kind.
        layers: those that have a pattern.
        shares: 0 where an example has no such region.
        counts: how many positions each region has that can be looked at, (example, region).
        rows: which examples of the run these are: those where the position exists.
    """

    regions: tuple[str, ...]
    layers: tuple[int, ...]
    shares: Float[np.ndarray, "example layer head region"]
    counts: Float[np.ndarray, "example region"]
    rows: tuple[int, ...]

    @property
    def to_latents(self) -> Float[np.ndarray, "example layer head"]:
        """What all latent steps together get."""
        own = [name.startswith("z") for name in self.regions]
        return self.shares[..., own].sum(-1)


def attention_shares(
    lens: LatentModel, run: Run, *, at: Positions = before_answer
) -> AttentionShares:
    """Read in one forward how each head shares out its attention from one position.

    Args:
        at: where it looks from, one position in each example.

    Raises:
        InputError: no example has the position, or one has several.
        HookNameError: the model's attention shows no pattern.

    >>> import imaginelens as il
    >>> lens = il.load("latent-content")
    >>> found = attention_shares(lens, lens.run(lens.task(n=2, seed=0).base))
    >>> found.regions, found.shares.shape
    (('z0', 'z1', 'marker', 'image', 'text'), (2, 3, 4, 5))
    """
    columns = {row: at.resolve(run.tokens, row) for row in range(len(run))}
    for row, found in columns.items():
        if len(found) > 1:
            raise InputError(
                f"{at!r} is {len(found)} positions in example {row}, expected one to look from; "
                "name one, such as il.before_answer"
            )
    rows = [row for row, found in columns.items() if len(found)]
    if not rows:
        raise InputError(
            f"none of the {len(run)} examples has a position at {at!r} (no answer was found, say); "
            "look at run.answers and run.tokens"
        )
    names = lens.registry.match(_SITE)
    with torch.no_grad():
        _, cache = lens.run_with_cache(run, names_filter=names, positions=[at])
    sizes = {cache[name].shape[2] for name in names}
    if len(sizes) > 1:
        raise InputError(
            f"layers of this model have {sorted(sizes)} heads, and a table needs one number; read "
            f"lens.run_with_cache(run, names_filter={_SITE!r}) layer by layer"
        )
    patterns = np.stack(
        [cache[name][rows, 0].detach().cpu().double().numpy() for name in names], axis=1
    )
    seen = [int(columns[row][0]) for row in rows]
    return _shared_out(run.tokens, rows, seen, patterns, tuple(_layer(name) for name in names))


def attention_to_latents(
    lens: LatentModel,
    run: Run,
    *,
    at: Positions = before_answer,
    layers: Sequence[int] | None = None,
    heads: bool = True,
    title: str | None = None,
) -> Figure:
    """Draw where the answer looks: a panel for each layer, heads down, latents and the rest across.

    Each row sums to 1; numbers are means over the run's examples. The figure is returned, not
    shown.

    Args:
        at: where it looks from, one position in each example.
        layers: those to draw; all if left out.
        heads: False draws one panel, layers down, each the mean of its heads.

    Raises:
        InputError: as `attention_shares`, or the model has no such layer.
        HookNameError: the model's attention shows no pattern.

    >>> import imaginelens as il
    >>> lens = il.load("latent-content")
    >>> figure = attention_to_latents(lens, lens.run(lens.task(n=2, seed=0).base), layers=[1])
    >>> list(figure.layout.xaxis.ticktext)
    ['z0', 'z1', 'marker', 'image', 'text']
    """
    found = attention_shares(lens, run, at=at)
    chosen = list(found.layers) if layers is None else list(layers)
    for layer in chosen:
        if layer not in found.layers:
            raise InputError(
                f"layer {layer} shows no attention pattern; choose from {found.layers}"
            )
    if not chosen:
        raise InputError("layers is empty; name at least one")
    places = [found.layers.index(layer) for layer in chosen]
    if heads:
        n_heads = found.shares.shape[2]
        panels = [
            _panel(
                found,
                found.shares[:, k],
                [str(h) for h in range(n_heads)],
                "head",
                f"layer {layer}",
            )
            for k, layer in zip(places, chosen, strict=True)
        ]
    else:
        mean = found.shares[:, places].mean(2)
        panels = [_panel(found, mean, [str(layer) for layer in chosen], "layer", "mean of heads")]
    n, about = len(found.rows), title or f"attention from {at!r}"
    marks = ["single example"] if n == 1 else []
    marks += [f"{len(run) - n} of {len(run)} examples left out: no {at!r}"] if n < len(run) else []
    marks.append("where a head looks, not what it does")
    to = found.to_latents.mean(0)[places]
    most, head = np.unravel_index(int(to.argmax()), to.shape)
    alt = (
        f"{about}, mean of {n} examples: latents get {to.mean():.1%} over all heads drawn, most in "
        f"layer {chosen[int(most)]}, head {head}: {to.max():.1%}. "
        + ", ".join(
            f"{region} {share:.1%}"
            for region, share in zip(
                found.regions, found.shares[:, places].mean((0, 1, 2)), strict=True
            )
        )
        + "."
    )
    return draw(
        Sheet(panels, about, "share of attention", limit=1.0, span=(0.0, 1.0), marks=marks, alt=alt)
    )


def _panel(
    found: AttentionShares,
    shares: Float[np.ndarray, "example row region"],
    rows: Sequence[str],
    axis: str,
    title: str,
) -> Panel:
    mean, low, high = shares.mean(0), shares.min(0), shares.max(0)
    counts = found.counts.mean(0)
    uniform = (found.counts / found.counts.sum(1, keepdims=True)).mean(0)
    hover = [
        [
            f"{title}\n{axis} {name} to {region}: {mean[i, j]:.3f}\n"
            f"from {low[i, j]:.3f} to {high[i, j]:.3f} in {len(shares)} examples\n"
            f"{counts[j]:.3g} positions; looking everywhere alike would be {uniform[j]:.3f}"
            for j, region in enumerate(found.regions)
        ]
        for i, name in enumerate(rows)
    ]
    return Panel(mean, list(rows), found.regions, axis, "looked at", title, hover)


def _shared_out(
    tokens: TokenMap,
    rows: Sequence[int],
    seen_from: Sequence[int],
    patterns: Float[np.ndarray, "example layer head key"],
    layers: tuple[int, ...],
) -> AttentionShares:
    if patterns.shape[-1] != tokens.width:
        raise InputError(
            f"patterns of {patterns.shape[-1]} keys came for a run of {tokens.width} positions; "
            "this model drops some of what it read, so that they cannot be told apart"
        )
    of = [_regions(tokens, row) for row in rows]
    names = _ordered({name for row in of for name in row})
    shares = np.zeros((*patterns.shape[:3], len(names)))
    counts = np.zeros((len(rows), len(names)))
    for k, (row, last) in enumerate(zip(of, seen_from, strict=True)):
        for j, name in enumerate(names):
            own = [column for column, region in enumerate(row) if region == name]
            shares[k, ..., j] = patterns[k][..., own].sum(-1)
            counts[k, j] = 0 if name == "pad" else sum(column <= last for column in own)
    kept = [j for j, name in enumerate(names) if counts[:, j].any() or np.any(shares[..., j] > 0)]
    regions = tuple(names[j] for j in kept)
    return AttentionShares(regions, layers, shares[..., kept], counts[:, kept], tuple(rows))


def _regions(tokens: TokenMap, row: int) -> list[str]:
    """What each column is: a latent step, a marker, or its kind."""
    found = [_REGIONS.get(Kind(int(kind)), "text") for kind in tokens.kind[row]]
    for column in (c for pair in tokens.marked_spans(row) for c in pair if c >= 0):
        found[column] = "marker"
    for step, column in enumerate(tokens.latents(row)):
        found[column] = f"z{step}"
    return found


def _ordered(names: set[str]) -> list[str]:
    """Latent steps first, in their order."""
    steps = sorted((name for name in names if name[1:].isdigit()), key=lambda name: int(name[1:]))
    others = ["marker", *dict.fromkeys(_REGIONS.values())]
    return steps + [name for name in others if name in names]


def _layer(name: str) -> int:
    return int(name.split(".")[1])
