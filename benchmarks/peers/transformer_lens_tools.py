"""TransformerLens 4.3: its bridge and its own tools, called as its documentation has it.

The bridge takes a picture where it is called with one. The tools above it call it with token ids
only.
"""

import pandas as pd
import torch
from transformer_lens import patching
from transformer_lens.model_bridge.sources import build_bridge_from_module
from transformer_lens.model_bridge.supported_architectures import qwen2_5_vl
from transformer_lens.tools import analysis
from transformer_lens.tools.analysis.sparse_probing import sweep_sparse_probe

from benchmarks.peers.problem import Given
from benchmarks.peers.tasks import Cannot

PACKAGE = "transformer-lens"
WHY = {
    "T3": "get_act_patch_* call the model with token ids alone: the picture is dropped, no error",
    "T4": "generate writes tokens and feeds no state back: there is no latent step to zero",
}


def setup(given: Given):
    # the adapter asks for torchvision, which only its processor needs
    qwen2_5_vl.Qwen2_5_VLArchitectureAdapter.required_libraries = []
    model = given.model
    return build_bridge_from_module(model, type(model).__name__, hf_config=model.config)


def streams(bridge, inputs):
    others = {name: value for name, value in inputs.items() if name != "input_ids"}
    with torch.no_grad():
        _, cache = bridge.run_with_cache(
            inputs["input_ids"], names_filter=lambda n: n.endswith("hook_resid_post"), **others
        )
    return cache


def read_streams(bridge, given: Given):
    cache = streams(bridge, given.base)
    return torch.stack([cache["resid_post", i][0] for i in range(bridge.cfg.n_layers)])


def patch_cell(bridge, given: Given):
    layer, position = given.cell
    donor = streams(bridge, given.source)["resid_post", layer]

    def replace(act, hook):
        act = act.clone()
        act[:, position] = donor[:, position]
        return act

    others = {name: value for name, value in given.base.items() if name != "input_ids"}
    with torch.no_grad():
        logits = bridge.run_with_hooks(
            given.base["input_ids"],
            fwd_hooks=[(f"blocks.{layer}.hook_resid_post", replace)],
            **others,
        )
    return logits[0, -1]


def sweep_cells(bridge, given: Given):
    cache = streams(bridge, given.source)
    cells = [(i, p) for i in range(bridge.cfg.n_layers) for p in given.positions]
    with torch.no_grad():
        before = given.effect(bridge(given.base["input_ids"]))
        found = patching.generic_activation_patch(
            model=bridge,
            corrupted_tokens=given.base["input_ids"],
            clean_cache=cache,
            patching_metric=lambda logits: (given.effect(logits) - before)[0],
            patch_setter=patching.layer_pos_patch_setter,
            activation_name="resid_post",
            index_df=pd.DataFrame(cells, columns=["layer", "pos"]),
        )
    return found.view(bridge.cfg.n_layers, -1)


def zero_latents(bridge, given: Given):
    pictures = {name: given.base[name] for name in ("pixel_values", "image_grid_thw")}
    ids = bridge.generate(
        given.base["input_ids"],
        max_new_tokens=8,
        do_sample=False,
        use_past_kv_cache=False,
        return_type="tokens",
        verbose=False,
        **pictures,
    )
    span = (ids[0] == given.marks["open"]).nonzero()
    with torch.no_grad():
        logits = bridge(ids[:, : int(span[-1]) + 2], **pictures)
    return logits[0, -1].log_softmax(-1)[given.tokens[0]][None]


def attribute_image(bridge, given: Given):
    """Look whether its attribution tools integrate."""
    found = [n for n in dir(analysis) if "integrat" in n.lower()]
    if not found:
        raise Cannot("attribution patching takes one gradient; no tool integrates along a way")
    return found


def probe_states(bridge, given: Given):
    states = streams(bridge, given.many)["resid_post", 2][:, -1]
    found = sweep_sparse_probe(
        states, given.labels, ks=[states.shape[1]], preprocess="standardize", n_label_shuffles=20
    )
    (probe,), (control,) = found.results, found.label_shuffle_controls
    return torch.tensor([probe.metrics.accuracy, control.accuracy.mean()])
