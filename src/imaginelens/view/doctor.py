"""`imaginelens doctor`: is this installation able to give right numbers, and what is missing?"""

import importlib.util
import platform
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

from imaginelens.hooks import Force, LatentModel, latent
from imaginelens.hooks.controls import sham_difference
from imaginelens.organisms import load

PACKAGES = ("imaginelens", "torch", "transformers", "nnsight", "transformer-lens", "numpy", "scipy")
TESTED = {  # the versions that the contract was last seen to hold with
    "torch": "2.13.0",
    "transformers": "5.23.0",
    "nnsight": "0.8.1",
    "transformer-lens": "4.3.0",
}
OPTIONAL = {
    "sklearn": ("linear probes", 'pip install "imaginelens[probes]"'),
    "anywidget": ("the notebook widget", 'pip install "imaginelens[notebook]"'),
    "trl": ("the training recipe", 'pip install "imaginelens[train]"'),
    "torchvision": ("video inputs", "pip install torchvision, the build that matches your torch"),
}


@dataclass(frozen=True)
class Finding:
    """One line of the doctor's report; `ok` is None where there is nothing to judge."""

    what: str
    value: str
    ok: bool | None = None
    cure: str = ""

    def __str__(self) -> str:
        mark = {True: "ok  ", False: "FAIL", None: "    "}[self.ok]
        return f"{mark}  {self.what:<28} {self.value}" + (
            f"\n      -> {self.cure}" if self.cure else ""
        )


def examine() -> list[Finding]:
    """Look at versions, device and missing extras, and run the engine's contract on an organism."""
    return [*_versions(), _device(), *_extras(), *_contract()]


def _versions() -> list[Finding]:
    found = [Finding("python", platform.python_version())]
    for name in PACKAGES:
        try:
            found.append(Finding(name, _beside(name, version(name))))
        except PackageNotFoundError:
            found.append(Finding(name, "not installed", False, f"pip install {name}"))
    return found


def _beside(name: str, here: str) -> str:
    """A version, and the tested one where that is another."""
    tested = TESTED.get(name, here)
    return here if here.split("+")[0] == tested else f"{here} (tested with {tested})"


def _device() -> Finding:
    if torch.cuda.is_available():
        return Finding("device", f"{torch.cuda.get_device_name(0)} (CUDA {torch.version.cuda})")
    return Finding("device", f"CPU, {torch.get_num_threads()} threads")


def _extras() -> list[Finding]:
    return [
        Finding(f"for {what}", f"{name} is not installed", None, cure)
        for name, (what, cure) in OPTIONAL.items()
        if importlib.util.find_spec(name) is None
    ]


def _contract() -> list[Finding]:
    lens = load("latent-content", dtype=torch.float64)
    prompt = {"images": None, "text": "start red then then shape ?"}
    checks: list[tuple[str, Callable[[], float], str]] = [
        ("engine: edit = plain torch", lambda: _edit_gap(lens, prompt), "difference of logits"),
        ("engine: sham changes nothing", lambda: _sham(lens, prompt), "largest change"),
    ]
    found = []
    for what, measure, unit in checks:
        try:
            gap = measure()
        except Exception as error:  # a doctor reports what it meets
            found.append(Finding(what, f"{type(error).__name__}: {error}", False, _CURE))
            continue
        found.append(Finding(what, f"{unit} {gap}", gap == 0.0, "" if gap == 0.0 else _CURE))
    return found


_CURE = "install the tested versions of torch, transformers and nnsight: see constraints.txt"


def _edit_gap(lens: LatentModel, prompt: Mapping[str, Any]) -> float:
    site = "blocks.1.hook_resid_post"
    block = lens.model.get_submodule(lens.registry[site].path)
    with torch.no_grad():
        ours = lens.run_with_hooks(prompt, fwd_hooks=[(site, lambda act, hook: act * 0.5)])
        handle = block.register_forward_hook(lambda module, args, out: out * 0.5)
        try:
            plain = lens.model(**lens.prompt(prompt).inputs, use_cache=False).logits
        finally:
            handle.remove()
    return float((ours - plain).abs().max())


def _sham(lens: LatentModel, prompt: Mapping[str, Any]) -> float:
    run = lens.run(prompt, latents=Force(2, at=0), max_new_tokens=6)
    return sham_difference(lens, run, site="blocks.*.hook_resid_post", at=latent)[0]
