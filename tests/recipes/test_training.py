"""Training of the CapImagine recipe: what is learned, exact resuming, what it would cost."""

import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoModelForImageTextToText,
    PreTrainedTokenizerFast,
    Qwen2_5_VLProcessor,
)
from transformers.models.qwen2_5_vl import modeling_qwen2_5_vl
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

import imaginelens as il
from examples.capimagine import cost
from examples.capimagine.chains import Chain, Picture, save
from examples.capimagine.phrasing import caption
from examples.capimagine.resuming import last_whole, load_weights
from examples.capimagine.train import (
    Answering,
    accumulation,
    make_trainer,
    open_model,
    parse,
    train,
    trainer_arguments,
)
from examples.capimagine.training_data import (
    IGNORED,
    Collator,
    dataset,
    direct,
    learned_text,
    unopened,
    within,
)
from imaginelens.hooks.errors import CheckpointError, InputError
from imaginelens.hooks.processors import image_only
from imaginelens.organisms import checkpoint, hunt
from imaginelens.organisms.organism import example

ROOT = Path(__file__).parents[2]
CONFIGS = ROOT / "examples/capimagine/configs"
VISION = ("<|vision_start|>", "<|image_pad|>", "<|vision_end|>")
pytestmark = [
    # the processes of a fork of a process with threads, which is what `datasets` has
    pytest.mark.filterwarnings("ignore:.*multi-threaded:DeprecationWarning"),
]


# -- chains and processors -----------------------------------------------------------------------


def chain_of(game: hunt.Hunt, number: int, folder: Path) -> Chain:
    """A hunt as the recipe rewrites it: two captions, each phrased in a way of its own."""
    (folder / "images").mkdir(parents=True, exist_ok=True)
    game.image().save(folder / f"images/{number}.png", compress_level=1)
    said = []
    for name in game.path[1:]:
        card = (name, game.follow(name, 1)[-1], game.shape_of(name))
        how = zlib.crc32(" ".join((*game.names, *card)).encode())
        said.append(f"<think_image> {caption(*card, how=how)} </think_image>")
    return Chain(
        id=f"hunt/{number}",
        subset="hunts",
        folder=folder,
        prompt=(Picture(f"images/{number}.png"), game.question),
        reply=(" ".join([*said, game.answer]),),
        answer=game.answer,
    )


def write_hunts(path: Path, n: int, *, seed: int = 0, hops: int = 2) -> Path:
    games = hunt.sample(n, hops=hops, seed=seed)
    save([chain_of(game, i, path.parent) for i, game in enumerate(games)], path)
    return path


def qwen_processor() -> Any:
    """Qwen2.5-VL's processor with its own chat template and one token per byte."""
    special = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|video_pad|>", *VISION)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(models.BPE({c: i for i, c in enumerate([*special, *alphabet])}, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        additional_special_tokens=[s for s in special if s not in ("<|im_end|>", "<|endoftext|>")],
    )
    trl = importlib.util.find_spec("trl")
    assert trl is not None
    assert trl.submodule_search_locations
    template = Path(trl.submodule_search_locations[0]) / "chat_templates/qwen2_5_vl.jinja"
    return image_only(Qwen2_5_VLProcessor)(
        image_processor=Qwen2VLImageProcessorPil(
            size={"shortest_edge": 28 * 28, "longest_edge": 28 * 28 * 64}
        ),
        tokenizer=tokenizer,
        chat_template=template.read_text(),
    )


# -- what is learned -----------------------------------------------------------------------------


def a_chain(folder: Path, prompt: Sequence[Any], reply: Sequence[Any], system: str = "") -> Chain:
    for part in (*prompt, *reply):
        if isinstance(part, Picture):
            Image.new("RGB", (56, 28 * (1 + len(part.path) % 3)), "red").save(folder / part.path)
    return Chain(
        id="one",
        subset="s",
        folder=folder,
        prompt=tuple(prompt),
        reply=tuple(reply),
        answer="bar",
        system=system,
    )


A, B, C = Picture("a.png"), Picture("bb.png"), Picture("ccc.png")
SAMPLES = {
    "text": (["which?"], ["a bar"], ""),
    "picture": ([A, "which?"], ["<think_image> a bar </think_image>\n\\boxed{bar}"], ""),
    "system": ([A, "which?"], ["a bar"], "You are kind."),
    "pictures": ([A, "and", B, "or", C, "which?"], ["first line\n\n second line \n"], "Be brief."),
    "words as in a template": (["assistant\nsay:"], ["user\nsystem\nassistant\n bar \u2028é"], ""),
    "pictures in the reply": ([A, "which?"], ["I look: ", B, "closer ", C, " so bar"], "Be kind."),
    "a picture ends the reply": (["which?"], ["look", A], ""),
}


def expected(ids: list[int], tokenizer: Any) -> list[int]:
    """Which tokens are to be learned, found by reading a chat from left to right.

    Learn from behind `<|im_start|>assistant` and a new line up to `<|im_end|>`, unless a token is
    one of vision.
    """
    tokens = [tokenizer.decode([i]) for i in ids]
    opener = ["<|im_start|>", *"assistant\n"]
    labels = []
    speaking = False
    for at, token in enumerate(tokens):
        labels.append(ids[at] if speaking and token not in VISION else IGNORED)
        if token == "<|im_end|>":
            speaking = False
        if tokens[max(0, at + 1 - len(opener)) : at + 1] == opener:
            speaking = True
    return labels


def check_labels(batch: dict[str, torch.Tensor], chains: Sequence[Chain], processor: Any) -> None:
    """Compare every token and every label of a batch with what the chat says."""
    tokenizer = processor.tokenizer
    grids = batch.get("image_grid_thw", torch.zeros(0, 3))
    counts = iter((grids.prod(1) // 4).int().tolist())
    for row, chain in enumerate(chains):
        whole = batch["attention_mask"][row].bool()
        ids = batch["input_ids"][row][whole].tolist()
        chat = processor.apply_chat_template(chain.messages(), tokenize=False)
        head, *rest = chat.split(VISION[1])
        written = head + "".join(VISION[1] * next(counts) + piece for piece in rest)
        assert ids == tokenizer(written, add_special_tokens=False).input_ids
        assert batch["labels"][row][whole].tolist() == expected(ids, tokenizer)
        assert (batch["labels"][row][~whole] == IGNORED).all()
        said = "".join(part for part in chain.reply if isinstance(part, str))
        assert learned_text(batch, row, processor) == said + "<|im_end|>"


@pytest.mark.parametrize("name", SAMPLES)
def test_the_reply_and_the_end_of_its_turn_are_learned_and_nothing_else(
    tmp_path: Path, name: str
) -> None:
    prompt, reply, system = SAMPLES[name]
    chain = a_chain(tmp_path, prompt, reply, system)
    processor = qwen_processor()
    rows = unopened(dataset([chain]))
    check_labels(Collator(processor=processor)([rows[0]]), [chain], processor)


@pytest.mark.parametrize("shown", [False, True])
def test_labels_of_a_batch_of_unequal_rows(tmp_path: Path, shown: bool) -> None:
    chains = [
        a_chain(tmp_path, prompt, reply, system)
        for prompt, reply, system in SAMPLES.values()
        if shown or not any(isinstance(part, Picture) for part in reply)
    ]
    processor = qwen_processor()
    rows = dataset(chains)
    assert ("messages" in rows.column_names) == shown
    batch = Collator(processor=processor)([rows[i] for i in range(len(rows))])
    check_labels(batch, chains, processor)
    lazily = unopened(rows)
    again = Collator(processor=processor)([lazily[i] for i in range(len(rows))])
    assert all(torch.equal(batch[key], again[key]) for key in batch)


def test_the_check_of_labels_finds_planted_faults(tmp_path: Path) -> None:
    chain = a_chain(tmp_path, *SAMPLES["pictures in the reply"])
    processor = qwen_processor()
    batch = Collator(processor=processor)([dataset([chain])[0]])
    check_labels(batch, [chain], processor)
    learned = batch["labels"] != IGNORED
    first, last = learned[0].nonzero()[0], learned[0].nonzero()[-1]
    image = batch["input_ids"] == processor.tokenizer.convert_tokens_to_ids(VISION[1])
    faults = {
        "a token of the prompt": first - 1,
        "the new line behind the end": last + 1,
        "an image token": image[0].nonzero()[-1],
    }
    for fault, at in faults.items():
        wrong = {**batch, "labels": batch["labels"].clone()}
        wrong["labels"][0, at] = batch["input_ids"][0, at]
        with pytest.raises(AssertionError):
            check_labels(wrong, [chain], processor)
        assert not torch.equal(wrong["labels"], batch["labels"]), fault
    for at in (first, last):
        wrong = {**batch, "labels": batch["labels"].clone()}
        wrong["labels"][0, at] = IGNORED
        with pytest.raises(AssertionError):
            check_labels(wrong, [chain], processor)


def test_trl_would_learn_the_pictures_of_a_reply(tmp_path: Path) -> None:
    """Why `Collator` is ours. If this fails, TRL has changed: see whether ours can go."""
    from trl.chat_template_utils import get_training_chat_template
    from trl.trainer.sft_trainer import DataCollatorForVisionLanguageModeling

    chain = a_chain(tmp_path, *SAMPLES["pictures in the reply"])
    processor = qwen_processor()
    stock = DataCollatorForVisionLanguageModeling(
        processor=processor,
        assistant_only_loss=True,
        chat_template=get_training_chat_template(processor),
    )
    batch = stock([dataset([chain])[0]])
    assert VISION[1] in learned_text(batch, 0, processor)
    with pytest.raises(AssertionError):
        check_labels(batch, [chain], processor)


def test_in_the_prompt_trl_and_we_give_the_model_the_same(tmp_path: Path) -> None:
    from trl.trainer.sft_trainer import DataCollatorForVisionLanguageModeling

    chains = [a_chain(tmp_path, *SAMPLES[name]) for name in ("picture", "pictures", "system")]
    processor = qwen_processor()
    rows = dataset(chains)
    ours = Collator(processor=processor)([rows[i] for i in range(3)])
    stock = DataCollatorForVisionLanguageModeling(processor=processor, completion_only_loss=True)
    theirs = stock([rows[i] for i in range(3)])
    width = ours["input_ids"].shape[1]
    for key in ("input_ids", "attention_mask", "mm_token_type_ids"):
        assert torch.equal(ours[key], theirs[key][:, :width]), key
    assert torch.equal(ours["pixel_values"], theirs["pixel_values"])
    # theirs also learns the new line behind the end
    assert ((ours["labels"] != theirs["labels"][:, :width]).sum(1) == 1).all()


def test_an_organism_learns_words_of_its_own(tmp_path: Path) -> None:
    processor = checkpoint.build_processor(latent=False)
    game = hunt.sample(1, hops=2, seed=3)[0]
    chain = chain_of(game, 0, tmp_path)
    collator = Collator(processor=processor)
    batch = collator([dataset([chain])[0]])
    assert learned_text(batch, 0, processor).split() == [*chain.reply[0].split(), "<|im_end|>"]
    only = collator([dataset([direct(chain)])[0]])
    assert learned_text(only, 0, processor).split() == [game.answer, "<|im_end|>"]
    asked = collator.prompts([dataset([chain])[0]])
    begin = asked["input_ids"].shape[1]
    assert torch.equal(batch["input_ids"][:, :begin], asked["input_ids"])
    assert (batch["labels"][:, :begin] == IGNORED).all()
    strange = Chain(**{**vars(chain), "reply": ("a purple ring",)})
    with pytest.raises(InputError, match="words that the tokenizer does not know"):
        collator([dataset([strange])[0]])


def test_what_cannot_be_learned_is_refused(tmp_path: Path) -> None:
    chain = a_chain(tmp_path, *SAMPLES["picture"])
    with pytest.raises(InputError, match="there is no chain"):
        dataset([])
    with pytest.raises(InputError, match="'one' has an empty reply"):
        dataset([Chain(**{**vars(chain), "reply": ("",)})])
    with pytest.raises(InputError, match=r"'one' shows no\.png, which is not at"):
        dataset([Chain(**{**vars(chain), "prompt": (Picture("no.png"),)})])
    row = dataset([chain])[0]
    processor = qwen_processor()
    stock = processor.chat_template
    processor.chat_template = stock + "{% if not add_generation_prompt %}{% endif %}"
    Collator(processor=processor)([row])
    processor.chat_template = "{% if add_generation_prompt %}Go on: {% endif %}" + stock
    with pytest.raises(InputError, match="in one way to ask and in another with the reply"):
        Collator(processor=processor)([row])
    processor.chat_template = stock.replace("<|im_end|>", "<|endoftext|>")
    with pytest.raises(InputError, match="would never learn to stop"):
        Collator(processor=processor)([row])
    shown = dataset([a_chain(tmp_path, *SAMPLES["pictures in the reply"])])[0]
    processor.chat_template = stock
    with pytest.raises(InputError, match="cannot be written by a model of words"):
        Collator(processor=processor).prompts([shown])


def test_pictures_shrink_to_their_budget_and_keep_their_form() -> None:
    big, small = Image.new("RGB", (2800, 1400)), Image.new("RGB", (280, 280))
    assert within([small], per_picture=10, per_sample=100, side=28) == [small]
    first, second = within([big, small], per_picture=1280, per_sample=1000, side=28)
    assert first.width / first.height == pytest.approx(2, rel=0.01)
    tokens = [picture.width * picture.height / 28**2 for picture in (first, second)]
    assert sum(tokens) == pytest.approx(1000, rel=0.01)
    assert tokens[0] / tokens[1] == pytest.approx(1280 / 100, rel=0.02)
    assert within([], per_picture=1, per_sample=1, side=28) == []


# -- options -------------------------------------------------------------------------------------


def arguments_of(data: Path, out: Path, *more: str) -> list[str]:
    small = ("--model", "base", "--batch", "8", "--per-device", "8", "--lr", "2e-3")
    every = ("--log-every", "1", "--no-checkpointing")
    return [str(data), "--out", str(out), *small, *every, *more]


def options_of(data: Path, out: Path, *more: str) -> Any:
    return parse(arguments_of(data, out, *more))


def test_the_global_batch_is_shared_out_or_refused() -> None:
    assert accumulation(batch=128, per_device=1, processes=8) == 16
    assert accumulation(batch=128, per_device=2, processes=1) == 64
    for wrong in ((128, 3, 1), (4, 1, 8), (0, 1, 1)):
        with pytest.raises(InputError, match="is not a multiple of"):
            accumulation(**dict(zip(("batch", "per_device", "processes"), wrong, strict=True)))


def test_defaults_are_those_of_monet(tmp_path: Path) -> None:
    options = parse([str(tmp_path / "c.jsonl"), "--out", str(tmp_path)])
    made = trainer_arguments(options, processes=8)
    assert (made.learning_rate, made.warmup_steps, made.weight_decay) == (1e-5, 10, 0.01)
    assert (made.lr_scheduler_type, made.optim) == ("linear", "adamw_torch_fused")
    assert (made.seed, made.save_steps, made.gradient_checkpointing) == (42, 250, True)
    assert made.per_device_train_batch_size * made.gradient_accumulation_steps * 8 == 128
    assert made.max_length is None
    assert made.bf16 == torch.cuda.is_available()
    assert parse(["c", "--out", "o", "--lora", "8"]).lr == 1e-4


def test_settings_are_defaults_that_the_command_line_overrides(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = tmp_path / "s.toml"
    settings.write_text('model = "base"\nlr = 0.5\nbatch = 2\n')
    read = parse(["c", "--out", "o", "--settings", str(settings), "--batch", "4"])
    assert (read.model, read.lr, read.batch) == ("base", 0.5, 4)
    settings.write_text("learning = 1\n")
    with pytest.raises(SystemExit):
        parse(["c", "--out", "o", "--settings", str(settings)])
    assert "sets learning, which is no option" in capsys.readouterr().err
    for shipped in CONFIGS.glob("*.toml"):
        parse(["c", "--out", "o", "--settings", str(shipped)])


def test_a_loss_without_imagination_does_not_choose_between_models_that_imagine(
    tmp_path: Path,
) -> None:
    data = write_hunts(tmp_path / "chains.jsonl", 4)
    bare = tmp_path / "bare.jsonl"
    games = hunt.sample(2, hops=2, seed=9)
    save([direct(chain_of(game, 50 + i, tmp_path)) for i, game in enumerate(games)], bare)
    with pytest.raises(InputError, match="do not both imagine"):
        make_trainer(options_of(data, tmp_path / "out", "--eval", str(bare)), processes=1)
    make_trainer(options_of(data, tmp_path / "out", "--eval", str(bare), "--direct"), processes=1)


def test_fsdp_that_became_something_else_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = write_hunts(tmp_path / "chains.jsonl", 8)
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(InputError, match="asked for FSDP and made plain data parallelism"):
        make_trainer(options_of(data, tmp_path / "out"), processes=1)


# -- training ------------------------------------------------------------------------------------


def losses(out: Path) -> dict[int, float]:
    history = json.loads((out / "trainer_state.json").read_text())["log_history"]
    return {entry["step"]: entry["loss"] for entry in history if "loss" in entry}


def first_gradients(options: Any) -> tuple[float, dict[str, torch.Tensor]]:
    """Loss and gradients of the first update, in float64."""
    from transformers import TrainerCallback

    found: dict[str, torch.Tensor] = {}

    class Keep(TrainerCallback):
        def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kw: Any) -> None:
            weights = kw["model"].named_parameters()
            found.update({n: w.grad.clone() for n, w in weights if w.grad is not None})

    trainer = make_trainer(options, processes=1)
    trainer.model.double()
    trainer.add_callback(Keep())
    trainer.args.max_grad_norm = 0.0
    trainer.train()
    return trainer.state.log_history[0]["loss"], found


def test_accumulated_gradients_are_those_of_the_big_batch(tmp_path: Path) -> None:
    games = hunt.sample(8, hops=2, seed=0)
    chains = [chain_of(game, i, tmp_path) for i, game in enumerate(games)]
    # replies of unequal length, so that a mean of means is not the mean
    chains[::3] = [direct(chain) for chain in chains[::3]]
    save(chains, tmp_path / "chains.jsonl")

    def run(per_device: str) -> tuple[float, dict[str, torch.Tensor]]:
        more = ("--updates", "1", "--per-device", per_device)
        return first_gradients(options_of(tmp_path / "chains.jsonl", tmp_path / per_device, *more))

    whole, at_once = run("8")
    parts, in_parts = run("2")
    assert parts == pytest.approx(whole, abs=1e-6)
    assert len(at_once) == len(in_parts) > 30
    size = torch.stack([gradient.norm() for gradient in at_once.values()]).norm()
    assert not any("visual" in name for name in at_once)
    for name, gradient in at_once.items():
        # TRL takes the logarithms in float32
        assert (in_parts[name] - gradient).norm() <= 1e-6 * size, name


KILLED_WHILE_SAVING = """
import os, signal, sys
from transformers import Trainer
from examples.capimagine.train import parse, train

stock = Trainer._save_optimizer_and_scheduler

def saved(self, folder):
    if self.state.global_step == 6:  # weights are written, nothing else is
        os.kill(os.getpid(), signal.SIGKILL)
    stock(self, folder)

Trainer._save_optimizer_and_scheduler = saved
train(parse(sys.argv[1:]))
"""


def killed_while_saving(arguments: Sequence[str]) -> "subprocess.CompletedProcess[str]":
    """Train in a process of its own, which is killed within the save of step 6."""
    return subprocess.run(
        [sys.executable, "-c", KILLED_WHILE_SAVING, *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )


@pytest.mark.parametrize(
    "more", [(), pytest.param(("--lora", "4"), marks=pytest.mark.slow)], ids=["all", "lora"]
)
def test_killed_and_resumed_is_the_same_as_never_killed(
    tmp_path: Path, more: tuple[str, ...]
) -> None:
    data = write_hunts(tmp_path / "chains.jsonl", 40)
    more = (*more, "--updates", "9", "--save-every", "3", "--warmup", "2")
    train(options_of(data, tmp_path / "whole", *more))
    broken = options_of(data, tmp_path / "broken", *more)
    killed = killed_while_saving(arguments_of(data, tmp_path / "broken", *more))
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    held = sorted(path.name for path in (tmp_path / "broken").glob("checkpoint-*"))
    assert held == ["checkpoint-3", "checkpoint-6"]  # the second one is torn
    found = last_whole(tmp_path / "broken")
    assert found is not None
    assert found.name == "checkpoint-3"
    with pytest.raises(InputError, match="holds checkpoint-3; add --resume"):
        train(broken)
    with pytest.raises(InputError, match=r"begun otherwise \(lr 0\.002, now 0\.1"):
        train(options_of(data, tmp_path / "broken", *more, "--resume", "--lr", "0.1"))
    train(options_of(data, tmp_path / "broken", *more, "--resume"))
    whole, resumed = losses(tmp_path / "whole"), losses(tmp_path / "broken")
    assert list(resumed) == list(whole) == list(range(1, 10))
    assert resumed == pytest.approx(whole, abs=1e-6)
    assert whole[9] < whole[1] - 0.5
    one = load_file(tmp_path / "whole/model/model.safetensors")
    two = load_file(tmp_path / "broken/model/model.safetensors")
    assert one.keys() == two.keys()
    assert all(torch.allclose(one[name], two[name], atol=1e-6) for name in one)


def trained(tmp_path: Path) -> tuple[Any, Path]:
    """A trainer with the first weights, and a checkpoint of one that has trained."""
    data = write_hunts(tmp_path / "chains.jsonl", 16)
    train(options_of(data, tmp_path / "run", "--updates", "2", "--save-every", "2"))
    return make_trainer(options_of(data, tmp_path / "other"), processes=1), (
        tmp_path / "run/checkpoint-2"
    )


def test_resuming_and_choosing_load_weights_which_the_stock_trainer_does_not(
    tmp_path: Path,
) -> None:
    from transformers import Trainer, __version__

    trainer, saved = trained(tmp_path)
    wanted = open_model(str(saved), lora=False).state_dict()
    begun = {name: weight.clone() for name, weight in trainer.model.state_dict().items()}
    differ = [name for name in wanted if not torch.equal(wanted[name], begun[name])]
    assert len(differ) > 30
    trainer.state.best_model_checkpoint = str(saved)
    for method, arguments in (("_load_from_checkpoint", [str(saved)]), ("_load_best_model", [])):
        getattr(Trainer, method)(trainer, *arguments)
        now = trainer.model.state_dict()
        if not all(torch.equal(now[name], begun[name]) for name in begun):
            pytest.fail(
                f"transformers {__version__} loads weights in Trainer.{method} where 5.23 does "
                "not: see whether all are loaded; then ExactResume can go"
            )
        getattr(trainer, method)(*arguments)
        now = trainer.model.state_dict()
        assert all(torch.equal(now[name], wanted[name]) for name in wanted)
        trainer.model.load_state_dict(begun)


def test_weights_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    trainer, saved = trained(tmp_path)
    numbers = json.loads((saved / "config.json").read_text())
    numbers["text_config"]["num_hidden_layers"] = 4
    numbers["text_config"]["layer_types"].append("full_attention")
    (saved / "config.json").write_text(json.dumps(numbers))
    with pytest.raises(CheckpointError, match=r"missing keys, the first is .*layers\.3"):
        load_weights(trainer.model, saved)


def test_a_torn_state_is_no_checkpoint(tmp_path: Path) -> None:
    assert last_whole(tmp_path) is None
    for step, text in ((2, '{"global_step": 2}'), (4, '{"global_st'), (6, '{"global_step": 2}')):
        (tmp_path / f"checkpoint-{step}").mkdir()
        (tmp_path / f"checkpoint-{step}" / "trainer_state.json").write_text(text)
    (tmp_path / "checkpoint-10").mkdir()
    (tmp_path / "checkpoint-last").mkdir()
    assert last_whole(tmp_path) == tmp_path / "checkpoint-2"


def test_the_best_model_is_kept_by_free_answers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = write_hunts(tmp_path / "chains.jsonl", 16)
    scores = iter([1, 3, 2])  # the second is best
    monkeypatch.setattr(Answering, "right", lambda *a, **k: next(scores))
    more = ("--eval", str(data), "--best", "accuracy", "--eval-limit", "4")
    out = tmp_path / "run"
    train(options_of(data, out, *more, "--updates", "6", "--save-every", "2"))
    state = json.loads((out / "trainer_state.json").read_text())
    assert state["best_metric"] == 0.75
    assert Path(state["best_model_checkpoint"]).name == "checkpoint-4"
    final = load_file(out / "model/model.safetensors")
    best = load_file(out / "checkpoint-4/model.safetensors")
    last = load_file(out / "checkpoint-6/model.safetensors")
    assert all(torch.equal(final[name], best[name]) for name in best)
    assert not all(torch.equal(final[name], last[name]) for name in last)


def test_free_answers_are_those_of_the_lens(tmp_path: Path) -> None:
    games = hunt.sample(24, hops=2, seed=4)
    chains = [chain_of(game, i, tmp_path) for i, game in enumerate(games)]
    text = checkpoint.folder("text")
    rows = unopened(dataset(chains))
    collator = Collator(processor=checkpoint.build_processor(latent=False))
    score = Answering(rows, [c.answer for c in chains], collator, batch=7, new_tokens=16)
    model = open_model(str(text), lora=False)
    lens = il.load("text")
    run = lens.run([example(game) for game in games])
    right = sum(a == game.answer for a, game in zip(run.answer, games, strict=True))
    assert score.right(model) == right
    assert 20 < right <= 24
    shares = [score.right(model, process=i, processes=3) for i in range(3)]
    assert sum(shares) == right


@pytest.mark.parametrize("more", [(), ("--lora", "4")], ids=["all", "lora"])
def test_what_was_trained_opens_here_and_in_transformers(
    tmp_path: Path, more: tuple[str, ...]
) -> None:
    data = write_hunts(tmp_path / "chains.jsonl", 16)
    folder = train(options_of(data, tmp_path / "run", "--updates", "3", *more))
    base = load_file(checkpoint.folder("base") / "model.safetensors")
    now = load_file(folder / "model.safetensors")
    assert base.keys() == now.keys()
    moved = {n for n in now if not torch.equal(now[n].float(), base[n].float())}
    assert moved
    assert not any("visual" in name for name in moved)
    if more:
        assert all(n.rsplit(".", 2)[1].endswith("_proj") for n in moved)
    stock, info = AutoModelForImageTextToText.from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    lens = il.load(folder, spec="capimagine", dtype=torch.float32)
    game = hunt.sample(1, hops=2, seed=8)[0]
    run = lens.run([example(game)])
    assert len(run.text) == 1
    weights = lens.model.state_dict()
    assert all(torch.equal(w.float(), weights[n]) for n, w in stock.state_dict().items())
    for name in ("preprocessor_config.json", "tokenizer.json", "chat_template.jinja"):
        kept = checkpoint.folder("base") / name
        assert (folder / name).read_bytes() == kept.read_bytes()
    assert not (folder / "processor_config.json").exists()
    assert not list(folder.glob("adapter_*"))


# -- what it would cost --------------------------------------------------------------------------


def test_the_shipped_numbers_are_those_of_qwen2_5_vl_7b() -> None:
    config = cost.read_config("Qwen/Qwen2.5-VL-7B-Instruct")
    sizes = cost.measure(config, rows=1, tokens=64, rank=8)
    assert sizes.all == 8_292_166_656  # the sizes of the published weights
    assert sizes.tower == 676_550_144
    assert sizes.adapters == 20_185_088
    zero, fsdp, lora = cost.memory(sizes, config, gpus=8, checkpointing=True)
    trained = 8_292_166_656 - 676_550_144
    assert zero.weights == 2 * 8_292_166_656
    assert zero.optimizer == 12 * trained / 8
    assert fsdp.optimizer + fsdp.gradients == 12 * trained / 8
    assert lora.gradients == 4 * 20_185_088
    assert zero.activations == fsdp.activations == lora.activations < 2**30
    both = [cost.memory(sizes, config, gpus=8, checkpointing=on)[0].total for on in (True, False)]
    assert both[0] < both[1]


@pytest.mark.parametrize(("rows", "tokens"), [(1, 40), (2, 100)])
def test_the_meta_device_counts_what_a_real_forward_pass_saves(rows: int, tokens: int) -> None:
    config = cost.read_config("base")
    real = AutoModelForImageTextToText.from_config(config, dtype=torch.bfloat16)
    with torch.device("meta"):
        dry = AutoModelForImageTextToText.from_config(config, dtype=torch.bfloat16)
    counted = cost.saved_bytes(dry, rows=rows, tokens=tokens)
    held = cost.saved_bytes(real, rows=rows, tokens=tokens)
    assert counted == pytest.approx(held, rel=0.15)


def test_activations_grow_with_tokens_and_shrink_with_checkpointing() -> None:
    config = cost.read_config("base")
    one, two = (cost.measure(config, rows=1, tokens=n, rank=4) for n in (100, 200))
    assert two.saved == pytest.approx(2 * one.saved, rel=0.05)
    assert two.checkpointed < two.saved


def test_the_dry_run_says_what_is_asked(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from examples.capimagine.train import main

    main(["--dry-run", "--gpus", "4"])
    told = capsys.readouterr().out
    assert "8,292,166,656 parameters" in told
    assert "4 GPUs x 1 x 32 accumulated" in told
    assert "320,000 tokens per update" in told
    assert all(engine in told for engine in ("ZeRO-2", "FSDP2", "LoRA"))
    data = write_hunts(tmp_path / "chains.jsonl", 4)
    main([str(data), "--model", "base", "--dry-run", "--gpus", "1"])
    assert "of the first 4 chains" in capsys.readouterr().out


def test_configurations_are_those_of_accelerate() -> None:
    from accelerate.commands.config.config_args import load_config_from_file

    found = {p.stem: load_config_from_file(str(p)) for p in CONFIGS.glob("*.yaml")}
    assert set(found) == {"lora", "zero2", "fsdp2"}
    zero2 = (CONFIGS / "zero2.yaml").read_text().splitlines()
    assert not any(line.startswith("mixed_precision") for line in zero2)
    assert found["fsdp2"].fsdp_config["fsdp_version"] == 2
    engine = ROOT / found["zero2"].deepspeed_config["deepspeed_config_file"]
    assert json.loads(engine.read_text())["zero_optimization"]["stage"] == 2
    layers = found["fsdp2"].fsdp_config["fsdp_transformer_layer_cls_to_wrap"].split(",")
    assert all(hasattr(modeling_qwen2_5_vl, name) for name in layers)


# -- several processes ---------------------------------------------------------------------------


def launched(*command: str) -> None:
    """Run a command of several processes from the root of the repository, without a GPU."""
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-m", *command],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=1800,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]


def of_two_processes(options: Any) -> list[str]:
    """The command line of the same training, each of two processes seeing half a batch."""
    return [
        "examples.capimagine.train",
        *(str(options.data), "--out", str(options.out.with_name("two")), "--model", "base"),
        *("--batch", "8", "--per-device", "4", "--lr", "2e-3", "--log-every", "1"),
        *("--no-checkpointing", "--updates", str(options.updates), "--warmup", "2"),
    ]


@pytest.mark.slow
def test_two_processes_train_as_one_does_at_the_same_global_batch(tmp_path: Path) -> None:
    data = write_hunts(tmp_path / "chains.jsonl", 48)
    more = ("--updates", "8", "--warmup", "2", "--per-device", "4")
    one = options_of(data, tmp_path / "one", *more)
    train(one)
    launched("torch.distributed.run", "--nproc_per_node", "2", "-m", *of_two_processes(one))
    alone, shared = losses(tmp_path / "one"), losses(tmp_path / "two")
    assert list(shared) == list(range(1, 9))
    assert shared == pytest.approx(alone, abs=2e-5)
    assert shared[8] < shared[1] - 1


@pytest.mark.slow
def test_shards_of_fsdp2_train_as_whole_copies_do(tmp_path: Path) -> None:
    data = write_hunts(tmp_path / "chains.jsonl", 80)
    worker = "sharded_worker.py"
    launched(
        *("torch.distributed.run", "--nproc_per_node", "2"),
        *(str(Path(__file__).with_name(worker)), str(data), str(tmp_path / "found.json")),
    )
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["kinds"] == ["DTensor"]
    assert found["sharded"] == pytest.approx(found["copied"], abs=1e-5)
    assert found["apart"] < 1e-4
    assert found["sharded"][-1] < found["sharded"][0] - 1


@pytest.mark.slow
def test_deepspeed_trains_as_one_process_does_and_resumes_exactly(tmp_path: Path) -> None:
    pytest.importorskip("deepspeed", reason="deepspeed is not installed: pip install deepspeed")
    data = write_hunts(tmp_path / "chains.jsonl", 48)
    more = ("--updates", "8", "--warmup", "2", "--per-device", "4")
    one = options_of(data, tmp_path / "one", *more)
    train(one)
    config = (CONFIGS / "zero2.yaml").read_text().replace("num_processes: 8", "num_processes: 2")
    (tmp_path / "cpu.yaml").write_text(config + "use_cpu: true\n")
    launch = ("accelerate.commands.launch", "--config_file", str(tmp_path / "cpu.yaml"), "-m")
    launched(*launch, *of_two_processes(one), "--save-every", "4")
    alone, shared = losses(tmp_path / "one"), losses(tmp_path / "two")
    assert shared == pytest.approx(alone, abs=1e-4)
    assert il.load(tmp_path / "two/model", spec="capimagine") is not None
    # as if killed after the fourth update
    shutil.rmtree(tmp_path / "two/checkpoint-8")
    launched(*launch, *of_two_processes(one), "--save-every", "4", "--resume")
    assert losses(tmp_path / "two") == pytest.approx(shared, abs=1e-6)
