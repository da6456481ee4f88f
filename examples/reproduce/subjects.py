"""What is measured: a shipped organism, or a model and its data as a config names them."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

import imaginelens as il
from imaginelens.hooks.errors import InputError

HUNT = "treasure hunt"
QUESTIONS = "questions.jsonl"


@dataclass(frozen=True)
class Settings:
    """Choices that the paper does not tell; all of them are ours.

    Attributes:
        tau: what all latents are set to: "mean", the mean latent of other examples, or "random", a
            random direction of their mean norm.
        sigma: noise, in standard deviations of each dimension over other examples' latents.
        mu: "near zero": every component of the latents.
        draws: of the noise.
        batch_size, max_new_tokens: how replies are generated; greedily. None is the checkpoint's.
    """

    tau: tuple[str, ...] = ("mean", "random")
    sigma: tuple[float, ...] = (1.0,)
    mu: tuple[float, ...] = (0.0, 0.001)
    draws: int = 1
    batch_size: int = 32
    max_new_tokens: int | None = None


@dataclass(frozen=True, kw_only=True)
class Subject:
    """A model with its questions.

    Attributes:
        name: short, for files.
        heading: what its column is headed by.
        data: the folder of each benchmark; none of an organism, which draws its own hunts.
        questions: a JSONL file of derived questions, for the behavioural probe.
        rewriter: turns (question, imagination, answer) into imagination that misleads.
    """

    name: str
    heading: str
    lens: Any
    settings: Settings = Settings()
    data: dict[str, Path] = field(default_factory=dict)
    questions: Path | None = None
    rewriter: Any = None

    @property
    def organism(self) -> bool:
        """Whether it is a shipped one, with exact counterfactuals."""
        return isinstance(self.lens, il.Organism)

    def benchmarks(self, wanted: Sequence[str]) -> tuple[str, ...]:
        """Those of the benchmarks that it has data of; the hunt of an organism.

        Raises:
            InputError: it has none of them.
        """
        if self.organism:
            return (HUNT,)
        found = tuple(name for name in wanted if name in self.data)
        if not found:
            raise InputError(
                f"{self.name} names no folder of {' or '.join(wanted)}; add one under [data] of "
                "its config"
            )
        return found

    def pairs(self, benchmark: str, *, n: int, seed: int) -> il.Pairs:
        """n questions of a benchmark, drawn uniformly; all of them if n is 0. Each is a base, its
        source is another one with another answer.

        Raises:
            InputError: the folder cannot be read, or its questions are not as they should be.
        """
        if self.organism:
            found: il.Pairs = self.lens.task(n=n, seed=seed)
            return found
        every = read_folder(benchmark, self.data[benchmark], seed=seed)
        if not n or n >= len(every):
            return every
        rows = np.random.default_rng(seed).choice(len(every), n, replace=False)
        return every.select(sorted(rows.tolist()))


def organism(name: str) -> Subject:
    """A shipped organism as a subject.

    >>> organism("latent-content").heading
    'organism latent-content (0.2 M parameters)'
    """
    lens = il.load(name)
    millions = sum(weight.numel() for weight in lens.model.parameters()) / 1e6
    heading = f"organism {name} ({millions:.1f} M parameters)"
    return Subject(name=name, heading=heading, lens=lens)


def read_folder(benchmark: str, folder: Path, *, seed: int = 0) -> il.Pairs:
    """The questions of a benchmark: of its public layout, as `examples.capimagine.evaluate` reads
    it, or of a `questions.jsonl`, with a line for each question, `{"images": "a.png", "text":
    "...", "answer": "B"}` and perhaps `"split": "attribute"`.

    All pictures are in memory: those of HR-Bench take some GB.

    Raises:
        InputError: there is neither, or it cannot be read.
    """
    file = folder / QUESTIONS
    if file.is_file():
        return il.Pairs.from_jsonl(file, seed=seed)
    from examples.capimagine.benchmark_layouts import BENCHMARKS, Question, read

    if benchmark not in BENCHMARKS or not folder.is_dir():
        raise InputError(
            f"{str(folder)!r} holds no {QUESTIONS}; write one with a line for each question of "
            f'{benchmark}, {{"images": "a.png", "text": "...", "answer": "B"}}'
        )
    examples, groups, refused = list[dict[str, Any]](), list[str](), 0
    opened = dict[Any, Any]()
    for question in read(benchmark, folder):
        if not isinstance(question, Question):
            refused += 1
            continue
        if question.pictures not in opened:  # questions on one picture share it
            opened[question.pictures] = question.example()["images"]
        examples.append({"images": opened[question.pictures], "text": question.text,
                         "answer": question.answer, "split": question.split})  # fmt: skip
        groups.append(question.group or question.id)
    if refused:
        print(f"reproduce: {refused} rows of {benchmark} are refused", file=sys.stderr)
    return il.Pairs.from_examples(examples, groups=groups, seed=seed)
