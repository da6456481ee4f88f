"""The adapters against stand-ins of what lmms-eval and VLMEvalKit document, which are not here."""

import sys
import tomllib
from dataclasses import dataclass
from importlib.metadata import EntryPoint
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from examples.capimagine import harness_lmms_eval, harness_vlmevalkit
from imaginelens.hooks.errors import InputError
from imaginelens.organisms.hunt import sample

HUNTS = sample(12, hops=2, seed=77)
ANSWERS = [hunt.answer for hunt in HUNTS]


def _module(name: str, **names: Any) -> ModuleType:
    made = ModuleType(name)
    for key, value in names.items():
        setattr(made, key, value)
    return made


# ---- lmms-eval ---------------------------------------------------------------------------------


class lmms:
    """Their base class, as far as their guide tells."""

    is_simple = True

    def __init__(self) -> None:
        self.task_dict: dict[str, Any] = {}


@dataclass(frozen=True)
class ModelManifest:
    model_id: str
    simple_class_path: str | None = None
    chat_class_path: str | None = None
    aliases: tuple[str, ...] = ()


@dataclass
class Instance:
    args: tuple[Any, ...]


@pytest.fixture
def lmms_eval(monkeypatch: pytest.MonkeyPatch):
    for name, names in {
        "lmms_eval": {},
        "lmms_eval.api": {},
        "lmms_eval.api.model": {"lmms": lmms},
        "lmms_eval.models": {},
        "lmms_eval.models.registry_v2": {"ModelManifest": ModelManifest},
    }.items():
        monkeypatch.setitem(sys.modules, name, _module(name, **names))
    harness_lmms_eval.adapter.cache_clear()
    yield
    harness_lmms_eval.adapter.cache_clear()


def _messages(hunt: Any) -> list[dict[str, Any]]:
    content = [{"type": "image", "url": hunt.image()}, {"type": "text", "text": hunt.question}]
    return [{"role": "user", "content": content}]


def _requests(n: int, *, six: bool = False, **options: Any) -> list[Instance]:
    given = {"max_new_tokens": 20, "until": ["\n\n"], **options}
    rows = [(_messages, given, number, "hunts", "test") for number in range(n)]
    return [Instance(("", *row) if six else row) for row in rows]


def _lmms(**arguments: Any) -> Any:
    """As their registry makes it: by the path in the manifest."""
    module, _, name = harness_lmms_eval.manifest().chat_class_path.rpartition(".")
    cls = getattr(sys.modules[module], name)
    assert issubclass(cls, lmms)
    assert cls.is_simple is False
    model = cls(**arguments)
    model.task_dict = {"hunts": {"test": HUNTS}}
    return model


@pytest.mark.usefixtures("lmms_eval")
def test_lmms_eval_gets_replies_in_order_with_and_without_do() -> None:
    assert harness_lmms_eval.manifest().model_id == "imaginelens"
    model = _lmms(pretrained="latent-content", batch_size="4")
    assert model.generate_until(_requests(12, six=True)) == ANSWERS
    edited = _lmms(pretrained="latent-content", do="mean", batch_size=4, references="8")
    replies = edited.generate_until(_requests(12))
    assert sum(r == a for r, a in zip(replies, ANSWERS, strict=True)) <= 6


@pytest.mark.usefixtures("lmms_eval")
def test_lmms_evals_sixteen_tokens_are_refused_or_overruled() -> None:
    model = _lmms(pretrained="text")
    with pytest.raises(InputError, match="16 new tokens end what a capimagine model imagines"):
        model.generate_until(_requests(2, max_new_tokens=16))
    overruled = _lmms(pretrained="text", max_new_tokens="20")
    replies = overruled.generate_until(_requests(2, max_new_tokens=16))
    assert replies == ANSWERS[:2]  # without "<think_image> ... </think_image>" in front


@pytest.mark.usefixtures("lmms_eval")
def test_lmms_eval_is_told_what_cannot_be() -> None:
    with pytest.raises(InputError, match="do=nothing is nothing"):
        _lmms(pretrained="text", do="nothing")
    model = _lmms(pretrained="text")
    with pytest.raises(InputError, match="pass over what a model imagines"):
        model.loglikelihood([])
    with pytest.raises(InputError, match="several rounds"):
        model.generate_until_multi_round([])
    with pytest.raises(InputError, match="has 8 arguments, expected 5 or 6"):
        model.generate_until([Instance((1, 2, 3, _messages, {}, 0, "hunts", "test"))])
    video = [{"role": "user", "content": [{"type": "video", "url": "x"}]}]
    with pytest.raises(InputError, match="shows video; only images"):
        model.generate_until([Instance((lambda doc: video, {}, 0, "hunts", "test"))])


@pytest.mark.usefixtures("lmms_eval")
def test_a_misspelt_argument_is_no_unedited_run() -> None:
    with pytest.raises(TypeError, match="'doo'"):
        _lmms(pretrained="text", doo="mean", batch_size=1, max_batch_size=None)


@pytest.mark.usefixtures("lmms_eval")
def test_lmms_eval_may_give_the_path_of_a_picture(tmp_path: Path) -> None:
    HUNTS[0].image().save(tmp_path / "a.png")

    def messages(hunt: Any) -> list[dict[str, Any]]:
        content = [{"type": "image", "url": str(tmp_path / "a.png")},
                   {"type": "text", "text": hunt.question}]  # fmt: skip
        return [{"role": "user", "content": content}]

    request = Instance((messages, {"max_new_tokens": 20}, 0, "hunts", "test"))
    assert _lmms(pretrained="text").generate_until([request]) == ANSWERS[:1]


@pytest.mark.usefixtures("lmms_eval")
def test_the_plugin_names_what_lmms_evals_registry_takes() -> None:
    """Its registry loads an entry point, and calls it; one that fails takes all others with it, so
    that the library's own wheel, which has no recipes, must not have one."""
    plugin = Path(harness_lmms_eval.__file__).parent / "lmms_eval_plugin" / "pyproject.toml"
    points = tomllib.loads(plugin.read_text())["project"]["entry-points"]["lmms_eval.models"]
    made = [EntryPoint(k, v, "lmms_eval.models").load()() for k, v in points.items()]
    assert [(one.model_id, one.simple_class_path) for one in made] == [("imaginelens", None)]
    library = tomllib.loads((plugin.parents[3] / "pyproject.toml").read_text())
    assert "entry-points" not in library["project"]
    assert not any(
        name.startswith("examples") for name in library["tool"]["setuptools"]["packages"]
    )


def test_without_lmms_eval_its_command_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lmms_eval", None)
    with pytest.raises(SystemExit, match="lmms-eval is not installed"):
        harness_lmms_eval.main()
    with pytest.raises(AttributeError, match="has no 'Other'"):
        harness_lmms_eval.Other  # noqa: B018


# ---- VLMEvalKit --------------------------------------------------------------------------------


class BaseModel:
    """Their base class: `generate` hands what it was given to `generate_inner`."""

    INTERLEAVE = False
    allowed_types = ("text", "image")

    def generate(self, message: list[dict[str, str]], dataset: str | None = None) -> str:
        assert all(part["type"] in self.allowed_types for part in message)
        return self.generate_inner(message, dataset)  # type: ignore[attr-defined]


@pytest.fixture
def vlmeval(monkeypatch: pytest.MonkeyPatch):
    config = _module("vlmeval.config", supported_VLM={})
    for name, made in {
        "vlmeval": _module("vlmeval", config=config),
        "vlmeval.config": config,
        "vlmeval.vlm": _module("vlmeval.vlm"),
        "vlmeval.vlm.base": _module("vlmeval.vlm.base", BaseModel=BaseModel),
    }.items():
        monkeypatch.setitem(sys.modules, name, made)
    harness_vlmevalkit.adapter.cache_clear()
    yield config.supported_VLM
    harness_vlmevalkit.adapter.cache_clear()


def _message(folder: Path, number: int) -> list[dict[str, str]]:
    path = folder / f"{number}.png"
    HUNTS[number].image().save(path)
    return [
        {"type": "image", "value": str(path)},
        {"type": "text", "value": HUNTS[number].question},
    ]


def test_vlmevalkit_asks_by_the_name_it_was_registered_under(
    vlmeval: dict[str, Any], tmp_path: Path
) -> None:
    harness_vlmevalkit.register(model_path="text")
    model = vlmeval["imaginelens"]()
    assert model.INTERLEAVE
    assert [model.generate(_message(tmp_path, i), "VStarBench") for i in range(4)] == ANSWERS[:4]


def test_vlmevalkit_takes_references_from_another_benchmark(
    vlmeval: dict[str, Any], tmp_path: Path
) -> None:
    path = {"model_path": "latent-content", "do": "mean", "max_new_tokens": 20}
    with pytest.raises(InputError, match="VLMEvalKit asks one at a time"):
        harness_vlmevalkit.adapter()(**path)
    model = harness_vlmevalkit.adapter()(**path, reference=("hunts", None), references=4)
    assert len(model.study.known) == 4
    right = [model.generate(_message(tmp_path, i)) == ANSWERS[i] for i in range(4)]
    assert sum(right) <= 2
    fitted = model.study._fitted
    assert fitted  # once, not for every question
    model.generate(_message(tmp_path, 0))
    assert model.study._fitted is fitted
    zero = harness_vlmevalkit.adapter()(model_path="latent-content", do="zero")
    assert zero.study.known == ()
    with pytest.raises(InputError, match="shows video, not images"):
        zero.generate_inner([{"type": "video", "value": "x"}], "V")


def test_without_vlmevalkit_its_command_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "vlmeval", None)
    monkeypatch.setitem(sys.modules, "vlmeval.vlm.base", None)
    monkeypatch.setattr(sys, "argv", ["x", "--model", "text"])
    harness_vlmevalkit.adapter.cache_clear()
    with pytest.raises(SystemExit, match="VLMEvalKit is not installed"):
        harness_vlmevalkit.main()


def test_pictures_are_files_that_are_closed(vlmeval: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "no.png").write_bytes(b"no picture")
    model = harness_vlmevalkit.adapter()(model_path="text")
    with pytest.raises(OSError, match="cannot identify"):
        model.generate_inner([{"type": "image", "value": str(tmp_path / "no.png")}])
