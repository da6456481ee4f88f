"""Files and texts of strangers: nothing of them is run, and in a terminal they are only text."""

import ast
import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import pytest

import imaginelens as il
from imaginelens.organisms import checkpoint

ROOT = Path(__file__).parents[1]
SOURCES = [
    path
    for folder in ("hooks", "mediation", "probes", "src", "examples")
    for path in sorted((ROOT / folder).rglob("*.py"))
]
CALLS = {"eval", "exec", "compile", "__import__"}
MEMBERS = {
    ("os", "system"), ("os", "popen"), ("pickle", "load"), ("pickle", "loads"), ("yaml", "load"),
    ("marshal", "loads"), ("joblib", "load"), ("dill", "load"), ("torch", "load"),
    ("subprocess", "getoutput"), ("numpy", "load"), ("np", "load"),
}  # fmt: skip
HOSTILE = "\x1b[31mred\x07\u202etxet<script>alert(1)</script>\x00"


def dangerous(source: str) -> list[str]:
    """Calls that run what a file holds, but for those that are told to read plain data."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Call):
            continue
        if node.args and isinstance(node.args[0], ast.Constant):
            continue  # what is written in the source itself may be run
        words = {word.arg: ast.unparse(word.value) for word in node.keywords}
        match node.func:
            case ast.Name(id=name) if name in CALLS:
                found.append(name)
            case ast.Attribute(value=ast.Name(id=owner), attr=name) if (owner, name) in MEMBERS:
                plain = words.get("weights_only") == "True" or words.get("allow_pickle") == "False"
                found += [] if plain else [f"{owner}.{name}"]
        if words.get("shell") == "True":
            found.append("shell=True")
        if words.get("trust_remote_code") == "True":
            found.append("trust_remote_code=True")
    return found


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_source_runs_what_a_file_holds(path: Path) -> None:
    assert dangerous(path.read_text(encoding="utf-8")) == []


def test_the_search_finds_what_it_looks_for() -> None:
    bad = (
        "eval(x); torch.load(f); os.system(c); run(c, shell=True); load(a, trust_remote_code=True)"
    )
    assert dangerous(bad) == [
        *("eval", "torch.load", "os.system", "shell=True", "trust_remote_code=True")
    ]
    assert dangerous("torch.load(f, weights_only=True); model.eval(); re.compile(x)") == []


CODE = """
from pathlib import Path
from transformers import PreTrainedConfig, PreTrainedModel
Path({mark!r}).write_text("ran")

class Config(PreTrainedConfig):
    model_type = "stranger"

class Model(PreTrainedModel):
    config_class = Config
"""


def test_the_code_of_a_checkpoint_is_not_run_unless_you_say_so(tmp_path: Path) -> None:
    home = tmp_path / "checkpoint"
    shutil.copytree(checkpoint.folder("direct"), home)
    config = json.loads((home / "config.json").read_text())
    auto = {"AutoConfig": "stranger.Config", "AutoModelForImageTextToText": "stranger.Model"}
    config |= {"model_type": "stranger", "architectures": ["Model"], "auto_map": auto}
    (home / "config.json").write_text(json.dumps(config))
    mark = tmp_path / "mark"
    (home / "stranger.py").write_text(CODE.format(mark=str(mark)))
    with pytest.raises(il.CheckpointError):
        il.load(home)
    assert not mark.exists()


@pytest.fixture(scope="module")
def swapped() -> Any:
    lens = il.load("latent-content")
    task = lens.task(n=2, seed=0)
    return lens.swap(task.base, task.source, at=il.latent)


def controls(shown: str) -> list[str]:
    return [c for c in shown if not c.isprintable() and c != "\n"]


def test_what_a_model_writes_is_only_text_in_a_terminal(swapped: Any) -> None:
    given = dict.fromkeys(("answers_before", "answers_after"), (HOSTILE, HOSTILE))
    shown = repr(dataclasses.replace(swapped, **given))
    assert "\\x1b[31mred" in shown
    assert controls(shown) == []


def test_answers_and_errors_are_only_text_in_a_terminal() -> None:
    lens = il.load("latent-content")
    task = lens.task(n=2, seed=0)
    pairs = il.Pairs(task.base, task.source, [HOSTILE] * 2, ["other"] * 2)
    assert "\\x1b[31mred" in repr(pairs)
    assert controls(repr(pairs)) == []
    for act in (
        lambda: il.load(HOSTILE.replace("\x00", "")),
        lambda: lens.run_with_cache(task.base, names_filter=HOSTILE),
        lambda: lens.run(task.base, names_filter=HOSTILE),
        lambda: il.Pairs.from_jsonl(HOSTILE.replace("\x00", "")),
    ):
        with pytest.raises(il.ImagineLensError) as caught:
            act()
        assert controls(str(caught.value)) == []
