"""Wrong files, many of them: each is read, or refused in a sentence, and nothing is executed.

`python tests/campaign/fuzz.py READER ... --runs 1000000 --out OUT` mutates a valid file, guided by
the coverage of our own code (atheris, which is libFuzzer), and counts. What else than an error of
ours comes out is kept, one input for each place in the code. While a file is read, Python's audit
events are watched: executing code, starting a process, opening a socket, or writing to a file
outside the reader's own folder.

It may be stopped at any time, and goes on from the figures in OUT and the inputs beside them, with
another seed, unless the code that reads has changed since or something was found: then it counts
from zero, on the same inputs.
"""

import argparse
import ast
import codecs
import hashlib
import json
import linecache
import os
import re
import shutil
import signal
import sys
import tempfile
import time
import traceback
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any, ClassVar

ROOT = Path(__file__).parents[2]
LONGEST = 4096  # bytes of an input, unless the valid file is longer
OURS = ["imaginelens", "examples"]  # whose coverage guides
STOPPED = (-signal.SIGTERM, -signal.SIGKILL, -signal.SIGINT, 72)  # 72 is libFuzzer's own
SENTENCE = 2000  # characters of an error's words; a file must not fill the screen

FORBIDDEN = (
    "ctypes.dlopen",
    "exec",
    "os.exec",
    "os.fork",
    "os.posix_spawn",
    "os.system",
    "pickle.find_class",
    "socket.connect",
    "subprocess.Popen",
)


@dataclass
class Figures:
    """What was tried on one reader.

    Attributes:
        reader: its name.
        code: digest of the code that reads a valid file.
        rounds: how often it was begun; the seed of each is another one.
        seconds: of CPU time.
        inputs: how many files were read.
        bytes: how many bytes they had.
        accepted: how many were read as valid.
        refused: how many were refused by an error of ours.
        crashes: each other outcome, with the place in the code.
        acts: audit events that reading must not cause.
        kept: the input of each crash, by its place, and of acts, by how many there were then.
    """

    reader: str
    code: str = ""
    rounds: int = 0
    seconds: float = 0.0
    inputs: int = 0
    bytes: int = 0
    accepted: int = 0
    refused: int = 0
    crashes: dict[str, str] = field(default_factory=dict)
    acts: list[str] = field(default_factory=list)
    kept: dict[str, str] = field(default_factory=dict)


class Watch:
    """Notes audit events that must not happen while it is on."""

    listening: ClassVar["Watch | None"] = None
    hooked: ClassVar[bool] = False

    def __init__(self, allowed: Path) -> None:
        self.seen, self.allowed = list[str](), str(allowed)
        if not Watch.hooked:  # one for all: it cannot be taken off again
            sys.addaudithook(_heard)
            Watch.hooked = True

    def hear(self, event: str, args: tuple[object, ...]) -> None:
        """Note an event, if it must not happen."""
        if event in FORBIDDEN:
            self.seen.append(f"{event} {args[:1]!r}"[:200])
        elif event == "open" and isinstance(args[1], str) and set(args[1]) & set("wax+"):
            if not str(args[0]).startswith(self.allowed):
                self.seen.append(f"open {args[0]!r} {args[1]}"[:200])

    @contextmanager
    def ing(self) -> Iterator[None]:
        """Listen within the block."""
        Watch.listening = self
        try:
            yield
        finally:
            Watch.listening = None


def _heard(event: str, args: tuple[object, ...]) -> None:
    if Watch.listening is not None:
        Watch.listening.hear(event, args)


class Target:
    """One reader, ready to be given bytes."""

    def __init__(self, name: str) -> None:
        from campaign import readers  # after coverage is on
        from PIL import Image

        self.reader = {reader.name: reader for reader in readers.READERS}[name]
        self.folder = Path(tempfile.mkdtemp(prefix="campaign-"))
        weakref.finalize(self, shutil.rmtree, self.folder, ignore_errors=True)
        self.reader.write(self.folder)
        self.file = self.folder / self.reader.file
        self.valid = self.file.read_bytes()
        self.reader.read(self.folder)  # imports what is imported lazily
        self.figures = Figures(name, code=_code(lambda: self.reader.read(self.folder)))
        self.open = os.open(self.file, os.O_WRONLY)
        weakref.finalize(self, os.close, self.open)
        Image.init()  # so do Pillow's formats
        for name in ("utf-16-le", "utf-16-be", "utf-32-le", "utf-32-be", "utf-8-sig"):
            codecs.lookup(name)  # and what JSON may be written in
        self.watch = Watch(self.folder)

    def __call__(self, content: bytes) -> None:
        """Read a file of these bytes, and count what came of it."""
        figures = self.figures
        figures.inputs += 1
        figures.bytes += len(content)
        os.truncate(self.open, os.pwrite(self.open, content, 0))
        if self.reader.mend is not None:
            self.reader.mend(self.folder, content)
        try:
            with self.watch.ing():
                self.reader.read(self.folder)
            figures.accepted += 1
        except self.reader.refuses as error:
            figures.refused += 1
            if fault := _unfit(str(error)):
                self._keep(f"{fault}: {_place(error)}", content, error)
        except Exception as error:
            self._keep(f"{type(error).__name__}: {_place(error)}", content, error)
        if self.watch.seen:
            figures.acts += self.watch.seen[: 20 - len(figures.acts)]
            figures.kept[f"act {len(figures.acts)}"] = content.hex()
            self.watch.seen.clear()

    def written(self) -> None:
        """Check that the file that is read is the one that is written to.

        Raises:
            RuntimeError: the reader has put another in its place.
        """
        if not os.path.samestat(os.fstat(self.open), self.file.stat()):
            raise RuntimeError(f"{self.figures.reader!r} replaces {self.file.name} as it reads")

    def _keep(self, place: str, content: bytes, error: Exception) -> None:
        if place not in self.figures.crashes and len(self.figures.crashes) < 50:
            self.figures.crashes[place] = str(error)[:300]
            self.figures.kept[place] = content.hex()


def _unfit(sentence: str) -> str:
    """What is wrong with the words of an error, if anything is."""
    if len(sentence) > SENTENCE:
        return "long sentence"
    if not sentence.replace("\n", "").isprintable():
        return "control characters"
    return ""


def _code(read: Callable[[], object]) -> str:
    """A digest of our modules that have a part in reading a valid file; comments do not count."""
    files = set[str]()

    def called(frame: FrameType, event: str, arg: object) -> None:
        files.add(frame.f_code.co_filename)

    sys.setprofile(called)
    try:
        read()
    finally:
        sys.setprofile(None)
    digest = hashlib.sha256()
    for path in sorted(map(Path, files)):
        if path.is_relative_to(ROOT) and "campaign" not in path.parts:
            source = "".join(linecache.getlines(str(path)))
            digest.update(ast.dump(ast.parse(source)).encode())
    return digest.hexdigest()[:16]


def _place(error: Exception) -> str:
    """The innermost line of ours that an error went through."""
    ours = [
        frame
        for frame in traceback.extract_tb(error.__traceback__)
        if "campaign" not in frame.filename and "site-packages" not in frame.filename
        and "/lib/python" not in frame.filename
    ]  # fmt: skip
    return f"{Path(ours[-1].filename).name}:{ours[-1].lineno}" if ours else "?"


def continued(figures: Figures, out: Path) -> Figures:
    """The figures to go on from: those that are there, if they are of this code and found nothing.

    Raises:
        SystemExit: they are of another reader.
    """
    if not out.exists():
        return figures
    before = Figures(**json.loads(out.read_text()))
    if before.reader != figures.reader:
        raise SystemExit(f"{out} has the figures of {before.reader!r}; give another file")
    if before.code == figures.code and not before.crashes and not before.acts:
        return before
    return Figures(figures.reader, code=figures.code, rounds=before.rounds)


def note(figures: Figures, out: Path) -> None:
    """Write the figures, whole or not at all."""
    partial = out.with_suffix(".partial")
    partial.write_text(json.dumps(asdict(figures), indent=1) + "\n")
    partial.replace(out)


def fuzz(atheris: Any, name: str, runs: int, out: Path) -> None:
    """Try files on one reader until there were `runs`; libFuzzer ends the process."""
    with atheris.instrument_imports(include=OURS):  # what it imports as it reads
        target = Target(name)
    target.figures = figures = continued(target.figures, out)
    if figures.inputs >= runs:
        return
    figures.rounds += 1
    corpus = out.with_suffix(".corpus")
    corpus.mkdir(exist_ok=True)
    (corpus / "valid").write_bytes(target.valid)
    again = len(list(corpus.iterdir())) + 1 if figures.inputs else 0  # read anew, not counted twice
    spent = figures.seconds - time.process_time()

    def tried(content: bytes) -> None:
        nonlocal again
        before = (figures.inputs, figures.bytes, figures.accepted, figures.refused)
        target(content)
        if again:
            again -= 1
            figures.inputs, figures.bytes, figures.accepted, figures.refused = before
        elif figures.inputs % 1000 == 0 or figures.inputs >= runs:
            target.written()
            figures.seconds = round(spent + time.process_time(), 1)
            note(figures, out)
            if figures.inputs >= runs:
                os._exit(0)  # libFuzzer knows no other end

    longest = max(LONGEST, 2 * len(target.valid))
    settings = (f"-max_len={longest}", f"-seed={figures.rounds}", "-timeout=120", "-verbosity=0")
    kept = f"-artifact_prefix={corpus}-"
    atheris.Setup([sys.argv[0], *settings, "-rss_limit_mb=4096", kept, str(corpus)], tried)
    atheris.Fuzz()


def path_of(folder: Path, name: str) -> Path:
    """Where the figures of a reader are."""
    return folder / f"fuzz-{re.sub('[^a-z]+', '-', name.lower())}.json"


def begun(act: Callable[[], None], log: Path) -> int:
    """Do it in a process of its own, which has all that is imported here; returns its number."""
    if child := os.fork():
        return child
    ended = 1
    try:
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, signal.SIG_DFL)
        words = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        for stream in (1, 2):
            os.dup2(words, stream)
        act()
        ended = 0
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(ended)


def ended(status: int, name: str, out: Path) -> None:
    """A process that broke off, not one that was stopped, is a crash of its reader."""
    log = out.with_suffix(".log")
    code = os.waitstatus_to_exitcode(status)
    if code == 0:
        log.unlink(missing_ok=True)
    elif code not in STOPPED:
        figures = Figures(**json.loads(out.read_text())) if out.exists() else Figures(name)
        figures.crashes["broke off"] = f"exit status {code}: see {log.name}"
        note(figures, out)
        print(f"{name} broke off: see {log}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("readers", nargs="*", help="all, if none is named")
    parser.add_argument("--runs", type=int, default=1_000_000)
    parser.add_argument("--out", type=Path, required=True, help="a folder")
    parser.add_argument("--jobs", type=int, default=1, help="readers at once")
    options = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    try:
        import atheris
    except ImportError as error:
        raise SystemExit("the campaign needs atheris: pip install atheris") from error
    with atheris.instrument_imports(include=OURS):
        names = _names()
    options.out.mkdir(parents=True, exist_ok=True)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(-signal.SIGTERM))
    memory = Path("/dev/shm")
    running: dict[int, str] = {}
    with tempfile.TemporaryDirectory(dir=memory if memory.is_dir() else None) as home:
        tempfile.tempdir = home
        try:
            for name in options.readers or names:
                out = path_of(options.out, name)
                act = partial(fuzz, atheris, name, options.runs, out)
                running[begun(act, out.with_suffix(".log"))] = name
                while len(running) >= options.jobs:
                    _next(running, options.out)
            while running:
                _next(running, options.out)
        finally:
            for child in running:
                os.kill(child, signal.SIGTERM)


def _names() -> list[str]:
    for path in (ROOT, ROOT / "tests"):
        sys.path.insert(0, str(path))
    from campaign import readers

    for module in list(sys.modules.values()):  # as they are now: files may change as this goes on
        if Path(getattr(module, "__file__", None) or "/").is_relative_to(ROOT):
            linecache.getlines(str(module.__file__))
    return [reader.name for reader in readers.READERS]


def _next(running: dict[int, str], out: Path) -> None:
    """Wait for one to end."""
    child, status = os.wait()
    name = running.pop(child)
    ended(status, name, path_of(out, name))


if __name__ == "__main__":
    main()
