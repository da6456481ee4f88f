"""The steps of the checklist: each takes the place and says in a few words what it found."""

import json
import os
import re
import shutil
import sys
import tarfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from release import audit, listing, organisms, wheels
from release.environments import ROOT, install, interpreter, make, pinned, python_of, run
from release.outcome import Failed, NotChecked

NEWEST, OLDEST = ROOT / "constraints.txt", ROOT / "constraints-oldest.txt"
OFFLINE = {
    "PIP_NO_INDEX": "1", "UV_OFFLINE": "1", "HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1",
    # whoever asks for an address outside fails, also code that knows no such variable
    "http_proxy": "http://127.0.0.1:9", "https_proxy": "http://127.0.0.1:9",
    "no_proxy": "127.0.0.1,localhost",
}  # fmt: skip
TOOLS = ("pytest>=8", "pytest-xdist>=3.6", "hypothesis>=6", "beartype>=0.22", "statsmodels>=0.14.5",
         "xarray>=2025.1", "concept-erasure>=0.2.4", "captum>=0.8", "anywidget>=0.9",
         "matplotlib>=3.8")  # fmt: skip
# What is run with other versions: the contract, the laws and known answers of each part.
TESTS = (
    "tests/test_contract_lines.py", "tests/contract", "tests/estimates", "tests/organisms",
    "tests/hooks/test_contract.py", "tests/hooks/test_edits.py", "tests/hooks/test_names.py",
    "tests/hooks/test_tokens.py", "tests/mediation/test_planted.py",
    "tests/probes/test_probes_kinds.py", "tests/probes/test_probes_fit.py",
    "tests/view/test_heatmap.py",
)  # fmt: skip


@dataclass(frozen=True)
class Place:
    """A folder where steps leave what later ones use; what is missing is made.

    Attributes:
        work: the folder.
        any_torch: whether torch may come with CUDA where no CPU build is at hand.
    """

    work: Path
    any_torch: bool = False

    def tree(self) -> Path:
        """A copy of the tracked files, so that no build sees what lies about in the tree."""
        copy = self.work / "tree"
        if not copy.exists():
            for name in run("git", "ls-files", "-z").split("\0")[:-1]:
                if (ROOT / name).is_file():
                    (copy / name).parent.mkdir(parents=True, exist_ok=True)
                    shutil.copy2(ROOT / name, copy / name)
        return copy

    def tools(self) -> Path:
        """The Python of the environment that tests and documentation need: `./run install`."""
        environment = self.work / "tools"
        run("bash", ROOT / "run", "install", VENV=str(environment), PYTHON=sys.executable)
        python = python_of(environment)
        pip = (python, "-m", "pip", "install", "-q", "--no-compile", "-c", NEWEST)
        run(*pip, "-e", f"{ROOT}[docs]")
        return python

    def builder(self) -> Path:
        """The Python of an environment with nothing but `build`."""

        def prepare(python: Path) -> None:
            run(python, "-m", "pip", "install", "-q", "-c", NEWEST, "build")

        return self.environment("builder", prepare)

    def sdist(self) -> Path:
        """The source distribution of the tree."""
        return self._built("--sdist", self.tree(), "sdist", "*.tar.gz")

    def wheel(self) -> Path:
        """The wheel of the tree."""
        return self._built("--wheel", self.tree(), "wheel", "*.whl")

    def wheel_of_sdist(self) -> Path:
        """The wheel that the source distribution builds."""
        unpacked = self.work / "unpacked"
        if not unpacked.exists():
            with tarfile.open(self.sdist()) as files:
                files.extractall(unpacked, filter="data")
        return self._built("--wheel", next(unpacked.iterdir()), "wheel-of-sdist", "*.whl")

    def _built(self, kind: str, source: Path, name: str, pattern: str) -> Path:
        out = self.work / name
        if not list(out.glob(pattern)):
            run(self.builder(), "-m", "build", kind, "--outdir", out, source, folder=self.work)
        return next(out.glob(pattern))

    def installed(self) -> Path:
        """The Python of an environment, in a folder with a space, with the wheel alone."""

        def prepare(python: Path) -> None:
            torch = pinned(NEWEST, "torch")
            install(python, self.wheel(), constraints=NEWEST, torch=torch, any_torch=self.any_torch)

        return self.environment("an empty environment", prepare)

    def environment(
        self, name: str, prepare: Callable[[Path], None], python: str = sys.executable
    ) -> Path:
        """The Python of an environment that is made and prepared once; whole or not there."""
        folder = self.work / name
        if not folder.exists():
            try:
                prepare(make(folder, python))
            except BaseException:
                shutil.rmtree(folder, ignore_errors=True)
                raise
        return python_of(folder)


def version(place: Place) -> str:
    """One version everywhere."""
    source = (ROOT / "src" / "imaginelens" / "__init__.py").read_text(encoding="utf-8")
    changelog = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    citation = (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    return agreed(source, changelog, citation)


def agreed(source: str, changelog: str, citation: str) -> str:
    """The newest heading of the changelog, if the version in it is everywhere the same."""
    (own,) = re.findall(r'^__version__ = "(.+)"$', source, re.MULTILINE)
    heading = next(iter(re.findall(r"^## (.+)$", changelog, re.MULTILINE)), "nothing")
    cited = next(iter(re.findall(r"^version: (.+)$", citation, re.MULTILINE)), "nothing")
    if not (heading.split()[0] == own == cited):
        raise Failed(
            f"the package says {own}, the changelog's newest heading {heading}, CITATION.cff "
            f"{cited}; write the same version into all three"
        )
    return heading


def clean(place: Place) -> str:
    """Everything is committed."""
    changed = run("git", "status", "--porcelain").splitlines()
    if changed:
        raise Failed(
            f"{len(changed)} files differ from the last commit, first {changed[0]}; commit"
        )
    return run("git", "describe", "--always").strip()


def sdist(place: Place) -> str:
    """The sdist builds the wheel that the tree builds."""
    own, other = (wheels.contents(path) for path in (place.wheel(), place.wheel_of_sdist()))
    if found := wheels.differences(own, other):
        raise Failed(f"the wheels of tree and sdist differ in {', '.join(found)}; see MANIFEST.in")
    return f"{len(own)} files, the same bytes"


def contents(place: Place) -> str:
    """The wheel holds what it should and no more."""
    names = list(wheels.contents(place.wheel()))
    if found := wheels.faults(names):
        raise Failed(f"{'; '.join(found)}; see pyproject.toml")
    return f"{len(names)} files, {place.wheel().stat().st_size / 2**20:.1f} MiB"


def demo(place: Place) -> str:
    """The demo runs from the wheel: far from the tree, offline, the package read-only."""
    python, folder = place.installed(), place.work / "another place"
    folder.mkdir(exist_ok=True)
    code = "import imaginelens; print(imaginelens.__path__[0])"
    package = Path(run(python, "-c", code, folder=folder, **OFFLINE).strip())
    with untouched(package):
        program = python.parent / "imaginelens"
        run(program, "demo", "--out", "the demo", folder=folder, **OFFLINE)
    page = folder / "the demo" / "report.html"
    if not page.exists():
        raise Failed(f"the demo ended well and wrote no {page}")
    return f"a report of {page.stat().st_size / 2**10:.0f} KiB"


@contextmanager
def untouched(folder: Path) -> Iterator[None]:
    """Write-protects a folder for a while, and finds what was written all the same, as by root."""
    paths = [folder, *folder.rglob("*")]
    modes = {path: path.stat().st_mode for path in paths}
    before = files(folder)
    for path, mode in modes.items():
        path.chmod(mode & ~0o222)
    try:
        yield
    finally:
        for path, mode in modes.items():
            path.chmod(mode)
    if found := organisms.changed(before, files(folder)):
        raise Failed(f"the package wrote into its own folder: {', '.join(found)}")


def files(folder: Path) -> dict[str, str]:
    """The time and size of each file; not of what Python compiles."""
    return {
        path.relative_to(folder).as_posix(): f"{path.stat().st_mtime_ns} {path.stat().st_size}"
        for path in folder.rglob("*")
        if path.is_file() and path.suffix != ".pyc"
    }


def doctor(place: Place) -> str:
    """The doctor finds nothing wrong in the same environment."""
    program = place.installed().parent / "imaginelens"
    told = run(program, "doctor", folder=place.work, **OFFLINE)
    return told.strip().splitlines()[-1]


def docs(place: Place) -> str:
    """The documentation builds, and no reference in it leads nowhere."""
    links = ROOT / ".typed" / "imaginelens"
    links.mkdir(parents=True, exist_ok=True)
    for source in (*(ROOT / "src" / "imaginelens").iterdir(), *PARTS):
        link = links / source.name
        if not link.exists():
            link.symlink_to(os.path.relpath(source, links))
    site = place.work / "site"
    python = place.tools()
    # without -q, with which --strict sees no warning
    run(python, "-m", "mkdocs", "build", "--strict", "-d", site, NO_MKDOCS_2_WARNING="1")
    return f"{len(list(site.rglob('*.html')))} pages"


def api(place: Place) -> str:
    """What users rely on is what the committed listing says."""
    now = run(place.tools(), "-m", "release.listing").splitlines()
    committed = listing.COMMITTED.read_text(encoding="utf-8").splitlines()
    if now != committed:
        raise Failed("public names changed; run tests/test_release.py, which says what to do")
    return f"{len(now)} lines"


def licences(place: Place) -> str:
    """Nothing that users or developers install is under the GPL or AGPL."""
    packages = [line.split("\t") for line in installed(place)]
    if found := [f"{name} ({told})" for name, _, told in packages if audit.forbidden(told)]:
        raise Failed(f"under the GPL: {', '.join(found)}; do without, or ask for another licence")
    silent = [name for name, _, told in packages if not told]
    return f"{len(packages)} packages; without a licence in their metadata: {len(silent)} " + (
        ", ".join(silent)
    )


def installed(place: Place) -> list[str]:
    """Of each distribution its name, version and licences."""
    return run(place.tools(), ROOT / "release" / "audit.py").splitlines()


def advisories(place: Place) -> str:
    """Nothing that is installed has a hole that the package index knows."""
    packages = [tuple(line.split("\t")[:2]) for line in installed(place)]
    packages = sorted(p for p in packages if p[0] not in {"imaginelens", "pip", "setuptools"})
    try:
        found = audit.holes([(name, version) for name, version in packages])
    except OSError as error:
        raise NotChecked(f"the index cannot be asked for advisories here ({error})") from None
    if found:
        raise Failed(f"{'; '.join(found)}; raise the version in constraints.txt")
    return f"{len(packages)} packages, no known hole"


def digests(place: Place) -> str:
    """The organisms in the tree are those that were measured."""
    recorded = json.loads(organisms.RECORDED.read_text(encoding="utf-8"))
    if found := organisms.changed(recorded, organisms.digests()):
        raise Failed(f"not as recorded: {', '.join(found)}; train anew, or run release.organisms")
    return f"{len(recorded)} files"


def retrain(place: Place) -> str:
    """The recipe makes the smallest organism again."""
    out = place.work / "organisms"
    python = place.tools()
    recipe = ROOT / "examples" / "organisms" / "train.py"
    run(python, recipe, "text", "--seed", "0", "--out", out, **OFFLINE)
    try:
        return organisms.compared(organisms.SHIPPED / "text", out / "text")
    except ValueError as error:
        raise Failed(f"the recipe of `text` now gives another organism: {error}") from None


def other_versions(place: Place, *, python: str, constraints: Path) -> str:
    """The tests of the contract pass with another Python or with other versions."""

    def prepare(made: Path) -> None:
        torch = pinned(constraints, "torch")
        install(
            made, "-e", f"{ROOT}[probes]", *TOOLS,
            constraints=constraints, torch=torch, any_torch=place.any_torch,
        )  # fmt: skip

    name = f"python-{python}-{constraints.stem}"
    made = place.environment(name, prepare, interpreter(python))
    told = run(made, "-m", "pytest", "-q", "-p", "no:cacheprovider", *TESTS, **OFFLINE)
    return told.strip().splitlines()[-1]


PARTS = tuple(ROOT / name for name in ("hooks", "mediation", "probes"))
STEPS: dict[str, Callable[[Place], str]] = {
    "version": version,
    "clean": clean,
    "sdist": sdist,
    "contents": contents,
    "demo": demo,
    "doctor": doctor,
    "docs": docs,
    "api": api,
    "licences": licences,
    "advisories": advisories,
    "digests": digests,
    "retrain": retrain,
    "oldest": partial(other_versions, python="3.11", constraints=OLDEST),
    "python3.12": partial(other_versions, python="3.12", constraints=NEWEST),
    "python3.13": partial(other_versions, python="3.13", constraints=NEWEST),
}
LONG = ("retrain", "oldest", "python3.12", "python3.13")
