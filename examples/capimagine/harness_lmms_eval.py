r"""lmms-eval asks our lens: any model of the library, with or without do(Z).

    python -m examples.capimagine.harness_lmms_eval --model imaginelens \
        --model_args pretrained=Michael4933/CapImagine-7B,do=none,max_new_tokens=2048 \
        --tasks vstar_bench,hrbench4k,mme_realworld_lite,blink_jigsaw --output_path out

or as a model of lmms-eval's own command, which finds it in the entry-point group
`lmms_eval.models`, by a package of a few lines that lies beside this file:

    pip install --no-deps examples/capimagine/lmms_eval_plugin
    PYTHONPATH=. lmms-eval --model imaginelens --model_args pretrained=...,do=mean --tasks ...

PYTHONPATH is the root of the clone: recipes are no part of the library's wheel, and a package that
lmms-eval needs brings another top-level `examples`. LMMS_EVAL_PLUGINS, the older way, does not do:
lmms-eval takes what it names for a model of its simple kind, and refuses this one. Run in lmms-eval
0.7.3 both ways, on organisms and a local task, without those of its requirements that only other
models and tasks use (torchvision among them); the tests here use a stand-in.

Two traps. `vstar_bench` and `mme_realworld_lite` allow 16 new tokens, which ends any imagination
before its answer: we refuse that, unless `max_new_tokens` in the model's arguments overrules it; so
do `*_reasoning` tasks. And stop strings (`until`) are left out, for imagination holds empty lines.
Pictures go in front of the text of a question; sampling is greedy, whatever a task says, and a run
is one process.
"""

from collections.abc import Sequence
from functools import cache
from itertools import groupby
from pathlib import Path
from typing import Any

from examples.capimagine.benchmark_layouts import Question
from examples.capimagine.chains import open_picture
from examples.capimagine.evaluate import LATENT_DO, TEXT_DO, new_tokens, open_model
from examples.capimagine.harness import Given, given, replies
from imaginelens.hooks.errors import InputError

NAME = "imaginelens"


def manifest() -> Any:
    """What lmms-eval's registry asks an entry point for."""
    from lmms_eval.models.registry_v2 import ModelManifest

    return ModelManifest(model_id=NAME, chat_class_path=f"{__name__}.ImagineLens")


@cache
def adapter() -> type:
    """The model class, made when it is asked for: its parent lives in lmms-eval."""
    from lmms_eval.api.model import lmms

    class ImagineLens(lmms):
        """A chat model of lmms-eval that runs through ImagineLens.

        Args:
            pretrained: an organism, a folder or a name on the Hub.
            do: what is done to the imagination of every example; see `evaluate`.
            family: how it imagines, if that does not show.
            max_new_tokens: overrules that of the tasks.
            references: examples of the other half that edits are fitted on.
        """

        is_simple = False

        def __init__(
            self,
            pretrained: str,
            do: str = "none",
            family: str | None = None,
            device: str | None = None,
            batch_size: int | str = 1,
            max_new_tokens: int | str | None = None,
            references: int | str = 32,
            max_batch_size: Any = None,  # lmms-eval always gives one
        ) -> None:
            super().__init__()
            if do not in ("none", *LATENT_DO, *TEXT_DO):
                raise InputError(
                    f"do={do} is nothing; choose none, {', '.join({**LATENT_DO, **TEXT_DO})}"
                )
            self.lens = open_model(pretrained, family=family, device=device)
            self.dos, self.references = [] if do == "none" else [do], int(references)
            self.batch_size = int(batch_size)
            self.limit = None if max_new_tokens is None else int(max_new_tokens)

        def generate_until(self, requests: Sequence[Any]) -> list[str]:
            """The reply to each request."""
            asked = [self._question(number, r) for number, r in enumerate(requests)]
            found: dict[str, str] = {}
            for limit, same in groupby(sorted(asked, key=lambda a: a[0]), key=lambda a: a[0]):
                questions = [question for _, question in same]
                study = Given(
                    self.lens,
                    "harness",
                    dos=self.dos,
                    max_new_tokens=limit,
                    suffix="",
                    references=self.references,
                    batch=self.batch_size,
                )
                said = replies(study, questions)
                found |= {q.id: reply for q, reply in zip(questions, said, strict=True)}
            return [found[str(number)] for number in range(len(requests))]

        def _question(self, number: int, request: Any) -> tuple[int, Question]:
            """How long a reply may be, and what is asked. The guide lists five arguments; chat
            models in the repository got six for a while, the context in front."""
            *context, to_messages, options, doc_id, task, split = request.args
            if len(context) > 1:
                raise InputError(
                    f"a request of {task} has {len(request.args)} arguments, expected 5 or 6; this "
                    "lmms-eval is of another version than 0.7"
                )
            messages = to_messages(self.task_dict[task][split][doc_id])
            limit = self.limit
            if limit is None:
                limit = new_tokens(self.lens, options.get("max_new_tokens"))
            return limit, given(str(number), *_content(messages))

        def loglikelihood(self, requests: Sequence[Any]) -> list[tuple[float, bool]]:
            """Not for models that imagine before they answer."""
            raise InputError(
                "log-likelihoods of answers pass over what a model imagines before it answers; "
                "choose a task of type generate_until"
            )

        def generate_until_multi_round(self, requests: Sequence[Any]) -> list[str]:
            """Not done."""
            raise InputError("tasks of several rounds are not supported; choose another task")

    ImagineLens.__module__, ImagineLens.__qualname__ = __name__, "ImagineLens"
    return ImagineLens


def _content(messages: Sequence[dict[str, Any]]) -> tuple[str, list[Any]]:
    """The words and the pictures of a chat, as lmms-eval's tasks give it."""
    parts = [part for message in messages for part in message["content"]]
    other = {part["type"] for part in parts} - {"text", "image"}
    if other:
        raise InputError(f"a question shows {', '.join(sorted(other))}; only images are taken")
    pictures = [_picture(part["url"]) for part in parts if part["type"] == "image"]
    return "\n".join(part["text"] for part in parts if part["type"] == "text"), pictures


def _picture(given: Any) -> Any:
    """A picture as a task gives it: opened, or the path of a file."""
    return open_picture(Path(given)) if isinstance(given, str) else given.convert("RGB")


def __getattr__(name: str) -> Any:
    if name == "ImagineLens":
        return adapter()
    raise AttributeError(f"{__name__} has no {name!r}")


def main() -> None:
    """Run lmms-eval's own command line with our model among its models."""
    try:
        from lmms_eval.__main__ import cli_evaluate
        from lmms_eval.models import MODEL_REGISTRY_V2
    except ImportError as error:
        raise SystemExit(f"lmms-eval is not installed ({error}); pip install lmms-eval") from error
    MODEL_REGISTRY_V2.register_manifest(manifest(), overwrite=True)
    cli_evaluate()


if __name__ == "__main__":
    main()
