"""The pairs of a study are the same from whatever file; what cannot be read is named."""

import csv
import json
from pathlib import Path

import pytest
from PIL import Image

import imaginelens as il
from imaginelens.hooks.errors import InputError
from imaginelens.mediation.study_config import ColumnsConfig, StudyConfig, parse_config
from imaginelens.mediation.study_data import StudyData, keys_of, read_pairs, study_data

ROWS = [
    {"image": f"{name}.png", "question": f"which, {k}?", "answer": name, "group": name}
    for k, name in enumerate(("red", "green", "blue", "red"))
]
TOML = '[model]\nname = "latent-content"\n[data]\n{data}\n[[map]]\nname = "m"\n'


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("red", "green", "blue"):
        Image.new("RGB", (28, 28), name).save(tmp_path / f"{name}.png")
    (tmp_path / "rows.json").write_text(json.dumps(ROWS))
    (tmp_path / "rows.jsonl").write_text("\n".join(json.dumps(row) for row in ROWS))
    with open(tmp_path / "rows.csv", "w", newline="", encoding="utf-8-sig") as file:
        writer = csv.DictWriter(file, list(ROWS[0]))
        writer.writeheader()
        writer.writerows(ROWS)
    return tmp_path


def config(folder: Path, data: str) -> StudyConfig:
    return parse_config(TOML.format(data=data), folder=folder)


def read(folder: Path, data: str) -> StudyData:
    return study_data(config(folder, data), None)


# ---- files -------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", ["json", "csv", "parquet"])
def test_files_of_all_kinds_give_the_same_pairs(suffix: str, folder: Path) -> None:
    if suffix == "parquet":
        pyarrow = pytest.importorskip("pyarrow")
        from pyarrow import parquet

        parquet.write_table(pyarrow.Table.from_pylist(ROWS), folder / "rows.parquet")
    wanted = read_pairs(folder / "rows.jsonl", ColumnsConfig(images="image"), seed=3)
    found = read_pairs(folder / f"rows.{suffix}", ColumnsConfig(), seed=3)
    assert keys_of(found) == keys_of(wanted)
    assert found.groups == ("red", "green", "blue", "red")


def test_columns_are_named(folder: Path) -> None:
    rows = [
        {"picture": row["image"], "q": row["question"], "a": row["answer"], "p": k // 2}
        for k, row in enumerate(ROWS)
    ]
    (folder / "other.json").write_text(json.dumps(rows))
    columns = ColumnsConfig(images="picture", text="q", answer="a", pair="p")
    found = read_pairs(folder / "other.json", columns, seed=0)
    assert found.base_answers == ("red", "blue")
    assert found.source_answers == ("green", "red")


def test_questions_need_no_picture(folder: Path) -> None:
    rows = [{"text": "1 + 1", "answer": "2"}, {"text": "1 + 2", "answer": "3"}]
    (folder / "sums.json").write_text(json.dumps(rows))
    assert len(read_pairs(folder / "sums.json", ColumnsConfig(), seed=0)) == 2


def test_a_line_may_bring_its_source(folder: Path) -> None:
    row = {**ROWS[0], "source": ROWS[1]}
    (folder / "own.jsonl").write_text(json.dumps(row))
    columns = ColumnsConfig(images="image", source="source")
    assert read_pairs(folder / "own.jsonl", columns, seed=0).source_answers == ("green",)
    (folder / "own.json").write_text(json.dumps([row]))
    with pytest.raises(InputError, match="sources are read from JSON lines"):
        read_pairs(folder / "own.json", columns, seed=0)


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.json", "{", "a.json is no JSON"),
        ("a.json", "3", "a.json holds no list of objects"),
        ("a.json", "[3]", "a.json holds no list of objects"),
        ("a.json", "[]", "a.json has no rows"),
        ("a.json", '[{"question": "q"}]', "has no 'answer'"),
        ("a.json", '[{"image": "no.png", "question": "q", "answer": "a"}]', "no such file"),
        ("a.csv", "a,b\n1\n", "row 1 of a.csv does not have the 2 fields"),
        ("a.csv", 'a,b\n"1\n', "a.csv is not CSV"),
        ("a.csv", "a,b\n", "a.csv has no rows"),
        ("a.parquet", "no", "a.parquet is no Parquet file"),
    ],
)
def test_what_cannot_be_read_is_named(name: str, content: str, words: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(InputError, match=words):
        read_pairs(tmp_path / name, ColumnsConfig(), seed=0)


def test_files_must_be_there_and_be_text(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="there is no file"):
        read_pairs(tmp_path / "none.csv", ColumnsConfig(), seed=0)
    (tmp_path / "a.json").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(InputError, match=r"a.json is not UTF-8"):
        read_pairs(tmp_path / "a.json", ColumnsConfig(), seed=0)


# ---- which of the pairs ------------------------------------------------------------------------


def test_a_limit_takes_the_first_of_the_same_pairs(folder: Path) -> None:
    whole = read(folder, 'file = "rows.csv"')
    few = read(folder, 'file = "rows.csv"\nlimit = 2')
    assert few.keys == whole.keys[:2]
    assert few.content != whole.content


def test_a_model_without_a_task_is_told_apart(folder: Path) -> None:
    with pytest.raises(InputError, match="is no organism and has none; give your own pairs"):
        read(folder, "task = {}")


def test_seeds_of_a_task() -> None:
    lens = il.load("latent-content")
    one = study_data(config(Path(), "task = { n = 3 }"), lens.task)
    other = study_data(config(Path(), "task = { n = 3 }").with_options(seed=1), lens.task)
    own = study_data(config(Path(), "task = { n = 3, seed = 1 }"), lens.task)
    assert one.keys != other.keys == own.keys


def test_the_last_pairs_are_kept_aside(folder: Path) -> None:
    lens = il.load("latent-content")
    found = study_data(config(Path(), "task = { n = 8 }\nreference = 3\nlimit = 4"), lens.task)
    assert found.reference is not None
    whole = keys_of(lens.task(n=8, seed=0))
    digests = [key.split("-")[1] for key in whole]
    assert found.keys == whole[:4]
    assert [key.split("-")[1] for key in keys_of(found.reference)] == digests[5:]
    with pytest.raises(InputError, match="keeps 8 pairs aside as reference, and there are 8"):
        study_data(config(Path(), "task = { n = 8 }\nreference = 8"), lens.task)


def test_a_reference_holds_nothing_that_is_mapped(folder: Path) -> None:
    with pytest.raises(InputError, match="1 groups, the first is 'red', are both among"):
        read(folder, 'file = "rows.csv"\nreference = 2')
    rows = [{k: v for k, v in row.items() if k != "group"} for row in (*ROWS[:3], ROWS[0])]
    (folder / "twice.json").write_text(json.dumps(rows))
    with pytest.raises(InputError, match="the input of pair 0 is also among the pairs"):
        read(folder, 'file = "twice.json"\nreference = 2')


@pytest.mark.parametrize("key", ["question", "answer", "image", "group"])
def test_any_change_of_the_content_is_seen(key: str, folder: Path) -> None:
    before = read(folder, 'file = "rows.csv"').content
    rows = [dict(row) for row in ROWS]
    rows[2][key] = "green.png" if key == "image" else "another"
    (folder / "rows.json").write_text(json.dumps(rows))
    assert read(folder, 'file = "rows.json"').content != before


def test_the_content_is_the_same_wherever_it_lies(folder: Path) -> None:
    before = read(folder, 'file = "rows.csv"').content
    assert read(folder, 'file = "rows.json"').content == before
