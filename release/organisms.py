"""The shipped organisms are the ones that were measured, and their recipe still makes them.

python -m release.organisms          # print the digests
python -m release.organisms --write  # into release/organisms.json, after organisms were trained
"""

import hashlib
import json
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
SHIPPED = ROOT / "src" / "imaginelens" / "organisms" / "checkpoints"
RECORDED = Path(__file__).with_suffix(".json")
TOLERANCE = 0.01  # of accuracy, on machines whose arithmetic differs


def digests(folder: Path = SHIPPED) -> dict[str, str]:
    """SHA-256 of each file of the checkpoints."""
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.glob("*/*"))
        if path.is_file()
    }


def changed(recorded: dict[str, str], found: dict[str, str]) -> list[str]:
    """Files that are missing, new or other than recorded.

    >>> changed({"a": "1", "b": "2"}, {"a": "1", "b": "3", "c": "4"})
    ['b', 'c']
    """
    return sorted(name for name in {*recorded, *found} if recorded.get(name) != found.get(name))


def compared(shipped: Path, trained: Path) -> str:
    """What a second training gave: the same weights, or the same accuracy; else a ValueError."""
    weights = [(folder / "model.safetensors").read_bytes() for folder in (shipped, trained)]
    if weights[0] == weights[1]:
        return "the same weights, byte for byte"
    before, after = (
        json.loads((folder / "card.json").read_text(encoding="utf-8"))["accuracy"]
        for folder in (shipped, trained)
    )
    told = f"accuracy {after} where the shipped one has {before}"
    if abs(before - after) > TOLERANCE:
        raise ValueError(f"{told}, and {TOLERANCE} is allowed")
    return f"other weights, {told}"


if __name__ == "__main__":
    text = json.dumps(digests(), indent=1) + "\n"
    if sys.argv[1:] == ["--write"]:
        RECORDED.write_text(text, encoding="utf-8")
    else:
        print(text, end="")
