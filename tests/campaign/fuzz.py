"""Wrong files, many of them: each is read, or refused in a sentence, and nothing is executed.

`python tests/campaign/fuzz.py READER --runs 1000000 --out FILE` mutates a valid file, guided by the
coverage of our own code (atheris, which is libFuzzer), and counts. What else than an error of ours
comes out is kept, one input for each place in the code. While a file is read, Python's audit events
are watched: executing code, starting a process, opening a socket, or writing to a file outside the
reader's own folder.
"""

import argparse
import codecs
import json
import sys
import tempfile
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path

ROOT = Path(__file__).parents[2]
LONGEST = 4096  # bytes of an input, unless the valid file is longer
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
        inputs: how many files were read.
        bytes: how many bytes they had.
        accepted: how many were read as valid.
        refused: how many were refused by an error of ours.
        crashes: each other outcome, with the place in the code; the input is in `kept`.
        acts: audit events that reading must not cause.
    """

    reader: str
    inputs: int = 0
    bytes: int = 0
    accepted: int = 0
    refused: int = 0
    crashes: dict[str, str] = field(default_factory=dict)
    acts: list[str] = field(default_factory=list)
    kept: dict[str, str] = field(default_factory=dict)


class Watch:
    """Notes audit events that must not happen while it is on; hooks cannot be taken off again."""

    def __init__(self, allowed: Path) -> None:
        self.on, self.seen, self.allowed = False, list[str](), str(allowed)
        sys.addaudithook(self._hear)

    def _hear(self, event: str, args: tuple[object, ...]) -> None:
        if not self.on:
            return
        if event in FORBIDDEN:
            self.seen.append(f"{event} {args[:1]!r}"[:200])
        elif event == "open" and isinstance(args[1], str) and set(args[1]) & set("wax+"):
            if not str(args[0]).startswith(self.allowed):
                self.seen.append(f"open {args[0]!r} {args[1]}"[:200])

    @contextmanager
    def ing(self) -> Iterator[None]:
        """Listen within the block."""
        self.on = True
        try:
            yield
        finally:
            self.on = False


class Target:
    """One reader, ready to be given bytes."""

    def __init__(self, name: str) -> None:
        for path in (ROOT, ROOT / "tests"):
            sys.path.insert(0, str(path))
        from campaign import readers  # after coverage is on
        from PIL import Image

        self.reader = {reader.name: reader for reader in readers.READERS}[name]
        memory = Path("/dev/shm")
        where = str(memory) if memory.is_dir() else None
        self.folder = Path(tempfile.mkdtemp(prefix="campaign-", dir=where))
        self.reader.write(self.folder)
        self.file = self.folder / self.reader.file
        self.valid = self.file.read_bytes()
        self.figures = Figures(name)
        self.reader.read(self.folder)  # imports what is imported lazily
        Image.init()  # so do Pillow's formats
        for name in ("utf-16-le", "utf-16-be", "utf-32-le", "utf-32-be", "utf-8-sig"):
            codecs.lookup(name)  # and what JSON may be written in
        self.watch = Watch(self.folder)

    def __call__(self, content: bytes) -> None:
        """Read a file of these bytes, and count what came of it."""
        figures = self.figures
        figures.inputs += 1
        figures.bytes += len(content)
        self.file.write_bytes(content)
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
            self.watch.seen.clear()

    def _keep(self, place: str, content: bytes, error: Exception) -> None:
        if place not in self.figures.crashes and len(self.figures.crashes) < 50:
            self.figures.crashes[place] = str(error)[:300]
            self.figures.kept[place] = content.hex()


def _unfit(sentence: str) -> str:
    """What is wrong with the words of an error, if anything is."""
    if len(sentence) > SENTENCE:
        return "long sentence"
    if not all(c.isprintable() or c == "\n" for c in sentence):
        return "control characters"
    return ""


def _place(error: Exception) -> str:
    """The innermost line of ours that an error went through."""
    ours = [
        frame
        for frame in traceback.extract_tb(error.__traceback__)
        if "campaign" not in frame.filename and "site-packages" not in frame.filename
        and "/lib/python" not in frame.filename
    ]  # fmt: skip
    return f"{Path(ours[-1].filename).name}:{ours[-1].lineno}" if ours else "?"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("reader")
    parser.add_argument("--runs", type=int, default=1_000_000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    try:
        import atheris
    except ImportError as error:
        raise SystemExit("the campaign needs atheris: pip install atheris") from error
    with atheris.instrument_imports(include=["imaginelens", "examples"]):
        target = Target(options.reader)
    corpus = Path(tempfile.mkdtemp(prefix="corpus-"))
    (corpus / "valid").write_bytes(target.valid)

    def tried(content: bytes) -> None:
        target(content)
        if target.figures.inputs % 1000 == 0 or target.figures.inputs >= options.runs:
            options.out.write_text(json.dumps(asdict(target.figures), indent=1) + "\n")

    longest = max(LONGEST, 2 * len(target.valid))
    settings = (f"-max_len={longest}", f"-seed={options.seed}", "-timeout=60")
    limits = (f"-atheris_runs={options.runs}", "-rss_limit_mb=4096", "-verbosity=0")
    atheris.Setup([sys.argv[0], *settings, *limits, str(corpus)], tried)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
