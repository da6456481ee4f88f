"""The verbs: patch states of a source run into a base run, ablate them, swap latents."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

import torch
from jaxtyping import Float

from imaginelens.hooks.edits import AddNoise, Edit, Noise, Resample, Shuffle, Swap
from imaginelens.hooks.entries import EditEntry
from imaginelens.hooks.errors import DonorError, InputError
from imaginelens.hooks.landing import Landing
from imaginelens.hooks.metrics import Metric, Readout, Targets, targets_of
from imaginelens.hooks.names import NamesFilter
from imaginelens.hooks.positions import Positions
from imaginelens.hooks.recorded import Latents
from imaginelens.hooks.run import Run
from imaginelens.hooks.textedits import TextEntry, edit_entry

if TYPE_CHECKING:
    from imaginelens.hooks.model import LatentModel

Context = Literal["free", "fixed"]


@dataclass(frozen=True)
class PatchResult:
    """What an edit did to the answer.

    Attributes:
        before, after: the metric without and with the edit, one value per example; nan where no
            answer was found.
        answers_before, answers_after: what was answered.
        texts_before, texts_after: what was written (in fixed context, the same).
        landing: the proof of the edit.
        parse_coverage: share of examples, over all draws, whose answer was found with the edit.
        run: the edited generation, in free context. Of a random edit with several draws, `after`
            is the mean (nan if an answer is missing in any), the rest is the first draw's.
    """

    before: Float[torch.Tensor, " example"]
    after: Float[torch.Tensor, " example"]
    answers_before: tuple[str | None, ...]
    answers_after: tuple[str | None, ...]
    texts_before: tuple[str, ...]
    texts_after: tuple[str, ...]
    landing: Landing
    metric: Metric
    context: Context
    parse_coverage: float
    run: Run | None = None

    @property
    def effect(self) -> Float[torch.Tensor, " example"]:
        """after - before, in the metric's unit."""
        return self.after - self.before

    @property
    def texts(self) -> tuple[tuple[str, str], ...]:
        """What was written, before and after, per example."""
        return tuple(zip(self.texts_before, self.texts_after, strict=True))

    def __repr__(self) -> str:
        n = len(self.before)
        lines = [
            f"PatchResult of {n} example{'s' * (n != 1)}, {self.context} context: "
            f"mean {self.metric.name} {_mean(self.before):.4g} -> {_mean(self.after):.4g} "
            f"({self.metric.unit})",
            f"  {self.landing.edit} at {self.landing.at}: {len(self.landing.cells)} cells in "
            f"{len(self.landing.rows)} rows, relative change {self.landing.relative_change:.3g}",
        ]
        pairs = zip(self.answers_before, self.answers_after, strict=True)
        lines += [f"  {i}: {b!r} -> {a!r}" for i, (b, a) in zip(range(4), pairs, strict=False)]
        return "\n".join(lines + (["  ..."] if n > 4 else []))


def check_arguments(*, edit: Any = None, at: Any = None, metric: Any = None) -> None:
    """Refuse what is no edit, selector or metric before anything runs."""
    for what, value, wanted, example in (
        ("edit", edit, Edit, "il.Zero() or il.Swap(donor)"),
        ("at", at, Positions, "il.latent or il.image[0]"),
        ("metric", metric, Metric, "il.logit_diff or il.log_prob"),
    ):
        if value is not None and not isinstance(value, wanted):
            raise InputError(f"{what} is {value!r}, expected something like {example}")


def patch(
    lens: "LatentModel",
    *,
    base: Any,
    source: Any,
    site: NamesFilter,
    at: Positions,
    metric: Metric,
    context: Context,
    base_answers: str | Sequence[str] | None = None,
    source_answers: str | Sequence[str | None] | None = None,
    heads: Sequence[int] | None = None,
    readers: Positions | None = None,
) -> PatchResult:
    """Run the base with the source's states at some sites and positions (denoising)."""
    check_arguments(at=at, metric=metric)
    base_run = _as_run(lens, base)
    sites = lens.registry.match(site)
    donor: Run | Latents
    if isinstance(source, Latents):  # what its samples answered is not in a recording
        donor, answers = source, _given_answers(source_answers, len(base_run))
    else:
        donor = donor_run(lens, source, sites, at, context)
        answers = _answers(source_answers, donor)
    return edited(
        lens,
        base_run,
        Swap(donor),
        sites,
        at,
        metric,
        context,
        base_answers=_answers(base_answers, base_run),
        source_answers=answers,
        heads=heads,
        readers=readers,
    )


def ablate(
    lens: "LatentModel",
    inputs: Any,
    edit: Edit,
    *,
    at: Positions,
    site: NamesFilter,
    metric: Metric,
    context: Context,
    answers: str | Sequence[str] | None = None,
    heads: Sequence[int] | None = None,
    readers: Positions | None = None,
) -> PatchResult:
    """Run one input, or a batch, with its states replaced by an edit.

    Random edits are drawn `edit.draws` times and their metric is averaged.
    """
    check_arguments(edit=edit, at=at, metric=metric)
    run = _as_run(lens, inputs)
    sites = lens.registry.match(site)
    if isinstance(edit, Shuffle) and edit.run is None:
        edit = replace(edit, run=donor_run(lens, run, sites, at, context))
    wanted = _answers(answers, run)
    draws = edit.draws if isinstance(edit, AddNoise | Noise | Resample) else 1
    results = [
        edited(
            lens, run, edit, sites, at, metric, context,
            base_answers=wanted, source_answers=[None] * len(run), draw=draw, heads=heads,
            readers=readers,
        )
        for draw in range(draws)
    ]  # fmt: skip
    found = sum(a is not None for r in results for a in r.answers_after)
    coverage = found / (len(run) * len(results))
    mean = torch.stack([r.after for r in results]).mean(0)
    return replace(results[0], after=mean, parse_coverage=coverage)


def edited(
    lens: "LatentModel",
    run: Run,
    edit: Edit,
    sites: Sequence[str],
    at: Positions,
    metric: Metric,
    context: Context,
    *,
    base_answers: Sequence[str | None],
    source_answers: Sequence[str | None],
    draw: int = 0,
    heads: Sequence[int] | None = None,
    readers: Positions | None = None,
    targets: Targets | None = None,
    compared_to: Readout | None = None,
) -> PatchResult:
    """Measure a metric on a run without and with an edit.

    In free context the edited run is generated anew; in fixed context its text stays as it was.

    Args:
        targets: the answers' tokens, where they were found in another run.
        compared_to: the readout that `il.kl` and `il.flip` compare with; this run's own if None.
    """
    if context not in ("free", "fixed"):
        raise InputError(f"context is {context!r}; choose 'free' or 'fixed'")
    if targets is None and run.parse_coverage == 0:
        raise InputError(
            f"no answer was found in what the unedited run wrote ({run.texts[0][:60]!r}); "
            "pass answer=il.answers.boxed, .letter, .after('...') or a callable to il.load"
        )
    if len(source_answers) not in (1, len(run)):
        raise InputError(
            f"{len(run)} base inputs and {len(source_answers)} source inputs do not pair up; give "
            "as many sources as bases, or one for all"
        )
    if len(source_answers) != len(run):
        source_answers = list(source_answers) * len(run)
    if targets is None:
        targets = targets_of(run, base_answers, source_answers, lens.encode)
    metric.check(targets)
    before = lens.read_answer(run, targets, unedited=compared_to, free=context == "free")
    compared = before if compared_to is None else compared_to
    entry = edit_entry(edit, at, sites, draw=draw, heads=heads, readers=readers)
    new: Run | None = None
    if isinstance(entry, TextEntry):
        entry.begin()
        new = lens.respelled(run, [entry], context=context)
        entry.judge(len(run), str(run.trigger))
        after = lens.read_answer(new, targets, unedited=compared, free=context == "free")
    elif context == "fixed":
        with lens.registry.scope([entry]), _judged(lens, run):
            after = lens.read_answer(run, targets, unedited=compared)
    else:
        with lens.registry.scope([entry]):
            new = lens.rerun(run)
        after = _read_again(lens, new, targets, compared, entry)
    return PatchResult(
        before=metric(before),
        after=metric(after),
        answers_before=before.answers,
        answers_after=after.answers,
        texts_before=tuple(run.texts),
        texts_after=tuple((new or run).texts),
        landing=entry.landing,
        metric=metric,
        context=context,
        parse_coverage=sum(a is not None for a in after.answers) / len(run),
        run=new,
    )


def _read_again(
    lens: "LatentModel", run: Run, targets: Targets, before: Readout, entry: EditEntry
) -> Readout:
    """Read the answer of a run made under an edit. Its latents already are what the edit made of
    them; edits at modules act once more, on a landing of their own."""
    sites = tuple(s for s in entry.sites if s != "hook_latent")
    again = EditEntry(
        sites, entry.edit, entry.at, Landing("", "", sites), entry.draw, entry.heads, entry.readers
    )
    with lens.registry.scope([again] if sites else []):
        return lens.read_answer(run, targets, unedited=before, free=True)


@contextmanager
def _judged(lens: "LatentModel", run: Run) -> Iterator[None]:
    lens.registry.begin()
    yield
    lens.registry.judge(len(run), str(run.trigger), run.acted)


def donor_run(
    lens: "LatentModel", source: Any, sites: Sequence[str], at: Positions, context: Context
) -> Run:
    """The source's run, with its states captured on the path the base will take."""
    modules = [s for s in sites if s != "hook_latent"]
    if not modules:
        return _as_run(lens, source)
    if context == "fixed":
        run = _as_run(lens, source)
        with torch.no_grad():  # or the states would hold a whole forward in memory
            _, cache = lens.run_with_cache(run, names_filter=modules)
        return replace(run, cache=cache)
    if isinstance(source, Run):
        try:
            for module in modules:
                source.states(module, at)
            return source
        except DonorError:  # not captured there: run it again, and capture
            pass
        return lens.rerun(source, names_filter=modules, positions=(at,))
    return lens.run(source, names_filter=modules, positions=(at,))


def _as_run(lens: "LatentModel", inputs: Any) -> Run:
    return inputs if isinstance(inputs, Run) else lens.run(inputs)


def _answers(given: str | Sequence[str | None] | None, run: Run) -> list[str | None]:
    """The answers to speak of: those given, or what the unedited run answered."""
    if given is None:
        return list(run.answers)
    answers: list[str | None] = [given] if isinstance(given, str) else list(given)
    if len(answers) != len(run):
        raise InputError(
            f"{len(answers)} answers were given for {len(run)} examples; give one each"
        )
    return answers


def _given_answers(given: str | Sequence[str | None] | None, n: int) -> list[str | None]:
    """The answers of sources that are not run: those given, or unknown."""
    return [given] * n if given is None or isinstance(given, str) else list(given)


def _name(edit: Edit) -> str:
    return type(edit).__name__


def _mean(values: torch.Tensor) -> float:
    return float(values.double().nanmean())
