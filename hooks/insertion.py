"""Image tokens that come again before each latent (IVT-LR): which ones, and where they are laid.

Which they are depends on what the position before them looks at, so they are picked while the
prompt is read, segment by segment.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from jaxtyping import Bool, Float, Int

from imaginelens.hooks.tokens import Kind, TokenMap


@dataclass(frozen=True)
class Insertion:
    """Before each latent, the image tokens that the position before it looks at most come again.

    IVT-LR (FYYDCC/IVT-LR, qwen_vl/qwen_ivtlr.py): attention is averaged over all layers and heads,
    the tokens are those of the last picture, and none comes twice. Positions are then counted one
    by one over the whole sequence, pictures included. Torch leaves the order open in which tokens
    come that are picked together; it is that of the device, as in the release.

    Attributes:
        patches: how many tokens come again.
    """

    patches: int = 32

    def __post_init__(self) -> None:
        if self.patches < 1:
            raise ValueError(
                f"Insertion(patches={self.patches}) puts nothing in; give 1 or more, or a spec "
                "with inserts=None"
            )

    def pick(
        self, looked: Float[torch.Tensor, "layer head cell"], used: Bool[torch.Tensor, " cell"]
    ) -> Int[torch.Tensor, " patch"]:
        """Which cells of a picture come again, by how much each layer and head looks at them.

        >>> looked = torch.tensor([[[0.5, 0.1, 0.4]], [[0.1, 0.3, 0.4]]])
        >>> Insertion(patches=1).pick(looked, torch.tensor([False, False, True]))
        tensor([0])
        """
        scores = looked.flatten(0, 1).mean(0).masked_fill(used, -torch.inf)
        return scores.topk(self.patches, sorted=False).indices


@dataclass
class Reinsertion:
    """What one generation has picked so far, and what its new columns are filled with.

    Attributes:
        images: embeddings of each row's image tokens, as the first block reads them.
        fills: by row and column, what is laid over the embeddings.
    """

    insertion: Insertion
    images: Sequence[torch.Tensor] = ()
    fills: dict[tuple[int, int], torch.Tensor] = field(default_factory=dict)
    _used: dict[int, set[int]] = field(default_factory=dict)

    def rows(self, tokens: TokenMap, stop: int) -> np.ndarray:
        """The rows whose next new columns begin at a column: what is before it decides them."""
        if stop >= tokens.width:
            return np.zeros(0, dtype=int)
        begins = (tokens.kind[:, stop] == Kind.INSERTED) & (
            tokens.step[:, stop] != tokens.step[:, stop - 1]
        )
        return np.flatnonzero(begins)

    def fill(
        self,
        tokens: TokenMap,
        stop: int,
        h: Float[torch.Tensor, "example d_model"],
        looked: Mapping[str, Float[torch.Tensor, "example head key"]],
    ) -> None:
        """Decide what the columns from `stop` on are, up to the next latent, and note in the map
        which cells they show.

        Args:
            h: the last hidden state of each row.
            looked: by layer, how the last position looks at all positions so far.
        """
        patterns = torch.stack([*looked.values()], dim=1)
        for row in self.rows(tokens, stop).tolist():
            cells, used = last_picture(tokens, row), self._used.setdefault(row, set())
            taken = torch.tensor([c in used for c in cells.tolist()], device=h.device)
            where = torch.as_tensor(cells, device=patterns.device)
            picked = self.insertion.pick(patterns[row][..., where], taken).cpu().numpy()
            used |= set(cells[picked].tolist())
            columns = stop + np.arange(self.insertion.patches)
            first = len(tokens.columns(row, Kind.IMAGE)) - len(cells)
            for column, cell in zip(columns.tolist(), picked.tolist(), strict=True):
                self.fills[row, column] = self.images[row][first + cell]
            for held in (tokens.image, tokens.cell, tokens.box):
                held[row, columns] = held[row, cells[picked]]
            self.fills[row, stop + self.insertion.patches] = h[row]

    def states(self, columns: np.ndarray, like: torch.Tensor) -> torch.Tensor:
        """What the latents at these columns are fed, (example, position, d_model), before hooks."""
        blank = torch.zeros_like(like[0])
        rows = range(len(like))
        return torch.stack(
            [torch.stack([self.fills.get((r, c), blank) for c in columns.tolist()]) for r in rows]
        )

    def over(
        self,
        overlay: Callable[[torch.Tensor], torch.Tensor] | None,
        tokens: TokenMap,
        start: int,
        stop: int,
    ) -> Callable[[torch.Tensor], torch.Tensor] | None:
        """Lay what comes again over the embeddings of these columns, beside the latents."""
        cells = np.argwhere(tokens.kind[:, start:stop] == Kind.INSERTED).tolist()
        if not cells:
            return overlay

        def lay(embeds: torch.Tensor) -> torch.Tensor:
            out = embeds.clone() if overlay is None else overlay(embeds).clone()
            for row, place in cells:
                out[row, place] = self.fills[row, start + place].to(out)
            return out

        return lay

    def kept(self, tokens: TokenMap) -> list[torch.Tensor]:
        """What was put into each row, in the order of its columns, (position, d_model)."""
        return [
            torch.stack([self.fills[row, c] for c in columns.tolist()])
            if len(columns := tokens.columns(row, Kind.INSERTED))
            else torch.zeros(0)
            for row in range(len(tokens))
        ]


def last_picture(tokens: TokenMap, row: int) -> np.ndarray:
    """The columns of a row's last picture."""
    columns = tokens.columns(row, Kind.IMAGE)
    return columns[tokens.image[row, columns] == tokens.image[row, columns].max(initial=-1)]
