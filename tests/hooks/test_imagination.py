"""Imagination written as text: where its spans are, and what editing them leaves as it was."""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import tiny
import torch
from safetensors.torch import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import LogitsProcessor, PreTrainedTokenizerFast

import imaginelens as il
from imaginelens.hooks.families import family_of
from imaginelens.hooks.landing import text_change
from imaginelens.hooks.textspans import find_spans
from imaginelens.hooks.tokens import Kind

OPEN, CLOSE = "<think_image>", "</think_image>"
PAD, EOS = "<pad>", "<eos>"

# ---- tokenizers --------------------------------------------------------------------------------

# tokens that hold the edge of a marker and something else, as Qwen's do: ">\n", " <", "></", ">A"
MERGED = (
    "></",
    "><",
    ">\n",
    ">A",
    ">.",
    ".<",
    " <",
    "</",
    "think",
    "_image",
    " red",
    " cube",
)


def byte_level(*special: str, words: Sequence[str] = (), **_: Any) -> PreTrainedTokenizerFast:
    """A byte-level BPE that merges these words, wherever they stand; `special` are added tokens."""
    spelled = {" ": "Ġ", "\n": "Ċ"}
    names = [PAD, EOS, *special]
    vocabulary = {
        c: i for i, c in enumerate([*names, *sorted(pre_tokenizers.ByteLevel.alphabet())])
    }
    merges: list[tuple[str, str]] = []
    for word in words:
        symbols = [spelled.get(c, c) for c in word]
        for n in range(1, len(symbols)):
            pair = "".join(symbols[:n]), symbols[n]
            if "".join(pair) not in vocabulary:
                vocabulary["".join(pair)] = len(vocabulary)
                merges.append(pair)
    core = Tokenizer(models.BPE(vocabulary, merges))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens([AddedToken(name, normalized=False, special=True) for name in names])
    return PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token=PAD, eos_token=EOS, padding_side="left"
    )


@cache
def tokenizers() -> dict[str, PreTrainedTokenizerFast]:
    """Markers of one token, of many, and of several that are merged with what stands beside."""
    return {
        "one token": byte_level(OPEN, CLOSE),
        "bytes": byte_level(),
        "merged": byte_level(words=MERGED),
    }


KINDS = ("one token", "bytes", "merged")


def mapped(
    tokenizer: Any, rows: Sequence[Sequence[int]], *, prompt: int = 3, padding: Sequence[int] = ()
) -> il.TokenMap:
    """The map of runs that wrote these ids behind a prompt of `prompt` tokens, some left-padded."""
    width = prompt + max(map(len, rows))
    ids = np.full((len(rows), width), tokenizer.pad_token_id)
    kind = np.full((len(rows), width), int(Kind.PAD), dtype=np.int8)
    for row, written in enumerate(rows):
        before = padding[row] if padding else 0
        ids[row, before:prompt] = tokenizer("x", add_special_tokens=False).input_ids[0]
        ids[row, prompt : prompt + len(written)] = list(written)
        kind[row, before : prompt + len(written)] = Kind.TEXT
    blank = np.full(ids.shape, -1)
    return il.TokenMap(
        ids=ids,
        kind=kind,
        image=blank,
        cell=np.full((*ids.shape, 2), -1),
        box=np.full((*ids.shape, 4), np.nan),
        span=blank,
        step=blank,
        grids=((),) * len(rows),
        tokenizer=tokenizer,
        prompt_width=prompt,
        keys=tuple(map(str, range(len(rows)))),
    )


# ---- where the spans are -----------------------------------------------------------------------

BEGUN = "(?:".join(map(re.escape, CLOSE[:-1])) + ")?" * (len(CLOSE) - 2)  # "<(?:/(?:t ... )?)?"
SPAN = re.compile(f"{OPEN}(.*?)({CLOSE}|(?:{BEGUN})?\\Z)", re.DOTALL)


def judged(tokenizer: Any, text: str, start: int) -> list[tuple[list[int], bool]]:
    """For each span the columns of the tokens that lie wholly inside of it, by a regular expression
    over characters and the tokenizer's own offsets; and whether it is closed."""
    offsets = tokenizer(text, return_offsets_mapping=True, add_special_tokens=False).offset_mapping
    found = []
    for match in SPAN.finditer(text):
        inner, end = match.span(1)
        inside = [i for i, (a, b) in enumerate(offsets) if inner <= a and b <= end]
        found.append(([start + i for i in inside], match[2] == CLOSE))
    return found


PIECES = (
    *(OPEN, CLOSE, OPEN, CLOSE, OPEN, CLOSE, " red", " cube", "a", "A", ".", "\n", " ", "<", "</"),
    *("think", "_image>", ">", "/", "</think_image", "<think_image", "e", "re"),
)


@pytest.mark.parametrize("kind", KINDS)
def test_spans_are_where_a_regular_expression_finds_them(kind: str) -> None:
    rng, tokenizer, seen = np.random.default_rng(0), tokenizers()[kind], 0
    for _ in range(80):
        text = "".join(rng.choice(PIECES, rng.integers(0, 15)))
        seen += check_spans(tokenizer, text, ended=bool(rng.integers(2)))
    assert seen > 40


def check_spans(tokenizer: Any, text: str, *, ended: bool) -> int:
    ids = tokenizer(text, add_special_tokens=False).input_ids
    tokens = mapped(tokenizer, [ids + [tokenizer.eos_token_id] * ended])
    spans = find_spans(tokens, 0)
    wanted = judged(tokenizer, text, 3)
    assert [list(range(s.start, s.stop)) for s in spans] == [columns for columns, _ in wanted]
    assert [s.closed for s in spans] == [closed for _, closed in wanted]
    for k, (columns, _) in enumerate(wanted):
        assert il.imagination[k].resolve(tokens, 0).tolist() == columns
    assert il.imagination.resolve(tokens, 0).tolist() == [c for cs, _ in wanted for c in cs]
    for span in spans:  # markers and what lies between them, without a gap
        whole = tokens.text(0, span.opened, span.end)
        assert OPEN in whole
        assert (CLOSE in whole) == span.closed
    for a, b in pairwise(spans):  # one token may end the one, begin the other
        assert a.end <= b.opened + 1
    return len(spans)


CASES = {  # text: the content of each span
    "no span": ("red cube", []),
    "one": (f"so {OPEN} red{CLOSE} B", [" red"]),
    "empty": (f"{OPEN}{CLOSE} B", [""]),
    "several": (f"{OPEN}a{CLOSE}e{OPEN} cube{CLOSE}", ["a", " cube"]),
    "side by side": (f"{OPEN}a{CLOSE}{OPEN}e{CLOSE}", ["a", "e"]),
    "unclosed": (f"x{OPEN} red cube", [" red cube"]),
    "unclosed and empty": (f"x{OPEN}", [""]),
    "cut inside the closing marker": (f"x{OPEN} red</think_im", [" red"]),
    "a second one unclosed": (f"{OPEN}a{CLOSE} {OPEN} cube", ["a", " cube"]),
    "opened twice": (f"{OPEN}a{OPEN}e{CLOSE}x{CLOSE}", [f"a{OPEN}e"]),
    "stray closing marker": (f"a{CLOSE}e{OPEN} red{CLOSE}{CLOSE}", [" red"]),
    "half a marker": (f"<think_{OPEN}/think_image>{CLOSE}", ["/think_image>"]),
}


@pytest.mark.parametrize("ended", [False, True])
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("kind", ["one token", "bytes"])
def test_what_counts_as_a_span(kind: str, case: str, ended: bool) -> None:
    tokenizer, (text, wanted) = tokenizers()[kind], CASES[case]
    ids = tokenizer(text, add_special_tokens=False).input_ids + [tokenizer.eos_token_id] * ended
    tokens = mapped(tokenizer, [ids])
    assert [tokens.text(0, s.start, s.stop) for s in find_spans(tokens, 0)] == wanted


@pytest.mark.parametrize(
    ("text", "opening", "content", "closing"),
    [
        (f"so {OPEN}\n red\n{CLOSE}.", " <think_image>\n", " red\n", "</think_image>."),
        (f"a.{OPEN} red.{CLOSE}A", ".<think_image>", " red", ".</think_image>A"),
        (f"a{OPEN}e.{CLOSE}\nA", "<think_image>", "e", ".</think_image>\n"),
    ],
)
def test_a_token_that_holds_a_part_of_a_marker_is_the_markers(
    text: str, opening: str, content: str, closing: str
) -> None:
    tokenizer = tokenizers()["merged"]
    tokens = mapped(tokenizer, [tokenizer(text, add_special_tokens=False).input_ids])
    (span,) = find_spans(tokens, 0)
    assert tokens.text(0, span.opened, span.start) == opening
    assert tokens.text(0, span.start, span.stop) == content
    assert tokens.text(0, span.stop, span.end) == closing


def test_one_token_may_hold_parts_of_both_markers() -> None:
    tokenizer = tokenizers()["merged"]
    ids = tokenizer(OPEN + CLOSE, add_special_tokens=False).input_ids
    (span,) = find_spans(mapped(tokenizer, [ids]), 0)
    assert "></" in tokenizer.convert_ids_to_tokens(ids)
    assert span.stop == span.start - 1
    assert il.imagination.resolve(mapped(tokenizer, [ids]), 0).tolist() == []


@pytest.mark.parametrize("kind", KINDS)
def test_rows_padding_and_prompts_do_not_matter(kind: str) -> None:
    tokenizer = tokenizers()[kind]
    rows = [tokenizer(t, add_special_tokens=False).input_ids for t, _ in CASES.values()]
    together = mapped(tokenizer, rows, prompt=5, padding=[i % 5 for i in range(len(rows))])
    for row, ids in enumerate(rows):
        alone = find_spans(mapped(tokenizer, [ids], prompt=5), 0)
        assert find_spans(together, row) == alone
    asked = tokenizer(f"say {OPEN} or {CLOSE} now", add_special_tokens=False).input_ids
    tokens = mapped(tokenizer, [asked], prompt=0)
    assert len(find_spans(tokens, 0)) == 1
    assert find_spans(replace(tokens, prompt_width=len(asked)), 0) == []  # the user's words


def test_characters_of_several_tokens() -> None:
    tokenizer = tokenizers()["bytes"]
    text = f"é{OPEN}日本 é😀{CLOSE}é"
    ids = tokenizer(text, add_special_tokens=False).input_ids
    (span,) = find_spans(mapped(tokenizer, [ids]), 0)
    content = tokenizer.decode(ids[span.start - 3 : span.stop - 3])
    assert content == "日本 é😀"


def test_other_markers_and_their_spelling() -> None:
    tokenizer = tokenizers()["bytes"]
    text = f"<see>a</see>{OPEN}b{CLOSE}<see>c</see>"
    tokens = mapped(tokenizer, [tokenizer(text, add_special_tokens=False).input_ids])
    seen = il.imagination.between("<see>", "</see>")
    for at, wanted in ((seen, ["a", "c"]), (seen[-1], ["c"]), (il.imagination, ["b"])):
        assert tokens.texts(0, at.resolve(tokens, 0).tolist()) == wanted
    assert repr(seen[1:]) == "imagination.between('<see>', '</see>')[1:]"
    assert repr(il.imagination.between(OPEN, "</see>")).endswith(
        "between('<think_image>', '</see>')"
    )
    assert repr(il.imagination[0]) == "imagination[0]"
    with pytest.raises(il.InputError, match="give it two different markers"):
        il.imagination.between("|", "|")


SLICES = "1: :2 1:3 -2: :-1 -3:-1 ::2 ::-1 9:12 3::-2 -9:2 :".split()


def as_slice(spelled: str) -> slice:
    return slice(*(int(e) if e else None for e in spelled.split(":")))


@pytest.mark.parametrize("n", [0, 1, 4])
def test_an_index_selects_as_of_a_list(n: int) -> None:
    numbers = list(range(n))
    for index in (0, 1, 3, -1, -4, -5):
        wanted = [numbers[index]] if -n <= index < n else []
        assert [k for k in numbers if il.imagination[index].holds(k, n)] == wanted
    for spelled in SLICES:
        index = as_slice(spelled)
        at = il.imagination[index]
        assert [k for k in numbers if at.holds(k, n)] == sorted(numbers[index])
        if spelled != ":":
            assert repr(at) == f"imagination[{spelled}]"


def test_spans_beyond_those_of_the_unedited_run_are_selected_by_what_has_no_end() -> None:
    whole, first, last = il.imagination, il.imagination[0], il.imagination[-1]
    assert whole.holds(7, 2)
    assert whole[1:].holds(7, 2)
    assert not any(at.holds(7, 2) for at in (first, last, whole[:2], whole[:-1]))
    assert last.holds(1, 2)


# ---- a model that writes what it is told -------------------------------------------------------


@cache
def built(kind: str, seed: int = 0) -> tuple[Any, Any]:
    """A tiny Qwen2.5-VL with one of the tokenizers, and its processor."""
    words = MERGED if kind == "merged" else ()
    marks = (OPEN, CLOSE) if kind == "one token" else ()

    def tokenizer(*special: str, bos: bool, **roles: str) -> PreTrainedTokenizerFast:
        return byte_level(*special, *marks, words=words)

    fields = {"bos_token_id": None, "num_hidden_layers": 2}
    config = tiny.text_config
    with (
        mock.patch.object(tiny, "tokenizer", tokenizer),
        mock.patch.object(tiny, "text_config", lambda tok, **more: config(tok, **more, **fields)),
    ):
        return tiny.fresh("qwen2_5_vl", seed=seed)


SPEC = il.FAMILIES["capimagine"]


def lens_of(kind: str, seed: int = 0, **options: Any) -> il.LatentModel:
    return il.LatentModel(*built(kind, seed), **{"spec": SPEC, **options})


def example(i: int = 0) -> dict[str, Any]:
    sizes = ((48, 32), (24, 40), (40, 40), (16, 16))
    texts = ("what?", "which colour is it?", "how many", "where")
    return {"images": tiny.image(*sizes[i], seed=i), "text": tiny.prompt("qwen2_5_vl", texts[i])}


class Say(LogitsProcessor):
    """Has each row write its ids, whatever it would have written."""

    def __init__(self, width: int, rows: Sequence[Sequence[int]]) -> None:
        self.width, self.rows = width, rows

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        step, scores = input_ids.shape[1] - self.width, scores.clone()
        for row, ids in enumerate(self.rows):
            if step < len(ids):
                scores[row] = -1e9
                scores[row, ids[step]] = 0
        return scores


def said(lens: il.LatentModel, texts: Sequence[str], *, room: int = 4, eos: bool = True) -> il.Run:
    """A run whose rows write these texts and end, or, without `eos`, go on up to the limit. Made
    again, it has a limit of `room` more tokens, and nothing tells it what to write."""
    rows = [lens.encode(t) + [lens.tokenizer.eos_token_id] * eos for t in texts]
    inputs = [example(i) for i in range(len(texts))]
    width = lens.prompt(inputs).inputs["input_ids"].shape[1]
    longest = max(map(len, rows))
    say = {"logits_processor": [Say(width, rows)]}
    run = lens.run(inputs, max_new_tokens=longest, generation=say)
    return replace(run, options=(longest + room, None, None, 0, False))


def finds(text: str) -> str | None:
    """An A or B at the very end, as an answer."""
    found = re.search(r"([AB])(<eos>)?$", text)
    return found and found[1]


@cache
def told(kind: str) -> tuple[il.LatentModel, il.Run]:
    """A model of that kind, and a run of it that wrote TEXTS."""
    lens = lens_of(kind, answer=finds)
    return lens, said(lens, TEXTS)


def wrote(run: il.Run, row: int = 0) -> list[int]:
    real = np.flatnonzero(run.tokens.kind[row] != Kind.PAD)
    return run.tokens.ids[row, run.tokens.prompt_width : real[-1] + 1].tolist()


def alone(lens: il.LatentModel, row: int) -> dict[str, torch.Tensor]:
    return dict(lens.prompt(example(row)).inputs)


def longer(inputs: Mapping[str, torch.Tensor], ids: Sequence[int]) -> dict[str, torch.Tensor]:
    """The inputs with more text behind the prompt, as if the user had written it."""
    whole, new = dict(inputs), torch.tensor([list(ids)], dtype=torch.long)
    whole["input_ids"] = torch.cat([inputs["input_ids"], new], 1)
    for name, value in (("attention_mask", 1), ("mm_token_type_ids", 0)):
        whole[name] = torch.cat([inputs[name], torch.full_like(new, value)], 1)
    return whole


class Ban(LogitsProcessor):
    """No such token at one width."""

    def __init__(self, width: int, token: int) -> None:
        self.width, self.token = width, token

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        if input_ids.shape[1] == self.width:
            scores = scores.clone()
            scores[:, self.token] = -torch.inf
        return scores


def continued(
    model: Any, inputs: Mapping[str, torch.Tensor], kept: Sequence[int], n: int, ban: int = -1
) -> list[int]:
    """What `generate` of transformers writes behind the prompt and `kept`, up to `n` in all; `kept`
    included."""
    whole = longer(inputs, kept)
    width = whole["input_ids"].shape[1]
    processors = [] if ban < 0 else [Ban(width, ban)]
    out = model.generate(**whole, max_new_tokens=n - len(kept), logits_processor=processors)
    ids = out[0, inputs["input_ids"].shape[1] :].tolist()
    eos, pad = model.generation_config.eos_token_id, model.generation_config.pad_token_id
    while pad != eos and ids[-1] == pad:
        ids.pop()
    return ids


def read(model: Any, inputs: Mapping[str, torch.Tensor], ids: Sequence[int]) -> torch.Tensor:
    """Log-probabilities of every token behind the prompt, in one plain forward; (token, vocab)."""
    whole = longer(inputs, ids)
    with torch.no_grad():
        out = model(**whole, position_ids=tiny.positions(model, whole), use_cache=False)
    first = inputs["input_ids"].shape[1] - 1
    return out.logits[0, first : first + len(ids)].log_softmax(-1)


TEXTS = (
    f"so {OPEN} red cube {CLOSE} it is B",
    f"{OPEN} a red{CLOSE}\nA",
    f"well. {OPEN} cube red\n{CLOSE}.B",
)


def split(lens: il.LatentModel, text: str) -> tuple[list[int], list[int], list[int], list[int]]:
    """The ids of a text up to its span, of the span's content, its closing marker and the rest:
    from the tokenizer's offsets alone."""
    coded = lens.tokenizer(text, return_offsets_mapping=True, add_special_tokens=False)
    start, end = text.index(OPEN) + len(OPEN), text.index(CLOSE)
    stop = end + len(CLOSE)
    parts: tuple[list[int], ...] = ([], [], [], [])
    for token, (a, b) in zip(coded.input_ids, coded.offset_mapping, strict=True):
        where = 0 if a < start else 1 if b <= end else 2 if a < stop else 3
        parts[where].append(token)
    return parts  # type: ignore[return-value]


def new_content(lens: il.LatentModel, edit: il.Edit, row: int, donor: Sequence[str]) -> Any:
    """What each edit should make of the content of a row: its ids, None where it is removed."""
    _, old, _, _ = split(lens, TEXTS[row])
    text = lens.tokenizer.decode(old)
    if isinstance(edit, il.Rewrite):
        lead, tail = re.fullmatch(r"(\s*).*?(\s*)", text, re.DOTALL).groups()
        return lens.encode(f"{lead}a cube{tail}")
    if isinstance(edit, il.Swap):
        return split(lens, donor[row])[1]
    if isinstance(edit, il.Truncate):
        return old[: edit.keep]
    return None if isinstance(edit, il.Delete) else old


DONORS = (TEXTS[2], TEXTS[0], TEXTS[1])
EDITS: dict[str, Callable[[il.LatentModel], il.Edit]] = {
    "rewrite": lambda lens: il.Rewrite("a cube"),
    "swap": lambda lens: il.Swap(said(lens, DONORS)),
    "truncate": lambda lens: il.Truncate(1),
    "truncate all": lambda lens: il.Truncate(),
    "delete": lambda lens: il.Delete(),
    "sham": lambda lens: il.Sham(),
}
EDITED = [("merged", name) for name in EDITS] + [("one token", n) for n in ("rewrite", "delete")]


@pytest.mark.parametrize(("kind", "name"), EDITED)
def test_free_context_is_what_generate_writes_behind_the_edited_span(kind: str, name: str) -> None:
    """A batch of rows of unequal length, each against transformers alone."""
    lens, run = told(kind)
    edit, limit = EDITS[name](lens), run.options[0]
    result = lens.ablate(run, edit, at=il.imagination, metric=il.accuracy)
    assert result.run is not None
    for row, text in enumerate(TEXTS):
        before, old, close, _ = split(lens, text)
        new = new_content(lens, edit, row, DONORS)
        kept = [*before, *(new or []), *close]
        ban, n = -1, limit + max(0, len(new or []) - len(old))
        if new is None:
            cut = opened_at(lens, text)
            kept, ban, n = before[:cut], before[cut], limit
        assert wrote(result.run, row) == continued(lens.model, alone(lens, row), kept, n, ban)
    assert result.landing.rows == [0, 1, 2]
    assert result.landing.fired == 1
    assert result.landing.flags == {}


def opened_at(lens: il.LatentModel, text: str) -> int:
    """How many tokens stand before the first that holds a part of the opening marker."""
    coded = lens.tokenizer(text, return_offsets_mapping=True, add_special_tokens=False)
    return sum(b <= text.index(OPEN) for _, b in coded.offset_mapping)


def beside(lens: il.LatentModel, text: str) -> str:
    """What the first and the last token of the span hold beside it."""
    coded = lens.tokenizer(text, return_offsets_mapping=True, add_special_tokens=False)
    opened, closed = text.index(OPEN), text.index(CLOSE) + len(CLOSE)
    first = min(a for a, b in coded.offset_mapping if b > opened)
    last = max(b for a, b in coded.offset_mapping if a < closed)
    return text[first:opened] + text[closed:last]


@pytest.mark.parametrize(("kind", "name"), EDITED)
def test_fixed_context_reads_the_tokens_built_by_hand(kind: str, name: str) -> None:
    lens, run = told(kind)
    edit, answers, others = EDITS[name](lens), ["B", "A", "B"], ["A", "B", "A"]
    assert run.answers == answers
    result = lens.ablate(run, edit, at=il.imagination, context="fixed")
    swapped = None
    if isinstance(edit, il.Swap):
        swapped = lens.swap(
            run, edit.donor, at=il.imagination, context="fixed", source_answers=others
        )
    for row, text in enumerate(TEXTS):
        before, old, close, rest = split(lens, text)
        new, eos = new_content(lens, edit, row, DONORS), lens.tokenizer.eos_token_id
        ids = [*before, *(new or []), *close, *rest, eos]
        if new is None:
            ids = [*before[: opened_at(lens, text)], *lens.encode(beside(lens, text)), *rest, eos]
        assert wrote(result.run, row) == ids
        answer, other = (lens.encode(a[row])[0] for a in (answers, others))
        unedited = read(lens.model, alone(lens, row), [*before, *old, *close, *rest])
        edited = read(lens.model, alone(lens, row), ids[:-1])
        assert rest[-1] == answer
        assert float(result.before[row] - unedited[-1, answer]) == pytest.approx(0, abs=1e-9)
        assert float(result.after[row] - edited[-1, answer]) == pytest.approx(0, abs=1e-9)
        if swapped is not None:
            wanted = edited[-1, other] - edited[-1, answer]
            assert float(swapped.after[row] - wanted) == pytest.approx(0, abs=1e-9)
    assert result.parse_coverage == 1.0
    assert [t.replace("<eos>", "")[-1] for t in result.texts_after] == answers


@pytest.mark.parametrize(
    "to", ["  a cube\n", ["a cube", "a cube ", " a cube"], lambda old: "a cube", ("a cube",) * 3]
)
def test_a_text_may_be_given_for_all_for_each_row_or_as_a_function(to: Any) -> None:
    lens, run = told("merged")
    wanted, found = (
        lens.ablate(run, il.Rewrite(t), at=il.imagination, context="fixed").texts_after
        for t in ("a cube", to)
    )
    assert found == wanted


def test_a_function_sees_the_text_without_its_outer_spaces() -> None:
    lens, run = told("merged")
    seen: list[str] = []

    def louder(old: str) -> str:
        seen.append(old)
        return old.upper()

    result = lens.ablate(run, il.Rewrite(louder), at=il.imagination, context="fixed")
    assert seen == ["red cube", "a red", "cube red"]
    spans = [SPAN.search(text)[1] for text in result.texts_after]
    assert spans == [" RED CUBE ", " A RED", " CUBE RED\n"]


def test_characters_of_several_tokens_are_rewritten_whole() -> None:
    lens, seen = lens_of("bytes", answer=finds), []
    run = said(lens, [f"{OPEN}日本 é{CLOSE}A"])

    def more(old: str) -> str:
        seen.append(old)
        return old + "😀"

    result = lens.ablate(run, il.Rewrite(more), at=il.imagination, context="fixed")
    assert seen == ["日本 é"]
    assert lens.tokenizer.decode(wrote(result.run)) == f"{OPEN}日本 é😀{CLOSE}A<eos>"


def test_shuffle_permutes_the_tokens_of_the_span() -> None:
    lens, run = told("merged")
    free = lens.ablate(run, il.Shuffle(seed=1), at=il.imagination, metric=il.accuracy)
    fixed = lens.ablate(run, il.Shuffle(seed=1), at=il.imagination, context="fixed")
    for row, text in enumerate(TEXTS):
        before, old, close, rest = split(lens, text)
        new = wrote(free.run, row)[len(before) : len(before) + len(old)]
        assert sorted(new) == sorted(old)
        assert all(a != b for a, b in zip(new, old, strict=True))
        kept = [*before, *new, *close]
        assert wrote(free.run, row) == continued(lens.model, alone(lens, row), kept, run.options[0])
        assert wrote(fixed.run, row) == [*kept, *rest, lens.tokenizer.eos_token_id]


# ---- a model with a will of its own ------------------------------------------------------------

Rule = Callable[[str], Sequence[str]]


class Wants(LogitsProcessor):
    """Has each row write what its rule says should follow the text so far, whoever wrote that: the
    first of the alternatives whose first token is allowed, or else what the model likes."""

    def __init__(self, tokenizer: Any, width: int, rules: Sequence[Rule]) -> None:
        self.tokenizer, self.width, self.rules = tokenizer, width, rules

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        scores = scores - 1e4
        for row, rule in enumerate(self.rules):
            text = self.tokenizer.decode(input_ids[row, self.width :])
            for rank, rest in enumerate(r for r in rule(text) if r):
                scores[row, self.tokenizer(rest, add_special_tokens=False).input_ids[0]] = -rank
        return scores


def telling(*contents: str, close: str = CLOSE, end: str = " A<eos>") -> Rule:
    """Writes "so", a span of each content, "then" in between, and the answer."""

    def rest(text: str) -> Sequence[str]:
        done, tail = text.count(CLOSE), text.split(CLOSE)[-1]
        target = end
        if done < len(contents):
            target = f"{' then' if done else 'so'} {OPEN}{contents[done]}{close}"
        return [target[len(tail) :]] if target.startswith(tail) else [CLOSE, end]

    return rest


def own(lens: il.LatentModel, *rules: Rule, **options: Any) -> il.Run:
    """A run whose rows write by these rules."""
    inputs = [example(i) for i in range(len(rules))]
    width = lens.prompt(inputs).inputs["input_ids"].shape[1]
    wants = {"logits_processor": [Wants(lens.tokenizer, width, rules)]}
    return lens.run(inputs, generation=wants, **{"max_new_tokens": 48, **options})


def spelled(lens: il.LatentModel, run: il.Run, row: int = 0) -> str:
    return lens.tokenizer.decode(wrote(run, row))


def tale(*contents: str) -> str:
    return "so" + " then".join(f" {OPEN}{c}{CLOSE}" for c in contents) + " A<eos>"


TWO = telling(" red", " cube")


A_CUBE, RED_A, A_A = (" a", " cube"), (" red", " a"), (" a", " a")


@pytest.mark.parametrize(
    ("context", "selected"),
    [
        ("free", {"0": A_CUBE, "-1": RED_A, ":": A_A, "1:": RED_A}),
        ("fixed", {"0": A_CUBE, "1": RED_A, "-1": RED_A, "-2": A_CUBE, ":": A_A, ":-1": A_CUBE}),
    ],
)
def test_of_several_spans_those_selected_are_edited(
    context: str, selected: Mapping[str, tuple[str, str]]
) -> None:
    lens = lens_of("merged", answer=finds)
    run = own(lens, TWO)
    assert spelled(lens, run) == tale(" red", " cube")
    for index, wanted in selected.items():
        at = il.imagination[as_slice(index) if ":" in index else int(index)]
        result = lens.ablate(run, il.Rewrite("a"), at=at, context=context)
        assert spelled(lens, result.run) == tale(*wanted)
        assert result.run.answers == ["A"]
        # in free context the second is found in what is written anew, else where it was
        found = find_spans((result.run if context == "free" else run).tokens, 0)
        edited = [s.start for s, new in zip(found, wanted, strict=True) if new == " a"]
        assert result.landing.positions == {0: edited}
        if context == "fixed":  # token by token, all but the content
            ids = wrote(run)
            for old in [" red"] * (wanted[0] == " a") + [" cube"] * (wanted[1] == " a"):
                place = ids.index(lens.encode(old)[0])
                ids[place : place + 1] = lens.encode(" a")
            assert wrote(result.run) == ids


def test_spans_that_the_model_writes_anew_are_edited_too() -> None:
    """It goes on imagining where it has read " a": four spans instead of two."""
    lens = lens_of("merged", answer=finds)
    more = telling(" red", " cube", " e", " it")
    run = own(lens, lambda text: (more if " a" in text else TWO)(text), max_new_tokens=64)
    assert spelled(lens, run) == tale(" red", " cube")
    for at, wanted in (
        (il.imagination, (" a", " a", " a", " a")),
        (il.imagination[0], (" a", " cube", " e", " it")),
        (il.imagination[-1], (" red", " a", " e", " it")),  # the last of the unedited run
    ):
        result = lens.ablate(run, il.Rewrite("a"), at=at)
        assert spelled(lens, result.run) == tale(*wanted)
        assert len(result.landing.cells) == result.landing.fired == wanted.count(" a")
    fixed = lens.ablate(run, il.Rewrite("a"), at=il.imagination, context="fixed")
    assert spelled(lens, fixed.run) == tale(" a", " a")
    assert fixed.landing.fired == 1


def test_edits_of_one_span_compose_in_the_order_of_registration() -> None:
    lens, rule = lens_of("merged", answer=finds), telling(" red cube", " e")
    for edits, wanted in (
        ((il.Rewrite(" cube red"), il.Truncate(1)), " cube"),
        ((il.Truncate(1), il.Rewrite(lambda old: old + " e")), " red e"),
    ):
        with (
            lens.edit(edits[0], at=il.imagination[0]) as first,
            lens.edit(edits[1], at=il.imagination[:1]) as second,
        ):
            assert spelled(lens, own(lens, rule)) == tale(wanted, " e")
        assert first.rows == second.rows == [0]
    with (
        lens.edit(il.Delete(), at=il.imagination[0]),
        lens.edit(il.Rewrite("a"), at=il.imagination[0]),
        pytest.raises(il.EditTouchedNothing, match=r"Rewrite at imagination\[0\] .* no position"),
    ):
        own(lens, rule)  # nothing is left to rewrite


def test_delete_of_all_spans_ends() -> None:
    """A model that goes on imagining whatever is taken from it, in each spelling of the marker."""
    lens = lens_of("merged")

    def insists(text: str) -> Sequence[str]:
        tail = text.split(CLOSE)[-1]
        begun = tail.find("<")
        rest = f"{OPEN} red{CLOSE}"
        if begun >= 0 and rest.startswith(tail[begun:]):
            return [rest[len(tail) - begun :]]
        return [" " + rest, rest, "." + rest]

    assert len(find_spans(own(lens, insists, max_new_tokens=12).tokens, 0)) == 1
    with lens.edit(il.Delete(), at=il.imagination) as landing:
        run = own(lens, insists, max_new_tokens=12)
    assert find_spans(run.tokens, 0) == []
    assert len(wrote(run)) == 12
    assert len(landing.cells) > 12  # at a place it tries more than one spelling
    with lens.edit(il.Delete(), at=il.imagination[0]):
        run = own(lens, insists, max_new_tokens=12)
    assert len(find_spans(run.tokens, 0)) > 0


def test_two_deleted_at_once_leave_the_rest() -> None:
    lens = lens_of("merged", answer=finds)
    run = own(lens, TWO)
    result = lens.ablate(run, il.Delete(), at=il.imagination, context="fixed")
    assert spelled(lens, result.run) == "so  then  A<eos>"
    assert find_spans(result.run.tokens, 0) == []
    assert result.run.answers == ["A"]
    one = lens.ablate(run, il.Delete(), at=il.imagination[1], context="fixed")
    assert spelled(lens, one.run) == f"so {OPEN} red{CLOSE} then  A<eos>"


def test_spans_that_share_a_token_are_edited_apart() -> None:
    lens = lens_of("merged", answer=finds)
    text = f"{OPEN} red{CLOSE}{OPEN} cube{CLOSE}{OPEN}{CLOSE} A"
    run = said(lens, [text])
    assert sum("><" in token for token in run.tokens.texts(0, range(run.tokens.width))) == 3
    for at, edit, wanted in (
        (il.imagination[0], il.Rewrite("a"), f"{OPEN} a{CLOSE}{OPEN} cube{CLOSE}{OPEN}{CLOSE} A"),
        (il.imagination[1], il.Rewrite("a"), f"{OPEN} red{CLOSE}{OPEN} a{CLOSE}{OPEN}{CLOSE} A"),
        (
            il.imagination[2],
            il.Rewrite("a"),
            f"{OPEN} red{CLOSE}{OPEN} cube{CLOSE}{OPEN}a{CLOSE} A",
        ),
        (il.imagination, il.Rewrite("e"), f"{OPEN} e{CLOSE}{OPEN} e{CLOSE}{OPEN}e{CLOSE} A"),
        (il.imagination[0], il.Delete(), f"{OPEN} cube{CLOSE}{OPEN}{CLOSE} A"),
        (il.imagination[1], il.Delete(), f"{OPEN} red{CLOSE}{OPEN}{CLOSE} A"),
        (il.imagination[1:], il.Delete(), f"{OPEN} red{CLOSE} A"),
        (il.imagination, il.Delete(), " A"),
    ):
        result = lens.ablate(run, edit, at=at, context="fixed")
        assert spelled(lens, result.run) == wanted + "<eos>"
        assert result.run.answers == ["A"]
    free = lens.ablate(run, il.Delete(), at=il.imagination[1], metric=il.accuracy)
    assert spelled(lens, free.run).startswith(f"{OPEN} red{CLOSE}")


# ---- what is kept as it was --------------------------------------------------------------------

UNCLOSED = {
    "ended by its end token": telling(" red", close="<eos>"),
    "ended inside the marker": telling(" red", close="</think_im<eos>"),
    "ended by its length": telling(" red" * 20),
}


@pytest.mark.parametrize("context", ["free", "fixed"])
@pytest.mark.parametrize("kind", ["one token", "merged"])
def test_sham_changes_nothing(kind: str, context: str) -> None:
    """The same tokens and not a bit of difference, also of spans that were never closed."""
    lens = lens_of(kind, answer=lambda text: "e" if "red" in text else None)
    rules = (TWO, UNCLOSED["ended by its end token"], UNCLOSED["ended inside the marker"])
    for some, limit in ((rules, 48), ([UNCLOSED["ended by its length"]], 12), ([TWO], 20)):
        run = own(lens, *some, max_new_tokens=limit, keep_logits=True)
        result = lens.ablate(run, il.Sham(), at=il.imagination, context=context)
        assert [wrote(result.run, i) for i in range(len(run))] == [
            wrote(run, i) for i in range(len(run))
        ]
        n = min(run.logits.shape[1], result.run.logits.shape[1])
        assert torch.equal(result.run.logits[:, :n], run.logits[:, :n])
        assert torch.equal(result.before, result.after)
        assert result.landing.flags == {}
        assert result.landing.relative_change == 0.0
        assert result.landing.rows == list(range(len(run)))


@pytest.mark.parametrize("how", UNCLOSED)
def test_a_span_that_was_never_closed_is_closed_by_an_edit(how: str) -> None:
    lens = lens_of("merged", answer=lambda text: "A" if "A" in text else text[-6:])
    run = own(lens, UNCLOSED[how], max_new_tokens=18 if "length" in how else 48)
    assert not find_spans(run.tokens, 0)[0].closed
    free = lens.ablate(run, il.Rewrite("a"), at=il.imagination)
    assert spelled(lens, free.run) == tale(" a")
    fixed = lens.ablate(run, il.Rewrite("a"), at=il.imagination, context="fixed")
    end = "" if "length" in how else "<eos>"
    assert spelled(lens, fixed.run) == f"so {OPEN} a{CLOSE}{end}"
    assert find_spans(fixed.run.tokens, 0)[0].closed


def test_nothing_left_in_fixed_context_is_an_empty_text() -> None:
    lens = lens_of("one token", answer=lambda text: "e")
    run = said(lens, [f"{OPEN} ee", f"A{OPEN} e"], eos=False)
    assert [wrote(run, i)[-1:] for i in range(2)] == [lens.encode("e")] * 2
    result = lens.ablate(run, il.Delete(), at=il.imagination, context="fixed")
    assert result.texts_after == ("", "A")
    assert result.answers_after == (None, None)  # it stood in what was removed
    assert bool(result.after.isnan().all())


def test_the_answer_stays_where_it_was_in_fixed_context() -> None:
    """The finder would look elsewhere once the marker before the answer is gone."""
    behind = il.answers.first_found(il.answers.after(CLOSE), il.answers.tail)
    lens = lens_of("merged", answer=behind)
    run = own(lens, TWO)
    assert run.answers == ["A"]
    result = lens.ablate(run, il.Delete(), at=il.imagination[1], context="fixed")
    assert result.run.answers == ["A"]
    ids = wrote(result.run)[:-1]
    wanted = read(lens.model, alone(lens, 0), ids)[-1, ids[-1]]
    assert lens.decode(ids[-1]) == "A"
    assert float(result.after - wanted) == pytest.approx(0, abs=1e-9)


@pytest.mark.parametrize("name", ["rewrite", "delete"])
def test_a_batch_gives_what_its_rows_give_alone(name: str) -> None:
    """Rows that end by their length, by themselves, with two spans and with none."""
    lens = lens_of("merged", answer=lambda text: "o" if "o" in text else None)
    endless = telling(" red", end=" A and so on and so on and so on and so on and so on and so on")
    rules = (endless, TWO, telling(end="so it goes on and on and on and on and on and on and on"))
    edit = il.Rewrite("a much longer text") if name == "rewrite" else EDITS[name](lens)
    together = lens.ablate(own(lens, *rules, max_new_tokens=24), edit, at=il.imagination)
    assert together.landing.rows == [0, 1]
    assert together.landing.flags == {2: "not_emitted"}
    order = [2, 0, 1]
    inputs = [example(i) for i in order]
    width = lens.prompt(inputs).inputs["input_ids"].shape[1]
    wants = Wants(lens.tokenizer, width, [rules[i] for i in order])
    mixed = lens.ablate(
        lens.run(inputs, generation={"logits_processor": [wants]}, max_new_tokens=24),
        edit,
        at=il.imagination,
    )
    for row, rule in enumerate(rules):
        assert wrote(mixed.run, order.index(row)) == wrote(together.run, row)
        torch.testing.assert_close(
            mixed.after[order.index(row)], together.after[row], rtol=0, atol=1e-9
        )
        width = lens.prompt(example(row)).inputs["input_ids"].shape[1]
        wants = {"logits_processor": [Wants(lens.tokenizer, width, [rule])]}
        run = lens.run(example(row), generation=wants, max_new_tokens=24)
        if row == 2:
            with pytest.raises(il.EditTouchedNothing, match="wrote 0 to 0 spans <think_image>"):
                lens.ablate(run, edit, at=il.imagination)
            assert wrote(together.run, row) == wrote(run)
            continue
        single = lens.ablate(run, edit, at=il.imagination)
        assert wrote(single.run) == wrote(together.run, row)
        torch.testing.assert_close(single.after[0], together.after[row], rtol=0, atol=1e-9)


def test_a_longer_text_leaves_room_for_the_answer() -> None:
    lens = lens_of("merged", answer=finds)
    limit = len(wrote(own(lens, TWO)))
    run = own(lens, TWO, max_new_tokens=limit)
    result = lens.ablate(run, il.Rewrite("a long long long text"), at=il.imagination)
    assert result.answers_after == ("A",)


def test_a_limit_among_the_options_of_generate_holds_for_edits_too() -> None:
    lens = lens_of("merged", answer=lambda text: "so")
    run = own(lens, telling(" red", end=" and so on" * 9), max_new_tokens=20)
    run = lens.run(example(), generation={**run.options[2], "max_new_tokens": 20})
    assert len(wrote(run)) == 20
    result = lens.ablate(run, il.Rewrite("cube"), at=il.imagination)
    assert len(wrote(result.run)) == 20


def test_a_model_that_would_imagine_again_may_not_for_one_step() -> None:
    lens = lens_of("merged", answer=finds)
    run = own(lens, TWO)
    result = lens.ablate(run, il.Delete(), at=il.imagination[0])
    inputs = alone(lens, 0)
    width = inputs["input_ids"].shape[1]
    ids, opened = wrote(run), find_spans(run.tokens, 0)[0].opened - width
    assert wrote(result.run)[:opened] == ids[:opened]
    assert wrote(result.run)[opened] != ids[opened]
    whole = longer(inputs, ids[:opened])
    out = lens.model.generate(
        **whole,
        max_new_tokens=48 - opened,
        logits_processor=[Wants(lens.tokenizer, width, [TWO]), Ban(width + opened, ids[opened])],
    )
    assert wrote(result.run) == out[0, width:].tolist()


def test_sampling_goes_on_from_the_same_stream() -> None:
    lens = lens_of("merged", answer=lambda text: text[-1:])
    rules = (telling(" red", end=" A"),)  # and then as it likes
    width = lens.prompt([example()]).inputs["input_ids"].shape[1]
    options = {"do_sample": True, "temperature": 3.0}

    def run(seed: int) -> il.Run:
        wants = Wants(lens.tokenizer, width, [lambda t: () if " A" in t else rules[0](t)])
        return lens.run(
            [example()], generation={"logits_processor": [wants], **options}, seed=seed,
            max_new_tokens=20,
        )  # fmt: skip

    for seed in (0, 1):
        result = lens.ablate(run(seed), il.Sham(), at=il.imagination)
        assert result.texts_after == result.texts_before


# ---- beside edits and reads of states ----------------------------------------------------------


def test_states_are_captured_at_what_was_written_in_the_end() -> None:
    lens = lens_of("merged", answer=finds)
    site, at = "blocks.1.hook_resid_post", (il.imagination, il.answer)
    rules = (TWO, telling(" red"), telling())
    with lens.edit(il.Rewrite("a cube"), at=il.imagination[0]):
        run = own(lens, *rules, names_filter=site, positions=at)
        _, cache = lens.run_with_cache(run, names_filter=site)
    assert spelled(lens, run, 1) == tale(" a cube")
    for row in range(3):
        wanted = sorted({c for p in at for c in p.resolve(run.tokens, row).tolist()})
        held = run.cache.columns[site][row].tolist()
        assert [c for c in held if c >= 0] == wanted
        mine = run.cache[site][row, : len(wanted)]
        torch.testing.assert_close(mine, cache[site][row, wanted], rtol=0, atol=1e-9)


@pytest.mark.parametrize("kind", ["one token", "merged"])
@pytest.mark.parametrize("context", ["free", "fixed"])
def test_a_site_by_name_edits_the_states_of_what_is_written(context: str, kind: str) -> None:
    lens = lens_of(kind, answer=finds)
    run = own(lens, TWO, telling(" red"), max_new_tokens=90)
    site = "blocks.0.hook_resid_post"
    result = lens.ablate(run, il.Zero(), at=il.imagination, site=site, context=context)
    assert bool((result.after != result.before).all())
    read_from = result.run or run
    for row in range(2):
        columns = il.imagination.resolve(read_from.tokens, row).tolist()
        assert result.landing.positions[row] == columns
        assert "".join(run.tokens.texts(row, columns)) in (" red cube", " red")
    assert {site for *_, site, _ in result.landing.cells} == {"blocks.0.hook_resid_post"}
    last = lens.ablate(run, il.Zero(), at=il.imagination[-1], site=site, context="fixed")
    assert last.landing.positions[0] == il.imagination[1].resolve(run.tokens, 0).tolist()
    with pytest.raises(il.PositionError, match=r"imagination\[-1\] counts from the end"):
        lens.ablate(run, il.Zero(), at=il.imagination[-1], site=site)


def test_states_of_another_runs_imagination_are_patched_in() -> None:
    lens = lens_of("merged", answer=finds)
    base, source = own(lens, telling(" red")), own(lens, telling(" cube"))
    site = "blocks.0.hook_resid_post"
    result = lens.patch(
        base=base, source=source, site=site, at=il.imagination, metric=il.log_prob, context="fixed"
    )
    (column,) = il.imagination.resolve(base.tokens, 0).tolist()
    with torch.no_grad():
        given = lens.run_with_cache(source, names_filter=site)[1][site][0, column]

    def put(act: torch.Tensor, hook: Any) -> torch.Tensor:
        act = act.clone()
        act[0, column] = given
        return act

    with torch.no_grad():
        logits = lens.run_with_hooks(base, fwd_hooks=[(site, put)])
    at = int(il.before_answer.resolve(base.tokens, 0)[0])
    wanted = logits[0, at].log_softmax(-1)[lens.encode("A")[0]]
    assert float(result.after - wanted) == pytest.approx(0, abs=1e-9)


def test_an_edit_of_text_and_one_of_states_work_side_by_side() -> None:
    lens = lens_of("merged", answer=finds)
    zero = {"edit": il.Zero(), "at": il.imagination, "site": "blocks.0.hook_resid_post"}
    with lens.edit(il.Rewrite("a cube"), at=il.imagination[0]), lens.edit(**zero) as states:
        run = own(lens, TWO)
    assert spelled(lens, run) == tale(" a cube", " cube")
    assert set(il.imagination.resolve(run.tokens, 0)) <= set(states.positions[0])


def test_a_run_made_under_an_edit_is_read_under_it_and_no_other_is() -> None:
    lens = lens_of("merged", answer=finds)
    plain = own(lens, TWO)
    with lens.edit(il.Rewrite("a"), at=il.imagination) as landing:
        run = own(lens, TWO)
        lens.run_with_cache(run, names_filter="blocks.0.hook_resid_post")
        with pytest.raises(il.EditTouchedNothing, match="nothing was written in this call"):
            lens.run_with_cache(plain)
        with pytest.raises(il.EditTouchedNothing, match="nothing was written in this call"):
            lens.run_with_cache(example())
    assert len(landing.cells) == 2
    assert spelled(lens, lens.rerun(run)) == tale(" red", " cube")
    registered = lens.registry.add("hook_latent", il.Rewrite("a"), at=il.imagination[0])
    assert spelled(lens, own(lens, TWO)) == tale(" a", " cube")
    assert repr(lens.registry).endswith("  text: Rewrite at imagination[0]")
    lens.registry.remove(registered)
    assert lens.registry.text_edits() == []


def test_relative_change_is_the_share_of_tokens_that_differ() -> None:
    lens = lens_of("merged", answer=finds)
    run = own(lens, telling(" red cube red cube"))
    for edit, share in ((il.Truncate(2), 1 - 2 * 2 / 6), (il.Delete(), 1.0), (il.Sham(), 0.0)):
        landing = lens.ablate(run, edit, at=il.imagination, context="fixed").landing
        assert landing.relative_change == pytest.approx(share)
    assert landing.sites == ("text",)
    assert text_change([], []) == 0.0
    assert text_change([1], [2]) == 1.0


def test_resample_takes_another_examples_text_and_the_same_one_for_all_spans() -> None:
    lens = lens_of("merged", answer=finds)
    words = [(" red", " cube"), (" a", " e"), (" so", " it")]
    reference = own(lens, *(telling(*w) for w in words))
    drawn = set()
    for seed in range(4):
        edit = il.Resample(reference, seed=seed)
        result = lens.ablate(reference, edit, at=il.imagination, context="fixed")
        for row in range(3):
            found = tuple(SPAN.findall(spelled(lens, result.run, row)))
            (taken,) = [i for i, w in enumerate(words) if w == tuple(c for c, _ in found)]
            assert taken != row
            drawn.add((row, taken))
    one = lens.ablate(own(lens, telling(*words[0])), edit, at=il.imagination, context="fixed")
    assert spelled(lens, one.run) == spelled(lens, result.run, 0)  # by its example, not its row
    assert len(drawn) > 3
    few = own(lens, TWO, telling(" e"), telling(" a", " a a"), telling(" it", " it it"))
    pairs = set()
    for seed in range(6):
        edit = il.Resample(few, seed=seed)
        run = lens.ablate(own(lens, TWO), edit, at=il.imagination, context="fixed").run
        pairs.add(tuple(c for c, _ in SPAN.findall(spelled(lens, run))))
    both = {(" a", " a a"), (" it", " it it")}
    assert pairs & both
    assert pairs <= both | {(" e", " a a"), (" e", " it it")}
    draws = lens.ablate(
        reference, il.Resample(reference, draws=3), at=il.imagination, context="fixed"
    )
    assert draws.after.shape == (3,)


# ---- whose family it is ------------------------------------------------------------------------


def save(folder: Path, kind: str, **keys: Any) -> None:
    model, processor = built(kind)
    config = type(model.config).from_dict(model.config.to_dict() | keys)
    config.save_pretrained(folder)
    model.generation_config.save_pretrained(folder)
    processor.tokenizer.save_pretrained(folder)
    processor.image_processor.save_pretrained(folder)
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def test_markers_that_are_tokens_make_a_folder_a_capimagine(tmp_path: Path) -> None:
    save(tmp_path, "one token")
    lens = il.load(tmp_path, dtype=torch.float64)
    assert lens.family == SPEC
    assert lens.spec is None
    assert "capimagine: imagines in words, between '<think_image>'" in str(lens.describe())
    run = own(lens, TWO)
    result = lens.ablate(run, il.Rewrite("a"), at=il.imagination[0], context="fixed")
    assert spelled(lens, result.run) == tale(" a", " cube")
    assert result.run.answers == ["A"]  # by the family's own finder
    off = il.load(tmp_path, spec=False)
    assert off.family is None
    assert off.describe().family == "none"


def test_without_such_tokens_it_is_named_by_the_user_the_config_or_the_hub(tmp_path: Path) -> None:
    save(tmp_path, "merged")
    assert il.load(tmp_path).family is None
    assert il.load(tmp_path, spec=SPEC).family == SPEC
    save(tmp_path, "merged", imaginelens_family="capimagine")
    assert il.load(tmp_path).family == SPEC
    tokenizer = tokenizers()["merged"]
    config = type("Config", (), {"_name_or_path": "Michael4933/CapImagine-7B"})()
    assert family_of(config, tokenizer) == SPEC
    assert family_of(config, None) == SPEC
    config._name_or_path = "Qwen/Qwen2.5-VL-7B-Instruct"
    assert family_of(config, tokenizer) is None
    assert family_of(config, byte_level(OPEN)) is None


def test_latent_tokens_come_before_words() -> None:
    config = type("Config", (), {})()
    both = byte_level(*il.FAMILIES["monet"].strings, OPEN, CLOSE)
    assert family_of(config, both) == il.FAMILIES["monet"]
    config.imaginelens_family = "capimagine"
    assert family_of(config, both) == SPEC


def test_a_family_of_ones_own_markers() -> None:
    spec = il.TextSpec(name="mine", open="<see>", close="</see>")
    lens = lens_of("bytes", spec=spec, answer=finds)
    assert "mine: imagines in words, between '<see>' and '</see>'" in str(lens.describe())
    run = said(lens, ["<see> a</see>B"])
    at = il.imagination.between("<see>", "</see>")
    result = lens.ablate(run, il.Rewrite("e"), at=at, context="fixed")
    assert result.texts_after == ("<see> e</see>B<eos>",)
    with pytest.raises(il.EditTouchedNothing, match=r"wrote 0 to 0 spans <think_image> \.\.\."):
        lens.ablate(run, il.Rewrite("e"), at=il.imagination)


# ---- what is refused ---------------------------------------------------------------------------


def one_sentence(error: pytest.ExceptionInfo[Any]) -> None:
    message = str(error.value)
    assert "\n" not in message
    assert len(message) < 400
    assert not re.search(r"\. [A-Z]", message)


@pytest.mark.parametrize(
    "edit", [il.Zero(), il.Steer(torch.ones(64)), il.Constant(), il.AddNoise(1.0)]
)
def test_edits_of_states_are_refused_at_text(edit: il.Edit) -> None:
    lens, run = told("merged")
    name = type(edit).__name__
    with pytest.raises(il.InputError, match=f"{name} edits states, and il.imagination") as error:
        lens.ablate(run, edit, at=il.imagination)
    one_sentence(error)
    with pytest.raises(il.InputError, match="selects text"), lens.edit(edit, at=il.imagination):
        pass


@pytest.mark.parametrize("edit", [il.Rewrite("a"), il.Truncate(), il.Delete()])
def test_edits_of_text_are_refused_at_states(edit: il.Edit) -> None:
    lens, run = told("merged")
    name = type(edit).__name__
    for where in (
        {"at": il.latent},
        {"at": il.image},
        {"at": il.imagination, "site": "blocks.0.hook_resid_post"},
        {"at": il.imagination, "site": ["hook_latent", "blocks.0.hook_resid_post"]},
    ):
        with pytest.raises(il.InputError, match=f"{name} edits written imagination") as error:
            lens.ablate(run, edit, **where)
        one_sentence(error)
    one = np.array([0])
    cell = il.EditContext(site="", rows=one, positions=one, ordinals=one, steps=one)
    with pytest.raises(il.InputError, match="edits written imagination, not states"):
        edit.apply(torch.zeros(1, 2), cell)


@pytest.mark.parametrize(
    ("make", "kind", "message"),
    [
        (lambda: il.Rewrite(["a", "e"]), il.InputError, "has 2 texts and the run 3 rows"),
        (lambda: il.Rewrite(["a"] * 4), il.InputError, "has 4 texts and the run 3 rows"),
        (lambda: il.Rewrite(lambda old: None), il.InputError, "returned None for 'red cube'"),
        (lambda: il.Rewrite(f"a{CLOSE}b"), il.InputError, "would end the span; leave it out"),
        (lambda: il.Truncate(-1), il.InputError, r"Truncate\(-1\) keeps no number of tokens"),
        (lambda: il.Swap(torch.zeros(3, 2, 64)), il.DonorError, "from a run, not from Tensor"),
        (lambda: il.Resample(), il.DonorError, r"pass il\.Resample\(lens\.run"),
        (
            lambda: il.Swap(said(lens_of("merged"), TEXTS[:2])),
            il.DonorError,
            "donor of Swap has 2 rows and the run has 3",
        ),
        (
            lambda: il.Swap(said(lens_of("one token"), TEXTS)),
            il.DonorError,
            "whose tokenizer has other tokens",
        ),
        (
            lambda: il.Resample(said(lens_of("merged"), ["A", "B", "A"])),
            il.DonorError,
            "no other example with a span number 0 among the 3",
        ),
    ],
)
def test_what_makes_no_text_is_refused(
    make: Callable[[], il.Edit], kind: type[Exception], message: str
) -> None:
    lens, run = told("merged")
    for context in ("free", "fixed"):
        with pytest.raises(kind, match=message) as error:
            lens.ablate(run, make(), at=il.imagination, context=context)
        one_sentence(error)
    assert lens.registry.entries == []


@pytest.mark.parametrize("to", [3, None, ["a", None]])
def test_what_is_no_text_at_all_is_refused(to: Any) -> None:
    edit = il.Rewrite("a")
    object.__setattr__(edit, "to", to)  # the type checks of the tests would come first
    with pytest.raises(il.InputError, match="is no text; give a string, a list") as error:
        edit.__post_init__()
    one_sentence(error)


def test_a_donor_that_wrote_no_such_span_leaves_the_row() -> None:
    lens, run = told("merged")
    some = said(lens, [TEXTS[2], "A", TEXTS[0]])
    for context in ("free", "fixed"):
        result = lens.swap(
            run, some, at=il.imagination, context=context, metric=il.accuracy,
            source_answers=["A", "B", "A"],
        )  # fmt: skip
        assert result.landing.flags == {1: "not_emitted"}
        assert result.landing.donorless == {1}
        assert result.landing.rows == [0, 2]
    assert wrote(result.run, 1) == wrote(run, 1)
    none = said(lens, ["A", "B", "A"])
    with pytest.raises(il.EditTouchedNothing, match=r"any of the rows \[0, 1, 2\]") as error:
        lens.swap(run, none, at=il.imagination, metric=il.accuracy, source_answers=["A", "B", "A"])
    one_sentence(error)


def test_a_donor_with_fewer_spans_gives_those_it_has() -> None:
    lens = lens_of("merged", answer=finds)
    base, donor = own(lens, TWO), own(lens, telling(" e"))
    for context in ("free", "fixed"):
        result = lens.ablate(base, il.Swap(donor), at=il.imagination, context=context)
        assert spelled(lens, result.run) == tale(" e", " cube")
        assert len(result.landing.cells) == 1


def test_the_same_text_is_no_edit() -> None:
    lens, run = told("merged")
    for edit in (il.Rewrite(lambda old: old), il.Swap(run), il.Truncate(9)):
        for context in ("free", "fixed"):
            with pytest.raises(il.EditTouchedNothing, match="all 3 touched rows bit for bit"):
                lens.ablate(run, edit, at=il.imagination, context=context, metric=il.accuracy)
    mixed = lens.ablate(run, il.Rewrite(["red cube", "e", "e"]), at=il.imagination, context="fixed")
    assert mixed.landing.flags == {0: "identical_donor"}


def test_the_same_text_in_other_tokens_is_no_edit_either() -> None:
    """A model may spell a word in another way than its tokenizer would."""
    lens = lens_of("merged", answer=finds)
    run = said(lens, [f"{OPEN} red{CLOSE}A"])
    (red,) = lens.encode(" red")
    letters = lens.tokenizer.convert_tokens_to_ids(["Ġ", "r", "e", "d"])
    at = wrote(run).index(red)
    ids = [*wrote(run)[:at], *letters, *wrote(run)[at + 1 :]]
    width = run.tokens.prompt_width
    run = lens.run([example()], generation={"logits_processor": [Say(width, [ids])]})
    assert wrote(run) == ids
    with pytest.raises(il.EditTouchedNothing, match="bit for bit"):
        lens.ablate(run, il.Rewrite("red"), at=il.imagination, context="fixed")


def test_a_span_that_was_not_written_is_an_error_with_the_counts() -> None:
    lens, run = told("merged")
    message = "wrote 1 to 1 spans <think_image> ... </think_image>"
    for at in (il.imagination[1], il.imagination[1:], il.imagination[-2]):
        with pytest.raises(il.EditTouchedNothing, match=re.escape(message)) as error:
            lens.ablate(run, il.Rewrite("a"), at=at)
        one_sentence(error)
    with (
        pytest.raises(il.EditTouchedNothing, match="wrote 0 to 2 spans"),
        lens.edit(il.Rewrite("a"), at=il.imagination[5]),
    ):
        own(lens, TWO, telling())


def test_markers_of_two_kinds_at_once_are_refused() -> None:
    lens = lens_of("merged")
    other = il.imagination.between("<see>", "</see>")
    with (
        lens.edit(il.Rewrite("a"), at=il.imagination),
        lens.edit(il.Rewrite("a"), at=other),
        pytest.raises(il.InputError, match=r"2 kinds of markers at once \(<see>, <think_image>\)"),
    ):
        own(lens, TWO)


def test_a_model_without_a_tokenizer_is_refused() -> None:
    model, processor = built("one token")
    lens = il.LatentModel(model, spec=SPEC)
    inputs = dict(il.LatentModel(model, processor, spec=SPEC).prompt(example()).inputs)
    run = lens.run(inputs, max_new_tokens=2)
    with pytest.raises(il.InputError, match="takes a tokenizer, and this model has none") as error:
        il.imagination.resolve(run.tokens, 0)
    one_sentence(error)
    with (
        pytest.raises(il.InputError, match="takes a tokenizer"),
        lens.edit(il.Rewrite("a"), at=il.imagination),
    ):
        lens.run(inputs, max_new_tokens=2)
