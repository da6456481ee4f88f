"""Single inputs, run and read as they are: what studies of one input at a time begin with."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from imaginelens.hooks import LatentModel, Pairs, Run
from imaginelens.hooks.errors import InputError
from imaginelens.hooks.metrics import Metric, Readout, Targets, targets_of
from imaginelens.hooks.patching import Context


@dataclass(frozen=True, eq=False)
class Asked:
    """Some inputs with their answers, run and read as they are.

    Attributes:
        pairs: the inputs are its bases.
        forwards: what it has cost.
    """

    pairs: Pairs
    run: Run
    targets: Targets
    read: Readout
    forwards: int


def asked(
    lens: LatentModel,
    data: Pairs | Sequence[Any],
    *,
    metric: Metric,
    size: int,
    context: Context = "fixed",
) -> Iterator[Asked]:
    """Run and read inputs, `size` at a time.

    Args:
        data: examples, whose answer is the one the model gives; or pairs, whose bases are run, with
            the answers that are given there.

    Raises:
        InputError: an example was not answered, or the metric needs answers that are missing.
    """
    for start in range(0, len(data), size):
        some = data[start : start + size]
        run = lens.run(list(some.base if isinstance(some, Pairs) else some))
        pairs = some if isinstance(some, Pairs) else _answered(some, run, start)
        targets = targets_of(run, pairs.base_answers, pairs.source_answers, lens.encode)
        metric.check(targets)
        read = lens.read_answer(run, targets, free=context == "free")
        yield Asked(pairs, run, targets, read, run.forwards + 1)


def check_data(data: Any, batch_size: Any) -> None:
    """Refuse what is neither a list of examples nor pairs, or cannot be split into batches.

    Raises:
        InputError: it is not, or cannot.
    """
    if type(batch_size) is not int or batch_size < 1:
        raise InputError(f"batch_size is {batch_size!r}, expected a number from 1 on")
    if isinstance(data, str | dict) or not hasattr(data, "__len__") or not len(data):
        raise InputError(
            f"data is a {type(data).__name__}, expected a list of examples "
            "{'images': ..., 'text': ...}, one at least, or il.Pairs"
        )


def _answered(examples: Sequence[Any], run: Run, start: int) -> Pairs:
    """Examples with the answers that the model gives, as pairs without a source."""
    answers = list(run.found_answers)
    if None in answers:
        row = answers.index(None)
        raise InputError(
            f"no answer was found in what example {start + row} wrote, {run.texts[row][:60]!r}; "
            "leave it out, or pass answer=il.answers.boxed, .letter or .after('...') to il.load"
        )
    return Pairs(examples, examples, [str(a) for a in answers], [None] * len(examples))
