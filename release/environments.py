"""Environments that the checklist makes, and commands that it runs in them."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

from release.outcome import Failed, NotChecked

ROOT = Path(__file__).parents[1]


def run(*command: str | Path, folder: Path = ROOT, **variables: str) -> str:
    """What a command prints; a Failed with the end of it if it goes wrong."""
    inherited = {
        name: value for name, value in os.environ.items() if name not in {"PYTHONPATH", "VENV"}
    }
    done = subprocess.run(
        list(map(str, command)), cwd=folder, env=inherited | variables,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace",
    )  # fmt: skip
    if done.returncode:
        end = "\n    ".join(done.stdout.strip().splitlines()[-15:])
        raise Failed(f"`{' '.join(map(str, command))}` ended with {done.returncode}:\n    {end}")
    return done.stdout


def python_of(environment: Path) -> Path:
    """The interpreter of a virtual environment."""
    windows = environment / "Scripts" / "python.exe"
    return windows if os.name == "nt" else environment / "bin" / "python"


def interpreter(version: str) -> str:
    """A Python of this version (3.12), from PATH or from pyenv's folders."""
    places = [shutil.which(f"python{version}")]
    pyenv = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv")) / "versions"
    places += [str(path) for path in sorted(pyenv.glob(f"{version}.*/bin/python"))]
    wanted = f"import sys; sys.exit(sys.version_info[:2] != ({version.replace('.', ', ')}))"
    for place in filter(None, places):
        if subprocess.run([place, "-c", wanted], capture_output=True).returncode == 0:
            return place
    raise NotChecked(f"no Python {version} was found on PATH or by pyenv; install one")


def make(environment: Path, python: str = sys.executable) -> Path:
    """A new virtual environment; returns its interpreter."""
    run(python, "-m", "venv", environment)
    return python_of(environment)


def install(
    python: Path, *packages: str | Path, constraints: Path, torch: str, any_torch: bool = False
) -> None:
    """Install packages in the versions of a file, torch first and without CUDA on Linux; where no
    such build is at hand, with it (gigabytes) if `any_torch`."""
    pip = (python, "-m", "pip", "install", "-q", "--no-compile", "--disable-pip-version-check")
    try:
        _install_torch(python, pip, torch)
    except NotChecked:
        if not any_torch:
            raise
        run(*pip, f"torch=={torch}")
    run(*pip, "-c", constraints, *packages)


def _install_torch(python: Path, pip: tuple[str | Path, ...], version: str) -> None:
    if sys.platform != "linux":
        run(*pip, f"torch=={version}")
        return
    try:
        run(*pip, f"torch=={version}+cpu")
    except Failed:  # as ./run does: uv knows where PyTorch keeps its CPU builds
        try:
            run(*pip, "uv")
            uv = python.parent / "uv"
            run(
                uv, "pip", "install", "--python", python, "--torch-backend=cpu", f"torch=={version}"
            )
        except Failed:
            raise NotChecked(
                f"no CPU build of torch {version} for {python} is at hand; put one into a folder "
                "and name it: PIP_FIND_LINKS=FOLDER, or take the one with CUDA: --any-torch"
            ) from None


def pinned(constraints: Path, name: str) -> str:
    """The version that a constraints file gives a package."""
    for line in constraints.read_text(encoding="utf-8").splitlines():
        package, _, version = line.partition("==")
        if package == name:
            return version.split()[0]
    raise Failed(f"{constraints.name} has no line {name}==VERSION; add it")
