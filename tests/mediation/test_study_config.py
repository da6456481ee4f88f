"""Every key of a study's file is read as it is meant, or refused with a sentence that helps."""

import tomllib
from pathlib import Path
from typing import Any

import pytest

import imaginelens as il
from imaginelens.hooks.errors import InputError
from imaginelens.mediation.study_config import (
    EDITS,
    EXAMPLE,
    FITTED,
    METRICS,
    SUFFIXES,
    EditConfig,
    StudyConfig,
    parse_config,
    read_config,
)
from imaginelens.mediation.sweep import Sweep

SMALL = """
[model]
name = "latent-content"
{model}
[data]
{data}
[[map]]
name = "m"
{map}
[run]
{run}
"""


def config(model: str = "", data: str = "task = {}", map: str = "", run: str = "") -> StudyConfig:
    return parse_config(SMALL.format(model=model, data=data, map=map, run=run))


def refused(text: str) -> str:
    with pytest.raises(InputError) as caught:
        parse_config(text)
    sentence = str(caught.value)
    assert sentence.startswith("study.toml")
    assert "\n" not in sentence.replace("\\n", "")
    return sentence


# ---- what is read ------------------------------------------------------------------------------


def test_the_example_is_read() -> None:
    found = parse_config(EXAMPLE)
    assert [each.name for each in found.maps] == ["layers", "fed-back"]
    assert found.maps[1].selectors == [il.latent[0], il.latent[1], il.latent]
    assert found.model.finder is None


def test_every_line_that_the_example_leaves_out_is_right() -> None:
    lines = []
    for line in EXAMPLE.splitlines():
        key, sign, _ = line.removeprefix("# ").partition("=")
        aside = line.startswith("# ") and sign and key.strip().isidentifier()
        lines.append(line.removeprefix("# ") if aside else line)
    text = "\n".join(line for line in lines if not line.startswith("task"))
    assert text.count("\n# ") < EXAMPLE.count("\n# ")
    found = parse_config(text)
    assert found.model.spec == "monet"
    assert found.data.columns.text == "question"
    assert found.data.reference == 32
    assert found.maps[0].window == 2


def test_the_file_of_the_page_is_read() -> None:
    page = (Path(__file__).parents[2] / "docs" / "studies.md").read_text()
    found = parse_config(page.split("```toml\n")[1].split("```")[0])
    assert [each.name for each in found.maps] == ["layers", "fed-back"]


def test_what_is_left_out_is_as_in_sweep() -> None:
    found = config().maps[0]
    defaults = il_sweep_defaults()
    for name in ("sites", "direction", "context", "heads", "window", "verify"):
        assert getattr(found, name) == defaults[name]
    assert found.selectors == defaults["positions"]
    assert METRICS[found.metric] == defaults["metric"]
    assert found.edit.edit is defaults["edit"] is None
    assert config().run.batch_size == defaults["batch_size"]


def il_sweep_defaults() -> dict[str, Any]:
    import inspect

    from imaginelens.mediation.sweep import sweep

    return {name: p.default for name, p in inspect.signature(sweep).parameters.items()}


@pytest.mark.parametrize(
    ("written", "edit"),
    [
        ('"swap"', None),
        ('"zero"', il.Zero()),
        ('"sham"', il.Sham()),
        ('"first_repeat"', il.FirstRepeat()),
        ('{ name = "shuffle", seed = 3 }', il.Shuffle(seed=3)),
        ('{ name = "add_noise", scale = 0.3, seed = 1 }', il.AddNoise(0.3, seed=1)),
        ('"mean"', il.Mean()),
        ('"constant"', il.Constant()),
        ('"noise"', il.Noise()),
        ('"resample"', il.Resample()),
    ],
)
def test_edits_are_those_of_il(written: str, edit: il.Edit | None) -> None:
    found = config(map=f"edit = {written}", data="task = {}\nreference = 8").maps[0].edit
    assert found.edit == edit
    assert found.needs_reference == (found.name in FITTED)


def test_every_edit_can_be_written() -> None:
    for name in EDITS:
        settings = (("scale", 1.0),) if name == "add_noise" else ()
        assert name == "swap" or isinstance(EditConfig(name, settings).edit, il.Edit)


@pytest.mark.parametrize(
    ("written", "text", "answer"),
    [
        ('"letter"', "it is (B).", "B"),
        ('"boxed"', r"\boxed{7}", "7"),
        ('{ after = "Answer:" }', "Answer: two cats", "two cats"),
    ],
)
def test_answers_are_found(written: str, text: str, answer: str) -> None:
    finder = config(model=f"answer = {written}").model.finder
    assert finder is not None
    where = finder(text)
    assert where is not None
    assert text[slice(*where)] == answer


def test_values_are_kept() -> None:
    found = config(
        model='spec = false\ndtype = "float64"\ndevice = "cuda:1"',
        data='file = "a/b.JSONL"\nlimit = 3\ncolumns = { pair = "p" }',
        map='sites = ["z", "attn_out"]\npositions = ["il.latent[ 0 ]", "markers"]\nheads = true',
        run='out = "there"\nseed = 7',
    )
    assert (found.model.spec, found.model.dtype, found.model.device) == (False, "float64", "cuda:1")
    assert (found.data.file, found.data.limit, found.data.columns.pair) == ("a/b.JSONL", 3, "p")
    assert found.maps[0].sites == ("z", "attn_out")
    assert found.maps[0].positions == ("latent[0]", "markers")
    assert found.out == Path("there")
    assert {hash(found): 1}


def test_paths_count_from_the_file(tmp_path: Path) -> None:
    (tmp_path / "s.toml").write_text("\ufeff" + EXAMPLE, encoding="utf-8")
    assert read_config(tmp_path / "s.toml").out == tmp_path / "study"


def test_options_come_before_the_file() -> None:
    found = config(data="task = { n = 9, seed = 5 }", run="seed = 2")
    assert found.with_options() == found
    changed = found.with_options(limit=3, seed=4, device="cpu", out=Path("/somewhere/else"))
    assert changed.data.limit == 3
    assert changed.run.seed == 4
    assert changed.data.task is not None
    assert changed.data.task.seed is None  # the pairs are of the new seed, too
    assert changed.model.device == "cpu"
    assert changed.out == Path("/somewhere/else")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"limit": 0}, "--limit is '0', expected a whole number from 1 on"),
        ({"seed": -1}, "--seed is '-1', expected a whole number from 0 on"),
        ({"device": "gpu"}, "--device is 'gpu', expected 'cpu'"),
    ],
)
def test_wrong_options_are_refused(options: dict[str, Any], words: str) -> None:
    with pytest.raises(InputError, match=words):
        config().with_options(**options)


# ---- what is refused ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("section", "line", "words"),
    [
        ("model", "nmae = 1", "[model] has the key 'nmae', which means nothing there; did you"),
        ("model", "wholly = 1", "it may have name, revision, spec"),
        ("model", "spec = true", "[model]: spec is 'True', expected the name of a family, or"),
        ("model", 'answer = "boxd"', "did you mean 'boxed'?"),
        ("model", "answer = { before = 1 }", "expected 'boxed', 'letter' or { after"),
        ("model", 'answer = { after = "" }', "expected 'boxed', 'letter' or { after"),
        ("model", 'dtype = "float23"', "one of 'auto', 'float32', 'float64'"),
        ("model", 'dtype = "float23"', "; did you mean 'float32'?"),
        ("model", 'device = "cuda:x"', "[model]: device is 'cuda:x', expected 'cpu', 'cuda'"),
        ("model", "attn_implementation = 3", "is '3', expected one of 'eager', 'sdpa'"),
        ("data", "", "neither task nor file; give task for an organism"),
        ("data", 'task = {}\nfile = "a.csv"', "both task and file"),
        ("data", "task = 3", "[data]: task is '3', expected a table such as { n = 64"),
        ("data", "task = { n = 0 }", "its n is 0, and should be a whole number from 1 on"),
        ("data", "task = { n = 1.5 }", "its n is 1.5"),
        ("data", "task = { m = 3 }", "it has 'm', and takes n and seed"),
        ("data", 'file = "a.txt"', f"a file that ends in {', '.join(SUFFIXES)}"),
        ("data", 'file = "a.csv"\ncolumns = { imges = "a" }', "did you mean 'images'?"),
        ("data", 'file = "a.csv"\ncolumns = { text = 3 }', "its text is 3, and should be the"),
        ("data", 'file = "a.csv"\ncolumns = 3', "expected a table such as { images"),
        ("data", 'task = {}\ncolumns = { text = "a" }', "columns is for a file"),
        ("data", "task = {}\nlimit = 0", "[data]: limit is '0', expected a whole number from 1"),
        ("data", "task = {}\nlimit = true", "limit is 'True', expected a whole number"),
        ("data", "task = {}\nlimit = 99999999999999999999", "expected a whole number"),
        ("data", "task = {}\nreference = 1", "how many pairs to keep aside, 2 or more"),
        ("map", "sites = []", "[[map]] 1: sites is '[]', expected a site, or a list of some"),
        ("map", 'sites = ["z", 3]', "expected a site, or a list"),
        ("map", 'positions = "latnt[2]"', "did you mean 'latent'"),
        ("map", "positions = \"__import__('os')\"", "is no selector"),
        ("map", "positions = 3", "expected a selector such as 'latent', or a list"),
        ("map", 'metric = "logit_dif"', "did you mean 'logit_diff'?"),
        ("map", "metric = []", "[[map]] 1: metric is '[]', expected one of 'logit_diff'"),
        ("map", 'direction = "up"', "expected one of 'denoise', 'noise'"),
        ("map", 'context = "fixd"', "did you mean 'fixed'?"),
        ("map", 'edit = "zer"', "did you mean 'zero'?"),
        ("map", "edit = 3", "[[map]] 1: edit is '3', expected one of 'swap'"),
        ("map", "edit = { scale = 3 }", "expected one of 'swap'"),
        ("map", 'edit = "steer"', "which a file cannot hold; use il.sweep in Python"),
        ("map", 'edit = "add_noise"', 'it needs a scale, as in { name = "add_noise"'),
        ("map", 'edit = { name = "add_noise", scale = -1 }', "its scale should be a positive"),
        ("map", 'edit = { name = "add_noise", scale = nan }', "its scale should be a positive"),
        ("map", 'edit = { name = "add_noise", scale = 1, seed = 1.5 }', "its seed should be a"),
        ("map", 'edit = { name = "zero", scale = 1 }', "zero takes nothing, and not 'scale'"),
        ("map", 'edit = { name = "swap", donor = 1 }', "swap takes nothing, and not 'donor'"),
        ("map", 'edit = { name = "mean", reference = 1 }', "mean takes nothing, and not"),
        ("map", 'edit = "mean"', "takes its statistics from other inputs; set reference = 32"),
        ("map", "heads = 1", "[[map]] 1: heads is '1', expected true or false"),
        ("map", "window = 0", "[[map]] 1: window is '0', expected a whole number from 1 on"),
        ("map", "verify = -1", "[[map]] 1: verify is '-1', expected a whole number from 0"),
        ("run", "batch_size = 0", "[run]: batch_size is '0'"),
        ("run", "seed = 1979-05-27", "[run]: seed is '1979-05-27', expected a whole number"),
        ("run", 'out = " "', "[run]: out is ' ', expected the path of a folder"),
    ],
)
def test_a_wrong_key_is_named(section: str, line: str, words: str) -> None:
    parts = {"model": "", "data": "task = {}", "map": "", "run": ""}
    parts[section] = line
    assert words in refused(SMALL.format(**parts))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[model", "study.toml is no TOML: "),
        ("a = " + "[" * 5000 + "]" * 5000, "study.toml is no TOML: "),
        ("[models]", "there is no section [models]; did you mean 'model'?"),
        ("model = 3\ndata = 3\nmap = 3", "map should be a list; write [[map]]"),
        ("[model]\n[data]\ntask = {}", "it has no [[map]]; add one"),
        ("[data]\ntask = {}\n[[map]]", "it has no [model]; add one"),
        ("[model]\n[data]\ntask = {}\n[[map]]", "[[map]] 1 has no name; give it letters"),
        ('[model]\n[data]\ntask = {}\n[[map]]\nname = "m"', "[model] has no name; give it the"),
        ('model = 3\n[data]\ntask = {}\n[[map]]\nname = "m"', "[model] is 3, expected a section"),
        ("map = [3]\n[model]\n[data]", "[[map]] 1 is 3, expected a section of keys"),
        ("map = []\n[model]\n[data]", "map should be a list"),
        (f'{EXAMPLE}\n[[map]]\nname = "LAYERS"', "name is 'LAYERS' again; give each map a name"),
    ],
)
def test_wrong_sections_are_named(text: str, words: str) -> None:
    assert words in refused(text)


@pytest.mark.parametrize("name", ["", "../m", "a/b", ".hidden", "a b", "m\\n", "x" * 101])
def test_a_map_is_named_as_a_folder_can_be(name: str) -> None:
    text = SMALL.format(model="", data="task = {}", map="", run="").replace('"m"', f'"{name}"')
    assert "for a folder" in refused(text)


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"nothing.toml.*study --example"):
        read_config(tmp_path / "nothing.toml")
    (tmp_path / "odd.toml").write_bytes(b"\xff\xfe")
    with pytest.raises(InputError, match=r"odd.toml is not UTF-8"):
        read_config(tmp_path / "odd.toml")


def test_the_example_names_every_key_and_edit() -> None:
    from imaginelens.mediation.study_config import _SCHEMA

    assert all(f"{key} =" in EXAMPLE for keys in _SCHEMA.values() for key in keys)
    assert set(tomllib.loads(EXAMPLE)) == set(_SCHEMA)


def test_a_sweep_takes_all_that_a_map_says() -> None:
    """A new argument of Sweep is either a key of a map, or named here."""
    from dataclasses import fields

    from imaginelens.mediation.study_config import MapConfig

    elsewhere = {"lens", "pairs", "batch_size", "seed", "fast", "limit", "splits"}
    keys = {field.name for field in fields(MapConfig)} - {"name"}
    assert {field.name for field in fields(Sweep)} == keys | elsewhere
