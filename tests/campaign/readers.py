"""Every reader of files that people exchange: what a valid file is, and how a wrong one is read.

A reader gets a folder that is as our own writers left it, but for one file whose bytes are given.
It may return something or raise an error of ours; nothing else.

Where a digest guards what is read, `mend` puts the one that fits, so that wrong content is looked
at at all. What comes from the Hub is read by the same functions. Dictionaries are objects of other
packages: we read no file of them. Whole checkpoints are transformers' to read, and take a second
each: `faults.py` tears them.
"""

import hashlib
import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from examples.capimagine import benchmark_layouts, chains, data, evaluate, replies, unpack
from examples.capimagine.ledger import Entry, Ledger
from examples.capimagine.refused import Refusal, SourceError
from examples.capimagine.scores import Prediction
from examples.reproduce import config as reproduction
from imaginelens.hooks.cache import ActivationCache
from imaginelens.hooks.errors import ImagineLensError
from imaginelens.hooks.heads import weight_names
from imaginelens.hooks.loading import adapts
from imaginelens.hooks.pairs import Pairs
from imaginelens.hooks.pyvene_configs import from_pyvene
from imaginelens.hooks.recorded import Latents
from imaginelens.mediation import map_files, result_files
from imaginelens.mediation.cells import Cell
from imaginelens.mediation.effect_map import EffectMap
from imaginelens.mediation.splits import Splits
from imaginelens.mediation.study_config import EXAMPLE, ColumnsConfig, read_config
from imaginelens.mediation.study_data import read_pairs
from imaginelens.mediation.sufficiency import Sufficiency
from imaginelens.organisms.organism import _measured
from imaginelens.probes.erasing import Eraser, erase
from imaginelens.probes.fitting import fit_probe
from imaginelens.probes.map_result import ProbeMap
from imaginelens.probes.mapping import probe_map
from imaginelens.probes.questions import read_questions
from imaginelens.probes.saving import load_probe
from imaginelens.probes.shards import open_states, save_states
from imaginelens.probes.states import States
from imaginelens.probes.tuned_lens import TunedLens
from imaginelens.probes.tuned_training import bits

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


@cache
def _lens() -> Any:
    import imaginelens as il

    return il.load("latent-content")


@cache
def some_map(seed: int = 0) -> EffectMap:
    """A map of two cells over ten pairs, each of a group of its own."""
    rng = np.random.default_rng(seed)
    before, after = rng.normal(size=10), rng.normal(size=(2, 10))
    sites = [f"blocks.{i}.hook_resid_post" for i in (0, 1)]
    return EffectMap.from_arrays(
        cells=[Cell("resid_post", i, "latent[0]", None, (site,)) for i, site in enumerate(sites)],
        before=before,
        other=before + 1,
        after=after,
        groups=list("abcdefghij"),
        keys=list("0123456789"),
        metric="logit_diff",
    )


def _map(folder: Path) -> None:
    some_map().save(folder)


def _map_words(folder: Path) -> None:
    from safetensors import safe_open

    some_map().save(folder)
    with safe_open(folder / _PART, framework="numpy") as file:
        (folder / "words.json").write_text(file.metadata()[map_files.HEADER])


def _words_in_map(folder: Path, content: bytes) -> None:
    """A map's words in its file, with their digest."""
    from safetensors.numpy import save

    there = {name: getattr(some_map(), name) for name in map_files.ARRAYS}
    arrays = {name: array for name, array in there.items() if array is not None}
    try:
        header = json.loads(content)
        header["digest"] = map_files._digest(arrays, header["map"])
        text = json.dumps(header)
    except (ValueError, TypeError, LookupError, RecursionError):
        text = content.decode("utf-8", "replace")
    (folder / _PART).write_bytes(save(arrays, metadata={map_files.HEADER: text}))


_PART = "shard-000000.safetensors"


def some_result(seed: int = 0) -> Sufficiency:
    """What a saved result may hold: a map, cells and numbers."""
    found = some_map(seed)
    return Sufficiency(found.cells[:1], (0, 1), found)


def _result(folder: Path) -> None:
    some_result().save(folder)
    shutil.copy(folder / "result.json", folder / "words.json")


def _digest_of_result(folder: Path, content: bytes) -> None:
    header = dict(_first(folder / "words.json"))
    header["digest"] = result_files._digest(content, header["result"])
    (folder / "result.json").write_text(json.dumps(header))


def _words_in_result(folder: Path, content: bytes) -> None:
    text = content.decode("utf-8", "replace")
    try:
        header = json.loads(content)
        arrays = (folder / "result.safetensors").read_bytes()
        header["digest"] = result_files._digest(arrays, header["result"])
        text = json.dumps(header)
    except (ValueError, TypeError, LookupError, RecursionError):
        pass
    (folder / "result.json").write_text(text, encoding="utf-8")


@cache
def _first(path: Path) -> Any:
    """What a file of JSON held when it was first asked for."""
    return json.loads(path.read_text())


def _cache(folder: Path) -> None:
    base, site = _lens().task(n=1, seed=0).base, "blocks.0.attn.hook_z"
    _, cache = _lens().run_with_cache(base, names_filter=site)
    cache.save(folder / "cache.safetensors")


def _recorded(folder: Path) -> None:
    run = _lens().run(_lens().task(n=2, seed=0).base)
    Latents.of(run, ids=["a", "b"]).save(folder / "latents.safetensors")


def _played(folder: Path) -> None:
    steps = {"a": [[0.5, 1.0], [2.0, 3.0]], "b": [[1.0, 2.0]], "c": []}
    (folder / "latents.json").write_text(json.dumps(steps))


def _adapters(folder: Path) -> None:
    words = {"base_model_name_or_path": "owner/name", "peft_type": "LORA", "r": 8}
    (folder / "adapter_config.json").write_text(json.dumps(words))


def _weights(folder: Path) -> None:
    from safetensors.numpy import save_file

    save_file({"head.weight": np.zeros((2, 2), np.float32)}, folder / "model-1.safetensors")
    index = {"metadata": {}, "weight_map": {"head.weight": "model-1.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def _card(folder: Path) -> None:
    words = {"variant": {"hops": 2, "imagines": False, "seed": 0}, "accuracy": 0.99}
    (folder / "card.json").write_text(json.dumps(words))


def _pyvene(folder: Path) -> None:
    import torch

    one = {"layer": 1, "component": "block_output", "unit": "pos", "max_number_of_units": 1}
    kind = "<class 'pyvene.models.interventions.RotatedSpaceIntervention'>"
    config = {
        "representations": [one],
        "intervention_types": [kind],
        "mode": "parallel",
        "sorted_keys": ["layer.1.comp.block_output.unit.pos.nunit.1#0"],
        "intervention_dimensions": [64],
    }
    (folder / "config.json").write_text(json.dumps(config))
    turned = torch.linalg.qr(torch.randn(64, 2, generator=torch.Generator().manual_seed(0)))[0]
    torch.save({"rotate_layer.weight": turned}, folder / f"intkey_{config['sorted_keys'][0]}.bin")


def some_lens(seed: int = 0) -> TunedLens:
    """A tuned lens of one layer."""
    import torch

    site, values = "blocks.0.hook_resid_post", np.array([0.5, 0.25, 1.0 + seed])
    return TunedLens(
        (site,),
        {site: torch.full((3, 3), float(seed))},
        {site: torch.zeros(3)},
        {site: bits(values, site, "logit lens", None)},
        {site: bits(values / 2, site, "tuned lens", None)},
        "latent",
        "Model",
    )


def _tuned(folder: Path) -> None:
    some_lens().save(folder)


def _splits(folder: Path) -> None:
    (folder / "splits-000000.json").write_text(json.dumps(["block 1 column 2 rows 3 0.0-1.1"]))


def _reproduction(folder: Path) -> None:
    home = Path(reproduction.__file__).parent / "configs"
    shutil.copy(home / "monet-7b.toml", folder / "study.toml")


def _benchmark_table(folder: Path) -> None:
    _picture(folder)
    names = ("index", "category", "question", "A", "B", "answer", "image")
    row = ("1", "direct_attributes", "which?", "red", "blue", "A", "a.png")
    (folder / "VStarBench.tsv").write_text("\t".join(names) + "\n" + "\t".join(row) + "\n")


def _benchmark_lines(folder: Path) -> None:
    _picture(folder)
    text = "which?\n(A) red\n(B) blue\nAnswer with the letter."
    row = {"question_id": 1, "category": "direct_attributes", "text": text, "label": "A"}
    (folder / "test_questions.jsonl").write_text(json.dumps({**row, "image": "a.png"}) + "\n")


def _benchmark_json(folder: Path) -> None:
    _picture(folder)
    row = {"Question_id": "1", "Text": "which?", "Answer choices": "['(A) red', '(B) blue']"}
    row |= {"Ground truth": "A", "Task": "x", "Subtask": "y", "Image": "a.png"}
    (folder / "MME_RealWorld_Lite.json").write_text(json.dumps([row]))


def _monets(folder: Path) -> None:
    import torch
    import torch.nested._internal.ops  # which torch's reader imports at the first nested tensor

    saved = {"metadata_info": "x_1", "latent": torch.zeros(2, 8)}
    torch.save(saved, folder / "latent_last_layer_x_1.pt")


def some_states(seed: int = 0) -> States:
    """Random states of two classes."""
    rng = np.random.default_rng(seed)
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


def _digest_in(name: str) -> Callable[[Path, bytes], None]:
    """The words of a result hold the digest of its arrays."""

    def mend(folder: Path, content: bytes) -> None:
        words = {**_first(folder / name), "digest": hashlib.sha256(content).hexdigest()}
        (folder / name).write_text(json.dumps(words))

    return mend


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
    if target.exists():
        shutil.rmtree(target)
    limits = unpack.Limits(small=1 << 10, member=1 << 20, total=1 << 20, count=10)
    return unpack.unpack(folder / "images.zip", target, limits)


def _predictions(folder: Path) -> None:
    made = Prediction("1", "x", "none", "which?", ("a", "b"), True, "A", "A", 2, True, 5, 0.5)
    lines = ({"settings": {"model": "x"}}, made.record())
    (folder / "predictions.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines))


_QUESTION = {"text": "which?", "probe": "what colour?", "answer": "red", "images": "a.png"}
_REPLY = {"captions": ["red", "blue"], "answer": "red"}


def _read_reply(folder: Path) -> Any:
    text = (folder / "reply.txt").read_bytes().decode("utf-8", "replace")
    return replies.parsed(text)


def _benchmark(name: str) -> Callable[[Path], Any]:
    return lambda folder: list(benchmark_layouts.read(name, folder))


def _read_questions(folder: Path) -> Any:
    return read_questions(folder / "questions.jsonl")


READERS = (  # the fastest first
    Reader("recipe: reply", _rows(json.dumps(_REPLY), "reply.txt"), "reply.txt", _read_reply),
    Reader(
        "recipe: predictions",
        _predictions,
        "predictions.jsonl",
        lambda folder: evaluate.load(folder / "predictions.jsonl"),
    ),
    Reader(
        "recipe: chains",
        _chains,
        "chains.jsonl",
        lambda folder: chains.load(folder / "chains.jsonl"),
        (*OURS, ValueError),
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
    Reader("study splits", _splits, "splits-000000.json", lambda folder: Splits(folder).of(0)),
    Reader("adapters", _adapters, "adapter_config.json", adapts),
    Reader("organism's card", _card, "card.json", lambda folder: _measured(folder, None)),
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
    Reader(
        "pairs, JSON lines",
        _pairs,
        "pairs.jsonl",
        lambda folder: Pairs.from_jsonl(folder / "pairs.jsonl"),
    ),
    Reader("effect map, manifest", _map, "map.json", EffectMap.load),
    Reader("probe map, words", _probe_map, "map.json", ProbeMap.load),
    Reader("recipe: messages", _messages, "train.jsonl", lambda f: data.read(f / "train.jsonl")),
    Reader("recipe: ledger", _ledger, "ledger.jsonl", _read_ledger),
    Reader("recipe: LLaVA JSON", _llava, "train.json", lambda f: data.read(f / "train.json")),
    Reader(
        "states, manifest",
        lambda folder: save_states(some_states(), folder),
        "states.json",
        open_states,
    ),
    Reader("probe, words", _probe, "probe.json", load_probe),
    Reader("eraser, words", _eraser, "eraser.json", Eraser.load),
    Reader(
        "eraser, arrays",
        _eraser,
        "eraser.safetensors",
        Eraser.load,
        mend=_digest_in("eraser.json"),
    ),
    Reader("tuned lens, words", _tuned, "tuned_lens.json", TunedLens.from_pretrained),
    Reader(
        "tuned lens, arrays",
        _tuned,
        "tuned_lens.safetensors",
        TunedLens.from_pretrained,
        mend=_digest_in("tuned_lens.json"),
    ),
    Reader(
        "study TOML",
        _rows(EXAMPLE, "study.toml"),
        "study.toml",
        lambda folder: read_config(folder / "study.toml"),
    ),
    Reader(
        "reproduction TOML",
        _reproduction,
        "study.toml",
        lambda folder: reproduction.read_config(folder / "study.toml"),
    ),
    Reader("benchmark, table", _benchmark_table, "VStarBench.tsv", _benchmark("vstar")),
    Reader("benchmark, JSON lines", _benchmark_lines, "test_questions.jsonl", _benchmark("vstar")),
    Reader(
        "benchmark, JSON",
        _benchmark_json,
        "MME_RealWorld_Lite.json",
        _benchmark("mme-realworld-lite"),
    ),
    Reader(
        "weights, index",
        _weights,
        "model.safetensors.index.json",
        weight_names,
    ),
    Reader("weights, header", _weights, "model-1.safetensors", weight_names),
    Reader(
        "played latents, JSON",
        _played,
        "latents.json",
        lambda folder: Latents.load(folder / "latents.json"),
    ),
    Reader(
        "recorded latents",
        _recorded,
        "latents.safetensors",
        lambda folder: Latents.load(folder / "latents.safetensors"),
    ),
    Reader(
        "activation cache",
        _cache,
        "cache.safetensors",
        lambda folder: ActivationCache.load(folder / "cache.safetensors"),
    ),
    Reader("effect map, part", _map, _PART, EffectMap.load),
    Reader("effect map, words", _map_words, "words.json", EffectMap.load, mend=_words_in_map),
    Reader("result, words", _result, "words.json", Sufficiency.load, mend=_words_in_result),
    Reader(
        "result, arrays", _result, "result.safetensors", Sufficiency.load, mend=_digest_of_result
    ),
    Reader(
        "probe map, arrays",
        _probe_map,
        "map.safetensors",
        ProbeMap.load,
        mend=_digest_in("map.json"),
    ),
    Reader(
        "probe, arrays",
        _probe,
        "probe.safetensors",
        load_probe,
        mend=_digest_in("probe.json"),
    ),
    Reader("recipe: Monet JSON", _monet, "train.json", lambda f: data.read(f / "train.json")),
    Reader("recipe: zip", _zip, "images.zip", _unzip),
    Reader("picture", _pairs, "a.png", lambda folder: Pairs.from_jsonl(folder / "pairs.jsonl")),
    Reader(
        "states, part",
        lambda folder: save_states(some_states(), folder),
        _PART,
        lambda folder: open_states(folder).cell(step=0),
    ),
    Reader(
        "Monet's recording",
        _monets,
        "latent_last_layer_x_1.pt",
        lambda folder: Latents.load(folder),
    ),
    Reader("pyvene, config", _pyvene, "config.json", lambda folder: from_pyvene(_lens(), folder)),
    Reader(
        "pyvene, weights",
        _pyvene,
        "intkey_layer.1.comp.block_output.unit.pos.nunit.1#0.bin",
        lambda folder: from_pyvene(_lens(), folder),
    ),
)
