r"""The matcher reads what is there, in its order, and guesses nothing."""

import doctest

import pytest

from examples.capimagine import matcher, phrasing
from examples.capimagine.matcher import match, same, visible

COLOURS = ["red", "dark red", "blue", "white"]


@pytest.mark.parametrize("module", [matcher, phrasing])
def test_examples_in_docstrings(module) -> None:
    failed, ran = doctest.testmod(module)
    assert (failed, ran > 0) == (0, True)


@pytest.mark.parametrize(
    ("reply", "answer", "rule"),
    [
        # a box rules over all that stands around it
        (r"The answer is A. \boxed{C}", "C", "box"),
        (r"\boxed{A} no, wait, \boxed{\text{(C) blue}}", "C", "box"),
        (r"\boxed{dark red}", "B", "box"),
        (r"\boxed{d}", "D", "box"),
        # a statement rules over letters and words
        ("(A) is tempting. The answer is (C).", "C", "statement"),
        ("Answer:\n**D**", "D", "statement"),
        ("The correct option is: B. dark red", "B", "statement"),
        ("The answer is A. Hm. The answer is C", "C", "statement"),
        ("The answer is A because the other car is blue.", "A", "statement"),
        ("The answer to this question is white", "D", "statement"),
        ("answer: the white one", "D", "statement"),
        # nothing but an answer
        ("B", "B", "whole"),
        ("(b)", "B", "whole"),
        ("Dark red.", "B", "whole"),
        ("D. white", "D", "whole"),
        # letters that stand as such
        ("I look at the cart, and it is like option C shows.", "C", "letter"),
        ("It must be (D), I think.", "D", "letter"),
        ("The cart is far away.\nB", "B", "letter"),
        ("A red thing here, but I would choose D.", "D", "letter"),
        # words
        ("The cart seems to be dark red in this light", "B", "text"),
        ("a blue cart, blue as the sky", "C", "text"),
    ],
)
def test_precedence(reply: str, answer: str, rule: str) -> None:
    found = match(reply, COLOURS)
    assert (found.answer, found.rule, found.ambiguous) == (answer, rule, False)


@pytest.mark.parametrize(
    "reply",
    [
        r"\boxed{A or C}",
        r"\boxed{A, B}",
        r"\boxed{green} (A)",  # a box is never overruled by what is weaker
        r"The answer is (A) \boxed{",
        "The answer is not A",
        "The answer is A. blue",  # the letter and the words disagree
        "The answer is A or B, I am not sure",
        "Either (A) or (B)",
        "The cart is not red",
        "It isn't white",
        "red or blue",
    ],
)
def test_the_ambiguous_is_not_parsed(reply: str) -> None:
    found = match(reply, COLOURS)
    assert found.answer is None
    assert found.ambiguous


@pytest.mark.parametrize(
    "reply", ["", "A dog is on the left", "I cannot tell", "A big one", "vitamin C", "Reddish"]
)
def test_what_names_no_option_is_no_answer(reply: str) -> None:
    assert match(reply, COLOURS) == matcher.Match(None, "")


def test_a_letter_that_only_imagination_names_is_none() -> None:
    """What fools a matcher that reads everything: the imagined text talks of options."""
    reply = "<think_image> (A) would be red, the answer is A </think_image> white"
    assert match(reply, COLOURS).answer == "D"
    assert match("<think_image> the answer is A", COLOURS).answer is None


def test_stray_latent_prefixes_do_not_break_answers() -> None:
    """The trap in numbers: raw 1 of 4 right, stripped 4 of 4."""
    replies = [
        "(A) (B) x</abs_vis_token> (C)",
        "<abs_vis_token> A. B. </abs_vis_token>The answer is C",
        "<|latent_start|>(A)<|latent_end|>(C)",
        "<abs_vis_token>(C)",
    ]
    assert [match(reply, COLOURS).answer for reply in replies] == ["C"] * 4
    raw = [matcher._letters(reply, COLOURS) == {"C"} for reply in replies]
    assert sum(raw) == 1
    assert visible("<lat>A</lat>B", [("<lat>", "</lat>")]) == "B"


def test_without_letters_only_words_are_read() -> None:
    shapes = ["circle", "square"]
    assert match(" square", shapes, lettered=False).answer == "B"
    assert match("(A)", shapes, lettered=False).answer is None
    assert match("A", shapes, lettered=False).answer is None


def test_open_answers() -> None:
    assert match(r"so \boxed{1,200}", []).answer == "1,200"
    assert match("The answer is 12.", []).answer == "12"
    assert match("Paris", []).answer == "Paris"
    assert match("First I look.\nThen I think.", []).answer is None
    assert same("1,200", "1200.0")
    assert same("the Seine", "Seine.")
    assert not same("12", "12.5")
    assert same("nan", "NaN")  # words, not numbers
    assert not same("", "0")
