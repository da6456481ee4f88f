"""The arrows point down, importing costs little, and every folder of code ships under imaginelens.

Each guard below is followed by a test that it can fail.
"""

import ast
import importlib
import inspect
import os
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SETUPTOOLS = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
FOLDERS = ("hooks", "mediation", "probes", "src/imaginelens")

# Part of imaginelens -> the parts that it may import. "" is the umbrella, which nobody imports.
BELOW_VIEW = {"hooks", "estimates", "mediation", "probes", "organisms"}
MAY_IMPORT = {
    "estimates": {"estimates"},
    "hooks": {"hooks"},
    "mediation": {"hooks", "estimates", "mediation"},
    "probes": {"hooks", "estimates", "probes"},
    "organisms": {"hooks", "organisms"},
    "view": BELOW_VIEW | {"view"},
    "cli": BELOW_VIEW | {"view", "cli"},
    "__main__": {"cli"},
    "removed": set(),
    "__init__": BELOW_VIEW | {"view", "removed"},
}
DRAW = {"plot", "_repr_html_"}  # methods that may import view, when called
HEAVY = {"transformer_lens", "plotly", "anywidget", "sklearn", "pandas", "trl", "datasets"}
# A figure is a plotly figure; its module is imported where something is drawn.
IS_HEAVY = {
    "hooks/bound.py": {"transformer_lens"},
    "src/imaginelens/view/figure.py": {"plotly"},
    "src/imaginelens/view/explorer.py": {"anywidget"},
}


def sources(root: Path = ROOT) -> list[Path]:
    return [path for folder in FOLDERS for path in sorted((root / folder).rglob("*.py"))]


def package_of(folder: Path, root: Path = ROOT) -> str:
    """The name under which a folder of code must ship."""
    parts = folder.relative_to(root).parts
    return ".".join(parts[1:] if parts[0] == "src" else ("imaginelens", *parts))


def part_of(path: Path) -> str:
    """hooks/registry.py -> hooks, src/imaginelens/cli.py -> cli."""
    parts = f"{package_of(path.parent)}.{path.stem}".split(".")
    return parts[1]


def imports(node: ast.AST) -> Iterator[tuple[ast.AST, str]]:
    """Every import below a node, also by `import_module("name")`; relative ones keep their dots."""
    for child in ast.walk(node):
        match child:
            case ast.Import(names=names):
                yield from ((child, alias.name) for alias in names)
            case ast.ImportFrom(module=module, names=names, level=level):
                prefix = "." * level + (f"{module}." if module else "")
                yield from ((child, prefix + alias.name) for alias in names)
            case ast.Call(
                func=ast.Name(id="import_module" | "__import__")
                | ast.Attribute(attr="import_module"),
                args=[ast.Constant(value=str(name)), *_],
            ):
                yield child, name


def wrong_arrows(source: str, part: str) -> set[str]:
    """Names that a module of this part imports and may not."""
    tree = ast.parse(source)
    drawing = {  # the one arrow that points up: what draws a result imports view when called
        child
        for function in ast.walk(tree)
        if isinstance(function, ast.FunctionDef) and function.name in DRAW
        for child, name in imports(function)
        if name.startswith("imaginelens.view")
    }
    ours = re.compile(rf"imaginelens\.({'|'.join(MAY_IMPORT[part])})(\.|$)")
    return {
        name
        for child, name in imports(tree)
        if name.split(".")[0] in {"imaginelens", ""} and child not in drawing
        if not ours.match(name)
    }


@pytest.mark.parametrize("path", sources(), ids=lambda path: path.relative_to(ROOT).as_posix())
def test_arrows_point_down(path: Path) -> None:
    assert not wrong_arrows(path.read_text(), part_of(path))


@pytest.mark.parametrize(
    ("part", "line"),
    [
        ("hooks", "import imaginelens"),
        ("hooks", "import imaginelens as il"),
        ("cli", "from imaginelens import __version__"),
        ("hooks", "from imaginelens.estimates import Estimate"),
        ("hooks", "def run(): from imaginelens.mediation.sweep import sweep"),
        ("hooks", "import importlib; importlib.import_module('imaginelens.view')"),
        ("mediation", "from imaginelens import probes"),
        ("probes", "import imaginelens.mediation.metrics"),
        ("probes", "from ..mediation import metrics"),
        ("organisms", "from imaginelens.estimates.intervals import interval"),
        ("estimates", "from imaginelens.hooks.run import Run"),
        ("mediation", "def draw(self): from imaginelens.view import heatmap"),
        ("hooks", "def __repr__(self): from imaginelens.view import cards"),
        ("hooks", "def _repr_html_(self): from imaginelens.mediation import sweep"),
        ("mediation", "def plot(self): from imaginelens.probes import collect"),
        ("view", "import imaginelens.cli"),
        ("__main__", "import imaginelens.hooks"),
    ],
)
def test_a_wrong_arrow_is_found(part: str, line: str) -> None:
    assert wrong_arrows(line, part)


@pytest.mark.parametrize(
    ("part", "line"),
    [
        ("mediation", "from imaginelens.hooks.registry import HookRegistry"),
        ("mediation", "class Map:\n  def plot(self): from imaginelens.view.figures import heatmap"),
        ("hooks", "class Run:\n  def _repr_html_(self): from imaginelens.view.cards import card"),
        ("view", "from imaginelens import mediation, probes"),
        ("hooks", "import nnsight, imagineother"),
    ],
)
def test_a_right_arrow_passes(part: str, line: str) -> None:
    assert not wrong_arrows(line, part)


def imported_at_once(source: str) -> set[str]:
    """Top-level names imported when a module is: not in functions, not for type checkers only."""
    found: set[str] = set()
    waiting: list[ast.AST] = [ast.parse(source)]
    while waiting:
        node = waiting.pop()
        match node:
            case ast.FunctionDef() | ast.AsyncFunctionDef() | ast.Lambda():
                continue
            case ast.If(test=ast.Name(id="TYPE_CHECKING") | ast.Attribute(attr="TYPE_CHECKING")):
                waiting += node.orelse
            case ast.Import() | ast.ImportFrom():
                found |= {name.split(".")[0] for _, name in imports(node)}
            case _:
                waiting += ast.iter_child_nodes(node)
    return found


@pytest.mark.parametrize("path", sources(), ids=lambda path: path.relative_to(ROOT).as_posix())
def test_heavy_packages_are_imported_where_used(path: Path) -> None:
    own = IS_HEAVY.get(path.relative_to(ROOT).as_posix(), set())
    assert imported_at_once(path.read_text()) & HEAVY == own


@pytest.mark.parametrize(
    "source",
    [
        "import plotly.graph_objects as go",
        "from transformer_lens import ActivationCache",
        "try:\n  import sklearn\nexcept ImportError:\n  sklearn = None",
        "class Widget:\n  import anywidget",
        "if TYPE_CHECKING:\n  pass\nelse:\n  import pandas",
    ],
)
def test_a_heavy_import_is_found(source: str) -> None:
    assert imported_at_once(source) & HEAVY


@pytest.mark.parametrize(
    "source",
    ["def plot():\n  import plotly", "if TYPE_CHECKING:\n  import pandas as pd", "import numpy"],
)
def test_a_late_import_passes(source: str) -> None:
    assert not imported_at_once(source) & HEAVY


def heavy_after(statement: str) -> set[str]:
    """Which heavy packages a fresh interpreter has loaded after a statement."""
    code = f"import sys\n{statement}\nprint(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(done.stdout.split()) & HEAVY


def test_import_loads_nothing_heavy() -> None:
    assert not heavy_after("import imaginelens")
    assert "plotly" not in heavy_after("import imaginelens.cli, imaginelens.view.demo")
    assert "plotly" not in heavy_after("from imaginelens.view import result_cards, run_cards")


def test_a_loaded_heavy_package_is_found() -> None:
    assert heavy_after("import plotly") == {"plotly"}


def test_annotations_are_checked_while_the_tests_run() -> None:
    """With --jaxtyping-packages of pyproject.toml, functions of ours are wrapped by jaxtyping."""
    names = importlib.import_module("imaginelens.hooks.names")
    functions = [value for value in vars(names).values() if inspect.isfunction(value)]
    assert any("jaxtyping" in function.__code__.co_filename for function in functions)


def test_nothing_can_be_installed_while_the_tests_run() -> None:
    """transformer_lens tries to: boot_transformers calls pip or uv for a missing torchvision."""
    pip = [sys.executable, "-m", "pip", "install", "--dry-run", "--ignore-installed", "--no-deps"]
    assert subprocess.run([*pip, "torchvision"], capture_output=True).returncode != 0
    assert os.environ["UV_OFFLINE"] == "1"


def not_shipped(root: Path, table: dict[str, dict[str, list[str]]]) -> set[str]:
    """Folders of code and data files that the wheel would leave out without a word."""
    folders = {path.parent for path in sources(root)}
    wanted = {package_of(folder, root): folder.relative_to(root).as_posix() for folder in folders}
    missing = {
        name
        for name, folder in wanted.items()
        if name not in table["packages"] or table["package-dir"].get(name) != folder
    }
    shipped = {
        path
        for name, patterns in table["package-data"].items()
        for pattern in patterns
        for path in (root / table["package-dir"][name]).glob(pattern)
    }
    data = {
        path
        for folder in FOLDERS
        for path in (root / folder).rglob("*")
        if path.is_file() and path.suffix not in {".py", ".pyc"} and not path.name.startswith(".")
    }
    return missing | {path.relative_to(root).as_posix() for path in data - shipped}


def test_everything_ships() -> None:
    assert not not_shipped(ROOT, SETUPTOOLS)
    assert set(SETUPTOOLS["packages"]) == set(SETUPTOOLS["package-dir"])


@pytest.mark.parametrize("left_out", ["hooks/deep/new.py", "src/imaginelens/view/a/style.css"])
def test_what_does_not_ship_is_found(left_out: str, tmp_path: Path) -> None:
    (tmp_path / left_out).parent.mkdir(parents=True)
    (tmp_path / left_out).touch()
    assert not_shipped(tmp_path, SETUPTOOLS)
