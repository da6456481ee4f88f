"""Maps as attribution graphs: the published keys and types, the numbers, and what is refused."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import imaginelens as il
from imaginelens.mediation.cells import Cell
from imaginelens.mediation.graph_export import attribution_graph, save_graph

# Neuronpedia's graph-schema.json, version 1.0.0 (hijohnnylin/neuronpedia, apps/webapp/app/api/graph
# at commit b8efe84): what is required, and of which type.
TEXT, WHOLE, LIST, NUMBER = (str,), (int,), (list,), (int, float)
REQUIRED: dict[str, dict[str, tuple[type, ...]]] = {
    "metadata": {"slug": TEXT, "scan": TEXT, "prompt_tokens": LIST, "prompt": TEXT},
    "qParams": {},
    "node": {
        "node_id": TEXT, "feature": (int, type(None)), "layer": (str, int), "ctx_idx": WHOLE,
        "feature_type": TEXT, "jsNodeId": TEXT, "clerp": TEXT,
    },
    "link": {"source": TEXT, "target": TEXT, "weight": NUMBER},
}  # fmt: skip
# and what circuit-tracer 0.5.0 (frontend/graph_models.py) requires besides, or types more narrowly
BESIDES: dict[str, dict[str, tuple[type, ...]]] = {
    "metadata": {"transcoder_list": LIST},
    "qParams": {"pinnedIds": LIST, "supernodes": LIST, "linkType": TEXT, "clickedId": TEXT,
                "sg_pos": TEXT},
    "node": {"feature": WHOLE, "layer": TEXT, "influence": (float, type(None))},
    "link": {},
}  # fmt: skip


def check(graph: dict[str, Any]) -> None:
    """What both viewers need to open it."""
    assert set(graph) >= {"metadata", "qParams", "nodes", "links"}
    for table in (REQUIRED, BESIDES):
        for kind, parts in (
            ("metadata", [graph["metadata"]]),
            ("qParams", [graph["qParams"]]),
            ("node", graph["nodes"]),
            ("link", graph["links"]),
        ):
            for part in parts:
                for key, types in table[kind].items():
                    assert isinstance(part[key], types), (kind, key, part.get(key))
    assert all(isinstance(token, str) for token in graph["metadata"]["prompt_tokens"])
    ids = [node["node_id"] for node in graph["nodes"]]
    assert len(set(ids)) == len(ids)
    assert len({node["jsNodeId"] for node in graph["nodes"]}) == len(ids)
    assert all(link["source"] in ids and link["target"] in ids for link in graph["links"])
    width = len(graph["metadata"]["prompt_tokens"])
    assert all(0 <= node["ctx_idx"] < width for node in graph["nodes"])
    for node in graph["nodes"]:
        if node["feature_type"] == "logit":  # the viewers split this text at "(p="
            assert 0 <= float(node["clerp"].split("(p=")[1].split(")")[0]) <= 1
    json.dumps(graph, allow_nan=False)


LENS = il.load("latent-content")
TASK = LENS.task(n=3, seed=0)
BASE = LENS.run(TASK.base)


@pytest.fixture(scope="module")
def swept() -> il.EffectMap:
    return il.sweep(
        LENS, TASK, sites="resid_post", positions=[*map(il.latent.__getitem__, (0, 1)), il.image],
        metric=il.logit_diff, context="fixed",
    )  # fmt: skip


def test_a_swept_map_is_a_graph_of_its_effects(swept: il.EffectMap) -> None:
    for example in range(3):
        graph = attribution_graph(swept, BASE, slug=f"hunt-{example}", example=example)
        check(graph)
        *cells, target = graph["nodes"]
        assert target["is_target_logit"]
        assert graph["qParams"]["clickedId"] == target["node_id"]  # opens on the metric's links
        assert len(cells) == len(graph["links"]) == len(swept)
        by_name = {node["clerp"]: node["node_id"] for node in cells}
        weights = {link["source"]: link["weight"] for link in graph["links"]}
        for row, cell in enumerate(swept.cells):
            node = by_name[f"resid_post, layer {cell.layer}, {cell.position}"]
            assert weights[node] == swept.effect[row, example]
        first = BASE.tokens.latents(example)[0] - BASE.tokens.start(example)
        assert {node["ctx_idx"] for node in cells if "latent[0]" in node["clerp"]} == {first}
        assert {node["layer"] for node in cells} == {"0", "1", "2"}
        assert graph["metadata"]["prompt_tokens"][0] == BASE.tokens[example][0].text
        assert "resid" not in graph["metadata"]["prompt"]
        assert graph["metadata"]["scan"] == swept.provenance.model


def test_influence_is_the_share_up_to_each_cell(swept: il.EffectMap) -> None:
    graph = attribution_graph(swept, BASE, slug="shares")
    sizes = {link["source"]: abs(link["weight"]) for link in graph["links"]}
    order = sorted(sizes, key=lambda node: -sizes[node])
    shares = np.cumsum([sizes[node] for node in order]) / sum(sizes.values())
    given = {node["node_id"]: node["influence"] for node in graph["nodes"]}
    np.testing.assert_allclose([given[node] for node in order], shares)


def test_top_keeps_the_largest(swept: il.EffectMap) -> None:
    whole = attribution_graph(swept, BASE, slug="whole")
    few = attribution_graph(swept, BASE, slug="few", top=2)
    check(few)
    largest = sorted((abs(link["weight"]) for link in whole["links"]), reverse=True)[:2]
    assert sorted((abs(link["weight"]) for link in few["links"]), reverse=True) == largest
    assert f"{len(swept) - 2} cells are left out" in few["metadata"]["info"]["description"]


def test_known_answer_the_last_latent_carries_the_effect_and_in_the_ignored_one_none_does() -> None:
    how = {"sites": "hook_latent", "positions": il.latent, "metric": il.logit_diff}
    content = il.sweep(LENS, TASK, context="fixed", **how)
    graph = attribution_graph(content, BASE, slug="content", top=1)
    assert graph["nodes"][0]["clerp"] == "hook_latent, latent[1]"
    assert graph["nodes"][0]["layer"] == "E"
    assert graph["links"][0]["weight"] > 0.9 * float(content.total[0])
    fooling = il.load("latent-ignored")
    task = fooling.task(n=1, seed=0)
    ignored = il.sweep(fooling, task, context="fixed", **how)
    graph = attribution_graph(ignored, fooling.run(task.base), slug="ignored")
    total = float(ignored.total[0])
    assert max(abs(link["weight"]) for link in graph["links"]) < 0.1 * total


def test_an_attribution_goes_the_same_way_and_says_that_it_approximates() -> None:
    found = il.attribute(LENS, TASK, sites="hook_latent", method="atp")
    graph = attribution_graph(found, BASE, slug="atp", example=1)
    check(graph)
    weights = [link["weight"] for link in graph["links"]]
    np.testing.assert_allclose(weights, found.values[:, 1], rtol=1e-12)
    assert "approximation" in graph["metadata"]["info"]["description"]


def test_graphs_are_saved_beside_others(swept: il.EffectMap, tmp_path: Path) -> None:
    one = attribution_graph(swept, BASE, slug="one", scan="my-model")
    two = attribution_graph(swept, BASE, slug="two", example=1)
    for graph in (one, two, one):
        path = save_graph(graph, tmp_path / "graphs")
        assert json.loads(path.read_text()) == graph
    listed = json.loads((tmp_path / "graphs" / "graph-metadata.json").read_text())["graphs"]
    assert [one["slug"] for one in listed] == ["two", "one"]
    assert listed[1]["scan"] == "my-model"
    for content in ("[]", "[" * 100_000, '{"graphs": [3]}', '{"graphs": 3}'):
        (tmp_path / "graphs" / "graph-metadata.json").write_text(content)
        with pytest.raises(il.InputError, match="is no list of graphs"):
            save_graph(one, tmp_path / "graphs")
    with pytest.raises(il.InputError, match=r"has no metadata\.slug; make it with"):
        save_graph({"nodes": []}, tmp_path)


def test_cells_that_were_not_measured_or_did_not_change_are_left_out() -> None:
    cells = [
        Cell("resid_post", layer, f"latent[{t}]", None, ()) for layer in (0, 1) for t in (0, 1)
    ]
    after = np.array([[1.0, 2.0], [np.nan, 1.0], [0.5, 0.5], [3.0, 1.0]])
    found = il.EffectMap.from_arrays(cells=cells, before=[0.5, 0.5], after=after)
    graph = attribution_graph(found, BASE, slug="gaps")
    check(graph)
    assert [link["weight"] for link in graph["links"]] == [0.5, 0.0, 2.5]
    none = il.EffectMap.from_arrays(cells=cells, before=[np.nan, 0.5], after=after)
    with pytest.raises(il.InputError, match="has an effect in none of the 4 cells"):
        attribution_graph(none, BASE, slug="none")


def test_what_does_not_fit_is_refused(swept: il.EffectMap) -> None:
    for options, message in (
        ({"slug": "a b"}, "slug is 'a b', expected letters, digits and hyphens"),
        ({"slug": "a", "example": 3}, "example is 3, and the map has examples 0 to 2"),
        ({"slug": "a", "row": 3}, "row is 3, and the run has rows 0 to 2"),
        ({"slug": "a", "top": 0}, "top is 0, expected a number of cells"),
        ({"slug": "a", "row": 1}, "row 1 of the run is another input than example 0 of the map"),
    ):
        with pytest.raises(il.InputError, match=message):
            attribution_graph(swept, BASE, **options)
    cells = [Cell("resid_post", 0, position, None, ()) for position in ("elsewhere",)]
    odd = il.EffectMap.from_arrays(cells=cells, before=[0.0], after=[[1.0]])
    with pytest.raises(il.InputError, match="the position 'elsewhere' of a cell is not found"):
        attribution_graph(odd, BASE, slug="a")
