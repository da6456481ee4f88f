"""nnsight 0.8 by itself: traces written by the user."""

import nnsight
import numpy as np
import torch

from benchmarks.peers.probing import probed
from benchmarks.peers.problem import IG_POINTS, Given

PACKAGE = "nnsight"


def setup(given: Given):
    return nnsight.NNsight(given.model)


def streams(wrapped, inputs):
    with torch.no_grad(), wrapped.trace(**inputs):
        kept = nnsight.save([block.output for block in wrapped.model.language_model.layers])
    return torch.stack(kept)


def patched(wrapped, inputs, layer, position, state):
    block = wrapped.model.language_model.layers[layer]
    with torch.no_grad(), wrapped.trace(**inputs):
        out = block.output.clone()
        out[:, position] = state
        block.output = out
        logits = nnsight.save(wrapped.lm_head.output)
    return logits


def read_streams(wrapped, given: Given):
    return streams(wrapped, given.base)[:, 0]


def patch_cell(wrapped, given: Given):
    layer, position = given.cell
    state = streams(wrapped, given.source)[layer, 0, position]
    return patched(wrapped, given.base, layer, position, state)[0, -1]


def sweep_cells(wrapped, given: Given):
    donor = streams(wrapped, given.source)
    with torch.no_grad(), wrapped.trace(**given.base):
        logits = nnsight.save(wrapped.lm_head.output)
    before = given.effect(logits)
    found = torch.zeros(len(donor), len(given.positions))
    for layer in range(len(donor)):
        for i, position in enumerate(given.positions):
            logits = patched(wrapped, given.base, layer, position, donor[layer, 0, position])
            found[layer, i] = given.effect(logits) - before
    return found


def zero_latents(wrapped, given: Given):
    opens, closes, pad = (given.marks[name] for name in ("open", "close", "pad"))
    ids, latent = given.base["input_ids"], []
    others = {name: given.base[name] for name in ("pixel_values", "image_grid_thw")}
    embed = wrapped.model.language_model.embed_tokens
    while True:
        kinds = (ids == wrapped.config.image_token_id).int()
        with torch.no_grad(), wrapped.trace(input_ids=ids, mm_token_type_ids=kinds, **others):
            out = embed.output.clone()
            out[:, latent] = 0.0
            embed.output = out
            logits = nnsight.save(wrapped.lm_head.output[0, -1])
        last = int(ids[0, -1])
        if last == closes:
            return logits.log_softmax(-1)[given.tokens[0]][None]
        if last in (opens, pad):
            token = pad if len(latent) < 2 else closes
            latent += [ids.shape[1]] if len(latent) < 2 else []
        else:
            token = int(logits.argmax())
        ids = torch.cat([ids, torch.tensor([[token]])], 1)


def attribute_image(wrapped, given: Given):
    first = wrapped.model.language_model.layers[0]
    states = []
    for inputs in (given.base, given.source):
        with torch.no_grad(), wrapped.trace(**inputs):
            entering = nnsight.save(first.input)
        states.append(entering)
    change = (states[1] - states[0])[:, given.image]
    points, weights = np.polynomial.legendre.leggauss(IG_POINTS)
    total = torch.zeros_like(change)
    for point, weight in zip((points + 1) / 2, weights / 2, strict=True):
        moved = states[0].clone()
        moved[:, given.image] += point * change
        moved.requires_grad_()
        with wrapped.trace(**given.base):
            first.input = moved
            logits = nnsight.save(wrapped.lm_head.output)
        (grad,) = torch.autograd.grad(given.effect(logits).sum(), moved)
        total += weight * grad[:, given.image]
    return (total * change).sum(-1)[0]


def probe_states(wrapped, given: Given):
    return probed(streams(wrapped, given.many)[2, :, -1], given.labels)
