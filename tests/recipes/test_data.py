"""What is read: good records as they are, bad ones refused with a reason, and the rest goes on."""

import copy
import io
import json
import random
import stat
import struct
import zipfile
import zlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from examples.capimagine.chains import Picture, load, save
from examples.capimagine.data import SUBSETS, boxed, main, read
from examples.capimagine.exports import EXPORTS
from examples.capimagine.hunts import crop, mark, write, write_evaluation
from examples.capimagine.refused import SourceError
from examples.capimagine.unpack import Limits, unpack
from imaginelens.organisms.hunt import render, sample

PLACE = "<abs_vis_token></abs_vis_token>"
Record = dict[str, Any]


@pytest.fixture(scope="module")
def raw(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("hunts") / "raw"
    write(sample(12, hops=2, seed=0), folder)
    return folder


def _text(words: str) -> Record:
    return {"type": "text", "text": words}


def _picture(path: str) -> Record:
    return {"type": "image", "image": path}


def _monet(number: int, subset: str = "Visual_CoT") -> Record:
    names = [f"{subset}/images/{part}.png" for part in ("a", "b")]
    return {
        "metadata": {"dataset_name": subset, "sample_id": number},
        "data": [
            {"role": "system", "content": [_text("You may draw.")]},
            {
                "role": "user",
                "content": [
                    _picture(names[0]),
                    _text("what?\nPut your final answer within \\boxed{}."),
                ],
            },
            {
                "role": "assistant",
                "content": [
                    _text(f"look. {PLACE}"),
                    _picture(names[1]),
                    _text("<observation>a cube</observation> so \\boxed{cube}"),
                ],
            },
        ],
    }


def _folder(where: Path, records: Any, subset: str = "Visual_CoT") -> Path:
    images = where / subset / "images"
    images.mkdir(parents=True)
    for name in ("a", "b"):
        Image.new("RGB", (8, 8), (200, 10, 10)).save(images / f"{name}.png")
    text = records if isinstance(records, bytes) else json.dumps(records).encode()
    (where / subset / "train.json").write_bytes(text)
    return where


# -- good records ----------------------------------------------------------------------------------


def test_hunts_are_read_as_they_are(raw: Path) -> None:
    reading = read(raw)
    assert (reading.layout, reading.counts["records"], reading.refused) == ("monet", 12, [])
    hunts = {str(i): hunt for i, hunt in enumerate(sample(12, hops=2, seed=0))}
    boards = {key: render([hunt])[0] for key, hunt in hunts.items()}
    assert {chain.subset for chain in reading.chains} == {"Visual_CoT", "ReFocus"}
    for chain in reading.chains:
        number = chain.id.split("/")[1]
        hunt, board = hunts[number], boards[number]
        assert (chain.question, chain.answer) == (hunt.question, hunt.answer)
        look = mark if chain.subset == "ReFocus" else crop
        wanted = [board, *(look(board, hunt, name) for name in hunt.path[1:])]
        files = chain.pictures((*chain.prompt, *chain.reply))
        for path, pixels in zip(files, wanted, strict=True):
            assert np.array_equal(np.asarray(Image.open(path)), pixels)


def test_hunts_for_evaluation_are_chains_of_other_hunts(tmp_path: Path) -> None:
    hunts = sample(3, hops=2, seed=8)
    write_evaluation(hunts, tmp_path)
    chains = load(tmp_path / "chains.jsonl")
    assert [chain.answer for chain in chains] == [hunt.answer for hunt in hunts]
    assert read(tmp_path).layout == "chains"


def test_spoiled_hunts_are_listed_and_differ(tmp_path: Path) -> None:
    hunts = sample(40, hops=2, seed=0)
    planted = write(hunts, tmp_path, spoil=0.1)
    assert json.loads((tmp_path / "planted.json").read_text()) == planted
    assert sorted(planted.values()) == ["conflict"] * 2 + ["unanswerable"] * 2
    for chain in read(tmp_path).chains:
        hunt = hunts[int(chain.id.split("/")[1])]
        same = (chain.question == hunt.question, chain.answer == hunt.answer)
        expected = {"conflict": (True, False), "unanswerable": (False, True)}
        assert same == expected.get(planted.get(chain.id, ""), (True, True))


@pytest.mark.parametrize("subset", SUBSETS)
def test_each_subset_is_read_by_monets_rules(tmp_path: Path, subset: str) -> None:
    (chain,) = read(_folder(tmp_path, [_monet(4, subset)], subset)).chains
    assert (chain.id, chain.subset) == (f"{subset}/4", subset)
    assert chain.system == "You are a helpful assistant."
    keeps = subset in ("Zebra_CoT_visual_search", "Zebra_CoT_count")
    assert chain.question.endswith("\\boxed{}.") == keeps
    assert chain.answer == "cube"


def test_observation_tags_before_any_picture_are_removed_and_counted(tmp_path: Path) -> None:
    record = _monet(1)
    record["data"][2]["content"][0]["text"] = f"<observation>x</observation> {PLACE}"
    reading = read(_folder(tmp_path, [record]))
    assert reading.chains[0].reply[0] == f"x {PLACE}"
    assert reading.counts["changed: observation tags before any picture removed"] == 1


def test_boxed_takes_the_last_and_balances_braces() -> None:
    assert boxed(r"\boxed{1} then \boxed{\frac{1}{2}} ok") == r"\frac{1}{2}"
    assert boxed(r"\boxed{never closed") is None
    assert boxed("plain") is None


# -- bad records -----------------------------------------------------------------------------------


def _at(record: Record, *path: Any) -> Any:
    for step in path:
        record = record[step]
    return record


def _set(*path: Any, to: Any) -> Callable[[Record], None]:
    def change(record: Record) -> None:
        _at(record, *path[:-1])[path[-1]] = to

    return change


def _drop(*path: Any) -> Callable[[Record], None]:
    return lambda record: _at(record, *path[:-1]).pop(path[-1])


REPLY = ("data", 2, "content")
USER = ("data", 1, "content")
SHOWN = (*USER, 0, "image")
BAD: dict[str, tuple[str, Callable[[Record], None]]] = {
    "no file": ("missing picture", _set(*SHOWN, to="Visual_CoT/images/none.png")),
    "a folder": ("missing picture", _set(*SHOWN, to="Visual_CoT/images")),
    "name too long": ("missing picture", _set(*SHOWN, to="x" * 5000)),
    "up and out": ("path escapes", _set(*SHOWN, to="Visual_CoT/../../secret.png")),
    "link out": ("path escapes", _set(*SHOWN, to="Visual_CoT/images/link.png")),
    "absolute": ("absolute path", _set(*SHOWN, to="/etc/hostname")),
    "drive": ("absolute path", _set(*SHOWN, to="C:\\a.png")),
    "nul": ("absolute path", _set(*SHOWN, to="a\0.png")),
    "0 bytes": ("empty picture", _set(*SHOWN, to="Visual_CoT/images/empty.png")),
    "no picture": ("damaged picture", _set(*SHOWN, to="Visual_CoT/images/text.png")),
    "cut off": ("damaged picture", _set(*SHOWN, to="Visual_CoT/images/cut.png")),
    "bomb": ("picture too large", _set(*SHOWN, to="Visual_CoT/images/bomb.png")),
    "more placeholders": ("wrong count", _set(*REPLY, 0, "text", to=PLACE * 2)),
    "no placeholder": ("no placeholder", _set(*REPLY, 0, "text", to="look.")),
    "no observation": ("no observation", _set(*REPLY, 2, "text", to="\\boxed{cube}")),
    "no answer": ("answer absent", _set(*REPLY, 2, "text", to="<observation>a</observation>")),
    "empty answer": (
        "answer absent",
        _set(*REPLY, 2, "text", to="<observation>a</observation>\\boxed{ }"),
    ),
    "data missing": ("wrong type", _drop("data")),
    "data a text": ("wrong type", _set("data", to="hello")),
    "turn a list": ("wrong type", _set("data", 1, to=[])),
    "role a number": ("wrong type", _set("data", 1, "role", to=3)),
    "role unhashable": ("wrong type", _set("data", 1, "role", to={})),
    "role unknown": ("wrong type", _set("data", 1, "role", to="tool")),
    "content missing": ("wrong type", _drop("data", 1, "content")),
    "part a number": ("wrong type", _set(*USER, 1, to=7)),
    "part unknown": ("wrong type", _set(*USER, 1, to={"type": "video"})),
    "text a list": ("wrong type", _set(*USER, 1, "text", to=["a"])),
    "image null": ("wrong count", _set(*SHOWN, to=None)),
    "image a number": ("wrong type", _set(*SHOWN, to=1.5)),
    "id a list": ("wrong type", _set("metadata", "sample_id", to=[1])),
    "id true": ("wrong type", _set("metadata", "sample_id", to=True)),
    "metadata a text": ("wrong type", _set("metadata", to="x")),
    "half a character": ("not UTF-8", _set(*USER, 1, "text", to="\ud800")),
    "no reply": ("turns", _drop("data", 2)),
    "reply first": ("turns", lambda record: record["data"].reverse()),
    "two questions": ("turns", lambda record: record["data"].append(record["data"][1])),
    "same id": ("duplicate id", _set("metadata", "sample_id", to=0)),
}


def _bomb() -> bytes:
    """A PNG that says it is 60000 x 60000 pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        body = kind + data
        return struct.pack(">I", len(data)) + body + struct.pack(">I", zlib.crc32(body))

    header = struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", b"") + chunk(b"IEND", b"")


def _traps(where: Path) -> None:
    images = where / "Visual_CoT" / "images"
    Image.new("RGB", (8, 8)).save(where.parent / "secret.png")
    (images / "link.png").symlink_to(where.parent / "secret.png")
    (images / "empty.png").touch()
    (images / "text.png").write_text("no picture")
    (images / "cut.png").write_bytes((images / "a.png").read_bytes()[:-20])
    (images / "bomb.png").write_bytes(_bomb())


@pytest.mark.parametrize("what", BAD)
def test_a_bad_record_is_refused_with_its_reason_and_the_rest_goes_on(
    tmp_path: Path, what: str
) -> None:
    kind, spoil = BAD[what]
    records = [_monet(0), _monet(1), _monet(2)]
    spoil(records[1])
    folder = _folder(tmp_path / "data", records)
    _traps(folder)
    reading = read(folder)
    assert [chain.id for chain in reading.chains] == ["Visual_CoT/0", "Visual_CoT/2"]
    (refused,) = reading.refused
    assert refused.kind == kind
    assert refused.reason
    unnamed = "id" in what or "metadata" in what
    if what == "same id":
        assert refused.id == "Visual_CoT/0"
    else:
        assert refused.id == ("Visual_CoT/train.json#2" if unnamed else "Visual_CoT/1")
    assert reading.counts[f"refused: {kind}"] == 1
    assert reading.counts["records"] == 3


def test_all_bad_records_at_once(tmp_path: Path) -> None:
    records = [_monet(0)]
    for number, (_, spoil) in enumerate(BAD.values(), 1):
        records.append(_monet(number))
        spoil(records[-1])
    folder = _folder(tmp_path / "data", records)
    _traps(folder)
    reading = read(folder)
    assert [chain.id for chain in reading.chains] == ["Visual_CoT/0"]
    assert [refused.kind for refused in reading.refused] == [kind for kind, _ in BAD.values()]


@pytest.mark.parametrize("at", [0.4, 0.7, 0.97])
def test_records_before_a_truncation_are_kept(tmp_path: Path, at: float) -> None:
    records = [_monet(i) for i in range(3)]
    text = json.dumps(records).encode()
    reading = read(_folder(tmp_path, text[: int(at * len(text))]))
    assert len(reading.chains) == int(3 * at)
    (refused,) = reading.refused
    assert refused.kind == "truncated JSON"
    assert refused.id == f"Visual_CoT/train.json#{int(3 * at) + 1}"


@pytest.mark.parametrize(
    ("text", "kind"),
    [(b"", "no list"), (b"[]", "empty file"), (b"7", "no list"), (b"[1]", "wrong type")],
)
def test_a_file_without_records_says_so(tmp_path: Path, text: bytes, kind: str) -> None:
    reading = read(_folder(tmp_path, text))
    assert (reading.chains, [r.kind for r in reading.refused]) == ([], [kind])


def test_bytes_that_are_no_utf8_cost_one_record(tmp_path: Path) -> None:
    text = json.dumps([_monet(0), _monet(1)]).encode()
    # once in a text of the second, so behind its id
    before, cut, after = text.rpartition(b"what?")
    reading = read(_folder(tmp_path, before + b"\xff" + cut + after))
    assert [chain.id for chain in reading.chains] == ["Visual_CoT/0"]
    assert [(r.id, r.kind) for r in reading.refused] == [("Visual_CoT/1", "not UTF-8")]


def test_depth_is_no_crash(tmp_path: Path) -> None:
    deep = b"[" * 100_000
    reading = read(_folder(tmp_path, b"[" + json.dumps(_monet(0)).encode() + b"," + deep))
    assert len(reading.chains) == 1
    assert reading.refused[0].kind == "truncated JSON"


def test_whatever_a_record_holds_reading_goes_on(tmp_path: Path) -> None:
    """Records with one value anywhere replaced by something else: all are counted."""
    draw = random.Random(0)
    junk = [None, True, 0, -1.5, "", "x", "\ud800", [], {}, [[]], {"a": 1}, [None], "<image>"]
    records = []
    for number in range(400):
        record = copy.deepcopy(_monet(number))
        places: list[tuple[Any, Any]] = []
        todo: list[Any] = [record]
        while todo:
            value = todo.pop()
            keys = value.keys() if isinstance(value, dict) else range(len(value))
            for key in keys:
                places.append((value, key))
                if isinstance(value[key], dict | list):
                    todo.append(value[key])
        value, key = draw.choice(places)
        value[key] = draw.choice(junk)
        records.append(record)
    reading = read(_folder(tmp_path, records))
    assert len(reading.chains) + len(reading.refused) == 400
    assert len(reading.refused) > 100
    save(reading.chains, tmp_path / "chains.jsonl")
    assert len(load(tmp_path / "chains.jsonl")) == len(reading.chains)


# -- layouts ---------------------------------------------------------------------------------------


def _plain(layout: str, number: int = 1) -> Record:
    said = "<think_image> a cube </think_image> \\boxed{cube}"
    if layout == "monet":
        content = [_picture("images/a.png"), _text("what?")]
        turns = [("user", content), ("assistant", [_text(said)])]
        data = [{"role": role, "content": parts} for role, parts in turns]
        return {"metadata": {"sample_id": number}, "data": data}
    if layout == "messages":
        turns = [("user", "<image>\nwhat?"), ("assistant", said)]
        messages = [{"role": role, "content": text} for role, text in turns]
        return {"id": number, "messages": messages, "images": ["images/a.png"]}
    turns = [("human", "<image>\nwhat?"), ("gpt", said)]
    conversations = [{"from": role, "value": text} for role, text in turns]
    return {"id": number, "image": "images/a.png", "conversations": conversations}


def _png() -> bytes:
    out = io.BytesIO()
    Image.new("RGB", (8, 8), (1, 2, 3)).save(out, "PNG")
    return out.getvalue()


def _archive(path: Path, members: dict[str, bytes]) -> Path:
    with zipfile.ZipFile(path, "w") as packed:
        for name, content in members.items():
            packed.writestr(name, content)
    return path


@pytest.mark.parametrize("layout", ["monet", "messages", "llava"])
def test_capimagine_data_may_have_any_of_three_forms(tmp_path: Path, layout: str) -> None:
    source = tmp_path / "CapImagine-Data"
    source.mkdir()
    (source / "data.json").write_text(json.dumps([_plain(layout, i) for i in range(3)]))
    _archive(source / "images.zip", {"images/a.png": _png(), "images/b.png": _png()})
    reading = read(source, unpack=tmp_path / "unpacked")
    assert (reading.layout, len(reading.chains), reading.refused) == ("capimagine", 3, [])
    chain = reading.chains[0]
    assert isinstance(chain.prompt[0], Picture)
    assert (chain.question, chain.imagined, chain.answer) == ("what?", ("a cube",), "cube")
    with pytest.raises(SourceError, match=r"images\.zip has to be unpacked"):
        read(source)


def test_another_schema_is_an_error_that_names_the_keys(tmp_path: Path) -> None:
    (tmp_path / "data.json").write_text(json.dumps([{"qid": 1, "steps": []}]))
    _archive(tmp_path / "images.zip", {"a.png": _png()})
    with pytest.raises(SourceError, match="the keys found are: 'qid', 'steps'"):
        read(tmp_path, unpack=tmp_path / "unpacked")
    (tmp_path / "data.json").write_text('{"train": [], "meta": 1}')
    with pytest.raises(SourceError, match="the keys found are: 'train', 'meta'"):
        read(tmp_path, unpack=tmp_path / "unpacked")


@pytest.mark.parametrize("layout", ["monet", "messages", "llava"])
def test_the_layout_of_a_file_is_found_by_looking(tmp_path: Path, layout: str) -> None:
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "a.png").write_bytes(_png())
    (tmp_path / "all.jsonl").write_text(json.dumps(_plain(layout)) + "\n\n{oops\n")
    form = "capimagine" if layout == "monet" else None  # as a chain without pictures to imagine
    reading = read(tmp_path / "all.jsonl", form)
    assert len(reading.chains) == 1
    assert [(r.id.split("#")[1], r.kind) for r in reading.refused] == [("3", "no JSON")]
    if layout == "monet":
        assert [r.kind for r in read(tmp_path / "all.jsonl").refused] == [
            "no observation",
            "no JSON",
        ]


def test_what_could_be_two_layouts_is_an_error_that_names_both(tmp_path: Path) -> None:
    record = {**_plain("llava"), **_plain("messages")}
    (tmp_path / "all.json").write_text(json.dumps([record]))
    with pytest.raises(SourceError, match="could be llava and messages"):
        read(tmp_path)
    _folder(tmp_path, [_monet(1)])
    with pytest.raises(SourceError, match=r"could be monet .* and records"):
        read(tmp_path)
    assert len(read(tmp_path, "monet").chains) == 1


def test_what_cannot_be_read_at_all_says_what_is_there(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("hello")
    with pytest.raises(SourceError, match=r"there is: notes\.txt"):
        read(tmp_path)
    with pytest.raises(SourceError, match="does not exist"):
        read(tmp_path / "none")
    with pytest.raises(SourceError, match="none of monet"):
        read(tmp_path, "coco")
    with pytest.raises(SourceError, match="nothing in the layout chains"):
        read(tmp_path, "chains")


@pytest.mark.parametrize("layout", ["messages", "llava"])
@pytest.mark.parametrize("images", [[], ["images/a.png"] * 3])
def test_pictures_and_their_places_are_counted(
    tmp_path: Path, layout: str, images: list[str]
) -> None:
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "a.png").write_bytes(_png())
    record = {**_plain(layout), "images": images}
    (tmp_path / "all.json").write_text(json.dumps([record]))
    assert [r.kind for r in read(tmp_path).refused] == ["wrong count"]


# -- zips ------------------------------------------------------------------------------------------


def _member(name: str, *, mode: int = 0) -> zipfile.ZipInfo:
    info = zipfile.ZipInfo(name)
    info.external_attr = mode << 16
    info.compress_type = zipfile.ZIP_DEFLATED
    return info


def test_bad_members_are_refused_and_the_others_unpacked(tmp_path: Path) -> None:
    path = tmp_path / "images.zip"
    with zipfile.ZipFile(path, "w") as packed:
        packed.writestr(_member("ok/a.png"), _png())
        packed.writestr(_member("../out.png"), _png())
        packed.writestr(_member("/abs.png"), _png())
        packed.writestr(_member("link.png", mode=stat.S_IFLNK | 0o777), "../secret")
        packed.writestr(_member("pipe.png", mode=stat.S_IFIFO | 0o644), "")
        packed.writestr(_member("bomb.png"), b"\0" * 3_000_000)
        packed.writestr(_member("large.png"), random.Random(0).randbytes(5_000_000))
        packed.writestr(_member("OK/A.png"), _png())
        packed.writestr(_member("last.png"), _png())
    refused = unpack(path, tmp_path / "to", Limits(member=4_000_000))
    assert {r.id.removeprefix("zip:"): r.kind.removeprefix("zip: ") for r in refused} == {
        "../out.png": "escapes",
        "/abs.png": "absolute path",
        "link.png": "link",
        "pipe.png": "link",
        "bomb.png": "bomb",
        "large.png": "too large",
        "OK/A.png": "duplicate",
    }
    there = sorted(str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*.png"))
    assert there == ["to/last.png", "to/ok/a.png"]


def test_all_members_together_have_a_limit(tmp_path: Path) -> None:
    path = _archive(tmp_path / "a.zip", {f"{i}.bin": b"x" * 1000 for i in range(10)})
    assert len(unpack(path, tmp_path / "to", Limits(total=4500))) == 6
    assert len(unpack(path, tmp_path / "to2", Limits(count=3))) == 7
    assert len(list((tmp_path / "to").iterdir())) == 4


def test_a_damaged_member_or_zip_is_refused(tmp_path: Path) -> None:
    path = _archive(tmp_path / "a.zip", {"a.bin": b"x" * 1000, "b.bin": b"y" * 1000})
    content = path.read_bytes()
    path.write_bytes(content.replace(b"x" * 1000, b"z" * 1000))
    (refused,) = unpack(path, tmp_path / "to")
    assert (refused.id, refused.kind) == ("zip:a.bin", "zip: damaged")
    assert [p.name for p in (tmp_path / "to").iterdir()] == ["b.bin"]
    path.write_bytes(content[:500])
    (refused,) = unpack(path, tmp_path / "to")
    assert refused.id == "zip:a.zip"


def test_members_without_a_name_of_another_version_or_torn_do_not_stop_the_rest(
    tmp_path: Path,
) -> None:
    path = tmp_path / "a.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as packed:
        packed.writestr("torn.txt", bytes(range(256)) * 4)
        packed.writestr("good.txt", b"good" * 100)
        packed.writestr("nameless.txt", b"x")
    # a name ends at its first null
    content = bytearray(path.read_bytes().replace(b"nameless.txt", b"\0ameless.txt"))
    begin = content.index(b"torn.txt") + len("torn.txt")
    content[begin : begin + 40] = b"\xff" * 40
    path.write_bytes(content)
    kinds = {refused.kind for refused in unpack(path, tmp_path / "to")}
    assert kinds == {"zip: damaged", "zip: no name"}
    assert [p.name for p in (tmp_path / "to").iterdir()] == ["good.txt"]
    at = content.index(b"PK\x01\x02") + 6  # the version that the first member needs
    content[at : at + 2] = (154).to_bytes(2, "little")
    path.write_bytes(content)
    (refused,) = unpack(path, tmp_path / "to2")
    assert "version" in refused.reason


def test_records_of_refused_members_are_refused_and_the_rest_read(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    records = [_plain("llava", 0), _plain("llava", 1)]
    records[1]["image"] = "images/bomb.png"
    (source / "data.json").write_text(json.dumps(records))
    with zipfile.ZipFile(source / "images.zip", "w") as packed:
        packed.writestr("images/a.png", _png())
        packed.writestr(_member("images/bomb.png"), b"\0" * 3_000_000)
    reading = read(source, unpack=tmp_path / "unpacked")
    assert [chain.id for chain in reading.chains] == ["0"]
    assert [(r.id, r.kind) for r in reading.refused] == [
        ("zip:images/bomb.png", "zip: bomb"),
        ("1", "missing picture"),
    ]


# -- exports ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(("export", "layout"), [("sharegpt", "llava"), ("swift", "messages")])
def test_exported_and_read_back_is_the_same(
    tmp_path: Path, raw: Path, export: str, layout: str
) -> None:
    chains = read(raw).chains
    assert EXPORTS[export](chains, tmp_path) == []
    reading = read(tmp_path)
    assert (reading.layout, reading.refused) == (layout, [])
    for before, after in zip(chains, reading.chains, strict=True):
        for side in ("prompt", "reply"):
            were, are = getattr(before, side), getattr(after, side)
            assert [p for p in were if isinstance(p, str)] == [p for p in are if isinstance(p, str)]
            shown = [
                [f.read_bytes() for f in c.pictures(getattr(c, side))] for c in (before, after)
            ]
            assert shown[0] == shown[1]
        assert (before.id, before.subset, before.answer, before.system) == (
            after.id,
            after.subset,
            after.answer,
            after.system,
        )


def test_llama_factory_is_told_where_things_are(tmp_path: Path, raw: Path) -> None:
    EXPORTS["sharegpt"](read(raw).chains[:1], tmp_path)
    info = json.loads((tmp_path / "dataset_info.json").read_text())["capimagine"]
    (row,) = json.loads((tmp_path / info["file_name"]).read_text())
    assert set(info["columns"].values()) <= set(row)
    said = "".join(turn["value"] for turn in row["conversations"])
    assert said.count("<image>") == len(row["images"]) == 3


def test_trl_has_messages_only_if_a_reply_shows_pictures(tmp_path: Path, raw: Path) -> None:
    chains = read(raw).chains
    EXPORTS["trl"](chains, tmp_path / "raw")
    row = json.loads((tmp_path / "raw/train.jsonl").read_text().split("\n")[0])
    assert [m["role"] for m in row["messages"]] == ["system", "user", "assistant"]
    folder = _folder(tmp_path / "plain", [])
    (folder / "all.json").write_text(json.dumps([_plain("llava")]))
    (folder / "images").symlink_to(folder / "Visual_CoT/images")
    plain = read(folder / "all.json").chains
    EXPORTS["trl"](plain, tmp_path / "out")
    (line,) = (tmp_path / "out/train.jsonl").read_text().splitlines()
    row = json.loads(line)
    assert row["prompt"][0]["content"][0] == {"type": "image", "text": None}
    assert row["completion"][0]["content"][0]["text"].endswith("\\boxed{cube}")
    assert len(row["images"]) == 1


def test_a_text_with_the_word_of_the_format_is_refused(tmp_path: Path) -> None:
    record = _monet(1)
    record["data"][1]["content"][1]["text"] = "what is <image>?"
    chains = read(_folder(tmp_path / "raw", [record, _monet(2)])).chains
    (refused,) = EXPORTS["swift"](chains, tmp_path / "out")
    assert (refused.id, refused.kind) == ("Visual_CoT/1", "word of the format")
    assert len(read(tmp_path / "out").chains) == 1


def test_the_command_line(
    tmp_path: Path, raw: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["data", str(raw), "--out", str(tmp_path / "out")])
    main()
    assert "12  chains" in capsys.readouterr().out
    assert len(load(tmp_path / "out/chains.jsonl")) == 12
    monkeypatch.setattr("sys.argv", ["data", str(raw), "--out", str(tmp_path / "no"), "--system="])
    main()
    found = zip(
        load(tmp_path / "out/chains.jsonl"), load(tmp_path / "no/chains.jsonl"), strict=True
    )
    assert all(
        old.system and new == replace(old, system="", folder=new.folder) for old, new in found
    )
    monkeypatch.setattr("sys.argv", ["data", str(tmp_path / "none"), "--out", str(tmp_path)])
    with pytest.raises(SystemExit, match="does not exist"):
        main()
