"""What probes are to read, and which inputs must stay on one side: labels and groups of inputs."""

import difflib
import inspect
import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Bool, Int

from imaginelens.hooks import Pairs
from imaginelens.hooks import inputs as edits_of_inputs
from imaginelens.hooks.errors import InputError
from imaginelens.hooks.inputs import Example, InputEdit, content_key, pictures_key, pictures_of

SIDES = ("base", "source", "both")
Variables = Mapping[str, Callable[[Example, int], Any]]


# ---- which inputs ------------------------------------------------------------------------------


@dataclass(frozen=True)
class Inputs:
    """Inputs with what is known of them.

    Attributes:
        answers: the right answer to each; None where it is not known.
        groups: inputs of one group, with the same picture, say, stay on one side of a split.
        keys: a digest of what the model is given.
    """

    examples: tuple[Example, ...]
    answers: tuple[Any, ...]
    groups: tuple[Any, ...]
    keys: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.examples)


def inputs_of(data: Any, *, side: str = "base", groups: Sequence[Any] | None = None) -> Inputs:
    """The inputs of pairs, or of a list of examples or texts.

    Args:
        side: of pairs: their bases, their sources, or the bases and then the sources.
        groups: one for each input or pair; if left out those of the pairs, each example's own
            "group", or its pictures: inputs that show the same picture are one group. A source
            that is its base after an edit is of its base's group.

    Raises:
        InputError: an input cannot be read, or groups are not one for each.

    >>> inputs_of([{"text": "a", "answer": "1"}, {"text": "b"}]).answers
    ('1', None)
    """
    paired = isinstance(data, Pairs)
    if side not in SIDES:
        raise InputError(f"side is {side!r}, expected 'base', 'source' or 'both'")
    if not paired and (isinstance(data, str | Mapping) or not isinstance(data, Sequence)):
        raise InputError(
            f"the inputs are a {type(data).__name__}, expected il.Pairs or a list of examples "
            "{'images': ..., 'text': ...}"
        )
    sides = ["base", "source"] if side == "both" else [side]
    examples = [each for one in sides for each in getattr(data, one)] if paired else list(data)
    examples = [{"text": each} if isinstance(each, str) else each for each in examples]
    if not examples:
        raise InputError("there are no inputs; give at least one")
    keys = []
    for i, example in enumerate(examples):
        try:
            keys.append(content_key(example))
        except InputError as error:
            raise InputError(f"input {i} cannot be read: {error}") from error
    if paired:
        answers = [each for one in sides for each in getattr(data, f"{one}_answers")]
    else:
        answers = [example.get("answer") for example in examples]
    own = _groups(data, examples, groups, sides if paired else [])
    return Inputs(tuple(examples), tuple(answers), tuple(own), tuple(keys))


def _groups(
    data: Any, examples: Sequence[Example], given: Sequence[Any] | None, sides: Sequence[str]
) -> list[Any]:
    """One group for each example: given, its own, or its pictures."""
    owner = given if given is not None else data.groups if sides else None
    if owner is not None:
        listed = list(owner)
        if len(sides) == 2 and len(listed) == len(data):
            listed *= 2
        if len(listed) != len(examples):
            raise InputError(
                f"{len(listed)} groups came with {len(examples)} inputs; give one each"
            )
        return listed
    own = [example.get("group") for example in examples]
    without = [i for i, group in enumerate(own) if group is None]
    if 0 < len(without) < len(own):
        raise InputError(
            f"{len(without)} of {len(own)} inputs have no group (the first is input {without[0]}) "
            "and the others have one; give every input its own, or pass groups="
        )
    if not without:
        return own
    of_base = len(sides) == 2 and _are_twins(data.history)
    return [_shown(e) for e in (data.base if of_base else examples)] * (2 if of_base else 1)


def _shown(example: Example) -> str:
    """The key of its pictures; of its text where it has none."""
    return pictures_key(example) if pictures_of(example) else content_key(example)


def _are_twins(history: Sequence[str]) -> bool:
    """Whether the sources are their bases after an edit that takes nothing from another input."""
    edit = getattr(edits_of_inputs, history[-1].split("(")[0], None) if history else None
    return isinstance(edit, type) and issubclass(edit, InputEdit) and not edit.uses_other


# ---- labels ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Labelling:
    """Where labels come from.

    Attributes:
        name: what they say.
        fixed: one per example, or one per (example, step); None where a function says them.
        of: (number of the example, step) -> label, where it depends on the step.
        counts_latents: the step that `of` is given is the latent step, which `il.latent[1:]`
            counts from 1, say; otherwise the first of the selected positions is step 0.
    """

    name: str
    fixed: list[Any] | None = None
    of: Callable[[int, int], Any] | None = None
    counts_latents: bool = False

    def values(
        self, mask: Bool[np.ndarray, "example step"], steps: Int[np.ndarray, "example step"]
    ) -> list[Any] | None:
        """The labels of all examples, or of all their steps; None if there are none.

        Args:
            steps: the latent step that each position is, -1 where it is none.

        Raises:
            InputError: labels are of latent steps, and a position is none; or an example's labels
                are not one for each step.
        """
        if self.of is None:
            lengths = {len(each) for each in self.fixed or () if isinstance(each, list | tuple)}
            if lengths - {mask.shape[1]}:
                raise InputError(
                    f"labels of {' and '.join(map(str, sorted(lengths)))} steps came with "
                    f"{mask.shape[1]} steps; give each example a label for every step, None where "
                    "it has no such step"
                )
            return self.fixed
        if self.counts_latents and (steps[mask] < 0).any():
            raise InputError(
                f"{self.name!r} is known for latent steps, and some of the positions are none; "
                "pass labels= as a callable (example, step) -> label, or collect at il.latent"
            )
        found: list[Any] = np.full(mask.shape, None, dtype=object).tolist()
        for i, t in np.argwhere(mask).tolist():
            found[i][t] = self.of(i, int(steps[i, t]) if self.counts_latents else t)
        return found


def labelling(given: Any, inputs: Inputs, variables: Variables) -> Labelling:
    """Read what a user gave as labels.

    Args:
        given: None (the answers); the name of a column of the examples, or of a variable of the
            model's known mechanism; a callable (example) or (example, step) -> label; or labels,
            one per example or one per (example, step).
        variables: what the model's mechanism knows of an example at a latent step, by name.

    Raises:
        InputError: there is no such column or variable, or there is not one label for each.
    """
    if given is None:
        known = any(answer is not None for answer in inputs.answers)
        return Labelling("answer" if known else "label", list(inputs.answers) if known else None)
    if isinstance(given, str):
        return _named(given, inputs, variables)
    if callable(given):
        return _called(given, inputs)
    listed = given.tolist() if hasattr(given, "tolist") else list(given)
    if len(listed) != len(inputs):
        raise InputError(f"{len(listed)} labels came with {len(inputs)} inputs; give one each")
    nested = sum(isinstance(label, list | tuple) for label in listed)
    if nested not in (0, len(listed)):
        raise InputError(
            f"{nested} of {len(listed)} labels {'is a list' if nested == 1 else 'are lists'}, one "
            "label for each step, and others are none; give all examples one label, or all a list"
        )
    return Labelling("label", listed)


def _named(name: str, inputs: Inputs, variables: Variables) -> Labelling:
    having = [name in example for example in inputs.examples]
    if all(having):
        return Labelling(name, [example[name] for example in inputs.examples])
    if any(having):
        raise InputError(
            f"{having.count(False)} of {len(inputs)} inputs have no {name!r} (the first is input "
            f"{having.index(False)}); give them one, or None where it is not known"
        )
    if name == "answer" and any(answer is not None for answer in inputs.answers):
        return Labelling(name, list(inputs.answers))
    if name in variables:
        variable = variables[name]

        def of(i: int, step: int) -> Any:
            return variable(inputs.examples[i], step)

        return Labelling(name, of=of, counts_latents=True)
    columns = dict.fromkeys(itertools.chain(*inputs.examples, variables))
    near = difflib.get_close_matches(name, columns, n=3, cutoff=0.4) or list(columns)
    raise InputError(
        f"no input has {name!r}, and the model's mechanism has no such variable; there "
        f"{'is' if len(near) == 1 else 'are'} {', '.join(map(repr, near))}"
    )


def _called(fn: Callable[..., Any], inputs: Inputs) -> Labelling:
    name = getattr(fn, "__name__", "label")
    name = name if name.isidentifier() else "label"
    if _takes_step(fn):
        return Labelling(name, of=lambda i, step: _asked(fn, i, inputs.examples[i], step))
    return Labelling(name, [_asked(fn, i, example) for i, example in enumerate(inputs.examples)])


def _takes_step(fn: Callable[..., Any]) -> bool:
    """Whether a callable is (example, step) -> label, by its signature."""
    try:
        parameters = inspect.signature(fn).parameters.values()
    except (TypeError, ValueError):  # some builtins do not say
        return False
    plain = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    asked = [p for p in parameters if p.kind in plain]
    needed = [p for p in asked if p.default is inspect.Parameter.empty]
    return len(needed) == 2 or (len(asked) > 1 and asked[1].name == "step")


def _asked(fn: Callable[..., Any], i: int, *given: Any) -> Any:
    try:
        return fn(*given)
    except Exception as error:
        error.add_note(f"while labels= was asked for the label of input {i}")
        raise
