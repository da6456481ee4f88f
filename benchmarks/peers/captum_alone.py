"""captum 0.9: attribution, and ablation of layers with states of another run as the baseline."""

import captum.attr
import torch
from captum.attr import IntegratedGradients, LayerActivation, LayerFeatureAblation

from benchmarks.peers.probing import probed
from benchmarks.peers.problem import IG_POINTS, Given
from benchmarks.peers.tasks import Cannot

PACKAGE = "captum"


def setup(given: Given):
    return given.model


def streams(model, inputs):
    names, blocks = list(inputs), list(model.model.language_model.layers)

    def forward(*values):
        return model(**dict(zip(names, values, strict=True))).logits[:, -1]

    first, *rest = (inputs[name] for name in names)
    reader = LayerActivation(forward, blocks)
    with torch.no_grad():
        return torch.stack(reader.attribute(first, additional_forward_args=tuple(rest)))


def ablated(given, layer, outcome, donor, mask):
    names = list(given.base)

    def forward(*values):
        return outcome(given.model(**dict(zip(names, values, strict=True))).logits)

    first, *rest = (given.base[name] for name in names)
    method = LayerFeatureAblation(forward, given.blocks[layer])
    return method.attribute(
        first,
        additional_forward_args=tuple(rest),
        layer_baselines=donor,
        layer_mask=mask,
    )


def read_streams(model, given: Given):
    return streams(model, given.base)[:, 0]


def patch_cell(model, given: Given):
    layer, position = given.cell
    donor = streams(model, given.source)[layer]
    mask = torch.zeros_like(donor).long()
    mask[:, position] = 1
    with torch.no_grad():
        before = model(**given.base).logits[0, -1]
    # an output of many numbers is taken as one example's, so the change of each comes back
    change = ablated(given, layer, lambda logits: logits[0, -1], donor, mask)
    return before - change[:, position, 0]


def sweep_cells(model, given: Given):
    donor = streams(model, given.source)
    mask = torch.arange(donor.shape[2])[None, :, None].expand(donor[0].shape)
    rows = [
        ablated(given, layer, given.effect, donor[layer], mask)[0, :, 0]
        for layer in range(len(donor))
    ]
    return -torch.stack(rows)[:, given.positions]


def zero_latents(model, given: Given):
    """Look whether anything acts on states while text is generated."""
    found = [n for n in dir(captum.attr) if "generat" in n.lower() or "intervene" in n.lower()]
    if not found:
        raise Cannot("it explains a forward; nothing in captum.attr acts while text is generated")
    return found


def attribute_image(model, given: Given):
    seen = []

    def see(module, args, kwargs):
        seen.append((kwargs["inputs_embeds"], kwargs["position_ids"]))

    hook = model.model.language_model.register_forward_pre_hook(see, with_kwargs=True)
    with torch.no_grad():
        model(**given.base)
        model(**given.source)
    hook.remove()
    (base, places), (source, _) = seen

    def forward(image):
        x = base.expand(len(image), -1, -1).clone()
        x[:, given.image] = image
        return given.effect(
            model(inputs_embeds=x, position_ids=places.expand(-1, len(image), -1)).logits
        )

    shares = IntegratedGradients(forward).attribute(
        source[:, given.image], baselines=base[:, given.image], n_steps=IG_POINTS
    )
    return shares.sum(-1)[0]


def probe_states(model, given: Given):
    return probed(streams(model, given.many)[2, :, -1], given.labels)
