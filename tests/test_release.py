"""The parts of the release checklist that need no environment, each with a case that fails.

After a change of public names that is meant: `python -m release.listing --write`.
"""

import ast
import importlib
import json
import re
import sys
import tomllib
import urllib.error
import zipfile
from email.message import Message
from importlib.metadata import Distribution
from pathlib import Path

import pytest

import imaginelens as il
from imaginelens import removed

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
audit, check, environments, listing, organisms, outcome, steps, wheels = (
    importlib.import_module(f"release.{name}")
    for name in (
        "audit", "check", "environments", "listing", "organisms", "outcome", "steps", "wheels"
    )
)  # fmt: skip
sys.path.remove(str(ROOT))


# ---- public names ------------------------------------------------------------------------------


def test_the_public_names_are_the_committed_ones() -> None:
    committed = listing.COMMITTED.read_text(encoding="utf-8").splitlines()
    gone = {*removed.REMOVED, *removed.DEPRECATED}
    changed = listing.changes(committed, listing.lines(), gone)
    assert not changed, "\n".join([*changed, "if meant: python -m release.listing --write"])


def test_a_changed_listing_is_told() -> None:
    committed = ["imaginelens.a(x)", "imaginelens.b(x)", "imaginelens.c is imaginelens.hooks.c"]
    now = ["imaginelens.a(x)", "imaginelens.b(x, y=1)", "imaginelens.d()"]
    assert listing.changes(committed, now, set()) == [
        "new: imaginelens.b(x, y=1)",
        "new: imaginelens.d()",
        "changed, was: imaginelens.b(x)",
        "gone, and not in src/imaginelens/removed.py: imaginelens.c is imaginelens.hooks.c",
    ]
    assert listing.changes(committed, now, {"c"})[-1].startswith("gone: imaginelens.c")
    assert listing.changes(committed, committed, set()) == []


def test_a_listing_tells_parameters_and_members() -> None:
    class Thing:
        size: int
        __module__ = "imaginelens.planted"

        def __init__(self, a: int, *, b: object = None) -> None: ...
        def act(self, how: str = "so") -> None: ...
        def _hidden(self) -> None: ...
        @property
        def name(self) -> str:
            return ""

    assert sorted(listing.of_value("il.Thing", Thing)) == [
        "il.Thing(a, *, b=None)",
        "il.Thing.act(self, how='so')",
        "il.Thing.name",
        "il.Thing.size",
    ]


def test_every_name_is_listed_once_with_its_home() -> None:
    told = listing.lines()
    names = [line.partition(" is ")[0].partition("(")[0] for line in told if line[0] != "$"]
    assert len(names) == len(set(names))
    assert {f"imaginelens.{name}" for name in il.__all__} <= set(names)
    assert "$ imaginelens study --resume" in told


def test_a_removed_name_says_what_to_use(monkeypatch: pytest.MonkeyPatch) -> None:
    name = "patch_all"
    monkeypatch.setitem(removed.REMOVED, name, "since 0.3; use il.sweep")
    with pytest.raises(AttributeError, match=r"no 'patch_all' any more: since 0.3; use il.sweep"):
        getattr(il, name)
    with pytest.raises(AttributeError, match=r"no 'patch_none'; see dir"):
        getattr(il, name.replace("all", "none"))
    assert not hasattr(il, name)


def test_a_deprecated_name_works_and_warns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(removed.DEPRECATED, "patch_all", "sweep")
    with pytest.warns(FutureWarning, match=r"il.patch_all is deprecated .* use il.sweep"):
        assert il.patch_all is il.sweep


def test_the_tables_and_the_page_say_the_same() -> None:
    page = (ROOT / "docs" / "stability.md").read_text(encoding="utf-8")
    assert unlisted(page, {**removed.REMOVED, **removed.DEPRECATED}) == set()
    assert unlisted(page, {"gone_for_good": "use il.sweep"}) == {"gone_for_good"}


def unlisted(page: str, table: dict[str, str]) -> set[str]:
    """Names that differ between the tables and the rows of the page."""
    rows = set(re.findall(r"^\| `il\.(\w+)` \|", page, re.MULTILINE))
    return rows ^ set(table)


def test_what_is_gone_is_not_public_and_what_replaces_it_is() -> None:
    assert not {*removed.REMOVED, *removed.DEPRECATED} & {*il.__all__}
    assert set(removed.DEPRECATED.values()) <= set(il._WHERE)


# ---- wheels ------------------------------------------------------------------------------------


def wheel(path: Path, **added: bytes) -> Path:
    names = [*wheels.NEEDED, "imaginelens-1.dist-info/licenses/LICENSE"]
    with zipfile.ZipFile(path, "w") as made:
        for name in names:
            made.writestr(name, b"same")
        made.writestr("imaginelens-1.dist-info/RECORD", str(path))
        for name, data in added.items():
            made.writestr(name, data)
    return path


def test_wheels_that_differ_in_their_record_alone_are_the_same(tmp_path: Path) -> None:
    one, other = (wheels.contents(wheel(tmp_path / name)) for name in ("a.whl", "b.whl"))
    assert wheels.differences(one, other) == []
    assert wheels.faults(list(one)) == []


def test_another_byte_or_file_in_a_wheel_is_found(tmp_path: Path) -> None:
    one = wheels.contents(wheel(tmp_path / "a.whl", **{"imaginelens/x.py": b"1"}))
    other = wheels.contents(wheel(tmp_path / "b.whl", **{"imaginelens/x.py": b"2", "y": b""}))
    assert wheels.differences(one, other) == ["imaginelens/x.py", "y"]


@pytest.mark.parametrize(
    ("left_out", "added", "told"),
    [
        ("imaginelens/py.typed", [], "imaginelens/py.typed is missing"),
        ("imaginelens-1.dist-info/licenses/LICENSE", [], "the licence is missing"),
        ("", ["release/check.py"], "release/check.py is no part"),
        ("", ["imaginelens/tests/a.py"], "imaginelens/tests/a.py does not belong"),
        ("", ["imaginelens/hooks/test_a.py"], "does not belong"),
    ],
)
def test_a_wrong_list_of_files_is_found(left_out: str, added: list[str], told: str) -> None:
    names = [*wheels.NEEDED, "imaginelens-1.dist-info/licenses/LICENSE", *added]
    (found,) = wheels.faults([name for name in names if name != left_out])
    assert told in found


# ---- licences and holes ------------------------------------------------------------------------


class Package(Distribution):
    """A distribution with just these metadata."""

    def __init__(self, *lines: str) -> None:
        self.lines = lines

    def read_text(self, filename: str) -> str | None:
        return "\n".join(["Name: x", *self.lines]) if filename == "METADATA" else None

    def locate_file(self, path: object) -> Path:
        raise NotImplementedError


@pytest.mark.parametrize(
    ("lines", "no"),
    [
        (["License-Expression: MIT"], False),
        (["License-Expression: GPL-3.0-or-later"], True),
        (["License-Expression: AGPL-3.0-only"], True),
        (["License-Expression: MIT OR GPL-2.0-only"], False),
        (["License-Expression: LGPL-3.0-only"], False),
        (["License: GNU General Public License v3"], True),
        (["License: GNU Affero General Public License"], True),
        (["License: GNU Lesser General Public License"], False),
        (["Classifier: License :: OSI Approved :: GNU General Public License v2 (GPLv2)"], True),
        (["Classifier: License :: OSI Approved :: BSD License"], False),
        ([], False),
    ],
)
def test_licences_are_read_from_each_field(lines: list[str], no: bool) -> None:
    assert audit.forbidden(audit.licence(Package(*lines))) is no


def test_an_open_hole_is_told_and_a_withdrawn_one_is_not() -> None:
    answer = {"vulnerabilities": [{"id": "A"}, {"id": "B", "withdrawn": "yes"}]}
    assert audit.advisories("p", "1", answer) == ["p 1: A, mended in no version"]
    assert audit.advisories("p", "1", {"vulnerabilities": []}) == []


def test_an_index_that_cannot_be_asked_is_not_taken_for_a_clean_one(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def refuse(address: str, timeout: float) -> None:
        raise urllib.error.HTTPError(address, 404, "Not Found", Message(), None)

    monkeypatch.setattr("urllib.request.urlopen", refuse)
    monkeypatch.setattr(steps, "installed", lambda place: ["numpy\t2.0\tBSD"])
    with pytest.raises(outcome.NotChecked, match="cannot be asked for advisories"):
        steps.advisories(steps.Place(tmp_path))


# ---- the rest ----------------------------------------------------------------------------------


def test_one_version_everywhere(tmp_path: Path) -> None:
    assert steps.version(steps.Place(tmp_path)).startswith(il.__version__)
    source, heading, cited = '__version__ = "1.2"', "## 1.2 (soon)\n## 1.1", "version: 1.2"
    assert steps.agreed(source, heading, cited) == "1.2 (soon)"
    for wrong in [(source, "## 1.1", cited), (source, heading, "version: 1.1"), (source, "", "")]:
        with pytest.raises(outcome.Failed, match="the same version into all three"):
            steps.agreed(*wrong)


def test_the_shipped_organisms_are_the_recorded_ones(tmp_path: Path) -> None:
    assert steps.digests(steps.Place(tmp_path)).endswith(" files")
    recorded = json.loads(organisms.RECORDED.read_text())
    assert organisms.changed(recorded, recorded | {"text/model.safetensors": "other"})


def test_a_trained_organism_is_compared_with_the_shipped_one(tmp_path: Path) -> None:
    folders = [tmp_path / name for name in ("shipped", "same", "near", "far")]
    for folder, weights, accuracy in zip(folders, "aabb", (0.9, 0.9, 0.905, 0.8), strict=True):
        folder.mkdir()
        (folder / "model.safetensors").write_text(weights)
        (folder / "card.json").write_text(json.dumps({"accuracy": accuracy}))
    shipped, same, near, far = folders
    assert organisms.compared(shipped, same) == "the same weights, byte for byte"
    assert organisms.compared(shipped, near).startswith("other weights, accuracy 0.905")
    with pytest.raises(ValueError, match=r"accuracy 0.8 where the shipped one has 0.9"):
        organisms.compared(shipped, far)


def test_an_environment_is_made_once_and_whole(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def make(folder: Path, python: str) -> Path:
        folder.mkdir()
        made.append(python)
        return folder / "python"

    def fails(python: Path) -> None:
        raise outcome.NotChecked("no torch")

    made: list[str] = []
    monkeypatch.setattr(steps, "make", make)
    place = steps.Place(tmp_path)
    with pytest.raises(outcome.NotChecked):
        place.environment("a", fails, "python3.12")
    assert not (tmp_path / "a").exists()
    for _ in range(2):
        python = place.environment("a", lambda python: None, "python3.12")
    assert python == environments.python_of(tmp_path / "a")
    assert made == ["python3.12"] * 2


def test_what_is_written_into_a_protected_folder_is_found(tmp_path: Path) -> None:
    (tmp_path / "a.py").write_text("1")
    with steps.untouched(tmp_path):
        pass
    with pytest.raises(outcome.Failed, match=r"its own folder: b\.json"):  # noqa: PT012
        with steps.untouched(tmp_path):
            tmp_path.chmod(0o755)
            (tmp_path / "b.json").touch()


def test_every_step_ends_in_a_line_and_failures_in_the_status(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fails(place: object) -> str:
        raise outcome.Failed("it is so; do this")

    def lacks(place: object) -> str:
        raise outcome.NotChecked("no browser; install one")

    table = {"version": lambda place: "1", "docs": lacks}
    monkeypatch.setattr(check, "STEPS", table)
    assert check.main([]) == 0
    monkeypatch.setattr(check, "STEPS", {**table, "retrain": fails})
    assert check.main(["--fast"]) == 0
    assert check.main([]) == 1
    told = capsys.readouterr().out.splitlines()[-4:]
    assert [line.split()[0] for line in told] == ["ok", "not", "FAILED", "1"]
    assert told[2].endswith("it is so; do this")
    assert told[3] == "1 ok, 1 failed (retrain), 1 not checked (docs)"


def test_a_command_that_fails_is_told_with_its_end() -> None:
    with pytest.raises(outcome.Failed, match=r"ended with 3:\n    what went wrong"):
        environments.run(sys.executable, "-c", "print('what went wrong'); raise SystemExit(3)")


def test_a_python_that_is_not_there_is_not_checked() -> None:
    with pytest.raises(outcome.NotChecked, match=r"no Python 3\.99 was found"):
        environments.interpreter("3.99")


@pytest.mark.parametrize("any_torch", [False, True])
def test_torch_with_cuda_is_taken_only_where_it_is_allowed(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, any_torch: bool
) -> None:
    asked: list[str] = []

    def run(*command: str | Path, **_: object) -> str:
        asked.append(" ".join(map(str, command)))
        if command[-1] in ("torch==9.9+cpu", "uv"):
            raise outcome.Failed("no such build")
        return ""

    monkeypatch.setattr(environments, "run", run)
    monkeypatch.setattr(environments.sys, "platform", "linux")
    options = {"constraints": tmp_path / "c.txt", "torch": "9.9", "any_torch": any_torch}
    if not any_torch:
        with pytest.raises(outcome.NotChecked, match="--any-torch"):
            environments.install(tmp_path / "python", "einops", **options)
        return
    environments.install(tmp_path / "python", "einops", **options)
    assert [line.split()[-1] for line in asked] == ["torch==9.9+cpu", "uv", "torch==9.9", "einops"]


def test_the_oldest_versions_are_those_of_pyproject() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    floors = dict(
        map(floor, [*project["dependencies"], *project["optional-dependencies"]["probes"]])
    )
    oldest = {name: environments.pinned(steps.OLDEST, name) for name in floors}
    assert {name for name in floors if not at_floor(oldest[name], floors[name])} == set()
    assert not at_floor("1.2.1", "1.1")
    with pytest.raises(outcome.Failed, match=r"has no line nothing==VERSION"):
        environments.pinned(steps.OLDEST, "nothing")


def floor(requirement: str) -> tuple[str, str]:
    """`numpy>=1.26,<3` -> numpy, 1.26."""
    name, _, rest = requirement.partition(">=")
    return name, rest.partition(",")[0]


def at_floor(version: str, lowest: str) -> bool:
    """Whether a version is the first release of what a floor names (1.11 may be 1.11.1)."""
    return f"{version}.".startswith(f"{lowest}.")


def test_the_checklist_needs_nothing_but_python() -> None:
    allowed = {*sys.stdlib_module_names, "release"}
    for path in sorted((ROOT / "release").glob("*.py")):
        assert not needed(path.read_text()) - allowed, path.name
    assert needed("import numpy.linalg\nfrom a.b import c") == {"numpy", "a"}


def needed(source: str) -> set[str]:
    """The packages that a file imports."""
    nodes = list(ast.walk(ast.parse(source)))
    plain = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    named = {node.module or "" for node in nodes if isinstance(node, ast.ImportFrom)}
    return {name.split(".")[0] for name in plain | named}
