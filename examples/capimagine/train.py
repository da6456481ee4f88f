"""Train a model to imagine in words before it answers, or, as a control, to answer at once.

    python -m examples.capimagine.train data/chains.jsonl --model base --out runs/text \
        --eval raw/eval/chains.jsonl --settings examples/capimagine/configs/miniature.toml
    python -m examples.capimagine.train ... --out runs/direct --direct
    python -m examples.capimagine.train ... --resume                   # after a crash or a kill
    accelerate launch --config_file examples/capimagine/configs/zero2.yaml \
        -m examples.capimagine.train data/chains.jsonl --model Qwen/Qwen2.5-VL-7B-Instruct \
        --out runs/7b
    python -m examples.capimagine.train --dry-run --gpus 8             # what that would take

Only the reply is learned, without the tokens of pictures in it. The vision tower is frozen, and its
merger with it, since Monet freezes all of `visual`. The global batch is `--batch`, however many
GPUs there are; accumulation follows from it. The paper says: Qwen2.5-VL-7B, Monet's code, 8 GPUs
x 1 x 16 accumulated = 128, and the best checkpoint. It does not say the learning rate, the epochs,
nor best by what. The defaults are those of Monet's first stage, and best is by `--eval`'s loss.

In `--out`: `checkpoint-N` (all that resuming needs), `model` (the best one, or the last without
`--eval`; adapters are merged) and `run.json` (the options). Open it with
`il.load("runs/text/model", spec="capimagine")`, or with transformers as any Qwen2.5-VL.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedModel
from transformers.utils import cached_file

from examples.capimagine.chains import Chain, load
from examples.capimagine.resuming import ExactResume, last_whole
from examples.capimagine.training_data import Collator, dataset, direct, learned_text, unopened
from imaginelens.hooks.errors import InputError
from imaginelens.hooks.families import FAMILIES
from imaginelens.hooks.loading import load_model
from imaginelens.hooks.processors import load_processor
from imaginelens.organisms import checkpoint

# the projections of the language model; those of the vision tower have the same names
ADAPTED = r".*language_model.*\.(q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj)"
PROCESSOR_FILES = (
    *("processor_config.json", "preprocessor_config.json", "video_preprocessor_config.json"),
    *("chat_template.json", "chat_template.jinja", "tokenizer.json", "tokenizer_config.json"),
    *("special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt"),
)
# what may differ between a run and its continuation
FREE = ("resume", "settings", "dry_run", "gpus", "workers", "keep", "data", "out", "eval")


# -- options -------------------------------------------------------------------------------------


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line; a `--settings` file gives the defaults of the options it names."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("data", type=Path, nargs="?", help="chains.jsonl")
    add("--model", default="Qwen/Qwen2.5-VL-7B-Instruct", help="folder, Hub id, or organism")
    add("--out", type=Path, help="folder of the run")
    add("--eval", type=Path, help="chains to choose the best checkpoint by")
    add("--best", choices=["loss", "accuracy"], default="loss", help="of --eval")
    add("--eval-limit", type=int, default=256, help="chains of --eval that are used")
    add("--direct", action="store_true", help="learn the answer alone: the control")
    add("--lora", type=int, default=0, metavar="R", help="adapters of rank R; 0 trains all")
    add("--updates", type=int, default=0, help="optimizer steps; 0 goes by --epochs")
    add("--epochs", type=float, default=4, help="Monet's default; the paper does not say")
    add("--batch", type=int, default=128, help="examples per update, over all GPUs (the paper's)")
    add("--per-device", type=int, default=1, help="examples a GPU sees at once (the paper's)")
    add("--lr", type=float, help="default 1e-5 (Monet's), with --lora 1e-4 (ours)")
    add("--warmup", type=int, default=10, help="updates (Monet's default)")
    add("--weight-decay", type=float, default=0.01, help="Monet's default")
    add("--schedule", default="linear", help="of the learning rate (Monet's default)")
    add("--seed", type=int, default=42, help="Monet's default")
    add("--save-every", type=int, default=250, help="updates (Monet's default)")
    add("--keep", type=int, default=2, help="checkpoints kept, and the best one")
    add("--log-every", type=int, default=10, help="updates")
    add("--checkpointing", action=argparse.BooleanOptionalAction, default=True)
    add("--per-picture", type=int, default=1280, help="visual tokens (Monet's default)")
    add("--per-sample", type=int, default=2000, help="visual tokens (Monet's default)")
    add("--workers", type=int, default=4 if torch.cuda.is_available() else 0)
    add("--resume", action="store_true", help="go on from the last whole checkpoint, if any")
    add("--settings", type=Path, help="TOML file of options, which the command line overrides")
    add("--dry-run", action="store_true", help="print what a run would take, and do nothing")
    add("--gpus", type=int, default=8, help="for --dry-run")
    options = parser.parse_args(arguments)
    if options.settings:
        defaults = tomllib.loads(options.settings.read_text())
        if unknown := sorted(set(defaults) - set(vars(options))):
            parser.error(f"{options.settings} sets {', '.join(unknown)}, which is no option")
        parser.set_defaults(**defaults)
        options = parser.parse_args(arguments)
    if options.lr is None:
        options.lr = 1e-4 if options.lora else 1e-5
    if not options.dry_run and (options.data is None or options.out is None):
        parser.error("a training needs the chains and --out")
    return options


def accumulation(*, batch: int, per_device: int, processes: int) -> int:
    """How many batches of every process make one update.

    Raises:
        InputError: the processes cannot share the global batch evenly.

    >>> accumulation(batch=128, per_device=1, processes=8)
    16
    """
    at_once = per_device * processes
    if at_once < 1 or batch % at_once or not batch:
        raise InputError(
            f"a global batch of {batch} is not a multiple of {per_device} per device x {processes} "
            f"processes = {at_once}; choose --batch or --per-device so that it is"
        )
    return batch // at_once


def settled(options: argparse.Namespace) -> dict[str, Any]:
    """What decides the course of a training, as `run.json` keeps it."""
    kept = {key: value for key, value in vars(options).items() if key not in FREE}
    return kept | {"chains": options.data.name, "evaluated": bool(options.eval)}


def prepare_folder(options: argparse.Namespace) -> Path | None:
    """Find where to go on, and refuse to mix two trainings in one folder.

    Raises:
        InputError: there are checkpoints and no `--resume`, or they are of another training.
    """
    found = last_whole(options.out)
    if found is None:
        return None
    if not options.resume:
        raise InputError(f"{options.out} holds {found.name}; add --resume, or choose another --out")
    before = json.loads((options.out / "run.json").read_text())
    now = json.loads(json.dumps(settled(options)))
    other = [key for key in now if now[key] != before.get(key)]
    if other:
        told = ", ".join(f"{key} {before.get(key)!r}, now {now[key]!r}" for key in other)
        raise InputError(f"{options.out} was begun otherwise ({told}); choose another --out")
    return found


def read_chains(options: argparse.Namespace) -> tuple[list[Chain], list[Chain]]:
    """The chains to learn and those to choose by, stripped of imagination if `--direct` asks so.

    Raises:
        InputError: those to choose by lack the imagination that is learned.
    """
    strip = direct if options.direct else (lambda chain: chain)
    learned = [strip(chain) for chain in load(options.data)]
    chosen_by = [strip(c) for c in load(options.eval)[: options.eval_limit]] if options.eval else []
    imagine = any(chain.imagined for chain in learned)
    if options.best == "loss" and chosen_by and imagine != any(c.imagined for c in chosen_by):
        raise InputError(
            f"the chains of {options.data} and those of {options.eval} do not both imagine, so the "
            "loss of one says nothing about the other; choose by --best accuracy, or hold out some "
            "of the chains"
        )
    return learned, chosen_by


# -- model and trainer ---------------------------------------------------------------------------


def source_of(name: str) -> str | Path:
    """A shipped organism's folder, or what was named."""
    return checkpoint.folder(name) if name in checkpoint.available() else name


def open_model(name: str, *, lora: bool) -> PreTrainedModel:
    """Open the model to train, its vision tower frozen.

    All-parameter training keeps float32 weights and computes in bfloat16; DeepSpeed keeps them
    itself. Under adapters the model is frozen, so bfloat16 will do. On a CPU all is float32.
    """
    engine = os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true"
    half = torch.cuda.is_available() and (lora or engine)
    model = load_model(source_of(name), dtype=torch.bfloat16 if half else torch.float32)
    tower = getattr(model.base_model, "visual", None)
    if tower is None:
        raise InputError(f"{type(model).__name__} has no `visual` to freeze; train a Qwen-VL model")
    tower.requires_grad_(False)
    return model


def make_room(model: PreTrainedModel, processor: Any, chains: Sequence[Chain]) -> None:
    """Let the model write twice as much as the longest reply, where it stops itself earlier.

    An organism writes 16 tokens at most, and would be cut before it answers.
    """
    limit = model.generation_config.max_new_tokens
    if limit is not None:
        texts = ["".join(p for p in chain.reply if isinstance(p, str)) for chain in chains]
        longest = max(map(len, processor.tokenizer(texts, add_special_tokens=False).input_ids))
        model.generation_config.max_new_tokens = max(limit, 2 * longest)


def adapters(rank: int) -> Any:
    """LoRA on the language model's projections; alpha 2 x rank and no dropout are ours."""
    from peft import LoraConfig

    return LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=ADAPTED, task_type="CAUSAL_LM")


def trainer_arguments(options: argparse.Namespace, *, processes: int) -> Any:
    """The options as TRL takes them."""
    from trl import SFTConfig

    share = accumulation(batch=options.batch, per_device=options.per_device, processes=processes)
    cuda = torch.cuda.is_available()
    # FSDP has its own checkpointing, in the configuration of accelerate, and refuses two
    saves_memory = options.checkpointing and os.environ.get("ACCELERATE_USE_FSDP") != "true"
    # transformers 5.23 has renamed it
    name = next(n for n in ("activation", "gradient") if hasattr(SFTConfig, f"{n}_checkpointing"))
    memory: dict[str, Any] = {f"{name}_checkpointing": saves_memory}
    if saves_memory:
        memory[f"{name}_checkpointing_kwargs"] = {"use_reentrant": False}
    evaluates: dict[str, Any] = {}
    if options.eval:
        evaluates = {
            "eval_strategy": "steps",
            "eval_steps": options.save_every,
            "per_device_eval_batch_size": max(options.per_device, 1),
            "load_best_model_at_end": True,
            "metric_for_best_model": f"eval_{options.best}",
            "greater_is_better": options.best == "accuracy",
        }
    return SFTConfig(
        output_dir=str(options.out),
        max_steps=options.updates or -1,
        num_train_epochs=options.epochs,
        per_device_train_batch_size=options.per_device,
        gradient_accumulation_steps=share,
        learning_rate=options.lr,
        warmup_steps=options.warmup,
        weight_decay=options.weight_decay,
        lr_scheduler_type=options.schedule,
        optim="adamw_torch_fused",
        bf16=cuda,
        use_cpu=not cuda,
        save_strategy="steps",
        save_steps=options.save_every,
        save_total_limit=options.keep,
        logging_steps=options.log_every,
        seed=options.seed,
        data_seed=options.seed,
        dataloader_num_workers=options.workers,
        dataloader_pin_memory=cuda,
        remove_unused_columns=False,
        max_length=None,  # cutting a sample would cut its image tokens
        ddp_find_unused_parameters=False,
        report_to=[],
        disable_tqdm=True,
        **memory,
        **evaluates,
    )


@dataclass(frozen=True)
class Answering:
    """Scores free answers, for `--best accuracy`: rows of `dataset`, and what is right."""

    rows: Any
    answers: list[str]
    collator: Collator
    batch: int = 32
    new_tokens: int = 1024

    @torch.no_grad()
    def right(self, model: PreTrainedModel, *, process: int = 0, processes: int = 1) -> int:
        """How many of this process's share of the rows the model answers rightly, greedily."""
        tokenizer = self.collator.processor.tokenizer
        find = FAMILIES["capimagine"].answer
        assert find is not None
        greedy = GenerationConfig(
            do_sample=False,
            max_new_tokens=self.new_tokens,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
        mine = range(process, len(self.answers), processes)
        hits = 0
        for begin in range(0, len(mine), self.batch):
            rows = mine[begin : begin + self.batch]
            prompts = self.collator.prompts([self.rows[row] for row in rows])
            prompts = {key: held.to(model.device) for key, held in prompts.items()}
            asked = prompts["input_ids"].shape[1]
            said = model.generate(**prompts, generation_config=greedy)[:, asked:]
            for row, tokens in zip(rows, said, strict=True):
                text = tokenizer.decode(tokens)
                found = find(text)
                hits += found is not None and text[slice(*found)].strip() == self.answers[row]
        return hits


def make_trainer(options: argparse.Namespace, *, processes: int) -> Any:
    """Everything a training needs, ready for `.train()`.

    Raises:
        InputError: the chains, the model or the options do not fit each other.
    """
    from trl import SFTTrainer

    class Trainer(ExactResume, SFTTrainer):
        answering: Answering | None = None

        def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
            metrics: dict[str, float] = super().evaluate(*args, **kwargs)
            if self.answering:
                self.model.eval()
                process, share = self.args.process_index, self.args.world_size
                right = self.answering.right(self.model, process=process, processes=share)
                total = self.accelerator.reduce(
                    torch.tensor(float(right), device=self.args.device), reduction="sum"
                )
                metrics["eval_accuracy"] = total.item() / len(self.answering.answers)
                self.log({"eval_accuracy": metrics["eval_accuracy"]})
            return metrics

    chains, held_out = read_chains(options)
    processor = load_processor(source_of(options.model))
    collator = Collator(
        processor=processor, per_picture=options.per_picture, per_sample=options.per_sample
    )
    rows = unopened(dataset(chains))
    model = open_model(options.model, lora=bool(options.lora))
    make_room(model, processor, chains)
    trainer = Trainer(
        model=model,
        args=trainer_arguments(options, processes=processes),
        train_dataset=rows,
        eval_dataset=unopened(dataset(held_out)) if held_out else None,
        processing_class=processor,
        data_collator=collator,
        peft_config=adapters(options.lora) if options.lora else None,
    )
    # transformers 5.23 says that Qwen2.5-VL's loss takes no count of tokens, and then averages the
    # means of accumulated batches; TRL's loss does take it, so that every token weighs alike
    trainer.model_accepts_loss_kwargs = True
    if os.environ.get("ACCELERATE_USE_FSDP") == "true" and not trainer.is_fsdp_enabled:
        raise InputError(
            "accelerate was asked for FSDP and made plain data parallelism of it, as it does "
            "without a GPU; use a machine with GPUs, or another configuration"
        )
    if options.best == "accuracy":
        if not held_out or trainer.is_fsdp_enabled:
            raise InputError("--best accuracy needs --eval, and a model that is not sharded")
        trainer.answering = Answering(
            unopened(dataset(held_out)), [chain.answer for chain in held_out], collator
        )
    if trainer.is_world_process_zero():
        print(f"learned of {rows[0]['id']}: {learned_text(collator([rows[0]]), 0, processor)!r}")
    return trainer


def save_model(trainer: Any, options: argparse.Namespace) -> Path:
    """Write the model where `il.load` and transformers open it, adapters merged into it."""
    target = Path(options.out) / "model"
    if options.lora and not trainer.is_fsdp_enabled:
        if trainer.is_world_process_zero():
            merged = trainer.accelerator.unwrap_model(trainer.model).merge_and_unload()
            merged.save_pretrained(target)
    else:
        trainer.save_model(str(target))
    if trainer.is_world_process_zero():
        copy_processor(source_of(options.model), target)
    trainer.accelerator.wait_for_everyone()
    return target


def copy_processor(source: str | Path, target: Path) -> None:
    """Copy the files of a processor as they are: saved again without torchvision, it would lose the
    part that reads videos."""
    for name in PROCESSOR_FILES:
        found = cached_file(str(source), name, _raise_exceptions_for_missing_entries=False)
        if found:
            shutil.copyfile(found, target / name)
        else:
            (target / name).unlink(missing_ok=True)


def train(options: argparse.Namespace) -> Path:
    """Train, or go on training, to the end; gives the folder of the model.

    Raises:
        InputError: as `prepare_folder` and `make_trainer`.
    """
    resumed = prepare_folder(options)
    trainer = make_trainer(options, processes=int(os.environ.get("WORLD_SIZE", "1")))
    if trainer.is_world_process_zero():
        options.out.mkdir(parents=True, exist_ok=True)
        if resumed is None:
            text = json.dumps(settled(options), indent=2, default=str)
            (options.out / "run.json").write_text(text + "\n")
        print(f"from {resumed.name}" if resumed else "from the start", flush=True)
    trainer.train(resume_from_checkpoint=str(resumed) if resumed else None)
    trainer.save_state()
    return save_model(trainer, options)


def main(arguments: Sequence[str] | None = None) -> None:
    options = parse(arguments)
    try:
        if options.dry_run:
            from examples.capimagine.cost import describe

            print(describe(options))
            return
        print(f"saved in {train(options)}")
    except (InputError, OSError) as error:
        raise SystemExit(str(error)) from error


if __name__ == "__main__":
    main()
