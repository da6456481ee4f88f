"""vlmprobe 1.0: its causal methods, and its adapter's runs where they end."""

import numpy as np
import torch
import vlmprobe

from benchmarks.peers.probing import probed
from benchmarks.peers.problem import IG_POINTS, Given

PACKAGE = "vlmprobe"


def setup(given: Given):
    return vlmprobe.Prober(given.model)


def streams(probe, inputs):
    sites = [probe.spec.residuals[i] for i in sorted(probe.spec.residuals)]
    trace = probe.adapter.run({**inputs, "use_cache": False}, capture=sites)
    return torch.stack([trace.activations[site] for site in sites])


def read_streams(probe, given: Given):
    return streams(probe, given.base)[:, 0]


def patch_cell(probe, given: Given):
    layer, position = given.cell
    state = streams(probe, given.source)[layer, 0, position]

    def replace(hidden):
        hidden = hidden.clone()
        hidden[:, position] = state
        return hidden

    # causal.patch tells what became of a score; for the logits one runs the adapter
    trace = probe.adapter.run(
        {**given.base, "use_cache": False}, interventions={probe.spec.residuals[layer]: replace}
    )
    return trace.logits[0, -1]


def sweep_cells(probe, given: Given):
    effects = [
        probe.causal.patch(tokens=[position])
        .run(given.base, source=given.source, metric=given.effect, alignment="position")
        .tensors["effect"][:, 0]
        for position in given.positions
    ]
    return torch.stack(effects, 1)


def zero_latents(probe, given: Given):
    opens, closes, pad = (given.marks[name] for name in ("open", "close", "pad"))
    ids, latent = given.base["input_ids"], []
    pictures = {name: given.base[name] for name in ("pixel_values", "image_grid_thw")}

    def zeroed(hidden):
        hidden = hidden.clone()
        hidden[:, latent] = 0.0
        return hidden

    while True:
        kinds = (ids == probe.model.config.image_token_id).int()
        inputs = {"input_ids": ids, "mm_token_type_ids": kinds, "use_cache": False, **pictures}
        logits = probe.adapter.run(inputs, interventions={"embeddings": zeroed}).logits[0, -1]
        last = int(ids[0, -1])
        if last == closes:
            return logits.log_softmax(-1)[given.tokens[0]][None]
        if last in (opens, pad):
            token = pad if len(latent) < 2 else closes
            latent += [ids.shape[1]] if len(latent) < 2 else []
        else:
            token = int(logits.argmax())
        ids = torch.cat([ids, torch.tensor([[token]])], 1)


def attribute_image(probe, given: Given):
    # its causal.attribute takes one gradient, its EAP-IG edges and the trapezoid: so by hand
    states = [
        probe.adapter.run({**inputs, "use_cache": False}, capture=["embeddings"]).activations[
            "embeddings"
        ]
        for inputs in (given.base, given.source)
    ]
    change = (states[1] - states[0])[:, given.image]
    points, weights = np.polynomial.legendre.leggauss(IG_POINTS)
    total = torch.zeros_like(change)
    for point, weight in zip((points + 1) / 2, weights / 2, strict=True):
        moved = states[0].clone()
        moved[:, given.image] += point * change
        moved.requires_grad_()
        trace = probe.adapter.run(
            {**given.base, "use_cache": False},
            interventions={"embeddings": lambda _, moved=moved: moved},
            grad=True,
        )
        (grad,) = torch.autograd.grad(given.effect(trace.logits).sum(), moved)
        total += weight * grad[:, given.image]
    return (total * change).sum(-1)[0]


def probe_states(probe, given: Given):
    return probed(streams(probe, given.many)[2, :, -1], given.labels)
