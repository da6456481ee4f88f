"""The behavioural probe: can the model answer a derived question from its latents, without image?

Section 4 of the paper (arXiv 2602.22766): a model answers a question about a picture and thinks in
latents; those latents are then given, without the picture, beside another question on the same part
of the picture. Nothing is trained: the model itself is the probe, so what it finds is what it can
use, and what it does not find may still be there: latents that point to a card of the picture
answer nothing without it, though the model reads them.

Two things decide whether the comparison is fair. The span itself changes what a model writes (some
only answer behind one), so here the text-only arm has a span of as many latents, its own. And the
latents of another question, which also come from a picture, are an arm as well: what they answer is
not what *these* latents say.
"""

import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Float, Int
from scipy import stats

from imaginelens.estimates import Estimate, Interval
from imaginelens.hooks import Force, Landing, LatentModel, LatentSpec, Run, Swap, latent
from imaginelens.hooks.errors import InputError
from imaginelens.hooks.inputs import pictures_key
from imaginelens.hooks.metrics import same
from imaginelens.hooks.states import States
from imaginelens.probes.questions import (
    Question,
    questions_needed,
    read_questions,
    smallest_difference,
)

if TYPE_CHECKING:
    import pandas as pd

ARMS = ("latent", "text", "other", "image")


# ---- the result --------------------------------------------------------------------------------


@dataclass(frozen=True, repr=False, eq=False)
class Arm:
    """One way of asking the derived questions.

    Attributes:
        answers: one per question; None where none was found in what was written.
        right: 1 or 0, where an answer that was not found is not right; nan where the question could
            not be asked, because its original run had no latents to give.
        chance: the share that guessing gets right; None where that is not known.
        landings: the proof that latents were put in; empty in arms that have the model's own.
    """

    name: str
    answers: tuple[str | None, ...]
    right: Float[np.ndarray, " question"]
    chance: float | None
    groups: tuple[Any, ...] | None
    landings: tuple[Landing, ...] = ()

    @property
    def n(self) -> int:
        """How many questions were asked."""
        return int((~np.isnan(self.right)).sum())

    @property
    def correct(self) -> int:
        """How many were answered right."""
        return int(np.nansum(self.right))

    @property
    def coverage(self) -> float:
        """The share of those asked in which an answer was found."""
        asked = ~np.isnan(self.right)
        return float(np.mean([self.answers[i] is not None for i in np.flatnonzero(asked)]))

    @property
    def share(self) -> Estimate:
        """The share of right answers, by Wilson's score test, with groups if there are any."""
        return Estimate.share(self.right, name=self.name, chance=self.chance, groups=self.groups)

    def ci(self, *, level: float = 0.95) -> Interval:
        """The exact interval of Clopper and Pearson (1934); where questions are in groups, that of
        `share`, for the exact one takes them as independent."""
        if self.groups is not None:
            return self.share.ci(level=level)
        found = stats.binomtest(self.correct, self.n).proportion_ci(level, method="exact")
        return Interval(float(found.low), float(found.high), level, "Clopper-Pearson")

    def pvalue(self) -> float:
        """The two-sided p-value of "right by chance": exact, binomial; in groups that of `share`.

        Raises:
            InputError: the chance level is not known.
        """
        if self.chance is None:
            raise InputError(
                f"the chance level of the arm {self.name!r} is not known; give chance= to "
                "behavioural_probe, or options to its questions"
            )
        if self.groups is not None:
            return self.share.pvalue()
        return float(stats.binomtest(self.correct, self.n, self.chance).pvalue)

    def __repr__(self) -> str:
        interval = self.ci()
        found = "" if self.coverage == 1 else f", an answer found in {self.coverage:.0%}"
        return (
            f"{self.name}: {self.correct} of {self.n} right, {self.correct / self.n:.3f} "
            f"[{interval.low:.3f}, {interval.high:.3f}]{found}"
        )


@dataclass(frozen=True, repr=False, eq=False)
class Behavioural:
    """What was answered to the derived questions in each arm; `behavioural_probe` makes one.

    Attributes:
        arms: by name.
        questions: as they were asked.
        steps: how many latents each original run fed back.
        shows: the smallest difference between two arms that as many questions show with 80% power;
            nan where chance is not known, or they show none.
    """

    arms: Mapping[str, Arm]
    questions: tuple[Question, ...]
    steps: tuple[int, ...]
    shows: float

    def __getitem__(self, name: str) -> Arm:
        if name not in self.arms:
            raise InputError(f"there is no arm {name!r}; this probe has {', '.join(self.arms)}")
        return self.arms[name]

    def compare(self, one: str = "latent", other: str = "text") -> Estimate:
        """How much more often one arm is right than another, question by question.

        Raises:
            InputError: there is no such arm.
        """
        after, before = self[one], self[other]
        return Estimate.paired(
            after.right, before.right, name=f"{one} - {other}", groups=after.groups
        )

    def summary(self) -> str:
        """What the arms show, in sentences that claim no more."""
        said = [repr(arm) for arm in self.arms.values()]
        if {"latent", "text"} <= set(self.arms):
            said.append(self._of_latents())
        if "image" in self.arms and self["image"].chance is not None:
            seen = self["image"]
            if seen.pvalue() >= 0.05 or seen.correct / seen.n <= (seen.chance or 0):
                said.append(
                    "with the image the questions are not answered above chance either, so that "
                    "they test nothing"
                )
        return "; ".join(said) + "."

    def _of_latents(self) -> str:
        names = [n for n in ("text", "other") if n in self.arms]
        effects = [self.compare("latent", name) for name in names]
        numbers = ", ".join(f"{e.name} {e.value:+.3f} {e.ci()}" for e in effects)
        if all(e.pvalue() < 0.05 and e.value > 0 for e in effects):
            than = " and than other latents" if len(effects) > 1 else ""
            return f"the latents alone answer more than text alone{than} ({numbers})"
        able = "" if np.isnan(self.shows) else f"; these questions show {self.shows:.2f} or more"
        return (
            f"the latents alone are not shown to answer anything ({numbers}{able}), which does not "
            "show that they carry or do nothing: one that points into the picture needs it"
        )

    def to_dataframe(self) -> "pd.DataFrame":
        """One line per question and arm."""
        import pandas as pd

        return pd.DataFrame(
            [
                {
                    "question": i, "arm": name, "probe": q.probe, "answer": q.answer,
                    "found": arm.answers[i], "right": arm.right[i], "steps": self.steps[i],
                    "group": q.group,
                }
                for name, arm in self.arms.items()
                for i, q in enumerate(self.questions)
            ]
        )  # fmt: skip

    def __repr__(self) -> str:
        none = sum(n == 0 for n in self.steps)
        lines = [f"Behavioural probe of {len(self.questions)} questions"]
        lines += [f"  {arm}" for arm in self.arms.values()]
        if {"latent", "text"} <= set(self.arms):
            lines.append(f"  {self._of_latents()}")
        return "\n".join(lines + ([f"  {none} originals fed no latents"] * bool(none)))


# ---- asking ------------------------------------------------------------------------------------


def behavioural_probe(
    lens: LatentModel,
    questions: Any,
    *,
    arms: Sequence[str] = ARMS,
    chance: float | None = None,
    suffix: str = "",
    batch_size: int = 8,
    max_new_tokens: int | None = None,
    seed: int = 0,
) -> Behavioural:
    """Ask derived questions with the latents of the original question, and without the picture.

    How many questions would be needed is said on stderr before anything runs.

    - "latent": no picture; the derived question, then a forced span that is fed the latents of the
      original run.
    - "text": no picture; as many latents in a span of the model's own. The fair "text only": a bare
      question may not even be answered by a model that answers behind its span.
    - "other": as "latent", with the latents of another question, on another picture.
    - "image": the derived question with the picture, as the model answers it. If it does not, the
      questions test nothing.

    Args:
        questions: as for `read_questions`: mappings with `images`, `text` (the original), `probe`
            (the derived question), `answer`, and perhaps `options` and `group`; or a JSONL file.
        chance: the share that guessing gets right; one over the number of options if left out.
        suffix: what is put behind a question with options, such as `lens.family.prompt.suffix`.
        seed: of the pairing of questions with others' latents, and of sampling.

    Raises:
        InputError: the questions are not such, the family opens no spans that could be forced, or
            no original run fed a latent back.

    >>> import imaginelens as il
    >>> lens = il.load("latent-content")
    >>> hunts = lens.task(n=4, seed=0).base
    >>> asked = [{**h, "probe": h["text"], "answer": h["hunt"].answer} for h in hunts]
    >>> behavioural_probe(lens, asked, chance=1 / 6)["latent"]
    latent: 4 of 4 right, 1.000 [0.398, 1.000]
    """
    asked = read_questions(questions, suffix=suffix)
    spec = _checked(lens, arms)
    level = chance if chance is not None else _chance(asked)
    shows = _say_before(asked, level)
    how = {"max_new_tokens": max_new_tokens, "seed": seed}
    source = _Originals.of(lens, asked, batch_size, how)
    groups = tuple(q.group for q in asked)
    own = None if all(g is None for g in groups) else groups
    found: dict[str, Arm] = {
        name: _arm(lens, spec, name, asked, source, level, own, batch_size, how, seed)
        for name in arms
    }
    return Behavioural(found, tuple(asked), tuple(source.steps.tolist()), shows)


@dataclass(frozen=True, eq=False)
class _Originals:
    """The latents of the original runs, (step, d_model) each, and how many there are."""

    latents: list[Any]
    steps: Int[np.ndarray, " question"]

    @staticmethod
    def of(
        lens: LatentModel, asked: Sequence[Question], batch_size: int, how: Mapping[str, Any]
    ) -> "_Originals":
        latents: list[Any] = []
        for start in range(0, len(asked), batch_size):
            run = lens.run([q.example for q in asked[start : start + batch_size]], **how)
            latents += [run.latents[i, run.latent_mask[i]] for i in range(len(run))]
        steps = np.array([len(z) for z in latents])
        if not steps.any():
            raise InputError(
                f"none of the {len(asked)} original questions made the model feed latents back, so "
                "there are none to give; look at lens.run(...).trigger"
            )
        return _Originals(latents, steps)


def _arm(
    lens: LatentModel,
    spec: LatentSpec,
    name: str,
    asked: Sequence[Question],
    source: _Originals,
    chance: float | None,
    groups: tuple[Any, ...] | None,
    batch_size: int,
    how: Mapping[str, Any],
    seed: int,
) -> Arm:
    answers: list[str | None] = [None] * len(asked)
    right = np.full(len(asked), np.nan)
    landings: list[Landing] = []
    donors = _donors(name, asked, source, seed)
    for rows in _batches(donors, source, batch_size, by_steps=name != "image"):
        group = [asked[i] for i in rows]
        if name == "image":
            run = lens.run([{**q.example, "text": q.probe} for q in group], **how)
        else:
            steps = int(source.steps[rows[0]])
            force = Force(steps) if spec.trigger == "always" else Force(steps, at=0)
            given = None if name == "text" else [source.latents[donors[i]] for i in rows]
            run, landing = _without_picture(lens, group, force, given, how)
            landings += landing
        for i, said in zip(rows, _said(run, group), strict=True):
            answers[i], right[i] = said, float(same(said, asked[i].answer))
    if np.isnan(right).sum() > len(asked) - 2:
        raise InputError(
            f"{int((~np.isnan(right)).sum())} of {len(asked)} questions could be asked in the arm "
            f"{name!r}, and an interval needs 2: it takes originals that fed latents back"
            + (", and another picture's of as many steps" if name == "other" else "")
        )
    return Arm(name, tuple(answers), right, chance, groups, tuple(landings))


def _without_picture(
    lens: LatentModel,
    group: Sequence[Question],
    force: Force,
    given: Sequence[Any] | None,
    how: Mapping[str, Any],
) -> tuple[Run, list[Landing]]:
    """The derived questions as text, then a forced span: of these latents, or of its own."""
    texts = [{"text": q.probe} for q in group]
    if given is None:
        return lens.run(texts, latents=force, **how), []
    values = torch.stack(list(given))
    states = States(values, torch.ones(values.shape[:2], dtype=torch.bool))
    with lens.edit(Swap(states), at=latent[: force.steps]) as landing:
        run = lens.run(texts, latents=force, **how)
    return run, [landing]


def _said(run: Run, group: Sequence[Question]) -> list[str | None]:
    found = []
    for row, question in enumerate(group):
        latents = run.tokens.latents(row)
        start = max(run.tokens.prompt_width, int(latents[-1]) + 1 if len(latents) else 0)
        found.append(question.found(run.tokens.text(row, start), run.answers[row]))
    return found


def _donors(name: str, asked: Sequence[Question], source: _Originals, seed: int) -> dict[int, int]:
    """By question, whose latents it is given; those that have none to give are left out."""
    if name == "image":
        return {i: i for i in range(len(asked))}
    with_latents = np.flatnonzero(source.steps)
    if name != "other":
        return {int(i): int(i) for i in with_latents}
    pictures = [pictures_key(q.example) for q in asked]
    generator = np.random.default_rng(seed)
    found = {}
    for i in with_latents.tolist():
        others = [
            j
            for j in with_latents.tolist()
            if pictures[j] != pictures[i] and source.steps[j] == source.steps[i]
        ]
        if others:
            found[i] = int(generator.choice(others))
    return found


def _batches(
    donors: Mapping[int, int], source: _Originals, batch_size: int, *, by_steps: bool
) -> Iterator[list[int]]:
    """Questions that are asked together: those with as many latents."""
    rows = list(donors)
    counts = {int(source.steps[i]) for i in rows} if by_steps else {-1}
    for count in sorted(counts):
        alike = [i for i in rows if not by_steps or source.steps[i] == count]
        for start in range(0, len(alike), batch_size):
            yield alike[start : start + batch_size]


def _checked(lens: LatentModel, arms: Sequence[str]) -> LatentSpec:
    unknown = [name for name in arms if name not in ARMS]
    if unknown or not arms or len(set(arms)) < len(arms):
        raise InputError(f"the arms are {tuple(arms)}; choose each once, of {', '.join(ARMS)}")
    spec = lens.spec
    if spec is None or spec.trigger == "prompt" or spec.feeds == "embedding":
        name = "no family" if lens.family is None else lens.family.name
        raise InputError(
            f"{name} opens no spans of latents that could be forced behind another question; use a "
            "model that feeds latents back by itself"
        )
    return spec


def _chance(asked: Sequence[Question]) -> float | None:
    sizes = {len(q.options) for q in asked}
    return None if len(sizes) > 1 or sizes == {0} else 1 / sizes.pop()


def _say_before(asked: Sequence[Question], chance: float | None) -> float:
    """Say what as many questions can show, before they are asked."""
    n = len(asked)
    if chance is None:
        print(
            f"imaginelens: {n} questions, and their chance level is not known; give chance= to "
            "plan how many are needed",
            file=sys.stderr,
        )
        return float("nan")
    shows = smallest_difference(n, chance=chance)
    least = "none" if np.isnan(shows) else f"one of {shows:.2f} or more"
    wanted = min(0.2, (1 - chance) / 2)
    print(
        f"imaginelens: of the differences between two arms, {n} questions show {least} with 80% "
        f"power; one of {wanted:.2f} takes {questions_needed(difference=wanted, chance=chance)}",
        file=sys.stderr,
    )
    return shows
