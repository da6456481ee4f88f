"""The reference: hooks of torch alone, each task as shortly as it can be said."""

import numpy as np
import torch

from benchmarks.peers.probing import probed
from benchmarks.peers.problem import IG_POINTS, Given

PACKAGE = "torch"


def setup(given: Given):
    return given.model


def state_of(out):
    # before transformers 5.9 a block returns a tuple
    return out[0] if isinstance(out, tuple) else out


@torch.no_grad()
def streams(model, inputs):
    kept = []
    hooks = [
        block.register_forward_hook(lambda module, args, out: kept.append(state_of(out)))
        for block in model.model.language_model.layers
    ]
    try:
        model(**inputs)
    finally:
        for hook in hooks:
            hook.remove()
    return torch.stack(kept)


@torch.no_grad()
def patched(model, inputs, layer, position, state):
    def replace(module, args, out):
        changed = state_of(out).clone()
        changed[:, position] = state
        return (changed, *out[1:]) if isinstance(out, tuple) else changed

    hook = model.model.language_model.layers[layer].register_forward_hook(replace)
    try:
        return model(**inputs).logits
    finally:
        hook.remove()


def read_streams(model, given: Given):
    return streams(model, given.base)[:, 0]


def patch_cell(model, given: Given):
    layer, position = given.cell
    state = streams(model, given.source)[layer, 0, position]
    return patched(model, given.base, layer, position, state)[0, -1]


def sweep_cells(model, given: Given):
    donor = streams(model, given.source)
    with torch.no_grad():
        before = given.effect(model(**given.base).logits)
    found = torch.zeros(len(donor), len(given.positions))
    for layer in range(len(donor)):
        for i, position in enumerate(given.positions):
            logits = patched(model, given.base, layer, position, donor[layer, 0, position])
            found[layer, i] = given.effect(logits) - before
    return found


@torch.no_grad()
def zero_latents(model, given: Given):
    opens, closes, pad = (given.marks[name] for name in ("open", "close", "pad"))
    ids, latent = given.base["input_ids"], []
    others = {name: given.base[name] for name in ("pixel_values", "image_grid_thw")}

    def zeroed(module, args, out):
        out = out.clone()
        out[:, latent] = 0.0
        return out

    hook = model.get_input_embeddings().register_forward_hook(zeroed)
    try:
        while True:
            kinds = (ids == model.config.image_token_id).int()
            logits = model(input_ids=ids, mm_token_type_ids=kinds, **others).logits[0, -1]
            last = int(ids[0, -1])
            if last == closes:
                return logits.log_softmax(-1)[given.tokens[0]][None]
            if last in (opens, pad):
                token = pad if len(latent) < 2 else closes
                latent += [ids.shape[1]] if len(latent) < 2 else []
            else:
                token = int(logits.argmax())
            ids = torch.cat([ids, torch.tensor([[token]])], 1)
    finally:
        hook.remove()


def attribute_image(model, given: Given):
    first = model.model.language_model.layers[0]
    kept = {}

    def run(inputs, change=None):
        def at_first(module, args, kwargs):
            kept["x"] = args[0] if change is None else change(args[0].detach())
            return (kept["x"], *args[1:]), kwargs

        hook = first.register_forward_pre_hook(at_first, with_kwargs=True)
        try:
            return given.effect(model(**inputs).logits)
        finally:
            hook.remove()

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


def probe_states(model, given: Given):
    return probed(streams(model, given.many)[2, :, -1], given.labels)
