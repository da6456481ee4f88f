"""What a wheel holds, and whether two wheels are the same but for times and checksums of them."""

import zipfile
from pathlib import Path, PurePosixPath

NEEDED = (
    "imaginelens/__init__.py",
    "imaginelens/py.typed",
    "imaginelens/hooks/__init__.py",
    "imaginelens/mediation/__init__.py",
    "imaginelens/probes/__init__.py",
    "imaginelens/organisms/checkpoints/latent-content/model.safetensors",
)


def contents(wheel: Path) -> dict[str, bytes]:
    """Each file of a wheel; not RECORD, which lists the others' checksums."""
    with zipfile.ZipFile(wheel) as files:
        names = [name for name in files.namelist() if not name.endswith(("/", "/RECORD"))]
        return {name: files.read(name) for name in names}


def differences(one: dict[str, bytes], other: dict[str, bytes]) -> list[str]:
    """Names that only one of two wheels has, or whose bytes differ.

    >>> differences({"a": b"1", "b": b"2"}, {"a": b"3", "c": b"2"})
    ['a', 'b', 'c']
    """
    return sorted(name for name in {*one, *other} if one.get(name) != other.get(name))


def faults(names: list[str]) -> list[str]:
    """What is wrong with the list of a wheel's files.

    >>> faults([*NEEDED, "imaginelens-1.dist-info/licenses/LICENSE", "tests/test_a.py"])
    ['tests/test_a.py is no part of the package']
    """
    found = [f"{name} is missing" for name in NEEDED if name not in names]
    if not any(".dist-info/" in name and PurePosixPath(name).name == "LICENSE" for name in names):
        found.append("the licence is missing")
    for name in names:
        top, *rest = PurePosixPath(name).parts
        if top != "imaginelens" and not top.endswith(".dist-info"):
            found.append(f"{name} is no part of the package")
        elif {"tests", "__pycache__"} & {*rest} or PurePosixPath(name).name.startswith("test_"):
            found.append(f"{name} does not belong in a wheel")
    return found
