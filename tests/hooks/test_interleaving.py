"""Runs that take turns on one model give what each gives in a process of its own."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from safetensors.torch import load_file

import imaginelens as il

SPEC = il.LatentSpec(
    name="test", open="<|latent_start|>", close="<|latent_end|>", pad="<|latent_pad|>", max_steps=2
)
SIZES = ((48, 32), (24, 56))
RUNS = 200
pytestmark = pytest.mark.slow  # processes of their own
ALONE = """
import sys
sys.path.insert(0, {tests!r})
from hooks_test_interleaving import outcome
from safetensors.torch import save_file
save_file(outcome({name!r}, {which}), {out!r})
"""


def example(name: str, which: int) -> dict[str, Any]:
    picture = tiny.image(*SIZES[which], seed=which)
    return {"images": picture, "text": tiny.prompt(name, ("what?", "where is it?")[which])}


def run_one(lens: il.LatentModel, name: str, which: int, edited: bool) -> dict[str, torch.Tensor]:
    def run() -> il.Run:
        force = il.Force(2, at=1)
        return lens.run(example(name, which), latents=force, max_new_tokens=4, keep_logits=True)

    if edited:
        with lens.edit(il.Zero(), at=il.latent[0]):
            found = run()
    else:
        found = run()
    return {"ids": found.sequences, "latents": found.latents, "logits": found.logits}


def outcome(name: str, which: int) -> dict[str, torch.Tensor]:
    """What one picture gives, plain and edited."""
    lens = il.LatentModel(*tiny.build(name), spec=SPEC)
    parts = {edited: run_one(lens, name, which, edited) for edited in (False, True)}
    return {
        f"{edited}.{key}": value.contiguous()
        for edited, found in parts.items()
        for key, value in found.items()
    }


def in_its_own_process(name: str, which: int, folder: Path) -> dict[str, torch.Tensor]:
    out = folder / f"{name}{which}.safetensors"
    (folder / "hooks_test_interleaving.py").write_text(Path(__file__).read_text())
    tests = str(Path(__file__).parents[1])
    script = ALONE.format(tests=tests, name=name, which=which, out=str(out))
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=folder, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return load_file(out)


@pytest.mark.parametrize("name", ["qwen2_5_vl", "gemma3"])
def test_two_hundred_runs_on_two_pictures(name: str, tmp_path: Path) -> None:
    lens = il.LatentModel(*tiny.build(name), spec=SPEC)
    alone = [in_its_own_process(name, which, tmp_path) for which in (0, 1)]
    assert alone[0]["False.ids"].shape != alone[1]["False.ids"].shape
    for number in range(RUNS):
        which, edited = number % 2, number % 3 == 0
        found = run_one(lens, name, which, edited)
        for key, value in found.items():
            torch.testing.assert_close(
                value, alone[which][f"{edited}.{key}"], rtol=0, atol=1e-12, msg=str(number)
            )


def test_the_comparison_can_fail(tmp_path: Path) -> None:
    """Positions remembered from the other picture would be seen."""
    name = "qwen2_5_vl"
    alone = in_its_own_process(name, 0, tmp_path)
    lens = il.LatentModel(*tiny.build(name), spec=SPEC)
    other = run_one(lens, name, 1, edited=False)
    assert other["ids"].shape != alone["False.ids"].shape
    edited = run_one(lens, name, 0, edited=True)
    assert (edited["logits"] - alone["False.logits"]).abs().max() > 1e-3
