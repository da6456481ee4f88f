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
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

import torch
import walk_checks
from walk_checks import COLUMNS, OK, Row, class_names, is_image_text

SECONDS, MEMORY = 60, 6 << 30
# what nearly every type imports, once instead of in every child
COMMON = ("llama", "clip", "siglip", "qwen2", "qwen2_vl", "bert")


def prepare() -> None:
    """Import once what children would import each."""
    for name in COMMON:
        importlib.import_module(f"transformers.models.{name}.modeling_{name}")
    importlib.import_module("transformers.generation")


def apart(model_type: str) -> Row:
    """Examine one type in a forked process; a crash or a timeout is its row's first cell."""
    reader, writer = os.pipe()
    started = time.perf_counter()
    child = os.fork()
    if child == 0:
        _child(model_type, reader, writer)
    os.close(writer)
    row = _received(reader, child)
    os.close(reader)
    _, status = os.waitpid(child, 0)
    if row is None:
        said = f"the process ended with {os.waitstatus_to_exitcode(status)}"
        row = Row(model_type, class_names()[model_type], {"instantiates": said})
    row.notes["seconds"] = f"{time.perf_counter() - started:.1f}"
    return row


def _child(model_type: str, reader: int, writer: int) -> None:
    os.close(reader)
    resource.setrlimit(resource.RLIMIT_DATA, (MEMORY, MEMORY))
    signal.alarm(SECONDS)
    torch.set_num_threads(1)
    with os.fdopen(writer, "wb") as pipe:
        pickle.dump(walk_checks.examined(model_type), pipe)
    os._exit(0)


def _received(reader: int, child: int) -> Row | None:
    parts = []
    while select.select([reader], [], [], SECONDS + 5)[0]:
        part = os.read(reader, 1 << 16)
        if not part:
            break
        parts.append(part)
    else:
        os.kill(child, signal.SIGKILL)
    try:
        return pickle.loads(b"".join(parts))
    except (EOFError, pickle.UnpicklingError):
        return None


# ---- the page --------------------------------------------------------------------------------

NEEDED = ("image", "resid_pre", "resid_post", "attn_out", "mlp_out", "projector", "latent")
SHOWN = ("image", "resid_pre", "attn_out", "resid_mid", "mlp_out", "resid_post", "projector",
         "projector_cells", "pattern", "text_latent", "latent", "path_gap", "batch")  # fmt: skip
PAGE = Path(__file__).parents[1] / "docs" / "models.md"


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
    marks = ["yes" if row.cells.get(c) == OK else "" for c in SHOWN]
    return f"| {row.model_type} | {standing(row)} | {' | '.join(marks)} | {why(row)} |"


def why(row: Row) -> str:
    """The first thing that is wrong with a type, without the places and numbers of this run."""
    order = ("instantiates", "lens", "image", *NEEDED, *SHOWN)
    wrong = [row.cells.get(c, "not reached") for c in order if row.cells.get(c) != OK]
    said = next((w for w in wrong if w != "not reached"), "")
    said = re.sub(r" \[\w+\.py:\d+\]| by \S*e[+-]\d+|\|.*", "", said)
    return said.replace("|", "/").strip()[:160]


def page(rows: Mapping[str, Row]) -> str:
    """docs/models.md: one row per type, made from what was measured."""
    image_text = [r for name, r in rows.items() if is_image_text(name)]
    others = [r for name, r in rows.items() if not is_image_text(name)]
    built = [r for r in image_text if r.cells.get("instantiates") == OK]
    counts = {s: sum(standing(r) == s for r in built) for s in ("full", "partial", "text only")}
    head = "| type | support | " + " | ".join(SHOWN).replace("_", " ") + " | what is missing |"
    rule = "|-" * (len(SHOWN) + 3) + "|"
    table = [head, rule, *(line(r) for r in sorted(image_text, key=lambda r: r.model_type))]
    other = [head, rule, *(line(r) for r in sorted(others, key=lambda r: r.model_type))]
    return "\n".join(
        [
            "# Models",
            "",
            "Written by `python tests/walk.py --write` from what it measured; nothing is ticked by",
            "hand. Every type of transformers' image-text-to-text mapping is built tiny and random",
            f"from its default config: {len(built)} of {len(image_text)} can be built here. Of",
            f"them {counts['full']} are supported in full, {counts['partial']} in part, and",
            f"{counts['text only']} with text only.",
            "",
            "*full*: one changed pixel changes the logits, the residual stream, `attn_out`,",
            "`mlp_out` and the projector are read and written as in plain torch in every layer and",
            "add up to the stream, and latents fed back equal a recomputation without a cache.",
            "",
            *table,
            "",
            "## Other multimodal types",
            "",
            *other,
            "",
        ]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", help="model types; none means all")
    parser.add_argument("--json", type=Path, help="keep the rows here")
    parser.add_argument("--write", action="store_true", help="write docs/models.md")
    args = parser.parse_args()
    if args.write and args.names:
        parser.error("--write needs all types: give it no names")
    prepare()
    rows = {}
    for name in args.names or list(class_names()):
        row = rows[name] = apart(name)
        bad = {c: row.cells.get(c, "not reached") for c in COLUMNS if row.cells.get(c) != OK}
        bad = {c: said[:400] for c, said in bad.items() if said != "not reached"}
        print(f"{name} ({row.notes['seconds']} s): {standing(row)} {json.dumps(bad)}", flush=True)
        if args.json:
            args.json.write_text(json.dumps({k: asdict(r) for k, r in rows.items()}, indent=1))
    if args.write:
        PAGE.write_text(page(rows))


if __name__ == "__main__":
    main()
