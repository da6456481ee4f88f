"""Results, probes, erasers and organisms on the Hub, which here is a folder behind its own API."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from local_hub import LocalHub

import imaginelens as il
from imaginelens.hooks.errors import CheckpointError, InputError
from imaginelens.hooks.hub import Address, Origin, hub_origin
from imaginelens.mediation import result_files
from imaginelens.mediation.study_hub import fetch_study, push_study
from imaginelens.probes.map_result import ProbeMap

PLAIN = {".safetensors", ".json", ".csv", ".md", ".jinja", ".html"}


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> LocalHub:
    return LocalHub(tmp_path / "hub", monkeypatch)


def same(one: Any, other: Any) -> bool:
    """Whether two results are the same, to the last bit and type."""
    if type(one) is not type(other):
        return False
    if isinstance(one, np.ndarray):
        return one.dtype == other.dtype and np.array_equal(
            one, other, equal_nan=one.dtype.kind == "f"
        )
    if is_dataclass(one) and not isinstance(one, il.Metric):
        names = [each.name for each in fields(one) if each.init and not each.name.startswith("_")]
        return all(same(getattr(one, name), getattr(other, name)) for name in names)
    if isinstance(one, tuple | list):
        return len(one) == len(other) and all(map(same, one, other))
    if isinstance(one, dict):
        return list(one) == list(other) and all(same(one[key], other[key]) for key in one)
    return one == other or (one != one and other != other)


# ---- some of each result -----------------------------------------------------------------------


@pytest.fixture(scope="module")
def studied() -> dict[str, Any]:
    """Results of the library's own studies on an organism."""
    lens = il.load("latent-content")
    task = lens.task(n=12, seed=1)
    worlds = il.counterfactuals(lens, task, metric=il.source_answer, context="free")
    found = {
        "PotentialOutcomes": worlds,
        "Effects": worlds.effects(),
        "Necessity": il.necessity(lens, task, edits=[il.Zero(), il.Noise()]),
        "Interchange": il.interchange(lens, task),
        "Dependence": il.input_dependence(lens, task),
    }
    found["EffectMap"] = il.sweep(
        lens, task, sites="resid_post", positions=il.latent, metric=il.logit_diff
    )
    return found


def made_up() -> dict[str, Any]:
    """Results from arrays: every other kind."""
    rng = np.random.default_rng(0)
    cells = [
        il.Cell("resid_post", k, "latent[0]", None, (f"blocks.{k}.hook_resid_post",))
        for k in (0, 1)
    ]
    one = il.EffectMap.from_arrays(
        cells=cells, before=rng.normal(size=6), after=rng.normal(size=(2, 6)),
        other=rng.normal(size=6), keys=list("abcdef"),
    )  # fmt: skip
    none, whole = np.zeros(5), rng.normal(size=5) + 3
    return {
        "StepInfluence": il.StepInfluence(rng.normal(size=(2, 2, 6)), one, one),
        "Sufficiency": il.Sufficiency(tuple(cells), (0, 1, 2, 3, 4, 5), one),
        "Selectivity": il.Selectivity(
            cells=(cells[0],), tested=(0, 1, 2), effects=rng.normal(size=3),
            random=rng.normal(size=(4, 3)), exhaustive=False, sign=-1.0, unit="logits",
            binary=False, groups=None,
        ),
        "FaithfulnessCurve": il.FaithfulnessCurve.from_arrays(
            kept=[whole] * 10, none=none, whole=whole
        ),
        "Interventional": il.Interventional(
            y00=rng.normal(size=(4, 4)), y11=rng.normal(size=(4, 4)), y10=rng.normal(size=(4, 4)),
            crossed=~np.eye(4, dtype=bool), donors=(0, 1, 2, 3), do="BlankImage",
            groups=(1, 1, 2, 3),
        ),
        "Agreement": il.Agreement(
            cells=tuple(cells), approximate=rng.normal(size=(2, 6)), exact=rng.normal(size=(2, 6)),
            drawn=np.array([True, True]), named=np.array([True, False]), n_cells=8,
            method="ig", unit="logits",
        ),
    }  # fmt: skip


# ---- results -----------------------------------------------------------------------------------

FROM_STUDIES = ["PotentialOutcomes", "Effects", "Necessity", "Interchange", "Dependence"]


@pytest.mark.parametrize("name", [*FROM_STUDIES, *made_up()])
def test_a_pushed_result_is_the_result(
    name: str, studied: dict[str, Any], hub: LocalHub, tmp_path: Path
) -> None:
    result = (studied | made_up())[name]
    address = result.push_to_hub(f"me/{name}", private=True, token="hf_x")
    again = type(result).load(f"me/{name}")
    assert same(again, result)
    assert repr(again) == repr(result)
    assert same(type(result).load(result.save(tmp_path / "folder")), result)

    assert address == f"https://huggingface.co/datasets/me/{name}"
    assert hub.private["dataset", f"me/{name}"]
    assert ("HfApi", {"token": "hf_x"}) in hub.calls
    assert {Path(each).suffix for each in hub.files(f"me/{name}", "dataset")} <= PLAIN


def test_what_is_loaded_can_still_be_asked(studied: dict[str, Any], tmp_path: Path) -> None:
    effects = il.Effects.load(studied["Effects"].save(tmp_path / "e"))
    assert effects.tnie.ci() == studied["Effects"].tnie.ci()
    assert effects.worlds.controls.sham == 0.0
    table = il.Necessity.load(studied["Necessity"].save(tmp_path / "n"))
    assert table["Zero()"].metric is il.accuracy
    assert table.to_dataframe().equals(studied["Necessity"].to_dataframe())
    interchange = il.Interchange.load(studied["Interchange"].save(tmp_path / "i"))
    assert interchange.shares() == studied["Interchange"].shares()
    assert interchange.landing.relative_change == studied["Interchange"].landing.relative_change


def test_a_map_is_pushed_with_its_table(studied: dict[str, Any], hub: LocalHub) -> None:
    found = studied["EffectMap"]
    address = found.push_to_hub("me/map")
    again = il.EffectMap.load("me/map", revision=address.revision)
    assert same(again, found)
    assert hub_origin(again) == Origin("me/map", "dataset", address.revision)
    assert hub.files("me/map", "dataset") == {
        "README.md", "map.json", "shard-000000.safetensors", "table.csv",
    }  # fmt: skip


def test_datasets_reads_the_table_that_the_card_names(
    studied: dict[str, Any], hub: LocalHub, tmp_path: Path
) -> None:
    datasets = pytest.importorskip("datasets")
    studied["EffectMap"].push_to_hub("me/map")
    folder = tmp_path / "clone"
    shutil.copytree(sorted((tmp_path / "hub" / "dataset" / "me" / "map").glob("*/"))[0], folder)
    table = datasets.load_dataset(str(folder), cache_dir=str(tmp_path / "cache"))["train"]
    wanted = studied["EffectMap"].to_dataframe()
    assert table.column_names == list(wanted.columns)
    np.testing.assert_allclose(table["effect"], wanted["effect"], rtol=1e-12)


# ---- revisions ---------------------------------------------------------------------------------


def test_a_revision_is_pinned_and_remembered(studied: dict[str, Any], hub: LocalHub) -> None:
    worlds = studied["PotentialOutcomes"]
    first = worlds.push_to_hub("me/worlds")
    second = worlds.subset(np.arange(12) < 6).push_to_hub("me/worlds")
    assert isinstance(first, Address)
    assert first.revision != second.revision
    newest = il.PotentialOutcomes.load("me/worlds")
    pinned = il.PotentialOutcomes.load("me/worlds", revision=first.revision)
    assert (len(newest), len(pinned)) == (6, 12)
    assert hub_origin(newest) == Origin("me/worlds", "dataset", second.revision)
    assert str(hub_origin(pinned)) == f"me/worlds at {first.revision[:8]}"
    assert hub_origin(worlds) is None
    assert hub_origin(replace(pinned, unit="x")) is None
    asked = [given["revision"] for what, given in hub.calls if what == "snapshot_download"]
    assert asked == [None, first.revision]


# ---- cards -------------------------------------------------------------------------------------


def header(card: str) -> dict[str, Any]:
    return yaml.safe_load(card.split("---\n")[1])


def test_a_card_invents_no_licence(studied: dict[str, Any], hub: LocalHub) -> None:
    studied["Effects"].push_to_hub("me/effects")
    words = header(hub.text("me/effects", "README.md", "dataset"))
    assert words["library_name"] == "imaginelens"
    assert "license" not in words
    assert {"imaginelens", "interpretability", "causal-mediation", "effects"} <= set(words["tags"])
    studied["Effects"].push_to_hub("me/open", license="cc-by-4.0")
    card = hub.text("me/open", "README.md", "dataset")
    assert header(card)["license"] == "cc-by-4.0"
    assert repr(studied["Effects"]).splitlines()[0] in card


# ---- what goes wrong ---------------------------------------------------------------------------


def test_errors_are_one_sentence(studied: dict[str, Any], hub: LocalHub) -> None:
    result = studied["Effects"]
    with pytest.raises(CheckpointError, match="gave none of that name"):
        il.Effects.load("me/nothing")
    result.push_to_hub("me/effects")
    with pytest.raises(CheckpointError, match="it has no revision 'v9'"):
        il.Effects.load("me/effects", revision="v9")
    with pytest.raises(CheckpointError, match="holds a Effects, not a Necessity"):
        il.Necessity.load("me/effects")
    with pytest.raises(CheckpointError, match="ids of the form 'owner/name'"):
        il.Effects.load("a/b/c")
    with pytest.raises(CheckpointError, match="is no id of the form"):
        result.push_to_hub("a/b/c")
    hub.offline = True
    with pytest.raises(
        CheckpointError, match="was not put on the Hub: it cannot be reached"
    ) as told:
        result.push_to_hub("me/effects")
    assert "\n" not in str(told.value)
    with pytest.raises(CheckpointError, match="it cannot be reached, or HF_HUB_OFFLINE") as told:
        il.Effects.load("me/effects")
    assert "\n" not in str(told.value)


def test_the_real_hub_offline_says_so() -> None:
    """The tests run with HF_HUB_OFFLINE, so that this asks huggingface_hub itself."""
    with pytest.raises(CheckpointError, match="cannot be reached, or HF_HUB_OFFLINE is set"):
        il.Effects.load("imaginelens-nobody/nothing")


def test_a_folder_has_no_revision(studied: dict[str, Any], tmp_path: Path) -> None:
    folder = studied["Effects"].save(tmp_path / "e")
    with pytest.raises(CheckpointError, match="folders have no revision 'v1'"):
        il.Effects.load(folder, revision="v1")
    with pytest.raises(CheckpointError, match="holds a result already"):
        studied["Effects"].save(folder)
    with pytest.raises(CheckpointError, match="there is no result in"):
        il.Effects.load(tmp_path / "none")


def changed(folder: Path, change: Callable[[Any], None], *, redo: bool = True) -> Path:
    """A saved result with other words, and the digest that belongs to them."""
    path = folder / "result.json"
    header = json.loads(path.read_text())
    change(header)
    if redo:
        content = (folder / "result.safetensors").read_bytes()
        header["digest"] = result_files._digest(content, header["result"])
    path.write_text(json.dumps(header))
    return folder


@pytest.mark.parametrize(
    ("change", "redo", "words"),
    [
        (lambda h: h.update(version=9), True, "has version 9 of the format"),
        (lambda h: h["result"]["fields"].update(scale="ratio"), False, "do not belong together"),
        (lambda h: h["result"]["fields"].update(scale="other"), True, "does not hold a result"),
        (lambda h: h["result"].update({"class": "Popen"}), True, "'Popen', which is no class"),
        (lambda h: h["result"].update(fields={}), True, "does not hold a result"),
        (lambda h: h.pop("result"), False, "'result'"),
        (lambda h: h["result"]["fields"].update(scale={"metric": "Readout"}), True, "is no metric"),
        (lambda h: h["result"]["fields"].update(scale={"who": 1}), True, "a part of it is a 'who'"),
    ],
)
def test_a_file_that_was_changed_is_refused(
    studied: dict[str, Any], tmp_path: Path, change: Any, redo: bool, words: str
) -> None:
    folder = studied["Effects"].save(tmp_path / "e")
    with pytest.raises(CheckpointError, match=words):
        il.Effects.load(changed(folder, change, redo=redo))


def test_what_cannot_be_kept_is_refused(studied: dict[str, Any], tmp_path: Path) -> None:
    table = studied["Necessity"]
    own = il.Metric("mine", lambda readout: readout.log_prob, "nats")
    mine = replace(table, rows=tuple(replace(row, metric=own) for row in table.rows))
    with pytest.raises(InputError, match="a metric of your own, which is a function"):
        mine.save(tmp_path / "mine")
    odd = replace(studied["PotentialOutcomes"], groups=(object(),) * 12)
    with pytest.raises(InputError, match="is a object, which a saved result cannot hold"):
        odd.save(tmp_path / "odd")
    assert not (tmp_path / "odd").exists()


# ---- probes ------------------------------------------------------------------------------------


def test_an_eraser_and_a_probe_map(hub: LocalHub) -> None:
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(90, 2, 8)), np.arange(90) % 3
    x[:, :, 0] += 3 * (y == 0)[:, None]
    eraser = il.probes.erase(x, y)
    address = eraser.push_to_hub("me/eraser", license="mit")
    again = il.probes.Eraser.load("me/eraser", revision=address.revision)
    assert np.array_equal(again.transform(x), eraser.transform(x))
    assert hub_origin(again) == Origin("me/eraser", "model", address.revision)
    assert header(hub.text("me/eraser", "README.md"))["license"] == "mit"

    states = il.probes.States.of(x[:, :, None], y.tolist(), label="kind")
    found = il.probes.probe_map(states, permutations=20)
    found.push_to_hub("me/probes")
    again = ProbeMap.load("me/probes")
    assert np.array_equal(again.scores, found.scores)
    assert hub_origin(again).repo_id == "me/probes"
    assert hub.files("me/probes") == {"README.md", "map.json", "map.safetensors"}


# ---- organisms ---------------------------------------------------------------------------------


def test_an_organism_comes_back_with_its_task(
    hub: LocalHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lens = il.load("latent-content")
    address = lens.push_to_hub("me/hunter")
    assert address == "https://huggingface.co/me/hunter"
    card = hub.text("me/hunter", "README.md")
    assert header(card)["pipeline_tag"] == "image-text-to-text"
    assert "Free greedy accuracy" in card
    assert not {f for f in hub.files("me/hunter") if Path(f).suffix not in PLAIN}

    folder = Path(hub.snapshot_download("me/hunter"))
    again = il.load(folder)
    assert isinstance(again, il.Organism)
    assert again.card == lens.card
    task = lens.task(n=2, seed=5)
    assert again.run(task.base).answers == lens.run(task.base).answers
    assert again.task(n=2, seed=5).base_answers == task.base_answers
    assert torch.equal(again.run(task.base).latents, lens.run(task.base).latents)


def test_a_checkpoint_with_another_card_is_no_organism(tmp_path: Path) -> None:
    folder = tmp_path / "plain"
    shutil.copytree(il.organisms.organism.folder("latent-content"), folder)
    for words in ('{"variant": "large"}', "[1]", "{", "{}"):
        (folder / "card.json").write_text(words)
        assert not isinstance(il.load(folder), il.Organism)


# ---- a study -----------------------------------------------------------------------------------


def test_the_folder_of_a_study(studied: dict[str, Any], hub: LocalHub, tmp_path: Path) -> None:
    found, home = studied["EffectMap"], tmp_path / "study"
    for name in ("layers", "heads"):
        found.save(home / name)
        found.save(home / name / "chunks")
        (home / name / "summary.csv").write_text("a\n1\n")
    (home / "report.html").write_text("<p>")
    push_study(home, "me/study")
    assert hub.files("me/study", "dataset") == {
        "README.md", "report.html",
        *(f"{name}/{file}" for name in ("layers", "heads")
          for file in ("map.json", "shard-000000.safetensors", "summary.csv")),
    }  # fmt: skip
    folder = fetch_study("me/study")
    assert same(il.EffectMap.load(folder / "heads"), found)
    (home / "model.pt").write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"holds 'model\.pt', which no study writes"):
        push_study(home, "me/study")
    with pytest.raises(CheckpointError, match="there is no folder"):
        push_study(tmp_path / "none", "me/study")
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match="holds no map of a finished study"):
        push_study(tmp_path / "empty", "me/study")


# ---- the folder that stands for the Hub ----------------------------------------------------------


def test_an_argument_that_the_hub_does_not_have_fails(hub: LocalHub) -> None:
    with pytest.raises(TypeError, match="unexpected keyword argument 'repo'"):
        hub.create_repo("me/x", repo="y", exist_ok=True)
    with pytest.raises(TypeError, match="unexpected keyword argument 'branch'"):
        hub.snapshot_download("me/x", branch="y")


# ---- the real huggingface_hub, on a cache that it would have made --------------------------------

READ_OFFLINE = """
import imaginelens as il
from imaginelens.hooks.hub import hub_origin
lens = il.load("me/hunter", revision="main")
print(type(lens).__name__, lens.card["name"], len(lens.task(n=2).base))
found = il.EffectMap.load("me/map", revision="main")
print(len(found), hub_origin(found))
print(il.Effects.load("me/effects").te.value)
"""


def cached(cache: Path, kind: str, name: str, files: Path) -> str:
    """Lay files out as huggingface_hub keeps a repository that it has downloaded."""
    oid = "0123456789" * 4
    home = cache / f"{kind}--{name.replace('/', '--')}"
    (home / "refs").mkdir(parents=True)
    (home / "refs" / "main").write_text(oid)
    for path in files.rglob("*"):
        if path.is_file():
            blob = home / "blobs" / f"{len(list(home.rglob('*'))):040d}"
            blob.parent.mkdir(exist_ok=True)
            shutil.copyfile(path, blob)
            link = home / "snapshots" / oid / path.relative_to(files)
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to(blob)
    return oid


def test_what_was_downloaded_is_read_offline(studied: dict[str, Any], tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    cached(cache, "models", "me/hunter", il.organisms.organism.folder("latent-content"))
    oid = cached(cache, "datasets", "me/map", studied["EffectMap"].save(tmp_path / "map"))
    cached(cache, "datasets", "me/effects", studied["Effects"].save(tmp_path / "effects"))
    own = {**os.environ, "HF_HUB_CACHE": str(cache), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-W", "ignore", "-c", READ_OFFLINE]
    done = subprocess.run(command, env=own, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [
        "Organism latent-content 2",
        f"{len(studied['EffectMap'])} me/map at {oid[:8]}",
        str(studied["Effects"].te.value),
    ]
