"""What the explorer's page is told: numbers as bytes, words as plain text; and the page as a file.

`explorer.js` draws from these values alone, in a notebook and in the file.
"""

import base64
import json
import math
from collections.abc import Mapping
from functools import cache
from importlib.resources import files
from itertools import groupby
from typing import Any

import numpy as np

from imaginelens.hooks import Run
from imaginelens.hooks.tokens import Kind, Token
from imaginelens.view.colour import UNMEASURED, ColourScale
from imaginelens.view.explorer_grid import TABS
from imaginelens.view.explorer_state import Explorer, Measured, Value
from imaginelens.view.markup import element, inert
from imaginelens.view.numerals import precise
from imaginelens.view.png import image_address
from imaginelens.view.tokens import visible

UNMEASURED_CELL, MAPPED, RAN = range(3)
SHOWN_TOKENS = 5
_TOGETHER = (Kind.IMAGE, Kind.PAD, Kind.VIDEO, Kind.AUDIO, Kind.INSERTED)
_TIMES = "\N{MULTIPLICATION SIGN}"
_LONG, _EDGE = 120, 40  # of text in a row that is shown token by token
_WORDS = {"steps": "latent steps", "image": "image cells", "regions": "regions", "heads": "heads"}
State = dict[str, Any]


@cache
def script() -> str:
    """The page's one module."""
    return (files("imaginelens.view") / "explorer.js").read_text(encoding="utf-8")


@cache
def style() -> str:
    """The page's style."""
    return (files("imaginelens.view") / "explorer.css").read_text(encoding="utf-8")


def cells_told(session: Explorer) -> State:
    """The grid's numbers: `z` (metric, row, column) and what is known of each cell, `mask`."""
    n_rows, n_columns = session.grid.shape
    z = np.full((len(session.metrics), n_rows, n_columns), np.nan, dtype=np.float32)
    mask = np.zeros((n_rows, n_columns), dtype=np.uint8)
    for row, column in np.ndindex(n_rows, n_columns):
        for k, metric in enumerate(session.metrics):
            value = session.value(row, column, metric)
            if value is not None:
                z[k, row, column] = value.effect
                mask[row, column] = MAPPED
        if session.measured(row, column) is not None:
            mask[row, column] = RAN
    return {"z": z.tobytes(), "mask": mask.tobytes(), "shape": list(z.shape)}


def grid_told(session: Explorer) -> State:
    """What the grid's rows and columns are, and what there is to choose."""
    grid, s, sides = session.grid, session.setting, session.sides()
    ends = []
    for metric in session.metrics.values():
        before, other = (float(metric(r).double()[0]) for r in (sides.before, sides.other))
        ends.append([_number(before), _number(other)])
    return {
        "rows": list(grid.rows),
        "columns": [inert(label, 60) for label in grid.columns],
        "axes": [grid.row_axis, inert(grid.column_axis, 60)],
        "ends": ends,
        "places": places(session),
        "setting": {name: getattr(s, name) for name in s.__dataclass_fields__},
        "choices": {
            "pair": list(range(len(session.pairs))),
            "donor": list(range(len(session.pairs))),
            "site": ["z"] if s.tab == "heads" else session.sites,
            "at": list(session.ats),
            "tab": [[tab, _WORDS[tab]] for tab in TABS],
            "edit": [inert(name, 40) for name in session.all_edits],
            "metric": list(session.metrics),
            "direction": ["denoise", "noise"],
            "context": ["free", "fixed"],
        },
        "units": [metric.unit for metric in session.metrics.values()],
    }


def run_told(session: Explorer) -> State:
    """The run that is edited: its pictures and tokens, and what was answered."""
    sides, lens = session.sides(), session.open
    s = session.setting
    config = lens.model.config
    name = getattr(lens, "name", "") or str(getattr(config, "_name_or_path", ""))
    direction = (
        "denoise: the base runs and receives states of the source"
        if s.direction == "denoise"
        else "noise: the source runs and receives states of the base"
    )
    pictures = sides.run.prompt.pictures
    scale = ColourScale(1.0)
    return {
        "header": {
            "model": inert(f"{type(lens.model).__name__} {name}".strip(), 120),
            "dtype": str(lens.model.dtype).removeprefix("torch."),
            "direction": direction,
            "pairs": len(session.pairs),
            "hooks": sum(map(len, lens.registry.active.values())),
            "answers": [_answer(sides.before.answers[0]), _answer(sides.other.answers[0])],
            "trigger": inert(str(sides.run.trigger), 200),
            "unmeasured": UNMEASURED,
            "colours": [scale.colour(x) for x in np.linspace(-1, 1, 21).tolist()],
        },
        "tokens": strip(sides.run),
        "images": [] if pictures is None else [str(image_address(p)) for p in pictures[0]],
        "grids": [[grid.rows, grid.cols] for grid in sides.run.tokens.grids[0]],
        "boxes": boxes(sides.run),
    }


def places(session: Explorer) -> list[list[list[int]]]:
    """For each column of the grid the image cells that it edits: [image, row, column]."""
    if session.setting.tab == "heads":
        return [[] for _ in session.grid.columns]
    run, found = session.sides().run, []
    for cell in session.grid.cells[0]:
        columns = session.grid.at[cell.position].resolve(run.tokens, 0).tolist()
        tokens = [run.tokens.token(0, column) for column in columns]
        found.append([[t.image, t.row, t.col] for t in tokens if t.kind == Kind.IMAGE])
    whole = sum(grid.rows * grid.cols for grid in run.tokens.grids[0])
    return [[] if len(cells) >= whole > 1 else cells for cells in found]


def boxes(run: Run) -> bytes:
    """Of every image token its image, row, column and number, and its box as shares of the image:
    eight float32 each; nan where the picture is not known."""
    pictures = run.prompt.pictures
    rows = []
    for token in run.tokens[0]:
        if token.kind != Kind.IMAGE or token.row < 0:
            continue
        box = [math.nan] * 4
        if token.box is not None and pictures is not None:
            width, height = pictures[0][token.image].size
            box = [part / side for part, side in zip(token.box, (width, height) * 2, strict=True)]
        rows.append([token.image, token.row, token.col, token.index, *box])
    return np.array(rows, dtype=np.float32).tobytes()


def strip(run: Run) -> list[State]:
    """The run in reading order, a chip for each token; pictures and long texts are one chip."""
    found: list[State] = []
    for kind, group in groupby(run.tokens[0], key=lambda token: token.kind):
        tokens = list(group)
        if kind in _TOGETHER:
            found.append(_chip(tokens, f"{kind.name.lower()} {_TIMES} {len(tokens)}"))
        elif len(tokens) > _LONG:
            middle = tokens[_EDGE:-_EDGE]
            found += [_chip([t], _label(t)) for t in tokens[:_EDGE]]
            found.append(_chip(middle, f"… {len(middle)} tokens …"))
            found += [_chip([t], _label(t)) for t in tokens[-_EDGE:]]
        else:
            found += [_chip([t], _label(t)) for t in tokens]
    return found


def _chip(tokens: list[Token], label: str) -> State:
    first, last = tokens[0], tokens[-1]
    return {
        "text": label,
        "kind": first.kind.name.lower(),
        "first": first.index,
        "last": last.index,
        "step": first.step,
    }


def _label(token: Token) -> str:
    if token.kind == Kind.LATENT:
        return f"z{token.step}"
    return visible(token.text)


def detail_of(session: Explorer, row: int, column: int, found: Measured) -> State:
    """What is told of a cell that was run: answers, probabilities, metrics, landing, code."""
    cell, landing = found.key.cell, found.arm.landing
    chosen = found.values[session.setting.metric]
    flag = landing.flags.get(0)
    return {
        "row": row,
        "column": column,
        "title": inert(_title(found), 200),
        "answers": [_answer(r.answers[0]) for r in (found.before, found.other, found.arm.after)],
        "texts": [inert(run.texts[0], 600) for run in (found.run, found.arm.run)],
        "flips": found.flips,
        "tokens": _likely(session, found),
        "metrics": [
            {
                "name": name,
                "unit": session.metrics[name].unit,
                "before": _number(value.before),
                "other": _number(value.other),
                "after": _number(value.after),
                "effect": _number(value.effect),
            }
            for name, value in found.values.items()
        ],
        "landing": {
            "fired": landing.fired,
            "states": len(landing.cells),
            "change": _number(landing.relative_change),
            "flag": flag,
            "words": _landed(found, flag),
        },
        "sentence": _sentence(session.setting.metric, chosen),
        "code": session.code(row, column),
        "site": cell.sites[0],
        "seconds": round(found.seconds, 3),
    }


def _sentence(metric: str, value: Value) -> str:
    if math.isnan(value.effect):
        when = "without" if math.isnan(value.before) else "with"
        return f"no answer was found {when} the patch, so {metric} has no value"
    ends = f"{precise(value.before)} → {precise(value.after)}"
    return f"{metric} {ends}, effect {precise(value.effect)}"


def _title(found: Measured) -> str:
    cell = found.key.cell
    layer = "" if cell.layer is None else f", layer {cell.layer}"
    head = "" if cell.head is None else f", head {cell.head}"
    return f"{found.key.edit} of {cell.site}{layer}{head} at {cell.position}"


def _landed(found: Measured, flag: str | None) -> str:
    landing = found.arm.landing
    if flag == "not_emitted":
        return "nothing was touched: this run, or its donor, has no such position"
    if flag == "identical_donor":
        return "nothing changed: what was given equals what was there"
    times = f"{landing.fired} forward{'s' * (landing.fired != 1)}"
    size = precise(landing.relative_change)
    n = len(landing.cells)
    return f"landed: {n} state{'s' * (n != 1)} in {times}, relative change {size}"


def _likely(session: Explorer, found: Measured) -> list[State]:
    """The most likely tokens where the answer is decided, before and after; nothing where no answer
    was found. The two answers' tokens are always among them."""
    before, after = (
        r.logits[0].double().softmax(-1).cpu().numpy() for r in (found.before, found.arm.after)
    )
    if np.isnan(before).any() or np.isnan(after).any():
        return []
    targets = found.before.targets
    roles = {targets.source_token[0]: "source", targets.base_token[0]: "base"}
    top = np.argsort(-np.maximum(before, after), kind="stable")[:SHOWN_TOKENS].tolist()
    ids = [*top, *(k for k in roles if k >= 0 and k not in top)]
    return [
        {
            "text": visible(session.open.decode(k)),
            "before": float(before[k]),
            "after": float(after[k]),
            "role": roles.get(k, ""),
        }
        for k in ids
    ]


def _answer(found: str | None) -> str | None:
    return None if found is None else inert(found, 300)


def _number(value: float) -> float | None:
    return value if math.isfinite(value) else None


def told(session: Explorer) -> State:
    """All of it."""
    return {**run_told(session), **grid_told(session), **cells_told(session)}


def details(session: Explorer) -> dict[str, State]:
    """What is told of every cell of the grid that was run, by "row,column"."""
    found = {}
    for row, column in np.ndindex(*session.grid.shape):
        measured = session.measured(row, column)
        if measured is not None:
            found[f"{row},{column}"] = detail_of(session, row, column, measured)
    return found


def page(session: Explorer, *, title: str = "ImagineLens explorer") -> str:
    """The explorer as a page of its own, that needs no network and no kernel: cells that were run
    tell what they gave, and nothing more can be run."""
    state = {**told(session), "live": False, "progress": 0.0, "selected": {}, "detail": {}}
    state["status"] = {"kind": "saved", "text": "saved page: cells that were run can be opened"}
    state["details"] = details(session)
    data = json.dumps({name: _plain(value) for name, value in state.items()}, allow_nan=False)
    data = data.replace("<", "\\u003c")  # nothing in it can end the element
    module = script().replace("</script", "<\\/script")
    head = element("title", title)
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"{head}<style>{style()}</style></head>\n"
        f'<body class="il-page"><main>{element("h1", title)}<div id="explorer"></div></main>\n'
        f'<script type="application/json" id="state">{data}</script>\n'
        f'<script type="module">{module}\n{_START}</script>\n</body></html>\n'
    )


_START = """
const held = JSON.parse(document.getElementById("state").textContent);
still(held, document.getElementById("explorer"));
"""


def _plain(value: Any) -> Any:
    """Bytes as base64 in an object that says so."""
    if isinstance(value, bytes):
        return {"base64": base64.b64encode(value).decode("ascii")}
    return dict(value) if isinstance(value, Mapping) else value
