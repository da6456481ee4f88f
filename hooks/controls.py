"""Controls of the engine itself: what must change nothing, and what must change everything."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from imaginelens.hooks.edits import Sham
from imaginelens.hooks.entries import EditEntry
from imaginelens.hooks.errors import InputError
from imaginelens.hooks.landing import Landing
from imaginelens.hooks.names import NamesFilter
from imaginelens.hooks.positions import Positions
from imaginelens.hooks.run import Run
from imaginelens.hooks.script import Script
from imaginelens.hooks.tokens import Kind

if TYPE_CHECKING:
    from imaginelens.hooks.model import LatentModel


@dataclass(frozen=True)
class Integrity:
    """What the controls measured, in logits.

    Attributes:
        sham: largest change of any logit when every state is put back as it was; must be 0.
        full_swap: largest difference from the source's logits when the base gets everything that
            enters the source's text model; must be 0 up to rounding.
        misplaced: the same with the donor's rows or positions permuted; must be large.
        path_gap: largest difference between generating a text and reading it in one forward.
    """

    sham: float
    full_swap: float
    misplaced: float
    path_gap: float


def sham_difference(
    lens: "LatentModel", run: Run, *, site: NamesFilter, at: Positions
) -> tuple[float, Landing]:
    """Put back, at some sites, the states that are there; how much do the logits change?"""
    sites = tuple(lens.registry.match(site))
    entry = EditEntry(sites, Sham(), at, Landing("Sham", repr(at), sites))
    with torch.no_grad():
        before = lens.run_with_hooks(run, fwd_hooks=_watching(sites))
        with lens.registry.scope([entry]):
            after = lens.run_with_hooks(run)
    return float((after - before).abs().max()), entry.landing


def full_swap_difference(
    lens: "LatentModel", base: Run, source: Run, *, permute: bool = False
) -> float:
    """Give the base everything that enters the source's text model; how far from the source's
    logits does it end up?

    Args:
        permute: misplace the donor on purpose: rows of a batch are rolled, of one row positions.

    Raises:
        InputError: the two runs have sequences of unequal length, or the text model embeds its
            tokens itself, so that what enters it cannot be swapped.
    """
    scripts = lens.script(base), lens.script(source)
    widths = [s.tokens.width for s in scripts]
    if widths[0] != widths[1] or len(base) != len(source):
        raise InputError(
            f"a full swap needs runs of equal size, not {len(base)} x {widths[0]} and "
            f"{len(source)} x {widths[1]} positions; choose a pair of equal length"
        )
    with torch.no_grad():
        logits, given = _decoder_inputs(lens, scripts[1])
        if not isinstance(given[1].get("inputs_embeds"), torch.Tensor):
            raise InputError(
                f"the decoder of {type(lens.model).__name__} is given token ids and embeds them "
                "itself, so nothing but ids could be swapped; a full swap needs a model whose "
                "text part is given embeddings, as those with images are"
            )
        if permute:
            given = _misplaced(given)
        swapped = _with_decoder_inputs(lens, scripts[0], given)
    # a misplaced donor is one in which some position is wrong: compare where tokens are real
    real = torch.as_tensor(source.tokens.kind != Kind.PAD, device=logits.device)
    return float((swapped - logits).abs()[real].max())


def path_gap(lens: "LatentModel", run: Run) -> float:
    """How far generating (token by token) and reading (in one forward) lie apart, in logits.

    Needs a run made with `keep_logits=True`.
    """
    if run.logits is None:
        raise InputError("the path gap needs the logits of the run; make it with keep_logits=True")
    with torch.no_grad():
        read = lens.run_with_hooks(run)
    start = run.tokens.prompt_width - 1
    n = run.logits.shape[1]
    real = torch.as_tensor(run.tokens.kind[:, start + 1 : start + 1 + n] != Kind.PAD)
    gap = (read[:, start : start + n] - run.logits).abs().amax(-1)
    return float(gap[real.to(gap.device)].max())


def check_integrity(
    lens: "LatentModel", base: Run, source: Run, *, site: NamesFilter, at: Positions
) -> Integrity:
    """Measure all controls on a pair of runs of equal length, made with `keep_logits=True`."""
    return Integrity(
        sham=sham_difference(lens, base, site=site, at=at)[0],
        full_swap=full_swap_difference(lens, base, source),
        misplaced=full_swap_difference(lens, base, source, permute=True),
        path_gap=path_gap(lens, base),
    )


def _watching(sites: tuple[str, ...]) -> list[tuple[str, "_Watch"]]:
    """Hooks that only look: the sham is compared on the same path, also where a site changes it."""
    return [(site, _Watch()) for site in sites]


class _Watch:
    def __call__(self, act: torch.Tensor, hook: object) -> None:
        return None


Given = tuple[tuple[object, ...], dict[str, object]]


def _decoder_inputs(lens: "LatentModel", script: Script) -> tuple[torch.Tensor, Given]:
    kept: list[Given] = []

    def keep() -> None:
        args, kwargs = lens.nnsight.get(lens.structure.decoder).inputs
        kept.append((args, {k: v for k, v in kwargs.items() if k != "past_key_values"}))

    return lens.read_with(script, keep), kept[0]


def _with_decoder_inputs(lens: "LatentModel", script: Script, given: Given) -> torch.Tensor:
    def put() -> None:
        envoy = lens.nnsight.get(lens.structure.decoder)
        _, kwargs = envoy.inputs
        envoy.inputs = (given[0], {**kwargs, **given[1]})

    return lens.read_with(script, put)


def _misplaced(given: Given) -> Given:
    """The same inputs with the embeddings in the wrong place."""
    args, kwargs = given
    embeds = kwargs["inputs_embeds"]
    assert isinstance(embeds, torch.Tensor)
    rolled = embeds.roll(1, 0) if len(embeds) > 1 else embeds.roll(1, 1)
    return args, {**kwargs, "inputs_embeds": rolled}
