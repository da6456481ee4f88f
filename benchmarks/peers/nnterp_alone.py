"""nnterp 1.3 with nnsight 0.7, which it needs: standard names for what nnsight traces."""

import nnsight
import torch
from nnterp import StandardizedTransformer
from transformers import AutoTokenizer

from benchmarks.peers.probing import probed
from benchmarks.peers.problem import Given
from benchmarks.peers.tasks import Cannot

PACKAGE = "nnterp"


def setup(given: Given):
    tokenizer = AutoTokenizer.from_pretrained(given.folder)
    return StandardizedTransformer(given.model, tokenizer=tokenizer, allow_multimodal=True)


def streams(model, inputs):
    with torch.no_grad(), model.trace(**inputs):
        kept = nnsight.save([model.layers_output[i] for i in range(model.num_layers)])
    return torch.stack(kept)


def patched(model, inputs, layer, position, state):
    with torch.no_grad(), model.trace(**inputs):
        model.layers_output[layer][:, position] = state
        logits = nnsight.save(model.logits)
    return logits


def read_streams(model, given: Given):
    return streams(model, given.base)[:, 0]


def patch_cell(model, given: Given):
    layer, position = given.cell
    state = streams(model, given.source)[layer, 0, position]
    return patched(model, given.base, layer, position, state)[0, -1]


def sweep_cells(model, given: Given):
    donor = streams(model, given.source)
    with torch.no_grad(), model.trace(**given.base):
        logits = nnsight.save(model.logits)
    before = given.effect(logits)
    found = torch.zeros(len(donor), len(given.positions))
    for layer in range(len(donor)):
        for i, position in enumerate(given.positions):
            logits = patched(model, given.base, layer, position, donor[layer, 0, position])
            found[layer, i] = given.effect(logits) - before
    return found


def zero_latents(model, given: Given):
    opens, closes, pad = (given.marks[name] for name in ("open", "close", "pad"))
    ids, latent = given.base["input_ids"], []
    pictures = {name: given.base[name] for name in ("pixel_values", "image_grid_thw")}
    while True:
        kinds = (ids == given.model.config.image_token_id).int()
        with torch.no_grad(), model.trace(input_ids=ids, mm_token_type_ids=kinds, **pictures):
            out = model.token_embeddings.clone()
            out[:, latent] = 0.0
            model.token_embeddings = out
            logits = nnsight.save(model.logits[0, -1])
        last = int(ids[0, -1])
        if last == closes:
            return logits.log_softmax(-1)[given.tokens[0]][None]
        if last in (opens, pad):
            token = pad if len(latent) < 2 else closes
            latent += [ids.shape[1]] if len(latent) < 2 else []
        else:
            token = int(logits.argmax())
        ids = torch.cat([ids, torch.tensor([[token]])], 1)


def attribute_image(model, given: Given):
    """Look whether it attributes anything."""
    import nnterp

    found = [name for name in dir(nnterp) if "attribut" in name.lower() or "grad" in name.lower()]
    if not found:
        raise Cannot("no attribution of its own; what nnsight alone does works under its names too")
    return found


def probe_states(model, given: Given):
    return probed(streams(model, given.many)[2, :, -1], given.labels)
