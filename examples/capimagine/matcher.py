r"""Which answer a reply gives, read without a model, in an order that is written down.

A reply is first rid of what is no answer: imagination, in words or in latents, and special tokens.
Then the first of these rules that finds anything decides, also where what it finds cannot be read:

1. `box`: what is inside the last \boxed{...};
2. `statement`: what stands behind the last "the answer is", "Answer:", "option:" and the like;
3. `whole`: the reply is nothing but an answer;
4. `letter`: the letters of options in brackets or bold, at the beginning of a line before a full
   stop, behind "option" or "choose", or in a last line of their own. An article is no letter ("A
   dog is on the left"), nor is a name ("vitamin C");
5. `text`: the options whose words are in the reply.

A rule that finds two different answers, or an answer behind a "not", has found an ambiguous one:
the reply counts as not parsed. It is never guessed, and never taken from a weaker rule. Monet's
protocol, which the paper follows, leaves such replies to a judge; its matching rules are those of
VLMEvalKit and changed over time, so ours are our own.
"""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

from examples.capimagine.chains import CLOSE, OPEN
from imaginelens.hooks import FAMILIES, answers
from imaginelens.hooks.spec import LatentSpec
from imaginelens.hooks.vocabspans import VocabSpec

LETTERS = "ABCDEFGHIJ"
# What stands around latents, in all families, and around thoughts of models that think aloud.
_PAIRS = (
    (family.open, family.close)
    for family in FAMILIES.values()
    if isinstance(family, LatentSpec | VocabSpec)
    and isinstance(family.open, str)
    and isinstance(family.close, str)
)
MARKERS: tuple[tuple[str, str], ...] = (*dict.fromkeys(_PAIRS), ("<think>", "</think>"))
_SPECIAL = re.compile(r"<\|[^|<>]*\|>|</?(?:abs_vis_token|observation|think_image)[a-z_]*>")
_STATEMENT = re.compile(
    r"\b(?:answer|option|choice)(?:\s+to\s+[^.\n]{0,80}?)?\**\s*(?:is|would be|should be|:)+\s*"
    r"(?:the\s+)?(?:option|choice|letter)?\s*:?\s*",
    re.IGNORECASE,
)
_NEGATION = re.compile(
    r"\b(?:not|no|never|neither|nor|without|rather than|instead of|cannot|\w+n't)\b"
    r"(?:\W+\w+){0,3}\W*$",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class Match:
    """What was read.

    Attributes:
        answer: the letter of an option or, in questions without options, the words; None where
            nothing, or nothing certain, was found.
        rule: the rule that decided; "" if none did.
    """

    answer: str | None
    rule: str = ""

    @property
    def ambiguous(self) -> bool:
        """Whether a rule found something that cannot be read as one answer."""
        return self.answer is None and self.rule != ""


def visible(reply: str, markers: Sequence[tuple[str, str]] = MARKERS) -> str:
    """A reply without imagination and special tokens.

    A latent span goes with its markers and all that stands between them. Where only its end is
    there, all before it goes too: this is the stray prefix that costs a naive matcher half of
    Monet's answers on V* (0.31 instead of 0.68; reported by users, not by the paper). A span of
    words that was never closed has no answer behind it, and goes to the end.

    >>> visible("<think_image> a red cube (B) </think_image> the answer is C<|im_end|>")
    'the answer is C'
    >>> visible("A B</abs_vis_token> (C)")
    '(C)'
    """
    reply = re.sub(rf"{re.escape(OPEN)}.*?(?:{re.escape(CLOSE)}|$)", " ", reply, flags=re.DOTALL)
    reply = reply.rpartition(CLOSE)[2]
    for start, stop in (*MARKERS, *markers):
        inside = rf"{re.escape(start)}(?:(?!{re.escape(start)}).)*?{re.escape(stop)}"
        reply = re.sub(inside, " ", reply, flags=re.DOTALL)
        reply = reply.rpartition(stop)[2].replace(start, " ")
    return _SPECIAL.sub(" ", reply).strip()


def match(reply: str, options: Sequence[str], *, lettered: bool = True) -> Match:
    r"""Read the answer to a question with these options, the first of which is A.

    Args:
        options: none means that the question is open; then the answer is words.
        lettered: whether the question shows letters; without them only words are read, and the
            answer still is the letter of an option.

    >>> match("I see two. \\boxed{B}", ["one", "two"])
    Match(answer='B', rule='box')
    >>> match("Either (A) or (B)", ["one", "two"])
    Match(answer=None, rule='letter')
    >>> match("A dog chases two cats", ["one", "two"])
    Match(answer='B', rule='text')
    """
    said = visible(reply)
    if not said:
        return Match(None)
    if not options:
        return _open(said)
    if (box := answers.boxed(said)) is not None or r"\boxed{" in said:
        inside = "" if box is None else said[slice(*box)]
        return Match(_piece(inside, options, lettered), "box")
    if stated := _stated(said):
        return Match(_piece(stated, options, lettered), "statement")
    if lettered and _label(said, options):
        return Match(_piece(said, options, lettered), "whole")
    if whole := _exact(said, options, lettered):
        return Match(whole, "whole")
    if lettered and (letters := _letters(said, options)):
        return Match(letters.pop() if len(letters) == 1 else None, "letter")
    if named := _named(said, options):
        return Match(_only(named), "text")
    return Match(None)


def same(answer: str, truth: str) -> bool:
    """Whether two open answers are the same words or the same number.

    >>> same("1,200.0 %", "1200%"), same("The Nile.", "nile"), same("12", "112")
    (True, True, False)
    """
    one, other = _number(answer), _number(truth)
    if one is not None and other is not None:
        return one == other
    return _plain(answer) == _plain(truth)


# ---- pieces ------------------------------------------------------------------------------------


def _open(said: str) -> Match:
    if (box := answers.boxed(said)) is not None:
        return Match(_untex(said[slice(*box)]).strip() or None, "box")
    if r"\boxed{" in said:
        return Match(None, "box")
    if stated := _stated(said):
        return Match(stated.strip(" *").rstrip(".").strip() or None, "statement")
    lines = [line.strip() for line in said.splitlines() if line.strip()]
    return Match(lines[0], "whole") if len(lines) == 1 else Match(None)


def _stated(said: str) -> str:
    """What stands behind the last statement of an answer, up to the end of its line."""
    heads = list(_STATEMENT.finditer(said))
    return said[heads[-1].end() :].split("\n")[0].strip() if heads else ""


def _piece(piece: str, options: Sequence[str], lettered: bool) -> str | None:
    """A short text that is said to be the answer."""
    piece = _untex(piece).strip()
    if exact := _exact(piece, options, lettered):
        return exact
    valid = LETTERS[: len(options)]
    if lettered and (leading := re.match(rf"\W*([{valid}])(?![\w'])", piece)):
        return leading[1] if _agrees(leading[1], piece[leading.end() :], options) else None
    letters = _letters(piece, options) if lettered else set()
    if letters:
        return letters.pop() if len(letters) == 1 and not _NEGATION.search(piece) else None
    return _only(_named(piece, options))


def _agrees(letter: str, rest: str, options: Sequence[str]) -> bool:
    """Whether nothing behind a letter takes it back: another letter, or another option's words."""
    valid = LETTERS[: len(options)]
    if re.match(rf"\W*(?:or|and|,|/|&)\W*[{valid}]\b", rest) or _letters(rest, options) - {letter}:
        return False
    label = re.match(r"[)\].:*]+\s*(.+)", rest, re.DOTALL)
    return label is None or not (_named(label[1], options) - {letter, "?"})


def _exact(piece: str, options: Sequence[str], lettered: bool) -> str | None:
    """A text that is one letter, or one option's words."""
    valid = LETTERS[: len(options)]
    if lettered and (found := re.fullmatch(rf"\W*([{valid}{valid.lower()}])\W*", piece)):
        return found[1].upper()
    for form in (_bare, _plain):  # as it is written first: "A. cat" is no "cat"
        if form is _plain and lettered and _label(piece, options):
            return None
        forms = [form(option) for option in options]
        if forms.count(form(piece)) == 1:
            return valid[forms.index(form(piece))]
    return None


def _label(piece: str, options: Sequence[str]) -> bool:
    """Whether a text is a line that begins with a letter and a mark, such as "B. red"."""
    form = rf"[(\[*\s]*[{LETTERS[: len(options)]}][)\].:*]+\s*\w[^\n]*"
    return re.fullmatch(form, piece.strip()) is not None


def _letters(text: str, options: Sequence[str]) -> set[str]:
    """The letters of options that stand as such in a text."""
    one = rf"([{LETTERS[: len(options)]}])"
    forms = (
        rf"\(\s*{one}\s*\)",
        rf"\*\*\(?{one}[.)]?\*\*",
        rf"(?m)^\s*{one}[.):](?=\s|$)",
        rf"(?i:\b(?:options?|choices?|answers?|choose|pick|select))\s+{one}(?![\w'])",
    )
    found = {letter for form in forms for letter in re.findall(form, text)}
    lines = text.strip().splitlines()
    last = re.fullmatch(rf"\W*{one}\W*", lines[-1]) if lines else None
    return found | ({last[1]} if last else set())


def _named(text: str, options: Sequence[str]) -> set[str]:
    """The options whose words are in a text, but for those that are a part of longer ones there.
    A "?" among them says that one of them stands behind a negation."""
    plain = _plain(text)
    spans = []
    for letter, option in zip(LETTERS, options, strict=False):
        words = _plain(option)
        for at in re.finditer(rf"(?<![\w.]){re.escape(words)}(?![\w%])", plain) if words else ():
            spans.append((at.start(), at.end(), letter))
    kept = [
        s for s in spans if not any(o[0] <= s[0] and s[1] <= o[1] and o[:2] != s[:2] for o in spans)
    ]
    denied = any(_NEGATION.search(plain[:start]) for start, *_ in kept)
    return {letter for *_, letter in kept} | ({"?"} if denied else set())


def _only(named: set[str]) -> str | None:
    return next(iter(named)) if len(named) == 1 and "?" not in named else None


def _untex(text: str) -> str:
    """The words in `\\text{...}`, `\\mathrm{...}` and the like."""
    return re.sub(r"\\(?:text|mathrm|mathbf|textbf)\{([^{}]*)\}", r"\1", text).replace("$", "")


def _bare(text: str) -> str:
    return text.casefold().strip(" .\n")


def _plain(text: str) -> str:
    """Words alone: case, articles, punctuation and white space left out."""
    words = re.sub(r"[^\w%.+'-]+|\.(?=\s|$)", " ", text.casefold()).split()
    kept = (word.strip("'.") for word in words)
    return " ".join(word for word in kept if word and word not in ("a", "an", "the"))


def _number(text: str) -> float | None:
    bare = re.sub(r"[\s,$€£]", "", text).rstrip(".").removesuffix("%")
    try:
        value = float(bare)
    except ValueError:
        return None
    return value if math.isfinite(value) else None
