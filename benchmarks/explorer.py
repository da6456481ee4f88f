"""What the explorer costs: time from a click to its answer, and the bytes a notebook keeps of it.

    python benchmarks/explorer.py [--out benchmarks/results/explorer.json] [--clicks 24]

A click is the message that the page sends when a cell is clicked: it goes in as JSON, and its time
ends when all that the page is told of it has come out as JSON and bytes, as a kernel would send it.
Each click runs a cell that was not run before, on one thread. What the browser draws is not in it,
nor are the two unedited runs of a pair, which are made when the pair is chosen.
The state is that of a map of 28 layers x 10 latent steps, measured with three metrics. README.md
says how to read the numbers.
"""

import argparse
import base64
import json
import os
import platform
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

os.environ["TQDM_DISABLE"] = "1"

import comm
import overhead
import torch
import transformers as hf
from comm.base_comm import BaseComm
from overhead import Median, tiny

import imaginelens as il
from imaginelens.organisms import available
from imaginelens.view.explorer import PatchExplorer, explore

GOAL_SECONDS, GOAL_BYTES = 0.3, 200_000
LAYERS, STEPS = 28, 10
METRICS = ("logit_diff", "log_prob", "prob")
SILENT = ("base",)  # what the others were trained from: it does not answer
PACKAGES = (*overhead.PACKAGES, "anywidget", "ipywidgets")


class Wire(BaseComm):
    """What carries messages to a page: each becomes JSON and bytes, as in a kernel."""

    sent: int = 0

    def publish_msg(
        self,
        msg_type: str,
        data: Any = None,
        metadata: Any = None,
        buffers: Any = None,
        **keys: Any,
    ) -> None:
        content = {"comm_id": self.comm_id, "data": data or {}, **keys}
        packed = json.dumps([msg_type, content, metadata or {}], allow_nan=False).encode("utf-8")
        self.sent += len(packed) + sum(len(bytes(part)) for part in buffers or ())


@contextmanager
def wired() -> Iterator[None]:
    """Widgets that are made meanwhile talk over a `Wire`."""
    usual = comm.create_comm
    comm.create_comm = Wire
    try:
        yield
    finally:
        comm.create_comm = usual


def say(widget: PatchExplorer, **message: Any) -> int:
    """Let the page say something; how many bytes it is told."""
    wire = widget.comm
    before = wire.sent
    said = json.dumps({"content": {"data": {"method": "custom", "content": message}}})
    wire.handle_msg({**json.loads(said), "buffers": []})
    return wire.sent - before


@dataclass(frozen=True)
class Clicks:
    """Clicks on cells of one organism, each of another cell.

    Attributes:
        wall, cpu: seconds from a click to its answer. On one thread, CPU time is what a core of
            its own takes; wall time is what the machine gave, which may have others to serve.
        told: bytes that the page is sent for a click, the median.
    """

    organism: str
    clicks: int
    wall: Median
    cpu: Median
    told: float

    @property
    def verdict(self) -> str:
        """Whether the goal is met on a core of its own, as far as the interval can tell."""
        return _verdict(self.cpu)

    @property
    def wall_verdict(self) -> str:
        """The same by the wall clock."""
        return _verdict(self.wall)


def _verdict(seconds: Median) -> str:
    if seconds.high <= GOAL_SECONDS:
        return "met"
    return "missed" if seconds.low > GOAL_SECONDS else "unresolved"


def clicks(name: str, count: int) -> Clicks:
    """Click every cell of pair after pair, until there were enough; the first pair warms up."""
    lens = il.load(name)
    pairs = lens.task(n=count, seed=0)
    with wired():
        widget = explore(lens, pairs)
    wall, cpu, told = [], [], []
    for pair in range(len(pairs)):
        say(widget, type="choose", changes={"pair": pair, "donor": pair})
        rows, columns = widget.session.grid.shape
        for row, column in ((r, c) for r in range(rows) for c in range(columns)):
            starts = time.perf_counter(), time.process_time()
            size = say(widget, type="run", cell=[row, column])
            spent = time.perf_counter() - starts[0], time.process_time() - starts[1]
            assert widget.status["kind"] == "done", widget.status["text"]
            assert widget.session.measured(row, column).seconds <= spent[0], "it was not run now"
            if pair:
                wall.append(spent[0])
                cpu.append(spent[1])
                told.append(size)
        if len(wall) >= count:
            break
    widget.close()
    return Clicks(name, len(wall), Median.of(wall), Median.of(cpu), Median.of(told).value)


def large() -> tuple[il.LatentModel, il.Pairs]:
    """A random Qwen2.5-VL of 28 thin layers that feeds ten latents back, and a pair for it."""
    small, processor = tiny.build("qwen2_5_vl", dtype=torch.float32)
    marks = ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")
    text = {**overhead.THIN, "num_hidden_layers": LAYERS}
    config = hf.Qwen2_5_VLConfig(
        text_config=tiny.text_config(processor.tokenizer, **text),
        vision_config={**overhead.VISION, "out_hidden_size": text["hidden_size"]},
        tie_word_embeddings=False,
        **{name: getattr(small.config, name) for name in marks},
    )
    torch.manual_seed(0)
    model = hf.Qwen2_5_VLForConditionalGeneration(config).eval()
    tokens = processor.tokenizer
    known = set(tokens.get_vocab().values()) - set(tokens.all_special_ids)
    model.generation_config = hf.GenerationConfig(
        do_sample=False, pad_token_id=tokens.pad_token_id, max_new_tokens=STEPS + 4,
        suppress_tokens=[i for i in range(config.text_config.vocab_size) if i not in known],
    )  # fmt: skip
    start, end, pad = tokens.convert_tokens_to_ids(list(tiny.LATENT))
    spec = il.LatentSpec(
        name="large", open=start, close=end, pad=pad, max_steps=STEPS, trigger="forced", fixed=True
    )
    lens = il.LatentModel(model, processor, spec=spec, answer=lambda text: (0, 1) if text else None)
    words = tiny.prompt("qwen2_5_vl", "which is it?")
    base, source = (
        {"images": tiny.image(8 * tiny.CELL, 8 * tiny.CELL, seed=seed), "text": words}
        for seed in (0, 1)
    )
    return lens, il.Pairs(base=[base], source=[source], base_answers=["a"], source_answers=["b"])


def state() -> dict[str, Any]:
    """How many bytes a notebook's file keeps of the explorer of a large map, by trait."""
    lens, pairs = large()
    with wired():
        widget = explore(lens, pairs, context="fixed")
    for metric in METRICS:
        widget.choose(metric=metric)
        found = widget.map()
    say(widget, type="run", cell=[1, 2])
    assert widget.detail["answers"], widget.status["text"]
    names = list(widget.session.metrics)
    assert widget.shape == [len(names), LAYERS, STEPS], widget.shape
    assert len(found) == LAYERS * STEPS
    assert all(
        widget.session.value(row, column, metric) is not None
        for metric in METRICS for row in range(LAYERS) for column in range(STEPS)
    )  # fmt: skip
    sizes = {name: stored(value) for name, value in widget.get_state().items()}
    total = sum(sizes.values())
    widget.close()
    return {
        "layers": LAYERS,
        "steps": STEPS,
        "metrics_measured": list(METRICS),
        "metrics_in_the_state": names,
        "bytes": total,
        "bytes_of_the_script_and_style": sizes["_esm"] + sizes["_css"],
        "bytes_of_the_numbers": sizes["z"] + sizes["mask"],
        "goal_bytes": GOAL_BYTES,
        "verdict": "met" if total < GOAL_BYTES else "missed",
    }


def stored(value: Any) -> int:
    """How many bytes a trait takes in a notebook's file: bytes are stored as base64."""
    if isinstance(value, bytes):
        return len(base64.b64encode(value))
    return len(json.dumps(value, default=str).encode("utf-8"))


def main() -> None:
    """Measure everything and write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    default = overhead.ROOT / "benchmarks" / "results" / "explorer.json"
    parser.add_argument("--out", type=Path, default=default)
    parser.add_argument("--clicks", type=int, default=24, help="at least, for each organism")
    args = parser.parse_args()
    torch.set_num_threads(1)
    found = [clicks(name, args.clicks) for name in available() if name not in SILENT]
    for c in found:
        wall, cpu = (f"{1e3 * m.value:.0f} [{1e3 * m.low:.0f}, {1e3 * m.high:.0f}]"
                     for m in (c.wall, c.cpu))  # fmt: skip
        told = f"CPU {cpu} ms: {c.verdict}; wall {wall} ms: {c.wall_verdict}"
        print(f"{c.organism}: {c.clicks} clicks, {told}")
    kept = state()
    print(f"state of {LAYERS} x {STEPS} cells: {kept['bytes']} bytes: {kept['verdict']}")
    about = {
        "date": date.today().isoformat(),
        "cpu": overhead.cpu_name(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "versions": {name: version(name) for name in PACKAGES},
        "goal_seconds": GOAL_SECONDS,
        "clicks": [
            asdict(c) | {"verdict": c.verdict, "wall_verdict": c.wall_verdict} for c in found
        ],
        "state": kept,
    }
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(about, indent=1) + "\n")


if __name__ == "__main__":
    main()
