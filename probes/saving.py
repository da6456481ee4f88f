"""A probe result as a folder, and back: arrays in safetensors, words in JSON, a card. No pickle."""

import hashlib
import json
from dataclasses import fields
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load as from_bytes
from safetensors.numpy import save as to_bytes

from imaginelens.hooks import hub
from imaginelens.hooks.appearing import alone, appearing
from imaginelens.hooks.errors import CheckpointError, brief, quoted
from imaginelens.probes.estimators import restored
from imaginelens.probes.result import ProbeResult

VERSION = 1
ARRAYS, WORDS, CARD = "probe.safetensors", "probe.json", hub.CARD
_UNREADABLE = (
    ValueError, TypeError, LookupError, AttributeError, RecursionError, ArithmeticError,
)  # fmt: skip
OWN = ("rows", "steps", "groups", "folds", "probabilities", "baseline", "shuffled")
PLAIN = ("kind", "label", "where", "n_steps")


def save(result: ProbeResult, folder: Path, *, license: str | None = None) -> Path:
    """Write a result to a folder; the file with the words comes last, and is the proof."""
    if folder.exists() and not folder.is_dir():
        raise CheckpointError(f"{folder!s} is a file; give a folder to save the probe to")
    content = to_bytes({n: np.ascontiguousarray(each) for n, each in _arrays(result).items()})
    words = {
        "format": VERSION,
        "imaginelens": _our_version(),
        "digest": hashlib.sha256(content).hexdigest(),
        **{name: getattr(result, name) for name in PLAIN},
        "params": result.probe.get_params(),
        "classes": result.classes,
        "beside": list(result.beside),
        "notes": list(result.notes),
        "verdict": result.verdict(),
        "summary": result.summary(),
    }
    text = json.dumps(words, indent=1, allow_nan=False)
    with alone(folder):  # an earlier probe is replaced
        _write(folder / ARRAYS, content)
        _write(folder / CARD, card(result, license=license).encode())
        _write(folder / WORDS, text.encode())
    return folder


def load_probe(folder: str | Path) -> ProbeResult:
    """Read what `ProbeResult.save` wrote; its probe predicts to the last bit what it did.

    Raises:
        CheckpointError: there is none, it is torn, or another version wrote it.
    """
    path = Path(folder)
    if not (path / WORDS).is_file() or not (path / ARRAYS).is_file():
        raise CheckpointError(
            f"there is no probe in {path!s}, which would have {WORDS} and {ARRAYS}; give the "
            "folder that .save() wrote"
        )
    try:
        words = json.loads((path / WORDS).read_text(encoding="utf-8"))
        content = (path / ARRAYS).read_bytes()
        if words["format"] != VERSION:
            raise CheckpointError(
                f"{path!s} has format {quoted(words['format'])}, and this version of "
                f"imaginelens reads {VERSION}; read it with imaginelens "
                f"{brief(words.get('imaginelens'))}"
            )
        if words["digest"] != hashlib.sha256(content).hexdigest():
            raise CheckpointError(
                f"{path / ARRAYS!s} and {WORDS} do not belong together; save the probe again"
            )
        return _built(words, from_bytes(content))
    except (*_UNREADABLE, SafetensorError) as error:
        raise CheckpointError(
            f"{path!s} does not hold a probe as this version writes it ({brief(error)}); save it "
            "again"
        ) from error


def push(
    result: ProbeResult, repo_id: str, *, private: bool, token: str | None, license: str | None
) -> hub.Address:
    """Create a repository of models on the Hub, if it is not there, and put the result in it."""
    message = f"{result.kind} probe of {result.label}, imaginelens {_our_version()}"
    put = partial(save, result, license=license)
    return hub.upload(put, repo_id, message=message, private=private, token=token)


def from_pretrained(name: str | Path, *, revision: str | None = None) -> ProbeResult:
    """Read a result from a folder, if there is one of this name, or else from the Hub."""
    folder, origin = hub.fetch(name, revision=revision, files=(ARRAYS, WORDS, CARD))
    return hub.remembered(load_probe(folder), origin)


def card(result: ProbeResult, *, license: str | None = None) -> str:
    """The README of a saved probe, in the Hub's conventions."""
    numbers = "\n".join(f"    {line}" for line in repr(result).splitlines())
    label = json.dumps(result.label)
    arrays = "\n".join(
        f"- `{name}` {tuple(each.shape)}" for name, each in result.probe.readout_.arrays.items()
    )
    return f"""{hub.header(tags=("probe", result.kind), license=license)}

# A {result.kind} probe of {label[1:-1]}

{result.summary()}

{numbers}

Accuracies are those of probes that saw no row of the group that they were tested on; intervals are
at 95%. The probe in this folder was then fitted on all {len(result.y)} rows.

## Use

```python
import imaginelens as il

result = il.probes.ProbeResult.from_pretrained("REPOSITORY_OR_FOLDER")
result.probe.predict(states)      # (row, d_model), from {result.where}
```

## What was learned

{arrays}

`probe.safetensors` has these arrays, and the labels, predictions, probabilities, folds and groups
of every row, by number; `probe.json` has the words.

## What it does not say

That a label can be read from a state does not say that the model uses it: that takes an
intervention on the state.
"""


def _arrays(result: ProbeResult) -> dict[str, np.ndarray]:
    """All arrays of a result, by name; labels as numbers of their classes."""
    found = {n: getattr(result, n) for n in OWN if getattr(result, n) is not None}
    for name in ("y", "predictions"):
        values = getattr(result, name)
        found[name] = values if result.classes is None else result._codes(values)
    found |= {f"beside.{i}": each for i, each in enumerate(result.beside.values())}
    return found | {f"probe.{name}": each for name, each in result.probe.readout_.arrays.items()}


def _built(words: dict[str, Any], arrays: dict[str, np.ndarray]) -> ProbeResult:
    classes = None if words["classes"] is None else np.asarray(words["classes"])
    params = {n: tuple(v) if isinstance(v, list) else v for n, v in words["params"].items()}
    learned = {n[6:]: each for n, each in arrays.items() if n.startswith("probe.")}
    given: dict[str, Any] = {name: arrays.get(name) for name in OWN}
    for name in ("y", "predictions"):
        given[name] = arrays[name] if classes is None else classes[arrays[name]]
    given |= {name: words[name] for name in PLAIN}
    assert set(given) <= {each.name for each in fields(ProbeResult)}
    return ProbeResult(
        **given,
        beside={name: arrays[f"beside.{i}"] for i, name in enumerate(words["beside"])},
        probe=restored(words["kind"], params, classes, learned),
        notes=tuple(words["notes"]),
    )


def _write(path: Path, content: bytes) -> None:
    with appearing(path) as partial:
        partial.write_bytes(content)


def _our_version() -> str:
    try:
        return version("imaginelens")
    except PackageNotFoundError:
        return "unknown"
