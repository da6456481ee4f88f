"""Maps as attribution graphs: the JSON that circuit-tracer's viewer and Neuronpedia open.

The format is Neuronpedia's published schema (`apps/webapp/app/api/graph/graph-schema.json`, version
1.0.0, of hijohnnylin/neuronpedia) with the keys that circuit-tracer's viewer wants besides
(`circuit_tracer/frontend/graph_models.py`, 0.5.0). A graph is about one example.
"""

import json
import re
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from imaginelens.hooks import Run
from imaginelens.hooks.appearing import alone
from imaginelens.hooks.errors import ImagineLensError, InputError, brief
from imaginelens.hooks.reading_selectors import parse_selector
from imaginelens.mediation.attribution import Attribution
from imaginelens.mediation.cells import Cell
from imaginelens.mediation.effect_map import EffectMap
from imaginelens.mediation.map_axes import name_of
from imaginelens.mediation.map_files import write_whole

KIND = "state"  # of nodes that are states and not features of a dictionary; drawn as such circles
ENTERS = ("hook_latent", "hook_embed", "vision_projector.hook_out")  # before the first block
_TAKEN = "graph-metadata.json"  # circuit-tracer's viewer lists its graphs there


def attribution_graph(
    found: EffectMap | Attribution,
    run: Run,
    *,
    slug: str,
    example: int = 0,
    row: int | None = None,
    scan: str | None = None,
    top: int | None = None,
) -> dict[str, Any]:
    """One example of a map as an attribution graph: a node for each cell, a link for its effect.

    Every link leads from a cell to the metric, with the effect of patching that cell as its weight:
    a total effect, along all paths at once, where circuit-tracer's own links are direct ones. Cells
    that were not measured, or whose state did not change, are left out. `json.dumps` writes it,
    `save_graph` beside others.

    Args:
        found: a map of `il.sweep` or `il.attribute`.
        run: the unedited run of the side that was edited (the base when denoising), which says
            where the cells are and what was written.
        slug: a name for the graph: letters, digits and hyphens.
        example: its number in the map, and `row` in the run; the same, if left out.
        scan: the name of the model where the graph is shown; the map's, if left out.
        top: how many cells to keep, those with the largest effects; None is all.

    Raises:
        InputError: the example is not in the map or the run, or they are different examples, or no
            cell of it has an effect.

    >>> import imaginelens as il
    >>> lens = il.load("latent-content")
    >>> task = lens.task(n=2, seed=0)
    >>> found = il.attribute(lens, task, sites="hook_latent")
    >>> graph = attribution_graph(found, lens.run(task.base), slug="hunt-0")
    >>> [node["clerp"] for node in graph["nodes"]]
    ['hook_latent, latent[0]', 'hook_latent, latent[1]', 'Output "logit_diff" (p=1.000)']
    >>> graph["links"][1]["weight"] == float(found.values[1, 0])
    True
    """
    whole = found.to_map() if isinstance(found, Attribution) else found
    row = example if row is None else row
    _check(whole, run, slug, example, row, top)
    effects = whole.effect[:, example]
    kept = np.flatnonzero(~np.isnan(effects) & ~whole.untouched[:, example])
    if not len(kept):
        raise InputError(
            f"example {example} has an effect in none of the {len(whole)} cells: its states were "
            "not measured, or did not change; look at map.flags"
        )
    order = kept[np.argsort(-np.abs(effects[kept]), kind="stable")][:top]
    shares = _cumulative(np.abs(effects[order]))
    places = _places(whole, run, row)
    numbers = _numbers(whole.cells, places)
    nodes, links = [], []
    target = _target(whole, run, row)
    for i, share in sorted(zip(order.tolist(), shares, strict=True)):
        nodes.append(_node(whole.cells[i], numbers[i], places[i][-1], share))
        links.append(
            {
                "source": nodes[-1]["node_id"],
                "target": target["node_id"],
                "weight": float(effects[i]),
            }
        )
    return {
        "metadata": _metadata(whole, run, row, slug, scan, example, len(whole) - len(order)),
        "qParams": {
            "pinnedIds": [], "supernodes": [], "linkType": "both", "sg_pos": "",
            "clickedId": target["node_id"],  # so that links and numbers are seen at once
        },
        "nodes": [*nodes, target],
        "links": links,
    }  # fmt: skip


def save_graph(graph: dict[str, Any], folder: str | Path) -> Path:
    """Write a graph where circuit-tracer's viewer finds it: `SLUG.json`, listed beside others.

    Open it with `circuit-tracer start-server --graph_file_dir FOLDER`, or upload the file to
    Neuronpedia.

    Raises:
        InputError: it is no graph of `attribution_graph`, or the list in the folder is no such
            list.
    """
    folder = Path(folder)
    slug = graph.get("metadata", {}).get("slug")
    if not isinstance(slug, str):
        raise InputError(
            f"a graph with {', '.join(graph) or 'nothing in it'} has no metadata.slug; make it "
            "with il.attribution_graph"
        )
    path, listed = folder / f"{slug}.json", folder / _TAKEN
    with alone(folder):  # the list is read and written
        try:
            known = json.loads(listed.read_text())["graphs"] if listed.is_file() else []
            others = [one for one in known if one["slug"] != slug]
        except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
            raise InputError(
                f"{str(listed)!r} is no list of graphs ({brief(error)}); choose another folder"
            ) from error
        write_whole(path, json.dumps(graph, indent=2, allow_nan=False).encode())
        graphs = [*others, graph["metadata"]]
        write_whole(listed, json.dumps({"graphs": graphs}, indent=2, allow_nan=False).encode())
    return path


def _check(found: EffectMap, run: Run, slug: str, example: int, row: int, top: int | None) -> None:
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9-]*", slug):
        raise InputError(f"slug is {slug!r}, expected letters, digits and hyphens: 'hunt-0'")
    if not 0 <= example < found.n:
        raise InputError(f"example is {example}, and the map has examples 0 to {found.n - 1}")
    if not 0 <= row < len(run):
        raise InputError(
            f"row is {row}, and the run has rows 0 to {len(run) - 1}; pass row= where its rows are "
            "not the map's examples"
        )
    if top is not None and top < 1:
        raise InputError(f"top is {top}, expected a number of cells, 1 or more")
    own = run.tokens.keys[row]
    if found.keys and own not in re.split("[:/]", found.keys[example]):
        raise InputError(
            f"row {row} of the run is another input than example {example} of the map; pass the "
            "unedited run of the inputs that were edited"
        )


def _places(found: EffectMap, run: Run, row: int) -> list[list[int]]:
    """The places of each cell, counted from the row's first token."""
    places = []
    for cell in found.cells:
        try:
            columns = parse_selector(cell.position).resolve(run.tokens, row)
        except ImagineLensError as error:
            raise InputError(
                f"the position {cell.position!r} of a cell is not found in the run: {error}"
            ) from error
        places.append([int(c) - run.tokens.start(row) for c in columns] or [-1])
    return places


def _numbers(cells: Sequence[Cell], places: Sequence[list[int]]) -> list[int]:
    """A number for each kind of state, the same at all places; selectors of several places, which
    are drawn at their last one, are kinds of their own."""
    kinds = [
        (cell.site, cell.head, cell.position if len(columns) > 1 else "")
        for cell, columns in zip(cells, places, strict=True)
    ]
    known = list(dict.fromkeys(kinds))
    return [known.index(kind) for kind in kinds]


def _cumulative(sizes: np.ndarray) -> list[float]:
    """The share of all effect up to each cell, the largest first: viewers prune by it."""
    total = float(sizes.sum())
    return (np.cumsum(sizes) / total).tolist() if total else np.ones(len(sizes)).tolist()


def _node(cell: Cell, feature: int, place: int, share: float) -> dict[str, Any]:
    layer = "E" if cell.layer is None and cell.sites[:1] and cell.sites[0] in ENTERS else None
    layer = layer or str(cell.layer or 0)
    return {
        "node_id": f"{layer}_{feature}_{place}",
        "feature": feature,
        "layer": layer,
        "ctx_idx": place,
        "feature_type": KIND,
        "token_prob": 0.0,
        "is_target_logit": False,
        "run_idx": 0,
        "reverse_ctx_idx": 0,
        "jsNodeId": f"{layer}_{feature}-{place}",
        "clerp": name_of(cell),
        "influence": share,
        "activation": None,
    }


def _target(found: EffectMap, run: Run, row: int) -> dict[str, Any]:
    """The metric, as a target that is no single token: its number is behind the vocabulary's."""
    tokens = run.tokens
    place = len(tokens[row]) - 1
    if tokens.tokenizer is None:
        raise InputError("a graph names the tokens of its run, and this model has no tokenizer")
    number = len(tokens.tokenizer)
    layers = [cell.layer for cell in found.cells if cell.layer is not None]
    layer = str(max(layers, default=0) + 1)
    return {
        "node_id": f"{layer}_{number}_{place}",
        "feature": number,
        "layer": layer,
        "ctx_idx": place,
        "feature_type": "logit",
        "token_prob": 1.0,
        "is_target_logit": True,
        "run_idx": 0,
        "reverse_ctx_idx": 0,
        "jsNodeId": f"L_{number}-{place}",
        # viewers read a probability out of this text: the one target is all that is explained
        "clerp": f'Output "{found.metric}" (p=1.000)',
        "influence": None,
        "activation": None,
    }


def _metadata(
    found: EffectMap,
    run: Run,
    row: int,
    slug: str,
    scan: str | None,
    example: int,
    left_out: int,
) -> dict[str, Any]:
    tokens = run.tokens
    columns = [token.column for token in tokens[row]]
    from_what = found.provenance.formula or f"{found.edit}, {found.metric}"
    notes = "; ".join(found.notes)
    return {
        "slug": slug,
        "scan": scan or found.provenance.model or "unknown",
        "transcoder_list": [],
        "prompt_tokens": tokens.texts(row, columns),
        "prompt": tokens.text(row),
        "schema_version": 1,
        "info": {
            "description": (
                f"Weights are total effects of patching a state ({from_what}), in {found.unit}; "
                f"{left_out} cells are left out." + (f" Notes: {notes}." if notes else "")
            ),
            "generator": {"name": "imaginelens", "version": version("imaginelens")},
        },
        "generation_settings": {
            "metric": found.metric,
            "unit": found.unit,
            "edit": found.edit,
            "direction": found.direction,
            "context": found.context,
            "example": example,
            "before": float(found.before[example]),
        },
    }
