"""TransformerLens 4.3 where its tools fall short: its hooks, with the picture in every call."""

import numpy as np
import torch

from benchmarks.peers.problem import IG_POINTS, Given
from benchmarks.peers.transformer_lens_tools import setup as bridge_of
from benchmarks.peers.transformer_lens_tools import streams

PACKAGE = "transformer-lens"


def setup(given: Given):
    """The same bridge."""
    return bridge_of(given)


def sweep_cells(bridge, given: Given):
    cache = streams(bridge, given.source)
    others = {name: value for name, value in given.base.items() if name != "input_ids"}

    def logits(layer, position):
        def replace(act, hook):
            act = act.clone()
            act[:, position] = cache["resid_post", layer][:, position]
            return act

        hooks = [(f"blocks.{layer}.hook_resid_post", replace)]
        return bridge.run_with_hooks(given.base["input_ids"], fwd_hooks=hooks, **others)

    found = torch.zeros(bridge.cfg.n_layers, len(given.positions))
    with torch.no_grad():
        before = given.effect(bridge(given.base["input_ids"], **others))
        for layer in range(bridge.cfg.n_layers):
            for i, position in enumerate(given.positions):
                found[layer, i] = given.effect(logits(layer, position)) - before
    return found


@torch.no_grad()
def zero_latents(bridge, given: Given):
    opens, closes, pad = (given.marks[name] for name in ("open", "close", "pad"))
    ids, latent = given.base["input_ids"], []
    pictures = {name: given.base[name] for name in ("pixel_values", "image_grid_thw")}

    def zeroed(act, hook):
        act = act.clone()
        act[:, latent] = 0.0
        return act

    while True:
        kinds = (ids == bridge.original_model.config.image_token_id).int()
        logits = bridge.run_with_hooks(
            ids, fwd_hooks=[("embed.hook_out", zeroed)], mm_token_type_ids=kinds, **pictures
        )[0, -1]
        last = int(ids[0, -1])
        if last == closes:
            return logits.log_softmax(-1)[given.tokens[0]][None]
        if last in (opens, pad):
            token = pad if len(latent) < 2 else closes
            latent += [ids.shape[1]] if len(latent) < 2 else []
        else:
            token = int(logits.argmax())
        ids = torch.cat([ids, torch.tensor([[token]])], 1)


def attribute_image(bridge, given: Given):
    site = "blocks.0.hook_resid_pre"
    kept = {}

    def run(inputs, change=None):
        def at_first(act, hook):
            kept["x"] = act if change is None else change(act.detach())
            return kept["x"]

        others = {name: value for name, value in inputs.items() if name != "input_ids"}
        return given.effect(
            bridge.run_with_hooks(inputs["input_ids"], fwd_hooks=[(site, at_first)], **others)
        )

    states = []
    for inputs in (given.base, given.source):
        run(inputs)
        states.append(kept["x"].detach())
    change = (states[1] - states[0])[:, given.image]
    points, weights = np.polynomial.legendre.leggauss(IG_POINTS)
    total = torch.zeros_like(change)
    for point, weight in zip((points + 1) / 2, weights / 2, strict=True):

        def moved(x, point=point):
            x = x.clone()
            x[:, given.image] += point * change
            return x.requires_grad_()

        (grad,) = torch.autograd.grad(run(given.base, moved).sum(), kept["x"])
        total += weight * grad[:, given.image]
    return (total * change).sum(-1)[0]
