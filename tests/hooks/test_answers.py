"""Where the answer is in what was written; and that a missing one stays missing."""

from typing import Any

import pytest
import tiny
from transformers import LogitsProcessor

import imaginelens as il
from imaginelens.hooks import answers


def found(finder: answers.AnswerFinder, text: str) -> str | None:
    at = finder(text)
    if at is None:
        return None
    assert 0 <= at[0] < at[1] <= len(text)
    return text[slice(*at)]


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        (r"\boxed{4}", "4"),
        (r"so \boxed{\frac{1}{2}} it is", r"\frac{1}{2}"),
        (r"first \boxed{3}, no: \boxed{{x}_{y}}", "{x}_{y}"),
        (r"\boxed{a\}b}", r"a\}b"),
        (r"\boxed{3", None),
        (r"\boxed{\frac{1}{2}", None),
        (r"\boxed{}", None),
        ("boxed{3}", None),
        (r"\fbox{3} \boxed 4", None),
        ("", None),
        (r"\boxed{B}<|latent_pad|><|im_end|>", "B"),
        (r"\boxed{ two words }", " two words "),
    ],
)
def test_boxed(text: str, wanted: str | None) -> None:
    assert found(answers.boxed, text) == wanted


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("B", "B"),
        ("The answer is (B).", "B"),
        ("A, no, it is C", "C"),
        ("**D**", "D"),
        ("Answer: (E)<|im_end|>", "E"),
        ("BAD CAB", None),
        ("option I", None),
        ("b", None),
        ("", None),
        ("a 3D cube and B12", None),  # no stand-alone letter here
        ("A4 paper", None),
        ("(C", "C"),
    ],
)
def test_letter(text: str, wanted: str | None) -> None:
    assert found(answers.letter, text) == wanted


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("Answer: two cats<|im_end|>", "two cats"),
        ("Answer: 1\nAnswer: 2\nbye", "2"),
        ("Answer:\n", None),
        ("no marker", None),
        ("Answer:", None),
        ("Answer: <|im_end|>", None),
        ("Answer: <|latent_pad|>red<|im_end|>", "red"),
    ],
)
def test_after(text: str, wanted: str | None) -> None:
    assert found(answers.after("Answer:"), text) == wanted


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        (" circle<|im_end|>", "circle"),
        ("<|latent_end|>\n circle </s> more", "circle"),
        ("circle", "circle"),
        ("two words<eos>", "two words"),
        ("1 < 2", "1 < 2"),
        ("  \n<|im_end|>", None),
        ("", None),
        ("<|latent_end|><|latent_pad|><|latent_pad|> red<|im_end|>", "red"),
    ],
)
def test_tail(text: str, wanted: str | None) -> None:
    assert found(answers.tail, text) == wanted


def test_a_plain_callable_becomes_a_finder() -> None:
    last = answers.from_callable(lambda text: text.split()[-1] if text.split() else None)
    assert found(last, "four or four") == "four"
    assert last("four or four") == (8, 12)  # the last occurrence
    assert found(last, "") is None
    assert found(answers.from_callable(lambda text: "absent"), "four") is None
    assert found(answers.from_callable(lambda text: ""), "four") is None


# ---- in a run --------------------------------------------------------------------------------


class Writes(LogitsProcessor):
    """Row i writes the given tokens."""

    def __init__(self, rows: list[list[int]], width: int) -> None:
        self.rows, self.width = rows, width

    def __call__(self, input_ids: Any, scores: Any) -> Any:
        scores = scores.clone()
        for row, ids in enumerate(self.rows):
            step = input_ids.shape[1] - self.width
            scores[row] = -1e9
            scores[row, ids[min(step, len(ids) - 1)]] = 0
        return scores


def written(texts: list[str], finder: Any = None, spec: Any = False) -> il.Run:
    """A run in which the rows write exactly these texts."""
    lens = il.LatentModel(*tiny.build("qwen2_5_vl"), spec=spec, answer=finder)
    text = tiny.prompt("qwen2_5_vl", "what?")
    given = [{"images": tiny.image(32, 16, i), "text": text} for i in range(len(texts))]
    rows = [[*lens.encode(t), lens.tokenizer.eos_token_id] for t in texts]
    plan = Writes(rows, lens.prompt(given).inputs["input_ids"].shape[1])
    n = max(map(len, rows))
    return lens.run(given, max_new_tokens=n, generation={"logits_processor": [plan]})


def test_missing_answers_are_none_and_counted() -> None:
    run = written([r"\boxed{ab}", "no box", r"\boxed{c", r"x\boxed{d}"], answers.boxed)
    assert run.answers == ["ab", None, None, "d"]
    assert run.parse_coverage == 0.5
    marked = [il.answer.resolve(run.tokens, row) for row in range(4)]
    texts = [run.tokens.text(r, int(c[0]), int(c[-1]) + 1) if len(c) else None
             for r, c in enumerate(marked)]  # fmt: skip
    assert texts == ["ab", None, None, "d"]
    assert [il.before_answer.resolve(run.tokens, r).tolist() for r in range(4)] == [
        [c[0] - 1] if len(c) else [] for c in marked
    ]
    assert "answer None" in repr(run)


def test_no_answer_at_all_is_refused_by_the_verbs() -> None:
    lens = il.LatentModel(*tiny.build("qwen2_5_vl"), spec=False, answer=answers.boxed)
    given = {"images": tiny.image(32, 16, 0), "text": tiny.prompt("qwen2_5_vl", "what?")}
    run = lens.run(given, max_new_tokens=3)
    assert run.answer is None
    assert run.parse_coverage == 0
    with pytest.raises(il.InputError, match=r"no answer was found .*answer=il\.answers\.boxed"):
        lens.ablate(run, il.Zero(), at=il.last_prompt, site="blocks.0.hook_resid_post")


def test_latent_ids_that_a_model_without_a_family_writes_are_no_answer() -> None:
    run = written(["<|latent_start|><|latent_pad|><|latent_pad|><|latent_end|>red", "blue"])
    assert run.answers == ["red", "blue"]
    assert run.trigger.emitted == (0, 0)


def test_the_answer_stands_behind_the_last_span() -> None:
    spec = il.LatentSpec(name="test", open="<|latent_start|>", close="<|latent_end|>",
                         pad="<|latent_pad|>", max_steps=2)  # fmt: skip
    run = written(["Answer: 1<|latent_start|>**<|latent_end|>Answer: 2", "Answer: 3"],
                  answers.after("Answer:"), spec)  # fmt: skip
    assert run.trigger.emitted == (2, 0)
    assert run.answers == ["2", "3"]
    unanswered = written(["Answer: 1<|latent_start|>**<|latent_end|>well", "Answer: 3"],
                         answers.after("Answer:"), spec)  # fmt: skip
    assert unanswered.answers == [None, "3"]


def test_a_callable_from_text_to_text_serves_as_the_answer_of_a_model() -> None:
    """`answer=` takes "a callable from text to text", as the contract says."""
    run = written(["I say four", ""], lambda text: text[-9:-5] if "four" in text else None)
    assert run.answers == ["four", None]
