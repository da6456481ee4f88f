"""Every reader of files that people exchange: what a valid file is, and how a wrong one is read.

A reader gets a folder that is as our own writers left it, but for one file whose bytes are given.
It may return something or raise an error of ours; nothing else.
"""

import hashlib
import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from examples.capimagine import chains, data, evaluate, replies, unpack
from examples.capimagine.ledger import Entry, Ledger
from examples.capimagine.refused import Refusal, SourceError
from imaginelens.hooks.cache import ActivationCache
from imaginelens.hooks.errors import ImagineLensError
from imaginelens.hooks.pairs import Pairs
from imaginelens.hooks.recorded import Latents
from imaginelens.mediation.effect_map import EffectMap
from imaginelens.mediation.study_config import EXAMPLE, ColumnsConfig, read_config
from imaginelens.mediation.study_data import read_pairs
from imaginelens.probes.erasing import Eraser, erase
from imaginelens.probes.fitting import fit_probe
from imaginelens.probes.map_result import ProbeMap
from imaginelens.probes.mapping import probe_map
from imaginelens.probes.questions import read_questions
from imaginelens.probes.saving import load_probe
from imaginelens.probes.shards import open_states, save_states
from imaginelens.probes.states import States

OURS = (ImagineLensError, SourceError, Refusal, replies.BadReply)


@dataclass(frozen=True)
class Reader:
    """A file and who reads it.

    Attributes:
        name: what the table of figures calls it.
        write: leaves a valid folder; called once.
        file: the file in it whose bytes are tried.
        read: reads the folder.
        refuses: the errors that carry a sentence of ours.
        mend: changes other files so that they fit the bytes, such as a digest of them.
    """

    name: str
    write: Callable[[Path], Any]
    file: str
    read: Callable[[Path], Any]
    refuses: tuple[type[Exception], ...] = OURS
    mend: Callable[[Path, bytes], None] | None = None


def _rows(text: str, name: str) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        (folder / name).write_text(text, encoding="utf-8")

    return write


def _picture(folder: Path) -> None:
    from PIL import Image

    Image.new("RGB", (28, 28), "red").save(folder / "a.png")


def _pairs(folder: Path) -> None:
    _picture(folder)
    one = {"images": "a.png", "question": "which?", "answer": "cat", "group": 1}
    lines = [{**one, "source": {**one, "answer": "dog"}}, {**one, "answer": "cow", "source": one}]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def _csv(folder: Path) -> None:
    _picture(folder)
    rows = "images,question,answer,pair\na.png,which?,cat,1\na.png,what?,dog,1\n"
    (folder / "pairs.csv").write_text(rows)


def _json(folder: Path) -> None:
    _picture(folder)
    row = {"images": "a.png", "question": "which?", "pair": 1}
    rows = [{**row, "answer": "cat"}, {**row, "answer": "dog"}]
    (folder / "pairs.json").write_text(json.dumps(rows))


def _map(folder: Path) -> None:
    import imaginelens as il

    lens = il.load("latent-content")
    how = {"sites": "resid_post", "positions": il.latent, "metric": il.logit_diff}
    il.sweep(lens, lens.task(n=2, seed=0), **how).save(folder)


def _cache(folder: Path) -> None:
    import imaginelens as il

    lens = il.load("latent-content")
    _, cache = lens.run_with_cache(lens.task(n=1, seed=0).base, names_filter="*.hook_resid_post")
    cache.save(folder / "cache.safetensors")


def _recorded(folder: Path) -> None:
    import imaginelens as il

    lens = il.load("latent-content")
    run = lens.run(lens.task(n=2, seed=0).base)
    il.Latents.of(run, ids=["a", "b"]).save(folder / "latents.safetensors")


def _monets(folder: Path) -> None:
    import torch

    saved = {"metadata_info": "x_1", "latent": torch.zeros(2, 8)}
    torch.save(saved, folder / "latent_last_layer_x_1.pt")


def some_states() -> States:
    """Random states of two classes."""
    rng = np.random.default_rng(0)
    labels = np.arange(24) % 2
    states = rng.normal(size=(24, 2, 4)) + labels[:, None, None]
    names = [["cat", "dog"][k] for k in labels]
    return States.of(states, names, sites=["hook_latent"], label="kind")


def _probe(folder: Path) -> None:
    fit_probe(some_states(), kind="logistic").save(folder)


def _eraser(folder: Path) -> None:
    erase(some_states(), steps=[1]).save(folder)


def _probe_map(folder: Path) -> None:
    probe_map(some_states()).save(folder)


def _digest_in_words(folder: Path, content: bytes) -> None:
    """A probe's words hold the digest of its arrays, so that wrong arrays are read at all."""
    words = json.loads((folder / "probe.json").read_text())
    words["digest"] = hashlib.sha256(content).hexdigest()
    (folder / "probe.json").write_text(json.dumps(words))


def _ledger(folder: Path) -> None:
    with Ledger(folder / "ledger.jsonl") as ledger:
        for key in "ab":
            ledger.add(Entry(key=key, stage="refine", id="7", text='{"x": 1}'))


def _read_ledger(folder: Path) -> Any:
    with Ledger(folder / "ledger.jsonl") as ledger:
        return list(ledger)


def _monet(folder: Path) -> None:
    _picture(folder)
    step = {"type": "text", "text": "look <abs_vis_token></abs_vis_token>"}
    seen = {"type": "text", "text": "<observation>red</observation> \\boxed{red}"}
    picture = {"type": "image", "image": "a.png"}
    ask = {"type": "text", "text": "which colour?"}
    turns = [
        {"role": "user", "content": [picture, ask]},
        {"role": "assistant", "content": [step, picture, seen]},
    ]
    record = {"metadata": {"dataset_name": "x", "sample_id": 1}, "data": turns}
    (folder / "train.json").write_text(json.dumps([record, record]))


def _llava(folder: Path) -> None:
    _picture(folder)
    said = [
        {"from": "human", "value": "<image>which colour?"},
        {"from": "gpt", "value": "it is \\boxed{red}"},
    ]
    (folder / "train.json").write_text(
        json.dumps([{"id": "1", "image": "a.png", "conversations": said}])
    )


def _messages(folder: Path) -> None:
    _picture(folder)
    said = [
        {"role": "user", "content": "<image>which colour?"},
        {"role": "assistant", "content": "it is \\boxed{red}"},
    ]
    line = json.dumps({"id": "1", "images": ["a.png"], "messages": said})
    (folder / "train.jsonl").write_text(line + "\n")


def _chains(folder: Path) -> None:
    _picture(folder)
    chain = chains.Chain(
        id="1",
        subset="x",
        folder=folder,
        prompt=(chains.Picture("a.png"), "which?"),
        reply=("<think_image> red </think_image> red",),
        answer="red",
    )
    chains.save([chain, chain], folder / "chains.jsonl")


def _zip(folder: Path) -> None:
    import zipfile

    _picture(folder)
    with zipfile.ZipFile(folder / "images.zip", "w", zipfile.ZIP_DEFLATED) as packed:
        packed.write(folder / "a.png", "images/a.png")
        packed.writestr("images/b.txt", "b" * 50)


def _unzip(folder: Path) -> Any:
    """Nothing is written outside the target, which is empty each time."""
    target = folder / "unpacked"
    shutil.rmtree(target, ignore_errors=True)
    limits = unpack.Limits(small=1 << 10, member=1 << 20, total=1 << 20, count=10)
    return unpack.unpack(folder / "images.zip", target, limits)


def _predictions(folder: Path) -> None:
    line = {"settings": {"model": "x"}}
    (folder / "predictions.jsonl").write_text(json.dumps(line) + "\n")


_QUESTION = {"text": "which?", "probe": "what colour?", "answer": "red", "images": "a.png"}
_REPLY = {"captions": ["red", "blue"], "answer": "red"}


def _read_reply(folder: Path) -> Any:
    text = (folder / "reply.txt").read_bytes().decode("utf-8", "replace")
    return replies.parsed(text)


def _read_questions(folder: Path) -> Any:
    return read_questions(folder / "questions.jsonl")


READERS = (
    Reader(
        "study TOML",
        _rows(EXAMPLE, "study.toml"),
        "study.toml",
        lambda folder: read_config(folder / "study.toml"),
    ),
    Reader(
        "pairs, JSON lines",
        _pairs,
        "pairs.jsonl",
        lambda folder: Pairs.from_jsonl(folder / "pairs.jsonl"),
    ),
    Reader(
        "pairs, CSV",
        _csv,
        "pairs.csv",
        lambda folder: read_pairs(folder / "pairs.csv", ColumnsConfig(pair="pair"), seed=0),
    ),
    Reader(
        "pairs, JSON",
        _json,
        "pairs.json",
        lambda folder: read_pairs(folder / "pairs.json", ColumnsConfig(pair="pair"), seed=0),
    ),
    Reader("picture", _pairs, "a.png", lambda folder: Pairs.from_jsonl(folder / "pairs.jsonl")),
    Reader("effect map, manifest", _map, "map.json", EffectMap.load),
    Reader("effect map, part", _map, "shard-000000.safetensors", EffectMap.load),
    Reader(
        "activation cache",
        _cache,
        "cache.safetensors",
        lambda folder: ActivationCache.load(folder / "cache.safetensors"),
    ),
    Reader(
        "recorded latents",
        _recorded,
        "latents.safetensors",
        lambda folder: Latents.load(folder / "latents.safetensors"),
    ),
    Reader(
        "Monet's recording",
        _monets,
        "latent_last_layer_x_1.pt",
        lambda folder: Latents.load(folder),
    ),
    Reader("probe, words", _probe, "probe.json", load_probe),
    Reader("probe, arrays", _probe, "probe.safetensors", load_probe, mend=_digest_in_words),
    Reader("eraser, words", _eraser, "eraser.json", Eraser.load),
    Reader("eraser, arrays", _eraser, "eraser.safetensors", Eraser.load),
    Reader("probe map, words", _probe_map, "map.json", ProbeMap.load),
    Reader("probe map, arrays", _probe_map, "map.safetensors", ProbeMap.load),
    Reader(
        "states, manifest",
        lambda folder: save_states(some_states(), folder),
        "states.json",
        open_states,
    ),
    Reader(
        "states, part",
        lambda folder: save_states(some_states(), folder),
        "shard-000000.safetensors",
        lambda folder: open_states(folder).cell(step=0),
    ),
    Reader(
        "behavioural questions",
        lambda folder: (
            _picture(folder),
            (folder / "questions.jsonl").write_text(2 * (json.dumps(_QUESTION) + "\n")),
        ),
        "questions.jsonl",
        _read_questions,
    ),
    Reader("recipe: ledger", _ledger, "ledger.jsonl", _read_ledger),
    Reader("recipe: Monet JSON", _monet, "train.json", lambda f: data.read(f / "train.json")),
    Reader("recipe: LLaVA JSON", _llava, "train.json", lambda f: data.read(f / "train.json")),
    Reader("recipe: messages", _messages, "train.jsonl", lambda f: data.read(f / "train.jsonl")),
    Reader(
        "recipe: chains",
        _chains,
        "chains.jsonl",
        lambda folder: chains.load(folder / "chains.jsonl"),
        (*OURS, ValueError),
    ),
    Reader("recipe: zip", _zip, "images.zip", _unzip),
    Reader(
        "recipe: predictions",
        _predictions,
        "predictions.jsonl",
        lambda folder: evaluate.load(folder / "predictions.jsonl"),
    ),
    Reader("recipe: reply", _rows(json.dumps(_REPLY), "reply.txt"), "reply.txt", _read_reply),
)
