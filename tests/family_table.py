"""The table of families: how far each one's loop, and its folder on disk, is from its reference.

`python tests/family_table.py` measures and prints; `--write` merges the rows, by family, into
benchmarks/results/families.json. Each row is what the parity tests compute, on their tiny random
models in float64, for single runs and batches.
"""

import argparse
import json
import math
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE / "hooks")]

import conftest  # noqa: E402, F401  no network, one thread
import test_families as vision  # noqa: E402
import test_huginn as deep  # noqa: E402
import test_insertion as put_in  # noqa: E402
import test_prompt_families as prompted  # noqa: E402
import test_sketchpad as sketched  # noqa: E402
import test_vocab_families as spoken  # noqa: E402
import tiny  # noqa: E402
import torch  # noqa: E402

import imaginelens as il  # noqa: E402
from imaginelens.hooks.families import FAMILIES  # noqa: E402

OUT = HERE.parent / "benchmarks" / "results" / "families.json"
Pair = tuple[il.Run, Any, int]  # a run, the trace of its reference, the row


@dataclass(frozen=True)
class Measured:
    """One row of the table.

    Attributes:
        tokens_equal: whether every id, and every place of a latent, is that of the reference.
        latent_error: the largest difference of any latent, in families that recur in depth of any
            state along it; infinite where they do not pair up.
        folder_error: the same for a model opened from a folder as training leaves it.
    """

    family: str
    kind: str
    tokens_equal: bool
    latent_error: float
    folder_error: float
    source: str
    note: str


# ---- comparing ---------------------------------------------------------------------------------


def compared(pairs: Iterator[Pair]) -> tuple[bool, float]:
    """Whether all ids and places agree, and the largest difference of any latent."""
    equal, worst = True, 0.0
    for run, trace, row in pairs:
        start = run.tokens.start(row) if hasattr(trace, "ids") else run.tokens.prompt_width
        ids = trace.ids if hasattr(trace, "ids") else trace.written
        places = sorted(trace.fed)
        same = run.sequences[row, start : start + len(ids)].tolist() == ids
        same &= (il.latent.resolve(run.tokens, row) - start).tolist() == places
        equal &= same
        if not same:
            worst = math.inf
        elif places:
            found = run.latents[row, : len(places)] - trace.latents
            worst = max(worst, float(found.abs().max()))
        elif getattr(trace, "states", None):
            worst = max(worst, deep.error_of(run, trace, row))
    return equal, worst


# ---- the families that a sampled token opens -----------------------------------------------------

PLANS = ("cap", "first token", "early close", "close at once", "two spans", "eos inside")
BATCH = [{1: "open", 3: "close", 5: "open"}, {3: "open", 5: "eos", 10: "eos"}, {}]
KINDS = {"swimbird": "qwen3_vl"}


def lens_of(spec: il.LatentSpec) -> il.LatentModel:
    return vision.lens_of(spec, kind=KINDS.get(spec.name, "qwen2_5_vl"))


def sampled(name: str) -> Iterator[Pair]:
    lens = lens_of(FAMILIES[name].with_steps(vision.CAPS[name]))
    loop, limit = vision.LOOPS[name], vision.MAX_NEW
    for plan in (vision.PLANS[p] for p in PLANS):
        run = vision.planned(lens, vision.example(), [plan], limit)
        yield run, vision.judged(lens, vision.example(), plan, limit, loop), 0
    given = [vision.example(i) for i in range(3)]
    batch = vision.planned(lens, given, BATCH, limit)
    for row, one in enumerate(given):
        yield batch, vision.judged(lens, one, BATCH[row], limit, loop), row


def sampled_folder(name: str, folder: Path) -> Iterator[Pair]:
    base = {"monet-vllm": "monet", "mirage-release": "mirage"}.get(name, name)
    kind = KINDS.get(name, "qwen2_5_vl")
    vision.write(folder, vision.strings_of(name), vision.keys_of(base), legacy=not KINDS.get(name),
                 kind=kind)  # fmt: skip
    told = name in ("monet", "lvr", "skila", "swimbird")
    lens = il.load(folder, dtype=torch.float64, spec=None if told else FAMILIES[name])
    steps = lens.spec.max_steps
    run = vision.planned(lens, vision.example(), [{1: "open"}], steps + 5)
    loop = vision.loop_of(name, steps)
    yield run, vision.judged(lens, vision.example(), {1: "open"}, steps + 5, loop), 0


def learned_end(lens: il.LatentModel, target: torch.Tensor) -> Iterator[Pair]:
    """LVR's learned end: alone and in a batch, with a span that the cap ends."""
    loop = vision.partial(
        vision.loops.lvr_latent_end, lvr_latent_end_emb=target, lvr_end_threshold=0.02,
        lvr_max_steps=lens.spec.max_steps,
    )  # fmt: skip
    plans: list[dict[int, str]] = [{1: "open", 9: "open"}, {2: "open"}, {}]
    given = [vision.example(i) for i in range(3)]
    for some, row0 in (([given[0]], 0), (given, 0)):
        run = vision.planned(lens, some, plans[: len(some)], vision.MAX_NEW)
        for row in range(row0, len(some)):
            yield run, vision.judged(lens, some[row], plans[row], vision.MAX_NEW, loop), row


def an_end() -> torch.Tensor:
    free = vision.planned(
        lens_of(FAMILIES["lvr"].with_steps(6)), vision.example(), [{1: "open"}], vision.MAX_NEW
    )
    return free.latents[0, 3]


def ended() -> Iterator[Pair]:
    target = an_end()
    spec = FAMILIES["lvr-latent-end"].with_steps(6)
    near = vision.heads.NearTo(target, 0.02)
    yield from learned_end(lens_of(replace(spec, criterion=near)), target)


def ended_folder(folder: Path) -> Iterator[Pair]:
    target = an_end()
    keys = vision.keys_of("lvr") | {"latent_end_token": True}
    extras = {"lvr_latent_end_emb": target}
    vision.write(folder, vision.LVR_STRINGS, keys, extras=extras, legacy=True, shards=3)
    lens = il.load(folder, dtype=torch.float64)
    assert lens.spec.name == "lvr-latent-end"
    yield from learned_end(lens, target)


# ---- the others ----------------------------------------------------------------------------------


def coconut_pairs(lens: il.LatentModel, n: int) -> Iterator[Pair]:
    given = [prompted.question(i, n=n - i) for i in range(3)]
    for some in (given[:1], given):
        run = lens.run(some, max_new_tokens=prompted.MAX_NEW)
        for row, one in enumerate(some):
            yield run, prompted.coconut_trace(lens, one), row


def coconut(name: str) -> Iterator[Pair]:
    for kind in ("gpt2", "llama"):
        yield from coconut_pairs(prompted.coconut_lens(kind, name), FAMILIES[name].max_steps)


def coconut_folder(name: str, folder: Path) -> Iterator[Pair]:
    prompted.write(folder, prompted.built("gpt2", prompted.COCONUT), prefix="base_causallm.")
    lens = il.load(folder, spec=None if name == "coconut" else FAMILIES[name])
    yield from coconut_pairs(lens, FAMILIES[name].max_steps)


def codi_pairs(lens: il.LatentModel) -> Iterator[Pair]:
    given = [{"text": text} for text in prompted.TEXTS]
    for some in (given[:1], given):
        run = lens.run(some, max_new_tokens=prompted.CODI_NEW)
        for row, one in enumerate(some):
            yield run, prompted.codi_trace(lens, one, max_new=prompted.CODI_NEW), row


def codi() -> Iterator[Pair]:
    for kind in ("gpt2", "llama"):
        yield from codi_pairs(prompted.codi_lens(kind))


def codi_folder(folder: Path) -> Iterator[Pair]:
    made = prompted.built("gpt2", ("<a>", "<b>", "<c>"), 3)
    prompted.write(folder, made, prefix="codi.", extras=prompted.prj_weights())
    yield from codi_pairs(il.load(folder))


def soft_pairs(lens: il.LatentModel, given: list[Any]) -> Iterator[Pair]:
    plans: list[dict[int, str]] = [{}, {3: "close"}, {2: "eos", 5: "close"}]
    for plan in plans:
        for some in (given[:1], given):
            run, traces = prompted.thought(lens, some, plan)
            for row, trace in enumerate(traces):
                yield run, trace, row


def pictured(texts: tuple[str, ...]) -> list[Any]:
    return [
        {"images": tiny.image(48, 32, seed=i), "text": tiny.prompt("qwen2_5_vl", text)}
        for i, text in enumerate(texts)
    ]


def soft() -> Iterator[Pair]:
    yield from soft_pairs(prompted.soft_lens("llama"), [{"text": t} for t in prompted.TEXTS])
    yield from soft_pairs(prompted.soft_lens("qwen2_5_vl"), pictured(prompted.TEXTS))


def soft_folder(folder: Path) -> Iterator[Pair]:
    prompted.write(folder, prompted.built("llama", prompted.THINK))
    lens = il.load(folder, spec=FAMILIES["soft-thinking"])
    yield from soft_pairs(lens, [{"text": t} for t in prompted.TEXTS])


def free_pairs(lens: il.LatentModel, kind: str) -> Iterator[Pair]:
    given, z = [prompted.free_prompt(kind, i) for i in range(2)], prompted.vectors(2)
    for some in (given[:1], given):
        with lens.edit(il.Replace(z), at=il.latent):
            run = lens.run(some, max_new_tokens=prompted.MAX_NEW)
        for row, one in enumerate(some):
            yield run, prompted.dmlr_trace(lens, one, z), row


def free() -> Iterator[Pair]:
    for kind in ("llama", "llava", "qwen2_5_vl"):
        yield from free_pairs(prompted.dmlr_lens(kind), kind)


def free_folder(folder: Path) -> Iterator[Pair]:
    prompted.write_vlm(folder, prompted.DMLR)
    lens = il.load(folder, spec=FAMILIES["dmlr"], dtype=torch.float64)
    yield from free_pairs(lens, "qwen2_5_vl")


def written(name: str) -> Iterator[Pair]:
    for kind in ("qwen2_5_vl", "qwen3_vl"):
        yield from spoken.measured(spoken.lens_of(name, kind))


def written_folder(name: str, folder: Path) -> Iterator[Pair]:
    spoken.write(folder, FAMILIES[name].strings, spoken.KEYS[name])
    yield from spoken.measured(il.load(folder, dtype=torch.float64))


def drawn(lens: il.LatentModel) -> Iterator[Pair]:
    """Spans that a cue or a sampled token opens: alone, and in a batch of other grids."""
    for plan in sketched.PLANS.values():
        run = sketched.planned(lens, sketched.example(), [plan])
        yield run, sketched.judged(lens, sketched.example(), plan), 0
    given = [sketched.example(i) for i in range(3)]
    plans = [sketched.PLANS[p] for p in ("two spans", "cue", "never")]
    run = sketched.planned(lens, given, plans)
    for row, one in enumerate(given):
        yield run, sketched.judged(lens, one, plans[row]), row


def drawn_folder(folder: Path) -> Iterator[Pair]:
    yield from drawn(sketched.opened(folder))


def recurring_folder(folder: Path) -> Iterator[Pair]:
    deep.write(folder)
    yield from deep.measured(deep.opened(folder))


def again(lens: il.LatentModel) -> Iterator[Pair]:
    """Alone, with words behind the placeholders, and in a batch."""
    given = [
        put_in.example(0),
        put_in.example(1, n=1, behind=" and more"),
        put_in.example(2, n=0),
        put_in.example(2, behind=" so?"),
    ]
    for some in (*([one] for one in given), given):
        run = lens.run(some, max_new_tokens=put_in.MAX_NEW)
        for row, one in enumerate(some):
            yield run, put_in.judged(lens, one), row


# ---- the table -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Check:
    """How a family is measured, and where its loop was read."""

    loop: Callable[[], Iterator[Pair]]
    folder: Callable[[Path], Iterator[Pair]]
    source: str
    note: str = ""


def _written(name: str, source: str, note: str = "") -> Check:
    return Check(lambda: written(name), lambda folder: written_folder(name, folder), source, note)


def _sampled(name: str, source: str, note: str = "") -> Check:
    return Check(lambda: sampled(name), lambda folder: sampled_folder(name, folder), source, note)


_BY_NAME = "chosen by name"
CHECKS: dict[str, Check] = {
    "monet": _sampled(
        "monet",
        "NOVAglow646/Monet src/monet_qwen_model/modeling_qwen2_5_vl_monet.py:1904-1926; "
        "Michael4933/CapImagine README",
        "an open token inside a span restarts its count",
    ),
    "monet-vllm": _sampled(
        "monet-vllm",
        "NOVAglow646/Monet inference/vllm/monet_gpu_model_runner.py:1434-1463, 1641-1667",
        _BY_NAME,
    ),
    "lvr": _sampled("lvr", "VincentLeebang/lvr src/model/qwen_lvr_model.py:855, 1027-1049"),
    "lvr-latent-end": Check(
        ended, ended_folder, "VincentLeebang/lvr src/model/qwen_lvr_model.py:583",
        "told by the weight lvr_latent_end_emb",
    ),
    "mirage": _sampled(
        "mirage",
        "UMass-Embodied-AGI/Mirage transformers/src/transformers/generation/utils.py:3286-3450",
        "shares all tokens with ilvr: by Hub id or by name",
    ),
    "mirage-release": _sampled(
        "mirage-release",
        "UMass-Embodied-AGI/Mirage transformers/src/transformers/generation/utils.py:3286-3450",
        f"{_BY_NAME}; a second span never ends, as released",
    ),
    "ilvr": _sampled(
        "ilvr",
        "XD111ds/ILVR transformers/src/transformers/generation/utils.py:3380-3404",
        "shares all tokens with mirage: by Hub id or by name",
    ),
    "skila": _sampled("skila", "TungChintao/SkiLa src/model/skila.py:122-213"),
    "swimbird": _sampled(
        "swimbird", "Accio-Lab/SwimBird src/model/swimbird.py:117-230", "on Qwen3-VL"
    ),
    "coconut": Check(
        lambda: coconut("coconut"), lambda folder: coconut_folder("coconut", folder),
        "facebookresearch/coconut coconut.py:96-156",
        "released at batch size one, as pickles, which are not read; safetensors with or without "
        "the names of the wrapping module",
    ),
    "sim-cot": Check(
        lambda: coconut("sim-cot"), lambda folder: coconut_folder("sim-cot", folder),
        "InternLM/SIM-CoT Coconut/coconut.py",
        f"{_BY_NAME} or imaginelens_family, for its tokens are Coconut's; its CODI variant is codi",
    ),
    "ivt-lr": Check(
        lambda: again(put_in.lens_of()), lambda folder: again(put_in.opened(folder)),
        "FYYDCC/IVT-LR qwen_vl/qwen_ivtlr.py",
        f"{_BY_NAME} or imaginelens_family, for its tokens are Coconut's; merged and in "
        "safetensors, for it was released as LoRA in pickles; at batch size one; measured with 4 "
        "image tokens before each latent in the place of 32; its Chameleon variant is not modelled",
    ),
    "codi": Check(
        codi, codi_folder, "zhenyi4/codi test.py:213-245, src/model.py",
        "told by the weights prj.*; adapters must be merged; with remove_eos, as its scripts set",
    ),
    "soft-thinking": Check(
        soft, soft_folder,
        "eric-ai-lab/Soft-Thinking layers/vocab_parallel_embedding.py:494-512, "
        "managers/schedule_batch.py:726-760",
        f"{_BY_NAME}; any model with </think>; released greedy decoding mixes nothing, ours does",
    ),
    "dmlr": Check(
        free, free_folder, "eric-ai-lab/DMLR DMLR/inference.py:490-740, 790",
        f"{_BY_NAME}; the vectors, and the search for them, are the user's, so only tokens are "
        "compared; positions are those of the prompt's ids",
    ),
    "latent-sketchpad": Check(
        lambda: drawn(sketched.lens_of()), drawn_folder,
        "hwanyu112/Latent-Sketchpad model/uni_qwen.py, model/perceiver.py",
        f"{_BY_NAME}; refused without the weights regression_head.*; no checkpoint is public; "
        "released at batch size one; measured with pictures of 6 cells in the place of 256; its "
        "Gemma 3 variant is not modelled",
    ),
    "huginn": Check(
        lambda: deep.measured(deep.lens_of()), recurring_folder,
        "seal-rg/recurrent-pretraining recpre/raven_modeling_minimal.py",
        "told by model_type huginn_raven; states of every recurrence are compared; initial states "
        "are drawn by the library; remote code, measured on a class of its build and manners",
    ),
    "covt": _written(
        "covt", "Wakals/CoVT covt_qwen2_5_vl.py:1312", "stock generate; states at written tokens"
    ),
    "lavit": _written(
        "lavit", "Svardfox/LaViT training/src/modeling_lavit.py",
        "stock generate; states at written tokens",
    ),
    "heima": _written(
        "heima", "shawnricecake/Heima",
        "stock generate; states at written tokens; released for torchtune, measured on a Qwen",
    ),
}  # fmt: skip


def measure(name: str) -> Measured:
    """Compare one family with its reference, and the same from a folder."""
    check = CHECKS[name]
    equal, error = compared(check.loop())
    with tempfile.TemporaryDirectory() as folder:
        alike, on_disk = compared(check.folder(Path(folder)))
    kind = FAMILIES[name].kind
    both = equal and alike
    return Measured(name, kind, both, error, on_disk, check.source, check.note)


def merged(rows: list[Measured], held: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows of a table with new ones in the place of old ones of the same family."""
    table = {row["family"]: row for row in held} | {row.family: asdict(row) for row in rows}
    return [table[name] for name in sorted(table)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("families", nargs="*", default=list(CHECKS), metavar="FAMILY")
    parser.add_argument("--write", action="store_true")
    given = parser.parse_args()
    rows = []
    for name in given.families or CHECKS:
        rows.append(measure(name))
        errors = f"latents {rows[-1].latent_error:.1e} folder {rows[-1].folder_error:.1e}"
        print(f"{name:16} {rows[-1].kind:9} tokens {rows[-1].tokens_equal} {errors}", flush=True)
    if given.write:
        held = json.loads(OUT.read_text()) if OUT.exists() else []
        OUT.write_text(json.dumps(merged(rows, held), indent=1) + "\n")


if __name__ == "__main__":
    main()
