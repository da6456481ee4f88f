"""Pairs from lists, files and datasets: lawful partners, unknown answers, round trips."""

import dataclasses
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import imaginelens as il
from imaginelens.hooks.inputs import content_key
from imaginelens.hooks.pairs import check_answers
from imaginelens.hooks.partners import draw_partners


def picture(seed: int = 0, size: tuple[int, int] = (12, 8)) -> Image.Image:
    values = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    return Image.fromarray(values)


def example(seed: int = 0, **others: Any) -> dict[str, Any]:
    return {"images": picture(seed), "text": f"question {seed}", **others}


def answered(answers: str) -> list[dict[str, Any]]:
    return [example(i, answer=answer) for i, answer in enumerate(answers)]


def of_text(base: str = "abc", source: str = "def", **parts: Any) -> il.Pairs:
    texts = [[{"text": f"{side} {i}"} for i in range(len(base))] for side in ("base", "source")]
    return il.Pairs(*texts, list(base), list(source), **parts)


def equal(one: il.Pairs, other: il.Pairs) -> bool:
    """Whether two Pairs hold the same, pictures by their pixels."""
    for side in ("base", "source"):
        for a, b in zip(getattr(one, side), getattr(other, side), strict=True):
            if content_key(a) != content_key(b):
                return False
            if {**a, "images": 0} != {**b, "images": 0}:
                return False
            if isinstance(a["images"], list) != isinstance(b["images"], list):
                return False
    names = ("base_answers", "source_answers", "groups", "history")
    return all(getattr(one, name) == getattr(other, name) for name in names)


def one_sentence(error: Any) -> str:
    message = str(error.value)
    assert "\n" not in message
    assert not message.endswith(".") or message.endswith("...")
    return message


# ---- pairs themselves ------------------------------------------------------------------------


def test_slices_and_selections_keep_every_part() -> None:
    rules = {"rule": lambda base, source, steps: "x"}
    pairs = of_text(groups=["g", "h", "g"], hypotheses=rules, history=["done"])
    for taken in (pairs[1:], pairs.select([1, 2]), pairs.select(np.array([1, -1]))):
        assert taken.base_answers == ("b", "c")
        assert taken.source_answers == ("e", "f")
        assert [e["text"] for e in taken.source] == ["source 1", "source 2"]
        assert taken.groups == ("h", "g")
        assert taken.history == ("done",)
        assert taken.hypotheses == rules
    assert pairs.select([2, 0, 2]).base_answers == ("c", "a", "c")
    assert [b["text"] for b, _ in pairs] == ["base 0", "base 1", "base 2"]


def test_what_was_done_is_shown() -> None:
    assert repr(of_text()) == "Pairs of 3 inputs (first: 'a' against 'd')"
    pairs = il.Pairs([{}], [{}], ["a"], [None], history=["one", "two"])
    assert repr(pairs) == "Pairs of 1 inputs (first: 'a' against unknown; do: one; two)"


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: of_text("ab", "c"), "unequal lengths .*'source_answers': 1"),
        (lambda: of_text(groups=[1, 2]), "unequal lengths .*'groups': 2"),
        (lambda: of_text("", ""), "Pairs is empty; give it at least one pair"),
        (lambda: of_text("abc", "dBf"), "pair 1 has the answer 'b' on both sides"),
        (lambda: of_text(groups=[1, None, 2]), "the group of pair 1 is None, expected a number or"),
        (lambda: of_text(groups=[1, 2, float("nan")]), "the group of pair 2 is nan"),
        (lambda: of_text(groups=[[1], [2], [3]]), r"the group of pair 0 is \[1\]"),
        (lambda: of_text().select([3]), r"select got 3, expected numbers of pairs 0..2"),
        (lambda: of_text().select([True, False, True]), "select got True, expected numbers"),
        (lambda: of_text().select([]), "Pairs is empty"),
    ],
)
def test_pairs_that_are_none_are_refused(make: Any, words: str) -> None:
    with pytest.raises(il.InputError, match=words) as error:
        make()
    one_sentence(error)


def test_answers_are_text_and_only_a_sources_may_be_unknown() -> None:
    for answer in (2, None, float("nan")):  # the runtime checks of the tests would see some, too
        with pytest.raises(il.InputError, match=r"the base answer of pair 1 is .*, expected text"):
            check_answers(1, answer, "x")
    with pytest.raises(il.InputError, match="the source answer of pair 2 is 7, expected text"):
        check_answers(2, "x", 7)
    assert dataclasses.replace(of_text(), source_answers=[None, "x", None]).source_answers == (
        None,
        "x",
        None,
    )


def test_single_pairs_are_taken_by_slice() -> None:
    with pytest.raises(TypeError, match=r"pairs\[1:2\], or pairs.base\[1\]"):
        of_text()[1]


# ---- partners --------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [2, 3, 20, 101])
@pytest.mark.parametrize("kinds", [2, 3, 6])
@pytest.mark.parametrize("grouped", [False, True])
def test_partners_are_a_permutation_into_other_answers_and_groups(
    n: int, kinds: int, grouped: bool
) -> None:
    for seed in range(10):
        rng = np.random.default_rng(seed)
        answers = [str(k) for k in rng.permutation(n) % kinds]
        groups = [int(k) for k in rng.permutation(n) // 3] if grouped and n > 10 else None
        partners = draw_partners(answers, groups, seed=seed)
        assert all(partners[i] != i for i in range(n))
        assert all(answers[k].casefold() != answers[i] for i, k in enumerate(partners))
        if groups is not None:
            assert all(groups[k] != groups[i] for i, k in enumerate(partners))
        if 2 * max(answers.count(a) for a in answers) <= n:  # and only then is there one
            assert sorted(partners) == list(range(n))
        assert partners == draw_partners(answers, groups, seed=seed)


def test_partners_differ_between_seeds_and_reach_every_possible_one() -> None:
    answers = list("aabbcc")
    seen = {(i, k) for seed in range(200) for i, k in enumerate(draw_partners(answers, seed=seed))}
    assert seen == {(i, k) for i in range(6) for k in range(6) if answers[i] != answers[k]}


def test_where_one_answer_is_too_frequent_its_partners_are_used_again() -> None:
    answers = list("aaaaaaaab")
    partners = draw_partners(answers, seed=0)
    assert partners[:8] == [8] * 8
    assert partners[8] < 8


def test_an_example_without_a_partner_is_named() -> None:
    with pytest.raises(il.InputError, match="example 0 has the answer 'x', and none of the 3 exam"):
        draw_partners(["x", "X ", " x"])
    with pytest.raises(
        il.InputError, match=r"example 1 has the answer 'y', and none .* in another"
    ):
        draw_partners(["y", "y", "x"], ["g", "h", "h"])  # 0 could go with 2


# ---- from lists ------------------------------------------------------------------------------


def test_single_examples_become_pairs_with_their_partners_answers() -> None:
    examples = answered("aabbcc")
    pairs = il.Pairs.from_examples(examples, seed=3)
    texts = [e["text"] for e in examples]
    assert [e["text"] for e in pairs.base] == texts
    assert pairs.base_answers == tuple("aabbcc")
    for source, answer in zip(pairs.source, pairs.source_answers, strict=True):
        assert examples[texts.index(source["text"])]["answer"] == answer
    assert pairs.history == ("SwapInstance(), seed 3",)
    assert equal(pairs, il.Pairs.from_examples(examples, seed=3))
    assert not equal(pairs, il.Pairs.from_examples(examples, seed=4))
    given = [example(i) for i in range(6)]
    assert equal(pairs, il.Pairs.from_examples(given, answers=list("aabbcc"), seed=3))


def test_groups_come_with_the_examples_in_a_list_or_from_the_pictures() -> None:
    examples = answered("abababab")
    ids = [0, 0, 1, 1, 2, 2, 3, 3]
    for i, one in enumerate(examples):
        one["images"] = picture(ids[i])
    named = il.Pairs.from_examples(examples, groups=ids)
    own = il.Pairs.from_examples([{**e, "group": g} for e, g in zip(examples, ids, strict=True)])
    by_picture = il.Pairs.from_examples(examples, groups="image")
    assert named.groups == own.groups == tuple(ids)
    assert by_picture.groups is not None
    number = {g: i for i, g in enumerate(dict.fromkeys(by_picture.groups))}
    assert [number[g] for g in by_picture.groups] == ids
    for pairs in (named, own, by_picture):
        assert all(b["images"] != s["images"] for b, s in pairs)
    ungrouped = [il.Pairs.from_examples(examples, seed=s) for s in range(5)]
    assert any(b["images"] == s["images"] for pairs in ungrouped for b, s in pairs)


def test_an_edit_of_single_examples_needs_a_partner_only_if_it_takes_something_from_it() -> None:
    alike = answered("aaa")
    blurred = il.Pairs.from_examples(alike, edit=il.BlurImage(2.0), seed=1)
    assert blurred.source_answers == (None, None, None)
    assert blurred.history == ("BlurImage(radius=2.0), seed 1",)
    with pytest.raises(il.InputError, match="example 0 has the answer 'a', and none"):
        il.Pairs.from_examples(alike, edit=il.SwapImage())
    mixed = il.Pairs.from_examples(answered("ab"), edit=il.SwapImage())
    assert [s["text"] for s in mixed.source] == ["question 0", "question 1"]
    assert [s["images"] for s in mixed.source] == [picture(1), picture(0)]
    assert mixed.history == ("SwapInstance(), seed 0", "SwapImage(), seed 0")[1:]


def test_paths_are_opened(tmp_path: Path) -> None:
    picture(0).save(tmp_path / "a.png")
    examples = [
        {"images": str(tmp_path / "a.png"), "text": "q", "answer": "a"},
        {"images": [tmp_path / "a.png", picture(1)], "text": "q", "answer": "b"},
    ]
    pairs = il.Pairs.from_examples(examples)
    assert pairs.base[0]["images"] == picture(0)
    assert pairs.base[1]["images"] == [picture(0), picture(1)]


@pytest.mark.parametrize(
    ("examples", "given", "words"),
    [
        ([], {}, "there are no rows to read; give at least one"),
        ([{"text": "q"}], {}, r"example 0 has no 'answer', only \['images', 'text'\]; add it"),
        ([{"images": None, "answer": "a"}], {}, r"example 0 has no 'text', only"),
        ([{"text": 3, "answer": "a"}], {}, "example 0 has 3 under 'text', expected text; convert"),
        ([{"text": "q", "answer": 3}], {}, "example 0 has 3 under 'answer', expected text"),
        ([{"text": "q", "images": 3, "answer": "a"}], {}, "has an image that is a int, expected a"),
        (answered("ab"), {"answers": ["a"]}, "1 answers were given for 2 inputs; give one each"),
        (answered("ab"), {"groups": [1, 2, 3]}, "3 groups were given for 2 inputs"),
        (answered("ab"), {"groups": [[1], [2]]}, r"the group of pair 0 is \[1\]"),
        (answered("ab"), {"groups": [np.zeros(2)] * 2}, r"the group of pair 0 is array"),
        (
            [{"text": "q", "answer": "a"}],
            {"groups": "image"},
            "example 0 has no picture to group by",
        ),
        (answered("ab"), {"groups": [1, None]}, "example 1 has no group and example 0 has one"),
        (answered("ab"), {"answers": "ab"}, "answers is a str, expected a list, one for each"),
    ],
)
def test_lists_that_are_no_examples_are_refused(examples: Any, given: Any, words: str) -> None:
    with pytest.raises(il.InputError, match=words) as error:
        il.Pairs.from_examples(examples, **given)
    one_sentence(error)


# ---- do --------------------------------------------------------------------------------------


def test_do_edits_the_base_with_what_the_source_has() -> None:
    pairs = il.Pairs.from_examples(answered("abc"), seed=1)
    done = pairs.do(il.SwapImage(), seed=2)
    for i, (base, source) in enumerate(done):
        assert base is pairs.base[i]
        assert source["text"] == base["text"]
        assert source["images"] is pairs.source[i]["images"]
    assert done.base_answers == pairs.base_answers
    assert done.source_answers == (None, None, None)
    whole = pairs.do(il.SwapInstance())
    assert [dict(s) for s in whole.source] == [dict(s) for s in pairs.source]
    assert whole.source_answers == pairs.source_answers


def test_history_tells_what_the_sources_were_made_of_and_nothing_else() -> None:
    pairs = il.Pairs.from_examples(answered("abc"), groups=["x", "y", "z"], seed=1)
    blurred = pairs.do(il.BlurImage(2.0), seed=7)
    assert blurred.history == ("BlurImage(radius=2.0), seed 7",)  # the partners play no part
    local = blurred.do(il.PasteRegion((0, 0, 4, 4)))  # a blurred corner: they do
    assert local.history == (
        "BlurImage(radius=2.0), seed 7",
        "PasteRegion(box=(0, 0, 4, 4)), seed 0",
    )
    corner = (0, 0, 4, 4)
    for base, source, blur in zip(local.base, local.source, blurred.source, strict=True):
        assert source["images"].crop(corner) == blur["images"].crop(corner)
        assert source["images"].crop((4, 0, 12, 8)) == base["images"].crop((4, 0, 12, 8))
    assert json.loads(json.dumps(local.history)) == list(local.history)
    assert local[1:].history == local.history
    assert local.groups == ("x", "y", "z")
    assert "do: BlurImage(radius=2.0), seed 7; PasteRegion" in repr(local)


def test_an_edit_is_the_same_in_whatever_pairs_an_example_is() -> None:
    pairs = il.Pairs.from_examples(answered("abcd"))
    noisy = pairs.do(il.NoiseImage(20.0), seed=3)
    again = pairs.select([3, 1]).do(il.NoiseImage(20.0), seed=3)
    assert [content_key(s) for s in again.source] == [
        content_key(noisy.source[3]),
        content_key(noisy.source[1]),
    ]
    other = pairs.do(il.NoiseImage(20.0), seed=4)
    assert all(a["images"] != b["images"] for a, b in zip(noisy.source, other.source, strict=True))


def test_answers_to_the_edited_inputs_are_given_or_unknown() -> None:
    pairs = il.Pairs.from_examples(answered("abc"))
    blank = il.BlankImage()
    assert pairs.do(blank).source_answers == (None, None, None)
    assert pairs.do(blank, answers=["x", None, "y"]).source_answers == ("x", None, "y")
    told = pairs.do(blank, answers=lambda base, source: base["text"] + source["text"][-1:])
    assert told.source_answers == tuple(f"question {i}{i}" for i in range(3))
    assert pairs.do(il.SwapInstance(), answers=["x", "y", "z"]).source_answers == ("x", "y", "z")
    with pytest.raises(il.InputError, match="pair 0 has the answer 'a' on both sides"):
        pairs.do(blank, answers=["a", "x", "y"])
    with pytest.raises(il.InputError, match="2 answers were given for 3 inputs; give one each"):
        pairs.do(blank, answers=["x", "y"])
    with pytest.raises(il.InputError, match="answers is a str, expected a list, one for each"):
        pairs.do(blank, answers="xyz")


def test_only_whole_inputs_keep_their_hypotheses() -> None:
    task = il.load("latent-content").task(n=4)
    whole = task.do(il.SwapInstance())
    assert whole.hypotheses == task.hypotheses
    predicted = [whole.hypotheses["content"](b, s, None) for b, s in whole]
    assert tuple(predicted) == whole.source_answers == task.source_answers
    for edit in (il.SwapImage(), il.BlurImage(3.0)):
        assert task.do(edit).hypotheses == {}
        assert all("hunt" not in source for source in task.do(edit).source)
        assert all("hunt" in base for base in task.do(edit).base)


def test_unknown_answers_flow_through_metrics_that_need_none() -> None:
    lens = il.load("latent-content", dtype=torch.float64)
    pairs = lens.task(n=4).do(il.SwapImage())
    given = {"base_answers": pairs.base_answers, "source_answers": pairs.source_answers}
    runs = lens.run(pairs.base), lens.run(pairs.source)
    for metric in (il.kl, il.log_prob, il.prob, il.base_answer):
        result = lens.swap(*runs, metric=metric, **given)
        assert result.after.isfinite().all()
        assert len(result.after) == 4
    assert (lens.swap(*runs, metric=il.kl, **given).after > 1.0).any()
    for metric in (il.logit_diff, il.source_answer):
        with pytest.raises(il.InputError, match="compares two answers and example 0 has no source"):
            lens.swap(*runs, metric=metric, **given)


# ---- JSON lines ------------------------------------------------------------------------------


def write_lines(folder: Path, *rows: Any, name: str = "data.jsonl") -> Path:
    path = folder / name
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def line(image: Any = "a.png", text: str = "q", answer: str = "x", **others: Any) -> dict[str, Any]:
    return {"images": image, "text": text, "answer": answer, **others}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "sub").mkdir()
    for seed, name in enumerate(("a.png", "b.png", "sub/c.png")):
        picture(seed).save(tmp_path / name)
    return tmp_path


def test_lines_with_their_sources_are_pairs_as_they_stand(folder: Path) -> None:
    path = write_lines(
        folder,
        line("a.png", "wo?", "x", group=4, kind="é", source=line("sub/c.png", "when?", "y")),
        "",
        line(["a.png", "b.png"], "who?", "z", group=5, source={"images": None, "question": "?"}),
    )
    pairs = il.Pairs.from_jsonl(path)
    assert pairs.base[0] == {"images": picture(0), "text": "wo?", "kind": "é"}
    assert pairs.source[0] == {"images": picture(2), "text": "when?"}
    assert pairs.base[1]["images"] == [picture(0), picture(1)]
    assert pairs.source[1] == {"images": None, "text": "?"}
    assert pairs.base_answers == ("x", "z")
    assert pairs.source_answers == ("y", None)
    assert pairs.groups == (4, 5)
    assert pairs.history == ()
    assert equal(pairs, il.Pairs.from_jsonl(str(path)))
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes().replace(b"\n", b"\r\n"))  # by Windows
    assert equal(pairs, il.Pairs.from_jsonl(path))
    swapped = il.Pairs.from_jsonl(path, edit=il.SwapText())
    assert equal(swapped, pairs.do(il.SwapText()))


def test_two_lines_with_one_key_are_base_and_source(folder: Path) -> None:
    rows = [("p", "x"), ("q", "y"), ("p", "z"), ("q", "w")]
    path = write_lines(folder, *(line(answer=a, pair=p, n=i) for i, (p, a) in enumerate(rows)))
    pairs = il.Pairs.from_jsonl(path, pair="pair")
    assert [(b["n"], s["n"]) for b, s in pairs] == [(0, 2), (1, 3)]
    assert pairs.base_answers == ("x", "y")
    assert pairs.source_answers == ("z", "w")


def test_single_lines_get_partners_as_single_examples_do(folder: Path) -> None:
    rows = [line("a.png", "1", "x"), line("b.png", "2", "y"), line("sub/c.png", "3", "x")]
    path = write_lines(folder, *rows)
    examples = [{**row, "images": picture(i)} for i, row in enumerate(rows)]
    assert equal(il.Pairs.from_jsonl(path, seed=5), il.Pairs.from_examples(examples, seed=5))
    blank = il.BlankImage()
    assert equal(
        il.Pairs.from_jsonl(path, edit=blank), il.Pairs.from_examples(examples, edit=blank)
    )


def test_keys_can_have_other_names_and_pictures_can_be_the_groups(folder: Path) -> None:
    (folder / "copy.bmp").write_bytes(b"")
    picture(0).save(folder / "copy.bmp")  # another file, another format, the same pixels
    rows = [
        {"img": "a.png", "prompt": "1", "gold": "x", "source": "vstar", "scene": "s"},
        {"img": "copy.bmp", "prompt": "2", "gold": "y", "source": "vstar", "scene": "t"},
        {"img": "b.png", "prompt": "3", "gold": "z", "source": "vstar", "scene": "t"},
    ]
    path = write_lines(folder, *rows)
    names = {"images": "img", "text": "prompt", "answer": "gold", "source": None}
    pairs = il.Pairs.from_jsonl(path, **names, group="image", edit=il.BlurImage(1.0))
    assert pairs.groups is not None
    assert pairs.groups[0] == pairs.groups[1] != pairs.groups[2]
    scenes = il.Pairs.from_jsonl(path, **names, group="scene", edit=il.BlurImage(1.0))
    assert scenes.groups == ("s", "t", "t")
    assert {"source": "vstar", "scene": "s"}.items() <= scenes.base[0].items()
    with pytest.raises(il.InputError, match=r"line 1 of data.jsonl has 'vstar' under 'source'"):
        il.Pairs.from_jsonl(path, images="img", text="prompt", answer="gold")


def test_pictures_are_upright_and_rgb_as_viewers_show_them(folder: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by a quarter
    picture(0).save(folder / "turned.png", exif=exif)
    picture(0).convert("L").save(folder / "grey.png")
    path = write_lines(folder, line("turned.png"), line("grey.png", answer="y"))
    turned, grey = (e["images"] for e in il.Pairs.from_jsonl(path).base)
    np.testing.assert_array_equal(np.asarray(turned), np.rot90(np.asarray(picture(0)), -1))
    assert grey == picture(0).convert("L").convert("RGB")


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        (
            [line(), "{no"],
            r"line 2 of data.jsonl is no JSON \(Expecting property name.*, column 2\)",
        ),
        ([line(), "", [1]], r"line 3 of data.jsonl is '\[1\]', expected an object"),
        ([line(), {"images": "a.png", "text": "q"}], "line 2 of data.jsonl has no 'answer', only"),
        (
            [{"text": "q", "answer": "x"}],
            r"line 1 of data.jsonl has no 'images', only \['answer', ",
        ),
        ([{"images": None, "answer": "x"}], "line 1 of data.jsonl has no 'text', only"),
        ([line(), line(answer=None)], "line 2 of data.jsonl has no 'answer'"),
        ([line(answer=4)], "line 1 of data.jsonl has 4 under 'answer', expected text; convert"),
        (
            [line(), line("d.png")],
            "line 2 of data.jsonl names the image 'd.png', and there is no such",
        ),
        ([line("sub")], "line 1 of data.jsonl names the image 'sub', and there is no such file"),
        (
            [line(["a.png", 3])],
            "line 1 of data.jsonl has an image that is a int, expected a path or",
        ),
        ([line("torn.png")], "the image 'torn.png' of line 1 of data.jsonl cannot be decoded"),
        ([line("text.png")], "the image 'text.png' of line 1 of data.jsonl is in no format that"),
        ([line(), line(source=line())], "line 1 of data.jsonl has no source and line 2 .* has one"),
        ([line(group=1), line()], "line 2 of data.jsonl has no group and line 1 of data.jsonl has"),
        (
            [line(source="b.png")],
            "line 1 of data.jsonl has 'b.png' under 'source', expected an obj",
        ),
        ([line(source={"text": "q"})], "the source in line 1 of data.jsonl has no 'images', only"),
        ([line(source=line(answer="x"))], "pair 0 has the answer 'x' on both sides"),
        ([line(), line()], "example 0 has the answer 'x', and none of the 2 examples has another"),
        ([""], "there are no rows to read; give at least one"),
        (
            [line(imaginelens_history=["a"]), line(answer="y")],
            "the rows have 2 different histories",
        ),
        (["\udcff"], "data.jsonl is not UTF-8 .*; save it as UTF-8"),
    ],
)
def test_a_line_that_cannot_be_read_is_named(folder: Path, rows: list[Any], words: str) -> None:
    picture(0, (64, 64)).save(folder / "torn.png")
    (folder / "torn.png").write_bytes((folder / "torn.png").read_bytes()[:500])
    (folder / "text.png").write_text("no picture")
    path = folder / "data.jsonl"
    text = "\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows)
    path.write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(il.InputError, match=words) as error:
        il.Pairs.from_jsonl(path)
    one_sentence(error)


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        ([line(pair=1), line(answer="y")], "line 2 of data.jsonl has None under 'pair', expected"),
        ([line(pair=1)] * 3, "the pair 1 has 3 rows .line 1 of data.jsonl, line 2.*, expected 2"),
        ([line(pair=1)], "the pair 1 has 1 rows"),
        (
            [line(pair=1, source=line())] * 2,
            "line 1 of data.jsonl brings its own source; leave out",
        ),
    ],
)
def test_lines_that_do_not_pair_up_are_named(folder: Path, rows: list[Any], words: str) -> None:
    with pytest.raises(il.InputError, match=words) as error:
        il.Pairs.from_jsonl(write_lines(folder, *rows), pair="pair")
    one_sentence(error)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(il.InputError, match=r"there is no file '.*none.jsonl'; check the path"):
        il.Pairs.from_jsonl(tmp_path / "none.jsonl")
    with pytest.raises(il.InputError, match="there is no file"):
        il.Pairs.from_jsonl(tmp_path)


# ---- image folders ---------------------------------------------------------------------------


def test_an_image_folder_is_read_from_lines_or_csv(folder: Path) -> None:
    rows = [
        {"file_name": "a.png", "question": "how many, really?", "answer": "x", "group": "g"},
        {"file_name": "sub/c.png", "question": 'the "second"\none', "answer": "y", "group": "h"},
    ]
    path = write_lines(folder, *rows, name="metadata.jsonl")
    from_lines = il.Pairs.from_folder(folder, seed=2)
    assert from_lines.base[0]["images"] == picture(0)
    assert from_lines.base[1]["text"] == 'the "second"\none'
    assert from_lines.groups == ("g", "h")
    path.unlink()
    (folder / "metadata.csv").write_text(
        'file_name,question,answer,group\na.png,"how many, really?",x,g\n'
        'sub/c.png,"the ""second""\none",y,h\n'
    )
    assert equal(from_lines, il.Pairs.from_folder(str(folder), seed=2))
    (folder / "metadata.csv").unlink()
    write_lines(folder, *({**r, "file_name": None, "file_names": ["a.png"]} for r in rows))
    (folder / "data.jsonl").rename(path)
    assert il.Pairs.from_folder(folder).base[1]["images"] == [picture(0)]


@pytest.mark.parametrize(
    ("files", "words"),
    [
        ({}, "has neither metadata.jsonl nor .csv; it must have one of them, with a column file_"),
        (
            {"metadata.jsonl": "", "metadata.csv": ""},
            "has metadata.jsonl and metadata.csv; it must",
        ),
        ({"metadata.csv": ""}, "there are no rows to read"),
        ({"metadata.csv": "text,answer\nq,x\n"}, "row 1 of metadata.csv has no 'file_name', only"),
        (
            {"metadata.csv": "file_name,text\na.png,q,r\n"},
            "row 1 of metadata.csv does not have the 2",
        ),
        (
            {"metadata.csv": "file_name,text\na.png\n"},
            "row 1 of metadata.csv does not have the 2 fi",
        ),
        (
            {"metadata.csv": 'file_name,text\na.png,"q"r\n'},
            r"metadata.csv is not CSV \(.*, line 2\)",
        ),
        ({"metadata.jsonl": '{"text": "q"}'}, "line 1 of metadata.jsonl has no 'file_name', only"),
    ],
)
def test_a_folder_that_cannot_be_read_is_refused(
    folder: Path, files: dict[str, str], words: str
) -> None:
    for name, text in files.items():
        (folder / name).write_text(text)
    with pytest.raises(il.InputError, match=words) as error:
        il.Pairs.from_folder(folder)
    one_sentence(error)


# ---- datasets --------------------------------------------------------------------------------


class Table:
    """What a dataset of Hugging Face offers: a length, and a dict for each number."""

    def __init__(self, rows: list[Any]) -> None:
        self.rows, self.asked = rows, 0

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, number: int) -> Any:
        self.asked = max(self.asked, number + 1)
        return self.rows[number]


def stream(rows: list[Any]) -> Iterator[Any]:
    yield from rows
    raise AssertionError("read beyond what was asked for")


def encoded(seed: int) -> bytes:
    buffer = io.BytesIO()
    picture(seed).save(buffer, "PNG")
    return buffer.getvalue()


ROWS = [
    {"image": picture(i), "question": f"question {i}", "answer": answer, "kind": i}
    for i, answer in enumerate("abcd")
]


def test_datasets_and_streams_give_what_their_rows_give() -> None:
    wanted = il.Pairs.from_examples(
        [example(i, answer=a, kind=i) for i, a in enumerate("abc")], seed=4
    )
    table = Table(ROWS)
    for dataset in (table, ROWS, stream(ROWS)):
        assert equal(wanted, il.Pairs.from_dataset(dataset, limit=3, seed=4))
    assert table.asked == 3
    assert len(il.Pairs.from_dataset(table)) == 4
    assert len(il.Pairs.from_dataset(table, limit=9)) == 4
    undecoded = [{**r, "image": {"bytes": encoded(i), "path": "x"}} for i, r in enumerate(ROWS[:3])]
    assert equal(wanted, il.Pairs.from_dataset(undecoded, seed=4))


def test_columns_can_be_lists_of_pictures_groups_and_pairs() -> None:
    rows = [{**row, "image": [row["image"]], "set": row["kind"] // 2} for row in ROWS]
    pairs = il.Pairs.from_dataset(Table(rows), group="set")
    assert pairs.groups == (0, 0, 1, 1)
    assert pairs.base[2]["images"] == [picture(2)]
    by_image = il.Pairs.from_dataset(Table([{**r, "image": picture(0)} for r in ROWS]),
                                     group="image", edit=il.BlurImage(2.0))  # fmt: skip
    assert by_image.groups is not None
    assert len(set(by_image.groups)) == 1
    paired = il.Pairs.from_dataset(Table(rows), pair="set")
    assert [(b["kind"], s["kind"]) for b, s in paired] == [(0, 1), (2, 3)]


def test_a_dataset_of_hugging_face_is_read(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    paths = []
    for i in range(3):
        picture(i).save(tmp_path / f"{i}.png")
        paths.append(str(tmp_path / f"{i}.png"))
    columns = {"image": paths, "question": ["0", "1", "2"], "answer": list("aba")}
    dataset = datasets.Dataset.from_dict(columns).cast_column("image", datasets.Image())
    pairs = il.Pairs.from_dataset(dataset)
    assert [e["images"] for e in pairs.base] == [picture(i) for i in range(3)]
    raw = il.Pairs.from_dataset(dataset.cast_column("image", datasets.Image(decode=False)))
    streamed = il.Pairs.from_dataset(dataset.to_iterable_dataset(), limit=3)
    assert equal(pairs, raw)
    assert equal(pairs, streamed)
    with pytest.raises(il.InputError, match=r"a DatasetDict of \['train', 'test'\] is not one dat"):
        il.Pairs.from_dataset(datasets.DatasetDict(train=dataset, test=dataset))


def test_what_is_no_dataset_is_refused() -> None:
    pandas = pytest.importorskip("pandas")
    cases: list[tuple[Any, dict[str, Any], str]] = [
        (iter(ROWS), {}, "a list_iterator has no length and may never end; pass limit="),
        (7, {}, "a int has no rows; give a dataset, or a list of dicts"),
        ("vstar", {}, "row 0 of the dataset is a str, expected a mapping of columns; open the"),
        (
            {"train": ROWS},
            {},
            r"a dict of \['train'\] is not one dataset; choose one of its splits",
        ),
        (pandas.DataFrame(ROWS), {}, r"a DataFrame gives no row for the number 0; give a list of"),
        (ROWS, {"limit": 0}, "limit=0 asks for no rows; give 1 or more, or None for all"),
        ([], {}, "there are no rows to read"),
        (ROWS, {"text": "prompt"}, "row 0 of the dataset has no 'prompt', only"),
        (ROWS, {"images": "picture"}, "row 0 of the dataset has no 'picture', only"),
        (ROWS, {"group": "scene"}, "row 0 of the dataset has no 'scene', only"),
        ([ROWS[0], {**ROWS[1], "answer": 2}], {}, "row 1 of the dataset has 2 under 'answer', exp"),
        (
            [{**ROWS[0], "image": {"bytes": b"torn"}}],
            {},
            "the image given of row 0 .* in no format",
        ),
    ]
    for dataset, given, words in cases:
        with pytest.raises(il.InputError, match=words) as error:
            il.Pairs.from_dataset(dataset, **given)
        one_sentence(error)


# ---- saved and loaded ------------------------------------------------------------------------


def test_saved_then_loaded_equals_kept_in_memory(tmp_path: Path) -> None:
    examples = [*answered("abcd"), {"images": None, "text": "no picture", "answer": "e"}]
    examples[1]["images"] = [picture(1), picture(0)]
    examples[2]["note"] = {"nested": [1, 2.5, None], "é": "ü"}
    single = il.Pairs.from_examples(examples, groups=np.arange(5) // 2 * 10 + 1, seed=3)
    kinds = {
        "partners": single,
        "edited": single[:4].do(il.NoiseImage(30.0), seed=9),
        "answered": single[:4].do(il.BlankImage(), answers=["x", None, "y", None]),
        "ungrouped": il.Pairs.from_examples(examples[:2]),
        "composed": single[2:4].do(il.BlurImage(1.0)).do(il.PasteRegion((0, 0, 3, 3))),
    }
    for name, pairs in kinds.items():
        path = pairs.save_jsonl(tmp_path / name / "deep")
        loaded = il.Pairs.from_jsonl(path)
        assert equal(loaded, pairs), name
        noise = il.NoiseImage(9.0)
        assert equal(loaded[:1].do(noise), pairs[:1].do(noise))
        again = loaded.save_jsonl(tmp_path / name / "again")
        assert again.read_bytes() == path.read_bytes()


def test_each_picture_is_saved_once(tmp_path: Path) -> None:
    pairs = il.Pairs.from_examples(answered("ab"))
    path = pairs.save_jsonl(tmp_path)
    assert len(list((tmp_path / "images").iterdir())) == 2
    first = json.loads(path.read_text().splitlines()[0])
    with Image.open(tmp_path / first["images"]) as opened:
        assert opened.tobytes() == picture(0).tobytes()


def test_what_cannot_be_saved_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    pairs = il.Pairs.from_examples(answered("ab"))
    task = il.load("latent-content").task(n=2)
    plain = dataclasses.replace(task, hypotheses={})
    own = [{**e, "answer": "z"} for e in pairs.base]
    cases = [
        (task, "the hypotheses content, pointer, ignored are functions, which cannot be saved"),
        (plain, "pair 0 has a Hunt under 'hunt', which JSON cannot hold as it is; save the pairs"),
        (dataclasses.replace(pairs, groups=[(1,), (2,)]), "pair 0 has a tuple under 'group'"),
        (dataclasses.replace(pairs, base=own), "base 0 has 'answer' among its own keys"),
    ]
    for given, words in cases:
        with pytest.raises(il.InputError, match=words) as error:
            given.save_jsonl(tmp_path / "new")
        one_sentence(error)
        assert not (tmp_path / "new").exists()
    pairs.save_jsonl(tmp_path / "new")
    with pytest.raises(
        il.InputError, match=r"pairs.jsonl' is there already; choose another folder"
    ):
        pairs.save_jsonl(tmp_path / "new")
