"""Maps on disk: what comes back is what was kept, whatever kills the writer or bites the files."""

import json
import os
import random
import signal
import struct
import time
from collections.abc import Callable
from dataclasses import fields, replace
from itertools import cycle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file
from safetensors.numpy import save as to_bytes

import imaginelens as il
from imaginelens.mediation import map_files, map_store
from imaginelens.mediation.cells import Cell
from imaginelens.mediation.effect_map import EffectMap
from imaginelens.mediation.map_files import read_map, write_map
from imaginelens.mediation.map_store import MANIFEST, MapStore
from imaginelens.mediation.provenance import Provenance

NAN = float("nan")
SHARD = "shard-000000.safetensors"


def shard(number: int = 0, n: int = 3, **words: Any) -> EffectMap:
    """Part `number` of a study: its own examples, random numbers, some of them missing."""
    rng = np.random.default_rng(number)
    cells = tuple(
        Cell("resid_post", layer, f"latent[{step}]", None, (f"blocks.{layer}.hook_resid_post",))
        for layer in range(2)
        for step in range(2)
    )
    after = rng.normal(size=(4, n))
    after[0, 0] = NAN
    flags = np.zeros((4, n), np.int8)
    flags[1, 0] = 3
    found = EffectMap(
        cells=cells,
        before=rng.normal(size=n),
        other=rng.normal(size=n),
        after=after,
        flags=flags,
        change=rng.uniform(size=(4, n)),
        groups=tuple(f"image {number}" for _ in range(n)),
        metric="logit_diff",
        unit="logits",
        binary=False,
        direction="denoise",
        context="fixed",
        edit="Swap",
        sham=np.zeros(n),
        notes=(f"chunk {number} was split once: out of memory", "a note with é and \ud800"),
        provenance=Provenance(
            "Tiny", "", "float64", "cpu", (("torch", "2"),), 0, f"{number}", "y01 - y00", 3, 0.1
        ),
        keys=tuple(f"pair {number}.{i}" for i in range(n)),
    )
    return replace(found, **words)


def same(one: EffectMap, two: EffectMap) -> bool:
    """Whether two maps are equal to the last bit, nan included, and in the types of their words."""
    for field in fields(EffectMap):
        a, b = getattr(one, field.name), getattr(two, field.name)
        if isinstance(a, np.ndarray) and isinstance(b, np.ndarray):
            equal = a.tobytes() == b.tobytes() and a.dtype == b.dtype and a.shape == b.shape
        else:
            equal = a == b and repr(a) == repr(b)
        if not equal:
            return False
    return True


# --- what is saved comes back ---------------------------------------------------------------------


def test_saved_and_loaded_is_the_same(tmp_path: Path) -> None:
    found = shard()
    assert found.save(tmp_path / "deep" / "out") == tmp_path / "deep" / "out"
    back = EffectMap.load(tmp_path / "deep" / "out")
    assert same(back, found)
    assert not same(back, shard(1))
    assert sorted(path.name for path in (tmp_path / "deep" / "out").iterdir()) == [MANIFEST, SHARD]


@pytest.mark.parametrize(
    "words",
    [
        {"other": None, "sham": None, "groups": None, "keys": (), "notes": ()},
        {"groups": (1, "1", True)},
        {"groups": (-(10**30), "", "\n")},
        {"limits": (-0.1, 1e300), "before": np.zeros(3), "after": np.zeros((4, 3))},
        {"direction": "mixed", "context": "mixed", "unit": ""},
        {"change": np.full((4, 3), np.inf)},
        {"before": np.array([-0.0, 5e-324, NAN])},
        {"cells": tuple(Cell("z", None, f"text.find('{c}')", 3, ()) for c in "abc\x00")},
        {"provenance": replace(shard().provenance, versions=(), seconds=1 / 3)},
    ],
)
def test_every_word_comes_back(tmp_path: Path, words: dict[str, Any]) -> None:
    found = shard(**words)
    assert same(EffectMap.load(found.save(tmp_path)), found)


def test_bits_of_nan_come_back(tmp_path: Path) -> None:
    odd = np.array(struct.unpack("3d", struct.pack("3Q", 0x7FF8000000000001, 0xFFF8 << 48, 1)))
    found = shard(before=odd, after=np.tile(odd, (4, 1)))
    assert same(EffectMap.load(found.save(tmp_path)), found)


def test_arrays_in_another_order_come_back(tmp_path: Path) -> None:
    after = np.asfortranarray(shard().after)
    found = shard(after=after, change=shard(n=6).change[:, ::2])
    assert not found.after.flags.c_contiguous
    back = EffectMap.load(found.save(tmp_path))
    np.testing.assert_array_equal(back.after, after)
    np.testing.assert_array_equal(back.change, found.change)


def test_numbers_of_numpy_as_labels_come_back_as_numbers(tmp_path: Path) -> None:
    back = EffectMap.load(shard(groups=tuple(np.arange(3))).save(tmp_path))
    assert back.groups == (0, 1, 2)
    assert all(type(label) is int for label in back.groups)


def test_equal_maps_are_equal_files(tmp_path: Path) -> None:
    shard().save(tmp_path / "one")
    shard().save(tmp_path / "two")
    one, two = ((tmp_path / name / SHARD).read_bytes() for name in ("one", "two"))
    assert one == two


def test_saving_again_replaces(tmp_path: Path) -> None:
    shard().save(tmp_path)
    shard(1).save(tmp_path)
    assert same(EffectMap.load(tmp_path), shard(1))


def test_arithmetic_survives_saving(tmp_path: Path) -> None:
    found = shard() - shard(direction="noise")
    assert same(EffectMap.load(found.save(tmp_path)), found)


def test_a_map_is_not_saved_over_a_study(tmp_path: Path) -> None:
    MapStore(tmp_path, plan={"metric": "logit_diff"}, shards=2)
    with pytest.raises(il.CheckpointError, match="only there is 'metric' = 'logit_diff'"):
        shard().save(tmp_path)


@pytest.mark.parametrize("label", [1.5, None, ("a", 1), b"a"])
def test_labels_that_json_cannot_hold_are_refused(tmp_path: Path, label: Any) -> None:
    with pytest.raises(
        il.InputError, match=r"the group of example 1 is .*; name the groups by str"
    ):
        shard(groups=("a", label, "b")).save(tmp_path)


def test_words_that_json_cannot_hold_are_refused(tmp_path: Path) -> None:
    provenance = replace(shard().provenance, seconds=NAN)
    with pytest.raises(il.InputError, match="the words of the map cannot be written"):
        shard(provenance=provenance).save(tmp_path)
    provenance = replace(shard().provenance)
    object.__setattr__(provenance, "seed", np.int64(1))
    with pytest.raises(il.InputError, match="the words of the map cannot be written"):
        shard(provenance=provenance).save(tmp_path)


# --- what is bitten is refused --------------------------------------------------------------------


def test_every_changed_byte_is_found(tmp_path: Path) -> None:
    path = tmp_path / SHARD
    write_map(path, shard(n=2))
    content = path.read_bytes()
    for where in range(len(content)):
        path.write_bytes(content[:where] + bytes([content[where] ^ 1]) + content[where + 1 :])
        with pytest.raises(il.CheckpointError, match=SHARD):
            read_map(path)
    path.write_bytes(content)
    assert same(read_map(path), shard(n=2))


@given(st.floats(0, 1, exclude_max=True))
@settings(deadline=None, max_examples=50)
def test_a_torn_part_is_named(share: float) -> None:
    from tempfile import TemporaryDirectory

    with TemporaryDirectory() as folder:
        shard().save(folder)
        path = Path(folder) / SHARD
        content = path.read_bytes()
        path.write_bytes(content[: int(share * len(content))])
        with pytest.raises(il.CheckpointError, match=rf"{SHARD} is torn or no map .*again"):
            EffectMap.load(folder)


def tampered(folder: Path, change: Callable[[dict[str, Any], dict[str, Any]], None]) -> Path:
    """A saved map whose header and arrays were changed, with the digest that goes with them."""
    shard().save(folder)
    path = folder / SHARD
    arrays = load_file(path)
    raw = path.read_bytes()
    (size,) = struct.unpack("<Q", raw[:8])
    header = json.loads(json.loads(raw[8 : 8 + size])["__metadata__"][map_files.HEADER])
    change(header, arrays)
    if isinstance(header.get("map"), dict):
        header["digest"] = map_files._digest(arrays, header["map"])
    path.write_bytes(to_bytes(arrays, metadata={map_files.HEADER: json.dumps(header)}))
    return folder


def test_a_map_that_is_not_tampered_with_loads(tmp_path: Path) -> None:
    assert same(EffectMap.load(tampered(tmp_path, lambda header, arrays: None)), shard())


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda h, a: h.update(version=2), "has the version 2 of the format"),
        (lambda h, a: h.update(version=True), "has the version True"),
        (lambda h, a: h.pop("version"), "has the version None"),
        (lambda h, a: h.pop("map"), "'map'"),
        (lambda h, a: h["map"].pop("metric"), "look at 'metric'"),
        (lambda h, a: h["map"].update(path="../../x"), "look at 'path'"),
        (lambda h, a: h["map"].update(metric=1), "metric is 1, expected str"),
        (lambda h, a: h["map"].update(binary=0), "binary is 0, expected bool"),
        (lambda h, a: h["map"].update(direction="up"), "direction"),
        (lambda h, a: h["map"].update(cells=[]), "needs cells"),
        (lambda h, a: h["map"].update(cells=None), "torn|hold a map"),
        (lambda h, a: h["map"]["cells"].pop(), "after"),
        (lambda h, a: h["map"]["cells"][0].update(layer="0"), "layer"),
        (lambda h, a: h["map"]["cells"][0].update(odd=1), "look at 'odd'"),
        (lambda h, a: h["map"].update(notes=[1]), "notes holds something that is no text"),
        (lambda h, a: h["map"].update(keys=["a"]), "1 keys came with 3 examples"),
        (lambda h, a: h["map"].update(groups=[1.5, 1, 2]), "groups holds something"),
        (lambda h, a: h["map"].update(groups="abc"), "groups is 'abc'"),
        (lambda h, a: h["map"].update(limits=[1]), "hold a map"),
        (lambda h, a: h["map"]["provenance"].update(seed="0"), "seed"),
        (lambda h, a: h["map"]["provenance"].pop("model"), "look at 'model'"),
        (lambda h, a: a.pop("flags"), "look at 'flags'"),
        (lambda h, a: a.update(extra=np.zeros(1)), "look at 'extra'"),
        (lambda h, a: a.update(after=np.zeros((4, 3), np.float32)), "after"),
        (lambda h, a: a.update(after=np.zeros((3, 4))), "after"),
        (lambda h, a: a.update(before=np.full(3, np.inf)), "before is inf"),
        (lambda h, a: a.update(flags=np.full((4, 3), 9, np.int8)), "flags holds 9"),
    ],
)
def test_a_file_that_is_no_map_is_refused(tmp_path: Path, change: Any, said: str) -> None:
    with pytest.raises(il.CheckpointError, match=said) as caught:
        EffectMap.load(tampered(tmp_path, change))
    assert SHARD in str(caught.value)


def test_another_safetensors_file_is_refused(tmp_path: Path) -> None:
    shard().save(tmp_path)
    (tmp_path / SHARD).write_bytes(to_bytes({"before": np.zeros(3)}))
    with pytest.raises(il.CheckpointError, match="has the version None"):
        EffectMap.load(tmp_path)


def test_links_are_not_followed(tmp_path: Path) -> None:
    shard().save(tmp_path / "there")
    shard(1).save(tmp_path / "here")
    for name in (SHARD, MANIFEST):
        path = tmp_path / "here" / name
        content = path.read_bytes()
        path.unlink()
        path.symlink_to(tmp_path / "there" / name)
        with pytest.raises(il.CheckpointError, match=f"{name} is a link, which is not followed"):
            EffectMap.load(tmp_path / "here")
        path.unlink()
        path.write_bytes(content)
    assert same(EffectMap.load(tmp_path / "here"), shard(1))


def test_a_link_to_nowhere_is_not_written_through(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / MANIFEST).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(il.CheckpointError, match="is a link"):
        shard().save(tmp_path / "out")
    assert not (tmp_path / "elsewhere").exists()


def test_a_folder_in_the_place_of_a_part_is_refused(tmp_path: Path) -> None:
    shard().save(tmp_path)
    (tmp_path / SHARD).unlink()
    (tmp_path / SHARD).mkdir()
    with pytest.raises(il.CheckpointError, match=f"{SHARD} is missing"):
        EffectMap.load(tmp_path)


@pytest.mark.parametrize("number", ["../x", -1, 2, True, 1.0])
def test_a_part_that_is_no_number_of_the_study_is_refused(tmp_path: Path, number: Any) -> None:
    store = MapStore(tmp_path, plan={}, shards=2)
    with pytest.raises(il.InputError, match="parts are numbered from 0 to 1"):
        store._path(number)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "cannot be read"),
        (b"{", "cannot be read"),
        (b"\xff\xfe", "cannot be read"),
        (b"[" * 100_000, "cannot be read"),
        (b"[]", "has the version None"),
        (b'{"version": 2, "shards": 1, "plan": {}}', "has the version 2 .* reads 1"),
        (b'{"version": 1, "shards": 1, "plan": {}, "files": ["../x"]}', "holds .*files"),
        (b'{"version": 1, "shards": 0, "plan": {}}', "should hold version, shards and plan"),
        (b'{"version": 1, "shards": 1, "plan": []}', "should hold version, shards and plan"),
        (b'{"version": 1, "plan": {}}', "should hold version, shards and plan"),
        (b'{"version": 1, "shards": 1' + 400 * b"0" + b', "plan": {}}', "parts, expected 1 to"),
    ],
)
def test_a_manifest_that_is_none_is_refused(tmp_path: Path, content: bytes, said: str) -> None:
    shard().save(tmp_path)
    (tmp_path / MANIFEST).write_bytes(content)
    with pytest.raises(il.CheckpointError, match=said) as caught:
        EffectMap.load(tmp_path)
    assert MANIFEST in str(caught.value)


def test_no_map_is_told(tmp_path: Path) -> None:
    for folder in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(il.CheckpointError, match=f"there is no map in .*no {MANIFEST}"):
            EffectMap.load(folder)
    assert not (tmp_path / "nowhere").exists()


# --- a study in parts -----------------------------------------------------------------------------


def test_parts_come_back_in_the_order_of_their_numbers(tmp_path: Path) -> None:
    store = MapStore(tmp_path, plan={"seed": 0}, shards=12)
    for number in (11, 3, 0, 7, 1, 2, 10, 4, 5, 9, 8, 6):
        store.write_shard(number, shard(number))
    expected = EffectMap.merge([shard(number) for number in range(12)])
    assert same(store.load(), expected)
    assert same(EffectMap.load(tmp_path), expected)
    assert (store.done(), store.missing()) == (set(range(12)), [])
    assert repr(store).endswith("12 of 12 parts done)")


def test_the_order_is_that_of_numbers_not_of_sets(tmp_path: Path) -> None:
    store, numbers = MapStore(tmp_path, plan={}), (128, 64, 0, 8, 512, 16, 256)
    for number in numbers:
        store.write_shard(number, shard(number))
    expected = EffectMap.merge([shard(number) for number in sorted(numbers)])
    assert same(store.load(partial=True), expected)


def test_missing_parts_are_named(tmp_path: Path) -> None:
    store = MapStore(tmp_path, plan={}, shards=4)
    with pytest.raises(il.CheckpointError, match=r"part 0, 1, 2, 3 of the map"):
        store.load()
    with pytest.raises(il.CheckpointError, match=r"part 0, 1, 2, 3 of the map"):
        store.load(partial=True)
    for number in (0, 2):
        store.write_shard(number, shard(number))
    with pytest.raises(il.CheckpointError, match=r"part 1, 3 of the map .* is missing"):
        EffectMap.load(tmp_path)
    assert same(store.load(partial=True), EffectMap.merge([shard(0), shard(2)]))
    with pytest.raises(il.CheckpointError, match=r"shard-000001\.safetensors is missing"):
        store.read_shard(1)


def test_a_study_of_unknown_length_misses_what_is_below_its_last_part(tmp_path: Path) -> None:
    store = MapStore(tmp_path, plan={})
    assert store.missing() == [0]
    store.write_shard(2, shard(2))
    assert store.missing() == [0, 1]
    with pytest.raises(il.CheckpointError, match="part 0, 1 of the map"):
        store.load()
    assert repr(store).endswith("1 parts done)")


def test_a_part_beyond_the_study_is_refused(tmp_path: Path) -> None:
    store = MapStore(tmp_path, plan={}, shards=1)
    store.write_shard(0, shard())
    write_map(tmp_path / "shard-000005.safetensors", shard(5))
    with pytest.raises(il.CheckpointError, match="part 5 of a study of 1 parts"):
        store.load()


def test_parts_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    store = MapStore(tmp_path, plan={}, shards=2)
    store.write_shard(0, shard(0))
    store.write_shard(1, shard(1, metric="prob"))
    with pytest.raises(il.CheckpointError, match=r"do not make one map: .* differ in metric"):
        store.load()


def test_the_same_plan_goes_on(tmp_path: Path) -> None:
    plan = {"sites": ("resid_post", "z"), "n": 3, "deep": {"margin": 0.1, "none": None}}
    MapStore(tmp_path, plan=plan, shards=3).write_shard(1, shard(1))
    again = MapStore(tmp_path, plan=plan, shards=3)
    assert again.done() == {1}
    assert MapStore(tmp_path).plan == {**plan, "sites": ["resid_post", "z"]}
    assert MapStore(tmp_path).shards == 3
    assert MapStore(tmp_path, plan=plan).shards == 3


@pytest.mark.parametrize(
    ("plan", "said"),
    [
        ({"a": 1, "b": {"c": [1, 2], "d": 2}}, "'b.c' is .1, 3. there and .1, 2. here"),
        ({"a": 2, "b": {"c": [1, 3]}}, "'a' is 1 there and 2 here"),
        ({"a": True, "b": {"c": [1, 3], "d": 2}}, "'a' is 1 there and True here"),
        ({"a": 1, "b": {"c": [1, 3]}}, "only there is 'b.d' = 2"),
        ({"a": 1, "b": {"c": [1, 3], "d": 2}, "e": None}, "only here is 'e' = None"),
        ({"a": 1, "b": 3}, "'b' is "),
        ({}, "only there is 'a' = 1"),
    ],
)
def test_another_plan_is_refused(tmp_path: Path, plan: dict[str, Any], said: str) -> None:
    MapStore(tmp_path, plan={"a": 1, "b": {"c": [1, 3], "d": 2}}).write_shard(0, shard())
    before = (tmp_path / MANIFEST).read_bytes()
    with pytest.raises(il.CheckpointError, match=f"another plan: {said}"):
        MapStore(tmp_path, plan=plan)
    assert (tmp_path / MANIFEST).read_bytes() == before


def test_another_number_of_parts_is_refused(tmp_path: Path) -> None:
    MapStore(tmp_path, plan={}, shards=2)
    with pytest.raises(il.CheckpointError, match="a study of 2 parts, and this one has 3"):
        MapStore(tmp_path, plan={}, shards=3)


@pytest.mark.parametrize(
    ("plan", "said"),
    [
        ({1: 2}, "the plan has the key 1; use strings"),
        ({"a": {"b": {3}}}, "the plan, a, b is .3., which a JSON file cannot hold"),
        ({"a": [0, NAN]}, "the plan, a, 1 is nan"),
        ({"a": float("-inf")}, "is -inf"),
        ({"a": np.float32(1)}, "a JSON file cannot hold"),
    ],
)
def test_a_plan_that_json_cannot_hold_is_refused(plan: dict[Any, Any], said: str) -> None:
    with pytest.raises(il.InputError, match=said):
        map_store._plain(plan, "the plan")


@pytest.mark.parametrize("shards", [0, -1, True])
def test_a_number_of_parts_that_is_none_is_refused(tmp_path: Path, shards: Any) -> None:
    with pytest.raises(il.InputError, match="expected how many parts there are"):
        MapStore(tmp_path, plan={}, shards=shards)


# --- killed at any instant ------------------------------------------------------------------------


def in_a_child(work: Callable[[], None]) -> int:
    """The id of a copy of this process that does the work and ends."""
    child = os.fork()
    if child == 0:
        try:
            work()
        except BaseException:
            os._exit(1)
        os._exit(0)
    return child


def test_a_study_killed_at_20_random_instants(tmp_path: Path) -> None:
    parts = [shard(number, n=2_000) for number in range(10)]
    MapStore(tmp_path, plan={}, shards=10)

    def write() -> None:
        store = MapStore(tmp_path, plan={}, shards=10)
        for number in cycle(range(10)):  # over and over, so that it never ends by itself
            store.write_shard(number, parts[number])

    draw = random.Random(0)
    for _ in range(20):
        child = in_a_child(write)
        time.sleep(draw.uniform(0.0, 0.05))
        os.kill(child, signal.SIGKILL)
        assert os.waitpid(child, 0)[1] == signal.SIGKILL
        store = MapStore(tmp_path)
        for number in store.done():
            assert same(store.read_shard(number), parts[number])
    for number in store.missing():
        store.write_shard(number, parts[number])
    assert same(store.load(), EffectMap.merge(parts))


@pytest.mark.parametrize("again", [False, True], ids=["a new part", "an old part"])
@pytest.mark.parametrize("instant", range(8))
def test_a_writer_killed_between_any_two_steps(tmp_path: Path, instant: int, again: bool) -> None:
    """Before and after the bytes are flushed, synced, renamed, and the folder is synced."""
    store = MapStore(tmp_path, plan={}, shards=1)
    if again:
        store.write_shard(0, shard(0))
    passed = 0

    def deadly(call: Callable[..., Any]) -> Callable[..., Any]:
        def step(*given: Any, **words: Any) -> Any:
            nonlocal passed
            for half in range(2):
                if passed == instant:
                    os.kill(os.getpid(), signal.SIGKILL)
                passed += 1
                if not half:
                    done = call(*given, **words)
            return done

        return step

    def write() -> None:
        os.open, os.fsync, os.replace = map(deadly, (os.open, os.fsync, os.replace))
        store.write_shard(0, shard(1))

    assert os.waitpid(in_a_child(write), 0)[1] == signal.SIGKILL
    renamed = instant >= 3  # fsync of the file: 0 and 1; rename: from 2 to 3
    assert store.done() == ({0} if again or renamed else set())
    if store.done():
        assert same(store.load(), shard(1 if renamed else 0))
    assert (len(list(tmp_path.glob(".*.partial"))) == 1) == (not renamed)
    store.write_shard(0, shard(2))  # goes on, whatever was left behind
    assert same(store.load(), shard(2))


def test_a_full_disk_leaves_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shard().save(tmp_path)

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        shard(1).save(tmp_path)
    assert same(EffectMap.load(tmp_path), shard())
    assert not list(tmp_path.glob(".*.partial"))


def test_leftovers_and_files_of_others_are_ignored(tmp_path: Path) -> None:
    shard().save(tmp_path)
    for name in (f".{SHARD}.12-ab.partial", "shard-1.safetensors", f"{SHARD}.bak", "notes.txt"):
        (tmp_path / name).write_bytes(b"torn")
    assert MapStore(tmp_path).done() == {0}
    assert same(EffectMap.load(tmp_path), shard())


def test_two_writers_of_one_study(tmp_path: Path) -> None:
    def worker(rank: int) -> Callable[[], None]:
        def write() -> None:
            store = MapStore(tmp_path, plan={"n": 8}, shards=8)
            for number in range(rank, 8, 2):
                store.write_shard(number, shard(number))

        return write

    children = [in_a_child(worker(rank)) for rank in range(2)]
    assert [os.waitpid(child, 0)[1] for child in children] == [0, 0]
    assert same(EffectMap.load(tmp_path), EffectMap.merge([shard(i) for i in range(8)]))
