r"""Rewrite interleaved chains into imagination in words: caption, refine, filter.

    python -m examples.capimagine.rewrite raw --out data --backend openai \
        --base-url http://127.0.0.1:8000/v1 --model Qwen/Qwen3-VL-4B-Instruct
    python -m examples.capimagine.rewrite raw --out data --backend template   # organisms
    python -m examples.capimagine.rewrite raw --out data --model NAME --dry-run

The three stages of CapImagine (arXiv 2602.22766, section 4.2):

1. rewrite: each picture of the reply becomes a caption. In zoom subsets (Visual_CoT, Zebra_CoT_*)
   the model is shown the region; in edit subsets (ReFocus, CogCoM) the picture before and after.
2. refine: the whole chain is rewritten so that captions and texts fit.
3. filter: a judge says how sure it is that the answer conflicts with what was observed, and that
   the question is ambiguous or cannot be answered; a chain is kept if both are at most a threshold.

The paper rewrites with Qwen3-VL-4B. It does not publish prompts, judge or thresholds: those here
are ours (`prompts/`), versioned, and part of the card. The result is `chains.jsonl`, with
`refused.jsonl` (who, why), `verdicts.jsonl`, and the data card `card.json` and `card.md`.

Every reply is in the ledger before the next step is made, so a run that was killed goes on where it
was by the same command, and other thresholds or ablations need no new calls. Ctrl-C waits for the
calls in flight; a second one does not.

Ablations: `--no-rewrite` puts a lone `<think_image>` in place of each picture, in the chains that
the filter kept; `--no-filter` keeps all; with both no call is made (the paper's "w/o filtering").
`--reply terse` keeps of a reply only imagination and the bare answer: all an organism can say.
"""

import argparse
import asyncio
import json
import os
import signal
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TypeVar

from examples.capimagine import replies
from examples.capimagine.asking import Asking, Budget, Stopped, Unpaid
from examples.capimagine.backends import (
    Local,
    OpenAI,
    Prompt,
    Request,
    Rewriter,
    Sampling,
    Template,
    encoded,
    prompt,
)
from examples.capimagine.card import Cost, card, estimate, write_card
from examples.capimagine.chains import CLOSE, OPEN, Chain, Picture, save
from examples.capimagine.data import (
    LAYOUTS,
    OBSERVATION,
    PLACEHOLDER,
    read,
    write_refused,
)
from examples.capimagine.ledger import Ledger
from examples.capimagine.refused import Refusal, Refused, SourceError, count
from examples.capimagine.replies import BadReply, Verdict
from imaginelens.hooks.errors import InputError

T = TypeVar("T")
ZOOM, EDIT = "zoom", "edit"
BRANCHES = {
    **{f"Zebra_CoT_{kind}": ZOOM for kind in ("count", "visual_search", "geometry")},
    **{"Visual_CoT": ZOOM, "ReFocus": EDIT, "CogCoM": EDIT},
}
STAGES = ("rewrite", "refine", "filter")
MAX_PIXELS = 1280 * 28 * 28  # of a picture that is sent; Monet's budget for one picture
PATIENCE = 2  # how often a model is asked before its replies are given up


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How chains are rewritten.

    Attributes:
        version: of the prompts.
        rewrite: False puts a lone `<think_image>` for each picture.
        refine: False keeps the texts between captions as they were.
        filter: False keeps every chain.
        max_conflict: the largest verdict of this kind that is kept; ours, like the next.
        max_unanswerable: likewise.
        reply: `full`, or `terse` for imagination and the bare answer alone.
        unknown_subset: the branch of subsets that the paper does not name, or `refuse`.
        max_pixels: pictures are sent no larger.
        system: the system prompt of the chains written; None leaves it as it is.
    """

    version: str = "v1"
    rewrite: bool = True
    refine: bool = True
    filter: bool = True
    max_conflict: float = 0.5
    max_unanswerable: float = 0.5
    reply: str = "full"
    unknown_subset: str = "refuse"
    max_pixels: int = MAX_PIXELS
    system: str | None = None

    def prompts(self) -> dict[str, Prompt]:
        """The prompts of this version, by what they do."""
        names = ("rewrite-zoom", "rewrite-edit", "refine", "filter")
        return {name: prompt(f"{name}.{self.version}") for name in names}

    def stages(self) -> tuple[str, ...]:
        """The stages that make calls."""
        asked = self.rewrite or self.filter  # without either no caption is needed
        wanted = {"rewrite": asked, "refine": asked and self.refine, "filter": self.filter}
        return tuple(stage for stage in STAGES if wanted[stage])


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What became of a chain.

    Attributes:
        chain: as it was read.
        captions: one for each picture of its reply.
        texts: what stands before, between and after the captions.
        verdict: the filter's, if it was asked.
        refused: why it is left out, if it is, and in which stage.
    """

    chain: Chain
    captions: tuple[str, ...] = ()
    texts: tuple[str, ...] = ()
    verdict: Verdict | None = None
    refused: Refused | None = None
    stage: str = ""


@dataclass
class Rewriting:
    """Takes chains through the stages, asking a model through a ledger."""

    asking: Asking
    settings: Settings = field(default_factory=Settings)

    async def decide(self, chain: Chain) -> Outcome:
        """Take one chain through all stages."""
        wanted, outcome, stage = self.settings.stages(), Outcome(chain=chain), "structure"
        try:
            texts = _texts(chain)
            outcome = replace(outcome, texts=tuple(texts))
            if "rewrite" in wanted:
                branch = self._branch(chain)
                stage = "rewrite"
                captions = [
                    await self._checked(request, stage, chain.id, replies.caption)
                    for request in self._looks(chain, branch)
                ]
                outcome = replace(outcome, captions=tuple(captions))
            if "refine" in wanted:
                stage = "refine"
                texts, captions = await self._refined(outcome)
                outcome = replace(outcome, texts=tuple(texts), captions=tuple(captions))
            if "filter" in wanted:
                stage = "filter"
                request = self._judgement(outcome)
                verdict = await self._checked(request, stage, chain.id, replies.verdict)
                outcome = replace(outcome, verdict=verdict)
                self._filter(verdict)
        except Refusal as refusal:
            return replace(outcome, refused=refusal.of(chain.id), stage=stage)
        return outcome

    def _branch(self, chain: Chain) -> str:
        branch = BRANCHES.get(chain.subset, self.settings.unknown_subset)
        if branch == "refuse":
            reason = f"the subset {chain.subset!a} is none of {', '.join(BRANCHES)}"
            raise Refusal("unknown subset", f"{reason}; --unknown-subset says what to do")
        return branch

    def _looks(self, chain: Chain, branch: str) -> Iterator[Request]:
        """A request for each picture of the reply."""
        asked = self.settings.prompts()[f"rewrite-{branch}"]
        fields = {"question": chain.question}
        shown = chain.pictures(chain.prompt)
        if branch == EDIT and not shown:
            raise Refusal("no picture asked about", "there is no picture before the edit")
        original = [self._encoded(shown[0])] if branch == EDIT else []
        for path in chain.pictures(chain.reply):
            pictures = (*original, self._encoded(path))
            yield Request(prompt=asked, fields=fields, pictures=pictures)

    def _encoded(self, path: Path) -> bytes:
        return encoded(path, max_pixels=self.settings.max_pixels)

    async def _refined(self, outcome: Outcome) -> tuple[list[str], list[str]]:
        chain, captions = outcome.chain, outcome.captions
        fields = {
            "question": chain.question,
            "answer": chain.answer,
            "texts": outcome.texts,
            "captions": captions,
        }
        return await self._checked(
            Request(prompt=self.settings.prompts()["refine"], fields=fields),
            "refine",
            chain.id,
            lambda text: replies.chain(text, count=len(captions), answer=chain.answer),
        )

    def _judgement(self, outcome: Outcome) -> Request:
        chain = outcome.chain
        return Request(
            prompt=self.settings.prompts()["filter"],
            fields={
                "question": chain.question,
                "captions": outcome.captions,
                "answer": chain.answer,
            },
            pictures=tuple(map(self._encoded, chain.pictures(chain.prompt))),
        )

    def _filter(self, verdict: Verdict) -> None:
        if verdict.conflict > self.settings.max_conflict:
            raise Refusal("answer conflict", f"{verdict.conflict:.2f}: {verdict.why}")
        if verdict.unanswerable > self.settings.max_unanswerable:
            reason = f"{verdict.unanswerable:.2f}: {verdict.why}"
            raise Refusal("ambiguous or unanswerable", reason)

    async def _checked(self, request: Request, stage: str, id: str, check: Callable[[str], T]) -> T:
        """The reply, checked; a bad one is asked for once more, and told what was wrong."""
        for turn in range(PATIENCE):
            text = await self.asking.ask(request, stage=stage, id=id)
            try:
                return check(text)
            except BadReply as bad:
                if turn + 1 == PATIENCE:
                    reason = f"{PATIENCE} bad replies, the last: {bad}"
                    raise Refusal(f"bad reply: {bad.kind}", reason) from bad
                complaint = f"{bad} Reply again, with JSON only."
                request = replace(request, turns=((text[:2000], complaint),))
        raise AssertionError("the last turn returns or raises")


async def rewritten(
    chains: Sequence[Chain],
    rewriting: Rewriting,
    *,
    concurrency: int = 16,
    progress: Callable[[Outcome], None] = lambda outcome: None,
) -> list[Outcome]:
    """Take chains through the stages, a few at once; outcomes are in the order of the chains.

    The first Ctrl-C stops the asking, waits for the calls in flight, and raises `Stopped`.

    Raises:
        Stopped: not all chains are decided; all that was paid for is in the ledger.
        SourceError: the model cannot be asked.
    """
    outcomes: dict[int, Outcome] = {}
    waiting = iter(enumerate(chains))

    async def worker() -> None:
        for number, chain in waiting:
            outcomes[number] = await rewriting.decide(chain)
            progress(outcomes[number])

    async def guarded() -> None:
        try:
            await worker()
        except Exception as error:
            rewriting.asking.stop(f"{type(error).__name__}: {error}")
            raise

    loop = asyncio.get_running_loop()

    def interrupted() -> None:
        rewriting.asking.stop("interrupted")
        loop.remove_signal_handler(signal.SIGINT)  # the next one does not wait

    loop.add_signal_handler(signal.SIGINT, interrupted)
    try:
        ends = await asyncio.gather(
            *(guarded() for _ in range(concurrency)), return_exceptions=True
        )
    finally:
        loop.remove_signal_handler(signal.SIGINT)
    errors = [end for end in ends if isinstance(end, BaseException)]
    # what was wrong comes before that all others stopped because of it
    for error in sorted(errors, key=lambda error: isinstance(error, Stopped)):
        raise error
    return [outcomes[number] for number in range(len(chains))]


# -- chains in, chains out -------------------------------------------------------------------------


def _texts(chain: Chain) -> list[str]:
    """What a raw reply says before, between and after its pictures, without Monet's markers."""
    texts = [""]
    for part in chain.reply:
        if isinstance(part, Picture):
            texts.append("")
        else:
            texts[-1] += part
    if len(texts) == 1:
        raise Refusal("no picture in the reply", "there is nothing to imagine")
    clean = [OBSERVATION.sub("", text.replace(PLACEHOLDER, "")).strip() for text in texts]
    if any(replies.MARKERS.search(text) for text in clean):
        raise Refusal("markers in the reply", "a text holds markers of a chat or of imagination")
    return clean


def composed(outcome: Outcome, settings: Settings) -> Chain:
    """The chain as it is trained on: no picture in the reply, its imagination in words.

    The paper's exact format is unknown; ours: a line for each text and each imagination.
    """
    chain, texts = outcome.chain, list(outcome.texts)
    if settings.rewrite:
        imagined = [f"{OPEN} {said} {CLOSE}" for said in outcome.captions]
    else:
        texts = _texts(chain)
        imagined = [OPEN] * (len(texts) - 1)
    if settings.reply == "terse":
        texts = [""] * len(imagined) + [chain.answer]
    lines = [line for pair in zip(texts, [*imagined, ""], strict=True) for line in pair if line]
    system = chain.system if settings.system is None else settings.system
    return replace(chain, reply=("\n".join(lines),), system=system)


# -- the command line ------------------------------------------------------------------------------


def plan(chains: Sequence[Chain], rewriting: Rewriting) -> dict[str, Cost]:
    """What is still to be paid for, by stage; rough, as captions are not known before."""
    costs = {stage: Cost() for stage in rewriting.settings.stages()}

    def ask(stage: str, request: Request) -> None:
        costs[stage] += estimate(request)

    async def look(chain: Chain) -> None:
        try:
            await rewriting.decide(chain)
        except Unpaid as unpaid:
            first = unpaid.request.prompt.name.split("-")[0].split(".")[0]
            guess = Outcome(
                chain=chain,
                captions=("?" * 200,) * len(chain.pictures(chain.reply)),
                texts=tuple(_texts(chain)),
            )
            if first == "rewrite":
                looks = list(rewriting._looks(chain, rewriting._branch(chain)))
                for request in looks[looks.index(unpaid.request) :]:
                    ask("rewrite", request)
            if "refine" in costs and first != "filter":
                fields = {"texts": guess.texts, "captions": guess.captions}
                refine = rewriting.settings.prompts()["refine"]
                ask("refine", Request(prompt=refine, fields=fields))
            if "filter" in costs:
                ask("filter", rewriting._judgement(guess))

    async def all_of_them() -> None:
        for chain in chains:
            await look(chain)

    asyncio.run(all_of_them())
    return costs


def arguments() -> argparse.ArgumentParser:
    """What the command line takes."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("source", type=Path, help="raw chains, in a layout that data.py reads")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--layout", choices=LAYOUTS)
    parser.add_argument("--ledger", type=Path, help="default: OUT/ledger.jsonl")
    parser.add_argument("--limit", type=int, help="take the first so many chains")
    parser.add_argument("--dry-run", action="store_true", help="say what it would cost")
    who = parser.add_argument_group("who is asked")
    who.add_argument("--backend", choices=("openai", "transformers", "template"), default="openai")
    who.add_argument("--base-url", help="of an endpoint that speaks the OpenAI API")
    who.add_argument("--model", help="its name there, or on the Hub, or a folder")
    who.add_argument("--api-key-env", default="OPENAI_API_KEY", metavar="NAME")
    who.add_argument("--device", help="for --backend transformers")
    who.add_argument("--concurrency", type=int, default=16, help="calls in flight")
    who.add_argument("--retries", type=int, default=6, help="where the endpoint is busy")
    who.add_argument("--max-calls", type=int, help="stop after so many calls of this run")
    who.add_argument("--max-tokens", type=int, help="stop after so many tokens of this run")
    who.add_argument("--temperature", type=float, default=0.0)
    who.add_argument("--reply-tokens", type=int, default=1024, help="the longest reply")
    who.add_argument("--no-json-mode", action="store_true", help="the endpoint has none")
    how = parser.add_argument_group("what is done")
    how.add_argument("--prompts", default="v1", metavar="VERSION")
    how.add_argument("--no-rewrite", action="store_true", help="a lone <think_image> each")
    how.add_argument("--no-refine", action="store_true", help="texts stay as they were")
    how.add_argument("--no-filter", action="store_true", help="keep every chain")
    how.add_argument("--max-conflict", type=float, default=0.5)
    how.add_argument("--max-unanswerable", type=float, default=0.5)
    how.add_argument("--reply", choices=("full", "terse"), default="full")
    how.add_argument("--unknown-subset", choices=("refuse", ZOOM, EDIT), default="refuse")
    how.add_argument("--system", help="system prompt of the chains written; '' for none")
    return parser


def main() -> None:
    """Rewrite what the command line names."""
    args = arguments().parse_args()
    try:
        _run(args)
    except (InputError, SourceError) as error:
        raise SystemExit(str(error)) from error
    except Stopped as stopped:
        raise SystemExit(
            f"stopped: {stopped}. All that was paid for is in the ledger: the same command goes on"
        ) from stopped


def _run(args: argparse.Namespace) -> None:
    settings = _settings(args)
    sampling = Sampling(
        temperature=args.temperature,
        max_tokens=args.reply_tokens,
        json_mode=not args.no_json_mode,
    )
    reading = read(args.source, args.layout, unpack=args.out / "pictures")
    chains = reading.chains[: args.limit]
    with Ledger(args.ledger or args.out / "ledger.jsonl") as ledger:
        needed = bool(settings.stages()) and not args.dry_run
        backend = _backend(args, sampling) if needed else None
        asking = Asking(
            ledger,
            backend,
            backend.model if backend else _model(args),
            sampling,
            Budget(args.max_calls, args.max_tokens),
            args.retries,
        )
        rewriting = Rewriting(asking, settings)
        if args.dry_run:
            return _say_costs(plan(chains, rewriting), len(chains), reading.refused)
        outcomes = _with_progress(chains, rewriting, args.concurrency)
    kept = [composed(outcome, settings) for outcome in outcomes if not outcome.refused]
    refused = [*reading.refused, *(o.refused for o in outcomes if o.refused)]
    args.out.mkdir(parents=True, exist_ok=True)
    save(kept, args.out / "chains.jsonl")
    write_refused(refused, args.out / "refused.jsonl")
    _write_verdicts(outcomes, args.out / "verdicts.jsonl")
    facts = card(args.source, reading, outcomes, kept, asking, settings)
    write_card(facts, args.out)
    print(f"{len(kept)} chains of {reading.counts['records']} in {args.out / 'chains.jsonl'}")
    for kind, n in count(refused).items():
        print(f"{n:8d}  refused: {kind}")
    print(f"{sum(asking.calls.values())} calls, {sum(asking.reused.values())} from the ledger")


def _settings(args: argparse.Namespace) -> Settings:
    return Settings(
        version=args.prompts,
        rewrite=not args.no_rewrite,
        refine=not args.no_refine,
        filter=not args.no_filter,
        max_conflict=args.max_conflict,
        max_unanswerable=args.max_unanswerable,
        reply=args.reply,
        unknown_subset=args.unknown_subset,
        system=args.system,
    )


def _backend(args: argparse.Namespace, sampling: Sampling) -> Rewriter:
    if args.backend == "template":
        return Template()
    if not args.model:
        raise SourceError(f"--backend {args.backend} needs --model")
    if args.backend == "transformers":
        return Local(args.model, device=args.device, sampling=sampling)
    if not args.base_url:
        raise SourceError("--backend openai needs --base-url, such as http://127.0.0.1:8000/v1")
    key = os.environ.get(args.api_key_env) or "EMPTY"
    return OpenAI(args.base_url, args.model, api_key=key, sampling=sampling)


def _model(args: argparse.Namespace) -> str:
    return "template" if args.backend == "template" else args.model or ""


def _with_progress(chains: Sequence[Chain], rewriting: Rewriting, many: int) -> list[Outcome]:
    from tqdm import tqdm

    with tqdm(total=len(chains), unit="chain", desc="rewriting", mininterval=1.0) as bar:
        refused = 0

        def progress(outcome: Outcome) -> None:
            nonlocal refused
            refused += outcome.refused is not None
            bar.set_postfix(
                refused=refused, calls=sum(rewriting.asking.calls.values()), refresh=False
            )
            bar.update()

        async def whole() -> list[Outcome]:
            try:
                return await rewritten(chains, rewriting, concurrency=many, progress=progress)
            finally:
                if isinstance(rewriting.asking.backend, OpenAI):
                    await rewriting.asking.backend.close()

        return asyncio.run(whole())


def _say_costs(costs: dict[str, Cost], chains: int, refused: Sequence[Refused]) -> None:
    print(f"{chains} chains to rewrite, {len(refused)} records refused as they are")
    print("   calls  pictures  tokens in (rough)  tokens out (rough)")
    for stage, cost in [*costs.items(), ("all", sum(costs.values(), Cost()))]:
        print(
            f"{cost.calls:8d}  {cost.pictures:8d}  {cost.tokens_in:17d}  {cost.tokens_out:18d}"
            f"  {stage}"
        )


def _write_verdicts(outcomes: Sequence[Outcome], path: Path) -> None:
    judged = [(o.chain.id, o.verdict) for o in outcomes if o.verdict]
    lines = [
        json.dumps({"id": id, **asdict(verdict)}, ensure_ascii=False) + "\n"
        for id, verdict in judged
    ]
    path.write_text("".join(lines), encoding="utf-8")


if __name__ == "__main__":
    main()
