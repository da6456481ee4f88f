"""What the pages and docstrings say is run, under the names that a user imports."""

import ast
import doctest
import importlib
import inspect
import re
import subprocess
import sys
import tomllib
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[1]
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
PACKAGE_DIR: dict[str, str] = PYPROJECT["tool"]["setuptools"]["package-dir"]
PAGES = [
    *(ROOT / name for name in ("README.md", "CHANGELOG.md", "CONTRIBUTING.md")),
    *sorted((ROOT / "docs").rglob("*.md")),
]
FENCE = re.compile(r"^```(\w*)[^\n]*\n(.*?)^```$", re.DOTALL | re.MULTILINE)


def modules() -> list[str]:
    """Every module that ships, under the name that a user imports."""
    return [
        package if path.stem == "__init__" else f"{package}.{path.stem}"
        for package, folder in PACKAGE_DIR.items()
        for path in sorted((ROOT / folder).glob("*.py"))
        if path.stem != "__main__"
    ]


def run_docstrings(module: ModuleType) -> tuple[int, int]:
    """How many docstring examples of a module ran, and how many of them failed."""
    flags = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
    runner = doctest.DocTestRunner(optionflags=flags)
    for test in doctest.DocTestFinder().find(module, module.__name__):
        runner.run(test)
    return runner.tries, runner.failures


def written_examples(source: str) -> int:
    """How many examples the docstrings of a module hold."""
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    nodes = [node for node in ast.walk(ast.parse(source)) if isinstance(node, kinds)]
    docstrings = [ast.get_docstring(node) or "" for node in nodes]
    return sum(len(doctest.DocTestParser().get_examples(text)) for text in docstrings)


@pytest.mark.parametrize("name", modules())
def test_docstring_examples(name: str) -> None:
    module = importlib.import_module(name)
    ran, failed = run_docstrings(module)
    assert failed == 0
    assert ran == written_examples(inspect.getsource(module))


def test_a_wrong_docstring_example_is_found() -> None:
    module = ModuleType("a_planted_page")
    source = "def double(x):\n    '''Twice x.\n\n    >>> double(1)\n    3\n    '''\n"
    exec(source, module.__dict__)
    assert (run_docstrings(module), written_examples(source)) == ((1, 1), 1)


def test_a_docstring_that_doctest_skips_is_found() -> None:
    module = ModuleType("a_planted_page")
    source = "def one():\n    '>>> 1'\n"
    exec(source, module.__dict__)
    module.one.__module__ = "os"  # as a wrapper of another module would
    assert (run_docstrings(module), written_examples(source)) == ((0, 0), 1)


def script_of(page: str) -> str:
    """The python blocks of a page as one script, each line where the page has it."""
    lines = [""] * (page.count("\n") + 1)
    for block in FENCE.finditer(page):
        if block[1] == "python":
            start = page.count("\n", 0, block.start(2))
            code = block[2].splitlines()
            lines[start : start + len(code)] = code
    return "\n".join(lines)


def run_script(code: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """Run as a user would, beside files of theirs that have our folders' names."""
    theirs = "raise RuntimeError('imported the file of the user')\n"
    (folder / "hooks.py").write_text(theirs)
    (folder / "probes").mkdir()
    (folder / "probes" / "__init__.py").write_text(theirs)
    (folder / "page.py").write_text(code)
    command = [sys.executable, "page.py"]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_python_blocks(page: Path, tmp_path: Path) -> None:
    if code := script_of(page.read_text()).strip("\n"):
        done = run_script(script_of(page.read_text()), tmp_path)
        assert done.returncode == 0, f"{code}\n{done.stdout}\n{done.stderr}"


def test_a_wrong_python_block_is_found(tmp_path: Path) -> None:
    page = "# Title\n```python\nx = 1\n```\n\n```bash\nexit 1\n```\n```python\nassert x == 2\n```\n"
    done = run_script(script_of(page), tmp_path)
    assert done.returncode == 1
    assert 'page.py", line 10' in done.stderr


def test_a_collision_with_files_of_the_user_is_found(tmp_path: Path) -> None:
    assert "imported the file of the user" in run_script("import probes", tmp_path).stderr


def prose(page: str) -> str:
    """A page without its code and comments."""
    return re.sub(r"<!--.*?-->|`[^`\n]*`", "", FENCE.sub("", page), flags=re.DOTALL)


def anchors(page: str) -> set[str]:
    """The names under which GitHub links the headings of a page."""
    headings = re.findall(r"^#+ +(.+?) *$", FENCE.sub("", page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def broken_links(page: Path) -> list[str]:
    """Relative links of a page, pictures included, that lead nowhere."""
    text = prose(page.read_text())
    links = re.findall(r"\]\(([^)\s]+)", text) + re.findall(r"(?:src|href)=\"([^\"]+)\"", text)
    broken = []
    for link in links:
        target, _, anchor = link.partition("#")
        if re.match(r"[a-z]+:", link):
            continue
        path = page.parent / target if target else page
        if not path.exists() or (anchor and anchor not in anchors(path.read_text())):
            broken.append(link)
    return broken


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_links_lead_somewhere(page: Path) -> None:
    assert not broken_links(page)


def test_a_broken_link_is_found(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(
        "# A title, here\n[a](missing.md) [b](#a-title-here) [c](#nowhere) [d](https://x.org/y)\n"
        '![e](missing.png) <img src="f.png"> `[g](code)` <!-- [h](later.md) -->\n'
    )
    assert broken_links(page) == ["missing.md", "#nowhere", "missing.png", "f.png"]


def undocumented(module: ModuleType) -> list[str]:
    """Public names without a docstring of their own (dataclasses write themselves a poor one)."""
    found = []
    for name in module.__all__:
        value = getattr(module, name)
        doc = inspect.getdoc(value) or ""
        if isinstance(value, str | tuple | dict):  # a plain value says what it is
            continue
        if not doc or doc.startswith(f"{getattr(value, '__name__', name)}("):
            found.append(name)
    return found


def test_every_public_name_has_a_docstring() -> None:
    assert not undocumented(importlib.import_module("imaginelens"))


def test_a_missing_docstring_is_found() -> None:
    module = ModuleType("a_planted_page")
    exec(
        "from dataclasses import dataclass\n"
        "def silent(): ...\n"
        "def spoken(): 'Says so.'\n"
        "@dataclass\nclass Generated:\n  x: int\n"
        "__all__ = ['silent', 'spoken', 'Generated']",
        module.__dict__,
    )
    assert undocumented(module) == ["silent", "Generated"]
