"""The logit lens on latent states: the token each would be if the model unembedded it at once.

After nostalgebraist (2020): softmax(W_U norm(h)), with the model's own final norm and output head.
Two things differ at latents. What a family feeds back has mostly passed the final norm already, so
at `hook_latent` it is not applied again. And where a family's head reads a projected state, that
state is projected here as well.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
import torch

from imaginelens.hooks import LatentModel, Run, latent
from imaginelens.hooks.errors import InputError
from imaginelens.hooks.names import NamesFilter
from imaginelens.hooks.positions import LatentPositions, Positions
from imaginelens.hooks.tokens import Kind
from imaginelens.probes.lens_table import LensTable
from imaginelens.probes.unembedding import LATENT, Logits, Reading, read, reads_latents


def logit_lens(
    lens: LatentModel,
    inputs: Any,
    *,
    sites: NamesFilter = None,
    at: Positions = latent,
    top: int = 5,
    watch: Sequence[str | int] = (),
) -> LensTable:
    """Read each state as the token it would be if it were unembedded where it stands.

    The law it is checked against in every call: the last layer gives the model's own logits
    (`.gap` is the largest difference); where a model's do not follow, no table is made.

    Args:
        inputs: a `Run`, or what `lens.run` takes, which is then run.
        sites: of the residual stream; None is `hook_latent`, where the output head reads what the
            family feeds back, and every `hook_resid_post`.
        at: which positions; `il.before_answer` and the like do as well.
        top: how many of the likeliest tokens are kept.
        watch: tokens (texts or ids) whose rank and probability are kept wherever they stand; the
            first token of every answer of the run is always watched.

    Raises:
        InputError: there is no such position, a text to watch is not one token, or a site is no
            state that the output head could read.

    >>> import imaginelens as il
    >>> lens = il.load("latent-content")
    >>> table = logit_lens(lens, lens.task(n=2, seed=0).base, watch=["circle", "square"])
    >>> table.tokens.shape, table.rank_of("circle").shape
    ((2, 2, 4, 5), (2, 2, 4))
    """
    run = inputs if isinstance(inputs, Run) else lens.run(inputs)
    chosen = stream_sites(lens, sites, at)
    reading = read(lens, run, sites=chosen, at=at)
    return tabulate(lens, run, reading, chosen, reading.logits, at=at, top=top, watch=watch)


def stream_sites(lens: LatentModel, sites: NamesFilter, at: Positions) -> list[str]:
    """The sites that were asked for, or those a lens reads by default at some positions."""
    if sites is not None:
        return lens.registry.match(sites)
    own = lens.registry.match("blocks.*.hook_resid_post")
    fed = isinstance(at, LatentPositions) and reads_latents(lens.spec)
    return [*([LATENT] if fed else []), *own]


@torch.no_grad()
def tabulate(
    lens: LatentModel,
    run: Run,
    reading: Reading,
    sites: Sequence[str],
    logits_of: Callable[[str], Iterable[Logits]],
    *,
    at: Positions,
    top: int,
    watch: Sequence[str | int],
    kind: str = "logit lens",
) -> LensTable:
    """Make the table of the logits that a lens gives at each site."""
    names = {token: _number(lens, token) for token in watch if isinstance(token, str)}
    watched = [names[token] if isinstance(token, str) else token for token in watch]
    watched = list(dict.fromkeys([*watched, *_first_of_answers(run)]))
    found = [_summed(logits_of(site), top, watched) for site in sites]
    mask = reading.mask.cpu().numpy()

    def laid(part: int, fill: float, dtype: type) -> np.ndarray:
        """(example, step, site, ...) of what was computed for the states that are there."""
        values = np.stack([one[part] for one in found], axis=1)
        whole = np.full((*mask.shape, *values.shape[1:]), fill, dtype=dtype)
        whole[mask] = values
        return whole

    ids = laid(0, -1, np.int64)
    nan = float("nan")
    return LensTable(
        kind=kind,
        at=repr(at),
        sites=tuple(sites),
        token_ids=ids,
        probabilities=laid(1, nan, np.float64),
        entropy=laid(2, nan, np.float64),
        mask=mask,
        watched=tuple(watched),
        ranks=laid(3, -1, np.int64),
        watched_probabilities=laid(4, nan, np.float64),
        texts={n: spelled(lens, n) for n in {*ids[ids >= 0].tolist(), *watched}},
        names=names,
        gap=reading.gap,
    )


def spelled(lens: LatentModel, token: int) -> str:
    """The text of one token, spaces and all."""
    if lens.tokenizer is None:
        return f"[{token}]"
    return str(lens.tokenizer.decode([token], clean_up_tokenization_spaces=False))


def _summed(pieces: Iterable[Logits], top: int, watched: Sequence[int]) -> tuple[np.ndarray, ...]:
    """Of each state: the likeliest tokens, their probabilities, the entropy in bits, and ranks and
    probabilities of those watched."""
    parts = [_part(piece.double(), top, watched) for piece in pieces]
    return tuple(torch.cat(column).cpu().numpy() for column in zip(*parts, strict=True))


def _part(logits: Logits, top: int, watched: Sequence[int]) -> tuple[torch.Tensor, ...]:
    size = logits.shape[-1]
    beyond = [n for n in watched if not 0 <= n < size]
    if not 1 <= top <= size or beyond:
        what = f"the token {beyond[0]}" if beyond else f"top={top}"
        raise InputError(f"{what} came where the vocabulary has {size} tokens; give 1 to {size}")
    log_p = logits.log_softmax(-1)
    best = log_p.topk(top)
    p = log_p.exp()
    entropy = -(torch.where(p > 0, p * log_p, torch.zeros_like(p))).sum(-1) / np.log(2)
    ranks = torch.zeros(len(logits), len(watched), dtype=torch.int64)
    for k, number in enumerate(watched):
        ranks[:, k] = (logits > logits[:, [number]]).sum(-1)
    return best.indices, best.values.exp(), entropy, ranks, p[:, list(watched)]


def _number(lens: LatentModel, token: str) -> int:
    """The id of a text that is one token."""
    ids = lens.encode(token)
    if len(ids) != 1:
        raise InputError(
            f"{token!r} is {len(ids)} tokens ({ids}), and a lens reads one; watch the first, by "
            "its id, or a text that is a token (mind the space in front of a word)"
        )
    return ids[0]


def _first_of_answers(run: Run) -> list[int]:
    columns = [run.tokens.columns(row, Kind.ANSWER)[:1] for row in range(len(run))]
    return [int(run.tokens.ids[row, c[0]]) for row, c in enumerate(columns) if len(c)]
