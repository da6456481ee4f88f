"""Licences of what is installed, and holes that are known in it.

Runs as a file under the Python that it looks at: `PYTHON release/audit.py` prints each
distribution as name, version and licences, tab-separated.
"""

import json
import re
import urllib.error
import urllib.request
from importlib.metadata import Distribution, distributions

ADVISORIES = "https://pypi.org/pypi/{name}/{version}/json"  # its field `vulnerabilities`
GPL = re.compile(r"\bA?GPL|Affero|(?<!Lesser )General Public License", re.IGNORECASE)


def licence(package: Distribution) -> str:
    """What a distribution's metadata say of its licence, on one line."""
    metadata = package.metadata
    classifiers = [
        line.rpartition(" :: ")[2]
        for line in metadata.get_all("Classifier") or []
        if line.startswith("License ::")
    ]
    # the field License may hold the whole text; its first line is the name
    written = (metadata.get("License") or "").strip().partition("\n")[0]
    return "; ".join(filter(None, (metadata.get("License-Expression"), *classifiers, written)))


def forbidden(told: str) -> bool:
    """Whether a licence is the GPL or AGPL without a way around them; the LGPL may be used.

    >>> forbidden("GPL-3.0-or-later"), forbidden("MIT OR GPL-2.0"), forbidden("LGPL-2.1")
    (True, False, False)
    """
    ways = re.split(r"\s+OR\s+", told)
    return all(GPL.search(way) and not re.search("LGPL|Lesser", way) for way in ways)


def holes(found: list[tuple[str, str]]) -> list[str]:
    """Known vulnerabilities of (name, version) pairs, one line each.

    What the index does not know is passed over, but for the first: then it cannot be asked, which
    is an OSError.
    """
    told = []
    for index, (name, version) in enumerate(found):
        address = ADVISORIES.format(name=name, version=version.partition("+")[0])
        try:
            with urllib.request.urlopen(address, timeout=20) as answer:
                told += advisories(name, version, json.load(answer))
        except urllib.error.HTTPError as error:
            if error.code != 404 or index == 0:
                raise
    return told


def advisories(name: str, version: str, answer: dict[str, list[dict[str, object]]]) -> list[str]:
    """The open ones of one answer of the index.

    >>> advisories("a", "1", {"vulnerabilities": [{"id": "X-1", "fixed_in": ["2"]}]})
    ["a 1: X-1, mended in ['2']"]
    """
    return [
        f"{name} {version}: {hole['id']}, mended in {hole.get('fixed_in') or 'no version'}"
        for hole in answer["vulnerabilities"]
        if not hole.get("withdrawn")
    ]


if __name__ == "__main__":
    for package in distributions():
        print(package.metadata["Name"], package.version, licence(package), sep="\t")
