"""A JupyterLab of this environment, which keeps to this machine and to one folder."""

import json
import os
import secrets
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path
from typing import Any

from browser.chromium import HERE, Chromium

SECONDS = 180.0  # until what does not answer has failed
NAME = "patching.ipynb"
CELLS = (
    'import imaginelens as il\n\nlens = il.load("latent-content")\ntask = lens.task(n=3, seed=0)',
    "explorer = il.explore(lens, task)\nexplorer",
)
STATUS = "document.querySelector('.il-status').innerText"  # what the widget says
_NO_NEWS = {"fetchNews": "false", "checkForUpdates": False}
_ASKS_NOBODY = (
    "--LabApp.news_url=",
    "--LabApp.check_for_updates_class=jupyterlab.NeverCheckForUpdate",
    "--LabApp.extension_manager=readonly",
)


class Jupyter:
    """JupyterLab at a free port of this machine, with a token. Use it in a `with`.

    `folder` keeps its notebooks, and beside them its settings and its log.
    """

    def __init__(self, folder: Path) -> None:
        self.notebooks = folder / "notebooks"
        self._folder = folder
        self._token = secrets.token_hex(16)
        with socket.socket() as found:
            found.bind((HERE, 0))
            self.server = f"{HERE}:{found.getsockname()[1]}"

    def address(self, notebook: str) -> str:
        """The page of a notebook."""
        return f"http://{self.server}/lab/tree/{notebook}?token={self._token}"

    def __enter__(self) -> "Jupyter":
        self.notebooks.mkdir(parents=True)
        own = {f"JUPYTER_{kind}_DIR": self._made(kind) for kind in ("CONFIG", "DATA", "RUNTIME")}
        self._settle(Path(own["JUPYTER_CONFIG_DIR"]))
        command = [
            sys.executable, "-m", "jupyterlab", "--no-browser", "--allow-root",
            f"--ServerApp.ip={HERE}", f"--ServerApp.port={self.server.partition(':')[2]}",
            "--ServerApp.port_retries=0", f"--ServerApp.root_dir={self.notebooks}",
            f"--IdentityProvider.token={self._token}", *_ASKS_NOBODY,
        ]  # fmt: skip
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                command, stdout=log, stderr=log, cwd=self.notebooks, start_new_session=True,
                env=os.environ | own | {"IPYTHONDIR": self._made("IPYTHON")},
            )  # fmt: skip
        try:
            self._wait()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *error: object) -> None:
        self._process.terminate()  # which ends its kernels, too
        try:
            self._process.wait(30)
        except subprocess.TimeoutExpired:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()

    @property
    def _log(self) -> Path:
        return self._folder / "jupyter.log"

    def _made(self, kind: str) -> str:
        path = self._folder / kind.lower()
        path.mkdir()
        return str(path)

    def _settle(self, config: Path) -> None:
        """Answer beforehand what JupyterLab asks at first: whether to fetch news."""
        place = config / "lab" / "user-settings" / "@jupyterlab" / "apputils-extension"
        place.mkdir(parents=True)
        (place / "notification.jupyterlab-settings").write_text(json.dumps(_NO_NEWS))

    def _wait(self) -> None:
        end = time.monotonic() + SECONDS
        asked = f"http://{self.server}/api/status?token={self._token}"
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        while True:
            try:
                with opener.open(asked, timeout=5) as answer:
                    assert answer.status == 200
                    return
            except OSError as error:
                if self._process.poll() is not None or time.monotonic() > end:
                    log = self._log.read_text(errors="replace")[-2000:]
                    raise RuntimeError(f"JupyterLab does not answer: {log}") from error
                time.sleep(0.3)


def explore(jupyter: Jupyter, browser: Chromium) -> None:
    """Open a notebook with `CELLS`, run them by keyboard, and wait for the widget."""
    (jupyter.notebooks / NAME).write_text(json.dumps(_notebook()), encoding="utf-8")
    browser.open(jupyter.address(NAME))
    browser.until(_READY, seconds=SECONDS)
    browser.click(".jp-SideBar.jp-mod-left .lm-TabBar-tab.lm-mod-current")  # the list of files
    browser.click(".jp-CodeCell .cm-content")
    browser.key("Enter", shift=True, times=len(CELLS))
    assert "[ ]" not in browser.text(".jp-InputPrompt"), "the kernel was not ready for the cell"
    browser.until("document.querySelector('.il-heat') !== null", seconds=SECONDS)
    browser.until(_READY, seconds=SECONDS)


def save(jupyter: Jupyter, browser: Chromium) -> dict[str, Any]:
    """Save the notebook by keyboard; what its file holds then."""
    path = jupyter.notebooks / NAME
    before = path.stat().st_mtime_ns
    browser.click(".jp-CodeCell .cm-content")
    browser.key("s", control=True)
    end = time.monotonic() + SECONDS
    while path.stat().st_mtime_ns == before:
        assert time.monotonic() < end, "the notebook was not saved"
        time.sleep(0.2)
    time.sleep(1.0)  # until all of it is there
    return json.loads(path.read_text(encoding="utf-8"))


# The sign beside the kernel's name says idle, too, before there is a kernel.
_READY = "/\\| Idle/.test(document.querySelector('#jp-main-statusbar')?.innerText)"


def _notebook() -> dict[str, Any]:
    cells = [
        {
            "cell_type": "code", "id": f"cell-{number}", "metadata": {}, "outputs": [],
            "execution_count": None, "source": source,
        }
        for number, source in enumerate(CELLS)
    ]  # fmt: skip
    kernel = {"name": "python3", "display_name": "Python 3", "language": "python"}
    return {"cells": cells, "metadata": {"kernelspec": kernel}, "nbformat": 4, "nbformat_minor": 5}
