"""What a study is to do, read from a TOML file and checked before anything is opened.

Every key that is wrong gets a sentence: which key, what came, what was expected, what is near.
"""

import difflib
import math
import re
import tomllib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal, NoReturn

from imaginelens.hooks import (
    AddNoise,
    Constant,
    Edit,
    FirstRepeat,
    Mean,
    Metric,
    Noise,
    Resample,
    Sham,
    Shuffle,
    Zero,
    answers,
)
from imaginelens.hooks.answers import AnswerFinder
from imaginelens.hooks.edits import Slerp, Swap
from imaginelens.hooks.errors import InputError, PositionError
from imaginelens.hooks.metrics import (
    accuracy,
    base_answer,
    flip,
    kl,
    log_prob,
    logit_diff,
    prob,
    source_answer,
)
from imaginelens.hooks.positions import Positions
from imaginelens.hooks.reading_selectors import parse_selector

METRICS: dict[str, Metric] = {
    metric.name: metric
    for metric in (
        logit_diff, log_prob, prob, kl, source_answer, base_answer, accuracy, flip,
    )
}  # fmt: skip
FITTED: dict[str, type[Edit]] = {
    "mean": Mean,
    "constant": Constant,
    "resample": Resample,
    "add_noise": AddNoise,
    "noise": Noise,
}
EDITS: dict[str, type[Edit]] = {
    "swap": Swap,
    "zero": Zero,
    "sham": Sham,
    "shuffle": Shuffle,
    "first_repeat": FirstRepeat,
    **FITTED,
}
_SETTINGS = {"scale", "seed"}  # numbers that an edit may bring, where it has such a field
_HELD = {"slerp", "replace", "steer", "project"}  # edits that need a tensor or a donor of their own
DTYPES = ("auto", "float32", "float64", "bfloat16", "float16")
SUFFIXES = (".jsonl", ".json", ".csv", ".parquet")
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,99}")
_DEVICE = re.compile(r"auto|cpu|mps|xpu(:\d+)?|cuda(:\d+)?")

EXAMPLE = """\
# A study on a shipped organism. Save it as study.toml, then:
#   imaginelens study study.toml --dry-run    says what it would cost
#   imaginelens study study.toml              runs it
#   imaginelens study study.toml --resume     goes on after an interruption

[model]
name = "latent-content"       # a shipped organism, a folder, or a Hub id "owner/name"
# revision = "main"           # of a Hub id
# spec = "monet"              # the latent family, where it is not recognised; false for none
# answer = "boxed"            # or "letter", or { after = "Answer:" }; organisms bring their own
# dtype = "bfloat16"          # or "float32", ...; left out: as the checkpoint has it
# device = "cuda:0"           # left out: a GPU where there is one
# attn_implementation = "eager"

[data]
task = { n = 32 }             # of an organism: n pairs; for your own data instead:
# file = "pairs.jsonl"        # or .json, .csv, .parquet; its path counts from this file
# columns = { images = "image", text = "question", answer = "answer", group = "image" }
# limit = 200                 # the first so many pairs
# reference = 32              # so many pairs, the last, are left out of the maps and give the
#                             # statistics to edits that need some, such as "add_noise"

[[map]]
name = "layers"               # its folder: study/layers
sites = "resid_post"          # in all layers; or a list of hook names and patterns
positions = "latent"          # split into its steps; or a list of selectors, one cell each:
#                             # ["latent[0]", "image[0][0:2, 0:2]", "text.find('start')"]
metric = "logit_diff"         # or log_prob, prob, kl, source_answer, base_answer, accuracy, flip
direction = "denoise"         # the base receives states of the source; or "noise"
context = "fixed"             # the text stays; "free" generates it anew, and is slower
edit = "swap"                 # or "zero", "sham", "shuffle", "first_repeat", "mean", "noise", ...
#                             # or { name = "add_noise", scale = 0.3 }
# heads = true                # a cell for each head, at sites that have heads such as "z"
# window = 2                  # neighbouring layers that are edited together
verify = 2                    # random cells that are measured again, one forward each

[[map]]                       # as many maps as you like
name = "fed-back"
sites = "hook_latent"
positions = ["latent[0]", "latent[1]", "latent"]
edit = "zero"
metric = "log_prob"
context = "free"

[run]
batch_size = 8                # pairs at a time: what a chunk holds, and what is lost at most
seed = 0
out = "study"                 # its path counts from this file
"""


@dataclass(frozen=True)
class ModelConfig:
    """Which model to open, as `il.load` does."""

    name: str
    revision: str | None = None
    spec: str | Literal[False] | None = None
    answer: str | tuple[str, str] | None = None
    dtype: str = "auto"
    device: str = "auto"
    attn_implementation: str | None = None

    @property
    def finder(self) -> AnswerFinder | None:
        """What finds the answer in a text; None leaves it to the family."""
        if isinstance(self.answer, tuple):
            return answers.after(self.answer[1])
        return {None: None, "boxed": answers.boxed, "letter": answers.letter}[self.answer]


@dataclass(frozen=True)
class TaskConfig:
    """How many pairs of an organism's task to draw; the seed of the run where there is none."""

    n: int = 64
    seed: int | None = None


@dataclass(frozen=True)
class ColumnsConfig:
    """Under which names a file has what, as `il.Pairs.from_jsonl` takes them."""

    images: str | None = None
    text: str | None = None
    answer: str | None = None
    group: str | None = None
    source: str | None = None
    pair: str | None = None


@dataclass(frozen=True)
class DataConfig:
    """The pairs: an organism's task, or a file of the user."""

    task: TaskConfig | None = None
    file: str | None = None
    columns: ColumnsConfig = field(default_factory=ColumnsConfig)
    limit: int | None = None
    reference: int = 0


@dataclass(frozen=True)
class EditConfig:
    """What is done in a cell, by name, with the numbers that it takes."""

    name: str = "swap"
    settings: tuple[tuple[str, float], ...] = ()

    @property
    def needs_reference(self) -> bool:
        """Whether it takes statistics from other inputs."""
        return self.name in FITTED

    @property
    def edit(self) -> Edit | None:
        """The edit, without its reference; None is the swap with the other input of the pair."""
        return None if self.name == "swap" else EDITS[self.name](**dict(self.settings))


@dataclass(frozen=True)
class MapConfig:
    """One map, as `il.sweep` takes it; positions and edit as they are written."""

    name: str
    sites: str | tuple[str, ...] = "resid_post"
    positions: str | tuple[str, ...] = "latent"
    metric: str = "logit_diff"
    direction: str = "denoise"
    context: str = "free"
    edit: EditConfig = field(default_factory=EditConfig)
    heads: bool = False
    window: int = 1
    verify: int = 0

    @property
    def selectors(self) -> Positions | list[Positions]:
        """The selectors that `positions` spells."""
        if isinstance(self.positions, str):
            return parse_selector(self.positions)
        return [parse_selector(each) for each in self.positions]


@dataclass(frozen=True)
class RunConfig:
    """How the study is run, and where its maps go."""

    batch_size: int = 16
    seed: int = 0
    out: str = "study"


@dataclass(frozen=True)
class StudyConfig:
    """All that a study's file says.

    Attributes:
        folder: of the file; relative paths in it count from there.
    """

    model: ModelConfig
    data: DataConfig
    maps: tuple[MapConfig, ...]
    run: RunConfig = field(default_factory=RunConfig)
    folder: Path = field(default_factory=Path)

    @property
    def out(self) -> Path:
        """The folder that all maps go to."""
        return self.folder / self.run.out

    def with_options(
        self,
        *,
        limit: int | None = None,
        seed: int | None = None,
        device: str | None = None,
        out: Path | None = None,
    ) -> "StudyConfig":
        """The same study with what the command line says instead; None leaves the file's.

        Raises:
            InputError: an option is not what it should be.

        >>> config = parse_config(EXAMPLE).with_options(limit=4, seed=1)
        >>> config.data.limit, config.run.seed
        (4, 1)
        """
        model, data, run = self.model, self.data, self.run
        if limit is not None:
            data = replace(data, limit=_option("--limit", _COUNT, limit))
        if seed is not None:
            run = replace(run, seed=_option("--seed", _WHOLE, seed))
            if data.task is not None:
                data = replace(data, task=replace(data.task, seed=None))
        if device is not None:
            model = replace(model, device=_option("--device", _DEVICES, device))
        if out is not None:
            run = replace(run, out=str(Path(out).absolute()))
        return replace(self, model=model, data=data, run=run)


def read_config(path: str | Path) -> StudyConfig:
    """Read a study's TOML file.

    Raises:
        InputError: there is no such file, it is no TOML, or a key is not what it should be.
    """
    file = Path(path)
    try:
        text = file.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise InputError(
            f"{str(path)!r} cannot be read ({error.strerror}); write a config with: imaginelens "
            "study --example > study.toml"
        ) from error
    except UnicodeDecodeError as error:
        raise InputError(f"{file.name} is not UTF-8 ({error.reason}); save it as UTF-8") from error
    return parse_config(text, folder=file.absolute().parent, name=file.name)


def parse_config(text: str, *, folder: Path | None = None, name: str = "study.toml") -> StudyConfig:
    """Read the text of a study's TOML file; `folder` is where its relative paths count from.

    Raises:
        InputError: it is no TOML, or a key is not what it should be.

    >>> parse_config(EXAMPLE).maps[0].selectors
    latent
    """
    try:
        table = tomllib.loads(text)
    except (tomllib.TOMLDecodeError, RecursionError) as error:
        raise InputError(f"{name} is no TOML: {error}; correct it there") from error
    try:
        return _study(table, folder or Path())
    except _Wrong as error:
        raise InputError(f"{name}, {error}") from None


# ---- what a value may be ------------------------------------------------------------------------


class _Wrong(Exception):
    """What is wrong with a value, in the words of a sentence that begins with the file's name."""


@dataclass(frozen=True)
class _Key:
    """What a key expects: `read` returns the value to keep, or raises `_Wrong` with more words."""

    expected: str
    read: Callable[[Any], Any]


def _miss(why: str = "") -> NoReturn:
    raise _Wrong(why)


def _text(value: Any) -> str:
    return value if isinstance(value, str) and value.strip() else _miss()


def _whole(least: int) -> Callable[[Any], int]:
    def read(value: Any) -> int:
        return value if type(value) is int and least <= value < 2**63 else _miss()

    return read


def _yes(value: Any) -> bool:
    return value if isinstance(value, bool) else _miss()


def _choice(*known: str) -> _Key:
    def read(value: Any) -> str:
        return value if isinstance(value, str) and value in known else _miss(_near(value, known))

    return _Key(f"one of {', '.join(map(repr, known))}", read)


def _matching(pattern: re.Pattern[str]) -> Callable[[Any], str]:
    def read(value: Any) -> str:
        return value if isinstance(value, str) and pattern.fullmatch(value) else _miss()

    return read


def _spec(value: Any) -> str | Literal[False]:
    return False if value is False else _text(value)


def _answer(value: Any) -> str | tuple[str, str]:
    match value:
        case {"after": str(marker)} if marker and len(value) == 1:
            return ("after", marker)
        case "boxed" | "letter":
            return str(value)
    _miss(_near(value, ("boxed", "letter")))


def _one_or_more(read: Callable[[Any], str]) -> Callable[[Any], str | tuple[str, ...]]:
    def all_of(value: Any) -> str | tuple[str, ...]:
        if isinstance(value, list):
            return tuple(read(each) for each in value) if value else _miss()
        return read(value)

    return all_of


def _position(value: Any) -> str:
    """A selector, spelled as its repr."""
    try:
        return repr(parse_selector(_text(value)))
    except PositionError as error:
        _miss(str(error))


def _edit(value: Any) -> EditConfig:
    table: Any = {"name": value} if isinstance(value, str) else value
    if not isinstance(table, Mapping) or not isinstance(table.get("name"), str):
        _miss()
    name = table["name"]
    if name in _HELD:
        _miss(f"{name} needs a tensor or a donor, which a file cannot hold; use il.sweep in Python")
    if name not in EDITS:
        _miss(_near(name, tuple(EDITS)))
    kind = EDITS[name]
    own = {each.name for each in fields(kind)} & _SETTINGS if kind not in (Swap, Slerp) else set()
    settings = []
    for key, number in table.items():
        if key == "name":
            continue
        if key not in own:
            takes = ", ".join(sorted(own)) or "nothing"
            _miss(f"{name} takes {takes}, and not {key!r}")
        if key == "seed":
            right = type(number) is int and number >= 0
        else:
            right = type(number) in (int, float) and math.isfinite(number) and number > 0
        if not right:
            more = "a whole number from 0" if key == "seed" else "a positive number"
            _miss(f"its {key} should be {more}, and is {number!r}")
        settings.append((key, number))
    if "scale" in own and "scale" not in table:
        _miss(f'it needs a scale, as in {{ name = "{name}", scale = 0.3 }}')
    return EditConfig(name, tuple(settings))


def _columns(value: Any) -> ColumnsConfig:
    table = value if isinstance(value, Mapping) else _miss()
    names = [each.name for each in fields(ColumnsConfig)]
    for key, name in table.items():
        if key not in names:
            _miss(f"it has {key!r}, and columns are {', '.join(names)}{_near(key, names, '; ')}")
        if not isinstance(name, str) or not name:
            _miss(f"its {key} is {name!r}, and should be the name of a column")
    return ColumnsConfig(**table)


def _task(value: Any) -> TaskConfig:
    table = value if isinstance(value, Mapping) else _miss()
    for key, number in table.items():
        if key not in ("n", "seed"):
            _miss(f"it has {key!r}, and takes n and seed")
        least = 1 if key == "n" else 0
        if type(number) is not int or number < least:
            _miss(f"its {key} is {number!r}, and should be a whole number from {least} on")
    return TaskConfig(**table)


def _file(value: Any) -> str:
    if Path(_text(value)).suffix.lower() not in SUFFIXES:
        _miss()
    return str(value)


_TEXT = _Key("text", _text)
_COUNT = _Key("a whole number from 1 on", _whole(1))
_WHOLE = _Key("a whole number from 0 on", _whole(0))
_SWITCH = _Key("true or false", _yes)
_DEVICES = _Key("'cpu', 'cuda', 'cuda:0', 'mps' or 'auto'", _matching(_DEVICE))
_SCHEMA: dict[str, dict[str, _Key]] = {
    "model": {
        "name": _Key("the name of an organism, a folder or a Hub id", _text),
        "revision": _Key("the name of a branch, a tag or a commit", _text),
        "spec": _Key("the name of a family, or false", _spec),
        "answer": _Key("'boxed', 'letter' or { after = \"Answer:\" }", _answer),
        "dtype": _choice(*DTYPES),
        "device": _DEVICES,
        "attn_implementation": _choice("eager", "sdpa", "flash_attention_2", "flex_attention"),
    },
    "data": {
        "task": _Key("a table such as { n = 64, seed = 0 }", _task),
        "file": _Key(f"a file that ends in {', '.join(SUFFIXES)}", _file),
        "columns": _Key('a table such as { images = "image", text = "question" }', _columns),
        "limit": _COUNT,
        "reference": _Key("how many pairs to keep aside, 2 or more", _whole(2)),
    },
    "map": {
        "name": _Key("letters, digits, '-', '_' and '.', for a folder", _matching(_NAME)),
        "sites": _Key("a site, or a list of some", _one_or_more(_text)),
        "positions": _Key("a selector such as 'latent', or a list", _one_or_more(_position)),
        "metric": _choice(*METRICS),
        "direction": _choice("denoise", "noise"),
        "context": _choice("free", "fixed"),
        "edit": _Key(
            f"one of {', '.join(map(repr, EDITS))}, or a table such as "
            '{ name = "add_noise", scale = 0.3 }',
            _edit,
        ),
        "heads": _SWITCH,
        "window": _COUNT,
        "verify": _WHOLE,
    },
    "run": {
        "batch_size": _COUNT,
        "seed": _WHOLE,
        "out": _Key("the path of a folder", _text),
    },
}
_NEEDED = {"model": "name", "map": "name"}


# ---- sections -----------------------------------------------------------------------------------


def _study(table: Mapping[str, Any], folder: Path) -> StudyConfig:
    for section in table:
        if section not in _SCHEMA:
            _miss(f"there is no section [{section}]{_near(section, tuple(_SCHEMA), '; ')}")
    for section in ("model", "data", "map"):
        if section not in table:
            shown = "[[map]]" if section == "map" else f"[{section}]"
            _miss(f"it has no {shown}; add one, as imaginelens study --example shows")
    listed = table["map"]
    if not isinstance(listed, list) or not listed:
        _miss("map should be a list; write [[map]], with two brackets, before each")
    maps = tuple(
        MapConfig(**_section("map", each, f"[[map]] {number}"))
        for number, each in enumerate(listed, 1)
    )
    config = StudyConfig(
        model=ModelConfig(**_section("model", table["model"], "[model]")),
        data=DataConfig(**_section("data", table["data"], "[data]")),
        maps=maps,
        run=RunConfig(**_section("run", table.get("run", {}), "[run]")),
        folder=folder,
    )
    _check_together(config)
    return config


def _section(name: str, table: Any, where: str) -> dict[str, Any]:
    schema = _SCHEMA[name]
    if not isinstance(table, Mapping):
        _miss(f"{where} is {table!r}, expected a section of keys and values")
    found = {}
    for key, value in table.items():
        if key not in schema:
            near = _near(key, tuple(schema), "; ") or f"; it may have {', '.join(schema)}"
            _miss(f"{where} has the key {key!r}, which means nothing there{near}")
        found[key] = _read(f"{where}: {key}", schema[key], value)
    needed = _NEEDED.get(name)
    if needed is not None and needed not in found:
        _miss(f"{where} has no {needed}; give it {schema[needed].expected}")
    return found


def _read(where: str, key: _Key, value: Any) -> Any:
    try:
        return key.read(value)
    except _Wrong as error:
        more = f"; {error}" if str(error) else ""
        _miss(f"{where} is {str(value)[:80]!r}, expected {key.expected}{more}")


def _option(name: str, key: _Key, value: Any) -> Any:
    try:
        return _read(name, key, value)
    except _Wrong as error:
        raise InputError(str(error)) from None


def _check_together(config: StudyConfig) -> None:
    """Refuse keys that do not go together."""
    data = config.data
    if (data.task is None) == (data.file is None):
        both = "both task and file" if data.task else "neither task nor file"
        _miss(f"[data] has {both}; give task for an organism, or file for your own data")
    if data.task is not None and data.columns != ColumnsConfig():
        _miss("[data]: columns is for a file, and task was given; leave one of them out")
    names = [each.name for each in config.maps]
    folded = [name.casefold() for name in names]  # some file systems see no difference
    for number, name in enumerate(names):
        if folded[number] in folded[:number]:
            _miss(f"[[map]] {number + 1}: name is {name!r} again; give each map a name of its own")
    for number, each in enumerate(config.maps, 1):
        if each.edit.needs_reference and not data.reference:
            _miss(
                f"[[map]] {number}: edit is {each.edit.name!r}, which takes its statistics from "
                "other inputs; set reference = 32 in [data] to keep so many pairs aside for it"
            )


def _near(value: Any, known: Sequence[str], before: str = "") -> str:
    near = difflib.get_close_matches(str(value), known, n=1)
    return f"{before}did you mean {near[0]!r}?" if near else ""
