"""What the library costs: ratios to the same work in plain transformers and nnsight, on a CPU.

    python benchmarks/overhead.py [--out benchmarks/results/overhead.json] [--rounds 15]

Each group of variants takes turns within one process, on one thread. A ratio is the median over the
rounds of CPU time against the group's first variant in the same round, so that a machine which is
slow for a while is slow for both. README.md says what each ratio means.
"""

import argparse
import copy
import json
import platform
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
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
VISION = {
    "depth": 4,
    "hidden_size": 128,
    "num_heads": 4,
    "intermediate_size": 256,
    "out_hidden_size": 768,
    "patch_size": tiny.CELL // 2,
    "window_size": 2 * tiny.CELL,
    "fullatt_block_indexes": [3],
}
NEW_TOKENS = 24
LATENTS = 8
SITE = "blocks.1.hook_resid_post"
PACKAGES = ("imaginelens", "torch", "transformers", "nnsight")

Variants = Mapping[str, Callable[[], Any]]


@dataclass(frozen=True)
class Ratio:
    """One variant against the first of its group.

    Attributes:
        ratio, low, high: median and quartiles over the rounds.
        seconds: CPU time of one call, the median.
        extra: seconds more than the group's first, the median over the rounds.
        goal: what the ratio should stay below; None where there is none.
    """

    group: str
    name: str
    ratio: float
    low: float
    high: float
    seconds: float
    extra: float
    goal: float | None

    @property
    def verdict(self) -> str:
        """Whether the goal is met."""
        return "" if self.goal is None else "met" if self.ratio <= self.goal else "missed"


def compare(
    group: str,
    variants: Variants,
    goals: Mapping[str, float],
    rounds: int,
    clock: Callable[[], float] = time.process_time,
) -> list[Ratio]:
    """Time the variants in turns; the first one is what the others are compared to."""
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    names = list(variants)
    for i in range(-1, rounds):  # round -1 warms up
        for name in names[i % len(names) :] + names[: i % len(names)]:
            start = clock()
            variants[name]()
            if i >= 0:
                seconds[name].append(clock() - start)
    plain = seconds[names[0]]
    found = []
    for name, own in seconds.items():
        ratios = [a / b for a, b in zip(own, plain, strict=True)]
        low, middle, high = statistics.quantiles(ratios, n=4)
        extra = statistics.median(a - b for a, b in zip(own, plain, strict=True))
        took = statistics.median(own)
        found.append(Ratio(group, name, middle, low, high, took, extra, goals.get(name)))
    return found


@dataclass(frozen=True)
class Subject:
    """A model to measure on, twice: as it is and wrapped; the weights are shared."""

    size: str
    stock: hf.PreTrainedModel
    lens: il.LatentModel
    inputs: dict[str, torch.Tensor]


def subjects() -> list[Subject]:
    """Two random Qwen2.5-VL of 83 M and 0.2 M parameters, which never stop by themselves.

    The small one is that of the tests: nearly all its time is overhead, so that the fixed cost of
    a call stands out of the noise.
    """
    small, processor = tiny.fresh("qwen2_5_vl", dtype=torch.float32)
    marks = ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")
    config = hf.Qwen2_5_VLConfig(
        text_config=tiny.text_config(processor.tokenizer, **TEXT),
        vision_config=VISION,
        tie_word_embeddings=False,
        **{name: getattr(small.config, name) for name in marks},
    )
    torch.manual_seed(0)
    wide = hf.Qwen2_5_VLForConditionalGeneration(config).eval()
    picture = tiny.image(8 * tiny.CELL, 8 * tiny.CELL, seed=0)
    inputs = tiny.inputs("qwen2_5_vl", processor, ["what is this?"], [picture], torch.float32)
    # A latent family that opens no span unless it is forced to: no special token is ever sampled.
    start, end, pad = processor.tokenizer.convert_tokens_to_ids(list(tiny.LATENT))
    spec = il.LatentSpec(name="benchmark", open=start, close=end, pad=pad, max_steps=LATENTS)
    found = []
    for size, model in (("83 M", wide), ("0.2 M", small)):
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


def forward(subject: Subject, rounds: int) -> list[Ratio]:
    """One forward: plain, with an edit, with states kept."""
    stock, lens, inputs = subject.stock, subject.lens, subject.inputs
    edit = [(SITE, at_last)]
    every = "blocks.*.hook_resid_post"
    variants: Variants = {
        "model(**inputs)": lambda: stock(**inputs, use_cache=False).logits,
        "run_with_hooks, nothing": lambda: lens.run_with_hooks(inputs),
        "run_with_hooks, one edit": lambda: lens.run_with_hooks(inputs, fwd_hooks=edit),
        "run_with_cache, one site": lambda: lens.run_with_cache(inputs, names_filter=SITE),
        "run_with_cache, every resid_post": lambda: lens.run_with_cache(inputs, names_filter=every),
    }
    plain, nothing, edited, *_ = (variant() for variant in variants.values())
    assert torch.equal(plain, nothing), "a run without hooks is not the plain forward"
    assert not torch.equal(plain, edited), "the edit did nothing"
    goals = {"run_with_hooks, one edit": 1.03} if subject.size == "83 M" else {}
    return compare(f"forward, {subject.size}", variants, goals, rounds)


def generation(subject: Subject, rounds: int) -> list[Ratio]:
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
        "run": run,
        "run, one hook at every step": hooked,
        f"run, {LATENTS} latents": lambda: run(latents=force),
        f"run, {LATENTS} latents, each edited": swapped,
    }
    plain = run()
    assert torch.equal(variants["model.generate"](), plain.sequences), (
        "a run without hooks is not stock generation"
    )
    assert donor.latents.shape[1] == LATENTS, f"the span has {donor.latents.shape[1]} latents"
    assert hooked().forwards == plain.forwards == donor.forwards == NEW_TOKENS
    goals = {"run, one hook at every step": 1.15} if subject.size == "83 M" else {}
    return compare(f"generate, {subject.size}", variants, goals, rounds)


def imports(rounds: int) -> list[Ratio]:
    """`import` in fresh interpreters; the clock is the CPU time of child processes."""

    def clock() -> float:
        used = resource.getrusage(resource.RUSAGE_CHILDREN)
        return used.ru_utime + used.ru_stime

    def fresh(code: str) -> Callable[[], Any]:
        return lambda: subprocess.run([sys.executable, "-c", code], check=True)

    use = "import imaginelens; imaginelens.LatentModel"
    need = "import nnsight, transformers; transformers.PreTrainedModel"
    bare = {code: fresh(code) for code in ("import nnsight", "import imaginelens")}
    used = {"nnsight and a transformers model": fresh(need), "imaginelens.LatentModel": fresh(use)}
    return [
        *compare("import", bare, {"import imaginelens": 1.1}, rounds, clock),
        *compare("import, in use", used, {"imaginelens.LatentModel": 1.1}, rounds, clock),
    ]


def table(ratios: list[Ratio], about: Mapping[str, Any]) -> str:
    """The results as a page."""
    lines = [
        f"# Overhead, {about['date']}",
        "",
        f"{about['cpu']}, {about['threads']} thread; {about['model']}; "
        + ", ".join(f"{name} {v}" for name, v in about["versions"].items())
        + ". CPU time; ratio: median over rounds (quartiles) against the first line of the group.",
        "",
        "| group | variant | ratio | quartiles | per call | extra | goal | |",
        "|-|-|-:|-|-:|-:|-:|-|",
    ]
    for r in ratios:
        goal = "" if r.goal is None else f"{r.goal:.2f}"
        lines.append(
            f"| {r.group} | `{r.name}` | {r.ratio:.3f} | {r.low:.3f}..{r.high:.3f} "
            f"| {1e3 * r.seconds:.1f} ms | {1e3 * r.extra:+.1f} ms | {goal} | {r.verdict} |"
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
    parser.add_argument("--rounds", type=int, default=15, help="of forwards; half of the rest")
    args = parser.parse_args()
    torch.set_num_threads(1)
    few = max(3, args.rounds // 2)
    ratios = []
    with torch.no_grad():
        for subject in subjects():
            ratios += forward(subject, args.rounds)
            ratios += generation(subject, few)
    ratios += imports(few)
    about = {
        "date": date.today().isoformat(),
        "cpu": cpu_name(),
        "threads": torch.get_num_threads(),
        "model": "random Qwen2.5-VL of 83 M and 0.2 M parameters, float32, prompt of 85 tokens, "
        f"{NEW_TOKENS} new tokens",
        "python": platform.python_version(),
        "versions": {name: version(name) for name in PACKAGES},
    }
    page = table(ratios, about)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    results = [asdict(r) for r in ratios]
    args.out.write_text(json.dumps({**about, "ratios": results}, indent=1) + "\n")
    args.out.with_suffix(".md").write_text(page)
    print(page)


if __name__ == "__main__":
    main()
