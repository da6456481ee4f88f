"""axe-core, the rules of accessibility that run in a page, from a package that brings it along."""

from importlib.metadata import PackageNotFoundError, distribution

import pytest

PACKAGE = "axe-playwright-python"  # without what it needs: of it only the script is used


def script(package: str = PACKAGE) -> str:
    """The JavaScript that defines `axe`; without it the test fails, as a skip would hide that no
    rule was checked."""
    try:
        found = distribution(package)
    except PackageNotFoundError:
        pytest.fail(
            f"{package} is not installed; to check the page with axe-core: "
            f"pip install --no-deps -c constraints.txt {package}",
            pytrace=False,
        )
    path = found.locate_file("axe_playwright_python/axe.min.js")
    return path.read_text(encoding="utf-8")
