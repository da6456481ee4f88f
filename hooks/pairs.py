"""Base and source inputs with the answers to each: the data every study starts from."""

from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, SupportsIndex

import numpy as np

from imaginelens.hooks import reading, saving
from imaginelens.hooks.errors import InputError
from imaginelens.hooks.inputs import Example as Example
from imaginelens.hooks.inputs import InputEdit, SwapInstance, edit_inputs
from imaginelens.hooks.partners import draw_partners
from imaginelens.hooks.reading import Columns, Row

Steps = tuple[int, ...] | None
Hypothesis = Callable[[Example, Example, Steps], str]
AnswerOf = Callable[[Example, Example], str | None]


@dataclass(frozen=True, repr=False)
class Pairs:
    """Pairs of inputs: the base receives states, the source donates them.

    Attributes:
        base, source: examples, `{"images": ..., "text": ...}` each.
        base_answers, source_answers: the right answer to each; the two of a pair differ. A source
            answer that is not known is None, and metrics that need it say so.
        groups: which pairs belong together (the same image, say); None if each is on its own.
        hypotheses: what each mechanism predicts when the latents at some steps (None: all) of the
            source go into the base: name -> (base, source, steps) -> answer.
        history: how the sources were made, one line for each edit, oldest first.

    Raises:
        InputError: the parts are empty, of unequal lengths or of wrong types, or a pair has one
            answer on both sides.

    >>> pairs = Pairs(base=[{"text": "a"}], source=[{"text": "b"}], base_answers=["1"],
    ...               source_answers=["2"])
    >>> len(pairs), pairs.source_answers
    (1, ('2',))
    """

    base: Sequence[Example]
    source: Sequence[Example]
    base_answers: Sequence[str]
    source_answers: Sequence[str | None]
    groups: Sequence[Any] | None = None
    hypotheses: Mapping[str, Hypothesis] = field(default_factory=dict, repr=False)
    history: Sequence[str] = ()

    def __post_init__(self) -> None:
        names = ["base", "source", "base_answers", "source_answers"]
        names += ["groups"] if self.groups is not None else []
        lengths = {name: len(getattr(self, name)) for name in names}
        if len(set(lengths.values())) != 1:
            raise InputError(f"the parts of Pairs have unequal lengths {lengths}; make them equal")
        if not len(self.base):
            raise InputError("Pairs is empty; give it at least one pair")
        for name in (*names, "history"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        for i, (base, source) in enumerate(
            zip(self.base_answers, self.source_answers, strict=True)
        ):
            check_answers(i, base, source)
        _check_groups(self.groups)

    # ---- from data -------------------------------------------------------------------------

    @classmethod
    def from_examples(
        cls,
        examples: Sequence[Example],
        *,
        answers: Sequence[str] | None = None,
        groups: Sequence[Any] | np.ndarray | Literal["image"] | None = None,
        seed: int = 0,
        edit: InputEdit | None = None,
    ) -> "Pairs":
        """Make pairs of single inputs: each is a base, and its source is another one.

        The other one is drawn by the seed, has another answer and, where there are groups, is of
        another group; a pair has its base's group. With an `edit`, the source is the base edited
        with what the other one has; edits that need no other input draw none.

        Args:
            examples: `{"images": ..., "text": ...}`, images as PIL images or paths.
            answers: the right answer to each; each example's own "answer" if left out.
            groups: one id for each example, or "image": equal pictures are one group; if left out,
                each example's own "group", where they have one.
            edit: `SwapInstance()` if left out.

        Raises:
            InputError: an example is not as above, or has no possible partner; it is named.

        >>> examples = [{"text": "1 + 1", "answer": "2"}, {"text": "1 + 2", "answer": "3"}]
        >>> Pairs.from_examples(examples)
        Pairs of 2 inputs (first: '2' against '3'; do: SwapInstance(), seed 0)
        """
        _check_listed("examples", examples)
        by_image = isinstance(groups, str) and groups == "image"
        for name, values in (("answers", answers), ("groups", None if by_image else groups)):
            if values is not None:
                _check_listed(name, values, len(examples))
        columns = Columns("images", group="image" if by_image else None)
        rows = []
        for i, example in enumerate(examples):
            if not isinstance(example, Mapping):
                raise InputError(
                    f"example {i} is {str(example)[:60]!r}, expected {{'images': ..., 'text': str}}"
                )
            given = {} if answers is None else {"answer": answers[i]}
            raw = {"images": None, **example, **given}
            rows.append(reading.read_row(raw, columns, Path(), f"example {i}"))
        if groups is not None and not by_image:
            rows = [replace(row, group=group) for row, group in zip(rows, groups, strict=True)]
        return cls._from_rows(rows, seed=seed, edit=edit)

    @classmethod
    def from_jsonl(
        cls,
        path: str | Path,
        *,
        images: str = "images",
        text: str | None = None,
        answer: str = "answer",
        group: str | None = None,
        source: str | None = "source",
        pair: str | None = None,
        seed: int = 0,
        edit: InputEdit | None = None,
    ) -> "Pairs":
        """Read a file of JSON lines, such as `{"images": "a.png", "text": "...", "answer": "3"}`.

        A line may bring its source: `"source": {"images": "b.png", "text": "...", "answer": "4"}`.
        Otherwise two lines with the same value under the key `pair` are base and source, or, where
        there is none, sources are drawn as in `from_examples`. Other keys come along.

        Args:
            images: the key of the paths, one or a list, from the file's folder; null for no image.
            text: the key of the question; "text" or "question" if left out.
            group: the key of the group ids, or "image": equal pictures are one group; if left out,
                "group", where the lines have it.
            source: the key of the source; None if lines have something else under "source".

        Raises:
            InputError: a line cannot be read; it is named by its number.
        """
        file = Path(path)
        columns = Columns(images, text, answer, group, source)
        return cls._read(
            reading.jsonl_rows(file), columns, file.parent, pair=pair, seed=seed, edit=edit
        )

    @classmethod
    def from_folder(
        cls,
        path: str | Path,
        *,
        text: str | None = None,
        answer: str = "answer",
        group: str | None = None,
        pair: str | None = None,
        seed: int = 0,
        edit: InputEdit | None = None,
    ) -> "Pairs":
        """Read a folder of images in the layout of Hugging Face's ImageFolder.

        Its metadata.jsonl or metadata.csv has a row for each example, with the path of its image
        under "file_name" (JSON lines: a list of them under "file_names") and other columns as in
        `from_jsonl`.

        Raises:
            InputError: there is no such file, or a row cannot be read; it is named by its number.
        """
        folder = Path(path)
        columns = Columns("images", text, answer, group)
        return cls._read(
            reading.folder_rows(folder), columns, folder, pair=pair, seed=seed, edit=edit
        )

    @classmethod
    def from_dataset(
        cls,
        dataset: Any,
        *,
        images: str = "image",
        text: str = "question",
        answer: str = "answer",
        group: str | None = None,
        source: str | Mapping[str, str] | None = None,
        pair: str | None = None,
        limit: int | None = None,
        seed: int = 0,
        edit: InputEdit | None = None,
    ) -> "Pairs":
        """Read a split of a Hugging Face dataset, or anything else that gives dicts by number.

        Rows are read one at a time, and of a row only once: a stream is not run through. Where a
        row is base and source in one, `source` says which columns are the source's.

        Args:
            images, text, answer: the columns; images are pictures, lists of them, or undecoded.
            group, pair: as in `from_jsonl`.
            source: the source's columns, as `{"images": "image_after", "answer": "answer_after"}`;
                those that are not named are shared with the base. Or the name of one column with
                an object, as in `from_jsonl`. If left out, sources are drawn.
            limit: read the first so many rows only, as a stream needs; shuffle a sorted dataset
                first.

        Raises:
            InputError: there are no rows, or some cannot be read or are no pair; they are named by
                their numbers, from 0.

        >>> rows = [{"image": None, "question": "1 + 1", "answer": "2"},
        ...         {"image": None, "question": "1 + 2", "answer": "3"}]
        >>> Pairs.from_dataset(rows).source_answers
        ('3', '2')
        >>> rows = [{"image": None, "question": "1 + 1", "answer": "2", "ask": "1 + 2", "say": "3"}]
        >>> Pairs.from_dataset(rows, source={"text": "ask", "answer": "say"}).source_answers
        ('3',)
        """
        one = source if isinstance(source, str) else None
        columns = Columns(images, text, answer, group, one)
        rows = reading.dataset_rows(dataset, limit)
        if isinstance(source, Mapping):
            columns = replace(columns, source=reading.BESIDE)
            rows = reading.sources_beside(rows, columns, source)
        return cls._read(rows, columns, Path(), pair=pair, seed=seed, edit=edit)

    @classmethod
    def _read(
        cls,
        found: Iterable[tuple[str, dict[str, Any]]],
        columns: Columns,
        folder: Path,
        *,
        pair: str | None,
        seed: int,
        edit: InputEdit | None,
    ) -> "Pairs":
        rows = reading.read_rows(found, columns, folder)
        if pair is not None:
            rows = reading.pair_up(rows, pair)
        return cls._from_rows(rows, seed=seed, edit=edit)

    @classmethod
    def _from_rows(cls, rows: Sequence[Row], *, seed: int, edit: InputEdit | None) -> "Pairs":
        reading.check_alike(rows)
        examples = [row.example for row in rows]
        answers = [row.answer for row in rows if row.answer is not None]
        groups = None if rows[0].group is None else [row.group for row in rows]
        sources = [row.source for row in rows if row.source is not None]
        if sources:
            others = [row.example for row in sources]
            theirs = [row.answer for row in sources]
            pairs = cls(examples, others, answers, theirs, groups, history=rows[0].history)
            return pairs if edit is None else pairs.do(edit, seed=seed)
        edit = edit or SwapInstance()
        if edit.uses_other:
            _check_groups(groups)
            partners = draw_partners(answers, groups, seed=seed)
            others, theirs = [examples[k] for k in partners], [answers[k] for k in partners]
        else:
            others, theirs = examples, [None] * len(rows)
        return cls(examples, others, answers, theirs, groups).do(edit, seed=seed)

    # ---- new pairs of these ----------------------------------------------------------------

    def do(
        self,
        edit: InputEdit,
        *,
        seed: int = 0,
        answers: Sequence[str | None] | AnswerOf | None = None,
    ) -> "Pairs":
        """Make the sources anew: each is its base with this edit, do(X); the bases stay.

        An edit that needs another input finds there the present source. What was done is kept in
        `.history`, which begins anew where the present sources are not used. Hypotheses read whole
        examples, so only `SwapInstance` keeps them.

        Args:
            seed: of random edits; an example gets the same draw in whatever pairs it is.
            answers: the right answers to the edited inputs, or `(base, source) -> answer`; None
                where it is not known. If left out, they are not known, but for `SwapInstance`.

        Raises:
            InputError: an input cannot be edited, or an answer is the base's own.
            EditTouchedNothing: no input was changed.

        >>> from PIL import Image
        >>> from imaginelens.hooks import BlankImage
        >>> images = [Image.new("RGB", (8, 8), name) for name in ("red", "blue")]
        >>> examples = [{"images": image, "text": "colour?"} for image in images]
        >>> pairs = Pairs.from_examples(examples, answers=["red", "blue"])
        >>> pairs.do(BlankImage((0, 0, 0)))
        Pairs of 2 inputs (first: 'red' against unknown; do: BlankImage(colour=(0, 0, 0)), seed 0)
        """
        sources, line = edit_inputs(edit, self.base, self.source, seed=seed)
        whole = isinstance(edit, SwapInstance)
        found: Sequence[str | None]
        if callable(answers):
            found = [answers(b, s) for b, s in zip(self.base, sources, strict=True)]
        elif answers is not None:
            _check_listed("answers", answers, len(self))
            found = answers
        else:
            found = self.source_answers if whole else [None] * len(self)
        return replace(
            self,
            source=sources,
            source_answers=found,
            hypotheses=self.hypotheses if whole else {},
            history=(*(self.history if edit.uses_other else ()), line),
        )

    def select(self, rows: Iterable[SupportsIndex]) -> "Pairs":
        """Take some of the pairs by number, in this order; of a mask, `np.flatnonzero(mask)`.

        Raises:
            InputError: a number is no pair's, or there is none.

        >>> pairs = Pairs([{"text": c} for c in "abc"], [{"text": "d"}] * 3, "123", "456")
        >>> pairs.select([2, 0]).base_answers
        ('3', '1')
        """
        numbers = list(rows)
        for row in numbers:
            if isinstance(row, bool | np.bool_) or row not in range(-len(self), len(self)):
                raise InputError(
                    f"select got {row!r}, expected numbers of pairs 0..{len(self) - 1}"
                )
        parts = ("base", "source", "base_answers", "source_answers", "groups")
        taken: dict[str, Any] = {
            name: [getattr(self, name)[row] for row in numbers]
            for name in parts
            if getattr(self, name) is not None
        }
        return replace(self, **taken)

    def save_jsonl(self, folder: str | Path) -> Path:
        """Write the pairs into a folder, for `from_jsonl` to read: pairs.jsonl and images/*.png.

        Pictures are written in RGB, as a model sees them, each once. Returns the path of the lines.

        Raises:
            InputError: the folder has pairs already, or JSON cannot hold what the examples have.
        """
        return saving.save_jsonl(self, Path(folder))

    def __len__(self) -> int:
        return len(self.base)

    def __iter__(self) -> Iterator[tuple[Example, Example]]:
        return iter(zip(self.base, self.source, strict=True))

    def __repr__(self) -> str:
        known = f", hypotheses {', '.join(self.hypotheses)}" if self.hypotheses else ""
        done = f"; do: {'; '.join(self.history)}" if self.history else ""
        source = self.source_answers[0]
        against = "unknown" if source is None else repr(source)
        first = f"first: {self.base_answers[0]!r} against {against}"
        return f"Pairs of {len(self)} inputs ({first}{known}{done})"

    def __getitem__(self, index: Any) -> "Pairs":
        """Some of the pairs, by slice; single inputs are `pairs.base[i]` and `pairs.source[i]`."""
        if not isinstance(index, slice):
            raise TypeError(
                f"pairs are taken by slice: pairs[{index}:{index + 1}], or pairs.base[{index}] for "
                "one input"
            )
        return self.select(range(len(self))[index])


def _check_listed(name: str, values: Any, wanted: int | None = None) -> None:
    """Refuse what is no list, or not as long as the examples."""
    if isinstance(values, str | Mapping) or not hasattr(values, "__len__"):
        raise InputError(
            f"{name} is a {type(values).__name__}, expected a list, one for each input"
        )
    if wanted is not None and len(values) != wanted:
        raise InputError(f"{len(values)} {name} were given for {wanted} inputs; give one each")


def check_answers(i: int, base: Any, source: Any) -> None:
    """Refuse a pair whose answers are no text, or equal."""
    for side, answer in (("base", base), ("source", source)):
        if not isinstance(answer, str) and not (answer is None and side == "source"):
            raise InputError(
                f"the {side} answer of pair {i} is {answer!r}, expected text; convert it with "
                "str(...), or leave the pair out"
            )
    if source is not None and base.strip().casefold() == source.strip().casefold():
        raise InputError(
            f"pair {i} has the answer {base!r} on both sides, so no swap can be told from "
            "none; leave it out"
        )


def _check_groups(groups: Sequence[Any] | None) -> None:
    for i, group in enumerate(groups or ()):
        if not isinstance(group, Hashable) or group is None or group != group:
            raise InputError(
                f"the group of pair {i} is {group!r}, expected a number or a name; give every pair "
                "one, or groups=None"
            )
