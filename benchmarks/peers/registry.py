"""Which peers there are, and the environment each one runs in."""

import os
import subprocess
import sys
import venv
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).parent


@dataclass(frozen=True)
class Peer:
    """One peer.

    Attributes:
        module: the file with its snippets.
        alone: whether it cannot stand beside what ImagineLens needs, or drags in too much for the
            tests' environment, and gets one of its own from `requirements-NAME.txt`.
    """

    name: str
    module: str
    alone: bool = False

    @property
    def requirements(self) -> Path:
        """The pinned packages of its own environment."""
        return HERE / f"requirements-{self.name}.txt"

    def python(self, envs: Path) -> Path:
        """The interpreter to run it with; its environment is made where there is none."""
        if not self.alone:
            return Path(sys.executable)
        folder = envs / self.name
        python = folder / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
        wanted, installed = self.requirements.read_text(), folder / "installed.txt"
        if not installed.exists() or installed.read_text() != wanted:
            print(f"{self.name}: installing into {folder} (some minutes, once)", file=sys.stderr)
            venv.create(folder, with_pip=True)
            command = [str(python), "-m", "pip", "install", "-q", "-r", str(self.requirements)]
            subprocess.run(command, check=True)
            installed.write_text(wanted)
        return python


# The first is the reference itself: how far its ratio is from 1 is how far noise alone goes.
PEERS = (
    Peer("plain torch", "plain_torch"),
    Peer("ImagineLens", "ours"),
    Peer("nnsight", "nnsight_alone"),
    Peer("TransformerLens, its tools", "transformer_lens_tools"),
    Peer("TransformerLens, by hand", "transformer_lens_hooks"),
    Peer("captum", "captum_alone"),
    Peer("pyvene", "pyvene_alone", alone=True),
    Peer("nnterp", "nnterp_alone", alone=True),
    Peer("vlmprobe", "vlmprobe_alone", alone=True),
)


def envs_folder() -> Path:
    """Where environments are kept unless `--envs` says otherwise: the user's cache."""
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(cache) / "imaginelens" / "peers"
