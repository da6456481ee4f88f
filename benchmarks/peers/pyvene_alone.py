"""pyvene 0.1: interventions at modules named by their path, since it knows no Qwen-VL."""

import numpy as np
import pyvene as pv
import torch

from benchmarks.peers.probing import probed
from benchmarks.peers.problem import IG_POINTS, Given

PACKAGE = "pyvene"
BLOCK = "model.language_model.layers[%d].output"


def setup(given: Given):
    return given.model


def streams(model, inputs):
    width = list(range(inputs["input_ids"].shape[1]))
    found = []
    for layer in range(len(model.model.language_model.layers)):
        read = pv.IntervenableModel(
            {"component": BLOCK % layer, "intervention": pv.CollectIntervention()}, model
        )
        with torch.no_grad():
            (_, kept), _ = read(inputs, unit_locations={"base": width})
        found.append(torch.stack(list(kept)).view(len(inputs["input_ids"]), len(width), -1))
    return torch.stack(found)


def patcher(model, layer):
    return pv.IntervenableModel(
        {"component": BLOCK % layer, "intervention": pv.VanillaIntervention()}, model
    )


def read_streams(model, given: Given):
    return streams(model, given.base)[:, 0]


def patch_cell(model, given: Given):
    layer, position = given.cell
    patched = patcher(model, layer)
    where = {"sources->base": position}
    with torch.no_grad():
        _, out = patched(given.base, [given.source], unit_locations=where)
    return out.logits[0, -1]


def sweep_cells(model, given: Given):
    with torch.no_grad():
        before = given.effect(model(**given.base).logits)
        found = []
        for layer in range(len(given.blocks)):
            patched = patcher(model, layer)
            for position in given.positions:
                where = {"sources->base": position}
                _, out = patched(given.base, [given.source], unit_locations=where)
                found.append(given.effect(out.logits) - before)
    return torch.cat(found).view(len(given.blocks), -1)


def zero_latents(model, given: Given):
    opens, closes, pad = (given.marks[name] for name in ("open", "close", "pad"))
    ids, latent = given.base["input_ids"], []
    pictures = {name: given.base[name] for name in ("pixel_values", "image_grid_thw")}
    embedding = "model.language_model.embed_tokens.output"
    zeroed = pv.IntervenableModel(
        {"component": embedding, "intervention": pv.ZeroIntervention()}, model
    )
    while True:
        kinds = (ids == model.config.image_token_id).int()
        inputs = {"input_ids": ids, "mm_token_type_ids": kinds, **pictures}
        with torch.no_grad():
            if latent:
                # as a flat list, two positions would not both be zeroed, and no error would say so
                out = zeroed(inputs, unit_locations={"base": [[latent]]})[1]
            else:
                out = model(**inputs)
        logits, last = out.logits[0, -1], int(ids[0, -1])
        if last == closes:
            return logits.log_softmax(-1)[given.tokens[0]][None]
        if last in (opens, pad):
            token = pad if len(latent) < 2 else closes
            latent += [ids.shape[1]] if len(latent) < 2 else []
        else:
            token = int(logits.argmax())
        ids = torch.cat([ids, torch.tensor([[token]])], 1)


def attribute_image(model, given: Given):
    kept = {}

    def along(base, source):
        kept["x"] = kept["change"](base.detach()) if "change" in kept else base
        return kept["x"]

    first = "model.language_model.layers[0].input"
    moving = pv.IntervenableModel({"component": first, "intervention": along}, model)

    def run(inputs):
        width = list(range(inputs["input_ids"].shape[1]))
        return given.effect(moving(inputs, unit_locations={"base": width})[1].logits)

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

        kept["change"] = moved
        (grad,) = torch.autograd.grad(run(given.base).sum(), kept["x"])
        total += weight * grad[:, given.image]
    return (total * change).sum(-1)[0]


def probe_states(model, given: Given):
    return probed(streams(model, given.many)[2, :, -1], given.labels)
