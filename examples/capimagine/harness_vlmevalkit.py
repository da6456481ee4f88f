r"""VLMEvalKit asks our lens: any model of the library, with or without do(Z).

    cd VLMEvalKit && PYTHONPATH=.:/where/this/clone/is \
        python -m examples.capimagine.harness_vlmevalkit --model Michael4933/CapImagine-7B \
        --do none -- --data VStarBench HRBench4K HRBench8K BLINK TableVQABench --reuse

What stands behind `--` goes to VLMEvalKit's `run.py`, with `--model imaginelens` in front.

Written to VLMEvalKit's documented interface (docs/en/Model.md: `BaseModel.generate_inner`, and
`supported_VLM` in `vlmeval.config`, as of August 2026), and tested against a stand-in of it. IT WAS
NOT RUN IN VLMEvalKit ITSELF, which is installed from its repository and was not at hand.

VLMEvalKit asks one question at a time, so edits that are fitted on other examples (mean, constant,
noise, add-noise, resample) take these from a benchmark that is read before: `--reference-benchmark
hrbench4k --reference-data FOLDER`, which should be another than the one that is asked.
"""

import argparse
import runpy
import sys
from collections.abc import Sequence
from functools import cache, partial
from itertools import islice
from pathlib import Path
from typing import Any

from examples.capimagine.benchmark_layouts import Question, read
from examples.capimagine.chains import open_picture
from examples.capimagine.evaluate import (
    LATENT_DO,
    TEXT_DO,
    open_model,
    wants_reference,
)
from examples.capimagine.harness import Given, given, replies
from imaginelens.hooks.errors import InputError

NAME = "imaginelens"
# what Monet's evaluation puts in front of every question; the paper follows it
MONET = (
    "You are a helpful multimodal assistant. You are required to answer the question based on the "
    "image provided. Put your final answer in \\boxed{}.\n"
)


@cache
def adapter() -> type:
    """The model class, made when it is asked for: its parent lives in VLMEvalKit."""
    from vlmeval.vlm.base import BaseModel

    class ImagineLens(BaseModel):
        """A model of VLMEvalKit that runs through ImagineLens.

        Args:
            model_path: an organism, a folder or a name on the Hub.
            do: what is done to the imagination of every example; see `evaluate`.
            reference: a benchmark and its folder, for edits that are fitted on other examples.
            prefix: what is put in front of every question.
        """

        INTERLEAVE = True

        def __init__(
            self,
            model_path: str,
            do: str = "none",
            family: str | None = None,
            device: str | None = None,
            max_new_tokens: int | None = None,
            reference: tuple[str, Path | None] | None = None,
            references: int = 32,
            prefix: str = "",
            **others: Any,
        ) -> None:
            super().__init__()
            self.study = Given(
                open_model(model_path, family=family, device=device),
                "harness",
                dos=[] if do == "none" else [do],
                max_new_tokens=max_new_tokens,
                suffix="",
                references=references,
                known=_known(do, reference, references),
            )
            self.prefix = prefix

        def generate_inner(
            self, message: Sequence[dict[str, str]], dataset: str | None = None
        ) -> str:
            """The reply to one question."""
            other = {part["type"] for part in message} - {"text", "image"}
            if other:
                raise InputError(f"a question of {dataset} shows {', '.join(other)}, not images")
            pictures = [open_picture(Path(p["value"])) for p in message if p["type"] == "image"]
            text = "\n".join(part["value"] for part in message if part["type"] == "text")
            question = given("asked", self.prefix + text, pictures)
            return replies(self.study, [question])[0]

    return ImagineLens


def _known(do: str, reference: tuple[str, Path | None] | None, n: int) -> tuple[Question, ...]:
    """The questions that edits are fitted on."""
    bank = {**TEXT_DO, **LATENT_DO}
    if do != "none" and do not in bank:
        raise InputError(f"do={do} is nothing; choose none, {', '.join(bank)}")
    edit = bank.get(do)
    if edit is None or not wants_reference(edit):
        return ()
    if reference is None:
        raise InputError(
            f"do={do} is fitted on other examples, and VLMEvalKit asks one at a time; name a "
            "benchmark to take them from (--reference-benchmark, --reference-data)"
        )
    name, folder = reference
    rows = (row for row in read(name, folder) if isinstance(row, Question))
    return tuple(islice(rows, n))


def register(name: str = NAME, **arguments: Any) -> None:
    """Put a model with these arguments among those that VLMEvalKit knows by name."""
    from vlmeval import config

    config.supported_VLM[name] = partial(adapter(), **arguments)


def main() -> None:
    """Run VLMEvalKit's own command line with our model among its models."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", required=True, help="an organism, a folder or a Hub name")
    parser.add_argument("--do", default="none", help=", ".join({**LATENT_DO, **TEXT_DO}))
    parser.add_argument("--family", help="such as capimagine; if it does not show")
    parser.add_argument("--device")
    parser.add_argument("--max-new-tokens", type=int)
    parser.add_argument("--reference-benchmark")
    parser.add_argument("--reference-data", type=Path)
    parser.add_argument("--prefix", default=MONET, help="in front of every question")
    parser.add_argument("rest", nargs=argparse.REMAINDER, help="-- and what run.py is given")
    args = parser.parse_args()
    reference = (
        (args.reference_benchmark, args.reference_data) if args.reference_benchmark else None
    )
    try:
        register(
            model_path=args.model,
            do=args.do,
            family=args.family,
            device=args.device,
            max_new_tokens=args.max_new_tokens,
            reference=reference,
            prefix=args.prefix,
        )
    except ImportError as error:
        raise SystemExit(f"VLMEvalKit is not installed ({error}); clone it first") from error
    rest = [word for word in args.rest if word != "--"]
    sys.argv = ["run.py", "--model", NAME, *rest]
    runpy.run_path("run.py", run_name="__main__")


if __name__ == "__main__":
    main()
