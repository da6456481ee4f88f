"""Base and source inputs with the answers to each: the data every study starts from."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from imaginelens.hooks.errors import InputError

Example = Mapping[str, Any]
Steps = tuple[int, ...] | None
Hypothesis = Callable[[Example, Example, Steps], str]


@dataclass(frozen=True, repr=False)
class Pairs:
    """Pairs of inputs: the base receives states, the source donates them.

    Attributes:
        base, source: examples, `{"images": ..., "text": ...}` each.
        base_answers, source_answers: the right answer to each; the two of a pair differ.
        groups: which pairs belong together (the same image, say); None if each is on its own.
        hypotheses: what each mechanism predicts when the latents at some steps (None: all) of the
            source go into the base: name -> (base, source, steps) -> answer.

    >>> pairs = Pairs(base=[{"text": "a"}], source=[{"text": "b"}], base_answers=["1"],
    ...               source_answers=["2"])
    >>> len(pairs), pairs.source_answers
    (1, ('2',))
    """

    base: Sequence[Example]
    source: Sequence[Example]
    base_answers: Sequence[str]
    source_answers: Sequence[str]
    groups: Sequence[Any] | None = None
    hypotheses: Mapping[str, Hypothesis] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        names = ("base", "source", "base_answers", "source_answers")
        lengths = {name: len(getattr(self, name)) for name in names}
        if self.groups is not None:
            lengths["groups"] = len(self.groups)
        if len(set(lengths.values())) != 1:
            raise InputError(f"the parts of Pairs have unequal lengths {lengths}; make them equal")
        if not len(self.base):
            raise InputError("Pairs is empty; give it at least one pair")
        for name in names:
            object.__setattr__(self, name, tuple(getattr(self, name)))
        for i, (base, source) in enumerate(
            zip(self.base_answers, self.source_answers, strict=True)
        ):
            if base.strip().casefold() == source.strip().casefold():
                raise InputError(
                    f"pair {i} has the answer {base!r} on both sides, so no swap can be told from "
                    "none; leave it out"
                )

    def __len__(self) -> int:
        return len(self.base)

    def __iter__(self) -> Iterator[tuple[Example, Example]]:
        return iter(zip(self.base, self.source, strict=True))

    def __repr__(self) -> str:
        known = f", hypotheses {', '.join(self.hypotheses)}" if self.hypotheses else ""
        first = f"first: {self.base_answers[0]!r} against {self.source_answers[0]!r}"
        return f"Pairs of {len(self)} inputs ({first}{known})"

    def __getitem__(self, index: Any) -> "Pairs":
        """Some of the pairs, by slice; single inputs are `pairs.base[i]` and `pairs.source[i]`."""
        if not isinstance(index, slice):
            raise TypeError(
                f"pairs are taken by slice: pairs[{index}:{index + 1}], or pairs.base[{index}] for "
                "one input"
            )
        start = range(len(self))[index]
        return Pairs(
            [self.base[i] for i in start],
            [self.source[i] for i in start],
            [self.base_answers[i] for i in start],
            [self.source_answers[i] for i in start],
            None if self.groups is None else [self.groups[i] for i in start],
            self.hypotheses,
        )
