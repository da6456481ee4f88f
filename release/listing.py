"""What users may rely on, as sorted lines: public names, their parameters, commands, options.

python -m release.listing            # print it
python -m release.listing --write    # into tests/public_names.txt, after a change that is meant
"""

import argparse
import ast
import inspect
import sys
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

COMMITTED = Path(__file__).parents[1] / "tests" / "public_names.txt"
PACKAGES = (
    "imaginelens",
    "imaginelens.hooks",
    "imaginelens.mediation",
    "imaginelens.probes",
)


def lines() -> list[str]:
    """The listing of the installed version."""
    found = {line for package in PACKAGES for line in of_package(import_module(package))}
    return sorted(found | set(of_commands()))


def of_package(package: ModuleType) -> Iterator[str]:
    """A package's names; what it hands on from another of `PACKAGES` is told there."""
    if package.__name__ == "imaginelens":
        for name in sorted({*package.__all__, *package._WHERE}):
            home = package._WHERE.get(name)
            if home in PACKAGES:
                yield f"imaginelens.{name} is {home}.{name}"
            else:
                yield from of_value(f"imaginelens.{name}", getattr(package, name))
        return
    for name in exported(inspect.getsource(package)):
        yield from of_value(f"{package.__name__}.{name}", getattr(package, name))


def exported(source: str) -> list[str]:
    """The names that an `__init__` hands on by `import X as X`.

    >>> exported("from a.b import C as C\\nfrom a.b import d")
    ['C']
    """
    imports = [node for node in ast.parse(source).body if isinstance(node, ast.ImportFrom)]
    return [alias.name for node in imports for alias in node.names if alias.asname == alias.name]


def of_value(name: str, value: Any) -> Iterator[str]:
    """The lines of one public name."""
    if inspect.ismodule(value):
        yield f"{name} is a module"
        if not hasattr(value, "__path__"):  # of packages of ours, only those in PACKAGES
            for inner, function in vars(value).items():
                if inspect.isfunction(function) and function.__module__ == value.__name__:
                    yield from (
                        () if inner.startswith("_") else of_value(f"{name}.{inner}", function)
                    )
    elif inspect.isclass(value):
        yield f"{name}{parameters(value)}"
        yield from of_class(name, value)
    elif callable(value):
        yield f"{name}{parameters(value)}"
    else:
        yield f"{name} is a {type(value).__name__}"


def of_class(name: str, kind: type) -> Iterator[str]:
    """Methods, properties and annotated attributes that classes of ours define."""
    ours = [base for base in kind.__mro__ if base.__module__.startswith("imaginelens")]
    for base in ours:
        for inner in {*vars(base), *vars(base).get("__annotations__", {})}:
            if inner.startswith("_"):
                continue
            value = inspect.getattr_static(kind, inner, None)
            if isinstance(value, staticmethod | classmethod):
                value = getattr(kind, inner)
            if inspect.isfunction(value) or inspect.ismethod(value):
                yield f"{name}.{inner}{parameters(value)}"
            else:
                yield f"{name}.{inner}"


def parameters(value: Any) -> str:
    """The parameters of a callable with their plain defaults, without annotations.

    >>> parameters(lambda a, *, b=1, c=object(): None)
    '(a, *, b=1, c=...)'
    """
    try:
        signature = inspect.signature(value)
    except ValueError:  # written in C
        return "(...)"
    plain = [
        one.replace(annotation=one.empty, default=default(one.default))
        for one in signature.parameters.values()
    ]
    return str(inspect.Signature(plain))


class Written(str):
    """A default as it is to be printed."""

    def __repr__(self) -> str:
        return str(self)


def default(value: Any) -> Any:
    """What a default looks like in every version of Python and of other packages."""
    if value is inspect.Parameter.empty:
        return value
    plain = isinstance(value, bool | int | float | str | None)
    return Written(repr(value) if plain else "...")


def of_commands() -> Iterator[str]:
    """The commands of the terminal and their options."""
    parser = import_module("imaginelens.cli")._parser()
    (commands,) = [one for one in parser._actions if isinstance(one, argparse._SubParsersAction)]
    for command, options in commands.choices.items():
        yield f"$ imaginelens {command}"
        for option in options._actions:
            yield f"$ imaginelens {command} {' '.join(option.option_strings) or option.dest}"


def changes(committed: list[str], now: list[str], removed: set[str]) -> list[str]:
    """What is to be done before the listing may be committed; nothing if nothing changed.

    `removed` are the names of `imaginelens` that the tables of removed and deprecated names hold.

    >>> changes(["imaginelens.a()"], ["imaginelens.a()", "imaginelens.b()"], set())
    ['new: imaginelens.b()']
    """
    gone = [line for line in committed if line not in now]
    told = [f"new: {line}" for line in now if line not in committed]
    names = {line.partition(" is ")[0].partition("(")[0] for line in now}
    for line in gone:
        name = line.partition(" is ")[0].partition("(")[0]
        if name in names:
            told.append(f"changed, was: {line}")
        elif name.count(".") == 1 and name.removeprefix("imaginelens.") not in removed:
            told.append(f"gone, and not in src/imaginelens/removed.py: {line}")
        else:
            told.append(f"gone: {line}")
    return told


def main() -> int:
    now = lines()
    if sys.argv[1:] == ["--write"]:
        COMMITTED.write_text("\n".join(now) + "\n", encoding="utf-8")
    else:
        print("\n".join(now))
    return 0


if __name__ == "__main__":
    sys.exit(main())
