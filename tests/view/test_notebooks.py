"""The notebooks in examples/ are stored as they ran: with outputs, pictures, and no path."""

import base64
import copy
import io
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image, ImageColor

ROOT = Path(__file__).parents[2]
NOTEBOOKS = sorted((ROOT / "examples").glob("*.ipynb"))
MOST = 300_000  # bytes that one output may add to a notebook
FIGURES = ("application/vnd.plotly.v1+json", "application/vnd.jupyter.widget-view+json")
PATH = re.compile(r"(?<![\w:/.])/(?:home|root|tmp|Users|usr|var|opt|mnt|work)/\w|site-packages")
INLINE = re.compile(r"base64,[\w+/=]+")
PACKED = ("image/png", "image/jpeg", "bdata", "buffers")  # base64, in which any letters may meet

Notebook = dict[str, Any]


def faults(notebook: Notebook) -> list[str]:
    """What is wrong with a stored notebook, each with the number of its cell."""
    found = []
    runs = [
        (i, cell)
        for i, cell in enumerate(notebook["cells"])
        if cell["cell_type"] == "code" and "".join(cell["source"]).strip()
    ]
    if [cell["execution_count"] for _, cell in runs] != [*range(1, len(runs) + 1)]:
        found.append("cells were not run once each, from first to last")
    for i, cell in enumerate(notebook["cells"]):
        found += [f"cell {i}: {fault}" for out in cell.get("outputs", []) for fault in _of(out)]
        found += [f"cell {i}: a path, {path!r}" for path in _paths(cell)]
    bundles = [out.get("data", {}) for _, cell in runs for out in cell["outputs"]]
    if not any(kind in bundle for bundle in bundles for kind in FIGURES):
        found.append("no figure")
    return found


def _of(output: dict[str, Any]) -> Iterator[str]:
    """What is wrong with one output."""
    if output["output_type"] == "error":
        yield f"an error, {output['ename']}"
    if output.get("name") == "stderr":
        yield f"on stderr, {''.join(output['text'])[:60]!r}"
    if len(json.dumps(output)) >= MOST:
        yield f"an output of {len(json.dumps(output)):,} bytes"
    data = output.get("data", {})
    if any(kind in data for kind in FIGURES):
        if "image/png" not in data:
            yield "a figure without a PNG"
        elif _is_blank(data["image/png"]):
            yield "a PNG that shows nothing"


def _is_blank(png: str) -> bool:
    """Whether a stored PNG cannot be opened, or has one colour."""
    try:
        with Image.open(io.BytesIO(base64.b64decode(png)), formats=["PNG"]) as picture:
            colours = picture.convert("RGB").getcolors(maxcolors=1)
    except (OSError, ValueError):
        return True
    return colours is not None


def _paths(value: Any) -> Iterator[str]:
    """Paths of some machine, in any text of a cell."""
    if isinstance(value, dict):
        for key, part in value.items():
            if key not in PACKED:
                yield from _paths(part)
    elif isinstance(value, list) and all(isinstance(line, str) for line in value):
        yield from _paths("".join(value))
    elif isinstance(value, list):
        for part in value:
            yield from _paths(part)
    elif isinstance(value, str):
        yield from PATH.findall(INLINE.sub("", value))


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_is_stored_as_it_ran(path: Path) -> None:
    assert faults(json.loads(path.read_text())) == []


@pytest.mark.parametrize("page", ["README.md", "docs/index.md"])
def test_every_notebook_is_named_where_readers_look(page: str) -> None:
    text = (ROOT / page).read_text()
    assert len(NOTEBOOKS) >= 6
    assert [path.name for path in NOTEBOOKS if path.name not in text] == []


# ---- a notebook for each rule that breaks it ---------------------------------------------------


def png(*colours: str) -> str:
    picture = Image.new("RGB", (8, 8), colours[0])
    picture.putpixel((0, 0), ImageColor.getrgb(colours[-1]))
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    return base64.b64encode(buffer.getvalue()).decode()


def sound() -> Notebook:
    """A title, a cell that prints, and a figure."""
    shown = {FIGURES[0]: {"data": []}, "image/png": png("white", "navy"), "text/plain": ["a map"]}
    said = {"output_type": "stream", "name": "stdout", "text": ["0.98 of 1/tmp cells\n"]}
    figure = {"output_type": "execute_result", "data": shown, "execution_count": 2, "metadata": {}}
    shown["text/html"] = ["<img src='data:image/jpeg;base64,AA", "A=/tmp/wQ==, in 0.98 of 1'>"]
    return {
        "cells": [
            {"cell_type": "markdown", "source": ["# A title, <https://x.org/usr/share>\n"]},
            {"cell_type": "code", "source": ["print(x)"], "execution_count": 1, "outputs": [said]},
            {"cell_type": "code", "source": ["plot(x)"], "execution_count": 2, "outputs": [figure]},
        ]
    }


def test_a_sound_notebook_has_no_fault() -> None:
    assert faults(sound()) == []


def said(cell: int, **output: Any) -> Callable[[Notebook], None]:
    return lambda notebook: notebook["cells"][cell]["outputs"].append(output)


def shown(**data: Any) -> Callable[[Notebook], None]:
    def change(notebook: Notebook) -> None:
        bundle = notebook["cells"][2]["outputs"][0]["data"]
        bundle.update(data)
        for key in [key for key, value in data.items() if value is None]:
            del bundle[key]

    return change


def never_run(notebook: Notebook) -> None:
    notebook["cells"][1].update(execution_count=None, outputs=[])


def out_of_order(notebook: Notebook) -> None:
    notebook["cells"][1]["execution_count"] = 3


def no_figures(notebook: Notebook) -> None:
    del notebook["cells"][2]


@pytest.mark.parametrize(
    ("broken", "fault"),
    [
        (never_run, "cells were not run once each, from first to last"),
        (out_of_order, "cells were not run once each, from first to last"),
        (no_figures, "no figure"),
        (said(1, output_type="error", ename="KeyError"), "cell 1: an error, KeyError"),
        (
            said(1, output_type="stream", name="stderr", text=["UserWarning: old\n"]),
            "cell 1: on stderr, 'UserWarning: old\\n'",
        ),
        (
            said(1, output_type="stream", name="stdout", text=["saved to /home/", "me/out\n"]),
            "cell 1: a path, '/home/m'",
        ),
        (shown(**{"text/html": ["<img src='/root/x.png'>"]}), "cell 2: a path, '/root/x'"),
        (shown(**{"text/html": ["lib/python3/site-packages/x.py"]}), "a path, 'site-packages'"),
        (shown(**{"image/png": None}), "cell 2: a figure without a PNG"),
        (shown(**{"image/png": png("white", "white")}), "cell 2: a PNG that shows nothing"),
        (shown(**{"image/png": "no picture at all"}), "cell 2: a PNG that shows nothing"),
        (shown(**{"text/html": "x" * MOST}), "cell 2: an output of 300,"),
    ],
)
def test_each_fault_is_found(broken: Callable[[Notebook], None], fault: str) -> None:
    notebook = copy.deepcopy(sound())
    broken(notebook)
    (only,) = faults(notebook)
    assert fault in only
