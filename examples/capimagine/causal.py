r"""Does a model read what it imagines? The same interventions on words and on latents.

    python -m examples.capimagine.causal --text runs/text --latent latent-content latent-ignored \
        --n 256 --out causal
    python -m examples.capimagine.causal --text Michael4933/CapImagine-7B --latent MONET_FOLDER \
        --benchmark vstar --data vstar_bench --n 191 --batch 1 --device cuda \
        --rewriter http://localhost:8000/v1 --rewriter-model Qwen3-32B --out causal

Writes `table.md`, `causal.json` (every answer of every arm) and `effects-*.png` into `--out`. Arms,
and what each is in either space, stand in `arms.py`. In free context the model goes on by itself
behind what was edited; in fixed context the text behind it stays, and one forward reads the answer.

The paper (arXiv 2602.22766, section 5.5) has Qwen3-32B rewrite the imagined text toward a wrong
conclusion, and compares the accuracy with that of latents under uninformative replacements. Its
prompt is not published; ours is `prompts/wrong.v1.txt`. Here neutral arms have verdicts of
equivalence at a margin of 5 points, and targeted ones are also compared, example by example, with
a neutral one, so that harm that comes from strangeness is told from harm that comes from content.
On treasure hunts everything that should follow is known, and no model is needed to rewrite.
"""

import argparse
import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

import imaginelens as il
from examples.capimagine.arms import (
    ARMS,
    Arm,
    Batch,
    Context,
    Deed,
    Item,
    Rewriters,
    deed,
    form_of,
    letter,
)
from examples.capimagine.benchmark_layouts import HELD_OUT, Question, read
from examples.capimagine.effects import Compared, Outcome, Studied, merged
from examples.capimagine.evaluate import Clock, new_tokens, open_model, suffix_of
from examples.capimagine.matcher import match
from examples.capimagine.refused import SourceError
from imaginelens.hooks import LatentModel, Run
from imaginelens.hooks.errors import ImagineLensError, InputError
from imaginelens.hooks.prompts import Prompt
from imaginelens.hooks.tokens import Kind
from imaginelens.mediation.folds import Reference
from imaginelens.organisms.hunt import SHAPES, Hunt, pairs
from imaginelens.organisms.organism import Organism

ARM_NAMES = tuple(arm.name for arm in ARMS)


# ---- examples ----------------------------------------------------------------------------------


def hunt_items(n: int, *, hops: int, seed: int = 0) -> list[Item]:
    """Held-out hunts, each with one that has another answer."""
    base, source = pairs(n, hops=hops, seed=HELD_OUT + seed)
    return [
        Item(_asked(hunt, f"{i}"), _asked(other, f"{i} partner"), hunt, other)
        for i, (hunt, other) in enumerate(zip(base, source, strict=True))
    ]


def _asked(hunt: Hunt, id: str) -> Question:
    return Question(
        id=id,
        split=f"{hunt.hops} hops",
        text=hunt.question,
        options=SHAPES,
        answer=letter(hunt.answer),
        pictures=(hunt.image(),),
        lettered=False,
    )


def question_items(benchmark: str, data: Path | None, n: int, *, seed: int = 0) -> list[Item]:
    """Questions of a benchmark, each with another of another answer and, where they are known,
    another group.

    Raises:
        InputError: there are too few.
    """
    rows = (row for row in read(benchmark, data) if isinstance(row, Question))
    questions = list(islice(rows, n))
    draw = np.random.default_rng(seed)
    items = []
    for question in questions:
        others = [
            other
            for other in questions
            if _words(other) != _words(question)
            and (not question.group or other.group != question.group)
        ]
        if not others:
            raise InputError(
                f"question {question.id} of {benchmark} has no partner with another answer; "
                "use more questions"
            )
        items.append(Item(question, others[int(draw.integers(len(others)))]))
    return items


def _words(question: Question) -> str:
    """The right answer in words: a letter says nothing outside of its question."""
    if not question.options:
        return question.answer.casefold()
    return question.options["ABCDEFGHIJ".index(question.answer)].casefold()


# ---- a study of one model ----------------------------------------------------------------------


@dataclass
class Causal:
    """A study of one model.

    Attributes:
        batch: examples at a time.
        suffix: what is put behind each question.
        arms: names of those to run.
        rewriters: models that rewrite captions, for words other than those of hunts.
        timed: how many examples are run by themselves, for the decode stage.
    """

    lens: LatentModel
    name: str
    items: Sequence[Item]
    batch: int = 64
    suffix: str = ""
    max_new_tokens: int | None = None
    contexts: Sequence[Context] = ("free", "fixed")
    arms: Sequence[str] = ARM_NAMES
    rewriters: Rewriters = field(default_factory=Rewriters)
    timed: int = 8
    seed: int = 0

    def run(self) -> Studied:
        """Run every arm on every example.

        Raises:
            InputError: there are too few examples, or no answer is found in any reply.
        """
        unknown = [*(set(self.arms) - set(ARM_NAMES)), *(set(self.contexts) - {"free", "fixed"})]
        if unknown:
            raise InputError(
                f"{unknown[0]!r} is no arm and no context; arms are {', '.join(ARM_NAMES)}"
            )
        if len(self.items) < 2 or self.batch < 1:
            raise InputError(f"{len(self.items)} examples show no effect; use at least 2")
        self.max_new_tokens = new_tokens(self.lens, self.max_new_tokens)
        chunks = [self.items[i : i + self.batch] for i in range(0, len(self.items), self.batch)]
        sources = [self._ask([item.partner for item in chunk]) for chunk in chunks]
        reference = Reference([replace(run, prompt=Prompt({})) for run in sources])
        runs = [self._ask([item.question for item in chunk]) for chunk in chunks]
        answers = [self._read(chunk, run.texts) for chunk, run in zip(chunks, runs, strict=True)]
        if not any(answer for part in answers for answer in part):
            raise InputError(
                f"no answer was found in what {self.name} wrote (the first: "
                f"{runs[0].texts[0][:60]!r}); is it asked as it was trained?"
            )
        forms = [form_of(self.lens, run) for run in runs]
        form = max(set(forms), key=forms.count)
        parts = []
        for chunk, run, source, own in zip(chunks, runs, sources, answers, strict=True):
            batch = Batch(
                self.lens, chunk, run, source, reference, own, form, self.rewriters, self.seed
            )
            parts.append(list(self._outcomes(batch)))
        seconds, tokens = self._cost()
        return Studied(
            self.name,
            form,
            tuple(item.question.answer for item in self.items),
            tuple(answer for part in answers for answer in part),
            merged(parts),
            seconds,
            tokens,
        )

    def _outcomes(self, batch: Batch) -> Iterator[Outcome]:
        for context in self.contexts:
            for arm in (arm for arm in ARMS if arm.name in self.arms):
                made = deed(batch, arm, context)
                if made is not None:
                    yield self._outcome(batch, arm, context, made)

    def _outcome(self, batch: Batch, arm: Arm, context: Context, made: Deed) -> Outcome:
        readings = {name: tuple(answers) for name, answers in made.readings.items()}
        if isinstance(made.edit, il.Skip):
            run = self._ask([item.question for item in batch.items], skip=True)
            answers = self._read(batch.items, run.texts)
            touched = tuple(n > 0 for n in batch.run.trigger.emitted)
            return Outcome(arm.name, context, answers, touched, readings)
        try:
            result = self.lens.ablate(
                batch.run, made.edit, at=made.at, context=context, metric=il.accuracy
            )
        except il.EditTouchedNothing:
            untouched = (False,) * len(batch.items)
            return Outcome(arm.name, context, tuple(batch.answers), untouched, readings)
        said = result.texts_after if context == "free" else result.answers_after
        answers = self._read(batch.items, [text or "" for text in said])
        touched = tuple(row not in result.landing.flags for row in range(len(batch.items)))
        again = math.nan
        if isinstance(made.edit, il.Delete) and isinstance(self.lens.family, il.TextSpec):
            close = self.lens.family.close
            again = float(np.mean([close in text for text in result.texts_after]))
        return Outcome(arm.name, context, answers, touched, readings, again)

    def _ask(self, questions: Sequence[Question], *, skip: bool = False) -> Run:
        return self.lens.run(
            [question.example(self.suffix) for question in questions],
            max_new_tokens=self.max_new_tokens,
            latents=il.Skip() if skip else None,
        )

    def _read(self, items: Sequence[Item], texts: Sequence[str]) -> tuple[str | None, ...]:
        questions = [item.question for item in items]
        return tuple(
            match(text, q.options, lettered=q.lettered).answer
            for text, q in zip(texts, questions, strict=True)
        )

    def _cost(self) -> tuple[float, float]:
        """Decode seconds and tokens of an example by itself, medians."""
        seconds, tokens = [], []
        for item in self.items[: self.timed]:
            clock = Clock()
            run = self.lens.run(
                [item.question.example(self.suffix)],
                max_new_tokens=self.max_new_tokens,
                generation={"logits_processor": [clock]},
            )
            seconds.append(clock.seconds)
            real = run.tokens.kind[0, run.tokens.prompt_width :] != Kind.PAD
            tokens.append(int(real.sum()))
        return float(np.median(seconds)), float(np.median(tokens))


# ---- the command line --------------------------------------------------------------------------


def notes(models: Sequence[Studied], rewriters: Rewriters) -> tuple[str, ...]:
    """What a reader of the table must know."""
    made = [
        "a paraphrase of latents does not exist; the arm adds noise of a tenth of their norm",
        "neutral: points to no answer. Shuffled, foreign and deleted imagination has lost its "
        "content, so that an effect shows that something is read; a paraphrase has kept it",
        "deleting also takes away the form that a model was trained to write in; what it costs "
        "need not be content",
        "intervals are 95%, each for itself; verdicts are at a margin of 5 points of accuracy",
    ]
    if any(m.form == "names" for m in models):
        made.append("bare names of cards have no other phrasing, and one span has no first step")
    made += [
        f"{m.name} wrote its imagination again where it had been deleted, without the first marker"
        for m in models
        if (o := m.outcome("delete")) is not None and o.again > 0.05
    ]
    if any(m.form == "words" for m in models) and rewriters.wrong is None:
        made.append("without --rewriter there is no paraphrase and no wrong conclusion of words")
    made += [f"{m.name} imagined nothing" for m in models if m.form == "nothing"]
    made += [
        f"{m.name}, {o.arm} in {o.context} context: {o.error}"
        for m in models
        for o in m.outcomes
        if o.error
    ]
    return tuple(made)


def compare(
    text: Sequence[str],
    latent: Sequence[str],
    *,
    n: int = 256,
    batch: int = 64,
    hops: int = 2,
    seed: int = 0,
    contexts: Sequence[Context] = ("free", "fixed"),
    arms: Sequence[str] = ARM_NAMES,
    benchmark: str = "hunts",
    data: Path | None = None,
    device: str | None = None,
    rewriters: Rewriters | None = None,
) -> Compared:
    """Study models that imagine in words, and models that imagine in latents, side by side.

    Args:
        text, latent: organisms, folders or names on the Hub.
        hops: of hunts, for models that are no organisms.
        benchmark: "hunts", or whose questions are asked.
    """
    studied = []
    for name in (*text, *latent):
        lens = open_model(name, family="capimagine" if name in text else None, device=device)
        own = lens.card["hops"] if isinstance(lens, Organism) else hops
        if benchmark == "hunts":
            items = hunt_items(n, hops=own, seed=seed)
        else:
            items = question_items(benchmark, data, n, seed=seed)
        study = Causal(
            lens,
            Path(name).name,
            items,
            batch=batch,
            suffix=suffix_of(lens, benchmark),
            contexts=contexts,
            arms=arms,
            rewriters=rewriters or Rewriters(),
            seed=seed,
        )
        studied.append(study.run())
    told = notes(studied, rewriters or Rewriters())
    return Compared(tuple(studied), tuple(contexts), told)


def write(compared: Compared, out: Path) -> None:
    """Write the table, the numbers and the figures."""
    out.mkdir(parents=True, exist_ok=True)
    (out / "table.md").write_text(compared.table() + "\n", encoding="utf-8")
    said = json.dumps(_plain(compared.to_json()), indent=1)
    (out / "causal.json").write_text(said + "\n", encoding="utf-8")
    for context in compared.contexts:
        compared.figure(context).save(out / f"effects-{context}.png")


def _plain(value: Any) -> Any:
    """For JSON, which has no nan."""
    if isinstance(value, dict):
        return {key: _plain(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(inner) for inner in value]
    if isinstance(value, float | np.floating):
        return None if math.isnan(value) else float(value)
    return value


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--text", nargs="*", default=[], help="models that imagine in words")
    parser.add_argument("--latent", nargs="*", default=[], help="models that imagine in latents")
    parser.add_argument("--n", type=int, default=256, help="examples")
    parser.add_argument("--hops", type=int, default=2, help="of hunts; organisms know their own")
    parser.add_argument("--benchmark", default="hunts", help="hunts, or whose questions are asked")
    parser.add_argument("--data", type=Path, help="the folder of the benchmark")
    parser.add_argument("--contexts", nargs="*", default=["free", "fixed"])
    parser.add_argument("--arms", nargs="*", default=ARM_NAMES, help=", ".join(ARM_NAMES))
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", help="as device_map of transformers")
    parser.add_argument("--rewriter", help="URL of an OpenAI-compatible endpoint, with /v1")
    parser.add_argument("--rewriter-model", default="rewriter", help="as the endpoint calls it")
    parser.add_argument("--out", type=Path, required=True, help="a folder")
    return parser.parse_args()


def main() -> None:
    """Compare what the command line names."""
    args = _arguments()
    if not args.text and not args.latent:
        raise SystemExit("there is no model; give --text or --latent, or both")
    rewriters = Rewriters()
    try:
        if args.rewriter:
            from examples.capimagine.misleading import asked

            rewriters = asked(args.rewriter, args.rewriter_model, args.out / "rewriter.jsonl")
        compared = compare(
            args.text,
            args.latent,
            n=args.n,
            batch=args.batch,
            hops=args.hops,
            seed=args.seed,
            contexts=args.contexts,
            arms=args.arms,
            benchmark=args.benchmark,
            data=args.data,
            device=args.device,
            rewriters=rewriters,
        )
    except (ImagineLensError, SourceError) as error:
        raise SystemExit(str(error)) from error
    write(compared, args.out)
    print(compared.table())


if __name__ == "__main__":
    main()
