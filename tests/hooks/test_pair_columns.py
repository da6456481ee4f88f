"""Rows that are base and source in one: their columns, what they share, and which are refused."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import imaginelens as il

NAMES = {"images": "after", "answer": "answer_after"}


def picture(k: int) -> Image.Image:
    return Image.fromarray(np.full((8, 8, 3), 5 * k, np.uint8))


def row(k: int, **changes: Any) -> dict[str, Any]:
    whole = {
        "image": picture(k),
        "question": f"how many? {k}",
        "answer": f"{k}",
        "after": picture(k + 3),
        "answer_after": f"{k + 3}",
        "level": k,
    }
    return whole | changes


ROWS = [row(k) for k in range(3)]
BY_HAND = il.Pairs(
    base=[{"images": picture(k), "text": f"how many? {k}"} for k in range(3)],
    source=[{"images": picture(k + 3), "text": f"how many? {k}"} for k in range(3)],
    base_answers=["0", "1", "2"],
    source_answers=["3", "4", "5"],
)


def equal(one: il.Pairs, other: il.Pairs) -> bool:
    """Whether two sets of pairs have the same pictures, questions and answers."""

    def plain(example: Any) -> Any:
        return np.asarray(example["images"]).tobytes(), example["text"]

    sides = ("base", "source")
    return (one.base_answers, one.source_answers, one.groups) == (
        other.base_answers,
        other.source_answers,
        other.groups,
    ) and all([*map(plain, getattr(one, s))] == [*map(plain, getattr(other, s))] for s in sides)


def test_columns_beside_the_bases_are_the_sources() -> None:
    pairs = il.Pairs.from_dataset(ROWS, source=NAMES)
    assert equal(pairs, BY_HAND)
    assert [example["level"] for example in pairs.base] == [0, 1, 2]
    assert "after" not in pairs.base[0]
    assert set(pairs.source[0]) == {"images", "text"}


def test_a_dataset_of_hugging_face_gives_the_same(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    features = datasets.Features(
        {
            "image": datasets.Image(),
            "question": datasets.Value("string"),
            "answer": datasets.Value("string"),
            "after": datasets.Image(),
            "answer_after": datasets.Value("string"),
            "level": datasets.Value("int64"),
        }
    )
    dataset = datasets.Dataset.from_list(ROWS, features=features)
    assert equal(il.Pairs.from_dataset(dataset, source=NAMES), BY_HAND)
    undecoded = dataset.cast_column("after", datasets.Image(decode=False))
    assert equal(il.Pairs.from_dataset(undecoded, source=NAMES), BY_HAND)
    stream = dataset.to_iterable_dataset()
    assert equal(il.Pairs.from_dataset(stream, source=NAMES, limit=3), BY_HAND)


def test_a_stream_is_read_as_far_as_it_is_needed() -> None:
    read: list[int] = []

    def rows() -> Any:
        for k in range(100):
            read.append(k)
            yield row(k % 5, answer=f"x{k}")

    class Stream:
        def __iter__(self) -> Any:
            return rows()

    pairs = il.Pairs.from_dataset(Stream(), source=NAMES, limit=4)
    assert len(pairs) == 4
    assert read == [0, 1, 2, 3]


def test_an_object_in_one_column_is_the_source() -> None:
    rows = [
        {"image": picture(k), "question": "q", "answer": "a",
         "other": {"image": picture(k + 1), "question": "r", "answer": "b"}}
        for k in range(2)
    ]  # fmt: skip
    pairs = il.Pairs.from_dataset(rows, source="other", group=None)
    assert pairs.source_answers == ("b", "b")
    assert [example["text"] for example in pairs.source] == ["r", "r"]


def test_groups_and_edits_work_as_elsewhere() -> None:
    pairs = il.Pairs.from_dataset(ROWS, source=NAMES, group="level")
    assert pairs.groups == (0, 1, 2)
    blank = il.Pairs.from_dataset(ROWS, source=NAMES, edit=il.BlankImage((0, 0, 0)))
    assert blank.source_answers == (None, None, None)
    assert len(blank.history) == 1


@pytest.mark.parametrize(
    ("rows", "source", "words"),
    [
        (
            ROWS,
            {"image": "after"},
            r"source names \['image'\], expected columns for some of images",
        ),
        (ROWS, {}, "source names nothing"),
        (ROWS, {"images": "later"}, r"row 0 of the dataset has no 'later', only \['after'"),
        ([row(0), row(1, answer_after="1")], NAMES, "row 1 of the dataset has the answer '1' on"),
        ([row(0), row(1, answer_after=4)], NAMES, "the source in row 1 of the dataset has 4 under"),
        ([row(0), row(1, after=7)], NAMES, "the source in row 1 .* has an image that is a int"),
        ([row(0, after=b"no picture")], NAMES, "in no format that Pillow reads"),
    ],
)
def test_what_cannot_be_read_is_named(rows: Any, source: Any, words: str) -> None:
    with pytest.raises(il.InputError, match=words):
        il.Pairs.from_dataset(rows, source=source)


def test_all_refused_rows_are_named() -> None:
    rows = [row(k, **({"answer_after": f"{k}"} if k % 2 else {})) for k in range(5)]
    rows.append(row(5, question=None))
    with pytest.raises(il.InputError) as told:
        il.Pairs.from_dataset(rows, source=NAMES)
    message = str(told.value)
    assert message.startswith("row 1 of the dataset has the answer '1' on both sides")
    assert "3 of 6 rows are refused; also row 3 of the dataset, row 5 of the dataset" in message
    many = [row(k, answer_after=f"{k}") for k in range(40)]
    with pytest.raises(il.InputError, match=r"40 of 40 rows are refused; also row 1 .*, \.\.\."):
        il.Pairs.from_dataset(many, source=NAMES)
