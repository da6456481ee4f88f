"""Chromium, driven over its debugging pipe, so that a browser is all that a test needs."""

import base64
import fcntl
import json
import os
import select
import shutil
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

NAMES = ("chromium", "chromium-browser", "google-chrome")
SECONDS = 60.0  # until a browser that says nothing has failed
OWN = ("file:", "data:", "blob:", "about:")
HERE = "127.0.0.1"  # the one address that can be reached
# Of each key what it types and its number, which a select and a button listen to.
KEYS = {
    "Tab": ("", 9), "Enter": ("\r", 13), "Escape": ("", 27), " ": (" ", 32), "End": ("", 35),
    "Home": ("", 36), "ArrowLeft": ("", 37), "ArrowUp": ("", 38), "ArrowRight": ("", 39),
    "ArrowDown": ("", 40), "s": ("s", 83),
}  # fmt: skip
_FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--hide-scrollbars",
    "--no-first-run", "--no-default-browser-check", "--disable-background-networking",
    "--disable-component-update", "--disable-sync", "--remote-debugging-pipe",
    f"--host-resolver-rules=MAP * ~NOTFOUND , EXCLUDE {HERE}",
)  # fmt: skip
Event = dict[str, Any]


def executable(find: Callable[[str], str | None] = shutil.which) -> str:
    """The browser's path; without one the test fails, as a skipped test would hide that the page
    was never opened."""
    found = next(filter(None, map(find, NAMES)), None)
    if found is None:
        pytest.fail(
            f"none of {', '.join(NAMES)} is on PATH; install one to run the tests marked browser, "
            "on Debian by: apt-get install chromium",
            pytrace=False,
        )
    return found


class Chromium:
    """One window of a browser without a screen, and with no network but this machine's own.

    `folder` keeps its profile, its downloads and its log. Use it in a `with`.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.downloads = folder / "downloads"
        self.events: list[Event] = []
        self._session: str | None = None
        self._calls = 0
        self._rest = b""

    # ---- its life ------------------------------------------------------------------------------

    def __enter__(self) -> "Chromium":
        path = executable()
        self.downloads.mkdir(parents=True)
        (hears, self._tell), (self._hear, tells) = _pipe(), _pipe()
        self._process = self._started(path, hears, tells)
        os.close(hears)
        os.close(tells)
        try:
            target = self.call("Target.createTarget", url="about:blank")["targetId"]
            found = self.call("Target.attachToTarget", targetId=target, flatten=True)
            self.call(
                "Browser.setDownloadBehavior",
                behavior="allow", downloadPath=str(self.downloads), eventsEnabled=True,
            )  # fmt: skip
            self._session = found["sessionId"]
            for domain in ("Page", "Runtime", "Log", "Network"):
                self.call(f"{domain}.enable")
        except BaseException:
            self.__exit__()
            raise
        return self

    def _started(self, path: str, hears: int, tells: int) -> int:
        log = str(self.folder / "chromium.log")
        actions = [
            (os.POSIX_SPAWN_DUP2, hears, 3),
            (os.POSIX_SPAWN_DUP2, tells, 4),
            (os.POSIX_SPAWN_OPEN, 2, log, os.O_WRONLY | os.O_CREAT, 0o644),
        ]
        arguments = [path, *_FLAGS, f"--user-data-dir={self.folder / 'profile'}"]
        return os.posix_spawn(path, arguments, os.environ, file_actions=actions, setsid=True)

    def __exit__(self, *error: object) -> None:
        self._session = None
        try:
            self._send("Browser.close")
        except BrokenPipeError:
            pass
        if not self._ended(within=10.0):
            os.killpg(self._process, signal.SIGKILL)
            os.waitpid(self._process, 0)
        os.close(self._tell)
        os.close(self._hear)

    def _ended(self, *, within: float) -> bool:
        end = time.monotonic() + within
        while time.monotonic() < end:
            if os.waitpid(self._process, os.WNOHANG)[0]:
                return True
            time.sleep(0.02)
        return False

    # ---- the protocol --------------------------------------------------------------------------

    def call(self, method: str, **params: Any) -> Any:
        """What a method of the DevTools protocol returns.

        Raises:
            RuntimeError: it was refused, or the browser ended.
            TimeoutError: no answer came.
        """
        number = self._send(method, **params)
        for message in self._messages(method):
            if message.get("id") == number:
                if "error" in message:
                    raise RuntimeError(f"{method}: {message['error']['message']}")
                return message["result"]
        raise AssertionError  # messages come until one answers, or an exception

    def wait(self, method: str, **wanted: Any) -> Event:
        """The first event of this name, with these values, since the page was opened."""

        def fits(event: Event) -> bool:
            said = event.get("params", {})
            return event.get("method") == method and wanted.items() <= said.items()

        for event in self.events:
            if fits(event):
                return event
        return next(filter(fits, self._messages(method)))

    def _send(self, method: str, **params: Any) -> int:
        self._calls += 1
        message = {"id": self._calls, "method": method, "params": params}
        if self._session is not None:
            message["sessionId"] = self._session
        data = json.dumps(message).encode() + b"\0"
        while data:
            data = data[os.write(self._tell, data) :]
        return self._calls

    def _messages(self, what: str) -> Iterator[Event]:
        """Each message as it comes; events are kept, and a dialog is closed."""
        end = time.monotonic() + SECONDS
        while (left := end - time.monotonic()) > 0:
            messages = self._read(left)
            self.events += [message for message in messages if "method" in message]
            for message in messages:
                if message.get("method") == "Page.javascriptDialogOpening":
                    self._send("Page.handleJavaScriptDialog", accept=True)
            yield from messages
        raise TimeoutError(f"{what}: Chromium said nothing of it for {SECONDS:.0f} s")

    def _read(self, seconds: float) -> list[Event]:
        if not select.select([self._hear], [], [], seconds)[0]:
            return []
        data = os.read(self._hear, 1 << 20)
        if not data:
            log = (self.folder / "chromium.log").read_text(errors="replace")
            raise RuntimeError(f"Chromium ended: {log[-1000:]}")
        *whole, self._rest = (self._rest + data).split(b"\0")
        return [json.loads(one) for one in whole]

    # ---- a page --------------------------------------------------------------------------------

    def open(self, page: Path | str) -> None:
        """Open a file or an address, and forget what was seen of the last one."""
        self.events.clear()
        self.call("Page.navigate", url=page if isinstance(page, str) else page.resolve().as_uri())
        self.wait("Page.loadEventFired")

    def size(self, width: int, height: int, *, dark: bool = False, scale: float = 1.0) -> None:
        """The window's size in CSS pixels and its colour scheme."""
        self.call(
            "Emulation.setDeviceMetricsOverride",
            width=width, height=height, deviceScaleFactor=scale, mobile=False,
        )  # fmt: skip
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", features=[scheme])
        self.drawn()

    def evaluate(self, expression: str) -> Any:
        """The value of a JavaScript expression; of a promise, what it comes to.

        Raises:
            RuntimeError: it threw.
        """
        found = self.call(
            "Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True
        )
        if "exceptionDetails" in found:
            details = found["exceptionDetails"]
            raise RuntimeError(details.get("exception", {}).get("description", details["text"]))
        return found["result"].get("value")

    def until(self, expression: str, *, seconds: float) -> Any:
        """The value of a JavaScript expression, as soon as there is one.

        Raises:
            TimeoutError: it stayed false, null or empty.
        """
        end = time.monotonic() + seconds
        while not (found := self.evaluate(expression)):
            if time.monotonic() > end:
                raise TimeoutError(f"after {seconds:.0f} s there is still no {expression}")
            time.sleep(0.05)
        return found

    def drawn(self) -> None:
        """Wait until what was changed is on the screen."""
        self.evaluate(
            "new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done)))"
            ".then(() => null)"
        )

    def box(self, selector: str) -> tuple[float, float, float, float]:
        """Left, top, width and height of the first element, in the window, scrolled to."""
        found = self.evaluate(
            f"(() => {{ const node = document.querySelector({json.dumps(selector)});"
            "if (!node) return null; node.scrollIntoView({ block: 'nearest' });"
            "const box = node.getBoundingClientRect();"
            "return [box.left, box.top, box.width, box.height]; })()"
        )
        assert found is not None, f"nothing on the page is {selector}"
        left, top, width, height = found
        return left, top, width, height

    def text(self, selector: str) -> str:
        """What a reader sees of the first element."""
        return self.evaluate(f"document.querySelector({json.dumps(selector)}).innerText")

    def screenshot(self, box: tuple[float, float, float, float] | None = None) -> bytes:
        """The window, or a box of it, as PNG."""
        clip = {}
        if box is not None:
            names = ("x", "y", "width", "height")
            clip = {"clip": dict(zip(names, box, strict=True)) | {"scale": 1}}
        return base64.b64decode(self.call("Page.captureScreenshot", **clip)["data"])

    # ---- a hand --------------------------------------------------------------------------------

    def click(self, at: str | tuple[float, float]) -> None:
        """Click the middle of an element, or a place in the window."""
        self.drag([self._place(at)])

    def drag(self, places: Sequence[tuple[float, float]]) -> None:
        """Press at the first place, move over the others, let go at the last."""
        self.move(places[0])
        self._mouse("mousePressed", places[0], held=True)
        for place in places[1:]:
            self._mouse("mouseMoved", place, held=True)
        self._mouse("mouseReleased", places[-1])
        self.drawn()

    def move(self, at: str | tuple[float, float]) -> None:
        """Move there, with no button held."""
        self._mouse("mouseMoved", self._place(at))

    def key(self, name: str, *, times: int = 1, shift: bool = False, control: bool = False) -> None:
        """Press a key of `KEYS`."""
        text, code = KEYS[name]
        key = {"key": name, "windowsVirtualKeyCode": code, "modifiers": 8 * shift + 2 * control}
        for _ in range(times):
            typed = {"text": text} if text and not control else {}
            self.call("Input.dispatchKeyEvent", type="keyDown", **key, **typed)
            self.call("Input.dispatchKeyEvent", type="keyUp", **key)
        self.drawn()

    def _place(self, at: str | tuple[float, float]) -> tuple[float, float]:
        if not isinstance(at, str):
            return at
        left, top, width, height = self.box(at)
        return left + width / 2, top + height / 2

    def _mouse(self, kind: str, at: tuple[float, float], *, held: bool = False) -> None:
        button = "none" if kind == "mouseMoved" and not held else "left"
        self.call(
            "Input.dispatchMouseEvent",
            type=kind, x=at[0], y=at[1], button=button, buttons=int(held), clickCount=1,
        )  # fmt: skip

    # ---- what was seen -------------------------------------------------------------------------

    def downloaded(self, name: str) -> Path:
        """A file that the page gave, once it is whole."""
        begun = self.wait("Browser.downloadWillBegin", suggestedFilename=name)["params"]
        self.wait("Browser.downloadProgress", guid=begun["guid"], state="completed")
        return self.downloads / name

    def problems(self) -> list[str]:
        """Errors and warnings of the console since the page was opened."""
        self.drawn()
        return [text for event in self.events if (text := _problem(event)) is not None]

    def dialogs(self) -> list[str]:
        """What `alert` and its kind said since the page was opened."""
        return [said["message"] for said in self._said("Page.javascriptDialogOpening")]

    def outside(self, server: str = "") -> list[str]:
        """Addresses that were asked for, but for files, what the page made itself, and those of a
        server such as "127.0.0.1:8888"."""
        asked = [said["request"]["url"] for said in self._said("Network.requestWillBeSent")]
        asked += [said["url"] for said in self._said("Network.webSocketCreated")]
        own = (*OWN, f"http://{server}/", f"ws://{server}/") if server else OWN
        return [address for address in asked if not address.startswith(own)]

    def accessible(self) -> list[tuple[str, str]]:
        """Role and name of everything that assistive technology is told of, as Chromium has it."""
        nodes = self.call("Accessibility.getFullAXTree")["nodes"]
        return [
            (node["role"]["value"], node.get("name", {}).get("value", ""))
            for node in nodes
            if not node["ignored"]
        ]

    def _said(self, method: str) -> list[Event]:
        return [event["params"] for event in self.events if event["method"] == method]


def _pipe() -> tuple[int, int]:
    """The ends of a pipe, with high numbers: the child gets its own as 3 and 4."""
    ends = os.pipe()
    reads, writes = (fcntl.fcntl(end, fcntl.F_DUPFD_CLOEXEC, 10) for end in ends)
    for end in ends:
        os.close(end)
    return reads, writes


def _problem(event: Event) -> str | None:
    said = event.get("params", {})
    if event["method"] == "Runtime.exceptionThrown":
        details = said["exceptionDetails"]
        return details.get("exception", {}).get("description", details["text"])
    if event["method"] == "Runtime.consoleAPICalled" and said["type"] in ("error", "warning"):
        return " ".join(str(part.get("value", part.get("description"))) for part in said["args"])
    if event["method"] == "Log.entryAdded" and said["entry"]["level"] in ("error", "warning"):
        return f"{said['entry']['text']} {said['entry'].get('url', '')}"
    return None
