"""What a model's reply must be before it enters a chain. Anything else is a `BadReply`."""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from examples.capimagine.data import boxed

# of our own format, of Monet's, of chat templates, and what stands for pictures elsewhere
MARKERS = re.compile(
    r"<\|[^|<>]*\|>|</?(?:think_image|abs_vis_token\w*|observation|image|tool_call|im_start)\b",
    re.IGNORECASE,
)
LONGEST_CAPTION = 1200  # characters; ours: the paper says "concise"
LONGEST_TEXT = 6000
FENCE = re.compile(r"\A```(?:json)?\s*(.*?)\s*```\Z", re.DOTALL)


class BadReply(Exception):
    """A reply that cannot be used; `kind` is for counting, the message is told to the model."""

    def __init__(self, kind: str, complaint: str) -> None:
        super().__init__(complaint)
        self.kind = kind


@dataclass(frozen=True)
class Verdict:
    """How sure the judge is of two faults of a chain, each from 0 to 1."""

    conflict: float
    unanswerable: float
    why: str = ""


def parsed(text: str) -> dict[str, Any]:
    """The JSON object of a reply, also from a code fence, and after thinking aloud."""
    said = text.rsplit("</think>", 1)[-1].strip()
    if fenced := FENCE.match(said):
        said = fenced[1]
    if not said:
        raise BadReply("empty", "The reply is empty.")
    try:
        found = json.loads(said)
    except (ValueError, RecursionError) as error:
        raise BadReply("no JSON", "The reply is not JSON.") from error
    if not isinstance(found, dict):
        raise BadReply("no JSON", "The reply is not a JSON object.")
    return found


def caption(text: str) -> str:
    """The caption of a picture.

    >>> caption('{"caption": "a red cube"}')
    'a red cube'
    """
    return _caption(parsed(text).get("caption"))


def chain(text: str, *, count: int, answer: str) -> tuple[list[str], list[str]]:
    r"""The texts and captions of a whole chain; it must still end in its answer.

    >>> chain(r'{"texts": ["", "\\boxed{red}"], "captions": ["a red cube"]}', count=1,
    ...       answer="red")
    (['', '\\boxed{red}'], ['a red cube'])
    """
    said, texts = captions(text, count=count), parsed(text).get("texts")
    if not isinstance(texts, list) or len(texts) != count + 1:
        raise BadReply("wrong count", f"`texts` must be a list of {count + 1}.")
    texts = [_text(one, "A text", LONGEST_TEXT) for one in texts]
    if answer not in (boxed(texts[-1]), texts[-1].strip()):
        raise BadReply(
            "answer changed", f"The last text must end with \\boxed{{{answer}}}, unchanged."
        )
    return texts, said


def verdict(text: str) -> Verdict:
    """The two judgements of a chain.

    >>> verdict('{"conflict": 0.1, "unanswerable": 0}')
    Verdict(conflict=0.1, unanswerable=0.0, why='')
    """
    found = parsed(text)
    why = found.get("why", "")
    return Verdict(
        _share(found.get("conflict"), "conflict"),
        _share(found.get("unanswerable"), "unanswerable"),
        why if isinstance(why, str) else "",
    )


def captions(text: str, *, count: int) -> list[str]:
    """So many captions.

    >>> captions('{"captions": ["a red cube"]}', count=1)
    ['a red cube']
    """
    said = parsed(text).get("captions")
    if not isinstance(said, list) or len(said) != count:
        raise BadReply("wrong count", f"`captions` must be a list of {count}.")
    return [_caption(one) for one in said]


def misled(text: str, *, before: Sequence[str], answer: str) -> tuple[list[str], str]:
    """Captions that lead to a wrong answer, and that answer.

    >>> misled('{"captions": ["a blue cube"], "conclusion": "blue"}', before=["a red cube"],
    ...        answer="red")
    (['a blue cube'], 'blue')
    """
    changed = captions(text, count=len(before))
    wrong = _text(parsed(text).get("conclusion"), "`conclusion`", LONGEST_CAPTION)
    if changed == list(before):
        raise BadReply("unchanged", "The captions are as they were.")
    if not wrong or wrong.casefold() == answer.casefold():
        raise BadReply("not wrong", f"`conclusion` must be another answer than {answer!r}.")
    return changed, wrong


def _caption(value: Any) -> str:
    said = " ".join(_text(value, "A caption", LONGEST_CAPTION).split())
    if not said:
        raise BadReply("nothing seen", "The caption is empty.")
    if "\\boxed" in said:
        raise BadReply("markers", "A caption must not have \\boxed{} in it.")
    return said


def _text(value: Any, what: str, longest: int) -> str:
    if not isinstance(value, str):
        raise BadReply("wrong type", f"{what} must be a text.")
    if len(value) > longest:
        raise BadReply("over-long", f"{what} has {len(value)} characters, more than {longest}.")
    if found := MARKERS.search(value):
        raise BadReply("markers", f"{what} must not have {found[0]} in it.")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise BadReply("not UTF-8", f"{what} holds half a character.") from error
    return value.strip()


def _share(value: Any, what: str) -> float:
    if not isinstance(value, int | float) or not 0 <= value <= 1:
        raise BadReply("wrong type", f"`{what}` must be a number from 0 to 1.")
    return float(value)
