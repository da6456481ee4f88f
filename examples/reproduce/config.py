"""The config of a model, as TOML: everything that decides a number, and nothing by default.

Every key must be there, and no other: a key that is not known is an error that names it. Paths
count from the current folder.
"""

import hashlib
import json
import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

import imaginelens as il
from examples.reproduce.rewriter import Rewriter
from examples.reproduce.subjects import Settings, Subject
from imaginelens.hooks import answers
from imaginelens.hooks.errors import InputError, brief, quoted

# How many questions a benchmark has, where its folder is not at hand: from its authors' pages.
SIZES = {
    "vstar": 191, "hrbench4k": 800, "hrbench8k": 800, "mme-realworld-lite": 1919, "blink": 283,
    "mme": 2374, "ocrbench-v2": 10000, "tablevqa": 1250, "vsp": 400,
}  # fmt: skip
QUESTIONS = "questions"
_ANY: dict[str, type | tuple[type, ...]] = {
    "id": str, "family": str, "heading": str, "revision": str, "dtype": str, "device": str,
    "steps": int, "answer": str,
}  # fmt: skip
_SECTIONS: dict[str, dict[str, type | tuple[type, ...]]] = {
    "model": _ANY,
    "do_z": {"tau": list, "sigma": list, "mu": list, "draws": int},
    "rewriter": {"url": str, "model": str},
    "run": {
        "tables": int, "similarity": int, "timing": int, "map": int, "beyond": int, "seed": int,
        "batch_size": int, "max_new_tokens": int, "reply_tokens": int,
        "seconds_per_token": (int, float), "out": str,
    },
}  # fmt: skip


def choice(text: str) -> tuple[int, int] | None:
    r"""Find what is inside the last \boxed{...}, or the letter that it begins with; without a box,
    the last letter of an option.

    >>> [text[slice(*choice(text))] for text in ("A? \\boxed{(B) red}", "\\boxed{A dog}", "so C.")]
    ['B', 'A dog', 'C']
    """
    found = answers.boxed(text)
    if found is None:
        return answers.letter(text)
    letter = re.match(r"\s*\(?([A-J])(?=[.):]|\s*$)", text[slice(*found)])
    return found if letter is None else (found[0] + letter.start(1), found[0] + letter.end(1))


FINDERS = {
    "choice": choice, "boxed": answers.boxed, "letter": answers.letter, "tail": answers.tail,
    "family": None,
}  # fmt: skip


@dataclass(frozen=True)
class Config:
    """A model, its data and all choices; `read_config` makes one."""

    name: str
    model: Mapping[str, Any]
    data: Mapping[str, str]
    do_z: Mapping[str, Any]
    rewriter: Mapping[str, str]
    run: Mapping[str, Any]

    @property
    def family(self) -> il.LatentSpec | il.TextSpec:
        """The family, with the config's number of steps."""
        spec = il.FAMILIES[self.model["family"]]
        assert isinstance(spec, il.LatentSpec | il.TextSpec)  # of all exhibits' families
        steps = self.model["steps"]
        return spec.with_steps(steps) if steps and isinstance(spec, il.LatentSpec) else spec

    @property
    def heading(self) -> str:
        """What its columns are headed by."""
        return f"ours, {self.model['heading']} ({self.model['id']})"

    @property
    def digest(self) -> str:
        """What identifies everything in it that a number depends on."""
        parts = {k: v for k, v in vars(self).items() if k != "run"}
        run = {
            k: v
            for k, v in self.run.items()
            if k not in ("out", "seconds_per_token", "reply_tokens")
        }
        text = json.dumps({**parts, "run": run}, sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def size(self, benchmark: str, n: int) -> int:
        """How many questions of a benchmark there are, as far as can be told; 0 if unknown."""
        file = Path(self.data.get(benchmark, "")) / "questions.jsonl"
        if benchmark == QUESTIONS:
            file = Path(self.data.get(benchmark, ""))
        there = SIZES.get(benchmark, 30 if benchmark == QUESTIONS else 0)
        if benchmark in self.data and file.is_file():
            there = sum(bool(line.strip()) for line in file.read_text("utf-8").splitlines())
        return min(n, there) if n else there

    def open(self) -> Subject:
        """Load the model, from the Hub or a folder.

        Raises:
            CheckpointError: there is no such model, or it cannot be opened.
        """
        lens = il.load(
            self.model["id"], spec=self.family, answer=FINDERS[self.model["answer"]],
            dtype=getattr(torch, self.model["dtype"]), device_map=self.model["device"],
            revision=self.model["revision"] or None,
        )  # fmt: skip
        # what takes no limit of its own, such as necessity, reads it here
        lens.model.generation_config.max_new_tokens = self.run["max_new_tokens"]
        settings = Settings(
            batch_size=self.run["batch_size"], max_new_tokens=self.run["max_new_tokens"]
        )
        if self.do_z:
            settings = replace(
                settings, tau=tuple(self.do_z["tau"]), sigma=tuple(self.do_z["sigma"]),
                mu=tuple(self.do_z["mu"]), draws=self.do_z["draws"],
            )  # fmt: skip
        rewriter = None
        if self.rewriter:
            rewriter = Rewriter(self.rewriter["url"], self.rewriter["model"])
        folders = {name: Path(path) for name, path in self.data.items() if name != QUESTIONS}
        questions = self.data.get(QUESTIONS)
        return Subject(
            name=self.name, heading=self.heading, lens=lens, settings=settings, data=folders,
            questions=None if questions is None else Path(questions),
            rewriter=rewriter,
        )  # fmt: skip


def read_config(path: Path) -> Config:
    """Read a config, and refuse whatever is not known, missing, or of a wrong kind.

    Raises:
        InputError: names the key, and what was expected.
    """
    try:
        raw = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError, RecursionError) as error:
        raise InputError(f"{str(path)!r} is no config that can be read: {brief(error)}") from error
    _known(raw, {*_SECTIONS, "data"}, path, "")
    model = raw.get("model")
    family = model.get("family") if isinstance(model, Mapping) else None
    if not isinstance(family, str) or family not in il.FAMILIES:
        raise InputError(
            f"{path.name}: [model] family is {quoted(family)}; choose one of "
            f"{', '.join(il.FAMILIES)}"
        )
    textual = isinstance(il.FAMILIES[family], il.TextSpec)
    needed = ["model", "data", "run", "rewriter" if textual else "do_z"]
    absent = [name for name in needed if name not in raw]
    if absent:
        raise InputError(f"{path.name} has no section [{absent[0]}]; a {family} config needs it")
    unused = "do_z" if textual else "rewriter"
    if unused in raw:
        raise InputError(f"{path.name}: [{unused}] means nothing for {family}; remove it")
    for section in needed:
        if section != "data":
            _check(raw[section], _SECTIONS[section], path, section)
    _check_data(raw["data"], path)
    _check_values(raw, path, textual)
    return Config(
        path.stem, raw["model"], raw["data"], raw.get("do_z", {}), raw.get("rewriter", {}),
        raw["run"],
    )  # fmt: skip


def _known(raw: Mapping[str, Any], known: set[str], path: Path, section: str) -> None:
    for key in raw:
        if key not in known:
            where = f"[{section}] has the key" if section else "has the section"
            raise InputError(
                f"{path.name} {where} {quoted(key)}, which is not known; known are "
                f"{', '.join(sorted(known))}"
            )


def _check(
    raw: Any, wanted: Mapping[str, type | tuple[type, ...]], path: Path, section: str
) -> None:
    if not isinstance(raw, Mapping):
        raise InputError(f"{path.name}: {section} is no section; write it as [{section}]")
    _known(raw, set(wanted), path, section)
    for key, kind in wanted.items():
        if key not in raw:
            raise InputError(f"{path.name}: [{section}] has no {key}; all keys must be given")
        if not isinstance(raw[key], kind) or isinstance(raw[key], bool):
            name = kind.__name__ if isinstance(kind, type) else "number"
            raise InputError(
                f"{path.name}: [{section}] {key} is {quoted(raw[key])}, expected a value of "
                f"kind {name}"
            )


def _check_data(raw: Any, path: Path) -> None:
    if not isinstance(raw, Mapping):
        raise InputError(f"{path.name}: data is no section; write it as [data]")
    _known(raw, {*SIZES, QUESTIONS}, path, "data")
    for key, folder in raw.items():
        if not isinstance(folder, str):
            raise InputError(f"{path.name}: [data] {key} is {quoted(folder)}, expected a path")


def _check_values(raw: Mapping[str, Any], path: Path, textual: bool) -> None:
    model, run, do_z = raw["model"], raw["run"], raw.get("do_z", {})
    if model["answer"] not in FINDERS:
        raise InputError(
            f"{path.name}: [model] answer is {quoted(model['answer'])}; choose one of "
            f"{', '.join(FINDERS)}"
        )
    if not isinstance(getattr(torch, model["dtype"], None), torch.dtype):
        raise InputError(
            f"{path.name}: [model] dtype is {quoted(model['dtype'])}; torch has float32, "
            "bfloat16, ..."
        )
    if model["steps"] < 0 or (textual and model["steps"]):
        raise InputError(
            f"{path.name}: [model] steps is {model['steps']}; give 1 or more, or 0 for the "
            "family's own (and for a family that imagines in words)"
        )
    least = {"tables": 0, "similarity": 3, "timing": 2, "map": 2, "beyond": 2, "batch_size": 1,
             "max_new_tokens": 1, "reply_tokens": 1, "seed": 0}  # fmt: skip
    for key, low in least.items():
        if run[key] < low:
            raise InputError(f"{path.name}: [run] {key} is {run[key]}, expected {low} or more")
    for key in ("tau", "sigma", "mu"):
        values = do_z.get(key, [0])
        good = all(v in ("mean", "random") for v in values) if key == "tau" and do_z else all(
            isinstance(v, int | float) and not isinstance(v, bool) and v >= 0 for v in values
        )  # fmt: skip
        if not values or not good or len(set(map(str, values))) < len(values):
            what = "some of mean, random" if key == "tau" else "numbers from 0"
            raise InputError(
                f"{path.name}: [do_z] {key} is {quoted(values)}, expected {what}, each once"
            )
    if do_z and do_z["draws"] < 1:
        raise InputError(f"{path.name}: [do_z] draws is {do_z['draws']}, expected 1 or more")
