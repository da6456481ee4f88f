"""What this library takes for granted of other packages: named, run, and told when it breaks."""

import inspect
import re
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

ROOT = Path(__file__).parents[1]
PACKAGES = {  # as they are imported -> as they are installed
    "nnsight": "nnsight",
    "transformers": "transformers",
    "transformer_lens": "transformer-lens",
    "torch": "torch",
    "huggingface_hub": "huggingface_hub",
}


class AssumptionBroke(AssertionError):
    """A package does not do what this library relies on."""


@dataclass(frozen=True)
class Assumption:
    """One behaviour of another package.

    Attributes:
        says: the behaviour, in a sentence.
        used: where in our code, as "file: a word that stands there".
        look: what to look at, or do, when it breaks.
        check: fails if the package behaves otherwise.
    """

    package: str
    name: str
    says: str
    used: tuple[str, ...]
    look: str
    check: Callable[[], None]

    def hold(self) -> None:
        """Run the check.

        Raises:
            AssumptionBroke: it fails, however it does.
        """
        try:
            self.check()
        except Exception as error:
            distribution = PACKAGES[self.package]
            raise AssumptionBroke(
                f"{distribution} {version(distribution)} breaks an assumption: {self.says} Used in "
                f"{'; '.join(self.used)}. Look at: {self.look} (What came: "
                f"{type(error).__name__}: {str(error).strip().splitlines()[:1]})"
            ) from error

    def stale(self) -> list[str]:
        """The places that are named and do not exist."""
        gone = []
        for place in self.used:
            file, word = place.split(": ", 1)
            path = ROOT / file
            if not path.is_file() or word not in path.read_text(encoding="utf-8"):
                gone.append(place)
        return gone


ASSUMPTIONS: list[Assumption] = []


def assumed(
    package: str, *, used: str | tuple[str, ...], look: str
) -> Callable[[Callable[[], None]], Callable[[], None]]:
    """Name the check below as an assumption; its docstring says what is assumed."""

    def register(check: Callable[[], None]) -> Callable[[], None]:
        says = re.sub(r"\s+", " ", inspect.getdoc(check) or "")
        assert says.endswith("."), f"{check.__name__} needs a docstring that is a sentence"
        assert package in PACKAGES, package
        places = (used,) if isinstance(used, str) else used
        ASSUMPTIONS.append(Assumption(package, check.__name__, says, places, look, check))
        return check

    return register


def page() -> str:
    """All assumptions as a page of the documentation."""
    lines = [
        "# What we rely on",
        "",
        "Behaviours of other packages that this library takes for granted, beyond what they promise"
        " in words. Each is a test in `tests/contract/test_assumptions.py`; a release that breaks"
        " one fails there, and the failure says which, where it is used and what to look at. This"
        " page is made from the tests: `PYTHONPATH=tests python"
        " tests/contract/test_assumptions.py`.",
    ]
    for package, distribution in PACKAGES.items():
        own = [each for each in ASSUMPTIONS if each.package == package]
        if not own:
            continue
        lines += ["", f"## {distribution}", "", "| | assumption | used in | when it breaks |"]
        lines += ["|-|-|-|-|"]
        for number, each in enumerate(own, start=1):
            files = dict.fromkeys(place.split(": ", 1)[0] for place in each.used)
            used = "<br>".join(f"`{file}`" for file in files)
            says, look = (text.replace("|", "\\|") for text in (each.says, each.look))
            lines.append(f"| {number} | {says} | {used} | {look} |")
    return "\n".join(lines) + "\n"
