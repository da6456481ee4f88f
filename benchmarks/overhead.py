"""What the library costs: ratios to the same work in plain transformers and nnsight, on a CPU.

    python benchmarks/overhead.py [--out benchmarks/results/overhead.json] [--rounds 120]

Each group of variants takes turns within one process, on one thread. A ratio is the median over the
rounds of CPU time against the group's first variant in the same round, so that a machine which is
slow for a while is slow for both. The same is done on a thin twin of the model, with as many
modules and steps but little arithmetic, where the fixed cost of a call stands out of the noise.
README.md says what each ratio means.
"""

import argparse
import copy
import json
import math
import platform
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import transformers as hf

import imaginelens as il

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tests"))
import tiny  # noqa: E402  the tokenizer and processor of the tests

TEXT = {
    "hidden_size": 768,
    "intermediate_size": 2048,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "num_key_value_heads": 4,
    "vocab_size": 4000,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [8, 12, 12]},
}
THIN = {
    **TEXT,
    "hidden_size": 48,
    "intermediate_size": 64,
    "vocab_size": 400,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [0, 1, 1]},
}
VISION = {
    "depth": 4,
    "hidden_size": 128,
    "num_heads": 4,
    "intermediate_size": 256,
    "patch_size": tiny.CELL // 2,
    "window_size": 2 * tiny.CELL,
    "fullatt_block_indexes": [3],
}
NEW_TOKENS = 24
LATENTS = 8
TWIN = "thin twin"
AGAIN = "the same again"  # the control: what differs from 1 is noise
SITE = "blocks.6.hook_resid_post"
EDITED, HOOKED = "run_with_hooks, one edit", "run, one hook at every step"
IMPORTED, USED = "import imaginelens", "imaginelens.LatentModel"
GOALS = {EDITED: 1.03, HOOKED: 1.15, IMPORTED: 1.1, USED: 1.1}
PACKAGES = ("imaginelens", "torch", "transformers", "nnsight")

Variants = Mapping[str, Callable[[], Any]]


@dataclass(frozen=True)
class Median:
    """A median over rounds and its distribution-free 95 % interval."""

    value: float
    low: float
    high: float

    @classmethod
    def of(cls, values: list[float]) -> "Median":
        """Order statistics: at least 95 % of binomials(n, 1/2) lie between the two ranks."""
        ordered = sorted(values)
        rank = max(0, math.floor(len(ordered) / 2 - 0.98 * math.sqrt(len(ordered))))
        return cls(statistics.median(ordered), ordered[rank], ordered[-1 - rank])


@dataclass(frozen=True)
class Cost:
    """One variant against the first of its group.

    Attributes:
        seconds: CPU time of one call, the median.
        extra: seconds more than the group's first, in the same round.
        ratio: to the group's first, in the same round.
        goal: what the ratio should stay below; None where there is none.
    """

    group: str
    name: str
    seconds: float
    extra: Median
    ratio: Median
    goal: float | None

    @property
    def verdict(self) -> str:
        """Whether the goal is met, as far as the interval can tell."""
        if self.goal is None:
            return ""
        if self.ratio.high <= self.goal:
            return "met"
        return "missed" if self.ratio.low > self.goal else "unresolved"


def compare(
    group: str, variants: Variants, rounds: int, clock: Callable[[], float] = time.process_time
) -> list[Cost]:
    """Time the variants in turns; the first one is what the others are compared to."""
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    names = list(variants)
    for i in range(-1, rounds):  # round -1 warms up
        for name in names[i % len(names) :] + names[: i % len(names)]:
            start = clock()
            variants[name]()
            if i >= 0:
                seconds[name].append(clock() - start)
    first = seconds[names[0]]
    return [
        Cost(
            group,
            name,
            statistics.median(own),
            Median.of([a - b for a, b in zip(own, first, strict=True)]),
            Median.of([a / b for a, b in zip(own, first, strict=True)]),
            None if group.endswith(TWIN) else GOALS.get(name),
        )
        for name, own in seconds.items()
    ]


def projected(twin: list[Cost], wide: list[Cost]) -> list[Cost]:
    """The twin's extra seconds on top of the wide model's plain ones: an estimate, without a goal.

    It leaves out whatever grows with the width.
    """
    plain = wide[0].seconds

    def on_top(cost: Cost) -> Median:
        extra = cost.extra
        return Median(*(1 + part / plain for part in (extra.value, extra.low, extra.high)))

    group = f"{wide[0].group}, projected"
    return [
        replace(
            cost,
            group=group,
            seconds=plain + cost.extra.value,
            ratio=on_top(cost),
        )
        for cost in twin[2:]
    ]


@dataclass(frozen=True)
class Subject:
    """A model to measure on, twice: as it is and wrapped; the weights are shared."""

    size: str
    stock: hf.PreTrainedModel
    lens: il.LatentModel
    inputs: dict[str, torch.Tensor]


def subjects() -> list[Subject]:
    """A random Qwen2.5-VL of 83 M parameters and its thin twin; neither stops by itself."""
    small, processor = tiny.build("qwen2_5_vl", dtype=torch.float32)
    marks = ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")
    picture = tiny.image(8 * tiny.CELL, 8 * tiny.CELL, seed=0)
    inputs = tiny.inputs("qwen2_5_vl", processor, ["what is this?"], [picture], torch.float32)
    # A latent family that opens no span unless it is forced to: no special token is ever sampled.
    start, end, pad = processor.tokenizer.convert_tokens_to_ids(list(tiny.LATENT))
    spec = il.LatentSpec(name="benchmark", open=start, close=end, pad=pad, max_steps=LATENTS)
    found = []
    for size, text in (("83 M", TEXT), (TWIN, THIN)):
        config = hf.Qwen2_5_VLConfig(
            text_config=tiny.text_config(processor.tokenizer, **text),
            vision_config={**VISION, "out_hidden_size": text["hidden_size"]},
            tie_word_embeddings=False,
            **{name: getattr(small.config, name) for name in marks},
        )
        torch.manual_seed(0)
        model = hf.Qwen2_5_VLForConditionalGeneration(config).eval()
        model.generation_config = hf.GenerationConfig(
            do_sample=False,
            pad_token_id=processor.tokenizer.pad_token_id,
            suppress_tokens=processor.tokenizer.all_special_ids,
        )
        # nnsight wraps each module, so the copy is made first.
        stock = copy.deepcopy(model, {id(p): p for p in model.parameters()})
        found.append(Subject(size, stock, il.LatentModel(model, spec=spec), inputs))
    return found


def at_last(act: torch.Tensor, hook: Any) -> torch.Tensor:
    """Edit one position: the last, which every step of a generation has."""
    act = act.clone()
    act[:, -1] *= 0.9
    return act


def forward(subject: Subject, rounds: int) -> list[Cost]:
    """One forward: plain, with an edit, with states kept."""
    stock, lens, inputs = subject.stock, subject.lens, subject.inputs
    edit = [(SITE, at_last)]
    every = "blocks.*.hook_resid_post"
    variants: Variants = {
        "model(**inputs)": lambda: stock(**inputs, use_cache=False).logits,
        AGAIN: lambda: stock(**inputs, use_cache=False).logits,
        "run_with_hooks, nothing": lambda: lens.run_with_hooks(inputs),
        EDITED: lambda: lens.run_with_hooks(inputs, fwd_hooks=edit),
        "run_with_cache, one site": lambda: lens.run_with_cache(inputs, names_filter=SITE),
        "run_with_cache, every resid_post": lambda: lens.run_with_cache(inputs, names_filter=every),
    }
    plain, _, nothing, edited, *_ = (variant() for variant in variants.values())
    assert torch.equal(plain, nothing), "a run without hooks is not the plain forward"
    assert not torch.equal(plain, edited), "the edit did nothing"
    return compare(f"forward, {subject.size}", variants, rounds)


def generation(subject: Subject, rounds: int) -> list[Cost]:
    """The same number of greedy steps: stock, through the loop, hooked, with a latent span."""
    stock, lens, inputs = subject.stock, subject.lens, subject.inputs

    def run(**options: Any) -> il.Run:
        return lens.run(inputs, max_new_tokens=NEW_TOKENS, **options)

    def hooked() -> il.Run:
        with lens.hooks([(SITE, at_last)]):
            return run()

    force = il.Force(LATENTS, at=2)
    donor = run(latents=force)

    def swapped() -> il.Run:
        with lens.edit(il.Replace(donor.latents[0, 0] * 0.5), at=il.latent):
            return run(latents=force)

    variants: Variants = {
        "model.generate": lambda: stock.generate(**inputs, max_new_tokens=NEW_TOKENS),
        AGAIN: lambda: stock.generate(**inputs, max_new_tokens=NEW_TOKENS),
        "run": run,
        HOOKED: hooked,
        f"run, {LATENTS} latents": lambda: run(latents=force),
        f"run, {LATENTS} latents, each edited": swapped,
    }
    plain = run()
    assert torch.equal(variants["model.generate"](), plain.sequences), (
        "a run without hooks is not stock generation"
    )
    assert donor.latents.shape[1] == LATENTS, f"the span has {donor.latents.shape[1]} latents"
    assert hooked().forwards == plain.forwards == donor.forwards == NEW_TOKENS
    return compare(f"generate, {subject.size}", variants, rounds)


def imports(rounds: int) -> list[Cost]:
    """`import` in fresh interpreters; the clock is the CPU time of child processes."""

    def clock() -> float:
        used = resource.getrusage(resource.RUSAGE_CHILDREN)
        return used.ru_utime + used.ru_stime

    def fresh(code: str) -> Callable[[], Any]:
        return lambda: subprocess.run([sys.executable, "-c", code], check=True)

    use = "import imaginelens; imaginelens.LatentModel"
    need = "import nnsight, transformers; transformers.PreTrainedModel"
    bare = {code: fresh(code) for code in ("import nnsight", IMPORTED)}
    used = {"nnsight and a transformers model": fresh(need), USED: fresh(use)}
    return [
        *compare("import", bare, rounds, clock),
        *compare("import, in use", used, rounds, clock),
    ]


def table(costs: list[Cost], about: Mapping[str, Any]) -> str:
    """The results as a page."""
    versions = ", ".join(f"{name} {v}" for name, v in about["versions"].items())
    lines = [
        f"# Overhead, {about['date']}",
        "",
        f"{about['cpu']}, {about['threads']} thread; {about['model']}; {versions}. CPU time; "
        "medians over rounds with 95 % intervals, against the first line of the group.",
        "",
        "| group | variant | ratio | 95 % | per call | extra | goal | |",
        "|-|-|-:|-|-:|-:|-:|-|",
    ]
    for c in costs:
        goal = "" if c.goal is None else f"{c.goal:.2f}"
        ratio = c.ratio
        lines.append(
            f"| {c.group} | `{c.name}` | {ratio.value:.3f} | {ratio.low:.3f}..{ratio.high:.3f} "
            f"| {1e3 * c.seconds:.1f} ms | {1e3 * c.extra.value:+.1f} ms | {goal} | {c.verdict} |"
        )
    return "\n".join(lines) + "\n"


def cpu_name() -> str:
    """The processor's model name, and nothing that tells one machine from another."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def main() -> None:
    """Measure everything and write the JSON, with a markdown table beside it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    default = ROOT / "benchmarks" / "results" / "overhead.json"
    parser.add_argument("--out", type=Path, default=default)
    parser.add_argument("--rounds", type=int, default=120, help="of forwards; a sixth for the rest")
    args = parser.parse_args()
    torch.set_num_threads(1)
    many, few = args.rounds, max(5, args.rounds // 6)
    wide, thin = subjects()
    with torch.no_grad():
        groups = [
            (forward(wide, many), forward(thin, 2 * many)),
            (generation(wide, few), generation(thin, 2 * few)),
        ]
    costs = [c for of_wide, twin in groups for c in (*of_wide, *twin, *projected(twin, of_wide))]
    costs += imports(min(few, 7))
    about = {
        "date": date.today().isoformat(),
        "cpu": cpu_name(),
        "threads": torch.get_num_threads(),
        "model": f"random Qwen2.5-VL of 83 M parameters, float32, prompt of "
        f"{wide.inputs['input_ids'].shape[1]} tokens, {NEW_TOKENS} new tokens",
        "python": platform.python_version(),
        "versions": {name: version(name) for name in PACKAGES},
    }
    page = table(costs, about)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    results = [asdict(c) | {"verdict": c.verdict} for c in costs]
    args.out.write_text(json.dumps({**about, "costs": results}, indent=1) + "\n")
    args.out.with_suffix(".md").write_text(page)
    print(page)


if __name__ == "__main__":
    main()
