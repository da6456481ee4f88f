"""The questions of the behavioural probe: how many are needed, and reading them from a file."""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from imaginelens.estimates import power_effect, sample_size
from imaginelens.hooks.answers import letter
from imaginelens.hooks.errors import InputError, brief, quoted
from imaginelens.hooks.inputs import pictures_of
from imaginelens.hooks.metrics import same

FIELDS = ("images", "text", "probe", "answer")
_LETTERS = "ABCDEFGH"


def questions_needed(
    *, difference: float, chance: float = 0.25, power: float = 0.8, alpha: float = 0.05
) -> int:
    """How many questions show that one arm is right more often than another, which guesses.

    The arms are taken to be right independently of each other, so that `p (1 - q) + q (1 - p)` of
    the questions are discordant, with q the chance level and p that plus the difference; the test
    is that of `Estimate.paired`.

    Args:
        difference: between the shares of right answers: 0.2 for 20 points.
        chance: the share that guessing gets right, 1/4 for four options.

    Raises:
        InputError: chance and difference are no shares.

    >>> questions_needed(difference=0.2)
    92
    """
    return sample_size(
        difference=difference,
        discordance=_discordance(difference, chance),
        power=power,
        alpha=alpha,
    )


def smallest_difference(
    n: int, *, chance: float = 0.25, power: float = 0.8, alpha: float = 0.05
) -> float:
    """The smallest difference between two arms that n questions show, as `questions_needed`; nan if
    they show none.

    >>> round(smallest_difference(30), 2)
    0.37
    """
    steps = np.arange(0.005, 1 - chance + 1e-9, 0.005)
    enough = [
        power_effect(
            n, difference=float(d), discordance=_discordance(float(d), chance), alpha=alpha
        )
        >= power
        for d in steps
    ]
    short = np.flatnonzero(~np.array(enough))
    first = 0 if not len(short) else int(short[-1]) + 1
    return round(float(steps[first]), 3) if first < len(steps) else float("nan")


def _discordance(difference: float, chance: float) -> float:
    if not (0 < chance < 1 and 0 < difference <= 1 - chance + 1e-9):
        raise InputError(
            f"a difference of {difference:g} above a chance level of {chance:g} is none between "
            "two shares; give both between 0 and 1, such as difference=0.2, chance=0.25"
        )
    better = min(1.0, chance + difference)
    return better * (1 - chance) + chance * (1 - better)


# ---- what is asked -----------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Question:
    """One question, and the one derived from it.

    Attributes:
        example: the original question with its picture, `{"images": ..., "text": ...}`.
        probe: the derived question, with its options written out if it has any.
        answer: what is right: one of the options, if there are any.
        group: questions on one picture, say, depend on each other.
    """

    example: Mapping[str, Any]
    probe: str
    answer: str
    options: tuple[str, ...] = ()
    group: Any = None

    def found(self, text: str, answer: str | None) -> str | None:
        """The answer in what was written: with options, one of them, by its text or its letter.

        Args:
            answer: what the model's own answer finder found.
        """
        if not self.options:
            return answer
        for said in (answer or "", text):
            spelled = [option for option in self.options if same(option, said)]
            if spelled:
                return spelled[0]
            where = letter(said)
            if where is not None:
                number = _LETTERS.find(said[slice(*where)])
                return self.options[number] if number < len(self.options) else None
        return None


def read_questions(questions: Any, *, suffix: str = "") -> list[Question]:
    """Check questions, given as mappings or as a JSONL file of them.

    Args:
        questions: each with `images` (in a file: a path beside it, or a list of them), `text`,
            `probe`, `answer`, and if there are any `options` (2 to 8) and `group`.
        suffix: what the family's evaluation puts behind a question with options.

    Raises:
        InputError: fewer than 2 questions, a field is missing or of a wrong kind, or the answer is
            not among the options.
    """
    folder = None
    if isinstance(questions, str | Path):
        folder = Path(questions).parent
        raw = [one for _, one in _lines(Path(questions))]
    elif isinstance(questions, Sequence):
        raw = list(questions)
    else:
        raise InputError(
            f"questions are a {type(questions).__name__}; give a list of mappings, or the path of "
            "a JSONL file"
        )
    if len(raw) < 2:
        raise InputError(f"{len(raw)} question(s) came, and an interval needs 2 at least; add more")
    return [_question(one, i, folder, suffix) for i, one in enumerate(raw)]


def _lines(path: Path) -> Iterator[tuple[int, Any]]:
    if not path.is_file():
        raise InputError(f"{str(path)!r} is not a file; give a JSONL file with one question a line")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"{path.name} is not UTF-8 ({error.reason}); save it as UTF-8") from error
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            yield number, json.loads(line)
        except (ValueError, RecursionError) as error:
            raise InputError(
                f"line {number} of {str(path)!r} is no JSON ({brief(error)})"
            ) from error


def _question(raw: Any, i: int, folder: Path | None, suffix: str) -> Question:
    if not isinstance(raw, Mapping):
        raise InputError(f"question {i} is a {type(raw).__name__}; give a mapping with {FIELDS}")
    missing = [name for name in FIELDS if not raw.get(name)]
    if missing:
        raise InputError(
            f"question {i} has no {missing[0]!r}; it needs {', '.join(FIELDS)}, and options for "
            "multiple choice"
        )
    for name in ("text", "probe", "answer"):
        if not isinstance(raw[name], str):
            raise InputError(f"question {i} has a {type(raw[name]).__name__} as {name}, not a text")
    images = raw["images"]
    if folder is not None:
        names = _listed(images)
        if odd := [name for name in names if not isinstance(name, str)]:
            raise InputError(
                f"question {i} has a {type(odd[0]).__name__} among its images, not a path"
            )
        images = [_open(folder / name, i) for name in names]
    example = {"images": images, "text": raw["text"]}
    pictures_of(example)  # refuses what is no picture
    listed = raw.get("options") or ()
    if not isinstance(listed, list | tuple):
        raise InputError(f"question {i} has a {type(listed).__name__} as options, not a list")
    options = tuple(listed)
    if not options:
        return Question(example, raw["probe"], raw["answer"], (), raw.get("group"))
    if not 2 <= len(options) <= len(_LETTERS) or len(set(map(str, options))) < len(options):
        raise InputError(
            f"question {i} has the options {quoted(options)}; give 2 to {len(_LETTERS)} different "
            "ones"
        )
    written = [f"{mark}. {option}" for mark, option in zip(_LETTERS, options, strict=False)]
    probe = "\n".join([raw["probe"], *written]) + suffix
    return Question(example, probe, _right(raw["answer"], options, i), options, raw.get("group"))


def _right(answer: str, options: tuple[str, ...], i: int) -> str:
    """The option that an answer names, by its text or by its letter."""
    spelled = [option for option in options if same(option, answer)]
    number = _LETTERS.find(answer.strip()) if len(answer.strip()) == 1 else -1
    if not spelled and not 0 <= number < len(options):
        raise InputError(
            f"the answer {quoted(answer)} of question {i} is none of its options {quoted(options)}"
        )
    return spelled[0] if spelled else options[number]


def _listed(images: Any) -> list[Any]:
    return list(images) if isinstance(images, list | tuple) else [images]


def _open(path: Path, i: int) -> Image.Image:
    try:
        with Image.open(path) as picture:
            return picture.convert("RGB")
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise InputError(
            f"the picture {quoted(str(path))} of question {i} cannot be read: {brief(error)}"
        ) from error
