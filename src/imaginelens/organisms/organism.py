"""A tiny trained model whose mechanism is known, as a `LatentModel` with a task."""

import difflib
import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from transformers.utils import cached_file, logging

from imaginelens.hooks import FAMILIES, CheckpointError, InputError, LatentModel, Pairs, hub
from imaginelens.hooks.answers import AnswerFinder
from imaginelens.hooks.families import Family
from imaginelens.hooks.loading import is_hub_id
from imaginelens.hooks.pairs import Example, Steps
from imaginelens.organisms import hunt
from imaginelens.organisms.checkpoint import available, card, folder


class Organism(LatentModel):
    """A shipped organism: everything a `LatentModel` is, and `.task()` draws its exact task."""

    name: str
    measured: dict[str, Any]

    @property
    def card(self) -> dict[str, Any]:
        """What was measured when it was trained: accuracy, do(Z) profile, swap shares."""
        return self.measured

    def push_to_hub(
        self,
        repo_id: str,
        *,
        private: bool = False,
        token: str | None = None,
        license: str | None = None,
    ) -> hub.Address:
        """Put the organism on the Hugging Face Hub, for `il.load(repo_id)`; returns its address.

        Args:
            license: the Hub's word for it, such as "mit"; the card names none if left out.

        Raises:
            CheckpointError: it is not one of those that are shipped, or in a folder; the Hub cannot
                be reached, or one may not write there.
        """
        home = folder(self.name) if self.name in available() else Path(self.name)
        if not home.is_dir():
            raise CheckpointError(f"{self.name!r} is on the Hub already; duplicate it there")

        def put(target: Path) -> None:
            shutil.copytree(home, target, dirs_exist_ok=True)
            (target / hub.CARD).write_text(_readme(home, license), encoding="utf-8")

        message = f"Organism {home.name}, with imaginelens"
        return hub.upload(put, repo_id, message=message, private=private, token=token)

    @property
    def variables(self) -> Mapping[str, Callable[[Example, int], Any]]:
        """What the rule of the hunt knows at a latent step, by name: (example, step) -> value.

        Step t stands for the card after t + 1 hops: its `name` and its `shape`; once the hops are
        used up, the last card. `answer` is the same at every step.

        >>> lens = load("latent-content")
        >>> example = lens.task(n=1).base[0]
        >>> lens.variables["shape"](example, 1) == example["hunt"].answer
        True
        """
        return {"name": _card_at, "shape": _shape_at, "answer": _answer_at}

    def task(self, n: int = 64, seed: int = 0) -> Pairs:
        """Draw pairs of hunts whose answers differ, with every mechanism's prediction.

        `task.hypotheses[name](base, source, steps)` is the answer to expect when the latents at
        `steps` (None: all) of a source go into its base, if that mechanism is the model's. For an
        organism that imagines in words, steps are the names it writes.
        """
        if n < 1:
            raise ValueError(f"task(n={n}) asks for no pairs; n must be 1 or more")
        base, source = hunt.pairs(n, hops=int(self.card["variant"]["hops"]), seed=seed)
        return Pairs(
            base=[example(h) for h in base],
            source=[example(h) for h in source],
            base_answers=[h.answer for h in base],
            source_answers=[h.answer for h in source],
            hypotheses={name: partial(_predict, rule) for name, rule in hunt.HYPOTHESES.items()},
        )


def example(game: hunt.Hunt) -> dict[str, Any]:
    """A hunt as an input: its picture and its question; the hunt itself comes along."""
    return {"images": game.image(), "text": game.question, "hunt": game}


def load(
    name: str | Path,
    *,
    answer: AnswerFinder | None = None,
    spec: Family | str | Literal[False] | None = None,
    dtype: torch.dtype | str = "auto",
    device_map: Any = None,
    attn_implementation: str | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
) -> LatentModel:
    """Open a shipped organism by name, or a checkpoint from a local folder or the Hub.

    Args:
        answer: finds the answer in what the model writes, e.g. `il.answers.boxed`; organisms bring
            their own.
        spec: the latent family or its name, where it is not recognised; `False` is none.
        dtype: organisms open in float32 unless you say otherwise.

    Raises:
        CheckpointError: there is no such organism, folder or model.

    >>> load("latent-content").spec.name
    'organism'
    """
    near = difflib.get_close_matches(str(name), available(), n=1)
    if near and str(name) != near[0] and not Path(name).exists():
        raise CheckpointError(f"there is no organism {str(name)!r}; did you mean {near[0]!r}?")
    measured = card(str(name)) if str(name) in available() else _measured(name, revision)
    if measured is None:
        return LatentModel.from_pretrained(
            name,
            spec=spec,
            answer=answer,
            dtype=dtype,
            device_map=device_map,
            attn_implementation=attn_implementation,
            revision=revision,
            trust_remote_code=trust_remote_code,
        )
    if spec is None and measured["variant"]["imagines"]:
        spec = FAMILIES["capimagine"]
    with _quiet():
        lens = Organism.from_pretrained(
            folder(str(name)) if str(name) in available() else name,
            spec=spec,
            answer=answer,
            dtype=torch.float32 if dtype == "auto" else dtype,
            device_map=device_map,
            attn_implementation=attn_implementation,
            revision=None if str(name) in available() else revision,
        )
    assert isinstance(lens, Organism)
    lens.name, lens.measured = str(name), measured
    return lens


def _measured(name: str | Path, revision: str | None) -> dict[str, Any] | None:
    """What a folder or repository says about an organism in it; None if it holds none."""
    path = Path(name) / "card.json"
    if not Path(name).exists() and isinstance(name, str) and is_hub_id(name):
        found = cached_file(
            name,
            "card.json",
            revision=revision,
            _raise_exceptions_for_gated_repo=False,
            _raise_exceptions_for_missing_entries=False,
            _raise_exceptions_for_connection_errors=False,
        )
        path = path if found is None else Path(found)
    if not path.is_file():
        return None
    try:
        words = json.loads(path.read_text(encoding="utf-8"))
        known = isinstance(words["variant"], dict) and {"hops", "imagines"} <= set(words["variant"])
    except (OSError, ValueError, TypeError, LookupError, RecursionError):  # of something else
        return None
    return words if known else None


def _readme(home: Path, license: str | None) -> str:
    """The README of an organism on the Hub."""
    about = home / "card.md"
    told = about.read_text(encoding="utf-8") if about.is_file() else f"# {home.name}\n"
    tags = ("organism", "known-mechanism")
    return f"""{hub.header(tags=tags, license=license, pipeline_tag="image-text-to-text")}

{told}
## Use

```python
import imaginelens as il

lens = il.load("REPOSITORY_OR_FOLDER")
task = lens.task(n=64, seed=0)  # pairs with exact counterfactuals
```

It is a test object for methods of interpretability: its mechanism is known, and it knows nothing
of the world.
"""


@contextmanager
def _quiet() -> Iterator[None]:
    """No progress bar for half a megabyte."""
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def _hunt_of(example: Example) -> hunt.Hunt:
    if "hunt" not in example:
        raise InputError(
            f"an example with {', '.join(map(repr, example))} brings no hunt, so what its latents "
            "stand for is not known; take examples of lens.task, with their pictures as they were"
        )
    found: hunt.Hunt = example["hunt"]
    return found


def _card_at(example: Example, step: int) -> str:
    game = _hunt_of(example)
    return game.path[min(step + 1, game.hops)]


def _shape_at(example: Example, step: int) -> str:
    return _hunt_of(example).shape_of(_card_at(example, step))


def _answer_at(example: Example, step: int) -> str:
    return _hunt_of(example).answer


def _predict(rule: hunt.Hypothesis, base: Example, source: Example, steps: Steps) -> str:
    return rule(base["hunt"], source["hunt"], steps)
