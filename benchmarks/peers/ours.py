"""ImagineLens."""

import torch

import imaginelens as il
from benchmarks.peers.problem import Given, opened

PACKAGE = "imaginelens"


def pair(given: Given) -> il.Pairs:
    """The two examples as the library takes them."""
    base, source = (opened(example) for example in given.examples)
    return il.Pairs(
        base=[base],
        source=[source],
        base_answers=given.answers[:1],
        source_answers=given.answers[1:],
    )


def setup(given: Given):
    return il.load(given.name)


def read_streams(lens, given: Given):
    with torch.no_grad():
        _, cache = lens.run_with_cache(given.base, names_filter="blocks.*.hook_resid_post")
    return torch.stack([cache["resid_post", i][0] for i in range(len(given.blocks))])


def patch_cell(lens, given: Given):
    layer, position = given.cell
    site = f"blocks.{layer}.hook_resid_post"
    with torch.no_grad():
        _, donor = lens.run_with_cache(given.source, names_filter=site)
        state = donor[site][0, position]
        with lens.edit(il.Replace(state), at=il.positions([position]), site=site):
            return lens.run_with_hooks(given.base)[0, -1]


def sweep_cells(lens, given: Given):
    at = [il.positions([position]) for position in given.positions]
    found = il.sweep(lens, pair(given), sites="resid_post", positions=at, context="fixed")
    return torch.tensor(found.effect[:, 0]).view(-1, len(at))


def zero_latents(lens, given: Given):
    done = lens.ablate(opened(given.examples[0]), il.Zero(), at=il.latent, metric=il.log_prob)
    return torch.as_tensor(done.after)


def attribute_image(lens, given: Given):
    found = il.attribute(
        lens, pair(given), sites="blocks.0.hook_resid_pre", positions=il.image, method="ig"
    )
    return torch.tensor(found.values[:, 0])


def probe_states(lens, given: Given):
    with torch.no_grad():
        _, cache = lens.run_with_cache(given.many, names_filter="blocks.2.hook_resid_post")
    states = cache["resid_post", 2][:, -1].numpy()
    found = il.probes.fit_probe(states, given.labels.numpy(), controls=("shuffled labels",))
    return torch.tensor([found.accuracy.value, found.shuffled.mean()])
