"""A map of effects as an attribution graph, for circuit-tracer's viewer and for Neuronpedia.

For users of either: `il.attribution_graph` writes one example of a map, from `il.sweep` or
`il.attribute`, in their JSON: a node for each state, a link to the answer with its effect. The
states of an image and of the latents are nodes like any token's. From the root of a clone:

    python -m examples.interop.with_neuronpedia
    circuit-tracer start-server --graph_file_dir graphs
"""

import sys
from pathlib import Path
from typing import Any

import imaginelens as il
from imaginelens.mediation.graph_export import attribution_graph, save_graph


def graph_of(name: str) -> tuple[dict[str, Any], float]:
    """The graph of an organism's first hunt, and the total effect of its input."""
    lens = il.load(name)
    task = lens.task(n=2, seed=0)
    found = il.sweep(
        lens,
        task,
        sites=["hook_latent", "blocks.*.hook_resid_post"],
        positions=[il.latent[0], il.latent[1], il.image],
        metric=il.logit_diff,
        context="fixed",
    )
    graph = attribution_graph(found, lens.run(task.base), slug=name, top=8)
    return graph, float(found.total[0])


def largest(graph: dict[str, Any]) -> tuple[str, float]:
    """The state with the largest effect, and that effect."""
    names = {node["node_id"]: node["clerp"] for node in graph["nodes"]}
    link = max(graph["links"], key=lambda link: abs(link["weight"]))
    return names[link["source"]], link["weight"]


def main(folder: str = "graphs") -> None:
    """Write two graphs, and print what carries the effect in each, beside what is known."""
    for name, oracle in (
        ("latent-content", "the last latent carries it all"),
        ("latent-ignored", "no latent carries any"),
    ):
        graph, total = graph_of(name)
        path = save_graph(graph, Path(folder))
        fed = [n["node_id"] for n in graph["nodes"] if n["clerp"].startswith("hook_latent")]
        by_latents = sum(link["weight"] for link in graph["links"] if link["source"] in fed)
        print(f"{path}: {len(graph['links'])} states; known: {oracle}")
        print(
            f"  latents {by_latents / total:.2f} of the total effect; largest: {largest(graph)[0]}"
        )


if __name__ == "__main__":
    main(*sys.argv[1:2])
