"""What a map over layers and steps costs: the fast path against other ways to the same numbers.

    python benchmarks/sweeps.py [--out benchmarks/results/sweeps.json] [--rounds 7]

A random Qwen2.5-VL of 83 M parameters, 12 layers x 8 positions, one pair, float32, one thread. The
variants take turns within one process, and a ratio is the median over the rounds of CPU time in a
round; all of them are checked to give the same 96 numbers. README.md says what each is.
"""

import argparse
import copy
import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

os.environ["TQDM_DISABLE"] = "1"

import nnsight
import numpy as np
import overhead
import pandas as pd
import torch
import transformers as hf
from overhead import Median, tiny
from transformers import DynamicCache
from transformers.masking_utils import create_causal_mask

import imaginelens as il
from imaginelens.mediation.sweep import Chunk, Sweep, Table

STEPS, AFTER = 8, 5  # edited positions, and tokens behind them that are read again
SIZES = {94: (56, 72), 430: (160, 160)}  # positions in all, and the picture's pixels
OURS, ONE, TORCH, LENS = (
    "il.sweep", "one forward for each cell", "the same algorithm in plain torch", "TransformerLens",
)  # fmt: skip
# How many times the seconds of il.sweep a variant should take, at least.
GOALS = {(94, ONE): 12.0, (430, ONE): 30.0, (94, TORCH): 1 / 1.1, (430, TORCH): 1 / 1.1,
         (94, LENS): 10.0}  # fmt: skip
Variant = Callable[[], torch.Tensor]


@dataclass(frozen=True)
class Problem:
    """One pair of inputs as a model gets them, and the cells to patch."""

    lens: il.LatentModel
    stock: hf.PreTrainedModel
    base: dict[str, Any]
    source: dict[str, Any]
    first: int
    chunk: Chunk

    @property
    def width(self) -> int:
        """Positions in all."""
        return int(self.base["input_ids"].shape[1])

    def metric(self, logits: torch.Tensor) -> torch.Tensor:
        """The difference of the two answers' logits at the last position."""
        targets = self.chunk.targets
        source, base = targets.source_token[0], targets.base_token[0]
        return logits[:, -1, source] - logits[:, -1, base]


def problem(subject: overhead.Subject, size: tuple[int, int], width: int) -> Problem:
    """Two pictures under one question, whose last positions are 8 placeholders and 5 letters."""
    lens = subject.lens
    _, processor = tiny.build("qwen2_5_vl", dtype=torch.float32)
    lens = il.LatentModel(lens.model, processor, spec=False, answer=lambda text: text)
    lens.model.generation_config.max_new_tokens = 1
    words = set(processor.tokenizer.get_vocab().values()) - set(processor.tokenizer.all_special_ids)
    unknown = [i for i in range(lens.structure.d_vocab) if i not in words]
    lens.model.generation_config.suppress_tokens = unknown

    def example(seed: int, fill: str) -> dict[str, Any]:
        text = fill + tiny.LATENT[2] * STEPS + "it is"
        return {"images": tiny.image(*size, seed=seed), "text": tiny.prompt("qwen2_5_vl", text)}

    spare = width - lens.tokens(example(0, "")).width
    assert spare >= 0, f"the picture alone takes {width - spare} positions"
    examples = [example(seed, "?" * spare) for seed in (0, 1)]
    pairs = il.Pairs(
        base=examples[:1], source=examples[1:], base_answers=["a"], source_answers=["b"]
    )
    first = width - STEPS - AFTER
    study = Sweep(
        lens, pairs, "resid_post", [il.positions([first + k]) for k in range(STEPS)],
        il.logit_diff, "denoise", "fixed", None, False, 1, 1, True, 0, 0,
    )  # fmt: skip
    chunk = Chunk.of(study, 0)
    base, source = (
        {k: v for k, v in lens.prompt(e).inputs.items() if isinstance(v, torch.Tensor)}
        for e in examples
    )
    return Problem(lens, subject.stock, base, source, first, chunk)


def ours(of: Problem) -> Variant:
    """The cells of a chunk by the fast path: prefix, unedited rows, sham and all."""

    def run() -> torch.Tensor:
        cells = len(of.chunk.cells)
        into = Table(
            np.full((cells, 1), np.nan), np.zeros((cells, 1), dtype=np.int8),
            np.full((cells, 1), np.nan), tick=lambda share: None,
        )  # fmt: skip
        slow = of.chunk.behind_prefix(into)
        assert not slow, slow
        return torch.tensor(into.after[:, 0]).view(-1, STEPS)

    return run


def one_each(of: Problem) -> Variant:
    """One nnsight trace for each cell, all of the model in each."""
    wrapped = nnsight.NNsight(copy.copy(of.stock))
    blocks = wrapped.model.language_model.layers
    with torch.no_grad(), wrapped.trace(**of.source):
        given = nnsight.save([block.output for block in blocks])

    def run() -> torch.Tensor:
        found = torch.zeros(len(given), STEPS)
        for layer in range(len(given)):
            for step in range(STEPS):
                at = of.first + step
                with torch.no_grad(), wrapped.trace(**of.base, use_cache=False):
                    out = blocks[layer].output.clone()
                    out[:, at] = given[layer][:, at]
                    blocks[layer].output = out
                    logits = nnsight.save(wrapped.lm_head.output)
                found[layer, step] = of.metric(logits)[0]
        return found

    return run


def by_hand(of: Problem) -> Variant:
    """The same algorithm in plain torch: prefix read once, rows from the patched block on."""
    model = of.stock
    text = model.model.language_model
    config = model.config.get_text_config()
    captured: dict[str, Any] = {}
    states: list[torch.Tensor] = []
    handles = [b.register_forward_hook(lambda m, a, out: states.append(out)) for b in text.layers]
    with torch.no_grad():
        model(**of.source, use_cache=False)
    for handle in handles:
        handle.remove()
    given = [out[:, of.first : of.first + STEPS] for out in states]

    def inputs_of_decoder() -> tuple[torch.Tensor, torch.Tensor]:
        def keep(module: Any, args: Any, kwargs: dict[str, Any]) -> None:
            captured.update(kwargs)
            raise _Enough

        handle = text.register_forward_pre_hook(keep, with_kwargs=True)
        try:
            model(**of.base, use_cache=False)
        except _Enough:
            pass
        finally:
            handle.remove()
        return captured["inputs_embeds"], captured["position_ids"]

    def grown(cache: DynamicCache, rows: int, start: int) -> DynamicCache:
        new = DynamicCache(config=config)
        for layer, held in enumerate(cache.layers[start:], start):
            keys, values = (x.expand(rows, -1, -1, -1) for x in (held.keys, held.values))
            new.update(keys, values, layer)
        return new

    @torch.no_grad()
    def run() -> torch.Tensor:
        embeds, positions = inputs_of_decoder()
        cache = DynamicCache(config=config)
        text(
            inputs_embeds=embeds[:, : of.first], position_ids=positions[..., : of.first],
            past_key_values=cache, use_cache=True,
        )  # fmt: skip
        rest, at = embeds[:, of.first :], positions[..., of.first :]
        rotary = text.rotary_emb(rest, at)

        def through(x: torch.Tensor, start: int, into: list[torch.Tensor] | None) -> torch.Tensor:
            rows = len(x)
            held = grown(cache, rows, 0 if into is not None else start)
            mask = create_causal_mask(
                config=config, inputs_embeds=x, attention_mask=None,
                past_key_values=cache, position_ids=None,
            )  # fmt: skip
            for block in text.layers[start:]:
                x = block(
                    x, attention_mask=mask, position_embeddings=rotary, past_key_values=held,
                    use_cache=True,
                )  # fmt: skip
                if into is not None:
                    into.append(x)
            return x

        streams: list[torch.Tensor] = []
        through(rest, 0, streams)
        found = torch.zeros(len(given), STEPS)
        rows = torch.arange(STEPS)
        for layer in range(len(given)):
            x = streams[layer].expand(STEPS, -1, -1).clone()
            x[rows, rows] = given[layer][0]
            x = _from(through, x, layer + 1)
            found[layer] = of.metric(model.lm_head(text.norm(x[:, -1:])))
        return found

    return run


class _Enough(Exception):
    """The decoder's inputs are known."""


def _from(through: Any, x: torch.Tensor, start: int) -> torch.Tensor:
    return through(x, start, None)


def by_transformer_lens(of: Problem) -> Variant:
    """TransformerLens' own patching loop, over a bridge of a copy of the model."""
    from transformer_lens import patching
    from transformer_lens.model_bridge.sources import build_bridge_from_module
    from transformer_lens.model_bridge.supported_architectures import qwen2_5_vl

    # it asks for torchvision, which only its processor needs
    qwen2_5_vl.Qwen2_5_VLArchitectureAdapter.required_libraries = []
    model = copy.deepcopy(of.stock)
    bridge = build_bridge_from_module(model, type(model).__name__, hf_config=model.config)
    others = {k: v for k, v in of.base.items() if k != "input_ids"}
    clean = {k: v for k, v in of.source.items() if k != "input_ids"}
    names = lambda name: name.endswith("hook_resid_post")  # noqa: E731
    _, cache = bridge.run_with_cache(of.source["input_ids"], names_filter=names, **clean)

    class Bound:
        """What the loop asks of a model, with the pictures of the base in every call."""

        cfg = bridge.cfg

        def run_with_hooks(self, tokens: torch.Tensor, fwd_hooks: Any) -> torch.Tensor:
            return bridge.run_with_hooks(tokens, fwd_hooks=fwd_hooks, **others)

    cells = [(layer, of.first + k) for layer in range(bridge.cfg.n_layers) for k in range(STEPS)]
    frame = pd.DataFrame(cells, columns=["layer", "pos"])

    @torch.no_grad()
    def run() -> torch.Tensor:
        found = patching.generic_activation_patch(
            model=Bound(), corrupted_tokens=of.base["input_ids"], clean_cache=cache,
            patching_metric=lambda logits: of.metric(logits)[0],
            patch_setter=patching.layer_pos_patch_setter, activation_name="resid_post",
            index_df=frame,
        )  # fmt: skip
        return found.reshape(-1, STEPS)

    return run


@dataclass(frozen=True)
class Row:
    """One way to the 96 numbers.

    Attributes:
        seconds: CPU time of one map, the median.
        times: how many times that of `il.sweep` it is.
        goal: what `times` should be at least; None where there is none.
        off: the largest difference of a number from one forward for each cell.
    """

    positions: int
    name: str
    seconds: float
    times: Median
    goal: float | None
    off: float

    @property
    def verdict(self) -> str:
        """Whether the goal is met, as far as the interval can tell."""
        if self.goal is None:
            return ""
        if self.times.low >= self.goal:
            return "met"
        return "missed" if self.times.high < self.goal else "unresolved"


def measured(of: Problem, rounds: int) -> list[Row]:
    """Time the variants in turns, after they have been found to agree."""
    variants: dict[str, Variant] = {
        OURS: ours(of), ONE: one_each(of), TORCH: by_hand(of),
    }  # fmt: skip
    if (of.width, LENS) in GOALS:  # at 430 positions its loop takes minutes
        variants[LENS] = by_transformer_lens(of)
    numbers = {name: run() for name, run in variants.items()}
    off = {
        name: float((n.double() - numbers[ONE].double()).abs().max()) for name, n in numbers.items()
    }
    scale = float(numbers[ONE].std())
    # in float32, and random weights are hardly moved by one position of many
    assert max(off.values()) < 2e-2 * scale, f"the variants differ by {off}, of {scale}"
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    names = list(variants)
    for i in range(rounds):
        for name in names[i % len(names) :] + names[: i % len(names)]:
            start = time.process_time()
            variants[name]()
            seconds[name].append(time.process_time() - start)
    return [
        Row(
            of.width, name, statistics.median(own),
            Median.of([a / b for a, b in zip(own, seconds[OURS], strict=True)]),
            GOALS.get((of.width, name)), off[name],
        )
        for name, own in seconds.items()
    ]  # fmt: skip


def bound(of: Problem) -> float:
    """Multiply-adds that no way to the 96 numbers can do without: the unedited rows once, and for
    each cell the blocks above it at the columns from the edited one on."""
    blocks = of.lens.structure.blocks
    weights = [
        sum(p.numel() for p in of.lens.model.get_submodule(b.path).parameters()) for b in blocks
    ]
    per_block = statistics.mean(weights)
    columns = sum(of.width - (of.first + step) for step in range(STEPS))
    cells = sum(len(blocks) - 1 - layer for layer in range(len(blocks))) * columns
    return per_block * (of.width * len(blocks) + cells)


def speed() -> float:
    """Multiply-adds in a second of this core, in the largest matrix product of a block."""
    x, w = torch.randn(STEPS * (STEPS + AFTER), 768), torch.randn(2048, 768)
    for _ in range(20):
        torch.nn.functional.linear(x, w)
    start = time.process_time()
    for _ in range(200):
        torch.nn.functional.linear(x, w)
    return 200 * x.numel() * 2048 / (time.process_time() - start)


def page(rows: list[Row], shares: dict[int, float], about: dict[str, Any]) -> str:
    """The results as a table."""
    lines = [
        f"{about['model']}; {about['cpu']}, {about['threads']} thread; {about['date']}", "",
        "| positions | way | CPU time | times il.sweep | 95 % | goal | | off by |",
        "|-:|-|-:|-:|-|-:|-|-:|",
    ]  # fmt: skip
    for row in rows:
        goal = "" if row.goal is None else f"{row.goal:.2f}"
        times = row.times
        lines.append(
            f"| {row.positions} | {row.name} | {row.seconds:.2f} s | {times.value:.2f} "
            f"| {times.low:.2f}..{times.high:.2f} | {goal} | {row.verdict} | {row.off:.0e} |"
        )
    told = "; ".join(f"{share:.0%} at {width} positions" for width, share in shares.items())
    return "\n".join([*lines, "", f"Share of the multiply-add bound: {told}.", ""])


def main() -> None:
    """Measure everything and write the JSON, with a markdown table beside it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    default = overhead.ROOT / "benchmarks" / "results" / "sweeps.json"
    parser.add_argument("--out", type=Path, default=default)
    parser.add_argument("--rounds", type=int, default=7, help="of 94 positions; half for 430")
    parser.add_argument("--positions", type=int, nargs="*", default=list(SIZES))
    args = parser.parse_args()
    torch.set_num_threads(1)
    wide, _ = overhead.subjects()
    rows: list[Row] = []
    shares: dict[int, float] = {}
    for width in args.positions:
        of = problem(wide, SIZES[width], width)
        rows += measured(of, args.rounds if width < 100 else max(3, args.rounds // 2))
        shares[width] = bound(of) / speed() / next(r.seconds for r in rows if r.positions == width)
    about = {
        "date": date.today().isoformat(),
        "cpu": overhead.cpu_name(),
        "threads": torch.get_num_threads(),
        "model": "random Qwen2.5-VL of 83 M parameters, float32, 12 layers x 8 positions, one pair",
        "python": platform.python_version(),
        "versions": {n: version(n) for n in (*overhead.PACKAGES, "transformer-lens")},
    }
    found = [asdict(row) | {"verdict": row.verdict} for row in rows]
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(
        json.dumps({**about, "share of the bound": shares, "rows": found}, indent=1) + "\n"
    )
    args.out.with_suffix(".md").write_text(page(rows, shares, about))
    print(page(rows, shares, about))


if __name__ == "__main__":
    main()
