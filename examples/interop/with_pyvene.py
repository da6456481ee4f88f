"""pyvene's intervention configs on a model that reasons in latents, with its picture.

For users of pyvene: the config you have, as a dict or as pyvene's own object or saved folder, acts
on any model of ours. Its `unit_locations` may name columns, or a meaning such as `il.latent[0]`;
every intervention comes with the proof that it landed. pyvene 0.1.8 itself knows no Qwen2.5-VL; on
a text model, where both run, the logits are the same. From the root of a clone:

    python -m examples.interop.with_pyvene
"""

import warnings
from importlib.util import find_spec
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import imaginelens as il
from imaginelens.hooks.pyvene_configs import from_pyvene, to_pyvene

# What is fed back as the last latent leaves the last block at the latent before it.
CONFIG = {
    "representations": [{"layer": 2, "component": "block_output", "unit": "pos"}],
    "intervention_types": "VanillaIntervention",
}


def swapped(name: str, n: int = 16) -> tuple[float, str]:
    """Swap a state between pairs of inputs: how often the donor's answer follows, and the proof."""
    lens = il.load(name)
    task = lens.task(n=n, seed=0)
    swap = from_pyvene(lens, CONFIG)
    where = {"sources->base": il.latent[0]}
    with swap.active(where, sources=[lens.run(task.source)]) as found:
        changed = lens.run(task.base)
    moved = [a == b for a, b in zip(changed.answers, task.source_answers, strict=True)]
    return sum(moved) / n, found.landings[0].touched


def sent_out() -> dict[str, Any]:
    """Edits of ours as a config for pyvene."""
    lens = il.load("latent-content")
    edits = [
        ("blocks.0.hook_mlp_out", il.Zero()),
        ("blocks.1.hook_resid_post", il.Steer(torch.ones(64), 0.5)),
    ]
    return to_pyvene(lens, edits)


def text_model() -> LlamaForCausalLM:
    """A tiny random model that pyvene knows, too."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=50, hidden_size=16, intermediate_size=24, num_hidden_layers=3,
        num_attention_heads=4, num_key_value_heads=2, initializer_range=0.5,
    )  # fmt: skip
    return LlamaForCausalLM(config).double().eval()


def against_pyvene() -> tuple[float, float]:
    """The same config here and there: largest difference of logits, and what it changed at all."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of its plotting libraries, at import
        import pyvene as pv
    model, where = text_model(), {"sources->base": (3, 4)}
    base, source = torch.arange(1, 9)[None], torch.arange(20, 28)[None]
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = pv.IntervenableConfig(CONFIG["representations"], pv.VanillaIntervention)
        theirs = pv.IntervenableModel(config, model)
        wanted = theirs({"input_ids": base}, [{"input_ids": source}], where)[1].logits
        plain = model(base).logits
    lens = il.LatentModel(model, spec=False)
    inputs = [{"input_ids": i, "attention_mask": torch.ones_like(i)} for i in (base, source)]
    with torch.no_grad(), from_pyvene(lens, config).active(where, sources=[inputs[1]]):
        ours, _ = lens.run_with_cache(inputs[0], names_filter="hook_embed")
    return float((ours - wanted).abs().max()), float((wanted - plain).abs().max())


def main() -> None:
    """Print what the config does, beside what is known."""
    print("a pyvene config at the first latent; the share of answers that become the donor's:")
    for name, oracle in (("latent-content", "1.0"), ("latent-ignored", "0.0")):
        share, proof = swapped(name)
        print(f"  {name}: {share:.2f} (known: {oracle}); {proof}")
    print(f"ours as a config: {sent_out()['intervention_types']}")
    if find_spec("pyvene") is None:
        print("pyvene is not installed, so there is nothing to compare with: pip install pyvene")
        return
    difference, change = against_pyvene()
    print(
        f"a text model here and in pyvene: difference {difference:.1e} of a change of {change:.2g}"
    )


if __name__ == "__main__":
    main()
