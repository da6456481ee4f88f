"""The recipe for graphs: what it writes opens, and says what is known."""

import json
from pathlib import Path

import pytest

from examples.interop import with_neuronpedia


def test_the_graphs_say_where_the_effect_is(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with_neuronpedia.main(str(tmp_path / "graphs"))
    told = capsys.readouterr().out.splitlines()
    assert len(told) == 4
    content, ignored = (float(line.split()[1]) for line in told[1::2])
    assert content > 0.9
    assert abs(ignored) < 0.1
    graph = json.loads((tmp_path / "graphs" / "latent-content.json").read_text())
    name, weight = with_neuronpedia.largest(graph)
    assert "latent[1]" in name
    assert weight > 0
    listed = json.loads((tmp_path / "graphs" / "graph-metadata.json").read_text())["graphs"]
    assert [one["slug"] for one in listed] == ["latent-content", "latent-ignored"]


def test_circuit_tracers_own_model_of_a_graph_takes_it() -> None:
    models = pytest.importorskip("circuit_tracer.frontend.graph_models")
    graph, _ = with_neuronpedia.graph_of("latent-content")
    read = models.Model(**graph)
    assert [node.node_id for node in read.nodes] == [node["node_id"] for node in graph["nodes"]]
    assert read.metadata.slug == "latent-content"
