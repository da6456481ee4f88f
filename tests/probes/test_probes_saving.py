"""A saved probe is the probe, to the last bit; what is torn, foreign or absent is told."""

import json
from pathlib import Path

import numpy as np
import pytest
from local_hub import LocalHub
from safetensors.numpy import load_file

from imaginelens.hooks.errors import CheckpointError
from imaginelens.hooks.hub import Origin, hub_origin
from imaginelens.probes.estimators import kinds, probe
from imaginelens.probes.fitting import fit_probe
from imaginelens.probes.result import ProbeResult
from imaginelens.probes.saving import load_probe
from imaginelens.probes.states import States

KINDS = sorted(kinds())


def fitted(kind: str, *, numbers: bool = False, **more) -> ProbeResult:
    rng = np.random.default_rng([1, 2])
    y = np.arange(60) % 3
    x = rng.normal(size=(60, 5))
    x[np.arange(60), y] += 4
    labels = (x[:, 0] + 0.1 * y).tolist() if numbers else np.array(["bar", "cross", "o"])[y]
    states = States.of(x, labels, label="shape: the last's")
    made = probe(kind, **({"epochs": 30} if kind in ("mlp", "attentive") else {}))
    return fit_probe(states, kind=made, permutations=20, **more)


@pytest.fixture(scope="module")
def results() -> dict[str, ProbeResult]:
    return {kind: fitted(kind) for kind in KINDS}


def same(first: ProbeResult, second: ProbeResult) -> None:
    """Every field, property and prediction, to the last bit."""
    for name in ("rows", "steps", "folds", "baseline", "shuffled", "y", "predictions"):
        left, right = getattr(first, name), getattr(second, name)
        np.testing.assert_array_equal(left, right)
        assert left.dtype == right.dtype
    if first.probabilities is not None:
        np.testing.assert_array_equal(first.probabilities, second.probabilities)
    assert set(first.beside) == set(second.beside)
    assert list(first.beside) == list(second.beside)
    assert repr(first) == repr(second)
    assert first.summary() == second.summary()
    assert first.probe == second.probe or first.probe.get_params() == second.probe.get_params()
    new = np.random.default_rng(3).normal(size=(20, 5))
    np.testing.assert_array_equal(first.probe.predict(new), second.probe.predict(new))
    if first.classes is not None:
        shares = first.probe.predict_proba(new), second.probe.predict_proba(new)
        np.testing.assert_array_equal(*shares)


@pytest.mark.parametrize("kind", KINDS)
def test_loaded_equals_saved(kind: str, results: dict[str, ProbeResult], tmp_path: Path) -> None:
    folder = results[kind].save(tmp_path / "probe")
    same(results[kind], load_probe(folder))
    same(results[kind], ProbeResult.from_pretrained(folder))
    files = {path.name for path in folder.iterdir()}
    assert files == {"probe.safetensors", "probe.json", "README.md"}
    learned = {n for n in load_file(folder / "probe.safetensors") if n.startswith("probe.")}
    assert learned == {f"probe.{n}" for n in results[kind].probe.readout_.arrays}


@pytest.mark.parametrize("kind", ["ridge", "mlp"])
def test_quantities_and_groups_are_kept(kind: str, tmp_path: Path) -> None:
    result = fitted(kind, numbers=True, groups=[f"picture {i // 2}" for i in range(60)])
    again = load_probe(result.save(tmp_path))
    same(result, again)
    assert again.classes is None
    np.testing.assert_array_equal(result.groups, again.groups)
    assert again.r2.n_groups == 30


def test_whole_number_classes_and_settings_of_ones_own(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(40, 6)), np.arange(40) % 2 * 7
    result = fit_probe(x, y, kind=probe("sparse", k=2, strengths=(0.5,)), controls=())
    again = load_probe(result.save(tmp_path))
    assert again.classes == (0, 7)
    assert again.probe.get_params() == {"k": 2, "strengths": (0.5,), "seed": 0}
    assert again.probe.coordinates_.tolist() == result.probe.coordinates_.tolist()
    assert again.verdict() == "untested"
    assert len(again.shuffled) == 0


def test_saving_again_replaces(results: dict[str, ProbeResult], tmp_path: Path) -> None:
    results["ridge"].save(tmp_path)
    results["lda"].save(tmp_path)
    same(results["lda"], load_probe(tmp_path))
    assert not list(tmp_path.glob(".*"))


def test_the_card(results: dict[str, ProbeResult], tmp_path: Path) -> None:
    text = (results["lda"].save(tmp_path) / "README.md").read_text()
    _, head, body = text.split("---\n", 2)
    assert "library_name: imaginelens" in head
    assert "- probe" in head
    assert results["lda"].summary() in body
    assert "from_pretrained" in body
    assert "does not say that the model uses it" in body
    assert str(tmp_path) not in text


def test_no_file_is_a_pickle(results: dict[str, ProbeResult], tmp_path: Path) -> None:
    for path in results["mlp"].save(tmp_path).iterdir():
        assert not path.read_bytes().startswith(b"\x80")  # the first byte of every pickle


# ---- what cannot be read -----------------------------------------------------------------------


def test_an_empty_folder_or_a_file_is_told(results: dict[str, ProbeResult], tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="there is no probe in"):
        load_probe(tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="is a file; give a folder"):
        results["ridge"].save(tmp_path / "file")


@pytest.mark.parametrize(
    ("break_it", "said"),
    [
        (lambda words: words.update(format=2), "has format 2, and this version"),
        (lambda words: words.update(digest="0"), "do not belong together"),
        (lambda words: words.update(kind="nonsense"), "does not hold a probe"),
        (lambda words: words.update(params={"nonsense": 1}), "does not hold a probe"),
        (lambda words: words.pop("classes"), "does not hold a probe"),
        (lambda words: words.update(classes=["a"]), "does not hold a probe"),
        (lambda words: words.update(beside=["a"] * 9), "does not hold a probe"),
    ],
)
def test_words_that_do_not_fit_are_told(
    results: dict[str, ProbeResult], tmp_path: Path, break_it, said: str
) -> None:
    folder = results["ridge"].save(tmp_path)
    words = json.loads((folder / "probe.json").read_text())
    break_it(words)
    (folder / "probe.json").write_text(json.dumps(words))
    with pytest.raises(CheckpointError, match=said):
        load_probe(folder)


def test_torn_files_are_told(results: dict[str, ProbeResult], tmp_path: Path) -> None:
    folder = results["ridge"].save(tmp_path)
    content = (folder / "probe.safetensors").read_bytes()
    (folder / "probe.safetensors").write_bytes(content[:-8])
    with pytest.raises(CheckpointError, match="do not belong together"):
        load_probe(folder)
    (folder / "probe.json").write_text('{"format": 1')
    with pytest.raises(CheckpointError, match="does not hold a probe"):
        load_probe(folder)


# ---- the Hub, without a network ----------------------------------------------------------------


def test_push_and_from_pretrained(
    results: dict[str, ProbeResult], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub = LocalHub(tmp_path, monkeypatch)
    address = results["lda"].push_to_hub("someone/shape-probe", private=True, token="hf_x")
    assert address == "https://huggingface.co/someone/shape-probe"
    assert hub.private["model", "someone/shape-probe"]
    assert hub.calls[0] == ("HfApi", {"token": "hf_x"})
    message = hub.calls[2][1]["commit_message"]
    assert message.startswith("lda probe of shape: the last's, imaginelens ")
    again = ProbeResult.from_pretrained("someone/shape-probe", revision=address.revision)
    same(results["lda"], again)
    assert hub_origin(again) == Origin("someone/shape-probe", "model", address.revision)
    assert hub.files("someone/shape-probe") == {"probe.safetensors", "probe.json", "README.md"}
    with pytest.raises(CheckpointError, match="no folder 'someone/else', and the Hub gave none"):
        ProbeResult.from_pretrained("someone/else")


def test_a_name_that_is_no_repository_is_told() -> None:
    with pytest.raises(CheckpointError, match=r"give a folder that \.save"):
        ProbeResult.from_pretrained("no such/folder/at all")
