r"""Teach a model to imagine in latents, from raw chains, by one of five objectives.

    python -m examples.latent_baselines.train raw/chains.jsonl --objective mirage --out runs/mirage
    python -m examples.latent_baselines.train raw/chains.jsonl --objective interchange \
        --rule pointer --audit 100 --out runs/pointer
    python -m examples.latent_baselines.train CHAINS.jsonl --objective lvr --out runs/lvr \
        --model Qwen/Qwen2.5-VL-7B-Instruct --dtype bfloat16 --steps 8 --lr 1e-5 \
        --batch 1 --accumulate 16

It runs on the plain `Trainer` of transformers, in one process. The vision tower is frozen, and
every picture is encoded once and kept: a picture of 1,000 visual tokens of a 7B model takes 7 MB.
An objective is one or more stages, each a folder below `--out`; a stage that is done is not done
again, and one that was stopped goes on where it was. The last one's `model` is what `il.load`
opens. Where papers say nothing, or their scale is another, values are ours: rate, batch, shares of
the updates; weights of the losses are the papers' (see objectives.py).
"""

import argparse
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import Trainer, TrainingArguments

from examples.capimagine import chains as files
from examples.capimagine.resuming import ExactResume, last_whole
from examples.latent_baselines import objectives, rules
from examples.latent_baselines.audit import Audit, held_out
from examples.latent_baselines.checkpoints import open_to_train, write
from examples.latent_baselines.encoding import Item, as_batch, collate, encode
from examples.latent_baselines.loop import Span, span_of
from examples.latent_baselines.objectives import Learner, Objective, Rule
from imaginelens.hooks import LatentModel
from imaginelens.hooks.errors import ImagineLensError


@dataclass(frozen=True)
class Stage:
    """One part of an objective: what is minimised, and in which share of the updates."""

    name: str
    objective: Objective
    share: float
    taught: bool = False  # the stage before it is its teacher


PLANS: dict[str, tuple[Stage, ...]] = {
    "mirage": (
        Stage("align", objectives.mirage_align, 0.5),
        Stage("free", objectives.mirage_free, 0.5),
    ),
    "lvr": (Stage("reconstruct", objectives.lvr, 1.0),),
    "coconut": (Stage("free", objectives.coconut, 1.0),),
    "monet": (
        Stage("teach", objectives.monet_teach, 0.2),
        Stage("distil", objectives.monet_distil, 0.3, taught=True),
        Stage("recall", objectives.monet_recall, 0.5, taught=True),
    ),
    "interchange": (Stage("swap", objectives.interchange, 1.0),),
}


class LatentTrainer(ExactResume, Trainer):
    """The plain trainer with a loss of its own, exact when resumed and when accumulating."""

    def __init__(
        self,
        *,
        objective: Objective,
        span: Span,
        teacher: Any = None,
        rule: Rule | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        if self.args.world_size > 1:
            raise SystemExit(
                "the latent loop runs beside the model's own forward, which several processes "
                "would not keep in step; start one process, and raise --accumulate instead"
            )
        self.objective, self.span, self.teacher, self.rule = objective, span, teacher, rule
        # losses are means over examples: the trainer is to average them over accumulated batches
        self.model_accepts_loss_kwargs = False

    def compute_loss(
        self,
        model: Any,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        # drawn anew from the number of the update, so that a resumed training draws the same
        draw = torch.Generator().manual_seed(self.args.seed * 1_000_003 + self.state.global_step)
        learner = Learner(model, self.span, draw, self.teacher, self.rule)
        loss = self.objective(learner, as_batch(inputs))
        return (loss, {}) if return_outputs else loss


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How long and how fast; the defaults are ours, for organisms."""

    updates: int = 1000
    batch: int = 64
    accumulate: int = 1
    rate: float = 2e-3
    warmup: int = 50
    seed: int = 0
    save_every: int = 250


def arguments(settings: Settings, folder: Path, *, updates: int) -> TrainingArguments:
    """What the trainer is told: warm up, hold the rate for a third, let it fall to zero."""
    return TrainingArguments(
        output_dir=str(folder),
        max_steps=updates,
        per_device_train_batch_size=settings.batch,
        gradient_accumulation_steps=settings.accumulate,
        learning_rate=settings.rate,
        lr_scheduler_type="warmup_stable_decay",
        lr_scheduler_kwargs={"num_decay_steps": 2 * updates // 3},
        warmup_steps=min(settings.warmup, updates // 3),
        adam_beta2=0.98,
        weight_decay=0.01,
        max_grad_norm=1.0,
        seed=settings.seed,
        data_seed=settings.seed,
        save_steps=settings.save_every,
        save_total_limit=1,
        logging_steps=50,
        dataloader_drop_last=True,
        dataloader_pin_memory=torch.cuda.is_available(),
        remove_unused_columns=False,
        label_names=[],
        report_to="none",
        disable_tqdm=True,
    )


def run_stage(
    stage: Stage,
    lens: LatentModel,
    items: Sequence[Item],
    folder: Path,
    *,
    settings: Settings,
    span: Span,
    teacher: Any = None,
    rule: Rule | None = None,
    callbacks: Sequence[Any] = (),
) -> LatentTrainer:
    """Train one stage from where it was stopped, and write `folder / "model"`."""
    trainer = LatentTrainer(
        objective=stage.objective,
        span=span,
        teacher=teacher,
        rule=rule,
        model=lens.model,
        args=arguments(settings, folder, updates=max(1, round(stage.share * settings.updates))),
        train_dataset=list(items),
        data_collator=partial(collate, pad_id=lens.tokenizer.pad_token_id),
        callbacks=list(callbacks),
    )
    begun = last_whole(folder)
    trainer.train(resume_from_checkpoint=None if begun is None else str(begun))
    write(lens, folder / "model")
    return trainer


def run_plan(
    plan: Sequence[Stage],
    chains: Sequence[files.Chain],
    out: Path,
    *,
    model: str = "base",
    steps: int = 2,
    dtype: torch.dtype = torch.float32,
    settings: Settings | None = None,
    rule: str | None = None,
    audit: int = 0,
    held: Sequence[files.Chain] = (),
) -> LatentModel:
    """Train all stages that are not done, one after the other; gives the model of the last.

    Args:
        rule: the entry of `rules.RULES` that says what a swap should do, where the plan needs one.
        audit: audit the model every so many updates, on `held`; 0 is never.
    """
    settings = settings or Settings()
    lens = open_to_train(model, steps=steps, dtype=dtype)
    span = span_of(lens, steps=steps)
    items, refused = encode(lens, span, chains)
    for one in refused:
        print(f"refused {one.id}: {one.reason}", flush=True)
    without = {one.id for one in refused}
    kept = [chain for chain in chains if chain.id not in without]
    if len(items) < settings.batch:
        raise SystemExit(
            f"{len(items)} chains can be learned from, and a batch is {settings.batch}"
        )
    told = None if rule is None else rules.make(rule, kept, lens.tokenizer, steps=steps)
    before, done = None, 0
    for stage in plan:
        folder = out / stage.name
        if not _is_whole(folder):
            teacher = _frozen(before, steps, dtype) if stage.taught and before else None
            watch = [Audit(lens, held, steps, out, every=audit, begun=done)] if audit else []
            started = time.process_time()
            trainer = run_stage(
                stage, lens, items, folder, settings=settings, span=span, teacher=teacher,
                rule=told, callbacks=watch,
            )  # fmt: skip
            seconds = time.process_time() - started - sum(a.seconds for a in watch)
            _mark_whole(folder, updates=trainer.state.global_step, cpu_seconds=round(seconds, 1))
        before = folder / "model"
        done += json.loads((folder / "done.json").read_text())["updates"]
        lens = open_to_train(before, steps=steps, dtype=dtype)
    return lens


def _is_whole(folder: Path) -> bool:
    return (folder / "done.json").exists()


def _mark_whole(folder: Path, **measured: float) -> None:
    (folder / "done.json").write_text(json.dumps(measured) + "\n")
    print(f"{folder.name}: {json.dumps(measured)}", flush=True)


def _frozen(folder: Path, steps: int, dtype: torch.dtype) -> Any:
    return open_to_train(folder, steps=steps, dtype=dtype).model.eval().requires_grad_(False)


def main() -> None:
    """Train what the command line asks for."""
    default = Settings()
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("chains", type=Path, help="raw chains, with pictures in their replies")
    parser.add_argument("--objective", choices=list(PLANS), required=True)
    parser.add_argument("--model", default="base", help="an organism, a folder or a Hub id")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--steps", type=int, default=2, help="latents of a span")
    parser.add_argument("--subset", action="append", help="only chains of this subset; repeatable")
    parser.add_argument("--like", type=Path, help="only chains that are also in this file")
    parser.add_argument("--updates", type=int, default=default.updates)
    parser.add_argument("--batch", type=int, default=default.batch)
    parser.add_argument("--accumulate", type=int, default=default.accumulate)
    parser.add_argument("--lr", type=float, default=default.rate)
    parser.add_argument("--seed", type=int, default=default.seed)
    parser.add_argument("--rule", choices=list(rules.RULES), default="content")
    parser.add_argument("--audit", type=int, default=0, help="audit every so many updates")
    parser.add_argument("--held", type=Path, help="chains to audit on; else the last 64 are held")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    torch.set_num_threads(1)
    try:
        _obey(args)
    except (ImagineLensError, ValueError) as error:
        raise SystemExit(str(error)) from error


def _obey(args: argparse.Namespace) -> None:
    chains = [c for c in files.load(args.chains) if not args.subset or c.subset in args.subset]
    if args.like:
        kept = {chain.id for chain in files.load(args.like)}
        chains = [chain for chain in chains if chain.id in kept]
    held: Sequence[files.Chain] = files.load(args.held) if args.held else ()
    if args.audit and not held:
        chains, held = held_out(chains)
    run_plan(
        PLANS[args.objective],
        chains,
        args.out,
        model=args.model,
        steps=args.steps,
        dtype=getattr(torch, args.dtype),
        settings=Settings(
            updates=args.updates, batch=args.batch, accumulate=args.accumulate, rate=args.lr,
            seed=args.seed,
        ),
        rule=args.rule if args.objective == "interchange" else None,
        audit=args.audit,
        held=held,
    )  # fmt: skip


if __name__ == "__main__":
    main()
