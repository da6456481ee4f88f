"""The walk over all multimodal types of transformers: build each, ask everything, tell the truth.

Every type runs in a process of its own, so that one that crashes, hangs or eats memory costs only
its row. `python tests/walk.py --write` makes docs/models.md; names select types.
"""

import argparse
import importlib
import json
import os
import pickle
import re
import resource
import select
import signal
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import walk_checks
from walk_checks import COLUMNS, OK, Row, class_names, is_image_text

SECONDS, PATIENCE, MEMORY = 30, 600, 6 << 30  # of processor, of clock; bytes
# what nearly every type imports, once instead of in every child
COMMON = ("llama", "clip", "siglip", "qwen2", "qwen2_vl", "bert")


def prepare() -> None:
    """Import once what children would import each."""
    for name in COMMON:
        importlib.import_module(f"transformers.models.{name}.modeling_{name}")
    importlib.import_module("transformers.generation")


@dataclass
class _Child:
    """A process that examines one type, and what it has said so far."""

    model_type: str
    pid: int
    reader: int
    started: float
    said: bytes = b""


def measured(names: Iterable[str], *, at_once: int = 1) -> Iterator[Row]:
    """Examine types, each in a forked process of its own, several at once."""
    waiting, running = list(names), dict[int, _Child]()
    while waiting or running:
        while waiting and len(running) < at_once:
            child = _begun(waiting.pop(0))
            running[child.reader] = child
        for reader in select.select([*running], [], [], 1.0)[0]:
            part = os.read(reader, 1 << 16)
            running[reader].said += part
            if not part:
                yield _ended(running.pop(reader))
        for child in running.values():
            if time.perf_counter() - child.started > PATIENCE:
                os.kill(child.pid, signal.SIGKILL)


def apart(model_type: str) -> Row:
    """Examine one type; a crash or a timeout is its row's first cell."""
    return next(measured([model_type]))


def _begun(model_type: str) -> _Child:
    reader, writer = os.pipe()
    started = time.perf_counter()
    pid = os.fork()
    if pid == 0:
        os.close(reader)
        _examine(model_type, writer)
    os.close(writer)
    return _Child(model_type, pid, reader, started)


def _examine(model_type: str, writer: int) -> None:
    resource.setrlimit(resource.RLIMIT_DATA, (MEMORY, MEMORY))
    signal.setitimer(signal.ITIMER_PROF, SECONDS)
    torch.set_num_threads(1)
    with os.fdopen(writer, "wb") as pipe:
        pickle.dump(walk_checks.examined(model_type), pipe)
    os._exit(0)


def _ended(child: _Child) -> Row:
    os.close(child.reader)
    _, status = os.waitpid(child.pid, 0)
    try:
        row: Row = pickle.loads(child.said)
    except (EOFError, pickle.UnpicklingError):
        said = f"the process ended with {os.waitstatus_to_exitcode(status)}"
        row = Row(child.model_type, class_names()[child.model_type], {"instantiates": said})
    row.notes["seconds"] = f"{time.perf_counter() - child.started:.1f}"
    return row


# ---- the page --------------------------------------------------------------------------------

NEEDED = ("image", "resid_pre", "resid_post", "attn_out", "mlp_out", "projector", "latent")
MORE = (
    "resid_mid", "projector_cells", "pattern", "text_latent", "path_gap", "batch", "sizes", "video",
)  # fmt: skip
HEADS = {  # columns of the page
    "image": "image", "resid_pre": "resid pre", "attn_out": "attn out", "mlp_out": "mlp out",
    "resid_post": "resid post", "projector": "projector", "latent": "latent",
    "resid_mid": "resid mid", "projector_cells": "image cells", "pattern": "pattern",
    "text_latent": "latent, no image", "path_gap": "read again", "batch": "batch",
    "sizes": "two images", "video": "video",
}  # fmt: skip
PAGE = Path(__file__).parents[1] / "docs" / "models.md"
FAMILIES = Path(__file__).parents[1] / "benchmarks" / "results" / "families.json"


def standing(row: Row) -> str:
    """How far a type is supported: full, partial (with images), text only, or none."""
    ok = {column for column, said in row.cells.items() if said == OK}
    if ok.issuperset(NEEDED):
        return "full"
    if "lens" not in ok:
        return "none"
    return "partial" if "image" in ok else "text only"


def line(row: Row) -> str:
    """The row of a type in docs/models.md."""
    if standing(row) == "full" and is_image_text(row.model_type):
        marks = ["yes" if row.cells.get(c) == OK else "" for c in MORE]
        return f"| {row.model_type} | {' | '.join(marks)} | {remark(row)} |"
    marks = ["yes" if row.cells.get(c) == OK else "" for c in NEEDED]
    return f"| {row.model_type} | {standing(row)} | {' | '.join(marks)} | {why(row)} |"


def why(row: Row) -> str:
    """Every different thing that keeps a type from full support, the first cause first."""
    if row.notes.get("kind") == "encoder-decoder":
        return ENCODER_DECODER
    return _listed(row, ("instantiates", "lens", *NEEDED))


ENCODER_DECODER = (
    "it is an encoder-decoder: its decoder does not hold the prompt, so that no latent can be fed "
    "back behind it"
)


def remark(row: Row) -> str:
    """What a type in full lacks beside what is needed, and how its sites are read."""
    said = [_listed(row, MORE)]
    if row.notes.get("difference"):
        said.append("attn out, mlp out: differences of the stream, which it scales or gates")
    if row.cells.get("sizes") == OK and row.notes.get("sizes"):
        said.append("its images have one size")
    return "; ".join(filter(None, said))


def _listed(row: Row, columns: Sequence[str]) -> str:
    """What is wrong in these columns, each sentence once, with the columns that it is said of."""
    of: dict[str, list[str]] = {}
    for column in columns:
        said = row.cells.get(column, OK)
        if said not in (OK, "not reached", "no projector", "takes no videos"):
            of.setdefault(_sentence(said), []).append(HEADS.get(column, ""))
    return "; ".join(f"{', '.join(heads)}: {said}".lstrip(": ") for said, heads in of.items())


def _sentence(said: str) -> str:
    """What went wrong, without the places and numbers of this run."""
    said = re.sub(r" \[\w+\.py:\d+\]$", "", said.strip())
    said = re.sub(r" by [\d.]+(e[+-]?\d+)?(?![\w.])", "", said)
    said = re.sub(r"^(SiteUnavailable|InputError|ValueError): ", "", said)
    said = re.sub(r"^(\w+Error|\w+Exception): ", r"its class fails with \1: ", said)
    return said.replace("|", "/").replace("\n", " ").rstrip(".: ")


def page(rows: Mapping[str, Row], families: Sequence[Mapping[str, Any]] = ()) -> str:
    """docs/models.md: one row per type, made from what was measured."""
    ordered = [rows[name] for name in sorted(rows)]
    image_text = [r for r in ordered if is_image_text(r.model_type)]
    built = [r for r in image_text if r.cells.get("instantiates") == OK]
    by = {s: [r for r in built if standing(r) == s] for s in STANDINGS}
    others = [r for r in ordered if not is_image_text(r.model_type)]
    return "\n".join(
        [
            "# Models",
            "",
            "Written by `python tests/walk.py --write` from what it measured; nothing is ticked by",
            "hand. Every type of transformers' image-text-to-text mapping is built tiny and random",
            f"from its default config: {len(built)} of {len(image_text)} can be built here.",
            "",
            f"**{len(by['full'])} of {len(built)} are supported in full**, "
            f"{len(by['partial'])} in part, {len(by['text only'])} with text only,",
            f"{len(by['none'])} not at all.",
            "",
            "*full*: one changed pixel changes the logits, the residual stream, `attn_out`,",
            "`mlp_out` and the projector are read and written as in plain torch in every layer and",
            "add up to the stream, and latents fed back equal a recomputation without a cache.",
            "",
            "## In full",
            "",
            "Beside what *full* means: `resid_mid` in every block; edits at single image tokens of",
            "the projector; attention patterns; latents without an image; reading a run gives its",
            "logits again; a batch of two images gives what each gives alone; and so does a batch",
            "of prompts with two images and one, of different sizes where the type takes them.",
            "*video*: an encoded video, its tokens found, read again, and in a batch.",
            "",
            *_table([HEADS[c] for c in MORE] + ["remarks"], by["full"], ["type"]),
            "",
            "## Not in full",
            "",
            *_table(
                [HEADS[c] for c in NEEDED] + ["why"],
                [r for s in STANDINGS[1:] for r in by[s]],
                ["type", "support"],
            ),
            "",
            "## Cannot be built here",
            "",
            *_table(
                [HEADS[c] for c in NEEDED] + ["why"],
                [r for r in image_text if r not in built],
                ["type", "support"],
            ),
            "",
            "## Other multimodal types",
            "",
            "Those that transformers lists for several media, but not for image and text to text.",
            "",
            *_table([HEADS[c] for c in NEEDED] + ["why"], others, ["type", "support"]),
            "",
            *_families(families),
        ]
    )


STANDINGS = ("full", "partial", "text only", "none")


def _table(heads: list[str], rows: list[Row], first: list[str]) -> list[str]:
    heads = [*first, *heads]
    return [f"| {' | '.join(heads)} |", "|-" * len(heads) + "|", *(line(r) for r in rows)]


def _families(found: Sequence[Mapping[str, Any]]) -> list[str]:
    """The table of latent families, where `benchmarks/results/families.json` has them."""
    if not found:
        return []
    heads = ("family", "kind", "tokens_equal", "latent_error", "folder_error", "source", "note")
    lines = [
        "## Latent families",
        "",
        "Measured against a reference loop of each, in float64: whether the same tokens are",
        "written, the largest error of a latent, and the same from a folder in that family's",
        "layout on disk.",
        "",
        f"| {' | '.join(heads).replace('_', ' ')} |",
        "|-" * len(heads) + "|",
    ]
    for family in found:
        cells = [_cell(family.get(head)) for head in heads]
        lines.append(f"| {' | '.join(cells)} |")
    return [*lines, ""]


def _cell(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.1e}"
    return "" if value is None else str(value).replace("|", "/").replace("\n", " ")


def families() -> list[dict[str, Any]]:
    """The measured latent families, if somebody measured them."""
    return json.loads(FAMILIES.read_text()) if FAMILIES.exists() else []


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", help="model types; none means all")
    parser.add_argument("--json", type=Path, help="keep the rows here")
    parser.add_argument("--write", action="store_true", help="write docs/models.md")
    parser.add_argument("--jobs", type=int, default=1, help="types at once")
    parser.add_argument("--rows", type=Path, help="rows measured before, to be kept")
    args = parser.parse_args()
    prepare()
    names, rows = args.names or list(class_names()), {}
    if args.rows:
        kept = json.loads(args.rows.read_text())
        rows = {name: Row(**row) for name, row in kept.items()}
        names = [name for name in names if name not in rows]
    for row in measured(names, at_once=args.jobs):
        rows[row.model_type] = row
        bad = {c: row.cells.get(c, "not reached") for c in COLUMNS if row.cells.get(c) != OK}
        bad = {c: said for c, said in bad.items() if said != "not reached"}
        seconds = row.notes["seconds"]
        print(f"{row.model_type} ({seconds} s): {standing(row)} {json.dumps(bad)}", flush=True)
        if args.json:
            args.json.write_text(json.dumps({k: asdict(r) for k, r in rows.items()}, indent=1))
    if args.write:
        if missing := set(class_names()) - set(rows):
            parser.error(f"--write needs all types; {', '.join(sorted(missing))} are missing")
        PAGE.write_text(page(rows, families()))


if __name__ == "__main__":
    main()
