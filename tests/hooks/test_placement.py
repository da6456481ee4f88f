"""Models whose layers lie elsewhere give the same numbers; those that cannot are refused."""

import os
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import tiny
import torch
from torch.distributed.fsdp import fully_shard

import imaginelens as il
from imaginelens.hooks import registry
from imaginelens.hooks.errors import InputError, SiteUnavailable
from imaginelens.hooks.placement import check_placed

KIND = "qwen2_5_vl"
LAYERS = "model.language_model.layers"
HELD = {f"model.language_model.{part}": "cpu" for part in ("embed_tokens", "norm", "rotary_emb")}
MAPS = {
    "two layers on the disk": {
        **HELD,
        **{f"{LAYERS}.{k}": "cpu" if k == 1 else "disk" for k in range(3)},
        "model.visual": "cpu",
        "lm_head": "cpu",
    },
    "the head on the disk": {"model": "cpu", "lm_head": "disk"},
    "all of the text model on the disk": {
        "model.visual": "cpu",
        "model.language_model": "disk",
        "lm_head": "disk",
    },
}


def write(folder: Path) -> None:
    """A tiny checkpoint, in float64, whose tokenizer has Monet's tokens."""
    with mock.patch.object(tiny, "LATENT", il.FAMILIES["monet"].strings):
        model, processor = tiny.fresh(KIND, dtype=torch.float64)
    model.config.dtype = model.dtype
    model.save_pretrained(folder)
    processor.tokenizer.save_pretrained(folder)
    processor.image_processor.save_pretrained(folder)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    found = tmp_path_factory.mktemp("checkpoint")
    write(found)
    return found


def example(seed: int, text: str = "what?") -> dict[str, Any]:
    return {"images": tiny.image(48, 32, seed=seed), "text": tiny.prompt(KIND, text)}


def opened(folder: Path, device_map: Any = None) -> il.LatentModel:
    lens = il.load(folder, device_map=device_map, answer=lambda text: text[-4:-2] or None)
    lens.model.generation_config.max_new_tokens = 10
    return lens


def numbers(lens: il.LatentModel) -> dict[str, torch.Tensor]:
    """A run, a reading, edits and a sweep."""
    options: dict[str, Any] = {"latents": il.Force(2, at=0)}
    run, donor = (lens.run(example(seed), **options) for seed in (0, 9))
    logits, cache = lens.run_with_cache(run, names_filter="*.hook_resid_post")
    with lens.edit(il.Swap(donor), at=il.latent[0], site="hook_latent"):
        swapped = lens.run(example(0), **options)
    with lens.edit(il.Zero(), at=il.last_prompt, site="blocks.1.attn.hook_z"):
        zeroed = lens.run_with_cache(run, names_filter="blocks.2.hook_resid_post")[0]
    pairs = il.Pairs([example(0)], [example(9, "why?")], ["a"], ["x"])
    swept = il.sweep(
        lens, pairs, sites="resid_post", positions=[il.last_prompt], context="fixed", verify=2
    )
    found = {
        "sequences": run.sequences,
        "latents": run.latents,
        "logits": logits,
        "states": cache["resid_post", 1],
        "swapped": swapped.latents,
        "zeroed": zeroed,
        "swept": torch.from_numpy(swept.effect),
    }
    return {name: value.detach() for name, value in found.items()}


@cache
def undispatched(folder: Path) -> dict[str, torch.Tensor]:
    return numbers(opened(folder))


@pytest.mark.parametrize("places", MAPS.values(), ids=MAPS)
def test_layers_on_the_disk_change_no_bit(folder: Path, places: dict[str, str]) -> None:
    lens = opened(folder, places)
    assert {weight.is_meta for weight in lens.model.parameters()} == {True, False}
    wanted = undispatched(folder)
    assert float((wanted["zeroed"] - wanted["logits"]).abs().max()) > 0
    assert float(wanted["swept"].abs().max()) > 0
    for name, value in numbers(lens).items():
        assert torch.equal(value, wanted[name]), name


@pytest.mark.parametrize(
    ("places", "said"),
    [
        ({"": "disk"}, "puts 'the whole model' on 'disk'"),
        (
            {"model.visual": "disk", "model.language_model": "cpu", "lm_head": "cpu"},
            "puts 'model.visual' on 'disk'",
        ),
    ],
)
def test_first_weights_that_are_elsewhere_are_refused(
    folder: Path, places: dict[str, str], said: str
) -> None:
    with pytest.raises(InputError, match=said) as error:
        il.load(folder, device_map=places)
    assert "keep these on a device" in str(error.value)


def test_weights_that_processes_share_are_refused(tmp_path: Path) -> None:
    model = torch.nn.Sequential(torch.nn.Linear(2, 2))
    store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        mesh = torch.distributed.init_device_mesh("cpu", (1,))
        check_placed(model)
        fully_shard(model, mesh=mesh)
        with pytest.raises(InputError, match=r"'0\.weight' is shared out among processes"):
            check_placed(model)
    finally:
        torch.distributed.destroy_process_group()


PARALLEL = """
import sys
sys.path[:0] = sys.argv[2:]
from pathlib import Path
import torch
import test_placement as t
import imaginelens as il
from transformers import AutoModelForImageTextToText
from transformers.distributed import DistributedConfig

torch.distributed.init_process_group("gloo")
folder = Path(sys.argv[1])
whole = t.opened(folder)
model = AutoModelForImageTextToText.from_pretrained(
    folder, distributed_config=DistributedConfig(tp_plan="auto")
)
split = il.LatentModel(model, whole.processor, answer=lambda text: text[-4:-2] or None)
model.generation_config.max_new_tokens = 10
t.check_split(split, whole)
if torch.distributed.get_rank() == 0:
    print("the same")
torch.distributed.barrier()
torch.distributed.destroy_process_group()
"""
INSIDE = ("hook_q", "hook_k", "hook_v", "hook_z", "hook_pre", "hook_post")  # where parts are


def check_split(split: il.LatentModel, whole: il.LatentModel) -> None:
    """What a process of several sees and does is what one alone sees and does."""
    wanted, found = numbers(whole), numbers(split)
    assert float((wanted["zeroed"] - wanted["logits"]).abs().max()) > 0
    for name, value in found.items():
        torch.testing.assert_close(value, wanted[name], rtol=1e-10, atol=1e-12)
    run = whole.run(example(0), latents=il.Force(2, at=0))
    logits, states = whole.run_with_cache(run)
    _, parts = split.run_with_cache(run)
    missing = set(states) - set(parts)
    assert {name.rpartition(".")[2] for name in missing} == {
        "hook_pattern", "hook_rot_q", "hook_rot_k"
    }  # fmt: skip
    for name in parts:
        torch.testing.assert_close(parts[name], states[name], rtol=1e-10, atol=1e-12)
    local = split.model.get_submodule(split.registry["blocks.1.attn.hook_q"].path)
    assert local.weight.to_local().shape[0] < local.out_features  # it is split indeed
    for end in INSIDE:
        (site,) = split.registry.match(f"blocks.1.*{end}")

        def shift(act: torch.Tensor, hook: Any) -> torch.Tensor:
            """Another change for each head or neuron."""
            by = torch.arange(act[0, 0].numel(), dtype=act.dtype).reshape(act[0, 0].shape)
            return act + by / by.numel()

        theirs, ours = (
            lens.run_with_hooks(run, fwd_hooks=[(site, shift)]) for lens in (whole, split)
        )
        assert float((theirs - logits).abs().max()) > 1e-6
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)
    pairs = il.Pairs([example(0)], [example(9, "why?")], ["a"], ["x"])
    for sites in ("resid_post", "z"):
        one, two = (
            il.attribute(lens, pairs, sites=sites, positions=[il.last_prompt], context="fixed")
            for lens in (whole, split)
        )
        assert abs(one.values).max() > 0
        torch.testing.assert_close(
            torch.tensor(two.values), torch.tensor(one.values), rtol=1e-9, atol=1e-12
        )
    with pytest.raises(SiteUnavailable, match="its heads are split among processes"):
        split.run_with_cache(run, names_filter="blocks.0.attn.hook_pattern")
    mine, shared = whole.transformer_lens(run), split.transformer_lens(run)
    torch.testing.assert_close(shared.W_U, mine.W_U)
    for name in ("W_Q", "b_Q", "W_O"):
        ours, theirs = (getattr(bound.blocks[1].attn, name) for bound in (shared, mine))
        torch.testing.assert_close(ours, theirs)
    with mock.patch.object(registry, "shown_whole", lambda module, end, name, fn: fn):
        _, parts = split.run_with_cache(run, names_filter="blocks.1.attn.hook_z")
    z = "blocks.1.attn.hook_z"
    assert parts[z].numel() * 2 == states[z].numel()  # what a hook would see without it


@pytest.mark.slow
def test_a_model_that_processes_share_by_tensors_is_the_same(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "parallel.py").write_text(PARALLEL)
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    here = Path(__file__).parent
    done = subprocess.run(
        [sys.executable, *command, "parallel.py", str(folder), str(here), str(here.parent)],
        cwd=tmp_path, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "the same" in done.stdout
