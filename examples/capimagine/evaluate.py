r"""Ask a model the questions of a benchmark, with and without do(Z), and score what it replies.

    python -m examples.capimagine.evaluate --model latent-content --benchmark hunts --limit 256 \
        --do mean zero noise --out predictions.jsonl
    python -m examples.capimagine.evaluate --model runs/text --benchmark chains \
        --data raw/eval/chains.jsonl --out text.jsonl
    python -m examples.capimagine.evaluate --model Michael4933/CapImagine-7B --benchmark vstar \
        --data vstar_bench --device cuda --judge http://localhost:8000/v1 --out vstar.jsonl --resume
    python -m examples.capimagine.evaluate --benchmark vstar --out vstar.jsonl --score-only

Each prediction is a line of JSON that is written at once: killed anywhere, `--resume` goes on with
the next question. Scores are printed, and written beside the predictions as `.scores.json`.

What is known of the paper's protocol (Monet's): VLMEvalKit, boxed answers, an API judge for what
exact matching does not find. Judge, decoding and prompt suffix are not given; ours are greedy
decoding, the suffix of the model's family (or BOXED) and `prompts/judge.v1.txt`.

Three traps that cost others their numbers are refused or handled: a limit of 16 new tokens, which
lmms-eval sets for V* and MME-RealWorld and which ends any imagination before its answer; stray ends
of latent spans in front of answers (`matcher.visible`); and a do(Z) that never landed (`touched`).
"""

import argparse
import hashlib
import json
import os
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from transformers.generation import LogitsProcessor

import imaginelens as il
from examples.capimagine.benchmark_layouts import BENCHMARKS, Question, read
from examples.capimagine.judging import Judge, OpenAIJudge
from examples.capimagine.ledger import Ledger
from examples.capimagine.refused import Refused, SourceError, count
from examples.capimagine.scores import Prediction, Scored, score
from imaginelens.hooks import LatentModel, Run
from imaginelens.hooks.edits import Edit
from imaginelens.hooks.errors import ImagineLensError, InputError
from imaginelens.hooks.prompts import Prompt
from imaginelens.hooks.textspans import TextSpec, find_spans
from imaginelens.hooks.tokens import Kind
from imaginelens.mediation.folds import Reference, Within
from imaginelens.organisms.organism import Organism

BOXED = "\nPut your final answer within \\boxed{}."
TOO_SHORT = 16  # new tokens: lmms-eval's default for V* and MME-RealWorld
USUAL = 2048  # new tokens: VLMEvalKit's preset for Qwen2.5-VL
LATENT_DO: Mapping[str, Edit | il.Skip] = {
    "sham": il.Sham(),
    "mean": il.Mean(),
    "constant": il.Constant(),
    "zero": il.Zero(),
    "noise": il.Noise(),
    "add-noise": il.AddNoise(0.3),
    "resample": il.Resample(),
    "shuffle": il.Shuffle(),
    "first-repeat": il.FirstRepeat(),
    "skip": il.Skip(),
}
TEXT_DO: Mapping[str, Edit | il.Skip] = {
    "sham": il.Sham(),
    "delete": il.Delete(),
    "truncate": il.Truncate(),
    "shuffle": il.Shuffle(),
    "resample": il.Resample(),
}


# ---- the model ---------------------------------------------------------------------------------


def open_model(name: str, *, family: str | None = None, device: str | None = None) -> LatentModel:
    """Open an organism, a folder or a checkpoint of the Hub.

    Args:
        family: how it imagines, where that does not show, or "none". A vocabulary that holds
            `<think_image>`, as what this recipe trains has, shows that it imagines in words.
    """
    return il.load(name, spec=False if family == "none" else family, device_map=device)


def new_tokens(lens: LatentModel, wanted: int | None) -> int:
    """How many tokens a reply may have.

    Raises:
        InputError: so few that imagination would end before its answer.
    """
    if wanted is None:
        room = getattr(lens.model.config.get_text_config(), "max_position_embeddings", USUAL)
        return min(USUAL, room // 2)
    if wanted <= TOO_SHORT and lens.family is not None:
        raise InputError(
            f"{wanted} new tokens end what a {lens.family.name} model imagines before its answer "
            "(16 is what some harnesses set); leave --max-new-tokens out, or give more"
        )
    return wanted


def suffix_of(lens: LatentModel, benchmark: str) -> str:
    """What is put behind each question: nothing on hunts, whose words are counted."""
    if benchmark in ("hunts", "chains"):
        return ""
    style = getattr(lens.family, "prompt", None)
    return getattr(style, "suffix", "") or BOXED


class Clock(LogitsProcessor):
    """Notes when tokens are chosen: the time from the first to the last is the decode stage, the
    reading of the prompt and its pictures left out."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        if scores.is_cuda:
            torch.cuda.synchronize(scores.device)
        self.times.append(time.perf_counter())
        return scores

    @property
    def seconds(self) -> float:
        """Of the decode stage so far."""
        return self.times[-1] - self.times[0] if self.times else 0.0


def imagined(lens: LatentModel, run: Run, row: int) -> int:
    """How many latents an example fed back, or how many spans of imagination it wrote."""
    if isinstance(lens.family, TextSpec):
        return len(find_spans(run.tokens, row, lens.family.open, lens.family.close))
    return run.trigger.emitted[row]


# ---- predictions -------------------------------------------------------------------------------


@dataclass
class Evaluation:
    """A model before a benchmark.

    Attributes:
        dos: names of what is done to the imagination; "none" always runs.
        references: how many unedited examples of the other half an edit is fitted on.
        hops: of hunts; an organism's own if left out, or 2.
        batch: examples at a time. Decode seconds are then a batch's, divided by its examples; use
            1 to compare models.
    """

    lens: LatentModel
    benchmark: str
    data: Path | None = None
    limit: int | None = None
    dos: Sequence[str] = ()
    max_new_tokens: int | None = None
    suffix: str | None = None
    references: int = 32
    hops: int | None = None
    batch: int = 1
    refused: list[Refused] = field(default_factory=list)
    _fitted: dict[int, Reference] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.max_new_tokens = new_tokens(self.lens, self.max_new_tokens)
        if self.suffix is None:
            self.suffix = suffix_of(self.lens, self.benchmark)
        if self.batch < 1 or self.references < 2:
            raise InputError("--batch must be at least 1, and --references at least 2")
        if self.hops is None:
            self.hops = self.lens.card["hops"] if isinstance(self.lens, Organism) else 2
        self.bank = self._bank()
        unknown = [do for do in self.dos if do not in self.bank]
        if unknown:
            raise InputError(
                f"do({unknown[0]}) is nothing that can be done to "
                f"{'this model, which imagines nothing' if not self.bank else 'this model'}; "
                f"choose from {', '.join(self.bank) or 'other models, or give --family'}"
            )

    @property
    def settings(self) -> dict[str, Any]:
        """What predictions depend on; two files with the same may be one."""
        return {
            "model": str(getattr(self.lens.model.config, "_name_or_path", "")),
            "benchmark": self.benchmark,
            "max_new_tokens": self.max_new_tokens,
            "suffix": self.suffix,
            "references": self.references,
            "hops": self.hops,
        }

    def run(self, done: Iterable[tuple[str, str]] = ()) -> Iterator[Prediction]:
        """Predict, question by question, what is not `done`: pairs of an id and a do."""
        over = set(done)
        wanted = ["none", *(do for do in self.dos if do != "none")]
        halves: tuple[list[Question], list[Question]] = ([], [])  # that wait for their batch
        for question in self._questions():
            if any((question.id, do) not in over for do in wanted):
                own = halves[_half(question)]
                own.append(question)
                if len(own) == self.batch:
                    yield from self._batch(own, wanted, over)
                    own.clear()
        for own in halves:
            if own:
                yield from self._batch(own, wanted, over)

    def _questions(self) -> Iterator[Question]:
        self.refused.clear()
        for row in self._rows():
            if isinstance(row, Refused):
                self.refused.append(row)
            else:
                yield row

    def _rows(self) -> Iterator[Question | Refused]:
        return read(self.benchmark, self.data, limit=self.limit, hops=self.hops or 0)

    def _batch(
        self, batch: Sequence[Question], dos: Sequence[str], over: set[tuple[str, str]]
    ) -> Iterator[Prediction]:
        """What is missing of questions of one half: each is edited by what the other imagined."""
        clock = Clock()
        unedited = self._ask(batch, clock)
        made = list(self._told(batch, "none", unedited, [False] * len(batch), clock.seconds))
        for do in dos:
            if do != "none" and any((q.id, do) not in over for q in batch):
                clock = Clock()
                run, touched = self._edited(batch, do, unedited, clock)
                # a reply whose words are edited is written several times
                seconds = None if self.bank is TEXT_DO else clock.seconds
                made += self._told(batch, do, run, touched, seconds)
        yield from (p for p in made if (p.id, p.do) not in over)

    def _ask(self, batch: Sequence[Question], clock: Clock, latents: il.Skip | None = None) -> Run:
        examples = [question.example(self.suffix or "") for question in batch]
        return self.lens.run(
            examples,
            max_new_tokens=self.max_new_tokens,
            latents=latents,
            generation={"logits_processor": [clock]},
        )

    def _told(
        self,
        batch: Sequence[Question],
        do: str,
        run: Run,
        touched: Sequence[bool],
        seconds: float | None,
    ) -> Iterator[Prediction]:
        for row, question in enumerate(batch):
            real = run.tokens.kind[row, run.tokens.prompt_width :] != Kind.PAD
            yield Prediction(
                id=question.id,
                split=question.split,
                do=do,
                question=question.text,
                options=question.options,
                lettered=question.lettered,
                truth=question.answer,
                reply=run.texts[row],
                emitted=imagined(self.lens, run, row),
                touched=touched[row],
                tokens=int(real.sum()),
                seconds=None if seconds is None else seconds / len(batch),
                group=question.group,
            )

    # ---- do(Z) -----------------------------------------------------------------------------

    def _bank(self) -> Mapping[str, Edit | il.Skip]:
        if self.lens.spec is not None:
            return LATENT_DO
        return TEXT_DO if isinstance(self.lens.family, TextSpec) else {}

    def _edited(
        self, batch: Sequence[Question], do: str, unedited: Run, clock: Clock
    ) -> tuple[Run, list[bool]]:
        """The replies under a `do`, and in which of them it changed anything."""
        edit = self.bank[do]
        if isinstance(edit, il.Skip):
            return self._ask(batch, clock, edit), [n > 0 for n in unedited.trigger.emitted]
        words = isinstance(self.lens.family, TextSpec)
        if isinstance(self.lens.family, TextSpec):
            at: Any = il.imagination.between(self.lens.family.open, self.lens.family.close)
        else:
            at = il.latent
        if isinstance(edit, il.Shuffle) and not words:
            edit = replace(edit, run=unedited)
        if wants_reference(edit):
            fitted = edit.fit(self._reference(1 - _half(batch[0])))
            edit = fitted if words else Within(fitted)
        try:
            with self.lens.edit(edit, at=at) as landing:
                run = self._ask(batch, clock)
        except il.EditTouchedNothing:
            return unedited, [False] * len(batch)
        return run, [row not in landing.flags for row in range(len(batch))]

    def _served_by(self, half: int) -> Iterator[Question]:
        """The questions of one half, which the edits of the other are fitted on."""
        return (q for q in self._rows() if isinstance(q, Question) and _half(q) == half)

    def _reference(self, half: int) -> Reference:
        """Unedited runs of the first questions of one half."""
        if half not in self._fitted:
            runs, wanted = [], list(islice(self._served_by(half), self.references))
            if len(wanted) < 2:
                raise InputError(
                    "edits are fitted on the other half of the questions, which has fewer than 2; "
                    "give more with --limit"
                )
            for start in range(0, len(wanted), self.batch):
                run = self._ask(wanted[start : start + self.batch], Clock())
                runs.append(replace(run, prompt=Prompt({})))
            self._fitted[half] = Reference(runs)
        return self._fitted[half]


def _half(question: Question) -> int:
    """Which half a question is of; the questions of a group are of the same."""
    key = question.group or question.id
    return hashlib.blake2b(key.encode(), digest_size=1).digest()[0] % 2


def wants_reference(edit: Edit | il.Skip) -> bool:
    """Whether an edit takes its statistics from other examples, and was given none."""
    return isinstance(edit, Edit) and edit.given is None and hasattr(edit, "reference")


# ---- files -------------------------------------------------------------------------------------


class Predictions:
    """A file of predictions that grows line by line, under the settings in its first line.

    Args:
        resume: go on with what is there; a last line that was torn is dropped.

    Raises:
        InputError: the file is there and is not to be resumed, or has other settings.
    """

    def __init__(self, path: Path, settings: Mapping[str, Any], *, resume: bool) -> None:
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        there = path.exists() and path.stat().st_size > 0
        if there and not resume:
            raise InputError(f"{path} is there; give --resume to go on with it, or another --out")
        if there:
            _drop_torn(path)
            found, self.made = load(path)
            if found and found != dict(settings):
                other = sorted(k for k in settings if found.get(k) != settings[k])
                raise InputError(
                    f"{path} was made with other {', '.join(other)}; give another --out"
                )
            there = bool(found)
        if not there:
            self.made = []
            path.write_text(json.dumps({"settings": dict(settings)}) + "\n", encoding="utf-8")

    def add(self, prediction: Prediction) -> None:
        """Append a prediction; it is on the disk when this returns."""
        line = json.dumps(prediction.record(), ensure_ascii=True) + "\n"
        with self.path.open("a", encoding="utf-8") as lines:
            lines.write(line)
            lines.flush()
            os.fsync(lines.fileno())
        self.made.append(prediction)


def load(path: Path) -> tuple[dict[str, Any], list[Prediction]]:
    """The settings and the predictions of a file; a torn last line is left out.

    Raises:
        InputError: another line is none.
    """
    settings: dict[str, Any] = {}
    made: list[Prediction] = []
    lines = path.read_bytes().split(b"\n")
    for number, line in enumerate(lines[:-1], 1):  # behind the last end of line nothing is whole
        try:
            record = json.loads(line)
            if "settings" in record:
                settings = record["settings"]
            else:
                made.append(Prediction.of(record))
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise InputError(
                f"line {number} of {path} is no prediction ({type(error).__name__}: {error}); "
                "give another --out"
            ) from error
    return settings, made


def _drop_torn(path: Path) -> None:
    """Cut off what stands behind the last end of line."""
    whole = path.read_bytes().rfind(b"\n") + 1
    with path.open("r+b") as file:
        file.truncate(whole)


# ---- the command line --------------------------------------------------------------------------


def evaluate(
    study: Evaluation, out: Path, *, resume: bool = False, judge: Judge | None = None
) -> Scored:
    """Predict what is missing in `out`, and score all of it."""
    made = Predictions(out, study.settings, resume=resume)
    for prediction in study.run([(p.id, p.do) for p in made.made]):
        made.add(prediction)
    if not made.made:
        raise InputError(
            f"no question of {study.benchmark} could be asked: {count(study.refused) or 'none'}"
        )
    chosen = ("none", *study.dos)
    scored = score([p for p in made.made if p.do in chosen], study.benchmark, judge=judge)
    if study.refused:
        kinds = ", ".join(f"{n} x {kind}" for kind, n in count(study.refused).items())
        first = study.refused[0]
        note = f"{len(study.refused)} rows were refused ({kinds}); {first.id}: {first.reason}"
        scored = replace(scored, notes=(*scored.notes, note))
    return scored


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", help="an organism, a folder, or a name on the Hub")
    parser.add_argument("--family", help="such as capimagine; if it does not show")
    parser.add_argument("--benchmark", required=True, choices=list(BENCHMARKS))
    parser.add_argument("--data", type=Path, help="its folder; fetched from the Hub if left out")
    parser.add_argument("--out", type=Path, required=True, help="predictions, JSON lines")
    parser.add_argument("--limit", type=int, help="read only the first so many rows")
    parser.add_argument("--resume", action="store_true", help="go on with --out")
    parser.add_argument(
        "--do", nargs="*", default=[], help=f"{', '.join(LATENT_DO)}; of words {', '.join(TEXT_DO)}"
    )
    parser.add_argument(
        "--references", type=int, default=32, help="examples that edits are fitted on"
    )
    parser.add_argument("--hops", type=int, help="of hunts; an organism's own if left out")
    parser.add_argument("--batch", type=int, default=1, help="1 to compare decode seconds")
    parser.add_argument("--max-new-tokens", type=int)
    parser.add_argument("--suffix", help="what is put behind each question")
    parser.add_argument("--device", help="as device_map of transformers")
    parser.add_argument("--judge", help="URL of an OpenAI-compatible endpoint, with /v1")
    parser.add_argument("--judge-model", default="judge", help="as the endpoint calls it")
    parser.add_argument("--score-only", action="store_true", help="ask nothing, score --out again")
    return parser.parse_args()


def _main(args: argparse.Namespace) -> Scored:
    judge = None
    if args.judge:
        judge = OpenAIJudge(
            args.judge, args.judge_model, Ledger(args.out.with_suffix(".judge.jsonl"))
        )
    if args.score_only:
        settings, made = load(args.out)
        return score(made, settings.get("benchmark", args.benchmark), judge=judge)
    if not args.model:
        raise InputError("give --model, or --score-only")
    lens = open_model(args.model, family=args.family, device=args.device)
    study = Evaluation(
        lens,
        args.benchmark,
        data=args.data,
        limit=args.limit,
        dos=args.do,
        max_new_tokens=args.max_new_tokens,
        suffix=args.suffix,
        references=args.references,
        hops=args.hops,
        batch=args.batch,
    )
    return evaluate(study, args.out, resume=args.resume, judge=judge)


def main() -> None:
    """Evaluate what the command line names."""
    args = _arguments()
    try:
        scored = _main(args)
    except (ImagineLensError, SourceError, FileNotFoundError) as error:
        raise SystemExit(str(error)) from error
    print(scored)
    text = json.dumps(scored.to_json(), indent=1, default=float)
    args.out.with_suffix(".scores.json").write_text(text + "\n")


if __name__ == "__main__":
    main()
